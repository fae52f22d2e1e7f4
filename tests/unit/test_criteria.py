import dataclasses
import math
import subprocess
import sys
import time
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from moeits import criteria
from moeits.criteria import clusters, reconstruction
from moeits.criteria.base import Layer, Memory, Routing, Statistics, best, uniform
from moeits.criteria.reconstruction import proportional
from moeits.nmi import nmi_matrix
from moeits.selection import select_experts, select_share
from moeits.study import gathered
from moeits.study.methods import METHODS, compression, method_named, recombination
from moeits.study.methods.change import Changing

E, WIDTH, NEURONS, TOKENS = 4, 9, 7, 40


def routing(experts=E, **changes):
    return Routing(
        **{"scores": "softmax", "top_k": 2, "normalised": True, "scale": 1.0, "bias": np.zeros(experts)}
        | changes
    )


def make_layer(experts=E, *, seed=0, outputs=None, number=0, given=None, **changes):
    """A layer with random weights and consistent statistics; `changes` replace fields of the latter."""
    rng = np.random.default_rng(seed)
    block = {
        "gate": rng.standard_normal((experts, NEURONS, WIDTH)).astype(np.float32),
        "up": rng.standard_normal((experts, NEURONS, WIDTH)).astype(np.float32),
        "down": rng.standard_normal((experts, WIDTH, NEURONS)).astype(np.float32),
    }
    block |= given or {}
    logits = rng.standard_normal((TOKENS, experts))
    if outputs is None:
        outputs = rng.standard_normal((TOKENS, experts, WIDTH))
    gates = routing(experts).gates(logits)
    used = (gates > 0).astype(float)
    norms = np.linalg.norm(outputs, axis=2)
    known = Statistics(
        tokens=TOKENS,
        counts=used.sum(0),
        weights=gates.sum(0),
        norms=(used * norms).sum(0),
        weighted_norms=(gates * norms).sum(0),
        coactivation=used.T @ used,
        inputs_squared=rng.uniform(1, 2, (experts, WIDTH)),
        neurons_squared=rng.uniform(1, 2, (experts, NEURONS)),
        logits=logits,
        gates=gates,
        gram=outputs @ outputs.transpose(0, 2, 1),
        mean_outputs=outputs.mean(0),
        routing=routing(experts),
    )
    return Layer(
        number=number,
        block=block,
        router=rng.standard_normal((experts, WIDTH)),
        family="qwen2_moe",
        calibration=dataclasses.replace(known, **changes),
    )


def run(block, x, expert):
    """What one expert computes of inputs (n, d)."""
    gate = x @ block["gate"][expert].T
    return (gate / (1 + np.exp(-gate)) * (x @ block["up"][expert].T)) @ block["down"][expert].T


# Memory


def test_what_was_known_before_counts_as_spared_once():
    known = {}
    first = Memory(known)
    assert first.once("a", lambda: time.sleep(0.05) or 7) == first.once("a", lambda: 8) == 7
    assert first.spared == 0
    again = Memory(known)
    assert again.once("b", lambda: 9) == 9
    assert [again.once("a", lambda: 8) for _ in range(3)] == [7, 7, 7]
    assert again.spared == known["a"][1] >= 0.05


# Budgets


def test_the_best_are_the_largest_and_of_equal_ones_the_first():
    assert best(np.array([1.0, 3.0, 3.0, 2.0, 3.0]), 2) == (1, 2)


@pytest.mark.parametrize(("share", "count"), [(0.25, 2), (0.5, 3), (0.75, 5), (0.01, 2), (1, 6)])
def test_a_uniform_share_is_rounded_half_up_and_not_below_the_minimum(share, count):
    layer = dataclasses.replace(make_layer(6), minimum=2)
    assert uniform({3: layer}, share) == {3: count}


