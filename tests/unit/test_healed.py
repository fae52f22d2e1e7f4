"""Healing on trained experts: what is compared with what, and that every state is healed in the same way."""

import numpy as np
import pytest
import torch
from tiny import tiny_model

from moeits.models.families import moe_layers
from moeits.study import anatomy, healed, trained, trials
from moeits.study.records import Record


def record(kind, seed, bits):
    states = [
        {"method": method, "healed": done, "bits": [value, value]} for (method, done), value in bits.items()
    ]
    return Record(healed.STEP, {"model": f"{kind}-{seed}"}, [], {"bytes": [4, 4], "states": states})


def test_each_state_is_compared_with_the_unpruned_and_the_random_ones_in_the_same_state():
    bits = {("unpruned", False): 8, ("unpruned", True): 6, ("moeits", False): 12, ("moeits", True): 8}
    bits |= {("reap", False): 10, ("reap", True): 7, ("random 0", False): 11, ("random 0", True): 7}
    bits |= {("random 1", False): 15, ("random 1", True): 9}
    table = healed.differences([record("scratch", 3, bits)]).set_index(["method", "healed"])
    assert table.initialisation.eq("scratch").all()
    assert table.seed.eq(3).all()
    assert table.cost["moeits", False] == pytest.approx(2 * (12 - 8) / 8)
    assert table.cost["moeits", True] == pytest.approx(2 * (8 - 6) / 8)
    assert table.from_random["moeits", False] == pytest.approx(2 * (12 - 13) / 8)
    assert table.from_random["moeits", True] == pytest.approx(0)
    assert table.gained["unpruned", True] == pytest.approx(2 * (8 - 6) / 8)
    assert table.gained["reap", True] == pytest.approx(2 * (8 - 7) / 8)


def test_every_state_reads_the_same_text_in_the_same_order():
    recipe = healed.Sizes().recipe.model_copy(update={"steps": 3, "batch_size": 2, "max_tokens": 8})
    one, two = (healed.healing_blocks(recipe, 1) for _ in range(2))
    assert len(one) == 6
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(one, healed.healing_blocks(recipe, 2), strict=True))


def test_a_training_is_pruned_and_healed_in_every_state(monkeypatch):
    recipe = healed.Sizes().recipe.model_copy(
        update={"steps": 2, "batch_size": 1, "max_tokens": 8, "rank": 2, "save_every": 1}
    )
    sizes = healed.Sizes(documents=1, context=8, subsets=1, recipe=recipe)
    layers = len(moe_layers(tiny_model("mixtral", vocab_size=64)))
    kept = {"moeits": [[0, 1, 2, 3]] * layers, "reap": [[4, 5, 6, 7]] * layers}
    monkeypatch.setattr(trained, "load", lambda _: tiny_model("mixtral", vocab_size=64))
    monkeypatch.setattr(healed, "healing_blocks", lambda *_: [torch.arange(8) + i for i in range(2)])
    ids = [np.arange(1, 9), np.arange(9, 17)]
    read = anatomy.Sample(ids, np.array([0, 1]), np.array([8, 8]))
    rows, details = healed._heal_all("scratch-1", kept, read, sizes)
    assert [(one["method"], one["variant"]) for one in rows] == [
        (method, state)
        for method in ("unpruned", "moeits", "reap", "random 0")
        for state in ("pruned", "healed")
    ]
    bits = {(one["method"], one["healed"]): one["bits"] for one in details["states"]}
    assert all(bits[method, True] != bits[method, False] for method, _ in bits)
    assert {one["kept_share"] for one in rows} == {1.0, 0.5}


def test_the_subsets_of_a_training_are_its_own():
    draws = [
        trials.random_subset([8, 8], 16, np.random.default_rng([seed, healed.Sizes().subsets]))
        for seed in trained.SEEDS
    ]
    assert all(one != two for i, one in enumerate(draws) for two in draws[:i])
