"""Whether training measured a perturbation in the contexts of a question, or in others alone. Controls do not count."""

from collections.abc import Iterable

import pandas as pd

from perturbflow.genes.symbols import CONTROL, entities_of
from perturbflow.pairs import Pairs

CONTEXT = ["dataset", "batch", "cell_type"]
ELSEWHERE = "in other contexts"

ContextName = tuple[str, ...]


def contexts_of(obs: pd.DataFrame) -> list[ContextName]:
    """Return the context of every cell: dataset, batch and cell type."""
    return list(obs[CONTEXT].astype(str).itertuples(index=False, name=None))


class MeasuredContexts:
    """The contexts in which training holds perturbed cells, by label, by gene, and altogether."""

    def __init__(self, training: Pairs) -> None:
        cells = training.obs[~training.is_control]
        rows = cells[["perturbation", *CONTEXT]].astype(str).drop_duplicates()
        self.of_label: dict[str, set[ContextName]] = {}
        self.of_gene: dict[str, set[ContextName]] = {}
        self.all: set[ContextName] = set()
        for label, *context in rows.itertuples(index=False, name=None):
            place = tuple(context)
            self.of_label.setdefault(label, set()).add(place)
            for gene in entities_of(label):
                self.of_gene.setdefault(gene, set()).add(place)
            self.all.add(place)

    def needed(self, label: str) -> list[set[ContextName]]:
        """Return the contexts of all cells that an answer on a label rests on.

        These are its own cells, else those of its genes, else all perturbed cells.
        """
        if label in self.of_label:
            return [self.of_label[label]]
        return [self.of_gene[gene] for gene in entities_of(label) if gene in self.of_gene] or [self.all]

    def is_elsewhere(self, label: str, asked: Iterable[ContextName]) -> bool:
        """Return whether the answer rests on cells that were measured in none of the contexts of a question."""
        contexts = set(asked)
        return label != CONTROL and any(places.isdisjoint(contexts) for places in self.needed(label))

    def words(self, label: str, asked: Iterable[ContextName]) -> str:
        """Return in words which contexts of a question a label was measured in.

        There are no words where these are all kinds of cells, and most batches.
        """
        asked = set(asked)
        if self.is_elsewhere(label, asked):
            return f" {ELSEWHERE}"
        kinds = {(dataset, cell_type) for dataset, _, cell_type in asked}
        met = set.intersection(
            *({(dataset, cell_type) for dataset, _, cell_type in places} for places in self.needed(label))
        )
        if not kinds <= met:
            return f" in {len(kinds & met)} of the {len(kinds)} kinds of cells that are asked"
        # A batch that lacks it may be chance; half of them are none: such batches may be lines.
        measured = asked.intersection(*self.needed(label))
        return (
            f" in {len(measured)} of the {len(asked)} batches that are asked" if 2 * len(measured) <= len(asked) else ""
        )
