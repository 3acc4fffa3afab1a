"""Ours, closed forms and models of others on the same cells: one table per screen × split.

    snakemake --cores 1 --keep-going --configfile workflow_tests/benchmarks/others.yaml evaluated
    python workflow_tests/benchmarks/others.py results --tsv docs/results/models_of_others.tsv

The configuration reads ../shared as shared/. Of all runs that are scored below results, finished or not. Per model:

* trained: epochs, iterations or steps at most, of those that config/models.yaml has. What else differs from there is
  said below the tables.
* predicted: perturbations that the model predicted, of the held-out ones; the others are scored as no change.
* error (l2_heg1000_off_target) and correlation (pearson_delta_pert_off_target): means over held-out perturbations of
  the mean over seeds. In round brackets the 95 % interval over perturbations; in square ones where the value stands
  from no change (0) to a perfect predictor of the mean (1).
* against set_gp: the word of verdicts.tsv, over all headline metrics.
* seconds of clock and of the CPU (means), and peak memory (highest) of the training; those of the script where another
  program trained.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import yaml

from leaderboard import SCALED, markdown

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

from perturbflow.benchmark import benchmark
from perturbflow.evaluation.bootstrap import mean_with_interval
from perturbflow.registry.families import FAMILIES
from perturbflow.registry.places import config_folder
from perturbflow.registry.shipped import shipped

SHOWN = {"error": "l2_heg1000_off_target", "correlation": "pearson_delta_pert_off_target"}
COURSES = ("epochs", "max_epochs", "num_iterations", "max_steps")  # last words of options that say how long
CPA_EPOCHS = 400  # where max_epochs is null, on up to 20,000 cells
CHECKS = ("val_freq", "ckpt_every_n_steps")  # of no effect on what is learned
PLACE = ["dataset", "split"]


def accounts(results: Path) -> pd.DataFrame:
    """Return one row per scored run: its place, metrics.tsv, family, options, seconds and peak memory."""
    of_code = {family.implementation: name for name, family in reversed(FAMILIES.items())}
    rows = []
    for file in sorted(results.glob("*/*/*/seed_*/metrics.tsv")):
        run = json.loads(file.with_name("run.json").read_text())
        dataset, split, model, _, _ = file.parts[-5:]
        spent = run["facts"].get("script", {})
        seconds, cpu = ({**run, **spent}.get(name) for name in ("seconds", "cpu_seconds"))
        rows.append({
            "dataset": dataset, "split": split, "model": model, "file": file, "seconds": seconds,
            "cpu_seconds": cpu,
            "family": of_code.get(run["implementation"]), "gb": run["peak_memory_mb"] / 1000,
            "options": run["params"].get("options"), "predicted": run["facts"].get("file", {}).get("perturbations"),
        })  # fmt: skip
    return pd.DataFrame(rows).dropna(subset="family")


def judged(runs: pd.DataFrame, results: Path) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Return metrics of all runs, benchmark.tsv and verdicts.tsv."""
    with tempfile.TemporaryDirectory() as folder:
        names = ("benchmark", "calibration", "comparisons", "strata", "verdicts", "contexts")
        files = {name: Path(folder) / f"{name}.tsv" for name in names}
        datasets, places = runs["dataset"].unique(), runs[PLACE].drop_duplicates().itertuples(index=False)
        benchmark(
            metrics=list(runs["file"]), families=dict(zip(runs["model"], runs["family"], strict=True)), **files,
            qualities=[file for name in datasets if (file := results / name / "quality.tsv").is_file()],
            audits=[results / place.dataset / place.split / "audit.json" for place in places],
            harmonizations=[results / name / "harmonization.json" for name in datasets],
            least_difference=shipped()["verdicts"]["least_difference"],
        )  # fmt: skip
        tables = [pd.read_csv(files[name], sep="\t") for name in ("benchmark", "verdicts")]
    return pd.concat([pd.read_csv(file, sep="\t") for file in runs["file"]]), *tables


# --- how models were trained ------------------------------------------------------------------------------------------


def flat(options: dict, above: tuple[str, ...] = ()) -> Iterator[tuple[str, object]]:
    """Yield every option with its dotted name."""
    for name, value in options.items():
        if isinstance(value, dict):
            yield from flat(value, (*above, name))
        else:
            yield ".".join((*above, name)), value


