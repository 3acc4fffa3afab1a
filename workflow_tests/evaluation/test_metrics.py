"""Metrics: their extremes, tests and distances against other implementations, noise against exact formulas."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd
import pytest
from conftest import Prepared
from hypothesis import given, settings
from hypothesis import strategies as st
from made_scores import N_GENES, P, predictions_from, random_scored, score
from scipy import sparse, stats
from sklearn.metrics import average_precision_score

from perturbflow.controls import match_controls
from perturbflow.evaluation import (
    METRICS,
    Differential,
    Scored,
    differential,
    inputs,
    profiles,
    pseudobulk,
    score_inputs,
)
from perturbflow.evaluation.distributions import sinkhorn_divergence
from perturbflow.evaluation.ranks import SortedCells, p_value
from perturbflow.pairs import Pairs
from perturbflow.predict import nonnegative

FAMILIES = {
    "error": ["mae", "l2_heg1000", "l2_heg1000_off_target", "expr_mse_unbiased_norm"],
    "effect": [
        "pearson_delta_ctrl",
        "pearson_delta_ctrl_off_target",
        "pearson_delta_pert",
        "pearson_delta_pert_off_target",
        "cosine_logfc",
    ],
    "ranking": ["rank_cosine", "rank_cosine_off_target", "rank_rmse"],
    "discrimination": ["pds_l1", "pds_l2", "pds_cosine", "centroid_accuracy"],
    "weighted": ["wmse", "r2_w_delta", "r2_w_delta_off_target"],
    "differential_expression": [
        "sig_jaccard",
        "direction_fidelity",
        "direction_reach",
        "lfc_nmae",
        "overlap_at_n",
        "auprc",
    ],
    "distribution": [
        "energy_distance",
        "energy_distance_off_target",
        "mmd",
        "sinkhorn_w2",
        "variance_ratio",
        "quantile_coverage",
    ],
    "on_target": ["mae_on_target"],
}
HEADLINES = {
    "l2_heg1000_off_target", "pearson_delta_pert_off_target", "rank_cosine_off_target", "pds_cosine",
    "r2_w_delta_off_target", "auprc",
    "energy_distance_off_target",
}  # fmt: skip
# These take an equal distribution for perfect, not equal cells: of these they may fall below.
WITHOUT_BIAS = {"expr_mse_unbiased_norm", "energy_distance", "energy_distance_off_target", "mmd"}


# --- the registry ---------------------------------------------------------------------------------------------------


def test_every_metric_is_there_in_its_family() -> None:
    found: dict[str, list[str]] = {}
    for metric in METRICS.values():
        found.setdefault(metric.family, []).append(metric.name)
    assert found == FAMILIES
    assert {metric.name for metric in METRICS.values() if metric.headline} == HEADLINES


@pytest.mark.parametrize("metric", METRICS.values(), ids=list(METRICS))
def test_a_metric_says_what_it_is(metric) -> None:
    assert metric.direction in ("higher", "lower", "target")
    assert metric.needs in ("pseudobulk", "cells", "counts", "de")
    assert metric.formula.endswith(".")
    assert "\n" not in metric.formula
    assert metric.source
    low, high = metric.range
    assert low <= metric.perfect <= high
    assert metric.loss(metric.perfect) == 0
    if metric.useless is not None:
        assert low <= metric.useless <= high
        assert metric.loss(metric.useless) > 0


def mixture(cells: Pairs, share: float, change: Callable[[np.ndarray], np.ndarray] = lambda X: X) -> Scored:
    """Return the scored cells themselves as a prediction, a share of them replaced by their matched controls."""
    is_scored = (cells.obs["role"] == "test").to_numpy() & (cells.obs["half"] == "b").to_numpy()
    rng = np.random.default_rng(0)

    def predicted(label: str, controls: np.ndarray) -> np.ndarray:
        rows = np.flatnonzero((cells.labels == label) & is_scored)
        truth = cells.X[rows].toarray()
        replaced = rng.permutation(len(rows))[: round(share * len(rows))]
        truth[replaced] = controls[replaced]
        return change(truth)

    # Half as many cells as predictions_from starts with; batch and cell type of the scored cells.
    test = cells.roles("test")
    blocks, obs = [], []
    for label in test.perturbations:
        rows = np.flatnonzero((cells.labels == label) & is_scored)
        start = cells.control_index[rows, 0]
        blocks.append(sparse.csr_matrix(predicted(label, cells.X[start].toarray())))
        obs.append(cells.obs.iloc[rows][["perturbation", "batch", "cell_type"]])
    template = predictions_from(cells)
    predictions = template[: sum(block.shape[0] for block in blocks)].copy()
    predictions.X = sparse.vstack(blocks, format="csr").astype(np.float32)
    for column in ("perturbation", "batch", "cell_type"):
        predictions.obs[column] = pd.concat(obs)[column].astype(str).to_numpy()
    predictions.uns["perturbflow"] = {"role": "test", "starts_from_controls": False}
    return score_inputs(predictions, cells)


def means(scored: Scored) -> dict[str, float]:
    return {name: np.nanmean(metric.function(scored)) for name, metric in METRICS.items()}


@pytest.fixture(scope="module")
def truth(cells: Pairs) -> Scored:
    return mixture(cells, 0.0)


@pytest.mark.parametrize("name", METRICS)
def test_the_truth_is_perfect(name: str, truth: Scored) -> None:
    values = score(name, truth)
    assert len(values) == len(truth.labels)
    if name in WITHOUT_BIAS:
        assert (values <= METRICS[name].perfect + 1e-9).all()
    else:
        assert np.allclose(values[~np.isnan(values)], METRICS[name].perfect, atol=2e-3)
    assert not np.isnan(values).all()


def test_a_worse_prediction_is_worse(cells: Pairs, truth: Scored) -> None:
    order = [means(scored) for scored in (truth, mixture(cells, 0.5), mixture(cells, 1.0))]
    for name in set(METRICS) - {"variance_ratio", "quantile_coverage", "direction_reach"}:
        losses = [METRICS[name].loss(of[name]) for of in order]
        assert losses == sorted(losses), name
        assert losses[0] < losses[2], name
    assert order[0]["direction_reach"] > order[2]["direction_reach"]


@pytest.mark.parametrize("name", ["variance_ratio", "quantile_coverage"])
def test_cells_too_alike_or_too_different_are_worse(name: str, cells: Pairs, truth: Scored) -> None:
    def stretched(factor: float, X: np.ndarray) -> np.ndarray:
        return np.maximum(X.mean(axis=0) + factor * (X - X.mean(axis=0)), 0.0)

    near, far, wide = (means(mixture(cells, 0.0, partial(stretched, factor)))[name] for factor in (0.8, 0.4, 1.6))
    metric = METRICS[name]
    assert metric.loss(means(truth)[name]) < metric.loss(near) < metric.loss(far)
    assert far < metric.perfect < wide


def test_values_stay_in_their_range(cells: Pairs, truth: Scored) -> None:
    for scored in (truth, mixture(cells, 1.0), *(random_scored(seed) for seed in range(5))):
        for name, metric in METRICS.items():
            values = metric.function(scored)
            values = values[~np.isnan(values)]
            assert ((values >= metric.range[0] - 1e-9) & (values <= metric.range[1] + 1e-9)).all(), name


def test_no_change_has_the_useless_value(cells: Pairs) -> None:
    found = means(score_inputs(predictions_from(cells), cells))
    for name, metric in METRICS.items():
        if metric.useless is None or name.startswith(("pearson_delta_pert", "r2_w_delta")):
            continue
        assert found[name] == pytest.approx(
            metric.useless, abs={"lfc_nmae": 0.1, "expr_mse_unbiased_norm": 0.02}.get(name, 1e-6)
        ), name
    assert found["r2_w_delta"] < 0


def test_the_average_response_has_the_useless_value_of_what_it_is_held_to() -> None:
    average = random_scored(predicted=random_scored().reference)
    assert (score("pearson_delta_pert", average) == METRICS["pearson_delta_pert"].useless).all()
    assert (score("r2_w_delta", average) <= METRICS["r2_w_delta"].useless).all()


def test_unrelated_predictions_have_chance_of_ranking_and_discrimination() -> None:
    rng = np.random.default_rng(0)
    shape = (60, 30)
    arrays = {name: rng.normal(size=shape) for name in ("predicted", "measured", "predicted_bulk", "measured_bulk")}
    zeros = {name: np.zeros(shape) for name in ("control", "control_bulk")}
    scored = random_scored(**arrays, **zeros, labels=list(map(str, range(60))), own_target=np.zeros(shape, dtype=bool))
    for family in ("ranking", "discrimination"):
        for name in FAMILIES[family]:
            assert score(name, scored).mean() == pytest.approx(METRICS[name].useless, abs=4 * 0.3 / np.sqrt(60)), name


# --- definitions ----------------------------------------------------------------------------------------------------


def test_cosine_of_effects() -> None:
    scored = random_scored()
    a, b = scored.predicted - scored.control, scored.measured - scored.control
    assert np.allclose(
        score("cosine_logfc", scored),
        [x @ y / np.linalg.norm(x) / np.linalg.norm(y) for x, y in zip(a, b, strict=True)],
    )


def distance(kind: str, a: np.ndarray, b: np.ndarray) -> float:
    if kind == "cosine":
        return 1 - a @ b / np.linalg.norm(a) / np.linalg.norm(b)
    return np.abs(a - b).sum() if kind == "l1" else np.sqrt(((a - b) ** 2).sum())


@pytest.mark.parametrize(("name", "kind"), [("rank_cosine", "cosine"), ("rank_rmse", "l2")])
def test_ranks_compare_predictions_with_one_truth(name: str, kind: str) -> None:
    scored = random_scored(1)
    predicted, measured = scored.predicted - scored.control, scored.measured - scored.control
    expected = [
        sum(
            distance(kind, predicted[q], measured[p]) <= distance(kind, predicted[p], measured[p])
            for q in range(P)
            if q != p
        )
        / (P - 1)
        for p in range(P)
    ]
    assert np.allclose(score(name, scored), expected)


@pytest.mark.parametrize(("name", "kind"), [("pds_l1", "l1"), ("pds_l2", "l2"), ("centroid_accuracy", "l2")])
def test_discrimination_compares_one_prediction_with_truths(name: str, kind: str) -> None:
    scored = random_scored(2)
    predicted, measured, control = (
        getattr(scored, side + ("" if name == "centroid_accuracy" else "_bulk"))
        for side in ("predicted", "measured", "control")
    )
    genes = np.full(predicted.shape[1], True) if name == "centroid_accuracy" else ~scored.own_target.any(axis=0)
    a, b = (predicted - control)[:, genes], (measured - control)[:, genes]
    expected = [
        sum(distance(kind, a[p], b[q]) > distance(kind, a[p], b[p]) for q in range(P) if q != p) / (P - 1)
        for p in range(P)
    ]
    assert np.allclose(score(name, scored), expected)


@pytest.mark.parametrize("name", ["rank_cosine", "rank_rmse", "pds_l1", "pds_l2", "pds_cosine"])
def test_equal_predictions_tie_in_spite_of_rounding(name: str) -> None:
    rng = np.random.default_rng(3)
    scored = random_scored(3)
    one = np.tile(rng.normal(size=scored.predicted.shape[1]), (P, 1)) + 1e-8 * rng.normal(size=scored.predicted.shape)
    same = random_scored(3, predicted=scored.control + one, predicted_bulk=scored.control_bulk + one)
    values = score(name, same)
    assert values.mean() == pytest.approx(0.5)


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_tables_of_distances_are_made_some_rows_at_a_time(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    names, scored = [*FAMILIES["ranking"], *FAMILIES["discrimination"]], random_scored(4)
    whole = {name: score(name, scored) for name in names}
    monkeypatch.setattr(pseudobulk, "ROWS_AT_ONCE", rows)
    for name in names:
        np.testing.assert_array_equal(score(name, scored), whole[name], name)


@pytest.mark.parametrize("name", ["rank_cosine_off_target", "pds_l1", "pds_l2", "pds_cosine"])
def test_where_every_gene_is_perturbed_nothing_is_left_to_compare(name: str) -> None:
    own_target = np.arange(N_GENES) % P == np.arange(P)[:, None]
    assert np.isnan(score(name, random_scored(5, own_target=own_target))).all()


def test_wide_tables_in_single_precision_have_the_same_scores(cells: Pairs, monkeypatch: pytest.MonkeyPatch) -> None:
    predictions = predictions_from(cells, lambda label, X: X * (1 + len(label) / 20))
    double = means(score_inputs(predictions, cells))
    monkeypatch.setattr(inputs, "MOST_IN_DOUBLE", 0)
    single = score_inputs(predictions, cells)
    assert single.measured.dtype == single.predicted_test.z.dtype == np.float32
    assert {key: pytest.approx(value, rel=1e-4, abs=1e-5, nan_ok=True) for key, value in double.items()} == means(
        single
    )


def test_one_prediction_for_all_ranks_at_chance_though_counts_tell_its_cells_apart(cells: Pairs) -> None:
    rng = np.random.default_rng(0)
    effect = np.where(rng.random(len(cells.genes)) < 0.3, -2.0, 0.5 * rng.normal(size=len(cells.genes)))
    scored = score_inputs(
        predictions_from(cells, lambda _, start: nonnegative(start + effect + 2e-3 * rng.normal(size=len(effect)))),
        cells,
    )
    differences = scored.predicted - scored.control
    assert np.abs(differences - differences[0]).max() > 1e-3, "the plant: means are met to within a count"
    for name in ("rank_cosine", "rank_rmse"):
        np.testing.assert_allclose(score(name, scored), 0.5)


def test_weighted_error_is_that_of_mejia() -> None:
    scored = random_scored()
    for i in range(P):
        w, x, y, r = scored.weight[i], scored.predicted[i], scored.measured[i], scored.reference[i]
        assert score("wmse", scored)[i] == pytest.approx(sum(w * (x - y) ** 2))
        delta = y - r
        expected = 1 - sum(w * (x - y) ** 2) / sum(w * (delta - sum(w * delta)) ** 2)
        assert score("r2_w_delta", scored)[i] == pytest.approx(expected)


def test_weights_are_of_t_against_the_other_scored_cells(cells: Pairs, truth: Scored) -> None:
    X = cells.X.toarray().astype(float)
    own = cells.labels == truth.labels[0]
    scored = ~cells.is_control & (cells.obs["half"] == "b").to_numpy() & (cells.obs["role"] == "test").to_numpy()
    t = np.abs(stats.ttest_ind(X[scored & own], X[scored & ~own], equal_var=False).statistic)
    expected = ((t - t.min()) / (t.max() - t.min())) ** 2
    assert np.allclose(truth.weight[0], expected / expected.sum(), rtol=1e-5)


# --- tests of differential expression -------------------------------------------------------------------------------


def sparse_cells(rng: np.random.Generator, n: int, n_genes: int, *, ties: bool) -> np.ndarray:
    values = (
        rng.poisson(1.0, (n, n_genes)) if ties else rng.gamma(1.0, 1.0, (n, n_genes)) * (rng.random((n, n_genes)) < 0.5)
    )
    return values.astype(np.float32)


@given(n=st.integers(1, 40), m=st.integers(2, 60), ties=st.booleans(), seed=st.integers(0, 2**16))
@settings(max_examples=40, deadline=None)
def test_rank_sum_of_one_stratum_is_the_plain_test(n: int, m: int, ties: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, y = sparse_cells(rng, n, 12, ties=ties), sparse_cells(rng, m, 12, ties=ties)
    x[:, 0] = y[:, 0] = 0
    exact = x.astype(float), y.astype(float)  # scipy computes in the type that it gets
    controls = SortedCells(sparse.csr_matrix(y), [np.arange(m)])
    z = controls.rank_sum(sparse.csr_matrix(x), np.zeros(n, dtype=int))
    for g in range(1, 12):
        if len(np.unique(np.concatenate([x[:, g], y[:, g]]))) > 1:
            expected = stats.mannwhitneyu(*(side[:, g] for side in exact), method="asymptotic")
            assert p_value(z[g]) == pytest.approx(expected.pvalue, rel=1e-9)
            assert np.sign(z[g]) in (0, np.sign(expected.statistic - n * m / 2))
    assert z[0] == 0


def test_rank_sum_sums_over_strata() -> None:
    rng = np.random.default_rng(0)
    x, y = sparse_cells(rng, 30, 20, ties=True), sparse_cells(rng, 70, 20, ties=True)
    of_x, of_y = rng.integers(0, 2, 30), rng.integers(0, 3, 70)  # the cells are in two of three strata
    groups = [np.flatnonzero(of_y == s) for s in range(3)]
    z = SortedCells(sparse.csr_matrix(y), groups).rank_sum(sparse.csr_matrix(x), of_x)
    for g in range(20):
        excess = variance = 0.0
        for s in range(2):
            a, b = x[of_x == s, g], y[of_y == s, g]
            excess += stats.mannwhitneyu(a, b).statistic - len(a) * len(b) / 2
            ranks = stats.rankdata(np.concatenate([a, b]))
            n = len(ranks)
            variance += (
                len(a) * len(b) / (n * (n - 1)) * ((ranks - (n + 1) / 2) ** 2).sum()
            )  # permutation variance of ranks
        assert z[g] == pytest.approx(np.sign(excess) * max(abs(excess) - 0.5, 0) / np.sqrt(variance))


def test_tests_of_cells_are_stratified_adjusted_and_of_expressed_genes(cells: Pairs, truth: Scored) -> None:
    test = cells.roles("test")
    X, batch = test.X.toarray().astype(np.float64), test.obs["batch"].astype(str).to_numpy()
    control = np.expm1(X[test.is_control]).mean(axis=0)
    for i, label in enumerate(truth.labels):
        found = truth.measured_test
        tested = (1e6 * control / control.sum() > 5) & ~truth.own_target[i]
        assert (np.isfinite(found.z[i]) == tested).all()
        assert np.allclose(found.q[i, tested], stats.false_discovery_control(p_value(found.z[i, tested])))
        rows = np.flatnonzero((test.labels == label) & (test.obs["half"] == "b").to_numpy())
        mean = np.expm1(X[rows]).mean(axis=0)
        own = sum(
            (batch[rows] == b).mean() * np.expm1(X[test.is_control & (batch == b)]).mean(axis=0) for b in ("b1", "b2")
        )
        assert np.allclose(found.log_fold_change[i, tested], np.log2((mean + 1e-9) / (own + 1e-9))[tested], atol=1e-4)
        assert set(np.flatnonzero(found.is_significant[i])) == set(
            np.flatnonzero(np.nan_to_num(found.q[i], nan=1) < 0.05)
        )


def of_genes(predicted: list[tuple], measured: list[tuple]) -> Scored:
    """Return one perturbation with (z, q, lfc) per gene."""
    tests = [
        Differential(*(np.array([column], dtype=float) for column in zip(*genes, strict=True)))
        for genes in (predicted, measured)
    ]
    return random_scored(labels=["A"], predicted_test=tests[0], measured_test=tests[1])


YES, NO = 0.01, 0.5


def test_metrics_of_differential_expression_by_hand() -> None:
    measured = [(5, YES, 2), (-4, YES, -1), (3, YES, 1), (2, YES, 0.5), (1, NO, 0.1), (np.nan, np.nan, np.nan)]
    predicted = [(9, YES, 1), (-8, YES, -3), (-7, YES, -2), (1, NO, 0.5), (6, YES, 0.2), (np.nan, np.nan, np.nan)]
    scored = of_genes(predicted, measured)
    assert score("sig_jaccard", scored).tolist() == [3 / 5]
    assert score("direction_fidelity", scored).tolist() == [3 / 4], "genes 0, 1 and 4 of four called"
    assert score("direction_reach", scored).tolist() == [2 / 4], "right, right, wrong, right by confidence"
    assert np.isnan(score("lfc_nmae", scored)[0]), "fewer than ten"
    # Called by abs(lfc): 1, 2, 0, 4; all four asked for, of which 4 is none.
    assert score("overlap_at_n", scored).tolist() == [3 / 4]
    assert score("auprc", scored)[0] == pytest.approx(average_precision_score([1, 1, 1, 1, 0], [9, 8, 7, 1, 6]))


def test_of_equally_confident_genes_the_strongest_is_first() -> None:
    measured = [(3, YES, 1), (3, YES, 1), (3, YES, 1)]
    assert score("direction_reach", of_genes([(2, NO, -1), (2, NO, 2), (1, NO, -1)], measured)).tolist() == [1 / 3]
    assert score("direction_reach", of_genes([(2, NO, -2), (2, NO, 1), (1, NO, -1)], measured)).tolist() == [0]


@given(
    st.lists(st.tuples(st.booleans(), st.integers(0, 5)), min_size=1, max_size=30).filter(
        lambda genes: any(real for real, _ in genes)
    )
)
def test_average_precision_is_sklearns_with_ties_too(genes: list[tuple[bool, int]]) -> None:
    is_real, z = (np.array(column) for column in zip(*genes, strict=True))
    assert differential._average_precision(is_real, z) == pytest.approx(average_precision_score(is_real, z))


def test_what_is_not_needed_is_left_out_and_changes_nothing_else(prepared: dict[str, Prepared]) -> None:
    cells = Pairs.read(prepared["unseen_perturbation"].pairs)
    predictions = predictions_from(cells)
    whole, part = score_inputs(predictions, cells), score_inputs(predictions, cells, frozenset({"pseudobulk", "de"}))
    assert part.coverage is None
    assert part.predicted_components is None
    for name, metric in METRICS.items():
        if metric.needs != "cells":
            np.testing.assert_array_equal(metric.function(part), metric.function(whole), err_msg=name)


def test_fold_changes_do_not_depend_on_the_total_that_counts_are_normalized_to(prepared: dict[str, Prepared]) -> None:
    cells = Pairs.read(prepared["unseen_perturbation"].pairs)
    predictions = predictions_from(cells)
    gene = int(np.argmax(predictions.X.mean(axis=0)))
    predictions.X = sparse.csr_matrix(predictions.X.toarray() * (np.arange(predictions.n_vars) != gene))
    scored = score_inputs(predictions, cells, frozenset({"de"}))
    assert (scored.predicted_test.log_fold_change[:, gene] < -30).any(), "no cell of the prediction has the gene"
    predictions.X, X = ((100 * X.expm1()).log1p().astype(np.float32) for X in (predictions.X, cells.X))
    again = score_inputs(predictions, replace(cells, X=X), frozenset({"de"}))
    for name in ("predicted_test", "measured_test"):
        changes = (getattr(of, name).log_fold_change for of in (again, scored))
        np.testing.assert_allclose(*changes, atol=1e-4)


def test_lfc_error_of_ten_genes() -> None:
    measured = [(5, YES, 1.0)] * 10 + [(0, NO, 9.0)]
    predicted = [(0, NO, 0.5)] * 10 + [(0, NO, -9.0)]
    assert score("lfc_nmae", of_genes(predicted, measured)).tolist() == [0.5]


def test_nothing_significant_is_undefined_but_for_the_overlap_of_nothing() -> None:
    nothing = of_genes([(0, NO, 0.1)] * 3, [(0, NO, 0.1)] * 3)
    assert score("sig_jaccard", nothing).tolist() == [1.0]
    for name in set(FAMILIES["differential_expression"]) - {"sig_jaccard"}:
        assert np.isnan(score(name, nothing)).all(), name


# --- noise ----------------------------------------------------------------------------------------------------------


def bulk(profile: np.ndarray) -> np.ndarray:
    return np.log1p(5e4 * profile / profile.sum())


def test_variance_of_a_bulk_is_the_delete_one_jackknife() -> None:
    rng = np.random.default_rng(0)
    n = 500
    counts = rng.poisson(rng.gamma(3.0, 1.0, (n, 1)) * rng.gamma(1.0, 2.0, 40)).astype(np.float64)
    profile, spread = profiles.mean_profile(sparse.csr_matrix(counts))
    assert np.allclose(profile, counts.mean(axis=0))
    left_out = np.stack([bulk(np.delete(counts, i, axis=0).sum(axis=0)) for i in range(n)])
    exact = (n - 1) / n * np.square(left_out - left_out.mean(axis=0)).sum(axis=0)
    assert np.allclose(spread.of_bulk(profile), exact, rtol=0.03)


def test_error_without_bias_by_hand() -> None:
    scored = random_scored()
    numerators, denominators = [], []
    for i in range(P):
        genes = ~scored.own_target[i]
        b_hat, b, c = (getattr(scored, f"{side}_bulk")[i, genes] for side in ("predicted", "measured", "control"))
        v_hat, v, v_c = (
            getattr(scored, f"{side}_bulk_variance")[i, genes] for side in ("predicted", "measured", "control")
        )
        numerators.append((((b_hat - b) ** 2).sum() - min(v_hat.sum(), v.sum()) - v.sum()) / genes.sum())
        denominators.append((((b - c) ** 2).sum() - v.sum() - v_c.sum()) / genes.sum())
    values = score("expr_mse_unbiased_norm", scored)
    assert np.allclose(values, np.array(numerators) / np.mean(denominators))
    assert values.mean() == pytest.approx(sum(numerators) / sum(denominators))


# --- distributions --------------------------------------------------------------------------------------------------


def naive_mmd(x: np.ndarray, y: np.ndarray) -> float:
    """Return scPertEval 0.2.0's unbiased MMD with the median bandwidth."""
    pooled = np.vstack([x, y])
    distances = np.linalg.norm(pooled[:, None] - pooled[None], axis=2)
    sigma = np.median(distances[~np.eye(len(pooled), dtype=bool)])
    k = np.exp(-(distances**2) / (2 * sigma**2))
    n, m = len(x), len(y)
    within = (k[:n, :n].sum() - n) / (n * (n - 1)) + (k[n:, n:].sum() - m) / (m * (m - 1))
    return within - 2 * k[:n, n:].mean()


