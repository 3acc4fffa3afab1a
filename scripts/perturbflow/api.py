"""The steps as functions of AnnData, for notebooks and other programs: `from perturbflow import api`.

Nothing here needs torch.

Each returns the result of the step of the same name. The steps work from file to file: objects in memory are written to
a folder that is removed afterwards. So a screen needs room for a copy in the folder of temporary files (TMPDIR).
Predictions are scored, and splits made, in memory. A path in place of an AnnData is read where it lies.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeAlias

import anndata as ad
import pandas as pd
from scipy import sparse

from perturbflow import embeddings as vectors
from perturbflow import pairs as pairing
from perturbflow import predict as prediction
from perturbflow.audit import audit as audits
from perturbflow.audit.evidence import Evidence
from perturbflow.embeddings import Embeddings
from perturbflow.errors import InputError
from perturbflow.evaluation.table import scores
from perturbflow.genes.symbols import CONTROL, SEPARATOR, members_of
from perturbflow.io.artefacts import save_artefact
from perturbflow.io.files import read_json, write_json
from perturbflow.models.base import Ceiling, Run, build
from perturbflow.pairs import Pairs
from perturbflow.registry.families import FAMILIES
from perturbflow.registry.schemas import suggestion
from perturbflow.registry.shipped import shipped
from perturbflow.screens import harmonize as harmonization
from perturbflow.screens import unite as uniting
from perturbflow.splits import divisions
from perturbflow.splits import split as splits
from perturbflow.splits.named import Labels, held_out_names

Cells: TypeAlias = ad.AnnData | Path | str

logger = logging.getLogger(__name__)


class _Folder(ExitStack):
    """A folder for the files of the steps; it is removed at the end of the block."""

    def __enter__(self) -> _Folder:
        self.path = Path(self.enter_context(tempfile.TemporaryDirectory(prefix="perturbflow_")))
        return self

    def file(self, cells: Cells, name: str) -> Path:
        """Return the file of cells: the path that was given, or a copy of the cells in memory."""
        if not isinstance(cells, ad.AnnData):
            if not Path(cells).exists():
                raise InputError(f"there is no file {cells}.")
            return Path(cells)
        if cells.X is not None and not isinstance(
            cells.X, sparse.csr_matrix
        ):  # the steps write such matrices, and read them in blocks of rows
            raw = cells.raw
            cells = ad.AnnData(
                sparse.csr_matrix(cells.X),
                cells.obs,
                cells.var,
                cells.uns,
                obsm=dict(cells.obsm),
                layers=dict(cells.layers),
            )
            cells.raw = None if raw is None else raw.to_adata()
        path = self.path / name
        cells.write_h5ad(path)
        return path

    def embeddings(self, table: pd.DataFrame | None, pairs: Path) -> Path:
        """Return the file of the vectors of genes: those that were given, or co-expression in training cells."""
        path = self.path / "embeddings.parquet"
        if table is None:
            vectors.embeddings(pairs, path, ["coexpression"])
        else:
            table.to_parquet(path)
        return path


def _opened(path: Path) -> Pairs:
    try:
        return Pairs.open(path)
    except (OSError, KeyError) as error:
        raise InputError(f"{path} is no pairs.h5ad of this workflow: {error}.") from error


def _read(cells: Cells, name: str) -> ad.AnnData:
    if isinstance(cells, ad.AnnData):
        return cells
    try:
        return ad.read_h5ad(cells, backed="r")
    except FileNotFoundError as error:
        raise InputError(f"there is no file {cells} ({name}).") from error
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise InputError(f"{cells} cannot be read as h5ad ({name}): {error}.") from error


def harmonize(
    screen: Cells, block: Mapping[str, Any], qc: Mapping[str, Any] | None = None, name: str = "screen"
) -> ad.AnnData:
    """Bring a screen to one schema: raw counts, canonical labels, approved symbols.

    Cells without an assigned perturbation are dropped.

    Parameters
    ----------
    screen
        Raw UMI counts, cells × genes, in X, layers["counts"] or where the block says, with the columns of obs that it
        names. Or the path of a file or folder as source.path takes it.
    block
        As in config/datasets.yaml, without source: {"perturbation": {"column": ..., "control": [...]}, "covariates":
        {"batch": ...}}. Of source it may have labels and modality.
    qc
        Limits that differ from config/config.yaml, such as {"min_counts": 1000}; None in it switches a limit off.
    name
        The value of obs.dataset.

    Returns
    -------
    harmonized.h5ad: X CSR float32, integer-valued; obs and var as in docs/reference/files.md; uns["perturbflow"] counts
    the dropped cells and genes.

    Raises
    ------
    InputError
        For a key, column, label or value that cannot be used; the message has the fix.
    """
    with _Folder() as folder:
        raw = folder.file(screen, "screen.h5ad")
        config = shipped(mine={"datasets": {name: {**block, "source": {**block.get("source", {}), "path": str(raw)}}}})
        completed = config["datasets"][name]
        limits = {**config["qc"], **completed.get("qc", {}), **(qc or {})}
        harmonization.harmonize(
            raw, folder.path / "harmonized.h5ad", folder.path / "account.json", name, completed, limits
        )
        return ad.read_h5ad(folder.path / "harmonized.h5ad")


def unite(
    members: Mapping[str, Cells],
    genes: str | Sequence[str] = "shared",
    *,
    perturbation_types: Sequence[str] | None = None,
    organism: str = "human",
) -> ad.AnnData:
    """Unite harmonized screens into one in the same schema; obs.dataset says which screen a cell is of.

    Parameters
    ----------
    members
        Name → a screen as `harmonize` gives it.
    genes
        shared: those that all measure; any: those that some measure, with varm["measured"]; or names.
    perturbation_types
        Where members perturb in several ways: all types, in order. A gene that several perturb is kept in the first.
    organism
        human or mouse.

    Returns
    -------
    harmonized.h5ad of the union.

    Raises
    ------
    InputError
        If the members cannot be one screen; the message has the fix.
    """
    with _Folder() as folder:
        files = {name: folder.file(cells, f"{i}.h5ad") for i, (name, cells) in enumerate(members.items())}
        accounts: list[Path] = []
        types: dict[str, None] = {}
        for i, (name, file) in enumerate(files.items()):
            screen = _read(file, name)
            types |= dict.fromkeys(screen.obs["perturbation_type"].astype(str).unique())
            accounts.append(folder.path / f"{i}.json")
            write_json(
                accounts[-1], uniting.unknown_account(screen.uns.get("perturbflow", {}).get("dose_unit") or None)
            )
        if perturbation_types is None and len(types) > 1:
            raise InputError(
                f"the screens perturb in several ways: {', '.join(types)}. A gene repressed and activated is not one "
                "perturbation. Name all types in perturbation_types, in order, to take them all the same."
            )
        union = {"members": list(files), "genes": genes, "organism": organism}
        union["perturbation_types"] = list(perturbation_types or types)
        united = folder.path / "united.h5ad"
        uniting.unite(list(files.values()), accounts, united, folder.path / "united.json", "union", union)
        return ad.read_h5ad(united)


def _spec(kind: str, options: Mapping[str, Any]) -> dict:
    """Return the block of a split, checked and completed, as a screen's division reads it."""
    own = {key: value for key, value in options.items() if value is not None}
    fold = own.pop("fold", None)
    if "held_out" in own:
        own["held_out"] = [value if isinstance(value, int | float) else str(value) for value in own["held_out"]]
    if "folds" not in own and kind != "file":
        own.setdefault("test_fraction", 0.25)
    specs = shipped(mine={"splits": {"own": {"kind": kind, **own}}})["splits"]
    names = [name for name in specs if name == "own" or name.startswith("own_fold_")]
    if "folds" in own and f"own_fold_{fold}" not in names:
        raise InputError(f"fold {fold} is not possible: of {own['folds']} folds name one from 0 to {own['folds'] - 1}.")
    return dict(specs[f"own_fold_{fold}" if "folds" in own else "own"])


