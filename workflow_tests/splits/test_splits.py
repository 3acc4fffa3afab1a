"""Splits: whatever the labels, nothing of a held-out perturbation is in training, and every cell has one place."""

import json
import pickle
import random
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from conftest import COMBINATIONS, PERTURBED, REPOSITORY, SPECS, SPECS_OF_CELLS, Prepared
from hypothesis import given, settings
from hypothesis import strategies as st

from perturbflow import embeddings, pairs
from perturbflow.errors import InputError
from perturbflow.genes.symbols import CONTROL, canonical_label, entities_of, entity_of, members_of
from perturbflow.registry.places import own_or_shipped
from perturbflow.splits.cells import CONTROL_FRACTIONS, divide_controls, random_cells
from perturbflow.splits.contexts import Support, unseen_context
from perturbflow.splits.divisions import (
    DIVISIONS,
    ROLES,
    Shares,
    members_seen,
    unseen_combination,
    unseen_dose,
    unseen_perturbation,
)
from perturbflow.splits.named import Labels, held_out_names
from perturbflow.splits.split import (
    GENERALIZATION,
    LABEL_KINDS,
    listed,
    names_digest,
    split,
)

KINDS = {"unseen_perturbation": unseen_perturbation, "unseen_combination": unseen_combination}

GENES = [f"G{i:02d}" for i in range(14)]
pairs_of_genes = (
    st.tuples(st.sampled_from(GENES), st.sampled_from(GENES)).filter(lambda two: two[0] < two[1]).map("+".join)
)
screens = st.tuples(st.sets(st.sampled_from(GENES), min_size=5), st.sets(pairs_of_genes, min_size=3, max_size=15)).map(
    lambda both: sorted(both[0] | both[1])
)
fractions = st.sampled_from([(0.1, 0.0), (0.25, 0.1), (0.5, 0.1), (0.3, 0.3)])
seeds = st.integers(0, 5)


@pytest.mark.parametrize("kind", KINDS)
@given(labels=screens, fraction=fractions, seed=seeds)
@settings(max_examples=60, deadline=None)
def test_every_perturbation_has_one_role(
    kind: str, labels: list[str], fraction: tuple[float, float], seed: int
) -> None:
    roles = KINDS[kind](labels, Shares(*fraction, seed))
    assert set(roles) == set(ROLES)
    assert sorted(label for role in ROLES for label in roles[role]) == labels
    for names in roles.values():
        assert all(members_of(label) == sorted(members_of(label)) for label in names)


@pytest.mark.parametrize("kind", KINDS)
@given(labels=screens, fraction=fractions, seed=seeds, shuffling=st.randoms(use_true_random=False))
@settings(max_examples=40, deadline=None)
def test_roles_depend_on_the_seed_and_not_on_the_order_of_labels(
    kind: str, labels: list[str], fraction: tuple[float, float], seed: int, shuffling: random.Random
) -> None:
    shuffled = list(labels)
    shuffling.shuffle(shuffled)
    first, second = KINDS[kind](labels, Shares(*fraction, seed)), KINDS[kind](shuffled, Shares(*fraction, seed))
    assert {role: set(listed) for role, listed in first.items()} == {
        role: set(listed) for role, listed in second.items()
    }


@pytest.mark.parametrize("kind", KINDS)
def test_another_seed_holds_out_others(kind: str) -> None:
    labels = [*GENES, *[f"{a}+{b}" for a, b in pairwise(GENES)]]
    assert len({tuple(sorted(KINDS[kind](labels, Shares(0.3, 0.1, seed))["test"])) for seed in range(5)}) > 1


@given(labels=screens, fraction=fractions, seed=seeds)
@settings(max_examples=60, deadline=None)
def test_a_held_out_gene_is_in_no_training_perturbation(
    labels: list[str], fraction: tuple[float, float], seed: int
) -> None:
    roles = unseen_perturbation(labels, Shares(*fraction, seed))
    genes = {role: {gene for label in roles[role] for gene in members_of(label)} for role in ROLES}
    held_out = {
        gene
        for role in ("validation", "test")
        for label in roles[role]
        if len(members_of(label)) == 1
        for gene in members_of(label)
    }
    assert not held_out & genes["train"]
    for label in [*roles["validation"], *roles["test"]]:
        assert set(members_of(label)) - genes["train"], f"{label} holds nothing unseen"
    tested = {gene for label in roles["test"] if len(members_of(label)) == 1 for gene in members_of(label)}
    assert not tested & genes["validation"], "a test gene would choose the model"


