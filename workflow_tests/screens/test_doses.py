"""Doses: what files write, what becomes of it, and that models speak of compounds and not of compounds at a dose."""

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import DOSED, HALF_DOSE, Prepared, dataset_block, merged
from hypothesis import given, settings
from hypothesis import strategies as st
from made_effects import N_GENES, error, make_training

from perturbflow.embeddings import Embeddings
from perturbflow.errors import InputError
from perturbflow.genes.symbols import at_dose, canonical_label, entities_of, entity_of, members_of, without_dose
from perturbflow.models.base import Run, build
from perturbflow.models.calibration import novelty_of
from perturbflow.models.closed_form.baselines import Additive, DoseInterpolation, LatentSum
from perturbflow.models.closed_form.doses import Doses
from perturbflow.models.effects import Effects
from perturbflow.models.gaussian_process.set_gp import SetGP
from perturbflow.models.neighbours import Neighbours
from perturbflow.pairs import Pairs
from perturbflow.registry.config import complete
from perturbflow.registry.families import FAMILIES
from perturbflow.registry.plan import Plan
from perturbflow.screens.annotation import canonical_labels, gene_table
from perturbflow.screens.dose_labels import doses_in, parsed
from perturbflow.screens.doubts import doubtful_labels

NO_GENES = gene_table(pd.DataFrame(index=pd.Index([], dtype=str)), {"organism": "human"})


def read(labels: list[str], doses: list | None = None, **declared: object) -> tuple[list, str]:
    """Return what labels of a drug screen become, and the unit of their doses."""
    obs = pd.DataFrame({"label": ["control", *labels]})
    block = {
        "column": "label",
        "control": ["control", "ctrl", "DMSO_TF"],
        "separator": "+",
        "drop": ["nan", "*", ""],
        **declared,
    }
    if doses is not None:
        obs["dose"], block["dose"] = [None, *doses], "dose"
    found = canonical_labels(
        obs, dataset_block(perturbation=block, perturbation_type="drug"), NO_GENES, Path("screen.h5ad")
    )
    return found.tolist()[1:], found.attrs["dose_unit"]


# --- what files write -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("labels", "doses", "become", "unit"),
    [
        (["KLF1+MAP2K6", "KLF1"], [10, 3.5], ["KLF1@10+MAP2K6@10", "KLF1@3.5"], ""),
        (["B+A", "A+ctrl", "ctrl+A", "ctrl"], ["1+10", "1+1", "5", "1"], ["A@10+B@1", "A@1", "A@5", "control"], ""),
        (["B+A", "B+A", "B+A", "B+A"], ["1|10", "1_10", "1 10", "1/10"], ["A@10+B@1"] * 4, ""),
        (["B+A", "B+A"], ["0.1 uM+10 nM", "1 nM;20 nM"], ["A@0.01+B@0.1", "A@0.02+B@0.001"], "uM"),
        (["B+A"] * 5, ["(10.0, 1.0)", "10:1", "10 & 1", "10 and 1", "[10, 1]"], ["A@1+B@10"] * 5, ""),
        (["A", "A", "A", "A+A"], ["10_uM", "10-uM", "10 (uM)", "10 uM"], ["A@10"] * 4, "uM"),
        (["A", "B"], ["10uM", "10 µM"], ["A@10", "B@10"], "uM"),
        (["A", "B", "C"], ["10 μM", "0.1 nM", "1e-3 mM"], ["A@10", "B@0.0001", "C@1"], "uM"),
        (["A", "B"], ["10 nM", "2 nmol/L"], ["A@10", "B@2"], "nM"),
        (["A", "B"], ["5 ug/ml", "6 µg/mL"], ["A@5", "B@6"], "ug/ml"),
        (["A", "control", "B"], ["5 nM", "vehicle", "0"], ["A@5", "control", "B@0"], "nM"),
        (["A", "B"], [1e6, 2.5e7], ["A@1000000", "B@25000000"], ""),
        (["A", "B"], [np.float32(0.1), 1e-5], ["A@0.1", "B@1e-05"], ""),
        (["A", "A"], [None, "nan"], ["A", "A"], ""),
    ],
)  # fmt: skip
def test_doses_of_a_column_go_to_their_members(labels: list[str], doses: list, become: list[str], unit: str) -> None:
    assert read(labels, pd.array(doses, dtype=object)) == (become, unit)


