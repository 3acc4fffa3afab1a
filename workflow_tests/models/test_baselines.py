"""Closed forms: exact where their assumption holds, the same after a restart, and begun from the right controls."""

import json
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from conftest import Prepared
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from perturbflow.controls import Context
from perturbflow.embeddings import Embeddings
from perturbflow.errors import InputError
from perturbflow.genes.symbols import members_of
from perturbflow.io.artefacts import load_artefact, save_artefact
from perturbflow.models.base import Ceiling, Model, Run, build
from perturbflow.pairs import Pairs
from perturbflow.predict import nonnegative, predict
from perturbflow.registry.families import FAMILIES
from perturbflow.train import train

EMPTY = Embeddings(pd.DataFrame())
CLOSED_FORMS = [
    family for family in FAMILIES.values() if family.rule == "train_closed_form" and not family.made_elsewhere
]
IMPLEMENTATIONS = {family.implementation: {} for family in CLOSED_FORMS} | {
    "closed_form.baselines:Linear": {"n_components": 10, "ridge": 0.1}
}
SHIFTS = [family.implementation for family in CLOSED_FORMS if family.kind == "baseline"]
GENES = [f"G{i}" for i in range(12)]


def planted(effects: dict[str, np.ndarray], control: np.ndarray, n: int = 4) -> Pairs:
    """Return training cells whose mean effects are exactly those planted."""
    labels = ["control"] * n + [label for label in effects for _ in range(n)]
    shift = np.stack([np.zeros(len(control)) if label == "control" else effects[label] for label in labels])
    noise = np.resize([0.1, -0.1], len(labels))[:, None]
    obs = pd.DataFrame(
        {"perturbation": labels, "is_control": [label == "control" for label in labels], "batch": "b", "cell_type": "t",
         "role": "train",
         "half": ""}
    )  # fmt: skip
    index = np.where(obs["is_control"].to_numpy()[:, None], -1, np.zeros((len(obs), 1), int)).astype(np.int32)
    return Pairs(sparse.csr_matrix(control + shift + noise), obs, GENES, index, np.arange(len(obs)))


@pytest.fixture
def effects() -> dict[str, np.ndarray]:
    """Return effects of three singles and a combination that is their sum."""
    rng = np.random.default_rng(0)
    singles = {gene: rng.normal(size=12) for gene in ("G0", "G1", "G2")}
    return {**singles, "G0+G1": singles["G0"] + singles["G1"]}


CONTROL = np.linspace(3.0, 5.0, 12)


def fitted(implementation: str, pairs: Pairs, params: dict | None = None) -> Model:
    """Return a fitted model."""
    model = build(implementation, IMPLEMENTATIONS[implementation] if params is None else params)
    model.fit(pairs, EMPTY, Run(seed=0))
    return model


def predicted_effect(model: Model, label: str) -> np.ndarray:
    """Return what a model says that a perturbation changes."""
    return model.individual_effects(CONTROL[None, :], label, 0)[0]


# --- each closed form -----------------------------------------------------------------------------------------------


def test_additive_is_exact_on_additive_data(effects: dict[str, np.ndarray]) -> None:
    model = fitted("closed_form.baselines:Additive", planted(effects, CONTROL))
    for a, b in (("G0", "G2"), ("G1", "G2"), ("G0", "G1")):
        assert np.allclose(predicted_effect(model, f"{a}+{b}"), effects[a] + effects[b], atol=1e-5)
    assert np.allclose(predicted_effect(model, "G2"), effects["G2"], atol=1e-5)


def test_additive_gives_an_unseen_member_the_mean_single_effect(effects: dict[str, np.ndarray]) -> None:
    model = fitted("closed_form.baselines:Additive", planted(effects, CONTROL))
    mean = np.mean([effects[gene] for gene in ("G0", "G1", "G2")], axis=0)
    assert np.allclose(predicted_effect(model, "G0+G9"), effects["G0"] + mean, atol=1e-5)
    assert np.allclose(predicted_effect(model, "G8+G9"), 2 * mean, atol=1e-5)
    assert np.allclose(predicted_effect(model, "G9"), mean, atol=1e-5)


def test_additive_without_singles_falls_back_on_the_mean_effect(effects: dict[str, np.ndarray]) -> None:
    model = fitted("closed_form.baselines:Additive", planted({"G0+G1": effects["G0+G1"]}, CONTROL))
    assert np.allclose(predicted_effect(model, "G5"), effects["G0+G1"] / 2, atol=1e-5)


