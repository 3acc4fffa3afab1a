"""The audit: a clean split passes, and every kind of leak that is planted is caught and named."""

import json
from collections.abc import Callable
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
from conftest import SPECS, SPECS_OF_CELLS, Prepared, make_screen, prepare
from scipy import sparse

from perturbflow import embeddings, pairs
from perturbflow.audit.audit import CHECKS
from perturbflow.embeddings import coexpression
from perturbflow.errors import InputError
from perturbflow.genes.symbols import GUIDE, members_of
from perturbflow.io.files import file_digest
from perturbflow.pairs import Pairs
from perturbflow.splits.split import names_digest


def change_split(here: Prepared, change: Callable[[dict], None]) -> None:
    """Change split.json in place."""
    content = json.loads(here.split.read_text())
    change(content)
    here.split.write_text(json.dumps(content))


def change_pairs(here: Prepared, change: Callable[[ad.AnnData], ad.AnnData | None]) -> None:
    """Change pairs.h5ad in place."""
    adata = ad.read_h5ad(here.pairs)
    changed = change(adata)
    (adata if changed is None else changed).write_h5ad(here.pairs)


def first_row(adata: ad.AnnData, role: str, is_control: bool) -> int:
    """Return the first cell of a role."""
    return int(np.flatnonzero(((adata.obs["role"] == role) & (adata.obs["is_control"] == is_control)).to_numpy())[0])


# --- leaks, one function each: they spoil a clean split -------------------------------------------------------------


def a_perturbation_in_two_roles(here: Prepared) -> None:
    def change(split: dict) -> None:
        split["perturbations"]["train"].append(split["perturbations"]["test"][0])

    change_split(here, change)


def a_perturbation_in_two_roles_with_its_members_reversed(here: Prepared) -> None:
    def change(split: dict) -> None:
        label = next(label for label in split["perturbations"]["test"] if "+" in label)
        split["perturbations"]["train"].append("+".join(reversed(members_of(label))))

    change_split(here, change)


def a_cell_in_two_roles(here: Prepared) -> None:
    def change(split: dict) -> None:
        split["cells"]["train"].append(split["cells"]["test"][0])
        split["sha256"]["train"]["cells"] = names_digest(split["cells"]["train"])

    change_split(here, change)


def a_label_with_unsorted_members(here: Prepared) -> None:
    def change(adata: ad.AnnData) -> None:
        label = next(label for label in adata.obs["perturbation"].cat.categories if "+" in label)
        adata.obs["perturbation"] = adata.obs["perturbation"].cat.rename_categories(
            {label: "+".join(reversed(members_of(label)))}
        )

    change_pairs(here, change)


def a_test_cell_moved_to_training(here: Prepared) -> None:
    def change(adata: ad.AnnData) -> None:
        adata.obs.iloc[first_row(adata, "test", False), adata.obs.columns.get_loc("role")] = "train"

    change_pairs(here, change)


def a_test_control_moved_to_training(here: Prepared) -> None:
    def change(adata: ad.AnnData) -> None:
        control = first_row(adata, "test", True)
        used = (adata.obsm["control_index"] == control).any(axis=1)
        adata.obsm["control_index"][used] = first_row(adata, "test", True) + 1
        adata.obs.iloc[control, adata.obs.columns.get_loc("role")] = "train"

    change_pairs(here, change)


def a_matched_control_of_another_role(here: Prepared) -> None:
    def change(adata: ad.AnnData) -> None:
        adata.obsm["control_index"][first_row(adata, "train", False), 3] = first_row(adata, "test", True)

    change_pairs(here, change)


def a_matched_control_that_is_perturbed(here: Prepared) -> None:
    def change(adata: ad.AnnData) -> None:
        row = first_row(adata, "train", False)
        adata.obsm["control_index"][row, 0] = row

    change_pairs(here, change)


def a_perturbed_cell_without_control(here: Prepared) -> None:
    def change(adata: ad.AnnData) -> None:
        adata.obsm["control_index"][first_row(adata, "train", False), 0] = -1

    change_pairs(here, change)


