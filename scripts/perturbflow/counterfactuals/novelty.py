"""Novelty: what training knew of a perturbation that a question asks about."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.spatial.distance import cdist

from perturbflow.counterfactuals.contexts import ContextName, MeasuredContexts, contexts_of
from perturbflow.counterfactuals.trust import Neighbourhood
from perturbflow.embeddings import Embeddings
from perturbflow.genes.symbols import CONTROL, entities_of, entity_of, members_of
from perturbflow.models.calibration import novelty_of
from perturbflow.pairs import Pairs


@dataclass(frozen=True)
class Novelty:
    """What training knew of a perturbation.

    Attributes
    ----------
    words
        In words.
    kind
        The kind of perturbation that its intervals are calibrated on (`models.calibration`).
    distance
        Of its unseen gene (the farthest, of several) to the nearest training gene, in units of the median distance of
        training genes to their nearest. It is 0 where all genes were seen, NaN for a gene without a vector.
    is_elsewhere
        Whether training measured it in none of the contexts of the question.
    """

    words: str
    kind: str
    distance: float
    is_elsewhere: bool = False


class TrainingKnowledge:
    """The perturbations, genes and contexts that training measured, and the vectors of its genes."""

    def __init__(self, training: Pairs, vectors: Embeddings, chosen: Pairs) -> None:
        self.labels = set(training.perturbations)
        self.alone = {entity_of(label) for label in training.perturbations if len(members_of(label)) == 1}
        self.seen = sorted({gene for other in training.perturbations for gene in entities_of(other)})
        members = sorted({member for other in training.perturbations for member in members_of(other)})
        table = vectors.standardized(members)
        # A compound has one vector, whatever its dose.
        self.table = table.groupby(list(map(entity_of, table.index))).first()
        self.without_vector = set(map(entity_of, vectors.without_vector))
        own = self.table.reindex(self.seen).dropna().to_numpy()
        among = cdist(own, own)
        np.fill_diagonal(among, np.inf)
        self.typical = float(np.median(among.min(axis=1))) if len(own) > 1 else np.nan
        self.own = own
        self.asked = set(contexts_of(chosen.obs))
        self.measured = MeasuredContexts(training)
        self.neighbourhood = Neighbourhood(training, vectors)

    def of(self, label: str, asked: set[ContextName] | None = None) -> Novelty:
        """Return the novelty of a canonical label in some of the contexts of the question, or in all of them."""
        if label == CONTROL:
            return Novelty("no perturbation", "measured", 0.0)
        asked = self.asked if asked is None else asked
        kind = novelty_of(label, self.labels, set(self.seen))
        where, is_elsewhere = self.measured.words(label, asked), self.measured.is_elsewhere(label, asked)
        unseen = [gene for gene in entities_of(label) if gene not in self.seen]
        if not unseen:
            return Novelty(self._words_of_seen(label, kind) + where, kind, 0.0, is_elsewhere)
        words = f"extrapolation{',' if where else ''}{where}: {len(unseen)} gene(s) never perturbed in training"
        without = [gene for gene in unseen if gene not in self.table.index or gene in self.without_vector]
        if without:
            return Novelty(f"{words}, {len(without)} of them without a vector", kind, np.nan, is_elsewhere)
        distance = float(cdist(self.table.loc[unseen].to_numpy(), self.own).min(axis=1).max() / self.typical)
        words += f", {distance:.1f} times as far from the nearest as training genes are from one another"
        return Novelty(words, kind, distance, is_elsewhere)

    def _words_of_seen(self, label: str, kind: str) -> str:
        if kind == "measured":
            return "measured"
        if len(members_of(label)) > 1:
            return "composed of measured genes"
        return "measured at other doses" if entity_of(label) in self.alone else "known from combinations alone"

    def by_group(self, label: str, chosen: Pairs, groups: pd.Series) -> dict[str, Novelty]:
        """Return the novelty of a label in all cells of the question, and in every group of them."""
        contexts = pd.Series(contexts_of(chosen.obs), index=groups.index)
        of_groups = {name: self.of(label, set(contexts[groups == name])) for name in sorted(groups.unique())}
        return {"all": self.of(label), **of_groups}
