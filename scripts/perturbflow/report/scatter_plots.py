"""Predicted against measured effects: a scatter plot per perturbation and model, best and worst perturbations first."""

from dataclasses import dataclass, replace
from pathlib import Path

import anndata as ad
import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from perturbflow.evaluation import Scored, score_inputs
from perturbflow.genes.symbols import entities_of
from perturbflow.pairs import Pairs
from perturbflow.report.cards import ModelCard
from perturbflow.report.plotting import INK, STYLE, NamedPoints, Plots, new_axes, number

# Bounds of this section, besides its bytes of figures.
LEARNED_MODELS_OF_EFFECTS = 5
LABELLED_GENES = 5
MOST_OTHERS = 60  # perturbations besides the best and worst: more fit on no page
VECTOR_POINTS = 400  # more points than this are plotted as pixels: they would be most of the page


@dataclass(frozen=True)
class Chosen:
    """Which perturbations and models the scatter plots of one dataset × split show."""

    reference: str
    perturbations: dict[str, str]  # → best or worst, or nothing
    models: list[str]
    n_models_left_out: int
    others: list[str]  # perturbations: all, or a sample of MOST_OTHERS
    n_others_left_out: int

    def rest(self) -> "Chosen":
        """Return the other perturbations, of the best learned model and the best baseline."""
        return replace(
            self,
            perturbations=dict.fromkeys(self.others, ""),
            models=list(dict.fromkeys([self.models[0], self.models[-1]])),
            others=[],
            n_others_left_out=0,
        )


def choose(correlations: pd.DataFrame, cards: dict[str, ModelCard]) -> Chosen | None:
    """Choose the two best and two worst perturbations of the model with the best mean correlation.

    Parameters
    ----------
    correlations
        Rows of metrics.tsv of one dataset × split and of `sections.CORRELATION`.

    Returns
    -------
    None where there is no model but ceilings, or none with a score.
    """
    table = correlations.groupby(["model", "perturbation"])["value"].mean().unstack("model")
    means = table.mean().dropna()
    means = means[[cards[model].kind != "ceiling" for model in means.index]].sort_values(ascending=False, kind="stable")
    if means.empty:
        return None
    learned = [model for model in means.index if cards[model].kind == "learned"]
    baseline = [model for model in means.index if cards[model].kind == "baseline"][:1]
    reference = means.index[0]
    ranked = list(table[reference].dropna().sort_values(ascending=False, kind="stable").index)
    n_best = min(2, (len(ranked) + 1) // 2)
    n_worst = min(2, len(ranked) - n_best)
    perturbations = dict.fromkeys(ranked[:n_best], "best") | dict.fromkeys(ranked[len(ranked) - n_worst :], "worst")
    shown = learned[:LEARNED_MODELS_OF_EFFECTS]
    others = sorted(set(ranked) - set(perturbations))
    drawn = np.sort(np.random.default_rng(0).permutation(len(others))[:MOST_OTHERS])
    return Chosen(
        reference,
        perturbations,
        [*shown, *baseline],
        len(learned) - len(shown),
        [others[i] for i in drawn],
        len(others) - len(drawn),
    )


def scored_of(chosen: Chosen, pairs: Path, predictions: dict[str, Path]) -> dict[str, Scored]:
    """Return means of predicted and measured cells of the chosen perturbations and others, by model.

    No other cells are read but the controls of the scored role.

    Parameters
    ----------
    predictions
        Model → predictions.h5ad of the seed that is shown.
    """
    labels = [*chosen.perturbations, *chosen.others]
    cells = Pairs.open(pairs)
    of_role: dict[str, Pairs] = {}
    found: dict[str, Scored] = {}
    for model in chosen.models:
        predicted = ad.read_h5ad(predictions[model], backed="r")
        role = str(predicted.uns.get("perturbflow", {}).get("role", "test"))
        if role not in of_role:
            is_shown = (cells.obs["role"] == role).to_numpy() & (cells.is_control | np.isin(cells.labels, labels))
            some = cells.select(is_shown)
            of_role[role] = replace(some, X=some.X[:])
        some = of_role[role]
        predicted = predicted[predicted.obs["perturbation"].isin(labels).to_numpy()].to_memory()
        if "control_index" in predicted.obs:
            predicted.obs["control_index"] = np.searchsorted(some.rows, predicted.obs["control_index"])
        if predicted.n_obs:  # a model may have refused all of them
            found[model] = score_inputs(predicted, some, frozenset({"pseudobulk"}))
    return found


def _label_points(axes: Axes, x: np.ndarray, y: np.ndarray, names: list[str], labelled: list[int]) -> None:
    """Write names beside their points where they cover the fewest others; one that finds no free place is left out."""
    scale = axes.figure.dpi / 72
    box = axes.get_window_extent()
    points = axes.transData.transform(np.column_stack([x, y]))
    taken: list[tuple[float, float, float, float]] = []
    for i in labelled:
        width, height = 4.5 * scale * len(names[i]), 8 * scale
        places: list[tuple[int, int, tuple[float, float, float, float]]] = []
        for dx, dy in ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1)):
            left = points[i, 0] + dx * 5 * scale - width * (1 - dx) / 2
            low = points[i, 1] + dy * 7 * scale - height / 2
            place = (left, low, left + width, low + height)
            is_inside = place[0] >= box.x0 and place[2] <= box.x1 and place[1] >= box.y0 and place[3] <= box.y1
            if is_inside and all(
                place[2] < o[0] or place[0] > o[2] or place[3] < o[1] or place[1] > o[3] for o in taken
            ):
                covered = ((points > place[:2]) & (points < place[2:])).all(axis=1).sum()
                places.append((int(covered), len(places), place))
        if places:
            left, low, right, high = min(places)[2]
            taken.append((left, low, right, high))
            centre = axes.transData.inverted().transform(((left + right) / 2, (low + high) / 2))
            axes.text(centre[0], centre[1], names[i], ha="center", va="center", fontsize=7)


