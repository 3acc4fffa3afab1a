"""Ceilings: what measured cells of the same perturbation predict. No model; the row every other row is read against."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from scipy import sparse
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
        cells = replace(cells, X=cells.X[:])  # of the cells that are kept, read together
        of_role = {
            role: cells.roles(role) for role in ("validation", "test")
        }  # a perturbation may be held out in both: test counts
        X, labels, of_pairs, shifts = [], [], [], {}
        for label in sorted({label for held_out in of_role.values() for label in held_out.perturbations}):
            held_out = of_role["test" if label in of_role["test"].perturbations else "validation"]
            rows = held_out.cells_of(label)
            X.append(held_out.X[rows])
            shifts[label] = self.shift(held_out, rows)
            labels += [label] * len(rows)
            of_pairs.append(held_out.rows[rows])
        cells_kept = sparse.vstack(X, format="csr")
        self.artefact = {
            "data": cells_kept.data, "indices": cells_kept.indices, "indptr": cells_kept.indptr,
            "shift_of": np.array(list(shifts), dtype=str),
            "shifts": np.stack(list(shifts.values())).astype(np.float32), "labels": np.array(labels, dtype=str),
            "rows": np.concatenate(of_pairs),
        }  # fmt: skip
        return self.artefact

    def shift(self, held_out: Pairs, rows: np.ndarray) -> np.ndarray:
        """Return what is added to the cells that stand for a perturbation, (genes,)."""
        return np.zeros(len(held_out.genes))

    def restore(self, artefact: Artefact) -> None:
        """Take over the cells."""
        self.artefact = artefact

    def predict(
        self, cells: np.ndarray, perturbations: Sequence[str], n: int, seed: int, context: Context | None = None
    ) -> np.ndarray:
        """Return measured cells, each once: at most n of the duplicate half, drawn at random."""
        return np.stack([self._cells(perturbation, n, seed) for perturbation in perturbations])

    def _cells(self, perturbation: str, n: int, seed: int) -> np.ndarray:
        kept, drawn = self.artefact, self._drawn(perturbation, n, seed)
        shifts = kept["shifts"][kept["shift_of"] == perturbation]
        parts = kept["data"], kept["indices"], kept["indptr"]
        cells = sparse.csr_matrix(parts, shape=(len(kept["labels"]), kept["shifts"].shape[1]))
        return cells[drawn].toarray() + shifts[:1]

    def rows(self, perturbation: str, n: int, seed: int) -> np.ndarray:
        """Return the row of pairs.h5ad of every cell that `predict` returns."""
        return self.artefact["rows"][self._drawn(perturbation, n, seed)]

    def _drawn(self, perturbation: str, n: int, seed: int) -> np.ndarray:
        return np.random.default_rng(seed).permutation(np.flatnonzero(self.artefact["labels"] == perturbation))[:n]


class PerfectMean(TechnicalDuplicate):
    """The score of a perfect predictor of the mean against half 'b': that of half 'a' without its noise.

    The cells are those of the technical duplicate. Its noise is taken off when they are scored, for each metric that
    has a formula for it; by the others it scores as the technical duplicate does.
    """

    noise_removed = True


class ContextMean(TechnicalDuplicate):
    """The mean effect of the held-out perturbations in their own context, by half 'a': it has seen them.

    It is what a model would reach that knew the context's mean effect and nothing of the perturbation. Cells are those
    of half 'a', shifted to controls plus this mean.
    """

    def shift(self, held_out: Pairs, rows: np.ndarray) -> np.ndarray:
        """Return the way from the cells' mean to the mean effect on their controls, (genes,)."""
        mean_effect = np.mean([held_out.effect_of(label) for label in held_out.perturbations], axis=0)
        return held_out.control_mean_for(rows) + mean_effect - held_out.mean_of(rows)


class InterpolatedDuplicate(TechnicalDuplicate):
    """The duplicate where it differs from controls beyond doubt, the mean training effect where it does not.

    x̂_g = α_g x̄^a_g + (1 − α_g)(c̄_g + μ_g), α_g = 1 − adjusted p of gene g in half 'a' against
    controls (Welch's t, Benjamini-Hochberg),
    μ the mean effect of training perturbations (Miller et al. 2025). Cells are those of half 'a', shifted gene by gene.
    """

    def fit(self, pairs: Pairs, embeddings: Embeddings, run: Run) -> Artefact:
        """Measure the mean training effect, then interpolate."""
        self.mean_effect = Effects.of_training(pairs).values.mean(axis=0)
        return super().fit(pairs, embeddings, run)

    def shift(self, held_out: Pairs, rows: np.ndarray) -> np.ndarray:
        """Return the way from the cells' mean towards the mean effect, by how doubtful each gene is, (genes,)."""
        n_controls = int(held_out.is_control.sum())
        mean, control = held_out.mean_of(rows), held_out.control_mean_for(rows)
        if len(rows) < 2 or n_controls < 2:
            return np.zeros_like(mean)
        deviations = [
            np.sqrt(variance * n / (n - 1))
            for variance, n in ((held_out.variance_of(rows), len(rows)), (held_out.control_variance, n_controls))
        ]
        p = ttest_ind_from_stats(
            mean, deviations[0], len(rows), control, deviations[1], n_controls, equal_var=False
        ).pvalue
        alpha = 1.0 - false_discovery_control(np.nan_to_num(p, nan=1.0))
        return (1.0 - alpha) * (control + self.mean_effect - mean)