@pytest.mark.parametrize(
    ("share", "minima", "counts"),
    [
        (3 / 6, (1, 1), {1: 2, 2: 1}),
        (4 / 6, (1, 1), {1: 3, 2: 1}),
        (4 / 6, (1, 2), {1: 2, 2: 2}),
        (1 / 6, (1, 1), {1: 1, 2: 1}),
        (1, (1, 1), {1: 3, 2: 3}),
    ],
)
def test_the_largest_scores_of_all_layers_compete(share, minima, counts):
    scores = {1: [9.0, 8.0, 7.0], 2: [1.0, 2.0, 7.5]}
    layers = {
        number: dataclasses.replace(
            make_layer(3, number=number, counts=np.array(scores[number])), minimum=least
        )
        for number, least in zip(scores, minima, strict=True)
    }
    assert criteria.criterion("frequency-global").counts(layers, share=share) == counts


@given(
    st.lists(st.tuples(st.floats(0, 100), st.integers(1, 5), st.integers(0, 40)), min_size=1, max_size=12),
    st.floats(0, 1),
)
def test_what_is_dealt_out_adds_up_and_stays_in_its_bounds(layers, at):
    weights = {i: weight for i, (weight, _, _) in enumerate(layers)}
    lower = {i: least for i, (_, least, _) in enumerate(layers)}
    upper = {i: least + more for i, (_, least, more) in enumerate(layers)}
    total = round(sum(lower.values()) + at * (sum(upper.values()) - sum(lower.values())))
    counts = proportional(weights, total, lower, upper)
    assert sum(counts.values()) == total
    assert all(lower[i] <= counts[i] <= upper[i] for i in counts)
    for i, j in combinations(counts, 2):
        if (lower[i], upper[i]) == (lower[j], upper[j]) and weights[i] > weights[j]:
            assert counts[i] >= counts[j]


def test_what_is_dealt_out_follows_the_weights():
    assert proportional({0: 1, 1: 2, 2: 3}, 12, dict.fromkeys(range(3), 1), dict.fromkeys(range(3), 24)) == {
        0: 2,
        1: 4,
        2: 6,
    }


# Routing


def test_fewer_experts_share_the_weight_of_the_removed():
    logits = np.log([[0.4, 0.3, 0.2, 0.1]])
    assert routing().gates(logits) == pytest.approx(np.array([[4 / 7, 3 / 7, 0, 0]]))
    assert routing().gates(logits, [0, 2, 3]) == pytest.approx(np.array([[2 / 3, 0, 1 / 3, 0]]))
    assert routing(normalised=False).gates(logits, [2, 3]) == pytest.approx(np.array([[0, 0, 2 / 3, 1 / 3]]))
    assert routing().gates(logits, [3]) == pytest.approx(np.array([[0, 0, 0, 1]]))


def test_a_bias_decides_the_choice_and_not_the_weight():
    rule = routing(scores="sigmoid", normalised=False, scale=2.0, bias=np.array([0, 0, 0, 1.0]), top_k=1)
    assert rule.gates(np.array([[3.0, 2.0, 1.0, 0.0]])) == pytest.approx(np.array([[0, 0, 0, 1.0]]))


@given(
    arrays(float, (5, 6), elements=st.floats(-8, 8)),
    st.sets(st.integers(0, 5), min_size=1),
    st.sampled_from(["softmax", "sigmoid"]),
    st.booleans(),
)
def test_removed_experts_do_not_matter(logits, kept, scores, normalised):
    kept = sorted(kept)
    rule = routing(6, scores=scores, normalised=normalised)
    alone = routing(len(kept), scores=scores, normalised=normalised).gates(logits[:, kept])
    gates = rule.gates(logits, kept)
    assert gates[:, kept] == pytest.approx(alone)
    assert gates.sum() == pytest.approx(alone.sum())


# Scores


def test_router_scores_by_hand():
    layer = make_layer(
        3,
        counts=np.array([20.0, 10.0, 0.0]),
        weights=np.array([8.0, 9.0, 0.0]),
        norms=np.array([30.0, 40.0, 0.0]),
        weighted_norms=np.array([12.0, 36.0, 0.0]),
    )
    score = {name: criteria.CRITERIA[name].score(layer).tolist() for name in criteria._RANKED}
    assert score["frequency"] == [0.5, 0.25, 0]
    assert score["router-weight"] == [0.2, 0.225, 0]
    assert score["activation-norm"] == [0.75, 1, 0]
    assert score["reap"] == [0.6, 3.6, 0]


