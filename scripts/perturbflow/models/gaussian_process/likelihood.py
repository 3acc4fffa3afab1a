"""The hyper-parameters of `set_gp`: learned with one factorization for all directions (sections 4, 5 of its head)."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from scipy.linalg import cholesky, eigh, solve_triangular
from scipy.linalg.lapack import dsygst
from scipy.optimize import minimize

from perturbflow.models.gaussian_process.kernel import STARTS, Questions, Sampling, SetKernel, Terms, Weights

# The weight of a source may stay near its start. So learning starts twice: with low weights of sources, and with high
# ones beside low weights of the genes' own effects.
SECOND_STARTS = {"own": -6.0, "source": -0.5, "nugget": -6.0}
WIDTH = 3.0  # of priors on logarithms of shared weights
WIDTH_OF_DIRECTIONS = 1.0  # of priors on logarithms of a direction's own σ², b and τ
WIDTH_OF_SAMPLING = 0.3  # of the prior on log b_k around the sampling noise
WIDTH_OF_MEANS = 4.0  # of the prior on the mean of log τ
SPARSITY = 10.0  # −log p per √a of a source
LEAST_GAIN = 0.05  # of the error of left-out rows, for strong directions to come first
ROWS_AT_ONCE = 512
N_STEPS = 80  # of L-BFGS


@dataclass(frozen=True)
class Directions:
    """The hyper-parameters of each direction: signal, noise and the variances of means, as logarithms.

    Attributes
    ----------
    signal, noise
        log σ_k² and log b_k, (directions,).
    means
        log τ_kj, (columns of M, directions).
    """

    signal: np.ndarray
    noise: np.ndarray
    means: np.ndarray

    @property
    def values(self) -> np.ndarray:
        """All of them in one row."""
        return np.concatenate([self.signal, self.noise, self.means.ravel()])

    def like(self, values: np.ndarray) -> "Directions":
        """Return others of the same shape."""
        n = len(self.signal)
        return Directions(values[:n], values[n : 2 * n], values[2 * n :].reshape(self.means.shape))

    def part(self, directions: np.ndarray) -> "Directions":
        """Return those of some directions."""
        return Directions(self.signal[directions], self.noise[directions], self.means[:, directions])

    def around(self, found: "Directions", directions: np.ndarray) -> "Directions":
        """Return starts of all directions: values found for some, and for the others their mean change of τ."""
        means = self.means + (found.means - self.means[:, directions]).mean(axis=1, keepdims=True)
        around = Directions(self.signal.copy(), self.noise.copy(), means)
        around.signal[directions] = found.signal
        around.noise[directions] = found.noise
        around.means[:, directions] = found.means
        return around


class Diagonal:
    """The data in coordinates where K and S are diagonal, see section 5: Z = Uᵀ L⁻¹ Y, and M is turned likewise.

    Attributes
    ----------
    T
        L⁻ᵀ U, (rows, rows).
    eigenvalues
        Λ, (rows,).
    Z
        (rows, directions).
    M
        (rows, directions, columns).
    """

    def __init__(self, K: np.ndarray, root: np.ndarray, Y: np.ndarray, M: np.ndarray) -> None:
        # Each of these arrays may fill much of the memory: each takes the place of the one before.
        K, _ = dsygst(K, root, lower=1, overwrite_a=1)  # L⁻¹ K L⁻ᵀ in the lower triangle, which eigh reads
        eigenvalues, U = eigh(K, overwrite_a=True, check_finite=False)
        del K
        self.eigenvalues = np.maximum(eigenvalues, 0.0)
        self.T = solve_triangular(root, U, lower=True, trans=1, overwrite_b=True, check_finite=False)
        self.Z = self.T.T @ Y  # Uᵀ L⁻¹ = Tᵀ
        self.M = np.tensordot(self.T.T, M, axes=1) if M.shape[1] > 1 else (self.T.T @ M[:, 0])[:, None]

    def solved(self, of: Directions) -> "Solved":
        """Return C⁻¹, its products and the loss, for all directions at once."""
        variance, tau = np.exp(of.signal), np.exp(of.means)
        inverse = 1.0 / (variance * self.eigenvalues[:, None] + np.exp(of.noise))  # D⁻¹, (rows, directions)
        scaled = inverse[:, :, None] * self.M
        gram = np.einsum("iko,ikp->kop", np.broadcast_to(self.M, scaled.shape), scaled)
        precision = gram.copy()
        columns = np.arange(len(tau))
        precision[:, columns, columns] += 1.0 / tau.T
        B = np.linalg.inv(precision)  # covariance of β given the data
        beta = np.einsum("kop,ikp,ik->ko", B, scaled, self.Z)
        p = inverse * self.Z - np.einsum("iko,ko->ik", scaled, beta)
        determinant = -np.log(inverse).sum(axis=0) + np.log(tau).sum(axis=0) + np.linalg.slogdet(precision)[1]
        return Solved(inverse, scaled, gram, B, beta, p, 0.5 * ((self.Z * p).sum(axis=0) + determinant))


@dataclass(frozen=True)
class Solved:
    """C⁻¹ in diagonal coordinates, and its products.

    Attributes
    ----------
    inverse
        D⁻¹, (rows, directions).
    scaled
        D⁻¹ M, (rows, directions, columns).
    gram
        Mᵀ D⁻¹ M, (directions, columns, columns).
    B, beta
        Covariance, (directions, columns, columns), and mean, (directions, columns), of β given the data.
    p
        C⁻¹ Y, (rows, directions).
    losses
        −log likelihood of each direction without constants, (directions,).
    """

    inverse: np.ndarray
    scaled: np.ndarray
    gram: np.ndarray
    B: np.ndarray
    beta: np.ndarray
    p: np.ndarray
    losses: np.ndarray

    def left_out(self, data: Diagonal) -> np.ndarray:
        """Return each row's error when the other rows predict it, (rows, directions).

        The error is [C⁻¹ Y]_i / [C⁻¹]_ii (Rasmussen & Williams 2006, equation 5.12).
        """
        H = np.einsum("iko,kop->ikp", self.scaled, np.linalg.cholesky(self.B))
        itself = data.T**2 @ self.inverse - (np.tensordot(data.T, H, axes=1) ** 2).sum(axis=2)
        return (data.T @ self.p) / itself

    def gradient(self, data: Diagonal, of: Directions) -> tuple[Directions, np.ndarray]:
        """Return the gradient of the loss by the directions' hyper-parameters, and H, (rows, directions, columns)."""
        H = np.einsum("iko,kop->ikp", self.scaled, np.linalg.cholesky(self.B))
        core = self.inverse - (H**2).sum(axis=2) - self.p**2
        of_means = np.einsum("koo->ok", self.gram) - np.einsum("kop,kpq,kqo->ok", self.gram, self.B, self.gram)
        along = np.einsum("iko,ik->ok", np.broadcast_to(data.M, self.scaled.shape), self.p)
        signal = 0.5 * np.exp(of.signal) * (data.eigenvalues[:, None] * core).sum(axis=0)
        noise = 0.5 * np.exp(of.noise) * core.sum(axis=0)
        return Directions(signal, noise, 0.5 * np.exp(of.means) * (of_means - along**2)), H


