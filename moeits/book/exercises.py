"""Self-checks of the exercises: each tries a function on seeded cases and names the first that fails.

A check never raises, so a page with unsolved exercises still runs.
"""

from collections.abc import Callable, Iterator
from math import inf, isclose, log

import numpy as np

from moeits.errors import MoeitsError
from moeits.nmi import nmi, nmi_matrix
from moeits.selection import select_experts, select_share
from moeits.study import paper, planted
from moeits.study.tables import chance_jaccard

Check = Callable[[Callable], Iterator[str]]


def check(name: str, answer: Callable) -> bool:
    """Check an answer, print the result, and return whether the answer is right.

    Parameters
    ----------
    name : str
        Name of the exercise, one of :data:`EXERCISES`.
    answer : callable
        The reader's function.

    Raises
    ------
    MoeitsError
        If there is no such exercise.
    """
    if name not in EXERCISES:
        raise MoeitsError(f"no exercise {name!r}: there are {', '.join(EXERCISES)}")
    try:
        problem = next(EXERCISES[name](answer), None)
    except Exception as error:  # whatever the reader's function raises is their answer
        problem = f"It raised {type(error).__name__}: {error}"
    print(f"{name}: right" if problem is None else f"{name}: not yet. {problem}")
    return problem is None


def _near(got: object, expected: float, tolerance: float = 1e-9) -> bool:
    return isinstance(got, int | float | np.number) and isclose(
        float(got), expected, rel_tol=tolerance, abs_tol=tolerance
    )


def _entropy(answer: Callable) -> Iterator[str]:
    for counts in ([1, 1], [4, 2, 1, 1], [3, 0, 5], [7]):
        filled = [count for count in counts if count]
        expected = sum(-c / sum(filled) * log(c / sum(filled)) for c in filled)
        if not _near(got := answer(counts), expected):
            yield f"For the counts {counts} it returns {got}; expected {expected:.6f} nats."


def _weights(answer: Callable) -> Iterator[str]:
    rng = np.random.default_rng(0)
    for kept in ([0, 1, 2, 3, 4, 5], [0, 2, 5], [1]):
        for normalise in (False, True):
            logits = rng.standard_normal(6)
            scores = np.exp(logits[kept]) / np.exp(logits[kept]).sum()
            top = np.argsort(-scores)[:2]
            expected = np.zeros(6)
            expected[np.array(kept)[top]] = scores[top] / (scores[top].sum() if normalise else 1)
            got = answer(logits, kept, 2, normalise)
            if np.shape(got) != (6,) or not np.allclose(got, expected):
                yield f"For kept = {kept}, normalise = {normalise} it returns {got}; expected {expected}."


def _selection(answer: Callable) -> Iterator[str]:
    for draw in range(30):
        R = planted.noise_matrix(np.random.default_rng(draw), 8, 0.3)
        for tau in (0.2, 1.0, 3.0):
            expected = list(select_experts(R, tau).kept)
            got = answer(R.copy(), tau)
            if got is None or sorted(got) != expected:
                where = f"noise_matrix(default_rng({draw}), 8, 0.3), tau = {tau}"
                yield f"On {where} it keeps {got}; expected {expected}."


def _correction(answer: Callable) -> Iterator[str]:
    def mean(r: float, estimate: Callable) -> float:
        found = []
        for draw in range(5):
            x, noise = np.random.default_rng(draw).standard_normal((2, 4096))
            found.append(estimate(x, r * x + (1 - r * r) ** 0.5 * noise))
        return float(np.mean(found))

    plain, corrected = mean(0, nmi), mean(0, answer)
    if not abs(corrected) < plain / 2:
        yield f"Unrelated arrays still score {corrected:.4f} on average; the plain estimate is {plain:.4f}."
    related = mean(0.9, answer)
    if not related > mean(0.9, nmi) / 2:
        yield f"Arrays with a correlation of 0.9 score only {related:.4f}: the correction is too large."


