"""The method in one drawing: our own version of the paper's Figure 1."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle, Rectangle

from moeits.book.figures import COLOURS
from moeits.selection import select_experts

_INK = "#333333"


def method_diagram() -> tuple[Figure, pd.DataFrame]:
    """Draw measure, select and prune on a layer of six experts, and where healing follows.

    The example is worked, not sketched: Algorithm 3 removes the same experts from the matrix.

    Returns
    -------
    figure : Figure
        The drawing.
    data : DataFrame
        The matrix, a row for each pair, and whether both experts are kept.
    """
    R = np.full((6, 6), 0.2)
    for (i, j), value in {(0, 3): 0.9, (1, 4): 0.8, (0, 4): 0.35, (3, 5): 0.4}.items():
        R[i, j] = R[j, i] = value
    kept = select_experts(R, n_keep=4).kept
    figure, axis = plt.subplots(figsize=(5.6, 2.9))
    axis.set(xlim=(-1, 117), ylim=(-6, 56), aspect="equal")
    axis.set_axis_off()
    _layer(axis, 0, range(6), ())
    _matrix(axis, 40, R, kept)
    _layer(axis, 83, kept, set(range(6)) - set(kept))
    _arrow(axis, 25, 34, "measure\nNMI")
    _arrow(axis, 71, 80, "select,\nprune")
    _arrow(axis, 108, 116, "heal")
    for x, text in ((11, "all experts"), (54, "redundancy of pairs"), (94, "kept experts")):
        axis.text(x, -4, text, ha="center", fontsize=9)
    pairs = [
        {"expert": i, "other": j, "nmi": R[i, j], "both_kept": i in kept and j in kept}
        for i in range(6)
        for j in range(i + 1, 6)
    ]
    return figure, pd.DataFrame(pairs)


def _layer(axis: Axes, x: float, experts: object, gone: object) -> None:
    """Draw a router, kept and removed experts, and the sum of their outputs."""
    axis.add_patch(Rectangle((x + 4, 2), 14, 6, fc="white", ec=_INK))
    axis.text(x + 11, 5, "router", ha="center", va="center", fontsize=8)
    axis.add_patch(Circle((x + 11, 48), 2.4, fc="white", ec=_INK))
    axis.text(x + 11, 48, "+", ha="center", va="center", fontsize=9)
    for expert in sorted([*experts, *gone]):
        left, there = x + 3.7 * expert, expert not in gone
        style = {"fc": COLOURS[5], "ec": _INK} if there else {"fc": "white", "ec": "#999999", "ls": ":"}
        axis.add_patch(Rectangle((left, 18), 3.1, 18, **style))
        colour = _INK if there else "#777777"
        axis.text(left + 1.55, 27, str(expert), ha="center", va="center", fontsize=8, color=colour)
    for low, high in ((8, 17), (37, 45.6)):
        axis.annotate(
            "", (x + 11, high), (x + 11, low), arrowprops={"arrowstyle": "-|>", "color": _INK, "lw": 1}
        )


def _matrix(axis: Axes, x: float, R: np.ndarray, kept: object) -> None:
    size = 4.7
    colours = plt.get_cmap("cividis")
    for i, j in np.ndindex(R.shape):
        corner = (x + size * j, 12 + size * (5 - i))
        face = "white" if i == j else colours(R[i, j])
        axis.add_patch(Rectangle(corner, size, size, fc=face, ec="white", lw=1))
        if i != j and not (i in kept and j in kept):
            axis.plot(
                *zip(corner, (corner[0] + size, corner[1] + size), strict=True),
                color="white",
                marker="",
                lw=0.8,
            )
    for expert in range(6):
        colour = _INK if expert in kept else "#999999"
        axis.text(x + size * (expert + 0.5), 42, str(expert), ha="center", fontsize=8, color=colour)
        axis.text(
            x - 1.6,
            12 + size * (5.5 - expert),
            str(expert),
            ha="center",
            va="center",
            fontsize=8,
            color=colour,
        )


def _arrow(axis: Axes, start: float, end: float, text: str) -> None:
    axis.annotate("", (end, 26), (start, 26), arrowprops={"arrowstyle": "-|>", "color": _INK, "lw": 1.4})
    axis.text((start + end) / 2, 28, text, ha="center", va="bottom", fontsize=8)
