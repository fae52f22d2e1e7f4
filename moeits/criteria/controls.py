"""What any criterion must beat, and what none can: random experts, the first ones, the best subset."""

import numpy as np

from moeits.criteria.base import Layer, all_subsets, in_groups, number_of_subsets
from moeits.errors import BudgetError, MoeitsError

SUBSETS = 100
"""Subsets of a layer's experts up to which the oracle tries them: each is a pass of the model."""


def random(layer: Layer, n_keep: int) -> tuple[int, ...]:
    """Draw experts at random, the same ones for the same seed, layer and number."""
    rng = np.random.default_rng([layer.seed, layer.number])
    size = layer.experts // layer.groups
    return in_groups(lambda _, n: rng.choice(size, n, replace=False), layer.experts, n_keep, layer.groups)


def first(layer: Layer) -> np.ndarray:
    """Score of the experts that keeps the first ones, shape (E,)."""
    return -np.arange(layer.experts, dtype=float)


def subsets(layer: Layer, n_keep: int) -> list[tuple[int, ...]]:
    """List all subsets of `n_keep` experts in lexicographic order; a BudgetError if too many to try."""
    count = number_of_subsets(layer, n_keep)
    if count > SUBSETS:
        raise BudgetError(
            f"layer {layer.number}: {count:,} subsets of {n_keep} of {layer.experts} experts are too many "
            f"to try (at most {SUBSETS:,}): the oracle is for small layers"
        )
    return list(all_subsets(layer, n_keep))


def oracle(layer: Layer, n_keep: int) -> tuple[int, ...]:
    """Best subset of all by the loss of the model; of equally good ones, the first."""
    if layer.loss is None:
        raise MoeitsError(f"layer {layer.number}: the oracle needs the loss of the model")
    return min(subsets(layer, n_keep), key=layer.loss)
