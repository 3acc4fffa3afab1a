r"""The whole chain at full size, from a raw file to the report: seconds, peak memory and bytes of every step.

    python workflow_tests/benchmarks/chain_scale.py --cells 150000 450000 2000000 --perturbations 800 2000 10000 \
        --folder /a/disk/with/room

makes sparse screens (3,000 genes, about 780 of them expressed per cell, 48 batches) and runs the scripts of the
workflow on each, with the parameters of the registry. Every step is a process of its own. A Markdown table is printed:
a row per step with wall and CPU seconds, peak memory beside the memory that its rule asks for, and bytes; after two
sizes the exponent of CPU seconds and of peak memory in cells (1: twice the cells take twice as much; 0: flat). What was
measured is kept in steps.json beside the files, so that steps can be run a few at a time. A wide screen of few cells,
10,000 perturbations scored: --cells 100000 --perturbations 12500 --least-cells 3 --test-fraction 0.83.

With --whole, Snakemake runs the chain on two cores, as a user does, and the minutes are those of a clock: first from
harmonized.h5ad to the verdict of --models, then what the default target adds (further floors and ceilings, report).
"""

import argparse
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import scanpy as sc
import yaml
from harmonize_scale import QC, SCRIPTS, measured
from scipy import sparse

sys.path.insert(0, str(SCRIPTS))

from perturbflow.io.files import bytes_of, file_digest, write_json
from perturbflow.io.hdf5 import AppendedRows
from perturbflow.pairs import Pairs
from perturbflow.registry.config import complete
from perturbflow.registry.families import FAMILIES

N_GENES, CONTROL_SHARE = 3000, 0.04
UMI_PER_CELL, SPREAD, DISPERSION = 1900, 1.55, 2.0  # about 780 genes of a cell have a count
CELLS_PER_BLOCK, DISTINCT_BLOCKS = 4096, 8
KEPT = 0.8  # of the molecules of a drawn cell: thinned anew, no cell comes twice
CONFIG = SCRIPTS.parent / "config"
SNAKEMAKE = (
    *(sys.executable, "-m", "snakemake", "--snakefile", str(SCRIPTS.parent / "Snakefile"), "--cores", "2"),
    *("--configfile", "mine.yaml", "--benchmark-extended"),
)
SPLITS = ("unseen_perturbation",)
ASKED = [f"TARGET{i}" for i in range(10)]
DATASET = {
    "source": {"path": "screen.h5ad"}, "subset": {},
    "perturbation": {"column": "perturbation", "control": ["control"], "separator": None, "drop": ["nan", "*", ""]},
    "covariates": {"batch": "batch", "cell_type": "celltype"}, "perturbation_type": "CRISPRi", "organism": "human",
}  # fmt: skip


# --- a sparse screen ------------------------------------------------------------------------------------------------


def _drawn(level: np.ndarray, seed: np.random.SeedSequence) -> sparse.csr_matrix:
    """Return a block of cells of the same levels, (cells, genes)."""
    rng = np.random.default_rng(seed)
    programme = rng.integers(0, 4, len(level))  # genes that vary together from cell to cell
    activity = rng.lognormal(0, 0.4, (CELLS_PER_BLOCK, 4))
    mean = level / KEPT * activity[:, programme] * rng.lognormal(-0.06, 0.35, (CELLS_PER_BLOCK, 1))
    return sparse.csr_matrix(rng.negative_binomial(DISPERSION, DISPERSION / (DISPERSION + mean)).astype(np.int32))


def _kept(n_perturbations: int, rng: np.random.Generator) -> np.ndarray:
    """Return the share of molecules that stays, as percent, (perturbations + control, genes).

    60 genes of each perturbation respond, and its own.
    """
    kept = np.full((n_perturbations + 1, N_GENES), int(100 * KEPT), np.uint8)
    for label in range(n_perturbations):
        kept[label, rng.choice(N_GENES, 60, replace=False)] = rng.choice([40, 55, 100], 60)
        if label < N_GENES // 2:
            kept[label, label] = 15
    return kept


