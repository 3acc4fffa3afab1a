"""Genes that share a promoter with a perturbed gene are found; the tables of starts hold what their sources say."""

import gzip
import zipfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perturbflow.genes import gene_starts, refseq
from perturbflow.genes.gene_starts import TABLES, WITHIN, Start, neighbours, starts
from perturbflow.genes.symbols import human_symbols

# Pairs that are read away from one promoter, each from the literature of these genes.
BIDIRECTIONAL = [
    ("HSPD1", "HSPE1"), ("BRCA1", "NBR2"), ("PRKDC", "MCM4"), ("DHFR", "MSH3"), ("ATM", "NPAT"), ("SURF1", "SURF2"),
    ("MRPS12", "SARS2"),
    ("PPAT", "PAICS"), ("COL4A1", "COL4A2"), ("TP53", "WRAP53"), ("GART", "SON"), ("TAP1", "PSMB9"),
]  # fmt: skip


@pytest.mark.parametrize("pair", BIDIRECTIONAL, ids="-".join)
def test_genes_of_one_promoter_are_neighbours(pair: tuple[str, str]) -> None:
    """Each is the other's, at the same distance and on opposite strands.

    The distance is below the kilobase that defines such promoters (Trinklein et al. 2004).
    """
    found = neighbours(pair, pair)
    assert [name for name, _ in found[pair[0]]] == [pair[1]]
    assert [name for name, _ in found[pair[1]]] == [pair[0]]
    assert found[pair[0]][0][1] == found[pair[1]][0][1] < 1000
    assert {starts()[gene].strand for gene in pair} == {"+", "-"}


def test_starts_are_those_of_the_reference() -> None:
    """By NCBI's MANE: NM_007294.4, NM_000546.6, NM_002049.4 and NM_006563.5 on GRCh38."""
    assert starts()["BRCA1"] == Start("17", 43_125_364, "-")
    assert starts()["TP53"] == Start("17", 7_687_490, "-")
    assert starts()["GATA1"] == Start("X", 48_786_590, "+")
    assert starts()["KLF1"] == Start("19", 12_887_201, "-")


def test_only_measured_genes_within_the_distance_are_neighbours_the_nearest_first() -> None:
    measured = ["GCDH", "HSPE1", "KLF1", "NOWHERE1", "GATA1"]
    assert neighbours(["KLF1"], measured) == {"KLF1": [("GCDH", 3959)]}
    assert neighbours(["KLF1"], measured, within=3959) == {"KLF1": [("GCDH", 3959)]}
    assert neighbours(["KLF1"], measured, within=3958) == {"KLF1": []}
    assert neighbours(["KLF1"], ["KLF1"]) == {"KLF1": []}
    assert neighbours(["KLF1"], [*starts()], within=20_000)["KLF1"][0] == ("GCDH", 3959)


def test_names_find_their_gene_and_none_is_its_own_neighbour() -> None:
    """Doses, previous symbols, Ensembl ids and aliases; answers are in the names that were given."""
    measured = ["SARS2", "ENSG00000144381", "HSPE1"]  # the id is HSPD1's
    found = neighbours(["HSPD1", "HSPE1@0.5", "RPMS12", "ENSG00000144381"], measured)
    assert found == {"HSPD1": [("HSPE1", 539)], "HSPE1@0.5": [("ENSG00000144381", 539)], "RPMS12": [("SARS2", 181)],
                     "ENSG00000144381": [("HSPE1", 539)]}  # fmt: skip


def test_what_is_not_known_has_no_neighbours() -> None:
    assert neighbours(["NOWHERE1", "imatinib@10", ""], [*starts()]) == {"NOWHERE1": [], "imatinib@10": [], "": []}
    assert neighbours(["HSPD1"], ["HSPE1"], "mouse") == {"HSPD1": []}
    assert neighbours(["HSPD1"], ["HSPE1"], "zebrafish") == {"HSPD1": []}
    assert neighbours([], ["HSPE1"]) == {}
    assert neighbours(["HSPD1"], []) == {"HSPD1": []}


def test_mouse_has_a_table_of_its_own() -> None:
    assert [name for name, _ in neighbours(["Hspd1"], [*starts("mouse")], "mouse")["Hspd1"]] == ["Hspe1"]
    assert starts("mouse")["Brca1"].chromosome == "11"


@given(st.data())
def test_neighbours_are_those_of_all_pairs(data: st.DataObject) -> None:
    """As found by comparing every pair; being near is mutual."""
    near_hspd1 = [
        gene
        for gene, start in starts().items()
        if start.chromosome == "2" and 197_000_000 < start.position < 198_500_000
    ]
    genes = data.draw(st.lists(st.sampled_from(near_hspd1), unique=True, max_size=12))
    within = data.draw(st.integers(0, 300_000))
    found = neighbours(genes, genes, within=within)
    expected = {
        (a, b, abs(starts()[a].position - starts()[b].position))
        for a in genes
        for b in genes
        if a != b and abs(starts()[a].position - starts()[b].position) <= within
    }
    assert {(a, b, distance) for a, near in found.items() for b, distance in near} == expected
    assert all(
        [distance for _, distance in near] == sorted(distance for _, distance in near) for near in found.values()
    )


