rule embeddings:
    """Describe every perturbed gene by numbers."""
    input:
        embedding_tables,
        pairs="results/{dataset}/{split}/pairs.h5ad",
        priors=collect("resources/{prior}/embedding.parquet", prior=plan.priors),
        again=again("embeddings"),
    output:
        embeddings="results/{dataset}/{split}/embeddings.parquet",
    log:
        "logs/embeddings/{dataset}.{split}.log",
    benchmark:
        "benchmarks/embeddings/{dataset}.{split}.tsv"
    conda:
        "../envs/data.yaml"
    threads: 1
    resources:
        mem_mb=memory_by_input(0.2, least=1500),
        runtime=runtime_by_input(10),
    params:
        sources=plan.config["embeddings"]["sources"],
        code_version=code("perturbflow.embeddings:embeddings"),
        made_of=made_of("embeddings"),
    script:
        "../scripts/embeddings.py"


rule gene_vectors:
    """Describe every gene that any source knows, for what-if questions about genes that the screen does not perturb."""
    input:
        embedding_tables,
        pairs="results/{dataset}/{split}/pairs.h5ad",
        harmonized="results/{dataset}/harmonized.h5ad",
        split="results/{dataset}/{split}/split.json",
        embeddings="results/{dataset}/{split}/embeddings.parquet",
        priors=collect("resources/{prior}/embedding.parquet", prior=plan.priors),
        again=again("gene_vectors"),
    output:
        gene_vectors="results/{dataset}/{split}/gene_vectors.parquet",
    log:
        "logs/gene_vectors/{dataset}.{split}.log",
    benchmark:
        "benchmarks/gene_vectors/{dataset}.{split}.tsv"
    conda:
        "../envs/data.yaml"
    threads: 1
    resources:
        mem_mb=memory_by_input(0.5, least=2000),
        runtime=runtime_by_input(10),
    params:
        sources=plan.config["embeddings"]["sources"],
        code_version=code("perturbflow.embeddings:gene_vectors"),
        made_of=made_of("gene_vectors"),
    script:
        "../scripts/gene_vectors.py"
