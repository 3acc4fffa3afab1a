"""CellFlow: flow matching from control to perturbed cells in principal components, conditioned on vectors of genes.

Klein et al., bioRxiv 2025, doi:10.1101/2025.04.11.648220; package cellflow-tools 0.0.9.

Options are those of `CellFlow.prepare_model` and `CellFlow.train`, with the package's defaults in config/models.yaml.
`num_iterations` has none: 100,000 is ours, which are 5,000 updates at the default of 20 steps each. The vectors of
genes are those of the export: the authors take ESM2's, which a table of yours can bring. Controls and perturbed cells
are matched within batch and cell type.
"""

import anndata as ad
import cellflow
import cellflow.preprocessing as cfp
import jax
import numpy as np
import optax
import pandas as pd
from contract import Task

NONE = "none"  # in the place of a second gene


def members_of(task: Task, labels: list[str], width: int) -> pd.DataFrame:
    """Return one column per member, gene_1 and so on."""
    rows = [(task.members(label) + [NONE] * width)[:width] for label in labels]
    return pd.DataFrame(rows, columns=[f"gene_{i + 1}" for i in range(width)])


def described(task: Task, cells: ad.AnnData, width: int) -> ad.AnnData:
    """Return cells with the columns that CellFlow reads: members, context, and whether they are controls."""
    labels = cells.obs["perturbation"].astype(str).tolist()
    table = members_of(task, labels, width)
    table["context"] = (cells.obs["cell_type"].astype(str) + "|" + cells.obs["batch"].astype(str)).to_numpy()
    table["control"] = cells.obs["is_control"].to_numpy(bool)
    table.index = cells.obs_names
    return ad.AnnData(cells.X, table.astype({name: "category" for name in table if name != "control"}), cells.var)


def trained(task: Task, cells: ad.AnnData, genes: list[str]) -> cellflow.model.CellFlow:
    """Return a trained model."""
    options = task.options
    model = cellflow.model.CellFlow(cells, solver="otfm")
    model.prepare_data(
        sample_rep="X_pca", control_key="control", perturbation_covariates={"gene": tuple(genes)},
        perturbation_covariate_reps={"gene": "vectors"}, split_covariates=["context"],
    )  # fmt: skip
    optimizer = optax.MultiSteps(optax.adam(options["learning_rate"]), options["steps_per_update"])
    model.prepare_model(seed=task.seed, optimizer=optimizer, **options["model"])
    model.train(**options["train"])
    return model


def main() -> None:
    """Train, and predict every perturbation of genes that have a vector."""
    task = Task.handed()
    vectors = task.vectors()
    labels = [*task.train.obs["perturbation"].astype(str).unique(), *task.targets.index]
    width = max(len(task.members(label)) for label in labels)
    is_known = task.train.obs["perturbation"].map(lambda label: set(task.members(label)) <= set(vectors.index))
    cells = described(task, task.train[is_known.to_numpy(bool)], width)
    cfp.centered_pca(cells, n_comps=min(task.options["n_components"], *(size - 1 for size in cells.shape)))
    zero = np.zeros(vectors.shape[1], np.float32)
    cells.uns["vectors"] = {NONE: zero, **dict(zip(vectors.index, vectors.to_numpy(np.float32), strict=True))}
    genes = [f"gene_{i + 1}" for i in range(width)]
    model = trained(task, cells, genes)

    rng, most = np.random.default_rng(task.seed), task.options["most_cells"]
    chosen = np.sort(rng.choice(task.controls.n_obs, min(most, task.controls.n_obs), replace=False))
    controls = described(task, task.controls[chosen], width)
    controls.uns["vectors"] = cells.uns["vectors"]
    cfp.project_pca(controls, ref_adata=cells)
    starts, predicted = {}, {}
    for label in task.targets.index:
        if not set(task.members(label)) <= set(vectors.index):
            continue
        contexts = controls.obs["context"].astype(str).unique()
        asked = pd.concat([members_of(task, [label], width)] * len(contexts), ignore_index=True)
        asked = asked.assign(context=contexts, control=False, name=contexts)
        found = model.predict(controls, covariate_data=asked, sample_rep="X_pca", condition_id_key="name")
        rows = [np.flatnonzero((controls.obs["context"] == context).to_numpy()) for context in found]
        places = np.concatenate([np.asarray(jax.device_get(one)) for one in found.values()])
        moved = ad.AnnData(np.zeros((len(places), cells.n_vars), np.float32), obsm={"X_pca": places})
        cfp.reconstruct_pca(moved, ref_adata=cells)
        starts[label], predicted[label] = chosen[np.concatenate(rows)], np.asarray(moved.layers["X_recon"])
    task.leave_cells(predicted, starts)


if __name__ == "__main__":
    main()
