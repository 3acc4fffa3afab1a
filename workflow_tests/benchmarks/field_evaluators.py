r"""Compare this workflow's scores with those of the field's evaluators: cell-eval, cell-eval2 and scperteval.

All score the same predictions; cell-eval2 with its preset vcc2026.

    pip install -r envs/requirements.txt -r workflow_tests/benchmarks/field_evaluators.txt
    python workflow_tests/benchmarks/field_evaluators.py agreement
    python workflow_tests/benchmarks/field_evaluators.py agreement --results \
        results/renge2023/unseen_perturbation/additive/seed_0 --table docs/results/evaluators_agreement.tsv
    python workflow_tests/benchmarks/field_evaluators.py nearness --results \
        results/*/unseen_combination/no_change/seed_0
    python workflow_tests/benchmarks/field_evaluators.py speed
    python workflow_tests/benchmarks/field_evaluators.py scale

agreement: the greatest difference per metric over the perturbations of a made screen, and of a model's folder in a
finished run: on the files as they are, and on inputs from which everything is taken out in which we differ by design.
cell-eval2's files are those of `perturbflow export`, scored by the command in their README.md.
nearness: how far models' files are off the measured cells in the evaluators' eyes, beside the mean of the controls
itself, which is no file. speed: wall time, CPU time and peak memory, on the metrics that cell-eval has too and on all
of ours. scale: ours on many cells. Each measurement is a process of its own, from its start to its end, or, from inputs
in memory to scores, the second time of two in one.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import anndata as ad
import numpy as np
import pandas as pd
from scipy import sparse

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1] / "scripts"))

if TYPE_CHECKING:  # theirs are not to be timed with our imports
    from perturbflow.evaluation import Scored
    from perturbflow.pairs import Pairs

SIZES = {  # of made_predictions.py: genes, perturbations, controls, scored, predicted
    "agreement": (900, 25, 200, 80, 80),
    "speed": (5_000, 100, 1_000, 100, 100),
    "scale": (2_000, 300, 30_000, 500, 1_000),
}
TOLERANCE = 1e-6
EVALUATORS = ("cell-eval", "cell-eval2", "scperteval", "geomloss")
CELL_EVAL_SHARED = (
    "mae", "mse", "pearson_delta", "discrimination_score_l1", "discrimination_score_l2", "discrimination_score_cosine",
    "overlap_at_N", "pr_auc", "de_sig_genes_recall", "de_nsig_counts",
)  # fmt: skip
OURS_SHARED = (
    "mae",
    "l2_heg1000",
    "pearson_delta_ctrl",
    "pds_l1",
    "pds_l2",
    "pds_cosine",
    "overlap_at_n",
    "auprc",
    "sig_jaccard",
)


# --- what is compared with what -------------------------------------------------------------------------------------


def _as_named(table: pd.DataFrame, name: str, shape: tuple[int, int]) -> pd.Series:
    """Return a column; cell-eval2 leaves out one that is undefined for every perturbation."""
    return table.get(name, pd.Series(np.nan, table.index))


@dataclass(frozen=True)
class Comparison:
    """One metric of ours beside one of theirs.

    Attributes
    ----------
    ours, evaluator, theirs
        Names; `theirs` is what is called on the files as they are.
    feed, call
        The inputs freed of our differences, and what is called on them; see `FEEDS`.
    differs
        What theirs do on the files as they are; ours if it is not plain. Besides the controls: theirs know no batches
        and no starting cells.
    value
        Their table (perturbations × metrics), name in it, and (perturbations, genes) → values on our scale.
    is_same
        Whether the definitions are the same on `feed`, on a made screen at least.
    """

    ours: str
    evaluator: str
    theirs: str
    feed: str
    call: str
    differs: str
    value: Callable[[pd.DataFrame, str, tuple[int, int]], pd.Series] = _as_named
    is_same: bool = True


def _norm(table: pd.DataFrame, name: str, shape: tuple[int, int]) -> pd.Series:
    return np.sqrt(table[name] * shape[1])


def _discrimination(table: pd.DataFrame, name: str, shape: tuple[int, int]) -> pd.Series:
    return 1 - shape[0] * (1 - table[name]) / (shape[0] - 1)


def _per_distance(table: pd.DataFrame, name: str, shape: tuple[int, int]) -> pd.Series:
    return table["expr_mse_unbiased_capped"] / table["expr_distance_unbiased"].mean()


def _overlap(table: pd.DataFrame, name: str, shape: tuple[int, int]) -> pd.Series:
    return table[name].where(
        table["de_nsig_counts_real"] > 0
    )  # theirs is 0 where nothing is significant, ours undefined


def _jaccard(table: pd.DataFrame, name: str, shape: tuple[int, int]) -> pd.Series:
    both = table["de_sig_genes_recall"].fillna(0) * table["de_nsig_counts_real"]
    union = table["de_nsig_counts_real"] + table["de_nsig_counts_pred"] - both
    return (both / union).where(union > 0, 1.0)


FEEDS = {
    "effects": "one row per perturbation: effects on one common control",
    "highest": "the same, the 1,000 genes highest in controls",
    "centred": "one row per perturbation, our reference mean in the place of the control",
    "bulks": "one row per perturbation: log bulks, panel targets left out",
    "components": "cells as our 50 principal components",
    "tested": "cells; per perturbation the genes that ours tests",
    "ordered": "the same, predicted q replaced by the ranks of p",
    "noise": "log bulks and their sampling variances, perturbed genes left out, ρ = 1",
    "tests": "our tests: log fold changes, p and q of the genes that ours tests",
    "weighted": "cells in double precision, our reference in the place of the control",
}
HEG = "rounding; above 1,000 genes all of them, ours the 1,000 highest in controls"
PDS = (
    "log differences of means, own target left out (of singles only), 1 − k/n, ties as sorted; ours log bulks, all "
    "targets of the panel left out, 1 − k/(n − 1), ties half"
)
TEST = (
    "all genes, geometric means; ours genes above 5 CPM in controls, own target left out, arithmetic means; 0 where no "
    "gene is significant, ours undefined"
)
PCA = "components fitted on what is scored; ours on training cells"
BULK = "sums of counts and one pool of controls; ours means of normalized counts, controls of the same batches"
POOL = (
    "one pool of controls, predicted cells normalized anew, q with the perturbed gene among the tested; ours within "
    "batches and cell types, cells as predicted, q without it"
)
COMPARISONS = (
    Comparison("mae", "cell-eval", "mae", "effects", "mae", "rounding"),
    Comparison("l2_heg1000", "cell-eval", "mse", "highest", "mse", HEG, _norm),
    Comparison("l2_heg1000", "scperteval", "l2_heg_k=1000", "highest", "l2_heg_k=1000", "rounding"),
    Comparison("pearson_delta_ctrl", "cell-eval", "pearson_delta", "highest", "pearson_delta", HEG),
    Comparison(
        "pearson_delta_ctrl", "scperteval", "pearson_ctrl_heg_k=1000", "highest", "pearson_ctrl_heg_k=1000", "rounding"
    ),
    Comparison(
        "pearson_delta_pert",
        "scperteval",
        "pearson_pert",
        "centred",
        "pearson_ctrl",
        "mean of the other scored perturbations as reference; ours of training's",
    ),
    Comparison(
        "pds_l1", "cell-eval", "discrimination_score_l1", "bulks", "discrimination_score_l1", PDS, _discrimination
    ),
    Comparison(
        "pds_l2", "cell-eval", "discrimination_score_l2", "bulks", "discrimination_score_l2", PDS, _discrimination
    ),
    Comparison(
        "pds_cosine",
        "cell-eval",
        "discrimination_score_cosine",
        "bulks",
        "discrimination_score_cosine",
        PDS,
        _discrimination,
    ),
    Comparison("centroid_accuracy", "scperteval", "nir", "effects", "nir", "ties at random; ours half"),
    Comparison(
        "rank_rmse",
        "scperteval",
        "rank",
        "effects",
        "rank",
        "ties at random; ours half, and predictions within a tenth of their norm tie",
    ),
    Comparison("wmse", "scperteval", "wmse_exp2", "weighted", "wmse_exp2", "in single precision"),
    Comparison(
        "r2_w_delta",
        "scperteval",
        "weighted_r2_pert_exp2",
        "weighted",
        "weighted_r2_ctrl_exp2",
        "reference as for pearson_delta_pert",
    ),
    Comparison("overlap_at_n", "cell-eval", "overlap_at_N", "tested", "overlap_at_N", TEST, _overlap),
    Comparison(
        "auprc", "cell-eval", "pr_auc", "ordered", "pr_auc", f"{TEST}; ordered by q, equal below 1e-10; ours by p"
    ),
    Comparison(
        "sig_jaccard",
        "cell-eval",
        "de_sig_genes_recall",
        "tested",
        "de_sig_genes_recall",
        f"{TEST}; from recall and numbers of genes",
        _jaccard,
    ),
    Comparison(
        "energy_distance", "scperteval", "energy_distance_pca_k=50", "components", "energy_distance_top_k=50", PCA
    ),
    Comparison("mmd", "scperteval", "unbiased_mmd_median_pca_k=50", "components", "unbiased_mmd_median_top_k=50", PCA),
    Comparison(
        "sinkhorn_w2",
        "scperteval",
        "sinkhorn_w2_pca_k=50",
        "components",
        "sinkhorn_w2_top_k=50",
        f"{PCA}; in single precision",
        is_same=False,
    ),
    Comparison(
        "sinkhorn_w2", "geomloss", "sinkhorn", "components", "sinkhorn", "what scperteval calls, in double precision"
    ),
    Comparison("pds_cosine", "cell-eval2", "pds_cosine", "bulks", "pds_cosine", BULK),
    Comparison(
        "expr_mse_unbiased_norm",
        "cell-eval2",
        "expr_mse_unbiased_capped_norm",
        "noise",
        "expr_mse_unbiased_capped_norm",
        f"{BULK}; delete-one jackknife, ρ, Ĉ of the predicted cells; ours its first order, no ρ, Ĉ of the controls",
        _per_distance,
    ),
    *(
        Comparison(ours, "cell-eval2", f"de_wilcoxon_{theirs}", "tests", f"de_wilcoxon_{theirs}", POOL)
        for ours, theirs in {
            "direction_fidelity": "direction_fidelity_yield_raw",
            "direction_reach": "direction_reach_raw",
            "sig_jaccard": "sig_jaccard",
            "lfc_nmae": "lfc_nmae",
        }.items()
    ),
)
MADE = "made screen"
# The same on the made screen alone: one batch, few cells, that started from nothing, and no two predictions alike.
MADE_ONLY = {"tested", "ordered", "weighted", "components"}
TIES_DIFFER = {"rank_rmse", "centroid_accuracy"}


# --- theirs, each in a process of its own ---------------------------------------------------------------------------


def cell_eval(
    measured: ad.AnnData, predicted: ad.AnnData, metrics: list[str], tests: dict | None = None
) -> pd.DataFrame:
    """Return perturbations × cell-eval's metrics, of pdex' tests or of those given as de_real and de_pred."""
    from cell_eval import MetricsEvaluator
    from cell_eval.metrics import metrics_registry

    needs_test = any(name.startswith(("de_", "overlap", "precision", "pr_", "roc_")) for name in metrics)
    columns = {"control_pert": "control", "pert_col": "perturbation"}
    with tempfile.TemporaryDirectory() as outdir:
        evaluator = MetricsEvaluator(
            predicted, measured, **columns, outdir=outdir, skip_de=not needs_test, **(tests or {})
        )
        skipped = sorted(set(metrics_registry.list_metrics()) - set(metrics))
        results, _ = evaluator.compute(skip_metrics=skipped, write_csv=False, break_on_error=True)
    return results.to_pandas().set_index("perturbation")


def pdex_tests(measured: ad.AnnData, predicted: ad.AnnData, tested: pd.DataFrame, is_ordered: bool) -> dict:
    """Return pdex' tests of some genes per perturbation, adjusted for these.

    With is_ordered, predicted q are ranks of p.
    """
    import polars
    from pdex import pdex
    from scipy.stats import false_discovery_control

    tests = {}
    for name, cells in (("de_real", measured), ("de_pred", predicted)):
        genes = cells[:, cells.var_names.isin(tested["feature"])].copy()
        table = pdex(
            genes, "perturbation", "ref", is_log1p=True, geometric_mean=False, reference="control", as_pandas=True
        )
        table = table.merge(tested, on=["target", "feature"])
        p = table.groupby("target")["p_value"]
        table["fdr"] = (
            p.rank() / (len(genes.var) + 1)
            if is_ordered and name == "de_pred"
            else p.transform(false_discovery_control)
        )
        tests[name] = polars.from_pandas(table)
    return tests


def by_its_readme(export: Path, name: str) -> pd.DataFrame:
    """Return the results of an evaluator on what `perturbflow export` wrote, by the command in its README.md."""
    command = re.search(rf"{name} run (?:.*\\\n)*.*", (export / "README.md").read_text())[0]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    subprocess.run(command, shell=True, cwd=export, env=os.environ | {"PATH": path}, check=True)
    return pd.read_csv(export / re.search(r" -o (\S+)", command)[1] / "results.csv")


def by_metric(scores: pd.DataFrame) -> pd.DataFrame:
    """Return perturbations × metrics of one row per value."""
    return scores.pivot(index="perturbation", columns="metric", values="value")


def cell_eval2(measured: ad.AnnData, predicted: ad.AnnData, metrics: list[str], tests: dict) -> pd.DataFrame:
    """Return perturbations × metrics of the preset vcc2026, of means or of tests, given as de_real and de_pred."""
    from cell_eval2 import EvalConfig, compute_metrics

    columns = {"control": "control", "pert_col": "perturbation", "target_gene_map": {"*": None}}
    config = replace(
        EvalConfig.from_preset("vcc2026"), metrics=metrics, input_type="lognorm", validate_input=False, **columns
    )
    return by_metric(compute_metrics(predicted, measured, config=config, **tests).to_pandas())


def expression_errors(noise: dict[str, np.ndarray]) -> pd.DataFrame:
    """Return cell-eval2's expression errors of given log bulks and variances, one perturbation at a time.

    Each has controls of its own. A second perturbation, far off and without noise, keeps ρ at 1.
    """
    from cell_eval2.metrics.delta import distance_unbiased, mse_unbiased_capped
    from cell_eval2.moments import GroupMoments

    labels, rows = np.array(["control", "own", "far"]), []
    for i in range(len(noise["labels"])):

        def side(name: str, away: float, i: int = i) -> tuple[tuple, GroupMoments]:
            bulks = np.stack([noise["control"][i], noise[name][i], noise[name][i] + away])
            variances = np.array([noise["control_variance"][i], noise[f"{name}_variance"][i], 0.0])
            return (labels, bulks), GroupMoments(labels, np.full(3, 2.0), np.zeros(3), jk=variances)

        (bulks, moments), (bulks_hat, moments_hat) = side("measured", 0.0), side("predicted", 1e3)
        real = {"comparator": "bulk_lognorm", "control": "control", "real_bulk": bulks, "real_moments": moments}
        error = mse_unbiased_capped(pred_bulk=bulks_hat, pred_moments=moments_hat, **real)["own"]
        rows.append((error, distance_unbiased(**real)["own"]))
    columns = ["expr_mse_unbiased_capped", "expr_distance_unbiased"]
    return pd.DataFrame(rows, noise["labels"], columns)


def our_tests(tested: pd.DataFrame) -> dict:
    """Return our tests as cell-eval2 takes those of others."""
    import polars

    tables = {}
    for name, side in (("de_real", "measured"), ("de_pred", "predicted")):
        columns = {
            f"{column}_{side}": theirs
            for column, theirs in {"lfc": "log2_fold_change", "p": "p_value", "q": "p_adj"}.items()
        }
        tables[name] = polars.from_pandas(tested[["target", "feature", *columns]].rename(columns=columns))
    return tables


def geomloss(measured: ad.AnnData, predicted: ad.AnnData, _: list[str]) -> pd.DataFrame:
    """Return the Sinkhorn distance that scperteval has, in double precision."""
    import torch
    from geomloss import SamplesLoss

    loss = SamplesLoss(loss="sinkhorn", p=2, blur=0.05, debias=True, backend="tensorized")
    labels = sorted(set(measured.obs["perturbation"]) - {"control"})
    sides = [
        [torch.as_tensor(cells[cells.obs["perturbation"] == label].X.copy()) for label in labels]
        for cells in (measured, predicted)
    ]
    values = [(2 * loss(x, y).clamp(min=0)).sqrt().item() for x, y in zip(*sides, strict=True)]
    return pd.DataFrame({"sinkhorn": values}, index=labels)


def scperteval(measured: ad.AnnData, predicted: ad.AnnData, protocols: list[str]) -> pd.DataFrame:
    """Return perturbations × scperteval's protocols."""
    from scperteval import prepare, score

    prepared = prepare(measured, protocols, min_cells=1)
    scores = {
        name: score(prepared, name, predicted).per_perturbation.set_index("perturbation")["score"] for name in protocols
    }
    return pd.DataFrame(scores)


