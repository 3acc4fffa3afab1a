"""renge2023 as four files, one per day, united: equal to the one file; and its days held out one by one.

    pip download renge==0.0.5 --no-deps --no-binary renge
    python workflow_tests/benchmarks/renge_union.py equality renge-0.0.5.tar.gz
    python workflow_tests/benchmarks/renge_union.py days renge-0.0.5.tar.gz --kept docs/results/days.tsv
    python workflow_tests/benchmarks/renge_union.py days renge-0.0.5.tar.gz --kept docs/results/days.tsv \
        --ways zero-shot few-shot --models scppdm jepa counterfactual
    python workflow_tests/benchmarks/renge_union.py context renge-0.0.5.tar.gz
    python workflow_tests/benchmarks/renge_union.py agreement renge-0.0.5.tar.gz --figure docs/pictures/contexts.png

`equality` prints a row per part of the chain: how far the union is from the one file. The limits on genes and
perturbations are off in both, as each member has its own. `days` prints a row per model and a column per way of holding
a day out: nothing of it trains, its controls do, or 30 % of its perturbations. Each cell has the error and Pearson's r
of effects, as means over 23 perturbations × 4 days × seeds, with the standard error over days, and the number of seeds
in round brackets. Models are added one by one with `--kept`, which holds every single score. `context` tells networks
of contexts or not, and holds out days 2 to 4 in turn. Day 5 is in none of it, so it chooses nothing that day 5 scores.
`agreement` draws how alike effects are on two days, as the report does where contexts are held out.
"""

import argparse
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

from perturbflow import api
from perturbflow.embeddings import Embeddings, embeddings
from perturbflow.io.artefacts import save_artefact
from perturbflow.models.base import Run, build
from perturbflow.pairs import Pairs, pair
from perturbflow.predict import predict
from perturbflow.registry.families import FAMILIES
from perturbflow.registry.shipped import shipped
from perturbflow.report.context_agreement import Agreement, matrix_figure
from perturbflow.screens.harmonize import harmonize
from perturbflow.screens.recipes import renge2023
from perturbflow.screens.unite import unite
from perturbflow.splits.split import split

DAYS = ("day_2", "day_3", "day_4", "day_5")
MODELS = ("no_change", "perturbed_mean", "other_contexts_mean", "same_elsewhere", "nearest_context", "transfer",
          "additive", "set_gp", "context_mean", "technical_duplicate")  # fmt: skip
WAYS: dict[str, dict[str, float]] = {
    "all of it": {},
    "zero-shot": {"support_fraction": 0},
    "few-shot": {"support_fraction": 0.3},
}
METRICS = ("l2_heg1000_off_target", "pearson_delta_pert_off_target")
LIMITS = {"min_cells_per_gene": None, "min_cells_per_perturbation": None}


TOLD = ("cells", "controls")


def screen_of(archive: Path) -> tuple[ad.AnnData, dict, dict]:
    """Return the screen with cells named `day:cell` in the order of days, its block and its limits."""
    config = shipped()
    block = config["datasets"]["renge2023"]
    source = renge2023({"file": archive}, block)
    cells = source.adata
    cells = ad.concat([cells[cells.obs["day"] == day] for day in DAYS])
    own = {key: value for key, value in block.items() if key not in ("recipe", "contexts")}
    return cells, own, {**config["qc"], **block["qc"], **LIMITS}


def one_file(cells: ad.AnnData, block: dict, qc: dict, folder: Path) -> Path:
    """Harmonize the screen as one file."""
    folder.mkdir()
    named = cells.copy()
    named.obs_names = [f"{day}:{cell}" for day, cell in zip(cells.obs["day"], cells.obs_names, strict=True)]
    named.write_h5ad(folder / "screen.h5ad")
    harmonize(folder / "screen.h5ad", folder / "harmonized.h5ad", folder / "harmonization.json", "renge", block, qc)
    return folder


