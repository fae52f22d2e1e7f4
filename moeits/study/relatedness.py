"""What weight NMI measures: whether it rises and falls with what experts do.

Matrices of similarity between the experts of a layer, by weights and by function, and Mantel tests between
them (28 pairs of eight experts are no 28 observations: labels of experts are permuted, not pairs). One
correlation per training; errors over trainings. Exploratory: registered is none of it.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from joblib import Parallel, delayed
from scipy.stats import rankdata

from moeits.evaluation.statistics import estimate
from moeits.study.measurement import Measurement
from moeits.study.records import Record
from moeits.study.trials import matched

STEP = "relatedness"

WEIGHTS = ("nmi", "permuted", "aligned")
"""NMI of the weights as they are, with every expert's neurons in another order, and with neurons matched."""
FUNCTION = ("output", "together", "router", "loss")
"""Outputs on the same tokens; tokens that use both; router rows; loss increase without the expert."""

Pairs = Sequence[tuple[np.ndarray, np.ndarray]]


# Arrays


def mantel(blocks: Pairs, permutations: int = 999, seed: int = 0) -> tuple[float, float]:
    """Rank correlation of two matrices over pairs of experts; its p value by permuted labels.

    Parameters
    ----------
    blocks : sequence of (ndarray (E, E), ndarray (E, E))
        Symmetric matrices, such as one pair for each layer; experts of a block are exchangeable. Diagonals
        are not read. A block in which one is constant says nothing and is left out.
    permutations : int, default=999
        Permutations of the labels, independent in every block.
    seed : int, default=0
        Of the permutations.

    Returns
    -------
    r, p : float
        Mean of the blocks' Spearman correlations, and its two-sided p value; NaN where no block says
        anything.

    References
    ----------
    Mantel, N. (1967), Cancer Research 27(2), 209-220.
    """
    random = np.random.default_rng(seed)
    found, null = [], []
    for a, b in blocks:
        rows, columns = np.triu_indices(len(a), 1)
        if np.ptp(a[rows, columns]) == 0 or np.ptp(b[rows, columns]) == 0:
            continue
        ranks = _standard(rankdata(a[rows, columns]))
        other = np.zeros(np.shape(b))
        other[rows, columns] = _standard(rankdata(b[rows, columns]))
        other += other.T
        orders = np.stack([np.arange(len(a)), *(random.permutation(len(a)) for _ in range(permutations))])
        values = (ranks * other[orders[:, rows], orders[:, columns]]).mean(1)
        found.append(values[0])
        null.append(values[1:])
    if not found:
        return float("nan"), float("nan")
    r, drawn = float(np.mean(found)), np.mean(null, 0)
    return r, float((1 + (np.abs(drawn) >= abs(r) - 1e-12).sum()) / (1 + permutations))


def _standard(values: np.ndarray) -> np.ndarray:
    return (values - values.mean()) / values.std()


def within_slices(matrix: np.ndarray, slices: int) -> list[np.ndarray]:
    """Cut out what belongs to copies of one slice, in the order of `initialisation.slices`."""
    return [matrix[np.ix_(own, own)] for own in (np.arange(s, len(matrix), slices) for s in range(slices))]


def cosine(rows: np.ndarray) -> np.ndarray:
    """Cosine of every pair of rows, shape (E, E)."""
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return unit @ unit.T


def by_function(statistics: Any, router: np.ndarray) -> dict[str, np.ndarray]:
    """Similarity of experts by what they do.

    Parameters
    ----------
    statistics : Statistics
        Of a pass over text: see :func:`moeits.criteria.statistics.gather`.
    router : ndarray, shape (E, d)
        Rows of the router.

    Returns
    -------
    dict of str to ndarray (E, E)
        ``output``, the mean cosine of outputs on the same tokens; ``together``, tokens that use both over
        tokens that use either; ``router``, the cosine of router rows.
    """
    norms = np.sqrt(np.einsum("nee->ne", statistics.gram))
    output = (statistics.gram / np.maximum(norms[:, :, None] * norms[:, None], 1e-30)).mean(0)
    both = statistics.coactivation
    either = np.diag(both)[:, None] + np.diag(both) - both
    together = np.divide(both, either, out=np.zeros(np.shape(both)), where=either > 0)
    return {"output": output, "together": together, "router": cosine(router)}


def loss_likeness(costs: Sequence[float]) -> np.ndarray:
    """Likeness of experts by the loss increase that removing each costs: minus the absolute difference."""
    costs = np.asarray(costs, float)
    return -np.abs(costs[:, None] - costs)


# The record of a model


@dataclass(frozen=True)
class Sizes:
    """How much is read: tokens of calibration text, and those on which outputs are compared."""

    tokens: int = 4096
    sampled: int = 256


def measure(name: str, *, sizes: Sizes = Sizes(), folder: Path | None = None) -> Record:
    """Measure one training of the matched set, or read its record.

    Returns
    -------
    Record
        Details: for each of `WEIGHTS` and for ``output``, ``together`` and ``router``, what lies above the
        diagonal of every layer's matrix, row by row.
    """
    from moeits.study import anatomy, corpus, trained

    text = corpus.load("calibration")
    inputs = {
        "model": name,
        "weights": trained.weights_digest(trained.find(name).folder),
        "calibration": corpus.text_digest(text),
        "sizes": asdict(sizes),
    }

    def run() -> tuple[list[dict[str, Any]], dict[str, Any]]:
        model, seed = trained.load(name), trained.find(name).seed
        matrices = similarities(model, text.ids, sizes, seed)
        return [], {key: [_upper(matrix) for matrix in layers] for key, layers in matrices.items()}

    folder = folder or anatomy.RECORDS
    return Measurement(folder, STEP, inputs, run, provenance={"device": "cpu", "dtype": "float32"}).answer()


