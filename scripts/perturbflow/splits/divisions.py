"""Divide perturbations among training, validation and test by a rule.

It holds out genes or compounds, combinations, or doses.
"""

from collections import Counter
from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import Any

import numpy as np

from perturbflow.errors import InputError
from perturbflow.genes.symbols import SEPARATOR, entities_of, entity_of, members_of, without_dose

ROLES = ("train", "validation", "test")
KNOWN = {"validation": ("train",), "test": ("train", "validation")}  # scored role → roles that a model learns from
LEAST_DOSES_LEFT = 2  # of a compound whose doses are held out, in training: a response over dose takes two points

Perturbations = dict[str, list[str]]


def take(names: list[str], fraction: float, rng: np.random.Generator) -> set[str]:
    """Return a random share of the names, rounded to at least one where the fraction is positive."""
    n = min(len(names), max(1, round(fraction * len(names)))) if fraction > 0 else 0
    return set(rng.permutation(sorted(names))[:n])


@dataclass(frozen=True)
class Shares:
    """The held-out names: for test one of three, and for validation.

    Attributes
    ----------
    test
        Share of the names, by seed.
    validation
        Share of the names, by seed.
    fold
        The i-th of k parts of the names, each name in one: (i, k).
    held_out
        The names themselves.
    """

    test: float | None
    validation: float
    seed: int
    fold: tuple[int, int] | None = None
    held_out: Set[str] | None = None

    @classmethod
    def of(cls, spec: Mapping[str, Any], held_out: Set[str] | None) -> "Shares":
        """Read a split's block; `held_out` are the names that it lists, as the screen calls them."""
        fold = (spec["fold"], spec["folds"]) if "folds" in spec else None
        return cls(spec.get("test_fraction"), spec["validation_fraction"], spec["seed"], fold, held_out)

    def test_names(self, names: list[str], rng: np.random.Generator) -> Set[str]:
        """Return the names that are held out for test."""
        if self.held_out is not None:
            return self.held_out
        if self.fold is None:
            return take(names, self.test_share, rng)
        i, k = self.fold
        if k > len(names):
            raise InputError(
                f"{k} folds cannot be made of {len(names)}: {', '.join(names)}. Set folds to {len(names)} or fewer."
            )
        return set(rng.permutation(sorted(names))[i::k])

    @property
    def test_share(self) -> float:
        """The share of the names for test, where there are neither folds nor names."""
        assert self.test is not None  # the configuration has one of the three
        return self.test


def unseen_perturbation(labels: list[str], shares: Shares) -> Perturbations:
    """Hold out genes or compounds, at all their doses.

    A perturbation with a held-out member goes to the role of this member, test before validation.
    """
    entities = sorted({entity for label in labels for entity in entities_of(label)})
    if len(entities) < 3:
        raise InputError(
            "split unseen_perturbation needs at least 3 perturbed genes or compounds; this screen has "
            f"{len(entities)}: {', '.join(entities)}."
        )
    rng = np.random.default_rng(shares.seed)
    test = shares.test_names(entities, rng)
    validation = take(
        sorted(set(entities) - test), shares.validation * len(entities) / max(1, len(entities) - len(test)), rng
    )
    return _by_members({label: entities_of(label) for label in labels}, test, validation)


def _by_members(members: dict[str, list[str]], test: Set[str], validation: Set[str]) -> Perturbations:
    """Return the roles of labels whose members are held out, test before validation."""
    roles: Perturbations = {role: [] for role in ROLES}
    for label, own in members.items():
        roles[
            "test" if not test.isdisjoint(own) else "validation" if not validation.isdisjoint(own) else "train"
        ].append(label)
    return roles


def unseen_combination(labels: list[str], shares: Shares) -> Perturbations:
    """Hold out combinations, each with all its doses; all single perturbations are in training."""
    combination = {label: SEPARATOR.join(entities_of(label)) for label in labels if len(members_of(label)) > 1}
    names = sorted(set(combination.values()))
    if len(names) < 2:
        raise InputError(
            f"split unseen_combination needs at least 2 combinations (A+B); this screen has {len(names)}. "
            "Set combinations: false in the dataset's block, or check perturbation.separator."
        )
    rng = np.random.default_rng(shares.seed)
    test = shares.test_names(names, rng)
    rest = sorted(set(names) - test)
    validation = take(rest, shares.validation * len(names) / max(1, len(rest)), rng) if rest else set()
    return _by_members(
        {label: [combination[label]] if label in combination else [] for label in labels}, test, validation
    )


