"""Records of two machines side by side."""

import pytest
from click.testing import CliRunner

from moeits.cli import main
from moeits.study import records
from moeits.study.machines import compare_records, provenance_differences


def write(folder, model, value, *, stderr=0.1, acc=(1, 0, 1), device="cpu", n=3, setting=0):
    common = {"model": model, "method": "whole", "unit": "1"}
    rows = [
        records.row(
            **common, task="boolq", metric="accuracy", variant="acc", value=value, stderr=stderr, n=n
        ),
        records.row(**common, metric="size", variant="bytes", value=100),
    ]
    items = {"task": ["boolq"] * 3, "question": [1, 2, 3], "shots": [0] * 3, "acc": list(acc)}
    items["acc_norm"] = [None] * 3
    provenance = {"device": device, "versions": {"torch": "1"}, "seconds": value}
    record = records.Record(
        "scores", {"model": model, "setting": setting}, rows, {"items": items}, provenance
    )
    return records.write(folder, record)


def test_differences_and_verdicts(tmp_path):
    for name, value in [("dense", 0.5), ("moe", 0.4), ("only-first", 0.1)]:
        write(tmp_path / "a", name, value)
    write(tmp_path / "b", "moe", 0.9, acc=(0, 0, 0), device="cuda")
    write(tmp_path / "b", "dense", 0.6, device="cuda")
    table = compare_records(tmp_path / "a", tmp_path / "b")
    assert list(table.model) == ["dense", "dense", "moe", "moe"]
    scores = table[table.metric == "accuracy"].set_index("model")
    assert scores.difference["dense"] == pytest.approx(0.1)
    assert scores.stderr["dense"] == pytest.approx(0.1 * 2**0.5)
    assert list(scores.verdict) == ["within error", "outside"]
    assert list(scores.flips) == [0, 2]
    assert set(table[table.metric == "size"].verdict) == {"same"}
    assert provenance_differences(tmp_path / "a", tmp_path / "b") == {"device": ("cpu", "cuda")}


def test_values_without_error(tmp_path):
    write(tmp_path / "a", "moe", 0.4, stderr=None)
    write(tmp_path / "b", "moe", 0.5)
    assert "no error known" in set(compare_records(tmp_path / "a", tmp_path / "b").verdict)


def test_of_two_settings_the_one_with_more_questions(tmp_path):
    write(tmp_path / "a", "moe", 0.1, n=3)
    write(tmp_path / "a", "moe", 0.3, n=30, setting=1)
    write(tmp_path / "b", "moe", 0.3)
    table = compare_records(tmp_path / "a", tmp_path / "b")
    assert table[table.metric == "accuracy"]["first"].tolist() == [0.3]


def test_ways_to_ask_and_to_heal_are_kept_apart(tmp_path):
    for folder, shift in (("a", 0.0), ("b", 0.25)):
        for shots in (0, 5):
            rows = [
                records.row(
                    model="moe", method="lora", metric="accuracy", value=shots + shift, stderr=0.1, n=3
                )
            ]
            for seed in (0, 1):
                inputs = {"shots": shots, "healing seed": seed}
                records.write(tmp_path / folder, records.Record("protocol", inputs, rows))
    table = compare_records(tmp_path / "a", tmp_path / "b")
    assert sorted(zip(table.shots, table["healing seed"], strict=True)) == [(0, 0), (0, 1), (5, 0), (5, 1)]
    assert table.difference.tolist() == [0.25] * 4


def test_nothing_to_compare(tmp_path):
    write(tmp_path / "a", "moe", 0.4)
    write(tmp_path / "b", "dense", 0.4)
    (tmp_path / "c").mkdir()
    with pytest.raises(ValueError, match="no result in common"):
        compare_records(tmp_path / "a", tmp_path / "b")
    with pytest.raises(ValueError, match="holds no records"):
        compare_records(tmp_path / "a", tmp_path / "c")


def test_command(tmp_path):
    write(tmp_path / "a", "moe", 0.4)
    write(tmp_path / "b", "moe", 0.9, device="cuda")
    arguments = ["compare", str(tmp_path / "a"), str(tmp_path / "b"), "-o", str(tmp_path / "t.csv")]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 1, result.output
    assert "device: cpu | cuda" in result.output
    assert "outside: 1" in result.output
    assert len((tmp_path / "t.csv").read_text().splitlines()) == 3
