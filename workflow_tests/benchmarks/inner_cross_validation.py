"""Compare models and hyper-parameters by inner cross-validation: the split's test perturbations are never touched.

    python workflow_tests/benchmarks/inner_cross_validation.py results/norman_mini unseen_combination \
        --folds 3 --models additive scppdm --variant 'scppdm {"n_steps": 1000}'

The perturbations of training and validation are divided into folds; each fold in turn is predicted from the others,
with genes, normalization and embeddings chosen anew. Cells of the outer test perturbations are left out altogether.
"""

import argparse
import json
import logging
import sys
import tempfile
import time
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import yaml

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

from perturbflow.embeddings import embeddings  # noqa: E402
from perturbflow.evaluation import METRICS, score_inputs  # noqa: E402
from perturbflow.genes.symbols import SEPARATOR, entities_of, members_of  # noqa: E402
from perturbflow.io.files import read_json, write_json  # noqa: E402
from perturbflow.pairs import Pairs, pair  # noqa: E402
from perturbflow.predict import predict  # noqa: E402
from perturbflow.registry.config import complete  # noqa: E402
from perturbflow.registry.families import FAMILIES  # noqa: E402
from perturbflow.splits.split import split  # noqa: E402
from perturbflow.train import train  # noqa: E402


def inner_folds(outer: dict, n_folds: int) -> list[dict[str, list[str]]]:
    """Return train and test lists of each fold, over the perturbations that are not the outer test's."""
    usable = outer["perturbations"]["train"] + outer["perturbations"]["validation"]
    rng = np.random.default_rng(1)
    if outer["spec"]["kind"] == "unseen_combination":
        named = {label: [SEPARATOR.join(entities_of(label))] for label in usable if len(members_of(label)) > 1}
    else:
        named = {label: entities_of(label) for label in usable}
    units = {unit for of in named.values() for unit in of}
    tested = {unit: [label for label, of in named.items() if unit in of] for unit in units}
    folds = []
    for chosen in np.array_split(rng.permutation(sorted(units)), n_folds):
        test = sorted({label for unit in chosen for label in tested[unit]})
        folds.append({"train": sorted(set(usable) - set(test)), "validation": [], "test": test})
    return folds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="results/{dataset} of a finished run")
    parser.add_argument("split", help="name of the outer split")
    parser.add_argument("--folds", type=int, default=3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--models", nargs="+", default=[], help="names from config/models.yaml, with their params")
    parser.add_argument("--variant", action="append", default=[], help="'NAME {JSON of params that differ}'")
    parser.add_argument("--only-fold", type=int, default=None)
    parser.add_argument("--out", type=Path, default=None, help="TSV of every score")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)

    config = {}
    for name in ("config", "datasets", "splits", "models"):
        config.update(yaml.safe_load((ROOT / f"config/{name}.yaml").read_text()))
    config |= {"counterfactuals": {}, "effort": "standard"}
    models = complete(config)["models"]
    wanted = [(name, {}) for name in arguments.models]
    wanted += [(text.split(" ", 1)[0], json.loads(text.split(" ", 1)[1])) for text in arguments.variant]

    outer = read_json(arguments.folder / arguments.split / "split.json")
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        for i, roles in enumerate(inner_folds(outer, arguments.folds)):
            if arguments.only_fold not in (None, i):
                continue
            fold = Path(temporary) / f"fold_{i}"
            fold.mkdir()
            write_json(fold / "roles.json", roles)
            spec = {"kind": "file", "path": str(fold / "roles.json"), "validation_fraction": 0.1, "seed": 0}
            split(
                arguments.folder / "harmonized.h5ad",
                arguments.folder / "harmonization.json",
                fold / "split.json",
                "inner",
                spec,
            )
            pair(arguments.folder / "harmonized.h5ad", fold / "split.json", fold / "pairs.h5ad", 2000)
            embeddings(fold / "pairs.h5ad", fold / "embeddings.parquet", ["coexpression"])
            write_json(fold / "audit.json", {"split_sha256": ""})
            cells = Pairs.read(fold / "pairs.h5ad")
            for name, differing in wanted:
                for seed in arguments.seeds:
                    family = FAMILIES[models[name]["family"]]
                    params = {**models[name]["params"], **differing}
                    started = time.perf_counter()
                    model = fold / family.artefact
                    train(
                        fold / "pairs.h5ad",
                        fold / "embeddings.parquet",
                        fold / "audit.json",
                        model,
                        fold / "run.json",
                        family.implementation,
                        params,
                        seed,
                        "cpu",
                        1,
                    )
                    predict(
                        fold / "pairs.h5ad", model, fold / "predictions.h5ad", family.implementation, params, seed, 1000
                    )
                    seconds = time.perf_counter() - started
                    scored = score_inputs(ad.read_h5ad(fold / "predictions.h5ad"), cells)
                    for metric in METRICS.values():
                        for label, value in zip(scored.labels, metric.function(scored), strict=True):
                            rows.append(
                                (
                                    i,
                                    f"{name} {json.dumps(differing)}" if differing else name,
                                    seed,
                                    label,
                                    metric.name,
                                    value,
                                )
                            )
                    rows.append((i, rows[-1][1], seed, "", "seconds", seconds))
                    print(f"fold {i} {rows[-1][1]} seed {seed}: {seconds:.0f} s", file=sys.stderr, flush=True)
    table = pd.DataFrame(rows, columns=["fold", "model", "seed", "perturbation", "metric", "value"])
    if arguments.out:
        table.to_csv(arguments.out, sep="\t", index=False)
    wide = table.pivot_table(index="model", columns="metric", values="value", sort=False)
    print(wide.round(4).to_string())


if __name__ == "__main__":
    main()