def in_float64(cells: ad.AnnData) -> ad.AnnData:
    """Return cells in double precision, so that rounding is no part of what differs."""
    return ad.AnnData(
        sparse.csr_matrix(cells.X, dtype=np.float64),
        cells.obs[["perturbation"]].astype(str),
        pd.DataFrame(index=cells.var_names),
    )


# --- ours -----------------------------------------------------------------------------------------------------------


def field_inputs(pairs: Path, predictions: Path) -> tuple[ad.AnnData, ad.AnnData]:
    """Return measured and predicted cells as the field's evaluators want them, the same measured controls in both."""
    cells = ad.read_h5ad(pairs)
    measured = cells[(cells.obs["role"] == "test") & (cells.obs["half"] != "a")].copy()
    predicted = ad.concat([ad.read_h5ad(predictions), measured[measured.obs["is_control"]]])
    del measured.layers["counts"]
    return measured, predicted


def feeds(scored: "Scored") -> Iterator[tuple[str, list[str], list[str], np.ndarray, np.ndarray, np.ndarray]]:
    """Yield the rows of FEEDS: name, labels of measured and of predicted rows, the rows, and those of controls."""
    labels = scored.labels
    common = scored.control.mean(axis=0)
    measured, predicted = scored.measured - scored.control + common, scored.predicted - scored.control + common
    yield "effects", labels, labels, measured, predicted, common[None]
    highest = scored.highly_expressed
    yield "highest", labels, labels, measured[:, highest], predicted[:, highest], common[None, highest]
    reference = np.broadcast_to(scored.reference, scored.measured.shape)
    common = reference.mean(axis=0)
    yield (
        "centred",
        labels,
        labels,
        scored.measured - reference + common,
        scored.predicted - reference + common,
        common[None],
    )
    kept = ~scored.own_target.any(axis=0)
    measured, predicted = (
        (bulk - scored.control_bulk)[:, kept] for bulk in (scored.measured_bulk, scored.predicted_bulk)
    )
    yield "bulks", labels, labels, measured, predicted, np.zeros((1, kept.sum()))
    names = [
        np.repeat(labels, [len(rows) for rows in cells])
        for cells in (scored.measured_components, scored.predicted_components)
    ]
    measured, predicted = np.concatenate(scored.measured_components), np.concatenate(scored.predicted_components)
    yield "components", *names, measured, predicted, np.zeros((2, measured.shape[1]))


