"""Pages that read records start without what only measurements need."""

import ast
import json
import subprocess
import sys

import nbformat

from moeits.machine.paths import NOTEBOOKS

HEAVY = {"torch", "transformers", "datasets", "lm_eval"}

LOAD_MODELS = {"laboratory", "own-machine", "surgery", "theory"}
"""Notebooks that read models or their settings themselves."""

IMPORTS = """
import json, sys
for name, source in json.loads(sys.stdin.read()).items():
    exec(source, {})
    if found := {heavy} & sys.modules.keys():
        sys.exit(f"{name} imports {sorted(found)}")
"""


def imports(notebook):
    """The lines of a notebook's code, outside of functions, that import."""
    cells = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    lines = [line for source in cells for line in ast.parse(source).body]
    return "\n".join(ast.unparse(line) for line in lines if isinstance(line, ast.Import | ast.ImportFrom))


def started(sources):
    code = IMPORTS.replace("{heavy}", repr(HEAVY))
    return subprocess.run(
        [sys.executable, "-c", code], input=json.dumps(sources), capture_output=True, text=True, check=False
    )


def test_pages_that_read_records_import_neither_torch_nor_what_evaluates():
    paths = {path.stem: path for path in sorted(NOTEBOOKS.glob("*.ipynb"))}
    assert paths.keys() >= LOAD_MODELS
    read = {name: nbformat.read(path, as_version=4) for name, path in paths.items()}
    sources = {name: imports(notebook) for name, notebook in read.items() if name not in LOAD_MODELS}
    assert all(sources.values())
    done = started(sources)
    assert done.returncode == 0, done.stderr
    assert started({"sample": "from moeits.study import trained"}).stderr.startswith("sample imports")
