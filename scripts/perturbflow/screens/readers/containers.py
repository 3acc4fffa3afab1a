"""The file and the form of a source, found by its content and not by its name.

Archives are unpacked beside themselves.
"""

import gzip
import lzma
import shutil
import tarfile
import tempfile
import zipfile
import zlib
from pathlib import Path
from typing import Any, BinaryIO

import h5py

from perturbflow.errors import InputError
from perturbflow.io.files import full_disk, is_of_full_disk

DAMAGED_ARCHIVE = (zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, EOFError, OSError, RuntimeError)
"""The errors of the readers of archives that are truncated, altered or encrypted."""

HDF5 = b"\x89HDF\r\n\x1a\n"
SAVE = "Save the screen with anndata's write_h5ad."


def content_of(path: Path, member: str | None) -> BinaryIO:
    """Open a file, a gzipped one, or the member of an archive.

    The latter two are unpacked beside it into a file without a name.
    """
    if h5py.is_hdf5(path):
        return path.open("rb")
    if not zipfile.is_zipfile(path) and not tarfile.is_tarfile(path):
        start = path.open("rb").read(64)
        if start.startswith(b"\x1f\x8b"):
            return _decompressed(path)
        if start.startswith(b"%%MatrixMarket"):
            raise InputError(matrix_alone(path))
        shown = (
            "an HTML page"
            if start.lstrip().lower().startswith((b"<!doctype", b"<html"))
            else f"it starts with {start[:8]!r}"
        )
        raise InputError(f"{path} is not an h5ad file ({shown}). {SAVE}")
    try:
        return _unpacked(path, member)
    except DAMAGED_ARCHIVE as error:
        if is_of_full_disk(error):
            raise full_disk(path.parent, f"{member} of {path.name}, which is unpacked beside it") from error
        raise InputError(f"{path}: {member} cannot be unpacked ({error}). Is the archive complete?") from error


def matrix_alone(path: Path) -> str:
    """Return the message on the matrix of a triplet that is named without its lists."""
    return (
        f"{path} is a matrix without its cells and genes. Name its folder in source.path, with barcodes.tsv and "
        f"features.tsv: {path.parent}."
    )


def _decompressed(path: Path) -> BinaryIO:
    """Decompress a gzipped HDF5 file beside it, into a file without a name."""
    try:
        with gzip.open(path) as content:
            start = content.read(len(HDF5))
            if start != HDF5:
                is_matrix = start.startswith(b"%%Matrix")
                raise InputError(
                    matrix_alone(path) if is_matrix else f"{path} is gzipped, and its content is no h5ad file. {SAVE}"
                )
            unpacked = tempfile.TemporaryFile(dir=path.parent)  # noqa: SIM115  closed with its last user
            unpacked.write(start)
            shutil.copyfileobj(content, unpacked, 2**20)
            unpacked.flush()
            return unpacked
    except DAMAGED_ARCHIVE as error:
        if is_of_full_disk(error):
            raise full_disk(path.parent, f"{path.name}, which is decompressed beside it") from error
        raise InputError(f"{path} cannot be decompressed to its end ({error}). Is it complete?") from error


def _unpacked(path: Path, member: str | None) -> BinaryIO:
    """Unpack the member of an archive beside it, into a file without a name.

    So no name in the archive leads to another place.
    """
    unpacked = tempfile.TemporaryFile(dir=path.parent)  # noqa: SIM115  closed with its last user
    with zipfile.ZipFile(path) if zipfile.is_zipfile(path) else tarfile.open(path) as archive:
        names = (
            archive.namelist()
            if isinstance(archive, zipfile.ZipFile)
            else [entry.name for entry in archive if entry.isfile()]
        )
        if member is None or member not in names:
            raise InputError(
                f"{path}: source.member is {member!r}, and the archive holds {', '.join(names[:8])}. Name one of these."
            )
        content = archive.open(member) if isinstance(archive, zipfile.ZipFile) else archive.extractfile(member)
        assert content is not None  # names are those of files
        shutil.copyfileobj(content, unpacked, 2**20)
    unpacked.flush()
    return unpacked


def damaged(path: Path, error: Exception) -> InputError:
    """Return the error for an HDF5 file that cannot be read."""
    return InputError(
        f"{path} is an HDF5 file that anndata cannot read ({type(error).__name__}: {error}). Is it complete?"
    )


def open_hdf5(path: Path, member: str | None) -> tuple[Any, BinaryIO]:
    """Return an HDF5 file, or the one that is the member of an archive, and its content to read from beside HDF5.

    Raises
    ------
    InputError
        If it is no HDF5 file, or a damaged one.
    """
    content = content_of(path, member)
    try:
        # Opened by its name where it has one: HDF5 reads faster than through Python.
        return h5py.File(path if content.name == str(path) else content, "r"), content
    except Exception as error:
        raise damaged(path, error) from error
