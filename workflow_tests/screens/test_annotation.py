"""A block's keys for labels, covariates and genes, each on a small screen; Hypothesis on the labels of real screens."""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import closed_forms_config, merged
from hypothesis import given, settings
from hypothesis import strategies as st

from perturbflow.errors import InputError
from perturbflow.genes.symbols import CONTROL, SEPARATOR, human_symbols, members_of
from perturbflow.registry.config import complete
from perturbflow.registry.unions import is_union
from perturbflow.screens.annotation import canonical_labels, gene_table

REGISTRY = {name: block for name, block in complete(merged({}))["datasets"].items() if not is_union(block)}
NO_GENES = gene_table(pd.DataFrame(index=pd.Index([], dtype=str)), {"organism": "human"})


def canonical(name: str, label: str) -> str | None:
    """Return what a label of a registered dataset becomes; None for an unassigned cell."""
    block = REGISTRY[name]
    declared = {key: value for key, value in block["perturbation"].items() if key != "dose"}
    obs = pd.DataFrame({declared["column"]: [label, declared["control"][0]]})
    value = canonical_labels(obs, {**block, "perturbation": declared}, NO_GENES, Path("screen.h5ad")).iloc[0]
    return None if pd.isna(value) else value


@pytest.mark.parametrize(
    ("name", "label", "becomes"),
    [
        ("norman2019", "KLF1_CEBPA", "CEBPA+KLF1"), ("norman2019", "RHOXF2_SET", "RHOXF2B+SET"),
        ("norman2019", "C3orf72_FOXL2", "FOXL2+FOXL2NB"),
        ("norman2019_gears", "ctrl+KLF1", "KLF1"), ("norman2019_gears", "RHOXF2BB+ZBTB25", "RHOXF2B+ZBTB25"),
        ("norman2019_gears", "ctrl", CONTROL),
        ("norman2019_geo", "NegCtrl11_NegCtrl0__NegCtrl11_NegCtrl0", CONTROL),
        ("norman2019_geo", "no_reads_found", None),
        ("norman2019_geo", "NegCtrl0_SET__NegCtrl0_SET", "SET"),
        ("norman2019_geo", "TGFBR2_IGDCC3__TGFBR2_IGDCC3_2", "IGDCC3+TGFBR2"),
        ("adamson2016_10x005", "ATF6_PERK_IRE1_pMJ158", "ATF6+EIF2AK3+ERN1"),
        ("adamson2016_10x005", "PERK_only_pMJ146", "EIF2AK3"),
        ("adamson2016_10x005", "3x_neg_ctrl_pMJ144-2", CONTROL), ("adamson2016_10x005", "Gal4-4(mod)_pBA582", CONTROL),
        ("adamson2016_10x010", "ASCC3_pDS051", "ASCC3"), ("adamson2016_10x010", "63(mod)_pBA580", CONTROL),
        ("adamson2016_10x010", "*", None),
        ("adamson2016_gears", "Gal4-4(mod)+ctrl", CONTROL), ("adamson2016_geo", "HARS_pDS123", "HARS1"),
        ("replogle2022_k562_gwps", "non-targeting", CONTROL), ("replogle2022_k562_gwps", "HLA-A", "HLA-A"),
        ("dixit2016_7d", "p-sgELK1-6", "ELK1"), ("dixit2016_7d", "p_sgYY1_10", "YY1"),
        ("dixit2016_7d", "p_INTERGENIC216151", CONTROL),
        ("dixit2016_highmoi", "p-sgYY1-3_p-INTERGENIC216151_p-sgELK1-6", "ELK1+YY1"), ("dixit2016_13d", "nan", None),
        ("papalexi2021_eccite", "IFNGR2g10", "IFNGR2"), ("papalexi2021_eccite", "NTg5", CONTROL),
        ("papalexi2021_arrayed", "MARCH8", "MARCHF8"),
        ("frangieh2021", "HLA-B", "HLA-B"), ("wessels2023", "NT_NT", CONTROL),
        ("wessels2023", "KDM1A_HDAC3", "HDAC3+KDM1A"),
        ("datlinger2017", "Essential_library_MVD_1", "MVD"), ("datlinger2017", "Tcrlibrary_HLA-A_2", "HLA-A"),
        ("gasperini2019_lowmoi", "chr1.9538_top_two_GATA1", "GATA1+chr1.9538_top_two"),
        ("gasperini2019_lowmoi", "nan", None),
        ("sciplex3", "(+)-JQ1", "JQ1"), ("sciplex3", "Vehicle", CONTROL),
    ],
)  # fmt: skip
def test_labels_of_the_registered_screens(name: str, label: str, becomes: str | None) -> None:
    assert canonical(name, label) == becomes


