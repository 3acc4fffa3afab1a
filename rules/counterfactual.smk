rule counterfactual:
    """Answer one what-if question with a distribution."""
    input:
        pairs="results/{dataset}/{split}/pairs.h5ad",
        embeddings="results/{dataset}/{split}/embeddings.parquet",
        model=model_file,
    output:
        cells="results/{dataset}/{split}/{model}/seed_{seed}/counterfactuals/{query}.h5ad",
        effects="results/{dataset}/{split}/{model}/seed_{seed}/counterfactuals/{query}.tsv",
    log:
        "logs/counterfactual/{dataset}.{split}.{model}.seed_{seed}.{query}.log",
    benchmark:
        "benchmarks/counterfactual/{dataset}.{split}.{model}.seed_{seed}.{query}.tsv"
    wildcard_constraints:
        query=one_of(plan.config["counterfactuals"]),
    conda:
        "../envs/torch.yaml"
    threads: 1
    resources:
        mem_mb=memory_by_input(20, least=4000),
        runtime="4h",
    params:
        implementation=implementation,
        params=lookup("models/{model}/params", within=plan.config),
        query=lookup("counterfactuals/{query}", within=plan.config),
        seed=lambda wildcards: int(wildcards.seed),
        lineage=lineage("counterfactual"),
    script:
        "../scripts/counterfactual.py"


rule counterfactuals:
    """All selected what-if questions, answered."""
    input:
        collect(
            "results/{run.dataset}/{run.split}/{run.model}/seed_{run.seed}/counterfactuals/{run.query}.tsv",
            run=plan.queries.itertuples(),
        ),
    localrule: True
