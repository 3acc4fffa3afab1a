"""What do priors bring? The same models on co-expression, GO, interactions and all of them, on genes that they never saw perturbed.

    python workflow_tests/benchmarks/priors.py results/renge2023 results/carpool --go human_gene2go.tsv.gz --ppi edges.tsv.gz

Every gene is held out by one fold of every seed. The table gives the mean over perturbations with co-expression alone, and the paired
difference of every other choice of sources, turned so that above zero is better, with its 95 % interval over perturbations. With
--dimensions, sizes of the priors' vectors are compared instead, by inner folds over training genes: held-out perturbations are not used.
"""

import argparse
import logging
import sys
import tempfile
import time
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

from perturbflow.embeddings import Embeddings, coexpression  # noqa: E402
from perturbflow.evaluation import METRICS, score_inputs  # noqa: E402
from perturbflow.evaluation.bootstrap import estimate  # noqa: E402
from perturbflow.genes.symbols import members_of  # noqa: E402
from perturbflow.io.files import write_json  # noqa: E402
from perturbflow.models.closed_form.base import TrainingSet  # noqa: E402
from perturbflow.models.closed_form.baselines import PerturbedMean  # noqa: E402
from perturbflow.models.closed_form.regressions import KernelRidge, Nearest  # noqa: E402
from perturbflow.pairs import Pairs, pair  # noqa: E402
from perturbflow.predict import predict  # noqa: E402
from perturbflow.priors.annotations import annotation_vectors  # noqa: E402
from perturbflow.priors.interactions import interaction_vectors  # noqa: E402
from perturbflow.priors.reading import N_DIMENSIONS  # noqa: E402
from perturbflow.registry.families import FAMILIES  # noqa: E402
from perturbflow.splits.split import split  # noqa: E402
from perturbflow.train import train  # noqa: E402

SOURCES = {"coexpression": ["coexpression"], "go": ["go"], "ppi": ["ppi"], "all three": ["coexpression", "go", "ppi"]}
NEEDS = frozenset({"pseudobulk", "counts"})
CELLS = 100  # predicted per perturbation: a shift needs no more
FOLDS = 5


def prepare(folder: Path, here: Path, seed: int, fold: int) -> Pairs:
    """Divide a screen and select its genes."""
    spec = {
        "kind": "unseen_perturbation",
        "folds": FOLDS,
        "fold": fold,
        "name": "folds",
        "validation_fraction": 0.1,
        "seed": seed,
    }
    split(folder / "harmonized.h5ad", folder / "harmonization.json", here / "split.json", f"folds_fold_{fold}", spec)
    pair(folder / "harmonized.h5ad", here / "split.json", here / "pairs.h5ad", 2000)
    write_json(here / "audit.json", {"split_sha256": ""})
    return Pairs.read(here / "pairs.h5ad")


def tables_of(cells: Pairs, priors: dict[str, pd.DataFrame]) -> dict[str, pd.DataFrame]:
    """Return source → perturbed genes × dimensions, NaN without a row."""
    genes = sorted({gene for label in cells.perturbations for gene in members_of(label)})
    return {
        "coexpression": coexpression(cells, genes),
        **{name: table.reindex(genes) for name, table in priors.items()},
    }


def scores(here: Path, cells: Pairs, tables: dict[str, pd.DataFrame], models: list[str]) -> list[tuple]:
    """Return source, model, metric, perturbation and value of every choice of sources."""
    rows = []
    for name, sources in SOURCES.items():
        pd.concat([tables[source] for source in sources], axis=1).astype(np.float32).to_parquet(
            here / "embeddings.parquet"
        )
        for model in models:
            implementation, started = FAMILIES[model].implementation, time.perf_counter()
            train(here / "pairs.h5ad", here / "embeddings.parquet", here / "audit.json", here / "model.npz", here / "run.json",
                  implementation, {}, 0, "cpu", 1)  # fmt: skip
            seconds = time.perf_counter() - started
            predict(here / "pairs.h5ad", here / "model.npz", here / "predictions.h5ad", implementation, {}, 0, CELLS)
            scored = score_inputs(ad.read_h5ad(here / "predictions.h5ad"), cells, NEEDS)
            for metric in METRICS.values():
                if metric.headline and metric.needs in NEEDS:
                    rows += [
                        (name, model, metric.name, *found)
                        for found in zip(scored.labels, metric.function(scored), strict=True)
                    ]
            rows.append((name, model, "seconds", "", seconds))
    return rows


