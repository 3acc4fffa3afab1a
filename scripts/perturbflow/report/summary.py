"""The answer first: one picture per dataset × split, of models between no change and the ceiling, and its sentence."""

from __future__ import annotations

from dataclasses import dataclass

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from perturbflow.benchmark.tables import BETTER, LEVEL, WORSE
from perturbflow.benchmark.verdicts import TRADES
from perturbflow.evaluation import METRICS
from perturbflow.report.boards import Board, Titled
from perturbflow.report.cards import ModelCard
from perturbflow.report.leaderboard import Score
from perturbflow.report.plotting import INK, STYLE, Plots, name_rows, new_axes, number, room_for

MOST_PANELS = 4
MOST_LEARNED = 8
MOST_BASELINES = 4
LOWEST, HIGHEST = -0.6, 1.4  # of the scale: what lies beyond stands at its edge

# How a sentence names each verdict on learned models; without one, they cannot be told apart from the best baseline.
SAID = {
    BETTER: "better than the best baseline",
    TRADES: "better by one metric and worse by another",
    LEVEL: "level with the best baseline",
    WORSE: "worse than the best baseline",
}


@dataclass(frozen=True)
class Summary(Titled):
    """One dataset × split in a sentence and a picture: a panel per headline metric that distinguishes."""

    dataset: str
    split: str
    generalization: str
    sentence: str
    panels: list[dict]


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def sentence(board: Board) -> str:
    """Return in a sentence whether a learned model is better than the best baseline."""
    if board.verdicts.cannot_rank:
        n_telling, n = len(_telling(board)), len(board.leaderboard.headlines)
        return (
            f"These data cannot rank models: {n_telling} of {n} headline metrics tell good from bad, with "
            f"{board.leaderboard.n_perturbations:,} held-out perturbations."
        )
    best = _listed(list(board.leaderboard.best_baselines) or ["none"])
    if not board.verdicts.learned:
        return f"No learned model was run. The best baseline is {best}."
    of_verdict: dict[str, list[str]] = {}
    for row in board.verdicts.learned:
        of_verdict.setdefault(row["verdict"], []).append(row["model"])
    parts = [
        f"{_listed(of_verdict[verdict])} {'is' if len(of_verdict[verdict]) == 1 else 'are'} {words}"
        for verdict, words in SAID.items()
        if verdict in of_verdict
    ]
    if undecided := [name for verdict, names in of_verdict.items() if verdict not in SAID for name in names]:
        parts.append(f"{_listed(undecided)} cannot be told apart from the best baseline")
    start = "" if BETTER in of_verdict else "No learned model is better than the best baseline: "
    plural = "baselines by metric are" if len(board.leaderboard.best_baselines) > 1 else "baseline is"
    return f"{start}{'; '.join(parts)}. The best {plural} {best}."


def _telling(board: Board) -> list[str]:
    """Return the headline metrics that distinguish."""
    return [metric for metric in board.leaderboard.headlines if metric not in board.calibration.uninformative]


def _shown(board: Board, cards: dict[str, ModelCard]) -> list[str]:
    """Return the models of the picture: learned ones, the closed form to beat, and the best baselines."""
    models = board.leaderboard.models
    learned = [model for model in models if cards[model].kind == "learned"][:MOST_LEARNED]
    to_beat = [model for model in models if cards[model].is_to_beat]
    best = list(board.leaderboard.best_baselines)[:MOST_BASELINES]
    return list(dict.fromkeys([*learned, *to_beat, *best]))


@mpl.rc_context(STYLE)
def _panel_figure(models: dict[str, Score], best: str | None, equal: float, cards: dict[str, ModelCard]) -> Figure:
    """Draw one metric: a row per model, from no change to the ceiling."""
    figure, axes = new_axes(3.6, 0.75 + 0.24 * len(models), left=room_for(models), top=0.17)
    axes.set_xlim(_limits(list(models.values())))
    if best in models:
        middle = models[best].scaled
        axes.axvspan(middle - equal, middle + equal, color=cards[best].colour, alpha=0.25, linewidth=0)
    for x, name in ((0, "no change"), (1, "ceiling")):
        axes.axvline(x, color=INK, linewidth=1, linestyle="--" if x else "-")
        above = axes.get_xaxis_transform()
        axes.text(x, 1.02, name, transform=above, ha="center", va="bottom", fontsize=7)
    low, high = axes.get_xlim()
    for y, (model, score) in enumerate(models.items()):
        card = cards[model]
        is_beyond = not low <= score.scaled <= high
        if np.isfinite([score.scaled_low, score.scaled_high]).all():
            ends = np.clip([score.scaled_low, score.scaled_high], low, high)
            axes.plot(ends, [y, y], color=card.colour, linewidth=4, alpha=0.35, solid_capstyle="butt")
            for end, is_cut, arrow in ((low, score.scaled_low < low, "<"), (high, score.scaled_high > high, ">")):
                if is_cut and not is_beyond:
                    axes.plot(end, y, arrow, color=card.colour, markersize=4, alpha=0.6, clip_on=False)
        marker = ("<" if score.scaled < low else ">") if is_beyond else card.marker
        axes.plot(np.clip(score.scaled, low, high), y, marker, color=card.colour, markersize=5, clip_on=False)
    name_rows(axes, list(models))
    axes.set_xlabel("share of the way from no change to the ceiling")
    return figure


def _limits(scores: list[Score]) -> tuple[float, float]:
    """Return the ends of the scale: it holds no change, the ceiling and all intervals, within LOWEST and HIGHEST."""
    values = np.array([value for score in scores for value in (score.scaled, score.scaled_low, score.scaled_high)])
    values = values[np.isfinite(values)]
    return max(LOWEST, min(-0.1, values.min(initial=0) - 0.05)), min(HIGHEST, max(1.1, values.max(initial=1) + 0.05))


def _best_baseline(metric: str, board: Board) -> str | None:
    """Return the baseline that is best by a metric."""
    family = METRICS[metric].family
    return next((model for model, families in board.leaderboard.best_baselines.items() if family in families), None)


def _panels(board: Board, least_difference: float, cards: dict[str, ModelCard], plots: Plots) -> list[dict]:
    panels = []
    for metric in _telling(board)[:MOST_PANELS]:
        scores = {model: board.leaderboard.models[model].get(metric) for model in _shown(board, cards)}
        models = {model: score for model, score in scores.items() if score and np.isfinite(score.scaled)}
        if not models:
            continue
        best = _best_baseline(metric, board)
        values = "; ".join(
            f"{model} {number(score.scaled)} ({number(score.scaled_low)} to {number(score.scaled_high)})"
            for model, score in models.items()
        )
        alt = f"{board.title}, {metric}, 0 is no change and 1 the ceiling, 95 % intervals in brackets: {values}."
        if svg := plots.svg(alt, _panel_figure, models, best, least_difference, cards):
            panels.append({"svg": svg, "metric": metric, "title": METRICS[metric].family.replace("_", " ")})
    return panels


def summaries(boards: list[Board], least_difference: float, cards: dict[str, ModelCard], plots: Plots) -> list[Summary]:
    """Return the summary of every dataset × split; single folds have none.

    Parameters
    ----------
    least_difference
        Share of the way from no change to the ceiling from which on a difference counts.
    """
    return [
        Summary(
            board.dataset,
            board.split,
            board.generalization,
            sentence(board),
            _panels(board, least_difference, cards, plots),
        )
        for board in boards
        if not board.is_fold
    ]
