rule harmonize:
    """Bring a screen to one schema: raw counts, canonical labels, approved symbols."""
    input:
        raw=raw_file,
    output:
        harmonized="results/{dataset}/harmonized.h5ad",
        report="results/{dataset}/harmonization.json",
    log:
        "logs/harmonize/{dataset}.log",
    benchmark:
        "benchmarks/harmonize/{dataset}.tsv"
    conda:
        "../envs/data.yaml"
    threads: 1
    resources:
        mem_mb=harmonize_memory,
        runtime="4h",
    params:
        name="{dataset}",
        dataset=dataset_block,
        qc=quality_control,
        lineage=lineage("harmonize"),
    script:
        "../scripts/harmonize.py"
