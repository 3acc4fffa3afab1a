"""A union through every kind of split: roles, pairs and the audit."""

import json
import shutil
from pathlib import Path

import anndata as ad
import pandas as pd
from conftest import Prepared

from perturbflow.embeddings import embeddings
from perturbflow.io.files import read_json
from perturbflow.pairs import pair
from perturbflow.splits.split import split

SHARES = {"validation_fraction": 0.2, "seed": 0}
OF_CONTEXTS = {"kind": "unseen_context", "covariate": "dataset", **SHARES}
KINDS = ("unseen_perturbation", "unseen_context", "zero-shot", "few-shot", "unseen_perturbation_in_context",
         "random_cells", "file")  # fmt: skip


def spec_of(kind: str, held_out: str, labels: list[str], folder: Path) -> dict:
    """Return the block of a split: a member is held out, or some labels."""
    (folder / "roles.json").write_text(json.dumps({"test": labels[:2]}))
    return {
        "unseen_perturbation": {"kind": kind, "test_fraction": 0.3, **SHARES},
        "unseen_context": {**OF_CONTEXTS, "held_out": [held_out]},
        "zero-shot": {**OF_CONTEXTS, "held_out": [held_out], "support_fraction": 0},
        "few-shot": {**OF_CONTEXTS, "held_out": [held_out], "support_fraction": 0.3},
        "unseen_perturbation_in_context": {"kind": kind, "covariate": "dataset", "test_fraction": 0.5, **SHARES},
        "random_cells": {"kind": kind, "test_fraction": 0.3, **SHARES},
        "file": {"kind": kind, "path": str(folder / "roles.json"), **SHARES},
    }[kind]


def prepared_from(union: Path, folder: Path, kind: str, held_out: str) -> tuple[pd.DataFrame, dict, dict]:
    """Split a united screen, pair and audit it; return obs of the pairs, split.json and audit.json."""
    folder.mkdir(parents=True, exist_ok=True)
    here = Prepared(folder)
    for name in ("harmonized.h5ad", "harmonization.json"):
        shutil.copyfile(union / name, folder / name)
    labels = sorted(set(read_json(here.harmonization)["perturbations"]["kept"]) - {"control"})
    split(here.harmonized, here.harmonization, here.split, kind, spec_of(kind, held_out, labels, folder))
    pair(here.harmonized, here.split, here.pairs, 40)
    embeddings(here.pairs, here.embeddings, ["coexpression"])
    here.run_audit()
    return ad.read_h5ad(here.pairs, backed="r").obs, read_json(here.split), read_json(here.audit)


def check(kind: str, held_out: str, obs: pd.DataFrame, roles: dict, audit: dict) -> None:
    """Check what a kind of split promises of a union."""
    assert set(audit["checks"].values()) <= {"passed"}, audit
    perturbed = obs[~obs["is_control"]]
    place = set(zip(perturbed["perturbation"], perturbed["dataset"], perturbed["role"], strict=True))
    trained = {(label, where) for label, where, role in place if role == "train"}
    tested = {(label, where) for label, where, role in place if role == "test"}
    assert trained
    assert tested
    if kind in ("unseen_context", "zero-shot", "few-shot"):
        assert {where for _, where in tested} == {held_out}
        assert bool({label for label, where in trained if where == held_out}) == (kind == "few-shot")
        controls = obs[obs["is_control"] & (obs["dataset"] == held_out)]
        assert ("train" in set(controls["role"])) == (kind != "unseen_context")
    if kind in ("unseen_perturbation", "file"):
        assert not {label for label, _ in trained} & {label for label, _ in tested}
    if kind != "random_cells":
        assert not trained & tested
    if kind == "unseen_perturbation_in_context":
        assert roles["n_sources"] == {
            label: len({where for other, where in trained if other == label}) for label, _ in tested
        }
