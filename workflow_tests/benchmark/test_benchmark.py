"""The tables of the benchmark: known answers, planted cases, and intervals that cover what they say."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.stats import t

from perturbflow.benchmark import benchmark
from perturbflow.benchmark.across_contexts import across_contexts
from perturbflow.benchmark.panel import Panel, panels, panels_of_contexts
from perturbflow.benchmark.tables import calibrate, compare, stratify, summarize
from perturbflow.benchmark.verdicts import RANK, judge, outcome
from perturbflow.errors import InputError
from perturbflow.evaluation import METRICS, Metric, bootstrap
from perturbflow.evaluation.bootstrap import (
    MIN_PERTURBATIONS,
    estimate,
    estimate_over_contexts,
    resampled_means,
    share_interval,
)
from perturbflow.registry.families import FAMILIES, Family

TABLES = ("benchmark", "calibration", "comparisons", "strata", "verdicts", "contexts")
KINDS = {
    "no_change": "baseline", "perturbed_mean": "baseline", "additive": "baseline", "gaussian_process": "baseline",
    "shuffled_labels": "ablation",
    "technical_duplicate": "ceiling", "interpolated_duplicate": "ceiling", "perfect_mean": "ceiling",
    "context_mean": "ceiling",
    "learned": "learned", "rival": "learned",
}  # fmt: skip
N = 20
RNG = np.random.default_rng(0)
HARD = RNG.uniform(0.5, 1.5, N)  # how hard each perturbation is, for all models alike


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Know families and metrics of every kind, whatever the version; each model here is named after its family."""
    for name, kind in KINDS.items():
        monkeypatch.setitem(FAMILIES, name, Family(f"none:{name}", kind))
    real = dict(METRICS)
    METRICS.clear()
    made = [("loss", "error", "lower", 0.0, True), ("score", "effect", "higher", 1.0, True),
            (RANK, "ranking", "lower", 0.0, True),
            ("width", "distribution", "target", 1.0, False)]  # fmt: skip
    for name, family, direction, perfect, headline in made:
        metric = Metric(name=name, function=lambda _: None, family=family, formula="", source="", direction=direction,
                        unit="",
                        range=(-np.inf, np.inf), needs="pseudobulk", perfect=perfect, useless=None,
                        headline=headline)  # fmt: skip
        METRICS[name] = metric
    yield
    METRICS.clear()
    METRICS.update(real)  # in their order


def scores(
    losses: dict[str, object], metric: str = "loss", split: str = "s", labels: list[str] | None = None, **facts: object
) -> pd.DataFrame:
    """Return rows of metrics.tsv: per model its losses, (P,) or (seeds, P), turned into values of the metric."""
    parts = []
    for model, of_model in losses.items():
        for seed, row in enumerate(np.atleast_2d(np.asarray(of_model, dtype=float))):
            value = {"lower": row, "higher": 1.0 - row, "target": 1.0 + row}[METRICS[metric].direction]
            part = {"dataset": "d", "split": split, "model": model, "seed": seed,
                    "perturbation": labels or [f"P{i}" for i in range(len(row))],
                    "n_members": 1, "members_seen": 0, "n_cells": 50, "reliability": np.nan, "effect_size": np.nan,
                    "metric": metric,
                    **facts, "value": value}  # fmt: skip
            parts.append(pd.DataFrame(part))
    return pd.concat(parts, ignore_index=True)


def panel(*tables: pd.DataFrame) -> Panel:
    """Return the panel of one dataset × split."""
    (only,) = panels(pd.concat(tables, ignore_index=True))
    return only


FAMILY_OF = {name: name for name in KINDS}
LEAST = 0.02


def compared(*tables: pd.DataFrame, least_difference: float = LEAST) -> pd.DataFrame:
    """Return every model against every baseline and ablation of one dataset × split."""
    return compare(panel(*tables), FAMILY_OF, least_difference)


def verdicts(*tables: pd.DataFrame, least_difference: float = LEAST, caveats: tuple[str, ...] = ()) -> pd.DataFrame:
    """Return the verdicts of one dataset × split, by model."""
    here = panel(*tables)
    compared = compare(here, FAMILY_OF, least_difference)
    return judge(summarize(here, FAMILY_OF), calibrate(here, FAMILY_OF), compared, least_difference, caveats).set_index(
        "model"
    )


def twice(losses: dict[str, object]) -> list[pd.DataFrame]:
    """Return the same losses by two metrics: on one alone no model is ranked."""
    return [scores(losses, metric) for metric in ("loss", "score")]


def around(mean: float, spread: float = 0.05, seed: int = 1) -> np.ndarray:
    """Return losses that share what is hard and have noise of their own."""
    return mean * HARD + np.random.default_rng(seed).normal(0, spread, N)


FLOOR, CEILING = (
    {"no_change": around(1.0, seed=2)},
    {"technical_duplicate": around(0.2, seed=3), "perfect_mean": around(0.2, seed=3)},
)


# --- the bootstrap --------------------------------------------------------------------------------------------------


