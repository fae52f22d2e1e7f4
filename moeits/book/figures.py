"""Figures, tables and numbers for the book: one style, one way to save each.

A figure is four files: ``fig-NAME.svg``, ``.pdf``, ``.csv`` (what it draws) and ``.json`` (caption, alt text,
records used). A table is ``tab-NAME.csv`` and ``.json``. They go to the folder that ``MOEITS_FIGURES`` names,
which :class:`moeits.book.run.Page` sets for each page; in a notebook run by hand they go to
``data/figures/by-hand``. One notebook may make several pages: ``MOEITS_VARIANT`` then ends every label.
"""

import io
import json
import os
import re
from collections.abc import Iterable, Mapping
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import pandas as pd
from IPython import get_ipython
from IPython.display import display
from matplotlib.figure import Figure

from moeits.errors import MoeitsError
from moeits.machine.paths import DATA, whole

# Okabe and Ito's colours, told apart by every common kind of colour vision (https://jfly.uni-koeln.de/color/).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
SHORTEST_ALT = 20  # characters

# Sized for a page 5.6 inches wide: ten points in print, still nine pixels on a phone. Text becomes outlines,
# so that a page looks the same where the fonts are missing. The salt keeps the bytes the same.
STYLE: dict[str, Any] = {
    "figure.figsize": (5.6, 3.5),
    "figure.constrained_layout.use": True,
    "figure.facecolor": "white",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 10,
    "axes.labelsize": 10,
    "axes.titlesize": 10,
    "axes.prop_cycle": mpl.cycler(color=COLOURS) + mpl.cycler(marker=MARKERS),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "errorbar.capsize": 3,
    "image.cmap": "cividis",
    "image.interpolation": "nearest",
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "savefig.facecolor": "white",
    "savefig.dpi": 200,  # of what is not drawn by lines, such as a heat map
    "svg.fonttype": "path",
    "svg.hashsalt": "moeits",
    "pdf.fonttype": 42,
}


def style() -> None:
    """Set the project's style for all figures that follow; a notebook calls it once, after its imports."""
    mpl.rcParams.update(STYLE)


def folder() -> Path:
    """Folder that figures and tables go to: ``MOEITS_FIGURES``, else ``data/figures/by-hand``."""
    return Path(os.environ.get("MOEITS_FIGURES") or DATA / "figures" / "by-hand")


def label(kind: str, name: str) -> str:
    """Label by which pages refer to a figure or a table.

    Parameters
    ----------
    kind : {"fig", "tab"}
        Figure or table.
    name : str
        Lower-case words joined by hyphens, unique in the book.

    Returns
    -------
    str
        ``fig-NAME``, or ``fig-NAME-VARIANT`` where the notebook makes several pages.

    Raises
    ------
    MoeitsError
        If the name has another form.
    """
    if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name) or name.startswith(("fig-", "tab-")):
        raise MoeitsError(
            f"name {name!r}: give lower-case words joined by hyphens, without 'fig-', such as 'nmi-heatmap'"
        )
    return "-".join(filter(None, (kind, name, os.environ.get("MOEITS_VARIANT"))))


def save(
    fig: Figure,
    name: str,
    *,
    caption: str,
    alt: str,
    data: pd.DataFrame,
    records: Iterable[Any] = (),
) -> None:
    """Save a figure with what it draws and where that comes from, show it, and close it.

    The same figure gives the same bytes.

    Parameters
    ----------
    fig : matplotlib.figure.Figure
        The figure.
    name : str
        Lower-case words joined by hyphens, unique in the book; pages refer to ``fig-NAME``.
    caption : str
        Printed below the figure; MyST Markdown, so it may cite.
    alt : str
        What a reader who does not see the figure must know: its finding. At least 20 characters.
    data : pandas.DataFrame
        The numbers that are drawn. A named index is written too.
    records : iterable of str or Record
        Ids of the records that the numbers come from, or the records.

    Raises
    ------
    MoeitsError
        If caption, alt text or data are missing, or this notebook has already saved a figure of that name.
    """
    figure_label = label("fig", name)
    alt = _line(alt)
    if len(alt) < SHORTEST_ALT:
        raise MoeitsError(
            f"{figure_label}: alt text {alt!r} is too short; tell the figure's finding in at least "
            f"{SHORTEST_ALT} characters"
        )
    side = _side(figure_label, caption, data, records, ("svg", "pdf", "csv")) | {"alt": alt}
    images = {}
    with mpl.rc_context({key: STYLE[key] for key in ("svg.fonttype", "svg.hashsalt", "pdf.fonttype")}):
        for kind, date in (("svg", "Date"), ("pdf", "CreationDate")):
            image = io.BytesIO()
            fig.savefig(image, format=kind, metadata={date: None})
            images[kind] = image.getvalue()
    plt.close(fig)  # or the notebook would show it a second time
    _write(side, {**images, "csv": _csv(data)})
    _show({"image/svg+xml": images["svg"].decode(), "text/plain": f"{figure_label}: {side['caption']}"}, side)