def four_files(cells: ad.AnnData, block: dict, qc: dict, folder: Path, days: Sequence[str] = DAYS) -> Path:
    """Harmonize each day as a screen, and unite them."""
    members, accounts = [], []
    for day in days:
        (folder / day).mkdir(parents=True)
        cells[cells.obs["day"] == day].copy().write_h5ad(folder / day / "screen.h5ad")
        members.append(folder / day / "harmonized.h5ad")
        accounts.append(folder / day / "harmonization.json")
        covariates = {"cell_type": block["covariates"]["cell_type"]}
        harmonize(folder / day / "screen.h5ad", members[-1], accounts[-1], day, {**block, "covariates": covariates}, qc)
    union = {"members": list(days), "genes": "shared", "perturbation_types": ["CRISPRko"], "organism": "human"}
    unite(members, accounts, folder / "harmonized.h5ad", folder / "harmonization.json", "renge", union)
    return folder


def paired(folder: Path, spec: dict) -> Path:
    """Split and pair; return pairs.h5ad."""
    split(folder / "harmonized.h5ad", folder / "harmonization.json", folder / "split.json", "x", spec)
    pair(folder / "harmonized.h5ad", folder / "split.json", folder / "pairs.h5ad", 2000)
    return folder / "pairs.h5ad"


def equality(archive: Path, folder: Path) -> None:
    """Print how far the union is from the one file."""
    cells, block, qc = screen_of(archive)
    folders = one_file(cells, block, qc, folder / "one"), four_files(cells, block, qc, folder / "four")
    one, four = (ad.read_h5ad(place / "harmonized.h5ad") for place in folders)
    columns = [column for column in four.obs if column != "dataset"]
    same = one.obs[columns].astype(str).equals(four.obs[columns].astype(str))
    rows = [
        ("harmonized: cells × genes", f"{one.n_obs} × {one.n_vars}", f"{four.n_obs} × {four.n_vars}"),
        ("harmonized: counts that differ", "", f"{(one.X != four.X).nnz}"),
        ("harmonized: obs (batches too), var equal", "", f"{same}, {one.var.equals(four.var)}"),
    ]
    for kind in ("unseen_perturbation", "unseen_context"):
        spec = {"kind": kind, "test_fraction": 0.25, "validation_fraction": 0.1, "seed": 0}
        spec |= {"covariate": "batch", "held_out": ["day_5"]} if kind == "unseen_context" else {}
        files = [paired(place, spec) for place in folders]
        roles = [json.loads((place / "split.json").read_text()) for place in folders]
        a, b = (ad.read_h5ad(file) for file in files)
        index = np.array_equal(a.obsm["control_index"], b.obsm["control_index"])
        rows.append((f"{kind}: roles, matched controls equal", "", f"{roles[0] == roles[1]}, {index}"))
        rows.append((f"{kind}: largest difference of X", "", f"{abs(a.X - b.X).max():g}"))
        for name in ("additive", "set_gp", *(["transfer"] if kind == "unseen_context" else [])):
            scores = [api.score(api.baseline(name, file), file) for file in files]
            worst = np.nanmax(np.abs(scores[0]["value"] - scores[1]["value"]))
            n = f"{len(scores[0])} values of {scores[0]['metric'].nunique()} metrics"
            rows.append((f"{kind}, {name}: largest difference of a score", n, f"{worst:g}"))
    print("| | one file | four files, united |\n| --- | --- | --- |")
    for row in rows:
        print("| " + " | ".join(row) + " |")


def scores_of(model: str, file: Path, seed: int, params: dict | None = None) -> list[float]:
    """Return the means of METRICS of a model, in closed form or learned, on the tested perturbations of pairs.h5ad."""
    started, config = time.perf_counter(), shipped(mine={"models": {model: {"params": params or {}}}})
    block = config["models"][model]
    if FAMILIES[block["family"]].kind != "learned":
        predictions: ad.AnnData | Path = api.baseline(model, file, seed=seed)
    else:
        implementation, folder = FAMILIES[block["family"]].implementation, file.parent / "trained"
        table, trained, predictions = (
            folder / name for name in ("embeddings.parquet", "model.ckpt", "predictions.h5ad")
        )
        folder.mkdir(exist_ok=True)
        embeddings(file, table, ["coexpression"])
        with tempfile.TemporaryDirectory() as checkpoints:
            learned = build(implementation, block["params"])
            run = Run(seed=seed, checkpoints=Path(checkpoints))
            save_artefact(trained, learned.fit(Pairs.load(file).fitted_on("test"), Embeddings.read(table), run))
        predict(file, trained, predictions, implementation, block["params"], seed, config["predict"]["max_cells"])
    means = api.score(predictions, file).groupby("metric")["value"].mean()
    found = [float(means[metric]) for metric in METRICS]
    print(model, params or "", file.parent.name, seed, found, f"{time.perf_counter() - started:.0f} s", file=sys.stderr)
    return found


