"""The configuration: checked, also beyond the schemas, and completed with defaults."""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from perturbflow.errors import InputError
from perturbflow.registry.contexts import CONTEXT_KINDS, EACH, known_contexts, split_of
from perturbflow.registry.effort import EFFORTS, scaled
from perturbflow.registry.families import FAMILIES, REFERENCES, PredictionsParams
from perturbflow.registry.places import own_or_shipped
from perturbflow.registry.schemas import (
    Places,
    check_schema,
    holding_file,
    schema_of,
    suggestion,
    with_defaults,
    with_texts,
    with_values,
)
from perturbflow.registry.sources import labels_file, own_files, problem_of, problem_of_folder, resolved
from perturbflow.registry.sweeps import completed_sweep
from perturbflow.registry.unions import check_keys, completed, is_union
from perturbflow.registry.wrappers import problem_of_files

REGISTRIES = ("datasets", "splits", "models", "counterfactuals")
COEXPRESSION = "coexpression"  # the source of embeddings that needs no files
OF_A_RUN = ("dataset", "split", "model", "seed")  # wildcards that the path of a file of predictions may have
MISSING_SHOWN = 3
# Keys of a split's block that only some kinds have a use for.
SPLIT_KEYS = {
    "covariate": CONTEXT_KINDS,
    "held_out": (*CONTEXT_KINDS, "unseen_perturbation", "unseen_combination", "unseen_dose"),
    "folds": ("unseen_perturbation", "unseen_combination", "unseen_dose", "unseen_context"),
    "support_fraction": ("unseen_context",),
    "support": ("unseen_context",),
}


def _check_names(selected: list[str], known: dict, kind: str, where: list[str], files: Places) -> None:
    # Folds are known by the name of their block.
    names = list(dict.fromkeys(block.get("name", name) if kind == "splits" else name for name, block in known.items()))
    for name in selected:
        if name not in known:
            raise InputError(
                f"{holding_file(files, where)}{kind[:-1]} '{name}' is selected ({'.'.join(where)}) but there is no "
                f"such block in {kind}.yaml or your config file.{suggestion(name, names)}"
            )


def _check_source(where: list[str], block: dict, files: Places) -> None:
    """Check where a block's files come from."""
    if problem := problem_of(block):
        keys, sentence = problem
        file = holding_file(files, [*where, *keys]) or holding_file(files, [*where, "source"])
        raise InputError(f"{file}{'.'.join([*where, *keys])}: {sentence}")


def _check_patterns(name: str, block: dict, files: Places) -> None:
    """Check that the regular expressions of a block can be read, and that the one that finds members has a group."""
    patterns: dict[tuple[str, ...], str | None] = {
        ("exclude", column): pattern for column, pattern in block.get("exclude", {}).items()
    }
    patterns |= {("perturbation", key): block["perturbation"].get(key) for key in ("pattern", "control_pattern")}
    patterns[("gene_pattern",)] = block.get("gene_pattern")
    for keys, pattern in patterns.items():
        problem = None
        try:
            compiled = re.compile(pattern or "")
            if pattern is not None and keys == ("perturbation", "pattern"):
                if compiled.groups == 0:
                    problem = "it needs a group, (...), that holds the perturbed gene"
                elif {"dose", "unit"} & set(compiled.groupindex) and "member" not in compiled.groupindex:
                    problem = "beside the group dose, (?P<dose>...), it needs the group member, (?P<member>...)"
        except re.error as error:
            problem = f"{error} at position {error.pos}"
        if problem:
            where = ["datasets", name, *keys]
            raise InputError(
                f"{holding_file(files, where)}{'.'.join(where)}: '{pattern}' cannot serve as a regular expression: "
                f"{problem}."
            )


