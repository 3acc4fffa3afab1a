"""The lineage: what a result is made of, and nothing else, decides whether it is stale."""

import gzip
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import CLOSED_FORMS, closed_forms_config, copy_repository, merged

from perturbflow import lineage
from perturbflow.lineage import code_digest, digest, file_fingerprint, source_files
from perturbflow.registry import families, plan
from perturbflow.registry.plan import Plan

DATA_STEPS = {"harmonize", "split", "pair", "embeddings", "audit"}
MODEL_STEPS = {"train", "predict", "evaluate"}
LAST = {"benchmark", "report"}


# --- code -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def code(tmp_path: Path) -> Callable[[str], str]:
    """Return a function that gives the digest of a source text."""

    def of(text: str) -> str:
        path = tmp_path / f"module_{len(list(tmp_path.iterdir()))}" / "step.py"
        path.parent.mkdir()
        path.write_text(text)
        return code_digest(path)

    return of


SOURCE = '"""What it does."""\n\n\ndef double(x: int) -> int:\n    """Return twice x."""\n    return 2 * x\n'


@pytest.mark.parametrize(
    "edited",
    [
        SOURCE.replace("What it does", "What it really does"),
        SOURCE.replace("Return twice x", "Return 2x"),
        SOURCE.replace("    return", "    # twice\n\n    return"),
        SOURCE.replace("return 2 * x", "return (2 *  x)"),
        SOURCE.replace('    """Return twice x."""\n', ""),
    ],
    ids=["module docstring", "docstring", "comment", "layout", "docstring removed"],
)
def test_comments_docstrings_and_layout_are_no_code(edited: str, code: Callable[[str], str]) -> None:
    assert edited != SOURCE
    assert code(edited) == code(SOURCE)


@pytest.mark.parametrize(
    "edited",
    [
        SOURCE.replace("2 * x", "3 * x"),
        SOURCE.replace("double", "twice"),
        SOURCE.replace("x: int", "x: int = 1"),
        SOURCE + "\nX = 'text'\n",
    ],
    ids=["value", "name", "default", "string"],
)
def test_an_edit_of_code_changes_the_digest(edited: str, code: Callable[[str], str]) -> None:
    assert code(edited) != code(SOURCE)


def test_only_what_is_imported_counts() -> None:
    package = lineage.PACKAGE
    names = {path.relative_to(package).as_posix() for path in source_files(package / "splits.py")}
    assert names == {"splits.py", "errors.py", "files.py", "symbols.py"}


def test_imports_of_imports_count_too() -> None:
    names = {path.name for path in source_files(lineage.SCRIPTS / "evaluate.py")}
    assert {"evaluate.py", "inputs.py", "pseudobulk.py", "pairs.py", "splits.py", "symbols.py"} <= names
    assert not names & {"download.py", "baselines.py", "families.py", "training.py"}


def test_scores_and_report_depend_on_the_families_and_not_on_the_plan() -> None:
    files = source_files(*(lineage.SCRIPTS / f"{step}.py" for step in LAST))
    assert {path.name for path in files if path.parent.name == "registry"} == {"families.py"}


def test_no_training_of_a_closed_form_depends_on_a_learned_model() -> None:
    names = {path.name for path in source_files(lineage.SCRIPTS / "train.py", lineage.PACKAGE / "models" / "baselines.py")}
    assert "baselines.py" in names
    assert not names & {"diffusion.py", "jepa.py", "counterfactual.py", "ceilings.py", "pseudobulk.py"}


def test_a_digest_depends_on_values_and_not_on_the_order_of_keys() -> None:
    assert digest({"a": 1, "b": [2]}) == digest({"b": [2], "a": 1})
    assert digest({"a": 1}) != digest({"a": 2})
    assert digest("a", "b") != digest("ab")
    assert digest([1, 2]) != digest([2, 1])


# --- files ----------------------------------------------------------------------------------------------------------


def test_a_touched_file_keeps_its_fingerprint_and_a_changed_one_does_not(tmp_path: Path) -> None:
    path = tmp_path / "screen.h5ad"
    path.write_bytes(b"counts")
    before = file_fingerprint(path)
    os.utime(path, (1, 1))
    assert file_fingerprint(path) == before
    path.write_bytes(b"Counts")
    assert file_fingerprint(path) != before


