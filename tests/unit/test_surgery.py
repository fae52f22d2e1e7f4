"""Pruning in memory: exact, checked before anything changes."""

import copy
import inspect
import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import EXPERTS, assert_logits, assert_same_weights, auto, logits, tiny_model, tokens
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from moeits.kept import Kept
from moeits.models.families import FAMILIES, moe_layers, sizes
from moeits.models.folder import load_model, save_model
from moeits.models.surgery import cut_experts, masked, prune_model
from moeits.models.unstack import ONE_BY_ONE


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def model(request):
    return tiny_model(request.param)


@pytest.fixture(scope="module")
def few_model(few):
    """For what does not depend on the family."""
    return tiny_model(few)


# Families whose routers can first choose among groups of experts.
GROUPED = {"deepseek_v2", *(name for name, family in FAMILIES.items() if family.minimum == 2)} - {"phimoe"}


def finite_logits(model):
    out = logits(model)
    if out.isnan().any():
        raise ArithmeticError("NaN")
    return out


def uneven(model, largest=5):
    """Other experts and another number of them in every layer: 5, 3 and the family's minimum."""
    layers = moe_layers(model)
    counts = [largest, 3, layers[0].minimum]
    generator = torch.Generator().manual_seed(3)
    return {
        layer.layer: torch.randperm(EXPERTS, generator=generator)[
            : max(counts[i % 3], layer.minimum)
        ].tolist()
        for i, layer in enumerate(layers, start=3 - len(layers))
    }


def test_pruned_model_equals_the_masked_one(model):
    kept = uneven(model)
    with masked(model, kept):
        reference = logits(model)
    whole = logits(model)
    pruned = prune_model(copy.deepcopy(model), kept)
    assert_logits(pruned, reference)
    assert (logits(pruned) - whole).abs().max() > 0.05  # the removed experts mattered


def test_masking_leaves_no_trace(few_model):
    before = {name: tensor.clone() for name, tensor in few_model.state_dict().items()}
    with masked(few_model, uneven(few_model)):
        logits(few_model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in few_model.state_dict().items())


def test_keeping_everything_changes_no_bit(model):
    same = prune_model(copy.deepcopy(model), {layer.layer: range(EXPERTS) for layer in moe_layers(model)})
    assert_same_weights(same, model)
    assert_logits(same, logits(model))


def test_layers_not_named_stay_whole(few_model):
    last = moe_layers(few_model)[-1].layer
    pruned = prune_model(copy.deepcopy(few_model), {last: [1, 2, 6]})
    counts = {layer.layer: layer.num_experts for layer in moe_layers(pruned)}
    assert counts == {layer.layer: 3 if layer.layer == last else EXPERTS for layer in moe_layers(few_model)}
    assert pruned.config.num_experts_per_layer == {str(number): n for number, n in counts.items()}


def test_the_minimum_works_and_one_fewer_is_refused(model):
    layers = moe_layers(model)
    least = layers[0].minimum
    kept = {layer.layer: range(2, 2 + least) for layer in layers}
    with masked(model, kept):
        reference = logits(model)
    pruned = prune_model(copy.deepcopy(model), kept)
    assert_logits(pruned, reference)
    assert {layer.top_k for layer in moe_layers(pruned)} == {min(least, layers[0].top_k)}
    with pytest.raises(ValueError, match="expert"):
        prune_model(pruned, {layers[0].layer: range(least - 1)})


# Where all layers share one top-k, or the router always picks two, there are never fewer experts than top-k.
@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"gemma4_text", "phimoe", "switch_transformers"}))
def test_fewer_experts_than_top_k(family):
    wide = tiny_model(family, top_k=4)
    kept = {layer.layer: [0, 3, 6] for layer in moe_layers(wide)}
    with masked(wide, kept):
        reference = logits(wide)
    pruned = prune_model(wide, kept)
    assert {layer.top_k for layer in moe_layers(pruned)} == {3}
    assert_logits(pruned, reference)


@pytest.mark.parametrize("family", sorted(GROUPED))
def test_group_limited_routing_is_exact_too(family):
    options = {"topk_method": "group_limited_greedy"} if family == "deepseek_v2" else {}
    model = tiny_model(family, n_group=2, topk_group=1, **options)
    kept = {layer.layer: [0, 3, 4, 7] for layer in moe_layers(model)}
    with masked(model, kept):
        reference = logits(model)
    assert_logits(prune_model(copy.deepcopy(model), kept), reference)
    with pytest.raises(ValueError, match="groups of experts, which must stay equally large"):
        prune_model(model, {layer: [0, 1, 2, 4, 5] for layer in kept})


