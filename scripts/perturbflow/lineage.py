"""What a result was made of, as a digest: the code that made it, its configuration and what it was made from.

Snakemake sees neither an edit in an imported module nor the difference between a touched and a changed file.
Every rule therefore carries a `lineage` as a parameter, and time stamps play no part (rules/common.smk): a result is stale
when the digest differs, and only then. Comments, docstrings and layout are not part of it.
"""

import ast
import hashlib
import json
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
SCRIPTS = PACKAGE.parent

# Files up to this size are hashed whole; of larger ones, blocks spread evenly over the file.
WHOLE_FILE_BYTES = 64 * 2**20
SAMPLED_BLOCKS, BLOCK_BYTES = 512, 64 * 2**10


def digest(*parts: object) -> str:
    """Return 16 hexadecimal digits over values that JSON can write; dictionaries count in sorted order."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@cache
def _parsed(path: Path) -> ast.Module:
    tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                node.body = node.body[1:] or [ast.Pass()]
    return tree


def _module_file(name: str) -> Path | None:
    """Return the file of a dotted name within this package, or None for anything else."""
    if name.split(".")[0] != PACKAGE.name:
        return None
    path = SCRIPTS.joinpath(*name.split("."))
    for candidate in (path.with_suffix(".py"), path / "__init__.py"):
        if candidate.exists():
            return candidate
    return None


@cache
def _imports(path: Path) -> set[Path]:
    names: set[str] = set()
    for node in ast.walk(_parsed(path)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return {file for name in names if (file := _module_file(name))}


def _files_beside(path: Path) -> list[Path]:
    """Return the tables and templates beside a module that it names: they are part of what it does."""
    constants = {str(node.value) for node in ast.walk(_parsed(path)) if isinstance(node, ast.Constant)}
    named = sorted(path.parent / name for name in constants if name.endswith((".tsv", ".tsv.gz", ".html")))
    return [file for file in named if file.is_file()]


def source_files(*roots: Path) -> list[Path]:
    """Return the files of this package that the roots import, directly or not, the roots included."""
    seen: set[Path] = set()
    waiting = [Path(root).resolve() for root in roots]
    while waiting:
        path = waiting.pop()
        if path not in seen:
            seen.add(path)
            waiting.extend(_imports(path))
    return sorted(seen)


@cache
def _content(path: Path) -> str:
    return digest(path.name, ast.dump(_parsed(path)), [file_fingerprint(file) for file in _files_beside(path)])


@cache
def code_digest(*roots: Path) -> str:
    """Return a digest of the code in `roots` and all of this package that it imports, with its tables and templates."""
    return digest([_content(path) for path in source_files(*roots)])


def file_fingerprint(path: str | Path) -> str:
    """Return a digest of a file's content that takes milliseconds; its time stamps play no part.

    Above `WHOLE_FILE_BYTES` it samples: an edit in place that changes neither the size nor any sampled block is
    missed, which no h5ad writer produces.
    """
    path = Path(path)
    size = path.stat().st_size
    fingerprint = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        if size <= WHOLE_FILE_BYTES:
            for block in iter(lambda: file.read(2**20), b""):
                fingerprint.update(block)
        else:
            for i in range(SAMPLED_BLOCKS):
                file.seek(i * (size - BLOCK_BYTES) // (SAMPLED_BLOCKS - 1))
                fingerprint.update(file.read(BLOCK_BYTES))
    return fingerprint.hexdigest()[:16]
