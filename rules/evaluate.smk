rule evaluate:
    """Score predicted cells against measured ones, per perturbation."""
    input:
        predictions="results/{dataset}/{split}/{model}/seed_{seed}/predictions.h5ad",
        pairs="results/{dataset}/{split}/pairs.h5ad",
        split="results/{dataset}/{split}/split.json",
        again=again("evaluate"),
    output:
        metrics=report(
            "results/{dataset}/{split}/{model}/seed_{seed}/metrics.tsv",
            caption="captions/metrics.rst",
            category="Runs",
            subcategory="{dataset}, {split}",
            labels={
                "dataset": "{dataset}",
                "split": "{split}",
                "model": "{model}",
                "seed": "{seed}",
                "file": "metrics.tsv",
            },
        ),
    log:
        "logs/evaluate/{dataset}.{split}.{model}.seed_{seed}.log",
    benchmark:
        "benchmarks/evaluate/{dataset}.{split}.{model}.seed_{seed}.tsv"
    group:
        submitted_together
    conda:
        "../envs/data.yaml"
    threads: 1
    resources:
        mem_mb=memory_by_input(0.4, least=1500, per_scored=0.25),
        runtime=runtime_by_input(15),
    params:
        code_version=code("perturbflow.evaluation.table:evaluate"),
        made_of=made_of("evaluate"),
    script:
        "../scripts/evaluate.py"