def similarities(model: Any, ids: np.ndarray, sizes: Sizes, seed: int) -> dict[str, list[np.ndarray]]:
    """Similarity of the experts of every layer, by weights and by function: see :func:`measure`."""
    import torch

    from moeits.criteria.statistics import gather, layers_of
    from moeits.nmi import nmi_matrix

    torch.set_num_threads(1)
    blocks = ids[: sizes.tokens // 256 * 256].astype(np.int64).reshape(-1, 256)
    found: dict[str, list[np.ndarray]] = {}
    for layer in layers_of(model, gather(model, blocks, sample=sizes.sampled)).values():
        block = layer.weights
        disguised = permuted(block, np.random.default_rng([seed, layer.number]))
        told = {
            "nmi": nmi_matrix(block, n_jobs=1),
            "permuted": nmi_matrix(disguised, n_jobs=1),
            "aligned": nmi_matrix(disguised, n_jobs=1, align=True),
            **by_function(layer.statistics, layer.router),
        }
        for key, matrix in told.items():
            found.setdefault(key, []).append(matrix)
    return found


def permuted(block: Mapping[str, np.ndarray], random: np.random.Generator) -> Mapping[str, np.ndarray]:
    """Put the hidden neurons of every expert in another order, which leaves what they compute unchanged."""
    from moeits.study.planted import permute

    for expert in range(len(block["up"])):
        block = permute(block, expert, random.permutation(block["up"].shape[1]))
    return block


def _upper(matrix: np.ndarray) -> list[float]:
    return [float(f"{value:.4g}") for value in matrix[np.triu_indices(len(matrix), 1)]]


def square(upper: Sequence[float]) -> np.ndarray:
    """Symmetric matrix, zero diagonal, from what lies above its diagonal, row by row."""
    size = round((1 + np.sqrt(1 + 8 * len(upper))) / 2)
    matrix = np.zeros((size, size))
    matrix[np.triu_indices(size, 1)] = upper
    return matrix + matrix.T


def measure_all(names: Sequence[str] = (), *, jobs: int = 1) -> list[Record]:
    """Measure finished trainings of the matched set that have no record yet; all of them without `names`."""
    return Parallel(n_jobs=jobs)(delayed(measure)(name) for name in matched(names))


# What the trainings say together


def correlations(
    records: Iterable[Record], anatomies: Iterable[Record], slices: int, permutations: int = 999
) -> pd.DataFrame:
    """Correlate weights with function, training by training.

    Parameters
    ----------
    records, anatomies : iterable of Record
        Of this step and of the step ``"anatomy"``, from which the loss increases are.
    slices : int
        Slices of the parent's FFN.
    permutations : int, default=999
        Of every Mantel test.

    Returns
    -------
    DataFrame
        ``initialisation``, ``seed``, ``pairs`` (``"all"``; but for scratch also ``"copies of one slice"``),
        ``weights``, ``function``, ``r`` and ``p``: see :func:`mantel`.
    """
    costs = {
        one.inputs["model"]: np.array(one.details["removal"])[..., 0]
        for one in anatomies
        if "removal" in one.details
    }
    rows = []
    for record in records:
        name = record.inputs["model"]
        kind, _, seed = name.rpartition("-")
        layers = {key: [square(one) for one in upper] for key, upper in record.details.items()}
        if name in costs:
            layers["loss"] = [loss_likeness(one) for one in costs[name]]
        cuts: dict[str, Callable[[np.ndarray], list[np.ndarray]]] = {"all": lambda matrix: [matrix]}
        if kind != "scratch":
            cuts["copies of one slice"] = lambda matrix: within_slices(matrix, slices)
        for pairs, cut in cuts.items():
            blocks = {key: [part for matrix in of for part in cut(matrix)] for key, of in layers.items()}
            for weights in WEIGHTS:
                for function in FUNCTION:
                    if function not in blocks:
                        continue
                    both = list(zip(blocks[weights], blocks[function], strict=True))
                    r, p = mantel(both, permutations, int(seed))
                    rows.append(
                        {
                            "initialisation": kind,
                            "seed": int(seed),
                            "pairs": pairs,
                            "weights": weights,
                            "function": function,
                            "r": r,
                            "p": p,
                        }
                    )
    return pd.DataFrame(rows)


def summary(table: pd.DataFrame, level: float = 0.05) -> pd.DataFrame:
    """Estimate each correlation over trainings.

    Returns
    -------
    DataFrame
        ``initialisation``, ``pairs``, ``weights``, ``function``, the columns of :class:`Estimate`, and
        ``significant``, the number of trainings whose own p value is at most `level`. Its verdict is
        ``"worse"`` for a correlation above zero: read it through :func:`direction`.
    """
    by = ["initialisation", "pairs", "weights", "function"]
    return pd.DataFrame(
        [
            dict(zip(by, names, strict=True))
            | asdict(estimate(own.r.to_numpy()))
            | {"significant": int((own.p <= level).sum())}
            for names, own in table.dropna(subset="r").groupby(by, sort=False)
            if len(own) > 1
        ]
    )


def direction(verdict: str) -> str:
    """Say what a verdict on a correlation means: ``"rises"``, ``"falls"`` or ``"undecided"``."""
    return {"worse": "rises", "better": "falls"}.get(verdict, "undecided")
