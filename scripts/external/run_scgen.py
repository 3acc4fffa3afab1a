"""scGen: a variational autoencoder; a perturbation is a shift of its latent space.

Lotfollahi, Wolf & Theis, Nature Methods 2019, doi:10.1038/s41592-019-0494-8; package scgen 2.1.0.

Options are those of `SCGEN` and of its `train`. config/models.yaml has the package's defaults; `train` has none of its
own, and gets the values of the authors' tutorial. As in its `predict` the shift of a gene is the mean latent of its
cells minus that of the controls. Shifts of a combination's members are added: the authors predict one stimulus at a
time. A gene that training never saw perturbed has no shift.
"""

import numpy as np
import scgen
import scvi
import torch
from contract import CONTROL, Task


def main() -> None:
    """Train, and predict all perturbations whose members have cells of their own."""
    task = Task.handed()
    torch.set_num_threads(task.threads)
    scvi.settings.seed = task.seed
    train = task.train.copy()
    train.X = train.X.toarray()
    train.obs = train.obs[["perturbation", "cell_type"]].astype(str)
    scgen.SCGEN.setup_anndata(train, batch_key="perturbation", labels_key="cell_type")
    options = task.options
    model = scgen.SCGEN(train, **options["model"])
    model.train(use_gpu=task.torch_device() == "cuda", **options["train"])

    labels = train.obs["perturbation"].to_numpy()
    latent = model.get_latent_representation(train)
    centre = {label: latent[labels == label].mean(axis=0) for label in np.unique(labels)}
    controls = task.controls.copy()
    controls.X = controls.X.toarray()
    controls.obs["perturbation"] = CONTROL
    controls.obs = controls.obs.astype({"perturbation": str, "cell_type": str})
    start = model.get_latent_representation(controls)

    starts, predicted = {}, {}
    for label in task.targets.index:
        parts = [label] if label in centre else task.members(label)
        if not set(parts) <= set(centre):
            continue
        shift = sum(centre[part] - centre[CONTROL] for part in parts)
        starts[label] = task.starts(label, options["most_cells"])
        with torch.no_grad():
            moved = torch.tensor(start[starts[label]] + shift, dtype=torch.float32)
            predicted[label] = model.module.generative(moved.to(model.device))["px"].cpu().numpy()
    task.leave_cells(predicted, starts)


if __name__ == "__main__":
    main()
