"""Scores that are read off the router's weights and the size of the experts' outputs, shape (E,)."""

import numpy as np

from moeits.criteria.base import Layer


def frequency(layer: Layer) -> np.ndarray:
    """Share of the tokens that use the expert.

    References
    ----------
    Heavy-hitters counting, doi:10.48550/arXiv.2404.05089.
    """
    return layer.statistics.counts / layer.statistics.tokens


def router_weight(layer: Layer) -> np.ndarray:
    """Mean weight that the router gives the expert, over all tokens.

    References
    ----------
    Soft counting, doi:10.48550/arXiv.2404.05089.
    """
    return layer.statistics.weights / layer.statistics.tokens


def activation_norm(layer: Layer) -> np.ndarray:
    """Sum of the norms of the expert's output over the tokens that use it, per token of the text (EAN).

    References
    ----------
    doi:10.48550/arXiv.2504.05586.
    """
    return layer.statistics.norms / layer.statistics.tokens


def reap(layer: Layer) -> np.ndarray:
    """Mean of router weight times norm of the output over the tokens that use the expert; 0 if none does.

    References
    ----------
    doi:10.48550/arXiv.2510.13999.
    """
    counts = layer.statistics.counts
    return layer.statistics.weighted_norms / np.maximum(counts, 1)