@pytest.mark.parametrize("family", sorted(name for name, family in FAMILIES.items() if family.minimum > 1))
def test_below_the_minimum_the_router_itself_breaks(family):
    model = tiny_model(family)
    for layer in moe_layers(model):
        cut_experts(model, [0], 1, layer.tensors, layer.counters, layer.top_ks)
    with pytest.raises((RuntimeError, IndexError, ArithmeticError), match=r"out of range|NaN"):
        finite_logits(model)


def test_generation_with_a_cache(model):
    kept = uneven(model)
    options = {
        "max_new_tokens": 6,
        "do_sample": False,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    with masked(model, kept):
        reference = model.generate(tokens(), **options)
    pruned = prune_model(copy.deepcopy(model), kept).generate(tokens(), **options)
    assert pruned.past_key_values is not None
    for one, other in zip(pruned.logits, reference.logits, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


# These have one implementation of their experts, and no switch.
@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"dbrx", "llama4_text", "switch_transformers"}))
def test_every_implementation_of_the_experts_gives_the_same(family):
    model = tiny_model(family)
    prune_model(model, uneven(model))
    results = []
    for implementation in ("eager", ONE_BY_ONE, "batched_mm", "grouped_mm"):
        model.set_experts_implementation(implementation)
        results.append(logits(model))
    # They add in different orders, and how differently depends on the processor.
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_routers_auxiliary_loss_works_or_says_why_not(family):
    ids = tokens()
    even, uneven_model = tiny_model(family), tiny_model(family)
    prune_model(even, {layer.layer: [0, 2, 5] for layer in moe_layers(even)})
    prune_model(uneven_model, uneven(uneven_model))
    out = even(ids, labels=ids, output_router_logits=True)
    plain = even(ids, labels=ids, output_router_logits=False)
    if out.loss == plain.loss:
        assert getattr(out, "aux_loss", None) is None  # this family has no such loss: nothing can break
        uneven_model(ids, labels=ids, output_router_logits=True).loss.backward()
        return
    if family != "switch_transformers":  # which adds a second loss
        holder = even if hasattr(even, "router_aux_loss_coef") else even.config.get_text_config()
        torch.testing.assert_close(out.loss, plain.loss + holder.router_aux_loss_coef * out.aux_loss)
    out.loss.backward()
    if len({layer.num_experts for layer in moe_layers(uneven_model)}) > 1:
        with pytest.raises(ValueError, match="same number of experts in every layer, this model has"):
            uneven_model(ids, labels=ids, output_router_logits=True)


@pytest.fixture(scope="session")
def remote_code(tmp_path_factory):
    """Where transformers puts the code of folders."""
    home = tmp_path_factory.mktemp("modules")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(home))
        patch.syspath_prepend(home)
        yield home


def test_saved_and_loaded_again(model, tmp_path, remote_code):
    for name, kept in (
        ("uneven", uneven(model)),
        ("even", {layer.layer: [1, 4, 6] for layer in moe_layers(model)}),
    ):
        pruned = prune_model(copy.deepcopy(model), kept)
        save_model(pruned, tmp_path / name)
        loaded = load_model(tmp_path / name)
        assert_same_weights(loaded, pruned)
        assert_logits(loaded, logits(pruned))
        has_code = (tmp_path / name / "modeling_moeits.py").exists()
        assert has_code is (len(set(map(len, kept.values()))) > 1)
        alone = auto(model).from_pretrained(tmp_path / name, trust_remote_code=has_code)
        assert (remote_code.name in inspect.getsourcefile(type(alone))) is has_code
        assert_logits(alone, logits(pruned))


def test_nothing_changes_when_any_layer_is_refused(few_model):
    victim = copy.deepcopy(few_model)
    first, last = moe_layers(few_model)[0].layer, moe_layers(few_model)[-1].layer
    with pytest.raises(ValueError, match="do not exist"):
        prune_model(victim, {first: [0, 1, 2], last: [0, EXPERTS]})
    assert not hasattr(victim.config, "num_experts_per_layer")
    assert torch.equal(logits(victim), logits(few_model))


