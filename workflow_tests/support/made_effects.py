"""Training cells around known effects, and how far a predicted effect is from the true one."""

import numpy as np
import pandas as pd
from scipy import sparse

from perturbflow.embeddings import Embeddings
from perturbflow.models.closed_form.base import ClosedForm, TrainingSet
from perturbflow.pairs import Pairs

N_GENES = 60
TARGETS = [f"G{i}" for i in range(12)]
NO_VECTORS = Embeddings(pd.DataFrame())


def make_training(
    effects: dict[str, np.ndarray],
    embeddings: Embeddings = NO_VECTORS,
    n: int = 40,
    noise: float = 0.2,
    batches: int = 1,
    seed: int = 0,
) -> TrainingSet:
    """Return training cells with these effects, n per perturbation and batch, around controls of level 3."""
    rng = np.random.default_rng(seed)
    blocks, rows = [], []
    for batch in range(batches):
        for label, effect in {"control": np.zeros(N_GENES), **effects}.items():
            m = 2 * n if label == "control" else n
            blocks.append(3.0 + 0.5 * batch + effect + noise * rng.normal(size=(m, N_GENES)))
            rows += [(label, label == "control", f"b{batch}")] * m
    obs = pd.DataFrame(rows, columns=["perturbation", "is_control", "batch"]).assign(
        cell_type="t", role="train", half=""
    )
    index = np.full((len(obs), 1), -1, dtype=np.int32)
    genes = [f"G{i}" for i in range(N_GENES)]
    return TrainingSet.of(
        Pairs(sparse.csr_matrix(np.vstack(blocks)), obs, genes, index, np.arange(len(obs))), embeddings, 0
    )


def vectors() -> Embeddings:
    """Return vectors of all targets and of three genes that training lacks."""
    rng = np.random.default_rng(1)
    genes = [*TARGETS, "G30", "G31", "G32"]
    return Embeddings(
        pd.DataFrame(rng.normal(size=(len(genes), 3)), index=genes, columns=["known:0", "known:1", "known:2"])
    )


def doubles(singles: dict[str, np.ndarray], factor: float = 1.0) -> dict[str, np.ndarray]:
    """Return neighbouring targets combined: a factor times the sum."""
    return {
        f"{a}+{b}": factor * (singles[a] + singles[b])
        for a, b in zip(sorted(TARGETS), sorted(TARGETS)[1:], strict=False)
    }


def error(model: ClosedForm, label: str, truth: np.ndarray, off: tuple[str, ...] = ()) -> float:
    """Return the relative error of a predicted effect, some genes left out."""
    kept = ~np.isin([f"G{i}" for i in range(N_GENES)], off)
    return float(np.linalg.norm((model.effect(label) - truth)[kept]) / np.linalg.norm(truth[kept]))
