r"""From how many perturbations on a network passes the closed form, in worlds whose truth is known.

    python workflow_tests/benchmarks/from_how_many.py --sizes 100 300 1000 --seeds 0 1 --rows rows.tsv \
        [--models set_gp jepa] [--steps 1] [--figure figure.png]

In a world, a gene's vector x, 8 numbers, determines 70 % of 16 hidden features z by two layers of a random network; 30
% are its own. With members i of a perturbation and a cell's state s of 3 axes, the log fold change of a measured gene
is

    A tanh( ( Σ_i Σ_h m_h(s) z_ih B_hg + Σ_{i<j} tanh(z_i P) ∘ tanh(z_j P) R_g ) / A ),
    m_h(s) = 1 or 2 σ(3 s_a(h)), half of the features each:

non-linear in the vectors, saturating and epistatic in combinations, and different between cells. Counts are Poisson
around rates with noise of the cell's own (gamma), 300 genes, 1,500 counts a cell. No perturbed gene is measured, so
every error is off target.

Training holds two singles to one double. Training sets of a world are nested, and the same 40 genes and 40 doubles of
genes seen at every size are held out. Per model: root mean squared error and Pearson's r of mean effects to the true
ones; `pds_cosine` among the true ones; energy distance of predicted to measured cells; root mean squared error of
individual effects on 100 control cells to each cell's expected one; the same of the differences between cells alone,
with its ratio to saying none; processor seconds of training and of 1,000 predicted cells. `true_mean` knows every mean
effect, `truth` samples cells from the world. A row is added to the file as soon as a model is done; rows that are there
are not made again. Steps of all networks are those of the registry times √(perturbations / 100), or times --steps:
with the registry's own at 1,000, `scppdm` was worse than at 100, in a world (seed 50) that is not among those shown.
"""

import argparse
import logging
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import torch
from scipy import sparse
from scipy.ndimage import map_coordinates
from scipy.special import expit
from scipy.stats import poisson

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [
    str(ROOT / "scripts"),
    str(ROOT / "workflow_tests"),
    str(ROOT / "workflow_tests/support"),
    str(ROOT / "workflow_tests/benchmarks"),
]

from learned import registered  # noqa: E402

from leaderboard import markdown_of  # noqa: E402
from perturbflow.colours import COLOURS, MARKERS  # noqa: E402
from perturbflow.controls import Context, match_controls  # noqa: E402
from perturbflow.embeddings import Embeddings  # noqa: E402
from perturbflow.evaluation import METRICS, score_inputs  # noqa: E402
from perturbflow.evaluation.similarity import correlation  # noqa: E402
from perturbflow.genes.symbols import members_of  # noqa: E402
from perturbflow.models.base import Model, Run, build  # noqa: E402
from perturbflow.pairs import CONTROLS_PER_CELL, Pairs  # noqa: E402
from perturbflow.predict import nonnegative  # noqa: E402

N_GENES, N_VECTOR, N_HIDDEN, N_STATES = 300, 8, 16, 3
DEPTH, SATURATION, KNOWN_SHARE = 1500.0, 1.2, 0.7
CELLS, CONTROLS, TEST_CONTROLS = 50, 1000, 300
HELD_OUT, ASKED_CELLS, ASKED_SINGLES, ASKED_DOUBLES = 40, 100, 6, 20
POPULATION = 500  # cells that a true mean effect is the mean over
STRATA = {"single": "unseen genes", "double": "doubles of seen genes"}
MODELS = {
    "no_change": ("no_change", {}),
    "perturbed_mean": ("perturbed_mean", {}),
    "additive": ("additive", {}),
    "set_gp": ("set_gp", {}),
    "counterfactual": ("counterfactual", {}),
    "scppdm": ("scppdm", {}),
    "scppdm_hybrid": ("scppdm_hybrid", {}),
    "jepa, mean learned": ("jepa", {"mean": "learned"}),
    "jepa": ("jepa", {}),
}
REFERENCES = ("true_mean", "truth")


