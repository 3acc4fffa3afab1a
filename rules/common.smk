"""The plan, and the few functions by which rules look things up."""

import gc
import inspect
import json
import sys
import time
from datetime import UTC, datetime
from errno import ENOENT
from functools import cache
from os import strerror
from os.path import getmtime, getsize, isfile
from pathlib import Path

from snakemake.exceptions import WorkflowError
from snakemake.iocontainers import Wildcards

# Jobs find the package beside their script; rules find its light part here. module(snakefile=github(...)) fetches rules
# one by one from a host: they stand alone, and the package has to be installed then.
_root = Path(inspect.getfile(lambda: None)).parent.parent
if (_root / "scripts/perturbflow/registry/plan.py").is_file():
    sys.path.insert(0, str(_root / "scripts"))

from perturbflow.provenance import records
from perturbflow.provenance.code_version import code_version
from perturbflow.errors import InputError
from perturbflow.io.files import require_writable
from perturbflow.registry.sources import labels_file, own_files
from perturbflow.registry.needs import Needs
from perturbflow.registry.plan import Plan
from perturbflow.registry.schemas import CommandLine
from perturbflow.registry.shipped import above_shipped, shipped_files
from perturbflow.registry.wrappers import files_of

# A plan of 15,000 jobs holds no garbage, so it is searched rarely.
gc.set_threshold(100_000, 50, 100)


# Such a plan asks a few dozen functions 400,000 times for their parameters: a seventh of the time of a dry run.
def looked_up(function):
    """Mark a function that rules call: Python remembers its parameters."""
    function.__signature__ = inspect.signature(function)
    return function


# The user's values (--configfile, --config, or the host of a module) override config/*.yaml. Messages name the file of
# a mistake; the user's own files come last, as they override.
_files = [*shipped_files(), *map(Path, workflow.overwrite_configfiles)]
# The rules of a host workflow may make the files that its configuration names.
_is_module = Path(workflow.basedir).resolve() != _root.resolve()
if not _is_module:
    _files.append(CommandLine(workflow.config_settings.config or {}))

try:
    plan = Plan(above_shipped(config), _files, files_are_there=not _is_module)
    require_writable([".snakemake", "logs", "benchmarks", *plan.folders()])
except InputError as error:
    raise WorkflowError(f"The configuration cannot be run.\n{error}") from None

# The introduction of `snakemake --report` names what is selected, by the user or by what ships.
config["select"] = plan.config["select"]

# Once alone: if a job's own process touched the mark, it would be newer than the fresh results of another job.
if not records.CHANGED.exists():
    records.CHANGED.parent.mkdir(parents=True, exist_ok=True)
    records.CHANGED.touch()

_started = time.time()
if workflow.is_main_process:
    for _sentence in [
        *plan.left_out,
        plan.sentence,
        plan.effort,
        Needs.of(plan).sentence(Path.cwd()),
    ]:
        if _sentence:
            print(_sentence, file=sys.stderr)


def tell_verdicts():
    """Print the first sentences of a report that this run made, and where it is."""
    numbers = Path("results/report.json")
    if not numbers.is_file() or numbers.stat().st_mtime < _started:
        return
    for summary in json.loads(numbers.read_text(encoding="utf-8"))["summaries"]:
        print(
            f"{summary['dataset']} × {summary['split']}: {summary['sentence']}",
            file=sys.stderr,
        )
    print(f"The report: {numbers.with_suffix('.html').resolve()}", file=sys.stderr)


wildcard_constraints:
    dataset="[a-z0-9][a-z0-9_]*",
    split="[a-z0-9][a-z0-9_]*",
    model="[a-z0-9][a-z0-9_]*",
    seed="[0-9]+",
    query="[a-z0-9][a-z0-9_]*",


# --- stale results ---------------------------------------------------------------------------------------------------
# Beside every result lies a record of its code, params and inputs (perturbflow/provenance/records.py). By time stamps,
# and by .snakemake/, a touched file looks like a changed one, and a copied and edited folder like a current one.