def write_feeds(scored: "Scored", genes: list[str], folder: Path) -> None:
    """Write {feed}.measured.h5ad and {feed}.predicted.h5ad of every feed of rows, noise.npz and tested.tsv."""
    for feed, *labels, measured, predicted, control in feeds(scored):
        lift = max(
            0.0, -min(rows.min() for rows in (measured, predicted, control))
        )  # cell-eval takes negative values for a mistake
        for name, of_rows, rows in zip(("measured", "predicted"), labels, (measured, predicted), strict=True):
            obs = pd.DataFrame({"perturbation": [*of_rows, *["control"] * len(control)]}).rename(index=str)
            columns = pd.DataFrame(
                index=[f"column_{i}" for i in range(rows.shape[1])]
            )  # no gene's name: nothing more is left out
            ad.AnnData(np.vstack([rows, control]) + lift, obs, columns).write_h5ad(folder / f"{feed}.{name}.h5ad")
    write_noise(scored, folder)
    write_tests(scored, genes, folder)


def write_noise(scored: "Scored", folder: Path) -> None:
    """Write noise.npz: log bulks without perturbed genes, and sums of variances, weighed as means over other genes."""
    kept = ~scored.own_target
    weight = kept.shape[1] / kept.sum(axis=1)
    arrays = {"labels": np.array(scored.labels)}
    for side in ("measured", "predicted", "control"):
        arrays[side] = np.sqrt(weight)[:, None] * kept * getattr(scored, f"{side}_bulk")
        arrays[f"{side}_variance"] = weight * (kept * getattr(scored, f"{side}_bulk_variance")).sum(axis=1)
    np.savez(folder / "noise.npz", **arrays)


