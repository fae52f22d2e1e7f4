"""Criteria that ask how far the layer's output moves when experts are gone and tokens are routed anew."""

from collections.abc import Mapping, Sequence

import numpy as np

from moeits.criteria.base import Layer, all_subsets, number_of_subsets, proportional

SUBSETS = 5000
"""Subsets of a layer's experts up to which all of them are tried."""


def output_error(gates: np.ndarray, reference: np.ndarray, gram: np.ndarray) -> float:
    """Squared error of the layer's output, as a share of the squared output: 1 where it is lost altogether.

    The output is the sum of the experts' outputs with the router's weights: `gates` (n, E) in the smaller
    and `reference` (n, E) in the whole layer. All that is needed of the outputs is `gram` (n, E, E), their
    inner products for each token.
    """
    change = gates - reference
    return float(_energy(change, gram) / _energy(reference, gram))


def _energy(gates: np.ndarray, gram: np.ndarray) -> float:
    return float((np.matmul(gram, gates[:, :, None])[:, :, 0] * gates).sum())


def subset_error(layer: Layer, kept: Sequence[int]) -> float:
    """Error of the layer's output on the sampled tokens when only `kept` are left."""
    known = layer.statistics
    return output_error(layer.routing.gates(known.logits, kept), known.gates, known.gram)


def best_of_all_subsets(layer: Layer, n_keep: int) -> tuple[int, ...]:
    """Try every subset of `n_keep` experts; of equally good ones, the first in lexicographic order."""
    return min(all_subsets(layer, n_keep), key=lambda kept: subset_error(layer, kept))


def greedy_removals(layer: Layer) -> tuple[tuple[int, float], ...]:
    """Remove one expert after the other, each time the one whose loss moves the layer's output least.

    Where the router selects groups first, every group loses one before any loses another.

    Returns
    -------
    tuple of (int, float)
        Removed expert and error after that, in order, until one of each group is left.
    """
    left = list(range(layer.experts))
    group = {expert: expert * layer.groups // layer.experts for expert in left}
    steps = []
    while len(left) > layer.groups:
        done = {group[expert] for expert, _ in steps[len(steps) // layer.groups * layer.groups :]}
        may_go = [expert for expert in left if group[expert] not in done]
        errors = [subset_error(layer, [k for k in left if k != expert]) for expert in may_go]
        least = int(np.argmin(errors))
        steps.append((may_go[least], errors[least]))
        left.remove(may_go[least])
    return tuple(steps)


def lu(layer: Layer, n_keep: int) -> tuple[int, ...]:
    """Keep the subset whose layer output is nearest to the whole layer's.

    All subsets are tried where there are at most :data:`SUBSETS`; elsewhere experts go one by one.

    References
    ----------
    doi:10.48550/arXiv.2402.14800.
    """
    if number_of_subsets(layer, n_keep) <= SUBSETS:
        return best_of_all_subsets(layer, n_keep)
    steps = layer.once("greedy removals", greedy_removals)
    gone = {expert for expert, _ in steps[: layer.experts - n_keep]}
    return tuple(expert for expert in range(layer.experts) if expert not in gone)


def leave_one_out(layer: Layer) -> np.ndarray:
    """Error of the layer's output when one expert is gone, for each expert, shape (E,)."""
    everyone = range(layer.experts)
    return np.array([subset_error(layer, [k for k in everyone if k != expert]) for expert in everyone])


def by_layer_importance(layers: Mapping[int, Layer], share: float) -> dict[int, int]:
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
