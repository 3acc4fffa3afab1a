"""All scores in tables: means with intervals, on a scale, against every baseline, by stratum, and a verdict per model.

One bootstrap serves all of them (`bootstrap`): 95 % intervals over perturbations, and over seeds where there are
several. Everything but a metric's own mean is computed on losses, so that lower is better whatever the metric.
"""

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path

import pandas as pd

from perturbflow.benchmark.across_contexts import CONTEXTS, across_contexts
from perturbflow.benchmark.panel import FOLD, QUALITY, Panel, panels, panels_of_contexts
from perturbflow.benchmark.tables import calibrate, compare, stratify, summarize
from perturbflow.benchmark.verdicts import judge
from perturbflow.errors import InputError
from perturbflow.evaluation import METRICS
from perturbflow.io.files import atomic, read_json
from perturbflow.registry.families import FAMILIES
from perturbflow.wording import capital

logger = logging.getLogger(__name__)

__all__ = ["benchmark", "judged_beside"]


def read_scores(path: Path) -> pd.DataFrame:
    """Return the scores of one run; a gene called NA stays a word."""
    words = dict.fromkeys(("dataset", "split", "model", "perturbation", "metric"), str)
    scores = pd.read_csv(path, sep="\t", dtype=words, keep_default_na=False, na_values=[""])
    if unknown := sorted(set(scores["metric"]) - set(METRICS)):
        raise InputError(f"{path}: '{unknown[0]}' is no metric of this version; evaluate again.")
    return scores


def _caveats(audits: list[Path], harmonizations: list[Path]) -> dict[tuple[str, str], list[str]]:
    """Return dataset and split → the caveats of its verdicts; pooled folds have the caveats of all of them."""
    found: dict[tuple[str, str], list[str]] = {}
    warnings = {path.parent.name: read_json(path)["warnings"] for path in harmonizations}
    for path in audits:
        dataset, split = path.parts[-3:-1]
        caveats = read_json(path)["caveats"]
        found.setdefault((dataset, split), []).extend(caveats)
        if fold := FOLD.match(split):
            found.setdefault((dataset, fold["name"]), []).extend(f"{split}: {caveat}" for caveat in caveats)
    return {place: [*caveats, *map(capital, warnings.get(place[0], []))] for place, caveats in found.items()}


def _with_quality(scores: pd.DataFrame, paths: list[Path]) -> pd.DataFrame:
    """Return scores with the columns `QUALITY` of quality.tsv; without a table they are missing."""
    words = {"perturbation": str, "responds": str}
    tables = [
        pd.read_csv(
            path,
            sep="\t",
            dtype=words,
            keep_default_na=False,
            na_values={name: [""] for name in ("efficacy", "responds")},
        ).assign(dataset=path.parent.name)[["dataset", "perturbation", *QUALITY]]
        for path in paths
    ]
    if not tables:
        return scores
    known = pd.concat(tables, ignore_index=True)
    known["responds"] = known["responds"].map({"True": 1.0, "False": 0.0})
    return scores.merge(known, how="left", on=["dataset", "perturbation"], validate="many_to_one")


def _without_prediction(scores: pd.DataFrame) -> dict[tuple[str, str, str], str]:
    """Return dataset, split and model → a caveat on the perturbations that predictions made elsewhere lack."""
    if "n_predicted" not in scores:
        return {}
    places: dict[tuple[str, str, str], list[str]] = {}
    lacking = scores.loc[scores["n_predicted"] == 0, ["dataset", "split", "model", "perturbation"]].drop_duplicates()
    for dataset, split, model, label in lacking.itertuples(index=False, name=None):
        fold = FOLD.match(split)
        for name in (split, *([fold["name"]] if fold else [])):
            places.setdefault((dataset, name, model), []).append(label)
    return {
        place: f"Its file lacks {len(set(labels))} of the perturbations, which are scored as no change: "
        f"{', '.join(sorted(set(labels)))}."
        for place, labels in places.items()
    }


def _tables(
    panel: Panel,
    families: dict[str, str],
    least_difference: float,
    caveats: Iterable[str],
    lacking: Mapping[tuple[str, str, str], str],
) -> tuple[pd.DataFrame, ...]:
    """Return the tables of one dataset × split: summary, calibration, comparisons, strata and verdicts."""
    compared, calibrated = compare(panel, families, least_difference), calibrate(panel, families)
    summary = summarize(panel, families)
    judged = judge(summary, calibrated, compared, least_difference, caveats)
    own = [lacking.get((panel.dataset, panel.split, model), "") for model in judged["model"]]
    judged["caveats"] = [f"{all_have} {one}".strip() for all_have, one in zip(judged["caveats"], own, strict=True)]
    return summary, calibrated, compared, stratify(panel, families), judged