def test_perturbed_mean_averages_over_perturbations(effects: dict[str, np.ndarray]) -> None:
    model = fitted("closed_form.baselines:PerturbedMean", planted(effects, CONTROL))
    assert np.allclose(predicted_effect(model, "G9"), np.mean(list(effects.values()), axis=0), atol=1e-5)


def test_no_change_changes_nothing(effects: dict[str, np.ndarray]) -> None:
    model = fitted("closed_form.baselines:NoChange", planted(effects, CONTROL))
    assert not predicted_effect(model, "G0+G9").any()


def literal_linear(effects: dict[str, np.ndarray], genes: list[str], k: int, penalty: float, label: str) -> np.ndarray:
    """Return the bilinear baseline of Ahlmann-Eltze et al. 2025, `run_linear_pretrained_model.R`, line by line.

    Ŷ = G W P + b, W = (GᵀG + λI)⁻¹ Gᵀ (Y − b) Pᵀ (P Pᵀ + λI)⁻¹, b the row means of Y, G the scores of a centred PCA of
    genes × training conditions (control included), P the rows of G of the perturbed genes, zero for control.
    """
    conditions = ["control", *sorted(effects)]
    Y = np.array([[0.0 if c == "control" else effects[c][g] for c in conditions] for g in range(len(genes))])
    b = np.array([[row.mean()] for row in Y])
    columns = Y - np.array([Y[:, j].mean() for j in range(Y.shape[1])])[None, :]
    values, vectors = np.linalg.eigh(columns.T @ columns)
    order = np.argsort(values)[::-1]
    order = [i for i in order if values[i] > 1e-12 * values.max()][:k]
    G = columns @ vectors[:, order]
    P = np.zeros((G.shape[1], len(conditions)))
    for j, condition in enumerate(conditions):
        for member in condition.split("+"):
            if condition != "control":
                P[:, j] += G[genes.index(member)]
    identity = np.eye(G.shape[1])
    W = np.linalg.inv(G.T @ G + penalty * identity) @ G.T @ (Y - b) @ P.T @ np.linalg.inv(P @ P.T + penalty * identity)
    p = sum(G[genes.index(member)] for member in label.split("+"))
    return G @ W @ p + b[:, 0]


@pytest.mark.parametrize(("k", "penalty"), [(10, 0.1), (2, 0.1), (3, 5.0)])
@pytest.mark.parametrize("label", ["G0", "G7", "G0+G1", "G2+G9"])
def test_linear_is_the_published_formula(k: int, penalty: float, label: str, effects: dict[str, np.ndarray]) -> None:
    model = fitted("closed_form.baselines:Linear", planted(effects, CONTROL), {"n_components": k, "ridge": penalty})
    assert np.allclose(predicted_effect(model, label), literal_linear(effects, GENES, k, penalty, label), atol=1e-4)


def test_linear_predicts_a_gene_that_is_not_measured_by_the_row_means(effects: dict[str, np.ndarray]) -> None:
    model = fitted("closed_form.baselines:Linear", planted(effects, CONTROL))
    b = np.mean([np.zeros(12), *effects.values()], axis=0)
    assert np.allclose(predicted_effect(model, "not_measured"), b, atol=1e-5)


def test_linear_leaves_conditions_of_unmeasured_genes_out_of_the_fit(effects: dict[str, np.ndarray]) -> None:
    more = {**effects, "absent": np.full(12, 50.0)}
    with_it, without = (fitted("closed_form.baselines:Linear", planted(e, CONTROL)) for e in (more, effects))
    assert np.allclose(predicted_effect(with_it, "G7"), predicted_effect(without, "G7"), atol=1e-4)


def test_linear_without_any_effect_predicts_none() -> None:
    model = fitted("closed_form.baselines:Linear", planted({"G0": np.zeros(12), "G1": np.zeros(12)}, CONTROL))
    assert np.allclose(predicted_effect(model, "G5"), 0.0, atol=1e-5)


# --- the interface --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_model_is_the_same_after_a_round_trip_through_its_file(
    implementation: str, prepared: dict[str, Prepared], tmp_path: Path
) -> None:
    cells = Pairs.read(prepared["unseen_combination"].pairs)
    model = build(implementation, IMPLEMENTATIONS[implementation])
    artefact = model.fit(
        cells if isinstance(model, Ceiling) else cells.roles("train", "validation"), EMPTY, Run(seed=0)
    )
    save_artefact(tmp_path / "model.npz", artefact)
    restored = build(implementation, IMPLEMENTATIONS[implementation])
    restored.restore(load_artefact(tmp_path / "model.npz"))
    test = cells.roles("test")
    start = test.X[test.is_control][:7].toarray()
    label = test.perturbations[0]
    first, second = (some.predict(start, [label], 11, 0) for some in (model, restored))
    assert np.array_equal(first, second)
    assert first.shape == (1, 11, len(cells.genes))
    assert not list(tmp_path.glob(".*")), "nothing partial is left"


