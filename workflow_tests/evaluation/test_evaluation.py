"""Scores: each metric against its definition written out naively, at its extremes, and through the files."""

from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from conftest import Prepared
from made_scores import N_GENES, P, predictions_from, random_scored, score
from scipy import sparse

from perturbflow import predict as prediction
from perturbflow import train as training
from perturbflow.controls import match_controls
from perturbflow.errors import InputError
from perturbflow.evaluation import METRICS, Scored, evaluate, inputs, score_inputs
from perturbflow.genes.symbols import members_of
from perturbflow.pairs import Pairs

# --- definitions ----------------------------------------------------------------------------------------------------


def test_mae() -> None:
    scored = random_scored()
    expected = [
        np.mean([abs(a - b) for a, b in zip(x, y, strict=True)])
        for x, y in zip(scored.predicted, scored.measured, strict=True)
    ]
    assert np.allclose(score("mae", scored), expected)


def test_off_target_scores_leave_out_the_perturbed_genes_alone() -> None:
    scored = random_scored()
    moved = scored.predicted + 100.0 * scored.own_target
    spoilt = random_scored(predicted=moved)
    names = [name for name, metric in METRICS.items() if name.endswith("_off_target") and metric.needs == "pseudobulk"]
    assert len(names) == 5
    for name in names:
        assert np.allclose(score(name, spoilt), score(name, scored)), name
        assert not np.allclose(
            score(name.removesuffix("_off_target"), spoilt), score(name.removesuffix("_off_target"), scored)
        ), name
    for i in range(P):
        genes = [g for g in range(0, N_GENES, 2) if not scored.own_target[i, g]]
        predicted, measured, control = (
            getattr(scored, side)[i, genes] for side in ("predicted", "measured", "control")
        )
        assert score("l2_heg1000_off_target", scored)[i] == pytest.approx(np.sqrt(((predicted - measured) ** 2).sum()))
        r = np.corrcoef(predicted - control, measured - control)[0, 1]
        assert score("pearson_delta_ctrl_off_target", scored)[i] == pytest.approx(r)
        others = ~scored.own_target[i]
        predicted, measured, reference, weight = (
            getattr(scored, side)[i, others] for side in ("predicted", "measured", "reference", "weight")
        )
        r = np.corrcoef(predicted - reference, measured - reference)[0, 1]
        assert score("pearson_delta_pert_off_target", scored)[i] == pytest.approx(r)
        w, delta = weight / weight.sum(), measured - reference
        r2 = 1 - (w @ (predicted - measured) ** 2) / (w @ (delta - w @ delta) ** 2)
        assert score("r2_w_delta_off_target", scored)[i] == pytest.approx(r2)
        own = scored.own_target[i]
        assert score("mae_on_target", scored)[i] == pytest.approx(
            np.abs(scored.predicted - scored.measured)[i, own].mean()
        )
    panel = ~scored.own_target.any(axis=0)
    sides = {side: getattr(scored, side)[:, panel] for side in ("predicted", "measured", "control", "own_target")}
    assert np.allclose(score("rank_cosine_off_target", scored), score("rank_cosine", random_scored(**sides)))


def test_a_perturbation_whose_genes_are_not_measured_has_no_error_on_target() -> None:
    own = random_scored().own_target.copy()
    own[1] = False
    assert np.isnan(score("mae_on_target", random_scored(own_target=own))).tolist() == [
        False,
        True,
        False,
        False,
        False,
    ]


def test_no_headline_metric_sees_a_perturbed_gene(prepared: dict[str, Prepared]) -> None:
    """A prediction that differs in perturbed genes alone has the same headline scores; on target it has others."""
    cells = Pairs.read(prepared["unseen_combination"].pairs)
    index = {gene: i for i, gene in enumerate(cells.genes)}

    def moved(label: str, X: np.ndarray) -> np.ndarray:
        return X * np.random.default_rng(len(label) + ord(label[2])).uniform(0.5, 1.5, X.shape[1])

    def stilled(label: str, X: np.ndarray) -> np.ndarray:
        X = moved(label, X)
        X[:, [index[gene] for gene in members_of(label) if gene in index]] = 0.0
        return X

    plain, own = (score_inputs(predictions_from(cells, change), cells) for change in (moved, stilled))
    for name, metric in METRICS.items():
        same = np.allclose(metric.function(own), metric.function(plain), rtol=1e-4, atol=2e-3, equal_nan=True)
        assert same or not metric.headline, name
    for name in ("mae_on_target", "l2_heg1000", "pearson_delta_ctrl", "energy_distance"):
        assert not np.allclose(score(name, own), score(name, plain), rtol=1e-3), name


