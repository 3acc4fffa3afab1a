"""Power: signal, reliability and cells that are needed, on made cells with a known truth."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from perturbflow.quality.power import Power, cells_for, detectable, reliability, sentence

N_GENES, N_CONTROLS = 300, 400


def made(effects: np.ndarray, n_cells: int, rng: np.random.Generator, batch: float = 1.0) -> SimpleNamespace:
    """Return cells with unit variance in two batches, as a sample has them; perturbations are unevenly among them."""
    labels, strata, X = ["control"] * N_CONTROLS, [0, 1] * (N_CONTROLS // 2), [rng.normal(size=(N_CONTROLS, N_GENES))]
    for i, effect in enumerate(effects):
        labels += [f"P{i:02d}"] * n_cells
        strata += [int(j < 0.7 * n_cells) for j in range(n_cells)]
        X.append(effect + rng.normal(size=(n_cells, N_GENES)))
    values, stratum = np.vstack(X), np.array(strata)
    values += batch * stratum[:, None]

    def moments(group: np.ndarray, n_groups: int) -> tuple[np.ndarray, np.ndarray]:
        one_hot = np.eye(n_groups)[group].T
        return one_hot @ values, one_hot @ values**2

    types = np.zeros(len(labels), int)
    return SimpleNamespace(label=np.array(labels), stratum=stratum, cell_type=types, moments=moments)


def test_signal_is_found_and_replicates_agree_as_predicted() -> None:
    rng = np.random.default_rng(0)
    sizes = np.linspace(0.0, 0.5, 30)
    effects = sizes[:, None] * rng.normal(size=(30, N_GENES))
    first, second = Power.of(made(effects, 40, rng)), Power.of(made(effects, 40, rng))
    true = ((effects - effects.mean(axis=1, keepdims=True)) ** 2).sum(axis=1)
    np.testing.assert_allclose(first.signal, true, rtol=0.25, atol=3.0)
    assert first.noise == pytest.approx(N_GENES, rel=0.1)
    assert np.allclose(first.controls, 1 / (0.7**2 / 200 + 0.3**2 / 200)), "a batch with many cells needs its controls"
    assert len(second.labels) == 30


@pytest.mark.parametrize(("n", "n0"), [(10, 50), (40, 50), (40, 1000)])
def test_reliability_is_the_correlation_of_two_measurements(n: int, n0: int) -> None:
    rng = np.random.default_rng(1)
    effect = 0.3 * rng.normal(size=(1, 3000))
    found = []
    for _ in range(20):
        a, b = effect + rng.normal(0, np.sqrt(1 / n + 1 / n0), (2, 3000))
        found.append(np.corrcoef(a, b)[0, 1])
    assert reliability(float((effect**2).sum()), 3000.0, n, n0) == pytest.approx(np.mean(found), abs=0.02)


def test_cells_that_are_needed_give_the_reliability_that_was_wanted() -> None:
    signal, controls = np.array([1.0, 10.0, 0.01]), np.full(3, 500.0)
    needed = cells_for(0.5, signal, 100.0, controls)
    np.testing.assert_allclose(reliability(signal[:2], 100.0, needed[:2], controls[:2]), 0.5)
    assert needed[0] > needed[1]
    assert np.isinf(needed[2]), "with so few controls no number of cells is enough"


def test_power_of_a_single_gene_is_that_of_the_test() -> None:
    """A change of the detectable size is found four times in five."""
    rng, n, n0 = np.random.default_rng(2), 40, 400
    size = detectable(np.ones(5), n, n0)
    z = (size + rng.normal(0, np.sqrt(1 / n + 1 / n0), 20_000)) / np.sqrt(1 / n + 1 / n0)
    assert np.mean(np.abs(z) > 1.96) == pytest.approx(0.8, abs=0.01)
    assert detectable(np.ones(5), 4 * n, 1e9) == pytest.approx(detectable(np.ones(5), n, 1e9) / 2)


def test_a_screen_is_told_what_more_cells_would_make_of_it() -> None:
    rng = np.random.default_rng(3)
    effects = np.linspace(0.0, 0.4, 40)[:, None] * rng.normal(size=(40, N_GENES))
    power = Power.of(made(effects, 40, rng))
    n_cells = pd.Series(40, index=power.labels)
    table = power.table(n_cells).assign(n_cells=40)
    account = power.account(table)
    assert 0 < account["n_reliable"] < 40
    more = list(account["n_reliable_with"].values())
    assert more == sorted(more)
    assert more[-1] > account["n_reliable"]
    is_enough = table["n_cells"] >= table["cells_needed"]
    assert (is_enough == (table["reliability"] >= 0.5)).mean() > 0.95, "but for rounding"
    said = sentence(account, 40)
    assert f"can score {account['n_reliable']} of 40 perturbations" in said
    assert "more cells each would make it" in said
    effects = [row["median_gene"] for row in account["detectable"]]
    assert effects[0] > effects[5], "more cells, smaller changes"
