"""GEARS: a graph of genes by co-expression and one of perturbations by gene ontology, and a decoder per gene.

Roohani, Huang & Leskovec, Nature Biotechnology 2024, doi:10.1038/s41587-023-01905-6; package cell-gears 0.1.2.

Options are those of `GEARS.model_initialize` and `GEARS.train`, with the authors' defaults in config/models.yaml. The
file `gene2go` is a tab-separated table of symbol and GO term; without it GEARS downloads its own. Genes without a term
are not in its graph, and are not predicted. GEARS predicts means, here from controls of the scored role.
"""

import pickle
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from contract import Task
from gears import GEARS, PertData
from scipy import sparse

DATA = Path("data")  # GEARS writes its graph of genes there, whatever it is told
GENE2GO, GENES = DATA / "gene2go_all.pkl", DATA / "genes.pkl"
SCREEN = "screen"


def conditions(task: Task, annotated: set[str]) -> dict[str, list[str]]:
    """Return conditions by role, without perturbations that are not in the graph.

    GEARS keeps the epoch that is best on validation perturbations. Where a split has none, a tenth of those of training
    take their place.
    """
    observed = task.train.obs.groupby("role", observed=True)["perturbation"].unique()
    known = {
        role: sorted(label for label in labels if label != "control" and set(task.members(label)) <= annotated)
        for role, labels in observed.items()
    }
    train, validation = known.get("train", []), known.get("validation", [])
    if not validation:
        validation = train[:: max(10, len(train) // 10)]
        train = [label for label in train if label not in validation]
    return {"train": ["ctrl", *map(condition, train)], "val": list(map(condition, validation))}


def condition(label: str) -> str:
    """Return a label as GEARS writes it."""
    return label if "+" in label else f"{label}+ctrl"


def prepared(task: Task) -> PertData:
    """Return the training cells as GEARS reads them, with this split's roles."""
    import anndata as ad

    DATA.mkdir(exist_ok=True)
    if "gene2go" in task.files:
        table = pd.read_csv(task.files["gene2go"], sep="\t", usecols=["symbol", "go_id"])
        with GENE2GO.open("wb") as file:
            pickle.dump(table.groupby("symbol")["go_id"].agg(set).to_dict(), file)
    # The graph of perturbations has all genes that are measured, perturbed, or to be predicted.
    members = [member for label in task.targets.index for member in task.members(label)]
    with GENES.open("wb") as file:
        pickle.dump(sorted({*task.train.var_names, *task.known, *members}), file)
    data = PertData(str(DATA), gene_set_path=str(GENES))
    roles = conditions(task, set(data.gene2go))
    cells = ad.read_h5ad(task.exported / "gears/train.h5ad")
    cells = cells[cells.obs["condition"].isin(roles["train"] + roles["val"])].copy()
    cells.obs = cells.obs[["condition", "cell_type"]].astype(str)
    cells.X = sparse.csr_matrix(cells.X)
    data.new_data_process(SCREEN, cells)
    data.split, data.seed, data.train_gene_set_size, data.set2conditions = "no_test", task.seed, 1.0, roles
    return data


def trained(task: Task, data: PertData) -> GEARS:
    """Return a trained model."""
    options = dict(task.options)
    data.get_dataloader(options.pop("batch_size"), options.pop("test_batch_size"))
    course = {name: options.pop(name) for name in ("epochs", "lr", "weight_decay")}
    # GEARS takes a mean by a mask of pandas, which sparse matrices refuse, and calls toarray later.
    data.adata.X = data.adata.X.toarray()
    model = GEARS(data, device=task.torch_device())
    model.adata.X = sparse.csr_matrix(model.adata.X)
    model.model_initialize(**options)
    model.train(**course)
    return model


def main() -> None:
    """Train, and predict all perturbations whose genes are in the graph."""
    task = Task.handed()
    torch.manual_seed(task.seed)
    np.random.seed(task.seed)  # noqa: NPY002  GEARS draws from it
    torch.set_num_threads(task.threads)
    model = trained(task, prepared(task))
    controls = task.controls.copy()
    controls.obs = controls.obs[[]].assign(condition="ctrl")
    model.adata = controls
    can = [label for label in task.targets.index if set(task.members(label)) <= set(model.pert_list)]
    predicted = model.predict([task.members(label) for label in can])
    task.leave_means({label: predicted["_".join(task.members(label))] for label in can})


if __name__ == "__main__":
    main()
