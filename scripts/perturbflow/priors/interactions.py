"""Genes by the partners of their proteins: interactions or associations → vectors.

It reads the files of STRING (protein.physical.links.detailed, protein.links.detailed or protein.links, with
protein.info) and a plain list of edges.
"""

import logging
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import sparse
from scipy.sparse.linalg import eigsh

from perturbflow.errors import InputError
from perturbflow.priors.reading import (
    N_DIMENSIONS,
    approved,
    blocks_of,
    first_line,
    leading_factors,
    read_table,
    signed,
)

logger = logging.getLogger(__name__)

RESTART = 0.3
N_STEPS = 20
CONTEXT_POWER = 0.75
# Text mining reads papers about perturbations and co-expression their data: both may hold the outcome.
CHANNELS = ("experimental", "database")
LEAST_SCORE = 0.4  # STRING's medium confidence
STRING_PRIOR = 0.041  # of two random proteins
ROUNDING = 1e-9  # of scores that are whole thousandths

# All channels, as STRING combines them itself.
EVERY_CHANNEL = ("combined_score",)
LOW_CONFIDENCE = 0.15  # the least that STRING's files hold
N_COMPONENTS = 128
KNOWS = "the literature (text mining, co-expression), so they may know the screen"


def interaction_vectors(
    files: dict[str, Path], organism: str = "human", n_dimensions: int = N_DIMENSIONS
) -> pd.DataFrame:
    """Return one vector per gene that has an interaction.

    These are leading factors of the positive pointwise mutual information between neighbours, where every gene is its
    own neighbour too. It is one step of a random walk, with contexts smoothed by the power 0.75 (Levy & Goldberg 2014).
    A random walk with restart then spreads them over the network.

    Parameters
    ----------
    files
        "links" and "info" of STRING, or as "file" a list of edges.

    Returns
    -------
    Genes × n_dimensions.

    Raises
    ------
    InputError
        If a file is missing, does not fit its role, or has interactions of n_dimensions genes at most.
    """
    genes, network = network_of(read_edges(files, organism), files, n_dimensions)
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


def association_vectors(
    files: dict[str, Path], organism: str = "human", n_dimensions: int = N_COMPONENTS
) -> pd.DataFrame:
    """Return one vector per gene that has an association of any kind: its spectral coordinates.

    See `spectral_coordinates`; τ is the mean degree.

    Parameters
    ----------
    files
        "links" and "info" of STRING, whose combined score of all channels is read from 0.15 on; or as "file" a list of
        edges.

    Returns
    -------
    Genes × n_dimensions; `attrs["knows"]` states the part of a screen's outcome that they may know.

    Raises
    ------
    InputError
        If a file is missing, does not fit its role, or has associations of n_dimensions + 1 genes at most.
    """
    genes, network = network_of(read_edges(files, organism, EVERY_CHANNEL, LOW_CONFIDENCE), files, n_dimensions + 1)
    degree = np.asarray(network.sum(axis=1)).ravel()
    found = pd.DataFrame(spectral_coordinates(network, n_dimensions, degree.mean()), index=genes)
    found.attrs["knows"] = KNOWS
    return found


def spectral_coordinates(network: sparse.csr_array, n: int, tau: float) -> np.ndarray:
    """Return the coordinates of every node on the leading spectral components of a network, from the second on.

    With A the weights and d their row sums, these are the eigenvectors of (D + τ)^-½ A (D + τ)^-½ with the greatest
    eigenvalues. The first is left out: it shows how much is known of a gene. The others are divided by √(d + τ) and
    multiplied by their eigenvalues. These are the coordinates of a diffusion map after one step (Coifman & Lafon 2006).
    Without τ a component lies on a handful of weakly linked nodes (Qin & Rohe 2013).

    Parameters
    ----------
    network
        Nodes × nodes, symmetric, no row empty.
    n
        Number of components.
    tau
        Added to every degree, in units of the weights.

    Returns
    -------
    (nodes, n). The mean square of a column, weighted by d + τ, is its eigenvalue squared; the first of its largest
    entries is positive.
    """
    mass = np.asarray(network.sum(axis=1)).ravel() + tau
    scale = sparse.diags_array(1.0 / np.sqrt(mass))
    # The start is the same in every run, and no eigenvector of any network: equal input gives equal numbers.
    start = np.random.default_rng(0).standard_normal(len(mass))
    values, vectors = eigsh(sparse.csr_array(scale @ network @ scale), k=n + 1, which="LA", v0=start)
    leading = np.argsort(values)[::-1][1:]
    return signed(vectors[:, leading] * np.sqrt(mass.sum() / mass)[:, None]) * values[leading]


def network_of(edges: pd.DataFrame, files: dict[str, Path], least: int) -> tuple[pd.Index, sparse.csr_array]:
    """Return the genes with an edge, more than `least`, and the weights between them: genes × genes, symmetric."""
    rows, columns, names = edges["a"].cat.codes, edges["b"].cat.codes, edges["a"].cat.categories
    one_way = sparse.csr_array((edges["weight"], (rows, columns)), shape=(len(names), len(names)))
    network = one_way + one_way.T
    has_edge = np.diff(network.indptr) > 0
    if has_edge.sum() <= least:
        raise InputError(
            f"{', '.join(map(str, files.values()))}: interactions of only {has_edge.sum()} genes; is this the whole of "
            "the network?"
        )
    logger.info("%d genes, %d pairs with a score", has_edge.sum(), len(edges))
    return names[has_edge], network if has_edge.all() else network[has_edge][:, has_edge]


