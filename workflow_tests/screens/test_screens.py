"""Every registered dataset: a file in its schema goes through its block, and each cell and gene is as expected.

The files come through download from a mirror folder; of the block, the shape, sizes and checksums alone are replaced.

Run as a script (PYTHONPATH=scripts python workflow_tests/screens/test_screens.py), it writes
docs/results/screens.tsv anew.
"""

import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import anndata as ad
import numpy as np
import pandas as pd
import pytest

sys.path.extend(str(Path(__file__).resolve().parents[1] / place) for place in (".", "support"))  # pytest does so, too

from conftest import OFF, REPOSITORY, merged
from screens import FIXTURES, Expected, norman_cells
from unions import KINDS, check, prepared_from

from perturbflow.download import download
from perturbflow.errors import InputError
from perturbflow.genes.symbols import CONTROL
from perturbflow.io.files import file_digest
from perturbflow.registry.config import complete
from perturbflow.registry.sources import files_of
from perturbflow.registry.unions import is_union
from perturbflow.screens.harmonize import harmonize
from perturbflow.screens.unite import unite
from perturbflow.splits.split import split

SHOWN = REPOSITORY / "docs" / "results" / "screens.tsv"
DATASETS = REPOSITORY / "docs" / "reference" / "datasets.md"
REGISTERED = complete(merged({}))["datasets"]
REGISTRY = {name: block for name, block in REGISTERED.items() if not is_union(block)}
UNIONS = {name: block for name, block in REGISTERED.items() if is_union(block)}
QC = {**OFF, "min_cells_per_perturbation": 3}
FILES = ("harmonized.h5ad", "harmonization.json")


def downloaded(name: str, folder: Path) -> tuple[Path, Expected]:
    """Write a fixture into a mirror folder and download it from there; return the manifest and what is expected."""
    (folder / "mirror").mkdir(parents=True)
    expected = FIXTURES[name].write(folder / "mirror")
    files = {}
    for role, file in files_of(REGISTRY[name]).items():
        path = folder / "mirror" / file["name"]
        sums = {key: file_digest(path, key) for key in ("md5", "sha256") if key in file}
        size = {"bytes": path.stat().st_size} if "bytes" in file else {}
        files[role] = {**file, **size, **sums}
    download(folder / "raw" / "manifest.json", name, files, str(folder / "mirror"))
    return folder / "raw" / "manifest.json", expected


def block_of(name: str, n_cells: int, n_genes: int) -> dict:
    """Return the registered block, with the fixture's shape in place of the real file's."""
    block = dict(REGISTRY[name])
    if "shape" in block:
        block["shape"] = [n_cells, n_genes]
    return block


def harmonized_in(folder: Path, name: str) -> SimpleNamespace:
    """Harmonize a fixture in a folder; return the result, the account, and what was expected."""
    manifest, expected = downloaded(name, folder)
    n_genes = expected.n_genes + sum(expected.genes_dropped.values())
    target, report = folder / "harmonized.h5ad", folder / "harmonization.json"
    harmonize(manifest, target, report, name, block_of(name, expected.n_cells, n_genes), QC)
    account = json.loads(report.read_text())
    return SimpleNamespace(adata=ad.read_h5ad(target), account=account, expected=expected, manifest=manifest)


@pytest.fixture(scope="session")
def harmonized_screen(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], SimpleNamespace]:
    """Return a function that gives a fixture harmonized, once."""
    return cache(lambda name: harmonized_in(tmp_path_factory.mktemp(name), name))


