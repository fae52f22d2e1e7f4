"""What any criterion keeps of a model, loaded or in a folder."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from moeits import criteria, evaluation
from moeits.criteria.base import Layer
from moeits.errors import MoeitsError
from moeits.kept import Kept

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ORACLE_TOKENS = 1024
"""Tokens of calibration text that the oracle's loss is measured on, at most."""


def select_by(
    name: str,
    model: "PreTrainedModel | str | Path",
    *,
    n_keep: int | None = None,
    share: float | None = None,
    uniform: bool = False,
    text: str | Path = "calibration",
    tokens: int = 8192,
    seed: int = 0,
    **options: object,
) -> Kept:
    """Select the experts of a model to keep, by any criterion.

    Parameters
    ----------
    name : str
        A key of :data:`moeits.criteria.CRITERIA`.
    model : PreTrainedModel, str or Path
        A loaded model whose ``name_or_path`` has its tokenizer, a model's folder, or a model of the hub.
    n_keep, share, uniform
        The budget, as in :meth:`moeits.criteria.Criterion.counts`.
    text : str or Path, default="calibration"
        Calibration text, see :func:`moeits.corpus.blocks`.
    tokens : int, default=8192
        Tokens of it to use.
    seed : int, default=0
        Seed of random choices.
    **options
        For a folder, passed on to :func:`moeits.models.folder.load_model`: ``device``, ``dtype``, ...

    Returns
    -------
    Kept
        What ``kept.json`` holds.

    Raises
    ------
    MoeitsError
        If the criterion is unknown or cannot meet the budget.
    """
    from moeits import corpus
    from moeits.criteria.statistics import gather, layers_of, random_tokens
    from moeits.models.families import check_budgets, moe_layers
    from moeits.models.folder import hollow_model, load_model, load_tokenizer, read_config
    from moeits.models.hub import find, name_of
    from moeits.models.safetensors import fingerprint

    criterion = criteria.criterion(name)
    origin = {}
    if isinstance(model, str | Path):
        folder = find(model)
        check_budgets(moe_layers(hollow_model(read_config(folder))), n_keep=n_keep, share=share)
        model = load_model(folder, **options)
        origin = {"fingerprint": fingerprint(folder)}
    blocks = np.empty((0, 0), int)
    if criterion.text == "calibration":
        blocks = corpus.blocks(text, load_tokenizer(model.name_or_path), tokens=tokens)
    read = random_tokens(model, tokens, seed=seed) if criterion.text == "random" else blocks
    layers = layers_of(model, gather(model, read) if read.size else None, seed=seed)
    if criterion.needs_loss:
        blocks = blocks[: max(ORACLE_TOKENS // blocks.shape[1], 1)]

        def loss(number: int, kept: tuple[int, ...]) -> float:
            return float(np.mean(evaluation.pruned_losses(model, {number: kept}, blocks)))

        layers = {number: replace(layer, loss=partial(loss, number)) for number, layer in layers.items()}
    budget = {"n_keep": n_keep} if n_keep is not None else {"share": share}
    scores = {}
    if criterion.score is not None:
        scores = {number: tuple(map(float, criterion.score(layer))) for number, layer in layers.items()}
    return Kept(
        criterion.select(layers, **budget, uniform=uniform),
        {number: layer.experts for number, layer in layers.items()},
        model=name_of(model.name_or_path),
        criterion=name,
        budget={**budget, "calibration_tokens": int(blocks.size), "seed": seed},
        scores=scores,
        **origin,
    )


def select_again(recipe: Kept, *, minimum: int = 1, groups: int = 1, **budget: object) -> Kept:
    """Select by the scores that were measured before, within another budget.

    Parameters
    ----------
    recipe : Kept
        What :func:`select_by` kept, by a criterion that gives scores.
    minimum, groups : int, default=1
        Fewest experts per layer, and groups of the router.
    **budget
        As in :meth:`moeits.criteria.Criterion.counts`.

    Returns
    -------
    Kept
        What :func:`select_by` would keep.

    Raises
    ------
    MoeitsError
        If the recipe has no scores, or the budget cannot be met.
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
    known = criteria.criterion(recipe.criterion)
    known = replace(known, score=lambda layer: np.array(recipe.scores[layer.number]), choose=None)
    kept = known.select(layers, **budget)
    given = {key: value for key, value in budget.items() if key in ("n_keep", "share") and value is not None}
    return replace(recipe, layers=kept, budget={**recipe.budget, **given})
