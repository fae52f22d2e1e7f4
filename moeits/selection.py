"""Which experts stay: Algorithm 3 of the paper and its budgeted forms, on arrays.

Source: MoEITS, section 4.2, Algorithms 2 and 3, doi:10.48550/arXiv.2604.10603.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from moeits.kept import Kept

DIAGONALS = ("zero", "one", "exclude")


class Step(NamedTuple):
    """One removal of Algorithm 3.

    Attributes
    ----------
    removed : int
        The expert that goes.
    pair : tuple[int, int]
        The two most redundant experts left at this step, the smaller number first; `removed` is one of them.
    nmi : float
        Their redundancy ``R[pair]``.
    row_means : tuple[float, float]
        Mean redundancy of each of the two with all other experts left at this step. The larger one goes; when
        they are equal, the second.
    """

    removed: int
    pair: tuple[int, int]
    nmi: float
    row_means: tuple[float, float]


@dataclass(frozen=True)
class Selection:
    """What Algorithm 3 keeps of one layer, and why.

    Attributes
    ----------
    kept : tuple[int, ...]
        Experts that stay, ascending.
    threshold : float or None
        rho = mean(R) + tau IQR(R); None where a number of experts was asked for, or where R has one expert.
    steps : tuple[Step, ...]
        The removals, in order.
    floor_reached : bool
        True if a pair still exceeds the threshold, but only `at_least` experts are left.
    """

    kept: tuple[int, ...]
    threshold: float | None
    steps: tuple[Step, ...]
    floor_reached: bool = False

    @property
    def removed(self) -> tuple[int, ...]:
        """Experts that go, in order of removal."""
        return tuple(step.removed for step in self.steps)


def select_experts(
    R: np.ndarray,
    tau: float | None = None,
    *,
    n_keep: int | None = None,
    diagonal: str = "zero",
    at_least: int = 1,
) -> Selection:
    """Select the experts of one layer that stay.

    While some pair's redundancy exceeds rho = mean(R) + tau IQR(R), take the most redundant pair and remove
    the one of the two that is more redundant with all others. With `n_keep` the order of removal is the same,
    and it stops at that number. The order does not depend on `tau`: what a larger tau keeps includes what a
    smaller one keeps.

    Parameters
    ----------
    R : ndarray, shape (E, E)
        Redundancy of each pair of experts, symmetric. Its own diagonal is not read.
    tau : float, optional
        Intensity, finite and not negative: large keeps much, small keeps little. Give `tau` or `n_keep`.
    n_keep : int, optional
        Number of experts to keep.
    diagonal : {"zero", "one", "exclude"}
        What mean and IQR take for R's diagonal: 0 (the authors' code), 1 (NMI as defined), or leave it out.
    at_least : int
        Never keep fewer than this many (all, where the layer has fewer).

    Returns
    -------
    Selection
        Kept and removed experts, threshold, and the reason of each removal.

    Raises
    ------
    ValueError
        If R is not a finite symmetric matrix, or an option is out of its range.

    Notes
    -----
    Ties: the first largest pair in row-major order; of two equal row means, the second expert goes. Row sums
    are rounded once (``math.fsum``), so that equal rows tie whatever the order of their entries.

    References
    ----------
    Algorithm 3 of doi:10.48550/arXiv.2604.10603.

    Examples
    --------
    >>> R = np.array([[0, 0.9, 0.1], [0.9, 0, 0.3], [0.1, 0.3, 0]])
    >>> select_experts(R, 0.5).kept
    (0, 2)
    >>> select_experts(R, n_keep=1).removed
    (1, 2)
    """
    R = _checked(R)
    experts = len(R)
    _check_floor(at_least)
    if (tau is None) == (n_keep is None):
        raise ValueError("give either tau or n_keep")
    if n_keep is not None:
        if not 1 <= n_keep <= experts:
            raise ValueError(f"n_keep is {n_keep}, but the layer has {experts} experts")
        if n_keep < at_least:
            raise ValueError(f"n_keep is {n_keep}, below the floor of {at_least} experts per layer")
        steps = tuple(_removals(R))[: experts - n_keep]
        return _selection(experts, steps, threshold=None)
    _check_tau(tau)
    return _select_by_tau(experts, tuple(_removals(R)), _location(R, diagonal), tau, at_least)


def select_share(
    matrices: Mapping[int, np.ndarray],
    share: float,
    *,
    diagonal: str = "zero",
    at_least: int = 1,
) -> tuple[float, dict[int, Selection]]:
    """Find the tau that keeps a share of all routed experts of a model.

    The number of kept experts is a step function of tau. Where its steps lie is known, and bisection over
    them finds the one nearest to the share (of two equally near, the one that keeps more).

    Parameters
    ----------
    matrices : mapping of int to ndarray, shape (E, E)
        R of every layer.
    share : float
        Fraction of all routed experts to keep, in (0, 1].
    diagonal, at_least
        As in :func:`select_experts`.

    Returns
    -------
    tau : float
        One tau for all layers.
    selections : dict[int, Selection]
        What :func:`select_experts` keeps with that tau, by layer.

    Raises
    ------
    ValueError
        If no tau >= 0 reaches the share.
    """
    if not matrices:
        raise ValueError("there is no layer to select from")
    if not 0 < share <= 1:
        raise ValueError(f"share is {share}: give a fraction of the experts to keep, above 0 and at most 1")
    _check_floor(at_least)
    layers = {}
    for layer, matrix in matrices.items():
        R = _checked(matrix, f"layer {layer}: ")
        layers[layer] = (len(R), tuple(_removals(R)), _location(R, diagonal))
    total = sum(experts for experts, _, _ in layers.values())

    def select(tau: float) -> dict[int, Selection]:
        return {layer: _select_by_tau(*known, tau, at_least) for layer, known in layers.items()}

    def kept(tau: float) -> int:
        return sum(len(selection.kept) for selection in select(tau).values())

    # Step k of a layer is taken where nmi_k > mean + tau IQR, that is below this tau:
    critical = {
        (step.nmi - location[0]) / location[1]
        for _, steps, location in layers.values()
        if location and location[1] > 0
        for step in steps
        if step.nmi > location[0]
    }
    bounds = [0.0, *sorted(critical), 1 + max(critical, default=0.0)]
    # The middle between two of them, so that rounding cannot blur which steps are taken.
    taus = [(low + high) / 2 for low, high in pairwise(bounds)]
    target = share * total
    fewest, most = kept(taus[0]), kept(taus[-1])
    if not fewest - 1 < target < most + 1:
        raise ValueError(
            f"a share of {share:g} of {total} experts is out of reach: tau >= 0 keeps {fewest} to {most}. "
            "Choose a number per layer (n_keep), another diagonal or another at_least"
        )
    low, high = 0, len(taus) - 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if kept(taus[middle]) <= target else (low, middle)
    tau = min(taus[high], taus[low], key=lambda tau: abs(kept(tau) - target))
    return tau, select(tau)


def select_layers(
    matrices: Mapping[int, np.ndarray],
    *,
    tau: float | None = None,
    n_keep: int | None = None,
    share: float | None = None,
    diagonal: str = "zero",
    at_least: int = 1,
) -> tuple[dict[str, float], dict[int, Selection]]:
    """Select the experts of every layer by exactly one of tau, a number per layer, or a share of all.

    Parameters
    ----------
    matrices : mapping of int to ndarray, shape (E, E)
        R of every layer.
    tau, n_keep, share, diagonal, at_least
        As in :func:`select_experts` and :func:`select_share`.

    Returns
    -------
    budget : dict
        What was asked for, and for a share the tau that was found, as ``kept.json`` holds it.
    selections : dict[int, Selection]
        By layer.

    Raises
    ------
    ValueError
        If not exactly one budget is given, or it is out of range.
    """
    given = {"tau": tau, "n_keep": n_keep, "share": share}
    budget = {name: value for name, value in given.items() if value is not None}
    if len(budget) != 1:
        raise ValueError("give exactly one of tau, n_keep and share")
    options = {"diagonal": diagonal, "at_least": at_least}
    if share is not None:
        found, selections = select_share(matrices, share, **options)
        return {**budget, "tau": found}, selections
    return budget, {layer: select_experts(R, **budget, **options) for layer, R in matrices.items()}


def _checked(R: np.ndarray, where: str = "") -> np.ndarray:
    R = np.asarray(R, dtype=np.float64)
    if R.ndim != 2 or R.shape[0] != R.shape[1] or R.size == 0:
        raise ValueError(f"{where}R must be a square matrix with a row for each expert, got shape {R.shape}")
    off_diagonal = R[~np.eye(len(R), dtype=bool)]
    if not np.isfinite(off_diagonal).all():
        raise ValueError(f"{where}R holds NaN or infinite values")
    if not np.allclose(R, R.T, rtol=1e-9, atol=1e-12, equal_nan=True):
        raise ValueError(f"{where}R is not symmetric: fill both triangles")
    return R


def _check_tau(tau: float) -> None:
    if not (math.isfinite(tau) and tau >= 0):
        raise ValueError(f"tau is {tau}: give a finite number, 0 or larger")


def _check_floor(at_least: int) -> None:
    if at_least < 1:
        raise ValueError(f"at_least is {at_least}: a layer keeps 1 expert or more")


def _location(R: np.ndarray, diagonal: str) -> tuple[float, float] | None:
    """Mean and interquartile range (linear interpolation) of R, read once before anything is removed."""
    if diagonal not in DIAGONALS:
        raise ValueError(f"diagonal is {diagonal!r}: choose one of {', '.join(DIAGONALS)}")
    if len(R) == 1:
        return None
    if diagonal == "exclude":
        entries = R[~np.eye(len(R), dtype=bool)]
    else:
        entries = R.copy()
        np.fill_diagonal(entries, 1.0 if diagonal == "one" else 0.0)
    lower, upper = np.percentile(entries, [25, 75])
    return float(entries.mean()), float(upper - lower)


def _removals(R: np.ndarray) -> Iterator[Step]:
    """Yield Algorithm 3's removals until one expert is left; threshold and budget decide where to stop."""
    pairs = np.where(np.triu(np.ones(R.shape, dtype=bool), 1), R, -np.inf)
    left = list(range(len(R)))
    while len(left) > 1:
        i, j = (int(index) for index in divmod(int(pairs.argmax()), len(R)))
        means = tuple(
            math.fsum(R[expert, k] for k in left if k != expert) / (len(left) - 1) for expert in (i, j)
        )
        removed = i if means[0] > means[1] else j
        yield Step(removed, (i, j), float(R[i, j]), means)
        left.remove(removed)
        pairs[removed, :] = pairs[:, removed] = -np.inf


