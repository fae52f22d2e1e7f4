"""Make an executed notebook a page of the book.

The page is free of times and of this machine's folders. Each figure and table is numbered, captioned and can
be downloaded; labels and ``{{ names }}`` in the prose are filled in; the page ends with how it was made.
"""

import ast
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import nbformat
from nbformat import NotebookNode

from moeits.errors import MissingError, MoeitsError
from moeits.machine.keys import digest, file_digest
from moeits.machine.paths import CACHE, ROOT
from moeits.study.records import Record, environment, in_preview, locate, read

_PLACEHOLDER = re.compile(r"\{\{ (\w+) \}\}")
_PREVIEW = """:::{note}
A preview: this page shows the committed records of `data/reference` and `data/study`. Nothing was measured
for it; `make book` measures.
:::"""
_FILES = {"svg": "SVG", "pdf": "PDF", "csv": "data (CSV)"}


def make_page(
    executed: NotebookNode,
    *,
    about: Mapping[str, Any],
    given: Mapping[str, Any],
    values: Mapping[str, Any],
    variant: str,
    files: str,
    records: Path,
) -> NotebookNode:
    """Make an executed notebook a page of the book.

    Parameters
    ----------
    executed : NotebookNode
        The notebook with its outputs, which is changed.
    about : mapping
        What the page says of itself in its metadata: notebook, page, inputs, files. Added are the labels of
        its figures and tables, and the hash of each record that they name.
    given : mapping
        Parameters that were given.
    values : mapping
        All parameters; with the glued values, they are what ``{{ name }}`` in the prose stands for.
    variant : str
        What ends the labels where one notebook makes several pages, or "".
    files : str
        Folder of the figures' files, seen from the page.
    records : Path
        Folder of the records, searched with its subfolders.

    Returns
    -------
    NotebookNode

    Raises
    ------
    MoeitsError
        If the prose names an unknown value, or a figure or table a record that does not exist.
    """
    values = {"page": about["page"], **values, **_glued(executed)}
    cells, shown = [], []
    for cell in executed.cells:
        own = {key: cell.metadata[key] for key in ("tags", "mystnb") if cell.metadata.get(key)}
        cell.metadata = NotebookNode(own)
        cells.append(cell)
        if cell.cell_type != "code":
            continue
        if "injected-parameters" in cell.metadata.get("tags", ()):
            cell.id = "injected-parameters"
        marked = [output for output in cell.outputs if "moeits" in output.get("metadata", {})]
        # progress bars and warnings are for the terminal of whoever runs this, not for the page
        cell.outputs = [
            _without_folders(output)
            for output in cell.outputs
            if output not in marked and output.get("name") != "stderr"
        ]
        for output in marked:
            side = output.metadata.pop("moeits")
            shown.append(side)
            cells += [(_figure if "alt" in side else _table)(output, side), _downloads(side, files)]
    if in_preview():
        cells.insert(1, _markdown("preview", _PREVIEW))
    for cell in cells:
        if cell.cell_type == "markdown":
            cell.source = _refer(_fill(cell.source, values, about["notebook"]), shown, variant)
    used = {name: find_record(name, records) for side in shown for name in side["records"]}
    cells.append(_origin(about["notebook"], given, [read(path) for path in used.values()]))
    metadata = {key: executed.metadata[key] for key in ("kernelspec", "language_info")}
    metadata["moeits"] = {
        **about,
        "labels": [side["label"] for side in shown],
        "records": {name: file_digest(used[name]) for name in sorted(used)},
    }
    return nbformat.v4.new_notebook(cells=cells, metadata=metadata)


def find_record(record: str, folder: Path) -> Path:
    """Find the file of a record by its id.

    Raises
    ------
    MissingError
        If neither the folder, nor one in its ``study``, ``results`` or ``reference`` holds it.
    """
    path = locate(record, folder)
    if path is None:
        raise MissingError(f"a figure or table names the record {record!r}, which is not in {folder}")
    return path


def _glued(notebook: NotebookNode) -> dict[str, Any]:
    values = {}
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            if glued := output.get("metadata", {}).get("scrapbook"):
                values[glued["name"]] = ast.literal_eval(output.data[f"{glued['mime_prefix']}text/plain"])
    return values


