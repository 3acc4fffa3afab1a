"""Cells as counts: thinned, added to, and calibrated until their mean is the predicted one."""

import numpy as np
import pytest
from made_counts import normalized

from perturbflow.embeddings import Embeddings
from perturbflow.models import thinning
from perturbflow.pairs import Pairs


def poisson_cells(n: int = 4000, n_genes: int = 6, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return Poisson counts and the same log-normalized, with a filler gene that makes sizes equal."""
    rng = np.random.default_rng(seed)
    counts = rng.poisson([0.3, 1.0, 3.0, 8.0, 60.0, 200.0][:n_genes], (n, n_genes))
    counts = np.column_stack([counts, 1000 - counts.sum(axis=1)])
    return counts, normalized(counts)


def sampled(cells: np.ndarray, fold: np.ndarray, seed: int = 1) -> np.ndarray:
    """Return cells at these fold changes as they are."""
    nothing = np.zeros(cells.shape[1])
    change = thinning.CommonChange(thinning.Levels.of(thinning.Counted.of(cells)), nothing, nothing)
    return thinning.applied(cells, change, fold, np.random.default_rng(seed))


@pytest.mark.parametrize("fold", [0.1, 0.5, 0.9])
def test_thinned_poisson_counts_are_poisson(fold: float) -> None:
    counts, cells = poisson_cells()
    log_fold = np.tile(np.r_[np.full(6, np.log(fold)), 0.0], (len(cells), 1))
    out = np.rint(np.expm1(sampled(cells, log_fold)))
    for gene, level in enumerate([0.3, 1.0, 3.0, 8.0, 60.0, 200.0]):
        k = out[:, gene]
        assert k.mean() == pytest.approx(fold * level, rel=0.06, abs=0.02)
        assert k.var() == pytest.approx(fold * level, rel=0.12, abs=0.02)
        assert (k <= counts[:, gene]).all()
    assert (out[:, 6] == counts[:, 6]).all()


def test_what_is_added_follows_the_level_and_the_cell() -> None:
    rng = np.random.default_rng(0)
    rate = rng.gamma(2.0, 2.0, (5000, 1))  # cells differ: their own rate, a Gamma mixture of shape 2
    counts = np.column_stack([rng.poisson(rate[:, 0]), rng.poisson(4.0, 5000), np.ones(5000)])
    cells = np.log1p(counts.astype(float))
    out = np.expm1(sampled(cells, np.tile([np.log(3.0), np.log(3.0), 0.0], (5000, 1))))
    np.testing.assert_allclose(out[:, :2].mean(axis=0), [12.0, 12.0], rtol=0.05)
    # Of a mixture, 3λ: variance 12 + 144/2; of one rate 12.
    assert out[:, 0].var() == pytest.approx(84.0, rel=0.25)
    assert out[:, 1].var() == pytest.approx(12.0, rel=0.2)


@pytest.mark.parametrize("level", [0.2, 2.0, 50.0])
def test_the_mean_that_fold_changes_make_is_on_the_scale_of_the_cells(level: float) -> None:
    """Rates, not log1p expression, change by a fold: what that is in log1p depends on the level."""
    rng = np.random.default_rng(0)
    counts = np.column_stack([rng.poisson(level, 20_000), np.ones(20_000)])
    cells, fold = np.log1p(counts.astype(float)), np.tile([np.log(0.5), 0.0], (20_000, 1))
    expected = np.log1p(rng.poisson(level / 2, 200_000)).mean() - np.log1p(rng.poisson(level, 200_000)).mean()
    assert thinning.mean_effect_of(cells, fold, rng)[0] == pytest.approx(expected, rel=0.05)
    assert thinning.mean_effect_of(cells[:7], fold[:7], rng)[1] == pytest.approx(0.0, abs=1e-6)


def test_no_change_returns_the_cells_themselves(screen: tuple[Pairs, Embeddings]) -> None:
    cells = screen[0].X[:50].toarray()
    out = thinning.with_mean_effect(cells, np.zeros(cells.shape[1]), None, np.random.default_rng(0))
    np.testing.assert_allclose(out, cells, atol=1e-5)


def test_the_mean_is_met_and_cells_are_counts_of_their_own_size(screen: tuple[Pairs, Embeddings]) -> None:
    cells = screen[0].X[:80].toarray()
    rng = np.random.default_rng(0)
    change = rng.normal(scale=0.4, size=cells.shape[1])
    change[3] = -20.0
    out = thinning.with_mean_effect(cells, change, 0.3 * rng.normal(size=cells.shape), rng)
    np.testing.assert_allclose(out.mean(axis=0), np.maximum(cells.mean(axis=0) + change, 0.0), atol=0.02)
    assert not out[:, 3].any()
    unit = thinning.unit_of(np.expm1(cells.astype(float)))
    counts = np.expm1(out.astype(float)) / unit[:, None]
    np.testing.assert_allclose(counts, np.rint(counts), atol=2e-3)


def test_the_unit_of_a_cell_is_found_without_a_count_of_one() -> None:
    counts = np.array([[2, 4, 6, 0], [2, 3, 7, 0], [6, 10, 15, 0], [1, 0, 0, 0], [0, 0, 0, 0]])
    unit = np.array([0.37, 1.9, 5.5, 2.0])
    found = thinning.unit_of(counts[:4] * unit[:, None])
    # Multiples of two look like half as many counts of twice the size: nothing tells these apart.
    np.testing.assert_allclose(found, [2 * 0.37, 1.9, 5.5, 2.0], rtol=1e-6)
    assert np.isfinite(thinning.unit_of(counts * 2.0)).all()


def test_a_gene_that_no_start_cell_holds_can_appear() -> None:
    _, cells = poisson_cells(200)
    cells[:, 0] = 0.0
    change = np.zeros(7)
    change[0] = 0.5
    out = thinning.with_mean_effect(cells, change, None, np.random.default_rng(0))
    assert out[:, 0].mean() == pytest.approx(0.5, abs=0.02)
    assert len(np.unique(out[:, 0])) > 2


def test_a_fold_change_of_its_own_moves_a_cell_more() -> None:
    _, cells = poisson_cells(400)
    fold = np.zeros((400, 7))
    fold[:200, 4] = 1.0
    out = thinning.with_mean_effect(cells, np.zeros(7), fold, np.random.default_rng(0))
    assert out[:200, 4].mean() > out[200:, 4].mean() + 0.7
    assert out[:, 4].mean() == pytest.approx(cells[:, 4].mean(), abs=0.01)


def test_counted_cells_are_nearer_to_real_ones_than_shifted_ones() -> None:
    """The reason for all this: planted fold changes on Poisson cells, the mean known."""
    rng = np.random.default_rng(0)
    level, fold = rng.gamma(0.5, 4.0, 200), np.exp(rng.normal(scale=0.8, size=200))
    before = np.log1p(rng.poisson(level, (300, 200)))
    after, again = (np.log1p(rng.poisson(level * fold, (300, 200))) for _ in range(2))
    change = after.mean(axis=0) - before.mean(axis=0)
    counted = thinning.with_mean_effect(before, change, None, rng)
    shifted = np.maximum(before + change, 0.0)
    errors = [np.abs(cells.var(axis=0) - again.var(axis=0)).mean() for cells in (counted, shifted)]
    assert errors[0] < 0.4 * errors[1]


def test_a_change_of_a_population_is_done_to_single_cells() -> None:
    _, cells = poisson_cells()
    rng = np.random.default_rng(0)
    fold = np.column_stack([0.4 * rng.normal(size=(len(cells), 6)), np.zeros(len(cells))])
    target = np.array([0.1, -0.2, 0.3, -0.4, 0.2, -0.1, 0.0])
    change = thinning.common_change(cells, target, fold, rng)
    out = thinning.applied(cells, change, fold, np.random.default_rng(2))
    np.testing.assert_allclose(out.mean(axis=0) - cells.mean(axis=0), target, atol=0.03)
    # A cell's outcomes are its own: asked alone, many times, it has the mean that it has in company.
    alone = thinning.applied(np.repeat(cells[:1], 4000, axis=0), change, np.repeat(fold[:1], 4000, axis=0), rng)
    company = thinning.applied(np.repeat(cells[:2], 4000, axis=0), change, np.repeat(fold[:2], 4000, axis=0), rng)[
        :4000
    ]
    np.testing.assert_allclose(alone.mean(axis=0), company.mean(axis=0), atol=0.05)


def test_a_gene_that_no_cell_holds_arrives_in_single_cells_too() -> None:
    _, cells = poisson_cells()
    cells = np.column_stack([cells, np.zeros(len(cells))])
    target = np.zeros(8)
    target[7] = 0.5
    change = thinning.common_change(cells, target, None, np.random.default_rng(0))
    out = thinning.applied(cells, change, np.zeros_like(cells), np.random.default_rng(1))
    assert out[:, 7].mean() == pytest.approx(0.5, rel=0.1)


@pytest.mark.parametrize("n", [20, 80])
def test_the_mean_of_a_gene_that_is_expressed_is_met_almost_exactly(screen: tuple[Pairs, Embeddings], n: int) -> None:
    """A count in one cell is worth another than in the next: a pair of them makes up for what single counts leave."""
    cells = screen[0].X[:n].toarray()
    rng = np.random.default_rng(0)
    target = np.maximum(cells.mean(axis=0, dtype=float) + rng.normal(scale=0.1, size=cells.shape[1]), 0.0)
    out = thinning.with_mean_effect(cells, target - cells.mean(axis=0, dtype=float), None, rng)
    off = np.abs(out.mean(axis=0, dtype=float) - target)
    count = np.log1p(thinning.unit_of(np.expm1(cells.astype(float)))).max() / n  # what one count adds to a mean at most
    is_expressed = (out > 0).mean(axis=0) > 0.3
    assert is_expressed.sum() > 20
    assert np.median(off[is_expressed]) < 0.01 * count
    assert off.max() <= 0.51 * count
