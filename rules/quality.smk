rule quality:
    """Describe a screen: cells, controls, own genes, response and escaping cells of every perturbation."""
    input:
        harmonized="results/{dataset}/harmonized.h5ad",
        harmonization="results/{dataset}/harmonization.json",
        again=again("quality"),
    output:
        table=report(
            "results/{dataset}/quality.tsv",
            caption="captions/quality.rst",
            category="Data",
            subcategory="{dataset}",
            labels={"dataset": "{dataset}", "file": "quality.tsv"},
        ),
        account="results/{dataset}/quality.json",
        page=report(
            "results/{dataset}/quality.html",
            caption="captions/quality_page.rst",
            category="Data",
            subcategory="{dataset}",
            labels={"dataset": "{dataset}", "file": "quality.html"},
        ),
    log:
        "logs/quality/{dataset}.log",
    benchmark:
        "benchmarks/quality/{dataset}.tsv"
    conda:
        "../envs/data.yaml"
    threads: 1
    resources:
        mem_mb=memory(4000),
        runtime="4h",
    params:
        code_version=code("perturbflow.quality.step:quality"),
        made_of=made_of("quality"),
    script:
        "../scripts/quality.py"
