"""Open a screen's file, folder or archive.

obs and var are read at once, counts in blocks of cells, so that a source of any size fits in memory.
"""

import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py

from perturbflow.errors import InputError
from perturbflow.io.hdf5 import Rows
from perturbflow.registry.sources import folder_kind, layout_of, problem_of_folder, renaming
from perturbflow.screens.readers.anndatas import open_anndata
from perturbflow.screens.readers.containers import damaged, open_hdf5
from perturbflow.screens.readers.labels import with_labels
from perturbflow.screens.readers.matrices import Values
from perturbflow.screens.readers.modalities import open_mudata
from perturbflow.screens.readers.source import InMemory, NotCounts, SomeGenes, Source, as_counts
from perturbflow.screens.readers.tenx import matrices_of, open_tenx
from perturbflow.screens.readers.triplets import Place, Triplet, triplets_in
from perturbflow.screens.readers.zarrs import ZarrRows, open_zarr
from perturbflow.wording import capital

__all__ = ["InMemory", "NotCounts", "SomeGenes", "Source", "as_counts", "open_source"]

PARTS = {"matrix", "barcodes", "features", "genes"}
"""Roles of the files of a 10x triplet."""


def open_source(files: dict[str, Path], dataset: dict) -> Source:
    """Open a source by its format.

    It may be an h5ad, an h5mu, the h5 or the folder of Cell Ranger, or a zarr store. It may be an archive that holds
    one of these.

    Parameters
    ----------
    files
        Role → path: `file`, or the parts of a 10x triplet; with them `labels`, a table that is joined to obs by
        barcode.
    dataset
        The dataset's block.

    Raises
    ------
    InputError
        If it is none of these, or damaged.
    """
    parts = {role: path for role, path in files.items() if role != "labels"}
    if set(parts) == {"file"}:
        source = _opened(parts["file"], dataset)
    elif "matrix" in parts and set(parts) <= PARTS:
        _refuse(dataset, parts["matrix"], "counts", "modality")
        source = Triplet({role: Place(path) for role, path in parts.items()})
    else:
        raise InputError(
            f"a source of several files ({', '.join(files)}) needs a recipe that reads them: name it in the dataset's "
            "block."
        )
    if "labels" in files:
        source.obs = with_labels(source.obs, files["labels"], source.files[0])
    return source


def _refuse(dataset: dict, path: Path, *keys: str) -> None:
    """Raise InputError if a block has a key that this kind of source does not need."""
    if "counts" in keys and "counts" in dataset:
        raise InputError(f"{path} holds its counts in one place. Leave counts out of the block.")
    if "modality" in keys and "modality" in dataset["source"]:
        raise InputError(f"{path} has no modalities, as an h5mu has. Leave source.modality out of the block.")


def _opened(path: Path, dataset: dict) -> Source:
    if path.is_dir():
        return _opened_folder(path, dataset)
    if (
        not h5py.is_hdf5(path)
        and "member" not in dataset["source"]
        and tarfile.is_tarfile(path)
        and (experiments := triplets_in(path))
    ):
        return _one_triplet(path, experiments, dataset)
    file, content = open_hdf5(path, dataset["source"].get("member"))

    def rows_of(stored: h5py.Dataset) -> Values:
        return Rows(stored, content.fileno(), path)

    try:
        if not matrices_of(file):
            return _of_scverse(file, path, rows_of, dataset)
        _refuse(dataset, path, "counts", "modality")
        return open_tenx(file, path, rows_of)
    except (OSError, RuntimeError, LookupError, ValueError) as error:  # HDF5's at a damaged file, wherever it is met
        raise damaged(path, error) from error


def _opened_folder(path: Path, dataset: dict) -> Source:
    """Open a zarr store, or the folder of a 10x triplet."""
    if "member" in dataset["source"]:
        raise InputError(f"{path} is a folder, and source.member is for archives. Name its content with source.path.")
    if problem := problem_of_folder(path):
        raise InputError(capital(problem))
    if folder_kind(path) == "zarr":
        # A sparse matrix has no empty chunk; a dense one may have some.
        return _of_scverse(
            open_zarr(path), path, lambda array: ZarrRows(array, path, is_whole=array.ndim == 1), dataset
        )
    if layout := layout_of(path):
        _refuse(dataset, path, "counts", "modality")
        return Triplet({role: Place(file) for role, file in layout.items()}, is_by_cell=True)
    return _one_triplet(path, triplets_in(path), dataset)


def _one_triplet(path: Path, experiments: dict[str, dict[str, Place]], dataset: dict) -> Source:
    """Open the one 10x triplet of a folder or tar."""
    _refuse(dataset, path, "counts", "modality")
    sets = {name: places for name, places in experiments.items() if "matrix" in places}
    if len(sets) != 1:
        raise InputError(
            f"{path} holds {len(sets) or 'no'} 10x matrices ({', '.join(sets) or ', '.join(experiments)}). "
            "Put the matrix, barcodes and features of each into a folder of their own."
        )
    (places,) = sets.values()
    missing = [
        role
        for role in ("barcodes", "features")
        if role not in places and (role != "features" or "genes" not in places)
    ]
    if missing:
        names = (
            sorted(file.name for file in path.iterdir())
            if path.is_dir()
            else [place.member or "" for place in places.values()]
        )
        raise InputError(
            f"{path} holds {', '.join(names[:8])}: {' and '.join(missing)} of the triplet is missing.{renaming(names)}"
        )
    # Other tables that GEO names alike were not asked for.
    return Triplet({role: place for role, place in places.items() if role in PARTS})


def _of_scverse(file: Any, path: Path, rows_of: Callable[[Any], Values], dataset: dict) -> Source:
    """Open AnnData or MuData."""
    if "mod" in file:
        return open_mudata(file, path, rows_of, dataset["source"].get("modality"), dataset.get("counts"))
    _refuse(dataset, path, "modality")
    if not {"obs", "var"} <= set(file):
        shown = ", ".join(list(map(str, file))[:8]) or "nothing"
        raise InputError(
            f"{path} holds {shown}: it is neither AnnData, MuData nor a 10x matrix. Is it complete? Save the screen "
            "with anndata's write_h5ad."
        )
    return open_anndata(file, path, rows_of, dataset.get("counts"))
