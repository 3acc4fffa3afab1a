"""The leaderboard of one dataset × split: scores, what their intervals allow to say, and a figure per metric."""

from collections.abc import Iterable
from dataclasses import dataclass

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from perturbflow.evaluation import METRICS
from perturbflow.report.cards import ModelCard
from perturbflow.report.drawing import INK, STYLE, Drawings, interval, new_axes, number, room_for


@dataclass(frozen=True)
class Score:
    """A model's mean over perturbations on one metric."""

    value: float
    low: float
    high: float
    n_perturbations: int
    is_best: bool = False

    def overlaps(self, other: "Score") -> bool:
        """Return whether the intervals overlap; an interval that is not known overlaps with all."""
        return not (self.low > other.high or self.high < other.low)


@dataclass(frozen=True)
class Leaderboard:
    """Scores of one dataset × split: model → metric → score, ceilings apart."""

    models: dict[str, dict[str, Score]]
    ceilings: dict[str, dict[str, Score]]
    metrics: list[str]
    n_perturbations: int
    findings: list[str]
    figures: list[dict]


def _is_better(metric: str, a: float, b: float) -> bool:
    return METRICS[metric].loss(a) < METRICS[metric].loss(b)


def _ranked(metric: str, scores: dict[str, Score]) -> list[str]:
    """Return the models that have a value, best first."""
    known = {model: score.value for model, score in scores.items() if np.isfinite(score.value)}
    return sorted(known, key=lambda model: METRICS[metric].loss(known[model]))


def _scores(rows: pd.DataFrame, cards: dict[str, ModelCard]) -> dict[str, dict[str, Score]]:
    """Return model → metric → score; the mean over seeds, and the interval that holds the intervals of all seeds."""
    means = rows.groupby(["model", "metric"], sort=False).agg(
        value=("value", "mean"), low=("ci_low", "min"), high=("ci_high", "max"), n_perturbations=("n_perturbations", "max")
    )
    is_model = np.array([cards[model].kind != "ceiling" for model in means.index.get_level_values("model")])
    losses = pd.Series([METRICS[metric].loss(value) for (_, metric), value in means["value"].items()], index=means.index)
    best = losses.where(is_model).groupby("metric").min()
    table: dict[str, dict[str, Score]] = {}
    for ((model, metric), row), is_rival in zip(means.iterrows(), is_model, strict=True):
        is_best = bool(is_rival and losses[model, metric] == best[metric])
        table.setdefault(model, {})[metric] = Score(row["value"], row["low"], row["high"], int(row["n_perturbations"]), is_best)
    return table


def _listed(names: Iterable[str]) -> str:
    *most, last = list(names)
    return f"{', '.join(most)} and {last}" if most else last


def _findings(models: dict[str, dict[str, Score]], ceilings: dict[str, dict[str, Score]], cards: dict[str, ModelCard]) -> list[str]:
    """Return what the intervals allow to say, in sentences."""
    metrics = list(next(iter(models.values()))) if models else []
    alone: dict[str, list[str]] = {}
    tied: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    unranked, better, worse, blind = [], [], [], []
    for metric in metrics:
        scores = {model: by_metric[metric] for model, by_metric in models.items() if metric in by_metric}
        ranked = _ranked(metric, scores)
        if len(ranked) < 2:
            continue
        best, worst = ranked[0], ranked[-1]
        close = tuple(model for model in scores if model != best and scores[model].overlaps(scores[best]))
        if len(close) == len(ranked) - 1:
            unranked.append(metric)
        elif close:
            tied.setdefault((best, close), []).append(metric)
        else:
            alone.setdefault(best, []).append(metric)
        learned, simple = (next((model for model in ranked if cards[model].kind == kind), None) for kind in ("learned", "baseline"))
        if learned and simple and not scores[learned].overlaps(scores[simple]):
            (better if _is_better(metric, scores[learned].value, scores[simple].value) else worse).append(metric)
        if any(metric in by_metric and by_metric[metric].overlaps(scores[worst]) for by_metric in ceilings.values()):
            blind.append(metric)
    sentences = [f"By {_listed(names)}, {best} is best, its interval apart from all others." for best, names in alone.items()]
    sentences += [
        f"By {_listed(names)}, {best} has the best value, but its interval overlaps with {_listed(close)}: these cannot be ranked."
        for (best, close), names in tied.items()
    ]
    if unranked:
        sentences.append(f"By {_listed(unranked)}, all intervals overlap with that of the best value: nothing can be ranked.")
    kinds = {cards[model].kind for model in models}
    if {"learned", "baseline"} <= kinds:
        if better:
            sentences.append(f"The best learned model beats the best baseline, intervals apart, by {_listed(better)}.")
        if worse:
            sentences.append(f"The best learned model falls behind the best baseline, intervals apart, by {_listed(worse)}.")
        if not better and not worse:
            sentences.append("By no metric can the best learned model be told from the best baseline.")
    if blind:
        sentences.append(f"By {_listed(blind)}, the ceiling overlaps with the worst model: here this tells no good model from a bad one.")
    return sentences


