"""The tables of one dataset × split: summary, calibration, comparisons and strata."""

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
from perturbflow.registry.families import FAMILIES

# Families that scales and calibrations refer to.
FLOORS = ("no_change", "perturbed_mean", "additive", "matching_mean", "transfer", "dose_interpolation")
CEILINGS = ("perfect_mean", "technical_duplicate", "interpolated_duplicate")
PRIMARY = ("no_change", "perfect_mean")
POSITIVES = (
    "technical_duplicate",
    "interpolated_duplicate",
)  # real predictions: whether a metric can tell is asked of these
NEGATIVES = ("no_change", "perturbed_mean")

# Columns, in the order of the files.
SUMMARY_KEYS = ["dataset", "split", "model", "seed", "metric", "value", "ci_low", "ci_high", "n_perturbations", "better",
                "metric_family", "headline", "family", "kind", "is_best_baseline"]  # fmt: skip
CALIBRATION = ["dataset", "split", "metric", "metric_family", "headline", "positive", "negative", "drf", "drf_low", "drf_high",
               "bds", "bds_low", "bds_high", "n_perturbations", "verdict", "reason"]  # fmt: skip
COMPARISONS = ["dataset", "split", "metric", "metric_family", "headline", "model", "family", "kind", "baseline", "baseline_family",
               "baseline_kind", "is_best_baseline", "difference", "ci_low", "ci_high", "margin", "share", "share_low", "share_high",
               "win_rate", "n_perturbations", "verdict"]  # fmt: skip
STRATA = ["dataset", "split", "metric", "metric_family", "model", "family", "kind", "stratum", "bin", "from", "to",
          "value", "ci_low", "ci_high", "n_perturbations"]  # fmt: skip

BETTER, LEVEL, WORSE, UNDECIDED, TOO_FEW = "better", "level", "worse", "undecided", "too few"  # differences
WORDED = ("members_seen", "responds")  # strata with words for bins, not ranges
BINS = {2: ("low", "high"), 3: ("low", "middle", "high")}
DISTINGUISHES, CANNOT_DISTINGUISH = "tells", "cannot tell"


def _share_won(gain: np.ndarray) -> np.ndarray:
    """Return the share of gains above zero, ties counting half, (N, S, P) → (N,)."""
    return mean(np.where(np.isnan(gain), np.nan, (np.sign(gain) + 1) / 2))


