"""Which experts to keep, on trained experts: the registered experiment (``data/study/registration.md``).

One record per training holds the losses of what every method keeps, of random subsets with the same counts
in every layer, and of the unpruned model, document by document. What the trainings say together is worked out
from the records: a difference per training, its error over trainings, and one of four verdicts.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from joblib import Parallel, delayed
from scipy import stats

from moeits.evaluation.statistics import estimate
from moeits.study.measurement import Measurement
from moeits.study.records import Record, load, row

STEP = "selection"

CRITERIA = (
    "frequency",
    "router-weight",
    "activation-norm",
    "random-token-norm",
    "reap",
    "weight-product",
    "stun",
    "lu",
    "first",
)
"""Criteria of `moeits.criteria` that are compared with MoEITS at half of the experts."""


_BUDGETS = ("own", "half")


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
        Random subsets for each budget.
    stratified : int
        Random subsets that spread their experts evenly over the slices.
    tau : float
        Threshold of MoEITS at its own count.
    calibration : int
        Tokens of calibration text for the criteria that read some.
    """

    documents: int = 10
    context: int = 256
    subsets: int = 99
    stratified: int = 39
    tau: float = 1.25
    calibration: int = 8192


def random_subset(counts: Sequence[int], experts: int, random: np.random.Generator) -> list[list[int]]:
    """Draw a subset of each layer's experts, uniformly among those of the given sizes."""
    return [sorted(random.choice(experts, count, replace=False).tolist()) for count in counts]


def stratified_subset(
    counts: Sequence[int], experts: int, slices: int, random: np.random.Generator
) -> list[list[int]]:
    """Draw a subset that spreads over the slices as evenly as its size allows.

    Expert e is a copy of slice ``e % slices``. With as many experts as slices, each slice has one.
    """
    drawn = []
    for count in counts:
        copies = random.permuted(np.arange(experts).reshape(-1, slices), axis=0)
        # Each row has one copy of every slice.
        drawn.append(sorted(random.permuted(copies, axis=1).ravel()[:count].tolist()))
    return drawn


def measure(name: str, *, sizes: Sizes = Sizes(), folder: Path | None = None) -> Record:
    """Measure one training of the matched set, or read its record.

    Parameters
    ----------
    name : str
        Such as ``"upcycled-3"``.
    sizes : Sizes
        How much is measured.
    folder : Path, optional
        Folder of the records; that of the study by default.

    Returns
    -------
    Record
        Found by weights, text and sizes. Rows: bits per byte of every method and of the mean subset. Details:
        ``bytes`` and ``domain`` of the documents; ``unpruned``, bits of each; for each of ``budgets``:
        ``counts`` by layer; ``methods`` (kept experts, bits of each document); ``subsets`` (bits of all
        documents, for each subset) and ``mean of subsets`` (bits of each document); and, at the own count
        and but from scratch, the same of ``stratified`` subsets.

    Raises
    ------
    MissingError
        If the model has not been trained.
    """
    from moeits.study import anatomy, corpus, trained

    text = corpus.load("heldout")
    inputs = {
        "model": name,
        "weights": trained.weights_digest(trained.find(name).folder),
        "text": corpus.text_digest(text),
        "calibration": corpus.text_digest(corpus.load("calibration")),
        "sizes": asdict(sizes),
    }

    def run() -> tuple[list[dict[str, Any]], dict[str, Any]]:
        read = anatomy.sample(text, sizes.documents, sizes.context, anatomy.token_bytes())
        return trial(name, trained.load(name), read, corpus.load("calibration").ids, sizes)

    folder = folder or anatomy.RECORDS
    return Measurement(folder, STEP, inputs, run, provenance={"device": "cpu", "dtype": "float32"}).answer()