def test_l2_over_highly_expressed_genes_is_no_mean() -> None:
    scored = random_scored()
    expected = [
        np.sqrt(sum((x[g] - y[g]) ** 2 for g in range(0, N_GENES, 2)))
        for x, y in zip(scored.predicted, scored.measured, strict=True)
    ]
    assert np.allclose(score("l2_heg1000", scored), expected)


def test_pearson_delta_against_controls() -> None:
    scored = random_scored()
    genes = scored.highly_expressed
    expected = [
        np.corrcoef((scored.predicted - scored.control)[i, genes], (scored.measured - scored.control)[i, genes])[0, 1]
        for i in range(P)
    ]
    assert np.allclose(score("pearson_delta_ctrl", scored), expected)


def test_pearson_delta_against_the_mean_of_training_perturbations() -> None:
    scored = random_scored()
    expected = [
        np.corrcoef(scored.predicted[i] - scored.reference[i], scored.measured[i] - scored.reference[i])[0, 1]
        for i in range(P)
    ]
    assert np.allclose(score("pearson_delta_pert", scored), expected)


def naive_pds(scored: Scored) -> list[float]:
    """Return 1 − k/(n−1), counted one by one."""
    genes = [g for g in range(N_GENES) if not scored.own_target[:, g].any()]

    def distance(a: np.ndarray, b: np.ndarray) -> float:
        norms = np.sqrt(sum(a[g] ** 2 for g in genes)) * np.sqrt(sum(b[g] ** 2 for g in genes))
        return 1.0 - sum(a[g] * b[g] for g in genes) / norms if norms > 0 else 1.0

    values = []
    for i in range(P):
        predicted = scored.predicted_bulk[i] - scored.control_bulk[i]
        d = [distance(predicted, scored.measured_bulk[j] - scored.control_bulk[j]) for j in range(P)]
        k = sum(x < d[i] - 1e-12 for x in d) + 0.5 * (sum(abs(x - d[i]) <= 1e-12 for x in d) - 1)
        values.append(1 - k / (P - 1))
    return values


@pytest.mark.parametrize("seed", range(5))
def test_pds_counts_the_effects_that_are_nearer(seed: int) -> None:
    scored = random_scored(seed)
    assert np.allclose(score("pds_cosine", scored), naive_pds(scored))


def test_pds_leaves_all_target_genes_out() -> None:
    scored = random_scored()
    changed = scored.predicted_bulk.copy()
    changed[:, :3] += 100.0
    assert np.allclose(score("pds_cosine", random_scored(predicted_bulk=changed)), score("pds_cosine", scored))


def test_pds_ties_count_half() -> None:
    rng = np.random.default_rng(0)
    effect, other = rng.normal(size=N_GENES), rng.normal(size=N_GENES)
    zero = np.zeros((P, N_GENES))
    measured = np.stack([effect, effect, effect, other, -effect])
    predicted = np.stack([effect] * P)
    values = score("pds_cosine", random_scored(measured_bulk=measured, predicted_bulk=predicted, control_bulk=zero))
    assert values.tolist() == [0.75, 0.75, 0.75, 0.25, 0.0], (
        "three tie for the first place, then one, then the opposite"
    )


def test_pds_of_one_perturbation_is_no_number() -> None:
    one = {name: np.ones((1, N_GENES)) for name in ("predicted_bulk", "measured_bulk", "control_bulk")}
    assert np.isnan(score("pds_cosine", random_scored(labels=["L0"], **one))).all()


def naive_energy(X: np.ndarray, Y: np.ndarray) -> float:
    """Return 2 E‖X−Y‖ − E‖X−X'‖ − E‖Y−Y'‖ over all pairs of different cells."""
    between = np.mean([np.sqrt(((x - y) ** 2).sum()) for x in X for y in Y])
    within = [
        np.mean([np.sqrt(((Z[i] - Z[j]) ** 2).sum()) for i in range(len(Z)) for j in range(len(Z)) if i != j])
        for Z in (X, Y)
    ]
    return 2 * between - sum(within)


def test_energy_distance() -> None:
    scored = random_scored()
    expected = [
        naive_energy(x, y) for x, y in zip(scored.predicted_components, scored.measured_components, strict=True)
    ]
    assert np.allclose(score("energy_distance", scored), expected)


