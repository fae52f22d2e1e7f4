"""Refit: the kept experts' down projections by least squares."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import EXPERTS, tiny_model, tokens

from moeits.healing.refit import least_squares, refit_model
from moeits.models.families import FAMILIES, decoder_layers, moe_layers
from moeits.models.surgery import prune_model
from moeits.models.unstack import ExpertList

ALONE = {"dbrx", "llama4_text", "switch_transformers"}  # no switch for the implementation of their experts
NORMED = {
    family
    for family in FAMILIES
    if family not in ALONE
    and any(getattr(layer.experts, "has_post_expert_norm", False) for layer in moe_layers(tiny_model(family)))
}


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - ALONE))
def test_experts_one_by_one_compute_the_same(family):
    layer = moe_layers(tiny_model(family))[0]
    generator = torch.Generator().manual_seed(1)
    width = ExpertList(layer).experts[0].down.out_features
    states = torch.randn(7, width, generator=generator)
    index = torch.stack([torch.randperm(EXPERTS, generator=generator)[:2] for _ in range(7)])
    weights = torch.rand(7, 2, generator=generator)
    with torch.no_grad():
        expected = layer.experts(states, index, weights)
        found = ExpertList(layer)(states, index, weights)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", sorted(ALONE))
def test_experts_without_a_switch_are_refused(family):
    with pytest.raises(ValueError, match="cannot be adapted one by one"):
        ExpertList(moe_layers(tiny_model(family))[0])


@given(st.integers(2, 12), st.integers(2, 12), st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_least_squares_from_rows_or_columns_is_the_ridge_solution(rows, columns, seed):
    rng = np.random.default_rng(seed)
    mixed, wanted, start = (rng.normal(size=s) for s in [(rows, columns), (rows, 3), (columns, 3)])
    penalty = 0.1 * (mixed**2).sum() / columns
    expected = start + np.linalg.solve(
        mixed.T @ mixed + penalty * np.eye(columns), mixed.T @ (wanted - mixed @ start)
    )
    found = least_squares(*map(torch.from_numpy, (mixed, wanted, start)), ridge=0.1)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-3, atol=1e-4)


def test_dead_neurons_stay_as_they_were():
    start = torch.ones(3, 2)
    assert least_squares(torch.zeros(5, 3), torch.ones(5, 2), start).equal(start)


@pytest.mark.parametrize(
    "family", ["mixtral", "qwen2_moe", "glm4_moe", "deepseek_v2", "gpt_oss", "nemotron_h"]
)
def test_the_output_comes_nearer_to_the_whole_model(family):
    original = tiny_model(family)
    model = copy.deepcopy(original)
    numbers = [layer.layer for layer in moe_layers(model)]
    prune_model(model, {number: range(5) for number in numbers})
    blocks, unseen = tokens(seed=1, batch=48, length=32), tokens(seed=2, batch=8, length=32)

    def distance():
        with torch.no_grad():
            return (model(unseen).logits - original(unseen).logits).square().mean()

    before = distance()
    report = refit_model(model, original, blocks)
    assert [entry.layer for entry in report] == numbers
    assert all(entry.after < entry.before for entry in report)
    assert distance() < before


def test_a_model_that_lost_nothing_stays_as_it_is():
    original = tiny_model("qwen2_moe")
    model = copy.deepcopy(original)
    prune_model(model, {})
    for entry in refit_model(model, original, tokens(batch=4, length=16)):
        assert entry.before == pytest.approx(0, abs=1e-10)
    for name, parameter in original.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], parameter, rtol=1e-4, atol=1e-5)


def test_lost_copies_are_recovered():
    """Where the removed expert was a copy, only the router's weights change, which the fit takes back."""
    original = tiny_model("mixtral", num_experts_per_tok=EXPERTS)  # every token uses all experts
    with torch.no_grad():
        for layer in moe_layers(original):
            for parameter in layer.experts.parameters():
                parameter[1] = parameter[0]
            router = dict(original.named_parameters())[layer.router[0]]
            router.zero_()  # alike weights
    model = copy.deepcopy(original)
    prune_model(model, {layer.layer: [0, *range(2, EXPERTS)] for layer in moe_layers(model)})
    report = refit_model(model, original, tokens(batch=64, length=32), ridge=1e-6)
    assert all(entry.after < 1e-5 < entry.before for entry in report)


@pytest.mark.parametrize(
    ("batch_size", "attention", "passes"),
    [(4, "eager", 1), (2, "eager", 1), (1, "eager", 1), (3, "eager", 2), (3, "sdpa", 1)],
    ids=["one batch", "two equal", "four equal", "two masks", "two without a mask"],
)
def test_batches_change_nothing_and_those_of_one_mask_pass_the_whole_model_once(
    batch_size, attention, passes
):
    original = tiny_model("qwen2_moe")
    original.set_attn_implementation(attention)
    blocks = tokens(seed=1, batch=4, length=16)

    def refitted(size):
        kept = {layer.layer: range(5) for layer in moe_layers(original)}
        model = prune_model(copy.deepcopy(original), kept)
        last, calls = decoder_layers(model)[1][-1], []
        last.register_forward_hook(lambda *_: calls.append(1))
        refit_model(model, original, blocks, batch_size=size)
        down = [expert.down.weight for layer in moe_layers(model) for expert in ExpertList(layer).experts]
        return down, len(calls)

    together, _ = refitted(4)
    found, calls = refitted(batch_size)
    torch.testing.assert_close(found, together, rtol=1e-3, atol=1e-4)
    batches = -(-4 // batch_size)
    assert calls == passes + 2 * batches  # looked at and passed, by every batch


def test_models_of_different_depth_are_refused():
    with pytest.raises(ValueError, match="experts in layers"):
        refit_model(tiny_model("qwen2_moe"), tiny_model("mixtral"), tokens())
