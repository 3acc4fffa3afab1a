"""The test whether a perturbation had an effect, by energy distance, and the share of cells that escaped it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import stats

from perturbflow.genes.symbols import CONTROL
from perturbflow.quality.sample import Sample

N_PERMUTATIONS = 500
ENOUGH = 20
"""No more permutations are needed once this many reach the distance (Besag and Clifford 1991)."""
ALPHA = 0.05
LEAST_CELLS = 10
"""Cells of a perturbation, and controls, that a test needs: fewer are hardly any evidence."""
LEAST_SEPARATION = 1.5
"""Least distance of the two Gaussians, in standard deviations of the controls.

Below it the cells of the two cannot be distinguished.
"""
AT_ONCE = 100  # permutations


@dataclass(frozen=True)
class Compared:
    """The cells of one perturbation beside controls of their own batches and cell types.

    Attributes
    ----------
    X
        Components, centred by the mean of each stratum (perturbed cells and controls), (cells, components).
    is_perturbed, stratum
        Of every cell.
    is_relaxed
        Whether controls of other batches had to serve, as the cells' own have none.
    """

    X: np.ndarray
    is_perturbed: np.ndarray
    stratum: np.ndarray
    is_relaxed: bool


def compared(sample: Sample, rows: np.ndarray, controls: np.ndarray, rng: np.random.Generator) -> Compared | None:
    """Return the cells of a perturbation with matched controls; None where either are too few.

    Cells of batches without controls are left out; where that leaves too few, cell types are matched in place of
    batches.

    Parameters
    ----------
    rows, controls
        Places in the sample.
    """
    for is_relaxed, stratum in enumerate((sample.stratum, sample.cell_type)):
        of_cells, of_controls = stratum[rows], stratum[controls]
        shared = np.intersect1d(of_cells, of_controls)
        kept = rows[np.isin(of_cells, shared)]
        # A stratum's weight among the controls is that among the cells, as far as its controls reach.
        share = np.bincount(stratum[kept], minlength=stratum.max() + 1) / max(len(kept), 1)
        own = controls[np.isin(of_controls, shared)]
        size = np.bincount(stratum[own], minlength=len(share))
        most = max(LEAST_CELLS, 4 * len(kept))
        n_taken = np.ceil(np.minimum(size, share * most)).astype(int)
        order = rng.permutation(own)
        turn = pd.Series(stratum[order]).groupby(stratum[order]).cumcount().to_numpy() if len(order) else order
        matched = order[turn < n_taken[stratum[order]]]
        if len(kept) >= max(LEAST_CELLS, len(rows) / 2) and len(matched) >= LEAST_CELLS:
            cells = np.concatenate([kept, matched])
            _, code = np.unique(stratum[cells], return_inverse=True)
            X = sample.components[cells].astype(float)
            sums = np.zeros((code.max() + 1, X.shape[1]))
            np.add.at(sums, code, X)
            X -= (sums / np.bincount(code)[:, None])[code]
            return Compared(X, np.arange(len(cells)) < len(kept), code, bool(is_relaxed))
    return None


def energy_distance(X: np.ndarray, is_perturbed: np.ndarray) -> np.ndarray:
    """Return 2δ − σ_x − σ_y of perturbed cells and controls, squared Euclidean (Peidli et al. 2024, scPerturb).

    The shape is (assignments,). δ is the mean squared distance between the groups, σ the mean within each (of
    different cells). Squared distances make it

        E = 2 ‖x̄ − ȳ‖² − 2 tr S_x / n_x − 2 tr S_y / n_y

    with the unbiased covariances S. So it depends on means alone, and needs no matrix of distances.

    Parameters
    ----------
    X
        (cells, components).
    is_perturbed
        (assignments, cells).
    """
    norms = np.square(X).sum(axis=1)
    total, total_norm = X.sum(axis=0), norms.sum()
    n_x = is_perturbed.sum(axis=1)
    n_y = X.shape[0] - n_x
    sums, sum_norms = is_perturbed.astype(float) @ X, is_perturbed.astype(float) @ norms
    parts = []
    for n, of_sums, of_norms in ((n_x, sums, sum_norms), (n_y, total - sums, total_norm - sum_norms)):
        trace = np.maximum(of_norms / n - np.square(of_sums / n[:, None]).sum(axis=1), 0.0)  # of the biased covariance
        parts.append((of_sums / n[:, None], trace / np.maximum(n - 1, 1)))
    (x, noise_x), (y, noise_y) = parts
    return 2 * np.square(x - y).sum(axis=1) - 2 * noise_x - 2 * noise_y


def _tail(X: np.ndarray, is_perturbed: np.ndarray, stratum: np.ndarray) -> float:
    """Return the probability of means as far apart as these where labels are random within strata.

    ‖x̄ − ȳ‖² of permuted labels is a quadratic form of a nearly normal vector whose covariance is known
    exactly. Its upper tail is that of a shifted and scaled χ² with the same first three moments (Pearson
    1959, Imhof 1961).
    """
    covariance = np.zeros((X.shape[1], X.shape[1]))
    n_x, n_y = is_perturbed.sum(), (~is_perturbed).sum()
    for code in range(stratum.max() + 1):
        here = stratum == code
        n, k = int(here.sum()), int((here & is_perturbed).sum())
        if n > 1:
            # Variance of a sum over k of n cells, sampled without replacement; cells are centred within the stratum.
            covariance += k * (n - k) / (n * (n - 1)) * X[here].T @ X[here]
    covariance *= (1 / n_x + 1 / n_y) ** 2
    eigenvalues = np.maximum(np.linalg.eigvalsh(covariance), 0.0)
    first, second, third = (float((eigenvalues**power).sum()) for power in (1, 2, 3))
    if third <= 0:
        return 1.0
    observed = float(np.square(X[is_perturbed].mean(axis=0) - X[~is_perturbed].mean(axis=0)).sum())
    freedom = second**3 / third**2
    return float(stats.chi2.sf((observed - first) / np.sqrt(second) * np.sqrt(freedom) + freedom, freedom))


def test_response(cells: Compared, rng: np.random.Generator) -> tuple[float, float]:
    """Return the energy distance of a perturbation to its controls, and the p-value of a permutation test.

    Labels are permuted within batch and cell type, so that no batch effect is taken for one of the perturbation. Where
    fewer than ten permutations reach the distance, `_tail` gives p: n permutations alone give none below 1 / n, and the
    correction for thousands of perturbations needs smaller ones.
    """
    observed = float(energy_distance(cells.X, cells.is_perturbed[None])[0])
    order = np.argsort(cells.stratum, kind="stable")
    X, stratum, is_perturbed = cells.X[order], cells.stratum[order], cells.is_perturbed[order]
    n_as_far = n = 0
    while n < N_PERMUTATIONS and n_as_far < ENOUGH:
        # Sorting random numbers within the strata shuffles each of them.
        shuffled = np.argsort(rng.random((AT_ONCE, len(X))) + stratum, axis=1)
        n_as_far += int((energy_distance(X, is_perturbed[shuffled]) >= observed).sum())
        n += AT_ONCE
    p = (n_as_far + 1) / (n + 1)
    return observed, p if n_as_far >= 10 else min(p, _tail(cells.X, cells.is_perturbed, cells.stratum))


def escaping(cells: Compared, rng: np.random.Generator) -> float:
    """Return the share of perturbed cells that look like controls (Papalexi et al. 2021, Mixscape).

    It is NaN where the two kinds of cells cannot be distinguished. Cells are projected on the mean difference of
    perturbed cells and controls. Along it perturbed cells are a mixture of two Gaussians. One is that of the controls,
    the other is fitted by expectation-maximization. Each half of the cells is projected on the difference of the other
    half: a cell pulls the mean that it is part of towards itself.
    """
    half = rng.permutation(len(cells.X)) % 2
    projections = np.empty(len(cells.X))
    for own in (0, 1):
        x, y = (cells.X[(half != own) & (cells.is_perturbed == kind)] for kind in (True, False))
        if min(len(x), len(y)) < 3:
            return np.nan
        direction = x.mean(axis=0) - y.mean(axis=0)
        projections[half == own] = cells.X[half == own] @ direction / max(np.linalg.norm(direction), 1e-12)
    of_controls, values = projections[~cells.is_perturbed], projections[cells.is_perturbed]
    mean, spread = of_controls.mean(), of_controls.std()
    if spread == 0:
        return np.nan
    values = (values - mean) / spread
    share, centre, width = 0.5, float(np.quantile(values, 0.75)), 1.0
    for _ in range(200):
        as_controls = share * stats.norm.pdf(values)
        as_moved = (1 - share) * stats.norm.pdf(values, centre, width)
        belongs = as_moved / np.maximum(as_controls + as_moved, 1e-300)
        previous, share = share, float(1 - belongs.mean())
        if belongs.sum() < 1:
            return np.nan
        centre = float(belongs @ values / belongs.sum())
        width = max(float(np.sqrt(belongs @ (values - centre) ** 2 / belongs.sum())), 0.3)
        if abs(share - previous) < 1e-4:
            break
    return share if centre >= LEAST_SEPARATION else np.nan


def holm(p: np.ndarray) -> np.ndarray:
    """Return p-values adjusted for the number of tests (Holm 1979); NaN stays, and is no test."""
    adjusted = np.full(len(p), np.nan)
    tested = np.flatnonzero(~np.isnan(p))
    order = tested[np.argsort(p[tested], kind="stable")]
    adjusted[order] = np.minimum(np.maximum.accumulate(p[order] * (len(order) - np.arange(len(order)))), 1.0)
    return adjusted


def responses(sample: Sample) -> pd.DataFrame:
    """Return one row per perturbation, in the order of their labels.

    Returns
    -------
    Index perturbation; columns n_tested (cells in the test), is_relaxed (controls of other batches served),
    energy_distance, p_value, p_adjusted (Holm), responds (p_adjusted below 0.05; missing where nothing was tested),
    escaping (share of cells like controls).
    """
    places = pd.Series(np.arange(len(sample.label))).groupby(sample.label).indices
    controls = places.get(CONTROL, np.empty(0, np.int64))
    rows = []
    for i, label in enumerate(sorted(set(places) - {CONTROL})):
        rng = np.random.default_rng([0, i])
        cells = compared(sample, places[label], controls, rng)
        if cells is None:
            rows.append((label, 0, False, np.nan, np.nan, np.nan))
            continue
        distance, p = test_response(cells, rng)
        rows.append(
            (
                label,
                int(cells.is_perturbed.sum()),
                cells.is_relaxed,
                distance,
                p,
                escaping(cells, rng) if p < ALPHA else np.nan,
            )
        )
    columns = ["perturbation", "n_tested", "is_relaxed", "energy_distance", "p_value", "escaping"]
    table = pd.DataFrame(rows, columns=columns).set_index("perturbation")
    table["p_adjusted"] = holm(table["p_value"].to_numpy(float))
    table["responds"] = (table["p_adjusted"] < ALPHA).astype(object).where(table["p_adjusted"].notna())
    table["escaping"] = table["escaping"].where(table["responds"].eq(True))
    return table
