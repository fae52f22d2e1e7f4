import json
import platform
from pathlib import Path

import pytest

from moeits.study import records


def measured(value=0.5):
    return [records.row(model="m", metric="acc", value=value, stderr=0.1, n=4)], {"kept": {"1": [0, 2]}}


def test_a_found_record_is_not_measured_again(tmp_path):
    first = records.remember(tmp_path, "scores", {"tau": 1.25}, measured, provenance={"device": "cpu"})

    def fail():
        raise AssertionError("measured twice")

    again = records.remember(tmp_path, "scores", {"tau": 1.25}, fail)
    assert again == first
    assert again.rows[0]["value"] == 0.5
    assert again.provenance["device"] == "cpu"
    assert again.seconds >= 0


@pytest.mark.parametrize("change", [{"tau": 2.5}, {"tau": 1.25, "seed": 1}, {}])
def test_any_other_input_is_another_record(tmp_path, change):
    first = records.remember(tmp_path, "scores", {"tau": 1.25}, measured)
    other = records.remember(tmp_path, "scores", change, lambda: measured(0.7))
    assert other.id != first.id
    assert other.rows[0]["value"] == 0.7
    assert len(records.load(tmp_path)) == 2


def test_the_order_of_inputs_does_not_count():
    assert records.digest({"a": 1, "b": [1, 2]}) == records.digest({"b": [1, 2], "a": 1})
    assert records.digest({"a": [1, 2]}) != records.digest({"a": [2, 1]})


def test_an_interrupted_measurement_leaves_nothing(tmp_path):
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        records.remember(tmp_path, "scores", {}, interrupted)
    assert list(tmp_path.iterdir()) == []


def test_an_edited_record_is_refused(tmp_path):
    record = records.remember(tmp_path, "scores", {"tau": 1.25}, measured)
    path = next(tmp_path.glob("*.json"))
    content = json.loads(path.read_text())
    content["inputs"]["tau"] = 0.5
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"{record.id}.*never edited"):
        records.read(path)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"step": "scores"}', '{"unknown": 1}'])
def test_what_is_no_record_is_named(tmp_path, text):
    path = tmp_path / "scores-0.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"scores-0\.json is not a record"):
        records.read(path)


def test_another_schema_is_refused(tmp_path):
    records.remember(tmp_path, "scores", {}, measured)
    path = next(tmp_path.glob("*.json"))
    path.write_text(path.read_text().replace('"schema":1', '"schema":99'))
    with pytest.raises(ValueError, match="schema 99"):
        records.read(path)


def test_rows_have_known_columns_and_all_of_them(tmp_path):
    with pytest.raises(ValueError, match=r"unknown columns.*vale"):
        records.row(vale=1)
    with pytest.raises(ValueError, match="lacks"):
        records.remember(tmp_path, "scores", {}, lambda: ([{"model": "m"}], {}))


def test_nan_has_no_place_in_the_inputs():
    with pytest.raises(ValueError, match=r"nan|JSON"):
        records.digest({"tau": float("nan")})


def test_edited_source_changes_the_digest(tmp_path, monkeypatch):
    for name in ("a", "b"):
        (tmp_path / f"{name}.py").write_text(name)
    monkeypatch.setattr(records, "__file__", str(tmp_path / "study" / "records.py"))
    before = records.source_digest(["a", "b"])
    assert records.source_digest(["b", "a", "a"]) == before
    (tmp_path / "b.py").write_text("edited")
    assert records.source_digest(["a", "b"]) != before


def test_provenance_names_no_host_and_no_home(tmp_path):
    records.remember(tmp_path, "scores", {}, measured)
    provenance = json.loads(next(tmp_path.glob("*.json")).read_text())["provenance"]
    words = json.dumps(provenance)
    assert str(Path.home()) + "/" not in words
    assert platform.node() not in words
    assert {"commit", "dirty", "lock", "python", "versions", "seconds", "peak_memory"} <= provenance.keys()
    assert provenance["versions"]["torch"]


def test_frame_names_record_and_step(tmp_path):
    record = records.remember(tmp_path, "scores", {}, measured)
    table = records.frame(records.load(tmp_path, "scores"))
    assert table[["record", "step", "value"]].values.tolist() == [[record.id, "scores", 0.5]]
