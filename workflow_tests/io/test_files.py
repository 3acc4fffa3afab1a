"""Files appear whole or not at all."""

import hashlib
from pathlib import Path

import pytest

from perturbflow.errors import InputError
from perturbflow.io.files import atomic, file_digest, manifest_files, read_json, write_json


def names(folder: Path) -> list[str]:
    """Return all that lies in a folder, hidden files included."""
    return sorted(path.name for path in folder.iterdir())


def test_a_file_takes_its_name_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "pairs.h5ad"
    with atomic(path) as partial:
        partial.write_text("content")
        assert partial.parent == path.parent, "a rename across file systems would be a copy"
        assert partial.suffix == ".h5ad"
        assert not path.exists()
    assert path.read_text() == "content"
    assert names(path.parent) == ["pairs.h5ad"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_write_that_fails_leaves_what_was_there(error: type[BaseException], tmp_path: Path) -> None:
    path = tmp_path / "pairs.h5ad"
    path.write_text("older")
    with pytest.raises(error), atomic(path) as partial:
        partial.write_text("half")
        raise error
    assert path.read_text() == "older"
    assert names(tmp_path) == ["pairs.h5ad"]


def test_equal_json_is_equal_bytes(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"b": 1, "a": ["Δ"]})
    write_json(tmp_path / "b.json", {"a": ["Δ"], "b": 1})
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert read_json(tmp_path / "a.json") == {"a": ["Δ"], "b": 1}


@pytest.mark.parametrize(
    ("content", "message"), [(b"{", "is not valid JSON"), (b"\xff\xfe", "is not valid JSON"), (b"[1]", "found a list")]
)
def test_what_is_no_json_object_is_told(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "roles.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as raised:
        read_json(path)
    assert "roles.json" in str(raised.value)


def test_digests_are_of_the_content(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"content")
    assert file_digest(path) == hashlib.sha256(b"content").hexdigest()
    assert file_digest(path, "md5") == hashlib.md5(b"content").hexdigest()


def test_a_manifest_leads_to_the_files_beside_it(tmp_path: Path) -> None:
    for name, content in (("m.mtx", b"123"), ("b.tsv", b"12")):
        (tmp_path / name).write_bytes(content)
    manifest = tmp_path / "manifest.json"
    write_json(
        manifest, {"files": {"matrix": {"file": "m.mtx", "bytes": 3}, "barcodes": {"file": "b.tsv", "bytes": 2}}}
    )
    assert manifest_files(manifest) == {"matrix": tmp_path / "m.mtx", "barcodes": tmp_path / "b.tsv"}
    content = read_json(manifest)
    content["files"]["matrix"]["sha256"] = file_digest(tmp_path / "m.mtx")
    content["files"]["barcodes"]["sha256"] = file_digest(tmp_path / "b.tsv")
    write_json(manifest, content)
    assert manifest_files(manifest, whole=True) == manifest_files(manifest)
    (tmp_path / "b.tsv").write_bytes(b"21")
    with pytest.raises(InputError, match=r"b\.tsv is missing or not the 2 bytes"):
        manifest_files(manifest, whole=True)
    (tmp_path / "b.tsv").write_bytes(b"1")
    with pytest.raises(InputError, match=r"b\.tsv is missing or not the 2 bytes.*Delete .*manifest\.json"):
        manifest_files(manifest)
    (tmp_path / "b.tsv").unlink()
    with pytest.raises(InputError, match=r"b\.tsv is missing"):
        manifest_files(manifest)
