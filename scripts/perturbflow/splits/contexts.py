"""Hold out contexts (values of a covariate, such as cell lines or donors), or perturbations in single contexts."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from perturbflow.errors import InputError
from perturbflow.genes.symbols import CONTROL, entities_of
from perturbflow.splits.cells import CONTROL_FRACTIONS, divide, divide_controls
from perturbflow.splits.divisions import Shares, take
from perturbflow.splits.named import Labels

MOST_SOURCES = 3
"""Perturbations that are held out in a context are known from 0, 1, 2 or this many other contexts, and more."""


@dataclass(frozen=True)
class Support:
    """The part of a held-out context that trains beside its controls.

    Attributes
    ----------
    fraction
        Share of the genes or compounds perturbed in each held-out context, by seed; 0 is its controls alone.
    named
        Context → labels, in place of a share.
    """

    fraction: float
    named: Mapping[str, Sequence[str]] | None = None

    @classmethod
    def of(cls, spec: Mapping[str, Any], labels: Labels) -> "Support | None":
        """Read a split's block; None where nothing of a held-out context trains.

        Raises
        ------
        InputError
            If a label is none of the screen's.
        """
        share = cls.share_of(spec)
        if share is None:
            return None
        named = {
            str(name): [labels.label(str(text)) for text in texts] for name, texts in spec.get("support", {}).items()
        }
        if unknown := sorted({label for of in named.values() for label in of} - {*labels.known}):
            raise InputError(f"support: the screen has no perturbation {', '.join(unknown[:8])}. Remove or correct it.")
        return cls(share, named or None)

    @staticmethod
    def share_of(spec: Mapping[str, Any]) -> float | None:
        """Return the share of perturbations that trains: 1 for names; None where not even controls do."""
        return 1.0 if "support" in spec else spec.get("support_fraction")

    def labels_in(self, context: str, known: Iterable[str], seed: tuple[int, int]) -> set[str]:
        """Return the labels of a context that train; of a combination, those whose members all do."""
        labels = set(known)
        if self.named is not None:
            return labels.intersection(self.named.get(context, ()))
        genes = sorted({name for label in labels for name in entities_of(label)})
        chosen = take(genes, self.fraction, np.random.default_rng(seed))
        return {label for label in labels if chosen.issuperset(entities_of(label))}


def _without_roles(obs: pd.DataFrame) -> pd.Series:
    return pd.Series(index=obs.index, dtype=object)


def _learned_from(cells: pd.DataFrame, covariate: str, shares: Shares) -> pd.Series:
    """Return training and validation for perturbed cells, a share of every perturbation × context."""
    of_perturbed = {"train": 1 - shares.validation, "validation": shares.validation}
    return divide(cells, [cells["perturbation"], cells[covariate]], of_perturbed, shares.seed)


def unseen_context(obs: pd.DataFrame, covariate: str, shares: Shares, support: Support | None = None) -> pd.Series:
    """Hold out contexts: values of a covariate, with all their controls and with perturbations seen elsewhere.

    Parameters
    ----------
    obs
        Cells with perturbation, is_control, batch, cell_type and the covariate.
    shares
        Of the contexts: names, one of k folds, or a share by seed: at least one, never all. Of the other contexts'
        cells, per perturbation × context, those for validation; their controls are divided between training and
        validation as elsewhere.
    support
        What of the held-out contexts trains. With it their controls are divided among all three roles.

    Returns
    -------
    A role per cell; none for cells of held-out contexts whose perturbation trains in no context.

    Raises
    ------
    InputError
        If the screen has one context or lacks a held-out one, or if a side is left without cells or controls.
    """
    context = obs[covariate].astype(str)
    test = _held_out_contexts(sorted(context.unique()), covariate, shares)
    is_test, is_control = context.isin(test), obs["is_control"].astype(bool)
    for where, side in (("the held-out", is_test), ("the other", ~is_test)):
        if not (side & is_control).any():
            raise InputError(
                f"{where} values of {covariate} ({', '.join(sorted(context[side].unique()))}) hold no control cell to "
                "compare with; hold out others through held_out in the split's block."
            )
    others = {role: CONTROL_FRACTIONS[role] for role in ("train", "validation")}
    of_controls = {role: share / sum(others.values()) for role, share in others.items()}
    roles = _without_roles(obs)
    roles[is_control & ~is_test] = divide_controls(obs[is_control & ~is_test], shares.seed, of_controls)
    is_support = pd.Series(data=False, index=obs.index)
    if support is not None:
        roles[is_control & is_test] = divide_controls(obs[is_control & is_test], shares.seed)
        is_support = _is_support(obs, context, sorted(test), support, shares.seed)
    learned = ~is_control & (~is_test | is_support)
    roles[learned] = _learned_from(obs[learned], covariate, shares)
    seen = obs["perturbation"].isin(obs.loc[(roles == "train") & ~is_control, "perturbation"].unique())
    scored = is_test & ~is_control & ~is_support & seen
    if not scored.any():
        raise InputError(_nothing_to_score(covariate, sorted(test), obs[is_test & ~is_control], is_support.any()))
    roles[scored] = "test"
    if support is None:
        roles[is_test & is_control] = "test"
    return roles


def _is_support(obs: pd.DataFrame, context: pd.Series, test: list[str], support: Support, seed: int) -> pd.Series:
    """Return True for perturbed cells of held-out contexts that train."""
    if support.named is not None and (unknown := sorted(set(support.named) - set(test))):
        raise InputError(
            f"support: {', '.join(unknown)} is not held out, so all of it trains. Held out: {', '.join(test)}."
        )
    label, is_support = obs["perturbation"].astype(str), pd.Series(data=False, index=obs.index)
    for i, name in enumerate(test):
        here = context == name
        chosen = support.labels_in(name, sorted(set(label[here]) - {CONTROL}), (seed, i))
        is_support |= here & label.isin(chosen)
    return is_support


def _nothing_to_score(covariate: str, test: list[str], perturbed: pd.DataFrame, has_support: bool) -> str:
    """Return in a sentence or two why held-out contexts have no perturbation to be scored."""
    names = ", ".join(test)
    if perturbed.empty:
        return (
            f"{covariate} {names} has controls alone, so there is nothing to score. Train on all (hold out another "
            "context) and ask what-if questions about its cells: counterfactuals, with cells: control."
        )
    if has_support:
        return f"the support takes all perturbations of {covariate} {names}; leave some to be scored: lower it."
    labels = ", ".join(sorted(perturbed["perturbation"].astype(str).unique())[:5])
    return (
        f"{covariate} {names} is the only context with its perturbations ({labels}), so no other can tell of them; "
        "hold out another context."
    )


def _held_out_contexts(known: list[str], covariate: str, shares: Shares) -> set[str]:
    """Return the contexts for test: the named ones, a fold, or a share of all.

    Raises
    ------
    InputError
        If the screen has one context, lacks a named one, or none is left to learn from.
    """
    if len(known) < 2:
        raise InputError(
            f"split unseen_context needs at least 2 values of {covariate}; this screen has one, '{known[0]}'. Name the "
            f"obs column of contexts under covariates.{covariate} in the dataset's block, or take the split out of "
            "select.splits."
        )
    rng = np.random.default_rng(shares.seed)
    if shares.held_out is None and shares.fold is None:
        return take(known, min(shares.test_share, 1 - 1 / len(known)), rng)
    test = set(map(str, shares.test_names(known, rng)))
    check_known(test, known, covariate)
    if test == set(known):
        raise InputError(
            f"held_out names all values of {covariate} ({', '.join(known)}); leave at least one to learn from."
        )
    return test


def check_known(named: set[str], known: Sequence[str], covariate: str) -> None:
    """Raise InputError if a context that is held out by name is none of the screen."""
    if unknown := sorted(named - set(known)):
        raise InputError(
            f"held_out: {', '.join(unknown)} is no value of {covariate} in this screen; its values: {', '.join(known)}."
        )


# --- perturbations in single contexts -------------------------------------------------------------------------------


def unseen_perturbation_in_context(
    obs: pd.DataFrame, covariate: str, shares: Shares, support: Support | None = None
) -> pd.Series:
    """Hold out perturbations in one context each, and let 0, 1, 2 or 3 and more other contexts tell of them.

    A share of all perturbed genes or compounds is held out. Each has a context of its own, drawn among those that
    measured it: of `shares.held_out`, or of all. In turn they are known from no, one, two, and three or more other
    contexts, as far as these measured them; cells in further contexts have no role. A combination goes where a
    held-out member goes.

    Returns
    -------
    A role per cell.

    Raises
    ------
    InputError
        If the screen has one context, lacks a named one, or none of them has a perturbation.
    """
    context, label = obs[covariate].astype(str), obs["perturbation"].astype(str)
    known = sorted(context.unique())
    if len(known) < 2:
        _held_out_contexts(known, covariate, shares)  # says so
    allowed = set(known) if shares.held_out is None else set(shares.held_out)
    check_known(allowed, known, covariate)
    is_control = obs["is_control"].astype(bool)
    held_out, hidden = _pairs_held_out(label[~is_control], context[~is_control], allowed, shares)
    places = list(zip(label, context, strict=True))
    genes_of = {name: entities_of(name) for name in label.unique()}
    of_place = {
        place: "test" if any((gene, place[1]) in held_out for gene in genes_of[place[0]])
        else "hidden" if any((gene, place[1]) in hidden for gene in genes_of[place[0]])
        else "learned"
        for place in set(places)
    }  # fmt: skip
    status = pd.Series([of_place[place] for place in places], index=obs.index)
    roles = _without_roles(obs)
    roles[is_control] = divide_controls(obs[is_control], shares.seed)
    learned = ~is_control & (status == "learned")
    roles[learned] = _learned_from(obs[learned], covariate, shares)
    roles[~is_control & (status == "test")] = "test"
    return roles


Place = tuple[str, str]


def _pairs_held_out(
    label: pd.Series, context: pd.Series, allowed: set[str], shares: Shares
) -> tuple[set[Place], set[Place]]:
    """Return (gene or compound, context) that are tested, and those that nobody may learn from besides."""
    measured: dict[str, list[str]] = {}
    for name, place in sorted(set(zip(label, context, strict=True))):
        for gene in entities_of(name):
            measured.setdefault(gene, []).append(place)
    measured = {gene: sorted(set(places)) for gene, places in measured.items()}
    candidates = sorted(gene for gene, places in measured.items() if allowed & set(places))
    if not candidates:
        raise InputError(f"no perturbation was measured in {', '.join(sorted(allowed))}; hold out other contexts.")
    rng = np.random.default_rng(shares.seed)
    chosen = rng.permutation(sorted(take(candidates, shares.test_share, rng))).tolist()
    held_out, hidden = set(), set()
    for turn, gene in enumerate(chosen):
        target = str(rng.choice(sorted(allowed & set(measured[gene]))))
        others = [place for place in rng.permutation(measured[gene]).tolist() if place != target]
        wanted = turn % (MOST_SOURCES + 1)
        held_out.add((gene, target))
        hidden |= {(gene, place) for place in (others[wanted:] if wanted < MOST_SOURCES else [])}
    return held_out, hidden


def n_sources(label: pd.Series, context: pd.Series, role: pd.Series) -> dict[str, int]:
    """Return per tested perturbation how many contexts have it among the cells that models learn from."""
    cells = pd.DataFrame({"label": label, "context": context, "role": role})
    learned = cells[cells["role"].isin(["train", "validation"])].drop_duplicates(["label", "context"])
    n = learned.groupby("label").size()
    return {name: int(n.get(name, 0)) for name in sorted(set(cells.loc[cells["role"] == "test", "label"]) - {CONTROL})}


CONTEXT_KINDS: dict[str, Callable[[pd.DataFrame, str, Shares, Support | None], pd.Series]] = {
    "unseen_context": unseen_context,
    "unseen_perturbation_in_context": unseen_perturbation_in_context,
}
"""Kinds that divide cells by perturbation and context."""
