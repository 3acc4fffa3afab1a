"""No stale result survives, and no training is repeated for nothing: random sequences of actions on results.

The long form is `workflow_tests/benchmarks/stale.py`.
"""

import shutil
from pathlib import Path

import pytest
from sequences import LEARNED, Place, References, finish, undergo

pytestmark = pytest.mark.slow

N_SEQUENCES, N_ACTIONS, BACK = 6, 2, 0.9  # few runs from nothing, so that it takes minutes


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory, python: str) -> Place:
    """Return a finished folder."""
    place = Place(tmp_path_factory.mktemp("sequences") / "start", python)
    finish(place)
    assert place.trained == [place.trains_on()]
    return place


@pytest.fixture(scope="module")
def references(start: Place) -> References:
    """Return the runs from nothing, made as they are asked for."""
    return References(start.folder.with_name("references"), start)


@pytest.mark.parametrize("seed", range(N_SEQUENCES))
def test_after_anything_a_run_gives_what_a_run_from_nothing_gives(
    seed: int, start: Place, references: References, tmp_path: Path
) -> None:
    verdict = undergo(1000 + seed, start, tmp_path / "sequence", references, N_ACTIONS, BACK)
    assert not verdict.stale, verdict.done
    assert not verdict.needless, verdict.done
    assert not verdict.repeated, verdict.done


@pytest.fixture
def spoilt(start: Place, tmp_path: Path) -> Place:
    """Return a copy of the finished folder whose plan believes whatever lies there."""
    place = Place(
        Path(shutil.copytree(start.folder, tmp_path / "spoilt")), start.python, dict(start.state), list(start.trained)
    )
    common = place.repository / "rules/common.smk"
    text = common.read_text()
    assert "        return bool(reason)\n" in text
    common.write_text(text.replace("        return bool(reason)\n", "        return False\n"))
    return place


def test_the_comparison_sees_a_stale_result(spoilt: Place, references: References) -> None:
    """A planted fault: without the records a damaged file stays, or is believed."""
    metrics = spoilt.folder / LEARNED / "metrics.tsv"
    metrics.write_text(metrics.read_text().replace("\t0.", "\t1.", 3))
    spoilt.run()
    mine, right = spoilt.files(), references.files(spoilt.state)
    assert f"{LEARNED}/metrics.tsv" in {name for name in right if mine.get(name) != right[name]}
