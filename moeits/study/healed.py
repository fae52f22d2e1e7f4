"""What healing leaves of a selection, on trained experts: pruned models of the matched set, healed by LoRA.

Every training's model is pruned to half of its experts, by two criteria and at random, and healed; the
unpruned model is healed in the same way, as the control that tells healing from further training. The
pruning is that of the selection's records (:mod:`moeits.study.trials`). Exploratory: not registered.
"""

import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from joblib import Parallel, delayed

from moeits.healing.recipe import Recipe
from moeits.study.measurement import Measurement
from moeits.study.records import Record, row

STEP = "healed"
KINDS = ("scratch", "upcycled")
METHODS = ("moeits", "reap")


def _recipe() -> Recipe:
    # The shape of the paper's recipe: cosine schedule, NEFTune, LoRA on experts and router. Scaled to the
    # models: a twelfth of their width as rank, sequences as long as those that they were trained on. The
    # learning rate is the best of three on mini-deepseek, which is no part of the matched set.
    return Recipe(
        rank=8,
        learning_rate=3e-3,
        batch_size=8,
        accumulation=1,
        steps=100,
        max_tokens=256,
        save_every=100,
    )


@dataclass(frozen=True)
class Sizes:
    """How much is measured of each training.

    Attributes
    ----------
    documents : int
        Held-out documents of each domain.
    context : int
        Tokens that are read of each.
    subsets : int
        Random halves.
    recipe : Recipe
        How all are healed.
    """

    documents: int = 30
    context: int = 256
    subsets: int = 2
    recipe: Recipe = field(default_factory=_recipe)


def measure(name: str, *, sizes: Sizes | None = None, folder: Path | None = None) -> Record:
    """Heal one training's pruned models, or read the record.

    Parameters
    ----------
    name : str
        Such as ``"upcycled-3"``; its selection must have been measured.
    sizes : Sizes, optional
        How much is measured.
    folder : Path, optional
        Folder of the records; that of the study by default.

    Returns
    -------
    Record
        Found by weights, text and sizes. Rows: bits per byte of every state. Details: ``bytes`` and
        ``domain`` of the documents; ``states``, for each the method, whether it was healed, and the bits of
        each document.

    Raises
    ------
    MissingError
        If the model has not been trained.
    """
    return measurement(name, sizes=sizes, folder=folder).answer()


def measurement(name: str, *, sizes: Sizes | None = None, folder: Path | None = None) -> Measurement:
    """Make the measurement of :func:`measure`."""
    from moeits.study import anatomy, corpus, trained, trials

    sizes = sizes or Sizes()
    text = corpus.load("heldout")
    inputs = {
        "model": name,
        "weights": trained.weights_digest(trained.finished_folder(name)),
        "text": corpus.text_digest(text),
        "healing text": corpus.text_digest(corpus.load("healing")),
        "sizes": {**asdict(sizes), "recipe": sizes.recipe.model_dump()},
    }

    def run() -> tuple[list[dict[str, Any]], dict[str, Any]]:
        chosen = trials.measure(name).details["budgets"]["half"]["methods"]
        kept = {method: chosen[method]["kept"] for method in METHODS}
        read = anatomy.sample(text, sizes.documents, sizes.context, anatomy.token_bytes())
        return _heal_all(name, kept, read, sizes)

    how = {"device": "cpu", "dtype": "float32"}
    return Measurement(folder or anatomy.RECORDS, STEP, inputs, run, provenance=how)


