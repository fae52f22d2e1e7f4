"""Drop experts, and give their neurons to the kept ones (DERN)."""

import numpy as np

from moeits.criteria.base import Layer, best
from moeits.criteria.router import router_weight
from moeits.study.methods.change import Change

SIMILAR = 0.5
"""Cosine above which a dropped neuron joins the nearest kept one."""


def recombine(
    neurons: np.ndarray, importance: np.ndarray, kept: tuple[int, ...], similar: float = SIMILAR
) -> np.ndarray:
    """Let every kept neuron take up the dropped ones that point its way.

    `neurons` (E, m, w) are weights by neuron, `importance` (E,) weighs an expert's neurons in the averages.
    A dropped neuron whose cosine to every kept one is below `similar` is lost. Dropped experts are as they
    were.
    """
    experts, count, width = neurons.shape
    dropped = [expert for expert in range(experts) if expert not in kept]
    held = neurons[list(kept)].reshape(-1, width)
    lost = neurons[dropped].reshape(-1, width)
    cosine = _unit(lost) @ _unit(held).T
    sums = held * np.repeat(importance[list(kept)], count)[:, None]
    totals = np.repeat(importance[list(kept)], count).astype(np.float64)
    if len(lost):
        nearest = cosine.argmax(axis=1)
        joins = np.flatnonzero(cosine.max(axis=1) >= similar)
        weight = np.repeat(importance[dropped], count)[joins]
        np.add.at(sums, nearest[joins], weight[:, None] * lost[joins])
        np.add.at(totals, nearest[joins], weight)
    out = neurons.copy()
    out[list(kept)] = (sums / totals[:, None]).reshape(len(kept), count, width)
    return out


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-30)


def dern(layer: Layer, n_keep: int) -> Change:
    """Drop the experts with the least router weight, and recombine their neurons into the others.

    References
    ----------
    Dropping Experts, Recombining Neurons, doi:10.48550/arXiv.2509.10377.
    """
    importance = router_weight(layer)
    kept = best(importance, n_keep, layer.groups)
    neurons = recombine(layer.neurons, np.maximum(importance, 1e-12), kept)
    names = [*(name for name in ("gate", "up") if name in layer.block), "down"]
    block = dict(zip(names, np.split(neurons, len(names), axis=2), strict=True))
    block["down"] = block["down"].transpose(0, 2, 1)
    return Change(block, kept, n_keep / layer.experts)
