"""Methods that keep all experts and store each in fewer bytes: sparse, quantised, of low rank."""

import math

import numpy as np

from moeits.criteria.base import Layer
from moeits.criteria.clusters import stun
from moeits.errors import BudgetError
from moeits.study.methods.change import Change

BITS = 16
"""Bits of a weight before."""

SCALE_BITS = 32
"""Bits of the scale and the least value of a quantised row."""

CODES = (1, 2, 3, 4, 5, 6, 8)
"""Bits per weight to choose from."""


def _by_expert(layer: Layer) -> dict[str, np.ndarray]:
    """Root mean square of each projection's weighted inputs, (E, columns)."""
    known = layer.statistics
    used = np.maximum(known.counts, 1)[:, None]
    inputs, neurons = np.sqrt(known.inputs_squared / used), np.sqrt(known.neurons_squared / used)
    return {"gate": inputs, "up": inputs, "down": neurons}


def sparse(weights: np.ndarray, size: np.ndarray, share: float) -> np.ndarray:
    """Keep in every row the weights whose magnitude times size of the input is largest; the others become 0.

    `weights` (..., rows, columns), `size` (..., columns) of the inputs, and the `share` of each row to keep,
    rounded half up.
    """
    columns = weights.shape[-1]
    zeros = columns - int(share * columns + 0.5)
    order = np.argsort(np.abs(weights) * size[..., None, :], axis=-1, kind="stable")
    out = weights.copy()
    np.put_along_axis(out, order[..., :zeros], 0, axis=-1)
    return out


def moe_pruner(layer: Layer, n_keep: int) -> Change:
    """Zero the weights with the least magnitude times router-weighted input norm, in every row.

    References
    ----------
    doi:10.48550/arXiv.2410.12013, after Wanda, doi:10.48550/arXiv.2306.11695.
    """
    return _thinned(layer, tuple(range(layer.experts)), n_keep)


def stun_sparse(layer: Layer, n_keep: int) -> Change:
    """Remove half of the budget as experts, the rest as single weights of the kept experts.

    References
    ----------
    doi:10.48550/arXiv.2409.06211.
    """
    return _thinned(layer, stun(layer, (layer.experts + n_keep + 1) // 2), n_keep)


def _thinned(layer: Layer, kept: tuple[int, ...], n_keep: int) -> Change:
    """Thin the kept experts to the bytes of `n_keep` of them."""
    block, sizes, ids = layer.weights, _by_expert(layer), list(kept)
    if len(ids) == n_keep:
        return Change(block, kept, n_keep / layer.experts)
    share = max(n_keep / len(ids) - 1 / BITS, 0)  # the mask takes a bit of each weight
    for name, part in block.items():
        part[ids] = sparse(part[ids], sizes[name][ids], share)
    left = sum(np.count_nonzero(part[ids]) for part in block.values())
    mask = sum(part[ids].size for part in block.values()) / BITS
    return Change(block, kept, float((left + mask) / sum(part.size for part in block.values())))


def quantise(weights: np.ndarray, bits: int) -> np.ndarray:
    """Round every row of matrices to 2^bits equally spaced values from its least to its largest weight."""
    low, high = weights.min(axis=-1, keepdims=True), weights.max(axis=-1, keepdims=True)
    step = np.maximum((high - low) / (2**bits - 1), np.finfo(np.float32).tiny)
    return (low + np.round((weights - low) / step) * step).astype(weights.dtype)


def allocate_bits(errors: np.ndarray, costs: np.ndarray, budget: float) -> np.ndarray:
    """Choose a number of bits for every expert: the largest saving of error for its cost first.

    `errors` (E, C) are the weighted errors of the experts at C numbers of bits, `costs` (C,) the bits that an
    expert then takes, ascending, and `budget` the bits of all. Returns the index into `costs` of each expert;
    a BudgetError where the fewest bits are above the budget.
    """
    experts, choices = errors.shape
    chosen = np.zeros(experts, dtype=int)
    spent = experts * costs[0]
    if spent > budget:
        raise BudgetError(f"the budget of {budget:g} bits is below the {spent:g} of the coarsest codes")
    while True:
        steps = [
            ((errors[e, at] - errors[e, to]) / (costs[to] - costs[at]), e, to)
            for e, at in enumerate(chosen)
            for to in range(at + 1, choices)
            if spent + costs[to] - costs[at] <= budget
        ]
        if not steps:
            return chosen
        _, e, to = max(steps, key=lambda step: step[0])
        spent += costs[to] - costs[chosen[e]]
        chosen[e] = to


def mc_moe(layer: Layer, n_keep: int) -> Change:
    """Give important experts more bits, within the bytes of `n_keep` experts in 16 bits.

    References
    ----------
    doi:10.48550/arXiv.2410.06270.
    """
    known, block = layer.statistics, layer.weights
    importance = np.sqrt((known.counts / known.tokens) * (known.weights / known.tokens))
    size = sum(part[0].size for part in block.values())
    scales = SCALE_BITS * sum(part.shape[1] for part in block.values())
    quantised = [{name: quantise(part, bits) for name, part in block.items()} for bits in CODES]
    errors = np.stack(
        [
            np.sqrt(sum(((coarse[name] - part) ** 2).sum(axis=(1, 2)) for name, part in block.items()))
            for coarse in quantised
        ],
        axis=1,
    )
    costs = np.array([bits * size + scales for bits in CODES], dtype=float)
    chosen = allocate_bits(importance[:, None] * errors, costs, n_keep * size * BITS)
    new = {name: np.stack([quantised[at][name][e] for e, at in enumerate(chosen)]) for name in block}
    return Change(
        new, tuple(range(layer.experts)), float(costs[chosen].sum() / (layer.experts * size * BITS))
    )


def low_rank(layer: Layer, n_keep: int) -> Change:
    """Replace every matrix by its best one of low rank, with as many numbers as `n_keep` of the experts have.

    References
    ----------
    Intra-expert decomposition of MoE-I², doi:10.48550/arXiv.2411.01016.
    """
    block, used = {}, 0
    for name, part in layer.weights.items():
        rows, columns = part.shape[1:]
        rank = max(math.floor(n_keep / layer.experts * rows * columns / (rows + columns)), 1)
        left, values, right = np.linalg.svd(part, full_matrices=False)
        block[name] = (left[:, :, :rank] * values[:, None, :rank]) @ right[:, :rank]
        used += rank * (rows + columns)
    size = sum(part[0].size for part in block.values())
    return Change(block, tuple(range(layer.experts)), used / size)