def test_mmd() -> None:
    scored = random_scored()
    expected = [naive_mmd(x, y) for x, y in zip(scored.predicted_components, scored.measured_components, strict=True)]
    assert np.allclose(score("mmd", scored), expected)


def test_mmd_leaves_out_pairs_of_one_start() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(12, 4)), [rng.normal(size=(30, 4))]
    twice = random_scored(
        predicted_components=[np.repeat(x, 2, axis=0)],
        measured_components=y,
        predicted_start=[np.repeat(np.arange(12), 2)],
    )
    assert score("mmd", twice)[0] == pytest.approx(
        score("mmd", random_scored(predicted_components=[x], measured_components=y))[0], abs=0.01
    )


def test_sinkhorn_distance_is_transport_for_a_small_blur() -> None:
    """At ε = 0.0025 the divergence is nearly the exact optimal transport of equally many points."""
    from scipy.optimize import linear_sum_assignment

    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(60, 5)), rng.normal(0.7, 1.0, size=(60, 5))
    cost = ((x[:, None] - y[None]) ** 2).sum(axis=2)
    exact = cost[linear_sum_assignment(cost)].mean()
    found = score("sinkhorn_w2", random_scored(predicted_components=[x], measured_components=[y]))[0]
    assert found**2 == pytest.approx(exact, rel=0.03)
    assert sinkhorn_divergence(x, x) == pytest.approx(0.0, abs=1e-9)
    shifted = score("sinkhorn_w2", random_scored(predicted_components=[x], measured_components=[x + 3.0]))[0]
    assert shifted == pytest.approx(3 * np.sqrt(5), rel=1e-3), "moving all cells costs the way"