@mpl.rc_context(STYLE)
def _leaderboard_figure(metric: str, models: dict[str, Score], ceilings: dict[str, Score], cards: dict[str, ModelCard]) -> Figure:
    axes = new_axes(3.6, 0.62 + 0.24 * len(models), left=room_for(models), top=0.17)
    for y, (model, score) in enumerate(models.items()):
        card = cards[model]
        if np.isfinite(score.low):
            axes.plot([score.low, score.high], [y, y], color=card.colour, linewidth=4, alpha=0.35, solid_capstyle="butt")
        axes.plot(score.value, y, card.marker, color=card.colour, markersize=5)
    for score in ceilings.values():
        if np.isfinite(score.low):
            axes.axvspan(score.low, score.high, color=INK, alpha=0.07, linewidth=0)
        axes.axvline(score.value, color=INK, linewidth=1, linestyle="--")
        axes.annotate("ceiling", (score.value, 1), (0, 2), xycoords=("data", "axes fraction"), textcoords="offset points",
                      ha="center", fontsize=7)  # fmt: skip
    axes.set_yticks(range(len(models)), list(models))
    axes.set_ylim(len(models) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.locator_params(axis="x", nbins=5)
    axes.grid(axis="x", color="#888888", alpha=0.25, linewidth=0.5)
    axes.set_axisbelow(b=True)
    axes.spines["left"].set_visible(False)
    axes.set_xlabel(METRICS[metric].reading)
    return axes.figure


def leaderboard(rows: pd.DataFrame, cards: dict[str, ModelCard], drawings: Drawings) -> Leaderboard:
    """Return the scores of one dataset × split, drawn and put in sentences."""
    scores = _scores(rows, cards)
    models = {model: row for model, row in scores.items() if cards[model].kind != "ceiling"}
    ceilings = {model: row for model, row in scores.items() if cards[model].kind == "ceiling"}
    metrics = [metric for metric in METRICS if any(metric in row for row in scores.values())]
    figures = []
    for metric in metrics:
        shown, limits = ({model: row[metric] for model, row in some.items() if metric in row} for some in (models, ceilings))
        if not shown:
            continue
        alt = "; ".join(
            f"{model} {number(score.value)} ({interval(score.low, score.high)})" for model, score in {**shown, **limits}.items()
        )
        alt = f"{metric}, {METRICS[metric].reading}, 95 % intervals in brackets: {alt}."
        if svg := drawings.svg(alt, _leaderboard_figure, metric, shown, limits, cards):
            figures.append({"svg": svg, "metric": metric})
    n = max((score.n_perturbations for row in scores.values() for score in row.values()), default=0)
    return Leaderboard(models, ceilings, metrics, n, _findings(models, ceilings, cards), figures)
