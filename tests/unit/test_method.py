"""The paper's equations and Algorithm 3 as the package runs them."""

import inspect
import json
import math
import re
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from golden_cases import CASES, WEIGHTS, matrix, name, weights

from moeits import method
from moeits.histograms import auto_bins
from moeits.machine.paths import BOOK, NOTEBOOKS
from moeits.nmi import nmi_matrix
from moeits.selection import select_experts, select_share

FUNCTIONS = sorted(
    name for name, f in vars(method).items() if inspect.isfunction(f) and f.__module__ == method.__name__
)


def counts(x, y=None):
    """Histogram of a matrix, or of two, in the bins of the golden values."""
    edges = []
    for v in [x] if y is None else [x, y]:
        lower, upper = np.percentile(v, [25, 75])
        edges.append(np.histogram_bin_edges(v, auto_bins(v.size, float(v.max() - v.min()), upper - lower)))
    found = np.histogram(x, edges[0])[0] if y is None else np.histogram2d(x, y, edges)[0]
    return found[found > 0]


def entropy(c):
    return method.entropy(float((c * np.log(c)).sum()), int(c.sum()))


@pytest.mark.parametrize("case", WEIGHTS[:4], ids=name)
def test_the_equations_give_the_golden_matrices(case):
    W = [w.ravel() for w in weights(case)]
    joint = np.zeros((len(W), len(W)))
    for i, j in combinations(range(len(W)), 2):
        joint[i, j] = joint[j, i] = entropy(counts(W[i], W[j]))
    r = method.nmi_of_pairs(np.array([entropy(counts(w)) for w in W]), joint)
    np.testing.assert_allclose(method.redundancy([r, r], [0.5, 0.5]), case["nmi"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("case", CASES, ids=name)
def test_algorithm_3_keeps_the_golden_lists(case):
    R = matrix(case)
    for tau, kept in case["kept"].items():
        steps, limit = method.select(R, float(tau))
        assert sorted(set(range(len(R))) - {step.removed for step in steps}) == kept, tau
        assert limit == method.redundancy_limit(*method.mean_and_iqr(R), float(tau))


def test_the_equations_by_hand():
    # A fair coin and a die of four equal sides, of which the coin is the parity.
    hx, hy = method.entropy(2 * 4 * math.log(4), 8), method.entropy(4 * 2 * math.log(2), 8)
    assert (hx, hy) == pytest.approx((math.log(2), math.log(4)))
    assert method.mutual_information(hx, hy, hy) == pytest.approx(math.log(2))
    assert method.nmi(hx, hy, hy) == pytest.approx(1 / math.sqrt(2))


class ReachedError(Exception):
    pass


@pytest.mark.parametrize("function", FUNCTIONS)
def test_what_is_defined_here_is_what_runs(function, monkeypatch):
    block = {"up": np.random.default_rng(0).standard_normal((4, 8, 8))}
    R = nmi_matrix(block, n_jobs=1)

    def reached(*_, **__):
        raise ReachedError

    monkeypatch.setattr(method, function, reached)
    if function in ("entropy", "mutual_information", "nmi", "nmi_of_pairs", "redundancy"):
        with pytest.raises(ReachedError):
            nmi_matrix(block, n_jobs=1)
        return
    for select in (lambda: select_experts(R, 0.5), lambda: select_share({1: R}, 0.5)):
        with pytest.raises(ReachedError):
            select()


def test_groups_remove_by_the_same_step(monkeypatch):
    R = nmi_matrix({"up": np.random.default_rng(0).standard_normal((4, 8, 8))}, n_jobs=1)
    asked = []
    removal = method.removal
    monkeypatch.setattr(method, "removal", lambda *given: asked.append(given) or removal(*given))
    assert len(select_experts(R, n_keep=2, groups=2).removed) == len(asked) == 2


def test_the_theory_page_shows_all_of_the_code():
    file = Path(method.__file__)
    assert len(file.read_text().splitlines()) < 200
    cells = json.loads((NOTEBOOKS / "theory.ipynb").read_text())["cells"]
    text = "".join(line for cell in cells for line in [*cell["source"], "\n"])
    included = re.findall(r"\{literalinclude\} (\S+)\n:language: python\n(?::pyobject: (\w+))?", text)
    shown = {((BOOK / "notebooks" / place).resolve(), part) for place, part in included}
    assert {part for place, part in shown if place == file} == {*FUNCTIONS, "Step"}
    assert (file.with_name("simplify.py"), "") in shown