def _fill(source: str, values: Mapping[str, Any], notebook: str) -> str:
    """Put parameters and glued values where the prose says ``{{ name }}``, in headings for example."""

    def value(match: re.Match[str]) -> str:
        if match[1] not in values:
            raise MoeitsError(
                f"{notebook}: {match[0]} in the prose is neither a parameter nor glued; "
                f"known are {', '.join(values)}"
            )
        return str(values[match[1]])

    return _PLACEHOLDER.sub(value, source)


def _refer(source: str, shown: Iterable[Mapping[str, Any]], variant: str) -> str:
    """Complete the labels of the page's own figures and tables, which the prose gives without the variant."""
    for side in shown if variant else ():
        short = re.escape(side["label"].removesuffix(f"-{variant}"))
        source = re.sub(rf"(?<=[`<#]){short}(?=[`>)])", side["label"], source)
    return source


def _id(name: str) -> str:
    """Cell id that stays the same: ids hold at most 64 characters."""
    return f"{name[:40]}-{digest(name)[:8]}"


def _markdown(name: str, source: str) -> NotebookNode:
    return nbformat.v4.new_markdown_cell(source, id=_id(name))


def _figure(output: NotebookNode, side: Mapping[str, Any]) -> NotebookNode:
    # the builder skips cells without source
    cell = nbformat.v4.new_code_cell(f"# {side['label']}", id=_id(side["label"]), outputs=[output])
    cell.metadata["tags"] = ["remove-input"]
    cell.metadata["mystnb"] = {
        "figure": {"name": side["label"], "caption": side["caption"]},
        "image": {"alt": side["alt"]},
    }
    return cell


def _table(output: NotebookNode, side: Mapping[str, Any]) -> NotebookNode:
    # the builder numbers a captioned output as a figure, so a table becomes a directive
    rows = output.data["text/markdown"]
    return _markdown(side["label"], f":::{{table}} {side['caption']}\n:name: {side['label']}\n\n{rows}:::")


def _downloads(side: Mapping[str, Any], files: str) -> NotebookNode:
    links = [f"{{download}}`{_FILES[file.rpartition('.')[2]]} <{files}/{file}>`" for file in side["files"]]
    return _markdown(f"{side['label']}-files", f":::{{div}} moeits-files\n{' · '.join(links)}\n:::")


def _without_folders(output: Any) -> Any:
    """Replace this machine's folders wherever an output shows them."""
    places = {f"{CACHE}{os.sep}": ".cache/", f"{ROOT}{os.sep}": "", str(Path.home()): "~"}
    places = {place: short for place, short in places.items() if len(Path(place).parts) > 1}
    if isinstance(output, str):
        for place in sorted(places, key=len, reverse=True):
            output = output.replace(place, places[place])
        return output
    if isinstance(output, list):
        return [_without_folders(item) for item in output]
    if isinstance(output, dict):
        return NotebookNode(
            {k: v if k.startswith("image/") else _without_folders(v) for k, v in output.items()}
        )
    return output


def _origin(notebook: str, given: Mapping[str, Any], measured: list[Record]) -> NotebookNode:
    """Tell at the end of the page how it was made.

    The time is that of the measurements, which their records keep: it is the same however often the page is
    made.
    """
    here = environment()
    commit = f"`{here['commit'][:12]}`" if here["commit"] else "not from a git repository"
    versions = {"Python": here["python"], **here["versions"]}
    seconds = sum(record.seconds for record in measured)
    machines = sorted({record.provenance.get("machine", "unknown") for record in measured})
    parameters = ", ".join(f"`{key} = {value!r}`" for key, value in given.items())
    rows = {
        "Notebook": f"`notebooks/{notebook}`",
        "Parameters": parameters or "as in the notebook",
        "Code": commit + (", with uncommitted changes" if here["dirty"] else ""),
        "Versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "Measurements": f"{len(measured)}, {seconds:.0f} s on {', '.join(machines)}" if measured else "none",
    }
    lines = [f"| {key} | {value.replace('|', chr(92) + '|')} |" for key, value in rows.items()]
    table = "\n".join(["| What | Value |", "|:---|:---|", *lines])
    return _markdown("made", f":::{{dropdown}} How this page was made\n\n{table}\n:::")
