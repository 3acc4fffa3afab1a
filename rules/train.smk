rule train_closed_form:
    """Fit a baseline or a ceiling, or read predictions that were made elsewhere: seconds."""
    input:
        files_of_model("train_closed_form"),
        pairs="results/{dataset}/{split}/pairs.h5ad",
        embeddings="results/{dataset}/{split}/embeddings.parquet",
        audit="results/{dataset}/{split}/audit.json",
        again=again("train_closed_form"),
    output:
        model="results/{dataset}/{split}/{model}/seed_{seed}/model.npz",
        run=report(
            "results/{dataset}/{split}/{model}/seed_{seed}/run.json",
            caption="captions/run.rst",
            category="Runs",
            subcategory="{dataset}, {split}",
            labels={
                "dataset": "{dataset}",
                "split": "{split}",
                "model": "{model}",
                "seed": "{seed}",
                "file": "run.json",
            },
        ),
    log:
        "logs/train/{dataset}.{split}.{model}.seed_{seed}.log",
    benchmark:
        "benchmarks/train/{dataset}.{split}.{model}.seed_{seed}.tsv"
    wildcard_constraints:
        model=one_of(plan.models_of_rule("train_closed_form")),
    # What takes long after a training starts early: trainings come first, then predictions.
    priority: 2
    group:
        submitted_together
    conda:
        "../envs/data.yaml"
    threads: 1
    resources:
        mem_mb=memory_by_input(0.6, least=1500, per_learned=0.2),
        runtime=runtime_by_input(15, least=20),
    params:
        implementation=implementation,
        params=model_params,
        seed=seed,
        scored=plan.config["predict"]["role"],
        code_version=code("perturbflow.train:train", family),
        made_of=made_of("train_closed_form"),
    script:
        "../scripts/train.py"


rule train_diffusion:
    """Train a diffusion model (scPPDM): denoising in a latent of expression, conditioned on cell and perturbation."""
    input:
        files_of_model("train_diffusion"),
        pairs="results/{dataset}/{split}/pairs.h5ad",
        embeddings="results/{dataset}/{split}/embeddings.parquet",
        audit="results/{dataset}/{split}/audit.json",
        again=again("train_diffusion"),
    output:
        model="results/{dataset}/{split}/{model}/seed_{seed}/model.ckpt",
        run=report(
            "results/{dataset}/{split}/{model}/seed_{seed}/run.json",
            caption="captions/run.rst",
            category="Runs",
            subcategory="{dataset}, {split}",
            labels={
                "dataset": "{dataset}",
                "split": "{split}",
                "model": "{model}",
                "seed": "{seed}",
                "file": "run.json",
            },
        ),
    log:
        "logs/train/{dataset}.{split}.{model}.seed_{seed}.log",
    benchmark:
        "benchmarks/train/{dataset}.{split}.{model}.seed_{seed}.tsv"
    wildcard_constraints:
        model=one_of(plan.models_of_rule("train_diffusion")),
    priority: 2
    conda:
        "../envs/torch.yaml"
    # The networks are small: two trainings side by side are faster than one on two threads.
    threads: 1
    resources:
        mem_mb=memory_by_input(0.4, least=3000, per_learned=0.2),
        runtime="12h",
        gpu=gpu,
    params:
        implementation=implementation,
        params=model_params,
        seed=seed,
        scored=plan.config["predict"]["role"],
        device=plan.config["device"],
        logger=of_no_result("logger"),
        code_version=code("perturbflow.train:train", family),
        made_of=made_of("train_diffusion"),
    script:
        "../scripts/train.py"


use rule train_diffusion as train_jepa with:
    """Train a JEPA: predict the embedding of a perturbed cell from that of a control cell and the perturbation."""
    wildcard_constraints:
        model=one_of(plan.models_of_rule("train_jepa")),


use rule train_diffusion as train_counterfactual with:
    """Train a counterfactual model: a flow that carries each control cell to its perturbed state."""
    wildcard_constraints:
        model=one_of(plan.models_of_rule("train_counterfactual")),


# The environment of the script is built where the job runs, once per machine (perturbflow/io/environments.py).
use rule train_closed_form as train_external with:
    """Train a model of others: a script in an environment of its own gets the exported split and leaves predictions."""
    input:
        pairs="results/{dataset}/{split}/pairs.h5ad",
        embeddings="results/{dataset}/{split}/embeddings.parquet",
        audit="results/{dataset}/{split}/audit.json",
        split="results/{dataset}/{split}/split.json",
        again=again("train_external"),
    wildcard_constraints:
        model=one_of(plan.models_of_rule("train_external")),
    resources:
        mem_mb=memory_by_input(40, least=8000),
        runtime="12h",
        gpu=gpu,
    params:
        implementation=implementation,
        params=model_params,
        seed=seed,
        scored=plan.config["predict"]["role"],
        device=plan.config["device"],
        content=content_of_wrapper,
        code_version=code("perturbflow.train:train", family),
        made_of=made_of("train_external"),