def _check_path(where: list[str], block: dict, files: Places) -> None:
    """Check that the user's own files are there: those of a prior as files, those of a screen as a file or folder.

    It is called for selected blocks alone.
    """
    is_screen = where[0] == "datasets"
    paths = [(("source", "path"), path) for path in own_files(block).values()]
    if is_screen and (labels := labels_file(block)):
        paths.append((("source", "labels"), labels))
    for keys, path in paths:
        place = f"{holding_file(files, [*where, *keys])}{'.'.join([*where, *keys])}: "
        if is_screen and keys[-1] == "path" and Path(path).is_dir():
            if problem := problem_of_folder(Path(path)):
                raise InputError(f"{place}{problem}")
        elif Path(path).exists() and not Path(path).is_file():
            raise InputError(f"{place}'{path}' is a folder, and a file is expected.")
        elif not Path(path).is_file():
            raise InputError(
                f"{place}there is no file '{path}' (looked for {Path(path).absolute()}). Relative paths start at the "
                "working directory."
            )


def _check_priors(config: dict, files: Places) -> None:
    """Check the names of priors, which share folders with datasets and columns with other sources of embeddings."""
    for name, block in config["priors"].items():
        _check_source(["priors", name], block, files)
        if name == COEXPRESSION:
            file = holding_file(files, ["priors", name])
            raise InputError(
                f"{file}priors.{name}: embeddings.sources has this name for vectors of training cells; give the prior "
                "another name."
            )
        if name in config["datasets"]:
            file = holding_file(files, ["datasets", name])
            raise InputError(
                f"{file}datasets.{name}: there is a prior of this name, and both would keep their files in "
                f"resources/{name}; give the dataset another name."
            )


def _check_embeddings(config: dict, datasets: Sequence[str], files: Places) -> None:
    """Check that each source of gene vectors exists and covers the organism of these datasets."""
    where = ["embeddings", "sources"]
    file = holding_file(files, where)
    for source in config["embeddings"]["sources"]:
        if isinstance(source, str) and source != COEXPRESSION:
            if source not in config["priors"]:
                raise InputError(
                    f"{file}embeddings.sources: {source!r} is not "
                    f"possible.{suggestion(source, [COEXPRESSION, *config['priors']])}"
                )
            prior = config["priors"][source]
            if others := [name for name in datasets if config["datasets"][name]["organism"] != prior["organism"]]:
                raise InputError(
                    f"{file}embeddings.sources: '{source}' knows {prior['organism']} genes, and {', '.join(others)} is "
                    "of another organism; bring a prior or a table of its genes."
                )
    names = [_source_name(source) for source in config["embeddings"]["sources"]]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(
            f"{file}embeddings.sources: '{twice[0]}' is there twice; a table goes by the name of its file."
        )


def latent_files(block: dict) -> list[str]:
    """Return the files of a latent space that a model's params name."""
    latent = block["params"].get("latent")
    return [latent["file"]] if isinstance(latent, dict) else []


def predictions_file(block: dict, wildcards: Mapping[str, str]) -> str | None:
    """Return the file of predictions of one run, with its wildcards filled in; None where a model makes its own."""
    if FAMILIES[block["family"]].params is not PredictionsParams:
        return None
    template: str = block["params"]["file"]
    for name in OF_A_RUN:
        template = template.replace(f"{{{name}}}", str(wildcards[name]))
    return template


def _check_templates(models: dict, files: Places) -> None:
    """Check that files of predictions name nothing in braces but the wildcards of a run."""
    for name, block in models.items():
        for word in re.findall(r"{(.*?)}", block["params"].get("file", "")):
            if FAMILIES[block["family"]].params is PredictionsParams and word not in OF_A_RUN:
                file = holding_file(files, ["models", name, "params", "file"])
                raise InputError(
                    f"{file}models.{name}.params.file: '{{{word}}}' cannot be filled in. Possible: "
                    f"{', '.join(f'{{{one}}}' for one in OF_A_RUN)}."
                )


