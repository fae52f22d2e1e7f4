"""Which experts to keep, on trained experts: the registered experiment (``data/study/registration.md``).

One record per training holds the losses of what every method keeps, of random subsets with the same counts
in every layer, and of the unpruned model, document by document. What the trainings say together is worked out
from the records: a difference per training, its error over trainings, and one of four verdicts.
"""

from collections.abc import Callable, Iterable, Sequence
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
"""The registered budgets."""
FURTHER = "budgets"
"""Budgets beside them, described without verdicts: three quarters, and half with one tau for all layers."""

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


_BUDGETS = ("own", "half", "three quarters", "half, one tau")

Subset = list[list[int]]
"""Kept experts of every layer, ascending."""


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


@dataclass(frozen=True)
class Budget:
    """Subsets with the same number of experts in every layer.

    Attributes
    ----------
    counts : list of int
        Kept experts of each layer.
    methods : dict of str to Subset
        What methods keep.
    drawn : dict of str to list of Subset
        Random subsets, by how they are drawn.
    """

    counts: list[int]
    methods: dict[str, Subset]
    drawn: dict[str, list[Subset]]


def random_subset(counts: Sequence[int], experts: int, random: np.random.Generator) -> Subset:
    """Draw a subset of each layer's experts, uniformly among those of the given sizes."""
    return [sorted(random.choice(experts, count, replace=False).tolist()) for count in counts]


def stratified_subset(
    counts: Sequence[int], experts: int, slices: int, random: np.random.Generator
) -> Subset:
    """Draw a subset that spreads over the slices as evenly as its size allows.

    Expert e is a copy of slice ``e % slices``. With as many experts as slices, each slice has one.
    """
    drawn = []
    for count in counts:
        copies = random.permuted(np.arange(experts).reshape(-1, slices), axis=0)
        # Each row has one copy of every slice.
        drawn.append(sorted(random.permuted(copies, axis=1).ravel()[:count].tolist()))
    return drawn


def measure(name: str, step: str = STEP, *, sizes: Sizes | None = None, folder: Path | None = None) -> Record:
    """Measure one training of the matched set, or read its record.

    Parameters
    ----------
    name : str
        Such as ``"upcycled-3"``.
    step : {"selection", "budgets"}, default="selection"
        Which budgets: see `STEP` and `FURTHER`.
    sizes : Sizes, optional
        How much is measured; by default what was registered, and 39 subsets for further budgets.
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
    return measurement(name, step, sizes=sizes, folder=folder).answer()


def measurement(
    name: str, step: str = STEP, *, sizes: Sizes | None = None, folder: Path | None = None
) -> Measurement:
    """Make the measurement of :func:`measure`."""
    from moeits.study import anatomy, corpus, trained

    text = corpus.load("heldout")
    sizes = sizes or (Sizes() if step == STEP else Sizes(subsets=39, stratified=0))
    inputs = {
        "model": name,
        "weights": trained.weights_digest(trained.find(name).folder),
        "text": corpus.text_digest(text),
        "calibration": corpus.text_digest(corpus.load("calibration")),
        "sizes": asdict(sizes),
    }

    def run() -> tuple[list[dict[str, Any]], dict[str, Any]]:
        read = anatomy.sample(text, sizes.documents, sizes.context, anatomy.token_bytes())
        return trial(name, trained.load(name), read, corpus.load("calibration").ids, sizes, step)

    folder = folder or anatomy.RECORDS
    return Measurement(folder, step, inputs, run, provenance={"device": "cpu", "dtype": "float32"})


def trial(
    name: str, model: Any, read: Any, calibration: np.ndarray, sizes: Sizes, step: str = STEP
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Measure a model in memory: see :func:`measure`."""
    from moeits.models.families import moe_layers
    from moeits.study import anatomy

    experts = moe_layers(model)[0].num_experts
    unpruned = anatomy.losses(model, read)
    details: dict[str, Any] = {
        "bytes": read.size.tolist(),
        "domain": read.domain.tolist(),
        "unpruned": rounded(unpruned),
        "budgets": {},
    }
    rows = [loss_row(name, "unpruned", 1.0, unpruned, read.size)]
    for title, budget in budgets(name, model, calibration, sizes, step).items():
        share = float(np.mean(budget.counts)) / experts
        told: dict[str, Any] = {"counts": budget.counts, "methods": {}}
        for method, kept in budget.methods.items():
            bits = anatomy.subsets(model, read, [kept])[0]
            told["methods"][method] = {"kept": kept, "bits": rounded(bits)}
            rows.append(loss_row(name, f"{method}, {title}", share, bits, read.size))
        for kind, subsets in budget.drawn.items():
            bits = anatomy.subsets(model, read, subsets)
            told[kind] = rounded(bits.sum(1))
            told[f"mean of {kind}"] = rounded(bits.mean(0))
            rows.append(loss_row(name, f"{kind}, {title}", share, bits.mean(0), read.size))
        details["budgets"][title] = told
    return rows, details


