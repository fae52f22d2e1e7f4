"""Healing: what trains, that merging is exact, that a broken run goes on."""

import copy
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner
from datasets import Dataset
from tiny import tiny_model, tiny_tokenizer, tokens
from transformers import TrainerCallback

from moeits.cli import main
from moeits.healing import lora
from moeits.healing.lora import HealingError, adapters, examples, heal, targets, train_model
from moeits.healing.recipe import Recipe
from moeits.models.families import moe_layers
from moeits.models.folder import load_model, save_model
from moeits.models.surgery import prune_model

RECIPE = Recipe(
    rank=4, learning_rate=1e-2, batch_size=2, accumulation=1, steps=6, save_every=2, max_tokens=16, warmup=0
)
DATA = list(tokens(seed=3, batch=12, length=16))


def pruned(family="qwen2_moe", **settings):
    """A small model whose layers keep different numbers of experts."""
    model = tiny_model(family, **settings)
    layers = moe_layers(model)
    return prune_model(model, {layer.layer: range(3 + i) for i, layer in enumerate(layers)})


def logits(model):
    with torch.no_grad():
        return model(tokens()).logits


def trained_names(model, recipe):
    with adapters(model, recipe) as adapted:
        return {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize(
    "family", ["mixtral", "qwen2_moe", "deepseek_v2", "glm4_moe", "gpt_oss", "nemotron_h"]
)
@pytest.mark.parametrize("preset", ["paper", "official"])
def test_merged_equals_adapted(family, preset):
    model = pruned(family)
    recipe = RECIPE.model_copy(update={"preset": preset, "dropout": 0.0})
    before = logits(model)
    with adapters(model, recipe) as adapted:
        torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-5)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
        expected = logits(model)
    assert (expected - before).abs().max() > 1e-2
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    assert not any("lora" in name for name, _ in model.named_parameters())
    assert [layer.num_experts for layer in moe_layers(model)] == [
        3 + i for i in range(len(moe_layers(model)))
    ]


def test_the_paper_adapts_experts_and_router_alone():
    names = trained_names(pruned("deepseek_v2"), RECIPE)
    assert all(".experts." in name or ".gate." in name for name in names)
    for part in ("gate.", "up.", "down."):
        assert any(f".experts.0.{part}" in name for name in names)
    assert any("mlp.gate." in name for name in names)


@pytest.mark.parametrize(
    ("family", "router"), [("qwen2_moe", True), ("deepseek_v2", False), ("mixtral", False)]
)
def test_the_authors_code_adapts_all_linear_maps_and_one_familys_router(family, router):
    names = trained_names(pruned(family), RECIPE.model_copy(update={"preset": "official"}))
    assert any("self_attn" in name for name in names)
    assert any("shared_expert" in name for name in names) == (family != "mixtral")
    assert any("layers.0.mlp.gate_proj" in name for name in names) == (family != "mixtral")  # the dense layer
    assert any("mlp.gate.lora" in name or "mlp.gate.base" in name for name in names) == router
    assert not any("shared_expert_gate" in name or "lm_head" in name or "embed" in name for name in names)


def test_every_expert_of_every_layer_trains():
    model = pruned("mixtral")
    names = trained_names(model, RECIPE)
    for layer in moe_layers(model):
        for expert in range(layer.num_experts):
            assert any(f"{layer.name}.experts.experts.{expert}.down.lora_A" in name for name in names)


def test_the_number_of_trained_parameters_is_reported():
    model = pruned("mixtral")
    experts = [layer.num_experts for layer in moe_layers(model)]
    with adapters(model, RECIPE) as adapted:
        assert adapted.parts["experts"] == 3 * sum(experts) * RECIPE.rank * (64 + 32)
        assert adapted.parts["router"] == sum(RECIPE.rank * (64 + count) for count in experts)


def test_what_peft_leaves_out_is_an_error(monkeypatch):
    maps = lora._linear_maps

    def more(*args):
        found = maps(*args)
        found["experts"].append("0.mlp.experts.experts.0.sideways")
        return found

    monkeypatch.setattr(lora, "_linear_maps", more)
    model = pruned("mixtral")
    before = logits(model)
    with pytest.raises(ValueError, match="sideways"), adapters(model, RECIPE):
        pass
    assert torch.equal(logits(model), before)


