"""Contexts held out, zero-shot and few-shot, and perturbations held out in single contexts with known sources."""

import json
from pathlib import Path

import pandas as pd
import pytest
from conftest import SPECS_OF_CELLS, Prepared, make_screen, prepare
from hypothesis import given, settings
from hypothesis import strategies as st

from perturbflow.errors import InputError
from perturbflow.genes.symbols import CONTROL, entities_of
from perturbflow.splits.contexts import Support, n_sources, unseen_context, unseen_perturbation_in_context
from perturbflow.splits.divisions import Shares
from perturbflow.splits.split import SUPPORTED, divided

LINES = ["hepg2", "jurkat", "k562", "rpe1"]
GENES = [f"G{i:02d}" for i in range(12)]
NAMED = Shares(None, 0.2, 0, None, {"rpe1"})


def cells_of(lines: list[str] = LINES, labels: list[str] = GENES, n: int = 6, n_controls: int = 20) -> pd.DataFrame:
    """Return obs with n cells per perturbation and line."""
    rows = [
        (label, line)
        for line in lines
        for label in (CONTROL, *labels)
        for _ in range(n_controls if label == CONTROL else n)
    ]
    obs = pd.DataFrame(rows, columns=["perturbation", "dataset"], index=[f"cell_{i}" for i in range(len(rows))])
    return obs.assign(batch=obs["dataset"], cell_type="t", is_control=obs["perturbation"] == CONTROL)


def places(obs: pd.DataFrame, roles: pd.Series, role: str) -> set[tuple[str, str]]:
    """Return (perturbation, line) that have cells of a role."""
    found = obs[(roles == role) & ~obs["is_control"]]
    return set(zip(found["perturbation"], found["dataset"], strict=True))


# --- contexts held out ----------------------------------------------------------------------------------------------


def test_zero_shot_trains_on_controls_of_the_context_alone() -> None:
    obs = cells_of()
    roles = unseen_context(obs, "dataset", NAMED, Support(0.0))
    inside = obs["dataset"] == "rpe1"
    assert set(roles[inside & obs["is_control"]]) == {"train", "validation", "test"}
    assert set(roles[inside & ~obs["is_control"]]) == {"test"}
    assert "test" not in set(roles[~inside])
    alone = unseen_context(obs, "dataset", NAMED)
    assert set(alone[inside]) == {"test"}, "without support not even controls train"
    pd.testing.assert_series_equal(roles[~inside], alone[~inside])


@given(fraction=st.sampled_from([0.1, 0.3, 0.5, 0.9]), seed=st.integers(0, 5))
@settings(max_examples=20, deadline=None)
def test_few_shot_trains_on_a_share_of_the_contexts_perturbations(fraction: float, seed: int) -> None:
    obs = cells_of(labels=[*GENES, "G00+G01"])
    roles = unseen_context(obs, "dataset", Shares(None, 0.2, seed, None, {"rpe1", "k562"}), Support(fraction))
    for line in ("rpe1", "k562"):
        trained = {label for label, place in places(obs, roles, "train") if place == line}
        tested = {label for label, place in places(obs, roles, "test") if place == line}
        assert len(trained - {"G00+G01"}) == max(1, round(fraction * len(GENES)))
        assert not trained & tested
        assert trained | tested == {*GENES, "G00+G01"}
        assert ("G00+G01" in trained) == ({"G00", "G01"} <= trained)


def test_support_may_be_named_by_context() -> None:
    obs = cells_of()
    support = Support(1.0, {"rpe1": ["G03", "G04"]})
    roles = unseen_context(obs, "dataset", NAMED, support)
    assert {label for label, line in places(obs, roles, "train") if line == "rpe1"} == {"G03", "G04"}
    with pytest.raises(InputError, match=r"support: k562 is not held out.*Held out: rpe1"):
        unseen_context(obs, "dataset", NAMED, Support(1.0, {"k562": ["G03"]}))


def test_folds_hold_every_context_out_once() -> None:
    obs = cells_of()
    held_out = [
        set(obs.loc[unseen_context(obs, "dataset", Shares(None, 0.1, 3, (i, 4))) == "test", "dataset"])
        for i in range(4)
    ]
    assert sorted(line for lines in held_out for line in lines) == LINES


