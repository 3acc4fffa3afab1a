"""What bfloat16 and compilation do to a step of training: paired times of the same steps, in turn, on this device.

    python workflow_tests/benchmarks/steps.py

prints a Markdown table, a row per network that a model trains: milliseconds of a step in float32, and the times of the
other settings over that (median of the rounds, the smallest and largest of them in brackets), with the seconds that
compilation takes at first. Data are not in it: batches are sampled before. Cells are made, as in training_scale.py;
networks are as large as the default params make them.
"""

import argparse
import copy
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from harmonize_scale import SCRIPTS
from torch import nn
from training_scale import generate, model_of

sys.path.insert(0, str(SCRIPTS))

from perturbflow.embeddings import Embeddings
from perturbflow.models import jepa as representation
from perturbflow.models import learned
from perturbflow.models.base import Run, build
from perturbflow.models.latents import vae as autoencoder
from perturbflow.models.training.batches import Batches
from perturbflow.models.training.loop import MAX_GRADIENT, Learner, Optimization
from perturbflow.pairs import Pairs

SETTINGS = {
    "float32": ("float32", False),
    "bfloat16": ("bfloat16", False),
    "compiled": ("float32", True),
    "both": ("bfloat16", True),
}
N_BATCHES = 10


def networks_of(name: str, folder: Path) -> dict[str, tuple[Learner, list]]:
    """Return the untrained networks of a model, stage by stage, with batches for each.

    The closed forms that it may choose among are left out.
    """
    found: dict[str, tuple[Learner, list]] = {}

    def noted(learner: Learner, batches: Batches, run: Run, stage: str) -> None:
        found[stage] = learner, [batches.training.batch(batches.size, (0, 0, i)) for i in range(N_BATCHES)]
        run.facts["n_parameters"] = 0
        run.history.append({})

    implementation, params = model_of(name, 1)
    model = build(implementation, {**params, "mean": "learned"})
    kept = {module: module.optimize for module in (learned, autoencoder, representation)}
    try:
        for module in kept:
            module.optimize = noted
        model.fit(
            Pairs.read(folder / "pairs.h5ad").roles("train"),
            Embeddings.read(folder / "embeddings.parquet"),
            Run(seed=0, checkpoints=folder / "checkpoints"),
        )
    finally:
        for module, optimize in kept.items():
            module.optimize = optimize
    return found


def steps(learner: Learner, batches: list, setting: str, device: torch.device) -> Iterator[float]:
    """Yield the seconds of as many steps as there are batches, again and again; the first with compilation."""
    precision, compiled = SETTINGS[setting]
    network = copy.deepcopy(learner.network).to(device)
    trained = Learner(network, 0, 10**6, Optimization(1e-3, 0.01, 0.99, precision, compiled)).to(device)
    optimizer = trained.configure_optimizers()["optimizer"]
    there = [batch.to(device) for batch in batches]
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    while True:
        started = time.perf_counter()
        for batch in there:
            optimizer.zero_grad()
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16", cache_enabled=False):
                loss = trained.losses(batch)["loss"]
            loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), MAX_GRADIENT)
            optimizer.step()
        wait()
        yield time.perf_counter() - started


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--models",
        nargs="+",
        default=["scppdm"],
        help="of config/models.yaml; only the diffusion family has these params",
    )
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS)[1:], default=list(SETTINGS)[1:])
    parser.add_argument("--rounds", type=int, default=20, help=f"of {N_BATCHES} steps each")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {arguments.threads} thread(s)"
    print(
        f"{name}, torch {torch.__version__}\n\n| model, network | float32, ms | "
        + " | ".join(arguments.settings)
        + " | compiling, s |"
    )
    print("| --- |" + " --- |" * (len(arguments.settings) + 2))
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder), 20_000)
        for model in arguments.models:
            for stage, (learner, batches) in networks_of(model, Path(folder)).items():
                torch.compiler.reset()
                running = {
                    setting: steps(learner, batches, setting, device) for setting in ["float32", *arguments.settings]
                }
                first = {setting: next(seconds) for setting, seconds in running.items()}
                taken = np.array(
                    [[next(seconds) for seconds in running.values()] for _ in range(arguments.rounds + 2)]
                )[2:]
                ratios = (taken[:, 1:] / taken[:, :1]).T
                cells = [f"{np.median(row):.2f} ({row.min():.2f}-{row.max():.2f})" for row in ratios]
                ms = 1000 * np.median(taken[:, 0]) / N_BATCHES
                print(
                    "| "
                    + " | ".join(
                        [
                            f"{model}, {stage}",
                            f"{ms:.1f}",
                            *cells,
                            f"{first['compiled']:.0f}" if "compiled" in first else "–",
                        ]
                    )
                    + " |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
