"""Drawings of the method and of what it works on; each is worked, not sketched."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle, Rectangle

from moeits.book import plain
from moeits.book.figures import COLOURS
from moeits.selection import select_experts
from moeits.study import planted

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


def permuted_neurons(neurons: int = 12, *, seed: int = 0) -> tuple[Figure, pd.DataFrame]:
    """Draw one projection of an expert, and the same expert with its neurons in another order.

    Returns
    -------
    figure : Figure
        Two heat maps; the number at a row's left end is that of the neuron.
    data : DataFrame
        expert; nmi, of all three projections with those of the original, four bins; difference, the largest
        one of their outputs on random tokens, relative to the largest output.
    """
    rng = np.random.default_rng(seed)
    order, bins = rng.permutation(neurons), 4
    block = planted.random_experts(rng, experts=1, neurons=neurons, width=16)
    copies = {"an expert": block, "its neurons in another order": planted.permute(block, 0, order)}
    tokens = rng.standard_normal((32, 16))
    wanted = planted.output(block, 0, tokens)
    figure, axes = plt.subplots(1, 2, figsize=(5.6, 2.6))
    rows = []
    for axis, (name, copy), numbers in zip(axes, copies.items(), (range(neurons), order), strict=True):
        sns.heatmap(copy["up"][0], cmap="cividis", cbar=False, ax=axis, xticklabels=False)
        for row, number in enumerate(numbers):
            shade = plt.get_cmap("Blues")(0.8 * number / neurons)
            axis.add_patch(Rectangle((-1.6, row), 1.3, 1, fc=shade, ec="white", clip_on=False))
            colour = "white" if number > neurons * 0.6 else _INK
            axis.text(-0.95, row + 0.5, number, ha="center", va="center", color=colour, fontsize=8)
        axis.set_yticks([])
        axis.grid(visible=False)
        axis.set_title(name, fontsize=9)
        gap = np.abs(planted.output(copy, 0, tokens) - wanted).max() / np.abs(wanted).max()
        shared = np.mean([plain.nmi(block[part], copy[part], bins) for part in block])
        rows.append({"expert": name, "nmi": shared, "difference": gap})
    axes[0].set_ylabel("neuron", fontsize=9, labelpad=22)
    figure.supxlabel("weights of up", fontsize=9)
    return figure, pd.DataFrame(rows)


def slices_and_copies(slices: int, copies: int, neurons: int = 16) -> tuple[Figure, pd.DataFrame]:
    """Draw a dense FFN that is sliced, and the slices that are copied to make experts.

    Returns
    -------
    figure : Figure
        Left the FFN's hidden neurons, in the middle the slices, right the experts.
    data : DataFrame
        expert, slice, neurons of the FFN (first and last) that it begins with.
    """
    figure, axis = plt.subplots(figsize=(5.6, 2.6))
    axis.set(xlim=(-4, 100), ylim=(-9, 52), aspect="equal")
    axis.set_axis_off()
    size, part = 48 / neurons, neurons // slices

    def box(x: float, low: float, width: float, height: float, which: int, text: object = "") -> None:
        style = {"fc": COLOURS[which], "ec": _INK, "lw": 0.6, "alpha": 0.5}
        axis.add_patch(Rectangle((x, low), width, height, **style))
        axis.text(x + width / 2, low + height / 2, text, ha="center", va="center", fontsize=9)

    for neuron in range(neurons):
        box(4, 48 - size * (neuron + 1), 10, size * 0.85, neuron // part)
    rows = []
    for which in range(slices):
        low, height, letter = 49 - 48 / slices * (which + 1), 48 / slices - 2, "ABCDEFGH"[which]
        box(36, low, 9, height, which, letter)
        for copy in range(copies):
            expert = which + slices * copy
            box(67 + 8 * copy, low, 6.5, height, which, expert)
            rows.append((expert, letter, part * which, part * (which + 1) - 1))
    _arrow(axis, 18, 32, "slice")
    _arrow(axis, 49, 63, "copy")
    for x, text in ((9, "hidden neurons\nof a dense FFN"), (40.5, "slices"), (82, "experts")):
        axis.text(x, -3, text, ha="center", va="top", fontsize=9)
    data = pd.DataFrame(rows, columns=["expert", "slice", "first", "last"])
    return figure, data.sort_values("expert", ignore_index=True)


def router_softmax(
    logits: np.ndarray, top: int, removals: tuple[int | None, ...]
) -> tuple[Figure, pd.DataFrame]:
    """Draw a router's softmax for one token, before and after single experts are removed.

    Parameters
    ----------
    logits : ndarray, shape (E,)
        The router's logits.
    top : int
        Experts that a token uses.
    removals : tuple of int or None
        A panel for each: the expert that is removed, or None.

    Returns
    -------
    figure : Figure
        Bars; those of used experts are full.
    data : DataFrame
        removed, expert, score, used, weight (the score over the sum of the used ones; 0 of the others).
    """
    rows = []
    for removed in removals:
        left = [expert for expert in range(len(logits)) if expert != removed]
        scores = np.exp(logits[left]) / np.exp(logits[left]).sum()
        used = set(np.argsort(-scores, kind="stable")[:top].tolist())
        total = sum(scores[place] for place in used)
        for place, expert in enumerate(left):
            weight = scores[place] / total if place in used else 0.0
            rows.append((removed, expert, scores[place], place in used, weight))
    data = pd.DataFrame(rows, columns=["removed", "expert", "score", "used", "weight"])
    data["removed"] = [f"expert {int(e)} removed" if pd.notna(e) else "all experts" for e in data.removed]
    figure, axes = plt.subplots(1, len(removals), figsize=(5.6, 2.4), sharey=True)
    for axis, (title, part) in zip(axes, data.groupby("removed", sort=False), strict=True):
        sns.barplot(
            part,
            x="expert",
            y="score",
            hue="used",
            order=range(len(logits)),
            dodge=False,
            legend=False,
            palette={True: COLOURS[0], False: "#cccccc"},
            edgecolor=_INK,
            linewidth=0.6,
            ax=axis,
        )
        for row in part.itertuples():
            axis.text(row.expert, row.score + 0.015, f"{row.score:.2f}", ha="center", fontsize=8)
        axis.set_title(title, fontsize=9)
        axis.grid(visible=False)
        axis.set(xlabel="expert", ylabel="score" if axis is axes[0] else "", ylim=(0, 1))
    return figure, data


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
    size, colours = 4.7, plt.get_cmap("cividis")
    for i, j in np.ndindex(R.shape):
        left, low = x + size * j, 12 + size * (5 - i)
        face = "white" if i == j else colours(R[i, j])
        axis.add_patch(Rectangle((left, low), size, size, fc=face, ec="white", lw=1))
        if i != j and not (i in kept and j in kept):
            axis.plot((left, left + size), (low, low + size), color="white", marker="", lw=0.8)
    for expert in range(6):
        style = {"ha": "center", "fontsize": 8, "color": _INK if expert in kept else "#999999"}
        axis.text(x + size * (expert + 0.5), 42, str(expert), **style)
        axis.text(x - 1.6, 12 + size * (5.5 - expert), str(expert), va="center", **style)


def _arrow(axis: Axes, start: float, end: float, text: str) -> None:
    axis.annotate("", (end, 26), (start, 26), arrowprops={"arrowstyle": "-|>", "color": _INK, "lw": 1.4})
    axis.text((start + end) / 2, 28, text, ha="center", va="bottom", fontsize=8)