def test_an_error_leaves_the_model_as_it_was():
    model = pruned()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def interrupted():
        with adapters(model, RECIPE) as adapted, torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.add_(1)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_training_lowers_the_loss(tmp_path):
    model = pruned()
    repeated = [DATA[0]] * 4
    recipe = RECIPE.model_copy(update={"steps": 30, "dropout": 0.0, "neftune": 0.0})
    healed = train_model(model, tiny_tokenizer(), recipe, tmp_path / "work", data=repeated)
    assert len(healed.losses) == 30
    assert healed.losses[-1] < healed.losses[0] - 1
    with torch.no_grad():
        after = model(DATA[0][None], labels=DATA[0][None]).loss
    assert after < healed.losses[0] - 1


@pytest.mark.parametrize("progress", [False, True])
def test_training_prints_nothing_but_its_bar(tmp_path, capsys, progress):
    recipe = RECIPE.model_copy(update={"steps": 2})
    train_model(pruned(), tiny_tokenizer(), recipe, tmp_path / "work", data=DATA, progress=progress)
    said = capsys.readouterr()
    assert said.out == ""
    assert ("2/2" in said.err) == progress
    assert "loss" not in said.err


class Killed(Exception):
    pass


class KillAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):  # noqa: ARG002
        if state.global_step == self.step:
            raise Killed


@pytest.mark.parametrize("half", [False, True], ids=["whole checkpoint", "half checkpoint"])
def test_a_broken_run_ends_with_the_same_weights(tmp_path, monkeypatch, half):
    unbroken, broken = pruned(), pruned()
    expected = train_model(unbroken, tiny_tokenizer(), RECIPE, tmp_path / "a", data=DATA)
    make = lora._trainer

    def dies(*args):
        trainer = make(*args)
        trainer.add_callback(KillAt(5))
        return trainer

    monkeypatch.setattr(lora, "_trainer", dies)
    with pytest.raises(Killed):
        train_model(broken, tiny_tokenizer(), RECIPE, tmp_path / "b", data=DATA)
    if half:  # killed while the trainer wrote its last checkpoint
        (tmp_path / "b" / "checkpoint-4" / "trainer_state.json").unlink()
    monkeypatch.setattr(lora, "_trainer", make)
    healed = train_model(broken, tiny_tokenizer(), RECIPE, tmp_path / "b", data=DATA)
    assert healed.resumed_from == (2 if half else 4)
    assert healed.losses == expected.losses
    for name, tensor in unbroken.state_dict().items():
        assert torch.equal(broken.state_dict()[name], tensor), name


def test_a_folder_of_another_run_is_refused(tmp_path):
    train_model(pruned(), tiny_tokenizer(), RECIPE, tmp_path / "work", data=DATA)
    one_weight = pruned()
    with torch.no_grad():
        next(one_weight.parameters())[0, 0] += 1
    for model, recipe, data in [
        (pruned(seed=1), RECIPE, DATA),
        (one_weight, RECIPE, DATA),
        (pruned(), RECIPE.model_copy(update={"rank": 2}), DATA),
        (pruned(), RECIPE, DATA[1:]),
    ]:
        with pytest.raises(ValueError, match="another healing"):
            train_model(model, tiny_tokenizer(), recipe, tmp_path / "work", data=data)


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_state(tmp_path):
    model = pruned()
    before = logits(model)
    recipe = RECIPE.model_copy(update={"learning_rate": 1e30, "steps": 40, "save_every": 1})
    with pytest.raises(
        HealingError, match=r"loss is (nan|inf) in step \d+; the last good state is .*checkpoint"
    ):
        train_model(model, tiny_tokenizer(), recipe, tmp_path / "work", data=DATA)
    assert torch.equal(logits(model), before)


def test_gradient_checkpointing_changes_nothing(tmp_path):
    models = []
    for checkpointing in (False, True):
        recipe = RECIPE.model_copy(update={"gradient_checkpointing": checkpointing, "dropout": 0.0})
        models.append(pruned())
        train_model(models[-1], tiny_tokenizer(), recipe, tmp_path / str(checkpointing), data=DATA)
    torch.testing.assert_close(logits(models[0]), logits(models[1]), rtol=1e-3, atol=1e-3)


def test_padding_is_not_trained_on(tmp_path):
    """A batch of a long and a short sequence has the loss of its real tokens."""
    long, short = DATA[0], DATA[1][:6]
    recipe = RECIPE.model_copy(update={"steps": 1, "dropout": 0.0, "neftune": 0.0})
    healed = train_model(pruned(), tiny_tokenizer(), recipe, tmp_path / "w", data=[long, short])
    model, nats = pruned(), 0.0
    with torch.no_grad():
        for row in (long, short):
            nats += model(row[None], labels=row[None]).loss.item() * (len(row) - 1)
    assert healed.losses[0] == pytest.approx(nats / (len(long) + len(short) - 2), rel=1e-3)


