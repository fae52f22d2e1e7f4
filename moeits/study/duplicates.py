"""How long copies of experts can be told: planted in a trained model, then trained on.

In models trained from scratch some experts of every layer are replaced by copies of others, half of them with
their hidden neurons in another order. The copy's router row is that of the original plus noise, since equal
rows would tie and the two experts never part. Then training goes on, on text that the model has not read.
Exploratory: registered is none of it.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from joblib import Parallel, delayed
from scipy.stats import rankdata

from moeits.selection import select_experts
from moeits.study import relatedness
from moeits.study.measurement import Measurement
from moeits.study.records import Record
from moeits.study.trials import matched

STEP = "duplicates"
KINDS = ("copy", "permuted")

Pair = tuple[int, int]


@dataclass(frozen=True)
class Sizes:
    """What is planted, and how long training goes on.

    Attributes
    ----------
    pairs : int
        Pairs of a kind in every layer: the original, and the expert that becomes its copy.
    jitter : float
        Standard deviation of the noise on a copy's router row, relative to that of the row.
    steps : tuple of int
        Steps after which the experts are compared, ascending, from 0.
    curve : int
        Steps in which the learning rate falls as in the second half of a training; at least the last of
        `steps`.
    tokens, sampled : int
        As in :class:`moeits.study.relatedness.Sizes`.
    """

    pairs: int = 2
    jitter: float = 0.1
    steps: tuple[int, ...] = (0, 10, 100)
    curve: int = 1000
    tokens: int = 4096
    sampled: int = 256


def draw_pairs(random: np.random.Generator, experts: int, pairs: int) -> dict[str, list[Pair]]:
    """Draw disjoint pairs of experts, equally many of every kind."""
    drawn = random.permutation(experts)[: 2 * pairs * len(KINDS)].reshape(len(KINDS), pairs, 2)
    return {kind: [tuple(pair) for pair in own.tolist()] for kind, own in zip(KINDS, drawn, strict=True)}


def plant(model: Any, planted: Mapping[int, Mapping[str, Sequence[Pair]]], jitter: float, seed: int) -> None:
    """Replace the second expert of every pair by a copy of the first, in place.

    Parameters
    ----------
    model : torch.nn.Module
        Mixture-of-Experts model.
    planted : mapping of int to mapping of str to sequence of (int, int)
        Decoder layer to the pairs of each of `KINDS`.
    jitter : float
        See :class:`Sizes`.
    seed : int
        Of permutations and noise.
    """
    import torch

    from moeits.models.families import expert_block, moe_layers
    from moeits.study.training import routers

    rows = routers(model)
    with torch.no_grad():
        for layer in moe_layers(model):
            generator = torch.Generator().manual_seed(1000 * seed + layer.layer)
            block, router = expert_block(layer), rows[layer.layer].weight
            for kind, pairs in planted[layer.layer].items():
                for original, copy in pairs:
                    neurons = block["up"].shape[1]
                    order = torch.arange(neurons)
                    if kind == "permuted":
                        order = torch.randperm(neurons, generator=generator)
                    for name in ("gate", "up"):
                        block[name][copy] = block[name][original][order]
                    block["down"][copy] = block["down"][original][:, order]
                    noise = torch.randn(router.shape[1], generator=generator)
                    router[copy] = router[original] + jitter * router[original].std() * noise


def found(matrix: np.ndarray, pairs: Iterable[Pair], others: Iterable[Pair]) -> tuple[float, float]:
    """Say how well a similarity tells planted pairs from all that are none.

    Parameters
    ----------
    matrix : ndarray, shape (E, E)
        Symmetric; copies should have large values.
    pairs : iterable of (int, int)
        Planted pairs.
    others : iterable of (int, int)
        Planted pairs of another kind, which count neither way.

    Returns
    -------
    auc, removed : float
        Probability that a planted pair has a larger value than one that is none (ties count half); share of
        the planted pairs that lose an expert where Algorithm 3 removes as many experts as pairs are planted,
        of both kinds.
    """
    experts = len(matrix)
    pairs, others = {frozenset(pair) for pair in pairs}, {frozenset(pair) for pair in others}
    every = [frozenset((i, j)) for i in range(experts) for j in range(i + 1, experts)]
    counted = [pair for pair in every if pair not in others]
    values = rankdata([matrix[tuple(sorted(pair))] for pair in counted])
    is_planted = np.array([pair in pairs for pair in counted])
    count = is_planted.sum()
    auc = (values[is_planted].sum() - count * (count + 1) / 2) / (count * (len(counted) - count))
    gone = set(select_experts(matrix, n_keep=experts - len(pairs) - len(others)).removed)
    return float(auc), float(np.mean([bool(gone & pair) for pair in pairs]))


def measure(name: str, *, sizes: Sizes = Sizes(), folder: Path | None = None) -> Record:
    """Plant copies in one training from scratch and train on, or read the record.

    Returns
    -------
    Record
        Details: ``planted``, the pairs by layer and kind; ``loss`` of every step, nats a token; ``found``,
        rows of step, similarity, kind, layer, auc, share removed (see :func:`found`), mean similarity of the
        planted pairs and of pairs that are none.
    """
    from moeits.machine.paths import CACHE
    from moeits.models.families import moe_layers
    from moeits.study import anatomy, corpus, trained
    from moeits.study.training import Schedule, train

    text, calibration = corpus.load("training"), corpus.load("calibration")
    plan = trained.find(name)
    inputs = {
        "model": name,
        "weights": trained.weights_digest(plan.folder),
        "text": corpus.text_digest(text),
        "calibration": corpus.text_digest(calibration),
        "sizes": asdict(sizes) | {"steps": list(sizes.steps)},
    }
    last = sizes.steps[-1]
    schedule = Schedule(steps=last, curve=(0.5, 0.5 + 0.5 * last / sizes.curve))

    def run() -> tuple[list[dict[str, Any]], dict[str, Any]]:
        import torch

        torch.set_num_threads(1)
        model = trained.load(name)
        layers = [layer.layer for layer in moe_layers(model)]
        experts = moe_layers(model)[0].num_experts
        planted = {
            number: draw_pairs(np.random.default_rng([plan.seed, number]), experts, sizes.pairs)
            for number in layers
        }
        plant(model, planted, sizes.jitter, plan.seed)
        read = relatedness.Sizes(sizes.tokens, sizes.sampled)
        after = trained.Plan(
            f"{name}-duplicates", plan.config, schedule, plan.seed, plan.begin, first=plan.schedule.tokens
        )
        record = train(
            model,
            trained.stream(text, after),
            schedule,
            CACHE / "training" / f"{name}-duplicates-{last}",
            identity=inputs,
            observe=lambda one: relatedness.similarities(one, calibration.ids, read, plan.seed),
            observe_at=sizes.steps,
        )
        rows = []
        for step in sizes.steps:
            for key in (*relatedness.WEIGHTS, "output", "together", "router"):
                # The matrix of permuted neurons disguises what is planted: as they are is told by "nmi".
                if key == "permuted":
                    continue
                for number, matrix in zip(layers, record[f"{key}@{step}"], strict=True):
                    rows += [[step, key, *one] for one in _told(matrix, number, planted[number])]
        return [], {
            "planted": {str(number): pairs for number, pairs in planted.items()},
            "loss": [round(float(value), 4) for value in record["loss"]],
            "found": rows,
        }

    folder = folder or anatomy.RECORDS
    return Measurement(folder, STEP, inputs, run, provenance={"device": "cpu", "dtype": "float32"}).answer()


def _told(matrix: np.ndarray, layer: int, planted: Mapping[str, Sequence[Pair]]) -> list[list[Any]]:
    every = [pair for pairs in planted.values() for pair in pairs]
    none = np.triu(np.ones(matrix.shape, bool), 1)
    for pair in every:
        none[min(pair), max(pair)] = False
    rows = []
    for kind, pairs in planted.items():
        auc, removed = found(matrix, pairs, [pair for pair in every if pair not in pairs])
        values = [float(np.mean([matrix[pair] for pair in pairs])), float(matrix[none].mean())]
        rows.append([kind, layer, *(float(f"{value:.4g}") for value in (auc, removed, *values))])
    return rows


def measure_all(names: Sequence[str] = (), *, jobs: int = 1) -> list[Record]:
    """Measure the trainings from scratch, or those among `names`; the first one for 1,000 steps, too."""
    from moeits.study import trained

    scratch = [name for name in matched(names) if name.startswith("scratch-")]
    work = [delayed(measure)(name) for name in scratch]
    work += [
        delayed(measure)(name, sizes=Sizes(steps=(0, 10, 100, 1000)))
        for name in scratch
        if name.endswith(f"-{trained.SEEDS[0]}")
    ]
    return Parallel(n_jobs=jobs)(work)


def table(records: Iterable[Record]) -> pd.DataFrame:
    """Tabulate how well planted copies are told, one row for each training, step, similarity and kind.

    Returns
    -------
    DataFrame
        ``seed``, ``step``, ``similarity``, ``kind``; means over layers of ``auc``, ``removed``, ``planted``
        and ``others``: see :func:`measure`. Of two records of one training, the longer counts.
    """
    columns = ["step", "similarity", "kind", "layer", "auc", "removed", "planted", "others"]
    longest: dict[str, Record] = {}
    for record in sorted(records, key=lambda one: len(one.details["loss"])):
        longest[record.inputs["model"]] = record
    frames = [
        pd.DataFrame(record.details["found"], columns=columns).assign(seed=int(name.rpartition("-")[2]))
        for name, record in longest.items()
    ]
    keys = ["seed", "step", "similarity", "kind"]
    return pd.concat(frames).groupby(keys, sort=False)[columns[4:]].mean().reset_index()
