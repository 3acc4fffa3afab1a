"""What the tests share: a small screen with known effects, the steps run on it once, and a way to call Snakemake."""

import contextlib
import functools
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from forked import interpreter
from made_effects import N_GENES, TARGETS, vectors
from scipy import sparse
from threadpoolctl import threadpool_limits

from perturbflow import embeddings, pairs
from perturbflow.audit import audit
from perturbflow.counterfactuals.answers import counterfactual
from perturbflow.counterfactuals.warranty import warranty
from perturbflow.embeddings import Embeddings
from perturbflow.genes.symbols import members_of, without_dose
from perturbflow.pairs import Pairs
from perturbflow.registry.families import REFERENCES
from perturbflow.registry.shipped import above_shipped as merged  # noqa: F401  the tests' word for it
from perturbflow.screens import harmonize
from perturbflow.splits import split as splits

# Two workers share two cores, and threads that wait for one another spin.
torch.set_num_threads(1)
threadpool_limits(1)

REPOSITORY = Path(__file__).resolve().parent.parent
SHARED_DATA = REPOSITORY.parent / "shared" / "data"

PERTURBED = [f"TF{i}" for i in range(1, 9)]
COMBINATIONS = ["TF1+TF2", "TF3+TF4", "TF1+TF3", "TF2+TF4", "TF5+TF6", "TF6+TF7"]
# Four compounds at four doses, and combinations of two.
DOSED = [
    *[f"TF{i}@{dose}" for i in range(1, 5) for dose in (1, 3, 10, 30)],
    "TF1@1+TF2@10",
    "TF1@10+TF2@1",
    "TF3@3+TF4@3",
    "TF3@30+TF4@30",
]
HALF_DOSE = 5.0  # at which a compound has half of its effect
BATCHES = ("b1", "b2")
OFF = {
    "min_counts": None,
    "min_genes": None,
    "max_pct_mt": None,
    "min_cells_per_gene": None,
    "min_cells_per_perturbation": None,
}
CLOSED_FORMS = ["additive", "linear", *REFERENCES]


# Files that run whole workflows, the longest first: one that starts last would keep a worker busy alone.
LONGEST = ("test_slurm", "test_tutorial", "test_end_to_end", "test_conda", "test_faults", "test_sequences", "test_plan")


# Fixtures that train a network.
TRAINED = {"models", "jepa", "hybrid"}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first; a test of a trained network is slow."""
    for item in items:
        if TRAINED & {*getattr(item, "fixturenames", ())}:
            item.add_marker("slow")
    order = {name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


# --- data -----------------------------------------------------------------------------------------------------------


def make_screen(
    seed: int = 0, n_genes: int = 80, n_controls: int = 40, n_cells: int = 20, labels: list[str] | None = None
) -> ad.AnnData:
    """Return raw counts of a screen with additive effects on the log scale.

    At a dose d (`TF1@d`) an effect is d / (d + HALF_DOSE) of the whole. Every perturbed gene moves ten genes by a fold
    change, and itself. `uns["effects"]` holds the log fold changes (perturbed genes × genes). Batch b2 is sequenced
    deeper and has a gene of its own that is high.

    Parameters
    ----------
    n_controls, n_cells
        Cells per batch: controls, and cells per perturbation.
    """
    rng = np.random.default_rng(seed)
    labels = [*PERTURBED, *COMBINATIONS] if labels is None else labels
    genes = [*PERTURBED, "MT-ND1", *[f"GENE{i}" for i in range(n_genes - len(PERTURBED) - 1)]]
    level = rng.gamma(2.0, 6.0, n_genes)
    effects = pd.DataFrame(0.0, index=PERTURBED, columns=genes)
    for gene in PERTURBED:
        moved = rng.choice(n_genes, 10, replace=False)
        effects.loc[gene, np.array(genes)[moved]] = rng.choice([-1.0, 1.0], 10) * rng.uniform(0.7, 1.5, 10)
        effects.loc[gene, gene] = -1.5
    blocks, obs = [], []
    for batch in BATCHES:
        batch_level = level * (1.5 if batch == "b2" else 1.0)
        batch_level[20] *= 3.0 if batch == "b2" else 1.0
        for label in ["control", *labels]:
            n = n_controls if label == "control" else n_cells
            shift = np.zeros(n_genes)
            for gene, dose in map(without_dose, members_of(label)):
                shift += effects.loc[gene].to_numpy() * (1.0 if dose is None else dose / (dose + HALF_DOSE))
            blocks.append(rng.poisson(rng.gamma(8.0, batch_level * np.exp(shift) / 8.0, (n, n_genes))))
            obs += [(label, batch)] * n
    table = pd.DataFrame(obs, columns=["perturbation", "lane"], index=[f"cell_{i}" for i in range(len(obs))])
    X = sparse.csr_matrix(np.vstack(blocks).astype(np.float32))
    return ad.AnnData(X=X, obs=table, var=pd.DataFrame(index=genes), uns={"effects": effects})


@pytest.fixture(scope="session")
def tiny_screen() -> Callable[..., ad.AnnData]:
    """Return a factory of small screens of raw counts; see `make_screen`."""
    return make_screen


def dataset_block(**changes: object) -> dict:
    """Return a dataset's block as `harmonize` gets it, completed with defaults."""
    block = {
        "source": {"path": "screen.h5ad"},
        "subset": {},
        "perturbation": {"column": "perturbation", "control": ["control"], "separator": "+", "drop": ["nan", "*", ""]},
        "covariates": {"batch": "lane"},
        "perturbation_type": "CRISPRi",
        "organism": "human",
    }
    for key, value in changes.items():
        block[key] = {**block[key], **value} if key == "perturbation" else value
    return block


