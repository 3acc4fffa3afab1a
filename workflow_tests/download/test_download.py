"""Downloads: a file and its manifest appear when they are right, and nothing does otherwise."""

import errno
import gzip
import hashlib
import io
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pandas as pd
import pytest
import yaml
from conftest import REPOSITORY, copy_repository, merged, run_snakemake
from fault_outcomes import FAULTS, IMPATIENCE, KNOWN, declared, outcome, screen
from fault_server import ETAG, Host, serving
from hypothesis import given
from hypothesis import strategies as st

from perturbflow.download import download, transfer
from perturbflow.download.check import ask, ask_index
from perturbflow.download.verification import UnfitError, is_web_page, verify
from perturbflow.errors import InputError
from perturbflow.registry.plan import Plan

CONTENT = screen()
SHA256 = hashlib.sha256(CONTENT).hexdigest()
NAME = "screen.h5ad"


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "PATIENCE", IMPATIENCE)
    monkeypatch.delenv("PERTURBFLOW_MIRROR", raising=False)


@pytest.fixture(scope="module")
def running() -> Iterator[Host]:
    """Yield a host that all tests share."""
    with serving(CONTENT) as host:
        yield host


@pytest.fixture
def host(running: Host) -> Host:
    """Return a host that was asked for nothing yet."""
    running.content = CONTENT
    running.forget()
    return running


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    """Return where the manifest goes."""
    return tmp_path / "resources" / "mine" / "raw" / "manifest.json"


def file_at(*urls: str, known: dict | None = None, name: str = NAME) -> dict:
    """Return what is declared of a file: size and checksums, or `known` in their place."""
    return {"name": name, "url": list(urls), **(declared(CONTENT) if known is None else known)}


UNPUBLISHED = {"checksum": "unpublished"}


def fetch(manifest: Path, file: dict, mirror: Path | None = None) -> None:
    """Download one file."""
    download(manifest, "mine", {"file": file}, None if mirror is None else str(mirror))


def block(source: dict) -> dict:
    """Return the smallest block of a dataset."""
    return {"source": source, "perturbation": {"column": "a", "control": ["b"]}}


def entry(manifest: Path) -> dict:
    """Return what the manifest says of the one file."""
    return json.loads(manifest.read_text())["files"]["file"]


def visible(manifest: Path) -> list[str]:
    """Return the names in the manifest's folder that a reader could take for data."""
    return sorted(path.name for path in manifest.parent.iterdir() if not path.name.startswith("."))


def hidden(manifest: Path) -> list[Path]:
    """Return the parts in the manifest's folder, without the notes beside them."""
    return list(manifest.parent.glob(".*.part"))


# --- every fault ----------------------------------------------------------------------------------------------------


def outcomes() -> list[tuple[str, str, str]]:
    """Return fault, what is known of the file, and the outcome, from docs/results/download_faults.tsv."""
    _, *lines = (REPOSITORY / "docs" / "results" / "download_faults.tsv").read_text().splitlines()
    rows = [line.split("\t") for line in lines]
    return [(fault, known, end) for fault, _, *ends in rows for known, end in zip(KNOWN, ends, strict=True)]


@pytest.mark.parametrize(("fault", "known", "expected"), outcomes(), ids=lambda value: value[:30])
def test_every_fault_ends_as_the_table_says(fault: str, known: str, expected: str, host: Host, tmp_path: Path) -> None:
    assert outcome(host, fault, known, tmp_path) == expected


def test_the_table_has_every_fault() -> None:
    assert [(fault, known) for fault, known, _ in outcomes()] == [(fault, known) for fault in FAULTS for known in KNOWN]


def test_no_fault_ends_in_a_wrong_file_where_it_can_be_told() -> None:
    ends = {(fault, known) for fault, known, expected in outcomes() if expected == "the file as it is served"}
    assert ends == {("changed", "unpublished"), ("grown", "unpublished")}, (
        "a first download has nothing to be compared with"
    )


# --- right ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sums", [("sha256",), ("md5",), ("md5", "sha256")])
def test_the_right_file_arrives_with_its_manifest(sums: tuple, host: Host, manifest: Path) -> None:
    url = f"{host.address}/right/{NAME}"
    fetch(manifest, file_at(url, known={key: declared(CONTENT)[key] for key in ("bytes", *sums)}))
    assert visible(manifest) == ["manifest.json", NAME]
    assert (manifest.parent / NAME).read_bytes() == CONTENT
    found = entry(manifest)
    assert found.pop("retrieved").endswith("+00:00")
    assert found == {"file": NAME, "bytes": len(CONTENT), "sha256": SHA256, "source": url, "checked": ", ".join(sums)}
    assert host.asked == {f"/right/{NAME}": 1}


