"""Downloads: a file and its manifest appear when they are right, and nothing does otherwise."""

import hashlib
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from perturbflow import download as module
from perturbflow.download import download
from perturbflow.errors import InputError
from perturbflow.origins import file_name

CONTENT = bytes(range(256)) * 40
MD5, SHA256 = hashlib.md5(CONTENT).hexdigest(), hashlib.sha256(CONTENT).hexdigest()
PAGE = b"<!DOCTYPE html><html><body>Please log in.</body></html>"


class Mirror(BaseHTTPRequestHandler):
    """Serves one file rightly and wrongly, by path."""

    asked: dict[str, int]  # set per server

    def do_GET(self) -> None:
        self.asked[self.path] = self.asked.get(self.path, 0) + 1
        folder = self.path.split("/")[1]
        status, body, declared = 200, CONTENT, None
        if folder == "cut":  # the connection ends before the declared length
            body, declared = CONTENT[:1000], len(CONTENT)
        elif folder == "short":  # a whole response of a truncated file
            body = CONTENT[:1000]
        elif folder == "changed":
            body = CONTENT[:-1] + b"x"
        elif folder == "page":
            body = PAGE
        elif folder == "gone":
            status, body = 404, b"no such file"
        elif folder == "busy" and self.asked[self.path] == 1:
            status, body = 503, b"later"
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) if declared is None else declared))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing on the terminal."""


@pytest.fixture
def server() -> Iterator[tuple[str, dict[str, int]]]:
    """Yield the address of a mirror on this machine, and how often each path was asked for."""
    asked: dict[str, int] = {}
    handler = type("Handler", (Mirror,), {"asked": asked})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_port}", asked
        httpd.shutdown()
        thread.join(timeout=5)


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    """Return where the manifest goes."""
    return tmp_path / "resources" / "mine" / "raw" / "manifest.json"


def fetch(manifest: Path, *urls: str, size: int | None = len(CONTENT), md5: str | None = None, sha256: str | None = SHA256) -> None:
    """Download from mirrors what is declared."""
    declared = {"name": file_name(urls[0]), "url": list(urls), "bytes": size, "md5": md5, "sha256": sha256}
    download(manifest, {"file": {key: value for key, value in declared.items() if value is not None}})


def files_beside(manifest: Path) -> list[str]:
    """Return all that lies in the manifest's folder, hidden files included."""
    return sorted(path.name for path in manifest.parent.rglob("*"))


@pytest.mark.parametrize("sums", [{"sha256": SHA256}, {"md5": MD5, "sha256": None}, {"md5": MD5, "sha256": SHA256}])
def test_the_right_file_arrives_with_its_manifest(sums: dict, server: tuple, manifest: Path) -> None:
    address, asked = server
    fetch(manifest, f"{address}/right/screen.h5ad", **sums)
    assert files_beside(manifest) == ["manifest.json", "screen.h5ad"]
    assert (manifest.parent / "screen.h5ad").read_bytes() == CONTENT
    content = json.loads(manifest.read_text())["files"]["file"]
    assert content["file"] == "screen.h5ad"
    assert content["bytes"] == len(CONTENT)
    assert content["sha256"] == SHA256
    assert content["source"] == f"{address}/right/screen.h5ad"
    assert "retrieved" in content
    assert asked == {"/right/screen.h5ad": 1}


def test_a_query_and_escapes_are_no_part_of_the_file_name(server: tuple, manifest: Path) -> None:
    fetch(manifest, f"{server[0]}/right/my%20screen.h5ad?download=1")
    assert files_beside(manifest) == ["manifest.json", "my screen.h5ad"]


@pytest.mark.parametrize(
    ("folder", "expected"),
    [
        ("short", ["1,000 bytes arrived", f"{len(CONTENT):,} are declared", "truncated"]),
        ("changed", ["wrong checksum", SHA256, hashlib.sha256(CONTENT[:-1] + b"x").hexdigest(), "update the dataset's block"]),
        ("page", [f"{len(PAGE)} bytes arrived", f"{len(CONTENT):,} are declared"]),
        ("gone", ["404"]),
        ("cut", ["/cut/screen.h5ad"]),
    ],
)
def test_a_wrong_file_leaves_nothing_and_is_explained(folder: str, expected: list[str], server: tuple, manifest: Path) -> None:
    url = f"{server[0]}/{folder}/screen.h5ad"
    with pytest.raises(InputError) as raised:
        fetch(manifest, url)
    message = str(raised.value)
    assert [part for part in [url, *expected] if part not in message] == []
    assert files_beside(manifest) == []


