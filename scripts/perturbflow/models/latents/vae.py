"""A latent space of counts: a variational autoencoder with negative binomial likelihood and the cell's library size.

As in scVI (Lopez et al. 2018, eq. 1-4): z ~ N(0, I), the share of each gene ρ = softmax(decoder(z)), counts k ~ NB(mean
l ρ, shape θ). The library size l is the cell's counts over the panel; it is given and not learned. θ is one number per
gene. The network does not get batches: latent shifts stay within one batch.
"""

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from threading import Lock

import numpy as np
import torch
from scipy import sparse
from torch import Tensor, nn

from perturbflow.io.hdf5 import CsrRows
from perturbflow.models.base import Run
from perturbflow.models.thinning import counts_of
from perturbflow.models.training.batches import STEPS_PER_EPOCH, WATCHED, Batches, Sampler
from perturbflow.models.training.learner import Learner, Optimization
from perturbflow.models.training.networks import mlp
from perturbflow.pairs import Pairs

WIDTH = 128
LEARNING_RATE, WEIGHT_DECAY, EMA_DECAY = 2e-3, 1e-4, 0.99
PRIOR_WEIGHT = 0.1  # of the Kullback-Leibler term: low, as no cells are sampled from the prior
CELLS_PER_BLOCK = 4096
VALUES_IN_MEMORY = 2**26  # 0.5 GB
# A larger file is read in so many runs of neighbouring cells at once, which serve so many batches.
N_RUNS, RUN, STEPS_PER_READ = 64, 256, 100


def negative_binomial(k: Tensor, mean: Tensor, shape: Tensor) -> Tensor:
    """Return log NB(k; mean, shape) with variance mean + mean²/shape, elementwise (Lopez et al. 2018, eq. 4)."""
    total = torch.log(shape + mean)
    return (
        torch.lgamma(k + shape) - torch.lgamma(shape) - torch.lgamma(k + 1)
        + shape * (torch.log(shape) - total) + k * (torch.log(mean.clamp(min=1e-12)) - total)
    )  # fmt: skip


class CountNetwork(nn.Module):
    """Encoder from log1p expression, decoder to shares of genes."""

    def __init__(self, n_genes: int, n_latent: int) -> None:
        super().__init__()
        self.encoder = mlp(n_genes, WIDTH, 2 * n_latent)
        self.decoder = mlp(n_latent, WIDTH, n_genes)
        self.log_shape = nn.Parameter(torch.zeros(n_genes))
        self.register_buffer("centre", torch.zeros(n_latent))
        self.register_buffer("scale", torch.ones(n_latent))

    def embed(self, x: Tensor) -> Tensor:
        """log1p expression, (B, genes) → means of the latent, (B, n_latent)."""
        return self.encoder(x).chunk(2, dim=-1)[0]

    def log_share(self, z: Tensor) -> Tensor:
        """(B, n_latent), in units of the prior → log ρ, (B, genes)."""
        return torch.log_softmax(self.decoder(z).float(), dim=-1)

    def losses(self, cells: "Cells") -> dict[str, Tensor]:
        """Negative evidence lower bound per gene."""
        mean, log_variance = self.encoder(cells.x).float().chunk(2, dim=-1)
        log_variance = log_variance.clamp(-8.0, 2.0)
        z = mean + torch.exp(0.5 * log_variance) * torch.randn_like(mean)
        library = cells.k.sum(dim=1, keepdim=True)
        fitted = negative_binomial(cells.k, library * torch.exp(self.log_share(z)), torch.exp(self.log_shape))
        prior = 0.5 * (mean.pow(2) + log_variance.exp() - 1.0 - log_variance).sum(dim=1).mean() / cells.k.shape[1]
        reconstruction = -fitted.mean()
        return {"loss": reconstruction + PRIOR_WEIGHT * prior, "reconstruction": reconstruction, "prior": prior}


class Cells:
    """A batch of cells.

    Parameters
    ----------
    x
        Input of the network: log1p expression, (B, genes), or latent coordinates, (B, n_latent), for a decoder alone.
    k
        Counts, (B, genes).
    unit
        Value of one count in every cell, (B, 1).
    """

    def __init__(self, x: Tensor, k: Tensor, unit: Tensor) -> None:
        self.x, self.k, self.unit = x, k, unit

    def __len__(self) -> int:
        return len(self.x)

    def to(self, device: torch.device) -> "Cells":
        """Move all tensors."""
        return Cells(self.x.to(device), self.k.to(device), self.unit.to(device))


