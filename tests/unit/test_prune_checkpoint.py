"""Pruning folders file by file: the same as in memory, whole or not at all, and clear about bad input."""

import errno
import json
import os
import shutil
import signal
import tracemalloc
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from test_surgery import uneven
from tiny import assert_logits, logits, tiny_config, tiny_model
from transformers import AutoModelForCausalLM

from moeits.cli import main
from moeits.errors import PlaceError
from moeits.kept import Kept
from moeits.models import checkpoint
from moeits.models.checkpoint import prune_checkpoint
from moeits.models.families import FAMILIES, moe_layers, sizes
from moeits.models.folder import load_model, save_model
from moeits.models.safetensors import fingerprint, stored_tensors
from moeits.models.surgery import prune_model


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Folder of whole models, made when they are asked for: of several files each."""
    home = tmp_path_factory.mktemp("checkpoints")

    def folder(family):
        if not (home / family).exists():
            tiny_model(family).save_pretrained(home / family, max_shard_size="200KB")
        return home / family

    return folder


@pytest.fixture
def source(checkpoints, tmp_path):
    """A copy of a whole smol checkpoint of Qwen's kind, to be damaged."""
    return Path(shutil.copytree(checkpoints("qwen2_moe"), tmp_path / "source"))


def bytes_of(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def change_config(folder, **settings):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def change_tensor(folder, name, change):
    file = stored_tensors(folder)[name].file
    tensors = load_file(file)
    changed = change(tensors.pop(name))
    save_file(tensors if changed is None else tensors | {name: changed}, file, metadata={"format": "pt"})


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_same_as_in_memory_bit_for_bit(family, checkpoints, tmp_path):
    source = checkpoints(family)
    kept = uneven(load_model(source))
    prune_checkpoint(source, tmp_path / "streamed", kept)
    reference = prune_model(load_model(source), kept)
    save_model(reference, tmp_path / "saved")
    streamed = load_model(tmp_path / "streamed")
    state = streamed.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in reference.state_dict().items())
    assert sizes(streamed) == sizes(reference)
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("streamed", "saved")]
    assert configs[0] == configs[1]
    stored = [
        {name: (tensor.shape, tensor.dtype) for name, tensor in stored_tensors(tmp_path / name).items()}
        for name in ("streamed", "saved")
    ]
    assert stored[0] == stored[1]


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss", "ernie4_5_moe"])
def test_one_count_everywhere_makes_a_plain_checkpoint(family, checkpoints, tmp_path):
    source = checkpoints(family)
    kept = {layer.layer: [1, 4, 6] for layer in moe_layers(load_model(source))}
    prune_checkpoint(source, tmp_path / "pruned", kept)
    assert not list((tmp_path / "pruned").glob("*.py"))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned", trust_remote_code=False)
    reference = prune_model(load_model(source), kept)
    assert_logits(plain, logits(reference))


def test_a_checkpoint_in_one_file(tmp_path):
    tiny_model("mixtral").save_pretrained(tmp_path / "source")
    prune_checkpoint(tmp_path / "source", tmp_path / "pruned", {0: [1], 2: [0, 7]})
    assert not (tmp_path / "pruned" / "model.safetensors.index.json").exists()
    assert {layer.layer: layer.num_experts for layer in moe_layers(load_model(tmp_path / "pruned"))} == {
        0: 1,
        1: 8,
        2: 2,
    }


def test_the_index_names_what_is_there(source, tmp_path):
    prune_checkpoint(source, tmp_path / "pruned", {1: [3], 2: [0, 2]})
    index = json.loads((tmp_path / "pruned" / "model.safetensors.index.json").read_text())
    held = {
        name: file.name for file in (tmp_path / "pruned").glob("*.safetensors") for name in load_file(file)
    }
    assert index["weight_map"] == held
    weights = [
        tensor for file in (tmp_path / "pruned").glob("*.safetensors") for tensor in load_file(file).values()
    ]
    assert index["metadata"]["total_size"] == sum(tensor.numel() * 4 for tensor in weights)


