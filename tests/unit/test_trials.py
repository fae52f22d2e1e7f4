"""The registered experiment: random subsets, differences over trainings, verdicts, the sequence of tests."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as some

from moeits.study import trials
from moeits.study.records import Record


def record(kind, seed, *, method=10.0, subsets=(11.0, 12.0, 13.0), stratified=10.0, unpruned=5.0):
    """Two documents of 4 bytes each; bits of both together."""
    one = {
        "counts": [4, 4],
        "methods": {"moeits": {"kept": [], "bits": [method / 2, method / 2]}},
        "subsets": list(subsets),
    }
    if kind != "scratch":
        one["stratified"] = [stratified]
    details = {
        "bytes": [4, 4],
        "domain": [0, 1],
        "unpruned": [unpruned / 2, unpruned / 2],
        "budgets": {"own": one, "half": one},
    }
    return Record(trials.STEP, {"model": f"{kind}-{seed}"}, [], details)


def test_a_difference_is_taken_from_the_mean_of_the_subsets():
    table = trials.differences([record("drop-upcycled", 3)]).set_index("budget").loc["half"]
    assert table.initialisation == "drop-upcycled"
    assert table.seed == 3
    assert table.delta == pytest.approx((10 - 12) / 8)
    assert table.from_stratified == pytest.approx(0)
    assert table.cost == pytest.approx((12 - 5) / 8)
    assert table.spread == pytest.approx(1 / 8)
    assert table.percentile == pytest.approx(1 / 4)  # no subset is as good
    worst = trials.differences([record("btm", 1, method=13.0)])
    assert worst.percentile.tolist() == [1.0, 1.0]  # a tie counts against the method


def test_experts_from_scratch_have_no_slices_to_compare_with():
    assert trials.differences([record("scratch", 1)]).from_stratified.isna().all()


@given(some.lists(some.integers(1, 16), min_size=1, max_size=4), some.integers(0, 2**32))
def test_subsets_have_the_counts_that_are_asked_for(counts, seed):
    random = np.random.default_rng(seed)
    for drawn in (
        trials.random_subset(counts, 16, random),
        trials.stratified_subset(counts, 16, 4, random),
    ):
        assert [len(one) for one in drawn] == counts
        assert all(one == sorted(set(one)) and set(one) <= set(range(16)) for one in drawn)


@given(some.integers(1, 16), some.integers(0, 2**32))
def test_a_stratified_subset_spreads_over_the_slices(count, seed):
    (drawn,) = trials.stratified_subset([count], 16, 4, np.random.default_rng(seed))
    slots = np.bincount(np.array(drawn) % 4, minlength=4)
    assert slots.max() - slots.min() <= 1


def test_random_subsets_are_uniform():
    random = np.random.default_rng(0)
    for draw in (
        lambda: trials.random_subset([4], 16, random)[0],
        lambda: trials.stratified_subset([6], 16, 4, random)[0],
    ):
        times = np.bincount(np.concatenate([draw() for _ in range(4000)]), minlength=16) / 4000
        assert np.ptp(times) < 0.06  # seven standard errors


@pytest.mark.parametrize(
    ("values", "margin", "verdict"),
    [
        ([-1.0, -1.1, -0.9, -1.0, -1.05], None, "better"),
        ([1.0, 1.1, 0.9, 1.0, 1.05], 5.0, "worse"),
        ([0.01, -0.01, 0.02, -0.02, 0.0], 0.1, "equivalent"),
        ([0.01, -0.01, 0.02, -0.02, 0.0], None, "undecided"),
        ([0.5, -0.5, 0.6, -0.6, 0.1], 0.1, "undecided"),
    ],
)
def test_the_four_verdicts(values, margin, verdict):
    found = trials.estimate(values, margin)
    assert found.verdict == verdict
    assert found.low < np.mean(values) < found.high


def test_an_interval_over_five_trainings_is_that_of_t_with_four_degrees_of_freedom():
    found = trials.estimate([1.0, 2.0, 3.0, 4.0, 5.0])
    assert found.error == pytest.approx((2.5 / 5) ** 0.5)
    assert found.high - found.mean == pytest.approx(2.776445 * found.error, rel=1e-6)
    with pytest.raises(ValueError, match="two or more"):
        trials.estimate([1.0])


def test_percentiles_are_significant_at_the_registered_bounds():
    assert trials.percentile_p([0.249] * 5) == pytest.approx(0.05, abs=0.002)
    assert trials.percentile_p([0.751] * 5) == pytest.approx(0.05, abs=0.002)
    assert trials.percentile_p([0.5] * 5) == pytest.approx(1)


def _table(own, stratified, scratch):
    rng = np.random.default_rng(0)
    records = []
    for seed in range(1, 6):
        noise = rng.normal(scale=0.02)
        records.append(record("upcycled", seed, method=own + noise, stratified=stratified + noise))
        records.append(record("scratch", seed, method=scratch + rng.normal(scale=0.02)))
    return trials.differences(records)


def test_the_sequence_of_hypotheses_stops_at_the_first_that_is_undecided():
    all_decided = trials.hypotheses(_table(10.0, 10.0, 14.0))
    assert all_decided.verdict.tolist() == ["better", "equivalent", "better", "worse"]
    assert all_decided.tested.all()
    first_fails = trials.hypotheses(_table(12.0, 12.0, 14.0))
    assert first_fails.verdict[0] == "undecided"
    assert first_fails.tested.tolist() == [True, False, False, False]
    not_equivalent = trials.hypotheses(_table(10.0, 14.0, 14.0))
    assert not_equivalent.verdict[1] == "better"
    assert not_equivalent.tested.tolist() == [True, True, False, False]


def test_the_table_of_methods_controls_false_discoveries():
    table = _table(10.0, 10.0, 12.0)
    found = trials.summary(table).set_index("initialisation")
    assert found.discovered.to_dict() == {"upcycled": True, "scratch": False}
    assert isinstance(found, pd.DataFrame)
    assert (found.n == 5).all()


def test_the_finding_says_what_the_sequence_did_not_reach():
    from moeits.book.trained_selection import finding

    stopped = _table(10.0, 14.0, 14.0)
    told = finding(trials.hypotheses(stopped), stopped)
    assert "not shown to be equivalent" in told
    assert "an estimate only, since the registered sequence stops before H3" in told
    decided = _table(10.0, 10.0, 14.0)
    told = finding(trials.hypotheses(decided), decided)
    assert "it is equivalent to any choice of one expert" in told
    assert "an estimate only" not in told
