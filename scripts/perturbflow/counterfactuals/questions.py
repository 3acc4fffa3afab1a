"""What is asked, in the words of the screen: labels and cells of a question, refused in one message where the screen does not know them."""

import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd

from perturbflow.embeddings import Embeddings
from perturbflow.errors import InputError
from perturbflow.genes.symbols import (
    DOSE_SIGN,
    SEPARATOR,
    at_dose,
    canonical_label,
    entities_of,
    entity_of,
    members_of,
    without_dose,
)
from perturbflow.nearest import did_you_mean
from perturbflow.screens.dose_labels import parsed
from perturbflow.splits.named import FIELD_CONTROLS


def expanded(perturbations: list[str] | str | dict, genes: list[str], measured: list[str]) -> list[str]:
    """Return canonical labels of a question.

    Parameters
    ----------
    perturbations
        Labels; "all_single": every perturbed gene of the screen; or {"all_pairs_of": genes}.
    genes, measured
        Perturbed genes of the screen, and measured ones.

    Raises
    ------
    InputError
        If a member is neither, all of them in one message: whatever a model says of it would be said of any word.
    """
    if perturbations == "all_single":
        texts = list(genes)
    elif isinstance(perturbations, dict):
        texts = [SEPARATOR.join(pair) for pair in itertools.combinations(perturbations["all_pairs_of"], 2)]
    elif isinstance(perturbations, str):
        raise InputError(
            f"perturbations: {perturbations!r} is no list. Write all_single, or a list: [{perturbations}]."
        )
    else:
        texts = list(perturbations)
    names = {name: name for name in [*measured, *map(entity_of, genes)]}
    controls = [name for name in FIELD_CONTROLS if name not in names]

    def label(text: str) -> str:
        return canonical_label(text, controls, SEPARATOR, measured=names)

    labels = list(dict.fromkeys(map(label, texts)))
    # A name that is unknown is told as it was written, not as what it is called today.
    written = {entity_of(label(member)): member.strip() for text in texts for member in text.split(SEPARATOR)}
    if not any(without_dose(gene)[1] for gene in genes) and (
        dosed := [label for label in labels if without_dose(label)[1] is not None]
    ):
        raise InputError(
            f"perturbations: {', '.join(map(repr, dosed))}: this screen has no doses. Leave out {DOSE_SIGN} and what follows."
        )
    asked = dict.fromkeys(name for label in labels for name in entities_of(label))
    if unknown := [name for name in asked if name not in names]:
        raise InputError(
            f"perturbations: neither perturbed in this screen nor among its {len(measured):,} measured genes (pairs.h5ad): "
            f"{', '.join(_asked_back(written.get(name, name), [*names, 'all_single']) for name in unknown)}. Correct the name; for a gene with few counts raise genes.n_hvg."
        )
    return labels


def _asked_back(name: str, names: Iterable[str]) -> str:
    drug, _, amount = name.rpartition(DOSE_SIGN)
    if drug in names and (dose := parsed(amount)):
        return f"'{name}' (did you mean {at_dose(drug, dose[0])}? a dose is a number in the unit of the screen, without that unit)"
    return did_you_mean(name, names)


def check_question(pairs: Path, embeddings: Path, perturbations: list[str] | str | dict) -> None:
    """Raise InputError for perturbations that the screen does not know, before anything is computed."""
    with h5py.File(pairs) as file:
        measured, labels = list(map(str, ad.io.read_elem(file["var"]).index)), ad.io.read_elem(file["obs/perturbation"])
    expanded(perturbations, perturbed_genes(Embeddings.read(embeddings), set(map(str, labels.unique()))), measured)


def perturbed_genes(vectors: Embeddings, labels: Iterable[str]) -> list[str]:
    """Return the genes with a row that are perturbed in the screen, in the order of the rows; the others are of a user's table."""
    members = {member for label in labels for member in members_of(label)}
    return [gene for gene in vectors.table.index if gene in members]


def holding(obs: pd.DataFrame, selection: dict[str, Sequence], place: str) -> np.ndarray:
    """Return which cells hold one of the listed values in every listed column, (cells,).

    Raises
    ------
    InputError
        If a column or a value is not there: the rest would be another question.
    """
    mask = np.ones(len(obs), dtype=bool)
    for column, values in selection.items():
        if column not in obs:
            raise InputError(f"{place}: there is no obs column '{column}'; possible: {', '.join(obs.columns)}.")
        texts = obs[column].astype(str)
        _check_values(column, list(map(str, values)), texts.unique(), place)
        mask &= texts.isin(list(map(str, values))).to_numpy()
    return mask


def _check_values(column: str, values: list[str], known: Iterable[str], place: str) -> None:
    known = list(known)
    if unknown := [value for value in values if value not in known]:
        raise InputError(
            f"{place}: obs column '{column}' does not hold {', '.join(did_you_mean(value, known) for value in unknown)}. "
            f"It holds {', '.join(sorted(known)[:20])}{', ...' if len(known) > 20 else ''}."
        )
