r"""Write pairs.h5ad, split.json and predictions.h5ad of a made screen, of any size, in blocks of cells.

    python workflow_tests/benchmarks/made_predictions.py made --genes 2000 --perturbations 300 --controls 30000 \
        --scored 500 --predicted 1000
    python scripts/evaluate.py --predictions made/predictions.h5ad --pairs made/pairs.h5ad --split made/split.json \
        --metrics made/metrics.tsv

The second command scores the predictions of the first.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
from scipy import sparse

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

from perturbflow.io.files import write_json

TRAIN_PERTURBATIONS = 20
DEPTH_PER_GENE = 0.4  # counts; a fifth or so of the entries is then not zero


@dataclass(frozen=True)
class Size:
    """What the made screen holds."""

    genes: int
    perturbations: int  # tested; a few more are trained on
    controls: int  # of the test role; half as many of the training role
    scored: int  # measured cells per perturbation in half 'b', and as many in half 'a'
    predicted: int  # cells per perturbation


@contextmanager
def streamed(path: Path, layers: tuple[str, ...], **tables: object) -> Iterator[Callable]:
    """Yield a function that appends cells to X and layers of an .h5ad, so that no matrix needs to fit into memory.

    Tables are written last: a column can be filled in meanwhile.
    """
    n_cells, n_genes = len(tables["obs"]), len(tables["var"])
    with h5py.File(path, "w") as file:
        file.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
        ad.io.write_elem(file, "layers", {})
        groups = [file.create_group(name) for name in ("X", *(f"layers/{layer}" for layer in layers))]
        for group in groups:
            group.attrs.update(
                {"encoding-type": "csr_matrix", "encoding-version": "0.1.0", "shape": (n_cells, n_genes)}
            )
            for name, dtype in (("data", "f4"), ("indices", "i4"), ("indptr", "i8")):
                group.create_dataset(name, (int(name == "indptr"),), dtype, maxshape=(None,), chunks=(2**17,))

        def append(*matrices: sparse.csr_matrix) -> None:
            for group, matrix in zip(groups, matrices, strict=True):
                end = group["indptr"][-1]
                for name, values in (
                    ("data", matrix.data),
                    ("indices", matrix.indices),
                    ("indptr", matrix.indptr[1:] + end),
                ):
                    group[name].resize(len(group[name]) + len(values), axis=0)
                    group[name][-len(values) :] = values

        yield append
        for name, table in tables.items():
            ad.io.write_elem(file, name, table)


def generate(folder: Path, size: Size, seed: int, starts_from_controls: bool) -> None:
    """Write pairs.h5ad, split.json and predictions.h5ad of a screen of one batch and a model that is partly right.

    Counts are Poisson around a gene's level × the cell's depth × exp(effect); a perturbation moves a twentieth of the
    genes and silences its own. The model predicts six tenths of the effect and four tenths of another perturbation's.
    """
    rng = np.random.default_rng(seed)
    n_train = min(TRAIN_PERTURBATIONS, size.perturbations)
    labels = [f"GENE{i}" for i in range(size.perturbations + n_train)]
    genes = [f"GENE{i}" for i in range(size.genes)]
    target_sum = DEPTH_PER_GENE * size.genes
    level = rng.lognormal(0.0, 1.5, size.genes)
    level *= target_sum / level.sum()
    effects = np.where(
        rng.random((len(labels), size.genes)) < 0.05, rng.normal(0.0, 1.0, (len(labels), size.genes)), 0.0
    )
    effects[np.arange(len(labels)), np.arange(len(labels))] = -2.0
    tested, trained = labels[: size.perturbations], labels[size.perturbations :]
    predicted_effects = 0.6 * effects[: len(tested)] + 0.4 * np.roll(effects[: len(tested)], 1, axis=0)

    n_controls = {"train": size.controls // 2, "test": size.controls}
    groups = [("control", role, "", n) for role, n in n_controls.items()]
    groups += [(label, "train", "", min(50, size.scored)) for label in trained]
    groups += [(label, "test", half, size.scored) for label in tested for half in ("a", "b")]
    n_of = [n for *_, n in groups]
    obs = pd.DataFrame([group[:3] for group in groups], columns=["perturbation", "role", "half"]).loc[
        np.repeat(range(len(groups)), n_of)
    ]
    obs.index = [f"cell_{i}" for i in range(len(obs))]
    obs["is_control"] = (obs["perturbation"] == "control").to_numpy()
    obs = obs.assign(
        n_perturbations=(~obs["is_control"]).astype(int),
        perturbation_type="CRISPRi",
        cell_type="made",
        batch="one",
        dataset="made",
    )
    obs["role"] = pd.Categorical(obs["role"], categories=["train", "validation", "test"])
    obs["half"] = pd.Categorical(obs["half"], categories=["", "a", "b"])
    for column in ("perturbation", "perturbation_type", "cell_type", "batch", "dataset"):
        obs[column] = pd.Categorical(obs[column])
    first_control = {"train": 0, "test": n_controls["train"]}
    index = np.full((len(obs), 8), -1, dtype=np.int32)
    for role in n_controls:
        rows = np.flatnonzero(((obs["role"] == role) & ~obs["is_control"]).to_numpy())
        index[rows] = first_control[role] + rng.integers(0, n_controls[role], (len(rows), 8))
    var = pd.DataFrame(
        {"gene_name": genes, "highly_variable": True, "is_perturbed_gene": np.isin(genes, labels)}, index=genes
    )

    def sampled(effect: np.ndarray, n: int) -> tuple[sparse.csr_matrix, sparse.csr_matrix]:
        rate = level * np.exp(effect)
        totals = rng.poisson(rng.lognormal(0.0, 0.3, n) * rate.sum())
        sampled = np.searchsorted(
            np.cumsum(rate) / rate.sum(), rng.random(totals.sum())
        )  # a molecule each: Poisson counts, given totals
        cells = np.repeat(np.arange(n), totals)
        counts = sparse.csr_matrix((np.ones(len(sampled), dtype=np.float32), (cells, sampled)), shape=(n, size.genes))
        X = sparse.csr_matrix(sparse.diags((target_sum / totals).astype(np.float32)) @ counts)
        return X.log1p(), counts

    effect_of = dict(zip(labels, effects, strict=True)) | {"control": np.zeros(size.genes)}
    uns = {"perturbflow": {"target_sum": target_sum, "n_hvg": size.genes}}
    with streamed(
        folder / "pairs.h5ad", ("counts",), obs=obs, var=var, obsm={"control_index": index}, uns=uns
    ) as append:
        totals = []
        for label, _, _, n in groups:
            X, counts = sampled(effect_of[label], n)
            append(X, counts)
            totals.append(np.asarray(counts.sum(axis=1)).ravel())
        obs["total_counts"] = np.concatenate(totals)
    n_predicted = len(tested) * size.predicted
    predicted_obs = pd.DataFrame(index=[f"predicted_{i}" for i in range(n_predicted)])
    predicted_obs["perturbation"] = pd.Categorical(np.repeat(tested, size.predicted))
    predicted_obs["cell_type"], predicted_obs["batch"] = (
        pd.Categorical(["made"] * n_predicted),
        pd.Categorical(["one"] * n_predicted),
    )
    predicted_obs["control_index"] = first_control["test"] + rng.integers(0, size.controls, n_predicted).astype(
        np.int32
    )
    uns = {"perturbflow": {"starts_from_controls": starts_from_controls, "role": "test"}}
    with streamed(folder / "predictions.h5ad", (), obs=predicted_obs, var=var[[]], uns=uns) as append:
        for effect in predicted_effects:
            append(sampled(effect, size.predicted)[0])
    split = {
        "perturbations": {"train": trained, "validation": [], "test": tested},
        "members_seen": dict.fromkeys(tested, 0),
    }
    write_json(folder / "split.json", {"name": "made", "spec": {"kind": "unseen_perturbation", "seed": seed}, **split})


def main() -> None:
    """Write the three files into a folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    for field in fields(Size):
        parser.add_argument(f"--{field.name}", type=int, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--from-nothing", action="store_true", help="declare that the predicted cells started from no control"
    )
    arguments = parser.parse_args()
    size = Size(**{field.name: getattr(arguments, field.name) for field in fields(Size)})
    arguments.folder.mkdir(parents=True, exist_ok=True)
    generate(arguments.folder, size, arguments.seed, not arguments.from_nothing)


if __name__ == "__main__":
    main()
