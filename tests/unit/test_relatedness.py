"""Similarity by weights and by function: planted correlations are found, and none where there is none."""

import numpy as np
import pandas as pd
import pytest
from scipy.stats import spearmanr

from moeits.book import trained_nmi
from moeits.nmi import nmi_matrix
from moeits.study import planted, relatedness
from moeits.study.records import Record


def symmetric(random, size=8):
    upper = np.triu(random.standard_normal((size, size)), 1)
    return upper + upper.T


def test_mantel_finds_a_planted_correlation():
    random = np.random.default_rng(0)
    a = symmetric(random)
    b = a + 0.3 * symmetric(random)
    pairs = np.triu_indices(8, 1)
    r, p = relatedness.mantel([(a, b)])
    assert r == pytest.approx(spearmanr(a[pairs], b[pairs]).statistic)
    assert p == pytest.approx(0.001)
    assert relatedness.mantel([(a, -b)])[0] == pytest.approx(-r)


def test_mantel_is_right_about_how_often_it_is_wrong():
    # Experts that differ in one property alone: pairs that share an expert are not independent.
    random = np.random.default_rng(0)

    def one_property():
        return relatedness.loss_likeness(random.standard_normal(8))

    p = [relatedness.mantel([(one_property(), one_property())] * 1, 199, seed)[1] for seed in range(300)]
    assert np.mean(np.array(p) <= 0.1) == pytest.approx(0.1, abs=0.05)
    assert np.mean(p) == pytest.approx(0.5, abs=0.06)


def test_many_weak_blocks_are_strong_together():
    random = np.random.default_rng(1)
    blocks = [(a, a + 2.5 * symmetric(random, 4)) for a in (symmetric(random, 4) for _ in range(40))]
    single = [relatedness.mantel([one], 199)[1] for one in blocks[:5]]
    assert min(single) > 0.02  # 24 permutations of four experts
    assert relatedness.mantel(blocks, 199)[1] < 0.02


def test_a_constant_block_says_nothing():
    random = np.random.default_rng(0)
    a, b = symmetric(random), symmetric(random)
    assert relatedness.mantel([(a, b), (a, np.zeros((8, 8)))]) == relatedness.mantel([(a, b)])
    assert np.isnan(relatedness.mantel([(a, np.zeros((8, 8)))])).all()


def test_copies_of_one_slice_are_cut_out():
    slot = np.arange(8) % 4
    parts = relatedness.within_slices(slot[:, None] * 10 + slot, 4)
    assert [part.tolist() for part in parts] == [[[11 * s] * 2] * 2 for s in range(4)]


def test_permuted_copies_are_found_by_function_and_by_aligned_weights_alone():
    random = np.random.default_rng(0)
    block = planted.random_experts(random, experts=4, neurons=16, width=24)
    block = planted.plant(random, block, [(0, 1)], "copy", 0.0)
    disguised = relatedness.permuted(block, random)
    x = random.standard_normal((5, 24))
    np.testing.assert_allclose(planted.output(disguised, 2, x), planted.output(block, 2, x), atol=1e-12)
    plain, other = nmi_matrix(block, n_jobs=1), nmi_matrix(disguised, n_jobs=1)
    aligned = nmi_matrix(disguised, n_jobs=1, align=True)
    assert plain[0, 1] == aligned[0, 1] == pytest.approx(1)
    assert other[0, 1] < 0.5


def _record(seed, output):
    layers = [[0.1, 0.2, 0.3, 0.4, 0.5, 0.6]] * 3
    random = np.random.default_rng(seed)
    noise = [random.permutation(6).tolist() for _ in range(3)]
    details = {"nmi": layers, "permuted": noise, "aligned": layers, "output": output, "together": noise}
    return Record(relatedness.STEP, {"model": f"scratch-{seed}"}, [], details | {"router": noise})


