"""Pairs and embeddings: matched within the role, and nothing but training cells decides on genes, scale and vectors."""

import json
from collections.abc import Callable
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
from conftest import SPECS, SPECS_OF_CELLS, Prepared
from scipy import sparse

from perturbflow import embeddings, pairs
from perturbflow.controls import Groups, match_controls
from perturbflow.embeddings import Embeddings, coexpression, from_table
from perturbflow.errors import InputError
from perturbflow.genes.symbols import CONTROL, entities_of
from perturbflow.genes.variable import highly_variable
from perturbflow.io import streaming
from perturbflow.pairs import CONTROLS_PER_CELL, Pairs

KINDS = [*SPECS, *SPECS_OF_CELLS]


@pytest.fixture(params=KINDS)
def adata(request: pytest.FixtureRequest, prepared: dict[str, Prepared]) -> ad.AnnData:
    """Return pairs.h5ad of every kind of split."""
    return ad.read_h5ad(prepared[request.param].pairs)


@pytest.fixture
def cells(prepared: dict[str, Prepared]) -> Pairs:
    """Return the pairs of the split that holds combinations out."""
    return Pairs.read(prepared["unseen_combination"].pairs)


# --- matching -------------------------------------------------------------------------------------------------------


def test_all_matched_controls_are_of_the_role_batch_and_cell_type(adata: ad.AnnData) -> None:
    index = adata.obsm["control_index"]
    is_control = adata.obs["is_control"].to_numpy()
    assert index.shape == (adata.n_obs, CONTROLS_PER_CELL)
    assert index.dtype == np.int32
    assert (index[is_control] == -1).all()
    matched = index[~is_control]
    assert is_control[matched].all()
    for column in ("role", "batch", "cell_type"):
        values = adata.obs[column].astype(str).to_numpy()
        assert (values[matched] == values[~is_control][:, None]).all(), column
    assert adata.uns["perturbflow"]["n_relaxed_matches"] == 0


def test_every_control_is_used_equally_often(adata: ad.AnnData) -> None:
    table = adata.obs.assign(row=np.arange(adata.n_obs))
    controls = table[table["is_control"]]
    for (role, batch, _), group in table[~table["is_control"]].groupby(
        ["role", "batch", "perturbation"], observed=True
    ):
        pool = controls.loc[(controls["role"] == role) & (controls["batch"] == batch), "row"]
        uses = pd.Series(adata.obsm["control_index"][group["row"]].ravel()).value_counts().reindex(pool, fill_value=0)
        assert uses.max() - uses.min() <= 1


def toy(rows: list[tuple[str, str, str, str]]) -> pd.DataFrame:
    """Return obs of (perturbation, role, batch, cell type)."""
    obs = pd.DataFrame(rows, columns=["perturbation", "role", "batch", "cell_type"])
    return obs.assign(is_control=obs["perturbation"] == CONTROL)


def test_a_batch_without_controls_gets_those_of_its_cell_type_and_is_counted() -> None:
    obs = toy(
        [
            ("control", "train", "b1", "t1"),
            ("control", "train", "b1", "t2"),
            ("A", "train", "b2", "t1"),
            ("A", "train", "b1", "t1"),
        ]
    )
    index, n_relaxed = match_controls(obs, 3, seed=0)
    assert n_relaxed == 1
    assert index[2].tolist() == [0, 0, 0]
    assert index[3].tolist() == [0, 0, 0]


@pytest.mark.parametrize("row", [("A", "train", "b1", "t2"), ("A", "test", "b1", "t1")], ids=["cell type", "role"])
def test_without_any_control_to_compare_with_there_is_an_error(row: tuple) -> None:
    with pytest.raises(InputError, match=f"no control cell of cell type '{row[3]}' has the role {row[1]}: A cannot"):
        match_controls(toy([("control", "train", "b1", "t1"), row]), 3, seed=0)