def test_resamples_are_drawn_and_summed_some_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).normal(size=(3, 2, 40))
    values[1, 0, 3] = np.nan
    whole = resampled_means(values)
    rng, n = np.random.default_rng(0), 40
    times = np.stack([np.bincount(row, minlength=n) for row in rng.integers(0, n, (bootstrap.N_RESAMPLES, n))])
    np.testing.assert_allclose(resampled_means(values[:1, :1]), values[:1, 0] @ times.T / n, rtol=0, atol=1e-12)
    monkeypatch.setattr(bootstrap, "RESAMPLES_AT_ONCE", 333)
    bootstrap._times_sampled.cache_clear()
    np.testing.assert_allclose(resampled_means(values), whole, rtol=0, atol=1e-12)
    bootstrap._times_sampled.cache_clear()


@pytest.mark.parametrize("n", [6, 12, 40])
def test_intervals_cover_the_mean_as_often_as_they_say(n: int) -> None:
    values = (
        np.random.default_rng(0).exponential(1.0, (600, 1, n))
        if n == 40
        else np.random.default_rng(0).normal(1.0, 1.0, (600, 1, n))
    )
    found = estimate(values)
    covered = ((found.low <= 1.0) & (found.high >= 1.0)).mean()
    assert 0.92 <= covered <= 0.975


def test_intervals_narrow_with_perturbations_and_are_about_the_standard_error() -> None:
    rng = np.random.default_rng(0)
    widths = []
    for n in (10, 100, 1000):
        values = rng.normal(size=(1, 1, n))
        found = estimate(values)
        widths.append(float(found.high[0] - found.low[0]))
        if n >= 100:
            assert widths[-1] == pytest.approx(2 * 1.96 * values.std(ddof=1) / np.sqrt(n), rel=0.1)
    assert widths[0] > widths[1] > widths[2]


def test_what_is_missing_is_not_drawn_and_does_not_count() -> None:
    values = np.random.default_rng(0).normal(size=(1, 1, 20))
    longer = np.concatenate([values, np.full((1, 1, 5), np.nan)], axis=2)
    assert estimate(longer).low == estimate(values).low
    assert estimate(longer).n.tolist() == [20]
    for few in ([1.0], [np.nan, 1.0], [np.nan, np.nan]):
        assert np.isnan([estimate(np.array([[few]])).low, estimate(np.array([[few]])).high]).all()


def test_all_rows_get_the_same_draws() -> None:
    values = np.random.default_rng(0).normal(size=(1, 2, 15))
    both = resampled_means(np.concatenate([values, values + 1.0]))
    assert np.allclose(both[1] - both[0], 1.0)


def test_seeds_are_resampled_where_there_are_several() -> None:
    seeds = np.random.default_rng(0).normal(0, 1.0, 5)
    values = np.tile(seeds[:, None], (1, 30))[None]  # perturbations agree, seeds do not
    found = estimate(values)
    assert found.high - found.low > 1.5 * seeds.std()
    assert estimate(values[:, :1]).high == pytest.approx(estimate(values[:, :1]).low)


def test_a_seed_that_lacks_some_perturbations_is_weighed_by_what_it_has() -> None:
    values = np.ones((1, 3, 8))
    values[0, 1, :6] = np.nan
    values[0, 2] = np.nan
    found = estimate(values)
    assert (found.mean, found.low, found.high) == (1.0, 1.0, 1.0)
    assert found.n == 8


def test_shares_of_few_perturbations_have_wide_intervals_even_if_all_agree() -> None:
    low, high = share_interval(np.array([1.0, 1.0, 0.5, 0.0]), np.array([5, 6, 10, 6]))
    assert low[0] < 0.5 < low[1]
    assert low[2] < 0.5 < high[2]
    assert (low[3], high[0]) == (0.0, 1.0)
    assert high[3] == pytest.approx(1 - low[1])


# --- means, raw and scaled ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["loss", "score", "width"])
def test_the_scale_is_zero_at_the_baseline_one_at_the_ceiling_and_linear_between(metric: str) -> None:
    floor, ceiling = FLOOR["no_change"], np.abs(CEILING["technical_duplicate"])
    models = {
        **FLOOR,
        "perfect_mean": ceiling,
        "technical_duplicate": 0.5 * (floor + ceiling),
        "learned": 0.75 * floor + 0.25 * ceiling,
        "rival": 2 * floor - ceiling,
    }
    table = summarize(panel(scores(models, metric)), FAMILY_OF).set_index("model")
    scaled = table["scaled_no_change_perfect_mean"]
    assert scaled.to_dict() == pytest.approx(
        {"no_change": 0.0, "perfect_mean": 1.0, "technical_duplicate": 0.5, "learned": 0.25, "rival": -1.0}
    )
    assert table.loc["learned", "scaled_no_change_technical_duplicate"] == pytest.approx(0.5), (
        "a model may pass the duplicate's scale"
    )
    assert table.loc["learned", ["scaled_ci_low", "scaled_ci_high"]].tolist() == pytest.approx([0.25, 0.25])
    assert table["scaled_perturbed_mean_technical_duplicate"].isna().all(), "no perturbed_mean among the runs"
    assert table["scaled_no_change_interpolated_duplicate"].isna().all()


def test_there_is_no_scale_where_the_ceiling_is_not_told_from_the_baseline() -> None:
    for ceiling in (around(1.0, 0.5, seed=5), around(1.3, seed=5), FLOOR["no_change"]):
        table = summarize(panel(scores({**FLOOR, "perfect_mean": ceiling, "learned": around(0.5)})), FAMILY_OF)
        assert table.filter(like="scaled").isna().all(axis=None)


