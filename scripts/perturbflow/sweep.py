"""Search for the params of a model on the cells that it may know: each setting is scored where it did not learn.

No test cell is read. Inner folds are splits of the same kind of what is left (`splits.inner`), or the validation
perturbations of the split are held out. The settings are tried by optuna's TPE sampler (Bergstra et al. 2011), or all
of them where they are few. Only finished trials are in the journal, and the next setting follows from these and the
seed: a sweep that was killed goes on where it was, to the same result.
"""

import itertools
import json
import logging
import math
import re
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

import matplotlib as mpl
import numpy as np
import optuna
import pandas as pd
from matplotlib.figure import Figure
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from perturbflow.colours import COLOURS
from perturbflow.embeddings import Embeddings
from perturbflow.errors import InputError
from perturbflow.evaluation import METRICS, Metric, score_inputs
from perturbflow.io.files import atomic, is_of_full_disk, read_json
from perturbflow.models.base import Run, build
from perturbflow.pairs import Pairs
from perturbflow.predict import predicted_cells
from perturbflow.provenance.code_version import code_version
from perturbflow.provenance.records import content_digest, digest
from perturbflow.splits.inner import inner_roles

logger = logging.getLogger(__name__)

JOURNAL = "journal.log"
LEAST_FOR_IMPORTANCE = 5  # finished trials
STYLE: Any = {"axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.6, "font.size": 8}


@dataclass(frozen=True)
class Fold:
    """Cells to learn from, and cells to be scored on.

    Attributes
    ----------
    cells
        All of the fold; predictions name their controls by its rows.
    known, held_out
        Its two parts.
    role
        Role of the second part.
    """

    cells: Pairs
    known: Pairs
    held_out: Pairs
    role: str

    @classmethod
    def of(cls, cells: Pairs, role: str) -> Self:
        """Divide cells of several roles."""
        cells = replace(cells, rows=np.arange(len(cells.rows)))
        return cls(cells, cells.fitted_on(role), cells.roles(role), role)


def folds_of(pairs: Pairs, split: Mapping[str, Any], block: Mapping[str, Any], scored: str) -> list[Fold]:
    """Return the folds that score a setting.

    Parameters
    ----------
    pairs, split
        All cells of a split, and the content of split.json.
    block
        by, folds and seed of `sweep`.
    scored
        Role that predictions are scored on in the end: for validation its cells are left out, too.
    """
    known = pairs.roles("train", "validation")
    if block["by"] == "validation":
        if not known.roles("validation").perturbations:
            raise InputError("sweep.by: this split holds out nothing for validation; set sweep.by to inner_folds.")
        return [Fold.of(known, "validation")]
    known = known.fitted_on(scored).roles("train")
    roles = inner_roles(known.obs, split, block["folds"], block["seed"])
    return [Fold.of(known.with_roles(role.to_numpy(), block["seed"]), "test") for role in roles]


@dataclass(frozen=True)
class Trials:
    """How a setting is scored.

    Attributes
    ----------
    folds, embeddings
        Cells, and vectors of genes.
    implementation, params
        The model and its params; a setting replaces some.
    metric
        Decides.
    run
        Seed, device, threads, and the folder for checkpoints; its identity is that of the sweep.
    max_cells
        Predicted cells per perturbation, at most.
    """

    folds: Sequence[Fold]
    embeddings: Embeddings
    implementation: str
    params: dict
    metric: Metric
    run: Run
    max_cells: int

    def score(self, setting: dict) -> list[float]:
        """Return the mean of the metric over the held-out perturbations of every fold."""
        return [self._of_fold(fold, i, {**self.params, **setting}) for i, fold in enumerate(self.folds)]

    def _of_fold(self, fold: Fold, number: int, params: dict) -> float:
        model = build(self.implementation, params)
        identity = digest(self.run.identity, params, number)
        model.fit(fold.known, self.embeddings, replace(self.run, identity=identity, history=[], facts={}))
        shutil.rmtree(self.run.checkpoints, ignore_errors=True)
        predicted = predicted_cells(fold.held_out, model, self.run.seed, self.max_cells, fold.role)
        values = self.metric.function(score_inputs(predicted, fold.cells, frozenset([self.metric.needs])))
        if not np.isfinite(values).any():
            raise InputError(f"{self.metric.name} is not defined for any perturbation of fold {number + 1}")
        return float(np.nanmean(values))


def distributions(over: Mapping[str, Any]) -> dict[str, BaseDistribution]:
    """Return the params that are searched as optuna declares them."""

    def of(values: Any) -> BaseDistribution:
        if isinstance(values, list):
            return CategoricalDistribution(values)
        kind = IntDistribution if isinstance(values["low"], int) else FloatDistribution
        return kind(values["low"], values["high"], log=values["log"])

    return {name: of(values) for name, values in over.items()}


def grid(over: Mapping[str, Any], most: int) -> list[dict] | None:
    """Return all settings, where they are choices and no more than the trials; None otherwise."""
    if not all(isinstance(values, list) for values in over.values()) or math.prod(map(len, over.values())) > most:
        return None
    return [dict(zip(over, values, strict=True)) for values in itertools.product(*over.values())]


def opened(journal: Path, identity: str, metric: Metric) -> optuna.Study:
    """Return the study of a sweep, with the trials that finished before.

    A line that a full disk cut off is removed.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    journal.parent.mkdir(parents=True, exist_ok=True)
    if journal.is_file() and not (content := journal.read_bytes()).endswith(b"\n"):
        journal.write_bytes(content[: content.rfind(b"\n") + 1])
    storage = JournalStorage(JournalFileBackend(str(journal)))
    direction = StudyDirection.MAXIMIZE if metric.direction == "higher" else StudyDirection.MINIMIZE
    return optuna.create_study(study_name=identity, storage=storage, direction=direction, load_if_exists=True)


def next_setting(study: optuna.Study, over: Mapping[str, Any], settings: list[dict] | None, seed: int) -> dict:
    """Return the setting of the next trial, by the finished ones and the seed alone."""
    done = study.get_trials(deepcopy=False)
    if settings is not None:
        return next(setting for setting in settings if setting not in [trial.params for trial in done])
    sampler = optuna.samplers.TPESampler(seed=int(np.random.SeedSequence([seed, len(done)]).generate_state(1)[0]))
    memory = optuna.create_study(direction=study.direction, sampler=sampler)
    memory.add_trials(done)
    return memory.ask(distributions(over)).params


def searched(study: optuna.Study, trials: Trials, block: Mapping[str, Any]) -> None:
    """Try settings until there are as many trials as wanted."""
    over, settings = block["over"], grid(block["over"], block["trials"])
    n_wanted = block["trials"] if settings is None else len(settings)
    while (n_done := len(done := study.get_trials(deepcopy=False))) < n_wanted:
        setting = next_setting(study, over, settings, block["seed"])
        same = next((trial for trial in done if trial.params == setting), None)
        about: dict[str, Any]
        started = time.perf_counter()
        try:
            values = same.user_attrs.get("folds") if same else trials.score(setting)
            about = dict(same.user_attrs) if same else {"folds": values}
        except InputError as error:
            if is_of_full_disk(error):
                raise
            values, about = None, {"reason": str(error)}
        about["seconds"] = round(time.perf_counter() - started, 2)
        study.add_trial(
            optuna.create_trial(
                state=TrialState.COMPLETE if values else TrialState.FAIL,
                value=float(np.mean(values)) if values else None,
                params=setting,
                distributions=distributions(over),
                user_attrs=about,
            )
        )
        said = f"{trials.metric.name} {_spread(values)}" if values else f"failed: {about['reason']}"
        logger.info("trial %d of %d, %s: %s, %.0f s", n_done + 1, n_wanted, _words(setting), said, about["seconds"])


def sweep(
    pairs: Path,
    embeddings: Path,
    audit: Path,
    split: Path,
    best: Path,
    trials: Path,
    figure: Path,
    implementation: str,
    params: dict,
    sweep: dict,
    scored: str = "test",
    max_cells: int = 1000,
    device: str = "auto",
    threads: int = 1,
) -> None:
    """Search for the params of one model.

    Parameters
    ----------
    pairs, embeddings, audit, split
        Files of one split, whose audit passed. Test cells are not read.
    best
        YAML to be written: the best setting as a block of `models`. The journal of the sweep lies beside it.
    trials
        Table to be written: one row per trial, and one of the model as it is.
    figure
        PNG to be written: values by trial and by param.
    implementation, params
        The model as it is.
    sweep
        The block of the configuration, with `family`, the model's.
    scored, max_cells, device, threads
        As in `train` and `predict`.

    Raises
    ------
    InputError
        If training cannot be divided into folds, or every trial failed.
    """
    metric, content = METRICS[sweep["metric"]], read_json(split)
    model = build(implementation, params)
    code = code_version("perturbflow.sweep:sweep", f"perturbflow.models.{implementation}")
    deciding = {key: sweep[key] for key in ("over", "by", "folds", "metric", "seed")}
    files = [content_digest(path) for path in (pairs, embeddings, split, *model.files)]
    identity = digest(implementation, params, deciding, scored, max_cells, files, code)
    cells = Pairs.open(pairs) if model.reads_blocks else Pairs.load(pairs)
    checkpoints = best.parent / "checkpoints"
    run = Run(sweep["seed"], device, threads, checkpoints, identity, scored=scored)
    found = Trials(
        folds_of(cells, content, sweep, scored), Embeddings.read(embeddings), implementation, params, metric, run,
        max_cells,
    )  # fmt: skip
    study = opened(best.parent / JOURNAL, identity, metric)
    if "as_it_is" not in study.user_attrs:
        study.set_user_attr("as_it_is", found.score({}))
    as_it_is = study.user_attrs["as_it_is"]
    logger.info("%s as it is: %s %s", sweep["model"], metric.name, _spread(as_it_is))
    searched(study, found, sweep)
    table = table_of(study, params, sweep)
    with atomic(trials) as partial:
        table.to_csv(partial, sep="\t", index=False, float_format="%.6g")
    if not study.get_trials(deepcopy=False, states=[TrialState.COMPLETE]):
        raise InputError(f"sweep: every trial failed; the first: {table['reason'].iloc[1]}")
    draw(study, table, sweep, figure)
    text = block_of(study, asdict(model.params), asdict(type(model.params)()), sweep)
    with atomic(best) as partial:
        partial.write_text(text, encoding="utf-8")
    logger.info("%s", text.split("\nmodels:")[0].replace("# ", "").replace("\n", " "))


# --- results --------------------------------------------------------------------------------------------------------


def table_of(study: optuna.Study, params: dict, block: Mapping[str, Any]) -> pd.DataFrame:
    """Return one row per trial, after that of the model as it is (trial 0)."""
    as_it_is = study.user_attrs["as_it_is"]
    rows = [_row(0, "as it is", {name: params[name] for name in block["over"]}, as_it_is)]
    for trial in study.get_trials(deepcopy=False):
        row = _row(trial.number + 1, trial.state.name.lower(), trial.params, trial.user_attrs.get("folds"))
        rows.append({**row, **{key: trial.user_attrs[key] for key in ("seconds", "reason") if key in trial.user_attrs}})
    return pd.DataFrame(rows).reindex(columns=[*rows[0], "seconds", "reason"])


def _row(number: int, state: str, setting: dict, values: list[float] | None) -> dict:
    scores = {f"fold_{i + 1}": value for i, value in enumerate(values or [])}
    summary = {"value": np.mean(values), "spread": np.std(values, ddof=min(1, len(values) - 1))} if values else {}
    return {"trial": number, "state": state, **setting, **summary, **scores}


def block_of(study: optuna.Study, params: dict, defaults: dict, block: Mapping[str, Any]) -> str:
    """Return the best setting as a configuration, and in words how much better it is."""
    metric, best, as_it_is = METRICS[block["metric"]], study.best_trial, study.user_attrs["as_it_is"]
    folds = best.user_attrs["folds"]
    better = np.array(folds) - as_it_is if metric.direction == "higher" else np.array(as_it_is) - folds
    merged = {**params, **best.params}
    kept = {name: value for name, value in merged.items() if name in best.params or value != defaults[name]}
    where = "inner folds" if block["by"] == "inner_folds" else "the validation perturbations"
    return "\n".join(
        [
            f"# The best of {len(study.trials)} trials on {where}: {metric.name} ({metric.reading}) {_spread(folds)}.",
            f"# {block['model']} as it is: {_spread(as_it_is)}. {_verdict(better)}",
            "# No test cell was read. Paste it under models, or give this file as a --configfile.",
            "models:",
            f"  {block['model']}_swept: {_in_yaml({'family': block['family'], 'params': kept})}",
            "",
        ]
    )


def _in_yaml(value: Any) -> str:
    """Return a value as flow YAML; a float has a point, without which YAML reads 1e-05 as text."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: {_in_yaml(item)}" for name, item in value.items()) + "}"
    return re.sub(r"^(-?\d+)e", r"\1.0e", json.dumps(value))


