"""Combinations that are not split.

These are labels whose parts under another separator are perturbations, controls or genes themselves.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from perturbflow.genes.symbols import approved_symbol, gene_within, human_symbols
from perturbflow.screens.control_labels import NAMED, DeclaredControls, quoted
from perturbflow.screens.dose_labels import parsed

_SIGNS = (
    "->",
    "=>",
    "→",
    "·",
    "\t",
    "--",
    "__",
    "||",
    "//",
    "|",
    ",",
    ";",
    "&",
    "_",
    ":",
    "/",
    "+",
    "-",
    ".",
    "~",
    "^",
    "*",
    "%",
    "@",
    "#",
    "\\",
    " ",
)
_WORDS = ("and", "AND", "And", "plus", "with", "x")
# The longer one first: A--B holds - as well.
SEPARATORS = (*[f" {word} " for word in _WORDS], *_SIGNS)
MANY = 3  # labels whose parts are known: no accident any more


@dataclass(frozen=True)
class Unsplit:
    """Labels that are combinations under another separator.

    Attributes
    ----------
    separator
        The sign between their members.
    labels
        Label as in the file → cells.
    n_holding
        Labels that hold the separator and are no gene's name.
    n_of_labels
        How many of `labels` have parts that are all labels of the screen.
    genes
        Single genes among the labels whose names hold the separator, which it would split as well (HLA-A).
    """

    separator: str
    labels: dict[str, int]
    n_holding: int
    n_of_labels: int
    genes: list[str]

    @property
    def is_sure(self) -> bool:
        """Whether the declared separator is wrong: many such labels, or most of those that hold the sign."""
        n = len(self.labels)
        return n >= MANY or (2 * n >= self.n_holding and (n > 1 or self.n_of_labels == n))

    def sentence(self, declared: str | None) -> str:
        """Return a sentence on these labels, without the fix."""
        examples = ", ".join(f"'{label}'" for label in list(self.labels)[:3])
        n_cells = sum(self.labels.values())
        return (
            f"{len(self.labels):,} of {self.n_holding:,} labels that hold '{self.separator}' ({n_cells:,} cells) are "
            f"combinations that are not split, such as {examples}: each of their parts is a perturbation, a control or "
            f"a gene of this screen, but perturbation.separator is {'null' if declared is None else repr(declared)}"
        )

    def fix(self, column: str) -> str:
        """Return the fix that splits these labels."""
        if self.genes:
            return (
                f"'{self.separator}' stands in names of genes too ({', '.join(self.genes[:3])}), so put another sign, "
                f"such as '+', between members in obs['{column}']"
            )
        separator = repr(self.separator) if self.separator.isprintable() else quoted(self.separator)
        return f"Set perturbation.separator: {separator}"


class _KnownParts:
    """Names that a part of a label may be."""

    def __init__(self, members: set[str], controls: DeclaredControls, genes: Iterable[str], *, is_human: bool) -> None:
        self.labels, self.controls = members, controls
        self.genes = {*genes, *(human_symbols().approved if is_human else ())}
        # HLA-A and INS-IGF2 are genes of their own, and so they were by earlier names.
        self.whole = {name for name in members if name in self.genes or (is_human and approved_symbol(name) != name)}

    def is_label(self, part: str) -> bool:
        """Return whether a part is a perturbation or a control of the screen."""
        return part in self.labels or part in self.controls or NAMED.fullmatch(part) is not None

    def is_control(self, part: str) -> bool:
        """Return whether a part is a control by declaration or by name."""
        return part in self.controls or NAMED.fullmatch(part) is not None

    def has(self, part: str) -> bool:
        """Return whether a part is a name at all: a number is none, unless it is a declared control."""
        if not any(letter.isalpha() for letter in part):
            return part in self.controls
        return (
            self.is_label(part) or gene_within(part, lambda name: name in self.genes or name in self.labels) is not None
        )


def _parts(member: str, separator: str) -> list[str]:
    return [part.strip() for part in member.split(separator) if part.strip()]


def unsplit(
    n_cells: Mapping[str, int],
    declared: Mapping,
    members: Callable[[str], Iterable[str]],
    genes: Iterable[str],
    *,
    is_human: bool,
) -> Unsplit | None:
    """Return the combinations that a declared separator does not split, under the separator that finds the most.

    Parameters
    ----------
    n_cells
        Label as in the file → cells, without those of unassigned cells.
    declared
        `perturbation` of the dataset's block.
    members
        Returns the names in a label, as the block reads it.
    genes
        Names and ids of the measured genes; none where perturbations are no genes.
    is_human
        Whether perturbations are human genes: approved symbols are names too, also of genes that are not measured.
    """
    of_label = {
        label: [member for member in members(label) if member not in DeclaredControls.of(declared)] for label in n_cells
    }
    of_label = {label: found for label, found in of_label.items() if label not in DeclaredControls.of(declared)}
    named = {member for found in of_label.values() for member in found}
    best = None
    for separator in SEPARATORS:
        if separator.strip() == (declared["separator"] or "").strip() != "" or separator == declared["separator"]:
            continue
        names = _KnownParts(named, DeclaredControls.of({**declared, "separator": separator}), genes, is_human=is_human)
        whole = names.whole
        holding = {
            member: parts
            for member in named - whole
            if separator in member and len(parts := _parts(member, separator)) > 1
        }
        again = _recurring(holding.values())
        combined = {
            member for member, parts in holding.items()
            if all(names.has(part) or part in again for part in parts) and not all(map(names.is_control, parts))
        }  # fmt: skip
        if combined and (best is None or len(combined) > best[1]):
            labels = {label: n_cells[label] for label, found in of_label.items() if not combined.isdisjoint(found)}
            n_of_labels = sum(all(names.is_label(part) for part in holding[member]) for member in combined)
            genes_holding = sorted(member for member in whole if len(_parts(member, separator)) > 1)
            best = Unsplit(separator, labels, len(holding), n_of_labels, genes_holding), len(combined)
    return best[0] if best else None


def _recurring(parts: Iterable[list[str]]) -> set[str]:
    """Return parts of several labels, some of which stand first in one and later in another.

    They are members of combinations that were never seen alone.
    """
    parts = list(parts)
    counted = Counter(part for of in parts for part in set(of))
    first, later = {of[0] for of in parts}, {part for of in parts for part in of[1:]}
    again = {
        part for part, n in counted.items() if n > 1 and any(letter.isalpha() for letter in part) and not parsed(part)
    }
    return again if again & first & later else set()


def torn(label: str, separator: str | None) -> list[str]:
    """Return the parts of a label where the separator stands within a name; else none.

    Such parts end in the middle of brackets or at another sign.
    """
    parts = _parts(label, separator) if separator else []
    is_torn = any(
        re.match(r"[_/\])}.,;:]", part)
        or re.search(r"[_/(\[{]$", part)
        or any(part.count(a) != part.count(b) for a, b in ("()", "[]", "{}"))
        for part in parts
    )
    return parts if len(parts) > 1 and is_torn else []


def another_name(names: Iterable[str], sign: str | None) -> str:
    """Return the line that gives new names without the sign to names that hold it."""
    plain = {
        name: " ".join(name.replace(f"({sign})", " ").replace(sign or "", " ").strip("-_ ").split()) or "..."
        for name in names
    }
    return f"perturbation.rename: {{{', '.join(f'{quoted(name)}: {quoted(new)}' for name, new in plain.items())}}}"
