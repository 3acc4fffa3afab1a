"""What trainings watched: whether the embedding holds cells apart, and whether the predictor uses the perturbation.

    python workflow_tests/benchmarks/embeddings_and_actions.py results renge2023 unseen_context --models jepa \
        jepa_off --figure monitors.png

Reads run.json of all seeds. Monitors are those of the last step: distances of measured group means to those predicted
with the right action, over those predicted with a wrong or the null action (below 1: the action is used), on training
and on validation perturbations. Separability is the balanced accuracy of a linear probe and of nearest neighbours on
training cells, in the embedding and in as many principal components. Means over seeds.
"""

import sys
from pathlib import Path

import numpy as np
import pandas as pd

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "workflow_tests/benchmarks"))

from leaderboard import markdown, parser_of_split, runs_of  # noqa: E402

SHOWN = (
    "effective_rank",
    "embedding_sd",
    "action_share",
    "action_effect",
    "distance_right_action",
    "distance_null_action",
)


def embedding_history(run: dict) -> list[dict]:
    """Return the rows of the stage that learned the embedding: A, or C where there was no A."""
    return run["facts"].get("stage_a", run["facts"]["stage_c"])["history"]


def monitors(run: dict) -> dict[str, float]:
    """Return what a run watched last, as numbers of the table."""
    last, of_embedding = run["history"][-1], embedding_history(run)[-1]
    row = {"effective rank": of_embedding["effective_rank"], "embedding sd": of_embedding["embedding_sd"]}
    for prefix, role in (("", "training"), ("validation_", "validation")):
        right, wrong, null = (
            last.get(f"{prefix}distance_{name}_action", np.nan) for name in ("right", "wrong", "null")
        )
        row |= {f"right / wrong, {role}": right / wrong, f"right / null, {role}": right / null}
    return {**row, "action effect": last["action_effect"], "seconds": run["seconds"], "peak, MB": run["peak_memory_mb"]}


def last_values(run: dict) -> dict[str, float]:
    """Return separability, column by column."""
    return {
        f"{column}, {classifier}, {space}": of[f"{key}_{classifier}"]
        for column, of in run["facts"].get("separability", {}).items()
        for classifier in ("linear", "knn")
        for space, key in (("embedding", "embedding"), ("PCA", "pca"))
    }


def plot(runs: dict[str, list[dict]], figure: Path) -> None:
    """Plot the curves of all models, a panel per quantity; seeds share a colour."""
    import matplotlib as mpl

    mpl.use("agg")
    import matplotlib.pyplot as plt

    drawing, panels = plt.subplots(2, 3, figsize=(10, 5), layout="constrained")
    for panel, name in zip(panels.flat, SHOWN, strict=True):
        for i, (model, of_seeds) in enumerate(runs.items()):
            for seed, run in enumerate(of_seeds):
                rows = run["history"] if name in run["history"][-1] else embedding_history(run)
                points = [(row["step"], row[name]) for row in rows if name in row]
                if points:
                    panel.plot(
                        *zip(*points, strict=True), color=f"C{i}", linewidth=1, label=model if seed == 0 else None
                    )
        panel.set_title(name.replace("_", " "), fontsize=9)
        panel.set_xlabel("step", fontsize=8)
        panel.tick_params(labelsize=8)
        panel.spines[["top", "right"]].set_visible(False)
    drawing.legend(
        *panels.flat[3].get_legend_handles_labels(),
        fontsize=8,
        frameon=False,
        ncols=len(runs),
        loc="outside lower center",
    )
    drawing.savefig(figure, dpi=110)


def main() -> None:
    """Print both tables."""
    parser = parser_of_split(__doc__, ["jepa", "jepa_off"])
    parser.add_argument("--figure", type=Path)
    arguments = parser.parse_args()
    runs = runs_of(arguments)
    for measured in (monitors, last_values):
        table = pd.DataFrame(
            {model: pd.DataFrame(map(measured, of_seeds)).mean() for model, of_seeds in runs.items()}
        ).T
        print(
            markdown(
                table.map(lambda value: "–" if np.isnan(value) else f"{value:.4g}"),
                list(table.columns),
                "model",
            )
            + "\n"
        )
    if arguments.figure:
        plot(runs, arguments.figure)


if __name__ == "__main__":
    main()
