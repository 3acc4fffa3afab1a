r"""Print scores and verdicts of two versions of the workflow beside one another.

    python workflow_tests/benchmarks/verdicts.py --before ../before/results --now results
    python workflow_tests/benchmarks/verdicts.py --before before/* --now now/* --before-without fewer_before/* \
        --now-without fewer_now/*

Folders hold the tables of runs with the same configurations, those of several runs are put together. Per screen, split
and model: `pearson_delta_ctrl` before and now, with the perturbed gene, and `pearson_delta_ctrl_off_target` now,
without it (means over seeds; 95 % intervals over perturbations). Then both verdicts with the sizes of what was won and
lost, intervals in brackets: before in the units of the metric, now in percent of the way from no change to the ceiling.
Then how often each verdict was given, to all models. With --before-without and --now-without, the same runs that list
fewer models: which headline metrics distinguish there and not here, or the other way round.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parent))

from leaderboard import markdown, markdown_of

EFFECT = (("before", "pearson_delta_ctrl"), ("now", "pearson_delta_ctrl"), ("now", "pearson_delta_ctrl_off_target"))
WORDS = ("better", "trades", "worse", "level", "undecided")
ON_ONE_METRIC = {
    "wins": "better",
    "losses": "worse",
    "level": "level",
    "undecided": "undecided",
    "cannot_tell": "cannot tell",
}
KEYS = ["dataset", "split", "model"]


def tables_of(folders: list[Path]) -> dict[str, pd.DataFrame]:
    """Return the tables of runs by name."""
    names = ("benchmark", "calibration", "comparisons", "verdicts")
    return {
        name: pd.concat(
            [pd.read_csv(folder / f"{name}.tsv", sep="\t", keep_default_na=name != "verdicts") for folder in folders]
        )
        for name in names
    }


def score(rows: pd.DataFrame) -> str:
    """Return the mean over seeds and its interval."""
    mean, low, high = rows[["value", "ci_low", "ci_high"]].mean()
    return f"{mean:.2f} ({low:.2f}, {high:.2f})" if len(rows) else ""


def in_words(verdict: pd.Series, compared: pd.DataFrame) -> str:
    """Return a verdict, what it won and lost by how much, and on how many metrics it is level or undecided."""
    best = compared[compared["is_best_baseline"]].set_index("metric")
    parts = []
    for metric in [name for column in ("wins", "losses") for name in verdict[column].split(",") if name]:
        row, family = best.loc[metric], best.loc[metric, "metric_family"].replace("_", " ")
        if "share" in row and np.isfinite(row["share"]):
            parts.append(
                f"{family} {100 * row['share']:+.0f} % ({100 * row['share_low']:.0f}, {100 * row['share_high']:.0f})"
            )
        else:
            parts.append(f"{family} {row['difference']:+.2g} ({row['ci_low']:.2g}, {row['ci_high']:.2g})")
    parts += [
        f"{column}: {len(verdict[column].split(','))}" for column in ("level", "undecided") if verdict.get(column)
    ]
    return f"**{verdict['verdict']}**: {'; '.join(parts)}" if parts else f"**{verdict['verdict']}**"


def verdict_table(both: dict[str, dict[str, pd.DataFrame]], models: list[str] | None) -> pd.DataFrame:
    """Return one row per screen, split and model that has a verdict in both."""
    rows = []
    keys = both["before"]["verdicts"][KEYS].merge(both["now"]["verdicts"][KEYS])
    for key in keys[keys["model"].isin(models or keys["model"])].itertuples(index=False):
        row = {"screen, split": f"{key.dataset}, {key.split}", "model": key.model}
        mine = {
            when: {
                name: table[(table[KEYS] == list(key)).all(axis=1)]
                for name, table in tables.items()
                if "model" in table
            }
            for when, tables in both.items()
        }
        row |= {
            f"{metric}, {when}": score(mine[when]["benchmark"].query("metric == @metric")) for when, metric in EFFECT
        }
        row |= {
            f"verdict, {when}": in_words(tables["verdicts"].iloc[0], tables["comparisons"])
            for when, tables in mine.items()
        }
        rows.append(row)
    return pd.DataFrame(rows)


def counts(both: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """Return how often each verdict was given: of models, and of models by one headline metric."""
    found = {}
    for when, verdicts in both.items():
        for who, of_them in (("all models", verdicts), ("learned models", verdicts[verdicts["kind"] == "learned"])):
            found[f"verdicts, {who}, {when}"] = of_them["verdict"].value_counts()
            single = {
                word: of_them[name].str.split(",").map(lambda names: sum(map(bool, names))).sum()
                for name, word in ON_ONE_METRIC.items()
                if name in of_them
            }
            found[f"by one metric, {who}, {when}"] = pd.Series(single)
    table = pd.DataFrame(found).T.reindex(columns=[*WORDS, "cannot tell"]).fillna(0).astype(int).astype(str)
    return table.loc[sorted(table.index, key=lambda name: (name.split(",")[:2], name))]


def changed(more: pd.DataFrame, fewer: pd.DataFrame, column: str, by: list[str]) -> str:
    """Return of how many rows an entry differs, and where."""
    merged = more.merge(fewer, on=by, suffixes=("", "_fewer"))
    differs = merged[merged[column].astype(str) != merged[f"{column}_fewer"].astype(str)]
    where = "; ".join(
        f"{', '.join(row[name] for name in by)}: {row[f'{column}_fewer']} → {row[column]}"
        for _, row in differs.iterrows()
    )
    return f"{len(differs)} of {len(merged)}{': ' + where if where else ''}"


def telling(calibration: pd.DataFrame) -> pd.DataFrame:
    """Return per headline metric whether it distinguishes: a positive reference beats every negative one."""
    headline = calibration[calibration["headline"]]
    beaten = (headline["verdict"] == "tells").groupby(
        [headline[name] for name in ("dataset", "split", "metric", "positive")], sort=False
    )
    distinguishes = beaten.all().groupby(level=["dataset", "split", "metric"], sort=False).any()
    return distinguishes.map({True: "tells", False: "cannot tell"}).rename("verdict").reset_index()


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--before", "--now", "--before-without", "--now-without"):
        parser.add_argument(name, type=Path, nargs="+", required="without" not in name)
    parser.add_argument("--models", nargs="+", help="of the first table")
    arguments = parser.parse_args()
    both = {"before": tables_of(arguments.before), "now": tables_of(arguments.now)}
    print(markdown_of(verdict_table(both, arguments.models)) + "\n")
    shared = both["now"]["verdicts"].merge(both["before"]["verdicts"][KEYS], on=KEYS)
    table = counts({"before": both["before"]["verdicts"], "now": shared})
    print(markdown(table, list(table.columns), "") + "\n")
    for when, folders in (("before", arguments.before_without), ("now", arguments.now_without)):
        if not folders:
            continue
        fewer = tables_of(folders)
        changes = changed(
            telling(both[when]["calibration"]), telling(fewer["calibration"]), "verdict", ["dataset", "split", "metric"]
        )
        print(f"* {when}: of headline metrics another power to distinguish, {changes}")
        print(
            f"* {when}: of models another verdict, "
            f"{changed(both[when]['verdicts'], fewer['verdicts'], 'verdict', KEYS)}"
        )


if __name__ == "__main__":
    main()
