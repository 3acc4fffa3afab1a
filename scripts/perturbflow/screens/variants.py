"""Several labels of one gene or compound.

Such names share a stem and differ in a guide, a promoter, a dose, a time or in letters.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from perturbflow.errors import InputError
from perturbflow.genes.symbols import SEPARATOR, gene_within
from perturbflow.screens.control_labels import DeclaredControls, quoted
from perturbflow.screens.dose_labels import NUMBER, names_in
from perturbflow.screens.separators import another_name, torn

KEEP = "perturbation.pattern: '^(.*)$'"
SHOWN = 3
MOST_SHAPES = 6  # in one regular expression

_UNIT = r"(?:(?:[fpnumµμ]?M|[pnumµμ]?g/[numµμ]?[lL]|[numµμ]?mol(?:/[lL])?|[fpnumµμ]?molar|[mu]?U/m[lL]|%))"
_TIME = r"(?:h|hr|hrs|hours?|min|d|days?|wk|weeks?)"
_LEVELS = ("low", "lo", "mid", "med", "medium", "high", "hi")
_SIGN = r"[\s_@:|/,;-]*[\s_@:|/,;(-]"
_TAIL = re.compile(
    rf"(?P<stem>.*?[^\s_@:|/,;(-])(?P<sign>{_SIGN}"
    rf"|(?<=[^\W\d_]{{5}})(?=[\d.]+\s?{_UNIT}$))(?:(?P<number>{NUMBER})(?P<gap>[\s_-]?)"
    rf"(?:(?P<unit>{_UNIT})|(?P<time>{_TIME}))?|(?P<day>day|hour|week)[\s_-]?\d+|(?P<level>{'|'.join(_LEVELS)}))\)?",
    re.IGNORECASE,
)
_HEAD = re.compile(
    (
        rf"(?P<number>{NUMBER})(?P<gap>[\s_-]?)(?:(?P<unit>{_UNIT})"
        rf"|(?P<time>{_TIME}))(?P<day>(?!))?(?P<level>(?!))?(?P<sign>{_SIGN})(?P<stem>.*\w.*)"
    ),
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Variants:
    """Names of a screen that are several of one gene or compound.

    Attributes
    ----------
    difference
        Their difference, in words.
    stems
        Gene or compound → its names, of those that have several.
    line
        The line of a block that makes one of them.
    is_sure
        Whether they are no perturbations of their own for certain.
    """

    difference: str
    stems: Mapping[str, list[str]]
    line: str
    is_sure: bool

    def sentence(self) -> str:
        """Return a sentence on these names, without the fix."""
        shown = "; ".join(
            ", ".join(f"'{name}'" for name in names[:SHOWN]) for names in list(self.stems.values())[:SHOWN]
        )
        n = sum(map(len, self.stems.values()))
        return (
            f"{n:,} labels are {self.difference}, such as {shown}. Each would be a perturbation of its own, one held "
            "out while another of the same trains"
        )


_START = "perturbation.pattern: '"


def _line_of(pattern: str) -> str:
    return "perturbation.pattern: '{}'".format(pattern.replace("'", "''"))


def _shape(text: str) -> str:
    """Return a regular expression of texts that differ from this one in numbers, single letters or bases."""
    if len(text) > 17 and re.fullmatch(r"[ACGT]+", text[1:]):
        return re.escape(text[0]).replace(r"\-", "-") + "[ACGT]+"
    shape = re.sub(r"\d+", r"\\d+", re.escape(text).replace(r"\-", "-").replace(r"\ ", " "))
    shape = re.sub(r"^([-_])(?:\\\+|-)([-_])", r"\1[+-]\2", shape)
    return re.sub(r"(?<=[-_ .:#])[A-Za-z]$", "[A-Za-z]", shape)


def _found(name: str, pattern: str) -> str:
    match = re.search(pattern, name)
    return (
        name
        if match is None
        else match.groupdict().get("member") or next(group for group in match.groups() if group is not None)
    )


def _gene_line(forms: Mapping[str, str], names: Iterable[str]) -> str:
    """Return the line that makes genes of these names and keeps the others: a pattern, or else a list to rename."""
    shapes: dict[str, int] = {}
    for name, gene in forms.items():
        before, _, after = name.partition(gene)
        shape = f"^{_shape(before)}(.+){_shape(after)}$"
        shapes[shape] = max(len(after), shapes.get(shape, 0))
    pattern = "|".join(sorted(shapes, key=lambda shape: (-shapes[shape], shape)))
    if len(shapes) <= MOST_SHAPES and all(_found(name, pattern) == forms.get(name, name) for name in names):
        return _line_of(pattern)
    shown = ", ".join(f'"{name}": {gene}' for name, gene in list(forms.items())[:SHOWN])
    return f"perturbation.rename: {{{shown}{', ...' if len(forms) > SHOWN else ''}}}"


def of_genes(names: Iterable[str], is_gene: Callable[[str], bool]) -> tuple[Variants | None, dict[str, str], str]:
    """Return genes with several names, name → gene of all other names, and the line that makes genes of these.

    The second is name → gene.

    Parameters
    ----------
    names
        Members of labels, without controls.
    is_gene
        Whether a name is the symbol or id of a gene.
    """
    names = list(names)
    genes = {name: gene for name in names if (gene := gene_within(name, is_gene))}
    forms = {name: gene for name, gene in genes.items() if gene != name}
    line = _gene_line(forms, names) if forms else ""
    of_gene: dict[str, list[str]] = defaultdict(list)
    for name, gene in genes.items():
        of_gene[gene.casefold()].append(name)
    several = {gene: of for gene, of in of_gene.items() if len(of) > 1 and not forms.keys().isdisjoint(of)}
    found = Variants("guides, promoters or other forms of one gene", several, line, is_sure=True) if several else None
    return found, forms, line


def _tails(names: Iterable[str]) -> dict[str, dict[str, re.Match]]:
    """Return stem → its names, each with the part after or before the stem: a dose, a time, a level or a number."""
    found: dict[str, dict[str, re.Match]] = defaultdict(dict)
    for name in names:
        if match := _TAIL.fullmatch(name) or _HEAD.fullmatch(name):
            found[match["stem"]][name] = match
    return found


def _kind(tail: re.Match) -> str:
    """Return the kind of a tail: dose, time, level, or number where it may be part of a name."""
    if tail["unit"]:
        return "dose"
    if tail["time"] or tail["day"]:
        return "time"
    return "level" if tail["level"] else "number"


Tails = dict[str, dict[str, re.Match]]
"""Stem → its names, each with its tail."""


def of_compounds(names: Iterable[str], *, are_genes: bool) -> Variants | None:
    """Return compounds that go by several names, which differ in a dose, a time or a level at their end.

    A bare number is a dose where it has a decimal point, or where several stems have the same numbers. It is one, too,
    behind other signs than - (not AG-490, AG-14361). Where perturbations are genes, it is a guide.
    """
    names = list(names)
    stems = _tails(names)
    best = None
    for kind in ("dose", "time", "level", "number"):
        of_kind = {stem: {name: tail for name, tail in of.items() if _kind(tail) == kind} for stem, of in stems.items()}
        several, is_sure = {stem: of for stem, of in of_kind.items() if len(of) > 1}, True
        if kind == "number":
            several, is_sure = _numbered(several, len(names))
        if several and (best is None or len(several) > len(best.stems)):
            tails = _tails_taken_off(kind, of_kind, several)
            line = _line("guide" if kind == "number" and are_genes else kind, tails, names)
            stems_left = [tails[name]["stem"] if name in tails else name for name in names]
            inner = of_compounds(dict.fromkeys(stems_left), are_genes=are_genes)
            line = _nested(line, inner.line) if inner and inner.is_sure else line
            best = Variants(
                _words_of_kind(kind, are_genes), {stem: list(of) for stem, of in several.items()}, line, is_sure
            )
    return best


def _tails_taken_off(kind: str, of_kind: Tails, several: Tails) -> dict[str, re.Match]:
    """Return name → tail of the names that lose it.

    These are all names of the kind; of bare numbers only those that are doses.
    """
    numbers = {tail["number"] for of in several.values() for tail in of.values()}
    every = {name: tail for of in of_kind.values() for name, tail in of.items()}
    return {name: tail for name, tail in every.items() if kind != "number" or tail["number"] in numbers}


def _words_of_kind(kind: str, are_genes: bool) -> str:
    """Return, in words, the difference of names by a kind of tail."""
    if kind == "number" and are_genes:
        return "guides of one gene"
    return f"one perturbation at several {kind}s" if kind in ("time", "level") else "one compound at several doses"


def _nested(line: str, inner: str) -> str:
    """Return the line that applies the inner line to the names that the outer line leaves.

    `JQ1_10uM_24h` has a time behind its dose.
    """
    patterns = [text.removeprefix(_START).removesuffix("'") for text in (line, inner)]
    if not (line.startswith(_START) and inner.startswith(_START)) or all(
        "(?P<dose>" in pattern for pattern in patterns
    ):
        return line
    outer, body = patterns[0], patterns[1].removeprefix("^").removesuffix("$")
    member = "(?P<member>.+?)"
    return _line_of(
        outer.replace(member, body.replace("(.+)", member)) if member in outer else outer.replace("(.+)", body)
    )


def _numbered(several: dict[str, dict[str, re.Match]], n_names: int) -> tuple[dict[str, dict[str, re.Match]], bool]:
    """Return the stems whose bare numbers are doses, and whether that is certain."""
    decimal = {
        stem: of for stem, of in several.items() if any(re.search(r"[.e]", tail["number"]) for tail in of.values())
    }
    if decimal:
        return decimal, True
    stems_of: dict[str, set[str]] = defaultdict(set)
    for stem, of in several.items():
        for tail in of.values():
            stems_of[tail["number"]].add(stem)
    again = {
        stem: of
        for stem, of in several.items()
        if sum(len(stems_of[tail["number"]]) > 1 for tail in of.values()) > 1
        or all(tail["sign"] not in "- " for tail in of.values())
    }
    n = sum(map(len, again.values()))
    return (again, 2 * n > n_names) if len(again) > 1 else ({}, False)


def _line(kind: str, tails: Mapping[str, re.Match], names: Iterable[str]) -> str:
    """Return the line that removes tails from the names, and reads them where they are doses."""
    found = list(tails.values())
    signs = "|".join(re.escape(sign) for sign in sorted({tail["sign"] for tail in found}, key=len, reverse=True))
    signs = f"(?:{signs})" if "|" in signs else signs
    close = r"\)?" if kind != "guide" and any("(" in tail["sign"] for tail in found) else ""
    member = "(?P<member>.+{})" if kind in ("dose", "number") else "(.+)"
    tail = _pattern_of(kind, found)
    is_head = kind not in ("guide", "level") and any(match.re is _HEAD for match in found)
    pattern = f"^{tail}{signs}{member.format('')}$" if is_head else f"^{member.format('?')}{signs}{tail}{close}$"
    pattern = pattern.replace(r"\-", "-").replace(r"\ ", " ")
    is_logarithm = any(re.fullmatch(r"[_@:|]-", tail["sign"]) for tail in found)
    if is_logarithm or any(_found(name, pattern) != (tails[name]["stem"] if name in tails else name) for name in names):
        return (
            "perturbation.rename, or give doses and times columns of their own "
            "(perturbation.dose, covariates.cell_type)"
        )
    return _line_of(pattern)


def _pattern_of(kind: str, tails: list[re.Match]) -> str:
    """Return a regular expression of tails of a kind, without the sign that joins them to the stem."""
    gap = r"[\s_-]?" if any(tail["gap"] for tail in tails) else ""
    if kind == "guide":
        return NUMBER
    if kind == "level":
        return f"(?:{'|'.join(sorted({tail['level'] for tail in tails}))})"
    if kind == "time":
        words, before = (sorted({tail[group] or "" for tail in tails} - {""}) for group in ("time", "day"))
        forms = [rf"[\d.]+{gap}(?:{'|'.join(words)})"] * bool(words)
        forms += [rf"(?:{'|'.join(before)})[\s_-]?\d+"] * bool(before)
        return f"(?:{'|'.join(forms)})"
    units = sorted({tail["unit"] for tail in tails if tail["unit"]})
    unit = f"{gap}(?P<unit>{'|'.join(map(re.escape, units))})" if units else ""
    return rf"(?P<dose>[\d.]+(?:[eE][+-]?\d+)?){unit}"


def of_contexts(pairs: Iterable[tuple[str, str]], pattern: str | None) -> tuple[dict[str, list[str]], str]:
    """Return perturbations whose labels hold several contexts, and the line that removes contexts from labels.

    Parameters
    ----------
    pairs
        Names of perturbations, and the context of cells that have them.
    pattern
        The pattern of the block.
    """
    pairs = list(pairs)
    for is_first in (True, False):
        stems: dict[str, dict[str, str]] = defaultdict(dict)
        signs = set()
        for name, context in pairs:
            rest = name.removeprefix(context) if is_first else name.removesuffix(context)
            if rest != name and re.match(r"[\s_@:|-].", rest if is_first else rest[::-1]):
                signs.add(rest[0] if is_first else rest[-1])
                stems[rest[1:] if is_first else rest[:-1]][context] = name
        several = {stem: list(of.values()) for stem, of in stems.items() if len(of) > 1}
        if several and len(signs) == 1 and sum(map(len, stems.values())) > 0.9 * len(pairs):
            contexts = "|".join(
                re.escape(context) for context in sorted({context for of in stems.values() for context in of})
            )
            sign, inner = re.escape(signs.pop()), (pattern or "^(.+)$").removeprefix("^").removesuffix("$")
            found = f"^(?:{contexts}){sign}{inner}$" if is_first else f"^{inner}{sign}(?:{contexts})$"
            return several, _line_of(found.replace(r"\-", "-").replace(r"\ ", " "))
    return {}, ""


def twins(names: Iterable[str]) -> dict[str, list[str]]:
    """Return names that differ in small and capital letters or in spaces alone: the first of them → the others."""
    by_letters: dict[str, list[str]] = defaultdict(list)
    for name in names:
        by_letters[" ".join(name.casefold().split())].append(name)
    return {of[0]: of[1:] for of in by_letters.values() if len(of) > 1}


def _names_in(n_cells: Iterable[str], declared: Mapping, is_gene: Callable[[str], bool]) -> list[str]:
    """Return the members of labels that are no controls, unassigned or like controls, each once."""
    controls = DeclaredControls.of(declared)
    members: dict[str, None] = {}
    for label in n_cells:
        if label not in controls:
            # KLF1_+_123.45-P1 is a guide, whatever its signs are elsewhere.
            is_whole = "pattern" not in declared and gene_within(label, is_gene)
            members |= dict.fromkeys([label] if is_whole else names_in(label, declared))
    others = [name for name in members if name and name not in controls and name not in declared["drop"]]
    return [name for name in others if not controls.resembles(name)]


def _words_of_genes(names: Iterable[str], is_gene: Callable[[str], bool]) -> dict[str, str]:
    """Return name → the one gene that stands in it as a word: KRAS_G12D, KLF1_up."""
    words = {
        name: {word for word in re.split(r"[\s_:#|./()]+", name) if len(word) > 2 and is_gene(word)} for name in names
    }
    return {name: min(of) for name, of in words.items() if len(of) == 1 and name not in of}


def check_variants(
    n_cells: dict[str, int], dataset: dict, is_gene: Callable[[str], bool], path: Path, warnings: list[str]
) -> None:
    """Find labels that are of a gene or compound and are not its name.

    It adds a sentence to `warnings`, or raises an error where one gene or compound has several labels.

    Parameters
    ----------
    n_cells
        Label as in the file → cells.
    is_gene
        Whether a name is the symbol or id of a gene.

    Raises
    ------
    InputError
        For several labels of one gene or compound, and for names that the separator tears apart.
        A pattern that finds the members is a choice: it gets a warning.
    """
    declared, kind = dataset["perturbation"], dataset["perturbation_type"]
    names = _names_in(n_cells, declared, is_gene)
    several, forms, line = of_genes(names, is_gene)
    are_genes = kind not in ("drug", "unknown")
    compounds = of_compounds([name for name in names if not gene_within(name, is_gene)], are_genes=are_genes)
    other = " If they are compounds, set perturbation_type: drug." if kind == "unknown" else ""
    for found in filter(None, (several, compounds)):
        if found.is_sure and "pattern" not in declared:
            raise InputError(
                f"{path}: {found.sentence()}. Write {found.line}. "
                f"If they are perturbations of their own, write {KEEP}.{other}"
            )
        warnings.append(f"{found.sentence()}. If they are one, write {found.line}.")
    if are_genes:  # they may be perturbations of their own
        forms |= _words_of_genes([name for name in names if name not in forms], is_gene)
        line = _gene_line(forms, names) if forms else ""
    if forms and not several:
        shown = ", ".join(f"'{name}' ({gene})" for name, gene in list(forms.items())[:8])
        warnings.append(
            f"{len(forms):,} labels hold a gene's symbol and more, so none finds its gene: {shown}. "
            f"If each is of that gene, write {line}."
        )
    _check_torn(n_cells, declared, path)
    _check_twins([name for name in names if not is_gene(name)], path)


def _check_torn(n_cells: Iterable[str], declared: Mapping, path: Path) -> None:
    """Raise InputError where the separator stands within a name."""
    if "pattern" in declared:
        return
    separator, known = declared["separator"], {*declared.get("rename", {}), *DeclaredControls.of(declared).names}
    pieces = {label: torn(label, separator) for label in n_cells if label not in known}
    apart = [label for label, parts in pieces.items() if set(parts) & set(names_in(label, declared))]
    if not apart:
        return
    # A name cannot hold the sign of combinations, whatever the separator is.
    fix = "" if separator == SEPARATOR else " If no label is a combination, set perturbation.separator: null."
    raise InputError(
        f"{path}: perturbation.separator {separator!r} makes {' and '.join(map(repr, pieces[apart[0]]))} of the label "
        f"'{apart[0]}', which are no names. If it is one name, give it another: {another_name(apart, separator)}.{fix}"
    )


def _check_twins(names: Iterable[str], path: Path) -> None:
    """Raise InputError where names differ in small and capital letters or in spaces alone."""
    alike = twins(names)
    if not alike:
        return
    shown = "; ".join(", ".join(map(repr, [first, *others])) for first, others in list(alike.items())[:SHOWN])
    new_names = ", ".join(f"{quoted(other)}: {quoted(first)}" for first, others in alike.items() for other in others)
    raise InputError(
        f"{path}: labels differ in small and capital letters or spaces alone: {shown}. If they are one, write "
        f"perturbation.rename: {{{new_names}}}; else give one of them another name there."
    )
