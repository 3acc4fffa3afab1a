"""Only gene expression is expression, and counts are read where they are.

Guides, antibodies and normalized values are no counts of genes.
"""

import json
from collections.abc import Callable
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
from conftest import Prepared, dataset_block, make_screen, prepare
from hypothesis import given
from hypothesis import strategies as st
from scipy import sparse

from perturbflow.audit import audit
from perturbflow.errors import InputError
from perturbflow.screens.annotation import gene_table
from perturbflow.screens.features import doubtful_features, features_apart, keys_of
from perturbflow.screens.readers import open_source

TYPES = {
    "CRISPR Guide Capture": ["TF1_1", "TF1_2", "NT_1"],
    "Antibody Capture": ["CD3", "CD4"],
    "Multiplexing Capture": ["CMO301", "CMO302"],
    "Custom": ["GENE5x"],
}


def with_features(
    screen: ad.AnnData, types: dict[str, list[str]], column: str | None = "feature_types", level: float = 400.0
) -> ad.AnnData:
    """Return a screen with further features of high counts between its genes."""
    rng = np.random.default_rng(7)
    names = [name for kind in types.values() for name in kind]
    kinds = [kind for kind, named in types.items() for _ in named]
    X = sparse.csr_matrix(rng.poisson(level, (screen.n_obs, len(names))).astype(np.float32))
    var = pd.DataFrame(index=[*screen.var_names, *names])
    if column:
        var[column] = ["Gene Expression"] * screen.n_vars + kinds
    both = ad.AnnData(sparse.hstack([screen.X, X], format="csr"), obs=screen.obs.copy(), var=var)
    return both[:, rng.permutation(both.n_vars)].copy()


@pytest.mark.parametrize("kind", [sparse.csr_matrix, sparse.csc_matrix, np.asarray])
def test_what_is_no_gene_is_kept_apart_and_named(kind: Callable, harmonized_from: Callable) -> None:
    screen = make_screen()
    both = with_features(screen, TYPES)
    qc = {"min_counts": 900, "min_genes": 70, "min_cells_per_gene": 5, "min_cells_per_perturbation": 10}
    alone = harmonized_from(screen[:, [name for name in both.var_names if name in screen.var_names]].copy(), qc=qc)
    counts = both.X
    both.X = counts.toarray() if kind is np.asarray else kind(counts)
    found = harmonized_from(both, qc=qc)
    assert 0 < found.adata.n_obs < screen.n_obs
    assert list(found.adata.obs_names) == list(alone.adata.obs_names)
    pd.testing.assert_frame_equal(found.adata.var, alone.adata.var)
    np.testing.assert_array_equal(found.adata.X.toarray(), alone.adata.X.toarray())
    pd.testing.assert_series_equal(found.adata.obs["total_counts"], alone.adata.obs["total_counts"])
    rows = both.obs_names.get_indexer(found.adata.obs_names)
    assert set(found.adata.obsm) == set(keys_of(TYPES).values())
    for name, key in keys_of(TYPES).items():
        names = list(found.adata.uns["perturbflow"]["features_apart"][key])
        assert sorted(names) == sorted(TYPES[name])
        assert isinstance(found.adata.obsm[key], sparse.csr_matrix)
        np.testing.assert_array_equal(
            found.adata.obsm[key].toarray(), counts[rows][:, both.var_names.get_indexer(names)].toarray()
        )
        told = found.account["features_apart"][name]
        assert told == {"features": len(names), "first": names[:5], "obsm": key}
        assert found.account["genes"]["dropped"][name] == len(names)
    assert found.account["genes"]["source"] == both.n_vars


@pytest.mark.parametrize("layout", ["layer", "gene_pattern"])
def test_features_are_kept_apart_wherever_the_counts_are(layout: str, harmonized_from: Callable) -> None:
    screen = make_screen()
    both = with_features(screen, TYPES)
    changes = {}
    if layout == "layer":
        both.layers["counts"], both.X = both.X.copy(), sparse.csr_matrix(np.log1p(both.X.toarray()))
    else:
        changes["gene_pattern"] = "^(?!GENE1)"
    found = harmonized_from(both, **changes)
    assert not set(found.adata.var_names) & {name for named in TYPES.values() for name in named}
    assert found.adata.obsm["antibody_capture"].toarray().mean() > 300
    dropped = {name: len(named) for name, named in TYPES.items()}
    if layout == "gene_pattern":
        dropped["gene_pattern"] = sum(name.startswith("GENE1") for name in screen.var_names)
    assert found.account["genes"]["dropped"] == dropped


