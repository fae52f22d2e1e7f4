"""What other methods would keep: each behind one interface, from a layer's weights and statistics.

A criterion chooses the experts of a layer that stay, or changes the weights of the layer, and says how a
share of all experts is spread over the layers. Statistics come from :mod:`moeits.criteria.statistics`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from moeits.criteria import (
    clusters,
    compression,
    controls,
    information,
    recombination,
    reconstruction,
    router,
)
from moeits.criteria.base import (
    Change,
    Choose,
    Layer,
    Score,
    Spread,
    across_layers,
    best,
    uniform,
    whole_groups,
)
from moeits.errors import BudgetError, MoeitsError
from moeits.machine.keys import by_value


@dataclass(frozen=True)
class Criterion:
    """One method.

    Attributes
    ----------
    title : str
        Name in prose. Definition and source are in the docstrings of the functions.
    needs_calibration : bool, default=True
        Whether it reads statistics of calibration text.
    needs_probe : bool, default=False
        Whether it reads statistics of random tokens.
    needs_loss : bool, default=False
        Whether it asks the model for its loss, once for each subset of a layer's experts.
    score : callable, optional
        Layer -> importance of its experts (E,); those with the largest stay.
    choose : callable, optional
        Layer, number -> experts to keep.
    change : callable, optional
        Layer, number -> new weights, in about the bytes of that number of experts.
    spread : callable
        Layers, share -> number of experts to keep in each.
    """

    title: str
    needs_calibration: bool = True
    needs_probe: bool = False
    needs_loss: bool = False
    score: Score | None = None
    choose: Choose | None = None
    change: Callable[[Layer, int], Change] | None = None
    spread: Spread = uniform

    @property
    def parts(self) -> list[Callable]:
        """Functions that the choice is computed by."""
        return [part for part in (self.score, self.choose, self.change, self.spread) if part is not None]

    @property
    def functions(self) -> list[object]:
        """Names and options of what computes the choice, as JSON can write them."""
        return [_named(part) for part in (self.score, self.choose, self.change, self.spread)]

    def keep(self, layer: Layer, n_keep: int) -> tuple[int, ...]:
        """Choose `n_keep` experts of a layer.

        Raises
        ------
        MoeitsError
            If the number is out of range, statistics are missing, or the method chooses no experts.
        """
        _check_number(layer, n_keep, layer.groups)
        if self.choose is not None:
            return tuple(self.choose(layer, n_keep))
        if self.score is not None:
            scores = np.asarray(self.score(layer))
            if not np.isfinite(scores).all():
                raise MoeitsError(f"layer {layer.number}: {self.title} gives scores that are not finite")
            return best(scores, n_keep, layer.groups)
        raise MoeitsError(f"{self.title} changes weights instead of choosing experts")

    def apply(self, layer: Layer, n_keep: int) -> Change:
        """Compute new weights of a layer, in about the bytes of `n_keep` experts.

        Raises
        ------
        MoeitsError
            If the number is out of range, statistics are missing, or the method changes no weights.
        """
        _check_number(layer, n_keep)
        if self.change is None:
            raise MoeitsError(f"{self.title} changes no weights")
        return self.change(layer, n_keep)


def _named(part: object) -> object:
    if isinstance(part, partial):
        return [_named(part.func), {key: _named(value) for key, value in part.keywords.items()}]
    return f"{part.__module__}.{part.__qualname__}" if callable(part) else part


def _check_number(layer: Layer, n_keep: int, groups: int = 1) -> None:
    if n_keep % groups:
        raise BudgetError(
            f"layer {layer.number}: cannot keep {n_keep} experts: the router selects among {groups} groups, "
            "which must stay equally large"
        )
    if not layer.minimum <= n_keep <= layer.experts:
        raise BudgetError(
            f"layer {layer.number}: cannot keep {n_keep} of {layer.experts} experts, at least {layer.minimum}"
        )


@by_value
def criterion(name: str) -> Criterion:
    """Look up a criterion.

    Raises
    ------
    MoeitsError
        If there is none of that name.
    """
    if name not in CRITERIA:
        raise MoeitsError(f"no criterion {name!r}: there are {', '.join(CRITERIA)}")
    return CRITERIA[name]


def counts_for(
    name: str,
    layers: Mapping[int, Layer],
    *,
    n_keep: int | None = None,
    share: float | None = None,
    counts: Mapping[int, int] | None = None,
) -> dict[int, int]:
    """Count the experts that stay in each layer.

    Parameters
    ----------
    name : str
        A criterion.
    layers : mapping of int to Layer
        All layers of a model.
    n_keep : int, optional
        The same number in every layer.
    share : float, optional
        Share of all experts, spread as the criterion does.
    counts : mapping of int to int, optional
        The numbers themselves, for every layer.

    Returns
    -------
    dict of int to int
        By layer.

    Raises
    ------
    MoeitsError
        If not exactly one budget is given, a share is not in (0, 1], or `counts` leaves a layer out.
    """
    if sum(given is not None for given in (n_keep, share, counts)) != 1:
        raise MoeitsError("give exactly one of n_keep, share and counts")
    if n_keep is not None:
        return dict.fromkeys(layers, n_keep)
    if counts is not None:
        if set(counts) != set(layers):
            raise MoeitsError(f"counts are given for layers {sorted(counts)}, the model has {sorted(layers)}")
        return dict(counts)
    if not 0 < share <= 1:
        raise MoeitsError(f"share is {share}: give a fraction of the experts to keep, above 0 and at most 1")
    return whole_groups(criterion(name).spread(layers, share), layers)


def select(
    name: str,
    layers: Mapping[int, Layer],
    *,
    n_keep: int | None = None,
    share: float | None = None,
    counts: Mapping[int, int] | None = None,
) -> dict[int, tuple[int, ...]]:
    """Choose the experts of every layer that stay.

    Parameters
    ----------
    name, layers, n_keep, share, counts
        As in :func:`counts_for`.

    Returns
    -------
    dict of int to tuple of int
        Kept experts by layer, ascending.

    Raises
    ------
    MoeitsError
        See :func:`counts_for` and :meth:`Criterion.keep`.
    """
    chosen = counts_for(name, layers, n_keep=n_keep, share=share, counts=counts)
    return {number: criterion(name).keep(layer, chosen[number]) for number, layer in layers.items()}


def _moeits(title: str, *, diagonal: str = "zero", **options: object) -> Criterion:
    return Criterion(
        title,
        needs_calibration=False,
        choose=partial(information.moeits, **options),
        spread=partial(information.by_one_tau, diagonal=diagonal, **options),
    )


_RANKED = {
    "frequency": Criterion("Frequency", score=router.frequency),
    "router-weight": Criterion("Router weight", score=router.router_weight),
    "activation-norm": Criterion("Activation norm (EAN)", score=router.activation_norm),
    "reap": Criterion("REAP", score=router.reap),
    "weight-product": Criterion("Weight product", needs_calibration=False, score=information.weight_product),
}

_MOEITS = {
    "moeits": _moeits("MoEITS"),
    "moeits-official": _moeits("MoEITS, official weights", preset="official"),
    "moeits-exclude": _moeits("MoEITS, no diagonal", diagonal="exclude"),
    "moeits-miller-madow": _moeits("MoEITS, Miller-Madow", correction="miller-madow"),
    "moeits-null": _moeits("MoEITS, less null", correction="null"),
    "moeits-aligned": _moeits("MoEITS, aligned", align=True),
}

CRITERIA: dict[str, Criterion] = {
    "random": Criterion("Random", needs_calibration=False, choose=controls.random),
    "first": Criterion("First", needs_calibration=False, score=controls.first),
    "oracle": Criterion("Oracle", needs_loss=True, choose=controls.oracle),
    **_RANKED,
    **{
        f"{name}-global": replace(
            entry, title=f"{entry.title}, global", spread=partial(across_layers, score=entry.score)
        )
        for name, entry in _RANKED.items()
    },
    "lu": Criterion("Lu et al.", choose=reconstruction.lu),
    "moe-i2": Criterion(
        "MoE-I², experts", choose=reconstruction.lu, spread=reconstruction.by_layer_importance
    ),
    "moe-i2-low-rank": Criterion("MoE-I², low rank", needs_calibration=False, change=compression.low_rank),
    "stun": Criterion("STUN, experts", choose=clusters.stun),
    "stun-sparse": Criterion("STUN, both stages", change=compression.stun_sparse),
    "dern": Criterion("DERN", change=recombination.dern),
    "hc-smoe": Criterion("HC-SMoE", change=clusters.hc_smoe),
    "m-smoe": Criterion("M-SMoE", change=clusters.m_smoe),
    "moe-pruner": Criterion("MoE-Pruner", change=compression.moe_pruner),
    "mc-moe": Criterion("MC-MoE", change=compression.mc_moe),
    **_MOEITS,
    **{
        f"{name}-uniform": replace(entry, title=f"{entry.title}, uniform", spread=uniform)
        for name, entry in _MOEITS.items()
        if name != "moeits-exclude"  # whose order of removal is that of moeits
    },
    "random-token-norm": Criterion(
        "Activation norm on random tokens",
        needs_calibration=False,
        needs_probe=True,
        score=router.random_token_norm,
    ),
}
"""Every method by name."""
