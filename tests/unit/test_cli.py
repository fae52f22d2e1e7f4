"""The command line: what all commands have in common, models of the hub, and the library's own verbs."""

import json
import re
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import click
import huggingface_hub
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file
from tiny import assert_same_weights, tiny_model, tiny_tokenizer

import moeits
from moeits import options
from moeits.cli import main
from moeits.kept import Kept
from moeits.models import hub
from moeits.models.families import moe_layers, sizes
from moeits.models.folder import load_model
from moeits.nmi import read_matrices

COMMANDS = sorted(main.commands.items())
NAME, COMMIT = "someone/tiny-moe", "0123456789abcdef0123456789abcdef01234567"


def run(*arguments, code=0):
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of the test's own."""
    for module in ("moeits.models.checkpoint", "moeits.models.hub"):
        monkeypatch.setattr(f"{module}.CACHE", tmp_path / "cache")


@pytest.fixture
def folder(tmp_path):
    """A small model with its tokenizer."""
    folder = tmp_path / "model"
    tiny_model("mixtral").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def text(tmp_path):
    """A file of about 4,000 tokens."""
    file = tmp_path / "text.txt"
    file.write_text("The quick brown fox jumps over the lazy dog. " * 90)
    return file


@pytest.fixture
def on_hub(folder, tmp_path, monkeypatch):
    """The model in a cache as the hub's client lays it out: names that are links to blobs. No network."""
    place = tmp_path / "hub" / "models--someone--tiny-moe"
    snapshot = place / "snapshots" / COMMIT
    for part in (snapshot, place / "refs", place / "blobs"):
        part.mkdir(parents=True)
    for number, file in enumerate(sorted(folder.iterdir())):
        file.rename(place / "blobs" / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    folder.rmdir()
    for branch in ("main", "v1"):
        (place / "refs" / branch).write_text(COMMIT)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    real = huggingface_hub.snapshot_download
    monkeypatch.setattr(
        huggingface_hub,
        "snapshot_download",
        lambda name, **how: real(name, cache_dir=tmp_path / "hub", **how),
    )
    return snapshot


# what all commands have


@pytest.mark.parametrize(("name", "command"), COMMANDS)
def test_every_help_has_examples_that_parse(name, command):
    help_ = run(name, "--help").output
    assert command.examples
    for example in command.examples:
        assert f"  {example}\n" in help_
        program, verb, *arguments = shlex.split(example.partition("launch -m ")[2] or example)
        assert (program, verb) == ("moeits", name)
        given, _, _ = command.make_parser(click.Context(command)).parse_args(arguments)
        for parameter in command.params:
            if parameter.name in given and given[parameter.name] is not None:
                assert parameter.required or parameter.opts
            assert not parameter.required or parameter.name in given


@pytest.mark.parametrize(("name", "command"), COMMANDS)
def test_every_options_help_is_a_sentence(name, command):
    for option in command.params:
        if isinstance(option, click.Option):
            sentence = re.sub(r"\s*\[default: [^]]*\]$", "", option.help or "")
            assert re.fullmatch(r"[A-Z].*[.]", sentence.removesuffix("..") + "."), (name, option.opts)
            assert sentence.endswith((".", "...")), (name, option.opts)


def test_it_runs_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "moeits", "--help"], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("Usage: moeits [OPTIONS] COMMAND")


def test_options_are_read_from_a_file_and_the_command_line_comes_first(folder, tmp_path):
    settings = tmp_path / "settings.yaml"
    settings.write_text("layers: 0,2\npreset: official\n")
    run("nmi", folder, "-o", tmp_path / "a.npz", "--config", settings)
    run("nmi", folder, "-o", tmp_path / "b.npz", "--config", settings, "--layers", "1")
    read = [read_matrices(tmp_path / name) for name in ("a.npz", "b.npz")]
    assert [list(matrices) for matrices, _ in read] == [[0, 2], [1]]
    assert {made["preset"] for _, made in read} == {"official"}
    settings.write_text("n-keep: 3\n")
    assert "nmi has no option n_keep" in run("nmi", folder, "--config", settings, code=2).output
    settings.write_text("[1]\n")
    assert "must hold NAME: VALUE" in run("nmi", folder, "--config", settings, code=2).output


