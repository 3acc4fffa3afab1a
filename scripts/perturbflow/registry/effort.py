"""The one dial of the configuration: how much work a run puts into networks, and how many seeds it trains."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Effort:
    """What a run does where its configuration says nothing.

    Attributes
    ----------
    steps
        Optimization steps of networks, as a multiple of the declared defaults. Params that a configuration sets stay.
    seeds
        Seeds of the trainings, where `select.seeds` is null.
    """

    steps: float
    seeds: tuple[int, ...]


EFFORTS = {
    "quick": Effort(0.25, (0,)),
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
