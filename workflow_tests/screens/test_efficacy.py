"""On target: the change of perturbed genes in their own cells, intervals that hold, and filters of cells without it."""

from collections.abc import Callable

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from perturbflow.errors import InputError
from perturbflow.screens.efficacy import LEAST_MOLECULES, OwnCounts, OwnGenes

GENES = ["A", "B", "C"]


def counted(X: np.ndarray, labels: list[str], batches: list[str] | None = None, blocks: int = 3) -> OwnCounts:
    """Return what is found in counts of GENES and one gene more that fills every cell."""
    obs = pd.DataFrame(
        {"perturbation": pd.Categorical(labels), "batch": batches or ["b"] * len(labels), "cell_type": "t"}
    )
    own = OwnCounts(OwnGenes.of(obs, pd.Index([*GENES, "REST"])))
    counts = sparse.csr_matrix(X.astype(np.float32))
    for rows in np.array_split(np.arange(len(X)), blocks):
        own.add(counts[rows], X[rows].sum(axis=1), np.ones(len(rows), bool))
    return own


def made(levels: dict[str, float], n: int, seed: int, n_controls: int = 200) -> tuple[np.ndarray, list[str]]:
    """Return Poisson counts: per label the mean of gene A, in cells of 1,000 counts or so."""
    rng = np.random.default_rng(seed)
    labels = ["control"] * n_controls + [label for label in levels if label != "control" for _ in range(n)]
    X = np.zeros((len(labels), 4))
    X[:, 0] = rng.poisson([levels[label] for label in labels])
    X[:, 3] = rng.poisson(1000, len(labels))
    return X, labels


def test_a_ratio_is_that_of_normalized_means() -> None:
    X, labels = made({"control": 8.0, "A": 2.0}, 60, 0)
    found = counted(X, labels).efficacy("down").iloc[0]
    rate = X[:, 0] / X.sum(axis=1)
    expected = rate[200:].mean() / rate[:200].mean()
    assert found["ratio"] == pytest.approx(expected, rel=1e-6)
    assert found["share"] == pytest.approx(1 - expected, rel=1e-5)
    assert found["low"] < expected < found["high"]
    assert found["expected"] == pytest.approx(8.0 * 60, rel=0.1)
    assert counted(X, labels).efficacy("up").iloc[0]["share"] == pytest.approx(expected - 1, rel=1e-5)
    assert found.equals(counted(X, labels, blocks=1).efficacy("down").iloc[0]), "blocks are no groups"


@pytest.mark.slow
@pytest.mark.parametrize(("level", "ratio", "n"), [(5.0, 0.3, 50), (0.4, 0.3, 50), (0.05, 1.0, 80), (1.0, 3.0, 30)])
def test_intervals_hold_the_truth_as_often_as_they_say(level: float, ratio: float, n: int) -> None:
    held = []
    for seed in range(300):
        found = counted(*made({"control": level, "A": level * ratio}, n, seed), blocks=1).efficacy("down").iloc[0]
        held.append(found["low"] <= ratio <= found["high"])
    assert np.mean(held) > 0.92


def test_batches_are_compared_with_their_own_controls() -> None:
    X, labels = made({"control": 2.0, "A": 2.0}, 80, 1)
    batches = ["deep" if i % 2 else "other" for i in range(200)] + ["deep"] * 80
    X[np.array(batches) == "deep", 0] *= 5
    assert counted(X, labels, batches).efficacy("down").iloc[0]["ratio"] == pytest.approx(1.0, abs=0.35)
    batches = ["other"] * 200 + ["without controls"] * 80
    assert counted(X, labels, batches).efficacy("down").iloc[0]["cells"] == 80, "controls of other batches serve"


def test_what_cannot_be_told_is_told_so() -> None:
    few = counted(*made({"control": 0.01, "A": 0.0}, 60, 0)).efficacy("down").iloc[0]
    assert not few["is_told"]
    assert few["expected"] < LEAST_MOLECULES
    silent = counted(*made({"control": 0.0, "A": 2.0}, 60, 0)).efficacy("up").iloc[0]
    assert silent["is_told"], "a silent gene that was switched on"
    assert np.isfinite(silent["ratio"])
    assert silent["low"] > 10
    assert counted(*made({"control": 5.0, "D": 5.0}, 60, 0)).efficacy("down").empty, "not measured"


def test_members_of_a_combination_are_told_apart_and_doses_are_no_part_of_a_gene() -> None:
    X, labels = made({"control": 6.0, "A+B": 1.0, "A@10": 1.0}, 60, 0)
    X[:, 1] = 6.0
    found = counted(X, labels).efficacy("down").set_index(["label", "member"])["ratio"]
    assert found["A+B", "A"] == pytest.approx(1 / 6, abs=0.1)
    assert found["A+B", "B"] == pytest.approx(1.0, abs=0.1)
    assert found["A@10", "A@10"] == pytest.approx(1 / 6, abs=0.1)


# --- filters --------------------------------------------------------------------------------------------------------


