rule benchmark:
    """Gather all scores: means, what the metrics can tell, differences to baselines, strata, and a verdict per model."""
    input:
        metrics=collect(
            "results/{run.dataset}/{run.split}/{run.model}/seed_{run.seed}/metrics.tsv",
            run=plan.runs.itertuples(),
        ),
    output:
        benchmark="results/benchmark.tsv",
        calibration="results/calibration.tsv",
        comparisons="results/comparisons.tsv",
        strata="results/strata.tsv",
        verdicts="results/verdicts.tsv",
    log:
        "logs/benchmark.log",
    benchmark:
        "benchmarks/benchmark.tsv"
    conda:
        "../envs/data.yaml"
    threads: 1
    resources:
        mem_mb=memory_by_input(20, least=2000),
        runtime="1h",
    params:
        families=plan.families,
        lineage=lineage("benchmark"),
    script:
        "../scripts/benchmark.py"
