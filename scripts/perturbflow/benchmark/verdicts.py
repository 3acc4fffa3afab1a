"""One line per model: better than, level with or worse than the best baseline, or one thing traded for another."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import numpy as np
import pandas as pd

from perturbflow.benchmark.tables import BETTER, DISTINGUISHES, LEVEL, TOO_FEW, UNDECIDED, WORSE
from perturbflow.evaluation.bootstrap import MIN_PERTURBATIONS
from perturbflow.registry.families import with_role
from perturbflow.wording import capital

STRONGEST, CEILINGS = with_role("to_beat"), with_role("ceiling")
RANK = "rank_cosine_off_target"
COLLAPSED = 0.4  # mean of RANK above it: chance is 0.5
CANNOT_RANK = "this screen cannot rank models"
MIN_DISTINGUISHING = 2  # headline metrics that distinguish; on fewer no model is ranked

TRADES = "trades"
VERDICTS = [
    *("dataset", "split", "model", "family", "kind", "verdict", "wins", "losses", "level", "undecided", "cannot_tell"),
    *("best_baselines", "against_set_gp", "no_better_than", "mode_collapse", "n_telling", "least_difference"),
    *("caveats", "sentence"),
]


def distinguishing(calibration: pd.DataFrame) -> dict[str, bool]:
    """Return metric → whether it distinguishes: one of the positive references beats every negative one.

    The duplicate of half the cells carries the noise of its cells, and a smooth mean may beat it where effects are
    small. The interpolated duplicate was made for that. A metric is at fault only where neither is better.

    Parameters
    ----------
    calibration
        Rows of one dataset × split.
    """
    is_beaten = calibration["verdict"] == DISTINGUISHES
    beaten = is_beaten.groupby([calibration["metric"], calibration["positive"]], sort=False).all()
    return beaten.groupby("metric", sort=False).any().to_dict() if len(beaten) else {}


def outcome(words: Iterable[str]) -> str:
    """Return one word for the words of several metrics: a model is level if it is level on all of them."""
    words = set(words)
    if {BETTER, WORSE} <= words:
        return TRADES
    return next((word for word in (BETTER, WORSE) if word in words), LEVEL if words == {LEVEL} else UNDECIDED)


# --- facts that verdicts rest on --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Screen:
    """Facts of a dataset × split that all verdicts share."""

    headlines: pd.DataFrame  # comparisons by headline metrics
    counted: pd.DataFrame  # those by metrics that distinguish, on enough perturbations
    ranks: pd.Series  # model → mean of RANK
    may_collapse: bool
    n_perturbations: int
    n_seeds: int
    least_difference: float

    @classmethod
    def of(
        cls, summary: pd.DataFrame, calibration: pd.DataFrame, comparisons: pd.DataFrame, least_difference: float
    ) -> Self:
        """Gather them from tables of one dataset × split, see `judge`."""
        distinguishes = distinguishing(calibration)
        headlines = comparisons[comparisons["headline"]]
        is_counted = [distinguishes.get(row.metric, True) and row.verdict != TOO_FEW for row in headlines.itertuples()]
        ranks = summary[summary["metric"] == RANK].groupby("model")["value"].mean()
        # Where RANK does not distinguish measured cells themselves, no model is at fault.
        ceilings = ranks[ranks.index.isin(summary.loc[summary["family"].isin(CEILINGS), "model"])]
        return cls(
            headlines,
            headlines[np.array(is_counted, dtype=bool)],
            ranks,
            may_collapse=not (ceilings > COLLAPSED).any(),
            n_perturbations=int(summary["n_perturbations"].max()),
            n_seeds=summary["seed"].nunique(),
            least_difference=least_difference,
        )

    @property
    def n_distinguishing(self) -> int:
        """Number of headline metrics that count."""
        return self.counted["metric"].nunique()

    def is_collapsed(self, model: str) -> bool:
        """Return whether a model predicts nearly the same for all perturbations."""
        return self.may_collapse and self.ranks.get(model, 0.0) > COLLAPSED

    def comparisons_of(self, model: str) -> _Comparisons:
        """Return the comparisons of one model."""
        return _Comparisons(*(table[table["model"] == model] for table in (self.headlines, self.counted)))


@dataclass(frozen=True)
class _Comparisons:
    """The comparisons of one model by headline metrics: all, and those that count."""

    all: pd.DataFrame
    counted: pd.DataFrame

    @cached_property
    def best(self) -> pd.DataFrame:
        """Those that count, with the best baseline of each metric."""
        return self.counted[self.counted["is_best_baseline"]]

    @cached_property
    def not_counted(self) -> pd.DataFrame:
        """Those that do not count, with the best baseline of each metric."""
        return self.all[self.all["is_best_baseline"] & ~self.all["metric"].isin(self.best["metric"])]

    @cached_property
    def strongest(self) -> pd.DataFrame:
        """Those that count, with the closed form to beat."""
        return self.counted[self.counted["baseline_family"].isin(STRONGEST)]

    @cached_property
    def ablations_that_match(self) -> list[str]:
        """Ablations that the model is better than by no metric."""
        of_ablations = self.counted[self.counted["baseline_kind"] == "ablation"]
        words = of_ablations.groupby("baseline", sort=False)["verdict"]
        return [name for name, of_name in words if BETTER not in set(of_name)]

    def metrics_with(self, word: str) -> str:
        """Return the metrics with this word against the best baseline, as verdicts.tsv lists them."""
        return ",".join(self.best.loc[self.best["verdict"] == word, "metric"])


# --- sentences --------------------------------------------------------------------------------------------------------


def _families(rows: pd.DataFrame) -> str:
    """Return the families of these rows' metrics in words."""
    *most, last = rows["metric_family"].str.replace("_", " ")
    return f"{', '.join(most)} and {last}" if most else last


