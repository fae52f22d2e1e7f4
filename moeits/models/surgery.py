"""Physical pruning: cut experts and their router rows out of a model.

Source: step 4 of the method, "physical pruning" (arXiv 2604.10603, section 4.2). The router's softmax runs
over the experts that remain, so a pruned model equals the whole one with the scores of the removed experts
masked out; that is what :func:`masked` does, and what the tests compare with.
"""

import operator
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from moeits.errors import MoeitsError
from moeits.kept import PADDED, Kept, versions
from moeits.models.families import (
    EXPERT_COUNTS,
    TOP_KS,
    MoELayer,
    Sizes,
    check_kept,
    moe_layers,
    sizes,
)

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def prune_model(model: nn.Module, kept: Mapping[int, Sequence[int]] | Kept) -> nn.Module:
    """Remove experts from a model, in place.

    Everything is checked first: when a ValueError is raised the model is as it was. Where fewer experts
    remain than a token uses, the layer's top-k shrinks, with a warning. ``config.num_experts_per_layer``
    lists every Mixture-of-Experts layer, ``config.unpruned`` the sizes of the whole model, and ``model.kept``
    is what ``kept.json`` will hold. ``model.save_pretrained`` then writes a folder that loads.

    Parameters
    ----------
    model : torch.nn.Module
        Causal language model of a known family, on any device and in any floating dtype.
    kept : mapping of int to sequence of int, or Kept
        Decoder layer to the experts that stay; layers not named stay whole.

    Returns
    -------
    torch.nn.Module
        The same model.

    Raises
    ------
    MoeitsError
        See :func:`complete`; also if the weights are quantised.

    Notes
    -----
    The auxiliary loss that balances a router's load works where every layer keeps the same number of experts;
    elsewhere transformers cannot add the layers up, and asking for it (``output_router_logits``) is an error.
    """
    layers = moe_layers(model)
    kept = complete(kept, layers, _model_name(model.config))
    chosen = kept.layers
    if getattr(model, "is_quantized", False):
        raise MoeitsError(
            "the model's weights are quantised, which pruning does not support: load it dequantised"
        )
    composed = compose(getattr(model, "kept", None), kept)
    before = sizes(model)
    for layer in layers:
        ids = chosen[layer.layer]
        if len(ids) < layer.num_experts:
            cut_experts(model, ids, layer.top_k_of(len(ids)), layer.tensors, layer.counters, layer.top_ks)
    warn_of_top_k(kept)
    config = model.config.get_text_config()
    for key, value in pruned_settings(config.to_dict(), layers, chosen, before).items():
        if key.endswith("_config"):
            getattr(config, key).update(value)
        else:
            setattr(config, key, value)
    if len({len(ids) for ids in chosen.values()}) == 1:
        layer = moe_layers(model)[0]
        for keys, value in ((EXPERT_COUNTS, layer.num_experts), (TOP_KS, layer.top_k)):
            for key in keys:
                if type(vars(model).get(key)) is int:
                    setattr(model, key, value)
    refuse_router_loss_in(model)
    model.kept = composed
    save_whole_folders(model)
    return model


def save_whole_folders(model: nn.Module) -> None:
    """Have ``model.save_pretrained`` write the loading code, ``kept.json`` and the card of a pruned model."""
    if not hasattr(model, "saves_whole_folders"):
        model.__class__ = _saving_whole_folders(type(model))


@cache
def _saving_whole_folders(native: type) -> type:
    """Subclass by the same name, by which transformers converts the names of tensors."""

    def save_pretrained(self: nn.Module, save_directory: str, *args: object, **options: object) -> None:
        from moeits.models.folder import complete_folder

        super(saving, self).save_pretrained(save_directory, *args, **options)
        if options.get("is_main_process", True):
            complete_folder(self, Path(save_directory))

    names = {"__module__": native.__module__, "__qualname__": native.__qualname__}
    own = {"save_pretrained": save_pretrained, "saves_whole_folders": True}
    saving = type(native.__name__, (native,), names | own)
    return saving


def warn_of_top_k(kept: Kept) -> None:
    """Say in which layers fewer experts remain than a token used."""
    if kept.top_k:
        layers = ", ".join(f"{layer}: {before} to {after}" for layer, (before, after) in kept.top_k.items())
        warnings.warn(
            f"fewer experts remain than a token used, so top-k shrinks (layer {layers}), as in the authors' "
            "code; at_least_top_k (--at-least-top-k) keeps enough of them",
            stacklevel=3,  # whoever prunes
        )


