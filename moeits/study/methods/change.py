"""Methods that change the weights of experts, instead of choosing some."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from moeits.criteria import Criterion
from moeits.criteria.base import Layer
from moeits.selection import check_budget

if TYPE_CHECKING:
    from moeits.models.families import MoELayer


class Change(NamedTuple):
    """New weights of a layer.

    Attributes
    ----------
    block : dict of str to ndarray
        As :attr:`Layer.weights`, for all E experts.
    kept : tuple of int
        Kept experts; all of them where the method removes none.
    stored : float
        Bytes that the routed experts then take, as a share of all their weights in 16 bits.
    """

    block: dict[str, np.ndarray]
    kept: tuple[int, ...]
    stored: float


@dataclass(frozen=True)
class Changing(Criterion):
    """A method that changes weights.

    Attributes
    ----------
    change : callable
        Layer, number -> new weights, in about the bytes of that number of experts.
    """

    change: Callable[[Layer, int], Change] | None = None

    @property
    def parts(self) -> list[Callable]:
        """Functions that the change is computed by."""
        return [self.change, self.spread]

    def apply(self, layer: Layer, n_keep: int) -> Change:
        """Compute new weights of a layer, in about the bytes of `n_keep` experts.

        Raises
        ------
        MoeitsError
            If the number is out of range, or statistics are missing.
        """
        where = f"layer {layer.number}: "
        check_budget(layer.experts, n_keep=n_keep, at_least=layer.minimum, where=where)
        return self.change(layer, n_keep)


def write_block(layer: "MoELayer", block: Mapping[str, np.ndarray]) -> None:
    """Replace the weights of a layer's experts by those of a change."""
    import torch

    from moeits.models.families import expert_block

    with torch.no_grad():
        for name, part in expert_block(layer).items():
            part.copy_(torch.from_numpy(np.ascontiguousarray(block[name])))