@pytest.mark.parametrize("heterogeneous", [True, False])
def test_folder(tmp_path, heterogeneous):
    model = pruned() if heterogeneous else tiny_model("qwen2_moe")
    tokenizer = tiny_tokenizer()
    if heterogeneous:
        save_model(model, tmp_path / "model", tokenizer=tokenizer)
    else:
        model.save_pretrained(tmp_path / "model")
        tokenizer.save_pretrained(tmp_path / "model")
    rows = [
        {"conversations": [{"value": "ab" * i}, {"value": "c" * 9}, {"value": "never"}]} for i in range(9)
    ]
    (tmp_path / "text").mkdir()
    Dataset.from_list(rows).to_json(tmp_path / "text" / "train.jsonl")
    recipe = RECIPE.model_copy(update={"data": str(tmp_path / "text")})
    report = heal(tmp_path / "model", tmp_path / "healed", recipe)
    assert report == json.loads((tmp_path / "healed" / "healing.json").read_text())
    assert len(report["lora"]["losses"]) == RECIPE.steps
    assert report["lora"]["recipe"]["rank"] == RECIPE.rank
    assert not (tmp_path / "healed.healing").exists()
    again = load_model(tmp_path / "healed")
    assert (again.kept == model.kept) if heterogeneous else not hasattr(again, "kept")
    assert (logits(again) - logits(model)).abs().max() > 1e-3
    with pytest.raises(FileExistsError):
        heal(tmp_path / "model", tmp_path / "healed", recipe)


def test_conversations_become_instruction_and_response(tmp_path):
    Dataset.from_list([{"conversations": [{"value": "Why?"}, {"value": "So."}, {"value": "x"}]}]).to_json(
        tmp_path / "train.jsonl"
    )
    tokenizer = tiny_tokenizer()
    [row] = examples(tokenizer, Recipe(data=str(tmp_path)))
    assert tokenizer.decode(row).replace(" ", "") == "Instruction:Why?\nResponse:So."


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": "a"}], r"row 0 of .* is no conversation.*text"),
        ([{"conversations": [{"value": "one turn"}]}], "row 0"),
        ([{"conversations": None, "text": "a"}], "row 0"),
    ],
)
def test_malformed_text(tmp_path, rows, message):
    Dataset.from_list(rows).to_json(tmp_path / "train.jsonl")
    with pytest.raises(ValueError, match=message):
        examples(tiny_tokenizer(), Recipe(data=str(tmp_path)))


def test_text_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="data: packaged"):
        examples(tiny_tokenizer(), Recipe(data=str(tmp_path / "nowhere")))


def test_bad_sequences(tmp_path):
    cases = [
        ([], "no text"),
        ([DATA[0], DATA[0][:1]], "sequence 1 .* fewer than two"),
        ([DATA[0].repeat(20)], "256"),
    ]
    for data, message in cases:
        with pytest.raises(ValueError, match=message):
            train_model(pruned(), tiny_tokenizer(), RECIPE, tmp_path / "work", data=data)
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token = None
    with pytest.raises(ValueError, match="neither a pad nor an eos"):
        train_model(pruned(), tokenizer, RECIPE, tmp_path / "work", data=[DATA[0], DATA[1][:5]])


def test_targets_of_the_presets():
    assert targets("paper", "mixtral") == ("experts", "router")
    assert "router" not in targets("official", "deepseek_v2")
    assert {"router", "attention", "shared", "dense"} < set(targets("official", "qwen2_moe"))


def test_the_same_seed_gives_the_same_adapters(tmp_path):
    first, second, other = pruned(), pruned(), pruned()
    for model, seed in [(first, 0), (second, 0), (other, 1)]:
        recipe = RECIPE.model_copy(update={"seed": seed})
        torch.manual_seed(copy.copy(id(model)) % 1000)
        train_model(model, tiny_tokenizer(), recipe, tmp_path / str(id(model)), data=DATA)
    assert torch.equal(logits(first), logits(second))
    assert not torch.equal(logits(first), logits(other))


def test_nothing_to_do(tmp_path):
    with pytest.raises(ValueError, match="nothing to do"):
        heal(tmp_path, tmp_path / "out", None)


