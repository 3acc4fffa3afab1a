"""Learned families for tests: models of the registry with short trainings, and the batches that they learn from."""

from pathlib import Path

import torch
import yaml

from perturbflow.embeddings import Embeddings
from perturbflow.models.base import Model, Run, build
from perturbflow.models.effects import Effects
from perturbflow.models.latents.pca import LatentSpace
from perturbflow.models.training.batches import PairedCells, encoded
from perturbflow.models.training.conditions import Conditions
from perturbflow.pairs import Pairs
from perturbflow.registry.config import complete
from perturbflow.registry.families import FAMILIES

REPOSITORY = Path(__file__).resolve().parents[2]
LEARNED = ["scppdm", "scppdm_hybrid", "jepa", "counterfactual"]
QUICK = {"n_steps": 600, "batch_size": 64, "n_latent": 24}
QUICK_HYBRID = {**QUICK, "n_steps": 200}  # its network need not learn means
QUICK_JEPA = {**QUICK, "n_steps_representation": 300, "n_steps_decoder": 300}
COMBINATION = "unseen_combination"


def registered(name: str, **changes: object) -> tuple[str, dict]:
    """Return implementation and params of a model of the registry, with some params changed."""
    select = {"datasets": ["renge2023"], "splits": [COMBINATION], "models": [name], "seeds": [0], "counterfactuals": []}
    config: dict = {"select": select, "effort": "standard"}
    for file in ("config", "datasets", "splits", "models", "counterfactuals"):
        config = {**yaml.safe_load((REPOSITORY / f"config/{file}.yaml").read_text()), **config}
    block = complete(config)["models"][name]
    return FAMILIES[block["family"]].implementation, {**block["params"], **changes}


def trained(
    name: str, pairs: Pairs, embeddings: Embeddings, folder: Path, seed: int = 0, **changes: object
) -> tuple[Model, dict, Run]:
    """Return a trained model, its artefact and its run."""
    implementation, params = registered(name, **changes)
    model = build(implementation, params)
    run = Run(seed=seed, threads=1, checkpoints=folder / "checkpoints", identity="test")
    artefact = model.fit(pairs.roles("train", "validation"), embeddings, run)
    return model, artefact, run


def quick(name: str) -> dict:
    """Return params of a short training."""
    return {"jepa": QUICK_JEPA, "scppdm_hybrid": QUICK_HYBRID}.get(name, QUICK)


def small_conditions(n: int = 5, dimensions: int = 3) -> Conditions:
    return Conditions([f"G{i}" for i in range(n)], torch.randn(n, dimensions).numpy())


def make_pairs_of_cells(
    screen: tuple[Pairs, Embeddings], role: str = "train", **changes: object
) -> tuple[PairedCells, Pairs, Conditions]:
    pairs, embeddings = screen
    effects = Effects.of_training(pairs)
    latent = LatentSpace.fit(pairs, effects, 16)
    table = embeddings.standardized(effects.genes)
    conditions = Conditions(list(table.index), table.to_numpy())
    shares = {"control_share": 0.0, "synthetic_share": 0.0, "shifted_share": 0.0, "cells_together": 1, **changes}
    cells = pairs.roles(role)
    return PairedCells(cells, encoded(cells, latent), conditions, **shares), cells, conditions
