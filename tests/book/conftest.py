"""A small book of the tests' own, and the project's in the smoke profile."""

import os
import shutil
import subprocess
import sys

import pytest
from checks import BuiltBook
from sample import sample_book

from moeits.book import run
from moeits.machine.paths import BOOK, DATA, NOTEBOOKS, ROOT


@pytest.fixture(scope="session")
def sample(tmp_path_factory):
    """The sample book, built once. Do not change it."""
    folder = tmp_path_factory.mktemp("sample")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "CACHE", folder / "cache")
        patch.setenv("MOEITS_REPOSITORY", "https://github.com/someone/moeits-fork")
        html = sample_book(folder)
    return BuiltBook(html, folder / "book", folder / "results")


class SmokeBook(BuiltBook):
    """The project's own book, all its notebooks run in the smoke profile, in a project folder of its own.

    Attributes
    ----------
    said : list of str
        The lines that the run printed.
    """

    def __init__(self, root):
        self.root = root
        (root / "data").mkdir()
        for place in (ROOT / "moeits", NOTEBOOKS, *ROOT.glob("*.lock"), *DATA.iterdir()):
            if place.name not in ("results", "figures"):
                (root / place.relative_to(ROOT)).symlink_to(place)
        shutil.copytree(BOOK, root / "book", ignore=shutil.ignore_patterns("_build", "notebooks"))
        self.said = self.run()
        super().__init__(root / "book" / "_build" / "html", root / "book", root / "data")

    def run(self, *options):
        """Run the profile, and return the lines that it printed."""
        places = {"MOEITS_ROOT": str(self.root), "MOEITS_CACHE": str(self.root / ".cache")}
        environment = os.environ | places | {"MOEITS_REPOSITORY": "https://github.com/someone/moeits-fork"}
        command = [sys.executable, "-m", "moeits", "run", "--profile", "smoke", *options]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()


@pytest.fixture(scope="session")
def smoke(tmp_path_factory):
    """The project's own book in the smoke profile, made once."""
    return SmokeBook(tmp_path_factory.mktemp("smoke"))


@pytest.fixture(scope="session")
def books(sample, smoke):
    """The two books that every check must pass."""
    return [sample, smoke]
