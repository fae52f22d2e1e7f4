"""The laptop profile's records that are part of the repository, and the README's table made of them."""

import re
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd

from moeits.errors import MissingError, MoeitsError
from moeits.machine.paths import DATA, ROOT, whole
from moeits.study import profiles, records, trials
from moeits.study.comparison import Comparison
from moeits.study.measurement import Measurement
from moeits.study.profiles import Profile
from moeits.study.records import Record

REFERENCE = DATA / "reference" / "laptop"
_MARKS = "<!-- results of the laptop profile, by make reference -->", "<!-- end of the results -->"
_METHODS = "<!-- methods on trained experts, by make reference -->", "<!-- end of the methods -->"


def publish(results: Path = DATA / "results" / "laptop", reference: Path = REFERENCE) -> None:
    """Copy records to where they are committed; those of steps that were not measured again stay.

    Of the answers to one question, the newest is taken. A comparison of methods of which a first
    book measures a part does not replace a larger one.

    Parameters
    ----------
    results, reference : Path
        Folders of records.

    Raises
    ------
    MissingError
        If there are no scores.
    """
    found = _newest(Path(results).glob("*.json"))
    if "scores" not in {_step(file) for file in found}:
        raise MissingError(f"{results} holds no scores: run `make book` first")
    before = list(Path(reference).glob("*.json"))
    sizes = [sum(_step(file) == "rival" for file in files) for files in (found, before)]
    if sizes[0] < sizes[1]:
        found = [file for file in found if _step(file) not in _RIVALS]
    steps = {_step(file) for file in found}
    kept = [file for file in before if _step(file) not in steps]
    with whole(Path(reference).with_suffix(".new")) as part:
        part.mkdir()
        for file in [*found, *kept]:
            shutil.copy(file, part / file.name)
    shutil.rmtree(reference, ignore_errors=True)
    Path(reference).with_suffix(".new").rename(reference)


_RIVALS = ("rival", "final", "statistics", "oracle", "speed")


def _newest(files: Iterable[Path]) -> list[Path]:
    read = {file: records.read(file) for file in files}
    newest = {read[file].identity: file for file in sorted(read, key=lambda file: read[file].age)}
    return sorted(newest.values())


def check(reference: Path = REFERENCE, sample: Iterable[Measurement] | None = None) -> pd.DataFrame:
    """Measure a few of the committed records again with today's code, and compare all but times and memory.

    Parameters
    ----------
    reference : Path
        Folder of the records.
    sample : iterable of Measurement, optional
        What is measured again; by default a few minutes' work on the first model of the laptop profile.

    Returns
    -------
    DataFrame
        Step, method, task, metric, variant, committed and measured value, and the relative difference.

    Raises
    ------
    MissingError
        If a question has no committed record.
    MoeitsError
        If a value differs by more than :data:`TOLERANCE`; the message has the lines.
    """
    lines = []
    for measurement in _sample() if sample is None else sample:
        committed = records.find(reference, measurement.step, measurement.inputs)
        if not committed:
            raise MissingError(
                f"{reference} holds no {measurement.step} record of {dict(measurement.inputs)}: "
                "where the settings have changed, run `make book` and `make reference`"
            )
        found = compare(committed[-1], measurement.take())
        lines.append(found[~found.unit.isin(SPEEDS)])
    table = pd.concat(lines)
    wrong = table[beyond(table)]
    if len(wrong):
        raise MoeitsError(f"these results are not those that are committed:\n{wrong.to_string(index=False)}")
    return table


def compare(committed: Record, again: Record) -> pd.DataFrame:
    """Put two answers to one question side by side.

    Parameters
    ----------
    committed, again : Record
        The answers.

    Returns
    -------
    DataFrame
        Step, model, method, task, metric, variant, unit, ``value``, ``value again`` and ``difference``, the
        relative one; NaN where one of the two has no such row.
    """
    key = ["step", *_ROW]
    before, now = (records.frame([one]).reindex(columns=[*key, "value"]) for one in (committed, again))
    table = before.merge(now, on=key, suffixes=("", " again"), how="outer")
    ratio = (table["value again"] / table.value).where(table.value != table["value again"], 1)
    return table.assign(difference=ratio - 1)


def beyond(table: pd.DataFrame) -> "pd.Series[bool]":
    """Tell which lines of :func:`compare` differ by more than :data:`TOLERANCE`."""
    return ~(table.difference.abs() <= TOLERANCE)


def _sample() -> list[Measurement]:
    profile = profiles.load("laptop", device="cpu", dtype="bfloat16")
    compared = Comparison(profile, next(iter(profile.models)))
    cells = [("whole", 1.0), ("moeits", 0.5), ("reap", 0.25), ("dern", 0.5), ("random 1", "own")]
    return [
        *(compared.study._nmi, *compared.measurements("statistics")),
        *(
            one
            for one in compared.measurements("rival")
            if (one.inputs["method"], one.inputs["budget"]) in cells
        ),
    ]


TOLERANCE = 0.01
"""Relative difference up to which two machines agree."""

_ROW = ["model", "method", "task", "metric", "variant", "unit"]

SPEEDS = ("s", "bytes", "tokens/s", "token/s", "J/token")
"""Units of time, speed, memory and energy, which differ from run to run."""


