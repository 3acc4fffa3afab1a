"""What long steps say of how far they are, and how many threads take part in what is called by hand."""

import json
import logging
import os
import subprocess
import sys

import pytest
from conftest import REPOSITORY, Prepared

from perturbflow import progress
from perturbflow.embeddings import Embeddings
from perturbflow.models.closed_form.base import TrainingSet
from perturbflow.models.gaussian_process import set_gp
from perturbflow.models.gaussian_process.set_gp import SetGP
from perturbflow.pairs import Pairs
from perturbflow.progress import Progress, left, progressed


@pytest.mark.parametrize(
    ("seconds", "words"), [(7.4, "about 7 s left"), (89, "about 89 s left"), (200, "about 3 min left")]
)
def test_what_is_left_is_told_in_words(seconds: float, words: str) -> None:
    assert left(seconds) == words


def test_a_long_loop_tells_how_far_it_is(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    for _ in progressed(range(10), "inner folds"):
        now[0] += 3.0
    lines = [record.getMessage() for record in caplog.records]
    assert lines[0] == "inner folds: 2 of 10, about 24 s left"
    assert len(lines) == 4, "every few seconds, and not at the end, where the result speaks"


def test_the_first_one_may_take_long(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """It waits for what is compiled: the others take a second each."""
    caplog.set_level(logging.INFO)
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    for i in progressed(range(10), "perturbations"):
        now[0] += 1.0 if i else 60.0
    lines = [record.getMessage() for record in caplog.records]
    assert lines == ["perturbations: 1 of 10", "perturbations: 6 of 10, about 4 s left"]


def test_a_short_loop_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    steps = Progress("steps", 3)
    for _ in range(3):
        steps.step()
    assert list(progressed(iter("abc"), "letters", 3)) == ["a", "b", "c"]
    assert not caplog.records


@pytest.mark.parametrize("kind", ["unseen_perturbation", "unseen_combination"])
def test_inner_folds_say_how_many_there_are(
    kind: str, prepared: dict[str, Prepared], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    here = prepared[kind]
    training = TrainingSet.of(Pairs.read(here.pairs), Embeddings.read(here.embeddings), 0)
    n = sum(len(training.folds(of_genes=of_genes, one_by_one=False)) for of_genes in (False, True))
    assert n > 3
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    monkeypatch.setattr(set_gp, "LEAST_HELD_OUT", 1)
    SetGP(other_means={"other": lambda inner, start: lambda label: inner.effects.values.mean(axis=0)}).learn(training)
    assert any(record.getMessage().startswith(f"inner folds: 3 of {n}, about") for record in caplog.records)


@pytest.mark.slow
@pytest.mark.parametrize(("given", "n"), [({}, 1), ({"OMP_NUM_THREADS": "2"}, 2), ({"SLURM_CPUS_PER_TASK": "2"}, 2)])
@pytest.mark.parametrize(
    "first",
    [
        "import perturbflow.cli",
        (
            "import perturbflow.command; perturbflow.command.perturbflow(['list', 'splits', '--json'], "
            "standalone_mode=False)"
        ),
    ],
)
def test_what_is_called_by_hand_has_one_thread_unless_it_is_given_others(
    given: dict[str, str], n: int, first: str
) -> None:
    code = (
        f"{first}; import json, numpy, scipy.linalg, sklearn, threadpoolctl; print(json.dumps([p['num_threads'] "
        f"for p in threadpoolctl.threadpool_info()]))"
    )
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.endswith("_NUM_THREADS") and not name.startswith("SLURM_")
    }
    environment |= {"PYTHONPATH": str(REPOSITORY / "scripts"), **given}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    threads = json.loads(done.stdout.splitlines()[-1])
    assert threads
    assert set(threads) <= {1, min(n, os.cpu_count() or 1)}
    assert max(threads) == min(n, os.cpu_count() or 1)
