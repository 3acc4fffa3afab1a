"""A latent space of an external encoder: the encoder comes as a file, the decoder to counts is learned here.

The file is a program of `torch.export`, PyTorch's format for networks without their Python code. It takes counts and
returns coordinates of cells. A decoder with the count likelihood of `vae` is trained on training cells: it turns latent
shifts into changes of genes.

Such a file can run code when it is loaded. It belongs to the user and stays in its place. An artefact holds its digest
and not its content, so that artefacts of any origin can be loaded safely.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from perturbflow.errors import InputError
from perturbflow.genes.symbols import approved_symbol
from perturbflow.io.files import file_digest
from perturbflow.models.base import Run
from perturbflow.models.latents.pca import sampled_rows
from perturbflow.models.latents.vae import (
    CELLS_PER_BLOCK,
    WIDTH,
    Cells,
    CellSampler,
    NetworkLatent,
    negative_binomial,
    trained,
)
from perturbflow.models.thinning import counts_of
from perturbflow.models.training.learner import Optimization
from perturbflow.models.training.networks import mlp
from perturbflow.pairs import Pairs

logger = logging.getLogger(__name__)

ENCODER = ".pt2"  # suffix of its file
N_PROBES = 5
HOW = "docs/concepts/models.md shows how to export one"


class ExportedEncoder:
    """A program from counts of its genes, (cells, its genes) float32, to coordinates of cells, (cells, dimensions).

    Parameters
    ----------
    path
        A file of `torch.export.save`, which names its genes in the extra file `genes`, one per line.
    genes
        Genes of the screen, in the order of its columns. The program gets zeros for genes that the screen lacks.

    Raises
    ------
    InputError
        If the file holds no program or names no measured gene. If the program does not return finite numbers for every
        cell, which depend on this cell alone.
    """

    def __init__(self, path: Path, genes: Sequence[str]) -> None:
        self.path, self.sha256, extra = path, file_digest(path), {"genes": ""}
        try:
            with _quiet("torch.export"):  # it logs a long traceback before it raises
                self.program = torch.export.load(path, extra_files=extra).module()
        except Exception as error:  # the reader of the archive raises errors of any kind
            text = str(error)[:200]
            raise InputError(f"{path} cannot be read as a program of torch.export ({text}); {HOW}.") from error
        names = extra["genes"].splitlines()
        if not names:
            raise InputError(f"{path} does not name its genes; {HOW}.")
        row = {gene: i for i, gene in enumerate(genes)}
        self.columns = torch.tensor([row.get(name, row.get(approved_symbol(name), -1)) for name in names])
        n_measured = int((self.columns >= 0).sum())
        if not n_measured:
            raise InputError(
                f"{path}: none of its {len(names)} genes ({names[0]}, ...) is a gene of this screen, which has symbols."
            )
        level = logging.INFO if n_measured >= len(names) / 2 else logging.WARNING
        text = "%s: %d of its %d genes are among the %d of this screen; it gets zeros for the others"
        logger.log(level, text, path, n_measured, len(names), len(genes))
        self._probe(len(genes))

    def _probe(self, n_genes: int) -> None:
        """Try the program on some cells, one of them without any count."""
        k = torch.from_numpy(np.random.default_rng(0).poisson(2.0, (N_PROBES, n_genes)).astype(np.float32))
        k[0] = 0.0
        z, again, one_by_one = self(k), self(k), torch.cat([self(cell) for cell in k.split(1)])
        if not (torch.allclose(z, again, rtol=1e-3, atol=1e-4) and torch.allclose(z, one_by_one, rtol=1e-3, atol=1e-4)):
            raise InputError(
                f"{self.path} does not give a cell the same coordinates twice, or beside other cells. "
                f"It samples, or it was exported in training mode; {HOW}."
            )

    @torch.no_grad()
    def __call__(self, k: Tensor) -> Tensor:
        """Return coordinates of counts, (cells, genes of the screen) → (cells, dimensions)."""
        own = k[:, self.columns.clamp(min=0)] * (self.columns >= 0)
        try:
            z = self.program(own)
        except Exception as error:  # a program may raise errors of any kind
            shape = f"{own.shape[0]} cells of {own.shape[1]} genes as float32"
            raise InputError(f"{self.path} does not take {shape} ({str(error)[:200]}); {HOW}.") from error
        if not isinstance(z, Tensor) or z.ndim != 2 or len(z) != len(k):
            made = f"a tensor of shape {tuple(z.shape)}" if isinstance(z, Tensor) else f"a {type(z).__name__}"
            raise InputError(
                f"{self.path} returns {made} for {len(k)} cells; it has to return one row per cell and one column per "
                f"dimension; {HOW}."
            )
        if n_broken := int((~torch.isfinite(z)).any(dim=1).sum()):
            n_empty = int((own.sum(dim=1) == 0).sum())
            raise InputError(
                f"{self.path} returns no finite numbers for {n_broken} of {len(z)} cells; {n_empty} of these have no "
                "count in its genes. Where it divides by the sum of counts, let it divide by at least 1."
            )
        return z.float()


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Silence a library's logger for a while."""
    noisy = logging.getLogger(name)
    level = noisy.level
    noisy.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        noisy.setLevel(level)