def test_the_scale_rests_on_what_all_three_are_defined_for() -> None:
    learned = 0.5 * (FLOOR["no_change"] + CEILING["technical_duplicate"])
    floor = FLOOR["no_change"].copy()
    learned[:3], floor[3:5] = np.nan, np.nan
    table = summarize(panel(scores({"no_change": floor, **CEILING, "learned": learned})), FAMILY_OF).set_index("model")
    assert table.loc["learned", "scaled_no_change_technical_duplicate"] == pytest.approx(0.5)
    assert table["n_perturbations"].to_dict() == {
        "no_change": 18,
        "technical_duplicate": 20,
        "perfect_mean": 20,
        "learned": 17,
    }


def test_one_row_per_run_and_metric_in_the_order_of_the_scores() -> None:
    tables = [
        scores({model: [[1.0, 3.0], [3.0, 5.0]]}, metric)
        for model in ("rival", "learned")
        for metric in ("loss", "score")
    ]
    table = summarize(panel(*tables), FAMILY_OF)
    assert table[["model", "seed", "metric"]].to_numpy().tolist() == [
        [model, seed, metric] for model in ("rival", "learned") for seed in (0, 1) for metric in ("loss", "score")
    ]
    assert table["value"].tolist() == [2.0, -1.0, 4.0, -3.0] * 2
    assert table["better"].tolist() == ["lower", "higher"] * 4
    assert table["kind"].unique().tolist() == ["learned"]


# --- what a metric can tell -----------------------------------------------------------------------------------------


def test_dynamic_range_and_share_of_wins_of_planted_scores() -> None:
    floor = np.full(N, 2.0)
    ceiling = np.array([0.5] * 16 + [2.0] * 2 + [3.0] * 2)
    table = calibrate(panel(scores({"no_change": floor, "technical_duplicate": ceiling})), FAMILY_OF)
    row = table.iloc[0]
    assert row["drf"] == pytest.approx((2.0 - ceiling.mean()) / 2.0)
    assert row["bds"] == pytest.approx((16 + 1) / 20)
    assert row["drf_low"] < row["drf"] < row["drf_high"]
    assert (row["verdict"], row["reason"]) == ("tells", "")


@pytest.mark.parametrize(
    ("ceiling", "n", "reason"),
    [
        (CEILING["technical_duplicate"], 5, "fewer than 6"),
        (around(1.5, seed=4), N, "scores worse"),
        (around(1.0, seed=4) - 0.001, N, "not beat no_change on more perturbations"),
        (FLOOR["no_change"] - np.where(np.arange(N) == 0, -14.9, 0.8), N, "within its interval of zero"),
    ],
)
def test_a_metric_that_cannot_tell_says_why(ceiling: np.ndarray, n: int, reason: str) -> None:
    (row,) = calibrate(
        panel(scores({"no_change": FLOOR["no_change"][:n], "technical_duplicate": ceiling[:n]})), FAMILY_OF
    ).itertuples()
    assert row.verdict == "cannot tell"
    assert reason in row.reason


@pytest.mark.filterwarnings("error")
def test_a_negative_control_that_is_perfect_leaves_no_range() -> None:
    (row,) = calibrate(
        panel(scores({"no_change": np.zeros(N), "technical_duplicate": np.zeros(N)})), FAMILY_OF
    ).itertuples()
    assert np.isnan([row.drf, row.drf_low, row.drf_high]).all()
    assert (row.bds, row.verdict) == (0.5, "cannot tell")


def test_every_pair_of_controls_among_the_runs_is_calibrated() -> None:
    models = {**FLOOR, "perturbed_mean": around(0.9), **CEILING, "interpolated_duplicate": around(0.15)}
    table = calibrate(panel(scores(models), scores(models, "score")), FAMILY_OF)
    assert len(table) == 2 * 4
    assert len(calibrate(panel(scores(FLOOR)), FAMILY_OF)) == 0


# --- differences ----------------------------------------------------------------------------------------------------


def test_differences_are_paired_and_above_zero_where_the_model_is_better() -> None:
    models = {"no_change": around(1.0, 0.02, seed=2), "learned": around(0.9, 0.02)}
    for metric in ("loss", "score", "width"):
        (row,) = compared(scores(models, metric)).itertuples()
        assert row.difference == pytest.approx((models["no_change"] - models["learned"]).mean())
        assert row.ci_low < row.difference < row.ci_high
        assert row.verdict == "better"
    alone = estimate(np.stack([values[None] for values in models.values()]))
    assert row.ci_high - row.ci_low < 0.5 * (alone.high - alone.low).min(), "what is hard for both cancels"
    assert alone.low[0] < alone.high[1], "the intervals of the means overlap all the same"


def test_the_win_rate_counts_ties_half_and_missing_ones_not_at_all() -> None:
    learned = FLOOR["no_change"] + np.array([-1.0] * 9 + [0.0] * 4 + [1.0] * 5 + [np.nan] * 2)
    (row,) = compared(scores({**FLOOR, "learned": learned})).itertuples()
    assert row.win_rate == pytest.approx((9 + 2) / 18)
    assert row.n_perturbations == 18


