import ast
import shutil
import sys
import threading
from pathlib import Path

import pytest
import torch
from tiny import tiny_model, tiny_tokenizer, tokens

from moeits.healing.recipe import Recipe
from moeits.machine import keys, paths
from moeits.study import comparison, pipeline, profiles
from moeits.study.comparison import Comparison

SMALL = {
    "__init__": "",
    "a": """
        from typing import TYPE_CHECKING
        from moeits import b, registry
        from moeits.b import Thing as Other
        from moeits.machine.keys import by_value

        if TYPE_CHECKING:
            from moeits.types import Given

        LIMIT = 3

        def start(given: "Given"):
            from moeits import lazy
            return lazy.late(Other().used(), LIMIT, known(), given.asked()) + b.function()

        @by_value
        def known():
            return unreached()

        def unreached():
            return 1
        """,
    "b": """
        class Base:
            def __init__(self):
                self.value = SIZE
            def inherited(self):
                return 2

        class Thing(Base):
            def used(self):
                return self.inherited()
            def unused(self):
                return 4

        SIZE = 5

        def function():
            return 6

        def other():
            return 7
        """,
    "lazy": "def late(*given):\n    return ['-m', 'moeits.run']\n",
    "run": "def body():\n    return 8\n\nif __name__ == '__main__':\n    body()\n",
    "registry": "def register(it):\n    return it\n\n@register\ndef handler():\n    return 9\n",
    "types": """
        import torch

        class Given:
            def asked(self):
                return 10
            def ignored(self):
                return 11

        class Module(torch.nn.Module):
            def forward(self):
                return 12
        """,
    "machine/__init__": "",
    "machine/keys": "def by_value(function):\n    return function\n",
}


def write(folder, files):
    for name, text in files.items():
        file = folder / f"{name}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        lines = text.splitlines()
        indent = min((len(line) - len(line.lstrip()) for line in lines if line.strip()), default=0)
        file.write_text("\n".join(line[indent:] for line in lines) + "\n")
    return folder


def test_what_a_function_names_is_reached(tmp_path):
    found = keys.reached(("moeits.a:start",), write(tmp_path / "moeits", SMALL))
    assert set(found) == {
        *("moeits.a:start", "moeits.a:LIMIT"),
        *("moeits.b:Base", "moeits.b:Base.__init__", "moeits.b:Base.inherited"),
        *("moeits.b:Thing", "moeits.b:Thing.used", "moeits.b:SIZE", "moeits.b:function"),
        *("moeits.lazy:late", "moeits.run", "moeits.run:body"),
        *("moeits.registry", "moeits.registry:register"),
        *("moeits.types:Given", "moeits.types:Given.asked"),
    }


def test_a_function_that_does_not_exist_is_an_error(tmp_path):
    write(tmp_path / "moeits", SMALL)
    for entry in ("moeits.a:begin", "moeits.c:start"):
        with pytest.raises(LookupError, match=f"no definition {entry}"):
            keys.reached((entry,), tmp_path / "moeits")