@pytest.mark.parametrize("implementation", SHIFTS)
def test_predicted_cells_have_the_mean_that_is_predicted(implementation: str, prepared: dict[str, Prepared]) -> None:
    """Few controls are off the mean of all by chance: what is predicted from them is not."""
    cells = Pairs.read(prepared["unseen_combination"].pairs)
    model = build(implementation, IMPLEMENTATIONS[implementation])
    model.fit(cells.roles("train", "validation"), EMPTY, Run(seed=0))
    test = cells.roles("test")
    start, label = test.X[test.is_control].toarray(), test.perturbations[0]
    chance = np.random.default_rng(0).normal(scale=0.05, size=start.shape[1])
    level = np.maximum(start.mean(axis=0) + chance, 0.0)
    context = Context(np.array(["new"] * len(start)), {"new": level})
    predicted = model.predict(start, [label, "control"], len(start), 0, context)
    effect = model.individual_effects(start, label, 0, context)[0]
    off = predicted[0].mean(axis=0) - np.maximum(level + effect, 0.0)
    assert np.sqrt(np.square(off).mean()) < 0.1 * np.sqrt(np.square(chance).mean())
    np.testing.assert_array_equal(predicted[1], start)


def test_a_counterfactual_is_one_answer_per_cell_and_sample(effects: dict[str, np.ndarray]) -> None:
    model = fitted("closed_form.baselines:Additive", planted(effects, CONTROL))
    start = np.stack([CONTROL, CONTROL + 1])
    answers = model.counterfactual(start, ["G0", "G1"], 3, 0)
    assert answers.shape == (2, 2, 3, 12)
    for i, gene in enumerate(("G0", "G1")):
        for j in range(2):
            assert np.allclose(answers[i, j], start[j] + effects[gene], atol=1e-5)