def test_differences_under_missing_scores_are_those_of_the_common_perturbations() -> None:
    learned, floor = around(0.8), FLOOR["no_change"].copy()
    learned[:4], floor[3:6] = np.nan, np.nan
    rows = compared(scores({"no_change": floor, "learned": learned}))
    common = compared(scores({"no_change": floor[6:], "learned": learned[6:]}))
    columns = ["difference", "ci_low", "ci_high", "win_rate", "n_perturbations"]
    assert rows[columns].to_numpy() == pytest.approx(common[columns].to_numpy())


def test_seeds_are_paired_and_widen_the_interval() -> None:
    shift = np.array([[-0.3], [0.0], [0.3]])
    floor = np.tile(FLOOR["no_change"], (3, 1))
    rows = compared(
        scores({"no_change": floor + shift, "learned": floor + shift - 0.1, "rival": floor - 0.1})
    ).set_index("model")
    assert rows.loc["learned", ["ci_low", "ci_high"]].tolist() == pytest.approx([0.1, 0.1]), (
        "what a seed does to both cancels"
    )
    assert rows.loc["rival", "difference"] == pytest.approx(0.1)
    assert rows.loc["rival", "verdict"] == "undecided"


def test_the_best_baseline_is_the_best_other_one_that_predicts_as_many_perturbations() -> None:
    partial = around(0.1)
    partial[:5] = np.nan
    models = {
        **FLOOR,
        "additive": around(0.5),
        "perturbed_mean": partial,
        "shuffled_labels": around(0.3),
        "learned": around(0.4),
    }
    here = panel(scores(models))
    rows = compare(here, FAMILY_OF, LEAST)
    best = rows[rows["is_best_baseline"]].set_index("model")["baseline"].to_dict()
    assert best == {"no_change": "additive", "additive": "no_change", "perturbed_mean": "additive",
                    "shuffled_labels": "additive",
                    "learned": "additive"}  # fmt: skip
    summary = summarize(here, FAMILY_OF)
    assert summary.loc[summary["is_best_baseline"], "model"].tolist() == ["additive"]
    assert set(rows["baseline"]) == {"no_change", "additive", "perturbed_mean", "shuffled_labels"}, (
        "baselines and ablations"
    )


WAY = {
    "no_change": HARD * 1.0,
    "perfect_mean": HARD * 0.0,
    "technical_duplicate": HARD * 0.1,
}  # from 1 to 0, on average


def shifted(share: float, spread: float) -> np.ndarray:
    """Return losses that lie a share of the way below those of no change, by ± spread of the way in turns."""
    return WAY["no_change"] - HARD.mean() * (share + spread * np.where(np.arange(N) % 2, 1, -1))


@pytest.mark.parametrize(
    ("share", "spread", "word"),
    [
        (0.10, 0.01, "better"), (-0.10, 0.01, "worse"), (0.10, 0.5, "undecided"), (0.0, 0.5, "undecided"),
        (0.0, 0.01, "level"),
        (0.01, 0.001, "level"), (0.02, 0.01, "undecided"), (-0.02, 0.01, "undecided"), (0.003, 0.0001, "level"),
    ],
)  # fmt: skip
def test_a_difference_counts_from_a_share_of_the_way_on(share: float, spread: float, word: str) -> None:
    (row,) = compared(scores({**WAY, "learned": shifted(share, spread)})).query("model == 'learned'").itertuples()
    assert row.verdict == word
    assert row.margin == pytest.approx(LEAST * HARD.mean())
    assert row.share == pytest.approx(share)
    assert (row.share_low, row.share_high) == pytest.approx((row.ci_low / HARD.mean(), row.ci_high / HARD.mean()))


def test_the_least_difference_moves_verdicts_alone() -> None:
    table = scores({**WAY, "learned": shifted(0.10, 0.01)})
    words = {least: compared(table, least_difference=least).query("model == 'learned'") for least in (0.0, 0.02, 0.2)}
    assert [rows["verdict"].item() for rows in words.values()] == ["better", "better", "level"]
    assert len({rows["difference"].item() for rows in words.values()}) == 1


def test_without_a_way_every_difference_counts_and_none_is_level() -> None:
    for ceiling in ({}, {"perfect_mean": around(1.0, 0.5, seed=5)}):
        table = compared(
            scores({**FLOOR, **ceiling, "learned": FLOOR["no_change"] - 1e-3, "rival": around(1.0)})
        ).set_index("model")
        assert table["verdict"].to_dict().items() >= {"learned": "better", "rival": "undecided"}.items()
        assert (table["margin"] == 0).all()
        assert table["share"].isna().all()


# --- strata ---------------------------------------------------------------------------------------------------------


def test_strata_are_thirds_or_halves_and_hold_the_means_of_their_perturbations() -> None:
    reliability = np.arange(N) / N
    table = stratify(panel(scores({"learned": reliability}, reliability=reliability, effect_size=1.0)), FAMILY_OF)
    rows = table[table["stratum"] == "reliability"]
    assert rows["bin"].tolist() == ["low", "middle", "high"]
    assert rows["n_perturbations"].sum() == N
    assert rows["value"].is_monotonic_increasing
    assert ((rows["from"] <= rows["value"]) & (rows["value"] <= rows["to"])).all()
    assert "effect_size" not in set(table["stratum"]), "equal values make no strata"
    halves = stratify(panel(scores({"learned": np.arange(8)}, effect_size=np.arange(8.0))), FAMILY_OF)
    assert halves.loc[halves["stratum"] == "effect_size", "value"].tolist() == [1.5, 5.5]
    few = stratify(panel(scores({"learned": np.arange(5)}, effect_size=np.arange(5.0))), FAMILY_OF)
    assert set(few["stratum"]) == {"members_seen"}


