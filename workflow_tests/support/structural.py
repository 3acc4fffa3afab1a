"""A structural model of a screen: every control cell's counterfactual under every perturbation is known.

A cell's exogenous part is its state s, its size l, its own biological noise e and the measurement's noise u. None of
them knows the perturbation:

    log r_g = a_g + s W_g + Σ_j b_jg m_j(s) + log e_g,    k_g = the u_g-quantile of Poisson(l r_g / Σ r)

over the members j of the perturbation. For genes whose effect is the same in all cells m_j(s) = 1. For those whose
effect depends on the state m_j(s) = 2 σ(sharpness · s_j): on axis j of it cells respond, or do not. The counterfactual
cell has the same s, l, e and u under another perturbation (Pearl 2009, section 7.1: abduction, action, prediction).
"""

from dataclasses import dataclass, replace

import anndata as ad
import numpy as np
import pandas as pd
from scipy import sparse
from scipy.special import expit
from scipy.stats import poisson

N_STATES = 3


@dataclass(frozen=True)
class Exogenous:
    """What cells bring with them: state (cells, 3), size (cells,), biological and measurement noise (cells, genes)."""

    state: np.ndarray
    size: np.ndarray
    noise: np.ndarray
    u: np.ndarray


class World:
    """The equations, drawn from a seed.

    Parameters
    ----------
    n_genes
        Measured genes, the perturbed ones among them.
    n_perturbed
        Perturbed genes; the first half has effects that depend on the state, the last has none at all (a placebo).
    depth
        Median counts of a cell.
    """

    def __init__(
        self, seed: int = 0, n_genes: int = 200, n_perturbed: int = 12, depth: float = 2000.0, sharpness: float = 4.0
    ) -> None:
        rng = np.random.default_rng(seed)
        self.seed, self.depth, self.sharpness = seed, depth, sharpness
        self.perturbed = [f"TF{i}" for i in range(1, n_perturbed + 1)]
        self.dependent = self.perturbed[: n_perturbed // 2]
        self.placebo = self.perturbed[-1]
        self.genes = [*self.perturbed, *[f"GENE{i}" for i in range(n_genes - n_perturbed)]]
        self.level = rng.normal(0.0, 1.0, n_genes)
        self.weights = rng.normal(0.0, 0.5, (N_STATES, n_genes)) * (rng.random((N_STATES, n_genes)) < 0.4)
        self.effects = np.zeros((n_perturbed, n_genes))
        for j in range(n_perturbed - 1):
            moved = rng.choice(np.arange(n_perturbed, n_genes), n_genes // 8, replace=False)
            self.effects[j, moved] = rng.choice([-1.0, 1.0], len(moved)) * rng.uniform(0.5, 1.5, len(moved))
            self.effects[j, j] = -1.5
        self.axis = np.arange(n_perturbed) % N_STATES

    def cells(self, n: int, seed: int) -> Exogenous:
        """Draw cells; one axis of the state is bimodal, as a switch is, the others are not."""
        rng = np.random.default_rng((self.seed, seed))
        state = rng.normal(0.0, 1.0, (n, N_STATES))
        state[:, 0] = rng.choice([-1.0, 1.0], n) + 0.35 * state[:, 0]
        size = self.depth * np.exp(rng.normal(0.0, 0.25, n))
        return Exogenous(state, size, rng.gamma(20.0, 1 / 20.0, (n, len(self.genes))), rng.random((n, len(self.genes))))

    def responses(self, cells: Exogenous, gene: str) -> np.ndarray:
        """Return m_j(s), (cells,)."""
        if gene not in self.dependent:
            return np.ones(len(cells.size))
        return 2.0 * expit(self.sharpness * cells.state[:, self.axis[self.perturbed.index(gene)]])

    def rates(self, cells: Exogenous, label: str) -> np.ndarray:
        """Return mean counts under a perturbation, (cells, genes)."""
        logarithm = self.level + cells.state @ self.weights + np.log(cells.noise)
        for gene in [] if label == "control" else label.split("+"):
            logarithm = logarithm + self.responses(cells, gene)[:, None] * self.effects[self.perturbed.index(gene)]
        rates = np.exp(logarithm)
        return cells.size[:, None] * rates / rates.sum(axis=1, keepdims=True)

    def counts(self, cells: Exogenous, label: str, u: np.ndarray | None = None) -> np.ndarray:
        """Return counts of these very cells under a perturbation, (cells, genes); another u is another measurement."""
        return poisson.ppf(cells.u if u is None else u, self.rates(cells, label))

    def screen(self, labels: list[str], n_controls: int = 600, n_cells: int = 100) -> tuple[ad.AnnData, Exogenous]:
        """Return raw counts of a screen, controls first, and what the controls brought with them."""
        controls = self.cells(n_controls, 0)
        blocks, names = [self.counts(controls, "control")], ["control"] * n_controls
        for i, label in enumerate(labels):
            blocks.append(self.counts(self.cells(n_cells, i + 1), label))
            names += [label] * n_cells
        obs = pd.DataFrame({"perturbation": names, "lane": "b1"}, index=[f"cell_{i}" for i in range(len(names))])
        X = sparse.csr_matrix(np.vstack(blocks).astype(np.float32))
        return ad.AnnData(X=X, obs=obs, var=pd.DataFrame(index=self.genes)), controls


def chosen(cells: Exogenous, rows: np.ndarray) -> Exogenous:
    """Return some of the cells."""
    return Exogenous(cells.state[rows], cells.size[rows], cells.noise[rows], cells.u[rows])


def normalized(counts: np.ndarray, target_sum: float) -> np.ndarray:
    """Return log1p of counts scaled to a target sum, as pairs.h5ad has them."""
    return np.log1p(counts * (target_sum / np.maximum(counts.sum(axis=1, keepdims=True), 1.0)))


def own_effects(world: World, cells: Exogenous, label: str, target_sum: float) -> np.ndarray:
    """Return the counterfactual cell less the cell, (cells, genes): the same measurement noise in both."""
    return normalized(world.counts(cells, label), target_sum) - normalized(world.counts(cells, "control"), target_sum)


def expected_effects(world: World, cells: Exogenous, label: str, target_sum: float, draws: int = 100) -> np.ndarray:
    """Return the change of a cell's expected expression by a perturbation, (cells, genes): the mean of measurements."""
    rng = np.random.default_rng(world.seed)
    total = np.zeros_like(cells.u)
    for _ in range(draws):
        total += own_effects(world, replace(cells, u=rng.random(cells.u.shape)), label, target_sum)
    return total / draws