def write_tests(scored: "Scored", genes: list[str], folder: Path) -> None:
    """Write tested.tsv: every test that ours makes."""
    from perturbflow.evaluation.ranks import p_value

    at, gene = np.nonzero(~np.isnan(scored.measured_test.z))
    tested = pd.DataFrame({"target": np.array(scored.labels)[at], "feature": np.array(genes)[gene]})
    for side, test in (("measured", scored.measured_test), ("predicted", scored.predicted_test)):
        tested[f"lfc_{side}"] = test.log_fold_change[at, gene]
        tested[f"p_{side}"], tested[f"q_{side}"] = p_value(test.z[at, gene]), test.q[at, gene]
    tested.to_csv(folder / "tested.tsv", sep="\t", index=False)


def our_scores(predictions: ad.AnnData, pairs: "Pairs", metrics: Iterable[str]) -> "tuple[pd.DataFrame, Scored]":
    """Return perturbations × our metrics, and what they read."""
    from perturbflow.evaluation import METRICS, score_inputs

    asked = {name: METRICS[name] for name in metrics}
    scored = score_inputs(predictions, pairs, frozenset(metric.needs for metric in asked.values()))
    return pd.DataFrame({name: metric.function(scored) for name, metric in asked.items()}, index=scored.labels), scored


