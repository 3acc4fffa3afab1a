"""Print the tables of the benchmark as Markdown, as docs/results/default-run.md has them.

    python workflow_tests/benchmarks/leaderboard.py results renge2023
    python workflow_tests/benchmarks/leaderboard.py results renge2023 --brief no_change set_gp perfect_mean

One leaderboard per split, with the headline metrics unless --all is given: the mean, its 95 % interval in round
brackets, the value scaled from no change (0) to the ceiling (1) in square ones, the best baseline in bold; below it
which metrics distinguish here, and the verdict on every model. With --brief and names: these models alone, value and
scaled value, the verdict in a word, and a ✗ at metrics that do not distinguish. With --against MODEL: the paired
differences to that baseline instead; above zero is better than it, whatever the metric's direction.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd

SCALED = "scaled_no_change_perfect_mean"
ARROWS = {"higher": "↑", "lower": "↓", "target": "◎"}


def parser_of_split(description: str, models: list[str]) -> argparse.ArgumentParser:
    """Return the command line of what compares models of one split: results, dataset, split, --models."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("dataset")
    parser.add_argument("split")
    parser.add_argument("--models", nargs="+", default=models)
    return parser


def runs_of(arguments: argparse.Namespace) -> dict[str, list[dict]]:
    """Return run.json of all seeds of the models that are asked for, and print of what they are."""
    folder = arguments.results / arguments.dataset / arguments.split
    runs = {
        model: [json.loads(file.read_text()) for file in sorted(folder.glob(f"{model}/seed_*/run.json"))]
        for model in arguments.models
    }
    if missing := [model for model, of_seeds in runs.items() if not of_seeds]:
        sys.exit(f"{folder} holds no run.json of {', '.join(missing)}: run the workflow with these models first.")
    print(f"**{arguments.dataset}, {arguments.split}**: {max(map(len, runs.values()))} seed(s)\n")
    return runs


def markdown(cells: pd.DataFrame, heads: list[str], first: str = "model") -> str:
    """Return one row per entry of the index, in its order, and one column per head."""
    lines = [f"| {first} | " + " | ".join(heads) + " |", "| --- |" + " --- |" * len(heads)]
    return "\n".join(
        lines
        + [f"| {model} | " + " | ".join(row) + " |" for model, row in zip(cells.index, cells.to_numpy(), strict=True)]
    )


def markdown_of(table: pd.DataFrame) -> str:
    """Return a table as it is, its first column in front."""
    first, *heads = table.columns
    return markdown(table.set_index(first).fillna("–").astype(str), heads, first)


def leaderboard(rows: pd.DataFrame) -> str:
    """Return value, 95 % interval and scaled value per model × metric, means over seeds."""
    means = rows.groupby(["model", "metric"], sort=False)[
        ["value", "ci_low", "ci_high", SCALED, "is_best_baseline"]
    ].mean()
    cells = means.apply(_cell, axis=1).unstack(fill_value="")
    better = rows.drop_duplicates("metric").set_index("metric")["better"].map(ARROWS)
    cells = cells.loc[rows["model"].unique(), better.index]
    return markdown(cells, [f"{metric} {arrow}" for metric, arrow in better.items()])


def _cell(score: pd.Series) -> str:
    bold = "**" if score["is_best_baseline"] else ""
    scaled = "" if np.isnan(score[SCALED]) else f" [{score[SCALED]:.2f}]"
    return f"{bold}{score['value']:.3f}{bold} ({score['ci_low']:.2f}, {score['ci_high']:.2f}){scaled}"


def brief(rows: pd.DataFrame, verdicts: pd.DataFrame, models: list[str]) -> str:
    """Return value, scaled value and verdict of some models; ✗ at the metrics that cannot tell."""
    means = rows.groupby(["model", "metric"], sort=False)[["value", SCALED]].mean()
    cells = means.apply(
        lambda score: f"{score['value']:.3f}" + ("" if np.isnan(score[SCALED]) else f" [{score[SCALED]:.2f}]"), axis=1
    )
    words = verdicts.set_index("model")["verdict"]
    mute = {metric for listed in verdicts["cannot_tell"].dropna() for metric in listed.split(",")}
    better = rows.drop_duplicates("metric").set_index("metric")["better"].map(ARROWS)
    table = cells.unstack(fill_value="").loc[
        [model for model in models if model in words.index or model in set(rows["model"])], better.index
    ]
    table = table.assign(verdict=words.reindex(table.index).fillna("–"))
    return markdown(
        table, [*(f"{metric} {arrow}{' ✗' if metric in mute else ''}" for metric, arrow in better.items()), "verdict"]
    )


def calibration(rows: pd.DataFrame) -> str:
    """Return DRF and BDS of the technical duplicate against both negative references; ✗ for "cannot tell"."""
    rows = rows[rows["positive"] == "technical_duplicate"]
    mark = rows["verdict"].map({"tells": ""}).fillna(" ✗")
    rows = rows.assign(drf=rows["drf"].map("{:.2f}".format), bds=rows["bds"].map("{:.2f}".format) + mark)
    cells = rows.set_index(["metric", "negative"])[["drf", "bds"]].unstack().loc[rows["metric"].unique()]
    return markdown(cells, [f"{score.upper()} against {negative}" for score, negative in cells.columns], "metric")


def differences(rows: pd.DataFrame) -> str:
    """Return the mean difference and its 95 % interval per model × metric."""
    cells = rows.set_index(["model", "metric"]).apply(
        lambda c: f"{c['difference']:+.3f} ({c['ci_low']:+.3f}, {c['ci_high']:+.3f})", axis=1
    )  # fmt: skip
    cells = cells.unstack(fill_value="").loc[rows["model"].unique(), rows["metric"].unique()]
    return markdown(cells, list(cells.columns))


def main() -> None:
    """Print the tables of a dataset."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("dataset")
    parser.add_argument("--against", metavar="MODEL")
    parser.add_argument("--all", action="store_true", help="all metrics")
    parser.add_argument("--brief", nargs="+", metavar="MODEL")
    arguments = parser.parse_args()
    names = ("benchmark", "calibration", "comparisons", "verdicts")
    tables = {name: pd.read_csv(arguments.results / f"{name}.tsv", sep="\t") for name in names}
    tables = {name: table[table["dataset"] == arguments.dataset] for name, table in tables.items()}
    for split, rows in tables["benchmark"].groupby("split", sort=False):
        print(f"{split}: {rows['n_perturbations'].max()} held-out perturbations, {rows['seed'].nunique()} seed(s)\n")
        if arguments.against:
            rows = tables["comparisons"].query("split == @split and baseline == @arguments.against")
        rows = rows if arguments.all else rows[rows["headline"]]
        if arguments.brief:
            print(brief(rows, tables["verdicts"].query("split == @split"), arguments.brief) + "\n")
            continue
        print((differences if arguments.against else leaderboard)(rows) + "\n")
        if not arguments.against:
            known = tables["calibration"].query("split == @split")
            print(calibration(known if arguments.all else known[known["headline"]]) + "\n")
            for row in tables["verdicts"].query("split == @split").itertuples():
                print(f"* `{row.model}`: {row.sentence}")
            print()


if __name__ == "__main__":
    main()
