"""The warranty of a model on a split: checks in numbers, made before anybody believes its what-if answers.

* identity: no perturbation leaves the cells as they are.
* placebo: test controls are asked about no perturbation, and compared with other test controls of their batches. Genes
  are called at the nominal rate.
* coverage: conformal intervals, calibrated on perturbations held out in training, hold the measured effects of test
  perturbations; and their width.
* agreement: correlation of predicted with measured effects.
* on target: the perturbed gene's own level, apart. It is easy to predict and in no other number.
* sureness: whether the error of a test perturbation is as great as the model's own uncertainty promised.
* verdict: agreement in words.

Coverage, width and agreement stand beside those of two floors, no change and the mean effect of training, and of the
ceiling: the truth itself.
"""

import logging
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import sparse

from perturbflow.counterfactuals.agreement import sentence as sentence_on_agreement
from perturbflow.counterfactuals.held_to_test import asked_effect, held_to_test, summary_of
from perturbflow.embeddings import Embeddings
from perturbflow.evaluation.ranks import SortedCells, adjusted, p_value
from perturbflow.genes.symbols import CONTROL
from perturbflow.io.artefacts import load_artefact
from perturbflow.io.files import atomic, write_json
from perturbflow.models.base import Model, Run, build
from perturbflow.models.calibration import Calibration, Scale, measured_by, novelty_of
from perturbflow.models.closed_form.baselines import NoChange, PerturbedMean
from perturbflow.models.effects import Effects
from perturbflow.pairs import Pairs
from perturbflow.progress import progressed
from perturbflow.wording import capital

logger = logging.getLogger(__name__)

ALPHA = 0.05  # of tests
MOST_CONTROLS = 5000  # in the placebo
PLACEBOS = 20  # random halves of the controls
MIN_CELLS_OF_GENE = 10  # fewer controls that hold a gene, and ranks are all ties


def calibrated(model: Model, pairs: Pairs, embeddings: Embeddings, seed: int) -> tuple[Calibration, Scale]:
    """Return the scores of all perturbations that the model, or one like it, was not trained on.

    Parameters
    ----------
    pairs
        Cells that the model may know: inner folds of training count, and validation where that was not trained on.
    """
    training, validation = pairs.roles("train"), pairs.roles("validation")
    effects = Effects.of_training(pairs)
    scale = Scale.of(training, effects)
    found = model.held_out(pairs, embeddings, seed)
    labels = [label for label in validation.perturbations if model.refusal(label) is None]
    if labels:
        known = set(effects.labels), set(effects.entities)
        predicted = [
            asked_effect(model, validation, label, seed) for label in progressed(labels, "validation perturbations")
        ]
        found += Calibration.of(
            labels,
            [novelty_of(label, *known) for label in labels],
            np.stack(predicted),
            np.stack([validation.effect_of(label) for label in labels]),
            [measured_by(validation, label) for label in labels],
            scale,
            pairs.genes,
            [model.uncertainty(label, validation.context_of(validation.cells_of(label))) for label in labels],
        )
    return found, scale


def identity(model: Model, cells: np.ndarray, seed: int) -> float:
    """Return the greatest change that no perturbation makes, in log1p units."""
    return float(np.abs(model.counterfactual(cells, [CONTROL], 2, seed)[0] - cells[:, None]).max())


def placebo(model: Model, controls: Pairs, seed: int) -> dict[str, Any]:
    """Call genes between controls that were asked about no perturbation and other controls of their batches.

    Parameters
    ----------
    controls
        Cells that the model was not trained on, with their controls. Of many controls, a sample is asked.
    """
    rng = np.random.default_rng(seed)
    rows = np.flatnonzero(controls.is_control)
    if len(rows) > MOST_CONTROLS:
        rows = np.sort(rng.choice(rows, MOST_CONTROLS, replace=False))
    X, stratum = controls.X[rows], controls.groups.stratum[rows]
    tested = np.flatnonzero(np.diff(X.tocsc().indptr) >= MIN_CELLS_OF_GENE)
    before = X[:, tested]
    after = model.counterfactual(X.toarray(), [CONTROL], 1, seed)[0][:, 0][:, tested]
    called, n_with_discoveries = [], 0
    for _ in progressed(range(PLACEBOS), "placebo, halves of the controls"):
        p = _p_values_of_halves(before, after, stratum, rng)
        called.append(float((p < ALPHA).mean()))
        n_with_discoveries += bool((adjusted(p) < ALPHA).any())
    low, high = np.quantile(called, [0.025, 0.975])
    return {
        "n_cells": int(X.shape[0]),
        "n_genes": len(tested),
        "repeats": PLACEBOS,
        "nominal": ALPHA,
        "share_called": float(np.mean(called)),
        "share_called_low": float(low),
        "share_called_high": float(high),
        "repeats_with_discoveries": int(n_with_discoveries),
    }


