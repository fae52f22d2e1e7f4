"""Notebooks run strictly, and become pages that are whole, the same each time, and free of this machine."""

import nbformat
import pytest

from moeits.book import run
from moeits.book.pages import find_record
from moeits.book.run import NotebookError, Page, Parameter, check_parameters, inspect
from moeits.machine.paths import ROOT
from moeits.study import records

PARAMETERS = (
    'model: str = "qwen"  # name\ntau: float | None = None  # threshold\ntaus: list[float] = [1.0]  # grid'
)
FIGURE = """\
import pandas as pd
from matplotlib.figure import Figure
from moeits.book import figures

for name in ("one", "two"):
    fig = Figure()
    fig.subplots().plot([0, 1])
    figures.save(fig, name, caption=f"Figure {name}.", alt=f"A rising line, number {name}.",
                 data=pd.DataFrame({"y": [0, 1]}), records=[RECORD])
figures.table(pd.DataFrame({"y": [0.25]}), "ys", caption="The ys.")
figures.glue("half", 0.5)
print("saved")
"""


def notebook(*cells):
    """Notebook of cells, each a pair of kind (md, code, parameters) and text."""
    made = []
    for number, (kind, source) in enumerate(cells):
        new = nbformat.v4.new_markdown_cell if kind == "md" else nbformat.v4.new_code_cell
        made.append(new(source, id=f"{kind}-{number}"))
        if kind == "parameters":
            made[-1].metadata["tags"] = ["parameters"]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return nbformat.v4.new_notebook(cells=made, metadata={"kernelspec": kernel})


class Desk:
    """Folders of a run, all temporary."""

    def __init__(self, folder):
        self.folders = {name: folder / name for name in ("notebooks", "pages", "figures", "records")}
        self.folders["notebooks"].mkdir()

    def write(self, *cells, name="demo"):
        nbformat.write(notebook(*cells), self.folders["notebooks"] / f"{name}.ipynb")

    def run(self, name="demo", *, force=False, **settings):
        return Page(name, **self.folders, **settings).run(force=force)

    def page(self, name="demo"):
        return nbformat.read(self.folders["pages"] / f"{name}.ipynb", as_version=4)

    def record(self):
        row = records.row(metric="acc", value=0.5)
        facts = {"seconds": 12.5, "machine": "Linux x86_64"}
        record = records.Record("scores", {"seed": 0}, [row], {}, facts)
        records.write(self.folders["records"], record)
        return record.id


@pytest.fixture
def desk(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "CACHE", tmp_path / "cache")
    return Desk(tmp_path)


def sources(page):
    return "\n".join(cell.source for cell in page.cells)


def printed(page):
    return "".join(o.get("text", "") for cell in page.cells for o in cell.get("outputs", ()))


# parameters


def test_parameters_are_read_with_type_default_and_help():
    source = (
        f"from typing import Literal\n{PARAMETERS}\nmode: Literal['a', 'b'] = 'a'  # which = one # of them"
    )
    found = inspect(notebook(("parameters", source)))
    assert list(found) == ["model", "tau", "taus", "mode"]
    assert found["tau"] == Parameter("tau", "float | None", None, "threshold")
    assert found["mode"].help == "which = one # of them"


def test_notebook_without_parameters_cell_has_none():
    assert inspect(notebook(("md", "# Title"))) == {}


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("tau = 1.0  # threshold", "write `name: type = default  # help`, not `tau = 1.0`"),
        ("tau: float  # threshold", "write `name: type = default"),
        ("tau: float = 1.0", "`tau: float = 1.0` needs a comment"),
        ("tau: float = 1 / 3  # threshold", "must be a literal"),
        ("tau: float = 'a'  # threshold", "'tau' must be float, not 'a'"),
        ("tau: ndarray = 1.0  # threshold", "'tau' has the type 'ndarray'; use bool, int"),
        ("print(1)  # say", "write `name: type"),
    ],
)
def test_careless_parameters_cell_is_refused(line, says):
    with pytest.raises(ValueError, match=says.replace("|", r"\|")):
        inspect(notebook(("parameters", line)))


def test_two_parameters_cells_are_refused():
    with pytest.raises(ValueError, match="2 cells are tagged 'parameters'"):
        inspect(notebook(("parameters", "a: int = 1  # a"), ("parameters", "b: int = 1  # b")))


@pytest.mark.parametrize(
    ("given", "checked"),
    [({"tau": 2}, {"tau": 2.0}), ({"tau": None}, {"tau": None}), ({"taus": [1, 2.5]}, {"taus": [1.0, 2.5]})],
)
def test_values_of_the_declared_type_pass(given, checked):
    assert check_parameters(notebook(("parameters", PARAMETERS)), given) == checked