def trial(
    name: str, model: Any, read: Any, calibration: np.ndarray, sizes: Sizes
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Measure a model in memory: see :func:`measure`."""
    import torch

    from moeits import criteria
    from moeits.criteria.statistics import gather, layers_of, random_tokens
    from moeits.models.families import expert_block, moe_layers
    from moeits.nmi import nmi_matrix
    from moeits.selection import select_experts
    from moeits.study import anatomy, trained

    torch.set_num_threads(1)
    layers = moe_layers(model)
    experts, top_k = layers[0].num_experts, layers[0].top_k
    seed = trained.find(name).seed
    slices = trained.SLICES if not name.startswith("scratch") else None
    redundancy = [nmi_matrix(expert_block(layer)) for layer in layers]
    own = [list(select_experts(R, sizes.tau, at_least=top_k).kept) for R in redundancy]
    blocks = calibration[: sizes.calibration // 256 * 256].astype(np.int64).reshape(-1, 256)
    described = layers_of(
        model, gather(model, blocks), probe=gather(model, random_tokens(model, sizes.calibration, seed=seed))
    )
    kept = {
        "half": {"moeits": [list(select_experts(R, n_keep=experts // 2).kept) for R in redundancy]}
        | {
            method: [list(one) for one in criteria.select(method, described, n_keep=experts // 2).values()]
            for method in CRITERIA
        },
    }
    if slices:  # the budget that was registered for upcycled experts
        kept["own"] = {"moeits": own}
    unpruned = anatomy.losses(model, read)
    details: dict[str, Any] = {
        "bytes": read.size.tolist(),
        "domain": read.domain.tolist(),
        "unpruned": _short(unpruned),
        "budgets": {},
    }
    rows = [_row(name, "unpruned", 1.0, unpruned, read.size)]
    for budget, methods in kept.items():
        counts = [len(one) for one in methods["moeits"]]
        share = sum(counts) / (experts * len(counts))
        random = np.random.default_rng([seed, _BUDGETS.index(budget)])
        drawn = {"subsets": [random_subset(counts, experts, random) for _ in range(sizes.subsets)]}
        if slices and budget == "own":
            drawn["stratified"] = [
                stratified_subset(counts, experts, slices, random) for _ in range(sizes.stratified)
            ]
        told: dict[str, Any] = {"counts": counts, "methods": {}}
        for method, chosen in methods.items():
            bits = anatomy.subsets(model, read, [chosen])[0]
            told["methods"][method] = {"kept": chosen, "bits": _short(bits)}
            rows.append(_row(name, f"{method}, {budget}", share, bits, read.size))
        for kind, subsets in drawn.items():
            bits = anatomy.subsets(model, read, subsets)
            told[kind] = _short(bits.sum(1))
            told[f"mean of {kind}"] = _short(bits.mean(0))
            rows.append(_row(name, f"{kind}, {budget}", share, bits.mean(0), read.size))
        details["budgets"][budget] = told
    return rows, details


def _short(values: np.ndarray) -> list[float]:
    return [round(float(value), 3) for value in values]


def _row(name: str, method: str, share: float, bits: np.ndarray, size: np.ndarray) -> dict[str, Any]:
    from moeits.evaluation import ratio

    value, stderr = ratio(bits, size)
    return row(
        model=name,
        method=method,
        kept_share=share,
        task="held-out text",
        metric="bits per byte",
        value=value,
        stderr=stderr,
        n=len(size),
        unit="bits per byte",
        higher_is_better=False,
    )


def measure_all(names: Sequence[str] = (), *, jobs: int = 1, sizes: Sizes = Sizes()) -> list[Record]:
    """Measure finished trainings of the matched set that have no record yet; all of them without `names`."""
    from moeits.study import trained

    matched = [f"{kind}-{seed}" for seed in trained.SEEDS for kind in trained.INITIALISATIONS]
    ready = [name for name in matched if name in trained.finished() and (not names or name in names)]
    return Parallel(n_jobs=jobs)(delayed(measure)(name, sizes=sizes) for name in ready)


# What the trainings say together


def differences(records: Iterable[Record]) -> pd.DataFrame:
    """Tabulate each method against the random subsets of its training.

    Parameters
    ----------
    records : iterable of Record
        Of the step `STEP`.

    Returns
    -------
    DataFrame
        One row for each training, budget and method: ``initialisation``, ``seed``, ``budget``, ``method``; in
        bits per byte ``delta`` (method minus the mean of the random subsets), ``from_stratified`` (minus the
        mean of those spread over the slices; NaN where there are none), ``cost`` (mean of the random subsets
        minus the unpruned model) and ``spread`` (standard deviation over them); ``percentile`` among them;
        ``kept``, the mean number of experts kept in a layer.
    """
    rows = []
    for record in records:
        details, (kind, _, seed) = record.details, record.inputs["model"].rpartition("-")
        size = sum(details["bytes"])
        for budget, told in details["budgets"].items():
            subsets = np.array(told["subsets"]) / size
            stratified = np.mean(told["stratified"]) / size if "stratified" in told else np.nan
            for method, one in told["methods"].items():
                bits = sum(one["bits"]) / size
                rows.append(
                    {
                        "initialisation": kind,
                        "seed": int(seed),
                        "budget": budget,
                        "method": method,
                        "delta": bits - subsets.mean(),
                        "from_stratified": bits - stratified,
                        "percentile": (1 + int((subsets <= bits).sum())) / (1 + len(subsets)),
                        "cost": subsets.mean() - sum(details["unpruned"]) / size,
                        "spread": subsets.std(ddof=1),
                        "kept": float(np.mean(told["counts"])),
                    }
                )
    return pd.DataFrame(rows)


def percentile_p(percentiles: Sequence[float]) -> float:
    """Two-sided p value of the mean of percentiles that are uniform by chance (Irwin-Hall)."""
    total = float(np.sum(percentiles))
    below = stats.irwinhall.cdf(total, len(percentiles))
    return float(2 * min(below, 1 - below))


def hypotheses(table: pd.DataFrame, margin: float = 0.1) -> pd.DataFrame:
    """Test the registered sequence, which stops at the first hypothesis that is not decided.

    Parameters
    ----------
    table : DataFrame
        See :func:`differences`.
    margin : float, default=0.1
        Margin of equivalence, as a share of what random subsets cost on average.

    Returns
    -------
    DataFrame
        One row for each of H1 to H4: ``hypothesis``, ``quantity``, the columns of :class:`Estimate`,
        ``margin``, and ``tested`` (False after the sequence has stopped).
    """
    moeits = table[table.method == "moeits"].set_index("seed").groupby(["initialisation", "budget"])
    own = moeits.get_group(("upcycled", "own"))
    half = {kind: moeits.get_group((kind, "half")) for kind in ("upcycled", "scratch")}
    allowed = margin * float(own.cost.mean())
    tests = [
        ("H1", "upcycled, own count: MoEITS minus random subsets", own.delta, None),
        ("H2", "upcycled, own count: MoEITS minus one expert per slice", own.from_stratified, allowed),
        ("H3", "half: upcycled minus scratch", half["upcycled"].delta - half["scratch"].delta, None),
        ("H4", "scratch, half: MoEITS minus random subsets", half["scratch"].delta, None),
    ]
    rows, going = [], True
    for name, quantity, values, within in tests:
        found = estimate(values.to_numpy(), within)
        rows.append(
            {"hypothesis": name, "quantity": quantity, **asdict(found), "margin": allowed, "tested": going}
        )
        going = going and found.verdict == ("equivalent" if name == "H2" else found.verdict) != "undecided"
    return pd.DataFrame(rows)


def summary(table: pd.DataFrame, budget: str = "half") -> pd.DataFrame:
    """Tabulate initialisation x method, one family of tests (Benjamini-Hochberg at 10 %).

    Returns
    -------
    DataFrame
        ``initialisation``, ``method``, the columns of :class:`Estimate`, mean ``percentile``, ``discovered``.
    """
    rows = []
    for (kind, method), own in table[table.budget == budget].groupby(
        ["initialisation", "method"], sort=False
    ):
        found = estimate(own.delta.to_numpy(), 0.1 * float(own.cost.mean()))
        rows.append(
            {"initialisation": kind, "method": method, **asdict(found), "percentile": own.percentile.mean()}
        )
    rows = pd.DataFrame(rows)
    return rows.assign(discovered=stats.false_discovery_control(rows.p) <= 0.1)


def committed(folder: Path | None = None) -> list[Record]:
    """Read the records of the registered experiment that are there."""
    from moeits.machine.paths import DATA

    return load(folder or DATA / "study" / "records", STEP)
