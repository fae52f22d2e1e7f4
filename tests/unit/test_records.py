import json
import platform
from pathlib import Path

import pytest

from moeits.errors import PlaceError
from moeits.machine import keys
from moeits.study import records
from moeits.study.measurement import Measurement
from moeits.study.records import Record


def measured(value=0.5):
    return [records.row(model="m", metric="acc", value=value, stderr=0.1, n=4)], {"kept": {"1": [0, 2]}}


def remember(folder, step, inputs, measure, **more):
    return Measurement(folder, step, inputs, measure, **more).record()


def test_a_found_record_is_not_measured_again(tmp_path):
    first = remember(tmp_path, "scores", {"tau": 1.25}, measured, provenance={"device": "cpu"})

    def fail():
        raise AssertionError("measured twice")

    again = remember(tmp_path, "scores", {"tau": 1.25}, fail)
    assert again == first
    assert again.rows[0]["value"] == 0.5
    assert again.provenance["device"] == "cpu"
    assert again.seconds >= 0


@pytest.mark.parametrize("change", [{"tau": 2.5}, {"tau": 1.25, "seed": 1}, {}])
def test_any_other_input_is_another_record(tmp_path, change):
    first = remember(tmp_path, "scores", {"tau": 1.25}, measured)
    other = remember(tmp_path, "scores", change, lambda: measured(0.7))
    assert other.id != first.id
    assert other.rows[0]["value"] == 0.7
    assert len(records.load(tmp_path)) == 2


def test_the_order_of_inputs_does_not_count():
    assert keys.digest({"a": 1, "b": [1, 2]}) == keys.digest({"b": [1, 2], "a": 1})
    assert keys.digest({"a": [1, 2]}) != keys.digest({"a": [2, 1]})


def test_a_whole_number_is_the_same_question_in_either_type(tmp_path):
    first = remember(tmp_path, "scores", {"tau": 5.0, "recipe": [{"alpha": 16}]}, measured)
    assert remember(tmp_path, "scores", {"tau": 5, "recipe": ({"alpha": 16.0},)}, measured) == first
    assert remember(tmp_path, "scores", {"tau": 5.5, "recipe": [{"alpha": 16}]}, measured) != first


def test_the_newest_is_what_says_so_and_not_the_file_that_was_written_last(tmp_path):
    clone = tmp_path / "clone"
    made = [remember(tmp_path, "bench", {"size": size}, measured) for size in (1, 2, 3)]
    old = Record("bench", {"size": 0}, made[0].rows, {}, {"seconds": 1.0})
    for record in [made[2], made[0], made[1], old]:  # as a clone writes them: in any order
        records.write(clone, record)
    assert records.latest("bench", tmp_path / "nothing", clone) == made[2]
    assert min(records.load(clone), key=lambda record: record.age) == old


def test_an_interrupted_measurement_leaves_nothing(tmp_path):
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        remember(tmp_path, "scores", {}, interrupted)
    assert list(tmp_path.iterdir()) == []


def test_an_edited_record_is_refused(tmp_path):
    record = remember(tmp_path, "scores", {"tau": 1.25}, measured)
    path = next(tmp_path.glob("*.json"))
    content = json.loads(path.read_text())
    content["inputs"]["tau"] = 0.5
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"{record.id}.*never edited"):
        records.read(path)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"step": "scores"}', '{"unknown": 1}'])
def test_what_is_no_record_is_named(tmp_path, text):
    path = tmp_path / "scores-0000000000000000-00000000.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"scores-0{16}-0{8}\.json is not a record"):
        records.read(path)


def test_another_schema_is_refused(tmp_path):
    remember(tmp_path, "scores", {}, measured)
    path = next(tmp_path.glob("*.json"))
    path.write_text(path.read_text().replace(f'"schema":{records.SCHEMA}', '"schema":99'))
    with pytest.raises(ValueError, match="schema 99"):
        records.read(path)


def test_rows_have_known_columns_and_all_of_them(tmp_path):
    with pytest.raises(ValueError, match=r"unknown columns.*vale"):
        records.row(vale=1)
    with pytest.raises(ValueError, match="lacks"):
        remember(tmp_path, "scores", {}, lambda: ([{"model": "m"}], {}))


def test_nan_has_no_place_in_the_inputs():
    with pytest.raises(ValueError, match=r"nan|JSON"):
        keys.digest({"tau": float("nan")})


def test_what_an_answer_is_built_on_tells_it_apart_but_not_the_question(tmp_path, monkeypatch):
    question = tmp_path, "scores", {"tau": 1.25}
    first = remember(*question, measured)
    weights = remember(*question, measured, built_on={"fingerprint": "a"})
    monkeypatch.setattr("moeits.study.measurement.versions", lambda: {"torch": "0"})
    torch = remember(*question, measured)
    coded = remember(*question, measured, code=(keys.digest,))
    found = records.find(*question)
    assert {record.id for record in found} == {of.id for of in (first, weights, torch, coded)}
    assert len(found) == 4
    assert {record.identity for record in found} == {first.identity}
    assert records.find(tmp_path, "scores", {"tau": 2.5}) == []


def test_of_two_that_measure_at_once_the_first_counts(tmp_path):
    def slow():
        remember(tmp_path, "scores", {}, lambda: measured(0.1))
        return measured(0.2)

    assert remember(tmp_path, "scores", {}, slow).rows[0]["value"] == 0.1
    assert len(records.load(tmp_path)) == 1


def test_a_place_that_cannot_be_written_is_found_before_the_measurement(tmp_path):
    (tmp_path / "file").write_text("no folder")

    def fail():
        raise AssertionError("measured for nothing")

    with pytest.raises(PlaceError, match="cannot write to"):
        remember(tmp_path / "file" / "records", "scores", {}, fail)


def test_provenance_names_no_host_and_no_home(tmp_path):
    remember(tmp_path, "scores", {}, measured)
    provenance = json.loads(next(tmp_path.glob("*.json")).read_text())["provenance"]
    words = json.dumps(provenance)
    assert str(Path.home()) + "/" not in words
    assert platform.node() not in words
    assert {"commit", "dirty", "lock", "python", "versions", "seconds", "peak_memory"} <= provenance.keys()
    assert provenance["versions"]["torch"]


def test_frame_names_record_and_step(tmp_path):
    record = remember(tmp_path, "scores", {}, measured)
    table = records.frame(records.load(tmp_path, "scores"))
    assert table[["record", "step", "value"]].values.tolist() == [[record.id, "scores", 0.5]]