class _EncodedCells:
    """Samples batches of cells with their coordinates in place of their expression."""

    def __init__(self, cells: CellSampler, encoder: ExportedEncoder) -> None:
        self.cells, self.encoder = cells, encoder

    def batch(self, size: int, seed: tuple[int, ...]) -> Cells:
        """Return a batch that depends on the seed alone."""
        sampled = self.cells.batch(size, seed)
        return Cells(self.encoder(sampled.k), sampled.k, sampled.unit)


class CountDecoder(nn.Module):
    """From coordinates of cells to shares of genes, by the likelihood of counts.

    Parameters
    ----------
    centre, scale
        Of the coordinates of training cells, (n_latent,).
    """

    def __init__(self, centre: Tensor, scale: Tensor, n_genes: int) -> None:
        super().__init__()
        self.register_buffer("centre", centre)
        self.register_buffer("scale", scale)
        self.decoder = mlp(len(centre), WIDTH, n_genes)
        self.log_shape = nn.Parameter(torch.zeros(n_genes))

    def log_share(self, h: Tensor) -> Tensor:
        """(B, n_latent), as the encoder has them → log share of every gene, (B, genes)."""
        return torch.log_softmax(self.decoder((h - self.centre) / self.scale).float(), dim=-1)

    def losses(self, cells: Cells) -> dict[str, Tensor]:
        """Negative log likelihood of the counts, per gene."""
        mean = cells.k.sum(dim=1, keepdim=True) * torch.exp(self.log_share(cells.x))
        return {"loss": -negative_binomial(cells.k, mean, torch.exp(self.log_shape)).mean()}


class ExportedLatent(NetworkLatent):
    """Coordinates of an external encoder, centred and scaled by training cells.

    Parameters
    ----------
    network
        A trained decoder.
    """

    def __init__(self, encoder: ExportedEncoder, network: CountDecoder) -> None:
        super().__init__(network)
        self.encoder = encoder

    @classmethod
    def fit(
        cls, path: Path, pairs: Pairs, n_steps: int, batch_size: int, optimization: Optimization, run: Run
    ) -> "ExportedLatent":
        """Read the encoder and train a decoder on training cells; resumes from a checkpoint of the same training."""
        training = pairs.roles("train")
        encoder = ExportedEncoder(path, pairs.genes)
        rows = sampled_rows(training)
        blocks = np.split(rows, range(CELLS_PER_BLOCK, len(rows), CELLS_PER_BLOCK))
        h = torch.cat([encoder(_counts(training.X[block].toarray())) for block in blocks])
        torch.manual_seed(run.seed)
        network = CountDecoder(h.mean(dim=0), h.std(dim=0).clamp(min=1e-3), len(pairs.genes))
        cells = _EncodedCells(CellSampler(training.X), encoder)
        return cls(encoder, trained(network, cells, n_steps, batch_size, optimization, run))

    @classmethod
    def restored(cls, state: dict[str, Tensor], path: Path, genes: Sequence[str]) -> "ExportedLatent":
        """Read the encoder and rebuild the decoder around its weights; the encoder's file must be the same."""
        weights = dict(state)
        digest = weights.pop("encoder_sha256").numpy().tobytes().hex()
        if not path.is_file() or file_digest(path) != digest:
            raise InputError(
                f"{path} is missing, or it is not the file that this model was trained with (sha256 {digest}). "
                "Bring it back, or train again."
            )
        network = CountDecoder(weights["centre"], weights["scale"], len(weights["log_shape"]))
        network.load_state_dict(weights)
        return cls(ExportedEncoder(path, genes), network)

    def state(self) -> dict[str, Tensor]:
        """Return the decoder's weights and the digest of the encoder's file."""
        digest = torch.frombuffer(bytearray.fromhex(self.encoder.sha256), dtype=torch.uint8)
        return {**super().state(), "encoder_sha256": digest}

    def embed(self, x: np.ndarray) -> Tensor:
        """Return the encoder's coordinates of log1p-normalized cells, (cells, genes) → (cells, dimensions)."""
        return self.encoder(_counts(x))


def _counts(x: np.ndarray) -> Tensor:
    return torch.from_numpy(counts_of(x)[0].astype(np.float32))