def test_several_files_are_one_source(host: Host, manifest: Path) -> None:
    files = {
        "matrix": file_at(f"{host.address}/right/m.h5ad", name="m.h5ad"),
        "genes": file_at(f"{host.address}/right/g.h5ad", name="g.h5ad", known=UNPUBLISHED),
    }
    download(manifest, "mine", files)
    entries = json.loads(manifest.read_text())["files"]
    assert {role: (found["file"], found["checked"]) for role, found in entries.items()} == {
        "matrix": ("m.h5ad", "md5, sha256"),
        "genes": ("g.h5ad", "recorded at first download"),
    }
    assert visible(manifest) == ["g.h5ad", "m.h5ad", "manifest.json"]


def test_of_several_files_those_that_arrived_are_not_asked_for_again(host: Host, manifest: Path) -> None:
    files = {
        "matrix": file_at(f"{host.address}/right/m.h5ad", name="m.h5ad"),
        "genes": file_at(f"{host.address}/always-404/g.h5ad", name="g.h5ad"),
    }
    with pytest.raises(InputError, match=r"g\.h5ad could not be retrieved"):
        download(manifest, "mine", files)
    assert not manifest.exists()
    files["genes"]["url"] = [f"{host.address}/right/g.h5ad"]
    download(manifest, "mine", files)
    assert host.asked["/right/m.h5ad"] == 1


def test_a_file_that_is_here_and_right_is_kept(host: Host, manifest: Path) -> None:
    url = f"{host.address}/right/{NAME}"
    fetch(manifest, file_at(url))
    before = entry(manifest)
    manifest.unlink()  # as Snakemake does before it runs the rule again
    fetch(manifest, file_at(f"{host.address}/right/elsewhere/{NAME}", url))
    assert entry(manifest) == before
    assert sum(host.asked.values()) == 1


def test_a_file_that_is_here_and_wrong_is_replaced(
    host: Host, manifest: Path, caplog: pytest.LogCaptureFixture
) -> None:
    manifest.parent.mkdir(parents=True)
    (manifest.parent / NAME).write_bytes(CONTENT[:-1])
    fetch(manifest, file_at(f"{host.address}/right/{NAME}"))
    assert (manifest.parent / NAME).read_bytes() == CONTENT
    assert "is here already, but" in caplog.text


def test_a_failed_download_leaves_the_files_of_an_earlier_one(host: Host, manifest: Path) -> None:
    fetch(manifest, file_at(f"{host.address}/right/{NAME}"))
    before = manifest.read_text()
    other = {"bytes": 7, "sha256": "0" * 64}
    with pytest.raises(InputError):
        fetch(manifest, file_at(f"{host.address}/right/{NAME}", known=other))
    assert manifest.read_text() == before
    assert (manifest.parent / NAME).read_bytes() == CONTENT


# --- compressed by the host -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_published", [True, False])
@pytest.mark.parametrize("fault", ["right", "encoded", "misnamed_encoding"])
def test_a_gz_file_keeps_its_own_bytes(fault: str, is_published: bool, host: Host, manifest: Path) -> None:
    host.content = gzip.compress(b"%%MatrixMarket matrix coordinate integer general\n", mtime=0) + b""
    known = declared(host.content) if is_published else UNPUBLISHED
    fetch(manifest, file_at(f"{host.address}/{fault}/m.mtx.gz", name="m.mtx.gz", known=known))
    assert (manifest.parent / "m.mtx.gz").read_bytes() == host.content
    assert hidden(manifest) == []


# --- mirrors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "first", ["always-404", "always-503", "changed", "truncated", "stall", "page", "cut_at_once", "redirect_loop"]
)
@pytest.mark.parametrize("is_published", [True, False])
def test_the_second_mirror_serves_where_the_first_fails(
    first: str, is_published: bool, host: Host, manifest: Path
) -> None:
    if first == "changed" and not is_published:
        pytest.skip("nothing tells")
    right = f"{host.address}/right/{NAME}"
    fetch(manifest, file_at(f"{host.address}/{first}/{NAME}", right, known=None if is_published else UNPUBLISHED))
    assert (manifest.parent / NAME).read_bytes() == CONTENT
    assert entry(manifest)["source"] == right
    assert host.asked[f"/right/{NAME}"] == 1
    assert hidden(manifest) == []


