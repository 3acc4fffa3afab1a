"""The configuration: checked, completed with defaults, and turned into the plan of runs.

This is imported by the Snakefile: standard library, PyYAML, pandas and jsonschema only.
"""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pandas as pd
import yaml
from jsonschema import Draft202012Validator
from jsonschema.exceptions import ValidationError
from jsonschema.validators import extend
from referencing import Registry as SchemaRegistry
from referencing import Resource
from referencing.jsonschema import DRAFT202012

from perturbflow.errors import InputError
from perturbflow.lineage import PACKAGE, SCRIPTS, code_digest, digest, file_fingerprint

SCHEMAS = SCRIPTS.parent / "config" / "schemas"
REGISTRIES = ("datasets", "splits", "models", "counterfactuals")


@dataclass(frozen=True)
class Family:
    """Where a model family lives and what its training leaves behind."""

    implementation: str  # "module:Class" below perturbflow.models
    rule: str  # which rule trains it
    kind: str  # baseline, ablation (a model robbed of what it should need), ceiling (made of measured cells) or learned
    answers_counterfactuals: bool = False

    @property
    def artefact(self) -> str:
        """Return the file name of a trained model: arrays of a closed form, or a checkpoint."""
        return "model.npz" if self.rule == "train_closed_form" else "model.ckpt"

    @property
    def source(self) -> Path:
        """Return the file of the family's class."""
        return PACKAGE / "models" / f"{self.implementation.split(':')[0]}.py"


FAMILIES = {
    "no_change": Family("baselines:NoChange", "train_closed_form", "baseline", answers_counterfactuals=True),
    "perturbed_mean": Family("baselines:PerturbedMean", "train_closed_form", "baseline", answers_counterfactuals=True),
    "additive": Family("baselines:Additive", "train_closed_form", "baseline", answers_counterfactuals=True),
    "linear": Family("baselines:Linear", "train_closed_form", "baseline", answers_counterfactuals=True),
    "technical_duplicate": Family("ceilings:TechnicalDuplicate", "train_closed_form", "ceiling"),
    "diffusion": Family("diffusion:Diffusion", "train_diffusion", "learned", answers_counterfactuals=True),
    "jepa": Family("jepa:Jepa", "train_jepa", "learned", answers_counterfactuals=True),
    "counterfactual": Family("counterfactual:Counterfactual", "train_counterfactual", "learned", answers_counterfactuals=True),
}


# --- checking -------------------------------------------------------------------------------------------------------


# JSON schema takes 1.0 for an integer; it would end up in a path and in a random generator.
_Validator = extend(
    Draft202012Validator,
    type_checker=Draft202012Validator.TYPE_CHECKER.redefine(
        "integer", lambda _, value: isinstance(value, int) and not isinstance(value, bool)
    ),
)


def _schema(name: str) -> dict:
    return yaml.safe_load((SCHEMAS / f"{name}.schema.yaml").read_text())


def _retrieve(uri: str) -> Resource:
    return DRAFT202012.create_resource(yaml.safe_load((SCHEMAS / Path(uri).name).read_text()))


def _with_defaults(schema: dict, value: object) -> object:
    """Return the value completed with the schema's defaults; a $ref fills nothing."""
    if not isinstance(value, dict):
        return value
    filled = dict(value)
    for key, subschema in schema.get("properties", {}).items():
        if key not in filled and "default" in subschema:
            filled[key] = subschema["default"]
        if key in filled:
            filled[key] = _with_defaults(subschema, filled[key])
    extra = schema.get("additionalProperties")
    if isinstance(extra, dict):
        filled = {key: _with_defaults(extra, item) if key not in schema.get("properties", {}) else item
                  for key, item in filled.items()}  # fmt: skip
    return filled


