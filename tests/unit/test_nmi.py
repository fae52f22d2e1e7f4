import doctest
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from golden_cases import WEIGHTS, name, round_to_bfloat16, weights
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import mutual_info_score, normalized_mutual_info_score

import moeits.histograms
import moeits.nmi
import moeits.selection
from moeits.book import plain
from moeits.histograms import Codes, auto_bins, discretise, joint_entropy
from moeits.nmi import (
    match_neurons,
    nmi,
    nmi_matrix,
    nmi_zscores,
    null_nmi,
    preset_weights,
    projection_nmi,
    read_matrices,
    write_matrices,
)
from moeits.selection import select_experts

LABELS = st.lists(st.integers(0, 12), min_size=2, max_size=200)


def normal(*shape, seed=0):
    return (np.random.default_rng(seed).standard_normal(shape) * 0.02).astype(np.float32)


def as_codes(labels):
    """Codes of ready labels, numbered as they come."""
    _, codes, counts = np.unique(labels, return_inverse=True, return_counts=True)
    p = counts / counts.sum()
    return Codes(codes.astype(np.uint16), counts, float(-(p * np.log(p)).sum()))


def numpy_nmi(x, y):
    """Equation 6 the plain way, with NumPy's edges."""
    return plain.nmi(x, y, [np.histogram_bin_edges(v, numpy_auto(v)) for v in (x, y)])


def numpy_auto(x):
    lower, upper = np.percentile(x, [25, 75])
    extent = x.max() - x.min()
    width = min(
        max(2 * (upper - lower) / np.cbrt(x.size), extent / np.sqrt(x.size) / 2),
        extent / (np.log2(x.size) + 1),
    )
    return int(np.ceil(extent / width))