def _spread(values: Sequence[float] | np.ndarray) -> str:
    """Return a mean over folds and, of several, their range."""
    of_folds = f" ({min(values):.4g} to {max(values):.4g} over {len(values)} folds)" if len(values) > 1 else ""
    return f"{np.mean(values):.4g}{of_folds}"


def _verdict(better: np.ndarray) -> str:
    """Return in a sentence whether the best setting is better than the model as it is, given the gain of every fold."""
    if better.mean() <= 0:
        return "No trial is better."
    return f"Better by {_spread(better)}{'' if (better > 0).all() else ': not in every fold'}."


def _words(setting: Mapping[str, Any]) -> str:
    shown = {name: f"{value:.4g}" if isinstance(value, float) else value for name, value in setting.items()}
    return ", ".join(f"{name} {value}" for name, value in shown.items())


@mpl.rc_context(STYLE)
def draw(study: optuna.Study, table: pd.DataFrame, block: Mapping[str, Any], path: Path) -> None:
    """Plot values by trial and by param, with the importance of each (PED-ANOVA, Watanabe et al. 2023)."""
    done = study.get_trials(deepcopy=False, states=[TrialState.COMPLETE])
    values = np.array([trial.value for trial in done], float)
    as_it_is = table["value"].iloc[0]
    importance = {}
    if len(done) >= LEAST_FOR_IMPORTANCE and len(block["over"]) > 1 and np.ptp(values) > 0:
        importance = optuna.importance.get_param_importances(study)
    figure = Figure(figsize=(2.6 * (1 + len(block["over"])), 2.6), layout="constrained")
    axes = figure.subplots(1, 1 + len(block["over"]), sharey=True)
    best = np.maximum if METRICS[block["metric"]].direction == "higher" else np.minimum
    axes[0].plot([trial.number + 1 for trial in done], values, "o", markersize=3, color=COLOURS[0])
    axes[0].step([trial.number + 1 for trial in done], best.accumulate(values), where="post", color=COLOURS[1])
    axes[0].set(xlabel="trial; the line: best so far", ylabel=f"{block['metric']}, mean over folds")
    for ax, (name, values_of) in zip(axes[1:], block["over"].items(), strict=True):
        _slice(ax, name, values_of, done, values)
        if name in importance:
            ax.set_title(f"importance {importance[name]:.0%}", fontsize=8)
    for ax in axes:
        ax.axhline(as_it_is, color=COLOURS[-1], linewidth=0.8, linestyle="--")
    axes[0].set_title("dashed: the model as it is", fontsize=8)
    with atomic(path) as partial:
        figure.savefig(partial, dpi=150, format="png")


def _slice(ax: Any, name: str, values_of: Any, done: Sequence[FrozenTrial], values: np.ndarray) -> None:
    """Plot values by one param: choices in their order, ranges by number."""
    ax.set_xlabel(name)
    if isinstance(values_of, list):
        ax.plot([values_of.index(trial.params[name]) for trial in done], values, "o", markersize=3, color=COLOURS[0])
        ax.set_xticks(range(len(values_of)), [str(value) for value in values_of])
        ax.set_xlim(-0.5, len(values_of) - 0.5)
    else:
        ax.plot([trial.params[name] for trial in done], values, "o", markersize=3, color=COLOURS[0])
        ax.set_xscale("log" if values_of["log"] else "linear")