@dataclass(frozen=True)
class Prior:
    """Normal densities of the directions' hyper-parameters: their centers, and the width of noise's."""

    center: Directions
    width_of_noise: float

    def of(self, of: Directions, n_free: int = 0) -> tuple[float, np.ndarray]:
        """Return −log p and its gradient.

        In the first `n_free` columns of M, log τ varies around a mean of its own, which is free.
        """
        apart = of.values - self.center.values
        n, n_means = len(of.signal), of.means.size
        widths = np.repeat([WIDTH_OF_DIRECTIONS, self.width_of_noise, WIDTH_OF_DIRECTIONS], [n, n, n_means])
        slope = apart / widths**2
        # The mean is integrated out: (w² I + W² 1 1ᵀ)⁻¹.
        free = apart[2 * n : (2 + n_free) * n].reshape(n_free, n)
        common = free.sum(axis=1) / (WIDTH_OF_DIRECTIONS**2 / WIDTH_OF_MEANS**2 + n) / WIDTH_OF_DIRECTIONS**2
        slope[2 * n : (2 + n_free) * n] -= np.repeat(common, n)
        return 0.5 * float(apart @ slope), slope


@dataclass(frozen=True)
class Learned:
    """Hyper-parameters of greatest posterior density.

    Attributes
    ----------
    weights, directions
        Shared ones, and those of the directions they were learned from.
    strong_first
        Whether b_k was kept near the sampling noise, and strong directions counted more.
    """

    weights: Weights
    directions: Directions
    strong_first: bool


