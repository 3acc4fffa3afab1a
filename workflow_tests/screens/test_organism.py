"""Whose genes a file holds: prefixes, mitochondrial genes, other organisms; and limits that name themselves."""

from collections.abc import Callable

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from perturbflow.errors import InputError
from perturbflow.genes.symbols import human_symbols
from perturbflow.screens.annotation import gene_table
from perturbflow.screens.organism import (
    MARKS,
    MOUSE_MITOCHONDRIAL,
    genomes,
    mitochondrial,
    other_organism,
    without_genome,
)

HUMAN = sorted(human_symbols().approved)[5000:5070]
PREFIXES = [
    "GRCh38_",
    "GRCh38___",
    "hg19_",
    "hg38___",
    "GRCh37.",
    "GRCh38-2020-A_",
    "GRCh38-",
    "mm10_",
    "mm10___",
    "mm10---",
    "GRCm39_",
    "human_",
    "GRCh38:",
    "hg19:",
    "HUMAN:",
    "Homo_sapiens_",
    "hs_",
    "GRCh38.p13_",
    "GRCh38_2020_A_",
    "refdata-gex-GRCh38-2020-A_",
    "T2T-CHM13v2_",
    "Mus_musculus_",
]


def with_genes(screen: ad.AnnData, names: dict[str, str], others: str = "{}") -> ad.AnnData:
    """Return a copy whose genes have other names: those in `names`, the others by a pattern."""
    screen = screen.copy()
    screen.var_names = [names.get(name, others.format(name)) for name in screen.var_names]
    return screen


# --- prefixes -------------------------------------------------------------------------------------------------------


GENE_NAMES = st.from_regex(r"[A-Z][A-Z0-9-]{1,7}", fullmatch=True).filter(
    lambda name: not any(mark.search(name) for mark in MARKS)
)


@given(names=st.lists(GENE_NAMES, min_size=1, max_size=30), prefix=st.sampled_from(PREFIXES))
def test_a_prefix_of_all_genes_is_removed_and_names_without_one_stay(names: list[str], prefix: str) -> None:
    assert list(without_genome(pd.Series([prefix + name for name in names]))) == names
    assert list(without_genome(pd.Series(names))) == names


@pytest.mark.slow
@pytest.mark.parametrize("prefix", PREFIXES)
def test_labels_find_genes_behind_a_prefix(prefix: str, harmonized_from: Callable, tiny_screen: Callable) -> None:
    organism = "mouse" if prefix.startswith(("mm", "GRCm", "Mus")) else "human"
    screen = with_genes(
        tiny_screen(), {"MT-ND1": f"{prefix}{'mt-Nd1' if organism == 'mouse' else 'MT-ND1'}"}, f"{prefix}{{}}"
    )
    result = harmonized_from(screen, {"max_pct_mt": 20}, organism=organism)
    assert {"TF1", "GENE1"} <= set(result.adata.var_names)
    assert result.account["perturbations"]["not_measured"] == []
    assert result.adata.obs["pct_counts_mt"].max() > 0
    assert [prefix in warning for warning in result.account["warnings"]] == [True]


@pytest.mark.parametrize("suffix", ["_hg38", "-GRCh38", "_hg19", ".mm10"])
def test_a_genome_after_the_names_is_removed(suffix: str) -> None:
    names = pd.Series([*HUMAN, "GFP"])
    assert list(without_genome(pd.Series([*(f"{name}{suffix}" for name in HUMAN), "GFP"]))) == list(names)
    assert list(without_genome(names)) == list(names)


def test_too_few_names_with_a_genome_keep_it_and_are_told(harmonized_from: Callable, tiny_screen: Callable) -> None:
    screen = with_genes(tiny_screen(), {f"GENE{i}": f"hg38_GENE{i}" for i in range(30)})
    result = harmonized_from(screen)
    assert "hg38_GENE0" in result.adata.var_names
    (warning,) = result.account["warnings"]
    assert "30 of 80 names of genes hold hg38_ (hg38_GENE0) and keep it" in warning


