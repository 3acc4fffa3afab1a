"""Ceilings: what measured cells of the same perturbation predict. No model; the row every other row is read against."""

from collections.abc import Sequence

import numpy as np
from scipy.stats import false_discovery_control, ttest_ind_from_stats

from perturbflow.controls import Context
from perturbflow.embeddings import Embeddings
from perturbflow.models.base import Artefact, Ceiling, Run
from perturbflow.models.effects import Effects
from perturbflow.pairs import Pairs


class TechnicalDuplicate(Ceiling):
    """Half 'a' of the measured cells of a held-out perturbation predicts half 'b', on which every model is scored."""

    def fit(self, pairs: Pairs, embeddings: Embeddings, run: Run) -> Artefact:
        """Keep half 'a' of all held-out perturbations."""
        cells = pairs.select((pairs.obs["half"] == "a").to_numpy() | pairs.is_control)
        of_role = {
            role: cells.roles(role) for role in ("validation", "test")
        }  # a perturbation may be held out in both: test counts
        X, labels, of_pairs = [], [], []
        for label in sorted({label for held_out in of_role.values() for label in held_out.perturbations}):
            held_out = of_role["test" if label in of_role["test"].perturbations else "validation"]
            rows = held_out.cells_of(label)
            X.append(self.duplicate(held_out, rows, pairs))
            labels += [label] * len(rows)
            of_pairs.append(held_out.rows[rows])
        self.artefact = {"X": np.vstack(X), "labels": np.array(labels, dtype=str), "rows": np.concatenate(of_pairs)}
        return self.artefact

    def duplicate(self, held_out: Pairs, rows: np.ndarray, pairs: Pairs) -> np.ndarray:
        """Return the cells that stand for these, (cells, genes)."""
        return held_out.X[rows].toarray()

    def restore(self, artefact: Artefact) -> None:
        """Take over the cells."""
        self.artefact = artefact

    def predict(
        self, cells: np.ndarray, perturbations: Sequence[str], n: int, seed: int, context: Context | None = None
    ) -> np.ndarray:
        """Return measured cells, each once: at most n of the duplicate half, drawn at random."""
        return np.stack([self.artefact["X"][self._drawn(perturbation, n, seed)] for perturbation in perturbations])

    def rows(self, perturbation: str, n: int, seed: int) -> np.ndarray:
        """Return the row of pairs.h5ad of every cell that `predict` returns."""
        return self.artefact["rows"][self._drawn(perturbation, n, seed)]

    def _drawn(self, perturbation: str, n: int, seed: int) -> np.ndarray:
        return np.random.default_rng(seed).permutation(np.flatnonzero(self.artefact["labels"] == perturbation))[:n]


class PerfectMean(TechnicalDuplicate):
    """What a perfect predictor of the mean would reach against half 'b': the score of half 'a' without the noise of half 'a'.

    The cells are those of the technical duplicate. Its noise is taken off when they are scored, for each metric that has a formula for it; by the
    others it scores as the technical duplicate does.
    """

    noise_removed = True


class InterpolatedDuplicate(TechnicalDuplicate):
    """The duplicate where it differs from controls beyond doubt, the mean training effect where it does not.

    x̂_g = α_g x̄^a_g + (1 − α_g)(c̄_g + μ_g), α_g = 1 − adjusted p of gene g in half 'a' against controls (Welch's t, Benjamini-Hochberg),
    μ the mean effect of training perturbations (Miller et al. 2025). Cells are those of half 'a', shifted gene by gene.
    """

    def fit(self, pairs: Pairs, embeddings: Embeddings, run: Run) -> Artefact:
        """Measure the mean training effect, then interpolate."""
        self.mean_effect = Effects.of_training(pairs).values.mean(axis=0)
        return super().fit(pairs, embeddings, run)

    def duplicate(self, held_out: Pairs, rows: np.ndarray, pairs: Pairs) -> np.ndarray:
        """Shift the cells' means towards the mean effect, by how doubtful each gene is."""
        controls = np.flatnonzero(held_out.is_control)
        cells, control = held_out.X[rows].toarray(), held_out.control_mean_for(rows)
        if len(rows) < 2 or len(controls) < 2:
            return cells
        deviations = [
            np.sqrt(held_out.variance_of(group) * len(group) / (len(group) - 1)) for group in (rows, controls)
        ]
        p = ttest_ind_from_stats(
            cells.mean(axis=0), deviations[0], len(rows), control, deviations[1], len(controls), equal_var=False
        ).pvalue
        alpha = 1.0 - false_discovery_control(np.nan_to_num(p, nan=1.0))
        return cells + (1.0 - alpha) * (control + self.mean_effect - cells.mean(axis=0))
