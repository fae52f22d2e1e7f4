"""GGUF files: pruned by their bytes, measured through the gguf package, and clear about bad input."""

import json
import struct
import subprocess
from dataclasses import replace

import llama_cpp_logits
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from gguf import GGUFReader, dequantize
from tiny import tiny_model, tokens
from tiny_gguf import gguf_tensors, write_gguf

from moeits.cli import main
from moeits.kept import Kept
from moeits.machine.paths import ROOT
from moeits.models import gguf
from moeits.models.gguf import gguf_blocks, prune_gguf, read_gguf
from moeits.models.surgery import prune_model
from moeits.nmi import nmi_matrix

KEPT = {0: [1, 4, 6], 1: [0, 2, 7], 2: [3, 4, 5]}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    for module in ("models.checkpoint", "models.gguf", "machine.paths"):
        monkeypatch.setattr(f"moeits.{module}.CACHE", tmp_path / "cache")


def small(family, **settings):
    return tiny_model(family, **({"mlp_only_layers": []} if family == "qwen2_moe" else {}), **settings)


def every(ids):
    return dict.fromkeys(KEPT, ids)


@pytest.fixture
def source(tmp_path):
    return write_gguf(tmp_path / "source.gguf", small("mixtral"), "Q8_0")


def metadata(path, without=()):
    """Raw bytes of every setting: name, type and value."""
    reader = GGUFReader(path)
    return {
        name: [np.asarray(part).tobytes() for part in field.parts]
        for name, field in reader.fields.items()
        if not name.startswith("GGUF.") and name not in without
    }


def tensors(path):
    return {tensor.name: tensor for tensor in GGUFReader(path).tensors}


def run(*arguments):
    return CliRunner().invoke(main, list(map(str, arguments)))


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "F16", "F32", "BF16"])
@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_experts_are_slices_of_the_bytes_and_all_else_stays(family, kind, merged, tmp_path):
    source = write_gguf(tmp_path / "source.gguf", small(family), kind, merged=merged)
    target = prune_gguf(source, tmp_path / "out.gguf", KEPT)
    before, after = tensors(source), tensors(target)
    assert list(before) == list(after)
    cut = 0
    for name, old in before.items():
        new = after[name]
        assert new.tensor_type == old.tensor_type
        expected = old.data
        if "_exps." in name or name.endswith("ffn_gate_inp.weight"):
            expected, cut = old.data[KEPT[int(name.split(".")[1])]], cut + 1
        assert new.data.shape == expected.shape
        assert new.data.tobytes() == expected.tobytes()
    assert cut == 3 * (3 if merged else 4)
    arch = gguf.read_gguf(source).architecture
    changed = (f"{arch}.expert_count", "moeits.kept")
    assert metadata(source, changed) == metadata(target, changed)
    assert "tokenizer.ggml.tokens" in metadata(target)
    pruned = read_gguf(target)
    assert (pruned.experts, pruned.top_k) == (3, 2)
    assert pruned.kept.layers == {layer: tuple(ids) for layer, ids in KEPT.items()}


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_the_same_as_pruning_before_the_conversion(family, tmp_path):
    model = small(family)
    source = write_gguf(tmp_path / "source.gguf", model)
    streamed = prune_gguf(source, tmp_path / "streamed.gguf", {layer: ids[:1] for layer, ids in KEPT.items()})
    prune_model(model, {layer: ids[:1] for layer, ids in KEPT.items()})
    converted = write_gguf(tmp_path / "converted.gguf", model)
    assert metadata(streamed, ["moeits.kept"]) == metadata(converted)
    assert read_gguf(streamed).top_k == 1
    expected = tensors(converted)
    for name, tensor in tensors(streamed).items():
        assert np.array_equal(tensor.data, expected[name].data), name


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "F16", "F32"])
def test_nmi_is_that_of_the_dequantised_arrays(kind, merged, tmp_path):
    source = write_gguf(tmp_path / "source.gguf", small("qwen2_moe"), kind, merged=merged)
    measured, settings = gguf.measure_nmi(source, n_jobs=1)
    whole = {name: dequantize(t.data, t.tensor_type) for name, t in tensors(source).items()}
    for layer, R in measured.items():
        if merged:
            gate, up = np.split(whole[f"blk.{layer}.ffn_gate_up_exps.weight"], 2, axis=1)
        else:
            gate, up = (whole[f"blk.{layer}.ffn_{name}_exps.weight"] for name in ("gate", "up"))
        block = {"gate": gate, "up": up, "down": whole[f"blk.{layer}.ffn_down_exps.weight"]}
        assert np.array_equal(R, nmi_matrix(block))
    assert settings["family"] == "qwen2_moe"
    assert settings["fingerprint"].startswith("gguf-")