@given(labels=screens, fraction=fractions, seed=seeds)
@settings(max_examples=60, deadline=None)
def test_all_singles_are_in_training_where_combinations_are_held_out(
    labels: list[str], fraction: tuple[float, float], seed: int
) -> None:
    roles = unseen_combination(labels, Shares(*fraction, seed))
    assert {label for label in labels if "+" not in label} <= set(roles["train"])
    n = sum("+" in label for label in labels)
    assert len(roles["test"]) == min(n, max(1, round(fraction[0] * n)))


def test_the_fractions_are_of_perturbed_genes() -> None:
    roles = unseen_perturbation([f"P{i}" for i in range(40)], Shares(0.25, 0.1, 0))
    assert {role: len(listed) for role, listed in roles.items()} == {"train": 26, "validation": 4, "test": 10}


def test_too_few_for_a_split_is_explained() -> None:
    with pytest.raises(InputError, match=r"at least 3 perturbed genes or compounds; this screen has 2: A, B"):
        unseen_perturbation(["A", "B", "A+B"], Shares(0.3, 0.1, 0))
    with pytest.raises(InputError, match=r"at least 2 combinations \(A\+B\); this screen has 1.*combinations: false"):
        unseen_combination(["A", "B", "A+B"], Shares(0.5, 0.1, 0))


@pytest.mark.parametrize(("label", "n"), [("A", 1), ("C", 0), ("A+B", 2), ("A+C", 1), ("C+D", 0)])
def test_members_seen_counts_what_was_measured_alone(label: str, n: int) -> None:
    assert members_seen({"train": ["A", "D+E"], "validation": ["B"], "test": [label]})[label] == n


def test_what_is_scored_on_validation_did_not_see_validation() -> None:
    roles = {"train": ["A"], "validation": ["B", "A+B"], "test": ["A+B+C"]}
    assert members_seen(roles) == {"B": 0, "A+B": 1, "A+B+C": 2}


# --- doses ----------------------------------------------------------------------------------------------------------

members_at_doses = st.tuples(
    st.sampled_from(GENES[:6]), st.sampled_from(["", "@1", "@10", "@0.5", "@100", "@1e-05"])
).map("".join)
dosed = st.sets(
    st.lists(members_at_doses, min_size=1, max_size=2, unique=True).map(sorted).map("+".join), min_size=8, max_size=40
).map(sorted)


@given(labels=dosed, fraction=fractions, seed=seeds)
@settings(max_examples=80, deadline=None)
def test_all_doses_of_a_compound_go_to_one_side(labels: list[str], fraction: tuple[float, float], seed: int) -> None:
    if len({name for label in labels for name in entities_of(label)}) >= 3:
        roles = unseen_perturbation(labels, Shares(*fraction, seed))
        trained = {name for label in roles["train"] for name in entities_of(label)}
        alone = {role: {entity_of(label) for label in roles[role] if len(members_of(label)) == 1} for role in ROLES}
        assert not (alone["validation"] | alone["test"]) & trained
        assert not alone["validation"] & alone["test"]
    names = {label: tuple(entities_of(label)) for label in labels if len(members_of(label)) > 1}
    if len(set(names.values())) >= 2:
        roles = unseen_combination(labels, Shares(*fraction, seed))
        held = {role: {names[label] for label in roles[role] if label in names} for role in ROLES}
        assert not held["train"] & (held["validation"] | held["test"])
        assert not held["validation"] & held["test"]
        assert {label for label in labels if len(members_of(label)) == 1} <= set(roles["train"])


