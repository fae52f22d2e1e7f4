import re

import pandas as pd
import pytest

from moeits.machine.paths import BOOK
from moeits.study import paper


@pytest.mark.parametrize("number", paper.TABLES)
def test_the_printed_averages_are_those_of_the_row(number):
    table = paper.table(number)
    # One table prints two of its averages to one digit; truncation makes 69.66 a "69.6" there.
    assert ((table.average - table.average_printed).abs() < 0.075).all()


def test_averages_by_hand():
    table = paper.table(3).set_index("method")
    assert table.average["MoEITS"] == pytest.approx((75.2 + 72.3 + 36.01 + 67.46 + 61.27) / 5)
    stun = paper.table(4).set_index("method").loc["STUN"]
    assert stun.tasks == 3
    assert stun.average == pytest.approx((80.0 + 51.5 + 59.9) / 3)


def test_margins_compare_the_same_tasks():
    margins = paper.margins(4).set_index("method")
    assert margins.lead["STUN"] == pytest.approx((83.08 - 80.0 + 55.89 - 51.5 + 82.83 - 59.9) / 3)
    assert margins.tasks["C-GNN-Prune"] == 4
    assert margins.lead_without_hellaswag["MoP"] == pytest.approx(1.7925)


def test_unknown_table_names_the_known_ones():
    with pytest.raises(ValueError, match=r"\[2, 3, 4\], not 5"):
        paper.table(5)


def test_a_misprint_that_is_no_percentage_is_named(tmp_path, monkeypatch):
    text = (paper.DATA / "paper" / "table3_qwen1.5_moe.csv").read_text().replace("72.3,", "723,")
    (tmp_path / "paper").mkdir()
    (tmp_path / "paper" / "table3_qwen1.5_moe.csv").write_text(text)
    monkeypatch.setattr(paper, "DATA", tmp_path)
    with pytest.raises(ValueError, match="no percentage in the row of MoEITS"):
        paper.table(3)


def test_every_citation_key_is_in_the_bibliography():
    keys = set(re.findall(r"@\w+\{([^,]+),", (BOOK / "references.bib").read_text()))
    quoted = pd.concat([paper.table(number) for number in paper.TABLES]).citation
    assert set(quoted) | {"balderas2026moeits"} <= keys


def test_every_quoted_row_has_a_protocol():
    quoted = {method for number in paper.TABLES for method in paper.table(number).method}
    known = paper.protocols().set_index("row")
    assert set(known.index) == quoted
    for number in paper.TABLES:
        for _, line in paper.table(number).iterrows():
            assert str(number) in known.tables[line.method].split()
            assert known.citation[line.method] == line.citation


def test_the_whole_models_are_quoted_with_their_source():
    table = paper.dense()
    assert table[["model", "asked", "metric", "source", "mark"]].notna().all(axis=None)
    known = set(re.findall(r"@\w+\{(\w+),", (BOOK / "references.bib").read_text()))
    assert set(table.citation.dropna()) <= known
    scores = table[list(paper.TASKS)]
    assert scores.min().min() > 25
    assert scores.max().max() < 100
    # The means that the sources give for their five tasks.
    means = (
        scores.mean(axis=1).groupby([table.source.str.extract(r"(HC-SMoE|PCoMoE)")[0], table.model]).first()
    )
    given = {
        ("HC-SMoE", "Mixtral 8x7B"): 73.32,
        ("HC-SMoE", "Qwen1.5-MoE Chat"): 63.18,
        ("PCoMoE", "Mixtral 8x7B"): 77.86,
        ("PCoMoE", "Qwen1.5-MoE"): 67.90,
        ("PCoMoE", "DeepSeek-V2-Lite"): 70.02,
    }
    assert means.to_dict() == pytest.approx(given, abs=0.006)