symbols = st.sampled_from(
    sorted(name for name in human_symbols().approved if re.fullmatch(r"[A-Z][A-Z0-9]{2,}", name) and name != "NT")
)
FORMS = {
    "papalexi2021_eccite": lambda genes, n: f"{genes[0]}g{n}",
    "dixit2016_highmoi": lambda genes, n: "_".join(f"p-sg{gene}-{n}" for gene in genes),
    "datlinger2017": lambda genes, n: f"Tcrlibrary_{genes[0]}_{n}",
    "adamson2016_10x005": lambda genes, n: "_".join([*genes, *(["only"] if len(genes) == 1 else []), f"pMJ{n}"]),
    "norman2019_geo": lambda genes, n: (
        "__".join(["_".join((genes * 2)[:2])] * 2) if n % 2 else f"{genes[0]}_NegCtrl0__{genes[0]}_NegCtrl0_2"
    ),
    "norman2019": lambda genes, n: "_".join(genes),
    "norman2019_gears": lambda genes, n: (
        "+".join(genes) if len(genes) > 1 else (f"{genes[0]}+ctrl", f"ctrl+{genes[0]}")[n % 2]
    ),
    "gasperini2019_lowmoi": lambda genes, n: "_".join([*genes, f"chr{n}.{n}_top_two"]),
}


@settings(deadline=None)
@given(
    name=st.sampled_from(sorted(FORMS)),
    genes=st.lists(symbols, min_size=1, max_size=3, unique=True),
    n=st.integers(1, 99),
)
def test_a_label_names_the_genes_that_it_was_made_of(name: str, genes: list[str], n: int) -> None:
    rename = REGISTRY[name]["perturbation"].get("rename", {})
    if name.startswith("norman"):
        genes = genes[:2]
    label = FORMS[name](genes, n)
    named = {gene for gene in genes if gene in label}
    if name in ("papalexi2021_eccite", "datlinger2017") or (name == "norman2019_geo" and n % 2 == 0):
        named = {genes[0]}
    if name == "gasperini2019_lowmoi":
        named |= {f"chr{n}.{n}_top_two"}
    assert set(members_of(canonical(name, label))) == {rename.get(gene, gene) for gene in named}


@settings(deadline=None)
@given(name=st.sampled_from(sorted(REGISTRY)), label=st.text(alphabet="ABPp12_-+.*()gs ", max_size=14))
def test_any_text_becomes_a_canonical_label_or_an_explained_error(name: str, label: str) -> None:
    try:
        becomes = canonical(name, label)
    except InputError as error:
        assert "+" in label
        assert "perturbation.rename" in str(error)
        return
    assert becomes is None or becomes == CONTROL or members_of(becomes) == sorted(set(becomes.split(SEPARATOR)))
    assert becomes != ""
    if label in REGISTRY[name]["perturbation"]["drop"]:
        assert becomes is None


# --- keys -------------------------------------------------------------------------------------------------------------