def spoilt(screen: ad.AnnData) -> ad.AnnData:
    """Return a copy in which the guides of TF3 miss, and half the cells of TF4 escape."""
    screen, X = screen.copy(), screen.X.toarray()
    label = screen.obs["perturbation"].to_numpy()
    rest = np.random.default_rng(0).permutation(np.flatnonzero(label == "control"))
    for name, share in (("TF3", 1.0), ("TF4", 0.5)):
        cells = np.flatnonzero(label == name)
        cells = cells[: int(share * len(cells))]
        X[cells] = X[rest[: len(cells)]]
    screen.X = sparse.csr_matrix(X)
    return screen


def test_by_default_nothing_is_dropped(harmonized_from: Callable, tiny_screen: Callable) -> None:
    result = harmonized_from(spoilt(tiny_screen()))
    efficacy = result.account["efficacy"]
    assert efficacy["direction"] == "down"
    assert result.account["cells"]["dropped"] == {"unassigned": 0}
    assert efficacy["perturbations"]["TF3"]["TF3"]["high"] > 0.8
    assert 0.1 < efficacy["perturbations"]["TF1"]["TF1"]["ratio"] < 0.35
    assert set(efficacy["perturbations"]["TF1+TF2"]) == {"TF1", "TF2"}


def test_perturbations_that_miss_and_cells_that_escape_are_dropped_and_counted(
    harmonized_from: Callable, tiny_screen: Callable
) -> None:
    result = harmonized_from(spoilt(tiny_screen()), {"min_efficacy": 0.7})
    account = result.account
    assert "TF3" in account["perturbations"]["dropped"]
    assert {"TF1", "TF3+TF4"} <= set(account["perturbations"]["kept"])
    assert account["cells"]["dropped"]["qc.min_efficacy"] == sum(account["perturbations"]["dropped"].values())
    assert account["cells"]["source"] == account["cells"]["kept"] + sum(account["cells"]["dropped"].values())

    whole, halved = (
        harmonized_from(spoilt(tiny_screen())),
        harmonized_from(spoilt(tiny_screen()), {"min_cell_efficacy": 0.5}),
    )
    n = {name: (of.adata.obs["perturbation"] == "TF4").sum() for name, of in (("whole", whole), ("halved", halved))}
    assert n["whole"] == 40
    assert 15 <= n["halved"] <= 25, "half of the cells escaped"
    assert (halved.adata.obs["perturbation"] == "control").sum() == 80, "controls are always kept"
    assert halved.account["cells"]["dropped"]["qc.min_cell_efficacy"] > 20


def test_activation_has_its_own_direction(harmonized_from: Callable, tiny_screen: Callable) -> None:
    screen = tiny_screen()
    X = screen.X.toarray()
    X[np.ix_(screen.obs["perturbation"] == "TF1", screen.var_names == "TF1")] *= 30
    screen.X = X
    account = harmonized_from(screen, {"min_efficacy": 1.0}, perturbation_type="CRISPRa").account
    assert account["efficacy"]["direction"] == "up"
    assert set(account["perturbations"]["kept"]) == {"TF1", "control"}


def test_what_no_direction_is_known_of_drops_nothing_and_says_so(
    harmonized_from: Callable, tiny_screen: Callable
) -> None:
    account = harmonized_from(tiny_screen(), {"min_efficacy": 0.7}, perturbation_type="unknown").account
    assert account["warnings"] == [
        "qc.min_efficacy drops nothing: the direction in which unknown takes a gene is not known."
    ]
    assert account["efficacy"]["perturbations"]["TF1"]["TF1"]["ratio"] < 0.4
    assert harmonized_from(tiny_screen(), perturbation_type="drug").account["efficacy"]["perturbations"] == {}, (
        "a drug is no gene"
    )


@pytest.mark.parametrize("limit", ["min_efficacy", "min_cell_efficacy"])
def test_a_limit_where_no_perturbed_gene_is_measured_drops_nothing_and_says_so(
    limit: str, harmonized_from: Callable, tiny_screen: Callable
) -> None:
    screen = tiny_screen()[:, 8:].copy()
    account = harmonized_from(screen, {limit: 0.5}).account
    first, second = account["warnings"]
    assert first == f"qc.{limit} drops nothing: no perturbed gene is among the measured ones."
    assert second.startswith(
        "none of the 8 perturbed genes (TF1, TF2, TF3, TF4, TF5, ...) is among the measured ones (MT-ND1, GENE0"
    )
    assert account["cells"]["dropped"].get(f"qc.{limit}", 0) == 0


def test_a_limit_that_cannot_be_met_is_refused(harmonized_from: Callable, tiny_screen: Callable) -> None:
    with pytest.raises(InputError, match=r"qc.min_efficacy = 7: a knock-down takes at most all of it"):
        harmonized_from(tiny_screen(), {"min_efficacy": 7})
    with pytest.raises(InputError, match=r"no perturbation has"):
        harmonized_from(tiny_screen(), {"min_efficacy": 0.99})