COLUMNS = {
    "10x's words": ("feature_types", "Gene Expression", "CRISPR Guide Capture", True),
    "another case": ("feature_type", "gene_expression", "crispr_guide_capture", True),
    "anything beside 10x's word": ("modality", "Gene Expression", "my own", True),
    "short words": ("modality", "rna", "grna", True),
    "a column of another name": ("type", "GEX", "ADT", True),
    "genes without a type": ("feature_types", None, "Antibody Capture", True),
    "biotypes": ("type", "protein_coding", "lncRNA", False),
    "kinds of genes": ("type", "gene", "pseudogene", False),
    "one type": ("feature_types", "Gene Expression", "Gene Expression", False),
    "unknown words": ("feature_types", "a", "b", False),
    "nothing known": ("feature_types", None, "custom", False),
    "10x's words in any column": ("chromosome", "Gene Expression", "CRISPR Guide Capture", True),
    "in a column of biotypes": ("gene_biotype", "protein_coding", "CRISPR Guide Capture", True),
    "a column in another spelling": ("Feature Types", "Transcripts", "AbSeq", True),
    "a guide RNA": ("feature_types", "Transcript", "Guide RNA", True),
    "a guide RNA among kinds of genes": ("type", "protein_coding", "guide_RNA", False),
    "words of other kits": ("featureType", "cDNA", "SampleTag", True),
    "a biotype beside guides": ("Type", "protein_coding", "protospacer", True),
    "a library": ("library_type", "scRNA-seq", "CITE-seq", True),
    "short words in another column": ("chromosome", "rna", "grna", False),
}


@pytest.mark.parametrize("case", COLUMNS)
def test_words_of_types_are_understood_and_others_left(case: str) -> None:
    column, gene, other, is_apart = COLUMNS[case]
    var = pd.DataFrame({column: pd.Categorical([gene, gene, other, gene])}, index=["KLF1", "CEBPA", "x", "SPI1"])
    apart = features_apart(var, [], "mine.h5ad")
    assert {kind: list(numbers) for kind, numbers in apart.items()} == ({other: [2]} if is_apart else {})


def test_columns_that_tell_types_are_read_together() -> None:
    var = pd.DataFrame(
        {
            "feature_types": ["Gene Expression"] * 3,
            "kind": [np.nan, "Antibody Capture", np.nan],
            "type": ["RNA", "RNA", "sgRNA"],
        }
    )
    assert {kind: list(numbers) for kind, numbers in features_apart(var, [], "x").items()} == {
        "sgRNA": [2],
        "Antibody Capture": [1],
    }


DOUBTFUL = {
    "an unknown word": ({"feature_types": ["RNA", "RNA", "spam"]}, ["KLF1", "GATA1", "x"], ["'spam' of 1 (x)"]),
    "no type beside 10x's": ({"kind": ["Gene Expression", "Gene Expression", None]}, ["KLF1", "GATA1", "x"],
                             ["nothing of 1 (x)"]),
    "biotypes": ({"type": ["protein_coding", "lncRNA", "TEC"]}, ["KLF1", "GATA1", "x"], []),
    "one word": ({"feature_types": ["a", "a", "a"]}, ["KLF1", "GATA1", "x"], []),
    "names of guides": ({}, ["KLF1", "sgKLF1-1", "GATA1_sg2", "sgRNA_KLF1", "non-targeting_00001", "SGK1", "GFP"],
                        ["sgKLF1-1, GATA1_sg2, sgRNA_KLF1, non-targeting_00001."]),
    "names of antibodies": ({}, ["KLF1", "ADT_CD3", "HTO_1", "Hashtag_1", "anti-CD4", "LMO2", "PROTX"],
                            ["ADT_CD3, HTO_1, Hashtag_1, anti-CD4."]),
}  # fmt: skip


@pytest.mark.parametrize("case", DOUBTFUL)
def test_features_that_may_be_no_genes_are_told(case: str) -> None:
    columns, names, said = DOUBTFUL[case]
    var = pd.DataFrame(columns, index=names)
    found = doubtful_features(var, gene_table(var, {"organism": "human"}))
    assert len(found) == len(said)
    assert all(part in sentence for part, sentence in zip(said, found, strict=True)), found
    assert all("gene_pattern" in sentence for sentence in found)


