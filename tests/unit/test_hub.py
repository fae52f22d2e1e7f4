"""Downloads from the hub, on folders that lie as the hub's do, and what is said where they fail."""

import json
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import errors
from tiny import tiny_model

from moeits.models import hub
from moeits.study import pipeline, profiles

NAME, COMMIT = "someone/tiny-moe", "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """A cache of the hub's layout that holds a model, and no network."""
    place = tmp_path / "models--someone--tiny-moe"
    tiny_model("qwen2_moe").save_pretrained(place / "snapshots" / COMMIT)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    real = huggingface_hub.snapshot_download
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name, **how: real(name, cache_dir=tmp_path, **how)
    )
    return place


def test_a_model_is_found_and_its_commit_written_down(cached, tmp_path):
    pins = tmp_path / "revisions.json"
    folder = hub.download(NAME, pins=pins)
    assert folder.name == COMMIT
    assert (folder / "model.safetensors").exists()
    assert json.loads(pins.read_text()) == {NAME: COMMIT}
    newer = "f" * 40
    tiny_model("mixtral").save_pretrained(cached / "snapshots" / newer)
    (cached / "refs" / "main").write_text(newer)
    assert hub.download(NAME, pins=pins).name == COMMIT
    assert hub.download(NAME, "main", pins=pins).name == newer
    assert json.loads(pins.read_text()) == {NAME: COMMIT}


@pytest.mark.usefixtures("cached")
def test_a_study_of_the_hub_names_the_commit_in_its_records(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(pipeline, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(pipeline, "DATA", tmp_path / "data")
    settings = profiles.load("laptop").models["mini-qwen"].model_dump() | {"source": f"hub:{NAME}"}
    study = pipeline.Study(profiles.load("laptop", models={"tiny": settings}), "tiny")
    assert study.nmi.provenance["revision"] == COMMIT


def refused(kind):
    return kind("refused", response=SimpleNamespace(headers={}, request=None))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (refused(errors.GatedRepoError), "is gated: accept its terms .* HF_TOKEN"),
        (refused(errors.RepositoryNotFoundError), "no model someone/tiny-moe on the hub, or it is private"),
        (refused(errors.RevisionNotFoundError), "has no revision 'v9': correct it"),
        (errors.LocalEntryNotFoundError("nothing"), "give the folder of a model that you have"),
        (OSError(28, "No space left on device"), "No space left.* GB are free .* goes on where it stopped"),
    ],
)
def test_what_went_wrong_is_said_with_what_helps(error, message, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(ValueError, match=message):
        hub.download(NAME, "v9", pins=tmp_path / "revisions.json")
    assert not (tmp_path / "revisions.json").exists()


@pytest.mark.usefixtures("cached")
def test_offline_only_what_is_there_is_used(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match=r"someone/other is neither a folder here.* HF_HUB_OFFLINE is set"):
        hub.download("someone/other", pins=tmp_path / "revisions.json")
