"""The steps as functions of AnnData: each gives what the step gives, and refuses in words."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from conftest import OFF, REPOSITORY, SPECS, SPECS_OF_CELLS, Prepared, dataset_block, make_screen
from scipy import sparse

from perturbflow import api
from perturbflow.embeddings import Embeddings
from perturbflow.errors import InputError
from perturbflow.evaluation import METRICS, evaluate
from perturbflow.predict import predict
from perturbflow.registry.families import FAMILIES
from perturbflow.registry.shipped import shipped
from perturbflow.train import train

BLOCK = {key: value for key, value in dataset_block().items() if key != "source"}


def same_cells(first: ad.AnnData, second: ad.AnnData) -> None:
    """Compare counts, obs, var and matched controls of two screens."""
    assert (sparse.csr_matrix(first.X) != sparse.csr_matrix(second.X)).nnz == 0
    pd.testing.assert_frame_equal(first.obs, second.obs)
    pd.testing.assert_frame_equal(first.var, second.var)
    assert {*first.obsm} == {*second.obsm}
    for key in first.obsm:
        assert np.array_equal(first.obsm[key], second.obsm[key])


def stepwise(here: Prepared, folder: Path, model: str) -> tuple[ad.AnnData, pd.DataFrame]:
    """Train, predict and evaluate as the rules do."""
    block = shipped()["models"][model]
    about = (FAMILIES[block["family"]].implementation, block["params"])
    train(here.pairs, here.embeddings, here.audit, folder / "model.npz", folder / "run.json", *about, 0)
    predict(here.pairs, folder / "model.npz", folder / "predictions.h5ad", *about, 0, 1000)
    evaluate(folder / "predictions.h5ad", here.pairs, here.split, folder / "metrics.tsv")
    return ad.read_h5ad(folder / "predictions.h5ad"), pd.read_csv(folder / "metrics.tsv", sep="\t")


def test_harmonize_gives_what_the_step_gives(prepared: dict[str, Prepared]) -> None:
    screen = ad.read_h5ad(prepared["unseen_combination"].folder / "screen.h5ad")
    same_cells(api.harmonize(screen, BLOCK, OFF, name="mine"), ad.read_h5ad(prepared["unseen_combination"].harmonized))


def test_harmonize_has_the_limits_of_the_workflow_and_refuses_in_words() -> None:
    screen = make_screen()
    with pytest.raises(InputError, match=r"qc\.min_genes|min_genes"):
        api.harmonize(screen, BLOCK)  # 80 genes: below the default limit
    with pytest.raises(InputError, match=r"unknown key 'perturbations'\. Did you mean 'perturbation'"):
        api.harmonize(screen, {**BLOCK, "perturbations": {}}, OFF)
    with pytest.raises(InputError, match="there is no file nowhere"):
        api.harmonize("nowhere.h5ad", BLOCK, OFF)


@pytest.mark.parametrize("kind", [*SPECS, *SPECS_OF_CELLS])
def test_split_gives_what_the_step_gives(prepared: dict[str, Prepared], kind: str) -> None:
    spec = {**SPECS, **SPECS_OF_CELLS}[kind]
    expected = json.loads(prepared[kind].split.read_text())
    options = {key: value for key, value in spec.items() if key != "kind"}
    for harmonized in (prepared[kind].harmonized, ad.read_h5ad(prepared[kind].harmonized)):
        found = api.split(harmonized, kind, name="mine", **options)
        # A completed block has more keys; roles and the rest are the same.
        assert {key: value for key, value in found.items() if key != "spec"} == {
            key: value for key, value in expected.items() if key != "spec"
        }
        assert found["spec"].items() >= {**spec}.items()


def test_split_in_folds_holds_out_every_gene_once(prepared: dict[str, Prepared]) -> None:
    harmonized = ad.read_h5ad(prepared["unseen_perturbation"].harmonized)
    tests = [api.split(harmonized, "unseen_perturbation", folds=4, fold=i)["perturbations"]["test"] for i in range(4)]
    singles = [label for test in tests for label in test if "+" not in label]
    assert sorted(singles) == sorted(set(singles))
    assert len(singles) == 8
    with pytest.raises(InputError, match="of 4 folds name one from 0 to 3"):
        api.split(harmonized, "unseen_perturbation", folds=4, fold=4)
    with pytest.raises(InputError, match="unknown key 'fraction'"):
        api.split(harmonized, "unseen_perturbation", fraction=0.2)


def test_labels_are_divided_as_a_screen_of_them_is(prepared: dict[str, Prepared], tmp_path: Path) -> None:
    here = prepared["unseen_combination"]
    labels = sorted(set(ad.read_h5ad(here.harmonized).obs["perturbation"]))
    options = {key: value for key, value in SPECS["unseen_combination"].items() if key != "kind"}
    roles = api.split_labels([label.replace("TF1+TF2", "TF2+TF1") for label in labels], "unseen_combination", **options)
    assert roles == json.loads(here.split.read_text())["perturbations"]
    (tmp_path / "roles.json").write_text(json.dumps(roles))
    assert api.split(here.harmonized, "file", path=str(tmp_path / "roles.json"))["perturbations"] == roles
    with pytest.raises(InputError, match="random_cells divides no labels"):
        api.split_labels(labels, "random_cells")


def test_pair_gives_what_the_step_gives(prepared: dict[str, Prepared]) -> None:
    here = prepared["unseen_combination"]
    made = api.pair(ad.read_h5ad(here.harmonized), json.loads(here.split.read_text()), 40)
    expected = ad.read_h5ad(here.pairs)
    same_cells(made, expected)
    assert made.uns["perturbflow"] == expected.uns["perturbflow"]


def test_audit_passes_and_finds_a_planted_leak(prepared: dict[str, Prepared]) -> None:
    here = prepared["unseen_combination"]
    checks = json.loads(here.audit.read_text())["checks"]
    assert api.audit(here.harmonized, here.split, here.pairs) == checks
    roles, pairs, table = (
        json.loads(here.split.read_text()),
        ad.read_h5ad(here.pairs),
        Embeddings.read(here.embeddings).table,
    )
    assert api.audit(ad.read_h5ad(here.harmonized), roles, pairs, table) == checks
    pairs.obs["test_labels"] = pairs.obs["perturbation"]
    with pytest.raises(InputError, match=r"Leak in pairs in memory.*\n.*nothing_else_is_carried.*test_labels"):
        api.audit(here.harmonized, roles, pairs, table)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["no_change", "additive", "linear", "technical_duplicate"])
def test_baseline_and_score_give_what_the_steps_give(prepared: dict[str, Prepared], tmp_path: Path, model: str) -> None:
    here = prepared["unseen_combination"]
    expected, metrics = stepwise(here, tmp_path, model)
    predicted = api.baseline(model, ad.read_h5ad(here.pairs))
    same_cells(predicted, expected)
    for pairs in (here.pairs, ad.read_h5ad(here.pairs)):
        scores = api.score(predicted, pairs)
        pd.testing.assert_frame_equal(scores[["perturbation", "metric"]], metrics[["perturbation", "metric"]])
        assert set(scores["metric"]) == set(METRICS)
        numbers = ["members_seen", "n_cells", "reliability", "effect_size", "value"]
        np.testing.assert_allclose(scores[numbers], metrics[numbers], rtol=2e-5, atol=1e-9)


def test_scores_of_dense_and_of_stored_cells_are_the_same(prepared: dict[str, Prepared], tmp_path: Path) -> None:
    pairs = ad.read_h5ad(prepared["unseen_combination"].pairs)
    predicted = api.baseline("additive", pairs)
    expected = api.score(predicted, pairs)
    predicted.write_h5ad(tmp_path / "predictions.h5ad")
    pd.testing.assert_frame_equal(api.score(tmp_path / "predictions.h5ad", pairs), expected)
    predicted.X, pairs.X = predicted.X.toarray(), pairs.X.toarray()
    pd.testing.assert_frame_equal(api.score(predicted, pairs), expected)


def test_cells_of_others_are_brought_to_the_terms_of_the_pairs(prepared: dict[str, Prepared]) -> None:
    pairs = prepared["unseen_combination"].pairs
    predicted = api.baseline("additive", pairs)
    expected = api.score(predicted, pairs).pivot(index="perturbation", columns="metric", values="value")
    theirs = ad.AnnData(predicted.X, predicted.obs[["perturbation", "batch", "cell_type"]], predicted.var)
    theirs = theirs[:, ::-1].copy()
    scores = api.score(theirs, pairs).pivot(index="perturbation", columns="metric", values="value")
    np.testing.assert_allclose(scores["mae"], expected["mae"], rtol=0.02)
    theirs.obs = theirs.obs.rename(columns={"perturbation": "condition"})
    theirs.X = np.expm1(theirs.X.toarray())
    again = api.score(theirs, pairs, {"label": "condition", "scale": "linear"})
    again = again.pivot(index="perturbation", columns="metric", values="value")
    np.testing.assert_allclose(again["mae"], scores["mae"], rtol=1e-4)
    with pytest.raises(InputError, match=r"unknown key 'scales'.*Did you mean 'scale'"):
        api.score(theirs, pairs, {"scales": "linear"})


def test_models_and_params_that_cannot_be_are_refused(prepared: dict[str, Prepared]) -> None:
    pairs = prepared["unseen_combination"].pairs
    with pytest.raises(InputError, match="'scppdm' is no model in closed form"):
        api.baseline("scppdm", pairs)
    with pytest.raises(InputError, match=r"unknown key 'components'.*n_components"):
        api.baseline("linear", pairs, params={"components": 3})
    assert not np.allclose(
        api.baseline("linear", pairs, params={"ridge": 100}).X.toarray(),
        api.baseline("linear", pairs).X.toarray(),
        atol=1e-3,
    )


def test_predictions_that_cannot_be_scored_are_refused_in_words(prepared: dict[str, Prepared], tmp_path: Path) -> None:
    pairs = prepared["unseen_combination"].pairs
    predicted = api.baseline("no_change", pairs)

    def refused(cells: ad.AnnData | Path, words: str) -> None:
        with pytest.raises(InputError, match=words):
            api.score(cells, pairs)

    refused(predicted[:, ::-1].copy(), "the same genes in another order")
    refused(predicted[:, 1:].copy(), r"1 missing \(TF1\)")
    other = predicted.copy()
    other.var_names = [*other.var_names[:-1], "NOGENE"]
    refused(other, r"1 missing .*1 unknown \(NOGENE\)")
    other = predicted.copy()
    other.obs["perturbation"] = "TF1+TF9"
    refused(other, "TF1\\+TF9, but no cell of these has that role")
    refused(ad.AnnData(predicted.X, predicted.obs[["batch"]], predicted.var), "obs has no column 'perturbation'")
    (tmp_path / "text.h5ad").write_text("no cells")
    refused(tmp_path / "text.h5ad", "text.h5ad cannot be read as h5ad")
    refused(tmp_path / "none.h5ad", "there is no file .*none.h5ad")
    with pytest.raises(InputError, match=r"is no pairs\.h5ad of this workflow"):
        api.score(predicted, prepared["unseen_combination"].harmonized)


@pytest.mark.slow
def test_it_needs_no_torch(prepared: dict[str, Prepared]) -> None:
    """Scores, splits, audits and baselines come without the extra `models`."""
    command = f"""
import sys

class NotInstalled:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "pytorch_lightning", "snakemake"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, NotInstalled())
from perturbflow import api
pairs = {str(prepared["unseen_combination"].pairs)!r}
print(len(api.score(api.baseline("set_gp", pairs), pairs)))
"""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY / "scripts")}
    done = subprocess.run([sys.executable, "-c", command], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 0


def test_the_lines_of_the_readme_score_an_anndata(
    prepared: dict[str, Prepared], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    shown = re.search(
        r"<!-- example: score -->\n```python\n(.*?)```",
        (REPOSITORY / "docs/how-to/python.md").read_text(),
        flags=re.DOTALL,
    )
    assert shown, "docs/how-to/python.md has no block marked <!-- example: score -->"
    named = re.findall(r'"(results/[^"]+)"', shown[1])
    assert len(named) == 1
    (tmp_path / named[0]).parent.mkdir(parents=True)
    (tmp_path / named[0]).write_bytes(prepared["unseen_combination"].pairs.read_bytes())
    monkeypatch.chdir(tmp_path)
    exec(shown[1], {})
    printed = capsys.readouterr().out
    assert all(metric in printed for metric, about in METRICS.items() if about.headline)