MISTAKES = {
    "a context of controls alone": (
        lambda obs: obs[(obs["dataset"] != "rpe1") | obs["is_control"]], None,
        r"dataset rpe1 has controls alone, so there is nothing to score.*what-if questions",
    ),
    "the only context with its perturbations": (
        lambda obs: obs[obs["is_control"] | ((obs["dataset"] == "rpe1") == obs["perturbation"].isin(GENES[:3]))], None,
        r"dataset rpe1 is the only context with its perturbations \(G00, G01, G02\)",
    ),
    "a support that leaves nothing": (
        lambda obs: obs, Support(1.0, {"rpe1": GENES}), "the support takes all perturbations of dataset rpe1",
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_leaves_nothing_to_score_is_explained(mistake: str) -> None:
    change, support, said = MISTAKES[mistake]
    with pytest.raises(InputError, match=said):
        unseen_context(change(cells_of()), "dataset", NAMED, support)


# --- perturbations held out in one context --------------------------------------------------------------------------


@given(seed=st.integers(0, 20), fraction=st.sampled_from([0.25, 0.5, 1.0]), lines=st.integers(2, 5))
@settings(max_examples=30, deadline=None)
def test_a_held_out_perturbation_is_known_from_as_many_contexts_as_planned(
    seed: int, fraction: float, lines: int
) -> None:
    names = [f"line{i}" for i in range(lines)]
    obs = cells_of(names, [*GENES, "G00+G01"], n=4)
    roles = unseen_perturbation_in_context(obs, "dataset", Shares(fraction, 0.2, seed))
    tested, learned = places(obs, roles, "test"), places(obs, roles, "train") | places(obs, roles, "validation")
    assert not tested & learned
    singles = sorted(label for label, _ in tested if "+" not in label)
    assert len(singles) == len(set(singles)) == max(1, round(fraction * len(GENES))), "each in one context"
    told = n_sources(obs["perturbation"], obs["dataset"], roles)
    for label in singles:
        assert told[label] == len({line for other, line in learned if other == label})
    n = sorted(told[label] for label in singles)
    wanted = sorted(min(turn % 4 if turn % 4 < 3 else lines - 1, lines - 1) for turn in range(len(singles)))
    assert n == wanted, "0, 1, 2 and 3 or more in turn, as far as there are contexts"
    target = dict(tested)
    for label, line in learned:
        assert all(target.get(gene) != line for gene in entities_of(label)), "no combination tells of a held-out member"
    assert set(roles[obs["is_control"]]) == {"train", "validation", "test"}


def test_perturbations_are_held_out_in_the_named_contexts_alone() -> None:
    obs = cells_of()
    roles = unseen_perturbation_in_context(obs, "dataset", Shares(0.5, 0.1, 0, None, {"k562"}))
    assert {line for _, line in places(obs, roles, "test")} == {"k562"}
    with pytest.raises(InputError, match="held_out: hela is no value of dataset in this screen"):
        unseen_perturbation_in_context(obs, "dataset", Shares(0.5, 0.1, 0, None, {"hela"}))


# --- the step and its audit -----------------------------------------------------------------------------------------


def test_a_split_tells_sources_and_what_trains(prepared: dict[str, Prepared]) -> None:
    content = json.loads(prepared["unseen_perturbation_in_context"].split.read_text())
    assert set(content["n_sources"]) == set(content["perturbations"]["test"])
    assert set(content["n_sources"].values()) == {0, 1}
    obs = cells_of()
    account = {"organism": "human", "perturbations": {"dropped": {}}}
    spec = {
        "kind": "unseen_context",
        "covariate": "dataset",
        "held_out": ["rpe1"],
        "validation_fraction": 0.1,
        "seed": 0,
    }
    for share, said in ((0, "zero-shot"), (0.5, "few-shot")):
        assert divided(obs, account, "x", {**spec, "support_fraction": share})["generalization"] == SUPPORTED[said]
    named = divided(obs, account, "x", {**spec, "support": {"rpe1": ["G05"]}})
    assert named["n_sources"]["G01"] == 3
    assert "G05" not in named["perturbations"]["test"]
    with pytest.raises(InputError, match=r"splits\.x: support: the screen has no perturbation G99"):
        divided(obs, account, "x", {**spec, "support": {"rpe1": ["G99"]}})


@pytest.mark.parametrize("support", [0.0, 0.4])
def test_the_audit_passes_where_a_part_of_the_context_trains(support: float, tmp_path: Path) -> None:
    spec = {**SPECS_OF_CELLS["unseen_context"], "support_fraction": support}
    prepare(tmp_path / "screen", make_screen(), spec)  # it raises where anything leaked
