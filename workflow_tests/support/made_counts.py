"""Cells drawn as counts, and the same cells log-normalized."""

import numpy as np
import pandas as pd
from scipy import sparse

from perturbflow.pairs import Pairs


def normalized(counts: np.ndarray, target: float = 1000.0) -> np.ndarray:
    """Return log1p of counts that are scaled to this total per cell."""
    return np.log1p(counts * (target / counts.sum(axis=1, keepdims=True)))


def two_states() -> tuple[Pairs, np.ndarray, np.ndarray, np.ndarray]:
    """Return cells of two states.

    Returns
    -------
    tuple
        Pairs, counts (cells × genes), the states' shares of genes (2 × genes), and the state of every cell.
    """
    rng = np.random.default_rng(0)
    shares = rng.dirichlet(np.ones(30), 2)
    state = rng.integers(0, 2, 600)
    counts = rng.poisson(rng.gamma(20.0, 20.0, (600, 1)) * shares[state])
    return make_pairs(normalized(counts, 400.0)), counts, shares, state


def make_pairs(X: np.ndarray) -> Pairs:
    """Return training cells of no perturbation."""
    n, n_genes = X.shape
    obs = pd.DataFrame(
        {"perturbation": "control", "is_control": True, "batch": "b", "cell_type": "c", "role": "train"},
        index=map(str, range(n)),
    )
    return Pairs(
        sparse.csr_matrix(X.astype(np.float32)),
        obs,
        [f"G{i}" for i in range(n_genes)],
        np.full((n, 8), -1),
        np.arange(n),
    )
