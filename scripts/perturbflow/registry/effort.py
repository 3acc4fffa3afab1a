"""The one dial of the configuration: how many seeds are trained, and how long networks train."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Effort:
    """What a run does where its configuration says nothing.

    No effort shortens trainings. With a quarter of its steps `counterfactual` scores as well, since its mean is in
    closed form, and has lost nearly all differences between cells, which are what it is for.

    Attributes
    ----------
    steps
        Optimization steps of networks, as a multiple of the declared defaults.
    seeds
        Seeds of the trainings, where `select.seeds` is null.
    """

    steps: float
    seeds: tuple[int, ...]


EFFORTS = {
    "quick": Effort(1.0, (0,)),
    "standard": Effort(1.0, (0, 1, 2)),
    "thorough": Effort(3.0, (0, 1, 2, 3, 4)),
}
SCALED = "n_steps"  # params whose name begins so are numbers of optimization steps


def scaled(schema: dict, effort: str) -> dict:
    """Return the schema of a family's params with its numbers of steps by effort."""
    factor = EFFORTS[effort].steps
    properties = {
        name: {**of, "default": max(1, round(of["default"] * factor))} if name.startswith(SCALED) else of
        for name, of in schema.get("properties", {}).items()
    }
    return {**schema, "properties": properties}
