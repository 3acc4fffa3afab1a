"""What a model made elsewhere may see of a split, as files: all training cells, and of the test only its controls.

Beside the files of the contract lie the same training cells in the layouts of GEARS and cell-load.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
from scipy import sparse

from perturbflow.errors import InputError
from perturbflow.genes.symbols import CONTROL, SEPARATOR, members_of
from perturbflow.io.anndata_file import begin_anndata, write_tables
from perturbflow.io.files import atomic, file_digest, read_json, write_json
from perturbflow.io.hdf5 import AppendedRows, CsrRows
from perturbflow.io.streaming import row_blocks
from perturbflow.pairs import Pairs
from perturbflow.splits.divisions import KNOWN

OBS = ["perturbation", "role", "batch", "cell_type", "is_control", "total_counts"]
GENES = ["gene_name", "gene_id", "highly_variable", "is_perturbed_gene"]
GEARS_CONTROL = "ctrl"
CELL_LOAD_CONTROL = "non-targeting"

README = """# {place}: what a model made elsewhere may see

Split {split_sha256}

| file | content |
| --- | --- |
| `train.h5ad` | {n_train:,} training and validation cells (`obs.role`), controls among them. `X`: log1p of counts \
normalized to {target_sum!r}; `layers["counts"]`: raw counts; `obs`: perturbation, batch, cell_type, total_counts |
| `controls.h5ad` | {n_controls:,} control cells of the role {scored}, to start from; the same columns |
| `targets.tsv` | {n_targets:,} perturbations to predict: how many cells were measured, the members, and how many of \
these training holds alone |
| `genes.tsv` | {n_genes:,} genes, in the order of the files |
| `split.json` | perturbations by role |
| `gears/train.h5ad` | the training cells for GEARS: `obs.condition` is `A+ctrl`, `A+B` or `ctrl`; `var.gene_name`; \
`gears/split.json` lists conditions by role |
| `cell_load/*.h5ad` | one file per cell type for cell-load (STATE): `obs.gene`, `{cell_load_control}` for controls, \
`gem_group`, `cell_type`; these controls are among them |
| `embeddings.tsv` | vectors of the perturbed genes that models of the workflow learn from, where they were made |

No perturbed cell of the role {scored} is in any of them.

## What to hand back

One h5ad of predicted cells, or one mean per perturbation (h5ad, tsv, csv, parquet), for all of `targets.tsv`:

* `obs.perturbation`: the labels of `targets.tsv`; members in any order, and `A+ctrl` is `A`.
* `X`: 0 or more. log1p of the counts of each cell times {target_sum!r} divided by its total over all genes. Or counts,
  with `obs.total_counts`, or linear values: then say so (`--scale`). Means are means of log1p values, or these minus
  the mean of the controls (`--values effect`).
* Genes in any order. A gene that is missing gets the mean of the controls.
* As many cells per perturbation as you like; `obs.batch` and `obs.cell_type` where you predict them.
* In `uns["perturbflow"]["split_sha256"]` the number above, so that no file is scored on another split.

```bash
perturbflow score theirs.h5ad --against results/{slashed}
```

A perturbation that is missing is scored as no change, and named.
"""


@dataclass(frozen=True)
class _Source:
    """The cells of a split, read some thousands at once."""

    cells: Pairs
    counts: CsrRows
    var: pd.DataFrame

    @classmethod
    def open(cls, path: Path) -> "_Source":
        """Open pairs.h5ad."""
        try:
            cells = Pairs.open(path)
            file = h5py.File(path)
            return cls(cells, CsrRows(file["layers/counts"], path), ad.io.read_elem(file["var"]))
        except (OSError, KeyError) as error:
            raise InputError(f"{path} is no pairs.h5ad of this workflow: {error}.") from error

    def write(self, path: Path, rows: np.ndarray, obs: pd.DataFrame, var: pd.DataFrame, uns: dict) -> Path:
        """Write some cells with their counts: `rows` of pairs.h5ad, sorted, and their obs."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic(path) as partial, h5py.File(partial, "w") as file, ThreadPoolExecutor(1) as pool:
            begin_anndata(file)
            for place, X in (("X", self.cells.X), ("layers/counts", self.counts)):
                written = AppendedRows(file.create_group(place), len(var), len(rows), pool)
                for block in row_blocks(len(rows)):
                    written.append(sparse.csr_matrix(X[rows[block]]))
                written.finish()
            write_tables(file, obs, var, uns)
        return path


