rule download:
    """Retrieve a screen's files byte for byte and verify size and checksum."""
    input:
        again=again("download"),
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
        name="{dataset}",
        content=source_content,
        files=source_files,
        mirror=local_mirror,
        code_version=code("perturbflow.download:download"),
        made_of=made_of("download"),
    script:
        "../scripts/download.py"


rule download_check:
    """Ask the hosts of all registered screens and priors for headers, to see that files are there and as declared."""
    output:
        table="results/download_check.tsv",
    log:
        "logs/download_check.log",
    localrule: True
    conda:
        "../envs/data.yaml"
    params:
        datasets={
            name: plan.files(name)
            for name in [*plan.config["datasets"], *plan.config["priors"]]
        },
        # Answers of hosts are of the moment, and so never up to date.
        moment=datetime.now(UTC).isoformat(),
    script:
        "../scripts/download_check.py"
