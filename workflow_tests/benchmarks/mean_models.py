r"""Mean effects by closed forms, and by those of another version, on the same splits.

No cells are predicted, so it takes minutes.

    python workflow_tests/benchmarks/mean_models.py results/carpool:unseen_combination \
        results/renge2023:unseen_context --seeds 10 11 12 \
        [--go human_gene2go.tsv.gz --ppi edges.tsv.gz] [--models set_gp additive] \
        [--beside OTHER/scripts:stacked,transfer] [--figure doubles.png]

Of harmonized screens (`snakemake data`), each split by several seeds; `unseen_context` holds out each batch in turn
instead. Models learn from training and validation perturbations. Scores are of the whole measured effect of a test
perturbation, off target (its own genes left out): root mean squared error, Pearson's r with the effect, the same minus
the mean effect of training, and `pds_cosine`, the share of other test perturbations whose measured effect is less
alike. Printed per stratum: means, and the paired difference of set_gp to the reference (the first model of --beside,
else the first other one) and to the best other model by that score, chosen with hindsight, with 95 % intervals over
perturbations and splits; above zero set_gp is better. --beside takes models from another checkout of this repository:
its splits and pairs are those of this one. --figure plots six held-out doubles with posterior intervals. --intervals
prints instead how wide conformal intervals are in units of the posterior deviation and of one spread for all, at what
coverage.
"""

import argparse
import json
import os
import pickle
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, os.environ.get("PERTURBFLOW_SCRIPTS") or str(ROOT / "scripts"))

from perturbflow.embeddings import Embeddings, coexpression, rows_of  # noqa: E402
from perturbflow.evaluation.bootstrap import estimate  # noqa: E402
from perturbflow.evaluation.similarity import correlation  # noqa: E402
from perturbflow.genes.symbols import entities_of, members_of  # noqa: E402
from perturbflow.models.base import build  # noqa: E402
from perturbflow.models.closed_form.base import TrainingSet  # noqa: E402
from perturbflow.pairs import Pairs, pair  # noqa: E402
from perturbflow.registry.families import FAMILIES  # noqa: E402
from perturbflow.splits.split import split  # noqa: E402

MODELS = (
    "perturbed_mean",
    "additive",
    "shrunken_additive",
    "latent_additive",
    "ridge",
    "nearest_perturbation",
    "covariance_response",
    "transfer",
)
SCORES = {"rmse": -1, "r": 1, "centred": 1, "pds_cosine": 1}
FRACTIONS = {"unseen_perturbation": 0.25, "unseen_combination": 0.5}


def prepared(folder: Path, kind: str, here: Path, seed: int, held_out: str | None) -> Pairs:
    """Divide a screen and make its pairs."""
    spec = {"kind": kind, "name": kind, "validation_fraction": 0.1, "seed": seed}
    spec |= {"covariate": "batch", "held_out": [held_out]} if held_out else {"test_fraction": FRACTIONS[kind]}
    split(folder / "harmonized.h5ad", folder / "harmonization.json", here / "split.json", kind, spec)
    pair(folder / "harmonized.h5ad", here / "split.json", here / "pairs.h5ad", 2000)
    return Pairs.read(here / "pairs.h5ad")


def vectors(cells: Pairs, priors: dict[str, pd.DataFrame]) -> Embeddings:
    """Return vectors of the perturbed genes."""
    genes = sorted({gene for label in cells.perturbations for gene in members_of(label)})
    tables = [rows_of(table, genes).add_prefix(f"{name}:") for name, table in priors.items()]
    return Embeddings(pd.concat([coexpression(cells, genes), *tables], axis=1).astype(np.float32))


