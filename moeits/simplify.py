"""Algorithm 1 as one call."""

from pathlib import Path
from typing import TYPE_CHECKING

from moeits.errors import MoeitsError

if TYPE_CHECKING:
    from torch import nn


def simplify(
    model: "nn.Module | str | Path",
    *,
    tau: float | None = None,
    n_keep: int | None = None,
    share: float | None = None,
    preset: str = "paper",
    at_least: int | None = None,
    at_least_top_k: bool = False,
    n_jobs: int | None = None,
) -> "nn.Module":
    """Algorithm 1 without healing: measure NMI, select, cut the model.

    Parameters
    ----------
    model : torch.nn.Module, str or Path
        A causal language model of transformers, changed in place, or the folder of one, which stays as it is.
    tau, n_keep, share
        The budget, exactly one of them, as in :func:`moeits.selection.select_layers`.
    preset : {"paper", "official"}
        See :data:`moeits.nmi.PRESETS`.
    at_least : int, optional
        Fewest experts per layer, where the family's minimum is not higher.
    at_least_top_k : bool, default=False
        Keep so many experts in every layer that a token can use as many as before. Otherwise top-k shrinks
        where fewer remain, with a warning.
    n_jobs : int, optional
        Threads of the NMI; all cores by default.

    Returns
    -------
    torch.nn.Module
        The smaller model.

    References
    ----------
    Algorithm 1 of arXiv 2604.10603.
    """
    from moeits.models.families import check_budgets, expert_block, moe_layers
    from moeits.models.folder import load_model
    from moeits.models.surgery import prune_model
    from moeits.nmi import PRESETS, nmi_matrix
    from moeits.selection import choose

    if isinstance(model, str | Path):
        model = load_model(model)
    layers = moe_layers(model)
    if preset not in PRESETS:
        raise MoeitsError(f"no preset {preset!r}: there are {', '.join(PRESETS)}")
    check_budgets(layers, tau=tau, n_keep=n_keep, share=share)
    chosen = PRESETS[preset]
    weights = chosen.projection_weights(model.config.model_type)
    matrices = {
        layer.layer: nmi_matrix(
            expert_block(layer), bins=chosen.bins, projection_weights=weights, n_jobs=n_jobs
        )
        for layer in layers
    }
    made_by = {
        "model": Path(model.name_or_path).name,
        "preset": preset,
        "diagonal": chosen.diagonal,
        "minimum": max(layer.least_for_top_k if at_least_top_k else layer.minimum for layer in layers),
        "groups": max(layer.groups for layer in layers),
    }
    _, kept = choose(matrices, made_by, at_least=at_least, tau=tau, n_keep=n_keep, share=share)
    return prune_model(model, kept)
