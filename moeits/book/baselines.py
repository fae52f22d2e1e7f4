"""Figures and tables of the pages that compare methods of pruning, from the records of the comparison.

The functions take the tables of :mod:`moeits.study.tables`, with the columns ``name`` (of the criterion) and
``title`` that :func:`measured` adds.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import product

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from moeits.book.figures import COLOURS, MARKERS
from moeits.evaluation import statistics
from moeits.study import comparison, profiles, tables
from moeits.study.methods import METHODS
from moeits.study.records import Record
from moeits.study.reference import with_error

TITLES = {name: entry.title for name, entry in METHODS.items()}
UNPRUNED = "Unpruned model"
UNIFORM = "moeits-uniform"
NAMED = ("moeits", "reap", "lu", "moeits-uniform", "mc-moe", "random-token-norm")
"""Methods with a colour of their own in the figures; the others are grey."""
_STYLES = {
    name: {"color": colour, "marker": marker}
    for name, colour, marker in zip(NAMED, COLOURS, MARKERS, strict=False)
}
_STYLES["random"] = {"color": "#000000", "marker": "x"}


def measured(run: tables.Shown, models: Sequence[str]) -> tuple[list[Record], pd.DataFrame]:
    """Order the measurements by model and budget, and tabulate them.

    Parameters
    ----------
    run : Shown
        The comparison.
    models : sequence of str
        The models in their order.

    Returns
    -------
    cells : list of Record
        The measurements.
    table : DataFrame
        As :func:`moeits.study.tables.table`, with name, title, and seconds (selection and reading the text).
    """
    budgets = [1.0, *comparison.BUDGETS]
    places = {place: number for number, place in enumerate(product(models, budgets))}
    cells = sorted(run.cells, key=lambda cell: places[cell.inputs["model"], cell.inputs["budget"]])
    passes = {one.identity: one.seconds for one in run.statistics}
    read = {cell.id: passes.get(cell.inputs["statistics"], 0.0) for cell in cells}
    table = tables.table(cells)
    table["name"] = table.method.str.split().str[0]
    table["title"] = table.name.map(TITLES).fillna(UNPRUNED)
    table["seconds"] = table["selection seconds"] + table.record.map(read)
    return cells, table


def with_errors(values: Iterable[float], errors: Iterable[float], form: str = "+.3f") -> list[str]:
    """Format numbers with their standard errors."""
    return [with_error(value, error, form) for value, error in zip(values, errors, strict=True)]


def in_cell(line: "pd.Series") -> str:
    """Bits per byte, and in brackets the difference from MoEITS with its standard error."""
    if not pd.isna(line.impossible):
        return "not possible"
    if pd.isna(line.difference):
        return with_error(line["bits per byte"], line.stderr, ".3f")
    return f"{line['bits per byte']:.3f} ({with_error(line.difference, line['difference stderr'], '+.3f')})"


def method_table(part: pd.DataFrame) -> pd.DataFrame:
    """Tabulate one model's methods against the budgets, best at half of the experts first.

    Parameters
    ----------
    part : DataFrame
        Rows of :func:`measured` for one model.

    Returns
    -------
    DataFrame
        method; a column for each budget; seconds, calibration tokens and peak memory (MB) of the selection.
        The random subsets are one row: their mean, with their standard deviation for its error.
    """
    part = part[part.method != comparison.WHOLE]
    random = part[part.name == "random"].groupby("budget")
    values, errors = ["bits per byte", "difference"], ["stderr", "difference stderr"]
    mean = random.first()
    mean[values] = random[values].mean()
    mean[errors] = random[values].std().set_axis(errors, axis=1).fillna(random[errors].mean())
    part = pd.concat([part[part.name != "random"], mean.reset_index()])
    part = part.assign(method=part.title, shown=part.apply(in_cell, axis=1))
    middle = part.assign(far=(part.stored - comparison.FINAL).abs()).sort_values("far")
    order = middle.drop_duplicates("method").sort_values("bits per byte", na_position="last").method
    wide = part.pivot_table("shown", "method", "budget", aggfunc="first").loc[order].fillna("")
    wide = wide[[label for label in map(comparison.label, comparison.BUDGETS) if label in wide]]
    by_method = part.groupby("method")
    wide["seconds"] = by_method.seconds.median()
    wide["calibration tokens"] = by_method["calibration tokens"].max().astype("Int64")
    wide["peak memory (MB)"] = by_method["selection memory"].median() / 1e6
    return wide.reset_index().rename_axis(columns=None)


def quality_figure(scored: pd.DataFrame) -> Figure:
    """Draw bits per byte against the remaining share of the routed experts' bytes, a panel for each model."""
    models = scored.model.unique()
    fig, axes = _panels(len(models), 3.6, "bytes of the routed experts", "bits per byte")
    for axis, name in zip(axes, models, strict=True):
        of_model = scored[scored.model == name]
        for method, points in of_model[of_model.method != comparison.WHOLE].groupby("name", sort=False):
            mean = points.groupby("budget")[["stored", "bits per byte"]].mean().sort_values("stored")
            own, named = mean.index == comparison.OWN, method in _STYLES
            style = _STYLES.get(method, {"color": "#bbbbbb", "marker": "."}) | {"zorder": 2 + named}
            label = TITLES[method] if named else None
            x, y = mean.stored, mean["bits per byte"]
            axis.plot(x[~own], y[~own], lw=1.5 if named else 0.7, label=label, **style)
            axis.plot(x[own], y[own], ls="", **style | {"color": style["color"] + "80"})
        unpruned = of_model[of_model.method == comparison.WHOLE]["bits per byte"].iloc[0]
        axis.axhline(unpruned, color="black", ls=":", lw=1, marker="")
        axis.set(title=name, yscale="log")
        _plain(axis.yaxis, "{x:.3g}")
        axis.xaxis.set_major_formatter(lambda x, _: f"{x:.0%}")
    _legend(fig, axes, 3)
    return fig


