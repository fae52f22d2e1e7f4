"""The rule that finds Mixture-of-Experts layers, expert blocks, and parameter counts."""

import re

import pytest
import torch
from tiny import EXPERTS, HIDDEN, NEURONS, TOP_K, auto, tiny_config, tiny_model
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, LlamaConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from moeits.models.families import (
    FAMILIES,
    REFUSED,
    Family,
    check_kept,
    expert_block,
    families_table,
    moe_layers,
    sizes,
)


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def model(request):
    return tiny_model(request.param)


def top_k_of(model):
    return 1 if model.config.model_type == "switch_transformers" else TOP_K


@pytest.mark.parametrize(
    ("family", "numbers"),
    [
        ("mixtral", [0, 1, 2]),
        ("switch_transformers", [1, 3]),
        ("deepseek_v2", [1, 2]),
        ("qwen3_moe", [0, 2]),
        ("nemotron_h", [1]),
    ],
)
def test_every_moe_layer_is_found_under_its_decoder_number(family, numbers):
    assert [layer.layer for layer in moe_layers(tiny_model(family))] == numbers


def test_counts_are_the_configurations(model):
    layers = moe_layers(model)
    assert {layer.num_experts for layer in layers} == {EXPERTS}
    assert {layer.top_k for layer in layers} == {top_k_of(model)}


def test_expert_block_is_what_the_experts_compute(model):
    layer = moe_layers(model)[0]
    block, experts, tokens = expert_block(layer), layer.experts, 4
    x = torch.randn(tokens, HIDDEN, generator=torch.Generator().manual_seed(1))
    biases = dict(experts.named_parameters())
    with torch.no_grad():
        for expert in (0, 3, EXPERTS - 1):
            if model.config.model_type == "switch_transformers":
                chosen = torch.nn.functional.one_hot(torch.full((tokens, 1), expert), EXPERTS)
                computed = experts(x, chosen, torch.ones(tokens, 1))
            elif hasattr(experts, "is_transposed") or not hasattr(
                experts, "down_proj"
            ):  # a class of transformers' interface for experts
                computed = experts(x, torch.full((tokens, 1), expert), torch.ones(tokens, 1))
            else:
                computed = experts(x.repeat(EXPERTS, 1)).view(EXPERTS, tokens, HIDDEN)[expert]
            up = x @ block["up"][expert].T
            if model.config.model_type == "switch_transformers":
                neurons = up.relu()
            elif model.config.model_type == "dbrx":
                neurons = torch.nn.functional.silu(x @ block["gate"][expert].T) * up
            elif "gate" not in block:
                neurons = experts.act_fn(up)
            elif getattr(experts, "is_concatenated", True):
                gate = x @ block["gate"][expert].T
                apply = getattr(experts, "_apply_gate", None)
                neurons = apply(torch.cat([gate, up], -1)) if apply else experts.act_fn(gate) * up
            else:
                both = torch.stack([x @ block["gate"][expert].T, up], -1).flatten(-2)
                neurons = experts._apply_gate(both + biases["gate_up_proj_bias"][expert])
            expected = neurons @ block["down"][expert].T
            if "down_proj_bias" in biases:
                expected = expected + biases["down_proj_bias"][expert]
            torch.testing.assert_close(computed.reshape(tokens, HIDDEN), expected, atol=1e-5, rtol=1e-5)


def test_expert_block_has_the_same_layout_everywhere_and_copies_nothing(model):
    layer = moe_layers(model)[0]
    block = expert_block(layer)
    shapes = {"gate": (NEURONS, HIDDEN), "up": (NEURONS, HIDDEN), "down": (HIDDEN, NEURONS)}
    if model.config.model_type in {"nemotron_h", "switch_transformers"}:
        shapes.pop("gate")
    assert {name: tuple(weights.shape) for name, weights in block.items()} == {
        name: (EXPERTS, *shape) for name, shape in shapes.items()
    }
    if model.config.model_type == "switch_transformers":  # each expert has its own weights
        return
    stored = {parameter.data_ptr() for parameter in layer.experts.parameters()}
    assert {weights.untyped_storage().data_ptr() for weights in block.values()} <= stored