# --- the world ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cells:
    """What cells bring with them: state (cells, 3), size (cells,), own noise (cells, genes)."""

    state: np.ndarray
    size: np.ndarray
    noise: np.ndarray


class World:
    """The equations, sampled from a seed; `n` perturbed genes, those held out last."""

    def __init__(self, seed: int, n: int) -> None:
        rng = np.random.default_rng((seed, 1))
        self.seed = seed
        first, second = rng.normal(size=(N_VECTOR, 64)) * 1.5 / np.sqrt(N_VECTOR), rng.normal(size=(64, N_HIDDEN))
        scale = np.tanh(np.random.default_rng(0).normal(size=(4000, N_VECTOR)) @ first) @ second
        self.level = rng.normal(0.0, 1.0, N_GENES)
        self.weights = rng.normal(0.0, 0.5, (N_STATES, N_GENES)) * (rng.random((N_STATES, N_GENES)) < 0.4)
        self.B = 0.2 * rng.normal(size=(N_HIDDEN, N_GENES)) * (rng.random((N_HIDDEN, N_GENES)) < 0.25)
        self.P = rng.normal(size=(N_HIDDEN, N_HIDDEN)) / np.sqrt(N_HIDDEN)
        self.R = 0.35 * rng.normal(size=(N_HIDDEN, N_GENES)) * (rng.random((N_HIDDEN, N_GENES)) < 0.25)
        self.is_dependent = np.arange(N_HIDDEN) % 2 == 0
        self.axis = np.arange(N_HIDDEN) // 2 % N_STATES
        self.genes = [f"GENE{i}" for i in range(N_GENES)]
        self.perturbed = [f"P{i:04d}" for i in range(n)]
        rng = np.random.default_rng((seed, 2))  # gene by gene, so that smaller worlds are parts of larger ones
        sampled = rng.normal(size=(n, N_VECTOR + N_HIDDEN + 1))
        self.vectors = sampled[:, :N_VECTOR]
        known_part = np.tanh(self.vectors @ first) @ second / scale.std(axis=0)
        z = np.sqrt(KNOWN_SHARE) * known_part + np.sqrt(1 - KNOWN_SHARE) * sampled[:, N_VECTOR:-1]
        self.z = dict(zip(self.perturbed, z * np.exp(0.4 * sampled[:, -1:]), strict=True))

    def cells(self, n: int, seed: int) -> Cells:
        """Sample cells; one axis of the state is a switch."""
        rng = np.random.default_rng((self.seed, 3, seed))
        state = rng.normal(0.0, 1.0, (n, N_STATES))
        state[:, 0] = rng.choice([-1.0, 1.0], n) + 0.35 * state[:, 0]
        return Cells(state, DEPTH * np.exp(rng.normal(0.0, 0.25, n)), rng.gamma(20.0, 1 / 20.0, (n, N_GENES)))

    def rates(self, cells: Cells, label: str) -> np.ndarray:
        """Return mean counts under a perturbation, (cells, genes)."""
        logarithm = self.level + cells.state @ self.weights + np.log(cells.noise)
        if label != "control":
            z = np.stack([self.z[gene] for gene in members_of(label)])
            response = np.where(self.is_dependent, 2.0 * expit(3.0 * cells.state[:, self.axis]), 1.0)  # (cells, hidden)
            moved = (response * z.sum(axis=0)) @ self.B
            for i in range(len(z)):
                for j in range(i):
                    moved = moved + (np.tanh(z[i] @ self.P) * np.tanh(z[j] @ self.P)) @ self.R
            logarithm = logarithm + SATURATION * np.tanh(moved / SATURATION)
        rates = np.exp(logarithm)
        return cells.size[:, None] * rates / rates.sum(axis=1, keepdims=True)

    def measured(self, n: int, label: str, seed: int) -> sparse.csr_matrix:
        """Return new cells under a perturbation, log1p-normalized, (cells, genes)."""
        counts = np.random.default_rng((self.seed, 4, seed)).poisson(self.rates(self.cells(n, seed), label))
        scaled = counts * (DEPTH / np.maximum(counts.sum(axis=1, keepdims=True), 1))
        return sparse.csr_matrix(np.log1p(scaled).astype(np.float32))

    def effects(self, cells: Cells, label: str) -> np.ndarray:
        """Return what a perturbation changes in each cell's expected expression, log1p-normalized, (cells, genes)."""
        return expected(self.rates(cells, label), cells.size) - expected(self.rates(cells, "control"), cells.size)


