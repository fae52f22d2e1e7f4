"""What other methods would keep: each behind one interface, from a layer's weights and statistics.

A criterion chooses the experts of a layer to keep, and says how a share of all experts is spread over the
layers. Statistics come from :mod:`moeits.criteria.statistics`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from moeits.criteria import clusters, controls, information, reconstruction, router
from moeits.criteria.base import Layer, Score, Spread, across_layers, best, equal_groups, uniform
from moeits.errors import MoeitsError
from moeits.machine.keys import by_value
from moeits.selection import check_budget, equal_count


@dataclass(frozen=True)
class Criterion:
    """One way to choose the experts to keep.

    Attributes
    ----------
    title : str
        Name in prose. Definition and source are in the docstrings of the functions.
    text : {"calibration", "random", None}, default="calibration"
        Text whose statistics it reads: calibration text, random tokens, or none.
    needs_loss : bool, default=False
        Whether it asks the model for its loss, once for each subset of a layer's experts.
    score : callable, optional
        Layer -> importance of its experts (E,); those with the largest are kept.
    choose : callable, optional
        Layer, number -> experts to keep.
    spread : callable, default=uniform
        Layers, share, score -> number of experts to keep in each layer.
    """

    title: str
    text: str | None = "calibration"
    needs_loss: bool = False
    score: Score | None = None
    choose: Callable[[Layer, int], Sequence[int]] | None = None
    spread: Spread = uniform

    @property
    def parts(self) -> list[Callable]:
        """Functions that the choice is computed by."""
        return [part for part in (self.score, self.choose, self.spread) if part is not None]

    @property
    def functions(self) -> list[object]:
        """Text, names and options of what computes the choice, as JSON can write them; the spread last."""
        return [self.text, *map(_named, self.parts)]

    def counts(
        self,
        layers: Mapping[int, Layer],
        *,
        n_keep: int | None = None,
        share: float | None = None,
        uniform: bool = False,
    ) -> dict[int, int]:
        """Count the experts to keep in each layer of a model.

        Parameters
        ----------
        layers : mapping of int to Layer
            All layers of the model, by number.
        n_keep : int, optional
            Number of experts to keep in every layer.
        share : float, optional
            Fraction of all experts to keep, in (0, 1].
        uniform : bool, default=False
            Keep equally many experts of a share in every layer, whatever the criterion's own spread.

        Raises
        ------
        MoeitsError
            If not exactly one budget is given, or the share is out of range.
        """
        if (n_keep is None) == (share is None):
            raise MoeitsError("give exactly one of n_keep and share")
        if share is not None:
            experts, first = [layer.experts for layer in layers.values()], next(iter(layers.values()))
            check_budget(min(experts), share=share)
            if not uniform:
                return equal_groups(self.spread(layers, share, self.score), layers)
            n_keep = equal_count(share, experts, first.groups, first.minimum)
        return dict.fromkeys(layers, n_keep)

    def select(self, layers: Mapping[int, Layer], **budget: object) -> dict[int, tuple[int, ...]]:
        """Select the experts of every layer to keep, by layer and ascending.

        The budget is that of :meth:`counts`; errors are those of :meth:`counts` and :meth:`keep`.
        """
        counts = self.counts(layers, **budget)
        return {number: self.keep(layer, counts[number]) for number, layer in layers.items()}

    def keep(self, layer: Layer, n_keep: int) -> tuple[int, ...]:
        """Choose `n_keep` experts of a layer.

        Raises
        ------
        MoeitsError
            If the number is out of range, or statistics are missing.
        """
        at = {"at_least": layer.minimum, "groups": layer.groups, "where": f"layer {layer.number}: "}
        check_budget(layer.experts, n_keep=n_keep, **at)
        if self.choose is not None:
            return tuple(self.choose(layer, n_keep))
        scores = np.asarray(self.score(layer))
        if not np.isfinite(scores).all():
            raise MoeitsError(f"layer {layer.number}: {self.title} gives scores that are not finite")
        return best(scores, n_keep, layer.groups)


def _named(part: object) -> object:
    if isinstance(part, partial):
        return [_named(part.func), {key: _named(value) for key, value in part.keywords.items()}]
    return f"{part.__module__}.{part.__qualname__}" if callable(part) else part


@by_value
def criterion(name: str) -> Criterion:
    """Look up a criterion; a MoeitsError, where there is none of that name, lists the known ones."""
    if name not in CRITERIA:
        raise MoeitsError(f"no criterion {name!r}: there are {', '.join(CRITERIA)}")
    return CRITERIA[name]


def _moeits(title: str, *, diagonal: str = "zero", **options: object) -> Criterion:
    return Criterion(
        title,
        text=None,
        choose=partial(information.moeits, **options),
        spread=partial(information.by_one_tau, diagonal=diagonal, **options),
    )


_RANKED = {
    "frequency": Criterion("Frequency", score=router.frequency),
    "router-weight": Criterion("Router weight", score=router.router_weight),
    "activation-norm": Criterion("Activation norm (EAN)", score=router.activation_norm),
    "reap": Criterion("REAP", score=router.reap),
    "weight-product": Criterion("Weight product", text=None, score=information.weight_product),
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
    "random": Criterion("Random", text=None, choose=controls.random),
    "first": Criterion("First", text=None, score=controls.first),
    "oracle": Criterion("Oracle", needs_loss=True, choose=controls.oracle),
    **_RANKED,
    **{
        f"{name}-global": replace(entry, title=f"{entry.title}, global", spread=across_layers)
        for name, entry in _RANKED.items()
    },
    "lu": Criterion("Lu et al.", choose=reconstruction.lu),
    "moe-i2": Criterion(
        "MoE-I², experts", choose=reconstruction.lu, spread=reconstruction.by_layer_importance
    ),
    "stun": Criterion("STUN, experts", choose=clusters.stun),
    **_MOEITS,
    **{
        f"{name}-uniform": replace(entry, title=f"{entry.title}, uniform", spread=uniform)
        for name, entry in _MOEITS.items()
        if name != "moeits-exclude"  # whose order of removal is that of moeits
    },
    "random-token-norm": Criterion(
        "Activation norm on random tokens", text="random", score=router.activation_norm
    ),
}
"""Every criterion by name."""