def test_strata_by_members_seen_are_named_and_headlines_only() -> None:
    seen = np.array([0, 1, 2] * 4)
    facts = {"n_members": 2, "members_seen": seen}
    table = stratify(panel(scores({"learned": seen}, **facts), scores({"learned": seen}, "width", **facts)), FAMILY_OF)
    assert table["metric"].unique().tolist() == ["loss"]
    assert table[["bin", "value", "n_perturbations"]].to_numpy().tolist() == [
        ["0 of 2", 0, 4],
        ["1 of 2", 1, 4],
        ["2 of 2", 2, 4],
    ]


def test_strata_by_sources_end_at_three_or_more() -> None:
    sources = np.array([0, 1, 2, 3, 4, 7] * 2)
    table = stratify(panel(scores({"learned": sources}, n_sources=sources)), FAMILY_OF)
    rows = table[table["stratum"] == "n_sources"]
    assert rows[["bin", "value", "n_perturbations"]].to_numpy().tolist() == [
        ["0", 0, 2], ["1", 1, 2], ["2", 2, 2], ["3 or more", 14 / 3, 6],
    ]  # fmt: skip
    assert "n_sources" not in set(stratify(panel(scores({"learned": sources}, n_sources=1)), FAMILY_OF)["stratum"])


# --- verdicts -------------------------------------------------------------------------------------------------------


def on_two(loss: float, score: float) -> Callable[[str], float]:
    return {"loss": loss, "score": score}.__getitem__


@pytest.mark.parametrize(
    ("loss", "score", "word", "starts"),
    [
        (0.5, 0.5, "better", "Better than no_change: wins error (+6"),
        (0.5, 1.0, "better", "Better than no_change: wins error (+6"),
        (1.0, 1.0, "undecided", "Not distinguished from no_change: undecided on error ("),
        (0.5, 1.5, "trades", "Trades against no_change: wins error (+6"),
        (1.5, 1.0, "worse", "Worse than no_change: loses error (-6"),
    ],
)
def test_verdict_words_of_planted_models(loss: float, score: float, word: str, starts: str) -> None:
    tables = [
        scores({**FLOOR, **CEILING, "learned": around(mean)}, metric)
        for metric, mean in (("loss", loss), ("score", score))
    ]
    row = verdicts(*tables).loc["learned"]
    assert row["verdict"] == word
    assert row["sentence"].startswith(starts)
    assert row["best_baselines"] == "no_change"
    assert "technical_duplicate" not in verdicts(*tables).index, "a ceiling is not judged"


def test_a_metric_that_cannot_tell_does_not_count_and_is_named() -> None:
    blind = scores({**FLOOR, "technical_duplicate": around(1.0, seed=6), "learned": around(2.0)}, "score")
    models = {**FLOOR, **CEILING, "learned": around(0.3)}
    row = verdicts(scores(models), blind, scores(models, RANK)).loc["learned"]
    assert (row["verdict"], row["wins"], row["cannot_tell"], row["undecided"]) == (
        "better",
        f"loss,{RANK}",
        "score",
        "",
    )
    assert row["sentence"].endswith("cannot tell here: effect.")


def test_a_screen_with_fewer_than_two_metrics_that_tell_cannot_rank_models() -> None:
    blind = scores({**FLOOR, "technical_duplicate": around(1.0, seed=6), "learned": around(2.0)}, "score")
    row = verdicts(scores({**FLOOR, **CEILING, "learned": around(0.5)}), blind).loc["learned"]
    assert (row["verdict"], row["n_telling"], row["wins"]) == ("undecided", 1, "loss")
    assert row["sentence"].startswith(
        "This screen cannot rank models: 1 of 2 headline metrics distinguish good from bad here. Better than "
        "no_change: wins error (+"
    )


def test_level_is_shown_by_all_metrics_and_undecided_ones_leave_it_open() -> None:
    level, open_ = {**WAY, "learned": shifted(0.0, 0.01)}, {**WAY, "learned": shifted(0.0, 0.5)}
    row = verdicts(scores(level), scores(level, "score")).loc["learned"]
    assert (row["verdict"], row["level"]) == ("level", "loss,score")
    assert row["sentence"].startswith(
        "Level with no_change: level within 2 % on error (0 % of the way from no change to the ceiling, -0."
    )
    row = verdicts(scores(level), scores(open_, "score")).loc["learned"]
    assert (row["verdict"], row["level"], row["undecided"]) == ("undecided", "loss", "score")
    assert row["sentence"].startswith("Not distinguished from no_change: level within 2 % on error (")


def test_the_size_stands_beside_every_verdict() -> None:
    row = verdicts(*twice({**WAY, "learned": shifted(0.12, 0.1)})).loc["learned"]
    assert row["sentence"] == (
        "Better than no_change: wins error (+12 % of the way from no change to the ceiling, +7.0 to +17), effect "
        "(+12 %, +7.0 to +17)."
    )


def test_floors_and_ceilings_decide_whatever_else_is_listed() -> None:
    """A further baseline that is worse changes nothing of what is said of the others."""
    models = {**FLOOR, **CEILING, "perturbed_mean": around(0.9, seed=9), "learned": around(0.5)}
    few, many = (verdicts(*twice(some)) for some in (models, {**models, "additive": around(3.0, seed=10)}))
    pd.testing.assert_frame_equal(few, many.loc[few.index])


