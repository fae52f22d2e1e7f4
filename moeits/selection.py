"""Which experts are kept: Algorithm 3 (:mod:`moeits.method`) with budgets, floors and groups of experts."""

import math
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import NamedTuple

import numpy as np

from moeits import method
from moeits.errors import BudgetError, MoeitsError
from moeits.kept import Kept
from moeits.method import DIAGONALS, Step


@dataclass(frozen=True)
class Selection:
    """What Algorithm 3 keeps of one layer, and why.

    Attributes
    ----------
    kept : tuple[int, ...]
        Kept experts, ascending.
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
        """Removed experts, in order of removal."""
        return tuple(step.removed for step in self.steps)


def select_experts(
    R: np.ndarray,
    tau: float | None = None,
    *,
    n_keep: int | None = None,
    diagonal: str = "zero",
    at_least: int = 1,
    groups: int = 1,
) -> Selection:
    """Select the experts of one layer to keep (Algorithm 3, :func:`moeits.method.select`).

    With `n_keep` the order of removal is the same, and it stops at that number. The order does not depend on
    `tau`: what a larger tau keeps includes what a smaller one keeps.

    Parameters
    ----------
    R : ndarray, shape (E, E)
        Redundancy of each pair of experts, symmetric. Its own diagonal is not read.
    tau : float, optional
        Threshold, finite and not negative: smaller removes more experts. Give `tau` or `n_keep`.
    n_keep : int, optional
        Number of experts to keep.
    diagonal : {"zero", "one", "exclude"}, default="zero"
        As in :func:`moeits.method.mean_and_iqr`.
    at_least : int, default=1
        Fewest experts to keep (all, where the layer has fewer).
    groups : int, default=1
        Groups of the router, which must stay equally large: experts 0 to E / groups - 1 are the first, and
        so on.

    Raises
    ------
    MoeitsError
        If R is not a finite symmetric matrix, or an option is out of its range; if `n_keep` is no multiple of
        `groups`.

    Notes
    -----
    The paper does not treat routers that first select groups of experts (DeepSeek-V2, DeepSeek-V3). Their
    groups must stay equally large, so experts are removed in rounds: each round is Algorithm 3, restricted to
    groups that have lost none in this round, until every group has lost one. Kept are as many experts as
    Algorithm 3 keeps without groups, rounded to the nearest multiple of the groups (halves up). A larger
    budget still keeps a superset; with one group this is Algorithm 3.

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
    if (tau is None) == (n_keep is None):
        raise MoeitsError("give either tau or n_keep")
    check_budget(len(R), n_keep=n_keep, tau=tau, at_least=at_least, groups=groups)
    if n_keep is not None:
        return _selection(len(R), tuple(islice(_rounds(R, groups), len(R) - n_keep)), threshold=None)
    return _Layer.of(R, diagonal, groups).at(tau, at_least)


def check_budget(
    experts: int,
    *,
    tau: float | None = None,
    n_keep: int | None = None,
    share: float | None = None,
    at_least: int = 1,
    groups: int = 1,
    where: str = "",
) -> None:
    """Check what can be known of a budget before anything is measured.

    Parameters
    ----------
    experts : int
        Experts E of a layer.
    tau, n_keep, share, at_least, groups
        As in :func:`choose` and :func:`select_experts`; what is None is not checked.
    where : str, default=""
        Names the layer in errors.

    Raises
    ------
    BudgetError
        If an option is out of its range, or `n_keep` does not leave the groups equally large.
    """
    if tau is not None and not (math.isfinite(tau) and tau >= 0):
        raise BudgetError(f"tau is {tau}: give a finite number, 0 or larger")
    if share is not None and not 0 < share <= 1:
        raise BudgetError(f"share is {share}: give a fraction of the experts to keep, above 0 and at most 1")
    if at_least < 1:
        raise BudgetError(f"at_least is {at_least}: a layer keeps 1 expert or more")
    if groups < 1 or experts % groups:
        raise BudgetError(f"{where}{experts} experts cannot form {groups} groups of equal size")
    if n_keep is None:
        return
    if not 1 <= n_keep <= experts:
        raise BudgetError(f"{where}n_keep is {n_keep}, but the layer has {experts} experts")
    if n_keep < at_least:
        raise BudgetError(f"{where}n_keep is {n_keep}, below the floor of {at_least} experts per layer")
    if n_keep % groups:
        lower = n_keep - n_keep % groups
        near = " or ".join(str(n) for n in (lower, lower + groups) if n >= at_least)
        raise BudgetError(
            f"{where}n_keep is {n_keep}, but the router selects among {groups} groups of experts, which must "
            f"stay equally large: choose {near}"
        )


