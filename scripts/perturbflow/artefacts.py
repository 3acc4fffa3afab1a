"""Trained models on disk: arrays as npz, networks as checkpoints; neither runs code when it is loaded."""

import zipfile
import zlib
from pathlib import Path

import numpy as np

from perturbflow.errors import InputError
from perturbflow.files import atomic


def save_artefact(path: Path, artefact: dict[str, object]) -> None:
    """Write an artefact; the suffix of the path decides the format."""
    with atomic(path) as partial:
        if path.suffix == ".npz":
            np.savez_compressed(partial, **artefact)
        else:
            import torch  # closed forms need no torch

            torch.save(artefact, partial)


def load_artefact(path: Path) -> dict[str, object]:
    """Read an artefact; InputError where the file is damaged."""
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                return {name: arrays[name] for name in arrays.files}
        import torch

        return torch.load(path, map_location="cpu", weights_only=True)
    except (zipfile.BadZipFile, zlib.error, OSError, ValueError, RuntimeError, EOFError, KeyError) as error:
        raise InputError(
            f"{path} is damaged and cannot be loaded ({error}). Delete it and run again: training will be repeated."
        ) from error
