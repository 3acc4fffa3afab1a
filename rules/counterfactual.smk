rule warranty:
    """Check a trained model before it answers: placebo, identity, coverage, agreement with the ceiling."""
    input:
        pairs="results/{dataset}/{split}/pairs.h5ad",
        embeddings="results/{dataset}/{split}/embeddings.parquet",
        model=model_file,
        again=again("warranty"),
    output:
        warranty=report(
            "results/{dataset}/{split}/{model}/seed_{seed}/warranty.json",
            caption="captions/warranty.rst",
            category="Runs",
            subcategory="{dataset}, {split}",
            labels={
                "dataset": "{dataset}",
                "split": "{split}",
                "model": "{model}",
                "seed": "{seed}",
                "file": "warranty.json",
            },
        ),
        calibration="results/{dataset}/{split}/{model}/seed_{seed}/calibration.npz",
    log:
        "logs/warranty/{dataset}.{split}.{model}.seed_{seed}.log",
    benchmark:
        "benchmarks/warranty/{dataset}.{split}.{model}.seed_{seed}.tsv"
    conda:
        "../envs/torch.yaml"
    threads: 1
    resources:
        mem_mb=memory_by_input(1, least=2000, per_learned=0.2),
        runtime="4h",
    params:
        implementation=implementation,
        params=model_params,
        seed=seed,
        scored=plan.config["predict"]["role"],
        code_version=code("perturbflow.counterfactuals.warranty:warranty", family),
        made_of=made_of("warranty"),
    script:
        "../scripts/warranty.py"


rule counterfactual:
    """Answer one what-if question with a distribution."""
    input:
        files_of_query,
        gene_vectors="results/{dataset}/{split}/gene_vectors.parquet",
        annotations=annotations_of_query,
        pairs="results/{dataset}/{split}/pairs.h5ad",
        embeddings="results/{dataset}/{split}/embeddings.parquet",
        model=model_file,
        warranty="results/{dataset}/{split}/{model}/seed_{seed}/warranty.json",
        calibration="results/{dataset}/{split}/{model}/seed_{seed}/calibration.npz",
        again=again("counterfactual"),
    output:
        cells="results/{dataset}/{split}/{model}/seed_{seed}/counterfactuals/{query}.h5ad",
        effects=report(
            "results/{dataset}/{split}/{model}/seed_{seed}/counterfactuals/{query}.tsv",
            caption="captions/effects.rst",
            category="What-if",
            subcategory="{query}",
            labels={"query": "{query}", "seed": "{seed}", "file": "effects.tsv"},
        ),
        ranking=report(
            "results/{dataset}/{split}/{model}/seed_{seed}/counterfactuals/{query}.ranking.tsv",
            caption="captions/ranking.rst",
            category="What-if",
            subcategory="{query}",
            labels={"query": "{query}", "seed": "{seed}", "file": "ranking.tsv"},
        ),
        all_effects="results/{dataset}/{split}/{model}/seed_{seed}/counterfactuals/{query}.effects.h5ad",
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
        mem_mb=memory_by_input(1, least=2000),
        runtime="4h",
    params:
        implementation=implementation,
        params=model_params,
        query=query_block,
        roles=roles_of_annotations,
        seed=seed,
        scored=plan.config["predict"]["role"],
        code_version=code("perturbflow.counterfactuals.answers:counterfactual", family),
        made_of=made_of("counterfactual"),
    script:
        "../scripts/counterfactual.py"


rule design:
    """Choose which perturbations of a question to measure next."""
    input:
        files_of_query,
        gene_vectors="results/{dataset}/{split}/gene_vectors.parquet",
        annotations=annotations_of_query,
        pairs="results/{dataset}/{split}/pairs.h5ad",
        embeddings="results/{dataset}/{split}/embeddings.parquet",
        model=model_file,
        again=again("design"),
    output:
        design=report(
            "results/{dataset}/{split}/{model}/seed_{seed}/counterfactuals/{query}.design.tsv",
            caption="captions/design.rst",
            category="What-if",
            subcategory="{query}",
            labels={"query": "{query}", "seed": "{seed}", "file": "design.tsv"},
        ),
    log:
        "logs/design/{dataset}.{split}.{model}.seed_{seed}.{query}.log",
    benchmark:
        "benchmarks/design/{dataset}.{split}.{model}.seed_{seed}.{query}.tsv"
    wildcard_constraints:
        query=one_of(plan.config["counterfactuals"]),
    conda:
        "../envs/torch.yaml"
    threads: 1
    resources:
        mem_mb=memory_by_input(1, least=3000),
        runtime="1h",
    params:
        implementation=implementation,
        params=model_params,
        query=query_block,
        roles=roles_of_annotations,
        seed=seed,
        scored=plan.config["predict"]["role"],
        code_version=code("perturbflow.counterfactuals.design:design", family),
        made_of=made_of("design"),
    script:
        "../scripts/design.py"


