import json
import math

import numpy as np
import pytest
from golden_cases import CASES, matrix, name
from hypothesis import given, settings
from hypothesis import strategies as st

from moeits.kept import Kept
from moeits.method import DIAGONALS
from moeits.selection import select_experts, select_share

# Entries of R worked through below: 0.6, 0.2, 0.3, each twice.
THREE = np.array([[0, 0.6, 0.2], [0.6, 0, 0.3], [0.2, 0.3, 0]])


def redundancies(seed, experts, values=None):
    draw = np.random.default_rng(seed)
    A = draw.random((experts, experts)) if values is None else draw.choice(values, (experts, experts))
    return np.triu(A, 1) + np.triu(A, 1).T


@pytest.mark.parametrize("case", CASES, ids=name)
def test_keeps_the_golden_lists(case):
    R = matrix(case)
    for tau, kept in case["kept"].items():
        assert list(select_experts(R, float(tau)).kept) == kept, tau


# zero: 0 0 0 .2 .2 .3 .3 .6 .6; mean 2.2/9; quartiles at places 2 and 6: 0 and .3; IQR .3.
# one: .2 .2 .3 .3 .6 .6 1 1 1; mean 5.2/9; quartiles .3 and 1; IQR .7.
# exclude: .2 .2 .3 .3 .6 .6; mean 2.2/6; quartiles at places 1.25 and 3.75: .225 and .525; IQR .3.
# The largest pair is (0, 1) with .6; row means (.6 + .2)/2 = .4 and (.6 + .3)/2 = .45: expert 1 is removed.
# Then (0, 2), with .2, is left.
@pytest.mark.parametrize(
    ("diagonal", "tau", "threshold", "kept"),
    [
        ("zero", 0, 2.2 / 9, (0, 2)),
        ("zero", 1, 2.2 / 9 + 0.3, (0, 2)),
        ("zero", 1.25, 2.2 / 9 + 0.375, (0, 1, 2)),
        ("one", 0, 5.2 / 9, (0, 2)),
        ("one", 0.5, 5.2 / 9 + 0.35, (0, 1, 2)),
        ("exclude", 0.5, 2.2 / 6 + 0.15, (0, 2)),
        ("exclude", 1, 2.2 / 6 + 0.3, (0, 1, 2)),
    ],
)
def test_the_three_diagonals_by_hand(diagonal, tau, threshold, kept):
    for given_diagonal in (0.0, 1.0, math.nan):  # R's own diagonal is not read
        R = THREE.copy()
        np.fill_diagonal(R, given_diagonal)
        selection = select_experts(R, tau, diagonal=diagonal)
        assert selection.threshold == pytest.approx(threshold)
        assert selection.kept == kept


def test_every_step_tells_pair_value_and_row_means():
    first, second = select_experts(THREE, n_keep=1).steps
    assert first.removed == 1
    assert first.pair == (0, 1)
    assert first.nmi == 0.6
    assert first.row_means == pytest.approx((0.4, 0.45))
    # Experts 0 and 2 are left, equally redundant with each other: the second is removed.
    assert second == (2, (0, 2), 0.2, (0.2, 0.2))


def test_ties_take_the_first_pair_in_row_major_order_and_drop_its_second_expert():
    R = np.full((4, 4), 0.5)
    assert select_experts(R, n_keep=1).removed == (1, 2, 3)
    # Experts 1 and 3 are copies of each other: their rows hold the same values in another order.
    R = np.array([[0, 0.1, 0.7, 0.1], [0.1, 0, 0.3, 0.9], [0.7, 0.3, 0, 0.3], [0.1, 0.9, 0.3, 0]])
    assert select_experts(R, n_keep=3).removed == (3,)


def test_a_value_at_the_threshold_stays():
    # Two experts, diagonal left out: mean 0.4, IQR 0, so rho is exactly the one redundancy there is.
    R = np.array([[0, 0.4], [0.4, 0]])
    assert select_experts(R, 0, diagonal="exclude").kept == (0, 1)
    assert select_experts(R, 0, diagonal="zero").kept == (0,)


def test_one_expert_is_kept_without_a_threshold():
    for options in ({"tau": 0}, {"tau": 1.25, "diagonal": "exclude"}, {"n_keep": 1}):
        selection = select_experts(np.zeros((1, 1)), **options)
        assert selection.kept == (0,)
        assert selection.threshold is None
        assert not selection.floor_reached


def test_the_floor_is_kept_and_reported():
    R = redundancies(3, 12)
    free = select_experts(R, 0)
    assert len(free.kept) < 6
    assert not free.floor_reached
    held = select_experts(R, 0, at_least=6)
    assert len(held.kept) == 6
    assert held.floor_reached
    assert held.removed == free.removed[:6]
    assert select_experts(R, 0, at_least=99).kept == tuple(range(12))
    exact = select_experts(R, 0, at_least=len(free.kept))
    assert exact.kept == free.kept
    assert not exact.floor_reached


@given(
    st.integers(0, 10_000),
    st.integers(1, 12),
    st.lists(st.floats(0, 6), min_size=2, max_size=6),
    st.sampled_from(DIAGONALS),
    st.integers(1, 3),
    st.booleans(),
)
@settings(max_examples=100, deadline=None)
def test_a_larger_tau_keeps_a_superset_along_one_order_of_removal(seed, experts, taus, diagonal, floor, tied):
    R = redundancies(seed, experts, values=[0.1, 0.2, 0.3] if tied else None)
    order = select_experts(R, n_keep=1).removed
    before = None
    for tau in sorted(taus):
        selection = select_experts(R, tau, diagonal=diagonal, at_least=floor)
        assert selection.removed == order[: len(selection.removed)]
        assert sorted(selection.kept + selection.removed) == list(range(experts))
        assert len(selection.kept) >= min(floor, experts)
        assert before is None or set(selection.kept) >= before
        before = set(selection.kept)
        left = R[np.ix_(selection.kept, selection.kept)][~np.eye(len(selection.kept), dtype=bool)]
        if selection.threshold is not None and not selection.floor_reached:
            assert (left <= selection.threshold).all()


