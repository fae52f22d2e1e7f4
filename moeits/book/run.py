"""Run notebooks and render the book: strictly, whole or not at all, and only when something has changed."""

import ast
import io
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tokenize
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import count
from pathlib import Path
from typing import Any, Literal

import joblib
import nbformat
import yaml
from nbformat import NotebookNode
from pydantic import TypeAdapter, ValidationError

from moeits.book.pages import find_record, make_page
from moeits.errors import MissingError, MoeitsError
from moeits.machine import devices
from moeits.machine.keys import digest, file_digest
from moeits.machine.paths import BOOK, CACHE, DATA, NOTEBOOKS, ROOT, whole
from moeits.study import comparison, pipeline
from moeits.study.profiles import Profile
from moeits.study.records import in_preview, lock_digest

_NOTEBOOKS_AT_ONCE = 4  # each holds some gigabytes
SOLUTIONS = "Solutions"  # the part of the contents that the students' book leaves out
_TYPES = {kind.__name__: kind for kind in (bool, int, float, str, list, dict)} | {"Literal": Literal}


class NotebookError(MoeitsError):
    """A cell of a notebook raised; the message names the notebook, the cell and the exception."""


class BookError(MoeitsError):
    """The book does not build without warnings; the message lists them."""


@dataclass(frozen=True)
class Parameter:
    """One line of a notebook's ``parameters`` cell: ``name: type = default  # help``.

    The default is a literal of the type.
    """

    name: str
    type: str
    default: Any
    help: str

    def __str__(self) -> str:
        return f"{self.name}: {self.type} = {self.default!r}  # {self.help}"

    def check(self, value: object) -> Any:
        """Return `value` as the declared type.

        Raises
        ------
        MoeitsError
            If it is not of that type. A whole number passes for a float; nothing else is converted.
        """
        try:
            kind = TypeAdapter(eval(self.type, {"__builtins__": {}, **_TYPES}))
        except Exception as error:
            raise MoeitsError(
                f"parameter {self.name!r} has the type {self.type!r}; use {', '.join(_TYPES)}, None and |"
            ) from error
        try:
            return kind.validate_python(value, strict=True)
        except ValidationError as error:
            raise MoeitsError(f"parameter {self.name!r} must be {self.type}, not {value!r}") from error


def inspect(notebook: NotebookNode) -> dict[str, Parameter]:
    """Read the declared parameters of a notebook.

    Parameters
    ----------
    notebook : NotebookNode
        A notebook; one without a cell tagged ``parameters`` has none.

    Returns
    -------
    dict of str to Parameter

    Raises
    ------
    MoeitsError
        If a line of the cell has no type, no literal default of that type or no comment, or there are two
        such cells.
    """
    cells = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())]
    if len(cells) > 1:
        raise MoeitsError(f"{len(cells)} cells are tagged 'parameters': keep one")
    source = cells[0].source if cells else ""
    comments = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    found = {}
    for line in ast.parse(source).body:
        if isinstance(line, ast.ImportFrom) and line.module == "typing":
            continue
        text = ast.unparse(line)
        if not isinstance(line, ast.AnnAssign) or not isinstance(line.target, ast.Name) or line.value is None:
            raise MoeitsError(f"parameters cell: write `name: type = default  # help`, not `{text}`")
        if not (explanation := comments.get(line.end_lineno or 0)):
            raise MoeitsError(f"parameters cell: `{text}` needs a comment that says what it is")
        try:
            default = ast.literal_eval(line.value)
        except ValueError as error:
            raise MoeitsError(f"parameters cell: the default of `{text}` must be a literal") from error
        parameter = Parameter(line.target.id, ast.unparse(line.annotation), default, explanation)
        parameter.check(default)
        found[parameter.name] = parameter
    return found


def check_parameters(notebook: NotebookNode, given: Mapping[str, Any]) -> dict[str, Any]:
    """Check the values of parameters against a notebook's declarations.

    Raises
    ------
    MoeitsError
        If a parameter is unknown (the message lists the known ones) or its value has another type.
    """
    known = inspect(notebook)
    if unknown := sorted(given.keys() - known.keys()):
        lines = "".join(f"\n  {parameter}" for parameter in known.values()) or " none"
        raise MoeitsError(f"unknown parameter {', '.join(map(repr, unknown))}; the notebook has{lines}")
    return {name: known[name].check(value) for name, value in given.items()}


