"""Hold models against the best closed form, metric by metric: paired differences over perturbations and seeds.

    python workflow_tests/benchmarks/best_baseline.py results carpool unseen_combination --models scppdm scppdm_hybrid

Reads the metrics.tsv of all models of one split. The best baseline of a metric is the closed form of least mean loss on
the same held-out perturbations, so chosen with hindsight: a model that is level with it is level with the luckiest of
thirteen. Above zero is better than it, whatever the metric's direction; better, level or worse by whether the 95 %
interval holds zero. --baseline NAME holds against one instead, seed by seed where that one has them too, as an ablation
does.
"""

import sys
from pathlib import Path

import numpy as np
import pandas as pd

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))
sys.path.insert(0, str(ROOT / "workflow_tests/benchmarks"))

from leaderboard import markdown, parser_of_split  # noqa: E402
from perturbflow.evaluation import METRICS  # noqa: E402
from perturbflow.evaluation.bootstrap import estimate  # noqa: E402
from perturbflow.io.files import read_json  # noqa: E402
from perturbflow.registry.families import FAMILIES  # noqa: E402

FOUR = ("l2_heg1000", "pearson_delta_ctrl", "pearson_delta_pert", "pds_cosine")
WORDS = {1: "better", 0: "level", -1: "worse"}


def losses(folder: Path, metric: str) -> pd.DataFrame:
    """Return the loss of a model per seed × perturbation."""
    rows = []
    for file in sorted(folder.glob("seed_*/metrics.tsv")):
        table = pd.read_csv(file, sep="\t", keep_default_na=False, na_values=[""], dtype={"perturbation": str})
        values = table[table["metric"] == metric].set_index("perturbation")["value"]
        rows.append(pd.Series(METRICS[metric].loss(values.to_numpy(float)), index=values.index, name=file.parent.name))
    if not rows:
        sys.exit(f"{folder} holds no seed_*/metrics.tsv: run the workflow with this model first.")
    return pd.DataFrame(rows)


def is_baseline(folder: Path) -> bool:
    """Return whether a model is a closed form that others have to beat."""
    implementation = read_json(next(folder.glob("seed_*/run.json")))["implementation"]
    return any(family.implementation == implementation and family.kind == "baseline" for family in FAMILIES.values())


def value(loss: float, metric: str) -> float:
    """Return the value that a mean loss is of."""
    return METRICS[metric].perfect + loss * (-1 if METRICS[metric].direction == "higher" else 1)


def main() -> None:
    """Print one row per metric and model."""
    parser = parser_of_split(__doc__, ["scppdm", "scppdm_hybrid"])
    parser.add_argument("--metrics", nargs="+", default=list(FOUR))
    parser.add_argument("--baseline")
    arguments = parser.parse_args()
    folder = arguments.results / arguments.dataset / arguments.split
    trained = sorted(path.parent.parent for path in folder.glob("*/seed_0/metrics.tsv"))
    baselines = [arguments.baseline] if arguments.baseline else [path.name for path in trained if is_baseline(path)]
    rows = {}
    for metric in arguments.metrics:
        of_baselines = {name: losses(folder / name, metric) for name in baselines}
        best = min(of_baselines, key=lambda name: of_baselines[name].loc["seed_0"].mean())
        of_seeds = of_baselines[best]
        reference = of_seeds.loc["seed_0"]
        row = [f"{best} {value(of_seeds.mean().mean() if arguments.baseline else reference.mean(), metric):.3f}"]
        for model in arguments.models:
            own = losses(folder / model, metric)[reference.index]
            against = of_seeds.loc[own.index] if set(own.index) <= set(of_seeds.index) else reference
            gain = estimate((against.to_numpy().reshape(-1, len(reference)) - own.to_numpy())[None])
            row.append(
                f"{value(own.mean().mean(), metric):.3f}: {gain.mean[0]:+.3f} "
                f"({gain.low[0]:+.3f}, {gain.high[0]:+.3f}) {WORDS[int(gain.sign[0])]}"
            )
        rows[metric] = row
    n_seeds = max(len(losses(folder / model, arguments.metrics[0])) for model in arguments.models)
    print(
        f"**{arguments.dataset}, {arguments.split}**: {len(np.unique(reference.index))} held-out perturbations, "
        f"{n_seeds} seed(s)\n"
    )
    heads = [f"{'baseline' if arguments.baseline else 'best baseline'}", *arguments.models]
    print(markdown(pd.DataFrame.from_dict(rows, orient="index"), heads, "metric") + "\n")


if __name__ == "__main__":
    main()