def test_other_files_are_carried_over_but_no_code_and_no_other_weights(source, tmp_path):
    (source / "tokenizer.json").write_text("{}")
    (source / "LICENSE").write_text("Theirs.\n")
    (source / "README.md").write_text("---\nlicense: other\nlicense_name: theirs\n---\nWhole.\n")
    (source / "modeling_qwen.py").write_text("raise RuntimeError\n")
    (source / "pytorch_model.bin").write_bytes(b"whole")
    change_config(source, auto_map={"AutoModelForCausalLM": "modeling_qwen.Qwen"})
    prune_checkpoint(source, tmp_path / "pruned", {1: [3, 5]})
    pruned = tmp_path / "pruned"
    assert (pruned / "tokenizer.json").read_text() == "{}"
    assert (pruned / "LICENSE").read_text() == "Theirs.\n"
    assert (pruned / "README.base.md").read_text().endswith("Whole.\n")
    assert "license_name: theirs" in (pruned / "README.md").read_text()
    assert [file.name for file in pruned.glob("*.py")] == ["modeling_moeits.py"]
    assert not list(pruned.glob("*.bin"))
    settings = json.loads((pruned / "config.json").read_text())
    assert settings["auto_map"] == {"AutoModelForCausalLM": "modeling_moeits.PrunedQwen2MoeForCausalLM"}


def test_a_pruned_folder_can_be_pruned_again(source, tmp_path):
    prune_checkpoint(source, tmp_path / "once", {1: [0, 2, 5, 7], 2: [1, 2, 3]})
    prune_checkpoint(tmp_path / "once", tmp_path / "twice", {1: [1, 3], 2: [0, 2]})
    prune_checkpoint(source, tmp_path / "direct", {1: [2, 7], 2: [1, 3]})
    twice, direct = load_model(tmp_path / "twice"), load_model(tmp_path / "direct")
    state = direct.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in twice.state_dict().items())
    assert twice.kept.layers == direct.kept.layers
    assert twice.kept.fingerprint == fingerprint(source)
    assert twice.config.unpruned == direct.config.unpruned
    assert not list((tmp_path / "twice").glob("*.py"))


def test_tensors_larger_than_the_buffer(source, tmp_path, monkeypatch):
    prune_checkpoint(source, tmp_path / "once", {1: [0, 3]})
    monkeypatch.setattr(checkpoint, "_CHUNK", 24)
    prune_checkpoint(source, tmp_path / "again", {1: [0, 3]})
    assert bytes_of(tmp_path / "once") == bytes_of(tmp_path / "again")


def test_memory_does_not_grow_with_the_checkpoint(tmp_path):
    tiny_model(
        "gpt_oss", intermediate_size=4096, num_hidden_layers=1, layer_types=["full_attention"]
    ).save_pretrained(tmp_path / "source")
    size = (tmp_path / "source" / "model.safetensors").stat().st_size
    prune_checkpoint(tmp_path / "source", tmp_path / "warm", {0: [0]})
    tracemalloc.start()
    prune_checkpoint(tmp_path / "source", tmp_path / "pruned", {0: range(1, 8)})
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2 * checkpoint._CHUNK < size / 2


def test_out_of_disk(source, tmp_path, monkeypatch):
    before = bytes_of(source)
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.shutil, "disk_usage", lambda _: usage)
        with pytest.raises(OSError, match=r"needs [\d,]+ bytes, free are 1,000"):
            prune_checkpoint(source, tmp_path / "pruned", {1: [0, 3]})
    written = []

    def fail_in_the_second_file(file, pieces, bar, write=checkpoint._write_file):
        write(file, pieces, bar)
        written.append(file)
        if len(written) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint, "_write_file", fail_in_the_second_file)
    with pytest.raises(OSError, match="cannot be written: the disk is full"):
        prune_checkpoint(source, tmp_path / "pruned", {1: [0, 3]})
    assert len(written) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    assert bytes_of(source) == before


def test_killed_and_started_again(source, tmp_path):
    before = bytes_of(source)
    child = os.fork()
    if child == 0:
        checkpoint.os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)
        prune_checkpoint(source, tmp_path / "pruned", {1: [0, 3]})
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert not (tmp_path / "pruned").exists()
    assert len(list(tmp_path.iterdir())) == 2  # the source, and what the killed process left
    (left,) = (path for path in tmp_path.iterdir() if path.name != "source")
    os.utime(left, (0, 0))  # what is old belongs to nobody
    for path in left.rglob("*"):
        os.utime(path, (0, 0))
    prune_checkpoint(source, tmp_path / "pruned", {1: [0, 3]})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pruned", "source"]
    assert bytes_of(source) == before


