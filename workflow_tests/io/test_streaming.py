"""Rows laid aside by label: those of a file are those of memory, whatever their order, and a small disk is told."""

from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pytest
from scipy import sparse

from perturbflow.errors import InputError
from perturbflow.io import files, streaming
from perturbflow.io.hdf5 import CsrRows
from perturbflow.io.streaming import RowsByLabel

N_CELLS, N_GENES = 300, 40


@pytest.fixture
def matrix() -> sparse.csr_matrix:
    """Return a matrix with stored zeros and an empty row."""
    rng = np.random.default_rng(0)
    X = sparse.random(N_CELLS, N_GENES, 0.3, "csr", np.float32, rng)
    X.data[::7] = 0.0
    X[11] = 0.0
    return X.tocsr()


@pytest.fixture
def on_disk(matrix: sparse.csr_matrix, tmp_path: Path) -> CsrRows:
    """Return the same matrix in a file."""
    ad.AnnData(matrix).write_h5ad(tmp_path / "cells.h5ad")
    return CsrRows(h5py.File(tmp_path / "cells.h5ad")["X"], tmp_path / "cells.h5ad")


@pytest.fixture
def rows() -> dict[str, np.ndarray]:
    """Return rows of three labels in random order; most rows have none."""
    drawn = np.random.default_rng(1).permutation(N_CELLS)
    return {"B": drawn[:50], "A": drawn[50:51], "empty": np.append(11, drawn[drawn != 11][60:80])}


@pytest.mark.parametrize("is_gathered", [True, False])
def test_rows_of_a_file_are_those_of_memory(
    is_gathered: bool,
    matrix: sparse.csr_matrix,
    on_disk: CsrRows,
    rows: dict[str, np.ndarray],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(streaming, "ROWS_AT_ONCE", 16)
    if is_gathered:
        laid = RowsByLabel.gathered(on_disk, rows)
    else:  # fed by a pass of the caller, who removes zeros
        laid = RowsByLabel(on_disk, rows)
        for part in streaming.row_blocks(N_CELLS):
            X = matrix[part]
            X.eliminate_zeros()
            laid.put(part, X)
    for label, of_label in rows.items():
        expected = matrix[of_label].toarray()
        assert np.array_equal(laid.of(label).toarray(), expected)
        assert np.array_equal(RowsByLabel.gathered(matrix, rows).of(label).toarray(), expected)
    assert not [path for path in on_disk.path.parent.iterdir() if path != on_disk.path], "nothing is left"


def test_a_disk_without_room_is_told_before_anything_is_read(
    on_disk: CsrRows, rows: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 100}))
    with pytest.raises(InputError, match=r"laid aside by perturbation, will take about .* and 1e-07 GB are free"):
        RowsByLabel(on_disk, rows)
