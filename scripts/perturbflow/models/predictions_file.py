"""A file of predictions that were made elsewhere, read on the terms of a screen.

Genes may come in any order, and more of them than the screen has. Labels may have their members in any order, or GEARS'
`ctrl` among them. Values are log1p of normalized counts, normalized counts (linear), or counts.

The scale is checked by measured cells: controls, and the perturbed cells of training. Let p_g be the mean of a gene's
predicted values, and m_g(T) that of measured cells, with counts normalized to T. Most genes hardly change, so the file
was normalized to about the sum T* with median_g log(p_g / m_g(T*)) = 0. Of cells their totals tell a sum, too. One of
these has to be near the screen's own sum, a common one or the declared one.
"""

import hashlib
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
from scipy import sparse

from perturbflow.errors import InputError
from perturbflow.genes.symbols import CONTROL, SEPARATOR, approved_symbol
from perturbflow.pairs import Pairs
from perturbflow.registry.families import PredictionsParams
from perturbflow.splits.named import Labels

logger = logging.getLogger(__name__)

MOST_ROWS_OF_A_MEAN = 1.5  # half of the perturbations have one row, else the rows are cells
LEAST_GENES = 0.5  # share of the screen's genes that a file must have
EXPRESSED = 0.1  # mean log1p expression of controls: genes above tell the scale
LEAST_EXPRESSED = 5  # such genes
COMMON_SUMS = (1e4, 1e6)  # that other tools normalize to
NEAR = 0.3  # of a logarithm: sums this near to one another cannot be told apart
NEAR_DECLARED = 0.6  # the same of a sum that the user declares
WIDEST = 12.0  # of a logarithm: sums are looked for within it
PROBED = 2000  # cells that tell a scale
ROWS_AT_ONCE = 2048
LARGEST_LOG = 20.0  # no count has a larger logarithm
ALIKE = 0.5  # of the expression of controls: effects have less
CONSTANT = 1e-3  # relative deviation of sums that are one number
DIGITS = 2  # cells that agree to so many digits in all genes are one cell
LEAST_EQUAL = 0.01  # share of cells that are measured ones, from which a file is refused
SHOWN = 5


def listed(names: Sequence[str]) -> str:
    """Return the first names, and how many more there are."""
    more = f", {len(names) - SHOWN:,} more" if len(names) > SHOWN else ""
    return ", ".join(map(str, names[:SHOWN])) + more


def drawn(rows: np.ndarray, most: int, seed: int = 0) -> np.ndarray:
    """Return rows, or as many of them as are wanted at most, in their order."""
    return rows if len(rows) <= most else np.sort(np.random.default_rng(seed).choice(rows, most, replace=False))


def distance(found: Sequence[float], target_sum: float) -> float:
    """Return the least distance of sums from one, in logarithms."""
    return float(np.abs(np.log(np.maximum(found, 1e-12) / target_sum)).min())


@dataclass(frozen=True)
class Terms:
    """The terms of a screen that a file is brought to.

    Attributes
    ----------
    genes
        Columns of pairs.h5ad.
    target_sum
        Sum that its counts are normalized to.
    split_sha256
        SHA-256 of split.json; empty where it is not known.
    control
        Mean log1p expression of controls, (genes,).
    probes
        Some controls, and some perturbed cells of training if there are any: normalized counts, (cells, genes), CSR.
    """

    genes: list[str]
    target_sum: float
    split_sha256: str
    control: np.ndarray
    probes: tuple[sparse.csr_matrix, ...]

    @classmethod
    def of(cls, cells: Pairs) -> "Terms":
        """Take them from the controls among these cells."""
        controls = np.flatnonzero(cells.is_control)
        if "target_sum" not in cells.about:
            raise InputError("pairs.h5ad has no uns['perturbflow']['target_sum']; make it again (`snakemake pairs`).")
        trained = np.flatnonzero((cells.obs["role"] == "train").to_numpy() & ~cells.is_control)
        chosen = [drawn(rows, PROBED) for rows in (controls, trained) if len(rows)]
        return cls(
            cells.genes,
            float(cells.about["target_sum"]),
            str(cells.about.get("split_sha256", "")),
            cells.mean_of(controls).astype(float),
            tuple(sparse.csr_matrix(cells.X[rows]).astype(np.float64).expm1() for rows in chosen),
        )

    def level(self, probes: sparse.csr_matrix, target_sum: float, scale: str) -> np.ndarray:
        """Return the mean of some measured cells, (genes,), with their counts normalized to a sum, on a scale."""
        normalized = probes * (target_sum / self.target_sum)
        on_scale = normalized.log1p() if scale == "log1p" else normalized
        return np.asarray(on_scale.mean(axis=0)).ravel()