def _heal_all(
    name: str, kept: dict[str, list[list[int]]], read: Any, sizes: Sizes
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Measure every state before and after healing: see :func:`measure`."""
    import torch

    from moeits.evaluation import ratio
    from moeits.healing.lora import train_model
    from moeits.models.families import moe_layers
    from moeits.models.folder import load_tokenizer
    from moeits.models.surgery import prune_model
    from moeits.study import anatomy, trained, trials

    torch.set_num_threads(1)
    seed = trained.find(name).seed
    layers = moe_layers(trained.load(name))
    counts = [len(one) for one in kept[METHODS[0]]]
    random = np.random.default_rng([seed, sizes.subsets])
    drawn = [trials.random_subset(counts, layers[0].num_experts, random) for _ in range(sizes.subsets)]
    states = {"unpruned": None, **kept, **{f"random {i}": one for i, one in enumerate(drawn)}}
    tokenizer = load_tokenizer(trained.finished_folder(name))
    data = healing_blocks(sizes.recipe, seed)
    rows, details = [], {"bytes": read.size.tolist(), "domain": read.domain.tolist(), "states": []}
    for method, experts in states.items():
        model = trained.load(name)
        if experts is not None:
            model = prune_model(model, dict(zip([of.layer for of in layers], experts, strict=True)))
        for healed in (False, True):
            if healed:
                with tempfile.TemporaryDirectory() as work:
                    train_model(model, tokenizer, sizes.recipe, Path(work) / "training", data=data)
            bits = anatomy.losses(model, read)
            value, stderr = ratio(bits, read.size)
            state = {"method": method, "healed": healed, "bits": trials.rounded(bits)}
            details["states"].append(state)
            rows.append(
                row(
                    model=name,
                    method=method,
                    kept_share=1.0
                    if experts is None
                    else sum(counts) / (layers[0].num_experts * len(counts)),
                    task="held-out text",
                    metric="bits per byte",
                    variant="healed" if healed else "pruned",
                    value=value,
                    stderr=stderr,
                    n=len(bits),
                    unit="bits per byte",
                    higher_is_better=False,
                )
            )
    return rows, details


def healing_blocks(recipe: Recipe, seed: int) -> list[Any]:
    """Shuffle the blocks of the healing text; as many as the recipe's steps read."""
    import torch

    from moeits.study import corpus

    ids = corpus.load("healing").ids
    blocks = ids[: ids.size // recipe.max_tokens * recipe.max_tokens].reshape(-1, recipe.max_tokens)
    order = np.random.default_rng(seed).permutation(len(blocks))
    wanted = recipe.steps * recipe.batch_size * recipe.accumulation
    return list(torch.from_numpy(blocks[order[:wanted]].astype(np.int64)))


def measure_all(names: Sequence[str] = (), *, jobs: int = 1) -> list[Record]:
    """Measure finished trainings of :data:`KINDS` that have no record yet; all of them without `names`."""
    from moeits.study.trials import matched

    ready = [name for name in matched(names) if name.rpartition("-")[0] in KINDS]
    return Parallel(n_jobs=jobs)(delayed(measure)(name) for name in ready)


def differences(records: Iterable[Record]) -> pd.DataFrame:
    """Tabulate what each state costs, before and after healing.

    Parameters
    ----------
    records : iterable of Record
        Of the step `STEP`.

    Returns
    -------
    DataFrame
        One row for each training, method and state: ``initialisation``, ``seed``, ``method`` ("random" is the
        mean over the subsets), ``healed``; in bits per byte ``cost`` (minus the unpruned model in the same
        state, healed or not), ``from_random`` (minus the mean of the random halves in the same state), and
        ``gained`` (the unpruned and unhealed model minus this one).
    """
    rows = []
    for record in records:
        kind, _, seed = record.inputs["model"].rpartition("-")
        size = sum(record.details["bytes"])
        bits = {(one["method"], one["healed"]): sum(one["bits"]) / size for one in record.details["states"]}
        for healed in (False, True):
            drawn = [
                value for (method, at), value in bits.items() if method.startswith("random") and at == healed
            ]
            mean = {method: bits[method, healed] for method in ("unpruned", *METHODS)} | {
                "random": np.mean(drawn)
            }
            rows += [
                {
                    "initialisation": kind,
                    "seed": int(seed),
                    "method": method,
                    "healed": healed,
                    "cost": value - mean["unpruned"],
                    "from_random": value - mean["random"],
                    "gained": bits["unpruned", False] - value,
                }
                for method, value in mean.items()
            ]
    return pd.DataFrame(rows)
