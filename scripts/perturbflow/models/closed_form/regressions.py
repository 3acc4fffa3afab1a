"""Closed forms that predict unseen genes from vectors or covariances; genes measured alone keep their effect."""

from abc import abstractmethod
from collections.abc import Sequence

import numpy as np
from scipy.spatial.distance import cdist, pdist

from perturbflow.embeddings import Embeddings
from perturbflow.genes.symbols import entity_of
from perturbflow.models.base import Artefact, Run
from perturbflow.models.closed_form.base import TrainingSet, least_error
from perturbflow.models.closed_form.baselines import Additive
from perturbflow.models.closed_form.doses import Doses
from perturbflow.models.gaussian_process.own_gene import OwnGene
from perturbflow.pairs import Pairs

RIDGES = (0.03, 0.3, 1.0, 3.0, 30.0)
NEIGHBOURS = (1, 3, 5, 10)
LEAF_SIZES = (1, 3, 5)
N_TREES = 200
N_DIRECTIONS = 20
LEAST_GENES = 3


class GeneTable(Additive):
    """Effects of single genes: measured where training holds them, predicted elsewhere; members add up."""

    @abstractmethod
    def predicted(self, training: TrainingSet, known: dict[str, np.ndarray], genes: Sequence[str]) -> np.ndarray:
        """Return effects of genes that training does not hold alone, (len(genes), measured genes)."""

    def add_genes(self, pairs: Pairs, embeddings: Embeddings, seed: int) -> None:
        """Learn again, which takes seconds, and predict the further genes too."""
        self.fit(pairs, embeddings, Run(seed=seed))

    def learn(self, training: TrainingSet) -> Artefact:
        """Keep measured effects, and predict those of all other genes with a row of vectors."""
        known = training.effects.by_gene()
        doses = Doses(known)
        unknown = [gene for gene in training.embeddings.table.index if not doses.holds(gene)]
        mean = np.mean(list(known.values()), axis=0)
        predicted = self.predicted(training, known, unknown) if unknown else np.zeros((0, len(mean)))
        return {
            "genes": np.array([*known, *unknown], dtype=str),
            "effects": np.vstack([*known.values(), predicted]),
            "mean": mean,
        }


class VectorTable(GeneTable):
    """A prediction from gene vectors: those of one source, or of all.

    It is the mean effect for a gene without a vector, and where fewer than three known genes have one.

    Parameters
    ----------
    source
        Name of an embedding source; None takes all.
    """

    def __init__(self, source: str | None = None) -> None:
        self.source = source

    @abstractmethod
    def regress(self, X: np.ndarray, Y: np.ndarray, new: np.ndarray) -> np.ndarray:
        """Return effects of new genes, (new, genes).

        Parameters
        ----------
        X, Y
            Standardized vectors, (known, dimensions), and effects, (known, genes), of known genes.
        new
            Standardized vectors, (new, dimensions).
        """

    def predicted(self, training: TrainingSet, known: dict[str, np.ndarray], genes: Sequence[str]) -> np.ndarray:
        """Regress effects on vectors."""
        predicted = np.tile(np.mean(list(known.values()), axis=0), (len(genes), 1))
        vectors = training.embeddings if self.source is None else training.embeddings.of_source(self.source)
        has_vector = vectors.table.index[vectors.table.notna().any(axis=1)]
        usable = [gene for gene in known if gene in has_vector]
        new = [i for i, gene in enumerate(genes) if gene in has_vector]
        if len(usable) >= LEAST_GENES and new:
            table = vectors.standardized(usable)
            X, wanted = table.loc[usable].to_numpy(float), table.loc[[genes[i] for i in new]].to_numpy(float)
            predicted[new] = self.regress(X, np.stack([known[gene] for gene in usable]), wanted)
        return predicted


class KernelRidge(VectorTable):
    """Kernel ridge regression of effects, centred, on gene vectors.

    Parameters
    ----------
    ridge
        Penalty, in units of the kernel's mean diagonal.
    bandwidth
        Of a Gaussian kernel, in units of the median distance. None takes the linear kernel: plain ridge regression.
    """

    def __init__(self, ridge: float, bandwidth: float | None = None, source: str | None = None) -> None:
        super().__init__(source)
        self.ridge = ridge
        self.bandwidth = bandwidth

    def regress(self, X: np.ndarray, Y: np.ndarray, new: np.ndarray) -> np.ndarray:
        """Solve in the dual: genes are fewer than dimensions."""
        distances = pdist(X)
        if self.bandwidth is None:
            scale = max((X**2).sum(axis=1).mean(), 1e-12)
            among, across = X @ X.T / scale, new @ X.T / scale
        else:
            width = self.bandwidth * (np.median(distances[distances > 0]) if (distances > 0).any() else 1.0)
            among, across = (np.exp(-0.5 * (cdist(rows, X) / width) ** 2) for rows in (X, new))
        mean = Y.mean(axis=0)
        return mean + across @ np.linalg.solve(among + self.ridge * np.eye(len(X)), Y - mean)