@dataclass(frozen=True)
class Page:
    """A page of the book that a notebook makes.

    Attributes
    ----------
    name : str
        Name of the notebook, without ``.ipynb``.
    target : str
        Name of the page, `name` by default. Of a notebook that makes several pages, such as ``prune-qwen`` of
        ``prune``, what follows the notebook's name ends the labels of its figures and tables.
    parameters : mapping, default={}
        Values that replace those of the ``parameters`` cell.
    kernel : str
        Jupyter kernel, one of Python.
    notebooks, pages, figures, records : Path
        Folders: committed notebooks, pages, figures (``figures/TARGET`` is this page's), and the records that
        figures and tables name (searched with its subfolders).
    depends : iterable of Path
        Files and folders that the notebook reads, besides the package, ``data/paper`` and ``data/profiles``.
    """

    name: str
    target: str = ""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    kernel: str = "python3"
    notebooks: Path = NOTEBOOKS
    pages: Path = BOOK / "notebooks"
    figures: Path = DATA / "figures"
    records: Path = DATA
    depends: Iterable[Path] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "target", self.target or self.name)

    @property
    def path(self) -> Path:
        """The page."""
        return self.pages / f"{self.target}.ipynb"

    @property
    def source(self) -> Path:
        """The notebook."""
        return self.notebooks / f"{self.name}.ipynb"

    @property
    def made(self) -> Path:
        """Folder of the page's figures."""
        return self.figures / self.target

    @cached_property
    def notebook(self) -> NotebookNode:
        """The notebook as it is committed."""
        if not self.source.exists():
            known = ", ".join(sorted(path.stem for path in Path(self.notebooks).glob("*.ipynb"))) or "none"
            raise MissingError(f"no notebook {self.name!r} in {self.notebooks}: there are {known}")
        return nbformat.read(self.source, as_version=4)

    @cached_property
    def given(self) -> dict[str, Any]:
        """The parameters, checked."""
        notebook = self.notebook
        try:
            return check_parameters(notebook, self.parameters)
        except MoeitsError as error:
            raise MoeitsError(f"notebook {self.name!r}: {error}") from error

    @cached_property
    def inputs(self) -> str:
        """Hash of everything that the page depends on."""
        places = [self.source, ROOT / "moeits", DATA / "paper", DATA / "profiles", *self.depends]
        shown = [self.target, self.given, self.kernel, lock_digest(), _contents(places)]
        return digest([*shown, "preview"] if in_preview() else shown)

    def is_current(self) -> bool:
        """Whether the page is there and nothing has changed since it was made."""
        inputs = self.inputs
        if not self.path.exists():
            return False
        about = nbformat.read(self.path, as_version=4).metadata.get("moeits", {})
        return (
            about.get("inputs") == inputs
            and all((self.made / file).exists() for file in about["files"])
            and all(_digest_of(record, self.records) == seen for record, seen in about["records"].items())
        )

    def run(self, *, force: bool = False) -> Path:
        """Make the page, whole or not at all; one that is there and current is made by `force` alone.

        Raises
        ------
        MissingError
            If there is no such notebook.
        MoeitsError
            If a parameter is unknown or of the wrong type, the prose names an unknown value, or a figure or
            table a record that does not exist.
        NotebookError
            If a cell raises. The notebook as far as it got, with its traceback, stays in
            ``.cache/notebooks``.
        """
        return self.path if self.is_current() and not force else self.make()

    def make(self, *, progress: bool = True) -> Path:
        """Run the notebook, with a progress bar or without, and write page and figures."""
        given, inputs = self.given, self.inputs
        variant = self.target.removeprefix(self.name).lstrip("-") if self.target != self.name else ""
        with whole(self.made) as part:
            part.mkdir()
            variables = {"MOEITS_FIGURES": str(part), "MOEITS_VARIANT": variant}
            executed = _execute(self.source, self.target, given, self.kernel, variables, progress=progress)
            known = {key: parameter.default for key, parameter in inspect(self.notebook).items()}
            finished = make_page(
                executed,
                about={
                    "notebook": self.source.name,
                    "page": self.target,
                    "inputs": inputs,
                    "files": sorted(path.name for path in part.iterdir()),
                },
                given=given,
                values=known | given,
                variant=variant,
                files=Path(os.path.relpath(self.made.resolve(), self.path.parent.resolve())).as_posix(),
                records=self.records,
            )
            shutil.rmtree(self.made, ignore_errors=True)
        with whole(self.path) as part:
            nbformat.write(finished, part)
        return self.path


