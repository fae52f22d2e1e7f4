"""What can be said from measurements: ratios and their errors, paired comparisons, and the one verdict."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from moeits.errors import MoeitsError

LEVEL = 0.05  # of a verdict, two-sided
ERRORS = 2.0  # standard errors of an interval at this level where the error itself is as good as known

# variant: what it is, the columns whose sums' ratio it is, unit, whether more is better
SCORES = {
    "acc": ("accuracy", "acc", None, "share", True),
    "acc_norm": ("accuracy", "acc_norm", None, "share", True),
    "bits_per_byte": ("bits per byte", "bits", "bytes", "bit/byte", False),
}
MEAN = "mean"
NOT_AVERAGED = {("boolq", "bits_per_byte")}
"""Scores that no mean includes. The right answers of BoolQ are "yes" and "no": their bits say first of all
how much a model expects an answer in this form, and would dominate the mean over the tasks."""


def verdict(
    difference: float,
    stderr: float,
    *,
    free: int | None = None,
    margin: float | None = None,
    higher_is_better: bool = False,
) -> str:
    """Judge a difference against 0.

    Parameters
    ----------
    difference, stderr : float
        The difference and its standard error. An error of NaN decides nothing.
    free : int, optional
        Degrees of freedom of the error, for the t distribution: units less one. By default the error is one
        over many units, and the interval is two of them to either side.
    margin : float, optional
        Margin of equivalence; without one nothing is equivalent.
    higher_is_better : bool, default=False
        Whether a positive difference is the better one.

    Returns
    -------
    str
        ``"better"`` or ``"worse"`` where the 95 % interval excludes 0, ``"equivalent"`` where the 90 %
        interval lies within the margin, ``"undecided"`` otherwise.
    """
    if abs(difference) > interval(free) * stderr:
        return "better" if (difference > 0) == higher_is_better else "worse"
    near = stats.norm.ppf(1 - LEVEL) if free is None else stats.t.ppf(1 - LEVEL, free)
    if margin is not None and abs(difference) + near * stderr <= margin:
        return "equivalent"
    return "undecided"


def interval(free: int | None = None) -> float:
    """Count the standard errors to either side of an estimate in its 95 % interval, see :func:`verdict`."""
    return ERRORS if free is None else float(stats.t.ppf(1 - LEVEL / 2, free))


@dataclass(frozen=True)
class Estimate:
    """Mean of one value per independent unit, such as a training.

    Attributes
    ----------
    mean, error : float
        Mean and standard error over the units.
    n : int
        Units.
    low, high : float
        The 95 % interval, by the t distribution.
    p : float
        Two-sided, against a mean of 0.
    verdict : str
        See :func:`verdict`; lower values are better.
    """

    mean: float
    error: float
    n: int
    low: float
    high: float
    p: float
    verdict: str


def estimate(values: Sequence[float], margin: float | None = None) -> Estimate:
    """Estimate a mean over independent units, and judge it; lower values are better.

    `values` are one per unit, two or more (a MoeitsError for one: a single training gives no error over
    trainings); `margin` is that of :func:`verdict`.
    """
    values = np.asarray(values, float)
    if len(values) < 2:
        raise MoeitsError("an error over trainings needs two or more of them")
    mean, error, free = float(values.mean()), float(stats.sem(values)), len(values) - 1
    half = interval(free) * error
    p = float(2 * stats.t.sf(abs(mean) / error, free)) if error else float(mean == 0)
    judged = verdict(mean, error, free=free, margin=margin)
    return Estimate(mean, error, len(values), mean - half, mean + half, p, judged)


def ratio(values: "Sequence[float]", weights: "Sequence[float] | None" = None) -> tuple[float, float]:
    """Sum of values over sum of weights (one each per independent unit; ones by default), and its error.

    The standard error is the delta method's for a ratio of two means over the same n units, ``sqrt(n / (n -
    1) * sum((values - ratio * weights)**2)) / sum(weights)``: with unit weights the sample standard deviation
    over sqrt(n), for one unit NaN.
    """
    x = np.asarray(values, dtype=float)
    w = np.ones_like(x) if weights is None else np.asarray(weights, dtype=float)
    value = x.sum() / w.sum()
    n = len(x)
    if n == 1:
        return float(value), float("nan")
    return float(value), float(sqrt(n / (n - 1) * ((x - value * w) ** 2).sum()) / w.sum())


def mcnemar(lost: int, won: int) -> float:
    """Two-sided p of McNemar's exact test, doi:10.1007/BF02295996; 1 where nothing flipped.

    How likely a fair coin is to fall at least as unevenly as the questions that only the first (`lost`) and
    only the second model (`won`) has right.
    """
    return float(stats.binomtest(lost, lost + won).pvalue) if lost + won else 1.0


def compare(items_a: pd.DataFrame, items_b: pd.DataFrame) -> pd.DataFrame:
    """Compare two models on the same questions, question by question.

    Parameters
    ----------
    items_a, items_b : DataFrame
        From :func:`evaluate`, with the same settings.

    Returns
    -------
    DataFrame
        A row per task and variant: ``task`` ("mean" for the last rows), ``variant``, ``difference`` (b minus
        a), ``stderr`` of the paired difference, ``p`` (of :func:`mcnemar`; accuracies only, of all tasks
        together in the mean), ``lost`` and ``won`` (questions right in a only and in b only), ``flips``
        (their sum), ``n`` and the :func:`verdict` on b.

    Raises
    ------
    MoeitsError
        If the two do not hold the same questions.
    """
    keys = ["task", "question", "shots"]
    check_items(items_a)
    check_items(items_b)
    both = items_a.merge(items_b, on=[*keys, "n_choices", "gold", "bytes"], suffixes=("_a", "_b"))
    if not len(both) == len(items_a) == len(items_b):
        raise MoeitsError(
            f"the two models share {len(both)} of {len(items_a)} and {len(items_b)} questions: score both "
            "with the same tasks, shots, limit, seed and documents"
        )
    rows = []
    for task, group in both.groupby("task", sort=False):
        for variant, (metric, column, weights, *_) in SCORES.items():
            if group[f"{column}_a"].isna().any():
                continue
            gain = group[f"{column}_b"].astype(float) - group[f"{column}_a"].astype(float)
            difference, stderr = ratio(gain, None if weights is None else group[weights])
            row = {"task": task, "variant": variant, "difference": difference, "stderr": stderr, "p": None}
            accuracy = metric == "accuracy"
            row["lost"] = int((gain < 0).sum()) if accuracy else None
            row["won"] = int((gain > 0).sum()) if accuracy else None
            rows.append(row | {"flips": None, "n": len(group)})
    rows = with_mean(rows, "variant", value="difference", sums=("n", "lost", "won"))
    for row in rows:
        if row["lost"] is not None:
            row["flips"] = row["lost"] + row["won"]
            row["p"] = mcnemar(row["lost"], row["won"])
        higher = SCORES[row["variant"]][-1]
        row["verdict"] = verdict(row["difference"], row["stderr"], higher_is_better=higher)
    return frame(rows)


def with_mean(
    rows: list[dict[str, Any]],
    by: str,
    *,
    value: str,
    means: Sequence[str] = (),
    sums: Sequence[str] = ("n",),
) -> list[dict[str, Any]]:
    """Add rows for the mean over the tasks: equal weights, independent errors.

    What :data:`NOT_AVERAGED` lists is left out, unless there is nothing else.
    """
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row[by], []).append(row)
    added = []
    for rows_of_one in groups.values():
        group = [row for row in rows_of_one if (row["task"], row[by]) not in NOT_AVERAGED] or rows_of_one
        mean = group[0] | {
            "task": MEAN,
            "stderr": sqrt(sum(row["stderr"] ** 2 for row in group)) / len(group),
        }
        for name in (value, *means, *sums):
            if mean[name] is not None:
                total = sum(row[name] for row in group)
                mean[name] = total if name in sums else total / len(group)
        added.append(mean)
    return rows + added


def frame(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """Tabulate rows; what does not apply is None, as JSON has it."""
    return pd.DataFrame(
        {
            name: pd.Series(values, dtype=object if None in values else None)
            for name, values in ((name, [row[name] for row in rows]) for name in rows[0])
        }
    )


def check_items(items: pd.DataFrame) -> None:
    """Raise a MoeitsError unless these are the scores of one model, each question once."""
    if not len(items):
        raise MoeitsError("there are no scored questions")
    twice = items.duplicated(["task", "question"])
    if twice.any():
        first = items[twice].iloc[0]
        raise MoeitsError(
            f"question {first['question']} of {first['task']} occurs twice: give the scores of one "
            "model under one setting"
        )
