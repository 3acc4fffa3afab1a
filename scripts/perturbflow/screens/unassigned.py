"""Labels of cells without a single known perturbation that no block declares as such.

They would pass for perturbations.
"""

import re
from collections.abc import Callable, Collection, Iterable, Mapping

import numpy as np

from perturbflow.genes.symbols import GUIDE, candidates, entity_of
from perturbflow.screens.control_labels import DeclaredControls, counted, quoted

_NO = r"(?:no|not|non|without)[\W_]*"
_DONE = (
    r"(?:assign(?:ed|ment)?|call(?:ed|s)?|detect(?:ed)?|determined|map(?:ped)?|identified|classified|known|available)"
)
_WORDS = "|".join(
    (
        rf"{_NO}{_DONE}|un{_DONE}|un(?:assignable|clear|certain|specified|labell?ed)",
        r"empty(?:[\W_]*(?:drop(?:let)?s?|cells?|wells?))?",
        (
            rf"{_NO}(?:guides?|grnas?|sgrnas?|barcodes?|features?|umis?|reads?(?:[\W_]*found)?|hto|hash(?:tag)?|label"
            r"|information|data|match|hits?)"
        ),
        (
            r"mixed|multi(?:ple)?(?:[\W_]*(?:guides?|grnas?|sgrnas?|infect(?:ed|ions?)?|assign(?:ed|ments?)?|hits?"
            r"|cells?))?"
        ),
        r"negatives?",
        r"low[\W_]*q(?:c|ual(?:ity)?)?",
        r"bad[\W_]*(?:quality|cells?)",
        r"debris|discard(?:ed)?|filtered|failed|undef(?:ined)?|missing|blank",
    )
)
_MIXED = r"(?:ambig(?:uous)?|(?:multipl|doubl|tripl)ets?)"
# Numbers may follow, of several cells at once anything ("doublet (A|B)"); signs alone are no name either.
WORD = re.compile(
    rf"(?:{_WORDS})(?:[\W_]*\d+)?|{_MIXED}(?:[\W_\d].*)?|n[\W_]*a[\W_]*|nan|none|null|[\W_]+", re.IGNORECASE
)
MANY_TIMES = 3  # the median of cells of known genes: a label with more cells is frequent


def is_word(text: str, genes: Collection[str]) -> bool:
    """Return whether a text says that a cell has no single known perturbation.

    It is a label or a member of one; no gene of the screen counts.
    """
    return text not in genes and WORD.fullmatch(text.strip(" <>()[]'\"") or "-") is not None


def unassigned_labels(
    n_cells: Mapping[str, int],
    controls: DeclaredControls,
    members: Callable[[str], Iterable[str]],
    genes: Collection[str],
) -> dict[str, int]:
    """Return such labels, or members of labels, that the block does not declare → their cells, most cells first.

    Parameters
    ----------
    n_cells
        Label as in the file → cells, without those that are declared as unassigned.
    members
        Returns the names in a label, as the block reads it.
    genes
        Names of the screen's genes.
    """
    found: dict[str, int] = {}
    for label, n in n_cells.items():
        if label in controls or label in genes:
            continue
        names = (
            [label]
            if is_word(label, genes)
            else [name for name in members(label) if name and name not in controls and is_word(name, genes)]
        )
        for name in dict.fromkeys(names):
            found[name] = found.get(name, 0) + n
    return dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))


def message(words: Mapping[str, int], declared: Iterable[str]) -> str:
    """Return a message on such labels, with the line that drops their cells.

    `declared` is the present list of perturbation.drop, which a new one replaces.
    """
    one = len(words) == 1
    return (
        f"{len(words):,} {'label says' if one else 'labels say'} that cells have no single known perturbation, and "
        f"would pass for {'a perturbation' if one else 'perturbations'} (cells): {counted(words)}. Drop these cells: "
        f"perturbation.drop: [{', '.join(map(quoted, [*declared, *words]))}]. If "
        f"{'it is a control' if one else 'some are controls'}, name {'it' if one else 'them'} in perturbation.control; "
        f"if {'it is a perturbation' if one else 'some are perturbations'}, give {'it' if one else 'them'} another "
        "name with perturbation.rename."
    )


def no_genes(
    n_cells: Mapping[str, int],
    controls: DeclaredControls,
    members: Callable[[str], Iterable[str]],
    genes: Collection[str],
) -> dict[str, int]:
    """Return frequent members of labels that are no gene and no control → their cells.

    It returns nothing where most labels are no genes.

    Parameters
    ----------
    n_cells, members, genes
        As in `unassigned_labels`.
    """
    of_name: dict[str, int] = {}
    for label, n in n_cells.items():
        for name in (
            {entity_of(name) for name in members(label) if name and name not in controls}
            if label not in controls
            else ()
        ):
            of_name[name] = of_name.get(name, 0) + n
    known = {name: n for name, n in of_name.items() if _is_gene(name, genes)}
    if 2 * len(known) < len(of_name) or not known:
        return {}
    frequent = MANY_TIMES * float(np.median(list(known.values())))
    others = {name: n for name, n in of_name.items() if name not in known and n > frequent}
    return dict(sorted(others.items(), key=lambda item: (-item[1], item[0])))


def _is_gene(name: str, genes: Collection[str]) -> bool:
    """Return whether a name, or that of its guide, is a gene of the screen or a human one.

    A gene of another organism counts by its human namesake.
    """
    guide = GUIDE.fullmatch(name)
    return any(
        text in genes or candidates(text) or candidates(text.upper())
        for text in (name, guide["gene"] if guide else name)
    )


def warning(others: Mapping[str, int]) -> str:
    """Return a warning of frequent labels that are no gene and no control."""
    one = len(others) == 1
    return (
        f"{len(others):,} frequent {'label is' if one else 'labels are'} no known gene and no control (cells): "
        f"{counted(others)}. {'It stays a perturbation' if one else 'They stay perturbations'}. If such cells have no "
        f"known perturbation, name {'the label' if one else 'the labels'} in perturbation.drop; if they are controls, "
        "in perturbation.control."
    )
