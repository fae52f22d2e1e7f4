"""Small random models of every family, for tests: no two of their sizes are equal by accident."""

import copy
import inspect
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import CONFIG_MAPPING, PreTrainedTokenizerFast

from moeits.models.families import TOP_KS, auto_class

HIDDEN, LAYERS, EXPERTS, TOP_K, NEURONS, VOCABULARY = 64, 3, 8, 2, 32, 128

_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": NEURONS,
    "moe_intermediate_size": NEURONS,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "shared_expert_intermediate_size": NEURONS,
    "shared_intermediate_size": NEURONS,
    "intermediate_size_mlp": NEURONS,
    "moe_shared_expert_intermediate_size": NEURONS,
    "num_experts": EXPERTS,
    "num_local_experts": EXPERTS,
    "n_routed_experts": EXPERTS,
    "moe_num_experts": EXPERTS,
    "num_experts_per_tok": TOP_K,
    "num_experts_per_token": TOP_K,
    "moe_topk": TOP_K,
    "moe_k": TOP_K,
}

_LATENT = {"head_dim": 8, "num_key_value_heads": 4}
_FULL = ["full_attention"] * LAYERS
_MIXED = ["full_attention", "linear_attention", "full_attention"]
_LINEAR = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}

_SPECIAL = {
    "dbrx": {
        "d_model": HIDDEN,
        "n_heads": 4,
        "n_layers": LAYERS,
        "max_seq_len": 256,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {
            "ffn_hidden_size": NEURONS,
            "hidden_size": HIDDEN,
            "moe_num_experts": EXPERTS,
            "moe_top_k": TOP_K,
        },
    },
    "switch_transformers": {
        "d_model": HIDDEN,
        "d_kv": 16,
        "d_ff": NEURONS,
        "num_heads": 4,
        "num_layers": 2,
        "num_decoder_layers": 2,  # as many, for transformers' cache counts the encoder's
        "num_sparse_encoder_layers": 1,
        "num_sparse_decoder_layers": 1,
        "expert_capacity": 3,
        "decoder_start_token_id": 0,
    },
    "axk1": _LATENT,
    "axk2": _LATENT,
    "bailing_hybrid": {**_LATENT, "num_hidden_layers": 8},
    "beam": {"mlp_layer_types": ["dense", "sparse", "sparse"]},
    "deepseek_v2": {**_LATENT, "q_lora_rank": None, "topk_method": "greedy", "n_shared_experts": 1},
    "deepseek_v3": {**_LATENT, "n_shared_experts": 1},
    "deepseek_v32": _LATENT,
    "dots1": {"n_shared_experts": 1, "sliding_window": 32, "layer_types": _FULL},
    "dots3_note_text": {
        **_LATENT,
        "use_sliding_window": False,
        "index_n_heads": 4,
        "index_head_dim": 16,
        "index_topk": 64,
        "shared_experts_intermediate_size": NEURONS,
    },
    "gemma4_text": {
        "enable_moe_block": True,
        "top_k_experts": TOP_K,
        "hidden_size_per_layer_input": 16,
        "vocab_size_per_layer_input": VOCABULARY,
    },
    "glm4_moe_lite": _LATENT,
    "glm4v_moe_text": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
    },
    "glm_moe_dsa": _LATENT,
    "gpt_oss": {
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "sliding_window": 32,
    },
    "granitemoehybrid": {"layer_types": ["attention"] * LAYERS, "mamba_n_heads": 8, "mamba_d_head": 16},
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 1,
        "expert_layer_offset": 0,
        "use_mamba_kernels": False,
    },
    "kimi_linear": {
        **_LATENT,
        "linear_head_dim": 16,
        "linear_num_heads": 4,
        "layer_types": _MIXED,
    },
    "lfm2_moe": {"num_dense_layers": 1, "layer_types": ["full_attention", "conv", "full_attention"]},
    "qwen2_moe": {"mlp_only_layers": [0]},
    "qwen3_moe": {"mlp_only_layers": [1]},
    "qwen3_5_moe_text": {**_LINEAR, "layer_types": _MIXED},
    "qwen3_next": {**_LINEAR, "layer_types": _MIXED},
    "qwen4_exp_text": {
        **_LINEAR,
        "hc_lowrank": 8,
        "layer_types": ["indexed_attention", "linear_attention", "indexed_attention"],
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 64,
        "indexer_compress_ratio": 4,
    },
}


# Of encoders for images and sound, under any of the names that these sizes have.
_TOWER = {
    **dict.fromkeys(("depth", "num_hidden_layers", "num_layers", "encoder_layers", "n_layers"), 1),
    **dict.fromkeys(
        ("hidden_size", "embed_dim", "d_model", "projector_input_dim", "projector_output_dim"), 32
    ),
    "vision_output_dim": 32,
    "mlp_dim": 32,
    "global_attn_indexes": [0],
    **dict.fromkeys(
        ("num_heads", "num_attention_heads", "num_key_value_heads", "encoder_attention_heads"), 2
    ),
    **dict.fromkeys(("intermediate_size", "encoder_ffn_dim"), 32),
    **dict.fromkeys(("out_hidden_size", "output_dim"), HIDDEN),
    "image_size": 28,
    "patch_size": 14,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0],
}


