rule download:
    """Retrieve a screen's file byte for byte and verify size and checksum."""
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
        source=lookup("datasets/{dataset}/source", within=plan.config),
        size=lookup("datasets/{dataset}/bytes", within=plan.config, default=None),
        md5=lookup("datasets/{dataset}/md5", within=plan.config, default=None),
        sha256=lookup("datasets/{dataset}/sha256", within=plan.config, default=None),
        lineage=lineage("download"),
    script:
        "../scripts/download.py"