class CellSampler:
    """Samples batches of training cells, the same for the same seed.

    Batches are sampled from all cells where these are in memory or small enough to be read. Of a larger file, N_RUNS
    runs of RUN neighbouring cells are read from random places and serve STEPS_PER_READ batches. Meanwhile a thread
    reads the next runs.

    Parameters
    ----------
    X
        log1p expression, in memory or on disk.
    """

    def __init__(self, X: sparse.csr_matrix | CsrRows) -> None:
        self.X = X[:] if isinstance(X, CsrRows) and X.n_stored.sum() <= VALUES_IN_MEMORY else X
        self._last: tuple[tuple[int, ...], sparse.csr_matrix] | None = None
        self._ahead: dict[tuple[int, ...], Future[sparse.csr_matrix]] = {}
        self._reader = ThreadPoolExecutor(1)
        self._reading = (
            Lock()
        )  # a thread samples the batches of training; those to be watched are sampled outside of it

    def _runs(self, seed: tuple[int, ...]) -> sparse.csr_matrix:
        """Read runs of cells at places that depend on the seed alone."""
        n_runs = -(-self.X.shape[0] // RUN)
        runs = np.sort(np.random.default_rng(seed).choice(n_runs, min(N_RUNS, n_runs), replace=False))
        rows = (runs[:, None] * RUN + np.arange(RUN)).ravel()
        return self.X[rows[rows < self.X.shape[0]]]

    def _read(self, seed: tuple[int, ...]) -> sparse.csr_matrix:
        """Return the runs of (..., epoch, read in the epoch), and start to read those that training needs next."""
        with self._reading:
            if self._last is None or self._last[0] != seed:
                self._last = seed, self._ahead.pop(seed).result() if seed in self._ahead else self._runs(seed)
                *outer, epoch, read = seed
                if epoch < WATCHED:
                    is_last = (read + 1) * STEPS_PER_READ >= STEPS_PER_EPOCH
                    following = (*outer, epoch + 1, 0) if is_last else (*outer, epoch, read + 1)
                    self._ahead = {following: self._reader.submit(self._runs, following)}
            return self._last[1]

    def batch(self, size: int, seed: tuple[int, ...]) -> Cells:
        """Return a sample of cells with replacement, with their counts."""
        X = self.X
        if isinstance(X, CsrRows):
            *outer, step = seed
            X = self._read((*outer, step // STEPS_PER_READ))
        x = X[np.sort(np.random.default_rng(seed).integers(0, X.shape[0], size))].toarray()
        k, unit = counts_of(x)
        k, unit = (torch.from_numpy(table.astype(np.float32)) for table in (k, unit[:, None]))
        return Cells(torch.from_numpy(x), k, unit)


def trained(
    network: nn.Module, cells: Sampler, n_steps: int, batch_size: int, optimization: Optimization, run: Run
) -> nn.Module:
    """Return the averaged network after its training; resumes from a checkpoint of the same training."""
    of_vae = replace(optimization, learning_rate=LEARNING_RATE, weight_decay=WEIGHT_DECAY, ema_decay=EMA_DECAY)
    learner = Learner(network, run.seed, n_steps, of_vae)
    own = replace(run, checkpoints=run.checkpoints / "autoencoder", history=[], facts={})
    learner.optimize(Batches(cells, None, batch_size, run.seed), own, "autoencoder")
    run.facts["autoencoder"] = {"n_parameters": own.facts["n_parameters"], **own.history[-1]}
    return learner.average.module.cpu()


class NetworkLatent:
    """A latent space of an encoder and a decoder: centred and scaled coordinates, and shares of genes.

    Parameters
    ----------
    network
        A trained network with `embed`, `log_share`, and buffers `centre` and `scale`.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network.eval()

    def state(self) -> dict[str, Tensor]:
        """Return the weights."""
        return self.network.state_dict()

    @property
    def n_dimensions(self) -> int:
        """Return the number of latent dimensions."""
        return len(self.network.centre)

    @torch.no_grad()
    def encode(self, X: np.ndarray | sparse.csr_matrix) -> np.ndarray:
        """Return latent coordinates, (cells, dimensions)."""
        blocks = []
        for first in range(0, X.shape[0], CELLS_PER_BLOCK):
            block = X[first : first + CELLS_PER_BLOCK]
            h = self.embed(block if isinstance(block, np.ndarray) else block.toarray())
            blocks.append(((h - self.network.centre) / self.network.scale).numpy())
        return np.concatenate(blocks)

    def embed(self, x: np.ndarray) -> Tensor:
        """Return the encoder's coordinates of log1p-normalized cells, (cells, genes) → (cells, dimensions)."""
        return self.network.embed(torch.from_numpy(x.astype(np.float32)))

    @torch.no_grad()
    def _log_share(self, z: np.ndarray) -> np.ndarray:
        h = torch.from_numpy(z.astype(np.float32)) * self.network.scale + self.network.centre
        return self.network.log_share(h).numpy()

    def log_fold_change(self, z: np.ndarray, shifts: np.ndarray) -> np.ndarray:
        """Return log ρ(z + shifts) − log ρ(z)."""
        return self._log_share(z + shifts) - self._log_share(z)

    def change(self, z: np.ndarray, shifts: np.ndarray, total: np.ndarray) -> np.ndarray:
        """Return log1p(l ρ(z + shifts)) − log1p(l ρ(z))."""
        after, before = (np.log1p(total[:, None] * np.exp(self._log_share(at))) for at in (z + shifts, z))
        return after - before

    def mean_change(self, shifts: np.ndarray) -> np.ndarray | None:
        """Return None: shifts change rates, and counts at these rates decide the mean of log1p expression."""
        return None


class CountLatent(NetworkLatent):
    """Latent coordinates of the autoencoder: the mean of a cell's posterior."""

    @classmethod
    def fit(
        cls, pairs: Pairs, n_latent: int, n_steps: int, batch_size: int, optimization: Optimization, run: Run
    ) -> "CountLatent":
        """Train on training cells; resumes from a checkpoint of the same training."""
        training = pairs.roles("train")
        X = training.X
        torch.manual_seed(run.seed)
        network = CountNetwork(X.shape[1], n_latent)
        latent = cls(trained(network, CellSampler(X), n_steps, batch_size, optimization, run))
        z = np.concatenate([latent.encode(block) for _, block in training.blocks()])
        latent.network.centre.copy_(torch.from_numpy(z.mean(axis=0)))
        latent.network.scale.copy_(torch.from_numpy(np.maximum(z.std(axis=0), 1e-3)))
        return latent

    @classmethod
    def restored(cls, state: dict[str, Tensor]) -> "CountLatent":
        """Rebuild the network around its weights."""
        n_latent, n_genes = len(state["centre"]), len(state["log_shape"])
        network = CountNetwork(n_genes, n_latent)
        network.load_state_dict(state)
        return cls(network)
