"""Any input is a screen, a label, a plan, or one message; nothing in it is executed, and it leads nowhere."""

import contextlib
import datetime
import os
import tarfile
import tempfile
import warnings
import zipfile
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import yaml
from conftest import OFF, closed_forms_config, dataset_block, make_screen, merged, run_snakemake
from faults import (
    assert_one_message,
    screen_bytes,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from snakemake.common.configfile import load_configfile

from perturbflow.errors import InputError
from perturbflow.genes.symbols import CONTROL, members_of
from perturbflow.registry.plan import Plan
from perturbflow.screens import harmonize
from perturbflow.screens.annotation import canonical_labels
from perturbflow.screens.readers import open_source

# --- what a user hands over is not executed and leads nowhere -------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ('!!python/object/apply:os.system ["touch executed"]', "not valid JSON or YAML"),
        ("!!python/object/new:os.system [touch executed]", "not valid JSON or YAML"),
        ("!!python/name:os.system", "holds more than plain YAML"),
        ("!!python/tuple [1, 2]", "holds more than plain YAML"),
    ],
)
def test_a_configuration_is_no_program(value: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(f"select: {value}\n")
    outcome = run_snakemake(tmp_path, "--dry-run", "--configfile", "mine.yaml")
    assert_one_message(outcome, message)
    assert not (tmp_path / "executed").exists()


def archive_with(path: Path, names: dict[str, bytes | str]) -> Path:
    """Write an archive; a member whose content is text is a link there, in a tar."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as file:
            for name, content in names.items():
                file.writestr(name, content)
    else:
        with tarfile.open(path, "w") as file:
            for name, content in names.items():
                info = tarfile.TarInfo(name)
                if isinstance(content, str):
                    info.type, info.linkname = tarfile.SYMTYPE, content
                    file.addfile(info)
                else:
                    (path.parent / "content").write_bytes(content)
                    info.size = len(content)
                    with (path.parent / "content").open("rb") as opened:
                        file.addfile(info, opened)
                    (path.parent / "content").unlink()
    return path


@pytest.mark.parametrize("suffix", [".zip", ".tar"])
def test_no_member_of_an_archive_lands_outside(suffix: str, tmp_path: Path) -> None:
    here = tmp_path / "a" / "b"
    here.mkdir(parents=True)
    names = {"../../escaped": b"x", f"{tmp_path}/absolute": b"x", "inner/screen.h5ad": screen_bytes()}
    archive = archive_with(here / f"screens{suffix}", names)
    before = sorted(tmp_path.rglob("*"))
    source = open_source(
        {"file": archive}, dataset_block(source={"url": ["https://example.org"], "member": "inner/screen.h5ad"})
    )
    assert len(source.obs) == 640
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("target", ["/etc/passwd", "../secret.h5ad", "nowhere"])
def test_a_link_in_an_archive_is_not_followed(target: str, tmp_path: Path) -> None:
    (tmp_path / "secret.h5ad").write_bytes(screen_bytes())
    (tmp_path / "in").mkdir()
    archive = archive_with(tmp_path / "in" / "screens.tar", {"screen.h5ad": target, "other.h5ad": b"x"})
    with pytest.raises(InputError, match=r"source\.member is 'screen\.h5ad', and the archive holds other\.h5ad"):
        open_source({"file": archive}, dataset_block(source={"url": ["https://example.org"], "member": "screen.h5ad"}))


@pytest.mark.parametrize("suffix", [".zip", ".tar.gz", ".tar"])
@pytest.mark.parametrize("share", [0.3, 0.9, 0.99])
def test_a_truncated_archive_is_told(suffix: str, share: float, tmp_path: Path) -> None:
    (tmp_path / "screen.h5ad").write_bytes(screen_bytes())
    archive = tmp_path / f"screens{suffix}"
    if suffix == ".zip":
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
            file.write(tmp_path / "screen.h5ad", "screen.h5ad")
    else:
        with tarfile.open(archive, "w:gz" if "gz" in suffix else "w") as file:
            file.add(tmp_path / "screen.h5ad", "screen.h5ad")
    archive.write_bytes(archive.read_bytes()[: int(share * archive.stat().st_size)])
    block = dataset_block(source={"url": ["https://example.org"], "member": "screen.h5ad"})
    with contextlib.suppress(InputError):  # of a tar the end may be padding
        open_source({"file": archive}, block)
        assert suffix == ".tar"
        assert share == 0.99


# --- any input ------------------------------------------------------------------------------------------------------

# FUZZ=20 tries twenty times as much, for a night.
fuzz = settings(
    deadline=None,
    derandomize=True,
    max_examples=40 * int(os.environ.get("FUZZ", "1")),
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)


def tiny() -> ad.AnnData:
    """Return a very small screen with columns of several kinds."""
    screen = make_screen(n_genes=30, n_controls=6, n_cells=4)
    del screen.uns["effects"]
    screen.obs["lane"] = screen.obs["lane"].astype("category")
    screen.obs = screen.obs.assign(n=range(len(screen)), share=0.5)
    screen.var["gene_id"] = [f"ENSG{i:011d}" for i in range(screen.n_vars)]
    return screen


@pytest.fixture(scope="module")
def forms(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    """Return the bytes of a screen stored in several ways."""
    path, screen, stored = tmp_path_factory.mktemp("forms") / "screen.h5ad", tiny(), []
    for X in (screen.X.copy(), screen.X.toarray(), screen.X.tocsc()):
        for compression in (None, "gzip"):
            screen.X = X
            screen.write_h5ad(path, compression=compression)
            stored.append(path.read_bytes())
    return stored


def fresh(folder: Path) -> Path:
    """Return the path of a screen that was never there: an earlier one may still be open."""
    return Path(tempfile.mkdtemp(dir=folder)) / "screen.h5ad"


def harmonized(path: Path, qc: dict = OFF, **changes: object) -> bool:
    """Return whether a screen could be harmonized; anything but InputError is a fault."""
    target = path.with_name("harmonized.h5ad")
    target.unlink(missing_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            harmonize.harmonize(path, target, path.with_name("account.json"), "mine", dataset_block(**changes), qc)
        except InputError as error:
            assert str(path) in str(error), "the message names the file"
            assert not target.exists()
            return False
    ad.read_h5ad(target)
    return True


edits = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.sampled_from([1, 2**4, 2**7, 255])), max_size=12)


@pytest.mark.slow
@fuzz
@given(form=st.integers(0, 5), edits=edits, is_head=st.booleans(), share=st.just(1.0) | st.floats(0, 1))
def test_any_bytes_are_a_screen_or_one_message(
    form: int, edits: list, is_head: bool, share: float, forms: list[bytes], tmp_path: Path
) -> None:
    content = bytearray(forms[form][: int(share * len(forms[form]))])
    for place, flip in edits if content else ():
        # What leads to everything else stands at the beginning.
        content[int(place * (min(len(content), 6000) if is_head else len(content)))] ^= flip
    path = fresh(tmp_path)
    path.write_bytes(content)
    harmonized(path)


@fuzz
@given(form=st.integers(0, 5), share=st.floats(0, 0.999))
def test_a_truncated_screen_is_one_message(form: int, share: float, forms: list[bytes], tmp_path: Path) -> None:
    path = fresh(tmp_path)
    path.write_bytes(forms[form][: int(share * len(forms[form]))])
    assert not harmonized(path)


OTHER_THINGS = [
    3, "text", np.zeros(0), np.arange(5), np.full(5, np.nan), np.array([b"a", b"b"]), np.zeros((3, 3)),
    np.array([1 + 2j]), np.array([True]),
    np.array([b"\xff\xfe"] * 116), np.arange(116), np.full(116, np.nan), np.zeros((124, 30)) - 1,
    np.zeros((124, 30), "S3"),
    np.array([10**12, 5]), "csc_matrix", "array", "dataframe", "categorical",
]  # fmt: skip
OTHER_VALUES = [np.nan, -1, np.inf, 1e30, 0.5, 0, 100, 2**31 - 1]


def altered(file: h5py.File, place: int, act: str, other: object, value: float) -> None:
    """Do something to one of the objects in a file that leaves it an HDF5 file."""
    names: list[str] = []
    file.visit(names.append)
    name = names[place % len(names)]
    attributes = list(file[name].attrs)
    if act in ("remove", "replace", "empty"):
        del file[name]
        if act == "replace":
            file[name] = other
        elif act == "empty":
            file.create_group(name)
    elif act == "attribute" and attributes:
        file[name].attrs[attributes[place % len(attributes)]] = other
    elif act == "no attribute" and attributes:
        del file[name].attrs[attributes[place % len(attributes)]]
    elif act == "value" and isinstance(file[name], h5py.Dataset) and file[name].dtype.kind in "iuf" and file[name].size:
        values = file[name][()]
        np.atleast_1d(values).reshape(-1)[place % values.size] = np.array(value).astype(values.dtype)
        file[name][...] = values


acts = st.sampled_from(["remove", "replace", "replace", "empty", "attribute", "no attribute", "value", "value"])
alterations = st.tuples(st.integers(0, 10**6), acts, st.sampled_from(OTHER_THINGS), st.sampled_from(OTHER_VALUES))


@pytest.mark.slow
@fuzz
@given(form=st.integers(0, 5), alterations=st.lists(alterations, min_size=1, max_size=3))
def test_any_hdf5_file_is_a_screen_or_one_message(
    form: int, alterations: list, forms: list[bytes], tmp_path: Path
) -> None:
    path = fresh(tmp_path)
    path.write_bytes(forms[form])
    with h5py.File(path, "r+") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of casts
        for alteration in alterations:
            altered(file, *alteration)
    harmonized(path)


words = st.sampled_from(
    [
        "control",
        "TF1",
        "TF2",
        "TF1+TF2",
        "nan",
        "",
        "*",
        " ",
        "+",
        "control+TF1",
        "Ω",
        "a/b",
        "1-Mar",
        "-",
        "TF1@3",
        None,
    ]
)
numbers = st.sampled_from([0, 1, -5, 0.5, np.nan, np.inf, 2**53, True])
columns = st.one_of(
    st.lists(words, min_size=1, max_size=8),
    st.lists(numbers, min_size=1, max_size=8),
    st.lists(words.filter(lambda word: word is not None), min_size=1, max_size=8).map(pd.Categorical),
    st.lists(st.sampled_from([1, None]), min_size=1, max_size=8).map(lambda values: pd.array(values, "Int64")),
    st.lists(st.sampled_from([True, None]), min_size=1, max_size=8).map(lambda values: pd.array(values, "boolean")),
    st.lists(st.sampled_from([b"a", b"\xff"]), min_size=1, max_size=8),
)
NAMES = [
    "perturbation",
    "perturbation",
    "lane",
    "total_counts",
    "is_control",
    "batch",
    "_index",
    "a b",
    "Ω",
    "",
    "dataset",
    "source_batch",
]
BLOCKS = [
    {}, {}, {}, {"covariates": {"batch": ["lane", "n"]}},
    {"covariates": {"batch": "share", "cell_type": "perturbation"}},
    {"subset": {"n": [1, 2, 3]}}, {"subset": {"share": [0.5]}}, {"perturbation": {"dose": "share"}},
    {"perturbation": {"dose": "lane"}},
    {"perturbation": {"separator": None}}, {"perturbation": {"pattern": "(.)"}}, {"covariates": {"dataset": "lane"}},
    {"exclude": {"lane": "b"}}, {"gene_pattern": "T"}, {"perturbation_type": "drug"}, {"organism": "mouse"},
    {"shape": [3, 3]},
]  # fmt: skip
LIMITS = {**OFF, "min_cells_per_gene": 1, "min_counts": 1, "max_pct_mt": 50, "min_cells_per_perturbation": 2}


@pytest.mark.slow
@fuzz
@given(
    of_cells=st.dictionaries(st.sampled_from(NAMES), columns, max_size=2),
    of_genes=st.dictionaries(st.sampled_from(["gene_id", "gene_name", "symbol", "original_name"]), columns, max_size=1),
    genes=st.none()
    | st.lists(st.sampled_from(["a", "b", "", "nan", "TF1", "MT-X", "ENSG00000000001"]), min_size=1, max_size=30),
    shape=st.sampled_from([(124, 30)] * 4 + [(0, 30), (1, 30), (124, 0), (124, 1)]),
    block=st.sampled_from(BLOCKS),
    qc=st.sampled_from([OFF, LIMITS]),
)
def test_any_table_of_cells_and_genes_is_a_screen_or_one_message(
    of_cells: dict, of_genes: dict, genes: list | None, shape: tuple, block: dict, qc: dict, tmp_path: Path
) -> None:
    screen = tiny()[: shape[0], : shape[1]].copy()
    for table, chosen in ((screen.obs, of_cells), (screen.var, of_genes)):
        for name, values in chosen.items():
            table[name] = pd.Series(values).take(np.arange(len(table)) % len(values)).array
    if genes is not None:
        screen.var_names = [genes[i % len(genes)] for i in range(screen.n_vars)]
    path = fresh(tmp_path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            screen.write_h5ad(path)
    except (ValueError, TypeError):
        return  # nothing that anndata would save
    harmonized(path, qc, **block)


@fuzz
@given(
    labels=st.lists(st.text(max_size=12) | words.filter(bool), min_size=1, max_size=5),
    separator=st.sampled_from(["+", "_", ";", None]),
    organism=st.sampled_from(["human", "mouse"]),
)
def test_any_label_is_made_canonical_for_good_or_one_message(
    labels: list[str], separator: str | None, organism: str
) -> None:
    genes = pd.DataFrame({"original_name": ["TF1", "TF2"], "gene_name": ["TF1", "TF2"]})

    def canonical(labels: list[str], separator: str | None) -> list[str | None]:
        block = dataset_block(perturbation={"separator": separator}, organism=organism, perturbation_type="CRISPRi")
        found = canonical_labels(
            pd.DataFrame({"perturbation": ["control", *labels]}), block, genes, Path("screen.h5ad")
        )
        return [None if pd.isna(label) else label for label in found]

    try:
        once = canonical(labels, separator)
    except InputError as error:
        assert "screen.h5ad: the label" in str(error)
        return
    for label in filter(None, once):
        assert label == CONTROL or sorted(set(members_of(label))) == members_of(label)
        assert label == label.strip()
    assert canonical([label for label in once if label], "+")[1:] == [label for label in once if label]


JUNK = [
    None, 0, -1, 1.5, float("nan"), float("inf"), 10**30, "", "x", "../../etc", [], [None], {}, {"a": 1}, True, "a\0b",
    [[]], {1: 2}, "(",
    ["mine", "mine"], datetime.date(2020, 1, 1), {"file": "x"}, {"path": "/"}, "nan", "mine", ["x"], [{}],
    {"kind": "file"}, "*" * 5000, b"x",
]  # fmt: skip
KEYS = ["a", "kind", "path", "seed", "../x", "params", "latent", 1, "folds", "held_out"]


def places(node: object, path: tuple = ()) -> Iterator[tuple]:
    """Yield the path of every node of a configuration but its root."""
    if path:
        yield path
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, child in children:
        yield from places(child, (*path, key))


@pytest.fixture(scope="module")
def full_config() -> dict:
    """Return a merged configuration with a bit of everything, and few of the registered screens."""
    mine = closed_forms_config(
        splits={"genes": {"kind": "unseen_perturbation", "folds": 3}},
        counterfactuals={
            "q": {"dataset": "mine", "split": "unseen_combination", "model": "additive", "perturbations": ["TF1"]}
        },
        embeddings={"sources": ["coexpression", "go"]},
    )
    mine["select"] = {
        "datasets": ["mine", "renge2023"], "splits": ["unseen_combination", "unseen_context", "genes"],
        "models": ["additive", "jepa", "scppdm", "set_gp"], "seeds": [0], "counterfactuals": ["q"],
    }  # fmt: skip
    config = merged(mine)
    config["datasets"] = {name: config["datasets"][name] for name in ("mine", "renge2023", "norman2019")}
    return config


changes = st.tuples(
    st.integers(0, 10**6),
    st.sampled_from(["replace", "replace", "remove", "add"]),
    st.sampled_from(JUNK),
    st.sampled_from(KEYS),
)


@pytest.mark.slow
@fuzz
@given(top=st.data(), changes=st.lists(changes, min_size=1, max_size=3))
def test_any_configuration_is_a_plan_or_one_message(
    top: st.DataObject, changes: list, full_config: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("screen.h5ad").write_text("a screen")
    config = yaml.safe_load(yaml.safe_dump(full_config))
    for place, act, junk, key in changes:
        section = top.draw(st.sampled_from(sorted(config, key=str)))
        paths = list(places(config[section], (section,)))
        *above, last = paths[place % len(paths)]
        parent = config
        for step in above:
            parent = parent[step]
        if act == "replace":
            parent[last] = deepcopy(junk)
        elif act == "remove":
            del parent[last]
        elif isinstance(parent[last], dict):
            parent[last][key] = deepcopy(junk)
        if not config:
            return
    Path("mine.yaml").write_text(yaml.safe_dump(config))
    try:
        plan = Plan(load_configfile("mine.yaml"), ["mine.yaml"])
    except InputError:
        return
    assert plan.descriptions
    assert all(".." not in Path(folder).parts and not Path(folder).is_absolute() for folder in plan.folders())
