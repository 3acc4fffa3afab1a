"""The warranty of a model on a split: what was checked before its what-if answers are to be believed, in numbers.

* identity: no perturbation leaves the cells as they are.
* placebo: test controls that the model was told are unperturbed, against other test controls of their batches: genes are called at the nominal rate.
* coverage: conformal intervals, calibrated on perturbations held out in training, hold the measured effects of test perturbations; and their width.
* agreement: correlation of predicted with measured effects.
* on target: the perturbed gene's own level, apart, as it is easy to predict and in no other number.
* sureness: whether the error of a test perturbation is as great as the model's own uncertainty promised.
* verdict: agreement in words.

Coverage, width and agreement stand beside those of two floors, no change and the mean effect of training, and of the ceiling: the truth itself.
"""

import logging
from pathlib import Path
from typing import Any

import numpy as np
from scipy import sparse
from scipy.stats import norm, spearmanr

from perturbflow.counterfactuals.agreement import FLOORS, agreement, numbers, summary, verdict
from perturbflow.counterfactuals.agreement import sentence as sentence_on_agreement
from perturbflow.counterfactuals.contexts import Places, contexts_of
from perturbflow.counterfactuals.intervals import relative_widths
from perturbflow.embeddings import Embeddings
from perturbflow.evaluation.bootstrap import MIN_PERTURBATIONS, estimate
from perturbflow.evaluation.ranks import SortedCells, adjusted, p_value
from perturbflow.genes.symbols import CONTROL, entities_of
from perturbflow.io.artefacts import load_artefact
from perturbflow.io.files import atomic, write_json
from perturbflow.models.base import Model, Run, build
from perturbflow.models.calibration import Calibration, Scale, case_of, measured_by
from perturbflow.models.closed_form.baselines import NoChange, PerturbedMean
from perturbflow.models.effects import Effects
from perturbflow.pairs import Pairs
from perturbflow.progress import progressed

logger = logging.getLogger(__name__)

NOMINAL = (0.8, 0.9)  # levels of intervals
ALPHA = 0.05  # of tests
PLACEBOS = 20  # random halves of the controls
MAX_CELLS = 300  # cells of a perturbation whose controls are asked
MIN_CELLS_OF_GENE = 10  # fewer controls that hold a gene, and ranks are all ties


def asked_effect(model: Model, cells: Pairs, label: str, seed: int) -> np.ndarray:
    """Return what the model says of a perturbation in the controls of its own cells, (genes,)."""
    rows = cells.cells_of(label)
    if len(rows) > MAX_CELLS:
        rows = np.random.default_rng(seed).choice(rows, MAX_CELLS, replace=False)
    starts, times = np.unique(cells.control_index[rows, 0], return_counts=True)
    context = cells.context_of(starts)
    return np.average(
        model.individual_effects(cells.controls_at(starts).toarray(), label, seed, context), axis=0, weights=times
    )


def calibrated(model: Model, pairs: Pairs, embeddings: Embeddings, seed: int) -> tuple[Calibration, Scale]:
    """Return the scores of all perturbations that the model, or its like, was not trained on.

    Parameters
    ----------
    pairs
        What the model was handed: inner folds of training count, and validation where that was not trained on.
    """
    training, validation = pairs.roles("train"), pairs.roles("validation")
    effects = Effects.of_training(pairs)
    scale = Scale.of(training, effects)
    found = model.held_out(pairs, embeddings, seed)
    labels = [label for label in validation.perturbations if model.refusal(label) is None]
    if labels:
        known = set(effects.labels), set(effects.entities)
        found += Calibration.of(
            labels, [case_of(label, *known) for label in labels], np.stack([asked_effect(model, validation, label, seed) for label in progressed(labels, "validation perturbations")]),
            np.stack([validation.effect_of(label) for label in labels]), [measured_by(validation, label) for label in labels], scale, pairs.genes,
            [model.uncertainty(label, validation.context_of(validation.cells_of(label))) for label in labels],
        )  # fmt: skip
    return found, scale


def identity(model: Model, cells: np.ndarray, seed: int) -> float:
    """Return the greatest difference that no perturbation makes, in log1p units."""
    return float(np.abs(model.counterfactual(cells, [CONTROL], 2, seed)[0] - cells[:, None]).max())


