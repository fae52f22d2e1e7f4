"""What the comparison of methods says: tables out of its records.

:mod:`moeits.study.comparison` measures them.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from typing import Any

import numpy as np
import pandas as pd
import yaml
from scipy.stats import hypergeom

from moeits import evaluation
from moeits.errors import MoeitsError
from moeits.evaluation.statistics import verdict
from moeits.machine.paths import DATA
from moeits.study import records
from moeits.study.comparison import FINAL, FORMATS, REFERENCE, Comparison, label, removes
from moeits.study.methods import METHODS
from moeits.study.methods.change import Changing
from moeits.study.profiles import Profile
from moeits.study.records import Record

_COLUMNS = ["model", "method", "budget", "record", "impossible", "stored", "bits per byte", "stderr"]
_COLUMNS += ["perplexity", "selection seconds", "selection memory", "calibration tokens"]
_COLUMNS += ["difference", "difference stderr", "verdict"]


@dataclass(frozen=True)
class Shown:
    """Records that the book shows: this machine's, or those of the project's own run if that has more.

    Attributes
    ----------
    cells, finals, oracles, speeds, statistics : list of Record
        By kind of measurement.
    source : str
        Which of the two they are, in a sentence.
    """

    cells: list[Record]
    finals: list[Record]
    oracles: list[Record]
    speeds: list[Record]
    statistics: list[Record]
    source: str


def shown(profile: Profile) -> Shown:
    """Find the comparison that the book shows.

    Parameters
    ----------
    profile : Profile
        The settings. The project's own run is that of the laptop profile.
    """
    compared = [Comparison(profile, name) for name in profile.models]
    here = [cell for one in compared for cell in one.found()]
    kinds = ("final", "oracle", "speed", "statistics")
    published = DATA / "reference" / "laptop"
    known = [record for record in records.load(published) if record.inputs.get("model") in profile.models]
    other = [record for record in known if record.step == "rival"] if profile.name == "laptop" else []
    if len(here) >= len(other):
        return Shown(
            here,
            *([record for one in compared for record in one.found(kind)] for kind in kinds),
            f"The {len(here)} measurements of this page were made on this machine.",
        )
    mine = by_place(here, "budget")
    gaps = [
        abs(sum(cell.details["nats"]) / sum(mine[place].details["nats"]) - 1)
        for place, cell in by_place(other, "budget").items()
        if cell.rows and place in mine
    ]
    source = (
        f"The {len(other)} measurements of this page come from the project's own run (commit "
        f"{str(other[0].provenance['commit'])[:10]})."
    )
    if gaps:
        source += (
            f" This machine has repeated {len(gaps)} of them; the bits per byte differ by at most "
            f"{max(gaps):.1%}."
        )
    return Shown(other, *([record for record in known if record.step == kind] for kind in kinds), source)


def by_place(found: Iterable[Record], state: str) -> dict[tuple[str, str, Any], Record]:
    """Find records by model, method and what else was asked: the budget of a cell, the way of a final."""
    return {tuple(record.inputs[key] for key in ("model", "method", state)): record for record in found}


def describe() -> pd.DataFrame:
    """Tabulate all methods, the quoted ones last.

    Returns
    -------
    DataFrame
        name, method (its title), citation, definition, equation, calibration (whether it reads statistics of
        calibration text), simplified, and kind: "keeps experts", "changes weights" or "quoted only". See
        ``data/paper/methods.yaml``.
    """
    texts = yaml.safe_load((DATA / "paper" / "methods.yaml").read_text(encoding="utf-8"))
    variants = texts.pop("variants")
    lines = []
    for name, entry in METHODS.items():
        base, _, ending = name.rpartition("-")
        told = texts.get(name)
        if told is None:
            title = METHODS[base].title
            told = texts[base] | {
                key: text.replace("{title}", title) for key, text in variants[ending].items()
            }
        kind = "changes weights" if isinstance(entry, Changing) else "keeps experts"
        lines.append(_told(name, entry.title, entry.text == "calibration", kind, told))
    quoted = [name for name in texts if name not in METHODS]
    lines += [_told(name, texts[name]["title"], True, "quoted only", texts[name]) for name in quoted]
    return pd.DataFrame(lines)


def _told(name: str, title: str, calibration: bool, kind: str, text: Mapping[str, str]) -> dict[str, object]:
    keys = ("citation", "definition", "equation", "simplified")
    told = {key: text.get(key, "") for key in keys}
    return {"name": name, "method": title, "calibration": calibration, "kind": kind, **told}


def table(cells: Iterable[Record]) -> pd.DataFrame:
    """Tabulate cells, each paired with MoEITS at the same budget, block by block.

    Parameters
    ----------
    cells : iterable of Record
        From :meth:`Comparison.cell`.

    Returns
    -------
    DataFrame
        One row per cell: model, method, budget, stored (share of the routed experts' bytes), bits per byte
        with stderr, difference to MoEITS with its own stderr and the :func:`verdict`, perplexity, seconds and
        memory of the selection, calibration tokens, impossible (why there is no number).
    """
    places, lines = by_place(cells, "budget"), []
    for (model, method, budget), cell in places.items():
        line = {"model": model, "method": method, "budget": label(budget), "record": cell.id}
        line["impossible"] = cell.details.get("impossible")
        for row in cell.rows:
            line[row["metric"]] = row["value"]
            if row["metric"] == "bits per byte":
                line |= {"stderr": row["stderr"], "stored": row["kept_share"]}
        other = places.get((model, REFERENCE, budget))
        if cell.rows and other and other.rows and method != REFERENCE:
            line["difference"], line["difference stderr"] = found = paired(cell, other)
            line["verdict"] = verdict(*found)
        lines.append(line)
    return pd.DataFrame(lines, columns=_COLUMNS).astype({"difference": float, "difference stderr": float})


def finals_table(finals: Iterable[Record]) -> pd.DataFrame:
    """Tabulate finals, each paired with MoEITS healed in the same way.

    Parameters
    ----------
    finals : iterable of Record
        From :meth:`Comparison.final`.

    Returns
    -------
    DataFrame
        model, method, way (None as pruned), bits per byte and acc (mean over the benchmarks) with their
        stderr, their difference to MoEITS with its own error, questions, and flips: those that one of the
        two answers rightly and the other does not.
    """
    places, lines = by_place(finals, "way"), []
    for (model, method, way), final in places.items():
        line = {"model": model, "method": method, "way": way, "record": final.id}
        for row in final.rows:
            if row["metric"] == "bits per byte" and row["task"] == "heldout":
                line |= {"bits per byte": row["value"], "stderr": row["stderr"]}
            if row["task"] == evaluation.MEAN and row["variant"] == "acc":
                line |= {"acc": row["value"], "acc stderr": row["stderr"], "questions": row["n"]}
        other = places.get((model, REFERENCE, way))
        if other and method != REFERENCE:
            line["difference"], line["difference stderr"] = paired(final, other)
            both = paired_answers(final, other)
            line |= {"acc difference": both.difference, "acc difference stderr": both.stderr}
            line["flips"] = both.flips
        lines.append(line)
    return pd.DataFrame(lines)


def paired(cell: Record, other: Record) -> tuple[float, float]:
    """Difference of two cells in bits per byte, and its standard error over the blocks of the same text."""
    if cell.details["bytes"] != other.details["bytes"]:
        raise MoeitsError("the two cells were not measured on the same text")
    bits = (np.array(cell.details["nats"]) - np.array(other.details["nats"])) / math.log(2)
    return evaluation.ratio(bits, cell.details["bytes"])


def paired_answers(final: Record, other: Record) -> pd.Series:
    """Compare two finals in mean accuracy: a row of :func:`moeits.evaluation.compare`."""
    items = [pd.DataFrame(record.details["items"]) for record in (other, final)]
    return evaluation.compare(*items).set_index(["task", "variant"]).loc[evaluation.MEAN, "acc"]


def differences(cells: Iterable[Record], pairs: Iterable[tuple[str, str]]) -> pd.DataFrame:
    """Compare methods in pairs, at every model and budget at which both were measured.

    Parameters
    ----------
    cells : iterable of Record
        From :meth:`moeits.study.comparison.Comparison.cell`.
    pairs : iterable of (str, str)
        Methods.

    Returns
    -------
    DataFrame
        model, budget, first, second, difference (bits per byte of the first less those of the second) with
        its stderr, and :func:`verdict`.
    """
    places, lines = by_place((cell for cell in cells if cell.rows), "budget"), []
    at = dict.fromkeys((model, budget) for model, _, budget in places)
    for (model, budget), (first, second) in product(at, pairs):
        one, other = (places.get((model, method, budget)) for method in (first, second))
        if one and other:
            found = paired(one, other)
            lines.append((model, label(budget), first, second, *found, verdict(*found)))
    columns = ["model", "budget", "first", "second", "difference", "stderr", "verdict"]
    return pd.DataFrame(lines, columns=columns)


def oracle_table(oracles: Iterable[Record], cells: Iterable[Record]) -> pd.DataFrame:
    """Rank methods among all subsets of a layer's experts by the model's loss.

    Parameters
    ----------
    oracles : iterable of Record
        From :meth:`Comparison.oracle`.
    cells : iterable of Record
        From :meth:`Comparison.cell`; those that keep half of a layer's experts, and change no weight, count.

    Returns
    -------
    DataFrame
        model, layer, method, rank (1 is the best subset), subsets (their number), loss (nats per token) less
        that of the best subset, and its stderr over the blocks of text. "layer error" is the subset whose
        layer output is nearest to the whole layer's.
    """
    cells, lines = list(cells), []
    for record in oracles:
        for number, layer in record.details.get("layers", {}).items():
            nats, found = np.array(layer["nats"]), [tuple(kept) for kept in layer["kept"]]
            means = nats.mean(axis=1)
            chosen = {"layer error": found[int(np.argmin(layer["error"]))]}
            for cell in cells:
                if cell.inputs["model"] == record.inputs["model"] and cell.inputs["budget"] == FINAL:
                    kept = tuple((cell.details.get("kept") or {}).get(number, ()))
                    entry = METHODS.get(cell.inputs["method"].split()[0])
                    if removes(cell) and not isinstance(entry, Changing):
                        chosen[cell.inputs["method"]] = kept
            for method, kept in chosen.items():
                if kept in found:
                    at = found.index(kept)
                    off = nats[at] - nats[means.argmin()]
                    lines.append(
                        {
                            "model": record.inputs["model"],
                            "layer": int(number),
                            "method": method,
                            "rank": int((means < means[at]).sum()) + 1,
                            "subsets": len(found),
                            "loss": off.mean(),
                            "stderr": off.std(ddof=1) / math.sqrt(len(off)),
                        }
                    )
    return pd.DataFrame(lines)


def speed_table(speeds: Iterable[Record], cells: Iterable[Record]) -> pd.DataFrame:
    """Set what methods leave beside removed experts at equal measured speed.

    Parameters
    ----------
    speeds : iterable of Record
        From :meth:`Comparison.speed`.
    cells : iterable of Record
        From :meth:`Comparison.cell`.

    Returns
    -------
    DataFrame
        model, form, share (of the routed experts' bytes), method (that leaves this form); reading, writing
        (tokens per second) with their stderr; bits per byte with its stderr; and, for the whole model and
        methods that change weights, ``as fast``: the largest share of experts with which a model with fewer
        experts, or the whole one, reads no slower (within two joint standard errors).
    """
    places, timed, lines = by_place(cells, "budget"), [], []
    for speed in speeds:
        line = {key: speed.inputs[key] for key in ("model", "form", "share")}
        for row in speed.rows:
            if name := {"prefill": "reading", "decode": "writing"}.get(row["metric"]):
                line |= {name: row["value"], f"{name} stderr": row["stderr"]}
        timed.append(line)
    for line in timed:
        rivals = [
            other["share"]
            for other in timed
            if other["model"] == line["model"] and other["form"] in ("whole", "pruned")
            if not _slower(other, line)
        ]
        fast = None if line["form"] == "pruned" else max(rivals, default=None)
        for method in FORMATS[line["form"]]:
            cell = places.get((line["model"], method, line["share"]))
            bits = next((row for row in cell.rows if row["metric"] == "bits per byte"), {}) if cell else {}
            quality = {"bits per byte": bits.get("value"), "stderr": bits.get("stderr")}
            lines.append(line | {"method": method, "as fast": fast} | quality)
    columns = ["model", "form", "share", "reading", "reading stderr", "writing", "writing stderr"]
    return pd.DataFrame(lines, columns=[*columns, "method", "as fast", "bits per byte", "stderr"])


def _slower(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether one form of a model reads slower than another, within the errors."""
    error = math.hypot(one["reading stderr"], other["reading stderr"])
    return verdict(one["reading"] - other["reading"], error, higher_is_better=True) == "worse"


def overlaps(cells: Iterable[Record]) -> pd.DataFrame:
    """Compare which experts the methods keep, in pairs, at the same model and budget.

    Parameters
    ----------
    cells : iterable of Record
        From :meth:`Comparison.cell`; those that remove no expert are left out.

    Returns
    -------
    DataFrame
        model, budget, first, second, jaccard (mean over layers), chance (of random sets).
    """
    lines = []
    places = by_place(filter(removes, cells), "budget")
    for a, b in combinations(places, 2):
        (model, first, budget), (other, second, same) = a, b
        if (model, budget) == (other, same):
            mine, theirs = places[a].details["kept"], places[b].details["kept"]
            experts = places[a].details["experts"]
            found = [jaccard(mine[layer], theirs[layer]) for layer in mine]
            chance = [chance_jaccard(len(mine[layer]), len(theirs[layer]), experts[layer]) for layer in mine]
            lines.append((model, label(budget), first, second, np.mean(found), np.mean(chance)))
    return pd.DataFrame(lines, columns=["model", "budget", "first", "second", "jaccard", "chance"])


def jaccard(first: Sequence[int], second: Sequence[int]) -> float:
    """Experts in both sets over experts in either."""
    return len(set(first) & set(second)) / len(set(first) | set(second))


def chance_jaccard(first: int, second: int, experts: int) -> float:
    """Mean Jaccard overlap of two independent random sets of given sizes out of `experts`.

    The number in both is hypergeometric.
    """
    both = np.arange(min(first, second) + 1)
    return float(hypergeom(experts, first, second).pmf(both) @ (both / (first + second - both)))