def select_share(
    matrices: Mapping[int, np.ndarray],
    share: float,
    *,
    diagonal: str = "zero",
    at_least: int = 1,
    groups: int = 1,
) -> tuple[float, dict[int, Selection]]:
    """Find the one tau that keeps a share of all routed experts of a model.

    The number of kept experts is a step function of tau. Where its steps lie is known, and bisection over
    them finds the one nearest to the share (of two equally near, the one that keeps more).

    Parameters
    ----------
    matrices : mapping of int to ndarray, shape (E, E)
        R of every layer.
    share : float
        Fraction of all routed experts to keep, in (0, 1].
    diagonal, at_least, groups
        As in :func:`select_experts`.

    Returns
    -------
    tau : float
    selections : dict[int, Selection]
        What :func:`select_experts` keeps with that tau, by layer.

    Raises
    ------
    MoeitsError
        If no tau >= 0 reaches the share.
    """
    if not matrices:
        raise MoeitsError("there is no layer to select from")
    layers = {}
    for layer, matrix in matrices.items():
        R = _checked(matrix, f"layer {layer}: ")
        check_budget(len(R), share=share, at_least=at_least, groups=groups, where=f"layer {layer}: ")
        layers[layer] = _Layer.of(R, diagonal, groups)

    def select(tau: float) -> dict[int, Selection]:
        return {number: layer.at(tau, at_least) for number, layer in layers.items()}

    def kept(tau: float) -> int:
        return sum(len(selection.kept) for selection in select(tau).values())

    # A step is taken where its NMI > mean + tau IQR, that is below this tau:
    critical = set()
    for layer in layers.values():
        mean, iqr = method.mean_and_iqr(layer.R, diagonal) if layer.order else (0.0, 0.0)
        critical |= {(step.nmi - mean) / iqr for step in layer.order if iqr > 0 and step.nmi > mean}
    bounds = [0.0, *sorted(critical), 1 + max(critical, default=0.0)]
    # The middle between two of them, so that rounding cannot blur which steps are taken.
    taus = [(low + high) / 2 for low, high in pairwise(bounds)]
    total = sum(len(layer.R) for layer in layers.values())
    target = share * total
    fewest, most = kept(taus[0]), kept(taus[-1])
    if not fewest - groups < target < most + groups:
        raise BudgetError(
            f"a share of {share:g} of {total} experts is out of reach: tau >= 0 keeps {fewest} to {most}. "
            "Choose a number per layer (n_keep), another diagonal or another at_least"
        )
    above = min(bisect_right(taus, target, 1, len(taus) - 1, key=kept), len(taus) - 1)
    tau = min(taus[above], taus[max(above - 1, 0)], key=lambda tau: abs(kept(tau) - target))
    return tau, select(tau)


