"""The method of the paper: its equations and its selection algorithm, as the package runs them. Arrays only.

Source: MoEITS, section 4, doi:10.48550/arXiv.2604.10603; numbers of equations and algorithms are the paper's.
:mod:`moeits.nmi` counts the histograms, :mod:`moeits.selection` adds budgets, floors and groups of experts,
:mod:`moeits.simplify` is Algorithm 1.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import takewhile
from typing import NamedTuple

import numpy as np

DIAGONALS = ("zero", "one", "exclude")


def entropy(c_log_c: float, size: int) -> float:
    """H(X) = -sum p(x) log p(x), in nats (eq. 4).

    With p = c / N for counts c that add up to N, it is log N - (1/N) sum c log c. The joint entropy H(X,Y),
    which has no number in the paper, is that of the cells of the joint histogram.

    Parameters
    ----------
    c_log_c : float
        Sum of c log c over the bins that are not empty.
    size : int
        Number of weights N.
    """
    return math.log(size) - c_log_c / size


def mutual_information(hx: np.ndarray, hy: np.ndarray, hxy: np.ndarray) -> np.ndarray:
    """I(X,Y) = H(X) + H(Y) - H(X,Y), in nats (eq. 5)."""
    return hx + hy - hxy


def nmi(hx: np.ndarray, hy: np.ndarray, hxy: np.ndarray) -> np.ndarray:
    """NMI(X,Y) = I(X,Y) / sqrt(H(X) H(Y)) (eq. 6)."""
    return mutual_information(hx, hy, hxy) / np.sqrt(hx * hy)


def nmi_of_pairs(h: np.ndarray, joint: np.ndarray) -> np.ndarray:
    """r_i of all pairs of experts, for their i-th projection (eq. 7, 8 and 11).

    Parameters
    ----------
    h : ndarray, shape (E,)
        Entropy of each expert's projection.
    joint : ndarray, shape (E, E)
        Joint entropy of each pair of experts, symmetric. Its diagonal is not read.

    Returns
    -------
    ndarray, shape (E, E)
        Symmetric, zero diagonal.
    """
    r = nmi(h[:, None], h, joint)
    np.fill_diagonal(r, 0.0)
    return r


def redundancy(r: Iterable[np.ndarray], shares: Iterable[float]) -> np.ndarray:
    """Redundancy R = sum_i r_i / n of all pairs of experts, the mean over their n projections (eq. 9 and 10).

    Parameters
    ----------
    r : iterable of ndarray, shape (E, E)
        r_i of one projection after the other.
    shares : iterable of float
        Share of each projection in the mean: 1 / n in the paper.

    Returns
    -------
    ndarray, shape (E, E)
    """
    return sum(share * r_i for r_i, share in zip(r, shares, strict=True))


def mean_and_iqr(R: np.ndarray, diagonal: str = "zero") -> tuple[float, float]:
    """Mean m and interquartile range iqr of R, taken once (Algorithm 3, lines 3 and 4).

    Parameters
    ----------
    R : ndarray, shape (E, E)
        Redundancy of each pair of experts, symmetric. Its own diagonal is not read.
    diagonal : {"zero", "one", "exclude"}, default="zero"
        What both take for the diagonal, which the paper leaves open: 0 (the authors' code), 1 (NMI as
        defined), or leave it out.

    Returns
    -------
    mean, iqr : float
        The quartiles are interpolated linearly.
    """
    if diagonal == "exclude":
        entries = R[~np.eye(len(R), dtype=bool)]
    else:
        entries = R.copy()
        np.fill_diagonal(entries, 1.0 if diagonal == "one" else 0.0)
    lower, upper = np.percentile(entries, [25, 75])
    return float(entries.mean()), float(upper - lower)


def redundancy_limit(mean: float, iqr: float, tau: float) -> float:
    """Limit rho = m + iqr tau (Algorithm 3, line 5): above it a pair of experts is redundant."""
    return mean + iqr * tau


class Step(NamedTuple):
    """One removal of Algorithm 3.

    Attributes
    ----------
    removed : int
        The expert that is removed.
    pair : tuple[int, int]
        The two most redundant experts left at this step, the smaller number first; `removed` is one of them.
    nmi : float
        Their redundancy ``R[pair]``.
    row_means : tuple[float, float]
        Mean redundancy of each of the two with all other experts left at this step. The one with the larger
        mean is removed; when they are equal, the second. With groups, one whose group already lost an expert
        in this round is kept.
    """

    removed: int
    pair: tuple[int, int]
    nmi: float
    row_means: tuple[float, float]


def removal(R: np.ndarray, left: Sequence[int], removable: np.ndarray | None = None) -> Step:
    """Of the two most similar experts, remove the one more redundant with the others (lines 8 to 10).

    Parameters
    ----------
    R : ndarray, shape (E, E)
        Redundancy of each pair of experts, symmetric.
    left : sequence of int
        Experts that are left, ascending, two or more.
    removable : ndarray of bool, shape (E,), optional
        Experts that may be removed; all by default, as in the paper.

    Notes
    -----
    Ties, which the paper leaves open: the first largest pair in row-major order; of two equal row means, the
    second expert is removed. Row sums are rounded once (``math.fsum``), so that equal rows tie whatever the
    order of their entries.
    """
    removable = np.ones(len(R), dtype=bool) if removable is None else removable
    free = removable[left]
    allowed = np.triu(free[:, None] | free, 1)
    largest = int(np.where(allowed, R[np.ix_(left, left)], -np.inf).argmax())
    i, j = (left[place] for place in divmod(largest, len(left)))
    means = tuple(math.fsum(R[e, k] for k in left if k != e) / (len(left) - 1) for e in (i, j))
    first = removable[i] and (means[0] > means[1] or not removable[j])
    return Step(i if first else j, (i, j), float(R[i, j]), means)


def removals(R: np.ndarray) -> Iterator[Step]:
    """Iterate Algorithm 3 until one expert is left, whatever the limit."""
    left = list(range(len(R)))
    while len(left) > 1:
        step = removal(R, left)
        left.remove(step.removed)
        yield step


def select(
    R: np.ndarray, tau: float, diagonal: str = "zero", order: Iterable[Step] | None = None
) -> tuple[tuple[Step, ...], float]:
    """Expert-Block Simplification (Algorithm 3): remove experts while a pair exceeds the limit.

    Parameters
    ----------
    R, diagonal
        As in :func:`mean_and_iqr`.
    tau : float
        Threshold: a smaller one removes more experts.
    order : iterable of Step, optional
        ``removals(R)``, if they are known: they do not depend on `tau`.

    Returns
    -------
    steps : tuple of Step
        The removals, in order.
    limit : float
        rho.
    """
    limit = redundancy_limit(*mean_and_iqr(R, diagonal), tau)
    steps = removals(R) if order is None else order
    return tuple(takewhile(lambda step: step.nmi > limit, steps)), limit