class PredictionsFile:
    """A file of predictions, in the terms of a screen.

    Parameters
    ----------
    path
        h5ad, or a table of means (tsv, csv, parquet): first column the perturbation, then one column per gene.
    params
        How the file is declared.
    terms
        Of the screen.
    on_terms
        Whether its maker was handed expression on the screen's scale. Values that look like another scale are then
        those of a model that learned little: they are named in the log, and scored.

    Attributes
    ----------
    texts
        Perturbation of every row, as the file writes it.
    columns
        Column of the file for every gene of the screen, -1 for none, (genes,).
    has_cells
        Whether it holds cells; else one mean per perturbation.

    Raises
    ------
    InputError
        If the file cannot be read, belongs to another split, or has too few genes of the screen.
    """

    def __init__(self, path: Path, params: PredictionsParams, terms: Terms, *, on_terms: bool = False) -> None:
        self.path, self.params, self.terms, self.on_terms = path, params, terms, on_terms
        self._X, self.obs, self.genes, about = _opened(path, params.label)
        self._check_split(about)
        if params.label not in self.obs:
            raise InputError(
                f"{path}: obs has no column '{params.label}', only {', '.join(map(str, self.obs)) or '(none)'}. Name "
                "the one with the perturbations in params.label (perturbflow score --label)."
            )
        self.texts = self.obs[params.label].astype(str).to_numpy(str)
        self.columns = self._columns()
        self.has_cells = self._has_cells()

    # --- tables ---

    def _check_split(self, about: dict[str, Any]) -> None:
        """Refuse a file that was made for another split, where it names its split."""
        own, stated = self.terms.split_sha256, str(about.get("split_sha256", ""))
        if stated and own and stated != own:
            raise InputError(
                f"{self.path}: it was made for another split. Its uns['perturbflow']['split_sha256'] is "
                f"{stated[:12]}…, and the split.json of these pairs has {own[:12]}…. Export this split and predict it."
            )

    def labels(self, known: Sequence[str]) -> np.ndarray:
        """Return the label of every row: one of the known, or the text in canonical form, (rows,)."""
        is_known = set(known)
        readings = [Labels(known, {}, organism) for organism in ("", "human")]

        def label(text: str) -> str:
            text = text.replace(self.params.separator, SEPARATOR)
            found = [reading.label(text) for reading in readings]
            return next((one for one in found if one in is_known), found[0])

        return pd.Series(self.texts).map({text: label(text) for text in np.unique(self.texts)}).to_numpy(str)

    def _has_cells(self) -> bool:
        """Return whether the file holds cells; means have one row per perturbation."""
        labels = pd.Series(self.labels(()))
        rows = labels[labels != CONTROL].value_counts()
        if not len(rows):
            raise InputError(f"{self.path}: it holds no perturbation in '{self.params.label}'.")
        if self.path.suffix == ".h5ad" and rows.median() > MOST_ROWS_OF_A_MEAN:
            if self.params.values == "effect":
                raise InputError(
                    f"{self.path}: it holds {rows.sum():,} cells, and params.values says effect. Cells hold expression."
                )
            return True
        if twice := sorted(rows.index[rows > 1]):
            raise InputError(
                f"{self.path}: a file of means has one row per perturbation, and these have several: {listed(twice)}. "
                "A+B and B+A are one, and so are A and A+ctrl."
            )
        return False

    def _columns(self) -> np.ndarray:
        """Return the column of the file for every gene of the screen, -1 for none, (genes,)."""
        place: dict[str, int] = {}
        for names in (self.genes, map(approved_symbol, self.genes)):
            for i, gene in enumerate(names):
                place.setdefault(gene, i)
        columns = np.array([place.get(gene, -1) for gene in self.terms.genes])
        missing = [gene for gene, column in zip(self.terms.genes, columns, strict=True) if column < 0]
        if len(missing) > (1.0 - LEAST_GENES) * len(columns):
            is_turned = len(set(self.texts) & set(self.terms.genes)) > len(columns) - len(missing)
            hint = " Its rows are genes: a row is a perturbation or a cell, and a column a gene." if is_turned else ""
            raise InputError(
                f"{self.path}: it has {len(columns) - len(missing):,} of the {len(columns):,} genes of the screen, and "
                f"needs half of them. Missing: {listed(missing)}. Its own: {listed(self.genes)}.{hint}"
            )
        if missing:
            logger.warning(
                "%s: %d of %d genes are missing, and get the mean of the controls: %s",
                self.path, len(missing), len(columns), listed(missing),
            )  # fmt: skip
        return columns

    @cached_property
    def is_given(self) -> np.ndarray:
        """Mask of the screen's genes that the file has, (genes,)."""
        return self.columns >= 0

    # --- values ---

    def _raw(self, rows: np.ndarray) -> np.ndarray:
        """Return values as the file has them, (rows, genes of the screen), 0 for missing genes; rows are sorted."""
        block = self._X[rows][:, self.columns[self.is_given]]
        values = np.zeros((len(rows), len(self.columns)))
        values[:, self.is_given] = block.toarray() if sparse.issparse(block) else np.asarray(block)
        return values

    def _sums(self, rows: np.ndarray) -> np.ndarray:
        """Return the sum of normalized counts or counts over all genes of the file, (rows,)."""
        block = self._X[rows]
        if self.params.scale == "log1p":
            block = block.astype(np.float64).expm1() if sparse.issparse(block) else np.expm1(np.asarray(block, float))
        return np.asarray(block.sum(axis=1)).ravel()

    def _blocks(self) -> Iterator[np.ndarray]:
        n = len(self.texts)
        for first in range(0, n, ROWS_AT_ONCE):
            yield np.arange(first, min(first + ROWS_AT_ONCE, n))

    def _check_values(self) -> None:
        """Refuse values that no file of its kind can hold."""
        for rows in self._blocks():
            values = self._raw(rows)
            is_bad = ~np.isfinite(values)
            if is_bad.any():
                row, gene = np.argwhere(is_bad)[0]
                raise InputError(
                    f"{self.path}: the value of {self.terms.genes[gene]} in {self.texts[rows[row]]} is no finite "
                    f"number ({is_bad.sum():,} of the {values.size:,} values read so far). Each has to be a number."
                )
            if self.params.values == "expression" and (values < 0).any():
                raise InputError(
                    f"{self.path}: values are below zero, down to {values.min():.3g} ({(values < 0).sum():,} of the "
                    f"{values.size:,} values read so far). "
                    "Expression has none: these are z-scores or effects. Give expression that was not centred, or "
                    "means minus the mean of the controls with params.values: effect (perturbflow score --values "
                    "effect)."
                )
            if self.params.scale == "log1p" and values.max() > LARGEST_LOG:
                raise InputError(
                    f"{self.path}: its values go up to {values.max():,.4g}, and params.scale says log1p, which stays "
                    f"below {LARGEST_LOG:g}. If they are not logged, say scale: linear or counts (perturbflow score "
                    "--scale)."
                )

    def check(self) -> float:
        """Check all values and their scale; return the sum that the file's counts are normalized to.

        Raises
        ------
        InputError
            If it holds values that cannot be, or is on a scale that cannot be brought to the screen's exactly.
        """
        self._check_values()
        if self.params.values == "effect":
            return self._checked_effects()
        if self.params.scale != "log1p" and not self.has_cells:
            raise InputError(
                f"{self.path}: it holds means of {self.params.scale} values, and the screen's scale is the mean of "
                f"log1p. These cannot be converted. Normalize to {self.terms.target_sum!r} and take log1p of each "
                "cell, then the mean."
            )
        if self.params.scale == "counts":
            return self._checked_counts()
        target_sum = self._accepted(self._found_sums(self._raw(self._probed), self.params.scale))
        own = self.terms.target_sum
        if target_sum == own:
            return own
        if not self.has_cells:
            raise InputError(
                f"{self.path}: its means are those of counts normalized to {target_sum:,.0f}, and the screen's to "
                f"{own:,.1f}. The mean of a logarithm cannot be converted. Normalize each cell to {own!r} before log1p."
            )
        logger.warning("%s: normalized to %.6g, and the screen to %.6g: converted", self.path, target_sum, own)
        return target_sum

    @cached_property
    def _probed(self) -> np.ndarray:
        """Rows that tell the scale: at most PROBED, the same for the same file."""
        return drawn(np.flatnonzero(self.labels(()) != CONTROL), PROBED)

    def _mean(self, values: np.ndarray) -> np.ndarray:
        """Return the mean over the probed rows, each perturbation with the same weight, (genes,)."""
        return pd.DataFrame(values).groupby(self.labels(())[self._probed]).mean().to_numpy().mean(axis=0)

    def _found_sums(self, values: np.ndarray, scale: str) -> list[float]:
        """Return sums that explain the probed rows, (rows, genes), see the module; none if nothing tells."""
        told = self.is_given & (self.terms.control > EXPRESSED)
        if told.sum() < LEAST_EXPRESSED:
            return []
        mean = np.log(np.maximum(self._mean(values)[told], 1e-12))
        found = [self._solved(mean, probes, scale, told) for probes in self.terms.probes]
        if self.has_cells:
            linear = np.expm1(values[:, told]) if scale == "log1p" else values[:, told]
            totals = [np.asarray(probes[:, told].sum(axis=1)).ravel() for probes in self.terms.probes]
            found += [self.terms.target_sum * np.median(linear.sum(axis=1)) / np.median(total) for total in totals]
        return [float(one) for one in found]

    def _solved(self, mean: np.ndarray, probes: sparse.csr_matrix, scale: str, told: np.ndarray) -> float:
        """Return T* by bisection, given the logarithm of the mean in the genes that tell, (genes told,)."""
        own, low, high = self.terms.target_sum, -WIDEST, WIDEST
        while high - low > 1e-3:
            middle = (low + high) / 2
            level = self.terms.level(probes, own * np.exp(middle), scale)[told]
            is_above = np.median(mean - np.log(np.maximum(level, 1e-12))) > 0
            low, high = (middle, high) if is_above else (low, middle)
        return own * np.exp((low + high) / 2)

    def _accepted(self, found: list[float]) -> float:
        """Return the sum that the file is taken to be normalized to, given those that explain its values."""
        own, declared, scale = self.terms.target_sum, self.params.target_sum, self.params.scale
        if declared is not None:
            if found and distance(found, declared) > NEAR_DECLARED:
                raise InputError(
                    f"{self.path}: params.target_sum says {declared:g}, and its values look like {scale} of counts "
                    f"normalized to about {np.median(found):,.3g}. Declare scale and target_sum as they are."
                )
            return own if np.isclose(declared, own, rtol=CONSTANT) else float(declared)
        if exact := self._exact_sum(found):
            return own if np.isclose(exact, own, rtol=CONSTANT) else exact
        if not found or distance(found, own) <= NEAR:
            if near := [one for one in COMMON_SUMS if CONSTANT < distance([own], one) <= NEAR]:
                logger.warning(
                    "%s: taken to be normalized to %.6g, which cannot be told from %g. Declare params.target_sum.",
                    self.path, own, near[0],
                )  # fmt: skip
            return own
        for candidate in COMMON_SUMS:
            if distance(found, candidate) <= NEAR:
                return float(candidate)
        if self.on_terms:
            logger.warning(
                "%s: its values look like %s of counts normalized to about %.3g, and the screen's to %.1f. "
                "Either the model learned little, or its script left another scale.",
                self.path, scale, np.median(found), own,
            )  # fmt: skip
            return own
        raise InputError(
            f"{self.path}: its values are no {scale} on the scale of this screen. They look like {scale} of counts "
            f"normalized to about {np.median(found):,.3g}, and the screen's are normalized to {own:,.1f}. Declare "
            "params.scale (log1p, linear or counts) and params.target_sum as they are (perturbflow score --scale "
            "--target-sum)."
        )

    def _exact_sum(self, found: list[float]) -> float | None:
        """Return the one sum of all cells, where the file has all genes; None where it cannot be told."""
        if not self.has_cells or not found or len(self.genes) <= self.is_given.sum():
            return None
        sums = self._sums(self._probed)
        is_one = sums.std() < CONSTANT * sums.mean() and distance(found, sums.mean()) <= NEAR
        return float(sums.mean()) if is_one else None

    def _checked_counts(self) -> float:
        """Return the screen's sum, after a check that counts of the stated size of each cell are on its scale."""
        own = self.terms.target_sum
        found = self._found_sums(self._normalized(self._probed, self._raw(self._probed)), "log1p")
        if found and distance(found, own) > NEAR:
            stated = "obs.total_counts" if "total_counts" in self.obs else "the sum over the genes of the file"
            raise InputError(
                f"{self.path}: params.scale says counts. Divided by {stated} and normalized to {own:,.1f}, they look "
                f"like counts normalized to about {np.median(found):,.3g}. obs.total_counts has to be the sum of a "
                "cell's counts over all genes."
            )
        return own

    def _checked_effects(self) -> float:
        """Return the screen's sum; refuse expression that is declared as effects, and effects on another scale."""
        own, declared = self.terms.target_sum, self.params.target_sum
        if self.params.scale != "log1p" or (declared is not None and not np.isclose(declared, own, rtol=CONSTANT)):
            raise InputError(
                f"{self.path}: effects are differences of mean log1p expression, normalized to {own:,.1f}; they cannot "
                "be converted from another scale."
            )
        told = self.is_given & (self.terms.control > EXPRESSED)
        values = self._raw(self._probed)[:, told]
        share = float(np.median(values.mean(axis=0) / self.terms.control[told])) if told.any() else 0.0
        if values.size and values.min() >= 0 and share > ALIKE:
            raise InputError(
                f"{self.path}: params.values says effect, but no value is below zero, and their mean is {share:.0%} of "
                "the expression of controls. Say params.values: expression."
            )
        return own

    # --- what is handed on ---

    def expression(self, rows: np.ndarray, target_sum: float) -> np.ndarray:
        """Return rows as log1p expression on the screen's scale, (rows, genes), or effects as they are.

        Genes that the file lacks have the mean of the controls, or no effect.

        Parameters
        ----------
        rows
            Sorted.
        target_sum
            As `check` returned it.
        """
        values, own = self._raw(rows), self.terms.target_sum
        if self.params.values == "effect":
            return values
        if self.params.scale == "counts":
            values = self._normalized(rows, values)
        elif self.params.scale == "linear":
            values = np.log1p(values * (own / target_sum))
        elif target_sum != own:
            values = np.log1p(np.expm1(values) * (own / target_sum))
        return np.where(self.is_given, values, self.terms.control)

    def cells_of_training(self, cells: Pairs, target_sum: float) -> dict[str, int]:
        """Return which perturbed cells of training the file holds, label → number.

        Parameters
        ----------
        cells
            Training cells.
        target_sum
            As `check` returned it.
        """
        own = {digest for rows in self._blocks() for digest in _digests(self.expression(rows, target_sum))} - {None}
        found: Counter[str] = Counter()
        for rows, X in cells.blocks():
            digests = zip(cells.labels[rows], _digests(X.toarray()), strict=True)
            found.update(str(label) for label, digest in digests if label != CONTROL and digest in own)
        return dict(found)

    def _normalized(self, rows: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """Return log1p of counts, each cell's by all its counts, (rows, genes)."""
        if "total_counts" in self.obs:
            totals = self.obs["total_counts"].to_numpy(float)[rows]
        elif len(self.genes) > self.is_given.sum():
            totals = self._sums(rows)
        else:
            raise InputError(
                f"{self.path}: params.scale says counts, and obs has no total_counts. Counts are normalized by all "
                "counts of a cell, and the file has those of some genes. Add the column, or give log1p values."
            )
        return np.log1p(counts * (self.terms.target_sum / np.maximum(totals, 1e-12))[:, None])


def _opened(path: Path, label: str) -> tuple[Any, pd.DataFrame, list[str], dict[str, Any]]:
    """Return values, rows, genes and uns["perturbflow"] of a file; the first column of a table becomes `label`."""
    if not path.is_file():
        raise InputError(f"there is no file {path}, which predictions are read from.")
    if path.suffix != ".h5ad":
        return *_table(path, label), {}
    try:
        file = ad.read_h5ad(path, backed="r")
        X = file.X if file.X is None or getattr(file.X, "format", "csr") == "csr" else file.X.to_memory().tocsr()
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise InputError(f"{path} cannot be read as h5ad: {str(error)[:200]}.") from error
    if X is None:
        raise InputError(f"{path}: X is empty. Predicted values belong there, not into a layer.")
    return X, file.obs.reset_index(drop=True), [str(gene) for gene in file.var_names], file.uns.get("perturbflow", {})


def _table(path: Path, label: str) -> tuple[np.ndarray, pd.DataFrame, list[str]]:
    """Return values, rows and genes of a table of means."""
    if path.suffix == ".parquet":
        table = pd.read_parquet(path)
        table = table if isinstance(table.index, pd.RangeIndex) else table.reset_index()
    elif path.suffix in (".tsv", ".csv"):
        first = {0: str}
        table = pd.read_csv(path, sep="\t" if path.suffix == ".tsv" else ",", dtype=first, na_filter=True)
    else:
        raise InputError(f"{path}: predictions are h5ad, tsv, csv or parquet; this is '{path.suffix}'.")
    if table.shape[1] < 2:
        raise InputError(f"{path}: it has one column. A .tsv has tabs between its columns, and a .csv commas.")
    try:
        values = table.iloc[:, 1:].to_numpy(float)
    except ValueError as error:
        raise InputError(
            f"{path}: the first column names the perturbation, the others hold numbers: {error}."
        ) from error
    return values, pd.DataFrame({label: table.iloc[:, 0].astype(str)}), [str(gene) for gene in table.columns[1:]]


def refuse_measured(path: Path, label: str, predicted: np.ndarray, measured: np.ndarray) -> None:
    """Raise InputError if predicted cells are the measured cells of the perturbation, (cells, genes) both."""
    known, own = set(filter(None, _digests(measured))), list(filter(None, _digests(predicted)))
    equal = sum(digest in known for digest in own)
    if equal > LEAST_EQUAL * len(own):
        raise InputError(
            f"{path}: {equal:,} of its {len(own):,} cells of {label} are measured cells of this split. They are the "
            "truth that predictions are scored on, and no prediction."
        )


def _digests(cells: np.ndarray) -> list[bytes | None]:
    """Return a digest of every cell's rounded expression; None of a cell without counts."""
    rounded = np.round(cells, DIGITS).astype(np.float32) + np.float32(0.0)  # no negative zero
    return [hashlib.blake2b(row.tobytes(), digest_size=8).digest() if row.any() else None for row in rounded]
