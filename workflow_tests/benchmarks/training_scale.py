r"""Training and prediction of learned families at full size: seconds of passes, of a step and its data, and memory.

    python workflow_tests/benchmarks/training_scale.py --cells 20000 200000 --models scppdm jepa counterfactual \
        --predict 100 400

makes files of the shape of pairs.h5ad (2,000 genes, chunks and compression as anndata writes them; without the layer of
counts, which training does not read) and prints Markdown tables. Every measurement is a process of its own.
`scppdm:counts` and `scppdm:pca` are scppdm with that latent space.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import yaml
from harmonize_scale import SCRIPTS, measured
from scipy import sparse

sys.path.insert(0, str(SCRIPTS))

from perturbflow.controls import match_controls
from perturbflow.genes.symbols import CONTROL
from perturbflow.io.files import write_json
from perturbflow.pairs import CONTROLS_PER_CELL, Pairs
from perturbflow.registry.config import complete
from perturbflow.registry.families import FAMILIES
from perturbflow.splits.divisions import ROLES

N_GENES, N_PERTURBATIONS, N_BATCHES, CONTROL_SHARE = 2000, 400, 12, 0.05
ROLE_SHARES = (0.65, 0.10, 0.25)  # of perturbations and of controls
UMI_PER_CELL, TARGET_SUM, SPREAD, DISPERSION = 400, 400, 1.6, 2.0  # 11 % of the values are not zero
CELLS_PER_BLOCK, DISTINCT_BLOCKS = 4096, 8
CONFIG = SCRIPTS.parent / "config"


# --- files like those of the workflow -------------------------------------------------------------------------------


def _obs(n_cells: int, label: np.ndarray, rng: np.random.Generator) -> pd.DataFrame:
    """Return obs as `pair` writes it; perturbations have one role, controls all."""
    names = [*(f"TARGET{i}" for i in range(N_PERTURBATIONS)), CONTROL]
    role_of = rng.permutation(np.repeat(np.arange(3), np.round(np.array(ROLE_SHARES) * N_PERTURBATIONS).astype(int)))
    is_control = label == N_PERTURBATIONS
    role = np.where(is_control, rng.choice(3, n_cells, p=ROLE_SHARES), np.append(role_of, 0)[label])
    half = np.where(is_control | (role == 0), 0, rng.integers(1, 3, n_cells))

    def category(codes: np.ndarray, values: list[str]) -> pd.Categorical:
        return pd.Categorical.from_codes(codes, values)

    return pd.DataFrame(
        {
            "perturbation": category(label, names),
            "is_control": is_control,
            "n_perturbations": np.where(is_control, 0, 1),
            "perturbation_type": category(np.zeros(n_cells, np.int8), ["CRISPRi"]),
            "cell_type": category(np.zeros(n_cells, np.int8), ["K562"]),
            "batch": category(rng.integers(0, N_BATCHES, n_cells), [f"b{i}" for i in range(N_BATCHES)]),
            "dataset": category(np.zeros(n_cells, np.int8), ["made"]),
            "total_counts": rng.lognormal(9, 0.35, n_cells).astype(np.float32),
            "n_genes_by_counts": rng.integers(2000, 5000, n_cells),
            "pct_counts_mt": rng.beta(8, 70, n_cells).astype(np.float32),
            "role": category(role, list(ROLES)),
            "half": category(half, ["", "a", "b"]),
        },
        index=pd.Index([f"{i:012x}-1" for i in range(n_cells)]),
    )


def generate(folder: Path, n_cells: int, seed: int = 0) -> None:
    """Write pairs.h5ad, embeddings.parquet and audit.json; blocks repeat the same cells under other batches."""
    rng = np.random.default_rng(seed)
    level = rng.lognormal(0, SPREAD, N_GENES)
    level *= UMI_PER_CELL / level.sum()
    fold = np.exp(
        rng.normal(0, 0.8, (N_PERTURBATIONS + 1, N_GENES)) * (rng.random((N_PERTURBATIONS + 1, N_GENES)) < 0.02)
    )
    fold[N_PERTURBATIONS] = 1.0
    blocks, labels = [], []
    for _ in range(min(DISTINCT_BLOCKS, -(-n_cells // CELLS_PER_BLOCK))):
        is_control = rng.random(CELLS_PER_BLOCK) < CONTROL_SHARE
        labels.append(np.where(is_control, N_PERTURBATIONS, rng.integers(0, N_PERTURBATIONS, CELLS_PER_BLOCK)))
        mean = level * fold[labels[-1]] * rng.lognormal(-0.06, 0.35, (CELLS_PER_BLOCK, 1))
        X = sparse.csr_matrix(rng.negative_binomial(DISPERSION, DISPERSION / (DISPERSION + mean)).astype(np.float32))
        X = sparse.csr_matrix(
            sparse.diags((TARGET_SUM / np.asarray(X.sum(axis=1)).ravel()).astype(np.float32)) @ X
        ).log1p()
        blocks.append(X)
    sizes = [min(CELLS_PER_BLOCK, n_cells - first) for first in range(0, n_cells, CELLS_PER_BLOCK)]
    label = np.concatenate([labels[i % len(labels)][:size] for i, size in enumerate(sizes)])
    obs = _obs(n_cells, label, rng)
    genes = [*(f"TARGET{i}" for i in range(N_PERTURBATIONS)), *(f"GENE{i}" for i in range(N_GENES - N_PERTURBATIONS))]
    control_index, _ = match_controls(obs, CONTROLS_PER_CELL, seed)
    ad.AnnData(obs=obs, var=pd.DataFrame(index=genes), obsm={"control_index": control_index}).write_h5ad(
        folder / "pairs.h5ad", compression="gzip"
    )
    indptr = np.append(
        0, np.cumsum(np.concatenate([np.diff(blocks[i % len(blocks)].indptr)[:size] for i, size in enumerate(sizes)]))
    )
    with h5py.File(folder / "pairs.h5ad", "r+") as file:
        if "X" in file:
            del file["X"]
        group = file.create_group("X")
        group.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0", "shape": (n_cells, N_GENES)})
        group.create_dataset("indptr", data=indptr, compression="gzip")
        for name, dtype in (("data", np.float32), ("indices", np.int32)):
            written = group.create_dataset(name, (int(indptr[-1]),), dtype, chunks=True, compression="gzip")
            at = 0
            for i, size in enumerate(sizes):
                values = getattr(blocks[i % len(blocks)][:size], name)
                written[at : at + len(values)] = values
                at += len(values)
    vectors = pd.DataFrame(rng.normal(size=(N_PERTURBATIONS, 32)), index=genes[:N_PERTURBATIONS])
    vectors.columns = [f"coexpression:{i}" for i in range(32)]
    vectors.to_parquet(folder / "embeddings.parquet")
    write_json(folder / "audit.json", {"split_sha256": ""})


# --- what is measured -----------------------------------------------------------------------------------------------


def model_of(name: str, n_steps: int) -> tuple[str, dict]:
    """Return implementation and params of a model; `name:counts` and `name:pca` have that latent space."""
    name, _, latent = name.partition(":")
    config: dict = {
        "select": {"datasets": ["renge2023"], "splits": ["unseen_perturbation"], "models": [name], "seeds": [0]},
        "effort": "standard",
    }
    for file in ("config", "datasets", "splits", "models", "counterfactuals"):
        config = {**yaml.safe_load((CONFIG / f"{file}.yaml").read_text()), **config}
    block = complete(config)["models"][name]
    steps = dict.fromkeys((param for param in block["params"] if param.startswith("n_steps")), n_steps)
    return FAMILIES[block["family"]].implementation, {
        **block["params"],
        **steps,
        **({"latent": latent} if latent else {}),
    }


class Clock:
    """Adds up the seconds and the calls of functions."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def timed(self, name: str, function: Callable) -> Callable:
        """Return the function, timed."""

        def call(*arguments: object, **named: object) -> object:
            started = time.perf_counter()
            try:
                return function(*arguments, **named)
            finally:
                self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started

        return call

    def waited(self, name: str, function: Callable[..., Iterator]) -> Callable[..., Iterator]:
        """Return a function that makes an iterator, with the time that is waited for its next."""

        def call(*arguments: object, **named: object) -> Iterator:
            made = function(*arguments, **named)
            end = object()
            following = self.timed(name, lambda: next(made, end))
            while (item := following()) is not end:
                yield item

        return call