def test_every_causal_model_of_transformers_with_experts_is_served_or_refused():
    text_of = {  # the text model of these is served under its own name
        "dots3_note": "dots3_note_text",
        "gemma4": "gemma4_text",
        "llama4": "llama4_text",
        "qwen3_5_moe": "qwen3_5_moe_text",
        "qwen4_exp": "qwen4_exp_text",
    }
    with_experts = set()
    for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        config_class = CONFIG_MAPPING[name]
        parts = [config_class, *config_class.sub_configs.values()]
        fields = {field for part in parts for base in getattr(part, "__mro__", []) for field in vars(base)}
        if any(re.search(r"^(?!_).*(expert|moe)", field) for field in fields):
            with_experts.add(text_of.get(name, name))
    unknown = with_experts - set(FAMILIES) - set(REFUSED)
    assert not unknown
    # Encoder-decoder models, and what is found among the models for images and text alone.
    images = {"glm4v_moe_text", "mistral4", "qwen3_vl_moe_text", "unlimited_ocr_text"}
    assert set(FAMILIES) - with_experts == images | {"switch_transformers"}
    assert set(REFUSED) - with_experts == {"nllb-moe"}


@pytest.mark.parametrize("family", sorted(REFUSED))
def test_refused_families_are_refused_with_the_reason(family):
    hollow = torch.nn.Module()
    hollow.config = CONFIG_MAPPING[family]()
    with pytest.raises(ValueError, match=f"'{family}' cannot be pruned: {re.escape(REFUSED[family])}"):
        moe_layers(hollow)


@pytest.mark.parametrize("family", ["deepseek_v4", "inkling_text"])
def test_the_rule_itself_recognises_routers_that_it_cannot_cut(family, monkeypatch):
    monkeypatch.setitem(FAMILIES, family, Family())
    monkeypatch.delitem(REFUSED, family)
    with pytest.raises(ValueError, match="router"):
        moe_layers(tiny_model(family))


def test_the_table_lists_every_family():
    table = {name: (cls, fewest) for name, cls, fewest in families_table()}
    assert set(table) == set(FAMILIES)
    assert table["deepseek_v3"] == ("DeepseekV3ForCausalLM", "2")
    assert table["gemma4_text"][1] == "top-k"


def test_the_table_says_the_fewest_experts(model):
    fewest = {name: fewest for name, _, fewest in families_table()}[model.config.get_text_config().model_type]
    assert {layer.minimum for layer in moe_layers(model)} == {
        top_k_of(model) if fewest == "top-k" else int(fewest)
    }


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


def test_sizes_of_mixtral_8x7b():
    with torch.device("meta"):
        mixtral = AutoModelForCausalLM.from_config(CONFIG_MAPPING["mixtral"](vocab_size=32000))
    counted = sizes(mixtral)
    assert counted.total == 46_702_792_704  # 46.7B, of which a token uses 12.9B
    assert counted.active == pytest.approx(12.9e9, rel=0.005)
    assert counted.routed == 32 * 8 * 3 * 4096 * 14336


def test_sizes_count_tied_embeddings_once():
    tied, untied = (sizes(tiny_model("mixtral", tie_word_embeddings=tie)) for tie in (True, False))
    assert untied.total - tied.total == 128 * HIDDEN
    assert untied.bytes - tied.bytes == 4 * 128 * HIDDEN


def test_sizes_need_no_weights(model):
    with torch.device("meta"):
        config = tiny_config(model.config.get_text_config().model_type)
        hollow = auto(config).from_config(config, dtype=torch.float32)
    assert sizes(hollow) == sizes(model)


def test_sizes_agree_with_the_blocks(model):
    layers, counted = moe_layers(model), sizes(model)
    weights = sum(block.numel() for layer in layers for block in expert_block(layer).values())
    if model.config.model_type == "gpt_oss":
        weights += len(layers) * EXPERTS * (2 * NEURONS + HIDDEN)  # biases
    assert counted.routed == weights
    assert counted.total - counted.active == weights * (EXPERTS - top_k_of(model)) // EXPERTS


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
