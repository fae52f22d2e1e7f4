import dataclasses
import re

import numpy as np
import pandas as pd
import pytest
import torch
from tiny import tiny_model, tokens

from moeits import simplify
from moeits.machine import keys
from moeits.models.families import expert_block, moe_layers
from moeits.models.folder import load_model
from moeits.models.surgery import masked
from moeits.nmi import nmi_matrix
from moeits.selection import select_experts
from moeits.study import pipeline, profiles, records


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small random checkpoint in which experts 0 and 1 of every layer are nearly equal."""
    model = tiny_model("qwen2_moe")
    with torch.no_grad():
        for layer in moe_layers(model):
            for projection in (layer.experts.gate_up_proj, layer.experts.down_proj):
                projection[1] = projection[0] * (1 + 0.01 * torch.randn_like(projection[0]))
    path = tmp_path_factory.mktemp("model") / "tiny"
    model.save_pretrained(path)
    return path


def expected(model, tau, **weights):
    return {
        layer.layer: select_experts(nmi_matrix(expert_block(layer), **weights), tau).kept
        for layer in moe_layers(model)
    }


def test_simplify_is_algorithm_1(folder):
    whole = load_model(folder)
    kept = expected(whole, 1.25)
    assert any(len(ids) < 8 for ids in kept.values())
    pruned = simplify(folder, tau=1.25).model
    assert {layer.layer: layer.num_experts for layer in moe_layers(pruned)} == {
        layer: len(ids) for layer, ids in kept.items()
    }
    with masked(whole, kept) as reference:
        torch.testing.assert_close(pruned(tokens()).logits, reference(tokens()).logits, rtol=1e-4, atol=1e-5)


def test_simplify_removes_one_of_two_equal_experts(folder):
    pruned = simplify(folder, n_keep=7)
    kept = pruned.kept.layers
    assert all(len({0, 1} & set(ids)) == 1 for ids in kept.values())


def test_simplify_puts_down_what_made_the_choice(folder):
    pruned = simplify(folder, tau=1.25).model
    assert pruned.kept.criterion == "nmi, preset paper"
    assert pruned.kept.budget == {"tau": 1.25, "diagonal": "zero", "at_least": 1}
    assert pruned.kept.model == folder.name
    assert set(pruned.kept.threshold) == set(pruned.kept.layers)


def test_presets_weigh_the_projections_differently(folder):
    model = load_model(folder)
    official = {"projection_weights": {"gate": 0.2, "up": 0.4, "down": 0.4}}
    pruned = simplify(folder, tau=1.0, preset="official")
    assert dict(pruned.kept.layers) == expected(model, 1.0, **official)


def test_simplify_changes_the_model_that_it_is_given_and_not_the_folder(folder):
    before = keys.file_digest(folder / "model.safetensors")
    model = load_model(folder)
    assert simplify(model, n_keep=4).model is model
    assert {layer.num_experts for layer in moe_layers(model)} == {4}
    assert keys.file_digest(folder / "model.safetensors") == before


@pytest.mark.parametrize("budget", [{}, {"tau": 1.0, "n_keep": 4}, {"share": 0.5, "tau": 1.0}])
def test_exactly_one_budget(folder, budget):
    with pytest.raises(ValueError, match="exactly one of tau, n_keep and share"):
        simplify(folder, **budget)


def test_unknown_preset_names_the_known_ones(folder):
    with pytest.raises(ValueError, match="'offical': there are paper, official"):
        simplify(folder, tau=1.0, preset="offical")


@pytest.fixture
def study(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "DATA", tmp_path / "data")
    monkeypatch.setattr(pipeline, "CACHE", tmp_path / "cache")
    settings = profiles.load("laptop").models["mini-qwen"].model_copy(update={"source": str(folder)})
    profile = profiles.load("laptop", models={"tiny": settings.model_dump()}, random_draws=2, seed=3)
    return pipeline.Study(profile, "tiny")


def test_a_study_measures_the_nmi_once(study, monkeypatch):
    first = study.matrices
    monkeypatch.setattr("moeits.models.checkpoint.measure_nmi", None)
    again = pipeline.Study(study.profile, study.name)
    assert again.nmi.id == study.nmi.id
    assert all(np.array_equal(again.matrices[layer], R) for layer, R in first.items())
    summary = {(row["task"], row["variant"]): row["value"] for row in study.nmi.rows}
    for layer, R in first.items():
        upper = R[np.triu_indices_from(R, 1)]
        assert summary[f"layer {layer}", "mean"] == pytest.approx(upper.mean())
        assert summary[f"layer {layer}", "max"] == pytest.approx(upper.max())


def test_lost_matrices_are_measured_again_for_the_same_record(study):
    record, first = study.nmi, study.matrices
    for file in (pipeline.CACHE / "nmi").glob("*.npz"):
        file.unlink()
    again = pipeline.Study(study.profile, study.name)
    assert again.nmi == record
    assert all(np.array_equal(again.matrices[layer], R) for layer, R in first.items())


def test_selections_keep_the_familys_minimum(study, monkeypatch):
    assert {layer: chosen.kept for layer, chosen in study.selections(1.25).items()} == {
        layer: select_experts(R, 1.25).kept for layer, R in study.matrices.items()
    }
    study._matrices_file.unlink()
    monkeypatch.setattr(
        "moeits.models.checkpoint.moe_layers",
        lambda model: [dataclasses.replace(layer, minimum=8) for layer in moe_layers(model)],
    )
    study = pipeline.Study(study.profile, study.name)
    assert all(len(chosen.kept) == 8 for chosen in study.selections(0.0).values())


def test_controls_keep_as_many_experts_as_tau_does_but_others(study, monkeypatch):
    monkeypatch.setattr(
        "moeits.evaluation.perplexity", lambda *_, **__: {"value": 1.0, "stderr": 0.1, "n": 3}
    )
    monkeypatch.setattr("moeits.corpus.blocks", lambda *_, **__: None)
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda _: None)
    found = study.controls(1.25)
    assert [record.inputs["method"] for record in found] == ["random 0", "random 1"]
    assert all((record.inputs["tau"], record.inputs["tasks"]) == (1.25, []) for record in found)
    chosen = {str(layer): len(of.kept) for layer, of in study.selections(1.25).items()}
    kept = [record.inputs["kept"] for record in found]
    assert all({layer: len(set(ids)) for layer, ids in one.items()} == chosen for one in kept)
    assert kept[0] != kept[1]


def test_steps_cover_the_profile_in_order():
    profile = profiles.load("laptop")
    steps = list(pipeline.steps(profile))
    stages = [step.stage for step in steps]
    assert stages.index("NMI") == stages.count("models") == len(profile.models)
    assert stages.index("scores") == stages.count("models") + stages.count("NMI")
    labels = [step.label for step in steps]
    assert len(set(labels)) == len(labels)
    for name, model in profile.models.items():
        taus = {
            float(label.rpartition("= ")[2])
            for label in labels
            if re.fullmatch(rf"{name}: tau = [^,]*", label)
        }
        grid = profile.tau_grid if model.tau_grid is None else model.tau_grid
        assert taus == {*grid, model.tau}
    only = [step.label for step in pipeline.steps(profile, "mini-qwen")]
    assert only == [label for label in labels if label.startswith("mini-qwen:")]


def test_an_ablation_heals_at_every_tau_with_every_seed(study):
    profile = study.profile.model_copy(update={"ablation_seeds": 2})
    study = pipeline.Study(profile, study.name)
    assert set(study.ablation_taus) == {0.5, 0.75, 1, 1.25, 1.5, 2.5, 5.0}
    steps = list(pipeline.ablation(profile, study.name))
    labels = [step.label for step in steps if step.way]
    for tau in study.ablation_taus:
        for seed in range(2):
            assert f"tiny: tau = {tau:g}, lora, seed {seed}" in labels
            assert f"tiny: tau = {tau:g}, lora, seed {seed}: scores" in labels
    assert len(labels) == 4 * len(study.ablation_taus)
    assert {step.label for step in steps if not step.way} >= {
        f"tiny: tau = {tau:g}" for tau in study.ablation_taus
    }
    unhealed = profile.model_copy(update={"healing": None})
    assert not [step for step in pipeline.ablation(unhealed, study.name) if step.way]


def test_seeds_of_a_healing_are_different_records(study):
    healings = [study._healing(1.25, "lora", seed) for seed in (0, 1)]
    assert [healing.inputs["recipe"]["seed"] for healing in healings] == [0, 1]
    assert healings[0].key != healings[1].key
    assert study._healing(1.25, "refit", 0).key == study._healing(1.25, "refit", 1).key
    third = study._scores(1.25, "lora", 2)
    records.write(study.records, records.Record("scores", dict(third.inputs), [], {}, third.made_by))
    found = study.healings_found
    assert (1.25, "lora", 2) in found
    assert {(way, seed) for _, way, seed in found} == {("lora", 2)}


def test_another_protocol_asks_in_its_way_and_is_no_score(study, monkeypatch):
    asked = []

    def evaluate(*_, **options):
        asked.append(options)
        row = {"task": "arc_easy", "question": 0, "n_choices": 2, "gold": 0, "choice": 0, "choice_norm": 0}
        return pd.DataFrame([row | {"acc": 1, "acc_norm": 1, "bits": 3.0, "bytes": 4, "shots": 5}])

    monkeypatch.setattr("moeits.evaluation.evaluate", evaluate)
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda _: None)
    protocol = profiles.Protocol(shots=5, chat_template=True)
    found = [study.protocol_scores(protocol), study.protocol_scores(protocol, 1.25)]
    assert [record.step for record in found] == ["protocol", "protocol"]
    assert {row["method"] for record in found for row in record.rows} == {"whole", "moeits"}
    assert [(of["shots"], of["chat_template"], of["limit"]) for of in asked] == [
        (5, True, study.profile.questions)
    ] * 2
    assert not list(study.records.glob("scores-*"))
    with pytest.raises(ValueError, match=r"chat_templates.*known"):
        profiles.load("laptop", protocols=[{"chat_templates": True}])


def test_a_study_of_an_unknown_model_names_the_known_ones():
    with pytest.raises(ValueError, match="it has mini-mixtral, mini-qwen"):
        pipeline.Study(profiles.load("laptop"), "smol-llama")
