"""Print how far models of a run let cells differ in their response to a perturbation.

    python workflow_tests/benchmarks/cell_differences.py results renge2023 unseen_context \
        --models counterfactual jepa --perturbations POU5F1 SOX2

Per model of seed 0 and perturbation, in test controls: the size of the mean effect, the standard deviation over cells
of their own expected effects (mean over genes, log1p units), and that of their response, the projection on the mean
effect: 1 is a cell that does as the mean does. For shorter trainings give n_steps under the params of a model:
--config 'models={brief: {family: counterfactual, params: {n_steps: 375}}}'.
"""

import sys
from pathlib import Path

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

from leaderboard import markdown_of, parser_of_split, runs_of
from perturbflow.io.artefacts import load_artefact
from perturbflow.models.base import build
from perturbflow.pairs import Pairs

MOST_CELLS = 300


def main() -> None:
    parser = parser_of_split(__doc__, ["counterfactual"])
    parser.add_argument("--perturbations", nargs="+", required=True)
    arguments = parser.parse_args()
    folder = arguments.results / arguments.dataset / arguments.split
    test = Pairs.open(folder / "pairs.h5ad").roles("test")
    rows = np.flatnonzero(test.is_control)[:MOST_CELLS]
    cells, context = test.X[rows].toarray(), test.context_of(rows)
    table = []
    for model, (run, *_) in runs_of(arguments).items():
        trained = build(run["implementation"], run["params"])
        trained.restore(load_artefact(folder / model / "seed_0" / "model.ckpt"))
        for perturbation in arguments.perturbations:
            effects = trained.individual_effects(cells, perturbation, 0, context)
            mean = effects.mean(axis=0)
            table.append({
                "model": model, "steps": f"{run['params']['n_steps']:,}", "perturbation": perturbation,
                "size of the mean": f"{np.linalg.norm(mean):.2f}",
                "sd over cells": f"{effects.std(axis=0).mean():.4f}",
                "sd of the response": f"{(effects @ mean / (mean @ mean)).std():.3f}",
            })  # fmt: skip
    print(markdown_of(pd.DataFrame(table)))


if __name__ == "__main__":
    main()