def ours(folder: Path, metrics: Iterable[str]) -> "tuple[pd.DataFrame, Scored]":
    """Return perturbations × our metrics of files, read as the workflow reads them, and what they read."""
    from perturbflow.pairs import Pairs

    return our_scores(ad.read_h5ad(folder / "predictions.h5ad", backed="r"), Pairs.open(folder / "pairs.h5ad"), metrics)


# --- processes ------------------------------------------------------------------------------------------------------


def read(folder: Path, feed: str) -> tuple[ad.AnnData, ad.AnnData]:
    return ad.read_h5ad(folder / f"{feed}.measured.h5ad"), ad.read_h5ad(folder / f"{feed}.predicted.h5ad")


def work_prepare(folder: Path) -> None:
    """The evaluators' inputs of a screen."""
    for name, cells in zip(
        ("measured", "predicted"), field_inputs(folder / "pairs.h5ad", folder / "predictions.h5ad"), strict=True
    ):
        cells.write_h5ad(folder / f"cells.{name}.h5ad")


def work_export(folder: Path) -> None:
    """What `perturbflow export` writes for the evaluators."""
    from perturbflow.evaluation.layouts import layouts

    layouts(folder / "pairs.h5ad", folder / "predictions.h5ad", folder / "export", "a run")


def work_ours(folder: Path) -> None:
    """All our metrics, and every feed."""
    from perturbflow.evaluation import METRICS

    scores, scored = ours(folder, METRICS)
    scores.to_csv(folder / "ours.tsv", sep="\t", index_label="perturbation")
    write_feeds(scored, list(ad.read_h5ad(folder / "predictions.h5ad", backed="r").var_names), folder)