def test_an_unreachable_host_and_every_mirror_are_in_the_message(host: Host, manifest: Path) -> None:
    urls = [
        "http://127.0.0.1:9/screen.h5ad",
        *[f"{host.address}/{fault}/{NAME}" for fault in ("always-404", "changed", "page")],
    ]
    with pytest.raises(InputError) as raised:
        fetch(manifest, file_at(*urls))
    lines = str(raised.value).splitlines()
    assert lines[0] == f"{NAME} could not be retrieved."
    assert [line.split(": ")[0] for line in lines[1:5]] == urls
    assert lines[1].endswith("Connection refused, after 3 attempts.")
    assert "PERTURBFLOW_MIRROR" in lines[5]
    assert visible(manifest) == []


def test_another_mirror_goes_on_where_the_first_broke_off(host: Host, manifest: Path) -> None:
    fetch(manifest, file_at(f"{host.address}/cut_then_gone/{NAME}", f"{host.address}/no_etag/{NAME}"))
    assert (manifest.parent / NAME).read_bytes() == CONTENT
    assert host.sent[f"/no_etag/{NAME}"] == len(CONTENT) - len(CONTENT) // 2


def test_without_a_checksum_no_mirror_goes_on_with_anothers_part(host: Host, manifest: Path) -> None:
    fetch(manifest, file_at(f"{host.address}/cut_then_gone/{NAME}", f"{host.address}/right/{NAME}", known=UNPUBLISHED))
    assert host.sent[f"/right/{NAME}"] == len(CONTENT)


def test_wrong_bytes_are_not_asked_for_again(host: Host, manifest: Path) -> None:
    with pytest.raises(InputError):
        fetch(manifest, file_at(f"{host.address}/changed/{NAME}"))
    assert host.asked == {f"/changed/{NAME}": 1}
    assert hidden(manifest) == []


# --- patience -------------------------------------------------------------------------------------------------------


