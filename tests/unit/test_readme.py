"""What the README tells a reader to run, runs."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import tiny_model

from moeits.machine.paths import ROOT
from moeits.models.families import moe_layers
from moeits.models.folder import load_model

README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with a checkpoint where the README's examples have theirs."""
    monkeypatch.chdir(tmp_path)
    tiny_model("mixtral").save_pretrained("path/to/checkpoint")
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
def test_the_command_prunes():
    (command,) = [line for block in blocks("bash") for line in block.splitlines() if "moeits prune" in line]
    arguments = command.split()[1:]
    subprocess.run([sys.executable, "-m", "moeits", *arguments], check=True, capture_output=True)
    assert pruned()


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