def _steps(network: sparse.csr_array) -> sparse.csr_array:
    """Return the probabilities of a walker's next step, rows summing to 1."""
    return sparse.csr_array(sparse.diags_array(1.0 / np.asarray(network.sum(axis=1)).ravel()) @ network)


def read_edges(
    files: dict[str, Path],
    organism: str = "human",
    channels: tuple[str, ...] = CHANNELS,
    least_score: float = LEAST_SCORE,
) -> pd.DataFrame:
    """Return the rows a, b (approved symbols, a before b) and weight, each pair once with its greatest weight.

    Parameters
    ----------
    channels, least_score
        Of STRING's files, the columns whose scores are combined, and the least combined score of a pair that is kept (0
        to 1).

    Returns
    -------
    a and b are categories of the same symbols, sorted.
    """
    if "links" in files and "info" in files:
        names, ends, weight = _from_string(files["links"], files["info"], channels, least_score)
    elif "file" in files:
        names, ends, weight = _from_list(files["file"])
    else:
        raise InputError(
            "Interactions: files of the roles 'links' and 'info' are needed, or one list of edges; found "
            f"{', '.join(files)}."
        )
    symbols = approved(names, organism)
    genes = pd.Index(sorted(set(symbols)))
    low, high = np.sort(genes.get_indexer(symbols)[ends], axis=0)
    other = low != high
    pair = low[other].astype(np.int64) * len(genes) + high[other]
    order = np.argsort(pair, kind="stable")
    pair, weight = pair[order], weight[other][order]
    first = np.flatnonzero(np.diff(pair, prepend=-1))
    a, b = (pd.Categorical.from_codes(codes, genes) for codes in np.divmod(pair[first], len(genes)))
    return pd.DataFrame({"a": a, "b": b, "weight": np.maximum.reduceat(weight, first) if len(first) else weight})


Edges = tuple[pd.Series, np.ndarray, np.ndarray]
"""Names of the nodes, the two ends of every edge as places among these (2, edges), and weights (edges,)."""


def _from_string(links: Path, info: Path, channels: tuple[str, ...], least_score: float) -> Edges:
    """Read STRING, scored anew from some channels: 1 − Π(1 − sᵢ), the prior removed from each and added once.

    This is how STRING combines them (string-db.org/help/faq, von Mering et al. 2005), without its correction for
    homology. A single column keeps its own scores.
    """
    names = read_table(info, usecols=[0, 1], names=["protein", "symbol"], header=0).drop_duplicates("protein")
    missing = {"protein1", "protein2", *channels} - set(first_line(links).split())
    if missing:
        raise InputError(
            f"{links} lacks the columns {', '.join(sorted(missing))}: a file *.links.detailed of STRING is expected."
        )
    ends = ["protein1", "protein2"]
    types = {**dict.fromkeys(ends, pd.CategoricalDtype(names["protein"])), **dict.fromkeys(channels, float)}
    kept = []
    for block in blocks_of(links, sep=" ", usecols=[*ends, *channels], dtype=types):
        scores = np.maximum(block[list(channels)].to_numpy() / 1000 - STRING_PRIOR, 0.0) / (1.0 - STRING_PRIOR)
        combined = 1.0 - np.prod(1.0 - scores, axis=1) * (1.0 - STRING_PRIOR)
        codes = np.stack([block[end].cat.codes for end in ends])
        is_kept = (combined >= least_score - ROUNDING) & (codes >= 0).all(axis=0)
        kept.append((codes[:, is_kept], combined[is_kept]))
    codes, weight = np.concatenate([codes for codes, _ in kept], axis=1), np.concatenate([weight for _, weight in kept])
    if not len(weight):
        raise InputError(
            f"{links} has no interaction of score {least_score} between proteins that {info} names; are both of one "
            "organism?"
        )
    return names["symbol"].reset_index(drop=True), codes, weight


def _from_list(path: Path) -> Edges:
    """Read a table with a header: two columns of symbols, and a weight above zero if it has a third."""
    table = read_table(path)
    if table.shape[1] not in (2, 3):
        raise InputError(
            f"{path}: a list of edges has two columns of symbols and perhaps a weight, this has {table.shape[1]} "
            "columns."
        )
    weight = (
        pd.to_numeric(table.iloc[:, 2], errors="coerce") if table.shape[1] == 3 else pd.Series(1.0, index=table.index)
    )
    if not (weight > 0).all():
        row = int(np.argmin((weight > 0).to_numpy()))
        raise InputError(f"{path}, line {row + 2}: the weight '{table.iloc[row, 2]}' must be a number above zero.")
    codes, names = pd.factorize(np.concatenate([table.iloc[:, 0], table.iloc[:, 1]]))
    return pd.Series(names, dtype=object), codes.reshape(2, -1), weight.to_numpy(float)