def placebo(model: Model, controls: Pairs, seed: int) -> dict[str, Any]:
    """Call genes between controls that were asked about no perturbation and other controls of their batches.

    Parameters
    ----------
    controls
        Control cells that the model was not trained on.
    """
    rng = np.random.default_rng(seed)
    X = controls.X[np.flatnonzero(controls.is_control)]
    stratum = controls.groups.stratum[controls.is_control]
    tested = np.flatnonzero(np.diff(X.tocsc().indptr) >= MIN_CELLS_OF_GENE)
    X = X[:, tested]
    after = model.counterfactual(controls.X[np.flatnonzero(controls.is_control)].toarray(), [CONTROL], 1, seed)[0][
        :, 0
    ][:, tested]
    called, found = [], 0
    for _ in progressed(range(PLACEBOS), "placebo, halves of the controls"):
        turn = np.empty(len(stratum), dtype=int)
        for value in np.unique(stratum):
            rows = np.flatnonzero(stratum == value)
            turn[rng.permutation(rows)] = (np.arange(len(rows)) + rng.integers(2)) % 2
        asked, others = np.flatnonzero(turn == 0), np.flatnonzero(turn == 1)
        kept = np.isin(stratum[asked], stratum[others])
        asked = asked[kept]
        strata = np.unique(stratum[asked])
        reference = SortedCells(X, [others[stratum[others] == value] for value in strata])
        z = reference.rank_sum(sparse.csr_matrix(after[asked]), np.searchsorted(strata, stratum[asked]))
        p = p_value(z[np.isfinite(z)])
        called.append(float((p < ALPHA).mean()))
        found += bool((adjusted(p) < ALPHA).any())
    low, high = np.quantile(called, [0.025, 0.975])
    return {
        "n_cells": int(X.shape[0]), "n_genes": len(tested), "repeats": PLACEBOS, "nominal": ALPHA, "share_called": float(np.mean(called)),
        "share_called_low": float(low), "share_called_high": float(high), "repeats_with_discoveries": int(found),
    }  # fmt: skip


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.corrcoef(a, b)[0, 1]) if a.std() > 0 and b.std() > 0 else np.nan


def calibrations_of(
    model: Model, pairs: Pairs, embeddings: Embeddings, seed: int
) -> tuple[dict[str, Calibration], Scale]:
    """Return the scores of perturbations held out, of the model ("model") and of the floors, all found in the same way; as `calibrated`."""
    found, scale = calibrated(model, pairs, embeddings, seed)
    floors: dict[str, Model] = {"no_change": NoChange(), "perturbed_mean": PerturbedMean()}
    for floor in floors.values():
        floor.fit(pairs, embeddings, Run(seed=seed))
    return {
        "model": found,
        **{name: calibrated(floor, pairs, embeddings, seed)[0] for name, floor in floors.items()},
    }, scale


def held_to_test(
    model: Model, known: Pairs, test: Pairs, calibrations: dict[str, Calibration], scale: Scale, seed: int
) -> dict[str, Any]:
    """Hold predicted effects and their intervals, and those of the floors, against the measured effects of the test perturbations.

    Parameters
    ----------
    known, test
        Cells that the model was handed, and those of the role that it is held to.
    calibrations, scale
        As `calibrations_of` gives them.
    """
    effects = Effects.of_training(known)
    seen, reference = (set(effects.labels), set(effects.entities)), effects.values.mean(axis=0)
    column = {gene: i for i, gene in enumerate(test.genes)}
    places = Places(known.roles("train"))
    rows, targets, relative = [], [], {}
    for label in progressed(test.perturbations, "test perturbations"):
        if model.refusal(label) is not None:
            continue
        predicted, measured, halves = (
            asked_effect(model, test, label, seed),
            test.effect_of(label),
            test.effects_of_halves(label),
        )
        case = case_of(label, *seen)
        kept = ~np.isin(test.genes, entities_of(label))
        own = {name: calibration.for_case(case) for name, calibration in calibrations.items()}
        if case not in relative:
            relative[case] = {level: relative_widths(own, level) for level in NOMINAL}
        row: dict[str, Any] = {"perturbation": label, "case": case}
        row["error"] = float(np.sqrt(np.square(predicted - measured)[kept].mean()))
        row["agreement"] = agreement(predicted[kept], measured[kept], [half[kept] for half in halves], reference[kept])
        row["in_other_contexts"] = places.is_elsewhere(label, contexts_of(test.obs.iloc[test.cells_of(label)]))
        sampling = measured_by(test, label)
        guesses = {"model": predicted, "no_change": np.zeros_like(reference), "perturbed_mean": reference}
        uncertainty = model.uncertainty(label, test.context_of(test.cells_of(label)))
        row["promised"] = (
            np.nan if uncertainty is None else float(np.sqrt((scale.variance * sampling + uncertainty)[kept].mean()))
        )
        units = {name: scale.at(sampling, uncertainty if name == "model" else None) for name in guesses}
        for level in NOMINAL:
            suffix = str(round(100 * level))
            reach = {name: own[name].reach(level) * units[name][kept] for name in guesses}
            held = {
                name: float((np.abs(measured - guess)[kept] <= reach[name]).mean()) for name, guess in guesses.items()
            }
            # The truth is off by sampling alone.
            reach["ceiling"] = norm.ppf((1 + level) / 2) * np.sqrt(scale.variance * sampling)[kept]
            is_calibrated = bool(own["model"].labels)
            row[f"coverage_{suffix}"] = held.pop("model") if is_calibrated else np.nan
            row[f"coverage_of_floors_{suffix}"] = held
            row[f"width_{suffix}"] = {
                name: 2 * float(half.mean()) if np.isfinite(half).all() else np.nan for name, half in reach.items()
            }
            row[f"relative_width_{suffix}"] = relative[case][level]
        rows.append(row)
        for gene in entities_of(label):
            if gene in column:
                pair = [half[column[gene]] for half in halves] if len(halves) == 2 else [np.nan] * 2
                targets.append(
                    (label, gene, float(predicted[column[gene]]), float(measured[column[gene]]), *map(float, pair))
                )
    calibration = calibrations["model"]
    counts = {"n_calibration": len(calibration.labels), "n_calibration_perturbations": len(set(calibration.labels))}
    return {**_summary(rows, counts), "on_target": _on_target(targets), "perturbations": rows}