# --- where the names are --------------------------------------------------------------------------------------------

IDS = {symbol: number for number, symbol in human_symbols().of_ensembl_id.items()}
NAMED = [symbol for symbol in HUMAN if symbol in IDS][:40]
PLACES = {
    "numbers, names in a column": (range(40), {"feature_id": [IDS[name] for name in NAMED], "feature_name": NAMED}),
    "numbers, a column of another name": (range(40), {"Gene": NAMED}),
    "numbers, names of all kinds": (range(40), {"highly_variable": True, "std": 0.5, "X1": NAMED}),
    "ids, a column of another spelling": ([IDS[name] for name in NAMED], {"Gene Symbol": NAMED}),
    "id|symbol": ([f"{IDS[name]}|{name}" for name in NAMED], {}),
    "id_symbol": ([f"{IDS[name]}.7_{name}" for name in NAMED], {}),
    "symbol|id": ([f"{name}|{IDS[name]}" for name in NAMED], {}),
    "symbol (id)": ([f"{name} ({IDS[name]})" for name in NAMED], {}),
    "symbol_genome": ([f"{name}_hg38" for name in NAMED], {}),
    "symbols": (NAMED, {"feature_id": [IDS[name] for name in NAMED], "feature_name": "protein_coding"}),
}


@pytest.mark.parametrize("case", PLACES)
@pytest.mark.parametrize("organism", ["human", "mouse"])
def test_names_of_genes_are_found_wherever_they_are(case: str, organism: str) -> None:
    index, columns = PLACES[case]
    var = pd.DataFrame(columns, index=pd.Index(list(map(str, index))))
    table = gene_table(var, {"organism": organism})
    assert list(table["gene_name"]) == NAMED
    has_ids = "feature_id" in columns or any("ENSG" in name for name in var.index)
    assert list(table["gene_id"]) == ([IDS[name] for name in NAMED] if has_ids else [""] * 40)
    assert len(table.attrs["notes"]) == (("numbers" in case) or ("symbol" in case and "id" in case))


def test_numbers_that_name_no_gene_are_told(harmonized_from: Callable, tiny_screen: Callable) -> None:
    screen = tiny_screen()
    screen.var_names = list(map(str, range(screen.n_vars)))
    screen.var["chromosome"] = "1"
    warning, unmeasured = harmonized_from(screen).account["warnings"]
    assert unmeasured.startswith("none of the 8 perturbed genes")
    assert "genes are called 0, 1, 2, ..., and no column of var has names of genes (its columns: chromosome)" in warning


@pytest.mark.parametrize("name", ["", "nan"])
def test_a_gene_without_a_name_is_refused_with_two_ways_out(
    name: str, harmonized_from: Callable, tiny_screen: Callable
) -> None:
    screen = with_genes(tiny_screen(), {"GENE3": name})
    with pytest.raises(
        InputError,
        match=r"1 of 80 genes have no name \(the first is number 13 of its genes\)\. Give each .*gene_pattern: '\.'",
    ):
        harmonized_from(screen)
    assert name not in harmonized_from(screen, gene_pattern=".").adata.var_names


def test_one_name_for_many_genes_is_refused(harmonized_from: Callable, tiny_screen: Callable) -> None:
    screen = tiny_screen()
    screen.var["gene_name"] = [*screen.var_names[:60], *["Gene Expression"] * 20]
    screen.var_names = [f"ENSG{i:011d}" for i in range(99900000000, 99900000080)]
    with pytest.raises(
        InputError,
        match=r"20 of 80 genes are called 'Gene Expression'\. Put the name of each gene into var_names, .*gene_pattern",
    ):
        harmonized_from(screen)
    screen.var["gene_name"] = [*screen.var["gene_name"][:75], *["Y_RNA"] * 5]
    screen.var.loc[screen.var["gene_name"] == "Gene Expression", "gene_name"] = None
    assert harmonized_from(screen).account["genes"]["merged"] == 4


