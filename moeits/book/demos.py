"""The numbers of the demonstrations: the NMI estimate on seeded weights, and small models to prune.

Every function is given its seed; all but :func:`small_models` work on arrays alone and return a table.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import product
from math import sqrt
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from scipy.stats import spearmanr

from moeits.histograms import as_float, discretise, joint_entropy
from moeits.nmi import nmi, nmi_matrix, nmi_zscores
from moeits.selection import DIAGONALS, select_experts
from moeits.study import paper, planted

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from transformers import PreTrainedModel

    from moeits.study.pipeline import Study


def summary(table: pd.DataFrame, by: Sequence[str], values: Sequence[str]) -> pd.DataFrame:
    """Mean, standard deviation and number of the draws of each setting.

    Parameters
    ----------
    table : DataFrame
        A row per draw.
    by : sequence of str
        Columns that name the setting.
    values : sequence of str
        Columns to summarise.

    Returns
    -------
    DataFrame
        Columns `by`, then ``VALUE``, ``VALUE_sd`` for each value, and ``draws``.
    """
    groups = table.groupby(list(by), sort=False, dropna=False)
    ends = {"": "mean", "_sd": "std"}
    moments = {f"{value}{end}": (value, how) for value in values for end, how in ends.items()}
    return groups.agg(**moments).assign(draws=groups.size()).reset_index()


def measured_pair(x: np.ndarray, y: np.ndarray, bins: str | int = "auto") -> dict[str, float]:
    """Measure NMI of two arrays with what its bias depends on.

    Returns
    -------
    dict
        ``nmi``; ``bins``, occupied ones of x; ``guide``, the first-order bias of the mutual information of
        independent arrays, (Bx - 1)(By - 1) / 2N nats, over the geometric mean of the entropies.
    """
    a, b = discretise(x, bins), discretise(y, bins)
    mean = sqrt(a.entropy * b.entropy)
    guide = (a.counts.size - 1) * (b.counts.size - 1) / (2 * a.codes.size)
    shared = max(a.entropy + b.entropy - joint_entropy(a, b), 0.0)
    return {"nmi": shared / mean, "bins": a.counts.size, "guide": guide / mean}


def bins_curve(
    numbers: Iterable[int | str], correlations: Iterable[float], *, size: int, draws: int, seed: int = 0
) -> pd.DataFrame:
    """NMI of two normal arrays against the number of bins.

    Parameters
    ----------
    numbers : iterable of int or "auto"
        Numbers of bins.
    correlations : iterable of float
        Correlations of the two arrays; 0 is independence.
    size, draws : int
        Elements of an array, and pairs of arrays.
    seed : int
        Seed; each draw has its own generator.

    Returns
    -------
    DataFrame
        correlation, number, nmi, bins, guide; a row per draw.
    """
    rows = []
    for draw in range(draws):
        x, noise = np.random.default_rng([seed, draw]).standard_normal((2, size))
        for r in correlations:
            y = r * x + sqrt(1 - r * r) * noise
            rows += [{"correlation": r, "number": n, **measured_pair(x, y, n)} for n in numbers]
    return pd.DataFrame(rows)


def bias_curve(
    sizes: Iterable[int], *, draws: int, bins: Iterable[int | str] = ("auto", 64), seed: int = 0
) -> pd.DataFrame:
    """NMI of two independent normal arrays against the number of weights, whose true value is 0.

    Returns
    -------
    DataFrame
        size, number ("auto" or the fixed number of bins), nmi, bins, guide; a row per draw.
    """
    return pd.DataFrame(
        [
            {"size": size, "number": number, **measured_pair(x, y, number)}
            for size in sizes
            for draw in range(draws)
            for x, y in [np.random.default_rng([seed, size, draw]).standard_normal((2, size))]
            for number in bins
        ]
    )


def tails(*, size: int, draws: int, seed: int = 0) -> pd.DataFrame:
    """NMI of independent arrays with tails and outliers of several kinds, whose true value is 0.

    Returns
    -------
    DataFrame
        weights (what kind), nmi, bins, guide; a row per draw.
    """
    rows = []
    for draw in range(draws):
        rng = np.random.default_rng([seed, draw])
        normal = rng.standard_normal((2, size))
        kinds = {"uniform": rng.random((2, size)), "normal": normal}
        for deviations in (10, 50):
            kinds[f"normal, one weight at {deviations} sd"] = normal.copy()
            kinds[f"normal, one weight at {deviations} sd"][:, 0] = deviations
        kinds |= {f"Student's t, {degrees} degrees": rng.standard_t(degrees, (2, size)) for degrees in (5, 3)}
        rows += [{"weights": kind, **measured_pair(*arrays)} for kind, arrays in kinds.items()]
    return pd.DataFrame(rows)


def disguises(*, neurons: int, width: int, seed: int = 0) -> pd.DataFrame:
    """NMI of an expert with disguised copies of itself, which compute what it computes.

    Returns
    -------
    DataFrame
        copy (what was done to it); difference, the largest relative one of outputs on 64 random tokens;
        gate, up, down: NMI of each projection with the original's; mean.
    """
    rng = np.random.default_rng(seed)
    block = planted.random_experts(rng, experts=2, neurons=neurons, width=width)
    factors = np.exp(0.5 * rng.standard_normal(neurons))
    unrelated = {name: weights[1] for name, weights in block.items()}
    block = {name: weights[:1] for name, weights in block.items()}
    copies = {
        "the same weights": block,
        "one factor for all neurons": planted.rescale(block, 0, np.full(neurons, 2.0)),
        "up and down negated": planted.rescale(block, 0, np.full(neurons, -1.0)),
        "a different factor for each neuron": planted.rescale(block, 0, factors),
        "a random half of the neurons negated": planted.rescale(block, 0, rng.choice([-1.0, 1.0], neurons)),
        "neurons in another order": planted.permute(block, 0, rng.permutation(neurons)),
    }
    tokens = 10 * rng.standard_normal((64, width))
    expected = planted.output(block, 0, tokens)
    rows = []
    for name, copy in copies.items():
        gap = np.abs(planted.output(copy, 0, tokens) - expected).max() / np.abs(expected).max()
        rows.append(
            {"copy": name, "difference": gap, **{part: nmi(block[part], copy[part]) for part in block}}
        )
    other = {"copy": "(an unrelated expert)", "difference": np.nan}
    rows.append(other | {part: nmi(block[part], unrelated[part]) for part in block})
    return pd.DataFrame(rows).assign(mean=lambda table: table[["gate", "up", "down"]].mean(axis=1))


def kept_by_diagonal(R: np.ndarray, taus: Iterable[float]) -> pd.DataFrame:
    """Count the experts that Algorithm 3 keeps with each diagonal.

    Returns
    -------
    DataFrame
        diagonal, tau, kept, threshold.
    """
    chosen = ((d, tau, select_experts(R, tau, diagonal=d)) for d in DIAGONALS for tau in taus)
    rows = [(diagonal, tau, len(one.kept), one.threshold) for diagonal, tau, one in chosen]
    return pd.DataFrame(rows, columns=["diagonal", "tau", "kept", "threshold"])


def shared_projection(weights: Mapping[str, float] | None, *, seed: int = 0) -> pd.DataFrame:
    """Redundancy of pairs of experts that share one projection only, with weights of the projections.

    Parameters
    ----------
    weights : mapping of str to float, or None
        For :func:`moeits.nmi.nmi_matrix`.
    seed : int
        Of the experts.

    Returns
    -------
    DataFrame
        shared (gate, up, down or nothing), redundancy.
    """
    rng = np.random.default_rng(seed)
    block = planted.random_experts(rng, experts=8, neurons=32, width=64)
    for pair, name in enumerate(("gate", "up", "down")):
        block[name][2 * pair + 1] = block[name][2 * pair]
    R = nmi_matrix(block, projection_weights=weights, n_jobs=1)
    return pd.DataFrame(
        {
            "shared": ["gate", "up", "down", "nothing"],
            "redundancy": [R[2 * pair, 2 * pair + 1] for pair in range(4)],
        }
    )


def top_weights(experts: int, top: int, left: Iterable[int], *, tokens: int, seed: int = 0) -> pd.DataFrame:
    """Sum the weights of a token's top experts when random experts are removed, for normal logits.

    Parameters
    ----------
    experts, top : int
        Experts of the layer, and experts per token.
    left : iterable of int
        Numbers of remaining experts.
    tokens, seed : int
        Tokens, and the seed of their logits and of the order of removal.

    Returns
    -------
    DataFrame
        experts_left; sum_of_weights, a mean over the tokens, and sd_over_tokens, without normalisation;
        normalised; n.
    """
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal((tokens, experts))
    order = rng.permutation(experts)
    rows = []
    for number in left:
        scores = np.exp(logits[:, order[:number]])
        scores /= scores.sum(axis=1, keepdims=True)
        largest = np.sort(scores, axis=1)[:, -top:].sum(axis=1)
        rows.append((number, largest.mean(), largest.std(ddof=1), 1.0, tokens))
    return pd.DataFrame(rows, columns=["experts_left", "sum_of_weights", "sd_over_tokens", "normalised", "n"])


def small_models(seed: int = 0) -> dict[str, "PreTrainedModel"]:
    """Random models of three layers and eight experts in the classes of the paper's models.

    Parameters
    ----------
    seed : int
        Seed of the weights; torch's global generator is set to it.

    Returns
    -------
    dict of str to PreTrainedModel
        Model type -> model in evaluation mode; a token uses two experts.
    """
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    torch.manual_seed(seed)
    common = dict.fromkeys(
        ("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size"), 32
    )
    common |= {"vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    common |= {"num_key_value_heads": 2, "num_experts_per_tok": 2}
    deepseek = {"n_routed_experts": 8, "n_shared_experts": 1, "first_k_dense_replace": 1, "q_lora_rank": None}
    deepseek |= {"kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 16}
    deepseek |= {"num_key_value_heads": 4, "head_dim": 8}
    own = {"mixtral": {"num_local_experts": 8}, "qwen2_moe": {"num_experts": 8}, "deepseek_v2": deepseek}
    return {
        kind: AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**common | settings)).eval()
        for kind, settings in own.items()
    }


def paper_noise(
    implied: Mapping[str, Mapping[str, float]],
    settings: Iterable[tuple[str, float]],
    *,
    draws: int,
    seed: int = 0,
) -> pd.DataFrame:
    """Count what Algorithm 3 keeps for matrices of noise, at the paper's tau for each of its models.

    Parameters
    ----------
    implied : mapping of str to mapping
        Model -> ``experts`` and ``kept`` per layer, as :func:`moeits.book.audit.implied_kept` gives them.
    settings : iterable of (str, float)
        Diagonals, as in :func:`moeits.selection.select_experts`, and standard deviations of the scores
        relative to their mean.
    draws, seed : int
        Matrices per setting; each draw has its own generator.

    Returns
    -------
    DataFrame
        model, tau, experts, implied, diagonal, spread, setting (both in words), kept, kept_sd, draws.
    """
    setting = ["model", "tau", "experts", "implied", "diagonal", "spread", "setting"]
    rows = []
    for model, one in implied.items():
        tau, experts = paper.TAU[model], int(one["experts"])
        for diagonal, spread in settings:
            words = "diagonal excluded" if diagonal == "exclude" else f"diagonal 0, spread {100 * spread:g} %"
            for draw in range(draws):
                R = planted.noise_matrix(np.random.default_rng([seed, draw]), experts, spread)
                kept = len(select_experts(R, tau, diagonal=diagonal).kept)
                rows.append((model, tau, experts, one["kept"], diagonal, spread, words, kept))
    return summary(pd.DataFrame(rows, columns=[*setting, "kept"]), setting, ["kept"])


def plants(
    kinds: Iterable[str],
    noises: Iterable[float],
    budgets: Mapping[str, Mapping[str, object]],
    *,
    estimates: Mapping[str, Callable[[planted.Block], np.ndarray]] | None = None,
    experts: int = 16,
    copies: int = 4,
    neurons: int = 32,
    width: int = 64,
    draws: int = 5,
    seed: int = 0,
) -> pd.DataFrame:
    """Plant copies of experts, let Algorithm 3 remove experts, and compare.

    Parameters
    ----------
    kinds, noises
        As in :func:`moeits.study.planted.plant`.
    budgets : mapping of str to mapping
        Name -> arguments of :func:`moeits.selection.select_experts`, such as ``{"tau": 1.25}``.
    estimates : mapping of str to callable, optional
        Name -> function that makes the matrix R of a block; :func:`moeits.nmi.nmi_matrix` without it.
    experts, copies, neurons, width : int
        Experts in all, copies among them, and the experts' size.
    draws, seed : int
        Blocks per setting; each draw has its own generator.

    Returns
    -------
    DataFrame
        kind, noise, estimate, budget, precision, recall, removed; a row per draw.
    """
    estimates = estimates or {"NMI": partial(nmi_matrix, n_jobs=1)}
    rows = []
    for kind, noise, draw in product(kinds, noises, range(draws)):
        rng = np.random.default_rng([seed, draw])
        block = planted.random_experts(rng, experts=experts, neurons=neurons, width=width)
        pairs = rng.permutation(experts)[: 2 * copies].reshape(copies, 2).tolist()
        block = planted.plant(rng, block, pairs, kind, noise)
        for estimate, measure in estimates.items():
            R = measure(block)
            for budget, given in budgets.items():
                result = planted.found(select_experts(R, **given).removed, pairs)
                setting = {"kind": kind, "noise": noise, "estimate": estimate, "budget": budget}
                rows.append(setting | result._asdict())
    return pd.DataFrame(rows)


def estimates() -> dict[str, Callable[[planted.Block], np.ndarray]]:
    """Name the plain estimate of the matrix R and four corrected ones, for :func:`plants`."""
    return {
        "plain": partial(nmi_matrix, n_jobs=1),
        "Miller-Madow": partial(nmi_matrix, n_jobs=1, correction="miller-madow"),
        "null subtracted": partial(nmi_matrix, n_jobs=1, correction="null"),
        "z-score": partial(nmi_zscores, draws=4, n_jobs=1),
        "aligned": partial(nmi_matrix, n_jobs=1, align=True),
    }


def draw_recall(axis: "Axes", table: pd.DataFrame, *, by: str, apart: float = 0.0) -> None:
    """Draw a curve of the mean recall over the noise for each value of a column, with standard errors.

    Parameters
    ----------
    axis : Axes
        Where to draw.
    table : DataFrame
        A :func:`summary` of :func:`plants`.
    by : str
        The column.
    apart : float
        Distance of the curves' markers, so that they do not hide each other.
    """
    noises = table.noise.unique()
    groups = table.groupby(by, sort=False)
    for number, (name, part) in enumerate(groups):
        at = np.arange(len(noises)) + apart * (number - (len(groups) - 1) / 2)
        axis.errorbar(at, part.recall, part.recall_sd / np.sqrt(part.draws), ms=4, label=name)
    axis.set_xticks(range(len(noises)), [f"{noise:g}" for noise in noises])
    axis.set(xlabel="noise / weights", ylim=(-0.05, 1.05))


def null_models(studies: Mapping[str, "Study"], *, every: int, diagonal: str, seed: int = 0) -> pd.DataFrame:
    """Compare models' experts with null experts, at each model's own tau.

    Parameters
    ----------
    studies : mapping of str to Study
        Model -> its study.
    every : int
        Take every so many-th layer.
    diagonal, seed
        As in :func:`null_layers`.

    Returns
    -------
    DataFrame
        As :func:`null_layers`, with the column model.
    """
    from moeits.models.checkpoint import expert_blocks

    tables = []
    for name, study in studies.items():
        blocks = list(expert_blocks(study.folder))[::every]
        tau, least = study.profile.model(name).tau, blocks[0][1].minimum
        found = null_layers(blocks, tau, diagonal=diagonal, at_least=least, seed=seed)
        tables.append(found.assign(model=name))
    return pd.concat(tables)


def against_nulls(nulls: pd.DataFrame) -> pd.DataFrame:
    """Summarise :func:`null_models`, a row for each model.

    Returns
    -------
    DataFrame
        model; layers; ratio of the mean NMI, real / shuffled; z, the difference of these means in standard
        deviations of a shuffled pair; spread and kept share for each kind of experts; rank correlation of the
        pairs' NMI; share of the kept experts that are kept in both.
    """
    rows = []
    for name, part in nulls.groupby("model", sort=False):
        kinds = {kind: of.set_index("layer") for kind, of in part.groupby("experts", sort=False)}
        real, null = kinds["real"], kinds["shuffled"]
        row = {
            "model": name,
            "layers": len(real),
            "real / shuffled": real["mean"].mean() / null["mean"].mean(),
        }
        row["z"] = ((real["mean"] - null["mean"]) / null.sd).median()
        row |= {f"spread, {kind}": of.spread.median() for kind, of in kinds.items()}
        row |= {f"kept, {kind}": of.kept.mean() / of.of.mean() for kind, of in kinds.items()}
        row["rank correlation"] = null.correlation.median()
        rows.append(row | {"kept in both": null.same_kept.sum() / real.kept.sum()})
    return pd.DataFrame(rows)


def null_layers(
    blocks: Iterable[tuple[int, Mapping[str, np.ndarray]]],
    tau: float,
    *,
    diagonal: str = "zero",
    at_least: int = 1,
    seed: int = 0,
) -> pd.DataFrame:
    """Compare the NMI of real experts with that of null experts of the same weights.

    Parameters
    ----------
    blocks : iterable of (int, mapping)
        Layers and their experts, as :func:`moeits.models.checkpoint.expert_blocks` gives them.
    tau, diagonal, at_least
        As in :func:`moeits.selection.select_experts`.
    seed : int
        Seed of the null experts.

    Returns
    -------
    DataFrame
        layer; experts (real, shuffled or fresh); mean and sd of the NMI over pairs, spread = sd / mean; kept
        experts, of how many; rank correlation of the pairs' NMI with the real one; experts kept in both.
    """
    rows = []
    for layer, block in blocks:
        real = {name: np.stack([as_float(expert) for expert in weights]) for name, weights in block.items()}
        rng = np.random.default_rng([seed, layer])
        kinds = {"real": real, "shuffled": planted.shuffled(rng, real), "fresh": planted.fresh(rng, real)}
        found = {}
        for kind, weights in kinds.items():
            R = nmi_matrix(weights, n_jobs=1)
            pairs = R[np.triu_indices_from(R, 1)]
            kept = set(select_experts(R, tau, diagonal=diagonal, at_least=at_least).kept)
            found[kind] = (pairs, kept)
            rows.append(
                {
                    "layer": layer,
                    "experts": kind,
                    "mean": pairs.mean(),
                    "sd": pairs.std(ddof=1),
                    "kept": len(kept),
                    "of": len(R),
                    "correlation": spearmanr(found["real"][0], pairs).statistic,
                    "same_kept": len(found["real"][1] & kept),
                }
            )
    return pd.DataFrame(rows).assign(spread=lambda table: table.sd / table["mean"])
