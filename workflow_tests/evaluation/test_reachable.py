"""Ceilings: without its noise, a duplicate has the score of the true mean where the truth is known."""

from dataclasses import replace

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse, stats

from perturbflow.controls import match_controls
from perturbflow.evaluation import METRICS, Scored, score_inputs
from perturbflow.evaluation.table import scores
from perturbflow.pairs import Pairs

N_GENES, N_PERTURBATIONS, ROUNDS = 150, 30, 6
CORRECTED = [name for name, metric in METRICS.items() if metric.correction]


def known_screen(seed: int, n_a: int, n_b: int) -> tuple[Pairs, np.ndarray]:
    """Return cells of perturbations of known means, and E log1p(x) of each, (P, genes).

    Some perturbations do little, some much, and each stills its own gene.
    """
    rng = np.random.default_rng(seed)
    level = rng.gamma(1.0, 2.0, N_GENES)
    size = np.exp(rng.normal(0.0, 0.6, (N_PERTURBATIONS, 1)))
    effect = 0.25 * size * rng.normal(size=(N_PERTURBATIONS, N_GENES)) * (rng.random((N_PERTURBATIONS, N_GENES)) < 0.3)
    rate = level * np.exp(effect)
    rate[np.arange(N_PERTURBATIONS), np.arange(N_PERTURBATIONS)] *= 0.2
    values = np.arange(400)
    truth = (stats.poisson.pmf(values, rate[..., None]) * np.log1p(values)).sum(axis=-1)

    counts, rows = [], []
    for role in ("train", "test"):
        counts.append(rng.poisson(level, (300, N_GENES)))
        rows += [("control", role, "")] * 300
    counts.append(rng.poisson(level * np.exp(rng.normal(0.0, 0.2, N_GENES)), (60, N_GENES)))
    rows += [("g149", "train", "")] * 60
    for p, mean in enumerate(rate):
        counts.append(rng.poisson(mean, (n_a + n_b, N_GENES)))
        rows += [(f"g{p}", "test", "a")] * n_a + [(f"g{p}", "test", "b")] * n_b
    obs = pd.DataFrame(rows, columns=["perturbation", "role", "half"]).assign(cell_type="t", batch="b")
    obs["is_control"] = obs["perturbation"] == "control"
    index, _ = match_controls(obs, 1, 0)
    X = sparse.csr_matrix(np.log1p(np.vstack(counts)).astype(np.float32))
    return Pairs(X, obs, [f"g{i}" for i in range(N_GENES)], index, np.arange(len(obs))), truth


def duplicate(cells: Pairs, **declared: object) -> ad.AnnData:
    """Return half 'a' as predicted cells."""
    half = (cells.obs["half"] == "a").to_numpy()
    obs = cells.obs.loc[half, ["perturbation", "batch", "cell_type"]].set_axis([f"p{i}" for i in range(half.sum())])
    told = {"role": "test", "starts_from_controls": False, **declared}
    return ad.AnnData(cells.X[half], obs=obs, var=pd.DataFrame(index=cells.genes), uns={"perturbflow": told})


def rounds(n_a: int, n_b: int) -> list[tuple[Scored, Scored]]:
    """Return several times what the duplicate and what the true mean is scored by."""
    found = []
    for seed in range(ROUNDS):
        cells, truth = known_screen(seed, n_a, n_b)
        scored = score_inputs(duplicate(cells), cells, frozenset({"pseudobulk"}))
        order = [int(label[1:]) for label in scored.labels]
        found.append((scored, replace(scored, predicted=truth[order])))
    return found


@pytest.fixture(scope="module", params=[(24, 24), (15, 45)], ids=["equal halves", "unequal halves"])
def known(request: pytest.FixtureRequest) -> list[tuple[Scored, Scored]]:
    return rounds(*request.param)


@pytest.mark.parametrize("name", CORRECTED)
def test_without_its_noise_the_duplicate_scores_as_the_true_mean_does(
    name: str, known: list[tuple[Scored, Scored]]
) -> None:
    metric = METRICS[name]
    reached, true, raw = (
        np.concatenate([score(here) for here in known])
        for score in (
            lambda s: metric.reachable(s[0]),
            lambda s: metric.function(s[1]),
            lambda s: metric.function(s[0]),
        )
    )
    bias = reached - true
    sampling_error = bias.std() / np.sqrt(len(bias))
    assert abs(bias.mean()) < 3 * sampling_error
    assert abs((raw - true).mean()) > 5 * sampling_error, "the duplicate itself is far from it"


def test_scores_of_the_perfect_mean_are_those_of_the_duplicate_where_there_is_no_formula() -> None:
    cells, _ = known_screen(0, 12, 12)
    seen = dict.fromkeys(duplicate(cells).obs["perturbation"], 0)
    raw, reached = (
        scores(duplicate(cells, noise_removed=told), cells, seen).set_index(["metric", "perturbation"])["value"]
        for told in (False, True)
    )
    loss = {
        name: [METRICS[name].loss(of[name].mean()) for of in (reached, raw)]
        for name in METRICS
        if not raw[name].isna().all()
    }
    assert all((of[0] < of[1]) if name in CORRECTED else of[0] == of[1] for name, of in loss.items()), loss
    assert {"error", "effect", "weighted", "on_target"} == {METRICS[name].family for name in CORRECTED}