def predicted(cells: Pairs, embeddings: Embeddings, models: list[str]) -> dict[str, np.ndarray]:
    """Return predicted effects of the test perturbations by model, (perturbations, genes) each."""
    training, test = TrainingSet.of(cells.fitted_on("test"), embeddings, 0), cells.roles("test")
    found = {}
    for name in models:
        family = "gaussian_process" if name == "set_gp" else name
        model = build(FAMILIES[family].implementation, {}).learned(training)
        looks = hasattr(model, "effect_in") and hasattr(test, "context_of")
        found[name] = np.stack(
            [
                model.effect_in(label, test.context_of(test.cells_of(label))) if looks else model.effect(label)
                for label in test.perturbations
            ]
        )
    return found


def scored(cells: Pairs, effects: dict[str, np.ndarray]) -> list[dict]:
    """Return one row per model × test perturbation."""
    known, test = cells.fitted_on("test"), cells.roles("test")
    labels = test.perturbations
    truth = np.stack([test.effect_of(label) for label in labels])
    reference = np.mean([known.effect_of(label) for label in known.perturbations], axis=0)
    entities = {gene for label in known.perturbations for gene in entities_of(label)}
    others = ~np.isin(test.genes, sorted(entities | {gene for label in labels for gene in entities_of(label)}))

    def unit(rows: np.ndarray) -> np.ndarray:
        return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)

    rows = []
    for model, values in effects.items():
        cosine = unit(values[:, others]) @ unit(truth[:, others]).T
        right = np.diag(cosine)[:, None]
        ranks = 1 - ((cosine > right).sum(axis=1) + 0.5 * ((cosine == right).sum(axis=1) - 1)) / max(len(labels) - 1, 1)
        for i, label in enumerate(labels):
            kept = ~np.isin(test.genes, entities_of(label))
            guess, measured = values[i, kept], truth[i, kept]
            n_unseen = sum(gene not in entities for gene in entities_of(label))
            kind = "single" if len(members_of(label)) == 1 else "combination"
            rows.append(
                {
                    "stratum": f"{kind}, {n_unseen} unseen" if n_unseen else f"{kind}, seen",
                    "model": model,
                    "perturbation": label,
                    "rmse": float(np.sqrt(((guess - measured) ** 2).mean())),
                    "r": correlation(guess, measured),
                    "centred": correlation(guess - reference[kept], measured - reference[kept]),
                    "pds_cosine": float(ranks[i]),
                }
            )
    return rows


def elsewhere(scripts: str, models: list[str], cells: Pairs, embeddings: Embeddings) -> dict[str, np.ndarray]:
    """Return what models of another checkout predict of the same pairs, under names that end with '*'."""
    with tempfile.TemporaryDirectory() as folder:
        given = Path(folder) / "given.pkl"
        given.write_bytes(pickle.dumps((vars(cells), embeddings.table)))
        environment = {**os.environ, "PERTURBFLOW_SCRIPTS": scripts}
        subprocess.run([sys.executable, __file__, "--worker", folder, *models], check=True, env=environment)
        return {f"{name}*": np.load(Path(folder) / f"{name}.npy") for name in models}


def worker(folder: Path, models: list[str]) -> None:
    """Predict with the models of this process's package."""
    fields, table = pickle.loads((folder / "given.pkl").read_bytes())
    cells = Pairs(**{name: fields[name] for name in ("X", "obs", "genes", "control_index", "rows")})
    for name, effects in predicted(cells, Embeddings(table), models).items():
        np.save(folder / f"{name}.npy", effects)


