"""How long a dry run takes of 25 screens × 4 splits × 15 models × 3 seeds: some 15,000 jobs.

    python workflow_tests/benchmarks/plan_scale.py

Nothing is downloaded: the plan needs no data. A second column is the time in units of a loop that Python takes about a
second for, run just before: what other work on the machine slows down, it slows down in both.
"""

import argparse
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "workflow_tests"), str(ROOT / "workflow_tests/support")]

from conftest import merged  # noqa: E402

from perturbflow.registry.families import FAMILIES  # noqa: E402

N_SCREENS, N_SPLITS, N_MODELS, N_LEARNED, N_SEEDS = 25, 4, 15, 4, 3
LOOP = 20_000_000


def mission() -> dict:
    """Return a configuration of that size.

    It has the first screens of the registry, four divisions of their genes, learned models and closed forms.
    """
    config = merged({})
    models = [name for name, block in config["models"].items() if not FAMILIES[block["family"]].split_kinds]
    learned = [name for name in models if FAMILIES[config["models"][name]["family"]].kind == "learned"]
    others = [name for name in models if name not in learned]
    splits = {f"genes_{seed}": {**config["splits"]["unseen_perturbation"], "seed": seed} for seed in range(N_SPLITS)}
    return {
        "splits": splits,
        "select": {
            "datasets": list(config["datasets"])[:N_SCREENS],
            "splits": list(splits),
            "models": learned[:N_LEARNED] + others[: N_MODELS - N_LEARNED],
            "seeds": list(range(N_SEEDS)),
        },
    }


def seconds_of_loop() -> float:
    """Return how long Python takes to count."""
    started = time.perf_counter()
    total = 0
    for i in range(LOOP):
        total += i
    return time.perf_counter() - started


def main() -> None:
    """Print seconds and jobs of each dry run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--arguments", nargs=argparse.REMAINDER, default=["--cores", "2"], help="of snakemake; the last option here"
    )
    arguments = parser.parse_args()
    command = [
        sys.executable,
        "-m",
        "snakemake",
        "--snakefile",
        str(ROOT / "Snakefile"),
        "--dry-run",
        "--configfile",
        "mission.yaml",
    ]
    ratios = []
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "mission.yaml").write_text(yaml.safe_dump(mission()))
        print("| run | jobs | seconds | loops |\n| --- | --- | --- | --- |")
        for i in range(arguments.repeats):
            loop = seconds_of_loop()
            started = time.perf_counter()
            done = subprocess.run(
                [*command, *arguments.arguments], cwd=folder, capture_output=True, text=True, check=True
            )
            seconds = time.perf_counter() - started
            ratios.append(seconds / loop)
            n_jobs = re.search(r"^total +(\d+)", done.stdout + done.stderr, flags=re.MULTILINE)[1]
            print(f"| {i + 1} | {int(n_jobs):,} | {seconds:.1f} | {seconds / loop:.1f} |", flush=True)
    print(f"median: {statistics.median(ratios):.1f} loops")


if __name__ == "__main__":
    main()
