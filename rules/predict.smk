rule predict:
    """Predict cells for every held-out perturbation, each from a test control."""
    input:
        files_of_predictions,
        pairs="results/{dataset}/{split}/pairs.h5ad",
        model=model_file,
        again=again("predict"),
    output:
        predictions="results/{dataset}/{split}/{model}/seed_{seed}/predictions.h5ad",
    log:
        "logs/predict/{dataset}.{split}.{model}.seed_{seed}.log",
    benchmark:
        "benchmarks/predict/{dataset}.{split}.{model}.seed_{seed}.tsv"
    priority: 1
    group:
        submitted_together
    conda:
        "../envs/torch.yaml"
    threads: 1
    resources:
        mem_mb=memory_by_input(0.2, least=1500),
        runtime=runtime_by_input(30, least=30),
    params:
        implementation=implementation,
        params=model_params,
        seed=seed,
        role=plan.config["predict"]["role"],
        max_cells=plan.config["predict"]["max_cells"],
        code_version=code("perturbflow.predict:predict", family),
        made_of=made_of("predict"),
    script:
        "../scripts/predict.py"
