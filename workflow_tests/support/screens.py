"""Small files in the schema of every registered one, quirks included, with the outcome of each cell and gene.

The schemas are those of docs/reference/datasets.md: columns, types, index names, storage of X, labels. Counts are drawn
from a real screen where one lies beside the repository, else from a negative binomial distribution.
"""

import gzip
import io
import tarfile
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
from conftest import SHARED_DATA
from scipy import io as scipy_io
from scipy import sparse

from perturbflow.genes.symbols import CONTROL, human_symbols

REAL = SHARED_DATA / "norman_k562_mini" / "perturbench_devel_counts.h5ad"
N_FILLERS = 60
SUBSET, EXCLUDE, UNASSIGNED = "subset", "exclude", "unassigned"


@dataclass(frozen=True)
class Cells:
    """Cells that are alike: their number, their columns in the file, and their label or the reason of their drop."""

    n: int
    said: dict[str, object]
    becomes: str

    @property
    def is_kept(self) -> bool:
        """Whether they are in harmonized.h5ad."""
        return self.becomes not in (SUBSET, EXCLUDE, UNASSIGNED)


@dataclass(frozen=True)
class Expected:
    """What the harmonizer has to make of a fixture."""

    n_cells: int
    labels: dict[str, int]
    dropped: dict[str, int]
    n_genes: int
    renamed: dict[str, str]
    merged: int = 0
    genes_dropped: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Fixture:
    """A fixture of a registered dataset."""

    traps: str
    write: Callable[[Path], Expected]  # writes what a download leaves into a folder, its files only
    names: dict[str, str]  # role → name of the file


# --- counts and genes -----------------------------------------------------------------------------------------------


@cache
def _real_counts() -> sparse.csr_matrix | None:
    return sparse.csr_matrix(ad.read_h5ad(REAL).X) if REAL.exists() else None


def counts(n_cells: int, n_genes: int, seed: int) -> sparse.csr_matrix:
    """Return UMI counts, cells × genes, float32."""
    rng = np.random.default_rng(seed)
    real = _real_counts()
    if real is None:
        level = rng.lognormal(-0.5, 1.2, n_genes)
        drawn = sparse.csr_matrix(rng.poisson(rng.gamma(2.0, level / 2.0, (n_cells, n_genes))))
    else:
        drawn = real[rng.integers(real.shape[0], size=n_cells)][:, rng.choice(real.shape[1], n_genes, replace=False)]
    return sparse.csr_matrix(drawn, dtype=np.float32)


@cache
def ids() -> dict[str, str]:
    """Return approved symbol → Ensembl id."""
    return {symbol: gene for gene, symbol in human_symbols().of_ensembl_id.items()}


