"""Ceilings: what measured cells of the same perturbation predict. No model; the row every other row is read against."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy.stats import false_discovery_control, ttest_ind_from_stats

from perturbflow.controls import Context
from perturbflow.embeddings import Embeddings
from perturbflow.models.base import Artefact, Ceiling, Run, start_cells
from perturbflow.models.effects import Effects
from perturbflow.pairs import Pairs


class TechnicalDuplicate(Ceiling):
    """Half 'a' of the measured cells of a held-out perturbation predicts half 'b', on which every model is scored."""

    def fit(self, pairs: Pairs, embeddings: Embeddings, run: Run) -> Artefact:
        """Note which cells are half 'a' of every held-out perturbation; they stay in pairs.h5ad."""
        cells = pairs.select((pairs.obs["half"] == "a").to_numpy() | pairs.is_control)
        of_role = {
            role: cells.roles(role) for role in ("validation", "test")
        }  # a perturbation may be held out in both: test counts
        rows: dict[str, np.ndarray] = {}
        shifts: list[np.ndarray] = []
        known = {role: set(held_out.perturbations) for role, held_out in of_role.items()}
        for label in sorted(known["validation"] | known["test"]):
            held_out = of_role["test" if label in known["test"] else "validation"]
            rows[label] = held_out.rows[held_out.cells_of(label)]
            shifts.append(self.shift(held_out, label))
        self.restore({
            "shift_of": np.array(list(rows), dtype=str), "shifts": np.stack(shifts).astype(np.float32),
            "labels": np.repeat(list(rows), list(map(len, rows.values()))), "rows": np.concatenate(list(rows.values())),
        })  # fmt: skip
        return self.artefact

    def shift(self, held_out: Pairs, label: str) -> np.ndarray:
        """Return what is added to the cells that stand for a perturbation, (genes,)."""
        return np.zeros(len(held_out.genes))

    def restore(self, artefact: Artefact) -> None:
        """Take over which cells they are."""
        self.artefact = artefact
        self._places = pd.Series(artefact["labels"]).groupby(artefact["labels"]).indices
        self._shift_of = dict(zip(artefact["shift_of"].tolist(), artefact["shifts"], strict=True))

    def predict(
        self, cells: np.ndarray, perturbations: Sequence[str], n: int, seed: int, context: Context | None = None
    ) -> np.ndarray:
        """Return the measured cells, each with the shift of its perturbation."""
        start = start_cells(cells, n)
        return np.stack([start + self._shift_of[perturbation] for perturbation in perturbations])

    def rows(self, perturbation: str, n: int, seed: int) -> np.ndarray:
        """Return the row of pairs.h5ad of at most n cells of the duplicate half, drawn at random, each once."""
        drawn = np.random.default_rng(seed).permutation(self._places[perturbation])[:n]
        return self.artefact["rows"][drawn]


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

    def shift(self, held_out: Pairs, label: str) -> np.ndarray:
        """Return the way from the perturbation's effect to the mean effect, (genes,)."""
        return held_out.mean_effect - held_out.effect_of(label)


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

    def shift(self, held_out: Pairs, label: str) -> np.ndarray:
        """Return the way from the cells' mean towards the mean effect, by how doubtful each gene is, (genes,)."""
        groups, sums = held_out.groups, held_out.sums
        place, n_controls = groups.labels.index(label), int(held_out.is_control.sum())
        n = groups.n_cells[place]
        mean, squares = (of_groups[place] / n for of_groups in sums)
        if n < 2 or n_controls < 2:
            return np.zeros_like(mean)
        control = held_out.control_mean_for(held_out.cells_of(label))
        deviations = [
            np.sqrt(np.maximum(variance, 0.0) * n / (n - 1))
            for variance, n in ((squares - mean**2, n), (held_out.control_variance, n_controls))
        ]
        p = ttest_ind_from_stats(mean, deviations[0], n, control, deviations[1], n_controls, equal_var=False).pvalue
        alpha = 1.0 - false_discovery_control(np.nan_to_num(p, nan=1.0))
        return (1.0 - alpha) * (control + self.mean_effect - mean)