def test_pruning_twice_counts_in_what_is_left(few_model):
    last = moe_layers(few_model)[-1].layer
    twice = prune_model(prune_model(copy.deepcopy(few_model), {last: [1, 4, 5, 7]}), {last: [0, 2, 3]})
    once = prune_model(copy.deepcopy(few_model), {last: [1, 5, 7]})
    assert_same_weights(twice, once)
    assert_logits(twice, logits(once))


def test_sizes_shrink_by_the_removed_experts(model):
    kept = uneven(model)
    before, pruned = sizes(model), prune_model(copy.deepcopy(model), kept)
    after = sizes(pruned)
    expert = before.routed // (EXPERTS * len(kept))
    assert after.routed == expert * sum(len(ids) for ids in kept.values())
    routers = [
        sum(
            parameter.numel()
            for name, parameter in m.named_parameters()
            if any(name in layer.router for layer in moe_layers(m))
        )
        for m in (model, pruned)
    ]
    assert before.other - after.other == routers[0] - routers[1]


def test_gradients_reach_the_experts_that_stay(model):
    pruned = prune_model(copy.deepcopy(model), uneven(model))
    ids = tokens(batch=4, length=40)
    pruned(ids, labels=ids).loss.backward()
    assert all(
        sum(part.grad.abs().sum() for part in layer.experts.parameters() if part.grad is not None) > 0
        for layer in moe_layers(pruned)
    )


def test_group_limited_routing_stays_within_the_chosen_groups():
    model = tiny_model("glm4_moe", n_group=2, topk_group=1, num_experts_per_tok=3)
    pruned = prune_model(model, {1: [0, 2, 5, 7], 2: [1, 2, 3, 5, 6, 7]})
    assert [layer.top_k for layer in moe_layers(pruned)] == [2, 3]
    assert logits(pruned).isfinite().all()


def test_masking_needs_float32():
    model = tiny_model("glm4_moe").bfloat16()
    with pytest.raises(ValueError, match="float32"), masked(model, {1: [0, 1]}):
        pass


def test_quantised_models_are_refused():
    model = tiny_model("mixtral")
    model.is_quantized = True
    with pytest.raises(ValueError, match="quantised"):
        prune_model(model, {0: [0]})


OUTSIDE = """
import sys
from pathlib import Path

sys.modules["moeits"] = None  # as where it is not installed

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

home = Path(sys.argv[1])
ids = load_file(home / "tokens.safetensors")["tokens"]
out = {}
for folder in sorted(path for path in home.iterdir() if path.is_dir()):
    remote = folder.name.endswith("uneven")
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=remote).eval()
    if remote:
        model.set_experts_implementation("eager")
    with torch.no_grad():
        out[f"{folder.name}.logits"] = model(ids).logits
        out[f"{folder.name}.text"] = model.generate(ids, max_new_tokens=5, do_sample=False)
save_file(out, home / "out.safetensors")
"""


@pytest.fixture(scope="session")
def outside(tmp_path_factory):
    """Pruned models, their folders, and what a process without moeits computes with them."""
    home = tmp_path_factory.mktemp("folders")
    models = {}
    for family in ("mixtral", "qwen2_moe", "glm4_moe", "deepseek_v2"):
        for kind in ("uneven", "even"):
            model = tiny_model(family)
            kept = (
                uneven(model) if kind == "uneven" else {layer.layer: (0, 3, 6) for layer in moe_layers(model)}
            )
            models[f"{family}-{kind}"] = prune_model(model, kept)
            save_model(model, home / f"{family}-{kind}")
    save_file({"tokens": tokens()}, home / "tokens.safetensors")
    environment = {**os.environ, "HF_HOME": str(home / ".home"), "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [sys.executable, "-c", OUTSIDE, str(home)], check=True, env=environment, capture_output=True
    )
    return home, models, load_file(home / "out.safetensors")


KINDS = [
    f"{f}-{kind}" for f in ("mixtral", "qwen2_moe", "glm4_moe", "deepseek_v2") for kind in ("uneven", "even")
]


@pytest.mark.parametrize("name", KINDS)
def test_folders_load_where_moeits_is_not_installed(outside, name):
    _, models, out = outside
    assert_logits(models[name], out[f"{name}.logits"])
    generated = models[name].generate(tokens(), max_new_tokens=5, do_sample=False)
    assert torch.equal(out[f"{name}.text"], generated)