def test_doses_go_with_their_members_through_pattern_and_rename() -> None:
    assert read(["b-1_a-2"], ["3_4"], separator="_", pattern=r"(\w)-\d_?", rename={"b": "ZED"})[0] == ["ZED@3+a@4"]


@pytest.mark.parametrize(
    ("label", "becomes"),
    [
        ("[('Drug (A)', 0.05, 'uM')]", "Drug (A)@0.05"), ("[('DMSO_TF', 0.0, 'uM')]", "control"), ("('A', 5)", "A@5"),
        ("[('B', 5.0, 'uM'), ('A', 500.0, 'nM')]", "A@0.5+B@5"), ("[('A', 1.0, 'uM'), ('DMSO_TF', 0.0, 'uM')]", "A@1"),
        ("A@10uM", "A@10"), ("A@10.0 uM+B@2uM", "A@10+B@2"), ("(1,2)-DICHLORO", "(1,2)-DICHLORO"),
        ("[('A', [1], 'uM')", "[('A', [1], 'uM')"),
        ("[('A', np.float64(0.05), 'uM')]", "A@0.05"), ("[['A', 0.05, 'uM'], ['B', 1, 'uM']]", "A@0.05+B@1"),
        ("[('A', nan, 'uM')]", "A"),
        ("{'drug': 'A', 'dose': 0.5, 'unit': 'uM'}", "A@0.5"), ("['B', 'A', 'C']", "A+B+C"), ("{'B', 'A'}", "A+B"),
        ("('B', 'A')", "A+B"),
    ],
)  # fmt: skip
def test_labels_that_hold_the_dose_are_read_as_they_are(label: str, becomes: str) -> None:
    assert read([label])[0] == [becomes]


def test_a_pattern_finds_members_doses_and_units() -> None:
    pattern = r"^(?P<member>.+)_(?P<dose>[\d.]+)(?P<unit>[a-zµ]M)$"
    assert read(["TSA_10uM", "SAHA_100nM", "water"], pattern=pattern, separator=None) == (
        ["TSA@10", "SAHA@0.1", "water"],
        "uM",
    )
    both = r"(?P<member>[A-Z]+)\((?P<dose>[\d.]+)\)"
    assert read(["B(3)+A(0.5)"], pattern=both) == (["A@0.5+B@3"], "")


