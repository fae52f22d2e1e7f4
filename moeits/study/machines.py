"""Two machines' records of the same settings, side by side."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from moeits.errors import MoeitsError
from moeits.evaluation import statistics
from moeits.study import records

_SETTINGS = ["shots", "chat_template", "way", "healing seed"]
_ASKED = ["step", "model", "method", "tau", *_SETTINGS]
_KEYS = ["step", "model", "method", "tau", "task", "metric", "variant", *_SETTINGS]


def compare_records(first: Path | str, second: Path | str) -> pd.DataFrame:
    """Pair the results of two folders of records by what was measured.

    Parameters
    ----------
    first, second : path
        Folders of records.

    Returns
    -------
    DataFrame
        A row for each result that both have, dense models first: step, model, method, tau, task, metric,
        variant, and what else was set (shots, chat_template, way and seed of the healing); ``first``,
        ``second``, ``difference`` (second minus first), ``stderr`` (joint), ``n``; ``flips``, the questions
        that one answers right and the other wrong, where both kept the answers; and ``verdict``: "same",
        "within error" (at most two joint standard errors), "outside", or "no error known".

    Raises
    ------
    MoeitsError
        If a folder has no records, or the two have nothing in common.

    Notes
    -----
    The joint error takes the two as independent. Scores of the same questions are not, so that it is too
    large for them: the flips say more.
    """
    found = [records.load(Path(folder)) for folder in (first, second)]
    for folder, loaded in zip((first, second), found, strict=True):
        if not loaded:
            raise MoeitsError(f"{folder} holds no records")
    frames = [_last(_with_settings(loaded)) for loaded in found]
    both = frames[0].merge(frames[1], on=_KEYS, suffixes=("_first", "_second"))
    if both.empty:
        raise MoeitsError(f"{first} and {second} have no result in common")
    flips = _flips(found)
    both["difference"] = both.value_second - both.value_first
    both["stderr"] = np.hypot(both.stderr_first.astype(float), both.stderr_second.astype(float))
    both["verdict"] = list(map(_verdict, both.difference, both.stderr))
    asked = both[[*_ASKED, "task", "variant"]].astype(object)
    asked = asked.where(asked.notna(), None).itertuples(index=False, name=None)
    both["flips"] = [flips.get(key) for key in asked]
    table = both.rename(columns={"value_first": "first", "value_second": "second", "n_first": "n"})
    table = table[[*_KEYS, "first", "second", "difference", "stderr", "n", "verdict", "flips"]]
    return table.sort_values("model", key=lambda of: of != "dense", kind="stable", ignore_index=True)


def _verdict(difference: float, stderr: float) -> str:
    if difference == 0:
        return "same"
    if np.isnan(stderr):
        return "no error known"
    return "within error" if statistics.verdict(difference, stderr) == "undecided" else "outside"


def provenance_differences(first: Path | str, second: Path | str) -> dict[str, tuple[str, str]]:
    """Say what of the provenance differs between two folders of records: versions, machine, device, ...

    Returns
    -------
    dict of str to (str, str)
        What differs, and its values in the first and the second folder, joined where there are several.
    """
    seen: list[dict[str, set[str]]] = []
    for folder in (first, second):
        values: dict[str, set[str]] = {}
        for record in records.load(Path(folder)):
            for name, value in _flat(record.provenance):
                values.setdefault(name, set()).add(str(value))
        seen.append(values)
    names = sorted(seen[0].keys() | seen[1].keys())
    differing = [name for name in names if seen[0].get(name) != seen[1].get(name)]
    return {name: tuple(", ".join(sorted(values.get(name, {"-"}))) for values in seen) for name in differing}


def _flat(provenance: dict[str, Any]) -> list[tuple[str, Any]]:
    """Provenance as names and values, without what always differs."""
    flat = []
    for name, value in provenance.items():
        if name in ("seconds", "peak_memory", "dirty"):
            continue
        flat += value.items() if isinstance(value, dict) else [(name, value)]
    return flat


def _settings(record: records.Record) -> dict[str, Any]:
    """Tell apart what has the same model and method: how it was asked and healed."""
    return {"step": record.step, **{name: record.inputs.get(name) for name in _SETTINGS}}


def _with_settings(loaded: list[records.Record]) -> pd.DataFrame:
    settings = {record.id: _settings(record) for record in loaded}
    rows = records.frame(loaded)
    return rows.assign(**{name: [settings[of][name] for of in rows.record] for name in _SETTINGS})


def _last(rows: pd.DataFrame) -> pd.DataFrame:
    """One row for each result: of several, for other settings, the one with the most questions."""
    return rows.sort_values("n", na_position="first").drop_duplicates(_KEYS, keep="last")


def _flips(found: list[list[records.Record]]) -> dict[tuple, int]:
    """Questions that flipped, by model, method, tau, task and variant."""
    answers = []
    for loaded in found:
        by_key = {}
        for record in loaded:
            if "items" in record.details and record.rows:
                key = tuple({**record.rows[0], **_settings(record)}[name] for name in _ASKED)
                by_key[key] = pd.DataFrame(record.details["items"])
        answers.append(by_key)
    flips = {}
    for key in answers[0].keys() & answers[1].keys():
        both = answers[0][key].merge(answers[1][key], on=["task", "question", "shots"])
        for variant in ("acc", "acc_norm"):
            flipped = both[f"{variant}_x"].notna() & (both[f"{variant}_x"] != both[f"{variant}_y"])
            for task, count in flipped.groupby(both.task).sum().items():
                flips[(*key, task, variant)] = int(count)
    return flips
