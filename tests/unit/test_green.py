"""What a model costs, before and after pruning."""

import pytest
import torch
from tiny import EXPERTS, HIDDEN, NEURONS, TOP_K, VOCABULARY, tiny_model

from moeits.study.cost import VARIANTS, _low_rank, _sparse, compare_costs, multiply_adds


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


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    """A model, and the file sizes, memory and logits of its forms."""
    folder = tmp_path_factory.mktemp("forms") / "model"
    tiny_model("mixtral").save_pretrained(folder)
    found = compare_costs(
        folder, {}, variants=["sparse", "low-rank"], share=0.5, prompt=16, new=2, repeats=2, dtype="float32"
    )
    return folder, {entry["variant"]: entry for entry in found}


def test_forms_of_fewer_bytes_are_counted_as_they_would_be_stored(experts):
    folder, found = experts
    whole = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    matrices = 3 * EXPERTS * 3
    for name, entry in found.items():
        assert entry["prefill"] > 0
        saved = (whole - entry["file_bytes"]) / (matrices * HIDDEN * NEURONS * 4)
        assert saved == pytest.approx(0.5, abs=0.05), name


@pytest.mark.parametrize("shrink", [_sparse, _low_rank])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_smaller_matrix_computes_what_its_numbers_say(shrink, dtype):
    torch.manual_seed(0)
    weight, x = torch.randn(12, 16).to(dtype), torch.randn(5, 16).to(dtype)
    form, numbers = shrink(weight, 0.5)
    dense = form(torch.eye(16).to(dtype)).T.float()
    assert torch.allclose(form(x).float(), x.float() @ dense.T, atol=1e-4 if dtype is torch.float32 else 0.1)
    assert numbers <= 0.5 * weight.numel() + 1
    if shrink is _sparse:
        largest = weight.float().abs().argsort(dim=1)[:, 9:]  # a sixteenth goes to the mask
        assert torch.equal(dense, weight.float() * torch.zeros(12, 16).scatter(1, largest, 1))
    else:
        rank = numbers // (12 + 16)
        left, values, right = torch.linalg.svd(weight.float())
        best = left[:, :rank] * values[:rank] @ right[:rank]
        assert torch.allclose(dense, best, atol=1e-4 if dtype is torch.float32 else 0.1)


def test_a_failed_measurement_says_why(tmp_path):
    tiny_model("mixtral").save_pretrained(tmp_path / "model")
    with pytest.raises(RuntimeError, match=r"'whole' failed(.|\n)*float17"):
        compare_costs(tmp_path / "model", {}, variants=["whole"], dtype="float17")