def test_of_two_genomes_the_declared_one_is_kept_and_the_other_counted(
    harmonized_from: Callable, tiny_screen: Callable
) -> None:
    screen = tiny_screen()
    names = {name: f"GRCh38_{name}" for name in screen.var_names[:60]}
    both = with_genes(screen, names, "mm10___{}")
    result = harmonized_from(both)
    assert result.account["genes"]["dropped"] == {"other_genome": 20}
    assert list(result.adata.var_names) == list(screen.var_names[:60])
    assert np.array_equal(result.adata.obs["total_counts"], screen[result.adata.obs_names].X[:, :60].sum(axis=1).A1)
    assert "20 genes of the other genome are dropped" in result.account["warnings"][0]
    with pytest.raises(InputError, match="hold hg19_, but organism is mouse"):
        harmonized_from(with_genes(screen, {}, "hg19_{}"), organism="mouse")


def test_prefixed_ids_are_ids() -> None:
    var = pd.DataFrame(
        {"gene_ids": ["GRCh38_ENSG00000198804", "GRCh38_ENSG00000105610"]}, index=["GRCh38_MT-CO1", "GRCh38_KLF1"]
    )
    table = gene_table(var, {"organism": "human"})
    assert list(table["gene_id"]) == ["ENSG00000198804", "ENSG00000105610"]
    assert list(table["gene_name"]) == ["MT-CO1", "KLF1"]
    assert genomes(var.set_index("gene_ids"), ())[1] == ["GRCh38_"]


# --- mitochondrial genes --------------------------------------------------------------------------------------------


def table_of(names: list[str], organism: str) -> pd.DataFrame:
    """Return the gene table of a file with these names."""
    return gene_table(pd.DataFrame(index=names), {"organism": organism})


@pytest.mark.parametrize(
    ("names", "organism", "n"),
    [
        (["MT-CO1", "KLF1", "MTOR"], "human", 1),
        (["mt-Co1", "mt-Tl1", "Mtor", "Klf1"], "mouse", 2),
        (["MT-CO1", "KLF1"], "mouse", 1),  # symbols in capitals
        (["MT.CO1", "MT_ND4L", "MT1.X"], "human", 2),
        (["ENSG00000198804", "ENSG00000198888.2", "ENSG00000105610"], "human", 2),
        ([*sorted(MOUSE_MITOCHONDRIAL), "ENSMUSG00000000001"], "mouse", 37),
        (
            ["ND1", "ND2", "ND3", "ND4", "ND4L", "ND5", "ND6", "COX1", "COX2", "CYTB", "ATP6", "ATP8", "PTGS1"],
            "human",
            12,
        ),
        (["COX1", "COX2", "PTGS3"], "human", 0),  # alone they may be PTGS1 and PTGS2
    ],
)
def test_mitochondrial_genes_are_found(names: list[str], organism: str, n: int) -> None:
    assert mitochondrial(table_of(names, organism), organism).sum() == n


def test_a_limit_that_no_gene_serves_is_told_once_with_its_cause(
    harmonized_from: Callable, tiny_screen: Callable, caplog: pytest.LogCaptureFixture
) -> None:
    panel = with_genes(tiny_screen(), {"MT-ND1": "OTHER"})
    with caplog.at_level("WARNING"):
        result = harmonized_from(panel, {"max_pct_mt": 20})
    (warning,) = result.account["warnings"]
    assert "qc.max_pct_mt = 20 drops nothing: none of the 80 genes" in warning
    assert caplog.text.count(warning) == 1
    ids = with_genes(panel, {name: f"ENSMUSG{i:011d}" for i, name in enumerate(panel.var_names)})
    warning, unmeasured = harmonized_from(ids, {"max_pct_mt": 20}, organism="mouse").account["warnings"]
    assert "Ensembl ids alone" in warning
    assert unmeasured.startswith(
        "none of the 8 perturbed genes (TF1, TF2, TF3, TF4, TF5, ...) is among the measured ones (ENSMUSG"
    )
    assert harmonized_from(panel).account["warnings"] == []
    assert harmonized_from(tiny_screen(), {"max_pct_mt": 20}).account["warnings"] == []


