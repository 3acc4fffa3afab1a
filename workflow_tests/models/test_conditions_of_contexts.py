"""Contexts as a condition of the networks: vectors by controls, and effects that depend on the context."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from learned import registered, trained
from made_lines import made_lines
from scipy import sparse

from perturbflow.controls import match_controls
from perturbflow.embeddings import Embeddings
from perturbflow.io.artefacts import load_artefact, save_artefact
from perturbflow.models.base import build
from perturbflow.models.training.contexts import Contexts
from perturbflow.pairs import Pairs

SHORT = {"n_steps": 250, "batch_size": 64, "n_latent": 8, "ema_decay": 0.9}
QUICK = {
    "scppdm": {**SHORT, "latent": "pca", "width": 32, "n_sampling_steps": 4},
    "jepa": {**SHORT, "mean": "learned", "n_steps_representation": 60, "n_steps_decoder": 60, "when_broken": "report"},
    "counterfactual": {**SHORT, "mean": "learned"},
}
LABELS, N_GENES = [f"P{i}" for i in range(6)], 40
LINES = ("line0", "line1", "like_line0")


def opposed(seed: int = 0) -> Pairs:
    """Return cells of lines that look alike. In one, perturbations have weaker effects, of opposite sign.

    Only controls of `like_line0` train; their mean lies near that of line0.
    """
    rng = np.random.default_rng(seed)
    level, apart = np.log(20.0) + 0.3 * rng.normal(size=N_GENES), np.zeros(N_GENES)
    apart[:2] = 0.15
    effects = {label: 0.8 * rng.normal(size=N_GENES) * (rng.random(N_GENES) < 0.3) for label in LABELS}
    rows, counts = [], []
    for line, (place, sign) in zip(LINES, [(0.0, 1.0), (1.0, -0.4), (0.05, 1.0)], strict=True):
        for label in ("control", *LABELS):
            n = 120 if label == "control" else 25
            log_rate = level + place * apart + sign * effects.get(label, 0.0)
            counts.append(rng.poisson(np.exp(log_rate), (n, N_GENES)))
            role = "test" if line == LINES[2] and label != "control" else "train"
            rows += [(label, label == "control", f"{line}:b", "cell", line, role)] * n
    obs = pd.DataFrame(rows, columns=["perturbation", "is_control", "batch", "cell_type", "dataset", "role"])
    obs.index = [f"cell_{i}" for i in range(len(obs))]
    of_new = np.flatnonzero((obs["dataset"] == LINES[2]) & obs["is_control"])
    obs.iloc[of_new[::2], obs.columns.get_loc("role")] = "test"
    table = np.vstack(counts)
    X = sparse.csr_matrix(np.log1p(table / table.sum(axis=1, keepdims=True) * 20.0 * N_GENES).astype(np.float32))
    genes = [f"G{i}" for i in range(N_GENES)]
    return Pairs(X, obs, genes, match_controls(obs, 2, 0)[0], np.arange(len(obs)))


def vectors_of_genes() -> Embeddings:
    values = np.random.default_rng(1).normal(size=(len(LABELS), 3))
    return Embeddings(pd.DataFrame(values, index=LABELS, columns=[f"x:{i}" for i in range(3)]))


def effects_in(model: object, pairs: Pairs, line: str) -> np.ndarray:
    """Return predicted effects of all perturbations on controls of a line, (perturbations, genes)."""
    rows = np.flatnonzero(pairs.is_control & (pairs.obs["dataset"] == line).to_numpy())
    context = pairs.context_of(rows)
    start = pairs.X[rows].toarray()
    found = model.predict(start, LABELS, len(start), 0, context)
    return found.mean(axis=1) - context.level


def r(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.corrcoef(a.ravel(), b.ravel())[0, 1])


@pytest.mark.slow
@pytest.mark.parametrize("name", QUICK)
def test_a_network_that_is_told_of_contexts_tells_their_effects_apart(name: str, tmp_path: Path) -> None:
    """The other one can only guess from cells that look alike. A new line has the effects of the one that is near."""
    pairs, embeddings = opposed(), vectors_of_genes()
    train = pairs.roles("train")
    apart = {}
    for context in ("cells", "controls"):
        model, artefact, _ = trained(name, pairs, embeddings, tmp_path / context, context=context, **QUICK[name])
        first, second = (effects_in(model, train, line) for line in LINES[:2])
        apart[context] = r(first, second)
        assert ("contexts" in artefact) == (context == "controls")
    assert apart["controls"] < -0.3
    assert apart["cells"] > apart["controls"] + 0.5
    measured = np.stack([train.effects_by_context["line0:b", "cell"][label] for label in LABELS])
    assert r(first, measured) > 0.7
    assert r(effects_in(model, pairs.roles("test"), LINES[2]), measured) > 0.6
    rows = np.flatnonzero(train.is_control & (train.obs["dataset"] == "line1").to_numpy())
    start, where = train.X[rows].toarray(), train.context_of(rows)
    asked = model.counterfactual(start, LABELS[:2], 2, 0, where).mean(axis=(1, 2)) - start.mean(axis=0)
    individual = np.stack([model.individual_effects(start, label, 0, where).mean(axis=0) for label in LABELS[:2]])
    assert min(r(asked, second[:2]), r(individual, second[:2])) > 0.9
    save_artefact(tmp_path / "model.ckpt", artefact)
    restored = build(*registered(name, context="controls", **QUICK[name]))
    restored.restore(load_artefact(tmp_path / "model.ckpt"))
    np.testing.assert_allclose(effects_in(restored, train, "line1"), second, atol=1e-5)


@pytest.mark.parametrize("name", QUICK)
@pytest.mark.slow
def test_one_context_trains_the_same_network_as_before(name: str, tmp_path: Path) -> None:
    pairs = opposed()
    pairs = pairs.select((pairs.obs["dataset"] == "line0").to_numpy())
    params = {**QUICK[name], "n_steps": 20}
    states = [
        trained(name, pairs, vectors_of_genes(), tmp_path / context, context=context, **params)[1]
        for context in ("cells", "controls")
    ]
    assert states[0].keys() == states[1].keys()
    assert states[0]["state"].keys() == states[1]["state"].keys()
    for key, value in states[0]["state"].items():
        assert torch.equal(value, states[1]["state"][key]), key


def test_vectors_of_contexts_lie_between_those_that_training_perturbs() -> None:
    lines = made_lines(4, 10)
    pairs = lines.held_out("line3", None)
    contexts = Contexts.of(pairs.roles("train"))
    assert contexts.names == ["line0|line0", "line1|line1", "line2|line2"]
    own = contexts.vectors(contexts.levels)
    np.testing.assert_allclose(own.mean(axis=0), 0.0, atol=1e-9)
    assert np.sqrt((own**2).mean()) == pytest.approx(1.0)
    assert (own.argmax(axis=1) == np.arange(3)).all()
    nearly = contexts.vectors(0.9 * contexts.levels[[1]] + 0.1 * contexts.levels[[0]])
    assert np.abs(nearly - own[1]).max() < np.abs(own[0] - own[1]).max() / 4
    far = contexts.vectors(np.full((1, contexts.levels.shape[1]), 50.0))
    assert np.abs(far).max() < 0.3, "a line like none is the average of all"
    train, new = pairs.roles("train"), pairs.roles("test")
    rows = np.flatnonzero(train.is_control)
    of_cells = contexts.of_cells(train.context_of(rows), len(rows))
    torch.testing.assert_close(of_cells, contexts.of_pairs(train)[torch.from_numpy(rows)])
    of_new = contexts.of_cells(new.context_of(np.flatnonzero(new.is_control)), 2 * int(new.is_control.sum()))
    assert len(of_new) == 2 * new.is_control.sum()
    assert of_new.unique(dim=0).shape == (1, 3)
    assert torch.equal(contexts.of_cells(None, 3), torch.zeros(3, 3))
    back = Contexts.restored(contexts.state())
    np.testing.assert_array_equal(back.vectors(back.levels), own)


def test_many_batches_of_one_screen_are_no_contexts() -> None:
    pairs = made_lines(1, 5, n_batches=12).pairs
    assert Contexts.of(pairs) is None
