import ast
from pathlib import Path

import pytest
from click.testing import CliRunner

import moeits
from moeits.cli import main
from moeits.errors import BudgetError, ExistsError, MissingError, MoeitsError, PlaceError
from moeits.kept import Kept

BUILT_IN = {"ValueError", "OSError", "FileNotFoundError", "FileExistsError", "PermissionError"}
# A subprocess of the costs died: there is a traceback in the message.
BUGS = {"study/cost.py"}


def raised(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            yield ast.unparse(node.exc.func)


def test_bad_input_has_errors_of_its_own():
    folder = Path(moeits.__file__).parent
    for file in folder.rglob("*.py"):
        if file.relative_to(folder).as_posix() not in BUGS:
            assert not BUILT_IN & set(raised(file)), file


@pytest.mark.parametrize("kind", [BudgetError, ExistsError, MissingError, PlaceError])
def test_each_is_caught_as_what_python_calls_it(kind):
    error = kind("what, where and how to fix it")
    assert isinstance(error, MoeitsError)
    assert isinstance(error, ValueError)
    assert str(error) == "what, where and how to fix it"


def test_bad_input_is_one_line_and_debug_shows_where(tmp_path):
    arguments = ["size", str(tmp_path)]
    short = CliRunner().invoke(main, arguments)
    assert short.output == f"Error: {tmp_path} is no model folder: it has no config.json\n"
    assert isinstance(short.exception, SystemExit)
    long = CliRunner().invoke(main, [*arguments, "--debug"])
    assert isinstance(long.exception, MissingError)


@pytest.mark.parametrize("kind", [ValueError, OSError])
def test_a_bug_is_no_bad_input(tmp_path, monkeypatch, kind):
    def bug(*_):
        raise kind("shapes (3,) and (4,) do not fit")

    monkeypatch.setattr(Kept, "read", bug)
    monkeypatch.setattr("moeits.models.folder.read_config", bug)
    done = CliRunner().invoke(main, ["size", str(tmp_path)])
    assert type(done.exception) is kind
    assert "Error:" not in done.output