def test_energy_distance_of_one_distribution_is_zero_on_average() -> None:
    rng = np.random.default_rng(0)
    draws = [[rng.normal(size=(20, 4)) for _ in range(300)] for _ in range(2)]
    values = score("energy_distance", random_scored(predicted_components=draws[0], measured_components=draws[1]))
    assert abs(values.mean()) < 4 * values.std() / np.sqrt(300)
    assert values.min() < 0 < values.max(), "unbiased: it may fall below zero"


def test_cells_of_one_start_are_no_independent_draws() -> None:
    rng = np.random.default_rng(0)
    cells = rng.normal(size=(12, 4))
    twice, start = np.repeat(cells, 2, axis=0), np.repeat(np.arange(12), 2)
    measured = [rng.normal(size=(9, 4))]
    once = random_scored(predicted_components=[cells], measured_components=measured)
    both = random_scored(predicted_components=[twice], measured_components=measured, predicted_start=[start])
    name = "energy_distance"
    assert np.allclose(score(name, both), score(name, once))
    naive = random_scored(predicted_components=[twice], measured_components=measured)
    assert score(name, naive) > score(name, once) + 0.05


def test_energy_distance_of_a_single_cell_is_no_number() -> None:
    scored = random_scored()
    components = [scored.predicted_components[0][:1], *scored.predicted_components[1:]]
    values = score("energy_distance", random_scored(predicted_components=components))
    assert np.isnan(values[0])
    assert np.isfinite(values[1:]).all()


# --- extremes -------------------------------------------------------------------------------------------------------


def test_no_change_has_no_correlation_and_chance_of_discrimination() -> None:
    scored = random_scored()
    flat = random_scored(predicted=scored.control, predicted_bulk=scored.control_bulk)
    assert (score("pearson_delta_ctrl", flat) == 0).all()
    assert (score("pds_cosine", flat) == 0.5).all()


def test_rounding_errors_are_no_effect() -> None:
    scored = random_scored()
    noise = 1e-9 * np.random.default_rng(1).normal(size=(P, N_GENES))
    almost = random_scored(predicted=scored.control + noise, predicted_bulk=scored.control_bulk + noise)
    assert (score("pearson_delta_ctrl", almost) == 0).all()
    assert (score("pds_cosine", almost) == 0.5).all()


def test_one_prediction_for_all_has_chance_of_discrimination() -> None:
    scored = random_scored()
    control = np.tile(scored.control_bulk[:1], (P, 1))
    same = random_scored(predicted_bulk=np.tile(scored.predicted_bulk[:1], (P, 1)), control_bulk=control)
    assert score("pds_cosine", same).mean() == pytest.approx(0.5)


def test_an_opposite_prediction_is_the_worst() -> None:
    scored = random_scored()
    opposite = random_scored(predicted=2 * scored.control - scored.measured)
    assert np.allclose(score("pearson_delta_ctrl", opposite), -1.0)


# --- from cells to scores -------------------------------------------------------------------------------------------


def test_means_are_of_the_scored_half_and_of_matched_controls(cells: Pairs) -> None:
    scored = score_inputs(predictions_from(cells), cells)
    test = cells.roles("test")
    X, batch, half = (
        test.X.toarray().astype(float),
        test.obs["batch"].astype(str).to_numpy(),
        test.obs["half"].astype(str).to_numpy(),
    )
    assert scored.labels == test.perturbations
    for i, label in enumerate(scored.labels):
        rows = np.flatnonzero((test.labels == label) & (half == "b"))
        assert np.allclose(scored.measured[i], X[rows].mean(axis=0), atol=1e-5)
        expected = sum((batch[rows] == b).mean() * X[test.is_control & (batch == b)].mean(axis=0) for b in ("b1", "b2"))
        assert np.allclose(scored.control[i], expected, atol=1e-5)
        sums = np.expm1(X[rows]).sum(axis=0)
        assert np.allclose(scored.measured_bulk[i], np.log1p(5e4 * sums / sums.sum()), atol=1e-4)
        sums = sum(
            (batch[rows] == b).mean() * np.expm1(X[test.is_control & (batch == b)]).mean(axis=0) for b in ("b1", "b2")
        )
        assert np.allclose(scored.control_bulk[i], np.log1p(5e4 * sums / sums.sum()), atol=1e-4)