@pytest.mark.parametrize("number", range(1, 13))
def test_an_edit_counts_where_it_is_reached(number, tmp_path):
    before = keys.reached(("moeits.a:start",), write(tmp_path / "before" / "moeits", SMALL))
    changed = {name: text.replace(f"return {number}\n", "return 0\n") for name, text in SMALL.items()}
    changed = {
        name: text.replace(f" = {number}\n", " = 0\n") if name in "ab" else text
        for name, text in changed.items()
    }
    after = keys.reached(("moeits.a:start",), write(tmp_path / "after" / "moeits", changed))
    assert (before != after) == (number in (2, 3, 5, 6, 8, 9, 10))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "tiny"
    tiny_model("qwen2_moe").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def compared(model, tmp_path, monkeypatch):
    """A comparison of which everything that its measurements build on is there."""
    for module in (pipeline, comparison, paths):
        monkeypatch.setattr(module, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(pipeline, "DATA", tmp_path / "data")
    monkeypatch.setattr("moeits.models.checkpoint.CACHE", tmp_path / "cache")
    settings = profiles.load("laptop").models["mini-qwen"].model_copy(update={"source": str(model)})
    recipe = Recipe(preset="paper", steps=1, batch_size=1, accumulation=1, max_tokens=16, rank=2)
    profile = profiles.load(
        "laptop",
        models={"tiny": settings.model_dump()},
        healing=recipe.model_dump(),
        refit_tokens=64,
        calibration_tokens=512,
        dtype="float32",
        device="cpu",
    )
    texts = tokens(batch=4, length=16)
    monkeypatch.setattr("moeits.corpus.blocks", lambda *_, **__: texts.numpy())
    monkeypatch.setattr("moeits.healing.lora.examples", lambda *_: list(torch.unbind(texts)))
    compared = Comparison(profile, "tiny")
    _ = compared.counts, compared.statistics("calibration"), compared.study.fingerprint
    return compared


STEPS = {
    "NMI": lambda of: of.study._nmi,
    "scores": lambda of: of.study._scores(1.25, tasks=[]),
    "refit and healing": lambda of: of.study._healing(1.25, "refit + lora"),
    "statistics": lambda of: of._statistics("calibration"),
    "frequency": lambda of: of._cell("frequency", 0.5),
    "MoEITS": lambda of: of._cell("moeits", 0.5),
    "low rank": lambda of: of._cell("moe-i2-low-rank", 0.5),
    "STUN": lambda of: of._cell("stun-sparse", "own"),
}


def by_value():
    """Names of the functions whose results are in the keys."""
    found = set()
    for module, file in keys._files(keys.PACKAGE).items():
        for node in ast.parse(file.read_text()).body:
            owner = f"{node.name}." if isinstance(node, ast.ClassDef) else ""
            parts = node.body if owner else [node]
            found |= {f"{module}:{owner}{part.name}" for part in parts if keys._is_by_value(part)}
    return found


class Watch:
    """Notes the functions of the package that run, but for what runs inside of those that are by value."""

    def __init__(self):
        self.ran, self.inside, self.aside = set(), None, by_value()

    def __call__(self, frame, event, _):
        code = frame.f_code
        if event == "return" and frame is self.inside:
            self.inside = None
        elif event == "call" and self.inside is None and code.co_filename.startswith(str(keys.PACKAGE)):
            file = Path(code.co_filename).relative_to(keys.PACKAGE.parent).with_suffix("")
            function = code.co_qualname.partition(".<locals>")[0]
            name = f"{'.'.join(file.parts).removesuffix('.__init__')}:{function}"
            if name in self.aside:
                self.inside = frame
            elif "<" not in function:
                self.ran.add(name)


@pytest.mark.parametrize("step", STEPS)
def test_everything_that_runs_is_in_the_key(compared, step):
    measurement = STEPS[step](compared)
    names = [name for of in (measurement.measure, *measurement.code) for name in keys._names(of)]
    known = keys.reached(tuple(names))
    watch = Watch()
    threading.setprofile(watch)
    sys.setprofile(watch)
    try:
        measurement.measure()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    # The settings are in the question, one by one.
    missing = {name for name in watch.ran - known.keys() if not name.startswith("moeits.study.profiles:")}
    assert not missing
    assert len(watch.ran) > 10


def test_comments_docstrings_and_layout_do_not_count(tmp_path):
    names = ("moeits.models.checkpoint:measure_nmi", "moeits.study.pipeline:Study._heal")
    before = keys.reached(names)
    copy = tmp_path / "moeits"
    shutil.copytree(keys.PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    for file in copy.rglob("*.py"):
        tree = ast.parse(file.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node):
                node.body[0].value.value = "Another docstring."
        file.write_text(f"# A comment.\n{ast.unparse(tree)}\n")
    assert keys.reached(names, copy) == before


@pytest.mark.parametrize(
    "module", ["histograms", "nmi", "models/checkpoint", "models/safetensors", "models/families"]
)
def test_an_edit_of_any_module_that_the_nmi_reaches_changes_its_key(tmp_path, module):
    names = ("moeits.models.checkpoint:measure_nmi",)
    copy = tmp_path / "moeits"
    shutil.copytree(keys.PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    assert keys.reached(names, copy) == keys.reached(names)
    file = copy / f"{module}.py"
    reached = {
        name.partition(":")[2].partition(".")[0]
        for name in keys.reached(names)
        if name.startswith(f"moeits.{module.replace('/', '.')}:")
    }
    tree = ast.parse(file.read_text())
    function = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in reached)
    function.body.append(ast.parse("print()").body[0])
    file.write_text(ast.unparse(tree))
    keys._module.cache_clear()
    assert keys.reached(names, copy) != keys.reached(names)