def complete(
    kept: Mapping[int, Sequence[int]] | Kept,
    layers: Sequence[MoELayer],
    model: str = "",
    fingerprint: str | None = None,
) -> Kept:
    """Check a choice of experts against a model, and extend it to all its layers.

    Parameters
    ----------
    kept : mapping of int to sequence of int, or Kept
        Experts that stay; layers not named stay whole.
    layers : sequence of MoELayer
        The model's layers.
    model, fingerprint : str, optional
        What is recorded of the model where `kept` is a plain mapping.

    Returns
    -------
    Kept
        The kept experts of every layer.

    Raises
    ------
    MoeitsError
        See :func:`moeits.models.families.check_kept`; also if the choice was made for another number of
        experts.
    """
    counts = {layer.layer: layer.num_experts for layer in layers}
    if not isinstance(kept, Kept):
        kept = Kept(check_kept(layers, kept), counts, model, fingerprint, criterion="given")
    for layer, count in kept.num_experts.items():
        if counts.get(layer, count) != count:
            raise MoeitsError(
                f"layer {layer} has {counts[layer]} experts, but the kept ones were chosen out of {count}: "
                f"the choice is for another model ({kept.model or 'not named'})"
            )
    chosen = check_kept(layers, kept.layers)
    after = {layer.layer: (layer.top_k, layer.top_k_of(len(chosen[layer.layer]))) for layer in layers}
    shrunk = {layer: pair for layer, pair in after.items() if pair[1] < pair[0]}
    return replace(kept, layers=chosen, num_experts=counts, top_k=shrunk, versions=versions(), scores={})


def compose(first: Kept | None, second: Kept) -> Kept:
    """Kept experts after two prunings of a model, in the numbers of the whole one."""
    if first is None:
        return second
    if PADDED in first.budget:
        raise MoeitsError("this model was padded after it was pruned: prune the one that it was made from")
    return replace(
        second,
        layers={layer: tuple(ids[i] for i in second.layers[layer]) for layer, ids in first.layers.items()},
        num_experts=first.num_experts,
        model=first.model,
        fingerprint=first.fingerprint,
        criterion=f"{first.criterion}, then {second.criterion}",
        top_k={
            layer: (first.top_k.get(layer, second.top_k.get(layer))[0], after)
            for layer, (_, after) in {**first.top_k, **second.top_k}.items()
        },
    )


def pruned_settings(
    settings: Mapping[str, object],
    layers: Sequence[MoELayer],
    kept: Mapping[int, Sequence[int]],
    before: Sizes,
) -> dict[str, object]:
    """Work out what a model's configuration says once it is pruned.

    Parameters
    ----------
    settings : mapping of str to object
        Configuration of the model before, as in ``config.json``.
    layers : sequence of MoELayer
        Its layers before.
    kept : mapping of int to sequence of int
        Experts that stay, for every layer.
    before : Sizes
        Sizes of the model before.

    Returns
    -------
    dict of str to object
        The settings that change or are new.
    """
    counts = {str(layer.layer): len(kept[layer.layer]) for layer in layers}
    changed: dict[str, object] = {"num_experts_per_layer": counts}
    if "unpruned" not in settings:
        changed["unpruned"] = {key: getattr(before, key) for key in ("total", "routed", "active", "bytes")}
    if len(set(counts.values())) > 1 and settings.get("output_router_logits"):
        changed["output_router_logits"] = False  # the auxiliary loss cannot add up uneven layers
    top_ks = {layer.top_k_of(len(kept[layer.layer])) for layer in layers}
    if len(set(counts.values())) == len(top_ks) == 1:
        for keys, value in ((EXPERT_COUNTS, next(iter(counts.values()))), (TOP_KS, next(iter(top_ks)))):
            changed |= {key: value for key in keys if type(settings.get(key)) is int}
            for part, inner in settings.items():
                if part.endswith("_config") and isinstance(inner, Mapping):
                    found = {key: value for key in keys if type(inner.get(key)) is int}
                    changed |= {part: {**inner, **changed.get(part, {}), **found}} if found else {}
    return changed


@torch.no_grad()
def cut_experts(
    model: nn.Module,
    ids: Sequence[int],
    top_k: int,
    tensors: Mapping[str, int],
    counters: Sequence[str],
    top_ks: Sequence[str],
) -> None:
    """Keep the experts `ids` of one layer, its tensors and counters given by name; nothing is checked."""
    found = {name: operator.attrgetter(name)(model) for name in tensors}
    # The router lists experts one by one; a matrix of weights may hold several rows of each.
    experts = min(
        len(old) if hasattr(old, "keys") else old.shape[tensors[name]] for name, old in found.items()
    )
    for name, old in found.items():
        owner_name, _, key = name.rpartition(".")
        owner = model.get_submodule(owner_name)
        if hasattr(old, "keys"):
            names, chosen = list(old), [list(old.values())[i] for i in ids]
            old.clear()
            old.update(zip(names, chosen, strict=False))
            owner._is_hf_initialized = True  # or loading would look for as many experts as there were
            continue
        dimension = tensors[name]
        new = old.unflatten(dimension, (experts, -1)).index_select(
            dimension, torch.as_tensor(ids, device=old.device)
        )
        new = new.flatten(dimension, dimension + 1)
        setattr(owner, key, nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new)
    for names, value in ((counters, len(ids)), (top_ks, top_k)):
        for name in names:
            owner_name, _, key = name.rpartition(".")
            setattr(model.get_submodule(owner_name), key, value)