def test_the_norm_on_random_tokens_reads_no_text():
    layer = make_layer(3, norms=np.array([30.0, 40.0, 0.0]))
    entry = criteria.criterion("random-token-norm")
    assert entry.text == "random"
    assert entry.select({0: layer}, n_keep=2) == {0: (0, 1)}
    with pytest.raises(ValueError, match="layer 0: this criterion needs statistics of text"):
        entry.select({0: dataclasses.replace(layer, calibration=None)}, n_keep=2)


def test_the_weight_product_sums_over_neurons():
    weights = {
        "gate": np.array([[[3.0, 4.0], [1.0, 0.0]], [[0.0, 0.0], [1.0, 0.0]]]),
        "up": np.array([[[1.0, 0.0], [0.0, 2.0]], [[5.0, 5.0], [1.0, 0.0]]]),
        "down": np.array([[[0.0, 1.0], [2.0, 0.0]], [[1.0, 1.0], [0.0, 0.0]]]),
    }
    assert criteria.CRITERIA["weight-product"].score(make_layer(2, given=weights)).tolist() == [12.0, 1.0]


def test_all_layers_compete_for_a_global_budget():
    layers = {
        1: make_layer(3, number=1, counts=np.array([30.0, 20.0, 10.0])),
        2: make_layer(3, number=2, counts=np.array([25.0, 2.0, 1.0])),
    }
    assert criteria.criterion("frequency-global").select(layers, share=2 / 3) == {1: (0, 1, 2), 2: (0,)}
    assert criteria.criterion("frequency").select(layers, share=2 / 3) == {1: (0, 1), 2: (0, 1)}


# Controls


def test_random_experts_depend_on_seed_and_layer_alone():
    layer = make_layer(20)
    kept = criteria.criterion("random").select({0: layer}, n_keep=9)[0]
    assert len(set(kept)) == 9
    assert criteria.criterion("random").select({0: make_layer(20, seed=1)}, n_keep=9)[0] == kept
    assert criteria.criterion("random").select({0: dataclasses.replace(layer, seed=1)}, n_keep=9)[0] != kept
    assert criteria.criterion("random").select({1: dataclasses.replace(layer, number=1)}, n_keep=9)[1] != kept


def test_first_keeps_the_first():
    assert criteria.criterion("first").select({0: make_layer()}, n_keep=3) == {0: (0, 1, 2)}


# The layer's output


def outputs_of(layer, outputs, kept=None):
    gates = layer.routing.gates(layer.statistics.logits, kept)
    return (gates[:, :, None] * outputs).sum(axis=1)


def test_the_error_is_that_of_the_outputs():
    outputs = np.random.default_rng(3).standard_normal((TOKENS, E, WIDTH))
    layer = make_layer(outputs=outputs)
    whole = outputs_of(layer, outputs)
    for kept in [(0, 1, 2, 3), (0, 2), (3,)]:
        change = outputs_of(layer, outputs, kept) - whole
        expected = (change**2).sum() / (whole**2).sum()
        assert reconstruction.subset_error(layer, kept) == pytest.approx(expected)


def test_an_expert_that_does_what_the_others_do_is_not_missed():
    outputs = np.random.default_rng(4).standard_normal((TOKENS, 1, WIDTH)) * np.array([1, 1, 1, 0])[:, None]
    outputs[:, 3] = np.random.default_rng(5).standard_normal((TOKENS, WIDTH)) * 10
    layer = make_layer(outputs=outputs)
    assert 3 in criteria.criterion("lu").select({0: layer}, n_keep=2)[0]


def test_lu_has_the_least_error_of_all_subsets():
    layer = make_layer(6, seed=7)
    kept = criteria.criterion("lu").select({0: layer}, n_keep=3)[0]
    errors = {ids: reconstruction.subset_error(layer, ids) for ids in combinations(range(6), 3)}
    assert errors[kept] == min(errors.values())