_reasons = []


def _fill(items, wildcards):
    """Return the paths of a rule's input or output for these wildcards."""
    paths = []
    for item in items:
        found = item(wildcards) if callable(item) else item
        for path in [found] if isinstance(found, str) else found:
            paths.append(str(path).format(**dict(wildcards.items())))
    return paths


@cache
def _parts(rule):
    """Return outputs, inputs but for the mark, and params of a rule."""
    declared = getattr(rules, rule)
    inputs = [item for item in declared.input if item is not declared.input.again]
    return [*declared.output], inputs, dict(declared.params.items())


def _values(rule, wildcards):
    """Return the params of a rule for these wildcards, without those that depend on output.

    Snakemake does not take these for a change either.
    """
    values = dict(wildcards.items())
    for name, value in _parts(rule)[2].items():
        if not callable(value):
            values[name] = value
        elif len(inspect.signature(value).parameters) == 1:
            values[name] = value(wildcards)
    return values


def again(rule):
    """Return the last input of a rule: the mark that makes its job run again if its results are stale."""

    @cache
    def is_stale(*place):
        wildcards = Wildcards(fromdict=dict(place))
        outputs, inputs, _ = _parts(rule)
        outputs = _fill(outputs, wildcards)
        results = [path for path in outputs if isfile(path)]
        if not results:
            return False
        _settle(results[0])
        inputs = _fill(inputs, wildcards)
        reason = records.why_stale(outputs, _values(rule, wildcards), inputs)
        if reason:
            _report(reason)
            records.outdate(results)
        else:
            records.renew(*_fill([getattr(rules, rule).benchmark], wildcards), results)
        return bool(reason)

    def mark(wildcards):
        # A job's own process follows the plan of the main process.
        is_new = workflow.is_main_process and is_stale(*wildcards.items())
        return (
            local(str(records.CHANGED))
            if is_new
            else ancient(local(str(records.CHANGED)))
        )

    return looked_up(mark)


@cache
def _settle_folder(folder):
    records.settle(folder)


def _settle(result):
    """Set the time stamps of touched results right, once, before Snakemake looks at any."""
    parts = Path(result).parts
    top = next(i for i, part in enumerate(parts) if part in ("results", "resources"))
    _settle_folder(Path(*parts[: top + 1]))


def _report(reason):
    """Report why a job runs again; the mark becomes newer than its results."""
    _reasons.append(reason)
    if len(_reasons) == 1:
        records.CHANGED.write_text(f"{datetime.now(UTC).isoformat()}\n")
    with records.CHANGED.open("a") as file:
        file.write(f"{reason}\n")
    if len(_reasons) <= 10:
        print(f"Made again: {reason}.", file=sys.stderr)
    elif len(_reasons) == 11:
        print(f"More of these: {records.CHANGED}.", file=sys.stderr)


def of_no_result(key):
    """Return a params function for a setting that changes no result: what depends on output makes nothing stale."""
    return looked_up(lambda wildcards, output: plan.config[key])


def made_of(rule):
    """Return a params function: the content of the record beside the results."""
    return looked_up(lambda wildcards, output: _values(rule, wildcards))


def code(step, further=None):
    """Return a params function: the version of the code of a step, and of the code that its configuration names."""
    return looked_up(
        lambda wildcards: code_version(step, *(further(wildcards) if further else []))
    )


def family(wildcards):
    """Return the class of a model's family."""
    return [f"perturbflow.models.{plan.family(wildcards.model).implementation}"]


def recipe(wildcards):
    """Return the reader of a dataset that declarations do not reach, if it has one."""
    name = plan.config["datasets"][wildcards.dataset].get("recipe")
    return [f"perturbflow.screens.recipes:{name}"] if name else []


def prior_reader(wildcards):
    """Return the reader of a kind of prior."""
    return [f"perturbflow.priors:{plan.config['priors'][wildcards.dataset]['kind']}"]


