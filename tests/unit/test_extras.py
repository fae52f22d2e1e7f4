"""What lies in a checkpoint beside the decoder's layers, and checkpoints that contradict themselves."""

import json

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from test_surgery import uneven
from tiny import EXPERTS, assert_logits, auto, logits, tiny_model

from moeits.cli import main
from moeits.kept import Kept
from moeits.models.checkpoint import check_prunable, expert_blocks, prune_checkpoint
from moeits.models.families import FAMILIES, moe_layers
from moeits.models.folder import load_model, read_config
from moeits.models.safetensors import INDEX, SINGLE
from moeits.models.surgery import masked
from moeits.models.verify import verify

EVEN = [1, 4, 6]


def rewrite(folder, change):
    """Change the tensors of a checkpoint of one file."""
    tensors = load_file(folder / SINGLE)
    change(tensors)
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})


def change_config(folder, **settings):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


# A model that reads images, too.


@pytest.mark.parametrize("family", ["llama4", "qwen3_5_moe", "qwen3_vl_moe"])
def test_a_model_with_images_is_pruned_in_its_text_part_and_stays_whole(family, tmp_path):
    whole = tiny_model(family)
    whole.save_pretrained(tmp_path / "source")
    kept = uneven(whole)
    with masked(whole, kept):
        reference = logits(whole)
    prune_checkpoint(tmp_path / "source", tmp_path / "uneven", kept)
    pruned = load_model(tmp_path / "uneven")
    assert_logits(pruned, reference)
    assert type(pruned).__name__ == type(whole).__name__
    towers = {name: t for name, t in whole.state_dict().items() if "vision" in name or "visual" in name}
    state = pruned.state_dict()
    assert towers
    assert all(torch.equal(tensor, state[name]) for name, tensor in towers.items())
    assert verify(tmp_path / "uneven", tmp_path / "source", tokens=32).equal

    even = dict.fromkeys(kept, EVEN)
    prune_checkpoint(tmp_path / "source", tmp_path / "even", even)
    with masked(whole, even):
        reference = logits(whole)
    assert_logits(auto(whole).from_pretrained(tmp_path / "even"), reference)
    settings = json.loads((tmp_path / "even" / "config.json").read_text())
    assert "unpruned" in settings["text_config"]
    assert "num_experts_per_layer" not in settings


def test_an_image_model_without_experts_is_dense(tmp_path):
    model = tiny_model("qwen3_vl_moe", mlp_only_layers=[0, 1, 2])
    model.save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match="'qwen3_vl_moe_text' model is dense"):
        next(expert_blocks(tmp_path / "dense"))


# Layers for multi-token prediction.

STACKS = {"deepseek_v3": "model.layers.3.", "qwen3_next": "mtp.layers.0."}


def with_mtp(folder, family, experts=EXPERTS):
    """Save a model with one more layer, as deepseek_v3 (a further layer) or qwen3_next (a stack) name it."""
    tiny_model(family).save_pretrained(folder)
    generator = torch.Generator().manual_seed(5)

    def add(tensors):
        last = {name: tensor for name, tensor in tensors.items() if name.startswith("model.layers.2.")}
        for name, tensor in last.items():
            number = name.partition(".experts.")[2].partition(".")[0]
            listed = name.endswith(("gate.weight", "correction_bias")) and "shared" not in name
            new = torch.randn(tensor.shape, generator=generator)
            if not (number.isdigit() and int(number) >= experts):
                tensors[STACKS[family] + name.removeprefix("model.layers.2.")] = (
                    new[:experts] if listed else new
                )
        outside = "model.layers.3.eh_proj.weight" if family == "deepseek_v3" else "mtp.fc.weight"
        tensors[outside] = torch.ones(4, 4)

    rewrite(folder, add)
    change_config(folder, num_nextn_predict_layers=1)
    return folder


