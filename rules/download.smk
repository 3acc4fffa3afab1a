rule download:
    """Retrieve a screen's files byte for byte and verify size and checksum."""
    output:
        manifest="resources/{dataset}/raw/manifest.json",
    log:
        "logs/download/{dataset}.log",
    benchmark:
        "benchmarks/download/{dataset}.tsv"
    conda:
        "../envs/data.yaml"
    threads: 1
    resources:
        mem_mb=1000,
        runtime="12h",
    params:
        files=source_files,
        lineage=lineage("download"),
    script:
        "../scripts/download.py"
