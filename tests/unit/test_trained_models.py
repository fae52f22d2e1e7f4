"""The trained models that the repository ships: stock checkpoints that agree with their cards."""

import json
import subprocess
import sys

import pandas as pd
import pytest
from click.testing import CliRunner

from moeits.cli import main
from moeits.study import cards, corpus, trained

# Loads and runs a checkpoint as a user without this package would.
STOCK = """
import sys
sys.modules["moeits"] = None
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
ids = tokenizer("Question: What is the", return_tensors="pt")
out = model.generate(**ids, max_new_tokens=5, do_sample=False)
assert out.shape[1] == ids["input_ids"].shape[1] + 5, out.shape
assert model.dtype == torch.bfloat16
print(type(model).__name__)
"""


FINISHED = trained.finished()
MATCHED = [plan.name for seed in trained.SEEDS for plan in trained.matched(seed) if plan.kept]


def test_the_matched_set_is_complete_and_nothing_else_lies_beside_it():
    assert set(MATCHED) <= set(FINISHED)
    assert {path.name for path in trained.MODELS.iterdir() if path.is_dir()} == set(FINISHED)


@pytest.mark.parametrize("name", FINISHED)
def test_the_weights_are_those_of_the_card(name):
    folder = trained.find(name).folder
    told = trained.facts(name)
    assert told["weights"] == trained.weights_digest(folder)
    assert (folder / "README.md").read_text() == cards.card(name)
    assert f"| SHA-256 of the weights | {told['weights']} |" in cards.card(name)
    for parent, digest in told["settings"]["weights"].items():
        if trained.find(parent).kept:
            assert digest == trained.weights_digest(trained.find(parent).folder)


@pytest.mark.parametrize("name", FINISHED)
def test_a_finished_model_is_found_by_its_plan(name):
    plan, told = trained.find(name), trained.facts(name)
    now = json.loads(json.dumps(plan.identity | {"schedule": plan.schedule.model_dump()}))
    assert {key: told["settings"][key] for key in now} == now


def test_the_models_take_no_more_room_than_they_may():
    size = sum(path.stat().st_size for path in trained.MODELS.rglob("*") if path.is_file())
    assert size < 200e6
    assert max(trained.facts(name)["parameters"] for name in FINISHED) <= 8e6


def test_every_source_has_a_licence_and_the_text_is_that_of_the_models():
    table = pd.read_csv(cards.TEXT)
    assert set(table.source) == set(corpus.SOURCES)
    assert table.licence.notna().all()
    assert not table.licence.str.contains("NC").any()
    assert corpus.text_digest(corpus.load("training")) == trained.facts("parent-1")["settings"]["text"]


@pytest.mark.parametrize("name", ["scratch-1", *sorted({*trained.SHIPPED} & {*FINISHED})])
def test_a_model_runs_without_this_package_and_is_pruned_and_scored(name, tmp_path):
    folder = trained.find(name).folder
    done = subprocess.run(
        [sys.executable, "-c", STOCK, str(folder)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == trained.architecture(name)
    pruned = tmp_path / "pruned"
    run = CliRunner().invoke(main, ["prune", str(folder), "--tau", "1.25", "-o", str(pruned)])
    assert run.exit_code == 0, run.output
    assert (pruned / "kept.json").exists()
    run = CliRunner().invoke(main, ["evaluate", str(pruned), "--tasks", "arc_easy", "--limit", "2"])
    assert run.exit_code == 0, run.output
    assert "arc_easy" in run.output
