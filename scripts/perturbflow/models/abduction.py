"""What of a cell's expression is its own state: the directions that two halves of its molecules agree on.

Each molecule of a cell is dealt to one of two halves (count splitting, Neufeld et al. 2024, doi:10.1093/biostatistics/kxac047). The halves share the
cell's rates and none of the measurement's noise, so the covariance of one half's expression with the other's is that of the rates. Its noise
eigenvalues lie as far below zero as above: directions beyond the most negative one are states, and along each of them the halves say how far a
measured cell is to be trusted. Given the measurement s of standardized coordinates of reliability ρ, the state is ρ s, known up to √(ρ(1−ρ)).
"""

from dataclasses import dataclass

import numpy as np
from scipy import sparse
from scipy.sparse.linalg import LinearOperator, eigsh

from perturbflow.models.effects import Effects
from perturbflow.models.recount import unit_of
from perturbflow.pairs import Pairs

MAX_CELLS = 10_000
MAX_STATES = 16
HIGHEST_RELIABILITY = 0.98


@dataclass(frozen=True)
class States:
    """s = (x − mean) basis / scale.

    Attributes
    ----------
    mean
        (genes,).
    basis
        Orthonormal, (genes, states).
    scale
        Standard deviation of measured cells along each, within batch, cell type and perturbation, (states,).
    reliability
        ρ: share of that variance that is the cells' own, (states,).
    """

    mean: np.ndarray
    basis: np.ndarray
    scale: np.ndarray
    reliability: np.ndarray

    @classmethod
    def fit(cls, training: Pairs, most: int) -> "States":
        """Find the states of training cells; what their perturbation or batch does to the mean is none of theirs."""
        rows = np.arange(len(training.rows))
        rng = np.random.default_rng(0)
        if len(rows) > MAX_CELLS:
            rows = np.sort(rng.choice(rows, MAX_CELLS, replace=False))
        X = training.X[rows]
        group = training.groups.of_cell[rows]
        group = np.where(group < len(training.groups.labels), group, len(training.groups.labels))  # the halves of controls are one
        group = np.unique(group * (training.groups.stratum.max() + 1) + training.groups.stratum[rows], return_inverse=True)[1]
        whole, *halves = (_Centred.of(table, group) for table in (X, *_halves(X, rng)))
        shared = LinearOperator(
            (X.shape[1],) * 2,
            matvec=lambda v: (halves[0].across(halves[1].along(v)) + halves[1].across(halves[0].along(v))) / (2 * len(rows)),
            dtype=np.float64,
        )
        most = min(most, MAX_STATES, X.shape[1] - 2)
        start = np.random.default_rng(0).normal(size=X.shape[1])
        values, vectors = eigsh(shared, most, which="LA", v0=start, tol=1e-6)
        noise = -min(0.0, eigsh(shared, 1, which="SA", v0=start, tol=1e-3, return_eigenvectors=False)[0])
        order = np.argsort(-values)
        order = order[: max(1, int((values > noise).sum()))]
        basis = vectors[:, order] * np.sign(vectors[np.abs(vectors[:, order]).argmax(axis=0), order])
        a, b = (half.along(basis) for half in halves)
        shared = (a * b).mean(axis=0) - noise  # directions were chosen by what halves share here: by as much as noise has, they look better
        agreement = np.clip(shared / np.sqrt((a**2).mean(axis=0) * (b**2).mean(axis=0)), 0.01, 1.0)
        reliability = np.minimum(2 * agreement / (1 + agreement), HIGHEST_RELIABILITY)  # of the whole (Spearman 1910; Brown 1910)
        scale = np.maximum(np.sqrt((whole.along(basis) ** 2).mean(axis=0)), 1e-3)
        return cls(np.asarray(training.control_level, dtype=np.float64), basis, scale, reliability)


@dataclass(frozen=True)
class _Centred:
    """Cells less the mean of their group, without ever being dense."""

    X: sparse.csr_matrix
    group: np.ndarray
    means: np.ndarray

    @classmethod
    def of(cls, X: sparse.csr_matrix, group: np.ndarray) -> "_Centred":
        indicator = sparse.csr_matrix((np.ones(len(group)), (group, np.arange(len(group)))))
        return cls(X, group, (indicator @ X).toarray() / np.asarray(indicator.sum(axis=1)))

    def along(self, v: np.ndarray) -> np.ndarray:
        """(genes, …) → (cells, …)."""
        return self.X @ v - (self.means @ v)[self.group]

    def across(self, v: np.ndarray) -> np.ndarray:
        """(cells, …) → (genes, …)."""
        sums = np.zeros((len(self.means), *v.shape[1:]))
        np.add.at(sums, self.group, v)
        return self.X.T @ v - self.means.T @ sums


def _halves(X: sparse.csr_matrix, rng: np.random.Generator) -> tuple[sparse.csr_matrix, sparse.csr_matrix]:
    """Deal the counts of log1p-normalized cells to two halves, each normalized as the whole is, with the library size it has left."""
    X = X.tocsr().astype(np.float64)
    cell = np.repeat(np.arange(X.shape[0]), np.diff(X.indptr))
    normalized = np.expm1(X.data)
    unit = np.concatenate([unit_of(np.expm1(X[rows : rows + 1024].toarray())) for rows in range(0, X.shape[0], 1024)])
    k = np.rint(normalized / unit[cell]).astype(np.int64)
    first = rng.binomial(k, 0.5)
    total = np.bincount(cell, normalized, X.shape[0])

    def half(counts: np.ndarray) -> sparse.csr_matrix:
        size = np.maximum(np.bincount(cell, counts, X.shape[0]), 1.0)
        return sparse.csr_matrix((np.log1p(counts * (total / size)[cell]), X.indices, X.indptr), shape=X.shape)

    return half(first), half(k - first)


def effect_directions(effects: Effects, most: int) -> np.ndarray:
    """Return the directions in which perturbations differ from controls by more than sampling noise, orthonormal, (genes, at most so many).

    Effects in units of their standard errors are noise of variance 1 where nothing happens; of P × G such numbers no singular value is above √P + √G
    (Marchenko & Pastur 1967). The greatest one is kept in any case.
    """
    error = np.sqrt(np.maximum(effects.errors, 1e-8))
    values = effects.values.astype(np.float64)
    u, singular, _ = np.linalg.svd(values / error, full_matrices=False)
    n = min(most, max(1, int((singular > np.sqrt(len(values)) + np.sqrt(values.shape[1])).sum())))
    return np.linalg.qr(values.T @ u[:, :n])[0]