@given(st.integers(0, 10_000), st.integers(2, 10), st.permutations(range(10)))
@settings(max_examples=50, deadline=None)
def test_renumbering_the_experts_renumbers_what_is_kept(seed, experts, order):
    R = redundancies(seed, experts)
    order = [expert for expert in order if expert < experts]
    # With more than two experts left, no two row means are equal here; the last pair always ties.
    kept = select_experts(R, n_keep=2).kept
    renumbered = select_experts(R[np.ix_(order, order)], n_keep=2).kept
    assert {order[expert] for expert in renumbered} == set(kept)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tau": -0.1}, "tau is -0.1"),
        ({"tau": math.nan}, "tau is nan"),
        ({"tau": math.inf}, "tau is inf"),
        ({}, "either tau or n_keep"),
        ({"tau": 1, "n_keep": 2}, "either tau or n_keep"),
        ({"n_keep": 0}, "n_keep is 0"),
        ({"n_keep": 4}, "the layer has 3 experts"),
        ({"n_keep": 1, "at_least": 2}, "below the floor of 2"),
        ({"tau": 1, "at_least": 0}, "at_least is 0"),
        ({"tau": 1, "diagonal": "two"}, "zero, one, exclude"),
        ({"tau": 1, "R": np.zeros((2, 3))}, r"shape \(2, 3\)"),
        ({"tau": 1, "R": np.zeros((0, 0))}, r"shape \(0, 0\)"),
        ({"tau": 1, "R": np.full((3, 3), math.nan)}, "NaN"),
        ({"tau": 1, "R": np.triu(THREE)}, "not symmetric"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        select_experts(**{"R": THREE, **arguments})


@given(st.integers(0, 1000), st.floats(0.45, 1), st.sampled_from(DIAGONALS))
@settings(max_examples=50, deadline=None)
def test_share_finds_the_nearest_count(seed, share, diagonal):
    matrices = {layer: redundancies(seed + layer, 12) for layer in (1, 2, 5)}
    if diagonal == "one" and share < 0.9:
        share = 0.95  # with ones on the diagonal tau = 0 keeps nearly all
    tau, selections = select_share(matrices, share, diagonal=diagonal)
    assert selections == {layer: select_experts(R, tau, diagonal=diagonal) for layer, R in matrices.items()}
    # No ties among random redundancies, so that every count between the extremes exists.
    assert abs(sum(len(s.kept) for s in selections.values()) - share * 36) <= 0.5 + 1e-9


def test_share_of_one_keeps_all_and_an_impossible_share_is_refused():
    matrices = {0: redundancies(0, 8), 1: redundancies(1, 8)}
    tau, selections = select_share(matrices, 1)
    assert tau > 0
    assert all(s.kept == tuple(range(8)) for s in selections.values())
    with pytest.raises(ValueError, match=r"share of 0\.1 of 16 experts is out of reach: tau >= 0 keeps"):
        select_share(matrices, 0.1, at_least=4)
    with pytest.raises(ValueError, match="share is 0"):
        select_share(matrices, 0)
    with pytest.raises(ValueError, match="no layer"):
        select_share({}, 0.5)
    with pytest.raises(ValueError, match="layer 1: R holds NaN"):
        select_share({**matrices, 1: np.full((2, 2), math.nan)}, 0.5)


def test_kept_survives_the_file(tmp_path):
    kept = Kept({1: (0, 2), 10: (3,)}, {1: 4, 10: 4}, "a/b", "f00d", "nmi", {"tau": 1.25}, {1: 0.1, 10: None})
    path = tmp_path / "kept.json"
    kept.write(path)
    assert Kept.read(path) == kept
    assert json.loads(path.read_text())["layers"] == {"1": [0, 2], "10": [3]}
    assert kept.share == 3 / 8


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({"1": []}, "layer 1 keeps none"),
        ({"1": [2, 0]}, "ascending"),
        ({"1": [0, 0]}, "ascending"),
        ({"1": [0, 4]}, "layer 1 has 4 experts"),
        ({"1": [-1, 0]}, "layer 1 has 4 experts"),
        ({"2": [0]}, "different layers"),
        ({"one": [0]}, "invalid literal"),
        ([], "not a valid"),
    ],
)
def test_a_wrong_kept_file_is_refused(tmp_path, layers, message):
    path = tmp_path / "kept.json"
    path.write_text(json.dumps({"layers": layers, "num_experts": {"1": 4}, "threshold": {}}))
    with pytest.raises(ValueError, match=message) as error:
        Kept.read(path)
    assert "kept.json" in str(error.value)


def test_a_kept_file_that_is_missing_or_not_json_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError):
        Kept.read(tmp_path / "kept.json")
    (tmp_path / "kept.json").write_text("{")
    with pytest.raises(ValueError, match=r"not a valid kept\.json"):
        Kept.read(tmp_path / "kept.json")
    (tmp_path / "kept.json").write_text("{}")
    with pytest.raises(ValueError, match="no 'layers'"):
        Kept.read(tmp_path / "kept.json")
