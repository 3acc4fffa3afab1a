"""Vectors of genes from public knowledge: one table per prior, the same for every dataset and split.

`annotations` knows the GO terms of genes. `interactions` knows which proteins bind, or are related in any way. The
vectors of a prior cover all its genes, perturbed or not, so they are no different whatever is held out.
"""

import logging
from pathlib import Path

import pandas as pd

from perturbflow.io.files import atomic, manifest_files
from perturbflow.priors.annotations import annotation_vectors as go
from perturbflow.priors.interactions import association_vectors as associations
from perturbflow.priors.interactions import interaction_vectors as ppi

logger = logging.getLogger(__name__)

__all__ = ["associations", "go", "ppi", "prior"]


def vectors_of(kind: str, files: dict[str, Path], organism: str) -> pd.DataFrame:
    """Return the vectors of a kind of prior, by its name.

    It refers to no other kind, so that a new one makes no prior stale.
    """
    return globals()[kind](files, organism)


def prior(raw: list[Path], embedding: Path, kind: str, roles: list, organism: str = "human") -> None:
    """Write the vectors of all genes that a prior covers.

    Parameters
    ----------
    raw
        The manifest of a download, or files of the user's own.
    embedding
        Parquet to be written: gene symbol as index, one float32 column per dimension. Its attribute `knows` states
        where the vectors may know the outcome of a screen.
    kind
        go, ppi or associations.
    roles
        Role of each of the user's own files: file, or annotations and ontology (go), links and info (ppi,
        associations). Empty with a manifest, which has the roles itself.

    Raises
    ------
    InputError
        If a file is missing or does not fit its role.
    """
    files = dict(zip(roles, raw, strict=True)) if roles else manifest_files(raw[0], whole=True)
    vectors = vectors_of(kind, files, organism)
    logger.info("%d genes × %d dimensions", *vectors.shape)
    if "knows" in vectors.attrs:
        logger.warning("These vectors know %s", vectors.attrs["knows"])
    vectors.index.name = "gene"
    vectors.columns = vectors.columns.astype(str)
    with atomic(embedding) as partial:
        vectors.astype("float32").to_parquet(partial)
