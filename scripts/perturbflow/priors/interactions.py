"""Genes by the company their proteins keep: interactions → vectors.

Read are the files of STRING (protein.physical.links.detailed or protein.links.detailed, with protein.info) and a plain list of edges.
"""

from pathlib import Path

import numpy as np
import pandas as pd
from scipy import sparse

from perturbflow.errors import InputError
from perturbflow.priors.tables import N_DIMENSIONS, approved, first_line, leading_factors, read_table

RESTART = 0.3
N_STEPS = 20
CONTEXT_POWER = 0.75
# Text mining reads papers about perturbations and co-expression their data: both may tell the outcome.
CHANNELS = ("experimental", "database")
LEAST_SCORE = 0.4  # STRING's medium confidence
STRING_PRIOR = 0.041  # of two proteins drawn at random


def interaction_vectors(files: dict[str, Path], organism: str = "human", n_dimensions: int = N_DIMENSIONS) -> pd.DataFrame:
    """Return one vector per gene that has an interaction.

    Leading factors of the positive pointwise mutual information between neighbours, every gene its own neighbour too (one step of a
    random walk; contexts smoothed by the power 0.75, Levy & Goldberg 2014), then spread over the network by a random walk with restart.

    Parameters
    ----------
    files
        "links" and "info" of STRING, or as "file" a list of edges.

    Returns
    -------
    Genes × n_dimensions.
    """
    edges = read_edges(files, organism)
    genes = pd.Index(sorted({*edges["a"], *edges["b"]}))
    if len(genes) <= n_dimensions:
        raise InputError(
            f"{', '.join(map(str, files.values()))}: interactions of only {len(genes)} genes; is this the whole of the network?"
        )
    rows, columns = genes.get_indexer(edges["a"]), genes.get_indexer(edges["b"])
    one_way = sparse.csr_matrix((edges["weight"], (rows, columns)), shape=(len(genes), len(genes)))
    network = one_way.maximum(one_way.T)
    with_self = network + sparse.eye_array(len(genes))
    frequency = np.asarray(with_self.sum(axis=0)).ravel() ** CONTEXT_POWER
    information = _steps(with_self).tocoo()
    information.data = np.maximum(np.log(information.data / (frequency / frequency.sum())[information.col]), 0.0)
    vectors, values = leading_factors(information.tocsr(), n_dimensions)
    start = vectors * np.sqrt(values)
    walk, spread = _steps(network), start
    for _ in range(N_STEPS):
        spread = RESTART * start + (1.0 - RESTART) * (walk @ spread)
    return pd.DataFrame(spread, index=genes)


def _steps(network: sparse.csr_matrix) -> sparse.csr_matrix:
    """Return the probabilities of a walker's next step, rows summing to 1."""
    return sparse.csr_matrix(sparse.diags_array(1.0 / np.asarray(network.sum(axis=1)).ravel()) @ network)


def read_edges(files: dict[str, Path], organism: str = "human") -> pd.DataFrame:
    """Return the rows a, b (approved symbols, a before b) and weight, each pair once with its greatest weight."""
    if "links" in files and "info" in files:
        edges = _from_string(files["links"], files["info"])
    elif "file" in files:
        edges = _from_list(files["file"])
    else:
        raise InputError(f"Interactions: files of the roles 'links' and 'info' are needed, or one list of edges; found {', '.join(files)}.")
    ends = np.sort(np.stack([approved(edges["a"], organism), approved(edges["b"], organism)]).astype(str), axis=0)
    edges = pd.DataFrame({"a": ends[0], "b": ends[1], "weight": edges["weight"].to_numpy(float)})
    return edges[edges["a"] != edges["b"]].groupby(["a", "b"], as_index=False)["weight"].max()


def _from_string(links: Path, info: Path) -> pd.DataFrame:
    """Read STRING, scored anew from the channels that are kept: 1 − Π(1 − sᵢ) over channels, the prior taken off each and put back once.

    As STRING combines them (string-db.org/help/faq, von Mering et al. 2005), without its correction for homology.
    """
    names = read_table(info, usecols=[0, 1], names=["protein", "symbol"], header=0).set_index("protein")["symbol"]
    missing = {"protein1", "protein2", *CHANNELS} - set(first_line(links).split())
    if missing:
        raise InputError(f"{links} lacks the columns {', '.join(sorted(missing))}: a file *.links.detailed of STRING is expected.")
    table = read_table(links, sep=" ", usecols=["protein1", "protein2", *CHANNELS], dtype=dict.fromkeys(CHANNELS, float))
    scores = np.maximum(table[list(CHANNELS)].to_numpy() / 1000 - STRING_PRIOR, 0.0) / (1.0 - STRING_PRIOR)
    combined = 1.0 - np.prod(1.0 - scores, axis=1) * (1.0 - STRING_PRIOR)
    kept = table[combined >= LEAST_SCORE].assign(weight=combined[combined >= LEAST_SCORE])
    edges = pd.DataFrame({"a": kept["protein1"].map(names), "b": kept["protein2"].map(names), "weight": kept["weight"]}).dropna()
    if edges.empty:
        raise InputError(f"{links} has no interaction of score {LEAST_SCORE} between proteins that {info} names; are both of one organism?")
    return edges


def _from_list(path: Path) -> pd.DataFrame:
    """Read a table with a header: two columns of symbols, and a weight above zero if it has a third."""
    table = read_table(path)
    if table.shape[1] not in (2, 3):
        raise InputError(f"{path}: a list of edges has two columns of symbols and perhaps a weight, this has {table.shape[1]} columns.")
    weight = pd.to_numeric(table.iloc[:, 2], errors="coerce") if table.shape[1] == 3 else pd.Series(1.0, index=table.index)
    if not (weight > 0).all():
        row = int(np.argmin((weight > 0).to_numpy()))
        raise InputError(f"{path}, line {row + 2}: the weight '{table.iloc[row, 2]}' must be a number above zero.")
    return pd.DataFrame({"a": table.iloc[:, 0], "b": table.iloc[:, 1], "weight": weight})
