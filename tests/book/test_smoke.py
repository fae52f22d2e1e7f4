"""What the project's own book says, on its real pages, agrees with the records that it was made of."""

import json
import re

import pytest
from checks import read

from moeits import pipeline, profiles, run
from moeits.paths import BOOK

pytestmark = pytest.mark.slow


def text(book, page):
    return " ".join(book.pages[page].find("article").get_text(" ").split())


def test_every_page_of_the_contents_is_there(smoke):
    assert {f"{page}.html" for page in run.toc_pages(BOOK)} <= smoke.pages.keys()


@pytest.mark.parametrize("page", ["prune-mixtral", "prune-qwen", "prune-deepseek"])
def test_a_pruning_page_shows_its_own_model(smoke, page):
    profile = profiles.load("smoke")
    name, model = next((name, model) for name, model in profile.models.items() if model.page == page)
    study = pipeline.Study(profile, name)
    rows = study.scores(model.tau).rows
    share = next(row["kept_share"] for row in rows)
    assert f"a share of {share:.1%}" in text(smoke, f"notebooks/{page}.html")
    perplexity = next(row["value"] for row in rows if row["metric"] == "perplexity")
    assert f"{perplexity:.4g}" in text(smoke, f"notebooks/{page}.html")
    assert f"Pruning {name}" in smoke.pages[f"notebooks/{page}.html"].title.get_text()


def test_the_first_page_shows_the_same_numbers(smoke):
    profile = profiles.load("smoke")
    for name, model in profile.models.items():
        for row in pipeline.Study(profile, name).scores(model.tau).rows:
            if row["metric"] == "perplexity":
                assert f"{row['value']:.3g}" in text(smoke, "index.html")


def test_it_says_where_the_time_went(smoke):
    at = smoke.said.index("where the time went:")
    stages = [line.split()[0] for line in smoke.said[at + 1 :]]
    assert stages == ["models", "NMI", "scores", "controls", "healing", "rivals", "notebooks", "book", "in"]
    assert len([line for line in smoke.said if re.match(r"\[ ?\d+/\d+\]", line)]) == len(smoke.said[:at]) / 2


def test_again_with_nothing_changed_measures_nothing(smoke, monkeypatch):
    before = {path: path.stat().st_mtime_ns for path in smoke.html.rglob("*")}
    monkeypatch.setenv("MOEITS_REPOSITORY", "https://github.com/someone/moeits-fork")

    def fail(*_, **__):
        raise AssertionError("measured again")

    monkeypatch.setattr("moeits.run._execute", fail)
    monkeypatch.setattr("moeits.evaluation.evaluate", fail)
    figures = smoke.source.parent / "figures"
    run.run_profile(profiles.load("smoke"), book=smoke.source, figures=figures, say=lambda _: None)
    assert {path: path.stat().st_mtime_ns for path in smoke.html.rglob("*")} == before


def test_every_measured_figure_names_its_records(smoke):
    figures = sorted((smoke.source.parent / "figures").rglob("*.json"))
    quoted = {"fig-margins", "tab-paper-qwen", "tab-paper-deepseek", "tab-paper-mixtral", "tab-layouts"}
    quoted |= {"tab-rivals", "tab-rivals-quoted"}
    assert len(figures) > 20
    for side in map(json.loads, (path.read_text() for path in figures)):
        assert bool(side["records"]) == (side["label"] not in quoted), side["label"]


def test_the_records_of_the_smoke_profile_can_be_read(smoke):
    files = sorted(smoke.records.glob("*.json"))
    assert files
    assert {read(path).step for path in files} <= {"nmi", "scores", "healing", "statistics", "rival"}