@pytest.mark.parametrize("case", WEIGHTS, ids=name)
def test_agrees_with_the_golden_matrices(case):
    R = projection_nmi(weights(case))
    np.testing.assert_allclose(R, case["nmi"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("size", [2, 3, 10, 1000, 4096, 100_003])
def test_agrees_with_numpy_edge_for_edge(dtype, size):
    draw = np.random.default_rng(size)
    x, y = draw.standard_normal(size).astype(dtype), draw.standard_t(3, size).astype(dtype)
    for v in (x, y):
        edges = np.histogram_bin_edges(v, numpy_auto(v))
        expected = np.sort(np.histogram(v, edges)[0])[::-1]
        np.testing.assert_array_equal(discretise(v).counts, expected[expected > 0])
    assert nmi(x, y) == pytest.approx(numpy_nmi(x, y), abs=1e-12)


def test_values_on_an_edge_fall_where_numpy_puts_them():
    x = np.repeat(np.arange(11, dtype=np.float32) / 10, np.arange(1, 12))
    for bins in (2, 3, 5, 7, 10):
        expected = np.sort(np.histogram(x, np.linspace(x[0], x[-1], bins + 1, dtype=np.float32))[0])[::-1]
        np.testing.assert_array_equal(discretise(x, bins).counts, expected)


@pytest.mark.parametrize(
    ("size", "extent", "iqr", "expected"),
    [
        # Freedman-Diaconis: width 2 * 1 / 1000^(1/3) = 0.2, above 6 / sqrt(1000) / 2 = 0.095; 6 / 0.2 = 30.
        (1000, 6.0, 1.0, 30),
        # A long tail: the square root's half, 600 / sqrt(1000) / 2 = 9.49 > 0.2; 2 sqrt(1000) = 63.2 -> 64.
        (1000, 600.0, 1.0, 64),
        # IQR 0: the same bound takes over.
        (1000, 6.0, 0.0, 64),
        # Few weights: Sturges, 4 / (log2(16) + 1) = 0.8 < 2 * 2 / 16^(1/3) = 1.59; 5 bins.
        (16, 4.0, 2.0, 5),
        (1, 0.0, 0.0, 1),
    ],
)
def test_the_auto_rule_by_hand(size, extent, iqr, expected):
    assert auto_bins(size, extent, iqr) == expected


@pytest.mark.parametrize("heavy", [False, True])
def test_sixteen_bit_codes_are_those_of_the_same_values_in_float32(heavy):
    W = np.random.default_rng(7).standard_t(2 if heavy else 50, 50_000) * 0.02
    W[0] = W.std() * 50
    half = W.astype(np.float16)
    rounded = round_to_bfloat16(W)
    brain = torch.from_numpy(rounded).bfloat16()
    for short, long in [(half, half.astype(np.float32)), (brain, rounded), (torch.from_numpy(half), half)]:
        a, b = discretise(short), discretise(long)
        np.testing.assert_array_equal(a.codes, b.codes)
        np.testing.assert_array_equal(a.counts, b.counts)


@pytest.mark.parametrize("make", [normal, lambda *s: torch.from_numpy(normal(*s)).half()])
def test_flattening_is_row_major_whatever_the_memory_layout(make):
    W = make(3, 40, 50)
    turned = W.swapaxes(1, 2)
    np.testing.assert_array_equal(projection_nmi(turned), projection_nmi([m.reshape(50, 40) for m in turned]))
    assert nmi(W[0], W[1]) == nmi(W[0].reshape(-1), W[1].reshape(-1))


def test_an_expert_with_itself_and_with_an_independent_one():
    x = np.repeat([0.0, 1.0], 8)
    y = np.tile([0.0, 1.0], 8)
    assert nmi(x, x, bins=2) == 1
    assert nmi(x, 3 - y, bins=2) == pytest.approx(0, abs=1e-12)


def test_a_pair_worked_by_hand():
    # x: 3 and 1 of 4; y: 2 and 2. Joint cells (0,0): 2, (0,1): 1, (1,1): 1.
    # H(X) = log 4 - (3 log 3)/4, H(Y) = log 2, H(X,Y) = log 4 - (2 log 2)/4.
    x, y = np.array([0.0, 0, 0, 1]), np.array([0.0, 0, 1, 1])
    hx, hy, hxy = math.log(4) - 0.75 * math.log(3), math.log(2), 1.5 * math.log(2)
    assert nmi(x, y, bins=2) == pytest.approx((hx + hy - hxy) / math.sqrt(hx * hy))


@given(st.integers(0, 10_000), st.integers(2, 400), st.floats(0, 1))
@settings(max_examples=60, deadline=None)
def test_symmetric_and_between_0_and_1(seed, size, mix):
    draw = np.random.default_rng(seed)
    x = draw.standard_normal(size)
    y = mix * x + (1 - mix) * draw.standard_t(2, size)
    forward, backward = nmi(x, y), nmi(y, x)
    assert 0 <= forward <= 1
    assert forward == pytest.approx(backward, abs=1e-12)
    assert nmi(x, x) == pytest.approx(1, abs=1e-12)


@given(LABELS, LABELS, st.permutations(range(13)), st.permutations(range(13)))
@settings(max_examples=60, deadline=None)
def test_joint_entropy_does_not_depend_on_how_bins_are_numbered(x, y, p, q):
    size = min(len(x), len(y))
    x, y = np.array(x[:size]), np.array(y[:size])
    a, b = as_codes(x), as_codes(y)
    joint = joint_entropy(a, b)
    assert joint == pytest.approx(
        joint_entropy(as_codes(np.array(p)[x]), as_codes(np.array(q)[y])), abs=1e-12
    )
    assert a.entropy + b.entropy - joint == pytest.approx(mutual_info_score(x, y), abs=1e-12)


@pytest.mark.parametrize("cells", [1, 40, 200, 1000])
def test_a_joint_histogram_larger_than_the_table_is_counted_in_bands(monkeypatch, cells):
    x, y = normal(3000), normal(3000, seed=1)
    a, b = discretise(x, 97), discretise(x + y, 83)
    whole = joint_entropy(a, b)
    monkeypatch.setattr(moeits.histograms, "TABLE_CELLS", cells)
    assert a.counts.size * b.counts.size > cells
    assert joint_entropy(a, b) == pytest.approx(whole, abs=1e-12)
    assert a.entropy + b.entropy - whole == pytest.approx(mutual_info_score(a.codes, b.codes), abs=1e-12)


def test_large_counts_are_summed_like_small_ones(monkeypatch):
    # Joint counts from 1 up, above the 256 that one byte and the table of c log c cover, and above 65,536.
    x = np.repeat(np.arange(9), 3 ** np.arange(4, 13))
    for y in (np.arange(x.size) // 7 % 2, np.zeros(x.size, dtype=int)):
        a, b = as_codes(x), as_codes(y)
        information = mutual_info_score(a.codes, b.codes)
        assert a.entropy + b.entropy - joint_entropy(a, b) == pytest.approx(information, abs=1e-12)
        with monkeypatch.context() as patch:
            patch.setattr(moeits.histograms, "TABLE_CELLS", 6)
            assert a.entropy + b.entropy - joint_entropy(a, b) == pytest.approx(information, abs=1e-12)


@given(st.integers(0, 10_000), st.integers(2, 300), st.sampled_from([2.0**k for k in range(-6, 7)]))
@settings(max_examples=40, deadline=None)
def test_scaling_by_a_power_of_two_and_reflection_change_nothing(seed, size, scale):
    # Powers of two are exact in floating point. A reflection turns half-open bins around, which only matters
    # to a weight that lies on an inner edge: no draw here does.
    x, y = np.random.default_rng(seed).standard_normal((2, size))
    assert nmi(scale * x, y) == nmi(x, y)
    assert nmi(-x, y) == pytest.approx(nmi(x, y), abs=1e-9)


def test_matrix_is_the_weighted_mean_of_the_projections():
    block = {"gate": normal(4, 16, 24), "up": normal(4, 16, 24, seed=1), "down": normal(4, 24, 16, seed=2)}
    gate, up, down = (projection_nmi(block[projection]) for projection in ("gate", "up", "down"))
    R = nmi_matrix(block)
    np.testing.assert_allclose(R, (gate + up + down) / 3, atol=1e-15)
    assert (R == R.T).all()
    assert (np.diagonal(R) == 0).all()
    assert R[1, 2] == pytest.approx(np.mean([nmi(W[1], W[2]) for W in block.values()]))
    official = preset_weights("official", "qwen2_moe")
    weighted = nmi_matrix(block, projection_weights=official)
    np.testing.assert_allclose(weighted, 0.2 * gate + 0.4 * up + 0.4 * down, atol=1e-15)
    times_ten = {projection: 10 * weight for projection, weight in official.items()}
    np.testing.assert_allclose(nmi_matrix(block, projection_weights=times_ten), weighted, atol=1e-15)


def test_presets():
    assert preset_weights("paper", "anything") is None
    thirds = preset_weights("official", "mixtral")
    assert set(thirds.values()) == {1 / 3}
    assert preset_weights("official", "deepseek_v2") == {"gate": 0.2, "up": 0.4, "down": 0.4}
    with pytest.raises(ValueError, match=r"mixtral, qwen2_moe, deepseek_v2, not for olmoe"):
        preset_weights("official", "olmoe")
    with pytest.raises(ValueError, match="no preset 'authors': there are paper, official"):
        preset_weights("authors", "mixtral")


def test_the_number_of_threads_changes_no_bit():
    block = {"up": normal(9, 30, 40), "down": torch.from_numpy(normal(9, 30, 40, seed=3)).bfloat16()}
    one = nmi_matrix(block, n_jobs=1)
    for n_jobs in (2, 3, 16, None):
        np.testing.assert_array_equal(nmi_matrix(block, n_jobs=n_jobs), one)


def test_one_expert_has_a_matrix_of_one_zero():
    np.testing.assert_array_equal(nmi_matrix({"up": normal(1, 4, 5)}), [[0.0]])


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_constant_expert_is_the_first_to_go(dtype):
    W = torch.from_numpy(normal(5, 8, 10)).to(getattr(torch, dtype))
    others = nmi_matrix({"up": torch.cat([W[:2], W[3:]])})
    W[2] = 0.25
    with pytest.warns(UserWarning, match="up of expert 2 is constant"):
        R = nmi_matrix({"up": W})
    left = [0, 1, 3, 4]
    np.testing.assert_array_equal(R[np.ix_(left, left)], others)
    np.testing.assert_array_equal(R[2], [1, 1, 0, 1, 1])
    assert select_experts(R, n_keep=4).removed == (2,)
    with pytest.raises(ValueError, match=r"y: .*entropy is zero"):
        nmi(W[0], W[2])


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda W: W[3, 4].fill_(math.nan), "NaN or infinite"),
        (lambda W: W[0, 0].fill_(math.inf), "NaN or infinite"),
        (lambda W: W[0, 0].fill_(-math.inf), "NaN or infinite"),
    ],
)
def test_bad_weights_are_refused_by_name(dtype, spoil, message):
    W = torch.from_numpy(normal(3, 8, 10)).to(getattr(torch, dtype))
    spoil(W[2])
    with pytest.raises(ValueError, match=f"up of expert 2: .*{message}"):
        nmi_matrix({"gate": torch.from_numpy(normal(3, 8, 10)), "up": W})
    with pytest.raises(ValueError, match=f"y: .*{message}"):
        nmi(W[0], W[2])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"block": {}}, "no projection"),
        ({"block": {"up": np.zeros((0, 4, 4))}}, "up: there are no experts"),
        ({"block": {"up": np.zeros((2, 0, 4))}}, "up of expert 0: there are no weights"),
        (
            {"block": {"up": normal(2, 4, 4), "down": normal(3, 4, 4)}},
            "down has 3 experts, the projections before it 2",
        ),
        ({"block": {"up": [normal(4, 4), normal(4, 5)]}}, r"different sizes, \[16, 20\]"),
        ({"block": {"up": np.ones((2, 4, 4), dtype=np.int8)}}, "weights are int8"),
        ({"bins": 0}, "bins is 0"),
        ({"bins": "sturges"}, "bins is 'sturges'"),
        ({"bins": 100_000}, "at most 65536"),
        ({"bins": 1}, "one bin"),
        ({"n_jobs": 0}, "n_jobs is 0"),
        ({"projection_weights": {"gate": 1}}, "names gate, the block has up"),
        ({"projection_weights": {"up": 0}}, "not all zero"),
        ({"projection_weights": {"up": math.nan}}, "finite"),
        ({"projection_weights": {"up": -1}}, "not negative"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        nmi_matrix(**{"block": {"up": normal(2, 4, 4)}, **arguments})


def test_bad_arguments_of_a_pair_are_refused():
    x = normal(20)
    with pytest.raises(ValueError, match="20 elements and y has 19"):
        nmi(x, x[:19])


def test_nmi_is_that_of_scikit_learn():
    x, y = normal(500), normal(500, seed=1) + normal(500)
    a, b = discretise(x).codes, discretise(y).codes
    expected = normalized_mutual_info_score(a, b, average_method="geometric")
    assert nmi(x, y) == pytest.approx(expected, abs=1e-12)


def test_matrices_survive_the_file(tmp_path):
    matrices = {10: np.eye(3) / 7, 2: np.zeros((2, 2))}
    path = tmp_path / "nmi.npz"
    write_matrices(path, matrices, {"model": "a/b", "bins": "auto"})
    first = path.read_bytes()
    read, made_by = read_matrices(path)
    assert list(read) == [2, 10]
    np.testing.assert_array_equal(read[10], matrices[10])
    assert made_by == {"model": "a/b", "bins": "auto"}
    write_matrices(path, matrices, {"bins": "auto", "model": "a/b"})
    assert path.read_bytes() == first


@pytest.mark.parametrize("content", [b"", b"not a zip", b"PK\x03\x04 cut"])
def test_a_file_of_another_kind_is_refused(tmp_path, content):
    path = tmp_path / "nmi.npz"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"nmi\.npz is not an nmi\.npz"):
        read_matrices(path)
    with pytest.raises(FileNotFoundError):
        read_matrices(tmp_path / "none.npz")


