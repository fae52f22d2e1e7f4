"""Algorithm 1 as one call."""

from pathlib import Path
from typing import TYPE_CHECKING

from moeits.errors import MoeitsError
from moeits.kept import Simplified

if TYPE_CHECKING:
    from torch import nn

MOEITS = "moeits"


def simplify(
    model: "nn.Module | str | Path",
    *,
    tau: float | None = None,
    n_keep: int | None = None,
    share: float | None = None,
    criterion: str = MOEITS,
    preset: str = "paper",
    at_least: int | None = None,
    at_least_top_k: bool = False,
    text: str | Path = "calibration",
    device: str = "auto",
    dtype: str | None = None,
    n_jobs: int | None = None,
    progress: bool = False,
) -> Simplified:
    """Algorithm 1 without healing: measure NMI, select, prune.

    Parameters
    ----------
    model : torch.nn.Module, str or Path
        A causal language model of transformers, pruned in place; or a checkpoint's folder or a model of the
        hub (``OWNER/NAME`` or ``OWNER/NAME@REVISION``), which stays as it is.
    tau, n_keep, share
        The budget, exactly one of them, as in :func:`moeits.selection.choose`.
    criterion : str, default="moeits"
        What selects: the NMI, or another key of :data:`moeits.criteria.CRITERIA`, which takes no tau.
    preset : {"paper", "official"}, default="paper"
        See :func:`moeits.nmi.preset_weights`.
    at_least : int, optional
        Fewest experts per layer, where the family's minimum is not higher.
    at_least_top_k : bool, default=False
        Keep so many experts in every layer that a token can use as many as before. Otherwise top-k shrinks
        where fewer remain, with a warning.
    text : str or Path, default="calibration"
        Text for a criterion that needs some, see :func:`moeits.corpus.blocks`.
    device : str, default="auto"
        Where a folder's model is loaded, see :func:`moeits.machine.devices.choose`.
    dtype : str, optional
        Type in which it is loaded, and saved later; the stored one by default.
    n_jobs : int, optional
        Threads of the NMI; all cores by default.
    progress : bool, default=False
        Show a progress bar over the layers.

    Returns
    -------
    Simplified
        The pruned model, the kept experts and the NMI; :func:`moeits.save_model` takes it.

    Raises
    ------
    MoeitsError
        If the budget is impossible, or preset, criterion, device or dtype are unknown.

    References
    ----------
    Algorithm 1 of arXiv 2604.10603.
    """
    from tqdm import tqdm

    from moeits.criteria.folder import select_by
    from moeits.machine import devices
    from moeits.models.families import check_budgets, expert_block, moe_layers
    from moeits.models.folder import load_model
    from moeits.models.hub import name_of
    from moeits.models.surgery import prune_model
    from moeits.nmi import PRESETS, nmi_matrix, preset_weights
    from moeits.selection import choose

    if preset not in PRESETS:
        raise MoeitsError(f"no preset {preset!r}: there are {', '.join(PRESETS)}")
    if isinstance(model, str | Path):
        chosen, number, _ = devices.choose(device, dtype or "float32")
        model = load_model(model, device=chosen, **({} if dtype is None else {"dtype": number}))
    layers = moe_layers(model)
    check_budgets(layers, tau=tau, n_keep=n_keep, share=share)
    if criterion != MOEITS:
        if tau is not None or at_least is not None or at_least_top_k:
            raise MoeitsError(f"{criterion!r} takes n_keep or share; tau and at_least belong to {MOEITS!r}")
        kept = select_by(criterion, model, text=text, n_keep=n_keep, share=share)
        return Simplified(prune_model(model, kept), kept)
    weights = preset_weights(preset, model.config.model_type)
    # Line 2: the NMI of the experts (equations 4 to 11).
    matrices = {
        layer.layer: nmi_matrix(expert_block(layer), projection_weights=weights, n_jobs=n_jobs)
        for layer in tqdm(layers, "NMI", unit="layer", disable=not progress)
    }
    made_by = {
        "model": name_of(model.name_or_path),
        "preset": preset,
        "minimum": max(layer.least_for_top_k if at_least_top_k else layer.minimum for layer in layers),
        "groups": max(layer.groups for layer in layers),
    }
    # Line 3: Algorithm 2, which is Algorithm 3 in every layer. Line 4: the weights. Line 5: moeits.healing.
    _, kept = choose(matrices, made_by, at_least=at_least, tau=tau, n_keep=n_keep, share=share)
    return Simplified(prune_model(model, kept), kept, matrices)
