"""A two-page book for the tests: one notebook page and one page of prose, on the project's own skeleton."""

import shutil
from pathlib import Path

import nbformat

from moeits.book.run import Page, build_book
from moeits.machine.paths import BOOK
from moeits.study import records

CELLS = [
    (
        "md",
        "title",
        "# Sample of {{ model }}\n\nThe share is {glue:text}`kept_share:.1%`, see {numref}`fig-line`.",
    ),
    (
        "code",
        "parameters",
        'model: str = "smol-qwen"  # name of the model\n'
        "tau: float | None = None  # None is the profile's own\n"
        "points: int = 5  # points of the curve",
    ),
    (
        "code",
        "imports",
        "import matplotlib.pyplot as plt\nimport numpy as np\nimport pandas as pd\n\n"
        "from moeits.book import figures\n\nfigures.style()",
    ),
    (
        "code",
        "figure",
        "curve = pd.DataFrame({'tau': np.linspace(0.5, 2.5, points)})\n"
        "curve['share'] = curve['tau'] / 3\n"
        "fig, ax = plt.subplots()\n"
        "ax.errorbar(curve['tau'], curve['share'], yerr=0.05, label='share kept')\n"
        "ax.plot(curve['tau'], 1 - curve['share'], label='share removed')\n"
        "ax.set(xlabel=r'$\\tau$', ylabel='share of experts')\n"
        "ax.legend()\n"
        "figures.save(\n"
        "    fig,\n"
        "    'line',\n"
        "    caption='The share of experts kept grows with $\\\\tau$; n = 5.',\n"
        "    alt='A line that rises from one sixth at tau 0.5 to five sixths at tau 2.5.',\n"
        "    data=curve,\n"
        "    records=['RECORD'],\n)",
    ),
    (
        "code",
        "table",
        "figures.table(\n    curve, 'curve', caption='The share kept.', formats={'share': '.1%'}\n)\n"
        "figures.glue('kept_share', curve['share'].mean())",
    ),
    ("code", "print", "print(len(curve), 'points')"),
]
PROSE = """# Start

Half of {numref}`fig-line-two`, {numref}`tab-curve-two`,
{glue:text}`notebooks/sample-two.ipynb::kept_share:.3f`.

:::{admonition} What NMI is
:class: note

{cite:t}`balderas2026moeits` define, as {eq}`eq-nmi`,

$$
\\mathrm{NMI}(X, Y) = \\frac{I(X; Y)}{\\sqrt{H(X)\\,H(Y)}}, \\qquad \\boldsymbol{R} \\in [0, 1]^{E \\times E}
$$ (eq-nmi)

:::

The threshold is $\\rho = \\bar R + \\tau\\,\\mathrm{IQR}(R)$.

```{bibliography}
```
"""


def notebook(record: str) -> nbformat.NotebookNode:
    """The sample notebook, which names one record."""
    cells = []
    for kind, name, source in CELLS:
        new = nbformat.v4.new_markdown_cell if kind == "md" else nbformat.v4.new_code_cell
        cells.append(new(source.replace("RECORD", record), id=name))
        if name == "parameters":
            cells[-1].metadata["tags"] = ["parameters"]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel})


def write_record(folder: Path) -> str:
    """Write one record that took 12.5 s and return its id."""
    record = records.Record(
        "scores", {"seed": 0}, [records.row(metric="acc", value=0.5)], {}, {"seconds": 12.5}
    )
    records.write(folder, record)
    return record.id


def skeleton(folder: Path, pages: dict[str, str]) -> Path:
    """A book with the project's configuration and these pages beside ``notebooks/sample-two``."""
    names = ("_config.yml", "_ext", "_static", "_vendor", "references.bib")
    folder.mkdir(parents=True)
    for name in names:
        source = BOOK / name
        copy = shutil.copytree if source.is_dir() else shutil.copy
        copy(source, folder / name)
    for name, text in pages.items():
        (folder / f"{name}.md").write_text(text)
    rest = "".join(f"  - file: {name}\n" for name in [*list(pages)[1:], "notebooks/sample-two"])
    (folder / "_toc.yml").write_text(f"format: jb-book\nroot: {next(iter(pages))}\nchapters:\n{rest}")
    return folder


def sample_book(folder: Path) -> Path:
    """Run the sample notebook, render the book in `folder`, and return its folder of HTML."""
    notebooks, results = folder / "notebooks", folder / "results"
    notebooks.mkdir(parents=True)
    nbformat.write(notebook(write_record(results)), notebooks / "sample.ipynb")
    book = skeleton(folder / "book", {"index": PROSE})
    Page(
        "sample",
        target="sample-two",
        parameters={"points": 4},
        notebooks=notebooks,
        pages=book / "notebooks",
        figures=folder / "figures",
        records=results,
    ).run()
    return build_book(book).parent