def table(
    data: pd.DataFrame,
    name: str,
    *,
    caption: str,
    formats: Mapping[str, str] | None = None,
    records: Iterable[Any] = (),
    empty: str = "",
) -> None:
    """Save a table with where its numbers come from, and show it.

    The file holds the numbers as they are; what is shown is rounded.

    Parameters
    ----------
    data : pandas.DataFrame
        The table; column names are its headings. A named index becomes the first columns.
    name : str
        Lower-case words joined by hyphens, unique in the book; pages refer to ``tab-NAME``.
    caption : str
        Printed above the table; MyST Markdown.
    formats : mapping of str to str, optional
        Column -> format specification of its numbers, such as ``".1%"``. Other floats show four digits.
    records : iterable of str or Record
        Ids of the records that the numbers come from, or the records.
    empty : str
        What stands in place of a table that may have no rows.

    Raises
    ------
    MoeitsError
        If caption or data are missing, a format names no column, or this notebook has already saved a table
        of that name.
    """
    table_label = label("tab", name)
    if data.empty and empty:
        data, formats = pd.DataFrame({"result": [empty]}), {}
    side = _side(table_label, caption, data, records, ("csv",))
    shown = data.reset_index() if _named(data.index) else data
    formats = dict(formats or {})
    if unknown := formats.keys() - set(shown.columns):
        raise MoeitsError(f"{table_label}: formats for {sorted(unknown)}, columns are {list(shown.columns)}")
    numeric = [pd.api.types.is_numeric_dtype(dtype) for dtype in shown.dtypes]
    cells = [
        [_cell(value, formats.get(column, "")) for column, value in zip(shown.columns, row, strict=True)]
        for row in shown.itertuples(index=False, name=None)
    ]
    heading = [_cell(column, "") for column in shown.columns]
    rule = ["---:" if number else ":---" for number in numeric]
    markdown = "".join(f"| {' | '.join(line)} |\n" for line in (heading, rule, *cells))
    html = pd.DataFrame(cells, columns=list(shown.columns)).to_html(index=False, border=0)
    _write(side, {"csv": _csv(data)})
    _show({"text/html": html, "text/markdown": markdown, "text/plain": markdown}, side)


def glue(name: str, value: Any) -> None:
    """Give a number or a short text a name, by which the pages' prose shows it.

    The role ``glue:text`` takes ``NAME:.2f`` in the same notebook, ``notebooks/PAGE.ipynb::NAME:.2f`` on any
    other page. What follows the last colon is the format, which other pages must give.

    Parameters
    ----------
    name : str
        A Python name, unique in the notebook.
    value : int, float, str or NumPy scalar
        The value.
    """
    if not name.isidentifier():
        raise MoeitsError(f"glue {name!r}: give a Python name, such as 'kept_share'")
    value = value.item() if hasattr(value, "item") else value
    if not isinstance(value, int | float | str):
        raise MoeitsError(f"glue {name!r}: {type(value).__name__} is not a number or a text")
    if get_ipython() is not None:
        # what myst_nb.glue does, which would load Sphinx into every notebook
        prefix = "application/papermill.record/"
        display(
            {f"{prefix}text/plain": repr(value)},
            raw=True,
            metadata={"scrapbook": {"name": name, "mime_prefix": prefix}},
        )


def _line(text: str) -> str:
    return " ".join(text.split())


def _named(index: pd.Index) -> bool:
    return any(name is not None for name in index.names)


def _csv(data: pd.DataFrame) -> bytes:
    return data.to_csv(index=_named(data.index), lineterminator="\n").encode()


def _cell(value: Any, form: str) -> str:
    if not isinstance(value, str) and pd.isna(value):
        return "–"
    if isinstance(value, Real) and (form or not isinstance(value, Integral)):
        value = format(value, form or ".4g")
    return _line(str(value)).replace("|", "\\|")


def _side(
    label: str, caption: str, data: pd.DataFrame, records: Iterable[Any], files: tuple[str, ...]
) -> dict[str, Any]:
    if not caption.strip():
        raise MoeitsError(f"{label}: no caption; say what is shown, with units and n")
    if data.empty:
        raise MoeitsError(f"{label}: no data; give the numbers that are shown as a DataFrame")
    if isinstance(records, str):
        raise MoeitsError(f"{label}: records is one string; give a list of ids")
    return {
        "label": label,
        "caption": _line(caption),
        "records": sorted({str(getattr(record, "id", record)) for record in records}),
        "files": [f"{label}.{kind}" for kind in files],
    }


def _write(side: dict[str, Any], files: Mapping[str, bytes]) -> None:
    """Write the files of a figure or table; in a run of the book none may be there already."""
    target = folder()
    made = target / f"{side['label']}.json"
    if os.environ.get("MOEITS_FIGURES") and made.exists():
        raise MoeitsError(f"{side['label']} is already saved in this notebook: give this one another name")
    content = {**files, "json": (json.dumps(side, indent=1, ensure_ascii=False) + "\n").encode()}
    for kind, data in content.items():
        with whole(target / f"{side['label']}.{kind}") as part:
            part.write_bytes(data)


def _show(bundle: dict[str, str], side: dict[str, Any]) -> None:
    if get_ipython() is not None:
        display(bundle, raw=True, metadata={"moeits": side})
