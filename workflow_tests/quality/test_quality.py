"""Is this screen good enough? Tests of response that keep their level, planted escaping cells, and the page."""

import json
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from conftest import OFF, dataset_block, make_screen
from scipy import sparse
from scipy.spatial.distance import cdist
from scipy.stats import false_discovery_control

from perturbflow.benchmark.panel import panels
from perturbflow.benchmark.tables import stratify
from perturbflow.evaluation import METRICS
from perturbflow.quality import quality
from perturbflow.quality.facts import batch_table, findings, own_genes
from perturbflow.quality.response import Compared, energy_distance, escaping, holm, responses, test_response
from perturbflow.quality.sample import Sample
from perturbflow.screens import harmonize

test_response.__test__ = False  # type: ignore[attr-defined]
FILES = ("harmonized.h5ad", "harmonization.json", "quality.tsv", "quality.json", "quality.html")
N_GENES = 150
SILENT = [f"N{i}" for i in range(30)]


def made_screen(seed: int = 0) -> ad.AnnData:
    """Return a screen of three batches that differ, with thirty idle perturbations and two others.

    Each idle one is mostly in one batch.

    STRONG moves all of its cells; HALF moves 60 % of them. Batch b2 has no controls. LONE has three cells.
    """
    rng = np.random.default_rng(seed)
    base, batch_effect = rng.gamma(1.0, 2.0, N_GENES), np.exp(rng.normal(0, 0.5, (3, N_GENES)))
    effect = np.exp(rng.normal(0, 0.9, N_GENES))
    obs, rates = [], []
    for batch in range(3):
        sizes = {"control": 0 if batch == 2 else 150, "STRONG": 20, "HALF": 40, "LONE": 3 if batch == 0 else 0}
        sizes |= {label: 45 if i % 2 == batch else 5 for i, label in enumerate(SILENT)}
        for label, n in sizes.items():
            moved = {"STRONG": n, "HALF": round(0.6 * n)}.get(label, 0)
            for i in range(n):
                obs.append((label, f"b{batch}"))
                rates.append(base * batch_effect[batch] * (effect if i < moved else 1.0))
    counts = rng.poisson(rng.gamma(5.0, np.array(rates) / 5.0)).astype(np.float32)
    table = pd.DataFrame(obs, columns=["perturbation", "lane"], index=[f"c{i}" for i in range(len(obs))])
    return ad.AnnData(sparse.csr_matrix(counts), table, pd.DataFrame(index=[f"GENE{i}" for i in range(N_GENES)]))


def described(folder: Path, screen: ad.AnnData) -> Path:
    """Harmonize and describe a screen; return the folder."""
    screen.write_h5ad(folder / "screen.h5ad")
    harmonize.harmonize(folder / "screen.h5ad", folder / FILES[0], folder / FILES[1], "mine", dataset_block(), OFF)
    quality(*[folder / name for name in FILES])
    return folder


