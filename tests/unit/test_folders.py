"""Folders of models: what is read, what is carried along, what is checked first, and what is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from tiny import assert_logits, logits, tiny_model, tiny_tokenizer, tokens
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralForCausalLM

from moeits import load_model, prune_model, save_model, simplify
from moeits.cli import main
from moeits.errors import MoeitsError
from moeits.healing import lora
from moeits.healing.recipe import Recipe
from moeits.kept import Kept
from moeits.models import checkpoint
from moeits.models.checkpoint import prune_checkpoint
from moeits.models.families import moe_layers
from moeits.models.folder import store_as
from moeits.models.safetensors import INDEX, SINGLE, stored_tensors
from moeits.models.verify import verify

EVEN = {1: [0, 3, 6], 2: [1, 2, 5]}
UNEVEN = {1: [0, 3, 6], 2: [1, 2]}


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("original") / "model"
    tiny_model("qwen2_moe").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def source(original, tmp_path):
    return Path(shutil.copytree(original, tmp_path / "source"))


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path):
    monkeypatch.setattr(checkpoint, "CACHE", tmp_path / "cache")


@pytest.fixture
def _code_lands_here(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path / "modules")


def run(*arguments):
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exception is None or result.exit_code, result.exception
    return result


def settings_of(folder, name="config.json"):
    return json.loads((folder / name).read_text())


def change(folder, name="config.json", **settings):
    (folder / name).write_text(json.dumps(settings_of(folder, name) | settings))


# What an index may name.


def split_off(folder, place):
    """Move one tensor into a file of its own, which the index names as `place`."""
    tensors = load_file(folder / SINGLE)
    first = sorted(tensors)[0]
    save_file({first: tensors.pop(first)}, folder / place)
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
    index = dict.fromkeys(tensors, SINGLE) | {first: str(place)}
    (folder / INDEX).write_text(json.dumps({"weight_map": index}))
    return first


@pytest.mark.parametrize("place", ["../outside.safetensors", "sub/../../outside.safetensors", "ABSOLUTE"])
def test_an_index_that_leaves_the_folder_is_refused_by_its_entry(place, source, tmp_path):
    (source / "sub").mkdir()
    first = split_off(source, place.replace("ABSOLUTE", str(tmp_path / "outside.safetensors")))
    with pytest.raises(MoeitsError, match=rf"{first}\) names .*outside.safetensors', which lies outside"):
        prune_checkpoint(source, tmp_path / "pruned", EVEN)
    assert not (tmp_path / "pruned").exists()


def test_a_link_that_leaves_the_folder_is_refused_unless_it_is_the_hubs(source, tmp_path):
    blobs = tmp_path / "models--org--name" / "blobs"
    snapshot = tmp_path / "models--org--name" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(source.iterdir())):
        (blobs / str(number)).write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(Path("../../blobs") / str(number))
    prune_checkpoint(snapshot, tmp_path / "pruned", EVEN)
    assert not any(file.is_symlink() for file in (tmp_path / "pruned").iterdir())
    assert (tmp_path / "pruned" / "tokenizer.json").is_file()
    for name in ("tokenizer.json", SINGLE):
        linked = Path(shutil.copytree(source, tmp_path / f"linked-{name}"))
        (tmp_path / name).write_bytes((linked / name).read_bytes())
        (linked / name).unlink()
        (linked / name).symlink_to(tmp_path / name)
        with pytest.raises(MoeitsError, match=f"names '{name}', which lies outside"):
            prune_checkpoint(linked, tmp_path / "refused", EVEN)
        assert not (tmp_path / "refused").exists()


# What is carried along.

CARRIED = {"tokenizer.json", "additional_chat_templates", "preprocessor_config.json", "USE_POLICY.md"}
SECRET = {".env", "optimizer.pkl", "training_args.bin", "model.ckpt", "tokenizer.pkl", "notes.json"}


@pytest.fixture
def with_files(source):
    change(source, "tokenizer_config.json", auto_map={"AutoTokenizer": ["tokenization_own.Own", None]})
    (source / "tokenization_own.py").write_text(
        "from transformers import PreTrainedTokenizerFast\n\nfrom .helpers import NAME\n\n\n"
        "class Own(PreTrainedTokenizerFast):\n    own = NAME\n"
    )
    (source / "helpers.py").write_text("NAME = 'own'\n")
    (source / "modeling_own.py").write_text("raise RuntimeError\n")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tool_use.jinja").write_text("{{ messages }}")
    (source / "preprocessor_config.json").write_text("{}")
    (source / "USE_POLICY.md").write_text("Be kind.")
    for name in SECRET:
        (source / name).write_text("secret")
    return source


@pytest.mark.usefixtures("_code_lands_here")
def test_what_a_model_needs_is_carried_and_nothing_else(with_files, tmp_path):
    with pytest.warns(
        UserWarning, match=r"tokenizer_config\.json names code of its own \(tokenization_own\)"
    ):
        prune_checkpoint(with_files, tmp_path / "pruned", EVEN)
    names = {file.name for file in (tmp_path / "pruned").iterdir()}
    assert names >= CARRIED
    assert not names & SECRET
    assert not list((tmp_path / "pruned").glob("*.py"))
    assert "auto_map" not in settings_of(tmp_path / "pruned", "tokenizer_config.json")
    assert AutoTokenizer.from_pretrained(tmp_path / "pruned")("a b").input_ids
    prune_checkpoint(with_files, tmp_path / "trusted", EVEN, trust_remote_code=True)
    code = {file.name for file in (tmp_path / "trusted").glob("*.py")}
    assert code == {"tokenization_own.py", "helpers.py"}
    assert AutoTokenizer.from_pretrained(tmp_path / "trusted", trust_remote_code=True).own == "own"


def test_saving_from_memory_carries_the_same_files(with_files, tmp_path):
    with pytest.warns(UserWarning, match="names code of its own"):
        save_model(prune_model(load_model(with_files), EVEN), tmp_path / "saved")
    names = {file.name for file in (tmp_path / "saved").iterdir()}
    assert names >= CARRIED
    assert not names & SECRET


def test_the_first_models_card_survives_a_second_pruning(source, tmp_path):
    (source / "README.md").write_text("---\nlicense: mit\n---\nThe first.\n")
    prune_checkpoint(source, tmp_path / "once", EVEN)
    prune_checkpoint(tmp_path / "once", tmp_path / "twice", {1: [0, 1]})
    assert (tmp_path / "twice" / "README.base.md").read_text().endswith("The first.\n")
    assert "license: mit" in (tmp_path / "twice" / "README.md").read_text()


# What is checked before anything is measured.


@pytest.fixture
def _no_nmi(monkeypatch):
    monkeypatch.setattr(checkpoint, "measure_nmi", lambda *_, **__: pytest.fail("the NMI was measured"))


def leave_quantisation(folder):
    change(folder, quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})


def nothing(_):
    pass


@pytest.mark.usefixtures("_no_nmi")
@pytest.mark.parametrize(
    ("prepare", "arguments", "message"),
    [
        (nothing, ["--tau", 1, "-o", "source"], "source exists: choose another name"),
        (nothing, ["--tau", 1, "-o", "source/config.json/pruned"], "cannot write to"),
        (nothing, ["--tau", -1], "tau is -1"),
        (nothing, ["--share", 1.5], "share is 1.5"),
        (nothing, ["--share", 0.05], "out of reach: 2 must stay"),
        (nothing, ["--n-keep", 9], "layer 1: n_keep is 9, but the layer has 8 experts"),
        (nothing, ["--n-keep", 1, "--at-least-top-k"], "n_keep is 1, below the floor of 2"),
        (nothing, ["--n-keep", 2, "--at-least", 3], "n_keep is 2, below the floor of 3"),
        (leave_quantisation, ["--tau", 1], "floating point: remove the key 'quantization_config'"),
    ],
)
def test_what_cannot_work_is_said_before_the_nmi(prepare, arguments, message, source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prepare(source)
    target = [] if "-o" in arguments else ["-o", "pruned"]
    refused = run("prune", "source", *arguments, *target)
    assert refused.exit_code == 1
    assert message in refused.output
    assert not (tmp_path / "pruned").exists()


@pytest.mark.usefixtures("_no_nmi")
def test_uneven_groups_and_a_full_disk_are_said_before_the_nmi(source, tmp_path, monkeypatch):
    tiny_model("deepseek_v3", n_group=4, topk_group=2, n_routed_experts=16).save_pretrained(tmp_path / "v3")
    refused = run("prune", tmp_path / "v3", "--n-keep", 10, "-o", tmp_path / "pruned")
    assert "the router selects among 4 groups of experts" in refused.output
    assert "choose 8 or 12" in refused.output
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: usage)
    refused = run("prune", source, "--tau", 1, "-o", tmp_path / "pruned")
    assert "free are 1,000" in refused.output


def test_a_shrinking_top_k_is_said_and_recorded_or_prevented(original, tmp_path):
    few = ["--tau", 0, "--n-jobs", 1, "-o"]
    shrunk = run("prune", original, *few, tmp_path / "few")
    kept = Kept.read(tmp_path / "few" / "kept.json")
    small = {layer: (2, len(ids)) for layer, ids in kept.layers.items() if len(ids) < 2}
    assert small
    assert kept.top_k == small
    assert "Warning: fewer experts remain than a token used, so top-k shrinks" in shrunk.output
    assert "their top-k is smaller" in (tmp_path / "few" / "README.md").read_text()
    enough = run("prune", original, *few, tmp_path / "enough", "--at-least-top-k")
    assert "Warning" not in enough.output
    assert Kept.read(tmp_path / "enough" / "kept.json").top_k == {}
    assert {layer.top_k for layer in moe_layers(load_model(tmp_path / "enough"))} == {2}
    pruned = simplify(load_model(original), tau=0, n_jobs=1).model
    assert pruned.kept.top_k == small


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3"])
def test_a_top_k_that_shrinks_within_groups_is_exact(family, tmp_path):
    method = {"topk_method": "group_limited_greedy"} if family == "deepseek_v2" else {}
    model = tiny_model(family, n_group=4, topk_group=2, n_routed_experts=16, top_k=6, **method)
    model.save_pretrained(tmp_path / "source")
    kept = {layer.layer: [0, 3, 4, 6, 9, 10, 12, 15] for layer in moe_layers(model)}
    with pytest.warns(UserWarning, match="6 to 4"):
        prune_checkpoint(tmp_path / "source", tmp_path / "pruned", kept)
    assert verify(tmp_path / "pruned", tmp_path / "source", tokens=64).equal


# What a pruned folder says and how it loads.


@pytest.mark.usefixtures("_code_lands_here")
def test_stock_code_stops_at_an_uneven_folder_and_says_what_to_do(tmp_path):
    model = prune_model(tiny_model("mixtral"), {0: [0, 1, 2], 1: [2, 3]})
    save_model(model, tmp_path / "uneven", tokenizer=tiny_tokenizer())
    for stock in (AutoModelForCausalLM, MixtralForCausalLM):
        for options in ({}, {"ignore_mismatched_sizes": True}):
            with pytest.raises(ValueError, match="load it with trust_remote_code=True, or with moeits"):
                stock.from_pretrained(tmp_path / "uneven", **options)
    assert AutoTokenizer.from_pretrained(tmp_path / "uneven")("a").input_ids
    remote = AutoModelForCausalLM.from_pretrained(tmp_path / "uneven", trust_remote_code=True)
    assert_logits(remote, logits(model))
    remote.save_pretrained(tmp_path / "again")
    with pytest.raises(ValueError, match="load it with trust_remote_code=True"):
        MixtralForCausalLM.from_pretrained(tmp_path / "again", ignore_mismatched_sizes=True)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", trust_remote_code=True)
    assert_logits(again, logits(model))


@pytest.mark.usefixtures("_code_lands_here")
@pytest.mark.parametrize("kept", [EVEN, UNEVEN], ids=["even", "uneven"])
def test_save_pretrained_writes_a_folder_that_loads(kept, original, tmp_path):
    pruned = prune_model(load_model(original), kept)
    pruned.save_pretrained(tmp_path / "saved")
    save_model(pruned, tmp_path / "reference")
    names = [sorted(file.name for file in (tmp_path / name).iterdir()) for name in ("saved", "reference")]
    assert names[0] == names[1]
    remote = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", trust_remote_code=kept is UNEVEN)
    assert_logits(remote, logits(pruned))
    loaded = load_model(tmp_path / "saved")
    assert loaded.kept == pruned.kept
    loaded.save_pretrained(tmp_path / "again")
    assert logits(load_model(tmp_path / "again")).equal(logits(loaded))


def test_router_logits_that_were_left_on_break_nothing(tmp_path):
    tiny_model("mixtral").save_pretrained(tmp_path / "source")
    change(tmp_path / "source", output_router_logits=True)
    prune_checkpoint(tmp_path / "source", tmp_path / "pruned", {0: [0, 1, 2], 1: [2, 3]})
    assert settings_of(tmp_path / "pruned")["output_router_logits"] is False
    ids = tokens()
    for folder in ("source", "pruned"):
        assert load_model(tmp_path / folder)(ids, labels=ids).get("aux_loss") is None
    in_memory = tiny_model("mixtral", output_router_logits=True)
    prune_model(in_memory, {0: [0, 1, 2], 1: [2, 3]})(ids, labels=ids).loss.backward()


def test_healing_stores_the_types_of_its_source(tmp_path, monkeypatch):
    tiny_model("deepseek_v3").to(torch.bfloat16).save_pretrained(tmp_path / "source")
    tiny_tokenizer().save_pretrained(tmp_path / "source")
    prune_checkpoint(tmp_path / "source", tmp_path / "pruned", UNEVEN)

    def nothing(model, *_, **__):
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
        return {}

    monkeypatch.setattr(lora, "heal_model", nothing)
    lora.heal(tmp_path / "pruned", tmp_path / "healed", Recipe(preset="paper"), dtype=torch.float32)
    before, after = (stored_tensors(tmp_path / name) for name in ("pruned", "healed"))
    kinds = {name: (t.shape, t.dtype) for name, t in before.items() if "correction_bias" not in name}
    assert {name: (after[name].shape, after[name].dtype) for name in kinds} == kinds
    assert settings_of(tmp_path / "healed")["dtype"] == "bfloat16"


def test_a_model_is_stored_as_its_folder_stores_it(original):
    model = load_model(original, dtype=torch.float16)
    store_as(model, original)
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float32}


def test_kept_json_has_a_schema_number_and_versions_and_old_ones_are_read(tmp_path):
    file = tmp_path / "kept.json"
    kept = Kept({1: (0, 2)}, {1: 4}, "a/b", top_k={1: (4, 2)})
    kept.write(file)
    content = json.loads(file.read_text())
    assert content["schema"] == 1
    assert set(content["versions"]) == {"moeits", "transformers"}
    assert Kept.read(file) == kept
    old = {key: value for key, value in content.items() if key not in ("schema", "versions", "top_k")}
    file.write_text(json.dumps(old))
    with pytest.warns(FutureWarning, match="has no schema number"):
        assert Kept.read(file).layers == kept.layers
    file.write_text(json.dumps(content | {"schema": 2}))
    with pytest.raises(ValueError, match="its schema is 2, this moeits reads 1: update moeits"):
        Kept.read(file)


def test_card_and_code_name_the_versions(original, tmp_path):
    prune_checkpoint(original, tmp_path / "pruned", UNEVEN)
    for name in ("README.md", "modeling_moeits.py"):
        assert "transformers 5" in (tmp_path / "pruned" / name).read_text()


# Proof on a user's own checkpoint.


def test_verify_proves_a_pruned_folder_and_finds_what_was_changed(original, tmp_path):
    prune_checkpoint(original, tmp_path / "pruned", UNEVEN)
    proof = run("verify", tmp_path / "pruned", "--against", original, "--tokens", 64, "--json")
    assert proof.exit_code == 0
    found = json.loads(proof.stdout)
    assert found["equal"]
    assert found["tensors"] == len(stored_tensors(tmp_path / "pruned"))
    assert found["tokens"] == 64
    file = tmp_path / "pruned" / SINGLE
    tensors = load_file(file)
    tensors["model.layers.2.mlp.experts.1.up_proj.weight"] *= 1.5
    save_file(tensors, file, metadata={"format": "pt"})
    changed = run("verify", tmp_path / "pruned", "--against", original, "--tokens", 64)
    assert changed.exit_code == 1
    assert f"{len(tensors) - 1} of {len(tensors)}" in changed.output
    assert changed.stdout.rstrip().endswith("different")
    with pytest.raises(FileNotFoundError, match=r"has no kept\.json"):
        verify(original, original)


def test_verify_catches_experts_in_the_wrong_place(original, tmp_path):
    prune_checkpoint(original, tmp_path / "pruned", EVEN)
    kept = Kept.read(tmp_path / "pruned" / "kept.json")
    Kept({1: (0, 3, 7), 2: (1, 2, 5)}, kept.num_experts).write(tmp_path / "pruned" / "kept.json")
    found = verify(tmp_path / "pruned", original, tokens=64)
    assert not found.equal
    assert found.difference > 1e-3
