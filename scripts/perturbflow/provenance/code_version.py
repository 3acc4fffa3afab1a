"""Which version of the code made a result: a digest of all definitions that can change its numbers.

A step starts at one function. That function refers to other definitions of this package by their names, and these to
others. All of them count, wherever they stand. Comments, layout, docstrings, annotations, messages and log lines do not
count, nor do definitions that no name leads to.

This module reads code and does not run it. A name cannot lead to a family's class, a recipe or a kind of prior. Each of
these is a further root, which the caller names.
"""

import ast
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from itertools import chain
from pathlib import Path

SCRIPTS = Path(__file__).resolve().parent.parent.parent
PACKAGE = __name__.split(".")[0]

BESIDE = (".tsv", ".tsv.gz", ".html")  # files beside a module that count where a definition names them
LOGGING = {f"logger.{level}" for level in ("debug", "info", "warning", "error", "exception", "critical")} | {
    "warnings.warn"
}
DATACLASS_WORDS = {"ClassVar", "InitVar", "KW_ONLY"}  # annotations that make a field something else
UNREAD = {"ctx", "annotation", "returns", "type_comment", "type_params", "kind", "simple"}
RELEASE = f"{PACKAGE}:__version__"  # a release alone changes no number

ALL, LOOSE = "*", ""  # stand for all that a module defines, and for its statements that do something else

IMPORTS = ast.Import | ast.ImportFrom
# Where a name was imported from: a module, and the name of something in it, or None for the module itself.
Origin = tuple[str, str | None]


def _dotted(node: ast.AST) -> str:
    """Return a.b.c for names and attributes of names, else nothing."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(parts)]) if isinstance(node, ast.Name) else ""


def _add_origins(node: ast.Import | ast.ImportFrom, imports: dict[str, list[Origin]]) -> None:
    """Add name → origin of an import; `import a.b` gives a name to a alone."""
    for alias in node.names:
        if isinstance(node, ast.ImportFrom):
            imports.setdefault(alias.asname or alias.name, []).append((node.module or "", alias.name))
        else:
            module = alias.name if alias.asname else alias.name.split(".")[0]
            imports.setdefault(alias.asname or module, []).append((module, None))


def _run_part(node: ast.AST) -> list:
    """Return the statements of a node that run in a step.

    It leaves out branches for type checkers and for the command line.
    """
    if isinstance(node, ast.If):
        test = node.test
        if _dotted(test).endswith("TYPE_CHECKING") or (
            isinstance(test, ast.Compare) and _dotted(test.left) == "__name__"
        ):
            return list(chain.from_iterable(map(_run_part, node.orelse)))
    return [node]


def _is_silent(node: object) -> bool:
    """Return whether a statement changes nothing: a docstring, pass, a bare annotation, a log line or a warning."""
    if isinstance(node, ast.Expr):
        return isinstance(node.value, ast.Constant) or (
            isinstance(node.value, ast.Call) and _dotted(node.value.func) in LOGGING
        )
    return isinstance(node, ast.Pass) or (isinstance(node, ast.AnnAssign) and not node.value)


@dataclass
class _Reading:
    """The part of some statements that counts.

    It has their text in a form of our own, the names in it, its imports, and the files that it may name.
    """

    text: list[str] = field(default_factory=list)
    names: dict[str, None] = field(default_factory=dict)
    imports: dict[str, list[Origin]] = field(default_factory=dict)
    files: dict[str, None] = field(default_factory=dict)

    def read(self, node: object) -> None:
        """Take in a node of a syntax tree, a list of them, or a plain value."""
        if isinstance(node, ast.AnnAssign) and node.value:
            node = ast.Assign([node.target], node.value)
        if isinstance(node, list):
            self.text.append("[")
            for item in node:
                for part in _run_part(item):
                    if isinstance(part, IMPORTS):
                        _add_origins(part, self.imports)
                    elif not _is_silent(part):
                        self.read(part)
            self.text.append("]")
        elif not isinstance(node, ast.AST):
            self.text.append(repr(node))
            if isinstance(node, str) and node.endswith(BESIDE):
                self.files[node] = None
        elif dotted := _dotted(node):
            self.text.append(dotted)
            self.names[dotted] = None
        else:
            self.text.append(f"({type(node).__name__}")
            for part in _parts(node):
                self.read(part)
            self.text.append(")")


def _parts(node: ast.AST) -> list:
    """Return the parts of a node that count, without messages and annotations."""
    if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
        return [node.exc.func, node.exc.args[1:], node.exc.keywords, node.cause]  # the first argument is the message
    if isinstance(node, ast.Assert):
        return [node.test]
    if isinstance(node, ast.ClassDef):
        return [node.name, node.decorator_list, node.bases, node.keywords, [_class_field(part) for part in node.body]]
    return [getattr(node, name) for name in node._fields if name not in UNREAD]


def _class_field(node: ast.stmt) -> ast.AST:
    """Return a field of a class as name, special words of its annotation and default; any other statement as it is."""
    if not isinstance(node, ast.AnnAssign):
        return node
    words = sorted(DATACLASS_WORDS & {_dotted(part).split(".")[-1] for part in ast.walk(node.annotation)})
    return ast.Tuple(
        [ast.Constant("field"), node.target, ast.Constant(" ".join(words)), *([node.value] if node.value else [])]
    )


def _bound(node: ast.stmt) -> set[str]:
    """Return the names that a statement of a module defines, and LOOSE where it does more."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return {node.name}
    if isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign):
        inner = [part.target for part in ast.walk(node) if isinstance(part, ast.NamedExpr)]
        targets = [*(node.targets if isinstance(node, ast.Assign) else [node.target]), *inner]
        stored = [
            part for target in targets for part in ast.walk(target) if isinstance(getattr(part, "ctx", None), ast.Store)
        ]
        return {
            getattr(part, "id", LOOSE) for part in stored if not isinstance(part, ast.Tuple | ast.List | ast.Starred)
        }
    named = [str(getattr(part, "id", getattr(part, "name", LOOSE))) for part in ast.walk(node)]
    return {*named, LOOSE}


