"""10x triplets: read as they lie, in blocks, by their whole barcodes; what does not belong together is told."""

import gzip
import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from scipy import io as scipy_io
from scipy import sparse

from perturbflow.errors import InputError
from perturbflow.screens.readers import triplets
from perturbflow.screens.readers.triplets import open_triplets

N_GENES, N_BARCODES = 40, 90


def contents(seed: int = 0, genes: list[str] | None = None) -> tuple[dict[str, bytes], sparse.csc_matrix, list[str]]:
    """Return the files of a triplet by role, its counts (genes × barcodes) and the barcodes that are cells.

    Every barcode root occurs on two lanes with different labels; some barcodes have no row, and one row has no barcode.
    """
    rng = np.random.default_rng(seed)
    genes = genes or [f"ENSG{i:011d}" for i in range(N_GENES)]
    matrix = sparse.csc_matrix(rng.poisson(0.6, (len(genes), N_BARCODES)))
    roots = ["".join(rng.choice(list("ACGT"), 12)) for _ in range(N_BARCODES // 2)]
    barcodes = [f"{root}-{lane}" for lane in (1, 2) for root in roots]
    cells = [barcode for i, barcode in enumerate(barcodes) if i % 5]
    lines = [
        "cell BC,guide identity,read count",
        *[f"{cell},{'A' if cell.endswith('1') else 'B'}_pBA1,{i}" for i, cell in enumerate(cells)],
    ]
    text = io.BytesIO()
    scipy_io.mmwrite(text, matrix, field="integer")
    files = {
        "matrix": text.getvalue(),
        "barcodes": "\n".join(barcodes).encode(),
        "genes": "\n".join(f"{gene}\tNAME{i}" for i, gene in enumerate(genes)).encode(),
        "cell_identities": "\n".join([lines[0], *reversed(lines[1:]), "TTTTTTTTTTTTTT-9,A_pBA1,1"]).encode(),
    }
    return files, matrix, cells


NAMES = {
    "matrix": "matrix.mtx",
    "barcodes": "barcodes.tsv",
    "genes": "genes.tsv",
    "cell_identities": "cell_identities.csv",
}


def written(folder: Path, files: dict[str, bytes], gzipped: bool = False) -> dict[str, Path]:
    """Write a triplet's files and return them by role."""
    paths = {}
    for role, content in files.items():
        paths[role] = folder / (NAMES[role] + (".gz" if gzipped else ""))
        paths[role].write_bytes(gzip.compress(content) if gzipped else content)
    return paths


def tarred(path: Path, experiments: dict[str, dict[str, bytes]]) -> Path:
    """Write triplets as GEO does: gzipped, in a tar, each under the name of its experiment."""
    with tarfile.open(path, "w") as archive:
        for name, files in experiments.items():
            for role, content in files.items():
                suffix = ".mtx.txt.gz" if role == "matrix" else Path(NAMES[role]).suffix + ".gz"
                info = tarfile.TarInfo(f"{name}_{role}{suffix}")
                packed = gzip.compress(content)
                info.size = len(packed)
                archive.addfile(info, io.BytesIO(packed))
    return path


def together(source: object, rows: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Return all row numbers and counts."""
    blocks = list(source.blocks(rows))
    return np.concatenate([numbers for numbers, _ in blocks]), sparse.vstack([counts for _, counts in blocks]).toarray()


@pytest.mark.slow
@pytest.mark.parametrize("gzipped", [False, True])
@pytest.mark.parametrize("entries", [1, 7, 10**6])
def test_cells_are_barcodes_with_an_identity_in_the_order_of_the_matrix(
    gzipped: bool, entries: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triplets, "ENTRIES", entries)
    monkeypatch.setattr(triplets, "BARCODES", 11)
    files, matrix, cells = contents()
    source = open_triplets(written(tmp_path, files, gzipped))
    assert list(source.obs.index) == cells
    assert list(source.obs["lane"]) == [cell[-1] for cell in cells]
    assert list(source.obs["guide identity"].str[0]) == ["A" if cell.endswith("1") else "B" for cell in cells], (
        "the lane is part of the name"
    )
    assert list(source.var.index[:2]) == ["NAME0", "NAME1"]
    assert list(source.var["gene_id"][:2]) == ["ENSG00000000000", "ENSG00000000001"]
    expected = matrix.toarray().T[[i for i in range(N_BARCODES) if i % 5]]
    numbers, counts = together(source)
    assert np.array_equal(numbers, np.arange(len(cells)))
    assert np.array_equal(counts, expected)
    rows = np.array([0, 3, 4, 40, len(cells) - 1])
    numbers, counts = together(source, rows)
    assert np.array_equal(numbers, rows)
    assert np.array_equal(counts, expected[rows])


def test_the_triplets_of_a_tar_are_joined_on_the_genes_that_all_have(tmp_path: Path) -> None:
    first, matrix_1, cells_1 = contents(1)
    other_genes = [f"ENSG{i:011d}" for i in range(50, 4, -1)]
    second, matrix_2, cells_2 = contents(2, other_genes)
    source = open_triplets({"file": tarred(tmp_path / "GSE1_RAW.tar", {"GSM1_10X001": first, "GSM2_10X005": second})})
    assert list(source.obs.index) == cells_1 + cells_2
    assert list(source.obs["experiment"].unique()) == ["GSM1_10X001", "GSM2_10X005"]
    common = [f"ENSG{i:011d}" for i in range(5, N_GENES)]
    assert list(source.var["gene_id"]) == common
    is_cell = [i for i in range(N_BARCODES) if i % 5]
    expected = np.vstack(
        [matrix_1.toarray()[5:].T[is_cell], matrix_2.toarray()[[other_genes.index(gene) for gene in common]].T[is_cell]]
    )
    numbers, counts = together(source)
    assert np.array_equal(numbers, np.arange(len(expected)))
    assert np.array_equal(counts, expected)
    rows = np.array([2, len(cells_1), len(cells_1) + 5])
    numbers, counts = together(source, rows)
    assert np.array_equal(numbers, rows)
    assert np.array_equal(counts, expected[rows])


def by_gene(lines: list[bytes]) -> list[bytes]:
    return sorted(lines)


def at_random(lines: list[bytes]) -> list[bytes]:
    return [lines[i] for i in np.random.default_rng(3).permutation(len(lines))]


@pytest.mark.parametrize("arranged", [by_gene, at_random])
@pytest.mark.parametrize("entries", [100, 10**6])
def test_entries_in_any_order_give_the_same_cells(
    arranged: Callable, entries: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triplets, "ENTRIES", entries)
    files, matrix, cells = contents()
    head, lines = files["matrix"].splitlines()[:3], files["matrix"].splitlines()[3:]
    files["matrix"] = b"\n".join([*head, *arranged(lines)])
    rows = np.array([0, 3, 4, 40, len(cells) - 1])
    numbers, counts = together(open_triplets(written(tmp_path, files)), rows)
    assert np.array_equal(numbers, rows)
    assert np.array_equal(counts, matrix.toarray().T[[i for i in range(N_BARCODES) if i % 5]][rows])


def test_order_that_is_lost_late_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triplets, "ENTRIES", 50)
    files, _, _ = contents()
    lines = files["matrix"].splitlines()
    files["matrix"] = b"\n".join([*lines[:200], *lines[:199:-1]])
    with pytest.raises(InputError, match=r"matrix\.mtx: its entries are not sorted by barcode .* throughout"):
        together(open_triplets(written(tmp_path, files)))


BROKEN = {
    "truncated": (
        "matrix",
        lambda text: text[: text.rindex(b"\n", 0, len(text) // 2)],
        r"matrix\.mtx ends after [\d,]+ of [\d,]+ entries",
    ),
    "cut in a line": (
        "matrix",
        lambda text: text.rstrip()[:-2],
        r"matrix\.mtx: after [\d,]+ entries comes a value that is no count|ends after",
    ),
    "fractions": (
        "matrix",
        lambda text: text.rstrip() + b".5",
        r"matrix\.mtx: after [\d,]+ entries comes a value that is no count",
    ),
    "no matrix": (
        "matrix",
        lambda _: b"<html>",
        r"matrix\.mtx is no sparse MatrixMarket file of counts: it starts with '<html>'",
    ),
    "other barcodes": (
        "barcodes",
        lambda text: text[: text.rindex(b"\n")],
        r"90 barcodes, but the files beside it list 40 genes and 89",
    ),
    "other genes": ("genes", lambda text: text + b"\nENSG1\tB", r"40 genes × 90 barcodes, but .* 41 genes"),
    "two identities": (
        "cell_identities",
        lambda text: text + b"\n" + text.splitlines()[2],
        r"barcode \w+-\d has several rows",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_damaged_or_not_of_one_set_is_told(case: str, tmp_path: Path) -> None:
    role, damage, message = BROKEN[case]
    files, _, _ = contents()
    files[role] = damage(files[role])
    with pytest.raises(InputError, match=message):
        together(open_triplets(written(tmp_path, files)))


def test_a_truncated_gzip_is_told(tmp_path: Path) -> None:
    paths = written(tmp_path, contents()[0], gzipped=True)
    paths["matrix"].write_bytes(paths["matrix"].read_bytes()[:-40])
    with pytest.raises(InputError, match=r"matrix\.mtx\.gz cannot be decompressed to its end"):
        together(open_triplets(paths))


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    paths = written(tmp_path, contents()[0])
    del paths["barcodes"]
    with pytest.raises(InputError, match="barcodes of the triplet is missing"):
        open_triplets(paths)
    files, _, _ = contents()
    del files["genes"]
    with pytest.raises(InputError, match="genes of the triplet is missing"):
        open_triplets({"file": tarred(tmp_path / "raw.tar", {"GSM1": files})})


def test_an_archive_without_triplets_is_told(tmp_path: Path) -> None:
    (tmp_path / "other").write_text("x")
    with pytest.raises(InputError, match=r"other is no tar"):
        open_triplets({"file": tmp_path / "other"})
    with tarfile.open(tmp_path / "empty.tar", "w") as archive:
        archive.add(tmp_path / "other", "readme.txt")
    with pytest.raises(InputError, match=r"no member is the matrix"):
        open_triplets({"file": tmp_path / "empty.tar"})
