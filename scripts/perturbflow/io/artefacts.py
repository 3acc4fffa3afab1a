"""Trained models on disk: arrays as npz, networks as checkpoints; neither runs code when it is loaded."""

import pickle
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from perturbflow.errors import InputError
from perturbflow.io.files import atomic

DAMAGED = (
    zipfile.BadZipFile, zlib.error, OSError, ValueError, RuntimeError, EOFError, LookupError, AttributeError, TypeError,
    pickle.UnpicklingError,
)  # fmt: skip
"""The errors of numpy and torch for files that are truncated, altered, or something else."""


def save_artefact(path: Path, artefact: dict[str, Any]) -> None:
    """Write an artefact; the suffix of the path decides the format."""
    if path.suffix == ".npz":
        with atomic(path) as partial:
            np.savez_compressed(partial, **artefact)
    else:
        save_checkpoint(path, artefact)


def load_artefact(path: Path) -> dict[str, Any]:
    """Read an artefact; InputError where the file is damaged."""
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                artefact = {name: arrays[name] for name in arrays.files}
            if not all(isinstance(array, np.ndarray) for array in artefact.values()):
                raise TypeError("it holds other things than arrays")
            return artefact
        return load_checkpoint(path)
    except DAMAGED as error:
        raise InputError(
            f"{path} is damaged and cannot be loaded ({error}). Delete it and run again: training will be repeated."
        ) from error


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Write tensors and plain values as a checkpoint."""
    import torch  # closed forms need no torch

    # Errors of Python's own file name the cause.
    with atomic(path) as partial, partial.open("wb") as file:
        torch.save(content, file)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint.

    It raises one of `DAMAGED` where the file was changed, or holds more than tensors and plain values.
    """
    import torch

    # torch reads flipped bits as numbers; the checksums of the archive find them.
    with zipfile.ZipFile(path) as archive:
        if broken := archive.testzip():
            raise zipfile.BadZipFile(f"bad CRC-32 of '{broken}'")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # torch's own message explains how to load it nevertheless.
        raise pickle.UnpicklingError("it holds more than tensors and plain values, and could run code") from error