def test_the_one_gene_without_an_ensembl_id_is_told(harmonized_from: Callable) -> None:
    screen = make_screen(n_genes=200)
    screen.var["gene_ids"] = [f"ENSG{i:011d}" for i in range(99900000000, 99900000199)] + [""]
    (warning,) = harmonized_from(screen).account["warnings"]
    assert screen.var_names[-1] in warning
    assert "for want of an Ensembl id" in warning
    screen.var["gene_ids"] = [*screen.var["gene_ids"][:150], *[""] * 50]
    assert harmonized_from(screen).account["warnings"] == []


@pytest.mark.parametrize("name", ["norman_k562_mini/perturbench_devel_counts.h5ad",
                                  "gasperini_mini/gasperini_merged.h5ad",
                                  "cropseq_mcf10a/scmageck_cropseq_mcf10a.h5ad",
                                  "gears_schema/norman_subset.h5ad"])  # fmt: skip
def test_no_gene_of_a_real_screen_is_doubtful(name: str, shared_data: Callable[[str], Path]) -> None:
    with h5py.File(shared_data(name)) as file:
        var = ad.io.read_elem(file["var"])
    table = gene_table(var, {"organism": "human"})
    assert (features_apart(var, [], name), table.attrs["notes"], doubtful_features(var, table)) == ({}, [], [])


def test_pairs_of_guides_among_the_genes_of_a_real_file_are_told(shared_data: Callable[[str], Path]) -> None:
    with h5py.File(shared_data("carpool_cells/carpool_semisynthetic.h5ad")) as file:
        var = ad.io.read_elem(file["var"])
    (said,) = doubtful_features(var, gene_table(var, {"organism": "human"}))
    assert said.startswith("240 of the genes may be guides, antibodies or hashtags by their names")
    assert "ATXN7L3_g1:NT_g2" in said


def test_a_file_without_genes_is_told() -> None:
    neither = pd.DataFrame({"feature_types": ["CRISPR Guide Capture", "Antibody Capture"]}, index=["a", "b"])
    with pytest.raises(
        InputError,
        match=r"mine\.h5ad holds no gene expression: its features are CRISPR Guide Capture, Antibody Capture",
    ):
        features_apart(neither, [], "mine.h5ad")


NAMES = {
    "TotalSeq": (["CD3", "CD4_TotalSeqB", "CD8A_TotalSeqC0080"], None, [], {"Antibody Capture": [1, 2]}),
    "guides that are labels": (["KLF1", "KLF1_1", "KLF1_2"], None, ["KLF1_1"], {"CRISPR Guide Capture": [1]}),
    "guides among Ensembl ids": (["KLF1", "GATA1", "SPI1", "KLF1_1"],
                                 ["ENSG00000105610", "ENSG00000102145", "ENSG00000066336", "KLF1_1"],
                                 [], {"CRISPR Guide Capture": [3]}),
    "a name made unique": (["TBCE", "TBCE-1"], ["ENSG00000284770", "ENSG00000285053"], ["TBCE-1"], {}),
    "a gene with a number": (["NKX2", "NKX2-1"], None, ["NKX2-1"], {}),
    "a guide that no label and no id tells": (["KLF1", "KLF1_1"], None, [], {}),
    "a reporter": (["KLF1", "GFP"], None, ["GFP"], {}),
    "an id of a genome": (["KLF1", "KLF1-1"], ["GRCh38_ENSG00000105610", "GRCh38_ENSG00000105611"], [], {}),
}  # fmt: skip


@pytest.mark.parametrize("case", NAMES)
def test_names_tell_what_is_no_gene_only_where_they_do_so_for_sure(case: str) -> None:
    names, ids, labels, expected = NAMES[case]
    var = pd.DataFrame({"gene_ids": ids} if ids else {}, index=names)
    assert {kind: list(numbers) for kind, numbers in features_apart(var, labels, "mine.h5ad").items()} == expected


@given(kinds=st.lists(st.text(max_size=8), max_size=6, unique=True))
def test_every_type_has_a_key_of_its_own_that_anndata_can_store(kinds: list[str]) -> None:
    keys = list(keys_of(kinds).values())
    assert len(set(keys)) == len(kinds)
    assert all(key and "/" not in key for key in keys)


