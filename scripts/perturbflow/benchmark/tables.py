"""The tables of one dataset × split: summary, calibration, comparisons and strata."""

import itertools
from collections.abc import Callable

import numpy as np
import pandas as pd

from perturbflow.benchmark.panel import Panel
from perturbflow.evaluation import METRICS
from perturbflow.evaluation.bootstrap import (
    MIN_PERTURBATIONS,
    Estimates,
    estimate,
    interval,
    mean,
    n_perturbations,
    resampled_means,
    share_interval,
)
from perturbflow.registry.families import FAMILIES, with_role

# Families that scales and calibrations refer to.
FLOORS, CEILINGS, PRIMARY = with_role("floor"), with_role("ceiling"), with_role("scale")
# Calibration asks of real predictions (positive) whether a metric distinguishes them from useless ones (negative).
POSITIVES, NEGATIVES = with_role("positive"), with_role("negative")

# Columns, in the order of the files.
SUMMARY_KEYS = [
    *("dataset", "split", "model", "seed", "metric", "value", "ci_low", "ci_high", "n_perturbations", "better"),
    *("metric_family", "headline", "family", "kind", "is_best_baseline"),
]
CALIBRATION = [
    *("dataset", "split", "metric", "metric_family", "headline", "positive", "negative", "drf", "drf_low", "drf_high"),
    *("bds", "bds_low", "bds_high", "n_perturbations", "verdict", "reason"),
]
COMPARISONS = [
    *("dataset", "split", "metric", "metric_family", "headline", "model", "family", "kind", "baseline"),
    *("baseline_family", "baseline_kind", "is_best_baseline", "difference", "ci_low", "ci_high", "margin", "share"),
    *("share_low", "share_high", "win_rate", "n_perturbations", "verdict"),
]
STRATA = [
    *("dataset", "split", "metric", "metric_family", "model", "family", "kind", "stratum", "bin", "from", "to"),
    *("value", "ci_low", "ci_high", "n_perturbations"),
]

BETTER, LEVEL, WORSE, UNDECIDED, TOO_FEW = "better", "level", "worse", "undecided", "too few"  # differences
WORDED = ("members_seen", "n_sources", "responds")  # strata with words for bins, not ranges
BINS = {2: ("low", "high"), 3: ("low", "middle", "high")}
DISTINGUISHES, CANNOT_DISTINGUISH = "tells", "cannot tell"  # metrics, in calibration.tsv


def _share_won(gain: np.ndarray) -> np.ndarray:
    """Return the share of gains above zero, ties counting half, (N, S, P) → (N,)."""
    return mean(np.where(np.isnan(gain), np.nan, (np.sign(gain) + 1) / 2))