def _disguise(answer: Callable) -> Iterator[str]:
    rng = np.random.default_rng(0)
    block = planted.random_experts(rng, experts=2, neurons=64, width=96)
    changed = answer({name: weights.copy() for name, weights in block.items()})
    if changed is None:
        yield "It returns nothing."
    tokens = 10 * rng.standard_normal((32, 96))
    expected = planted.output(block, 0, tokens)
    if not np.allclose(
        planted.output(changed, 1, tokens), expected, rtol=1e-3, atol=1e-6 * np.abs(expected).max()
    ):
        yield "Expert 1 does not compute what expert 0 computes."
    level = nmi_matrix(block, n_jobs=1)[0, 1]
    R = nmi_matrix({name: np.stack([block[name][0], changed[name][1]]) for name in block}, n_jobs=1)
    if not R[0, 1] < 1.5 * level:
        yield f"NMI detects the copy: it scores {R[0, 1]:.3f}, unrelated experts score {level:.3f}."


def _refit(answer: Callable) -> Iterator[str]:
    rng = np.random.default_rng(0)
    hidden, start = rng.standard_normal((40, 6)), rng.standard_normal((6, 3))
    wanted = hidden @ rng.standard_normal((6, 3)) + rng.standard_normal((40, 3))
    for penalty in (0.0, 5.0, 1e9):
        # The same problem as one of plain least squares, with the penalty as rows of its own.
        rows = np.concatenate([hidden, penalty**0.5 * np.eye(6)])
        targets = np.concatenate([wanted, penalty**0.5 * start])
        expected = np.linalg.lstsq(rows, targets, rcond=None)[0]
        got = answer(hidden.copy(), wanted.copy(), start.copy(), penalty)
        if np.shape(got) != (6, 3):
            yield f"It returns {got}; expected an array of the shape of start, (6, 3)."
        elif not np.allclose(got, expected, rtol=1e-4, atol=1e-4):
            off = np.abs(np.asarray(got) - expected).max()
            yield f"With a penalty of {penalty:g} the largest difference from the best weights is {off:.3g}."


def _overlap(answer: Callable) -> Iterator[str]:
    for first, second, experts in ((2, 2, 4), (1, 3, 5), (4, 4, 8), (5, 5, 5)):
        expected = chance_jaccard(first, second, experts)
        if not _near(got := answer(first, second, experts), expected, 1e-6):
            yield f"For sets of {first} and {second} of {experts} it returns {got}; expected {expected:.6f}."


def _payback(answer: Callable) -> Iterator[str]:
    for seconds, before, after in ((10.0, 20.0, 25.0), (600.0, 100.0, 101.0)):
        expected = seconds / (1 / before - 1 / after)
        if not _near(got := answer(seconds, before, after), expected, 1e-6):
            asked = f"{seconds:g} s, {before:g} and {after:g} tokens/s"
            yield f"For {asked} it returns {got}; expected {expected:g}."
    for after in (20.0, 19.0):
        if answer(10.0, 20.0, after) != inf:
            yield f"From 20 to {after:g} tokens/s it never pays for itself: return math.inf."


def _lead(answer: Callable) -> Iterator[str]:
    for number in paper.TABLES:
        margins = paper.margins(number).set_index("method").lead_without_hellaswag
        for method in ("MoE-I2", "MoE-Pruner"):
            got = answer(paper.table(number), method)
            if not _near(got, margins[method], 1e-6):
                yield f"In Table {number} against {method} it returns {got}; expected {margins[method]:.4f}."


def _budget(answer: Callable) -> Iterator[str]:
    matrices = {
        layer: planted.noise_matrix(np.random.default_rng(layer), 12, 0.2 + 0.05 * layer)
        for layer in range(4)
    }
    for share in (0.4, 0.6, 0.8):
        tau = answer(matrices, share)
        if tau is None:
            yield "It returns nothing."
        kept = sum(len(select_experts(R, tau).kept) for R in matrices.values()) / 48
        best = sum(len(s.kept) for s in select_share(matrices, share)[1].values()) / 48
        if abs(kept - share) > abs(best - share) + 1 / 48:
            yield f"For a share of {share} its tau of {tau:.4f} keeps {kept:.3f}; {best:.3f} is possible."


EXERCISES: dict[str, Check] = {
    "entropy": _entropy,
    "weights": _weights,
    "selection": _selection,
    "correction": _correction,
    "disguise": _disguise,
    "lead": _lead,
    "budget": _budget,
    "refit": _refit,
    "overlap": _overlap,
    "payback": _payback,
}
"""The checks by the names of the exercises."""