def test_a_model_never_sees_test_cells(
    prepared: dict[str, Prepared], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = prepared["unseen_combination"]
    seen: dict[str, set] = {}

    def watch(implementation: str) -> None:
        family = type(build(implementation, IMPLEMENTATIONS[implementation]))
        original = family.fit

        def fit(self: Model, pairs: Pairs, embeddings: Embeddings, run: Run) -> dict:
            seen[implementation] = set(pairs.obs["role"])
            return original(self, pairs, embeddings, run)

        monkeypatch.setattr(family, "fit", fit)
        paths = (tmp_path / "model.npz", tmp_path / "run.json")
        train(here.pairs, here.embeddings, here.audit, *paths, implementation, IMPLEMENTATIONS[implementation], 0)

    watch("closed_form.baselines:Additive")
    watch("closed_form.ceilings:TechnicalDuplicate")
    assert seen == {
        "closed_form.baselines:Additive": {"train"},
        "closed_form.ceilings:TechnicalDuplicate": {"train", "validation", "test"},
    }


def test_run_json_tells_what_went_in(prepared: dict[str, Prepared], tmp_path: Path) -> None:
    here = prepared["unseen_combination"]
    paths = (tmp_path / "model.npz", tmp_path / "run.json")
    params = {"n_components": 3, "ridge": 0.5}
    train(
        here.pairs,
        here.embeddings,
        here.audit,
        *paths,
        "closed_form.baselines:Linear",
        params,
        7,
        provenance={"model": "linear", "code_version": "abc"},
    )
    content = json.loads(paths[1].read_text())
    assert content["params"] == params
    assert content["seed"] == 7
    assert content["provenance"]["code_version"] == "abc"
    assert set(content["inputs_sha256"]) == {"pairs.h5ad", "embeddings.parquet", "audit.json"}
    assert content["split_sha256"] == json.loads(here.split.read_text())["sha256"]
    assert {"device", "seconds", "peak_memory_mb", "versions"} <= set(content)
    assert content["n_parameters"] > 0


# --- artefacts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["truncated", "text", "empty"])
def test_a_damaged_artefact_is_told(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "model.npz"
    save_artefact(path, {"effect": np.zeros(50)})
    content = path.read_bytes()
    path.write_bytes({"truncated": content[: len(content) // 2], "text": b"no arrays", "empty": b""}[damage])
    with pytest.raises(InputError, match=r"model\.npz is damaged and cannot be loaded .*Delete it and run again"):
        load_artefact(path)


def test_wherever_a_byte_flips_the_values_are_right_or_the_damage_is_told(tmp_path: Path) -> None:
    path = tmp_path / "model.npz"
    save_artefact(path, {"effect": np.zeros(50), "genes": np.array(["A", "B"])})
    content = path.read_bytes()
    n_told = 0
    for position in range(len(content)):
        damaged = bytearray(content)
        damaged[position] ^= 0xFF
        path.write_bytes(damaged)
        try:
            arrays = load_artefact(path)
        except InputError:
            n_told += 1
        else:
            assert all((value == 0).all() for value in arrays.values() if value.dtype.kind == "f"), position
    assert n_told > len(content) / 3


def test_loading_an_artefact_runs_no_code(tmp_path: Path) -> None:
    path = tmp_path / "model.npz"
    with path.open("wb") as file:
        np.savez(file, effect=np.array([{"a": 1}], dtype=object))
    with pytest.raises(InputError, match=r"model\.npz is damaged"):
        load_artefact(path)


# --- prediction -----------------------------------------------------------------------------------------------------


@given(
    st.integers(1, 30).flatmap(
        lambda n: st.lists(st.lists(st.floats(-3, 3, width=32), min_size=4, max_size=4), min_size=n, max_size=n)
    )
)  # fmt: skip
@settings(max_examples=100, deadline=None)
def test_no_expression_is_negative_and_positive_means_are_kept(rows: list[list[float]]) -> None:
    cells = np.array(rows, dtype=np.float64)
    result = nonnegative(cells)
    assert (result >= 0).all()
    assert np.allclose(result.mean(axis=0), np.maximum(cells.mean(axis=0), 0.0), atol=1e-9)
    untouched = (cells >= 0).all(axis=0)
    assert np.allclose(result[:, untouched], cells[:, untouched])


@pytest.fixture
def predictions(prepared: dict[str, Prepared], tmp_path: Path) -> tuple[ad.AnnData, ad.AnnData]:
    """Return predictions of the additive model, and the pairs."""
    here = prepared["unseen_combination"]
    train(
        here.pairs,
        here.embeddings,
        here.audit,
        tmp_path / "model.npz",
        tmp_path / "run.json",
        "closed_form.baselines:Additive",
        {},
        0,
    )
    predict(
        here.pairs, tmp_path / "model.npz", tmp_path / "predictions.h5ad", "closed_form.baselines:Additive", {}, 0, 1000
    )
    return ad.read_h5ad(tmp_path / "predictions.h5ad"), ad.read_h5ad(here.pairs)


def test_predictions_start_from_test_controls_of_the_batch(predictions: tuple[ad.AnnData, ad.AnnData]) -> None:
    predicted, pairs = predictions
    start = pairs.obs.iloc[predicted.obs["control_index"]]
    assert start["is_control"].all()
    assert set(start["role"]) == {"test"}
    for column in ("batch", "cell_type"):
        assert (start[column].astype(str).to_numpy() == predicted.obs[column].astype(str).to_numpy()).all()


def test_predictions_have_the_genes_scale_and_cells_of_the_measured(predictions: tuple[ad.AnnData, ad.AnnData]) -> None:
    predicted, pairs = predictions
    test = pairs[(pairs.obs["role"] == "test") & ~pairs.obs["is_control"]]
    assert list(predicted.var_names) == list(pairs.var_names)
    assert list(predicted.obs.columns) == ["perturbation", "cell_type", "batch", "control_index"]
    assert predicted.X.dtype == np.float32
    assert predicted.X.data.min() >= 0
    of_batch = ["perturbation", "batch"]
    assert (
        predicted.obs.groupby(of_batch, observed=True).size().to_dict()
        == test.obs.groupby(of_batch, observed=True).size().to_dict()
    )
    assert all(len(members_of(label)) == 2 for label in predicted.obs["perturbation"].unique())


@pytest.mark.parametrize(
    "implementation", [family.implementation for family in CLOSED_FORMS if family.kind == "ceiling"]
)
def test_the_cells_of_a_ceiling_keep_their_batch(
    implementation: str, prepared: dict[str, Prepared], tmp_path: Path
) -> None:
    here = prepared["unseen_combination"]
    train(here.pairs, here.embeddings, here.audit, tmp_path / "model.npz", tmp_path / "run.json", implementation, {}, 0)
    predict(here.pairs, tmp_path / "model.npz", tmp_path / "predictions.h5ad", implementation, {}, 0, 1000)
    predicted, pairs = ad.read_h5ad(tmp_path / "predictions.h5ad"), ad.read_h5ad(here.pairs)
    start = pairs.obs.iloc[predicted.obs["control_index"]]
    assert (start["batch"].astype(str).to_numpy() == predicted.obs["batch"].astype(str).to_numpy()).all()
    duplicates = pairs[(pairs.obs["role"] == "test") & (pairs.obs["half"] == "a")]
    of = ["perturbation", "batch"]
    assert (
        predicted.obs.groupby(of, observed=True).size().to_dict()
        == duplicates.obs.groupby(of, observed=True).size().to_dict()
    )
    if implementation.endswith("TechnicalDuplicate"):
        for batch in ("b1", "b2"):
            cells = [some[(some.obs["batch"] == batch).to_numpy()].X.toarray() for some in (predicted, duplicates)]
            np.testing.assert_allclose(*(np.sort(values.sum(axis=1)) for values in cells), rtol=1e-5)


def test_predicted_means_are_control_plus_effect(predictions: tuple[ad.AnnData, ad.AnnData]) -> None:
    predicted, pairs = predictions
    label = predicted.obs["perturbation"].cat.categories[0]
    rows = (predicted.obs["perturbation"] == label).to_numpy()
    started = pairs.obs.iloc[predicted.obs.loc[rows, "control_index"].to_numpy()]["batch"].astype(str).to_numpy()
    is_start = ((pairs.obs["role"] == "test") & pairs.obs["is_control"]).to_numpy()
    of_batch = pairs.obs["batch"].astype(str).to_numpy()
    expected = sum(
        (started == b).mean() * pairs.X[is_start & (of_batch == b)].toarray().mean(axis=0) for b in ("b1", "b2")
    )
    train_cells = pairs[(pairs.obs["role"] != "test").to_numpy()]  # of validation, too
    X, batch = train_cells.X.toarray(), train_cells.obs["batch"].astype(str).to_numpy()
    for gene in members_of(label):
        of_gene = (train_cells.obs["perturbation"] == gene).to_numpy()
        control = sum(
            (batch[of_gene] == b).mean() * X[train_cells.obs["is_control"].to_numpy() & (batch == b)].mean(axis=0)
            for b in ("b1", "b2")
        )
        expected += X[of_gene].mean(axis=0) - control
    found = predicted.X[rows].toarray().mean(axis=0)
    assert np.allclose(found, np.maximum(expected, 0.0), atol=0.01)


def test_validation_is_learned_from_unless_it_is_scored(prepared: dict[str, Prepared], tmp_path: Path) -> None:
    """A closed form that looks effects up knows those of validation where test is scored, and only there."""
    here = prepared["unseen_perturbation"]
    cells = Pairs.read(here.pairs)
    validation = cells.roles("validation")
    label = next(label for label in validation.perturbations if "+" not in label)
    off = {}
    for scored in ("test", "validation"):
        files = tmp_path / f"{scored}.npz", tmp_path / f"{scored}.json"
        train(here.pairs, here.embeddings, here.audit, *files, "closed_form.baselines:Additive", {}, 0, scored=scored)
        assert json.loads(files[1].read_text())["scored"] == scored
        model = build("closed_form.baselines:Additive", {})
        model.restore(load_artefact(files[0]))
        off[scored] = np.abs(model.effect(label) - validation.effect_of(label)).mean()
    assert off["test"] < 0.5 * off["validation"]


def test_the_number_of_predicted_cells_is_capped(prepared: dict[str, Prepared], tmp_path: Path) -> None:
    here = prepared["unseen_combination"]
    train(
        here.pairs,
        here.embeddings,
        here.audit,
        tmp_path / "model.npz",
        tmp_path / "run.json",
        "closed_form.baselines:NoChange",
        {},
        0,
    )
    paths = [tmp_path / f"{name}.h5ad" for name in ("first", "second", "validation")]
    for path, role in zip(paths, ("test", "test", "validation"), strict=True):
        predict(here.pairs, tmp_path / "model.npz", path, "closed_form.baselines:NoChange", {}, 0, 13, role)
    first, second, validation = (ad.read_h5ad(path) for path in paths)
    assert set(first.obs["perturbation"].value_counts()) == {13}
    assert (first.X != second.X).nnz == 0
    assert not set(validation.obs["perturbation"]) & set(first.obs["perturbation"])
