import json
import os
import pickle
import re
import shutil
import time

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from tiny import EXPERTS, LAYERS, tiny_model

from moeits.cli import main
from moeits.kept import Kept
from moeits.machine import paths
from moeits.models import checkpoint, safetensors
from moeits.models.checkpoint import expert_blocks, family, measure_nmi
from moeits.models.families import FAMILIES, expert_block, moe_layers
from moeits.models.folder import save_model
from moeits.models.safetensors import INDEX, SINGLE, fingerprint, read_header, stored_tensors
from moeits.models.surgery import prune_model
from moeits.nmi import nmi_matrix, read_matrices
from moeits.selection import select_experts


@pytest.fixture(scope="module")
def models():
    return {name: tiny_model(name) for name in ("mixtral", "qwen2_moe")}


@pytest.fixture
def mixtral(models, tmp_path):
    models["mixtral"].save_pretrained(tmp_path / "mixtral")
    return tmp_path / "mixtral"


@pytest.fixture
def sharded(models, tmp_path):
    models["qwen2_moe"].save_pretrained(tmp_path / "qwen", max_shard_size="100KB")
    return tmp_path / "qwen"


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path):
    for module in (checkpoint, paths):
        monkeypatch.setattr(module, "CACHE", tmp_path / "cache")


def same(block, expected):
    assert list(block) == list(expected)
    for projection, weights in expected.items():
        assert len(block[projection]) == block.num_experts
        read = torch.stack(list(block[projection]))
        assert read.dtype == weights.dtype
        assert torch.equal(read, weights)


def edit_index(folder, change):
    file = folder / INDEX
    index = json.loads(file.read_text())
    change(index["weight_map"])
    file.write_text(json.dumps(index))


def edit_tensors(file, change):
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_blocks_of_a_folder_are_those_of_the_model(name, tmp_path):
    model = tiny_model(name)
    model.save_pretrained(tmp_path / "model")
    layers = moe_layers(model)
    blocks = dict(expert_blocks(tmp_path / "model"))
    assert list(blocks) == [layer.layer for layer in layers]
    for layer in layers:
        same(blocks[layer.layer], expert_block(layer))
        assert blocks[layer.layer].num_experts == EXPERTS
        assert blocks[layer.layer].minimum == layer.minimum
    assert family(tmp_path / "model") == model.config.get_text_config().model_type


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "gpt_oss"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_weights_are_read_as_they_are(name, dtype, tmp_path):
    model = tiny_model(name).to(dtype)
    model.save_pretrained(tmp_path / "model")
    for layer, (_, block) in zip(moe_layers(model), expert_blocks(tmp_path / "model"), strict=True):
        same(block, expert_block(layer))


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v2"])
def test_fused_tensors_are_read_like_single_ones(name, tmp_path):
    model = tiny_model(name)
    model.save_pretrained(tmp_path / "model", save_original_format=False)
    assert any(tensor.name.endswith("gate_up_proj") for tensor in stored_tensors(tmp_path / "model").values())
    for layer, (_, block) in zip(moe_layers(model), expert_blocks(tmp_path / "model"), strict=True):
        same(block, expert_block(layer))


def test_shards_and_pruned_layers(models, sharded, tmp_path):
    assert len(list(sharded.glob("*.safetensors"))) > 3
    layers = moe_layers(models["qwen2_moe"])
    for layer, (number, block) in zip(layers, expert_blocks(sharded), strict=True):
        assert number == layer.layer
        same(block, expert_block(layer))

    pruned = prune_model(tiny_model("qwen2_moe"), {layers[0].layer: [1, 4, 6]})
    save_model(pruned, tmp_path / "pruned")
    blocks = dict(expert_blocks(tmp_path / "pruned"))
    assert [block.num_experts for block in blocks.values()] == [3, *[EXPERTS] * (len(layers) - 1)]
    kept = torch.stack(list(blocks[layers[0].layer]["up"]))
    assert torch.equal(kept, expert_block(layers[0])["up"][[1, 4, 6]])