def a_matched_control_of_another_cell_type(here: Prepared) -> None:
    def change(adata: ad.AnnData) -> None:
        kinds = np.full(adata.n_obs, "unknown", dtype=object)
        kinds[first_row(adata, "train", True)] = "another"
        adata.obs["cell_type"] = pd.Categorical(kinds)

    change_pairs(here, change)


def a_held_out_gene_in_a_training_combination(here: Prepared) -> None:
    def change(split: dict) -> None:
        single = next(label for label in split["perturbations"]["test"] if "+" not in label)
        label = next(label for label in split["perturbations"]["test"] if "+" in label and single in members_of(label))
        for part in ("perturbations", "cells"):
            moved = (
                {label}
                if part == "perturbations"
                else set(ad.read_h5ad(here.pairs).obs.query("perturbation == @label").index)
            )
            split[part]["test"] = [name for name in split[part]["test"] if name not in moved]
            split[part]["train"] = sorted([*split[part]["train"], *moved])
            for role in ("train", "test"):
                split["sha256"][role][part] = names_digest(split[part][role])

    change_split(here, change)


def expression_scaled_by_something_else(here: Prepared) -> None:
    def change(adata: ad.AnnData) -> None:
        adata.X = adata.X * 1.01

    change_pairs(here, change)


def a_target_sum_of_all_cells(here: Prepared) -> None:
    def change(adata: ad.AnnData) -> None:
        totals = np.asarray(ad.read_h5ad(here.harmonized).X.sum(axis=1)).ravel()
        everywhere = float(np.median(totals))
        assert everywhere != adata.uns["perturbflow"]["target_sum"]
        adata.uns["perturbflow"]["target_sum"] = everywhere

    change_pairs(here, change)


def variable_genes_of_held_out_cells(here: Prepared) -> None:
    def change(adata: ad.AnnData) -> ad.AnnData:
        roles = json.loads(here.split.read_text())
        screen = ad.read_h5ad(here.harmonized)
        held_out = screen[roles["cells"]["test"]].copy()
        sc.pp.normalize_total(held_out, target_sum=float(adata.uns["perturbflow"]["target_sum"]))
        sc.pp.log1p(held_out)
        sc.pp.highly_variable_genes(held_out, n_top_genes=40, flavor="seurat")
        screen = screen[adata.obs_names]
        X = screen.X.multiply(adata.uns["perturbflow"]["target_sum"] / screen.X.sum(axis=1)).tocsr()
        X.data = np.log1p(X.data)
        var = screen.var.assign(
            highly_variable=held_out.var["highly_variable"], is_perturbed_gene=screen.var_names.str.startswith("TF")
        )
        kept = (var["highly_variable"] | var["is_perturbed_gene"]).to_numpy()
        return ad.AnnData(
            X=sparse.csr_matrix(X[:, kept], dtype=np.float32),
            obs=adata.obs,
            var=var[kept],
            layers={"counts": screen.X[:, kept]},
            obsm=dict(adata.obsm),
            uns=dict(adata.uns),
        )

    change_pairs(here, change)
    embeddings.embeddings(here.pairs, here.embeddings, ["coexpression"])


def embeddings_of_all_cells(here: Prepared) -> None:
    cells = Pairs.read(here.pairs)
    everywhere = Pairs(cells.X, cells.obs.assign(role="train"), cells.genes, cells.control_index, cells.rows)
    genes = list(pd.read_parquet(here.embeddings).index)
    coexpression(everywhere, genes).astype(np.float32).to_parquet(here.embeddings)


def cells_of_every_perturbation_passed_off_as_perturbations_held_out(here: Prepared) -> None:
    change_split(here, lambda split: split["spec"].update(kind="unseen_perturbation"))


