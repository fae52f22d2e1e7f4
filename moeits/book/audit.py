"""The paper's claims: each with a verdict and its evidence, computed where possible.

The claim table is ``data/paper/claims.yaml``. A claim that names a check is computed when it is loaded: its
verdict and its pinned numbers must equal those of the check.
"""

from collections.abc import Callable, Mapping
from functools import cache, partial
from itertools import combinations, pairwise
from math import isclose, log2, sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import pandas as pd
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from moeits.errors import MoeitsError
from moeits.evaluation import statistics
from moeits.machine.paths import DATA
from moeits.study import paper

if TYPE_CHECKING:
    from moeits.models.families import Sizes

ORIGINS = {
    "quoted": "the paper says it, in the words that are quoted",
    "implied": "it follows from what the paper says or does",
    "ours": "the paper does not say it; we asked",
}
VERDICTS = ("holds", "does not hold", "depends", "cannot be checked here")
MARKS = {
    "C": "computed here, from the paper's own numbers or by the package",
    "T": "read in the text of the paper",
    "M": "measured or shown on a page of this book",
    "F": "read in the named repository or file",
    "S": "from a secondary source",
    "I": "inferred",
    "G": "a guess, marked as such",
}
PRECISION = 0.005  # pinned numbers have two digits after the point
# Questions in the test or validation splits that lm-eval scores.
QUESTIONS = {
    "boolq": 3270,
    "arc_easy": 2376,
    "arc_challenge": 1172,
    "winogrande": 1267,
    "hellaswag": 10042,
}
BOOLQ_YES = 2033  # of them, those that are answered by yes


class Finding(NamedTuple):
    """What a check found: its verdict, and the numbers that it rests on."""

    verdict: str
    numbers: dict[str, float]


