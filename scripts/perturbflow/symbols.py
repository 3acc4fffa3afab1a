"""Labels and gene symbols: one canonical form for both, so that a perturbed gene finds its row."""

import csv
from collections.abc import Iterable
from functools import cache
from pathlib import Path

CONTROL = "control"
SEPARATOR = "+"

_TABLE = Path(__file__).with_name("renamed_symbols.tsv")


@cache
def _renamed() -> dict[str, str]:
    with _TABLE.open(encoding="utf-8") as file:
        return {row["previous"]: row["approved"] for row in csv.DictReader((line for line in file if line[0] != "#"), delimiter="\t")}


def approved_symbol(symbol: str, organism: str = "human") -> str:
    """Return the current approved symbol of a gene; a symbol that is not known to have been renamed is returned as it is."""
    return _renamed().get(symbol, symbol) if organism == "human" else symbol


def canonical_label(label: str, control: Iterable[str], separator: str | None, organism: str = "human") -> str:
    """Return `control`, `GENE`, or `A+B` with approved symbols, members sorted, and control members left out.

    `A+ctrl`, `ctrl+A` and `A+A` are all `A`; a label whose members are all controls is `control`. A label that names nothing
    (blank, or a separator alone) gives an empty string: it is no control.
    """
    control = {*control, CONTROL}
    if label in control:
        return CONTROL
    members = [member.strip() for member in (label.split(separator) if separator else [label])]
    named = [member for member in members if member]
    genes = {approved_symbol(member, organism) for member in named if member not in control}
    return SEPARATOR.join(sorted(genes)) or (CONTROL if named else "")


def members_of(label: str) -> list[str]:
    """Return the perturbed genes of a canonical label; none for control."""
    return [] if label == CONTROL else label.split(SEPARATOR)
