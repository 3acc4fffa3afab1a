rule benchmark:
    """Gather all scores: means, resolution of metrics, differences to baselines, strata, a verdict per model."""
    input:
        metrics=per_run(
            "results/{run.dataset}/{run.split}/{run.model}/seed_{run.seed}/metrics.tsv"
        ),
        audits=per_split("results/{run.dataset}/{run.split}/audit.json"),
        qualities=per_dataset("results/{dataset}/quality.tsv"),
        harmonizations=per_dataset("results/{dataset}/harmonization.json"),
        again=again("benchmark"),
    output:
        benchmark=report(
            "results/benchmark.tsv",
            caption="captions/benchmark.rst",
            category="Benchmark",
            labels={"file": "benchmark.tsv"},
        ),
        calibration=report(
            "results/calibration.tsv",
            caption="captions/calibration.rst",
            category="Benchmark",
            labels={"file": "calibration.tsv"},
        ),
        comparisons=report(
            "results/comparisons.tsv",
            caption="captions/comparisons.rst",
            category="Benchmark",
            labels={"file": "comparisons.tsv"},
        ),
        strata=report(
            "results/strata.tsv",
            caption="captions/strata.rst",
            category="Benchmark",
            labels={"file": "strata.tsv"},
        ),
        verdicts=report(
            "results/verdicts.tsv",
            caption="captions/verdicts.rst",
            category="Benchmark",
            labels={"file": "verdicts.tsv"},
        ),
        contexts="results/contexts.tsv",
    log:
        "logs/benchmark.log",
    benchmark:
        "benchmarks/benchmark.tsv"
    conda:
        "../envs/data.yaml"
    threads: 1
    resources:
        mem_mb=memory_by_input(20, least=1000),
        runtime="1h",
    params:
        families=plan.families,
        context_folds=plan.context_folds,
        least_difference=plan.config["verdicts"]["least_difference"],
        code_version=code("perturbflow.benchmark:benchmark"),
        made_of=made_of("benchmark"),
    script:
        "../scripts/benchmark.py"
