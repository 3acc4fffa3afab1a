"""Labels that are not what they seem: controls by other names, and combinations that are not split."""

import re
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import yaml
from conftest import COMBINATIONS, PERTURBED, dataset_block, merged
from hypothesis import given, settings
from hypothesis import strategies as st

from perturbflow.annotation import canonical_labels, doubtful_labels, gene_table
from perturbflow.controls import NAMED, SHORT, Controls, declaration, look_alikes
from perturbflow.doses import names_in
from perturbflow.errors import InputError
from perturbflow.nearest import nearest
from perturbflow.registry.config import complete
from perturbflow.separators import SEPARATORS, unsplit
from perturbflow.symbols import CONTROL, human_symbols

SCREEN = Path("screen.h5ad")
NO_GENES = gene_table(pd.DataFrame(index=pd.Index([], dtype=str)), {"organism": "human"})
DECLARED = Controls.of({"control": ["control", "6"]})
APPROVED = sorted(name for name in human_symbols().approved if re.fullmatch(r"[A-Z][A-Z0-9]{2,}", name))

# --- controls by other names ----------------------------------------------------------------------------------------

NAMES = [
    "non-targeting",
    "nontargeting",
    "Non_Targeting",
    "NonTargetingControlGuideForHuman",
    "neg_ctrl",
    "NegCtrl",
    "negative_control",
    "scramble",
    "scrambled",
    "Scr",
    "safe-targeting",
    "safe_harbor",
    "NT",
    "NTC",
    "AAVS1",
    "ROSA26",
    "intergenic",
    "luciferase",
    "Luc",
    "LacZ",
    "GFP",
    "eGFP",
    "empty_vector",
    "DMSO",
    "vehicle",
    "untreated",
    "mock",
    "unperturbed",
    "no_guide",
    "no_site",
    "wild-type",
    "WT",
    "ctrl",
    "Ctl",
    "CONTROL",
    "gal4",
    "control-guide",
    "non-silencing",
    "uninfected",
]
GENES = [
    "KLF1",
    "HLA-A",
    "NKX2-1",
    "MT-CO1",
    "NT5E",
    "WT1",
    "LUC7L",
    "LUC7L2",
    "CTRB1",
    "CTRC",
    "NTRK1",
    "GFPT1",
    "SCRIB",
    "LACTB",
    "EVX1",
    "NCOA1",
    "CTR9",
    "SCRG1",
    "CONTROLLER",
    "ENSG00000143674",
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("form", ["{}", "{}_00001", "{}-12", "{}7", "sg{}_3", "sg-{}-1", "{}_g2", "{} 4"])
def test_the_fields_names_for_controls_are_told(name: str, form: str) -> None:
    for text in (name, name.lower(), name.upper()):
        assert DECLARED.resembles(form.format(text)) or form.format(text).upper() in human_symbols().approved


@pytest.mark.parametrize("gene", GENES)
def test_genes_look_like_no_controls(gene: str) -> None:
    assert not DECLARED.resembles(gene)


@pytest.mark.parametrize("guide", ["WT1_2", "sgWT1-1", "CTR9g1", "SCRG1_sg2", "NT5E_1"])
def test_guides_of_genes_look_like_no_controls(guide: str) -> None:
    assert not DECLARED.resembles(guide)


def test_of_all_approved_symbols_two_name_a_control() -> None:
    assert {name for name in human_symbols().approved if DECLARED.resembles(name)} == {"AAVS1", "CTRL"}


@pytest.mark.parametrize(
    ("declared", "alike", "others"),
    [
        (["Bruce"], ["bruce", "BRUCE-1", "Bruce 2", "Bruce12"], ["Brucella", "Bru"]),
        (["pool1"], ["pool1_a", "POOL1", "pool-1"], ["pool12", "pool2"]),
        (["6"], [], ["6_1", "61", "66"]),
    ],
)
def test_what_starts_with_a_declared_control_is_told(declared: list[str], alike: list[str], others: list[str]) -> None:
    controls = Controls.of({"control": declared})
    assert [text for text in [*alike, *others] if controls.resembles(text)] == alike


@settings(deadline=None)
@given(st.lists(st.sampled_from(["sg", "g", "NT", "1", "23", "lib", "_", "-", "chr1", "1x", "guide", "p", "a"]), max_size=60).map("".join))
def test_any_label_is_looked_at_in_no_time(label: str) -> None:
    """A pattern that goes back and forth would take for ever here."""
    assert {bool(NAMED.fullmatch(label)), bool(SHORT.fullmatch(label))} <= {True, False}


def test_a_pattern_declares_many_controls_at_once(harmonized_from: Callable, tiny_screen: Callable) -> None:
    screen = tiny_screen()
    is_control = screen.obs["perturbation"] == "control"
    screen.obs["perturbation"] = [
        f"non-targeting_{i:05}" if control else label
        for i, (control, label) in enumerate(zip(is_control, screen.obs["perturbation"], strict=True))
    ]
    screen.obs.iloc[0, 0] = "TF1+non-targeting_00007"
    result = harmonized_from(screen, perturbation={"control": ["control"], "control_pattern": r"non-targeting_\d+"})
    assert result.adata.obs["is_control"].sum() == is_control.sum() - 1
    assert result.adata.obs["perturbation"].iloc[0] == "TF1"
    assert result.account["perturbations"]["looks_like_control"] == {}


def test_labels_that_look_like_controls_stay_and_are_told(
    harmonized_from: Callable, tiny_screen: Callable, caplog: pytest.LogCaptureFixture
) -> None:
    screen = tiny_screen()
    screen.obs["perturbation"] = screen.obs["perturbation"].replace({"TF1": "NT-12", "TF2+TF4": "TF2+AAVS1", "TF8": "Control_2"})
    result = harmonized_from(screen)
    assert {"NT-12", "AAVS1+TF2", "Control_2"} <= set(result.adata.obs["perturbation"])
    told = result.account["perturbations"]
    assert told["looks_like_control"] == {"AAVS1": 40, "Control_2": 40, "NT-12": 40}
    assert told["controls_declared"] == ["control"]
    assert 'perturbation.control: ["control", "AAVS1", "Control_2", "NT-12"]' in caplog.text
    assert "stay perturbations" in caplog.text


def test_without_a_declared_control_those_that_look_like_one_are_proposed(harmonized_from: Callable, tiny_screen: Callable) -> None:
    screen = tiny_screen()
    labels = screen.obs["perturbation"]
    screen.obs["perturbation"] = [f"NTC_{i % 20}" if label == "control" else label for i, label in enumerate(labels)]
    with pytest.raises(InputError, match=r"no control cells.*look like controls \(cells\): 'NTC_0' \(4\).*control_pattern: 'NTC_\\d\+'"):
        harmonized_from(screen)


@given(st.lists(st.from_regex(r"(NT|neg ctrl|safe[ .'\"\\µ]x)[_-][0-9]{1,4}", fullmatch=True), min_size=1, max_size=30, unique=True))
def test_the_proposed_declaration_takes_all_of_them_in(alike: list[str]) -> None:
    line = declaration(alike, ["control"])
    key, value = line.split(": ", 1)
    if key.endswith("pattern"):
        assert all(re.fullmatch(yaml.safe_load(value), label) for label in alike)
    else:
        assert yaml.safe_load(value) == ["control", *alike]


@pytest.mark.parametrize("labels", [[f"NTC_{i}" for i in range(20)], [f"safe ({i}.{i})" for i in range(20)], ["NT-1", "AAVS1"]])
def test_a_configuration_takes_the_proposed_declaration(labels: list[str], tmp_path: Path) -> None:
    (tmp_path / "mine.h5ad").touch()
    key, value = declaration(labels).removeprefix("perturbation.").split(": ", 1)
    block = {"source": {"path": str(tmp_path / "mine.h5ad")}, "perturbation": {"column": "perturbation", key: yaml.safe_load(value)}}
    controls = Controls.of(complete(merged({"datasets": {"mine": block}}))["datasets"]["mine"]["perturbation"])
    assert all(label in controls for label in labels)


def test_whole_numbers_in_a_column_with_gaps_are_found() -> None:
    assert "6" in DECLARED
    assert "6.0" in DECLARED
    assert "60" not in DECLARED


def test_cells_of_a_member_are_counted_over_labels() -> None:
    def members(label: str) -> list[str]:
        return names_in(label, {"separator": "+"})

    n_cells = {"NT-1": 5, "KLF1+NT-1": 3, "KLF1": 9, "control": 7}
    assert look_alikes(n_cells, DECLARED, members) == {"NT-1": 8}


# --- combinations that are not split --------------------------------------------------------------------------------

JOINED = [separator for separator in SEPARATORS if separator not in ("@", " ")]


def told_of(labels: list[str], **perturbation: object) -> tuple[dict, set[str]]:
    """Return what is told of labels, and what they become."""
    block = dataset_block(perturbation=perturbation)
    obs = pd.DataFrame({"perturbation": labels})
    return doubtful_labels(obs, block, NO_GENES, SCREEN), set(canonical_labels(obs, block, NO_GENES, SCREEN))


@pytest.mark.parametrize("separator", ["|", ",", ";", "&", " and ", "--", "_", ":", "/", "-", " & ", "||"])
def test_a_wrong_separator_ends_harmonization_with_the_right_one(separator: str) -> None:
    labels = [label.replace("+", separator) for label in ["control", *PERTURBED, *COMBINATIONS]]
    with pytest.raises(InputError, match=r"screen\.h5ad.*not split, such as 'TF\d.*perturbation\.separator is '\+'") as raised:
        told_of(labels)
    right = re.search(r"Set perturbation\.separator: '(.*?)'", str(raised.value))[1]
    told, becomes = told_of(labels, separator=right)
    assert becomes == {"control", *PERTURBED, *COMBINATIONS}
    assert told["not_split"] == {}


def test_a_separator_that_would_split_genes_is_not_proposed() -> None:
    with pytest.raises(InputError, match=r"'-' stands in names of genes too \(HLA-A\), so put another sign, such as '\+'"):
        told_of(["control", "KLF1-CEBPA", "KLF1", "CEBPA", "HLA-A"])


def test_labels_that_are_never_split_on_purpose_are_told_only(
    harmonized_from: Callable, tiny_screen: Callable, caplog: pytest.LogCaptureFixture
) -> None:
    screen = tiny_screen()
    screen.obs["perturbation"] = screen.obs["perturbation"].str.replace("+", "|", regex=False)
    result = harmonized_from(screen, perturbation={"separator": None})
    assert "TF1|TF2" in set(result.adata.obs["perturbation"])
    assert result.account["perturbations"]["not_split"]["TF1|TF2"] == 40
    assert "Set perturbation.separator: '|', if they are combinations" in caplog.text


def found(labels: list[str], separator: str | None = "+", genes: tuple[str, ...] = (), *, is_human: bool = True) -> tuple[str, bool] | None:
    """Return the separator that is found, and whether the declared one is surely wrong."""
    declared = {"separator": separator, "control": ["control"]}
    one = unsplit(dict.fromkeys(labels, 10), declared, lambda label: names_in(label, declared), genes, is_human=is_human)
    return None if one is None else (one.separator, one.is_sure)


@pytest.mark.parametrize(
    "labels",
    [
        ["HLA-A", "HLA-B", "MT-CO1", "NKX2-1", "NKX3-1", "KLF1"],
        ["KLF1_1", "KLF1_2", "CEBPA_1", "CEBPA_sg2", "ATF2g1"],
        ["INS-IGF2", "TNFSF12-TNFSF13", "NME1-NME2", "GATA6-AS1", "RPL17-C18orf32"],
        ["ENSG00000143674.1", "ENSG00000172053.18", "ENSG00000143674"],
        ["KRAS_WT", "KRAS_G12D", "KRAS_Q61K", "TP53_R175H"],
        ["RP11-34P13.7", "RP5-862P8.2"],
        ["KLF1+CEBPA", "KLF1", "control+CEBPA"],
        ["0.5", "5", "0"],
    ],
)
def test_names_that_hold_a_sign_raise_no_alarm(labels: list[str]) -> None:
    assert found(labels) is None


@pytest.mark.parametrize(
    "labels",
    [["1,25-dihydroxyvitamin D3", "N,N-dimethyl", "JQ1", "DMSO"], ["Sodium butyrate", "Valproic acid (sodium salt)", "AG-490", "AG-14361"]],
)
def test_drug_names_raise_no_alarm(labels: list[str]) -> None:
    assert found(labels, is_human=False) is None


def test_one_accident_among_guides_is_told_only() -> None:
    assert found(["KMT2A_AFF1", *[f"{gene}_{i}" for gene in ("KLF1", "CEBPA") for i in range(4)]]) == ("_", False)


@settings(deadline=None, max_examples=40)
@given(
    genes=st.lists(st.sampled_from(APPROVED), min_size=4, max_size=8, unique=True),
    separator=st.sampled_from(JOINED),
    spaced=st.booleans(),
    alone=st.booleans(),
)
def test_any_separator_is_found(genes: list[str], separator: str, spaced: bool, alone: bool) -> None:
    sign = f" {separator} " if spaced and separator.strip() == separator else separator
    combined = [sign.join(genes[i : i + 2]) for i in range(3)]
    if any(label in human_symbols().approved for label in combined) or separator == "+":
        return
    told = found([*combined, *(genes if alone else [])])
    assert told is not None
    assert told[1]
    assert [part.strip() for part in combined[0].split(told[0]) if part.strip()] == genes[:2]


def test_members_of_guides_count_as_known() -> None:
    assert found(["KLF1_1|CEBPA_2", "KLF1_2|CEBPA_1", "SPI1_1|KLF1_2"]) == ("|", True)


@pytest.mark.parametrize("labels", [["A+ctrl", "ctrl+A", "A+B", "ctrl"], ["A", "B", "A+B", "control"]])
def test_forms_of_gears_and_cpa_read_as_they_are(labels: list[str], caplog: pytest.LogCaptureFixture) -> None:
    told, becomes = told_of(labels, control=["ctrl"])
    assert told == {"looks_like_control": {}, "not_split": {}}
    assert becomes <= {"A", "B", "A+B", CONTROL}
    assert not caplog.records


# --- did you mean -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "first"),
    [("klf1", "KLF1"), ("KLF1 ", "KLF1"), ("OCT4", "POU5F1"), ("oct4", "POU5F1"), ("CEBPAA", "CEBPA"), ("b+a", "A+B"), ("ZZZZZZ", None)],
)
def test_the_nearest_name_is_found(name: str, first: str | None) -> None:
    close = nearest(name, ["KLF1", "POU5F1", "CEBPA", "A+B", *PERTURBED])
    assert (close[0] if close else None) == first