def test_no_deep_learning_framework_is_imported():
    code = "import sys, moeits.nmi, moeits.selection; print({'torch', 'transformers'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"


@pytest.mark.parametrize("module", [moeits.nmi, moeits.selection])
def test_examples_in_the_docstrings_hold(module):
    failed, attempted = doctest.testmod(module)
    assert attempted
    assert not failed


# Corrections and alignment


def random_block(experts=4, neurons=12, width=20, seed=0):
    rng = np.random.default_rng(seed)
    shapes = {"gate": (neurons, width), "up": (neurons, width), "down": (width, neurons)}
    return {key: rng.standard_normal((experts, *shape)).astype(np.float32) for key, shape in shapes.items()}


def permuted(block, expert, order):
    new = {key: part.copy() for key, part in block.items()}
    for key, part in new.items():
        part[expert] = part[expert][:, order] if key == "down" else part[expert][order]
    return new


def test_miller_madow_by_hand():
    weights = {"up": np.array([[[0.0, 0, 1, 1]], [[0.0, 1, 0, 1]], [[0.0, 0, 1, 1]]])}
    R = nmi_matrix(weights, bins=2, correction="miller-madow")
    entropy = math.log(2) + 1 / 8
    assert R[0, 1] == pytest.approx((2 * entropy - math.log(4) - 3 / 8) / entropy)
    assert R[0, 2] == pytest.approx((2 * entropy - math.log(2) - 1 / 8) / entropy)
    assert R[0, 2] == pytest.approx(1)
    assert (R == R.T).all()
    assert (np.diag(R) == 0).all()


