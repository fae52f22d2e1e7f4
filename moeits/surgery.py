"""Physical pruning: cut experts and their router rows out of a model, and save and reload what is left.

Source: step 4 of the method, "physical pruning" (arXiv 2604.10603, section 4.2). The router's softmax runs
over the experts that remain, so a pruned model equals the whole one with the scores of the removed experts
masked out; that is what :func:`masked` does, and what the tests compare with.
"""

import copy
import inspect
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from pprint import pformat
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from moeits.card import model_card, read_card
from moeits.families import EXPERT_COUNTS, TOP_KS, MoELayer, Sizes, check_kept, moe_layers, refusal, sizes
from moeits.paths import whole
from moeits.selection import Kept

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

REMOTE_CODE = "modeling_moeits.py"
"""File in a pruned folder that loads it where this package is not installed."""


def prune_model(model: nn.Module, kept: Mapping[int, Sequence[int]] | Kept) -> nn.Module:
    """Remove experts from a model, in place.

    Everything is checked first: when a ValueError is raised the model is as it was. Where fewer experts
    remain than a token uses, the layer's top-k shrinks. ``config.num_experts_per_layer`` lists every
    Mixture-of-Experts layer, ``config.unpruned`` the sizes of the whole model, and ``model.kept`` is what
    ``kept.json`` will hold.

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
    ValueError
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
        raise ValueError(
            "the model's weights are quantised, which pruning does not support: load it dequantised"
        )
    before = sizes(model)
    for layer in layers:
        ids = chosen[layer.layer]
        if len(ids) < layer.num_experts:
            cut_experts(model, ids, layer.top_k_of(len(ids)), layer.tensors, layer.counters, layer.top_ks)
    config = model.config.get_text_config()
    for key, value in pruned_settings(config.to_dict(), layers, chosen, before).items():
        setattr(config, key, value)
    if len({len(ids) for ids in chosen.values()}) == 1:
        layer = moe_layers(model)[0]
        for keys, value in ((EXPERT_COUNTS, layer.num_experts), (TOP_KS, layer.top_k)):
            for key in keys:
                if type(vars(model).get(key)) is int:
                    setattr(model, key, value)
    _refuse_router_loss_in(model)
    model.kept = compose(getattr(model, "kept", None), kept)
    return model


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
    ValueError
        See :func:`moeits.families.check_kept`; also if the choice was made for another number of experts.
    """
    counts = {layer.layer: layer.num_experts for layer in layers}
    if not isinstance(kept, Kept):
        return Kept(check_kept(layers, kept), counts, model, fingerprint, criterion="given")
    for layer, count in kept.num_experts.items():
        if counts.get(layer, count) != count:
            raise ValueError(
                f"layer {layer} has {counts[layer]} experts, but the kept ones were chosen out of {count}: "
                f"the choice is for another model ({kept.model or 'not named'})"
            )
    return replace(kept, layers=check_kept(layers, kept.layers), num_experts=counts)