def _ratio(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return a / b, NaN where b is zero."""
    return np.divide(a, b, out=np.full(np.shape(a), np.nan), where=b != 0)


# --- means, raw and scaled ------------------------------------------------------------------------------------------


def _scaled(losses: np.ndarray, floor: int, ceiling: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return s of every row of (K, M, S, P) and what its interval is computed from.

    Returns
    -------
    s
        (K·M,); NaN for metrics by which the ceiling cannot be told to be better than the floor.
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


def summarize(panel: Panel, families: dict[str, str]) -> pd.DataFrame:
    """Return one row per model × seed × metric: the mean over perturbations, raw and scaled, with 95 % intervals.

    scaled_{b}_{r} is s = (u − b)/(r − b) on mean losses over the perturbations that all three are defined for, of
    the same seed: 0 as good as b, 1 as good as r, never clipped. It is NaN where b or r is not among the runs, and
    where r cannot be told to be better than b: then there is no scale. scaled_ci_low and scaled_ci_high belong to the
    pair PRIMARY.
    """
    parts = []
    for s, seed in enumerate(panel.seeds):
        values, losses = panel.values[:, :, s, None], panel.losses[:, :, s, None]
        means = estimate(values.reshape(-1, *values.shape[2:]))
        columns = {"value": means.mean, "ci_low": means.low, "ci_high": means.high, "n_perturbations": means.n}
        low = high = np.full(len(means.n), np.nan)
        for floor in FLOORS:
            for ceiling in CEILINGS:
                scaled = np.full(len(means.n), np.nan)
                b, r = (panel.model_of(family, families) for family in (floor, ceiling))
                if b is not None and r is not None:
                    scaled, gain, whole = _scaled(losses, b, r)
                    if (floor, ceiling) == PRIMARY:
                        low, high = interval(
                            _ratio(resampled_means(gain), resampled_means(whole)), n_perturbations(gain)
                        )
                columns[f"scaled_{floor}_{ceiling}"] = scaled
        columns |= {"scaled_ci_low": low, "scaled_ci_high": high}
        index = pd.MultiIndex.from_product([panel.metrics, panel.models], names=["metric", "model"])
        parts.append(pd.DataFrame(columns, index=index).reset_index().assign(seed=seed))
    table = pd.concat(parts)
    table["better"] = [METRICS[metric].direction for metric in table["metric"]]
    table["metric_family"] = [METRICS[metric].family for metric in table["metric"]]
    table["headline"] = [METRICS[metric].headline for metric in table["metric"]]
    table["family"] = table["model"].map(families)
    table["kind"] = [FAMILIES[family].kind for family in table["family"]]
    best = {metric: ranked[0] for metric, ranked in _ranked_baselines(panel, families).items() if ranked}
    table["is_best_baseline"] = [panel.models.index(row.model) == best.get(row.metric) for row in table.itertuples()]
    in_order = pd.MultiIndex.from_product([panel.models, panel.seeds, panel.metrics], names=["model", "seed", "metric"])
    table = table.set_index(in_order.names).loc[in_order].reset_index().assign(**panel.keys)
    return table[list(dict.fromkeys([*SUMMARY_KEYS, *table.columns]))]


# --- what a metric can tell -----------------------------------------------------------------------------------------


def calibrate(panel: Panel, families: dict[str, str]) -> pd.DataFrame:
    """Return one row per metric × positive control × negative control: what this metric can tell on these data.

    drf is the dynamic range fraction (pos − neg)/(perfect − neg) (Miller et al. 2025) on mean losses, not clipped.
    bds is the share of perturbations for which the positive control beats the negative (scPertEval 2026), ties counting
    half, with an exact interval. A metric tells one from the other where both intervals lie above what chance gives, 0
    and 0.5.
    """
    rows = []
    for positive in POSITIVES:
        for negative in NEGATIVES:
            p, n = (panel.model_of(family, families) for family in (positive, negative))
            if p is None or n is None:
                continue
            gain = panel.losses[:, n] - panel.losses[:, p]  # (K, S, P)
            useless = np.where(np.isnan(gain), np.nan, panel.losses[:, n])
            size, range_, worst = n_perturbations(gain), mean(gain), mean(useless)
            drf = np.where(worst > 0, _ratio(range_, worst), np.nan)
            low, high = interval(_ratio(resampled_means(gain), resampled_means(useless)), np.where(worst > 0, size, 0))
            bds = _share_won(gain)
            bds_low, bds_high = share_interval(bds, size)
            is_ordered = (bds_low > 0.5) & (drf > 0) & (low > 0)
            for k, metric in enumerate(panel.metrics):
                rows.append(
                    {
                        **panel.keys,
                        "metric": metric,
                        "metric_family": METRICS[metric].family,
                        "headline": METRICS[metric].headline,
                        "positive": positive,
                        "negative": negative,
                        "drf": drf[k],
                        "drf_low": low[k],
                        "drf_high": high[k],
                        "bds": bds[k],
                        "bds_low": bds_low[k],
                        "bds_high": bds_high[k],
                        "n_perturbations": size[k],
                        "verdict": DISTINGUISHES if is_ordered[k] else CANNOT_DISTINGUISH,
                        "reason": "" if is_ordered[k] else _why_not(size[k], range_[k], bds_low[k], positive, negative),
                    }
                )
    return pd.DataFrame(rows, columns=CALIBRATION)


def _why_not(n: int, gain: float, bds_low: float, positive: str, negative: str) -> str:
    """Return why a metric cannot tell, in words."""
    if n < MIN_PERTURBATIONS:
        return f"defined for {n} perturbations; fewer than {MIN_PERTURBATIONS} tell nothing"
    if gain < 0:
        return f"{positive} scores worse than {negative}"
    if bds_low <= 0.5:
        return f"{positive} does not beat {negative} on more perturbations than by chance"
    return f"the mean gain of {positive} over {negative} is within its interval of zero"


# --- one model against another --------------------------------------------------------------------------------------


def _ranked_baselines(panel: Panel, families: dict[str, str]) -> dict[str, list[int]]:
    """Return metric → positions of the baselines, best first; one that predicts fewer perturbations than another is left out."""
    baselines = [i for i, model in enumerate(panel.models) if FAMILIES[families[model]].kind == "baseline"]
    ranked = {}
    for metric, losses in zip(panel.metrics, panel.losses[:, baselines], strict=True):
        means, n = mean(losses), n_perturbations(losses)
        ranked[metric] = [baselines[i] for i in np.argsort(means, kind="stable") if n[i] == n.max() > 0]
    return ranked


def _ways(panel: Panel, families: dict[str, str]) -> np.ndarray:
    """Return the loss of no change minus that of the ceiling, (metrics,); NaN where the ceiling cannot be told to be better, or one is missing."""
    floor, ceiling = (panel.model_of(family, families) for family in PRIMARY)
    if floor is None or ceiling is None:
        return np.full(len(panel.metrics), np.nan)
    found = estimate(panel.losses[:, floor] - panel.losses[:, ceiling])
    return np.where(found.sign > 0, found.mean, np.nan)


def _words(found: Estimates, margin: float) -> np.ndarray:
    """Return what the intervals of differences show: all beyond a margin, all within it, or neither."""
    words = np.select(
        [
            found.n < MIN_PERTURBATIONS,
            found.low > margin,
            found.high < -margin,
            (found.low >= -margin) & (found.high <= margin),
        ],
        [TOO_FEW, BETTER, WORSE, LEVEL],
        UNDECIDED,
    )
    return words.astype(object)


def compare(panel: Panel, families: dict[str, str], least_difference: float) -> pd.DataFrame:
    """Return one row per metric × model × baseline or ablation: the paired difference, on perturbations that both predict.

    difference is the mean over perturbations and seeds of the reference's loss minus the model's: above zero the model
    is better. Seeds are paired by number. is_best_baseline marks the baseline with the lowest mean loss, among the
    other ones where the model is a baseline itself.

    A difference counts from margin on: least_difference times the way from no change to the ceiling (`PRIMARY`) by this
    metric on these data. With its whole interval above the margin the model is better, below minus the margin worse,
    between the two level: two one-sided tests of equivalence at 2.5 % each (Schuirmann 1987). share is the difference
    in units of the way. Without a way the margin is 0.
    """
    kinds = [FAMILIES[families[model]].kind for model in panel.models]
    references = [i for i, kind in enumerate(kinds) if kind in ("baseline", "ablation")]
    ranked = _ranked_baselines(panel, families)
    parts = []
    for metric, losses, way in zip(panel.metrics, panel.losses, _ways(panel, families), strict=True):
        margin = np.nan_to_num(least_difference * way)
        resampled = resampled_means(losses)
        missing = np.isnan(losses)
        for reference in references:
            gain = losses[reference] - losses  # (M, S, P)
            means = resampled[reference] - resampled
            is_other = (missing != missing[reference]).any(
                axis=(1, 2)
            )  # only there the means rest on other perturbations
            means[is_other] = resampled_means(gain[is_other])
            n = n_perturbations(gain)
            found = Estimates(mean(gain), *interval(means, n), n)
            best = [next((i for i in ranked[metric] if i != m), None) for m in range(len(panel.models))]
            part = {
                "model": panel.models,
                "family": [families[model] for model in panel.models],
                "kind": kinds,
                "baseline": panel.models[reference],
                "baseline_family": families[panel.models[reference]],
                "baseline_kind": kinds[reference],
                "is_best_baseline": [i == reference for i in best],
                "difference": found.mean,
                "ci_low": found.low,
                "ci_high": found.high,
                "margin": margin,
                "share": found.mean / way,
                "share_low": found.low / way,
                "share_high": found.high / way,
                "win_rate": _share_won(gain),
                "n_perturbations": n,
                "verdict": _words(found, margin),
            }
            parts.append(pd.DataFrame({"metric": metric, **part}).drop(index=reference))
    table = pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=COMPARISONS)
    table["metric_family"] = [METRICS[metric].family for metric in table["metric"]]
    table["headline"] = [METRICS[metric].headline for metric in table["metric"]]
    return table.assign(**panel.keys)[COMPARISONS].astype(
        {"headline": bool, "is_best_baseline": bool}
    )  # in an empty table, too


# --- strata ---------------------------------------------------------------------------------------------------------


def _bins(values: pd.Series) -> pd.Series:
    """Return low, (middle,) high: thirds of nine perturbations or more, else halves, so that a bin holds three.

    Equal values share a bin; where that leaves one bin there is nothing to compare, and all are NaN.
    """
    n = values.notna().sum()
    codes = pd.Series(np.nan, index=values.index)
    if n >= MIN_PERTURBATIONS:
        codes = pd.qcut(values, 3 if n >= 9 else 2, labels=False, duplicates="drop")
    return codes.map(dict(enumerate(BINS.get(codes.nunique(), ()))))


def stratify(panel: Panel, families: dict[str, str]) -> pd.DataFrame:
    """Return one row per model × headline metric × stratum: the mean over the perturbations of one kind, and its interval.

    Strata are thirds (halves below nine perturbations) by reliability, effect_size, n_cells and efficacy (how far the
    perturbed gene itself changed), since the useful thresholds differ from screen to screen; members_seen, how many of
    the perturbed genes training knew alone; and responds, whether the perturbation does anything (energy distance to
    controls). from and to bound the bin.
    """
    facts = panel.perturbations
    binned = {name: _bins(facts[name]) for name in ("reliability", "effect_size", "n_cells", "efficacy")}
    is_known = facts["members_seen"].notna()
    words = [f"{seen:.0f} of {n:.0f}" for seen, n in zip(facts["members_seen"], facts["n_members"], strict=True)]
    binned["members_seen"] = pd.Series(words, index=facts.index).where(is_known)
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
            part = {"stratum": stratum, "bin": name, "from": limits.min(), "to": limits.max(),
                    "value": found.mean, "ci_low": found.low, "ci_high": found.high, "n_perturbations": found.n}  # fmt: skip
            parts.append(pd.DataFrame(part, index=index).reset_index())
    table = pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=STRATA)
    table["metric_family"] = [METRICS[metric].family for metric in table["metric"]]
    table["family"] = table["model"].map(families)
    table["kind"] = [FAMILIES[family].kind for family in table["family"]]
    return table.assign(**panel.keys)[STRATA]
