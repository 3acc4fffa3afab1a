"""The configuration: checked, completed with defaults, and turned into the plan of runs.

This is imported by the Snakefile: standard library, PyYAML, pandas and jsonschema only.
"""

import difflib
import re
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
from perturbflow.origins import CONTENT_KEYS, content_of, files_of, problem_of, resolved

SCHEMAS = SCRIPTS.parent / "config" / "schemas"
REGISTRIES = ("datasets", "splits", "models", "counterfactuals")
# Names in a message; of more, the nearest ones.
LISTED = 20
COEXPRESSION = "coexpression"  # the source of embeddings that needs no files
# Keys of a split's block that only some kinds have a use for.
SPLIT_KEYS = {
    "covariate": ("unseen_context",),
    "held_out": ("unseen_context",),
    "folds": ("unseen_perturbation", "unseen_combination"),
}


@dataclass(frozen=True)
class Family:
    """Where a model family lives and what its training leaves behind."""

    implementation: str  # "module:Class" below perturbflow.models
    kind: str  # baseline, ablation, ceiling or learned
    rule: str = "train_closed_form"  # which rule trains it
    answers_counterfactuals: bool = False
    split_kinds: tuple[str, ...] = ()  # the only ones that the family can serve; empty: all

    @property
    def artefact(self) -> str:
        """Return the file name of a trained model: arrays of a closed form, or a checkpoint."""
        return "model.npz" if self.rule == "train_closed_form" else "model.ckpt"

    @property
    def source(self) -> Path:
        """Return the file of the family's class."""
        return PACKAGE / "models" / f"{self.implementation.split(':')[0]}.py"


def _baseline(implementation: str) -> Family:
    return Family(implementation, "baseline", answers_counterfactuals=True)


