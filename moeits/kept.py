"""The kept experts of a model, as ``kept.json`` holds them, and a model pruned to them."""

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from moeits.errors import MissingError, MoeitsError
from moeits.machine.paths import whole

if TYPE_CHECKING:
    import numpy as np
    from torch import nn

SCHEMA = 1
"""Number of the form of ``kept.json``; a file without one was written before there were numbers."""


def versions() -> dict[str, str]:
    """Versions of moeits and transformers, as files that they write name them."""
    return {name: version(name) for name in ("moeits", "transformers")}


@dataclass(frozen=True)
class Kept:
    """The kept experts of a model, as ``kept.json`` holds them.

    Attributes
    ----------
    layers : dict[int, tuple[int, ...]]
        Kept experts of each layer: ascending, without repetition, at least one.
    num_experts : dict[int, int]
        Number of experts that each of these layers had.
    model : str
        Name or folder of the model.
    fingerprint : str or None
        Fingerprint of the checkpoint; what applies the file to a model compares it.
    criterion : str
        What chose the experts.
    budget : dict
        How many: ``{"tau": 1.25}``, ``{"n_keep": 4}``, ``{"share": 0.5, "tau": 1.83}``; and options beside.
    threshold : dict[int, float or None]
        rho of each layer, where the criterion has one.
    top_k : dict[int, (int, int)]
        Experts per token before and after, of the layers where fewer experts remain than a token used.
    versions : dict[str, str]
        Versions of what wrote the file.
    scores : dict[int, tuple[float, ...]]
        Importance of each layer's experts, where the criterion has one: what another budget keeps follows.

    Raises
    ------
    MoeitsError
        If a layer's kept experts are empty, repeated, out of order or out of range.
    """

    layers: Mapping[int, Sequence[int]]
    num_experts: Mapping[int, int]
    model: str = ""
    fingerprint: str | None = None
    criterion: str = "nmi"
    budget: Mapping[str, object] = field(default_factory=dict)
    threshold: Mapping[int, float | None] = field(default_factory=dict)
    top_k: Mapping[int, tuple[int, int]] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=versions, compare=False)
    scores: Mapping[int, Sequence[float]] = field(default_factory=dict)

    def __post_init__(self):
        if set(self.layers) != set(self.num_experts):
            raise MoeitsError("kept experts: `layers` and `num_experts` name different layers")
        for layer, ids in self.layers.items():
            if not ids:
                raise MoeitsError(f"kept experts: layer {layer} keeps none")
            if list(ids) != sorted(set(ids)):
                raise MoeitsError(
                    f"kept experts: layer {layer} must be ascending without repetition: {list(ids)}"
                )
            if ids[0] < 0 or ids[-1] >= self.num_experts[layer]:
                raise MoeitsError(
                    f"kept experts: layer {layer} has {self.num_experts[layer]} experts, got {list(ids)}"
                )

    @property
    def share(self) -> float:
        """Fraction of the experts of these layers that is kept."""
        return sum(map(len, self.layers.values())) / sum(self.num_experts.values())

    def write(self, path: str | Path) -> None:
        """Write ``kept.json``, whole or not at all."""
        with whole(Path(path)) as part:
            part.write_text(self.to_json(), encoding="utf-8")

    @classmethod
    def read(cls, path: str | Path) -> "Kept":
        """Read ``kept.json``; one that an older release wrote, with a warning.

        Raises
        ------
        MissingError
            If there is no such file.
        MoeitsError
            If it is not a ``kept.json``, naming what is wrong with it.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except FileNotFoundError as error:
            raise MissingError(f"{path} does not exist: make it with `moeits select`") from error
        except ValueError as error:
            raise MoeitsError(f"{path} is not a valid kept.json: {error}") from error
        return cls.from_json(text, path)

    def to_json(self) -> str:
        """Write what a ``kept.json`` holds."""
        content = {"schema": SCHEMA, **asdict(self)}
        if not self.scores:
            del content["scores"]
        return json.dumps(content, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str, where: object) -> "Kept":
        """Read what a ``kept.json`` holds; errors, as of :meth:`read`, name `where` it is from."""
        try:
            content = json.loads(text)
            schema = content.pop("schema", None)
            if schema is None:
                content |= {"top_k": {}, "versions": {}}
            elif schema != SCHEMA:
                raise MoeitsError(f"its schema is {schema}, this moeits reads {SCHEMA}: update moeits")
            for name in ("layers", "num_experts", "threshold", "top_k"):
                content[name] = {int(layer): value for layer, value in content[name].items()}
            content["layers"] = {layer: tuple(map(int, ids)) for layer, ids in content["layers"].items()}
            scores = content.get("scores", {}).items()
            content["scores"] = {int(layer): tuple(map(float, values)) for layer, values in scores}
            content["top_k"] = {layer: tuple(pair) for layer, pair in content["top_k"].items()}
            kept = cls(**content)
        except KeyError as error:
            raise MoeitsError(f"{where} is not a kept.json: it has no {error.args[0]!r}") from error
        except (ValueError, TypeError, AttributeError) as error:
            raise MoeitsError(f"{where} is not a valid kept.json: {error}") from error
        if schema is None:
            warnings.warn(
                f"{where} has no schema number: an older moeits wrote it; the next release may not read it: "
                "select or prune again to renew it",
                FutureWarning,
                stacklevel=3,
            )
        return kept


@dataclass(frozen=True)
class Simplified:
    """A pruned model, and what led to it.

    Attributes
    ----------
    model : torch.nn.Module
        The pruned model.
    kept : Kept
        The kept experts, as ``kept.json`` holds them.
    nmi : mapping of int to ndarray, shape (E, E)
        R of each layer; empty where another criterion than the NMI selected.
    """

    model: "nn.Module"
    kept: Kept
    nmi: Mapping[int, "np.ndarray"] = field(default_factory=dict)
