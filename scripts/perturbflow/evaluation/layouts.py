"""Predictions of a run in the layouts of the field's evaluators: cell-eval's, and that of cell-eval2's preset vcc2026.

Both want predicted and measured cells with the same controls among them, labels in obs.target, and non-targeting for
controls. cell-eval takes log1p values; vcc2026 takes counts, as it tests and sums these.
"""

import logging
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
from scipy import sparse

from perturbflow.errors import InputError
from perturbflow.genes.symbols import CONTROL
from perturbflow.io.files import atomic
from perturbflow.pairs import Pairs

logger = logging.getLogger(__name__)

PERTURBATION, CONTROLS = "target", "non-targeting"
FOLDERS = {"cell_eval": "log1p", "vcc2026": "counts"}
ROUNDING = 1e-4  # relative, of log1p values in single precision that are taken back to counts
README = """# {place}: for the field's evaluators

`predicted.h5ad` and `measured.h5ad` hold the same {n_controls:,} measured controls (`{control}`), and cells of \
{n_perturbations:,} held-out perturbations in `obs.{column}`. Measured cells are those that the workflow scores: \
half `b`. `cell_eval` has log1p of counts normalized to {target_sum!r}, `vcc2026` has counts. Fractions of a count are \
rounded up or down by chance: so means stay as they are.

```bash
pip install cell-eval==0.8.2 && cell-eval run -ap cell_eval/predicted.h5ad -ar cell_eval/measured.h5ad \\
    --pert-col {column} --control-pert {control} -o cell_eval/scores
pip install cell-eval2==0.20.0 pdex==0.3.0 && cell-eval2 run --preset vcc2026 -ap vcc2026/predicted.h5ad \\
    -ar vcc2026/measured.h5ad --pert-col {column} --control {control} -o vcc2026/scores{flag}
```

{note} Cells of closed forms and learned models here have exactly the mean that was \
predicted: cell-eval2 may note that their scatter cancels.
"""
# vcc2026 leaves out the gene that a label names, and refuses labels that name none.
OF_COMBINATIONS = " --no-target-genes"
OF_STARTS = "Counts of a predicted cell have the total of the control that it started from."
OF_MEDIAN = "These predictions name no start cells: their counts have the median total of the controls."


def layouts(pairs: Path, predictions: Path, target: Path, place: str) -> list[Path]:
    """Write predictions and measured cells in both layouts; return the files.

    Parameters
    ----------
    pairs, predictions
        pairs.h5ad of a split and predictions.h5ad of a run of it.
    target
        Folder to be written, see its README.md.
    place
        The run, in words.

    Raises
    ------
    InputError
        If the files do not belong together, or the folder holds other files.
    """
    if target.exists() and any(target.iterdir()) and not (target / "README.md").is_file():
        raise InputError(f"{target} holds other files. Name a new folder.")
    cells, predicted = Pairs.open(pairs), ad.read_h5ad(predictions)
    if list(predicted.var_names) != cells.genes:
        raise InputError(f"{predictions} has other genes than {pairs}: it belongs to another split.")
    role = str(predicted.uns["perturbflow"]["role"])
    obs = cells.obs
    is_control = (obs["role"] == role).to_numpy() & cells.is_control
    is_scored = (obs["role"] == role).to_numpy() & ~cells.is_control & (obs["half"].astype(str) != "a").to_numpy()
    totals, note = _totals(predicted, obs, is_control)
    target_sum = float(cells.about["target_sum"])
    controls = np.flatnonzero(is_control)
    rows = {"measured": np.flatnonzero(is_scored | is_control), "predicted": controls}
    files = []
    for folder, scale in FOLDERS.items():
        for name, chosen in rows.items():
            of_pairs = obs.iloc[chosen]
            X, table = sparse.csr_matrix(cells.X[chosen]), _table(of_pairs, of_pairs["perturbation"])
            measured_totals = of_pairs["total_counts"].to_numpy(float)
            if name == "predicted":
                X = sparse.vstack([sparse.csr_matrix(predicted.X), X], format="csr")
                table = pd.concat([_table(predicted.obs, predicted.obs["perturbation"]), table])
                measured_totals = np.concatenate([totals, measured_totals])
            X = X if scale == "log1p" else whole_counts(X, measured_totals, target_sum)
            files.append(_write(target / folder / f"{name}.h5ad", X, table, cells.genes))
    labels = predicted.obs["perturbation"].astype(str)
    is_named = labels.isin(cells.genes).any()
    text = README.format(
        place=place, n_controls=len(controls), control=CONTROLS, column=PERTURBATION, target_sum=target_sum, note=note,
        n_perturbations=labels.nunique(), flag="" if is_named else OF_COMBINATIONS,
    )  # fmt: skip
    with atomic(target / "README.md") as partial:
        partial.write_text(text, encoding="utf-8")
    return [*files, target / "README.md"]


def _totals(predicted: ad.AnnData, obs: pd.DataFrame, is_control: np.ndarray) -> tuple[np.ndarray, str]:
    """Return all counts of every predicted cell, (cells,), and where they are from."""
    known = obs["total_counts"].to_numpy(float)
    if "control_index" in predicted.obs and predicted.uns["perturbflow"]["starts_from_controls"]:
        return known[predicted.obs["control_index"].to_numpy()], OF_STARTS
    return np.full(predicted.n_obs, np.median(known[is_control])), OF_MEDIAN


def whole_counts(X: sparse.csr_matrix, totals: np.ndarray, target_sum: float) -> sparse.csr_matrix:
    """Return whole counts of log1p normalized ones, (cells, genes).

    A fraction is the probability of being rounded up: many small values would all become 0, and their mean with them.
    """
    linear = X.astype(np.float64).expm1()
    counts = sparse.csr_matrix(sparse.diags(totals / target_sum) @ linear)
    whole = np.rint(counts.data)
    is_whole = np.abs(counts.data - whole) <= ROUNDING * (1 + whole)
    by_chance = np.floor(counts.data + np.random.default_rng(0).random(len(whole)))
    counts.data = np.where(is_whole, whole, by_chance)
    counts.eliminate_zeros()
    return sparse.csr_matrix(counts, dtype=np.float32)


def _table(obs: pd.DataFrame, labels: pd.Series) -> pd.DataFrame:
    """Return obs as the evaluators read it."""
    names = labels.astype(str).replace(CONTROL, CONTROLS)
    return pd.DataFrame({PERTURBATION: names, **{name: obs[name].astype(str) for name in ("batch", "cell_type")}})


def _write(path: Path, X: sparse.csr_matrix, obs: pd.DataFrame, genes: list[str]) -> Path:
    obs = obs.astype("category").set_axis([f"cell_{i}" for i in range(len(obs))])
    with atomic(path) as partial:
        ad.AnnData(X.astype(np.float32), obs, pd.DataFrame(index=genes)).write_h5ad(partial, compression="gzip")
    return path
