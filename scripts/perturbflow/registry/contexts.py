"""Contexts of a screen that its block tells without the data: cell lines, donors, batches, or members of a union."""

import re
from collections.abc import Mapping

CONTEXT_KINDS = ("unseen_context", "unseen_perturbation_in_context")
"""Kinds of split that hold out contexts, or perturbations in them."""
EACH = "each"
"""folds: each context is left out in turn."""


def known_contexts(block: Mapping, covariate: str) -> list[str]:
    """Return the values of a covariate that a completed block tells: named, or the same for all cells.

    There are none where the block does not tell.
    """
    declared = block.get("covariates", {}).get(covariate)
    if named := block.get("contexts", {}).get(covariate):
        return list(named)
    return [str(declared["value"])] if isinstance(declared, dict) else []


def of_union(members: Mapping[str, Mapping], own: Mapping[str, list[str]]) -> dict[str, list[str]]:
    """Return the contexts of a union, by covariate: those it names, its members, and what all members tell.

    Parameters
    ----------
    members
        Name → block.
    own
        Those that the union's block names.
    """
    members = {name: block for name, block in members.items() if not block.get("controls_only")}  # nothing to score
    contexts = {"dataset": list(members), **own}
    for covariate in ("batch", "cell_type"):
        of_members = {name: known_contexts(block, covariate) for name, block in members.items()}
        if covariate == "batch":
            of_members = {
                name: [f"{name}:{batch}" for batch in of] if "batch" in members[name]["covariates"] else [name]
                for name, of in of_members.items()
            }
        if covariate not in contexts and all(of_members.values()):
            contexts[covariate] = list(dict.fromkeys(value for of in of_members.values() for value in of))
    return contexts


def split_of(name: str, context: str) -> str:
    """Return the name of the split that holds one context out."""
    return f"{name}_{re.sub('[^a-z0-9]+', '_', context.lower()).strip('_')}"