def test_corrections_remove_the_bias_of_unrelated_weights():
    block = random_block(6, 40, 50)
    upper = np.triu_indices(6, 1)
    plain = nmi_matrix(block)[upper]
    assert (plain > 0.01).all()
    for correction in ("miller-madow", "null"):
        assert abs(nmi_matrix(block, correction=correction)[upper].mean()) < 0.5 * plain.mean()
    assert abs(nmi_matrix(block, correction="null")[upper].mean()) < 0.03 * plain.mean()


def test_the_null_correction_subtracts_the_mean_of_shuffles():
    block = random_block()
    null = null_nmi(block, moeits.nmi.NULL_DRAWS)
    assert null.shape == (moeits.nmi.NULL_DRAWS, 4, 4)
    assert np.array_equal(null, null.transpose(0, 2, 1))
    assert np.unique(null[:, 0, 1]).size == moeits.nmi.NULL_DRAWS
    np.testing.assert_array_equal(nmi_matrix(block, correction="null"), nmi_matrix(block) - null.mean(0))


def test_shuffled_weights_score_as_shuffled_weights_do():
    x, y = normal(2, 400)
    block = {"up": np.stack([x[None], y[None]])}
    shuffled = nmi(x, np.random.default_rng([5, 0, 1]).permutation(y))
    assert null_nmi(block, 1, seed=5)[0, 0, 1] == pytest.approx(shuffled)


