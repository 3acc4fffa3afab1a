rule pair:
    """Select genes on training cells, normalize, and match controls within roles."""
    input:
        harmonized="results/{dataset}/harmonized.h5ad",
        split="results/{dataset}/{split}/split.json",
        again=again("pair"),
    output:
        pairs="results/{dataset}/{split}/pairs.h5ad",
    log:
        "logs/pair/{dataset}.{split}.log",
    benchmark:
        "benchmarks/pair/{dataset}.{split}.tsv"
    conda:
        "../envs/data.yaml"
    threads: 1
    resources:
        mem_mb=memory_by_input(0.3, least=1500),
        runtime=runtime_by_input(10),
    params:
        n_hvg=plan.config["genes"]["n_hvg"],
        code_version=code("perturbflow.pairs:pair"),
        made_of=made_of("pair"),
    script:
        "../scripts/pair.py"