def summary(folder: Path, profile: Profile) -> pd.DataFrame:
    """Summarise the scores of a run: unpruned, pruned, random and healed models.

    Parameters
    ----------
    folder : Path
        Folder of its records.
    profile : Profile
        Its settings, which say at what tau each model is shown.

    Returns
    -------
    DataFrame
        A line for each model and state: model, state, kept (share of the routed experts), perplexity, bits
        per byte and acc (means over the benchmarks) with a column of standard errors each (``perplexity
        stderr``, ...), questions. Of several random draws or seeds the means, with errors over both text and
        draws.
    """
    rows = records.frame(records.load(folder, "scores"))
    lines = []
    for name, settings in profile.models.items():
        part = rows[rows.model == name]
        own = settings.tau
        shown = part[part.tau.isna() | (part.tau == own)]
        for method, state in _STATES.items():
            chosen = shown[
                shown.method.str.startswith("random") if method == "random" else shown.method == method
            ]
            if chosen.empty:
                continue
            perplexity = chosen[chosen.metric == "perplexity"]
            mean = chosen[chosen.task == "mean"]
            found = {
                "perplexity": perplexity,
                "bits per byte": mean[mean.variant == "bits_per_byte"],
                "acc": mean[mean.variant == "acc"],
            }
            line = {
                "model": name,
                "state": state.format(tau=own, draws=len(perplexity)),
                "kept": chosen.kept_share.iloc[0],
            }
            for measure, values in found.items():
                line[measure] = values.value.astype(float).mean()
                line[f"{measure} stderr"] = _error(values)
            line["questions"] = found["acc"].n.max()
            lines.append(line)
    return pd.DataFrame(lines)


def _error(values: pd.DataFrame) -> float:
    """Take the standard error of a mean of draws measured on the same text: over text and over draws."""
    over_text = values.stderr.astype(float).mean()
    over_draws = values.value.astype(float).sem() if len(values) > 1 else 0.0
    return float(np.hypot(over_text, over_draws))


def results_table(reference: Path = REFERENCE) -> str:
    """Tabulate the scores of a folder of the laptop profile's records, in Markdown.

    Parameters
    ----------
    reference : Path
        Folder of records.

    Returns
    -------
    str
        The table, values with one standard error.
    """
    lines = [
        "| model | | routed experts | perplexity | bits per byte | accuracy | questions |",
        "|:---|:---|---:|---:|---:|---:|---:|",
    ]
    before = None
    for line in summary(reference, profiles.load("laptop")).to_dict("records"):
        cells = [
            line["model"] if line["model"] != before else "",
            line["state"],
            f"{line['kept']:.1%}",
            with_error(line["perplexity"], line["perplexity stderr"], ".1f"),
            with_error(line["bits per byte"], line["bits per byte stderr"], ".3f"),
            with_error(line["acc"], line["acc stderr"], ".3f"),
            "" if pd.isna(line["questions"]) else f"{line['questions']:.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
        before = line["model"]
    return "\n".join(lines) + "\n"


def with_error(value: float, stderr: float, style: str) -> str:
    """Write a value with its standard error; large ones with an exponent, missing ones not at all."""
    if pd.isna(value):
        return ""
    style = style if value < 1e4 else ".1e"
    return f"{value:{style}} ± {stderr:{style.lstrip('+')}}"


def methods_table() -> str:
    """Tabulate the registered experiment on trained experts, methods by initialisation, in Markdown."""
    from moeits.study.trained import INITIALISATIONS

    found = trials.summary(trials.differences(trials.committed()))
    signs = {"better": "−", "worse": "+", "equivalent": "=", "undecided": ""}
    found["cell"] = [
        f"{row.mean:+.3f} ± {row.error:.3f} {signs[row.verdict]}".strip() for row in found.itertuples()
    ]
    wide = found.pivot_table("cell", "method", "initialisation", aggfunc="first")
    wide = wide.loc[found.groupby("method")["mean"].mean().sort_values().index]
    kinds = [kind for kind in INITIALISATIONS if kind in wide]
    lines = [f"| kept by | {' | '.join(kinds)} |", f"|:---|{'---:|' * len(kinds)}"]
    lines += [f"| `{method}` | {' | '.join(cells)} |" for method, *cells in wide[kinds].itertuples()]
    return "\n".join(lines) + "\n"


def update_readme(readme: Path = ROOT / "README.md", reference: Path = REFERENCE) -> None:
    """Put the tables of results into the README, between their marks."""
    text = Path(readme).read_text(encoding="utf-8")
    for marks, table in ((_MARKS, results_table(reference)), (_METHODS, methods_table())):
        first, last = map(re.escape, marks)
        text, count = re.subn(
            f"{first}.*{last}", f"{marks[0]}\n{table}{marks[1]}".replace("\\", r"\\"), text, flags=re.DOTALL
        )
        if count != 1:
            raise MoeitsError(f"{readme} does not have the two marks {marks[0]} and {marks[1]}")
    with whole(Path(readme)) as part:
        part.write_text(text, encoding="utf-8")


_STATES = {
    "whole": "unpruned",
    "moeits": "pruned, tau {tau:g}",
    "random": "as many experts at random, mean of {draws}",
    "refit": "pruned and refitted",
    "lora": "pruned and healed by LoRA",
    "refit + lora": "pruned, refitted and healed",
}


def _step(file: Path) -> str:
    return file.stem.rsplit("-", 2)[0]


if __name__ == "__main__":
    if sys.argv[1:] == ["--check"]:
        print(check().to_string(index=False))
    else:
        publish()
        update_readme()