def check_predictions(config: dict, runs: Iterable[Mapping[str, str]], files: Places) -> None:
    """Check that the files of predictions of these runs exist; all that are missing are in one message."""
    missing, name = [], ""
    for run in runs:
        path = predictions_file(config["models"][run["model"]], run)
        if path is not None and not Path(path).is_file():
            missing.append(
                f"no file '{path}' for model {run['model']} on {run['dataset']} × {run['split']}, seed {run['seed']} "
                f"(looked for {Path(path).absolute()})"
            )
            name = run["model"]
    if missing:
        more = [f"{len(missing) - MISSING_SHOWN} more"] if len(missing) > MISSING_SHOWN else []
        raise InputError(
            f"{holding_file(files, ['models', name, 'params', 'file'])}models.{name}.params.file: there is "
            + "; ".join(missing[:MISSING_SHOWN] + more)
            + ". Put it there, or leave the model out of select.models. Relative paths start at the working directory."
        )


def _check_model_files(config: dict, models: Iterable[str], files: Places) -> None:
    """Check that the files exist that these models are made from."""
    for name in models:
        for path in latent_files(config["models"][name]):
            if not Path(path).is_file():
                file = holding_file(files, ["models", name, "params", "latent"])
                raise InputError(
                    f"{file}models.{name}.params.latent.file: there is no file '{path}' (looked for "
                    f"{Path(path).absolute()}). Relative paths start at the working directory."
                )
        block = config["models"][name]
        if FAMILIES[block["family"]].rule == "train_external" and (problem := problem_of_files(block["params"])):
            key, sentence = problem
            file = holding_file(files, ["models", name, "params", *key.split(".")])
            raise InputError(
                f"{file}models.{name}.params.{key}: {sentence}. Relative paths start at the working directory."
            )


def _source_name(source: str | dict) -> str:
    """Return the name that the columns of a source of embeddings start with."""
    return source if isinstance(source, str) else Path(source["file"]).stem


def held_out_of(held_out: list | dict, dataset: str) -> list | None:
    """Return the names that a split's block holds out of a dataset: its own list, or the one list for all datasets.

    None where the block holds out a share.
    """
    return held_out if isinstance(held_out, list) else held_out.get(dataset)


def datasets_named(held_out: list | dict) -> list[str]:
    """Return the datasets that `held_out` has a list for."""
    return [] if isinstance(held_out, list) else list(held_out)


def _check_split(name: str, block: dict, datasets: dict, files: Places) -> None:
    """Check, in the user's words, all that the schema cannot check; the block is as the user wrote it."""
    for key, kinds in SPLIT_KEYS.items():
        if key in block and block["kind"] not in kinds:
            file = holding_file(files, ["splits", name, key])
            raise InputError(
                f"{file}splits.{name}.{key}: kind {block['kind']} has no use for it; it belongs to "
                f"{' and '.join(kinds)}."
            )
    if "folds" in block and (others := [key for key in ("test_fraction", "held_out") if key in block]):
        file = holding_file(files, ["splits", name, "folds"])
        raise InputError(
            f"{file}splits.{name}: folds decide which names are held out, so {others[0]} has no meaning; remove one of "
            "them."
        )
    if "folds" in block and block["folds"] == EACH and block["kind"] != "unseen_context":
        file = holding_file(files, ["splits", name, "folds"])
        raise InputError(f"{file}splits.{name}.folds: 'each' is of contexts, for kind unseen_context; give a number.")
    if "support" in block and "support_fraction" in block:
        file = holding_file(files, ["splits", name, "support"])
        raise InputError(f"{file}splits.{name}.support: support names what trains, so support_fraction has no meaning.")
    if block["kind"] == "unseen_perturbation_in_context" and "test_fraction" not in block:
        file = holding_file(files, ["splits", name])
        raise InputError(
            f"{file}splits.{name}: 'test_fraction' is missing: the share of perturbations, each for one context."
        )
    named = [("held_out", dataset) for dataset in datasets_named(block.get("held_out", {}))]
    for key, dataset in [*named, *(("datasets", dataset) for dataset in block.get("datasets", []))]:
        if dataset not in datasets:
            file = holding_file(files, ["splits", name, key])
            raise InputError(
                f"{file}splits.{name}.{key}: there is no dataset '{dataset}'.{suggestion(str(dataset), list(datasets))}"
            )


