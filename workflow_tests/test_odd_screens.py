"""Screens of odd shape pass from the file to the scores: batches as many as cells, one batch, three cells each."""

import json
from collections.abc import Callable
from pathlib import Path

import anndata as ad
import pandas as pd
import pytest
from conftest import SPECS, Prepared, make_screen, prepare

from perturbflow.evaluation import evaluate
from perturbflow.pairs import Pairs
from perturbflow.predict import predict
from perturbflow.registry.families import FAMILIES
from perturbflow.train import train

MODELS = ("no_change", "gaussian_process", "technical_duplicate")


def _batches_of_one() -> ad.AnnData:
    screen = make_screen()
    screen.obs["lane"] = [f"lane_{i}" for i in range(screen.n_obs)]
    return screen


def _one_batch() -> ad.AnnData:
    screen = make_screen()
    screen.obs["lane"] = "only"
    return screen


def _three_cells_each() -> ad.AnnData:
    """Training has fewer cells than the screen has genes, too."""
    screen = make_screen(n_genes=200, n_cells=2)
    nth = screen.obs.groupby("perturbation").cumcount()
    return screen[(nth < 3) | (screen.obs["perturbation"] == "control")].copy()


SCREENS: dict[str, Callable[[], ad.AnnData]] = {
    "batches_of_one": _batches_of_one,
    "one_batch": _one_batch,
    "three_cells_each": _three_cells_each,
}


@pytest.fixture(scope="module", params=SCREENS)
def odd(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Prepared, pd.DataFrame]:
    """Return the name of a screen, its files, and the scores of three models."""
    here = prepare(tmp_path_factory.mktemp(request.param), SCREENS[request.param](), SPECS["unseen_perturbation"])
    return request.param, here, pd.concat([scored(here, model) for model in MODELS])


def scored(here: Prepared, model: str) -> pd.DataFrame:
    """Train, predict and score one model, and return its rows of metrics.tsv."""
    folder, family = Path(here.folder / model), FAMILIES[model].implementation
    folder.mkdir()
    artefact, predictions = folder / "model.npz", folder / "predictions.h5ad"
    train(here.pairs, here.embeddings, here.audit, artefact, folder / "run.json", family, {}, 0)
    predict(here.pairs, artefact, predictions, family, {}, 0, 1000)
    evaluate(predictions, here.pairs, here.split, folder / "metrics.tsv", {"model": model})
    return pd.read_csv(folder / "metrics.tsv", sep="\t")


@pytest.mark.slow
def test_every_held_out_perturbation_has_scores(odd: tuple[str, Prepared, pd.DataFrame]) -> None:
    name, here, scores = odd
    held_out = set(json.loads(here.split.read_text())["perturbations"]["test"])
    for metric in ("mae", "pearson_delta_ctrl_off_target", "rank_cosine_off_target", "sinkhorn_w2"):
        values = scores[scores["metric"] == metric].set_index(["model", "perturbation"])["value"].unstack()
        assert values.notna().all(axis=None), (name, metric)
        assert set(values) == held_out
        assert set(values.index) == set(MODELS)


def test_the_caveats_say_what_is_odd(odd: tuple[str, Prepared, pd.DataFrame]) -> None:
    name, here, scores = odd
    caveats = " ".join(json.loads(here.audit.read_text())["caveats"])
    cells = Pairs.open(here.pairs)
    n_perturbed = int((~cells.is_control).sum())
    if name == "batches_of_one":
        assert cells.about["n_relaxed_matches"] == n_perturbed
        assert f"{n_perturbed} perturbed cells (100 %) have no control in their own batch" in caveats
    if name == "one_batch":
        assert "All scored cells are of one batch (only)" in caveats
    if name == "three_cells_each":
        assert set(scores["n_cells"]) == {2}, "half 'b' of three cells"
        assert set(scores.loc[scores["model"] == "technical_duplicate", "n_predicted"]) == {1}
        energy = scores[(scores["metric"] == "energy_distance") & (scores["model"] == "technical_duplicate")]
        assert energy["value"].isna().all(), "one cell has no distance within"
        assert (scores["effect_size"] >= 0).all()