ROOTS, LOG_SCALES = np.linspace(0.0, 20.0, 600), np.linspace(-1.5, 1.5, 61)


def _table() -> np.ndarray:
    rates, counts = ROOTS**2, np.arange(700)
    return poisson.pmf(counts, rates[:, None]) @ np.log1p(counts[:, None] * np.exp(LOG_SCALES))


TABLE = _table()


def expected(rates: np.ndarray, size: np.ndarray) -> np.ndarray:
    """Return E log(1 + k · depth / size) of k ~ Poisson(rate), (cells, genes), from a table.

    Above 400 counts, their noise is left out.
    """
    scale = np.broadcast_to((DEPTH / size)[:, None], rates.shape)
    row = np.sqrt(rates) / (ROOTS[1] - ROOTS[0])
    column = (np.log(scale) - LOG_SCALES[0]) / (LOG_SCALES[1] - LOG_SCALES[0])
    looked_up = map_coordinates(TABLE, [row, column], order=1, mode="nearest")
    return np.where(rates < ROOTS[-1] ** 2, looked_up, np.log1p(rates * scale))


# --- the screen -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Screen:
    """What models are given, and what they are held against.

    Attributes
    ----------
    pairs, embeddings
        Cells of training and test, and vectors of all perturbed genes.
    held_out
        Test perturbations by kind, single or double.
    controls
        What the test controls brought with them.
    """

    world: World
    pairs: Pairs
    embeddings: Embeddings
    held_out: dict[str, list[str]]
    controls: Cells


def divided(seed: int, size: int, sizes: list[int]) -> tuple[list[str], dict[str, list[str]], int]:
    """Return training perturbations, those held out, and the number of perturbed genes of the largest world."""
    n_singles = [round(2 * n / 3) for n in sizes]
    n_genes = max(n_singles) + HELD_OUT
    names = [f"P{i:04d}" for i in range(n_genes)]
    unseen, rest = names[:HELD_OUT], names[HELD_OUT:]
    rng = np.random.default_rng((seed, 5))
    taken: set[str] = set()

    def doubles(of: list[str], n: int) -> list[str]:
        found: list[str] = []
        while len(found) < n:
            label = "+".join(sorted(rng.choice(of, 2, replace=False)))
            if label not in taken:
                taken.add(label)
                found.append(label)
        return found

    held_out = {"single": unseen, "double": doubles(rest[: min(n_singles)], HELD_OUT)}
    training: list[str] = []
    for n, singles in sorted(zip(sizes, n_singles, strict=True)):
        if n <= size:
            known = [label for label in training if "+" in label]
            training = [*rest[:singles], *known, *doubles(rest[:singles], n - singles - len(known))]
    return training, held_out, n_genes