def test_correlations_are_estimated_over_trainings():
    rising = [[1, 2, 3, 4, 5, 6]] * 2
    records = [_record(seed, [*rising, [1, 2, 3, 4, 6, 5]]) for seed in range(1, 4)]
    anatomy = Record("anatomy", {"model": "scratch-1"}, [], {"removal": [[[0.1], [0.2], [0.4], [0.8]]] * 3})
    table = relatedness.correlations(records, [anatomy], 4, 99)
    assert set(table.pairs) == {"all"}
    assert set(table[table.function == "loss"].seed) == {1}
    found = relatedness.summary(table).set_index(["weights", "function"])
    one = found.loc[("nmi", "output")]
    assert one["mean"] == pytest.approx((2 + 1 - 12 / 210) / 3)
    assert relatedness.direction(relatedness.estimate([0.5, 0.6, 0.55]).verdict) == "rises"
    assert relatedness.direction(relatedness.estimate([-0.5, -0.6, -0.55]).verdict) == "falls"
    assert relatedness.direction(relatedness.estimate([-0.5, 0.6, 0.1]).verdict) == "undecided"
    assert ("nmi", "loss") not in found.index  # one training gives no error


def test_a_matrix_is_found_again_from_what_lies_above_its_diagonal():
    matrix = symmetric(np.random.default_rng(0), 5).round(2)
    np.testing.assert_allclose(relatedness.square(relatedness._upper(matrix)), matrix)


# The page


def _table(values):
    """Correlations of three trainings around planted values."""
    rows = [
        {
            "initialisation": kind,
            "seed": seed,
            "pairs": pairs,
            "weights": weights,
            "function": function,
            "r": values.get((kind, pairs, weights, function), 0.0) + noise,
            "p": 0.5,
        }
        for kind in ("scratch", "upcycled")
        for pairs in ("all", "copies of one slice")[: 1 + (kind == "upcycled")]
        for weights in relatedness.WEIGHTS
        for function in relatedness.FUNCTION
        for seed, noise in ((1, -0.05), (2, 0.0), (3, 0.05))
    ]
    return relatedness.summary(pd.DataFrame(rows))


def test_the_finding_says_what_the_intervals_say():
    family = ("upcycled", "copies of one slice", "nmi")
    table = _table({("scratch", "all", "aligned", "output"): 0.4, (*family, "output"): 0.5})
    told = trained_nmi.relatedness_finding(table)
    assert "weight NMI is not shown to follow how alike their outputs are (rank correlation +0.00" in told
    assert "matched first it rises with how alike their outputs are (+0.40 ± 0.03)" in told
    assert "likeness of outputs in 1 of 1 initialisations (mean +0.50 to +0.50)" in told
    assert "costs in 0 of 1 initialisations" in told
    opposite = trained_nmi.relatedness_finding(_table({("scratch", "all", "nmi", "output"): -0.4}))
    assert "weight NMI falls as their outputs get alike (rank correlation -0.40" in opposite
    shown = trained_nmi.relatedness_table(table)
    assert shown["outputs"].iloc[0].startswith("+0.00 [-0.12")
    assert len(shown) == 3 * 3
    assert trained_nmi.relatedness_figure(table).axes[1].get_title() == "copies of one slice"


def test_the_finding_on_thresholds_says_which_share_is_fixed():
    shares = pd.DataFrame(
        [
            {"initialisation": kind, "experts": 16, "seed": seed, "layer": 0, "tau": tau, "kept": kept}
            for seed in (1, 2)
            for tau, low in ((0.0, 0.2), (2.5, 0.9))
            for kind, kept in (("scratch", low + 0.01 * (seed - 1.5)), ("upcycled", 0.25))
        ]
    )
    told = trained_nmi.threshold_finding(shares, {"A": 0.3, "B": float("nan")}, 0.02)
    assert "keeps 0.25 of upcycled experts, whatever tau is, and from 0.20 to 0.90 of experts from" in told
    assert "A 0.3; B none of those tried; shuffled weights of the trained experts have 0.02" in told
    table = trained_nmi.shares_table(shares).set_index("initialisation")
    assert table.loc["upcycled", "tau 2.5"] == "0.250 ± 0.000"