def work_nearness(folder: Path) -> None:
    """The evaluators' errors of the cells as they are, and of the mean of test controls of their strata."""
    from perturbflow.pairs import Pairs

    measured, predicted = field_inputs(folder / "pairs.h5ad", folder / "predictions.h5ad")
    test = Pairs.open(folder / "pairs.h5ad").roles("test")
    labels = sorted(set(predicted.obs["perturbation"]) - {"control"})
    means = [
        test.control_mean_for(np.intersect1d(test.cells_of(label), np.flatnonzero(test.obs["half"] == "b")))
        for label in labels
    ]
    controls = ad.AnnData(np.array(means), pd.DataFrame({"perturbation": labels}, index=labels), predicted.var[[]])
    controls = ad.concat([controls, measured[measured.obs["is_control"]]])
    for name, cells in (("cells", predicted), ("controls", controls)):
        table = cell_eval(measured, cells, ["mae", "mse"]).join(scperteval(measured, cells, ["l2_heg_k=1000"]))
        table.to_csv(folder / f"nearness.{name}.tsv", sep="\t", index_label="perturbation")


def work_evaluator(folder: Path, name: str) -> None:
    """All that is compared with one evaluator: {evaluator}.{feed}.tsv."""
    comparisons = [comparison for comparison in COMPARISONS if comparison.evaluator == name]
    asked = {"cells": [comparison.theirs for comparison in comparisons]} if name != "geomloss" else {}
    for comparison in comparisons:
        asked.setdefault(comparison.feed, []).append(comparison.call)
    evaluate = evaluated_by_cell_eval2 if name == "cell-eval2" else evaluated
    for feed, calls in asked.items():
        table = evaluate(folder, name, feed, calls)
        table.to_csv(folder / f"{name}.{feed}.tsv", sep="\t", index_label="perturbation")


def evaluated(folder: Path, name: str, feed: str, calls: list[str]) -> pd.DataFrame:
    """Return perturbations × what an evaluator makes of one feed."""
    evaluate = {"cell-eval": cell_eval, "scperteval": scperteval, "geomloss": geomloss}[name]
    cells = read(folder, "cells")
    if feed in ("tested", "ordered"):
        doubles = [in_float64(side) for side in cells]
        tested = pd.read_csv(folder / "tested.tsv", sep="\t", usecols=["target", "feature"])
        return cell_eval(*doubles, [*calls, "de_nsig_counts"], pdex_tests(*doubles, tested, feed == "ordered"))
    if feed == "weighted":
        reference = read(folder, "centred")[0]
        reference = reference[reference.obs["perturbation"] == "control"].copy()
        reference.var_names = cells[0].var_names
        sides = [ad.concat([side[side.obs["perturbation"] != "control"], reference]) for side in cells]
        return evaluate(*map(in_float64, sides), calls)
    also = ["de_nsig_counts"] if "overlap_at_N" in calls else []
    return evaluate(*read(folder, feed), sorted({*calls, *also}))


def evaluated_by_cell_eval2(folder: Path, _: str, feed: str, calls: list[str]) -> pd.DataFrame:
    """Return perturbations × what cell-eval2 makes of one feed."""
    if feed == "cells":
        return by_metric(by_its_readme(folder / "export", "cell-eval2"))
    if feed == "noise":
        return expression_errors(dict(np.load(folder / "noise.npz")))
    tests = our_tests(pd.read_csv(folder / "tested.tsv", sep="\t")) if feed == "tests" else {}
    return cell_eval2(*read(folder, "bulks"), calls, tests)


def work_ours_shared(folder: Path) -> None:
    """Our metrics that cell-eval has too."""
    ours(folder, OURS_SHARED)


def work_ours_all(folder: Path) -> None:
    """The workflow's step."""
    from perturbflow.evaluation import evaluate

    evaluate(folder / "predictions.h5ad", folder / "pairs.h5ad", folder / "split.json", folder / "metrics.tsv")


def work_cell_eval_shared(folder: Path) -> None:
    """cell-eval's metrics that we have too."""
    cell_eval(*read(folder, "cells"), list(CELL_EVAL_SHARED))


def second_time(folder: Path, load: Callable[[], tuple], score: Callable[..., object]) -> None:
    """Write wall and CPU seconds from loaded inputs to scores; a first run has imported and compiled everything."""
    for _ in range(2):
        inputs = load()
        wall, cpu = time.perf_counter(), sum(os.times()[:4])
        score(*inputs)
        np.savetxt(folder / "second_time.txt", [time.perf_counter() - wall, sum(os.times()[:4]) - cpu])


