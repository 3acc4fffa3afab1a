"""Splits: whatever the labels, nothing of a held-out perturbation is in training, and every cell has one place."""

import json
import random
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from conftest import Prepared
from hypothesis import given, settings
from hypothesis import strategies as st

from perturbflow.errors import InputError
from perturbflow.splits import (
    CONTROL_FRACTIONS,
    ROLES,
    divide_controls,
    from_file,
    members_seen,
    names_digest,
    split,
    unseen_combination,
    unseen_perturbation,
)
from perturbflow.symbols import CONTROL, members_of

KINDS = {"unseen_perturbation": unseen_perturbation, "unseen_combination": unseen_combination}

GENES = [f"G{i:02d}" for i in range(14)]
pairs_of_genes = st.tuples(st.sampled_from(GENES), st.sampled_from(GENES)).filter(lambda two: two[0] < two[1]).map("+".join)
screens = st.tuples(st.sets(st.sampled_from(GENES), min_size=5), st.sets(pairs_of_genes, min_size=3, max_size=15)).map(
    lambda both: sorted(both[0] | both[1])
)
fractions = st.sampled_from([(0.1, 0.0), (0.25, 0.1), (0.5, 0.1), (0.3, 0.3)])
seeds = st.integers(0, 5)


@pytest.mark.parametrize("kind", KINDS)
@given(labels=screens, fraction=fractions, seed=seeds)
@settings(max_examples=60, deadline=None)
def test_every_perturbation_has_one_role(kind: str, labels: list[str], fraction: tuple[float, float], seed: int) -> None:
    roles = KINDS[kind](labels, *fraction, seed)
    assert set(roles) == set(ROLES)
    assert sorted(label for role in ROLES for label in roles[role]) == labels
    for listed in roles.values():
        assert all(members_of(label) == sorted(members_of(label)) for label in listed)


