"""Several screens as one: blocks of unions, checked and completed from those of their members."""

from collections.abc import Mapping, Sequence

from perturbflow.errors import InputError
from perturbflow.registry.contexts import of_union
from perturbflow.registry.schemas import Places, holding_file, suggestion

OWN_KEYS = ("union", "genes", "perturbation_types", "contexts", "note", "reference", "licence")
"""Keys that a union's block may have."""
OF_UNIONS = ("genes", "perturbation_types")
"""Keys that no other block has a use for."""
OF_CONTENT = ("source", "subset", "exclude", "gene_pattern", "perturbation")
"""Keys that decide which cells a screen has: two members that agree in all are the same cells twice."""


def is_union(block: Mapping) -> bool:
    """Return whether a dataset's block unites others."""
    return "union" in block


def check_keys(name: str, block: Mapping, files: Places) -> None:
    """Check the keys of a dataset's block as the user wrote it: a union has no source, and a source no members."""
    if is_union(block):
        idle = [key for key in block if key not in OWN_KEYS]
        why = f"the members of a union have this key; a union's own are {', '.join(OWN_KEYS)}"
    else:
        idle = [key for key in OF_UNIONS if key in block]
        why = "it belongs to a dataset that unites others, by the key union"
    if idle:
        where = ["datasets", name, idle[0]]
        raise InputError(f"{holding_file(files, where)}{'.'.join(where)}: {why}. Remove it.")


def completed(name: str, datasets: Mapping[str, dict], files: Places) -> dict:
    """Return a union's block with all keys that its members decide: organism, perturbation_type and covariates.

    Raises
    ------
    InputError
        If the members cannot be one screen.
    """
    block = datasets[name]
    members = block["union"]
    if problem := _problem(members, datasets, block.get("perturbation_types")):
        key, sentence = problem
        where = ["datasets", name, key]
        file = holding_file(files, where) or holding_file(files, where[:-1])
        raise InputError(f"{file}{'.'.join(where)}: {sentence}")
    blocks = [datasets[member] for member in members]
    types = list(dict.fromkeys(member["perturbation_type"] for member in blocks))
    combinations = {member.get("combinations") for member in blocks}
    declared = {
        **({"combinations": True in combinations} if combinations & {True} or combinations == {False} else {}),
        **({"perturbation": {"dose": "dose"}} if any("dose" in of["perturbation"] for of in blocks) else {}),
    }
    covariates = {"dataset": "dataset", "batch": "batch"}
    if any({"cell_type"} & {*of["covariates"]} for of in blocks):
        covariates["cell_type"] = "cell_type"
    return {
        "genes": "shared",
        "perturbation_types": types,
        "perturbation": {},
        **block,
        **declared,
        "source": {},
        "organism": blocks[0]["organism"],
        "perturbation_type": types[0] if len(types) == 1 else ", ".join(types),
        "covariates": covariates,
        "contexts": of_union({member: datasets[member] for member in members}, block.get("contexts", {})),
    }


def _problem(
    members: Sequence[str], datasets: Mapping[str, dict], types: Sequence[str] | None
) -> tuple[str, str] | None:
    """Return the key and, in one sentence, why these are no members of one union; None if they are."""
    for member in members:
        if member not in datasets:
            return "union", f"there is no dataset '{member}'.{suggestion(member, list(datasets))}"
        if is_union(datasets[member]):
            nested = ", ".join(datasets[member]["union"])
            return "union", f"'{member}' is a union itself. Name its members in its place: {nested}."
    organisms = {member: datasets[member]["organism"] for member in members}
    if len(set(organisms.values())) > 1:
        of_each = ", ".join(f"{member} ({organism})" for member, organism in organisms.items())
        return "union", f"members are of several organisms, which share no genes: {of_each}. Unite those of one."
    content = {
        member: tuple(str(datasets[member].get(key)) for key in (*OF_CONTENT, "sha256", "md5")) for member in members
    }
    for i, member in enumerate(members):
        if twin := next((other for other in members[:i] if content[other] == content[member]), None):
            return "union", f"{twin} and {member} are the same cells twice, by source and subset. Remove one of them."
    return _problem_of_types({member: datasets[member]["perturbation_type"] for member in members}, types)


def _problem_of_types(of_member: Mapping[str, str], listed: Sequence[str] | None) -> tuple[str, str] | None:
    """Return the key and, in one sentence, why the types of perturbations cannot stand together."""
    types = list(dict.fromkeys(of_member.values()))
    if listed is None and len(types) > 1:
        of_each = ", ".join(f"{member} ({kind})" for member, kind in of_member.items())
        return "union", (
            f"members perturb genes in several ways, and one gene by two is not one perturbation: {of_each}. Unite "
            "members of one type, or say which type a gene that several perturb is kept in, the first that has it: "
            f"perturbation_types: [{', '.join(types)}]."
        )
    if listed is not None and (missing := [kind for kind in types if kind not in listed]):
        return "perturbation_types", f"{', '.join(missing)} of the members is not listed. List all: {', '.join(types)}."
    return None
