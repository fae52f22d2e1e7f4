"""`moeits push`, against a hub that only takes notes."""

import pytest
from click.testing import CliRunner
from huggingface_hub.errors import HTTPError, LocalTokenNotFoundError
from huggingface_hub.utils import filter_repo_objects
from tiny import tiny_model

from moeits.cli import main
from moeits.models.families import moe_layers
from moeits.models.folder import save_model
from moeits.models.surgery import prune_model


@pytest.fixture
def pruned(tmp_path):
    model = tiny_model("mixtral")
    prune_model(model, {layer.layer: [0, 3, 5] for layer in moe_layers(model)})
    save_model(model, tmp_path / "pruned")
    return tmp_path / "pruned"


@pytest.fixture
def hub(monkeypatch):
    calls = []

    class Hub:
        def create_repo(self, repository, *, private, exist_ok):
            calls.append(("create", repository, private, exist_ok))

        def upload_folder(self, *, repo_id, folder_path, allow_patterns):
            names = [file.name for file in folder_path.iterdir()]
            sent = sorted(filter_repo_objects(names, allow_patterns=allow_patterns))
            calls.append(("upload", repo_id, sent))
            return f"sent to {repo_id}"

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    return calls


def push(*arguments, **options):
    return CliRunner().invoke(main, ["push", *map(str, arguments)], **options)


def test_the_model_goes_with_its_card(pruned, hub):
    for name in (".env", "notes.txt", "optimizer.pkl"):
        (pruned / name).write_text("secret")
    done = push(pruned, "me/smaller", "--yes", "--private")
    assert done.exit_code == 0, done.output
    assert "sent to me/smaller" in done.output
    (_, *created), (_, repository, files) = hub
    assert created == ["me/smaller", True, True]
    assert repository == "me/smaller"
    assert {"README.md", "kept.json", "config.json", "model.safetensors"} <= set(files)
    assert not {".env", "notes.txt", "optimizer.pkl"} & set(files)


def test_nothing_is_sent_without_a_yes(pruned, hub):
    asked = push(pruned, "me/smaller", input="n\n")
    assert asked.exit_code == 1
    assert "GB to me/smaller?" in asked.output
    assert hub == []


def test_only_pruned_models_with_a_card_are_sent(pruned, hub):
    (pruned / "README.md").unlink()
    assert "has no model card" in push(pruned, "me/smaller", "--yes").output
    (pruned / "kept.json").unlink()
    assert "is no pruned model" in push(pruned, "me/smaller", "--yes").output
    assert hub == []


def test_without_a_network_it_says_so_in_one_line(pruned, monkeypatch):
    class Away:
        def create_repo(self, *_, **__):
            raise HTTPError("name resolution failed")

    monkeypatch.setattr("huggingface_hub.HfApi", Away)
    done = push(pruned, "me/smaller", "--yes")
    assert done.exit_code == 1
    assert "the hub cannot be reached: name resolution failed" in done.output


def test_without_a_token_it_says_how_to_log_in(pruned, monkeypatch):
    class Closed:
        def create_repo(self, *_, **__):
            raise LocalTokenNotFoundError("no token")

    monkeypatch.setattr("huggingface_hub.HfApi", Closed)
    done = push(pruned, "me/smaller", "--yes")
    assert done.exit_code == 1
    assert "log in with `hf auth login`" in done.output