def split(
    harmonized: Cells, kind: str, *, organism: str = "human", name: str = "own", **options: Any
) -> dict[str, Any]:
    """Divide the cells of a screen into training, validation and test.

    Parameters
    ----------
    harmonized
        A screen as `harmonize` gives it; of it obs alone is read.
    kind
        unseen_perturbation, unseen_combination, unseen_dose, unseen_context, random_cells or file.
    organism
        Whose symbols the labels of a file are: human or mouse.
    name
        The name of the split in messages and in the result.
    **options
        As in config/splits.yaml: test_fraction (0.25), validation_fraction (0.1), seed (0), covariate, path; folds with
        fold, which counts from 0; held_out, a list of genes, combinations or contexts.

    Returns
    -------
    The content of split.json: perturbations and cells per role, those without a role, and a sentence on the scores.

    Raises
    ------
    InputError
        For an option that does not exist, and where the split is not possible on this screen.
    """
    account = {"organism": organism, "perturbations": {"dropped": {}}}
    return splits.divided(_read(harmonized, "harmonized").obs, account, name, _spec(kind, options))


def split_labels(labels: Sequence[str], kind: str, **options: Any) -> dict[str, list[str]]:
    """Divide perturbations into training, validation and test, where there are no cells yet.

    Parameters
    ----------
    labels
        Perturbations, GENE or A+B; control is left out, members are sorted.
    kind
        unseen_perturbation, unseen_combination or unseen_dose.
    **options
        test_fraction, validation_fraction, seed, folds and fold, held_out, as of `split`.

    Returns
    -------
    Labels per role: as JSON, a split of the kind file reads them.

    Raises
    ------
    InputError
        If the kind divides cells, or the perturbations are too few.
    """
    spec = _spec(kind, options)
    divide = divisions.DIVISIONS.get(kind)
    if divide is None:
        raise InputError(
            f"kind {kind} divides no labels, and these are labels: take {' or '.join(divisions.DIVISIONS)}."
        )
    names = sorted({SEPARATOR.join(sorted(members_of(label))) for label in labels if label != CONTROL})
    held_out = held_out_names(spec["held_out"], kind, Labels(names, {}, "human")) if "held_out" in spec else None
    return divide(names, divisions.Shares.of(spec, held_out))


