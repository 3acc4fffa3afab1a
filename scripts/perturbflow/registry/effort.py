"""The one dial of the configuration: how long networks train, and how many seeds."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Effort:
    """What a run does where its configuration says nothing.

    Attributes
    ----------
    steps
        Optimization steps of networks that learn mean effects, as a multiple of the declared defaults.
    steps_around_mean
        The same for networks around a mean in closed form, which only tell how cells differ.
    seeds
        Seeds of the trainings, where `select.seeds` is null.
    """

    steps: float
    steps_around_mean: float
    seeds: tuple[int, ...]


EFFORTS = {
    "quick": Effort(1.0, 0.25, (0,)),
    "standard": Effort(1.0, 1.0, (0, 1, 2)),
    "thorough": Effort(3.0, 3.0, (0, 1, 2, 3, 4)),
}
SCALED = "n_steps"  # params whose name begins so are numbers of optimization steps


def scaled(schema: dict, params: dict, effort: str) -> dict:
    """Return the schema of a family's params with its numbers of steps by effort, for a model of these params."""
    properties = schema.get("properties", {})
    mean = params.get("mean", properties.get("mean", {}).get("default"))
    of = EFFORTS[effort]
    factor = of.steps_around_mean if mean == "closed_form" else of.steps
    return {
        **schema,
        "properties": {
            name: {**declared, "default": max(1, round(declared["default"] * factor))}
            if name.startswith(SCALED)
            else declared
            for name, declared in properties.items()
        },
    }
