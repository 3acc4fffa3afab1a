"""Matrices of 10x Genomics in one HDF5 file, of any version of Cell Ranger."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from perturbflow.errors import InputError
from perturbflow.screens.readers.matrices import Csr, Values
from perturbflow.screens.readers.source import Block, Source


def lane_of(barcodes: pd.Index) -> np.ndarray:
    """Return the suffix of barcodes: AAACATACACCGAT-3 is of lane 3. Missing where there is none."""
    return barcodes.str.extract(r"-(\w+)$")[0].to_numpy()


def matrices_of(file: Any) -> list[str]:
    """Return the names of the 10x matrices in an HDF5 file: `matrix`, or one for each genome before Cell Ranger 3."""
    wanted = {"barcodes", "data", "indices", "indptr", "shape"}
    return [
        name
        for name in file
        if hasattr(file[name], "keys") and wanted <= set(file[name]) and {"features", "genes"} & set(file[name])
    ]


class TenxH5(Source):
    """A 10x matrix: features × barcodes by columns, which is cells × features by rows."""

    def __init__(self, group: Any, path: Path, rows_of: Callable[[Any], Values]):
        def texts(name: str) -> np.ndarray:
            return np.asarray(group[name].asstr()[()], dtype=object)

        self.files, self.place = [path], "the matrix"
        self._rows_of = rows_of  # holds the file open
        try:
            columns = {"gene_id": "features/id", "feature_types": "features/feature_type", "genome": "features/genome"}
            if "features" not in group:
                columns = {"gene_id": "genes"}
            names = texts("features/name" if "features" in group else "gene_names")
            self.var = pd.DataFrame(
                {column: texts(name) for column, name in columns.items() if name in group}, index=pd.Index(names)
            )
            self.obs = pd.DataFrame(index=pd.Index(texts("barcodes")))
            self.obs["lane"] = lane_of(self.obs.index)
            n_features, n_barcodes = (int(n) for n in group["shape"][()])
            if (n_features, n_barcodes) != (len(self.var), len(self.obs)):
                raise InputError(
                    f"{path} is damaged: its matrix has {n_features:,} features × {n_barcodes:,} barcodes, and it "
                    f"lists {len(self.var):,} and {len(self.obs):,}. Make it again."
                )
            self._matrix = Csr(group, (n_barcodes, n_features), rows_of)
        except InputError:
            raise
        except Exception as error:
            raise InputError(
                f"{path} is no whole matrix of 10x Genomics ({type(error).__name__}: {error}). Is it complete?"
            ) from error

    def blocks(self, rows: np.ndarray | None = None) -> Iterator[Block]:
        """See `Source.blocks`."""
        yield from self._matrix.blocks(
            np.arange(self._matrix.shape[0]) if rows is None else rows, self.threads, self.scratch
        )


def open_tenx(file: Any, path: Path, rows_of: Callable[[Any], Values]) -> Source:
    """Open the one matrix of a 10x file.

    Raises
    ------
    InputError
        If it holds the matrices of several genomes, or is damaged.
    """
    names = matrices_of(file)
    if len(names) > 1:
        raise InputError(
            f"{path} holds a matrix for each of several genomes ({', '.join(names)}). Save one as h5ad: "
            f"scanpy.read_10x_h5('{path.name}', genome='{names[0]}').write_h5ad(...)."
        )
    return TenxH5(file[names[0]], path, rows_of)
