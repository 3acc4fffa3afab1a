rule harmonize:
    """Bring a screen to one schema: raw counts, canonical labels, approved symbols."""
    input:
        labels_of_cells,
        raw=raw_file,
        again=again("harmonize"),
    output:
        harmonized="results/{dataset}/harmonized.h5ad",
        report=report(
            "results/{dataset}/harmonization.json",
            caption="captions/harmonization.rst",
            category="Data",
            subcategory="{dataset}",
            labels={"dataset": "{dataset}", "file": "harmonization.json"},
        ),
    log:
        "logs/harmonize/{dataset}.log",
    benchmark:
        "benchmarks/harmonize/{dataset}.tsv"
    wildcard_constraints:
        dataset=one_of(plan.screens),
    conda:
        "../envs/data.yaml"
    threads: 4
    resources:
        mem_mb=memory(4000),
        runtime="4h",
    params:
        name="{dataset}",
        dataset=dataset_block,
        qc=quality_control,
        code_version=code("perturbflow.screens.harmonize:harmonize", recipe),
        made_of=made_of("harmonize"),
    script:
        "../scripts/harmonize.py"
