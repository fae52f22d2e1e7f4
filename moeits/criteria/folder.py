"""What any criterion keeps of a checkpoint."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from moeits import criteria, evaluation
from moeits.errors import MoeitsError
from moeits.kept import Kept
from moeits.selection import equal_count

ORACLE_TOKENS = 1024
"""Tokens of calibration text that the oracle's loss is measured on, at most."""


def select_from_folder(
    folder: str | Path,
    name: str,
    *,
    tokens: int = 8192,
    seed: int = 0,
    n_keep: int | None = None,
    share: float | None = None,
    uniform: bool = False,
) -> Kept:
    """Choose the experts of a checkpoint that stay, by any criterion.

    Parameters
    ----------
    folder : str or Path
        Folder of a model, with its tokenizer where the criterion needs calibration text.
    name : str
        A criterion.
    tokens : int
        Tokens of the packaged calibration text.
    seed : int
        Of random choices.
    n_keep, share
        The budget, one of them.
    uniform : bool, default=False
        Keep equally many experts in every layer, whatever the criterion's own spread.

    Returns
    -------
    Kept
        What ``kept.json`` holds.

    Raises
    ------
    MoeitsError
        See :func:`moeits.criteria.select`.
    """
    from moeits import corpus
    from moeits.criteria.statistics import gather, layers_of, random_tokens
    from moeits.models.families import check_budgets, moe_layers
    from moeits.models.folder import hollow_model, load_model, load_tokenizer, read_config
    from moeits.models.safetensors import fingerprint

    criterion = criteria.criterion(name)
    if criterion.score is None and criterion.choose is None:
        raise MoeitsError(f"{criterion.title} chooses no experts: nothing to write into a kept.json")
    check_budgets(moe_layers(hollow_model(read_config(folder))), n_keep=n_keep, share=share)
    model = load_model(folder)
    statistics, probe, used = None, None, 0
    if criterion.needs_calibration:
        blocks = corpus.blocks("calibration", load_tokenizer(folder), tokens=tokens)
        statistics, used = gather(model, blocks), int(blocks.size)
    if criterion.needs_probe:
        probe = gather(model, random_tokens(model, tokens, seed=seed))
    layers = layers_of(model, statistics, probe=probe, seed=seed)
    if criterion.needs_loss:
        text = blocks[: max(ORACLE_TOKENS // blocks.shape[1], 1)]
        used = int(text.size)
        layers = {
            number: replace(
                layer,
                loss=lambda kept, number=number: float(
                    np.mean(evaluation.pruned_losses(model, {number: kept}, text))
                ),
            )
            for number, layer in layers.items()
        }
    budget = {"n_keep": n_keep} if n_keep is not None else {"share": share}
    if uniform and n_keep is None:
        first, experts = next(iter(layers.values())), [layer.experts for layer in layers.values()]
        n_keep = equal_count(share, experts, first.groups, first.minimum)
    return Kept(
        criteria.select(name, layers, **({"share": share} if n_keep is None else {"n_keep": n_keep})),
        {number: layer.experts for number, layer in layers.items()},
        model=Path(folder).name,
        fingerprint=fingerprint(folder),
        criterion=name,
        budget={**budget, "calibration_tokens": used, "seed": seed},
    )
