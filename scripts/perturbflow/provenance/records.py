"""The record beside every result: what it was made of, and whether it would be made of the same now.

Snakemake compares time stamps, and its own notes in `.snakemake/`. To it a touched file looks changed, and a damaged
one current. A folder without `.snakemake/` looks current whatever it holds. So a job writes a record beside each of its
results. The record has the values of its params (its code version among them), the content of its inputs, and the
content of the result. The plan compares (rules/common.smk).
"""

import hashlib
import json
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from perturbflow.errors import InputError
from perturbflow.io.files import atomic, content_sha256, files_in

FOLDER = ".made"
# Digests that this machine remembers; they may be deleted.
MEMORY = Path(".snakemake/perturbflow")
# Jobs that have to run again read this file: it is newer than any result, and has the reasons.
CHANGED = MEMORY / "changed"
# Downloads may be deleted to make room.
DOWNLOAD = "/raw/manifest.json"
# A file written to a moment ago may be written to again without another time stamp.
SETTLED_NS = 100_000_000


def digest(*parts: object) -> str:
    """Return 16 hexadecimal digits over values that JSON can write; dictionaries count in sorted order."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# --- the content of files -------------------------------------------------------------------------------------------


def _memory_of(path: str | Path) -> Path:
    return MEMORY / "digests" / f"{digest(str(path))}.json"


def _stamps(path: str | Path) -> list:
    """Return size and time stamps of a file.

    For a folder it returns their sum, the newest, and a digest of those of all its files.
    """
    if not Path(path).is_dir():
        found = Path(path).stat()
        return [found.st_size, found.st_mtime_ns, found.st_ctime_ns]
    inside = {file.relative_to(path).as_posix(): _stamps(file) for file in files_in(path)}
    size, modified, changed = zip(*inside.values(), strict=True) if inside else ((0,), (0,), (0,))
    return [sum(size), max(modified), max(changed), digest(inside)]


def _remember(path: str | Path, stamps: list[int], content: str) -> None:
    if MEMORY.parent.is_dir() and os.access(MEMORY.parent, os.W_OK):
        with atomic(_memory_of(path)) as partial:
            partial.write_text(json.dumps([stamps, content]), encoding="utf-8")


def _remembered(path: str | Path) -> tuple[list[int] | None, str]:
    try:
        known, content = json.loads(_memory_of(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None, ""
    return known, content


def content_digest(path: str | Path) -> str:
    """Return the SHA-256 of a file's content, or of all files of a folder.

    It is remembered for as long as sizes and time stamps stay, so that a large file is read once.
    """
    stamps = _stamps(path)
    known, content = _remembered(path)
    if known != stamps:
        content = content_sha256(path)
        if time.time_ns() - max(stamps[1:3]) > SETTLED_NS:
            _remember(path, stamps, content)
    return content


# --- records --------------------------------------------------------------------------------------------------------


def _record_file(result: str | Path) -> Path:
    return Path(result).parent / FOLDER / f"{Path(result).name}.json"


def read_record(result: str | Path) -> dict[str, Any] | None:
    """Return the record of a result (keys made_of, inputs, content); None where no readable one exists."""
    try:
        record = json.loads(_record_file(result).read_text(encoding="utf-8"))
        return {"made_of": dict(record["made_of"]), "inputs": dict(record["inputs"]), "content": str(record["content"])}
    except (OSError, ValueError, LookupError, TypeError):
        return None


def inputs_as_made(files: Iterable[str | Path]) -> dict[str, str]:
    """Return the content of a job's inputs, path → digest.

    Raises
    ------
    InputError
        If a result of an earlier job was changed since.
    """
    contents = {str(path): content_digest(path) for path in files if Path(path) != CHANGED}
    for path, content in contents.items():
        record = read_record(path)
        if record and record["content"] != content:
            raise InputError(f"{path} was changed after its job wrote it. Run again, and it is made anew.")
    return contents


def write_records(results: Iterable[str | Path], made_of: dict, inputs: dict[str, str]) -> None:
    """Write the record of each result beside it: values of params, and the content of inputs by path."""
    for result in results:
        content = {"made_of": made_of, "inputs": inputs, "content": content_digest(result)}
        with atomic(_record_file(result)) as partial:
            partial.write_text(json.dumps(content, indent=1, sort_keys=True, default=str) + "\n", encoding="utf-8")


# --- for the plan ---------------------------------------------------------------------------------------------------


def why_stale(results: Iterable[str], made_of: dict, inputs: Iterable[str]) -> str | None:
    """Return in one sentence why the results of a job cannot stay, or None.

    Parameters
    ----------
    results
        Files that the job writes. Where some exist and one is missing, that counts: Snakemake misses it only where a
        job asks for it.
    made_of
        Values of its params now.
    inputs
        Files that it reads now.
    """
    made_of = json.loads(json.dumps(made_of, default=str))
    inputs, results = set(inputs), list(results)
    gone = [result for result in results if not Path(result).exists()]
    if gone and len(gone) < len(results):
        return f"{gone[0]} is missing"
    for result in [] if gone else results:
        record = read_record(result)
        if record is None:
            return f"{result}: it has no readable record"
        if record["made_of"] != made_of:
            was = record["made_of"]
            names = sorted(
                name
                for name in {*was, *made_of}
                if was.get(name) != made_of.get(name) or (name in was) != (name in made_of)
            )
            return f"{result}: other {', '.join(names)} than when it was made"
        if set(record["inputs"]) != inputs:
            return f"{result}: it was made from other files ({', '.join(sorted(inputs ^ set(record['inputs']))[:3])})"
        missing = [path for path in sorted(inputs) if not Path(path).exists()]
        if lost := [path for path in missing if not path.endswith(DOWNLOAD)]:
            return f"{result}: {', '.join(lost[:3])} is not there any more"
        if changed := [
            path for path in sorted(inputs - {*missing}) if _content_of_input(path) != record["inputs"][path]
        ]:
            return f"{result}: {', '.join(changed[:3])} changed since it was made"
        if content_digest(result) != record["content"]:
            return f"{result}: it was changed after its job wrote it"
    return None


def _content_of_input(path: str) -> str:
    """Return the content of a file; for a result, the content that its job wrote.

    If the result holds another content by now, its job runs again, and so do those that depend on it.
    """
    record = read_record(path)
    return record["content"] if record else content_digest(path)


def _mtime(path: str) -> int:
    return Path(path).stat().st_mtime_ns


def is_unchanged(path: str, results: Iterable[str]) -> bool:
    """Return whether all results that are there were made from the present content of a file."""
    records = [read_record(result) for result in results if Path(result).exists()]
    if not records or not Path(path).exists():
        return False
    return all(record is not None and record["inputs"].get(path) == content_digest(path) for record in records)


def outdate(results: Iterable[str]) -> None:
    """Make results older than the mark; results of another machine may have time stamps in the future."""
    for result in results:
        if Path(result).exists() and _mtime(result) >= _mtime(str(CHANGED)):
            os.utime(result, (1, 1))  # Snakemake takes 0 for no time at all


def renew(benchmark: str, results: Iterable[str]) -> None:
    """Make the table of a job's time and memory as new as its results: Snakemake counts it among them."""
    oldest = min(map(_mtime, results))
    if Path(benchmark).exists() and _mtime(benchmark) < oldest:
        os.utime(benchmark, ns=(oldest, oldest))


def settle(folder: str | Path) -> None:
    """Set back the time stamps of results in a folder that were only touched, so that none is newer than its products.

    Copying or touching a folder puts its files in any order, and Snakemake takes newer files for changed.
    """
    results = [path.parent.parent / path.stem for path in Path(folder).rglob(f"{FOLDER}/*.json")]
    times = {str(result): _mtime(str(result)) for result in results if result.exists()}
    records = {result: record for result in times if (record := read_record(result))}
    waiting = list(records)
    while waiting:
        result = waiting.pop()
        for path, content in records[result]["inputs"].items():
            if path in records and times[path] > times[result] and records[path]["content"] == content:
                times[path] = times[result]
                waiting.append(path)
    for result in records:
        if times[result] < _mtime(result):
            _set_back(result, times[result])


def _set_back(path: str, mtime: int) -> None:
    stamps = _stamps(path)
    os.utime(path, ns=(mtime, mtime))
    known, content = _remembered(path)
    if known == stamps:
        _remember(path, _stamps(path), content)