def test_the_tables_are_small_and_say_where_they_come_from() -> None:
    for organism, least in (("human", 26_000), ("mouse", 24_000)):
        assert TABLES[organism].stat().st_size < 500_000
        with gzip.open(TABLES[organism], "rt") as file:
            head = [next(file) for _ in range(4)]
        assert "on PyPI" in head[1]
        assert "perturbflow.genes.refseq" in head[2]
        assert len(starts(organism)) > least
    assert set(starts()) <= human_symbols().approved
    coding = neighbours([*starts()], [*starts()], within=WITHIN)
    assert 0.2 < sum(map(bool, coding.values())) / len(coding) < 0.35


MANE = [
    ("HGNC_ID", "symbol", "MANE_status", "GRCh38_chr", "chr_start", "chr_end", "chr_strand"),
    ("HGNC:6345", "KLF1", "MANE Select", "NC_000019.10", "101", "200", "-"),
    ("HGNC:4170", "NEWNAME", "MANE Select", "NC_000023.11", "301", "400", "+"),  # GATA1, by its id
    ("HGNC:1100", "BRCA1", "MANE Plus Clinical", "NC_000017.11", "1", "2", "+"),
    ("HGNC:4641", "GSTT1", "MANE Select", "NT_187633.1", "1", "2", "+"),
    ("", "NOSUCHGENE", "MANE Select", "NC_000001.11", "1", "2", "+"),
]
REFFLAT = [
    ("KLF1", "chr19", "-", 0, 999),  # MANE has it
    ("GSTT1", "chr22_KI270879v1_alt", "-", 0, 10),
    ("GSTT1", "chr22", "-", 10, 50),
    ("NBR2", "chr17", "+", 500, 900),
    ("NBR2", "chr17", "+", 500, 800),
    ("NBR2", "chr17", "+", 400, 800),  # most of its transcripts begin elsewhere
    ("AARS", "chr16", "-", 10, 70),  # of two equals the one that is read first, under the symbol of today
    ("AARS", "chr16", "-", 10, 90),
    ("CSF2RA", "chrX", "+", 10, 20),
    ("CSF2RA", "chrY", "+", 30, 40),
    ("MIR1244-1", "chr2", "+", 10, 20),  # copies under one name
    ("MIR1244-1", "chr5", "+", 10, 20),
    ("NOSUCHGENE", "chr1", "+", 10, 20),
]


def wheels(folder: Path) -> tuple[Path, Path]:
    """Write wheels that hold MANE and refFlat as their packages do."""
    mane, refflat = folder / "mane.whl", folder / "refflat.whl"
    with zipfile.ZipFile(mane, "w") as archive:
        archive.writestr(refseq.MANE_MEMBER, gzip.compress("\n".join("\t".join(row) for row in MANE).encode()))
    rows = [
        (name, "NM_1", chromosome, strand, start, end, start, end, 1, "0,", "9,")
        for name, chromosome, strand, start, end in REFFLAT
    ]
    with zipfile.ZipFile(refflat, "w") as archive:
        archive.writestr(
            refseq.REFFLAT_MEMBERS["human"], gzip.compress("\n".join("\t".join(map(str, row)) for row in rows).encode())
        )
        archive.writestr(
            refseq.REFFLAT_MEMBERS["mouse"],
            gzip.compress(b"Klf1\tNM_1\tchr8\t+\t84900000\t84903000\t0\t0\t1\t0,\t9,\n"),
        )
    return mane, refflat


def test_a_table_is_made_of_its_sources_the_same_every_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MANE before RefSeq, today's symbols, chromosomes alone, bases from 1, and the end of what is read backwards."""
    first, second = ({organism: tmp_path / f"{n}.{organism}.tsv.gz" for organism in TABLES} for n in (1, 2))
    for tables in (first, second):
        refseq.build(*wheels(tmp_path), tables)
    assert [table.read_bytes() for table in first.values()] == [table.read_bytes() for table in second.values()]
    monkeypatch.setattr(gene_starts, "TABLES", first)
    starts.cache_clear()
    try:
        assert starts() == {
            "AARS1": Start("16", 90, "-"),
            "CSF2RA": Start("X", 11, "+"),
            "GATA1": Start("X", 301, "+"),
            "GSTT1": Start("22", 50, "-"),
            "KLF1": Start("19", 200, "-"),
            "NBR2": Start("17", 501, "+"),
        }
        assert starts("mouse") == {"Klf1": Start("8", 84_900_001, "+")}
    finally:
        starts.cache_clear()