def _p_values_of_halves(
    before: sparse.csr_matrix, after: np.ndarray, stratum: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Return the p-values of all genes between the answers of one half of the controls and the other half.

    Parameters
    ----------
    before, after
        The controls, and the model's answers for them, (cells, genes).
    stratum
        Batch and cell type of each cell; halves are sampled within these.
    """
    half = np.empty(len(stratum), dtype=int)
    for value in np.unique(stratum):
        rows = np.flatnonzero(stratum == value)
        half[rng.permutation(rows)] = (np.arange(len(rows)) + rng.integers(2)) % 2
    asked, others = np.flatnonzero(half == 0), np.flatnonzero(half == 1)
    asked = asked[np.isin(stratum[asked], stratum[others])]
    strata = np.unique(stratum[asked])
    reference = SortedCells(before, [others[stratum[others] == value] for value in strata])
    z = reference.rank_sum(sparse.csr_matrix(after[asked]), np.searchsorted(strata, stratum[asked]))
    return p_value(z[np.isfinite(z)])


def calibrations_of(
    model: Model, pairs: Pairs, embeddings: Embeddings, seed: int
) -> tuple[dict[str, Calibration], Scale]:
    """Return the scores of held-out perturbations, of the model ("model") and of the floors, as `calibrated` does."""
    found, scale = calibrated(model, pairs, embeddings, seed)
    floors: dict[str, Model] = {"no_change": NoChange(), "perturbed_mean": PerturbedMean()}
    for floor in floors.values():
        floor.fit(pairs, embeddings, Run(seed=seed))
    return {
        "model": found,
        **{name: calibrated(floor, pairs, embeddings, seed)[0] for name, floor in floors.items()},
    }, scale


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
        JSON to be written: verdict, agreement, coverage, on_target, identity, placebo, and all of it per test
        perturbation.
    calibration
        npz to be written: the scores that make the intervals.
    scored
        Role that the model is held to. It has not learned from it.
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
            label: sorted({c for other, c in zip(found.labels, found.novelties, strict=True) if other == label})
            for label in found.labels
        },
    }
    with atomic(calibration) as partial:
        arrays: dict[str, Any] = {
            **found.arrays(),
            "variance": scale.variance,
            "spread": scale.spread,
            "mean": scale.mean,
        }
        np.savez_compressed(partial, **arrays)
    write_json(warranty, content)
    logger.info("%s", sentence(content))


def sentence(content: dict) -> str:
    """Return a warranty in sentences for every answer, the verdict first; the last has no full stop."""
    identity, placebo = content["identity"], content["placebo"]
    return (
        f"{capital(content['verdict'])}. {sentence_on_agreement(content['agreement'])}. "
        f"{_sentence_on_intervals(content['coverage'])}. "
        f"Told that nothing is perturbed, the model changes "
        f"{'nothing' if identity < 1e-4 else f'cells by up to {identity:.2g}'}. "
        f"Placebo: {100 * placebo['share_called']:.1f} % of genes called at {100 * placebo['nominal']:.0f} %, "
        f"discoveries in {placebo['repeats_with_discoveries']} of {placebo['repeats']} repeats"
    )


def _sentence_on_intervals(coverage: list[dict]) -> str:
    """Return coverage and width of the intervals in sentences."""
    covered = " and ".join(
        f"{100 * row['measured']:.0f} % (nominal {100 * row['nominal']:.0f}, "
        f"no change {100 * row['floors']['no_change']['mean']:.0f})"
        for row in coverage
        if np.isfinite(row["measured"])
    )
    if not covered:
        return "No perturbation was held out in training, so there are no intervals"
    row = coverage[-1]
    relative = row["relative_width"]["no_change"]["mean"]
    narrowest = row["width"]["ceiling"]["mean"] / row["width"]["no_change"]["mean"]
    return (
        f"Intervals, calibrated on {row['n_calibration']} held-out measurements of "
        f"{row['n_calibration_perturbations']} perturbations, hold {covered} of {row['n_test']} test perturbations' "
        f"effects. At {100 * row['nominal']:.0f} % they are {relative:.2f} times as wide as those of no change; "
        f"the truth's would be {narrowest:.2f} times as wide"
    )


def _checked(content: dict, in_other_contexts: bool) -> list[dict]:
    """Return the rows of test perturbations that training measured in other contexts alone, or of the others."""
    return [row for row in content["perturbations"] if row.get("in_other_contexts", False) == in_other_contexts]


def was_checked(content: dict, in_other_contexts: bool) -> bool:
    """Return whether a model was checked on perturbations from other contexts alone, or on others, as in `_checked`."""
    return bool(_checked(content, in_other_contexts)) or not (in_other_contexts or content["perturbations"])


class Fitting(NamedTuple):
    """Verdict and warranty in words, for perturbations like the one of a question."""

    verdict: str
    warranty: str


UNCHECKED = "unknown: the model was not checked on such perturbations"
UNCHECKED_IN_OTHER_CONTEXTS = Fitting(
    UNCHECKED,
    "None: training measured this in other contexts alone, and the model was checked on no such perturbation, so there "
    "are no intervals. A split of kind unseen_context checks it",
)
UNCHECKED_HERE = Fitting(
    UNCHECKED,
    "None: the model was checked on perturbations that training measured in other contexts alone, and this is none of "
    "them",
)


def fitting(content: dict, in_other_contexts: bool) -> Fitting:
    """Return verdict and warranty in words, by the test perturbations that are like the one of a question.

    Parameters
    ----------
    content
        Of warranty.json.
    in_other_contexts
        Whether training measured the perturbation in none of the contexts of the question.
    """
    if not was_checked(content, in_other_contexts):
        return UNCHECKED_IN_OTHER_CONTEXTS if in_other_contexts else UNCHECKED_HERE
    rows = _checked(content, in_other_contexts)
    if len(rows) < len(content["perturbations"]):
        counts = {key: content["coverage"][0][key] for key in ("n_calibration", "n_calibration_perturbations")}
        content = {**content, **summary_of(rows, counts)}
    return Fitting(content["verdict"], sentence(content))
