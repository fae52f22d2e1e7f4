"""Figures and tables of the page on selection among trained experts."""

from collections.abc import Iterable

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from moeits.book.figures import COLOURS
from moeits.corpus import DOMAINS
from moeits.study.records import Record
from moeits.study.trials import by_domain, estimate, estimates, summary

COLOUR = dict(zip(("scratch", "upcycled", "drop-upcycled", "btm"), COLOURS, strict=False))
"""Colour of each initialisation, the same in every figure."""

NAMES = {
    "moeits": "MoEITS",
    "frequency": "most used",
    "router-weight": "router weight",
    "activation-norm": "activation norm",
    "random-token-norm": "norm, random tokens",
    "reap": "REAP",
    "weight-product": "weight product",
    "stun": "STUN, experts",
    "lu": "Lu et al.",
    "first": "first experts",
}
"""Names of the methods as the book writes them."""


def methods_figure(table: pd.DataFrame) -> Figure:
    """Draw Δ of every method at half of the experts, one panel for each initialisation.

    Parameters
    ----------
    table : DataFrame
        See :func:`moeits.study.trials.differences`.

    Returns
    -------
    Figure
        Small marks are trainings; large ones their mean, with the 95 % interval.
    """
    half = table[table.budget == "half"]
    order = half.groupby("method").delta.mean().sort_values().index.tolist()
    kinds = [kind for kind in COLOUR if kind in set(half.initialisation)]
    fig, axes = plt.subplots(1, len(kinds), figsize=(5.6, 3.6), sharey=True, squeeze=False)
    for axis, kind in zip(axes[0], kinds, strict=True):
        own = half[half.initialisation == kind]
        for height, method in enumerate(order):
            values = own[own.method == method].delta.to_numpy()
            heights = np.full(len(values), height)
            axis.plot(values, heights, color=COLOUR[kind], ms=3, alpha=0.5, marker=".", ls="")
            if len(values) > 1:
                found = estimate(values)
                axis.plot([found.low, found.high], [height, height], color=COLOUR[kind], marker="", lw=1.2)
            axis.plot(values.mean(), height, color=COLOUR[kind], marker="o", ms=4.5)
        axis.axvline(0, color="black", lw=0.8)
        axis.set_title(kind, fontsize=9)
        axis.tick_params(axis="x", labelsize=7)
    axes[0, 0].set_yticks(range(len(order)), [NAMES.get(method, method) for method in order])
    fig.supxlabel("bits per byte, minus the mean of random subsets (left is better)", fontsize=9)
    return fig


def own_count_figure(records: Iterable[Record]) -> tuple[Figure, pd.DataFrame]:
    """Draw what MoEITS keeps at its own count among random subsets of that size.

    Parameters
    ----------
    records : iterable of Record
        Of the step ``"selection"``.

    Returns
    -------
    Figure, DataFrame
        Panels by initialisation, one column of marks for each training; and the numbers drawn, in bits per
        byte above the unpruned model.
    """
    rows = []
    for record in records:
        kind, _, seed = record.inputs["model"].rpartition("-")
        if "own" not in record.details["budgets"]:
            continue
        told, size = record.details["budgets"]["own"], sum(record.details["bytes"])
        base = sum(record.details["unpruned"])
        drawn = {
            "random subsets": told["subsets"],
            "one expert per slice": told.get("stratified", []),
            "MoEITS": [sum(told["methods"]["moeits"]["bits"])],
        }
        rows += [
            {"initialisation": kind, "seed": int(seed), "kept": what, "cost": (bits - base) / size}
            for what, all_bits in drawn.items()
            for bits in all_bits
        ]
    data = pd.DataFrame(rows)
    kinds = [kind for kind in COLOUR if kind in set(data.initialisation)]
    fig, axes = plt.subplots(1, len(kinds), figsize=(5.6, 3.2), squeeze=False)
    looks = {
        "random subsets": (".", "#999999", 3),
        "one expert per slice": ("s", None, 3),
        "MoEITS": ("X", "black", 7),
    }
    for axis, kind in zip(axes[0], kinds, strict=True):
        own = data[data.initialisation == kind]
        for what, (marker, colour, size) in looks.items():
            part = own[own.kept == what]
            sns.stripplot(
                part,
                x="seed",
                y="cost",
                ax=axis,
                marker=marker,
                size=size,
                color=colour or COLOUR[kind],
                jitter=0 if what == "MoEITS" else 0.25,
                alpha=1 if what == "MoEITS" else 0.6,
                label=what if axis is axes[0, -1] else None,
                legend=False,
            )
        axis.set(title=kind, xlabel="training", ylabel="")
    axes[0, 0].set_ylabel("cost, bits per byte")
    handles, labels = axes[0, -1].get_legend_handles_labels()
    first = dict(reversed(list(zip(labels, handles, strict=True))))
    fig.legend(first.values(), first.keys(), loc="outside lower center", ncols=3, fontsize=8)
    return fig, data


