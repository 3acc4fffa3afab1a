"""A role belongs to a cell: where contexts or cells are held out, every step keeps to the cells of its role."""

import json
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from conftest import SPECS_OF_CELLS, Prepared, ask
from scipy import sparse

from perturbflow.evaluation import evaluate
from perturbflow.models.effects import Effects
from perturbflow.models.latents.pca import LatentSpace
from perturbflow.pairs import Pairs
from perturbflow.predict import predict
from perturbflow.train import train

MODELS = {"additive": "closed_form.baselines:Additive", "ceiling": "closed_form.ceilings:TechnicalDuplicate"}


def scored(here: Prepared, folder: Path, implementation: str, role: str) -> tuple[ad.AnnData, pd.DataFrame]:
    """Train, predict and evaluate; return predictions and scores."""
    train(here.pairs, here.embeddings, here.audit, folder / "model.npz", folder / "run.json", implementation, {}, 0)
    predict(here.pairs, folder / "model.npz", folder / "predictions.h5ad", implementation, {}, 0, 1000, role)
    evaluate(folder / "predictions.h5ad", here.pairs, here.split, folder / "metrics.tsv")
    return ad.read_h5ad(folder / "predictions.h5ad"), pd.read_csv(folder / "metrics.tsv", sep="\t")


@pytest.mark.slow
@pytest.mark.parametrize("role", ["test", "validation"])
@pytest.mark.parametrize("kind", SPECS_OF_CELLS)
def test_predictions_and_scores_keep_to_the_role(
    kind: str, role: str, prepared: dict[str, Prepared], tmp_path: Path
) -> None:
    here = prepared[kind]
    predicted, table = scored(here, tmp_path, MODELS["additive"], role)
    obs = ad.read_h5ad(here.pairs).obs
    assert predicted.uns["perturbflow"]["role"] == role
    assert set(obs.iloc[predicted.obs["control_index"]]["role"]) == {role}
    of_role = obs[(obs["role"] == role) & ~obs["is_control"]]
    assert (
        predicted.obs["perturbation"].value_counts().to_dict()
        == of_role["perturbation"].value_counts()[lambda n: n > 0].to_dict()
    )
    n_scored = of_role.loc[of_role["half"] == "b", "perturbation"].value_counts()
    assert (table["n_cells"] == table["perturbation"].map(n_scored).astype(int)).all()


@pytest.mark.parametrize("kind", SPECS_OF_CELLS)
def test_the_ceiling_is_made_of_test_cells_of_the_other_half(
    kind: str, prepared: dict[str, Prepared], tmp_path: Path
) -> None:
    here = prepared[kind]
    predicted, _ = scored(here, tmp_path, MODELS["ceiling"], "test")
    pairs = ad.read_h5ad(here.pairs)
    of_ceiling = pairs[((pairs.obs["role"] == "test") & (pairs.obs["half"] == "a")).to_numpy()]
    for label in predicted.obs["perturbation"].unique():
        found = predicted[predicted.obs["perturbation"] == label].X.toarray()
        expected = of_ceiling[of_ceiling.obs["perturbation"] == label].X.toarray()
        assert np.allclose(np.sort(found.sum(axis=1)), np.sort(expected.sum(axis=1)), rtol=1e-5)


@pytest.mark.parametrize("kind", SPECS_OF_CELLS)
def test_what_is_fitted_for_a_model_knows_no_held_out_cell(kind: str, prepared: dict[str, Prepared]) -> None:
    cells = Pairs.read(prepared[kind].pairs)
    X = cells.X.toarray()
    held_out = (cells.obs["role"] != "train").to_numpy()
    X[held_out] = np.random.default_rng(0).gamma(2.0, 1.0, (held_out.sum(), X.shape[1]))
    changed = Pairs(sparse.csr_matrix(X), cells.obs, cells.genes, cells.control_index, cells.rows)
    effects = [Effects.of_training(pairs) for pairs in (cells, changed)]
    assert np.array_equal(effects[0].values, effects[1].values)
    spaces = [
        LatentSpace.fit(pairs, of_training, 5) for pairs, of_training in zip((cells, changed), effects, strict=True)
    ]
    assert np.allclose(spaces[0].basis, spaces[1].basis, atol=1e-6)
    assert np.allclose(spaces[0].mean, spaces[1].mean, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (
            "unseen_context",
            {"TF1": "measured in other contexts", "TF1+TF8": "composed of measured genes in other contexts"},
        ),
        ("random_cells", {"TF1": "measured", "TF1+TF8": "composed of measured genes"}),
    ],
)
def test_an_answer_says_where_a_perturbation_was_measured(
    kind: str, expected: dict[str, str], prepared: dict[str, Prepared], tmp_path: Path
) -> None:
    here = prepared[kind]
    train(
        here.pairs,
        here.embeddings,
        here.audit,
        tmp_path / "model.npz",
        tmp_path / "run.json",
        MODELS["additive"],
        {},
        0,
    )
    answer = ask(here, tmp_path / "model.npz", tmp_path, MODELS["additive"], {}, perturbations=list(expected))
    table = pd.read_csv(f"{answer}.tsv", sep="\t")
    assert table.groupby("perturbation")["known"].unique().map(list).to_dict() == {
        label: [known] for label, known in expected.items()
    }
    controls = json.loads(here.split.read_text())["cells"]["test"]
    assert set(ad.read_h5ad(f"{answer}.h5ad").obs["cell"]) <= set(controls)