def _percent(share: float) -> str:
    """Return a share of the way with its sign, in percent."""
    if abs(share) < 5e-4:
        return "0"
    return f"{100 * share:+.0f}" if abs(share) >= 0.1 else f"{100 * share:+.1f}"


def _size(row: Any) -> str:
    """Return a difference and its interval: as shares of the way where there is one."""
    if np.isfinite(row.share):
        return f"{_percent(row.share)} %, {_percent(row.share_low)} to {_percent(row.share_high)}"
    return f"{row.difference:+.2g}, {row.ci_low:+.2g} to {row.ci_high:+.2g}"


def _named(rows: pd.DataFrame, *, with_baseline: bool) -> str:
    """Return families of metrics with their differences and intervals."""
    over = [f", over {row.baseline}" * with_baseline for row in rows.itertuples()]
    return ", ".join(
        f"{row.metric_family.replace('_', ' ')} ({_size(row)}{name})"
        for row, name in zip(rows.itertuples(), over, strict=True)
    )


STARTS = {
    BETTER: "better than",
    TRADES: "trades against",
    WORSE: "worse than",
    LEVEL: "level with",
    UNDECIDED: "not distinguished from",
}


def _comparison(rows: pd.DataFrame, least_difference: float) -> str:
    """Return the words of headline metrics on a model against its baselines, as a clause."""
    names = list(rows["baseline"].unique())
    name = names[0] if len(names) == 1 else "the best baselines"
    words = {
        BETTER: "wins",
        WORSE: "loses",
        LEVEL: f"level within {100 * least_difference:g} % on",
        UNDECIDED: "undecided on",
    }
    parts = {verb: rows[rows["verdict"] == word] for word, verb in words.items()}
    clause = "; ".join(
        f"{verb} {_named(part, with_baseline=len(names) > 1)}" for verb, part in parts.items() if len(part)
    )
    # Once: the other shares are of the same kind.
    clause = clause.replace(" %, ", " % of the way from no change to the ceiling, ", 1)
    return f"{STARTS[outcome(rows['verdict'])]} {name}: {clause}"


def _why_not_ranked(rows: pd.DataFrame, n_distinguishing: int) -> str:
    """Return why no model is ranked."""
    if (rows["verdict"] == TOO_FEW).all():
        return f"{rows['n_perturbations'].max()} perturbations are too few"
    return f"{n_distinguishing} of {rows['metric'].nunique()} headline metrics distinguish good from bad here"


def _comparison_clauses(own: _Comparisons, screen: _Screen) -> list[str]:
    """Return the words of headline metrics on a model, and why they may be no verdict."""
    if not own.all["is_best_baseline"].any():
        return ["cannot be judged: no other baseline is among the runs"]
    clauses = []
    if screen.n_distinguishing < MIN_DISTINGUISHING:
        clauses.append(f"{CANNOT_RANK}: {_why_not_ranked(own.all, screen.n_distinguishing)}")
    elif not len(own.best):
        clauses.append(f"cannot be judged: {_why_not_ranked(own.all, screen.n_distinguishing)}")
    if len(own.best):
        ending = f"; cannot tell here: {_families(own.not_counted)}" if len(own.not_counted) else ""
        clauses.append(_comparison(own.best, screen.least_difference) + ending)
    return clauses


