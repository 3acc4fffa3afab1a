"""Ceilings: what measured cells of the same perturbation predict. No model; the row every other row is read against."""

from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from perturbflow.embeddings import Embeddings
from perturbflow.models.base import Artefact, Model, Run
from perturbflow.pairs import Pairs


class TechnicalDuplicate(Model):
    """Half 'a' of the measured cells of a held-out perturbation predicts half 'b', on which every model is scored."""

    is_ceiling: ClassVar[bool] = True

    def fit(self, pairs: Pairs, embeddings: Embeddings, run: Run) -> Artefact:
        """Keep half 'a' of all held-out perturbations; of one that has cells in test and in validation, those in test."""
        is_test = (pairs.obs["role"] == "test").to_numpy()
        is_of_its_role = is_test | ~np.isin(pairs.labels, pairs.labels[is_test])
        duplicate = np.flatnonzero((pairs.obs["half"] == "a").to_numpy() & is_of_its_role)
        self.artefact = {"X": pairs.X[duplicate].toarray(), "labels": pairs.labels[duplicate].astype(str)}
        return self.artefact

    def restore(self, artefact: Artefact) -> None:
        """Take over the cells."""
        self.artefact = artefact

    def predict(self, cells: np.ndarray, perturbations: Sequence[str], n: int, seed: int) -> np.ndarray:
        """Return measured cells, each once: at most n of the duplicate half, drawn at random."""
        rng = np.random.default_rng(seed)
        rows = [rng.permutation(np.flatnonzero(self.artefact["labels"] == perturbation))[:n] for perturbation in perturbations]
        return np.stack([self.artefact["X"][chosen] for chosen in rows])
