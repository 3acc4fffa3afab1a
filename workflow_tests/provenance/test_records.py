"""What results say of themselves: a record beside each, and what the plan makes of it."""

import json
import os
import time
from pathlib import Path

import pytest

from perturbflow.errors import InputError
from perturbflow.provenance import records
from perturbflow.provenance.records import (
    content_digest,
    digest,
    inputs_as_made,
    is_unchanged,
    read_record,
    settle,
    why_stale,
    write_records,
)

MADE_OF = {"n_hvg": 40, "code_version": "abc", "block": {"a": [1, None]}}


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in a folder where Snakemake has run, with a user's file, a first result, and a second one made from it."""
    monkeypatch.chdir(tmp_path)
    Path(".snakemake").mkdir()
    Path("results").mkdir()
    for name in ("screen.h5ad", "results/first.h5ad", "results/second.tsv"):
        Path(name).write_text(f"content of {name}")
    write_records(["results/first.h5ad"], MADE_OF, inputs_as_made(["screen.h5ad"]))
    write_records(["results/second.tsv"], MADE_OF, inputs_as_made(["results/first.h5ad"]))
    return tmp_path


def first(made_of: dict = MADE_OF, inputs: tuple[str, ...] = ("screen.h5ad",)) -> str | None:
    """Return why the first result is stale."""
    return why_stale(["results/first.h5ad"], made_of, inputs)


def second() -> str | None:
    """Return why the second result is stale."""
    return why_stale(["results/second.tsv"], MADE_OF, ["results/first.h5ad"])


def edit(path: str, content: str, keeps_time: bool = False) -> None:
    """Write other content, as an editor does or as `cp --preserve` would."""
    stamp = Path(path).stat()
    Path(path).write_text(content)
    if keeps_time:
        os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))


# --- content --------------------------------------------------------------------------------------------------------


def test_a_digest_depends_on_values_and_not_on_the_order_of_keys() -> None:
    assert digest({"a": 1, "b": [2]}) == digest({"b": [2], "a": 1})
    assert digest({"a": 1}) != digest({"a": 2})
    assert digest("a", "b") != digest("ab")
    assert digest([1, 2]) != digest([2, 1])


@pytest.mark.parametrize("keeps_time", [False, True])
@pytest.mark.parametrize("after", [0.0, 0.15], ids=["at once", "a moment later"])
def test_an_edit_of_the_same_size_is_noticed(keeps_time: bool, after: float) -> None:
    time.sleep(after)
    before = content_digest("screen.h5ad")
    edit("screen.h5ad", "Content of screen.h5ad", keeps_time)
    assert content_digest("screen.h5ad") != before
    edit("screen.h5ad", "content of screen.h5ad", keeps_time)
    assert content_digest("screen.h5ad") == before


def test_a_file_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    time.sleep(0.15)
    before = content_digest("screen.h5ad")
    monkeypatch.setattr(records, "content_sha256", lambda path: pytest.fail(f"{path} is read again"))
    assert content_digest("screen.h5ad") == before


def test_nothing_is_remembered_where_snakemake_was_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    monkeypatch.chdir(folder)
    Path("file").write_text("x")
    os.utime("file", (1, 1))
    content_digest("file")
    assert sorted(path.name for path in folder.iterdir()) == ["file"]


def test_a_folder_is_the_files_in_it() -> None:
    Path("matrix").mkdir()
    Path("matrix/a").write_text("1")
    before = content_digest("matrix")
    os.utime("matrix/a", (1, 1))
    assert content_digest("matrix") == before
    Path("matrix/a").rename("matrix/b")
    assert content_digest("matrix") != before


# --- records --------------------------------------------------------------------------------------------------------


def test_a_record_says_params_inputs_and_content() -> None:
    record = read_record("results/second.tsv")
    assert record == {
        "made_of": MADE_OF,
        "inputs": {"results/first.h5ad": content_digest("results/first.h5ad")},
        "content": content_digest("results/second.tsv"),
    }


@pytest.mark.parametrize(
    "damage", ["", "{", "[]", '{"made_of": {}}', '{"made_of": 3, "inputs": {}, "content": "x"}', "\0"]
)
def test_a_damaged_record_is_none(damage: str) -> None:
    Path("results/.made/first.h5ad.json").write_text(damage)
    assert read_record("results/first.h5ad") is None
    assert "it has no readable record" in first()


def test_a_job_does_not_read_a_result_that_was_changed() -> None:
    edit("results/first.h5ad", "other content of results")
    with pytest.raises(
        InputError, match=r"results/first\.h5ad was changed after its job wrote it.*Run again, and it is made anew"
    ):
        inputs_as_made(["results/first.h5ad", "screen.h5ad"])


# --- staleness ------------------------------------------------------------------------------------------------------


def test_what_was_made_of_the_same_is_current() -> None:
    assert first() is None
    assert second() is None


def test_what_is_not_there_is_for_snakemake_to_judge() -> None:
    Path("results/first.h5ad").unlink()
    assert first({"other": 1}) is None


def test_what_was_made_from_a_deleted_file_is_stale() -> None:
    Path("results/first.h5ad").unlink()
    assert second() == "results/second.tsv: results/first.h5ad is not there any more"


@pytest.mark.parametrize(
    ("made_of", "named"),
    [
        ({**MADE_OF, "n_hvg": 41}, "n_hvg"),
        ({**MADE_OF, "code_version": "abd"}, "code_version"),
        ({**MADE_OF, "block": {"a": [1, 0]}}, "block"),
        ({**MADE_OF, "new": None}, "new"),
        ({"n_hvg": 40, "code_version": "abc"}, "block"),
    ],
)
def test_other_params_are_named(made_of: dict, named: str) -> None:
    assert first(made_of) == f"results/first.h5ad: other {named} than when it was made"


