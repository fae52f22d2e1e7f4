"""Figures and tables of the page on healing trained experts."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from moeits.book.figures import MARKERS
from moeits.book.trained_selection import COLOUR
from moeits.evaluation.statistics import Estimate, estimate

NAMES = {"unpruned": "unpruned", "moeits": "MoEITS", "reap": "REAP", "random": "random halves"}
"""Names of what is healed, as the book writes them."""

_MARGIN = 0.1  # of what random halves cost before healing: a difference within it counts as none


def costs_figure(table: pd.DataFrame) -> Figure:
    """Draw what pruning half of the experts costs, before and after healing.

    Parameters
    ----------
    table : DataFrame
        See :func:`moeits.study.healed.differences`.

    Returns
    -------
    Figure
        A panel for each initialisation; lines join the same training before and after healing.
    """
    kinds = [kind for kind in COLOUR if kind in set(table.initialisation)]
    fig, axes = plt.subplots(1, len(kinds), figsize=(5.6, 3), squeeze=False)
    for axis, kind in zip(axes[0], kinds, strict=True):
        own = table[(table.initialisation == kind) & (table.method != "unpruned")]
        for place, method in enumerate(("random", "reap", "moeits")):
            wide = own[own.method == method].pivot_table("cost", "seed", "healed")  # before, after
            at = place + np.array([-0.15, 0.15])
            axis.plot(at, wide.to_numpy().T, color=COLOUR[kind], lw=0.6, alpha=0.5, marker="")
            axis.plot(at, wide.mean(), color=COLOUR[kind], marker=MARKERS[place], ms=6)
        axis.axhline(0, color="black", lw=0.8)
        axis.set_xticks(range(3), ["random", "REAP", "MoEITS"])
        axis.set(title=kind)
    axes[0, 0].set_ylabel("cost of pruning, bits per byte")
    return fig


def costs_table(table: pd.DataFrame) -> pd.DataFrame:
    """Tabulate cost and difference to random halves before and after healing, mean ± error over trainings."""
    rows = []
    for (kind, method), part in table[table.method != "unpruned"].groupby(
        ["initialisation", "method"], sort=False
    ):
        line = {"initialisation": kind, "kept": NAMES[method]}
        for healed, state in ((False, "pruned"), (True, "healed")):
            own = part[part.healed == healed]
            line[f"cost, {state}"] = _told(own.cost)
            if method != "random":
                found = against_random(table, kind, method, healed=healed)
                line[f"minus random, {state}"] = f"{found.mean:+.4f} ± {found.error:.4f}, {found.verdict}"
        rows.append(line)
    return pd.DataFrame(rows).fillna("")


def against_random(table: pd.DataFrame, kind: str, method: str, *, healed: bool) -> Estimate:
    """Estimate a method minus random halves in the same state; within a tenth of their cost is equivalent."""
    own = table[(table.initialisation == kind) & (table.healed == healed)]
    damage = table[(table.initialisation == kind) & (table.method == "random") & ~table.healed].cost.mean()
    return estimate(own[own.method == method].from_random.to_numpy(), _MARGIN * damage)


def finding(table: pd.DataFrame) -> str:
    """Say what healing makes of the choice, in a sentence for each initialisation."""
    told = []
    for kind in [kind for kind in COLOUR if kind in set(table.initialisation)]:
        own = table[table.initialisation == kind]
        cost = own[own.method == "random"].groupby("healed").cost.mean()
        before, after = (against_random(table, kind, "moeits", healed=healed) for healed in (False, True))
        begin = "upcycled" if kind == "upcycled" else "trained from scratch"
        told.append(
            f"Where experts are {begin}, healing takes the cost of a random half from {cost[False]:.3f} to "
            f"{cost[True]:.3f} bits per byte; MoEITS's half is {_against(before.verdict)} before healing "
            f"({before.mean:+.4f} ± {before.error:.4f}) and {_against(after.verdict)} after it "
            f"({after.mean:+.4f} ± {after.error:.4f})."
        )
    return " ".join(told)


def _against(verdict: str) -> str:
    if verdict in ("better", "worse"):
        return f"{verdict} than random halves"
    return {"equivalent": "equivalent to random halves"}.get(verdict, "not told apart from random halves")


def _told(values: pd.Series) -> str:
    found = estimate(values.to_numpy())
    return f"{found.mean:.4f} ± {found.error:.4f}"
