"""Trust: how far an answer can be believed, by its own posterior, by its neighbours, and by answers like it.

1. Promise. If the effect of an answer μ is Gaussian with variances u, and a screen measures it with variances v s, the
   expected correlation of answer and measurement is about

       promised = ‖μ‖ / √( ‖μ‖² + Σ_g (u_g + v_g s) ).

2. Kept. Perturbations that were held out (`models.calibration`) have a promise too, and the correlation that was found:
   of the whole effect, and specific, beyond the mean effect of training (`agreement.without`). An answer gets those of
   the same novelty. If their promises order what they kept, it gets the NEAREST of them by promise; else all.

3. Neighbours. A source that knows an unseen gene names its N_NEIGHBOURS nearest training genes. They agree as far as
   their effects, minus the mean and at unit length, add up: ‖Σ_i u_i‖ / n, 1 where all are alike. Sources agree as the
   means over their neighbours correlate. This is shown beside the promise, which orders what is kept as well or better
   on the screens where anything does (docs/results/what-if.md, "Trust").
"""

import itertools
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.spatial.distance import cdist
from scipy.stats import spearmanr

from perturbflow.embeddings import Embeddings
from perturbflow.evaluation.bootstrap import MIN_PERTURBATIONS, mean_with_interval
from perturbflow.evaluation.similarity import correlation
from perturbflow.genes.symbols import entities_of, entity_of
from perturbflow.models.calibration import Calibration
from perturbflow.models.effects import Effects
from perturbflow.pairs import Pairs

N_NEIGHBOURS = 5
NEAREST = 20  # held-out perturbations
LEAST_ORDER = 0.05  # p-value below which promises order what was kept
RANGE = (0.1, 0.9)  # of correlations that were kept
KINDS = {
    "measured": "measured perturbations",
    "seen": "combinations of measured genes",
    "unseen gene": "genes never perturbed",
    "unseen member": "combinations with a gene never perturbed",
}


@dataclass(frozen=True)
class Kept:
    """The correlations that held-out answers like one kept.

    Attributes
    ----------
    n
        Held-out perturbations.
    median, low, high
        Of their correlations of whole effects, and the quantiles RANGE.
    specific
        Their mean correlation beyond the mean effect of training, with the ends of its interval: mean, low, high.
    whole
        The same of whole effects.
    """

    n: int
    median: float
    low: float
    high: float
    specific: dict[str, float]
    whole: dict[str, float]

    @classmethod
    def of(cls, calibration: Calibration, novelty: str, promised: float) -> "Kept | None":
        """Look up answers of the same novelty; None where these are too few."""
        rows = np.array([of == novelty for of in calibration.novelties], dtype=bool)
        found = calibration.accuracy[rows] if rows.any() else np.zeros((0, 3))
        found = found[np.isfinite(found).all(axis=1)]
        if len(found) < MIN_PERTURBATIONS:
            return None
        if len(found) > NEAREST and np.isfinite(promised) and is_ordered(found[:, 0], found[:, 1]):
            found = found[np.argsort(np.abs(found[:, 0] - promised), kind="stable")[:NEAREST]]
        whole, specific = found[:, 1], found[:, 2]
        low, high = np.quantile(whole, RANGE)
        return cls(
            len(found),
            float(np.median(whole)),
            float(low),
            float(high),
            mean_with_interval(specific.tolist()),
            mean_with_interval(whole.tolist()),
        )

    @property
    def judgement(self) -> str:
        """What such answers are worth, in words."""
        if not self.whole["low"] > 0 and not self.specific["low"] > 0:
            return "worth nothing: no better than chance"
        if not self.specific["low"] > 0:
            return "worth no more than the mean effect of training"
        return "worth something"


def is_ordered(promised: np.ndarray, kept: np.ndarray) -> bool:
    """Return whether greater promises go with greater correlations, by Spearman's test."""
    if np.ptp(promised) == 0 or np.ptp(kept) == 0:
        return False
    found = spearmanr(promised, kept, alternative="greater")
    return bool(found.pvalue < LEAST_ORDER)