@mpl.rc_context(STYLE)
def _effect_figure(
    measured: np.ndarray, predicted: np.ndarray, genes: list[str], targets: list[str], limit: float, card: ModelCard
) -> Figure:
    figure, axes = new_axes(2.6, 2.6, left=0.55, bottom=0.45)
    axes.set_xlim(-limit, limit)
    axes.set_ylim(-limit, limit)
    for line in (axes.axhline, axes.axvline):
        line(0, color="#888888", alpha=0.5, linewidth=0.5)
    axes.plot([-limit, limit], [-limit, limit], color="#888888", linewidth=0.8, linestyle="--")
    is_target = np.isin(genes, targets)
    is_vector = len(genes) <= VECTOR_POINTS
    axes.add_line(
        NamedPoints(
            measured[~is_target],
            predicted[~is_target],
            [gene for gene, is_one in zip(genes, is_target, strict=True) if not is_one],
            marker=card.marker,
            color=card.colour,
            alpha=0.6,
            markersize=3 if is_vector else 2,
            markeredgewidth=0,
            rasterized=not is_vector,
        )
    )
    # A gene that was switched off lies far beyond the others. It is plotted at the edge, in its direction, with its
    # place in words.
    edge = 0.96 * limit
    reach = np.maximum(np.abs(measured), np.abs(predicted))
    is_beyond = is_target & (reach > edge)
    shrink = np.where(is_beyond, edge / np.maximum(reach, edge), 1)
    names = [
        f"{gene} ({x:.2g}, {y:.2g})" if far else gene
        for gene, x, y, far in zip(genes, measured, predicted, is_beyond, strict=True)
    ]
    measured, predicted = measured * shrink, predicted * shrink
    axes.plot(measured[is_target], predicted[is_target], "*", color=INK, markersize=9, markeredgewidth=0)
    strongest = [i for i in np.argsort(-np.abs(measured), kind="stable") if not is_target[i]][:LABELLED_GENES]
    labelled = [*np.flatnonzero(is_target), *strongest]
    _label_points(axes, measured, predicted, names, labelled)
    axes.locator_params(nbins=5)
    axes.set_xlabel("measured effect")
    axes.set_ylabel("predicted effect")
    return figure


Effects = tuple[np.ndarray, np.ndarray, list[str]]  # measured, predicted, and their genes


def _effects_of(label: str, inputs: Scored, genes: np.ndarray) -> Effects:
    """Return measured and predicted effects of a perturbation on the highly expressed and the perturbed genes."""
    row = inputs.labels.index(label)
    mask = inputs.highly_expressed | np.isin(genes, entities_of(label))
    control = inputs.control[row]
    return (inputs.measured[row] - control)[mask], (inputs.predicted[row] - control)[mask], genes[mask].tolist()


def _limit(effects: list[Effects], targets: list[str]) -> float:
    """Return the scale of a perturbation's panels: the same for all models, so that they can be compared by eye."""
    largest = [np.abs(values[~np.isin(names, targets)]).max(initial=0) for *both, names in effects for values in both]
    return 1.12 * max(largest, default=1) or 1


def effect_figures(
    chosen: Chosen,
    scored: dict[str, Scored],
    genes: list[str],
    correlations: dict[tuple, float],
    cards: dict[str, ModelCard],
    plots: Plots,
) -> list[dict]:
    """Return scatter plots of predicted against measured effects, one list of panels per perturbation.

    Parameters
    ----------
    scored
        As `scored_of` returns it.
    genes
        Measured genes.
    correlations
        (model, perturbation) → `sections.CORRELATION` of that seed, from metrics.tsv.
    """
    shown = []
    for label, why in chosen.perturbations.items():
        targets = entities_of(label)
        # A model may have refused the perturbation.
        effects = {
            model: _effects_of(label, scored[model], np.array(genes))
            for model in chosen.models
            if model in scored and label in scored[model].labels
        }
        limit = _limit(list(effects.values()), targets)
        panels = []
        for model, (measured, predicted, names) in effects.items():
            r = correlations.get((model, label), float("nan"))
            alt = (
                f"Scatter plot of predicted against measured effects of {label} by {model}, {len(names)} genes, "
                f"r {number(r)} without perturbed genes. "
                f"Perturbed genes shown: {', '.join(gene for gene in targets if gene in names) or 'none'}."
            )
            svg = plots.svg(alt, _effect_figure, measured, predicted, names, targets, limit, cards[model])
            if svg:
                panels.append({"svg": svg, "model": model, "r": r})
        if panels:
            missing = [gene for gene in targets if gene not in genes]
            shown.append({"label": label, "why": why, "panels": panels, "missing": missing})
    return shown
