"""Inner folds: every one is a split of the same kind, and together they hold out all that can be."""

import numpy as np
import pytest
from conftest import Prepared

from perturbflow.genes.symbols import CONTROL, entities_of, members_of
from perturbflow.io.files import read_json
from perturbflow.pairs import Pairs
from perturbflow.splits.inner import inner_kind, inner_roles


def roles_of(here: Prepared, n_folds: int) -> tuple[Pairs, list]:
    known = Pairs.read(here.pairs).fitted_on("test")
    return known, inner_roles(known.obs, read_json(here.split), n_folds, 0)


def labels_of(known: Pairs, mask: np.ndarray) -> set[str]:
    return set(known.labels[mask]) - {CONTROL}


def test_genes_are_held_out_once_each(prepared):
    known, folds = roles_of(prepared["unseen_perturbation"], 3)
    tested = [labels_of(known, (role == "test").to_numpy()) for role in folds]
    for role, held_out in zip(folds, tested, strict=True):
        trained = labels_of(known, (role == "train").to_numpy())
        entities = {gene for label in trained for gene in entities_of(label)}
        assert all(not entities.issuperset(entities_of(label)) for label in held_out)
    assert set().union(*tested) == labels_of(known, ~known.is_control)


def test_combinations_are_held_out_once_each_and_singles_never(prepared):
    known, folds = roles_of(prepared["unseen_combination"], 2)
    tested = [labels_of(known, (role == "test").to_numpy()) for role in folds]
    assert not tested[0] & tested[1]
    assert tested[0] | tested[1] == {
        label for label in labels_of(known, ~known.is_control) if len(members_of(label)) > 1
    }


@pytest.mark.parametrize("kind", ["unseen_perturbation", "unseen_combination", "random_cells"])
def test_roles_of_a_fold_share_no_cell_and_no_control(kind, prepared):
    known, folds = roles_of(prepared[kind], 2)
    for role in folds:
        cells = known.with_roles(role.to_numpy(), 0)
        for name in ("train", "test"):
            of_role = np.flatnonzero((cells.obs["role"] == name).to_numpy())
            matched = cells.control_index[of_role]
            assert set(cells.obs["role"].iloc[matched[matched >= 0]]) == {name}
        assert (cells.obs.loc[cells.obs["role"] == "test", "half"] == "b").any()
        assert (cells.obs.loc[cells.obs["role"] == "train", "half"] == "").all()


def test_a_list_is_held_out_as_its_test_is():
    split = {"spec": {"kind": "file"}, "perturbations": {"test": ["A+B", "A+C"]}, "members_seen": {"A+B": 2, "A+C": 2}}
    assert inner_kind(split) == "unseen_combination"
    assert inner_kind({**split, "members_seen": {"A+B": 2, "A+C": 1}}) == "unseen_perturbation"
