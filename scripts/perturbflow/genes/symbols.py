"""Labels and gene symbols: one canonical form for both, so that a perturbed gene finds its row."""

import gzip
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

CONTROL = "control"
SEPARATOR = "+"
DOSE_SIGN = "@"

TABLE = Path(__file__).with_name("hgnc.tsv.gz")
ENSEMBL_ID = re.compile(r"(ENS[A-Z]*G\d{11})(?:\.\d+)?")
# ATF2g1, p-sgELK1-6, KLF1_sg2, KLF1-2: guides as public screens name them.
GUIDE = re.compile(r"(?:p-)?(?:sg)?(?P<gene>.+?)(?:[._-]?(?:sg|g|guide)[._-]?|[._-])\d+")

# Texts around a gene's symbol in the label of a guide (sgKLF1-1, KLF1_+_123.45-P1P2, KLF1_ACGT...), a promoter, an id
# or a method.
_BEFORE = re.compile(
    r"^(?:p[-_])?(?:(?:sgRNA|gRNA|sg|si|sh|cr|g)[-_.]?|(?i:CRISPR(?:i|a|ko)?|KO|KD|OE)[-_ ]|\d+[-_])(?=\w)"
)
_METHOD = r"KO|KD|OE|CRISPR(?:i|a|ko)|knock[-_ ]?(?:out|down)|activation|repression|overexpression|deletion|mutant"
_PART = r"guide|sgRNA|gRNA|crRNA|spacer|exon|ex|site|pos|cut|tile|clone|rep|replicate|target"
_AFTER = re.compile(
    r"(?:[-_. ]?(?:sgRNA|gRNA|sg|g|guide)[-_. ]?\d+|[-_. :#](?:\d+|(?:P\d+)+|[A-Za-z]|[ACGT]{17,}|TSS\d*)"
    r"|[-_][-+][-_]\d+\.\d+"
    rf"|[-_. ]?(?i:{_METHOD})\d*|[-_. ](?i:{_PART})[-_ ]?(?:\d+|[A-Za-z])|-/-"
    rf"|[-_. |:(]+ENS[A-Z]*G\d{{11}}(?:\.\d+)?\)?)$"
)

# Two letters are words of many vocabularies (NA, KO, WT): they are no evidence of a gene that has another name today.
SHORTEST_OLD_NAME = 3
# Reporters, controls and treatments of screens that happen to be old names of genes too (RFP of TRIM27, LPS of IRF6).
NO_GENES = {"BFP", "RFP", "GAL4", "CTR", "NTG", "IFN", "LPS"}
# Words for controls that are symbols of genes in capitals alone.
CONTROL_WORDS = {"CTRL", "CNTRL", "AAVS1", "REST"}
# Spreadsheets turn MARCH1 and MARC1 into 1-Mar.
DATE = re.compile(r"(\d{1,2})-(Mar|Sep|Dec)")
STEMS = {"Mar": ("MARCH", "MARC"), "Sep": ("SEPT", "SEP"), "Dec": ("DEC",)}


@dataclass(frozen=True)
class Symbols:
    """HGNC's table: approved symbols, and the names that point to them."""

    approved: frozenset[str]
    previous: Mapping[str, list[str]]
    alias: Mapping[str, list[str]]
    of_ensembl_id: Mapping[str, str]


@cache
def human_symbols() -> Symbols:
    """Return the table that ships with the workflow (symbols approved by HGNC, see `perturbflow.genes.hgnc`)."""
    approved, ids = set(), {}
    previous: dict[str, list[str]] = defaultdict(list)
    alias: dict[str, list[str]] = defaultdict(list)
    with gzip.open(TABLE, "rt", encoding="utf-8") as file:
        lines = (line.rstrip("\n").split("\t") for line in file if line[0] != "#")
        next(lines)
        for symbol, before, others, ensembl_id, _ in lines:
            approved.add(symbol)
            if ensembl_id:
                ids[ensembl_id] = symbol
            for names, column in ((previous, before), (alias, others)):
                for name in column.split("|") if column else ():
                    names[name].append(symbol)
    return Symbols(frozenset(approved), dict(previous), dict(alias), ids)


def candidates(name: str) -> list[str]:
    """Return the human genes that a name may mean today: one, several where it is ambiguous, none where it is unknown.

    In this order: an approved symbol, an Ensembl id, a previous symbol (the official name when older annotations were
    made), an alias.
    """
    table = human_symbols()
    if name in table.approved:
        return [name]
    if named := ENSEMBL_ID.fullmatch(name):
        return [table.of_ensembl_id[named[1]]] if named[1] in table.of_ensembl_id else []
    if date := DATE.fullmatch(name):
        number, month = date.groups()
        return sorted({gene for stem in STEMS[month] for gene in candidates(f"{stem}{int(number)}")})
    if len(name) < SHORTEST_OLD_NAME or name in NO_GENES:
        return []
    return table.previous.get(name) or table.alias.get(name) or []


