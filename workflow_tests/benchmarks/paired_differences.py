"""Compare every model with one of them, perturbation by perturbation, with 95 % bootstrap intervals of the mean difference.

python workflow_tests/benchmarks/paired_differences.py results renge2023 unseen_perturbation --against no_change

Positive is better than the other model, whatever the metric's direction. Several seeds are averaged per perturbation.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

from perturbflow.benchmark import bootstrap_interval
from perturbflow.evaluation import METRICS


def main() -> None:
    """Print one Markdown row per model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("dataset")
    parser.add_argument("split")
    parser.add_argument("--against", default="no_change")
    arguments = parser.parse_args()
    files = sorted((arguments.results / arguments.dataset / arguments.split).glob("*/seed_*/metrics.tsv"))
    scores = pd.concat([pd.read_csv(file, sep="\t", keep_default_na=False, na_values=[""]) for file in files])
    table = scores.pivot_table(index=["metric", "perturbation"], columns="model", values="value")
    models = [model for model in table if model != arguments.against]
    print(f"| model − {arguments.against} | " + " | ".join(METRICS) + " |\n| --- |" + " --- |" * len(METRICS))
    for model in models:
        cells = []
        for metric in METRICS.values():
            difference = (metric.loss(table.loc[metric.name, arguments.against]) - metric.loss(table.loc[metric.name, model])).to_numpy()
            low, high = bootstrap_interval(difference)
            cells.append(f"{np.nanmean(difference):+.3f} ({low:+.3f}, {high:+.3f})")
        print(f"| {model} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
