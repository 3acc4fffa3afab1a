"""The joint posterior of `set_gp` over several perturbations: what a further measurement would tell of the others.

In direction k the covariance of the effects of questions, given the rows (section 6 of the head of `set_gp`), is

    C_k = σ_k² K_** − σ_k⁴ R D_k⁻¹ Rᵀ + (M_* − σ_k² R D_k⁻¹ M) B_k (M_* − σ_k² R D_k⁻¹ M)ᵀ,    R = K_*r T.

A measurement of question i has the variance C_k[i, i] + σ_k² ν h_i + b_k s: its own part, and noise of so many cells.
The covariance after it does not depend on its outcome (Rasmussen & Williams 2006, section 2.2):

    C_k ← C_k − C_k[:, i] C_k[i, :] / (C_k[i, i] + σ_k² ν h_i + b_k s).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from perturbflow.controls import Context
from perturbflow.genes.symbols import members_of
from perturbflow.models.gaussian_process.set_gp import SetGP


@dataclass(frozen=True)
class Posterior:
    """Effects of perturbations, jointly.

    Attributes
    ----------
    labels
        Perturbations.
    mean
        (perturbations, directions).
    K, R
        (perturbations, perturbations), and (perturbations, rows).
    columns
        (perturbations, directions, columns), times a root of B.
    nugget
        ν h, (perturbations,).
    signal, inverse, noise
        Of the model: (directions,), (rows, directions), (directions,).
    V
        (genes, directions).
    """

    labels: list[str]
    mean: np.ndarray
    K: np.ndarray
    R: np.ndarray
    columns: np.ndarray
    nugget: np.ndarray
    signal: np.ndarray
    inverse: np.ndarray
    noise: np.ndarray
    V: np.ndarray

    @classmethod
    def of(
        cls,
        model: SetGP,
        labels: Sequence[str],
        context: Context | None = None,
        each_in: Sequence[str] | None = None,
    ) -> "Posterior":
        """Condition on the rows of a trained model.

        Parameters
        ----------
        labels
            Perturbations; one may be there several times, in several contexts.
        context
            Of all of them; None is all contexts, in the shares of training's controls.
        each_in
            In place of it a context of training for each, named as `model.kernel.contexts` has them.
        """
        kernel = model.kernel
        questions = kernel.questions(labels, context) if each_in is None else kernel.questions_in(labels, each_in)
        K_rows = model.with_rows(questions)
        R, artefact = K_rows @ model.artefact["T"], model.artefact
        M, in_common = model.in_common(labels, None)
        left = M - np.einsum("qi,iko,k->qko", R, artefact["scaled"], artefact["signal"], optimize=True)
        is_combination = np.array([len(members_of(label)) > 1 for label in labels])
        nu = model.weights.groups[4]
        return cls(
            labels=list(labels),
            mean=K_rows @ artefact["alpha"] + in_common,
            K=model.weights.covariance(kernel.terms(questions, questions))[0],
            R=R,
            columns=np.einsum("qko,kop->qkp", left, np.linalg.cholesky(artefact["B"])),
            nugget=np.where(is_combination, nu[1], nu[0]) * kernel.strength_of(labels)[1],
            signal=artefact["signal"],
            inverse=artefact["inverse"],
            noise=artefact["noise"],
            V=artefact["V"],
        )

    def covariance(self, weights: np.ndarray) -> np.ndarray:
        """Return Σ_k w_k C_k, (perturbations, perturbations)."""
        of_rows = self.inverse @ (weights * self.signal**2)
        columns = (self.columns * np.sqrt(weights)[:, None]).reshape(len(self.labels), -1)
        return (weights @ self.signal) * self.K - (self.R * of_rows) @ self.R.T + columns @ columns.T

    def own(self, weights: np.ndarray, cells: float = 1.0) -> np.ndarray:
        """Return Σ_k w_k (σ_k² ν h + b_k s), the variance of a measurement around what is shared, (perturbations,).

        Parameters
        ----------
        cells
            Cells of the measurement, relative to those of a typical perturbation of training: s = 1 / cells.
        """
        return (weights @ self.signal) * self.nugget + weights @ self.noise / cells

    @property
    def variance(self) -> np.ndarray:
        """Sum over genes of the posterior variance of every effect, (perturbations,)."""
        weights = np.ones(len(self.signal))
        own = weights @ self.signal
        of_rows = self.inverse @ self.signal**2
        return own * self.K.diagonal() - (self.R**2) @ of_rows + (self.columns**2).sum(axis=(1, 2))