def test_the_oracle_has_the_least_loss_of_all_subsets():
    layer = dataclasses.replace(make_layer(6), loss=lambda kept: abs(sum(kept) - 10))
    assert criteria.criterion("oracle").select({0: layer}, n_keep=3)[0] == (1, 4, 5)
    with pytest.raises(ValueError, match="layer 0: the oracle needs the loss of the model"):
        criteria.criterion("oracle").select({0: make_layer()}, n_keep=2)


def test_the_oracle_refuses_layers_with_too_many_subsets():
    with pytest.raises(ValueError, match="2,704,156 subsets of 12 of 24 experts are too many"):
        criteria.criterion("oracle").select({0: dataclasses.replace(make_layer(24), loss=len)}, n_keep=12)


def test_greedy_removal_is_the_best_single_step_each_time(monkeypatch):
    layer = make_layer(6, seed=8)
    steps = reconstruction.greedy_removals(layer)
    left = set(range(6))
    for removed, error in steps:
        errors = {e: reconstruction.subset_error(layer, sorted(left - {e})) for e in left}
        assert error == errors[removed] == min(errors.values())
        left -= {removed}
    monkeypatch.setattr(reconstruction, "SUBSETS", 0)
    assert criteria.criterion("lu").select({0: layer}, n_keep=1)[0] == tuple(left)


def test_moe_i2_gives_more_experts_to_the_layer_that_suffers_more():
    same = np.repeat(np.random.default_rng(0).standard_normal((TOKENS, 1, WIDTH)), 6, axis=1)
    layers = {0: make_layer(6, outputs=same + 1e-3), 1: make_layer(6, number=1)}
    kept = criteria.criterion("moe-i2").select(layers, share=0.5)
    assert len(kept[0]) == 1
    assert len(kept[1]) == 5


def test_an_unknown_router_is_said_where_it_matters():
    layer = make_layer(routing=None)
    assert criteria.criterion("reap").select({0: layer}, n_keep=2)
    with pytest.raises(ValueError, match="layer 0: the router of this 'qwen2_moe' model is not"):
        criteria.criterion("lu").select({0: layer}, n_keep=2)


# Groups


def test_stun_keeps_one_of_each_group():
    router = np.array([[1.0, 0], [0, 1], [1, 0.01], [0.01, 1]])
    together = np.eye(4) * 9 + np.array([[0, 1, 5, 1], [1, 0, 1, 5], [5, 1, 0, 1], [1, 5, 1, 0]])
    layer = dataclasses.replace(make_layer(coactivation=together), router=router)
    kept = criteria.criterion("stun").select({0: layer}, n_keep=2)[0]
    assert len({0, 2} & set(kept)) == 1
    assert len({1, 3} & set(kept)) == 1


def test_stun_keeps_the_expert_nearest_to_the_mean_of_its_group():
    base = make_layer(3).weights
    weights = {name: np.stack([part[0] + shift for shift in (0, 1, 5)]) for name, part in base.items()}
    layer = make_layer(3, given=weights, coactivation=np.ones((3, 3)))
    assert criteria.criterion("stun").select({0: layer}, n_keep=1)[0] == (1,)


def test_experts_with_near_outputs_are_merged_by_use():
    outputs = np.zeros((TOKENS, 3, WIDTH))
    outputs[:, 1] = 10
    outputs[:, 2] = 0.1
    layer = make_layer(3, outputs=outputs, counts=np.array([30.0, 20.0, 10.0]))
    change = METHODS["hc-smoe"].apply(layer, 2)
    before = layer.weights
    for name, part in change.block.items():
        average = 0.75 * before[name][0] + 0.25 * before[name][2]
        assert part[0] == pytest.approx(average, abs=1e-6)
        assert part[2] == pytest.approx(average, abs=1e-6)
        assert np.array_equal(part[1], before[name][1])
    assert change.kept == (0, 1, 2)
    assert change.stored == pytest.approx(2 / 3)


