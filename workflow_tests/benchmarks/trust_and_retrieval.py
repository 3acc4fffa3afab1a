"""Trust and retrieval of set_gp where inner folds hold out genes or combinations: promises kept, true ones found.

    python workflow_tests/benchmarks/trust_and_retrieval.py results/DATASET/SPLIT ... --figure a.png

Needs pairs.h5ad, embeddings.parquet and gene_vectors.parquet of a split; all its cells count as training.

Trust, per novelty: median promised and kept correlation (whole, and beyond the mean effect of training), and the rank
correlation with what was kept of: the promise, agreement among neighbours, and agreement among sources.

Retrieval: the measured effect of a held-out perturbation is the target state. Candidates for a gene are all genes that
training never perturbed, at most 3,000 of them; for a combination all pairs of perturbed genes that are not measured.
Printed: how often the true one is among the best tenth by cosine, with a 90 % interval; chance is a tenth.
"""

import argparse
import itertools
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from scipy.stats import spearmanr

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

from perturbflow.colours import COLOURS  # noqa: E402
from perturbflow.counterfactuals.search import scores  # noqa: E402
from perturbflow.counterfactuals.trust import KINDS, Neighbourhood  # noqa: E402
from perturbflow.embeddings import Embeddings  # noqa: E402
from perturbflow.evaluation.bootstrap import mean_with_interval  # noqa: E402
from perturbflow.genes.symbols import SEPARATOR, entities_of  # noqa: E402
from perturbflow.models.calibration import Calibration, Scale, novelty_of  # noqa: E402
from perturbflow.models.closed_form.base import TrainingSet  # noqa: E402
from perturbflow.models.effects import Effects  # noqa: E402
from perturbflow.models.gaussian_process.set_gp import SetGP  # noqa: E402
from perturbflow.pairs import Pairs  # noqa: E402

MOST_CANDIDATES = 3000
LEAST_SHOWN = 6  # perturbations of one novelty
NO_CELLS = np.zeros((0, 0))


def whole(folder: Path) -> TrainingSet:
    """Return all perturbations of a split, as if they were all of training."""
    cells = Pairs.load(folder / "pairs.h5ad")
    cells = replace(cells, obs=cells.obs.assign(role="train"))
    return TrainingSet.of(cells, Embeddings.read(folder / "embeddings.parquet"), 0)


def agreements(inner: TrainingSet, vectors: Embeddings, labels: list[str]) -> np.ndarray:
    """Return agreement of neighbours and of sources, (labels, 2)."""
    known = inner.pairs.select(np.isin(inner.pairs.labels, [*inner.effects.labels, "control"]))
    near = Neighbourhood(known, vectors)
    return np.array([near.of(label)[:2] for label in labels])


class Candidates:
    """Predicted effects of all that could be in place of a held-out perturbation, for one fold."""

    def __init__(self, model: SetGP, labels: list[str], genes: list[str]) -> None:
        blocks = [labels[i : i + 500] for i in range(0, len(labels), 500)]
        self.effects = np.concatenate([model.mean_effects(NO_CELLS, block, 0) for block in blocks])
        self.is_target = np.stack([np.isin(genes, entities_of(label)) for label in labels])
        self.labels = labels

    def rank(self, label: str, own: np.ndarray, target: np.ndarray, genes: list[str]) -> float:
        """Return the share of candidates that score higher towards the target than the true one."""
        is_own = np.isin(genes, entities_of(label))
        wanted = np.where(is_own, 0.0, target)[None]
        found = scores(self.effects, wanted, self.is_target)[0]
        others = [i for i, other in enumerate(self.labels) if other != label]
        return float((found[others] > scores(own[None], wanted, is_own[None])[0, 0]).mean())


def held_out(folder: Path) -> pd.DataFrame:
    """Return one row per held-out perturbation and fold."""
    everything, rng = whole(folder), np.random.default_rng(0)
    all_genes = Embeddings.read(folder / "gene_vectors.parquet")
    names = all_genes.table.index.tolist()
    everyone = rng.choice(names, min(len(names), MOST_CANDIDATES), replace=False).tolist()
    vectors = everything.embeddings.with_genes_of(all_genes, everyone)
    scale, tables = Scale.of(everything.pairs, everything.effects), []
    for of_genes in (True, False):
        rounds = itertools.islice(everything.rounds(of_genes=of_genes, one_by_one=False), 0, None, 2)
        for inner, held in rounds:
            model = SetGP().learned(inner)
            model.add_genes(inner.pairs, vectors, 0)
            tables.append(of_fold(everything, inner, held, model, scale, vectors, everyone))
    return pd.concat(tables, ignore_index=True).assign(screen=folder.parent.name)