def tiny_config(family: str, *, top_k: int = TOP_K, **settings):
    """Configuration of a small model; `settings` override, in one with several parts those of its text part.

    A text part that is never a model of its own comes with the rest of its model.
    """
    config_class = CONFIG_MAPPING[family]
    if "text_config" not in config_class.sub_configs and auto_class(config_class) is None:
        config_class = next(
            whole
            for whole in CONFIG_MAPPING.values()
            if getattr(whole.sub_configs.get("text_config"), "model_type", None) == family
        )
    if text := config_class.sub_configs.get("text_config"):
        towers = {name: _tower(part) for name, part in _parts(config_class()) if name != "text_config"}
        texts = _text_config(text.model_type, top_k, settings).to_dict()
        return config_class(text_config=texts, **towers)
    return _text_config(family, top_k, settings)


def _parts(config) -> list[tuple[str, object]]:
    parts = [(name, getattr(config, name, None)) for name in config.sub_configs]
    return [(name, part) for name, part in parts if part is not None]


def _tower(config) -> dict:
    sizes = {key: value for key, value in _TOWER.items() if getattr(config, key, None) is not None}
    return {"model_type": config.model_type, **sizes, **{name: _tower(part) for name, part in _parts(config)}}


def _known(config_class) -> set[str]:
    known = set(inspect.signature(config_class.__init__).parameters)
    for base in config_class.__mro__:
        known |= set(getattr(base, "__annotations__", {}))
    return known


def _text_config(family: str, top_k: int, settings: dict):
    config_class = CONFIG_MAPPING[family]
    known = _known(config_class)
    common = {key: top_k if key in TOP_KS else value for key, value in _COMMON.items() if key in known}
    special = _SPECIAL.get(family, {})
    if "ffn_config" in special:
        special = {**special, "ffn_config": {**special["ffn_config"], "moe_top_k": top_k}}
    return config_class(**{**common, **special, **settings})


def auto(model_or_config):
    """Automatic class of transformers that loads a model."""
    return getattr(transformers, auto_class(type(getattr(model_or_config, "config", model_or_config)))[0])


def tiny_model(family: str, *, seed: int = 0, **settings) -> torch.nn.Module:
    """Small random model whose routers decide clearly and whose biases are not zero."""
    config = tiny_config(family, **settings)
    generator = torch.Generator().manual_seed(seed)
    model = auto(config).from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            bias = name.endswith("bias") and ("expert" in name or "router" in name or "correction" in name)
            if (tensor.dim() >= 2 or bias) and tensor.is_floating_point():
                tensor.copy_(0.15 * torch.randn(tensor.shape, generator=generator))
    return model


def tokens(*, seed: int = 0, batch: int = 2, length: int = 9) -> torch.Tensor:
    """Random token ids (batch, length)."""
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    """Logits of the tokens of :func:`tokens`."""
    decoder = {"decoder_input_ids": tokens(seed=1)} if model.config.is_encoder_decoder else {}
    return model(tokens(), **decoder).logits


@torch.no_grad()
def rounding(model: torch.nn.Module) -> float:
    """Largest change of a logit when every weight changes in its last bit, up or down at random.

    A sum that is taken in another order, as kernels and processors do, is the exact sum of terms that
    differ in their last bits: two correct computations differ by about this much, more in a model that
    amplifies its errors than in one that does not.
    """
    nudged, generator = copy.deepcopy(model), torch.Generator().manual_seed(7)
    for parameter in nudged.parameters():
        signs = torch.randint(2, parameter.shape, generator=generator) * 2 - 1
        parameter.mul_(1 + torch.finfo(parameter.dtype).eps * signs)
    return (logits(nudged) - logits(model)).abs().max().item()


def assert_same_weights(one: torch.nn.Module, other: torch.nn.Module) -> None:
    """Assert that two models hold the same tensors under the same names, to the bit."""
    states = one.state_dict(), other.state_dict()
    assert states[0].keys() == states[1].keys()
    assert [name for name, tensor in states[0].items() if not torch.equal(tensor, states[1][name])] == []


def assert_logits(model: torch.nn.Module, expected: torch.Tensor) -> None:
    """Assert that a model's logits are the expected ones, up to eight times its rounding."""
    torch.testing.assert_close(logits(model), expected, atol=8 * rounding(model), rtol=0)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Tokenizer of single ASCII characters, for the vocabulary of the small models."""
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{chr(i): i for i in range(3, VOCABULARY)}}
    backend = Tokenizer(models.WordLevel(words, unk_token="<s>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<s>"
    )
