"""Sources of any layout give the same screen, in bounded memory; damage is told, and a killed job leaves nothing."""

import errno
import hashlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
from conftest import OFF, REPOSITORY, dataset_block
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy
from scipy import sparse

from perturbflow.errors import InputError
from perturbflow.io import hdf5
from perturbflow.io.hdf5 import Appended, Rows
from perturbflow.io.kernels import pack_counts, unpack_counts
from perturbflow.io.streaming import Spool, in_order
from perturbflow.screens.harmonize import harmonize
from perturbflow.screens.readers import matrices, open_source, source

LIMITS = {
    "min_counts": 850,
    "min_genes": 74,
    "max_pct_mt": 1.2,
    "min_cells_per_gene": 330,
    "min_cells_per_perturbation": 18,
}


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make blocks of a few cells, so that a small screen has many, and chunks that a block does not fill."""
    for module in (source, matrices):
        monkeypatch.setattr(module, "BLOCK_VALUES", 80 * 37)
    monkeypatch.setattr(matrices, "BLOCK_ENTRIES", 1500)
    monkeypatch.setattr(hdf5, "CHUNK", 1000)


def saved(screen: ad.AnnData, path: Path, matrix: Callable[[h5py.File, np.ndarray], None]) -> Path:
    """Write a screen, its X by `matrix`, which gets the open file and the counts."""
    counts = screen.X.toarray()
    ad.AnnData(obs=screen.obs, var=screen.var).write_h5ad(path)
    with h5py.File(path, "r+") as file:
        if "X" in file:
            del file["X"]
        matrix(file, counts)
    return path


def dense(dtype: type = np.float32, **options: object) -> Callable[[h5py.File, np.ndarray], None]:
    """Return a writer of a dense X."""

    def write(file: h5py.File, counts: np.ndarray) -> None:
        X = file.create_dataset("X", data=counts.astype(dtype), **options)
        X.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})

    return write


def write_sparse(
    file: h5py.File, name: str, matrix: sparse.csr_matrix | sparse.csc_matrix, is_old: bool = False, **options: object
) -> None:
    """Write CSR or CSC as anndata does, or as its first versions did."""
    group = file.create_group(name)
    for part in ("data", "indices", "indptr"):
        group.create_dataset(part, data=getattr(matrix, part), **options)
    if is_old:
        group.attrs.update({"h5sparse_format": matrix.format, "h5sparse_shape": matrix.shape})
    else:
        group.attrs.update(
            {"encoding-type": f"{matrix.format}_matrix", "encoding-version": "0.1.0", "shape": matrix.shape}
        )


def compressed(
    kind: Callable, is_old: bool = False, dtype: type = np.float32, **options: object
) -> Callable[[h5py.File, np.ndarray], None]:
    """Return a writer of a sparse X."""
    return lambda file, counts: write_sparse(file, "X", kind(counts.astype(dtype)), is_old, **options)


def unsorted(file: h5py.File, counts: np.ndarray) -> None:
    """Write CSR with genes in descending order, one count in two parts, and stored zeros."""
    matrix = sparse.csr_matrix(counts)
    parts: tuple[list, list, list] = [], [], [0]
    for row in range(matrix.shape[0]):
        indices, data = matrix[row].indices[::-1], matrix[row].data[::-1]
        parts[0].extend([*indices, indices[0], 0])
        parts[1].extend([data[0] - 1, *data[1:], 1, 0])
        parts[2].append(len(parts[0]))
    matrix = sparse.csr_matrix(
        (np.array(parts[1], np.float32), np.array(parts[0]), np.array(parts[2])), shape=matrix.shape
    )
    write_sparse(file, "X", matrix)


def in_a_layer(kind: Callable) -> Callable[[h5py.File, np.ndarray], None]:
    """Return a writer of counts in layers/counts under a normalized X."""

    def write(file: h5py.File, counts: np.ndarray) -> None:
        # Whole blocks of X could be counts: only what follows shows that they are none.
        normalized = counts.copy()
        normalized[300:] = np.log1p(normalized[300:])
        dense()(file, normalized)
        if isinstance(file.get("layers"), h5py.Group):
            del file["layers"]
        write_sparse(file.create_group("layers"), "counts", kind(counts))

    return write


FORMS = {
    "dense": dense(),
    "dense, gzip": dense(chunks=(41, 13), compression="gzip"),
    "dense, gzip and shuffle": dense(chunks=(41, 13), compression="gzip", shuffle=True),
    "dense, chunks of many cells": dense(chunks=(500, 7), compression="gzip"),
    "dense, chunks of all cells through HDF5": dense(chunks=(600, 1), compression="lzf"),
    "dense, lzf": dense(chunks=(41, 13), compression="lzf"),
    "dense, chunks": dense(chunks=(64, 80)),
    "dense, checksums": dense(chunks=(41, 13), compression="gzip", fletcher32=True),
    "dense, float64": dense(np.float64, chunks=(64, 80), compression="gzip"),
    "dense, int64": dense(np.int64),
    "dense, uint32": dense(np.uint32, chunks=(64, 80), compression="gzip", shuffle=True),
    "dense, big-endian": dense(np.dtype(">f4"), chunks=(41, 13), compression="gzip"),
    "CSR": compressed(sparse.csr_matrix),
    "CSR, gzip": compressed(sparse.csr_matrix, chunks=(77,), compression="gzip"),
    "CSR, int64": compressed(sparse.csr_matrix, dtype=np.int64),
    "CSR, unsorted": unsorted,
    "CSC": compressed(sparse.csc_matrix),
    "CSC, gzip": compressed(sparse.csc_matrix, chunks=(77,), compression="gzip", dtype=np.float64),
    "CSC of the first versions": compressed(sparse.csc_matrix, is_old=True),
    "layer, CSR": in_a_layer(sparse.csr_matrix),
    "layer, CSC": in_a_layer(sparse.csc_matrix),
}


@pytest.fixture(scope="module")
def screen(tiny_screen: Callable) -> ad.AnnData:
    """Return a screen with a perturbation of few cells, unassigned cells, a doubled gene, and a rare one."""
    screen = tiny_screen()
    labels = screen.obs["perturbation"].astype(object).to_numpy().copy()
    labels[80:95], labels[100:260] = "RARE", "nan"
    screen.obs["perturbation"] = labels
    screen.var_names = ["GENE0" if name == "GENE5" else name for name in screen.var_names]
    X = screen.X.toarray()
    X[:, 40] = 0
    X[::50, 40] = 3
    X[7, 41] = 70_000
    screen.X = sparse.csr_matrix(X)
    return screen


@pytest.fixture(scope="module")
def expected(screen: ad.AnnData) -> ad.AnnData:
    """Return what plain scanpy makes of it in memory."""
    adata = screen[screen.obs["perturbation"] != "nan"].copy()
    X = adata.to_df().T.groupby(level=0, sort=False).sum().T.astype(np.float32)
    adata = ad.AnnData(sparse.csr_matrix(X.to_numpy()), obs=adata.obs, var=pd.DataFrame(index=X.columns))
    adata.var["mt"] = adata.var_names.str.startswith("MT-")

    def recount() -> None:
        sc.pp.calculate_qc_metrics(adata, qc_vars=["mt"], percent_top=None, log1p=False, inplace=True)

    recount()
    within = (adata.obs["total_counts"] >= LIMITS["min_counts"]) & (
        adata.obs["n_genes_by_counts"] >= LIMITS["min_genes"]
    )
    adata = adata[within & (adata.obs["pct_counts_mt"] <= LIMITS["max_pct_mt"])].copy()
    adata = adata[:, np.asarray((adata.X > 0).sum(axis=0)).ravel() >= LIMITS["min_cells_per_gene"]].copy()
    recount()
    n_cells = adata.obs["perturbation"].value_counts()
    return adata[adata.obs["perturbation"].isin(n_cells.index[n_cells >= LIMITS["min_cells_per_perturbation"]])].copy()


def assert_same(result: SimpleNamespace, expected: ad.AnnData) -> None:
    """Counts, totals, cells and genes are those of the in-memory way, to the last bit and type."""
    adata = result.adata
    assert list(adata.obs_names) == list(expected.obs_names)
    assert list(adata.var_names) == list(expected.var_names)
    for part in ("data", "indices", "indptr"):
        np.testing.assert_array_equal(getattr(adata.X, part), getattr(expected.X, part))
    assert adata.X.data.dtype == np.float32
    for column in ("total_counts", "n_genes_by_counts", "pct_counts_mt"):
        assert adata.obs[column].dtype == expected.obs[column].dtype, column
        np.testing.assert_array_equal(adata.obs[column], expected.obs[column])


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_what_scanpy_gives_in_memory(
    form: str, screen: ad.AnnData, expected: ad.AnnData, harmonized_from: Callable, small_blocks: None, tmp_path: Path
) -> None:
    assert 0 < expected.n_obs < screen.n_obs - 200
    assert expected.n_vars < screen.n_vars - 1
    path = saved(screen, tmp_path / "screen.h5ad", FORMS[form])
    assert_same(harmonized_from(path, qc=LIMITS), expected)
    assert sorted(found.name for found in tmp_path.iterdir()) == [
        "harmonization.json",
        "harmonized.h5ad",
        "screen.h5ad",
    ]


def test_blocks_of_the_usual_size_give_the_same(
    screen: ad.AnnData, expected: ad.AnnData, harmonized_from: Callable
) -> None:
    assert_same(harmonized_from(screen, qc=LIMITS), expected)


def digest(path: Path) -> str:
    """Return the sha256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_file_is_the_same_to_the_byte_whatever_the_threads(
    screen: ad.AnnData, small_blocks: None, tmp_path: Path
) -> None:
    path = saved(screen, tmp_path / "screen.h5ad", FORMS["dense, gzip"])
    found = set()
    for threads in (1, 1, 3):
        target = tmp_path / "harmonized.h5ad"
        harmonize(path, target, tmp_path / "harmonization.json", "mine", dataset_block(), {**OFF, **LIMITS}, threads)
        found.add(digest(target))
    assert len(found) == 1