def test_an_error_is_one_line_and_with_debug_a_traceback(tmp_path):
    told = run("size", tmp_path / "nowhere", code=1)
    assert told.output == f"Error: {tmp_path / 'nowhere'} is no model folder: there is no such folder\n"
    result = CliRunner().invoke(main, ["size", str(tmp_path / "nowhere"), "--debug"])
    assert isinstance(result.exception, FileNotFoundError)


def test_a_bug_keeps_its_traceback(folder, monkeypatch):
    monkeypatch.setattr("moeits.models.families.sizes", lambda _: [][0])
    assert isinstance(CliRunner().invoke(main, ["size", str(folder)]).exception, IndexError)


def test_quiet_prints_the_results_alone(folder, text):
    loud = run("evaluate", folder, "--text", text, "--dtype", "float32")
    quiet = run("evaluate", folder, "--text", text, "--dtype", "float32", "--quiet")
    assert "float32 was asked for" in loud.stderr
    assert quiet.stderr == ""
    assert quiet.stdout == loud.stdout


def test_old_names_of_options_work_with_a_warning(folder, tmp_path):
    run("standin", "mixtral-8x7b", "-o", tmp_path / "new", "--num-layers", 1, "--shrink", 64)
    old = run("standin", "mixtral-8x7b", "-o", tmp_path / "old", "--layers", 1, "--shrink", 64)
    assert "warning: --layers is now --num-layers" in old.stderr
    assert_same_weights(load_model(tmp_path / "old"), load_model(tmp_path / "new"))
    asked = ("evaluate", folder, "--tasks", "none", "--shots=-1")
    assert "--shots is now --num-fewshot" in run(*asked, code=2).stderr


# what is there already


def test_a_file_is_replaced_only_when_asked(folder, tmp_path, monkeypatch):
    target = tmp_path / "nmi.npz"
    run("nmi", folder, "-o", target, "--layers", "0")
    with monkeypatch.context() as patch:
        patch.setattr("moeits.models.checkpoint.measure_nmi", lambda *_, **__: pytest.fail("work was done"))
        assert "give --overwrite" in run("nmi", folder, "-o", target, code=1).output
    run("nmi", folder, "-o", target, "--layers", "1", "--overwrite")
    assert list(read_matrices(target)[0]) == [1]


def test_a_folder_is_replaced_when_the_new_one_is_complete(folder, tmp_path):
    target = tmp_path / "pruned"
    run("prune", folder, "--n-keep", 4, "-o", target)
    assert "give --overwrite" in run("prune", folder, "--n-keep", 2, "-o", target, code=1).output
    run("prune", folder, "--n-keep", 99, "-o", target, "--overwrite", code=1)
    assert {layer.num_experts for layer in moe_layers(load_model(target))} == {4}
    run("prune", folder, "--n-keep", 2, "-o", target, "--overwrite")
    assert {layer.num_experts for layer in moe_layers(load_model(target))} == {2}
    assert {path.name for path in tmp_path.iterdir()} == {"cache", "model", "pruned"}