def screen_of(seed: int, size: int, sizes: list[int]) -> Screen:
    """Make the cells of one world and size."""
    training, held_out, n_genes = divided(seed, size, sizes)
    world = World(seed, n_genes)
    blocks, obs = [], []
    for role, labels, n_controls in (
        ("train", training, CONTROLS),
        ("test", [*held_out["single"], *held_out["double"]], TEST_CONTROLS),
    ):
        for label, n in (("control", n_controls), *((label, CELLS) for label in labels)):
            blocks.append(world.measured(n, label, seed_of(label, role)))
            obs += [(label, role, label == "control", "b" if role == "test" and label != "control" else "")] * n
    table = pd.DataFrame(
        obs, columns=["perturbation", "role", "is_control", "half"], index=[f"cell_{i}" for i in range(len(obs))]
    )
    table = table.assign(batch="b1", cell_type="unknown", perturbation_type="CRISPRa", dataset="made")
    index, _ = match_controls(table, CONTROLS_PER_CELL, seed)
    pairs = Pairs(sparse.vstack(blocks).tocsr(), table, world.genes, index, np.arange(len(table)))
    vectors = pd.DataFrame(world.vectors, index=world.perturbed, columns=[f"vectors:{i}" for i in range(N_VECTOR)])
    controls = world.cells(TEST_CONTROLS, seed_of("control", "test"))
    return Screen(world, pairs, Embeddings(vectors.astype(np.float32)), held_out, controls)


def seed_of(label: str, role: str) -> int:
    """Return a seed that a label has in every size of a world."""
    return int.from_bytes(f"{label}|{role}".encode(), "little") % (2**61 - 1)


# --- what is measured -----------------------------------------------------------------------------------------------


class Known:
    """The truth in a model's place: true mean effects, or cells and effects of the world."""

    def __init__(self, screen: Screen, name: str) -> None:
        self.screen, self.is_world = screen, name == "truth"
        self.population = screen.world.cells(POPULATION, 1)

    def effect(self, label: str) -> np.ndarray:
        """Return the true mean effect, (genes,)."""
        return self.screen.world.effects(self.population, label).mean(axis=0)


@torch.no_grad()
def mean_effect(model: Model, label: str) -> np.ndarray:
    """Return the mean effect by a model on its population of controls, (genes,)."""
    return model.effect(label) if hasattr(model, "effect") else model._response_of_training(label).mean_effect(None)


def individual(
    model: Model | Known, screen: Screen, start: np.ndarray, cells: Cells, label: str, seed: int
) -> np.ndarray:
    """Return effects on these cells, (cells, genes)."""
    if not isinstance(model, Known):
        return model.individual_effects(start, label, seed)
    return screen.world.effects(cells, label) if model.is_world else np.tile(model.effect(label), (len(start), 1))


def cells_of(
    model: Model | Known, screen: Screen, label: str, start: np.ndarray, context: Context, seed: int
) -> np.ndarray:
    """Return predicted cells, (cells, genes)."""
    if not isinstance(model, Known):
        return nonnegative(model.predict(start, [label], len(start), seed, context)[0])
    if model.is_world:
        return screen.world.measured(len(start), label, seed_of(label, "again")).toarray()
    return nonnegative(start + context.level - start.mean(axis=0) + model.effect(label))


def energy_distances(model: Model | Known, screen: Screen, seed: int) -> tuple[dict[str, float], float]:
    """Return the energy distance of predicted cells by label, and processor seconds of 1,000 cells."""
    test = screen.pairs.roles("test")
    context_of = test.context_of(np.flatnonzero(test.is_control)).levels
    blocks, obs, seconds = [], [], 0.0
    for label in test.perturbations:
        rows = test.control_index[test.cells_of(label), 0]
        start, began = test.X[rows].toarray(), time.process_time()
        blocks.append(
            sparse.csr_matrix(
                cells_of(model, screen, label, start, Context(test.strata[rows], context_of), seed).astype(np.float32)
            )
        )
        seconds += time.process_time() - began
        obs.append(pd.DataFrame({"perturbation": label, "control_index": test.rows[rows]}))
    table = pd.concat(obs, ignore_index=True)
    predictions = ad.AnnData(
        X=sparse.vstack(blocks).tocsr(),
        obs=table.set_index(table.index.astype(str)),
        var=pd.DataFrame(index=test.genes),
    )
    predictions.uns["perturbflow"] = {
        "starts_from_controls": not (isinstance(model, Known) and model.is_world),
        "role": "test",
    }
    if not predictions.uns["perturbflow"]["starts_from_controls"]:
        predictions.obs = predictions.obs.assign(batch="b1", cell_type="unknown")
    scored = score_inputs(predictions, screen.pairs, frozenset({"cells"}))
    values = METRICS["energy_distance"].function(scored)
    return dict(zip(scored.labels, map(float, values), strict=True)), 1000 * seconds / len(table)