def _mean(values: list[float]) -> dict[str, float]:
    """Return the mean over perturbations and its 95 % interval."""
    return numbers(estimate(np.array(values, dtype=float)[None, None]))


def _summary(rows: list[dict], counts: dict[str, int]) -> dict[str, Any]:
    """Return what test perturbations' rows say together; `counts` tells how many measurements the intervals were calibrated on."""
    coverage = []
    for level in NOMINAL:
        suffix = str(round(100 * level))
        held = _mean([row[f"coverage_{suffix}"] for row in rows])
        widths = [row[f"width_{suffix}"] for row in rows]
        relative = [row[f"relative_width_{suffix}"] for row in rows]
        coverage.append(
            {
                "nominal": level, "measured": held["mean"], "low": held["low"], "high": held["high"], "n_test": len(rows), **counts,
                "floors": {floor: _mean([row[f"coverage_of_floors_{suffix}"][floor] for row in rows]) for floor in FLOORS},
                "width": {name: _mean([width[name] for width in widths]) for name in ("model", *FLOORS, "ceiling")},
                "relative_width": {
                    floor: {key: float(np.mean([row[floor][key] for row in relative])) if rows else np.nan for key in ("mean", "low", "high")}
                    for floor in FLOORS
                },
            }
        )  # fmt: skip
    agreed = summary([row["agreement"] for row in rows])
    return {
        "verdict": verdict(agreed, len(rows)),
        "agreement": agreed,
        "coverage": coverage,
        "sureness": _sureness(rows),
    }