# --- another organism -----------------------------------------------------------------------------------------------


def test_genes_of_another_organism_than_the_declared_one_are_an_error(
    harmonized_from: Callable, tiny_screen: Callable
) -> None:
    names = {f"GENE{i}": symbol.capitalize() for i, symbol in enumerate(HUMAN)}
    mouse = with_genes(tiny_screen(), {**names, "MT-ND1": "mt-Nd1"})
    with pytest.raises(
        InputError, match=r"screen.h5ad: organism is human, but .* written as mouse symbols.*Set organism: mouse"
    ):
        harmonized_from(mouse, {"max_pct_mt": 1})
    assert harmonized_from(mouse, {"max_pct_mt": 100}, organism="mouse").adata.obs["pct_counts_mt"].max() > 0
    ids = with_genes(tiny_screen(), {f"GENE{i}": f"ENSMUSG{i:011d}" for i in range(70)})
    with pytest.raises(InputError, match=r"Ensembl ids are of mouse genes\. Set organism: mouse"):
        harmonized_from(ids)


def test_symbols_of_either_organism_pass_for_their_own() -> None:
    mouse = [name.capitalize() for name in HUMAN]
    assert other_organism(table_of(HUMAN, "human"), "human") is None
    assert other_organism(table_of([*HUMAN, *mouse], "human"), "human") is None, "both: nothing is evident"
    assert other_organism(table_of(mouse, "mouse"), "mouse") is None
    assert other_organism(table_of(HUMAN, "mouse"), "mouse") is None, "some write mouse symbols in capitals"
    assert other_organism(table_of([f"AC{i:06d}.{i}" for i in range(90)], "human"), "human") is None


def test_labels_in_capitals_find_mouse_genes_where_that_is_one_gene(
    harmonized_from: Callable, tiny_screen: Callable
) -> None:
    screen = with_genes(tiny_screen(), {"TF1": "Tf1", "TF2": "Tf2", "GENE0": "tf2"})
    result = harmonized_from(screen, organism="mouse")
    assert {"Tf1", "TF2", "TF2+Tf1", "TF3"} <= set(result.adata.obs["perturbation"])
    assert result.account["perturbations"]["not_measured"] == ["TF2"], "Tf2 and tf2 are two"
    assert result.account["perturbations"]["renamed"]["TF1"] == "Tf1"


# --- limits that leave no control -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("qc", "spoilt", "said"),
    [
        ({"max_pct_mt": 5}, "mitochondrial", r"qc.max_pct_mt = 5 drops 80 of 80 \(their median: [\d.]+\); raise it"),
        ({"min_counts": 300}, "shallow", r"qc.min_counts = 300 drops 80 of 80 \(their median: [\d.]+\); lower it"),
    ],
)
def test_the_limit_that_leaves_no_control_is_named_with_its_direction(
    qc: dict, spoilt: str, said: str, harmonized_from: Callable, tiny_screen: Callable
) -> None:
    screen = tiny_screen()
    X = screen.X.toarray()
    control = (screen.obs["perturbation"] == "control").to_numpy()
    if spoilt == "mitochondrial":
        X[:, screen.var_names == "MT-ND1"] = 1
        X[np.ix_(control, screen.var_names == "MT-ND1")] = 900
    else:
        X[control] = np.minimum(X[control], 1)
    screen.X = X
    with pytest.raises(InputError, match="leaves no control cells.*" + said):
        harmonized_from(screen, qc)
