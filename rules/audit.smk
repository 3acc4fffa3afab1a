rule audit:
    """Look for leaks from held-out cells into training; a leak fails the run."""
    input:
        harmonized="results/{dataset}/harmonized.h5ad",
        split="results/{dataset}/{split}/split.json",
        pairs="results/{dataset}/{split}/pairs.h5ad",
        embeddings="results/{dataset}/{split}/embeddings.parquet",
        again=again("audit"),
    output:
        audit=report(
            "results/{dataset}/{split}/audit.json",
            caption="captions/audit.rst",
            category="Data",
            subcategory="{dataset}",
            labels={"dataset": "{dataset}", "split": "{split}", "file": "audit.json"},
        ),
    log:
        "logs/audit/{dataset}.{split}.log",
    benchmark:
        "benchmarks/audit/{dataset}.{split}.tsv"
    conda:
        "../envs/data.yaml"
    threads: 1
    resources:
        mem_mb=memory_by_input(0.2, least=1500),
        runtime=runtime_by_input(10),
    params:
        code_version=code("perturbflow.audit.audit:audit"),
        made_of=made_of("audit"),
    script:
        "../scripts/audit.py"
