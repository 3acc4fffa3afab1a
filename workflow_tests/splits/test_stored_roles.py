"""The role of every cell, by name or in two bits: both say the same, and a split of another screen is told."""

import json

import numpy as np
import pandas as pd
import pytest
from conftest import Prepared

from perturbflow import pairs
from perturbflow.audit.audit import audit
from perturbflow.errors import InputError
from perturbflow.splits import stored_roles as cells
from perturbflow.splits.split import split
from perturbflow.splits.stored_roles import roles_of_cells, stored_roles


@pytest.mark.parametrize("n", [1, 3, 4, 4001])
def test_two_bits_of_a_cell_say_what_its_name_says(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    names, code = pd.Index([f"cell_{i}" for i in range(n)]), np.random.default_rng(n).integers(-1, 3, n)
    for most in (n, n - 1):
        monkeypatch.setattr(cells, "MOST_NAMED", most)
        stored = json.loads(json.dumps(stored_roles(names, code)))
        assert list(stored) == ["cells" if most == n else "role_of_row"]
        assert np.array_equal(roles_of_cells(stored, names), code)
    assert len(stored["role_of_row"]) <= n / 3 + 4


def test_a_split_of_another_screen_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cells, "MOST_NAMED", 0)
    names = pd.Index(map(str, range(40)))
    stored = {"name": "mine", **stored_roles(names, np.zeros(40, int))}
    with pytest.raises(InputError, match="mine divides another screen than this one of 30 cells"):
        roles_of_cells(stored, names[:30])


def test_pairs_and_audit_of_a_large_screen_are_those_of_a_small_one(
    prepared: dict[str, Prepared], tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, folder = prepared["unseen_perturbation"], tmp_path_factory.mktemp("large")
    known = json.loads(here.split.read_text())
    monkeypatch.setattr(cells, "MOST_NAMED", 0)
    split(here.harmonized, here.harmonization, folder / "split.json", known["name"], known["spec"])
    stored = json.loads((folder / "split.json").read_text())
    assert {key: value for key, value in known.items() if key != "cells"} == {
        key: value for key, value in stored.items() if key != "role_of_row"
    }
    screens = [pairs.Screen.open(here.harmonized, content) for content in (known, stored)]
    pd.testing.assert_frame_equal(*(screen.obs for screen in screens))
    pairs.pair(here.harmonized, folder / "split.json", folder / "pairs.h5ad", 40)
    files = here.harmonized, folder / "split.json", folder / "pairs.h5ad", here.embeddings, folder / "audit.json"
    audit(*files)
    assert set(json.loads(files[-1].read_text())["checks"].values()) == {"passed"}
