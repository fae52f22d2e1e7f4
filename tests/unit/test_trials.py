"""The registered experiment: random subsets, differences over trainings, verdicts, the sequence of tests."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as some

from moeits.study import anatomy, bounds, records, trials
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
    trainings = []
    for seed in range(1, 6):
        noise = rng.normal(scale=0.02)
        trainings.append(record("upcycled", seed, method=own + noise, stratified=stratified + noise))
        trainings.append(record("scratch", seed, method=scratch + rng.normal(scale=0.02)))
    return trials.differences(trainings)


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


def test_spread_and_order_are_told_apart():
    both = []
    for seed, noise in enumerate((-0.1, 0.0, 0.1, 0.05, -0.05)):
        equal = record("scratch", seed, method=10 + noise, subsets=(11.0, 13.0))
        one_tau = record("scratch", seed, method=20 + noise, subsets=(15.0 - noise, 17.0))
        equal.details["budgets"] = {"half": equal.details["budgets"]["half"]}
        one_tau.details["budgets"] = {"half, one tau": one_tau.details["budgets"]["half"]}
        both += [equal, one_tau]
    found = trials.factors(trials.differences(both)).set_index("factor")
    assert found.loc["spread", "mean"] == pytest.approx((16 - 12) / 8)
    assert found.loc["moeits, equal counts", "mean"] == pytest.approx((10 - 12) / 8)
    assert found.loc["moeits, one tau", "mean"] == pytest.approx((20 - 16) / 8)
    assert (found.n == 5).all()


def test_domains_are_tabulated_apart():
    one = record("scratch", 1)
    half = one.details["budgets"]["half"]
    half["methods"]["moeits"]["bits"] = [3.0, 9.0]
    half["mean of subsets"] = [5.0, 5.0]
    found = trials.by_domain([one]).query("budget == 'half'").set_index("domain")
    assert found.delta.to_dict() == {0: -2 / 4, 1: 4 / 4}


def test_an_initialisation_waits_until_all_its_trainings_are_measured(tmp_path):
    for kind, seeds in (("scratch", (1, 2)), ("upcycled", (1, 2)), ("btm", (1,))):
        for seed in seeds:
            records.write(tmp_path, record(kind, seed))
    found = [one.inputs["model"] for one in trials.committed(folder=tmp_path)]
    assert sorted(found) == ["scratch-1", "scratch-2", "upcycled-1", "upcycled-2"]
    assert trials.committed("other", tmp_path) == []


@pytest.mark.parametrize("name", ["upcycled-1", "scratch-1"])
def test_every_subset_of_a_budget_has_its_counts(sparse_model, name):
    calibration = np.random.default_rng(0).integers(1, 64, 512)
    sizes = trials.Sizes(subsets=3, stratified=2, calibration=512)
    found = {
        title: budget
        for step in (trials.STEP, trials.FURTHER)
        for title, budget in trials.budgets(name, sparse_model, calibration, sizes, step).items()
    }
    assert found["half"].counts == [4, 4]
    assert found["three quarters"].counts == [6, 6]
    assert sum(found["half, one tau"].counts) in (7, 8, 9)
    assert ("own" in found) == (name == "upcycled-1")
    for title, budget in found.items():
        assert ("stratified" in budget.drawn) == (title == "own")
        subsets = [*budget.methods.values(), *(one for drawn in budget.drawn.values() for one in drawn)]
        assert len(subsets) == (1 + 3 + 2 if title == "own" else len(trials.CRITERIA) + 1 + 3)
        for subset in subsets:
            assert [len(layer) for layer in subset] == budget.counts
            assert all(layer == sorted(set(layer)) for layer in subset)


def test_a_trial_of_further_budgets_is_tabulated_like_the_registered(sparse_model):
    random = np.random.default_rng(0)
    read = anatomy.Sample(
        [random.integers(1, 64, 9) for _ in range(4)], np.array([0, 0, 1, 1]), np.full(4, 20)
    )
    sizes = trials.Sizes(subsets=2, calibration=512)
    rows, details = trials.trial(
        "btm-1", sparse_model, read, random.integers(1, 64, 512), sizes, trials.FURTHER
    )
    table = trials.differences([Record(trials.FURTHER, {"model": "btm-1"}, rows, details)])
    assert set(table.budget) == {"three quarters", "half, one tau"}
    assert len(table) == 2 * (1 + len(trials.CRITERIA))
    assert {row["kept_share"] for row in rows if "quarters" in row["method"]} == {0.75}
    one = table[table.budget == "three quarters"].set_index("method").loc["moeits"]
    kept = details["budgets"]["three quarters"]["methods"]["moeits"]["kept"]
    bits = anatomy.subsets(sparse_model, read, [kept]).sum()
    mean = np.mean(details["budgets"]["three quarters"]["subsets"])
    assert one.delta == pytest.approx((bits - mean) / 80, abs=1e-4)


def test_greedy_removal_finds_what_matters_least():
    worth = np.array([[5.0, 1.0, 4.0, 3.0], [0.1, 9.0, 0.2, 8.0]])

    def loss(kept):
        return -sum(worth[layer, expert] for layer, one in enumerate(kept) for expert in one)

    assert bounds.greedy(loss, experts=4, layers=2, floor=2) == [[0, 2], [1, 3]]


def test_the_best_of_all_subsets_is_judged_on_text_that_did_not_choose_it():
    bits = np.array([[1.0, 30.0], [20.0, 2.0], [8.0, 8.0]])  # subsets x halves of the documents
    assert bounds.best_elsewhere(bits) == pytest.approx((30 + 20) / 2)
