"""Ours, closed forms and models of others on the same cells: one table per screen × split.

    snakemake --cores 2 --keep-going --configfile workflow_tests/benchmarks/others.yaml evaluated
    python workflow_tests/benchmarks/others.py results

The configuration reads ../shared as shared/. Of all runs that are scored below results, finished or not. Per model:
error (l2_heg1000_off_target) and correlation (pearson_delta_pert_off_target), each a mean over held-out perturbations
and seeds, with its 95 % interval and, in square brackets, where it stands from no change (0) to a perfect predictor of
the mean (1); the verdict, in a word; seconds and peak memory of the training, those of the script where another program
trained.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import pandas as pd

from leaderboard import SCALED, markdown

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

from perturbflow.benchmark import benchmark
from perturbflow.registry.families import FAMILIES
from perturbflow.registry.shipped import shipped

SHOWN = ("l2_heg1000_off_target", "pearson_delta_pert_off_target")


def accounts(results: Path) -> pd.DataFrame:
    """Return one row per scored run: its place, metrics.tsv, family, seconds and peak memory."""
    of_code = {family.implementation: name for name, family in reversed(FAMILIES.items())}
    rows = []
    for file in sorted(results.glob("*/*/*/seed_*/metrics.tsv")):
        run = json.loads(file.with_name("run.json").read_text())
        dataset, split, model, seed = file.parts[-5:-1]
        script = run["facts"].get("script", {})
        seconds = script.get("seconds", run["seconds"])
        family = of_code.get(run["implementation"])
        rows.append((dataset, split, model, seed, file, family, seconds, run["peak_memory_mb"]))
    names = ["dataset", "split", "model", "seed", "file", "family", "seconds", "memory"]
    return pd.DataFrame(rows, columns=names).dropna(subset="family")


def judged(runs: pd.DataFrame, results: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return benchmark.tsv and verdicts.tsv of these runs."""
    with tempfile.TemporaryDirectory() as folder:
        names = ("benchmark", "calibration", "comparisons", "strata", "verdicts")
        files = {name: Path(folder) / f"{name}.tsv" for name in names}
        datasets = runs["dataset"].unique()
        benchmark(
            metrics=list(runs["file"]), families=dict(zip(runs["model"], runs["family"], strict=True)), **files,
            qualities=[file for name in datasets if (file := results / name / "quality.tsv").is_file()],
            audits=[results / dataset / split / "audit.json" for dataset, split in places(runs)],
            harmonizations=[results / name / "harmonization.json" for name in datasets],
            least_difference=shipped()["verdicts"]["least_difference"],
        )  # fmt: skip
        return pd.read_csv(files["benchmark"], sep="\t"), pd.read_csv(files["verdicts"], sep="\t")


def places(runs: pd.DataFrame) -> list[tuple[str, str]]:
    """Return dataset and split of all runs."""
    return list(dict.fromkeys(zip(runs["dataset"], runs["split"], strict=True)))


def table(runs: pd.DataFrame, scores: pd.DataFrame, verdicts: pd.DataFrame) -> str:
    """Return the table of one screen × split in Markdown, the smallest error first."""
    scores = scores[scores["metric"].isin(SHOWN)]
    means = scores.groupby(["model", "metric"]).agg(
        value=("value", "mean"), low=("ci_low", "min"), high=("ci_high", "max"), scaled=(SCALED, "mean")
    )
    known = verdicts.set_index("model")
    order = means.xs(SHOWN[0], level="metric")["value"].sort_values().index
    rows = {}
    for model in order:
        of_model = runs[runs["model"] == model]
        cells = [
            f"{one.value:.3f} ({one.low:.3f}, {one.high:.3f}) [{one.scaled:.2f}]"
            for one in (means.loc[(model, metric)] for metric in SHOWN)
        ]
        verdict = str(known.loc[model, "verdict"]) if model in known.index else "–"
        rows[model] = [
            of_model["family"].iloc[0], str(len(of_model)), *cells, verdict, f"{of_model['seconds'].mean():.0f}",
            f"{of_model['memory'].max() / 1000:.1f}",
        ]  # fmt: skip
    heads = ["family", "seeds", "error ↓", "correlation ↑", "verdict", "s", "GB"]
    return markdown(pd.DataFrame.from_dict(rows, orient="index"), heads)


def main() -> None:
    """Print all tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    results = parser.parse_args().results
    runs = accounts(results)
    scores, verdicts = judged(runs, results)
    for dataset, split in places(runs):
        here = [part[(part["dataset"] == dataset) & (part["split"] == split)] for part in (runs, scores, verdicts)]
        print(f"**{dataset}, {split}**: {int(here[1]['n_perturbations'].max())} held-out perturbations\n")
        print(table(*here) + "\n")
        for row in here[2].itertuples():
            if row.family == "external":
                print(f"* {row.sentence}")
        print()


if __name__ == "__main__":
    main()
