"""Quantised checkpoints: pruned bit for bit, and their experts read one at a time.

Every format is packed here from numbers that are known, one by one, as its documentation lays them out; where
transformers itself can dequantise on a CPU, it is the reference.
"""

import json
import re
from functools import partial

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from tiny import tiny_model
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, Mxfp4Config
from transformers.integrations.finegrained_fp8 import _dequantize_fp8_weight
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from moeits.cli import main
from moeits.models import checkpoint
from moeits.models.checkpoint import expert_blocks, measure_nmi, prune_checkpoint
from moeits.models.quantised import renumbered
from moeits.models.safetensors import StoredTensor, stored_tensors
from moeits.nmi import nmi_matrix

KEPT = {0: [1, 4, 6], 2: [0, 2, 7]}  # layer 1 of the tiny model is dense
COUNTS = {0: 8, 2: 8}
GROUP = 16


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    for module in ("models.checkpoint", "machine.paths"):
        monkeypatch.setattr(f"moeits.{module}.CACHE", tmp_path / "cache")


def draw(generator, low, high, *shape):
    return torch.randint(low, high, shape, generator=generator)


def some_scales(generator, *shape):
    return (torch.rand(shape, generator=generator) + 0.5).half() / 64


def pack(numbers, bits, dim, order=None):
    """Pack unsigned numbers into int32 along a dimension, one by one."""
    numbers = numbers if dim == 1 else numbers.T
    per = 32 // bits
    rows = []
    for row in numbers.tolist():
        words = []
        for start in range(0, len(row), per):
            word = 0
            for place, value in enumerate(row[start : start + per]):
                word |= value << (bits * (place if order is None else order.index(place)))
            words.append(word - (1 << 32) if word >= 1 << 31 else word)
        rows.append(words)
    packed = torch.tensor(rows, dtype=torch.int32)
    return (packed if dim == 1 else packed.T).contiguous()