@pytest.fixture
def harmonized_from(tmp_path: Path) -> Callable:
    """Return a function that harmonizes an AnnData (or a file) and gives back the result, the account and its path."""

    def call(screen: ad.AnnData | Path, qc: dict | None = None, **changes: object) -> SimpleNamespace:
        raw = screen
        if isinstance(screen, ad.AnnData):
            raw = tmp_path / "screen.h5ad"
            screen.write_h5ad(raw)
        target, report = tmp_path / "harmonized.h5ad", tmp_path / "harmonization.json"
        harmonize.harmonize(raw, target, report, "mine", dataset_block(**changes), {**OFF, **(qc or {})})
        return SimpleNamespace(
            adata=ad.read_h5ad(target), account=yaml.safe_load(report.read_text()), path=target, report=report
        )

    return call


# --- one split, prepared up to the audit ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Prepared:
    """The files of one screen and one split, as the workflow leaves them."""

    folder: Path

    @property
    def harmonized(self) -> Path:
        """harmonized.h5ad."""
        return self.folder / "harmonized.h5ad"

    @property
    def harmonization(self) -> Path:
        """harmonization.json."""
        return self.folder / "harmonization.json"

    @property
    def split(self) -> Path:
        """split.json."""
        return self.folder / "split.json"

    @property
    def pairs(self) -> Path:
        """pairs.h5ad."""
        return self.folder / "pairs.h5ad"

    @property
    def embeddings(self) -> Path:
        """embeddings.parquet."""
        return self.folder / "embeddings.parquet"

    @property
    def audit(self) -> Path:
        """audit.json."""
        return self.folder / "audit.json"

    def run_audit(self) -> None:
        """Audit the files as they lie here."""
        audit.audit(self.harmonized, self.split, self.pairs, self.embeddings, self.audit)


def prepare(folder: Path, screen: ad.AnnData, spec: dict, n_hvg: int = 40) -> Prepared:
    """Run harmonize, split, pairs, embeddings and audit on a screen."""
    folder.mkdir(parents=True, exist_ok=True)
    here = Prepared(folder)
    raw = folder / "screen.h5ad"
    screen.write_h5ad(raw)
    harmonize.harmonize(raw, here.harmonized, here.harmonization, "mine", dataset_block(), OFF)
    splits.split(here.harmonized, here.harmonization, here.split, "mine", spec)
    pairs.pair(here.harmonized, here.split, here.pairs, n_hvg)
    embeddings.embeddings(here.pairs, here.embeddings, ["coexpression"])
    here.run_audit()
    return here