def equal_count(share: float, experts: Sequence[int], groups: int = 1, at_least: int = 1) -> int:
    """Count the experts that every layer keeps of a share, if all keep equally many.

    The nearest multiple of the `groups`, halves up; no fewer than `at_least`, as far as the layers, which
    have these numbers of `experts`, have them.
    """
    check_budget(min(experts), share=share, at_least=at_least, groups=groups)
    mean = share * sum(experts) / len(experts)
    floor = -(-at_least // groups) * groups
    return min(max(math.floor(mean / groups + 0.5) * groups, floor, groups), min(experts))


def _checked(R: np.ndarray, where: str = "") -> np.ndarray:
    R = np.asarray(R, dtype=np.float64)
    if R.ndim != 2 or R.shape[0] != R.shape[1] or R.size == 0:
        raise MoeitsError(f"{where}R must be a square matrix with a row for each expert, got shape {R.shape}")
    off_diagonal = R[~np.eye(len(R), dtype=bool)]
    if not np.isfinite(off_diagonal).all():
        raise MoeitsError(f"{where}R holds NaN or infinite values")
    if not np.allclose(R, R.T, rtol=1e-9, atol=1e-12, equal_nan=True):
        raise MoeitsError(f"{where}R is not symmetric: fill both triangles")
    return R


def _rounds(R: np.ndarray, groups: int) -> Iterator[Step]:
    """Remove in rounds, until one expert of every group is left: each group loses one expert in each."""
    left, size = list(range(len(R))), len(R) // groups
    removable = np.ones(len(R), dtype=bool)
    while len(left) > groups:
        step = method.removal(R, left, removable)
        yield step
        left.remove(step.removed)
        removable[np.arange(len(R)) // size == step.removed // size] = False
        if not removable.any():  # every group has lost one: the next round
            removable[:] = True


class _Layer(NamedTuple):
    """What selecting by tau needs to know of a layer, whatever the tau.

    `order` are Algorithm 3's removals, `rounds` those that keep the groups equally large.
    """

    R: np.ndarray
    diagonal: str
    groups: int
    order: tuple[Step, ...]
    rounds: tuple[Step, ...]

    @classmethod
    def of(cls, R: np.ndarray, diagonal: str, groups: int) -> "_Layer":
        if diagonal not in DIAGONALS:
            raise MoeitsError(f"diagonal is {diagonal!r}: choose one of {', '.join(DIAGONALS)}")
        order = tuple(method.removals(R))
        return cls(R, diagonal, groups, order, order if groups == 1 else tuple(_rounds(R, groups)))

    def at(self, tau: float, at_least: int) -> Selection:
        """Select by tau."""
        experts, groups = len(self.R), self.groups
        if experts == 1:
            return _selection(experts, (), threshold=None)
        steps, threshold = method.select(self.R, tau, self.diagonal, self.order)
        floor = min(-(-at_least // groups) * groups, experts)
        keep = (2 * (experts - len(steps)) + groups) // (2 * groups) * groups  # nearest multiple, halves up
        return _selection(experts, self.rounds[: experts - max(keep, floor)], threshold, keep < floor)


def _selection(
    experts: int, steps: tuple[Step, ...], threshold: float | None, floor_reached: bool = False
) -> Selection:
    removed = {step.removed for step in steps}
    kept = tuple(expert for expert in range(experts) if expert not in removed)
    return Selection(kept, threshold, steps, floor_reached)


def choose(
    matrices: Mapping[int, np.ndarray],
    made_by: Mapping[str, object],
    *,
    tau: float | None = None,
    n_keep: int | None = None,
    share: float | None = None,
    uniform: bool = False,
    diagonal: str | None = None,
    at_least: int | None = None,
) -> tuple[dict[int, Selection], Kept]:
    """Select the experts of every layer by exactly one of tau, a number per layer, or a share of all.

    Parameters
    ----------
    matrices : mapping of int to ndarray, shape (E, E)
        R of every layer.
    made_by : mapping
        What made them: ``model``, ``fingerprint``, ``preset``, ``diagonal``, ``minimum`` (fewest experts per
        layer), ``groups`` (of the router), each where it is known.
    tau, n_keep, share
        The budget, as in :func:`select_experts` and :func:`select_share`.
    uniform : bool, default=False
        Keep equally many experts in every layer: of a share, or of what the tau keeps, each layer's part.
    diagonal : optional
        As in :func:`select_experts`; what `made_by` says by default.
    at_least : int, optional
        Fewest experts per layer, where the minimum that `made_by` says is not higher.

    Returns
    -------
    selections : dict[int, Selection]
        By layer.
    kept : Kept
        What ``kept.json`` holds.

    Raises
    ------
    MoeitsError
        If not exactly one budget is given, or it is out of range.
    """
    asked = {"tau": tau, "n_keep": n_keep, "share": share}
    asked = {name: value for name, value in asked.items() if value is not None}
    if len(asked) != 1:
        raise MoeitsError("give exactly one of tau, n_keep and share")
    limits = {
        "diagonal": diagonal or made_by.get("diagonal", "zero"),
        "at_least": max(made_by.get("minimum", 1), 1 if at_least is None else at_least),
    }
    options = {**limits, "groups": made_by.get("groups", 1)}
    experts = {layer: len(R) for layer, R in matrices.items()}

    def by(**budget: float) -> dict[int, Selection]:
        return {layer: select_experts(R, **budget, **options) for layer, R in matrices.items()}

    if uniform and n_keep is None:
        if share is None:
            share = sum(len(one.kept) for one in by(tau=tau).values()) / sum(experts.values())
        n_keep = equal_count(share, list(experts.values()), options["groups"], options["at_least"])
        found, selections = {"n_keep": n_keep}, by(n_keep=n_keep)
    elif share is not None:
        tau, selections = select_share(matrices, share, **options)
        found = {"tau": tau}
    else:
        found, selections = {}, by(**asked)
    kept = Kept(
        {layer: selection.kept for layer, selection in selections.items()},
        experts,
        model=made_by.get("model", ""),
        fingerprint=made_by.get("fingerprint"),
        criterion=f"nmi, preset {made_by['preset']}" if "preset" in made_by else "nmi",
        budget={**asked, **found, **limits},
        threshold={layer: selection.threshold for layer, selection in selections.items()},
    )
    return selections, kept
