"""The laptop profile's records that are part of the repository, and the README's table made of them."""

import re
import shutil
from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from moeits import profiles, records
from moeits.paths import DATA, ROOT, whole

REFERENCE = DATA / "reference" / "laptop"
_MARKS = "<!-- results of the laptop profile, by make reference -->", "<!-- end of the results -->"


def publish(results: Path = DATA / "results" / "laptop", reference: Path = REFERENCE) -> None:
    """Copy records to where they are committed; those of steps that were not measured again stay.

    Of records that differ by the code alone, the newest is taken.

    Parameters
    ----------
    results, reference : Path
        Folders of records.

    Raises
    ------
    FileNotFoundError
        If there are no scores.
    """
    found = _newest(Path(results).glob("*.json"))
    steps = {_step(file) for file in found}
    if "scores" not in steps:
        raise FileNotFoundError(f"{results} holds no scores: run `make book` first")
    kept = [file for file in Path(reference).glob("*.json") if _step(file) not in steps]
    with whole(Path(reference).with_suffix(".new")) as part:
        part.mkdir()
        for file in [*found, *kept]:
            shutil.copy(file, part / file.name)
    shutil.rmtree(reference, ignore_errors=True)
    Path(reference).with_suffix(".new").rename(reference)


# Inputs that change with the code while the question stays the same.
_HASHES = ("source", "lock", "criterion", "criterion source", "statistics", "healed", "benchmark")


def _newest(files: Iterable[Path]) -> list[Path]:
    found = {}
    for file in sorted(files, key=lambda file: file.stat().st_mtime):
        inputs = records.read(file).inputs
        found[_step(file), records.digest({key: inputs[key] for key in inputs if key not in _HASHES})] = file
    return sorted(found.values())


def results_table(reference: Path = REFERENCE) -> str:
    """Tabulate the scores of a folder of records, in Markdown: whole, pruned, random and healed models.

    Parameters
    ----------
    reference : Path
        Folder of records.

    Returns
    -------
    str
        The table, values with one standard error.
    """
    settings = profiles.load("laptop")
    rows = records.frame(records.load(reference, "scores"))
    lines = [
        "| model | | routed experts | perplexity | bits per byte | accuracy | questions |",
        "|:---|:---|---:|---:|---:|---:|---:|",
    ]
    for name in ["dense", *settings.models]:
        part = rows[rows.model == name]
        own = None if name == "dense" else settings.model(name).tau
        shown = part[part.tau.isna() | (part.tau == own)]
        for method in ("whole", "moeits", "random", "refit", "lora", "refit + lora"):
            chosen = shown[
                shown.method.str.startswith("random") if method == "random" else shown.method == method
            ]
            if not chosen.empty:
                lines.append(_line(name, method, own, chosen))
    return "\n".join(lines) + "\n"


def update_readme(readme: Path = ROOT / "README.md", reference: Path = REFERENCE) -> None:
    """Put the table of results into the README, between its two marks."""
    first, last = map(re.escape, _MARKS)
    text, table = Path(readme).read_text(encoding="utf-8"), results_table(reference)
    new, count = re.subn(
        f"{first}.*{last}", lambda _: f"{_MARKS[0]}\n{table}{_MARKS[1]}", text, flags=re.DOTALL
    )
    if count != 1:
        raise ValueError(f"{readme} does not have the two marks {_MARKS[0]} and {_MARKS[1]}")
    with whole(Path(readme)) as part:
        part.write_text(new, encoding="utf-8")


_STATES = {
    "whole": "whole",
    "moeits": "pruned, tau {tau:g}",
    "random": "as many experts at random, mean of {draws}",
    "refit": "pruned and refitted",
    "lora": "pruned and healed by LoRA",
    "refit + lora": "pruned, refitted and healed",
}


def _line(name: str, method: str, tau: float | None, rows: pd.DataFrame) -> str:
    perplexity = rows[rows.metric == "perplexity"]
    scores = {
        variant: rows[(rows.task == "mean") & (rows.variant == variant)]
        for variant in ("bits_per_byte", "acc")
    }
    share = "" if name == "dense" else f"{rows.kept_share.iloc[0]:.1%}"
    cells = [
        name if method == "whole" else "",
        "dense" if name == "dense" else _STATES[method].format(tau=tau, draws=len(perplexity)),
        share,
        _value(perplexity, ".1f"),
        _value(scores["bits_per_byte"], ".3f"),
        _value(scores["acc"], ".3f"),
        "" if scores["acc"].empty else f"{scores['acc'].n.iloc[0]:.0f}",
    ]
    return f"| {' | '.join(cells)} |"


def _value(rows: pd.DataFrame, style: str) -> str:
    """Give the mean of the rows' values, with the mean of their standard errors."""
    if rows.empty:
        return ""
    value, error = rows.value.mean(), rows.stderr.astype(float).mean()
    style = style if value < 1e4 else ".1e"
    return f"{value:{style}} ± {error:{style}}"


def _step(file: Path) -> str:
    return file.stem.rpartition("-")[0]


if __name__ == "__main__":
    publish()
    update_readme()
