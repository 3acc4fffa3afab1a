"""Kill -9 at random moments of every step, again and again, and see that the results are those of an undisturbed run.

    python workflow_tests/benchmarks/kills.py --kills 50

In one folder after the other the workflow is started and killed twelve times before it may finish; the short form of
this is `workflow_tests/workflow/test_faults.py`. Prints the table of what was killed in the midst of which job, and how
it ended.
"""

import argparse
import itertools
import random
import sys
import tempfile
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "workflow_tests"), str(ROOT / "workflow_tests/support")]

from fault_server import serving  # noqa: E402
from faults import VICTIMS, drawn, finish, finished_files, leftovers, make_folder, screen_bytes, undergo  # noqa: E402

PER_FOLDER = {"download": 3, "harmonize": 2, "train": 3, "predict": 2, "evaluate": 2}


def main() -> None:
    """Print a table of kills and outcomes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="at least so many")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    dice = random.Random(arguments.seed)
    met, outcomes = Counter(), Counter()
    with tempfile.TemporaryDirectory() as place, serving(screen_bytes()) as host:
        host.pace = 0.03
        undisturbed = make_folder(Path(place) / "undisturbed", host)
        expected = finish(undisturbed)
        reference = finished_files(undisturbed)
        for n in itertools.count(1):
            folder = make_folder(Path(place) / f"folder_{n}", host)
            ordeal = undergo(folder, drawn(dice, undisturbed, PER_FOLDER, 1.0), reference)
            met.update((kill.victim, rule) for kill in ordeal.kills for rule in kill.met)
            outcomes["folders"] += 1
            outcomes["kills"] += len(ordeal.kills)
            outcomes["folders whose results are those of an undisturbed run"] += finished_files(folder) == reference
            outcomes["folders in which no finished job was run again"] += ordeal.jobs <= expected
            outcomes["files under a final name that were not what they should be"] += len(ordeal.spoilt)
            outcomes["parts that were left"] += len(leftovers(folder))
            print(f"{dict(outcomes)} {sorted(ordeal.spoilt)}", file=sys.stderr, flush=True)
            if outcomes["kills"] >= arguments.kills:
                break
    order = list(expected)
    rules = sorted({rule for _, rule in met}, key=order.index)
    print("| killed, while these were under way | " + " | ".join(f"`{rule}`" for rule in rules) + " |")
    print("| --- " * (1 + len(rules)) + "|")
    for victim, words in VICTIMS.items():
        print(f"| {words} | " + " | ".join(str(met[victim, rule]) for rule in rules) + " |")
    print("\n" + "; ".join(f"{name}: {n}" for name, n in outcomes.items()) + ".")


if __name__ == "__main__":
    main()
