"""What a trained Mixture-of-Experts model is like inside: losses, routing, the worth of each expert, weights.

Arrays at the bottom, then passes of one model over a sample of held-out text, then the record of one model.
Everything is measured on whole documents, each read from its beginning up to `Sizes.context` tokens, equally
many of every domain; errors are those over documents.
"""

import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from joblib import Parallel, delayed
from torch import Tensor, nn

from moeits.errors import MoeitsError
from moeits.evaluation import ratio
from moeits.machine.paths import DATA
from moeits.models.families import expert_block, moe_layers
from moeits.models.surgery import masked
from moeits.nmi import nmi_matrix, null_nmi
from moeits.study import corpus, trained
from moeits.study.measurement import Measurement
from moeits.study.records import Record, row
from moeits.study.training import is_sparse, routers, routing

RECORDS = DATA / "study" / "records"
STEP = "anatomy"

IDLE = 0.1
"""An expert is idle if it gets less than this share of a uniform load."""

SLICES = {"copied": 1, "fine_grained": 15}
"""Slices of the parent's FFN, by how the experts began; those of the matched set by default.

Experts from scratch are grouped alike: what their "copies" share is shared by chance.
"""

PASSAGES = {
    "Gunrock: A Social Bot for Complex and Engaging Long Conversations": "QASPER (CC BY 4.0)",
    "Write a function to find the volume of a cone.\nimport math": "MBPP (CC BY 4.0)",
}
"""First words of the held-out documents whose tokens are shown with their experts, and their source."""

_BATCH = 2048  # tokens: larger batches leave the processor's cache
_RARE = 20  # occurrences below which a token is not among an expert's top tokens
_TOP = 6  # tokens that are kept of each expert
_SHOWN = 64  # tokens of a passage


@dataclass(frozen=True)
class Sizes:
    """How much is measured.

    Attributes
    ----------
    documents : int
        Documents of each domain for the losses and the routing of the model as it is; all where there are
        fewer.
    rerouted : int
        The same, for changed routing.
    removed : int
        The same, for removed experts.
    context : int
        Tokens of a document that are read.
    shuffles : int
        Orders of the routers' rows.
    subsets : int
        Random halves.
    permutations : int
        Permutations of the documents' domains.
    nulls : int
        Shuffles of the weights.
    """

    documents: int = 90
    rerouted: int = 20
    removed: int = 8
    context: int = 256
    shuffles: int = 3
    subsets: int = 39
    permutations: int = 100
    nulls: int = 2


# Arrays


def mutual_information(shares: np.ndarray) -> float:
    """Mutual information of expert and domain, in nats, every domain being equally likely.

    Parameters
    ----------
    shares : ndarray, shape (domains, E)
        How the choices of each domain's tokens are spread over the experts; rows sum to 1.

    Returns
    -------
    float
        From 0, where all rows are alike, to the log of the number of domains, where no two share an expert.
    """
    mean = shares.mean(0)
    logs = np.log(shares, out=np.zeros_like(shares), where=shares > 0)
    return float((shares * logs).sum(1).mean() - (mean[mean > 0] * np.log(mean[mean > 0])).sum())


def domain_shares(counts: np.ndarray, domain: np.ndarray) -> np.ndarray:
    """Spread of each domain's choices over the experts.

    Parameters
    ----------
    counts : ndarray of int, shape (documents, E)
        Choices of each expert in each document.
    domain : ndarray of int, shape (documents,)
        Domain of each document, from 0; each has one or more.

    Returns
    -------
    ndarray, shape (domains, E)
        Rows sum to 1.
    """
    sums = np.stack([counts[domain == number].sum(0) for number in range(domain.max() + 1)])
    return sums / sums.sum(1, keepdims=True)