def test_m_smoe_aligns_neurons_before_it_merges():
    order = np.random.default_rng(0).permutation(NEURONS)
    weights = make_layer(2).weights
    for name, part in weights.items():
        part[1] = part[0][:, order] if name == "down" else part[0][order]
    layer = make_layer(2, given=weights)
    change = METHODS["m-smoe"].apply(layer, 1)
    x = np.random.default_rng(1).standard_normal((7, WIDTH))
    for expert in range(2):
        assert run(change.block, x, expert) == pytest.approx(run(weights, x, 0), rel=1e-4, abs=1e-5)


def test_m_smoe_lets_the_most_used_lead_and_the_others_join_the_nearest_logits():
    logits = np.array([[1.0, 0.1, 0.9, 0.0], [0.0, 1.0, 0.2, 0.9], [0.1, 0.9, 0.0, 1.0]])
    layer = make_layer(logits=logits, counts=np.array([30.0, 20.0, 10.0, 5.0]))
    change = METHODS["m-smoe"].apply(layer, 2)
    same = {(i, j) for i, j in combinations(range(4), 2) if np.array_equal(*change.block["up"][[i, j]])}
    assert same == {(0, 2), (1, 3)}


@given(st.integers(1, 6), st.integers(0, 1000))
def test_groups_are_as_many_as_asked_for(groups, seed):
    points = np.random.default_rng(seed).standard_normal((6, 3))
    assert len(set(clusters.average_linkage(clusters.euclidean(points), groups).tolist())) == groups


# Changed weights


def test_a_dropped_neuron_joins_the_kept_one_that_points_its_way():
    neurons = np.array([[[2.0, 0.0], [0.0, 2.0]], [[8.0, 0.0], [-1.0, -1.0]]])
    new = recombination.recombine(neurons, np.array([2.0, 1.0]), (0,))
    assert new[0].tolist() == [[4.0, 0.0], [0.0, 2.0]]
    assert np.array_equal(new[1], neurons[1])
    unmoved = recombination.recombine(neurons, np.array([2.0, 1.0]), (0, 1))
    assert np.array_equal(unmoved, neurons)


def test_dern_drops_the_experts_with_the_least_router_weight_and_leaves_no_weight_out_of_place():
    layer = make_layer(3, seed=2)
    layer = dataclasses.replace(
        layer, calibration=dataclasses.replace(layer.statistics, weights=np.array([1.0, 9.0, 5.0]))
    )
    change = METHODS["dern"].apply(layer, 2)
    assert change.kept == (1, 2)
    everything = METHODS["dern"].apply(layer, 3)
    for name, part in layer.weights.items():
        assert everything.block[name] == pytest.approx(part)


def test_sparse_rows_keep_what_is_largest_times_its_input():
    weights = np.array([[[4.0, -3.0, 2.0, 1.0], [1.0, 1.0, 1.0, 1.0]]])
    size = np.array([[1.0, 1.0, 5.0, 1.0]])
    assert compression.sparse(weights, size, 0.5).tolist() == [[[4, 0, 2, 0], [0, 0, 1, 1]]]


def test_moe_pruner_counts_the_mask_in_its_budget():
    change = METHODS["moe-pruner"].apply(make_layer(5), 2)
    zeros = np.mean([np.mean(part == 0) for part in change.block.values()])
    assert zeros == pytest.approx((6 / 9 + 6 / 9 + 5 / 7) / 3)
    assert change.stored == pytest.approx(1 - zeros + 1 / 16)
    whole = METHODS["moe-pruner"].apply(make_layer(5), 5)
    assert whole.stored == 1
    assert all((whole.block[name] == part).all() for name, part in make_layer(5).weights.items())


def test_stun_removes_experts_first_and_then_weights():
    layer = make_layer(6)
    change = METHODS["stun-sparse"].apply(layer, 3)
    assert change.kept == criteria.criterion("stun").select({0: layer}, n_keep=5)[0]  # 1.5 of 3 go as experts
    share = 3 / 5 - 1 / 16
    left = {
        "gate": int(WIDTH * share + 0.5),
        "up": int(WIDTH * share + 0.5),
        "down": int(NEURONS * share + 0.5),
    }
    for name, part in change.block.items():
        counts = np.count_nonzero(part[list(change.kept)], axis=2)
        assert (counts == left[name]).all()
    size = 2 * left["gate"] / WIDTH + left["down"] / NEURONS
    assert change.stored == pytest.approx((size / 3 + 1 / 16) * 5 / 6)


