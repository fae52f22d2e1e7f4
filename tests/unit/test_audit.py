"""The ledger's rows say what their checks compute, and stop saying it when a number changes."""

import ast
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import yaml

from moeits.book import audit
from moeits.book.run import toc_pages
from moeits.machine.paths import BOOK
from moeits.study import paper

LEDGER = paper.DATA / "paper" / "claims.yaml"


@pytest.fixture(scope="module")
def claims():
    return audit.load()


def test_the_ledger_agrees_with_its_checks(claims):
    assert len(claims) > 60
    assert {claim.verdict for claim in claims} == set(audit.VERDICTS)
    assert not [claim.id for claim in claims if re.search(r"[{}]", claim.finding)]


def test_every_check_is_used_and_every_computed_row_has_one(claims):
    assert {claim.check for claim in claims} - {None} == set(audit.CHECKS)
    assert not [claim.id for claim in claims if claim.mark == "C" and claim.check is None]


def test_evidence_pages_are_in_the_book(claims):
    assert {claim.page for claim in claims} - {None} <= set(toc_pages(BOOK))


def test_the_tally_counts_the_quoted_claims_once_and_no_others(claims):
    quoted = [claim for claim in claims if claim.quote is not None]
    assert 0 < len(quoted) < len(claims)
    tally = audit.tally(claims)
    assert tally["all"].sum() == len(quoted)
    assert tally.computed.sum() == sum(claim.check is not None for claim in quoted)
    assert (tally.computed + tally.other == tally["all"]).all()


def row(**changes):
    """A row that holds, with changes."""
    return {
        "id": "averages",
        "claim": "The averages.",
        "where": "Table 2",
        "origin": "quoted",
        "quote": "Av represents the average of the metrics.",
        "how": "recomputed",
        "verdict": "holds",
        "mark": "C",
        "finding": "within {gap:.3f}",
        "check": "averages-2",
    } | changes


def ledger(tmp_path, *rows):
    path = tmp_path / "claims.yaml"
    path.write_text(yaml.safe_dump(list(rows)))
    return path


def test_numbers_are_filled_in(tmp_path):
    (claim,) = audit.load(ledger(tmp_path, row()))
    assert claim.finding == "within 0.004"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"verdict": "does not hold"}, "finds 'holds', the row says 'does not hold'"),
        ({"numbers": {"gap": 0.05}}, r"gap is 0\.0040, the row pins 0\.05"),
        ({"numbers": {"gap_": 0}}, r"pins \['gap_'\], its check has \['gap'\]"),
        ({"check": "nothing"}, "no check 'nothing'; there are averages-2"),
        ({"check": None, "finding": "x"}, "has no evidence"),
        ({"verdict": "perhaps"}, "'averages': verdict"),
        ({"mark": "X"}, "'averages': mark"),
        ({"origin": "heard"}, "'averages': origin"),
        ({"quote": None}, "'averages': origin: .*'quoted', and no others, have 'quote'"),
        ({"quote": " "}, "'averages': quote"),
        ({"quote": "x" * 201}, "'averages': quote"),
        ({"origin": "ours"}, "'quoted', and no others, have 'quote'"),
        ({"origin": "implied", "quote": None}, "'implied', and no others, have 'implied_by'"),
        ({"implied_by": "the caption"}, "'implied', and no others, have 'implied_by'"),
        ({"colour": "red"}, "'averages': colour"),
    ],
)
def test_a_row_that_says_something_else_is_named(tmp_path, changes, says):
    with pytest.raises(ValueError, match=says):
        audit.load(ledger(tmp_path, row(**changes)))


def test_a_repeated_id_is_named(tmp_path):
    with pytest.raises(ValueError, match="occur twice: averages"):
        audit.load(ledger(tmp_path, row(), row()))


def test_a_changed_number_of_the_paper_is_noticed(tmp_path, monkeypatch):
    for file in (paper.DATA / "paper").iterdir():
        text = file.read_text()
        target = tmp_path / "paper" / file.name
        target.parent.mkdir(exist_ok=True)
        target.write_text(text.replace("80.03,77.61", "80.03,75.61"))
    monkeypatch.setattr(paper, "DATA", tmp_path)
    with pytest.raises(ValueError, match="claim 'averages-2': its check finds 'does not hold'"):
        audit.load(LEDGER)


@pytest.mark.parametrize(
    ("check", "owner", "name", "other"),
    [
        ("mean-lead-4", audit, "_rows", lambda number: shifted(number, "average", -5)),
        ("best-2", audit, "_rows", lambda number: shifted(number, "winogrande", 4)),
        ("best-4", audit, "_rows", lambda number: shifted(number, "hellaswag", -50)),
        ("best-everywhere", audit, "_rows", lambda number: shifted(number, "average", -50)),
        ("reduction-2-moei2", audit, "_rows", lambda number: shifted(number, "expert_params_removed_pct", 1)),
        ("most-reduced-4", audit, "_rows", lambda number: shifted(number, "expert_params_removed_pct", 20)),
        ("boolq-majority", audit, "BOOLQ_YES", 1635),
        ("total-share", audit, "implied_kept", lambda _: {"removed": 1.0}),
        ("figure-2", audit, "_rows", lambda _: paper.table(4).set_index("method")),
        ("iterations", "moeits.selection", "select_experts", lambda R, _: Steps(range(len(R) ** 2 // 2))),
        ("weights-touched", "moeits.histograms", "discretise", lambda weights: Read(weights[0])),
    ],
)
def test_a_check_comes_out_otherwise_where_the_facts_are_others(monkeypatch, check, owner, name, other):
    before = audit.CHECKS[check]().verdict
    monkeypatch.setattr(*([owner, name] if owner is audit else [f"{owner}.{name}"]), other)
    assert audit.CHECKS[check]().verdict != before


def shifted(number, column, by):
    """The table with the row of MoEITS moved in one column."""
    table = paper.table(number).set_index("method")
    return table.assign(**{column: table[column] + by * (table.index == "MoEITS")})


class Steps(NamedTuple):
    steps: range


class Read(NamedTuple):
    codes: np.ndarray


def test_no_check_has_its_verdict_written_in():
    tree = ast.parse(Path(audit.__file__).read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            verdicts = [
                part.args[0]
                for part in ast.walk(node)
                if isinstance(part, ast.Call) and ast.unparse(part.func) == "Finding"
            ]
            assert len(verdicts) != 1 or not isinstance(verdicts[0], ast.Constant), node.name


def test_implied_kept_experts_by_hand():
    kept = audit.implied_kept("Qwen1.5-MoE")
    assert kept == {"removed": 52.92, "experts": 60, "kept": pytest.approx(60 * 0.4708)}


def test_standard_error_by_hand():
    assert audit.standard_error(50, 10_000) == pytest.approx(0.5)


def test_model_sizes_are_those_that_the_makers_give():
    billions = {name: round(audit.model_sizes(name).total / 1e9, 1) for name in paper.models()}
    assert billions == {"Mixtral 8x7B": 46.7, "Qwen1.5-MoE": 14.3, "DeepSeek-V2-Lite": 15.7}
