rule split:
    """Divide perturbations, contexts or cells into training, validation and test."""
    input:
        split_files,
        harmonized="results/{dataset}/harmonized.h5ad",
        harmonization="results/{dataset}/harmonization.json",
        again=again("split"),
    output:
        split=report(
            "results/{dataset}/{split}/split.json",
            caption="captions/split.rst",
            category="Data",
            subcategory="{dataset}",
            labels={"dataset": "{dataset}", "split": "{split}", "file": "split.json"},
        ),
    log:
        "logs/split/{dataset}.{split}.log",
    benchmark:
        "benchmarks/split/{dataset}.{split}.tsv"
    conda:
        "../envs/data.yaml"
    threads: 1
    resources:
        mem_mb=memory_by_input(0.5),
        runtime=runtime_by_input(10),
    params:
        name="{split}",
        spec=split_block,
        naming=label_naming,
        code_version=code("perturbflow.splits.split:split"),
        made_of=made_of("split"),
    script:
        "../scripts/split.py"
