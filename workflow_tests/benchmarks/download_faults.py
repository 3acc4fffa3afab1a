"""Download from a host with every fault that is known of public hosts, and print the table of outcomes.

python workflow_tests/benchmarks/download_faults.py
"""

import argparse
import logging
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))

from fault_outcomes import IMPATIENCE, screen, table
from fault_server import serving

from perturbflow.download import transfer

if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    logging.disable()
    transfer.PATIENCE = IMPATIENCE
    with serving(screen()) as host, tempfile.TemporaryDirectory() as folder:
        print(table(host, Path(folder)))