@given(labels=dosed, fraction=fractions, seed=seeds, folds=st.sampled_from([None, 3, 4]))
@settings(max_examples=80, deadline=None)
def test_a_held_out_dose_leaves_two_others_in_training(
    labels: list[str], fraction: tuple[float, float], seed: int, folds: int | None
) -> None:
    doses = [label for label in labels if len(members_of(label)) == 1 and "@" in label]
    eligible = {label for label in doses if sum(entity_of(other) == entity_of(label) for other in doses) > 2}
    if not eligible:
        with pytest.raises(
            InputError, match=r"at least 3 doses measured alone; this screen has none.*perturbation\.dose"
        ):
            unseen_dose(labels, Shares(*fraction, seed))
        return
    several = (
        [unseen_dose(labels, Shares(None, fraction[1], seed, (i, folds))) for i in range(folds)]
        if folds
        else [unseen_dose(labels, Shares(*fraction, seed))]
    )
    for roles in several:
        assert sorted(label for role in ROLES for label in roles[role]) == labels
        held_out = [label for role in ("validation", "test") for label in roles[role]]
        assert {label for label in held_out if len(members_of(label)) == 1} <= eligible
        for label in held_out:
            assert (
                sum(entity_of(other) == entity_of(label) for other in roles["train"] if other in doses) >= 2
                or "+" in label
            )
        trained = {member for label in roles["train"] for member in members_of(label)}
        assert not trained & set(held_out)
    if folds:
        tested = [label for roles in several for label in roles["test"] if len(members_of(label)) == 1]
        assert sorted(tested) == sorted(eligible)


def test_two_folds_of_three_doses_are_refused() -> None:
    with pytest.raises(
        InputError, match=r"2 folds leave fewer than 2 of the 3 doses of A in training; set folds to 3 or more"
    ):
        unseen_dose(["A@1", "A@2", "A@3"], Shares(None, 0.0, 0, (0, 2)))


def test_a_compound_is_seen_at_whatever_dose() -> None:
    roles = {"train": ["A@1", "B", "C@3+E@1"], "validation": [], "test": ["A@10", "A@5+B@1", "C@1", "D@2"]}
    assert members_seen(roles) == {"A@10": 1, "A@5+B@1": 2, "C@1": 0, "D@2": 0}


# --- folds ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@given(labels=screens, k=st.integers(2, 3), seed=seeds)
@settings(max_examples=40, deadline=None)
def test_everything_is_in_the_test_set_of_one_fold(kind: str, labels: list[str], k: int, seed: int) -> None:
    folds = [KINDS[kind](labels, Shares(None, 0.1, seed, fold=(i, k))) for i in range(k)]
    if kind == "unseen_combination":
        held_out = [label for roles in folds for label in roles["test"]]
        assert sorted(held_out) == sorted(label for label in labels if "+" in label)
    else:
        singles = [label for roles in folds for label in roles["test"] if "+" not in label]
        assert sorted(singles) == sorted(label for label in labels if "+" not in label)
        for roles in folds:
            seen = {gene for label in roles["train"] for gene in members_of(label)}
            assert all(set(members_of(label)) - seen for label in roles["test"])
    for roles in folds:
        assert sorted(label for role in ROLES for label in roles[role]) == labels


def test_every_gene_is_held_out_by_one_fold() -> None:
    labels = [*GENES, *[f"{a}+{b}" for a, b in pairwise(GENES)]]
    folds = [unseen_perturbation(labels, Shares(None, 0.1, 0, fold=(i, 4))) for i in range(4)]
    held_out = [{label for label in roles["test"] if "+" not in label} for roles in folds]
    assert sorted(gene for genes in held_out for gene in genes) == GENES
    assert max(map(len, held_out)) - min(map(len, held_out)) <= 1
    for genes, roles in zip(held_out, folds, strict=True):
        assert {label for label in labels if set(members_of(label)) & genes} == set(roles["test"])


def test_more_folds_than_genes_are_explained() -> None:
    with pytest.raises(InputError, match=r"9 folds cannot be made of 3: A, B, C. Set folds to 3 or fewer"):
        unseen_perturbation(["A", "B", "C"], Shares(None, 0.1, 0, fold=(0, 9)))


# --- contexts and cells ---------------------------------------------------------------------------------------------


def cells_of(contexts: list[str], labels: list[str], n: int = 10, n_controls: int = 12) -> pd.DataFrame:
    """Return obs with n cells per perturbation and context."""
    rows = [
        (label, day)
        for day in contexts
        for label in [CONTROL, *labels]
        for _ in range(n_controls if label == CONTROL else n)
    ]
    obs = pd.DataFrame(rows, columns=["perturbation", "batch"], index=[f"cell_{i}" for i in range(len(rows))])
    return obs.assign(cell_type="t", dataset="d", is_control=obs["perturbation"] == CONTROL)


