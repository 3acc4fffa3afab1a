"""The leaderboard: frozen splits stay frozen, rows are what they say, and progress is what it is defined as."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from conftest import REPOSITORY, SPECS, Prepared, make_screen, prepare

from perturbflow.errors import InputError
from perturbflow.evaluation import evaluate
from perturbflow.io.files import file_digest
from perturbflow.predict import predict
from perturbflow.registry.families import FAMILIES
from perturbflow.train import train

FOLDER = REPOSITORY / "leaderboard"


@pytest.fixture(scope="module")
def board() -> ModuleType:
    """Return leaderboard/board.py as a module."""
    spec = importlib.util.spec_from_file_location("board", FOLDER / "board.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return results/DATASET/SPLIT with closed forms and the replicate, scored."""
    folder = tmp_path_factory.mktemp("results") / "mine" / "unseen_combination"
    here: Prepared = prepare(folder, make_screen(), SPECS["unseen_combination"])
    for model in ("no_change", "additive", "technical_duplicate"):
        run = folder / model / "seed_0"
        implementation = FAMILIES[model].implementation
        run.mkdir(parents=True)
        train(
            here.pairs, here.embeddings, here.audit, run / "model.npz", run / "run.json", implementation, {}, 0
        )  # fmt: skip
        predict(here.pairs, run / "model.npz", run / "predictions.h5ad", implementation, {}, 0, 200)
        evaluate(run / "predictions.h5ad", here.pairs, here.split, run / "metrics.tsv")
    return folder


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Return an empty leaderboard."""
    for name in ("splits", "rows"):
        (tmp_path / name).mkdir()
    (tmp_path / "README.md").write_text("# Board\n<!-- tables: all below is written by board.py rescore -->\n")
    return tmp_path


@pytest.fixture
def replicate(results: Path, tmp_path: Path) -> Path:
    """Return means that are nearly those of the scored cells."""
    pairs = ad.read_h5ad(results / "pairs.h5ad")
    test = pairs[(pairs.obs["role"] == "test") & ~pairs.obs["is_control"]]
    means = test.to_df().groupby(test.obs["perturbation"].astype(str)).mean()
    means.to_csv(tmp_path / "means.tsv", sep="\t")
    return tmp_path / "means.tsv"


ABOUT = {"who": "A. Author", "command": "python train.py", "commit": "1a2b3c4d5"}


def test_a_row_is_scored_and_shown(board: ModuleType, results: Path, place: Path, replicate: Path) -> None:
    board.freeze(place, results)
    folder = board.add(place, results, replicate, "theirs", **ABOUT)
    row = json.loads((folder / "row.json").read_text())
    assert row["sha256"] == file_digest(folder / "predictions.tsv")
    assert row["who"] == "A. Author"
    assert board.rescore(place, results.parents[1]) == ["mine.unseen_combination"]
    page = (place / "README.md").read_text()
    lines = {line.split("|")[1].strip(" *"): line for line in page.splitlines() if line.startswith("| ")}
    assert {"theirs", "no_change", "additive", "technical_duplicate"} <= set(lines)
    assert float(lines["theirs"].split("|")[3].split()[0]) > 0.5  # all cells are nearer than half of them
    assert lines["technical_duplicate"].split("|")[3].strip() == "+1.00"
    assert lines["additive"].split("|")[3].strip() == "+0.00"
    assert "`python train.py` at 1a2b3c4" in lines["theirs"]
    html = (place / "index.html").read_text()
    assert html.count('class="reference"') == 3
    assert "<code>python train.py</code> at 1a2b3c4" in html
    # Without results, the pages are those of what was scored before.
    for elsewhere in (results.parents[1], place):
        board.rescore(place, elsewhere)
        assert (place / "README.md").read_text() == page
        assert (place / "index.html").read_text() == html


def test_means_of_the_workflows_own_predictions_make_a_row(board: ModuleType, results: Path, place: Path) -> None:
    board.freeze(place, results)
    cells = results / "additive/seed_0/predictions.h5ad"
    folder = board.add(place, results, cells, "sum", means=True, **ABOUT)
    assert pd.read_csv(folder / "predictions.tsv", sep="\t", index_col=0).shape[1] == ad.read_h5ad(cells).n_vars
    assert "| sum |" in board.markdown_of(board.scored(place, results))


def test_progress_is_the_way_from_the_best_closed_form_to_the_replicate(board: ModuleType) -> None:
    best, replicate = pd.Series(np.full(8, 2.0)), pd.Series(np.full(8, 1.0))
    assert board.progress(best, best, replicate) == (0, 0, 0)
    assert board.progress(replicate, best, replicate) == (1, 1, 1)
    way, low, high = board.progress(pd.Series(np.linspace(1, 2, 8)), best, replicate)
    assert way == pytest.approx(0.5)
    assert 0 < low < 0.5 < high < 1
    # Where the replicate is hardly better than the best closed form, some resamples have no way between them.
    close = best + np.where(np.arange(8) % 2, -0.8, 0.6)
    _, low, high = board.progress(best + 0.1, best, close)
    assert (low, high) == pytest.approx((-1, -1))


def test_what_was_frozen_stays(board: ModuleType, results: Path, place: Path, replicate: Path) -> None:
    with pytest.raises(InputError, match="is not on the board"):
        board.add(place, results, replicate, "theirs", **ABOUT)
    frozen = board.freeze(place, results)
    with pytest.raises(InputError, match="is frozen"):
        board.freeze(place, results)
    folder = board.add(place, results, replicate, "theirs", **ABOUT)
    with pytest.raises(InputError, match="small letters"):
        board.add(place, results, replicate, "Their's", **ABOUT)
    content = frozen.read_text()
    frozen.write_text(content + "\n")
    with pytest.raises(InputError, match="changed after it was frozen"):
        board.scored(place, results)
    frozen.write_text(content)
    (folder / "predictions.tsv").write_text(replicate.read_text() + "\n")
    with pytest.raises(InputError, match="is not the file of its row"):
        board.scored(place, results)


def test_results_of_another_split_are_refused(board: ModuleType, results: Path, place: Path, tmp_path: Path) -> None:
    frozen = board.freeze(place, results)
    content = json.loads(frozen.read_text())
    content["sha256"]["test"]["cells"] = "0" * 64
    frozen.write_text(json.dumps(content))
    (place / "splits/SHA256SUMS").write_text(f"{file_digest(frozen)}  {frozen.name}\n")
    with pytest.raises(InputError, match="other cells of the role test than the frozen split"):
        board.check_frozen(place, results)


def test_what_ships_is_whole() -> None:
    sums = dict(reversed(line.split()) for line in (FOLDER / "splits/SHA256SUMS").read_text().splitlines())
    assert {name: file_digest(FOLDER / "splits" / name) for name in sums} == sums
    assert {file.name for file in (FOLDER / "splits").glob("*.json")} == set(sums)
    for row in FOLDER.glob("rows/*/*/row.json"):
        content = json.loads(row.read_text())
        assert {"who", "date", "command", "sha256", "params"} <= set(content)
        assert file_digest(next(row.parent.glob("predictions.*"))) == content["sha256"]
        assert f"{row.parent.parent.name}.json" in sums
        for page in ("README.md", "index.html"):
            assert row.parent.name in (FOLDER / page).read_text().replace("<wbr>", "")
