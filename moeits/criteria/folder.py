"""What any criterion keeps of a checkpoint."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from moeits import criteria, evaluation
from moeits.errors import MoeitsError
from moeits.kept import Kept
from moeits.selection import equal_count

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ORACLE_TOKENS = 1024
"""Tokens of calibration text that the oracle's loss is measured on, at most."""


def select_from_folder(
    folder: str | Path,
    name: str,
    *,
    text: str | Path = "calibration",
    tokens: int = 8192,
    seed: int = 0,
    n_keep: int | None = None,
    share: float | None = None,
    **options: object,
) -> Kept:
    """Select the experts of a checkpoint to keep, by any criterion.

    Parameters
    ----------
    folder : str or Path
        Folder of a model, or one of the hub, with its tokenizer where the criterion needs text.
    name, text, tokens, seed, n_keep, share
        As :func:`select_from_model`.
    **options
        Passed on to :func:`moeits.models.folder.load_model`: ``device``, ``dtype``, ...

    Returns
    -------
    Kept
        What ``kept.json`` holds.

    Raises
    ------
    MoeitsError
        See :func:`moeits.criteria.select`.
    """
    from moeits.models.families import check_budgets, moe_layers
    from moeits.models.folder import hollow_model, load_model, read_config
    from moeits.models.hub import find, name_of
    from moeits.models.safetensors import fingerprint

    _check(name)
    folder = find(folder)
    budget = {"n_keep": n_keep, "share": share}
    check_budgets(moe_layers(hollow_model(read_config(folder))), **budget)
    model = load_model(folder, **options)
    kept = select_from_model(model, name, text=text, tokens=tokens, seed=seed, **budget)
    return replace(kept, model=name_of(folder), fingerprint=fingerprint(folder))


def _check(name: str) -> criteria.Criterion:
    criterion = criteria.criterion(name)
    if criterion.score is None and criterion.choose is None:
        raise MoeitsError(f"{criterion.title} chooses no experts: nothing to write into a kept.json")
    return criterion


def select_from_model(
    model: "PreTrainedModel",
    name: str,
    *,
    text: str | Path = "calibration",
    tokens: int = 8192,
    seed: int = 0,
    n_keep: int | None = None,
    share: float | None = None,
    uniform: bool = False,
) -> Kept:
    """Select the experts of a loaded model to keep, by any criterion.

    Parameters
    ----------
    model : PreTrainedModel
        A model whose ``name_or_path`` has its tokenizer, where the criterion needs text.
    name : str
        A key of :data:`moeits.criteria.CRITERIA`.
    text : str or Path, default="calibration"
        Calibration text, see :func:`moeits.corpus.blocks`.
    tokens : int, default=8192
        Tokens of it to use.
    seed : int, default=0
        Seed of random choices.
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
    from moeits.models.folder import load_tokenizer
    from moeits.models.hub import name_of

    criterion = _check(name)
    statistics, probe, used = None, None, 0
    if criterion.needs_calibration:
        blocks = corpus.blocks(text, load_tokenizer(model.name_or_path), tokens=tokens)
        statistics, used = gather(model, blocks), int(blocks.size)
    if criterion.needs_probe:
        probe = gather(model, random_tokens(model, tokens, seed=seed))
    layers = layers_of(model, statistics, probe=probe, seed=seed)
    if criterion.needs_loss:
        asked = blocks[: max(ORACLE_TOKENS // blocks.shape[1], 1)]
        used = int(asked.size)
        layers = {
            number: replace(
                layer,
                loss=lambda kept, number=number: float(
                    np.mean(evaluation.pruned_losses(model, {number: kept}, asked))
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
        model=name_of(model.name_or_path),
        criterion=name,
        budget={**budget, "calibration_tokens": used, "seed": seed},
    )