def _sureness(rows: list[dict]) -> dict[str, Any]:
    """Return how promised and actual errors of test perturbations go together, and both of the half that the model was surest of and of the other."""
    told = sorted((row for row in rows if np.isfinite(row["promised"])), key=lambda row: row["promised"])
    if len(told) < MIN_PERTURBATIONS:
        return {"n": len(told)}
    promised, error = (np.array([row[name] for row in told]) for name in ("promised", "error"))
    halves = {"surest": told[: len(told) // 2], "others": told[len(told) // 2 :]}
    return {
        "n": len(told), "rank_correlation": float(spearmanr(promised, error).statistic), "error_per_promise": float(np.median(error / promised)),
        **{
            name: {"error": _mean([row["error"] for row in half]), "agreement": _mean([row["agreement"]["whole"]["model"] for row in half])}
            for name, half in halves.items()
        },
    }  # fmt: skip


def _on_target(targets: list[tuple]) -> dict[str, Any]:
    """Return how well the perturbed genes' own changes are told, over all measured targets of the test perturbations."""
    if not targets:
        return {"n": 0}
    predicted, measured, a, b = (np.array([row[i] for row in targets], dtype=float) for i in (2, 3, 4, 5))
    return {
        "n": len(targets), "median_predicted": float(np.median(predicted)), "median_measured": float(np.median(measured)),
        "same_sign": float((np.sign(predicted) == np.sign(measured)).mean()), "same_sign_of_halves": float((np.sign(a) == np.sign(b)).mean()),
        "correlation": _correlation(predicted, measured) if len(targets) > 2 else np.nan,
        "correlation_of_halves": _correlation(a, b) if len(targets) > 2 else np.nan,
    }  # fmt: skip


def warranty(
    pairs: Path,
    embeddings: Path,
    model: Path,
    warranty: Path,
    calibration: Path,
    implementation: str,
    params: dict,
    seed: int,
    scored: str = "test",
) -> None:
    """Check a trained model before it answers.

    Parameters
    ----------
    pairs, embeddings, model
        The pairs of the split, its gene vectors, and a model trained on both.
    warranty
        JSON to be written: verdict, agreement, coverage, on_target, identity, placebo, and all of it per test perturbation.
    calibration
        npz to be written: the scores that intervals are made of.
    scored
        Role that the model is held to: it has not learned from it.
    """
    family = build(implementation, params)
    cells = Pairs.open(pairs) if family.reads_blocks else Pairs.load(pairs)
    family.restore(load_artefact(model))
    logger.info("%s: intervals, agreement and placebo are checked", model)
    known, test = cells.fitted_on(scored), cells.roles(scored)
    calibrations, scale = calibrations_of(family, known, Embeddings.read(embeddings), seed)
    found = calibrations["model"]
    controls = test.X[np.flatnonzero(test.is_control)[:200]].toarray()
    content = {
        **held_to_test(family, known, test, calibrations, scale, seed),
        "identity": identity(family, controls, seed),
        "placebo": placebo(family, test, seed),
        "calibrated_on": {
            label: sorted({c for other, c in zip(found.labels, found.cases, strict=True) if other == label})
            for label in found.labels
        },
    }
    with atomic(calibration) as partial:
        arrays: dict[str, Any] = {**found.arrays(), "variance": scale.variance, "spread": scale.spread}
        np.savez_compressed(partial, **arrays)
    write_json(warranty, content)
    logger.info("%s", sentence(content))


def sentence(content: dict) -> str:
    """Return a warranty in sentences, the verdict first, as they stand beside every answer; the last without its full stop."""
    covered = " and ".join(
        f"{100 * row['measured']:.0f} % (nominal {100 * row['nominal']:.0f}, no change {100 * row['floors']['no_change']['mean']:.0f})"
        for row in content["coverage"] if np.isfinite(row["measured"])
    )  # fmt: skip
    row, placebo = content["coverage"][-1], content["placebo"]
    relative = row["relative_width"]["no_change"]["mean"]
    narrower = row["width"]["ceiling"]["mean"] / row["width"]["no_change"]["mean"]
    intervals = (
        f"Intervals, calibrated on {row['n_calibration']} held-out measurements of {row['n_calibration_perturbations']} perturbations, hold {covered} of "
        f"{row['n_test']} test perturbations' effects. At {100 * row['nominal']:.0f} % they are {relative:.2f} times as wide as those of no change; "
        f"the truth's would be {narrower:.2f} times as wide"
        if covered else "No perturbation was held out in training, so there are no intervals"
    )  # fmt: skip
    return (
        f"{_capital(content['verdict'])}. {sentence_on_agreement(content['agreement'])}. {intervals}. "
        f"No perturbation changes {'nothing' if content['identity'] < 1e-4 else format(content['identity'], '.2g')}. "
        f"Placebo: {100 * placebo['share_called']:.1f} % of genes called at {100 * placebo['nominal']:.0f} %, discoveries in "
        f"{placebo['repeats_with_discoveries']} of {placebo['repeats']} repeats"
    )


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _checked(content: dict, in_other_contexts: bool) -> list[dict]:
    """Return the rows of the test perturbations that training measured in other contexts alone, or of the others."""
    return [row for row in content["perturbations"] if row.get("in_other_contexts", False) == in_other_contexts]


def was_checked(content: dict, in_other_contexts: bool) -> bool:
    """Return whether a model was checked on perturbations that training measured in other contexts alone, or on others."""
    return bool(_checked(content, in_other_contexts)) or not (in_other_contexts or content["perturbations"])


def fitting(content: dict, in_other_contexts: bool) -> tuple[str, str]:
    """Return verdict and warranty in words, by the test perturbations that are as the one that is asked.

    Parameters
    ----------
    content
        Of warranty.json.
    in_other_contexts
        Whether training measured what is asked in none of the contexts that are asked.
    """
    if not was_checked(content, in_other_contexts):
        unchecked = "cannot tell: the model was not checked on such perturbations"
        if in_other_contexts:
            return unchecked, (
                "None: training measured this in other contexts alone, and the model was checked on no such perturbation, so there are no intervals. "
                "A split of kind unseen_context checks it"
            )
        return (
            unchecked,
            "None: the model was checked on perturbations that training measured in other contexts alone, and this is another case",
        )
    rows = _checked(content, in_other_contexts)
    if len(rows) < len(content["perturbations"]):
        counts = {key: content["coverage"][0][key] for key in ("n_calibration", "n_calibration_perturbations")}
        content = {**content, **_summary(rows, counts)}
    return content["verdict"], sentence(content)