def test_z_scores_tell_related_from_unrelated_weights():
    block = random_block(4, 40, 50)
    for part in block.values():
        part[1] = part[0] + 0.5 * part[1]
    z = nmi_zscores(block, draws=10)
    assert z[0, 1] > 20
    others = z[np.triu_indices(4, 1)][1:]
    assert np.abs(others).max() < 8
    assert (np.diag(z) == 0).all()
    with pytest.raises(ValueError, match="2 shuffles or more"):
        nmi_zscores(block, draws=1)


@given(st.permutations(range(12)), st.integers(0, 3))
@settings(max_examples=20, deadline=None)
def test_aligned_nmi_does_not_depend_on_the_order_of_neurons(order, expert):
    block = random_block()
    aligned = nmi_matrix(block, align=True)
    assert nmi_matrix(permuted(block, expert, list(order)), align=True) == pytest.approx(aligned, abs=1e-12)


def test_alignment_finds_a_permuted_copy():
    block = random_block()
    near = {key: part.copy() for key, part in block.items()}
    for part in near.values():
        part[1] = part[0] + 0.05 * part[1]
    mixed = permuted(near, 1, np.random.default_rng(0).permutation(12))
    assert nmi_matrix(mixed, align=True)[0, 1] == pytest.approx(nmi_matrix(near)[0, 1])
    assert nmi_matrix(mixed)[0, 1] < 0.7 * nmi_matrix(near)[0, 1]


def test_neurons_are_matched_in_pairs():
    first = np.array([[1.0, 0], [0, 1], [1, 1]])
    assert match_neurons(first, first[[2, 0, 1]]).tolist() == [1, 2, 0]


@pytest.mark.parametrize("correction", [None, "miller-madow"])
def test_alignment_reads_every_kind_of_weights(correction):
    block = {key: torch.from_numpy(part).bfloat16() for key, part in random_block().items()}
    exact = {key: part.float().numpy() for key, part in block.items()}
    options = {"align": True, "correction": correction, "bins": 30}
    assert nmi_matrix(block, **options) == pytest.approx(nmi_matrix(exact, **options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"correction": "miller"}, "correction is 'miller': choose one of None, 'miller-madow', 'null'"),
        ({"correction": "null", "align": True}, "not defined with align=True"),
    ],
)
def test_unknown_corrections_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        nmi_matrix(random_block(), **options)


def test_only_known_projections_can_be_aligned():
    with pytest.raises(ValueError, match="knows the neurons of gate, up and down, the block has w1"):
        nmi_matrix({"w1": random_block()["up"]}, align=True)