def test_a_subset_of_numbers_is_found_among_numbers_with_gaps(harmonized_from: Callable, tiny_screen: Callable) -> None:
    screen = tiny_screen()
    screen.obs["number_of_cells"] = np.where(np.arange(screen.n_obs) % 5, 1.0, np.nan)
    screen.obs["good_coverage"] = np.arange(screen.n_obs) % 2 > 0
    result = harmonized_from(screen, subset={"number_of_cells": [1], "good_coverage": [True]})
    assert result.adata.n_obs == screen.n_obs * 4 // 10
    assert result.account["cells"]["dropped"]["subset"] == screen.n_obs - result.adata.n_obs


def test_excluded_cells_are_dropped_and_counted(harmonized_from: Callable, tiny_screen: Callable) -> None:
    screen = tiny_screen()
    screen.obs["guide"] = [
        "NegCtrl1_NegCtrl0;x" if i % 4 == 0 else None if i % 4 == 1 else "other" for i in range(screen.n_obs)
    ]
    result = harmonized_from(screen, exclude={"guide": "^NegCtrl1_"})
    assert result.account["cells"]["dropped"]["exclude"] == screen.n_obs // 4
    assert not result.adata.obs["guide"].astype(str).str.contains("NegCtrl1").any()
    with pytest.raises(InputError, match=r"obs has no column 'guides' \(exclude\)"):
        harmonized_from(screen, exclude={"guides": "x"})


def test_a_dose_is_part_of_the_label(harmonized_from: Callable, tiny_screen: Callable) -> None:
    screen = tiny_screen(labels=["TF1", "TF2"])
    screen.obs["perturbation"] = screen.obs["perturbation"].replace({"TF1": "TAG", "TF2": "LPS"})
    screen.obs["dose"] = [
        None if label == "control" else (10.0, 10_000.0)[i % 2] for i, label in enumerate(screen.obs["perturbation"])
    ]
    result = harmonized_from(screen, perturbation={"dose": "dose"}, perturbation_type="drug")
    assert set(result.adata.obs["perturbation"]) == {"control", "TAG@10", "TAG@10000", "LPS@10", "LPS@10000"}
    assert result.account["perturbations"]["not_measured"] == []


def test_a_covariate_of_several_columns_and_of_one_value(harmonized_from: Callable, tiny_screen: Callable) -> None:
    screen = tiny_screen()
    screen.obs["condition"] = [("Control", "IFNγ", None)[i % 3] for i in range(screen.n_obs)]
    obs = harmonized_from(screen, covariates={"batch": ["lane", "condition"], "cell_type": {"value": "K562"}}).adata.obs
    assert set(obs["batch"]) == {
        f"{lane}|{condition}" for lane in ("b1", "b2") for condition in ("Control", "IFNγ", "unknown")
    }
    assert (obs["batch"].astype(str).str.split("|").str[0] == obs["lane"].astype(str)).all()
    assert set(obs["cell_type"]) == {"K562"}


def test_genes_are_chosen_by_a_pattern(harmonized_from: Callable, tiny_screen: Callable) -> None:
    screen = tiny_screen()
    result = harmonized_from(screen, gene_pattern="^(TF|MT-)")
    assert set(result.adata.var_names) == {*[f"TF{i}" for i in range(1, 9)], "MT-ND1"}
    assert result.account["genes"]["dropped"]["gene_pattern"] == screen.n_vars - 9
    assert np.array_equal(result.adata.X.toarray(), screen[result.adata.obs_names, result.adata.var_names].X.toarray())
    with pytest.raises(InputError, match=r"gene_pattern 'ENSG' keeps no gene. Its genes: TF1"):
        harmonized_from(screen, gene_pattern="ENSG")


def test_a_rename_can_rid_a_label_of_its_plus(harmonized_from: Callable, tiny_screen: Callable) -> None:
    screen = tiny_screen(labels=["TF1"])
    screen.obs["perturbation"] = screen.obs["perturbation"].replace({"TF1": "(+)-JQ1"})
    with pytest.raises(InputError, match=r"'\(\+\)-JQ1' holds '\+'.*perturbation\.rename"):
        harmonized_from(screen, perturbation={"separator": None})
    obs = harmonized_from(screen, perturbation={"separator": None, "rename": {"(+)-JQ1": "JQ1"}}).adata.obs
    assert set(obs["perturbation"]) == {"control", "JQ1"}


