"""How many jobs the registered unions are, by split: dry runs with the shipped models and one seed.

python workflow_tests/benchmarks/union_plans.py > docs/results/union_jobs.tsv
"""

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

from perturbflow.registry.shipped import shipped

SNAKEFILE = Path(__file__).resolve().parents[2] / "Snakefile"
SPLITS = ("leave_one_line_out", "few_shot_line", "unseen_perturbation", "unseen_context", "perturbation_in_one_line",
          "unseen_combination")  # fmt: skip


def jobs(union: str, split: str, folder: Path) -> str:
    """Return the number of jobs, or what refuses the plan."""
    (folder / "mine.yaml").write_text(yaml.safe_dump({"select": {"datasets": [union], "splits": [split]}}))
    command = [sys.executable, "-m", "snakemake", "--snakefile", SNAKEFILE, "--cores", "2", "--dry-run"]
    done = subprocess.run([*command, "--configfile", "mine.yaml"], cwd=folder, capture_output=True, text=True)
    said = done.stdout + done.stderr
    if total := re.search(r"^total +(\d+)", said, flags=re.MULTILINE):
        return total[1]
    return "no combinations" if "no combinations" in said else said[-500:]


def main() -> None:
    """Print a row per split, a column per union."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    unions = [name for name, block in shipped()["datasets"].items() if "union" in block]
    print("split", *unions, sep="\t")
    with tempfile.TemporaryDirectory() as folder:
        for split in SPLITS:
            print(split, *(jobs(union, split, Path(folder)) for union in unions), sep="\t", flush=True)


if __name__ == "__main__":
    main()