def _contents(places: Iterable[Path]) -> list[list[str]]:
    """Name and hash of every file in folders, or of files; what does not exist counts as empty."""
    found = []
    for place in map(Path, places):
        files = sorted(place.rglob("*")) if place.is_dir() else [place]
        found += [
            [os.path.relpath(file, place.parent), file_digest(file)]
            for file in files
            if file.is_file() and not {"__pycache__", "_build"} & set(file.relative_to(place.parent).parts)
        ]
    return found


def _digest_of(record: str, records: Path) -> str | None:
    """Hash of a record as it is now; one that was measured anew has another."""
    try:
        return file_digest(find_record(record, records))
    except MissingError:
        return None


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _execute(
    source: Path,
    target: str,
    given: dict[str, Any],
    kernel: str,
    variables: Mapping[str, str],
    *,
    progress: bool,
) -> NotebookNode:
    """Run a notebook in an empty folder, so that no relative path works by chance."""
    import papermill
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError
    from traitlets.config import Config

    trace = CACHE / "notebooks" / f"{target}.ipynb"
    trace.parent.mkdir(parents=True, exist_ok=True)
    # it warns of parameters that it cannot read, such as `tau: float | None`; they are checked by now
    logging.getLogger("papermill").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as scratch, _environment(variables):
        empty = Path(scratch, "empty")
        empty.mkdir()
        sockets = {"transport": "ipc", "ip": f"{scratch}/kernel"}  # files instead of open ports
        try:
            executed = papermill.execute_notebook(
                source,
                trace,
                parameters=given,
                kernel_name=kernel,
                cwd=empty,
                progress_bar={"desc": target, "leave": False} if progress else False,
                config=Config({"KernelManager": sockets}),
            )
        except (PapermillExecutionError, DeadKernelError) as error:
            cause = "the kernel died, perhaps for lack of memory"
            if isinstance(error, PapermillExecutionError):
                first = error.source.strip().partition("\n")[0]
                cause = f"cell [{error.exec_count}] `{first}` raised {error.ename}: {error.evalue}"
            raise NotebookError(
                f"notebook {source.stem!r} (page {target!r}): {cause}\nas far as it got: {trace}"
            ) from error
    trace.unlink()
    return executed


def contents(book: Path, *, student: bool = False) -> dict[str, Any]:
    """Read a book's ``_toc.yml``; for students, without the part called Solutions."""
    toc = yaml.safe_load((Path(book) / "_toc.yml").read_text())
    if student:
        toc["parts"] = [part for part in toc["parts"] if part["caption"] != SOLUTIONS]
    return toc


def toc_pages(book: Path, *, student: bool = False) -> list[str]:
    """Names of the pages in a book's table of contents, in order, without suffix."""

    def walk(node: Any) -> Iterator[str]:
        if isinstance(node, list):
            for item in node:
                yield from walk(item)
        elif isinstance(node, dict):
            for key, value in node.items():
                if key in ("root", "file"):
                    yield value
                else:
                    yield from walk(value)

    return list(walk(contents(book, student=student)))