def test_a_folder_that_is_no_model_is_never_replaced(folder, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    told = run("prune", folder, "--n-keep", 2, "-o", tmp_path / "thesis", "--overwrite", code=1)
    assert "is no model folder, and is not replaced" in told.output
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "years of work"


def test_a_model_never_replaces_what_it_is_made_from(folder):
    told = run("prune", folder, "--n-keep", 2, "-o", folder, "--overwrite", code=1)
    assert "is read to make the new folder and is not replaced" in told.output
    assert {layer.num_experts for layer in moe_layers(load_model(folder))} == {8}


# JSON


def test_json(folder, tmp_path):
    counted = json.loads(run("size", folder, "--json").stdout)
    assert counted["before"] is None
    assert counted["now"]["total"] == sizes(load_model(folder)).total
    run("nmi", folder, "-o", tmp_path / "nmi.npz")
    kept = tmp_path / "kept.json"
    selected = json.loads(run("select", tmp_path / "nmi.npz", "--n-keep", 3, "--json", "-o", kept).stdout)
    assert selected["share"] == 3 / 8
    assert {int(layer): tuple(ids) for layer, ids in selected["layers"].items()} == Kept.read(kept).layers
    pruned = json.loads(run("size", folder, "--kept", kept, "--json").stdout)
    assert pruned["before"]["total"] == counted["now"]["total"] > pruned["now"]["total"]
    known = json.loads(run("families", "--json").stdout)
    assert {"model_type": "mixtral", "class": "MixtralForCausalLM", "minimum": "1"} in known["supported"]
    assert known["refused"]


# models of the hub


@pytest.mark.parametrize("name", [NAME, f"{NAME}@v1", f"hub:{NAME}@{COMMIT}"])
def test_a_model_of_the_hub_is_taken_wherever_a_folder_is(on_hub, name, tmp_path):
    assert hub.find(name) == on_hub
    run("nmi", name, "-o", tmp_path / "nmi.npz", "--layers", "0")
    assert read_matrices(tmp_path / "nmi.npz")[1]["model"] == NAME
    run("prune", name, "--n-keep", 2, "-o", tmp_path / "pruned")
    assert "unpruned model" in run("size", name).output
    run("select", name, "--criterion", "random", "--n-keep", 2, "-o", tmp_path / "kept.json")
    assert Kept.read(tmp_path / "kept.json").model == NAME
    pruned = load_model(tmp_path / "pruned")
    assert pruned.kept.model == NAME
    assert_same_weights(moeits.simplify(name, n_keep=2).model, pruned)
    # what was copied are files, not the cache's links
    assert not [file for file in (tmp_path / "pruned").iterdir() if file.is_symlink()]
    assert (tmp_path / "pruned" / "tokenizer.json").read_bytes() == (on_hub / "tokenizer.json").read_bytes()


@pytest.mark.usefixtures("on_hub")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("someone/other", "neither a folder here nor a downloaded model"),
        (f"{NAME}@v9", "neither a folder here nor a downloaded model"),
        ("nowhere", "nowhere is no model folder"),
        ("../x", "../x is no model folder"),
        ("a/b/c", "a/b/c is no model folder"),
    ],
)
def test_what_is_neither_folder_nor_model(name, message, tmp_path):
    assert message in run("prune", name, "--n-keep", 2, "-o", tmp_path / "pruned", code=1).output
    assert not (tmp_path / "pruned").exists()


# the library's verbs on a folder and a text


def test_a_text_of_ones_own_is_all_that_a_criterion_needs(folder, text, tmp_path, monkeypatch):
    monkeypatch.setattr("moeits.corpus.documents", lambda _: pytest.fail("the packaged text was read"))
    asked = ("select", folder, "--criterion", "reap", "--n-keep", 3, "--calibration-tokens", 2048)
    run(*asked, "--text", text, "-o", tmp_path / "kept.json")
    assert Kept.read(tmp_path / "kept.json").budget["calibration_tokens"] == 2048


def test_perplexity_of_a_text(folder, text, tmp_path):
    from moeits import corpus, evaluation

    target = tmp_path / "out.json"
    result = run("evaluate", folder, "--text", text, "--dtype", "float32", "-o", target)
    expected = evaluation.perplexity(load_model(folder), corpus.blocks(text, tiny_tokenizer(), length=256))
    measured = json.loads(target.read_text())["perplexity"]
    assert measured["value"] == pytest.approx(expected["value"], rel=1e-5)
    assert measured["n"] == expected["n"] > 1
    assert f"perplexity {measured['value']:.4f}" in result.stdout
    text.write_text("too short")
    assert "which has 9 tokens" in run("evaluate", folder, "--text", text, code=1).output


