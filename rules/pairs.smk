rule pairs:
    """Select genes on training cells, normalize, and match controls within roles."""
    input:
        harmonized=ancient("results/{dataset}/harmonized.h5ad"),
        split=ancient("results/{dataset}/{split}/split.json"),
    output:
        pairs="results/{dataset}/{split}/pairs.h5ad",
    log:
        "logs/pairs/{dataset}.{split}.log",
    benchmark:
        "benchmarks/pairs/{dataset}.{split}.tsv"
    conda:
        "../envs/data.yaml"
    threads: 1
    resources:
        mem_mb=memory_by_input(20, least=3000),
        runtime="2h",
    params:
        n_hvg=lookup("genes/n_hvg", within=plan.config),
        lineage=lineage("pairs"),
    script:
        "../scripts/pairs.py"