def unseen_dose(labels: list[str], shares: Shares) -> Perturbations:
    """Hold out doses of compounds, and leave at least two other doses of each in training.

    Compounds with fewer than three doses above zero, measured alone, stay in training. A combination goes to the role
    of its held-out member.
    """
    doses: dict[str, list[str]] = {}
    for label in sorted(labels):
        name, dose = without_dose(label)
        if len(members_of(label)) == 1 and dose:
            doses.setdefault(name, []).append(label)
    doses = {name: of for name, of in doses.items() if len(of) > LEAST_DOSES_LEFT}
    if not doses:
        raise InputError(
            f"split unseen_dose needs a compound, or gene, with at least {LEAST_DOSES_LEFT + 1} doses measured alone; "
            "this screen has none. Name the obs column of doses under perturbation.dose in the dataset's block, or "
            "take the split out of select.splits."
        )
    rng = np.random.default_rng(shares.seed)
    left = {name: len(of) - LEAST_DOSES_LEFT for name, of in doses.items()}  # that may be held out
    n = sum(map(len, doses.values()))
    if shares.held_out is not None:
        test = shares.held_out
    elif shares.fold is not None:
        test = _fold_of_doses(doses, shares.fold, rng)
    else:
        test = _take_doses(doses, max(1, round(shares.test_share * n)), left, rng)
    left = {name: left[name] - len(test & set(of)) for name, of in doses.items()}
    if few := [name for name in map(entity_of, sorted(test)) if left.get(name, -1) < 0]:
        raise InputError(
            f"held_out leaves fewer than {LEAST_DOSES_LEFT} doses of {', '.join(dict.fromkeys(few))} in training; name "
            "fewer."
        )
    rest = {name: sorted(set(of) - test) for name, of in doses.items()}
    validation = _take_doses(rest, max(1, round(shares.validation * n)) if shares.validation > 0 else 0, left, rng)
    return _by_members({label: members_of(label) for label in labels}, test, validation)


def _take_doses(doses: dict[str, list[str]], n: int, left: dict[str, int], rng: np.random.Generator) -> set[str]:
    """Return n doses in random order; of each compound no more than may be held out."""
    taken: set[str] = set()
    of_compound: Counter[str] = Counter()
    for label in rng.permutation(sorted(label for of in doses.values() for label in of)).tolist():
        name = entity_of(label)
        if len(taken) < n and of_compound[name] < left[name]:
            taken.add(label)
            of_compound[name] += 1
    return taken


def _fold_of_doses(doses: dict[str, list[str]], fold: tuple[int, int], rng: np.random.Generator) -> set[str]:
    """Return one of k folds: the doses of each compound dealt in random order, each dose to one fold."""
    i, k = fold
    fewest = min(doses, key=lambda name: len(doses[name]))
    if -(-len(doses[fewest]) // k) > len(doses[fewest]) - LEAST_DOSES_LEFT:
        raise InputError(
            f"{k} folds leave fewer than {LEAST_DOSES_LEFT} of the {len(doses[fewest])} doses of {fewest} in training; "
            "set folds to 3 or more."
        )
    first, test = 0, set()
    for of in doses.values():
        test |= {label for j, label in enumerate(rng.permutation(of).tolist()) if (first + j) % k == i}
        first += len(of)
    return test


# Kinds that divide labels by a rule.
DIVISIONS = {
    "unseen_perturbation": unseen_perturbation,
    "unseen_combination": unseen_combination,
    "unseen_dose": unseen_dose,
}


def members_seen(perturbations: Perturbations) -> dict[str, int]:
    """Return per held-out perturbation how many of its members a model saw alone, at any dose.

    The model is the one that is scored on the perturbation. For validation it saw training alone, for test validation
    too.
    """
    seen: dict[str, int] = {}
    for role, known in KNOWN.items():
        alone = {entity_of(label) for other in known for label in perturbations[other] if len(members_of(label)) == 1}
        seen |= {
            label: sum(entity_of(member) in alone for member in members_of(label)) for label in perturbations[role]
        }
    return seen