def test_batches_do_not_tell_perturbations_apart() -> None:
    """Each perturbation is measured in one batch only, and has no effect to speak of: the floor must be at chance."""
    rng = np.random.default_rng(0)
    n_batches, n_genes = 4, 100
    levels = [rng.gamma(2.0, 6.0, n_genes) * np.exp(rng.normal(0.0, 0.5, n_genes)) for _ in range(n_batches)]
    counts, rows = [], []
    for role in ("train", "test"):
        for b in range(n_batches):
            counts.append(rng.poisson(levels[b], (60, n_genes)))
            rows += [("control", role, f"b{b}")] * 60
        for p in range(24):
            counts.append(rng.poisson(levels[p % n_batches] * np.exp(rng.normal(0.0, 0.1, n_genes)), (20, n_genes)))
            rows += [(f"{role}{p}", role, f"b{p % n_batches}")] * 20
    obs = pd.DataFrame(rows, columns=["perturbation", "role", "batch"]).assign(cell_type="t")
    obs["is_control"] = obs["perturbation"] == "control"
    index, _ = match_controls(obs, 1, 0)
    obs["half"] = "b"
    genes = [f"g{i}" for i in range(n_genes)]
    cells = Pairs(
        sparse.csr_matrix(np.log1p(np.vstack(counts)).astype(np.float32)), obs, genes, index, np.arange(len(obs))
    )
    floor = score("pds_cosine", score_inputs(predictions_from(cells), cells))
    assert abs(floor.mean() - 0.5) < 0.15, "0.9 with one control for all batches"


def test_the_reference_is_the_mean_of_training_perturbations_means(cells: Pairs) -> None:
    scored = score_inputs(predictions_from(cells), cells)
    train = cells.fitted_on("test")
    X = train.X.toarray()
    assert np.allclose(
        scored.reference,
        np.mean([X[train.labels == label].mean(axis=0) for label in train.perturbations], axis=0),
        atol=1e-5,
    )


def test_highly_expressed_genes_are_those_of_held_out_controls(cells: Pairs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "N_HIGH_EXPRESSION", 7)
    scored = score_inputs(predictions_from(cells), cells)
    test = cells.roles("test")
    mean = np.asarray(test.X[test.is_control].mean(axis=0)).ravel()
    assert set(np.flatnonzero(scored.highly_expressed)) == set(np.argsort(-mean)[:7])
    for label, own in zip(scored.labels, scored.own_target, strict=True):
        assert {gene for gene, is_own in zip(cells.genes, own, strict=True) if is_own} == set(members_of(label)) & set(
            cells.genes
        )


def test_components_are_fitted_on_training_cells(cells: Pairs) -> None:
    scored = score_inputs(predictions_from(cells), cells)
    changed = cells.X.copy().tolil()
    test = np.flatnonzero((cells.obs["role"] == "test").to_numpy() & ~cells.is_control)
    other = test[cells.labels[test] != scored.labels[0]]
    changed[other] = 0
    again = score_inputs(
        predictions_from(cells),
        Pairs(sparse.csr_matrix(changed), cells.obs, cells.genes, cells.control_index, cells.rows),
    )
    assert np.allclose(scored.measured_components[0], again.measured_components[0], atol=1e-4)
    assert not np.allclose(scored.measured_components[1], again.measured_components[1], atol=1e-2)


def test_validation_can_be_scored_on_its_own(cells: Pairs) -> None:
    scored = score_inputs(predictions_from(cells, role="validation"), cells)
    assert scored.labels == cells.roles("validation").perturbations


def test_predictions_that_cannot_be_scored_are_explained(cells: Pairs) -> None:
    fine = predictions_from(cells)
    with pytest.raises(InputError, match="differ in their genes or gene order"):
        score_inputs(fine[:, ::-1].copy(), cells)
    label = cells.roles("train").perturbations[0]
    training = fine.copy()
    training.obs["perturbation"] = label
    with pytest.raises(
        InputError, match=f"predictions of the role test hold {label}, but no cell of these has that role"
    ):
        score_inputs(training, cells)
    negative = fine.copy()
    negative.X.data[0] = -1.0
    with pytest.raises(InputError, match="hold negative or missing values"):
        score_inputs(negative, cells)
    foreign = fine.copy()
    foreign.obs["control_index"] = np.flatnonzero(cells.is_control & (cells.obs["role"] == "train"))[0]
    with pytest.raises(InputError, match="no controls of the scored role"):
        score_inputs(foreign, cells)
    strange = fine.copy()
    strange.uns["perturbflow"]["starts_from_controls"] = False
    strange.obs["cell_type"] = "moon"
    with pytest.raises(InputError, match="no control of the scored role has the cell type moon"):
        score_inputs(strange, cells)
    del strange.obs["cell_type"]
    with pytest.raises(InputError, match="obs needs control_index, or batch and cell_type"):
        score_inputs(strange, cells)


# --- files ----------------------------------------------------------------------------------------------------------


