"""What any criterion must beat, and what none can: random experts, the first ones, the best subset."""

import math

import numpy as np

from moeits.criteria.base import Layer
from moeits.criteria.reconstruction import SUBSETS, best_of_all_subsets


def random(layer: Layer, n_keep: int) -> tuple[int, ...]:
    """Draw experts at random, the same ones for the same seed, layer and number."""
    rng = np.random.default_rng([layer.seed, layer.number])
    return tuple(sorted(rng.choice(layer.experts, n_keep, replace=False).tolist()))


def first(layer: Layer) -> np.ndarray:
    """Score of the experts that keeps the first ones, shape (E,)."""
    return -np.arange(layer.experts, dtype=float)


def oracle(layer: Layer, n_keep: int) -> tuple[int, ...]:
    """Best subset of all by the error of the layer's output.

    Raises
    ------
    ValueError
        If there are too many subsets.
    """
    subsets = math.comb(layer.experts, n_keep)
    if subsets > SUBSETS:
        raise ValueError(
            f"layer {layer.number}: {subsets:,} subsets of {n_keep} of {layer.experts} experts are too many "
            f"to try (at most {SUBSETS:,}): the oracle is for small layers"
        )
    return best_of_all_subsets(layer, n_keep)
