"""Params of a family: one frozen dataclass, from which its schema, its documents and its model's constructor follow."""

import types
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass, replace
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

_TYPES = {int: "integer", float: "number", bool: "boolean", str: "string", dict: "object", type(None): "null"}
_Params = TypeVar("_Params", bound="Params")


@dataclass(frozen=True)
class Params:
    """No params: what most closed forms have."""


def param(
    default: Any = MISSING,
    sentence: str = "",
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
) -> Any:
    """Return a field with its default, a sentence and its bounds; a class as default is a group of params.

    Without a default the param is required.
    """
    bounds = {"minimum": at_least, "exclusiveMinimum": above, "maximum": at_most, "exclusiveMaximum": below}
    schema: dict[str, Any] = {name: bound for name, bound in bounds.items() if bound is not None}
    if sentence:
        schema["description"] = sentence
    if isinstance(default, type):
        return field(default_factory=default, metadata=schema)
    return field(default=default, metadata=schema)


def like(parent: type[Params], name: str, default: Any, sentence: str = "") -> Any:
    """Return a field of the parent with another default and, where one is given, another sentence."""
    schema = dict(parent.__dataclass_fields__[name].metadata)
    if sentence:
        schema["description"] = sentence
    return field(default=default, metadata=schema)


def json_schema(declared: type) -> dict[str, Any]:
    """Return the JSON schema of params."""
    kinds = get_type_hints(declared)
    properties = {of.name: _property(of, kinds[of.name]) for of in fields(declared)}
    required = [name for name, of in properties.items() if "default" not in of]
    return {"type": "object", "additionalProperties": False, **({"required": required} if required else {}),
            "properties": properties}  # fmt: skip


def _property(of: Field, kind: Any) -> dict[str, Any]:
    """Return the schema of one param."""
    schema = {**_kind(kind), **of.metadata}
    if of.default_factory is not MISSING:  # of a group of params, or of a free mapping
        schema["default"] = {}
    elif of.default is not MISSING:
        schema["default"] = of.default
    return schema


def _kind(kind: Any) -> dict[str, Any]:
    """Return the schema of a type."""
    if get_origin(kind) is Literal:
        return {"enum": list(get_args(kind))}
    if get_origin(kind) in (Union, types.UnionType):
        if type(None) in get_args(kind):  # a value or none
            return {"type": [_TYPES[one] for one in get_args(kind)]}
        return {"oneOf": [_kind(one) for one in get_args(kind)]}
    if is_dataclass(kind):
        return json_schema(kind)  # type: ignore[arg-type]  # a dataclass is a type
    return {"type": _TYPES[kind]}


def made(declared: type[_Params], values: Mapping[str, Any]) -> _Params:
    """Return params of these values; a mapping becomes the group of params that stands in its place.

    Raises
    ------
    TypeError
        If a value belongs to no param.
    """
    kinds = get_type_hints(declared)
    params = declared(**values)
    groups = {
        name: _group(kinds[name])(**value)
        for name, value in values.items()
        if isinstance(value, Mapping) and kinds[name] is not dict
    }
    return replace(params, **groups)


def _group(kind: Any) -> type:
    """Return the dataclass among the types of a param."""
    return next(one for one in (kind, *get_args(kind)) if isinstance(one, type) and is_dataclass(one))