@pytest.mark.parametrize("name", KINDS)
def test_load_model_needs_no_code_of_the_folder(outside, name):
    home, models, _ = outside
    implementation = models[name].config._experts_implementation
    loaded = load_model(home / name, experts_implementation=implementation)
    assert_same_weights(loaded, models[name])
    assert_logits(loaded, logits(models[name]))
    assert sizes(loaded) == sizes(models[name])
    assert loaded.kept == models[name].kept
    assert loaded.config.unpruned["total"] == sizes(tiny_model(name.partition("-")[0])).total


@pytest.mark.parametrize("name", KINDS)
def test_folders_with_one_count_are_plain_checkpoints(outside, name):
    home, _, _ = outside
    settings = json.loads((home / name / "config.json").read_text())
    plain = name.endswith("-even")
    assert ("auto_map" in settings) is not plain
    assert bool(list((home / name).glob("*.py"))) is not plain
    assert settings["architectures"][0].startswith("Pruned") is not plain


def test_names_of_tensors_are_those_of_the_hub(outside):
    home, _, _ = outside
    names = set(load_file(home / "mixtral-uneven" / "model.safetensors"))
    assert {f"model.layers.0.block_sparse_moe.experts.{expert}.w1.weight" for expert in range(5)} < names
    assert "model.layers.0.block_sparse_moe.experts.5.w1.weight" not in names
    names = set(load_file(home / "qwen2_moe-uneven" / "model.safetensors"))
    assert "model.layers.1.mlp.experts.2.gate_proj.weight" in names


@pytest.mark.usefixtures("remote_code")
def test_a_model_with_remote_code_can_be_pruned_and_saved_again(outside, tmp_path):
    home, models, _ = outside
    remote = AutoModelForCausalLM.from_pretrained(home / "mixtral-uneven", trust_remote_code=True)
    assert type(remote).__name__ == "PrunedMixtralForCausalLM"
    save_model(prune_model(remote, {0: [0, 2], 1: [0, 1], 2: [0]}), tmp_path / "again")
    reference = prune_model(load_model(home / "mixtral-uneven"), {0: [0, 2], 1: [0, 1], 2: [0]})
    again = load_model(tmp_path / "again")
    assert_same_weights(again, reference)
    assert_logits(again, logits(reference))
    first = models["mixtral-uneven"].kept.layers[0]
    assert again.kept.criterion == "given"
    assert reference.kept.layers[0] == (first[0], first[2])


@pytest.mark.usefixtures("remote_code")
def test_peft_trains_and_merges_a_folder(outside):
    home, models, _ = outside
    model = AutoModelForCausalLM.from_pretrained(home / "deepseek_v2-uneven", trust_remote_code=True)
    experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["o_proj"], target_parameters=experts))
    optimizer = torch.optim.SGD(adapted.parameters(), lr=0.5)
    ids = tokens()
    for _ in range(3):
        adapted(ids, labels=ids).loss.backward()
        optimizer.step()
    trained = logits(adapted.eval())
    assert (trained - logits(models["deepseek_v2-uneven"])).abs().max() > 0.01
    torch.testing.assert_close(logits(adapted.merge_and_unload()), trained, atol=1e-4, rtol=1e-4)


TASK = """
task: tiny
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{q}}"
doc_to_target: a
doc_to_choice: ["yes", "no"]
metric_list: [{metric: acc}]
"""


