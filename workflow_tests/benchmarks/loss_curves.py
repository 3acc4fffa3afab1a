r"""Losses of trainings: where they began and ended, and whether those of validation perturbations went along.

    python workflow_tests/benchmarks/loss_curves.py results carpool unseen_combination --models scppdm scppdm_hybrid \
        jepa --figure loss_curves.png

Reads run.json of all seeds: means over seeds of the first and last logged loss, of the least loss of validation
perturbations, and of the step that had it.
"""

import sys
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "workflow_tests/benchmarks"))

from leaderboard import markdown, parser_of_split, runs_of  # noqa: E402

ROLES = {"training": ("loss", "-"), "validation": ("validation_loss", "--")}


def ends(run: dict) -> dict[str, float]:
    """Return a run's losses, as numbers of the table; of validation where the split has such perturbations."""
    if not run["history"]:
        sys.exit(f"{run['implementation']} has no losses: it is no network.")
    history = pd.DataFrame(run["history"]).set_index("step")
    row = {}
    for role, (name, _) in ROLES.items():
        if name in history:
            row |= {f"first, {role}": history[name].iloc[0], f"last, {role}": history[name].iloc[-1]}
    if "validation_loss" in history:
        row |= {"least, validation": history["validation_loss"].min(), "at step": history["validation_loss"].idxmin()}
    return {**row, "steps": history.index[-1]}


def plot(runs: dict[str, list[dict]], figure: Path) -> None:
    """Plot a panel per model; one line per seed and role."""
    import matplotlib as mpl

    mpl.use("agg")
    import matplotlib.pyplot as plt

    drawing, panels = plt.subplots(1, len(runs), figsize=(3.4 * len(runs), 2.8), layout="constrained", squeeze=False)
    for panel, (model, of_seeds) in zip(panels.flat, runs.items(), strict=True):
        for seed, run in enumerate(of_seeds):
            for role, (name, dashes) in ROLES.items():
                points = [(row["step"], row[name]) for row in run["history"] if name in row]
                if points:
                    colour = "C0" if role == "training" else "0.3"
                    panel.plot(
                        *zip(*points, strict=True), dashes, color=colour, linewidth=1, label=role if seed == 0 else None
                    )
        panel.set_title(f"{model}, {len(of_seeds)} seed(s)", fontsize=9)
        panel.set_xlabel("step", fontsize=8)
        panel.set_ylabel("loss", fontsize=8)
        panel.tick_params(labelsize=8)
        panel.spines[["top", "right"]].set_visible(False)
    panels.flat[0].legend(fontsize=8, frameon=False)
    drawing.savefig(figure, dpi=110)


def main() -> None:
    """Print the table."""
    parser = parser_of_split(__doc__, ["scppdm", "scppdm_hybrid"])
    parser.add_argument("--figure", type=Path)
    arguments = parser.parse_args()
    runs = runs_of(arguments)
    table = pd.DataFrame({model: pd.DataFrame(map(ends, of_seeds)).mean() for model, of_seeds in runs.items()}).T
    print(markdown(table.map(lambda value: f"{value:,.0f}" if value >= 100 else f"{value:.4g}"), list(table.columns)))
    if arguments.figure:
        plot(runs, arguments.figure)


if __name__ == "__main__":
    main()