def trained(model: str, options: dict | None) -> tuple[str, str]:
    """Return how long a model of others was trained, and what else differs from config/models.yaml."""
    if options is None:
        return "", ""
    block = yaml.safe_load((config_folder() / "models.yaml").read_text())["models"][model]
    theirs, long, differs = dict(flat(block["params"]["options"])), "", []
    for name, value in flat(options):
        last, default = name.split(".")[-1], theirs.get(name)
        if last in COURSES:
            long = (
                f"{value or CPA_EPOCHS:,} of {default or CPA_EPOCHS:,} {last.removeprefix('max_').removeprefix('num_')}"
            )
        elif value != default and last not in CHECKS:
            differs.append(f"{last} {value}" + ("" if default is None else f" ({default})"))
    return long, ", ".join(differs)


# --- tables -----------------------------------------------------------------------------------------------------------


def rows_of(runs: pd.DataFrame, metrics: pd.DataFrame, scores: pd.DataFrame, verdicts: pd.DataFrame) -> pd.DataFrame:
    """Return one row per model of one screen × split, the smallest error first."""
    known = verdicts.set_index("model")["against_set_gp"].fillna("")
    scaled = scores.pivot_table(index="model", columns="metric", values=SCALED)
    rows = []
    for model, of_model in runs.groupby("model", sort=False):
        long, differs = trained(model, of_model["options"].iloc[0])
        row = {
            "model": model, "family": of_model["family"].iloc[0], "seeds": len(of_model), "trained": long,
            "differs": differs, "predicted": of_model["predicted"].min(),
            "perturbations": metrics["perturbation"].nunique(),
        }  # fmt: skip
        for name, metric in SHOWN.items():
            values = metrics[(metrics["metric"] == metric) & (metrics["model"] == model)]
            found = mean_with_interval(values.groupby("perturbation")["value"].mean().tolist())
            row |= {name: found["mean"], f"{name}_low": found["low"], f"{name}_high": found["high"]}
            row[f"{name}_scaled"] = scaled.loc[model, metric]
        row["against_set_gp"] = "" if model == "set_gp" else known.get(model, "")
        cpu = pd.to_numeric(of_model["cpu_seconds"]).mean()  # runs of before have none
        rows.append(row | {"seconds": of_model["seconds"].mean(), "cpu_seconds": cpu, "gb": of_model["gb"].max()})
    return pd.DataFrame(rows).sort_values("error", kind="stable")


def shown(rows: pd.DataFrame) -> str:
    """Return rows as a table in Markdown."""
    cells = {}
    for row in rows.to_dict("records"):
        values = [
            f"{row[name]:.3f} ({row[f'{name}_low']:.3f}, {row[f'{name}_high']:.3f}) [{row[f'{name}_scaled']:.2f}]"
            for name in SHOWN
        ]
        of = "" if pd.isna(row["predicted"]) else f"{row['predicted']:.0f} of {row['perturbations']}"
        cells[row["model"]] = [
            str(row["seeds"]), row["trained"], of, *values, row["against_set_gp"],
            f"{row['seconds']:.0f}", "" if pd.isna(row["cpu_seconds"]) else f"{row['cpu_seconds']:.0f}",
            f"{row['gb']:.1f}",
        ]  # fmt: skip
    heads = ["seeds", "trained", "predicted", "error ↓", "correlation ↑", "against set_gp", "s", "CPU s", "GB"]
    return markdown(pd.DataFrame.from_dict(cells, orient="index"), heads)


def main() -> None:
    """Print all tables, and write them as one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--tsv", type=Path)
    arguments = parser.parse_args()
    runs = accounts(arguments.results)
    tables, found = judged(runs, arguments.results), []
    for place, of_place in runs.groupby(PLACE, sort=False):
        rows = rows_of(of_place, *(part[(part[PLACE] == list(place)).all(axis=1)] for part in tables))
        print(f"**{', '.join(place)}**: {rows['perturbations'].iloc[0]} held-out perturbations\n\n{shown(rows)}\n")
        found.append(rows.assign(**dict(zip(PLACE, place, strict=True))))
    table = pd.concat(found)
    for model, differs in table.loc[table["differs"] != "", ["model", "differs"]].drop_duplicates().to_numpy():
        print(f"* `{model}` differs in: {differs}")
    if arguments.tsv:
        table = table[[*PLACE, *table.columns.drop(PLACE)]]
        table.to_csv(arguments.tsv, sep="\t", index=False, float_format="%.4g")


if __name__ == "__main__":
    main()