@dataclass(frozen=True)
class Problem:
    """The data that hyper-parameters are learned from and answers are conditioned on.

    Attributes
    ----------
    kernel, asked
        The kernel, and the rows as questions to it.
    sampling
        S, with a mean of 1 on the diagonal.
    Y, M
        Effects in directions, (rows, directions), and the columns of means, (rows, directions or 1, columns).
    strength
        h of rows, (rows,).
    start
        Starts of the directions' hyper-parameters.
    sampling_noise
        log of each direction's sampling noise, (directions,).
    n_means
        Number of columns of M that are means of singles and combinations; the others are means of other models.
    """

    kernel: SetKernel
    asked: Questions
    sampling: Sampling
    Y: np.ndarray
    M: np.ndarray
    strength: np.ndarray
    start: Directions
    sampling_noise: np.ndarray
    n_means: int

    def part(self, rows: np.ndarray, directions: np.ndarray) -> "Problem":
        """Return the problem of some rows and directions."""
        M = self.M[rows][:, directions] if self.M.shape[1] > 1 else self.M[rows]
        return replace(
            self,
            asked=self.asked.part(rows),
            sampling=self.sampling.part(rows),
            Y=self.Y[np.ix_(rows, directions)],
            M=M,
            strength=self.strength[rows],
            start=self.start.part(directions),
            sampling_noise=self.sampling_noise[directions],
        )

    @cached_property
    def root(self) -> np.ndarray:
        """L of S = L Lᵀ, (rows, rows)."""
        return cholesky(self.sampling.matrix, lower=True)

    @cached_property
    def terms(self) -> Terms:
        """Parts of K between all rows."""
        return self.kernel.terms(self.asked, self.asked)

    @cached_property
    def of_nuggets(self) -> list[np.ndarray]:
        """Return h of singles and h of combinations, each 0 in rows of the other kind, (rows,) each."""
        is_combination = self.asked.is_combination
        return [self.strength * (1.0 - is_combination), self.strength * is_combination]

    def diagonal(self, weights: Weights) -> "Diagonal":
        """Return the data in coordinates where K and S are diagonal."""
        if "terms" in vars(self):
            K = weights.covariance(self.terms)[0]
        else:  # the parts of many rows would not fit into memory together
            K = np.empty((len(self.Y), len(self.Y)), order="F")  # so `Diagonal` works in its place
            for first in range(0, len(K), ROWS_AT_ONCE):
                block = slice(first, first + ROWS_AT_ONCE)
                K[block] = weights.covariance(self.kernel.terms(self.asked.part(block), self.asked))[0]
        K[np.diag_indices(len(K))] += sum(nu * of for nu, of in zip(weights.groups[4], self.of_nuggets, strict=True))
        return Diagonal(K, self.root, self.Y, self.M)

    def learned(self, weights: Weights) -> Learned:
        """Return the hyper-parameters, for strong directions first if left-out rows are then predicted better."""
        alike = self._likeliest(weights, strong_first=False)
        if self.terms.contexts:
            return alike
        strong = self._likeliest(weights, strong_first=True)
        is_better = self._error_left_out(strong) < (1.0 - LEAST_GAIN) * self._error_left_out(alike)
        return strong if is_better else alike

    def _error_left_out(self, of: Learned) -> float:
        """Return the sum of squared errors of rows that the other rows predict."""
        data = self.diagonal(of.weights)
        return float((data.solved(of.directions).left_out(data) ** 2).sum())

    def _prior(self, start: Directions, strong_first: bool) -> "Prior":
        if strong_first:
            return Prior(replace(start, noise=self.sampling_noise), WIDTH_OF_SAMPLING)
        return Prior(start, WIDTH_OF_DIRECTIONS)

    def _likeliest(self, weights: Weights, strong_first: bool) -> Learned:
        self.terms  # noqa: B018 (they are needed at every step)
        n, starts, prior = len(weights.values), weights.values, self._prior(self.start, strong_first)
        counts = np.exp(0.5 * self.start.signal * strong_first)  # how much a direction counts, on average once
        counts /= counts.mean()

        def loss(values: np.ndarray) -> tuple[float, np.ndarray]:
            shared, of = replace(weights, values=values[:n]), self.start.like(values[n:])
            data = self.diagonal(shared)
            solved = data.solved(of)
            own, H = solved.gradient(data, of)
            variance = counts * np.exp(of.signal)
            root = np.sqrt(variance)
            P, Q = solved.p * root, (H * root[:, None]).reshape(len(H), -1)
            inner = -(P @ P.T) - Q @ Q.T
            inner[np.diag_indices(len(inner))] += solved.inverse @ variance
            by_K = 0.5 * data.T @ inner @ data.T.T
            penalty, slope = _prior_of_shared(shared, starts)
            of_own, slope_of_own = prior.of(of, self.n_means)
            of_directions = Directions(counts * own.signal, counts * own.noise, counts * own.means).values
            gradient = np.concatenate([self._by_weights(shared, by_K) + slope, of_directions + slope_of_own])
            return counts @ solved.losses + penalty + of_own, gradient

        has_sources = any(name not in STARTS for name in weights.members)
        tried = [starts, *([weights.starts(STARTS | SECOND_STARTS)] if has_sources else [])]
        minima = (minimized(loss, np.concatenate([first, self.start.values]), N_STEPS) for first in tried)
        found = min(minima, key=lambda values: loss(values)[0])
        return Learned(replace(weights, values=found[:n]), self.start.like(found[n:]), strong_first)

    def conditioned(self, data: "Diagonal", start: Directions, strong_first: bool) -> Directions:
        """Return the directions' hyper-parameters of greatest posterior density, given shared weights."""
        prior = self._prior(start, strong_first)

        def loss(values: np.ndarray) -> tuple[float, np.ndarray]:
            of = start.like(values)
            solved = data.solved(of)
            penalty, slope = prior.of(of)
            return solved.losses.sum() + penalty, solved.gradient(data, of)[0].values + slope

        return start.like(minimized(loss, start.values, N_STEPS))

    def _by_weights(self, weights: Weights, by_K: np.ndarray) -> np.ndarray:
        """Return the gradient by shared weights from that by K."""
        a, omega, c, e, nu = weights.groups
        is_combination = self.asked.is_combination
        _, of_members, of_contexts = weights.covariance(self.terms)
        factor = np.where(is_combination > 0, omega[0], 1.0)
        outer = by_K * np.outer(factor, factor)
        times_contexts = outer * of_contexts
        of_combinations = (by_K * np.outer(is_combination, factor) * of_members * of_contexts).sum()
        by_omega = 2.0 * omega * (1.0 - omega / 1.5) * of_combinations
        diagonal = by_K.diagonal()
        by_a = a * [(times_contexts * part).sum() for part in self.terms.members]
        by_c = c * [(outer * of_members * part).sum() for part in self.terms.contexts]
        by_e = e * [(by_K * part).sum() for part in self.terms.interactions]
        by_nu = nu * [(diagonal * of).sum() for of in self.of_nuggets]
        return np.concatenate([by_a, by_omega, by_c, by_e, by_nu])


def _prior_of_shared(weights: Weights, starts: np.ndarray) -> tuple[float, np.ndarray]:
    """Return −log p of shared weights and its gradient."""
    apart = weights.values - starts
    slope, loss = apart / WIDTH**2, 0.5 * float((apart**2).sum()) / WIDTH**2
    for i, name in enumerate(weights.members):
        if name not in STARTS:
            pull = SPARSITY * np.exp(weights.values[i] / 2)
            loss, slope[i] = loss + pull, slope[i] + pull / 2
    return loss, slope


def minimized(loss: Callable[[np.ndarray], tuple[float, np.ndarray]], start: np.ndarray, n_steps: int) -> np.ndarray:
    """Return the minimum of a function with value and gradient (L-BFGS-B), within e⁻¹² to e⁸ times the start."""
    bounds, options = np.column_stack([start - 12.0, start + 8.0]), {"maxiter": n_steps, "maxcor": 20}
    return minimize(loss, start, jac=True, method="L-BFGS-B", bounds=bounds, options=options).x
