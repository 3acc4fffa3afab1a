"""Predictions from a file: one that fits the screen scores as it should, in any form; others are refused in words."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from conftest import (
    COMBINATIONS,
    PERTURBED,
    SPECS,
    Prepared,
    closed_forms_config,
    make_screen,
    merged,
    prepare,
    write_screen,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import sparse

from perturbflow.errors import InputError
from perturbflow.evaluation import evaluate
from perturbflow.models.predictions_file import PredictionsFile, Terms
from perturbflow.pairs import Pairs
from perturbflow.predict import predict
from perturbflow.registry.families import FAMILIES, PredictionsParams
from perturbflow.registry.plan import Plan
from perturbflow.train import train

IMPLEMENTATION = FAMILIES["predictions"].implementation
DEFAULTS = {"values": "expression", "scale": "log1p", "target_sum": None, "label": "perturbation", "separator": "+"}
OTHER_SUM = 1e4  # the screen's own is about a thousand


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """Return a screen whose combinations are held out."""
    return prepare(tmp_path_factory.mktemp("combinations"), make_screen(), SPECS["unseen_combination"])


@pytest.fixture(scope="module")
def pairs(here: Prepared) -> ad.AnnData:
    """Return pairs.h5ad in memory."""
    return ad.read_h5ad(here.pairs)


@pytest.fixture(scope="module")
def target_sum(pairs: ad.AnnData) -> float:
    """Return the sum that the screen is normalized to."""
    return float(pairs.uns["perturbflow"]["target_sum"])


@pytest.fixture(scope="module")
def perfect(pairs: ad.AnnData) -> ad.AnnData:
    """Return cells as good as half a: in every batch its values of each gene, in another order of the cells."""
    rng = np.random.default_rng(0)
    half = pairs[(pairs.obs["role"] == "test") & (pairs.obs["half"] == "a")]
    X = half.X.toarray()
    for places in half.obs.groupby(["perturbation", "batch"], observed=True).indices.values():
        X[places] = np.stack([rng.permutation(column) for column in X[places].T], axis=1)
    return ad.AnnData(X, half.obs[["perturbation", "batch", "cell_type"]].astype(str), pairs.var[[]].copy())


@pytest.fixture(scope="module")
def means(pairs: ad.AnnData) -> ad.AnnData:
    """Return the mean of all measured cells of every test perturbation."""
    test = pairs[(pairs.obs["role"] == "test") & ~pairs.obs["is_control"]]
    table = test.to_df().groupby(test.obs["perturbation"].astype(str)).mean()
    return ad.AnnData(table.to_numpy(), pd.DataFrame({"perturbation": table.index}), pairs.var[[]].copy())


def scored(here: Prepared, folder: Path, implementation: str, params: dict) -> pd.DataFrame:
    """Train, predict and score as the rules do; return perturbations × metrics."""
    folder.mkdir(exist_ok=True)
    train(here.pairs, here.embeddings, here.audit, folder / "model.npz", folder / "run.json", implementation, params, 0)
    predict(here.pairs, folder / "model.npz", folder / "predictions.h5ad", implementation, params, 0, 1000)
    evaluate(folder / "predictions.h5ad", here.pairs, here.split, folder / "metrics.tsv")
    table = pd.read_csv(folder / "metrics.tsv", sep="\t")
    return table.pivot_table(index="perturbation", columns="metric", values="value", dropna=False)


@pytest.fixture(scope="module")
def known(here: Prepared, tmp_path_factory: pytest.TempPathFactory) -> dict[str, pd.DataFrame]:
    """Return the scores of the ceiling (half a) and of no change."""
    names = ("technical_duplicate", "no_change")
    return {name: scored(here, tmp_path_factory.mktemp(name), FAMILIES[name].implementation, {}) for name in names}


@pytest.fixture
def run(here: Prepared, tmp_path: Path) -> Callable[..., pd.DataFrame]:
    """Return a function that scores a file through the family, given the predictions and how they are declared."""
    numbers = itertools.count()

    def call(cells: ad.AnnData | Path, **params: object) -> pd.DataFrame:
        path = cells
        if isinstance(cells, ad.AnnData):
            path = tmp_path / f"theirs_{next(numbers)}.h5ad"
            cells.write_h5ad(path)
        return scored(here, tmp_path, IMPLEMENTATION, {"file": str(path), **DEFAULTS, **params})

    return call


@pytest.fixture
def said(run: Callable) -> Callable[..., str]:
    """Return a function that gives the message with which a file is refused."""

    def call(cells: ad.AnnData | Path, **params: object) -> str:
        with pytest.raises(InputError) as refused:
            run(cells, **params)
        return str(refused.value)

    return call


def changed(cells: ad.AnnData, X: np.ndarray | sparse.spmatrix | None = None, **obs: object) -> ad.AnnData:
    """Return predictions with other values or other columns of obs."""
    return ad.AnnData(cells.X.copy() if X is None else X, cells.obs.assign(**obs), cells.var.copy())


def normalized_to(cells: ad.AnnData, own: float, other: float) -> np.ndarray:
    """Return linear values of counts that are normalized to another sum."""
    return np.expm1(cells.X.astype(float)) * (other / own)


# --- what fits ------------------------------------------------------------------------------------------------------


def test_cells_as_good_as_half_a_score_as_the_ceiling(
    run: Callable, perfect: ad.AnnData, known: dict, tmp_path: Path
) -> None:
    scores, ceiling = run(perfect), known["technical_duplicate"]
    for metric in ("mae", "pearson_delta_ctrl", "pearson_delta_pert", "wmse", "pds_cosine"):
        np.testing.assert_allclose(scores[metric], ceiling[metric], rtol=2e-3, atol=1e-4)
    predictions = ad.read_h5ad(tmp_path / "predictions.h5ad")
    assert list(predictions.obs) == ["perturbation", "cell_type", "batch"]
    assert not predictions.uns["perturbflow"]["starts_from_controls"]
    assert "missing" not in predictions.uns["perturbflow"]
    facts = json.loads((tmp_path / "run.json").read_text())["facts"]["file"]
    assert facts["holds"] == "cells"
    assert facts["missing_genes"] == []


def test_means_get_all_metrics_and_beat_the_ceiling(
    run: Callable, means: ad.AnnData, known: dict, tmp_path: Path
) -> None:
    """They are means of the scored cells, too."""
    scores = run(means)
    assert (scores["mae"] < known["technical_duplicate"]["mae"]).all()
    assert (scores["pearson_delta_ctrl"] > 0.95).all()
    assert scores.notna().all().all() == known["no_change"].notna().all().all()
    assert "control_index" in ad.read_h5ad(tmp_path / "predictions.h5ad").obs


def test_effects_and_tables_are_means_too(
    run: Callable, means: ad.AnnData, pairs: ad.AnnData, here: Prepared, tmp_path: Path
) -> None:
    expected = run(means)
    table = pd.DataFrame(means.X, index=means.obs["perturbation"], columns=means.var_names)
    for name, separator in (("means.tsv", "\t"), ("means.csv", ",")):
        table.iloc[::-1, ::-1].to_csv(tmp_path / name, sep=separator)
        np.testing.assert_allclose(run(tmp_path / name)["mae"], expected["mae"], rtol=1e-3)
    table.to_parquet(tmp_path / "means.parquet")
    np.testing.assert_allclose(run(tmp_path / "means.parquet")["mae"], expected["mae"], rtol=1e-3)
    cells = Pairs.read(here.pairs).roles("test")
    controls = [cells.control_mean_for(cells.cells_of(label)) for label in means.obs["perturbation"]]
    effects = changed(means, means.X - np.stack(controls))
    np.testing.assert_allclose(run(effects, values="effect")["mae"], expected["mae"], rtol=0.02)


@pytest.mark.parametrize("form", ["log1p at another sum", "its sum declared", "linear", "counts", "all genes"])
def test_other_scales_are_converted(
    run: Callable, perfect: ad.AnnData, known: dict, target_sum: float, form: str
) -> None:
    linear = normalized_to(perfect, target_sum, OTHER_SUM)
    declared: dict[str, object] = {}
    cells = changed(perfect, np.log1p(linear).astype(np.float32))
    if form == "its sum declared":
        cells, declared = changed(perfect, np.log1p(linear * 0.3)), {"target_sum": 0.3 * OTHER_SUM}
    elif form == "linear":
        cells, declared = changed(perfect, linear), {"scale": "linear"}
    elif form == "counts":
        totals = np.linspace(500, 3000, len(linear))
        counts = linear / OTHER_SUM * totals[:, None]
        cells, declared = changed(perfect, counts, total_counts=totals), {"scale": "counts"}
    elif form == "all genes":  # the sum that is not asked for is in the cells
        rest = 0.25 * OTHER_SUM - np.zeros(len(linear))
        linear *= 0.75 * OTHER_SUM / linear.sum(axis=1, keepdims=True) * 1.0
        var = pd.DataFrame(index=[*perfect.var_names, "OTHERS"])
        cells = ad.AnnData(np.log1p(np.column_stack([linear, rest])), perfect.obs, var)
        assert run(cells)["mae"].mean() < known["no_change"]["mae"].mean()
        return
    np.testing.assert_allclose(run(cells, **declared)["mae"], known["technical_duplicate"]["mae"], rtol=2e-3)


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 10**6), form=st.sampled_from([np.asarray, sparse.csr_matrix, sparse.csc_matrix]))
def test_order_labels_and_form_do_not_matter(
    perfect: ad.AnnData, here: Prepared, tmp_path: Path, seed: int, form: Callable
) -> None:
    rng = np.random.default_rng(seed)
    genes, cells = rng.permutation(perfect.n_vars + 2), rng.permutation(perfect.n_obs)
    X = np.column_stack([perfect.X, rng.poisson(3, (perfect.n_obs, 2))])[cells][:, genes]
    var = pd.DataFrame(index=np.array([*perfect.var_names, "EXTRA1", "EXTRA2"])[genes])
    labels = perfect.obs["perturbation"].iloc[cells].astype(str)
    turned = ["+".join(rng.permutation(label.split("+"))) for label in labels]
    path = tmp_path / "theirs.h5ad"
    ad.AnnData(form(X), perfect.obs.iloc[cells].assign(perturbation=turned), var).write_h5ad(path)
    held_out = Pairs.open(here.pairs).roles("test")
    file = PredictionsFile(path, PredictionsParams(str(path)), Terms.of(held_out))
    assert file.has_cells
    rows = np.arange(file.check() is not None and perfect.n_obs)
    np.testing.assert_allclose(file.expression(rows, file.check()), perfect.X[cells], atol=1e-5)
    assert file.labels(held_out.perturbations).tolist() == labels.tolist()


def test_labels_of_gears_and_of_a_file_of_theirs(run: Callable, perfect: ad.AnnData, known: dict) -> None:
    cells = changed(perfect)
    cells.obs["condition"] = ["_".join(reversed(label.split("+"))) for label in cells.obs.pop("perturbation")]
    scores = run(cells, label="condition", separator="_")
    np.testing.assert_allclose(scores["mae"], known["technical_duplicate"]["mae"], rtol=2e-3)


def test_single_perturbations_of_gears_are_read(tmp_path: Path, means: ad.AnnData, here: Prepared) -> None:
    path = tmp_path / "theirs.h5ad"
    texts = ["TF1+ctrl", "ctrl+TF2", "ctrl", "TF4+TF3"]
    changed(means[[0, 0, 0, 0]].copy(), perturbation=texts).write_h5ad(path)
    file = PredictionsFile(path, PredictionsParams(str(path)), Terms.of(Pairs.open(here.pairs)))
    assert file.labels(["TF1", "TF2", "TF3+TF4"]).tolist() == ["TF1", "TF2", "control", "TF3+TF4"]


def test_missing_genes_take_the_mean_of_the_controls(
    run: Callable, perfect: ad.AnnData, means: ad.AnnData, known: dict, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    gone = [gene for gene in perfect.var_names if gene.startswith("GENE")][:4]
    for cells in (perfect, means):
        scores = run(cells[:, ~cells.var_names.isin(gone)].copy())
        assert (scores["mae"] < known["no_change"]["mae"]).mean() > 0.5
        assert f"4 of {perfect.n_vars} genes are missing" in caplog.text
        assert json.loads((tmp_path / "run.json").read_text())["facts"]["file"]["missing_genes"] == gone


def test_missing_perturbations_are_scored_as_no_change_and_named(
    run: Callable, perfect: ad.AnnData, means: ad.AnnData, known: dict, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    gone = perfect.obs["perturbation"].iloc[0]
    floor = known["no_change"]
    for cells in (perfect, means):
        caplog.clear()
        scores = run(cells[(cells.obs["perturbation"] != gone).to_numpy()].copy())
        assert scores.index.tolist() == floor.index.tolist(), "none is left out of a mean"
        np.testing.assert_allclose(scores.loc[gone, "mae"], floor.loc[gone, "mae"], rtol=0.02)
        assert f"scored as no change: {gone}" in caplog.text
        assert ad.read_h5ad(tmp_path / "predictions.h5ad").uns["perturbflow"]["missing"].tolist() == [gone]
        table = pd.read_csv(tmp_path / "metrics.tsv", sep="\t").drop_duplicates("perturbation")
        assert table.loc[table["n_predicted"] == 0, "perturbation"].tolist() == [gone]


def test_other_numbers_of_cells_and_no_places_serve(run: Callable, perfect: ad.AnnData, known: dict) -> None:
    many = perfect[np.repeat(np.arange(perfect.n_obs), 2)].copy()
    many.obs_names_make_unique()
    del many.obs["batch"]
    np.testing.assert_allclose(run(many)["mae"], known["technical_duplicate"]["mae"], rtol=0.02)
    few = perfect[::3].copy()
    few.obs["batch"] = "no batch of theirs"
    assert (run(few)["mae"] < known["no_change"]["mae"]).all()


# --- what does not fit ----------------------------------------------------------------------------------------------


def test_other_scales_are_refused(said: Callable, perfect: ad.AnnData, means: ad.AnnData, target_sum: float) -> None:
    X = perfect.X
    assert "values are below zero" in said(changed(perfect, (X - X.mean(axis=0)) / (X.std(axis=0) + 0.1)))
    unlogged = normalized_to(perfect, target_sum, OTHER_SUM)
    assert "params.scale says log1p, which stays below 20" in said(changed(perfect, unlogged))
    assert "normalized to about" in said(changed(perfect, np.log1p(unlogged / 3)))
    assert "its values are no linear" in said(perfect, scale="linear")
    assert "params.target_sum says 200" in said(perfect, target_sum=200.0)
    other = np.log1p(normalized_to(means, target_sum, OTHER_SUM))
    assert "The mean of a logarithm cannot be converted" in said(changed(means, other))
    assert "means of linear values" in said(changed(means, np.expm1(means.X)), scale="linear")
    assert "obs has no total_counts" in said(changed(perfect, unlogged), scale="counts")
    totals = np.full(len(X), 6 * unlogged.sum(axis=1).mean())
    assert "they look like counts normalized to about" in said(
        changed(perfect, unlogged, total_counts=totals), scale="counts"
    )


def test_effects_and_expression_are_told_apart(
    said: Callable, perfect: ad.AnnData, means: ad.AnnData, pairs: ad.AnnData
) -> None:
    control = pairs[pairs.obs["is_control"]].X.mean(axis=0)
    effects = changed(means, np.asarray(means.X - control))
    assert "params.values: effect" in said(effects)
    assert "Say params.values: expression" in said(means, values="effect")
    assert "params.values says effect. Cells hold expression" in said(perfect, values="effect")
    assert "effects are differences of mean log1p" in said(effects, values="effect", target_sum=OTHER_SUM)


def test_values_that_cannot_be_are_refused(said: Callable, perfect: ad.AnnData) -> None:
    for value, words in ((np.nan, "is no finite number (1 of the "), (-1.0, "down to -1")):
        X = perfect.X.copy()
        X[3, list(perfect.var_names).index("GENE0")] = value
        assert words in said(changed(perfect, X))


def test_tables_that_cannot_be_read_are_refused(
    said: Callable, means: ad.AnnData, perfect: ad.AnnData, tmp_path: Path
) -> None:
    table = pd.DataFrame(means.X, index=means.obs["perturbation"], columns=means.var_names)
    file = tmp_path / "means.tsv"
    label = str(table.index[0])
    pd.concat([table, table.iloc[:1].rename({label: "+".join(reversed(label.split("+")))})]).to_csv(file, sep="\t")
    assert f"these have several: {label}." in said(file)
    table.astype(str).assign(GENE0="high").to_csv(file, sep="\t")
    assert "the others hold numbers" in said(file)
    table.T.to_csv(file, sep="\t")
    assert "Its rows are genes" in said(file)
    table.to_csv(file)
    assert "it has one column. A .tsv has tabs" in said(file)
    (tmp_path / "means.txt").write_text("")
    assert "predictions are h5ad, tsv, csv or parquet" in said(tmp_path / "means.txt")
    assert "there is no file" in said(tmp_path / "none.h5ad")
    assert "obs has no column 'gene', only perturbation, batch, cell_type" in said(perfect, label="gene")
    assert f"it has 10 of the {perfect.n_vars} genes" in said(perfect[:, :10].copy())
    (tmp_path / "text.h5ad").write_text("no cells")
    assert "text.h5ad cannot be read as h5ad" in said(tmp_path / "text.h5ad")


@pytest.mark.parametrize("half", ["a", "b"])
@pytest.mark.parametrize("is_converted", [False, True])
def test_the_test_cells_themselves_are_refused(
    said: Callable, pairs: ad.AnnData, target_sum: float, half: str, is_converted: bool
) -> None:
    cells = pairs[(pairs.obs["role"] == "test") & (pairs.obs["half"] == half)]
    X = np.log1p(np.expm1(cells.X.toarray()) * OTHER_SUM / target_sum) if is_converted else cells.X
    theirs = ad.AnnData(X, cells.obs[["perturbation"]].astype(str), cells.var[[]].copy())
    assert "are measured cells of this split" in said(theirs)


def test_another_split_is_refused(said: Callable, perfect: ad.AnnData, pairs: ad.AnnData) -> None:
    theirs = perfect.copy()
    theirs.uns = {"perturbflow": {"split_sha256": "0" * 64}}
    own = pairs.uns["perturbflow"]["split_sha256"]
    assert f"is 000000000000…, and the split.json of these pairs has {own[:12]}…" in said(theirs)
    assert "none of its 2 perturbations is held out in this split: TF1, TF2" in said(
        changed(perfect, perturbation=np.resize(["TF1", "TF2"], perfect.n_obs))
    )


def test_a_file_that_changes_after_its_check_is_refused(
    run: Callable, perfect: ad.AnnData, here: Prepared, tmp_path: Path
) -> None:
    run(perfect)
    path = tmp_path / "theirs_0.h5ad"
    path.unlink()
    changed(perfect, perfect.X * 1.01).write_h5ad(path)
    told = (IMPLEMENTATION, {"file": str(path), **DEFAULTS}, 0, 1000)
    with pytest.raises(InputError, match="was changed after it was checked"):
        predict(here.pairs, tmp_path / "model.npz", tmp_path / "predictions.h5ad", *told)


# --- in a configuration ---------------------------------------------------------------------------------------------


def config_of(file: str) -> dict:
    """Return a configuration with predictions from a file."""
    mine = closed_forms_config(models={"theirs": {"family": "predictions", "params": {"file": file}}})
    mine["select"] = {**mine["select"], "models": ["theirs", "additive"], "seeds": [0, 1]}
    return mine


def test_the_plan_fills_in_the_path_and_names_a_missing_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_screen(tmp_path)
    config = config_of("theirs/{dataset}.{split}.seed_{seed}.h5ad")
    with pytest.raises(InputError) as refused:
        Plan(merged(config), [])
    assert (
        "there is no file 'theirs/mine.unseen_combination.seed_0.h5ad' for model theirs on mine × unseen_combination, "
        f"seed 0 (looked for {tmp_path}/theirs/mine.unseen_combination.seed_0.h5ad); no file"
    ) in str(refused.value)
    for seed in (0, 1):
        path = tmp_path / f"theirs/mine.unseen_combination.seed_{seed}.h5ad"
        path.parent.mkdir(exist_ok=True)
        path.touch()
    plan = Plan(merged(config), [])
    place = {"dataset": "mine", "split": "unseen_combination", "model": "theirs", "seed": "1"}
    assert plan.params(place)["file"] == "theirs/mine.unseen_combination.seed_1.h5ad"
    assert plan.model_files(place) == ["theirs/mine.unseen_combination.seed_1.h5ad"]
    assert "theirs" not in set(plan.warranties["model"])
    assert Plan(merged(config_of("screen.h5ad")), []).params(place)["file"] == "screen.h5ad"
    with pytest.raises(InputError, match=r"'\{fold\}' cannot be filled in. Possible: \{dataset\}"):
        Plan(merged(config_of("{fold}.h5ad")), [])
    with pytest.raises(InputError, match="'file' is missing"):
        Plan(merged(closed_forms_config(models={"theirs": {"family": "predictions"}})), [])


@pytest.mark.slow
def test_they_stand_in_verdicts_and_a_changed_file_makes_them_stale(tmp_path: Path, snakemake: Callable) -> None:
    write_screen(tmp_path)
    file = tmp_path / "theirs" / "mine.unseen_combination.seed_0.tsv"
    file.parent.mkdir()
    effects = pd.DataFrame(0.1, index=COMBINATIONS, columns=["GENE0", *PERTURBED, *(f"GENE{i}" for i in range(1, 71))])
    effects.to_csv(file, sep="\t")
    config = config_of("theirs/{dataset}.{split}.seed_{seed}.tsv")
    config["models"]["theirs"]["params"]["values"] = "effect"
    config["select"] = {**config["select"], "models": ["theirs"], "seeds": [0]}
    wanted = ["results/verdicts.tsv"]
    done = snakemake(tmp_path, *wanted, config=config)
    assert done.returncode == 0, done.text
    verdicts = pd.read_csv(tmp_path / "results/verdicts.tsv", sep="\t").set_index("model")
    assert verdicts.loc["theirs", ["family", "kind"]].tolist() == ["predictions", "learned"]
    assert snakemake(tmp_path, "--dry-run", *wanted, config=config).jobs == {}
    metrics = pd.read_csv(tmp_path / "results/mine/unseen_combination/theirs/seed_0/metrics.tsv", sep="\t")
    gone = metrics["perturbation"].iloc[0]
    effects.drop(index=gone).to_csv(file, sep="\t")
    stale = snakemake(tmp_path, "--dry-run", *wanted, config=config)
    assert stale.jobs == {"train_closed_form": 1, "predict": 1, "evaluate": 1, "benchmark": 1}, stale.text
    assert snakemake(tmp_path, *wanted, config=config).returncode == 0
    verdicts = pd.read_csv(tmp_path / "results/verdicts.tsv", sep="\t").set_index("model")
    assert f"lacks 1 of the perturbations, which are scored as no change: {gone}." in verdicts.loc["theirs", "caveats"]
    file.unlink()
    refused = snakemake(tmp_path, "--dry-run", *wanted, config=config)
    assert refused.returncode != 0
    assert "there is no file 'theirs/mine.unseen_combination.seed_0.tsv' for model theirs on mine" in refused.text