def specialisation(
    counts: np.ndarray, domain: np.ndarray, permutations: int, seed: int = 0
) -> tuple[float, float, float]:
    """Mutual information of expert and domain, and that of documents whose domains are permuted.

    Parameters
    ----------
    counts, domain
        As in :func:`domain_shares`.
    permutations : int
        How many, 2 or more.
    seed : int, default=0
        Of the permutations.

    Returns
    -------
    measured, null, spread : float
        In nats: as measured, and mean and standard deviation over the permutations. Documents choose their
        own experts for other reasons than their domain, too, so that the null exceeds what independent
        tokens would give. Measured minus null estimates the mutual information without bias where there is
        none.
    """
    random = np.random.default_rng(seed)
    null = [
        mutual_information(domain_shares(counts, random.permutation(domain))) for _ in range(permutations)
    ]
    return (
        mutual_information(domain_shares(counts, domain)),
        float(np.mean(null)),
        float(np.std(null, ddof=1)),
    )


def co_activation(chosen: np.ndarray, experts: int) -> np.ndarray:
    """Which experts are chosen together.

    Parameters
    ----------
    chosen : ndarray of int, shape (tokens, top-k)
        Experts of each token.
    experts : int
        E.

    Returns
    -------
    ndarray, shape (E, E)
        Tokens that chose both, over tokens that chose either: 1 on the diagonal, 0 for experts never chosen.
    """
    hot = np.zeros((len(chosen), experts), np.float32)
    np.put_along_axis(hot, chosen.astype(np.int64), 1, axis=1)
    both = hot.T @ hot
    either = np.diag(both)[:, None] + np.diag(both) - both
    return np.divide(both, either, out=np.zeros_like(both), where=either > 0)


