"""Vectors of the perturbed genes: where they come from, which rows they find, and what a gene without one gets."""

import json
import logging
import pickle
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import PERTURBED, REPOSITORY, Prepared, ask, make_screen, run_snakemake

from perturbflow.embeddings import Components, Embeddings, embeddings, from_table, gene_vectors, rows_of
from perturbflow.errors import InputError
from perturbflow.models.base import Ceiling, Run, build
from perturbflow.pairs import Pairs, Screen
from perturbflow.registry.families import FAMILIES
from perturbflow.train import train

CLOSED_FORMS = [
    name for name, family in FAMILIES.items() if family.rule == "train_closed_form" and not family.made_elsewhere
]


def vectors_of(genes: list[str], n: int = 6, seed: int = 0) -> pd.DataFrame:
    """Return made-up vectors."""
    rng = np.random.default_rng(seed)
    return pd.DataFrame(
        rng.normal(size=(len(genes), n)), index=pd.Index(genes, name="gene"), columns=[str(i) for i in range(n)]
    )


def written(table: pd.DataFrame, path: Path) -> Path:
    """Write a table as a prior's step does."""
    table.to_parquet(path)
    return path


# --- rows -----------------------------------------------------------------------------------------------------------


def test_a_gene_finds_its_row_under_another_name() -> None:
    """A label by an alias stays as it is in screens that do not measure the gene; its vector is the gene's."""
    found = rows_of(vectors_of(["MAP3K21", "GATA1"]), ["GATA1", "KIAA1804", "NOWHERE1"])
    assert list(found.index) == ["GATA1", "KIAA1804", "NOWHERE1"]
    assert found.notna().all(axis=1).tolist() == [True, True, False]


def test_a_users_table_goes_by_current_symbols(tmp_path: Path) -> None:
    path = tmp_path / "genept.tsv"
    path.write_text("symbol\ta\tb\nAARS\t1\t2\nNOWHERE1\t3\t4\nAARS1\t5\t6\n")
    found = from_table(path, ["AARS1", "GATA1"])
    assert found.loc["AARS1"].tolist() == [1.0, 2.0]
    assert found.loc["GATA1"].isna().all()


@pytest.mark.parametrize(
    ("row", "gene"),
    [
        ("Sox2", "SOX2"), ("SOX2", "Sox2"), ("KIAA1804", "MAP3K21"), ("kiaa1804", "MAP3K21"), ("KIAA1804", "Map3k21"),
        (" POU5F1 ", "POU5F1"), ("ENSG00000181449", "SOX2"),
        ("Aspirin", "aspirin@10"), ("MLL", "KMT2A"),
    ],
)  # fmt: skip
def test_a_users_row_is_found_by_other_letters_and_names(row: str, gene: str, tmp_path: Path) -> None:
    path = tmp_path / "table.tsv"
    path.write_text(f"symbol\ta\nGATA1\t1\n{row}\t2\n")
    assert from_table(path, ["GATA1", gene]).loc[gene].tolist() == [2.0]