def test_equal_router_weights_are_even():
    assert gathered.evenness(np.array([[0.5, 0.5, 0], [0, 0.2, 0.2]])) == pytest.approx(1)
    assert gathered.evenness(np.array([[0.25, 0.75, 0]])) == pytest.approx(
        math.exp(0.25 * math.log(4) + 0.75 * math.log(4 / 3)) / 2
    )


@given(arrays(float, (2, 3, 9), elements=st.floats(-100, 100)), st.integers(1, 8))
def test_rounding_is_off_by_at_most_half_a_step(weights, bits):
    step = (weights.max(axis=-1) - weights.min(axis=-1)) / (2**bits - 1)
    assert (np.abs(compression.quantise(weights, bits) - weights) <= step[..., None] / 2 + 1e-9).all()


def test_bits_go_where_they_save_most():
    errors = np.array([[10.0, 1.0, 0.0], [1.0, 0.1, 0.0], [1.0, 0.1, 0.0]])
    costs = np.array([1.0, 2.0, 4.0])
    assert compression.allocate_bits(errors, costs, 4).tolist() == [1, 0, 0]
    assert compression.allocate_bits(errors, costs, 5).tolist() == [1, 1, 0]
    with pytest.raises(ValueError, match="below the 3 of the coarsest"):
        compression.allocate_bits(errors, costs, 2)


def test_quantised_experts_fit_into_the_bytes_of_those_that_would_be_kept():
    wide = np.random.default_rng(0).standard_normal((4, 64, 64)).astype(np.float32)
    layer = make_layer(4, given={"gate": wide, "up": wide, "down": wide})
    layer = dataclasses.replace(
        layer,
        calibration=dataclasses.replace(
            layer.statistics, counts=np.array([39.0, 1, 1, 1]), weights=np.array([30.0, 1, 1, 1])
        ),
    )
    change = METHODS["mc-moe"].apply(layer, 1)
    assert 0.2 < change.stored <= 0.25
    off = np.abs(change.block["up"] - wide).mean(axis=(1, 2))
    assert off[0] < off[1:].min()


def test_a_matrix_of_low_rank_is_kept_as_it_is():
    rng = np.random.default_rng(0)
    low = (rng.standard_normal((2, 12, 2)) @ rng.standard_normal((2, 2, 12))).astype(np.float32)
    layer = make_layer(2, given={"gate": low, "up": low, "down": low})
    change = METHODS["moe-i2-low-rank"].apply(layer, 1)
    assert change.stored == pytest.approx(3 * (12 + 12) / 12**2)
    full = rng.standard_normal((2, 12, 12)).astype(np.float32)
    layer = make_layer(2, given={"gate": full, "up": full, "down": full})
    cut = METHODS["moe-i2-low-rank"].apply(layer, 1).block["up"][0]
    values = np.linalg.svd(full[0], compute_uv=False)
    assert np.linalg.norm(full[0] - cut) == pytest.approx(math.sqrt((values[3:] ** 2).sum()), rel=1e-4)


# MoEITS


def moeits_layers():
    rng = np.random.default_rng(0)
    layers = {}
    for number in (1, 4):
        weights = {
            name: rng.standard_normal((6, *shape)).astype(np.float32)
            for name, shape in {"gate": (8, 16), "up": (8, 16), "down": (16, 8)}.items()
        }
        layers[number] = dataclasses.replace(make_layer(6, number=number, given=weights), calibration=None)
    return layers


