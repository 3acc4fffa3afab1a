"""Labels and cells of a question, in the words of the screen; one message refuses those that it does not know."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd

from perturbflow.embeddings import Embeddings
from perturbflow.errors import InputError
from perturbflow.genes.gene_starts import TABLES, starts
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
from perturbflow.io.files import manifest_files
from perturbflow.nearest import did_you_mean
from perturbflow.priors.annotations import read_annotations
from perturbflow.screens.dose_labels import parsed
from perturbflow.splits.named import FIELD_CONTROLS

logger = logging.getLogger(__name__)

Asked = list[str] | str | dict  # perturbations as a question names them, see `expanded`
MOST_ASKED = 50_000  # perturbations of one question
SECONDS_EACH = 0.02  # of a mean effect with its variance by set_gp, on one core (workflow_tests/benchmarks)


def genes_of(term: str, annotations: Mapping[str, Path], organism: str = "human") -> list[str]:
    """Return the genes of a GO term, such as go:0006986, and of those that are more special where these are known.

    Parameters
    ----------
    annotations
        Role → file, as a prior of kind go has them.

    Raises
    ------
    InputError
        If no gene has the term.
    """
    table = read_annotations(dict(annotations), organism)
    number = f"GO:{term.rpartition(':')[2]}"
    found = sorted(table.loc[table["term"] == number, "gene"].unique())
    if not found:
        raise InputError(
            f"perturbations: genes_of {term}: no gene of {', '.join(map(str, annotations.values()))} has this term. A "
            "term of the gene ontology is written go:0006986."
        )
    return found


def in_words(selection: Mapping[str, Sequence]) -> str:
    """Return a selection of cells by columns of obs in words, such as `batch day_2, day_3`."""
    return "; ".join(f"{column} {', '.join(map(str, values))}" for column, values in selection.items())


def labels_of(path: Path) -> list[str]:
    """Return the labels of a file, one a line; lines that are empty or begin with # are none.

    Raises
    ------
    InputError
        If the file is not there, or holds no label.
    """
    try:
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"perturbations: {path} cannot be read as text: {error}.") from error
    if not (found := [line for line in lines if line and not line.startswith("#")]):
        raise InputError(f"perturbations: {path} holds no label. Write one per line: GENE, or A+B.")
    return found


def _written(perturbations: Asked, genes: list[str], everyone: Collection[str], of_term: Sequence[str]) -> list[str]:
    """Return the labels of a question as they are written, see `expanded`."""
    if perturbations == "all_single":
        return list(genes)
    if perturbations == "all_genes":
        if not everyone:
            raise InputError(
                "perturbations: all_genes needs gene_vectors.parquet of this split: snakemake "
                "results/DATASET/SPLIT/gene_vectors.parquet makes it."
            )
        return [gene for gene in everyone if without_dose(gene)[1] is None]
    if isinstance(perturbations, dict):
        if "genes_of" in perturbations:
            return [gene for gene in of_term if gene in everyone or gene in genes]
        if "file" in perturbations:
            return labels_of(Path(perturbations["file"]))
        n = len(perturbations["all_pairs_of"])
        _check_number(n * (n - 1) // 2)
        return [SEPARATOR.join(pair) for pair in itertools.combinations(perturbations["all_pairs_of"], 2)]
    if isinstance(perturbations, str):
        raise InputError(
            f"perturbations: {perturbations!r} is no list. Write all_single, or a list: [{perturbations}]."
        )
    return list(perturbations)


def _check_number(n: int) -> None:
    if n > MOST_ASKED:
        hours = n * SECONDS_EACH / 3600
        raise InputError(
            f"perturbations: {n:,} are asked, and a question takes at most {MOST_ASKED:,}. Mean effects alone would "
            f"take about {hours:.1f} hours. Ask for fewer genes, or rank single genes first and pair the best."
        )


def expanded(
    perturbations: Asked,
    genes: list[str],
    measured: list[str],
    vectors: Embeddings | None = None,
    of_term: Sequence[str] = (),
) -> list[str]:
    """Return canonical labels of a question.

    Parameters
    ----------
    perturbations
        Labels; "all_single": every perturbed gene of the screen; "all_genes": every gene with a vector;
        {"all_pairs_of": genes}; {"genes_of": a GO term}; or {"file": path} with a label per line.
    genes, measured
        Perturbed genes of the screen, and measured ones.
    vectors
        Of all genes: those without any are refused, as no model can tell them from others. None: only genes that are
        perturbed or measured can be asked about.
    of_term
        Genes of the term of genes_of.

    Raises
    ------
    InputError
        If a member is unknown, all of them in one message. A model would give the same answer to any such word.
    """
    everyone = [] if vectors is None else vectors.table.index.tolist()
    texts = _written(perturbations, genes, everyone, of_term)
    _check_number(len(texts))
    names = {name: name for name in [*measured, *everyone, *map(entity_of, genes)]}
    controls = [name for name in FIELD_CONTROLS if name not in names]

    def label(text: str) -> str:
        return canonical_label(text, controls, SEPARATOR, measured=names)

    labels = list(dict.fromkeys(map(label, texts)))
    if len(labels) < len(texts):
        logger.info("%d perturbations are there twice, and asked once", len(texts) - len(labels))
    _check_doses(labels, genes)
    asked = dict.fromkeys(name for one in labels for name in entities_of(one))
    known = set(names) if vectors is None else {*everyone, *map(entity_of, genes)}
    if unknown := [name for name in asked if name not in known]:
        # The message has an unknown name as it was written, not the symbol of today.
        written = {entity_of(label(member)): member.strip() for text in texts for member in text.split(SEPARATOR)}
        organism, words = organism_of(measured), ["all_single", *(["all_genes"] if everyone else [])]
        suggested = ", ".join(_suggested(written.get(name, name), [*known, *words], organism) for name in unknown)
        raise InputError(_refusal(suggested, len(measured), vectors))
    return labels


def _refusal(suggested: str, n_measured: int, vectors: Embeddings | None) -> str:
    """Return the message on unknown names."""
    if vectors is None:
        return (
            f"perturbations: neither perturbed in this screen nor among its {n_measured:,} measured genes "
            f"(pairs.h5ad): {suggested}. Correct the name; for a gene with few counts raise genes.n_hvg."
        )
    return (
        f"perturbations: no vector in {', '.join(vectors.sources)}: {suggested}. This screen does not perturb them, "
        "and no source of vectors knows them, so a model would answer any such word alike. Correct the name, or add a "
        "source that knows it (embeddings.sources)."
    )


def organism_of(genes: Iterable[str]) -> str:
    """Return the organism whose table of gene starts has most of these genes."""
    found = set(genes)
    return max(TABLES, key=lambda organism: len(starts(organism).keys() & found))


def _check_doses(labels: list[str], genes: list[str]) -> None:
    """Raise InputError for labels with a dose, if the screen has none."""
    dosed = [label for label in labels if without_dose(label)[1] is not None]
    if dosed and not any(without_dose(gene)[1] for gene in genes):
        raise InputError(
            f"perturbations: {', '.join(map(repr, dosed))}: this screen has no doses. Leave out {DOSE_SIGN} and the "
            "text after it."
        )


def _suggested(name: str, names: Iterable[str], organism: str = "human") -> str:
    drug, _, amount = name.rpartition(DOSE_SIGN)
    if drug in names and (dose := parsed(amount)):
        return (
            f"'{name}' (did you mean {at_dose(drug, dose[0])}? a dose is a number in the unit of the screen, without "
            "that unit)"
        )
    others = [other for other in TABLES if other != organism and name in starts(other) and name not in starts(organism)]
    place = f", a gene of {others[0]} where this screen is of {organism}" if others else ""
    return did_you_mean(name, names, place)


def check_question(
    pairs: Path,
    embeddings: Path,
    perturbations: Asked,
    gene_vectors: Path | None = None,
    of_term: Sequence[str] = (),
) -> None:
    """Raise InputError for perturbations that the screen does not know, before anything is computed."""
    with h5py.File(pairs) as file:
        measured, labels = list(map(str, ad.io.read_elem(file["var"]).index)), ad.io.read_elem(file["obs/perturbation"])
    perturbed = perturbed_genes(Embeddings.read(embeddings), set(map(str, labels.unique())))
    vectors = None if gene_vectors is None else Embeddings.read(gene_vectors)
    expanded(perturbations, perturbed, measured, vectors, of_term)


def term_of(perturbations: Asked, annotations: list[Path], roles: list[str]) -> list[str]:
    """Return the genes of the GO term that a question names, or none.

    Parameters
    ----------
    annotations, roles
        The manifest of a download, or files of the user's own and the role of each, as in `priors.prior`.

    Raises
    ------
    InputError
        If it names one without annotations.
    """
    if not isinstance(perturbations, dict) or "genes_of" not in perturbations:
        return []
    if not annotations:
        raise InputError("perturbations: genes_of needs the annotations of a prior of kind go (--annotations FILE).")
    files = dict(zip(roles, annotations, strict=True)) if roles else manifest_files(annotations[0], whole=True)
    return genes_of(perturbations["genes_of"], files)


def perturbed_genes(vectors: Embeddings, labels: Iterable[str]) -> list[str]:
    """Return the genes with a row that are perturbed in the screen, in the order of the rows.

    A user's table may have rows of other genes.
    """
    members = {member for label in labels for member in members_of(label)}
    return [gene for gene in vectors.table.index if gene in members]


def holding(obs: pd.DataFrame, selection: dict[str, Sequence], place: str) -> np.ndarray:
    """Return which cells hold one of the listed values in every listed column, (cells,).

    Raises
    ------
    InputError
        If a column or a value is not there: the others alone would be another question.
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
            f"{place}: obs column '{column}' does not hold "
            f"{', '.join(did_you_mean(value, known) for value in unknown)}. "
            f"It holds {', '.join(sorted(known)[:20])}{', ...' if len(known) > 20 else ''}."
        )
