"""Criteria that ask how far the layer's output moves when experts are removed and tokens routed anew."""

from collections.abc import Mapping, Sequence

import numpy as np

from moeits.criteria.base import Layer, Score, all_subsets, number_of_subsets

SUBSETS = 5000
"""Subsets of a layer's experts up to which all of them are tried."""


def output_error(gates: np.ndarray, reference: np.ndarray, gram: np.ndarray) -> float:
    """Squared error of the layer's output, as a share of the squared output: 1 where it is lost altogether.

    `gates` (n, E) are the router's weights in the pruned layer, `reference` (n, E) in the unpruned one, and
    `gram` (n, E, E) the inner products of the experts' outputs for each token.
    """
    change = gates - reference
    return float(_energy(change, gram) / _energy(reference, gram))


def _energy(gates: np.ndarray, gram: np.ndarray) -> float:
    return float((np.matmul(gram, gates[:, :, None])[:, :, 0] * gates).sum())


def subset_error(layer: Layer, kept: Sequence[int]) -> float:
    """Error of the layer's output on the sampled tokens when only `kept` are left."""
    known = layer.statistics
    return output_error(layer.routing.gates(known.logits, kept), known.gates, known.gram)


def greedy_removals(layer: Layer) -> tuple[tuple[int, float], ...]:
    """Remove one expert after the other, each time the one without which the layer's output moves least.

    Where the router selects groups first, every group loses one before any loses another. Each step is the
    removed expert and the error after that, until one of each group is left.
    """
    left = list(range(layer.experts))
    group = {expert: expert * layer.groups // layer.experts for expert in left}
    steps = []
    while len(left) > layer.groups:
        done = {group[expert] for expert, _ in steps[len(steps) // layer.groups * layer.groups :]}
        removable = [expert for expert in left if group[expert] not in done]
        errors = [subset_error(layer, [k for k in left if k != expert]) for expert in removable]
        least = int(np.argmin(errors))
        steps.append((removable[least], errors[least]))
        left.remove(removable[least])
    return tuple(steps)


def lu(layer: Layer, n_keep: int) -> tuple[int, ...]:
    """Keep the subset whose layer output is nearest to the unpruned layer's.

    All subsets are tried where there are at most :data:`SUBSETS`, and of equally good ones the first in
    lexicographic order is kept; elsewhere experts are removed one by one.

    References
    ----------
    doi:10.48550/arXiv.2402.14800.
    """
    if number_of_subsets(layer, n_keep) <= SUBSETS:
        return min(all_subsets(layer, n_keep), key=lambda kept: subset_error(layer, kept))
    steps = layer.once("greedy removals", greedy_removals)
    removed = {expert for expert, _ in steps[: layer.experts - n_keep]}
    return tuple(expert for expert in range(layer.experts) if expert not in removed)


def leave_one_out(layer: Layer) -> np.ndarray:
    """Error of the layer's output when one expert is removed, for each expert, shape (E,)."""
    everyone = range(layer.experts)
    return np.array([subset_error(layer, [k for k in everyone if k != expert]) for expert in everyone])


def by_layer_importance(layers: Mapping[int, Layer], share: float, _: Score | None = None) -> dict[int, int]:
    """Spread a share over the layers in proportion to what the loss of single experts does to each.

    References
    ----------
    Inter-expert pruning of MoE-I², doi:10.48550/arXiv.2411.01016.
    """
    importance = {
        number: float(layer.once("leave one out", leave_one_out).sum()) for number, layer in layers.items()
    }
    experts = {number: layer.experts for number, layer in layers.items()}
    minimum = {number: layer.minimum for number, layer in layers.items()}
    total = max(round(share * sum(experts.values())), sum(minimum.values()))
    return proportional(importance, total, minimum, experts)


def proportional(
    weights: Mapping[int, float], total: int, lower: Mapping[int, int], upper: Mapping[int, int]
) -> dict[int, int]:
    """Deal out a total in proportion to weights, not negative, within bounds, by largest remainders."""
    keys = list(weights)
    low, high = (np.array([bound[key] for key in keys], dtype=float) for bound in (lower, upper))
    values = np.array([weights[key] for key in keys], dtype=float)
    values = np.maximum(values / max(values.max(), np.finfo(float).tiny), 1e-12)
    # The factor between none and all: what it gives, within the bounds, grows with it.
    smallest, biggest = 0.0, float((high / values).max())
    for _ in range(200):
        factor = (smallest + biggest) / 2
        if np.clip(factor * values, low, high).sum() < total:
            smallest = factor
        else:
            biggest = factor
    exact = np.clip(biggest * values, low, high)
    counts = np.floor(exact + 1e-9)
    for at in np.argsort(-(exact - counts), kind="stable"):
        if counts.sum() < total and counts[at] < high[at]:
            counts[at] += 1
    return dict(zip(keys, counts.astype(int).tolist(), strict=True))