def train_here(folder: Path, name: str, n_steps: int, threads: int) -> None:
    """Train one model and write what took how long."""
    from perturbflow import train as training
    from perturbflow.models import base
    from perturbflow.models.training import batches, learner

    clock = Clock()
    learner.Learner.optimize = clock.timed("optimize", learner.Learner.optimize)
    learner.Learner.optimize_briefly = clock.timed("inner folds", learner.Learner.optimize_briefly)
    batches.sampled_ahead = learner.sampled_ahead = clock.waited("batch", batches.sampled_ahead)
    implementation, params = model_of(name, n_steps)
    family = type(base.build(implementation, params))
    family.fit = clock.timed("fit", family.fit)
    files = [folder / file for file in ("pairs.h5ad", "embeddings.parquet", "audit.json", "model.ckpt", "run.json")]
    training.train(*files, implementation, params, 0, "cpu", threads=threads)
    write_json(folder / "seconds.json", clock.seconds)


def predict_here(folder: Path, name: str, n_steps: int, threads: int, max_cells: int) -> None:
    """Predict with the model of `train_here`."""
    import torch

    from perturbflow.predict import predict

    torch.set_num_threads(threads)
    predict(
        folder / "pairs.h5ad",
        folder / "model.ckpt",
        folder / "predictions.h5ad",
        *model_of(name, n_steps),
        0,
        max_cells,
    )