def test_other_inputs_are_named() -> None:
    assert first(inputs=("screen.h5ad", "more.tsv")) == "results/first.h5ad: it was made from other files (more.tsv)"
    edit("screen.h5ad", "counts of another day")
    assert first() == "results/first.h5ad: screen.h5ad changed since it was made"
    assert second() is None, "its own job says so; what is behind it follows"


def test_a_damaged_result_is_stale_and_what_was_made_from_it_before_is_not() -> None:
    edit("results/first.h5ad", "Content of results/first.h5ad", keeps_time=True)
    assert first() == "results/first.h5ad: it was changed after its job wrote it"
    assert second() is None


def test_a_result_that_was_made_anew_with_other_bytes_makes_what_is_behind_it_stale() -> None:
    edit("results/first.h5ad", "another content")
    write_records(["results/first.h5ad"], MADE_OF, inputs_as_made(["screen.h5ad"]))
    assert first() is None
    assert second() == "results/second.tsv: results/first.h5ad changed since it was made"


def test_a_download_may_be_deleted_to_make_room() -> None:
    manifest = Path("resources/mine/raw/manifest.json")
    manifest.parent.mkdir(parents=True)
    manifest.write_text("{}")
    write_records(["results/first.h5ad"], MADE_OF, inputs_as_made([manifest]))
    manifest.unlink()
    assert first(inputs=(str(manifest),)) is None
    assert first({**MADE_OF, "n_hvg": 3}, inputs=(str(manifest),)) is not None


def test_one_of_several_results_that_is_missing_is_enough() -> None:
    assert why_stale(["results/first.h5ad", "results/third"], MADE_OF, ["screen.h5ad"]) == "results/third is missing"


def test_one_of_several_results_is_enough() -> None:
    Path("results/third").write_text("x")
    assert why_stale(["results/first.h5ad", "results/third"], MADE_OF, ["screen.h5ad"]) is not None


def test_a_copy_is_current_without_what_snakemake_knows(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = place / "copy"
    for path in [path for path in place.rglob("*") if path.is_file() and ".snakemake" not in path.parts]:
        (other / path.relative_to(place)).parent.mkdir(parents=True, exist_ok=True)
        (other / path.relative_to(place)).write_bytes(path.read_bytes())
    monkeypatch.chdir(other)
    assert first() is None
    assert second() is None
    edit("screen.h5ad", "half of the cells")
    assert first() is not None


# --- time stamps ----------------------------------------------------------------------------------------------------


def mtime(path: str) -> int:
    return Path(path).stat().st_mtime_ns


def test_touched_results_are_set_back_along_the_chain() -> None:
    Path("results/third.tsv").write_text("third")
    write_records(["results/third.tsv"], MADE_OF, inputs_as_made(["results/second.tsv"]))
    now = time.time_ns()
    for i, path in enumerate(["results/third.tsv", "results/second.tsv", "results/first.h5ad", "screen.h5ad"]):
        os.utime(path, ns=(now + i * 10**6, now + i * 10**6))
    settle("results")
    assert mtime("results/first.h5ad") == mtime("results/second.tsv") == mtime("results/third.tsv") == now
    assert mtime("screen.h5ad") > now, "the user's own files are left alone"


def test_a_result_that_was_made_anew_stays_newer_than_what_was_made_from_the_old_one() -> None:
    edit("results/first.h5ad", "another content")
    write_records(["results/first.h5ad"], MADE_OF, inputs_as_made(["screen.h5ad"]))
    os.utime("results/second.tsv", (1, 1))
    before = mtime("results/first.h5ad")
    settle("results")
    assert mtime("results/first.h5ad") == before


def test_the_table_of_time_and_memory_is_as_new_as_the_results() -> None:
    Path("benchmark.tsv").write_text("s\n1\n")
    os.utime("benchmark.tsv", (1, 1))
    records.renew("benchmark.tsv", ["results/second.tsv", "results/first.h5ad"])
    assert mtime("benchmark.tsv") == min(mtime("results/second.tsv"), mtime("results/first.h5ad"))
    records.renew("missing.tsv", ["results/second.tsv"])


def test_setting_back_reads_no_file_again(monkeypatch: pytest.MonkeyPatch) -> None:
    time.sleep(0.15)
    before = content_digest("results/first.h5ad")
    os.utime("results/second.tsv", (1, 1))
    settle("results")
    monkeypatch.setattr(records, "content_sha256", lambda path: pytest.fail(f"{path} is read again"))
    assert content_digest("results/first.h5ad") == before


def test_a_file_is_unchanged_if_all_results_were_made_from_what_it_holds() -> None:
    assert is_unchanged("screen.h5ad", ["results/first.h5ad", "results/missing"])
    assert not is_unchanged("screen.h5ad", ["results/missing"])
    assert not is_unchanged("screen.h5ad", ["results/first.h5ad", "results/second.tsv"])
    assert not is_unchanged("missing", ["results/first.h5ad"])
    edit("screen.h5ad", "another content")
    assert not is_unchanged("screen.h5ad", ["results/first.h5ad"])


def test_a_stale_result_from_the_future_is_older_than_the_mark() -> None:
    records.CHANGED.parent.mkdir(parents=True)
    records.CHANGED.touch()
    future = time.time_ns() + 10**12
    os.utime("results/first.h5ad", ns=(future, future))
    before = mtime("results/second.tsv")
    records.outdate(["results/first.h5ad", "results/second.tsv", "results/missing"])
    assert mtime("results/first.h5ad") < mtime(str(records.CHANGED))
    assert mtime("results/second.tsv") == before


def test_a_record_is_plain_json() -> None:
    assert json.loads(Path("results/.made/first.h5ad.json").read_text())["made_of"] == MADE_OF