@dataclass
class _Module:
    """The statements of a module by the names that they define, and the origins of its other names."""

    statements: dict[str, list[ast.stmt]] = field(default_factory=dict)
    imports: dict[str, list[Origin]] = field(default_factory=dict)


@cache
def _file(module: str) -> Path | None:
    """Return the file of a module below SCRIPTS, or None for anything else."""
    path = SCRIPTS.joinpath(*module.split("."))
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)


@cache
def _module(name: str) -> _Module:
    """Return the content of a module."""
    path, module = _file(name), _Module()
    if path is None:
        raise LookupError(f"there is no module {name} below {SCRIPTS}.")
    for node in chain.from_iterable(map(_run_part, ast.parse(path.read_bytes(), str(path)).body)):
        bound = set() if _is_silent(node) or isinstance(node, IMPORTS) else _bound(node)
        for defined in bound:
            module.statements.setdefault(defined, []).append(node)
        for part in ast.walk(node) if LOOSE in bound else [node]:
            if isinstance(part, IMPORTS):
                _add_origins(part, module.imports)
    return module


def _meanings(module: str, dotted: str, imports: dict[str, list[Origin]]) -> Iterator[str]:
    """Yield the meanings of a name in a module: module:definition of this package, or the full name of anything else.

    `imports` are those of the definition that holds the name. It yields all meanings where several are possible.
    """
    name, *rest = dotted.split(".")
    here = _module(module)
    if name in here.statements:
        yield f"{module}:{name}"
    origins = [*imports.get(name, []), *here.imports.get(name, [])]
    for source, attribute in origins or [(source, name) for source, _ in here.imports.get("*", [])]:
        if source.split(".")[0] == PACKAGE and _file(source):
            yield from _members(source, [attribute, *rest] if attribute else rest)
        else:
            yield f"{source}.{attribute}" if attribute else source


def _members(module: str, path: list[str]) -> Iterator[str]:
    """Yield the meanings of attributes of a module.

    A module that is handed on, or lacks the attribute, means its whole content.
    """
    if path and (found := list(_meanings(module, ".".join(path), {}))):
        yield from found
    elif path and _file(f"{module}.{path[0]}"):
        yield from _members(f"{module}.{path[0]}", path[1:])
    else:
        yield f"{module}:{ALL}"


@cache
def _definition(name: str) -> tuple[str, list[tuple[str, str]]]:
    """Return a digest of a definition's text, and (name, meaning) of all names in it that mean something outside it."""
    module, own = name.split(":")
    here, reading = _module(module), _Reading()
    if own == ALL:
        reading.names = dict.fromkeys([*here.statements, *here.imports])
    else:
        reading.read(here.statements[own])
    if LOOSE in here.statements:
        reading.names[LOOSE] = None
    meanings = [
        (written, meaning) for written in reading.names for meaning in _meanings(module, written, reading.imports)
    ]
    folder = Path(str(_file(module))).parent
    files = [
        hashlib.sha256((folder / file).read_bytes()).hexdigest() for file in reading.files if (folder / file).is_file()
    ]
    text_digest = hashlib.sha256("\n".join([*reading.text, *files]).encode()).hexdigest()[:16]
    return text_digest, [pair for pair in meanings if pair[1] != RELEASE]


def definitions(*roots: str) -> dict[str, str]:
    """Return all definitions that count, with a digest of each, in the order of the names that lead to them.

    Raises
    ------
    LookupError
        If a root is no definition of this package.
    """
    found: dict[str, str] = {}
    waiting = []
    for root in roots:
        module, name = root.split(":")
        meanings = list(_meanings(module, name, {}))
        if not meanings:
            raise LookupError(f"{root}: the module has no such definition.")
        waiting += meanings
    for name in waiting:
        if name not in found:
            found[name], meanings_inside = _definition(name)
            waiting += [meaning for _, meaning in meanings_inside if ":" in meaning]
    return found


@cache
def code_version(*roots: str) -> str:
    """Return 16 hexadecimal digits for all code that can change the results of these definitions.

    A definition is named as in "perturbflow.pairs:pair". A name counts by the place of its meaning in the order of
    `definitions`. So moving a definition changes nothing.
    """
    found = definitions(*roots)
    place = {name: i for i, name in enumerate(found)}
    content = [
        (found[name], [(written, place.get(meaning, meaning)) for written, meaning in _definition(name)[1]])
        for name in found
    ]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def entry_point(step: str) -> str:
    """Return the function that a step's script hands to `cli.run`."""
    path = _file(step)
    assert path is not None, step
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Call) and f"{PACKAGE}.cli:run" in _meanings(step, _dotted(node.func), {}):
            return next(_meanings(step, _dotted(node.args[0]), {}))
    raise LookupError(f"{path} hands no function to {PACKAGE}.cli.run.")
