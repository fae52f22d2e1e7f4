"""A kept.json with scores: another budget, without measuring again."""

import json
from dataclasses import replace

import pytest
from click.testing import CliRunner
from tiny import tiny_model

from moeits.cli import main
from moeits.criteria.folder import select_again, select_by
from moeits.kept import Kept


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixtral")
    tiny_model("mixtral").save_pretrained(folder)
    return folder


def run(*arguments):
    return CliRunner().invoke(main, list(map(str, arguments)))


@pytest.mark.parametrize("budget", [{"n_keep": 3}, {"share": 0.4}, {"share": 0.7, "uniform": True}])
@pytest.mark.parametrize("criterion", ["weight-product", "weight-product-global"])
def test_another_budget_keeps_what_measuring_again_would(criterion, budget, folder, tmp_path):
    select_by(criterion, folder, n_keep=6).write(tmp_path / "recipe.json")
    recipe = Kept.read(tmp_path / "recipe.json")
    again = select_again(recipe, **budget)
    measured = select_by(criterion, folder, **budget)
    assert again.layers == measured.layers
    assert again.scores == measured.scores
    if budget.get("uniform"):
        assert len({len(ids) for ids in again.layers.values()}) == 1


def test_prune_takes_a_recipe_and_a_budget(folder, tmp_path, monkeypatch):
    recipe = tmp_path / "recipe.json"
    done = run("select", folder, "--criterion", "weight-product-global", "--share", "0.5", "-o", recipe)
    assert done.exit_code == 0, done.output
    monkeypatch.setattr("moeits.models.checkpoint.measure_nmi", lambda *_, **__: pytest.fail("measured"))
    done = run("prune", folder, "--kept", recipe, "--n-keep", "3", "-o", tmp_path / "three")
    assert done.exit_code == 0, done.output
    kept = Kept.read(tmp_path / "three" / "kept.json")
    assert kept.layers == select_again(Kept.read(recipe), n_keep=3).layers
    assert "scores" not in json.loads((tmp_path / "three" / "kept.json").read_text())
    done = run("prune", folder, "--kept", recipe, "--uniform", "-o", tmp_path / "uniform")
    assert done.exit_code == 0, done.output
    assert {len(ids) for ids in Kept.read(tmp_path / "uniform" / "kept.json").layers.values()} == {4}
    for budget in (["--tau", "1"], ["--n-keep", "3", "--share", "0.5"]):
        assert run("prune", folder, "--kept", recipe, *budget, "-o", tmp_path / "no").exit_code == 2


def test_a_choice_without_scores_says_how_to_get_some(folder, tmp_path):
    kept = replace(select_by("random", folder, n_keep=2))
    assert kept.scores == {}
    kept.write(tmp_path / "kept.json")
    done = run("prune", folder, "--kept", tmp_path / "kept.json", "--share", "0.4", "-o", tmp_path / "no")
    assert done.exit_code == 1
    assert "no scores of 'random'" in done.output
    assert not (tmp_path / "no").exists()
