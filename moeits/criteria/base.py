"""What a criterion takes and gives: weights and statistics of a layer in, kept experts out. Arrays only."""

import math
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, combinations, product

import numpy as np

from moeits.errors import BudgetError, MoeitsError

SCORES = ("softmax", "sigmoid")


@dataclass(frozen=True)
class Routing:
    """How a router turns logits into the weights of experts.

    Attributes
    ----------
    scores : {"softmax", "sigmoid"}
        Function of the logits.
    top_k : int
        Experts per token.
    normalised : bool
        Whether the weights of the chosen experts are divided by their sum.
    scale : float
        Factor on the weights.
    bias : ndarray, shape (E,)
        Added to the scores for the choice of experts, not for their weights.
    groups, top_groups : int, default=1
        Groups of experts, of which a token's are those with the largest scores.
    ranked_by : int, default=1
        A group's score is the sum of that many of its best experts' scores.
    """

    scores: str
    top_k: int
    normalised: bool
    scale: float
    bias: np.ndarray
    groups: int = 1
    top_groups: int = 1
    ranked_by: int = 1

    def gates(self, logits: np.ndarray, kept: Sequence[int] | None = None) -> np.ndarray:
        """Weights of the experts when only some of them are left.

        Parameters
        ----------
        logits : ndarray, shape (n, E)
            Of all experts.
        kept : sequence of int, optional
            Experts that are left; all by default.

        Returns
        -------
        ndarray, shape (n, E)
            Zero for experts that a token does not use.
        """
        ids = np.arange(logits.shape[1]) if kept is None else np.asarray(kept)
        left = logits[:, ids]
        if self.scores == "softmax":
            scores = np.exp(left - left.max(axis=1, keepdims=True))
            scores /= scores.sum(axis=1, keepdims=True)
        else:
            scores = 1 / (1 + np.exp(-left))
        top_k = min(self.top_k, len(ids) * self.top_groups // self.groups)
        ranked = scores + self.bias[ids]
        if self.groups > 1:
            group = ids // (logits.shape[1] // self.groups)
            best = [np.sort(ranked[:, group == g], axis=1)[:, -self.ranked_by :] for g in range(self.groups)]
            order = np.argsort(-np.stack([part.sum(axis=1) for part in best], axis=1), axis=1, kind="stable")
            # Minus infinity in all groups but the first of this order.
            ranked[np.argsort(order, axis=1)[:, group] >= self.top_groups] = -np.inf
        chosen = np.argsort(-ranked, axis=1, kind="stable")[:, :top_k]
        weights = np.take_along_axis(scores, chosen, axis=1)
        if self.normalised:
            weights = weights / weights.sum(axis=1, keepdims=True)
        gates = np.zeros(logits.shape)
        np.put_along_axis(gates, ids[chosen], self.scale * weights, axis=1)
        return gates


@dataclass(frozen=True)
class Statistics:
    """What one pass over calibration text tells about a layer of E experts, width d, m neurons per expert.

    Sums run over all tokens; the sample is spread evenly over them.

    Attributes
    ----------
    tokens : int
        Tokens of the text.
    counts : ndarray, shape (E,)
        Tokens that use the expert.
    weights : ndarray, shape (E,)
        Sum of the router's weights.
    norms, weighted_norms : ndarray, shape (E,)
        Sum of the norm of its output, and of weight times norm, over the tokens that use the expert.
    coactivation : ndarray, shape (E, E)
        Tokens that use both experts; the diagonal is `counts`.
    inputs_squared : ndarray, shape (E, d)
        Sum of (weight x input)^2 over the tokens that use the expert.
    neurons_squared : ndarray, shape (E, m)
        The same of its hidden neurons.
    logits, gates : ndarray, shape (n, E)
        Of n sampled tokens: the router's logits, and the weights that the experts' outputs were summed with.
    gram : ndarray, shape (n, E, E)
        Of the sampled tokens: inner products of the outputs of all experts.
    mean_outputs : ndarray, shape (E, d)
        Mean output of every expert over the sampled tokens.
    routing : Routing or None
        The rule that gives `gates` from `logits`; None if no known one does.
    """

    tokens: int
    counts: np.ndarray
    weights: np.ndarray
    norms: np.ndarray
    weighted_norms: np.ndarray
    coactivation: np.ndarray
    inputs_squared: np.ndarray
    neurons_squared: np.ndarray
    logits: np.ndarray
    gates: np.ndarray
    gram: np.ndarray
    mean_outputs: np.ndarray
    routing: Routing | None


@dataclass
class Memory:
    """Results for a layer that several budgets and methods share.

    Attributes
    ----------
    known : dict
        Key -> what was computed, and the seconds that it took.
    asked : set
        Keys that were asked for.
    spared : float
        Seconds saved by what was known at first.
    """

    known: dict[Hashable, tuple[object, float]] = field(default_factory=dict)
    asked: set[Hashable] = field(default_factory=set)
    spared: float = 0.0

    def once(self, key: Hashable, compute: Callable[[], object]) -> object:
        """Look up a result, or compute it."""
        if key not in self.known:
            start = time.perf_counter()
            found = compute()
            self.known[key] = found, time.perf_counter() - start
        elif key not in self.asked:
            self.spared += self.known[key][1]
        self.asked.add(key)
        return self.known[key][0]


@dataclass(frozen=True)
class Layer:
    """One Mixture-of-Experts layer, as criteria see it.

    Attributes
    ----------
    number : int
        Number of the decoder layer.
    block : mapping of str to array or tensor
        ``gate`` (E, m, d), ``up`` (E, m, d), ``down`` (E, d, m).
    router : ndarray, shape (E, d)
        Rows of the router.
    family : str
        The model's ``model_type``.
    minimum, groups : int
        Fewest experts with which the layer works, and groups of its router, which must stay equally large.
    calibration : Statistics, optional
        Of the text that the criterion reads; read as :attr:`statistics`.
    loss : callable, optional
        Kept experts -> the model's loss on calibration text, in nats per token, when this layer has only
        them and every other layer is unpruned.
    seed : int, default=0
        Seed of random choices.
    memory : Memory
        What :meth:`once` has computed, from weights and statistics alone, never from the seed.
    """

    number: int
    block: Mapping[str, object]
    router: np.ndarray
    family: str = ""
    minimum: int = 1
    groups: int = 1
    calibration: Statistics | None = None
    loss: Callable[[Sequence[int]], float] | None = None
    seed: int = 0
    memory: Memory = field(default_factory=Memory, repr=False, compare=False)

    @property
    def experts(self) -> int:
        """Number of routed experts."""
        return len(self.block["down"])

    @property
    def statistics(self) -> Statistics:
        """Statistics of the text that the criterion reads; a MoeitsError where none were gathered."""
        if self.calibration is None:
            raise MoeitsError(f"layer {self.number}: this criterion needs statistics of text")
        return self.calibration

    @property
    def routing(self) -> Routing:
        """Rule of the router; a BudgetError where it is not known, and so its choice among fewer experts."""
        if self.statistics.routing is None:
            raise BudgetError(
                f"layer {self.number}: the router of this {self.family!r} model is not a top-k of softmax or "
                "sigmoid scores, so its choice among fewer experts is not known"
            )
        return self.statistics.routing

    @property
    def weights(self) -> dict[str, np.ndarray]:
        """Weights of all experts in float32, copied: gate (E, m, d), up (E, m, d), down (E, d, m)."""
        return {
            name: np.array(part.float().cpu().numpy() if hasattr(part, "cpu") else part, dtype=np.float32)
            for name, part in self.block.items()
        }

    @property
    def neurons(self) -> np.ndarray:
        """Weights by neuron, (E, m, 3d): its row of gate, its row of up, its column of down."""
        weights = self.weights
        rows = [weights[name] for name in ("gate", "up") if name in weights]
        return np.concatenate([*rows, weights["down"].transpose(0, 2, 1)], axis=2)

    def once(self, key: Hashable, compute: Callable[["Layer"], object]) -> object:
        """Compute something once for all budgets that need it."""
        return self.memory.once(key, partial(compute, self))


Score = Callable[[Layer], np.ndarray]
Spread = Callable[[Mapping[int, Layer], float, Score | None], dict[int, int]]


def best(scores: np.ndarray, n_keep: int, groups: int = 1) -> tuple[int, ...]:
    """Keep the `n_keep` largest scores (E,), as many in each of the groups; of equal ones, the first."""
    parts = np.split(np.asarray(scores), groups)
    return in_groups(lambda g, n: np.argsort(-parts[g], kind="stable")[:n], len(scores), n_keep, groups)


def in_groups(
    choose: Callable[[int, int], Sequence[int]], experts: int, n_keep: int, groups: int
) -> tuple[int, ...]:
    """Keep as many experts of each group of a router.

    `choose` takes a group and a number, and gives the members to keep, counted from the group's first
    expert.
    """
    size = experts // groups
    return tuple(
        sorted(group * size + int(k) for group in range(groups) for k in choose(group, n_keep // groups))
    )


def number_of_subsets(layer: Layer, n_keep: int) -> int:
    """Count the subsets of `n_keep` experts with as many in each group of the router."""
    return math.comb(layer.experts // layer.groups, n_keep // layer.groups) ** layer.groups


def all_subsets(layer: Layer, n_keep: int) -> Iterator[tuple[int, ...]]:
    """List these subsets in lexicographic order."""
    size = layer.experts // layer.groups
    parts = [
        combinations(range(start, start + size), n_keep // layer.groups)
        for start in range(0, layer.experts, size)
    ]
    return (tuple(chain.from_iterable(part)) for part in product(*parts))


def equal_groups(counts: Mapping[int, int], layers: Mapping[int, Layer]) -> dict[int, int]:
    """Round the experts to keep in each layer to a multiple of its groups.

    What that adds or takes is carried to the next layer: the sum stays near where the minima allow it.
    """
    rounded, carried = {}, 0
    for number, layer in layers.items():
        wanted = counts[number] + carried
        nearest = (2 * wanted + layer.groups) // (2 * layer.groups) * layer.groups
        rounded[number] = min(max(nearest, layer.minimum), layer.experts)
        carried = wanted - rounded[number] if layer.groups > 1 else 0
    return rounded


def uniform(layers: Mapping[int, Layer], share: float, _: Score | None = None) -> dict[int, int]:
    """Spread a share over the layers: the same share of each, rounded half up, at least its minimum."""
    return {
        number: min(max(int(share * layer.experts + 0.5), layer.minimum), layer.experts)
        for number, layer in layers.items()
    }


def across_layers(layers: Mapping[int, Layer], share: float, score: Score) -> dict[int, int]:
    """Spread a share: keep the largest scores of all layers together, each layer's minimum first."""
    counts = {number: layer.minimum for number, layer in layers.items()}
    total = round(share * sum(layer.experts for layer in layers.values()))
    ordered = {number: np.sort(score(layer))[::-1] for number, layer in layers.items()}
    rest = [(-value, number) for number, values in ordered.items() for value in values[counts[number] :]]
    for _, number in sorted(rest)[: max(total - sum(counts.values()), 0)]:
        counts[number] += 1
    return counts