def test_matching_depends_on_the_seed_alone() -> None:
    obs = toy([("control", "train", "b1", "t1")] * 30 + [("A", "train", "b1", "t1")] * 10)
    assert np.array_equal(match_controls(obs, 4, 0)[0], match_controls(obs, 4, 0)[0])
    assert not np.array_equal(match_controls(obs, 4, 0)[0], match_controls(obs, 4, 1)[0])


# --- expression -----------------------------------------------------------------------------------------------------


def test_x_is_log1p_of_counts_scaled_to_the_training_median(
    adata: ad.AnnData, prepared: dict[str, Prepared], request: pytest.FixtureRequest
) -> None:
    screen = ad.read_h5ad(prepared[request.node.callspec.params["adata"]].harmonized)[adata.obs_names]
    totals = screen.X.toarray().sum(axis=1)
    target = np.median(totals[(adata.obs["role"] == "train").to_numpy()])
    assert adata.uns["perturbflow"]["target_sum"] == pytest.approx(target)
    counts = adata.layers["counts"].toarray()
    assert np.array_equal(counts, screen[:, adata.var_names].X.toarray())
    assert np.allclose(adata.X.toarray(), np.log1p(counts * target / totals[:, None]), rtol=1e-5)
    assert adata.X.dtype == np.float32


def test_highly_variable_genes_and_all_measured_perturbed_genes_are_kept(adata: ad.AnnData) -> None:
    assert adata.var["highly_variable"].sum() == 40
    genes = {gene for label in adata.obs["perturbation"].unique() for gene in entities_of(label)}
    assert set(adata.var_names[adata.var["is_perturbed_gene"]]) == genes
    assert (adata.var["highly_variable"] | adata.var["is_perturbed_gene"]).all()
    assert adata.n_vars < 80


@pytest.mark.parametrize("kind", KINDS)
def test_held_out_cells_decide_on_nothing(kind: str, prepared: dict[str, Prepared], tmp_path: Path) -> None:
    here = prepared[kind]
    roles = json.loads(here.split.read_text())
    screen = ad.read_h5ad(here.harmonized)
    held_out = screen.obs_names.isin([*roles["cells"]["validation"], *roles["cells"]["test"]])
    X = screen.X.toarray()
    X[held_out] = np.random.default_rng(0).poisson(50, (held_out.sum(), screen.n_vars))
    screen.X = sparse.csr_matrix(X.astype(np.float32))
    screen.write_h5ad(tmp_path / "harmonized.h5ad")
    pairs.pair(tmp_path / "harmonized.h5ad", here.split, tmp_path / "pairs.h5ad", 40)
    embeddings.embeddings(tmp_path / "pairs.h5ad", tmp_path / "embeddings.parquet", ["coexpression"])

    before, after = ad.read_h5ad(here.pairs), ad.read_h5ad(tmp_path / "pairs.h5ad")
    pd.testing.assert_frame_equal(before.var, after.var)
    assert before.uns["perturbflow"]["target_sum"] == after.uns["perturbflow"]["target_sum"]
    is_train = (before.obs["role"] == "train").to_numpy()
    assert (before.X[is_train] != after.X[is_train]).nnz == 0
    assert (before.X[~is_train] != after.X[~is_train]).nnz > 0, "the change must have arrived"
    pd.testing.assert_frame_equal(pd.read_parquet(here.embeddings), pd.read_parquet(tmp_path / "embeddings.parquet"))


def test_training_cells_do_decide(prepared: dict[str, Prepared], tmp_path: Path) -> None:
    here = prepared["unseen_combination"]
    roles = json.loads(here.split.read_text())
    screen = ad.read_h5ad(here.harmonized)
    X = screen.X.toarray()
    X[screen.obs_names.isin(roles["cells"]["train"])] *= 2
    screen.X = sparse.csr_matrix(X)
    screen.write_h5ad(tmp_path / "harmonized.h5ad")
    pairs.pair(tmp_path / "harmonized.h5ad", here.split, tmp_path / "pairs.h5ad", 40)
    before, after = (
        ad.read_h5ad(path).uns["perturbflow"]["target_sum"] for path in (here.pairs, tmp_path / "pairs.h5ad")
    )
    assert after == pytest.approx(2 * before)


