"""Copies planted in a model: they compute the same, similarities find them, and training on is recorded."""

import numpy as np
import pandas as pd
import pytest

from moeits.book import trained_nmi
from moeits.models.families import expert_block, moe_layers
from moeits.study import anatomy, corpus, duplicates, planted, relatedness, trained
from moeits.study.training import routers


@pytest.fixture
def model(sparse_model):
    return sparse_model


PAIRS = {0: {"copy": [(3, 1)], "permuted": [(2, 7)]}, 1: {"copy": [(0, 5)], "permuted": [(6, 4)]}}


def test_planted_copies_compute_the_same_and_nothing_else_changes(model):
    before = [expert_block(layer)["up"].clone() for layer in moe_layers(model)]
    duplicates.plant(model, PAIRS, 0.1, seed=1)
    x = np.random.default_rng(0).standard_normal((5, 16))
    for layer, old in zip(moe_layers(model), before, strict=True):
        block = {name: weight.detach().numpy() for name, weight in expert_block(layer).items()}
        router = routers(model)[layer.layer].weight.detach()
        copies = set()
        for kind, pairs in PAIRS[layer.layer].items():
            for original, copy in pairs:
                np.testing.assert_allclose(
                    planted.output(block, copy, x), planted.output(block, original, x), atol=1e-6
                )
                assert (block["up"][copy] == block["up"][original]).all() == (kind == "copy")
                gap = (router[copy] - router[original]).std() / router[original].std()
                assert 0.03 < gap < 0.3
                copies.add(copy)
        for expert in set(range(8)) - copies:
            assert (block["up"][expert] == old[expert].numpy()).all()


def test_pairs_are_disjoint():
    drawn = duplicates.draw_pairs(np.random.default_rng(0), 16, 2)
    experts = [expert for pairs in drawn.values() for pair in pairs for expert in pair]
    assert sorted(drawn) == sorted(duplicates.KINDS)
    assert len(experts) == len(set(experts)) == 8


def test_a_similarity_that_knows_the_copies_finds_them_and_noise_does_not():
    random = np.random.default_rng(0)
    aucs = []
    for _ in range(50):
        matrix = np.triu(random.random((8, 8)), 1)
        matrix += matrix.T
        aucs.append(duplicates.found(matrix, [(0, 1), (4, 2)], [(6, 7)])[0])
    assert np.mean(aucs) == pytest.approx(0.5, abs=0.1)
    for pair in ((0, 1), (2, 4)):
        matrix[pair] = matrix[pair[::-1]] = 2
    matrix[6, 7] = matrix[7, 6] = 3  # of another kind: neither right nor wrong
    assert duplicates.found(matrix, [(0, 1), (4, 2)], [(6, 7)]) == (1.0, 1.0)
    assert duplicates.found(-matrix, [(0, 1), (4, 2)], [(6, 7)])[0] == 0.0


def test_copies_are_found_before_training_and_the_record_says_how_long(model, tmp_path, monkeypatch):
    random = np.random.default_rng(0)
    ids = random.integers(1, 64, 30_000).astype(np.uint16)
    starts = np.arange(0, 30_001, 100)
    text = corpus.Text(ids, starts, np.zeros(300, np.uint8), np.full(300, 400))
    schedule = trained.Schedule(steps=1)
    plan = trained.Plan("scratch-1", model.config, schedule, 1, trained.at_random)
    monkeypatch.setattr(trained, "MODELS", tmp_path / "models")
    monkeypatch.setattr(trained, "plans", lambda: {plan.name: plan})
    monkeypatch.setattr(corpus, "load", lambda _: text)
    monkeypatch.setattr(anatomy, "RECORDS", tmp_path / "records")
    monkeypatch.setattr("moeits.machine.paths.CACHE", tmp_path / "cache")
    model.save_pretrained(plan.folder)
    (plan.folder / trained.FACTS).write_text("{}")
    sizes = duplicates.Sizes(pairs=1, steps=(0, 2), tokens=512, sampled=64)
    record = duplicates.measure("scratch-1", sizes=sizes)
    assert duplicates.measure("scratch-1", sizes=sizes).id == record.id
    assert len(record.details["loss"]) == 2
    found = duplicates.table([record]).set_index(["step", "similarity", "kind"])
    assert set(found.seed) == {1}
    assert found.loc[(0, "nmi", "copy"), "auc"] == 1
    assert found.loc[(0, "nmi", "copy"), "planted"] == pytest.approx(1)
    assert found.loc[(0, "nmi", "permuted"), "planted"] < 0.6
    for kind in duplicates.KINDS:
        assert found.loc[(0, "aligned", kind), "auc"] == 1
        assert found.loc[(0, "output", kind), "auc"] == 1
        assert found.loc[(2, "aligned", kind), "planted"] < 1
    assert relatedness.WEIGHTS[1] not in found.index.get_level_values("similarity")


def test_the_finding_is_that_of_the_last_step_that_all_trainings_have():
    rows = [
        {
            "seed": seed,
            "step": step,
            "similarity": key,
            "kind": kind,
            "auc": auc,
            "planted": 0.5,
            "others": 0.1,
        }
        for seed, steps in ((1, (0, 10, 100)), (2, (0, 10)))
        for step in steps
        for key in ("nmi", "aligned", "output")
        for kind in duplicates.KINDS
        for auc in [0.9 if step == 10 else 0.6]
    ]
    told = trained_nmi.duplicates_finding(pd.DataFrame(rows))
    assert told.startswith("After 10 steps")
    assert "with probability 0.90 ± 0.00" in told
