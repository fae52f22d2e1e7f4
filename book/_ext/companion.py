"""What this book adds to Jupyter Book: MathJax from its own folder, launch buttons that find the notebook."""

import ast
import os
import re
import subprocess
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx
from sphinx.config import Config


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


def setup(app: Sphinx) -> dict[str, Any]:
    """Connect to Sphinx."""
    app.connect("config-inited", configure)
    app.connect("html-page-context", launch_committed, priority=600)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