def held_out(place: Path, day: str, seed: int, own: dict) -> Path:
    """Return pairs.h5ad with a day held out."""
    print(f"{day}, {own}, seed {seed}", file=sys.stderr)
    spec = {"kind": "unseen_context", "covariate": "dataset", "held_out": [day], "validation_fraction": 0.1}
    return paired(place, {**spec, **own, "seed": seed})


def context(archive: Path, folder: Path, n_seeds: int, models: Sequence[str]) -> None:
    """Print the scores of learned models that are told of contexts or not; days 2 to 4, without day 5."""
    cells, block, qc = screen_of(archive)
    place = four_files(cells, block, qc, folder / "three", DAYS[:3])
    print("| day | way | model | context | " + " | ".join(METRICS) + " |\n| --- | --- | --- | --- | --- | --- |")
    for seed, model, day in itertools.product(range(n_seeds), models, DAYS[:3]):
        for way in ("zero-shot", "few-shot"):
            file = held_out(place, day, seed, WAYS[way])
            for told in TOLD:
                found = scores_of(model, file, seed, {"context": told})
                shown = " | ".join(f"{value:.4f}" for value in found)
                print(f"| {day} | {way} | {model} | {told} | {shown} |", flush=True)


def days(
    archive: Path, folder: Path, n_seeds: int, models: Sequence[str], ways: Sequence[str], kept: Path | None
) -> None:
    """Print the scores of models with every day held out in turn; scores that are kept are not made again."""
    cells, block, qc = screen_of(archive)
    place, key = four_files(cells, block, qc, folder / "four"), ["seed", "model", "way", "day"]
    table = pd.read_csv(kept, sep="\t") if kept and kept.is_file() else pd.DataFrame(columns=[*key, *METRICS])
    done = set(table[key].itertuples(index=False, name=None))
    for seed, way, day in itertools.product(range(n_seeds), ways, DAYS):
        missing = [model for model in models if (seed, model, way, day) not in done]
        file = held_out(place, day, seed, WAYS[way]) if missing else place
        for model in missing:
            table.loc[len(table)] = [seed, model, way, day, *scores_of(model, file, seed)]
            if kept:
                table.to_csv(kept, sep="\t", index=False, float_format="%.6g")
    of_day = table.groupby(["model", "way", "day"])[list(METRICS)].mean().groupby(["model", "way"])
    mean, error, seeds = of_day.mean(), of_day.sem(), table.groupby(["model", "way"])["seed"].nunique()
    print("| model | " + " | ".join(ways) + " |\n| --- |" + " --- |" * len(ways))
    for model in table["model"].unique():
        shown = [
            " / ".join(f"{mean.loc[(model, way), m]:.3f} ± {error.loc[(model, way), m]:.3f}" for m in METRICS)
            + f" ({seeds[(model, way)]})"
            if (model, way) in seeds
            else ""
            for way in ways
        ]
        print(f"| {model} | " + " | ".join(shown) + " |")


def agreement(archive: Path, folder: Path, figure: Path) -> None:
    """Draw the report's matrix of agreement of days, with day 5 held out, and print what it says."""
    cells, block, qc = screen_of(archive)
    found = Agreement.of(Pairs.open(held_out(four_files(cells, block, qc, folder / "four"), "day_5", 0, {})), "dataset")
    matrix_figure(found).savefig(figure, dpi=150)
    print(found.words)


def main() -> None:
    """Print one table, or draw the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=["equality", "days", "context", "agreement"])
    parser.add_argument("archive", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--ways", nargs="+", default=tuple(WAYS), choices=tuple(WAYS))
    parser.add_argument("--kept", type=Path, help="table of single scores of days, added to and read")
    parser.add_argument("--figure", type=Path, default=Path("contexts.png"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if arguments.table == "equality":
            equality(arguments.archive, Path(folder))
        elif arguments.table == "agreement":
            agreement(arguments.archive, Path(folder), arguments.figure)
        elif arguments.table == "days":
            days(arguments.archive, Path(folder), arguments.seeds, arguments.models, arguments.ways, arguments.kept)
        else:
            context(arguments.archive, Path(folder), arguments.seeds, arguments.models)


if __name__ == "__main__":
    main()
