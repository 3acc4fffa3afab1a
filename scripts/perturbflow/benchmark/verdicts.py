"""One line per model: better than, level with or worse than the best baseline, or one thing traded for another."""

from collections.abc import Iterable

import numpy as np
import pandas as pd

from perturbflow.benchmark.tables import CANNOT_TELL, TELLS, TOO_FEW

STACKED = "stacked"
RANK = "rank_cosine"
COLLAPSED = 0.4  # mean rank_cosine above it: chance is 0.5

BETTER, TRADES, LEVEL, WORSE = "better", "trades", "level", "worse"
VERDICTS = ["dataset", "split", "model", "family", "kind", "verdict", "wins", "losses", "level", "cannot_tell", "best_baselines",
            "against_stacked", "no_better_than", "mode_collapse", "caveats", "sentence"]  # fmt: skip


def telling(calibration: pd.DataFrame) -> dict[str, bool]:
    """Return metric → whether it tells: one of the positive controls beats every negative control.

    The duplicate of half the cells carries the noise of its cells, and a smooth mean may beat it where effects are small; the
    interpolated duplicate was made for that. A metric is at fault only where neither stands out.

    Parameters
    ----------
    calibration
        Rows of one dataset × split.
    """
    beaten = (calibration["verdict"] == TELLS).groupby([calibration["metric"], calibration["positive"]], sort=False).all()
    return beaten.groupby("metric", sort=False).any().to_dict() if len(beaten) else {}


def _families(rows: pd.DataFrame) -> str:
    """Return the families of these rows' metrics in words."""
    *most, last = rows["metric_family"].str.replace("_", " ")
    return f"{', '.join(most)} and {last}" if most else last


def outcome(words: Iterable[str]) -> str:
    """Return one word for the words of several metrics."""
    words = set(words)
    if {BETTER, WORSE} <= words:
        return TRADES
    return next((word for word in (BETTER, WORSE, LEVEL) if word in words), CANNOT_TELL)


def _named(rows: pd.DataFrame, *, with_baseline: bool) -> str:
    """Return families of metrics with their differences and intervals."""
    return ", ".join(
        f"{row.metric_family.replace('_', ' ')} ({row.difference:+.2g}, {row.ci_low:.2g} to {row.ci_high:.2g}{f', over {row.baseline}' * with_baseline})"
        for row in rows.itertuples()
    )


def _comparison(rows: pd.DataFrame) -> str:
    """Return what headline metrics say of a model against its references, as a clause."""
    names = list(rows["baseline"].unique())
    name = names[0] if len(names) == 1 else "the best baselines"
    wins, losses, level = (rows[rows["verdict"] == word] for word in (BETTER, WORSE, LEVEL))
    if outcome(rows["verdict"]) == LEVEL:
        return f"level with {name} on {_families(level)}"
    start = {BETTER: "better than", TRADES: "trades against", WORSE: "worse than"}[outcome(rows["verdict"])]
    said = [f"{word} {_named(part, with_baseline=len(names) > 1)}" for word, part in (("wins", wins), ("loses", losses)) if len(part)]
    if len(level):
        said.append(f"level on {_families(level)}")
    return f"{start} {name}: {', '.join(said)}"


def _why_not(rows: pd.DataFrame) -> str:
    """Return why no headline metric counts for a model."""
    if not rows["is_best_baseline"].any():
        return "no other baseline is among the runs"
    if (rows["verdict"] == TOO_FEW).all():
        return f"{rows['n_perturbations'].max()} perturbations are too few"
    return "no headline metric can tell good from bad here"


def judge(summary: pd.DataFrame, calibration: pd.DataFrame, comparisons: pd.DataFrame, caveats: Iterable[str] = ()) -> pd.DataFrame:
    """Return one row per model but ceilings: the verdict on the headline metric of every family of metrics.

    Each headline metric is compared with the baseline that is best by it: better than the best baseline is better by one metric
    or more and worse by none. Metrics that cannot tell anything on these data do not count and are named. No correction is
    made for the number of metrics; that the best baseline is picked on the test perturbations favours the baselines.

    Parameters
    ----------
    summary, calibration, comparisons
        Rows of one dataset × split (`tables`).
    caveats
        Sentences on its data that hold for every verdict (`perturbflow.caveats`).
    """
    tells = telling(calibration)
    headlines = comparisons[comparisons["headline"]]
    counts = [tells.get(row.metric, True) and row.verdict != TOO_FEW for row in headlines.itertuples()]
    counted = headlines[np.array(counts, dtype=bool)]
    ranks = summary[summary["metric"] == RANK].groupby("model")["value"].mean()
    # Where measured cells themselves cannot be told apart, no model can be blamed for it.
    ceilings = ranks[ranks.index.isin(summary.loc[summary["kind"] == "ceiling", "model"])]
    may_collapse = not (ceilings > COLLAPSED).any()
    models = summary[summary["kind"] != "ceiling"].drop_duplicates("model")
    rows = []
    for model in models.itertuples():
        mine, all_mine = (table[table["model"] == model.model] for table in (counted, headlines))
        best = mine[mine["is_best_baseline"]]
        mute = all_mine[all_mine["is_best_baseline"] & ~all_mine["metric"].isin(best["metric"])]
        against_stacked = mine[mine["baseline_family"] == STACKED]
        of_ablations = mine[mine["baseline_kind"] == "ablation"].groupby("baseline", sort=False)["verdict"]
        no_better = [name for name, words in of_ablations if model.kind == "learned" and BETTER not in set(words)]
        is_collapsed = may_collapse and ranks.get(model.model, 0.0) > COLLAPSED
        said = [_comparison(best) if len(best) else f"cannot be judged: {_why_not(all_mine)}"]
        if len(best) and len(mute):
            said[0] += f"; cannot tell here: {_families(mute)}"
        if len(against_stacked) and set(best["baseline"]) != set(against_stacked["baseline"]):
            said.append(_comparison(against_stacked))
        said += [f"no better than {name}: its scores need no perturbation label" for name in no_better]
        if is_collapsed:
            said.append(f"mode collapse: {RANK} {ranks[model.model]:.2f} (chance 0.5), its predictions hardly tell perturbations apart")
        by_word = {word: ",".join(best.loc[best["verdict"] == word, "metric"]) for word in (BETTER, WORSE, LEVEL)}
        rows.append(
            {
                "dataset": model.dataset,
                "split": model.split,
                "model": model.model,
                "family": model.family,
                "kind": model.kind,
                "verdict": outcome(best["verdict"]),
                "wins": by_word[BETTER],
                "losses": by_word[WORSE],
                "level": by_word[LEVEL],
                "cannot_tell": ",".join(mute["metric"]),
                "best_baselines": ",".join(best["baseline"].unique()),
                "against_stacked": outcome(against_stacked["verdict"]) if len(against_stacked) else "",
                "no_better_than": ",".join(no_better),
                "mode_collapse": is_collapsed,
                "caveats": " ".join(caveats),
                "sentence": " ".join(f"{clause[0].upper()}{clause[1:]}." for clause in said),
            }
        )
    return pd.DataFrame(rows, columns=VERDICTS)
