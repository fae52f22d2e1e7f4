"""What this book adds to Jupyter Book.

MathJax from its own folder, launch buttons that find the notebook, and a list of all figures and tables.
"""

import ast
import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.config import Config
from sphinx.util.docutils import SphinxDirective


def repository_url(folder: Path) -> str:
    """Address of the repository on the web: ``MOEITS_REPOSITORY``, else that of the git remote ``origin``."""
    address = os.environ.get("MOEITS_REPOSITORY", "")
    if not address:
        command = ["git", "-C", str(folder), "remote", "get-url", "origin"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        address = done.stdout.strip()
    found = re.fullmatch(r"(?:https://|git@)github\.com[:/]([\w.-]+/[\w.-]+?)(?:\.git)?/?", address)
    return f"https://github.com/{found[1]}" if found else ""


def configure(app: Sphinx, config: Config) -> None:
    """Add the vendored files, which Jupyter Book would otherwise load on every page as scripts."""
    config.html_static_path.append("_vendor")
    config.html_context.setdefault("default_mode", "auto")  # which the theme otherwise misses, with an error
    theme = config.html_theme_options
    theme["navbar_persistent"] = []  # the sidebar has the search field already
    theme["repository_url"] = theme.get("repository_url") or repository_url(Path(app.srcdir))
    if not theme["repository_url"]:  # nowhere to launch from
        theme["launch_buttons"] = {}


def launch_committed(
    app: Sphinx, pagename: str, _template: str, context: dict[str, Any], _doctree: Any
) -> None:
    """Point the launch buttons of a page at the committed notebook that it was made of."""
    about = app.env.metadata.get(pagename, {}).get("moeits")
    if not about:
        return
    committed = ast.literal_eval(about)["notebook"]
    for group in context.get("header_buttons", []):
        if group.get("label") == "launch-buttons":
            for button in group["buttons"]:
                button["url"] = button["url"].replace(f"{pagename}.ipynb", f"notebooks/{committed}")


class _Shown(SphinxDirective):
    """What both directives know: where the side file of a figure or table lies."""

    required_arguments = 1

    def notebook(self, page: str) -> dict[str, Any]:
        """Read an executed page."""
        return json.loads((Path(self.env.srcdir) / f"{page}.ipynb").read_text(encoding="utf-8"))

    def side(self, page: str, label: str) -> tuple[dict[str, Any], str]:
        """Read the side file of a page's figure or table; also give its folder, seen from this page."""
        text = "".join("".join(cell["source"]) for cell in self.notebook(page)["cells"])
        place = re.search(rf"<([^<>]*/){re.escape(label)}\.\w+>", text)[1]
        folder = (Path(self.env.srcdir) / page).parent / place
        here = Path(self.env.doc2path(self.env.docname)).parent
        return json.loads((folder / f"{label}.json").read_text(encoding="utf-8")), os.path.relpath(
            folder, here
        )


class Show(_Shown):
    """Show a figure or table of another page again, without number: ``{show} notebooks/PAGE fig-NAME``."""

    required_arguments = 2

    def run(self) -> list[nodes.Node]:
        """Write an image with its alternative text, or the rows of the table."""
        page, label = self.arguments
        side, seen = self.side(page, label)
        self.env.note_reread()
        if label.startswith("tab-"):
            texts = ["".join(cell["source"]) for cell in self.notebook(page)["cells"]]
            table = next(text for text in texts if f":name: {label}\n" in text)
            rows = [line for line in table.splitlines() if line.startswith("|")]
            shown = nodes.container()
            self.state.nested_parse(StringList(rows, source=self.env.docname), self.content_offset, shown)
            return shown.children
        return [nodes.image(uri=Path(seen, f"{label}.svg").as_posix(), alt=side["alt"])]


class AllFigures(_Shown):
    """List every figure or table of the executed pages, in the order of the contents, from their side files.

    ``{all-figures} fig`` or ``{all-figures} tab``: number, caption, label, page, files and records.
    """

    def run(self) -> list[nodes.Node]:
        """Write the entries in Markdown and have them parsed."""
        self.env.note_reread()
        lines = []
        for page in self._pages():
            for label in self.notebook(page)["metadata"].get("moeits", {}).get("labels", ()):
                if label.startswith(f"{self.arguments[0]}-"):
                    lines += self._entry(page, label)
        listed = nodes.container(classes=["moeits-list"])
        self.state.nested_parse(StringList(lines, source=self.env.docname), self.content_offset, listed)
        return [listed]

    def _pages(self) -> list[str]:
        """List the executed pages in the order of the contents."""
        toc = self.env.external_site_map
        found = toc.root and [toc.root.docname, *self._below(toc, toc.root)]
        return [page for page in found if (Path(self.env.srcdir) / f"{page}.ipynb").exists()]

    def _below(self, toc: Any, document: Any) -> list[str]:
        names = []
        for tree in document.subtrees:
            for item in tree.items:
                if item in toc:
                    names += [str(item), *self._below(toc, toc[item])]
        return names

    def _entry(self, page: str, label: str) -> list[str]:
        side, seen = self.side(page, label)
        files = " · ".join(
            f"{{download}}`{file.rpartition('.')[2].upper()} <{Path(seen, file).as_posix()}>`"
            for file in side["files"]
        )
        records = ", ".join(f"`{record}`" for record in side["records"]) or "none"
        return [
            f"{{numref}}`{label}` (`{label}`, {{doc}}`/{page}`)",
            f": {side['caption']}",
            "",
            f"  {files} · records: {records}",
            "",
        ]


def print_drawings(app: Sphinx, doctree: nodes.document, docname: str) -> None:
    """Put the PDF of every drawing into a book that LaTeX prints, which knows no SVG."""
    if app.builder.format != "latex":
        return
    drawn = {path.stem: path for path in (Path(app.srcdir).parent / "data" / "figures").glob("*/*.pdf")}
    for image in doctree.findall(nodes.image):
        names = [Path(image["uri"]).stem, *(image.parent.get("names", []) if image.parent else [])]
        if path := next((drawn[name] for name in names if name in drawn), None):
            uri = Path(os.path.relpath(path, app.srcdir)).as_posix()
            image["uri"], image["candidates"] = uri, {"*": uri}
            app.env.images.add_file(docname, uri)


def mend_roles(_app: Sphinx, _pagename: str, _template: str, context: dict[str, Any], _doctree: Any) -> None:
    """Take the role of a list from bibliographies: their entries have another role than a list's items."""
    if "body" in context:
        lists = re.compile(r"<div[^>]*citation-list[^>]*>")
        context["body"] = lists.sub(lambda tag: tag[0].replace(' role="list"', ""), context["body"])


def skip_fields(_app: Sphinx, _what: str, _name: str, obj: Any, skip: bool, _options: Any) -> bool | None:
    """Leave out what named tuples say of their fields, which the class's docstring describes."""
    return True if (obj.__doc__ or "").startswith("Alias for field number") else skip or None


def setup(app: Sphinx) -> dict[str, Any]:
    """Connect to Sphinx."""
    app.add_directive("show", Show)
    app.add_directive("all-figures", AllFigures)
    app.connect("config-inited", configure)
    app.connect("html-page-context", mend_roles)
    app.connect("doctree-resolved", print_drawings)
    app.connect("autodoc-skip-member", skip_fields)
    app.connect("html-page-context", launch_committed, priority=600)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