# --- caveats --------------------------------------------------------------------------------------------------------


def test_what_a_verdict_rests_on_stands_beside_it() -> None:
    n = MIN_PERTURBATIONS - 1
    few = {name: losses[:n] for name, losses in {**FLOOR, **CEILING, "learned": around(0.5)}.items()}
    table = verdicts(*twice(few), caveats=("One batch.",))
    assert (
        table.loc["no_change", "caveats"]
        == "It rests on 5 held-out perturbations: fewer than 6 are too few. One batch."
    )
    assert "It rests on one seed" in table.loc["learned", "caveats"]
    enough = verdicts(
        *twice({name: np.tile(losses, (2, 1)) for name, losses in {**FLOOR, **CEILING, "learned": around(0.5)}.items()})
    )
    assert (enough["caveats"] == "").all()


def test_one_positive_control_that_beats_all_negative_ones_is_enough() -> None:
    noisy = {**FLOOR, "perturbed_mean": around(0.7), "technical_duplicate": around(0.7, seed=7), "learned": around(0.3)}
    assert verdicts(*twice(noisy)).loc["learned", "verdict"] == "undecided"
    assert (
        verdicts(*twice({**noisy, "interpolated_duplicate": around(0.2, seed=8)})).loc["learned", "verdict"] == "better"
    )


def test_few_perturbations_and_no_baseline_cannot_be_judged() -> None:
    n = MIN_PERTURBATIONS - 1
    few = {"no_change": FLOOR["no_change"][:n], "learned": around(0.1)[:n]}
    row = verdicts(scores(few)).loc["learned"]
    assert (row["verdict"], row["sentence"]) == (
        "undecided",
        "This screen cannot rank models: 5 perturbations are too few.",
    )
    row = verdicts(scores({"learned": around(0.5)})).loc["learned"]
    assert row["sentence"] == "Cannot be judged: no other baseline is among the runs."


def test_several_best_baselines_are_named_metric_by_metric() -> None:
    tables = [scores({"no_change": around(a, seed=2), "additive": around(b, seed=3), "learned": around(0.2)}, metric)
              for metric, a, b in (("loss", 0.6, 1.0), ("score", 1.0, 0.6))]  # fmt: skip
    sentence = verdicts(*tables).loc["learned", "sentence"]
    assert sentence.startswith("Better than the best baselines: wins error (+")
    assert "over no_change)" in sentence
    assert "over additive)" in sentence


def test_the_difference_to_the_stack_is_named_too() -> None:
    models = {
        **FLOOR,
        **CEILING,
        "additive": around(0.5, seed=2),
        "gaussian_process": around(0.7, seed=3),
        "learned": around(0.6, seed=4),
    }
    row = verdicts(*twice(models)).loc["learned"]
    assert row["verdict"] == "worse"
    assert "Better than gaussian_process: wins error (+1" in row["sentence"]
    assert row["against_set_gp"] == "better"


def test_a_model_no_better_than_an_ablation_is_told_so() -> None:
    models = {
        **FLOOR,
        **CEILING,
        "shuffled_labels": around(0.5, seed=5),
        "learned": around(0.5),
        "rival": around(0.3, seed=6),
    }
    table = verdicts(*twice(models))
    assert table.loc["learned", "verdict"] == "better"
    assert table["no_better_than"].to_dict() == {
        "no_change": "",
        "shuffled_labels": "",
        "learned": "shuffled_labels",
        "rival": "",
    }
    assert "No better than shuffled_labels" in table.loc["learned", "sentence"]


def test_mode_collapse_is_flagged_unless_measured_cells_collapse_too() -> None:
    ranks = {
        "no_change": np.full(N, 0.5),
        "technical_duplicate": np.full(N, 0.1),
        "learned": np.full(N, 0.45),
        "rival": np.full(N, 0.3),
    }
    table = verdicts(scores(ranks, RANK))
    assert table["mode_collapse"].to_dict() == {"no_change": True, "learned": True, "rival": False}
    assert "Mode collapse: rank_cosine_off_target 0.45" in table.loc["learned", "sentence"]
    table = verdicts(scores({**ranks, "technical_duplicate": np.full(N, 0.45)}, RANK))
    assert not table["mode_collapse"].any()
    table = verdicts(scores({**ranks, "context_mean": np.full(N, 0.5)}, RANK))
    assert table["mode_collapse"]["learned"], "a ceiling that knows no perturbation says nothing of the metric"


def test_outcomes() -> None:
    words = (["better", "undecided"], ["better", "worse"], ["level"], ["worse", "level"], ["level", "undecided"], [])
    assert [outcome(some) for some in words] == ["better", "trades", "level", "worse", "undecided", "undecided"]


# --- folds and files ------------------------------------------------------------------------------------------------


