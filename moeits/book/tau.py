"""Figures and tables of the page on tau: what is kept, and what a model still knows, pruned and healed."""

from collections.abc import Iterable, Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from moeits import evaluation
from moeits.book.figures import COLOURS, MARKERS
from moeits.book.pruning import title
from moeits.study.pipeline import Study
from moeits.study.records import Record, frame

_KEYS = ["model", "tau", "variant"]


def curves(studies: Mapping[str, Study]) -> tuple[pd.DataFrame, list[Record]]:
    """Gather rows and records over tau; ``position`` is tau, or twice the largest if unpruned."""
    found = [record for study in studies.values() for record in study.curve()]
    rows = frame(found)
    rows["model"] = pd.Categorical(rows.model, list(studies), ordered=True)
    return rows.assign(position=rows.tau.fillna(2 * rows.tau.max())), found


def sizes(rows: pd.DataFrame) -> pd.DataFrame:
    """Choose the rows of the size; ``share`` is that of all parameters."""
    size = rows[(rows.metric == "size") & (rows.variant == "parameters")]
    return size.assign(share=size.value / size.groupby("model", observed=True).value.transform("max"))


def size_figure(size: pd.DataFrame) -> Figure:
    """Draw the share of routed experts and of parameters over tau."""
    fig, axes = plt.subplots(1, 2, figsize=(5.6, 2.9), sharex=True, sharey=True)
    for axis, column, label in zip(
        axes, ["kept_share", "share"], ["routed experts", "all parameters"], strict=True
    ):
        for model, curve in size.sort_values("position").groupby("model", observed=True):
            axis.plot(curve.position, curve[column], label=model)
        axis.set(xlabel=r"$\tau$", title=label, ylim=(0, 1.05))
        _over_tau(axis, size.position)
    axes[0].set_ylabel("share left")
    fig.legend(*axes[1].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    return fig


def shared(found: Iterable[Record]) -> dict[str, pd.DataFrame]:
    """Find the questions, by task, that every record of a model answers; at some tau more are asked."""
    asked = {}
    for record in found:
        own = pd.DataFrame(record.details["items"])[["task", "question"]]
        model = record.rows[0]["model"]
        asked[model] = asked[model].merge(own) if model in asked else own
    return asked


def scores(found: Iterable[Record], asked: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Tabulate the scores on the questions of :func:`shared`; ``position`` as in :func:`curves`."""
    lines = []
    for record in found:
        about = {key: record.rows[0][key] for key in ("model", "tau", "kept_share")}
        items = pd.DataFrame(record.details["items"]).merge(asked[about["model"]])
        lines.append(evaluation.summarise(items).assign(**about))
    table = pd.concat(lines).astype({"tau": float, "value": float, "stderr": float})
    table["model"] = pd.Categorical(table.model, list(asked), ordered=True)
    return table.assign(position=table.tau.fillna(2 * table.tau.max()))


def scores_figure(scored: pd.DataFrame, tasks: Sequence[str]) -> Figure:
    """Draw the accuracy of up to three tasks, with chance, and the mean bits per byte over tau."""
    panels = [(task, "acc") for task in tasks[:3]] + [(evaluation.MEAN, "bits_per_byte")]
    fig, axes = plt.subplots(-(-len(panels) // 2), 2, figsize=(5.6, 4.8), sharex=True)
    for axis, (task, variant) in zip(axes.flat, panels, strict=False):
        panel = scored[(scored.task == task) & (scored.variant == variant)].sort_values("position")
        for model, curve in panel.groupby("model", observed=True):
            axis.errorbar(curve.position, curve.value, curve.stderr.astype(float), label=model)
        if variant == "acc":
            axis.axhline(panel.chance.iloc[0], color="black", ls=":", lw=1, marker="")
            axis.set(title=f"{title(task)}, accuracy")
        else:
            axis.set(title="all tasks, bits per byte")
            fig.legend(*axis.get_legend_handles_labels(), loc="outside upper center", ncols=4)
        _over_tau(axis, scored.position)
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
        axes[-2, -1].tick_params(labelbottom=True)
    fig.supxlabel(r"$\tau$", fontsize=10)
    return fig


def healings(studies: Iterable[Study]) -> tuple[pd.DataFrame, pd.DataFrame, list[Record]]:
    """Gather what healing by LoRA makes of the pruned models, the mean over seeds.

    Returns
    -------
    healed : DataFrame
        Mean scores by model, tau and variant, with a standard error: seeds answer the same questions, so the
        spread over seeds adds to the error over the questions.
    gains : DataFrame
        Healed minus pruned, paired by question: ``change``, and its errors over ``questions`` and ``seeds``.
    records : list of Record
        Empty, like the tables, if no model is healed.
    """
    found, gains = [], []
    for study in studies:
        for tau, way, seed in study.healings_found:
            if way == "lora":
                found.append(study.healed_scores(tau, way, seed))
                before, after = (pd.DataFrame(of.details["items"]) for of in (study.scores(tau), found[-1]))
                gains.append(evaluation.compare(before, after).assign(model=study.name, tau=tau))
    if not found:
        return pd.DataFrame(), pd.DataFrame(), []
    paired = pd.concat(gains).query("task == 'mean'").astype({"difference": float, "stderr": float})
    changes = paired.groupby(_KEYS).agg(
        change=("difference", "mean"), questions=("stderr", "mean"), spread=("difference", "sem")
    )
    return _over_seeds(frame(found)), changes.reset_index(), found


def _over_seeds(rows: pd.DataFrame) -> pd.DataFrame:
    rows = rows[rows.task == evaluation.MEAN].astype({"value": float, "stderr": float})
    healed = rows.groupby([*_KEYS, "kept_share", "task", "n"], observed=True).agg(
        value=("value", "mean"), stderr=("stderr", "mean"), spread=("value", "sem"), seeds=("value", "size")
    )
    healed["stderr"] = np.hypot(healed.stderr, healed.spread.fillna(0))
    return healed.drop(columns="spread").reset_index()


def states(scored: pd.DataFrame, healed: pd.DataFrame) -> pd.DataFrame:
    """Put the mean scores of pruned and healed models below each other, by ``state``."""
    after = _over_seeds(healed).assign(state="healed", position=lambda table: table.tau)
    pruned = scored[(scored.task == evaluation.MEAN) & scored.model.isin(set(healed.model))]
    return pd.concat([pruned.assign(state="pruned"), after], ignore_index=True)


def healed_figure(size: pd.DataFrame, both: pd.DataFrame) -> Figure:
    """Draw size, mean accuracy and bits per byte over tau, pruned and healed, a row for each model."""
    models = list(dict.fromkeys(both.model))
    panels = [("parameters left", size.assign(state="pruned", value=size.share, stderr=np.nan))]
    for variant, name in {"acc": "accuracy, mean", "bits_per_byte": "bits per byte"}.items():
        panels.append((name, both[both.variant == variant]))
    fig, axes = plt.subplots(
        len(models), 3, figsize=(5.6, 0.9 + 1.6 * len(models)), sharex=True, squeeze=False
    )
    for line, model in zip(axes, models, strict=True):
        line[0].set_ylabel(model)
        for axis, (name, data) in zip(line, panels, strict=True):
            for number, state in enumerate(("pruned", "healed")):
                part = data[(data.model == model) & (data.state == state)].sort_values("position")
                style = {"color": COLOURS[number], "marker": MARKERS[number], "ls": ("-", "--")[number]}
                axis.errorbar(part.position, part.value, part.stderr.astype(float), label=state, **style)
            _over_tau(axis, size.position)
            axis.tick_params(axis="x", rotation=60)
            if model == models[0]:
                axis.set_title(name)
    fig.supxlabel(r"$\tau$", fontsize=10)
    fig.legend(*axes[0, 2].get_legend_handles_labels(), loc="outside upper center", ncols=2)
    return fig


def healed_table(healed: pd.DataFrame, gains: pd.DataFrame) -> pd.DataFrame:
    """Tabulate mean scores before and after healing, with both errors of the change."""
    table = healed.merge(gains, on=_KEYS)
    table["pruned"] = table.value - table.change
    table["variant"] = table.variant.map({"acc": "accuracy", "bits_per_byte": "bits per byte"})
    names = {"model": "model", "tau": r"$\tau$", "kept_share": "experts kept", "variant": "mean"}
    names |= {"pruned": "pruned", "value": "healed", "change": "change"}
    names |= {"questions": "± questions", "spread": "± seeds", "seeds": "seeds"}
    return table.dropna(subset="variant")[list(names)].rename(columns=names)


def _over_tau(axis: plt.Axes, positions: pd.Series) -> None:
    """Set a logarithmic axis of tau whose last tick is the unpruned model."""
    ticks = sorted(positions.unique())
    axis.set_xscale("log")
    axis.set_xticks(ticks, [*(f"{tau:g}" for tau in ticks[:-1]), "unpruned"], minor=False)
    axis.minorticks_off()