def table(rows: pd.DataFrame, reference: str) -> None:
    """Print the strata of one screen × kind."""
    for stratum, of in rows.groupby("stratum"):
        cases = of.assign(case=of["split"] + of["perturbation"])
        n = cases["case"].nunique()
        if n < 3:
            continue
        print(
            f"\n{stratum}, {n} cases\n\n| model | " + " | ".join(SCORES) + " |\n" + "| --- " * (len(SCORES) + 1) + "|"
        )
        wide = {score: cases.pivot_table(index="case", columns="model", values=score) for score in SCORES}
        for model in of["model"].unique():
            print(f"| {model} | " + " | ".join(f"{wide[score][model].mean():.4f}" for score in SCORES) + " |")
        for name in ("reference", "best other"):
            cells = []
            for score, sign in SCORES.items():
                others = (sign * wide[score].drop(columns="set_gp")).mean()
                other = reference if name == "reference" else str(others.idxmax())
                gain = estimate((sign * (wide[score]["set_gp"] - wide[score][other])).to_numpy()[None, None])
                cells.append(f"{gain.mean[0]:+.4f} ({gain.low[0]:+.4f}, {gain.high[0]:+.4f}) {other}")
            print(f"| *set_gp minus {name}* | " + " | ".join(cells) + " |", flush=True)


def figure(cells: Pairs, embeddings: Embeddings, path: Path) -> None:
    """Plot predicted against measured effects of six held-out doubles.

    Their 90 % posterior intervals are scaled by held-out perturbations.
    """
    from matplotlib.figure import Figure

    from perturbflow.models.calibration import Scale, measured_by, novelty_of
    from perturbflow.models.gaussian_process.set_gp import SetGP

    known, test = cells.fitted_on("test"), cells.roles("test")
    training = TrainingSet.of(known, embeddings, 0)
    model = SetGP().learned(training)
    calibration, scale = model.held_out(known, embeddings, 0), Scale.of(training.pairs, training.effects)
    doubles = [label for label in test.perturbations if len(members_of(label)) == 2]
    chosen = [doubles[i] for i in np.linspace(0, len(doubles) - 1, 6).round().astype(int)]
    panels = (canvas := Figure(figsize=(11, 7.4), layout="constrained")).subplots(2, 3).ravel()
    for panel, label in zip(panels, chosen, strict=True):
        context, measured = test.context_of(test.cells_of(label)), test.effect_of(label)
        effect = model.effect_in(label, context)
        case = novelty_of(label, set(training.effects.labels), set(training.effects.entities))
        half = calibration.for_novelty(case).reach(0.9) * scale.at(
            measured_by(test, label), model.uncertainty(label, context)
        )
        kept = ~np.isin(test.genes, entities_of(label))
        held = float((np.abs(measured - effect) <= half)[kept].mean())
        panel.errorbar(
            effect[kept],
            measured[kept],
            xerr=half[kept],
            fmt="o",
            markersize=2,
            linewidth=0.4,
            alpha=0.35,
            color="#0072B2",
            ecolor="#999999",
        )
        panel.axline((0, 0), slope=1, color="#444444", linewidth=0.6)
        panel.set_title(
            f"{label}\nr = {correlation(effect[kept], measured[kept]):.2f}, {100 * held:.0f} % of genes in the 90 % "
            "interval",
            fontsize=8,
        )
        panel.set_xlabel("predicted effect, log1p")
        panel.set_ylabel("measured effect, log1p")
    canvas.savefig(path, dpi=110)


def intervals(cells: Pairs, embeddings: Embeddings) -> list[dict]:
    """Return coverage and width of 90 % intervals per test perturbation, and both errors.

    Intervals are in units of the posterior, and in units of one spread for all genes.
    """
    from perturbflow.models.calibration import Scale, measured_by, novelty_of
    from perturbflow.models.gaussian_process.set_gp import SetGP

    class OneSpread(SetGP):
        """The same model, without an uncertainty of its own."""

        def uncertainty(self, *_: object, **__: object) -> None:
            """Print nothing."""

    known, test = cells.fitted_on("test"), cells.roles("test")
    training = TrainingSet.of(known, embeddings, 0)
    scale, rows = Scale.of(training.pairs, training.effects), []
    measured, entities = set(training.effects.labels), set(training.effects.entities)
    for units, model in (("posterior", SetGP()), ("one spread", OneSpread())):
        model.learned(training)
        calibration = model.held_out(known, embeddings, 0)
        for label in test.perturbations:
            context, kept = test.context_of(test.cells_of(label)), ~np.isin(test.genes, entities_of(label))
            off = np.abs(test.effect_of(label) - model.effect_in(label, context))[kept]
            unit = scale.at(measured_by(test, label), model.uncertainty(label, context))[kept]
            half = calibration.for_novelty(novelty_of(label, measured, entities)).reach(0.9) * unit
            rows.append({"units": units, "perturbation": label, "coverage": float((off <= half).mean()),
                         "width": float(2 * half.mean()),
                         "promised": float(np.sqrt((unit**2).mean())),
                         "error": float(np.sqrt((off**2).mean()))})  # fmt: skip
    return rows


