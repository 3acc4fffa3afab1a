"""A latent space whose encoder was learned elsewhere and comes as a file; the decoder to counts is learned here.

The file is a program of `torch.export`, the format of PyTorch for networks without their Python code: from counts to coordinates of cells. A decoder
with the count likelihood of `autoencoder` is trained on training cells, so that moves among the coordinates mean something for genes.
"""

import io
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from scipy import sparse
from torch import Tensor, nn

from perturbflow.errors import InputError
from perturbflow.models.autoencoder import (
    CELLS_PER_BLOCK,
    EMA_DECAY,
    LEARNING_RATE,
    WEIGHT_DECAY,
    WIDTH,
    Cells,
    CountLatent,
    DrawnCells,
    counts_of,
    negative_binomial,
)
from perturbflow.models.base import Run
from perturbflow.models.batches import Batches
from perturbflow.models.latent import training_sample
from perturbflow.models.networks import mlp
from perturbflow.models.optimization import Learner, optimize
from perturbflow.pairs import Pairs

logger = logging.getLogger(__name__)

SUFFIX = ".pt2"
HOW = (
    "save it as torch.export.save(program, file, extra_files={'genes': '\\n'.join(symbols)}), the program exported from "
    "counts, (cells, genes), with dynamic_shapes=({0: torch.export.Dim('cells')},)"
)


class ExternalEncoder:
    """A program from counts, (cells, its genes), to coordinates, (cells, dimensions), and which genes of the screen it reads.

    Parameters
    ----------
    content
        Of the file.
    columns
        Column of the screen for each of the program's genes, -1 where the screen has not measured it: the program gets zeros there.
    """

    def __init__(self, content: bytes, columns: np.ndarray) -> None:
        self.content, self.columns = content, columns
        self.program: Callable[[Tensor], Tensor] = torch.export.load(io.BytesIO(content)).module()

    @classmethod
    def read(cls, path: Path, genes: Sequence[str]) -> "ExternalEncoder":
        """Read a file and find its genes among those of the screen.

        Raises
        ------
        InputError
            If it holds no program, does not name its genes, knows no measured gene, or does not return one row of numbers per cell.
        """
        content, extra = path.read_bytes(), {"genes": ""}
        try:
            with _quiet("torch.export"):  # it logs a page of traceback before it raises
                torch.export.load(io.BytesIO(content), extra_files=extra)
        except Exception as error:  # of whatever kind the reader of the archive has
            raise InputError(f"{path}: it cannot be read as a program of torch.export ({str(error)[:200]}); {HOW}.") from error
        names = extra["genes"].split()
        if not names:
            raise InputError(f"{path}: it does not name its genes; {HOW}.")
        row = {gene: i for i, gene in enumerate(genes)}
        columns = np.array([row.get(gene, -1) for gene in names])
        if (columns < 0).all():
            raise InputError(
                f"{path}: none of its {len(names)} genes ({names[0]}, ...) is measured in this screen; gene symbols are asked for."
            )
        logger.info("%s: %d of its %d genes are among the %d of this screen", path, (columns >= 0).sum(), len(names), len(genes))
        encoder = cls(content, columns)
        for n in (3, 2):
            try:
                z = encoder(torch.ones(n, len(genes)))
            except Exception as error:  # of whatever kind a program may raise
                raise InputError(f"{path}: it does not take {n} cells of {len(names)} genes ({str(error)[:200]}); {HOW}.") from error
            if z.ndim != 2 or len(z) != n or not torch.isfinite(z).all():
                raise InputError(
                    f"{path}: of {n} cells it makes {tuple(z.shape)} and not {n} rows of finite numbers, one column per dimension."
                )
        return encoder

    @torch.no_grad()
    def __call__(self, k: Tensor) -> Tensor:
        """Return coordinates of counts, (cells, genes of the screen) → (cells, dimensions)."""
        columns = torch.from_numpy(self.columns)
        return self.program(k[:, columns.clamp(min=0)] * (columns >= 0)).float()


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Let a library's logger say nothing for a while."""
    noisy = logging.getLogger(name)
    level = noisy.level
    noisy.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        noisy.setLevel(level)


