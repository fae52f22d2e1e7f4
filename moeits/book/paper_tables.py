"""Tables of the page that sets the paper's numbers beside those measured here."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from moeits import evaluation
from moeits.book.figures import COLOURS
from moeits.study import paper, reference
from moeits.study.pipeline import Study
from moeits.study.profiles import Profile, Protocol
from moeits.study.records import Record, frame

AVERAGES = {"average_printed": "average (printed)", "average": "average (recomputed)"}


def quoted(number: int) -> pd.DataFrame:
    """Tabulate one of the paper's tables with its citations and recomputed averages."""
    table = paper.table(number)
    names = paper.TASKS | AVERAGES
    keep = table[["method", *names, "tasks", "expert_params_removed_pct", "sparsity_pct"]]
    keep = keep.assign(method=table.method + " {cite}`" + table.citation + "`")
    return keep.rename(
        columns=names | {"expert_params_removed_pct": "removed %", "sparsity_pct": "sparsity %"}
    )


def margins() -> pd.DataFrame:
    """Tabulate the lead of MoEITS over every other row, with and without HellaSwag."""
    return pd.concat([paper.margins(number).assign(table=f"Table {number}") for number in paper.TABLES])


def margins_figure(margins: pd.DataFrame) -> Figure:
    """Draw the leads of :func:`margins`."""
    fig, axis = plt.subplots(figsize=(5.6, 4.4))
    rows = range(len(margins))
    axis.barh(rows, margins.lead, color=COLOURS[0], label="all common tasks")
    without = {"color": COLOURS[1], "marker": "D", "ls": "", "label": "without HellaSwag"}
    axis.plot(margins.lead_without_hellaswag, rows, **without)
    axis.axvline(0, color="black", lw=1, marker="")
    axis.set_yticks(rows, margins.table + ", " + margins.method)
    axis.invert_yaxis()
    axis.set(xlabel="lead of MoEITS (percentage points)")
    fig.legend(*axis.get_legend_handles_labels(), loc="outside upper center", ncols=2)
    return fig


def measured(rows: pd.DataFrame, tasks: Sequence[str]) -> pd.DataFrame:
    """Tabulate accuracies in percent with standard errors, and those of guessing below.

    Parameters
    ----------
    rows : DataFrame
        Of the records of unpruned and pruned models.
    tasks : sequence of str
        Names of the tasks, in order.
    """
    names = {task: paper.TASKS[task] for task in tasks} | {evaluation.MEAN: "average"}
    rows, lines = rows[rows.variant == "acc"], []
    for (model, method), part in rows.groupby(["model", "method"], sort=False):
        scores = part.set_index("task")
        state = "unpruned" if method == "whole" else rf"pruned, $\tau$ = {part.tau.iloc[0]:g}"
        line = {"model": model, "state": state, "experts kept": part.kept_share.iloc[0]}
        for task, name in names.items():
            line[name] = f"{100 * scores.value[task]:.1f} ± {100 * scores.stderr[task]:.1f}"
        lines.append(line | {"n": int(part.n.iloc[0])})
    chance = rows.groupby("task").chance.first()
    guessed = {name: f"{100 * chance[task]:.1f}" for task, name in names.items()}
    return pd.DataFrame([*lines, {"model": "guessing", "state": ""} | guessed]).astype({"n": "Int64"})


def runs(places: Mapping[str, tuple[Path, Profile]]) -> pd.DataFrame:
    """Tabulate the scores of several runs, each a folder of records, model by model."""
    styles = {"perplexity": ".1f", "bits per byte": ".3f", "acc": ".3f"}
    lines = []
    for run, (folder, profile) in places.items():
        for line in reference.summary(folder, profile).to_dict("records"):
            state = line["state"].replace("tau", r"$\tau$ =")
            shown = {
                measure: reference.with_error(line[measure], line[f"{measure} stderr"], style)
                for measure, style in styles.items()
            }
            own = {"run": run, "model": line["model"], "state": state}
            lines.append(own | shown | {"questions": line["questions"]})
    table = pd.DataFrame(lines).astype({"questions": "Int64"})
    order = {name: number for number, name in enumerate(dict.fromkeys(table.model))}
    return table.sort_values("model", key=lambda model: model.map(order), kind="stable")


def protocols(studies: Iterable[Study]) -> tuple[pd.DataFrame, list[Record]]:
    """Tabulate scores of the same questions asked in different ways, with the paired differences.

    Returns
    -------
    DataFrame, list of Record
        A line for each model, state and way of asking; and the records behind them.
    """
    lines, asked = [], []
    for study in studies:
        for tau, way in study.protocol_states:
            before = study.healed_scores(tau, way) if way else study.scores(tau)
            asked.append(before)
            state = "unpruned" if tau is None else rf"$\tau$ = {tau:g}" + (", healed" if way else "")
            own = {"model": study.name, "state": state}
            for number, protocol in enumerate(study.profile.protocols):
                asked.append(study.protocol_scores(protocol, tau, way))
                items = pd.DataFrame(asked[-1].details["items"])
                plain = items[["task", "question"]].merge(pd.DataFrame(before.details["items"]))
                if number == 0:
                    lines.append(own | {"asked": str(Protocol(shots=study.profile.shots))} | _scores(plain))
                change = evaluation.compare(plain.assign(shots=items.shots[0]), items)
                change = change.set_index(["task", "variant"]).loc[(evaluation.MEAN, "acc")]
                difference = f"{change.difference:+.3f} ± {change.stderr:.3f}"
                lines.append(own | {"asked": str(protocol)} | _scores(items) | {"difference": difference})
    table = pd.DataFrame(lines).fillna("")
    return table[[*table.columns.drop(["difference", "n"]), "difference", "n"]], asked


def _scores(items: pd.DataFrame) -> dict[str, str | int]:
    table = evaluation.summarise(items).set_index(["task", "variant"])
    mean = table.loc[evaluation.MEAN]
    names = {"acc": "acc", "acc_norm": "acc_norm", "bits_per_byte": "bits/byte"}
    shown = {
        label: f"{mean.value[variant]:.3f} ± {mean.stderr[variant]:.3f}"
        for variant, label in names.items()
        if variant in mean.index
    }
    return shown | {"n": len(items)}


def scored(studies: Iterable[Study]) -> tuple[pd.DataFrame, list[Record]]:
    """Gather the rows and records of models unpruned and pruned at their own tau."""
    found = [record for study in studies for record in (study.scores(), study.scores(study.settings.tau))]
    return frame(found), found