def context_roles(
    obs: pd.DataFrame, held_out: list | None, test: float, validation: float, seed: int, support: Support | None = None
) -> pd.Series:
    """Return the roles of cells under `unseen_context`, by batch."""
    names = None if held_out is None else {str(name) for name in held_out}
    return unseen_context(obs, "batch", Shares(test, validation, seed, None, names), support)


@given(
    contexts=st.sets(st.sampled_from("abcdef"), min_size=2).map(sorted),
    labels=st.sets(st.sampled_from(GENES), min_size=1, max_size=4).map(sorted),
    n=st.integers(1, 9),
    fraction=fractions,
    seed=seeds,
    shuffling=st.randoms(use_true_random=False),
)
@settings(max_examples=40, deadline=None)
def test_no_cell_of_a_held_out_context_is_elsewhere(
    contexts: list[str], labels: list[str], n: int, fraction: tuple[float, float], seed: int, shuffling: random.Random
) -> None:
    obs = cells_of(contexts, labels, n)
    roles = context_roles(obs, None, *fraction, seed)
    held_out = set(obs.loc[roles == "test", "batch"])
    assert len(held_out) == min(len(contexts) - 1, max(1, round(fraction[0] * len(contexts))))
    assert (obs["batch"].isin(held_out) == (roles == "test")).all(), "all of them, controls included, and nothing else"
    perturbed = ~obs["is_control"]
    shares = pd.crosstab([obs["perturbation"], obs["batch"]], roles[perturbed & (roles != "test")]).reindex(
        columns=["train", "validation"]
    )
    assert ((shares.fillna(0)["validation"] - fraction[1] * n).abs() < 1).all(), (
        "a share of every perturbation × context"
    )
    assert set(roles[obs["is_control"]]) == set(ROLES)
    order = list(obs.index)
    shuffling.shuffle(order)
    assert context_roles(obs.loc[order], None, *fraction, seed)[obs.index].equals(roles), (
        "the order of cells plays no part"
    )


def test_contexts_that_are_named_are_held_out() -> None:
    obs = cells_of(["day_2", "day_3", "day_5"], ["A", "B"])
    roles = context_roles(obs, ["day_5"], 0.9, 0.1, 0)
    assert set(obs.loc[roles == "test", "batch"]) == {"day_5"}
    numbers = context_roles(obs.assign(batch=obs["batch"].str[-1]), [5, 3], 0.9, 0.1, 0)
    assert set(obs.loc[numbers == "test", "batch"]) == {"day_3", "day_5"}


def test_perturbations_that_only_the_held_out_context_has_are_left_out() -> None:
    obs = cells_of(["day_2", "day_5"], ["A", "B"])
    obs = obs[~((obs["perturbation"] == "B") & (obs["batch"] == "day_2"))]
    roles = context_roles(obs, ["day_5"], 0.5, 0.1, 0)
    assert (roles.isna() == (obs["perturbation"] == "B")).all()


@pytest.mark.parametrize(
    ("contexts", "held_out", "change", "message"),
    [
        (["x", "y"], ["day_9"], None, "held_out: day_9 is no value of batch in this screen; its values: x, y"),
        (["x", "y"], ["y", "x"], None, r"held_out names all values of batch \(x, y\); leave at least one"),
        (["x"], None, None, "at least 2 values of batch; this screen has one, 'x'.*covariates.batch.*select.splits"),
        (["x", "y"], ["y"], "y", r"the held-out values of batch \(y\) hold no control cell"),
        (["x", "y"], ["y"], "x", r"the other values of batch \(x\) hold no control cell"),
    ],
)
def test_contexts_that_cannot_be_held_out_are_explained(
    contexts: list, held_out: list | None, change: str | None, message: str
) -> None:
    obs = cells_of(contexts, ["A", "B"])
    obs = obs[~(obs["is_control"] & (obs["batch"] == change))]
    with pytest.raises(InputError, match=message):
        context_roles(obs, held_out, 0.25, 0.1, 0)


