"""Files that appear whole or not at all, and the digests of their content."""

import fcntl
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from perturbflow.errors import InputError


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """Yield a path beside `path` to write to; it takes the final name only when the block ends without an error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.stem}.", suffix=f".part{path.suffix}", dir=path.parent)
    os.close(handle)
    partial = Path(name)
    try:
        yield partial
        partial.chmod(0o644)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def remove_leftovers(path: str | Path) -> None:
    """Remove what a killed process left beside `path` when it wrote it as HDF5; a file that is being written is locked, and stays."""
    path = Path(path)
    for leftover in path.parent.glob(f".{path.stem}.*.part{path.suffix}"):
        with suppress(OSError), leftover.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            leftover.unlink()


def write_json(path: str | Path, content: object) -> None:
    """Write JSON with sorted keys, so that equal content is equal bytes."""
    with atomic(path) as partial:
        partial.write_text(json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: str | Path) -> dict:
    """Read a JSON object; InputError names the file where it is none."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: a JSON object is expected, found a {type(content).__name__}.")
    return content


def file_digest(path: str | Path, algorithm: str = "sha256") -> str:
    """Return the hexadecimal digest of a file's content."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()


def manifest_files(manifest: str | Path) -> dict[str, Path]:
    """Return role → path of the files that a manifest names, which lie beside it.

    Raises
    ------
    InputError
        If a file is missing or has another size than was downloaded.
    """
    manifest = Path(manifest)
    found = {}
    for role, entry in read_json(manifest)["files"].items():
        path = manifest.parent / entry["file"]
        if not path.is_file() or path.stat().st_size != entry["bytes"]:
            raise InputError(
                f"{path} is missing or not the {entry['bytes']:,} bytes that were downloaded. Delete {manifest} and run again."
            )
        found[role] = path
    return found