def test_other_tools_open_it_without_a_plugin(
    screen: ad.AnnData, harmonized_from: Callable, small_blocks: None
) -> None:
    path = harmonized_from(screen).path
    assert sc.read_h5ad(path).shape == ad.read_h5ad(path, backed="r").shape
    with h5py.File(path) as file:
        for part in ("data", "indices"):
            filters = file["X"][part].id.get_create_plist()
            names = [filters.get_filter(i)[0] for i in range(filters.get_nfilters())]
            assert names == [h5py.h5z.FILTER_SHUFFLE, h5py.h5z.FILTER_DEFLATE]
    rows = ad.read_h5ad(path, backed="r")[5:9].to_memory()
    np.testing.assert_array_equal(rows.X.toarray(), ad.read_h5ad(path).X[5:9].toarray())


def test_blocks_without_a_kept_cell_are_no_matter(
    screen: ad.AnnData, harmonized_from: Callable, small_blocks: None, tmp_path: Path
) -> None:
    X = screen.X.toarray()
    X[260:400] = 0
    X[260:400, 20] = 1
    emptied = screen.copy()
    emptied.X = sparse.csr_matrix(X)
    path = saved(emptied, tmp_path / "screen.h5ad", FORMS["dense, gzip"])
    result = harmonized_from(path, qc={"min_counts": 10})
    assert result.account["cells"]["dropped"]["qc.min_counts"] == 140
    assert result.account["cells"]["dropped"]["unassigned"] == 160
    assert not set(result.adata.obs_names) & {f"cell_{i}" for i in range(100, 400)}
    np.testing.assert_array_equal(result.adata.X.toarray().sum(axis=1), result.adata.obs["total_counts"])