def export(
    pairs: Path, split: Path, target: Path, place: str, scored: str = "test", embeddings: Path | None = None
) -> list[Path]:
    """Write what a model made elsewhere may see of a split; return the files.

    Parameters
    ----------
    pairs, split
        pairs.h5ad and split.json of one split.
    target
        Folder to be written, see its README.md.
    place
        Dataset × split, in words.
    scored
        Role to be predicted: test, or validation, whose perturbed cells are left out then, as are those of the test.
    embeddings
        Vectors of the perturbed genes, which models of the workflow learn from.

    Raises
    ------
    InputError
        If the files do not belong together, or the folder holds other files.
    """
    source, roles = _Source.open(pairs), read_json(split)
    sha256 = file_digest(split)
    stated = source.cells.about.get("split_sha256")
    if stated != sha256:
        raise InputError(f"{pairs} was made from another split than {split}. Make it again (`snakemake pairs`).")
    if target.exists() and any(target.iterdir()) and not (target / "README.md").is_file():
        raise InputError(f"{target} holds other files. Name a new folder.")
    role, is_control = source.cells.obs["role"].astype(str).to_numpy(), source.cells.is_control
    train, controls = (
        np.flatnonzero(np.isin(role, KNOWN[scored])),
        np.flatnonzero(is_control & (role == scored)),
    )
    about = {"split_sha256": sha256, "target_sum": float(source.cells.about["target_sum"]), "place": place}
    uns, obs, var = {"perturbflow": about}, source.cells.obs[OBS], source.var[GENES]
    targets = _targets(source.cells, roles, scored)
    files = [
        source.write(target / "train.h5ad", train, obs.iloc[train], var, uns),
        source.write(target / "controls.h5ad", controls, obs.iloc[controls], var, uns),
        _write_table(target / "targets.tsv", targets),
        _write_table(target / "genes.tsv", var),
        _write_roles(target / "split.json", roles["perturbations"]),
        *_gears(source, target / "gears", train, uns, roles),
        *_cell_load(source, target / "cell_load", np.union1d(train, controls), uns),
        *([_write_table(target / "embeddings.tsv", _vectors(embeddings))] if embeddings else []),
    ]
    readme = README.format(
        **about,
        scored=scored,
        slashed=place.replace(" × ", "/"),
        n_train=len(train),
        n_controls=len(controls),
        n_targets=len(targets),
        n_genes=len(var),
        cell_load_control=CELL_LOAD_CONTROL,
    )
    with atomic(target / "README.md") as partial:
        partial.write_text(readme, encoding="utf-8")
    return [*files, target / "README.md"]


def _vectors(embeddings: Path) -> pd.DataFrame:
    """Return the vectors of genes, with the genes in the first column."""
    table = pd.read_parquet(embeddings)
    return table.rename_axis("gene").reset_index()


def _targets(cells: Pairs, roles: dict, scored: str) -> pd.DataFrame:
    """Return the perturbations to predict: how many cells were measured, and their members."""
    held_out = cells.obs[(cells.obs["role"] == scored).to_numpy() & ~cells.is_control]
    n_cells = held_out["perturbation"].astype(str).value_counts().sort_index()
    return pd.DataFrame(
        {
            "perturbation": n_cells.index,
            "n_cells": n_cells.to_numpy(),
            "members": [",".join(members_of(label)) for label in n_cells.index],
            "members_seen": [roles["members_seen"][label] for label in n_cells.index],
        }
    )


def _write_table(path: Path, table: pd.DataFrame) -> Path:
    with atomic(path) as partial:
        table.to_csv(partial, sep="\t", index=False)
    return path


def _write_roles(path: Path, perturbations: dict[str, list[str]]) -> Path:
    write_json(path, perturbations)
    return path


def gears_condition(label: str) -> str:
    """Return a label as GEARS writes it: ctrl, A+ctrl or A+B."""
    if label == CONTROL:
        return GEARS_CONTROL
    return label if SEPARATOR in label else f"{label}{SEPARATOR}{GEARS_CONTROL}"


def _gears(source: _Source, folder: Path, rows: np.ndarray, uns: dict, roles: dict) -> Iterator[Path]:
    """Write training cells for `PertData.new_data_process`, and conditions by role for its split `custom`."""
    obs = source.cells.obs.iloc[rows][["perturbation", "role", "batch", "cell_type"]].copy()
    obs["condition"] = pd.Categorical(obs.pop("perturbation").astype(str).map(gears_condition))
    yield source.write(folder / "train.h5ad", rows, obs, source.var[["gene_name"]], uns)
    names = {"train": "train", "validation": "val", "test": "test"}
    conditions = {name: list(map(gears_condition, roles["perturbations"][role])) for role, name in names.items()}
    yield _write_roles(folder / "split.json", conditions)


def _cell_load(source: _Source, folder: Path, rows: np.ndarray, uns: dict) -> Iterator[Path]:
    """Write one file per cell type, with the test controls, as cell-load reads them."""
    obs = source.cells.obs.iloc[rows]
    for name, places in obs.groupby("cell_type", observed=True).indices.items():
        of_type = obs.iloc[np.sort(places)]
        gene = of_type["perturbation"].astype(str).where(~of_type["is_control"], CELL_LOAD_CONTROL)
        table = of_type[["role", "cell_type"]].assign(gene=pd.Categorical(gene), gem_group=of_type["batch"])
        safe = "".join(letter if letter.isalnum() or letter in "._-" else "_" for letter in str(name))
        yield source.write(folder / f"{safe}.h5ad", rows[np.sort(places)], table, source.var[["gene_name"]], uns)
