"""Ceilings: predictions by measured cells of the same perturbation. They are no models but the scale for models."""

from collections.abc import Sequence

import numpy as np
from scipy.stats import false_discovery_control, ttest_ind_from_stats

from perturbflow.embeddings import Embeddings
from perturbflow.models.base import Artefact, Ceiling, Run
from perturbflow.models.effects import Effects
from perturbflow.pairs import Context, Pairs


class TechnicalDuplicate(Ceiling):
    """Half 'a' of the measured cells of a held-out perturbation predicts half 'b', on which every model is scored."""

    def fit(self, pairs: Pairs, embeddings: Embeddings, run: Run) -> Artefact:
        """Keep half 'a' of all held-out perturbations."""
        cells = pairs.select((pairs.obs["half"] == "a").to_numpy() | pairs.is_control)
        # A perturbation may be held out in both roles: test counts.
        of_role = {role: cells.roles(role) for role in ("validation", "test")}
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
        """Return the cells that predict for these rows, (cells, genes)."""
        return held_out.X[rows].toarray()

    def restore(self, artefact: Artefact) -> None:
        """Take over the cells."""
        self.artefact = artefact

    def predict(
        self, cells: np.ndarray, perturbations: Sequence[str], n: int, seed: int, context: Context | None = None
    ) -> np.ndarray:
        """Return a random sample of the duplicate half without replacement, of at most n cells."""
        return np.stack([self.artefact["X"][self._sampled(perturbation, n, seed)] for perturbation in perturbations])

    def rows(self, perturbation: str, n: int, seed: int) -> np.ndarray:
        """Return the row of pairs.h5ad of every cell that `predict` returns."""
        return self.artefact["rows"][self._sampled(perturbation, n, seed)]

    def _sampled(self, perturbation: str, n: int, seed: int) -> np.ndarray:
        return np.random.default_rng(seed).permutation(np.flatnonzero(self.artefact["labels"] == perturbation))[:n]


class PerfectMean(TechnicalDuplicate):
    """The score of a perfect predictor of the mean against half 'b': half 'a' predicts, and its noise is removed.

    The cells are those of the technical duplicate. Each metric that has a formula for it removes the noise of half 'a'
    from the score. By the other metrics it scores as the technical duplicate does.
    """

    noise_removed = True


class InterpolatedDuplicate(TechnicalDuplicate):
    """The duplicate for genes that differ from controls beyond doubt, the mean training effect for the others.

    x̂_g = α_g x̄^a_g + (1 − α_g)(c̄_g + μ_g). α_g is 1 minus the adjusted p of gene g in half 'a' against controls
    (Welch's t, Benjamini-Hochberg); μ is the mean effect of training perturbations (Miller et al. 2025). The cells are
    those of half 'a', with the difference of means added gene by gene.
    """

    def fit(self, pairs: Pairs, embeddings: Embeddings, run: Run) -> Artefact:
        """Measure the mean training effect, then interpolate."""
        self.mean_effect = Effects.of_training(pairs).values.mean(axis=0)
        return super().fit(pairs, embeddings, run)

    def duplicate(self, held_out: Pairs, rows: np.ndarray, pairs: Pairs) -> np.ndarray:
        """Move the cells' means towards the mean effect, the further the more doubtful a gene is."""
        controls = np.flatnonzero(held_out.is_control)
        cells, control = held_out.X[rows].toarray(), held_out.control_mean_for(rows)
        if len(rows) < 2 or len(controls) < 2:
            return cells
        sd, sd_controls = (
            np.sqrt(held_out.variance_of(group) * len(group) / (len(group) - 1)) for group in (rows, controls)
        )
        perturbed = (cells.mean(axis=0), sd, len(rows))
        tested = ttest_ind_from_stats(*perturbed, control, sd_controls, len(controls), equal_var=False)
        alpha = 1.0 - false_discovery_control(np.nan_to_num(tested.pvalue, nan=1.0))
        return cells + (1.0 - alpha) * (control + self.mean_effect - cells.mean(axis=0))
