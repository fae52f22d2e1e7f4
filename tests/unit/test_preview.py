"""A preview shows committed records, measures nothing, and says so."""

import nbformat
import pytest
from click.testing import CliRunner

from moeits.book.pages import make_page
from moeits.book.run import Page
from moeits.cli import main
from moeits.errors import MissingError
from moeits.machine.paths import DATA
from moeits.study import profiles, records
from moeits.study.measurement import Measurement, found


@pytest.fixture
def committed(tmp_path, monkeypatch):
    """Folder of the committed records of the laptop profile, empty."""
    monkeypatch.setattr(records, "DATA", tmp_path)
    monkeypatch.setenv(records.PREVIEW, "1")
    return tmp_path / "reference" / "laptop"


def question(folder, value, code=""):
    def measure():
        return [records.row(metric="perplexity", value=value)], {}

    return Measurement(folder, "scores", {"model": "m", "device": "cpu"}, measure, {"code": code})


def never():
    raise AssertionError("this was measured")


def test_a_committed_record_answers_whatever_code_made_it(committed, tmp_path):
    records.write(committed, question(committed, 20.0, code="old").take())
    asked = Measurement(tmp_path / "results" / "laptop", "scores", {"model": "m", "device": "cpu"}, never)
    assert asked.exists()
    assert asked.record().rows[0]["value"] == 20.0
    assert found([asked]) == [asked.record()]
    assert not (tmp_path / "results").exists()


def test_what_is_not_committed_is_an_error_even_where_it_was_measured(committed, tmp_path):
    asked = question(tmp_path / "results" / "laptop", 20.0)
    records.write(asked.folder, asked.take())
    assert not asked.exists()
    with pytest.raises(MissingError, match=r"no scores record of m in data/reference.*`make book`"):
        asked.record()
    assert not committed.exists()


def test_settings_are_those_of_the_machine_that_measured(committed):
    with pytest.raises(MissingError, match="no record of the step 'scores'"):
        profiles.load("laptop", folder=DATA / "profiles")
    inputs = {"device": "cuda", "dtype": "float16"}
    records.write(committed, records.Record("scores", inputs, [], {}, {}))
    assert (profiles.load("laptop").device, profiles.load("laptop").dtype) == ("cuda", "float16")


def page(tmp_path):
    metadata = {
        "kernelspec": {"name": "python3", "display_name": "Python 3"},
        "language_info": {"name": "python"},
    }
    made = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# Title")], metadata=metadata)
    about = {"notebook": "x.ipynb", "page": "x"}
    return make_page(made, about=about, given={}, values={}, variant="", files=".", records=tmp_path)


def test_the_page_says_that_it_is_a_preview_and_is_made_again_for_the_book(tmp_path, monkeypatch):
    def of_page():
        return Page("theory", "theory", {}, notebooks=tmp_path).inputs

    nbformat.write(nbformat.v4.new_notebook(), tmp_path / "theory.ipynb")
    assert "preview" not in page(tmp_path).cells[1].source
    before = of_page()
    monkeypatch.setenv(records.PREVIEW, "1")
    assert page(tmp_path).cells[0].source == "# Title"
    assert "A preview: this page shows the committed records" in page(tmp_path).cells[1].source
    assert of_page() != before


def test_a_preview_is_of_the_whole_book():
    done = CliRunner().invoke(main, ["run", "theory", "--preview"])
    assert done.exit_code == 2
    assert "--preview belong to the book" in done.output