def _folds_of(name: str, block: dict, datasets: Mapping[str, dict]) -> dict[str, dict]:
    """Return the splits that a block with folds stands for, by name."""
    if block["folds"] != EACH:
        return {f"{name}_fold_{i}": {**block, "fold": i, "name": name} for i in range(block["folds"])}
    rest = {key: value for key, value in block.items() if key != "folds"}
    held_out: dict[str, dict[str, list[str]]] = {}
    for dataset, of_dataset in datasets.items():
        for context in known_contexts(of_dataset, block["covariate"]):
            held_out.setdefault(split_of(name, context), {}).setdefault(dataset, []).append(context)
    return {fold: {**rest, "held_out": contexts, "name": name} for fold, contexts in held_out.items()}


def _expand_folds(
    splits: dict, datasets: Mapping[str, dict], selected: Sequence[str], files: Places
) -> tuple[dict, dict[str, list[str]]]:
    """Return the splits, and the names of their folds by block.

    A block of k folds becomes k blocks {name}_fold_{i}, one of each context a block {name}_{context} for every context
    that the selected datasets are known to have.
    """
    expanded: dict[str, dict] = {}
    folds: dict[str, list[str]] = {}
    for name, block in splits.items():
        blocks = {name: block}
        if "folds" in block:
            blocks = _folds_of(name, block, datasets)
            folds[name] = list(blocks)
            if taken := [fold for fold in blocks if fold in splits]:
                file = holding_file(files, ["splits", taken[0]])
                raise InputError(
                    f"{file}splits.{taken[0]}: this is a fold of splits.{name}; give the block another name."
                )
            if not blocks and name not in selected:
                blocks = {name: block}  # its contexts are not known, and nobody asks for them
            if not blocks:
                raise InputError(
                    f"{holding_file(files, ['splits', name])}splits.{name}: folds: each leaves every context out in "
                    f"turn, and no selected dataset says which it has. Name them in its block: contexts: "
                    f"{{{block['covariate']}: [...]}}."
                )
        expanded |= blocks
    return expanded, folds


def _first_split(splits: dict, dataset: str) -> str:
    """Return the split of a dataset where none is selected."""
    named = held_out_of(splits.get("unseen_context", {}).get("held_out", {}), dataset)
    return "unseen_context" if named else "unseen_perturbation"


def _with_references(models: dict, files: Places) -> dict:
    """Return the models with a block for each family that runs always and has none."""
    families = {block["family"] for block in models.values()}
    missing = [family for family in REFERENCES if family not in families]
    for name in missing:
        if name in models:
            raise InputError(
                f"{holding_file(files, ['models', name])}models.{name}: floors and ceilings always run, and this is "
                f"the name of one; leave it the family {name}, and give a model of family {models[name]['family']} "
                "another name."
            )
    return models | {family: {"family": family, "params": {}} for family in missing}


def _completed_registries(config: dict, files: Places) -> None:
    """Check the blocks of all registries by their schemas and fill in defaults, in place."""
    for name in REGISTRIES:
        schema = schema_of(name)
        registry = with_values(schema, with_texts(schema, config.get(name, {})))
        check_schema(registry, schema, [name], files)
        config[name] = with_defaults(schema, registry)
        if name == "datasets":
            for dataset, block in registry.items():
                check_keys(dataset, block, files)
        if name == "splits":
            for split, block in registry.items():
                _check_split(split, block, config["datasets"], files)


def _completed_datasets(datasets: dict, files: Places) -> dict:
    """Return the blocks of datasets, checked, with their sources resolved."""
    for name, block in datasets.items():
        if not is_union(block):
            _check_source(["datasets", name], block, files)
            _check_patterns(name, block, files)
    return {
        name: completed(name, datasets, files) if is_union(block) else resolved(block)
        for name, block in datasets.items()
    }