class _EncodedCells:
    """Draws batches of cells with their coordinates in place of their expression."""

    def __init__(self, cells: DrawnCells, encoder: ExternalEncoder) -> None:
        self.cells, self.encoder = cells, encoder

    def batch(self, size: int, seed: tuple[int, ...]) -> Cells:
        """Return a batch that depends on the seed alone."""
        drawn = self.cells.batch(size, seed)
        return Cells(self.encoder(drawn.k), drawn.k, drawn.unit)


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
        return torch.log_softmax(self.decoder((h - self.centre) / self.scale), dim=-1)

    def losses(self, cells: Cells) -> dict[str, Tensor]:
        """Negative log likelihood of the counts, per gene."""
        mean = cells.k.sum(dim=1, keepdim=True) * torch.exp(self.log_share(cells.x))
        return {"loss": -negative_binomial(cells.k, mean, torch.exp(self.log_shape)).mean()}


class ExternalLatent(CountLatent):
    """Coordinates of an external encoder, centred and scaled by training cells.

    Parameters
    ----------
    network
        A trained decoder.
    """

    def __init__(self, encoder: ExternalEncoder, network: CountDecoder) -> None:
        super().__init__(network)
        self.encoder = encoder

    @classmethod
    def learned(cls, path: Path, pairs: Pairs, n_steps: int, batch_size: int, run: Run) -> "ExternalLatent":
        """Read the encoder and train a decoder on the cells of the training role; goes on from a checkpoint of the same training."""
        training = pairs.roles("train")
        encoder = ExternalEncoder.read(path, pairs.genes)
        h = encoder(torch.from_numpy(counts_of(training_sample(training))[0]))
        torch.manual_seed(run.seed)
        network = CountDecoder(h.mean(dim=0), h.std(dim=0).clamp(min=1e-3), len(pairs.genes))
        learner = Learner(network, run.seed, n_steps, LEARNING_RATE, WEIGHT_DECAY, EMA_DECAY)
        own = replace(run, checkpoints=run.checkpoints / "decoder", history=[], facts={})
        optimize(learner, Batches(_EncodedCells(DrawnCells(training.X), encoder), None, batch_size, run.seed), own, "decoder")
        run.facts["autoencoder"] = {"n_parameters": own.facts["n_parameters"], **own.history[-1]}
        return cls(encoder, learner.average.module.cpu())

    @classmethod
    def restored(cls, state: dict[str, Tensor]) -> "ExternalLatent":
        """Load the program and rebuild the decoder around its weights."""
        weights = dict(state)
        encoder = ExternalEncoder(weights.pop("encoder").numpy().tobytes(), weights.pop("columns").numpy())
        network = CountDecoder(weights["centre"], weights["scale"], len(weights["log_shape"]))
        network.load_state_dict(weights)
        return cls(encoder, network)

    def state(self) -> dict[str, Tensor]:
        """Return the program, its columns and the decoder's weights."""
        content = torch.frombuffer(bytearray(self.encoder.content), dtype=torch.uint8)
        return {**super().state(), "encoder": content, "columns": torch.from_numpy(self.encoder.columns)}

    def encode(self, X: np.ndarray | sparse.csr_matrix) -> np.ndarray:
        """Return coordinates, (cells, dimensions)."""
        blocks = []
        for first in range(0, X.shape[0], CELLS_PER_BLOCK):
            block = X[first : first + CELLS_PER_BLOCK]
            k, _ = counts_of(block if isinstance(block, np.ndarray) else block.toarray())
            blocks.append(((self.encoder(torch.from_numpy(k)) - self.network.centre) / self.network.scale).numpy())
        return np.concatenate(blocks)