def budgets(name: str, model: Any, calibration: np.ndarray, sizes: Sizes, step: str) -> dict[str, Budget]:
    """Choose what is kept at each budget of a step, by every method and at random."""
    from moeits.models.families import expert_block, moe_layers
    from moeits.nmi import nmi_matrix
    from moeits.selection import select_experts, select_share
    from moeits.study import trained

    layers = moe_layers(model)
    experts, top_k = layers[0].num_experts, layers[0].top_k
    seed = trained.find(name).seed
    slices = trained.SLICES if not name.startswith("scratch") else None
    redundancy = {layer.layer: nmi_matrix(expert_block(layer), n_jobs=1) for layer in layers}
    choose = chooser(model, calibration, sizes.calibration, seed)

    def budget(title: str, counts: list[int], methods: Sequence[str]) -> Budget:
        random = np.random.default_rng([seed, _BUDGETS.index(title)])
        drawn = {"subsets": [random_subset(counts, experts, random) for _ in range(sizes.subsets)]}
        if slices and title == "own":
            drawn["stratified"] = [
                stratified_subset(counts, experts, slices, random) for _ in range(sizes.stratified)
            ]
        kept = zip(redundancy.values(), counts, strict=True)
        chosen = {"moeits": [list(select_experts(R, n_keep=count).kept) for R, count in kept]}
        return Budget(counts, chosen | {method: choose(method, counts) for method in methods}, drawn)

    if step == FURTHER:
        _, half = select_share(redundancy, 0.5, at_least=top_k)
        return {
            "three quarters": budget("three quarters", [experts * 3 // 4] * len(layers), CRITERIA),
            "half, one tau": budget("half, one tau", [len(one.kept) for one in half.values()], CRITERIA),
        }
    found = {"half": budget("half", [experts // 2] * len(layers), CRITERIA)}
    if slices:  # the budget that was registered for upcycled experts
        own = [len(select_experts(R, sizes.tau, at_least=top_k).kept) for R in redundancy.values()]
        found["own"] = budget("own", own, ())
    return found


def chooser(
    model: Any, calibration: np.ndarray, tokens: int, seed: int
) -> Callable[[str, Sequence[int]], Subset]:
    """Let criteria read a model and text, and return the function (method, counts) -> what it keeps."""
    import torch

    from moeits import criteria
    from moeits.criteria.statistics import gather, layers_of, random_tokens

    torch.set_num_threads(1)
    blocks = calibration[: tokens // 256 * 256].astype(np.int64).reshape(-1, 256)
    texts = {"calibration": blocks, "random": random_tokens(model, tokens, seed=seed)}
    layers = {text: layers_of(model, gather(model, read)) for text, read in texts.items()}

    def choose(method: str, counts: Sequence[int]) -> Subset:
        entry = criteria.criterion(method)
        read = layers[entry.text or "calibration"].values()
        return [list(entry.keep(layer, count)) for layer, count in zip(read, counts, strict=True)]

    return choose


def rounded(values: np.ndarray) -> list[float]:
    """Bits of documents, to a thousandth."""
    return [round(float(value), 3) for value in values]


def loss_row(name: str, method: str, share: float, bits: np.ndarray, size: np.ndarray) -> dict[str, Any]:
    """Row of a record: bits per byte over documents."""
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


def measure_all(names: Sequence[str] = (), *, jobs: int = 1) -> list[Record]:
    """Measure finished trainings of the matched set that have no record yet; all of them without `names`."""
    ready = matched(names)
    return Parallel(n_jobs=jobs)(delayed(measure)(name, step) for step in (STEP, FURTHER) for name in ready)


def matched(names: Sequence[str] = ()) -> list[str]:
    """Finished trainings of the matched set, seed by seed; those among `names`, where there are any."""
    from moeits.study import trained

    every = [f"{kind}-{seed}" for seed in trained.SEEDS for kind in trained.INITIALISATIONS]
    return [name for name in every if name in trained.finished() and (not names or name in names)]


# What the trainings say together


def differences(records: Iterable[Record]) -> pd.DataFrame:
    """Tabulate each method against the random subsets of its training.

    Parameters
    ----------
    records : iterable of Record
        Of the steps `STEP` and `FURTHER`.

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


def factors(table: pd.DataFrame) -> pd.DataFrame:
    """Separate which experts are kept (order) from how many in each layer (spread), at half of all experts.

    Parameters
    ----------
    table : DataFrame
        See :func:`differences`; of both steps.

    Returns
    -------
    DataFrame
        Per ``initialisation`` and ``factor``, the columns of :class:`Estimate` over trainings, in bits per
        byte: ``spread``, random subsets with the counts that one tau gives minus random halves of every
        layer; and for each method its order, against random subsets with its counts: ``METHOD, equal counts``
        and ``METHOD, one tau``.
    """
    titles = {"half": "equal counts", "half, one tau": "one tau"}
    half = table[table.budget.isin(titles)]
    costs = half[half.method == "moeits"].pivot_table(
        index=["initialisation", "seed"], columns="budget", values="cost"
    )
    spread = (costs["half, one tau"] - costs["half"]).dropna().rename("delta").reset_index()
    orders = half.assign(factor=half.method + ", " + half.budget.map(titles))
    both = pd.concat([spread.assign(factor="spread"), orders[["initialisation", "factor", "delta"]]])
    return estimates(both, ["initialisation", "factor"])


def estimates(table: pd.DataFrame, by: Sequence[str], value: str = "delta") -> pd.DataFrame:
    """Estimate a value over trainings, in every group that has two or more."""
    return pd.DataFrame(
        [
            dict(zip(by, names, strict=True)) | asdict(estimate(own[value].to_numpy()))
            for names, own in table.groupby(list(by), sort=False)
            if len(own) > 1
        ]
    )


def by_domain(records: Iterable[Record]) -> pd.DataFrame:
    """Tabulate each method against the mean of the random subsets, on the documents of each domain.

    Returns
    -------
    DataFrame
        ``initialisation``, ``seed``, ``budget``, ``method``, ``domain`` (its number) and ``delta``, in bits
        per byte.
    """
    rows = []
    for record in records:
        details, (kind, _, seed) = record.details, record.inputs["model"].rpartition("-")
        size, domain = np.array(details["bytes"]), np.array(details["domain"])
        for budget, told in details["budgets"].items():
            for method, one in told["methods"].items():
                bits = np.array(one["bits"]) - np.array(told["mean of subsets"])
                rows += [
                    {
                        "initialisation": kind,
                        "seed": int(seed),
                        "budget": budget,
                        "method": method,
                        "domain": int(number),
                        "delta": bits[domain == number].sum() / size[domain == number].sum(),
                    }
                    for number in np.unique(domain)
                ]
    return pd.DataFrame(rows)


def committed(step: str = STEP, folder: Path | None = None) -> list[Record]:
    """Read the records of a step; those of the registered budgets by default.

    An initialisation of which fewer trainings are measured than of another one waits until it is complete.
    """
    from moeits.machine.paths import DATA

    kinds: dict[str, list[Record]] = {}
    for record in load(folder or DATA / "study" / "records", step):
        kinds.setdefault(record.inputs["model"].rpartition("-")[0], []).append(record)
    most = max(map(len, kinds.values()), default=0)
    return [record for own in kinds.values() if len(own) == most for record in own]