def fp8(generator, rows, columns, block=(16, 24)):
    weight = torch.randn(rows, columns, generator=generator).to(torch.float8_e4m3fn)
    scale = some_scales(generator, -(-rows // block[0]), -(-columns // block[1])).float()
    expected = _dequantize_fp8_weight(weight, scale, list(block), torch.float32)
    return {"weight": weight, "weight_scale_inv": scale}, expected


def int8(generator, rows, columns):
    numbers, zeros = draw(generator, -128, 128, rows, columns), draw(generator, -9, 9, rows, 1)
    scale = some_scales(generator, rows, 1)
    parts = {
        "weight": numbers.to(torch.int8),
        "weight_scale": scale,
        "weight_zero_point": zeros.to(torch.int8),
    }
    return parts, (numbers - zeros) * scale.float()


def packed(generator, rows, columns, *, ordered=False):
    groups = torch.arange(columns) // GROUP
    if ordered:
        groups = groups[torch.randperm(columns, generator=generator)]
    numbers = draw(generator, -8, 8, rows, columns)
    zeros = draw(generator, -8, 8, rows, columns // GROUP)
    scale = some_scales(generator, rows, columns // GROUP)
    parts = {
        "weight_packed": pack(numbers + 8, 4, 1),
        "weight_scale": scale,
        "weight_zero_point": pack(zeros + 8, 4, 0),
        "weight_shape": torch.tensor([rows, columns]),
    }
    if ordered:
        parts["weight_g_idx"] = groups.int()
    return parts, (numbers - zeros[:, groups]) * scale.float()[:, groups]


def gptq(generator, rows, columns, *, bits=4, zero=1, ordered=True):
    groups = torch.arange(columns) // GROUP
    if ordered:
        groups = groups[torch.randperm(columns, generator=generator)]
    numbers = draw(generator, 0, 1 << bits, columns, rows)
    zeros = draw(generator, 1, 1 << bits, columns // GROUP, rows)
    scale = some_scales(generator, columns // GROUP, rows)
    parts = {
        "qweight": pack(numbers, bits, 0),
        "qzeros": pack(zeros - zero, bits, 1),
        "scales": scale,
    }
    if ordered:
        parts["g_idx"] = groups.int()
    return parts, ((numbers - zeros[groups]) * scale.float()[groups]).T


def awq(generator, rows, columns):
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    groups = torch.arange(columns) // GROUP
    numbers, zeros = draw(generator, 0, 16, columns, rows), draw(generator, 0, 16, columns // GROUP, rows)
    scale = some_scales(generator, columns // GROUP, rows)
    parts = {"qweight": pack(numbers, 4, 1, order), "qzeros": pack(zeros, 4, 1, order), "scales": scale}
    return parts, ((numbers - zeros[groups]) * scale.float()[groups]).T


def compressed(form, bits, **weights):
    group = {"targets": ["Linear"], "weights": {"num_bits": bits, **weights}}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head", "model.layers.0.mlp.gate"],
    }


_GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": GROUP}
FORMATS = {
    "fp8": (fp8, {"quant_method": "fp8", "weight_block_size": [16, 24]}),
    "int8": (int8, compressed("int-quantized", 8, strategy="channel")),
    "packed": (packed, compressed("pack-quantized", 4, group_size=GROUP)),
    "packed, ordered": (partial(packed, ordered=True), compressed("pack-quantized", 4, group_size=GROUP)),
    "gptq": (gptq, _GPTQ),
    "gptq, 8 bits, in order": (partial(gptq, bits=8, ordered=False), _GPTQ | {"bits": 8}),
    "gptq v2": (partial(gptq, zero=0), _GPTQ | {"checkpoint_format": "gptq_v2"}),
    "awq": (awq, {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm"}),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Folder of a small model with one tensor for each expert."""
    folder = tmp_path_factory.mktemp("whole")
    tiny_model("qwen3_moe").save_pretrained(folder)
    return folder


def write(folder, whole, quantise, settings):
    """Quantise the experts of a folder; return what each weight is in the new one."""
    generator = torch.Generator().manual_seed(5)
    tensors, weights = {}, {}
    for name, tensor in load_file(whole / "model.safetensors").items():
        if re.search(r"\.experts\.\d+\.", name):
            base = name.removesuffix(".weight")
            parts, weights[base] = quantise(generator, *tensor.shape)
            tensors |= {f"{base}.{part}": value.contiguous() for part, value in parts.items()}
        else:
            tensors[name] = tensor
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((whole / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    return weights


def stored_bytes(folder):
    return {
        name: (tensor.dtype, tensor.shape[1:], tensor.file.read_bytes()[tensor.start : tensor.stop])
        for name, tensor in stored_tensors(folder).items()
    }


@pytest.mark.parametrize("name", FORMATS)
def test_read_as_documented_and_pruned_bit_for_bit(name, whole, tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    weights = write(source, whole, *FORMATS[name])
    for layer, block in expert_blocks(source):
        for projection in ("gate", "up", "down"):
            for expert in range(8):
                expected = weights[f"model.layers.{layer}.mlp.experts.{expert}.{projection}_proj"]
                assert torch.equal(block[projection][expert], expected.float())
    R = measure_nmi(source, layers=[2], n_jobs=1)[0][2]
    assert (nmi_matrix(dict(expert_blocks(source, [2]))[2]) == R).all()

    prune_checkpoint(source, target, KEPT)
    before, after = stored_bytes(source), stored_bytes(target)
    expected = {}
    for tensor, value in before.items():
        found = re.search(r"layers\.(\d)\.mlp\.experts\.(\d)\.", tensor)
        if found is None:
            expected[tensor] = value
        elif int(found[2]) in (ids := KEPT[int(found[1])]):
            new = ids.index(int(found[2]))
            expected[tensor.replace(f"experts.{found[2]}.", f"experts.{new}.")] = value
    assert set(after) == set(expected)
    routers = {f"model.layers.{layer}.mlp.gate.weight": layer for layer in KEPT}
    assert {tensor: value for tensor, value in after.items() if tensor not in routers} == {
        tensor: value for tensor, value in expected.items() if tensor not in routers
    }
    old, new = (load_file(folder / "model.safetensors") for folder in (source, target))
    for router, layer in routers.items():
        assert torch.equal(new[router], old[router][KEPT[layer]])
    config = json.loads((target / "config.json").read_text())
    assert config["quantization_config"] == FORMATS[name][1]
    assert config["num_local_experts"] == 3
    size = sum(tensor.stop - tensor.start for tensor in stored_tensors(source).values())
    assert config["unpruned"]["bytes"] == size


def test_transformers_loads_the_pruned_fp8_weights(whole, tmp_path):
    settings = {"quant_method": "fp8", "weight_block_size": [16, 16]}
    weights = write(tmp_path / "source", whole, partial(fp8, block=(16, 16)), settings)
    prune_checkpoint(tmp_path / "source", tmp_path / "target", KEPT)
    options = FineGrainedFP8Config(dequantize=True, weight_block_size=(16, 16))
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "target", quantization_config=options, dtype=torch.float32
    )
    for layer, ids in KEPT.items():
        loaded = model.model.layers[layer].mlp.experts.down_proj
        expected = [weights[f"model.layers.{layer}.mlp.experts.{expert}.down_proj"] for expert in ids]
        torch.testing.assert_close(loaded, torch.stack(expected))


def test_mxfp4_of_gpt_oss(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    tiny_model("gpt_oss").save_pretrained(source)
    generator = torch.Generator().manual_seed(7)
    tensors, whole = load_file(source / "model.safetensors"), {}
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, columns, rows = tensors.pop(name).shape
        blocks = draw(generator, 0, 256, experts, rows, columns // 32, 16).to(torch.uint8)
        scales = draw(generator, 118, 130, experts, rows, columns // 32).to(torch.uint8)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        whole[name] = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32).mT
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (source / "config.json").write_text(json.dumps(config))
    for layer, block in expert_blocks(source):
        both = whole[f"model.layers.{layer}.mlp.experts.gate_up_proj"]
        for expert in range(8):
            assert torch.equal(block["gate"][expert], both[expert, 0::2])
            assert torch.equal(block["up"][expert], both[expert, 1::2])
            down = whole[f"model.layers.{layer}.mlp.experts.down_proj"][expert]
            assert torch.equal(block["down"][expert], down)
    kept = {0: [1, 4, 6], 1: [0, 1, 2], 2: [3, 5, 7]}
    prune_checkpoint(source, target, kept)
    pruned = load_file(target / "model.safetensors")
    for name, tensor in tensors.items():
        found = re.search(r"layers\.(\d)\.mlp\.(experts|router)", name)
        assert torch.equal(pruned[name], tensor[kept[int(found[1])]] if found else tensor), name
    options = Mxfp4Config(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(target, quantization_config=options, dtype=torch.float32)
    loaded = model.model.layers[2].mlp.experts.down_proj
    assert torch.equal(loaded.mT, whole["model.layers.2.mlp.experts.down_proj"][kept[2]])


def test_a_scale_for_each_stacked_expert_is_cut_with_them_and_a_quantised_router_refused(tmp_path):
    stored = partial(StoredTensor, file=tmp_path, dtype="F32", start=0, stop=32)
    scale = stored("model.layers.0.mlp.experts.down_proj_scale_inv", shape=(8,))
    assert checkpoint._experts_dimension(scale, 8) == 0
    with pytest.raises(ValueError, match="quantised router"):
        checkpoint._experts_dimension(stored("model.layers.0.mlp.gate.weight_scale_inv", shape=(8, 1)), 8)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quant_method": "bitsandbytes"}, r"'bitsandbytes': this method is not read .* awq, compressed"),
        (_GPTQ | {"bits": 3}, "3 bits are not read here"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "'gemv' with 4 bits is not read"),
        (compressed("nvfp4-pack-quantized", 4), "'nvfp4-pack-quantized' with 4 bits is not read"),
    ],
)
def test_an_unknown_format_is_named_before_any_work(settings, message, whole, tmp_path):
    write(tmp_path / "source", whole, gptq, settings)
    with pytest.raises(ValueError, match=message):
        next(expert_blocks(tmp_path / "source"))
    arguments = ["prune", str(tmp_path / "source"), "--n-keep", "2", "-o", str(tmp_path / "x")]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 1
    assert "Save the model dequantised first" in done.output
    assert not (tmp_path / "x").exists()


def test_missing_and_damaged_scales(whole, tmp_path):
    source = tmp_path / "source"
    write(source, whole, *FORMATS["fp8"])
    name = "model.layers.2.mlp.experts.3.up_proj.weight_scale_inv"
    tensors = load_file(source / "model.safetensors")
    scale = tensors.pop(name)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"layer 2: up of expert 3.*scale_inv"):
        next(expert_blocks(source))
    save_file(tensors | {name: scale[:1, :1].repeat(1, 2)}, source / "model.safetensors")
    block = dict(expert_blocks(source))[2]
    with pytest.raises(ValueError, match=r"experts\.3\.up_proj\.\w+: expert 3 cannot be dequantised"):
        block["up"][3]
    save_file(tensors | {name: scale * torch.nan}, source / "model.safetensors")
    with pytest.raises(ValueError, match="NaN"):
        prune_checkpoint(source, tmp_path / "target", {0: [1], 2: [3]})


def test_a_config_that_names_experts_is_renumbered():
    settings = {
        "ignore": [
            "lm_head",
            *(f"model.layers.{n}.mlp.experts.{e}.up_proj" for n in (0, 1, 2) for e in (4, 5)),
        ],
        "modules_in_block_to_quantize": [["mlp.gate"], [f"mlp.experts.{e}.w1" for e in range(8)]],
        "config_groups": {"group_0": {"targets": [r"re:.*experts\.\d+\..*"], "weights": {"num_bits": 4}}},
        "modules_to_not_convert": None,
    }
    assert renumbered(settings, KEPT, COUNTS) == settings | {
        "ignore": [
            "lm_head",
            "model.layers.0.mlp.experts.1.up_proj",
            "model.layers.1.mlp.experts.4.up_proj",
            "model.layers.1.mlp.experts.5.up_proj",
        ],
        "modules_in_block_to_quantize": [["mlp.gate"], [f"mlp.experts.{e}.w1" for e in range(3)]],
    }
    with pytest.raises(ValueError, match="names single experts, whose numbers"):
        renumbered({"ignore": [r"re:.*\.experts\.5\..*"]}, KEPT, COUNTS)
    with pytest.raises(ValueError, match="of all layers"):
        renumbered({"ignore": ["mlp.experts.5.w1"]}, KEPT, COUNTS)
    with pytest.raises(ValueError, match="single experts"):
        renumbered({"dynamic": {r"-:.*experts\.3\..*": {}}}, KEPT, COUNTS)