def test_a_note_is_told_and_another_shape_refused(
    harmonized_from: Callable, tiny_screen: Callable, caplog: pytest.LogCaptureFixture
) -> None:
    screen = tiny_screen()
    result = harmonized_from(screen, note="lanes are lost", shape=[screen.n_obs, screen.n_vars])
    assert "lanes are lost" in caplog.text
    assert result.account["note"] == "lanes are lost"
    with pytest.raises(
        InputError, match=rf"{screen.n_obs} cells × {screen.n_vars} genes, but the block declares shape: \[10, 20\]"
    ):
        harmonized_from(screen, shape=[10, 20])


# --- genes ------------------------------------------------------------------------------------------------------------


def genes(rows: dict[str, str]) -> dict[str, str]:
    """Return name → what it becomes, of genes given as name → Ensembl id."""
    table = gene_table(pd.DataFrame({"ensembl_id": list(rows.values())}, index=list(rows)), {"organism": "human"})
    return dict(zip(table["original_name"], table["gene_name"], strict=True))


def test_an_ensembl_id_decides_where_the_name_is_not_approved() -> None:
    named = {"RP5-862P8.2": "ENSG00000143674", "QARS": "ENSG00000172053.18", "KIAA1804x": "", "AARS": "no id"}
    assert genes(named) == {"RP5-862P8.2": "MAP3K21", "QARS": "QARS1", "KIAA1804x": "KIAA1804x", "AARS": "AARS1"}


def test_an_approved_name_stays_whatever_its_id() -> None:
    assert genes({"TP53": "ENSG00000143674"}) == {"TP53": "TP53"}


def test_two_measured_genes_never_come_to_share_a_name() -> None:
    assert genes({"AARS": "", "AARS1": ""}) == {"AARS": "AARS", "AARS1": "AARS1"}
    assert genes({"MLTK": "ENSG00000143674", "RP5-862P8.2": "ENSG00000143674"}) == {
        "MLTK": "MLTK",
        "RP5-862P8.2": "RP5-862P8.2",
    }


def test_shifted_ids_are_noticed(
    harmonized_from: Callable, tiny_screen: Callable, caplog: pytest.LogCaptureFixture
) -> None:
    """Older copies of sci-Plex 3 have their gene names one row off."""
    screen = tiny_screen()
    approved = [(gene, name) for gene, name in human_symbols().of_ensembl_id.items()][: screen.n_vars]
    screen.obs["perturbation"] = screen.obs["perturbation"].replace({f"TF{i + 1}": approved[i][1] for i in range(8)})
    screen.var_names = [name for _, name in approved]
    screen.var["ensembl_id"] = np.roll([gene for gene, _ in approved], 1)
    result = harmonized_from(screen)
    assert len(result.account["genes"]["contradicting"]) == screen.n_vars
    assert "are they shifted?" in caplog.text


# --- the registry -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"perturbation": {"column": "p", "control": ["c"], "pattern": "^(.+"}},
         r"mine\.perturbation\.pattern: '\^\(\.\+' cannot serve.*unterminated"),
        ({"perturbation": {"column": "p", "control": ["c"], "pattern": "^.+g"}},
         r"perturbation\.pattern: .* needs a group"),
        ({"exclude": {"guide": "*x"}}, r"mine\.exclude\.guide: '\*x' cannot serve .*nothing to repeat"),
        ({"gene_pattern": "["}, r"mine\.gene_pattern: '\[' cannot serve"),
        ({"covariates": {"batch": {"values": "x"}}}, r"covariates\.batch"),
    ],
)  # fmt: skip
def test_mistakes_in_a_block_are_explained(
    change: dict, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "screen.h5ad").touch()
    config = closed_forms_config()
    config["datasets"]["mine"] = {**config["datasets"]["mine"], **change}
    with pytest.raises(InputError, match=message):
        complete(merged(config))
