"""Cells that stay on disk give the numbers of memory; rows are read in parts, and predictions written in blocks."""

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pytest
import torch
from conftest import SPECS, Prepared, make_screen, prepare
from encoders import exported
from learned import registered
from scipy import sparse

from perturbflow import predict as prediction
from perturbflow.embeddings import Embeddings
from perturbflow.io import hdf5, streaming
from perturbflow.models.base import Model, Run, build
from perturbflow.models.closed_form.base import TrainingSet
from perturbflow.models.effects import Effects
from perturbflow.models.gaussian_process.set_gp import SetGP
from perturbflow.models.latents import vae as autoencoder
from perturbflow.models.latents.pca import LatentSpace
from perturbflow.models.latents.vae import CellSampler
from perturbflow.models.training import batches
from perturbflow.models.training.batches import PairedCells, encoded
from perturbflow.models.training.conditions import Conditions
from perturbflow.pairs import Pairs
from perturbflow.train import train

COMBINATION = "unseen_combination"
SHARES = {"control_share": 0.2, "synthetic_share": 0.3, "shifted_share": 0.3, "cells_together": 4}
TINY = {"n_steps": 10, "batch_size": 16, "n_latent": 8}
TINY_JEPA = {**TINY, "n_steps_representation": 10, "n_steps_decoder": 10, "when_broken": "report"}


def tiny(name: str) -> dict:
    """Return params of a training that is soon over."""
    return TINY_JEPA if name == "jepa" else TINY


@pytest.fixture
def both(prepared: dict[str, Prepared]) -> tuple[Pairs, Pairs]:
    """Return the pairs of one split in memory and on disk."""
    path = prepared[COMBINATION].pairs
    return Pairs.read(path), Pairs.open(path)


# --- rows on disk ---------------------------------------------------------------------------------------------------


def written(path: Path, X: sparse.csr_matrix, chunk: int, **filters: object) -> hdf5.CsrRows:
    """Write a matrix in chunks of some values; return its rows on disk."""
    with h5py.File(path, "w") as file:
        group = file.create_group("X")
        group.attrs["shape"] = X.shape
        group["indptr"] = X.indptr
        group.create_dataset("data", data=X.data, chunks=(chunk,), **filters)
        group.create_dataset("indices", data=X.indices, chunks=(chunk,), **filters)
    return hdf5.CsrRows(h5py.File(path)["X"], path)


def random_matrix(n_rows: int = 300) -> sparse.csr_matrix:
    X = sparse.random(n_rows, 20, 0.3, dtype=np.float32, random_state=0).toarray()
    X[[0, 7, n_rows - 1]] = 0.0  # rows without a value, also at the ends
    return sparse.csr_matrix(X)


@pytest.mark.parametrize("gap", [0, 2**15], ids=["run by run", "near ones together"])
@pytest.mark.parametrize("span", [1, 50, 2**21])
def test_rows_come_in_the_order_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gap: int, span: int) -> None:
    monkeypatch.setattr(hdf5, "GAP", gap)
    monkeypatch.setattr(hdf5, "SPAN", span)
    X = random_matrix()
    rows = written(tmp_path / "X.h5", X, 37, compression="gzip", shuffle=True)
    rng = np.random.default_rng(0)
    mask = rng.random(300) < 0.4
    for wanted in (
        slice(None),
        slice(20, 90),
        mask,
        rng.permutation(300),
        rng.integers(0, 300, 500),
        np.array([], dtype=int),
        [299, 0, 7, 0],
    ):
        found = rows[np.array(wanted) if isinstance(wanted, list) else wanted]
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found.toarray(), X[wanted].toarray())
    some = rows.select(np.flatnonzero(mask)).select(np.array([5, 3, 60]))
    np.testing.assert_array_equal(some[:].toarray(), X[np.flatnonzero(mask)[[5, 3, 60]]].toarray())
    np.testing.assert_array_equal(some.n_stored, np.diff(some[:].indptr))