@pytest.mark.parametrize("kind", KINDS)
@given(labels=screens, fraction=fractions, seed=seeds, shuffling=st.randoms(use_true_random=False))
@settings(max_examples=40, deadline=None)
def test_roles_depend_on_the_seed_and_not_on_the_order_of_labels(
    kind: str, labels: list[str], fraction: tuple[float, float], seed: int, shuffling: random.Random
) -> None:
    shuffled = list(labels)
    shuffling.shuffle(shuffled)
    first, second = KINDS[kind](labels, *fraction, seed), KINDS[kind](shuffled, *fraction, seed)
    assert {role: set(listed) for role, listed in first.items()} == {role: set(listed) for role, listed in second.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_another_seed_holds_out_others(kind: str) -> None:
    labels = [*GENES, *[f"{a}+{b}" for a, b in pairwise(GENES)]]
    assert len({tuple(sorted(KINDS[kind](labels, 0.3, 0.1, seed)["test"])) for seed in range(5)}) > 1


@given(labels=screens, fraction=fractions, seed=seeds)
@settings(max_examples=60, deadline=None)
def test_a_held_out_gene_is_in_no_training_perturbation(labels: list[str], fraction: tuple[float, float], seed: int) -> None:
    roles = unseen_perturbation(labels, *fraction, seed)
    genes = {role: {gene for label in roles[role] for gene in members_of(label)} for role in ROLES}
    held_out = {
        gene for role in ("validation", "test") for label in roles[role] if len(members_of(label)) == 1 for gene in members_of(label)
    }
    assert not held_out & genes["train"]
    for label in [*roles["validation"], *roles["test"]]:
        assert set(members_of(label)) - genes["train"], f"{label} holds nothing unseen"
    tested = {gene for label in roles["test"] if len(members_of(label)) == 1 for gene in members_of(label)}
    assert not tested & genes["validation"], "a test gene would choose the model"


@given(labels=screens, fraction=fractions, seed=seeds)
@settings(max_examples=60, deadline=None)
def test_all_singles_are_in_training_where_combinations_are_held_out(labels: list[str], fraction: tuple[float, float], seed: int) -> None:
    roles = unseen_combination(labels, *fraction, seed)
    assert {label for label in labels if "+" not in label} <= set(roles["train"])
    n = sum("+" in label for label in labels)
    assert len(roles["test"]) == min(n, max(1, round(fraction[0] * n)))


def test_the_fractions_are_of_perturbed_genes() -> None:
    roles = unseen_perturbation([f"P{i}" for i in range(40)], 0.25, 0.1, 0)
    assert {role: len(listed) for role, listed in roles.items()} == {"train": 26, "validation": 4, "test": 10}


def test_too_few_for_a_split_is_explained() -> None:
    with pytest.raises(InputError, match=r"at least 3 perturbed genes; this screen has 2: A, B"):
        unseen_perturbation(["A", "B", "A+B"], 0.3, 0.1, 0)
    with pytest.raises(InputError, match=r"at least 2 combinations \(A\+B\); this screen has 1.*combinations: false"):
        unseen_combination(["A", "B", "A+B"], 0.5, 0.1, 0)


@pytest.mark.parametrize(("label", "n"), [("A", 1), ("C", 0), ("A+B", 2), ("A+C", 1), ("C+D", 0)])
def test_members_seen_counts_what_was_measured_alone(label: str, n: int) -> None:
    assert members_seen(label, ["A", "B", "D+E"]) == n


# --- controls -------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(3, 40), min_size=1, max_size=6), seeds)
@settings(max_examples=40, deadline=None)
def test_controls_are_divided_within_batch_and_cell_type(sizes: list[int], seed: int) -> None:
    strata = [(f"batch {i // 2}", f"type {i % 2}") for i, size in enumerate(sizes) for _ in range(size)]
    obs = pd.DataFrame(strata, columns=["batch", "cell_type"], index=[f"cell_{i}" for i in range(len(strata))])
    roles = divide_controls(obs, seed)
    assert roles.notna().all()
    counts = pd.crosstab([obs["batch"], obs["cell_type"]], roles)
    assert set(counts.columns) == set(ROLES)
    assert (counts >= 1).all().all(), "every role has controls in every batch and cell type"
    shuffled = obs.sample(frac=1, random_state=1)
    assert divide_controls(shuffled, seed)[obs.index].equals(roles), "the order of cells plays no part"


def test_large_strata_are_divided_by_fractions() -> None:
    obs = pd.DataFrame({"batch": "b", "cell_type": "t"}, index=[f"cell_{i}" for i in range(1000)])
    assert divide_controls(obs, 0).value_counts().to_dict() == {"train": 500, "validation": 200, "test": 300}


# --- split.json -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_split_json_places_every_cell_once(kind: str, prepared: dict[str, Prepared]) -> None:
    content = json.loads(prepared[kind].split.read_text())
    obs = ad.read_h5ad(prepared[kind].harmonized).obs
    assert sorted(cell for role in ROLES for cell in content["cells"][role]) == sorted(obs.index)
    for role in ROLES:
        of_role = obs.loc[content["cells"][role]]
        assert set(of_role["perturbation"]) - {CONTROL} == set(content["perturbations"][role])
        assert of_role["is_control"].sum() == content["controls"][role] > 0
        assert of_role.loc[of_role["is_control"], "batch"].nunique() == 2
        assert content["sha256"][role]["cells"] == names_digest(of_role.index.tolist())
        assert content["sha256"][role]["perturbations"] == names_digest(content["perturbations"][role])
    held_out = [*content["perturbations"]["validation"], *content["perturbations"]["test"]]
    assert content["members_seen"] == {label: members_seen(label, content["perturbations"]["train"]) for label in held_out}
    assert content["name"] == "mine"
    assert content["left_out"] == []


def test_a_digest_of_names_ignores_their_order() -> None:
    assert names_digest(["a", "b"]) == names_digest(["b", "a"])
    assert names_digest(["a", "b"]) != names_digest(["a", "b", "c"])
    assert names_digest(["a", "b"]) != names_digest(["ab"])


def test_the_order_of_cells_in_the_screen_plays_no_part(prepared: dict[str, Prepared], tmp_path: Path) -> None:
    here = prepared["unseen_perturbation"]
    adata = ad.read_h5ad(here.harmonized)
    adata[np.random.default_rng(0).permutation(adata.n_obs)].copy().write_h5ad(tmp_path / "shuffled.h5ad")
    spec = json.loads(here.split.read_text())["spec"]
    split(tmp_path / "shuffled.h5ad", here.harmonization, tmp_path / "split.json", "mine", spec)
    assert (tmp_path / "split.json").read_text() == here.split.read_text()


# --- a split of the user's own --------------------------------------------------------------------------------------

LABELS = ["A", "A+B", "B", "C", "D", "E"]


@pytest.fixture
def read(tmp_path: Path) -> Callable[..., dict]:
    """Return a function that reads roles from a split file with this content."""

    def call(content: object, dropped: dict[str, int] | None = None, fraction: float = 0.25, seed: int = 0) -> dict:
        path = tmp_path / "roles.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return from_file(path, LABELS, dropped or {}, fraction, seed, "human")

    return call


def test_a_file_says_the_roles(read: Callable) -> None:
    content = {"train": ["A", "B", "C"], "validation": ["D"], "test": ["B+A"]}
    assert read(content) == {"train": ["A", "B", "C"], "validation": ["D"], "test": ["A+B"]}


def test_labels_of_a_file_are_made_canonical(read: Callable) -> None:
    content = {"train": ["C+control", "B", "control", "B"], "validation": ["D"], "test": ["B+A"]}
    assert read(content) == {"train": ["B", "C"], "validation": ["D"], "test": ["A+B"]}


def test_renamed_symbols_are_understood_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "roles.json"
    path.write_text(json.dumps({"train": ["AARS"], "validation": ["B"], "test": ["KIAA1804+AARS"]}))
    roles = from_file(path, ["AARS1", "AARS1+MAP3K21", "B"], {}, 0.1, 0, "human")
    assert roles == {"train": ["AARS1"], "validation": ["B"], "test": ["AARS1+MAP3K21"]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"train": ["A"], "test": ["Aa+B"]}, r"'Aa\+B' in 'test'.*no such perturbation; nearest: A\+B"),
        ({"train": ["A", ""], "test": ["B"]}, r"'' in 'train' cannot be used"),
        ({"train": ["A", "B"], "test": ["B"]}, r"B in both 'train' and 'test'"),
        ({"train": ["A", "A+B"], "test": ["B+A"]}, r"A\+B in both 'train' and 'test'"),
        ({"train": ["A"], "validation": ["C"], "test": ["C"]}, r"C in both 'validation' and 'test'"),
        ({"train": [], "test": ["B"]}, "'train' is empty"),
        ({"train": ["A"]}, "'test' is empty"),
        ({"train": ["A"], "tset": ["B"]}, r"unknown key \['tset'\].*train, validation and test"),
        ({"train": "A", "test": ["B"]}, "'train' must be a list of labels"),
        ({"train": [1], "test": ["B"]}, "'train' must be a list of labels"),
        ("train: [A]", "is not valid JSON"),
        (["A"], "a JSON object is expected, found a list"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_used_is_explained(content: object, message: str, read: Callable) -> None:
    with pytest.raises(InputError, match=message) as raised:
        read(content)
    assert "roles.json" in str(raised.value)


def test_a_label_that_quality_control_dropped_is_told_so(read: Callable) -> None:
    with pytest.raises(InputError, match=r"'GONE' in 'test'.*dropped by qc.min_cells_per_perturbation \(12 cells\)"):
        read({"train": ["A"], "test": ["GONE"]}, dropped={"GONE": 12})


@pytest.mark.parametrize("validation", [{"validation": []}, {}])
def test_without_validation_a_share_of_training_serves_by_seed(validation: dict, read: Callable) -> None:
    content = {"train": ["A", "B", "C", "D"], "test": ["E"], **validation}
    roles = read(content)
    assert len(roles["validation"]) == 1
    assert sorted(roles["train"] + roles["validation"]) == ["A", "B", "C", "D"]
    assert roles["test"] == ["E"]
    assert read(content) == roles
    assert len({tuple(read(content, seed=seed)["validation"]) for seed in range(8)}) > 1


def test_perturbations_that_a_file_does_not_name_are_left_out(prepared: dict[str, Prepared], tmp_path: Path) -> None:
    here = prepared["unseen_combination"]
    (tmp_path / "roles.json").write_text(json.dumps({"train": ["TF1", "TF2", "TF3"], "validation": ["TF4"], "test": ["TF2+TF1"]}))
    spec = {"kind": "file", "path": str(tmp_path / "roles.json"), "validation_fraction": 0.1, "seed": 0}
    split(here.harmonized, here.harmonization, tmp_path / "split.json", "frozen", spec)
    content = json.loads((tmp_path / "split.json").read_text())
    assert content["perturbations"]["test"] == ["TF1+TF2"]
    assert content["members_seen"] == {"TF1+TF2": 2, "TF4": 0}
    assert {"TF5", "TF3+TF4"} <= set(content["left_out"])
    obs = ad.read_h5ad(here.harmonized).obs
    placed = [cell for role in ROLES for cell in content["cells"][role]]
    assert set(obs.loc[placed, "perturbation"]) == {CONTROL, "TF1", "TF2", "TF3", "TF4", "TF1+TF2"}


def test_batches_with_few_controls_are_divided_together() -> None:
    for per_batch in (1, 2):
        obs = pd.DataFrame({"batch": [f"b{i}" for i in range(60) for _ in range(per_batch)], "cell_type": "x"})
        obs.index = [f"cell_{i}" for i in range(len(obs))]
        shares = divide_controls(obs, seed=0).value_counts(normalize=True)
        assert {role: pytest.approx(shares[role], abs=0.02) for role in CONTROL_FRACTIONS} == CONTROL_FRACTIONS