def test_folds_are_pooled_after_them() -> None:
    folds = [
        scores({**FLOOR, "learned": around(i)}, split=f"genes_fold_{i}", labels=[f"F{i}P{j}" for j in range(N)])
        for i in (1, 2)
    ]
    found = list(panels(pd.concat([*folds, scores(FLOOR, split="other")])))
    assert [(panel.split, len(panel.perturbations)) for panel in found] == [
        ("genes_fold_1", N), ("genes_fold_2", N), ("other", N), ("genes", 2 * N)
    ]  # fmt: skip
    summary = summarize(found[-1], FAMILY_OF).set_index("model")
    assert summary.loc["learned", "value"] == pytest.approx(np.mean([around(1), around(2)]))
    assert summary.loc["learned", "n_perturbations"] == 2 * N
    single = panels(scores(FLOOR, split="genes_fold_0"))
    assert [panel.split for panel in single] == ["genes_fold_0"], "one fold pools nothing"
    lines = [scores(FLOOR, split=f"lines_fold_{i}") for i in (1, 2)]
    found = panels(pd.concat(lines), {"lines_fold_1": "lines", "lines_fold_2": "lines"})
    assert [panel.split for panel in found] == ["lines_fold_1", "lines_fold_2"], "contexts share perturbations"


def write(folder: Path, **tables: pd.DataFrame) -> dict:
    """Write metrics.tsv files and return the arguments of the rule."""
    for name, table in tables.items():
        table.to_csv(folder / f"{name}.metrics.tsv", sep="\t", index=False)
    paths = [folder / f"{name}.metrics.tsv" for name in tables]
    return {
        "metrics": paths,
        "families": FAMILY_OF,
        "qualities": [],
        "audits": [],
        "harmonizations": [],
        "least_difference": LEAST,
        **{name: folder / f"{name}.tsv" for name in TABLES},
    }


def test_all_tables_are_written_with_their_keys(tmp_path: Path) -> None:
    models = {**FLOOR, **CEILING, "learned": around(0.5)}
    arguments = write(tmp_path, **{name: scores({name: losses}, effect_size=HARD) for name, losses in models.items()})
    benchmark(**arguments)
    tables = {name: pd.read_csv(arguments[name], sep="\t") for name in TABLES}
    assert {name: len(table) for name, table in tables.items()} == {
        "benchmark": 4, "calibration": 1, "comparisons": 3, "strata": 4 * 3 + 4, "verdicts": 2, "contexts": 0
    }  # fmt: skip
    for table in tables.values():
        assert table.columns[:2].tolist() == ["dataset", "split"]
    existing = [
        "dataset",
        "split",
        "model",
        "seed",
        "metric",
        "value",
        "ci_low",
        "ci_high",
        "n_perturbations",
        "better",
    ]
    assert tables["benchmark"].columns[:10].tolist() == existing
    first = {name: arguments[name].read_bytes() for name in TABLES}
    benchmark(**arguments)
    assert first == {name: arguments[name].read_bytes() for name in TABLES}


def test_caveats_of_the_audit_and_warnings_of_harmonization_stand_with_verdicts(tmp_path: Path) -> None:
    models = {**FLOOR, **CEILING, "learned": around(0.5)}
    arguments = write(tmp_path, **{name: scores({name: losses}) for name, losses in models.items()})
    audit, harmonization = tmp_path / "d" / "s" / "audit.json", tmp_path / "d" / "harmonization.json"
    audit.parent.mkdir(parents=True)
    audit.write_text('{"caveats": ["Lanes differ."]}')
    harmonization.write_text('{"warnings": ["gene names begin with x."]}')
    benchmark(**{**arguments, "audits": [audit], "harmonizations": [harmonization]})
    caveats = pd.read_csv(arguments["verdicts"], sep="\t").set_index("model")["caveats"]
    assert caveats["no_change"] == "Lanes differ. Gene names begin with x."
    assert caveats["learned"].endswith(
        "one seed: its intervals do not hold the differences between trainings. Lanes differ. Gene names begin with x."
    )


def test_genes_and_models_that_look_like_missing_values_are_kept(tmp_path: Path) -> None:
    labels = ["NA", "nan", "null", "TF1"]
    tables = {name: scores({name: [1.0, 2.0, 3.0, np.nan]}, labels=labels) for name in ("learned", "NA")}
    arguments = write(tmp_path, **tables)
    benchmark(**{**arguments, "families": {"learned": "learned", "NA": "rival"}})
    table = pd.read_csv(arguments["benchmark"], sep="\t", keep_default_na=False)
    assert table["model"].tolist() == ["learned", "NA"]
    assert table["n_perturbations"].tolist() == [3, 3], "a label is a label, an empty score is missing"
    assert table["value"].astype(float).tolist() == [2.0, 2.0]


def test_unknown_metrics_and_families_end_in_one_message(tmp_path: Path) -> None:
    arguments = write(tmp_path, old=scores(FLOOR).assign(metric="edist"))
    with pytest.raises(InputError, match=r"old\.metrics\.tsv: 'edist' is no metric of this version"):
        benchmark(**arguments)
    arguments = write(tmp_path, new=scores(FLOOR))
    with pytest.raises(InputError, match="'None' of model 'no_change' is no family"):
        benchmark(**{**arguments, "families": {}})


# --- contexts that are held out in turn -------------------------------------------------------------------------------


def of_contexts(*contexts: dict[str, object], labels: tuple[list[str], ...] | None = None) -> pd.DataFrame:
    """Return the row of every model over contexts, each with losses by model."""
    tables = [
        scores(losses, split=f"line_{i}", labels=labels[i] if labels else None) for i, losses in enumerate(contexts)
    ]
    folds = {f"line_{i}": "line" for i in range(len(contexts))}
    (only,) = panels_of_contexts(pd.concat([*tables, scores(FLOOR)], ignore_index=True), folds)
    return across_contexts(only, FAMILY_OF, LEAST).set_index("model")


