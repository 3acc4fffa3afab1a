"""The plan, and the few functions that rules look things up with."""

import sys
from datetime import UTC, datetime

from snakemake.exceptions import WorkflowError
from snakemake.io import _IOFile
from snakemake.settings.enums import RerunTrigger
from snakemake.workflow import Workflow

# Jobs find the package beside their script; the Snakefile has to be told where its light part is.
sys.path.insert(0, f"{workflow.basedir}/scripts")

from perturbflow.errors import InputError
from perturbflow.files import require_writable
from perturbflow.registry import Plan, own_files


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


def one_of(names):
    """Return a pattern for a wildcard that takes these names only; without names it matches nothing."""
    return "|".join(names) or "(?!)"


def memory(mb):
    """Return a resource function: MB of memory whatever the input, doubled with every attempt."""
    return lambda wildcards, attempt: mb * 2 ** (attempt - 1)


def memory_by_input(factor, least=1000):
    """Return a resource function: MB of memory by MB of input, doubled with every attempt."""
    return lambda wildcards, input, attempt: int(
        (least + factor * input.size_mb) * 2 ** (attempt - 1)
    )


def gpu(wildcards):
    """Return how many GPUs a training asks for: one if the configuration names cuda."""
    return int(plan.config["device"] == "cuda")
