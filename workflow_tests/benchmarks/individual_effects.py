r"""Individual effects where they are known: models against the mean effect, on structural simulations.

    python workflow_tests/benchmarks/individual_effects.py --seeds 0 1 2
    # Simulations that no param was chosen on.
    python workflow_tests/benchmarks/individual_effects.py --seeds 100 101 102 --rows rows.tsv

A world (workflow_tests/support/structural.py) has 12 perturbed genes, 6 of them with effects that depend on a cell's
state and one with none at all, and six combinations, half of them held out. Every control of the test role is asked;
the truth is the same cell, with the same noise of its own and of its measurement, under the perturbation ("the cell
itself"), or the mean of that over measurements ("expected"). Root mean squared errors over cells and genes; the ratio
is to the mean effect, the measured mean effect given to every cell (`additive`). "Spread" is the slope of the true on
the predicted differences between cells: 1 where they are of the right size, 0 where they are noise. Rows of a world go
to the file of --rows as soon as it is done, and worlds that the file holds are not trained again.
"""

import argparse
import logging
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [
    str(ROOT / "scripts"),
    str(ROOT / "workflow_tests"),
    str(ROOT / "workflow_tests/support"),
    str(ROOT / "workflow_tests/benchmarks"),
]

from conftest import prepare  # noqa: E402
from learned import registered  # noqa: E402
from structural import World, chosen, expected_effects, own_effects  # noqa: E402

from leaderboard import markdown_of  # noqa: E402
from perturbflow.embeddings import Embeddings  # noqa: E402
from perturbflow.models.base import Run, build  # noqa: E402
from perturbflow.pairs import Pairs  # noqa: E402

COMBINATIONS = ["TF1+TF2", "TF3+TF4", "TF1+TF8", "TF7+TF9", "TF2+TF5", "TF4+TF10"]
SPEC = {"kind": "unseen_combination", "test_fraction": 0.5, "validation_fraction": 0.1, "seed": 0}


def error(predicted: np.ndarray, truth: np.ndarray) -> float:
    """Root mean squared error."""
    return float(np.sqrt(((predicted - truth) ** 2).mean()))


def spread(predicted: np.ndarray, truth: np.ndarray) -> float:
    """Slope of true on predicted differences between cells; NaN for predictions without any."""
    a, b = (values - values.mean(axis=0) for values in (predicted, truth))
    return float((a * b).sum() / (a * a).sum()) if (a * a).mean() > 1e-8 else np.nan


def rows_of(seed: int, models: list[str]) -> list[dict]:
    """Train all models on one world and hold them against its truth."""
    world = World(seed)
    screen, controls = world.screen([*world.perturbed, *COMBINATIONS])
    with tempfile.TemporaryDirectory() as folder:
        files = prepare(Path(folder), screen, SPEC, n_hvg=500)
        pairs, embeddings = Pairs.read(files.pairs), Embeddings.read(files.embeddings)
        test, training = pairs.roles("test"), pairs.roles("train")
        asked = np.flatnonzero(test.is_control)
        start, columns = test.X[asked].toarray(), [world.genes.index(gene) for gene in pairs.genes]
        cells = chosen(controls, np.array([int(name.split("_")[1]) for name in test.obs.index[asked]]))
        target = float(np.expm1(start).sum(axis=1).mean())
        singles = [label for label in world.perturbed if label in training.perturbations]
        kinds = {
            "depends on the state": [label for label in singles if label in world.dependent],
            "the same in all cells": [
                label for label in singles if label not in world.dependent and label != world.placebo
            ],
            "none (placebo)": [label for label in singles if label == world.placebo],
            "combinations held out": test.perturbations,
        }
        truth = {
            label: tuple(of(world, cells, label, target)[:, columns] for of in (own_effects, expected_effects))
            for labels in kinds.values()
            for label in labels
        }
        mean_model = build(*registered("additive"))
        mean_model.fit(pairs.roles("train", "validation"), embeddings, Run(seed=seed))
        rows = []
        for name in models:
            started = time.perf_counter()
            model = build(*registered(name))
            model.fit(
                pairs.roles("train", "validation"),
                embeddings,
                Run(seed=seed, checkpoints=Path(folder) / name, identity="benchmark"),
            )
            seconds = time.perf_counter() - started
            for kind, labels in kinds.items():
                for label in labels:
                    predicted, mean, (own, expected) = (
                        model.individual_effects(start, label, seed),
                        mean_model.effect(label)[None],
                        truth[label],
                    )
                    rows.append(
                        {
                            "effect": kind,
                            "model": name,
                            "the cell itself": error(predicted, own),
                            "ratio": error(predicted, own) / max(error(mean, own), 1e-12),
                            "expected": error(predicted, expected),
                            "ratio, expected": error(predicted, expected) / max(error(mean, expected), 1e-12),
                            "spread": spread(predicted, expected),
                            "seconds": seconds,
                            "seed": seed,
                        }
                    )
    return rows


def main() -> None:
    """Print one row per kind of effect and model: means over perturbations and simulations, with ranges of ratios."""
    logging.disable(logging.INFO)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--models", nargs="+", default=["additive", "set_gp", "counterfactual", "scppdm", "scppdm_hybrid", "jepa"]
    )
    parser.add_argument("--rows", type=Path, help="TSV that rows are added to, and read from")
    arguments = parser.parse_args()
    table = (
        pd.read_csv(arguments.rows, sep="\t")
        if arguments.rows and arguments.rows.exists()
        else pd.DataFrame({"seed": []})
    )
    for seed in arguments.seeds:
        if seed not in set(table["seed"]):
            table = pd.concat([table, pd.DataFrame(rows_of(seed, arguments.models))])
            if arguments.rows:
                table.to_csv(arguments.rows, sep="\t", index=False)
    table = table[table["seed"].isin(arguments.seeds)]
    by_world = table.groupby(["effect", "model", "seed"], sort=False).mean(numeric_only=True)
    shown = by_world.groupby(["effect", "model"], sort=False).mean()
    for name in ("ratio", "ratio, expected"):
        low, high = (by_world[name].groupby(["effect", "model"], sort=False).agg(of) for of in ("min", "max"))
        shown[name] = [f"{m:.2f} ({a:.2f} to {b:.2f})" for m, a, b in zip(shown[name], low, high, strict=True)]
    shown = shown.reset_index()
    for name in ("the cell itself", "expected"):
        shown[name] = shown[name].map("{:.3f}".format)
    shown["spread"], shown["seconds"] = (
        shown["spread"].map(lambda value: "–" if np.isnan(value) else f"{value:.2f}"),
        shown["seconds"].map("{:.0f}".format),
    )
    print(markdown_of(shown))


if __name__ == "__main__":
    main()