@pytest.mark.parametrize(
    "given", [{"tau": "1"}, {"tau": True}, {"model": None}, {"taus": 1.0}, {"taus": ["a"]}]
)
def test_values_of_another_type_are_refused(given):
    ((name, _),) = given.items()
    with pytest.raises(ValueError, match=f"parameter '{name}' must be"):
        check_parameters(notebook(("parameters", PARAMETERS)), given)


def test_unknown_parameter_lists_the_known_ones(desk):
    desk.write(("parameters", PARAMETERS))
    with pytest.raises(
        ValueError, match=r"(?s)'demo': unknown parameter 'tua'.*tau: float \| None = None  # thres"
    ):
        desk.run(parameters={"tua": 1.0})
    assert not desk.folders["pages"].exists()


def test_unknown_notebook_lists_the_known_ones(desk):
    desk.write(("md", "# Demo"))
    with pytest.raises(FileNotFoundError, match=r"no notebook 'dome' in .*: there are demo"):
        desk.run("dome")


# pages


@pytest.mark.slow
def test_figures_tables_and_values_of_a_variant(desk):
    record = desk.record()
    prose = "# {{ model }} on {{ page }}\n\n{numref}`fig-one`, {ref}`ys <tab-ys>`, [2](#fig-two), `fig-ones`"
    desk.write(("parameters", PARAMETERS), ("code", FIGURE.replace("RECORD", repr(record))), ("md", prose))
    page = desk.run(target="demo-two", parameters={"model": "smol"})
    assert page == desk.folders["pages"] / "demo-two.ipynb"
    page = desk.page("demo-two")
    nbformat.validate(page)
    assert page.metadata.moeits.labels == ["fig-one-two", "fig-two-two", "tab-ys-two"]
    assert list(page.metadata.moeits.records) == [record]

    figures = [cell for cell in page.cells if "mystnb" in cell.metadata]
    assert [cell.metadata.mystnb.figure.name for cell in figures] == ["fig-one-two", "fig-two-two"]
    assert figures[0].metadata.mystnb.figure.caption == "Figure one."
    assert figures[0].metadata.mystnb.image.alt == "A rising line, number one."
    assert all("image/svg+xml" in cell.outputs[0].data for cell in figures)
    assert ":::{table} The ys.\n:name: tab-ys-two\n\n| y |\n| ---: |\n| 0.25 |\n:::" in sources(page)
    assert "{download}`PDF <../figures/demo-two/fig-two-two.pdf>`" in sources(page)
    assert (desk.folders["figures"] / "demo-two" / "fig-two-two.pdf").exists()
    assert "# smol on demo-two\n" in sources(page)
    assert "{numref}`fig-one-two`, {ref}`ys <tab-ys-two>`, [2](#fig-two-two), `fig-ones`" in sources(page)
    last = page.cells[-1].source
    assert last.startswith(":::{dropdown} How this page was made")
    assert "`model = 'smol'`" in last
    assert "| Measurements | 1, 12 s on Linux x86_64 |" in last
    assert printed(page) == "saved\n"


def test_page_is_the_same_and_free_of_this_machine(desk, monkeypatch):
    desk.write(
        ("parameters", PARAMETERS),
        ("code", "import os, sys\nprint(os.listdir())\nprint('progress', file=sys.stderr)"),
        ("code", f"import pathlib\npathlib.Path({str(ROOT / 'data' / 'paper')!r})"),
    )
    page = desk.run(parameters={"tau": 1.5})
    first = page.read_bytes()
    assert printed(desk.page()) == "[]\n", "runs in an empty folder, without noise"
    assert "PosixPath('data/paper')" in first.decode()
    assert [cell.id for cell in desk.page().cells][:2] == ["parameters-0", "injected-parameters"]
    assert "papermill" not in first.decode().replace("injected", "")

    desk.run(parameters={"tau": 1.5}, force=True)
    assert page.read_bytes() == first

    monkeypatch.setattr(run, "_execute", lambda *_: pytest.fail("nothing changed, nothing to run"))
    assert desk.run(parameters={"tau": 1.5}).read_bytes() == first


@pytest.fixture
def counted(desk, monkeypatch):
    """A desk whose notebooks are not executed, with the list of the runs that would have been."""
    runs = []

    def execute(source, *_, **__):
        runs.append(source)
        executed = nbformat.read(source, as_version=4)
        executed.metadata["language_info"] = {"name": "python"}
        return executed

    monkeypatch.setattr(run, "_execute", execute)
    desk.write(("parameters", PARAMETERS), ("md", "# Title"))
    desk.run()
    desk.runs = runs
    return desk


