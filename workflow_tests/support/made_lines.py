"""Lines with known effects: a part in common, one of each line, of each perturbation, and of line × perturbation.

An effect is δ_cp = m + m_c + β_p + ι_cp. Parts are Gaussian with the shares of its energy that are given: the conserved
part β 30 % and the specific part ι 21 %, as published for four lines (yashnil/virtual-cell-generalization); m and m_c
have half of the rest each, which is an assumption.
"""

from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from scipy import sparse

from perturbflow.controls import Context, match_controls
from perturbflow.genes.symbols import CONTROL
from perturbflow.models.base import Ceiling, Model
from perturbflow.models.closed_form.base import MeanEffects, TrainingSet
from perturbflow.models.closed_form.ceilings import TechnicalDuplicate
from perturbflow.pairs import Pairs
from perturbflow.splits.contexts import Support, unseen_context
from perturbflow.splits.divisions import Shares

CONSERVED, SPECIFIC = 0.30, 0.21


def mean_share(conserved: float, specific: float) -> float:
    """Return the share of m, and of m_c."""
    return (1.0 - conserved - specific) / 2


def least_error(n_sources: int, conserved: float = CONSERVED, specific: float = SPECIFIC) -> float:
    """Return the least expected squared error of any zero-shot prediction, as a share of the energy of effects.

    With effects measured without noise in the other lines, the posterior variance of m is 1 / (1/a + k/a) for a the
    share of m and k lines, that of β is 1 / (1/b + k/s); m_c and ι of the new line are as unknown as before.
    """
    a = mean_share(conserved, specific)
    of_mean = a / (1 + n_sources) + a
    of_perturbation = 1.0 / (1.0 / conserved + n_sources / specific) if n_sources else conserved
    return of_mean + of_perturbation + specific


@dataclass(frozen=True)
class Lines:
    """Cells of several lines around known effects.

    Attributes
    ----------
    pairs
        All cells; dataset and cell type are the line, and every line has batches.
    effects
        (line, perturbation) → true effect, (genes,).
    """

    pairs: Pairs
    effects: dict[tuple[str, str], np.ndarray]

    @property
    def labels(self) -> list[str]:
        """Perturbations."""
        return self.pairs.perturbations

    def held_out(self, line: str, support: Support | None = None) -> Pairs:
        """Return the cells with the roles of a split that holds a line out, and controls matched within them."""
        obs = self.pairs.obs
        roles = unseen_context(obs, "dataset", Shares(None, 0.0, 0, None, {line}), support)
        obs = obs.assign(role=roles.fillna("").to_numpy())
        kept = replace(self.pairs, obs=obs).select((obs["role"] != "").to_numpy())
        return replace(kept, control_index=match_controls(kept.obs, 2, 0)[0])

    def errors(self, predicted: dict[str, np.ndarray], line: str) -> tuple[float, float]:
        """Return the squared error of effects as a share of the energy of true ones, and r of centred ones."""
        truth = np.stack([self.effects[line, label] for label in predicted])
        guess = np.stack(list(predicted.values()))
        error = ((guess - truth) ** 2).sum() / (truth**2).sum()
        guess, truth = guess - guess.mean(axis=0), truth - truth.mean(axis=0)
        norm = np.sqrt((guess**2).sum() * (truth**2).sum())
        return float(error), float((guess * truth).sum() / norm) if norm > 0 else 0.0


def made_lines(
    n_lines: int = 4,
    n_perturbations: int = 30,
    n_genes: int = 80,
    n_cells: int = 12,
    n_batches: int = 3,
    conserved: float = CONSERVED,
    specific: float = SPECIFIC,
    noise: float = 0.3,
    seed: int = 0,
) -> Lines:
    """Return lines with controls at levels of their own; a perturbation has n_cells in each of their batches."""
    rng = np.random.default_rng(seed)
    a = mean_share(conserved, specific)
    common, labels = np.sqrt(a) * rng.normal(size=n_genes), [f"P{i:03d}" for i in range(n_perturbations)]
    of_label = {label: np.sqrt(conserved) * rng.normal(size=n_genes) for label in labels}
    blocks, rows, effects = [], [], {}
    for line in (f"line{i}" for i in range(n_lines)):
        level, of_line = 5.0 + rng.normal(size=n_genes), np.sqrt(a) * rng.normal(size=n_genes)
        for label in labels:
            own = np.sqrt(specific) * rng.normal(size=n_genes)
            effects[line, label] = 0.5 * (common + of_line + of_label[label] + own)
        for batch in range(n_batches):
            of_batch = 0.1 * rng.normal(size=n_genes)
            for label in (CONTROL, *labels):
                n = 4 * n_cells if label == CONTROL else n_cells
                mean = level + of_batch + effects.get((line, label), 0.0)
                blocks.append(mean + noise * rng.normal(size=(n, n_genes)))
                rows += [(label, label == CONTROL, f"{line}:b{batch}", line, line)] * n
    obs = pd.DataFrame(rows, columns=["perturbation", "is_control", "batch", "cell_type", "dataset"])
    obs.index = [f"cell_{i}" for i in range(len(obs))]
    obs["half"] = np.where(obs["is_control"], "", np.where(np.arange(len(obs)) % 2, "a", "b"))
    obs["role"] = "train"
    index, genes = np.full((len(obs), 2), -1, np.int32), [f"G{i}" for i in range(n_genes)]
    return Lines(Pairs(sparse.csr_matrix(np.vstack(blocks)), obs, genes, index, np.arange(len(obs))), effects)


def effects_of(model: MeanEffects, training: TrainingSet, pairs: Pairs) -> dict[str, np.ndarray]:
    """Return the effects that a closed form predicts for the tested perturbations in their context, by label."""
    model.restore(model.learn(training))  # type: ignore[attr-defined]
    test = pairs.roles("test")
    return {label: model.effect_in(label, asked(test, label)) for label in test.perturbations}


def predicted_by(model: Model, pairs: Pairs) -> dict[str, np.ndarray]:
    """Return the mean effects of the cells that a model predicts for the tested perturbations, by label."""
    test, found = pairs.roles("test"), {}
    for label in test.perturbations:
        rows = test.control_index[test.cells_of(label), 0]
        start, context = test.X[rows].toarray(), test.context_of(rows)
        found[label] = model.predict(start, [label], len(start), 0, context)[0].mean(axis=0) - context.level
    return found


def asked(test: Pairs, label: str) -> Context:
    """Return where the controls are that cells of a perturbation are matched with."""
    return test.context_of(test.control_index[test.cells_of(label), 0])


def effects_of_ceiling(model: TechnicalDuplicate, training: TrainingSet, pairs: Pairs) -> dict[str, np.ndarray]:
    """Return the effects by a ceiling's cells."""
    assert isinstance(model, Ceiling)
    model.fit(pairs, training.embeddings, None)  # type: ignore[arg-type]
    test = pairs.roles("test")
    found = {}
    for label in test.perturbations:
        rows = model.rows(label, 10**6, 0)
        cells = model.predict(pairs.X[rows].toarray(), [label], len(rows), 0)[0]
        found[label] = cells.mean(axis=0) - test.control_mean_for(np.searchsorted(test.rows, rows))
    return found
