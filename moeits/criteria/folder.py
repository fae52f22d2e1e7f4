"""What any criterion keeps of a checkpoint."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from moeits import criteria, evaluation
from moeits.criteria.base import Layer, Score, Spread, across_layers, whole_groups
from moeits.criteria.base import uniform as uniform_counts
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
    uniform: bool = False,
    **options: object,
) -> Kept:
    """Select the experts of a checkpoint to keep, by any criterion.

    Parameters
    ----------
    folder : str or Path
        Folder of a model, or one of the hub, with its tokenizer where the criterion needs text.
    name, text, tokens, seed, n_keep, share, uniform
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
    kept = select_from_model(model, name, text=text, tokens=tokens, seed=seed, uniform=uniform, **budget)
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
    scores = {}
    if criterion.score is not None and _spread_by(criterion) is not None:
        scores = {number: tuple(map(float, criterion.score(layer))) for number, layer in layers.items()}
    return Kept(
        _within(criterion, layers, n_keep, share, uniform),
        {number: layer.experts for number, layer in layers.items()},
        model=name_of(model.name_or_path),
        criterion=name,
        budget={**budget, "calibration_tokens": used, "seed": seed},
        scores=scores,
    )


def select_again(
    recipe: Kept,
    *,
    n_keep: int | None = None,
    share: float | None = None,
    uniform: bool = False,
    minimum: int = 1,
    groups: int = 1,
) -> Kept:
    """Choose by the scores that were measured before, within another budget.

    Parameters
    ----------
    recipe : Kept
        What :func:`select_from_folder` chose, by a criterion that gives scores.
    n_keep, share
        The budget, one of them.
    uniform : bool, default=False
        Keep equally many experts in every layer.
    minimum, groups : int, default=1
        Fewest experts per layer, and groups of the router.

    Returns
    -------
    Kept
        What :func:`select_from_folder` would choose.

    Raises
    ------
    MoeitsError
        If the recipe has no scores.
    """
    if set(recipe.scores) != set(recipe.layers):
        raise MoeitsError(
            f"there are no scores of {recipe.criterion!r} to choose by: select again with --criterion, where "
            "it has some, or for the NMI give --nmi"
        )
    layers = {
        number: Layer(number, {"down": scores}, np.zeros((len(scores), 1)), minimum=minimum, groups=groups)
        for number, scores in recipe.scores.items()
    }
    found = criteria.criterion(recipe.criterion)

    def score(layer: Layer) -> np.ndarray:
        return np.array(recipe.scores[layer.number])

    again = replace(found, score=score, choose=None, spread=_spread_by(found)(score))
    budget = {"n_keep": n_keep} if n_keep is not None else {"share": share}
    kept = _within(again, layers, n_keep, share, uniform)
    return replace(recipe, layers=kept, budget={**recipe.budget, **budget})


def _spread_by(criterion: criteria.Criterion) -> Callable[[Score], Spread] | None:
    """How a criterion spreads a share by scores; None where it does so by something else."""
    if criterion.spread is uniform_counts:
        return lambda _: uniform_counts
    is_global = getattr(criterion.spread, "func", None) is across_layers
    return (lambda score: partial(across_layers, score=score)) if is_global else None


def _within(
    criterion: criteria.Criterion,
    layers: Mapping[int, Layer],
    n_keep: int | None,
    share: float | None,
    uniform: bool,
) -> dict[int, tuple[int, ...]]:
    """Choose within a budget; if it is uniform, equally many experts in every layer."""
    if uniform and n_keep is None:
        first, experts = next(iter(layers.values())), [layer.experts for layer in layers.values()]
        n_keep = equal_count(share, experts, first.groups, first.minimum)
    counts = (
        dict.fromkeys(layers, n_keep)
        if n_keep is not None
        else whole_groups(criterion.spread(layers, share), layers)
    )
    return {number: criterion.keep(layer, counts[number]) for number, layer in layers.items()}