@contextmanager
def masked(model: nn.Module, kept: Mapping[int, Sequence[int]]) -> Iterator[nn.Module]:
    """Run the whole model as if it were pruned: inside the context, no token is routed to a removed expert.

    The reference that surgery is compared with. The scores of removed experts are minus infinity before the
    router normalises or ranks them; no weight of an expert changes.

    Parameters
    ----------
    model : torch.nn.Module
        Whole model in float32 (routers copy their weights in any other dtype, and could not be recognised).
    kept : mapping of int to sequence of int
        As for :func:`prune_model`.

    Yields
    ------
    torch.nn.Module
        The same model.

    Raises
    ------
    MoeitsError
        As :func:`prune_model`, and if a router's weight is not float32.
    """
    layers = moe_layers(model)
    kept = check_kept(layers, kept)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    removed_rows: dict[int, torch.Tensor] = {}
    grouped = [layer for layer in layers if layer.groups > 1]
    biases: list[tuple[torch.Tensor, torch.Tensor]] = []
    for layer in layers:
        removed = sorted(set(range(layer.num_experts)) - set(kept[layer.layer]))
        for name in layer.router:
            tensor = tensors[name]
            ids = torch.tensor(removed, device=tensor.device, dtype=torch.long)
            if name.endswith(".weight"):
                if tensor.dtype != torch.float32:
                    raise MoeitsError(f"{name} is {tensor.dtype}: masking needs a model in float32")
                removed_rows[tensor.data_ptr()] = ids
            elif "bias" in name:
                biases.append((tensor, tensor.detach().clone()))
                with torch.no_grad():
                    tensor.index_fill_(layer.tensors[name], ids, -torch.inf)
    try:
        # Where the selected groups hold fewer experts than top-k, a router would look in other groups.
        for layer in grouped:
            _set_attributes(model, layer.top_ks, layer.top_k_of(len(kept[layer.layer])))
        with _MaskedScores(removed_rows):
            yield model
    finally:
        for layer in grouped:
            _set_attributes(model, layer.top_ks, layer.top_k)
        with torch.no_grad():
            for tensor, before in biases:
                tensor.copy_(before)


def _set_attributes(model: nn.Module, names: Iterable[str], value: int) -> None:
    for name in names:
        owner, _, key = name.rpartition(".")
        setattr(model.get_submodule(owner), key, value)


class _MaskedScores(TorchFunctionMode):
    """Give minus infinity for some outputs of the linear maps whose weights lie at the given addresses."""

    def __init__(self, removed_rows: Mapping[int, torch.Tensor]) -> None:
        super().__init__()
        self.removed_rows = removed_rows

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is functional.linear:
            ids = self.removed_rows.get(args[1].data_ptr())
            if ids is not None:
                return out.index_fill(-1, ids, -torch.inf)
        return out


def refuse_router_loss(model: nn.Module, args: tuple, options: Mapping[str, object]) -> None:  # noqa: ARG001
    """Say why a model whose layers keep different numbers of experts has no auxiliary router loss."""
    config = model.config.get_text_config()
    asked = options.get("output_router_logits")
    if asked or (asked is None and getattr(config, "output_router_logits", False)):
        counts = set(config.num_experts_per_layer.values())
        holder = model if config is model.config else config
        if len(counts) > 1 and hasattr(holder, "router_aux_loss_coef"):
            raise MoeitsError(
                f"output_router_logits: the auxiliary router loss needs the same number of experts in every "
                f"layer, this model has {sorted(counts)}; train it without (output_router_logits=False)"
            )


def refuse_router_loss_in(model: nn.Module) -> None:
    """Have a model call :func:`refuse_router_loss` before every forward pass."""
    if refuse_router_loss not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(refuse_router_loss, with_kwargs=True)


def _model_name(config: "PreTrainedConfig") -> str:
    """Name of a model on the hub, or of its folder: a path would say whose machine this is."""
    name = config.name_or_path
    return Path(name).name if Path(name).is_absolute() or Path(name).exists() else name
