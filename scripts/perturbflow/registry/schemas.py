"""A configuration and its schemas: defaults filled in, and violations explained in the user's words."""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft202012Validator
from jsonschema.exceptions import ValidationError
from jsonschema.validators import extend
from referencing import Registry as SchemaRegistry
from referencing import Resource
from referencing.jsonschema import DRAFT202012

from perturbflow.errors import InputError
from perturbflow.registry.places import config_folder

SCHEMAS = config_folder() / "schemas"
# Types of JSON in a user's words.
TYPES = {
    "array": "a list",
    "object": "a block of keys and values",
    "string": "text",
    "integer": "a whole number",
    "number": "a number",
    "boolean": "true or false",
    "null": "null",
}
# Names in a message; of more, the nearest ones.
LISTED = 12

# JSON schema takes 1.0 for an integer; it would end up in a path and in a random generator.
_Validator = extend(
    Draft202012Validator,
    type_checker=Draft202012Validator.TYPE_CHECKER.redefine(
        "integer", lambda _, value: isinstance(value, int) and not isinstance(value, bool)
    ),
)


@dataclass(frozen=True)
class CommandLine:
    """The values of `snakemake --config`, for messages."""

    values: Mapping

    def __str__(self) -> str:
        return "--config"


Places = Sequence[Path | CommandLine]
"""The files that a configuration was merged from, in order."""


def read_yaml(path: Path) -> Any:
    """Return the content of a YAML file.

    Every job reads the configuration, so it uses libyaml where PyYAML was built with it.
    """
    return yaml.load(path.read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader))


def schema_of(name: str) -> dict:
    """Return a schema of config/schemas."""
    return read_yaml(SCHEMAS / f"{name}.schema.yaml")


def _retrieve(uri: str) -> Resource:
    return DRAFT202012.create_resource(read_yaml(SCHEMAS / Path(uri).name))


def with_defaults(schema: dict, value: Any) -> Any:
    """Return the value completed with the schema's defaults; a $ref fills nothing.

    Of the branches of a oneOf, the first mapping counts whose required keys are there.
    """
    if not isinstance(value, dict):
        return value
    branches = [branch for branch in schema.get("oneOf", ()) if branch.get("type") == "object"]
    filled = dict(value)
    if fitting := [branch for branch in branches if {*branch.get("required", ())} <= {*value}]:
        filled = with_defaults(fitting[0], filled)
    for key, subschema in schema.get("properties", {}).items():
        if key not in filled and "default" in subschema:
            filled[key] = subschema["default"]
        if key in filled:
            filled[key] = with_defaults(subschema, filled[key])
    extra = schema.get("additionalProperties")
    if isinstance(extra, dict):
        filled = {key: with_defaults(extra, item) if key not in schema.get("properties", {}) else item
                  for key, item in filled.items()}  # fmt: skip
    return filled


def with_texts(schema: dict, value: Any) -> Any:
    """Return the value with numbers as texts where the schema wants texts: `control: [6]` is `["6"]`.

    It does not follow a $ref.
    """
    if isinstance(value, dict):
        of_key, others = schema.get("properties", {}), schema.get("additionalProperties")
        others = others if isinstance(others, dict) else {}
        return (
            {_text_of(key): with_texts(of_key.get(key, others), item) for key, item in value.items()}
            if of_key or others
            else value
        )
    if isinstance(value, list):
        branches = [schema, *(branch for branch in schema.get("oneOf", ()) if branch.get("type") == "array")]
        items: dict = next((branch["items"] for branch in branches if "items" in branch), {})
        return [with_texts(items, item) for item in value]
    types = schema.get("type", ())
    return _text_of(value) if "string" in types and not {"number", "integer"} & {*types} else value


def with_values(schema: dict, value: Any) -> Any:
    """Return the value with texts turned into the types of the schema.

    `seeds: ["0"]` is `[0]`, and `null` and `true` are no words. `snakemake --config 'select={seeds: [0]}'` passes all
    nested values as texts.
    """
    if "$ref" in schema:
        name, pointer = schema["$ref"].split("#")
        schema = read_yaml(SCHEMAS / name)
        for key in pointer.strip("/").split("/"):
            schema = schema[key]
    if branches := schema.get("oneOf"):
        possible = (with_values(branch, value) for branch in branches)
        return next((found for found, branch in zip(possible, branches, strict=True) if _fits(branch, found)), value)
    if isinstance(value, dict):
        of_key, others = schema.get("properties", {}), schema.get("additionalProperties")
        others = others if isinstance(others, dict) else {}
        return {key: with_values(of_key.get(key, others), item) for key, item in value.items()}
    if isinstance(value, list):
        return [with_values(schema.get("items", {}), item) for item in value]
    types = schema.get("type", ())
    types = {types} if isinstance(types, str) else {*types}
    if not isinstance(value, str) or not types or ("string" in types and not (value == "null" and "null" in types)):
        return value
    try:
        meant = yaml.safe_load(value)
        meant = float(meant) if isinstance(meant, str) else meant  # 1e-3 is no number in YAML
    except (yaml.YAMLError, ValueError):
        return value
    return meant if _fits({"type": schema["type"]}, meant) else value


