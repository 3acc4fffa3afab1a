rule benchmark:
    """Gather all scores in one table, with bootstrap intervals over perturbations."""
    input:
        metrics=collect(
            "results/{run.dataset}/{run.split}/{run.model}/seed_{run.seed}/metrics.tsv",
            run=plan.runs.itertuples(),
        ),
    output:
        benchmark="results/benchmark.tsv",
    log:
        "logs/benchmark.log",
    benchmark:
        "benchmarks/benchmark.tsv"
    conda:
        "../envs/data.yaml"
    threads: 1
    resources:
        mem_mb=2000,
        runtime="1h",
    params:
        lineage=lineage("benchmark"),
    script:
        "../scripts/benchmark.py"
