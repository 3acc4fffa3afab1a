"""Print a leaderboard of results/benchmark.tsv as Markdown, as it stands in the README.

python workflow_tests/benchmarks/leaderboard.py results/benchmark.tsv renge2023
"""

import argparse
from pathlib import Path

import pandas as pd


def leaderboard(table: pd.DataFrame) -> str:
    """Return Markdown: one row per model, value and 95 % interval per metric, means over seeds."""
    arrow = {"higher": "↑", "lower": "↓"}
    direction = table.drop_duplicates("metric").set_index("metric")["better"]
    by_model = table.groupby(["model", "metric"], sort=False)[["value", "ci_low", "ci_high"]].mean()
    lines = ["| model | " + " | ".join(f"{metric} {arrow[direction[metric]]}" for metric in direction.index) + " |"]
    lines.append("| --- |" + " --- |" * len(direction))
    for model in table["model"].unique():
        cells = [by_model.loc[(model, metric)] for metric in direction.index]
        lines.append(f"| {model} | " + " | ".join(f"{c['value']:.3f} ({c['ci_low']:.2f}, {c['ci_high']:.2f})" for c in cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Print one table per split of a dataset."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("benchmark", type=Path)
    parser.add_argument("dataset")
    arguments = parser.parse_args()
    table = pd.read_csv(arguments.benchmark, sep="\t")
    for split, rows in table[table["dataset"] == arguments.dataset].groupby("split", sort=False):
        n, seeds = rows["n_perturbations"].iloc[0], rows["seed"].nunique()
        print(f"{split}: {n} held-out perturbations, {seeds} seed{'s' * (seeds > 1)}\n\n{leaderboard(rows)}\n")


if __name__ == "__main__":
    main()