def cells_of_the_held_out_context_in_training(here: Prepared) -> None:
    def change(split: dict) -> None:
        obs = ad.read_h5ad(here.pairs).obs
        moved = obs.index[(obs["role"] == "test") & obs["is_control"]][:3]
        split["cells"]["test"] = [cell for cell in split["cells"]["test"] if cell not in set(moved)]
        split["cells"]["train"] = sorted([*split["cells"]["train"], *moved])
        for role in ("train", "test"):
            split["sha256"][role]["cells"] = names_digest(split["cells"][role])

    change_split(here, change)
    pairs.pair(here.harmonized, here.split, here.pairs, 40)
    embeddings.embeddings(here.pairs, here.embeddings, ["coexpression"])


def a_perturbation_that_trains_in_the_context_of_its_test(here: Prepared) -> None:
    def change(split: dict) -> None:
        obs = ad.read_h5ad(here.pairs).obs
        label = split["perturbations"]["test"][0]
        moved = obs.index[(obs["role"] == "test") & (obs["perturbation"] == label)][:3]
        split["cells"]["test"] = [cell for cell in split["cells"]["test"] if cell not in set(moved)]
        split["cells"]["train"] = sorted([*split["cells"]["train"], *moved])
        split["perturbations"]["train"] = sorted({*split["perturbations"]["train"], label})
        for role in ("train", "test"):
            split["sha256"][role]["cells"] = names_digest(split["cells"][role])

    change_split(here, change)
    pairs.pair(here.harmonized, here.split, here.pairs, 40)
    embeddings.embeddings(here.pairs, here.embeddings, ["coexpression"])


def sources_that_training_does_not_have(here: Prepared) -> None:
    def change(split: dict) -> None:
        split["n_sources"] = dict.fromkeys(split["n_sources"], 3)

    change_split(here, change)


def another_dose_of_a_held_out_compound(here: Prepared) -> None:
    def change(split: dict) -> None:
        split["perturbations"]["train"].append(
            f"{next(label for label in split['perturbations']['test'] if '+' not in label)}@7"
        )

    change_split(here, change)


def another_dose_of_a_held_out_combination(here: Prepared) -> None:
    def change(split: dict) -> None:
        split["perturbations"]["train"].append(
            "+".join(f"{member}@7" for member in members_of(split["perturbations"]["test"][0]))
        )

    change_split(here, change)


def a_held_out_dose_without_another(here: Prepared) -> None:
    def change(split: dict) -> None:
        split["perturbations"]["test"].append("TF8@5")

    change_split(here, change)


def a_held_out_dose_in_a_training_combination(here: Prepared) -> None:
    def change(split: dict) -> None:
        label = next(label for label in split["perturbations"]["test"] if "+" not in label)
        split["perturbations"]["train"].append(f"{label}+TF8")

    change_split(here, change)


def other_doses_that_the_split_says_are_unseen(here: Prepared) -> None:
    def change(split: dict) -> None:
        split["members_seen"] = dict.fromkeys(split["members_seen"], 0)

    change_split(here, change)


def guides_as_perturbations(here: Prepared) -> None:
    def change(split: dict) -> None:
        split["perturbations"]["train"].append("TF1_g1")
        split["perturbations"]["test"].append("TF1_g2")

    change_split(here, change)


def guides_within_a_combination(here: Prepared) -> None:
    def change(split: dict) -> None:
        split["perturbations"]["train"].append("TF1_g1")
        split["perturbations"]["test"].append("TF1_g2+TF2_g1")

    change_split(here, change)


def control_pairs_drawn_without_the_seed(here: Prepared) -> None:
    def change(adata: ad.AnnData) -> None:
        adata.obsm["control_index"] = pairs.match_controls(adata.obs, 8, seed=12345)[0]

    change_pairs(here, change)


