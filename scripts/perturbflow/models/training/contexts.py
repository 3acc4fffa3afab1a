"""Contexts as inputs of a network: a vector of every context, made of its controls, so that a new one has one too."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from scipy.spatial.distance import cdist, pdist
from torch import Tensor

from perturbflow.controls import MOST_CONTEXTS, Context
from perturbflow.pairs import LEAST_CELLS, Pairs


@dataclass(frozen=True)
class Contexts:
    """The contexts of training, and the vector of any context by its mean control.

    A context's vector says how alike its controls are to those of each context with perturbed cells in training. Let k
    be these, d_k² the squared distances of mean controls, and m the larger one of their mean and of the median between
    contexts. The weights exp(−d_k²/m) / Σ_k exp(−d_k²/m) are centred and scaled over the k. So a new context lies
    between those that the network knows; 0 is their average, and has no effect of its own.

    Attributes
    ----------
    names
        Contexts with controls in training, as `Pairs.contexts` writes them.
    levels
        Their mean control, (contexts, genes), log1p.
    is_perturbed
        Whether training holds perturbed cells of them, (contexts,).
    keys
        The columns of obs that tell contexts apart (`Pairs.context_keys`).
    """

    names: list[str]
    levels: np.ndarray
    is_perturbed: np.ndarray
    keys: tuple[str, str]

    @classmethod
    def of(cls, training: Pairs) -> "Contexts | None":
        """Return the contexts of training; None where perturbed cells are of one context or of too many."""
        groups, context = training.groups, training.contexts
        n = groups.n_controls()
        kind_of = dict(zip(training.strata.tolist(), context.tolist(), strict=True))
        kinds = np.array([kind_of[stratum] for stratum in groups.strata], dtype=object)
        names = sorted(set(kinds[n > 0]))
        is_member = (np.array(names, dtype=object)[:, None] == kinds) * n  # (contexts, strata)
        levels = is_member @ groups.control_means(training.sums[0]) / is_member.sum(axis=1, keepdims=True)
        perturbed = context[~training.is_control]
        is_perturbed = np.array([(perturbed == name).sum() >= LEAST_CELLS for name in names], dtype=bool)
        is_usable = 1 < is_perturbed.sum() <= MOST_CONTEXTS
        return cls(names, levels.astype(np.float32), is_perturbed, training.context_keys) if is_usable else None

    @property
    def n_dimensions(self) -> int:
        """Size of a vector."""
        return int(self.is_perturbed.sum())

    def vectors(self, levels: np.ndarray) -> np.ndarray:
        """Return the vectors of contexts with these mean controls, (contexts, genes) → (contexts, dimensions)."""
        known = self.levels[self.is_perturbed].astype(np.float64)
        between = pdist(known, "sqeuclidean")
        apart = max(float(np.median(between)), 1e-12)

        def weights(of: np.ndarray) -> np.ndarray:
            distance = cdist(of, known, "sqeuclidean")
            near = np.exp(-distance / np.maximum(apart, distance.mean(axis=1, keepdims=True)))
            return near / near.sum(axis=1, keepdims=True)

        own = weights(known)
        centre = own.mean(axis=0)
        return (weights(levels.astype(np.float64)) - centre) / max(float(np.sqrt(((own - centre) ** 2).mean())), 1e-6)

    def of_pairs(self, pairs: Pairs) -> Tensor:
        """Return the vector of the context of every cell of training, (cells, dimensions); 0 without controls."""
        context = pairs.by(self.keys).contexts
        table = np.vstack([self.vectors(self.levels), np.zeros(self.n_dimensions)])
        place = {name: i for i, name in enumerate(self.names)}
        return torch.from_numpy(table[[place.get(name, -1) for name in context]].astype(np.float32))

    def of_cells(self, asked: Context | None, n: int) -> Tensor:
        """Return the vector of the context of every cell that is asked, (n, dimensions); 0 where none is told.

        Contexts of training have the level of its controls, others that of the controls that are asked.
        """
        if asked is None:
            return torch.zeros(n, self.n_dimensions)
        asked = asked if self.keys[0] == "batch" else asked.by_kind()
        names, of_cell = np.unique(asked.strata.astype(str), return_inverse=True)
        own: Mapping[str, np.ndarray] = dict(zip(self.names, self.levels, strict=True))
        levels = np.stack([own[name] if name in own else asked.levels[name] for name in names.tolist()])
        vectors = torch.from_numpy(self.vectors(levels).astype(np.float32))
        return vectors[torch.from_numpy(of_cell)][torch.arange(n) % len(of_cell)]

    def state(self) -> dict[str, Tensor | list[str]]:
        """Return all that `restored` needs."""
        tensors = {"levels": torch.as_tensor(self.levels), "is_perturbed": torch.as_tensor(self.is_perturbed)}
        return {"names": self.names, "keys": list(self.keys), **tensors}

    @classmethod
    def restored(cls, state: dict) -> "Contexts":
        """Undo `state`."""
        first, second = state["keys"]
        return cls(state["names"], state["levels"].numpy(), state["is_perturbed"].numpy(), (first, second))
