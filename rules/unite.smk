rule unite:
    """Stream the harmonized screens of a union into one."""
    input:
        members=members_of_union("harmonized.h5ad"),
        accounts=members_of_union("harmonization.json"),
        again=again("unite"),
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
        "logs/unite/{dataset}.log",
    benchmark:
        "benchmarks/unite/{dataset}.tsv"
    wildcard_constraints:
        dataset=one_of(plan.unions),
    conda:
        "../envs/data.yaml"
    threads: 4
    resources:
        mem_mb=memory(3000),
        runtime="4h",
    params:
        name="{dataset}",
        union=union_block,
        note=note_of_dataset,
        code_version=code("perturbflow.screens.unite:unite"),
        made_of=made_of("unite"),
    script:
        "../scripts/unite.py"