def _sentence(model: str, kind: str, own: _Comparisons, screen: _Screen) -> str:
    """Return a verdict in sentences."""
    clauses = _comparison_clauses(own, screen)
    if len(own.strongest) and set(own.best["baseline"]) != set(own.strongest["baseline"]):
        clauses.append(_comparison(own.strongest, screen.least_difference))
    if kind == "learned":
        clauses += [
            f"no better than {name}: its scores need no perturbation label" for name in own.ablations_that_match
        ]
    if screen.is_collapsed(model):
        clauses.append(
            f"mode collapse: {RANK} {screen.ranks[model]:.2f} (chance 0.5), its predictions hardly distinguish "
            "perturbations"
        )
    return " ".join(f"{capital(clause)}." for clause in clauses)


def _caveats(screen: _Screen, kind: str) -> list[str]:
    """Return the weak points of a verdict, one sentence each."""
    found = []
    n = screen.n_perturbations
    if n < MIN_PERTURBATIONS:
        found.append(
            f"It rests on {n} held-out perturbation{'s' * (n != 1)}: fewer than {MIN_PERTURBATIONS} are too few."
        )
    if screen.n_seeds == 1 and kind == "learned":
        found.append("It rests on one seed: its intervals do not hold the differences between trainings.")
    return found


# --- verdicts ---------------------------------------------------------------------------------------------------------


def judge(
    summary: pd.DataFrame,
    calibration: pd.DataFrame,
    comparisons: pd.DataFrame,
    least_difference: float,
    caveats: Iterable[str] = (),
) -> pd.DataFrame:
    """Return one row per model but ceilings: the verdict on the headline metric of every family of metrics.

    Each headline metric compares the model with the baseline that is best by it. The model is better than the best
    baseline if it is better by one metric or more, and worse by none. Metrics that distinguish nothing on these data
    do not count and are named. Where fewer than two count, the screen cannot rank models. No correction is made for
    the number of metrics. The best baseline is picked on the test perturbations, which favours the baselines.

    Parameters
    ----------
    summary, calibration, comparisons
        Rows of one dataset × split (`tables`).
    least_difference
        The share of the way from no change to the ceiling that `comparisons` was made with.
    caveats
        Sentences on its data that hold for every verdict (`perturbflow.audit.caveats`).
    """
    screen = _Screen.of(summary, calibration, comparisons, least_difference)
    models = summary[summary["kind"] != "ceiling"].drop_duplicates("model")
    rows = [_verdict(model, screen, caveats) for model in models.itertuples()]
    return pd.DataFrame(rows, columns=VERDICTS)


def _verdict(model: Any, screen: _Screen, caveats: Iterable[str]) -> dict[str, Any]:
    """Return the row of verdicts.tsv of a model, given its first row of the summary."""
    own = screen.comparisons_of(model.model)
    is_ranked = screen.n_distinguishing >= MIN_DISTINGUISHING and len(own.best) > 0
    return {
        "dataset": model.dataset,
        "split": model.split,
        "model": model.model,
        "family": model.family,
        "kind": model.kind,
        "verdict": outcome(own.best["verdict"]) if is_ranked else UNDECIDED,
        "wins": own.metrics_with(BETTER),
        "losses": own.metrics_with(WORSE),
        "level": own.metrics_with(LEVEL),
        "undecided": own.metrics_with(UNDECIDED),
        "cannot_tell": ",".join(own.not_counted["metric"]),
        "best_baselines": ",".join(own.best["baseline"].unique()),
        "against_set_gp": outcome(own.strongest["verdict"]) if len(own.strongest) else "",
        "no_better_than": ",".join(own.ablations_that_match) if model.kind == "learned" else "",
        "mode_collapse": screen.is_collapsed(model.model),
        "n_telling": screen.n_distinguishing,
        "least_difference": screen.least_difference,
        "caveats": " ".join([*_caveats(screen, model.kind), *caveats]),
        "sentence": _sentence(model.model, model.kind, own, screen),
    }
