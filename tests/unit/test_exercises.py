"""The solutions pass the checks, the unsolved exercises do not, and neither do plausible mistakes."""

import nbformat
import numpy as np
import pytest

from moeits.book import exercises
from moeits.machine.paths import NOTEBOOKS


def answers(name):
    """Names and functions of a notebook of exercises, from its code cells in order."""
    scope = {}
    for cell in nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4).cells:
        if cell.cell_type == "code" and not cell.id.endswith("-check"):
            exec(cell.source, scope)
    return {name: scope[name] for name in exercises.EXERCISES}


@pytest.mark.parametrize("name", exercises.EXERCISES)
def test_the_solution_is_right(name, capsys):
    assert exercises.check(name, answers("solutions")[name]), capsys.readouterr().out
    assert capsys.readouterr().out == f"{name}: right\n"


@pytest.mark.parametrize("name", exercises.EXERCISES)
def test_the_unsolved_exercise_is_not_yet_right(name, capsys):
    assert not exercises.check(name, answers("exercises")[name])
    assert f"{name}: not yet." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "answer", "says"),
    [
        ("entropy", lambda counts: -sum(c * np.log2(c) for c in counts if c), r"counts [1, 1] it returns"),
        ("entropy", lambda _: 1 / 0, "raised ZeroDivisionError"),
        ("weights", lambda *_: np.ones(6) / 6, "it returns"),
        ("selection", lambda R, _: range(len(R)), "it keeps"),
        ("correction", lambda *_: 0.0, "the correction is too large"),
        ("disguise", lambda block: block, "does not compute"),
        ("lead", lambda *_: 0.0, "expected"),
        ("budget", lambda *_: 1.0, "is possible"),
        ("refit", lambda hidden, wanted, *_: np.linalg.lstsq(hidden, wanted)[0], "With a penalty of 5"),
        ("refit", lambda *_: None, "expected an array"),
        ("overlap", lambda first, second, experts: first * second / experts**2, "it returns"),
        ("payback", lambda seconds, before, after: seconds / (1 / before - 1 / after), "raised ZeroDivision"),
        ("payback", lambda seconds, before, after: seconds * (after - before), "expected 1000"),
    ],
)
def test_a_mistake_is_told(name, answer, says, capsys):
    assert not exercises.check(name, answer)
    assert says in capsys.readouterr().out


def test_an_unknown_exercise_names_the_known_ones():
    with pytest.raises(ValueError, match="no exercise 'x': there are entropy"):
        exercises.check("x", len)