def own(rule, paths, wildcards):
    """Return the user's own files for a rule.

    They stay where they are, whatever the prefix, and their time stamps play no part.

    In a module a rule of the host may make them in the same run, which Snakemake would not carry on from ancient files.
    """
    results = _fill(_parts(rule)[0], wildcards)
    return [
        (
            ancient(local(path))
            if records.is_unchanged(path, results) and not _is_module
            else local(path)
        )
        for path in paths
    ]


# --- look-ups of rules -----------------------------------------------------------------------------------------------


@looked_up
def raw_file(wildcards):
    """Return the raw input of harmonize: the user's own file or folder, or the manifest of a download."""
    path = plan.config["datasets"][wildcards.dataset]["source"].get("path")
    if path:
        return own("harmonize", [path], wildcards)[0]
    return f"resources/{wildcards.dataset}/raw/manifest.json"


@looked_up
def labels_of_cells(wildcards):
    """Return the user's own table of labels of a dataset, if it has one."""
    path = labels_file(plan.config["datasets"][wildcards.dataset])
    return own("harmonize", [path], wildcards) if path else []


@looked_up
def prior_files(wildcards):
    """Return the raw input of a prior: the user's own files, or the manifest of a download."""
    files = own_files(plan.config["priors"][wildcards.dataset])
    if files:
        return own("prior", files.values(), wildcards)
    return f"resources/{wildcards.dataset}/raw/manifest.json"


@looked_up
def prior_roles(wildcards):
    """Return the roles of the user's own files of a prior."""
    return [*own_files(plan.config["priors"][wildcards.dataset])]


@looked_up
def prior_kind(wildcards):
    """Return the kind of a prior."""
    return plan.config["priors"][wildcards.dataset]["kind"]


@looked_up
def prior_organism(wildcards):
    """Return whose genes a prior knows."""
    return plan.config["priors"][wildcards.dataset]["organism"]


@looked_up
def source_content(wildcards):
    """Return the declared content of the files of a download: any mirror has the same bytes."""
    return plan.content(wildcards.dataset)


# A params function of the output is no reason for Snakemake to run a job again.
@looked_up
def source_files(wildcards, output):
    """Return the files that download retrieves."""
    return plan.files(wildcards.dataset)


@looked_up
def local_mirror(wildcards, output):
    """Return the folder with downloads that are already here."""
    return plan.config["mirror"]


@looked_up
def dataset_block(wildcards):
    """Return the part of a dataset's block that harmonize reads."""
    return plan.dataset(wildcards.dataset)


@looked_up
def union_block(wildcards):
    """Return the part of a union's block that decides its cells and genes."""
    return plan.union(wildcards.dataset)


@looked_up
def note_of_dataset(wildcards):
    """Return what the user of a dataset should know."""
    return plan.config["datasets"][wildcards.dataset].get("note", "")


def members_of_union(name):
    """Return an input function: one file of every member of a union, in their order."""
    return looked_up(
        lambda wildcards: [
            f"results/{member}/{name}" for member in plan.members(wildcards.dataset)
        ]
    )


@looked_up
def split_block(wildcards):
    """Return a split's block as this screen's division reads it."""
    return plan.split(wildcards.split, wildcards.dataset)


@looked_up
def label_naming(wildcards):
    """Return how a dataset's block reads the labels that a split names."""
    return plan.naming(wildcards.split, wildcards.dataset)


# The user's own files that a step finds by its configuration are inputs too: the plan needs them. They have no name, as
# the script has them from its configuration.
@looked_up
def split_files(wildcards):
    """Return the user's own file of a split, if it has one."""
    path = plan.config["splits"][wildcards.split].get("path")
    return own("split", [path], wildcards) if path else []


@looked_up
def embedding_tables(wildcards):
    """Return the user's own tables of vectors of genes."""
    return own("embeddings", plan.embedding_tables, wildcards)


def files_of_model(rule):
    """Return an input function: the user's own files that a model is made from."""

    def files(wildcards):
        paths = plan.model_files(dict(wildcards.items()))
        return own(rule, paths, wildcards)

    return looked_up(files)


