r"""Wide screens: seconds and peak memory of scores and tables of thousands of held-out perturbations.

    python workflow_tests/benchmarks/width_scale.py --perturbations 2500 10000

draws means of predicted and measured cells for so many held-out perturbations (2,500 genes) and times the metrics of
means, which compare every perturbation with all others. Then it draws scores of four models and times `benchmark`,
with comparisons, intervals and verdicts. Each is a process of its own. A Markdown table is printed.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
from harmonize_scale import SCRIPTS, measured

sys.path.insert(0, str(SCRIPTS))

from perturbflow.evaluation import METRICS, Scored
from perturbflow.evaluation.inputs import MOST_IN_DOUBLE

N_GENES = 2500
MODELS = {"no_change": 1.0, "additive": 0.8, "set_gp": 0.6, "technical_duplicate": 0.4}  # → distance from perfect
FAMILIES = {**dict.fromkeys(MODELS), **{name: name for name in MODELS}, "set_gp": "gaussian_process"}
TOLD = ("rank_cosine_off_target", "pds_cosine", "pds_l1")  # whose seconds are printed


def metrics_of(n: int) -> str:
    """Compute all metrics of means for n perturbations; return the seconds of some, as JSON."""
    rng, shape = np.random.default_rng(0), (n, N_GENES)
    dtype = np.float32 if n * N_GENES > MOST_IN_DOUBLE else float

    def drawn(scale: float) -> np.ndarray:
        return np.stack([rng.normal(0, scale, N_GENES) for _ in range(n)]).astype(dtype)

    control, effect = drawn(1.0), drawn(0.1)
    values = dict.fromkeys(Scored.__annotations__)
    values |= {"measured": control + effect, "control": control, "reference": control}
    values["predicted"] = control + 0.5 * effect + drawn(0.05)
    values |= {f"{side}_bulk": values[side] for side in ("predicted", "measured", "control")}
    values |= {f"{side}_bulk_variance": np.full(shape, 1e-3, dtype) for side in ("predicted", "measured", "control")}
    values |= {f"{side}_variance": np.full(shape, 0.3, dtype) for side in ("predicted", "measured")}
    values |= {
        "own_target": np.eye(*shape, dtype=bool) & (np.arange(N_GENES) < N_GENES // 2),
        "highly_expressed": np.arange(N_GENES) < 1000,
    }
    values |= {"labels": [f"G{i}" for i in range(n)], "n_cells": np.full(n, 50), "n_predicted": np.full(n, 100)}
    scored, seconds = Scored(**values), {}
    for name, metric in METRICS.items():
        if metric.needs in ("pseudobulk", "counts"):
            started = time.process_time()
            metric.function(scored)
            seconds[name] = time.process_time() - started
    return json.dumps({"all": sum(seconds.values()), **{name: seconds[name] for name in TOLD}})


def tables(folder: Path, n: int) -> list[object]:
    """Write scores of n perturbations by four models; return the arguments of the rule benchmark."""
    rng, files = np.random.default_rng(1), []
    of_perturbation = pd.DataFrame({"perturbation": [f"G{i}" for i in range(n)]}).assign(
        n_members=1, members_seen=0, n_cells=50, n_predicted=100, reliability=0.5, effect_size=1.0
    )
    for model, distance in MODELS.items():
        path = folder / "made" / "unseen_perturbation" / model / "seed_0" / "metrics.tsv"
        path.parent.mkdir(parents=True)
        place = {"dataset": "made", "split": "unseen_perturbation", "model": model, "seed": 0}
        of_metric = []
        for name, metric in METRICS.items():
            sign = -1 if metric.direction == "higher" else 1
            value = metric.perfect + sign * distance * rng.gamma(4, 0.05, n)
            of_metric.append(of_perturbation.assign(**place, metric=name, value=value))
        pd.concat(of_metric).to_csv(path, sep="\t", index=False)
        files.append(str(path))
    names = ("benchmark", "calibration", "comparisons", "strata", "verdicts", "contexts")
    given = {name: folder / f"{name}.tsv" for name in names} | dict.fromkeys(
        ("qualities", "audits", "harmonizations"), "[]"
    )
    given |= {"metrics": json.dumps(files), "families": json.dumps(FAMILIES), "least-difference": 0.02}
    return [word for key, value in given.items() for word in (f"--{key}", value)]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--perturbations", type=int, nargs="+", default=[2500, 10_000])
    parser.add_argument("--metrics-of", type=int, help="compute the metrics in this process, and no more")
    arguments = parser.parse_args()
    if arguments.metrics_of:
        print(metrics_of(arguments.metrics_of), file=sys.stderr)
        return
    print(f"| perturbations | metrics of means: CPU s ({', '.join(TOLD)}) | peak, MB | benchmark: CPU s | peak, MB |")
    print("| ---: | ---: | ---: | ---: | ---: |")
    for n in arguments.perturbations:
        _, cpu, peak = measured(__file__, "--metrics-of", n)
        with tempfile.TemporaryDirectory() as folder:
            _, of_tables, peak_of_tables = measured(SCRIPTS / "benchmark.py", *tables(Path(folder), n))
        print(f"| {n:,} | {cpu:.0f} | {peak:,.0f} | {of_tables:.0f} | {peak_of_tables:,.0f} |", flush=True)


if __name__ == "__main__":
    main()