def test_nmi_of_unquantised_weights_is_that_of_the_model(tmp_path):
    model = small("mixtral")
    source = write_gguf(tmp_path / "source.gguf", model)
    arrays = gguf_tensors(model)
    block = {name: arrays[f"blk.1.ffn_{name}_exps.weight"] for name in ("gate", "up", "down")}
    assert np.array_equal(gguf.measure_nmi(source, layers=[1], n_jobs=1)[0][1], nmi_matrix(block))


def test_commands(source, tmp_path):
    done = run("prune", source, "--share", "0.5", "-o", tmp_path / "half.gguf", "--n-jobs", "1")
    assert done.exit_code == 0, done.output
    assert "4 experts in each of 3 layers" in done.output
    assert run("nmi", source, "-o", tmp_path / "nmi.npz", "--n-jobs", "1").exit_code == 0
    kept = tmp_path / "kept.json"
    for which in (tmp_path / "nmi.npz", source):
        done = run("select", which, "--tau", "1", "--uniform", "-o", kept, "--overwrite")
        assert done.exit_code == 0, done.output
        assert len({len(ids) for ids in Kept.read(kept).layers.values()}) == 1
    done = run("prune", source, "--kept", kept, "-o", tmp_path / "uniform.gguf")
    assert done.exit_code == 0, done.output
    assert read_gguf(tmp_path / "uniform.gguf").kept.layers == Kept.read(kept).layers
    assert read_gguf(tmp_path / "half.gguf").kept.budget["share"] == 0.5


def test_unequal_counts_are_refused_before_any_work(source, tmp_path, monkeypatch):
    monkeypatch.setattr(gguf, "measure_blocks", lambda *_, **__: pytest.fail("measured"))
    kept = tmp_path / "kept.json"
    Kept({0: (1,), 1: (1, 2)}, {0: 8, 1: 8}).write(kept)
    for budget in (["--tau", "1"], ["--kept", kept]):
        done = run("prune", source, *budget, "-o", tmp_path / "out.gguf")
        assert done.exit_code != 0
        assert "--uniform" in done.output
        assert "--share" in done.output
        assert not (tmp_path / "out.gguf").exists()
    # Layers that are not named stay whole.
    with pytest.raises(ValueError, match=r"\[3, 8\] would stay"):
        prune_gguf(source, tmp_path / "out.gguf", {0: [0, 1, 2]})
    assert not (tmp_path / "out.gguf").exists()


def test_pruned_twice_names_the_first_file_s_experts(source, tmp_path):
    once = prune_gguf(source, tmp_path / "once.gguf", KEPT)
    twice = prune_gguf(once, tmp_path / "twice.gguf", every([0, 2]))
    assert read_gguf(twice).kept.layers == {layer: (ids[0], ids[2]) for layer, ids in KEPT.items()}
    assert sum(name.startswith("moeits.") for name in metadata(twice)) == 1


def test_a_choice_for_another_file_is_refused_but_not_a_folder_s(source, tmp_path):
    kept = Kept(
        {layer: tuple(ids) for layer, ids in KEPT.items()}, dict.fromkeys(KEPT, 8), fingerprint="f" * 32
    )
    prune_gguf(source, tmp_path / "out.gguf", kept)
    with pytest.raises(ValueError, match="chosen for another model"):
        prune_gguf(source, tmp_path / "no.gguf", replace(kept, fingerprint="gguf-" + "0" * 32))
    with pytest.raises(ValueError, match="chosen out of 16"):
        prune_gguf(source, tmp_path / "no.gguf", replace(kept, num_experts=dict.fromkeys(KEPT, 16)))
    with pytest.raises(FileExistsError):
        prune_gguf(source, tmp_path / "out.gguf", KEPT)


def test_groups_stay_equally_large_and_bound_the_top_k(tmp_path):
    settings = {"expert_group_count": 2, "expert_group_used_count": 1, "expert_used_count": 4}
    source = write_gguf(tmp_path / "source.gguf", small("mixtral"), **settings)
    with pytest.raises(ValueError, match="equally"):
        prune_gguf(source, tmp_path / "out.gguf", every([0, 1, 2, 5]))
    target = prune_gguf(source, tmp_path / "out.gguf", every([0, 1, 4, 5]))
    assert read_gguf(target).top_k == 2
    _, made_by = gguf.measure_nmi(source, layers=[0], n_jobs=1)
    assert (made_by["groups"], made_by["minimum"]) == (2, 4)


