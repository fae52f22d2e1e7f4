"""What a model costs, before and after pruning."""

import pytest
from tiny import EXPERTS, HIDDEN, NEURONS, TOP_K, VOCABULARY, tiny_model

from moeits.green import VARIANTS, compare_costs, multiply_adds


@pytest.fixture(scope="module")
def costs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("green") / "model"
    tiny_model("mixtral").save_pretrained(folder)
    kept = {layer: [0, 3, 5] for layer in range(3)}
    found = compare_costs(folder, kept, prompt=16, new=2, repeats=2, dtype="float32")
    return {entry["variant"]: entry for entry in found}


def test_every_variant_is_measured(costs):
    assert tuple(costs) == VARIANTS
    for entry in costs.values():
        assert entry["prefill"] > 0
        assert entry["decode"] > 0
        assert entry["memory_bytes"] >= 0  # of a few hundred kilobytes, which may be there already


def test_the_cut_is_timed_once(costs):
    assert costs["pruned"]["surgery"] > 0
    assert all(entry["surgery"] is None for name, entry in costs.items() if name != "pruned")


def test_only_what_is_stored_less_is_smaller(costs):
    routed = 3 * 3 * EXPERTS * HIDDEN * NEURONS * 4
    saved = costs["whole"]["file_bytes"] - costs["pruned"]["file_bytes"]
    assert saved == pytest.approx(routed * 5 / 8, rel=0.05)
    assert costs["zeroed"]["file_bytes"] == costs["whole"]["file_bytes"]
    assert costs["int8"]["file_bytes"] < costs["whole"]["file_bytes"] / 2


def test_as_many_multiply_adds_while_enough_experts_are_left(costs):
    assert costs["pruned"]["multiply_adds"] < costs["whole"]["multiply_adds"]  # by the router's rows alone
    rows = 3 * 5 * HIDDEN
    assert costs["whole"]["multiply_adds"] - costs["pruned"]["multiply_adds"] == rows


def test_multiply_adds_by_hand():
    model = tiny_model("mixtral", tie_word_embeddings=False)
    attention = 2 * HIDDEN * 64 + 2 * HIDDEN * 32  # queries and output; keys and values of two heads
    layer = attention + HIDDEN * EXPERTS + TOP_K * 3 * HIDDEN * NEURONS
    norms = (2 * 3 + 1) * HIDDEN
    assert multiply_adds(model) == 3 * layer + HIDDEN * VOCABULARY + norms


def test_a_failed_measurement_says_why(tmp_path):
    tiny_model("mixtral").save_pretrained(tmp_path / "model")
    with pytest.raises(RuntimeError, match=r"'whole' failed(.|\n)*float17"):
        compare_costs(tmp_path / "model", {}, variants=["whole"], dtype="float17")
