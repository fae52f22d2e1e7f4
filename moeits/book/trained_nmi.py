"""Figures, tables and sentences of the page on what weight NMI measures."""

from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from moeits.book import audit, demos
from moeits.book.figures import COLOURS
from moeits.book.trained_selection import COLOUR
from moeits.evaluation.statistics import estimate
from moeits.study import paper
from moeits.study.relatedness import FUNCTION, direction
from moeits.study.threshold import spread_that_keeps

NAMES = {
    "output": "outputs",
    "together": "used together",
    "router": "router rows",
    "loss": "loss increase",
}
"""Similarities by function as the book writes them."""


def relatedness_figure(table: pd.DataFrame) -> Figure:
    """Draw the rank correlation of weights with function.

    Parameters
    ----------
    table : DataFrame
        See :func:`moeits.study.relatedness.summary`.

    Returns
    -------
    Figure
        A panel for all pairs and one for copies of one slice; filled marks are the NMI of the weights as they
        are, open ones that with neurons matched; bars are 95 % intervals over trainings.
    """
    panels = [pairs for pairs in ("all", "copies of one slice") if pairs in set(table.pairs)]
    kinds = [kind for kind in COLOUR if kind in set(table.initialisation)]
    fig, axes = plt.subplots(1, len(panels), figsize=(5.6, 3.6), sharex=True, sharey=True, squeeze=False)
    for axis, pairs in zip(axes[0], panels, strict=True):
        own = table[table.pairs == pairs].set_index(["initialisation", "weights", "function"])
        for height, function in enumerate(reversed(FUNCTION)):
            for place, kind in enumerate(kinds):
                for weights, shift, fill in (("nmi", 0.0, COLOUR[kind]), ("aligned", -0.09, "white")):
                    if (kind, weights, function) not in own.index:
                        continue
                    one = own.loc[(kind, weights, function)]
                    y = height + 0.3 - 0.2 * place + shift
                    axis.plot([one.low, one.high], [y, y], color=COLOUR[kind], marker="", lw=1)
                    axis.plot(one["mean"], y, "o", ms=4, color=COLOUR[kind], mfc=fill)
        axis.axvline(0, color="black", lw=0.8)
        axis.set_title(pairs if pairs != "all" else "all pairs", fontsize=9)
        axis.set_xlabel("rank correlation with NMI", fontsize=9)
    axes[0, 0].set_yticks(range(len(FUNCTION)), [NAMES[one] for one in reversed(FUNCTION)])
    for kind in kinds:
        axes[0, 0].plot([], [], "o", ms=4, color=COLOUR[kind], label=kind)
    axes[0, 0].plot([], [], "o", ms=4, color="black", mfc="white", label="neurons matched")
    fig.legend(loc="outside lower center", ncols=3, fontsize=8)
    return fig


def relatedness_table(table: pd.DataFrame) -> pd.DataFrame:
    """Tabulate the correlations of NMI with function: mean and 95 % interval over trainings."""
    text = [f"{one['mean']:+.2f} [{one.low:+.2f}, {one.high:+.2f}]" for _, one in table.iterrows()]
    shown = table.assign(shown=text)
    keys = ["initialisation", "pairs", "weights"]
    wide = shown.pivot_table(index=keys, columns="function", values="shown", aggfunc="first", sort=False)
    wide = wide[[one for one in FUNCTION if one in wide]].reset_index()
    order = {kind: place for place, kind in enumerate(COLOUR)}
    wide = wide.assign(place=wide.initialisation.map(order)).sort_values(["pairs", "place"], kind="stable")
    named = {"nmi": "as they are", "permuted": "neurons permuted", "aligned": "permuted, matched"}
    return wide.assign(weights=wide.weights.map(named)).drop(columns="place").rename(columns=NAMES)


