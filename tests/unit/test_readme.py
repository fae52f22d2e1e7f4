"""What the README tells a reader to run, runs."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from test_quantised import FORMATS, write
from tiny import tiny_model
from tiny_gguf import write_gguf

from moeits.machine.paths import ROOT
from moeits.models.checkpoint import expert_counts
from moeits.models.families import moe_layers
from moeits.models.folder import load_model
from moeits.models.gguf import read_gguf

README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with a checkpoint where the README's examples have theirs."""
    monkeypatch.chdir(tmp_path)
    model = tiny_model("mixtral")
    model.save_pretrained("path/to/checkpoint")
    write_gguf("path/to/model.gguf", model, "Q8_0")
    tiny_model("qwen3_moe").save_pretrained(tmp_path / "whole")
    write(tmp_path / "path" / "to" / "quantised", tmp_path / "whole", *FORMATS["fp8"])
    return tmp_path


def pruned():
    whole, smaller = (load_model(f"path/to/{name}") for name in ("checkpoint", "pruned"))
    return sum(layer.num_experts for layer in moe_layers(smaller)) < sum(
        layer.num_experts for layer in moe_layers(whole)
    )


@pytest.mark.usefixtures("here")
def test_the_python_example_prunes():
    (example,) = blocks("python")
    exec(example, {})
    assert pruned()


@pytest.mark.usefixtures("here")
def test_the_commands_prune():
    lines = [line for block in blocks("bash") for line in block.splitlines() if "moeits prune" in line]
    assert len(lines) == 3
    for line in lines:
        subprocess.run([sys.executable, "-m", "moeits", *line.split()[1:]], check=True, capture_output=True)
    assert pruned()
    assert {read_gguf("path/to/smaller.gguf").experts, *expert_counts("path/to/smaller").values()} == {4}


def test_every_make_target_it_names_exists():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"(?:^|`)make ([a-z-]+)", README, re.MULTILINE))
    assert {"book", "test", "help"} <= named <= targets


def test_continuous_integration_runs_the_readmes_command():
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    assert lines[-1] == "make test"
    assert any(line.startswith("make test ") for block in blocks("bash") for line in block.splitlines())


def test_the_folders_it_names_exist():
    for name in re.findall(r"`([a-z]+/)`", README):
        assert Path(ROOT / name).is_dir(), name


def test_its_images_exist_and_are_described():
    images = re.findall(r"!\[(.*?)\]\((.*?)\)", README)
    assert images
    for alt, path in images:
        assert len(alt) > 20
        assert (ROOT / path).is_file()