def methods_table(table: pd.DataFrame) -> pd.DataFrame:
    """Tabulate initialisation x method at half of the experts: mean ± error, and verdict."""
    found = summary(table)
    marks = {"better": "−", "worse": "+", "equivalent": "=", "undecided": ""}
    found["shown"] = [
        f"{row.mean:+.4f} ± {row.error:.4f} {marks[row.verdict]}{'*' if row.discovered else ''}".strip()
        for row in found.itertuples()
    ]
    wide = found.set_index(["method", "initialisation"]).shown.unstack()  # noqa: PD010 (one value a cell)
    order = found.groupby("method")["mean"].mean().sort_values().index
    kinds = [kind for kind in COLOUR if kind in wide.columns]
    return wide.loc[order, kinds].rename(index=NAMES).reset_index()


def domains_table(records: Iterable[Record], method: str = "moeits") -> pd.DataFrame:
    """Tabulate a method against random subsets by domain: mean over trainings and 95 % interval."""
    table = by_domain(records)
    found = estimates(table[table.method == method], ["initialisation", "budget", "domain"])
    found["shown"] = [f"{one['mean']:+.3f} [{one.low:+.3f}, {one.high:+.3f}]" for _, one in found.iterrows()]
    wide = found.pivot_table(
        index="domain", columns=["initialisation", "budget"], values="shown", aggfunc="first"
    )
    kinds = [key for kind in COLOUR for key in wide.columns if key[0] == kind]
    wide = wide[kinds].set_axis([f"{kind}, {budget}" for kind, budget in kinds], axis=1)
    return wide.rename(index=dict(enumerate(DOMAINS))).reset_index()


def finding(hypotheses: pd.DataFrame, table: pd.DataFrame) -> str:
    """Say what the registered hypotheses came to, in two sentences."""
    h = hypotheses.set_index("hypothesis")
    kept = table[(table.initialisation == "upcycled") & (table.budget == "own")].kept.mean()
    says = {
        "better": "better than random subsets",
        "worse": "worse than random subsets",
        "equivalent": "equivalent to random subsets",
        "undecided": "not told apart from random subsets",
    }

    def number(name: str) -> str:
        return f"{h['mean'][name]:+.4f} ± {h['error'][name]:.4f} bits per byte"

    slices = "equivalent to" if h.verdict["H2"] == "equivalent" else "not shown to be equivalent to"
    stopped = next((name for name in h.index if not h.tested[name]), None)
    beyond = (
        "" if h.tested["H4"] else f", an estimate only, since the registered sequence stops before {stopped}"
    )
    return (
        f"Among upcycled experts MoEITS keeps {kept:.1f} of 16 a layer by its own rule, and is "
        f"{says[h.verdict['H1']]} of that size ({number('H1')}); it is {slices} any choice of one expert for "
        f"each slice of the parent ({number('H2')}). Among experts trained from scratch, at half, it is "
        f"{says[h.verdict['H4']]} ({number('H4')}{beyond})."
    )