@given(n=st.integers(2, 30), fraction=fractions, seed=seeds)
@settings(max_examples=30, deadline=None)
def test_cells_of_every_perturbation_are_divided_by_fractions(n: int, fraction: tuple[float, float], seed: int) -> None:
    obs = cells_of(["b1", "b2"], ["A", "B+C"], n)
    roles = random_cells(obs, *fraction, seed)
    assert roles.notna().all()
    counts = pd.crosstab(obs["perturbation"], roles).reindex(columns=ROLES, fill_value=0)
    for label in ("A", "B+C"):
        for role, share in zip(("test", "validation"), fraction, strict=True):
            assert abs(counts.loc[label, role] - share * 2 * n) < 1
    assert set(pd.crosstab(obs.loc[obs["is_control"], "batch"], roles).columns) >= {"train", "test"}


def test_fractions_that_leave_nothing_to_learn_from_are_explained() -> None:
    with pytest.raises(InputError, match=r"0.7 and validation_fraction 0.3 leave no cell for training"):
        random_cells(cells_of(["b"], ["A"]), 0.7, 0.3, 0)


@pytest.mark.parametrize("kind", ["unseen_context", "random_cells"])
def test_perturbations_of_cell_splits_have_cells_in_several_roles(kind: str, prepared: dict[str, Prepared]) -> None:
    content = json.loads(prepared[kind].split.read_text())
    labels = content["perturbations"]
    assert labels["train"] == labels["test"]
    assert set(content["members_seen"]) == {*labels["validation"], *labels["test"]}
    assert {len(members_of(label)) for label, n in content["members_seen"].items() if n == 2} == {2}
    cells = [cell for role in ROLES for cell in content["cells"][role]]
    assert len(cells) == len(set(cells)) == ad.read_h5ad(prepared[kind].harmonized).n_obs
    assert content["n_cells_left_out"] == 0
    if kind == "unseen_context":
        assert content["contexts"] == {"train": ["b1"], "validation": ["b1"], "test": ["b2"]}


def test_every_split_says_what_its_scores_are_evidence_of(prepared: dict[str, Prepared]) -> None:
    for kind in (*SPECS, *SPECS_OF_CELLS):
        assert json.loads(prepared[kind].split.read_text())["generalization"] == GENERALIZATION[kind]
    assert set(GENERALIZATION) == {*LABEL_KINDS, *SPECS_OF_CELLS}
    assert {*DIVISIONS, "file"} == set(LABEL_KINDS)
    assert "no evidence of generalization" in GENERALIZATION["random_cells"]


def test_an_error_names_the_split(prepared: dict[str, Prepared], tmp_path: Path) -> None:
    here = prepared["unseen_context"]
    spec = {**SPECS_OF_CELLS["unseen_context"], "held_out": ["day_5"]}
    with pytest.raises(
        InputError, match=r"splits.later: held_out: day_5 is no value of batch in this screen; its values: b1, b2"
    ):
        split(here.harmonized, here.harmonization, tmp_path / "split.json", "later", spec)


def test_a_fold_of_a_screen(prepared: dict[str, Prepared], tmp_path: Path) -> None:
    here = prepared["unseen_perturbation"]
    spec = {
        "kind": "unseen_perturbation",
        "folds": 4,
        "fold": 1,
        "name": "genes",
        "validation_fraction": 0.1,
        "seed": 0,
    }
    split(here.harmonized, here.harmonization, tmp_path / "split.json", "genes_fold_1", spec)
    content = json.loads((tmp_path / "split.json").read_text())
    assert content["name"] == "genes_fold_1"
    assert content["spec"] == spec
    assert sum("+" not in label for label in content["perturbations"]["test"]) == 2