rule answer_page:
    """Write one page on a question, to be sent on."""
    input:
        cells="results/{dataset}/{split}/{model}/seed_{seed}/counterfactuals/{query}.h5ad",
        effects="results/{dataset}/{split}/{model}/seed_{seed}/counterfactuals/{query}.tsv",
        ranking="results/{dataset}/{split}/{model}/seed_{seed}/counterfactuals/{query}.ranking.tsv",
        calibration="results/{dataset}/{split}/{model}/seed_{seed}/calibration.npz",
        again=again("answer_page"),
    output:
        answer_page=report(
            "results/{dataset}/{split}/{model}/seed_{seed}/counterfactuals/{query}.html",
            caption="captions/answer_page.rst",
            category="What-if",
            subcategory="{query}",
            labels={"query": "{query}", "seed": "{seed}", "file": "page"},
        ),
    log:
        "logs/answer_page/{dataset}.{split}.{model}.seed_{seed}.{query}.log",
    benchmark:
        "benchmarks/answer_page/{dataset}.{split}.{model}.seed_{seed}.{query}.tsv"
    wildcard_constraints:
        query=one_of(plan.config["counterfactuals"]),
    conda:
        "../envs/data.yaml"
    threads: 1
    resources:
        mem_mb=memory_by_input(5, least=1500),
        runtime="30m",
    params:
        query=query_block,
        code_version=code("perturbflow.report.answer_page:answer_page"),
        made_of=made_of("answer_page"),
    script:
        "../scripts/answer_page.py"


rule draw:
    """Plot an answer: effects with intervals, responding cells, cells before and after, all perturbations together."""
    input:
        cells="results/{dataset}/{split}/{model}/seed_{seed}/counterfactuals/{query}.h5ad",
        effects="results/{dataset}/{split}/{model}/seed_{seed}/counterfactuals/{query}.tsv",
        ranking="results/{dataset}/{split}/{model}/seed_{seed}/counterfactuals/{query}.ranking.tsv",
        again=again("draw"),
    output:
        effects_figure=report(
            "results/{dataset}/{split}/{model}/seed_{seed}/counterfactuals/{query}.effects.png",
            caption="captions/effects_figure.rst",
            category="What-if",
            subcategory="{query}",
            labels={"query": "{query}", "seed": "{seed}", "file": "effects.png"},
        ),
        responders=report(
            "results/{dataset}/{split}/{model}/seed_{seed}/counterfactuals/{query}.responders.png",
            caption="captions/responders.rst",
            category="What-if",
            subcategory="{query}",
            labels={"query": "{query}", "seed": "{seed}", "file": "responders.png"},
        ),
        map=report(
            "results/{dataset}/{split}/{model}/seed_{seed}/counterfactuals/{query}.map.png",
            caption="captions/map.rst",
            category="What-if",
            subcategory="{query}",
            labels={"query": "{query}", "seed": "{seed}", "file": "map.png"},
        ),
        heatmap=report(
            "results/{dataset}/{split}/{model}/seed_{seed}/counterfactuals/{query}.heatmap.png",
            caption="captions/heatmap.rst",
            category="What-if",
            subcategory="{query}",
            labels={"query": "{query}", "seed": "{seed}", "file": "heatmap.png"},
        ),
    log:
        "logs/draw/{dataset}.{split}.{model}.seed_{seed}.{query}.log",
    benchmark:
        "benchmarks/draw/{dataset}.{split}.{model}.seed_{seed}.{query}.tsv"
    wildcard_constraints:
        query=one_of(plan.config["counterfactuals"]),
    conda:
        "../envs/data.yaml"
    threads: 1
    resources:
        mem_mb=memory_by_input(20, least=2000),
        runtime="30m",
    params:
        code_version=code("perturbflow.counterfactuals.figures:draw"),
        made_of=made_of("draw"),
    script:
        "../scripts/draw.py"


rule counterfactuals:
    """All selected what-if questions, answered and drawn, and the warranties of all learned models."""
    input:
        effects=collect(
            "results/{run.dataset}/{run.split}/{run.model}/seed_{run.seed}/counterfactuals/{run.query}.tsv",
            run=plan.queries.itertuples(),
        ),
        figures=collect(
            "results/{run.dataset}/{run.split}/{run.model}/seed_{run.seed}/counterfactuals/{run.query}.{figure}.png",
            run=plan.queries.itertuples(),
            figure=["effects", "responders", "map", "heatmap"],
        ),
        answers=collect(
            "results/{run.dataset}/{run.split}/{run.model}/seed_{run.seed}/counterfactuals/{run.query}.{suffix}",
            run=plan.queries.itertuples(),
            suffix=["h5ad", "ranking.tsv", "effects.h5ad", "html"],
        ),
        designs=collect(
            "results/{run.dataset}/{run.split}/{run.model}/seed_{run.seed}/counterfactuals/{run.query}.design.tsv",
            run=designs().itertuples(),
        ),
        calibrations=collect(
            "results/{run.dataset}/{run.split}/{run.model}/seed_{run.seed}/calibration.npz",
            run=plan.warranties.itertuples(),
        ),
        warranties=collect(
            "results/{run.dataset}/{run.split}/{run.model}/seed_{run.seed}/warranty.json",
            run=plan.warranties.itertuples(),
        ),
    localrule: True
