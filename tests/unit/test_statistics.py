"""What one pass gathers, against a slow computation token by token."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from tiny import EXPERTS, TOP_K, VOCABULARY, tiny_model, tokens

from moeits import criteria
from moeits.criteria.statistics import (
    fit_routing,
    gather,
    layers_of,
    random_tokens,
)
from moeits.models.families import expert_block, moe_layers
from moeits.models.surgery import prune_model
from moeits.study.gathered import read_statistics, write_statistics
from moeits.study.methods.change import write_block

FAMILIES = ["mixtral", "qwen2_moe", "glm4_moe", "deepseek_v2"]


def calls(model, ids):
    """What the experts of every layer are called with, and give."""
    seen = {}

    def note(number):
        return lambda _, args, output: seen.__setitem__(number, (*args, output))

    hooks = [layer.experts.register_forward_hook(note(layer.layer)) for layer in moe_layers(model)]
    with torch.no_grad():
        model(torch.as_tensor(ids))
    for hook in hooks:
        hook.remove()
    return seen


def expert_output(block, x, expert):
    neurons = torch.nn.functional.silu(block["gate"][expert] @ x) * (block["up"][expert] @ x)
    return neurons, block["down"][expert] @ neurons


@pytest.mark.parametrize("family", FAMILIES)
def test_statistics_are_those_of_every_token(family):
    model = tiny_model(family)
    ids = tokens(batch=3, length=7).numpy()
    found = gather(model, ids, batch_size=2, sample=21)
    seen = calls(model, ids)
    assert set(found) == set(seen)
    for layer in moe_layers(model):
        known, block = found[layer.layer], expert_block(layer)
        x, index, weights, output = seen[layer.layer]
        expected = {
            field.name: np.zeros_like(getattr(known, field.name))
            for field in dataclasses.fields(known)
            if isinstance(getattr(known, field.name), np.ndarray)
        }
        with torch.no_grad():
            for t in range(len(x)):
                outputs = torch.stack([expert_output(block, x[t], e)[1] for e in range(EXPERTS)])
                expected["gram"][t] = (outputs @ outputs.T).numpy()
                expected["mean_outputs"] += outputs.numpy() / len(x)
                for e, weight in zip(index[t].tolist(), weights[t].tolist(), strict=True):
                    neurons, out = expert_output(block, x[t], e)
                    expected["counts"][e] += 1
                    expected["weights"][e] += weight
                    expected["norms"][e] += out.norm().item()
                    expected["weighted_norms"][e] += weight * out.norm().item()
                    expected["inputs_squared"][e] += (weight * x[t]).square().numpy()
                    expected["neurons_squared"][e] += (weight * neurons).square().numpy()
                    expected["gates"][t, e] = weight
                    for other in index[t].tolist():
                        expected["coactivation"][e, other] += 1
        router = dict(model.named_parameters())[f"{layer.name}.gate.weight"].detach()
        expected["logits"] = (x @ router.T).numpy()
        assert known.tokens == 21
        for name, value in expected.items():
            np.testing.assert_allclose(getattr(known, name), value, rtol=1e-4, atol=1e-5, err_msg=name)
        whole = np.einsum("te,tef,tf->", known.gates, known.gram, known.gates)
        assert whole == pytest.approx(output.square().sum().item(), rel=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kept", [(0, 2, 3, 5, 7), (1, 4)])
def test_the_rule_of_the_router_foretells_how_the_pruned_layer_routes(family, kept):
    model = tiny_model(family)
    ids = tokens(batch=4, length=20).numpy()
    known = gather(model, ids, sample=80)
    first = min(known)
    pruned = prune_model(copy.deepcopy(model), {first: kept})
    _, index, weights, _ = calls(pruned, ids)[first]
    gates = np.zeros((80, EXPERTS))
    np.put_along_axis(gates, np.array(kept)[index.numpy()], weights.numpy(), axis=1)
    np.testing.assert_allclose(known[first].routing.gates(known[first].logits, kept), gates, atol=1e-5)


def test_the_sum_of_a_tokens_experts_is_its_top_k():
    known = gather(tiny_model("mixtral"), tokens(batch=2, length=9).numpy())
    for layer in known.values():
        assert layer.counts.sum() == TOP_K * layer.tokens
        assert layer.weights.sum() == pytest.approx(layer.tokens)


def test_batches_do_not_matter_and_the_sample_spreads():
    model = tiny_model("qwen2_moe")
    ids = tokens(batch=4, length=10).numpy()
    one, four = gather(model, ids, batch_size=1, sample=5), gather(model, ids, batch_size=4, sample=40)
    for number, known in one.items():
        np.testing.assert_allclose(known.norms, four[number].norms, rtol=1e-5)
        np.testing.assert_allclose(
            known.logits, four[number].logits[[0, 10, 20, 29, 39]], rtol=1e-4, atol=1e-5
        )


def test_gathering_leaves_the_model_as_it_was():
    model = tiny_model("mixtral").train()
    gather(model, tokens().numpy())
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())


def test_experts_of_another_build_are_refused():
    with pytest.raises(ValueError, match="gated experts without biases"):
        gather(tiny_model("gpt_oss"), tokens().numpy())


@pytest.mark.parametrize(("groups", "top_groups", "top_k"), [(4, 1, 2), (4, 2, 3), (2, 1, 3)])
def test_the_rule_of_a_router_with_groups_is_found(groups, top_groups, top_k):
    model = tiny_model("deepseek_v3", n_group=groups, topk_group=top_groups, top_k=top_k)
    known = gather(model, tokens(batch=4, length=30).numpy(), sample=120)
    for layer in known.values():
        assert (layer.routing.groups, layer.routing.ranked_by) == (groups, 2)
        np.testing.assert_allclose(layer.routing.gates(layer.logits), layer.gates, atol=1e-4)


def test_routing_is_told_apart_by_what_the_router_did():
    logits = np.random.default_rng(0).standard_normal((50, 6))
    for scores in ("softmax", "sigmoid"):
        for normalised in (True, False):
            for bias in (np.zeros(6), np.linspace(0, 1, 6)):
                rule = criteria.base.Routing(scores, 2, normalised, 2.5, bias)
                found = fit_routing(logits, rule.gates(logits), 2, [bias, np.zeros(6)])
                assert (found.scores, found.normalised) == (scores, normalised)
                assert found.scale == pytest.approx(2.5)
                assert np.array_equal(found.bias, bias)


def test_statistics_are_read_as_they_were_written(tmp_path):
    known = gather(tiny_model("glm4_moe"), tokens().numpy())
    write_statistics(tmp_path / "known.npz", known, {"tokens": 18})
    again, settings = read_statistics(tmp_path / "known.npz")
    assert settings == {"tokens": 18}
    assert set(again) == set(known)
    for number, layer in known.items():
        for field in dataclasses.fields(layer):
            mine, theirs = getattr(layer, field.name), getattr(again[number], field.name)
            if field.name == "routing":
                assert theirs.scores == mine.scores == "sigmoid"
                assert np.array_equal(theirs.bias, mine.bias)
            else:
                np.testing.assert_allclose(theirs, mine, rtol=1e-6, atol=1e-6, err_msg=field.name)
    (tmp_path / "other.npz").write_bytes(b"no")
    with pytest.raises(ValueError, match="holds no statistics"):
        read_statistics(tmp_path / "other.npz")


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_written_blocks_are_what_the_model_computes_with(family):
    model = tiny_model(family)
    with torch.no_grad():
        before = model(tokens()).logits
    for layer in moe_layers(model):
        block = layers_of(model)[layer.layer].weights
        order = np.random.default_rng(layer.layer).permutation(block["gate"].shape[1])
        if family == "mixtral":
            block = {n: part[:, :, order] if n == "down" else part[:, order] for n, part in block.items()}
        write_block(layer, block)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens()).logits, before, rtol=1e-4, atol=1e-5)
    write_block(layer, {name: np.zeros_like(part) for name, part in block.items()})
    assert all((part == 0).all() for part in expert_block(layer).values())


def test_random_tokens_come_from_the_whole_vocabulary():
    model = tiny_model("mixtral")
    drawn = random_tokens(model, 5000, length=100, seed=1)
    assert drawn.shape == (50, 100)
    assert set(np.unique(drawn)) == set(range(VOCABULARY))
    assert np.array_equal(drawn, random_tokens(model, 5000, length=100, seed=1))
    assert random_tokens(model, 10, length=20).shape == (1, 20)