def test_a_large_file_is_sampled_over_its_whole_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lineage, "WHOLE_FILE_BYTES", 1000)
    monkeypatch.setattr(lineage, "SAMPLED_BLOCKS", 5)
    monkeypatch.setattr(lineage, "BLOCK_BYTES", 10)
    path = tmp_path / "large.h5ad"
    content = bytearray(10_000)
    path.write_bytes(content)
    before = file_fingerprint(path)
    for position in (0, 9_999, 5_000):
        changed = content.copy()
        changed[position] = 1
        path.write_bytes(changed)
        assert file_fingerprint(path) != before, position
    path.write_bytes(content + b"\0")
    assert file_fingerprint(path) != before


# --- the plan -------------------------------------------------------------------------------------------------------


def forget_code() -> None:
    """Empty the caches of a process that expects code to stay as it is."""
    for function in (lineage._parsed, lineage._imports, lineage._content, code_digest):
        function.cache_clear()


class Workplace:
    """A copy of the repository, a user's folder, and the lineages of all planned results."""

    def __init__(self, folder: Path, repository: Path) -> None:
        self.folder, self.repository = folder, repository
        self.config = closed_forms_config()
        self.edited: dict[Path, bytes] = {}
        (folder / "screen.h5ad").write_bytes(b"content")

    def lineages(self) -> dict[str, str]:
        """Return the lineage of every planned result, with the code as it lies in the copy."""
        plan = Plan(merged(self.config, self.repository / "config"))
        named = {}
        for run in plan.runs.itertuples():
            key = (run.dataset, run.split, run.model, str(run.seed))
            for step, depth in {
                "harmonize": 1,
                "split": 2,
                "pair": 2,
                "embeddings": 2,
                "audit": 2,
                "train": 4,
                "predict": 4,
                "evaluate": 4,
            }.items():
                named[" ".join([step, *key[:depth]])] = plan.lineage(step, *key[:depth])
        return named | {step: plan.lineage(step) for step in LAST}

    def changed_by(self, change: Callable[[], object]) -> set[str]:
        """Return the results that a change makes stale."""
        before = self.lineages()
        change()
        after = self.lineages()
        assert before.keys() == after.keys()
        return {name for name in before if before[name] != after[name]}

    def edit(self, name: str, before: str, after: str) -> None:
        """Replace text in a module of the package."""
        text = (self.repository / "scripts" / "perturbflow" / name).read_text()
        assert before in text
        self.write(name, text.replace(before, after, 1).encode())

    def write(self, name: str, content: bytes) -> None:
        """Write a file of the package."""
        path = self.repository / "scripts" / "perturbflow" / name
        self.edited.setdefault(path, path.read_bytes())
        path.write_bytes(content)
        forget_code()


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of the repository, parsed once; every test leaves it as it was."""
    return copy_repository(tmp_path_factory.mktemp("copy") / "repository")


@pytest.fixture
def workplace(tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Workplace]:
    """Yield a copy of the repository, whose code is what the lineage reads, and a user's folder."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    for module in (lineage, plan):
        monkeypatch.setattr(module, "SCRIPTS", repository / "scripts")
    for module in (lineage, families):
        monkeypatch.setattr(module, "PACKAGE", repository / "scripts" / "perturbflow")
    workplace = Workplace(folder, repository)
    yield workplace
    for path, content in workplace.edited.items():
        path.write_bytes(content)
        forget_code()


def steps(names: set[str]) -> set[str]:
    """Return the steps of these results."""
    return {name.split()[0] for name in names}


def test_a_comment_makes_nothing_stale(workplace: Workplace) -> None:
    assert workplace.changed_by(lambda: workplace.edit("pairs.py", "logger = ", "# a remark\nlogger = ")) == set()


def test_an_edit_of_the_metrics_repeats_scores_and_no_training(workplace: Workplace) -> None:
    changed = workplace.changed_by(lambda: workplace.edit("evaluation/inputs.py", "N_COMPONENTS = 50", "N_COMPONENTS = 49"))
    assert steps(changed) == {"evaluate", "benchmark", "report"}
    assert len(changed) == len(CLOSED_FORMS) + 2


def test_an_edit_of_the_bootstrap_repeats_the_table_alone(workplace: Workplace) -> None:
    changed = workplace.changed_by(lambda: workplace.edit("bootstrap.py", "N_RESAMPLES = 5_000", "N_RESAMPLES = 4_999"))
    assert changed == LAST