def draws_figure(lots: pd.DataFrame) -> tuple[Figure, pd.DataFrame]:
    """Draw where the methods fall among random subsets of the same size, a panel for each model.

    Returns
    -------
    figure : Figure
        The drawing.
    places : DataFrame
        model, method, bits per byte, draws that are better, draws.
    """
    models, places = lots.model.unique(), []
    size = (5.6, 0.9 + 0.9 * len(models))
    fig, axes = plt.subplots(len(models), 1, figsize=size, squeeze=False)
    for axis, name in zip(axes[:, 0], models, strict=True):
        of_model = lots[lots.model == name]
        draws = of_model[of_model.name == "random"]["bits per byte"]
        axis.scatter(draws, [1] * len(draws), marker="|", s=120, lw=1, color="black", label="Random")
        others = of_model[of_model.name != "random"].sort_values("bits per byte")
        axis.scatter(others["bits per byte"], [0] * len(others), s=12, color="#bbbbbb")
        for method, title, bits in zip(others.name, others.title, others["bits per byte"], strict=True):
            if method in NAMED:
                axis.scatter(bits, 0, zorder=3, label=title, **_STYLES[method])
            better = int((draws < bits).sum())
            places.append((name, title, bits, better, len(draws)))
        rows = {"yticks": [0, 1], "yticklabels": ["methods", "random"], "ylim": (-0.5, 1.5)}
        axis.set(title=name, xscale="log", **rows)
        _plain(axis.xaxis, "{x:.4g}")
    axes[-1, 0].set_xlabel("bits per byte at 50%")
    _legend(fig, axes[:, 0], 3)
    columns = ["model", "method", "bits per byte", "draws that are better", "draws"]
    return fig, pd.DataFrame(places, columns=columns)


def better_draws(places: pd.DataFrame, method: str) -> str:
    """Say for each model how many random subsets need fewer bits per byte than a method."""
    found = places[places.method == TITLES[method]]
    counts = zip(found.model, found["draws that are better"], found.draws, strict=True)
    return (
        "; ".join(f"{better} of {draws} on {model}" for model, better, draws in counts) or "not measured here"
    )


def cost_figure(chosen: pd.DataFrame) -> Figure:
    """Draw bits per byte against the seconds of the selection, a panel for each model."""
    models = chosen.model.unique()
    fig, axes = _panels(len(models), 3.2, "seconds to select", "bits per byte at 50%")
    for axis, name in zip(axes, models, strict=True):
        of_model = chosen[chosen.model == name].assign(at=lambda table: table.seconds.clip(lower=0.01))
        axis.scatter(of_model["at"], of_model["bits per byte"], s=12, color="#bbbbbb")
        for method, part in of_model[of_model.name.isin(NAMED)].groupby("name", sort=False):
            first = part.iloc[0]
            axis.scatter(first["at"], first["bits per byte"], zorder=3, label=first.title, **_STYLES[method])
        axis.set(title=name, xscale="log", yscale="log")
        _plain(axis.yaxis, "{x:.3g}")
    _legend(fig, axes, 3)
    return fig


