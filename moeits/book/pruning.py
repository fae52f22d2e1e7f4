"""Figures and tables of the pages that prune a model: its experts, and its answers before and after."""

from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from moeits import evaluation
from moeits.book.figures import COLOURS
from moeits.study.records import Record

FORMATS = dict.fromkeys(["before", "± before", "after", "± after", "± difference"], ".3f") | {
    "difference": "+.3f",
    "chance": ".2f",
}


def pairs(R: Mapping[int, np.ndarray]) -> pd.DataFrame:
    """Tabulate the NMI of every pair of experts, from the matrices of the layers."""
    return pd.DataFrame(
        {"layer": layer, "expert_i": i, "expert_j": j, "nmi": R[layer][i, j]}
        for layer in sorted(R)
        for i, j in zip(*np.triu_indices(len(R[layer]), 1), strict=True)
    )


def nmi_figure(R: Mapping[int, np.ndarray]) -> Figure:
    """Draw the NMI matrices of the first, the middle and the last layer on one scale."""
    layers = sorted(R)
    shown = [layers[0], layers[len(layers) // 2], layers[-1]]
    blank = [np.where(np.eye(len(R[layer])), np.nan, R[layer]) for layer in shown]
    fig, axes = plt.subplots(1, len(shown), figsize=(5.6, 2.3), sharey=True)
    for axis, layer, values in zip(axes, shown, blank, strict=True):
        image = axis.imshow(values, vmin=np.nanmin(blank), vmax=np.nanmax(blank))
        axis.set(title=f"layer {layer}", xlabel="expert")
        axis.grid(visible=False)
    axes[0].set_ylabel("expert")
    fig.colorbar(image, ax=axes, label="NMI", shrink=0.8)
    return fig


def kept_figure(grid: pd.DataFrame) -> Figure:
    """Draw which experts are kept, and how many in each layer.

    Parameters
    ----------
    grid : DataFrame of bool
        A row for each layer, a column for each expert.
    """
    layers = grid.index
    fig, (axis, side) = plt.subplots(1, 2, figsize=(5.6, 3.6), sharey=True, width_ratios=[3, 1])
    edges = np.arange(grid.shape[1] + 1) - 0.5, np.array([*layers, layers[-1] + 1]) - 0.5
    axis.pcolormesh(*edges, grid, cmap="Blues", vmax=1.3)
    axis.set(xlabel="expert", ylabel="decoder layer")
    axis.grid(visible=False)
    axis.yaxis.get_major_locator().set_params(integer=True)
    axis.invert_yaxis()
    side.barh(layers, grid.sum(axis=1), color=COLOURS[0])
    side.set(xlabel="experts kept", xlim=(0, grid.shape[1]))
    return fig


def scores(unpruned: Record, pruned: Record) -> pd.DataFrame:
    """Pair the answers of a model before and after pruning, question by question.

    Parameters
    ----------
    unpruned, pruned : Record
        Of :meth:`moeits.study.pipeline.Study.scores`. At another tau than the model's own the profile may ask
        fewer of the same questions; those that both answered count.

    Returns
    -------
    DataFrame
        A row per task and measure: task, measure, before, after and difference with a standard error each,
        verdict, chance, n.
    """
    after = pd.DataFrame(pruned.details["items"])
    before = pd.DataFrame(unpruned.details["items"]).merge(after[["task", "question"]])
    keys = ["task", "variant"]
    one, two = (evaluation.summarise(items).set_index(keys) for items in (before, after))
    paired = evaluation.compare(before, after).set_index(keys)
    table = pd.DataFrame(
        {
            "task": [title(task) for task, _ in paired.index],
            "measure": [variant.replace("_", " ") for _, variant in paired.index],
            "before": one.value[paired.index].to_numpy(),
            "± before": one.stderr[paired.index].to_numpy(),
            "after": two.value[paired.index].to_numpy(),
            "± after": two.stderr[paired.index].to_numpy(),
            "difference": paired.difference.to_numpy(),
            "± difference": paired.stderr.to_numpy(),
            "verdict": paired.verdict.to_numpy(),
            "chance": one.chance[paired.index].to_numpy(),
            "n": one.n[paired.index].astype(int).to_numpy(),
        }
    )
    return table


def title(task: str) -> str:
    """Name of a task in prose."""
    return evaluation.KNOWN[task].title if task in evaluation.KNOWN else task
