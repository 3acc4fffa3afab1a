rule prior:
    """Turn public knowledge of all genes into vectors, once for all datasets and splits."""
    input:
        raw=prior_files,
        again=again("prior"),
    output:
        embedding="resources/{dataset}/embedding.parquet",
    log:
        "logs/prior/{dataset}.log",
    benchmark:
        "benchmarks/prior/{dataset}.tsv"
    wildcard_constraints:
        dataset=one_of(plan.config["priors"]),
    conda:
        "../envs/data.yaml"
    threads: 1
    resources:
        mem_mb=memory(4000),
        runtime="1h",
    params:
        kind=prior_kind,
        roles=prior_roles,
        organism=prior_organism,
        code_version=code("perturbflow.priors:prior", prior_reader),
        made_of=made_of("prior"),
    script:
        "../scripts/prior.py"
