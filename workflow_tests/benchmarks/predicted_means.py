"""How near are the means of predicted cells, as they stand in predictions.h5ad, to the means of the measured cells?

    python workflow_tests/benchmarks/predicted_means.py results/renge2023 results/carpool:unseen_combination [--seeds 0 1 2]

Of harmonized screens (`snakemake data`) and closed forms, each split by several seeds. Per model, means over splits and perturbations, with 95 %
intervals over them: the root mean squared error of the mean of the cells, Pearson's r of effects minus the mean effect of training, and how wide the
cells are. The last row is the mean of all controls of the same batches and cell types: `no_change` should be as near.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

import perturbflow.api as pf  # noqa: E402
from perturbflow.bootstrap import estimate  # noqa: E402
from perturbflow.pairs import Pairs  # noqa: E402

MODELS = ("no_change", "perturbed_mean", "additive", "stacked", "technical_duplicate")
SPREAD = ("variance_ratio", "quantile_coverage", "energy_distance", "auprc")


def measured_in(pairs: "pf.ad.AnnData") -> Pairs:
    """Return the cells of pairs.h5ad as models read them."""
    return Pairs(pairs.X.tocsr(), pairs.obs, list(pairs.var_names), np.asarray(pairs.obsm["control_index"]), np.arange(pairs.n_obs))


def rows_of(name: str, predictions: "pf.ad.AnnData", test: Pairs, reference: np.ndarray, scores: pd.DataFrame | None) -> Iterator[dict]:
    """Yield one row per perturbation: how far the mean of these cells is off that of the measured ones."""
    for label in test.perturbations:
        measured = test.cells_of(label)
        truth, control = test.mean_of(measured), test.control_mean_for(measured)
        mean = control
        if predictions is not None:
            mean = np.asarray(predictions.X[(predictions.obs["perturbation"] == label).to_numpy()].mean(axis=0)).ravel()
        said, true = mean - control - reference, truth - control - reference
        row = {"model": name, "perturbation": label, "rmse": np.sqrt(np.square(mean - truth).mean()), "centred": np.corrcoef(said, true)[0, 1]}
        if scores is not None:
            row |= {metric: scores.loc[(label, metric), "value"] for metric in SPREAD}
        yield row


def main() -> None:
    """Print one table per screen."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("screens", nargs="+", help="folder of a harmonized screen, and after a colon the kind of split")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    arguments = parser.parse_args()
    for screen in arguments.screens:
        folder, _, kind = screen.partition(":")
        kind = kind or "unseen_perturbation"
        rows: list[dict] = []
        for seed in arguments.seeds:
            harmonized = pf.ad.read_h5ad(Path(folder) / "harmonized.h5ad")
            pairs = pf.pair(harmonized, pf.split(harmonized, kind, seed=seed))
            cells = measured_in(pairs)
            training, test = cells.roles("train"), cells.roles("test")
            reference = np.mean([training.effect_of(label) for label in training.perturbations], axis=0)
            for model in arguments.models:
                predictions = pf.baseline(model, pairs, seed=seed)
                scores = pf.score(predictions, pairs).set_index(["perturbation", "metric"])
                rows += [row | {"seed": seed} for row in rows_of(model, predictions, test, reference, scores)]
            rows += [row | {"seed": seed} for row in rows_of("mean of controls", None, test, reference, None)]
        table = pd.DataFrame(rows)
        columns = ["rmse", "centred", *SPREAD]
        print(f"\n**{Path(folder).name}, {kind}**, {len(arguments.seeds)} splits, {len(table[table['model'] == 'no_change'])} perturbations\n")
        print("| model | " + " | ".join(columns) + " |\n" + "| --- " * (len(columns) + 1) + "|")
        for model, of_model in table.groupby("model", sort=False):
            found = estimate(of_model[columns].to_numpy(float).T[:, None])
            cells_of_row = [f"{m:.4f} ({low:.3f}, {high:.3f})" if np.isfinite(m) else "" for m, low, high in zip(*found[:3], strict=True)]
            print(f"| {model} | " + " | ".join(cells_of_row) + " |", flush=True)


if __name__ == "__main__":
    main()
