"""Physical pruning: cut experts and their router rows out of a model, and save and reload what is left.

Source: step 4 of the method, "physical pruning" (arXiv 2604.10603, section 4.2). The router's softmax runs over
the experts that remain, so a pruned model equals the whole one with the scores of the removed experts masked
out; that is what :func:`masked` does, and what the tests compare with.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from moeits.families import check_kept, moe_layers


def prune_model(model: nn.Module, kept: Mapping[int, Sequence[int]]) -> nn.Module:
    """Remove experts from a model, in place.

    Everything is checked first: when a ValueError is raised the model is as it was. Where fewer experts remain
    than a token uses, the layer's top-k shrinks. ``config.num_experts_per_layer`` lists every
    Mixture-of-Experts layer.

    Parameters
    ----------
    model : torch.nn.Module
        Causal language model of a known family, on any device and in any floating dtype.
    kept : mapping of int to sequence of int
        Decoder layer to the experts that stay; layers not named stay whole.

    Returns
    -------
    torch.nn.Module
        The same model.

    Raises
    ------
    ValueError
        See :func:`moeits.families.check_kept`; also if the weights are quantised.
    """
    layers = moe_layers(model)
    kept = check_kept(layers, kept)
    if getattr(model, "is_quantized", False):
        raise ValueError(
            "the model's weights are quantised, which pruning does not support: load it dequantised"
        )
    for layer in layers:
        ids = kept[layer.layer]
        if len(ids) < layer.num_experts:
            cut_experts(model, ids, layer.top_k_of(len(ids)), layer.tensors, layer.counters, layer.top_ks)
    model.config.get_text_config().num_experts_per_layer = {
        str(number): len(ids) for number, ids in kept.items()
    }
    return model


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
