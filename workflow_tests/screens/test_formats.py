"""One screen in every form of a lab's disk: each is recognized, and gives the harmonized screen of its h5ad."""

import gzip
import io
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
from conftest import OFF, dataset_block, make_screen
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import io as scipy_io
from scipy import sparse

from perturbflow.errors import InputError
from perturbflow.registry.config import complete
from perturbflow.screens import harmonize as harmonization
from perturbflow.screens.readers import open_source
from perturbflow.screens.readers import triplets as triplet_module
from perturbflow.screens.readers.labels import with_labels

GUIDES = ["TF1_1", "TF1_2", "TF2_1", "NT_1"]


@pytest.fixture(scope="module")
def screen() -> ad.AnnData:
    """Return a screen with 10x barcodes, and guides beside its genes."""
    screen = make_screen(labels=["TF1", "TF2", "TF3", "TF1+TF2"])
    rng = np.random.default_rng(5)
    roots = ["".join(rng.choice(list("ACGT"), 16)) for _ in range(screen.n_obs)]
    screen.obs_names = [f"{root}-1" for root in roots]
    guides = sparse.csr_matrix(rng.poisson(3.0, (screen.n_obs, len(GUIDES))).astype(np.float32))
    both = ad.concat(
        [screen, ad.AnnData(guides, obs=screen.obs[[]], var=pd.DataFrame(index=GUIDES))], axis=1, merge="first"
    )
    both.var["gene_ids"] = [*(f"ENSG{i:011d}" for i in range(99900000000, 99900000000 + screen.n_vars)), *GUIDES]
    both.var["feature_types"] = ["Gene Expression"] * screen.n_vars + ["CRISPR Guide Capture"] * len(GUIDES)
    both.X = sparse.csr_matrix(both.X)
    return both


def labels_of(screen: ad.AnnData, folder: Path) -> Path:
    """Write the labels as a table, in another order than that of the cells."""
    table = screen.obs.reset_index(names="cell_barcode").sample(frac=1, random_state=1)
    table.to_csv(folder / "calls.csv", index=False)
    return folder / "calls.csv"


def harmonized(path: Path, folder: Path, qc: dict | None = None, **changes: object) -> SimpleNamespace:
    """Harmonize a file or folder."""
    folder.mkdir(exist_ok=True)
    target, report = folder / "harmonized.h5ad", folder / "harmonization.json"
    source = {"path": str(path), **changes.pop("source", {})}
    harmonization.harmonize(
        path, target, report, "mine", dataset_block(source=source, **changes), {**OFF, **(qc or {})}
    )
    return SimpleNamespace(adata=ad.read_h5ad(target), account=json.loads(report.read_text()), path=target)


def assert_same(found: SimpleNamespace, expected: SimpleNamespace) -> None:
    """Counts, cells, genes, labels and what is kept apart are equal."""
    a, b = found.adata, expected.adata
    assert list(a.obs_names) == list(b.obs_names)
    pd.testing.assert_frame_equal(a.var, b.var)
    for column in (
        "perturbation",
        "is_control",
        "n_perturbations",
        "batch",
        "cell_type",
        "total_counts",
        "n_genes_by_counts",
    ):
        assert a.obs[column].astype(str).tolist() == b.obs[column].astype(str).tolist(), column
    for part in ("data", "indices", "indptr"):
        np.testing.assert_array_equal(getattr(a.X, part), getattr(b.X, part))
    assert set(a.obsm) == set(b.obsm)
    for key in b.obsm:
        np.testing.assert_array_equal(a.obsm[key].toarray(), b.obsm[key].toarray())
        assert list(a.uns["perturbflow"]["features_apart"][key]) == list(b.uns["perturbflow"]["features_apart"][key])


