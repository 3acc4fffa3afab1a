"""Perturbations as a network knows them: sets of entries, each a gene or a drug at a dose."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from perturbflow.symbols import members_of, without_dose


class Conditions:
    """The perturbed genes and drugs that a model knows, as indices of entries.

    Parameters
    ----------
    genes
        Members of labels, in the order of `vectors`; a drug at several doses (`DRUG@dose`) is as many entries of one base.
    vectors
        Standardized embeddings, (entries, dimensions).

    Attributes
    ----------
    base
        (entries,): entries of one drug share a number.
    log_dose
        (entries,): log(1 + dose), centred and scaled over the entries that have one; 0 without a dose.
    """

    def __init__(self, genes: Sequence[str], vectors: np.ndarray) -> None:
        self.genes = list(genes)
        self.vectors = torch.as_tensor(np.asarray(vectors), dtype=torch.float32)
        self._index = {gene: i for i, gene in enumerate(self.genes)}
        names, doses = zip(*map(without_dose, self.genes), strict=True)
        order = {name: i for i, name in enumerate(dict.fromkeys(names))}
        self.base = torch.tensor([order[name] for name in names])
        logged = np.log1p([np.nan if dose is None else dose for dose in doses])
        has_dose = np.isfinite(logged)
        spread = logged[has_dose].std() if has_dose.any() else 0.0
        centred = (logged - logged[has_dose].mean()) / spread if spread > 0 else np.zeros(len(names))
        self.log_dose = torch.as_tensor(np.where(has_dose, centred, 0.0), dtype=torch.float32)

    def index(self, labels: Sequence[str], width: int = 2) -> Tensor:
        """Return entries of the members, (labels, members), padded with -1."""
        members = [members_of(label) for label in labels]
        width = max([width, *map(len, members)])
        table = torch.full((len(labels), width), -1, dtype=torch.long)
        for row, genes in enumerate(members):
            for column, gene in enumerate(genes):
                table[row, column] = self._index[gene]
        return table

    def unknown(self, label: str) -> list[str]:
        """Return the members that have no vector."""
        return [gene for gene in members_of(label) if gene not in self._index]