def test_more_hvgs_than_genes_keep_all(prepared: dict[str, Prepared], tmp_path: Path) -> None:
    here = prepared["unseen_combination"]
    pairs.pair(here.harmonized, here.split, tmp_path / "pairs.h5ad", 2000)
    adata = ad.read_h5ad(tmp_path / "pairs.h5ad")
    assert adata.n_vars == 80
    assert adata.var["highly_variable"].all()


def test_the_same_inputs_give_the_same_pairs(prepared: dict[str, Prepared], tmp_path: Path) -> None:
    here = prepared["unseen_combination"]
    pairs.pair(here.harmonized, here.split, tmp_path / "again.h5ad", 40)
    first, second = ad.read_h5ad(here.pairs), ad.read_h5ad(tmp_path / "again.h5ad")
    assert (first.X != second.X).nnz == 0
    assert np.array_equal(first.obsm["control_index"], second.obsm["control_index"])
    pd.testing.assert_frame_equal(first.obs, second.obs)


# --- block by block -------------------------------------------------------------------------------------------------


def in_memory(here: Prepared, n_hvg: int) -> ad.AnnData:
    """Return the result of `pair` but for matched controls and halves, from the whole screen in memory, by scanpy."""
    roles = json.loads(here.split.read_text())["cells"]
    role_of = {cell: role for role, cells in roles.items() for cell in cells}
    screen = ad.read_h5ad(here.harmonized)
    screen = screen[screen.obs_names.isin(list(role_of))].copy()
    is_train = screen.obs_names.isin(roles["train"])
    screen.layers["counts"] = screen.X.copy()
    sc.pp.normalize_total(screen, target_sum=float(np.median(screen.X[is_train].toarray().sum(axis=1))))
    sc.pp.log1p(screen)
    training = screen[is_train].copy()
    sc.pp.highly_variable_genes(training, n_top_genes=n_hvg, flavor="seurat")
    perturbed = {gene for label in screen.obs["perturbation"].unique() for gene in entities_of(label)}
    screen.var["highly_variable"] = training.var["highly_variable"]
    screen.var["is_perturbed_gene"] = screen.var_names.isin(perturbed)
    screen.obs["role"] = pd.Categorical([role_of[cell] for cell in screen.obs_names], ["train", "validation", "test"])
    kept = screen[:, screen.var["highly_variable"] | screen.var["is_perturbed_gene"]].copy()
    kept.strings_to_categoricals()  # as writing does
    return kept


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_give_what_the_whole_screen_in_memory_gives(
    kind: str, prepared: dict[str, Prepared], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming, "ROWS_AT_ONCE", 33)  # 16 blocks or more
    pairs.pair(prepared[kind].harmonized, prepared[kind].split, tmp_path / "pairs.h5ad", 40)
    found, expected = ad.read_h5ad(tmp_path / "pairs.h5ad"), in_memory(prepared[kind], 40)
    pd.testing.assert_frame_equal(found.obs.drop(columns="half"), expected.obs[found.obs.columns.drop("half")])
    pd.testing.assert_frame_equal(found.var, expected.var[found.var.columns])
    assert (found.layers["counts"] != expected.layers["counts"]).nnz == 0
    np.testing.assert_allclose(found.X.toarray(), expected.X.toarray(), rtol=1e-6)
    assert found.X.dtype == found.layers["counts"].dtype == np.float32


def test_the_layer_of_counts_shares_the_places_of_its_values_with_x(prepared: dict[str, Prepared]) -> None:
    with h5py.File(prepared["unseen_combination"].pairs) as file:
        for name in ("indices", "indptr"):
            assert file["X"][name] == file["layers/counts"][name]