def relatedness_finding(table: pd.DataFrame) -> str:
    """Say what NMI follows, in three sentences; undecided is said so."""
    rows = table.set_index(["initialisation", "pairs", "weights", "function"])

    def told(*key: str) -> str:
        one = rows.loc[key]
        return f"{one['mean']:+.2f} ± {one.error:.2f}"

    def way(*key: str) -> str:
        return direction(rows.verdict[key])

    verbs = {
        "rises": "rises with how alike their outputs are",
        "falls": "falls as their outputs get alike",
        "undecided": "is not shown to follow how alike their outputs are",
    }
    plain, matched = (("scratch", "all", weights, "output") for weights in ("nmi", "aligned"))
    family = "copies of one slice"
    kinds = [kind for kind in COLOUR if (kind, family, "nmi", "output") in rows.index]

    def count(function: str) -> str:
        rising = [kind for kind in kinds if way(kind, family, "nmi", function) == "rises"]
        values = rows.loc[[(kind, family, "nmi", function) for kind in kinds], "mean"]
        span = f"mean {values.min():+.2f} to {values.max():+.2f}"
        return f"{len(rising)} of {len(kinds)} initialisations ({span})"

    return (
        f"Among experts from scratch weight NMI {verbs[way(*plain)]} (rank correlation {told(*plain)}); "
        f"with their neurons matched first it {verbs[way(*matched)]} ({told(*matched)}). Among copies of one "
        f"slice NMI rises with the likeness of outputs in {count('output')}, and with the likeness of what "
        f"removing them costs in {count('loss')}."
    )


def duplicates_figure(table: pd.DataFrame) -> Figure:
    """Draw how well planted copies are told along the training.

    Parameters
    ----------
    table : DataFrame
        See :func:`moeits.study.duplicates.table`.

    Returns
    -------
    Figure
        Panels for plain and for permuted copies: the probability that a planted pair is more similar than
        one that is none, by step; thin lines are trainings, thick ones their mean.
    """
    names = {"nmi": "NMI", "aligned": "NMI, neurons matched"} | {one: NAMES[one] for one in FUNCTION[:3]}
    steps = sorted(table.step.unique())
    fig, axes = plt.subplots(1, 2, figsize=(5.6, 3.2), sharey=True)
    for axis, (kind, title) in zip(
        axes, {"copy": "copies", "permuted": "copies, neurons permuted"}.items(), strict=True
    ):
        for colour, (key, name) in zip(COLOURS, names.items(), strict=False):
            wide = table[(table.kind == kind) & (table.similarity == key)].pivot_table(
                index="step", columns="seed", values="auc"
            )
            at = [steps.index(step) for step in wide.index]
            axis.plot(at, wide.to_numpy(), color=colour, lw=0.5, alpha=0.5, marker="")
            axis.plot(at, wide.mean(axis=1), color=colour, label=name if kind == "copy" else None)
        axis.axhline(0.5, color="black", lw=0.8, ls=":")
        axis.set_xticks(range(len(steps)), [str(step) for step in steps])
        axis.set(title=title, xlabel="steps of training")
    axes[0].set_ylabel("probability of telling a copy")
    fig.legend(loc="outside lower center", ncols=3, fontsize=8)
    return fig


def duplicates_finding(table: pd.DataFrame) -> str:
    """Say how well NMI and outputs tell the copies after the last step of all trainings."""
    counts = table.groupby("step").seed.nunique()
    last = counts[counts == counts.max()].index.max()
    own = table[table.step == last].groupby(["similarity", "kind"])

    def told(key: str, kind: str, column: str = "auc") -> str:
        values = own.get_group((key, kind))[column].to_numpy()
        if len(values) < 2:
            return f"{values[0]:.2f}"
        found = estimate(values)
        return f"{found.mean:.2f} ± {found.error:.2f}"

    return (
        f"After {last} steps of training on, the NMI of a copy and its original, 1 at first, is "
        f"{told('nmi', 'copy', 'planted')}; that of other pairs is {told('nmi', 'copy', 'others')}. NMI "
        f"ranks copies above other pairs with probability {told('nmi', 'copy')}, copies with permuted "
        f"neurons with {told('nmi', 'permuted')}, matched first with {told('aligned', 'permuted')}; "
        f"likeness of outputs ranks them with {told('output', 'copy')} and {told('output', 'permuted')} (one "
        f"half is chance)."
    )


SPREADS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2)
"""Relative standard deviations of noise."""


def noise_like_the_paper(draws: int) -> pd.DataFrame:
    """Apply the rule to pure noise, with the experts and the tau of each of the paper's models.

    Returns
    -------
    DataFrame
        ``model``, ``spread``, ``kept`` and ``implied``: the shares that are kept of noise, and by the paper.
    """
    implied = {name: audit.implied_kept(name) for name in paper.TAU}
    noise = demos.paper_noise(implied, [("zero", spread) for spread in SPREADS], draws=draws)
    return noise.assign(kept=noise.kept / noise.experts, implied=noise.implied / noise.experts)