def work_ours_in_memory(folder: Path) -> None:
    """Our metrics that cell-eval has too, of cells in memory."""
    from perturbflow.pairs import Pairs

    def load() -> tuple:
        return ad.read_h5ad(folder / "predictions.h5ad"), Pairs.read(folder / "pairs.h5ad"), OURS_SHARED

    second_time(folder, load, our_scores)


def work_cell_eval_in_memory(folder: Path) -> None:
    """cell-eval's metrics that we have too, of cells in memory."""
    second_time(folder, lambda: (*read(folder, "cells"), list(CELL_EVAL_SHARED)), cell_eval)


WORK = {
    "prepare": work_prepare,
    "export": work_export,
    "nearness": work_nearness,
    "ours": work_ours,
    **{name: partial(work_evaluator, name=name) for name in EVALUATORS},
    "ours, shared metrics": work_ours_shared,
    "ours, all metrics": work_ours_all,
    "cell-eval, shared metrics": work_cell_eval_shared,
    "ours, in memory": work_ours_in_memory,
    "cell-eval, in memory": work_cell_eval_in_memory,
}


def measured_process(command: list[object]) -> tuple[float, float, float]:
    """Run a Python script to its end; return wall seconds, CPU seconds and peak resident memory in GiB."""
    started = time.perf_counter()
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen([sys.executable, *map(str, command)], stdout=log, stderr=log)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            log.seek(0)
            raise SystemExit(f"{' '.join(map(str, command))} failed:\n{log.read().decode()[-4000:]}")
    return time.perf_counter() - started, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 2**20


def work(name: str, folder: Path) -> tuple[float, float, float]:
    """Do one piece of WORK in a process of its own."""
    return measured_process([__file__, "work", "--name", name, "--folder", folder])


def make(folder: Path, what: str) -> None:
    """Write the made screen of one kind of measurement."""
    names = ("genes", "perturbations", "controls", "scored", "predicted")
    options = [word for name, n in zip(names, SIZES[what], strict=True) for word in (f"--{name}", n)]
    # Cells that start from nothing keep their plain mean, as theirs do.
    measured_process(
        [HERE / "made_predictions.py", folder, *options, *(["--from-nothing"] if what == "agreement" else [])]
    )


# --- tables ---------------------------------------------------------------------------------------------------------


def greatest_difference(ours: pd.Series, theirs: pd.Series) -> float:
    """Return the greatest absolute difference.

    It is infinite where a value is undefined for one of the two alone, and NaN where all are undefined for both.
    """
    if (ours.isna() != theirs.isna()).any():
        return np.inf
    return float((ours - theirs).abs().max())


def agreement(folder: Path, is_made: bool = True) -> pd.DataFrame:
    """Return one row per comparison: greatest differences over perturbations, and whether definitions are equal."""
    for name in ("prepare", "export", "ours", *EVALUATORS):
        work(name, folder)

    def table(name: str) -> pd.DataFrame:
        return pd.read_csv(folder / f"{name}.tsv", sep="\t", index_col="perturbation")

    scores = table("ours")
    shape = (len(scores), ad.read_h5ad(folder / "pairs.h5ad", backed="r").n_vars)
    rows = []
    for comparison in COMPARISONS:
        differences = []
        for feed, name in (("cells", comparison.theirs), (comparison.feed, comparison.call)):
            if feed == "cells" and comparison.evaluator == "geomloss":
                differences.append(np.nan)
                continue
            theirs = comparison.value(
                table(f"{comparison.evaluator}.{feed}"),
                name,
                (shape[0], min(shape[1], 1000) if feed == "highest" else shape[1]),
            )
            differences.append(greatest_difference(scores[comparison.ours], theirs.reindex(scores.index)))
        is_always = comparison.feed not in MADE_ONLY and comparison.ours not in TIES_DIFFER
        is_same = comparison.is_same and (is_made or is_always)
        rows.append(
            (comparison.ours, f"{comparison.evaluator} {comparison.theirs}", *differences, is_same, comparison.differs)
        )
    return pd.DataFrame(rows, columns=["ours", "theirs", "as they are", "same inputs", "same", "differs"])