@looked_up
def content_of_wrapper(wildcards):
    """Return the content of the script of a model of others, of its environment, and of the files that it reads."""
    files = files_of(plan.config["models"][wildcards.model]["params"])
    return {role: records.content_digest(file) for role, file in files.items()}


@looked_up
def files_of_predictions(wildcards):
    """Return the file of predictions that were made elsewhere, which prediction reads too."""
    if not plan.family(wildcards.model).made_elsewhere:
        return []
    return own("predict", plan.model_files(dict(wildcards.items())), wildcards)


@looked_up
def quality_control(wildcards):
    """Return the limits of quality control of a dataset."""
    return plan.qc(wildcards.dataset)


@looked_up
def model_file(wildcards):
    """Return the file that a model's training leaves behind."""
    name = plan.family(wildcards.model).artefact
    return f"results/{{dataset}}/{{split}}/{{model}}/seed_{{seed}}/{name}"


def per_run(pattern, **more):
    """Return the files of a pattern for all selected runs."""
    return collect(pattern, run=plan.runs.itertuples(), **more)


def per_split(pattern, **more):
    """Return the files of a pattern for all selected divisions of screens."""
    return collect(pattern, run=plan.divisions.itertuples(), **more)


def per_dataset(pattern):
    """Return the files of a pattern for all selected screens."""
    return collect(pattern, dataset=plan.datasets)


def trained_models():
    """Return the trained models of all selected runs, and the accounts of their training."""
    return [
        f"results/{run.dataset}/{run.split}/{run.model}/seed_{run.seed}/{name}"
        for run in plan.runs.itertuples()
        for name in (plan.family(run.model).artefact, "run.json")
    ]


@looked_up
def implementation(wildcards):
    """Return where a model's family is implemented."""
    return plan.family(wildcards.model).implementation


# Snakemake's lookup() walks through its whole table: with thousands of jobs, half of the time of a dry run.
@looked_up
def model_params(wildcards):
    """Return the params that a model is built from."""
    return plan.params(dict(wildcards.items()))


@looked_up
def sweep_block(wildcards):
    """Return the block `sweep`, with the family of its model."""
    return {
        **plan.config["sweep"],
        "family": plan.config["models"][wildcards.model]["family"],
    }


@looked_up
def files_of_sweeps(wildcards):
    """Return the files of all sweeps; WorkflowError where there is none."""
    if plan.sweeps.empty:
        raise WorkflowError(
            "Nothing is searched: the configuration has no block sweep: {model: ..., over: ...}, or its model serves "
            "no selected split."
        )
    return collect(
        "results/{run.dataset}/{run.split}/sweeps/{run.model}/{file}",
        run=plan.sweeps.itertuples(),
        file=["best.yaml", "trials.tsv", "sweep.png"],
    )


@looked_up
def seed(wildcards):
    """Return the seed of a run as a number."""
    return int(wildcards.seed)


@looked_up
def query_block(wildcards):
    """Return the block of a what-if question."""
    return plan.config["counterfactuals"][wildcards.query]


def _prior_of_query(wildcards):
    """Return the prior that a question names a term of, such as go of go:0006986; None where it names none."""
    asked = plan.config["counterfactuals"][wildcards.query]["perturbations"]
    term = asked.get("genes_of", "") if isinstance(asked, dict) else ""
    return Wildcards(fromdict={"dataset": term.split(":")[0]}) if term else None


@looked_up
def annotations_of_query(wildcards):
    """Return the annotations of the prior that a question names a term of, or nothing."""
    prior = _prior_of_query(wildcards)
    if prior is None:
        return []
    files = own_files(plan.config["priors"][prior.dataset])
    if files:
        return own("counterfactual", files.values(), wildcards)
    return f"resources/{prior.dataset}/raw/manifest.json"


@looked_up
def roles_of_annotations(wildcards):
    """Return the role of every file of `annotations_of_query`; none of a download, which tells them itself."""
    prior = _prior_of_query(wildcards)
    return [] if prior is None else prior_roles(prior)