def spoil(path: Path, name: str, number: int) -> None:
    """Write zeros into the middle of one chunk."""
    with h5py.File(path) as file:
        chunk = file[name].id.get_chunk_info(number)
    with path.open("r+b") as file:
        file.seek(chunk.byte_offset + chunk.size // 3)
        file.write(bytes(chunk.size // 3))


@pytest.mark.parametrize("form", ["dense, gzip", "dense, checksums", "CSR, gzip", "CSC, gzip"])
def test_a_damaged_chunk_is_told(form: str, screen: ad.AnnData, harmonized_from: Callable, tmp_path: Path) -> None:
    path = saved(screen, tmp_path / "screen.h5ad", FORMS[form])
    spoil(path, "X" if "dense" in form else "X/data", 3)
    with pytest.raises(
        InputError, match=r"screen\.h5ad is damaged: '/X.*' cannot be read .*Retrieve the file again\.$"
    ):
        harmonized_from(path)
    assert [found.name for found in tmp_path.iterdir()] == ["screen.h5ad"], "nothing partial is left"


def test_what_no_wanted_cell_lies_in_is_not_read(
    screen: ad.AnnData, harmonized_from: Callable, small_blocks: None, tmp_path: Path
) -> None:
    """Cells 100 to 259 are unassigned: chunks of cells 123 to 245 may be anything."""
    path = saved(screen, tmp_path / "screen.h5ad", FORMS["dense, gzip"])
    n_columns = -(-screen.n_vars // 13)
    spoil(path, "X", 4 * n_columns)
    assert harmonized_from(path).adata.n_obs == screen.n_obs - 160


def test_a_file_that_ends_within_the_matrix_is_told(screen: ad.AnnData, tmp_path: Path) -> None:
    path = saved(screen, tmp_path / "screen.h5ad", FORMS["dense"])
    source = open_source({"file": path}, dataset_block())
    os.truncate(path, source._matrix.values._offset + 1000)
    with pytest.raises(InputError, match=r"screen\.h5ad is damaged: '/X' cannot be read \(the file ends too early\)"):
        list(source.blocks())


@pytest.mark.parametrize(("part", "value"), [("indices", 80), ("indices", -1), ("indptr", 10**6)])
@pytest.mark.parametrize("kind", [sparse.csr_matrix, sparse.csc_matrix])
def test_a_matrix_that_points_outside_itself_is_told(
    kind: Callable, part: str, value: int, screen: ad.AnnData, harmonized_from: Callable, tmp_path: Path
) -> None:
    path = saved(screen, tmp_path / "screen.h5ad", compressed(kind))
    with h5py.File(path, "r+") as file:
        file[f"X/{part}"][5] = value if kind is sparse.csr_matrix or value != 80 else screen.n_obs
    with pytest.raises(InputError, match=r"screen\.h5ad is damaged: '/X/"):
        harmonized_from(path)


def test_a_matrix_of_another_shape_than_its_tables_is_told(
    screen: ad.AnnData, harmonized_from: Callable, tmp_path: Path
) -> None:
    path = saved(screen, tmp_path / "screen.h5ad", lambda file, counts: dense()(file, counts[:-1]))
    with pytest.raises(InputError, match=r"screen\.h5ad: X has the shape .*obs and var have"):
        harmonized_from(path)


# --- values ---------------------------------------------------------------------------------------------------------


def with_value(value: float) -> Callable[[np.ndarray], np.ndarray]:
    """Return a function that plants one value."""

    def plant(counts: np.ndarray) -> np.ndarray:
        counts = counts.astype(np.float64)
        counts[300, 10] = value
        return counts

    return plant


@pytest.mark.parametrize("kind", [np.asarray, sparse.csr_matrix, sparse.csc_matrix])
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (0.5, r"no integers \(for example 0\.5\)"),
        (-2.0, r"the lowest is -2"),
        (np.nan, "NaN"),
        (np.inf, "infinite"),
        (2.0**31, "too high"),
    ],
)
def test_what_is_no_count_is_told_in_every_form(
    kind: Callable,
    value: float,
    message: str,
    screen: ad.AnnData,
    harmonized_from: Callable,
    small_blocks: None,
    tmp_path: Path,
) -> None:
    plant = with_value(value)
    write = dense(np.float64) if kind is np.asarray else compressed(kind, dtype=np.float64)
    path = saved(screen, tmp_path / "screen.h5ad", lambda file, counts: write(file, plant(counts)))
    with pytest.raises(InputError, match=f"raw UMI counts are needed, X: it holds .*{message}"):
        harmonized_from(path)


@pytest.mark.parametrize("kind", [np.asarray, sparse.csr_matrix, sparse.csc_matrix])
def test_what_is_nearly_an_integer_is_one(
    kind: Callable, screen: ad.AnnData, harmonized_from: Callable, tmp_path: Path
) -> None:
    def nearly(counts: np.ndarray) -> np.ndarray:
        return np.where(counts > 0, np.expm1(np.log1p(np.minimum(counts, 90)).astype(np.float32)), 0)

    write = dense() if kind is np.asarray else compressed(kind)
    path = saved(screen, tmp_path / "screen.h5ad", lambda file, counts: write(file, nearly(counts)))
    X = harmonized_from(path).adata[:, "GENE7"].X.toarray().ravel()
    rows = [int(name.split("_")[1]) for name in ad.read_h5ad(tmp_path / "harmonized.h5ad").obs_names]
    np.testing.assert_array_equal(X, np.minimum(screen[:, "GENE7"].X.toarray().ravel()[rows], 90))


# --- tables of older files ------------------------------------------------------------------------------------------


def test_a_missing_code_of_the_old_categories_is_no_label(
    tiny_screen: Callable, harmonized_from: Callable, tmp_path: Path
) -> None:
    """In anndata 0.7 codes point to obs/__categories; -1 is missing, not the last category."""
    screen = tiny_screen()
    path = saved(screen, tmp_path / "screen.h5ad", FORMS["dense"])
    labels = pd.Categorical(screen.obs["perturbation"])
    codes = labels.codes.copy()
    codes[200:230] = -1
    with h5py.File(path, "r+") as file:
        del file["obs/perturbation"]
        categories = file.create_dataset(
            "obs/__categories/perturbation", data=list(labels.categories), dtype=h5py.string_dtype()
        )
        file.create_dataset("obs/perturbation", data=codes).attrs["categories"] = categories.ref
        file["obs"].attrs["encoding-version"] = "0.1.0"
    result = harmonized_from(path)
    assert result.account["cells"]["dropped"]["unassigned"] == 30
    assert result.adata.n_obs == screen.n_obs - 30


def test_tables_of_records_are_read(tiny_screen: Callable, harmonized_from: Callable, tmp_path: Path) -> None:
    """Before anndata 0.7: obs and var are arrays of records, the categories of codes lie in uns."""
    screen = tiny_screen()
    path = saved(screen, tmp_path / "screen.h5ad", compressed(sparse.csr_matrix, is_old=True))
    labels = pd.Categorical(screen.obs["perturbation"])
    codes = labels.codes.copy()
    codes[200:230] = -1
    records = np.zeros(screen.n_obs, [("index", "S12"), ("perturbation", "i1"), ("lane", h5py.string_dtype())])
    records["index"], records["perturbation"] = screen.obs_names.to_numpy().astype("S12"), codes
    records["lane"] = screen.obs["lane"].to_numpy()
    with h5py.File(path, "r+") as file:
        del file["obs"], file["var"]
        file["obs"] = records
        file["var"] = np.array([(name,) for name in screen.var_names], [("index", "S12")])
        if "uns" in file:
            del file["uns"]
        file.create_dataset("uns/perturbation_categories", data=list(labels.categories), dtype=h5py.string_dtype())
    result = harmonized_from(path)
    assert result.account["cells"]["dropped"]["unassigned"] == 30
    assert set(result.adata.obs["batch"]) == {"b1", "b2"}
    assert list(result.adata.var_names) == list(screen.var_names)


# --- archives -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["zip", "tar", "tar.gz"])
@pytest.mark.parametrize("form", ["dense, gzip", "CSR"])
def test_the_h5ad_of_an_archive_is_read(
    suffix: str, form: str, screen: ad.AnnData, expected: ad.AnnData, harmonized_from: Callable, tmp_path: Path
) -> None:
    path = saved(screen, tmp_path / "screen.h5ad", FORMS[form])
    archive = tmp_path / f"norman.{suffix}"
    if suffix == "zip":
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
            file.write(path, "norman/perturb_processed.h5ad")
    else:
        with tarfile.open(archive, "w:gz" if "gz" in suffix else "w") as file:
            file.add(path, "norman/perturb_processed.h5ad")
    path.unlink()
    source = {"url": ["https://example.org"], "member": "norman/perturb_processed.h5ad"}
    assert_same(harmonized_from(archive, qc=LIMITS, source=source), expected)
    assert not list(tmp_path.glob("*perturb*")), "nothing is unpacked under a name"
    with pytest.raises(InputError, match=r"source\.member is 'other\.h5ad', .*norman/perturb_processed\.h5ad"):
        harmonized_from(archive, source={**source, "member": "other.h5ad"})


# --- the parts ------------------------------------------------------------------------------------------------------

quick = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@quick
@given(
    values=st_numpy.arrays(
        st.sampled_from([np.float32, np.float64, np.int32, np.uint8]),
        st_numpy.array_shapes(min_dims=1, max_dims=2, min_side=1, max_side=40),
        elements=st.integers(0, 200),
    ),
    data=st.data(),
)
def test_rows_are_those_that_hdf5_reads(values: np.ndarray, data: st.DataObject, tmp_path: Path) -> None:
    options = data.draw(
        st.sampled_from([{}, {"chunks": True}, {"compression": "gzip"}, {"compression": "gzip", "shuffle": True}])
    )
    if options:
        options = {**options, "chunks": tuple(data.draw(st.integers(1, n)) for n in values.shape)}
    start = data.draw(st.integers(0, len(values) - 1))
    stop = data.draw(st.integers(start + 1, len(values)))
    path = tmp_path / "rows.h5"
    with h5py.File(path, "w") as file:
        X = file.create_dataset("X", values.shape, values.dtype, fillvalue=7, **options)
        # Chunks that are never written hold the fill value.
        X[: stop - 1] = values[: stop - 1]
        read = X[:]
    with h5py.File(path) as file, path.open("rb") as opened:
        rows = Rows(file["X"], opened.fileno(), path)
        np.testing.assert_array_equal(rows.read(start, stop), read[start:stop])


@quick
@given(
    parts=st.lists(st.integers(0, 2500), max_size=6),
    dtype=st.sampled_from([np.float32, np.int32]),
    chunk=st.integers(1, 900),
)
def test_what_is_appended_is_what_hdf5_reads(parts: list[int], dtype: type, chunk: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(sum(parts))
    values = rng.integers(0, 2**20, sum(parts)).astype(dtype)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(hdf5, "CHUNK", chunk)
        with h5py.File(tmp_path / "appended.h5", "w") as file, hdf5.ThreadPoolExecutor(2) as pool:
            appended = Appended(file, "X", dtype, sum(parts) + 5, pool)
            first = 0
            for n in parts:
                appended.append(values[first : first + n])
                first += n
            appended.finish()
    with h5py.File(tmp_path / "appended.h5") as file:
        np.testing.assert_array_equal(file["X"][:], values)


@quick
@given(arrays=st.lists(st_numpy.arrays(np.int64, st.integers(0, 50), elements=st.integers(0, 2**40)), max_size=5))
def test_a_spool_gives_back_what_it_got(arrays: list[np.ndarray], tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    pieces = [spool.append(array) for array in arrays]
    for array, piece in zip(arrays, pieces, strict=True):
        np.testing.assert_array_equal(spool.read(piece), array)
        np.testing.assert_array_equal(
            spool.read(piece, len(array) // 3, len(array) // 2), array[len(array) // 3 : len(array) // 2]
        )
        if len(array):
            assert piece.dtype.itemsize == np.min_scalar_type(array.max()).itemsize
    assert list(tmp_path.iterdir()) == [], "the file has no name"


@quick
@given(
    matrix=st_numpy.arrays(
        np.int32,
        st.tuples(st.integers(1, 6), st.integers(1, 80)),
        elements=st.sampled_from([0, 0, 0, 0, 1, 2, 15, 16, 300, 2**24 - 1]),
    ),
    data=st.data(),
)
def test_packed_counts_come_back(matrix: np.ndarray, data: st.DataObject) -> None:
    n_cells, n_genes = matrix.shape
    is_wanted = np.array(data.draw(st.lists(st.booleans(), min_size=n_cells, max_size=n_cells)))
    is_seen = np.array(data.draw(st.lists(st.booleans(), min_size=n_genes, max_size=n_genes)))
    counts = sparse.csr_matrix(matrix.astype(np.float32))
    packed, ends, tallied = (
        np.zeros(7 * counts.nnz, np.uint8),
        np.zeros(is_wanted.sum(), np.int64),
        np.zeros(n_genes, np.int64),
    )
    pack_counts(counts.data, counts.indices, counts.indptr, is_wanted, packed, ends, tallied)
    np.testing.assert_array_equal(tallied, (matrix[is_wanted] > 0).sum(axis=0))
    is_kept = np.array(data.draw(st.lists(st.booleans(), min_size=len(ends), max_size=len(ends))), bool)
    gene = np.where(is_seen, np.cumsum(is_seen) - 1, -1).astype(np.int32)
    values, indices, indptr = (
        np.empty(counts.nnz + 1, np.float32),
        np.empty(counts.nnz + 1, np.int32),
        np.zeros(is_kept.sum() + 1, np.int64),
    )
    unpack_counts(packed, np.append(0, ends), is_kept, gene, values, indices, indptr)
    found = sparse.csr_matrix(
        (values[: indptr[-1]], indices[: indptr[-1]], indptr), shape=(is_kept.sum(), is_seen.sum())
    )
    np.testing.assert_array_equal(found.toarray(), matrix[is_wanted][is_kept][:, is_seen])


def test_a_full_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        def write(self, content: memoryview) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    spool = Spool(tmp_path)
    monkeypatch.setattr(spool, "_file", Full())
    with pytest.raises(InputError, match=r"the disk is full.*Make room"):
        spool.append(np.ones(3, np.int64))


def test_results_come_in_order_and_only_a_little_ahead() -> None:
    lock, state = threading.Lock(), {"begun": 0, "taken": 0, "ahead": 0}

    def work(i: int) -> int:
        with lock:
            state["begun"] += 1
            state["ahead"] = max(state["ahead"], state["begun"] - state["taken"])
        time.sleep(0.002 * (i % 3))
        return i

    for i, found in enumerate(in_order(work, range(40), 3)):
        assert found == i
        with lock:
            state["taken"] += 1
        time.sleep(0.001)
    assert state["taken"] == 40
    assert state["ahead"] <= 3 + 1 + 1, "one per thread, one waiting, one in hand"


def test_an_error_in_a_thread_is_the_callers() -> None:
    def work(i: int) -> int:
        if i == 3:
            raise InputError("the third")
        return i

    with pytest.raises(InputError, match="the third"):
        list(in_order(work, range(10), 2))


# --- at size --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scale() -> ModuleType:
    """Return the benchmark of harmonize at full size."""
    spec = importlib.util.spec_from_file_location(
        "harmonize_scale", REPOSITORY / "workflow_tests/benchmarks/harmonize_scale.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def big(scale: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a file of 1.7 GB when dense, in the layout of Replogle's."""
    path = tmp_path_factory.mktemp("big") / "screen.h5ad"
    scale.generate(path, 50_000, n_distinct=1)
    return path


def command(path: Path, target: Path) -> list[str]:
    """Return the arguments that harmonize a file in a process of its own."""
    block = dataset_block(perturbation={"separator": None}, covariates={"batch": "batch"})
    arguments = [
        REPOSITORY / "scripts/harmonize.py",
        "--raw",
        path,
        "--harmonized",
        target,
        "--report",
        target.with_suffix(".json"),
    ]
    arguments += ["--name", "mine", "--dataset", json.dumps(block), "--threads", 2]
    return list(
        map(str, [*arguments, "--qc", json.dumps({**OFF, "min_cells_per_perturbation": 5, "min_cells_per_gene": 5})])
    )


@pytest.mark.slow
def test_memory_stays_far_below_the_size_of_the_matrix(scale: ModuleType, big: Path, tmp_path: Path) -> None:
    _, _, peak = scale.measured(*command(big, tmp_path / "harmonized.h5ad"))
    with h5py.File(big) as file:
        assert file["X"].size * 4 / 1e6 > 1700
    assert peak < 700


@pytest.mark.slow
def test_a_killed_run_leaves_nothing_that_the_next_one_does_not_remove(
    big: Path, tmp_path: Path, screen: ad.AnnData, harmonized_from: Callable
) -> None:
    target = tmp_path / "harmonized.h5ad"
    process = subprocess.Popen([sys.executable, *command(big, target)], stderr=subprocess.DEVNULL)
    try:
        while not (partial := list(tmp_path.glob(".harmonized.*.part.h5ad"))) or not partial[0].stat().st_size:
            assert process.poll() is None
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGSTOP)
        # Another run beside it leaves alone what is still being written.
        shutil.copy(partial[0], tmp_path / ".harmonized.dead.part.h5ad")
        harmonized_from(screen)
        assert list(tmp_path.glob(".harmonized.*")) == partial
        target.unlink()
    finally:
        process.kill()
        process.wait()
    assert not target.exists()
    harmonized_from(screen)
    assert sorted(found.name for found in tmp_path.iterdir()) == [
        "harmonization.json",
        "harmonized.h5ad",
        "screen.h5ad",
    ]
