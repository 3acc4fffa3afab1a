"""Lines with known conserved and specific effects: how much of those in a held-out line is recovered.

    python workflow_tests/benchmarks/made_lines_scores.py --seeds 5
    python workflow_tests/benchmarks/made_lines_scores.py --seeds 2 --network scppdm

A row is a model, a column the number of other lines, and few-shot (a third of the line's perturbations train). Each
cell has the squared error as a share of the energy of effects, and Pearson's r of effects that are centred over
perturbations, as means over seeds with their standard error. No zero-shot prediction can be below `least`. With
`--network` a learned model, trained briefly on principal components, is told of contexts or not; three other lines.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd

sys.path.extend(str(Path(__file__).resolve().parents[1] / place) for place in (".", "support", "../scripts"))

from learned import trained
from made_lines import CONSERVED, SPECIFIC, effects_of, effects_of_ceiling, least_error, made_lines, predicted_by

from perturbflow.embeddings import Embeddings
from perturbflow.models.base import build
from perturbflow.models.closed_form.base import TrainingSet
from perturbflow.registry.families import FAMILIES
from perturbflow.splits.contexts import Support

MODELS = (
    "no_change", "perturbed_mean", "other_contexts_mean", "same_elsewhere", "nearest_context", "transfer",
    "gaussian_process",
)  # fmt: skip
CEILINGS = ("context_mean", "technical_duplicate")


def scores(n_sources: int, support: float | None, n_seeds: int) -> pd.DataFrame:
    """Return error and r of every model and seed, with a held-out line and others."""
    rows = []
    for seed in range(n_seeds):
        lines = made_lines(n_sources + 1, seed=seed)
        pairs = lines.held_out(f"line{n_sources}", None if support is None else Support(support))
        training = TrainingSet.of(pairs.roles("train"), Embeddings(pd.DataFrame()), seed)
        for name in (*MODELS, *CEILINGS):
            model = build(FAMILIES[name].implementation, {})
            found = (effects_of_ceiling if name in CEILINGS else effects_of)(model, training, pairs)
            rows.append((name, *lines.errors(found, f"line{n_sources}")))
    return pd.DataFrame(rows, columns=["model", "error", "r"])


def of_network(name: str, n_steps: int, n_seeds: int) -> None:
    """Print error and r of a network, seed by seed, as they are found."""
    print("| seed | way | context | error / r |\n| --- | --- | --- | --- |", flush=True)
    brief = {"n_steps": n_steps, **({"latent": "pca"} if name == "scppdm" else {"mean": "learned"})}
    for seed in range(n_seeds):
        lines, rng = made_lines(4, seed=seed), np.random.default_rng(seed)
        vectors = pd.DataFrame(rng.normal(size=(len(lines.labels), 4)), lines.labels, [f"x:{i}" for i in range(4)])
        for way, support in (("few-shot", Support(0.33)), ("zero-shot", Support(0.0))):
            pairs = lines.held_out("line3", support)
            for context in ("cells", "controls"):
                with tempfile.TemporaryDirectory() as folder:
                    model = trained(name, pairs, Embeddings(vectors), Path(folder), seed, context=context, **brief)[0]
                error, r = lines.errors(predicted_by(model, pairs), "line3")
                print(f"| {seed} | {way} | {context} | {error:.3f} / {r:.3f} |", flush=True)


def shown(table: pd.DataFrame, column: str, name: str) -> str:
    """Return mean ± standard error over seeds."""
    values = table.loc[table["model"] == name, column]
    return f"{values.mean():.3f} ± {values.std(ddof=1) / np.sqrt(len(values)):.3f}"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--network", choices=["scppdm", "counterfactual"])
    parser.add_argument("--steps", type=int, default=600)
    arguments = parser.parse_args()
    n_seeds = arguments.seeds
    if arguments.network:
        of_network(arguments.network, arguments.steps, n_seeds)
        return
    settings = [(n, None) for n in (1, 2, 3, 4)] + [(3, 0.33)]
    names = [f"{n} line{'s' * (n > 1)}" if share is None else f"{n} lines, few-shot" for n, share in settings]
    tables = [scores(n, share, n_seeds) for n, share in settings]
    print(f"conserved {CONSERVED:.0%}, specific {SPECIFIC:.0%}; {n_seeds} seeds; error / r centred\n")
    print("| model | " + " | ".join(names) + " |\n| --- |" + " --- |" * len(names))
    for name in (*MODELS, *CEILINGS):
        cells = [f"{shown(table, 'error', name)} / {shown(table, 'r', name)}" for table in tables]
        print(f"| {name} | " + " | ".join(cells) + " |")
    least = [f"{least_error(n):.3f}" if share is None else "–" for n, share in settings]
    print("| least, zero-shot | " + " | ".join(least) + " |")


if __name__ == "__main__":
    main()
