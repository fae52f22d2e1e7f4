"""Stand-ins of the paper's models: their shapes, and the whole chain on them at reduced width."""

import json
from math import prod

import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open

from moeits.cli import main
from moeits.study import paper
from moeits.study.standin import heavy_tailed, names, shapes, standin

# Widths that no number of experts equals, and rows of a multiple of 16 bytes.
SHRINK = {
    "mixtral-8x7b": 64,
    "qwen1.5-moe": 16,
    "deepseek-v2-lite": 16,
    "llm-jp-8x152m": 8,
    "granite-3.1-1b-a400m": 8,
    "olmoe-1b-7b": 16,
}


@pytest.fixture(scope="module", params=sorted(SHRINK))
def made(request, tmp_path_factory):
    """Name and folder of a narrow stand-in."""
    folder = tmp_path_factory.mktemp("standin") / request.param
    return request.param, standin(request.param, folder, shrink=SHRINK[request.param])


def command(*arguments):
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.output


def test_every_model_of_the_paper_has_one():
    assert set(names()) == set(SHRINK)
    assert set(names().values()) == set(shapes()) > set(paper.models())


def test_names_and_shapes_are_those_of_the_hub(made):
    name, folder = made
    config = shapes()[names()[name]]["config"]
    if name.startswith("granite"):  # whose experts are stored together
        with safe_open(folder / "model.safetensors", "pt") as file:
            together = file.get_tensor("model.layers.1.block_sparse_moe.output_linear.weight")
        assert together.shape == (32, 1024 // SHRINK[name], 512 // SHRINK[name])
        return
    down = {
        "mixtral-8x7b": "model.layers.1.block_sparse_moe.experts.{}.w2.weight",
        "llm-jp-8x152m": "model.layers.1.block_sparse_moe.experts.{}.w2.weight",
        "olmoe-1b-7b": "model.layers.1.mlp.experts.{}.down_proj.weight",
        "qwen1.5-moe": "model.layers.1.mlp.experts.{}.down_proj.weight",
        "deepseek-v2-lite": "model.layers.1.mlp.experts.{}.down_proj.weight",
    }[name]
    counts = ("num_local_experts", "num_experts", "n_routed_experts")
    count = next(config[key] for key in counts if key in config)
    neurons = config.get("moe_intermediate_size", config["intermediate_size"]) // SHRINK[name]
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert down.format(count - 1) in file.keys()  # noqa: SIM118
        assert down.format(count) not in file.keys()  # noqa: SIM118
        weight = file.get_tensor(down.format(0))
    assert weight.shape == (config["hidden_size"] // SHRINK[name], neurons)
    assert weight.dtype == torch.bfloat16


def test_the_whole_chain(made, tmp_path):
    """NMI, selection, pruning, one step of healing, a few questions, and the folder loads again."""
    _, folder = made
    command("nmi", folder, "-o", tmp_path / "nmi.npz")
    command("select", tmp_path / "nmi.npz", "--share", "0.5", "-o", tmp_path / "kept.json")
    output = command("prune", folder, "--kept", tmp_path / "kept.json", "-o", tmp_path / "pruned")
    assert "before" in output
    recipe = [
        "-s",
        "steps=1",
        "-s",
        "batch_size=1",
        "-s",
        "accumulation=1",
        "-s",
        "max_tokens=32",
        "-s",
        "rank=2",
    ]
    command("heal", tmp_path / "pruned", "-o", tmp_path / "healed", *recipe)
    scores = tmp_path / "scores.json"
    command("evaluate", tmp_path / "healed", "--tasks", "arc_easy", "--limit", 2, "-o", scores)
    assert len(json.loads(scores.read_text())["items"]) == 2
    kept = [
        json.loads((tmp_path / place / "kept.json").read_text())["layers"] for place in ("pruned", "healed")
    ]
    assert kept[0] == kept[1]


def test_weights_have_the_tails_of_a_t_distribution():
    weights = heavy_tailed((400_000,), torch.Generator().manual_seed(0), scale=1)
    # Quantiles of Student's t with 4 degrees of freedom.
    expected = torch.tensor([0.7407, 2.1318, 4.6041])
    found = torch.quantile(weights, torch.tensor([0.75, 0.95, 0.995]))
    torch.testing.assert_close(found, expected, rtol=0.03, atol=0)


def test_the_same_seed_gives_the_same_bytes(tmp_path):
    folders = [
        standin("qwen1.5-moe", tmp_path / str(i), shrink=64, seed=seed) for i, seed in enumerate([0, 0, 1])
    ]
    contents = [(folder / "model.safetensors").read_bytes() for folder in folders]
    assert contents[0] == contents[1] != contents[2]


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("gpt-5", {}, "qwen1.5-moe"),
        ("qwen1.5-moe", {"shrink": 3}, "divisor of 2048"),
        ("deepseek-v2-lite", {"layers": 1}, "2 or more layers"),
    ],
)
def test_bad_input(tmp_path, name, settings, message):
    with pytest.raises(ValueError, match=message):
        standin(name, tmp_path / "out", **settings)
    assert not list(tmp_path.iterdir())


def test_a_whole_mixtral_layer_would_have_the_true_size():
    config = paper.models()["Mixtral 8x7B"]["config"]
    layer = 3 * config["num_local_experts"] * prod((config["hidden_size"], config["intermediate_size"]))
    assert 32 * layer == pytest.approx(45.1e9, rel=1e-3)