class Nearest(VectorTable):
    """The mean effect of the k known genes with the nearest vectors."""

    def __init__(self, k: int, source: str | None = None) -> None:
        super().__init__(source)
        self.k = k

    def regress(self, X: np.ndarray, Y: np.ndarray, new: np.ndarray) -> np.ndarray:
        """Average over neighbours."""
        return Y[np.argsort(cdist(new, X), axis=1, kind="stable")[:, : self.k]].mean(axis=1)


class Forest(VectorTable):
    """Random forest from gene vectors to the leading principal directions of the effects."""

    def __init__(self, leaf_size: int, n_trees: int, seed: int) -> None:
        super().__init__()
        self.leaf_size, self.n_trees, self.seed = leaf_size, n_trees, seed

    def regress(self, X: np.ndarray, Y: np.ndarray, new: np.ndarray) -> np.ndarray:
        """Grow the trees on scores and decode."""
        from sklearn.ensemble import RandomForestRegressor  # the import takes a second, and most models need none

        mean = Y.mean(axis=0)
        _, _, directions = np.linalg.svd(Y - mean, full_matrices=False)
        V = directions[:N_DIRECTIONS]
        forest = RandomForestRegressor(
            self.n_trees, min_samples_leaf=self.leaf_size, max_features=1 / 3, random_state=self.seed
        )
        scores = forest.fit(X, (Y - mean) @ V.T).predict(new).reshape(len(new), -1)
        return mean + scores @ V


class Ridge(Additive):
    """Ridge regression of single effects on the gene embeddings (Csendes et al. 2025).

    Inner folds over genes choose its penalty.
    """

    def learn(self, training: TrainingSet) -> Artefact:
        """Choose the penalty, then fit."""
        return least_error([KernelRidge(ridge) for ridge in RIDGES], training, of_genes=True).learn(training)


class NearestPerturbation(Additive):
    """The mean effect of the training genes with the nearest embeddings; inner folds over genes choose their number."""

    def learn(self, training: TrainingSet) -> Artefact:
        """Choose the number of neighbours, then look them up."""
        return least_error([Nearest(k) for k in NEIGHBOURS], training, of_genes=True).learn(training)


class RandomForest(Additive):
    """Random forest on the gene embeddings (Ahlmann-Eltze et al. 2025, Csendes et al. 2025).

    Inner folds over genes choose its leaf size.
    """

    def learn(self, training: TrainingSet) -> Artefact:
        """Choose the leaf size on small forests, then grow a large one."""
        candidates = [Forest(size, N_TREES // 10, training.seed) for size in LEAF_SIZES]
        chosen = least_error(candidates, training, of_genes=True, one_by_one=False)
        return Forest(chosen.leaf_size, N_TREES, training.seed).learn(training)


class CovarianceResponse(GeneTable):
    """Linear response: a perturbation changes genes as they covary with its target in control cells (CIPHER).

    Δ = c · Σ_{·t} / Σ_tt · δ_t. Σ is the covariance of training controls, δ_t the expected effect on the target itself
    (`OwnGene`); c is fitted to training genes. A target that is not measured has no response.
    """

    def predicted(self, training: TrainingSet, known: dict[str, np.ndarray], genes: Sequence[str]) -> np.ndarray:
        """Respond in proportion to the covariance."""
        covariance, level = training.pairs.control_covariance, training.pairs.control_level
        own = OwnGene.fit(training.pairs, training.effects)

        def response(member: str) -> np.ndarray:
            gene = entity_of(member)
            if gene not in training.row:
                return np.zeros(len(level))
            target = training.row[gene]
            return covariance[target] / max(covariance[target, target], 1e-12) * own.effect(float(level[target]))

        responses = np.stack([response(gene) for gene in known])
        energy = (responses**2).sum()
        c = max((responses * np.stack(list(known.values()))).sum() / energy, 0.0) if energy > 0 else 0.0
        return c * np.stack([response(gene) for gene in genes])