@pytest.mark.parametrize("length", [0, 10, 200, 1500, -1])
def test_a_truncated_file(length, source, tmp_path):
    whole = source.read_bytes()
    source.write_bytes(whole[:length])
    done = run("prune", source, "--n-keep", "2", "-o", tmp_path / "out.gguf")
    assert done.exit_code == 1
    assert "source.gguf" in done.output
    assert ("cut short" if length not in (0,) else "no GGUF file") in done.output
    assert not (tmp_path / "out.gguf").exists()


def test_other_versions_and_other_files(source):
    whole = source.read_bytes()
    source.write_bytes(whole[:4] + struct.pack("<I", 1) + whole[8:])
    with pytest.raises(ValueError, match=r"version 1 .* only 2 and 3"):
        read_gguf(source)
    source.write_bytes(b"PK" + whole)
    with pytest.raises(ValueError, match="is no GGUF file"):
        read_gguf(source)
    with pytest.raises(FileNotFoundError):
        read_gguf(source.with_name("absent.gguf"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"expert_count": None}, "is dense"),
        ({"architecture": "mpt"}, "'mpt' is not known .* known are .*llama.*qwen2moe"),
        ({"architecture": "grovemoe"}, "adjugate"),
        ({"expert_count": 16}, "lists 8 experts, the metadata 16"),
        ({"expert_group_count": 3}, "3 groups"),
        ({"split.count": 4}, "one of 4 parts: merge them first"),
    ],
)
def test_what_cannot_be_pruned_is_named(settings, message, tmp_path):
    source = write_gguf(tmp_path / "source.gguf", small("mixtral"), **settings)
    with pytest.raises(ValueError, match=message):
        read_gguf(source)


def test_values_that_are_not_finite_are_found_where_experts_stay(tmp_path):
    model = small("mixtral")
    model.model.layers[1].mlp.experts.down_proj.data[5, 0, 0] = float("nan")
    source = write_gguf(tmp_path / "source.gguf", model)
    prune_gguf(source, tmp_path / "out.gguf", KEPT)
    with pytest.raises(ValueError, match=r"blk.1.ffn_down_exps.weight holds NaN"):
        prune_gguf(source, tmp_path / "no.gguf", every([5]))
    assert not (tmp_path / "no.gguf").exists()


def test_a_missing_tensor_is_named(tmp_path, monkeypatch):
    arrays = gguf_tensors(small("mixtral"))
    del arrays["blk.1.ffn_gate_inp.weight"]
    monkeypatch.setattr("tiny_gguf.gguf_tensors", lambda *_, **__: arrays)
    model = read_gguf(write_gguf(tmp_path / "source.gguf", small("mixtral")))
    with pytest.raises(
        ValueError,
        match=r"layer 1 has only ffn_down_exps\.weight, ffn_gate_exps\.weight, ffn_up_exps\.weight$",
    ):
        gguf_blocks(model)


def test_the_metadata_holds_what_kept_json_would(source, tmp_path):
    target = prune_gguf(source, tmp_path / "out.gguf", KEPT)
    content = json.loads(GGUFReader(target).get_field("moeits.kept").contents())
    assert content["layers"] == {str(layer): ids for layer, ids in KEPT.items()}
    assert content["num_experts"] == {"0": 8, "1": 8, "2": 8}


def test_make_interop_compares_with_the_interpreter_that_it_builds():
    dry = subprocess.run(
        ["make", "-n", "--no-print-directory", "interop"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    *_, last = dry.strip().splitlines()
    script, python = last.split()[-2:]
    assert (ROOT / script).is_file()
    assert f"{python} -m pip install" in dry
    assert "llama-cpp-python" in dry


def test_the_comparison_with_llama_cpp_finds_a_difference(tmp_path, monkeypatch):
    logits = {}

    def run(command, check):
        assert check
        target, out, ids = command[3:]
        assert read_gguf(target).experts == 3
        assert len(json.loads(ids)) == 9
        np.save(out, logits["llama.cpp"])

    monkeypatch.setattr(llama_cpp_logits.subprocess, "run", run)
    model = prune_model(small("mixtral"), KEPT)
    with torch.no_grad():
        expected = model(tokens(batch=1)).logits[0].numpy()
    for shift in (0.0, 0.5):
        logits["llama.cpp"] = expected + shift * expected.std()
        (tmp_path / str(shift)).mkdir()
        found = llama_cpp_logits.difference("python", "mixtral", "F32", tmp_path / str(shift))
        assert found == pytest.approx(shift, abs=1e-4)
