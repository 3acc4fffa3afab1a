"""Which experiment next, backwards: screens that were measured whole are measured again, a batch at a time.

Per seed three tenths of the perturbations are the test. A fifth of the rest is measured at the start; then strategies
choose a batch, `set_gp` learns again, and the test is predicted: its rmse, and the correlation of effects minus the
mean effect of all. Strategies: random, largest (predicted effect), coverage (the candidate farthest, by gene vectors,
from all that is measured), design (`counterfactuals.design.for_rest`, for the test).

    python workflow_tests/benchmarks/design_backwards.py results/DATASET/SPLIT --seeds 5

Needs pairs.h5ad and embeddings.parquet of a split; all its cells count as measured. Prints one table per aim: means
over seeds, and of the paired differences to random the mean with a 90 % interval of the mean.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

from perturbflow.counterfactuals.design import for_interactions, for_rest, for_target  # noqa: E402
from perturbflow.embeddings import Embeddings  # noqa: E402
from perturbflow.evaluation.similarity import correlation  # noqa: E402
from perturbflow.genes.symbols import entities_of, members_of  # noqa: E402
from perturbflow.models.closed_form.base import TrainingSet  # noqa: E402
from perturbflow.models.gaussian_process.posterior import Posterior  # noqa: E402
from perturbflow.models.gaussian_process.set_gp import SetGP  # noqa: E402
from perturbflow.pairs import Pairs  # noqa: E402

STRATEGIES = ("random", "largest", "coverage", "design")
SHARES = (0.2, 0.35, 0.5, 0.7)  # of the pool that is measured
LEVEL = 1.645


def whole(folder: Path) -> TrainingSet:
    """Return all perturbations of a split, as if they were all of training."""
    cells = Pairs.load(folder / "pairs.h5ad")
    cells = replace(cells, obs=cells.obs.assign(role="train"))
    return TrainingSet.of(cells, Embeddings.read(folder / "embeddings.parquet"), 0)


def learned(everything: TrainingSet, labels: list[str]) -> SetGP:
    """Return set_gp as it learns from some of the perturbations."""
    others = set(everything.effects.labels) - set(labels)
    halves = tuple(half.without(others) for half in everything.halves)
    return SetGP().learned(replace(everything, effects=everything.effects.without(others), halves=halves))


def features(everything: TrainingSet, labels: list[str]) -> np.ndarray:
    """Return the sum of the members' standardized vectors, (labels, dimensions)."""
    table = everything.embeddings.standardized(everything.effects.genes)
    return np.stack([table.reindex(members_of(label)).fillna(0.0).to_numpy().sum(axis=0) for label in labels])


def chosen(
    strategy: str, model: SetGP, everything: TrainingSet, known: list[str], pool: list[str], test: list[str], n: int,
    rng: np.random.Generator,
) -> list[str]:  # fmt: skip
    """Return the next batch."""
    if strategy == "random":
        return rng.choice(pool, n, replace=False).tolist()
    if strategy == "largest":
        sizes = np.linalg.norm(model.mean_effects(np.zeros((0, 0)), pool, 0), axis=1)
        return [pool[i] for i in np.argsort(-sizes, kind="stable")[:n]]
    if strategy == "coverage":
        X, Y = features(everything, pool), features(everything, known)
        distance = ((X[:, None] - Y[None]) ** 2).sum(axis=2).min(axis=1)
        batch: list[str] = []
        for _ in range(n):
            i = int(distance.argmax())
            batch.append(pool[i])
            distance = np.minimum(distance, ((X - X[i]) ** 2).sum(axis=1))
            distance[i] = -1.0
        return batch
    labels = [*pool, *test]
    is_pool = np.arange(len(labels)) < len(pool)
    return [labels[i] for i in for_rest(Posterior.of(model, labels), is_pool, ~is_pool, n).places]


def scores(model: SetGP, everything: TrainingSet, test: list[str]) -> tuple[float, float]:
    """Return rmse and mean centred correlation over the test, without perturbed genes."""
    predicted = model.mean_effects(np.zeros((0, 0)), test, 0)
    mean, errors, correlations = everything.effects.values.mean(axis=0), [], []
    for label, effect in zip(test, predicted, strict=True):
        kept = ~np.isin(everything.genes, entities_of(label))
        measured = everything.effects.of(label)[kept]
        errors.append(np.sqrt(((effect[kept] - measured) ** 2).mean()))
        correlations.append(correlation(effect[kept] - mean[kept], measured - mean[kept]))
    return float(np.mean(errors)), float(np.mean(correlations))