# --- a real screen --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("covariate", "held_out"), [("dataset", "mcfaline23"), ("cell_type", "A172")])
def test_a_whole_screen_or_cell_line_is_held_out(
    covariate: str, held_out: str, harmonized_from: Callable, shared_data: Callable, tmp_path: Path
) -> None:
    path = shared_data("norman_k562_mini/perturbench_devel_counts.h5ad")
    merged = harmonized_from(
        path, covariates={"dataset": "dataset", "cell_type": "cell_type"}, qc={"min_cells_per_perturbation": 30}
    )
    obs = merged.adata.obs
    assert set(obs["dataset"]) == {"norman19", "mcfaline23"}
    assert set(obs["batch"]) == {"norman19:unknown", "mcfaline23:unknown"}
    spec = {
        "kind": "unseen_context", "covariate": covariate, "held_out": [held_out],
        "test_fraction": 0.5, "validation_fraction": 0.1, "seed": 0,
    }  # fmt: skip
    here = Prepared(tmp_path)
    split(merged.path, merged.report, here.split, "mine", spec)
    content = json.loads(here.split.read_text())
    assert content["contexts"]["test"] == [held_out]
    elsewhere = set(obs.loc[obs[covariate] != held_out, "perturbation"]) - {CONTROL}
    there = set(obs.loc[obs[covariate] == held_out, "perturbation"]) - {CONTROL}
    assert set(content["perturbations"]["test"]) == there & elsewhere
    assert (
        content["n_cells_left_out"] == obs.loc[obs[covariate] == held_out, "perturbation"].isin(there - elsewhere).sum()
    )
    pairs.pair(merged.path, here.split, here.pairs, 100)
    embeddings.embeddings(here.pairs, here.embeddings, ["coexpression"])
    here.run_audit()
    assert json.loads(here.audit.read_text())["checks"]["no_cell_twice"] == "passed"


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
    assert set(content["members_seen"]) == set(held_out)
    assert content["members_seen"] == members_seen(content["perturbations"])
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
        return listed(path, Labels(LABELS, dropped or {}, "human"), fraction, seed)

    return call


def test_a_file_says_the_roles(read: Callable) -> None:
    content = {"train": ["A", "B", "C"], "validation": ["D"], "test": ["B+A"]}
    assert read(content) == {"train": ["A", "B", "C"], "validation": ["D"], "test": ["A+B"]}


def test_labels_of_a_file_are_made_canonical(read: Callable) -> None:
    content = {"train": ["C+control", "B", "control", "B"], "validation": ["D"], "test": ["B+A"]}
    assert read(content) == {"train": ["B", "C"], "validation": ["D"], "test": ["A+B"]}


def test_without_a_list_for_training_all_others_train(read: Callable) -> None:
    assert read({"validation": ["C"], "test": ["B+A"]}) == {
        "train": ["A", "B", "D", "E"],
        "validation": ["C"],
        "test": ["A+B"],
    }


@pytest.mark.parametrize(
    ("number", "n_seen"), [(1, (9, 43, 19)), (2, (12, 52, 16)), (3, (4, 51, 19)), (4, (4, 52, 18)), (5, (3, 56, 18))]
)
def test_the_published_test_sets_of_gears_have_their_published_sizes(number: int, n_seen: tuple) -> None:
    """Combinations with none, one and both of their genes in training; a quarter of 102 genes is unseen."""
    path = REPOSITORY / own_or_shipped(f"config/splits/gears_norman_{number}.json")
    test = json.loads(path.read_text())["test"]
    unseen = {label for label in test if "+" not in label}
    assert len(unseen) == 26
    found = [sum(gene in unseen for gene in label.split("+")) for label in test if "+" in label]
    assert (found.count(2), found.count(1), found.count(0)) == n_seen
    genes = sorted({"KLF1", "CEBPE", "AHR", *(gene for label in test for gene in label.split("+"))})
    known = [canonical_label(label, [], "+", "human") for label in {*test, *genes}]
    roles = listed(path, Labels(known, {}, "human"), 0.1, 0)
    assert len(roles["test"]) == len(test)
    assert not set(roles["train"]) & set(roles["test"])


def test_renamed_symbols_are_understood_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "roles.json"
    path.write_text(json.dumps({"train": ["AARS"], "validation": ["B"], "test": ["KIAA1804+AARS"]}))
    roles = listed(path, Labels(["AARS1", "AARS1+MAP3K21", "B"], {}, "human"), 0.1, 0)
    assert roles == {"train": ["AARS1"], "validation": ["B"], "test": ["AARS1+MAP3K21"]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"train": ["A"], "test": ["Aa+B"]}, r"no such perturbation: 'Aa\+B' in test \(did you mean A\+B\?\)"),
        ({"train": ["A", ""], "test": ["B"]}, r"no such perturbation: '' in train"),
        ({"train": ["A", "B"], "test": ["B"]}, r"in two lists.*'B' in train and test"),
        ({"train": ["A", "A+B"], "test": ["B+A"]}, r"'A\+B' in train and test"),
        ({"train": ["A"], "validation": ["C"], "test": ["C"]}, r"'C' in validation and test"),
        ({"train": [], "test": ["B"]}, "'train' is empty"),
        ({"train": ["A"]}, "'test' is empty"),
        ({"train": ["A"], "tset": ["B"]}, r"unknown key \['tset'\].*train, validation \(or val\) and test"),
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
    with pytest.raises(InputError, match=r"dropped by qc.min_cells_per_perturbation: 'GONE' in test \(12 cells\)"):
        read({"train": ["A"], "test": ["GONE"]}, dropped={"GONE": 12})