def test_unchanged_page_is_kept(counted):
    page, record = counted.page(), counted.record()
    (path,) = counted.folders["records"].iterdir()
    page.metadata.moeits.records = {record: records.file_digest(path)}
    nbformat.write(page, counted.folders["pages"] / "demo.ipynb")
    counted.run()
    assert len(counted.runs) == 1


@pytest.mark.parametrize("change", ["notebook", "parameters", "depends", "lost page", "force", "package"])
def test_change_runs_the_notebook_again(counted, change, tmp_path, monkeypatch):
    settings = {}
    if change == "notebook":
        counted.write(("parameters", PARAMETERS), ("md", "# Another title"))
    elif change == "parameters":
        settings = {"parameters": {"tau": 1.0}}
    elif change == "depends":
        (tmp_path / "more").mkdir()
        (tmp_path / "more" / "record.json").write_text("{}")
        settings = {"depends": [tmp_path / "more"]}
    elif change == "lost page":
        (counted.folders["pages"] / "demo.ipynb").unlink()
    elif change == "force":
        settings = {"force": True}
    elif change == "package":
        (tmp_path / "moeits").mkdir()
        (tmp_path / "moeits" / "nmi.py").write_text("edited = True\n")
        monkeypatch.setattr(run, "ROOT", tmp_path)
    counted.run(**settings)
    assert len(counted.runs) == 2


@pytest.mark.parametrize("lost", ["figure", "record", "record measured anew"])
def test_lost_figure_or_record_runs_the_notebook_again(counted, lost):
    page = counted.page()
    if lost == "figure":
        page.metadata.moeits.files = ["fig-a.svg"]
    else:
        page.metadata.moeits.records = {"abc" if lost == "record" else counted.record(): "another hash"}
    nbformat.write(page, counted.folders["pages"] / "demo.ipynb")
    counted.run()
    assert len(counted.runs) == 2


# failures


def test_failing_cell_is_named_and_keeps_the_last_page(desk, tmp_path):
    desk.write(("parameters", PARAMETERS), ("md", "# Fine"))
    page = desk.run()
    before = page.read_bytes()
    desk.write(("code", "x = 1"), ("code", "y = x / 0\nprint(y)"))
    with pytest.raises(
        NotebookError, match=r"notebook 'demo'.*cell \[2\] `y = x / 0` raised ZeroDivisionError: div"
    ):
        desk.run()
    assert page.read_bytes() == before
    assert [path.name for path in desk.folders["figures"].iterdir()] == ["demo"]
    trace = (tmp_path / "cache" / "notebooks" / "demo.ipynb").read_text()
    assert "ZeroDivisionError" in trace


def test_dead_kernel_is_reported(desk):
    desk.write(("code", "import os\nos._exit(1)"))
    with pytest.raises(NotebookError, match="the kernel died"):
        desk.run()
    assert not desk.folders["pages"].exists()


def test_unknown_name_in_prose_is_refused(counted):
    counted.write(("parameters", PARAMETERS), ("md", "# On {{ modle }}"))
    with pytest.raises(ValueError, match=r"demo.ipynb: \{\{ modle \}\} .* known are page, model, tau, taus"):
        counted.run()


def test_figure_of_an_unknown_record_is_refused(desk):
    desk.write(
        (
            "code",
            "from moeits.book import figures\nimport pandas as pd\n"
            "figures.table(pd.DataFrame({'y': [1]}), 'ys', caption='The ys.', records=['abc'])",
        )
    )
    with pytest.raises(ValueError, match="names the record 'abc', which is not in"):
        desk.run()
    assert not desk.folders["pages"].exists()
    assert not list(desk.folders["figures"].iterdir())


def test_home_folder_is_shortened(monkeypatch, tmp_path):
    from moeits.book import pages

    monkeypatch.setattr(pages.Path, "home", lambda: tmp_path)
    output = {"data": {"text/plain": f"{tmp_path}/x", "image/png": f"{tmp_path}"}, "text": [f"in {tmp_path}"]}
    assert pages._without_folders(output) == {
        "data": {"text/plain": "~/x", "image/png": f"{tmp_path}"},
        "text": ["in ~"],
    }


def test_a_record_is_found_where_records_lie_and_nowhere_else(tmp_path):
    for place in ("reference/laptop", "results/laptop", "figures/page"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "scores-0123.json").touch()
    assert find_record("0123", tmp_path) == tmp_path / "results/laptop/scores-0123.json"
    (tmp_path / "results/laptop/scores-0123.json").unlink()
    assert find_record("0123", tmp_path) == tmp_path / "reference/laptop/scores-0123.json"
    (tmp_path / "reference/laptop/scores-0123.json").unlink()
    with pytest.raises(ValueError, match="names the record '0123', which is not in"):
        find_record("0123", tmp_path)
