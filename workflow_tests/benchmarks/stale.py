"""Random sequences of edits, deletions, damage, interruptions and copies, each run to the end and compared with a run from nothing.

    python workflow_tests/benchmarks/stale.py --sequences 200 --folder /tmp/sequences

The short form of this is `workflow_tests/test_sequences.py`. What is found is written to the folder as it is found; started again, it goes on.
"""

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "workflow_tests")]

from sequences import Place, References, Verdict, finish, summary, undergo  # noqa: E402


def main() -> None:
    """Print what came of every sequence, and the table of all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=200)
    parser.add_argument("--first", type=int, default=0, help="seed of the first sequence")
    parser.add_argument("--actions", type=int, default=4, help="per sequence, before the run to the end")
    parser.add_argument("--folder", type=Path, required=True)
    arguments = parser.parse_args()
    folder = arguments.folder.absolute()
    references = References(folder / "references")
    start = Place(folder / "start")
    if not (start.folder / "results/report.html").exists():
        finish(start)
    start.trained = [start.trains_on()]
    verdicts = []
    for seed in range(arguments.first, arguments.first + arguments.sequences):
        found = folder / f"sequence_{seed}.json"
        if not found.exists():
            verdict = undergo(seed, start, folder / f"sequence_{seed}", references, arguments.actions)
            found.write_text(json.dumps(vars(verdict)))
        verdicts.append(Verdict(**json.loads(found.read_text())))
        mark = "ok" if verdicts[-1].is_good else f"STALE {verdicts[-1].stale} NEEDLESS {verdicts[-1].needless} AGAIN {verdicts[-1].repeated}"
        print(f"{seed}: {'; '.join(verdicts[-1].done)}: {mark}", flush=True)
    print(summary(verdicts))


if __name__ == "__main__":
    main()
