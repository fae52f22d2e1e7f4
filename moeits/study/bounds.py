"""How well a selection could do: greedy by true loss, and all subsets of one layer's experts.

Upper bounds for the methods of :mod:`moeits.study.trials`, described without verdicts: one training of each
initialisation is measured.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from joblib import Parallel, delayed

from moeits.study.measurement import Measurement
from moeits.study.records import Record
from moeits.study.trials import CRITERIA, Subset, chooser, loss_row, matched, rounded

STEP = "bounds"


@dataclass(frozen=True)
class Sizes:
    """How much is measured of the bounds.

    Attributes
    ----------
    documents : int
        Documents of each domain: of calibration text for the greedy removal, of held-out text for all
        subsets.
    judged : int
        Held-out documents of each domain on which the greedy subset is judged: those of the trials.
    context : int
        Tokens that are read of each.
    layer : int
        Position of the layer whose subsets are all measured.
    removed : int
        Experts that they lack.
    calibration : int
        As in the trials.
    """

    documents: int = 2
    judged: int = 10
    context: int = 256
    layer: int = 2
    removed: int = 4
    calibration: int = 8192


def measure(name: str, *, sizes: Sizes = Sizes(), folder: Path | None = None) -> Record:
    """Measure how well a selection could do on one training, or read the record.

    Returns
    -------
    Record
        Details: ``greedy`` (kept experts, at half of every layer; bits of each judged document). Of all
        subsets of one ``layer``, in the order of ``itertools.combinations`` of the kept experts: ``all``,
        bits of the documents with even and with odd numbers; the same of the ``unpruned`` model, their
        ``bytes``; and of ``methods``, the number of the subset that each keeps.
    """
    return measurement(name, sizes=sizes, folder=folder).answer()


def measurement(name: str, *, sizes: Sizes = Sizes(), folder: Path | None = None) -> Measurement:
    """Make the measurement of :func:`measure`."""
    from moeits.models.families import expert_block, moe_layers
    from moeits.nmi import nmi_matrix
    from moeits.selection import select_experts
    from moeits.study import anatomy, corpus, trained

    text, learnt = corpus.load("heldout"), corpus.load("calibration")
    inputs = {
        "model": name,
        "weights": trained.weights_digest(trained.find(name).folder),
        "text": corpus.text_digest(text),
        "calibration": corpus.text_digest(learnt),
        "sizes": asdict(sizes),
    }

    def run() -> tuple[list[dict[str, Any]], dict[str, Any]]:
        model, size = trained.load(name), anatomy.token_bytes()
        layers = moe_layers(model)
        experts = layers[0].num_experts
        every = list(range(experts))
        # Methods.
        choose = chooser(model, learnt.ids, sizes.calibration, trained.find(name).seed)
        counts = [experts - sizes.removed] * len(layers)
        R = nmi_matrix(expert_block(layers[sizes.layer]), n_jobs=1)
        kept = {"moeits": list(select_experts(R, n_keep=counts[0]).kept)}
        kept |= {method: choose(method, counts)[sizes.layer] for method in CRITERIA}
        # All subsets of one layer.
        read = anatomy.sample(text, sizes.documents, sizes.context, size)
        halves = np.arange(len(read.size)) % 2 == np.arange(2)[:, None]
        subsets = list(combinations(every, counts[0]))
        whole = [every] * len(layers)
        tried = ([*whole[: sizes.layer], one, *whole[sizes.layer + 1 :]] for one in subsets)
        bits = anatomy.subsets(model, read, tried) @ halves.T
        # Greedy removal on text of its own.
        seen = anatomy.sample(learnt, sizes.documents, sizes.context, size)
        found = greedy(
            lambda subset: float(anatomy.subsets(model, seen, [subset]).sum()),
            experts,
            len(layers),
            experts // 2,
        )
        judged = anatomy.sample(text, sizes.judged, sizes.context, size)
        after = anatomy.subsets(model, judged, [found])[0]
        return [loss_row(name, "greedy, half", 0.5, after, judged.size)], {
            "greedy": {"kept": found, "bits": rounded(after)},
            "layer": layers[sizes.layer].layer,
            "all": [rounded(half) for half in bits.T],
            "unpruned": rounded(halves @ anatomy.losses(model, read)),
            "bytes": (halves @ read.size).tolist(),
            "methods": {method: subsets.index(tuple(one)) for method, one in kept.items()},
        }

    folder = folder or anatomy.RECORDS
    return Measurement(folder, STEP, inputs, run, provenance={"device": "cpu", "dtype": "float32"})


def greedy(loss: Callable[[Subset], float], experts: int, layers: int, floor: int) -> Subset:
    """Remove one expert after the other, each time the one without which the loss is least.

    Parameters
    ----------
    loss : callable
        Kept experts of every layer -> loss.
    experts, layers : int
        E and L.
    floor : int
        Experts that every layer keeps.
    """
    kept = [list(range(experts)) for _ in range(layers)]
    while any(len(one) > floor for one in kept):
        tried = [
            [*kept[:layer], [other for other in one if other != expert], *kept[layer + 1 :]]
            for layer, one in enumerate(kept)
            if len(one) > floor
            for expert in one
        ]
        kept = min(tried, key=loss)
    return kept


def best_elsewhere(bits: np.ndarray) -> float:
    """Loss of the best subset on text that did not choose it.

    Parameters
    ----------
    bits : ndarray, shape (subsets, halves of the text)
        Losses.

    Returns
    -------
    float
        Each half's loss with the subset that is best on the other half; their mean.
    """
    first, second = bits.argmin(0)
    return float((bits[first, 1] + bits[second, 0]) / 2)


def _experts(model: Any) -> int:
    from moeits.models.families import moe_layers

    return moe_layers(model)[0].num_experts


def measure_all(names: Sequence[str] = (), *, jobs: int = 1) -> list[Record]:
    """Measure the first training of every initialisation, or those among `names`."""
    from moeits.study import trained

    first = [name for name in matched(names) if name.endswith(f"-{trained.SEEDS[0]}")]
    return Parallel(n_jobs=jobs)(delayed(measure)(name) for name in first)


def headroom(records: Iterable[Record], bounds: Iterable[Record]) -> pd.DataFrame:
    """Tabulate what a selection could gain.

    Parameters
    ----------
    records, bounds : iterable of Record
        Of the steps of the trials and of these bounds.

    Returns
    -------
    DataFrame
        One row for each training with bounds: ``initialisation``, ``seed``; at half, in bits per byte against
        the mean random subset, ``greedy`` and ``moeits`` and the ``best`` method with its name, ``by``. Of
        one layer without a quarter of its experts, in bits per byte above the unpruned model: ``random``,
        the mean of all subsets, ``optimum``, that of the best one on text that did not choose it, and
        ``kept``, what MoEITS keeps; and ``percentile``, the share of all subsets whose loss is at most its.
    """
    half = {one.inputs["model"]: one for one in records}
    rows = []
    for record in bounds:
        name, told = record.inputs["model"], record.details
        if name not in half:
            continue
        trial, (kind, _, seed) = half[name].details, name.rpartition("-")
        size = sum(trial["bytes"])
        known = trial["budgets"]["half"]
        mean = np.mean(known["subsets"])
        deltas = {one: (sum(of["bits"]) - mean) / size for one, of in known["methods"].items()}
        by = min(deltas, key=deltas.get)
        bits, part = np.array(told["all"]).T, sum(told["bytes"])
        base = sum(told["unpruned"])
        both = bits.sum(1)
        rows.append(
            {
                "initialisation": kind,
                "seed": int(seed),
                "greedy": (sum(told["greedy"]["bits"]) - mean) / size,
                "moeits": deltas["moeits"],
                "best": deltas[by],
                "by": by,
                "random": (both.mean() - base) / part,
                "optimum": (2 * best_elsewhere(bits) - base) / part,
                "kept": (both[told["methods"]["moeits"]] - base) / part,
                "percentile": float((both <= both[told["methods"]["moeits"]]).mean()),
            }
        )
    return pd.DataFrame(rows)
