r"""Spectral components of a network of genes, with and without a regularized degree, beside vectors of the kind `ppi`.

    python workflow_tests/benchmarks/spectral_components.py results/carpool results/norman_mini --edges edges.tsv.gz \
        --seeds 0 1

All are of one network. Printed are on how many genes a component lies (median participation ratio), and squared errors
on genes that inner folds over training genes hold out, in units of that of the mean effect. Held-out perturbations are
not used.
"""

import argparse
import logging
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
from priors import FOLDS, inner_errors, prepare, tables_of

from perturbflow.priors.interactions import interaction_vectors, network_of, read_edges, spectral_coordinates

SIZES = (64, 128)
MODELS = ["kernel ridge", "ridge", "nearest"]


def participation(vectors: pd.DataFrame) -> float:
    """Return on how many genes the median component lies: (Σx²)² / Σx⁴."""
    squared = vectors.to_numpy() ** 2
    return float(np.median(squared.sum(axis=0) ** 2 / (squared**2).sum(axis=0)))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", help="results/{dataset} of finished runs")
    parser.add_argument("--edges", type=Path, required=True, help="a list of edges")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    files = {"file": arguments.edges}
    genes, network = network_of(read_edges(files), files, max(SIZES) + 1)
    degree = float(network.sum() / len(genes))
    vectors = {
        "ppi": interaction_vectors(files),
        "plain": pd.DataFrame(spectral_coordinates(network, max(SIZES), 0.0), index=genes),
        "regularized": pd.DataFrame(spectral_coordinates(network, max(SIZES), degree), index=genes),
    }
    for name, table in vectors.items():
        print(f"{name}: the median component lies on {participation(table):,.0f} of {len(genes):,} genes")
    rows = []
    for folder in arguments.folders:
        for seed in arguments.seeds:
            for fold in range(FOLDS):
                with tempfile.TemporaryDirectory() as temporary:
                    cells = prepare(folder, Path(temporary), seed, fold)
                    tables = tables_of(cells, vectors)
                    del tables["coexpression"]
                    for name, table in tables.items():
                        rows += [
                            (folder.name, *row)
                            for row in inner_errors(cells, {name: table}, [n for n in SIZES if n <= table.shape[1]])
                        ]
    found = pd.DataFrame(rows, columns=["screen", "source", "size", "model", "error"])
    mean = found.groupby(["source", "size", "screen", "model"], sort=False)["error"].mean().unstack(["screen", "model"])
    heads = [f"{folder.name}: {', '.join(MODELS)}" for folder in arguments.folders]
    print(f"\n| source | size | {' | '.join(heads)} |")
    print("| --- " * (2 + len(arguments.folders)) + "|")
    for (source, size), row in mean.iterrows():
        cells = [", ".join(f"{row[folder.name, model]:.3f}" for model in MODELS) for folder in arguments.folders]
        print(f"| {source} | {size} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
