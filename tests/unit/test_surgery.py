"""Pruning in memory: exact, checked before anything changes."""

import copy

import pytest
import torch
from tiny import EXPERTS, tiny_model, tokens

from moeits.families import moe_layers, sizes
from moeits.surgery import masked, prune_model


@pytest.fixture(scope="module", params=["mixtral", "qwen2_moe", "glm4_moe", "deepseek_v2"])
def model(request):
    return tiny_model(request.param)


@torch.no_grad()
def logits(model):
    return model(tokens()).logits


def uneven(model, largest=5):
    """Other experts and another number of them in every layer: 5, 3 and the family's minimum."""
    layers = moe_layers(model)
    counts = [largest, 3, layers[0].minimum][-len(layers) :]
    generator = torch.Generator().manual_seed(3)
    return {
        layer.layer: torch.randperm(EXPERTS, generator=generator)[: max(n, layer.minimum)].tolist()
        for layer, n in zip(layers, counts, strict=True)
    }


def test_pruned_model_equals_the_masked_one(model):
    kept = uneven(model)
    with masked(model, kept):
        reference = logits(model)
    whole = logits(model)
    pruned = logits(prune_model(copy.deepcopy(model), kept))
    torch.testing.assert_close(pruned, reference, atol=1e-5, rtol=1e-5)
    assert (pruned - whole).abs().max() > 0.05  # the removed experts mattered


def test_masking_leaves_no_trace(model):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with masked(model, uneven(model)):
        logits(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_keeping_everything_changes_no_bit(model):
    same = prune_model(copy.deepcopy(model), {layer.layer: range(EXPERTS) for layer in moe_layers(model)})
    assert torch.equal(logits(same), logits(model))
    assert all(
        torch.equal(a, b)
        for a, b in zip(same.state_dict().values(), model.state_dict().values(), strict=True)
    )


def test_layers_not_named_stay_whole(model):
    last = moe_layers(model)[-1].layer
    pruned = prune_model(copy.deepcopy(model), {last: [1, 2, 6]})
    counts = {layer.layer: layer.num_experts for layer in moe_layers(pruned)}
    assert counts == {layer.layer: 3 if layer.layer == last else EXPERTS for layer in moe_layers(model)}
    assert pruned.config.num_experts_per_layer == {str(number): n for number, n in counts.items()}


def test_the_minimum_works_and_one_fewer_is_refused(model):
    layers = moe_layers(model)
    least = layers[0].minimum
    kept = {layer.layer: range(2, 2 + least) for layer in layers}
    with masked(model, kept):
        reference = logits(model)
    pruned = prune_model(copy.deepcopy(model), kept)
    torch.testing.assert_close(logits(pruned), reference, atol=1e-5, rtol=1e-5)
    assert {layer.top_k for layer in moe_layers(pruned)} == {min(least, layers[0].top_k)}
    with pytest.raises(ValueError, match="expert"):
        prune_model(pruned, {layers[0].layer: range(least - 1)})


def test_fewer_experts_than_top_k(model):
    family = model.config.model_type
    wide = tiny_model(family, num_experts_per_tok=4)
    kept = {layer.layer: [0, 3, 6] for layer in moe_layers(wide)}
    with masked(wide, kept):
        reference = logits(wide)
    pruned = prune_model(copy.deepcopy(wide), kept)
    assert {layer.top_k for layer in moe_layers(pruned)} == {3}
    torch.testing.assert_close(logits(pruned), reference, atol=1e-5, rtol=1e-5)


def test_nothing_changes_when_any_layer_is_refused(model):
    victim = copy.deepcopy(model)
    first, last = moe_layers(model)[0].layer, moe_layers(model)[-1].layer
    with pytest.raises(ValueError, match="do not exist"):
        prune_model(victim, {first: [0, 1, 2], last: [0, EXPERTS]})
    assert not hasattr(victim.config, "num_experts_per_layer")
    assert torch.equal(logits(victim), logits(model))


def test_pruning_twice_counts_in_what_is_left(model):
    last = moe_layers(model)[-1].layer
    twice = prune_model(prune_model(copy.deepcopy(model), {last: [1, 4, 5, 7]}), {last: [0, 2, 3]})
    once = prune_model(copy.deepcopy(model), {last: [1, 5, 7]})
    assert torch.equal(logits(twice), logits(once))


def test_sizes_shrink_by_the_removed_experts(model):
    kept = uneven(model)
    before, pruned = sizes(model), prune_model(copy.deepcopy(model), kept)
    after = sizes(pruned)
    expert = before.routed // (EXPERTS * len(kept))
    assert after.routed == expert * sum(len(ids) for ids in kept.values())
    routers = sum(p.numel() for name, p in model.named_parameters() if name.endswith("gate.weight"))
    routers_after = sum(p.numel() for name, p in pruned.named_parameters() if name.endswith("gate.weight"))
    assert before.other - after.other == routers - routers_after


def test_gradients_reach_the_experts_that_stay(model):
    pruned = prune_model(copy.deepcopy(model), uneven(model))
    ids = tokens(batch=4, length=40)
    pruned(ids, labels=ids).loss.backward()
    assert all(layer.experts.down_proj.grad.abs().sum() > 0 for layer in moe_layers(pruned))


def test_group_limited_routing_stays_within_the_chosen_groups():
    model = tiny_model("glm4_moe", n_group=2, topk_group=1, num_experts_per_tok=3)
    pruned = prune_model(model, {1: [0, 2, 5, 7], 2: [1, 2, 3, 5, 6, 7]})
    assert [layer.top_k for layer in moe_layers(pruned)] == [2, 3]
    assert logits(pruned).isfinite().all()


def test_masking_needs_float32():
    model = tiny_model("glm4_moe").bfloat16()
    with pytest.raises(ValueError, match="float32"), masked(model, {1: [0, 1]}):
        pass


def test_quantised_models_are_refused():
    model = tiny_model("mixtral")
    model.is_quantized = True
    with pytest.raises(ValueError, match="quantised"):
        prune_model(model, {0: [0]})