def _completed_params(models: dict, effort: str, files: Places) -> None:
    """Check the params of all models by the schemas of their families and fill in defaults by effort, in place."""
    schemas = schema_of("models")["$defs"]
    for name, block in models.items():
        schema = schemas[block["family"]]
        block["params"] = with_values(schema, block["params"])
        check_schema(block["params"], schema, ["models", name, "params"], files)
        block["params"] = with_defaults(scaled(schema, effort), block["params"])
    _check_templates(models, files)


def _check_query(name: str, config: dict, folds: dict[str, list[str]], files: Places) -> None:
    """Check that a what-if question names one split and a model that answers it."""
    query = config["counterfactuals"][name]
    if query["split"] in folds:
        file = holding_file(files, ["counterfactuals", name, "split"])
        raise InputError(
            f"{file}counterfactuals.{name}.split: '{query['split']}' has folds, each with models of its own; name one "
            f"of {', '.join(folds[query['split']])}."
        )
    for kind in ("dataset", "split", "model"):
        _check_names([query[kind]], config[f"{kind}s"], f"{kind}s", ["counterfactuals", name, kind], files)
    family = config["models"][query["model"]]["family"]
    if not FAMILIES[family].answers_counterfactuals:
        file = holding_file(files, ["counterfactuals", name, "model"])
        raise InputError(
            f"{file}counterfactuals.{name}.model: '{query['model']}' (family {family}) answers no what-if questions."
        )
    if query["design"] and family != "gaussian_process":
        raise InputError(
            f"{holding_file(files, ['counterfactuals', name, 'model'])}counterfactuals.{name}.design needs a model of "
            f"family gaussian_process, such as set_gp; '{query['model']}' is of family {family}."
        )
    if query["design"] and query["design"]["aim"] == "target" and not query["search"]:
        raise InputError(
            f"{holding_file(files, ['counterfactuals', name, 'design'])}counterfactuals.{name}.design: the aim target "
            "needs a state to reach: search: {towards: ...}."
        )
    if query["design"] and query["design"]["aim"] == "interactions" and query["design"]["each_context"]:
        raise InputError(
            f"{holding_file(files, ['counterfactuals', name, 'design'])}counterfactuals.{name}.design.each_context: "
            "the aim interactions compares combinations over all contexts; choose another aim, or leave it out."
        )
    asked = query["perturbations"]
    term = asked.get("genes_of") if isinstance(asked, dict) else None
    known = [prior for prior, block in config["priors"].items() if block["kind"] == "go"]
    if term and (prior := term.split(":")[0]) not in known:
        raise InputError(
            f"{holding_file(files, ['counterfactuals', name, 'perturbations'])}counterfactuals.{name}.perturbations: "
            f"genes_of {term}: '{prior}' is no prior of kind go; known: {', '.join(known)}."
        )


def _selected_queries(config: dict) -> list[str]:
    """Return the what-if questions whose dataset, split and model are all selected."""
    select = config["select"]
    return [
        name
        for name, query in config["counterfactuals"].items()
        if all(query[kind] in select[f"{kind}s"] for kind in ("dataset", "split", "model"))
    ]


def _check_query_file(name: str, asked: list | str | dict, files: Places) -> None:
    """Check that the list of perturbations of a question exists, if it names one."""
    path = asked.get("file") if isinstance(asked, dict) else None
    if path is not None and not Path(path).is_file():
        file = holding_file(files, ["counterfactuals", name, "perturbations"])
        raise InputError(
            f"{file}counterfactuals.{name}.perturbations.file: there is no file '{path}' (looked for "
            f"{Path(path).absolute()}). It is a text with a label per line."
        )