def test_all_labels_that_cannot_be_used_are_in_one_message(read: Callable) -> None:
    content = {"train": ["A", "GONE", "Bb", "C"], "validation": ["d", "C"], "test": ["ZZZ9"]}
    with pytest.raises(InputError) as raised:
        read(content, dropped={"GONE": 12})
    said = str(raised.value)
    for part in (
        "'Bb' in train (did you mean",
        "'d' in validation (did you mean D",
        "'ZZZ9' in test",
        "'GONE' in train (12 cells)",
        "'C' in train and validation",
    ):
        assert part in said


@pytest.mark.parametrize("key", ["val", "valid", "validation"])
def test_a_file_of_gears_is_read_as_it_is(key: str, read: Callable) -> None:
    content = {"train": ["A+ctrl", "ctrl+B", "ctrl", "C+ctrl"], key: ["ctrl+D"], "test": ["B+A"]}
    assert read(content) == {"train": ["A", "B", "C"], "validation": ["D"], "test": ["A+B"]}


def test_labels_of_a_file_are_read_as_those_of_the_screen_were(tmp_path: Path) -> None:
    """The dataset's own pattern, separator, other names and controls apply before a label counts as unknown."""
    path = tmp_path / "roles.json"
    path.write_text(
        json.dumps({"train": ["sgA-1", "sgA-2", "sgOLD-1", "NT-12"], "val": ["D"], "test": ["sgA-1|sgB-3"]})
    )
    declared = {
        "control": ["NT"],
        "control_pattern": r"NT-\d+",
        "separator": "|",
        "pattern": r"sg(\w+)-\d+",
        "rename": {"OLD": "C"},
    }
    assert listed(path, Labels(LABELS, {}, "human", declared), 0.1, 0) == {
        "train": ["A", "C"],
        "validation": ["D"],
        "test": ["A+B"],
    }


@pytest.mark.parametrize("name", ["roles.pkl", "roles.json"])
def test_a_pickle_is_refused_with_the_way_to_convert_it(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / name
    path.write_bytes(pickle.dumps({"train": ["A+ctrl"], "val": ["B+ctrl"], "test": ["C+ctrl"]}))
    with pytest.raises(InputError, match="is a pickle") as raised:
        listed(path, Labels(LABELS, {}, "human"), 0.1, 0)
    monkeypatch.chdir(tmp_path)
    command = "\n".join(line.strip() for line in str(raised.value).splitlines() if line.startswith("  "))
    exec(command)
    assert listed(tmp_path / "roles.converted.json", Labels(LABELS, {}, "human"), 0.1, 0)["validation"] == ["B"]


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("content", [{"train": ["A"]}, ["A", "B"]], ids=["dict", "list"])
def test_pickles_of_all_protocols_are_told(protocol: int, content: object, tmp_path: Path) -> None:
    (tmp_path / "roles.json").write_bytes(pickle.dumps(content, protocol))
    with pytest.raises(InputError, match="is a pickle"):
        listed(tmp_path / "roles.json", Labels(LABELS, {}, "human"), 0.1, 0)


def test_keys_in_capitals_and_a_byte_order_mark_are_read(read: Callable) -> None:
    content = json.dumps({"Train": ["A", "B"], "VAL": ["C"], "Test": ["D"]})
    assert read("\ufeff" + content) == {"train": ["A", "B"], "validation": ["C"], "test": ["D"]}
    with pytest.raises(InputError, match=r"unknown key \['Held_Out'\]"):
        read({"Held_Out": ["A"]})


def test_names_are_told_as_they_were_written(tmp_path: Path) -> None:
    path = tmp_path / "roles.json"
    path.write_text(json.dumps({"train": ["SOX22", "foo+bar", "A"], "test": ["KIAA1804"]}))
    with pytest.raises(InputError) as raised:
        listed(path, Labels(["A", "SOX2", "MAP3K20"], {"MAP3K21": 12}, "human"), 0.1, 0)
    said = str(raised.value)
    for part in (
        "'SOX22' (read as 'SOX12') in train (did you mean SOX2",
        "'foo+bar' in train",
        "'KIAA1804' in test (12 cells)",
    ):
        assert part in said
    with pytest.raises(InputError, match=r"held_out: .*'SOX22' \(read as 'SOX12'\) \(did you mean SOX2"):
        held_out_names(["SOX22"], "unseen_perturbation", Labels(["A", "SOX2"], {}, "human"))


def test_a_compound_without_its_dose_is_told_with_its_doses(tmp_path: Path) -> None:
    labels = Labels(["A@1", "A@10", "B@1", "A@1+B@1"], {}, "")
    (tmp_path / "roles.json").write_text(json.dumps({"train": ["A"], "test": ["B@1", "A+B"]}))
    with pytest.raises(
        InputError, match=r"'A' in train \(name it with its doses: A@1, A@10\), 'A\+B' in test \(name it .*: A@1\+B@1\)"
    ):
        listed(tmp_path / "roles.json", labels, 0.1, 0)
    with pytest.raises(InputError, match=r"'A' \(name it with its doses: A@1, A@10\)"):
        held_out_names(["A"], "unseen_dose", labels)


# --- held out by name -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "named", "test"),
    [
        ("unseen_perturbation", ["TF1", "ctrl+TF5"], {"TF1", "TF5", "TF1+TF2", "TF1+TF3", "TF5+TF6"}),
        ("unseen_combination", ["TF2+TF1", "TF3+TF4"], {"TF1+TF2", "TF3+TF4"}),
    ],
)
def test_what_a_block_names_is_held_out(
    kind: str, named: list[str], test: set[str], prepared: dict[str, Prepared], tmp_path: Path
) -> None:
    here = prepared[kind]
    spec = {"kind": kind, "held_out": named, "validation_fraction": 0.2, "seed": 0}
    split(here.harmonized, here.harmonization, tmp_path / "split.json", "mine", spec)
    content = json.loads((tmp_path / "split.json").read_text())
    assert set(content["perturbations"]["test"]) == test
    assert content["perturbations"]["validation"]


