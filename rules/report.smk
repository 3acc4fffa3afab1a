rule report:
    """Write one self-contained page that a biologist can read."""
    input:
        benchmark="results/benchmark.tsv",
        calibration="results/calibration.tsv",
        comparisons="results/comparisons.tsv",
        strata="results/strata.tsv",
        verdicts="results/verdicts.tsv",
        runs=collect(
            "results/{run.dataset}/{run.split}/{run.model}/seed_{run.seed}/run.json",
            run=plan.runs.itertuples(),
        ),
        metrics=rules.benchmark.input.metrics,
        predictions=collect(
            "results/{run.dataset}/{run.split}/{run.model}/seed_{run.seed}/predictions.h5ad",
            run=plan.runs.itertuples(),
        ),
        harmonizations=collect(
            "results/{dataset}/harmonization.json",
            dataset=plan.runs["dataset"].unique(),
        ),
        splits=collect(
            "results/{run.dataset}/{run.split}/split.json",
            run=plan.runs[["dataset", "split"]].drop_duplicates().itertuples(),
        ),
        audits=collect(
            "results/{run.dataset}/{run.split}/audit.json",
            run=plan.runs[["dataset", "split"]].drop_duplicates().itertuples(),
        ),
        pairs=collect(
            "results/{run.dataset}/{run.split}/pairs.h5ad",
            run=plan.runs[["dataset", "split"]].drop_duplicates().itertuples(),
        ),
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
        code_version=code("perturbflow.report:report"),
        made_of=made_of("report"),
    script:
        "../scripts/report.py"
