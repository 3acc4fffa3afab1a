r"""Distances of a model's cells, and of controls moved by its mean effect, to the measured cells.

They show whether a predicted population of cells is more than controls moved by the mean.

    python workflow_tests/benchmarks/distributions.py results renge2023 unseen_context --models scppdm scppdm_hybrid \
        [--figure cells.png]

After a run that holds technical_duplicate and these models. Per metric: the model's cells, the same controls moved by
the mean change that the model predicts (clipped at zero as every prediction is), the technical duplicate, the paired
difference in loss between the first two with its 95 % interval over perturbations and seeds (above zero: the model's
cells are better), and how much of the way from moved controls to the duplicate the model goes.

Most of a distance is of the mean where that is hard to predict. --mean-given takes it out: closed forms, and models
with a closed-form mean, are asked again with the mean that the duplicate (half a of the measured cells) has, so that
all three know the same mean and what is left is the spread. With --together: one table, a row per model and its moved
controls, with differential expression beside the distances; with --over MODEL besides, the share of the way from that
model's moved controls to the duplicate, and paired differences from that model. With --figure: predicted, moved and
measured cells of the three held-out perturbations of greatest effect, on the two leading components of measured cells.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import anndata as ad
import numpy as np
import pandas as pd
from scipy import sparse

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))
sys.path.insert(0, str(ROOT / "workflow_tests/benchmarks"))

from leaderboard import markdown, parser_of_split  # noqa: E402
from perturbflow.evaluation import METRICS, Scored, score_inputs  # noqa: E402
from perturbflow.evaluation.bootstrap import estimate  # noqa: E402
from perturbflow.io.artefacts import load_artefact  # noqa: E402
from perturbflow.io.files import read_json  # noqa: E402
from perturbflow.models.base import build  # noqa: E402
from perturbflow.models.closed_form.base import ClosedForm  # noqa: E402
from perturbflow.pairs import Pairs  # noqa: E402
from perturbflow.predict import nonnegative  # noqa: E402

PLAIN = ("energy_distance", "mmd", "variance_ratio", "quantile_coverage", "sinkhorn_w2")
TOGETHER = ("energy_distance", "mmd", "variance_ratio", "auprc", "quantile_coverage")
NEEDS = frozenset({"cells", "pseudobulk"})
N_DRAWN = 3


def moved_controls(predictions: ad.AnnData, cells: Pairs) -> ad.AnnData:
    """Return the cells that the predictions started from, moved by the mean change of their perturbation."""
    start = cells.X[predictions.obs["control_index"].to_numpy()]
    moved = sparse.lil_matrix(start.shape, dtype=np.float32)
    for rows in predictions.obs.groupby("perturbation", observed=True).indices.values():
        before, after = start[rows].toarray(), predictions.X[rows].toarray()
        moved[rows] = nonnegative(before + (after.mean(axis=0) - before.mean(axis=0)))
    copy = ad.AnnData(X=moved.tocsr(), obs=predictions.obs, var=predictions.var)
    copy.uns["perturbflow"] = predictions.uns["perturbflow"]
    return copy


def losses(scored: Scored, metrics: Sequence[str] = PLAIN) -> dict[str, np.ndarray]:
    """Return value and loss of every metric, (2, perturbations)."""
    values = {name: METRICS[name].function(scored) for name in metrics}
    return {name: np.stack([value, METRICS[name].loss(value)]) for name, value in values.items()}


class MeasuredMean:
    """The mean effects of the duplicate's cells, in place of a model's own."""

    looks_at_contexts = False
    out_of_fold: ClassVar[dict[str, np.ndarray]] = {}

    def __init__(self, cells: Pairs) -> None:
        self._cells = cells.select(
            ((cells.obs["half"] == "a") & (cells.obs["role"] == "test")).to_numpy() | cells.is_control
        ).roles("test")

    def effect_in(self, perturbation: str, context: object = None, _: object = None) -> np.ndarray:
        """Return the measured mean effect, (genes,), whatever the model."""
        return self._cells.effect_of(perturbation)


def with_measured_mean(predictions: ad.AnnData, cells: Pairs, folder: Path) -> ad.AnnData:
    """Return what a model with a closed-form mean predicts from the same controls given the measured mean."""
    run = read_json(folder / "run.json")
    model = build(run["implementation"], run["params"])
    model.restore(load_artefact(next(folder.glob("model.*"))))
    if isinstance(model, ClosedForm):
        model.effect_in = MeasuredMean(cells).effect_in
    else:
        model.mean = MeasuredMean(cells)
    X = sparse.lil_matrix(predictions.shape, dtype=np.float32)
    for label, rows in predictions.obs.groupby("perturbation", observed=True).indices.items():
        start = cells.X[predictions.obs["control_index"].to_numpy()[rows]].toarray()
        X[rows] = nonnegative(model.predict(start, [label], len(rows), run["seed"])[0])
    copy = ad.AnnData(X=X.tocsr(), obs=predictions.obs, var=predictions.var)
    copy.uns["perturbflow"] = predictions.uns["perturbflow"]
    return copy


def table(of: dict[str, dict[str, np.ndarray]]) -> str:
    """Return one row per metric from values and losses, each (seeds, 2, perturbations).

    They are of the model, the moved controls and the duplicate.
    """
    rows = {}
    for metric in of["model"]:
        model, moved, duplicate = (np.asarray(of[name][metric]) for name in ("model", "moved", "duplicate"))
        gain = estimate((moved[:, 1] - model[:, 1])[None])
        mean_loss = [np.nanmean(side[:, 1]) for side in (model, moved, duplicate)]
        way = (mean_loss[1] - mean_loss[0]) / (mean_loss[1] - mean_loss[2]) if mean_loss[1] > mean_loss[2] else np.nan
        values = [f"{np.nanmean(side[:, 0]):.4f}" for side in (model, moved, duplicate)]
        rows[metric] = [
            *values,
            f"{gain.mean[0]:+.4f} ({gain.low[0]:+.4f}, {gain.high[0]:+.4f})",
            "–" if np.isnan(way) else f"{way:.0%}",
        ]
    heads = ["model", "moved controls", "technical duplicate", "gain over moved (95 %)", "of the way"]
    return markdown(pd.DataFrame.from_dict(rows, orient="index"), heads, "metric")


def together(of: dict[str, list[Scored]], over: str | None) -> str:
    """Return one row per model and one column per metric: the mean over perturbations and seeds.

    Parameters
    ----------
    over
        A model. With it, brackets hold the way that a model goes from this one's moved controls to the duplicate, and a
        second table holds paired differences in loss from this one (above zero: the model's cells are better).
    """
    lost = {
        name: {metric: np.stack([losses(one, [metric])[metric] for one in scored]) for metric in TOGETHER}
        for name, scored in of.items()
    }
    rows = {name: [f"{np.nanmean(found[metric][:, 0]):.3f}" for metric in TOGETHER] for name, found in lost.items()}
    if over is None:
        return markdown(pd.DataFrame.from_dict(rows, orient="index"), list(TOGETHER))
    moved, duplicate = lost[f"controls moved by {over}"], lost["technical duplicate"]
    models = [name for name in of if not name.startswith("controls moved by") and name != "technical duplicate"]
    for name in models:
        for k, metric in enumerate(TOGETHER):
            start, end, own = (np.nanmean(one[metric][:, 1]) for one in (moved, duplicate, lost[name]))
            rows[name][k] += f" ({(start - own) / (start - end):.0%})" if start > end else ""
    gains = {
        name: [
            f"{gain.mean[0]:+.4f} ({gain.low[0]:+.4f}, {gain.high[0]:+.4f})"
            for metric in TOGETHER
            for gain in [estimate((lost[over][metric][:, 1] - lost[name][metric][:, 1])[None])]
        ]
        for name in models
        if name != over
    }
    tables = (pd.DataFrame.from_dict(table, orient="index") for table in (rows, gains))
    return f"\nGain over {over} (95 %)\n\n".join(markdown(table, list(TOGETHER)) for table in tables)


def figure(scored: dict[str, Scored], path: Path) -> None:
    """Plot measured cells and, beside them, predicted and moved ones of the perturbations of greatest effect."""
    from matplotlib.figure import Figure

    first = next(iter(scored.values()))
    chosen = np.argsort(-first.effect_size)[:N_DRAWN]
    canvas = Figure(figsize=(3.2 * len(scored), 3.0 * N_DRAWN), layout="constrained")
    axes = canvas.subplots(N_DRAWN, len(scored), squeeze=False)
    for row, i in enumerate(chosen):
        measured = first.measured_components[i]
        centre = measured.mean(axis=0)
        directions = np.linalg.svd(measured - centre, full_matrices=False)[2][:2].T
        for axis, (name, comparison) in zip(axes[row], scored.items(), strict=True):
            for cells, label, colour in (
                (measured, "measured", "#8C8C8C"),
                (comparison.predicted_components[i], "predicted", "#D55E00"),
            ):
                axis.scatter(*((cells - centre) @ directions).T, s=6, alpha=0.6, c=colour, label=label, linewidths=0)
            axis.set_title(f"{first.labels[i]}\n{name}", fontsize=8)
        limits = [
            f(getattr(axis, f"get_{side}lim")()[k] for axis in axes[row])
            for side in "xy"
            for k, f in ((0, min), (1, max))
        ]
        for axis in axes[row]:
            axis.set(xlim=limits[:2], ylim=limits[2:], xlabel="component 1", ylabel="component 2")
    axes[0][0].legend(frameon=False, fontsize=8)
    canvas.savefig(path, dpi=100)


def main() -> None:
    """Print one table per model."""
    parser = parser_of_split(__doc__, ["scppdm", "scppdm_hybrid"])
    parser.add_argument("--mean-given", action="store_true")
    parser.add_argument("--together", action="store_true")
    parser.add_argument("--over", metavar="MODEL", default=None)
    parser.add_argument("--figure", type=Path, default=None)
    arguments = parser.parse_args()
    folder = arguments.results / arguments.dataset / arguments.split
    cells = Pairs.read(folder / "pairs.h5ad")

    def compared(predictions: list[ad.AnnData]) -> list[Scored]:
        return [score_inputs(one, cells, NEEDS | {"de"} if arguments.together else NEEDS) for one in predictions]

    def read(model: str) -> list[ad.AnnData]:
        files = sorted((folder / model).glob("seed_*/predictions.h5ad"))
        found = [ad.read_h5ad(file) for file in files]
        if arguments.mean_given and model != "technical_duplicate":
            found = [with_measured_mean(one, cells, file.parent) for one, file in zip(found, files, strict=True)]
        return found

    def stacked(comparisons: list[Scored]) -> dict[str, np.ndarray]:
        found = [losses(scored) for scored in comparisons]
        return {metric: np.stack([of[metric] for of in found]) for metric in found[0]}

    given = ", the mean given" if arguments.mean_given else ""
    if arguments.together:
        found = {}
        for model in arguments.models:
            predictions = read(model)
            found |= {
                model: compared(predictions),
                f"controls moved by {model}": compared([moved_controls(one, cells) for one in predictions]),
            }
        found["technical duplicate"] = compared(read("technical_duplicate")[:1])
        n = len(found["technical duplicate"][0].labels)
        print(
            f"**{arguments.dataset}, {arguments.split}{given}**: {n} held-out perturbations\n\n"
            f"{together(found, arguments.over)}\n"
        )
        return

    duplicate = stacked(compared(read("technical_duplicate")[:1]))
    plotted: dict[str, Scored] = {}
    for model in arguments.models:
        predictions = read(model)
        own, moved = compared(predictions), compared([moved_controls(one, cells) for one in predictions])
        of = {"model": stacked(own), "moved": stacked(moved)}
        of["duplicate"] = {metric: np.repeat(value, len(own), axis=0) for metric, value in duplicate.items()}
        plotted |= {model: own[0], f"controls moved by {model}": moved[0]}
        head = (
            f"**{arguments.dataset}, {arguments.split}, {model}{given}**: {len(own[0].labels)} held-out perturbations, "
            f"{len(own)} seed(s)"
        )
        print(f"{head}\n\n{table(of)}\n")
    if arguments.figure:
        figure(plotted, arguments.figure)


if __name__ == "__main__":
    main()