def generate(path: Path, n_cells: int, n_perturbations: int, n_batches: int = 48, seed: int = 0) -> None:
    """Write a raw screen; half of the genes are targets, further targets are not measured."""
    rng = np.random.default_rng(seed)
    level = rng.lognormal(0, SPREAD, N_GENES)
    level *= UMI_PER_CELL / level.sum()
    kept = _kept(n_perturbations, rng)
    share = rng.lognormal(0, 0.25, n_perturbations)
    label = rng.choice(n_perturbations, n_cells, p=share / share.sum())
    label[rng.random(n_cells) < CONTROL_SHARE] = n_perturbations
    targets = [f"TARGET{i}" for i in range(max(n_perturbations, N_GENES // 2))]
    batches = [f"b{i}" for i in range(n_batches)]
    obs = pd.DataFrame(
        {
            "perturbation": pd.Categorical.from_codes(label, [*targets[:n_perturbations], "control"]),
            "batch": pd.Categorical.from_codes(rng.integers(0, n_batches, n_cells), batches),
            "celltype": pd.Categorical.from_codes(np.zeros(n_cells, np.int8), ["K562"]),
        },
        index=pd.Index([f"{i:012x}-1" for i in range(n_cells)], name="cell_barcode"),
    )  # fmt: skip
    genes = [*targets[: N_GENES // 2], *(f"GENE{i}" for i in range(N_GENES // 2 - 13)), *(f"MT-{i}" for i in range(13))]
    ad.AnnData(obs=obs, var=pd.DataFrame(index=genes)).write_h5ad(path, compression="gzip")
    seeds = np.random.SeedSequence(seed).spawn(min(DISTINCT_BLOCKS, -(-n_cells // CELLS_PER_BLOCK)))
    with h5py.File(path, "r+") as file, ThreadPoolExecutor(os.cpu_count()) as pool:
        if "X" in file:
            del file["X"]
        blocks = list(pool.map(lambda seed: _drawn(level, seed), seeds))
        written = AppendedRows(file.create_group("X"), N_GENES, n_cells, pool)
        for i, first in enumerate(range(0, n_cells, CELLS_PER_BLOCK)):
            of_cell = label[first : first + CELLS_PER_BLOCK]
            X = blocks[i % len(blocks)][: len(of_cell)]
            row = np.repeat(of_cell, np.diff(X.indptr))
            counts = rng.binomial(X.data, kept[row, X.indices] / 100).astype(np.float32)
            X = sparse.csr_matrix((counts, X.indices, X.indptr), shape=X.shape, copy=True)
            X.eliminate_zeros()
            written.append(X)
        written.finish()


# --- the chain ------------------------------------------------------------------------------------------------------


def registry(models: list[str], test_fraction: float | None) -> dict:
    """Return the configuration of a run of these models, completed with all defaults."""
    select = {"datasets": ["renge2023"], "splits": list(SPLITS), "models": models, "seeds": [0]}
    config: dict = {"select": select, "effort": "standard"}
    for file in ("config", "datasets", "splits", "models", "counterfactuals"):
        config = {**yaml.safe_load((CONFIG / f"{file}.yaml").read_text()), **config}
    if test_fraction:
        config["splits"][SPLITS[0]]["test_fraction"] = test_fraction
    return complete({**config, "select": select})


class Chain:
    """The files of one screen, and the steps that make them.

    Parameters
    ----------
    folder
        Where everything lies, as below the working directory of the workflow.
    wanted
        Arguments of the command: models, training_steps, test_fraction and least_cells.
    """

    def __init__(self, folder: Path, wanted: argparse.Namespace) -> None:
        self.folder, self.wanted, self.models, self.n_steps = folder, wanted, wanted.models, wanted.training_steps
        self.qc = {**QC, "min_cells_per_perturbation": wanted.least_cells}
        self.config = registry(self.models, wanted.test_fraction)
        self.raw = folder / "raw"
        self.screen = folder / "results" / "made"
        self.split = self.screen / SPLITS[0]

    def run_of(self, model: str) -> Path:
        """Return the folder of a run."""
        return self.split / model / "seed_0"

    def model_of(self, name: str) -> tuple[str, str, str]:
        """Return implementation, params as JSON, and file name of a model."""
        block = self.config["models"][name]
        family = FAMILIES[block["family"]]
        steps = (
            {}
            if self.n_steps is None
            else dict.fromkeys((p for p in block["params"] if p.startswith("n_steps")), self.n_steps)
        )
        return family.implementation, json.dumps({**block["params"], **steps}), family.artefact  # fmt: skip

    def inputs_of_answers(self, step: str) -> list[Path]:
        """Return the files that an answer is made of."""
        model = step.split()[-1]
        files = (self.model_of(model)[2], "warranty.json", "calibration.npz")
        return [
            self.split / "pairs.h5ad",
            self.split / "embeddings.parquet",
            *(self.run_of(model) / of for of in files),
        ]

    def steps(self) -> Iterator[tuple[str, str, dict[str, object], list[Path]]]:
        """Yield name, script, arguments and outputs of every step, in the order of the data."""
        screen = {"harmonized": self.screen / "harmonized.h5ad", "harmonization": self.screen / "harmonization.json"}
        here = {name: self.split / name for name in ("split.json", "pairs.h5ad", "embeddings.parquet", "audit.json")}
        split, pairs, vectors, audit = here.values()
        qualities = {"table": self.screen / "quality.tsv", "account": self.screen / "quality.json"}
        yield "harmonize", "harmonize", {
            "raw": self.raw / "manifest.json", "harmonized": screen["harmonized"], "report": screen["harmonization"],
            "name": "made", "dataset": json.dumps(DATASET), "qc": json.dumps(self.qc), "threads": 2,
        }, [screen["harmonized"]]  # fmt: skip
        page = self.screen / "quality.html"
        yield "quality", "quality", {**screen, **qualities, "page": page}, [*qualities.values(), page]
        spec = json.dumps(self.config["splits"][SPLITS[0]])
        yield "split", "split", {**screen, "split": split, "name": SPLITS[0], "spec": spec}, [split]
        yield "pair", "pair", {
            "harmonized": screen["harmonized"], "split": split, "pairs": pairs, "n-hvg": self.config["genes"]["n_hvg"],
        }, [pairs]  # fmt: skip
        sources = {"pairs": pairs, "embeddings": vectors, "sources": '["coexpression"]'}
        yield "embeddings", "embeddings", sources, [vectors]
        yield "audit", "audit", {
            "harmonized": screen["harmonized"], "split": split, "pairs": pairs, "embeddings": vectors, "audit": audit,
        }, [audit]  # fmt: skip
        for model in self.models:
            yield from self._steps_of(model, split, pairs, vectors, audit)
        yield from self._tables(split, pairs, audit, screen["harmonization"], qualities)

    def _steps_of(
        self, model: str, split: Path, pairs: Path, vectors: Path, audit: Path
    ) -> Iterator[tuple[str, str, dict[str, object], list[Path]]]:
        run = self.run_of(model)
        implementation, params, artefact = self.model_of(model)
        built = {"implementation": implementation, "params": params, "seed": 0}
        yield f"train {model}", "train", {
            "pairs": pairs, "embeddings": vectors, "audit": audit, "model": run / artefact, "run": run / "run.json",
            "provenance": '{"code_version": "measured"}', **built,
        }, [run / artefact]  # fmt: skip
        yield f"predict {model}", "predict", {
            "pairs": pairs, "model": run / artefact, "predictions": run / "predictions.h5ad", **built,
            "max-cells": self.config["predict"]["max_cells"],
        }, [run / "predictions.h5ad"]  # fmt: skip
        provenance = {"dataset": "made", "split": SPLITS[0], "model": model, "seed": "0"}
        yield f"evaluate {model}", "evaluate", {
            "predictions": run / "predictions.h5ad", "pairs": pairs, "split": split, "metrics": run / "metrics.tsv",
            "provenance": json.dumps(provenance),
        }, [run / "metrics.tsv"]  # fmt: skip
        if FAMILIES[self.config["models"][model]["family"]].kind == "learned" or model == "set_gp":
            warranty = {
                name: run / file for name, file in (("warranty", "warranty.json"), ("calibration", "calibration.npz"))
            }
            yield f"warranty {model}", "warranty", {
                "pairs": pairs, "embeddings": vectors, "model": run / artefact, **warranty, **built,
            }, [*warranty.values()]  # fmt: skip
            # By hand, as a user asks; with four figures.
            yield f"counterfactual {model}", "counterfactual", {
                "run": run, "perturbations": ASKED, "output": run / "asked",
            }, [run / f"asked.{suffix}" for suffix in ("h5ad", "tsv", "ranking.tsv")]  # fmt: skip

    def _tables(
        self, split: Path, pairs: Path, audit: Path, harmonization: Path, qualities: dict[str, Path]
    ) -> Iterator[tuple[str, str, dict[str, object], list[Path]]]:
        def of_runs(file: str) -> str:
            return json.dumps([str(self.run_of(model) / file) for model in self.models])

        results = self.folder / "results"
        names = ("benchmark", "calibration", "comparisons", "strata", "verdicts", "contexts")
        tables = {name: results / f"{name}.tsv" for name in names}
        of_screen = {"audits": json.dumps([str(audit)]), "harmonizations": json.dumps([str(harmonization)])}
        families = {model: self.config["models"][model]["family"] for model in self.models}
        yield "benchmark", "benchmark", {
            "metrics": of_runs("metrics.tsv"), "families": json.dumps(families), **tables, **of_screen,
            "qualities": json.dumps([str(qualities["table"])]),
            "least-difference": self.config["verdicts"]["least_difference"],
        }, [*tables.values()]  # fmt: skip
        files = {"runs": "run.json", "metrics": "metrics.tsv", "predictions": "predictions.h5ad"}
        page = results / "report.html"
        yield "report", "report", {
            **tables, **{name: of_runs(file) for name, file in files.items()}, **of_screen,
            "qualities": json.dumps([str(qualities["account"])]), "splits": json.dumps([str(split)]),
            "pairs": json.dumps([str(pairs)]), "counterfactuals": "[]", "figures": "[]", "report": page,
            "provenance": json.dumps({"code_version": "measured"}),
            "warranties": json.dumps([str(path) for path in sorted(self.split.glob("*/seed_0/warranty.json"))]),
        }, [page]  # fmt: skip


def made(chain: Chain, n_cells: int, n_perturbations: int, n_batches: int) -> Chain:
    """Make the raw file, unless it is there."""
    manifest, path = chain.raw / "manifest.json", chain.raw / "screen.h5ad"
    if not manifest.exists():
        chain.raw.mkdir(parents=True, exist_ok=True)
        generate(path, n_cells, n_perturbations, n_batches)
        file = {"file": path.name, "bytes": path.stat().st_size, "sha256": file_digest(path)}
        write_json(manifest, {"files": {"file": file}})
    return chain


def asked(rule: str, inputs: list[Path]) -> float:
    """Return the MB of memory that a rule asks for with these input files, as rules/*.smk says."""
    text = "\n".join(path.read_text() for path in sorted((SCRIPTS.parent / "rules").glob("*.smk")))
    own = re.search(rf"^rule {rule}:(.*?)(?=^(?:use )?rule |\Z)", text, re.DOTALL | re.MULTILINE)
    if own is None:  # it takes over the resources of another
        return asked(re.search(rf"^use rule (\w+) as {rule} ", text, re.MULTILINE)[1], inputs)
    kind, arguments = re.search(r"mem_mb=(\w+)\(([^)]*)\)", own[1]).groups()
    first, *rest = (part.strip() for part in arguments.split(","))
    if kind == "memory":
        return float(first)
    of_key = {"least": 1000.0} | {key: float(value) for key, value in (part.split("=") for part in rest)}
    size = of_key["least"] + float(first) * sum(path.stat().st_size for path in inputs) / 1e6
    split = next((path.with_name("split.json") for path in inputs if path.name == "pairs.h5ad"), None)
    if split and split.exists():
        n = {role: len(labels) for role, labels in json.loads(split.read_text())["perturbations"].items()}
        size += of_key.get("per_learned", 0) * (n["train"] + n["validation"]) + of_key.get("per_scored", 0) * n["test"]
    return size


def words_of(value: object) -> list[object]:
    """Return the words of a value on the command line."""
    return value if isinstance(value, list) else [value]


def inputs_of(arguments: dict[str, object], outputs: list[Path]) -> list[Path]:
    """Return the files among the arguments of a step that are not made by it."""
    values = [json.loads(value) if str(value).startswith('["') else [value] for value in arguments.values()]
    paths = [Path(str(value)) for of_key in values for value in of_key if not str(value).startswith("{")]
    return [path for path in paths if path not in outputs and path.suffix and path.is_file()]


def walked(chain: Chain, wanted: list[str]) -> pd.DataFrame:
    """Run the steps whose names begin with one of the wanted.

    Returns a row per step that was ever measured here: wall and CPU seconds, peak, asked and file in MB.
    """
    kept = chain.folder / "steps.json"
    rows = json.loads(kept.read_text()) if kept.exists() else {}
    for name, script, arguments, outputs in chain.steps():
        if not name.startswith(tuple(wanted)):
            continue
        for output in outputs:
            output.parent.mkdir(parents=True, exist_ok=True)
        given = [word for key, value in arguments.items() for word in (f"--{key}", *words_of(value))]
        try:
            wall, cpu, peak = measured(SCRIPTS / f"{script}.py", *given)
        except RuntimeError as error:
            print(f"{name}: {str(error)[-1500:]}", file=sys.stderr, flush=True)
            continue
        rule = FAMILIES[chain.config["models"][name.split()[-1]]["family"]].rule if script == "train" else script
        inputs = chain.inputs_of_answers(name) if script == "counterfactual" else inputs_of(arguments, outputs)
        of_rule = asked(rule, inputs)
        rows[name] = wall, cpu, peak, of_rule, sum(map(bytes_of, outputs)) / 1e6
        write_json(kept, rows)
        print(f"{name}: {wall:.1f} s, CPU {cpu:.1f} s, {peak:,.0f} MB", file=sys.stderr, flush=True)
    in_order = {name: rows[name] for name, *_ in chain.steps() if name in rows}
    return pd.DataFrame(in_order, index=["wall, s", "CPU, s", "peak, MB", "asked, MB", "file, MB"]).T


def agreement(chain: Chain) -> str:
    """Return how many genes of pairs.h5ad are those that scanpy selects from all training cells in memory."""
    pairs, screen = chain.split / "pairs.h5ad", ad.read_h5ad(chain.screen / "harmonized.h5ad")
    cells = Pairs.open(pairs)
    is_train = (cells.obs["role"] == "train").to_numpy()
    training = screen[cells.obs.index[is_train]].copy()
    sc.pp.normalize_total(training, target_sum=float(np.median(np.asarray(training.X.sum(axis=1)))))
    sc.pp.log1p(training)
    sc.pp.highly_variable_genes(training, n_top_genes=chain.config["genes"]["n_hvg"], flavor="seurat")
    with h5py.File(pairs) as file:
        var = ad.io.read_elem(file["var"])
    expected, found = (set(table.index[table["highly_variable"]]) for table in (training.var, var))
    of_all = f"{len(found & expected):,} of {len(expected):,}"
    return f"{of_all} highly variable genes are scanpy's on all {is_train.sum():,} training cells."


def whole(chain: Chain) -> None:
    """Run the chain by Snakemake on two cores; print minutes of the clock, and what every job used and asked for."""
    of_snakemake = Chain(chain.folder / "whole", chain.wanted)
    of_snakemake.folder.mkdir(exist_ok=True)
    dataset = {**DATASET, "source": {"path": str((chain.raw / "screen.h5ad").resolve())}, "qc": chain.qc}
    select = {**of_snakemake.config["select"], "datasets": ["made"], "counterfactuals": []}
    splits = {SPLITS[0]: of_snakemake.config["splits"][SPLITS[0]]}
    config = {"select": select, "datasets": {"made": dataset}, "splits": splits}
    (of_snakemake.folder / "mine.yaml").write_text(json.dumps(config))

    def run(*targets: object) -> float:
        started = time.perf_counter()
        subprocess.run([*SNAKEMAKE, "--", *map(str, targets)], cwd=of_snakemake.folder, check=True)
        return (time.perf_counter() - started) / 60

    def below(path: Path) -> Path:
        return path.relative_to(of_snakemake.folder)

    run(below(of_snakemake.screen / "harmonized.h5ad"))
    scores = [below(of_snakemake.run_of(model) / "metrics.tsv") for model in of_snakemake.models]
    minutes = run(*scores, below(of_snakemake.split / "audit.json"), below(of_snakemake.screen / "quality.tsv"))
    minutes += walked(of_snakemake, ["benchmark"]).loc["benchmark", "wall, s"] / 60
    print(f"{minutes:.1f} minutes to the verdict of {', '.join(of_snakemake.models)}", flush=True)
    print(f"{run('all'):.1f} minutes more to the end of the default target")
    print(table_of_jobs(of_snakemake.folder / "benchmarks"))


def table_of_jobs(benchmarks: Path) -> str:
    """Return a Markdown table of all jobs of Snakemake, in their order: what they used, and what they asked for."""
    lines = ["| job | s | of min | CPU s | peak, MB | of |\n| --- | ---: | ---: | ---: | ---: | ---: |"]
    for path in sorted(benchmarks.rglob("*.tsv"), key=lambda path: path.stat().st_mtime):
        job = pd.read_csv(path, sep="\t").iloc[-1]
        asked_for = yaml.safe_load(job["resources"])
        seconds = f"{job['s']:.0f} | {asked_for.get('runtime', '–')} | {job['cpu_time']:.0f}"
        peak = f"{job['max_rss'] * 1.048576:,.0f} | {asked_for['mem_mb']:,}"
        lines.append(f"| {' '.join(path.relative_to(benchmarks).with_suffix('').parts)} | {seconds} | {peak} |")
    return "\n".join(lines)


def table_of(sizes: dict[str, pd.DataFrame], n_cells: list[int]) -> str:
    """Return a Markdown table of all steps and sizes, with exponents between the first and the last size."""
    steps = list(dict.fromkeys(step for table in sizes.values() for step in table.index))
    lines = [
        "| step | "
        + " | ".join(f"{size}: wall, CPU s | peak of asked, MB | file, MB" for size in sizes)
        + " | exponent: CPU | peak |"
    ]
    lines.append("| --- |" + " ---: |" * (3 * len(sizes) + 2))
    for step in steps:
        cells = []
        for table in sizes.values():
            wall, cpu, peak, of_rule, size = table.loc[step] if step in table.index else (np.nan,) * 5
            row = [f"{wall:.0f}, {cpu:.0f}", f"{peak:,.0f} of {of_rule:,.0f}", f"{size:,.1f}"]
            cells += row if wall == wall else ["–"] * 3
        (_, first), (_, last) = next(iter(sizes.items())), list(sizes.items())[-1]
        for column in ("CPU, s", "peak, MB"):
            ratio = last[column].get(step, np.nan) / first[column].get(step, np.nan)
            is_known = len(sizes) > 1 and ratio == ratio
            cells.append(f"{math.log(ratio) / math.log(n_cells[-1] / n_cells[0]):.2f}" if is_known else "–")
        lines.append("| " + " | ".join([step, *cells]) + " |")
    return "\n".join(lines)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, nargs="+", default=[150_000, 450_000], help="sizes, ascending")
    parser.add_argument("--perturbations", type=int, nargs="+", default=[800, 2000], help="per size, or one for all")
    parser.add_argument("--models", nargs="+", default=["no_change", "additive", "technical_duplicate", "set_gp"])
    parser.add_argument("--batches", type=int, default=48)
    parser.add_argument("--least-cells", type=int, default=30, help="of a perturbation: with fewer it is left out")
    parser.add_argument("--test-fraction", type=float, help="of the perturbations; default: the registry's")
    parser.add_argument("--training-steps", type=int, help="of learned models; default: each model's own")
    parser.add_argument(
        "--steps", nargs="+", help="run these alone, by the beginning of their names; inputs must be there"
    )
    parser.add_argument("--folder", type=Path, help="where the files are kept; default: a temporary folder")
    parser.add_argument("--agreement", action="store_true", help="hold selected genes against scanpy in memory, too")
    parser.add_argument("--whole", action="store_true", help="by Snakemake on two cores; minutes of the clock")
    arguments = parser.parse_args()
    perturbations = arguments.perturbations * (1 if len(arguments.perturbations) > 1 else len(arguments.cells))
    sizes = {}
    if arguments.folder:
        arguments.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
        for n_cells, n_perturbations in zip(arguments.cells, perturbations, strict=True):
            folder = (arguments.folder or Path(temporary)) / f"cells_{n_cells}_{n_perturbations}"
            chain = Chain(folder, arguments)
            made(chain, n_cells, n_perturbations, arguments.batches)
            print(f"{n_cells:,} cells, {n_perturbations:,} perturbations", file=sys.stderr, flush=True)
            if arguments.whole:
                whole(chain)
                continue
            sizes[f"{n_cells:,} × {n_perturbations:,}"] = walked(chain, arguments.steps or [""])
            if arguments.agreement:
                print(agreement(chain), flush=True)
            if not arguments.folder:
                shutil.rmtree(folder)
    if sizes:
        print(table_of(sizes, arguments.cells))


if __name__ == "__main__":
    main()