def test_every_context_counts_the_same_however_many_perturbations_it_has() -> None:
    found = of_contexts(
        {"no_change": [1.0, 2.0, 3.0], "additive": [2.0, 2.0, 5.0], "learned": [0.0, 1.0, 2.0]},
        {"no_change": [5.0], "additive": [1.0], "learned": [4.5]},
        labels=(["A", "B", "C"], ["B"]),
    )
    assert found["value"].to_dict() == {"no_change": 3.5, "additive": 2.0, "learned": 2.75}
    assert found.loc["learned", ["lowest", "highest"]].tolist() == [1.0, 4.5]
    assert found.loc["learned", ["baseline", "difference"]].tolist() == ["additive", pytest.approx((2 - 3.5) / 2)]
    assert found.loc["additive", "baseline"] == "no_change", "a baseline is held against the best other one"
    assert found.loc["learned", ["n_contexts", "n_perturbations"]].tolist() == [2, 3]
    assert (found["split"] == "line").all()


@pytest.mark.parametrize(
    ("n", "mean", "verdict"),
    [(3, 0.5, "too few"), (4, 0.5, "better"), (4, 1.5, "worse"), (4, 1.0, "undecided"), (4, 1.005, "level")],
)
def test_a_verdict_over_contexts_needs_four_of_them(n: int, mean: float, verdict: str) -> None:
    spread = 0.001 if verdict == "level" else 0.3
    lines = [
        {"no_change": HARD, "learned": around(mean, spread, seed=i), **(CEILING if verdict == "level" else {})}
        for i in range(n)
    ]
    found = of_contexts(*lines).loc["learned"]
    assert (found["baseline"], found["verdict"]) == ("no_change", verdict)
    way = 0.8 * HARD.mean() if verdict == "level" else 0.0
    assert found["margin"] == pytest.approx(LEAST * way, rel=0.1)


def test_one_perturbation_that_differs_between_contexts_alone_decides_nothing() -> None:
    lines = [{"no_change": HARD, "learned": HARD - gain} for gain in (0.9, 0.8, -0.1, 0.0)]
    found = of_contexts(*lines).loc["learned"]
    assert found["difference"] == pytest.approx(0.4)
    assert found["verdict"] == "undecided"


@pytest.mark.parametrize(("n", "is_trusted"), [(3, False), (4, True)])
def test_intervals_over_fewer_than_four_contexts_are_not_to_be_trusted(n: int, is_trusted: bool) -> None:
    assert (of_contexts(*[FLOOR] * n)["is_trusted"] == is_trusted).all()


def test_where_contexts_alone_differ_the_interval_is_that_of_their_number() -> None:
    of_context = np.random.default_rng(0).normal(size=8)
    found = estimate_over_contexts(np.tile(of_context[:, None, None, None], (1, 1, 1, 50)))
    half = (found.high[0] - found.low[0]) / 2
    assert half == pytest.approx(t.ppf(0.975, 7) * of_context.std(ddof=1) / np.sqrt(8), rel=0.1)
    naive = estimate(np.repeat(of_context, 50)[None, None])
    assert found.mean == pytest.approx(naive.mean)
    assert half > 5 * (naive.high[0] - naive.low[0]) / 2


def test_the_same_perturbation_in_several_contexts_is_one_draw() -> None:
    of_perturbation = np.random.default_rng(0).normal(size=40)
    found = estimate_over_contexts(np.tile(of_perturbation, (6, 1, 1, 1)))
    alone = estimate(of_perturbation[None, None])
    assert found.high - found.low >= alone.high - alone.low


def test_intervals_over_contexts_cover_what_they_say_and_naive_ones_do_not() -> None:
    rng = np.random.default_rng(1)
    values = rng.normal(size=(5, 300, 1, 1)) + rng.normal(size=(1, 300, 1, 20)) + rng.normal(size=(5, 300, 1, 20))
    found, naive = estimate_over_contexts(values), estimate(np.moveaxis(values, 0, 2).reshape(300, 1, -1))
    assert ((found.low < 0) & (found.high > 0)).mean() >= 0.93
    assert ((naive.low < 0) & (naive.high > 0)).mean() < 0.6


def test_a_context_without_scores_of_a_model_does_not_count() -> None:
    found = of_contexts({"no_change": [1.0, 3.0]}, {"no_change": [5.0, 5.0], "learned": [4.0, 4.0]})
    assert found.loc["learned", ["value", "n_contexts"]].tolist() == [4.0, 1]
    assert found.loc["no_change", ["value", "n_contexts"]].tolist() == [3.5, 2]


def test_without_contexts_in_turn_the_table_is_empty(tmp_path: Path) -> None:
    arguments = write(tmp_path, one=scores(FLOOR, split="line_a"))
    benchmark(**arguments, context_folds={"line_a": "line"})
    assert pd.read_csv(arguments["contexts"], sep="\t").empty, "one context pools nothing"
    arguments["metrics"].append(write(tmp_path, two=scores(FLOOR, split="line_b"))["metrics"][0])
    benchmark(**arguments, context_folds={"line_a": "line", "line_b": "line"})
    assert pd.read_csv(arguments["contexts"], sep="\t")["n_contexts"].tolist() == [2]