def build_book(book: Path = BOOK, *, student: bool = False, force: bool = False) -> Path:
    """Render the book as HTML, every warning an error.

    Nothing is executed: the notebooks' pages are what :meth:`Page.run` left. The book is built apart and
    then moved into place, so that a build that fails or is killed leaves the last book as it was.

    Parameters
    ----------
    book : Path
        Folder with ``_config.yml`` and ``_toc.yml``.
    student : bool
        Leave the solutions of the exercises out.
    force : bool
        Build even if nothing has changed since the last time.

    Returns
    -------
    Path
        ``_build/html/index.html`` in `book`, for students ``_build/student/index.html``.

    Raises
    ------
    MissingError
        If the table of contents names a page that does not exist.
    MoeitsError
        If two pages have a figure or table of the same label.
    BookError
        If the builder warns or fails.
    """
    book = Path(book)
    html = book / "_build" / ("student" if student else "html")
    places = [book, ROOT / "moeits", *_check_pages(book, student)]  # the package, for its docstrings
    inputs = digest([lock_digest(), os.environ.get("MOEITS_REPOSITORY"), _contents(places)])
    stamp = html / ".inputs"
    if not force and stamp.exists() and stamp.read_text() == inputs:
        return html / "index.html"
    with whole(html) as part:
        built = part.with_name("out")
        command = [sys.executable, "-c", "from jupyter_book.cli.main import main; main()", "build", str(book)]
        options = ["-n", "-W", "--keep-going", "--path-output", str(built)]
        if student:
            toc = part.with_name("_toc.yml")
            toc.write_text(yaml.safe_dump(contents(book, student=True), sort_keys=False))
            options += ["--toc", str(toc)]
        done = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
        built = built / "_build" / "html"
        if done.returncode or not (built / "index.html").exists():
            log = re.sub(r"\x1b\[[\d;]*m", "", done.stdout + done.stderr).splitlines()
            troubles = [line for line in log if re.search(r"\b(WARNING|ERROR|CRITICAL)\b", line)]
            raise BookError("\n".join([f"the book in {book} does not build:", *(troubles or log[-20:])]))
        (built / stamp.name).write_text(inputs)
        built.rename(part)
        shutil.rmtree(html, ignore_errors=True)
    return html / "index.html"


def _check_pages(book: Path, student: bool = False) -> list[Path]:
    """Check that every page exists and no label is used twice; return the folders of the pages' figures."""
    owners: dict[str, str] = {}
    folders = set()
    for name in toc_pages(book, student=student):
        page = next((path for kind in (".md", ".ipynb") if (path := book / f"{name}{kind}").exists()), None)
        if page is None:
            raise MissingError(
                f"the table of contents names {name!r}, but there is no such page in {book}: "
                "run its notebook, or write it"
            )
        if page.suffix == ".ipynb":
            notebook = nbformat.read(page, as_version=4)
            for label in notebook.metadata.get("moeits", {}).get("labels", ()):
                if (other := owners.setdefault(label, name)) != name:
                    raise MoeitsError(f"pages {other!r} and {name!r} both have {label!r}: rename one")
            for cell in notebook.cells:
                files = re.findall(r"\{download\}`[^`<]*<([^>`]+)>`", cell.source)
                folders |= {(page.parent / file).resolve().parent for file in files}
    return sorted(folders)


def run_profile(
    profile: Profile,
    *,
    student: bool = False,
    book: Path = BOOK,
    figures: Path = DATA / "figures",
    say: Callable[[str], None] = print,
) -> Path:
    """Measure everything of a profile, run the notebooks and render the book.

    What is there already is left: each step finds its record, and pages and book are kept where nothing that
    they depend on has changed.

    Parameters
    ----------
    profile : Profile
        The settings.
    student : bool
        Render the students' book, without the solutions.
    book, figures : Path
        Folders of the book's source and of the figures.
    say : callable
        Takes the lines of progress, and at the end those that say where the time went.

    Returns
    -------
    Path
        The rendered book's first page.

    Raises
    ------
    NotebookError, BookError
        As :meth:`Page.run` and :func:`build_book`.
    """
    steps = measurements(profile)
    spent: dict[str, float] = {}
    worked: dict[str, float] = {}  # seconds of all processes, by stage
    numbers = count(1)
    total = len(steps) + len(_pages(profile, book, figures, student)) + 1

    def announce(label: str) -> None:
        say(f"[{next(numbers):2}/{total}] {label}")

    @contextmanager
    def timed(stage: str, *, aloud: bool = True) -> Iterator[None]:
        start = time.perf_counter()
        yield
        spent[stage] = time.perf_counter() - start
        if aloud:
            say(f"        {spent[stage]:6.1f} s")

    with timed("measured", aloud=False):
        for number, _, seconds in pipeline.each(steps, **_at_once(profile)):
            announce(steps[number].label)
            say(f"        {seconds:6.1f} s")
            stage = f"  {steps[number].stage}"
            worked[stage] = worked.get(stage, 0) + seconds
    with timed("notebooks", aloud=False):
        for label, seconds in _make_pages(_pages(profile, book, figures, student)):
            announce(label)
            say(f"        {seconds:6.1f} s")
    announce("rendering the book")
    with timed("book"):
        index = build_book(book, student=student)
    say("where the time went:")
    for stage, seconds in [("measured", spent["measured"]), *worked.items(), *list(spent.items())[1:]]:
        say(f"  {stage:<12}{seconds:7.1f} s")
    say(f"  {'in all':<12}{sum(spent.values()):7.1f} s")
    return index