@pytest.fixture(scope="module")
def expected(screen: ad.AnnData, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Return what its h5ad gives."""
    folder = tmp_path_factory.mktemp("h5ad")
    screen.write_h5ad(folder / "screen.h5ad")
    return harmonized(folder / "screen.h5ad", folder)


# --- what tools write -------------------------------------------------------------------------------------------------


def write_folder(
    folder: Path, screen: ad.AnnData, version: int = 3, gzipped: bool = True, field: str = "integer", **options: object
) -> Path:
    """Write a 10x folder as Cell Ranger 3 or 2, or another tool, does."""
    folder.mkdir(parents=True, exist_ok=True)
    matrix = sparse.csr_matrix(screen.X).T
    matrix = sparse.csr_matrix(matrix) if options.get("by_gene") else sparse.csc_matrix(matrix)
    matrix = matrix.T if options.get("transposed") else matrix
    text = io.BytesIO()
    scipy_io.mmwrite(text, matrix.astype(np.int64 if field == "integer" else np.float64), field=field)
    columns = ["gene_ids", "name", "feature_types"][: 3 if version == 3 else 2]
    files = {
        "matrix.mtx": text.getvalue(),
        "barcodes.tsv": "\n".join(screen.obs_names).encode() + b"\n",
        "features.tsv" if version == 3 else "genes.tsv": screen.var.assign(name=screen.var_names)[columns]
        .to_csv(sep="\t", header=False, index=False)
        .encode(),
    }
    for name, content in files.items():
        path = folder / f"{options.get('prefix', '')}{name}{'.gz' if gzipped else ''}"
        path.write_bytes(gzip.compress(content) if gzipped else content)
    return folder


def write_h5(path: Path, screen: ad.AnnData, version: int = 3) -> Path:
    """Write a 10x h5 as Cell Ranger 3 or 2 does."""
    matrix = sparse.csc_matrix(sparse.csr_matrix(screen.X).T)
    with h5py.File(path, "w") as file:
        group = file.create_group("matrix" if version == 3 else "GRCh38")
        group["barcodes"] = screen.obs_names.to_numpy().astype("S")
        group.create_dataset(
            "data", data=matrix.data.astype(np.int32), chunks=(1000,), compression="gzip", shuffle=True
        )
        group.create_dataset(
            "indices", data=matrix.indices.astype(np.int64), chunks=(1000,), compression="gzip", shuffle=True
        )
        group["indptr"], group["shape"] = matrix.indptr.astype(np.int64), np.array(matrix.shape, np.int32)
        names, ids = screen.var_names.to_numpy().astype("S"), screen.var["gene_ids"].to_numpy().astype("S")
        if version == 3:
            features = group.create_group("features")
            features["id"], features["name"], features["_all_tag_keys"] = ids, names, np.array([b"genome"])
            features["feature_type"] = screen.var["feature_types"].to_numpy().astype("S")
            features["genome"] = np.array([b"GRCh38"] * screen.n_vars)
        else:
            group["genes"], group["gene_names"] = ids, names
    return path


def in_tar(folder: Path) -> Path:
    """Pack a folder as 10x hands it out."""
    path = folder.with_suffix(".tar.gz")
    with tarfile.open(path, "w:gz") as archive:
        archive.add(folder, folder.name)
    return path


TENX = {
    "folder": lambda folder, screen: write_folder(folder / "filtered_feature_bc_matrix", screen),
    "folder, plain": lambda folder, screen: write_folder(folder / "10x", screen, gzipped=False),
    "folder, by gene": lambda folder, screen: write_folder(folder / "10x", screen, by_gene=True),
    "folder, cells × genes": lambda folder, screen: write_folder(folder / "10x", screen, transposed=True),
    "folder, reals": lambda folder, screen: write_folder(folder / "10x", screen, field="real"),
    "folder, prefix": lambda folder, screen: write_folder(folder / "10x", screen, prefix="GSM1_my_"),
    "folder in a tar": lambda folder, screen: in_tar(write_folder(folder / "filtered_feature_bc_matrix", screen)),
    "h5": lambda folder, screen: write_h5(folder / "filtered_feature_bc_matrix.h5", screen),
    "h5 of another name": lambda folder, screen: write_h5(folder / "counts.h5ad", screen),
}


@pytest.mark.slow
@pytest.mark.parametrize("form", TENX)
def test_output_of_cell_ranger_gives_what_the_h5ad_gives(
    form: str, screen: ad.AnnData, expected: SimpleNamespace, tmp_path: Path
) -> None:
    path = TENX[form](tmp_path, screen)
    found = harmonized(path, tmp_path / "out", source={"labels": str(labels_of(screen, tmp_path))})
    assert_same(found, expected)
    assert found.account["features_apart"] == expected.account["features_apart"]
    assert set(found.account["source"]) == {"file", "labels"}
    assert len(found.account["source"]["file"]["sha256"]) == 64


@pytest.mark.parametrize("write", [lambda folder, screen: write_folder(folder / "x", screen, version=2, gzipped=False),
                                   lambda folder, screen: write_h5(folder / "x.h5", screen, version=2)])  # fmt: skip
def test_output_of_cell_ranger_2_has_no_types_and_gives_the_same_genes(
    write: Callable, screen: ad.AnnData, tmp_path: Path
) -> None:
    genes = screen[:, screen.var["feature_types"] == "Gene Expression"].copy()
    genes.write_h5ad(tmp_path / "screen.h5ad")
    labels = {"labels": str(labels_of(screen, tmp_path))}
    found = harmonized(write(tmp_path, genes), tmp_path / "out", source=labels)
    assert_same(found, harmonized(tmp_path / "screen.h5ad", tmp_path / "of_h5ad"))
    assert found.account["features_apart"] == {}


def test_a_large_folder_is_read_in_pieces(
    screen: ad.AnnData, expected: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triplet_module, "ENTRIES", 3000)
    source = {"labels": str(labels_of(screen, tmp_path))}
    for name, options in {"sorted": {}, "by_gene": {"by_gene": True}}.items():
        folder = write_folder(tmp_path / name, screen, **options)
        assert len(list(open_source({"file": folder}, dataset_block()).blocks())) > 4
        assert_same(harmonized(folder, tmp_path / f"out_{name}", source=source), expected)


def test_scanpy_reads_the_same_from_what_the_tests_write(screen: ad.AnnData, tmp_path: Path) -> None:
    import scanpy as sc

    folder = sc.read_10x_mtx(write_folder(tmp_path / "10x", screen), gex_only=False)
    file = sc.read_10x_h5(write_h5(tmp_path / "10x.h5", screen), gex_only=False)
    for read in (folder, file):
        np.testing.assert_array_equal(read.X.toarray(), screen.X.toarray())
        assert list(read.var["feature_types"]) == list(screen.var["feature_types"])


@pytest.mark.slow
@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("kind", [np.asarray, sparse.csr_matrix, sparse.csc_matrix])
def test_a_zarr_store_gives_what_the_h5ad_gives(
    kind: Callable, version: int, screen: ad.AnnData, expected: SimpleNamespace, tmp_path: Path
) -> None:
    pytest.importorskip("zarr", reason="zarr is not installed")
    stored = screen.copy()
    stored.X = screen.X.toarray() if kind is np.asarray else kind(screen.X)
    with ad.settings.override(zarr_write_format=version):
        stored.write_zarr(tmp_path / "screen.zarr", chunks=(50, 20) if kind is np.asarray else None)
    shutil.move(tmp_path / "screen.zarr", tmp_path / "screen")  # told by what it is, not by its name
    assert_same(harmonized(tmp_path / "screen", tmp_path / "out"), expected)


def test_a_zarr_store_with_a_missing_chunk_is_told(screen: ad.AnnData, tmp_path: Path) -> None:
    pytest.importorskip("zarr", reason="zarr is not installed")
    screen.write_zarr(tmp_path / "screen.zarr")
    chunk = next(
        path
        for path in sorted((tmp_path / "screen.zarr/X/data").rglob("*"))
        if path.is_file() and path.name[0].isdigit()
    )
    chunk.unlink()
    with pytest.raises(
        InputError, match=r"screen\.zarr is damaged: '/X/data' cannot be read \(1 of \d+ chunks are missing\)"
    ):
        harmonized(tmp_path / "screen.zarr", tmp_path / "out")


def test_zarr_that_is_not_installed_is_one_message(
    screen: ad.AnnData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("zarr", reason="zarr is not installed")
    screen.write_zarr(tmp_path / "screen.zarr")
    monkeypatch.setitem(__import__("sys").modules, "zarr", None)
    with pytest.raises(
        InputError, match=r"screen\.zarr is a zarr store, and reading one takes the package zarr: pip install zarr\.$"
    ):
        harmonized(tmp_path / "screen.zarr", tmp_path / "out")


def modalities_of(screen: ad.AnnData) -> dict[str, ad.AnnData]:
    """Return genes and guides apart; the labels are with the guides, which are in another order and lack a control."""
    is_gene = (screen.var["feature_types"] == "Gene Expression").to_numpy()
    genes, guides = screen[:, is_gene].copy(), screen[:, ~is_gene].copy()
    genes.var = genes.var.drop(columns="feature_types")
    genes.obs = genes.obs[["lane"]]
    return {"rna": genes, "guide": guides[np.random.default_rng(1).permutation(screen.n_obs)].copy()}


def write_modalities(path: Path, parts: dict[str, ad.AnnData]) -> Path:
    """Write an h5mu in mudata's layout, without mudata."""
    with h5py.File(path, "w") as file:
        file.attrs.update({"encoding-type": "MuData", "encoding-version": "0.1.0"})
        for name, part in parts.items():
            ad.io.write_elem(file, f"mod/{name}", part)
        ad.io.write_elem(file, "obs", pd.DataFrame(index=parts["rna"].obs_names))
        ad.io.write_elem(file, "var", pd.DataFrame(index=[name for part in parts.values() for name in part.var_names]))
    return path


def test_the_layout_of_an_h5mu_gives_what_the_h5ad_gives(
    screen: ad.AnnData, expected: SimpleNamespace, tmp_path: Path
) -> None:
    path = write_modalities(tmp_path / "screen.h5mu", modalities_of(screen))
    found = harmonized(path, tmp_path / "out", perturbation={"column": "guide:perturbation"})
    assert_same(found, expected)


def test_an_h5mu_of_mudata_gives_what_the_h5ad_gives(
    screen: ad.AnnData, expected: SimpleNamespace, tmp_path: Path
) -> None:
    mudata = pytest.importorskip("mudata", reason="mudata is not installed")
    data = mudata.MuData(modalities_of(screen))
    data.obs["label"] = screen.obs["perturbation"].reindex(data.obs_names)
    data.write_h5mu(tmp_path / "screen.h5mu")
    for column in ("label", "guide:perturbation"):
        found = harmonized(tmp_path / "screen.h5mu", tmp_path / f"out_{column[:5]}", perturbation={"column": column})
        assert_same(found, expected)


def test_the_modality_of_gene_expression_can_be_named(
    screen: ad.AnnData, expected: SimpleNamespace, tmp_path: Path
) -> None:
    parts = modalities_of(screen)
    path = write_modalities(tmp_path / "screen.h5mu", {"rna": parts["rna"], "guide": parts["guide"]})
    with h5py.File(path, "r+") as file:
        file.move("mod/rna", "mod/gex")
    label = {"column": "guide:perturbation"}
    assert_same(harmonized(path, tmp_path / "out", source={"modality": "gex"}, perturbation=label), expected)
    with pytest.raises(
        InputError, match=r"has no modality 'rna'\. It holds gex, guide\. Name the one .* in source\.modality"
    ):
        harmonized(path, tmp_path / "out", perturbation=label)


def test_a_modality_without_counts_or_without_room_is_left_out_and_said(
    screen: ad.AnnData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    parts = modalities_of(screen)
    parts["clr"] = parts["guide"].copy()
    parts["clr"].X = sparse.csr_matrix(np.log1p(parts["guide"].X.toarray()))
    path = write_modalities(tmp_path / "screen.h5mu", parts)
    found = harmonized(path, tmp_path / "out", perturbation={"column": "guide:perturbation"})
    assert set(found.adata.obsm) == {"crispr_guide_capture"}
    assert "modality clr is left out" in caplog.text
    monkeypatch.setattr("perturbflow.screens.readers.modalities.MOST_VALUES", 10)
    assert not harmonized(path, tmp_path / "out", perturbation={"column": "guide:perturbation"}).adata.obsm
    assert "modality guide is left out, for it holds" in caplog.text


# --- labels in a table ------------------------------------------------------------------------------------------------


def protospacer_calls(screen: ad.AnnData, path: Path) -> Path:
    """Write the calls of Cell Ranger for a screen.

    A label of one gene has two guides of it; cells without a call have no row.
    """
    guides = {"control": "NT_1", "TF1": "TF1_1|TF1_2", "TF2": "TF2_1", "TF3": "TF3_2", "TF1+TF2": "TF1_2|TF2_1"}
    table = pd.DataFrame(
        {"cell_barcode": screen.obs_names, "feature_call": screen.obs["perturbation"].map(guides).to_numpy()}
    )
    table.insert(1, "num_features", table["feature_call"].str.count(r"\|") + 1)
    table["num_umis"] = ["12|30" if "|" in call else "7" for call in table["feature_call"]]
    table.iloc[5:].to_csv(path, index=False)
    return path


def test_protospacer_calls_are_labels(screen: ad.AnnData, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "10x", screen)
    calls = protospacer_calls(screen, tmp_path / "protospacer_calls_per_cell.csv")
    declared = {"column": "feature_call", "control": ["NT"], "separator": "|", "pattern": r"([^|]+)_\d+"}
    found = harmonized(
        folder, tmp_path / "out", source={"labels": str(calls)}, perturbation=declared, covariates={"batch": "lane"}
    )
    assert found.account["cells"]["dropped"] == {"unassigned": 5}
    assert found.adata.obs["perturbation"].astype(str).tolist() == screen.obs["perturbation"].astype(str).tolist()[5:]
    assert set(found.adata.obs["num_features"].dropna()) == {1, 2}


@pytest.mark.parametrize("pattern", [r"([^|]+)_\d+", r"^(.+)_\d+$", r"^([^_]+)_"])
def test_calls_of_two_guides_of_a_gene_are_one_member_whatever_the_order(pattern: str) -> None:
    from perturbflow.screens.annotation import canonical_labels

    genes = pd.DataFrame({"original_name": ["KLF1", "MAP2K6"], "gene_name": ["KLF1", "MAP2K6"]})
    block = dataset_block(perturbation={"column": "call", "control": ["NT"], "separator": "|", "pattern": pattern})
    calls = ["KLF1_1|KLF1_2", "KLF1_2|KLF1_1", "KLF1_1", "KLF1_1|NT", "MAP2K6_1|KLF1_2|KLF1_1", "NT_1|NT_2"]
    labels = canonical_labels(pd.DataFrame({"call": calls}), block, genes, Path("calls.csv"))
    assert labels.tolist() == ["KLF1", "KLF1", "KLF1", "KLF1", "KLF1+MAP2K6", "control"]


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_table_of_labels_is_joined_by_barcode(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    n = data.draw(st.integers(1, 12))
    cells = [f"{'ACGT'[i % 4]}{i:08d}-{1 + i % data.draw(st.integers(1, 2), label='lanes')}" for i in range(n)]
    listed = data.draw(st.lists(st.sampled_from(cells), min_size=1, unique=True))
    separator = data.draw(st.sampled_from([",", "\t", ";"]))
    is_gzipped, has_suffix = data.draw(st.booleans()), data.draw(st.booleans())
    is_of_one_lane = len({cell[-1] for cell in cells}) == 1
    table = pd.DataFrame({"n": range(len(listed)), "cell": listed, "guide": [f"g|{cell[:3]}" for cell in listed]})
    if is_of_one_lane and not has_suffix:
        table["cell"] = table["cell"].str[:-2]
    path = tmp_path_factory.mktemp("labels") / ("t.gz" if is_gzipped else "t")
    content = table.to_csv(sep=separator, index=False).encode()
    path.write_bytes(gzip.compress(content) if is_gzipped else content)
    obs = with_labels(pd.DataFrame({"lane": "1"}, index=cells), path, Path("screen"))
    assert list(obs.index) == cells
    assert list(obs.columns) == ["lane", "n", "guide"]
    expected = dict(zip(listed, table["guide"], strict=True))
    assert [None if pd.isna(found) else found for found in obs["guide"]] == [expected.get(cell) for cell in cells]
    assert [None if pd.isna(found) else str(found) for found in obs["n"]] == [
        str(listed.index(cell)) if cell in listed else None for cell in cells
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("barcode,guide\nAA-1,KLF1\nAA-1,KLF2\n", r"barcode AA-1 has several rows"),
        (
            "barcode,guide\nTT-1,KLF1\n",
            r"has no column with barcodes of screen, whose cells are called AA-1, CC-2.* barcode: TT-1",
        ),
        ("barcode,guide\nAA,KLF1\n", r"has no column with barcodes of screen"),
        ("", r"calls\.csv \(source\.labels\) cannot be read as a table"),
    ],
)
def test_a_table_of_labels_that_cannot_be_joined_is_told(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "calls.csv").write_text(content)
    with pytest.raises(InputError, match=message):
        with_labels(pd.DataFrame(index=["AA-1", "CC-2"]), tmp_path / "calls.csv", Path("screen"))


def test_barcodes_of_another_lane_are_not_joined(tmp_path: Path) -> None:
    cells = [f"{'ACGT'[i % 4]}{i:08d}" for i in range(9)]
    path = tmp_path / "calls.csv"

    def joined(of_table: str, of_screen: str) -> pd.DataFrame:
        pd.DataFrame({"barcode": [f"{cell}{of_table}" for cell in cells], "guide": "KLF1"}).to_csv(path, index=False)
        return with_labels(pd.DataFrame(index=[f"{cell}{of_screen}" for cell in cells]), path, Path("screen"))

    for suffixes in (("", "-1"), ("-2", ""), ("-2", "-2")):
        assert set(joined(*suffixes)["guide"]) == {"KLF1"}
    with pytest.raises(
        InputError,
        match=r"Without their ends \(-2, of the screen -1\) those of column barcode are the same: of another lane\?",
    ):
        joined("-2", "-1")


def test_a_column_with_a_name_that_anndata_keeps_for_itself_gets_another(screen: ad.AnnData, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "10x", screen)
    table = pd.read_csv(labels_of(screen, tmp_path)).assign(_index=1)
    table.to_csv(tmp_path / "calls.csv", index=False)
    found = harmonized(folder, tmp_path / "out", source={"labels": str(tmp_path / "calls.csv")})
    assert set(found.adata.obs["source__index"]) == {1}


# --- what is none of these --------------------------------------------------------------------------------------------


def planned(tmp_path: Path, source: dict, **changes: object) -> dict:
    """Check the configuration of a screen as the plan does."""
    from perturbflow.registry.shipped import above_shipped

    block = {"source": source, "perturbation": {"column": "perturbation", "control": ["control"]}, **changes}
    mine = {
        "select": {"datasets": ["mine"], "splits": ["unseen_perturbation"], "models": ["no_change"]},
        "datasets": {"mine": block},
    }
    return complete(above_shipped(mine))


def test_a_folder_is_planned_with(screen: ad.AnnData, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "10x", screen)
    labels = labels_of(screen, tmp_path)
    planned(tmp_path, {"path": str(folder), "labels": str(labels)})


def test_what_is_in_a_folder_that_is_no_source_is_told(screen: ad.AnnData, tmp_path: Path) -> None:
    write_folder(tmp_path / "outs/filtered_feature_bc_matrix", screen)
    (tmp_path / "outs/web_summary.html").write_text("x")
    message = (
        r"the folder '.*outs' holds filtered_feature_bc_matrix/, web_summary\.html; expected is a folder with "
        r"matrix\.mtx.* "
        r"Name one of these: .*outs/filtered_feature_bc_matrix\.$"
    )
    with pytest.raises(InputError, match=rf"datasets\.mine\.source\.path: {message}"):
        planned(tmp_path, {"path": str(tmp_path / "outs")})
    with pytest.raises(InputError, match=message.replace("the folder", "The folder")):
        harmonized(tmp_path / "outs", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"the folder '.*empty' holds nothing; expected is"):
        planned(tmp_path, {"path": str(tmp_path / "empty")})


def test_labels_that_are_not_there_are_told(screen: ad.AnnData, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "10x", screen)
    with pytest.raises(InputError, match=r"datasets\.mine\.source\.labels: there is no file 'calls\.csv'"):
        planned(tmp_path, {"path": str(folder), "labels": "calls.csv"})
    with pytest.raises(InputError, match=r"source\.labels: '.*' is a folder, and a file is expected"):
        planned(tmp_path, {"path": str(folder), "labels": str(folder)})


def test_keys_that_a_form_has_no_use_for_are_told(screen: ad.AnnData, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "10x", screen)
    with pytest.raises(InputError, match=r"10x holds its counts in one place\. Leave counts out"):
        harmonized(folder, tmp_path / "out", counts="raw")
    with pytest.raises(InputError, match=r"10x has no modalities.*Leave source\.modality out"):
        harmonized(folder, tmp_path / "out", source={"modality": "rna"})
    with pytest.raises(InputError, match=r"datasets\.mine\.counts: recipe tenx knows the content of its files"):
        planned(tmp_path, {"path": str(folder)}, recipe="tenx", counts="raw")


def test_a_triplet_without_a_part_and_two_in_one_folder_are_told(screen: ad.AnnData, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "10x", screen)
    write_folder(folder, screen, prefix="B_")
    with pytest.raises(InputError, match=r"10x holds 2 10x matrices \(B, \)|10x holds 2 10x matrices"):
        harmonized(folder, tmp_path / "out")
    alone = write_folder(tmp_path / "alone", screen)
    (alone / "barcodes.tsv.gz").unlink()
    with pytest.raises(InputError, match="barcodes of the triplet is missing"):
        harmonized(alone, tmp_path / "out")


def test_hdf5_of_another_kind_is_told_with_what_it_holds(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "molecule_info.h5", "w") as file:
        file["barcode_idx"], file["umi"] = np.arange(3), np.arange(3)
    with pytest.raises(
        InputError, match=r"molecule_info\.h5 holds barcode_idx, umi: it is neither AnnData, MuData nor a 10x matrix"
    ):
        harmonized(tmp_path / "molecule_info.h5", tmp_path / "out")


def test_two_genomes_in_one_file_are_told(screen: ad.AnnData, tmp_path: Path) -> None:
    path = write_h5(tmp_path / "both.h5", screen, version=2)
    with h5py.File(path, "r+") as file:
        file.copy("GRCh38", "mm10")
    with pytest.raises(InputError, match=r"a matrix for each of several genomes \(GRCh38, mm10\)"):
        harmonized(path, tmp_path / "out")


# --- folders and lists of other tools ---------------------------------------------------------------------------------


def write_listed(folder: Path, screen: ad.AnnData, genes: str, names: tuple[str, ...], **options: object) -> Path:
    """Write a triplet with a list of genes of one's own; names are those of matrix, barcodes and genes."""
    write_folder(folder, screen, gzipped=False, **options)
    lists = ["matrix.mtx", "barcodes.tsv", "features.tsv"]
    (folder / "features.tsv").write_text(genes)
    for old, new in zip(lists, names, strict=True):
        (folder / old).rename(folder / new)
    return folder


def genes_of(screen: ad.AnnData) -> ad.AnnData:
    """Return the genes of the screen alone."""
    return screen[:, (screen.var["feature_types"] == "Gene Expression").to_numpy()].copy()


TRIPLET = ("matrix.mtx", "barcodes.tsv", "features.tsv")
LISTS = {
    "names alone": (lambda var: "\n".join(var.index), TRIPLET),
    "names and empty columns": (lambda var: "\n".join(f"{name}\t\t" for name in var.index), TRIPLET),
    "names before ids": (lambda var: "\n".join(f"{name}\t{number}" for name, number in var["gene_ids"].items()),
                         TRIPLET),
    "commas": (lambda var: "\n".join(f"{number},{name}" for name, number in var["gene_ids"].items()),
               ("matrix.mtx", "barcodes.tsv", "features.csv")),
    "a header": (lambda var: "gene_id\tgene_name\n" + "\n".join(
        f"{number}\t{name}" for name, number in var["gene_ids"].items()), TRIPLET),
    "a header in another order": (
        lambda var: "symbol\tlength\tensembl_id\n" + "\n".join(
            f"{name}\t7\t{number}" for name, number in var["gene_ids"].items()), TRIPLET),
    "numbered rows": (lambda var: ",gene\n" + "\n".join(f"{i},{name}" for i, name in enumerate(var.index)),
                      ("matrix.mtx", "barcodes.tsv", "genes.csv")),
    "a byte order mark": (lambda var: "\ufeff" + "\n".join(var.index), TRIPLET),
}  # fmt: skip


@pytest.mark.parametrize("case", LISTS)
def test_lists_of_genes_of_any_form_give_the_same_genes(case: str, screen: ad.AnnData, tmp_path: Path) -> None:
    alone = genes_of(screen)
    write, names = LISTS[case]
    folder = write_listed(tmp_path / "10x", alone, write(alone.var), names)
    source = open_source({"file": folder}, dataset_block(source={"path": str(folder)}))
    assert list(source.var.index) == list(alone.var_names)
    np.testing.assert_array_equal(sparse.vstack([block for _, block in source.blocks()]).toarray(), alone.X.toarray())


def test_an_empty_name_among_names_takes_the_id(screen: ad.AnnData, tmp_path: Path) -> None:
    alone = genes_of(screen)
    lines = [f"{number}\t{'' if i == 3 else name}" for i, (name, number) in enumerate(alone.var["gene_ids"].items())]
    folder = write_listed(tmp_path / "10x", alone, "\n".join(lines), TRIPLET)
    assert open_source({"file": folder}, dataset_block()).var.index[3] == alone.var["gene_ids"].iloc[3]


def test_a_line_too_many_is_told_as_a_header(screen: ad.AnnData, tmp_path: Path) -> None:
    alone = genes_of(screen)
    folder = write_listed(tmp_path / "10x", alone, "x\n" + "\n".join(alone.var_names), TRIPLET)
    with pytest.raises(
        InputError, match=r"They are not of one set, or the list of genes starts with a header: delete its first line\."
    ):
        list(open_source({"file": folder}, dataset_block()).blocks())


@pytest.mark.parametrize("gzipped", [False, True])
@pytest.mark.parametrize("tool", ["kb-python", "kb-python with names", "Parse", "an older Parse"])
def test_folders_of_other_tools_are_read_as_they_are(
    tool: str, gzipped: bool, screen: ad.AnnData, tmp_path: Path
) -> None:
    # As many cells as genes, so that the size does not tell which are which.
    alone = genes_of(screen)[:81].copy() if tool == "kb-python" else genes_of(screen)[:60].copy()
    alone = alone[:, : min(alone.shape)].copy()
    ids, names = alone.var["gene_ids"], alone.var_names
    if tool.startswith("kb"):
        layout = ("cells_x_genes.mtx", "cells_x_genes.barcodes.txt", "cells_x_genes.genes.txt")
        folder = write_listed(tmp_path / "counts", alone, "\n".join(ids), layout, transposed=True)
        if "names" in tool:
            (folder / "cells_x_genes.genes.names.txt").write_text("\n".join(names))
    else:
        layout = ("count_matrix.mtx" if tool == "Parse" else "DGE.mtx", "cell_metadata.csv", "all_genes.csv")
        listed = "gene_id,gene_name,genome\n" + "\n".join(f"{number},{name},hg38" for name, number in ids.items())
        folder = write_listed(tmp_path / "DGE_filtered", alone, listed, layout, transposed=True)
        alone.obs.rename_axis("bc_wells").assign(sample="s1").to_csv(folder / "cell_metadata.csv")
    for file in list(folder.iterdir()) if gzipped else []:
        file.with_name(f"{file.name}.gz").write_bytes(gzip.compress(file.read_bytes()))
        file.unlink()
    planned(tmp_path, {"path": str(folder)})
    source = open_source({"file": folder}, dataset_block())
    assert list(source.obs.index) == list(alone.obs_names)
    assert list(source.var.index) == list(ids if tool == "kb-python" else names)
    np.testing.assert_array_equal(sparse.vstack([block for _, block in source.blocks()]).toarray(), alone.X.toarray())
    if "Parse" in tool:
        assert list(source.obs["perturbation"]) == list(alone.obs["perturbation"])
        assert set(source.obs["sample"]) == {"s1"}


OTHERS = {
    "alevin": (["quants_mat.mtx", "quants_mat_rows.txt", "quants_mat_cols.txt"],
               (r"Rename its files: quants_mat\.mtx → matrix\.mtx, quants_mat_cols\.txt → barcodes\.tsv, "
                r"quants_mat_rows\.txt → features\.tsv")),
    "one list by its name": (["counts.mtx", "barcodes.tsv", "gene_names.txt"],
                             r"Rename its files: counts\.mtx → matrix\.mtx, gene_names\.txt → features\.tsv"),
    "lists that could be either": (["x.mtx", "a.txt", "b.txt"],
                                   (r"x\.mtx → matrix\.mtx, the list of barcodes → barcodes\.tsv, the list of "
                                    r"features → features\.tsv")),
    "several matrices": (["cells_x_genes.mature.mtx", "cells_x_genes.total.mtx", "cells_x_genes.genes.txt"],
                         (r"Put one matrix of raw counts \(cells_x_genes\.mature\.mtx, cells_x_genes\.total\.mtx\) "
                          r"into a folder of its own, as matrix\.mtx")),
    "shares of reads": (["UniqueAndMult-EM.mtx", "barcodes.tsv", "features.tsv"],
                        r"UniqueAndMult-EM\.mtx of STARsolo shares reads .* add STARsolo's matrix\.mtx"),
    "a matrix whose lists are called otherwise": (["matrix.mtx", "cells.txt", "genes_list.txt"],
                                                  (r"barcodes and features of the triplet is missing\. Rename its "
                                                   r"files: cells\.txt → barcodes\.tsv, genes_list\.txt → "
                                                   r"features\.tsv")),
}  # fmt: skip


@pytest.mark.parametrize("case", OTHERS)
def test_a_folder_of_other_names_is_told_what_to_rename(case: str, tmp_path: Path) -> None:
    names, message = OTHERS[case]
    for name in names:
        (tmp_path / name).write_text("x\n")
    with pytest.raises(InputError, match=message):
        open_source({"file": tmp_path}, dataset_block(source={"path": str(tmp_path)}))


# --- gzipped files ----------------------------------------------------------------------------------------------------


def test_a_gzipped_h5ad_is_read(screen: ad.AnnData, expected: SimpleNamespace, tmp_path: Path) -> None:
    screen.write_h5ad(tmp_path / "screen.h5ad")
    packed = gzip.compress((tmp_path / "screen.h5ad").read_bytes())
    (tmp_path / "screen.h5ad.gz").write_bytes(packed)
    before = sorted(tmp_path.iterdir())
    assert_same(harmonized(tmp_path / "screen.h5ad.gz", tmp_path / "out"), expected)
    assert sorted(set(tmp_path.iterdir()) - {tmp_path / "out"}) == before
    (tmp_path / "screen.h5ad.gz").write_bytes(packed[:-2000])
    with pytest.raises(InputError, match=r"screen\.h5ad\.gz cannot be decompressed to its end .*Is it complete\?"):
        harmonized(tmp_path / "screen.h5ad.gz", tmp_path / "out")
    (tmp_path / "table.csv.gz").write_bytes(gzip.compress(b"a,b\n"))
    with pytest.raises(InputError, match=r"table\.csv\.gz is gzipped, and its content is no h5ad file\. Save"):
        harmonized(tmp_path / "table.csv.gz", tmp_path / "out")


@pytest.mark.parametrize("gzipped", [False, True])
def test_the_matrix_of_a_folder_that_is_named_itself_is_told(gzipped: bool, screen: ad.AnnData, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "10x", screen, gzipped=gzipped)
    with pytest.raises(
        InputError, match=r"is a matrix without its cells and genes\. Name its folder in source\.path, .*10x\."
    ):
        harmonized(folder / f"matrix.mtx{'.gz' if gzipped else ''}", tmp_path / "out")


# --- types in modalities ----------------------------------------------------------------------------------------------

MODALITIES = {
    "biotypes of genes": ({"type": "protein_coding"}, "gdo", {}),
    "a word of genes": ({"feature_type": "gene"}, "gdo", {"feature_type": "gdo"}),
    "an upper-case modality": ({"modality": "RNA"}, "gdo", {}),
    "odd names": ({"type": "RNA"}, "guides_screen", {}),
    "guides typed as genes": ({"feature_types": "Gene Expression"}, "gdo", {"feature_types": "Gene Expression"}),
    "a modality called as genes are": ({}, "gene", {}),
}


@pytest.mark.parametrize("case", MODALITIES)
def test_features_of_another_modality_are_no_genes_whatever_they_are_called(
    case: str, screen: ad.AnnData, tmp_path: Path
) -> None:
    of_genes, name, of_guides = MODALITIES[case]
    parts = modalities_of(screen)
    rna, guides = parts["rna"], next(part for key, part in parts.items() if key != "rna")
    for part, columns in ((rna, of_genes), (guides, of_guides)):
        part.var = part.var.drop(columns=["feature_types"], errors="ignore").assign(**columns)
    path = write_modalities(tmp_path / "screen.h5mu", {"rna": rna, name: guides})
    found = harmonized(path, tmp_path / "out", perturbation={"column": f"{name}:perturbation"})
    assert not set(found.adata.var_names) & set(guides.var_names)
    ((_, told),) = found.account["features_apart"].items()
    assert told["features"] == guides.n_vars


# --- what makes a result stale ----------------------------------------------------------------------------------------


def test_the_content_of_a_folder_is_that_of_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from perturbflow.provenance.records import content_digest

    monkeypatch.chdir(tmp_path)
    (tmp_path / ".snakemake").mkdir()
    for name in ("a", "b"):
        (tmp_path / f"store/{name}").mkdir(parents=True)
        (tmp_path / f"store/{name}/0").write_text(name)
    shutil.copytree("store", "copy")
    first = content_digest("store")
    assert content_digest("copy") == first == content_digest("store")
    (tmp_path / "store/a/0").write_text("A")
    assert content_digest("store") != first
    (tmp_path / "store/a/0").write_text("a")
    assert content_digest("store") == first
    (tmp_path / "store/a/0").rename(tmp_path / "store/a/1")
    assert content_digest("store") != first
