rule report:
    """Write one self-contained page that a biologist can read."""
    input:
        benchmark=ancient("results/benchmark.tsv"),
        runs=ancient(
            collect(
                "results/{run.dataset}/{run.split}/{run.model}/seed_{run.seed}/run.json",
                run=plan.runs.itertuples(),
            )
        ),
        metrics=ancient(
            collect(
                "results/{run.dataset}/{run.split}/{run.model}/seed_{run.seed}/metrics.tsv",
                run=plan.runs.itertuples(),
            )
        ),
        predictions=ancient(
            collect(
                "results/{run.dataset}/{run.split}/{run.model}/seed_{run.seed}/predictions.h5ad",
                run=plan.runs.itertuples(),
            )
        ),
        harmonizations=ancient(
            collect(
                "results/{dataset}/harmonization.json",
                dataset=plan.runs["dataset"].unique(),
            )
        ),
        splits=ancient(
            collect(
                "results/{run.dataset}/{run.split}/split.json",
                run=plan.runs[["dataset", "split"]].drop_duplicates().itertuples(),
            )
        ),
        audits=ancient(
            collect(
                "results/{run.dataset}/{run.split}/audit.json",
                run=plan.runs[["dataset", "split"]].drop_duplicates().itertuples(),
            )
        ),
        pairs=ancient(
            collect(
                "results/{run.dataset}/{run.split}/pairs.h5ad",
                run=plan.runs[["dataset", "split"]].drop_duplicates().itertuples(),
            )
        ),
        counterfactuals=ancient(rules.counterfactuals.input),
    output:
        report=report("results/report.html", category="Benchmark"),
    log:
        "logs/report.log",
    benchmark:
        "benchmarks/report.tsv"
    conda:
        "../envs/data.yaml"
    threads: 1
    resources:
        mem_mb=memory_by_input(10, least=3000),
        runtime="1h",
    params:
        lineage=lineage("report"),
    script:
        "../scripts/report.py"