SPECS = {
    kind: {"kind": kind, "test_fraction": 0.3, "validation_fraction": 0.15, "seed": 0}
    for kind in ("unseen_perturbation", "unseen_combination", "unseen_dose")
}
# Perturbations have cells in several roles here.
SPECS_OF_CELLS = {
    "unseen_context": {
        "kind": "unseen_context", "covariate": "batch", "held_out": ["b2"], "test_fraction": 0.5,
        "validation_fraction": 0.2, "seed": 0,
    },
    "unseen_perturbation_in_context": {
        "kind": "unseen_perturbation_in_context", "covariate": "batch", "test_fraction": 0.5,
        "validation_fraction": 0.2, "seed": 0,
    },
    "random_cells": {"kind": "random_cells", "test_fraction": 0.25, "validation_fraction": 0.15, "seed": 0},
}  # fmt: skip


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Prepared]:
    """Return all kinds of split of one screen, prepared once; not to be written to."""
    specs = {**SPECS, **SPECS_OF_CELLS}
    labels = {"unseen_dose": DOSED}
    return {
        kind: prepare(tmp_path_factory.mktemp(kind), make_screen(labels=labels.get(kind)), spec)
        for kind, spec in specs.items()
    }


@pytest.fixture(scope="session")
def screen(prepared: dict[str, Prepared]) -> tuple[Pairs, Embeddings]:
    """Return pairs and gene vectors of the screen whose combinations are held out."""
    files = prepared["unseen_combination"]
    return Pairs.read(files.pairs), Embeddings.read(files.embeddings)


@pytest.fixture(scope="session")
def cells(prepared: dict[str, Prepared]) -> Pairs:
    """Return all cells of the split that holds combinations out; not to be written to."""
    return Pairs.read(prepared["unseen_combination"].pairs)


@pytest.fixture
def prepared_copy(prepared: dict[str, Prepared], tmp_path: Path) -> Callable[[str], Prepared]:
    """Return a function that copies a prepared split, to be spoilt."""

    def copy(kind: str) -> Prepared:
        return Prepared(Path(shutil.copytree(prepared[kind].folder, tmp_path / kind)))

    return copy


@pytest.fixture(scope="session")
def singles() -> dict[str, np.ndarray]:
    """Return effects of twelve genes, drawn from three programmes that a gene's vector tells; not to be written to."""
    rng = np.random.default_rng(0)
    programmes = rng.normal(size=(3, N_GENES))
    return {gene: vector @ programmes for gene, vector in vectors().table.iterrows() if gene in TARGETS}


# --- what-if questions ----------------------------------------------------------------------------------------------

QUERY = {
    "cells": "control",
    "samples_per_cell": 4,
    "keep_samples": False,
    "groups": "cell_type",
    "search": None,
    "drawn": 2,
}


def ask(
    here: Prepared,
    model: Path,
    folder: Path,
    implementation: str,
    params: dict,
    seed: int = 0,
    gene_vectors: Path | None = None,
    **query: object,
) -> Path:
    """Check a trained model and ask it; return where the answers are, without suffix."""
    shown = folder / "warranty.json", folder / "calibration.npz"
    files = here.pairs, here.embeddings, model
    warranty(*files, *shown, implementation, params, seed)
    answers = [folder / f"answer{suffix}" for suffix in (".h5ad", ".tsv", ".ranking.tsv", ".effects.h5ad")]
    asked = {**QUERY, **query}
    counterfactual(*files, *shown, *answers, implementation, params, asked, seed, gene_vectors=gene_vectors)
    return folder / "answer"


@pytest.fixture(scope="session")
def shared_data() -> Callable[[str], Path]:
    """Return a function that finds a file of the real screens beside the repository, or skips."""

    def find(name: str) -> Path:
        path = SHARED_DATA / name
        if not path.exists():
            pytest.skip(f"the real screens are not beside this checkout: no ../shared/data/{name}")
        return path

    return find


