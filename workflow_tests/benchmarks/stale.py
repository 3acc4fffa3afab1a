"""Random sequences of edits, deletions, damage, interruptions and copies.

Each is run to the end and compared with a run from nothing.

    python workflow_tests/benchmarks/stale.py --sequences 200 --folder sequences

The short form of this is `workflow_tests/workflow/test_sequences.py`. Findings are written to the folder at once;
started again, it goes on.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "workflow_tests"), str(ROOT / "workflow_tests/support")]

from forked import interpreter  # noqa: E402
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
    with interpreter() as python:
        print(summary(list(undergone(folder, python, arguments.first, arguments.sequences, arguments.actions))))


def undergone(folder: Path, python: str, first: int, n: int, n_actions: int) -> Iterator[Verdict]:
    """Yield what came of every sequence; those that are done already are read."""
    start = Place(folder / "start", python)
    references = References(folder / "references", start)
    if not (start.folder / "results/report.html").exists():
        finish(start)
    start.trained = [start.trains_on()]
    for seed in range(first, first + n):
        found = folder / f"sequence_{seed}.json"
        if not found.exists():
            verdict = undergo(seed, start, folder / f"sequence_{seed}", references, n_actions)
            found.write_text(json.dumps(vars(verdict)))
        verdict = Verdict(**json.loads(found.read_text()))
        bad = f"stale {verdict.stale}, needless {verdict.needless}, again {verdict.repeated}"
        print(f"{seed}: {'; '.join(verdict.done)}: {'right' if verdict.is_good else bad}", flush=True)
        yield verdict


if __name__ == "__main__":
    main()
