"""A small book of the tests' own, and the project's where it is built."""

import pytest
from checks import BuiltBook
from sample import sample_book

from moeits import run
from moeits.paths import BOOK, DATA


@pytest.fixture(scope="session")
def sample(tmp_path_factory):
    """The sample book, built once. Do not change it."""
    folder = tmp_path_factory.mktemp("sample")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "CACHE", folder / "cache")
        patch.setenv("MOEITS_REPOSITORY", "https://github.com/someone/moeits-fork")
        html = sample_book(folder)
    return BuiltBook(html, folder / "book", folder / "results")


@pytest.fixture(scope="session")
def books(sample):
    """The sample book, and the project's own if `make book` has built it."""
    html = BOOK / "_build" / "html"
    own = [BuiltBook(html, BOOK, DATA)] if (html / "index.html").exists() else []
    return [sample, *own]
