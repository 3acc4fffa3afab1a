"""A latent space whose encoder comes as a file.

It reads the right genes, its moves mean counts, and its faults are told before training.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from encoders import Directions, exported
from learned import registered, trained
from made_counts import two_states
from torch import Tensor

from perturbflow.embeddings import Embeddings
from perturbflow.errors import InputError
from perturbflow.io.artefacts import load_artefact, save_artefact
from perturbflow.models.base import Run, build
from perturbflow.models.latents.exported import ExportedEncoder, ExportedLatent
from perturbflow.models.training.learner import Optimization
from perturbflow.pairs import Pairs


def test_an_encoder_from_a_file_reads_its_genes_wherever_they_are_and_its_moves_mean_counts(tmp_path: Path) -> None:
    pairs, counts, shares, state = two_states()
    genes = ["unmeasured", *(f"G{i}" for i in reversed(range(30)))]
    path = exported(tmp_path / "encoder.pt2", genes)
    latent = ExportedLatent.fit(
        path, pairs, 300, 64, Optimization(1e-3, 0.0, 0.9), Run(seed=0, checkpoints=tmp_path, identity="test")
    )
    z = latent.encode(pairs.X)
    expected = (
        Directions(31)(torch.from_numpy(np.hstack([np.zeros((600, 1)), counts[:, ::-1]]).astype(np.float32)))
        .detach()
        .numpy()
    )
    np.testing.assert_allclose(z, (expected - expected.mean(axis=0)) / expected.std(axis=0), atol=0.01)
    move = np.tile(z[state == 1].mean(axis=0) - z[state == 0].mean(axis=0), (int((state == 0).sum()), 1))
    assert (
        np.corrcoef(latent.log_fold_change(z[state == 0], move).mean(axis=0), np.log(shares[1] / shares[0]))[0, 1] > 0.9
    )
    restored = ExportedLatent.restored(latent.state(), path, pairs.genes)
    assert np.array_equal(restored.encode(pairs.X), z)
    assert np.array_equal(restored.log_fold_change(z[:5], move[:5]), latent.log_fold_change(z[:5], move[:5]))


class Divides(Directions):
    """Nothing where a cell has no count."""

    def forward(self, k: Tensor) -> Tensor:
        """Divide by what may be nothing."""
        return k @ self.weight / k.sum(dim=1, keepdim=True)


class Samples(Directions):
    """A draw, as of a posterior."""

    def forward(self, k: Tensor) -> Tensor:
        """Add noise."""
        return super().forward(k) + torch.randn_like(k[:, :1])


class LooksAround(Directions):
    """A batch normalization that was left in training mode."""

    def forward(self, k: Tensor) -> Tensor:
        """Subtract the mean of the company."""
        z = super().forward(k)
        return z - z.mean(dim=0)


class Two(Directions):
    """Mean and variance."""

    def forward(self, k: Tensor) -> tuple[Tensor, Tensor]:
        """Return both."""
        z = super().forward(k)
        return z, z


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.write_text("gene\ta\nG0\t1\n"), "cannot be read as a program of torch.export"),
        (lambda path: torch.export.save(torch.export.export(Directions(2), (torch.ones(7, 2),)), path),
         "does not name its genes"),
        (lambda path: exported(path, ["ENSG1", "ENSG2"]),
         r"none of its 2 genes \(ENSG1, \.\.\.\) is a gene of this screen"),
        (lambda path: exported(path, ["G0", "G1"], any_number=False), "does not take 5 cells of 2 genes"),
        (lambda path: exported(path, ["G0", "G1", "G2"], names=["G0", "G1"]), "does not take 5 cells of 2 genes"),
        (lambda path: exported(path, ["G0", "G1"], torch.nn.Flatten(0)), r"a tensor of shape \(10,\) for 5 cells"),
        (lambda path: exported(path, ["G0", "G1"], Two(2)), "returns a tuple for 5 cells"),
        (lambda path: exported(path, ["G0", "G1"], Divides(2)), "1 of 5 cells; 1 of these have no count in its genes"),
        (lambda path: exported(path, ["G0", "G1"], Samples(2)), "the same coordinates twice, or beside other cells"),
        (lambda path: exported(path, ["G0", "G1"], LooksAround(2)),
         "the same coordinates twice, or beside other cells"),
    ],
    ids=["no program", "genes not named", "other genes", "one number of cells", "more genes than names", "no rows",
         "two tensors", "no number", "samples",
         "looks around"],
)  # fmt: skip
def test_what_is_wrong_with_a_file_of_an_encoder_is_said_before_training(
    make: Callable, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "encoder.pt2"
    make(path)
    with pytest.raises(InputError, match=message):
        ExportedEncoder(path, [f"G{i}" for i in range(30)])


def test_genes_of_an_encoder_go_by_their_approved_symbols(tmp_path: Path) -> None:
    encoder = ExportedEncoder(
        exported(tmp_path / "encoder.pt2", ["SEPT7", "ENSG00000141510", "OTHER"]), ["A", "TP53", "SEPTIN7"]
    )
    assert encoder.columns.tolist() == [2, 1, -1]


@pytest.mark.slow
def test_scppdm_trains_on_an_encoder_from_a_file_and_asks_for_the_same_file_again(
    screen: tuple[Pairs, Embeddings], tmp_path: Path
) -> None:
    path = exported(tmp_path / "encoder.pt2", screen[0].genes[::2])
    params = {"n_steps": 60, "batch_size": 32, "latent": {"file": str(path)}}
    model, artefact, run = trained("scppdm", *screen, tmp_path, **params)
    assert run.facts["autoencoder"]["n_parameters"] > 0
    save_artefact(tmp_path / "model.ckpt", artefact)
    again = build(*registered("scppdm", **params))
    again.restore(load_artefact(tmp_path / "model.ckpt"))
    cells = screen[0].roles("test").X[:12].toarray()
    np.testing.assert_array_equal(model.predict(cells, ["TF1+TF2"], 12, 0), again.predict(cells, ["TF1+TF2"], 12, 0))
    exported(path, screen[0].genes[::3])
    with pytest.raises(InputError, match="not the file that this model was trained with"):
        again.restore(load_artefact(tmp_path / "model.ckpt"))
    path.unlink()
    with pytest.raises(InputError, match="is missing, or it is not the file that this model was trained with"):
        again.restore(load_artefact(tmp_path / "model.ckpt"))