def _ratio(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return a / b, NaN where b is zero."""
    return np.divide(a, b, out=np.full(np.shape(a), np.nan), where=b != 0)


# --- means, raw and scaled ------------------------------------------------------------------------------------------


def _scaled(losses: np.ndarray, floor: int, ceiling: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return s of every row of (K, M, S, P), and numerator and denominator for its interval.

    Returns
    -------
    s
        (K·M,); NaN for metrics by which the ceiling is not shown to be better than the floor.
    gain, whole
        (K·M, S, P): numerator and denominator, defined for the same perturbations.
    """
    whole = losses[:, floor] - losses[:, ceiling]  # (K, S, P)
    whole[estimate(whole).sign <= 0] = np.nan
    gain = losses[:, floor, None] - losses  # (K, M, S, P)
    whole = np.where(np.isnan(gain), np.nan, whole[:, None])
    gain = np.where(np.isnan(whole), np.nan, gain)
    gain, whole = (array.reshape(-1, *array.shape[2:]) for array in (gain, whole))
    return _ratio(mean(gain), mean(whole)), gain, whole


def _summary_of_seed(panel: Panel, families: dict[str, str], s: int) -> pd.DataFrame:
    """Return the means of one seed, raw and scaled, with intervals: one row per metric × model."""
    values, losses = panel.values[:, :, s, None], panel.losses[:, :, s, None]
    means = estimate(values.reshape(-1, *values.shape[2:]))
    columns = {"value": means.mean, "ci_low": means.low, "ci_high": means.high, "n_perturbations": means.n}
    undefined = np.full(len(means.n), np.nan)
    low = high = undefined
    for pair in itertools.product(FLOORS, CEILINGS):
        scaled = undefined
        floor, ceiling = (panel.model_of(family, families) for family in pair)
        if floor is not None and ceiling is not None:
            scaled, gain, whole = _scaled(losses, floor, ceiling)
            if pair == PRIMARY:
                resampled = _ratio(resampled_means(gain), resampled_means(whole))
                low, high = interval(resampled, n_perturbations(gain))
        columns["scaled_{}_{}".format(*pair)] = scaled
    columns |= {"scaled_ci_low": low, "scaled_ci_high": high}
    index = pd.MultiIndex.from_product([panel.metrics, panel.models], names=["metric", "model"])
    return pd.DataFrame(columns, index=index).reset_index().assign(seed=panel.seeds[s])


def summarize(panel: Panel, families: dict[str, str]) -> pd.DataFrame:
    """Return one row per model × seed × metric: the mean over perturbations, raw and scaled, with 95 % intervals.

    scaled_{b}_{r} is s = (u − b)/(r − b) on mean losses, over the perturbations for which all three are defined, of
    one seed. 0 is as good as b, 1 as good as r; it is never clipped. It is NaN where b or r is not among the runs, or
    r is not shown to be better than b: then there is no scale. scaled_ci_low and scaled_ci_high belong to the pair
    PRIMARY.
    """
    table = pd.concat([_summary_of_seed(panel, families, s) for s in range(len(panel.seeds))])
    table["better"] = [METRICS[metric].direction for metric in table["metric"]]
    table = with_metric_facts(table)
    table["family"] = table["model"].map(families)
    table["kind"] = [FAMILIES[family].kind for family in table["family"]]
    best = {metric: ranked[0] for metric, ranked in _ranked_baselines(panel, families).items() if ranked}
    table["is_best_baseline"] = [panel.models.index(row.model) == best.get(row.metric) for row in table.itertuples()]
    in_order = pd.MultiIndex.from_product([panel.models, panel.seeds, panel.metrics], names=["model", "seed", "metric"])
    table = table.set_index(in_order.names).loc[in_order].reset_index().assign(**panel.keys)
    return table[list(dict.fromkeys([*SUMMARY_KEYS, *table.columns]))]


# --- calibration: which metrics distinguish ---------------------------------------------------------------------------


def calibrate(panel: Panel, families: dict[str, str]) -> pd.DataFrame:
    """Return one row per metric × positive reference × negative reference: whether the metric distinguishes them.

    The positive references are real predictions, the negative ones useless. drf is the dynamic range fraction (pos −
    neg)/(perfect − neg) (Miller et al. 2025) on mean losses, not clipped. bds is the share of perturbations for which
    the positive reference beats the negative one (scPertEval 2026), ties counting half, with an exact interval. A
    metric distinguishes the two where both intervals lie above the values of chance, 0 and 0.5.
    """
    parts = []
    for positive, negative in itertools.product(POSITIVES, NEGATIVES):
        p, n = (panel.model_of(family, families) for family in (positive, negative))
        if p is not None and n is not None:
            part = _calibration(panel.losses[:, p], panel.losses[:, n], positive, negative)
            parts.append(part.assign(metric=panel.metrics))
    if not parts:
        return pd.DataFrame(columns=CALIBRATION)
    return with_metric_facts(pd.concat(parts, ignore_index=True)).assign(**panel.keys)[CALIBRATION]


def _calibration(better: np.ndarray, worse: np.ndarray, positive: str, negative: str) -> pd.DataFrame:
    """Return a row per metric on the losses of a positive and a negative reference, (K, S, P) each."""
    gain = worse - better
    useless = np.where(np.isnan(gain), np.nan, worse)
    n, range_, worst = n_perturbations(gain), mean(gain), mean(useless)
    drf = np.where(worst > 0, _ratio(range_, worst), np.nan)
    low, high = interval(_ratio(resampled_means(gain), resampled_means(useless)), np.where(worst > 0, n, 0))
    bds = _share_won(gain)
    bds_low, bds_high = share_interval(bds, n)
    is_ordered = (bds_low > 0.5) & (drf > 0) & (low > 0)
    reasons = [
        "" if is_ordered[k] else _why_not(n[k], range_[k], bds_low[k], positive, negative) for k in range(len(gain))
    ]
    return pd.DataFrame(
        {
            "positive": positive,
            "negative": negative,
            "drf": drf,
            "drf_low": low,
            "drf_high": high,
            "bds": bds,
            "bds_low": bds_low,
            "bds_high": bds_high,
            "n_perturbations": n,
            "verdict": np.where(is_ordered, DISTINGUISHES, CANNOT_DISTINGUISH).astype(object),
            "reason": reasons,
        }
    )


def _why_not(n: int, gain: float, bds_low: float, positive: str, negative: str) -> str:
    """Return why a metric does not distinguish two references, in words."""
    if n < MIN_PERTURBATIONS:
        return f"defined for {n} perturbations; fewer than {MIN_PERTURBATIONS} are too few"
    if gain < 0:
        return f"{positive} scores worse than {negative}"
    if bds_low <= 0.5:
        return f"{positive} does not beat {negative} on more perturbations than by chance"
    return f"the mean gain of {positive} over {negative} is within its interval of zero"


def with_metric_facts(table: pd.DataFrame) -> pd.DataFrame:
    """Add the family of each row's metric, and whether it is a headline metric."""
    metrics = [METRICS[metric] for metric in table["metric"]]
    return table.assign(
        metric_family=[metric.family for metric in metrics], headline=[metric.headline for metric in metrics]
    )


# --- one model against another --------------------------------------------------------------------------------------


def _ranked_baselines(panel: Panel, families: dict[str, str]) -> dict[str, list[int]]:
    """Return metric → positions of the baselines, best first, without those that predict fewer perturbations."""
    baselines = [i for i, model in enumerate(panel.models) if FAMILIES[families[model]].kind == "baseline"]
    ranked = {}
    for metric, losses in zip(panel.metrics, panel.losses[:, baselines], strict=True):
        means, n = mean(losses), n_perturbations(losses)
        ranked[metric] = [baselines[i] for i in np.argsort(means, kind="stable") if n[i] == n.max() > 0]
    return ranked


def ways(
    panel: Panel, families: dict[str, str], losses: np.ndarray, estimated: Callable[[np.ndarray], Estimates] = estimate
) -> np.ndarray:
    """Return the loss of no change minus that of the ceiling, (metrics,).

    It is NaN where one of the two is missing, or the ceiling is not shown to be better.

    Parameters
    ----------
    losses
        Of the panel, (..., metrics, models, seeds, perturbations).
    estimated
        (..., metrics, seeds, perturbations) → means with their intervals.
    """
    floor, ceiling = (panel.model_of(family, families) for family in PRIMARY)
    if floor is None or ceiling is None:
        return np.full(len(panel.metrics), np.nan)
    found = estimated(losses[..., floor, :, :] - losses[..., ceiling, :, :])
    return np.where(found.sign > 0, found.mean, np.nan)


def words(found: Estimates, margin: float) -> np.ndarray:
    """Return a word per interval of a difference: it is beyond a margin, within it, or neither."""
    word = np.select(
        [
            found.n < MIN_PERTURBATIONS,
            found.low > margin,
            found.high < -margin,
            (found.low >= -margin) & (found.high <= margin),
        ],
        [TOO_FEW, BETTER, WORSE, LEVEL],
        UNDECIDED,
    )
    return word.astype(object)


def _gains(losses: np.ndarray, resampled: np.ndarray, other: int) -> tuple[Estimates, np.ndarray]:
    """Return the mean gains of all models over another one with their intervals, and the shares of perturbations won.

    Parameters
    ----------
    losses
        Of one metric, (M, S, P).
    resampled
        Their means in all resamples, (M, resamples).
    """
    gain = losses[other] - losses
    means = resampled[other] - resampled
    # Only models with other missing values rest on other perturbations.
    missing = np.isnan(losses)
    is_other = (missing != missing[other]).any(axis=(1, 2))
    means[is_other] = resampled_means(gain[is_other])
    n = n_perturbations(gain)
    return Estimates(mean(gain), *interval(means, n), n), _share_won(gain)


def compare(panel: Panel, families: dict[str, str], least_difference: float) -> pd.DataFrame:
    """Return one row per metric × model × baseline or ablation: the paired difference, on perturbations of both.

    difference is the mean over perturbations and seeds of the baseline's loss minus the model's: above zero the model
    is better. Seeds are paired by number. is_best_baseline marks the baseline with the lowest mean loss, among the
    others where the model is a baseline itself.

    A difference counts from margin on: least_difference times the way from no change to the ceiling (`PRIMARY`) by
    this metric on these data. The model is better with its whole interval above the margin, worse with it below minus
    the margin, level with it between the two. These are two one-sided tests of equivalence at 2.5 % each (Schuirmann
    1987). share is the difference in units of the way. Without a way the margin is 0.
    """
    kinds = [FAMILIES[families[model]].kind for model in panel.models]
    others = [i for i, kind in enumerate(kinds) if kind in ("baseline", "ablation")]
    ranked = _ranked_baselines(panel, families)
    models = {"model": panel.models, "family": [families[model] for model in panel.models], "kind": kinds}
    parts = []
    for metric, losses, way in zip(panel.metrics, panel.losses, ways(panel, families, panel.losses), strict=True):
        margin = np.nan_to_num(least_difference * way)
        resampled = resampled_means(losses)
        best = [next((i for i in ranked[metric] if i != m), None) for m in range(len(panel.models))]
        for other in others:
            found, won = _gains(losses, resampled, other)
            baseline = panel.models[other]
            part = {
                **models,
                "baseline": baseline,
                "baseline_family": families[baseline],
                "baseline_kind": kinds[other],
                "is_best_baseline": [i == other for i in best],
                "difference": found.mean,
                "ci_low": found.low,
                "ci_high": found.high,
                "margin": margin,
                "share": found.mean / way,
                "share_low": found.low / way,
                "share_high": found.high / way,
                "win_rate": won,
                "n_perturbations": found.n,
                "verdict": words(found, margin),
            }
            parts.append(pd.DataFrame({"metric": metric, **part}).drop(index=other))
    table = pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=COMPARISONS)
    table = with_metric_facts(table).assign(**panel.keys)[COMPARISONS]
    return table.astype({"headline": bool, "is_best_baseline": bool})  # in an empty table, too


