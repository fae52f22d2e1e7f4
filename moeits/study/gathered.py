"""Statistics of calibration text: stored between runs, and what they say of a router."""

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path

import numpy as np

from moeits.criteria.base import Routing, Statistics
from moeits.errors import MissingError, MoeitsError
from moeits.machine.paths import whole


def write_statistics(
    path: str | Path, statistics: Mapping[int, Statistics], settings: Mapping[str, object]
) -> None:
    """Write statistics to an npz file, whole or not at all, with what made them.

    The inner products of outputs, which are the bulk, are stored in float32.
    """
    arrays = {}
    for layer, known in statistics.items():
        for field in fields(known):
            value = getattr(known, field.name)
            if field.name == "routing":
                value = json.dumps(None if value is None else {**vars(value), "bias": value.bias.tolist()})
            elif field.name == "gram":
                value = value.astype(np.float32)
            arrays[f"{layer}/{field.name}"] = np.array(value)
    with whole(Path(path)) as part, part.open("wb") as file:
        np.savez(file, settings=np.array(json.dumps(settings, sort_keys=True)), **arrays)


def read_statistics(path: str | Path) -> tuple[dict[int, Statistics], dict[str, object]]:
    """Read what :func:`write_statistics` wrote: the statistics by layer, and what made them.

    Raises
    ------
    MissingError
        If there is no such file.
    MoeitsError
        If it holds something else.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            settings = json.loads(file["settings"].item())
            values: dict[int, dict[str, object]] = {}
            for name in file.files:
                layer, slash, key = name.partition("/")
                if slash:
                    array = file[name]
                    values.setdefault(int(layer), {})[key] = array if array.ndim else array.item()
    except FileNotFoundError as error:
        raise MissingError(f"{path} does not exist") from error
    except (KeyError, ValueError, OSError) as error:
        raise MoeitsError(f"{path} holds no statistics of calibration text: {error}") from error
    for known in values.values():
        routing = json.loads(known["routing"])
        known["routing"] = routing and Routing(**{**routing, "bias": np.array(routing["bias"])})
        known["gram"] = known["gram"].astype(np.float64)
    return {layer: Statistics(**known) for layer, known in sorted(values.items())}, settings


def evenness(gates: np.ndarray) -> float:
    """How equal a router's weights `gates` (n, E) of the chosen experts are, zero for the others.

    Exponential of the entropy of a token's weights over the number of experts it uses, mean over the tokens:
    1 where all weights are equal, so that they say no more than which experts were chosen.
    """
    shares = gates / gates.sum(axis=1, keepdims=True)
    entropy = -np.where(shares > 0, shares * np.log(np.where(shares > 0, shares, 1)), 0).sum(axis=1)
    return float((np.exp(entropy) / (gates > 0).sum(axis=1)).mean())
