"""Committed notebooks are stripped, declare their parameters, and do not depend on where they run."""

import json
import re

import nbformat
import pytest

from moeits.book.run import inspect
from moeits.machine.paths import NOTEBOOKS

# In prose: links and images that are neither on the web nor anchors, documents not by their full name.
PROSE_LINK = re.compile(
    r"""\]\((?!https?:|mailto:|#)[^)]*\)|<(?:img|a)\b[^>]*(?:src|href)=["'](?!https?:|#)"""
)
PROSE_ROLE = re.compile(r"\{(?:doc|download)\}`(?:[^`<]*<)?(?!/)[^`>]+>?`")
# In code: text that begins like a path.
CODE_PATH = re.compile(r"""["'](?:\.{1,2}/|~/|/\w)""")


def findings(text):
    """What is wrong with a committed notebook, as sentences."""
    raw = json.loads(text)
    if (raw.get("nbformat"), raw.get("nbformat_minor")) != (4, 5):
        return ["is not of nbformat 4.5, which has cell ids"]
    ids = [cell["id"] for cell in raw["cells"]]
    if len(set(ids)) != len(ids):
        return ["has a cell id twice"]
    try:
        nbformat.validate(raw)
    except nbformat.ValidationError as error:
        return [f"is not valid: {error.message}"]
    found = []
    if extra := raw["metadata"].keys() - {"kernelspec", "language_info"}:
        found.append(f"has metadata {sorted(extra)}")
    if raw["metadata"].get("kernelspec", {}).get("name") != "python3":
        found.append("names another kernel than python3")
    if "version" in raw["metadata"].get("language_info", {}):
        found.append("names the version of Python that last ran it")
    notebook = nbformat.reads(text, as_version=4)
    first = notebook.cells[0]
    if first.cell_type != "markdown" or not re.match(r"# \S", first.source):
        found.append("does not begin with a title")
    headings = [
        line for cell in notebook.cells if cell.cell_type == "markdown" for line in cell.source.splitlines()
    ]
    if sum(bool(re.match(r"# ", line)) for line in headings) != 1:
        found.append("has more than one first heading")
    for cell in notebook.cells:
        where = f"cell {cell.id!r}"
        if extra := cell.metadata.keys() - {"tags", "mystnb"}:
            found.append(f"{where} has metadata {sorted(extra)}")
        if re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4,12})*", cell.id):
            found.append(f"{where} has a random id: give it a name")
        if cell.cell_type == "code":
            if cell.outputs or cell.execution_count is not None:
                found.append(f"{where} has outputs: run `make format`")
            links = CODE_PATH.findall(cell.source)
        else:
            links = PROSE_LINK.findall(cell.source) + PROSE_ROLE.findall(cell.source)
        found += [f"{where} names a file by a path: {link}" for link in links]
    try:
        if not inspect(notebook):
            found.append("has no cell tagged 'parameters'")
    except ValueError as error:
        found.append(str(error))
    return found


def test_committed_notebooks_are_in_form():
    paths = sorted(NOTEBOOKS.glob("**/*.ipynb"))
    assert paths
    assert {path.name: found for path in paths if (found := findings(path.read_text()))} == {}


LONGEST_CELL = 25  # lines


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda p: p.stem)
def test_page_has_goals_takeaways_and_short_cells(path):
    cells = nbformat.read(path, as_version=4).cells
    prose = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    opening = prose.partition("\n## ")[0]
    for word in ("*Goals*:", "*Prerequisites*:", "*Reading*:", "*Run time*:"):
        assert word in opening
    takeaways = cells[-1].source.partition("```{admonition} Takeaways\n")[2]
    assert len(re.findall(r"^[1-3]\. .+[.]$", takeaways, re.M)) == 3
    lengths = {cell.id: len(cell.source.splitlines()) for cell in cells if cell.cell_type == "code"}
    assert {name: lines for name, lines in lengths.items() if lines > LONGEST_CELL} == {}


@pytest.fixture
def notebook():
    """A notebook in form, as JSON."""
    cells = [
        nbformat.v4.new_markdown_cell(
            "# Title\n\nSee {doc}`/method` and [arXiv](https://arxiv.org).", id="title"
        ),
        nbformat.v4.new_code_cell(
            "tau: float = 1.25  # threshold", id="parameters", metadata={"tags": ["parameters"]}
        ),
        nbformat.v4.new_code_cell("share = 1 / 2  # of 'a/b'", id="share"),
    ]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return json.loads(nbformat.writes(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel})))


def test_notebook_in_form_has_no_findings(notebook):
    assert findings(json.dumps(notebook)) == []


OUTPUT = {"output_type": "stream", "name": "stdout", "text": "x"}
SECOND = ("cells", 2)


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        ((*SECOND, "outputs"), [OUTPUT], "cell 'share' has outputs"),
        ((*SECOND, "execution_count"), 3, "cell 'share' has outputs"),
        ((*SECOND, "metadata"), {"execution": {}}, "cell 'share' has metadata"),
        ((*SECOND, "id"), "title", "id twice"),
        ((*SECOND, "id"), "3f2a9c1e", "random id"),
        ((*SECOND, "id"), "no good id", "is not valid"),
        ((*SECOND, "source"), "open('../data/x.csv')", "names a file by a path: '../"),
        ((*SECOND, "source"), "open('/home/me/x.csv')", "names a file by a path: '/h"),
        ((*SECOND, "source"), 'open("~/x.csv")', 'names a file by a path: "~/'),
        (("cells", 0, "source"), "# T\n\n[a](../method.md)", "names a file by a path: ](../method.md)"),
        (("cells", 0, "source"), "# T\n\n![a](a.png)", "names a file by a path: ](a.png)"),
        (("cells", 0, "source"), "# T\n\n{doc}`method`", "names a file by a path: {doc}`method`"),
        (("cells", 0, "source"), "# T\n\n{doc}`m <../method>`", "names a file by a path"),
        (("cells", 0, "source"), "# T\n\n# U", "more than one first heading"),
        (("cells", 0, "source"), "T", "does not begin with a title"),
        (("cells", 1, "metadata"), {}, "has no cell tagged 'parameters'"),
        (("cells", 1, "source"), "tau = 1.25", "write `name: type = default"),
        (("cells", 1, "source"), "tau: float = 1.25", "needs a comment"),
        (("metadata", "widgets"), {}, "has metadata ['widgets']"),
        (("metadata", "kernelspec", "name"), "julia", "another kernel"),
        (("metadata", "language_info"), {"name": "python", "version": "3.11.2"}, "version of Python"),
        (("nbformat_minor",), 4, "nbformat 4.5"),
    ],
)
def test_defect_is_found(notebook, path, value, says):
    *way, last = path
    place = notebook
    for key in way:
        place = place[key]
    place[last] = value
    found = findings(json.dumps(notebook))
    assert any(says in finding for finding in found), found
