"""What weights alone tell: Algorithm 3 on several kinds of redundancy matrices, and the size of experts."""

from collections.abc import Mapping

import numpy as np

from moeits.criteria.base import Layer, Score
from moeits.nmi import OFFICIAL_WEIGHTS, nmi_matrix, preset_weights
from moeits.selection import select_experts, select_share


def redundancy(
    layer: Layer, *, preset: str = "paper", correction: str | None = None, align: bool = False
) -> np.ndarray:
    """NMI matrix of a layer, shape (E, E), measured once.

    Parameters
    ----------
    layer : Layer
        Its weights are read, not its statistics.
    preset : {"paper", "official"}, default="paper"
        See :func:`moeits.nmi.preset_weights`; a family without official weights takes the plain mean.
    correction, align
        As in :func:`moeits.nmi.nmi_matrix`.
    """
    weights = preset_weights(preset if layer.family in OFFICIAL_WEIGHTS else "paper", layer.family)

    def measure(layer: Layer) -> np.ndarray:
        return nmi_matrix(layer.block, projection_weights=weights, correction=correction, align=align)

    return layer.once(("nmi", preset, correction, align), measure)


def moeits(layer: Layer, n_keep: int, **options: object) -> tuple[int, ...]:
    """Keep what Algorithm 3 leaves of a layer when it has removed all but `n_keep` experts.

    The options are those of :func:`redundancy`.

    References
    ----------
    doi:10.48550/arXiv.2604.10603.
    """
    return select_experts(redundancy(layer, **options), n_keep=n_keep, groups=layer.groups).kept


def by_one_tau(
    layers: Mapping[int, Layer],
    share: float,
    _: Score | None = None,
    *,
    diagonal: str = "zero",
    **options: object,
) -> dict[int, int]:
    """Spread a share over the layers by the one tau that keeps it; a BudgetError where none does.

    The diagonal is that of :func:`moeits.selection.select_experts`, the options those of :func:`redundancy`.
    """
    matrices = {number: redundancy(layer, **options) for number, layer in layers.items()}
    floor = max(layer.minimum for layer in layers.values())
    groups = max(layer.groups for layer in layers.values())
    _, selections = select_share(matrices, share, diagonal=diagonal, at_least=floor, groups=groups)
    return {number: len(selection.kept) for number, selection in selections.items()}


def weight_product(layer: Layer) -> np.ndarray:
    """Size of an expert by its weights: sum over neurons of the product of their three norms, (E,)."""
    weights = layer.weights
    size = np.linalg.norm(weights["down"], axis=1).astype(np.float64)
    for name in ("gate", "up"):
        if name in weights:
            size = size * np.linalg.norm(weights[name], axis=2)
    return size.sum(axis=1)