def run_model(here: Prepared, folder: Path, implementation: str, params: dict | None = None) -> pd.DataFrame:
    """Train, predict and evaluate one model; return its metrics.tsv."""
    folder.mkdir(parents=True, exist_ok=True)
    params = params or {}
    training.train(
        here.pairs, here.embeddings, here.audit, folder / "model.npz", folder / "run.json", implementation, params, 0
    )
    prediction.predict(here.pairs, folder / "model.npz", folder / "predictions.h5ad", implementation, params, 0, 1000)
    provenance = {
        "dataset": "mine",
        "split": "s",
        "model": implementation.split(":")[1],
        "seed": "0",
        "code_version": "x",
    }
    evaluate(folder / "predictions.h5ad", here.pairs, here.split, folder / "metrics.tsv", provenance)
    return pd.read_csv(folder / "metrics.tsv", sep="\t")


def test_the_table_of_scores(prepared: dict[str, Prepared], tmp_path: Path, cells: Pairs) -> None:
    table = run_model(prepared["unseen_combination"], tmp_path, "closed_form.baselines:Additive")
    labels = cells.roles("test").perturbations
    assert len(table) == len(labels) * len(METRICS)
    assert set(table["perturbation"]) == set(labels)
    assert set(table["metric"]) == set(METRICS)
    assert set(table["model"]) == {"Additive"}
    assert "code_version" not in table
    assert (table["n_members"] == 2).all()
    assert (table["members_seen"] == 2).all()
    n_scored = cells.obs[cells.obs["half"] == "b"].groupby("perturbation", observed=True).size()
    assert (table["n_cells"] == table["perturbation"].map(n_scored)).all()
    assert table["value"].notna().all()


def test_the_ceiling_is_above_the_model_and_the_model_above_the_floor(
    prepared: dict[str, Prepared], tmp_path: Path
) -> None:
    here = prepared["unseen_combination"]
    means = {
        name: run_model(here, tmp_path / name, implementation).groupby("metric")["value"].mean()
        for name, implementation in {
            "ceiling": "closed_form.ceilings:TechnicalDuplicate",
            "additive": "closed_form.baselines:Additive",
            "floor": "closed_form.baselines:NoChange",
        }.items()
    }
    for name in set(METRICS) - {"variance_ratio"}:  # controls vary as perturbed cells do
        assert METRICS[name].loss(means["additive"][name]) < METRICS[name].loss(means["floor"][name]), name
    assert means["ceiling"]["energy_distance"] < means["additive"]["energy_distance"]
    assert abs(means["floor"]["pearson_delta_ctrl"]) < 0.4
    assert means["ceiling"]["pearson_delta_ctrl"] > 0.8


def test_the_ceiling_is_scored_on_the_half_it_does_not_hold(
    prepared: dict[str, Prepared], tmp_path: Path, cells: Pairs
) -> None:
    table = run_model(prepared["unseen_combination"], tmp_path, "closed_form.ceilings:TechnicalDuplicate")
    assert (table.loc[table["metric"] == "mae", "value"] > 0).all(), "half a is not half b"
    other = run_model(prepared["unseen_combination"], tmp_path / "other", "closed_form.baselines:NoChange")
    assert table["n_cells"].tolist() == other["n_cells"].tolist()
    predicted = ad.read_h5ad(tmp_path / "predictions.h5ad")
    test = cells.roles("test")
    for label in test.perturbations:
        duplicate = test.X[(test.labels == label) & (test.obs["half"] == "a").to_numpy()].toarray()
        rows = predicted.X[(predicted.obs["perturbation"] == label).to_numpy()].toarray()
        assert np.allclose(np.sort(rows.sum(axis=1)), np.sort(duplicate.sum(axis=1)), rtol=1e-4)


def test_no_change_is_the_control_mean(cells: Pairs) -> None:
    scored = score_inputs(predictions_from(cells), cells)
    assert np.allclose(scored.predicted, scored.control, atol=1e-6)
    assert (score("pearson_delta_ctrl", scored) == 0).all()
    assert np.allclose(score("pds_cosine", scored), 0.5)


def test_a_ceiling_is_scored_as_measured(cells: Pairs) -> None:
    predictions = predictions_from(cells, lambda label, X: X + 1.0)
    moved = score_inputs(predictions, cells)
    predictions.uns["perturbflow"] = {"starts_from_controls": False}
    plain = score_inputs(predictions, cells)
    of_first = (predictions.obs["perturbation"] == plain.labels[0]).to_numpy()
    assert np.allclose(plain.predicted[0], predictions.X[of_first].mean(axis=0), atol=1e-5)
    assert np.allclose(moved.predicted, moved.control + 1.0, atol=2e-3)