def _at_once(profile: Profile) -> dict[str, Any]:
    """Choose how steps are spread: on processors alone, one process computes on one of them."""
    processes = min(joblib.cpu_count(), _NOTEBOOKS_AT_ONCE)
    if in_preview() or processes == 1 or devices.choose(profile.device, profile.dtype)[0].type != "cpu":
        return {}
    return {"backend": "loky", "n_jobs": processes}


def measurements(profile: Profile) -> list[pipeline.Step]:
    """List everything that a profile measures, in order."""
    finals = [
        pipeline.Step(
            "finals",
            f"{name}: the best methods on the benchmarks",
            partial(_finals, profile, name),
            name,
            phase=4,
        )
        for name in profile.rival_models or profile.models
        if profile.rivals and profile.rival_healings
    ]
    return [*pipeline.steps(profile), *comparison.steps(profile), *finals]


def _finals(profile: Profile, name: str) -> None:
    cells = comparison.Comparison(profile, name).found()
    for step in comparison.final_steps(profile, cells, [None, *profile.rival_healings]):
        step.do()


def _pages(profile: Profile, book: Path, figures: Path, student: bool) -> list[Page]:
    """List the pages of the table of contents that notebooks make."""
    models = {model.page: (name, model) for name, model in profile.models.items()}
    found = []
    for page in toc_pages(book, student=student):
        folder, _, target = page.rpartition("/")
        if folder != "notebooks":
            continue
        notebook, parameters = target, {"profile": profile.name}
        if target in models:
            name, model = models[target]
            notebook, parameters = "prune", parameters | {"model": name, "tau": model.tau}
        shown = DATA / "results" / profile.name
        depends = [
            file for step in _SHOWS_ALL.get(notebook, ()) for file in sorted(shown.glob(f"{step}-*.json"))
        ] + [file for pattern in _READS.get(notebook, ()) for file in sorted(DATA.glob(pattern))]
        found.append(
            Page(notebook, target, parameters, pages=book / folder, figures=figures, depends=depends)
        )
    return found


# Pages that show whatever records of these steps there are, also what another command measured.
_SHOWS_ALL = {
    "tau-ablation": ("scores", "healing"),
    "rivals": ("rival", "final", "speed"),
    "beyond": ("rival", "final", "oracle"),
    "performance": ("bench-nmi", "bench-evaluation"),
    "own-machine": ("bench-standins",),
}

# What pages read of the committed study, below data/.
_READS = {
    "trained-models": ("study/records/anatomy-*.json", "models/*/training.*"),
    "trained-selection": ("study/records/selection-*.json",),
    "trained-nmi": (
        "study/records/anatomy-*.json",
        "study/records/relatedness-*.json",
        "study/records/duplicates-*.json",
    ),
    "trained-healing": ("study/records/healed-*.json",),
    "laboratory": (
        "study/records/selection-*.json",
        "study/records/budgets-*.json",
        "models/*-1/model.safetensors",
    ),
}


def _make_pages(pages: Iterable[Page]) -> Iterator[tuple[str, float]]:
    """Run the notebooks of outdated pages, several at once; yield a label and seconds for every page."""
    outdated = []
    for page in pages:
        if page.is_current():
            yield _label(page), 0.0
        else:
            outdated.append(page)
    # Each process computes on one core: two that share all cores are slower than one after the other.
    at_once = min(len(outdated), joblib.cpu_count(), _NOTEBOOKS_AT_ONCE)
    if at_once:
        parallel = joblib.Parallel(n_jobs=at_once, return_as="generator_unordered")
        yield from parallel(joblib.delayed(_make_page)(page, progress=at_once == 1) for page in outdated)


def _make_page(page: Page, *, progress: bool) -> tuple[str, float]:
    start = time.perf_counter()
    page.make(progress=progress)
    return _label(page), time.perf_counter() - start


def _label(page: Page) -> str:
    return f"notebook {page.name} for page {page.target}"