def scored(model: Model | Known, screen: Screen, truth: Known, seed: int) -> list[dict]:
    """Return one row per kind of held-out perturbation."""
    energy, seconds = energy_distances(model, screen, seed)
    test = screen.pairs.roles("test")
    asked = np.flatnonzero(test.is_control)[:ASKED_CELLS]
    start = test.X[asked].toarray()
    cells = Cells(*(getattr(screen.controls, name)[:ASKED_CELLS] for name in ("state", "size", "noise")))
    rows = []
    for kind, labels in screen.held_out.items():
        own, differing, alike = [], [], []
        predicted = {}
        for i, label in enumerate(labels):
            if i < (ASKED_SINGLES if kind == "single" else ASKED_DOUBLES):
                answer, right = individual(model, screen, start, cells, label, seed), screen.world.effects(cells, label)
                own.append(np.sqrt(((answer - right) ** 2).mean()))
                apart = right - right.mean(axis=0)
                differing.append(((answer - answer.mean(axis=0) - apart) ** 2).mean())
                alike.append((apart**2).mean())
            predicted[label] = model.effect(label) if isinstance(model, Known) else mean_effect(model, label)
        values, right = np.stack(list(predicted.values())), np.stack([truth.effect(label) for label in labels])
        unit = [rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12) for rows in (values, right)]
        cosine = unit[0] @ unit[1].T
        nearer = (cosine > cosine.diagonal()[:, None]).sum(axis=1) + 0.5 * (
            (cosine == cosine.diagonal()[:, None]).sum(axis=1) - 1
        )
        rows.append(
            {
                "stratum": STRATA[kind],
                "rmse": np.sqrt(((values - right) ** 2).mean()),
                "r": np.mean(list(map(correlation, values, right))),
                "pds": 1 - nearer.mean() / (len(labels) - 1),
                "energy": np.mean([energy[label] for label in labels]),
                "individual": np.mean(own),
                "differences": np.sqrt(np.mean(differing)),
                "differences, ratio": np.sqrt(np.mean(differing) / np.mean(alike)),
                "predict": seconds,
            }
        )
    return rows


def rows_of(name: str, screen: Screen, seed: int, steps: float) -> list[dict]:
    """Train one model, or take the truth in its place, and score it."""
    truth, seconds = Known(screen, "true_mean"), (0.0, 0.0)
    if name in REFERENCES:
        return [{**row, "train": 0.0, "wall": 0.0} for row in scored(Known(screen, name), screen, truth, seed)]
    registry_name, changes = MODELS[name]
    implementation, params = registered(registry_name)
    params |= changes | {param: round(steps * n) for param, n in params.items() if param.startswith("n_steps")}
    model = build(implementation, params)
    with tempfile.TemporaryDirectory() as folder:
        began = time.process_time(), time.perf_counter()
        model.fit(
            screen.pairs.roles("train"),
            screen.embeddings,
            Run(seed=seed, checkpoints=Path(folder), identity="benchmark"),
        )
        seconds = time.process_time() - began[0], time.perf_counter() - began[1]
        return [{**row, "train": seconds[0], "wall": seconds[1]} for row in scored(model, screen, truth, seed)]


# --- tables and the figure ------------------------------------------------------------------------------------------


def read(path: Path) -> pd.DataFrame:
    """Return the rows that are there."""
    return pd.read_csv(path, sep="\t") if path.exists() else pd.DataFrame({"size": [], "seed": [], "model": []})