@given(n=st.integers(2, 60), m=st.integers(1, 60), ties=st.booleans(), seed=st.integers(0, 2**16))
@settings(max_examples=30, deadline=None)
def test_coverage_is_the_expectation_of_a_randomized_rank(n: int, m: int, ties: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, y = sparse_cells(rng, n, 6, ties=ties), sparse_cells(rng, m, 6, ties=ties)
    found = SortedCells(sparse.csr_matrix(x), [np.arange(n)]).coverage(sparse.csr_matrix(y))
    grid = (np.arange(2000) + 0.5) / 2000
    for g in range(6):
        ranks = [(x[:, g] < v).mean() + grid * (x[:, g] == v).mean() for v in y[:, g]]
        edge = 1e-9
        expected = np.mean([((rank >= 0.05 - edge) & (rank <= 0.95 + edge)).mean() for rank in ranks])
        assert found[g] == pytest.approx(expected, abs=2e-3 * n)
    assert np.allclose(SortedCells(sparse.csr_matrix(x), [np.arange(n)]).coverage(sparse.csr_matrix(x)), 0.9)


# --- from cells -----------------------------------------------------------------------------------------------------


def batched_cells(effect: float, held_out: bool) -> Pairs:
    """Return perturbations that were measured in one of four batches each.

    Where a context is held out, these are other batches than in training.
    """
    rng = np.random.default_rng(0)
    n_genes = 100
    levels = [rng.gamma(2.0, 6.0, n_genes) * np.exp(rng.normal(0.0, 0.5, n_genes)) for _ in range(8)]
    counts, rows = [], []
    for role in ("train", "test"):
        batches = range(4, 8) if held_out and role == "test" else range(4)
        for b in batches:
            counts.append(rng.poisson(levels[b], (60, n_genes)))
            rows += [("control", role, f"b{b}")] * 60
        for p in range(24):
            b = batches[p % 4]
            counts.append(rng.poisson(levels[b] * np.exp(rng.normal(0.0, effect, n_genes)), (20, n_genes)))
            rows += [(f"{role}{p}", role, f"b{b}")] * 20
    obs = pd.DataFrame(rows, columns=["perturbation", "role", "batch"]).assign(cell_type="t")
    obs["is_control"] = obs["perturbation"] == "control"
    index, _ = match_controls(obs, 1, 0)
    obs["half"] = np.where(np.arange(len(obs)) % 2, "a", "b")
    X = sparse.csr_matrix(np.log1p(np.vstack(counts)).astype(np.float32))
    return Pairs(X, obs, [f"g{i}" for i in range(n_genes)], index, np.arange(len(obs)))


@pytest.mark.parametrize("held_out", [False, True])
def test_batches_tell_nothing(held_out: bool) -> None:
    """Predictions without an effect of their own are at chance and rank as mode collapse, though each has a batch."""
    scored = score_inputs(predictions_from(batched_cells(0.1, held_out)), batched_cells(0.1, held_out))
    for name in FAMILIES["discrimination"]:
        assert score(name, scored).mean() == pytest.approx(0.5, abs=0.15), name
    for name in FAMILIES["ranking"]:
        assert score(name, scored).mean() == 0.5, name
    assert abs(score("pearson_delta_pert", random_like(scored, predicted=scored.reference)).mean()) < 1e-9
    assert np.abs(scored.reference - scored.control).mean() < 0.06, "the reference is in the perturbation's batches"


def random_like(scored: Scored, **changes: object) -> Scored:
    return Scored(**{**{name: getattr(scored, name) for name in Scored.__annotations__}, **changes})


def test_reliability_is_of_effects_and_shares_no_control() -> None:
    nothing = score_inputs(predictions_from(batched_cells(0.0, False)), batched_cells(0.0, False))
    strong = score_inputs(predictions_from(batched_cells(1.0, False)), batched_cells(1.0, False))
    assert abs(nothing.reliability.mean()) < 0.1, "0.3 with common controls"
    assert (strong.reliability > 0.9).all()
    assert nothing.effect_size.mean() < 0.25 * strong.effect_size.mean()
    assert (strong.n_cells == 10).all()


def test_single_controls_of_many_batches_serve_by_their_cell_type() -> None:
    cells = batched_cells(1.0, held_out=False)
    alone = (cells.is_control & (cells.obs["role"] == "test")).to_numpy()
    cells.obs.loc[alone, "batch"] = [f"alone{i}" for i in range(alone.sum())]
    scored = score_inputs(predictions_from(cells), cells)
    assert np.allclose(scored.control, cells.X[alone].mean(axis=0), atol=1e-5)
    assert np.isfinite(scored.reliability).all()
    assert np.isfinite(scored.measured_test.z).any()


def test_a_perturbation_in_several_roles_is_scored_by_its_cells(cells: Pairs) -> None:
    """The role belongs to the cell: training cells of the same label are no truth, and no others for its weights."""
    label = cells.roles("test").perturbations[0]
    rows = np.flatnonzero((cells.labels == label) & (cells.obs["half"] == "a").to_numpy())
    obs = cells.obs.copy()
    obs.iloc[rows, obs.columns.get_loc("role")] = "train"
    obs.iloc[rows, obs.columns.get_loc("half")] = ""
    both = Pairs(cells.X, obs, cells.genes, cells.control_index, cells.rows)
    before, after = (score_inputs(predictions_from(some), some) for some in (cells, both))
    assert label in after.labels
    assert np.allclose(before.measured[0], after.measured[0])
    assert np.allclose(before.weight[0], after.weight[0])
    assert not np.allclose(before.reference[0], after.reference[0])
    assert np.isnan(after.reliability[0]), "no half 'a' is left"


def test_order_of_cells_and_storage_do_not_matter(cells: Pairs, prepared: dict[str, Prepared], tmp_path) -> None:
    import anndata as ad

    predictions = predictions_from(cells, lambda label, X: X * (1 + len(label) / 20))
    expected = means(score_inputs(predictions, cells))
    mixed = predictions[np.random.default_rng(0).permutation(predictions.n_obs)].copy()
    for name, X in {"csr": mixed.X, "csc": mixed.X.tocsc(), "dense": mixed.X.toarray()}.items():
        stored = ad.AnnData(X, obs=mixed.obs, var=mixed.var, uns=mixed.uns)
        stored.write_h5ad(tmp_path / f"{name}.h5ad")
        backed = ad.read_h5ad(tmp_path / f"{name}.h5ad", backed="r")
        found = means(score_inputs(backed, Pairs.open(prepared["unseen_combination"].pairs)))
        assert {
            key: pytest.approx(value, rel=1e-4, abs=1e-4, nan_ok=True) for key, value in expected.items()
        } == found, name