def _select_by_tau(
    experts: int, steps: tuple[Step, ...], location: tuple[float, float] | None, tau: float, at_least: int
) -> Selection:
    if location is None:
        return _selection(experts, (), threshold=None)
    threshold = location[0] + tau * location[1]
    # The largest redundancy never grows as experts go, so the steps above the threshold come first.
    wanted = sum(step.nmi > threshold for step in steps)
    allowed = max(experts - at_least, 0)
    return _selection(experts, steps[: min(wanted, allowed)], threshold, floor_reached=wanted > allowed)


def _selection(
    experts: int, steps: tuple[Step, ...], threshold: float | None, floor_reached: bool = False
) -> Selection:
    gone = {step.removed for step in steps}
    kept = tuple(expert for expert in range(experts) if expert not in gone)
    return Selection(kept, threshold, steps, floor_reached)


def choose(
    matrices: Mapping[int, np.ndarray],
    made_by: Mapping[str, object],
    *,
    diagonal: str | None = None,
    at_least: int | None = None,
    **budget: object,
) -> tuple[dict[int, Selection], Kept]:
    """Select the experts of every layer within a budget, and put down what made the choice.

    Parameters
    ----------
    matrices : mapping of int to ndarray, shape (E, E)
        R of every layer.
    made_by : mapping
        What made them: ``model``, ``fingerprint``, ``preset``, ``diagonal``, ``minimum`` (fewest experts per
        layer), each where it is known.
    diagonal, at_least : optional
        As in :func:`select_experts`; what `made_by` says by default.
    **budget
        Exactly one of tau, n_keep and share, as in :func:`select_layers`.

    Returns
    -------
    selections : dict[int, Selection]
        By layer.
    kept : Kept
        What ``kept.json`` holds.
    """
    options = {
        "diagonal": diagonal or made_by.get("diagonal", "zero"),
        "at_least": made_by.get("minimum", 1) if at_least is None else at_least,
    }
    found, selections = select_layers(matrices, **budget, **options)
    kept = Kept(
        {layer: selection.kept for layer, selection in selections.items()},
        {layer: len(R) for layer, R in matrices.items()},
        model=made_by.get("model", ""),
        fingerprint=made_by.get("fingerprint"),
        criterion=f"nmi, preset {made_by['preset']}" if "preset" in made_by else "nmi",
        budget={**found, **options},
        threshold={layer: selection.threshold for layer, selection in selections.items()},
    )
    return selections, kept