@pytest.mark.parametrize(
    ("labels", "doses", "message"),
    [
        (["B+A"], ["1+10+3"], (r"screen\.h5ad: obs\['dose'\] gives 3 doses, '1\+10\+3', to the label 'B\+A', whose "
                               r"members are B, A")),
        (["A"], ["1,5"], r"gives 2 doses, '1,5', to the label 'A'.*a decimal has a point"),
        (["A", "B"], ["high", "low"], (r"obs\['dose'\] holds 'high', 'low', which are no doses.*Write numbers, or "
                                       r"remove perturbation\.dose")),
        (["A"], [-7.0], r"holds '-7\.0', which is no dose.*Is it a logarithm\? Write the dose itself"),
        (["A", "B"], ["5 ug/ml", "6 uM"], r"several units, such as '5 ug/ml', '6 uM'"),
        (["A", "B"], ["5", "6 uM"], r"several units.*\(none\), uM"),
        (["A@5"], [5], r"gives the dose '5\.0' to the label 'A@5', which holds a dose itself"),
        (["A"], ["inf"], r"holds 'inf', which is no dose"),
        (["A+B"], ["1,5"], (r"gives the dose '1,5' to the label 'A\+B': two doses, or one with a decimal comma\? "
                            r"Write 1\+5 or 1\.5")),
        (["A+ctrl"], ["1,000"], r"decimal comma"),
        (["A+A"], ["1+10"], r"several doses, '1\+10', to 'A' in the label 'A\+A'.*add \"A\+A\" to perturbation\.drop"),
    ],
)  # fmt: skip
def test_a_dose_that_cannot_be_read_is_refused(labels: list[str], doses: list, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read(labels, doses)


def told_of(
    labels: list[str], doses: list, units: list, dose: str | list[str] = "dose_value"
) -> tuple[list, list[str]]:
    """Return what labels become beside a column of units, and the warnings."""
    obs, warnings = (
        pd.DataFrame({"label": ["control", *labels], "dose_value": [0.0, *doses], "dose_unit": [None, *units]}),
        [],
    )
    block = dataset_block(
        perturbation={"column": "label", "control": ["control"], "dose": dose}, perturbation_type="drug"
    )
    doubtful_labels(obs, block, NO_GENES, Path("screen.h5ad"), warnings)
    return canonical_labels(obs, block, NO_GENES, Path("screen.h5ad")).tolist()[1:], warnings


def test_a_number_and_its_unit_are_read_from_two_columns() -> None:
    labels, doses, units = ["A", "A", "B"], [10, 10, 1], ["nM", "uM", "uM"]
    with pytest.raises(
        InputError,
        match=r"gives 'A' the dose 10\.0, and obs\['dose_unit'\] has the units nM, uM.*dose: \[dose_value, dose_unit\]",
    ):
        told_of(labels, doses, units)
    assert told_of(labels, doses, units, ["dose_value", "dose_unit"]) == (["A@0.01", "A@10", "B@1"], [])
    found, warnings = told_of(["A", "A", "B"], [10, 1, 1], ["nM", "nM", "uM"])
    assert found == ["A@10", "A@1", "B@1"]
    assert len(warnings) == 1
    assert "write perturbation.dose: [dose_value, dose_unit]" in warnings[0]


@pytest.mark.parametrize("units", [["nM"] * 3, [None, "nM", "nM"], ["cells", "wells", "cells"]])
def test_a_column_of_units_that_tells_no_dose_apart_is_no_obstacle(units: list) -> None:
    assert told_of(["A", "A", "B"], [10, 10, 1], units) == (["A@10", "A@10", "B@1"], [])


def test_dose_zero_and_no_dose_are_counted_in_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        read(["A", "Vehicle", "Vehicle", "B", "C+A"], [1, 0, 0.0, None, 2])
    assert (
        "2 cells are at dose 0 and count as perturbed: if these are vehicle controls, list them in "
        "perturbation.control: Vehicle@0"
    ) in caplog.text
    assert "1 cells have no dose" in caplog.text
    caplog.clear()
    read(["A", "Vehicle"])
    assert not caplog.text


def test_the_unit_is_recorded_and_a_dose_is_no_new_name(harmonized_from: Callable, tiny_screen: Callable) -> None:
    screen = tiny_screen(labels=["TF1", "TF2"])
    screen.obs["dose"] = [
        None if label == "control" else ("10 nM", "1 uM")[i % 2] for i, label in enumerate(screen.obs["perturbation"])
    ]
    result = harmonized_from(screen, perturbation={"dose": "dose"})
    assert result.account["perturbations"]["dose_unit"] == result.adata.uns["perturbflow"]["dose_unit"] == "uM"
    assert result.account["perturbations"]["renamed"] == {}
    assert result.account["perturbations"]["not_measured"] == [], "TF1@0.01 is of the gene TF1"


names = (
    st.text("ABab1-() ", min_size=1, max_size=6)
    .map(str.strip)
    .filter(lambda name: name and not name.startswith(("(", "[")))
)
amounts = st.one_of(st.integers(0, 10**9).map(float), st.floats(1e-6, 1e6).map(lambda x: float(f"{x:.5g}")))


@given(name=names, amount=amounts, unit=st.sampled_from(["", "nM", "uM", "ng/ml"]))
def test_a_member_at_a_dose_is_read_back(name: str, amount: float, unit: str) -> None:
    member = at_dose(name, amount)
    assert members_of(member) == [member]
    assert without_dose(member) == (name, amount)
    assert parsed(f"{amount!r} {unit}") == (amount, unit)
    assert canonical_label(member, set(), "+", organism="") == member


@given(
    members=st.lists(st.tuples(names, amounts), min_size=2, max_size=4, unique_by=lambda pair: pair[0]),
    between=st.sampled_from("+;|_/ :&"),
)
@settings(deadline=None)
def test_each_member_keeps_its_dose_whatever_the_order(members: list[tuple[str, float]], between: str) -> None:
    label, text = (
        "+".join(name for name, _ in members),
        between.join(f"{amount:.9g}".replace("e+", "e") for _, amount in members),
    )
    assert len(doses_in(text, "+")) == len(members)
    expected = "+".join(sorted(at_dose(*member) for member in members))
    assert read([label], [text])[0] == [expected]


@given(text=st.text(max_size=12))
def test_any_text_is_a_dose_or_none(text: str) -> None:
    found = parsed(text)
    assert found is None or (found[0] >= 0 and np.isfinite(found[0]))
    assert doses_in(text, None)
    assert entity_of(text) in text


# --- what models make of it -----------------------------------------------------------------------------------------


def response(dose: float) -> float:
    """Return the share of its effect that a compound has at a dose in these tests."""
    return dose / (dose + 10.0)


@pytest.fixture(scope="module")
def compounds() -> dict[str, np.ndarray]:
    """Return effects of six compounds at doses 1 to 1000."""
    rng = np.random.default_rng(0)
    whole = {f"C{i}": rng.normal(0.0, 1.0, N_GENES) for i in range(6)}
    return {f"{name}@{dose}": effect * response(dose) for name, effect in whole.items() for dose in (1, 10, 100, 1000)}


def test_doses_are_found_by_compound_and_logarithm() -> None:
    doses = Doses(["A@1", "A@100", "B", "C@0"])
    assert doses.weights("A@10") == pytest.approx({"A@1": 0.5, "A@100": 0.5})
    assert doses.weights("A@0.1") == pytest.approx({"A@1": 0.1}), "in proportion below the lowest"
    assert doses.weights("A@1000") == doses.weights("A") == {"A@100": 1.0}
    assert doses.weights("A@0") == {"A@1": 0.0}
    assert doses.weights("B@5") == {"B": 1.0}
    assert doses.weights("C@0") == {"C@0": 1.0}
    assert doses.weights("D@1") == {}
    assert [doses.nearest(member) for member in ("A@9", "A@11", "A@0", "B@3", "D")] == [
        "A@1",
        "A@100",
        "A@1",
        "B",
        None,
    ]
    assert doses.holds("C@8")
    assert not doses.holds("D")


def test_interpolation_is_exact_where_effects_are_linear_in_log_dose() -> None:
    rng = np.random.default_rng(1)
    slope, start = rng.normal(0.0, 0.5, (2, N_GENES))
    effects = {f"A@{dose}": start + slope * np.log10(dose) for dose in (1, 10, 1000)} | {
        f"B@{dose}": rng.normal(0, 1, N_GENES) for dose in (1, 10)
    }
    model = DoseInterpolation().learned(make_training(effects))
    mean = np.mean([model.effect(label) for label in effects], axis=0)
    known = {label: model.effect(label) for label in effects}
    np.testing.assert_allclose(model.effect("A@100"), (known["A@10"] + known["A@1000"]) / 2)
    np.testing.assert_allclose(model.effect("A@0.5"), known["A@1"] / 2)
    np.testing.assert_allclose(model.effect("A@5000"), known["A@1000"])
    np.testing.assert_allclose(model.effect("A@100+B@10"), model.effect("A@100") + known["B@10"])
    np.testing.assert_allclose(model.effect("NOBODY@3"), mean, atol=1e-6)
    np.testing.assert_allclose(Additive().learned(make_training(effects)).effect("A@20"), known["A@10"])
    assert error(model, "A@100", start + 2 * slope) < 0.25


def test_a_new_dose_is_no_new_compound(compounds: dict[str, np.ndarray]) -> None:
    known = {label: effect for label, effect in compounds.items() if label != "C0@10"}
    training = make_training(known)
    plain = {label: effect for label, effect in compounds.items() if label.endswith("@100")}
    without = SetGP().learned(make_training({entity_of(label): effect for label, effect in plain.items()}))
    np.testing.assert_allclose(
        without.effect("C0@7"), without.effect("C0"), err_msg="without doses in training, a dose tells nothing"
    )
    latent = LatentSum(20, 0.01).learned(training)
    np.testing.assert_allclose(
        latent.effect("C0@9"), latent.effect("C0@1"), err_msg="the nearest dose by its logarithm"
    )
    assert novelty_of("C0@10", set(known), set(training.effects.entities)) == "seen"
    assert novelty_of("D@10", set(known), set(training.effects.entities)) == "unseen gene"


@pytest.mark.parametrize("of_genes", [True, False])
def test_inner_folds_hold_out_compounds_with_all_doses(compounds: dict[str, np.ndarray], of_genes: bool) -> None:
    pairs = {"C0@1+C1@1": 0, "C0@10+C1@10": 0, "C2@1+C3@1": 0, "C2@10+C3@10": 0}
    both = {label: sum(compounds[member] for member in members_of(label)) for label in pairs}
    training = make_training({**compounds, **both})
    for inner, held_out in training.rounds(of_genes=of_genes):
        kept = {tuple(entities_of(label)) for label in inner.effects.labels}
        assert not kept & {tuple(entities_of(label)) for label in held_out.labels}
        if of_genes:
            alone = {entity_of(label) for label in held_out.labels if len(members_of(label)) == 1}
            assert not alone & set(inner.effects.entities)


def test_neighbours_do_not_learn_from_other_doses_of_the_same_compound(compounds: dict[str, np.ndarray]) -> None:
    """Doses of a compound share a vector: borrowing among them would look like knowledge of unseen compounds."""
    labels = sorted(compounds)
    effects = Effects(labels, np.stack([compounds[label] for label in labels]))
    rng = np.random.default_rng(2)
    vector = {name: rng.normal(0, 1, 4) for name in map(entity_of, labels)}
    fitted = Neighbours.fit(effects, effects, {label: vector[entity_of(label)] for label in labels})
    weights = fitted.borrowed([np.eye(len(fitted.genes))])[0]  # of effects that each have a gene of their own
    same = np.array([[entity_of(a) == entity_of(b) for b in fitted.genes] for a in fitted.genes])
    assert not weights[same].any()
    assert fitted.strength < 0.5, "compounds of unrelated effects tell nothing of one another"


@pytest.mark.parametrize(
    "family", [name for name, family in FAMILIES.items() if family.kind == "baseline" and not family.split_kinds]
)
def test_every_baseline_serves_a_split_over_doses(family: str, prepared: dict[str, Prepared]) -> None:
    here = prepared["unseen_dose"]
    cells = Pairs.read(here.pairs)
    params = next(block["params"] for block in complete(merged({}))["models"].values() if block["family"] == family)
    model = build(FAMILIES[family].implementation, params)
    model.fit(cells.roles("train", "validation"), Embeddings.read(here.embeddings), Run(seed=0))
    for label in [*cells.roles("test").perturbations, "TF1@2", "TF1@100+TF2@2", "NOBODY@3"]:
        effect = model.effect(label)
        assert effect.shape == (len(cells.genes),)
        assert np.isfinite(effect).all()


def test_interpolation_beats_the_nearest_dose_on_a_screen_of_doses(prepared: dict[str, Prepared]) -> None:
    here = prepared["unseen_dose"]
    cells, errors = Pairs.read(here.pairs), {}
    for model in (Additive(), DoseInterpolation()):
        model.fit(cells.roles("train"), Embeddings.read(here.embeddings), Run(seed=0))
        test = cells.roles("test")
        errors[type(model)] = np.mean(
            [np.linalg.norm(model.effect(label) - test.effect_of(label)) for label in test.perturbations]
        )
    assert errors[DoseInterpolation] < errors[Additive]
    assert 1 < HALF_DOSE < 30
    assert {"TF1", "TF2"} <= set(cells.genes), "targets at a dose are kept among the genes"
    assert any("+" in label for label in DOSED)


# --- the plan -------------------------------------------------------------------------------------------------------


def test_a_screen_that_declares_no_dose_is_left_out_of_splits_over_doses() -> None:
    plan = Plan(
        merged(
            {
                "select": {
                    "datasets": ["norman2019", "sciplex3"],
                    "splits": ["unseen_dose"],
                    "models": ["dose_interpolation"],
                    "seeds": [0],
                }
            }
        )
    )
    assert set(plan.runs["dataset"]) == {"sciplex3"}
    assert plan.left_out == [
        (
            "norman2019 × unseen_dose is left out: norman2019 declares no perturbation.dose, so its perturbations have "
            "no doses."
        )
    ]


def test_a_pattern_with_a_dose_needs_a_member() -> None:
    config = merged({})
    config["datasets"]["sciplex3"]["perturbation"]["pattern"] = r"^(.+)_(?P<dose>\d+)$"
    with pytest.raises(InputError, match=r"perturbation\.pattern.*beside the group dose.*group member"):
        complete(config)