@pytest.mark.parametrize(
    ("name", "options", "diagonal"),
    [
        ("moeits", {}, "zero"),
        ("moeits-official", {"projection_weights": {"gate": 0.2, "up": 0.4, "down": 0.4}}, "zero"),
        ("moeits-exclude", {}, "exclude"),
        ("moeits-miller-madow", {"correction": "miller-madow"}, "zero"),
        ("moeits-null", {"correction": "null"}, "zero"),
        ("moeits-aligned", {"align": True}, "zero"),
    ],
)
def test_moeits_is_algorithm_3_on_each_matrix(name, options, diagonal):
    layers = moeits_layers()
    matrices = {number: nmi_matrix(layer.block, **options) for number, layer in layers.items()}
    by_number = criteria.criterion(name).select(layers, n_keep=3)
    assert by_number == {number: select_experts(R, n_keep=3).kept for number, R in matrices.items()}
    by_share = criteria.criterion(name).select(layers, share=0.75)
    _, expected = select_share(matrices, 0.75, diagonal=diagonal)
    assert by_share == {number: chosen.kept for number, chosen in expected.items()}


def test_a_family_without_official_weights_takes_the_plain_mean():
    layers = {n: dataclasses.replace(layer, family="glm4_moe") for n, layer in moeits_layers().items()}
    assert criteria.criterion("moeits-official").select(layers, n_keep=3) == criteria.criterion(
        "moeits"
    ).select(layers, n_keep=3)


def test_the_uniform_form_keeps_the_same_share_of_every_layer():
    kept = criteria.criterion("moeits-uniform").select(moeits_layers(), share=0.5)
    assert [len(ids) for ids in kept.values()] == [3, 3]


# The registry


@pytest.mark.parametrize("name", METHODS)
def test_every_method_keeps_to_the_interface(name):
    entry = METHODS[name]
    layer = make_layer(6)
    layer = dataclasses.replace(layer, loss=len)
    if not isinstance(entry, Changing):
        assert entry.keep(layer, 6) == tuple(range(6))
        kept = entry.keep(layer, 3)
        assert list(kept) == sorted(set(kept))
        assert len(kept) == 3
    else:
        change = entry.apply(layer, 3)
        assert {key: part.shape for key, part in change.block.items()} == {
            key: part.shape for key, part in layer.weights.items()
        }


@pytest.mark.parametrize("name", METHODS)
def test_a_method_says_whether_it_reads_text(name):
    entry = METHODS[name]
    act = entry.apply if isinstance(entry, Changing) else entry.keep
    layer = dataclasses.replace(make_layer(6), calibration=None)
    if entry.text:
        with pytest.raises(ValueError, match=r"needs (statistics of text|the loss of the model)"):
            act(layer, 3)
    else:
        assert act(layer, 3)


def test_no_method_changes_the_weights_that_it_is_given():
    layer = make_layer(6)
    before = {name: part.copy() for name, part in layer.block.items()}
    for entry in METHODS.values():
        if isinstance(entry, Changing):
            entry.apply(layer, 3)
    assert all(np.array_equal(layer.block[name], part) for name, part in before.items())


def test_every_name_hashes_to_its_own_computation():
    seen = {}
    for name, entry in METHODS.items():
        assert seen.setdefault(repr(entry.functions), name) == name


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({}, "exactly one of n_keep and share"),
        ({"n_keep": 1, "share": 0.5}, "exactly one"),
        ({"n_keep": 0}, "layer 0: n_keep is 0, but the layer has 4 experts"),
        ({"n_keep": 5}, "layer 0: n_keep is 5, but the layer has 4 experts"),
        ({"share": 0}, "share is 0"),
    ],
)
def test_wrong_budgets_are_named(budget, message):
    with pytest.raises(ValueError, match=message):
        criteria.criterion("first").select({0: make_layer()}, **budget)


def test_unknown_criteria_list_the_known_ones():
    with pytest.raises(ValueError, match="no criterion 'raep': there are random, first"):
        criteria.criterion("raep")
    with pytest.raises(ValueError, match=r"no method 'dren': there are random, first.*dern"):
        method_named("dren")


def test_scores_that_are_not_finite_are_an_error():
    layer = make_layer(counts=np.array([1.0, np.nan, 1.0, 1.0]))
    with pytest.raises(ValueError, match="layer 0: Frequency gives scores that are not finite"):
        criteria.criterion("frequency").select({0: layer}, n_keep=2)


def test_criteria_load_no_deep_learning_framework():
    code = "import sys, moeits.criteria; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