def an_experiment_twice(here: Prepared, columns: slice = slice(None)) -> None:
    """Copy a training cell's counts over a test control's, under another name, and prepare all that follows anew."""
    roles = json.loads(here.split.read_text())
    screen = ad.read_h5ad(here.harmonized)
    X = screen.X.toarray()
    X[screen.obs_names.get_loc(roles["cells"]["test"][0])] = X[screen.obs_names.get_loc(roles["cells"]["train"][0])]
    X[:, columns] = 0
    screen.X = sparse.csr_matrix(X)
    screen.write_h5ad(here.harmonized)
    pairs.pair(here.harmonized, here.split, here.pairs, 40)
    embeddings.embeddings(here.pairs, here.embeddings, ["coexpression"])


def an_experiment_twice_under_two_names(here: Prepared) -> None:
    an_experiment_twice(here, slice(0, 0))


def de_lists_of_all_cells(here: Prepared) -> None:
    def change(adata: ad.AnnData) -> None:
        adata.uns["rank_genes_groups_cov_all"] = {"TF1": adata.var_names[:5].tolist()}

    change_pairs(here, change)


def coordinates_of_the_source(here: Prepared) -> None:
    screen = ad.read_h5ad(here.harmonized)
    screen.obsm["X_pca"] = np.zeros((screen.n_obs, 2))
    screen.write_h5ad(here.harmonized)


def an_outcome_in_obs(here: Prepared) -> None:
    def change(adata: ad.AnnData) -> None:
        adata.obs["bulk_fitness"] = 1.0

    change_pairs(here, change)


def a_cell_with_another_label(here: Prepared) -> None:
    def change(adata: ad.AnnData) -> None:
        obs = adata.obs
        label = next(label for label in json.loads(here.split.read_text())["perturbations"]["train"] if label != "TF1")
        obs.iloc[int(np.flatnonzero(obs["perturbation"] == label)[0]), obs.columns.get_loc("perturbation")] = "TF1"

    change_pairs(here, change)