@pytest.mark.parametrize("family", sorted(STACKS))
def test_layers_for_multi_token_prediction_keep_as_many_experts_as_the_last_layer(family, tmp_path):
    source = with_mtp(tmp_path / "source", family)
    kept = {layer.layer: EVEN for layer in moe_layers(load_model(source))}
    prune_checkpoint(source, tmp_path / "pruned", kept)
    before, after = load_file(source / SINGLE), load_file(tmp_path / "pruned" / SINGLE)
    start = STACKS[family]
    rows = before[f"{start}mlp.gate.weight"].norm(dim=1)
    largest = sorted(rows.topk(3).indices.tolist())
    assert torch.equal(after[f"{start}mlp.gate.weight"], before[f"{start}mlp.gate.weight"][largest])
    for new, old in enumerate(largest):
        names = (f"{start}mlp.experts.{number}.up_proj.weight" for number in (new, old))
        assert torch.equal(after[next(names)], before[next(names)])
    assert f"{start}mlp.experts.3.up_proj.weight" not in after
    assert "model.layers.0.mlp.experts.3.up_proj.weight" not in after
    chosen = " ".join(map(str, largest))
    assert (
        f"keeps 3 of 8 experts, those with the largest rows of its router: {chosen}."
        in (tmp_path / "pruned" / "README.md").read_text()
    )
    assert verify(tmp_path / "pruned", source, tokens=32).equal


@pytest.mark.parametrize("family", sorted(STACKS))
def test_layers_for_multi_token_prediction_are_left_out_on_request(family, tmp_path):
    source = with_mtp(tmp_path / "source", family)
    command = ["prune", str(source), "--n-keep", "4", "--drop-mtp", "-o", str(tmp_path / "pruned")]
    result = CliRunner().invoke(main, [*command, "--n-jobs", "1"])
    assert result.exit_code == 0, result.output
    names = set(load_file(tmp_path / "pruned" / SINGLE))
    assert not [name for name in names if name.startswith(("model.layers.3.", "mtp."))]
    assert json.loads((tmp_path / "pruned" / "config.json").read_text())["num_nextn_predict_layers"] == 0
    assert "Left out: layers for multi-token prediction" in (tmp_path / "pruned" / "README.md").read_text()
    assert verify(tmp_path / "pruned", source, tokens=32).equal


def test_layers_for_multi_token_prediction_of_another_size_are_said_before_any_work(tmp_path):
    source = with_mtp(tmp_path / "source", "deepseek_v3", experts=6)
    with pytest.raises(ValueError, match=r"model.layers.3 .* no router of 8 .*--drop-mtp"):
        check_prunable(source, tmp_path / "pruned", n_keep=4)
    check_prunable(source, tmp_path / "pruned", n_keep=4, drop_mtp=True)


# Layers that are filled up to equally many experts.


@pytest.mark.parametrize("family", sorted(name for name, family in FAMILIES.items() if family.pads))
def test_a_padded_model_is_a_plain_checkpoint_that_computes_the_same(family, tmp_path):
    whole = tiny_model(family)
    layers = moe_layers(whole)
    if not layers[0].pads:
        pytest.skip("this configuration's router has no bias")
    whole.save_pretrained(tmp_path / "source")
    kept = {layer.layer: [5, 1, 3, 6][: 4 - i % 3] for i, layer in enumerate(layers)}
    prune_checkpoint(tmp_path / "source", tmp_path / "padded", kept, pad=True)
    assert not list((tmp_path / "padded").glob("*.py"))
    padded = auto(whole).from_pretrained(tmp_path / "padded")
    assert {layer.num_experts for layer in moe_layers(padded)} == {4}
    with masked(whole, kept):
        reference = logits(whole)
    assert_logits(padded, reference)
    assert verify(tmp_path / "padded", tmp_path / "source", tokens=32).equal
    assert Kept.read(tmp_path / "padded" / "kept.json").layers[layers[0].layer] == (1, 3, 5, 6)


@pytest.mark.parametrize(
    ("family", "kept", "message"),
    [
        ("mixtral", {0: [1, 2, 3]}, "layer 0: its router has no bias .*--uniform"),
        ("gpt_oss", {0: [1]}, "layer 0: 1 experts are fewer than a token uses, .*--at-least-top-k"),
    ],
)
def test_padding_that_cannot_be_exact_is_refused(family, kept, message, tmp_path):
    tiny_model(family).save_pretrained(tmp_path / "source")
    with pytest.raises(ValueError, match=message):
        prune_checkpoint(tmp_path / "source", tmp_path / "padded", kept, pad=True)
    assert not (tmp_path / "padded").exists()


