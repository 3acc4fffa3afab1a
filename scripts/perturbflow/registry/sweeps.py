"""A sweep: which params of which model are searched, checked before any job."""

from typing import Any

from perturbflow.errors import InputError
from perturbflow.registry.families import FAMILIES
from perturbflow.registry.schemas import Places, check_schema, holding_file, schema_of, suggestion, with_values

RANGE = {"low", "high", "log"}


def completed_sweep(sweep: dict, models: dict, files: Places) -> dict:
    """Return the block `sweep` with its values in the types of the params, and `log` in every range.

    Raises
    ------
    InputError
        Where the model has no params to search, or `over` names no param, an unknown one, or a value that it cannot
        have.
    """
    model, family = sweep["model"], models[sweep["model"]]["family"]
    schemas = schema_of("models")["$defs"]
    known = {} if FAMILIES[family].made_elsewhere else schemas[family]["properties"]
    file = holding_file(files, ["sweep", "model"])
    if not known:
        others = [
            name
            for name, block in models.items()
            if schemas[block["family"]]["properties"] and not FAMILIES[block["family"]].made_elsewhere
        ]
        raise InputError(
            f"{file}sweep.model: '{model}' (family {family}) has no params that a sweep can search. These have: "
            f"{', '.join(others)}."
        )
    searched = {name: param for name, param in known.items() if "properties" not in param}
    if not sweep["over"]:
        raise InputError(
            f"{holding_file(files, ['sweep', 'over'])}sweep.over names no param; name at least one of "
            f"{', '.join(searched)}, such as {next(iter(searched))}: [...]."
        )
    over = {}
    for name, values in sweep["over"].items():
        file = holding_file(files, ["sweep", "over", name])
        if name not in searched:
            raise InputError(f"{file}sweep.over: {model} has no param '{name}'.{suggestion(name, list(searched))}")
        over[name] = _completed(f"{file}sweep.over.{name}", searched[name], values, ["sweep", "over", name], files)
    return {**sweep, "over": over}


def _completed(place: str, param: dict, values: Any, where: list[str], files: Places) -> list | dict:
    """Return the values of one param in its types."""
    if isinstance(values, dict):
        return _completed_range(place, param, values, where, files)
    if not isinstance(values, list) or not values:
        raise InputError(
            f"{place}: {values!r} must be a list of choices, such as [64, 256], or a range, such as "
            "{low: 0.0001, high: 0.01, log: true}."
        )
    choices = [with_values(param, value) for value in values]
    for choice in choices:
        check_schema(choice, param, where, files)
        if isinstance(choice, list | dict):
            raise InputError(f"{place}: {choice!r} cannot be a choice; a sweep takes numbers, texts, true and false.")
    return list(dict.fromkeys(choices))


def _completed_range(place: str, param: dict, values: dict, where: list[str], files: Places) -> dict:
    """Return a range in the types of its param."""
    if not {"low", "high"} <= {*values} <= RANGE:
        raise InputError(f"{place}: a range has low and high, and may have log: true; here is {', '.join(values)}.")
    types = {param["type"]} if isinstance(param.get("type"), str) else {*param.get("type", ())}
    if not types & {"integer", "number"}:
        raise InputError(f"{place}: this param is no number, so it takes a list of choices.")
    found = {key: with_values(param, values[key]) for key in ("low", "high")}
    for key, value in found.items():
        check_schema(value, param, [*where, key], files)
    is_log = with_values({"type": "boolean"}, values.get("log", False))
    if found["low"] >= found["high"] or (is_log and found["low"] <= 0):
        wanted = "a low above 0, as log is true, and below high" if is_log else "a low below high"
        raise InputError(f"{place}: the range {found['low']} to {found['high']} needs {wanted}.")
    if "number" in types:
        found = {key: float(value) for key, value in found.items()}
    return {**found, "log": is_log}
