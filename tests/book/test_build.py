"""Rendering is strict, whole or not at all, and only when something has changed."""

import nbformat
import pytest
from click.testing import CliRunner
from sample import PROSE, skeleton

from moeits.book import run
from moeits.book.run import BookError, build_book, toc_pages
from moeits.cli import main
from moeits.machine.paths import BOOK, NOTEBOOKS

NOTEBOOK = "notebooks/sample-two.ipynb"


def prose_only(folder, text="# Start\n\nNothing.\n"):
    """A book of one page."""
    book = skeleton(folder / "book", {"index": text})
    (book / "_toc.yml").write_text("format: jb-book\nroot: index\n")
    return book


def with_page(book, name, label):
    """Add an executed page that has one label."""
    (book / "notebooks").mkdir(exist_ok=True)
    about = {"notebook": "x.ipynb", "labels": [label], "records": {}, "files": []}
    notebook = nbformat.v4.new_notebook(metadata={"moeits": about})
    nbformat.write(notebook, book / "notebooks" / f"{name}.ipynb")


def test_missing_page_is_named(tmp_path):
    book = skeleton(tmp_path / "book", {"index": PROSE})
    with pytest.raises(FileNotFoundError, match=r"names 'notebooks/sample-two'.*run its notebook"):
        build_book(book)


def test_same_label_on_two_pages_is_named(tmp_path):
    book = skeleton(tmp_path / "book", {"index": "# Start\n"})
    with_page(book, "sample-two", "fig-a")
    with_page(book, "other", "fig-a")
    (book / "_toc.yml").write_text((book / "_toc.yml").read_text() + "  - file: notebooks/other\n")
    with pytest.raises(ValueError, match=r"'notebooks/sample-two' and 'notebooks/other' both have 'fig-a'"):
        build_book(book)


@pytest.mark.slow
def test_warning_is_an_error_and_keeps_the_last_book(tmp_path):
    book = prose_only(tmp_path)
    index = build_book(book)
    before, built = index.read_text(), index.stat().st_mtime_ns
    assert build_book(book) == index
    assert index.stat().st_mtime_ns == built, "nothing changed, nothing to build"

    (book / "index.md").write_text("# Start\n\nSee {numref}`fig-none` and {doc}`nowhere`.\n")
    with pytest.raises(BookError, match=r"(?s)WARNING.*fig-none"):
        build_book(book)
    assert index.read_text() == before
    assert [path.name for path in (book / "_build").iterdir()] == ["html"]

    (book / "index.md").write_text("# Start\n\nSomething else.\n")
    assert "Something else" in build_book(book).read_text()


def test_the_students_contents_lack_the_solutions_alone():
    assert set(toc_pages(BOOK)) - set(toc_pages(BOOK, student=True)) == {"notebooks/solutions"}


def test_no_page_of_the_students_links_to_the_solutions():
    sources = [*BOOK.glob("*.md"), *NOTEBOOKS.glob("*.ipynb")]
    assert [path.name for path in sources if "notebooks/solutions`" in path.read_text()] == []


def test_the_book_is_rendered_with_a_page_that_was_run_again(monkeypatch):
    asked = []
    monkeypatch.setattr(run.Page, "run", lambda page: asked.append(page) or "the page")
    monkeypatch.setattr(run, "build_book", lambda: "the index")
    arguments = ["run", "prune", "-p", "model=mini-qwen", "-p", "tau=0.75", "--target", "prune-qwen"]
    assert CliRunner().invoke(main, arguments).output == "the page\n"
    done = CliRunner().invoke(main, [*arguments, "--render"])
    assert done.output == "the page\nthe book is at the index\n"
    parameters = {"profile": "laptop", "model": "mini-qwen", "tau": 0.75}
    assert asked == [run.Page("prune", "prune-qwen", parameters)] * 2
    assert "--render belong to a NOTEBOOK" in CliRunner().invoke(main, ["run", "--render"]).output


def test_only_the_book_has_a_students_form():
    result = CliRunner().invoke(main, ["run", "prune", "--student"])
    assert result.exit_code == 2
    assert "--student and --preview belong to the book" in result.output
