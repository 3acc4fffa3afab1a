"""Harmonization: one schema for every screen, an account of all that was dropped, and clear refusals."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import sparse

from perturbflow.errors import InputError
from perturbflow.genes.symbols import CONTROL, canonical_label, members_of


@pytest.fixture(scope="module")
def harmonized(prepared: dict) -> ad.AnnData:
    """Return the small screen, harmonized."""
    return ad.read_h5ad(prepared["unseen_combination"].harmonized)


def with_labels(screen: ad.AnnData, labels: list) -> ad.AnnData:
    """Return a copy whose first perturbed cells, cell_80 onwards, carry other labels."""
    screen = screen.copy()
    column = screen.obs["perturbation"].astype(object).to_numpy().copy()
    column[80 : 80 + len(labels)] = labels
    screen.obs["perturbation"] = column
    return screen


def cells(result: SimpleNamespace, n: int) -> list:
    """Return the labels of cells 80, 81, ... as harmonized; None for a cell that was dropped."""
    obs = result.adata.obs["perturbation"].astype(str)
    return [obs.get(f"cell_{i}") for i in range(80, 80 + n)]


def assert_the_account_adds_up(result: SimpleNamespace) -> None:
    """Source = kept + dropped, for cells and genes."""
    account = result.account
    assert account["cells"]["source"] == account["cells"]["kept"] + sum(account["cells"]["dropped"].values())
    genes = account["genes"]
    assert genes["source"] == genes["kept"] + sum(genes["dropped"].values()) + genes["merged"]
    assert result.adata.shape == (account["cells"]["kept"], genes["kept"])
    assert sum(account["perturbations"]["kept"].values()) == account["cells"]["kept"]


# --- the schema -----------------------------------------------------------------------------------------------------


def test_counts_are_raw_integers_in_csr(harmonized: ad.AnnData, tiny_screen: Callable) -> None:
    assert isinstance(harmonized.X, sparse.csr_matrix)
    assert harmonized.X.data.min() > 0
    assert np.array_equal(harmonized.X.data, np.rint(harmonized.X.data))
    screen = tiny_screen()
    assert np.array_equal(
        harmonized.X.toarray(), screen[harmonized.obs_names, harmonized.var["original_name"]].X.toarray()
    )


def test_obs_has_the_fixed_columns_and_types(harmonized: ad.AnnData) -> None:
    obs = harmonized.obs
    assert obs["is_control"].dtype == bool
    assert pd.api.types.is_integer_dtype(obs["n_perturbations"])
    for column in ("perturbation", "perturbation_type", "cell_type", "batch", "dataset"):
        assert isinstance(obs[column].dtype, pd.CategoricalDtype), column
        assert obs[column].notna().all(), column
        assert set(obs[column].cat.categories) == set(obs[column]), f"{column}: categories without a cell"
    assert (obs["is_control"] == (obs["perturbation"] == CONTROL)).all()
    assert (obs["n_perturbations"] == obs["perturbation"].astype(str).map(lambda label: len(members_of(label)))).all()
    assert set(obs["n_perturbations"]) == {0, 1, 2}
    assert set(obs["dataset"]) == {"mine"}
    assert set(obs["perturbation_type"]) == {"CRISPRi"}


def test_a_covariate_that_the_source_is_silent_about_is_unknown(
    harmonized_from: Callable, tiny_screen: Callable
) -> None:
    screen = tiny_screen()
    screen.obs["donor"] = pd.Series(["d1", np.nan] * (screen.n_obs // 2), index=screen.obs_names, dtype=object)
    obs = harmonized_from(screen, covariates={"cell_type": "donor"}).adata.obs
    assert set(obs["batch"]) == {"unknown"}
    assert set(obs["cell_type"]) == {"d1", "unknown"}
    assert (obs["cell_type"] == "unknown").sum() == screen.n_obs // 2


def test_qc_columns_are_recomputed(harmonized_from: Callable, tiny_screen: Callable) -> None:
    screen = tiny_screen()
    screen.obs["total_counts"] = -1.0
    screen.obs["pct_counts_mt"] = 0.5
    adata = harmonized_from(screen).adata
    X = adata.X.toarray()
    is_mt = adata.var_names.str.startswith("MT-")
    assert is_mt.sum() == 1
    assert np.allclose(adata.obs["total_counts"], X.sum(axis=1))
    assert (adata.obs["n_genes_by_counts"] == (X > 0).sum(axis=1)).all()
    assert np.allclose(adata.obs["pct_counts_mt"], 100 * X[:, is_mt].sum(axis=1) / X.sum(axis=1), atol=1e-4)
    assert adata.obs["pct_counts_mt"].max() > 1, "percent, not a fraction"
    assert (adata.obs["source_total_counts"] == -1.0).all()


def test_other_columns_are_kept_and_prefixed_where_they_collide(
    harmonized_from: Callable, tiny_screen: Callable
) -> None:
    screen = tiny_screen()
    screen.obs["batch"] = "from the source"
    screen.obs["guide"] = "sg1"
    obs = harmonized_from(screen).adata.obs
    assert set(obs["batch"]) == {"b1", "b2"}
    assert set(obs["source_batch"]) == {"from the source"}
    assert set(obs["guide"]) == {"sg1"}
    assert set(obs["lane"]) == {"b1", "b2"}
    assert (obs["source_perturbation"].astype(str) == obs["perturbation"].astype(str)).all()


def test_a_prefixed_column_does_not_overwrite_one_of_that_name(
    harmonized_from: Callable, tiny_screen: Callable
) -> None:
    screen = tiny_screen()
    screen.obs["source_batch"] = "older"
    screen.obs["batch"] = "newer"
    obs = harmonized_from(screen).adata.obs
    assert set(obs["source_batch"]) == {"older"}
    assert set(obs["source_source_batch"]) == {"newer"}


def test_var_has_symbols_ids_and_the_names_of_the_source(harmonized: ad.AnnData) -> None:
    assert list(harmonized.var.columns) == ["gene_name", "gene_id", "original_name"]
    assert harmonized.var_names.is_unique
    assert (harmonized.var_names == harmonized.var["gene_name"]).all()
    assert set(harmonized.var["gene_id"]) == {""}


def test_uns_tells_where_the_screen_is_from(harmonized_from: Callable, tiny_screen: Callable) -> None:
    result = harmonized_from(with_labels(tiny_screen(), [np.nan] * 5), qc={"min_cells_per_gene": 5})
    told = result.adata.uns["perturbflow"]
    assert told["source"].endswith("screen.h5ad")
    assert told["sha256"] == result.account["source"]["sha256"]
    assert {"perturbflow", "anndata", "scanpy"} <= set(told["versions"])
    assert told["dropped_cells"]["unassigned"] == 5
    assert told["dropped_genes"]["qc.min_cells_per_gene"] == result.account["genes"]["dropped"]["qc.min_cells_per_gene"]


def test_the_same_screen_gives_the_same_file(harmonized_from: Callable, tiny_screen: Callable) -> None:
    first = harmonized_from(tiny_screen())
    kept = first.adata.copy()
    second = harmonized_from(tiny_screen()).adata
    assert (kept.X != second.X).nnz == 0
    pd.testing.assert_frame_equal(kept.obs, second.obs)


# --- labels ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        ("control", "control"), ("NT", "control"), ("ctrl", "control"), ("NT+ctrl", "control"), ("NT+NT", "control"),
        ("A+ctrl", "A"), ("ctrl+A", "A"), ("A+control", "A"), ("A+A", "A"), ("B+A", "A+B"), ("C+A+B", "A+B+C"),
        ("A + B", "A+B"),
        ("A+", "A"), ("AARS", "AARS1"), ("C19orf26+ELMSAN1", "CBARP+MIDEAS"), ("AARS+AARS1", "AARS1"),
    ],
)  # fmt: skip
def test_labels_become_canonical(label: str, expected: str) -> None:
    assert canonical_label(label, {"NT", "ctrl"}, "+") == expected


def test_separators_and_organisms() -> None:
    assert canonical_label("B_A", {"NT"}, "_") == "A+B"
    assert canonical_label("B|NT", {"NT"}, "|") == "B"
    assert canonical_label("HLA-A", {"NT"}, None) == "HLA-A"
    assert canonical_label("A_B", {"NT"}, None) == "A_B"
    assert canonical_label("AARS", {"NT"}, "+", organism="mouse") == "AARS"


@pytest.mark.parametrize("label", ["", " ", "+", " + "])
def test_a_label_that_names_nothing_is_no_control(label: str) -> None:
    assert canonical_label(label, {"NT"}, "+") != CONTROL


symbol = st.text(alphabet="ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-.", min_size=1, max_size=6)
member = st.one_of(symbol, st.sampled_from(["NT", "ctrl", "AARS", "SEPT2", "H3F3A", "MARCH1"]))
separator = st.sampled_from(["+", "_", "|", ";", "__"])


@given(st.lists(member, min_size=1, max_size=4), separator)
def test_a_canonical_label_stays_as_it_is(members: list[str], separator: str) -> None:
    once = canonical_label(separator.join(members), {"NT", "ctrl"}, separator)
    assert canonical_label(once, {"NT", "ctrl"}, "+") == once


@given(
    st.lists(member, min_size=1, max_size=4).flatmap(lambda names: st.tuples(st.just(names), st.permutations(names))),
    separator,
)
def test_the_order_of_members_does_not_matter(both: tuple[list[str], list[str]], separator: str) -> None:
    names, shuffled = both
    assert canonical_label(separator.join(names), {"NT", "ctrl"}, separator) == canonical_label(
        separator.join(shuffled), {"NT", "ctrl"}, separator
    )


@given(st.lists(member, min_size=1, max_size=4), separator)
def test_members_are_sorted_and_hold_no_control(members: list[str], separator: str) -> None:
    label = canonical_label(separator.join(members), {"NT", "ctrl"}, separator)
    genes = members_of(label)
    assert genes == sorted(set(genes))
    assert not {"NT", "ctrl", CONTROL, ""} & set(genes)
    assert (label == CONTROL) == (not set(members) - {"NT", "ctrl"})


def test_unassigned_cells_are_dropped_and_counted_never_controls(
    harmonized_from: Callable, tiny_screen: Callable
) -> None:
    unassigned = [np.nan, None, "nan", "*", "", " ", "+", "TF1+nan", "*+control"]
    result = harmonized_from(with_labels(tiny_screen(), [*unassigned, "TF2+TF1", "TF1+control", "control+control"]))
    assert cells(result, 12) == [None] * len(unassigned) + ["TF1+TF2", "TF1", "control"]
    assert result.account["cells"]["dropped"]["unassigned"] == len(unassigned)
    assert_the_account_adds_up(result)


def test_the_users_own_words_for_unassigned(harmonized_from: Callable, tiny_screen: Callable) -> None:
    result = harmonized_from(with_labels(tiny_screen(), ["rubbish", "LATER"]), perturbation={"drop": ["rubbish"]})
    assert cells(result, 2) == [None, "LATER"]
    assert result.account["cells"]["dropped"]["unassigned"] == 1


def test_a_dropped_label_that_is_also_named_control_is_dropped(
    harmonized_from: Callable, tiny_screen: Callable
) -> None:
    result = harmonized_from(with_labels(tiny_screen(), ["nan"]), perturbation={"control": ["control", "nan"]})
    assert cells(result, 1) == [None]


def test_labels_of_numbers_and_of_categories_are_read(harmonized_from: Callable, tiny_screen: Callable) -> None:
    screen = tiny_screen()
    screen.obs["perturbation"] = pd.Categorical(screen.obs["perturbation"])
    assert harmonized_from(screen).adata.obs["n_perturbations"].max() == 2
    screen.obs["number"] = (screen.obs["perturbation"] != "control").astype(int)
    obs = harmonized_from(screen, perturbation={"column": "number", "control": ["0"]}).adata.obs
    assert set(obs["perturbation"]) == {"control", "1"}


def test_the_sign_of_combinations_in_a_label_that_is_not_split_is_an_error(
    harmonized_from: Callable, tiny_screen: Callable
) -> None:
    with pytest.raises(InputError, match=r"screen\.h5ad.*'TF1\+TF2'.*perturbation\.separator"):
        harmonized_from(tiny_screen(), perturbation={"separator": "_"})


# --- genes ----------------------------------------------------------------------------------------------------------


def renamed(screen: ad.AnnData, names: dict[str, str]) -> ad.AnnData:
    """Return a copy with other gene names, in var and in the labels."""
    screen = screen.copy()
    screen.var_names = [names.get(name, name) for name in screen.var_names]
    labels = screen.obs["perturbation"].astype(str)
    for before, after in names.items():
        labels = labels.str.replace(before, after)
    screen.obs["perturbation"] = labels
    return screen


def test_previous_symbols_are_renamed_in_labels_and_genes_alike(
    harmonized_from: Callable, tiny_screen: Callable
) -> None:
    result = harmonized_from(renamed(tiny_screen(), {"TF1": "AARS", "TF2": "C19orf26"}))
    assert {"AARS1", "CBARP"} <= set(result.adata.var_names)
    assert not {"AARS", "C19orf26"} & set(result.adata.var_names)
    assert {"AARS1", "CBARP", "AARS1+CBARP"} <= set(result.adata.obs["perturbation"])
    assert result.adata.var.loc["AARS1", "original_name"] == "AARS"
    assert result.account["genes"]["renamed"] == {"AARS": "AARS1", "C19orf26": "CBARP"}
    assert result.account["perturbations"]["renamed"]["AARS+C19orf26"] == "AARS1+CBARP"
    assert result.account["perturbations"]["not_measured"] == []


def test_mouse_symbols_are_left_alone(harmonized_from: Callable, tiny_screen: Callable) -> None:
    result = harmonized_from(renamed(tiny_screen(), {"TF1": "AARS", "MT-ND1": "mt-Nd1"}), organism="mouse")
    assert "AARS" in result.adata.var_names
    assert result.adata.obs["pct_counts_mt"].max() > 0


def test_a_previous_symbol_whose_successor_is_measured_is_not_merged_with_it(
    harmonized_from: Callable, tiny_screen: Callable
) -> None:
    result = harmonized_from(renamed(tiny_screen(), {"GENE0": "AARS", "GENE1": "AARS1"}))
    assert {"AARS", "AARS1"} <= set(result.adata.var_names)
    assert result.account["genes"]["merged"] == 0


def test_genes_of_one_symbol_are_summed(harmonized_from: Callable, tiny_screen: Callable) -> None:
    screen = tiny_screen()
    expected = np.asarray(screen[:, ["GENE0", "GENE5"]].X.sum(axis=1)).ravel()
    screen.var_names = ["GENE0" if name == "GENE5" else name for name in screen.var_names]
    result = harmonized_from(screen)
    assert result.adata.var_names.is_unique
    assert np.array_equal(result.adata[:, "GENE0"].X.toarray().ravel(), expected)
    assert result.account["genes"]["merged"] == 1
    assert_the_account_adds_up(result)


def test_ensembl_ids_as_index_give_way_to_symbols(harmonized_from: Callable, tiny_screen: Callable) -> None:
    screen = tiny_screen()
    screen.var["gene_name"] = screen.var_names.to_numpy().copy()
    screen.var_names = [f"ENSG{i:011d}.{i % 3 + 1}" for i in range(screen.n_vars)]
    screen.var.loc[screen.var_names[30], "gene_name"] = ""
    result = harmonized_from(screen)
    assert {"TF1", "MT-ND1", "GENE0"} <= set(result.adata.var_names)
    assert result.adata.var.loc["TF2", "gene_id"] == "ENSG00000000001"
    assert "ENSG00000000030.1" in result.adata.var_names, "a gene without a symbol keeps its id"
    assert result.account["perturbations"]["not_measured"] == []


def test_symbols_as_index_with_ids_beside_them(harmonized_from: Callable, tiny_screen: Callable) -> None:
    screen = tiny_screen()
    screen.var["ensembl_id"] = [f"ENSG{i:011d}" for i in range(screen.n_vars)]
    screen.var.loc["TF3", "ensembl_id"] = "no id"
    var = harmonized_from(screen).adata.var
    assert var.loc["TF2", "gene_id"] == "ENSG00000000001"
    assert var.loc["TF3", "gene_id"] == ""


# --- dropped and counted --------------------------------------------------------------------------------------------


def test_perturbations_with_too_few_cells_are_dropped_and_counted(
    harmonized_from: Callable, tiny_screen: Callable
) -> None:
    screen = with_labels(tiny_screen(), ["RARE"] * 7)
    result = harmonized_from(screen, qc={"min_cells_per_perturbation": 30})
    assert "RARE" not in set(result.adata.obs["perturbation"])
    assert result.account["perturbations"]["dropped"] == {"RARE": 7}
    assert result.account["cells"]["dropped"]["qc.min_cells_per_perturbation"] == 7
    assert_the_account_adds_up(result)


def test_every_limit_drops_and_counts(harmonized_from: Callable, tiny_screen: Callable) -> None:
    screen = tiny_screen()
    totals = np.asarray(screen.X.sum(axis=1)).ravel()
    limits = {
        "min_counts": float(np.percentile(totals, 10)),
        "min_genes": 70,
        "max_pct_mt": 2.0,
        "min_cells_per_gene": 500,
    }
    result = harmonized_from(screen, qc=limits)
    dropped = result.account["cells"]["dropped"]
    assert dropped["qc.min_counts"] == (totals < limits["min_counts"]).sum() > 0
    assert dropped["qc.max_pct_mt"] > 0
    # Limits look at all genes of the source; what is written are the totals of the genes that were kept.
    in_source = pd.Series(totals, index=screen.obs_names)[result.adata.obs_names]
    assert in_source.min() >= limits["min_counts"]
    assert result.adata.n_vars < screen.n_vars
    np.testing.assert_allclose(result.adata.obs["total_counts"], np.asarray(result.adata.X.sum(axis=1)).ravel())
    np.testing.assert_array_equal(result.adata.obs["n_genes_by_counts"], result.adata.X.getnnz(axis=1))
    mt = np.asarray(screen[result.adata.obs_names, "MT-ND1"].X.todense()).ravel()
    assert (100 * mt / in_source).max() <= 2.0
    assert_the_account_adds_up(result)


def test_a_limit_of_null_drops_nothing(harmonized_from: Callable, tiny_screen: Callable) -> None:
    result = harmonized_from(tiny_screen())
    assert (
        result.account["cells"]["dropped"] == {"unassigned": 0} or sum(result.account["cells"]["dropped"].values()) == 0
    )
    assert result.adata.n_obs == tiny_screen().n_obs


def test_a_subset_keeps_its_cells_and_counts_the_rest(harmonized_from: Callable, tiny_screen: Callable) -> None:
    screen = tiny_screen()
    result = harmonized_from(screen, subset={"lane": ["b1"]})
    assert set(result.adata.obs["batch"]) == {"b1"}
    assert result.account["cells"]["dropped"]["subset"] == (screen.obs["lane"] == "b2").sum()
    assert_the_account_adds_up(result)


def test_counts_in_a_layer_are_found(harmonized_from: Callable, tiny_screen: Callable) -> None:
    screen = tiny_screen()
    expected = screen.X.toarray()
    screen.layers["counts"] = screen.X.copy()
    screen.X = np.log1p(screen.X.toarray())
    assert np.array_equal(harmonized_from(screen).adata.X.toarray(), expected)


def test_dense_counts_and_repeated_cell_names_are_taken(harmonized_from: Callable, tiny_screen: Callable) -> None:
    screen = tiny_screen()
    screen.X = screen.X.toarray().astype(np.float64)
    screen.obs_names = ["same"] * screen.n_obs
    result = harmonized_from(screen)
    assert result.adata.obs_names.is_unique
    assert result.adata.n_obs == screen.n_obs


# --- bad input ------------------------------------------------------------------------------------------------------


def test_a_text_file_is_no_h5ad(harmonized_from: Callable, tmp_path: Path) -> None:
    path = tmp_path / "text.h5ad"
    path.write_text("cell,gene\n")
    with pytest.raises(InputError, match=r"text\.h5ad is not an h5ad file .*starts with.*write_h5ad"):
        harmonized_from(path)


def test_a_web_page_is_no_h5ad(harmonized_from: Callable, tmp_path: Path) -> None:
    path = tmp_path / "page.h5ad"
    path.write_text("\n<!DOCTYPE html><html></html>")
    with pytest.raises(InputError, match=r"page\.h5ad is not an h5ad file \(an HTML page\)"):
        harmonized_from(path)


@pytest.mark.parametrize("share", [0.3, 0.9])
def test_a_truncated_h5ad_is_told(
    share: float, harmonized_from: Callable, tiny_screen: Callable, tmp_path: Path
) -> None:
    path = tmp_path / "cut.h5ad"
    tiny_screen().write_h5ad(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(InputError, match=r"cut\.h5ad is an HDF5 file that anndata cannot read .*Is it complete\?"):
        harmonized_from(path)


def broken_counts(screen: ad.AnnData, value: float) -> ad.AnnData:
    """Return a copy with one impossible count."""
    X = screen.X.toarray()
    X[3, 4] = value
    screen = screen.copy()
    screen.X = X
    return screen


BAD = {
    "no such column": (
        {"perturbation": {"column": "guide"}},
        {},
        r"column 'guide' \(perturbation.column\)\. Its .*Controls stand in perturbation \(it holds 'control'\)",
    ),
    "a misspelt column": (
        {"perturbation": {"column": "Pertubation"}},
        {},
        r"obs has no column 'Pertubation' \(perturbation.column\)\. Did you mean perturbation\? Its columns",
    ),
    "no such covariate": (
        {"covariates": {"batch": "plate"}},
        {},
        r"obs has no column 'plate' \(covariates.batch\).*lane",
    ),
    "no such subset column": ({"subset": {"plate": ["a"]}}, {}, r"obs has no column 'plate' \(subset\)"),
    "empty subset": ({"subset": {"lane": ["b3"]}}, {}, r"subset lane = \['b3'\] keeps no cell.*b1, b2"),
    "no control": ({"perturbation": {"control": ["NT"]}}, {}, None),
    "all perturbations too rare": (
        {},
        {"min_cells_per_perturbation": 50},
        r"no perturbation has 50 cells.*min_cells_per_perturbation",
    ),
    "controls too rare": (
        {},
        {"min_cells_per_perturbation": 100},
        (
            r"only 80 control cells are left; at least 100 .*The least number is qc\.min_cells_per_perturbation = 100; "
            r"lower it"
        ),
    ),
    "controls alone": (
        {"subset": {"perturbation": ["control"]}},
        {},
        r"no perturbation has a cell .*All cells with a label are controls",
    ),
    "subset without controls": (
        {"subset": {"perturbation": ["TF1", "TF2"]}},
        {},
        r"subset takes away all 80 control cells\. Let subset keep",
    ),
    "exclude of controls": (
        {"exclude": {"perturbation": "^control$"}},
        {},
        r"exclude takes away all 80 control cells\. Let exclude keep",
    ),
    "controls that are dropped": (
        {"perturbation": {"drop": ["control", "nan"]}},
        {},
        r"perturbation\.drop drops all 80 control cells \(control\)\. Take their labels out of drop",
    ),
    "controls that a pattern finds, dropped": (
        {"perturbation": {"drop": ["control"], "pattern": "^(.+)$"}},
        {},
        r"perturbation\.drop drops all 80 control cells",
    ),
    "qc drops all": (
        {},
        {"min_counts": 10**7},
        r"limits under qc leave no cell\. Of all cells, qc.min_counts = 10000000 drops [\d,]+ of .*lower it\..*null",
    ),
    "two limits drop all": (
        {},
        {"min_counts": 10**7, "min_genes": 10**6},
        r"no cell\..*qc.min_genes = 1000000 drops .*lower it\. qc.min_counts = 10000000 drops .*lower it\. Change",
    ),
    "no gene is left": ({}, {"min_cells_per_gene": 10**6}, r"qc.min_cells_per_gene = 1000000 leaves no gene"),
}


@pytest.mark.parametrize(
    ("qc", "said"),
    [
        (
            {"max_pct_mt": 20},
            (
                r"Of the perturbed cells, qc\.max_pct_mt = 20 drops 560 of 560 \(their median: [\d.]+\); raise it, "
                r"under qc"
            ),
        ),
        (
            {"min_counts": 300},
            (
                r"Of the perturbed cells, qc\.min_counts = 300 drops 560 of 560 \(their median: [\d.]+\); lower it, "
                r"under qc"
            ),
        ),
        ({"min_efficacy": 0.999}, r"Of the perturbed cells, qc\.min_efficacy = 0\.999 drops 560; lower it, under qc"),
    ],
)
def test_the_limit_that_leaves_no_perturbation_is_named(
    qc: dict, said: str, harmonized_from: Callable, tiny_screen: Callable
) -> None:
    screen = tiny_screen()
    X = screen.X.toarray()
    perturbed = (screen.obs["perturbation"] != "control").to_numpy()
    if "max_pct_mt" in qc:
        X[np.ix_(perturbed, screen.var_names == "MT-ND1")] = 900
    elif "min_counts" in qc:
        X[perturbed] = np.minimum(X[perturbed], 1)
    screen.X = X
    with pytest.raises(InputError, match=said) as raised:
        harmonized_from(screen, {"min_cells_per_perturbation": 10, **qc})
    assert "min_cells_per_perturbation" not in str(raised.value), "to lower it does not help"


@pytest.mark.parametrize("name", ["batch", "perturbation", "lane", "total_counts"])
def test_the_index_of_cells_may_be_called_as_a_column_is(
    name: str, harmonized_from: Callable, tiny_screen: Callable
) -> None:
    screen = tiny_screen()
    del screen.obs["lane"]
    expected = harmonized_from(screen, covariates={}).adata.obs
    screen.obs.index.name = name if name != "perturbation" else "is_control"
    pd.testing.assert_frame_equal(harmonized_from(screen, covariates={}).adata.obs, expected)


@pytest.mark.parametrize("case", BAD)
def test_bad_declarations_are_explained(
    case: str, harmonized_from: Callable, tiny_screen: Callable, tmp_path: Path
) -> None:
    changes, qc, message = BAD[case]
    screen = tiny_screen()
    if case == "no control":
        screen.obs["perturbation"] = screen.obs["perturbation"].replace("control", "ctl")
        message = r"no control cells.*\['NT'\].*'ctl' \(80\).*perturbation.control"
    with pytest.raises(InputError, match=message) as raised:
        harmonized_from(screen, qc=qc, **changes)
    assert "screen.h5ad" in str(raised.value)
    assert not (tmp_path / "harmonized.h5ad").exists()
    assert not (tmp_path / "harmonization.json").exists()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (0.5, r"no integers \(for example 0\.5\)"),
        (-1.0, r"negative values \(the lowest is -1\)"),
        (np.nan, "NaN"),
        (np.inf, "infinite"),
    ],
)
def test_what_is_no_count_is_an_error(
    value: float, message: str, harmonized_from: Callable, tiny_screen: Callable
) -> None:
    with pytest.raises(InputError, match=message) as raised:
        harmonized_from(broken_counts(tiny_screen(), value))
    assert "screen.h5ad" in str(raised.value)
    assert "layers['counts']" in str(raised.value)


def test_a_damaged_download_is_told(harmonized_from: Callable, tmp_path: Path) -> None:
    manifest = tmp_path / "raw" / "manifest.json"
    manifest.parent.mkdir()
    manifest.write_text('{"files": {"file": {"file": "screen.h5ad", "bytes": 10}}}')
    with pytest.raises(InputError, match=r"screen\.h5ad is missing .*Delete .*manifest\.json"):
        harmonized_from(manifest)
    (manifest.parent / "screen.h5ad").write_bytes(b"123")
    with pytest.raises(InputError, match="not the 10 bytes"):
        harmonized_from(manifest)


def test_the_screens_of_a_merged_file_are_told_apart(harmonized_from: Callable, tiny_screen: Callable) -> None:
    screen = tiny_screen()
    screen.obs["study"] = np.where(np.arange(screen.n_obs) % 2, "first", "second")
    assert set(harmonized_from(screen).adata.obs["dataset"]) == {"mine"}
    obs = harmonized_from(screen, covariates={"dataset": "study", "batch": "lane"}).adata.obs
    assert set(obs["dataset"]) == {"first", "second"}
    assert set(obs["batch"]) == {"first:b1", "first:b2", "second:b1", "second:b2"}, (
        "lanes of two screens are no one batch"
    )
    assert (obs["batch"].astype(str) == obs["dataset"].astype(str) + ":" + obs["lane"].astype(str)).all()


# --- real screens ---------------------------------------------------------------------------------------------------


def test_a_real_screen_with_doubles(harmonized_from: Callable, shared_data: Callable) -> None:
    result = harmonized_from(
        shared_data("norman_k562_mini/perturbench_devel_counts.h5ad"),
        qc={"min_cells_per_perturbation": 30},
        subset={"dataset": ["norman19"]},
        covariates={"cell_type": "cell_type"},
    )
    counts = result.adata.obs.groupby("perturbation", observed=True)["n_perturbations"].first().value_counts()
    assert (counts[0], counts[1], counts[2]) == (1, 18, 15)
    assert_the_account_adds_up(result)


def test_a_real_screen_with_ensembl_ids_and_unassigned_cells(harmonized_from: Callable, shared_data: Callable) -> None:
    path = shared_data("gasperini_mini/gasperini_merged.h5ad")
    source = ad.read_h5ad(path, backed="r")
    column = next(name for name in source.obs if (source.obs[name].astype(str) == "non-targeting").any())
    result = harmonized_from(
        path,
        perturbation={"column": column, "control": ["non-targeting"], "drop": ["none"]},
        covariates={},
        qc={"min_cells_per_perturbation": 10},
    )
    assert result.adata.obs["is_control"].sum() == 3951
    assert result.account["cells"]["dropped"]["unassigned"] == 58620
    assert result.adata.var["gene_id"].str.startswith("ENSG").mean() > 0.9
    assert_the_account_adds_up(result)


def test_an_index_that_is_called_as_a_column_loses_its_name(harmonized_from: Callable, tiny_screen: Callable) -> None:
    screen = tiny_screen()
    screen.obs.index.name = "batch"
    obs = harmonized_from(screen).adata.obs
    assert obs.index.name != "batch"
    assert obs.groupby("batch", observed=True).size().sum() == len(obs)
