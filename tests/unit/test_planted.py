import numpy as np
import pytest

from moeits.nmi import nmi_matrix
from moeits.selection import select_experts
from moeits.study import planted

PAIRS = [(0, 3), (5, 4)]


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def block(rng):
    return planted.random_experts(rng, experts=8, neurons=12, width=20)


@pytest.fixture
def tokens(rng):
    return rng.standard_normal((6, 20))


def test_shapes_and_heavier_tails(rng):
    normal = planted.random_experts(rng, experts=3, neurons=40, width=50)
    heavy = planted.random_experts(rng, experts=3, neurons=40, width=50, degrees=3)
    assert {name: w.shape for name, w in normal.items()} == {
        "gate": (3, 40, 50),
        "up": (3, 40, 50),
        "down": (3, 50, 40),
    }
    assert np.abs(heavy["up"]).max() > 2 * np.abs(normal["up"]).max()


def test_related_experts_correlate_by_the_product_of_their_shares(rng):
    block = planted.related_experts(rng, [0, 0.5, 0.8], neurons=60, width=80)
    correlation = np.corrcoef(block["down"].reshape(3, -1))
    expected = [[1, 0, 0], [0, 1, 0.4], [0, 0.4, 1]]
    np.testing.assert_allclose(correlation, expected, atol=0.05)
    assert block["down"].std() == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize("change", ["permute", "rescale"])
def test_a_disguised_expert_computes_the_same(rng, block, tokens, change):
    argument = rng.permutation(12) if change == "permute" else np.exp(rng.standard_normal(12))
    changed = getattr(planted, change)(block, 2, argument)
    assert not np.array_equal(changed["up"][2], block["up"][2])
    assert np.array_equal(changed["up"][1], block["up"][1])
    np.testing.assert_allclose(
        planted.output(changed, 2, tokens), planted.output(block, 2, tokens), rtol=1e-4, atol=1e-9
    )


def test_output_by_hand():
    one = {name: np.array([[[value]]]) for name, value in (("gate", 2.0), ("up", 3.0), ("down", 5.0))}
    assert planted.output(one, 0, np.array([[1.0]])) == pytest.approx(5 * (2 / (1 + np.exp(-2))) * 3)


@pytest.mark.parametrize("kind", ["copy", "permuted", "rescaled"])
def test_a_planted_copy_computes_the_same_without_noise(rng, block, tokens, kind):
    made = planted.plant(rng, block, PAIRS, kind, 0)
    for original, copied in PAIRS:
        expected = planted.output(block, original, tokens)
        np.testing.assert_allclose(planted.output(made, copied, tokens), expected, rtol=1e-4, atol=1e-9)
    assert np.array_equal(made["gate"][7], block["gate"][7])


def test_noise_has_the_size_that_was_asked_for(rng, block):
    made = planted.plant(rng, block, PAIRS, "copy", 0.5)
    difference = made["up"][3] - made["up"][0]
    assert difference.std() == pytest.approx(0.5 * block["up"][0].std(), rel=0.15)


def test_nothing_is_planted_where_experts_are_unrelated(rng, block):
    made = planted.plant(rng, block, PAIRS, "unrelated", 0.5)
    assert all(np.array_equal(made[name], block[name]) for name in block)


@pytest.mark.parametrize(("kind", "noise"), [("copied", 0), ("copy", -1), ("copy", float("nan"))])
def test_what_cannot_be_planted_is_named(rng, block, kind, noise):
    with pytest.raises(ValueError, match=r"kind is 'copied'|noise is"):
        planted.plant(rng, block, PAIRS, kind, noise)


def test_nmi_finds_plain_copies_and_not_permuted_ones(rng):
    block = planted.random_experts(rng, experts=8, neurons=32, width=64)
    removed = {}
    for kind in ("copy", "permuted"):
        made = planted.plant(rng, block, PAIRS, kind, 0.1)
        removed[kind] = select_experts(nmi_matrix(made, n_jobs=1), n_keep=6).removed
    assert planted.found(removed["copy"], PAIRS) == (1, 1, 2)
    assert planted.found(removed["permuted"], PAIRS).recall < 1


def test_shuffling_keeps_the_values_and_no_order(rng, block):
    made = planted.shuffled(rng, block)
    assert np.array_equal(np.sort(made["up"][1], axis=None), np.sort(block["up"][1], axis=None))
    assert abs(np.corrcoef(made["up"][1].ravel(), block["up"][1].ravel())[0, 1]) < 0.3


def test_fresh_experts_take_their_weights_from_the_projection(rng, block):
    made = planted.fresh(rng, block)
    assert made["down"].shape == block["down"].shape
    assert np.isin(made["down"], block["down"]).all()
    assert not np.isin(made["down"], block["up"]).all()


def test_noise_matrix_is_symmetric_with_the_spread_that_was_asked_for(rng):
    R = planted.noise_matrix(rng, 200, 0.3)
    assert np.array_equal(R, R.T)
    assert not R.diagonal().any()
    values = R[np.triu_indices(200, 1)]
    assert values.std() / values.mean() == pytest.approx(0.3, rel=0.05)


def test_found_counts_each_pair_once():
    assert planted.found([0, 3, 5, 6], PAIRS) == (0.5, 1, 4)
    assert planted.found([1], PAIRS) == (0, 0, 1)
    nothing = planted.found([], PAIRS)
    assert np.isnan(nothing.precision)
    assert nothing[1:] == (0, 0)
