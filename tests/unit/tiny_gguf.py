"""Small GGUF files, converted here from small random models of transformers."""

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, TokenType, quantize

ARCHITECTURES = {"mixtral": "llama", "qwen2_moe": "qwen2moe"}
_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate": "ffn_gate_inp",
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp",
    "mlp.experts.down_proj": "ffn_down_exps",
}


def gguf_tensors(model, *, merged=False):
    """Tensors of a model under the names of GGUF, as arrays of float32."""
    found = {}
    for name, tensor in model.state_dict().items():
        array = tensor.float().numpy()
        at, rest = "", name
        if name.startswith("model.layers."):
            _, _, number, rest = name.split(".", 3)
            at = f"blk.{number}."
        if rest == "mlp.experts.gate_up_proj":
            if merged:
                found[f"{at}ffn_gate_up_exps.weight"] = array
                continue
            gate, up = np.split(array, 2, axis=1)
            found |= {f"{at}ffn_gate_exps.weight": gate, f"{at}ffn_up_exps.weight": up}
            continue
        kind = "bias" if rest.endswith(".bias") else "weight"
        short = _NAMES[rest.removesuffix(f".{kind}")]
        heads = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}.get(short)
        if heads and model.config.model_type == "mixtral":
            # llama.cpp rotates neighbouring numbers, transformers the two halves of a head.
            count = getattr(model.config, heads)
            halves = array.reshape(count, 2, array.shape[0] // count // 2, *array.shape[1:])
            array = halves.swapaxes(1, 2).reshape(array.shape)
        found[f"{at}{short}.{kind}"] = array[0] if short == "ffn_gate_inp_shexp" else array
    return found


def write_gguf(path, model, kind="F32", *, merged=False, architecture=None, **settings):
    """Convert a model; `settings` override what the metadata says."""
    config = model.config
    name = architecture or ARCHITECTURES[config.model_type]
    writer = GGUFWriter(path, name)
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    if config.model_type == "qwen2_moe":
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
        writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)
    experts = getattr(config, "num_experts", None) or config.num_local_experts
    for setting, value in {
        "expert_count": experts,
        "expert_used_count": config.num_experts_per_tok,
        **settings,
    }.items():
        if value is not None:
            writer.add_uint32(setting if "." in setting else f"{name}.{setting}", value)
    words = ["<unk>", "<s>", "</s>", *(chr(0x4E00 + i) for i in range(config.vocab_size - 3))]
    kinds = [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL] + [TokenType.NORMAL] * (len(words) - 3)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(words)
    writer.add_token_scores([-float(i) for i in range(len(words))])
    writer.add_token_types(kinds)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for tensor_name, array in gguf_tensors(model, merged=merged).items():
        quantised = array.ndim > 1 and "ffn_gate_inp" not in tensor_name
        qtype = GGMLQuantizationType[kind if quantised else "F32"]
        writer.add_tensor(tensor_name, quantize(np.ascontiguousarray(array), qtype), raw_dtype=qtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
