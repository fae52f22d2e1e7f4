"""A small book of the tests' own, and the project's in the smoke profile."""

import shutil

import pytest
from checks import BuiltBook
from sample import sample_book

from moeits.book import run
from moeits.machine.paths import BOOK, DATA
from moeits.study import profiles


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
def smoke(tmp_path_factory):
    """The project's own book: all its notebooks run in the smoke profile. Also what that printed."""
    folder = tmp_path_factory.mktemp("smoke")
    source = folder / "book"
    shutil.copytree(BOOK, source, ignore=shutil.ignore_patterns("_build", "notebooks"))
    said = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOEITS_REPOSITORY", "https://github.com/someone/moeits-fork")
        index = run.run_profile(
            profiles.load("smoke"), book=source, figures=folder / "figures", say=said.append
        )
    book = BuiltBook(index.parent, source, DATA)
    book.said = said
    return book


@pytest.fixture(scope="session")
def books(sample, smoke):
    """The two books that every check must pass."""
    return [sample, smoke]
