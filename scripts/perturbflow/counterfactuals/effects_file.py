"""{query}.effects.h5ad: mean effects of all perturbations that were asked, with their intervals, block by block."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd

from perturbflow.io.anndata_file import begin_anndata, write_tables
from perturbflow.io.files import atomic

ROWS_PER_CHUNK = 64
DESCRIBED = ("verdict", "trust", "promised", "kept", "size", "known", "in_other_contexts")  # columns of the ranking


class EffectsFile:
    """An AnnData of perturbations × genes that is written as the answers come.

    X is the mean effect, log1p-normalized; the layer half_width is half the width of its 90 % interval, NaN where the
    warranty allows none.

    Parameters
    ----------
    file
        Open for writing.
    n, genes
        Perturbations, and the columns.
    """

    def __init__(self, file: h5py.File, n: int, genes: list[str]) -> None:
        self.file, self.genes = file, genes
        self.labels: list[str] = []
        begin_anndata(file)
        shape, chunks = (n, len(genes)), (min(n, ROWS_PER_CHUNK), len(genes))
        of: Any = {"dtype": "f4", "chunks": chunks, "compression": "gzip", "compression_opts": 1}
        self.tables = [file.create_dataset(name, shape, **of) for name in ("X", "layers/half_width")]
        for table in self.tables:
            table.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})

    def add(self, labels: list[str], effects: np.ndarray, half_widths: np.ndarray) -> None:
        """Write the next perturbations, (labels, genes) each."""
        rows = slice(len(self.labels), len(self.labels) + len(labels))
        self.labels += labels
        for table, values in zip(self.tables, (effects, half_widths), strict=True):
            table[rows] = values

    def finish(self, ranking: pd.DataFrame, uns: dict) -> None:
        """Write the tables that describe the rows."""
        about = ranking.set_index("perturbation")
        obs = about.loc[self.labels, [name for name in DESCRIBED if name in about]]
        for name in ("verdict", "trust", "known"):  # few sentences, many rows
            obs[name] = pd.Categorical(obs[name])
        write_tables(self.file, obs, pd.DataFrame(index=self.genes), uns)


@contextmanager
def effects_file(path: Path, n: int, genes: list[str]) -> Iterator[EffectsFile]:
    """Yield the file, which takes its name when it is whole."""
    with atomic(path) as partial, h5py.File(partial, "w") as file:
        yield EffectsFile(file, n, genes)