def needed_spreads(noise: pd.DataFrame) -> dict[str, float]:
    """Find the spread at which noise keeps the paper's share, for each model: NaN where none does."""
    return {
        model: spread_that_keeps(own, own.implied.iloc[0])
        for model, own in noise.groupby("model", sort=False)
    }


def threshold_figure(shares: pd.DataFrame, noise: pd.DataFrame, spread: float) -> Figure:
    """Draw what one tau keeps of trained experts, and of noise.

    Parameters
    ----------
    shares : DataFrame
        See :func:`moeits.study.threshold.kept_shares`.
    noise : DataFrame
        See :func:`noise_like_the_paper`.
    spread : float
        Spread of the NMI of shuffled weights.
    """
    fig, (left, right) = plt.subplots(1, 2, figsize=(5.6, 3.8), sharey=True)
    each = shares.groupby(["initialisation", "seed", "tau"]).kept.mean()
    kinds = [kind for kind in COLOUR if kind in set(shares.initialisation)]
    others = [kind for kind in shares.initialisation.unique() if kind not in kinds]
    looks = COLOUR | dict(zip(others, COLOURS[len(COLOUR) :], strict=False))
    for place, kind in enumerate([*kinds, *others]):
        wide = each[kind].unstack("seed")  # noqa: PD010 (one value a cell)
        # Lines that coincide are told apart by their dashes.
        left.plot(wide.index, wide, color=looks.get(kind, "grey"), lw=0.5, alpha=0.5, marker="")
        left.plot(
            wide.index,
            wide.mean(axis=1),
            color=looks.get(kind, "grey"),
            ls=(2 * place, (6, 2 * place)) if place else "-",
            marker="",
            label=kind,
        )
    left.set(xlabel="tau", ylabel="share kept", title="trained experts")
    for colour, (model, own) in zip(COLOURS, noise.groupby("model", sort=False), strict=False):
        right.plot(own.spread, own.kept, color=colour, marker="", label=model)
        right.axhline(own.implied.iloc[0], color=colour, lw=0.8, ls="--")
    right.axvline(spread, color="black", lw=0.8, ls=":")
    right.set(xscale="log", xlabel="spread of the noise", title="pure noise")
    fig.legend(*left.get_legend_handles_labels(), loc="outside lower left", ncols=2, fontsize=7)
    fig.legend(*right.get_legend_handles_labels(), loc="outside lower right", fontsize=7)
    return fig


def shares_table(shares: pd.DataFrame) -> pd.DataFrame:
    """Tabulate the kept share by initialisation and tau: mean over trainings, and half of the interval."""
    from moeits.book.trained_models import over_trainings

    each = shares.groupby(["initialisation", "experts", "tau", "seed"]).kept.mean()
    wide = each.groupby(level=[0, 1, 2]).agg(over_trainings).unstack("tau")  # noqa: PD010
    wide.columns = [f"tau {tau:g}" for tau in wide.columns]
    order = [kind for kind in COLOUR if kind in wide.index.get_level_values(0)]
    rest = [kind for kind in wide.index.get_level_values(0) if kind not in order]
    return wide.loc[[*order, *rest]].reset_index()


def threshold_finding(shares: pd.DataFrame, spreads: Mapping[str, float], spread: float) -> str:
    """Say what one tau keeps, and how much noise it would take to keep the paper's shares."""
    each = shares.pivot_table(index="initialisation", columns="tau", values="kept")
    fixed = [kind for kind in COLOUR if kind in each.index and np.ptp(each.loc[kind]) < 1e-9]
    low, high = each.loc["scratch"].iloc[[0, -1]]
    taus = each.columns
    some = f"{each.loc[fixed[0]].iloc[0]:.2f} of {', '.join(fixed)} experts" if fixed else "no fixed share"
    needed = "; ".join(
        f"{model} {value:.2g}" if np.isfinite(value) else f"{model} none of those tried"
        for model, value in spreads.items()
    )
    return (
        f"Between tau {taus[0]:g} and {taus[-1]:g} the rule keeps {some}, whatever tau is, and from "
        f"{low:.2f} to {high:.2f} of experts from scratch. Of pure noise it would keep the paper's shares at "
        f"a relative spread of {needed}; shuffled weights of the trained experts have {spread:.2g}."
    )