@pytest.mark.parametrize(
    ("kind", "named", "message"),
    [
        ("unseen_perturbation", ["tf1", "XYZ99"], r"no such perturbed gene.*'XYZ99'.*'tf1' \(did you mean TF1"),
        ("unseen_perturbation", ["TF1+TF2"], r"'TF1\+TF2'"),
        ("unseen_perturbation", PERTURBED, "held_out names every perturbed gene"),
        ("unseen_combination", ["TF1", "TF1+TF9"], r"no such combination: 'TF1'.*'TF1\+TF9' \(did you mean"),
        ("unseen_combination", COMBINATIONS, "held_out names every combination"),
    ],
)
def test_names_that_cannot_be_held_out_are_explained(
    kind: str, named: list[str], message: str, prepared: dict[str, Prepared], tmp_path: Path
) -> None:
    here = prepared[kind]
    spec = {"kind": kind, "held_out": named, "validation_fraction": 0.2, "seed": 0}
    with pytest.raises(InputError, match=message):
        split(here.harmonized, here.harmonization, tmp_path / "split.json", "mine", spec)


# --- more of a user's own file --------------------------------------------------------------------------------------


def test_an_empty_list_for_validation_sets_nothing_aside(read: Callable) -> None:
    roles = {"train": ["A", "B", "C", "D"], "validation": [], "test": ["E"]}
    assert read(roles) == roles


def test_without_a_list_for_validation_a_share_of_training_serves_by_seed(read: Callable) -> None:
    content = {"train": ["A", "B", "C", "D"], "test": ["E"]}
    roles = read(content)
    assert len(roles["validation"]) == 1
    assert sorted(roles["train"] + roles["validation"]) == ["A", "B", "C", "D"]
    assert roles["test"] == ["E"]
    assert read(content) == roles
    assert len({tuple(read(content, seed=seed)["validation"]) for seed in range(8)}) > 1


def test_perturbations_that_a_file_does_not_name_are_left_out(prepared: dict[str, Prepared], tmp_path: Path) -> None:
    here = prepared["unseen_combination"]
    (tmp_path / "roles.json").write_text(
        json.dumps({"train": ["TF1", "TF2", "TF3"], "validation": ["TF4"], "test": ["TF2+TF1"]})
    )
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