@pytest.mark.parametrize("n_genes", [1, 30, 170, 400])
def test_highly_variable_genes_are_those_of_scanpy(n_genes: int) -> None:
    rng = np.random.default_rng(0)
    X = sparse.csr_matrix(
        rng.negative_binomial(1.0, 1 / (1 + rng.lognormal(-1, 2, 400)), (300, 400)).astype(np.float32)
    )
    X[:, 5] = 0.0
    training = ad.AnnData(X.copy())
    sc.pp.log1p(training)
    sc.pp.highly_variable_genes(training, n_top_genes=n_genes, flavor="seurat")
    found = highly_variable(
        X.toarray().sum(axis=0, dtype=float), (X.toarray() ** 2).sum(axis=0, dtype=float), 300, n_genes
    )
    assert np.array_equal(found, training.var["highly_variable"])


# --- halves ---------------------------------------------------------------------------------------------------------


def test_held_out_perturbations_are_halved_within_batch(adata: ad.AnnData) -> None:
    obs = adata.obs
    in_halves = obs["half"].isin(["a", "b"])
    assert (in_halves == ((obs["role"] != "train") & ~obs["is_control"])).all()
    sizes = (
        obs[in_halves]
        .groupby(["perturbation", "role", "batch", "half"], observed=True)
        .size()
        .unstack("half", fill_value=0)
    )
    assert ((sizes["a"] - sizes["b"]).abs() <= 1).all()
    of_role = sizes.groupby(["perturbation", "role"], observed=True).sum()
    assert (of_role > 0).all().all()
    assert (of_role["b"] - of_role["a"]).isin([0, 1]).all()


def test_an_only_cell_is_scored_rather_than_kept_as_duplicate() -> None:
    obs = toy(
        [("A", "test", "b1", "t1"), ("B", "test", "b1", "t1"), ("B", "test", "b1", "t1"), ("C", "train", "b1", "t1")]
    )
    half = pairs._halves(obs, 0)
    assert half[0] == "b"
    assert sorted(half[1:3]) == ["a", "b"]
    assert half[3] == ""


# --- reading --------------------------------------------------------------------------------------------------------


def test_a_selection_points_at_the_same_controls(cells: Pairs) -> None:
    for roles in (("test",), ("train", "validation"), ("validation",)):
        some = cells.roles(*roles)
        assert set(some.obs["role"]) == set(roles)
        perturbed = ~some.is_control
        assert (some.control_index[~perturbed] == -1).all()
        assert (some.rows[some.control_index[perturbed]] == cells.control_index[some.rows[perturbed]]).all()
        assert (cells.X[some.rows] != some.X).nnz == 0
        assert list(some.obs.index) == list(cells.obs.index[some.rows])


def test_a_selection_of_a_selection(cells: Pairs) -> None:
    direct, in_two_steps = cells.roles("test"), cells.roles("validation", "test").roles("test")
    assert np.array_equal(direct.rows, in_two_steps.rows)
    assert np.array_equal(direct.control_index, in_two_steps.control_index)


def test_the_control_mean_is_weighted_as_the_cells_are_over_batches(cells: Pairs) -> None:
    test = cells.roles("test")
    label = test.perturbations[0]
    rows = test.cells_of(label)
    batch = test.obs["batch"].astype(str).to_numpy()
    few = np.concatenate([rows[batch[rows] == "b1"][:3], rows[batch[rows] == "b2"][:9]])
    X = test.X.toarray()
    means = {name: X[test.is_control & (batch == name)].mean(axis=0) for name in ("b1", "b2")}
    assert np.allclose(test.control_mean_for(few), (3 * means["b1"] + 9 * means["b2"]) / 12, atol=1e-5)
    assert not np.allclose(means["b1"], means["b2"], atol=0.1), "batches must differ for this to mean anything"
    assert np.allclose(test.effect_of(label), X[rows].mean(axis=0) - test.control_mean_for(rows), atol=1e-5)