def _suggestion(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    hint = f" Did you mean '{close[0]}'?" if close else ""
    return f"{hint} Known: {', '.join(sorted(known)) or '(none)'}."


def _explain(error: ValidationError, path: list[str]) -> str:
    """Return one sentence for a schema violation, in the user's words, with the fix."""
    place = ".".join(path) or "the top level"
    if error.validator == "additionalProperties" and isinstance(error.instance, dict):
        known = list(error.schema.get("properties", {}))
        unknown = [key for key in error.instance if key not in known]
        return " ".join(f"{place}: unknown key '{key}'.{_suggestion(str(key), known)}" for key in unknown)
    if error.validator == "propertyNames" or "propertyNames" in error.absolute_schema_path:
        return f"{place}: '{error.instance}' cannot be a name; use lower-case letters, digits and _."
    if error.validator == "required":
        missing = [key for key in error.validator_value if key not in error.instance]
        return f"{place}: {', '.join(repr(key) for key in missing)} is missing."
    if error.validator == "enum":
        return f"{place}: {error.instance!r} is not possible.{_suggestion(str(error.instance), list(map(str, error.validator_value)))}"
    if error.validator == "type":
        return f"{place}: {error.instance!r} must be of type {error.validator_value}."
    if error.validator == "oneOf":
        described = [branch.get("enum") or branch.get("const") or branch.get("properties") for branch in error.validator_value]
        return f"{place}: {error.instance!r} is not possible. Possible: {described}."
    return f"{place}: {error.message}."


def _holding_file(files: Sequence[Path], path: list[str]) -> str:
    """Return the name of the last configuration file that holds a key path, for the error message."""
    for file in reversed(files):
        node = yaml.safe_load(Path(file).read_text()) or {}
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


def _check(value: object, schema: dict, where: list[str], files: Sequence[Path]) -> None:
    resources = SchemaRegistry(retrieve=_retrieve).with_resource("", DRAFT202012.create_resource(schema))
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
        lines.append(_holding_file(files, inner) + _explain(error, path))
    raise InputError("\n".join(lines))


def _check_names(selected: list[str], known: dict, kind: str, where: list[str], files: Sequence[Path]) -> None:
    for name in selected:
        if name not in known:
            raise InputError(
                f"{_holding_file(files, where)}{kind[:-1]} '{name}' is selected ({'.'.join(where)}) but there is no such block in "
                f"{kind}.yaml or your config file.{_suggestion(name, list(known))}"
            )


def _check_dataset(name: str, block: dict, files: Sequence[Path]) -> None:
    source = block["source"]
    kinds = [key for key in ("path", "url", "pypi") if key in source]
    file = _holding_file(files, ["datasets", name, "source", *kinds[:1]])
    if len(kinds) != 1:
        raise InputError(f"{file}datasets.{name}.source: give exactly one of path, url, pypi (found: {', '.join(kinds) or 'none'}).")
    if kinds[0] == "path":
        path = Path(source["path"])
        if not path.is_file():
            raise InputError(
                f"{file}datasets.{name}.source.path: there is no file '{path}' (looked for {path.absolute()}). "
                "Relative paths start at the working directory."
            )
        return
    needed = "bytes and one of md5, sha256" if kinds[0] == "url" else "sha256"
    has_sum = "sha256" in block or (kinds[0] == "url" and "md5" in block)
    if not has_sum or (kinds[0] == "url" and "bytes" not in block):
        raise InputError(f"{file}datasets.{name}: a source by {kinds[0]} needs {needed}: without them a broken download passes for data.")


def complete(config: dict, files: Sequence[Path] = ()) -> dict:
    """Return the configuration checked and completed with defaults.

    Parameters
    ----------
    config
        The merged configuration.
    files
        The files it was merged from, in order: error messages name the one that holds the mistake.

    Raises
    ------
    InputError
        With one line per mistake: file, key, value and what is possible.
    """
    schema = _schema("config")
    _check(config, schema, [], files)
    config = _with_defaults(schema, config)
    for name in REGISTRIES:
        registry = config.get(name, {})
        schema = _schema(name)
        _check(registry, schema, [name], files)
        config[name] = _with_defaults(schema, registry)
    params = _schema("models")["$defs"]
    for name, block in config["models"].items():
        schema = params[block["family"]]
        _check(block["params"], schema, ["models", name, "params"], files)
        block["params"] = _with_defaults(schema, block["params"])
    for kind in REGISTRIES:
        _check_names(config["select"][kind], config[kind], kind, ["select", kind], files)
    for name in config["select"]["counterfactuals"]:
        query = config["counterfactuals"][name]
        for kind in ("dataset", "split", "model"):
            _check_names([query[kind]], config[f"{kind}s"], f"{kind}s", ["counterfactuals", name, kind], files)
        family = config["models"][query["model"]]["family"]
        if not FAMILIES[family].answers_counterfactuals:
            file = _holding_file(files, ["counterfactuals", name, "model"])
            raise InputError(f"{file}counterfactuals.{name}.model: '{query['model']}' (family {family}) answers no what-if questions.")
    queries = [config["counterfactuals"][name] for name in config["select"]["counterfactuals"]]
    for name in dict.fromkeys([*config["select"]["datasets"], *[query["dataset"] for query in queries]]):
        _check_dataset(name, config["datasets"][name], files)
    for name in dict.fromkeys([*config["select"]["splits"], *[query["split"] for query in queries]]):
        path = config["splits"][name].get("path")
        if path is not None and not Path(path).is_file():
            file = _holding_file(files, ["splits", name, "path"])
            raise InputError(f"{file}splits.{name}.path: there is no file '{path}' (looked for {Path(path).absolute()}).")
    for source in config["embeddings"]["sources"]:
        if isinstance(source, dict) and not Path(source["file"]).is_file():
            file = _holding_file(files, ["embeddings", "sources"])
            raise InputError(
                f"{file}embeddings.sources: there is no file '{source['file']}' (looked for {Path(source['file']).absolute()})."
            )
        if source in ("go", "ppi"):
            raise InputError(
                f"{_holding_file(files, ['embeddings', 'sources'])}embeddings.sources: '{source}' cannot be fetched by this version; bring the table as {{file: table.tsv}}."
            )
    return config


# --- planning -------------------------------------------------------------------------------------------------------


class Plan:
    """Everything that will be run, and what each result is made of.

    Parameters
    ----------
    config
        The merged configuration, as Snakemake hands it over.
    files
        The configuration files, for messages.

    Attributes
    ----------
    config
        The completed configuration.
    runs
        One row per dataset × split × model × seed, with the model's family.
    queries
        One row per counterfactual query × seed.
    left_out
        One sentence per selection that cannot be.
    lineage
        (step, dataset, split, model, seed, query) → digest of what that step's result is made of.
    """

    def __init__(self, config: dict, files: Sequence[Path] = ()) -> None:
        self.config = complete(config, files)
        self.left_out: list[str] = []
        self.lineage = cache(self._lineage)
        select = self.config["select"]
        rows = []
        for dataset in select["datasets"]:
            for split in select["splits"]:
                if reason := self._why_impossible(dataset, split):
                    self.left_out.append(f"{dataset} × {split} is left out: {reason}.")
                else:
                    rows += [
                        (dataset, split, model, seed, self.config["models"][model]["family"])
                        for model in select["models"]
                        for seed in select["seeds"]
                    ]
        if not rows:
            raise InputError("Nothing is left to run. " + " ".join(self.left_out))
        self.runs = pd.DataFrame(rows, columns=["dataset", "split", "model", "seed", "family"])
        queries = []
        for name in select["counterfactuals"]:
            query = self.config["counterfactuals"][name]
            if reason := self._why_impossible(query["dataset"], query["split"]):
                self.left_out.append(f"counterfactual {name} is left out: {reason}.")
            else:
                queries += [(query["dataset"], query["split"], query["model"], seed, name) for seed in select["seeds"]]
        self.queries = pd.DataFrame(queries, columns=["dataset", "split", "model", "seed", "query"])

    def _why_impossible(self, dataset: str, split: str) -> str | None:
        """Return why a screen cannot serve a split, or None."""
        is_combination = self.config["splits"][split]["kind"] == "unseen_combination"
        if is_combination and self.config["datasets"][dataset].get("combinations") is False:
            return f"{dataset} holds no combinations (combinations: false)"
        return None

    def models_of_rule(self, rule: str) -> list[str]:
        """Return the names of the models that a training rule trains."""
        return [name for name, block in self.config["models"].items() if FAMILIES[block["family"]].rule == rule]

    def family(self, model: str) -> Family:
        """Return the family of a model."""
        return FAMILIES[self.config["models"][model]["family"]]

    @property
    def families(self) -> dict[str, str]:
        """Return model → family of all runs, in their order."""
        return dict(zip(self.runs["model"], self.runs["family"], strict=True))

    def dataset(self, name: str) -> dict:
        """Return what harmonization reads of a dataset's block: a change of the rest makes nothing stale."""
        unread = ("reference", "licence", "qc", "combinations", "bytes", "md5", "sha256")
        return {key: value for key, value in self.config["datasets"][name].items() if key not in unread}

    def qc(self, dataset: str) -> dict:
        """Return the limits of quality control of a dataset: the global ones, overridden by its own."""
        return {**self.config["qc"], **self.config["datasets"][dataset].get("qc", {})}

    def _lineage(self, step: str, dataset: str = "", split: str = "", model: str = "", seed: str = "", query: str = "") -> str:
        """Return the digest of what a step's result is made of: its code, its configuration, its sources.

        A step's configuration is the slice that it reads and no more, so that changing one model's params
        makes that model's results stale and nothing else.
        """
        config = self.config
        here = {"dataset": dataset, "split": split, "model": model, "seed": seed}
        own: object = None
        sources: list[str] = []
        code = [SCRIPTS / f"{step}.py"]
        if step == "download":
            block = config["datasets"][dataset]
            own = {key: block.get(key) for key in ("source", "bytes", "md5", "sha256")}
        elif step == "harmonize":
            own = [self.dataset(dataset), self.qc(dataset)]
            path = config["datasets"][dataset]["source"].get("path")
            sources = [file_fingerprint(path) if path else self.lineage("download", dataset)]
        elif step == "split":
            block = config["splits"][split]
            own = [block, file_fingerprint(block["path"]) if "path" in block else None]
            sources = [self.lineage("harmonize", dataset)]
        elif step == "pair":
            own = config["genes"]
            sources = [self.lineage("split", dataset, split)]
        elif step == "embeddings":
            tables = [file_fingerprint(table["file"]) for table in config["embeddings"]["sources"] if isinstance(table, dict)]
            own = [config["embeddings"], tables]
            sources = [self.lineage("pair", dataset, split)]
        elif step == "audit":
            sources = [self.lineage("embeddings", dataset, split)]
        elif step == "train":
            is_learned = self.family(model).rule != "train_closed_form"
            own = [config["models"][model], seed, config["device"] if is_learned else None]
            sources = [self.lineage("audit", dataset, split)]
            code.append(self.family(model).source)
        elif step == "predict":
            own = config["predict"]
            sources = [self.lineage("train", **here)]
            code.append(self.family(model).source)
        elif step == "evaluate":
            sources = [self.lineage("predict", **here)]
        elif step == "counterfactual":
            own = config["counterfactuals"][query]
            sources = [self.lineage("train", **here)]
            code.append(self.family(model).source)
        elif step == "benchmark":
            own = self.families
            sources = [self.lineage("evaluate", *run) for run in self._run_keys()]
        elif step == "report":
            sources = [self.lineage("benchmark")]
            sources += [self.lineage("counterfactual", *map(str, row)) for row in self.queries.itertuples(index=False)]
        else:
            raise ValueError(f"no such step: {step}")
        return digest(step, own, sources, code_digest(*code))

    def _run_keys(self) -> list[tuple[str, ...]]:
        return [tuple(map(str, row)) for row in self.runs[["dataset", "split", "model", "seed"]].itertuples(index=False)]