@looked_up
def files_of_query(wildcards):
    """Return the user's own list of perturbations of a question, if it names one."""
    asked = plan.config["counterfactuals"][wildcards.query]["perturbations"]
    path = asked.get("file") if isinstance(asked, dict) else None
    return own("counterfactual", [path], wildcards) if path else []


def designs():
    """Return the selected questions that ask which perturbations to measure next."""
    blocks = plan.config["counterfactuals"]
    asked = [query for query in plan.queries["query"] if blocks[query]["design"]]
    return plan.queries[plan.queries["query"].isin(asked)]


# Closed forms are many, and each of their jobs takes seconds: a cluster gets them together. It gets other jobs one by
# one: where one of a group fails, Snakemake removes the finished results of the others.
@looked_up
def submitted_together(wildcards):
    """Return the group of a run's jobs that a cluster gets as one: training, prediction and scores of a closed form."""
    is_closed = plan.family(wildcards.model).rule == "train_closed_form"
    return "closed_form" if is_closed else None


def shown_table(name):
    """Return a table of all scores; snakemake --report shows it with its caption."""
    return report(
        f"results/{name}.tsv",
        caption=f"captions/{name}.rst",
        category="Benchmark",
        labels={"file": f"{name}.tsv"},
    )


def one_of(names):
    """Return a pattern for a wildcard that takes these names only; without names it matches nothing."""
    return "|".join(names) or "(?!)"


def memory(mb):
    """Return a resource function: MB of memory whatever the input, doubled with every attempt."""
    return looked_up(lambda wildcards, attempt: mb * 2 ** (attempt - 1))


# Snakemake's own input.size_mb starts an event loop for every job. Where a group of jobs is submitted as one, some
# inputs of its later jobs are not there yet; the pairs are, and they are most of the input. Without any input the size
# is not known: the dry run shows <TBD>, and Snakemake asks again when the job is ready.
def input_mb(files):
    """Return the size of the input files that are there, in MB; FileNotFoundError if there is none yet."""
    found = [file for file in files if isfile(file)]
    return sum(map(getsize, found or files[:1])) / 1e6


@cache
def _n_by_role(split, changed):
    """Return how many perturbations each role of a split has."""
    found = json.loads(Path(split).read_text(encoding="utf-8"))["perturbations"]
    return {role: len(labels) for role, labels in found.items()}


def perturbations_of(pairs, *roles):
    """Return how many perturbations of these roles the split of a pairs.h5ad has; FileNotFoundError before it is made.

    The error names the pairs: Snakemake takes a size for unknown only where it misses an input of the rule.
    """
    split = Path(pairs).with_name("split.json")
    if not isfile(split):
        raise FileNotFoundError(ENOENT, strerror(ENOENT), str(pairs))
    return sum(_n_by_role(str(split), getmtime(split))[role] for role in roles)


# Tables of perturbations × genes are what a screen of many perturbations with few cells each takes memory for.
def memory_by_input(factor, least=1000, per_learned=0, per_scored=0):
    """Return a resource function: MB of memory by MB of input, doubled with every attempt.

    More is asked for each perturbation that a model learns from, and for each that is scored.
    """

    def mb(wildcards, input, attempt):
        size = least + factor * input_mb(input)
        if per_learned:
            size += per_learned * perturbations_of(input.pairs, "train", "validation")
        if per_scored:
            scored = plan.config["predict"]["role"]
            size += per_scored * perturbations_of(input.pairs, scored)
        return int(size * 2 ** (attempt - 1))

    return looked_up(mb)


def runtime_by_input(per_gb, least=10):
    """Return a resource function: minutes by GB of input, doubled with every attempt."""
    return looked_up(
        lambda wildcards, input, attempt: int(
            (least + per_gb * input_mb(input) / 1e3) * 2 ** (attempt - 1)
        )
    )


@looked_up
def gpu(wildcards):
    """Return how many GPUs a training asks for: one if the configuration names cuda."""
    return int(plan.config["device"] == "cuda")
