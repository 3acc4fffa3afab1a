"""A union: one file written as several and united is the one file; members that cannot be one screen are refused."""

import json
from collections.abc import Callable
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from conftest import BATCHES, OFF, SPECS, SPECS_OF_CELLS, dataset_block, make_screen
from scipy import sparse
from screens import REAL
from unions import KINDS, check, prepared_from

from perturbflow import api, embeddings
from perturbflow.audit.audit import passed
from perturbflow.audit.evidence import Evidence
from perturbflow.embeddings import Embeddings
from perturbflow.errors import InputError
from perturbflow.pairs import Pairs, pair
from perturbflow.screens.harmonize import harmonize
from perturbflow.screens.unite import unite
from perturbflow.splits.split import split

Files = dict[str, Path]
UNION = {"genes": "shared", "perturbation_types": ["CRISPRi"], "organism": "human"}


@pytest.fixture
def member(tmp_path: Path) -> Callable[..., Files]:
    """Return a function that harmonizes a screen and gives back its files."""

    def call(name: str, screen: ad.AnnData, **changes: object) -> Files:
        folder = tmp_path / name
        folder.mkdir()
        screen = screen.copy()
        screen.uns = {}
        screen.write_h5ad(folder / "screen.h5ad")
        files = {"harmonized": folder / "harmonized.h5ad", "account": folder / "harmonization.json"}
        block = dataset_block(**{"covariates": {}, **changes})
        harmonize(folder / "screen.h5ad", files["harmonized"], files["account"], name, block, OFF)
        return files

    return call


