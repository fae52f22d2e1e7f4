"""What the project's own book says, on its real pages, agrees with the records that it was made of."""

import json
import re

import pytest

from moeits.book import audit, run
from moeits.book.exercises import EXERCISES
from moeits.machine.paths import BOOK
from moeits.study import profiles
from moeits.study.records import load, read

pytestmark = pytest.mark.slow


def text(book, page):
    return " ".join(book.pages[page].find("article").get_text(" ").split())


def pruned_rows(book, name):
    """What was measured of a model, pruned at its own tau."""
    tau = profiles.load("smoke").model(name).tau
    [record] = [
        record
        for record in load(book.records / "results" / "smoke", "scores")
        if (record.rows[0]["model"], record.rows[0]["tau"], record.rows[0]["method"]) == (name, tau, "moeits")
    ]
    return record.rows


def test_every_page_of_the_contents_is_there(smoke):
    assert {f"{page}.html" for page in run.toc_pages(BOOK)} <= smoke.pages.keys()


@pytest.mark.parametrize("page", ["prune-mixtral", "prune-qwen", "prune-deepseek"])
def test_a_pruning_page_shows_its_own_model(smoke, page):
    profile = profiles.load("smoke")
    name = next(name for name, model in profile.models.items() if model.page == page)
    rows = pruned_rows(smoke, name)
    kept = next(row["value"] for row in rows if row["variant"] == "routed experts")
    assert f"MoEITS keeps {kept:.0f} of the" in text(smoke, f"notebooks/{page}.html")
    perplexity = next(row["value"] for row in rows if row["metric"] == "perplexity")
    assert f"{perplexity:.4g}" in text(smoke, f"notebooks/{page}.html")
    assert f"Pruning {name}" in smoke.pages[f"notebooks/{page}.html"].title.get_text()


def test_the_first_page_shows_the_same_numbers(smoke):
    for name, model in profiles.load("smoke").models.items():
        for row in pruned_rows(smoke, name):
            if row["metric"] == "perplexity" and model.page:
                assert f"{row['value']:.3g}" in text(smoke, "index.html")


def test_it_says_where_the_time_went(smoke):
    at = smoke.said.index("where the time went:")
    stages = [line.split()[0] for line in smoke.said[at + 1 : -1]]
    assert [stages[0], *stages[-3:]] == ["measured", "notebooks", "book", "in"]
    measured = {"models", "NMI", "scores", "controls", "green", "healing", "protocols", "rivals", "finals"}
    assert sorted(stages[1:-3]) == sorted(measured)
    assert smoke.said[-1] == f"the book is at {smoke.html / 'index.html'}"
    steps = [line for line in smoke.said if re.match(r"\[ ?\d+/\d+\]", line)]
    assert len(steps) == len(smoke.said[:at]) / 2


def test_again_with_nothing_changed_measures_nothing(smoke):
    def written():
        made = [*smoke.records.rglob("*"), *smoke.source.rglob("*"), *(smoke.root / ".cache").rglob("*")]
        return {path: path.stat().st_mtime_ns for path in made if path.is_file()}

    before = written()
    smoke.run()
    assert written() == before


# Pages on which nothing is measured, and what is quoted or drawn from a seed on the others.
COMPUTED_PAGES = {"theory", "nmi-demos", "surgery", "laboratory", "audit"}
COMPUTED = {"fig-margins", "tab-paper-qwen", "tab-paper-deepseek", "tab-paper-mixtral"}
COMPUTED |= {"fig-noise", "tab-noise", "fig-planted", "tab-planted", "fig-corrections"}
COMPUTED |= {"tab-rivals", "tab-rivals-quoted", "tab-quoted-protocols", "tab-dense"}
COMPUTED |= {"tab-own-machine", "tab-own-memory"}


def test_every_measured_figure_names_its_records(smoke):
    sides = sorted((smoke.records / "figures").rglob("*.json"))
    assert len(sides) > 40
    for path in sides:
        side = json.loads(path.read_text())
        computed = path.parent.name in COMPUTED_PAGES or side["label"] in COMPUTED
        assert bool(side["records"]) != computed, side["label"]


def test_the_list_of_figures_has_every_figure_and_table_with_its_files(smoke):
    article = smoke.pages["cite.html"].find("article")
    listed = article.get_text(" ")
    links = {str(link["href"]).rpartition("/")[2] for link in article.find_all("a", href=True)}
    for path in (smoke.records / "figures").rglob("*.json"):
        side = json.loads(path.read_text())
        assert side["label"] in listed
        assert set(side["files"]) <= links


def test_the_first_page_tells_the_ledgers_tally(smoke):
    tally = audit.tally(audit.load())["all"]
    for verdict, phrase in (("holds", "hold"), ("does not hold", "do not")):
        assert f"{tally[verdict]} {phrase}" in text(smoke, "index.html")


def test_the_exercises_are_open_and_their_solutions_right(smoke):
    assert text(smoke, "notebooks/exercises.html").count("not yet.") == len(EXERCISES)
    assert text(smoke, "notebooks/solutions.html").count(": right") == len(EXERCISES)


def test_the_students_book_has_no_solutions(smoke):
    smoke.run("--student")
    html = smoke.source / "_build" / "student"
    pages = {path.relative_to(html).as_posix() for path in html.rglob("*.html")}
    assert smoke.pages.keys() - pages == {"notebooks/solutions.html"}
    assert not list(html.rglob("*solutions*"))


def test_the_records_of_the_smoke_profile_can_be_read(smoke):
    files = sorted((smoke.records / "results" / "smoke").glob("*.json"))
    assert files
    steps = {"nmi", "scores", "green", "healing", "protocol", "statistics", "rival", "final", "oracle"}
    assert {read(path).step for path in files} == steps