def test_a_page_of_the_declared_size_is_told_by_its_checksum(server: tuple, manifest: Path) -> None:
    with pytest.raises(InputError, match=r"wrong checksum, md5 is .* is declared"):
        fetch(manifest, f"{server[0]}/page/screen.h5ad", size=len(PAGE), md5=MD5, sha256=None)
    assert files_beside(manifest) == []


def test_an_unreachable_server_is_named(manifest: Path) -> None:
    with pytest.raises(InputError, match=r"http://127\.0\.0\.1:9/screen\.h5ad"):
        fetch(manifest, "http://127.0.0.1:9/screen.h5ad")
    assert files_beside(manifest) == []


def test_a_busy_server_is_asked_again(server: tuple, manifest: Path) -> None:
    address, asked = server
    fetch(manifest, f"{address}/busy/screen.h5ad")
    assert files_beside(manifest) == ["manifest.json", "screen.h5ad"]
    assert asked == {"/busy/screen.h5ad": 2}


def test_a_server_that_stays_away_is_asked_a_few_times_only(server: tuple, manifest: Path) -> None:
    address, asked = server
    with pytest.raises(InputError):
        fetch(manifest, f"{address}/gone/screen.h5ad")
    assert asked == {"/gone/screen.h5ad": module.ATTEMPTS_PER_MIRROR}


@pytest.mark.parametrize("first", ["gone", "changed", "cut", "short"])
def test_the_second_mirror_serves_where_the_first_fails(first: str, server: tuple, manifest: Path) -> None:
    address, asked = server
    fetch(manifest, f"{address}/{first}/screen.h5ad", f"{address}/right/screen.h5ad")
    assert files_beside(manifest) == ["manifest.json", "screen.h5ad"]
    assert (manifest.parent / "screen.h5ad").read_bytes() == CONTENT
    assert json.loads(manifest.read_text())["files"]["file"]["source"] == f"{address}/right/screen.h5ad"
    assert asked["/right/screen.h5ad"] == 1


def test_wrong_bytes_are_not_asked_for_again(server: tuple, manifest: Path) -> None:
    address, asked = server
    with pytest.raises(InputError):
        fetch(manifest, f"{address}/changed/screen.h5ad")
    assert asked == {"/changed/screen.h5ad": 1}


def test_every_mirror_is_in_the_message(server: tuple, manifest: Path) -> None:
    urls = [f"{server[0]}/{folder}/screen.h5ad" for folder in ("gone", "changed", "page")]
    with pytest.raises(InputError) as raised:
        fetch(manifest, *urls)
    assert [url for url in urls if url not in str(raised.value)] == []


def test_a_failed_download_leaves_the_files_of_an_earlier_one(server: tuple, manifest: Path) -> None:
    fetch(manifest, f"{server[0]}/right/screen.h5ad")
    before = manifest.read_text()
    with pytest.raises(InputError):
        fetch(manifest, f"{server[0]}/changed/screen.h5ad")
    assert manifest.read_text() == before
    assert (manifest.parent / "screen.h5ad").read_bytes() == CONTENT


# --- the package index ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reachable_index(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Skip where pip reaches no package index."""
    target = tmp_path_factory.mktemp("index")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(target), "--timeout", "10", "--retries", "0"]
    done = subprocess.run([*command, "--no-binary", "renge", "renge==0.0.5"], capture_output=True, text=True, check=False, timeout=120)
    if done.returncode:
        pytest.skip("pip reaches no package index from here")


@pytest.mark.usefixtures("reachable_index")
def test_a_wrong_checksum_of_a_package_is_explained(manifest: Path) -> None:
    with pytest.raises(InputError) as raised:
        download(manifest, {"file": {"name": "renge-0.0.5.tar.gz", "pypi": "renge==0.0.5", "sha256": "0" * 64}})
    message = str(raised.value)
    assert "renge==0.0.5" in message
    assert "wrong checksum" in message
    assert "0" * 64 in message
    assert "reachable" not in message, "the index was reached: the hint would mislead"
    assert files_beside(manifest) == []
