"""One line per model: better than, level with or worse than the best baseline, or one thing traded for another."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd

from perturbflow.benchmark.tables import BETTER, CANNOT_DISTINGUISH, DISTINGUISHES, LEVEL, TOO_FEW, UNDECIDED, WORSE
from perturbflow.evaluation.bootstrap import MIN_PERTURBATIONS

STRONGEST = ("gaussian_process", "stacked")  # families of the closed form to beat
RANK = "rank_cosine_off_target"
COLLAPSED = 0.4  # mean of RANK above it: chance is 0.5
CANNOT_RANK = "this screen cannot rank models"
MIN_DISTINGUISHING = 2  # headline metrics that can tell; on fewer no model is ranked

TRADES = "trades"
VERDICTS = ["dataset", "split", "model", "family", "kind", "verdict", "wins", "losses", "level", "undecided", "cannot_tell", "best_baselines",
            "against_set_gp", "no_better_than", "mode_collapse", "n_telling", "least_difference", "caveats", "sentence"]  # fmt: skip


def distinguishing(calibration: pd.DataFrame) -> dict[str, bool]:
    """Return metric → whether it tells: one of the positive controls beats every negative control.

    The duplicate of half the cells carries the noise of its cells, and a smooth mean may beat it where effects are
    small; the interpolated duplicate was made for that. A metric is at fault only where neither stands out.

    Parameters
    ----------
    calibration
        Rows of one dataset × split.
    """
    beaten = (
        (calibration["verdict"] == DISTINGUISHES)
        .groupby([calibration["metric"], calibration["positive"]], sort=False)
        .all()
    )
    return beaten.groupby("metric", sort=False).any().to_dict() if len(beaten) else {}


def _families(rows: pd.DataFrame) -> str:
    """Return the families of these rows' metrics in words."""
    *most, last = rows["metric_family"].str.replace("_", " ")
    return f"{', '.join(most)} and {last}" if most else last


def outcome(words: Iterable[str]) -> str:
    """Return one word for the words of several metrics: level is what is level on all of them."""
    words = set(words)
    if {BETTER, WORSE} <= words:
        return TRADES
    return next((word for word in (BETTER, WORSE) if word in words), LEVEL if words == {LEVEL} else CANNOT_DISTINGUISH)


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


def _comparison(rows: pd.DataFrame, least_difference: float) -> str:
    """Return what headline metrics say of a model against its references, as a clause."""
    names = list(rows["baseline"].unique())
    name = names[0] if len(names) == 1 else "the best baselines"
    start = {
        BETTER: "better than",
        TRADES: "trades against",
        WORSE: "worse than",
        LEVEL: "level with",
        CANNOT_DISTINGUISH: "cannot be told from",
    }
    words = {
        BETTER: "wins",
        WORSE: "loses",
        LEVEL: f"level within {100 * least_difference:g} % on",
        UNDECIDED: "undecided on",
    }
    parts = {said: rows[rows["verdict"] == word] for word, said in words.items()}
    said = "; ".join(
        f"{said} {_named(part, with_baseline=len(names) > 1)}" for said, part in parts.items() if len(part)
    )
    said = said.replace(
        " %, ", " % of the way from no change to the ceiling, ", 1
    )  # once: the other shares are of the same kind
    return f"{start[outcome(rows['verdict'])]} {name}: {said}"


def _why_not(rows: pd.DataFrame, n_telling: int) -> str:
    """Return why no model is ranked."""
    if (rows["verdict"] == TOO_FEW).all():
        return f"{rows['n_perturbations'].max()} perturbations are too few"
    return f"{n_telling} of {rows['metric'].nunique()} headline metrics can tell good from bad here"


