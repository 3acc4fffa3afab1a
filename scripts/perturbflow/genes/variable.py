"""Highly variable genes from sums over cells: what scanpy's `highly_variable_genes` chooses with its flavour `seurat`.

A gene's dispersion is its variance divided by its mean, over normalized counts. Genes are binned by mean, and the
logarithm of the dispersion is standardized within each of the 20 bins (Satija et al. 2015). No cell needs to be in
memory for that.
"""

import numpy as np
import pandas as pd

N_BINS = 20


def highly_variable(sums: np.ndarray, squares: np.ndarray, n_cells: int, n_genes: int) -> np.ndarray:
    """Return True for the genes with the highest standardized dispersion, (genes,); all that share the last place.

    Parameters
    ----------
    sums, squares
        Of normalized counts and of their squares over cells, (genes,) each.
    n_cells
        Cells that were summed.
    n_genes
        Genes that are wanted. Genes of bins whose dispersions are equal, and genes without a count, are never chosen.
    """
    mean = sums / n_cells
    variance = (squares / n_cells - mean**2) * (n_cells / max(n_cells - 1, 1))
    mean[mean == 0] = 1e-12
    dispersion = variance / mean
    dispersion[dispersion <= 0] = np.nan
    genes = pd.DataFrame({"level": np.log1p(mean), "dispersion": np.log(dispersion)})
    genes["bin"] = pd.cut(genes["level"], bins=N_BINS)
    bins = genes.groupby("bin", observed=True)["dispersion"].agg(centre="mean", spread="std")
    is_alone = bins["spread"].isna()  # a bin of one gene: its standardized dispersion is 1
    bins.loc[is_alone, "spread"] = bins.loc[is_alone, "centre"]
    bins.loc[is_alone, "centre"] = 0.0
    of_gene = bins.loc[genes["bin"]]
    standardized = (genes["dispersion"].to_numpy() - of_gene["centre"].to_numpy()) / of_gene["spread"].to_numpy()
    known = np.sort(standardized[~np.isnan(standardized)])[::-1]
    least = known[min(n_genes, len(known)) - 1] if len(known) else np.inf
    return np.nan_to_num(standardized, nan=-np.inf) >= least