@pytest.mark.slow
def test_the_command_line_of_lm_eval_scores_a_folder(tmp_path):
    words = ["<pad>", "<s>", "</s>", "<unk>", *"abcdef?", "yes", "no"]
    inner = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = Whitespace()
    special = {"unk_token": "<unk>", "pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, **special)
    model = prune_model(tiny_model("mixtral"), {0: [1, 2, 3], 2: [0]})
    save_model(model, tmp_path / "model", tokenizer=tokenizer)
    documents = [{"q": f"{letter} ?", "a": i % 2} for i, letter in enumerate("abcdef")]
    (tmp_path / "data.json").write_text("\n".join(map(json.dumps, documents)))
    (tmp_path / "tiny.yaml").write_text(TASK.replace("DATA", str(tmp_path / "data.json")))
    command = (
        "import sys; sys.modules['moeits'] = None; from lm_eval.__main__ import cli_evaluate; cli_evaluate()"
    )
    arguments = ["--model", "hf", "--tasks", "tiny", "--include_path", tmp_path, "--device", "cpu"]
    options = f"pretrained={tmp_path / 'model'},trust_remote_code=True,dtype=float32"
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [
            sys.executable,
            "-c",
            command,
            *arguments,
            "--model_args",
            options,
            "--output_path",
            tmp_path / "out",
        ],
        check=True,
        env=environment,
        capture_output=True,
    )
    [results] = (tmp_path / "out").rglob("results_*.json")
    right = 0
    for document in documents:
        scores = {}
        for i, answer in enumerate(("yes", "no")):
            ids = torch.tensor([tokenizer(f"{document['q']} {answer}").input_ids])
            with torch.no_grad():
                scores[i] = model(ids).logits[0, -2].log_softmax(-1)[ids[0, -1]].item()
        right += max(scores, key=scores.get) == document["a"]
    assert json.loads(results.read_text())["results"]["tiny"]["acc,none"] == pytest.approx(right / 6)


def test_the_model_card_says_what_was_done(tmp_path):
    base = tmp_path / "base"
    tiny_model("mixtral").save_pretrained(base)
    (base / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: en\n---\nWhole.\n")
    (base / "LICENSE").write_text("Their licence.\n")
    model = load_model(base)
    kept = Kept(
        {0: (0, 1, 4), 1: (2,), 2: tuple(range(8))},
        dict.fromkeys(range(3), 8),
        model="base",
        budget={"tau": 1.25},
        threshold={0: 0.0123, 1: 0.5, 2: None},
    )
    scores = [{"task": "arc_easy", "metric": "acc", "value": 0.4321, "stderr": 0.01, "n": 50}]
    save_model(prune_model(model, kept), tmp_path / "pruned", scores=scores)
    card = (tmp_path / "pruned" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert "license: apache-2.0" in card
    assert "tau 1.25" in card
    assert "| 0 | 3 of 8 | 2 | 0.0123 | 0 1 4 |" in card
    assert "| 1 | 1 of 8 | 1 | 0.5 | 2 |" in card
    assert "| parameters | 202,688 | 128,192 | 63.2% |" in card
    assert "| arc_easy | acc | 0.4321 | 0.01 | 50 |" in card
    assert "10.48550/arXiv.2604.10603" in card
    assert str(tmp_path) not in card
    assert (tmp_path / "pruned" / "LICENSE").read_text() == "Their licence.\n"
    assert Kept.read(tmp_path / "pruned" / "kept.json") == replace(kept, top_k={1: (2, 1)})


def test_saving_leaves_nothing_half_done(tmp_path, monkeypatch):
    model = prune_model(tiny_model("mixtral"), {0: [0, 1]})
    (tmp_path / "taken").mkdir()
    with pytest.raises(FileExistsError, match="taken exists"):
        save_model(model, tmp_path / "taken")
    with pytest.raises(ValueError, match="not pruned"):
        save_model(tiny_model("mixtral"), tmp_path / "whole")
    monkeypatch.setattr("moeits.models.folder.model_card", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_model(model, tmp_path / "broken")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_loading_what_is_no_model(tmp_path):
    with pytest.raises(FileNotFoundError, match="it has no config"):
        load_model(tmp_path)


def test_router_loss_is_refused_only_where_counts_differ():
    ids = tokens()
    even = prune_model(tiny_model("mixtral"), {layer: [0, 2, 5] for layer in range(3)})
    assert even(ids, labels=ids, output_router_logits=True).aux_loss > 0
    uneven = prune_model(tiny_model("mixtral"), {0: [0, 2, 5]})
    with pytest.raises(ValueError, match=r"same number of experts in every layer, this model has \[3, 8\]"):
        uneven(ids, output_router_logits=True)


def test_saved_in_bfloat16_and_in_several_files(tmp_path):
    model = prune_model(tiny_model("qwen2_moe").bfloat16(), {1: [0, 5, 6]})
    save_model(model, tmp_path / "pruned", max_shard_size="100KB")
    assert len(list((tmp_path / "pruned").glob("*.safetensors"))) > 1
    loaded = load_model(tmp_path / "pruned")
    state = loaded.state_dict()
    assert loaded.dtype == torch.bfloat16
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