def _mute(best: pd.DataFrame, all_mine: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of a model's headline metrics that do not count."""
    return all_mine[all_mine["is_best_baseline"] & ~all_mine["metric"].isin(best["metric"])]


def _clauses(best: pd.DataFrame, all_mine: pd.DataFrame, n_telling: int, least_difference: float) -> list[str]:
    """Return what headline metrics say of a model, those that count (`best`) of all of them, and why that may be no verdict."""
    said = []
    if not all_mine["is_best_baseline"].any():
        return ["cannot be judged: no other baseline is among the runs"]
    if n_telling < MIN_DISTINGUISHING:
        said.append(f"{CANNOT_RANK}: {_why_not(all_mine, n_telling)}")
    elif not len(best):
        said.append(f"cannot be judged: {_why_not(all_mine, n_telling)}")
    if len(best):
        mute = _mute(best, all_mine)
        said.append(
            _comparison(best, least_difference) + (f"; cannot tell here: {_families(mute)}" if len(mute) else "")
        )
    return said


def _caveats(n_perturbations: int, n_seeds: int, kind: str) -> list[str]:
    """Return what a verdict rests on that is thin, one sentence each."""
    found = []
    if n_perturbations < MIN_PERTURBATIONS:
        found.append(
            f"It rests on {n_perturbations} held-out perturbation{'s' * (n_perturbations != 1)}: fewer than {MIN_PERTURBATIONS} tell nothing."
        )
    if n_seeds == 1 and kind == "learned":
        found.append("It rests on one seed: how much another training would differ is not in its intervals.")
    return found


def judge(
    summary: pd.DataFrame,
    calibration: pd.DataFrame,
    comparisons: pd.DataFrame,
    least_difference: float,
    caveats: Iterable[str] = (),
) -> pd.DataFrame:
    """Return one row per model but ceilings: the verdict on the headline metric of every family of metrics.

    Each headline metric is compared with the baseline that is best by it: better than the best baseline is better by
    one metric or more and worse by none. Metrics that cannot tell anything on these data do not count and are named;
    where fewer than two count, the screen cannot rank models. No correction is made for the number of metrics; that the
    best baseline is picked on the test perturbations favours the baselines.

    Parameters
    ----------
    summary, calibration, comparisons
        Rows of one dataset × split (`tables`).
    least_difference
        The share of the way from no change to the ceiling that `comparisons` was made with.
    caveats
        Sentences on its data that hold for every verdict (`perturbflow.audit.caveats`).
    """
    tells = distinguishing(calibration)
    headlines = comparisons[comparisons["headline"]]
    counts = [tells.get(row.metric, True) and row.verdict != TOO_FEW for row in headlines.itertuples()]
    counted = headlines[np.array(counts, dtype=bool)]
    n_telling = counted["metric"].nunique()
    ranks = summary[summary["metric"] == RANK].groupby("model")["value"].mean()
    # Where measured cells themselves cannot be told apart, no model can be blamed for it.
    ceilings = ranks[ranks.index.isin(summary.loc[summary["kind"] == "ceiling", "model"])]
    may_collapse = not (ceilings > COLLAPSED).any()
    n_seeds, n_perturbations = summary["seed"].nunique(), int(summary["n_perturbations"].max())
    models = summary[summary["kind"] != "ceiling"].drop_duplicates("model")
    rows = []
    for model in models.itertuples():
        mine, all_mine = (table[table["model"] == model.model] for table in (counted, headlines))
        best = mine[mine["is_best_baseline"]]
        mute = _mute(best, all_mine)
        against_set_gp = mine[mine["baseline_family"].isin(STRONGEST)]
        of_ablations = mine[mine["baseline_kind"] == "ablation"].groupby("baseline", sort=False)["verdict"]
        no_better = [name for name, words in of_ablations if model.kind == "learned" and BETTER not in set(words)]
        is_collapsed = may_collapse and ranks.get(model.model, 0.0) > COLLAPSED
        is_ranked = n_telling >= MIN_DISTINGUISHING and len(best) > 0
        said = _clauses(best, all_mine, n_telling, least_difference)
        if len(against_set_gp) and set(best["baseline"]) != set(against_set_gp["baseline"]):
            said.append(_comparison(against_set_gp, least_difference))
        said += [f"no better than {name}: its scores need no perturbation label" for name in no_better]
        if is_collapsed:
            said.append(
                f"mode collapse: {RANK} {ranks[model.model]:.2f} (chance 0.5), its predictions hardly tell perturbations apart"
            )
        by_word = {
            word: ",".join(best.loc[best["verdict"] == word, "metric"]) for word in (BETTER, WORSE, LEVEL, UNDECIDED)
        }
        rows.append(
            {
                "dataset": model.dataset,
                "split": model.split,
                "model": model.model,
                "family": model.family,
                "kind": model.kind,
                "verdict": outcome(best["verdict"]) if is_ranked else CANNOT_DISTINGUISH,
                "wins": by_word[BETTER],
                "losses": by_word[WORSE],
                "level": by_word[LEVEL],
                "undecided": by_word[UNDECIDED],
                "cannot_tell": ",".join(mute["metric"]),
                "best_baselines": ",".join(best["baseline"].unique()),
                "against_set_gp": outcome(against_set_gp["verdict"]) if len(against_set_gp) else "",
                "no_better_than": ",".join(no_better),
                "mode_collapse": is_collapsed,
                "n_telling": n_telling,
                "least_difference": least_difference,
                "caveats": " ".join([*_caveats(n_perturbations, n_seeds, model.kind), *caveats]),
                "sentence": " ".join(f"{clause[0].upper()}{clause[1:]}." for clause in said),
            }
        )
    return pd.DataFrame(rows, columns=VERDICTS)