def test_cells_of_other_roles_are_not_in_the_control_mean(cells: Pairs) -> None:
    rows = cells.roles("test").rows[cells.roles("test").cells_of(cells.roles("test").perturbations[0])]
    test = cells.roles("test")
    assert np.allclose(
        cells.control_mean_for(rows), test.control_mean_for(test.cells_of(test.perturbations[0])), atol=1e-6
    )


# --- embeddings -----------------------------------------------------------------------------------------------------


def test_coexpression_is_a_pca_of_standardized_training_cells(cells: Pairs) -> None:
    genes = ["TF1", "TF2", "not measured"]
    table = coexpression(cells, genes)
    assert list(table.index) == genes
    assert table.shape[1] == min(32, len(cells.genes))
    assert table.loc["not measured"].isna().all()
    X = cells.roles("train").X.toarray().astype(np.float64)
    X = (X - X.mean(axis=0)) / X.std(axis=0)
    _, s, Vt = np.linalg.svd(X, full_matrices=False)
    rows = [cells.genes.index(gene) for gene in genes[:2]]
    expected = (Vt[:32].T * s[:32] / np.sqrt(len(X)))[rows]
    assert np.allclose(np.abs(table.iloc[:2]), np.abs(expected), atol=1e-6)


def test_a_users_table_is_read_by_symbol_and_missing_genes_are_empty(tmp_path: Path) -> None:
    path = tmp_path / "go.tsv"
    path.write_text("gene\tx\ty\nAARS\t1\t2\nTF2\t3\t4\n")
    table = from_table(path, ["AARS1", "TF2", "TF3"])
    assert table.loc["AARS1"].tolist() == [1, 2]
    assert table.loc["TF3"].isna().all()
    assert list(table.columns) == ["x", "y"]
    pd.DataFrame({"x": [1.0]}, index=pd.Index(["TF2"], name="gene")).to_parquet(tmp_path / "t.parquet")
    assert from_table(tmp_path / "t.parquet", ["TF2"]).loc["TF2"].tolist() == [1.0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("gene\tx\nTF1\tword\n", "the first column holds gene symbols, all others numbers"),
        ("gene\nTF1\n", r"\(no columns\)"),
        ("gene\tx\nZZZ\t1\n", "no row for any of the 2 genes that are asked for"),
        ("", "cannot be read as a tab-separated table"),
    ],
)
def test_a_table_that_cannot_be_used_is_explained(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "go.tsv"
    path.write_text(content)
    with pytest.raises(InputError, match=message) as raised:
        from_table(path, ["TF1", "TF2"])
    assert "go.tsv" in str(raised.value)


def test_sources_are_concatenated_in_order(prepared: dict[str, Prepared], tmp_path: Path) -> None:
    path = tmp_path / "go.tsv"
    path.write_text("gene\tx\nTF1\t1\n")
    target = tmp_path / "embeddings.parquet"
    embeddings.embeddings(prepared["unseen_combination"].pairs, target, [{"file": str(path)}, "coexpression"])
    table = pd.read_parquet(target)
    assert table.columns[0] == "go:x"
    assert table.columns[1] == "coexpression:0"
    assert list(table.index) == [f"TF{i}" for i in range(1, 9)]
    assert (table.dtypes == np.float32).all()


def test_standardization_is_by_training_genes_and_fills_with_their_mean() -> None:
    table = pd.DataFrame({"x": [1.0, 3.0, 100.0, np.nan], "flat": [2.0, 2.0, 5.0, 2.0]}, index=["A", "B", "C", "D"])
    standardized = Embeddings(table).standardized(["A", "B", "not there"])
    assert standardized["x"].tolist() == [-1.0, 1.0, 98.0, 0.0]
    assert standardized["flat"].tolist() == [0.0, 0.0, 3.0, 0.0]


# --- the order of files ---------------------------------------------------------------------------------------------


def test_a_cell_that_the_split_does_not_place_is_left_out(prepared_copy: Callable, tmp_path: Path) -> None:
    here = prepared_copy("unseen_combination")
    roles = json.loads(here.split.read_text())
    gone = roles["cells"]["train"].pop(0)
    here.split.write_text(json.dumps(roles))
    pairs.pair(here.harmonized, here.split, tmp_path / "pairs.h5ad", 40)
    assert gone not in ad.read_h5ad(tmp_path / "pairs.h5ad").obs_names


def test_a_batch_without_controls_is_compared_with_those_of_its_cell_type(prepared: dict[str, Prepared]) -> None:
    everything = Pairs.read(prepared["unseen_combination"].pairs).roles("train")
    in_b2 = (everything.obs["batch"].astype(str) == "b2").to_numpy()
    without = everything.select(~(in_b2 & everything.is_control))
    rows = without.cells_of("TF1")
    batch = without.obs.iloc[rows]["batch"].astype(str)
    controls = without.mean_of(np.flatnonzero(without.is_control))
    expected = controls  # all that is left is b1, for cells of b1 and b2 alike
    assert set(batch) == {"b1", "b2"}
    np.testing.assert_allclose(without.control_mean_for(rows), expected, atol=1e-5)


# --- bad input ------------------------------------------------------------------------------------------------------


def test_a_disk_that_is_too_small_is_told_before_anything_is_written(
    prepared: dict[str, Prepared], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pairs, "BYTES_PER_VALUE", 1e12)
    here = prepared["unseen_combination"]
    with pytest.raises(InputError, match=r"pairs\.h5ad will take about .* GB, and .* GB are free"):
        pairs.pair(here.harmonized, here.split, tmp_path / "pairs.h5ad", 40)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("n_batches", [1, 400])
def test_cells_of_a_few_are_matched_in_one_batch_and_in_hundreds(n_batches: int) -> None:
    """Three cells per perturbation; where batches are as many as cells, most are compared with other batches."""
    rng = np.random.default_rng(0)
    labels = ["control"] * 60 + [f"G{i}" for i in range(100) for _ in range(3)]
    rows = [
        (label, "train", f"b{batch}", "t1")
        for label, batch in zip(labels, rng.integers(0, n_batches, 360), strict=True)
    ]
    obs = toy(rows)
    index, n_relaxed = match_controls(obs, 4, 0)
    is_control = obs["is_control"].to_numpy()
    assert is_control[index[~is_control]].all()
    own = set(obs.loc[is_control, "batch"])
    assert n_relaxed == (~obs.loc[~is_control, "batch"].isin(own)).sum()
    groups = Groups(sorted(set(labels) - {CONTROL}), obs["perturbation"].to_numpy(), is_control, obs)
    np.testing.assert_allclose(groups.control_weights().sum(axis=1), 1.0)
    values = rng.normal(size=(360, 2))
    effects = groups.effects(groups.sums(values))
    batch = obs["batch"].to_numpy()
    for i, label in enumerate(groups.labels[:10]):
        pools = [
            is_control & ((batch == batch[row]) | (batch[row] not in own))
            for row in np.flatnonzero(obs["perturbation"] == label)
        ]
        expected = values[obs["perturbation"] == label].mean(axis=0) - np.mean(
            [values[pool].mean(axis=0) for pool in pools], axis=0
        )
        np.testing.assert_allclose(effects[i], expected)


def test_perturbations_with_few_cells_everywhere_have_an_effect_and_none_by_context(cells: Pairs) -> None:
    few = np.concatenate([cells.cells_of(label)[:3] for label in cells.perturbations])
    mask = cells.is_control.copy()
    mask[few] = True
    some = cells.roles("train").select(mask[cells.roles("train").rows])
    assert some.effects_by_context == {}
    assert np.isfinite(some.effect_of(some.perturbations[0])).all()