def test_healing_says_its_tokens_and_time_before_it_starts(folder, text, tmp_path, monkeypatch):
    run("prune", folder, "--n-keep", 4, "-o", tmp_path / "pruned")
    monkeypatch.setattr("moeits.machine.devices.flops", lambda *_: 1e6)
    small = ("--set", "steps=2", "--set", "batch_size=2", "--set", "accumulation=3", "--set", "max_tokens=32")
    asked = ("heal", tmp_path / "pruned", "--text", text, *small, "--lora-r", 2, "--dtype", "float32")
    done = run(*asked, "--lora-alpha", 4, "--lora-dropout", 0, "-o", tmp_path / "healed")
    active = sizes(load_model(tmp_path / "pruned")).active
    seconds = 2 * 3 * active * 384 / (1e6 / 3)
    assert f"trains on up to 384 tokens, about {seconds / 60:.0f} minutes here" in done.stderr
    recipe = json.loads((tmp_path / "healed" / "healing.json").read_text())["lora"]["recipe"]
    assert (recipe["rank"], recipe["alpha"], recipe["dropout"]) == (2, 4, 0)
    assert recipe["data"] == str(text)

    def stop(*_, **__):
        raise ValueError("stopped")

    monkeypatch.setattr("moeits.healing.lora.heal", stop)
    told = run(*asked, "-o", tmp_path / "again", code=1)
    assert "trains on up to" in told.stderr.partition("stopped")[0]


# the same in Python


def test_the_package_has_what_the_commands_do():
    for name in ("evaluate", "heal", "load_model", "prune_checkpoint", "prune_model", "push", "save_model"):
        assert callable(getattr(moeits, name)), name
        assert name in dir(moeits)


def test_simplify_returns_what_led_to_the_model(folder, tmp_path, capsys):
    result = moeits.simplify(folder, share=0.5, device="cpu", progress=True)
    assert "NMI" in capsys.readouterr().err
    assert result.kept.share == 0.5
    assert result.kept == result.model.kept
    assert sorted(result.nmi) == sorted(result.kept.layers)
    assert all(np.array_equal(R, R.T) for R in result.nmi.values())
    moeits.save_model(result, tmp_path / "pruned")
    assert_same_weights(load_model(tmp_path / "pruned"), result.model)


def test_simplify_keeps_the_stored_type_unless_another_is_asked_for(tmp_path):
    tiny_model("mixtral").bfloat16().save_pretrained(tmp_path / "half")
    assert moeits.simplify(tmp_path / "half", n_keep=2).model.dtype == torch.bfloat16
    assert moeits.simplify(tmp_path / "half", n_keep=2, dtype="float32").model.dtype == torch.float32


def test_simplify_by_another_criterion(folder):
    result = moeits.simplify(folder, n_keep=3, criterion="random")
    assert result.kept.criterion == "random"
    assert result.nmi == {}
    assert {layer.num_experts for layer in moe_layers(result.model)} == {3}
    with pytest.raises(ValueError, match="tau and at_least belong to 'moeits'"):
        moeits.simplify(folder, tau=1.0, criterion="random")


def test_a_bug_in_a_checkpoint_is_told_with_its_file(folder):
    save_file({}, folder / "model.safetensors")
    assert "is missing in the checkpoint" in run("prune", folder, "--n-keep", 2, "-o", "x", code=1).output


def test_a_warning_in_another_thread_is_printed(capsys):
    """As joblib's threads warn of a lost worker while a command runs."""
    with ThreadPoolExecutor(1) as pool:
        pool.submit(options.note, "Warning: a worker stopped").result()
    assert capsys.readouterr().err == "Warning: a worker stopped\n"
