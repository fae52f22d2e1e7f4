"""The kept experts of a model, as ``kept.json`` holds them, and a model pruned to them."""

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
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

PADDED = "padded"
"""Key of a budget that says that layers were filled up to equally many experts."""


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
    def read(cls, path: str | Path, experts: Callable[[], Mapping[int, int]] | None = None) -> "Kept":
        """Read ``kept.json``; one that an older release wrote, with a warning.

        Parameters
        ----------
        path : str or Path
            It, or a ``..._prune.json`` of C-Prune, which lists by layer the experts to remove.
        experts : callable, optional
            Gives the experts of every layer of the model, without which a list of experts to remove says
            nothing of those to keep.

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
        return cls.from_json(text, path, experts)

    def to_json(self) -> str:
        """Write what a ``kept.json`` holds."""
        content = {"schema": SCHEMA, **asdict(self)}
        if not self.scores:
            del content["scores"]
        return json.dumps(content, indent=1) + "\n"

    @classmethod
    def from_json(
        cls, text: str, where: object, experts: Callable[[], Mapping[int, int]] | None = None
    ) -> "Kept":
        """Read what a ``kept.json`` holds; errors, as of :meth:`read`, name `where` it is from."""
        try:
            content = json.loads(text)
            if content and all(key.isdigit() and isinstance(ids, list) for key, ids in content.items()):
                return cls._without({int(key): ids for key, ids in content.items() if ids}, where, experts)
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
            raise MoeitsError(
                f"{where} is not a kept.json: it has no {error.args[0]!r}. Of other tools' lists, C-Prune's "
                "*_prune.json is read; REAP and llm-compressor write none"
            ) from error
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

    @classmethod
    def _without(
        cls, removed: Mapping[int, list], where: object, experts: Callable[[], Mapping[int, int]] | None
    ) -> "Kept":
        if experts is None:
            raise MoeitsError(
                f"{where} lists experts to remove: `moeits prune --kept` takes it, with the model"
            )
        counts = experts()
        for layer, ids in removed.items():
            if bad := sorted(set(ids) - set(range(counts.get(layer, 0)))):
                raise MoeitsError(
                    f"{where}: layer {layer} has no experts {bad}: the list is for another model"
                )
        layers = {
            layer: tuple(expert for expert in range(count) if expert not in removed.get(layer, ()))
            for layer, count in counts.items()
        }
        return cls(layers, counts, criterion="C-Prune")


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