FAMILIES = {
    "no_change": _baseline("baselines:NoChange"),
    "perturbed_mean": _baseline("baselines:PerturbedMean"),
    "matching_mean": _baseline("baselines:MatchingMean"),
    "additive": _baseline("baselines:Additive"),
    "shrunken_additive": _baseline("baselines:ShrunkenAdditive"),
    "latent_additive": _baseline("baselines:LatentAdditive"),
    "linear": _baseline("baselines:Linear"),
    "transfer": Family("baselines:Transfer", "baseline", answers_counterfactuals=True, split_kinds=("unseen_context",)),
    "ridge": _baseline("regressions:Ridge"),
    "random_forest": _baseline("regressions:RandomForest"),
    "nearest_perturbation": _baseline("regressions:NearestPerturbation"),
    "covariance_response": _baseline("regressions:CovarianceResponse"),
    "stacked": _baseline("stacked:Stacked"),
    "shuffled_labels": Family("ablations:ShuffledLabels", "ablation"),
    "batch_only": Family("ablations:BatchOnly", "ablation"),
    "technical_duplicate": Family("ceilings:TechnicalDuplicate", "ceiling"),
    "interpolated_duplicate": Family("ceilings:InterpolatedDuplicate", "ceiling"),
    "diffusion": Family("diffusion:Diffusion", "learned", "train_diffusion", answers_counterfactuals=True),
    "jepa": Family("jepa:Jepa", "learned", "train_jepa", answers_counterfactuals=True),
    "counterfactual": Family("counterfactual:Counterfactual", "learned", "train_counterfactual", answers_counterfactuals=True),
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
    listed = known if len(known) <= LISTED else difflib.get_close_matches(word, known, n=LISTED, cutoff=0.0)
    more = f", {len(known) - len(listed)} more" if len(known) > len(listed) else ""
    return f"{hint} Known: {', '.join(sorted(listed)) or '(none)'}{more}."


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
        try:
            node = yaml.safe_load(Path(file).read_text(encoding="utf-8")) or {}
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


def _check_source(where: list[str], block: dict, files: Sequence[Path]) -> None:
    """Check what a block says of where its files come from."""
    if problem := problem_of(block):
        keys, sentence = problem
        file = _holding_file(files, [*where, *keys]) or _holding_file(files, [*where, "source"])
        raise InputError(f"{file}{'.'.join([*where, *keys])}: {sentence}")


def _check_patterns(name: str, block: dict, files: Sequence[Path]) -> None:
    """Check that the regular expressions of a block can be read, and that the one of labels has a group."""
    patterns = {("exclude", column): pattern for column, pattern in block.get("exclude", {}).items()}
    patterns |= {("perturbation", "pattern"): block["perturbation"].get("pattern"), ("gene_pattern",): block.get("gene_pattern")}
    for keys, pattern in patterns.items():
        problem = None
        try:
            if pattern is not None and re.compile(pattern).groups == 0 and keys[0] == "perturbation":
                problem = "it needs a group, (...), that holds the perturbed gene"
        except re.error as error:
            problem = f"{error} at position {error.pos}"
        if problem:
            where = ["datasets", name, *keys]
            raise InputError(
                f"{_holding_file(files, where)}{'.'.join(where)}: '{pattern}' cannot serve as a regular expression: {problem}."
            )


def own_files(block: dict) -> dict[str, str]:
    """Return role → path of the user's own files; none where they are downloaded."""
    path = block["source"].get("path", {})
    return path if isinstance(path, dict) else {"file": path}


def _check_path(where: list[str], block: dict, files: Sequence[Path]) -> None:
    """Check that the user's own files are there; only what is selected has to be."""
    for path in own_files(block).values():
        if not Path(path).is_file():
            file = _holding_file(files, [*where, "source", "path"])
            raise InputError(
                f"{file}{'.'.join(where)}.source.path: there is no file '{path}' (looked for {Path(path).absolute()}). "
                "Relative paths start at the working directory."
            )


def _check_priors(config: dict, files: Sequence[Path]) -> None:
    """Check the names of priors, which share folders with datasets and columns with other sources of embeddings."""
    for name, block in config["priors"].items():
        _check_source(["priors", name], block, files)
        file = _holding_file(files, ["priors", name])
        if name == COEXPRESSION:
            raise InputError(f"{file}priors.{name}: this is what training cells tell, in embeddings.sources; give the prior another name.")
        if name in config["datasets"]:
            file = _holding_file(files, ["datasets", name])
            raise InputError(
                f"{file}datasets.{name}: there is a prior of this name, and both would keep their files in resources/{name}; "
                "give the dataset another name."
            )


def _check_embeddings(config: dict, datasets: Sequence[str], files: Sequence[Path]) -> None:
    """Check where the vectors of genes are to come from, and that they are of the genes of these datasets."""
    where = ["embeddings", "sources"]
    file = _holding_file(files, where)
    for source in config["embeddings"]["sources"]:
        if isinstance(source, dict):
            if not Path(source["file"]).is_file():
                raise InputError(
                    f"{file}embeddings.sources: there is no file '{source['file']}' (looked for {Path(source['file']).absolute()})."
                )
        elif source != COEXPRESSION:
            if source not in config["priors"]:
                raise InputError(
                    f"{file}embeddings.sources: {source!r} is not possible.{_suggestion(source, [COEXPRESSION, *config['priors']])}"
                )
            prior = config["priors"][source]
            _check_path(["priors", source], prior, files)
            if others := [name for name in datasets if config["datasets"][name]["organism"] != prior["organism"]]:
                raise InputError(
                    f"{file}embeddings.sources: '{source}' knows {prior['organism']} genes, and {', '.join(others)} is of another organism; "
                    "bring a prior or a table of its genes."
                )
    names = [_source_name(source) for source in config["embeddings"]["sources"]]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(f"{file}embeddings.sources: '{twice[0]}' is there twice; a table goes by the name of its file.")


def model_files(block: dict) -> list[str]:
    """Return the files that a model's params name."""
    latent = block["params"].get("latent")
    return [latent["file"]] if isinstance(latent, dict) else []


def _check_model_files(config: dict, models: Sequence[str], files: Sequence[Path]) -> None:
    """Check that the files are there that these models are made from."""
    for name in models:
        for path in model_files(config["models"][name]):
            if not Path(path).is_file():
                file = _holding_file(files, ["models", name, "params", "latent"])
                raise InputError(
                    f"{file}models.{name}.params.latent.file: there is no file '{path}' (looked for {Path(path).absolute()}). "
                    "Relative paths start at the working directory."
                )


def _source_name(source: str | dict) -> str:
    """Return what the columns of a source of embeddings are named after."""
    return source if isinstance(source, str) else Path(source["file"]).stem


def _check_split(name: str, block: dict, datasets: dict, files: Sequence[Path]) -> None:
    """Check what the schema cannot say in the user's words; the block is as the user wrote it."""
    for key, kinds in SPLIT_KEYS.items():
        if key in block and block["kind"] not in kinds:
            file = _holding_file(files, ["splits", name, key])
            raise InputError(f"{file}splits.{name}.{key}: kind {block['kind']} has no use for it; it belongs to {' and '.join(kinds)}.")
    if "folds" in block and "test_fraction" in block:
        file = _holding_file(files, ["splits", name, "folds"])
        raise InputError(f"{file}splits.{name}: folds say what is held out in turn, so test_fraction has no meaning; remove one of them.")
    for dataset in block.get("held_out", {}):
        if dataset not in datasets:
            file = _holding_file(files, ["splits", name, "held_out"])
            raise InputError(f"{file}splits.{name}.held_out: there is no dataset '{dataset}'.{_suggestion(str(dataset), list(datasets))}")


def _expand_folds(splits: dict, files: Sequence[Path]) -> tuple[dict, dict[str, list[str]]]:
    """Return the splits with k blocks {name}_fold_{i} in place of each block of k folds, and these names by the block's."""
    expanded, folds = {}, {}
    for name, block in splits.items():
        blocks = {name: block}
        if "folds" in block:
            blocks = {f"{name}_fold_{i}": {**block, "fold": i, "name": name} for i in range(block["folds"])}
            folds[name] = list(blocks)
            if taken := [fold for fold in blocks if fold in splits]:
                file = _holding_file(files, ["splits", taken[0]])
                raise InputError(f"{file}splits.{taken[0]}: this is a fold of splits.{name}; give the block another name.")
        expanded |= blocks
    return expanded, folds


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
        if name == "splits":
            for split, block in registry.items():
                _check_split(split, block, config["datasets"], files)
    for name, block in config["datasets"].items():
        _check_source(["datasets", name], block, files)
        _check_patterns(name, block, files)
    config["datasets"] = {name: resolved(block) for name, block in config["datasets"].items()}
    _check_priors(config, files)
    config["splits"] = {
        name: {key: value for key, value in block.items() if block["kind"] in SPLIT_KEYS.get(key, (block["kind"],))}
        for name, block in config["splits"].items()
    }
    config["splits"], folds = _expand_folds(config["splits"], files)
    config["select"]["splits"] = list(dict.fromkeys(fold for name in config["select"]["splits"] for fold in folds.get(name, [name])))
    params = _schema("models")["$defs"]
    for name, block in config["models"].items():
        schema = params[block["family"]]
        _check(block["params"], schema, ["models", name, "params"], files)
        block["params"] = _with_defaults(schema, block["params"])
    for kind in REGISTRIES:
        _check_names(config["select"][kind], config[kind], kind, ["select", kind], files)
    for name in config["select"]["counterfactuals"]:
        query = config["counterfactuals"][name]
        if query["split"] in folds:
            file = _holding_file(files, ["counterfactuals", name, "split"])
            raise InputError(
                f"{file}counterfactuals.{name}.split: '{query['split']}' has folds, each with models of its own; name one of "
                f"{', '.join(folds[query['split']])}."
            )
        for kind in ("dataset", "split", "model"):
            _check_names([query[kind]], config[f"{kind}s"], f"{kind}s", ["counterfactuals", name, kind], files)
        family = config["models"][query["model"]]["family"]
        if not FAMILIES[family].answers_counterfactuals:
            file = _holding_file(files, ["counterfactuals", name, "model"])
            raise InputError(f"{file}counterfactuals.{name}.model: '{query['model']}' (family {family}) answers no what-if questions.")
    queries = [config["counterfactuals"][name] for name in config["select"]["counterfactuals"]]
    datasets = list(dict.fromkeys([*config["select"]["datasets"], *[query["dataset"] for query in queries]]))
    for name in datasets:
        _check_path(["datasets", name], config["datasets"][name], files)
    for name in dict.fromkeys([*config["select"]["splits"], *[query["split"] for query in queries]]):
        path = config["splits"][name].get("path")
        if path is not None and not Path(path).is_file():
            file = _holding_file(files, ["splits", name, "path"])
            raise InputError(f"{file}splits.{name}.path: there is no file '{path}' (looked for {Path(path).absolute()}).")
    _check_embeddings(config, datasets, files)
    _check_model_files(config, dict.fromkeys([*config["select"]["models"], *[query["model"] for query in queries]]), files)
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
    warranties
        One row per dataset × split × model × seed that is checked for what-if questions: those of learned families, and all that are asked.
    left_out
        One sentence per selection that cannot be.
    lineage
        (step, dataset, split, model, seed, query) → digest of what that step's result is made of.
    """

    def __init__(self, config: dict, files: Sequence[Path] = ()) -> None:
        self.config = complete(config, files)
        self.lineage = cache(self._lineage)
        select = self.config["select"]
        rows, left_out = [], []
        for dataset in select["datasets"]:
            for split in select["splits"]:
                if reason := self._why_impossible(dataset, split):
                    left_out.append(f"{dataset} × {self._base(split)} is left out: {reason}.")
                    continue
                for model in select["models"]:
                    if reason := self._why_unfit(model, split):
                        left_out.append(f"{model} × {self._base(split)} is left out: {reason}.")
                    else:
                        rows += [(dataset, split, model, seed, self.config["models"][model]["family"]) for seed in select["seeds"]]
        self.left_out = list(dict.fromkeys(left_out))
        if not rows:
            raise InputError("Nothing is left to run. " + " ".join(self.left_out))
        self.runs = pd.DataFrame(rows, columns=["dataset", "split", "model", "seed", "family"])
        queries = []
        for name in select["counterfactuals"]:
            query = self.config["counterfactuals"][name]
            if reason := self._why_impossible(query["dataset"], query["split"]) or self._why_unfit(query["model"], query["split"]):
                self.left_out.append(f"counterfactual {name} is left out: {reason}.")
            else:
                queries += [(query["dataset"], query["split"], query["model"], seed, name) for seed in select["seeds"]]
        self.queries = pd.DataFrame(queries, columns=["dataset", "split", "model", "seed", "query"])
        key = ["dataset", "split", "model", "seed"]
        is_learned = self.runs["model"].map(lambda name: self.family(name).kind == "learned").astype(bool)
        self.warranties = pd.concat([self.runs.loc[is_learned, key], self.queries[key]]).drop_duplicates(ignore_index=True)

    def _why_impossible(self, dataset: str, split: str) -> str | None:
        """Return why a screen cannot serve a split, or None."""
        block, screen = self.config["splits"][split], self.config["datasets"][dataset]
        if block["kind"] == "unseen_combination" and screen.get("combinations") is False:
            return f"{dataset} holds no combinations (combinations: false)"
        # Batches of a merged file differ at least by the screen that they belong to.
        declared = {*screen["covariates"], *(["batch"] if "dataset" in screen["covariates"] else [])}
        if block["kind"] == "unseen_context" and block["covariate"] not in declared:
            return f"{dataset} declares no covariates.{block['covariate']}, so all its cells are of one context"
        return None

    def _why_unfit(self, model: str, split: str) -> str | None:
        """Return why a model cannot serve a split, or None."""
        kind, kinds = self.config["splits"][split]["kind"], self.family(model).split_kinds
        return f"family {self.config['models'][model]['family']} serves {', '.join(kinds)} only" if kinds and kind not in kinds else None

    def _base(self, split: str) -> str:
        """Return the name that a split was selected by: folds share one."""
        return self.config["splits"][split].get("name", split)

    def folders(self) -> list[str]:
        """Return the folders that downloads and results of all runs are written to."""
        runs = [run for table in (self.runs, self.queries) for run in table.itertuples()]
        retrieved = dict.fromkeys([*[run.dataset for run in runs], *self.priors])
        results = dict.fromkeys(f"results/{run.dataset}/{run.split}/{run.model}/seed_{run.seed}" for run in runs)
        return [*[f"resources/{name}" for name in retrieved], *results]

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
        unread = ("reference", "licence", "qc", "combinations", *CONTENT_KEYS)
        block = {key: value for key, value in self.config["datasets"][name].items() if key not in unread}
        # Where a download came from is in its manifest; a mirror more makes nothing stale.
        block["source"] = {key: value for key, value in block["source"].items() if key in ("path", "member")}
        return block

    def files(self, name: str) -> dict[str, dict]:
        """Return role → file that the download of a dataset or prior retrieves: name, mirrors, and what it must be."""
        return files_of(self._retrieved(name))

    def _retrieved(self, name: str) -> dict:
        """Return the block of a dataset or prior; none share a name."""
        return self.config["datasets"].get(name) or self.config["priors"][name]

    @property
    def priors(self) -> list[str]:
        """Names of the priors among the sources of embeddings, in their order."""
        return [source for source in self.config["embeddings"]["sources"] if isinstance(source, str) and source != COEXPRESSION]

    @property
    def embedding_tables(self) -> list[str]:
        """The user's own tables among the sources of embeddings, in their order."""
        return [source["file"] for source in self.config["embeddings"]["sources"] if isinstance(source, dict)]

    def split(self, name: str, dataset: str) -> dict:
        """Return a split's block as one screen's division reads it: held_out is the list of this screen, if it has one."""
        block = dict(self.config["splits"][name])
        if held_out := block.pop("held_out", {}).get(dataset):
            block["held_out"] = held_out
        return block

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
            own = content_of(self._retrieved(dataset))
        elif step == "prior":
            block = config["priors"][dataset]
            own = [block["kind"], block["organism"], list(own_files(block))]
            sources = [file_fingerprint(path) for path in own_files(block).values()] or [self.lineage("download", dataset)]
        elif step == "harmonize":
            own = [self.dataset(dataset), self.qc(dataset)]
            path = config["datasets"][dataset]["source"].get("path")
            sources = [file_fingerprint(path) if path else self.lineage("download", dataset)]
        elif step == "split":
            block = self.split(split, dataset)
            own = [block, file_fingerprint(block["path"]) if "path" in block else None]
            sources = [self.lineage("harmonize", dataset)]
        elif step == "pair":
            own = config["genes"]
            sources = [self.lineage("split", dataset, split)]
        elif step == "embeddings":
            own = [config["embeddings"], [file_fingerprint(path) for path in self.embedding_tables]]
            sources = [self.lineage("pair", dataset, split), *[self.lineage("prior", name) for name in self.priors]]
        elif step == "audit":
            sources = [self.lineage("embeddings", dataset, split)]
        elif step == "train":
            is_learned = self.family(model).rule != "train_closed_form"
            own = [config["models"][model], seed, config["device"] if is_learned else None]
            sources = [self.lineage("audit", dataset, split), *map(file_fingerprint, model_files(config["models"][model]))]
            code.append(self.family(model).source)
        elif step == "predict":
            own = config["predict"]
            sources = [self.lineage("train", **here)]
            code.append(self.family(model).source)
        elif step == "evaluate":
            sources = [self.lineage("predict", **here)]
        elif step == "warranty":
            sources = [self.lineage("train", **here)]
            code.append(self.family(model).source)
        elif step == "counterfactual":
            own = config["counterfactuals"][query]
            sources = [self.lineage("warranty", dataset, split, model, seed)]
            code.append(self.family(model).source)
        elif step == "draw":
            sources = [self.lineage("counterfactual", **here, query=query)]
        elif step == "benchmark":
            own = self.families
            sources = [self.lineage("evaluate", *run) for run in self._run_keys()]
        elif step == "report":
            sources = [self.lineage("benchmark")]
            sources += [self.lineage("draw", *map(str, row)) for row in self.queries.itertuples(index=False)]
            sources += [self.lineage("warranty", *map(str, row)) for row in self.warranties.itertuples(index=False)]
        else:
            raise ValueError(f"no such step: {step}")
        return digest(step, own, sources, code_digest(*code))

    def _run_keys(self) -> list[tuple[str, ...]]:
        return [tuple(map(str, row)) for row in self.runs[["dataset", "split", "model", "seed"]].itertuples(index=False)]