def test_a_padded_model_is_not_pruned_again(tmp_path):
    tiny_model("gpt_oss").save_pretrained(tmp_path / "source")
    prune_checkpoint(tmp_path / "source", tmp_path / "padded", {0: [1, 2, 3]}, pad=True)
    with pytest.raises(ValueError, match="padded after it was pruned"):
        prune_checkpoint(tmp_path / "padded", tmp_path / "again", {0: [1, 2, 3]})


# Files that contradict themselves, and what they may do.


def test_an_index_must_name_all_that_its_files_hold(tmp_path):
    tiny_model("mixtral").save_pretrained(tmp_path / "source", max_shard_size="200KB")
    index = json.loads((tmp_path / "source" / INDEX).read_text())
    del index["weight_map"]["lm_head.weight"]
    (tmp_path / "source" / INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"holds lm_head\.weight, which the index does not name"):
        prune_checkpoint(tmp_path / "source", tmp_path / "pruned", {0: [1]})
    assert not (tmp_path / "pruned").exists()


def test_experts_that_are_stored_twice_are_refused(tmp_path):
    tiny_model("mixtral").save_pretrained(tmp_path / "source")
    rewrite(
        tmp_path / "source",
        lambda tensors: tensors.update(
            {"model.layers.1.block_sparse_moe.experts.down_proj": torch.zeros(8, 64, 32)}
        ),
    )
    with pytest.raises(ValueError, match="layer 1: down is stored twice"):
        next(expert_blocks(tmp_path / "source"))


def test_experts_of_one_layer_may_have_different_types(tmp_path):
    tiny_model("mixtral").save_pretrained(tmp_path / "source")
    name = "model.layers.1.block_sparse_moe.experts.5.w1.weight"
    rewrite(tmp_path / "source", lambda tensors: tensors.update({name: tensors[name].bfloat16()}))
    prune_checkpoint(tmp_path / "source", tmp_path / "pruned", {1: [0, 5]})
    block = dict(expert_blocks(tmp_path / "pruned", [1]))[1]
    assert [weight.dtype for weight in block["gate"]] == [torch.float32, torch.bfloat16]
    assert verify(tmp_path / "pruned", tmp_path / "source", tokens=32).equal


def test_tied_embeddings_stay_tied(tmp_path):
    tiny_model("mixtral", tie_word_embeddings=True).save_pretrained(tmp_path / "source")
    prune_checkpoint(tmp_path / "source", tmp_path / "pruned", {1: [0, 5]})
    assert "lm_head.weight" not in load_file(tmp_path / "pruned" / SINGLE)
    assert read_config(tmp_path / "pruned").tie_word_embeddings
    assert verify(tmp_path / "pruned", tmp_path / "source", tokens=32).equal


# Lists of other tools.


def test_experts_that_c_prune_removes(tmp_path):
    tiny_model("qwen2_moe").save_pretrained(tmp_path / "source")
    (tmp_path / "c4_prune.json").write_text('{"0": [], "1": [0, 3, 5], "2": [7]}')
    command = ["prune", str(tmp_path / "source"), "--kept", str(tmp_path / "c4_prune.json"), "-o"]
    result = CliRunner().invoke(main, [*command, str(tmp_path / "pruned")])
    assert result.exit_code == 0, result.output
    kept = Kept.read(tmp_path / "pruned" / "kept.json")
    assert kept.layers == {1: (1, 2, 4, 6, 7), 2: (0, 1, 2, 3, 4, 5, 6)}
    assert kept.criterion == "C-Prune"
    assert verify(tmp_path / "pruned", tmp_path / "source", tokens=32).equal


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"0": [3]}', r"layer 0 has no experts \[3\]: the list is for another model"),
        ('{"1": [8]}', r"layer 1 has no experts \[8\]: the list is for another model"),
        ('{"saliency": {}}', r"it has no 'layers'.* C-Prune's .* REAP and llm-compressor write none"),
    ],
)
def test_lists_that_cannot_be_read_are_named(content, message, tmp_path):
    (tmp_path / "list.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        Kept.read(tmp_path / "list.json", lambda: {1: 8, 2: 8})


def test_a_list_of_removed_experts_needs_the_model(tmp_path):
    (tmp_path / "list.json").write_text('{"1": [3]}')
    with pytest.raises(ValueError, match="lists experts to remove"):
        Kept.read(tmp_path / "list.json")
