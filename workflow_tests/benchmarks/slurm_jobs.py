"""Run the workflow on a SLURM of this machine and print its jobs as tables in Markdown, and those of a faulty run.

python workflow_tests/benchmarks/slurm_jobs.py
"""

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))

import slurm
from slurm_runs import fail, interrupt

if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    if reason := slurm.obstacle():
        sys.exit(reason)
    with tempfile.TemporaryDirectory() as folder, slurm.running(Path(folder) / "slurm") as cluster:
        for title, run in (("Interrupted once, and run again", interrupt), ("Four screens, four ways to fail", fail)):
            here = Path(folder) / run.__name__
            here.mkdir()
            print(f"**{title}**\n\n{slurm.table(run(here, cluster).jobs)}\n")
