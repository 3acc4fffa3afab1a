"""The forms of issues are what GitHub takes for forms, and offer what the schemas know."""

import copy
import re
from pathlib import Path

import pytest
import yaml
from conftest import REPOSITORY
from jsonschema import Draft202012Validator

from perturbflow.evaluation.inputs import NEEDS

FORMS = {
    path.stem: yaml.safe_load(path.read_text())
    for path in sorted((REPOSITORY / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
}

TEXT = {"type": "string", "minLength": 1}
# What GitHub's documentation of issue forms says: the keys of a form, and those of every type of element.
ATTRIBUTES = {
    "markdown": ({"value": TEXT}, ["value"]),
    "input": (dict.fromkeys(("label", "description", "placeholder", "value"), TEXT), ["label"]),
    "textarea": (dict.fromkeys(("label", "description", "placeholder", "value", "render"), TEXT), ["label"]),
    "dropdown": (
        {
            "label": TEXT,
            "description": TEXT,
            "multiple": {"type": "boolean"},
            "default": {"type": "integer", "minimum": 0},
            "options": {"type": "array", "items": TEXT, "minItems": 1, "uniqueItems": True},
        },
        ["label", "options"],
    ),
    "checkboxes": (
        {
            "label": TEXT,
            "description": TEXT,
            "options": {
                "type": "array",
                "minItems": 1,
                "items": {
                    "type": "object",
                    "properties": {"label": TEXT, "required": {"type": "boolean"}},
                    "required": ["label"],
                    "additionalProperties": False,
                },
            },
        },
        ["label", "options"],
    ),
}


def element(kind: str) -> dict:
    """Return the schema of an element of a form; only text needs no id: nothing comes back of it."""
    properties, required = ATTRIBUTES[kind]
    attributes = {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
    fields = {"type": {"const": kind}, "attributes": attributes}
    if kind == "markdown":
        return {
            "type": "object",
            "properties": fields,
            "required": ["type", "attributes"],
            "additionalProperties": False,
        }
    validations = {"type": "object", "properties": {"required": {"type": "boolean"}}, "additionalProperties": False}
    fields |= {"id": {"type": "string", "pattern": "^[A-Za-z0-9_-]+$"}, "validations": validations}
    return {
        "type": "object",
        "properties": fields,
        "required": ["type", "id", "attributes"],
        "additionalProperties": False,
    }


FORM = {
    "type": "object",
    "properties": {
        "name": {**TEXT, "minLength": 3},
        "description": {**TEXT, "minLength": 3, "maxLength": 200},
        "title": TEXT,
        "labels": {"type": "array", "items": TEXT},
        "assignees": {"type": "array", "items": TEXT},
        "body": {"type": "array", "minItems": 1, "items": {"oneOf": [element(kind) for kind in ATTRIBUTES]}},
    },
    "required": ["name", "description", "body"],
    "additionalProperties": False,
}


def faults(form: dict) -> list[str]:
    """Return what GitHub would refuse of a form."""
    found = [
        f"{'.'.join(map(str, error.absolute_path))}: {error.message}"
        for error in Draft202012Validator(FORM).iter_errors(form)
    ]
    asked = [item for item in form.get("body", []) if item.get("type") != "markdown"]
    for name, values in (
        ("id", [item.get("id") for item in asked]),
        ("label", [item.get("attributes", {}).get("label") for item in asked]),
    ):
        found += [
            f"{name} {value!r} is there twice" for value in sorted({str(v) for v in values if values.count(v) > 1})
        ]
    return found if asked else [*found, "nothing is asked"]


@pytest.mark.parametrize("name", FORMS)
def test_a_form_is_one(name: str) -> None:
    assert not faults(FORMS[name])


def test_every_kind_of_issue_has_its_form_and_its_name() -> None:
    assert set(FORMS) == {"bug", "dataset", "metric", "model"}
    assert len({form["name"] for form in FORMS.values()}) == len(FORMS)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda form: form.pop("name"),
        lambda form: form.update(labels="bug"),
        lambda form: form.update(body=[]),
        lambda form: form["body"][1].update(type="text"),
        lambda form: form["body"][1].pop("id"),
        lambda form: form["body"][1].update(id="with space"),
        lambda form: form["body"][1]["attributes"].pop("label"),
        lambda form: form["body"][1].update(validations={"mandatory": True}),
        lambda form: form["body"][1].update(required=True),
        lambda form: form["body"][2].update(id=form["body"][1]["id"]),
        lambda form: form["body"][2]["attributes"].update(label=form["body"][1]["attributes"]["label"]),
    ],
)
def test_what_is_no_form_is_found(spoil) -> None:
    form = copy.deepcopy(FORMS["bug"])
    spoil(form)
    assert faults(form)


def options(form: str, field: str) -> list[str]:
    """Return what a dropdown offers."""
    return next(item for item in FORMS[form]["body"] if item.get("id") == field)["attributes"]["options"]


@pytest.mark.parametrize("key", ["perturbation_type", "organism"])
def test_a_dataset_is_what_the_schema_knows(key: str) -> None:
    schema = yaml.safe_load((REPOSITORY / "config" / "schemas" / "datasets.schema.yaml").read_text())
    assert options("dataset", key) == schema["additionalProperties"]["properties"][key]["enum"]


def test_a_metric_needs_what_metrics_need() -> None:
    named = {option.partition("(")[2].removesuffix(")") or option for option in options("metric", "needs")}
    assert named == NEEDS


def test_files_that_forms_and_checklist_name_exist() -> None:
    texts = [path.read_text() for path in (REPOSITORY / ".github").rglob("*") if path.is_file()]
    words = {word.strip("(),.:;`\"'") for text in texts for word in text.split()}
    named = {word for word in words if word.endswith((".md", ".txt")) and "(" not in word and "]" not in word}
    made = set(re.findall(r"\| tee (\S+)", "\n".join(texts)))
    assert named > made
    assert not [name for name in named - made if not (REPOSITORY / Path(name)).exists()]