def test_no_chunk_is_decoded_twice_by_a_pass_or_a_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    X = random_matrix()
    rows = written(tmp_path / "X.h5", X, 100, compression="gzip")
    decoded = []
    decode = hdf5.Rows._decoded
    monkeypatch.setattr(
        hdf5.Rows, "_decoded", lambda self, origin: decoded.append((self.dataset.name, origin)) or decode(self, origin)
    )
    monkeypatch.setattr(hdf5, "SPAN", 170)
    rows[np.random.default_rng(0).permutation(300)]
    n_chunks = 2 * -(-X.nnz // 100)
    assert sorted(set(decoded)) == sorted(decoded)
    assert len(decoded) == n_chunks
    decoded.clear()
    for first in range(0, 300, 11):
        rows[first : first + 11]
    assert len(decoded) == n_chunks


def test_scattered_rows_leave_the_chunks_between_them_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    X = random_matrix()
    rows = written(tmp_path / "X.h5", X, 30, compression="gzip")
    decoded = []
    decode = hdf5.Rows._decoded
    monkeypatch.setattr(hdf5.Rows, "_decoded", lambda self, origin: decoded.append(origin) or decode(self, origin))
    monkeypatch.setattr(hdf5, "GAP", 30)
    rows[np.array([10, 290])]
    assert len(decoded) <= 8


# --- the same numbers from disk as from memory ----------------------------------------------------------------------


def test_effects_are_those_measured_label_by_label(both: tuple[Pairs, Pairs], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "ROWS_AT_ONCE", 50)
    memory, disk = both
    training = memory.roles("train")
    whole = Effects.of_training(disk)
    assert whole.labels == training.perturbations
    expected = np.stack([training.effect_of(label) for label in whole.labels])
    np.testing.assert_allclose(whole.values, expected, atol=3e-6)  # those are sums of 32 bits
    errors = np.stack([training.variance_of(rows) / len(rows) for rows in map(training.cells_of, whole.labels)])
    np.testing.assert_allclose(disk.roles("train").squared_errors, errors, atol=1e-6)
    np.testing.assert_allclose(disk.control_level, memory.mean_of(np.flatnonzero(memory.is_control)), atol=1e-6)


def without_controls_of(pairs: Pairs, batch: str, *, but: int) -> Pairs:
    """Return training cells without the controls of one batch but the first few."""
    training = pairs.roles("train")
    there = np.flatnonzero(training.is_control & (training.obs["batch"] == batch).to_numpy())
    mask = np.ones(len(training.rows), dtype=bool)
    mask[there[but:]] = False
    return training.select(mask)


@pytest.mark.parametrize("n_left", [0, 1, 5])
def test_halves_of_the_controls_are_dealt_out_within_strata(both: tuple[Pairs, Pairs], n_left: int) -> None:
    """Where a batch has no control all others serve, where it has one that is in both halves."""
    training = without_controls_of(both[0], "b2", but=n_left)
    halves = Effects.with_disjoint_controls(without_controls_of(both[1], "b2", but=n_left))
    controls = training.obs[training.is_control].groupby(["batch", "cell_type"], observed=True)
    is_odd, is_alone = (controls.cumcount() % 2 == 1).to_numpy(), (controls["role"].transform("size") < 2).to_numpy()
    for half, keep in zip(halves, (is_odd, ~is_odd), strict=True):
        mask = np.ones(len(training.rows), dtype=bool)
        mask[np.flatnonzero(training.is_control)] = keep | is_alone
        kept = training.select(mask)
        np.testing.assert_allclose(half.values, [kept.effect_of(label) for label in half.labels], atol=3e-6)


def paired(pairs: Pairs, embeddings: Path, role: str, *, residual: bool) -> tuple[PairedCells, LatentSpace]:
    effects = Effects.of_training(pairs)
    latent = LatentSpace.fit(pairs, effects, 12)
    table = Embeddings.read(embeddings).standardized(effects.genes)
    cells, conditions = pairs.roles(role), Conditions(list(table.index), table.to_numpy())
    return PairedCells(cells, encoded(cells, latent), conditions, **SHARES, residual=residual), latent


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("role", ["train", "validation"])
def test_batches_are_the_same(
    both: tuple[Pairs, Pairs], prepared: dict[str, Prepared], monkeypatch: pytest.MonkeyPatch, role: str, residual: bool
) -> None:
    memory, latent = paired(both[0], prepared[COMBINATION].embeddings, role, residual=residual)
    monkeypatch.setattr(streaming, "ROWS_AT_ONCE", 64)
    disk, latent_of_disk = paired(both[1], prepared[COMBINATION].embeddings, role, residual=residual)
    for name, value in latent.state().items():
        np.testing.assert_allclose(latent_of_disk.state()[name], value, atol=1e-6)
    for step in range(3):
        a, b = memory.batch(40, (0, step)), disk.batch(40, (0, step))
        for name in ("start", "target", "genes", "group"):
            torch.testing.assert_close(getattr(a, name), getattr(b, name), atol=1e-5, rtol=0)
    pairs = both[0].roles(role)
    in_latent = replace(pairs, X=sparse.csr_matrix(memory.z.numpy()))
    expected = np.stack([in_latent.effect_of(label) for label in memory.labels])
    np.testing.assert_allclose(memory.effect[:-1], expected, atol=1e-5)
    rows = np.array([pairs.cells_of(memory.labels[-1])[0], np.flatnonzero(pairs.is_control)[0]])
    np.testing.assert_allclose(
        memory.shifted(rows).numpy(), memory.z[rows].numpy() - [expected[-1], np.zeros(12)], atol=1e-5
    )


class Watched:
    """Rows on disk that count how many are read, and at once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.at_once: list[int] = []
        read = hdf5.CsrRows._read
        monkeypatch.setattr(hdf5.CsrRows, "_read", lambda X, rows: self.at_once.append(len(rows)) or read(X, rows))


def fitted(name: str, pairs: Pairs, embeddings: Path, folder: Path, **changes: object) -> tuple[Model, dict]:
    implementation, params = registered(name, **{**tiny(name), **changes})
    model = build(implementation, params)
    run = Run(seed=0, checkpoints=folder, identity="test")
    return model, model.fit(pairs.roles("train", "validation"), Embeddings.read(embeddings), run)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "latent"),
    [("scppdm", "counts"), ("scppdm", "pca"), ("scppdm", "external"), ("jepa", None), ("counterfactual", None)],
)
def test_trained_weights_are_the_same_and_no_role_is_read_as_a_whole(
    name: str,
    latent: str | None,
    both: tuple[Pairs, Pairs],
    prepared: dict[str, Prepared],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if latent == "external":
        latent = {"file": str(exported(tmp_path / "encoder.pt2", both[0].genes))}
    changes = {"latent": latent} if latent else {"mean": "learned"} if name in ("jepa", "counterfactual") else {}
    monkeypatch.setattr(batches, "STEPS_PER_EPOCH", 5)
    monkeypatch.setattr(streaming, "ROWS_AT_ONCE", 64)
    embeddings = prepared[COMBINATION].embeddings
    _, expected = fitted(name, both[0], embeddings, tmp_path / "memory", **changes)
    monkeypatch.setattr("perturbflow.models.latents.pca.MAX_CELLS", 10**6)
    monkeypatch.setattr("perturbflow.models.jepa.MAX_CELLS", 60)
    monkeypatch.setattr("perturbflow.models.latents.exported.CELLS_PER_BLOCK", 60)
    watched = Watched(monkeypatch)
    model, artefact = fitted(name, both[1], embeddings, tmp_path / "disk", **changes)
    assert model.reads_blocks
    for key, value in expected["state"].items():
        torch.testing.assert_close(artefact["state"][key], value, atol=1e-5, rtol=1e-4, msg=key)
    # The sample that spans the latent space (here all training cells), and small counts, are read at once and once.
    n_training = len(both[1].roles("train").rows)
    large = [n for n in watched.at_once if n > 64]
    assert large == [n_training]
    assert sum(watched.at_once) <= 5 * n_training


@pytest.mark.slow
def test_training_of_a_learned_family_leaves_cells_on_disk(
    prepared: dict[str, Prepared], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = prepared[COMBINATION]

    def whole(path: Path) -> Pairs:
        raise AssertionError(f"{path} was read as a whole")

    monkeypatch.setattr(Pairs, "read", whole)
    outputs = tmp_path / "model.ckpt", tmp_path / "run.json"
    for name in ("counterfactual", "scppdm_hybrid", "jepa"):
        train(files.pairs, files.embeddings, files.audit, *outputs, *registered(name, **tiny(name)), 0, "cpu")
        assert outputs[0].exists()
        outputs[0].unlink()


def test_closed_forms_of_the_hybrid_are_the_same_from_disk(prepared: dict[str, Prepared]) -> None:
    for kind in (COMBINATION, "unseen_context"):
        files = prepared[kind]
        embeddings = Embeddings.read(files.embeddings)
        means = [
            SetGP().learned(TrainingSet.of(cells, embeddings, 0))
            for cells in (Pairs.read(files.pairs), Pairs.open(files.pairs))
        ]
        assert means[0].account() == pytest.approx(means[1].account(), abs=1e-3)
        for label in ("TF1+TF2", "TF1", "TF8"):
            np.testing.assert_allclose(means[0].effect(label), means[1].effect(label), atol=1e-5)


# --- counts in batches ----------------------------------------------------------------------------------------------


@pytest.fixture
def short_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("VALUES_IN_MEMORY", 100), ("N_RUNS", 4), ("RUN", 8), ("STEPS_PER_READ", 3)):
        monkeypatch.setattr(autoencoder, name, value)


@pytest.mark.usefixtures("short_runs")
def test_batches_of_counts_from_disk_depend_on_seed_and_step_alone(
    both: tuple[Pairs, Pairs], monkeypatch: pytest.MonkeyPatch
) -> None:
    X = both[1].roles("train").X
    watched = Watched(monkeypatch)
    through = CellSampler(X)
    seen = [through.batch(10, (0, 1, step)) for step in range(7)]
    for read in through._ahead.values():
        read.result()
    assert len(watched.at_once) == 3 + 1  # the next one is read ahead
    assert max(watched.at_once) <= 32
    resumed = CellSampler(X)
    for step in (4, 2, 6):
        torch.testing.assert_close(resumed.batch(10, (0, 1, step)).x, seen[step].x, rtol=0, atol=0)
    assert not torch.equal(seen[0].x, seen[1].x)
    assert not torch.equal(seen[0].x, through.batch(10, (0, 2, 0)).x)
    assert (seen[0].k.sum(dim=1) > 0).all()


@pytest.mark.usefixtures("short_runs")
def test_cells_are_read_ahead_from_epoch_to_epoch_whoever_looks_at_others_in_between(
    both: tuple[Pairs, Pairs], monkeypatch: pytest.MonkeyPatch
) -> None:
    X, read = both[1].roles("train").X, []
    runs = CellSampler._runs
    monkeypatch.setattr(
        CellSampler,
        "_runs",
        lambda cells, seed: read.append((seed, threading.current_thread().name)) or runs(cells, seed),
    )
    monkeypatch.setattr(autoencoder, "STEPS_PER_EPOCH", 6)
    through = CellSampler(X)
    for epoch in range(3):
        for step in range(6):
            through.batch(10, (0, epoch, step))
        through.batch(10, (0, batches.WATCHED, 0))
    for step in range(6):  # another training of the same seed
        through.batch(10, (0, 0, step))
    through._reader.shutdown()
    here = threading.current_thread().name
    assert [seed for seed, thread in read if thread != here] == [(0, 0, 1), (0, 1, 0), (0, 1, 1), (0, 2, 0), (0, 2, 1),
                                                                 (0, 3, 0),
                                                                     (0, 0, 1), (0, 1, 0)]  # fmt: skip
    assert [seed for seed, thread in read if thread == here] == [(0, 0, 0), *[(0, batches.WATCHED, 0)] * 3, (0, 0, 0)]


@pytest.mark.usefixtures("short_runs")
def test_all_cells_come_in_batches_from_disk(both: tuple[Pairs, Pairs]) -> None:
    X = both[1].roles("train").X
    cells = {row.tobytes() for row in X[:].toarray()}
    drawn = CellSampler(X)
    came = {row.tobytes() for step in range(1500) for row in drawn.batch(16, (0, 0, step)).x.numpy()}
    assert came <= cells
    assert len(came) > 0.98 * len(cells)


# --- predictions in blocks ------------------------------------------------------------------------------------------


@pytest.fixture
def predicted(prepared: dict[str, Prepared], tmp_path: Path) -> Callable[..., ad.AnnData]:
    """Return a function that trains a model once and predicts with it."""
    files = prepared[COMBINATION]

    def predict(name: str, max_cells: int = 1000, target: str = "predictions", **changes: object) -> ad.AnnData:
        implementation, params = registered(name, **changes)
        model = tmp_path / f"{name}{'.ckpt' if changes else '.npz'}"
        if not model.exists():
            train(
                files.pairs,
                files.embeddings,
                files.audit,
                model,
                tmp_path / "run.json",
                implementation,
                params,
                0,
                "cpu",
            )
        path = tmp_path / f"{target}.h5ad"
        prediction.predict(files.pairs, model, path, implementation, params, 0, max_cells)
        return ad.read_h5ad(path)

    return predict


@pytest.mark.parametrize("name", ["technical_duplicate", "interpolated_duplicate"])
def test_blocks_of_cells_are_what_is_predicted_at_once(
    name: str, predicted: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        prediction, "nonnegative", lambda cells: np.maximum(cells, 0.0)
    )  # it keeps the mean of the cells that it sees
    whole = predicted(name)
    monkeypatch.setattr(prediction, "CELLS_PER_BLOCK", 7)
    monkeypatch.setattr(hdf5, "CHUNK", 100)
    blocks = predicted(name, target="blocks")
    np.testing.assert_allclose(blocks.X.toarray(), whole.X.toarray(), atol=1e-6)
    assert blocks.obs.equals(whole.obs)
    assert blocks.uns == whole.uns
    assert blocks.X.dtype == np.float32


def test_predictions_are_those_of_the_model_for_the_matched_controls(
    predicted: Callable, both: tuple[Pairs, Pairs]
) -> None:
    out = predicted("additive", 9)
    model = build(*registered("additive"))
    model.fit(both[0].fitted_on("test"), None, Run(seed=0))
    test = both[0].roles("test")
    for label, cells in out.obs.groupby("perturbation", observed=True):
        assert len(cells) == 9
        start = both[0].X[cells["control_index"].to_numpy()].toarray()
        context = test.context_of(np.searchsorted(test.rows, cells["control_index"].to_numpy()))
        expected = model.predict(start, [label], 9, 0, context)[0]
        np.testing.assert_allclose(out[cells.index].X.toarray(), expected, atol=1e-5)
        assert (
            both[0].obs["batch"].iloc[cells["control_index"]].astype(str).to_numpy() == cells["batch"].to_numpy()
        ).all()
    assert out.obs["perturbation"].dtype == "category"
    assert list(out.var_names) == both[0].genes


def test_blocks_of_a_random_model_differ_and_the_first_is_that_of_few_cells(
    predicted: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prediction, "CELLS_PER_BLOCK", 10)
    blocks = predicted("counterfactual", 20, **TINY)
    again = predicted("counterfactual", 20, "again", **TINY)
    np.testing.assert_array_equal(blocks.X.toarray(), again.X.toarray())
    seeds = {
        prediction.block_seed(seed, label, block) for seed in (0, 1) for label in ("TF1", "TF2") for block in (0, 1, 2)
    }
    assert len(seeds) == 10  # the first block has the model's seed, whatever the label
    assert prediction.block_seed(5, "TF1", 0) == 5


def test_prediction_reads_the_controls_of_its_role_alone(
    predicted: Callable, both: tuple[Pairs, Pairs], monkeypatch: pytest.MonkeyPatch
) -> None:
    predicted("additive")
    watched = Watched(monkeypatch)
    predicted("additive")
    assert sum(watched.at_once) == both[0].roles("test").is_control.sum()


@pytest.mark.parametrize("moment", [1, 3])
def test_a_prediction_cut_short_leaves_no_file(
    moment: int, predicted: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prediction, "CELLS_PER_BLOCK", 7)
    predicted("additive", target="before")
    append = hdf5.AppendedRows.append
    calls = []

    def cut(self: hdf5.AppendedRows, X: sparse.csr_matrix) -> None:
        calls.append(X.shape)
        if len(calls) > moment:
            raise KeyboardInterrupt
        append(self, X)

    monkeypatch.setattr(hdf5.AppendedRows, "append", cut)
    with pytest.raises(KeyboardInterrupt):
        predicted("additive", target="after")
    assert len(calls) == moment + 1
    assert not list(tmp_path.glob("*after*"))
    assert not list(tmp_path.glob(".*"))


def test_no_more_than_a_block_of_cells_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = prepare(tmp_path / "screen", make_screen(n_cells=60), SPECS[COMBINATION])
    monkeypatch.setattr(prediction, "CELLS_PER_BLOCK", 16)
    sizes = []
    append = hdf5.AppendedRows.append
    monkeypatch.setattr(hdf5.AppendedRows, "append", lambda self, X: sizes.append(X.shape[0]) or append(self, X))
    model = tmp_path / "model.npz"
    train(files.pairs, files.embeddings, files.audit, model, tmp_path / "run.json", *registered("additive"), 0, "cpu")
    prediction.predict(files.pairs, model, tmp_path / "predictions.h5ad", *registered("additive"), 0, 1000)
    assert max(sizes) == 16
    assert sum(sizes) == len(ad.read_h5ad(tmp_path / "predictions.h5ad"))