def table_of_intervals(rows: pd.DataFrame) -> None:
    """Print means over splits and perturbations, and rank correlations of promised and actual errors in splits."""
    print(
        "\n| 90 % intervals in units of | coverage | width | promised and actual errors, rank correlation |\n"
        + "| --- " * 4
        + "|"
    )
    for units, of in rows.groupby("units", sort=False):
        together = of.groupby("split")[["promised", "error"]].apply(
            lambda one: one["promised"].corr(one["error"], method="spearman")
        )
        print(
            f"| {units} | {of['coverage'].mean():.3f} | {of['width'].mean():.4f} | {together.mean():.2f} |", flush=True
        )


def main() -> None:
    """Print the tables of every screen."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("screens", nargs="*", help="folder of a harmonized screen, a colon and the kind of split")
    parser.add_argument("--seeds", nargs="+", type=int, default=[10, 11, 12])
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--go", type=Path)
    parser.add_argument("--ppi", type=Path)
    parser.add_argument("--beside", help="SCRIPTS:MODEL,MODEL of another checkout")
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--intervals", action="store_true", help="tables of intervals in place of those of models")
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(Path(arguments.worker[0]), arguments.worker[1:])
        return
    from perturbflow.priors.annotations import annotation_vectors
    from perturbflow.priors.interactions import interaction_vectors

    priors = {}
    if arguments.go:
        priors["go"] = annotation_vectors({"file": arguments.go})
    if arguments.ppi:
        priors["ppi"] = interaction_vectors({"file": arguments.ppi})
    for screen in arguments.screens:
        folder, _, kind = screen.partition(":")
        rows, splits = [], [(seed, None) for seed in arguments.seeds]
        if kind == "unseen_context":
            import anndata as ad

            splits = [
                (0, str(batch))
                for batch in sorted(ad.read_h5ad(Path(folder) / "harmonized.h5ad", backed="r").obs["batch"].unique())
            ]
        for seed, held_out in splits:
            with tempfile.TemporaryDirectory() as here:
                cells = prepared(Path(folder), kind, Path(here), seed, held_out)
            embeddings = vectors(cells, priors)
            if arguments.intervals:
                rows += [{**row, "split": f"{held_out or seed}"} for row in intervals(cells, embeddings)]
                continue
            names = [name for name in arguments.models if name != "transfer" or held_out]
            effects = predicted(cells, embeddings, ["set_gp", *names])
            if arguments.beside:
                scripts, _, models = arguments.beside.partition(":")
                effects |= elsewhere(
                    scripts, [name for name in models.split(",") if name != "transfer" or held_out], cells, embeddings
                )
            rows += [{**row, "split": f"{held_out or seed}: "} for row in scored(cells, effects)]
            if arguments.figure and not held_out:
                figure(cells, embeddings, arguments.figure)
                arguments.figure = None
        found = pd.DataFrame(rows)
        print(
            f"\n**{Path(folder).name}, {kind}**, {json.dumps([held_out or seed for seed, held_out in splits])}; "
            f"sources {', '.join(embeddings.sources)}"
        )
        if arguments.intervals:
            table_of_intervals(found)
            continue
        reference = f"{arguments.beside.partition(':')[2].split(',')[0]}*" if arguments.beside else names[0]
        table(found, reference)


if __name__ == "__main__":
    main()
