"""Where a training runs: which kind of device, and how many of them on how many nodes."""

import os
from typing import Any

import torch
from pytorch_lightning.plugins.environments import ClusterEnvironment, LightningEnvironment, SLURMEnvironment

from perturbflow.errors import InputError
from perturbflow.models.base import Run


def accelerator(device: str) -> str:
    """Return Lightning's word for a device; InputError where it is not there."""
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if device == "auto":
        return "cuda" if available["cuda"] else "cpu"
    if not available[device]:
        raise InputError(f"device: '{device}' is configured but not available here; set device: auto or cpu.")
    return device


def placement(run: Run) -> tuple[dict[str, Any], ClusterEnvironment]:
    """Return the Trainer's arguments for the devices that a training was given, and who starts its processes.

    A job of Snakemake is one task of one node, on SLURM too: with more than one device Lightning starts the other processes, each of which
    runs the whole script again. A job step of several tasks, on one node or more, has them started by srun.

    Raises
    ------
    InputError
        If there are fewer GPUs than the job asked for.
    """
    kind = accelerator(run.device)
    n_tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS", "1"))
    n_nodes = int(os.environ.get("SLURM_STEP_NUM_NODES", "1")) if n_tasks > 1 else 1
    n_devices = n_tasks // n_nodes if n_tasks > 1 else run.devices
    if kind == "cuda" and n_devices > torch.cuda.device_count():
        raise InputError(
            f"{n_devices} GPUs are asked for (resource gpu), and {torch.cuda.device_count()} can be seen here; ask the cluster for as many."
        )
    # Left alone, Lightning takes every job of SLURM for a step of as many tasks as it has devices, and waits for the others.
    environment = SLURMEnvironment(auto_requeue=False) if n_tasks > 1 else LightningEnvironment()
    # A network need not use all it has in every step: a condition may be dropped from a whole batch.
    strategy = "auto" if n_nodes * n_devices == 1 else "ddp_find_unused_parameters_true"
    return {"accelerator": kind, "devices": n_devices, "num_nodes": n_nodes, "strategy": strategy}, environment