def read_here(folder: Path) -> None:
    """Print rows per second of batches of 256 rows of X from runs of 256 cells.

    They are sampled as the latent space of counts does, and with scDataset.
    """
    from scdataset import BlockShuffling, scDataset

    from perturbflow.models.latents.vae import N_RUNS, RUN

    X = Pairs.open(folder / "pairs.h5ad").X
    n_batches = 640
    started = time.perf_counter()
    for i in range(n_batches * 256 // (N_RUNS * RUN)):
        runs = np.sort(np.random.default_rng(i).choice(X.shape[0] // RUN, N_RUNS, replace=False))
        read = X[(runs[:, None] * RUN + np.arange(RUN)).ravel()]
        for rows in np.random.default_rng(i).permutation(N_RUNS * RUN).reshape(-1, 256):
            read[rows].toarray()
    ours = n_batches * 256 / (time.perf_counter() - started)
    rates = {"own": round(ours)}

    class Sized:
        """What scDataset asks for: rows by number, and how many there are."""

        def __init__(self, X: object) -> None:
            self.X = X

        def __len__(self) -> int:
            return self.X.shape[0]

        def __getitem__(self, rows: np.ndarray) -> sparse.csr_matrix:
            return self.X[np.asarray(rows)]

    with h5py.File(folder / "pairs.h5ad") as file:
        for source, matrix in (("anndata's", ad.io.sparse_dataset(file["X"])), ("own", X)):
            loader = iter(
                scDataset(
                    Sized(matrix), BlockShuffling(block_size=RUN), batch_size=256, fetch_factor=N_RUNS * RUN // 256
                )
            )
            started = time.perf_counter()
            for _ in range(n_batches):
                next(loader).toarray()
            rates[f"scDataset on {source} rows"] = round(n_batches * 256 / (time.perf_counter() - started))
    print(rates)


def rows_of(n_cells: int, folder: Path, arguments: argparse.Namespace) -> None:
    """Measure one size; print the rows of the tables."""
    here = folder / f"cells_{n_cells}"
    if not (here / "audit.json").exists():
        here.mkdir(parents=True, exist_ok=True)
        generate(here, n_cells)
    size = f"{(here / 'pairs.h5ad').stat().st_size / 1e9:.2f}"
    for name in arguments.models:
        common = ["--folder", here, "--models", name, "--steps", arguments.steps, "--threads", arguments.threads]
        wall, _, peak = measured(__file__, "--train", *common)
        seconds = json.loads((here / "seconds.json").read_text())
        n_steps = arguments.steps * (2 if ":counts" in name else 3 if name == "jepa" else 1)
        passes = seconds["fit"] - seconds["optimize"] - seconds.get("inner folds", 0.0)
        step = seconds["optimize"] / n_steps
        cells = [
            f"{n_cells:,}",
            size,
            name,
            f"{passes:.1f}",
            f"{1000 * step:.1f}",
            f"{seconds['batch'] / seconds['optimize']:.1%}",
        ]
        print("| " + " | ".join([*cells, f"{wall:.0f}", f"{peak:,.0f}"]) + " |", flush=True)
        for max_cells in arguments.predict:
            wall, _, peak = measured(__file__, "--sample", max_cells, *common)
            with h5py.File(here / "predictions.h5ad") as file:
                n_predicted = int(file["X"].attrs["shape"][0])
            print(
                f"| {n_cells:,} | {size} | {name}, {n_predicted:,} cells predicted | | | | {wall:.1f} | {peak:,.0f} |",
                flush=True,
            )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--cells",
        type=int,
        nargs="+",
        default=[20_000, 200_000],
        help="sizes of the files to be made (or found) and read",
    )
    parser.add_argument("--models", nargs="+", default=["scppdm"], help="of config/models.yaml")
    parser.add_argument("--steps", type=int, default=300, help="of training")
    parser.add_argument(
        "--predict",
        type=int,
        nargs="*",
        default=[],
        help="cells per perturbation to be predicted, of 100 perturbations",
    )
    parser.add_argument("--folder", type=Path, help="where the files are kept; default: a temporary folder")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--read", action="store_true", help="measure reading alone, beside scDataset, from the file in the folder"
    )
    parser.add_argument("--train", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--sample", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.train:
        train_here(arguments.folder, arguments.models[0], arguments.steps, arguments.threads)
    elif arguments.sample:
        predict_here(arguments.folder, arguments.models[0], arguments.steps, arguments.threads, arguments.sample)
    elif arguments.read:
        read_here(arguments.folder)
    else:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
            print("| cells | file, GB | model | passes, s | step, ms | of it data | whole, s | peak, MB |")
            print("| " + "---: | " * 8)
            for n_cells in arguments.cells:
                rows_of(n_cells, arguments.folder or Path(temporary), arguments)


if __name__ == "__main__":
    main()
