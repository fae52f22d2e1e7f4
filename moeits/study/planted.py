"""Experts made for testing a criterion: random ones, duplicates with a known answer, and null models.

Blocks are as in :func:`moeits.nmi.nmi_matrix`: ``gate`` and ``up`` of shape (E, m, d), ``down`` (E, d, m).
Arrays only, every draw from the generator that is given.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from moeits.errors import MoeitsError

Block = dict[str, np.ndarray]
KINDS = ("copy", "permuted", "rescaled", "unrelated")


def random_experts(
    rng: np.random.Generator, *, experts: int, neurons: int, width: int, degrees: float | None = None
) -> Block:
    """Draw independent experts.

    Parameters
    ----------
    rng : Generator
        Source of the draws.
    experts, neurons, width : int
        Number of experts E, of hidden neurons m, and width d of the residual stream.
    degrees : float, optional
        Degrees of freedom of Student's t, whose tails are heavier the fewer they are; None is the normal
        distribution. Weights have a standard deviation near 0.02 either way.

    Returns
    -------
    dict of str to ndarray of float32
        ``gate`` and ``up`` (E, m, d), ``down`` (E, d, m).
    """

    def draw(*shape: int) -> np.ndarray:
        values = rng.standard_normal(shape) if degrees is None else rng.standard_t(degrees, shape)
        return (0.02 * values).astype(np.float32)

    return {
        "gate": draw(experts, neurons, width),
        "up": draw(experts, neurons, width),
        "down": draw(experts, width, neurons),
    }


def related_experts(rng: np.random.Generator, shares: Sequence[float], *, neurons: int, width: int) -> Block:
    """Draw experts that have more or less in common: each mixes one common expert with its own weights.

    Parameters
    ----------
    rng : Generator
        Source of the draws.
    shares : sequence of float
        For each expert its correlation with the common one, in [0, 1]; two experts correlate by the product.
    neurons, width : int
        As in :func:`random_experts`.
    """
    drawn = random_experts(rng, experts=len(shares) + 1, neurons=neurons, width=width)
    common = np.asarray(shares, dtype=np.float32)[:, None, None]
    return {name: common * w[-1] + np.sqrt(1 - common**2) * w[:-1] for name, w in drawn.items()}


def output(block: Mapping[str, np.ndarray], expert: int, x: np.ndarray) -> np.ndarray:
    """Compute what an expert does to tokens: down (silu(gate x) * up x), in float64.

    Parameters
    ----------
    block : mapping of str to ndarray
        The experts.
    expert : int
        Which one.
    x : ndarray, shape (n, d)
        Tokens.

    Returns
    -------
    ndarray, shape (n, d)
    """
    gate, up, down = (np.asarray(block[name][expert], dtype=np.float64) for name in ("gate", "up", "down"))
    hidden = x @ gate.T
    return (hidden / (1 + np.exp(-hidden)) * (x @ up.T)) @ down.T


def permute(block: Mapping[str, np.ndarray], expert: int, order: Sequence[int]) -> Block:
    """Put the hidden neurons of one expert in another order, which leaves what it computes unchanged.

    Parameters
    ----------
    block : mapping of str to ndarray
        The experts; not changed.
    expert : int
        Which one.
    order : sequence of int, length m
        The neuron that comes first, second, ...
    """
    changed = {name: weights.copy() for name, weights in block.items()}
    for name in ("gate", "up"):
        changed[name][expert] = changed[name][expert][order]
    changed["down"][expert] = changed["down"][expert][:, order]
    return changed


def rescale(block: Mapping[str, np.ndarray], expert: int, factors: np.ndarray) -> Block:
    """Multiply the rows of one expert's up and divide the columns of its down: it computes the same.

    Parameters
    ----------
    block : mapping of str to ndarray
        The experts; not changed.
    expert : int
        Which one.
    factors : ndarray, shape (m,)
        A factor for each hidden neuron, not 0.
    """
    changed = {name: weights.copy() for name, weights in block.items()}
    factors = np.asarray(factors, dtype=changed["up"].dtype)
    changed["up"][expert] *= factors[:, None]
    changed["down"][expert] /= factors
    return changed


def plant(
    rng: np.random.Generator,
    block: Mapping[str, np.ndarray],
    pairs: Iterable[tuple[int, int]],
    kind: str,
    noise: float,
) -> Block:
    """Replace the second expert of each pair by a copy of the first, disguised and noisy.

    Parameters
    ----------
    rng : Generator
        Source of permutations, factors and noise.
    block : mapping of str to ndarray
        The experts; not changed.
    pairs : iterable of (int, int)
        The expert that is copied, and the one that becomes its copy.
    kind : {"copy", "permuted", "rescaled", "unrelated"}
        ``copy``: the same weights; ``permuted``: hidden neurons in another order; ``rescaled``: a log-normal
        factor (of standard deviation 0.5) for each neuron between up and down; ``unrelated``: nothing.
    noise : float
        Standard deviation of the normal noise that is then added, relative to that of each projection.

    Returns
    -------
    dict of str to ndarray

    Raises
    ------
    MoeitsError
        Unknown kind, or negative noise.
    """
    if kind not in KINDS:
        raise MoeitsError(f"kind is {kind!r}: choose one of {', '.join(KINDS)}")
    if not noise >= 0:
        raise MoeitsError(f"noise is {noise}: give 0 or more")
    planted = {name: weights.copy() for name, weights in block.items()}
    if kind == "unrelated":
        return planted
    neurons = planted["up"].shape[1]
    for original, copied in pairs:
        for weights in planted.values():
            weights[copied] = weights[original]
        if kind == "permuted":
            planted = permute(planted, copied, rng.permutation(neurons))
        elif kind == "rescaled":
            planted = rescale(planted, copied, np.exp(0.5 * rng.standard_normal(neurons)))
        for weights in planted.values():
            spread = noise * weights[original].std()
            weights[copied] += (spread * rng.standard_normal(weights[copied].shape)).astype(weights.dtype)
    return planted


def shuffled(rng: np.random.Generator, block: Mapping[str, np.ndarray]) -> Block:
    """Shuffle the weights of every matrix: the same values, in no relation to those of other experts."""
    return {
        name: np.stack([rng.permuted(matrix.ravel()).reshape(matrix.shape) for matrix in np.asarray(weights)])
        for name, weights in block.items()
    }


def fresh(rng: np.random.Generator, block: Mapping[str, np.ndarray]) -> Block:
    """Draw new experts, each weight at random among all of its projection: the same marginal distribution."""
    return {
        name: rng.choice(np.asarray(weights).ravel(), size=np.shape(weights))
        for name, weights in block.items()
    }


def noise_matrix(rng: np.random.Generator, experts: int, spread: float) -> np.ndarray:
    """Draw a symmetric matrix of scores without any structure.

    Parameters
    ----------
    rng : Generator
        Source of the draws.
    experts : int
        Number of experts E.
    spread : float
        Standard deviation of the scores relative to their mean, which is 1.

    Returns
    -------
    ndarray, shape (E, E)
        Normal scores off the diagonal, zero on it.
    """
    scores = np.triu(1 + spread * rng.standard_normal((experts, experts)), 1)
    return scores + scores.T


class Found(NamedTuple):
    """How well the removed experts match the duplicates.

    Attributes
    ----------
    precision : float
        Share of the removed experts that were the first removed of a pair; NaN if none was removed.
    recall : float
        Share of the pairs that lost an expert.
    removed : int
        Number of removed experts.
    """

    precision: float
    recall: float
    removed: int


def found(removed: Iterable[int], pairs: Iterable[tuple[int, int]]) -> Found:
    """Compare the removed experts with the pairs of duplicates.

    Removing either expert of a pair is right. Removing both is as wrong as removing an expert without a
    duplicate.

    Parameters
    ----------
    removed : iterable of int
        The removed experts.
    pairs : iterable of (int, int)
        The pairs of duplicates.
    """
    gone, pairs = set(removed), list(pairs)
    hit = sum(bool(gone & set(pair)) for pair in pairs)
    return Found(hit / len(gone) if gone else float("nan"), hit / len(pairs), len(gone))