def test_a_host_is_given_the_time_that_it_asks_for_and_no_more(
    host: Host, manifest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    monkeypatch.setattr(transfer.time, "sleep", waits.append)
    monkeypatch.setattr(transfer, "PATIENCE", transfer.Patience(longest_retry_after=90))
    with pytest.raises(InputError):
        fetch(manifest, file_at(f"{host.address}/always-429/{NAME}"))
    assert waits == [90] * 5  # it asks for 120
    waits.clear()
    with pytest.raises(InputError):
        fetch(manifest, file_at(f"{host.address}/always-503/{NAME}"))
    bounds = [2, 4, 8, 16, 32]
    assert all(bound / 2 <= wait <= bound for wait, bound in zip(waits, bounds, strict=True))


def test_as_long_as_bytes_arrive_a_host_is_asked_again(host: Host, manifest: Path) -> None:
    host.content = CONTENT * 3
    host.dice.seed(1)
    fetch(manifest, file_at(f"{host.address}/cut/{NAME}", known=declared(host.content)))
    assert host.asked[f"/cut/{NAME}"] > IMPATIENCE.fruitless_attempts
    assert host.sent[f"/cut/{NAME}"] == len(host.content), "no byte was sent twice"


def test_progress_is_a_line_every_so_often(host: Host, manifest: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    host.pace = 0.02
    fetch(manifest, file_at(f"{host.address}/slow/{NAME}"))
    lines = [message for message in caplog.messages if "left" in message]
    assert 2 <= len(lines) <= 8
    assert re.fullmatch(rf"{NAME}: \d+ %, [\d.]+k of 51\.4k, [\d.]+[kM]B/s, 00:0\d left", lines[0]), lines[0]


def test_a_terminal_has_a_bar(
    host: Host, manifest: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    fetch(manifest, file_at(f"{host.address}/slow/{NAME}"))
    assert re.search(r"screen\.h5ad: +100%.*51\.4k/51\.4k.*B/s", capsys.readouterr().err)


# --- going on -------------------------------------------------------------------------------------------------------


def left_halfway(host: Host, manifest: Path) -> Path:
    """Leave half of a file behind, and return the part."""
    with pytest.raises(InputError, match="404"):
        fetch(manifest, file_at(f"{host.address}/cut_then_gone/{NAME}"))
    (part,) = hidden(manifest)
    assert part.stat().st_size == len(CONTENT) // 2
    assert visible(manifest) == []
    host.forget()
    return part


def test_a_later_run_goes_on_where_a_failed_one_ended(host: Host, manifest: Path) -> None:
    left_halfway(host, manifest)
    fetch(manifest, file_at(f"{host.address}/right/{NAME}"))
    assert (manifest.parent / NAME).read_bytes() == CONTENT
    assert host.sent[f"/right/{NAME}"] == len(CONTENT) - len(CONTENT) // 2
    assert hidden(manifest) == []


def test_a_host_is_told_which_version_the_part_is_of(host: Host, manifest: Path) -> None:
    fetch(manifest, file_at(f"{host.address}/stall_once/{NAME}"))
    (_, first), (_, second) = host.requests
    assert "Range" not in first
    assert first["Accept-Encoding"] == "identity"
    assert second["Range"] == f"bytes={len(CONTENT) // 2}-"
    assert second["If-Range"] == ETAG


@pytest.mark.parametrize(
    "known", [{"bytes": len(CONTENT), "sha256": "1" * 64}, {"bytes": len(CONTENT) - 1, "sha256": SHA256}, UNPUBLISHED]
)
def test_a_part_of_other_content_is_not_gone_on_with(known: dict, host: Host, manifest: Path) -> None:
    part = left_halfway(host, manifest)
    with pytest.raises(InputError) if known != UNPUBLISHED else nullcontext():
        fetch(manifest, file_at(f"{host.address}/right/{NAME}", known=known))
    assert all("Range" not in headers for _, headers in host.requests)
    assert part.exists() == (known != UNPUBLISHED), "parts of a file go when it is there"


def test_a_part_that_is_longer_than_the_file_is_dropped(host: Host, manifest: Path) -> None:
    part = left_halfway(host, manifest)
    part.write_bytes(CONTENT + b"more")
    fetch(manifest, file_at(f"{host.address}/right/{NAME}"))
    assert (manifest.parent / NAME).read_bytes() == CONTENT


def test_a_part_of_wrong_bytes_costs_one_more_attempt(
    host: Host, manifest: Path, caplog: pytest.LogCaptureFixture
) -> None:
    part = left_halfway(host, manifest)
    part.write_bytes(b"x" * part.stat().st_size)
    fetch(manifest, file_at(f"{host.address}/right/{NAME}"))
    assert (manifest.parent / NAME).read_bytes() == CONTENT
    assert host.asked == {f"/right/{NAME}": 2}
    assert "put together from parts" in caplog.text


@pytest.mark.parametrize("is_right", [True, False])
def test_a_part_that_is_all_of_it_is_verified_first(is_right: bool, host: Host, manifest: Path) -> None:
    part = left_halfway(host, manifest)
    part.write_bytes(CONTENT if is_right else CONTENT[::-1])
    fetch(manifest, file_at(f"{host.address}/right/{NAME}"))
    assert (manifest.parent / NAME).read_bytes() == CONTENT
    assert sum(host.asked.values()) == (not is_right)


def test_a_page_in_the_middle_costs_nothing_that_has_arrived(host: Host, manifest: Path) -> None:
    file = file_at(f"{host.address}/page_then_right/{NAME}")
    with pytest.raises(InputError, match="web page"):
        fetch(manifest, file)
    (part,) = hidden(manifest)
    assert part.read_bytes() == CONTENT[: len(CONTENT) // 2]
    fetch(manifest, file)
    assert host.sent[f"/page_then_right/{NAME}"] < 1.5 * len(CONTENT)


def test_a_part_without_its_note_is_dropped(host: Host, manifest: Path) -> None:
    part = left_halfway(host, manifest)
    part.with_name(f"{part.name}.json").write_text("{")
    fetch(manifest, file_at(f"{host.address}/right/{NAME}"))
    assert host.sent[f"/right/{NAME}"] == len(CONTENT)


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("bytes 5-9/10", (5, 10)),
        ("bytes 5-9/*", (5, None)),
        ("bytes */10", (None, 10)),
        ("", (None, None)),
        ("lines 1-2/3", (None, None)),
    ],
)
def test_a_content_range_is_read(header: str, expected: tuple) -> None:
    assert transfer.content_range(header) == expected


@given(st.text(alphabet=st.characters(max_codepoint=255)))
def test_any_content_range_is_read_or_not_taken_for_one(text: str) -> None:
    for value in transfer.content_range(f"bytes {text}"):
        assert value is None or value >= 0


# --- killed, and two at once ----------------------------------------------------------------------------------------

SCRIPT = """
import json, logging, sys
from pathlib import Path
from perturbflow.download import download, transfer
from perturbflow.download.check import ask, ask_index
logging.basicConfig(level=logging.INFO)
transfer.PATIENCE = transfer.Patience(first_wait=0.01, stall=5)
download(Path(sys.argv[1]), "mine", {"file": json.loads(sys.argv[2])})
"""


def in_process(manifest: Path, file: dict) -> subprocess.Popen:
    """Start a download in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY / "scripts")}
    command = [sys.executable, "-c", SCRIPT, str(manifest), json.dumps(file)]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("known", [None, UNPUBLISHED], ids=["declared", "unpublished"])
def test_a_killed_download_is_gone_on_with(known: dict | None, host: Host, manifest: Path) -> None:
    host.content, host.pace = CONTENT * 20, 0.004  # a megabyte in a second
    if known == UNPUBLISHED:
        host.content = gzip.compress(os.urandom(900_000))
    name = "m.mtx.gz" if known == UNPUBLISHED else NAME
    file = file_at(f"{host.address}/slow/{name}", known=known or declared(host.content), name=name)
    kills = 0
    for seen in (0.15, 0.3, 0.65, 0.8):
        process = in_process(manifest, file)
        while process.poll() is None and sum(part.stat().st_size for part in hidden(manifest)) < seen * len(
            host.content
        ):
            time.sleep(0.005)
        process.kill()
        process.communicate()
        kills += process.returncode == -signal.SIGKILL
        assert visible(manifest) == []
    host.pace = 0
    last = in_process(manifest, file)
    _, log = last.communicate(timeout=60)
    assert last.returncode == 0, log
    assert kills == 4
    assert (manifest.parent / name).read_bytes() == host.content
    assert "going on after" in log
    # What was on the wire when the process died is all that is sent twice.
    assert host.sent[f"/slow/{name}"] < 1.6 * len(host.content)
    assert host.asked[f"/slow/{name}"] == 5


def test_two_runs_at_once_share_one_download(host: Host, manifest: Path) -> None:
    host.content, host.pace = CONTENT * 10, 0.01
    file = file_at(f"{host.address}/slow/{NAME}", known=declared(host.content))
    processes = [in_process(manifest, file), in_process(manifest, file)]
    logs = [process.communicate(timeout=60)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], logs
    assert (manifest.parent / NAME).read_bytes() == host.content
    assert host.asked == {f"/slow/{NAME}": 1}
    assert sum("another run" in log for log in logs) == 1
    assert sum("is here already and is valid" in log for log in logs) == 1
    assert visible(manifest) == ["manifest.json", NAME]


# --- disk -----------------------------------------------------------------------------------------------------------


class FullDisk(io.RawIOBase):
    """A file that takes some bytes and then no more."""

    def __init__(self, file: io.IOBase, room: int) -> None:
        self.file, self.room = file, room

    def write(self, block: bytes) -> int:
        """Write, or say that the disk is full."""
        if len(block) > self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.room -= len(block)
        return self.file.write(block)

    def close(self) -> None:
        """Close the file below."""
        self.file.close()
        super().close()


def test_a_full_disk_is_one_message_and_costs_nothing_that_has_arrived(
    host: Host, manifest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = file_at(f"{host.address}/slow/{NAME}", f"{host.address}/right/{NAME}")
    path_open = Path.open

    def opened(path: Path, mode: str = "r", **rest: object) -> io.IOBase:
        file = path_open(path, mode, **rest)
        return FullDisk(file, 30_000) if mode == "ab" else file

    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", opened)
        with pytest.raises(
            InputError, match=r"raw: no space left for screen\.h5ad \([\d,]+ bytes are free\)\. Free some"
        ):
            fetch(manifest, file)
    assert host.asked == {f"/slow/{NAME}": 1}, "another mirror needs as much space"
    (part,) = hidden(manifest)
    assert part.stat().st_size > 20_000
    fetch(manifest, file)
    assert (manifest.parent / NAME).read_bytes() == CONTENT
    assert host.requests[-1][1]["Range"] == f"bytes={28_672}-"


def test_too_little_space_is_said_before_anything_is_fetched(
    host: Host, manifest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        transfer.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6 - 50_000, 50_000)
    )
    with pytest.raises(
        InputError,
        match=r"no space left for the 51,400 bytes of screen\.h5ad that are missing \(50,000 bytes are free\)",
    ):
        fetch(manifest, file_at(f"{host.address}/right/{NAME}"))


# --- nothing published ----------------------------------------------------------------------------------------------


def test_the_first_download_is_recorded_and_checked_from_then_on(
    host: Host, manifest: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = file_at(f"{host.address}/right/{NAME}", known=UNPUBLISHED)
    fetch(manifest, file)
    record = manifest.parent.parent / "checksums.json"
    assert json.loads(record.read_text())[NAME]["sha256"] == SHA256
    assert entry(manifest)["checked"] == "recorded at first download"
    assert f"{NAME}: nobody publishes its checksum; its sha256 is in {record} and is checked from now on" in caplog.text

    shutil.rmtree(manifest.parent)
    fetch(manifest, file)
    assert entry(manifest)["checked"] == "sha256 of the first download"

    shutil.rmtree(manifest.parent)
    host.content = CONTENT[:-1] + b"?"
    with pytest.raises(InputError) as raised:
        fetch(manifest, file)
    message = str(raised.value)
    assert "it is not the file that was downloaded first" in message
    assert SHA256 in message
    assert f"delete '{NAME}' from {record}" in message
    assert visible(manifest) == []

    record.unlink()
    fetch(manifest, file)
    assert (manifest.parent / NAME).read_bytes() == host.content


def test_the_record_is_of_a_source_and_not_of_a_name(
    host: Host, manifest: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fetch(manifest, file_at(f"{host.address}/right/{NAME}", known=UNPUBLISHED))
    host.content = CONTENT[:-1] + b"?"
    fetch(manifest, file_at(f"{host.address}/no_range/{NAME}", known=UNPUBLISHED))
    assert (manifest.parent / NAME).read_bytes() == host.content
    assert "now comes from elsewhere" in caplog.text


def test_a_new_version_replaces_the_old_when_its_record_was_deleted(host: Host, manifest: Path) -> None:
    file = file_at(f"{host.address}/right/{NAME}", known=UNPUBLISHED)
    fetch(manifest, file)
    host.content = CONTENT[:-1] + b"?"
    fetch(manifest, file)
    assert (manifest.parent / NAME).read_bytes() == CONTENT, "what is here is what was recorded"
    (manifest.parent.parent / "checksums.json").unlink()
    fetch(manifest, file)
    assert (manifest.parent / NAME).read_bytes() == host.content


def archive(kind: str) -> bytes:
    """Return the bytes of an archive with one text."""
    buffer, text = io.BytesIO(), bytes(range(256)) * 64
    if kind == "zip":
        with zipfile.ZipFile(buffer, "w") as file:
            file.writestr("a.txt", text)
    elif kind == "gz":
        buffer.write(gzip.compress(os.urandom(3000)))
    else:
        with tarfile.open(fileobj=buffer, mode="w") as file:
            info = tarfile.TarInfo("a.txt")
            info.size = len(text)
            file.addfile(info, io.BytesIO(text))
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["h5ad", "zip", "gz", "tar"])
def test_a_file_of_unknown_checksum_is_read_to_its_end(kind: str, tmp_path: Path) -> None:
    content = CONTENT if kind == "h5ad" else archive(kind)
    file = {"name": f"a.{kind}", "checksum": "unpublished"}
    path = tmp_path / "part"
    path.write_bytes(content)
    assert verify(path, file) == hashlib.sha256(content).hexdigest()
    for n in (len(content) - 1, len(content) // 2, len(content) - 5):
        path.write_bytes(content[:n])
        if kind == "tar" and n > len(content) // 2:
            continue  # padding
        with pytest.raises(UnfitError, match="truncated or damaged"):
            verify(path, file)


@pytest.mark.parametrize("kind", ["h5ad", "zip", "gz", "tar"])
def test_the_format_is_what_the_name_says(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "part"
    path.write_bytes(b"Just a moment, please." * 100)
    with pytest.raises(UnfitError, match=r"it is not an? .*, as its name says: it starts with b'Just a m'"):
        verify(path, {"name": f"a.{kind}", "checksum": "unpublished"})


@pytest.mark.parametrize(
    "page",
    [
        b"<!DOCTYPE html>",
        b"\n\n <HTML lang='en'>",
        b"\xef\xbb\xbf<!doctype html >",
        b"<!-- x -->\n<html>",
        b"<?xml version='1.0'?>\n<html xmlns=''>",
    ],
)
def test_web_pages_are_recognized(page: bytes) -> None:
    assert is_web_page(page)


@given(st.binary(max_size=64))
def test_data_is_no_web_page(data: bytes) -> None:
    assert not is_web_page(b"\x89HDF" + data)
    assert not is_web_page(b"\x1f\x8b" + data)
    assert not is_web_page(b"%%MatrixMarket" + data)


# --- the local mirror -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["mine", "."])
def test_a_local_mirror_serves_without_a_network(place: str, host: Host, manifest: Path, tmp_path: Path) -> None:
    source = tmp_path / "mirror" / place / NAME
    source.parent.mkdir(parents=True)
    source.write_bytes(CONTENT)
    fetch(manifest, file_at(f"{host.address}/right/{NAME}"), tmp_path / "mirror")
    assert not host.asked
    final = manifest.parent / NAME
    assert final.read_bytes() == CONTENT
    assert final.stat().st_ino != source.stat().st_ino, "a link would change with it"
    assert entry(manifest)["source"] == str(source)
    assert [path.name for path in manifest.parent.iterdir() if path.name.startswith(".")] == []


def test_what_the_local_mirror_has_not_comes_from_the_network(host: Host, manifest: Path, tmp_path: Path) -> None:
    fetch(manifest, file_at(f"{host.address}/right/{NAME}"), tmp_path)
    assert entry(manifest)["source"].startswith("http")


def test_what_the_local_mirror_has_wrong_comes_from_the_network(
    host: Host, manifest: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / NAME).write_bytes(CONTENT[:-1])
    fetch(manifest, file_at(f"{host.address}/right/{NAME}"), tmp_path)
    assert entry(manifest)["source"].startswith("http")
    assert f"{tmp_path / NAME}: " in caplog.text
    assert hidden(manifest) == []


def test_the_variable_has_precedence_over_the_key(
    host: Host, manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("key", "variable"):
        (tmp_path / name).mkdir()
        (tmp_path / name / NAME).write_bytes(CONTENT)
    monkeypatch.setenv("PERTURBFLOW_MIRROR", str(tmp_path / "variable"))
    fetch(manifest, file_at(f"{host.address}/right/{NAME}"), tmp_path / "key")
    assert entry(manifest)["source"] == str(tmp_path / "variable" / NAME)


def test_a_local_mirror_that_is_not_there_is_told(manifest: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"mirror: there is no folder '.*nowhere' on this machine"):
        fetch(manifest, file_at("http://127.0.0.1:9/a"), tmp_path / "nowhere")


def test_a_package_comes_from_a_local_mirror_too(manifest: Path, tmp_path: Path) -> None:
    content = gzip.compress(b"an sdist")
    (tmp_path / "renge-0.0.5.tar.gz").write_bytes(content)
    file = {"name": "renge-0.0.5.tar.gz", "pypi": "renge==0.0.5", "sha256": hashlib.sha256(content).hexdigest()}
    fetch(manifest, file, tmp_path)
    assert entry(manifest)["source"] == str(tmp_path / "renge-0.0.5.tar.gz")


@pytest.mark.slow
def test_the_workflow_keeps_what_arrived_takes_a_mirror_and_needs_nothing_again(host: Host, tmp_path: Path) -> None:
    source = {"url": [f"{host.address}/page_then_right/{NAME}"]}
    config = {
        "select": {"datasets": ["mine"], "splits": ["unseen_perturbation"]},
        "datasets": {"mine": block(source) | declared(CONTENT)},
    }
    target = Path("resources/mine/raw/manifest.json")
    failed = run_snakemake(tmp_path, target, config=config)
    assert failed.returncode != 0
    assert failed.text.count(f"{NAME} could not be retrieved") == 1
    assert "Traceback" not in failed.text
    assert visible(tmp_path / target) == []
    assert [part.read_bytes() for part in hidden(tmp_path / target)] == [CONTENT[: len(CONTENT) // 2]]

    (tmp_path / "usb").mkdir()
    (tmp_path / "usb" / NAME).write_bytes(CONTENT)
    done = run_snakemake(tmp_path, target, config={**config, "mirror": "usb"})
    assert done.returncode == 0, done.text
    assert entry(tmp_path / target)["source"] == f"usb/{NAME}"
    assert hidden(tmp_path / target) == []

    source["url"].insert(0, "http://127.0.0.1:9/elsewhere/screen.h5ad")
    assert "Nothing to be done" in run_snakemake(tmp_path, target, "--dry-run", config=config).text


# --- asking for headers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        ("right", "as declared"),
        ("no_range", "as declared"),
        ("no_head", "as declared"),
        ("redirect_elsewhere", "as declared"),
        ("grown", "another size"),
        ("chunked", "there, size not given"),
        ("page", "a web page"),
        ("always-404", "refused: Not Found"),
        ("always-403", "refused: Forbidden"),
        ("always-202", "refused: Accepted"),
        ("redirect_loop", "unreachable: Exceeded 10 redirects."),
        ("cut_at_once", "unreachable: Remote end closed connection without response"),
    ],
)
def test_what_a_host_says_is_put_into_words(fault: str, expected: str, host: Host) -> None:
    assert ask(f"{host.address}/{fault}/{NAME}", len(CONTENT))["finding"] == expected
    assert sum(host.sent.values()) <= 2 * 4096, "headers only"


def test_nothing_declared_is_said(host: Host) -> None:
    assert ask(f"{host.address}/right/{NAME}", None) == {
        "status": 200,
        "found": len(CONTENT),
        "finding": "there, nothing declared",
    }


def test_every_mirror_of_every_dataset_is_asked_and_none_fails_the_run(host: Host, tmp_path: Path) -> None:
    files = {"matrix": [f"{host.address}/right/m", f"{host.address}/grown/m"], "genes": ["http://127.0.0.1:9/g"]}
    source = {"files": {role: {"url": urls, **declared(CONTENT)} for role, urls in files.items()}}
    config = {"select": {"datasets": ["mine"]}, "datasets": {"mine": block(source)}}
    target = tmp_path / "results" / "download_check.tsv"
    # A copy of the repository whose screens need no hosts.
    repository = copy_repository(tmp_path / "repository")
    registered = {
        name: block({"path": "a.h5ad"})
        for name in yaml.safe_load((repository / "config" / "datasets.yaml").read_text())["datasets"]
    }
    (repository / "config" / "datasets.yaml").write_text(yaml.safe_dump({"datasets": registered}))
    outcome = run_snakemake(tmp_path, "download_check", config=config, repository=repository)
    assert outcome.returncode == 0, outcome.text
    table = pd.read_csv(target, sep="\t").set_index("url")
    assert set(table["dataset"]) > {"mine"}, "priors too"
    assert table.loc[table["dataset"] == "mine", "finding"].to_dict() == {
        f"{host.address}/right/m": "as declared",
        f"{host.address}/grown/m": "another size",
        "http://127.0.0.1:9/g": "unreachable: Connection refused",
    }
    assert f"{len(table)} files × mirrors: " in outcome.text
    again = run_snakemake(tmp_path, "download_check", "--dry-run", config=config, repository=repository)
    assert again.jobs == {"download_check": 1}, "what hosts said before is no answer for today"


# --- the package index ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reachable_index() -> None:
    """Skip where pip reaches no package index."""
    if not ask_index("renge==0.0.5")["finding"].startswith("listed"):
        pytest.skip("pip reaches no package index from here")


@pytest.mark.usefixtures("reachable_index")
@pytest.mark.slow
def test_a_package_is_fetched_and_named_as_planned(manifest: Path) -> None:
    files = Plan(merged({})).files("renge2023")
    download(manifest, "renge2023", files)
    assert visible(manifest) == ["manifest.json", files["file"]["name"]]
    assert entry(manifest)["source"] == "renge==0.0.5"


@pytest.mark.usefixtures("reachable_index")
def test_a_wrong_checksum_of_a_package_is_explained(manifest: Path) -> None:
    with pytest.raises(InputError) as raised:
        fetch(manifest, {"name": "renge-0.0.5.tar.gz", "pypi": "renge==0.0.5", "sha256": "0" * 64})
    message = str(raised.value)
    assert "renge==0.0.5" in message
    assert "wrong checksum" in message
    assert "0" * 64 in message
    assert "reachable" not in message, "the index was reached: the hint would mislead"
    assert visible(manifest) == []