@pytest.fixture
def united(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that unites harmonized screens and gives back the folder of the union."""

    def call(members: dict[str, Files], **changes: object) -> Path:
        folder = tmp_path / "union"
        paths = [[files[part] for files in members.values()] for part in ("harmonized", "account")]
        union = {**UNION, "members": list(members), **changes}
        unite(*paths, folder / "harmonized.h5ad", folder / "harmonization.json", "union", union)
        return folder

    return call


def of_lane(screen: ad.AnnData, lane: str) -> ad.AnnData:
    """Return the cells of one lane as a screen of its own."""
    return screen[screen.obs["lane"] == lane].copy()


def with_genes(screen: ad.AnnData, names: dict[str, str], ids: dict[str, str] | None = None) -> ad.AnnData:
    """Return a screen that calls genes otherwise, and gives their Ensembl ids."""
    changed = screen.copy()
    changed.var = pd.DataFrame({"gene_id": [(ids or {}).get(gene, "") for gene in screen.var_names]},
                               index=[names.get(gene, gene) for gene in screen.var_names])  # fmt: skip
    return changed


# --- one file, written as several -----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["unseen_perturbation", "unseen_context"])
def test_one_file_written_as_several_and_united_is_the_one_file(
    kind: str, member: Callable, united: Callable, tmp_path: Path
) -> None:
    screen = make_screen()
    parts = {lane: of_lane(screen, lane) for lane in BATCHES}
    whole = ad.concat(list(parts.values()))
    whole.obs_names = [f"{lane}:{cell}" for lane, cell in zip(whole.obs["lane"], whole.obs_names, strict=True)]
    one = member("whole", whole, covariates={"batch": "lane"})["harmonized"].parent
    several = united({lane: member(lane, part) for lane, part in parts.items()})
    spec = {**SPECS, **SPECS_OF_CELLS}[kind]
    found = {}
    for folder in (one, several):
        split(folder / "harmonized.h5ad", folder / "harmonization.json", folder / "split.json", kind, spec)
        pair(folder / "harmonized.h5ad", folder / "split.json", folder / "pairs.h5ad", 40)
        predictions = api.baseline("additive", folder / "pairs.h5ad")
        found[folder] = (
            ad.read_h5ad(folder / "harmonized.h5ad"),
            json.loads((folder / "split.json").read_text()),
            ad.read_h5ad(folder / "pairs.h5ad"),
            api.score(predictions, folder / "pairs.h5ad"),
        )
    (harmonized, roles, pairs, scores), (harmonized_u, roles_u, pairs_u, scores_u) = found.values()
    columns = [column for column in pairs.obs if column != "dataset"]
    for one_file, union in ((harmonized, harmonized_u), (pairs, pairs_u)):
        assert abs(one_file.X - union.X).nnz == 0
        pd.testing.assert_frame_equal(
            one_file.obs[[column for column in columns if column in one_file.obs]].astype(str),
            union.obs[[column for column in columns if column in union.obs]].astype(str),
        )
        pd.testing.assert_frame_equal(one_file.var, union.var)
    assert roles == roles_u
    assert np.array_equal(pairs.obsm["control_index"], pairs_u.obsm["control_index"])
    pd.testing.assert_frame_equal(scores, scores_u)
    assert set(harmonized_u.obs["dataset"]) == set(BATCHES)


@pytest.mark.skipif(not REAL.exists(), reason="../shared/data/norman_k562_mini is missing")
def test_two_real_lines_of_one_file_are_two_screens_and_go_through_every_kind_of_split(
    member: Callable, united: Callable, tmp_path: Path
) -> None:
    """Glioblastoma lines of McFaline-Figueroa et al. 2023, with the same nine genes repressed."""
    cells = ad.read_h5ad(REAL)
    lines = {"a172": cells[cells.obs["cell_type"] == "A172"], "t98g": cells[cells.obs["cell_type"] == "T98G"]}
    covariates = {"cell_type": "cell_type"}
    union = united({name: member(name, of, covariates=covariates) for name, of in lines.items()})
    both = ad.read_h5ad(union / "harmonized.h5ad")
    assert both.n_obs == sum(of.n_obs for of in lines.values())
    assert set(zip(both.obs["dataset"], both.obs["cell_type"], strict=True)) == {("a172", "A172"), ("t98g", "T98G")}
    assert both.X.sum() == sum(of.X.sum() for of in lines.values())
    for kind in KINDS:
        check(kind, "t98g", *prepared_from(union, tmp_path / kind, kind, "t98g"))


def test_screens_in_memory_are_united_as_files_are(member: Callable, united: Callable) -> None:
    screen = make_screen()
    members = {lane: member(lane, of_lane(screen, lane)) for lane in BATCHES}
    in_memory = {name: ad.read_h5ad(files["harmonized"]) for name, files in members.items()}
    found, expected = api.unite(in_memory), ad.read_h5ad(united(members) / "harmonized.h5ad")
    assert abs(found.X - expected.X).nnz == 0
    pd.testing.assert_frame_equal(found.obs.astype(str), expected.obs.astype(str))
    pd.testing.assert_frame_equal(found.var.astype(str), expected.var.astype(str))
    other = in_memory[BATCHES[0]].copy()
    other.obs["perturbation_type"] = "CRISPRa"
    with pytest.raises(InputError, match=r"several ways: CRISPRi, CRISPRa.*perturbation_types"):
        api.unite({"a": in_memory[BATCHES[1]], "b": other})


def test_the_account_of_a_union_adds_up_those_of_its_members(member: Callable, united: Callable) -> None:
    screen = make_screen()
    members = {lane: member(lane, of_lane(screen, lane)) for lane in BATCHES}
    account = json.loads((united(members) / "harmonization.json").read_text())
    of_members = [json.loads(files["account"].read_text()) for files in members.values()]
    assert account["cells"] == {"source": screen.n_obs, "kept": screen.n_obs, "dropped": {}}
    for label, n in account["perturbations"]["kept"].items():
        assert n == sum(of["perturbations"]["kept"][label] for of in of_members)
    assert set(account) == {*of_members[0], "union"}
    assert set(account["perturbations"]) == set(of_members[0]["perturbations"])
    assert account["efficacy"]["direction"] == "down"
    assert account["union"]["b1"] == {"cells": 320, "genes": 80, "perturbations": 14, "type": "CRISPRi"}


# --- genes and names ------------------------------------------------------------------------------------------------


def test_lanes_and_cells_of_two_screens_are_not_one(member: Callable, united: Callable) -> None:
    first, second = make_screen(seed=1), make_screen(seed=2)
    batched = {"covariates": {"batch": "lane"}}
    folder = united({"k562": member("k562", first, **batched), "rpe1": member("rpe1", second, **batched)})
    obs = ad.read_h5ad(folder / "harmonized.h5ad").obs
    assert sorted(obs["batch"].unique()) == ["k562:b1", "k562:b2", "rpe1:b1", "rpe1:b2"]
    assert obs.index.is_unique
    assert obs.index[0] == "k562:cell_0"


@pytest.mark.parametrize(("genes", "n"), [("shared", 70), ("any", 80), (["TF1", "GENE30"], 2)])
def test_genes_are_shared_or_any_or_named(genes: str | list, n: int, member: Callable, united: Callable) -> None:
    full = make_screen(seed=1)
    few = make_screen(seed=2)[:, :70].copy()
    folder = united({"full": member("full", full), "few": member("few", few)}, genes=genes)
    harmonized = ad.read_h5ad(folder / "harmonized.h5ad")
    assert harmonized.n_vars == n
    for screen, name in ((full, "full"), (few, "few")):
        own = harmonized[harmonized.obs["dataset"] == name]
        common = [gene for gene in own.var_names if gene in screen.var_names]
        assert np.array_equal(own[:, common].X.toarray(), screen[:, common].X.toarray())
    if genes == "any":
        measured = pd.DataFrame(harmonized.varm["measured"], index=harmonized.var_names, columns=["full", "few"])
        assert measured["full"].all()
        assert measured["few"].sum() == 70
    totals = np.asarray(harmonized.X.sum(axis=1)).ravel()
    assert np.allclose(harmonized.obs["total_counts"], totals)


def test_models_read_no_gene_that_a_member_did_not_measure(member: Callable, united: Callable) -> None:
    """With genes: any the file holds all genes; pairs are those of genes: shared, and pass the audit."""
    members = {"full": member("full", make_screen(seed=1)), "few": member("few", make_screen(seed=2)[:, :70].copy())}
    cells = {}
    for genes in ("shared", "any"):
        folder = united(members, genes=genes)
        files = [folder / name for name in ("harmonized.h5ad", "split.json", "pairs.h5ad", "embeddings.parquet")]
        split(files[0], folder / "harmonization.json", files[1], "x", SPECS["unseen_perturbation"])
        pair(*files[:3], 40)
        embeddings.embeddings(files[2], files[3], ["coexpression"])
        roles = json.loads(files[1].read_text())
        evidence = Evidence.open(roles, files[2], files[0], Embeddings.read(files[3]).table)
        assert set(passed(evidence, "here").values()) == {"passed"}
        cells[genes] = Pairs.read(files[2])
    assert cells["shared"].genes == cells["any"].genes
    assert abs(cells["shared"].X - cells["any"].X).nnz == 0


def test_a_member_that_was_written_anew_has_genes_as_categories_and_is_united(
    member: Callable, united: Callable
) -> None:
    ids = {f"GENE{i}": f"ENSG000009990{i}" for i in range(10, 20)}  # the others have none, so ids are no index
    screens = [
        with_genes(make_screen(seed=seed), {"GENE11": name}, ids) for seed, name in ((1, "GENE11"), (2, "OLD11"))
    ]
    members = {name: member(name, of) for name, of in zip("ab", screens, strict=True)}
    for files in members.values():
        again = ad.read_h5ad(files["harmonized"])
        again.write_h5ad(files["harmonized"])
        assert ad.read_h5ad(files["harmonized"]).var["gene_id"].dtype == "category"
    assert "GENE11" in ad.read_h5ad(united(members) / "harmonized.h5ad").var_names


def test_a_gene_that_members_call_differently_has_one_name(member: Callable, united: Callable) -> None:
    """By Ensembl id: in the measured genes and in the labels."""
    ids = {"GENE30": "ENSG00000999901", "TF1": "ENSG00000999902"}
    screens = [make_screen(seed=seed, labels=["TF1", "TF2", "TF1+TF2"]) for seed in (1, 2)]
    other = {"GENE30": "OLDGENE", "TF1": "OLDTF"}
    screens[1].obs["perturbation"] = screens[1].obs["perturbation"].str.replace("TF1", "OLDTF")
    folder = united(
        {
            "new": member("new", with_genes(screens[0], {}, ids)),
            "old": member("old", with_genes(screens[1], other, ids)),
        }
    )
    harmonized = ad.read_h5ad(folder / "harmonized.h5ad")
    assert harmonized.n_vars == 80
    assert {"GENE30", "TF1"} <= set(harmonized.var_names)
    assert set(harmonized.obs["perturbation"]) == {"control", "TF1", "TF2", "TF1+TF2"}
    account = json.loads((folder / "harmonization.json").read_text())
    assert account["genes"]["renamed"] == {"OLDGENE": "GENE30", "OLDTF": "TF1"}
    own = harmonized[harmonized.obs["dataset"] == "old"]
    column = screens[1].var_names.get_loc("GENE30")
    assert np.array_equal(own[:, "GENE30"].X.toarray().ravel(), screens[1].X.toarray()[:, column])


def test_a_gene_of_two_types_is_kept_in_the_first(member: Callable, united: Callable) -> None:
    """A label with a gene that an earlier type perturbs loses its cells; obs has the type of each cell."""
    activated = make_screen(seed=1, labels=["TF1", "TF2", "TF1+TF2", "TF2+TF3"])
    repressed = make_screen(seed=2, labels=["TF1", "TF4"])
    members = {
        "crispra": member("crispra", activated, perturbation_type="CRISPRa"),
        "crispri": member("crispri", repressed, perturbation_type="CRISPRi"),
    }
    folder = united(members, perturbation_types=["CRISPRi", "CRISPRa"])
    obs = ad.read_h5ad(folder / "harmonized.h5ad").obs
    of_type = obs[~obs["is_control"]].groupby("perturbation_type", observed=True)["perturbation"].unique()
    assert {kind: set(labels) for kind, labels in of_type.items()} == {
        "CRISPRi": {"TF1", "TF4"},
        "CRISPRa": {"TF2", "TF2+TF3"},
    }
    account = json.loads((folder / "harmonization.json").read_text())
    assert account["cells"]["dropped"] == {"perturbation_types": 80}
    assert any("several types" in warning for warning in account["warnings"])


def test_a_line_of_controls_alone_is_asked_and_not_scored(member: Callable, united: Callable) -> None:
    """It trains and answers as a part of the union; held out it leaves nothing to score, and the message says so."""
    screen, new = make_screen(seed=1), make_screen(seed=2, labels=[])
    with pytest.raises(InputError, match="no perturbation has"):
        member("refused", new)
    folder = united({"known": member("known", screen), "new": member("new", new, controls_only=True)})
    files = [folder / name for name in ("harmonized.h5ad", "harmonization.json", "split.json")]
    split(*files, "x", SPECS["unseen_perturbation"])
    pair(files[0], files[2], folder / "pairs.h5ad", 40)
    obs = ad.read_h5ad(folder / "pairs.h5ad").obs
    of_new = obs[obs["dataset"] == "new"]
    assert of_new["is_control"].all()
    assert set(of_new["role"]) == {"train", "validation", "test"}
    assert len(api.score(api.baseline("set_gp", folder / "pairs.h5ad"), folder / "pairs.h5ad")) > 0
    spec = {**SPECS_OF_CELLS["unseen_context"], "covariate": "dataset", "held_out": ["new"]}
    with pytest.raises(InputError, match="dataset new has controls alone, so there is nothing to score"):
        split(*files, "x", spec)


# --- bad input ------------------------------------------------------------------------------------------------------


def test_the_same_cells_twice_are_found_whatever_their_names(member: Callable, united: Callable) -> None:
    screen = make_screen()
    copied = screen[::-1].copy()
    copied.obs_names = [f"other_{i}" for i in range(copied.n_obs)]
    with pytest.raises(InputError, match=r"640 cells of one and two have the same counts.*the same cells twice"):
        united({"one": member("one", screen), "two": member("two", copied)})


def test_shallow_cells_that_are_equal_by_chance_are_no_copies(member: Callable, united: Callable) -> None:
    rng = np.random.default_rng(0)
    screens = []
    for _ in range(2):
        screen = make_screen(labels=["TF1"])
        screen.X = sparse.csr_matrix(rng.poisson(0.02, screen.shape).astype(np.float32))
        screens.append(screen)
    united({"one": member("one", screens[0]), "two": member("two", screens[1])})


def test_members_that_share_no_gene_are_refused(member: Callable, united: Callable) -> None:
    screens = [make_screen(seed=seed) for seed in (1, 2)]
    other = with_genes(screens[1], {gene: f"X{gene}" for gene in screens[1].var_names})
    with pytest.raises(InputError, match=r"share no measured gene.*one: TF1.*two: XTF1"):
        united({"one": member("one", screens[0]), "two": member("two", other)})


def test_named_genes_must_be_measured_by_all(member: Callable, united: Callable) -> None:
    screens = {name: member(name, make_screen(seed=seed)) for seed, name in enumerate(("one", "two"))}
    with pytest.raises(InputError, match=r"one does not measure NOSUCH\. Remove it"):
        united(screens, genes=["TF1", "NOSUCH"])


def test_two_genes_that_swap_a_name_are_refused(member: Callable, united: Callable) -> None:
    ids = {"GENE30": "ENSG00000999901", "GENE31": "ENSG00000999902"}
    swapped = with_genes(make_screen(seed=2), {}, {"GENE31": "ENSG00000999901", "GENE30": "ENSG00000999902"})
    with pytest.raises(InputError, match="ENSG00000999901 is called GENE30 in one and GENE31 in two"):
        united({"one": member("one", with_genes(make_screen(seed=1), {}, ids)), "two": member("two", swapped)})


def test_normalized_values_in_a_member_are_refused_before_the_union(member: Callable) -> None:
    screen = make_screen()
    screen.X = sparse.csr_matrix(np.log1p(screen.X.toarray() / 3.0).astype(np.float32))
    with pytest.raises(InputError, match=r"screen\.h5ad: .*counts"):
        member("normalized", screen)