class Claim(BaseModel):
    """One claim of the paper.

    Attributes
    ----------
    id : str
        Lower-case words joined by hyphens.
    claim : str
        What the paper says, in our words; what we asked, where the origin is "ours".
    where : str
        Section, table, equation or algorithm of the paper.
    origin : str
        One of :data:`ORIGINS`.
    quote : str, optional
        The paper's words, where the origin is "quoted"; ``" … "`` stands for what is left out.
    implied_by : str, optional
        What implies it, where the origin is "implied".
    how : str
        How it was checked.
    verdict : str
        One of :data:`VERDICTS`.
    mark : str
        One of :data:`MARKS`.
    finding : str
        What was found; ``{name}`` stands for a number of the check.
    check : str, optional
        Name of the check in :data:`CHECKS`.
    numbers : dict
        The check's numbers as they were when the row was written, to 0.005.
    page : str, optional
        The page of the book that shows it.
    source : str, optional
        Where else it can be read: a file, a work.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str = Field(pattern=r"^[a-z0-9]+(-[a-z0-9]+)*$")
    claim: str
    where: str
    origin: Literal[tuple(ORIGINS)]
    quote: str | None = Field(None, pattern=r"\S", max_length=200)
    implied_by: str | None = Field(None, pattern=r"\S")
    how: str
    verdict: Literal[VERDICTS]
    mark: Literal[tuple(MARKS)]
    finding: str
    check: str | None = None
    numbers: dict[str, float] = {}
    page: str | None = None
    source: str | None = None

    @model_validator(mode="after")
    def _origin_is_shown(self) -> "Claim":
        for field, origin in (("quote", "quoted"), ("implied_by", "implied")):
            if (getattr(self, field) is not None) != (self.origin == origin):
                raise MoeitsError(f"rows that are {origin!r}, and no others, have {field!r}")
        return self


def load(path: Path = DATA / "paper" / "claims.yaml") -> list[Claim]:
    """Read the claim table, compute what can be computed, and fill the numbers into the findings.

    Parameters
    ----------
    path : Path
        The claim table.

    Returns
    -------
    list of Claim
        In the order of the paper.

    Raises
    ------
    MoeitsError
        If a claim is malformed, its id occurs twice, it is quoted without a quotation, it has no evidence, or
        its check computes something else; the message names the claim.
    """
    rows = []
    for content in yaml.safe_load(Path(path).read_text(encoding="utf-8")):
        name = content.get("id", "without id")
        try:
            row = Claim(**content)
        except ValidationError as error:
            problem = error.errors()[0]
            where = ".".join(map(str, problem["loc"])) or "origin"
            raise MoeitsError(f"claim {name!r}: {where}: {problem['msg']}") from error
        rows.append(_checked(row))
    names = [row.id for row in rows]
    if repeated := {name for name in names if names.count(name) > 1}:
        raise MoeitsError(f"claims occur twice: {', '.join(sorted(repeated))}")
    return rows


def _checked(row: Claim) -> Claim:
    if not (row.check or row.page or row.source):
        raise MoeitsError(f"claim {row.id!r} has no evidence: give a check, a page or a source")
    if row.check is None:
        return row
    if row.check not in CHECKS:
        raise MoeitsError(f"claim {row.id!r}: no check {row.check!r}; there are {', '.join(CHECKS)}")
    found = CHECKS[row.check]()
    if found.verdict != row.verdict:
        raise MoeitsError(
            f"claim {row.id!r}: its check finds {found.verdict!r}, the row says {row.verdict!r}"
        )
    if missing := row.numbers.keys() - found.numbers.keys():
        raise MoeitsError(f"claim {row.id!r} pins {sorted(missing)}, its check has {sorted(found.numbers)}")
    for name, pinned in row.numbers.items():
        if not isclose(found.numbers[name], pinned, rel_tol=0, abs_tol=PRECISION + 1e-9):
            raise MoeitsError(f"claim {row.id!r}: {name} is {found.numbers[name]:.4f}, the row pins {pinned}")
    return row.model_copy(update={"finding": row.finding.format(**found.numbers)})


def frame(claims: list[Claim]) -> pd.DataFrame:
    """Tabulate claims, a row each, in their order."""
    table = pd.DataFrame([claim.model_dump() for claim in claims], dtype=object)
    return table.where(table.notna(), None)


def tally(claims: list[Claim]) -> pd.DataFrame:
    """Count the quoted claims by verdict and by whether a check computes them.

    Returns
    -------
    DataFrame
        Index: the four verdicts. Columns: computed, other, all.
    """
    table = frame([claim for claim in claims if claim.origin == "quoted"])
    computed = table.check.notna().map({True: "computed", False: "other"})
    counts = pd.crosstab(table.verdict, computed).reindex(index=VERDICTS, columns=["computed", "other"])
    counts = counts.fillna(0).astype(int).rename_axis(index="verdict", columns=None)
    return counts.assign(all=counts.sum(axis=1))


@cache
def model_sizes(model: str, experts: int | None = None) -> "Sizes":
    """Parameters of one of the paper's models, counted on its empty skeleton.

    Parameters
    ----------
    model : str
        Name in ``data/paper/models.yaml``.
    experts : int, optional
        Routed experts in every layer; None is as many as the model has.
    """
    from transformers import CONFIG_MAPPING

    from moeits.models.families import count_key, sizes
    from moeits.models.folder import hollow_model

    settings = dict(paper.models()[model]["config"])
    if experts is not None:
        settings[count_key(settings)] = experts
    config = CONFIG_MAPPING[settings.pop("model_type")](**settings, dtype="bfloat16")
    return sizes(hollow_model(config))


def implied_kept(model: str) -> dict[str, float]:
    """Experts per layer that the paper's reduction rate leaves.

    Parameters
    ----------
    model : str
        Name in :data:`moeits.study.paper.TABLES`.

    Returns
    -------
    dict
        ``removed`` (percent, as printed), ``experts`` (per layer), ``kept`` (per layer, on average).
    """
    from moeits.models.families import count_key

    number = next(number for number, (name, _) in paper.TABLES.items() if name == model)
    removed = _rows(number).expert_params_removed_pct["MoEITS"]
    config = paper.models()[model]["config"]
    experts = config[count_key(config)]
    return {"removed": removed, "experts": experts, "kept": experts * (1 - removed / 100)}


def standard_error(percent: float, n: int) -> float:
    """Compute the binomial standard error of an accuracy over n questions, both in percentage points."""
    return sqrt(percent * (100 - percent) / n)


def _rows(number: int) -> pd.DataFrame:
    return paper.table(number).set_index("method")


def _verdict(holds: bool) -> str:
    return "holds" if holds else "does not hold"


def _averages(number: int, tolerance: float) -> Finding:
    # The printed averages are those of the printed scores, within rounding
    table = _rows(number)
    gap = (table.average - table.average_printed).abs()
    return Finding(_verdict(bool((gap <= tolerance).all())), {"gap": gap.max()})


def _same_tasks(number: int) -> Finding:
    # All rows are averaged over the same benchmarks
    tasks = _rows(number).tasks
    margins = paper.margins(number).set_index("method").lead
    fewer = tasks[tasks < len(paper.TASKS)]
    return Finding(
        _verdict(fewer.empty),
        {"rows": len(fewer)} | {f"lead_{name[0]}": margins[name] for name in fewer.index},
    )


def _graded(condition: bool, weaker: bool) -> str:
    return "holds" if condition else "depends" if weaker else "does not hold"


def _leads(number: int) -> pd.Series:
    # Lead over the best other row on each benchmark
    scores = _rows(number)[list(paper.TASKS)]
    return scores.loc["MoEITS"] - scores.drop(index="MoEITS").max()


def _best(number: int, expected: int) -> Finding:
    # MoEITS is the best row on at least so many benchmarks: depends, where the errors do not tell that many
    leads = _leads(number)
    scores = _rows(number).loc["MoEITS"]
    sure = [
        statistics.verdict(
            lead, sqrt(2) * standard_error(scores[task], QUESTIONS[task]), higher_is_better=True
        )
        == "better"
        for task, lead in leads.items()
    ]
    best = int((leads > 0).sum())
    numbers = {"best": best, "beyond": sum(sure), "mean": leads.mean()}
    verdict = _graded(sum(sure) >= expected, best >= expected)
    return Finding(verdict, numbers | {f"lead_{task}": lead for task, lead in leads.items()})


def _best_everywhere() -> Finding:
    # MoEITS is the best row on every benchmark of every table: depends, where it is so on their average
    found = {f"table{number}": int((_leads(number) > 0).sum()) for number in paper.TABLES}
    average = all(_rows(number).average.idxmax() == "MoEITS" for number in paper.TABLES)
    return Finding(_graded(set(found.values()) == {len(paper.TASKS)}, average), found)


def _mean_lead(number: int, at_least: float, *, over: str = "over_best") -> Finding:
    # The average leads by so many points over the best other row, or over their mean
    average = _rows(number).average
    others = average.drop("MoEITS")
    full = others[_rows(number).tasks.drop("MoEITS") == len(paper.TASKS)]
    numbers = {
        "over_best": average["MoEITS"] - full.max(),
        "over_best_percent": 100 * (average["MoEITS"] / full.max() - 1),
        "over_mean": average["MoEITS"] - others.mean(),
        "over_mean_without_stun": average["MoEITS"] - others.drop("STUN", errors="ignore").mean(),
    }
    return Finding(_verdict(numbers[over] >= at_least), numbers)


def _hellaswag(number: int) -> Finding:
    # The lead over the best other row with all benchmarks stays when HellaSwag is left out
    rows = _rows(number)
    rows = rows[rows.tasks == len(paper.TASKS)][list(paper.TASKS)]
    plain = rows.drop(columns="hellaswag").mean(axis=1)
    rival = rows.mean(axis=1).drop("MoEITS").idxmax()
    numbers = {
        "lead": rows.mean(axis=1)["MoEITS"] - rows.mean(axis=1)[rival],
        "without": plain["MoEITS"] - plain[rival],
        "moeits": plain["MoEITS"],
        "rival": plain[rival],
    }
    return Finding("holds" if numbers["without"] > 0 else "does not hold", numbers)


def _reduction_gap(number: int, method: str, at_least: float) -> Finding:
    # Removes so many percentage points more: depends, where it is so many percent only
    removed = _rows(number).expert_params_removed_pct
    gap = removed["MoEITS"] - removed[method]
    numbers = {"gap": gap, "relative": 100 * gap / removed[method]}
    return Finding(_graded(gap >= at_least, numbers["relative"] >= at_least), numbers)


def _most_reduced() -> Finding:
    # C-GNN-Prune removes the most of Table 4, and that is half
    removed = _rows(4).expert_params_removed_pct
    numbers = {"most": removed["C-GNN-Prune"], "moeits": removed["MoEITS"]}
    numbers["larger"] = int((removed > removed["MoEITS"]).sum())
    return Finding(_verdict(removed.max() == removed["C-GNN-Prune"] == 50), numbers)


def _comparable_sizes() -> Finding:
    removed = _rows(3).expert_params_removed_pct.drop("MoEITS")
    own = _rows(3).expert_params_removed_pct["MoEITS"]
    numbers = {"largest_gap": (own - removed).abs().max(), "least": removed.min(), "moeits": own}
    return Finding(_verdict(numbers["largest_gap"] < 5), numbers)


def _table3_arc_challenge() -> Finding:
    scores = _rows(3).arc_challenge
    behind = scores["MoEITS"] - scores[["MoP", "MoE-I2"]]
    return Finding(_verdict(int((behind < 0).sum()) == 1), {"mop": behind["MoP"], "moei2": behind["MoE-I2"]})


def _forty_three() -> Finding:
    # 43 % is 110 experts of 256, and 3 of 7 as well
    printed = _rows(4).expert_params_removed_pct["MoEITS"]
    numbers = {"of_256": 100 * 110 / 256, "of_7": 100 * 3 / 7, "printed": printed}
    both = all(round(numbers[name]) == printed for name in ("of_256", "of_7"))
    return Finding("depends" if both else "holds", numbers)


def _uniform_forty() -> Finding:
    # No number of experts removed from each layer of 8 makes 40 %
    printed = _rows(4).expert_params_removed_pct["Lu et al."]
    possible = np.array([100 * removed / 8 for removed in range(8)])
    gap = np.abs(possible - printed).min()
    return Finding(_verdict(gap < 0.5), {"printed": printed, "nearest_gap": gap})


def _repeated_numbers() -> Finding:
    # Quoted figures that stand in two places
    two, three = _rows(2), _rows(3)
    reduction = two.expert_params_removed_pct["MoE-I2"]
    same = reduction == three.expert_params_removed_pct["MoE-I2"]
    same_task = two.winogrande["MoE-I2"] == two.winogrande["MoE-Pruner"]
    verdict = "cannot be checked here" if same and same_task else "holds"
    return Finding(verdict, {"reduction": reduction, "winogrande": two.winogrande["MoE-I2"]})


def _pruner_reduction() -> Finding:
    # MoE-Pruner's reduction is given in one way
    given = [
        (_rows(number).expert_params_removed_pct["MoE-Pruner"], _rows(number).sparsity_pct["MoE-Pruner"])
        for number in (2, 3, 4)
    ]
    kinds = {tuple(bool(pd.isna(value) or value == 0) for value in pair) for pair in given}
    return Finding(_verdict(len(kinds) == 1), {"kinds": len(kinds)})


def _methods_listed() -> Finding:
    # The six methods that the text lists are those of the tables
    listed = {"MoE-I2", "MoE-Pruner", "STUN", "DERN", "MC-MoE", "Lu et al."}
    printed = {name for number in paper.TABLES for name in _rows(number).index} - {"MoEITS"}
    return Finding(_verdict(printed == listed), {"listed": len(listed), "printed": len(printed)})


def _dense_rows() -> Finding:
    # A table has the unpruned model as a row
    names = {name.lower() for number in paper.TABLES for name in _rows(number).index}
    dense = sum("dense" in name or "original" in name for name in names)
    return Finding(_verdict(dense > 0), {"dense": dense})


def _total_share() -> Finding:
    # The share of the expert parameters, rounded, is that of all parameters too, in each table
    numbers = {}
    for number, (model, _) in paper.TABLES.items():
        size = model_sizes(model)
        removed = implied_kept(model)["removed"]
        numbers |= {f"expert_{number}": removed, f"total_{number}": removed * size.routed / size.total}
    near = all(abs(numbers[f"expert_{n}"] - numbers[f"total_{n}"]) < 0.5 for n in paper.TABLES)
    return Finding("holds" if near else "depends", numbers)


def _boolq_majority() -> Finding:
    # The more frequent answer of BoolQ scores one half
    majority = 100 * max(BOOLQ_YES, QUESTIONS["boolq"] - BOOLQ_YES) / QUESTIONS["boolq"]
    lead = _rows(3).boolq["MoEITS"] - majority
    return Finding(_verdict(abs(majority - 50) < 1), {"majority": majority, "lead": lead})


def _figure2_boolq() -> Finding:
    # By Table 3, half is left at tau 1.25, to 5 points, and exactly as much of all as of the experts
    row = _rows(3).loc["MoEITS"]
    size = model_sizes("Qwen1.5-MoE")
    total = row.expert_params_removed_pct * size.routed / size.total
    removed = {"expert": row.expert_params_removed_pct, "total": total}
    near = all(abs(share - 50) < 5 for share in removed.values()) and abs(row.boolq - 75) < 1
    sides = len({share > 50 for share in removed.values()})
    verdict = _verdict(near) if not near or sides == 1 else "depends"
    return Finding(verdict, {"boolq": row.boolq, **removed})


def _active() -> Finding:
    # A token uses more than 1 % fewer parameters after the paper's reduction, at the same top-k
    numbers = {}
    for name, model in (("mixtral", "Mixtral 8x7B"), ("qwen", "Qwen1.5-MoE")):
        size, kept = model_sizes(model), implied_kept(model)
        # The router is what a token uses less of: one row of the hidden size for each removed expert.
        width = paper.models()[model]["config"]["hidden_size"]
        rows = len(size.experts) * (kept["experts"] - kept["kept"]) * width
        numbers |= {name: size.active / 1e9, f"{name}_percent": 100 * rows / size.active}
    saved = min(numbers["mixtral_percent"], numbers["qwen_percent"])
    return Finding(_verdict(saved > 1), numbers)


def _sizes_as_said() -> Finding:
    # Mixtral has 13 and DeepSeek-V2-Lite 16 billion parameters, active and in all
    mixtral, deepseek = model_sizes("Mixtral 8x7B"), model_sizes("DeepSeek-V2-Lite")
    numbers = {"mixtral_active": mixtral.active / 1e9, "mixtral": mixtral.total / 1e9}
    numbers["deepseek"] = deepseek.total / 1e9
    holds = round(numbers["mixtral_active"]) == 13 and round(numbers["deepseek"]) == 16
    return Finding(_verdict(holds), numbers)


def _bounded() -> Finding:
    # Mutual information exceeds the smaller entropy on some pair of seeded arrays
    from moeits.histograms import discretise, joint_entropy

    rng = np.random.default_rng(0)
    arrays = [discretise(rng.normal(size=400).round(digits)) for digits in (0, 1, 2, 8)]
    excess = [
        x.entropy + y.entropy - joint_entropy(x, y) - min(x.entropy, y.entropy)
        for x, y in combinations(arrays, 2)
    ]
    copy = arrays[0]
    reached = 2 * copy.entropy - joint_entropy(copy, copy) - copy.entropy
    return Finding(_verdict(max(excess) > 1e-9), {"pairs": len(excess), "reached": abs(reached)})


def _monotone() -> Finding:
    # A larger tau keeps all that a smaller one keeps, on seeded matrices with either diagonal
    from moeits.selection import DIAGONALS, select_experts

    rng = np.random.default_rng(0)
    taus = (0, 0.5, 1.25, 2.5, 5)
    nested = 0
    for draw in range(60):
        R = rng.normal(1, 0.3, (12, 12)) ** 2
        R = (R + R.T) / 2
        kept = [set(select_experts(R, tau, diagonal=DIAGONALS[draw % 3]).kept) for tau in taus]
        nested += all(small <= large for small, large in pairwise(kept))
    return Finding(_verdict(nested == 60), {"nested": nested, "matrices": 60})


def _iterations() -> Finding:
    # The iterations of Algorithm 3 at worst, by how they grow from 15 experts to 30: 1 as e, 2 as e squared
    from moeits.selection import select_experts

    def worst(experts: int) -> int:
        R = np.random.default_rng(0).normal(1, 0.001, (experts, experts))
        return len(select_experts((R + R.T) / 2, 0.0).steps)

    power = log2(worst(30) / worst(15))
    return Finding(_verdict(power > 1.5), {"experts": 30, "steps": worst(30), "power": power})


def _weights_touched() -> Finding:
    # A histogram of one projection reads no more weights than it has neurons
    from moeits.histograms import discretise

    config = paper.models()["Qwen1.5-MoE"]["config"]
    neurons, width = config["moe_intermediate_size"], config["hidden_size"]
    read = discretise(np.random.default_rng(0).normal(size=(neurons, width))).codes.size
    most = max(neurons, width)
    return Finding(_verdict(read <= most), {"neurons": most, "weights": read / 1e6})


def _taus() -> Finding:
    # One tau serves all models
    taus = set(paper.TAU.values())
    return Finding(_verdict(len(taus) == 1), {"least": min(taus), "largest": max(taus)})


CHECKS: Mapping[str, Callable[[], Finding]] = {
    **{f"averages-{number}": partial(_averages, number, 0.005) for number in (2, 3)},
    "averages-4": partial(_averages, 4, 0.055),
    "same-tasks-4": partial(_same_tasks, 4),
    "best-2": partial(_best, 2, 4),
    "best-3": partial(_best, 3, 3),
    "best-4": partial(_best, 4, 4),
    "lead-everywhere-4": partial(_best, 4, 5),
    "best-everywhere": _best_everywhere,
    "mean-lead-2": partial(_mean_lead, 2, 5),
    "mean-lead-3": partial(_mean_lead, 3, 0.9),
    "mean-lead-4": partial(_mean_lead, 4, 6, over="over_mean"),
    **{f"hellaswag-{number}": partial(_hellaswag, number) for number in paper.TABLES},
    "reduction-2-moei2": partial(_reduction_gap, 2, "MoE-I2", 1.5),
    "reduction-3-best": partial(_reduction_gap, 3, "MoE-I2", -1.1),
    "most-reduced-4": _most_reduced,
    "comparable-sizes": _comparable_sizes,
    "arc-challenge-3": _table3_arc_challenge,
    "forty-three": _forty_three,
    "uniform-forty": _uniform_forty,
    "repeated-numbers": _repeated_numbers,
    "pruner-reduction": _pruner_reduction,
    "methods-listed": _methods_listed,
    "dense-rows": _dense_rows,
    "total-share": _total_share,
    "boolq-majority": _boolq_majority,
    "figure-2": _figure2_boolq,
    "active": _active,
    "sizes": _sizes_as_said,
    "bounded": _bounded,
    "monotone": _monotone,
    "iterations": _iterations,
    "weights-touched": _weights_touched,
    "taus": _taus,
}
"""Every computed check by its name; each takes nothing and returns a :class:`Finding`."""
