"""A record's measurement is found by what it asks, taken again, and compared."""

import json

import pytest
from click.testing import CliRunner
from tiny import tiny_model

from moeits.cli import main
from moeits.errors import MissingError, MoeitsError
from moeits.machine.paths import DATA
from moeits.study import profiles, records, reproduce
from moeits.study.pipeline import Study
from moeits.study.profiles import ModelSettings, Profile


@pytest.fixture
def settings(tmp_path, monkeypatch):
    """The settings of the one profile that there is, with a small random model."""
    tiny_model("qwen2_moe").save_pretrained(tmp_path / "tiny")
    model = ModelSettings(source=str(tmp_path / "tiny"), title="tiny", like="tiny", tau=1)
    profile = Profile(name="small", models={"tiny": model}, tau_grid=[1], tasks=["last_word"])
    monkeypatch.setattr(profiles, "names", lambda: ["small"])
    monkeypatch.setattr(profiles, "load", lambda _, **changes: profile.model_copy(update=changes))
    return profile


@pytest.fixture
def file(settings, tmp_path):
    return records.write(tmp_path / "small", Study(settings, "tiny")._nmi.take())


def run(file):
    return CliRunner().invoke(main, ["reproduce", str(file)])


def test_an_honest_record_is_reproduced(file):
    done = run(file)
    assert done.exit_code == 0, done.output
    count = len(records.read(file).rows)
    assert done.output.splitlines()[-1] == f"0 of {count} results differ by more than 1%"
    assert "value again" in done.output


def test_a_tampered_record_is_told(file):
    content = json.loads(file.read_text())
    content["rows"][3]["value"] *= 1.02
    file.write_text(json.dumps(content))
    done = run(file)
    assert done.exit_code == 1
    assert f"1 of {len(content['rows'])} results differ by more than 1%" in done.output


def test_of_times_nothing_is_asked(file, monkeypatch):
    seconds = records.row(model="tiny", metric="seconds", value=1.0, unit="s")
    content = json.loads(file.read_text())
    content["rows"].append(seconds)
    file.write_text(json.dumps(content))
    rows = [*records.read(file).rows[:-1], seconds | {"value": 9.0}]
    monkeypatch.setattr(Study, "_measure_nmi", lambda _: (rows, {}))
    done = run(file)
    assert done.exit_code == 0, done.output
    assert "time, memory and energy:" in done.output


def test_what_is_asked_no_more_says_at_which_commit_it_was(file):
    record = records.read(file)
    other = records.Record("nmi", record.inputs | {"preset": "official"}, record.rows, {}, {"commit": "abc"})
    with pytest.raises(MoeitsError, match=r"nothing that is measured today asks(.|\n)*abc"):
        reproduce.measurement(other)
    other = records.Record("nmi", record.inputs | {"checkpoint": "of other weights"}, record.rows, {}, {})
    with pytest.raises(MoeitsError, match="nothing that is measured today asks"):
        reproduce.measurement(other)
    bench = records.Record("bench-nmi", {}, record.rows)
    with pytest.raises(MoeitsError, match=r"make bench"):
        reproduce.measurement(bench)
    with pytest.raises(MoeitsError, match="has no rows to compare"):
        reproduce.measurement(records.Record("relatedness", record.inputs, []))


def test_a_model_of_the_hub_is_not_downloaded():
    record = records.Record("nmi", {"model": "mixtral-8x7b", "checkpoint": "0123"}, [records.row()])
    with pytest.raises(MissingError, match=r"mistralai/Mixtral.* is not on this machine"):
        reproduce.measurement(record, "paper")


def test_an_unknown_id_names_the_folders():
    with pytest.raises(MissingError, match=r"'0123-4567' is neither .*data/study/\*/, data/reference/\*/"):
        reproduce.find("0123-4567")


@pytest.mark.parametrize("step", ["anatomy", "selection"])
def test_a_committed_record_of_the_study_is_found_by_its_id_and_can_be_taken_again(step):
    first = records.load(DATA / "study" / "records", step)[0]
    file = reproduce.find(first.id)
    assert file == DATA / "study" / "records" / f"{step}-{first.id}.json"
    assert reproduce.measurement(records.read(file)).identity == first.identity
