"""Maps of cells: where cells lie on the components of measured cells."""

from pathlib import Path

import anndata as ad
import numpy as np
import pytest
from conftest import Prepared

from perturbflow.pairs import Pairs
from perturbflow.report import cell_map
from perturbflow.report.cards import ModelCard
from perturbflow.report.plotting import Plots
from perturbflow.report.scatter_plots import Chosen


def test_cells_lie_where_measured_ones_do(
    prepared: dict[str, Prepared], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two perturbations are predicted by their own cells, and one by too few."""
    file = prepared["unseen_combination"].pairs
    pairs = Pairs.read(file)
    test = pairs.roles("test")
    labels = list(test.perturbations)[:2]
    own = ad.AnnData(X=test.X, obs=test.obs[["perturbation"]])
    few = own[own.obs["perturbation"] == labels[1]][:3]
    ad.concat([own[own.obs["perturbation"] == labels[0]], few], index_unique="-").write_h5ad(tmp_path / "theirs.h5ad")
    drawn: list[dict[str, np.ndarray]] = []
    plot = cell_map._map_figure
    monkeypatch.setattr(
        cell_map, "_map_figure", lambda places: drawn.append({k: v[0] for k, v in places.items()}) or plot(places)
    )
    chosen = Chosen("theirs", dict.fromkeys(labels, "best"), ["theirs"], 0, [], 0)
    cards = {"theirs": ModelCard("theirs", "learned", "", {}, "#0072B2", "o")}
    maps = cell_map.cell_maps(chosen, file, {"theirs": tmp_path / "theirs.h5ad"}, cards, "mine", Plots("maps", 10**6))
    assert [one["label"] for one in maps] == [labels[0]], "three cells are no map"
    (places,) = drawn
    np.testing.assert_allclose(places["theirs"].mean(axis=0), places["measured"].mean(axis=0), atol=1e-6)
    apart = np.linalg.norm(places["measured"].mean(axis=0) - places["controls"].mean(axis=0))
    assert apart > 0.5, "the components tell measured cells from controls"
    assert f"Cells of {labels[0]} on mine: " in maps[0]["svg"]