def test_command(tmp_path):
    """Refit and LoRA of a pruned folder, from the command line."""
    tokenizer, whole_model = tiny_tokenizer(), tiny_model("qwen2_moe", max_position_embeddings=2048)
    for name, model in {
        "whole": whole_model,
        "pruned": prune_model(copy.deepcopy(whole_model), {1: [0, 3], 2: [1, 2, 5]}),
    }.items():
        if name == "whole":
            model.save_pretrained(tmp_path / name)
            tokenizer.save_pretrained(tmp_path / name)
        else:
            save_model(model, tmp_path / name, tokenizer=tokenizer)
    arguments = ["heal", str(tmp_path / "pruned"), "-o", str(tmp_path / "healed"), "--dtype", "float32"]
    arguments += ["--refit-to", str(tmp_path / "whole"), "--refit-tokens", "2048"]
    arguments += ["--set", "steps=2", "--set", "batch_size=1", "--set", "max_tokens=32", "--set", "rank=2"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    assert "layer 2" in result.output
    assert "experts" in result.output
    report = json.loads((tmp_path / "healed" / "healing.json").read_text())
    assert len(report["refit"]["layers"]) == 2
    assert len(report["lora"]["losses"]) == 2
    bad = CliRunner().invoke(main, [*arguments[:3], "other", "--set", "stepps=2"])
    assert bad.exit_code != 0
    assert "stepps" in bad.output
    assert "steps" in bad.output


def test_two_processes_share_a_step(tmp_path):
    """They see the same sequences as one process, so that the weights agree up to rounding."""
    tokenizer = tiny_tokenizer()
    save_model(pruned(), tmp_path / "pruned", tokenizer=tokenizer)
    given = {
        "steps": 2,
        "batch_size": 1,
        "accumulation": 2,
        "max_tokens": 32,
        "rank": 2,
        "dropout": 0,
        "neftune": 0,
    }
    given |= {"learning_rate": 0.01}
    settings = [part for name, value in given.items() for part in ("--set", f"{name}={value}")]
    command = [
        "-m",
        "moeits",
        "heal",
        str(tmp_path / "pruned"),
        "--device",
        "cpu",
        "--dtype",
        "float32",
        *settings,
    ]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    subprocess.run(
        [sys.executable, *launch, *command, "-o", str(tmp_path / "two")], check=True, capture_output=True
    )
    subprocess.run(
        [sys.executable, *launch, *command, "--shard", "-o", str(tmp_path / "spread")],
        check=True,
        capture_output=True,
    )
    subprocess.run([sys.executable, *command, "-o", str(tmp_path / "one")], check=True, capture_output=True)
    before, one, two, spread = (
        load_model(tmp_path / name, dtype=torch.float32).state_dict()
        for name in ("pruned", "one", "two", "spread")
    )
    moved = max(float((one[name] - before[name]).abs().max()) for name in one)
    for other in (two, spread):
        apart = max(float((one[name] - other[name]).abs().max()) for name in one)
        assert apart < moved / 100
    assert not (tmp_path / "two.healing").exists()
    reports = {
        name: json.loads((tmp_path / name / "healing.json").read_text())["lora"]
        for name in ("one", "two", "spread")
    }
    assert {name: report["processes"] for name, report in reports.items()} == {
        "one": 1,
        "two": 2,
        "spread": 2,
    }
    assert reports["two"]["expert_bytes"] == reports["one"]["expert_bytes"]
    assert reports["spread"]["expert_bytes"] == reports["one"]["expert_bytes"] / 2


def test_experts_are_shared_by_several_processes(tmp_path):
    with pytest.raises(ValueError, match="one process has no other to share the experts with"):
        train_model(pruned(), tiny_tokenizer(), RECIPE, tmp_path / "work", data=DATA, shard=True)


def test_sharded_training_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="healing does not run under accelerate's FSDP"):
        train_model(pruned(), tiny_tokenizer(), RECIPE, tmp_path / "work", data=DATA)
    assert not (tmp_path / "work").exists()


def test_another_number_of_processes_is_refused(tmp_path, monkeypatch):
    train_model(pruned(), tiny_tokenizer(), RECIPE, tmp_path / "work", data=DATA)
    (tmp_path / "work" / "processes").write_text("2")
    with pytest.raises(ValueError, match="begun by 2 processes and now there are 1"):
        train_model(pruned(), tiny_tokenizer(), RECIPE, tmp_path / "work", data=DATA)
    three = SimpleNamespace(num_processes=3)
    monkeypatch.setattr(lora, "_together", lambda: three)
    recipe = RECIPE.model_copy(update={"accumulation": 4})
    with pytest.raises(ValueError, match="accumulation is 4, which 3 processes cannot share"):
        train_model(pruned(), tiny_tokenizer(), recipe, tmp_path / "other", data=DATA)