LEAKS = [
    ("unseen_combination", a_perturbation_in_two_roles, "roles_are_disjoint: perturbations in both train and test"),
    (
        "unseen_combination",
        a_perturbation_in_two_roles_with_its_members_reversed,
        "roles_are_disjoint: perturbations in both train and test",
    ),
    ("unseen_combination", a_cell_in_two_roles, "roles_are_disjoint: 1 cells in both train and test"),
    (
        "unseen_combination",
        a_label_with_unsorted_members,
        "labels_are_canonical: labels with unsorted or repeated members",
    ),
    ("unseen_combination", a_test_cell_moved_to_training, "roles_of_cells_agree: cells of .* have the role train"),
    (
        "unseen_combination",
        a_test_control_moved_to_training,
        "roles_of_cells_agree: the cells with the role train are not those of the split",
    ),
    (
        "unseen_combination",
        a_matched_control_of_another_role,
        "controls_are_of_the_role: 1 cells are matched with controls of another role",
    ),
    (
        "unseen_combination",
        a_matched_control_that_is_perturbed,
        "controls_are_of_the_role: matched controls that are perturbed",
    ),
    (
        "unseen_combination",
        a_perturbed_cell_without_control,
        "controls_are_of_the_role: perturbed cells without a matched control",
    ),
    (
        "unseen_combination",
        a_matched_control_of_another_cell_type,
        "controls_are_of_the_role: .* controls of another cell_type",
    ),
    (
        "unseen_perturbation",
        a_held_out_gene_in_a_training_combination,
        "held_out_genes_are_unseen: held-out genes or compounds that training holds",
    ),
    (
        "unseen_perturbation",
        another_dose_of_a_held_out_compound,
        "held_out_genes_are_unseen: held-out genes or compounds that training holds",
    ),
    (
        "unseen_combination",
        another_dose_of_a_held_out_combination,
        "held_out_combinations_are_unseen: combinations, one held out and one in training, that differ by dose alone",
    ),
    (
        "unseen_dose",
        a_held_out_dose_without_another,
        "held_out_doses_lie_among_others: .* training holds no dose of: TF8@5",
    ),
    (
        "unseen_dose",
        a_held_out_dose_in_a_training_combination,
        "held_out_doses_lie_among_others: .* training holds in a combination",
    ),
    ("unseen_dose", other_doses_that_the_split_says_are_unseen, "members_seen_are_told: members_seen is wrong for TF"),
    (
        "unseen_combination",
        expression_scaled_by_something_else,
        "expression_is_normalized: X is not the counts normalized",
    ),
    (
        "unseen_combination",
        a_target_sum_of_all_cells,
        "normalization_is_of_training: target sum .* is not the training cells' median",
    ),
    (
        "unseen_combination",
        variable_genes_of_held_out_cells,
        "genes_are_of_training: .* highly variable genes are not those of the training cells",
    ),
    ("unseen_combination", embeddings_of_all_cells, "embeddings_are_of_training: co-expression embeddings differ"),
    (
        "random_cells",
        cells_of_every_perturbation_passed_off_as_perturbations_held_out,
        "roles_are_disjoint: perturbations in both train and test",
    ),
    (
        "unseen_context",
        cells_of_every_perturbation_passed_off_as_perturbations_held_out,
        "roles_are_disjoint: perturbations in both train and test",
    ),
    ("random_cells", a_cell_in_two_roles, "roles_are_disjoint: 1 cells in both train and test"),
    (
        "unseen_context",
        cells_of_the_held_out_context_in_training,
        "held_out_contexts_are_unseen: 3 cells are on the wrong side of the held-out batch b2",
    ),
    (
        "unseen_perturbation_in_context",
        a_perturbation_that_trains_in_the_context_of_its_test,
        "held_out_places_are_unseen: perturbations that are tested in a context and train in it: .* in b",
    ),
    (
        "unseen_context",
        sources_that_training_does_not_have,
        r"sources_are_told: n_sources is wrong for TF1 \(3 for 1\)",
    ),
    (
        "unseen_perturbation",
        guides_as_perturbations,
        "guides_of_a_gene_stay_together: guides of one gene, one held out and one in training: TF1_g2 and TF1_g1",
    ),
    (
        "unseen_perturbation",
        guides_within_a_combination,
        r"guides_of_a_gene_stay_together: guides of one gene, one held out and one in training: TF1_g2\+TF2_g1 and TF1",
    ),
    (
        "unseen_combination",
        control_pairs_drawn_without_the_seed,
        "controls_are_matched_by_seed: .* cells are matched with other controls than the split's seed gives",
    ),
    (
        "unseen_combination",
        an_experiment_twice_under_two_names,
        "no_cell_twice: 1 held-out cells have the counts of a training cell",
    ),
    (
        "unseen_combination",
        de_lists_of_all_cells,
        "nothing_else_is_carried: pairs.h5ad carries uns rank_genes_groups_cov_all",
    ),
    ("unseen_combination", coordinates_of_the_source, "nothing_else_is_carried: harmonized.h5ad carries obsm X_pca"),
    ("unseen_combination", an_outcome_in_obs, "nothing_else_is_carried: pairs.h5ad carries obs bulk_fitness"),
    ("unseen_combination", a_cell_with_another_label, "cells_are_those_of_the_screen: .* differ in obs perturbation"),
]


@pytest.mark.parametrize("kind", [*SPECS, *SPECS_OF_CELLS])
def test_a_clean_split_passes_and_its_files_are_digested(kind: str, prepared: dict[str, Prepared]) -> None:
    here = prepared[kind]
    content = json.loads(here.audit.read_text())
    assert set(content["checks"]) == {check.__name__ for check in CHECKS}
    assert set(content["checks"].values()) == {"passed"}
    assert content["sha256"] == {path.name: file_digest(path) for path in (here.split, here.pairs, here.embeddings)}
    assert content["split_sha256"] == json.loads(here.split.read_text())["sha256"]


@pytest.mark.parametrize(
    ("kind", "plant", "message"), LEAKS, ids=[f"{plant.__name__}-{kind}" for kind, plant, _ in LEAKS]
)
def test_a_planted_leak_is_caught_and_named(kind: str, plant: Callable, message: str, prepared_copy: Callable) -> None:
    here = prepared_copy(kind)
    here.audit.unlink()
    plant(here)
    with pytest.raises(InputError, match=message) as raised:
        here.run_audit()
    assert "Leak in" in str(raised.value)
    assert not here.audit.exists()


