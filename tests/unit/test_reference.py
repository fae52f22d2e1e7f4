import os
import time
from itertools import product

import pytest

from moeits.errors import MissingError, MoeitsError
from moeits.machine.paths import DATA, ROOT
from moeits.models.safetensors import fingerprint
from moeits.study import profiles, records, reference
from moeits.study.comparison import Comparison
from moeits.study.measurement import Measurement
from moeits.study.pipeline import Study
from moeits.study.profiles import HEALINGS


def take(folder, step, inputs, rows=(), code=""):
    return Measurement(folder, step, inputs, lambda: (list(rows), {}), built_on={"code": code}).record()


def scores(folder, number, method, tau, value, **more):
    common = {"model": "smol-qwen", "method": method, "tau": tau, "kept_share": 0.406} | more
    rows = [
        records.row(**common, task="heldout", metric="perplexity", value=value, stderr=2.0, n=12),
        records.row(**common, task="mean", metric="score", variant="acc", value=0.4, stderr=0.05, n=80),
    ]
    take(folder, "scores", {"number": number}, rows)


@pytest.fixture
def measured(tmp_path):
    folder = tmp_path / "results"
    scores(folder, 0, "whole", None, 24.9, kept_share=1.0)
    scores(folder, 1, "moeits", 1.25, 30.5)
    scores(folder, 2, "moeits", 5.0, 99.0)
    for draw, value in enumerate((30.0, 31.0, 32.0)):
        scores(folder, 3 + draw, f"random {draw}", 1.25, value)
    return folder


def test_the_table_has_what_was_measured_at_the_models_own_tau(measured):
    lines = reference.results_table(measured).splitlines()
    assert lines[2:] == [
        "| smol-qwen | unpruned | 100.0% | 24.9 ± 2.0 |  | 0.400 ± 0.050 | 80 |",
        "|  | pruned, tau 1.25 | 40.6% | 30.5 ± 2.0 |  | 0.400 ± 0.050 | 80 |",
        "|  | as many experts at random, mean of 3 | 40.6% | 31.0 ± 2.1 |  | 0.400 ± 0.050 | 80 |",
    ]


def test_records_of_steps_that_were_not_measured_again_stay(measured, tmp_path):
    kept = tmp_path / "reference"
    old = take(kept, "bench-nmi", {})
    scores(kept, 9, "moeits", 1.25, 1.0)
    reference.publish(measured, kept)
    names = {file.stem for file in kept.iterdir()}
    assert f"bench-nmi-{old.id}" in names
    assert names - {f"bench-nmi-{old.id}"} == {file.stem for file in measured.iterdir()}
    with pytest.raises(FileNotFoundError, match="holds no scores"):
        reference.publish(tmp_path / "nothing", kept)
    assert {file.stem for file in kept.iterdir()} == names


def test_of_records_that_differ_by_the_code_alone_the_newest_is_taken(measured, tmp_path):
    for source in ("old", "new"):
        made = take(measured, "rival", {"method": "reap"}, code=source)
        now = time.time() + (100 if source == "old" else 0)  # a clone's files have any time
        os.utime(measured / f"rival-{made.id}.json", (now, now))
    take(measured, "rival", {"method": "lu"}, code="old")
    reference.publish(measured, tmp_path / "reference")
    kept = {
        (record.inputs["method"], record.provenance["built_on"]["code"])
        for record in records.load(tmp_path / "reference", "rival")
    }
    assert kept == {("reap", "new"), ("lu", "old")}


def test_a_part_of_the_comparison_does_not_replace_the_whole(measured, tmp_path):
    kept = tmp_path / "reference"
    for method in ("lu", "reap"):
        take(kept, "rival", {"method": method}, code="old")
    take(measured, "rival", {"method": "reap"}, code="new")
    reference.publish(measured, kept)
    assert {of.provenance["built_on"]["code"] for of in records.load(kept, "rival")} == {"old"}
    for method in ("lu", "moeits"):
        take(measured, "rival", {"method": method}, code="new")
    reference.publish(measured, kept)
    assert len(records.load(kept, "rival")) == 3
    assert {of.provenance["built_on"]["code"] for of in records.load(kept, "rival")} == {"new"}