def test_pairs_do_not_carry_them_and_the_audit_knows_them(tmp_path: Path) -> None:
    spec = {"kind": "unseen_combination", "test_fraction": 0.5, "validation_fraction": 0.1, "seed": 0}
    here: Prepared = prepare(tmp_path, with_features(make_screen(), TYPES), spec)
    assert set(ad.read_h5ad(here.harmonized).obsm) == set(keys_of(TYPES).values())
    pairs = ad.read_h5ad(here.pairs)
    assert set(pairs.obsm) == {"control_index"}
    assert not set(pairs.var_names) & {name for named in TYPES.values() for name in named}
    audit.audit(here.harmonized, here.split, here.pairs, here.embeddings, tmp_path / "audit.json")
    with h5py.File(here.harmonized, "r+") as file:
        file.copy("obsm/custom", "obsm/X_umap")
    with pytest.raises(InputError, match=r"harmonized\.h5ad carries obsm X_umap"):
        audit.audit(here.harmonized, here.split, here.pairs, here.embeddings, tmp_path / "audit.json")


# --- where the counts are ---------------------------------------------------------------------------------------------


def normalized(screen: ad.AnnData) -> ad.AnnData:
    """Return a screen as it is shared: X is normalized and holds the variable genes; raw holds the counts of all."""
    shared = screen[:, 5:60].copy()
    shared.X = sparse.csr_matrix(np.log1p(shared.X.toarray()) / 2)
    shared.raw = screen
    shared.layers["raw_counts"] = screen[:, 5:60].X.copy()
    shared.layers["scaled"] = shared.X.toarray() - 0.5
    return shared


@pytest.mark.slow
@pytest.mark.parametrize("form", ["h5ad", "zarr"])
@pytest.mark.parametrize(("counts", "n_genes"), [("raw", 80), ("raw_counts", 55), ("layers/raw_counts", 55)])
def test_counts_are_read_where_the_block_says(
    form: str, counts: str, n_genes: int, harmonized_from: Callable, tmp_path: Path
) -> None:
    screen = make_screen()
    path = tmp_path / f"shared.{form}"
    getattr(normalized(screen), f"write_{form}")(path)
    found = harmonized_from(path, counts=counts)
    assert found.adata.n_vars == n_genes
    np.testing.assert_array_equal(
        found.adata.X.toarray(), screen[:, list(found.adata.var["original_name"])].X.toarray()
    )


def test_counts_of_raw_of_the_first_versions_are_read(harmonized_from: Callable, tmp_path: Path) -> None:
    screen = make_screen()
    normalized(screen).write_h5ad(tmp_path / "old.h5ad")
    with h5py.File(tmp_path / "old.h5ad", "r+") as file:
        file.move("raw/X", "raw.X")
        del file["raw"]
        table = np.array([(name.encode(),) for name in screen.var_names], dtype=[("index", "S20")])
        file.create_dataset("raw.var", data=table)
        file["raw.X"].attrs.clear()
        file["raw.X"].attrs.update({"h5sparse_format": "csr", "h5sparse_shape": screen.shape})
    found = harmonized_from(tmp_path / "old.h5ad", counts="raw")
    np.testing.assert_array_equal(found.adata.X.toarray(), screen.X.toarray())


@pytest.mark.slow
@pytest.mark.parametrize("form", ["h5ad", "zarr"])
def test_where_x_holds_no_counts_the_places_that_do_are_named(
    form: str, harmonized_from: Callable, tmp_path: Path
) -> None:
    shared = normalized(make_screen())
    shared.layers["binary"] = sparse.csr_matrix((shared.X > 0).astype(np.float32))
    getattr(shared, f"write_{form}")(tmp_path / f"shared.{form}")
    with pytest.raises(
        InputError,
        match=(
            r"counts are needed, X: it holds .* no integers .*Counts are in raw, raw_counts: write counts: raw "
            r"into its block"
        ),
    ):
        harmonized_from(tmp_path / f"shared.{form}")
    with pytest.raises(InputError, match=r"layers\['scaled'\]: it holds negative.*Counts are in raw, raw_counts"):
        harmonized_from(tmp_path / f"shared.{form}", counts="scaled")


