"""The plan, and the few functions that rules look things up with."""

import gc
import sys
from datetime import UTC, datetime
from functools import cache
from os.path import getsize, isfile

import snakemake.common
import snakemake.rules
from snakemake.exceptions import WorkflowError
from snakemake.io import _IOFile
from snakemake.settings.enums import RerunTrigger
from snakemake.workflow import Workflow

# Jobs find the package beside their script; the Snakefile has to be told where its light part is.
sys.path.insert(0, f"{workflow.basedir}/scripts")

from perturbflow.errors import InputError
from perturbflow.files import require_writable
from perturbflow.origins import own_files
from perturbflow.registry.config import model_files
from perturbflow.registry.plan import Plan


# A time stamp says nothing about content: a git checkout or a copy would retrain weeks of work. The lineage that every rule
# carries as a parameter holds the content of all that its result is made of, and is what makes a job run again.
# Snakemake has no switch for this. `ancient` inputs would keep a stale result from running after what it is made of has
# run, and the settings of a run arrive only after this file was read; hence these two answers, given when the plan is made.
async def _no_file_is_newer(file, time):
    """Time stamps of inputs play no part."""
    return False


_IOFile.is_newer = _no_file_is_newer
Workflow.rerun_triggers = property(
    lambda self: frozenset(self.dag_settings.rerun_triggers) - {RerunTrigger.CODE}
)

# A plan of 15,000 jobs asks a few dozen functions for their parameters 350,000 times, and is searched for garbage that it does
# not hold: a quarter of the time of a dry run.
snakemake.common.get_function_params = cache(snakemake.common.get_function_params)
snakemake.rules.get_function_params = snakemake.common.get_function_params
gc.set_threshold(100_000, 50, 100)


# For messages that name the file of a mistake; the user's own come last: they override.
_names = ("config", "datasets", "splits", "models", "counterfactuals")
_files = [f"{workflow.basedir}/config/{name}.yaml" for name in _names]
_files += [str(path) for path in workflow.overwrite_configfiles]

try:
    plan = Plan(config, _files)
    require_writable([".snakemake", "logs", "benchmarks", *plan.folders()])
except InputError as error:
    raise WorkflowError(f"The configuration cannot be run.\n{error}") from None

for _sentence in plan.left_out:
    print(_sentence, file=sys.stderr)


wildcard_constraints:
    dataset="[a-z0-9][a-z0-9_]*",
    split="[a-z0-9][a-z0-9_]*",
    model="[a-z0-9][a-z0-9_]*",
    seed="[0-9]+",
    query="[a-z0-9][a-z0-9_]*",


def lineage(step):
    """Return a params function: the digest of all that a step's result is made of."""
    return lambda wildcards: plan.lineage(step, **wildcards)


def raw_file(wildcards):
    """Return what harmonize reads: the user's own file, or the manifest of a download."""
    source = plan.config["datasets"][wildcards.dataset]["source"]
    return source.get("path", f"resources/{wildcards.dataset}/raw/manifest.json")


def prior_files(wildcards):
    """Return what a prior is read from: the user's own files, or the manifest of a download."""
    own = own_files(plan.config["priors"][wildcards.dataset])
    return [*own.values()] or f"resources/{wildcards.dataset}/raw/manifest.json"


def prior_roles(wildcards):
    """Return what each of the user's own files of a prior is."""
    return [*own_files(plan.config["priors"][wildcards.dataset])]


def prior_kind(wildcards):
    """Return what kind of knowledge a prior is."""
    return plan.config["priors"][wildcards.dataset]["kind"]


def prior_organism(wildcards):
    """Return whose genes a prior knows."""
    return plan.config["priors"][wildcards.dataset]["organism"]


# Snakemake takes a params function of the output for no reason to run again. What of the way a file comes makes a result
# stale is for the lineage to say: the same bytes are the same from any mirror.
def source_files(wildcards, output):
    """Return what download retrieves."""
    return plan.files(wildcards.dataset)


def local_mirror(wildcards, output):
    """Return the folder with downloads that are already here."""
    return plan.config["mirror"]


def dataset_block(wildcards):
    """Return what harmonize needs of a dataset's block."""
    return plan.dataset(wildcards.dataset)


def split_block(wildcards):
    """Return a split's block as this screen's division reads it."""
    return plan.split(wildcards.split, wildcards.dataset)


# The user's own files that a step finds by its configuration are inputs too, without a name, as its script is not told of them
# again: a plan without them would be none.
def split_files(wildcards):
    """Return the user's own file of a split, if it has one."""
    path = plan.config["splits"][wildcards.split].get("path")
    return [path] if path else []


def latent_files(wildcards):
    """Return the user's own files that a model is made from."""
    return model_files(plan.config["models"][wildcards.model])


def quality_control(wildcards):
    """Return the limits of quality control of a dataset."""
    return plan.qc(wildcards.dataset)


def model_file(wildcards):
    """Return the file that a model's training leaves behind."""
    name = plan.family(wildcards.model).artefact
    return f"results/{{dataset}}/{{split}}/{{model}}/seed_{{seed}}/{name}"


def trained_models():
    """Return the trained models of all selected runs."""
    return [
        f"results/{run.dataset}/{run.split}/{run.model}/seed_{run.seed}/{plan.family(run.model).artefact}"
        for run in plan.runs.itertuples()
    ]


def implementation(wildcards):
    """Return where a model's family is implemented."""
    return plan.family(wildcards.model).implementation


# Snakemake's lookup() walks through the whole of what it looks in: with thousands of jobs, half of the time of a dry run.
def model_params(wildcards):
    """Return what a model is built from."""
    return plan.config["models"][wildcards.model]["params"]


def query_block(wildcards):
    """Return what a what-if question asks."""
    return plan.config["counterfactuals"][wildcards.query]


# Closed forms are many, and each of their jobs takes seconds. Of nothing else are jobs submitted together: where one of a
# group fails, Snakemake removes what the others had finished.
def submitted_together(wildcards):
    """Return the group of a run's jobs that a cluster gets as one: training, prediction and scores of a closed form."""
    is_closed = plan.family(wildcards.model).rule == "train_closed_form"
    return "closed_form" if is_closed else None


def one_of(names):
    """Return a pattern for a wildcard that takes these names only; without names it matches nothing."""
    return "|".join(names) or "(?!)"


def memory(mb):
    """Return a resource function: MB of memory whatever the input, doubled with every attempt."""
    return lambda wildcards, attempt: mb * 2 ** (attempt - 1)


# Snakemake's own input.size_mb starts an event loop for every job. Where a group of jobs is submitted as one, what its later
# jobs read is not there yet; the pairs are, and they are most of it. Without any input there is nothing to say: the dry run
# shows <TBD>, and Snakemake asks again when the job is ready.
def input_mb(files):
    """Return the size of the input files that are there, in MB; FileNotFoundError if there is none yet."""
    found = [file for file in files if isfile(file)]
    return sum(map(getsize, found or files[:1])) / 1e6


def memory_by_input(factor, least=1000):
    """Return a resource function: MB of memory by MB of input, doubled with every attempt."""
    return lambda wildcards, input, attempt: int(
        (least + factor * input_mb(input)) * 2 ** (attempt - 1)
    )


def runtime_by_input(per_gb, least=10):
    """Return a resource function: minutes by GB of input, doubled with every attempt."""
    return lambda wildcards, input, attempt: int(
        (least + per_gb * input_mb(input) / 1e3) * 2 ** (attempt - 1)
    )


def gpu(wildcards):
    """Return how many GPUs a training asks for: one if the configuration names cuda."""
    return int(plan.config["device"] == "cuda")
