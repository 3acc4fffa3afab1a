r"""Warranties of trained models, and how often a search finds what was done.

    python workflow_tests/benchmarks/warranties.py results renge2023/unseen_context carpool/unseen_combination \
        --models counterfactual scppdm_hybrid

The first table is read from warranty.json of all seeds. The second asks: given one half of the cells of a held-out
perturbation as the target, at which place among all perturbations of the screen does the model rank it? Asked of
perturbations of reproducible effect: the effects of the two halves correlate by more than 0.5, perturbed genes left
out. Place: (rank − 1) / (candidates − 1), 0 is best, 0.5 chance; its mean with the 95 % bootstrap interval over
perturbations, and the share in the best tenth with its exact 95 % interval.
"""

import argparse
import sys
from collections.abc import Callable
from functools import reduce
from operator import getitem
from pathlib import Path

import numpy as np
import pandas as pd

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "workflow_tests/benchmarks")]

from leaderboard import markdown_of  # noqa: E402
from perturbflow.counterfactuals.search import scores  # noqa: E402
from perturbflow.evaluation.bootstrap import estimate, share_interval  # noqa: E402
from perturbflow.genes.symbols import members_of  # noqa: E402
from perturbflow.io.artefacts import load_artefact  # noqa: E402
from perturbflow.io.files import read_json  # noqa: E402
from perturbflow.models.base import build  # noqa: E402
from perturbflow.pairs import Pairs  # noqa: E402

REPRODUCIBLE = 0.5
TENTH = 0.1


def interval(values: np.ndarray) -> str:
    """Return mean and 95 % interval."""
    found = estimate(values[None, None])
    return f"{found.mean[0]:.3f} ({found.low[0]:.3f}, {found.high[0]:.3f})"


def warranty_row(place: str, model: str, shown: list[dict]) -> dict[str, object]:
    """Return one row of the first table: means over seeds, intervals over perturbations."""

    def of(*keys: str) -> np.ndarray:
        return np.mean(
            [[reduce(getitem, keys, row) for row in content["perturbations"]] for content in shown], axis=0
        ).astype(float)

    def agreed(kind: str) -> str:
        return f"{interval(of('agreement', kind, 'model'))} of {np.nanmean(of('agreement', kind, 'ceiling')):.3f}"

    def mean_of(value: Callable[[dict], float]) -> str:
        return f"{np.mean([value(warranty) for warranty in shown]):.2f}"

    target = shown[0]["on_target"]
    return {
        "screen, split": place,
        "model": model,
        "seeds": len(shown),
        "held-out measurements": shown[0]["coverage"][0]["n_calibration"],
        "tested on": shown[0]["coverage"][0]["n_test"],
        "in 80 %": interval(of("coverage_80")),
        "in 90 %": interval(of("coverage_90")),
        "no change's": interval(of("coverage_of_floors_90", "no_change")),
        "width, no change = 1": mean_of(lambda c: c["coverage"][-1]["relative_width"]["no_change"]["mean"]),
        "agreement, whole": agreed("whole"),
        "the mean effect": interval(of("agreement", "whole", "perturbed_mean")),
        "agreement, specific": agreed("specific"),
        "verdict": "; ".join(dict.fromkeys(c["verdict"] for c in shown)),
        "placebo, % called at 5": " to ".join(
            f"{100 * np.mean([c['placebo'][key] for c in shown]):.1f}"
            for key in ("share_called_low", "share_called_high")
        ),
        "discoveries": f"{sum(c['placebo']['repeats_with_discoveries'] for c in shown)} of "
        f"{sum(c['placebo']['repeats'] for c in shown)}",
        "identity": f"{max(c['identity'] for c in shown):.1g}",
        "on target": f"{mean_of(lambda c: c['on_target']['same_sign'])} of {target['n']} "
        f"(halves {target['same_sign_of_halves']:.2f})"
        if target["n"]
        else "–",
    }


def places(folder: Path, pairs: Pairs) -> dict[str, float]:
    """Return the place of every held-out perturbation of reproducible effect in the search for its own cells."""
    run = read_json(folder / "run.json")
    model = build(run["implementation"], run["params"])
    model.restore(load_artefact(next(folder.glob("model.*"))))
    test = pairs.roles("test")
    start = test.X[np.flatnonzero(test.is_control)[:300]].toarray()
    candidates = [label for label in pairs.perturbations if model.refusal(label) is None]
    effects = np.stack([model.individual_effects(start, label, 0).mean(axis=0) for label in candidates])
    is_target = np.stack([np.isin(pairs.genes, members_of(label)) for label in candidates])
    half = test.obs["half"].astype(str).to_numpy()
    found = {}
    for label in test.perturbations:
        rows = test.cells_of(label)
        a, b = (
            test.mean_of(rows[half[rows] == name]) - test.control_mean_for(rows[half[rows] == name])
            for name in ("a", "b")
        )
        kept = ~np.isin(pairs.genes, members_of(label))
        if label not in candidates or np.corrcoef(a[kept], b[kept])[0, 1] <= REPRODUCIBLE:
            continue
        score = scores(effects, b[None], is_target)[0]
        own = score[candidates.index(label)]
        found[label] = ((score > own).sum() + 0.5 * ((score == own).sum() - 1)) / (len(candidates) - 1)
    return found


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("places", nargs="+", help="DATASET/SPLIT")
    parser.add_argument("--models", nargs="+", default=["counterfactual", "scppdm_hybrid"])
    parser.add_argument("--search", nargs="*", help="of which models searches are asked; all, if not given")
    arguments = parser.parse_args()
    warranties, searches = [], []
    for place in arguments.places:
        pairs = Pairs.read(arguments.results / place / "pairs.h5ad")
        for model in arguments.models:
            folders = sorted((arguments.results / place / model).glob("seed_*"))
            shown = [read_json(folder / "warranty.json") for folder in folders if (folder / "warranty.json").is_file()]
            if not shown:
                sys.exit(
                    f"{arguments.results / place / model} holds no seed_*/warranty.json: run the target "
                    "`counterfactuals` with this model first."
                )
            warranties.append(warranty_row(place, model, shown))
            if arguments.search is not None and model not in arguments.search:
                continue
            of_seeds = pd.DataFrame([places(folder, pairs) for folder in folders]).mean()
            if of_seeds.empty:
                searches.append({"screen, split": place, "model": model, "perturbations": 0})
                continue
            share = np.array([(of_seeds <= TENTH).mean()])
            low, high = share_interval(share, np.array([len(of_seeds)]))
            searches.append(
                {
                    "screen, split": place,
                    "model": model,
                    "perturbations": len(of_seeds),
                    "candidates": len(pairs.perturbations),
                    "mean place": interval(of_seeds.to_numpy()),
                    "in the best tenth": f"{share[0]:.2f} ({low[0]:.2f}, {high[0]:.2f})",
                }
            )
    print(markdown_of(pd.DataFrame(warranties)), "\n")
    if searches:
        print(markdown_of(pd.DataFrame(searches)))


if __name__ == "__main__":
    main()