def _panels(count: int, height: float, x: str, y: str) -> tuple[Figure, Sequence[Axes]]:
    """Make panels side by side, with one label for each direction."""
    fig, axes = plt.subplots(1, count, figsize=(5.6, height), sharex=True, squeeze=False)
    axes[0][0].set_ylabel(y)
    axes[0][count // 2].set_xlabel(x)
    return fig, axes[0]


def _plain(axis: "plt.Axis", form: str) -> None:
    axis.set_major_formatter(form)
    axis.set_minor_formatter(form)


def _legend(fig: Figure, axes: Iterable[Axes], columns: int) -> None:
    handles = {h.get_label(): h for axis in axes for h in axis.get_legend_handles_labels()[0]}
    fig.legend(handles.values(), handles, loc="outside lower center", ncols=columns)


def finals_table(finals: Iterable[Record], models: Sequence[str]) -> pd.DataFrame:
    """Tabulate the methods that were healed and scored on the benchmarks, with differences from MoEITS.

    Parameters
    ----------
    finals : iterable of Record
        From :meth:`moeits.study.comparison.Comparison.final`.
    models : sequence of str
        The models in their order.
    """
    values = ["bits per byte", "stderr", "difference", "difference stderr", "acc", "acc stderr"]
    values += ["acc difference", "acc difference stderr", "questions", "flips"]
    last = tables.finals_table(finals).reindex(columns=["model", "method", "way", *values])
    name = last.method.astype("str").str.split().str[0]
    last["title"] = name.map(TITLES).fillna(UNPRUNED)
    state = last.way.astype("object").str.replace("lora", "LoRA").fillna("as pruned")
    last["state"] = state.where(name != comparison.WHOLE, "unpruned")
    last["position"] = last.model.map(list(models).index)
    last = last.sort_values(["position", "way", "bits per byte"], na_position="first")
    shown = {"model": last.model, "method": last.title, "state": last.state}
    shown["bits per byte"] = with_errors(last["bits per byte"], last.stderr, ".3f")
    shown["difference"] = with_errors(last.difference, last["difference stderr"])
    shown["accuracy"] = with_errors(last.acc, last["acc stderr"], ".3f")
    shown["difference in accuracy"] = with_errors(last["acc difference"], last["acc difference stderr"])
    return pd.DataFrame(shown | {key: last[key].astype("Int64") for key in ("flips", "questions")})


def speeds_of(run: tables.Shown, cells: Iterable[Record]) -> pd.DataFrame:
    """Tabulate the measured speeds by model and form, larger shares first."""
    speeds, forms = tables.speed_table(run.speeds, cells), list(comparison.FORMATS)
    return speeds.sort_values(
        ["model", "form", "share"],
        ascending=[True, True, False],
        kind="stable",
        key=lambda of: of.map(forms.index) if of.name == "form" else of,
    )


def speed_sentence(speeds: pd.DataFrame, measured: pd.DataFrame) -> str:
    """Say what methods that change weights compete with at equal measured speed."""
    if speeds.empty:
        return "No speed was measured here; `make rivals` does."
    changed = speeds[speeds["as fast"].notna() & (speeds.form != "whole")]
    matched = changed[changed["as fast"] < 1]
    sentences = [
        f"Of {len(changed)} measurements of changed weights, {len(changed) - len(matched)} process prompts "
        "no faster than the unpruned model, within two standard errors: at equal measured speed they compete "
        "with the unpruned model, not with a pruned one."
    ]
    moeits = measured[measured.method == "moeits"].set_index(["model", "budget"])["bits per byte"]
    for _, line in matched.iterrows():
        there = moeits.get((line.model, comparison.label(line["as fast"])))
        sentences.append(
            f"{TITLES[line.method]} ({line.form}, {line.share:.0%} of the bytes) is as fast as a model with "
            f"{line['as fast']:.0%} of the experts and needs {line['bits per byte']:.3f} bits per byte; "
            "MoEITS " + ("has not been measured there." if there is None else f"needs {there:.3f} there.")
        )
    return " ".join(sentences)


def tally(table: pd.DataFrame) -> str:
    """Count the verdicts of :func:`moeits.study.tables.differences`."""
    if table.empty:
        return "not measured"
    counts = table.verdict.value_counts()
    return (
        f"better in {counts.get('better', 0)} and worse in {counts.get('worse', 0)} of {len(table)} "
        "comparisons"
    )


def order_alone(cells: Iterable[Record], models: Iterable[str]) -> str:
    """Count the methods that beat MoEITS at half of every layer, where only the order of the experts differs.

    MoEITS with the same share of every layer is compared with all other methods that keep its numbers; its
    own variants, random subsets and the first experts are not counted.
    """
    half: dict[str, dict[str, Record]] = {}
    for cell in cells:
        if comparison.removes(cell) and cell.inputs["budget"] == comparison.FINAL:
            half.setdefault(cell.inputs["model"], {})[cell.inputs["method"]] = cell
    said = []
    for model in models:
        methods = half.get(model, {})
        if UNIFORM not in methods:
            continue
        others = [
            name
            for name, cell in methods.items()
            if _counts(cell) == _counts(methods[UNIFORM])
            and name != "first"
            and not name.startswith(("moeits", "random "))
        ]
        pairs = tables.differences(methods.values(), [(name, UNIFORM) for name in others])
        said.append(f"{model}: {tally(pairs)}")
    return "; ".join(said) or "not measured"


def _counts(cell: Record) -> dict[str, int]:
    return {layer: len(kept) for layer, kept in cell.details["kept"].items()}


def wide(table: pd.DataFrame, places: Sequence[tuple[str, object]], by: str = "first") -> pd.DataFrame:
    """Spread differences: a row for each model and budget, a column for each first or second method."""
    table = table.assign(shown=with_errors(table.difference, table.stderr))
    shown = table.pivot_table("shown", ["model", "budget"], by, aggfunc="first")
    rows = [(model, comparison.label(budget)) for model, budget in places]
    columns = [name for name in table[by].unique() if name in shown]
    shown = shown.reindex([row for row in rows if row in shown.index])[columns]
    return shown.rename(columns=TITLES).reset_index().fillna("")


def evenness(passes: Iterable[Record], models: Sequence[str]) -> pd.DataFrame:
    """Tabulate how even the router's weights of the chosen experts are, on average and by layer."""
    lines = []
    for one in passes:
        if values := list(one.details.get("evenness", {}).values()):
            row = one.rows[0]
            lines.append((row["model"], row["task"], np.mean(values), min(values), max(values)))
    table = pd.DataFrame(lines, columns=["model", "text", "evenness", "smallest layer", "largest layer"])
    order = list(models).index
    return table.sort_values(["text", "model"], key=lambda of: of.map(order) if of.name == "model" else of)


def oracle_ranks(run: tables.Shown) -> pd.DataFrame:
    """Rank the methods' choices among all subsets, of methods that chose in every layer that was tried.

    Returns
    -------
    DataFrame
        As :func:`moeits.study.tables.oracle_table`, with name, title and layers (how many were tried).
        Empty if none was.
    """
    ranks = tables.oracle_table(run.oracles, run.cells)
    if ranks.empty:
        return ranks
    ranks["name"] = ranks.method.str.split().str[0]
    ranks["title"] = ranks.name.map(TITLES).fillna("Layer error")
    ranks["layers"] = ranks.groupby("model").layer.transform("nunique")
    return ranks[ranks.groupby(["model", "name"]).layer.transform("nunique") == ranks.layers]


def oracle_means(ranks: pd.DataFrame) -> pd.DataFrame:
    """Average ranks and losses over layers: model, title, rank, loss, lowest rank first."""
    means = ranks.groupby(["model", "title"])[["rank", "loss"]].mean().reset_index()
    return means.sort_values(["model", "rank"])


def oracle_table(means: pd.DataFrame) -> pd.DataFrame:
    """Spread :func:`oracle_means`: a row for each method, columns of rank and loss for each model."""
    wider = means.pivot_table(["rank", "loss"], "title", "model", sort=False)[["rank", "loss"]]
    wider = wider.set_axis([f"{what}, {model}" for what, model in wider.columns], axis=1)
    return wider.sort_values(wider.columns[0]).rename_axis("method").reset_index()


def oracle_figure(ranks: pd.DataFrame, oracles: Iterable[Record]) -> Figure:
    """Draw the losses of all subsets in order, and where named methods fall, a panel for each layer."""
    tried = {one.inputs["model"]: one.details.get("layers") for one in oracles}
    layers = list(ranks[["model", "layer"]].drop_duplicates().itertuples(index=False))
    highlight = ["moeits-uniform", "reap", "lu", "random-token-norm", "random"]
    fig, axes = _panels(len(layers), 3.2, "rank among all subsets", "nats per token above the best")
    for axis, (model, layer) in zip(axes, layers, strict=True):
        losses = np.sort(np.mean(tried[model][str(layer)]["nats"], axis=1))
        axis.plot(np.arange(1, len(losses) + 1), losses - losses[0], color="#bbbbbb", marker="", lw=1.5)
        part = ranks[(ranks.model == model) & (ranks.layer == layer)]
        for name in highlight:
            points = part[part.name == name]
            axis.scatter(points["rank"], points.loss, zorder=3, label=TITLES[name], **_STYLES[name])
        axis.set_title(f"{model}, layer {layer}", fontsize=8)
    _legend(fig, axes, 2)
    return fig


def oracle_sentences(ranks: pd.DataFrame) -> Mapping[str, str]:
    """Say which layers were tried, which methods are better or worse than chance, and the rank of MoEITS.

    Returns
    -------
    dict
        ``layers``, ``verdict`` and ``moeits``.
    """
    if ranks.empty:
        nothing = "not measured here"
        return {"layers": "no layer", "verdict": "Not measured here; `make rivals` does.", "moeits": nothing}
    subsets, layers, means = ranks.subsets.iloc[0], ranks.layers.iloc[0], oracle_means(ranks)
    chance, error = (subsets + 1) / 2, ((subsets**2 - 1) / 12 / layers) ** 0.5
    judged = (means["rank"] - chance).map(lambda gap: statistics.verdict(gap, error))
    sides = {
        side: "; ".join(means[(means.title != TITLES["random"]) & (judged == side)].title) or "none"
        for side in ("better", "worse")
    }
    own = means[means.title == TITLES["moeits-uniform"]].set_index("model")["rank"]
    return {
        "layers": "; ".join(
            f"layers {', '.join(map(str, part.layer.unique()))} of {model}"
            for model, part in ranks.groupby("model", sort=False)
        ),
        "verdict": f"Random subsets have a mean rank of {chance:.1f} ± {error:.1f} over {layers} layers. By "
        f"more than two of these standard errors, better: {sides['better']}; worse: {sides['worse']}.",
        "moeits": "; ".join(
            f"{model}: mean rank {rank:.0f} of {subsets} over {layers} layers, random subsets {chance:.1f} ± "
            f"{error:.1f}"
            for model, rank in own.items()
        ),
    }


def proposed_healed(finals: Iterable[Record], models: Sequence[str]) -> pd.DataFrame:
    """Compare the proposed method with MoEITS and REAP in the same state of healing.

    Returns
    -------
    DataFrame
        model, state, minus (the other method's title), bits and acc with their stderr, questions.
    """
    places, lines = tables.by_place(finals, "way"), []
    for (model, method, way), one in places.items():
        for other in ("moeits", "reap") if method == "random-token-norm" else ():
            if partner := places.get((model, other, way)):
                acc = tables.paired_answers(one, partner)
                place = (model, way or "as pruned", TITLES[other], *tables.paired(one, partner))
                lines.append((*place, acc.difference, acc.stderr, acc.n))
    columns = ["model", "state", "minus", "bits", "bits stderr", "acc", "acc stderr", "questions"]
    order = [*models, "as pruned", *profiles.HEALINGS]
    table = pd.DataFrame(lines, columns=columns)
    return table.sort_values(["model", "state"], key=lambda of: of.map(order.index))


def healed_sentence(healed: pd.DataFrame) -> str:
    """Say after which healing the proposed method is worse than REAP."""
    ways = {"refit": "the refit", "lora": "LoRA", "refit + lora": "refit and LoRA"}
    sentences = []
    part = healed[(healed.state != "as pruned") & (healed.minus == TITLES["reap"])]
    for state, of in part.groupby("state"):
        verdicts = {
            line.model: statistics.verdict(line.bits, line["bits stderr"]) for _, line in of.iterrows()
        }
        worse = [model for model, verdict in verdicts.items() if verdict == "worse"]
        named = f" ({', '.join(worse)})" if worse else ""
        sentences.append(
            f"After {ways[state]} it is worse than REAP, by more than two standard errors, on {len(worse)} "
            f"of {len(verdicts)} models{named}."
        )
    return " ".join(sentences) or "Not measured here; `make rivals` does."
