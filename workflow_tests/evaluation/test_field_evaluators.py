"""The field's evaluators take our files as they are, and where a definition is the same its value is."""

import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from conftest import REPOSITORY, Prepared

from perturbflow.evaluation.layouts import README, layouts

BENCHMARKS = REPOSITORY / "workflow_tests" / "benchmarks"
FIELD = SimpleNamespace(**runpy.run_path(str(BENCHMARKS / "field_evaluators.py"), run_name="looked_at"))
MADE = SimpleNamespace(**runpy.run_path(str(BENCHMARKS / "made_predictions.py"), run_name="looked_at"))
# From fewer cells cell-eval2 finds no effect, and ends with an error.
TINY = {"genes": 120, "perturbations": 6, "controls": 200, "scored": 200, "predicted": 30}


def needs(*modules: str) -> None:
    """Skip where an evaluator is not installed."""
    for module in modules:
        pytest.importorskip(
            module, reason=f"{module} is not installed: pip install -r workflow_tests/benchmarks/field_evaluators.txt"
        )


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    MADE.generate(folder, MADE.Size(**TINY), seed=1, starts_from_controls=False)
    return folder


def test_the_made_screen_is_laid_out_as_the_workflow_does(made: Path, prepared: dict[str, Prepared]) -> None:
    cells, real = ad.read_h5ad(made / "pairs.h5ad"), ad.read_h5ad(prepared["unseen_perturbation"].pairs)
    for table, of_real in ((cells.obs, real.obs), (cells.var, real.var)):
        assert set(table) <= set(of_real)
        assert {name: dtype.kind for name, dtype in table.dtypes.items()} == {
            name: of_real[name].dtype.kind for name in table
        }
    assert {*cells.layers, *cells.obsm, *cells.uns} == {*real.layers, *real.obsm, *real.uns}
    assert (cells.X.dtype, cells.obsm["control_index"].dtype) == (real.X.dtype, real.obsm["control_index"].dtype)
    np.testing.assert_allclose(
        np.expm1(cells.X.toarray()).sum(axis=1), cells.uns["perturbflow"]["target_sum"], rtol=1e-5
    )
    of_controls = cells.obsm["control_index"][~cells.obs["is_control"]]
    assert cells.obs["is_control"].to_numpy()[of_controls].all()
    assert (cells.obs["role"].to_numpy()[of_controls[:, 0]] == cells.obs.loc[~cells.obs["is_control"], "role"]).all()


def test_a_value_that_one_side_has_not_is_a_difference() -> None:
    a, b = pd.Series([1.0, np.nan]), pd.Series([1.5, np.nan])
    assert FIELD.greatest_difference(a, b) == 0.5
    assert FIELD.greatest_difference(a, b.fillna(0)) == np.inf
    assert np.isnan(FIELD.greatest_difference(a[1:], b[1:]))


def test_pins_are_exact_and_add_to_the_lock_alone() -> None:
    def pins(file: Path) -> dict[str, str]:
        return dict(re.findall(r"^([\w.-]+)==([\w.]+)$", file.read_text(), flags=re.MULTILINE))

    theirs, locked = pins(BENCHMARKS / "field_evaluators.txt"), pins(REPOSITORY / "envs" / "requirements.txt")
    lines = [
        line
        for line in (BENCHMARKS / "field_evaluators.txt").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    assert len(theirs) == len(lines)
    assert [theirs[name] for name in ("cell-eval", "cell-eval2", "scperteval")] == ["0.8.2", "0.20.0", "0.2.0"]
    assert not set(theirs) & set(locked)
    named = dict(re.findall(r"([\w-]+)==([\w.]+)", README))
    assert named == {name: theirs[name] for name in named}, "the pins in an export's README.md are those that ran"


def documented_lines(module: str) -> str:
    """Return the lines of docs/reference/metrics.md that call an evaluator."""
    blocks = re.findall(
        r"^```python\n(.*?)^```",
        (REPOSITORY / "docs" / "reference" / "metrics.md").read_text(),
        flags=re.MULTILINE | re.DOTALL,
    )
    return next(block for block in blocks if re.search(rf"^(import|from) {module}\b", block, flags=re.MULTILINE))


@pytest.mark.parametrize("module", ["cell_eval", "scperteval"])
def test_documented_lines_feed_an_evaluator(module: str, made: Path, tmp_path: Path) -> None:
    needs(module)
    lines = documented_lines(module)
    for name in ("pairs.h5ad", "predictions.h5ad"):
        place = tmp_path / re.search(rf'"(results/[^"]*{name})"', lines)[1]
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(made / name)
    lines += "\nprint('scored', len(scores))\n"
    done = subprocess.run([sys.executable, "-c", lines], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"scored {TINY['perturbations']}" in done.stdout


@pytest.mark.parametrize("evaluator", ["cell-eval", "cell-eval2"])
def test_an_export_is_scored_by_the_command_in_its_readme(evaluator: str, made: Path, tmp_path: Path) -> None:
    needs(evaluator.replace("-", "_"))
    layouts(made / "pairs.h5ad", made / "predictions.h5ad", tmp_path, "a made screen")
    scores = FIELD.by_its_readme(tmp_path, evaluator)
    assert scores["perturbation"].nunique() == TINY["perturbations"]
    if evaluator == "cell-eval2":
        wanted = {comparison.theirs for comparison in FIELD.COMPARISONS if comparison.evaluator == evaluator}
        found = set(pd.read_csv(tmp_path / "vcc2026" / "scores" / "metric_aggregation.csv")["metric"])
        assert wanted <= found, "the six metrics of the preset vcc2026"


def test_the_same_definition_gives_the_same_value(made: Path) -> None:
    needs("cell_eval", "cell_eval2", "scperteval", "geomloss")
    table = FIELD.agreement(made)
    wrong = table[table["same"] & (table["same inputs"] > FIELD.TOLERANCE)]
    assert wrong.empty, FIELD.markdown(wrong)
    assert set(table.loc[table["same inputs"].isna(), "ours"]) <= {"lfc_nmae"}, "which wants ten significant genes"
    assert set(table["ours"]) == {comparison.ours for comparison in FIELD.COMPARISONS}


def test_a_file_that_predicts_the_mean_of_the_controls_is_as_near_as_it(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    needs("cell_eval", "scperteval")
    cells = ad.read_h5ad(made / "pairs.h5ad")
    controls = cells[((cells.obs["role"] == "test") & cells.obs["is_control"]).to_numpy()].X.mean(axis=0)
    labels = sorted(set(ad.read_h5ad(made / "predictions.h5ad").obs["perturbation"]))
    means = ad.AnnData(
        np.repeat(np.asarray(controls), len(labels), axis=0),
        pd.DataFrame({"perturbation": labels}, index=labels),
        cells.var,
    )
    model = tmp_path / "screen" / "split" / "mean" / "seed_0"
    model.mkdir(parents=True)
    means.write_h5ad(model / "predictions.h5ad")
    (model.parents[1] / "pairs.h5ad").symlink_to(made / "pairs.h5ad")
    FIELD.show_nearness([model])
    row = capsys.readouterr().out.splitlines()[-1]
    assert row.startswith("| screen, split | mean |")
    assert len(re.findall(r"[+-]0\.0 %", row)) == 3