def test_a_row_that_may_be_of_two_genes_is_of_none(tmp_path: Path) -> None:
    path = tmp_path / "table.tsv"
    path.write_text("symbol\ta\nGATA1\t1\nSox2\t2\nsox2\t3\n")
    assert from_table(path, ["GATA1", "SOX2"]).loc["SOX2"].isna().all()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("symbol\ta\nGATA1\tx\n", "all others numbers; these hold none: a"),
        ("symbol\nGATA1\n", "(no columns)"),
        ("symbol\ta\nSOX2\t1\n", "has no row for any of the 1 genes that are asked for (for example GATA1)"),
        ("", "cannot be read as a tab-separated table"),
    ],
)
def test_a_table_that_is_none_is_named(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "table.tsv"
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        from_table(path, ["GATA1"])
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


# --- several sources ------------------------------------------------------------------------------------------------


@pytest.fixture
def several(prepared_copy, tmp_path: Path) -> Prepared:
    """Return a split with four sources: one lacks TF1 and TF2, one TF1 alone, co-expression and one table lack none."""
    here = prepared_copy("unseen_perturbation")
    go = written(vectors_of(PERTURBED[2:]), tmp_path / "go.parquet")
    ppi = written(vectors_of([*PERTURBED[1:], "OTHER"], seed=1), tmp_path / "ppi.parquet")
    table = tmp_path / "mine.tsv"
    vectors_of(PERTURBED, seed=2).to_csv(table, sep="\t")
    embeddings(here.pairs, here.embeddings, ["go", "coexpression", {"file": str(table)}, "ppi"], [go, ppi])
    here.run_audit()
    return here


def test_sources_stand_side_by_side_in_their_order(several: Prepared) -> None:
    found = Embeddings.read(several.embeddings)
    assert found.sources == ["go", "coexpression", "mine", "ppi"]
    assert found.without_row() == {"go": ["TF1", "TF2"], "coexpression": [], "mine": [], "ppi": ["TF1"]}
    assert found.without_vector == []
    pd.testing.assert_frame_equal(found.of_source("ppi").table.set_axis(range(6), axis=1).astype(float),
                                  vectors_of([*PERTURBED[1:], "OTHER"], seed=1)
                                   .loc[PERTURBED[1:]].set_axis(range(6), axis=1),
                                  check_names=False, atol=1e-6)  # fmt: skip
    audit = json.loads(several.audit.read_text())
    assert audit["without_row"] == found.without_row()
    assert audit["without_vector"] == []


def test_the_log_counts_rows_per_source(prepared_copy, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    here = prepared_copy("unseen_perturbation")
    go = written(vectors_of(PERTURBED[2:]), tmp_path / "go.parquet")
    with caplog.at_level(logging.INFO):
        embeddings(here.pairs, here.embeddings, ["go"], [go])
    assert "go: 6 of 8 perturbed genes have a row (without: TF1, TF2)" in caplog.text
    assert "2 of 8 perturbed genes have no row in any source" in caplog.text
    here.run_audit()
    assert json.loads(here.audit.read_text())["without_vector"] == ["TF1", "TF2"]


def test_what_may_know_the_screen_is_said_with_every_verdict(
    prepared_copy, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    here = prepared_copy("unseen_perturbation")
    full = vectors_of(PERTURBED)
    full.attrs["knows"] = "the literature"
    tables = [written(full, tmp_path / "full.parquet"), written(vectors_of(PERTURBED), tmp_path / "ppi.parquet")]
    embeddings(here.pairs, here.embeddings, ["string_full", "coexpression", "ppi"], tables)
    assert "string_full: these vectors know the literature" in caplog.text
    assert Embeddings.read(here.embeddings).knows == {"string_full": "the literature"}
    here.run_audit()
    (caveat,) = json.loads(here.audit.read_text())["caveats"]
    assert "The vectors of string_full know the literature" in caveat
    embeddings(here.pairs, here.embeddings, ["ppi"], tables[1:])
    here.run_audit()
    assert json.loads(here.audit.read_text())["caveats"] == []


def test_the_lines_that_make_tables_of_published_vectors_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of docs/how-to/gene-vectors.md, on files of the formats that they name; GenePT's zeros are no vector."""
    torch = pytest.importorskip("torch")
    (code,) = re.findall(
        r"```python\n(import pickle\n.*?)```", (REPOSITORY / "docs/how-to/gene-vectors.md").read_text(), flags=re.DOTALL
    )
    monkeypatch.chdir(tmp_path)
    Path("tables").mkdir()
    torch.save(
        {"AARS": torch.ones(4), "KLF1": torch.arange(4.0)}, "Homo_sapiens.GRCh38.gene_symbol_to_embedding_ESM2.pt"
    )
    texts = {"KLF1": [0.5, 0.25], "GATA1": np.array([0.0, 1.0]), "NOTEXT": [0.0, 0.0]}
    Path("GenePT_gene_embedding_ada_text.pickle").write_bytes(pickle.dumps(texts))
    exec(compile(code, "docs/how-to/gene-vectors.md", "exec"), {})
    esm2 = from_table(Path("tables/esm2.parquet"), ["AARS1", "GATA1", "KLF1"])
    assert esm2.notna().all(axis=1).tolist() == [True, False, True]
    assert esm2.loc["KLF1"].tolist() == [0, 1, 2, 3]
    genept = from_table(Path("tables/genept.parquet"), ["KLF1", "GATA1", "NOTEXT"])
    assert genept.notna().all(axis=1).tolist() == [True, True, False]


def effects_of(name: str, here: Prepared, genes: list[str]) -> np.ndarray:
    """Return what a closed form predicts for genes, as differences from their start cells."""
    cells, vectors = Pairs.read(here.pairs), Embeddings.read(here.embeddings)
    model = build(FAMILIES[name].implementation, {"n_components": 10, "ridge": 0.1} if name == "linear" else {})
    model.fit(cells, vectors, Run(seed=0)) if isinstance(model, Ceiling) else model.fit(
        cells.roles("train", "validation"), vectors, Run(seed=0)
    )
    start = cells.roles("test").select(cells.roles("test").is_control).X.toarray()[:5]
    return model.predict(start, genes, 5, 0) - start


@pytest.mark.parametrize(
    "name", [name for name in CLOSED_FORMS if FAMILIES[name].kind != "ceiling" and name != "transfer"]
)
def test_no_closed_form_sees_a_missing_value(name: str, several: Prepared) -> None:
    assert np.isfinite(effects_of(name, several, PERTURBED)).all()


@pytest.mark.parametrize("name", ["ridge", "nearest_perturbation", "random_forest"])
def test_a_gene_without_any_vector_gets_the_mean_effect(name: str, prepared_copy, tmp_path: Path) -> None:
    here = prepared_copy("unseen_perturbation")
    held_out = json.loads(here.split.read_text())["perturbations"]["test"]
    gene = next(label for label in held_out if "+" not in label)
    go = written(vectors_of([other for other in PERTURBED if other != gene]), tmp_path / "go.parquet")
    embeddings(here.pairs, here.embeddings, ["go"], [go])
    predicted = effects_of(name, here, [gene])
    mean = effects_of("additive", here, ["NOWHERE1"])  # a gene that nothing is known of
    np.testing.assert_allclose(predicted, mean, atol=1e-5)


def test_an_answer_about_a_gene_without_a_vector_says_so(prepared_copy, tmp_path: Path) -> None:
    here = prepared_copy("unseen_perturbation")
    held_out = [label for label in json.loads(here.split.read_text())["perturbations"]["test"] if "+" not in label]
    go = written(vectors_of([gene for gene in PERTURBED if gene != held_out[0]]), tmp_path / "go.parquet")
    embeddings(here.pairs, here.embeddings, ["go"], [go])
    here.run_audit()
    ridge = FAMILIES["ridge"].implementation
    train(here.pairs, here.embeddings, here.audit, tmp_path / "model.npz", tmp_path / "run.json", ridge, {}, 0)
    other = next(
        gene for gene in Pairs.read(here.pairs).genes if gene not in PERTURBED
    )  # measured, and never perturbed
    answer = ask(here, tmp_path / "model.npz", tmp_path, ridge, {}, perturbations=[*held_out[:2], other])
    known = pd.read_csv(f"{answer}.tsv", sep="\t").groupby("perturbation")["known"].first()
    unseen = "extrapolation: 1 gene(s) never perturbed in training"
    assert known[held_out[0]] == known[other] == f"{unseen}, 1 of them without a vector"
    assert known[held_out[1]].startswith(unseen)
    assert "times as far" in known[held_out[1]]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ridge", "gaussian_process"])
def test_a_gene_that_no_cell_lost_is_answered_by_its_row_in_a_users_table(
    name: str, prepared_copy, tmp_path: Path
) -> None:
    here = prepared_copy("unseen_perturbation")
    other = next(gene for gene in Pairs.read(here.pairs).genes if gene not in PERTURBED)  # measured, never perturbed
    table = vectors_of([*PERTURBED, other, "NOWHERE1"])
    table.loc[other] = table.loc["NOWHERE1"] = table.loc["TF1"] + 0.1
    table.to_csv(tmp_path / "mine.tsv", sep="\t")
    sources = ["coexpression", {"file": str(tmp_path / "mine.tsv")}]
    embeddings(here.pairs, here.embeddings, sources)
    assert set(Embeddings.read(here.embeddings).table.index) == set(PERTURBED)
    everyone = tmp_path / "gene_vectors.parquet"
    gene_vectors(here.pairs, here.harmonized, here.split, here.embeddings, everyone, sources)
    here.run_audit()
    model, implementation = tmp_path / "model.npz", FAMILIES[name].implementation
    train(here.pairs, here.embeddings, here.audit, model, tmp_path / "run.json", implementation, {}, 0)
    asked = [other, "NOWHERE1", f"{other}+TF2"]
    answer = ask(here, model, tmp_path, implementation, {}, gene_vectors=everyone, perturbations=asked)
    table = pd.read_csv(f"{answer}.tsv", sep="\t")
    known = table.groupby("perturbation")["known"].first()
    assert all("times as far" in known[label] for label in (other, "NOWHERE1"))
    effects = table.pivot(index="gene", columns="perturbation", values="effect")
    assert (effects.abs().max() > 0.01).all()
    with pytest.raises(InputError, match=r"no vector in coexpression, mine: 'NOWHERE2' \(did you mean NOWHERE1"):
        ask(here, model, tmp_path, implementation, {}, gene_vectors=everyone, perturbations=[other, "NOWHERE2"])


def test_every_measured_gene_has_its_correlations_with_the_components(prepared: dict, tmp_path: Path) -> None:
    here = prepared["unseen_perturbation"]
    everyone = tmp_path / "gene_vectors.parquet"
    gene_vectors(here.pairs, here.harmonized, here.split, here.embeddings, everyone, ["coexpression"])
    found, own = Embeddings.read(everyone).table, Embeddings.read(here.embeddings).table
    pd.testing.assert_frame_equal(found.loc[own.index], own, check_names=False)
    screen, cells = Screen.open(here.harmonized, json.loads(here.split.read_text())), Pairs.read(here.pairs)
    assert set(found.index) == {*screen.var.index, *own.index}
    assert len(found) > len(cells.genes), "also those that are not highly variable"
    components = Components.of(cells.roles("train"))
    same = components.loadings_of(cells.genes, screen, cells)
    np.testing.assert_allclose(same, components.loadings, atol=1e-4)  # of the components' own genes: two ways to one


def test_no_gene_changes_the_answers_of_others(prepared: dict, tmp_path: Path) -> None:
    """Vectors of further genes are on the scale of the perturbed ones, and are scaled by nothing else."""
    here = prepared["unseen_perturbation"]
    everyone = tmp_path / "gene_vectors.parquet"
    gene_vectors(here.pairs, here.harmonized, here.split, here.embeddings, everyone, ["coexpression"])
    pairs, own = Pairs.read(here.pairs), Embeddings.read(here.embeddings)
    further = own.with_genes_of(Embeddings.read(everyone), pairs.genes)
    for name in ("ridge", "gaussian_process"):
        model = build(FAMILIES[name].implementation, {})
        model.fit(pairs, own, Run(seed=0))
        before = model.mean_effects(pairs.X[:2].toarray(), PERTURBED, 0)
        model.add_genes(pairs, further, 0)
        np.testing.assert_allclose(model.mean_effects(pairs.X[:2].toarray(), PERTURBED, 0), before, atol=1e-6)


# --- in the workflow ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_workflow_joins_priors_of_the_users_own(tmp_path: Path) -> None:
    make_screen().write_h5ad(tmp_path / "screen.h5ad")
    rng = np.random.default_rng(0)
    genes = [*PERTURBED[1:], *[f"G{i}" for i in range(80)]]
    terms = [(gene, f"GO:{term:07d}") for gene in genes for term in rng.choice(60, 8, replace=False)]
    pd.DataFrame(terms, columns=["symbol", "go_id"]).to_csv(tmp_path / "annotations.tsv", sep="\t", index=False)
    pd.DataFrame(rng.choice(genes, (400, 2)), columns=["a", "b"]).to_csv(tmp_path / "edges.tsv", sep="\t", index=False)
    config = {
        "select": {"datasets": ["mine"], "splits": ["unseen_perturbation"], "models": ["ridge"], "seeds": [0]},
        "priors": {
            "my_go": {"kind": "go", "source": {"path": {"annotations": "annotations.tsv"}}},
            "my_ppi": {"kind": "ppi", "source": {"path": "edges.tsv"}},
        },
        "embeddings": {"sources": ["my_ppi", "coexpression", "my_go"]},
        "datasets": {
            "mine": {
                "source": {"path": "screen.h5ad"},
                "perturbation": {"column": "perturbation", "control": ["control"]},
                "covariates": {"batch": "lane"},
                "qc": {"min_counts": None, "min_genes": None, "max_pct_mt": None, "min_cells_per_gene": None},
            }
        },
    }
    target = "results/mine/unseen_perturbation/embeddings.parquet"
    outcome = run_snakemake(tmp_path, target, config=config)
    assert outcome.returncode == 0, outcome.text
    assert outcome.jobs["prior"] == 2
    found = Embeddings.read(tmp_path / target)
    assert found.sources == ["my_ppi", "coexpression", "my_go"]
    assert found.without_row() == {"my_ppi": ["TF1"], "coexpression": [], "my_go": ["TF1"]}