def test_every_registered_dataset_has_a_fixture_of_its_files() -> None:
    assert set(FIXTURES) == set(REGISTRY) - {"renge2023"}
    for name, fixture in FIXTURES.items():
        assert fixture.names == {role: file["name"] for role, file in files_of(REGISTRY[name]).items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", FIXTURES)
def test_every_cell_and_gene_becomes_what_it_has_to(name: str, harmonized_screen: Callable) -> None:
    screen = harmonized_screen(name)
    account, expected, obs = screen.account, screen.expected, screen.adata.obs
    assert account["perturbations"]["kept"] == expected.labels
    assert {reason: n for reason, n in account["cells"]["dropped"].items() if n} == expected.dropped
    assert obs["perturbation"].astype(str).value_counts().to_dict() == expected.labels
    assert account["genes"]["renamed"] == expected.renamed
    assert account["genes"]["merged"] == expected.merged
    assert account["genes"]["dropped"] == expected.genes_dropped
    assert screen.adata.n_vars == expected.n_genes - expected.merged
    assert (obs["is_control"] == (obs["perturbation"] == CONTROL)).all()
    assert obs.index.is_unique
    assert screen.adata.X.data.min() > 0
    assert np.array_equal(screen.adata.X.data, np.rint(screen.adata.X.data))


@pytest.mark.parametrize("name", FIXTURES)
@pytest.mark.slow
def test_labels_of_a_registered_screen_raise_no_false_alarm(name: str, harmonized_screen: Callable) -> None:
    told = harmonized_screen(name).account["perturbations"]
    assert told["not_split"] == {}
    assert told["looks_like_control"] == {}
    assert not [
        text for text in harmonized_screen(name).account["warnings"] if "label" in text or "perturbation" in text
    ]


@pytest.mark.parametrize("name", FIXTURES)
def test_declared_covariates_are_found_and_controls_are_in_every_context(
    name: str, harmonized_screen: Callable
) -> None:
    obs, declared = harmonized_screen(name).adata.obs, REGISTRY[name]["covariates"]
    assert "cell_type" in declared
    assert not obs[["batch", "cell_type"]].isna().any(axis=None)
    assert (set(obs["batch"]) == {"unknown"}) == ("batch" not in declared)
    assert "unknown" not in set(obs["cell_type"])
    contexts = obs.groupby("cell_type", observed=True)["is_control"].sum()
    assert (contexts > 0).all()


NOT_MEASURED = {
    **{name: ["EPRS1"] for name in FIXTURES if name.startswith(("replogle2022", "nadig2025"))},
    "gasperini2019_lowmoi": ["chr1.9538_top_two", "chr6:1234-5678"],
}


@pytest.mark.parametrize("name", FIXTURES)
def test_perturbed_genes_find_their_rows(name: str, harmonized_screen: Callable) -> None:
    assert harmonized_screen(name).account["perturbations"]["not_measured"] == NOT_MEASURED.get(name, [])


@pytest.mark.parametrize("name", UNIONS)
def test_every_registered_union_unites_its_members(name: str, harmonized_screen: Callable, tmp_path: Path) -> None:
    """Of the fixtures' genes it has the shared ones, and of their cells all but those of a type that comes later."""
    union, members = UNIONS[name], UNIONS[name]["union"]
    screens = {member: harmonized_screen(member) for member in members}
    paths = [[of.manifest.parent.parent / file for of in screens.values()] for file in FILES]
    declared = {"members": members, **{key: union[key] for key in ("genes", "perturbation_types", "organism")}}
    unite(*paths, tmp_path / FILES[0], tmp_path / FILES[1], name, declared)
    united, account = ad.read_h5ad(tmp_path / FILES[0]), json.loads((tmp_path / FILES[1]).read_text())
    assert set(united.var_names) == set.intersection(*[set(of.adata.var_names) for of in screens.values()])
    for member, screen in screens.items():
        own = united[united.obs["dataset"] == member]
        names = own.obs_names.str.removeprefix(f"{member}:")
        assert (own.X != screen.adata[names, united.var_names].X).nnz == 0
        assert set(own.obs["perturbation_type"]) == {REGISTRY[member]["perturbation_type"]}
        lost = set(screen.adata.obs_names) - set(names)
        if len(union["perturbation_types"]) == 1:
            assert not lost
    assert account["cells"]["kept"] == united.n_obs


@pytest.fixture(scope="session")
def essential_lines(harmonized_screen: Callable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the union of the four lines' fixtures."""
    union, folder = UNIONS["essential_lines"], tmp_path_factory.mktemp("essential_lines")
    paths = [[harmonized_screen(of).manifest.parent.parent / file for of in union["union"]] for file in FILES]
    declared = {"members": union["union"], **{key: union[key] for key in ("genes", "perturbation_types", "organism")}}
    unite(*paths, folder / FILES[0], folder / FILES[1], "essential_lines", declared)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_the_four_lines_go_through_every_kind_of_split(kind: str, essential_lines: Path, tmp_path: Path) -> None:
    held_out = "nadig2025_jurkat"
    check(kind, held_out, *prepared_from(essential_lines, tmp_path, kind, held_out))


@pytest.mark.parametrize(
    ("kind", "message"), [("unseen_combination", "at least 2 combinations"), ("unseen_dose", "at least 3 doses")]
)
def test_what_the_four_lines_cannot_be_split_by_is_said(
    kind: str, message: str, essential_lines: Path, tmp_path: Path
) -> None:
    spec = {"kind": kind, "test_fraction": 0.3, "validation_fraction": 0.1, "seed": 0}
    with pytest.raises(InputError, match=message):
        split(*[essential_lines / file for file in FILES], tmp_path / "split.json", kind, spec)


# --- single quirks ----------------------------------------------------------------------------------------------------


def test_norman_has_the_same_labels_on_the_same_cells_in_all_three_sources(harmonized_screen: Callable) -> None:
    labels = {}
    for name in ("norman2019", "norman2019_gears", "norman2019_geo"):
        obs = harmonized_screen(name).adata.obs
        # scPerturb's names have lost their lane; the column gemgroup has it.
        barcodes = (
            obs.index.str.split("-").str[0] + "-" + obs["gemgroup"].astype(str) if name == "norman2019" else obs.index
        )
        labels[name] = pd.Series(obs["perturbation"].astype(str).to_numpy(), index=barcodes)
        assert labels[name].index.is_unique
    scperturb, gears, geo = labels.values()
    assert set(scperturb.index) < set(gears.index) == set(geo.index), (
        "the filtered set lacks cells that the others have"
    )
    assert geo[gears.index].equals(gears)
    assert geo[scperturb.index].equals(scperturb)
    assert set(scperturb) == set(gears)


def test_norman_counts_belong_to_their_cells_in_all_three_sources(harmonized_screen: Callable) -> None:
    gears, geo = (harmonized_screen(name).adata for name in ("norman2019_gears", "norman2019_geo"))
    assert (gears.X != geo[gears.obs_names, gears.var_names].X).nnz == 0
    scperturb = harmonized_screen("norman2019").adata
    barcodes = scperturb.obs.index.str.split("-").str[0] + "-" + scperturb.obs["gemgroup"].astype(str)
    assert (scperturb.X != geo[barcodes, scperturb.var_names].X).nnz == 0


def test_cells_of_adamsons_collided_barcodes_keep_their_own_labels(harmonized_screen: Callable) -> None:
    obs = harmonized_screen("adamson2016_geo").adata.obs
    assert set(obs["batch"]) == {f"{experiment}:{lane}" for experiment in obs["dataset"].unique() for lane in (1, 2)}
    assert set(obs["dataset"]) == {"GSM2406675_10X001", "GSM2406677_10X005", "GSM2406681_10X010"}
    assert list(obs["lane"].astype(str)) == list(obs.index.str.extract(r"-(\d)")[0])


def test_what_is_wrong_with_a_file_is_said(
    harmonized_screen: Callable, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    note = REGISTRY["adamson2016_10x010"]["note"]
    assert "adamson2016_geo" in note
    screen = harmonized_screen("adamson2016_10x010")
    assert screen.account["note"] == note
    block = block_of("adamson2016_10x010", screen.expected.n_cells, screen.expected.n_genes)
    harmonize(screen.manifest, tmp_path / "h.h5ad", tmp_path / "h.json", "adamson2016_10x010", block, QC)
    assert note in caplog.text


def test_frangiehs_conditions_are_contexts(harmonized_screen: Callable) -> None:
    obs = harmonized_screen("frangieh2021").adata.obs
    assert set(obs["cell_type"]) == {"melanocytes|Control", "melanocytes|IFNγ", "melanocytes|Co-culture"}
    assert (obs["MOI"] == 1).all(), "no cell without a guide passes for a control"


def test_an_ensembl_id_settles_an_ambiguous_name(harmonized_screen: Callable) -> None:
    """QARS may be EPRS1 or QARS1: the label goes where its row went."""
    screen = harmonized_screen("replogle2022_rpe1")
    assert screen.adata.var.loc["QARS1", "original_name"] == "QARS"
    assert screen.account["perturbations"]["renamed"]["QARS"] == "QARS1"
    assert screen.account["ambiguous"] == {}


def test_two_genes_of_one_name_stay_two(harmonized_screen: Callable) -> None:
    var = harmonized_screen("replogle2022_k562_essential").adata.var
    assert {"TBCE", "TBCE_ENSG00000285053", "HSPA14", "MSANTD7"} <= set(var.index)
    assert var.loc["TBCE", "original_name"] == "TBCE_ENSG00000284770"
    assert var.loc["MSANTD7", "gene_id"] == "ENSG00000284024"


def test_drugs_are_no_genes_and_doses_are_kept_apart(harmonized_screen: Callable) -> None:
    screen = harmonized_screen("sciplex3")
    assert {"JQ1@10", "JQ1@10000"} < set(screen.adata.obs["perturbation"])
    assert set(screen.adata.obs["n_perturbations"]) == {0, 1}
    assert not screen.adata.var["gene_id"].str.startswith("ENSMUS").any()


def test_another_shape_than_declared_is_an_error(harmonized_screen: Callable, tmp_path: Path) -> None:
    screen = harmonized_screen("datlinger2017")
    with pytest.raises(
        InputError, match=r"80 cells × 66 genes, but the block declares shape: \[5905, 36722\].*correct shape"
    ):
        harmonize(
            screen.manifest, tmp_path / "h.h5ad", tmp_path / "h.json", "datlinger2017", REGISTRY["datlinger2017"], QC
        )


@pytest.mark.slow
def test_a_triplet_goes_from_the_mirror_folder_to_harmonized_by_one_command(
    snakemake: Callable, tmp_path: Path
) -> None:
    (tmp_path / "mirror").mkdir()
    expected = FIXTURES["norman2019_geo"].write(tmp_path / "mirror")
    sums = {
        role: {"md5": file_digest(tmp_path / "mirror" / file, "md5")}
        for role, file in FIXTURES["norman2019_geo"].names.items()
    }
    block = {"source": {"files": sums}, "shape": [expected.n_cells, expected.n_genes], "qc": QC}
    config = {"select": {"datasets": ["norman2019_geo"]}, "mirror": "mirror", "datasets": {"norman2019_geo": block}}
    done = snakemake(tmp_path, "data", config=config)
    assert done.returncode == 0, done.text
    assert done.jobs == {"data": 1, "download": 1, "harmonize": 1, "quality": 1}
    account = json.loads((tmp_path / "results" / "norman2019_geo" / "harmonization.json").read_text())
    assert account["perturbations"]["kept"] == expected.labels


# --- the registry -----------------------------------------------------------------------------------------------------


def words(block: object) -> Iterator[str]:
    """Yield all strings of a block."""
    if isinstance(block, dict):
        for value in block.values():
            yield from words(value)
    elif isinstance(block, list):
        for value in block:
            yield from words(value)
    elif isinstance(block, str):
        yield block


@pytest.mark.parametrize("name", REGISTRY)
def test_a_block_is_complete(name: str) -> None:
    block = REGISTRY[name]
    needed = {
        "source",
        "perturbation",
        "covariates",
        "perturbation_type",
        "combinations",
        "organism",
        "reference",
        "licence",
    }
    assert needed <= set(block)
    assert block["reference"].startswith("doi:10.")
    assert block["licence"]
    assert block["perturbation_type"] != "unknown"
    assert {"cell_type"} <= set(block["covariates"])
    if name not in ("renge2023", "adamson2016_geo"):
        assert len(block["shape"]) == 2
    assert not [word for word in words(block) if "plus.figshare" in word or "exampledata" in word], (
        "hosts that serve something else"
    )


def test_norman_has_the_constructs_of_the_fixture() -> None:
    """The fixture is worth something: it holds every quirk that the comparison of the three sources is about."""
    cells = norman_cells()
    assert {"subset", "exclude", "unassigned", "control"} < set(cells["becomes"])
    assert cells["root"].duplicated().any()
    assert not cells["barcode"].duplicated().any()
    assert cells["construct"].str.endswith("_2").any()


def files_of_registry() -> Iterator[tuple[str, dict]]:
    """Yield name of the dataset and file of everything that is downloaded."""
    for name, block in REGISTRY.items():
        for file in files_of(block).values():
            yield name, file


@pytest.mark.parametrize(
    ("name", "file"), list(files_of_registry()), ids=lambda value: value if isinstance(value, str) else value["name"]
)
def test_the_table_of_sources_says_what_the_registry_says(name: str, file: dict) -> None:
    rows = [
        line
        for line in DATASETS.read_text().splitlines()
        if line.startswith(f"| `{name}` |") and f"`{file['name']}`" in line
    ]
    assert len(rows) == 1, f"docs/reference/datasets.md has no row of {name}, {file['name']}"
    expected = [
        f"{file['bytes']:,}" if "bytes" in file else "unpublished",
        file.get("md5") or file.get("sha256") or "unpublished",
    ]
    expected += ["×".join(f"{n:,}" for n in REGISTRY[name]["shape"])] if "shape" in REGISTRY[name] else []
    assert [value for value in expected if value not in rows[0]] == []
    assert ("sha256" in file and "md5" in file) == ("+ sha256" in rows[0])


# --- what is shown ----------------------------------------------------------------------------------------------------


def table(harmonized: Callable[[str], SimpleNamespace]) -> str:
    """Return the table of what the harmonizer did to each fixture."""
    lines = [
        "dataset\tcells\tkept\tcontrols\tperturbations\tdropped\tgenes renamed\tgenes dropped, merged, not measured\t"
        "traps in the file"
    ]
    for name, fixture in FIXTURES.items():
        account = harmonized(name).account
        cells, genes, kept = account["cells"], account["genes"], account["perturbations"]["kept"]
        dropped = ", ".join(f"{n} {reason}" for reason, n in cells["dropped"].items() if n)
        renamed = ", ".join(f"{before} → {after}" for before, after in genes["renamed"].items())
        others = [f"{n} dropped ({reason})" for reason, n in genes["dropped"].items()] + [
            f"{genes['merged']} merged"
        ] * bool(genes["merged"])
        others += [f"{', '.join(account['perturbations']['not_measured'])} not measured"] * bool(
            account["perturbations"]["not_measured"]
        )
        row = (
            name,
            cells["source"],
            cells["kept"],
            kept[CONTROL],
            len(kept) - 1,
            dropped or "–",
            renamed or "–",
            "; ".join(others) or "–",
            fixture.traps,
        )
        lines.append("\t".join(map(str, row)))
    return "\n".join(lines) + "\n"


def test_the_table_of_fixtures_is_current(harmonized_screen: Callable) -> None:
    assert SHOWN.read_text() == table(harmonized_screen), (
        "run `PYTHONPATH=scripts python workflow_tests/screens/test_screens.py` to write the table anew"
    )


def renew() -> None:
    """Write the table anew."""
    with tempfile.TemporaryDirectory() as folder:
        SHOWN.write_text(table(cache(lambda name: harmonized_in(Path(folder) / name, name))))


if __name__ == "__main__":
    renew()