def test_no_permission_to_write(source, tmp_path, monkeypatch):
    def denied(*_, **__):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(tmp_path))

    monkeypatch.setattr("moeits.machine.paths.tempfile.mkdtemp", denied)
    with pytest.raises(PlaceError, match=r"Permission denied\): choose another folder"):
        prune_checkpoint(source, tmp_path / "pruned", {1: [0, 3]})


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        ({0: [1]}, r"no Mixture-of-Experts layer \[0\]"),
        ({1: [8]}, r"layer 1: experts \[8\] do not exist"),
        ({1: [2, 2]}, r"layer 1: experts \[2\] are given more than once"),
        ({1: []}, "layer 1: no expert is kept"),
    ],
)
def test_bad_choices_are_refused(kept, message, source, tmp_path):
    with pytest.raises(ValueError, match=message):
        prune_checkpoint(source, tmp_path / "pruned", kept)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_the_choice_of_another_model_is_refused(source, tmp_path):
    kept = Kept({1: (0,)}, {1: 8}, model="other", fingerprint="0" * 64)
    with pytest.raises(ValueError, match=r"chosen for another model \(other, fingerprint 0000"):
        prune_checkpoint(source, tmp_path / "pruned", kept)
    with pytest.raises(ValueError, match="layer 1 has 8 experts, but the kept ones were chosen out of 60"):
        prune_checkpoint(source, tmp_path / "pruned", Kept({1: (0,)}, {1: 60}))
    kept = Kept({1: (0,)}, {1: 8}, fingerprint=fingerprint(source))
    change_tensor(source, "model.layers.1.mlp.experts.2.up_proj.weight", lambda weights: weights + 1)
    with pytest.raises(ValueError, match="chosen for another model"):
        prune_checkpoint(source, tmp_path / "pruned", kept)


def test_the_choice_of_an_earlier_version_is_applied_with_a_warning(source, tmp_path):
    kept = Kept({1: (0, 1)}, {1: 8}, model="qwen", fingerprint="0" * 32)
    with pytest.warns(FutureWarning, match=r"no longer compared.*source is the model.*\(qwen\)"):
        prune_checkpoint(source, tmp_path / "pruned", kept)


def cut_short(folder):
    file = sorted(folder.glob("*.safetensors"))[1]
    file.write_bytes(file.read_bytes()[:-100])


def lose_file(folder):
    sorted(folder.glob("*.safetensors"))[1].unlink()


def lose_weights(folder):
    for file in folder.glob("*.safetensors*"):
        file.unlink()


def garble_file(folder):
    sorted(folder.glob("*.safetensors"))[1].write_bytes(b"\0" * 8 + b"no header")


def name_absent_tensor(folder):
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"]["model.layers.9.weight"] = next(iter(index["weight_map"].values()))
    file.write_text(json.dumps(index))


def put_nan(folder):
    def change(weights):
        weights[3, 5] = torch.nan
        return weights

    change_tensor(folder, "model.layers.1.mlp.experts.3.up_proj.weight", change)


def put_infinity(folder):
    def change(weights):
        weights[0, 5] = torch.inf
        return weights

    change_tensor(folder, "model.layers.2.mlp.gate.weight", change)


def lose_expert(folder):
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    change_tensor(folder, name, lambda _: None)
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    del index["weight_map"][name]
    file.write_text(json.dumps(index))


def widen_router(folder):
    change_tensor(folder, "model.layers.2.mlp.gate.weight", lambda weights: torch.cat([weights, weights[:1]]))


def quantise(folder):
    change_config(folder, quantization_config={"quant_method": "fp8"})


def store_as_bytes(folder):
    change_tensor(
        folder, "model.layers.1.mlp.experts.3.up_proj.weight", lambda weights: weights.to(torch.float8_e4m3fn)
    )


def make_unknown(folder):
    change_config(folder, model_type="tomorrow_moe")


def make_refused(folder):
    change_config(folder, model_type="nllb-moe")


def garble_config(folder):
    (folder / "config.json").write_text("{")