def of_fold(
    everything: TrainingSet, inner: TrainingSet, held: Effects, model: SetGP, scale: Scale, vectors: Embeddings,
    everyone: list[str],
) -> pd.DataFrame:  # fmt: skip
    """Return the rows of one fold."""
    measured, known = set(inner.effects.labels), set(inner.effects.entities)
    novelties = [novelty_of(label, measured, known) for label in held.labels]
    predicted, variances = model.mean_effects(NO_CELLS, held.labels, 0), model.uncertainties(held.labels)
    sampling = [everything.sampling_of(label, None) for label in held.labels]
    of_fold = replace(scale, mean=inner.effects.values.astype(float).mean(axis=0))
    found = Calibration.of(
        held.labels, novelties, predicted, held.values, sampling, of_fold, everything.genes, list(variances)
    )
    genes, pairs = everything.genes, itertools.combinations(sorted(known), 2)
    unseen = [gene for gene in everyone if gene not in known]
    new = sorted({SEPARATOR.join(pair) for pair in pairs} - measured)
    candidates = {}
    for novelty, labels in (("unseen gene", unseen), ("seen", new)):
        if novelty in novelties:
            candidates[novelty] = Candidates(model, labels, genes)
    ranks = [
        candidates[novelty].rank(label, own, target, genes) if novelty in candidates else np.nan
        for label, novelty, own, target in zip(held.labels, novelties, predicted, held.values, strict=True)
    ]
    near = agreements(inner, vectors, held.labels)
    table = pd.DataFrame(found.accuracy, columns=["promised", "kept", "specific"])
    return table.assign(label=held.labels, novelty=novelties, neighbours=near[:, 0], sources=near[:, 1], rank=ranks)


def report(table: pd.DataFrame) -> None:
    """Print both tables of one screen."""
    for novelty, rows in table.groupby("novelty"):
        if len(rows) < LEAST_SHOWN:
            continue
        orders = []
        for column in ("promised", "neighbours", "sources"):
            known = rows[rows[column].notna()]
            rho = spearmanr(known[column], known["kept"]).statistic if len(known) > 5 else np.nan
            orders.append(f"{column} {rho:.2f}")
        specific = mean_with_interval(rows["specific"].tolist())
        print(
            f"{table['screen'].iloc[0]}, {KINDS[str(novelty)]}, {len(rows)}: promised {rows['promised'].median():.2f}, "
            f"kept {rows['kept'].median():.2f}, beyond the mean {specific['mean']:.2f} ({specific['low']:.2f} to "
            f"{specific['high']:.2f}); Spearman with kept: {', '.join(orders)}"
        )
        ranked = rows["rank"].dropna()
        if len(ranked):
            best = mean_with_interval((ranked < 0.1).astype(float).tolist())
            print(
                f"    retrieval of {len(ranked)}: in the best tenth {best['mean']:.2f} ({best['low']:.2f} to "
                f"{best['high']:.2f}), chance 0.10; median rank {ranked.median():.2f}, chance 0.50",
                flush=True,
            )


def bins_of(n: int) -> int:
    """Return how many medians are drawn of n perturbations: one per ten, at most five."""
    return max(1, min(5, n // 10))


def draw(table: pd.DataFrame, path: Path) -> None:
    """Plot promised against kept, a panel per screen: perturbations, and medians over equal numbers of them."""
    screens = list(dict.fromkeys(table["screen"]))
    figure = Figure(figsize=(3.2 * len(screens), 3.2), layout="constrained")
    for axes, screen in zip(np.atleast_1d(figure.subplots(1, len(screens), sharey=True)), screens, strict=True):
        axes.plot([0, 1], [0, 1], color="#888888", linewidth=0.8)
        for i, novelty in enumerate(sorted(set(table["novelty"]))):
            rows = table[(table["screen"] == screen) & (table["novelty"] == novelty)]
            if len(rows) < LEAST_SHOWN:
                continue
            axes.plot(
                rows["promised"], rows["kept"], "o", markersize=2, alpha=0.35, color=COLOURS[i], markeredgewidth=0
            )
            # Medians of equal numbers: the promise is kept where they lie on the diagonal.
            of_bin = np.array_split(rows.sort_values("promised")[["promised", "kept"]].to_numpy(), bins_of(len(rows)))
            medians = np.array([np.median(one, axis=0) for one in of_bin])
            axes.plot(*medians.T, "o-", markersize=5, linewidth=1, color=COLOURS[i], label=KINDS[novelty])
        axes.set(title=screen, xlabel="promised correlation", xlim=(0, 1), ylim=(-0.6, 1))
        axes.legend(frameon=False, fontsize=6, loc="lower right")
    figure.get_axes()[0].set_ylabel("kept")
    figure.savefig(path, dpi=90)


def main() -> None:
    """Run on several splits."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--figure", type=Path)
    options = parser.parse_args()
    tables = []
    for folder in options.folders:
        tables.append(held_out(folder))
        report(tables[-1])
    if options.figure:
        draw(pd.concat(tables), options.figure)


if __name__ == "__main__":
    main()