def curves(everything: TrainingSet, seed: int) -> pd.DataFrame:
    """Return scores of all strategies by the number of measured perturbations, aim rest."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(everything.effects.labels).tolist()
    n_test = round(0.3 * len(labels))
    test, pool = labels[:n_test], labels[n_test:]
    sizes = [max(4, round(share * len(pool))) for share in SHARES]
    start, rows = pool[: sizes[0]], []
    first = learned(everything, start)
    for strategy in STRATEGIES:
        known, model = list(start), first
        rows.append((seed, strategy, len(known), *scores(model, everything, test)))
        for size in sizes[1:]:
            rest = [label for label in pool if label not in known]
            known += chosen(strategy, model, everything, known, rest, test, size - len(known), rng)
            model = learned(everything, known)
            rows.append((seed, strategy, len(known), *scores(model, everything, test)))
    return pd.DataFrame(rows, columns=["seed", "strategy", "measured", "rmse", "centred"])


def reached(everything: TrainingSet, seed: int, batch: int = 3, rounds: int = 3) -> pd.DataFrame:
    """Return how near the best that was measured comes to a target, aim target.

    The target is the effect of one perturbation, without its own genes: their levels would give it away. It stays in
    the pool: the best reach is its own, 1 or more.
    """
    rng = np.random.default_rng(seed)
    labels = rng.permutation(everything.effects.labels).tolist()
    target, rest = labels[0], labels[1:]
    start = rest[: max(4, round(0.2 * len(labels)))]
    wanted = np.where(np.isin(everything.genes, entities_of(target)), 0.0, everything.effects.of(target))
    reach = dict(zip(everything.effects.labels, everything.effects.values @ wanted / (wanted @ wanted), strict=True))
    first, rows = learned(everything, start), []
    for strategy in ("random", "largest", "nearest", "design"):
        known, model = list(start), first
        for step in range(rounds):
            pool = [label for label in labels if label not in known]
            if strategy == "design":
                posterior, every = Posterior.of(model, pool), np.ones(len(pool), bool)
                best = max(reach[label] for label in known)
                known += [pool[i] for i in for_target(posterior, wanted, every, best, batch, seed).places]
            elif strategy == "nearest":  # the greatest predicted reach
                means = model.mean_effects(np.zeros((0, 0)), pool, 0) @ wanted
                known += [pool[i] for i in np.argsort(-means, kind="stable")[:batch]]
            else:
                known += chosen(strategy, model, everything, known, pool, [], batch, rng)
            rows.append((seed, strategy, batch * (step + 1), max(reach[label] for label in known), target in known))
            model = learned(everything, known) if step + 1 < rounds and strategy != "random" else model
    return pd.DataFrame(rows, columns=["seed", "strategy", "measured", "reach", "found"])


def interactions(everything: TrainingSet, seed: int) -> pd.DataFrame:
    """Return how many of the tenth of greatest interactions are among a fifth of the combinations, aim interactions.

    All singles are measured, and a fifth of the combinations.
    """
    rng, singles = np.random.default_rng(seed), everything.effects.single
    pairs = [p for p in everything.effects.labels if len(m := members_of(p)) > 1 and all(g in singles for g in m)]
    if len(pairs) < 20:
        return pd.DataFrame(columns=["seed", "strategy", "recall"])
    effects = {p: everything.effects.of(p) - sum(singles[g] for g in members_of(p)) for p in pairs}
    noise = dict(zip(everything.effects.labels, everything.pairs.squared_errors.sum(axis=1), strict=True))
    order = rng.permutation(pairs).tolist()
    n = round(0.2 * len(pairs))
    known, pool = order[:n], order[n:]
    size = {p: float((effects[p] ** 2).sum() - noise[p]) for p in pool}
    top = set(sorted(pool, key=lambda p: -size[p])[: max(1, round(0.1 * len(pool)))])
    model = learned(everything, [*singles, *known])
    posterior = Posterior.of(model, [*pool, *singles])
    sums = {p: np.linalg.norm(sum(singles[g] for g in members_of(p))) for p in pool}
    batches = {
        "random": rng.choice(pool, n, replace=False).tolist(),
        "largest": sorted(pool, key=lambda p: -sums[p])[:n],
        "design": [pool[i] for i in for_interactions(posterior, pool, n).places],
    }
    return pd.DataFrame(
        [(seed, name, len(top & set(batch)) / len(top)) for name, batch in batches.items()],
        columns=["seed", "strategy", "recall"],
    )


def beside_random(table: pd.DataFrame, value: str, keys: list[str]) -> pd.DataFrame:
    """Return means over seeds, and paired differences to random with a 90 % interval of their mean."""
    random = table[table["strategy"] == "random"].set_index(["seed", *keys])[value]
    index = pd.MultiIndex.from_frame(table[["seed", *keys]]) if keys else pd.Index(table["seed"])
    random.index = random.index if keys else random.index.get_level_values(0)
    table = table.assign(difference=table[value].to_numpy(float) - random.reindex(index).to_numpy(float))
    grouped = table.groupby(["strategy", *keys], sort=False)
    found = grouped[value].mean().to_frame("mean")
    found["minus random"] = grouped["difference"].mean()
    half = LEVEL * grouped["difference"].std() / np.sqrt(grouped.size())
    return found.assign(low=found["minus random"] - half, high=found["minus random"] + half)


def main() -> None:
    """Run all three aims on one split."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--aims", nargs="+", default=["rest", "target", "interactions"])
    options = parser.parse_args()
    everything = whole(options.folder)
    print(f"{options.folder}: {len(everything.effects.labels)} perturbations, {options.seeds} seeds", flush=True)
    if "interactions" in options.aims:
        table = pd.concat([interactions(everything, seed) for seed in range(4 * options.seeds)])
        if len(table):
            print(beside_random(table, "recall", []).round(3).to_string(), flush=True)
    if "target" in options.aims:
        table = pd.concat([reached(everything, seed) for seed in range(4 * options.seeds)])
        for value in ("reach", "found"):
            print(value, beside_random(table, value, ["measured"]).round(3).to_string(), sep="\n", flush=True)
    if "rest" in options.aims:
        table = pd.concat([curves(everything, seed) for seed in range(options.seeds)])
        for value in ("rmse", "centred"):
            print(value, beside_random(table, value, ["measured"]).round(4).to_string(), sep="\n", flush=True)


if __name__ == "__main__":
    main()
