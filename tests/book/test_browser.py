"""The built book in a real browser, opened from its folder."""

import shutil

import pytest
from browser import browser, executable, visit

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        executable() is None, reason="no Chromium on the PATH: the book is not tried in a browser"
    ),
]
KINDS = ("errors", "outside", "images", "rules", "wide")


@pytest.fixture(scope="module")
def port():
    with browser() as port:
        yield port


@pytest.fixture(scope="module")
def visited(port, smoke):
    """What every page of the project's own book gave."""
    return {page: visit(port, smoke.html, page) for page in smoke.pages}


@pytest.mark.parametrize("kind", KINDS)
def test_every_page_passes(visited, kind):
    assert {page: found[kind] for page, found in visited.items() if found[kind]} == {}


KEPT = """new Promise((done) => setTimeout(
  () => done(document.getElementById("laboratory-text").textContent), 500))"""
DISGUISE = """(() => {
  const range = document.getElementById("laboratory-permuted");
  range.value = 16;
  range.dispatchEvent(new Event("input", {bubbles: true}));
})()"""
HITS = """new Promise((done) => setTimeout(
  () => done(document.querySelectorAll("#search-results li").length), 3000))"""


def test_the_laboratory_moves_in_its_page(port, smoke):
    moves = (KEPT, DISGUISE, KEPT)
    before, _, after = visit(port, smoke.html, "notebooks/laboratory.html", expressions=moves)["values"]
    assert before.startswith("upcycled-1")
    assert after.startswith("upcycled-1")
    assert before != after


def test_the_search_finds_a_word_without_a_server(port, smoke):
    (hits,) = visit(port, smoke.html, "search.html?q=entropy", expressions=(HITS,))["values"]
    assert hits > 1


DEFECTS = {
    "errors": "<script>throw new Error('defect')</script>",
    "outside": "<script>fetch('http://127.0.0.1:9/x').catch(() => {})</script>",
    "images": "<img src='nowhere.png' alt='x'>",
    "rules": "<button></button>",
    "wide": "<div style='width: 2000px; height: 1px'></div>",
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_defect_is_found(port, sample, tmp_path, kind):
    html = tmp_path / "html"
    shutil.copytree(sample.html, html)
    page = html / "index.html"
    before = visit(port, html, "index.html")
    assert before[kind] == []
    page.write_text(page.read_text().replace("</body>", f"{DEFECTS[kind]}</body>"))
    assert visit(port, html, "index.html")[kind] != []