def test_every_check_has_its_leak() -> None:
    caught = {message.split(":")[0] for _, _, message in LEAKS}
    assert caught == {check.__name__ for check in CHECKS}


def test_cells_so_shallow_that_chance_makes_them_alike_are_no_copies(prepared_copy: Callable) -> None:
    here = prepared_copy("unseen_combination")
    an_experiment_twice(here, slice(4, None))  # four genes are left of eighty
    counts = ad.read_h5ad(here.harmonized).to_df().drop_duplicates()
    roles = json.loads(here.split.read_text())["cells"]
    assert len(counts) < sum(map(len, roles.values())), "there must be cells that are alike"
    here.run_audit()


def test_what_was_fitted_on_training_cells_is_digested(prepared: dict[str, Prepared], prepared_copy: Callable) -> None:
    here = prepared_copy("unseen_combination")
    first = json.loads(here.audit.read_text())["fitted_sha256"]
    assert set(first) == {"training_cells", "target_sum", "highly_variable_genes", "coexpression"}
    assert first["training_cells"] == json.loads(here.split.read_text())["sha256"]["train"]["cells"]
    screen = ad.read_h5ad(here.harmonized)
    roles = json.loads(here.split.read_text())["cells"]

    def fitted_after(role: str) -> dict[str, str]:
        changed = screen.copy()
        X = changed.X.toarray()
        X[changed.obs_names.isin(roles[role])] += np.random.default_rng(0).poisson(3, X.shape[1])
        changed.X = sparse.csr_matrix(X)
        changed.write_h5ad(here.harmonized)
        pairs.pair(here.harmonized, here.split, here.pairs, 40)
        embeddings.embeddings(here.pairs, here.embeddings, ["coexpression"])
        here.run_audit()
        return json.loads(here.audit.read_text())["fitted_sha256"]

    assert fitted_after("test") == first, "test cells have no part in what is fitted"
    changed = fitted_after("train")
    assert changed["training_cells"] == first["training_cells"]
    assert changed["target_sum"] != first["target_sum"]
    assert changed["coexpression"] != first["coexpression"]


@pytest.mark.parametrize(
    ("label", "gene"),
    [
        ("ATF2g1", "ATF2"),
        ("p-sgELK1-6", "ELK1"),
        ("TF1_sg2", "TF1"),
        ("TF1-2", "TF1"),
        ("TF1", None),
        ("RAG1", None),
        ("CEBPA", None),
    ],
)
def test_guides_are_told_from_genes(label: str, gene: str | None) -> None:
    match = GUIDE.fullmatch(label)
    assert (match["gene"] if match else None) == gene


def test_nothing_of_the_source_but_counts_and_obs_is_carried(tmp_path: Path) -> None:
    screen = make_screen()
    screen.obs["bulk_fitness"] = 1.0
    screen.uns["rank_genes_groups_cov_all"] = {"TF1": ["GENE1"]}
    screen.var["highly_variable"] = True
    screen.obsm["X_pca"] = np.zeros((screen.n_obs, 2))
    screen.varm["PCs"] = np.zeros((screen.n_vars, 2))
    screen.layers["scaled"] = screen.X.copy()
    here = prepare(tmp_path, screen, SPECS["unseen_perturbation"])
    harmonized, paired = ad.read_h5ad(here.harmonized), ad.read_h5ad(here.pairs)
    assert set(harmonized.uns) == set(paired.uns) == {"perturbflow"}
    assert not [*harmonized.obsm, *harmonized.varm, *harmonized.layers, *paired.varm]
    assert set(harmonized.var) == {"gene_name", "gene_id", "original_name"}
    assert "bulk_fitness" in harmonized.obs, "the source's columns stay with the screen"
    assert "bulk_fitness" not in paired.obs, "and go no further"
