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
        benchmark=shown_table("benchmark"),
        calibration=shown_table("calibration"),
        comparisons=shown_table("comparisons"),
        strata=shown_table("strata"),
        verdicts=shown_table("verdicts"),
        contexts=shown_table("contexts"),
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