def pair(harmonized: Cells, split: Mapping[str, Any], n_hvg: int = 2000) -> ad.AnnData:
    """Make the control/perturbed pairs of a split.

    Parameters
    ----------
    harmonized
        A screen as `harmonize` gives it.
    split
        The result of `split` for it.
    n_hvg
        Highly variable genes, chosen on training cells; measured perturbed genes are kept besides.

    Returns
    -------
    pairs.h5ad: X log1p of normalized counts, (cells, genes); obs.role and obs.half; obsm["control_index"], (cells, 8).

    Raises
    ------
    InputError
        If a role holds no control of a cell type.
    """
    with _Folder() as folder:
        screen, roles, made = (
            folder.file(harmonized, "harmonized.h5ad"),
            folder.path / "split.json",
            folder.path / "pairs.h5ad",
        )
        write_json(roles, dict(split))
        pairing.pair(screen, roles, made, n_hvg)
        return ad.read_h5ad(made)


def audit(
    harmonized: Cells, split: Mapping[str, Any] | Path | str, pairs: Cells, embeddings: pd.DataFrame | None = None
) -> dict[str, str]:
    """Look for anything of held-out cells in the data that a model is trained on.

    Parameters
    ----------
    harmonized, split, pairs
        The screen, the roles of its cells, and their pairs.
    embeddings
        Vectors of perturbed genes, genes × dimensions; without them, co-expression in training cells, which cannot
        leak.

    Returns
    -------
    Every check by name, with "passed".

    Raises
    ------
    InputError
        If anything leaked, with a line for every finding.
    """
    roles = dict(split) if isinstance(split, Mapping) else read_json(split)
    with _Folder() as folder:
        table = embeddings
        if table is None:
            table = Embeddings.read(folder.embeddings(None, folder.file(pairs, "pairs.h5ad"))).table
        cells = _read(pairs, "pairs").to_memory()
        screen = _read(harmonized, "harmonized")[cells.obs_names].to_memory()
        place = "pairs in memory" if isinstance(pairs, ad.AnnData) else str(Path(pairs).parent)
        return audits.passed(Evidence.of(roles, cells, screen, table), place)


def baseline(
    name: str,
    pairs: Cells,
    embeddings: pd.DataFrame | None = None,
    *,
    params: Mapping[str, Any] | None = None,
    seed: int = 0,
    max_cells: int | None = None,
    role: str = "test",
) -> ad.AnnData:
    """Fit a model in closed form and predict the held-out perturbations, to compare other predictions with it.

    Parameters
    ----------
    name
        Of config/models.yaml: a baseline, an ablation or a ceiling, such as no_change, additive, stacked or
        technical_duplicate.
    pairs
        The result of `pair`.
    embeddings
        Vectors of perturbed genes, genes × dimensions; without them, co-expression in training cells.
    params
        Values that differ from the block of config/models.yaml.
    seed
        Governs all that is random.
    max_cells
        Most cells per perturbation; without it, predict.max_cells of config/config.yaml. As many are predicted as were
        measured.
    role
        test, or validation to choose between models: for test, models learn from validation perturbations, too.

    Returns
    -------
    predictions.h5ad: X CSR float32, log1p-normalized, (predicted cells, genes of the pairs); obs.perturbation,
    cell_type, batch and control_index.

    Raises
    ------
    InputError
        If the model does not exist or is a learned one, or a param is not possible.
    """
    config = shipped(mine={"models": {name: {"params": dict(params)}}} if params else None)
    closed = [
        model for model, block in config["models"].items() if FAMILIES[block["family"]].rule == "train_closed_form"
    ]
    if name not in closed:
        raise InputError(f"'{name}' is no model in closed form.{suggestion(name, closed)}")
    block = config["models"][name]
    implementation = FAMILIES[block["family"]].implementation
    with _Folder() as folder:
        measured, model, predictions = (
            folder.file(pairs, "pairs.h5ad"),
            folder.path / "model.npz",
            folder.path / "predictions.h5ad",
        )
        vectors_of_genes = Embeddings.read(folder.embeddings(embeddings, measured))
        family, cells = build(implementation, block["params"]), _opened(measured)
        cells = cells if isinstance(family, Ceiling) else cells.fitted_on(role)
        save_artefact(
            model, family.fit(cells, vectors_of_genes, Run(seed=seed, checkpoints=folder.path / "checkpoints"))
        )
        most = config["predict"]["max_cells"] if max_cells is None else max_cells
        prediction.predict(measured, model, predictions, implementation, block["params"], seed, most, role)
        return ad.read_h5ad(predictions)