@pytest.mark.parametrize("folder", sorted((DATA / "reference").iterdir()), ids=lambda folder: folder.name)
def test_what_is_committed_are_records_of_a_profile(folder):
    """Also of those that somebody sends: whole, of this schema, unedited, made by a commit."""
    assert folder.name in profiles.names() or (folder / "README.md").exists()
    found = records.load(folder)
    assert {record.step for record in found} >= {"scores"}
    for record in found:
        assert record.provenance["commit"], record.id
        assert all(row.keys() >= records.ROW_KEYS for row in record.rows), record.id


def test_committed_records_are_found_by_todays_settings(monkeypatch):
    """On any machine: what the split model is made of counts, not the bytes that came out."""
    profile = profiles.load("laptop", device="cpu", dtype="bfloat16")
    committed = records.load(reference.REFERENCE)
    monkeypatch.setattr(
        Study,
        "fingerprint",
        property(lambda of: "of this machine" if "miniature" in of.source else fingerprint(of.folder)),
    )
    kept = {
        (record.inputs["model"], record.inputs["tau"]): record.inputs["kept"]
        for record in committed
        if record.step == "scores" and record.inputs["method"] == "moeits"
    }
    monkeypatch.setattr(Study, "_kept", lambda study, tau: kept[study.name, tau])
    found: set[str] = set()
    for name, model in profile.models.items():
        study, compared = Study(profile, name), Comparison(profile, name)
        own = kept[name, model.tau]
        compared.__dict__["counts"] = {int(layer): len(ids) for layer, ids in own.items()}
        taus = [tau for of, tau in kept if of == name]
        measurements = {
            "nmi": [study._nmi],
            "scores": [study._scores(), *map(study._scores, taus)],
            **{step: compared.measurements(step) for step in ("rival", "final", "oracle", "speed")},
            "statistics": compared.measurements("statistics"),
            "healing": [
                study._healing(tau, way, seed)
                for tau, way, seed in product(taus, filter(profile.can_heal, HEALINGS), range(3))
            ],
        }
        for step, asked in measurements.items():
            ours = {
                record.identity
                for record in committed
                if (record.step, record.inputs.get("model")) == (step, name)
                and (step != "scores" or record.inputs["method"] in ("whole", "moeits"))
            }
            assert ours <= {one.identity for one in asked}, (name, step)
            found |= ours
    assert len(found) > 50


def test_committed_records_are_measured_again_and_compared(tmp_path):
    def question(value, seconds=1.0):
        rows = [
            records.row(model="m", metric="perplexity", value=value, unit="1"),
            records.row(model="m", metric="seconds", value=seconds, unit="s"),
        ]
        return Measurement(tmp_path, "rival", {"method": "reap"}, lambda: (rows, {}))

    with pytest.raises(MissingError, match=r"holds no rival record of \{'method': 'reap'\}"):
        reference.check(tmp_path, [question(20.0)])
    question(20.0).record()
    table = reference.check(tmp_path, [question(20.1, seconds=9.0)])
    assert table[["metric", "value", "value again"]].values.tolist() == [["perplexity", 20.0, 20.1]]
    for value in (20.3, float("nan")):
        with pytest.raises(MoeitsError, match=r"not those that are committed(.|\n)*perplexity"):
            reference.check(tmp_path, [question(value)])


def test_the_readme_shows_the_committed_records():
    text = (ROOT / "README.md").read_text()
    assert reference.results_table() in text
    assert reference.methods_table() in text


def test_a_readme_without_its_marks_is_refused(measured, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("nothing")
    with pytest.raises(ValueError, match="does not have the two marks"):
        reference.update_readme(readme, measured)
    assert readme.read_text() == "nothing"