def test_single_layers_and_blocks_that_travel(models, mixtral):
    [(number, block)] = expert_blocks(mixtral, layers=[1])
    assert number == 1
    same(pickle.loads(pickle.dumps(block)), expert_block(moe_layers(models["mixtral"])[1]))
    with pytest.raises(ValueError, match=r"no experts in layer \[7\]: it has them in \[0, 1, 2\]"):
        list(expert_blocks(mixtral, layers=[1, 7]))


def test_a_missing_shard_is_named(sharded):
    victim = sorted(sharded.glob("*.safetensors"))[2]
    victim.unlink()
    with pytest.raises(FileNotFoundError, match=f"{victim.name} is missing: the index says it holds"):
        next(expert_blocks(sharded))


@pytest.mark.parametrize("left", [4, 100, -1])
def test_a_truncated_file_is_named(sharded, left):
    victim = sorted(sharded.glob("*.safetensors"))[1]
    content = victim.read_bytes()
    victim.write_bytes(content[:left])
    with pytest.raises(ValueError, match=rf"{victim.name} is cut short"):
        next(expert_blocks(sharded))


@pytest.mark.parametrize(
    "content", [b"\x02" + bytes(7) + b"{]", b"\x02" + bytes(7) + b"[]", b"<!doctype html>" * 9]
)
def test_a_file_of_another_kind_is_named(tmp_path, content):
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.safetensors is .*no safetensors file"):
        read_header(tmp_path / "x.safetensors")


def test_an_index_that_names_an_absent_tensor_is_refused(sharded):
    first = sorted(sharded.glob("*.safetensors"))[0].name
    edit_index(sharded, lambda places: places.update(ghost=first))
    with pytest.raises(ValueError, match=f"{first} does not hold ghost"):
        stored_tensors(sharded)
    (sharded / INDEX).write_text("{}")
    with pytest.raises(ValueError, match=r"index\.json is not an index"):
        stored_tensors(sharded)


def test_a_folder_without_weights_is_refused(mixtral):
    (mixtral / SINGLE).rename(mixtral / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="only safetensors are read"):
        next(expert_blocks(mixtral))
    (mixtral / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        next(expert_blocks(mixtral))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, n: t.pop(n), "layer 1: gate of expert 5 is missing"),
        (
            lambda t, n: t.update({n: t[n][:-1].clone()}),
            r"layer 1: gate: .*5\.w1\.weight has shape \(31, 64\)",
        ),
        (lambda t, n: t.update({n: t[n].to(torch.int8)}), r"w1\.weight is I8; quantised weights"),
        (
            lambda t, n: t.update({n.replace(".5.", ".8."): t[n].clone()}),
            "gate: 9 experts, but 8 by the config",
        ),
        (
            lambda t, _: [t.pop(n) for n in list(t) if "layers.1." in n and ".w2." in n],
            "down of all experts is missing",
        ),
    ],
)
def test_wrong_experts_are_named(mixtral, change, message):
    name = "model.layers.1.block_sparse_moe.experts.5.w1.weight"
    edit_tensors(mixtral / SINGLE, lambda tensors: change(tensors, name))
    with pytest.raises(ValueError, match=message):
        next(expert_blocks(mixtral))


