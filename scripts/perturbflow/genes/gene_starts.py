"""Genes whose start lies near that of a perturbed gene.

CRISPRi often knocks them down too, as the repressor sits on both promoters. The tables of starts ship with the workflow
(made by `perturbflow.genes.refseq`). They have one start per gene: that of the transcript that MANE selected, or of
RefSeq's transcripts where MANE has none.
"""

import csv
import gzip
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

from perturbflow.genes.symbols import candidates, entity_of

TABLES = {
    "human": Path(__file__).with_name("gene_starts.human.tsv.gz"),
    "mouse": Path(__file__).with_name("gene_starts.mouse.tsv.gz"),
}
# How far a repressor that sits on one promoter is felt at another.
WITHIN = 5000


class Start(NamedTuple):
    """Where a gene begins.

    It is the chromosome without chr, the base counted from 1 on the forward strand, and the strand of the gene (+ or
    -).
    """

    chromosome: str
    position: int
    strand: str


@cache
def starts(organism: str = "human") -> Mapping[str, Start]:
    """Return approved symbol → start, of GRCh38 (human) or GRCm38 (mouse); none for another organism."""
    if organism not in TABLES:
        return {}
    with gzip.open(TABLES[organism], "rt", encoding="utf-8") as file:
        rows = csv.reader((line for line in file if line[0] != "#"), delimiter="\t", quoting=csv.QUOTE_NONE)
        next(rows)
        return {symbol: Start(chromosome, int(position), strand) for symbol, chromosome, position, strand, _ in rows}


def neighbours(
    genes: Sequence[str], measured: Sequence[str], organism: str = "human", within: int = WITHIN
) -> dict[str, list[tuple[str, int]]]:
    """Return which measured genes start near each perturbed gene, whatever the strands.

    Parameters
    ----------
    genes
        Perturbed genes, with or without a dose (`GENE@dose`). A human gene may go by a previous symbol, an Ensembl id
        or an alias, where that is one gene's alone.
    measured
        Genes of the screen, named likewise.
    organism
        human or mouse.
    within
        The greatest distance between two starts, in bases; the limit itself counts.

    Returns
    -------
    Each of `genes`, as it is written → measured genes, as these are written, and their distances in bases,
    the nearest first. The gene itself is no neighbour, by any of its names. Empty where its start is not
    known; a measured gene without a known start is nobody's neighbour.
    """
    table = starts(organism)

    def known(name: str) -> str | None:
        """Return the symbol under which the table has a gene."""
        name = entity_of(name)
        if name in table:
            return name
        meant = candidates(name) if organism == "human" else []
        return meant[0] if len(meant) == 1 and meant[0] in table else None

    placed: dict[str, list[tuple[int, str, str]]] = defaultdict(list)
    for name in dict.fromkeys(measured):
        if symbol := known(name):
            placed[table[symbol].chromosome].append((table[symbol].position, name, symbol))
    for there in placed.values():
        there.sort()

    def near(gene: str) -> list[tuple[str, int]]:
        if (symbol := known(gene)) is None:
            return []
        here, there = table[symbol], placed.get(table[symbol].chromosome, [])
        first = bisect_left(there, here.position - within, key=lambda place: place[0])
        end = bisect_right(there, here.position + within, key=lambda place: place[0])
        found = [(name, abs(position - here.position)) for position, name, other in there[first:end] if other != symbol]
        return sorted(found, key=lambda pair: (pair[1], pair[0]))

    return {gene: near(gene) for gene in genes}