# --- strata ---------------------------------------------------------------------------------------------------------


def _bins(values: pd.Series) -> pd.Series:
    """Return low, (middle,) high: thirds of nine perturbations or more, else halves, so that a bin holds three.

    Equal values share a bin. If that leaves one bin, there is nothing to compare, and all are NaN.
    """
    n = values.notna().sum()
    codes = pd.Series(np.nan, index=values.index)
    if n >= MIN_PERTURBATIONS:
        codes = pd.qcut(values, 3 if n >= 9 else 2, labels=False, duplicates="drop")
    return codes.map(dict(enumerate(BINS.get(codes.nunique(), ()))))


def stratify(panel: Panel, families: dict[str, str]) -> pd.DataFrame:
    """Return one row per model × headline metric × stratum: the mean over its perturbations, with the interval.

    Thirds (halves below nine perturbations) divide reliability, effect_size, n_cells and efficacy (how far the
    perturbed gene itself changed), since the useful thresholds differ from screen to screen. The other strata are
    members_seen (the number of perturbed genes that training knew alone), n_sources (the number of contexts that
    training has the perturbation in, where contexts are held out) and responds (whether the perturbation does
    anything, by the energy distance to controls). from and to bound the bin.
    """
    facts = panel.perturbations
    binned = {name: _bins(facts[name]) for name in ("reliability", "effect_size", "n_cells", "efficacy")}
    is_known = facts["members_seen"].notna()
    words = [f"{seen:.0f} of {n:.0f}" for seen, n in zip(facts["members_seen"], facts["n_members"], strict=True)]
    binned["members_seen"] = pd.Series(words, index=facts.index).where(is_known)
    sources = facts["n_sources"].clip(upper=3).map({0.0: "0", 1.0: "1", 2.0: "2", 3.0: "3 or more"})
    binned["n_sources"] = sources if len(sources.dropna().unique()) > 1 else pd.Series(np.nan, index=facts.index)
    binned["responds"] = facts["responds"].map({1.0: "responds", 0.0: "like controls"})
    headlines = [k for k, metric in enumerate(panel.metrics) if METRICS[metric].headline]
    parts = []
    for stratum, bins in binned.items():
        for name in sorted(bins.dropna().unique(), key=None if stratum in WORDED else list(BINS[3]).index):
            columns = np.flatnonzero(bins == name)
            values = panel.values[headlines][..., columns]
            found = estimate(values.reshape(-1, *values.shape[2:]))
            index = pd.MultiIndex.from_product(
                [[panel.metrics[k] for k in headlines], panel.models], names=["metric", "model"]
            )
            limits = facts[stratum].iloc[columns]
            part = {
                "stratum": stratum,
                "bin": name,
                "from": limits.min(),
                "to": limits.max(),
                "value": found.mean,
                "ci_low": found.low,
                "ci_high": found.high,
                "n_perturbations": found.n,
            }
            parts.append(pd.DataFrame(part, index=index).reset_index())
    table = pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=STRATA)
    table["metric_family"] = [METRICS[metric].family for metric in table["metric"]]
    table["family"] = table["model"].map(families)
    table["kind"] = [FAMILIES[family].kind for family in table["family"]]
    return table.assign(**panel.keys)[STRATA]