def test_a_quantised_model_is_refused(mixtral):
    config = json.loads((mixtral / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (mixtral / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="quantised"):
        next(expert_blocks(mixtral))


def test_layers_beyond_the_models_own_are_left_alone(mixtral):
    # DeepSeek-V3's checkpoints hold one layer more, for predicting several tokens.
    def add(tensors):
        tensors.update(
            {n.replace("layers.2", "layers.3"): t.clone() for n, t in tensors.items() if "layers.2" in n}
        )

    edit_tensors(mixtral / SINGLE, add)
    assert [layer for layer, _ in expert_blocks(mixtral)] == list(range(LAYERS))


def test_the_fingerprint_is_of_the_content(models, mixtral, sharded, tmp_path):
    one = fingerprint(mixtral)
    shutil.copytree(mixtral, tmp_path / "copy")
    assert fingerprint(tmp_path / "copy") == one
    models["mixtral"].save_pretrained(tmp_path / "split", max_shard_size="100KB")
    assert fingerprint(tmp_path / "split") == one
    assert fingerprint(sharded) != one
    changes = [
        lambda t: t["model.norm.weight"].mul_(2),
        lambda t: t.update({"model.norm.weight": t["model.norm.weight"].half()}),
        lambda t: t.update({"more": torch.zeros(3)}),
    ]
    found = {one}
    for change in changes:
        shutil.copy(mixtral / SINGLE, tmp_path / "copy")
        edit_tensors(tmp_path / "copy" / SINGLE, change)
        found.add(fingerprint(tmp_path / "copy"))
    shutil.copytree(mixtral, tmp_path / "copy", dirs_exist_ok=True)
    config = json.loads((mixtral / "config.json").read_text())
    (tmp_path / "copy" / "config.json").write_text(json.dumps(config | {"num_experts_per_tok": 1}))
    found.add(fingerprint(tmp_path / "copy"))
    assert len(found) == 5


def test_a_change_of_any_expert_of_a_stacked_tensor_is_measured_anew(tmp_path):
    folder = tmp_path / "stacked"
    tiny_model("granitemoe").save_pretrained(folder)
    (name,) = [name for name in stored_tensors(folder) if re.search(r"layers\.0.*input_linear", name)]
    before, found = measure_nmi(folder)[0][0], {fingerprint(folder)}
    for expert in range(EXPERTS):
        edit_tensors(folder / SINGLE, lambda tensors, e=expert: tensors[name][e].neg_()[1].mul_(2))
        after = measure_nmi(folder)[0][0]
        assert (after[expert] != before[expert]).sum() == EXPERTS - 1
        before = after
        found.add(fingerprint(folder))
    assert len(found) == EXPERTS + 1


def test_weights_are_hashed_once(sharded, monkeypatch):
    true, hashed = safetensors._digest, []
    monkeypatch.setattr(safetensors, "_digest", lambda tensor: hashed.append(tensor.name) or true(tensor))
    files = sorted(sharded.glob("*.safetensors"))
    for age in (60, 30):  # a file of this very moment may change once more and keep its time
        for file in files[: 2 if age == 60 else 1]:
            os.utime(file, (time.time() - age,) * 2)
        seen = [fingerprint(sharded), fingerprint(sharded), fingerprint(sharded)]
        assert len(set(seen)) == 1
    old = [name for name, tensor in stored_tensors(sharded).items() if tensor.file in files[:2]]
    first = [name for name, tensor in stored_tensors(sharded).items() if tensor.file == files[0]]
    assert sorted(name for name in hashed if name in old) == sorted(old + first)


def test_nmi_of_a_folder_is_that_of_the_model(models, sharded):
    matrices, settings = measure_nmi(sharded, preset="official")
    weights = {"gate": 0.2, "up": 0.4, "down": 0.4}
    for layer in moe_layers(models["qwen2_moe"]):
        expected = nmi_matrix(expert_block(layer), projection_weights=weights)
        np.testing.assert_array_equal(matrices[layer.layer], expected)
    assert settings["projection_weights"] == weights
    assert settings["model"] == "qwen"
    assert settings["fingerprint"] == fingerprint(sharded)
    assert (settings["bins"], settings["diagonal"], settings["minimum"]) == ("auto", "zero", 1)


def test_a_killed_run_goes_on_where_it_was(mixtral, monkeypatch):
    measured = []
    true = checkpoint.nmi_matrix

    def dies_at_layer_1(block, **options):
        if block.layer == 1 and not measured[1:]:
            measured.append("killed")
            raise KeyboardInterrupt
        measured.append(block.layer)
        return true(block, **options)

    monkeypatch.setattr(checkpoint, "nmi_matrix", dies_at_layer_1)
    with pytest.raises(KeyboardInterrupt):
        measure_nmi(mixtral)
    matrices, _ = measure_nmi(mixtral)
    assert measured == [0, "killed", 1, 2]
    assert list(matrices) == [0, 1, 2]
    # Other settings and other weights are other results.
    measure_nmi(mixtral, bins=16, layers=[0])
    edit_tensors(mixtral / SINGLE, lambda t: t["model.norm.weight"].mul_(2))
    measure_nmi(mixtral, layers=[2])
    assert measured[4:] == [0, 2]


def test_layers_can_be_spread_by_a_backend(mixtral, tmp_path, monkeypatch):
    alone, _ = measure_nmi(mixtral)
    monkeypatch.setattr(checkpoint, "CACHE", tmp_path / "another")
    spread, _ = measure_nmi(mixtral, backend="threading")
    for layer, R in alone.items():
        np.testing.assert_array_equal(spread[layer], R)


def test_bad_weights_are_named_with_their_layer(mixtral):
    name = "model.layers.1.block_sparse_moe.experts.5.w3.weight"
    edit_tensors(mixtral / SINGLE, lambda tensors: tensors[name][3].fill_(torch.nan))
    with pytest.raises(ValueError, match="layer 1: up of expert 5: NaN or infinite"):
        measure_nmi(mixtral)
    with pytest.raises(ValueError, match="paper, official"):
        measure_nmi(mixtral, preset="oficial")


def test_the_hubs_cache_gives_the_model_its_name(mixtral, tmp_path):
    folder = tmp_path / "models--some--model-x" / "snapshots" / "0a1b"
    shutil.copytree(mixtral, folder)
    assert measure_nmi(folder, layers=[0])[1]["model"] == "some/model-x"


def test_the_commands_nmi_and_select(mixtral, tmp_path):
    run = CliRunner().invoke
    out, kept_file = tmp_path / "nmi.npz", tmp_path / "kept.json"
    result = run(main, ["nmi", str(mixtral), "-o", str(out), "--layers", "0,1-2", "--preset", "official"])
    assert result.exit_code == 0, result.output
    matrices, settings = read_matrices(out)
    assert list(matrices) == [0, 1, 2]
    np.testing.assert_array_equal(matrices[1], measure_nmi(mixtral, preset="official")[0][1])

    result = run(main, ["select", str(out), "--tau", "0.5", "-o", str(kept_file)])
    assert result.exit_code == 0, result.output
    kept = Kept.read(kept_file)
    selections = {layer: select_experts(R, 0.5) for layer, R in matrices.items()}
    assert kept.layers == {layer: selection.kept for layer, selection in selections.items()}
    assert kept.threshold == {layer: selection.threshold for layer, selection in selections.items()}
    assert kept.budget == {"tau": 0.5, "diagonal": "zero", "at_least": 1}
    assert kept.fingerprint == fingerprint(mixtral) == settings["fingerprint"]
    step = selections[1].steps[0]
    assert f"layer 1: keeps {len(kept.layers[1])} of 8, rho = {kept.threshold[1]:.6f}\n" in result.output
    assert (
        f"  removes {step.removed}: NMI({step.pair[0]}, {step.pair[1]}) = {step.nmi:.6f}, row"
        in result.output
    )
    assert f"{kept.share:.1%} of all" in result.output

    result = run(main, ["select", str(out), "--share", "0.75", "-o", str(kept_file), "--overwrite"])
    assert Kept.read(kept_file).share == 0.75
    assert f"tau = {Kept.read(kept_file).budget['tau']:.6g}" in result.output
    result = run(main, ["select", str(out), "--n-keep", "1", "--at-least", "1"])
    assert result.output.count("  removes ") == 3 * 7


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["select", "none.npz", "--tau", "1"], "none.npz"),
        (["select", "none.npz"], "exactly one of --tau, --n-keep and --share"),
        (["select", "none.npz", "--tau", "1", "--share", "0.5"], "exactly one of"),
        (["nmi", "nowhere"], "nowhere is no model folder"),
        (["nmi", "nowhere", "--layers", "1-x"], "write numbers and ranges"),
    ],
)
def test_the_commands_say_what_is_wrong_in_one_line(arguments, message):
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code != 0
    assert isinstance(result.exception, SystemExit)
    assert message in result.output