def inner_errors(cells: Pairs, tables: dict[str, pd.DataFrame], sizes: list[int]) -> list[tuple]:
    """Return source, size, model and squared error over inner folds, in units of that of the mean effect."""
    rows = []
    for name, table in tables.items():
        for size in sizes if name != "coexpression" else [table.shape[1]]:
            training = TrainingSet.of(cells.roles("train"), Embeddings(table.iloc[:, :size]), 0)
            candidates = {
                "kernel ridge": KernelRidge(1.0, 0.5),
                "ridge": KernelRidge(1.0),
                "nearest": Nearest(5),
                "mean": PerturbedMean(),
            }
            errors = dict.fromkeys(candidates, 0.0)
            for inner, held_out in training.rounds(of_genes=True):
                for label, candidate in candidates.items():
                    candidate.learned(inner)
                    errors[label] += sum(
                        ((candidate.effect(perturbation) - value) ** 2).sum()
                        for perturbation, value in zip(held_out.labels, held_out.values, strict=True)
                        if len(members_of(perturbation)) == 1
                    )
            rows += [(name, size, label, errors[label] / errors["mean"]) for label in candidates if label != "mean"]
    return rows


def paired(rows: pd.DataFrame, metric: str) -> dict[str, str]:
    """Return the mean with co-expression and the paired difference of every other choice of sources, better above zero."""
    # A perturbation of two genes is held out by both their folds: its scores of one seed are averaged.
    losses = {
        name: METRICS[metric].loss(of.pivot_table(index="seed", columns="perturbation", values="value").to_numpy())
        for name, of in rows.groupby("sources", sort=False)
    }
    baseline = losses.pop("coexpression")
    mean = rows.loc[rows["sources"] == "coexpression", "value"].mean()
    found = estimate(np.stack([baseline - of for of in losses.values()]))
    told = ["**" if sign else "" for sign in found.sign]
    cells = [
        f"{bold}{d:+.3f}{bold} ({low:+.3f}, {high:+.3f})"
        for bold, d, low, high in zip(told, found.mean, found.low, found.high, strict=True)
    ]
    return {"coexpression": f"{mean:.3f}", **dict(zip(losses, cells, strict=True))}


def report(table: pd.DataFrame) -> None:
    """Print a Markdown table per metric, and the seconds that a training takes."""
    for metric in [name for name in table["metric"].unique() if name != "seconds"]:
        print(
            f"\n**{metric}** ({METRICS[metric].reading})\n\n| screen | model | {' | '.join(SOURCES)} |\n| {'--- | ' * (1 + len(SOURCES))}--- |"
        )
        for (dataset, model), rows in table[table["metric"] == metric].groupby(["dataset", "model"], sort=False):
            found = paired(rows, metric)
            print(f"| {dataset} | {model} | {' | '.join(found[name] for name in SOURCES)} |")
    seconds = table[table["metric"] == "seconds"]
    print("\nSeconds to train:\n")
    print(
        seconds.pivot_table(index=["dataset", "model"], columns="sources", values="value", sort=False)
        .round(1)
        .to_string()
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="*", help="results/{dataset} of finished runs")
    parser.add_argument("--table", type=Path, help="print the table of an --out that is there, and no more")
    parser.add_argument("--go", type=Path, help="GO annotations: GAF, table, or a package org.*.eg.db")
    parser.add_argument("--ppi", type=Path, help="a list of edges")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--models", nargs="+", default=["ridge", "nearest_perturbation", "set_gp"])
    parser.add_argument("--dimensions", type=int, nargs="+", help="compare these sizes by inner folds")
    parser.add_argument("--out", type=Path, help="TSV of every value")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    if arguments.table:
        report(pd.read_csv(arguments.table, sep="\t"))
        return
    if not (arguments.folders and arguments.go and arguments.ppi):
        parser.error("folders, --go and --ppi are needed")

    size = max(arguments.dimensions or [N_DIMENSIONS])
    priors = {
        "go": annotation_vectors({"file": arguments.go}, n_dimensions=size),
        "ppi": interaction_vectors({"file": arguments.ppi}, n_dimensions=size),
    }
    priors = {name: table.rename(columns=lambda i, name=name: f"{name}:{i}") for name, table in priors.items()}
    columns = (
        ["source", "size", "model", "error"]
        if arguments.dimensions
        else ["sources", "model", "metric", "perturbation", "value"]
    )
    found = []
    for folder in arguments.folders:
        for seed in arguments.seeds:
            for fold in range(FOLDS):
                with tempfile.TemporaryDirectory() as temporary:
                    cells = prepare(folder, Path(temporary), seed, fold)
                    tables = tables_of(cells, priors)
                    if arguments.dimensions:
                        rows = inner_errors(cells, tables, arguments.dimensions)
                    else:
                        rows = scores(Path(temporary), cells, tables, arguments.models)
                found.append(pd.DataFrame(rows, columns=columns).assign(dataset=folder.name, seed=seed, fold=fold))
                print(f"{folder.name} seed {seed} fold {fold}", file=sys.stderr, flush=True)
    table = pd.concat(found)
    if arguments.out:
        table.to_csv(arguments.out, sep="\t", index=False)
    if arguments.dimensions:
        print(
            table.pivot_table(index=["source", "size"], columns=["dataset", "model"], values="error", sort=False)
            .round(3)
            .to_string()
        )
    else:
        report(table)


if __name__ == "__main__":
    main()