def score(
    predictions: Cells, pairs: Cells, params: Mapping[str, Any] | None = None, *, max_cells: int | None = None
) -> pd.DataFrame:
    """Score predictions, made by whatever model, on the measured cells of the same perturbations.

    Parameters
    ----------
    predictions
        predictions.h5ad as the workflow writes it: with obs.control_index, or with starts_from_controls in
        uns["perturbflow"], which also names the role whose cells are the truth (test without it). Or any file that the
        family `predictions` takes: cells, or one mean per perturbation, genes and labels in any order. Its scale is
        checked and converted; perturbations that it lacks are scored as no change (n_predicted is 0).
    pairs
        The result of `pair`, or pairs.h5ad of the workflow.
    params
        Of the family `predictions`, to declare a file of another kind: values, scale, target_sum, label, separator.
    max_cells
        Most cells per perturbation; without it, predict.max_cells of config/config.yaml.

    Returns
    -------
    metrics.tsv: one row per metric × perturbation, with n_cells, n_predicted, reliability, effect_size, metric and
    value. It is NaN where a metric is undefined. Units, ranges and directions: docs/reference/metrics.md, or
    `perturbflow list metrics`.

    Raises
    ------
    InputError
        If the file cannot be brought to the terms of the pairs. For predictions.h5ad of the workflow: if genes differ,
        a perturbation has no held-out cells, cells did not start from controls of the role, or expression is negative.
    """
    with _Folder() as folder:
        path = folder.file(pairs, "pairs.h5ad")
        measured = _opened(path)
        roles = {role: measured.roles(role).perturbations for role in divisions.ROLES}
        if _is_table(predictions) or not _is_of_workflow(cells := _read(predictions, "predictions")) or params:
            cells = _conformed(folder.file(predictions, "predictions.h5ad"), path, folder.path, params or {}, max_cells)
        else:
            _name_missing(cells, measured)
        return scores(cells, measured, divisions.members_seen(roles)).reset_index(drop=True)


def _is_table(predictions: Cells) -> bool:
    return not isinstance(predictions, ad.AnnData) and Path(predictions).suffix != ".h5ad"


def _is_of_workflow(cells: ad.AnnData) -> bool:
    """Return whether predictions have the form that `predict` writes."""
    return "control_index" in cells.obs or "starts_from_controls" in cells.uns.get("perturbflow", {})


def _name_missing(cells: ad.AnnData, measured: Pairs) -> None:
    """Log which perturbations of the role predictions.h5ad lacks."""
    role = str(cells.uns.get("perturbflow", {}).get("role", "test"))
    predicted = set(cells.obs.get("perturbation", pd.Series(dtype=str)).astype(str))
    if missing := sorted(set(measured.roles(role).perturbations) - predicted):
        logger.warning("%d perturbations have no prediction, and no score: %s", len(missing), ", ".join(missing))


def _conformed(path: Path, pairs: Path, folder: Path, params: Mapping[str, Any], max_cells: int | None) -> ad.AnnData:
    """Return a file of predictions as predictions.h5ad, by the family `predictions`."""
    block = {"family": "predictions", "params": {"file": str(path), **params}}
    config = shipped(mine={"models": {"theirs": block}})
    implementation, declared = FAMILIES["predictions"].implementation, config["models"]["theirs"]["params"]
    model, written = folder / "theirs.npz", folder / "conformed.h5ad"
    run = Run(seed=0, checkpoints=folder / "checkpoints")
    fitted = build(implementation, declared).fit(_opened(pairs).fitted_on("test"), Embeddings(pd.DataFrame()), run)
    save_artefact(model, fitted)
    most = config["predict"]["max_cells"] if max_cells is None else max_cells
    prediction.predict(pairs, model, written, implementation, declared, 0, most)
    return ad.read_h5ad(written)