def complete(config: dict, files: Places = (), files_are_there: bool = True) -> dict:
    """Return the configuration checked and completed with defaults.

    Parameters
    ----------
    config
        The merged configuration.
    files
        The files it was merged from, and --config, in order: error messages name the one that holds the mistake.
    files_are_there
        Whether the user's own files have to be there already; rules of a host workflow may make them later.

    Raises
    ------
    InputError
        With one line per mistake: file, key, value and the possible values.
    """
    schema = schema_of("config")
    config = with_values(schema, with_texts(schema, config))
    check_schema(config, schema, [], files)
    config = with_defaults(schema, config)
    select = config["select"]
    if select["seeds"] is None:
        select["seeds"] = [*EFFORTS[config["effort"]].seeds]
    _completed_registries(config, files)
    config["datasets"] = _completed_datasets(config["datasets"], files)
    _check_priors(config, files)
    config["splits"] = {
        name: {key: value for key, value in block.items() if block["kind"] in SPLIT_KEYS.get(key, (block["kind"],))}
        for name, block in config["splits"].items()
    }
    for block in config["splits"].values():
        if "path" in block:
            block["path"] = own_or_shipped(block["path"])
    _check_names(select["datasets"], config["datasets"], "datasets", ["select", "datasets"], files)
    if is_open := select["counterfactuals"] is None:
        select["counterfactuals"] = []
    asked = [query["dataset"] for name in select["counterfactuals"] if (query := config["counterfactuals"].get(name))]
    named = {name: config["datasets"].get(name, {}) for name in [*select["datasets"], *asked]}
    if select["splits"] is None:
        select["splits"] = list(dict.fromkeys(_first_split(config["splits"], name) for name in select["datasets"]))
    config["splits"], folds = _expand_folds(config["splits"], named, select["splits"], files)
    select["splits"] = list(dict.fromkeys(fold for name in select["splits"] for fold in folds.get(name, [name])))
    config["models"] = _with_references(config["models"], files)
    _completed_params(config["models"], config["effort"], files)
    if is_open:
        select["counterfactuals"] = _selected_queries(config)
    for kind in REGISTRIES:
        _check_names(select[kind], config[kind], kind, ["select", kind], files)
    if config["sweep"]:
        _check_names([config["sweep"]["model"]], config["models"], "models", ["sweep", "model"], files)
        config["sweep"] = completed_sweep(config["sweep"], config["models"], files)
    for name in select["counterfactuals"]:
        _check_query(name, config, folds, files)
    queries = [config["counterfactuals"][name] for name in select["counterfactuals"]]
    datasets = list(dict.fromkeys([*select["datasets"], *[query["dataset"] for query in queries]]))
    _check_embeddings(config, datasets, files)
    if files_are_there:
        for name in select["counterfactuals"]:
            _check_query_file(name, config["counterfactuals"][name]["perturbations"], files)
        splits = [*select["splits"], *[query["split"] for query in queries]]
        models = [*select["models"], *[query["model"] for query in queries]]
        models += [config["sweep"]["model"]] if config["sweep"] else []
        _check_own_files(config, datasets, dict.fromkeys(splits), dict.fromkeys(models), files)
    return config


def _check_own_files(
    config: dict, datasets: Iterable[str], splits: Iterable[str], models: Iterable[str], files: Places
) -> None:
    """Check that the user's own files of the selection exist, those of the members of unions too."""
    members = (member for dataset in datasets for member in config["datasets"][dataset].get("union", [dataset]))
    for name in dict.fromkeys(members):
        _check_path(["datasets", name], config["datasets"][name], files)
    for name in splits:
        path = config["splits"][name].get("path")
        if path is not None and not Path(path).is_file():
            file = holding_file(files, ["splits", name, "path"])
            raise InputError(
                f"{file}splits.{name}.path: there is no file '{path}' (looked for {Path(path).absolute()})."
            )
    for source in config["embeddings"]["sources"]:
        if isinstance(source, dict) and not Path(source["file"]).is_file():
            file = holding_file(files, ["embeddings", "sources"])
            raise InputError(
                f"{file}embeddings.sources: there is no file '{source['file']}' (looked for "
                f"{Path(source['file']).absolute()})."
            )
        if isinstance(source, str) and source != COEXPRESSION:
            _check_path(["priors", source], config["priors"][source], files)
    _check_model_files(config, models, files)