def markdown(table: pd.DataFrame) -> str:
    """Return a table in Markdown."""
    lines = [table.columns, ["---"] * table.shape[1], *table.astype(str).itertuples(index=False)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def show_agreement(folders: dict[str, Path], file: Path | None) -> None:
    """Print the table of agreement, and write it; fail where the same definition gives another value."""
    tables = {screen: agreement(folder, screen == MADE) for screen, folder in folders.items()}
    columns, wrong = {}, set()
    for screen, table in tables.items():
        wrong |= set(table.loc[table["same"] & (table["same inputs"] > TOLERANCE), "ours"])
        for column in ("as they are", "same inputs"):
            columns[f"{screen}: {column}"] = table[column].map("{:.0e}".format).replace({"nan": "–", "0e+00": "0"})
    shown = pd.DataFrame({**table[["ours", "theirs"]], **columns, "theirs differs in": table["differs"]})
    shown.insert(shown.shape[1] - 1, "same inputs are", [FEEDS[comparison.feed] for comparison in COMPARISONS])
    print(markdown(shown))
    if file:
        shown.to_csv(file, sep="\t", index=False)
    if wrong:
        raise SystemExit(f"more than {TOLERANCE:g} apart where the definition is the same: {', '.join(sorted(wrong))}")


def show_nearness(results: list[Path]) -> None:
    """Print one row per model's folder: mean errors of its cells, and as shares of those of the controls' mean."""
    rows = []
    for model in results:
        with tempfile.TemporaryDirectory() as temporary:
            link_results(model, Path(temporary))
            work("nearness", Path(temporary))
            cells, controls = (
                pd.read_csv(Path(temporary) / f"nearness.{name}.tsv", sep="\t", index_col="perturbation")
                for name in ("cells", "controls")
            )
        dataset, split, name, _ = model.resolve().parts[-4:]
        row = {"screen": f"{dataset}, {split}", "model": name}
        for column, theirs in (
            ("mae", "cell-eval mae"),
            ("mse", "cell-eval mse"),
            ("l2_heg_k=1000", "scperteval l2_heg_k=1000"),
        ):
            ratio = cells[column].mean() / controls[column].mean()
            row[theirs] = f"{cells[column].mean():.4f}, {100 * (ratio - 1):+.1f} %"
        rows.append(row)
    print(markdown(pd.DataFrame(rows)))


def link_results(model: Path, folder: Path) -> None:
    """Lay a model's predictions, and the cells that they are held against, into a folder."""
    for file in (model / "predictions.h5ad", model.parents[1] / "pairs.h5ad"):
        (folder / file.name).unlink(missing_ok=True)
        (folder / file.name).symlink_to(file.resolve())


def in_memory(name: str, folder: Path) -> tuple[float, float, float]:
    """Do one piece of WORK that is timed from inputs in memory to scores; return what `work` does, with these times."""
    *_, peak = work(name, folder)
    return *np.loadtxt(folder / "second_time.txt"), peak


def show_speed(folder: Path) -> None:
    """Print wall time, CPU time and peak memory of each, and ratios to cell-eval's, as processes and from memory."""
    work("prepare", folder)
    processes = ("cell-eval, shared metrics", "ours, shared metrics", "ours, all metrics")
    for measure, names in ((work, processes), (in_memory, ("cell-eval, in memory", "ours, in memory"))):
        table = pd.DataFrame(
            [measure(name, folder) for name in names], columns=["seconds", "CPU seconds", "peak GiB"], index=names
        )
        ratios = table.iloc[0] / table
        table["times as fast"], table["by CPU"], table["of the memory"] = (
            ratios["seconds"],
            ratios["CPU seconds"],
            1 / ratios["peak GiB"],
        )
        print(markdown(table.round(2).reset_index(names="")), end="\n\n")


def show_scale(folder: Path) -> None:
    """Print wall time and peak memory of our evaluation of many cells."""
    seconds, _, peak = work("ours, all metrics", folder)
    n_cells, n_genes = ad.read_h5ad(folder / "predictions.h5ad", backed="r").shape
    print(f"{n_cells:,} predicted cells × {n_genes:,} genes: {seconds:.0f} s, peak {peak:.2f} GiB")


def main() -> None:
    """Print the tables of one kind of measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=(*SIZES, "nearness", "work"), help="work is what this script calls itself with")
    parser.add_argument(
        "--results",
        type=Path,
        nargs="+",
        default=[],
        help="models' folders; for agreement one, beside the made screen",
    )
    parser.add_argument("--table", type=Path, help="write the table of agreement here, too")
    parser.add_argument("--folder", type=Path, help="keep what is made here, and use it the next time")
    parser.add_argument("--name", choices=WORK, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.what == "work":
        WORK[arguments.name](arguments.folder)
        return
    if arguments.what == "nearness":
        show_nearness(arguments.results)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "split.json").exists():
            make(folder, arguments.what)
        if arguments.what == "agreement":
            folders = {MADE: folder}
            for model in arguments.results[:1]:
                dataset, split, name, _ = model.resolve().parts[-4:]
                folders[f"{dataset}, {split}, {name}"] = run = folder / "run"
                run.mkdir(exist_ok=True)
                link_results(model, run)
            show_agreement(folders, arguments.table)
        else:
            {"speed": show_speed, "scale": show_scale}[arguments.what](folder)


if __name__ == "__main__":
    main()
