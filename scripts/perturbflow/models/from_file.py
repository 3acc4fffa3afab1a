"""Predictions that were made elsewhere: a file of cells, or of one mean per perturbation.

* Cells are scored as they are, on the screen's scale.
* Means become cells as those of every closed form do: counts of control cells, changed until they have this mean.
* A perturbation that the file lacks is scored as no change, and named.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd

from perturbflow.controls import Context
from perturbflow.embeddings import Embeddings
from perturbflow.errors import InputError
from perturbflow.genes.symbols import CONTROL
from perturbflow.models.base import Artefact, Given, Run
from perturbflow.models.closed_form.base import MeanEffects
from perturbflow.models.predictions_file import PredictionsFile, Terms, drawn, listed, refuse_measured
from perturbflow.nearest import nearest
from perturbflow.pairs import Pairs
from perturbflow.provenance.records import content_digest
from perturbflow.registry.families import PredictionsParams

logger = logging.getLogger(__name__)

PLACE = ["batch", "cell_type"]


class GivenFile(MeanEffects, Given):
    """Predictions in a file, whoever wrote it.

    Attributes
    ----------
    path
        The file.
    declared
        How it is declared.
    on_terms
        Whether its maker was handed expression on the screen's scale.
    """

    path: Path
    declared: PredictionsParams
    on_terms: ClassVar[bool] = False
    reads_blocks = True

    # --- fit ---

    def fit(self, pairs: Pairs, embeddings: Embeddings, run: Run) -> Artefact:
        """Check values and scale of the file by the controls of training, and take over its means.

        Labels are checked when it predicts: training knows none of the held-out ones.
        """
        file = PredictionsFile(self.path, self.declared, Terms.of(pairs), on_terms=self.on_terms)
        target_sum = file.check()
        digest, copied = content_digest(self.path), {}
        if file.has_cells and (copied := file.cells_of_training(pairs, target_sum)):
            logger.warning(
                "%s: %d of its %d cells are measured cells of training, of %s. These are copies, scored as they are.",
                self.path, sum(copied.values()), len(file.texts), listed(sorted(copied)),
            )  # fmt: skip
        run.facts |= {
            "n_parameters": 0,
            "file": {
                "path": str(self.path), "sha256": digest, "holds": "cells" if file.has_cells else "means",
                "rows": len(file.texts), "perturbations": len(set(file.labels(())) - {CONTROL}),
                "target_sum": target_sum, "cells_of_training": copied,
                "missing_genes": [gene for gene, given in zip(pairs.genes, file.is_given, strict=True) if not given],
            },
        }  # fmt: skip
        artefact: Artefact = {
            "sha256": np.array(digest),
            "has_cells": np.array(file.has_cells),
            "target_sum": np.array(target_sum),
            "is_given": file.is_given,
        }
        if not file.has_cells:
            artefact["values"] = file.expression(np.arange(len(file.texts)), target_sum).astype(np.float32)
        self.restore(artefact)
        return artefact

    def restore(self, artefact: Artefact) -> None:
        """Take over what was found, and the means."""
        super().restore(artefact)
        self.has_cells = bool(artefact["has_cells"])
        self._row: dict[str, int] = {}

    # --- means ---

    def effect(self, perturbation: str) -> np.ndarray:
        """Return the effect without a context: of a file of effects alone."""
        return self.effect_in(perturbation, None)

    def effect_in(self, perturbation: str, context: Context | None) -> np.ndarray:
        """Return the effect of the file's mean, (genes,); zeros for a perturbation or a gene that the file lacks."""
        is_given = self.artefact["is_given"]
        if perturbation not in self._row:
            return np.zeros(len(is_given))
        value = self.artefact["values"][self._row[perturbation]].astype(float)
        if self.declared.values == "effect":
            return value
        if context is None:
            raise InputError(f"{self.path} holds expression: an effect needs controls to compare it with.")
        return np.where(is_given, value - context.level, 0.0)

    # --- predict ---

    def meet(self, scored: Pairs) -> dict[str, Any]:
        """Find the file's rows of the scored perturbations; return those that it lacks.

        Raises
        ------
        InputError
            If the file changed since it was checked, or has none of these perturbations, or means of one twice.
        """
        if not self.path.is_file() or content_digest(self.path) != str(self.artefact["sha256"]):
            raise InputError(f"{self.path} was changed after it was checked. Run again, and it is read anew.")
        self._scored, self._file = scored, PredictionsFile(self.path, self.declared, Terms.of(scored))
        self._labels = self._file.labels(scored.perturbations)
        known = set(self._labels) - {CONTROL}
        missing = [label for label in scored.perturbations if label not in known]
        others = sorted(known - set(scored.perturbations))
        if len(missing) == len(scored.perturbations):
            raise InputError(
                f"{self.path}: none of its {len(others):,} perturbations is held out in this split: {listed(others)}. "
                f"Predict these: {listed(missing)}."
            )
        if others:
            logger.warning(
                "%s: %d perturbations are not held out, and not scored: %s", self.path, len(others), listed(others)
            )
        if not self.has_cells:
            self._take_rows(scored.perturbations)
        if not missing:
            return {}
        near = nearest(missing[0], others)
        hint = f" (is '{near[0]}' meant for {missing[0]}?)" if near else ""
        logger.warning(
            "%s lacks %d of %d perturbations, which are scored as no change: %s%s",
            self.path, len(missing), len(scored.perturbations), ", ".join(missing), hint,
        )  # fmt: skip
        return {"missing": np.array(missing)}

    def _take_rows(self, perturbations: Sequence[str]) -> None:
        """Note the row of every mean."""
        for label in perturbations:
            rows = np.flatnonzero(self._labels == label)
            if len(rows) > 1:
                texts = " and ".join(f"'{text}'" for text in self._file.texts[rows])
                raise InputError(f"{self.path}: {texts} are both {label}, and a mean has one row.")
            if len(rows):
                self._row[label] = int(rows[0])

    def cells_of(self, label: str, most: int, seed: int) -> tuple[np.ndarray, pd.DataFrame] | None:
        """Return the file's cells of a perturbation, see `Given`.

        Raises
        ------
        InputError
            If they are the measured cells themselves.
        """
        if not self.has_cells or not len(rows := np.flatnonzero(self._labels == label)):
            return None
        rows = drawn(rows, most, seed)
        cells = self._file.expression(rows, float(self.artefact["target_sum"]))
        measured = self._scored.cells_of(label)
        refuse_measured(self.path, label, cells, self._scored.X[measured].toarray())
        return cells, self._places(rows, measured)

    def _places(self, rows: np.ndarray, measured: np.ndarray) -> pd.DataFrame:
        """Return batch and cell type of predicted cells: the file's own where controls have them, else as measured."""
        controls = self._scored.obs.loc[self._scored.is_control, PLACE].astype(str)
        if set(PLACE) <= set(self._file.obs):
            own = self._file.obs.iloc[rows][PLACE].astype(str)
            if all(set(own[column]) <= set(controls[column]) for column in PLACE):
                return own
        sorted_places = self._scored.obs.iloc[measured][PLACE].astype(str).sort_values(PLACE)
        return sorted_places.iloc[np.arange(len(rows)) * len(measured) // len(rows)]


class FromFile(GivenFile):
    """Predictions that were made elsewhere, read from a file."""

    params: PredictionsParams

    def __init__(self, params: PredictionsParams) -> None:
        super().__init__(params)
        self.path, self.declared = Path(params.file), params
        if self.path.is_file():
            self.files = (self.path,)