@pytest.fixture(scope="session")
def default_download() -> None:
    """Skip where the package index does not answer: the default screen cannot be downloaded there."""
    wanted = "renge==0.0.5"
    index = subprocess.run(
        [sys.executable, "-m", "pip", "index", "versions", "renge"], capture_output=True, text=True, check=False
    )
    if index.returncode:
        pytest.skip(f"the package index cannot be reached, so {wanted} cannot be downloaded")


# --- Snakemake ------------------------------------------------------------------------------------------------------


def write_screen(folder: Path, seed: int = 0) -> Path:
    """Write the small screen where `closed_forms_config` looks for it; return the file."""
    screen = make_screen(seed=seed)
    del screen.uns["effects"]
    screen.write_h5ad(folder / "screen.h5ad")
    return folder / "screen.h5ad"


@dataclass(frozen=True)
class Outcome:
    """What a Snakemake run said, and how it ended."""

    returncode: int
    stdout: str
    stderr: str

    @property
    def text(self) -> str:
        """Both streams; which of the two Snakemake writes a line to is its own affair."""
        return self.stdout + self.stderr

    @property
    def jobs(self) -> dict[str, int]:
        """Jobs per rule, from the table that a dry run or a run prints; empty if there is nothing to be done."""
        counts: dict[str, int] = {}
        lines = iter(self.text.splitlines())
        for line in lines:
            if line.split() == ["job", "count"]:
                next(lines)
                for row in lines:
                    if not row.strip():
                        break
                    rule, n = row.split()
                    counts[rule] = int(n)
                break
        counts.pop("total", None)
        return counts


_open_to_the_end = contextlib.ExitStack()


@functools.cache
def forked_python() -> str:
    """Return the interpreter of `forked`, one for all tests."""
    return _open_to_the_end.enter_context(interpreter())


def pytest_unconfigure() -> None:
    """End what served all tests."""
    _open_to_the_end.close()


def run_snakemake(
    folder: Path,
    *arguments: str,
    config: dict | None = None,
    repository: Path = REPOSITORY,
    environment: dict | None = None,
    python: str | None = None,
) -> Outcome:
    """Run the workflow in a folder; `config` becomes the user's own configuration file there.

    The interpreter is one that starts in a tenth of the time (`forked`), unless another is named.
    """
    command = [
        python or forked_python(),
        "-m",
        "snakemake",
        "--snakefile",
        str(repository / "Snakefile"),
        "--cores",
        "2",
        "--nocolor",
    ]
    command += map(str, arguments)
    if config is not None:
        (folder / "mine.yaml").write_text(yaml.safe_dump(config))
        command += ["--configfile", "mine.yaml"]
    variables = {**os.environ, "XDG_CACHE_HOME": str(folder / ".cache"), **(environment or {})}
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=1500, env=variables, check=False)
    return Outcome(done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="session")
def python() -> str:
    """Return an interpreter that starts in a tenth of the time (`forked`), for dozens of starts of Snakemake."""
    return forked_python()


@pytest.fixture(scope="session")
def snakemake() -> Callable[..., Outcome]:
    """Return a function that runs the real Snakefile as a subprocess; see `run_snakemake`."""
    return run_snakemake


def copy_repository(target: Path) -> Path:
    """Copy Snakefile, rules, scripts, config and envs, to be edited; what was compiled of the scripts goes along."""
    target.mkdir(parents=True)
    shutil.copy(REPOSITORY / "Snakefile", target)
    for folder in ("rules", "scripts", "config", "envs", "profiles"):
        shutil.copytree(REPOSITORY / folder, target / folder, ignore=shutil.ignore_patterns("*.tmp.*", "*.pyc.*"))
    return target


def closed_forms_config(**changes: object) -> dict:
    """Return a user's configuration: one small screen of their own, baselines and ceiling only."""
    return {
        "select": {"datasets": ["mine"], "splits": ["unseen_combination"], "models": CLOSED_FORMS},
        "genes": {"n_hvg": 40},
        "datasets": {
            "mine": {
                "source": {"path": "screen.h5ad"},
                "perturbation": {"column": "perturbation", "control": ["control"]},
                "covariates": {"batch": "lane"},
                "qc": dict(OFF),
            }
        },
        **changes,
    }
