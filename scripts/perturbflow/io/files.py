"""Files that appear whole or not at all, and the digests of their content."""

import errno
import fcntl
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from perturbflow.errors import InputError

FULL = (errno.ENOSPC, errno.EDQUOT)


def is_of_full_disk(error: BaseException | None) -> bool:
    """Return whether a full disk led to an error.

    HDF5 and torch say so in words only, or raise another error after it.
    """
    while error is not None:
        if (isinstance(error, OSError) and error.errno in FULL) or any(
            os.strerror(number) in str(error) for number in FULL
        ):
            return True
        error = error.__cause__ or error.__context__
    return False


def full_disk(folder: str | Path, wanted: str) -> InputError:
    """Return the error of a full disk."""
    free = shutil.disk_usage(folder).free
    return InputError(
        f"{folder}: no space left for {wanted} ({free:,} bytes are free). Free some, or start where there is more, and "
        "run again: the files that are there are kept and continued."
    )


def require_room(folder: Path, n_bytes: float, wanted: str) -> None:
    """Raise InputError where a folder's disk has less room than a file will take."""
    folder = _existing(folder)
    free = shutil.disk_usage(folder).free
    if free < n_bytes:
        raise InputError(
            f"{folder}: {wanted} will take about {n_bytes / 1e9:.2g} GB, and {free / 1e9:.2g} GB are free. "
            "Free some, or start where there is more."
        )


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """Yield a path beside `path` to write to; it takes the final name only when the block ends without an error.

    Raises
    ------
    InputError
        If the disk is full or the folder cannot be written to.
    """
    path = Path(path)
    if path.suffix == ".h5ad":
        remove_leftovers(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.stem}.", suffix=f".part{path.suffix}", dir=path.parent)
    except OSError as error:
        if is_of_full_disk(error):
            raise full_disk(_existing(path.parent), path.name) from error
        raise InputError(
            f"{path} cannot be written: {error.strerror}. Make its folder writable, or start elsewhere."
        ) from error
    os.close(handle)
    partial = Path(name)
    try:
        with _errors_of_closing() as errors:
            yield partial
        if errors:
            raise errors[0]
        partial.chmod(0o644)
        partial.replace(path)
    except Exception as error:
        if isinstance(error, InputError) or not is_of_full_disk(error):
            raise
        failure = full_disk(path.parent, path.name)
        # HDF5 tries once more when the process ends, and crashes where there is still no room.
        with suppress(FileNotFoundError):  # pandas has removed it already
            os.truncate(partial, 0)
        raise failure from error
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def _errors_of_closing() -> Iterator[list[BaseException]]:
    """Collect the errors that h5py only prints.

    If closing an object fails, its content is lost, just as if a write failed.
    """
    errors: list[BaseException] = []
    hooks = sys.unraisablehook, sys.excepthook
    sys.unraisablehook = lambda unraisable: errors.append(unraisable.exc_value or RuntimeError(unraisable.err_msg))
    sys.excepthook = lambda kind, error, traceback: errors.append(error)
    try:
        yield errors
    finally:
        sys.unraisablehook, sys.excepthook = hooks


def _existing(folder: Path) -> Path:
    """Return a folder, or the nearest one above it that exists."""
    return next(here for here in (folder, *folder.absolute().parents) if here.exists())


def require_writable(folders: Iterable[str | Path]) -> None:
    """Raise InputError unless files can be made in all folders, or where these would be made."""
    for folder in dict.fromkeys(_existing(Path(folder)) for folder in folders):
        if not os.access(folder, os.W_OK | os.X_OK):
            raise InputError(
                f"{folder.absolute()} cannot be written to. Make it writable, or start where there is a folder that is."
            )


def remove_leftovers(path: str | Path) -> None:
    """Remove the HDF5 files that a killed process left beside `path`.

    A file that is being written is locked, and stays.
    """
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
        content = json.loads(Path(path).read_text(encoding="utf-8-sig"))  # editors of Windows write a byte order mark
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: a JSON object is expected, found a {type(content).__name__}.")
    return content


def file_digest(path: str | Path, algorithm: str = "sha256") -> str:
    """Return the hexadecimal digest of a file's content."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()


def files_in(folder: str | Path) -> list[Path]:
    """Return all files of a folder and of those below it, in the order of their names."""
    return sorted(path for path in Path(folder).rglob("*") if path.is_file())


def bytes_of(path: str | Path) -> int:
    """Return the size of a file, or of all files of a folder."""
    path = Path(path)
    return sum(file.stat().st_size for file in files_in(path)) if path.is_dir() else path.stat().st_size


def content_sha256(path: str | Path) -> str:
    """Return the SHA-256 of a file's content.

    For a folder it is that of a list of its files with theirs, as `sha256sum` prints it.
    """
    path = Path(path)
    if not path.is_dir():
        return file_digest(path)
    lines = [f"{file_digest(file)}  {file.relative_to(path).as_posix()}\n" for file in files_in(path)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def manifest_files(manifest: str | Path, whole: bool = False) -> dict[str, Path]:
    """Return role → path of the files in a manifest, which lie beside it.

    With `whole` it reads them and compares checksums, too.

    Raises
    ------
    InputError
        If a file is missing or was changed after its download.
    """
    manifest = Path(manifest)
    found = {}
    for role, entry in read_json(manifest)["files"].items():
        path = manifest.parent / entry["file"]
        is_there = path.is_file() and path.stat().st_size == entry["bytes"]
        if not is_there or (whole and file_digest(path) != entry["sha256"]):
            raise InputError(
                f"{path} is missing or not the {entry['bytes']:,} bytes that were downloaded. Delete {manifest} and "
                "run again."
            )
        found[role] = path
    return found
