"""Figures and tables of the page on the trained models, from their records and histories."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from numpy.lib.npyio import NpzFile

from moeits.book.trained_selection import COLOUR
from moeits.errors import MissingError, MoeitsError
from moeits.evaluation import ratio
from moeits.machine.paths import DATA
from moeits.study import records
from moeits.study.records import Record
from moeits.study.relatedness import square
from moeits.study.trials import estimate

MODELS = DATA / "models"
RECORDS = DATA / "study" / "records"
DENSE = "dense"
KINDS = tuple(COLOUR)
NMI_KINDS = ("copies of one slice", "other pairs", "shuffled weights")
ENOUGH = 0.1  # bits per byte that a random half must cost for a choice to matter, as registered
_LINE = 66  # characters of a passage in one line


def measured(folder: Path = RECORDS, models: Path = MODELS) -> list[Record]:
    """Read the newest record of every model that is there, measured on the weights that are there.

    Raises
    ------
    MissingError
        If there is none.
    """
    found = {}
    for record in records.load(folder, "anatomy"):
        facts = models / record.inputs["model"] / "training.json"
        if facts.exists() and json.loads(facts.read_text())["weights"] == record.inputs["weights"]:
            found[record.inputs["model"]] = record
    if not found:
        raise MissingError(f"no trained model has been measured in {folder}: run `moeits study`")
    return [found[name] for name in sorted(found)]


def of_matched_set(measured: Iterable[Record]) -> list[Record]:
    """Choose the records of the matched set: its four initialisations and the dense baseline."""
    return [record for record in measured if record.details["initialisation"] in (*KINDS, DENSE)]


def of_seed(measured: Iterable[Record], seed: int) -> dict[str, Record]:
    """Choose the models of one seed, by initialisation.

    Raises
    ------
    MoeitsError
        If none of them has a record; the message lists the seeds that have.
    """
    measured = list(measured)
    own = {r.details["initialisation"]: r for r in measured if r.details["seed"] == seed}
    if not own:
        seeds = sorted({record.details["seed"] for record in measured})
        raise MoeitsError(f"no model of seed {seed} has been measured: there are those of {seeds}")
    return {kind: own[kind] for kind in _present(own)}


def facts(name: str, models: Path = MODELS) -> dict[str, Any]:
    """Read settings and cost of a training."""
    return json.loads((models / name / "training.json").read_text())


# One number for each training


def quantities(measured: Sequence[Record]) -> pd.DataFrame:
    """Tabulate what was measured of every training, layers averaged.

    Parameters
    ----------
    measured : sequence of Record
        Of the step ``"anatomy"``.

    Returns
    -------
    DataFrame
        One row for each value: ``initialisation``, ``seed``, ``quantity``, ``value``, and the standard error
        over text, ``stderr`` (NaN where layers were averaged). Quantities are ``bits per byte, DOMAIN``,
        ``minus dense, DOMAIN`` (paired by document, where the seed's baseline has a record), and otherwise
        ``METRIC, VARIANT`` of the records.
    """
    rows = []
    dense = {r.details["seed"]: r for r in measured if r.details["initialisation"] == DENSE}
    for record in measured:
        own = {"initialisation": record.details["initialisation"], "seed": record.details["seed"]}
        table = pd.DataFrame(record.rows).query("task == 'all' or task.str.startswith('layer')")
        for (metric, variant), part in table.groupby(["metric", "variant"], dropna=False, sort=False):
            if metric != "bits per byte":
                name = metric if pd.isna(variant) else f"{metric}, {variant}"
                error = part.stderr.iloc[0] if len(part) == 1 else np.nan
                rows.append(own | {"quantity": name, "value": part.value.mean(), "stderr": error})
        base = dense.get(own["seed"])
        for task, of in _domains(record):
            bits, size = (np.array(record.details["documents"][key])[of] for key in ("bits", "bytes"))
            values = {"bits per byte": bits}
            if base is not None and base is not record:
                values["minus dense"] = bits - np.array(base.details["documents"]["bits"])[of]
            for name, one in values.items():
                value, error = ratio(one, size)
                rows.append(own | {"quantity": f"{name}, {task}", "value": value, "stderr": error})
    return pd.DataFrame(rows)


def _domains(record: Record) -> list[tuple[str, np.ndarray]]:
    domain = np.array(record.details["documents"]["domain"])
    each = [(record.details["domains"][number], domain == number) for number in np.unique(domain)]
    return [("all", np.ones(len(domain), bool)), *each]


def over_trainings(values: Sequence[float], form: str = ".3f") -> str:
    """Write mean ± half of the 95 % interval over trainings (t distribution); one training has no error."""
    values = np.asarray(values, float)
    if len(values) < 2:
        return format(values.mean(), form) if len(values) else "–"
    found = estimate(values)
    return f"{format(found.mean, form)} ± {format(found.high - found.mean, form.lstrip('+'))}"


def by_initialisation(table: pd.DataFrame, columns: Mapping[str, str], form: str = ".3f") -> pd.DataFrame:
    """Tabulate quantities by initialisation.

    Parameters
    ----------
    table : DataFrame
        See :func:`quantities`.
    columns : mapping of str to str
        Heading to quantity.
    form : str, default=".3f"
        Of the numbers.

    Returns
    -------
    DataFrame
        Initialisation, number of trainings, and mean ± error over trainings of every quantity.
    """
    lines = []
    for kind in _present(table.initialisation):
        own = table[table.initialisation == kind]
        values = {
            heading: over_trainings(own.value[own.quantity == quantity], form)
            for heading, quantity in columns.items()
        }
        lines.append({"initialisation": kind, "trainings": own.seed.nunique(), **values})
    return pd.DataFrame(lines)


def mean_of(table: pd.DataFrame, kind: str, quantity: str) -> float:
    """Mean of a quantity over the trainings of an initialisation; NaN where there are none."""
    return float(table.value[(table.initialisation == kind) & (table.quantity == quantity)].mean())


def losers(table: pd.DataFrame) -> str:
    """Say which models do not beat the dense baseline of their seed."""
    gains = table[table.quantity == "minus dense, all"]
    worse = [f"{row.initialisation}-{row.seed}" for row in gains.itertuples() if row.value >= 0]
    if not worse:
        return f"All {len(gains)} of them beat the dense baseline of their seed."
    better = len(gains) - len(worse)
    return f"{better} of {len(gains)} beat the dense baseline of their seed; {', '.join(worse)} do not."


def worth_selecting(table: pd.DataFrame) -> pd.DataFrame:
    """Apply the registered rule to every training: random halves are dear, and differ beyond their error.

    Returns
    -------
    DataFrame
        ``initialisation``, ``seed``, ``mean``, ``sd``, ``error`` in bits per byte, and ``selectable``.
    """
    names = {"mean": "mean", "sd over subsets": "sd", "error of a difference over text": "error"}
    wide = (
        table[table.quantity.isin([f"loss increase, {name}" for name in names])]
        .assign(quantity=lambda part: part.quantity.str.removeprefix("loss increase, ").map(names))
        .pivot_table(index=["initialisation", "seed"], columns="quantity", values="value", sort=False)
        .reset_index()
    )
    return wide.assign(selectable=(wide["mean"] > ENOUGH) & (wide.sd > wide.error))


def finding(table: pd.DataFrame) -> str:
    """Say in one sentence what the models show."""
    kinds = _present(table.initialisation, KINDS)
    costs = ", ".join(f"{mean_of(table, kind, 'loss increase, mean'):.2f} ({kind})" for kind in kinds)
    copies, others, null = (
        [mean_of(table, kind, f"nmi, {name}") for kind in kinds if kind != "scratch"] for name in NMI_KINDS
    )
    tells = "tells" if copies and min(copies) > max(others) else "does not tell everywhere"
    descent = (
        f", and the NMI of weights {tells} which experts are copies of one slice: it is {min(copies):.2f} or "
        f"more between copies, {max(others):.3f} or less between others, where shuffled weights give up to "
        f"{max(null):.3f}"
        if copies
        else ""
    )
    return f"Removing a random half of the experts costs {costs} bits per byte{descent}."


def facts_to_tell(measured: Sequence[Record], table: pd.DataFrame) -> dict[str, Any]:
    """Gather the numbers and sentences of the page's prose, by name."""
    sizes, documents = measured[0].inputs["sizes"], measured[0].details["documents"]
    training = facts(measured[0].inputs["model"])
    per_domain = sizes["documents"], sizes["rerouted"], sizes["removed"]
    counts = np.bincount(documents["domain"])
    found = {
        "finding": finding(table),
        "losers": losers(table),
        "selectable": _selectable(table),
        "seeds": int(table.seed.nunique()),
        "tokens": (training["settings"]["first"] + training["cost"]["tokens"]) / 1e6,
        "context": sizes["context"],
        "most_information": float(np.log(len(counts))),
    }
    for name, count in zip(("documents", "rerouted", "removed"), per_domain, strict=True):
        found[name] = int(np.minimum(counts, count).sum())
    quantities = {
        "shuffled": "loss increase, shuffled router rows",
        "random": "loss increase, random experts",
        "dearest": "loss increase, largest",
        "median": "loss increase, median",
    }
    for kind in ("scratch", "upcycled"):
        found |= {f"{name}_{kind}": mean_of(table, kind, of) for name, of in quantities.items()}
        own = [record for record in measured if record.details["initialisation"] == kind]
        both = np.array([_copies_together(record) for record in own] or [(np.nan, np.nan)]).mean(0)
        found |= {f"copy_{kind}": float(both[0]), f"across_{kind}": float(both[1])}
    return found


def _selectable(table: pd.DataFrame) -> str:
    """Say in how many trainings there is something to select."""
    found = worth_selecting(table).groupby("initialisation").selectable
    parts = [
        f"{found.sum()[kind]} of {found.size()[kind]} ({kind})" for kind in _present(found.groups, KINDS)
    ]
    return f"It finds something to select in {', '.join(parts)} trainings."


def _copies_together(record: Record) -> tuple[float, float]:
    """Mean co-activation in the last layer of two experts of one copy, and of two copies."""
    together = square(record.details["together"][-1])
    copy = np.arange(len(together)) // record.details["slices"]
    same = copy[:, None] == copy
    return together[same & ~np.eye(len(copy), dtype=bool)].mean(), together[~same].mean()


def told(values: pd.Series, form: str) -> str:
    """Write one value for each initialisation, as alternative text does."""
    return "; ".join(f"{kind} {format(values[kind], form)}" for kind in _present(values.index)) + "."


def loss_table(table: pd.DataFrame) -> pd.DataFrame:
    """Tabulate bits per byte, and the difference to the dense baseline."""
    columns = {"bits per byte": "bits per byte, all", "minus dense": "minus dense, all"}
    return by_initialisation(table, columns)


def domain_table(table: pd.DataFrame, domains: Sequence[str]) -> pd.DataFrame:
    """Tabulate the difference to the dense baseline by domain."""
    sparse = table[table.initialisation != DENSE]
    return by_initialisation(sparse, {domain: f"minus dense, {domain}" for domain in domains})


def halves_table(table: pd.DataFrame) -> pd.DataFrame:
    """Tabulate what random halves cost, how much they differ, and whether the registered rule is met."""
    columns = {
        "mean cost": "loss increase, mean",
        "sd over subsets": "loss increase, sd over subsets",
        "error over text": "loss increase, error of a difference over text",
    }
    lines = by_initialisation(table[table.initialisation != DENSE], columns)
    found = worth_selecting(table).groupby("initialisation").selectable.sum()
    return lines.assign(selectable=found.reindex(lines.initialisation).to_numpy())


def shipped_table(measured: Sequence[Record]) -> pd.DataFrame:
    """Tabulate the shipped models, one row each."""
    columns = {
        "bits per byte": "bits per byte, all",
        "shuffled rows": "loss increase, shuffled router rows",
        "random half": "loss increase, mean",
        "sd": "loss increase, sd over subsets",
        "idle": "idle experts",
        "information": "mutual information, expert and domain",
        **{f"NMI, {name}": f"nmi, {name}" for name in NMI_KINDS},
    }
    wide = quantities(measured).set_index(["initialisation", "quantity"]).value
    return pd.DataFrame(
        {"model": name} | {heading: wide.get((name, quantity)) for heading, quantity in columns.items()}
        for name in sorted({record.details["initialisation"] for record in measured})
    )


# Figures


def glance_figure(table: pd.DataFrame) -> Figure:
    """Draw what a random half costs, and the NMI of copies and of other pairs, one mark a training."""
    kinds = _present(table.initialisation, KINDS)
    fig, (left, right) = plt.subplots(1, 2, figsize=(5.6, 2.9))
    for position, kind in enumerate(kinds):
        own = table[table.initialisation == kind].set_index("quantity").value
        costs = own.loc[["loss increase, mean"]]
        left.plot([position] * len(costs), costs, marker="o", ls="", color=COLOUR[kind])
        for shift, name in zip((-0.2, 0, 0.2), NMI_KINDS, strict=True):
            if (quantity := f"nmi, {name}") in own.index:
                values = own.loc[[quantity]]
                marker = dict(zip(NMI_KINDS, "os_", strict=True))[name]
                colour = "black" if name == NMI_KINDS[2] else COLOUR[kind]
                right.plot([position + shift] * len(values), values, marker=marker, ls="", color=colour)
    left.axhline(ENOUGH, color="black", lw=0.8, ls="--", marker="")
    left.set(ylabel="cost of a random half, bits per byte")
    left.set_ylim(bottom=0)
    right.set(ylabel="NMI of a pair of experts", yscale="log")
    for axis in (left, right):
        axis.set_xticks(range(len(kinds)), [kind.replace("-", "-\n") for kind in kinds], fontsize=7)
        axis.set_xlim(-0.5, len(kinds) - 0.5)
    return fig


def load_figure(chosen: Mapping[str, Record]) -> tuple[Figure, pd.DataFrame]:
    """Draw the load of the experts of every layer, largest first, one panel for each initialisation."""
    data = pd.DataFrame(
        {
            "initialisation": kind,
            "layer": layer,
            "rank": rank + 1,
            "expert": int(expert),
            "load": load[expert],
        }
        for kind, record in chosen.items()
        for layer, load in _layers(record, "load")
        for rank, expert in enumerate(np.argsort(-load))
    )
    data["load"] *= data.groupby(["initialisation", "layer"])["rank"].transform("max")
    grid = sns.relplot(
        data, x="rank", y="load", hue="layer", col="initialisation", kind="line", height=2.4, aspect=0.58,
        palette="viridis", legend="full",
    )  # fmt: skip
    for axis in grid.axes.flat:
        axis.axhline(1, color="black", lw=0.8, ls="--", marker="")
    grid.set(ylim=(0, None)).set_titles("{col_name}").set_axis_labels(
        "expert, by rank", "load (1 is uniform)"
    )
    return grid.figure, data


def domains_figure(chosen: Mapping[str, Record]) -> tuple[Figure, pd.DataFrame]:
    """Draw heat maps of expert by domain, layers down, initialisations across."""
    panels = {
        (layer, kind): np.array(shares) * np.shape(shares)[1]
        for kind, record in chosen.items()
        for layer, shares in _layers(record, "shares")
    }
    names = next(iter(chosen.values())).details["domains"]
    top = max(panel.max() for panel in panels.values())
    fig = _heat_maps(panels, vmin=0, vmax=top, label="share of a domain's choices (1 is uniform)", rows=names)
    data = _long(panels, ("domain", "expert"), {"domain": names})
    return fig, data


def information_figure(measured: Sequence[Record]) -> tuple[Figure, pd.DataFrame]:
    """Draw the mutual information of expert and domain by layer, one line a training."""
    rows = [
        {
            "initialisation": record.details["initialisation"],
            "seed": record.details["seed"],
            "layer": int(row["task"].removeprefix("layer ")),
            "information": row["value"],
        }
        for record in measured
        for row in record.rows
        if row["metric"] == "mutual information" and row["variant"] == "expert and domain"
    ]
    data = pd.DataFrame(rows)
    fig, axis = plt.subplots(figsize=(5.6, 2.8))
    for kind in _present(data.initialisation, KINDS):
        own = data[data.initialisation == kind]
        for _, line in own.groupby("seed"):
            axis.plot(line.layer, line.information, color=COLOUR[kind], lw=0.7, alpha=0.5, marker="")
        mean = own.groupby("layer").information.mean()
        axis.plot(mean.index, mean, color=COLOUR[kind], label=kind)
    axis.set(xlabel="layer", ylabel="mutual information, nats", xticks=sorted(data.layer.unique()))
    axis.set_ylim(bottom=0)
    axis.legend()
    return fig, data


def together_figure(chosen: Mapping[str, Record]) -> tuple[Figure, pd.DataFrame]:
    """Draw which experts of the last layer are chosen together, one panel for each initialisation."""
    panels = {}
    for kind, record in chosen.items():
        layer, together = _layers(record, "together")[-1]
        panels[layer, kind] = square(together)
    top = max(panel.max() for panel in panels.values())
    fig = _heat_maps(panels, vmin=0, vmax=top, label="tokens with both, over tokens with either", size=2.1)
    return fig, _long(panels, ("expert", "other"))


def saturation(chosen: np.ndarray) -> np.ndarray:
    """Share of the chosen experts that are those of the end of the training.

    Parameters
    ----------
    chosen : ndarray of int, shape (steps, L, tokens, top-k)
        Experts of the same tokens at several steps, the last being the end.

    Returns
    -------
    ndarray, shape (steps, L)
        From 0 to 1; 1 at the end. Source: OLMoE, doi:10.48550/arXiv.2409.02060.
    """
    last = chosen[-1]
    return np.stack([(one[..., :, None] == last[..., None, :]).any(-1).mean((-1, -2)) for one in chosen])


def along(name: str, quantity: str, models: Path = MODELS) -> tuple[np.ndarray, np.ndarray]:
    """Read what was observed along a training.

    Returns
    -------
    tokens : ndarray, shape (steps,)
        Millions of tokens since the experts began.
    values : ndarray, shape (steps, ...)
        See `moeits.study.trained.observation`.
    """
    schedule = facts(name, models)["settings"]["schedule"]
    with np.load(models / name / "training.npz") as history:
        steps = sorted(_steps(history, quantity))
        values = np.stack([history[f"{quantity}@{step}"] for step in steps])
    return np.array(steps) * schedule["rows"] * schedule["context"] / 1e6, values


def _steps(history: NpzFile, quantity: str) -> list[int]:
    return [int(key.partition("@")[2]) for key in history.files if key.startswith(f"{quantity}@")]


def saturation_figure(measured: Sequence[Record], models: Path = MODELS) -> tuple[Figure, pd.DataFrame]:
    """Draw router saturation along the trainings, the mean over layers, one line a training."""
    rows = []
    for record in measured:
        tokens, chosen = along(record.inputs["model"], "chosen", models)
        own = {"initialisation": record.details["initialisation"], "seed": record.details["seed"]}
        settled = saturation(chosen).mean(1)
        rows += [own | {"tokens": x, "saturation": y} for x, y in zip(tokens, settled, strict=True)]
    data = pd.DataFrame(rows)
    fig, axis = plt.subplots(figsize=(5.6, 2.8))
    _lines(axis, data, "tokens", "saturation")
    axis.set(xlabel="million tokens since the experts began", ylabel="choices as at the end", ylim=(0, 1.02))
    axis.legend()
    return fig, data


def top_tokens(chosen: Mapping[str, Record], experts: int = 3) -> pd.DataFrame:
    """Tabulate the experts of the last layer with the most reliable tokens."""
    lines = []
    for kind, record in chosen.items():
        layer, tops = _layers(record, "top_tokens")[-1]
        shares = [np.mean([share for _, share in top]) if top else 0 for top in tops]
        lines += [
            {
                "initialisation": kind,
                "layer": layer,
                "expert": int(expert),
                "tokens": " ".join(f"`{_visible(token)}` {share:.0%}" for token, share in tops[expert]),
            }
            for expert in np.argsort(-np.array(shares), kind="stable")[:experts]
        ]
    return pd.DataFrame(lines)


def passage_figure(record: Record, layer: int = -1) -> tuple[Figure, pd.DataFrame]:
    """Print passages, each token on the colour of its likeliest expert with that expert's number below."""
    palette = sns.color_palette("husl", len(record.details["load"][layer]))
    rows = []
    line = 0
    for passage in record.details["passages"]:
        column = 0
        for token, expert in zip(passage["tokens"], passage["experts"][layer], strict=True):
            text = _visible(token)
            if column + len(text) > _LINE:
                line, column = line + 1, 0
            rows.append((line, column, text, expert))
            line, column = (line + 1, 0) if "\n" in token else (line, column + len(text))
        line += 2
    data = pd.DataFrame(rows, columns=["line", "column", "token", "expert"])
    fig, axis = plt.subplots(figsize=(5.6, 0.29 * line))
    for row in data.itertuples():
        box = plt.Rectangle(
            (row.column, row.line), len(row.token), 0.72, color=palette[row.expert], alpha=0.45, lw=0
        )
        axis.add_patch(box)
        place = {"ha": "center", "va": "center", "family": "DejaVu Sans Mono"}
        middle = row.column + len(row.token) / 2
        axis.text(middle, row.line + 0.36, row.token.replace("$", r"\$"), fontsize=6.6, **place)
        axis.text(middle, row.line + 0.86, str(row.expert), fontsize=4.2, color="#444444", **place)
    axis.set(xlim=(0, _LINE), ylim=(line - 0.9, -0.1))
    axis.axis("off")
    return fig, data


def removal_figure(chosen: Mapping[str, Record]) -> tuple[Figure, pd.DataFrame]:
    """Draw the loss increase from removing each single expert, by domain; layers below each other."""
    names = ["all", *next(iter(chosen.values())).details["domains"]]
    panels = {
        (layer, kind): np.array(values).T
        for kind, record in chosen.items()
        for layer, values in _layers(record, "removal")
    }
    top = np.quantile([abs(value) for panel in panels.values() for value in panel.ravel()], 0.99)
    fig = _heat_maps(
        panels, vmin=-top, vmax=top, cmap="RdBu_r", label="loss increase, bits per byte", rows=names
    )
    return fig, _long(panels, ("domain", "expert"), {"domain": names})


def nmi_figure(chosen: Mapping[str, Record]) -> tuple[Figure, pd.DataFrame]:
    """Draw NMI matrices with experts in the order of their slices, layers down, initialisations across."""
    panels = {}
    for kind, record in chosen.items():
        for layer, values in _layers(record, "nmi"):
            R = square(values)
            order = np.argsort(np.arange(len(R)) % record.details["slices"], kind="stable")
            R[np.diag_indices(len(R))] = np.nan
            panels[layer, kind] = R[np.ix_(order, order)]
    top = max(np.nanmax(panel) for panel in panels.values())
    fig = _heat_maps(panels, vmin=0, vmax=top, label="NMI")
    for axis in fig.axes[: len(panels)]:
        side = int(axis.get_xlim()[1])
        for edge in range(0, side, side // 4):
            axis.axhline(edge, color="white", lw=0.5, marker="")
            axis.axvline(edge, color="white", lw=0.5, marker="")
    return fig, _long(panels, ("expert", "other")).dropna()


def ancestry_figure(measured: Sequence[Record], models: Path = MODELS) -> tuple[Figure, pd.DataFrame]:
    """Draw NMI of copies and of other pairs along the trainings, with the distance from the parent."""
    rows = []
    for record in measured:
        name = record.inputs["model"]
        own = {"initialisation": record.details["initialisation"], "seed": record.details["seed"]}
        tokens, R = along(name, "nmi", models)
        slot = np.arange(R.shape[-1]) % record.details["slices"]
        same = (slot[:, None] == slot) & ~np.eye(len(slot), dtype=bool)
        other = slot[:, None] != slot
        seen = {"copies of one slice": R[..., same].mean((1, 2)), "other pairs": R[..., other].mean((1, 2))}
        with np.load(models / name / "training.npz") as history:
            distances = [key for key in ("moved", "from_parent") if _steps(history, key)]
        for key in distances:
            seen[key] = along(name, key, models)[1].mean((1, 2))
        for quantity, values in seen.items():
            rows += [
                own | {"tokens": x, "quantity": quantity, "value": y}
                for x, y in zip(tokens, values, strict=True)
            ]
    data = pd.DataFrame(rows)
    fig, (left, right) = plt.subplots(1, 2, figsize=(5.6, 3))
    for axis, styles in (
        (left, {"copies of one slice": "-", "other pairs": ":"}),
        (right, {"from_parent": "-", "moved": ":"}),
    ):
        for quantity, style in styles.items():
            _lines(axis, data[data.quantity == quantity], "tokens", "value", ls=style)
        axis.set_ylim(bottom=0)
    left.set(ylabel="NMI of a pair of experts")
    right.set(ylabel="distance, relative to the norm")
    fig.supxlabel("million tokens since the experts began", fontsize=10)
    shown = _present(data.initialisation, KINDS)
    handles = [mpl.lines.Line2D([], [], color=COLOUR[kind], marker="") for kind in shown]
    fig.legend(handles, shown, loc="outside upper center", ncols=4, fontsize=8)
    return fig, data


def _layers(record: Record, key: str) -> list[tuple[int, Any]]:
    values = record.details[key]
    if key in ("load", "shares", "removal"):
        values = [np.array(one) for one in values]
    return list(zip(record.details["layers"], values, strict=True))


def _present(column: Iterable[str], kinds: Sequence[str] = (DENSE, *KINDS)) -> list[str]:
    there = set(column)
    return [kind for kind in kinds if kind in there]


def _visible(token: str) -> str:
    return token.replace("\n", "↵").replace("\t", "→")


def _lines(axis: plt.Axes, data: pd.DataFrame, x: str, y: str, **style: Any) -> None:
    """Draw one thin line a training."""
    for kind in _present(data.initialisation, KINDS):
        for number, (_, line) in enumerate(data[data.initialisation == kind].groupby("seed")):
            label = None if number else kind
            axis.plot(line[x], line[y], color=COLOUR[kind], marker="", lw=1.2, label=label, **style)


def _heat_maps(
    panels: Mapping[tuple[int, str], np.ndarray],
    *,
    label: str,
    rows: Sequence[str] | None = None,
    size: float | None = None,
    **colours: Any,
) -> Figure:
    """Draw panels by layer (down) and initialisation (across) on one scale."""
    layers, kinds = (list(dict.fromkeys(key[side] for key in panels)) for side in (0, 1))
    height = size or 0.35 + 1.25 * len(layers)
    fig, axes = plt.subplots(len(layers), len(kinds), figsize=(5.6, height), squeeze=False, sharey=True)
    for (layer, kind), panel in panels.items():
        axis = axes[layers.index(layer), kinds.index(kind)]
        mesh = axis.pcolormesh(panel, rasterized=True, **colours)
        axis.set_ylim(len(panel), 0)  # the axes are shared: inverting each would turn them back
        axis.grid(visible=False)
        axis.set_xticks([])
        axis.set_yticks(np.arange(len(rows)) + 0.5, rows, fontsize=6) if rows else axis.set_yticks([])
        if layer == layers[0]:
            axis.set_title(kind, fontsize=9)
        if kind == kinds[0]:
            axis.set_ylabel(f"layer {layer}", fontsize=8)
    bar = fig.colorbar(mesh, ax=axes, location="bottom", label=label, shrink=0.6, aspect=35, pad=0.02)
    bar.ax.locator_params(nbins=5)
    return fig


def _long(
    panels: Mapping[tuple[int, str], np.ndarray],
    names: tuple[str, str],
    labels: Mapping[str, Sequence[str]] | None = None,
) -> pd.DataFrame:
    first, second = names
    parts = []
    for (layer, kind), panel in panels.items():
        down, across = np.indices(panel.shape).reshape(2, -1)
        down = np.array(labels[first])[down] if labels else down
        one = {"initialisation": kind, "layer": layer, first: down, second: across, "value": panel.ravel()}
        parts.append(pd.DataFrame(one))
    return pd.concat(parts, ignore_index=True)