def tables(rows: pd.DataFrame) -> str:
    """Return one table per kind: means over worlds."""
    formats = {
        "rmse": "{:.4f}",
        "r": "{:.3f}",
        "pds": "{:.3f}",
        "energy": "{:.3f}",
        "individual": "{:.4f}",
        "differences, ratio": "{:.3f}",
        "train": "{:.0f}",
        "predict": "{:.2f}",
    }
    found = []
    for stratum, of in rows.groupby("stratum", sort=False):
        shown = of.groupby(["size", "model"], sort=False).agg({**dict.fromkeys(formats, "mean"), "seed": "nunique"})
        for name, form in formats.items():
            shown[name] = shown[name].map(form.format)
        found.append(f"**{stratum}**\n\n{markdown_of(shown.rename(columns={'seed': 'worlds'}).reset_index())}")
    return "\n\n".join(found)


def figure(rows: pd.DataFrame, path: Path) -> None:
    """Plot errors of mean and of individual effects against training perturbations, one line per model."""
    from matplotlib.figure import Figure

    panels = [("rmse", "error of mean effects"), ("individual", "error of individual effects")]
    canvas = Figure(figsize=(11, 8), layout="constrained")
    axes = canvas.subplots(2, 2, squeeze=False)
    names = [name for name in [*MODELS, "true_mean"] if name in set(rows["model"]) and name != "no_change"]
    for row, stratum in zip(axes, STRATA.values(), strict=True):
        for axis, (column, title) in zip(row, panels, strict=True):
            for k, name in enumerate(names):
                of = rows[(rows["model"] == name) & (rows["stratum"] == stratum)]
                mean = of.groupby("size")[column].mean()
                if name == "true_mean" and column == "rmse":
                    continue
                style: dict[str, object] = {"color": COLOURS[k % len(COLOURS)], "marker": MARKERS[k % len(MARKERS)]}
                if name in ("perturbed_mean", "additive", "true_mean"):
                    style |= {
                        "color": "#8C8C8C",
                        "linestyle": {"perturbed_mean": ":", "additive": "--", "true_mean": "-."}[name],
                        "linewidth": 1,
                    }
                axis.plot(mean.index, mean, label=name, markersize=5, **style)
            axis.set(xscale="log", title=f"{stratum}: {title}", xlabel="training perturbations", ylabel="RMSE, log1p")
            axis.set_xticks(ticks := sorted(set(rows["size"])), [f"{n:,}" for n in ticks])
            axis.minorticks_off()
    axes[0][1].legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    canvas.savefig(path, dpi=110)


def main() -> None:
    """Add rows to the file, print tables and plot the figure."""
    logging.disable(logging.INFO)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="*", default=[100, 300, 1000], help="training perturbations")
    parser.add_argument(
        "--nested", type=int, nargs="+", default=[100, 300, 1000, 3000], help="all sizes that a world can have"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--models", nargs="+", default=[*REFERENCES, *MODELS])
    parser.add_argument("--steps", type=float, help="times the registry's steps; √(size / 100) by default")
    parser.add_argument("--rows", type=Path, required=True, help="TSV")
    parser.add_argument("--figure", type=Path)
    arguments = parser.parse_args()
    for size in arguments.sizes:
        for seed in arguments.seeds:
            rows = read(arguments.rows)
            done = set(rows.loc[(rows["size"] == size) & (rows["seed"] == seed), "model"])
            missing = [name for name in arguments.models if name not in done]
            screen = screen_of(seed, size, arguments.nested) if missing else None
            steps = arguments.steps or round(np.sqrt(size / 100), 2)
            for name in missing:
                made = [
                    {"size": size, "seed": seed, "model": name, "steps": steps, **row}
                    for row in rows_of(name, screen, seed, steps)
                ]
                pd.DataFrame(made).to_csv(
                    arguments.rows,
                    sep="\t",
                    index=False,
                    mode="a",
                    header=not arguments.rows.exists(),
                    float_format="%.5g",
                )
                print(f"{size} {seed} {name}", flush=True)
    print(tables(read(arguments.rows)))
    if arguments.figure:
        figure(read(arguments.rows), arguments.figure)


if __name__ == "__main__":
    main()