def judged_beside(
    scores: pd.DataFrame, others: Mapping[str, Path], families: dict[str, str], least_difference: float
) -> pd.Series:
    """Return the row of verdicts.tsv of a model that was scored alone, beside others on the same split.

    Parameters
    ----------
    scores
        Rows of metrics.tsv of the model, of one dataset × split.
    others
        Model → the metrics.tsv of one of its runs there.
    families
        Model → name of its family, of all of them.
    """
    scores = scores.assign(seed=0)
    place = dict(scores[["dataset", "split", "seed"]].iloc[0])
    known = [read_scores(path).assign(**place, model=model) for model, path in others.items()]
    together = pd.concat([scores, *known], ignore_index=True)
    together = together[together["perturbation"].isin(scores["perturbation"])]
    panel = next(panels(together))
    *_, judged = _tables(panel, families, least_difference, (), _without_prediction(together))
    return judged.set_index("model").loc[scores["model"].iloc[0]]


def benchmark(
    metrics: list[Path],
    families: dict[str, str],
    benchmark: Path,
    calibration: Path,
    comparisons: Path,
    strata: Path,
    verdicts: Path,
    contexts: Path,
    qualities: list[Path],
    audits: list[Path],
    harmonizations: list[Path],
    least_difference: float,
    context_folds: dict[str, str] | None = None,
) -> None:
    """Write all tables of the benchmark.

    Parameters
    ----------
    metrics
        The metrics.tsv of every run.
    families
        Model → name of its family.
    benchmark
        Table to be written: per run × metric the mean with its interval, raw and scaled (`tables.summarize`).
    calibration
        Table to be written: whether every metric distinguishes good from bad on these data (`tables.calibrate`).
    comparisons
        Table to be written: every model against every baseline and ablation (`tables.compare`).
    strata
        Table to be written: headline metrics by kind of perturbation (`tables.stratify`).
    verdicts
        Table to be written: one line per model × dataset × split (`verdicts.judge`).
    contexts
        Table to be written: one line per model over contexts held out in turn (`across_contexts.across_contexts`).
    qualities
        quality.tsv of every dataset: its facts on perturbations make strata.
    audits
        The audit.json of every dataset × split, whose caveats stand with the verdicts.
    harmonizations
        The harmonization.json of every dataset, whose warnings do, too.
    least_difference
        Share of the way from no change to the ceiling; a smaller difference does not count.
    context_folds
        Split → the block that it is a fold of, where the folds hold out contexts.

    Raises
    ------
    InputError
        If a run holds a metric that this version does not know, or `families` lacks a model.
    """
    scores = _with_quality(pd.concat([read_scores(path) for path in metrics], ignore_index=True), qualities)
    for model in scores["model"].unique():
        if families.get(model) not in FAMILIES:
            raise InputError(
                f"families: '{families.get(model)}' of model '{model}' is no family; known: {', '.join(FAMILIES)}."
            )
    tables: dict[Path, list[pd.DataFrame]] = {
        path: [] for path in (benchmark, calibration, comparisons, strata, verdicts)
    }
    caveats, lacking = _caveats(audits, harmonizations), _without_prediction(scores)
    for panel in panels(scores, context_folds or ()):
        of_panel = _tables(panel, families, least_difference, caveats.get((panel.dataset, panel.split), ()), lacking)
        for path, table in zip(tables, of_panel, strict=True):
            tables[path].append(table)
        logger.info(
            "%s × %s: %d models, %d perturbations",
            panel.dataset,
            panel.split,
            len(panel.models),
            len(panel.perturbations),
        )
        for row in of_panel[-1].itertuples():
            logger.info("  %s: %s", row.model, row.sentence)
    pooled = [
        across_contexts(panel, families, least_difference) for panel in panels_of_contexts(scores, context_folds or {})
    ]
    tables[contexts] = [*pooled, pd.DataFrame(columns=CONTEXTS)]
    for path, parts in tables.items():
        # A part without rows has no types to contribute.
        table = pd.concat([part for part in parts if len(part)] or parts[:1], ignore_index=True)
        with atomic(path) as partial:
            table.to_csv(partial, sep="\t", index=False, float_format="%.6g")
