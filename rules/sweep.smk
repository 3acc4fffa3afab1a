rule sweep:
    """Search for the params of one model on inner folds of the training cells; a killed sweep goes on where it was."""
    input:
        files_of_model("sweep"),
        pairs="results/{dataset}/{split}/pairs.h5ad",
        embeddings="results/{dataset}/{split}/embeddings.parquet",
        audit="results/{dataset}/{split}/audit.json",
        split="results/{dataset}/{split}/split.json",
        again=again("sweep"),
    output:
        best="results/{dataset}/{split}/sweeps/{model}/best.yaml",
        trials="results/{dataset}/{split}/sweeps/{model}/trials.tsv",
        figure=report(
            "results/{dataset}/{split}/sweeps/{model}/sweep.png",
            caption="captions/sweep.rst",
            category="Sweeps",
            subcategory="{dataset}, {split}",
            labels={
                "dataset": "{dataset}",
                "split": "{split}",
                "model": "{model}",
                "file": "sweep.png",
            },
        ),
    log:
        "logs/sweep/{dataset}.{split}.{model}.log",
    benchmark:
        "benchmarks/sweep/{dataset}.{split}.{model}.tsv"
    wildcard_constraints:
        model=one_of(plan.swept_models),
    conda:
        "../envs/torch.yaml"
    threads: 1
    resources:
        mem_mb=memory_by_input(4, least=4000),
        runtime="24h",
        gpu=gpu,
    params:
        implementation=implementation,
        params=model_params,
        sweep=sweep_block,
        scored=plan.config["predict"]["role"],
        max_cells=plan.config["predict"]["max_cells"],
        device=plan.config["device"],
        code_version=code("perturbflow.sweep:sweep", family),
        made_of=made_of("sweep"),
    script:
        "../scripts/sweep.py"


rule swept:
    """The params of the model of `sweep`, searched on all selected splits."""
    input:
        files_of_sweeps,
    localrule: True
