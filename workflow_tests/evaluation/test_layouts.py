"""Predictions for other evaluators: the same cells, in their columns and on their scales."""

from pathlib import Path

import anndata as ad
import numpy as np
import pytest
from conftest import SPECS, Prepared, make_screen, prepare
from scipy import sparse

from perturbflow.errors import InputError
from perturbflow.evaluation.layouts import layouts, whole_counts
from perturbflow.predict import predict
from perturbflow.registry.families import FAMILIES
from perturbflow.train import train


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """Return a screen whose combinations are held out."""
    return prepare(tmp_path_factory.mktemp("combinations"), make_screen(), SPECS["unseen_combination"])


@pytest.fixture(scope="module")
def written(here: Prepared) -> dict[str, ad.AnnData]:
    """Return the four files of a run of no change, and its predictions."""
    run, implementation = here.folder, FAMILIES["no_change"].implementation
    train(here.pairs, here.embeddings, here.audit, run / "model.npz", run / "run.json", implementation, {}, 0)
    predict(here.pairs, run / "model.npz", run / "predictions.h5ad", implementation, {}, 0, 200)
    files = layouts(here.pairs, run / "predictions.h5ad", run / "theirs", "mine × no_change")
    assert files[-1].name == "README.md"
    cells = {f"{file.parent.name}/{file.stem}": ad.read_h5ad(file) for file in files[:-1]}
    return {**cells, "predictions": ad.read_h5ad(run / "predictions.h5ad"), "pairs": ad.read_h5ad(here.pairs)}


def test_measured_cells_are_those_that_are_scored(written: dict[str, ad.AnnData]) -> None:
    pairs = written["pairs"]
    is_test, is_control = (pairs.obs["role"] == "test").to_numpy(), pairs.obs["is_control"].to_numpy()
    scored = pairs[is_test & (is_control | (pairs.obs["half"].astype(str) != "a").to_numpy())]
    for scale, X in {"cell_eval": scored.X, "vcc2026": scored.layers["counts"]}.items():
        measured = written[f"{scale}/measured"]
        assert list(measured.var_names) == list(pairs.var_names)
        np.testing.assert_allclose(measured.X.toarray(), X.toarray(), rtol=1e-5)
        expected = scored.obs["perturbation"].astype(str).replace("control", "non-targeting")
        assert measured.obs["target"].tolist() == expected.tolist()


def test_predicted_cells_come_with_the_same_controls(written: dict[str, ad.AnnData]) -> None:
    predictions = written["predictions"]
    for scale in ("cell_eval", "vcc2026"):
        predicted, measured = written[f"{scale}/predicted"], written[f"{scale}/measured"]
        of_model = predicted[predicted.obs["target"] != "non-targeting"]
        assert of_model.obs["target"].tolist() == predictions.obs["perturbation"].astype(str).tolist()
        controls = [cells[cells.obs["target"] == "non-targeting"].X.toarray() for cells in (predicted, measured)]
        np.testing.assert_array_equal(*controls)
    np.testing.assert_array_equal(
        written["cell_eval/predicted"].X[: predictions.n_obs].toarray(), predictions.X.toarray()
    )


def test_counts_of_predicted_cells_are_whole_and_give_the_predicted_values(written: dict[str, ad.AnnData]) -> None:
    predictions, pairs = written["predictions"], written["pairs"]
    counts = written["vcc2026/predicted"].X[: predictions.n_obs].toarray()
    np.testing.assert_array_equal(counts, np.rint(counts))
    totals = pairs.obs["total_counts"].to_numpy(float)[predictions.obs["control_index"].to_numpy()]
    target_sum = pairs.uns["perturbflow"]["target_sum"]
    again = np.log1p(counts * (target_sum / totals)[:, None])
    np.testing.assert_allclose(again.mean(axis=0), predictions.X.toarray().mean(axis=0), atol=0.02)


def test_fractions_of_a_count_keep_their_mean_and_whole_ones_stay() -> None:
    totals = np.full(4000, 100.0)
    counts = np.tile([0.2, 0.7, 3.0, 96.1, 20_000.0, 0.0], (4000, 1))
    X = sparse.csr_matrix(np.log1p(counts * 10).astype(np.float32))
    again = whole_counts(X, totals, 1000.0).toarray()
    np.testing.assert_array_equal(again, np.rint(again))
    np.testing.assert_array_equal(again[:, [2, 4, 5]], counts[:, [2, 4, 5]])
    np.testing.assert_allclose(again.mean(axis=0), counts[0], atol=0.03)  # 4 standard errors


def test_a_folder_of_other_files_and_predictions_of_another_split_are_refused(here: Prepared, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(InputError, match="holds other files"):
        layouts(here.pairs, here.folder / "predictions.h5ad", tmp_path, "a run")
    cells = ad.read_h5ad(here.folder / "predictions.h5ad")[:, 1:]
    cells.write_h5ad(tmp_path / "predictions.h5ad")
    with pytest.raises(InputError, match="has other genes"):
        layouts(here.pairs, tmp_path / "predictions.h5ad", tmp_path / "theirs", "a run")
