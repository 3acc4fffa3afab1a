"""The names that are nearest to an unknown one, for messages."""

import difflib
from collections.abc import Iterable

from perturbflow.genes.symbols import SEPARATOR, candidates

CUTOFF = 0.6  # of difflib: two names of six letters with two different ones have 0.67


def nearest(name: str, known: Iterable[str], n: int = 3) -> list[str]:
    """Return the known names that a name may stand for, the likeliest first.

    It may be in other letters, another name of a gene, or misspelt.

    Parameters
    ----------
    known
        Genes, compounds, or labels A+B.
    """
    by_letters: dict[str, list[str]] = {}
    for one in known:
        by_letters.setdefault(one.casefold(), []).append(one)
    alias = [
        gene
        for form in dict.fromkeys((name, name.upper(), name.lower(), name.capitalize()))
        for gene in candidates(form)
    ]
    members = sorted(name.casefold().split(SEPARATOR.casefold()))
    sought = [name.casefold(), SEPARATOR.join(members), *[gene.casefold() for gene in alias]]
    found = [one for text in sought for one in by_letters.get(text, [])]
    close = difflib.get_close_matches(name.casefold(), list(by_letters), n=n, cutoff=CUTOFF)
    return list(dict.fromkeys([*found, *[one for text in close for one in by_letters[text]]]))[:n]


def did_you_mean(name: str, known: Iterable[str], place: str = "") -> str:
    """Return a name in quotes, where it stands, and the nearest known ones where there are any."""
    close = nearest(name, known)
    return f"'{name}'{place}" + (f" (did you mean {' or '.join(close)}?)" if close else "")