@dataclass(frozen=True)
class Trust:
    """How far one answer can be believed.

    Attributes
    ----------
    promised
        Expected correlation with a measurement.
    sd
        Root mean square of the posterior standard deviation over genes; NaN where the model has none.
    on_panel
        Whether all perturbed genes are measured.
    neighbours, sources, n_sources
        Agreement of neighbours and of sources, NaN without any, and number of sources that know the unseen gene.
    kept
        Of answers like it.
    leans_on
        Training perturbations that it rests on, the most important first.
    is_elsewhere
        Whether training measured it in other contexts alone.
    """

    novelty: str
    promised: float
    sd: float
    on_panel: bool
    neighbours: float
    sources: float
    n_sources: int
    kept: Kept | None
    leans_on: tuple[str, ...] = ()
    is_elsewhere: bool = False

    @property
    def words(self) -> str:
        """In words, what such answers are worth first."""
        if self.novelty == "measured":
            if self.is_elsewhere:
                return "measured in training, but in other contexts alone: an estimate from its cells there"
            return "measured in training: an estimate from its own cells"
        kind = KINDS[self.novelty]
        if self.kept is None:
            return f"unknown: too few {kind} were held out"
        kept = self.kept
        return (
            f"{kept.judgement}. Of {kept.n} {kind} like this one, held out, the median correlation was "
            f"{kept.median:.2f} ({kept.low:.2f} to {kept.high:.2f})"
        )

    @property
    def row(self) -> dict[str, Any]:
        """Columns of a table."""
        return {
            "trust": self.words,
            "promised": self.promised,
            "kept": self.kept.median if self.kept else np.nan,
            "kept_low": self.kept.low if self.kept else np.nan,
            "kept_high": self.kept.high if self.kept else np.nan,
            "sd": self.sd,
            "neighbours_agree": self.neighbours,
            "sources_agree": self.sources,
            "n_sources": self.n_sources,
            "on_panel": self.on_panel,
            "leans_on": ", ".join(self.leans_on),
        }


class Neighbourhood:
    """The training genes that lie near an unseen gene, by every source.

    Parameters
    ----------
    training
        Training cells.
    vectors
        Of perturbed genes and of those that are asked about.
    """

    def __init__(self, training: Pairs, vectors: Embeddings) -> None:
        effects = Effects.of_training(training)
        of_gene = {entity_of(member): effect for member, effect in effects.by_gene().items()}
        self.genes, self.seen = list(of_gene), set(effects.entities)
        values = np.stack(list(of_gene.values())).astype(np.float64)
        self.effects = values - values.mean(axis=0)
        self.directions = self.effects / np.maximum(np.linalg.norm(self.effects, axis=1, keepdims=True), 1e-12)
        self.tables: dict[str, tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]] = {}
        if len(self.genes) <= N_NEIGHBOURS:
            return
        table = vectors.standardized(effects.genes)
        for source in vectors.sources:
            columns = [column for column in table if column.split(":")[0] == source]
            known = vectors.of_source(source).table.index
            rows = {entity_of(gene): row for gene, row in zip(known, table.loc[known, columns].to_numpy(), strict=True)}
            places = np.array([i for i, gene in enumerate(self.genes) if gene in rows], dtype=int)
            if len(places) > N_NEIGHBOURS:
                self.tables[source] = rows, places, np.stack([rows[self.genes[i]] for i in places])

    def nearest(self, gene: str) -> dict[str, np.ndarray]:
        """Return the places of the nearest training genes by every source that knows the gene."""
        found = {}
        for source, (rows, places, own) in self.tables.items():
            if gene in rows:
                distance = cdist(rows[gene][None], own, "sqeuclidean")[0]
                found[source] = places[np.argpartition(distance, N_NEIGHBOURS)[:N_NEIGHBOURS]]
        return found

    def of(self, label: str) -> tuple[float, float, int]:
        """Return agreement of neighbours and of sources, and number of sources, for the least known unseen gene."""
        unseen = [gene for gene in entities_of(label) if gene not in self.seen]
        found = [self._of_gene(gene) for gene in unseen]
        return min(found, key=lambda one: (one[2], np.nan_to_num(one[0]))) if found else (np.nan, np.nan, 0)

    def _of_gene(self, gene: str) -> tuple[float, float, int]:
        nearest = self.nearest(gene)
        if not nearest:
            return np.nan, np.nan, 0
        lengths = [np.linalg.norm(self.directions[places].mean(axis=0)) for places in nearest.values()]
        means = [self.effects[places].mean(axis=0) for places in nearest.values()]
        pairs = [correlation(a, b) for a, b in itertools.combinations(means, 2)]
        return float(np.mean(lengths)), float(np.mean(pairs)) if pairs else np.nan, len(nearest)

    def names(self, label: str) -> list[str]:
        """Return what training measured of a label: its members, or the nearest genes of those it never perturbed.

        Members come first, then the genes that most sources name.
        """
        members, named = [gene for gene in entities_of(label) if gene in self.seen], Counter[str]()
        for gene in entities_of(label):
            if gene not in self.seen:
                named.update(self.genes[i] for places in self.nearest(gene).values() for i in places)
        return members + sorted(named, key=lambda gene: (-named[gene], gene))
