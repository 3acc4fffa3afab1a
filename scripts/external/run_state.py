"""STATE (the transition model): a transformer that maps a set of control cells to a set of perturbed cells.

Adduri et al., bioRxiv 2025, doi:10.1101/2025.06.26.661135; package arc-state 0.11.1.

Options are overrides of `state tx train`, as one writes them on its command line. config/models.yaml names the
package's defaults; the example of the authors' README trains for a tenth of their steps, in batches of 8. It works on
expression itself (no embedding of cells). A perturbation is, by default, one of a list, which says nothing of others.
So it gets the sum over its members of their place in that list and of their vectors.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import torch
from contract import CONTROL, Task

SCREEN = Path("screen").absolute()
COLUMNS = {"gene": "perturbation", "cell_type": "cell_type", "gem_group": "batch"}  # STATE's name → ours


def features(task: Task, labels: list[str]) -> dict[str, torch.Tensor]:
    """Return the vector of every perturbation: members that training knows, and the sum of their vectors."""
    vectors, known = task.vectors(), sorted(task.known)
    place = {gene: i for i, gene in enumerate(known)}
    found = {}
    for label in labels:
        listed = np.zeros(len(known), np.float32)
        listed[[place[member] for member in task.members(label) if member in place]] = 1.0
        summed = vectors.reindex(task.members(label)).fillna(0.0).to_numpy(np.float32).sum(axis=0)
        found[label] = torch.tensor(np.concatenate([listed, summed]))
    return found


def state(*words: str) -> None:
    """Run STATE's command."""
    program = Path(sys.executable).with_name("state")
    start = [str(program)] if program.is_file() else [sys.executable, "-m", "state"]
    # Its checkpoints hold numbers of numpy, which torch loads from a source that is trusted: it is this process.
    variables = {**os.environ, "WANDB_MODE": "disabled", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"}
    subprocess.run([*start, "tx", *words], check=True, env=variables)


def as_state_reads(cells: ad.AnnData, obs: pd.DataFrame) -> ad.AnnData:
    """Return log1p expression with STATE's columns."""
    table = pd.DataFrame({theirs: obs[ours].astype(str).to_numpy() for theirs, ours in COLUMNS.items()})
    table.index = [f"cell_{i}" for i in range(len(table))]
    return ad.AnnData(cells.X, table.astype("category"), cells.var[["gene_name"]])


def write_plan(task: Task) -> Path:
    """Write which perturbations of which cell types validate: all others train."""
    obs = task.train.obs
    held = obs[(obs["role"] == "validation") & ~obs["is_control"].to_numpy(bool)]
    lines = ["[datasets]", f'screen = "{SCREEN}"', "[training]", 'screen = "train"', "[zeroshot]", "[fewshot]"]
    for cell_type, part in held.groupby("cell_type", observed=True):
        lines += [f"[fewshot.{json.dumps(f'screen.{cell_type}')}]", "test = []"]
        lines += [f"val = {json.dumps(sorted(part['perturbation'].astype(str).unique()))}"]
    path = Path("screen.toml").absolute()
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def main() -> None:
    """Train, and predict every perturbation from as many controls as were measured."""
    task = Task.handed()
    SCREEN.mkdir(exist_ok=True)
    for cell_type, rows in task.train.obs.groupby("cell_type", observed=True).indices.items():
        part = task.train[np.sort(rows)]
        as_state_reads(part, part.obs).write_h5ad(SCREEN / f"{str(cell_type).replace('/', '_')}.h5ad")
    labels = sorted({*task.train.obs["perturbation"].astype(str), *task.targets.index, CONTROL})
    torch.save(features(task, labels), "features.pt")
    options = {
        **task.options["overrides"], "data.kwargs.toml_config_path": write_plan(task), "training.train_seed": task.seed,
        "data.kwargs.perturbation_features_file": Path("features.pt").absolute(), "data.kwargs.control_pert": CONTROL,
        "output_dir": Path("trained").absolute(), "name": "model", "use_wandb": "false",
    }  # fmt: skip
    state("train", *[f"{name}={value}" for name, value in options.items()])

    starts = {label: task.starts(label, task.options["most_cells"]) for label in task.targets.index}
    rows = np.concatenate([*starts.values(), np.arange(task.controls.n_obs)])
    names = [label for label, chosen in starts.items() for _ in chosen] + [CONTROL] * task.controls.n_obs
    asked = task.controls[rows]
    as_state_reads(asked, asked.obs.assign(perturbation=names)).write_h5ad("asked.h5ad")
    state(
        "infer", "--model-dir", "trained/model", "--adata", "asked.h5ad", "--pert-col", "gene", "--celltype-col",
        "cell_type", "--batch-col", "gem_group", "--control-pert", CONTROL, "--output", "answered.h5ad", "--seed",
        str(task.seed),
    )  # fmt: skip
    answered = ad.read_h5ad("answered.h5ad")
    X = answered.X if isinstance(answered.X, np.ndarray) else answered.X.toarray()
    is_of = answered.obs["gene"].astype(str).to_numpy()
    task.leave_cells({label: X[is_of == label] for label in starts}, starts)


if __name__ == "__main__":
    main()