def compose(first: Kept | None, second: Kept) -> Kept:
    """Kept experts after two prunings of a model, in the numbers of the whole one."""
    if first is None:
        return second
    return replace(
        second,
        layers={layer: tuple(ids[i] for i in second.layers[layer]) for layer, ids in first.layers.items()},
        num_experts=first.num_experts,
        model=first.model,
        fingerprint=first.fingerprint,
        criterion=f"{first.criterion}, then {second.criterion}",
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
    top_ks = {layer.top_k_of(len(kept[layer.layer])) for layer in layers}
    if len(set(counts.values())) == len(top_ks) == 1:
        for keys, value in ((EXPERT_COUNTS, next(iter(counts.values()))), (TOP_KS, next(iter(top_ks)))):
            changed |= {key: value for key in keys if type(settings.get(key)) is int}
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
    for name, dimension in tensors.items():
        owner_name, _, key = name.rpartition(".")
        owner = model.get_submodule(owner_name)
        old = getattr(owner, key)
        new = old.index_select(dimension, torch.as_tensor(ids, device=old.device))
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
    ValueError
        As :func:`prune_model`, and if a router's weight is not float32.
    """
    layers = moe_layers(model)
    kept = check_kept(layers, kept)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    removed_rows: dict[int, torch.Tensor] = {}
    biases: list[tuple[torch.Tensor, torch.Tensor]] = []
    for layer in layers:
        removed = sorted(set(range(layer.num_experts)) - set(kept[layer.layer]))
        for name in layer.router:
            tensor = tensors[name]
            ids = torch.tensor(removed, device=tensor.device, dtype=torch.long)
            if name.endswith(".weight"):
                if tensor.dtype != torch.float32:
                    raise ValueError(f"{name} is {tensor.dtype}: masking needs a model in float32")
                removed_rows[tensor.data_ptr()] = ids
            elif "bias" in name:
                biases.append((tensor, tensor.detach().clone()))
                with torch.no_grad():
                    tensor.index_fill_(layer.tensors[name], ids, -torch.inf)
    try:
        with _MaskedScores(removed_rows):
            yield model
    finally:
        with torch.no_grad():
            for tensor, before in biases:
                tensor.copy_(before)


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


def save_model(
    model: "PreTrainedModel",
    folder: str | Path,
    *,
    tokenizer: object | None = None,
    scores: Iterable[Mapping[str, object]] = (),
    max_shard_size: int | str = "5GB",
) -> Path:
    """Save a pruned model as a folder that loads where this package is not installed.

    Tensors have the names of the model's family, as on the hub. Where every layer keeps the same number of
    experts the folder is a plain checkpoint of its family; elsewhere it holds the few lines of code that it
    needs (``trust_remote_code=True``). ``kept.json`` and a model card are written beside the weights.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Model that went through :func:`prune_model`.
    folder : str or Path
        Folder to make; written whole or not at all.
    tokenizer : optional
        Tokenizer to save with it.
    scores : iterable of mapping
        Measured scores for the model card: ``task``, ``metric``, ``value``, and ``stderr``, ``n`` if known.
    max_shard_size : int or str
        Size of the largest weight file.

    Returns
    -------
    Path
        The folder.

    Raises
    ------
    FileExistsError
        If the folder exists.
    ValueError
        If the model was not pruned.
    """
    folder = Path(folder)
    if folder.exists():
        raise FileExistsError(f"{folder} exists: choose another folder, or remove it first")
    if getattr(model, "kept", None) is None:
        raise ValueError(
            "this model was not pruned: save it with model.save_pretrained, or prune_model it first"
        )
    base = Path(model.config.name_or_path)
    with whole(folder) as part:
        model.save_pretrained(part, max_shard_size=max_shard_size)
        if tokenizer is not None:
            tokenizer.save_pretrained(part)
        for pattern in ("LICENSE*", "NOTICE*"):
            for file in base.glob(pattern) if base.is_dir() else ():
                shutil.copy(file, part)
        describe_folder(part, model.kept, scores=scores, base_card=read_card(base))
    return folder


def load_model(
    folder: str | Path, *, device: str | torch.device | None = None, **options: object
) -> "PreTrainedModel":
    """Load a model, pruned or whole, without running any code of its folder.

    Parameters
    ----------
    folder : str or Path
        Folder of a Hugging Face checkpoint.
    device : str or torch.device, optional
        Where the model goes; by default it stays where ``device_map`` says, or on the CPU.
    **options
        Passed on to ``from_pretrained``: ``dtype``, ``device_map``, ``experts_implementation``, ...

    Returns
    -------
    transformers.PreTrainedModel
        The model, in evaluation mode. A pruned one knows its ``kept.json`` as ``model.kept``.

    Raises
    ------
    FileNotFoundError
        If there is no ``config.json``.
    ValueError
        If it names no causal language model that transformers knows.
    """
    config = read_config(folder)
    model = _model_class(config).from_pretrained(folder, config=config, **options)
    if device is not None:
        model.to(device)
    if model.device.type == "cpu" and "experts_implementation" not in options:
        from moeits.unstack import ONE_BY_ONE

        # There the grouped matrix product, which is the default, is slower than a loop over experts.
        model.set_experts_implementation(ONE_BY_ONE)
    if (file := Path(folder) / "kept.json").is_file():
        model.kept = Kept.read(file)
    return model


def read_config(folder: str | Path) -> "PreTrainedConfig":
    """Read the configuration of a checkpoint's language model, without running any code of its folder."""
    from transformers import CONFIG_MAPPING, AutoConfig

    file = Path(folder) / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{folder} is no model folder: it has no config.json")
    try:
        model_type = json.loads(file.read_text(encoding="utf-8"))["model_type"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is no configuration of a model: {error!r}") from error
    if model_type not in CONFIG_MAPPING:
        raise ValueError(refusal(model_type))
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    # In a checkpoint of several models, the language model's class may take its own part alone.
    text = config.get_text_config()
    return text if _native_class(config).config_class is type(text) else config


def hollow_model(config: "PreTrainedConfig") -> "PreTrainedModel":
    """Build a model, pruned or whole, from its configuration alone: every tensor has a shape and no data."""
    with torch.device("meta"):
        return _model_class(config)._from_config(copy.deepcopy(config), dtype=config.dtype)


def describe_folder(
    folder: Path, kept: Kept, *, scores: Iterable[Mapping[str, object]] = (), base_card: str = ""
) -> None:
    """Write ``kept.json``, the model card and, where it is needed, the loading code into a pruned folder.

    Parameters
    ----------
    folder : Path
        Folder with a ``config.json`` that :func:`pruned_settings` went into.
    kept : Kept
        What was kept.
    scores, base_card
        See :func:`moeits.card.model_card`.
    """
    config = read_config(folder)
    model = hollow_model(config)
    plain = _is_plain(config)
    file = folder / "config.json"
    settings = json.loads(file.read_text(encoding="utf-8"))
    settings.pop("auto_map", None)
    (folder / REMOTE_CODE).unlink(missing_ok=True)
    base = _native_class(config).__name__
    if not plain:
        (folder / REMOTE_CODE).write_text(_remote_code(base, moe_layers(model)), encoding="utf-8")
        settings["auto_map"] = {"AutoModelForCausalLM": f"{Path(REMOTE_CODE).stem}.Pruned{base}"}
    settings["architectures"] = [base if plain else f"Pruned{base}"]
    file.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    kept.write(folder / "kept.json")
    before = config.get_text_config().unpruned
    card = model_card(kept, before, sizes(model), plain=plain, scores=scores, base_card=base_card)
    (folder / "README.md").write_text(card, encoding="utf-8")


def refuse_router_loss(model: nn.Module, args: tuple, options: Mapping[str, object]) -> None:  # noqa: ARG001
    """Say why a model whose layers keep different numbers of experts has no auxiliary router loss."""
    config = model.config.get_text_config()
    asked = options.get("output_router_logits")
    if asked or (asked is None and getattr(config, "output_router_logits", False)):
        counts = set(config.num_experts_per_layer.values())
        if len(counts) > 1 and hasattr(model, "router_aux_loss_coef"):
            raise ValueError(
                f"output_router_logits: the auxiliary router loss needs the same number of experts in every "
                f"layer, this model has {sorted(counts)}; train it without (output_router_logits=False)"
            )


def _refuse_router_loss_in(model: nn.Module) -> None:
    if refuse_router_loss not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(refuse_router_loss, with_kwargs=True)


def _native_class(config: "PreTrainedConfig") -> type:
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM._model_mapping[type(config)]
    except KeyError:
        raise ValueError(refusal(config.model_type)) from None


def _model_class(config: "PreTrainedConfig") -> type:
    """Class that builds the model which `config` describes, with the experts that each layer keeps.

    It has the native class's name and module, so that transformers converts names of tensors as for that one.
    """
    native = _native_class(config)
    if getattr(config.get_text_config(), "num_experts_per_layer", None) is None:
        return native

    def __init__(self: nn.Module, config: "PreTrainedConfig", *args: object, **options: object) -> None:
        super(pruned, self).__init__(config, *args, **options)
        counts = config.get_text_config().num_experts_per_layer
        for layer in moe_layers(self):
            count = counts[str(layer.layer)]
            if count < layer.num_experts:
                top_k = layer.top_k_of(count)
                cut_experts(self, range(count), top_k, layer.tensors, layer.counters, layer.top_ks)
        _refuse_router_loss_in(self)

    names = {"__init__": __init__, "__module__": native.__module__, "__qualname__": native.__qualname__}
    pruned = type(native.__name__, (native,), names)
    return pruned


def _is_plain(config: "PreTrainedConfig") -> bool:
    """Whether the family's own class builds the model that `config` describes."""
    with torch.device("meta"):
        native = _native_class(config)._from_config(copy.deepcopy(config), dtype=config.dtype)
    layers = [
        [(layer.num_experts, layer.top_k) for layer in moe_layers(m)] for m in (native, hollow_model(config))
    ]
    return layers[0] == layers[1]


def _remote_code(base: str, layers: Sequence[MoELayer]) -> str:
    """Write the source of a class that builds the pruned model, out of the functions that build it here."""
    prefixes = {layer.layer: f"{layer.name}.".partition(f".{layer.layer}.")[0] + "." for layer in layers}
    tables = {
        (
            tuple((name.removeprefix(start), dimension) for name, dimension in layer.tensors.items()),
            tuple(name.removeprefix(start) for name in layer.counters),
            tuple(name.removeprefix(start) for name in layer.top_ks),
        )
        for layer in layers
        for start in [f"{prefixes[layer.layer]}{layer.layer}."]
    }
    if len(tables) != 1 or len(set(prefixes.values())) != 1:
        raise ValueError(f"the Mixture-of-Experts layers of {base} are built differently from each other")
    [(tensors, counters, top_ks)] = tables
    return _TEMPLATE.format(
        base=base,
        prefix=prefixes[layers[0].layer],
        layers=pformat({layer.layer: (layer.num_experts, layer.top_k) for layer in layers}, width=100),
        tensors=pformat(dict(tensors), width=100),
        counters=pformat(counters, width=100),
        top_ks=top_ks,
        cut_experts=inspect.getsource(cut_experts),
        refuse_router_loss=inspect.getsource(refuse_router_loss),
    )


_TEMPLATE = '''"""Loads this checkpoint, whose layers keep different numbers of experts."""

# transformers looks for the next line to know that the implementation of the experts can be chosen:
# @use_experts_implementation

from collections.abc import Mapping, Sequence

import torch
from torch import nn
from transformers import {base}

# Decoder layer: experts, experts per token.
LAYERS = {layers}
# In each of these layers, tensor: dimension of the experts.
TENSORS = {tensors}
COUNTERS = {counters}
TOP_KS = {top_ks}


{cut_experts}

{refuse_router_loss}

class Pruned{base}({base}):
    """{base} with the experts that are left in each layer."""

    @classmethod
    def is_custom_code(cls):
        """Have transformers convert the names of stored tensors as for the family's own class."""
        return False

    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        for layer, (count, top_k) in LAYERS.items():
            layer = self.get_submodule(f"{prefix}{{layer}}")
            cut_experts(layer, range(count), top_k, TENSORS, COUNTERS, TOP_KS)
        self.register_forward_pre_hook(refuse_router_loss, with_kwargs=True)
'''


def _model_name(config: "PreTrainedConfig") -> str:
    """Name of a model on the hub, or of its folder: a path would say whose machine this is."""
    name = config.name_or_path
    return Path(name).name if Path(name).is_absolute() or Path(name).exists() else name