@dataclass(frozen=True)
class Genes:
    """Genes as a file names them, and what they are called now.

    Parameters
    ----------
    of
        Perturbed genes, by their approved symbols.
    named
        Approved symbol → name in the file, where it differs.
    others
        Further rows: (name in the file, Ensembl id, name now).
    """

    of: tuple[str, ...]
    named: dict[str, str] = field(default_factory=dict)
    others: tuple[tuple[str, str, str], ...] = ()

    def table(self) -> pd.DataFrame:
        """Return name, gene_id and becomes per gene: perturbed ones, others, mitochondrial ones and fillers."""
        fillers = [gene for gene in sorted(ids()) if gene not in self.of][:: len(ids()) // N_FILLERS][:N_FILLERS]
        approved = [*self.of, "MT-ND1", "MT-CO1", "RPL3", "RPS3", *fillers]
        rows = [(self.named.get(gene, gene), ids()[gene], gene) for gene in dict.fromkeys(approved)]
        return pd.DataFrame([*rows, *self.others], columns=["name", "gene_id", "becomes"])


def expected(cells: Iterable[Cells], genes: pd.DataFrame, **changes: object) -> Expected:
    """Return what has to become of these cells and genes."""
    labels, dropped = Counter(), Counter()
    for group in cells:
        (labels if group.is_kept else dropped)[group.becomes] += group.n
    renamed = genes[genes["name"] != genes["becomes"]]
    values = {"n_genes": len(genes), "renamed": dict(zip(renamed["name"], renamed["becomes"], strict=True)), **changes}
    return Expected(labels.total() + dropped.total(), dict(labels), dict(dropped), **values)


def shuffled(cells: list[Cells], seed: int) -> list[Cells]:
    """Return the groups as single cells in random order."""
    single = [Cells(1, group.said, group.becomes) for group in cells for _ in range(group.n)]
    return [single[i] for i in np.random.default_rng(seed).permutation(len(single))]


def obs_of(cells: list[Cells], seed: int, index: str | None = "cell_barcode") -> pd.DataFrame:
    """Return obs as pandas infers it, with scPerturb's common columns; strings are categories, None is code -1."""
    rng = np.random.default_rng(seed)
    obs = pd.DataFrame([cell.said for cell in cells])
    common = {
        "tissue_type": "cell_line",
        "cancer": True,
        "disease": "leukemia",
        "organism": "human",
        "perturbation_type": "CRISPR",
    }
    obs = obs.assign(**{name: value for name, value in common.items() if name not in obs})
    obs = obs.assign(nperts=1, ncounts=0.0, ngenes=0, percent_mito=0.0, percent_ribo=0.0)
    for column in obs.select_dtypes(["object", "string"]):
        obs[column] = pd.Categorical(obs[column].where(obs[column].notna(), None))
    obs.index = pd.Index(["".join(row) for row in rng.choice(list("ACGT"), (len(obs), 16))], name=index)
    return obs


# --- files ----------------------------------------------------------------------------------------------------------


def write(path: Path, obs: pd.DataFrame, var: pd.DataFrame, X: sparse.csr_matrix, storage: str) -> None:
    """Write an h5ad with X stored as csr, csc or dense (gzipped chunks)."""
    stored = {"csr": sparse.csr_matrix, "csc": sparse.csc_matrix, "dense": lambda X: X.toarray()}[storage](X)
    ad.AnnData(X=stored, obs=obs, var=var).write_h5ad(path, compression="gzip")


def scperturb(
    traps: str,
    name: str,
    cells: list[Cells],
    genes: Genes,
    common: dict[str, object],
    var: Callable[[pd.DataFrame], pd.DataFrame],
    storage: str = "csc",
    dtype: type = np.float32,
    **changes: object,
) -> Fixture:
    """Return a fixture of a file of scPerturb.

    Parameters
    ----------
    common
        Columns of obs that are the same for all cells; a list is gone through again and again.
    var
        Makes var of the table of genes.
    changes
        What `Expected` says beyond cells and genes.
    """

    def make(folder: Path) -> Expected:
        single = shuffled(cells, seed=len(name))
        said = [
            {
                **{key: value[i % len(value)] if isinstance(value, list) else value for key, value in common.items()},
                **cell.said,
            }
            for i, cell in enumerate(single)
        ]
        obs = obs_of([Cells(1, words, cell.becomes) for words, cell in zip(said, single, strict=True)], seed=len(name))
        table = genes.table()
        X = counts(len(obs), len(table), seed=len(name)).astype(dtype)
        write(folder / f"{name}.h5ad", obs, var(table).assign(ncounts=0.0, ncells=0), X, storage)
        return expected(cells, table, **changes)

    return Fixture(traps, make, {"file": f"{name}.h5ad"})


def by_symbol(column: str | None, index: str | None = "gene_symbol") -> Callable[[pd.DataFrame], pd.DataFrame]:
    """Return a maker of var with symbols in the index and ids in a column, if it has one."""

    def make(genes: pd.DataFrame) -> pd.DataFrame:
        var = pd.DataFrame(index=pd.Index(genes["name"].to_numpy(), name=index))
        return var.assign(**{column: genes["gene_id"].to_numpy()}) if column else var

    return make


def replogle_var(genes: pd.DataFrame) -> pd.DataFrame:
    """Return var as the authors have it, by gene_name."""
    var = by_symbol("ensembl_id", "gene_name")(genes)
    return var.assign(
        chr="chr1", start=1, end=2, strand="+", length=1, in_matrix=True, mean=1.0, std=1.0, cv=1.0, fano=1.0
    )


def labelled(column: str, words: dict[object, tuple[int, str]], **said: object) -> list[Cells]:
    """Return one group per label: {label in the file: (cells, what it becomes)}."""
    return [Cells(n, {column: label, **said}, becomes) for label, (n, becomes) in words.items()]


# --- Norman: the same cells in three sources --------------------------------------------------------------------------

NORMAN_GENES = Genes(
    ("KLF1", "CEBPA", "CBARP", "FOXL2", "FOXL2NB", "MAP3K21", "RHOXF2B", "SET", "HOXC13", "TGFBR2", "IGDCC3"),
    {"MAP3K21": "RP5-862P8.2"},
)
# construct: label that it becomes, condition of GEARS
NORMAN_CONSTRUCTS = {
    "NegCtrl0_NegCtrl0__NegCtrl0_NegCtrl0": (CONTROL, "ctrl"),
    "NegCtrl10_NegCtrl0__NegCtrl10_NegCtrl0": (CONTROL, "ctrl"),
    "NegCtrl11_NegCtrl0__NegCtrl11_NegCtrl0": (CONTROL, "ctrl"),
    "NegCtrl1_NegCtrl0__NegCtrl1_NegCtrl0": (EXCLUDE, None),
    "KLF1_NegCtrl0__KLF1_NegCtrl0": ("KLF1", "KLF1+ctrl"),
    "NegCtrl0_KLF1__NegCtrl0_KLF1": ("KLF1", "ctrl+KLF1"),
    "NegCtrl0_CEBPA__NegCtrl0_CEBPA": ("CEBPA", "ctrl+CEBPA"),
    "KLF1_CEBPA__KLF1_CEBPA": ("CEBPA+KLF1", "KLF1+CEBPA"),
    "C19orf26_NegCtrl0__C19orf26_NegCtrl0": ("CBARP", "C19orf26+ctrl"),
    "C3orf72_FOXL2__C3orf72_FOXL2": ("FOXL2+FOXL2NB", "C3orf72+FOXL2"),
    "KIAA1804_NegCtrl0__KIAA1804_NegCtrl0": ("MAP3K21", "KIAA1804+ctrl"),
    "RHOXF2_NegCtrl0__RHOXF2_NegCtrl0": ("RHOXF2B", "RHOXF2BB+ctrl"),
    "RHOXF2_SET__RHOXF2_SET": ("RHOXF2B+SET", "RHOXF2BB+SET"),
    "HOXC13_NegCtrl0__HOXC13_NegCtrl0": ("HOXC13", "HOXC13+ctrl"),
    "HOXC13_NegCtrl0__HOXC13_NegCtrl0_2": ("HOXC13", "HOXC13+ctrl"),
    "TGFBR2_IGDCC3__TGFBR2_IGDCC3": ("IGDCC3+TGFBR2", "TGFBR2+IGDCC3"),
    "TGFBR2_IGDCC3__TGFBR2_IGDCC3_2": ("IGDCC3+TGFBR2", "TGFBR2+IGDCC3"),
}


@cache
def norman_cells() -> pd.DataFrame:
    """Return the cells of the screen: barcode, construct, lane, the authors' counts, the outcome, and the source."""
    rng = np.random.default_rng(19)
    rows = []
    for construct, (becomes, condition) in NORMAN_CONSTRUCTS.items():
        rows += [(construct, becomes, condition, 1, True)] * 16
        rows += [
            (construct, becomes, condition, n, good) for n, good in ((2, True), (0, False), (1, False), (10, True))
        ]
    rows += [("no_reads_found", UNASSIGNED, None, 1, True)] * 3
    cells = pd.DataFrame(rows, columns=["construct", "becomes", "condition", "number_of_cells", "good_coverage"])
    is_single = (cells["number_of_cells"] == 1) & cells["good_coverage"]
    cells["becomes"] = cells["becomes"].where(is_single, SUBSET)
    # Barcode roots come back in other lanes: 300 of them for 343 cells.
    roots = ["".join(row) for row in rng.choice(list("ACGT"), (300, 16))]
    cells["root"] = [roots[i % 300] for i in range(len(cells))]
    cells["lane"] = [1 + i // 300 * 4 + i % 4 for i in range(len(cells))]
    cells["barcode"] = cells["root"] + "-" + cells["lane"].astype(str)
    # Cell Ranger did not call some cells that GEARS has.
    cells["is_filtered"] = np.arange(len(cells)) % 17 > 0
    return cells.iloc[rng.permutation(len(cells))].reset_index(drop=True)


def _norman_scperturb(folder: Path) -> Expected:
    cells = norman_cells()
    # scPerturb made controls of cells without guide reads.
    cells = cells[cells["is_filtered"]]
    before = cells["construct"].str.split("__").str[0]
    members = before.str.split("_").map(
        lambda members: [member for member in members if not member.startswith("NegCtrl")]
    )
    labels = members.map("_".join).replace({"": "control", "no_reads_found": "control"})
    said = [
        {
            "guide_id": cell.construct.replace("__", ";"), "read_count": 100, "UMI_count": 10, "coverage": 10.0,
            "gemgroup": cell.lane,
            "good_coverage": cell.good_coverage, "number_of_cells": cell.number_of_cells, "cell_line": "K562",
            "celltype": "lymphoblasts",
            "perturbation": label,
        }
        for cell, label in zip(cells.itertuples(), labels, strict=True)
    ]  # fmt: skip
    groups = [
        Cells(1, words, EXCLUDE if becomes == UNASSIGNED else becomes)
        for words, becomes in zip(said, cells["becomes"], strict=True)
    ]
    obs = obs_of(groups, seed=1)
    obs.index = pd.Index(cells["root"].to_numpy(), name="cell_barcode")
    obs.index = ad.utils.make_index_unique(obs.index)
    table = NORMAN_GENES.table()
    X = norman_counts()[cells.index].astype(np.int64)
    write(
        folder / "NormanWeissman2019_filtered.h5ad",
        obs,
        by_symbol("ensemble_id", None)(table).assign(ncounts=0.0, ncells=0),
        X,
        "csc",
    )
    return expected(groups, table)


@cache
def norman_counts() -> sparse.csr_matrix:
    """Return the counts of all cells of the screen."""
    return counts(len(norman_cells()), len(NORMAN_GENES.table()), seed=2)


def _norman_gears(folder: Path) -> Expected:
    cells = norman_cells()
    cells = cells[(cells["becomes"] != SUBSET) & cells["condition"].notna()]
    table = NORMAN_GENES.table()
    obs = pd.DataFrame(
        {
            "condition": pd.Categorical(cells["condition"]), "cell_type": pd.Categorical(["A549"] * len(cells)),
            "dose_val": pd.Categorical(["1+1"] * len(cells)),
            "control": (cells["condition"] == "ctrl").astype(np.int64).to_numpy(),
            "condition_name": pd.Categorical("A549_" + cells["condition"] + "_1+1"),
        },
        index=pd.Index(cells["barcode"].to_numpy(), name="cell_barcode"),
    )  # fmt: skip
    var = pd.DataFrame(
        {"gene_name": table["name"].to_numpy()}, index=pd.Index(table["gene_id"].to_numpy(), name="gene_id")
    )
    _write_gears(folder / "norman.zip", "norman", obs, var, norman_counts()[cells.index])
    return expected([Cells(1, {}, becomes) for becomes in cells["becomes"]], table)


def _write_gears(path: Path, name: str, obs: pd.DataFrame, var: pd.DataFrame, X: sparse.csr_matrix) -> None:
    """Write an archive of GEARS on Dataverse: X normalized, counts in a layer, differential expression in uns."""
    scale = 1e3 / np.maximum(np.asarray(X.sum(axis=1)).ravel(), 1.0)
    normalized = sparse.csr_matrix(sparse.diags(scale) @ X, dtype=np.float32).log1p()
    adata = ad.AnnData(X=normalized, obs=obs, var=var, layers={"counts": X})
    adata.uns["top_non_dropout_de_20"] = {"A549_KLF1+ctrl_1+1": np.array(var.index[:20], dtype=object)}
    inner = path.with_suffix(".h5ad")
    adata.write_h5ad(inner)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(inner, f"{name}/perturb_processed.h5ad")
        archive.writestr(f"__MACOSX/{name}/._perturb_processed.h5ad", b"")
    inner.unlink()


def triplet(
    X: sparse.csr_matrix, barcodes: list[str], genes: pd.DataFrame, identities: pd.DataFrame
) -> dict[str, bytes]:
    """Return the gzipped files of a 10x triplet by role."""
    text = io.BytesIO()
    scipy_io.mmwrite(text, sparse.csc_matrix(X.T).astype(np.int64), field="integer")
    files = {
        "matrix": text.getvalue(),
        "barcodes": "\n".join(barcodes).encode() + b"\n",
        "genes": genes[["gene_id", "name"]].to_csv(sep="\t", header=False, index=False).encode(),
        "cell_identities": identities.to_csv(index=False).encode(),
    }
    return {role: gzip.compress(content, 1) for role, content in files.items()}


NORMAN_GEO = {
    role: f"GSE133344_raw_{role}.{suffix}.gz"
    for role, suffix in {"matrix": "mtx", "barcodes": "tsv", "genes": "tsv", "cell_identities": "csv"}.items()
}


def _norman_geo(folder: Path) -> Expected:
    cells, table = norman_cells(), NORMAN_GENES.table()
    # The raw set has every barcode there is; three droplets without a cell for each cell, between them.
    empty = [f"{'ACGT'[i % 4]}{i:015d}-{1 + i % 8}" for i in range(3 * len(cells))]
    order = np.random.default_rng(3).permutation(4 * len(cells))
    names = np.array([*cells["barcode"], *empty])[order]
    X = sparse.vstack([norman_counts(), counts(len(empty), len(table), seed=4)], format="csr")[order]
    identities = pd.DataFrame(
        {
            "cell_barcode": cells["barcode"], "guide_identity": cells["construct"], "read_count": 100, "UMI_count": 10,
            "coverage": 10.0,
            "gemgroup": cells["lane"], "good_coverage": cells["good_coverage"],
            "number_of_cells": cells["number_of_cells"],
        }
    )  # fmt: skip
    for role, content in triplet(X, list(names), table, identities).items():
        (folder / NORMAN_GEO[role]).write_bytes(content)
    return expected([Cells(1, {}, becomes) for becomes in cells["becomes"]], table)


# --- Adamson ----------------------------------------------------------------------------------------------------------

ADAMSON = {"cell_line": "K562", "celltype": "lymphoblasts", "read count": 100.0, "UMI count": 10.0}
ADAMSON_001 = {
    "62(mod)_pBA581": (30, CONTROL), "CREB1_pDS269": (20, "CREB1"), "SPI1_pDS255": (20, "SPI1"),
    "EP300_pDS268": (20, "EP300"),
    "*": (9, UNASSIGNED), None: (2, UNASSIGNED),
}  # fmt: skip
ADAMSON_005 = {
    "3x_neg_ctrl_pMJ144-1": (20, CONTROL), "3x_neg_ctrl_pMJ144-2": (20, CONTROL), "Gal4-4(mod)_pBA582": (8, CONTROL),
    "PERK_only_pMJ146": (20, "EIF2AK3"), "IRE1_only_pMJ148": (20, "ERN1"), "ATF6_only_pMJ145": (20, "ATF6"),
    "PERK_IRE1_pMJ154": (20, "EIF2AK3+ERN1"), "ATF6_PERK_IRE1_pMJ158": (20, "ATF6+EIF2AK3+ERN1"), "*": (6, UNASSIGNED),
    None: (1, UNASSIGNED),
}  # fmt: skip
ADAMSON_010 = {
    "63(mod)_pBA580": (30, CONTROL), "62(mod)_pBA581": (20, CONTROL), "ATF4_pBA576": (15, "ATF4"),
    "ATF4_pBA577": (10, "ATF4"),
    "ATF4_pBA608": (5, "ATF4"), "ASCC3_pDS051": (12, "ASCC3"), "ASCC3_pDS052": (12, "ASCC3"),
    "HARS_pDS123": (20, "HARS1"),
    "C7orf26_pDS005": (20, "INTS15"), "*": (10, UNASSIGNED), None: (12, UNASSIGNED),
}  # fmt: skip
ADAMSON_GENES = {
    "10X001": Genes(("CREB1", "SPI1", "EP300"), others=(("ABC-extra", "ENSG00000999999", "ABC-extra"),)),
    "10X005": Genes(("EIF2AK3", "ERN1", "ATF6")),
    "10X010": Genes(("ATF4", "ASCC3", "HARS1", "INTS15"), {"HARS1": "HARS", "INTS15": "C7orf26"}),
}
GEO_EXPERIMENTS = {
    "GSM2406675_10X001": (ADAMSON_001, "10X001"), "GSM2406677_10X005": (ADAMSON_005, "10X005"),
    "GSM2406681_10X010": (ADAMSON_010, "10X010"),
}  # fmt: skip


def adamson(traps: str, experiment: str, words: dict) -> Fixture:
    """Return a fixture of one of scPerturb's three files."""
    gsm = next(name for name in GEO_EXPERIMENTS if name.endswith(experiment))
    cells = labelled("perturbation", words)
    var = by_symbol("ensembl_id")
    return scperturb(
        traps, f"AdamsonWeissman2016_{gsm}", cells, ADAMSON_GENES[experiment], ADAMSON, var, "csc", np.int64
    )


def _adamson_geo(folder: Path) -> Expected:
    """Every barcode root is on two lanes, with another label on each; genes differ between the experiments."""
    archive_members, groups = {}, []
    every = tuple(dict.fromkeys(gene for genes in ADAMSON_GENES.values() for gene in genes.of))
    tables = {
        name: Genes(every, ADAMSON_GENES["10X010"].named, ADAMSON_GENES[key].others).table()
        for name, (_, key) in GEO_EXPERIMENTS.items()
    }
    for seed, (name, (words, _)) in enumerate(GEO_EXPERIMENTS.items()):
        single = shuffled(
            labelled("guide identity", {label: value for label, value in words.items() if label is not None}), seed
        )
        # A doublet and a thinly covered cell of every experiment, and a barcode without an identity.
        single += [
            Cells(1, {**single[0].said, "number of cells": 2}, SUBSET),
            Cells(1, {**single[0].said, "good coverage": False}, SUBSET),
        ]
        roots = [f"{'ACGT'[i % 4]}{i // 2:013d}" for i in range(len(single))]
        roots = [roots[i - i % 2] for i in range(len(roots))]
        barcodes = [f"{root}-{1 + i % 2}" for i, root in enumerate(roots)]
        said = [{"cell BC": code, "read count": 9, "UMI count": 9, "coverage": 9.0, "good coverage": True,
                 "number of cells": 1, **cell.said}
                for code, cell in zip(barcodes, single, strict=True)]  # fmt: skip
        identities = pd.DataFrame(said)[
            ["cell BC", "guide identity", "read count", "UMI count", "coverage", "good coverage", "number of cells"]
        ]
        X = counts(len(barcodes) + 1, len(tables[name]), seed)
        archive_members[name] = triplet(X, [*barcodes, "TTTTTTTTTTTTTT-1"], tables[name], identities)
        groups += single
    suffix = {"matrix": "mtx.txt", "barcodes": "tsv", "genes": "tsv", "cell_identities": "csv"}
    with tarfile.open(folder / "GSE90546_RAW.tar", "w") as archive:
        for name, files in archive_members.items():
            for role, content in files.items():
                info = tarfile.TarInfo(f"{name}_{role}.{suffix[role]}.gz")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return expected(groups, tables["GSM2406677_10X005"])


def _adamson_gears(folder: Path) -> Expected:
    words = {
        "ctrl": (40, CONTROL),
        "ATF4+ctrl": (20, "ATF4"),
        "HARS+ctrl": (20, "HARS1"),
        "Gal4-4(mod)+ctrl": (5, CONTROL),
    }
    cells = shuffled(labelled("condition", words), 5)
    table = Genes(("ATF4", "HARS1"), {"HARS1": "HARS"}).table()
    condition = pd.Series([cell.said["condition"] for cell in cells])
    obs = pd.DataFrame({"condition": pd.Categorical(condition), "cell_type": pd.Categorical(["K562(?)"] * len(cells)),
                        "dose_val": pd.Categorical(["1+1"] * len(cells)),
                        "control": (condition == "ctrl").astype(np.int64)})  # fmt: skip
    obs.index = pd.Index([f"CELL{i}-1" for i in range(len(cells))], name="cell_barcode")
    var = pd.DataFrame(
        {"gene_name": table["name"].to_numpy()}, index=pd.Index(table["gene_id"].to_numpy(), name="gene_id")
    )
    _write_gears(folder / "adamson.zip", "adamson", obs, var, counts(len(cells), len(table), 6))
    return expected(cells, table)


# --- Replogle and Nadig -----------------------------------------------------------------------------------------------

REPLOGLE_GENES = Genes(
    ("ZBTB4", "AARS1", "DARS1", "QARS1", "TBCE", "HSPA14"),
    {
        "AARS1": "AARS",
        "DARS1": "DARS",
        "QARS1": "QARS",
        "TBCE": "TBCE_ENSG00000284770",
        "HSPA14": "HSPA14_ENSG00000187522",
    },
    (
        ("TBCE_ENSG00000285053", "ENSG00000285053", "TBCE_ENSG00000285053"),
        ("HSPA14_ENSG00000284024", "ENSG00000284024", "MSANTD7"),
        ("AC118549.1", "ENSG00000999998", "AC118549.1"),
    ),
)
REPLOGLE_LABELS = {
    "control": (60, CONTROL), "ZBTB4": (25, "ZBTB4"), "AARS": (25, "AARS1"), "DARS": (20, "DARS1"),
    "QARS": (20, "QARS1"), "TBCE": (20, "TBCE"),
    "AC118549.1": (10, "AC118549.1"), "EPRS": (10, "EPRS1"),
}  # fmt: skip


def replogle(traps: str, name: str, cell_line: str, celltype: str | None) -> Fixture:
    """Return a fixture of a dense file."""
    cells = [
        Cells(n, {"perturbation": label, "gene": "non-targeting" if label == "control" else label, "gene_id": gene_id,
                  "gene_transcript": f"10005_{label}_P1_{gene_id}"}, becomes)
        for label, (n, becomes) in REPLOGLE_LABELS.items()
        for gene_id in [None if label == "control" else ids().get(becomes, "ENSG00000999998")]
    ]  # fmt: skip
    common = {"batch": [1, 2, 3], "transcript": "P1P2", "guide_id": "A_+_1.23-P1P2|B_-_4.23-P1P2", "UMI_count": 11000.0,
              "z_gemgroup_UMI": 0.1, "core_scale_factor": 1.0, "core_adjusted_UMI_count": 1.0,
              "cell_line": cell_line}  # fmt: skip
    if celltype:
        common |= {"celltype": celltype, "sex": "Female", "age": 53}
    if cell_line == "hTERT-RPE1":
        common["disease"] = np.nan  # all missing, a float
    return scperturb(traps, name, cells, REPLOGLE_GENES, common, replogle_var, "dense")


# --- the others -------------------------------------------------------------------------------------------------------

DIXIT_GENES = Genes(("ELK1", "YY1", "ETS1"))
DIXIT = {"moi": "normal", "cell_line": "K562", "celltype": "lymphoblasts"}


def dixit(traps: str, name: str, time: int | None) -> Fixture:
    """Return a fixture of one of Dixit's files; `target` names the first guide's gene only."""
    words: dict[object, tuple[int, str]] = {
        "control": (30, CONTROL), "p-sgELK1-6": (15, "ELK1"), "p-sgELK1-1": (15, "ELK1"), "p-sgETS1-3": (20, "ETS1"),
        "p-INTERGENIC1216445": (8, CONTROL), "nan": (11, UNASSIGNED),
    }  # fmt: skip
    if time is None:
        words |= {
            "p-sgELK1-6_p-sgYY1-10": (15, "ELK1+YY1"), "p-sgYY1-3_p-sgELK1-1": (5, "ELK1+YY1"),
            "p-INTERGENIC216151_p-sgYY1-3": (14, "YY1"),
            "p-INTERGENIC216151_p-INTERGENIC1216445": (6, CONTROL), "p-sgELK1-1_p-sgELK1-6": (4, "ELK1"),
        }  # fmt: skip
    cells = [
        Cells(
            n,
            {
                "perturbation": label,
                "target": str(label).split("_")[0].replace("p-sg", "").split("-")[0],
                "guide_id": label,
            },
            becomes,
        )
        for label, (n, becomes) in words.items()
    ]
    common = {**DIXIT, "time": time * 24} if time else {**DIXIT, "moi": "high", "grna_lenient": "nan"}
    return scperturb(traps, name, cells, DIXIT_GENES, common, by_symbol("gene_id", None), "csr")


def frangieh() -> Fixture:
    """Return Frangieh: cells of three conditions; no guide, one guide, several."""
    conditions = ["Control", "IFNγ", "Co-culture"]
    words = [("control", "NO_SITE_1", 1, CONTROL), ("control", "ONE_NON-GENE_SITE_7", 1, CONTROL),
             ("HLA-B", "HLA-B_2", 1, "HLA-B"),
             ("JAK2", "JAK2_3", 1, "JAK2"), ("control", "nan", 0, SUBSET),
             ("JAK2", "JAK2_3;HLA-B_1", 2, SUBSET)]  # fmt: skip
    cells = [
        Cells(8, {"perturbation": label, "perturbation_2": condition, "MOI": moi, "guide_id": guides,
                  "sgRNA": guides if moi == 1 else "nan"}, becomes)
        for label, guides, moi, becomes in words
        for condition in conditions
    ]  # fmt: skip
    common = {"library_preparation_protocol": "10X 3' v3 sequencing", "UMI_count": 10_000.0, "umap_x": 0.0,
              "umap_y": 0.0,
              "celltype": "melanocytes", "perturbation_type_2": "IFN-γ stimulation", "disease": "melanoma"}  # fmt: skip
    traps = "non-ASCII condition as a context; cells without a guide called control; cells of several guides"
    genes = Genes(("HLA-B", "JAK2"), others=(("LINC-none", "LINC-none", "LINC-none"),))
    return scperturb(traps, "FrangiehIzar2021_RNA", cells, genes, common, by_symbol("ensembl_id"), "csc", np.float64)


def sciplex() -> Fixture:
    """Return sci-Plex 3: drugs at doses, unassigned cells, mouse genes."""
    drugs = [("control", 0.0, CONTROL), ("(+)-JQ1", 10.0, "JQ1@10"), ("(+)-JQ1", 10_000.0, "JQ1@10000"),
             ("Trametinib (GSK1120212)", 100.0, "Trametinib (GSK1120212)@100"), (None, None, UNASSIGNED)]  # fmt: skip
    cells = [Cells(24, {"perturbation": drug, "dose_value": dose}, becomes) for drug, dose, becomes in drugs]
    common = {"cell_line": ["A549", "K562", "MCF7"], "plate": ["plate1", "plate2"], "well": "A1", "replicate": "rep1",
              "dose_unit": "nM",
              "celltype": "cells", "chembl-ID": "CHEMBL1", "perturbation_type": "drug"}  # fmt: skip
    mouse = tuple((f"Gene{i}", f"ENSMUSG{i:011d}", f"Gene{i}") for i in range(40))
    human = Genes(("BRD4",)).table()

    def make(folder: Path) -> Expected:
        single = shuffled(cells, 7)
        said = [{**{key: value[i % len(value)] if isinstance(value, list) else value for key, value in common.items()},
                 **cell.said}
                for i, cell in enumerate(single)]  # fmt: skip
        obs = obs_of([Cells(1, words, cell.becomes) for words, cell in zip(said, single, strict=True)], 8)
        table = Genes(("BRD4",), others=mouse).table()
        X = counts(len(obs), len(table), 9).astype(np.int64)
        write(
            folder / "SrivatsanTrapnell2020_sciplex3.h5ad",
            obs,
            by_symbol("ensembl_id")(table).assign(ncounts=0.0, ncells=0),
            X,
            "csr",
        )
        return expected(cells, human, genes_dropped={"gene_pattern": len(mouse)})

    traps = "a drug at two doses; a + in a drug's name; mouse genes; unassigned cells"
    return Fixture(traps, make, {"file": "SrivatsanTrapnell2020_sciplex3.h5ad"})


FIXTURES = {
    "norman2019": Fixture(
        ("lanes lost in obs names; multiplets; thin coverage; NegCtrl1_NegCtrl0; cells without guide reads called "
         "control; old and clone names"),
        _norman_scperturb, {"file": "NormanWeissman2019_filtered.h5ad"},
    ),
    "norman2019_gears": Fixture(
        "A+ctrl and ctrl+A; RHOXF2BB; X normalized, counts in a layer; ids as index; placeholder cell type; zip",
        _norman_gears,
        {"file": "norman.zip"},
    ),
    "norman2019_geo": Fixture(
        "A_NegCtrl0__A_NegCtrl0_2; empty droplets; multiplets; four control constructs; triplet", _norman_geo,
        NORMAN_GEO
    ),
    "adamson2016_10x001": adamson("no control label; * and NaN; GENE_plasmid; another reference", "10X001",
                                  ADAMSON_001),
    "adamson2016_10x005": adamson("constructs of one, two and three genes; PERK and IRE1; _ in control names", "10X005",
                                  ADAMSON_005),
    "adamson2016_10x010": adamson("several guides per gene; cells whose label was lost with their lane (NaN)", "10X010",
                                  ADAMSON_010),
    "adamson2016_geo": Fixture(
        ("barcodes that come back on other lanes under another label; three experiments with different genes; tar of "
         "triplets"),
        _adamson_geo, {"file": "GSE90546_RAW.tar"},
    ),
    "adamson2016_gears": Fixture("Gal4-4(mod) is a control; zip", _adamson_gears, {"file": "adamson.zip"}),
    "replogle2022_k562_essential": replogle(
        "dense gzip; TBCE_ENSG…; AARS, QARS (ambiguous without its id); fractions for percentages",
        "ReplogleWeissman2022_K562_essential",
        "K562", "lymphoblasts",
    ),
    "replogle2022_rpe1": replogle("the same; disease all NaN", "ReplogleWeissman2022_rpe1", "hTERT-RPE1",
                                  "epithelial cells"),
    "replogle2022_k562_gwps": replogle("the same", "ReplogleWeissman2022_K562_gwps", "K562", "lymphoblasts"),
    "nadig2025_hepg2": replogle("no celltype", "NadigOConner2024_hepg2", "Hep-G2", None),
    "nadig2025_jurkat": replogle("no celltype", "NadigOConner2024_jurkat", "Jurkat", None),
    "dixit2016_7d": dixit("guides; the text nan", "DixitRegev2016_K562_TFs_7_days", 7),
    "dixit2016_13d": dixit("guides; the text nan", "DixitRegev2016_K562_TFs_13_days", 13),
    "dixit2016_highmoi": dixit("guides joined by _, intergenic ones among them", "DixitRegev2016_K562_TFs_High_MOI",
                               None),
    "papalexi2021_eccite": scperturb(
        "guides ATF2g1, NTg5", "PapalexiSatija2021_eccite_RNA",
        labelled("perturbation", {"control": (20, CONTROL), "NTg5": (10, CONTROL), "ATF2g1": (15, "ATF2"),
                                  "ATF2g2": (15, "ATF2"),
                                  "IFNGR2g10": (20, "IFNGR2"), "PDL1g2": (20, "CD274"), "MARCH8g1": (20, "MARCHF8")}),
        Genes(("ATF2", "IFNGR2", "CD274", "MARCHF8"), {"MARCHF8": "MARCH8"}),
        {"hto": ["rep1-tx", "rep2-tx"], "guide_id": "g", "hto_barcode": "A", "gdo_barcode": "C", "cell_line": "THP-1",
         "celltype": "monocytes"},
        by_symbol("ensembl_id"), "csr",
    ),
    "papalexi2021_arrayed": scperturb(
        "PDL1, MARCH8; a hashtag per perturbation", "PapalexiSatija2021_eccite_arrayed_RNA",
        [*labelled("perturbation", {"control": (30, CONTROL)}, hto="HTO-NT7"),
         *labelled("perturbation", {"PDL1": (20, "CD274")}, hto="HTO-PDL1"),
         *labelled("perturbation", {"MARCH8": (20, "MARCHF8")}, hto="HTO-MARCH8")],
        Genes(("CD274", "MARCHF8"), {"MARCHF8": "MARCH8"}),
        {"guide_id": "g", "hto_barcode": "A", "gdo_barcode": "C", "cell_line": "THP-1", "celltype": "monocytes"},
        by_symbol("ensembl_id"), "csr",
    ),
    "frangieh2021": frangieh(),
    "tian2021_crispri": scperturb(
        "symbols of two genes are alike: their counts are summed", "TianKampmann2021_CRISPRi",
        labelled("perturbation", {"control": (30, CONTROL), "FBXO7": (20, "FBXO7"), "HLA-DRB1": (20, "HLA-DRB1")}),
        Genes(("FBXO7",), others=(("HLA-DRB1", "ENSG00000196126", "HLA-DRB1"), ("TWIN", "ENSG00000999991", "TWIN"),
                                  ("TWIN", "ENSG00000999992", "TWIN"))),
        {"guide_id": "FBXO7_i1", "celltype": "iPSC-induced neuron", "batch": ["1", "2", "3", "4"], "percent_hemo": 0.0,
         "tissue_type": "primary"},
        by_symbol("ensembl_id"), "csc", merged=1,
    ),
    "tian2021_crispra": scperturb(
        "", "TianKampmann2021_CRISPRa", labelled("perturbation", {"control": (30, CONTROL), "FBXO7": (20, "FBXO7")}),
        Genes(("FBXO7",)),
        {"guide_id": "FBXO7_a1", "celltype": "iPSC-induced neuron", "batch": ["1", "2"], "percent_hemo": 0.0,
         "tissue_type": "primary"},
        by_symbol("ensembl_id"), "csc",
    ),
    "wessels2023": scperturb(
        "no Ensembl ids; pairs A_B and B_A", "WesselsSatija2023",
        labelled("perturbation", {"control": (30, CONTROL), "NT_NT": (5, CONTROL), "HDAC3": (20, "HDAC3"),
                                  "KDM1A_HDAC3": (20, "HDAC3+KDM1A"),
                                  "HDAC3_KDM1A": (5, "HDAC3+KDM1A"), "KDM1A_NT": (12, "KDM1A")}),
        Genes(("HDAC3", "KDM1A", "MRTFA"), {"MRTFA": "MKL1"}),
        {"Cell_cycle_phase": "G1", "HTO": "HTO-1", "10X_lane": ["L1", "L2", "L3", "L4"], "guides": "g",
         "CRISPRcas13_Array": "a",
         "Guide.Class": "Double", "ID.g1": "a", "ID.g2": "b", "UMI.g1": 9, "UMI.g2": 9, "cell_line": "THP-1",
         "celltype": "monocytes"},
        by_symbol(None), "csr", np.int64,
    ),
    "datlinger2017": scperturb(
        "guides of two libraries; target missing in controls; stimulation as a context", "DatlingerBock2017",
        [Cells(n, {"perturbation": label, "target": target, "perturbation_2": condition}, becomes)
         for label, target, n, becomes in (("control", None, 15, CONTROL), ("Tcrlibrary_BACH2_1", "BACH2", 10, "BACH2"),
                                           ("Tcrlibrary_BACH2_3", "BACH2", 5, "BACH2"),
                                           ("Essential_library_MVD_1", "MVD", 10, "MVD"))
         for condition in ("stimulated", "unstimulated")],
        Genes(("BACH2", "MVD")),
        {"replicate": ["1", "2"], "celltype": "T cells", "cell_line": "Jurkat cells",
         "perturbation_type_2": "TCR stimulation"},
        by_symbol(None), "csr", np.int64,
    ),
    "gasperini2019_lowmoi": scperturb(
        "targets joined by _, loci with _ of their own among them; the text nan", "GasperiniShendure2019_lowMOI",
        labelled("perturbation", {"control": (30, CONTROL), "GATA1": (20, "GATA1"),
                                  "chr1.9538_top_two": (15, "chr1.9538_top_two"),
                                  "chr1.9538_top_two_GATA1": (10, "GATA1+chr1.9538_top_two"),
                                  "HBE1_GATA1": (10, "GATA1+HBE1"),
                                  "chr6:1234-5678": (8, "chr6:1234-5678"), "nan": (12, UNASSIGNED)}),
        Genes(("GATA1", "HBE1"), others=(("ENSG00000143674", "ENSG00000143674", "MAP3K21"),)),
        {"sample": "lane_1", "total_umis": 9.0, "Size_Factor": 1.0, "gene": "GATA1_TSS", "all_gene": "GATA1_TSS",
         "barcode": "ACGT",
         "read_count": 9.0, "umi_count": 9.0, "proportion": 0.5, "guide_count": 1.0, "cell_line": "K562",
         "celltype": "lymphoblasts"},
        by_symbol("ensembl_id"), "csc", np.int64,
    ),
    "sciplex3": sciplex(),
}  # fmt: skip
