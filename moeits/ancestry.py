"""Which experts share ancestry: families of experts whose weights share more than chance gives.

The NMI of weights finds shared ancestry where copies have not drifted far apart, and MoEITS has something to
work with where it does: the threshold rule then keeps about one expert per family, whatever tau is. Elsewhere
it orders experts by the noise of the estimate.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.cluster.hierarchy import fcluster, linkage

from moeits.errors import MoeitsError
from moeits.nmi import nmi_matrix
from moeits.selection import select_experts

TAUS = (0.0, 0.5, 1.25, 2.5, 5.0)
"""Thresholds at which the number of kept experts is compared."""


@dataclass(frozen=True)
class Ancestry:
    """What the weights of one layer say of its experts' ancestry.

    Attributes
    ----------
    R : ndarray, shape (E, E)
        NMI of each pair.
    limit : float
        NMI above which a pair counts as related.
    families : tuple of tuple of int
        Experts that are related on average; largest family first, each ascending. An expert without
        relatives is a family of its own.
    kept : dict of float to int
        Threshold tau to the number of experts that the method keeps.
    """

    R: np.ndarray
    limit: float
    families: tuple[tuple[int, ...], ...]
    kept: dict[float, int]

    @property
    def found(self) -> bool:
        """Whether any two experts are related."""
        return len(self.families) < len(self.R)

    @property
    def one_count(self) -> bool:
        """Whether the number of kept experts is the same at all of `TAUS`."""
        return len(set(self.kept.values())) == 1


def ancestry(
    block: Mapping[str, Sequence],
    *,
    align: bool = False,
    draws: int = 2,
    seed: int = 0,
    n_jobs: int | None = None,
) -> Ancestry:
    """Group the experts of one layer into families.

    Parameters
    ----------
    block, n_jobs
        As in :func:`moeits.nmi.nmi_matrix`, which names bad input.
    align : bool, default=False
        Match the neurons of each pair first. Permuted copies are then found, at some hundred times the cost.
    draws : int, default=2
        Shuffles of the weights, 1 or more, which have no ancestry: a pair is related if it lies twice as far
        above their mean NMI as the largest of their pairs.
    seed : int, default=0
        Seed of the shuffles.
    """
    if draws < 1:
        raise MoeitsError(f"draws is {draws}: shuffle once or more")
    R = nmi_matrix(block, align=align, n_jobs=n_jobs)
    pairs = np.triu_indices(len(R), 1)
    random = np.random.default_rng(seed)
    null = np.concatenate(
        [nmi_matrix(_shuffled(block, random), align=align, n_jobs=n_jobs)[pairs] for _ in range(draws)]
    )
    limit = float(2 * null.max() - null.mean())
    return Ancestry(R, limit, families(R, limit), {tau: len(select_experts(R, tau).kept) for tau in TAUS})


def families(R: np.ndarray, limit: float) -> tuple[tuple[int, ...], ...]:
    """Group experts by average linkage of R (E, E): two groups join while their mean NMI exceeds a limit.

    The largest family comes first; of equally large ones, that with the first expert.
    """
    if len(R) < 2:
        return tuple((expert,) for expert in range(len(R)))
    distances = R.max() - R[np.triu_indices(len(R), 1)]
    label = fcluster(linkage(distances, "average"), R.max() - limit, "distance")
    groups = [tuple(np.flatnonzero(label == number).tolist()) for number in np.unique(label)]
    return tuple(sorted(groups, key=lambda group: (-len(group), group)))


def report(found: Mapping[int, Ancestry]) -> str:
    """Say in a sentence or two what the ancestry of each layer's experts means for pruning a model."""
    related = [one for one in found.values() if one.found]
    if not related:
        return (
            "No two experts of a layer share more than shuffled weights do. NMI has nothing to tell them "
            "apart by: choose another criterion, or test against random experts."
        )
    counts = sorted({len(one.families) for one in related})
    span = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    tau = sum(one.one_count for one in related)
    return (
        f"In {len(related)} of {len(found)} layers experts form families ({span} a layer): they share "
        f"ancestry. In {tau} of these layers the method keeps the same number of experts whatever tau is."
    )


def _shuffled(block: Mapping[str, Sequence], random: np.random.Generator) -> dict[str, torch.Tensor]:
    """Shuffle the weights of every expert within each of its projections."""

    def permuted(matrix: torch.Tensor) -> torch.Tensor:
        order = torch.from_numpy(random.permutation(matrix.numel()))
        return matrix.flatten()[order].reshape(matrix.shape)

    return {name: torch.stack([permuted(torch.as_tensor(one)) for one in block[name]]) for name in block}