def lose_config(folder):
    (folder / "config.json").unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut_short, r"model-0000\d-of-.* is cut short: it has [\d,]+ bytes of [\d,]+"),
        (lose_file, r"model-0000\d-of-.* is missing: the index says it holds \d+ tensors"),
        (lose_weights, "only safetensors are read"),
        (garble_file, "is no safetensors file"),
        (name_absent_tensor, r"does not hold model\.layers\.9\.weight, which the index says it does"),
        (put_nan, r"model\.layers\.1\.mlp\.experts\.3\.up_proj\.weight holds NaN or infinite values"),
        (put_infinity, r"model\.layers\.2\.mlp\.gate\.weight holds NaN or infinite values"),
        (lose_expert, "layer 1: up of expert 3 is missing in the checkpoint"),
        (
            widen_router,
            "layer 2: the router has 1 tensors .*, of which the checkpoint holds 0 with 8 experts",
        ),
        (quantise, "the weights are quantised"),
        (store_as_bytes, "F8_E4M3; quantised weights are not read"),
        (make_unknown, "'tomorrow_moe' are not known; known are .*mixtral.*To add a family"),
        (make_refused, "'nllb-moe' cannot be pruned: an encoder-decoder"),
        (garble_config, r"config\.json is no configuration"),
        (lose_config, "no model folder"),
    ],
)
def test_damaged_checkpoints_are_refused_by_name(damage, message, source, tmp_path):
    damage(source)
    before = bytes_of(source)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        prune_checkpoint(source, tmp_path / "pruned", {1: [0, 3], 2: [0, 6]})
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    assert bytes_of(source) == before


def test_nan_in_a_removed_expert_does_no_harm(source, tmp_path):
    put_nan(source)
    prune_checkpoint(source, tmp_path / "pruned", {1: [0, 2]})
    assert all(parameter.isfinite().all() for parameter in load_model(tmp_path / "pruned").parameters())


def test_dense_models_are_refused(tmp_path):
    tiny_model("qwen2_moe", mlp_only_layers=[0, 1, 2]).save_pretrained(tmp_path / "source")
    with pytest.raises(ValueError, match="'qwen2_moe' model is dense"):
        prune_checkpoint(tmp_path / "source", tmp_path / "pruned", {0: [0]})


def test_an_existing_target_is_left_alone(source, tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("mine")
    with pytest.raises(FileExistsError, match="taken exists"):
        prune_checkpoint(source, tmp_path / "taken", {1: [0]})
    assert (tmp_path / "taken" / "file").read_text() == "mine"


def run(*arguments):
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exception is None or result.exit_code, result.exception
    return result


def test_the_commands_prune_and_size(source, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "CACHE", tmp_path / "cache")
    by_tau = run("prune", source, "--tau", 1.25, "--n-jobs", 1, "-o", tmp_path / "tau")
    assert by_tau.exit_code == 0
    kept = load_model(tmp_path / "tau").kept
    assert kept.budget["tau"] == 1.25
    assert kept.fingerprint == fingerprint(source)
    assert run("size", tmp_path / "tau").stdout in by_tau.stdout

    kept_file = tmp_path / "tau" / "kept.json"
    assert run("prune", source, "--kept", kept_file, "-o", tmp_path / "kept").exit_code == 0
    assert bytes_of(tmp_path / "kept") == bytes_of(tmp_path / "tau")
    assert run("size", source, "--kept", kept_file).stdout == run("size", tmp_path / "tau").stdout

    assert run("prune", source, "--n-keep", 3, "--n-jobs", 1, "-o", tmp_path / "three").exit_code == 0
    assert sizes(load_model(tmp_path / "three")).experts == {1: 3, 2: 3}
    assert run("prune", source, "--share", 0.5, "--n-jobs", 1, "-o", tmp_path / "half").exit_code == 0
    assert load_model(tmp_path / "half").kept.share == pytest.approx(0.5, abs=1 / 16)

    for arguments, message in (
        (["--tau", 1, "--share", 0.5], "give exactly one of --tau, --kept, --n-keep and --share"),
        ([], "give exactly one of"),
        (["--kept", tmp_path / "none.json"], "none.json"),
        (["--tau", -1], "tau is -1"),
    ):
        refused = run("prune", source, "-o", tmp_path / "refused", *arguments)
        assert refused.exit_code > 0
        assert message in refused.output
        assert not (tmp_path / "refused").exists()
    taken = run("prune", source, "--tau", 1, "-o", tmp_path / "tau")
    assert taken.exit_code == 1
    assert taken.output.startswith("Error: ")


def test_size_needs_the_configuration_alone(tmp_path):
    tiny_config("mixtral").save_pretrained(tmp_path)
    shown = run("size", tmp_path).stdout
    assert f"{sizes(tiny_model('mixtral')).total:,}" in shown
    assert "0: 8, 1: 8, 2: 8" in shown


def test_the_command_lists_families_and_refusals():
    shown = run("families").stdout
    assert all(name in shown for name in FAMILIES)
    assert "zaya" in shown
    assert "fewest experts" in shown
