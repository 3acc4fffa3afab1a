"""CPA: an autoencoder that adds a learned vector per perturbed gene to a latent cell that knows no perturbation.

Lotfollahi et al., Molecular Systems Biology 2023, doi:10.15252/msb.202211517; package cpa-tools 0.8.1, the last that
Python 3.11 takes.

Options are those of `CPA`, of its training plan and of `CPA.train`, with the package's defaults in config/models.yaml.
The authors tune them for each screen: their tutorial on Norman 2019 has a linear doser, adv_steps 2 and reg_adv 50.
CPA knows a gene by cells it was perturbed in: others are not predicted. It gets validation perturbations to stop early.
It predicts the mean and the dispersion of each cell's counts: cells are drawn from these.
"""

import importlib.util
import sys
import types

import anndata as ad
import numpy as np
import pandas as pd
from contract import CONTROL, Task

if importlib.util.find_spec("tkinter") is None:  # a stray import of the package, which uses nothing of it
    sys.modules["tkinter"] = types.SimpleNamespace(N="n")  # type: ignore[assignment]  # a stand-in for a module

import cpa
import scvi
import torch


def with_targets(task: Task, starts: dict[str, np.ndarray]) -> ad.AnnData:
    """Return counts of training cells, and of controls under the label of every perturbation to be predicted.

    CPA wants all labels that it will be asked for when it is set up. It trains on the first ones alone.
    """
    train = task.train
    is_validation = (train.obs["role"] == "validation").to_numpy()
    validation = is_validation if is_validation.any() else np.arange(len(train.obs)) % 10 == 0
    obs = [train.obs.assign(stage=np.where(validation, "test", "train"))]
    X = [train.layers["counts"]]
    for label, rows in starts.items():
        obs.append(task.controls.obs.iloc[rows].assign(perturbation=label, stage="ood"))
        X.append(task.controls.layers["counts"][rows])
    table = pd.concat([part[["perturbation", "cell_type", "batch", "stage"]].astype(str) for part in obs])
    table.index = [f"cell_{i}" for i in range(len(table))]
    return ad.AnnData(np.concatenate([part.toarray() for part in X]).astype(np.float32), table, train.var[[]].copy())


def trained(task: Task, cells: ad.AnnData) -> cpa.CPA:
    """Return a trained model."""
    known = cells.obs[cells.obs["stage"] != "ood"]
    covariates = [
        name
        for name in ("cell_type", "batch")
        if len(known[name].unique()) > 1 and set(cells.obs[name]) <= set(known[name])
    ]
    cpa.CPA.pert_smiles_map = {}  # else this version looks for structures of drugs
    cpa.CPA.setup_anndata(
        cells, perturbation_key="perturbation", control_group=CONTROL, is_count_data=True,
        categorical_covariate_keys=covariates or ["cell_type"],
        max_comb_len=max(len(task.members(label)) for label in cells.obs["perturbation"].unique()),
    )  # fmt: skip
    options = task.options
    model = cpa.CPA(cells, split_key="stage", **options["model"], seed=task.seed)
    # The package's own rule for no number gives a number of numpy, which its trainer refuses.
    epochs = options["train"]["max_epochs"] or min(round(20_000 / cells.n_obs * 400), 400)
    course = {**options["train"], "max_epochs": epochs}
    model.train(use_gpu=task.torch_device() == "cuda", plan_kwargs=options["plan"], **course)
    return model


def drawn(mean: np.ndarray, dispersion: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return counts of the negative binomial with this mean and inverse dispersion, as CPA's likelihood has them."""
    return rng.poisson(rng.gamma(dispersion, mean / dispersion))


def main() -> None:
    """Train, and predict all perturbations of genes that training knows."""
    task = Task.handed()
    torch.set_num_threads(task.threads)
    scvi.settings.seed = task.seed
    can = [label for label in task.targets.index if set(task.members(label)) <= task.known]
    starts = {label: task.starts(label, task.options["most_cells"]) for label in can}
    cells = with_targets(task, starts)
    model = trained(task, cells)
    asked = cells[cells.obs["stage"] == "ood"].copy()
    model.predict(asked, batch_size=512)
    mean = np.maximum(asked.obsm["CPA_pred"], 1e-8)
    dispersion = np.exp(model.module.px_r.detach().cpu().numpy()) if hasattr(model.module, "px_r") else np.inf
    rng, target_sum = np.random.default_rng(task.seed), float(task.train.uns["perturbflow"]["target_sum"])
    predicted = {}
    for label, rows in starts.items():
        counts = drawn(mean[(asked.obs["perturbation"] == label).to_numpy()], dispersion, rng)
        totals = task.controls.obs["total_counts"].to_numpy(float)[rows]
        predicted[label] = np.log1p(counts * (target_sum / totals)[:, None])
    task.leave_cells(predicted, starts)


if __name__ == "__main__":
    main()