def test_an_edit_of_the_pairing_repeats_all_that_comes_after(workplace: Workplace) -> None:
    changed = workplace.changed_by(lambda: workplace.edit("pairs.py", "CONTROLS_PER_CELL = 8", "CONTROLS_PER_CELL = 9"))
    assert steps(changed) == {"pair", "embeddings", "audit"} | MODEL_STEPS | LAST


def test_an_edit_of_one_familys_module_repeats_that_modules_models(workplace: Workplace) -> None:
    changed = workplace.changed_by(lambda: workplace.edit("models/ceilings.py", '== "a"', '== "b"'))
    assert changed == {f"{step} mine unseen_combination technical_duplicate 0" for step in MODEL_STEPS} | LAST


def test_an_edit_of_the_table_of_symbols_repeats_everything(workplace: Workplace) -> None:
    text = gzip.decompress((workplace.repository / "scripts" / "perturbflow" / "hgnc.tsv.gz").read_bytes())
    assert b"\nAARS1\t" in text
    changed = workplace.changed_by(lambda: workplace.write("hgnc.tsv.gz", gzip.compress(text.replace(b"\nAARS1\t", b"\nAARS9\t"))))
    assert steps(changed) == DATA_STEPS | MODEL_STEPS | LAST


def test_params_of_one_model_concern_that_model_alone(workplace: Workplace) -> None:
    changed = workplace.changed_by(lambda: workplace.config.update(models={"linear": {"params": {"ridge": 0.5}}}))
    assert changed == {f"{step} mine unseen_combination linear 0" for step in MODEL_STEPS} | LAST


def test_another_model_adds_its_own_results_only(workplace: Workplace) -> None:
    before = workplace.lineages()
    workplace.config["models"] = {"stiff": {"family": "linear", "params": {"ridge": 9.0}}}
    workplace.config["select"]["models"] = [*CLOSED_FORMS, "stiff"]
    after = workplace.lineages()
    assert set(after) - set(before) == {f"{step} mine unseen_combination stiff 0" for step in MODEL_STEPS}
    assert {name for name in before if before[name] != after[name]} == LAST


def test_touching_the_screen_changes_nothing_and_its_content_everything(workplace: Workplace) -> None:
    screen = workplace.folder / "screen.h5ad"
    assert workplace.changed_by(lambda: os.utime(screen, (1, 1))) == set()
    changed = workplace.changed_by(lambda: screen.write_bytes(b"other counts"))
    assert changed == set(workplace.lineages())


@pytest.mark.parametrize("key", ["reference", "licence", "combinations"])
def test_what_harmonization_does_not_read_makes_nothing_stale(key: str, workplace: Workplace) -> None:
    value = True if key == "combinations" else "another"
    assert workplace.changed_by(lambda: workplace.config["datasets"]["mine"].update({key: value})) == set()


def test_qc_that_says_the_same_makes_nothing_stale_and_another_limit_everything(workplace: Workplace) -> None:
    def same() -> None:
        workplace.config["qc"] = workplace.config["datasets"]["mine"].pop("qc")

    assert workplace.changed_by(same) == set()
    changed = workplace.changed_by(lambda: workplace.config["qc"].update(min_counts=1))
    assert changed == set(workplace.lineages())


def test_the_content_of_a_split_file_counts(workplace: Workplace) -> None:
    roles = workplace.folder / "roles.json"
    roles.write_text('{"train": ["A"], "test": ["B"]}')
    workplace.config["splits"] = {"frozen": {"kind": "file", "path": "roles.json"}}
    workplace.config["select"]["splits"] = ["frozen", "unseen_combination"]
    assert workplace.changed_by(lambda: os.utime(roles, (1, 1))) == set()
    changed = workplace.changed_by(lambda: roles.write_text('{"train": ["B"], "test": ["A"]}'))
    assert changed == {name for name in workplace.lineages() if " frozen" in name} | LAST


def test_predicting_fewer_cells_repeats_no_training(workplace: Workplace) -> None:
    changed = workplace.changed_by(lambda: workplace.config.update(predict={"max_cells": 10}))
    assert steps(changed) == {"predict", "evaluate"} | LAST
