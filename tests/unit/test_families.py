"""The rule that finds Mixture-of-Experts layers, expert blocks, and parameter counts."""

import pytest
import torch
from tiny import EXPERTS, HIDDEN, NEURONS, TOP_K, tiny_config, tiny_model
from transformers import AutoModelForCausalLM, LlamaConfig

from moeits.families import FAMILIES, check_kept, expert_block, moe_layers, sizes

FIRST_MOE_LAYER = {"mixtral": 0, "qwen2_moe": 1, "glm4_moe": 1, "deepseek_v2": 1}


@pytest.fixture(scope="module", params=sorted(FIRST_MOE_LAYER))
def model(request):
    return tiny_model(request.param)


def test_every_moe_layer_is_found_under_its_decoder_number(model):
    layers = moe_layers(model)
    first = FIRST_MOE_LAYER[model.config.model_type]
    assert [layer.layer for layer in layers] == list(range(first, 3))
    assert {layer.num_experts for layer in layers} == {EXPERTS}
    assert {layer.top_k for layer in layers} == {TOP_K}


def test_expert_block_is_what_the_experts_compute(model):
    layer = moe_layers(model)[0]
    block = expert_block(layer)
    assert {name: tuple(weights.shape) for name, weights in block.items()} == {
        "gate": (EXPERTS, NEURONS, HIDDEN),
        "up": (EXPERTS, NEURONS, HIDDEN),
        "down": (EXPERTS, HIDDEN, NEURONS),
    }
    x = torch.randn(4, HIDDEN, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for expert in range(EXPERTS):
            chosen = torch.full((4, 1), expert)
            computed = layer.experts(x, chosen, torch.ones(4, 1))
            neurons = layer.experts.act_fn(x @ block["gate"][expert].T) * (x @ block["up"][expert].T)
            torch.testing.assert_close(computed, neurons @ block["down"][expert].T)


def test_expert_block_copies_nothing(model):
    layer = moe_layers(model)[0]
    assert expert_block(layer)["up"].untyped_storage().data_ptr() == layer.experts.gate_up_proj.data_ptr()


def test_sizes_by_hand():
    # Embeddings and head 2 V d; a layer has attention 2 d d + 2 d (2 heads of 16), router E d and two norms.
    model = tiny_model("mixtral")
    expert = 3 * HIDDEN * NEURONS
    other = 2 * 128 * HIDDEN + 3 * (2 * HIDDEN**2 + 2 * HIDDEN * 32 + EXPERTS * HIDDEN + 2 * HIDDEN) + HIDDEN
    counted = sizes(model)
    assert counted.routed == 3 * EXPERTS * expert
    assert counted.other == other
    assert counted.total == other + 3 * EXPERTS * expert
    assert counted.active == other + 3 * TOP_K * expert
    assert counted.bytes == 4 * counted.total


def test_sizes_count_tied_embeddings_once():
    tied, untied = (sizes(tiny_model("mixtral", tie_word_embeddings=tie)) for tie in (True, False))
    assert untied.total - tied.total == 128 * HIDDEN
    assert untied.bytes - tied.bytes == 4 * 128 * HIDDEN


def test_sizes_need_no_weights(model):
    with torch.device("meta"):
        hollow = AutoModelForCausalLM.from_config(tiny_config(model.config.model_type), dtype=torch.float32)
    assert sizes(hollow) == sizes(model)


def test_dense_model_is_refused():
    with torch.device("meta"):
        dense = AutoModelForCausalLM.from_config(LlamaConfig(num_hidden_layers=1, vocab_size=8))
    with pytest.raises(ValueError, match="'llama' model is dense"):
        moe_layers(dense)


def test_unknown_family_is_refused_with_what_to_add(monkeypatch):
    model = tiny_model("mixtral")
    monkeypatch.delitem(FAMILIES, "mixtral")
    with pytest.raises(ValueError, match=r"'mixtral' are not known; known are .*qwen2_moe.*FAMILIES"):
        moe_layers(model)


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        ({0: [0, 1]}, r"no Mixture-of-Experts layer \[0\].* \[1, 2\]"),
        ({1: [0, 8]}, r"layer 1: experts \[8\] do not exist"),
        ({1: [-1, 2]}, r"layer 1: experts \[-1\] do not exist"),
        ({1: [2, 3, 3]}, r"layer 1: experts \[3\] are given more than once"),
        ({2: []}, "layer 2: no expert is kept"),
        ({2: [0.5, 1]}, "layer 2: kept experts must be a list of integers"),
        ({2: 3}, "layer 2: kept experts must be a list of integers"),
        ({"1": [0, 1]}, "no Mixture-of-Experts layer"),
        ({2: [5]}, "layer 2: 1 kept, but at least 2 experts must stay"),
    ],
)
def test_bad_choices_are_refused(kept, message):
    with pytest.raises(ValueError, match=message):
        check_kept(moe_layers(tiny_model("glm4_moe")), kept)


def test_groups_must_stay_equally_large():
    layers = moe_layers(
        tiny_model("deepseek_v2", n_group=2, topk_group=1, topk_method="group_limited_greedy")
    )
    assert check_kept(layers, {1: [5, 0]})[1] == (0, 5)
    with pytest.raises(ValueError, match=r"2 groups .* kept per group: \[2, 1\]"):
        check_kept(layers, {1: [0, 1, 5]})


def test_routers_that_rank_groups_by_two_scores_need_two_in_each():
    layers = moe_layers(tiny_model("glm4_moe", n_group=2, topk_group=1))
    assert [layer.minimum for layer in layers] == [4, 4]
    with pytest.raises(ValueError, match="at least 4 experts"):
        check_kept(layers, {1: [0, 4]})