def test_where_nothing_holds_counts_no_place_is_named(harmonized_from: Callable) -> None:
    shared = normalized(make_screen())
    shared.raw = None
    del shared.layers["raw_counts"]
    with pytest.raises(InputError, match=r"no integers .*\. Put the integer counts into X or layers\['counts'\];"):
        harmonized_from(shared)


def test_a_place_that_does_not_exist_is_told_with_those_that_do(harmonized_from: Callable) -> None:
    with pytest.raises(
        InputError,
        match=(
            r"has no counts in 'umis' \(counts\)\. It holds X, raw, raw_counts, scaled\. Say so in its block: "
            r"counts: raw\."
        ),
    ):
        harmonized_from(normalized(make_screen()), counts="umis")


def test_a_layer_named_as_raw_is_reached(tmp_path: Path) -> None:
    screen = make_screen()
    shared = screen.copy()
    shared.X = sparse.csr_matrix(np.log1p(screen.X.toarray()))
    shared.layers["raw"] = screen.X.copy()
    shared.write_h5ad(tmp_path / "layer.h5ad")
    for counts in ("raw", "layers/raw"):
        (_, block), *_ = open_source({"file": tmp_path / "layer.h5ad"}, dataset_block(counts=counts)).blocks()
        np.testing.assert_array_equal(block.toarray(), screen.X.toarray())


def test_the_default_stays_x_and_then_the_layer_counts(harmonized_from: Callable) -> None:
    screen = make_screen()
    shared = normalized(screen)
    shared.layers["counts"] = shared.layers.pop("raw_counts")
    found = harmonized_from(shared)
    np.testing.assert_array_equal(found.adata.X.toarray(), screen[:, 5:60].X.toarray())
    assert json.loads(found.report.read_text())["features_apart"] == {}


# --- values that pass for counts --------------------------------------------------------------------------------------


def test_where_x_is_binary_the_layer_of_counts_is_taken(harmonized_from: Callable) -> None:
    screen = make_screen()
    screen.layers["counts"] = screen.X.copy()
    screen.X = (screen.X > 0).astype(np.float32)
    found = harmonized_from(screen)
    np.testing.assert_array_equal(found.adata.X.toarray(), screen.layers["counts"].toarray())
    assert found.account["warnings"] == []
    screen.layers["umis"] = screen.layers.pop("counts")
    (warning,) = harmonized_from(screen).account["warnings"]
    assert (
        warning
        == "no value of X is above 1, while umis holds higher counts: if these are the raw ones, set counts: umis."
    )
    del screen.layers["umis"]
    (warning,) = harmonized_from(screen).account["warnings"]
    assert warning.startswith("X holds 0 and 1 alone")


def test_rounded_logarithms_beside_counts_are_told(harmonized_from: Callable) -> None:
    screen = make_screen()
    screen.raw = screen.copy()
    screen.X = np.rint(np.log1p(screen.X.toarray()))
    (warning,) = harmonized_from(screen).account["warnings"]
    assert "while raw holds higher counts" in warning
    assert harmonized_from(screen, counts="raw").account["warnings"] == []


def test_rounded_shares_are_told_by_their_sums(harmonized_from: Callable) -> None:
    screen = make_screen()
    X = screen.X.toarray()
    screen.X = np.rint(1e4 * X / X.sum(axis=1, keepdims=True)).astype(np.float32)
    (warning,) = harmonized_from(screen).account["warnings"]
    assert warning.startswith("all cells have nearly the same sum in X (9,9")
    assert "key counts" in warning
    rng = np.random.default_rng(0)
    screen.X = rng.poisson(5.0, screen.shape).astype(np.float32)
    assert harmonized_from(screen).account["warnings"] == [], "cells of one depth still differ as counts do"


def test_a_file_of_guides_alone_is_no_screen() -> None:
    var = pd.DataFrame({"feature_types": "CRISPR Guide Capture"}, index=["KLF1_1", "KLF1_2"])
    with pytest.raises(InputError, match=r"holds no gene expression: its features are CRISPR Guide Capture"):
        features_apart(var, [], "screen.h5ad")


def test_one_word_of_the_files_own_for_all_genes_changes_nothing() -> None:
    assert features_apart(pd.DataFrame({"type": "gene"}, index=["KLF1", "GATA1"]), [], "screen.h5ad") == {}
    assert features_apart(pd.DataFrame({"feature_types": "Custom"}, index=["KLF1", "GATA1"]), [], "screen.h5ad") == {}
