"""Verify that a file is the declared one: no web page, of its format, of the declared size and checksums."""

import gzip
import hashlib
import re
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path

import h5py

BLOCK_BYTES = 2**20
# The start of a web page of a login, a firewall or a portal is enough to recognize it.
HEAD_BYTES = 1024
WEB_PAGE = re.compile(
    rb"(?:\xef\xbb\xbf)?\s*(?:<\?xml[^>]*>\s*)?(?:<!--.*?-->\s*)*<(?:!doctype\s+html|html|head|body|script|title)\b",
    re.I | re.S,
)
A_WEB_PAGE = "the host answered with a web page instead of the file"


class UnfitError(Exception):
    """A file is not the declared one; the message has the reason."""


def is_web_page(start: bytes) -> bool:
    """Return whether a file that starts so is HTML."""
    return WEB_PAGE.match(start) is not None


def digests(path: Path, algorithms: Iterable[str]) -> dict[str, str]:
    """Return hexadecimal digests of a file's content, read once."""
    hashes = {algorithm: hashlib.new(algorithm, usedforsecurity=False) for algorithm in algorithms}
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            for digest in hashes.values():
                digest.update(block)
    return {algorithm: digest.hexdigest() for algorithm, digest in hashes.items()}


# --- formats --------------------------------------------------------------------------------------------------------


def _starts_with(signature: bytes) -> Callable[[Path], bool]:
    def is_so(path: Path) -> bool:
        with path.open("rb") as file:
            return file.read(len(signature)) == signature

    return is_so


def _read_hdf5(path: Path) -> None:
    h5py.File(path).close()  # compares the end of the file with the one written down in it


def _read_gzip(path: Path) -> None:
    with gzip.open(path) as file:
        while file.read(BLOCK_BYTES):
            pass  # the length and CRC at the end are compared


def _read_zip(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        if broken := archive.testzip():
            raise zipfile.BadZipFile(f"bad CRC of {broken}")


def _read_tar(path: Path) -> None:
    with tarfile.open(path, "r:") as archive:
        archive.getmembers()
    with path.open("rb") as file:
        file.seek(-2 * tarfile.BLOCKSIZE, 2)
        if file.read().strip(b"\0"):
            raise tarfile.ReadError("no end of the archive")


Format = tuple[str, Callable[[Path], bool], Callable[[Path], object]]

HDF5: Format = ("an HDF5 file", h5py.is_hdf5, _read_hdf5)
GZIP: Format = ("a gzip file", _starts_with(b"\x1f\x8b"), _read_gzip)
ZIP: Format = ("a zip archive", _starts_with(b"PK"), _read_zip)
TAR: Format = ("a tar archive", tarfile.is_tarfile, _read_tar)
ANYTHING: Format = ("a file of any kind", lambda path: True, lambda path: None)
# Suffix → name of the format, whether a file starts like one, and a reader that fails on a truncated one.
FORMATS = {
    ".h5ad": HDF5,
    ".h5mu": HDF5,
    ".h5": HDF5,
    ".hdf5": HDF5,
    ".gz": GZIP,
    ".tgz": GZIP,
    ".zip": ZIP,
    ".tar": TAR,
}


# --- the check ------------------------------------------------------------------------------------------------------


def verify(path: Path, file: dict, recorded: dict | None = None) -> str:
    """Return the sha256 of a valid file.

    Parameters
    ----------
    path
        The file, under any name.
    file
        Its name, and bytes, md5, sha256 as far as they are declared.
    recorded
        For a file without a published checksum: bytes, sha256 and time (`retrieved`) of the first download, if there
        was one, and `place`, the file with this record.

    Raises
    ------
    UnfitError
        With the found and the expected value. Without a published checksum the whole file is read in the format of its
        name, since nothing else shows that it is truncated.
    """
    n_bytes = path.stat().st_size
    with path.open("rb") as content:
        start = content.read(HEAD_BYTES)
    if is_web_page(start):
        raise UnfitError(A_WEB_PAGE)
    if "bytes" in file and n_bytes != file["bytes"]:
        raise UnfitError(
            f"{n_bytes:,} bytes arrived, {file['bytes']:,} are declared: the download is truncated or the file has "
            "changed"
        )
    form, looks_so, read = FORMATS.get(Path(file["name"]).suffix.lower(), ANYTHING)
    if not looks_so(path):
        raise UnfitError(f"it is not {form}, as its name says: it starts with {start[:8]!r}")
    found = digests(path, ["sha256", *(["md5"] if "md5" in file else [])])
    for algorithm in ("md5", "sha256"):
        if algorithm in file and found[algorithm] != file[algorithm]:
            raise UnfitError(
                f"wrong checksum, {algorithm} is {found[algorithm]}, {file[algorithm]} is declared. The file at the "
                "source has changed or something else was served in its place. If the new file is right, update the "
                "dataset's block"
            )
    if "checksum" in file:
        try:
            read(path)
        except (OSError, EOFError, zlib.error, zipfile.BadZipFile, tarfile.TarError, RuntimeError) as error:
            raise UnfitError(f"it is truncated or damaged: read as {form} it ends in '{error}'") from error
    if recorded and (n_bytes, found["sha256"]) != (recorded["bytes"], recorded["sha256"]):
        raise UnfitError(
            f"it is not the file that was downloaded first: {n_bytes:,} bytes with sha256 {found['sha256']}, but "
            f"{recorded['bytes']:,} bytes with sha256 {recorded['sha256']} on {recorded['retrieved']}. If the new file "
            f"is right, delete {recorded['place']}"
        )
    return found["sha256"]
