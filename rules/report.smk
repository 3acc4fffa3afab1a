rule report:
    """Write one self-contained page that a biologist can read."""
    input:
        # Read beside quality.json.
        collect(
            "results/{dataset}/quality.tsv",
            dataset=plan.runs["dataset"].unique(),
        ),
        benchmark="results/benchmark.tsv",
        calibration="results/calibration.tsv",
        comparisons="results/comparisons.tsv",
        strata="results/strata.tsv",
        verdicts="results/verdicts.tsv",
        runs=per_run(
            "results/{run.dataset}/{run.split}/{run.model}/seed_{run.seed}/run.json"
        ),
        metrics=rules.benchmark.input.metrics,
        predictions=per_run(
            "results/{run.dataset}/{run.split}/{run.model}/seed_{run.seed}/predictions.h5ad"
        ),
        harmonizations=collect(
            "results/{dataset}/harmonization.json",
            dataset=plan.runs["dataset"].unique(),
        ),
        qualities=collect(
            "results/{dataset}/quality.json",
            dataset=plan.runs["dataset"].unique(),
        ),
        splits=per_split("results/{run.dataset}/{run.split}/split.json"),
        audits=per_split("results/{run.dataset}/{run.split}/audit.json"),
        pairs=per_split("results/{run.dataset}/{run.split}/pairs.h5ad"),
        counterfactuals=rules.counterfactuals.input.effects,
        figures=rules.counterfactuals.input.figures,
        warranties=rules.counterfactuals.input.warranties,
        again=again("report"),
    output:
        report=report(
            "results/report.html",
            caption="captions/report.rst",
            category="Benchmark",
            labels={"file": "report.html"},
        ),
    log:
        "logs/report.log",
    benchmark:
        "benchmarks/report.tsv"
    conda:
        "../envs/data.yaml"
    threads: 1
    resources:
        mem_mb=memory(4000),
        runtime="1h",
    params:
        descriptions=plan.descriptions,
        code_version=code("perturbflow.report.page:report"),
        made_of=made_of("report"),
    script:
        "../scripts/report.py"
