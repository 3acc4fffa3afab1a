"""From raw Perturb-seq files to honestly scored perturbation models.

Path grammar, with five wildcards only (dataset, split, model, seed, and query for counterfactuals):

  resources/{dataset}/raw/manifest.json                                what was retrieved, beside the files themselves
  resources/{dataset}/embedding.parquet                                vectors of genes, for the name of a prior
  results/{dataset}/harmonized.h5ad, harmonization.json                one schema for all; what was dropped and why
  results/{dataset}/quality.tsv, quality.json, quality.html            quality of a screen, before any training
  results/{dataset}/{split}/split.json                                 perturbations and cells per role
  results/{dataset}/{split}/gene_vectors.parquet                       vectors of all genes, for what-if questions
  results/{dataset}/{split}/pairs.h5ad, embeddings.parquet, audit.json training data, and the proof that nothing leaked
  results/{dataset}/{split}/sweeps/{model}/best.yaml, trials.tsv       params of a model, searched on training cells
  results/{dataset}/{split}/{model}/seed_{seed}/model.npz|.ckpt, run.json, predictions.h5ad, metrics.tsv
  results/{dataset}/{split}/{model}/seed_{seed}/counterfactuals/{query}.h5ad, .tsv, .effects.h5ad, .design.tsv, .html
  results/{benchmark,calibration,comparisons,strata,verdicts,contexts}.tsv  all scores, and what they allow to say
  results/report.html, report.json                                     one page to read, and its numbers
  results/download_check.tsv                                           answers of the hosts of all registered screens
"""

from snakemake.utils import min_version

min_version("9.25")


report: "rules/captions/workflow.rst"


include: "rules/common.smk"
include: "rules/download.smk"
include: "rules/prior.smk"
include: "rules/harmonize.smk"
include: "rules/unite.smk"
include: "rules/quality.smk"
include: "rules/split.smk"
include: "rules/pair.smk"
include: "rules/embeddings.smk"
include: "rules/audit.smk"
include: "rules/train.smk"
include: "rules/sweep.smk"
include: "rules/predict.smk"
include: "rules/evaluate.smk"
include: "rules/counterfactual.smk"
include: "rules/benchmark.smk"
include: "rules/report.smk"


rule data:
    """The selected screens, harmonized and described, and the priors of their genes."""
    input:
        collect(
            "results/{dataset}/{file}",
            dataset=plan.datasets,
            file=[
                "harmonized.h5ad",
                "harmonization.json",
                "quality.tsv",
                "quality.json",
                "quality.html",
            ],
        ),
        collect("resources/{prior}/embedding.parquet", prior=plan.priors),
    localrule: True


rule pairs:
    """The pairs of all selected splits, audited for leaks."""
    input:
        per_split(
            "results/{run.dataset}/{run.split}/{file}",
            file=["split.json", "pairs.h5ad", "embeddings.parquet", "audit.json"],
        ),
    localrule: True


rule trained:
    """All selected models, trained."""
    input:
        trained_models(),
    localrule: True


rule evaluated:
    """All selected models, scored."""
    input:
        per_run(
            "results/{run.dataset}/{run.split}/{run.model}/seed_{run.seed}/{file}",
            file=["predictions.h5ad", "metrics.tsv"],
        ),
    localrule: True


onsuccess:
    tell_verdicts()


# A deleted file that these results depend on is made again, too.
rule all:
    """Everything that is selected: scores, report and counterfactual answers; without a model, data and pairs."""
    default_target: True
    input:
        [] if plan.runs.empty else [*rules.benchmark.output, *rules.report.output],
        rules.counterfactuals.input,
        [*rules.data.input, *rules.pairs.input] if plan.runs.empty else [],
    localrule: True
