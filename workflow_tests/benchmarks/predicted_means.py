r"""Print how near the means of predicted cells, as they stand in predictions.h5ad, are to those of measured cells.

    python workflow_tests/benchmarks/predicted_means.py results/renge2023 results/carpool:unseen_combination \
        [--seeds 0 1 2]

Of harmonized screens (`snakemake data`) and closed forms, each split by several seeds. Per model, means over splits and
perturbations, with 95 % intervals over them: the root mean squared error of the mean of the cells, Pearson's r of its
difference to test controls with the measured effect, the same minus the mean effect of training, and how wide the cells
are. The last rows are no models. The mean of test controls of the same batches and cell types: `no_change` should be as
near. The mean of controls of all roles predicts no effect either: what it has for a correlation comes of the noise that
test controls lend to both sides.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
from scipy import sparse

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

import perturbflow.api as pf  # noqa: E402
from perturbflow import splits  # noqa: E402
from perturbflow.evaluation.bootstrap import estimate  # noqa: E402
from perturbflow.evaluation.similarity import correlation  # noqa: E402
from perturbflow.pairs import Pairs  # noqa: E402

MODELS = ("no_change", "perturbed_mean", "additive", "set_gp", "technical_duplicate")
SPREAD = ("variance_ratio", "quantile_coverage", "energy_distance", "auprc")


def measured_in(pairs: ad.AnnData) -> Pairs:
    """Return the cells of pairs.h5ad as models read them."""
    return Pairs(
        pairs.X.tocsr(),
        pairs.obs,
        list(pairs.var_names),
        np.asarray(pairs.obsm["control_index"]),
        np.arange(pairs.n_obs),
    )


def rows_of(
    name: str, mean_of: Callable[[str], np.ndarray], test: Pairs, reference: np.ndarray, scores: pd.DataFrame | None
) -> Iterator[dict]:
    """Yield one row per perturbation: how far a predicted mean is off that of the measured cells."""
    for label in test.perturbations:
        measured = test.cells_of(label)
        truth, control, mean = test.mean_of(measured), test.control_mean_for(measured), mean_of(label)
        row = {"model": name, "perturbation": label, "rmse": np.sqrt(np.square(mean - truth).mean())}
        row |= {"effect": correlation(mean - control, truth - control)}
        row |= {"centred": correlation(mean - control - reference, truth - control - reference)}
        if scores is not None:
            row |= {metric: scores.loc[(label, metric), "value"] for metric in SPREAD}
        yield row


def main() -> None:
    """Print one table per screen."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("screens", nargs="+", help="folder of a harmonized screen, and after a colon the kind of split")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--test-controls", type=float, help="share of the controls that test gets, in place of 0.3")
    parser.add_argument(
        "--means-only", action="store_true", help="leave out how wide cells are, which takes most of the time"
    )
    arguments = parser.parse_args()
    if arguments.test_controls:
        rest = 1 - arguments.test_controls
        splits.CONTROL_FRACTIONS |= {"train": rest * 5 / 7, "validation": rest * 2 / 7, "test": arguments.test_controls}
    for screen in arguments.screens:
        folder, _, kind = screen.partition(":")
        kind = kind or "unseen_perturbation"
        rows: list[dict] = []
        for seed in arguments.seeds:
            harmonized = ad.read_h5ad(Path(folder) / "harmonized.h5ad")
            pairs = pf.pair(harmonized, pf.split(harmonized, kind, seed=seed))
            cells = measured_in(pairs)
            training, test = cells.roles("train"), cells.roles("test")
            reference = np.mean([training.effect_of(label) for label in training.perturbations], axis=0)
            for model in arguments.models:
                predictions = pf.baseline(model, pairs, seed=seed)
                scores = (
                    None if arguments.means_only else pf.score(predictions, pairs).set_index(["perturbation", "metric"])
                )
                cells_of = predictions.obs.groupby("perturbation", observed=True).indices

                def of_cells(label: str, X: sparse.csr_matrix = predictions.X, cells_of: dict = cells_of) -> np.ndarray:
                    return np.asarray(X[cells_of[label]].mean(axis=0)).ravel()

                rows += [row | {"seed": seed} for row in rows_of(model, of_cells, test, reference, scores)]
            everything = replace(cells, obs=cells.obs.assign(role="test"))
            for name, where in (("(test controls)", test), ("(controls of all roles)", everything)):

                def of_controls(label: str, where: Pairs = where) -> np.ndarray:
                    return where.control_mean_for(where.cells_of(label))

                rows += [row | {"seed": seed} for row in rows_of(name, of_controls, test, reference, None)]
        table = pd.DataFrame(rows)
        columns = ["rmse", "effect", "centred", *(() if arguments.means_only else SPREAD)]
        print(
            f"\n**{Path(folder).name}, {kind}**, {len(arguments.seeds)} splits, "
            f"{len(table[table['model'] == 'no_change'])} perturbations\n"
        )
        print("| model | " + " | ".join(columns) + " |\n" + "| --- " * (len(columns) + 1) + "|")
        for model, of_model in table.groupby("model", sort=False):
            found = estimate(of_model[columns].to_numpy(float).T[:, None])
            cells_of_row = [
                f"{m:.4f} ({low:.3f}, {high:.3f})" if np.isfinite(m) else ""
                for m, low, high in zip(*found[:3], strict=True)
            ]
            print(f"| {model} | " + " | ".join(cells_of_row) + " |", flush=True)


if __name__ == "__main__":
    main()
