"""The leaderboard of one dataset × split: scores, raw and scaled, and a figure per headline metric."""

from collections.abc import Collection
from dataclasses import dataclass

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from perturbflow.benchmark.tables import CEILINGS, PRIMARY
from perturbflow.evaluation import METRICS
from perturbflow.report.cards import ModelCard
from perturbflow.report.plotting import INK, STYLE, Plots, interval, name_rows, new_axes, number, room_for

SCALED = "scaled_{}_{}".format(*PRIMARY)


@dataclass(frozen=True)
class Score:
    """A model's mean over perturbations on one metric."""

    value: float
    low: float
    high: float
    n_perturbations: int
    is_best: bool = False
    scaled: float = float("nan")  # no change is 0, a perfect predictor of the mean 1
    scaled_low: float = float("nan")
    scaled_high: float = float("nan")


@dataclass(frozen=True)
class Leaderboard:
    """Scores of one dataset × split: model → metric → score, ceilings apart."""

    models: dict[str, dict[str, Score]]
    ceilings: dict[str, dict[str, Score]]
    headlines: list[str]
    on_target: list[str]  # of the perturbed genes alone: no verdict rests on them
    others: list[str]
    best_baselines: dict[str, list[str]]  # → families of the headline metrics by which they are
    n_perturbations: int
    figures: list[dict]


def _scores(rows: pd.DataFrame, cards: dict[str, ModelCard]) -> dict[str, dict[str, Score]]:
    """Return model → metric → score: the mean over seeds, with an interval that holds those of all seeds."""
    means = rows.groupby(["model", "metric"], sort=False).agg(
        value=("value", "mean"),
        low=("ci_low", "min"),
        high=("ci_high", "max"),
        n_perturbations=("n_perturbations", "max"),
        scaled=(SCALED, "mean"),
        scaled_low=("scaled_ci_low", "min"),
        scaled_high=("scaled_ci_high", "max"),
    )
    loss = pd.Series(
        [float(METRICS[metric].loss(value)) for (_, metric), value in means["value"].items()], index=means.index
    )
    loss[[cards[model].kind == "ceiling" for model in means.index.get_level_values("model")]] = np.nan
    best = loss.groupby("metric").transform("min")
    table: dict[str, dict[str, Score]] = {}
    for (model, metric), row in means.iterrows():
        table.setdefault(model, {})[metric] = Score(
            row["value"],
            row["low"],
            row["high"],
            int(row["n_perturbations"]),
            is_best=bool(loss[model, metric] == best[model, metric]),
            scaled=row["scaled"],
            scaled_low=row["scaled_low"],
            scaled_high=row["scaled_high"],
        )
    return table


@mpl.rc_context(STYLE)
def _leaderboard_figure(
    metric: str, models: dict[str, Score], ceilings: dict[str, Score], cards: dict[str, ModelCard]
) -> Figure:
    figure, axes = new_axes(3.6, 0.62 + 0.24 * len(models), left=room_for(models), top=0.17)
    for y, (model, score) in enumerate(models.items()):
        card = cards[model]
        if np.isfinite(score.low):
            axes.plot(
                [score.low, score.high], [y, y], color=card.colour, linewidth=4, alpha=0.35, solid_capstyle="butt"
            )
        axes.plot(score.value, y, card.marker, color=card.colour, markersize=5)
    for score in list(ceilings.values())[:1]:  # one line: two of them would look alike
        if np.isfinite(score.low):
            axes.axvspan(score.low, score.high, color=INK, alpha=0.07, linewidth=0)
        axes.axvline(score.value, color=INK, linewidth=1, linestyle="--")
        axes.annotate(
            "ceiling",
            (score.value, 1),
            (0, 2),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            ha="center",
            fontsize=7,
        )
    name_rows(axes, list(models))
    axes.set_xlabel(METRICS[metric].reading)
    return figure


def _figures(
    metrics: list[str],
    models: dict[str, dict[str, Score]],
    ceilings: dict[str, dict[str, Score]],
    cards: dict[str, ModelCard],
    plots: Plots,
) -> list[dict]:
    """Return a figure per metric, as long as there is room."""
    figures = []
    for metric in metrics:
        shown, limits = (
            {model: row[metric] for model, row in some.items() if metric in row} for some in (models, ceilings)
        )
        if not shown:
            continue
        scores = "; ".join(
            f"{model} {number(score.value)} ({interval(score.low, score.high)})"
            for model, score in {**shown, **limits}.items()
        )
        alt = f"{metric}, {METRICS[metric].reading}, 95 % intervals in brackets: {scores}."
        if svg := plots.svg(alt, _leaderboard_figure, metric, shown, limits, cards):
            figures.append({"svg": svg, "metric": metric})
    return figures


def leaderboard(
    rows: pd.DataFrame, cards: dict[str, ModelCard], plots: Plots, uninformative: Collection[str] = ()
) -> Leaderboard:
    """Return the scores of one dataset × split, with a figure per headline metric.

    Parameters
    ----------
    uninformative
        Metrics that do not distinguish on these data: no baseline is best by them.
    """
    scores = _scores(rows, cards)
    models = {model: row for model, row in scores.items() if cards[model].kind != "ceiling"}
    families = rows.drop_duplicates("model").set_index("model")["family"]
    order = {family: i for i, family in enumerate(CEILINGS)}  # what sees something else of the test cells comes last
    in_order = sorted(
        (model for model in scores if model not in models), key=lambda model: order.get(families[model], len(order))
    )
    ceilings = {model: scores[model] for model in in_order}
    metrics = [metric for metric in METRICS if any(metric in row for row in scores.values())]
    headlines = [metric for metric in metrics if METRICS[metric].headline]
    on_target = [metric for metric in metrics if METRICS[metric].family == "on_target"]
    is_best = rows["is_best_baseline"] & rows["headline"] & ~rows["metric"].isin(uninformative)
    best = rows[is_best].drop_duplicates("metric").groupby("model", sort=False)["metric_family"].agg(list).to_dict()
    return Leaderboard(
        models,
        ceilings,
        headlines,
        on_target,
        others=[metric for metric in metrics if metric not in (*headlines, *on_target)],
        best_baselines=dict(sorted(best.items(), key=lambda item: -len(item[1]))),
        n_perturbations=max((score.n_perturbations for row in scores.values() for score in row.values()), default=0),
        figures=_figures(headlines, models, ceilings, cards, plots),
    )