def approved_symbol(name: str, organism: str = "human") -> str:
    """Return the approved symbol of a gene; a name that is unknown, ambiguous or a mere alias comes back as it is.

    Aliases never were official, and any word can be one (TF6 is TFG, TAG is LINC01194). So `canonical_label` needs more
    than the name to follow one.
    """
    genes = candidates(name) if organism == "human" else []
    is_alias = (
        len(genes) == 1 and name in human_symbols().alias and name not in human_symbols().previous and name != genes[0]
    )
    return genes[0] if len(genes) == 1 and not is_alias else name


def in_other_letters(name: str) -> str | None:
    """Return the human gene whose official symbol this is but for small and capital letters, or None."""
    is_word = len(name) < SHORTEST_OLD_NAME or name.upper() in NO_GENES | CONTROL_WORDS
    return None if is_word else _official_symbols().get(name.casefold())


@cache
def _official_symbols() -> dict[str, str]:
    table = human_symbols()
    before = {
        name.casefold(): genes[0]
        for name, genes in table.previous.items()
        if len(genes) == 1 and len(name) >= SHORTEST_OLD_NAME
    }
    return {**before, **{symbol.casefold(): symbol for symbol in table.approved}}


def gene_within(name: str, is_gene: Callable[[str], bool]) -> str | None:
    """Return the gene of a name: the name itself, or the symbol within the name of a guide, promoter or knock-out.

    None for any other name.

    Parameters
    ----------
    is_gene
        Whether a name is the symbol or id of a gene.
    """
    rest = name
    while rest:
        if gene := next((form for form in (rest, _BEFORE.sub("", rest)) if is_gene(form)), None):
            return gene
        shorter = _AFTER.sub("", rest)
        rest = shorter if shorter != rest else ""
    return None


def _target(member: str, organism: str, measured: Mapping[str, str]) -> str:
    if member in measured:
        return measured[member]
    gene = approved_symbol(member, organism)
    if (
        gene == member
        and organism == "human"
        and len(meant := candidates(member)) == 1
        and meant[0] in measured.values()
    ):
        return meant[0]
    return gene


def label_of(
    members: Iterable[str], control: Iterable[str], organism: str = "human", measured: Mapping[str, str] | None = None
) -> str:
    """Return the canonical label of a combination: the approved symbols of its members, sorted, joined by `+`.

    It leaves control members out. Without a member that names anything it is an empty string, which is no control. A
    member's dose (`NAME@dose`) stays with it.

    Parameters
    ----------
    measured
        Genes of the screen, name in the file → name now (`perturbflow.screens.organism.names_now`). A member with one
        of these names becomes that gene. So does an alias of one measured gene. So a perturbed gene finds its row.
    """
    control = {*control, CONTROL}
    named = [member.strip() for member in members if member.strip()]
    perturbed = [without_dose(member) for member in named if member not in control and entity_of(member) not in control]
    genes = {at_dose(_target(name, organism, measured or {}), dose) for name, dose in perturbed}
    return SEPARATOR.join(sorted(genes)) or (CONTROL if named else "")


def canonical_label(
    label: str,
    control: Iterable[str],
    separator: str | None,
    organism: str = "human",
    measured: Mapping[str, str] | None = None,
) -> str:
    """Return `control`, `GENE`, or `A+B` (`label_of`) for a label whose members `separator` joins.

    Without a separator a label is never split. `A+ctrl`, `ctrl+A` and `A+A` are all `A`; a label of controls alone is
    `control`.
    """
    if label in {*control, CONTROL}:
        return CONTROL
    return label_of(label.split(separator) if separator else [label], control, organism, measured)


def members_of(label: str) -> list[str]:
    """Return the perturbed genes or compounds of a canonical label, each with its dose if it has one.

    There are none for control.
    """
    return [] if label == CONTROL else label.split(SEPARATOR)


def without_dose(member: str) -> tuple[str, float | None]:
    """Return the name and the dose of a member `DRUG@dose`; None where it has none."""
    name, _, text = member.rpartition(DOSE_SIGN)
    try:
        dose = float(text)
    except ValueError:
        return member, None
    return (name, dose) if name and 0 <= dose < math.inf else (member, None)


def at_dose(name: str, dose: float | None) -> str:
    """Return the member `NAME@dose`; the name alone where there is no dose.

    Whole doses are written in full, others with seven digits.
    """
    if dose is None:
        return name
    amount = (
        f"{dose:.0f}" if dose.is_integer() and dose < 1e15 else f"{dose:.7g}".replace("+", "")
    )  # a plus joins members
    return f"{name}{DOSE_SIGN}{amount}"


def entity_of(member: str) -> str:
    """Return the gene or compound that a member is, whatever its dose."""
    return without_dose(member)[0]


def entities_of(label: str) -> list[str]:
    """Return the genes or compounds of a canonical label, whatever their doses, sorted; none for control."""
    return sorted({entity_of(member) for member in members_of(label)})
