"""Perturbations as inputs of a network: sets of entries, each a gene or a drug at a dose."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from perturbflow.genes.symbols import members_of, without_dose
from perturbflow.models.training.contexts import Contexts


class Conditions:
    """The perturbed genes and drugs of a model, as indices of entries.

    Parameters
    ----------
    genes
        Members of labels, in the order of `vectors`. A drug at several doses (`DRUG@dose`) has one entry per dose.
    vectors
        Standardized embeddings, (entries, dimensions).
    contexts
        Where perturbations are; None where a network is not told.

    Attributes
    ----------
    base
        (entries,): entries of one drug share a number.
    log_dose
        (entries,): log(1 + dose), centred and scaled over the entries that have one; 0 without a dose.
    """

    def __init__(self, genes: Sequence[str], vectors: np.ndarray, contexts: Contexts | None = None) -> None:
        self.genes, self.contexts = list(genes), contexts
        self.vectors = torch.as_tensor(np.asarray(vectors), dtype=torch.float32)
        names, doses = zip(*map(without_dose, self.genes), strict=True)
        self._base = {name: i for i, name in enumerate(dict.fromkeys(names))}
        self.base = torch.tensor([self._base[name] for name in names])
        logged = np.log1p([dose for dose in doses if dose is not None])
        # Equal doses have no spread to be scaled by.
        varies = len(logged) > 0 and logged.std() > 0
        self._centre, self._spread = (float(logged.mean()), float(logged.std())) if varies else (0.0, float("inf"))
        self.log_dose = torch.tensor([self._standardized(dose) for dose in doses])
        self._index = {gene: i for i, gene in enumerate(self.genes)}

    def _standardized(self, dose: float | None) -> float:
        return 0.0 if dose is None else float((np.log1p(dose) - self._centre) / self._spread)

    def add_doses(self, label: str) -> bool:
        """Make an entry of every member that is a known drug at a new dose; return whether there was one."""
        new = [member for member in self.unknown(label) if without_dose(member)[0] in self._base]
        for member in new:
            name, dose = without_dose(member)
            like = int((self.base == self._base[name]).nonzero()[0])
            self._index[member] = len(self.genes)
            self.genes.append(member)
            self.vectors = torch.cat([self.vectors, self.vectors[[like]]])
            self.base = torch.cat([self.base, self.base[[like]]])
            self.log_dose = torch.cat([self.log_dose, torch.tensor([self._standardized(dose)])])
        return bool(new)

    def add_genes(self, genes: Sequence[str], vectors: np.ndarray) -> None:
        """Make an entry of every gene that has none, (genes, dimensions). A network was not trained on it."""
        new = [i for i, gene in enumerate(genes) if gene not in self._index]
        n, n_base = len(self.genes), int(self.base.max()) + 1
        self.genes += [genes[i] for i in new]
        self._index |= {gene: n + i for i, gene in enumerate(self.genes[n:])}
        self.vectors = torch.cat([self.vectors, torch.as_tensor(vectors[new], dtype=torch.float32)])
        self.base = torch.cat([self.base, torch.arange(n_base, n_base + len(new))])
        self.log_dose = torch.cat([self.log_dose, torch.zeros(len(new))])

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