def halves(experts: int, layers: int, subsets: int, seed: int) -> np.ndarray:
    """Draw random halves of the experts of every layer.

    Parameters
    ----------
    experts, layers, subsets : int
        E, L, and how many halves.
    seed : int
        Of the draws; a subset does not depend on how many are drawn.

    Returns
    -------
    ndarray of int, shape (subsets, L, E // 2)
        Kept experts, ascending.
    """
    drawn = [
        [np.sort(random.choice(experts, experts // 2, replace=False)) for _ in range(layers)]
        for random in (np.random.default_rng([seed, number]) for number in range(subsets))
    ]
    return np.array(drawn)


def spread(costs: np.ndarray, size: np.ndarray) -> dict[str, float]:
    """Cost of subsets: how much they differ, and how well the text can tell that.

    Parameters
    ----------
    costs : ndarray, shape (subsets, documents)
        Loss increase in bits.
    size : ndarray, shape (documents,)
        Bytes.

    Returns
    -------
    dict of str to float
        In bits per byte: ``mean`` over the subsets and its standard error over the text, ``error``; ``sd``
        over the subsets; ``difference``, the standard error over the text of the paired difference of two
        subsets (root mean square over all pairs).
    """
    mean, error = ratio(costs.mean(0), size)
    pairs = [ratio(costs[i] - costs[j], size)[1] for i, j in combinations(range(len(costs)), 2)]
    return {
        "mean": mean,
        "error": error,
        "sd": float((costs.sum(1) / size.sum()).std(ddof=1)),
        "difference": float(np.sqrt(np.mean(np.square(pairs)))),
    }


def same_slice(experts: int, slices: int) -> np.ndarray:
    """Say which pairs of experts are copies of one slice, in the order of `initialisation.slices`.

    Returns
    -------
    ndarray of bool, shape (E, E)
        False on the diagonal.
    """
    slot = np.arange(experts) % slices
    return (slot[:, None] == slot) & ~np.eye(experts, dtype=bool)


def by_ancestry(R: np.ndarray, slices: int) -> tuple[float, float]:
    """Mean NMI of copies of one slice, and of all other pairs (NaN where there are none)."""
    copies = same_slice(len(R), slices)
    others = ~copies & ~np.eye(len(R), dtype=bool)
    return tuple(float(R[mask].mean()) if mask.any() else math.nan for mask in (copies, others))


# Text


@dataclass(frozen=True)
class Sample:
    """Documents to be read.

    Attributes
    ----------
    ids : list of ndarray of int
        Token ids of each document, `corpus.END` first.
    domain : ndarray of int, shape (documents,)
        Number of each document's domain.
    size : ndarray of int, shape (documents,)
        UTF-8 bytes of what is read of each document.
    """

    ids: list[np.ndarray]
    domain: np.ndarray
    size: np.ndarray

    def batches(self) -> Iterator[tuple[np.ndarray, Tensor, Tensor]]:
        """Documents of similar length together: their numbers, ids and which ids are text.

        Ids end in padding, which a causal model does not see: no mask is needed.
        """
        order = np.argsort([len(ids) for ids in self.ids], kind="stable")[::-1]
        while order.size:
            longest = len(self.ids[order[0]])
            rows, order = np.split(order, [max(1, _BATCH // longest)])
            ids = np.zeros((len(rows), longest), np.int64)
            lengths = np.array([len(self.ids[number]) for number in rows])
            for line, number in zip(ids, rows, strict=True):
                line[: len(self.ids[number])] = self.ids[number]
            yield rows, torch.from_numpy(ids), torch.from_numpy(np.arange(longest) < lengths[:, None])


@cache
def token_bytes() -> np.ndarray:
    """UTF-8 bytes of every token of the corpus, shape (vocabulary,); those of `corpus.END` are none."""
    vocabulary = _tokenizer().get_vocab()
    size = np.zeros(len(vocabulary), np.int64)
    for token, number in vocabulary.items():
        size[number] = 0 if token == corpus.END else len(token)  # one character stands for one byte
    return size


def sample(text: corpus.Text, count: int, context: int, size: np.ndarray) -> Sample:
    """Take the first documents of every domain.

    Parameters
    ----------
    text : Text
        Text whose documents are in random order.
    count : int
        Documents of each domain; all where there are fewer.
    context : int
        Tokens of each that are read.
    size : ndarray of int, shape (vocabulary,)
        Bytes of each token.

    Returns
    -------
    Sample
        Domain after domain; a smaller sample's documents are among a larger one's.
    """
    numbers = np.concatenate([np.flatnonzero(text.domain == d)[:count] for d in np.unique(text.domain)])
    ids = [text.document(number)[:context].astype(np.int64) for number in numbers]
    return Sample(ids, text.domain[numbers].astype(np.int64), np.array([size[one].sum() for one in ids]))


# Passes of a model over text


def losses(
    model: nn.Module, read: Sample, see: Callable[[np.ndarray, Tensor, Tensor], None] | None = None
) -> np.ndarray:
    """Loss of every document.

    Parameters
    ----------
    model : torch.nn.Module
        Causal language model.
    read : Sample
        Documents.
    see : callable, optional
        Called after each batch with what :meth:`Sample.batches` gave.

    Returns
    -------
    ndarray of float64, shape (documents,)
        Bits.
    """
    bits = np.empty(len(read.ids))
    with torch.inference_mode():
        for rows, ids, valid in read.batches():
            read_on = valid[:, 1:]
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1][read_on]
            nats = torch.zeros(read_on.shape, dtype=torch.float64)
            # Over contiguous rows: three times as fast as over a transposed dimension.
            nats[read_on] = nn.functional.cross_entropy(
                logits, ids[:, 1:][read_on], reduction="none"
            ).double()
            bits[rows] = nats.sum(1).numpy() / math.log(2)
            if see is not None:
                see(rows, ids, valid)
    return bits


@dataclass(frozen=True)
class Routes:
    """What the routers choose for every token of a sample.

    Attributes
    ----------
    document, token : ndarray of int, shape (tokens,)
        Number of the document, and token id.
    chosen : ndarray of int, shape (L, tokens, top-k)
        Chosen experts.
    first : ndarray of int, shape (L, tokens)
        The likeliest expert.
    experts : int
        E.
    """

    document: np.ndarray
    token: np.ndarray
    chosen: np.ndarray
    first: np.ndarray
    experts: int

    def counts(self, layer: int) -> np.ndarray:
        """Choices of each expert in each document, shape (documents, E), of the layer at this position."""
        cells = self.document[:, None] * self.experts + self.chosen[layer]
        documents = self.document.max() + 1
        return np.bincount(cells.ravel(), minlength=documents * self.experts).reshape(documents, -1)


def routes(model: nn.Module, read: Sample) -> tuple[np.ndarray, Routes]:
    """Losses of documents, in bits, and the experts that their tokens choose."""
    seen: list[tuple[np.ndarray, ...]] = []
    with routing(model) as held:

        def see(rows: np.ndarray, ids: Tensor, valid: Tensor) -> None:
            kept = valid.flatten()
            seen.append(
                (
                    np.repeat(rows, valid.sum(1)),
                    ids.flatten()[kept].numpy(),
                    np.stack([chosen[kept].numpy() for _, chosen in held.values()]),
                    np.stack([logits[kept].argmax(1).numpy() for logits, _ in held.values()]),
                )
            )

        bits = losses(model, read, see)
        experts = next(iter(held.values()))[0].shape[1]
    document, token, chosen, first = zip(*seen, strict=True)
    joined = np.concatenate(document), np.concatenate(token)
    return bits, Routes(*joined, np.concatenate(chosen, 1), np.concatenate(first, 1), experts)


Change = Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]
"""Takes a layer, routing weights and chosen experts, both (tokens, top-k); returns others."""


@contextmanager
def rerouted(model: nn.Module, change: Change) -> Iterator[nn.Module]:
    """Run a model whose tokens go to other experts, or with other weights, than its routers say."""

    def hook(number: int) -> Callable[[nn.Module, tuple, tuple], tuple]:
        return lambda _, __, outputs: (*outputs[:-2], *change(number, *outputs[-2:]))

    handles = [router.register_forward_hook(hook(number)) for number, router in routers(model).items()]
    try:
        yield model
    finally:
        for handle in handles:
            handle.remove()


def shuffled_rows(experts: int, seed: int) -> Change:
    """Shuffle the rows of every router: each expert gets the tokens of another one."""

    def change(number: int, weights: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
        order = torch.from_numpy(np.random.default_rng([seed, number]).permutation(experts))
        return weights, order[chosen]

    return change


def random_experts(experts: int, seed: int) -> Change:
    """Choose experts at random for every token, each with the weight of the one in whose place it is."""
    generator = torch.Generator().manual_seed(seed)

    def change(_: int, weights: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
        drawn = torch.rand(len(chosen), experts, generator=generator)
        return weights, drawn.topk(chosen.shape[1]).indices

    return change


def uniform_weights(_: int, weights: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Give the chosen experts of a token equal weights, of the same sum."""
    return weights.mean(1, keepdim=True).expand_as(weights), chosen


def removals(model: nn.Module, read: Sample) -> np.ndarray:
    """Losses with each single expert removed, in bits: shape (L, E, documents)."""
    found = []
    for layer in moe_layers(model):
        every = range(layer.num_experts)
        kept = [[e for e in every if e != expert] for expert in every]
        found.append([_without(model, {layer.layer: one}, read) for one in kept])
    return np.array(found)


def subsets(model: nn.Module, read: Sample, kept: Iterable[Sequence[Sequence[int]]]) -> np.ndarray:
    """Losses with subsets of the experts, in bits: shape (subsets, documents).

    Each subset is a list of the kept experts of every Mixture-of-Experts layer.
    """
    numbers = [layer.layer for layer in moe_layers(model)]
    return np.array([_without(model, dict(zip(numbers, one, strict=True)), read) for one in kept])


def _without(model: nn.Module, kept: Mapping[int, Sequence[int]], read: Sample) -> np.ndarray:
    with masked(model, kept):
        return losses(model, read)


# The record of a model


def measure(name: str, *, sizes: Sizes = Sizes(), folder: Path | None = None) -> Record:
    """Measure one finished model, or read its record.

    Parameters
    ----------
    name : str
        One of `trained.plans`.
    sizes : Sizes
        How much is measured.
    folder : Path, optional
        Folder of the records; that of the study by default.

    Returns
    -------
    Record
        Found by weights, text and sizes; the version of the code is provenance. Its rows are the summary; its
        `details` the arrays, by layer, expert and domain.

    Raises
    ------
    MissingError
        If the model has not been trained.
    """
    return measurement(name, sizes=sizes, folder=folder).answer()


def measurement(name: str, *, sizes: Sizes = Sizes(), folder: Path | None = None) -> Measurement:
    """Make the measurement of :func:`measure`."""
    plan = trained.find(name)
    text = corpus.load("heldout")
    inputs = {
        "model": name,
        "weights": trained.weights_digest(plan.folder),
        "text": corpus.text_digest(text),
        "sizes": asdict(sizes),
    }

    def run() -> tuple[list[dict[str, Any]], dict[str, Any]]:
        torch.set_num_threads(1)
        clock = time.process_time()
        samples = [
            sample(text, count, sizes.context, token_bytes())
            for count in (sizes.documents, sizes.rerouted, sizes.removed)
        ]
        samples.append(passages(text))
        model = trained.load(name)
        rows, details = anatomy(model, samples, sizes, seed=plan.seed, slices=_slices(plan))
        begin = name.removesuffix(f"-{plan.seed}")
        details |= {"initialisation": begin, "seed": plan.seed, "domains": list(corpus.DOMAINS)}
        details["cpu_seconds"] = round(time.process_time() - clock, 1)
        return [row(model=name, **one) for one in rows], details

    how = {"device": "cpu", "dtype": "float32"}
    return Measurement(folder or RECORDS, STEP, inputs, run, provenance=how)


def measure_all(names: Iterable[str] = (), *, jobs: int = 1) -> list[Record]:
    """Measure every finished model that has no record yet; a killed run goes on where it was.

    Parameters
    ----------
    names : iterable of str
        Models; all of `trained.plans` by default.
    jobs : int, default=1
        Processes, one thread each.

    Returns
    -------
    list of Record
        Of the finished ones among them.
    """
    wanted = set(names) or trained.plans().keys()
    ready = [name for name in trained.finished() if name in wanted]
    return Parallel(n_jobs=jobs)(delayed(measure)(name) for name in ready)


def anatomy(
    model: nn.Module, samples: Sequence[Sample], sizes: Sizes, *, seed: int, slices: int
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Measure a model in memory.

    Parameters
    ----------
    model : torch.nn.Module
        Dense or Mixture-of-Experts model in float32.
    samples : sequence of Sample
        For the model as it is, for changed routing, for removed experts, and to be shown.
    sizes : Sizes
        How much is measured.
    seed : int
        Of everything that is drawn.
    slices : int
        Slices of the parent's FFN that the experts are copies of.

    Returns
    -------
    rows : list of dict
        As :func:`moeits.study.records.row` takes them, without the model.
    details : dict
        Arrays as lists, rounded to four digits.
    """
    whole, changed, removed, shown = samples
    if not is_sparse(model):
        bits = losses(model, whole)
        return _loss_rows(bits, whole), _loss_details(bits, whole)
    bits, chosen = routes(model, whole)
    rows, details = _loss_rows(bits, whole), _loss_details(bits, whole)
    for part in (
        _rerouting(model, changed, sizes, seed),
        _usage(model, chosen, whole, sizes),
        _worth(model, removed, sizes, seed),
        _ancestry(model, sizes, slices),
    ):
        rows += part[0]
        details |= part[1]
    return rows, details | {"slices": slices, "passages": coloured(model, shown)}


def _loss_rows(bits: np.ndarray, read: Sample) -> list[dict[str, Any]]:
    return [_per_byte("bits per byte", "held-out text", bits, read, task, of) for task, of in _domains(read)]


def _loss_details(bits: np.ndarray, read: Sample) -> dict[str, Any]:
    documents = {"bits": _rounded(bits), "bytes": read.size.tolist(), "domain": read.domain.tolist()}
    return {"documents": documents}


def _rerouting(model: nn.Module, read: Sample, sizes: Sizes, seed: int) -> tuple[list, dict]:
    """Cost of other routing than the routers'."""
    experts = moe_layers(model)[0].num_experts
    changes = {
        "shuffled router rows": [shuffled_rows(experts, seed * 1000 + n) for n in range(sizes.shuffles)],
        "random experts": [random_experts(experts, seed)],
        "uniform weights": [uniform_weights],
    }
    before = losses(model, read)
    rows = []
    for variant, forms in changes.items():
        after = []
        for change in forms:
            with rerouted(model, change):
                after.append(losses(model, read))
        cost = np.mean(after, 0) - before
        rows += [
            _per_byte("loss increase", variant, cost, read, task, of, method="rerouted")
            for task, of in _domains(read)
        ]
    return rows, {}


def _usage(model: nn.Module, chosen: Routes, read: Sample, sizes: Sizes) -> tuple[list, dict]:
    """Load, specialisation, co-activation, top tokens."""
    rows, load, shares, together, top = [], [], [], [], []
    for position, layer in enumerate(moe_layers(model)):
        counts = chosen.counts(position)
        load.append(counts.sum(0) / counts.sum())
        shares.append(domain_shares(counts, read.domain))
        together.append(co_activation(chosen.chosen[position], chosen.experts))
        top.append(top_tokens(chosen.token, chosen.chosen[position], chosen.experts, decode=_decode))
        measured, null, sd = specialisation(counts, read.domain, sizes.permutations)
        task, n = f"layer {layer.layer}", len(read.ids)
        idle = float((load[-1] < IDLE / chosen.experts).mean())
        information = {"task": task, "metric": "mutual information", "unit": "nats", "n": n}
        rows += [
            information | {"variant": "expert and domain", "value": measured - null, "stderr": sd},
            information | {"variant": "domains permuted", "value": null, "stderr": sd},
            {"task": task, "metric": "idle experts", "value": idle, "unit": "share", "n": chosen.experts},
            {
                "task": task,
                "metric": "largest load",
                "value": float(load[-1].max() * chosen.experts),
                "unit": "times uniform",
                "n": len(chosen.token),
            },
        ]
    return rows, {
        "layers": [layer.layer for layer in moe_layers(model)],
        "load": _rounded(load),
        "shares": _rounded(shares),
        # symmetric: the part above the diagonal, row by row
        "together": [_rounded(matrix[np.triu_indices(chosen.experts, 1)]) for matrix in together],
        "top_tokens": top,
    }


def _worth(model: nn.Module, read: Sample, sizes: Sizes, seed: int) -> tuple[list, dict]:
    """Cost of removing single experts and random halves."""
    before = losses(model, read)
    costs = removals(model, read) - before
    layers, experts = costs.shape[:2]
    pairs = [
        [[ratio(one[of], read.size[of]) for _, of in _domains(read)] for one in layer] for layer in costs
    ]
    values, errors = np.moveaxis(np.array(pairs), -1, 0)
    drawn = subsets(model, read, halves(experts, layers, sizes.subsets, seed)) - before
    told = spread(drawn, read.size)
    half = {"task": "all", "metric": "loss increase", "method": "random halves", "unit": "bits per byte"}
    half |= {"kept_share": (experts // 2) / experts, "n": len(read.ids)}
    single = half | {"method": "one expert removed", "kept_share": (experts - 1) / experts}
    rows = [
        half | {"variant": "mean", "value": told["mean"], "stderr": told["error"]},
        half | {"variant": "sd over subsets", "value": told["sd"]},
        half | {"variant": "error of a difference over text", "value": told["difference"]},
        single | {"variant": "largest", "value": float(values[..., 0].max())},
        single | {"variant": "median", "value": float(np.median(values[..., 0]))},
    ]
    return rows, {
        # last axis: all, then the domains
        "removal": _rounded(values),
        "removal_error": _rounded(errors[..., 0]),
        "halves": _rounded(drawn.sum(1) / read.size.sum()),
        "removal_documents": len(read.ids),
    }


def _ancestry(model: nn.Module, sizes: Sizes, slices: int) -> tuple[list, dict]:
    """NMI of the weights, of copies of one slice, of other pairs and of shuffled weights."""
    rows, matrices = [], []
    for layer in moe_layers(model):
        block = expert_block(layer)
        R, null = nmi_matrix(block, n_jobs=1), null_nmi(block, sizes.nulls, n_jobs=1)
        matrices.append(R)
        pairs = np.triu_indices(len(R), 1)
        values = dict(zip(("copies of one slice", "other pairs"), by_ancestry(R, slices), strict=True))
        values["shuffled weights"] = float(null[:, *pairs].mean())
        rows += [
            {"task": f"layer {layer.layer}", "metric": "nmi", "variant": variant, "value": value, "n": len(R)}
            for variant, value in values.items()
            if not math.isnan(value)
        ]
        # How far single pairs of shuffled weights lie from their mean.
        rows[-1]["stderr"] = float(null[:, *pairs].std(ddof=1))
    return rows, {"nmi": [_rounded(R[np.triu_indices(len(R), 1)]) for R in matrices]}


def top_tokens(
    token: np.ndarray, chosen: np.ndarray, experts: int, *, decode: Callable[[int], str]
) -> list[list[list]]:
    """Tokens that choose an expert most reliably.

    Parameters
    ----------
    token : ndarray of int, shape (tokens,)
        Token ids.
    chosen : ndarray of int, shape (tokens, top-k)
        Their experts.
    experts : int
        E.
    decode : callable
        Maps a token id to its text.

    Returns
    -------
    list of list of [str, float]
        For each expert up to six tokens with the share of their occurrences that choose it, largest first;
        tokens that occur fewer than 20 times are left out.
    """
    vocabulary = token.max() + 1
    seen = np.bincount(token, minlength=vocabulary)
    cells = np.repeat(token, chosen.shape[1]) * experts + chosen.ravel()
    counts = np.bincount(cells, minlength=vocabulary * experts).reshape(vocabulary, experts)
    share = np.where(seen[:, None] >= _RARE, counts / np.maximum(seen, 1)[:, None], 0)
    best = np.argsort(-share, axis=0, kind="stable")[:_TOP].T
    return [
        [[decode(number), float(f"{share[number, e]:.3g}")] for number in own if share[number, e] > 0]
        for e, own in enumerate(best)
    ]


def passages(text: corpus.Text) -> Sample:
    """Find the documents of `PASSAGES` and take their first tokens.

    Raises
    ------
    MoeitsError
        If the text does not hold one of them.
    """
    openings = [_tokenizer().decode(text.document(number)[:_SHOWN].tolist()) for number in range(len(text))]
    numbers = []
    for first in PASSAGES:
        number = next((n for n, opening in enumerate(openings) if opening.startswith(first)), None)
        if number is None:
            raise MoeitsError(f"no held-out document begins with {first!r}: name another in anatomy.PASSAGES")
        numbers.append(number)
    ids = [text.document(number)[: _SHOWN + 1].astype(np.int64) for number in numbers]
    return Sample(
        ids, text.domain[numbers].astype(np.int64), np.array([token_bytes()[one].sum() for one in ids])
    )


def coloured(model: nn.Module, read: Sample) -> list[dict[str, Any]]:
    """Tokens of documents as texts, and the likeliest expert of each in every layer (L, tokens)."""
    _, found = routes(model, read)
    return [
        {
            "tokens": [_decode(token) for token in found.token[found.document == number][1:]],
            "experts": found.first[:, found.document == number][:, 1:].tolist(),
        }
        for number in range(len(read.ids))
    ]


def _slices(plan: trained.Plan) -> int:
    return SLICES.get(plan.begin.__name__, trained.SLICES)


def _domains(read: Sample) -> list[tuple[str, np.ndarray]]:
    """Name and documents of everything together and of every domain."""
    each = [(corpus.DOMAINS[number], read.domain == number) for number in np.unique(read.domain)]
    return [("all", np.ones(len(read.ids), bool)), *each]


def _per_byte(
    metric: str, variant: str, bits: np.ndarray, read: Sample, task: str, of: np.ndarray, **more: Any
) -> dict[str, Any]:
    value, error = ratio(bits[of], read.size[of])
    return {
        "task": task,
        "metric": metric,
        "variant": variant,
        "value": value,
        "stderr": None if math.isnan(error) else error,
        "n": int(of.sum()),
        "unit": "bits per byte",
        "higher_is_better": False,
        **more,
    }


def _rounded(values: Any) -> Any:
    """Nested lists of an array's numbers, with four digits each."""
    return json.loads(
        json.dumps(np.asarray(values, float).tolist()), parse_float=lambda x: float(f"{float(x):.4g}")
    )


@cache
def _tokenizer() -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(corpus.tokenizer_file()))


def _decode(token: int) -> str:
    return _tokenizer().decode([int(token)], skip_special_tokens=False)