@pytest.fixture(scope="module")
def screen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of `made_screen`, described."""
    return described(tmp_path_factory.mktemp("quality"), made_screen())


@pytest.fixture(scope="module")
def table(screen: Path) -> pd.DataFrame:
    """Return its quality.tsv."""
    return pd.read_csv(screen / "quality.tsv", sep="\t", index_col=0, keep_default_na=False, na_values=[""])


# --- the statistic --------------------------------------------------------------------------------------------------


def test_energy_distance_is_that_of_all_distances() -> None:
    rng = np.random.default_rng(0)
    X, is_perturbed = rng.normal(size=(30, 4)), np.arange(30) < 11
    x, y = X[is_perturbed], X[~is_perturbed]
    between, (within_x, within_y) = (
        cdist(x, y, "sqeuclidean").mean(),
        (cdist(a, a, "sqeuclidean").sum() / (len(a) * (len(a) - 1)) for a in (x, y)),
    )
    assert energy_distance(X, is_perturbed[None])[0] == pytest.approx(2 * between - within_x - within_y)


def test_p_values_are_uniform_where_nothing_was_done_and_small_where_something_was() -> None:
    found, tails = [], []
    for seed in range(200):
        rng = np.random.default_rng(seed)
        stratum = np.repeat([0, 1], [40, 60])
        is_perturbed = np.concatenate([np.arange(40) < 25, np.arange(60) < 10])
        X = rng.gamma(1.0, size=(100, 6)) * [4, 2, 1, 1, 1, 1] + 5 * stratum[:, None]
        X -= np.array([X[stratum == s].mean(axis=0) for s in (0, 1)])[stratum]
        found.append(test_response(Compared(X, is_perturbed, stratum, False), rng)[1])
        tails.append(test_response(Compared(X + 1.5 * is_perturbed[:, None], is_perturbed, stratum, False), rng)[1])
    assert 0.01 <= np.mean(np.array(found) < 0.05) <= 0.10
    assert 0.4 <= np.mean(np.array(found) < 0.5) <= 0.6
    assert np.median(tails) < 1e-6, "below what permutations alone could tell"


def test_holm_is_stricter_than_a_false_discovery_rate_and_leaves_missing_ones_out() -> None:
    p = np.array([0.01, np.nan, 0.04, 0.03, 0.005])
    assert np.allclose(holm(p)[[0, 2, 3, 4]], [0.03, 0.06, 0.06, 0.02])
    assert np.isnan(holm(p)[1])
    rng = np.random.default_rng(0)
    many = rng.random(200) ** 3
    assert (holm(many) >= false_discovery_control(many) - 1e-12).all()


# --- a screen -------------------------------------------------------------------------------------------------------


def test_what_does_something_responds_and_batches_are_no_response(table: pd.DataFrame) -> None:
    assert set(table.index[table["responds"].astype(str) == "True"]) == {"STRONG", "HALF"}
    silent = table.loc[SILENT]
    assert (silent["p_value"] < 0.05).mean() <= 0.15
    assert not table["is_relaxed"].loc[["STRONG", "HALF"]].astype(bool).any(), (
        "cells of the batch without controls are left out"
    )


def test_escaping_cells_are_counted_where_they_can_be_told(table: pd.DataFrame) -> None:
    assert table.loc["HALF", "escaping"] == pytest.approx(0.4, abs=0.12)
    assert table.loc["STRONG", "escaping"] < 0.1
    assert table.loc[SILENT, "escaping"].isna().all()


def test_a_weak_shift_tells_no_cells_apart() -> None:
    rng = np.random.default_rng(0)
    X = rng.normal(size=(300, 10))
    is_perturbed = np.arange(300) < 100
    X[is_perturbed] += 0.3 * np.eye(10)[0]
    assert np.isnan(escaping(Compared(X, is_perturbed, np.zeros(300, int), False), rng))


def test_what_cannot_be_compared_or_scored_is_told(screen: Path, table: pd.DataFrame) -> None:
    account = json.loads((screen / "quality.json").read_text())
    assert set(account["not_scorable"]) == {"LONE"}
    assert table.loc["LONE", "not_scorable"].startswith("fewer than 4 cells")
    assert pd.isna(table.loc["LONE", "responds"])
    assert table.loc["STRONG", "n_cells_without_controls"] == 20
    said = {finding["about"]: finding for finding in account["findings"]}
    assert not said["controls"]["is_fine"]
    assert "1 of 3 batches × cell types hold none" in said["controls"]["text"]
    assert "2 of 32" in said["response"]["text"]
    assert "1 of 33 (3 %) perturbations cannot be scored: LONE" in said["scorable"]["text"]
    assert account["cells_by_n_perturbations"]["0"] == account["cells"]["control"] == 300
    assert sum(row["controls"] + row["perturbed"] for row in account["batches"]) == account["cells"]["all"]


def test_a_screen_of_which_nothing_was_tested_is_described_in_whole_sentences(
    screen: Path, table: pd.DataFrame
) -> None:
    account = json.loads((screen / "quality.json").read_text())
    said = {
        one["about"]: one["text"]
        for one in findings(
            table.assign(responds=np.nan), pd.DataFrame(account["batches"]), {"direction": ""}, account["power"]
        )
    }
    assert said["response"].startswith("No perturbation could be compared with its controls.")
    assert "none perturbations" not in " ".join(said.values())


def test_the_same_screen_is_described_the_same(screen: Path, tmp_path: Path) -> None:
    quality(*[(screen if i < 2 else tmp_path) / name for i, name in enumerate(FILES)])
    for name in FILES[2:]:
        assert (tmp_path / name).read_text().replace(str(tmp_path), "") == (screen / name).read_text().replace(
            str(screen), ""
        )


def test_the_page_is_whole_and_fetches_nothing(screen: Path) -> None:
    page = (screen / "quality.html").read_text()
    assert page.count("<svg") == page.count('role="img"') >= 5
    assert "http" not in page.replace("http://www.w3.org", "")
    assert "LONE" in page
    assert "STRONG" in page


def test_a_sample_is_bounded(monkeypatch: pytest.MonkeyPatch, screen: Path) -> None:
    for name, most in (("CELLS_PER_PERTURBATION", 12), ("CONTROLS_PER_STRATUM", 20), ("LEAST_CONTROLS", 20)):
        monkeypatch.setattr(f"perturbflow.quality.sample.{name}", most)
    sample = Sample(screen / FILES[0])
    n = pd.Series(sample.label).value_counts()
    assert n["control"] == 40
    assert n["STRONG"] == n["HALF"] == 12
    assert n["LONE"] == 3
    assert sample.components.shape == (len(sample.rows), 50)
    assert responses(sample).loc["STRONG", "responds"]


# --- screens at the edge --------------------------------------------------------------------------------------------


def changed(screen: ad.AnnData, name: str) -> ad.AnnData:
    """Return a screen with something unusual."""
    if name == "genes without counts":
        screen.X = sparse.csr_matrix(screen.X.toarray() * (np.arange(screen.n_vars) < 2))
    if name == "few cells":
        screen = screen[screen.obs.groupby("perturbation", observed=True).cumcount() < 4].copy()
    if name == "a gene called NA":
        screen.obs["perturbation"] = screen.obs["perturbation"].astype(str).str.replace("TF1", "NA")
        screen.var_names = [name.replace("TF1", "NA") for name in screen.var_names]
    return screen


@pytest.mark.parametrize("case", ["few cells", "genes without counts", "a gene called NA"])
def test_unusual_screens_are_described(case: str, tmp_path: Path) -> None:
    screen = make_screen(n_genes=30, n_cells=8, labels=["TF1", "TF2", "TF1+TF2"])
    del screen.uns["effects"]
    screen = changed(screen, case)
    block = dataset_block(perturbation={"drop": ["nan"]})
    screen.write_h5ad(tmp_path / "screen.h5ad")
    harmonize.harmonize(tmp_path / "screen.h5ad", tmp_path / FILES[0], tmp_path / FILES[1], "mine", block, OFF)
    quality(*[tmp_path / name for name in FILES])
    table = pd.read_csv(tmp_path / "quality.tsv", sep="\t", keep_default_na=False, na_values=[])
    assert len(table) == 3
    if case == "a gene called NA":
        assert table.set_index("perturbation").loc["NA", "own_gene"] == "NA"


def test_batches_without_perturbed_cells_are_counted() -> None:
    obs = pd.DataFrame(
        {"perturbation": ["control", "A"], "is_control": [True, False], "batch": ["x", "y"], "cell_type": "t"}
    )
    table = batch_table(
        obs.astype({"batch": "category", "cell_type": "category", "perturbation": "category"})
    ).set_index("batch")
    assert table[["controls", "perturbed", "perturbations"]].to_numpy().tolist() == [[1, 0, 0], [0, 1, 1]]


def test_of_a_combination_the_least_changed_member_counts() -> None:
    members = {
        "A": {"ratio": 0.2, "low": 0.1, "high": 0.3, "is_told": True},
        "B": {"ratio": 0.9, "low": 0.8, "high": 1.1, "is_told": True},
        "C": {"ratio": 1.5, "low": 0.1, "high": 9.0, "is_told": False},
    }
    found = own_genes({"direction": "down", "perturbations": {"A+B+C": members, "C": {"C": members["C"]}}})
    assert found.index.tolist() == ["A+B+C"]
    assert found.loc["A+B+C", "own_gene"] == "B"
    assert found.loc["A+B+C", "efficacy"] == pytest.approx(0.1)
    assert own_genes({"direction": "up", "perturbations": {"A+B": members}}).loc["A+B", "own_gene"] == "A"


# --- strata ---------------------------------------------------------------------------------------------------------


def test_scores_are_told_for_what_responds_and_by_efficacy() -> None:
    metric = next(name for name, of in METRICS.items() if of.headline)
    n = 12
    scores = pd.DataFrame(
        {
            "dataset": "d", "split": "s", "model": "m", "seed": 0, "perturbation": [f"P{i}" for i in range(n)],
            "metric": metric,
            "value": np.arange(n) / n, "n_members": 1, "members_seen": 0, "n_cells": 40,
            "reliability": np.arange(n) / n, "effect_size": 1.0,
            "efficacy": np.arange(n) / n, "responds": [1.0] * 8 + [0.0] * 3 + [np.nan],
        }
    )  # fmt: skip
    strata = stratify(next(iter(panels(scores))), {"m": "no_change"}).set_index(["stratum", "bin"])
    assert strata.loc[("responds", "responds"), "n_perturbations"] == 8
    assert strata.loc[("responds", "like controls"), "n_perturbations"] == 3
    assert strata.loc[("responds", "responds"), "value"] == pytest.approx(np.mean(np.arange(8) / n))
    assert strata.loc["efficacy"]["n_perturbations"].tolist() == [4, 4, 4]
    without = stratify(next(iter(panels(scores.drop(columns=["efficacy", "responds"])))), {"m": "no_change"})
    assert not set(without["stratum"]) & {"efficacy", "responds"}