def _fits(schema: dict, value: Any) -> bool:
    registry = SchemaRegistry(retrieve=_retrieve)  # type: ignore[call-arg]  # see check_schema
    return _Validator(schema, registry=registry).is_valid(value)


def _text_of(value: Any) -> Any:
    """Return a number as text; true and false stay.

    YAML reads yes, no, on and off as true and false, so the word in the file is not known.
    """
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


def suggestion(word: str, known: list[str]) -> str:
    """Return the end of a message on an unknown word: the nearest known one, and all."""
    close = difflib.get_close_matches(word, known, n=1)
    hint = f" Did you mean '{close[0]}'?" if close else ""
    listed = known if len(known) <= LISTED else difflib.get_close_matches(word, known, n=LISTED, cutoff=0.0)
    more = f", {len(known) - len(listed)} more" if len(known) > len(listed) else ""
    return f"{hint} Known: {', '.join(sorted(listed)) or '(none)'}{more}."


def _explain(error: ValidationError, path: list[str]) -> str:
    """Return one sentence for a schema violation, in the user's words, with the fix."""
    place = ".".join(path) or "the top level"
    if error.validator == "additionalProperties" and isinstance(error.instance, dict):
        known = list(error.schema.get("properties", {}))
        unknown = [key for key in error.instance if key not in known]
        return " ".join(f"{place}: unknown key '{key}'.{suggestion(str(key), known)}" for key in unknown)
    if error.validator == "propertyNames" or "propertyNames" in error.absolute_schema_path:
        return f"{place}: '{error.instance}' cannot be a name; use lower-case letters, digits and _."
    if error.validator == "required":
        missing = [key for key in error.validator_value if key not in error.instance]
        return f"{place}: {', '.join(repr(key) for key in missing)} is missing."
    if error.validator == "anyOf" and all("required" in branch for branch in error.validator_value):
        return f"{place}: {' or '.join(repr(branch['required'][0]) for branch in error.validator_value)} is missing."
    if error.validator == "enum":
        return (
            f"{place}: {error.instance!r} is not "
            f"possible.{suggestion(str(error.instance), list(map(str, error.validator_value)))}"
        )
    if error.validator == "type" and isinstance(error.instance, bool) and "string" in error.validator_value:
        return (
            f"{place}: {error.instance} is no text; write it in quotes as the file has it, such as '{error.instance}' "
            "or 'no' (YAML reads no as false)."
        )
    if error.validator == "type" and error.validator_value == "array" and isinstance(error.instance, str | int | float):
        return f"{place}: {error.instance!r} must be a list: write [{_in_yaml(error.instance)}]."
    if error.validator == "type":
        types = [error.validator_value] if isinstance(error.validator_value, str) else error.validator_value
        return f"{place}: {error.instance!r} must be {' or '.join(TYPES[name] for name in types)}."
    if error.validator == "oneOf":
        described = [
            branch.get("enum") or branch.get("const") or branch.get("properties") for branch in error.validator_value
        ]
        return f"{place}: {error.instance!r} is not possible. Possible: {described}."
    return f"{place}: {error.message}."


def _in_yaml(value: Any) -> str:
    """Return a value as YAML has it within a list."""
    return yaml.safe_dump([value], default_flow_style=True, allow_unicode=True, width=10**6).strip()[1:-1]


def holding_file(files: Places, path: list[str]) -> str:
    """Return the name of the last configuration file, or --config, that holds a key path, for the error message."""
    for file in reversed(files):
        try:
            node = file.values if isinstance(file, CommandLine) else read_yaml(Path(file)) or {}
        except yaml.YAMLError as error:  # Snakemake lets a few of Python's own types pass
            raise InputError(f"{file} holds more than plain YAML: {error}") from error
        for key in path:
            if isinstance(node, list) and str(key).isdigit() and int(key) < len(node):
                node = node[int(key)]
            elif isinstance(node, dict) and key in node:
                node = node[key]
            else:
                break
        else:
            return f"{file}: "
    return ""


def check_schema(value: object, schema: dict, where: list[str], files: Places) -> None:
    """Check a value against a schema; `where` is its place in the configuration, for the message."""
    resources = SchemaRegistry(retrieve=_retrieve)  # type: ignore[call-arg]  # attrs hands it to the field _retrieve
    resources = resources.with_resource("", DRAFT202012.create_resource(schema))
    validator = _Validator(schema, registry=resources)
    errors = sorted(validator.iter_errors(value), key=lambda error: list(map(str, error.absolute_path)))
    if not errors:
        return
    lines = []
    for error in errors:
        path = [*where, *map(str, error.absolute_path)]
        inner = path
        if error.validator == "additionalProperties":
            known = error.schema.get("properties", {})
            inner = [*path, *[str(key) for key in error.instance if key not in known][:1]]
        lines.append(holding_file(files, inner) + _explain(error, path))
    raise InputError("\n".join(lines))
