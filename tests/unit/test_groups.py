"""Routers that first select groups of experts: every choice keeps their groups equally large, exactly."""

import copy

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import EXPERTS, assert_logits, logits, tiny_model, tiny_tokenizer, tokens

from moeits import criteria, simplify
from moeits.cli import main
from moeits.criteria import CRITERIA
from moeits.criteria.statistics import gather, layers_of
from moeits.kept import Kept
from moeits.models import checkpoint
from moeits.models.families import FAMILIES, moe_layers
from moeits.models.folder import load_model
from moeits.models.surgery import masked, prune_model
from moeits.selection import DIAGONALS, select_experts, select_share


def redundancies(seed, experts):
    A = np.random.default_rng(seed).random((experts, experts))
    return np.triu(A, 1) + np.triu(A, 1).T


def per_group(kept, experts, groups):
    return [sum(k // (experts // groups) == group for k in kept) for group in range(groups)]


@given(
    st.integers(0, 10_000),
    st.sampled_from([(4, 1), (12, 2), (12, 3), (16, 4), (16, 8)]),
    st.lists(st.floats(0, 4), min_size=1, max_size=5),
    st.sampled_from(DIAGONALS),
    st.integers(1, 5),
)
@settings(max_examples=80, deadline=None)
def test_groups_stay_equal_and_a_larger_tau_keeps_a_superset(seed, shape, taus, diagonal, floor):
    experts, groups = shape
    R, before = redundancies(seed, experts), set()
    for tau in sorted(taus):
        free = select_experts(R, tau, diagonal=diagonal)
        chosen = select_experts(R, tau, diagonal=diagonal, groups=groups, at_least=floor)
        count = len(chosen.kept)
        assert per_group(chosen.kept, experts, groups) == [count // groups] * groups
        assert count >= min(floor, experts)
        assert chosen.threshold == free.threshold
        assert chosen.floor_reached or abs(count - len(free.kept)) <= groups / 2
        assert set(chosen.kept) >= before
        before = set(chosen.kept)
        by_count = select_experts(R, n_keep=count, groups=groups)
        assert by_count.kept == chosen.kept
        if groups == 1 and not chosen.floor_reached:
            assert chosen == free


def test_a_round_by_hand():
    # Groups {0, 1} and {2, 3}. The largest pair is (0, 1); row means 1.6/3 and 1.3/3: expert 0 is removed.
    # Then (1, 3) with 0.3 is the largest that is left, but group one has lost an expert: 3 is removed, though
    # its row mean 0.4/2 is below that of expert 1, 0.4/2 + 0.05.
    R = np.array([[0, 0.9, 0.4, 0.3], [0.9, 0, 0.2, 0.3], [0.4, 0.2, 0, 0.1], [0.3, 0.3, 0.1, 0]])
    first, second = select_experts(R, n_keep=2, groups=2).steps
    assert (first.removed, first.pair) == (0, (0, 1))
    assert (second.removed, second.pair) == (3, (1, 3))
    assert select_experts(R, n_keep=2).removed == (0, 1)


def test_a_share_of_groups_is_the_nearest_and_uneven_counts_are_refused():
    matrices = {layer: redundancies(layer, 16) for layer in range(4)}
    tau, chosen = select_share(matrices, 0.6, groups=4)
    counts = [len(selection.kept) for selection in chosen.values()]
    assert abs(sum(counts) - 0.6 * 64) <= 2
    assert chosen == {layer: select_experts(R, tau, groups=4) for layer, R in matrices.items()}
    with pytest.raises(ValueError, match=r"n_keep is 6, but the router .* 4 groups .*: choose 4 or 8"):
        select_experts(matrices[0], n_keep=6, groups=4)
    with pytest.raises(ValueError, match="16 experts cannot form 3 groups"):
        select_experts(matrices[0], 1, groups=3)


def grouped(family, **settings):
    """Small model whose router selects 2 of 4 groups of 4 experts."""
    counts = (
        {"n_routed_experts": 16} if family == "deepseek_v2" else {"n_routed_experts": 16, "num_experts": 16}
    )
    options = {"topk_method": "group_limited_greedy"} if family == "deepseek_v2" else {}
    return tiny_model(family, **{"n_group": 4, "topk_group": 2, "top_k": 3, **counts, **options, **settings})


def check_exact(pruned, whole, kept):
    """Equal groups, and the logits of the model with the removed experts masked."""
    for layer in moe_layers(whole):
        ids = kept[layer.layer]
        assert len(set(per_group(ids, layer.num_experts, layer.groups))) == 1
        assert len(ids) >= layer.minimum
    with masked(whole, kept):
        reference = logits(whole)
    assert_logits(pruned, reference)


GROUPED = [
    "deepseek_v2",
    *sorted(name for name, f in FAMILIES.items() if f.minimum == 2 and name != "phimoe"),
]


@pytest.mark.parametrize("family", GROUPED)
def test_pruned_by_a_share_equals_the_masked_model(family):
    model = grouped(family)
    assert {layer.groups for layer in moe_layers(model)} == {4}
    result = simplify(copy.deepcopy(model), share=0.6, n_jobs=1)
    check_exact(result.model, model, result.kept.layers)


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3"])
@pytest.mark.parametrize("budget", [{"tau": 0}, {"tau": 1.25}, {"n_keep": 8}], ids=str)
def test_pruned_by_any_budget_equals_the_masked_model(family, budget):
    model = grouped(family)
    result = simplify(copy.deepcopy(model), **budget, n_jobs=1)
    check_exact(result.model, model, result.kept.layers)


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3"])
def test_every_criterion_keeps_groups_equal(family):
    model = grouped(family)
    text = tokens(batch=4, length=40).numpy()
    layers = layers_of(model, gather(model, text))
    for name, entry in CRITERIA.items():
        if entry.needs_loss:
            continue
        for budget in ({"n_keep": 8}, {"share": 0.6}):
            chosen = criteria.criterion(name).select(layers, **budget)
            assert all(len(set(per_group(ids, 16, 4))) == 1 for ids in chosen.values()), name
            assert all(list(ids) == sorted(set(ids)) for ids in chosen.values()), name
            prune_model(copy.deepcopy(model), chosen)
    with pytest.raises(ValueError, match=r"n_keep is 10, but the router selects among 4 groups"):
        criteria.criterion("reap").select(layers, n_keep=10)


def run(*arguments):
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exception is None or result.exit_code, result.exception
    return result


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setattr(checkpoint, "CACHE", tmp_path / "cache")


@pytest.mark.usefixtures("cache")
def test_the_commands_prune_a_router_with_eight_groups(tmp_path, monkeypatch):
    text = tokens(batch=2, length=64).numpy()
    monkeypatch.setattr("moeits.corpus.blocks", lambda *_, **__: text)
    model = grouped("deepseek_v3", n_group=8, n_routed_experts=32, topk_group=4, hidden_size=32)
    model.save_pretrained(tmp_path / "source")
    tiny_tokenizer().save_pretrained(tmp_path / "source")
    for name, budget in (("tau", 1.25), ("share", 0.6), ("n-keep", 16)):
        arguments = ["--n-jobs", 1, f"--{name}", budget, "-o", tmp_path / name]
        assert run("prune", tmp_path / "source", *arguments).exit_code == 0
        pruned = load_model(tmp_path / name)
        check_exact(pruned, model, pruned.kept.layers)
    kept = tmp_path / "reap.json"
    chosen = run("select", tmp_path / "source", "--criterion", "reap", "--share", 0.6, "-o", kept)
    assert chosen.exit_code == 0
    assert run("prune", tmp_path / "source", "--kept", kept, "-o", tmp_path / "reap").exit_code == 0
    check_exact(load_model(tmp_path / "reap"), model, Kept.read(kept).layers)


_AS_WIDE = {
    "dbrx": {"d_model": EXPERTS},
    "glm4v_moe_text": {"head_dim": 16},
    "granitemoehybrid": {"mamba_d_head": 2},
}
"""Other sizes that follow from the width, by family."""


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_command_prunes_every_family_as_wide_as_it_has_experts(family, tmp_path):
    model = tiny_model(family, hidden_size=EXPERTS, **_AS_WIDE.get(family, {}))
    model.save_pretrained(tmp_path / "source")
    pruned = run("prune", tmp_path / "source", "--tau", 1.25, "--n-jobs", 1, "-o", tmp_path / "pruned")
    assert pruned.exit_code == 0, pruned.output
    pruned = load_model(tmp_path / "pruned")
    assert any(layer.num_experts < EXPERTS for layer in moe_layers(pruned))
    check_exact(pruned, model, pruned.kept.layers)
