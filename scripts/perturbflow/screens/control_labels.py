"""Labels of controls: those that a dataset's block declares.

Labels that only look like controls are reported, and stay perturbations.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from perturbflow.genes.symbols import CONTROL, GUIDE, human_symbols

# Marks of a guide or a library before a control's name.
_PREFIX = (
    r"(?:[mh][\W_]+|(?:p|px|sg|sh|si|cr|g|grna|sgrna|guide|guides|hs|mm|human|mouse|random|one|\d+x|chr[\dxy]+|plasmid"
    r"|library)[\W_]*)*"
)
_CONTROL = r"(?:ctrl|ctl|control|cntl|contrl|contr)s?"
# Names that mean a control, whatever text follows.
_NAMES = "|".join(
    (
        (
            r"non[\W_]*(?:target|human[\W_]*target|silenc|cut|edit|infect|transduc|transfect|treat|perturb|stimulat"
            r"|gene(?!sis))[a-z]*"
        ),
        r"no[\W_]*(?:target|guide|gRNA|sgRNA|site|perturb|treat|transduc|drug|stim|cut|crispr|cas9|virus)[a-z]*",
        rf"neg(?:ative)?[\W_]*(?:{_CONTROL}|con|guide)s?",
        rf"ntc?[\W_]*(?:{_CONTROL}|sgrnas?|grnas?|guides?)",
        r"safe[\W_]*(?:target|harbou?r|cut|guide|site|region)[a-z]*",
        r"scram(?:bled?)?",
        r"(?:inter|non)genic(?:[\W_]*(?:site|region))?",
        r"(?:untreat|unperturb|untransduc|untransfect|uninfect|unstimulat|unedit|unmodifi|untarget)(?:ed)?",
        _CONTROL,
        r"aavs(?:[\W_]*1)?",
        r"(?:gt[\W_]*|h)?rosa(?:[\W_]*26)?",
        r"[fr]?luciferase",
        r"h?renilla",
        r"lac[\W_]*z",
        r"gal[\W_]*4",
        r"[et]?[gry]fp",
        r"[et]?bfp2?",
        r"m?tag[\W_]*[bgry]fp2?",
        r"(?:td|m)[\W_]*tomato2?",
        r"mcherry",
        r"ds[\W_]*red2?",
        r"zs[\W_]*green1?",
        r"m[\W_]*neon[\W_]*green",
        r"irfp\d*",
        r"gene[\W_]*deserts?",
        r"n[\W_]*ctrl",
        r"olfactory[\W_]*receptor",
        rf"ef1a[\W_]*{_CONTROL}",
        r"mock(?:infected|transduced|transfected|treated)?",
        r"parental",
        r"(?:empty(?:[\W_]*(?:vector|plasmid|guide|control))?|vector|backbone)",
        r"dmso",
        r"veh(?:icle)?s?",
        r"placebo",
        r"wild[\W_]*types?",
        r"pbs",
        r"solvent",
        r"h2o",
        r"saline",
        r"d?cas(?:9|12a?|13d?)[\W_]*(?:only|alone)",
    )
)
# Words that other names begin with: only numbers and letters of guides may follow.
_WORDS = (
    r"safe|dummy|random|neutral|inert|irrelevant|decoy|unstim|uninf|resting|baseline|water|medium|media|sham|blank"
    r"|isotype|reference|bystander"
    r"|filler|desert|negative[\W_]*\d+|d?cas9"
)
# Words that are symbols of genes in capitals alone.
MIXED = ("rest", "Rest", "cntrl", "Cntrl")
# Short words are parts of symbols too.
_SHORT = r"ntc?|nc|wt|unt?|ut|rand|con|neg|scr|ctr|ev|[fnr]?luc2?|h[fnr]luc2?"
_NUMBERS = r"(?:[\W_]*(?:(?:sg|g|guide)[\W_]*)?\d+(?!\d)|[\W_]+[a-z](?![a-z]))*[\W_]*"
NAMED = re.compile(
    rf"{_PREFIX}(?:(?:{_NAMES})(?:[\W_\d].*|(?:guide|grna|sgrna|control|ctrl|cell|g\d).*)?|(?:{_WORDS}){_NUMBERS})",
    re.IGNORECASE,
)
SHORT = re.compile(rf"{_PREFIX}(?:{_SHORT}){_NUMBERS}", re.IGNORECASE)
# Texts that may follow the name of a control; it is no treatment then.
_QUALIFIERS = re.compile(
    rf"(?:{_CONTROL}|guides?|grnas?|sgrnas?|cells?|sites?|regions?|human|mouse|rep(?:licate)?|lane|batch|plate|pool"
    r"|well|day|hours?|time|only|mod"
    r"|vector|plasmid|vehicle|untreated|treated|[a-z]{1,3}|[a-z]{0,4}\d+[a-z\d]*|\d+[a-z]*)",
    re.IGNORECASE,
)
SHOWN = 8


@dataclass(frozen=True)
class DeclaredControls:
    """The labels, and members of labels, that a dataset's block declares to be controls.

    Attributes
    ----------
    names
        As written.
    pattern
        A regular expression that fully matches others.
    """

    names: frozenset[str]
    pattern: re.Pattern[str] | None = None

    @classmethod
    def of(cls, declared: Mapping) -> "DeclaredControls":
        """Read `control` and `control_pattern` of a block's `perturbation`.

        Of `0|0` under the separator `|`, the member 0 is a control.
        """
        names = {CONTROL, *declared.get("control", [])}
        if separator := declared.get("separator"):
            parts = [{part.strip() for part in name.split(separator)} - {""} for name in names if separator in name]
            names |= {part for of in parts if len(of) == 1 for part in of}
        # A column of whole numbers in which some are missing holds 6.0 where 6 is meant.
        names |= {f"{name}.0" for name in names if name.isdigit()}
        pattern = declared.get("control_pattern")
        return cls(frozenset(names), None if pattern is None else re.compile(pattern))

    def __contains__(self, text: str) -> bool:
        """Return whether a label or a member is declared a control."""
        return text in self.names or (self.pattern is not None and self.pattern.fullmatch(text) is not None)

    def resembles(self, text: str, *, is_drug: bool = False) -> bool:
        """Return whether a label that is no declared control looks like one.

        It does by the field's names for controls. It does, too, as a declared one in other letters, or as one that goes
        on with a separator or a digit. A gene's approved symbol (NT5E, WT1) does not, except for the few that name a
        control.
        """
        if NAMED.fullmatch(text) or text in MIXED:
            return True
        guide = GUIDE.fullmatch(text)
        if {text.upper(), guide["gene"].upper() if guide else ""} & human_symbols().approved:
            return False
        return (not is_drug and SHORT.fullmatch(text) is not None) or any(_is_form(text, name) for name in self.names)

    def joined(self, text: str, is_name: Callable[[str], bool], *, is_drug: bool = False) -> str | None:
        """Return the perturbation that a label joins to the name of a control (ctrl_KLF1, Erlotinib-DMSO), or None.

        The perturbation is a name by `is_name`. Of drugs it is any word beside a declared control, except for words of
        replicates and times (rep, lane, 24h).
        """
        for sign in re.finditer(r"[\W_]+", text):
            halves = text[: sign.start()], text[sign.end() :]
            for control, other in (halves, halves[::-1]):
                if (
                    (control in self or self.resembles(control, is_drug=is_drug))
                    and other not in self
                    and not self.resembles(other, is_drug=is_drug)
                ):
                    words = [word for word in re.split(r"[\W_]+", other) if word]
                    if is_name(other) or (
                        is_drug and control in self and words and not all(map(_QUALIFIERS.fullmatch, words))
                    ):
                        return other
        return None


def _plain(text: str) -> str:
    return re.sub(r"[\W_]+", "", text.casefold())


def _is_form(text: str, name: str) -> bool:
    """Return whether a text is a name in other letters or separators, or goes on with a separator or digit."""
    if len(_plain(name)) < 2:
        return False
    if _plain(text) == _plain(name):
        return True
    rest = text[len(name) :] if text.casefold().startswith(name.casefold()) else ""
    return bool(re.match(r"[\W_]", rest)) or (rest[:1].isdigit() and not name[-1].isdigit())


def look_alikes(
    n_cells: Mapping[str, int],
    controls: DeclaredControls,
    members: Callable[[str], Iterable[str]],
    *,
    is_drug: bool = False,
) -> dict[str, int]:
    """Return members that look like controls and are not declared as such → their cells, most cells first.

    Parameters
    ----------
    n_cells
        Label as in the file → cells.
    members
        Returns the names in a label, as the block reads it.
    """
    found: dict[str, int] = {}
    for label, n in n_cells.items():
        if label not in controls:
            for member in {member for member in members(label) if member and member not in controls}:
                found[member] = found.get(member, 0) + n
    alike = {member: n for member, n in found.items() if controls.resembles(member, is_drug=is_drug)}
    return dict(sorted(alike.items(), key=lambda item: (-item[1], item[0])))


def counted(n_cells: Mapping[str, int]) -> str:
    """Return labels, each with its number of cells; after the first SHOWN, only their number."""
    shown = ", ".join(f"'{label}' ({n:,})" for label, n in list(n_cells.items())[:SHOWN])
    return f"{shown}, {len(n_cells) - SHOWN:,} more" if len(n_cells) > SHOWN else shown


def declaration(alike: Iterable[str], declared: Iterable[str] = ()) -> str:
    """Return the line of a block that makes controls of these labels.

    It is a list, or a pattern where they differ by numbers alone.

    Parameters
    ----------
    declared
        The present list of perturbation.control, which a new one replaces.
    """
    names = list(alike)
    patterns = list(dict.fromkeys(re.sub(r"\d+", r"\\d+", re.escape(name).replace(r"\-", "-")) for name in names))
    if len(names) > SHOWN and len(patterns) <= len(names) // 2:
        pattern = "|".join(patterns).replace("'", "''")
        return f"perturbation.control_pattern: '{pattern}'"
    return f"perturbation.control: [{', '.join(map(quoted, [*declared, *names]))}]"


def quoted(text: str) -> str:
    """Return a text between quotation marks, as in YAML."""
    return json.dumps(text, ensure_ascii=not text.isprintable())


def warning(alike: Mapping[str, int], declared: Iterable[str]) -> str:
    """Return a warning of labels that look like controls, with the fix; `declared` as in `declaration`."""
    one = len(alike) == 1
    return (
        f"{len(alike):,} {'label looks like a control' if one else 'labels look like controls'} and "
        f"{'is' if one else 'are'} declared as none (cells): {counted(alike)}. "
        f"{'It stays a perturbation' if one else 'They stay perturbations'}. If "
        f"{'it is a control' if one else 'they are controls'}, declare {'it' if one else 'them'}: "
        f"{declaration(alike, declared)}."
    )
