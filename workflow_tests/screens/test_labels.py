"""Labels that are not what they seem: controls by other names, and combinations that are not split."""

import re
from collections.abc import Callable
from pathlib import Path

import anndata as ad
import pandas as pd
import pytest
import yaml
from conftest import COMBINATIONS, PERTURBED, dataset_block, merged
from hypothesis import given, settings
from hypothesis import strategies as st

from perturbflow.errors import InputError
from perturbflow.genes.symbols import CONTROL, human_symbols
from perturbflow.nearest import nearest
from perturbflow.registry.config import complete
from perturbflow.screens.annotation import canonical_labels, gene_table
from perturbflow.screens.control_labels import NAMED, SHORT, DeclaredControls, declaration, look_alikes
from perturbflow.screens.dose_labels import names_in
from perturbflow.screens.doubts import doubtful_labels
from perturbflow.screens.separators import SEPARATORS, unsplit
from perturbflow.screens.unassigned import WORD, is_word

SCREEN = Path("screen.h5ad")
NO_GENES = gene_table(pd.DataFrame(index=pd.Index([], dtype=str)), {"organism": "human"})
DECLARED = DeclaredControls.of({"control": ["control", "6"]})
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
    *(
        "NT_control",
        "NTctrl",
        "NTgRNA",
        "NT_sgRNA",
        "ONE_NON-GENE_SITE",
        "non-gene",
        "safe_guide",
        "sgSafe",
        "Chr1_safe",
        "sgROSA",
        "AAVS",
    ),
    *(
        "vector",
        "vector_control",
        "EF1a_control",
        "CNTL",
        "dummy",
        "random",
        "neutral",
        "inert",
        "no_crispr",
        "untargeted",
        "tdTomato",
    ),
    *(
        "mTagBFP2",
        "Renilla",
        "unstim",
        "resting",
        "baseline",
        "veh",
        "H2O",
        "water",
        "saline",
        "media",
        "sham",
        "blank",
        "Cas9 only",
        "uninf",
    ),
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
    "MUT",
    "HSCR",
    "CNTRL",
    "CNTLN",
    "REST",
    "NONO",
    "SAFB",
    "RANDX",
    "ENSG00000143674",
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("form", ["{}", "{}_00001", "{}-12", "{}7", "sg{}_3", "sg-{}-1", "{}_g2", "{} 4"])
def test_the_fields_names_for_controls_are_told(name: str, form: str) -> None:
    for text in (name, name.lower(), name.upper()):
        assert DECLARED.resembles(form.format(text)) or form.format(text).upper() in human_symbols().approved


@pytest.mark.parametrize("name", ["Rest", "Cntrl", "Negative_1", "NLuc"])
def test_names_that_are_genes_in_capitals_are_told_as_they_are(name: str) -> None:
    assert DECLARED.resembles(name)


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
    controls = DeclaredControls.of({"control": declared})
    assert [text for text in [*alike, *others] if controls.resembles(text)] == alike


@settings(deadline=None)
@given(
    st.lists(
        st.sampled_from(["sg", "g", "NT", "1", "23", "lib", "_", "-", "chr1", "1x", "guide", "p", "a"]), max_size=60
    ).map("".join)
)
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
    screen.obs["perturbation"] = screen.obs["perturbation"].replace(
        {"TF1": "NT-12", "TF2+TF4": "TF2+AAVS1", "TF8": "Control_2"}
    )
    result = harmonized_from(screen)
    assert {"NT-12", "AAVS1+TF2", "Control_2"} <= set(result.adata.obs["perturbation"])
    told = result.account["perturbations"]
    assert told["looks_like_control"] == {"AAVS1": 40, "Control_2": 40, "NT-12": 40}
    assert told["controls_declared"] == ["control"]
    assert 'perturbation.control: ["control", "AAVS1", "Control_2", "NT-12"]' in caplog.text
    assert "stay perturbations" in caplog.text


def test_without_a_declared_control_those_that_look_like_one_are_proposed(
    harmonized_from: Callable, tiny_screen: Callable
) -> None:
    screen = tiny_screen()
    labels = screen.obs["perturbation"]
    screen.obs["perturbation"] = [f"NTC_{i % 20}" if label == "control" else label for i, label in enumerate(labels)]
    with pytest.raises(
        InputError, match=r"no control cells.*look like controls \(cells\): 'NTC_0' \(4\).*control_pattern: 'NTC_\\d\+'"
    ):
        harmonized_from(screen)


@given(
    st.lists(
        st.from_regex(r"(NT|neg ctrl|safe[ .'\"\\µ]x)[_-][0-9]{1,4}", fullmatch=True),
        min_size=1,
        max_size=30,
        unique=True,
    )
)
def test_the_proposed_declaration_takes_all_of_them_in(alike: list[str]) -> None:
    line = declaration(alike, ["control"])
    key, value = line.split(": ", 1)
    if key.endswith("pattern"):
        assert all(re.fullmatch(yaml.safe_load(value), label) for label in alike)
    else:
        assert yaml.safe_load(value) == ["control", *alike]


@pytest.mark.parametrize(
    "labels", [[f"NTC_{i}" for i in range(20)], [f"safe ({i}.{i})" for i in range(20)], ["NT-1", "AAVS1"]]
)
def test_a_configuration_takes_the_proposed_declaration(labels: list[str], tmp_path: Path) -> None:
    (tmp_path / "mine.h5ad").touch()
    key, value = declaration(labels).removeprefix("perturbation.").split(": ", 1)
    block = {
        "source": {"path": str(tmp_path / "mine.h5ad")},
        "perturbation": {"column": "perturbation", key: yaml.safe_load(value)},
    }
    controls = DeclaredControls.of(complete(merged({"datasets": {"mine": block}}))["datasets"]["mine"]["perturbation"])
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
    with pytest.raises(
        InputError, match=r"screen\.h5ad.*not split, such as 'TF\d.*perturbation\.separator is '\+'"
    ) as raised:
        told_of(labels)
    right = re.search(r"Set perturbation\.separator: '(.*?)'", str(raised.value))[1]
    told, becomes = told_of(labels, separator=right)
    assert becomes == {"control", *PERTURBED, *COMBINATIONS}
    assert told["not_split"] == {}


def test_a_separator_that_would_split_genes_is_not_proposed() -> None:
    with pytest.raises(
        InputError, match=r"'-' stands in names of genes too \(HLA-A\), so put another sign, such as '\+'"
    ):
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


def found(
    labels: list[str], separator: str | None = "+", genes: tuple[str, ...] = (), *, is_human: bool = True
) -> tuple[str, bool] | None:
    """Return the separator that is found, and whether the declared one is surely wrong."""
    declared = {"separator": separator, "control": ["control"]}
    one = unsplit(
        dict.fromkeys(labels, 10), declared, lambda label: names_in(label, declared), genes, is_human=is_human
    )
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
    [
        ["1,25-dihydroxyvitamin D3", "N,N-dimethyl", "JQ1", "DMSO"],
        ["Sodium butyrate", "Valproic acid (sodium salt)", "AG-490", "AG-14361"],
    ],
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
    assert told == {"looks_like_control": {}, "no_gene": {}, "not_split": {}}
    assert becomes <= {"A", "B", "A+B", CONTROL}
    assert not caplog.records


@pytest.mark.parametrize("separator", ["->", " → ", "=>", "·", "\t"])
def test_arrows_dots_and_tabs_are_separators(separator: str) -> None:
    labels = [label.replace("+", separator) for label in ["control", *PERTURBED, *COMBINATIONS]]
    with pytest.raises(InputError) as raised:
        told_of(labels)
    line = re.search(r"Set perturbation\.(separator: .*?)\. If", str(raised.value))[1]
    assert told_of(labels, **yaml.safe_load(line))[1] == {"control", *PERTURBED, *COMBINATIONS}


@pytest.mark.parametrize(
    ("labels", "separator", "organism"),
    [
        (["ctrl", "ctrl_KLF1", "ctrl_GATA1", "ctrl_CEBPA"], "_", "human"),
        (["ctrl", "ctrl_KLF1", "GATA1_ctrl", "KLF1_GATA1"], "_", "human"),
        (["non-targeting", "non-targeting_KLF1", "non-targeting_GATA1", "non-targeting_MYC"], "_", "human"),
        (["0|0", "KLF1|0", "0|GATA1", "KLF1|GATA1"], "|", "human"),
        (["control", "KLF1;GATA1", "KLF1;CEBPA", "GATA1;CEBPA"], ";", "mouse"),
        (["control", "KLF1KO_GATA1KO", "GATA1KO_MYCKO", "KLF1KO_MYCKO"], "_", "human"),
    ],
)
def test_parts_are_known_in_whatever_form(labels: list[str], separator: str, organism: str) -> None:
    mouse = gene_table(pd.DataFrame(index=["Klf1", "Gata1", "Cebpa"]), {"organism": "mouse"})
    block = {**dataset_block(perturbation={"control": labels[:1]}), "organism": organism}
    with pytest.raises(InputError, match=rf"Set perturbation\.separator: '{re.escape(separator)}'"):
        doubtful_labels(
            pd.DataFrame({"perturbation": labels}), block, mouse if organism == "mouse" else NO_GENES, SCREEN
        )


def test_a_control_of_one_repeated_part_makes_that_part_a_control() -> None:
    assert told_of(["0|0", "KLF1|0", "0|GATA1", "KLF1|GATA1"], control=["0|0"], separator="|")[1] == {
        "control",
        "KLF1",
        "GATA1",
        "GATA1+KLF1",
    }


def drugs_told_of(labels: list[str], **perturbation: object) -> tuple[dict, list[str]]:
    """Return what is told of labels of a drug screen, and the warnings."""
    warnings: list[str] = []
    block = dataset_block(perturbation={"control": ["DMSO"], **perturbation}, perturbation_type="drug")
    return doubtful_labels(
        pd.DataFrame({"perturbation": ["DMSO", *labels]}), block, NO_GENES, SCREEN, warnings
    ), warnings


def test_combinations_of_compounds_never_seen_alone_are_told() -> None:
    with pytest.raises(InputError, match=r"Set perturbation\.separator: '_'"):
        drugs_told_of(["Erlotinib_Gefitinib", "Erlotinib_Trametinib", "Gefitinib_Trametinib"])


def test_what_a_label_joins_to_a_control_is_no_advice_to_make_a_control_of_it() -> None:
    told, warnings = drugs_told_of(["DMSO_Erlotinib", "Gefitinib_DMSO", "DMSO_24h", "DMSO_rep1"])
    assert told["looks_like_control"] == {"DMSO_24h": 1, "DMSO_rep1": 1}
    assert len(warnings) == 1
    assert "2 labels join a control and another name (cells): 'DMSO_Erlotinib' (1), 'Gefitinib_DMSO' (1)" in warnings[0]
    assert "perturbation.separator" in warnings[0]


@pytest.mark.parametrize("label", ["JQ1 (+)", "(+)-JQ1 (a)", "Na+/K+ inhibitor"])
def test_a_separator_within_a_name_is_told_with_another_name(label: str) -> None:
    with pytest.raises(InputError, match=r"which are no names.*perturbation\.rename") as raised:
        drugs_told_of([label])
    rename = yaml.safe_load(re.search(r"perturbation\.rename: (\{.*?\})", str(raised.value))[1])
    obs = pd.DataFrame({"perturbation": ["DMSO", label]})
    block = dataset_block(perturbation={"control": ["DMSO"], "rename": rename}, perturbation_type="drug")
    assert set(canonical_labels(obs, block, NO_GENES, SCREEN)) == {CONTROL, rename[label]}
    with pytest.raises(InputError, match=r"perturbation\.rename") as raised:
        canonical_labels(obs, dataset_block(perturbation={"control": ["DMSO"], "separator": None}), NO_GENES, SCREEN)
    assert "separator: '+'" not in str(raised.value)


# --- several labels of one gene or compound ---------------------------------------------------------------------------

VARIANTS = [
    ("CRISPRi", ["KLF1_P1", "KLF1_P2", "MYC_P1P2", "NKX2-1"], {"KLF1", "MYC", "NKX2-1"}),
    ("CRISPRi", ["KLF1_A", "KLF1_B", "HLA-A_B"], {"KLF1", "HLA-A"}),
    ("CRISPRko", ["KLF1_ACGTACGTACGTACGTACGT", "KLF1_TCGAACGTACGTACGTACGT"], {"KLF1"}),
    ("CRISPRko", ["sgKLF1-1", "sgKLF1-2", "sgNKX2-1-1", "NKX2-1"], {"KLF1", "NKX2-1"}),
    ("CRISPRko", ["KLF1", "KLF1-KO", "GATA1-KO"], {"KLF1", "GATA1"}),
    ("CRISPRko", ["KLF1", "KLF1KD"], {"KLF1"}),
    ("CRISPRko", ["sgKLF1", "KLF1", "MYC"], {"KLF1", "MYC"}),
    ("CRISPRi", ["KLF1_+_123.45-P1", "KLF1_-_129.45-P1", "MYC_+_1223.45-P1P2"], {"KLF1", "MYC"}),
    ("CRISPRi", ["KLF1 (ENSG00000105610)", "KLF1"], {"KLF1"}),
    ("CRISPRi", ["ABC_1", "ABC_2", "DEF_1", "DEF_2"], {"ABC", "DEF"}),
    ("drug", ["Belinostat_0.01", "Belinostat_0.1", "Belinostat_1.0"],
     {"Belinostat@0.01", "Belinostat@0.1", "Belinostat@1"}),
    ("drug", ["JQ1_10", "JQ1_100", "TSA_10", "TSA_100"], {"JQ1@10", "JQ1@100", "TSA@10", "TSA@100"}),
    ("drug", ["JQ1_10uM", "JQ1_100nM", "TSA_1uM", "5-FU_1uM"], {"JQ1@10", "JQ1@0.1", "TSA@1", "5-FU@1"}),
    ("drug", ["JQ1 10 uM", "JQ1 1 uM", "Vitamin D3 1 uM"], {"JQ1@10", "JQ1@1", "Vitamin D3@1"}),
    ("drug", ["JQ1 (10 uM)", "JQ1 (1 uM)"], {"JQ1@10", "JQ1@1"}),
    ("CRISPRi", ["KLF1-a", "KLF1-b", "MYC-a"], {"KLF1", "MYC"}),
    ("CRISPRi", ["10005_KLF1_P1_ENSG00000105610", "10006_KLF1_P2_ENSG00000105610"], {"KLF1"}),
    ("CRISPRi", ["KLF1_exon2", "KLF1_exon3", "KLF1#1"], {"KLF1"}),
    ("CRISPRko", ["KLF1 knockout", "CRISPRko_KLF1", "KLF1-/-"], {"KLF1"}),
    ("drug", ["JQ1_1e-06", "JQ1_1e-07", "TSA_1e-06"], {"JQ1@1e-06", "JQ1@1e-07", "TSA@1e-06"}),
    ("drug", ["10uM_JQ1", "1uM_JQ1", "1uM_TSA"], {"JQ1@10", "JQ1@1", "TSA@1"}),
    ("drug", ["JQ1, 10 uM", "JQ1, 1 uM"], {"JQ1@10", "JQ1@1"}),
    ("drug", ["Erlotinib10uM", "Erlotinib1uM"], {"Erlotinib@10", "Erlotinib@1"}),
    ("drug", ["JQ1__10uM", "JQ1__1uM", "TSA__1uM"], {"JQ1@10", "JQ1@1", "TSA@1"}),
    ("drug", ["JQ1_10uM_24h", "JQ1_10uM_48h", "JQ1_1uM_24h"], {"JQ1@10", "JQ1@1"}),
    ("drug", ["JQ1_24h_10uM", "JQ1_48h_10uM", "JQ1_24h_1uM"], {"JQ1@10", "JQ1@1"}),
    ("drug", ["JQ1@low", "JQ1@high", "TSA@low", "TSA@high"], {"JQ1", "TSA"}),
    ("drug", ["PD-0325901-24h", "PD-0325901-48h"], {"PD-0325901"}),
    ("drug", ["JQ1_day3", "JQ1_day5"], {"JQ1"}),
    ("unknown", ["A549_Belinostat_1.0", "A549_Belinostat_0.1"], {"A549_Belinostat@1", "A549_Belinostat@0.1"}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "labels", "become"), VARIANTS)
def test_several_labels_of_one_gene_or_compound_end_with_the_line_that_makes_them_one(
    kind: str, labels: list[str], become: set[str]
) -> None:
    obs = pd.DataFrame({"perturbation": ["control", *labels]})
    with pytest.raises(InputError, match=r"one held out while another of the same trains") as raised:
        doubtful_labels(obs, dataset_block(perturbation_type=kind), NO_GENES, SCREEN)
    line, keep = re.search(
        r"Write perturbation\.(.*)\. If they are perturb.*, write perturbation\.(.*?'\^.*?')\.", str(raised.value)
    ).groups()
    block = dataset_block(perturbation_type=kind, perturbation=yaml.safe_load(line))
    assert set(canonical_labels(obs, block, NO_GENES, SCREEN)) == {CONTROL, *become}
    doubtful_labels(obs, block, NO_GENES, SCREEN, told := [])
    assert not told
    block = dataset_block(perturbation_type=kind, perturbation=yaml.safe_load(keep))
    doubtful_labels(obs, block, NO_GENES, SCREEN, told)
    assert told, "kept by choice, and told"


@pytest.mark.parametrize("form", ["{line}_{drug}", "{drug}_{line}", "{line}_{drug}_{dose}"])
def test_a_cell_line_within_the_labels_is_told(form: str) -> None:
    rows = [
        (form.format(line=line, drug=drug, dose=dose), line, drug, dose)
        for line in ("A549", "K562")
        for drug in ("JQ1", "TSA")
        for dose in (1.0, 10.0)
    ]
    obs = pd.DataFrame([("control", "A549", "", 0), *rows], columns=["perturbation", "cell_line", "drug", "dose"])
    perturbation: dict = {}
    for _ in range(3):
        try:
            doubtful_labels(obs, dataset_block(perturbation=perturbation, perturbation_type="drug"), NO_GENES, SCREEN)
        except InputError as error:
            line = re.search(
                r"Write perturbation\.(pattern: '.*?')(?: and covariates.cell_type: cell_line)?\. If", str(error)
            )[1]
            perturbation = yaml.safe_load(line)
    drugs = {"JQ1", "TSA"} if "dose" not in form else {"JQ1@1", "JQ1@10", "TSA@1", "TSA@10"}
    found = canonical_labels(obs, dataset_block(perturbation=perturbation, perturbation_type="drug"), NO_GENES, SCREEN)
    assert set(found) == {CONTROL, *drugs}


def test_doses_that_cannot_be_read_are_no_line_to_copy() -> None:
    with pytest.raises(InputError, match=r"give doses and times columns of their own \(perturbation\.dose"):
        drugs_told_of(["JQ1_-2", "JQ1_-1", "TSA_-2", "TSA_-1"])


DRUGS = (
    "AG-490", "AG-14361", "PD-0325901", "PD-98059", "PD98059", "5-FU", "SB203580", "SB 202190", "Vitamin D3",
    "Vitamin D2", "17-AAG", "JQ1", "BMS-754807",
    "BMS-536924", "BMS-911543", "Valproic acid", "Retinoic acid", "Sodium butyrate", "IL-2", "IL-4", "TNF-alpha",
    "1,25-dihydroxyvitamin D3",
    "Valproic acid (sodium salt)", "CUDC-101", "CUDC-907", "AR-42", "U-73122", "Compound 2a", "Compound 2b", "GSK J1",
    "GSK-LSD1", "Alisertib (MLN8237)",
    "ITSA-1", "(-)-Epicatechin", "IOX2", "TMP195", "S3I-201", "MK-0752", "INO-1001", "KW-2449", "LY-294002",
    "LY-2603618", "A-366", "A-196",
)  # fmt: skip
GENE_LABELS = (
    "HLA-A", "HLA-B", "HLA-C", "MT-CO1", "MT-CO2", "NKX2-1", "NKX2-2", "NKX3-1", "NKX3-2", "KRTAP1-1", "KRTAP1-3",
    "KRTAP2-1", "KRTAP2-3", "MIR1-1",
    "MIR1-2", "INS-IGF2", "RP11-34P13.7", "RP5-862P8.2", "AC118549.1", "AC118549.2", "KRAS_G12D", "KRAS_G12V",
    "TP53_R175H", "chr1.9538_top_two",
    "chr1.9538_second_two", "chr6:1234-5678", "ENSG00000143674", "TBCE_ENSG00000285053", "MARCH8", "SEPT9", "C1orf112",
    "SIRT1", "SHH", "CRKL", "GATA1",
)  # fmt: skip


def test_names_of_drugs_raise_no_alarm_of_any_kind() -> None:
    told, warnings = drugs_told_of(list(DRUGS))
    assert told == {"looks_like_control": {}, "no_gene": {}, "not_split": {}}
    assert not warnings


def test_names_of_genes_and_loci_raise_no_alarm_but_for_what_stands_beside_a_symbol() -> None:
    warnings: list[str] = []
    obs = pd.DataFrame({"perturbation": ["control", *GENE_LABELS]})
    told = doubtful_labels(obs, dataset_block(), NO_GENES, SCREEN, warnings)
    assert told == {"looks_like_control": {}, "no_gene": {}, "not_split": {}}
    assert [text.split(":")[0] for text in warnings] == [
        "4 labels hold a gene's symbol and more, so none finds its gene"
    ]


def test_a_symbol_in_other_letters_is_its_gene_and_no_perturbation_of_its_own() -> None:
    labels = ["control", "klf1", "KLF1", "Cebpa", "CEBPA", "c1ORF112", "rest", "NKX2-1", "nkx2-1"]
    genes = gene_table(pd.DataFrame(index=["KLF1", "REST"]), {"organism": "human"})
    found = canonical_labels(pd.DataFrame({"perturbation": labels}), dataset_block(), genes, SCREEN)
    assert set(found) == {CONTROL, "KLF1", "CEBPA", "FIRRM", "rest", "NKX2-1"}


def test_compounds_that_differ_in_letters_alone_are_told_with_the_rename() -> None:
    with pytest.raises(InputError, match=r'rename: \{"erlotinib": "Erlotinib"\}'):
        drugs_told_of(["Erlotinib", "erlotinib", "Gefitinib"])
    drugs_told_of(["Erlotinib", "erlotinib", "Gefitinib"], rename={"erlotinib": "Erlotinib"})


@pytest.mark.parametrize("changes", [{"control": ["DMSO"]}, {"dose": "dose"}])
def test_a_screen_of_drugs_that_is_not_declared_one_is_told(changes: dict) -> None:
    obs, warnings = pd.DataFrame({"perturbation": ["control", "DMSO", "THC", "MTX"], "dose": [0, 0, 1, 1]}), []
    doubtful_labels(obs, dataset_block(perturbation=changes, perturbation_type="unknown"), NO_GENES, SCREEN, warnings)
    assert "set perturbation_type: drug" in warnings[0]


# --- did you mean -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "first"),
    [
        ("klf1", "KLF1"),
        ("KLF1 ", "KLF1"),
        ("OCT4", "POU5F1"),
        ("oct4", "POU5F1"),
        ("CEBPAA", "CEBPA"),
        ("b+a", "A+B"),
        ("ZZZZZZ", None),
    ],
)
def test_the_nearest_name_is_found(name: str, first: str | None) -> None:
    close = nearest(name, ["KLF1", "POU5F1", "CEBPA", "A+B", *PERTURBED])
    assert (close[0] if close else None) == first


# --- cells without a perturbation -----------------------------------------------------------------------------------

WORDS = [
    "unassigned", "Unassigned", "not assigned", "not_assigned", "none", "None", "NA", "N/A", "n.a.", "NaN", "<NA>",
    "null", "ambiguous", "Ambiguous", "multiplet",
    "doublet", "Doublet_1", "doublet (A|B)", "negative", "Negative", "no guide", "no_sgRNA", "multi", "multiple",
    "Multiple guides", "unmapped",
    "unknown", "low quality", "LowQuality", "empty", "-", "--", "?", ".", "unclassified", "not detected",
    "undetermined", "no call", "missing",
]  # fmt: skip
NO_WORDS = [
    *["control", "non-targeting", "NegCtrl", "negative_control", "negative control 3", "no_target", "no-site",
      "empty_vector", "untreated", "NT", "AAVS1"],
    *["Nalidixic acid", "Nullin", "Multikinase inhibitor", "Unknownol", "Blankophor", "none-such", "Nanaomycin A",
      "Emptin", "Ambigol A", "NA-8"],
    *["assigned", "known", "mapped"], *GENES,
]  # fmt: skip


@pytest.mark.parametrize("word", WORDS)
def test_words_for_cells_without_a_perturbation_are_told(word: str) -> None:
    assert is_word(word, set())
    assert not is_word(word, {word}), "a gene of the screen is no such word"


@pytest.mark.parametrize("name", NO_WORDS)
def test_controls_compounds_and_genes_are_no_such_words(name: str) -> None:
    assert not is_word(name, set())


def test_no_approved_symbol_is_such_a_word() -> None:
    assert not [name for name in human_symbols().approved if WORD.fullmatch(name)]


def test_cells_without_a_perturbation_make_no_perturbation(tiny_screen: Callable, harmonized_from: Callable) -> None:
    screen = tiny_screen()
    screen.obs["perturbation"] = screen.obs["perturbation"].replace(
        {"TF1": "Unassigned", "TF2": "doublet", "TF1+TF2": "TF3+ambiguous"}
    )
    with pytest.raises(InputError) as raised:
        harmonized_from(screen)
    text = str(raised.value)
    del raised  # its traceback holds the file
    assert "3 labels say that cells have no single known perturbation" in text
    assert "(cells): 'Unassigned' (40), 'ambiguous' (40), 'doublet' (40)" in text
    line = re.search(r"perturbation\.drop: (\[.*?\])\. ", text)[1]
    assert line == '["nan", "*", "", "Unassigned", "ambiguous", "doublet"]'
    result = harmonized_from(screen, perturbation={"drop": yaml.safe_load(line)})
    assert result.account["cells"]["dropped"]["unassigned"] == 120
    assert not {"Unassigned", "doublet", "TF3+ambiguous"} & set(result.adata.obs["perturbation"])
    assert result.account["perturbations"]["kept"]["control"] == 80
    renamed = {"Unassigned": "POOL1", "doublet": "POOL2", "ambiguous": "POOL3"}
    kept = harmonized_from(screen, perturbation={"rename": renamed})
    assert {"POOL1", "POOL2", "POOL3+TF3"} <= set(kept.adata.obs["perturbation"])
    kept = harmonized_from(
        screen, perturbation={"control": ["control", "Unassigned"], "drop": ["doublet", "ambiguous"]}
    )
    assert kept.account["perturbations"]["kept"]["control"] == 120


def test_a_frequent_label_that_is_no_gene_and_no_control_is_told(
    tiny_screen: Callable, harmonized_from: Callable, caplog: pytest.LogCaptureFixture
) -> None:
    screen = tiny_screen()
    labels = screen.obs["perturbation"].to_numpy(str).astype(object)
    labels[labels == "control"] = ["control", "rubbish"] * 40
    screen.obs["perturbation"] = labels
    screen = ad.concat([screen, *[screen[labels == "rubbish"]] * 11], index_unique="-")
    told = harmonized_from(screen)
    assert told.account["perturbations"]["no_gene"] == {"rubbish": 480}
    assert "1 frequent label is no known gene and no control (cells): 'rubbish' (480)" in caplog.text
    assert "perturbation.drop" in caplog.text
    assert any("'rubbish' (480)" in warning for warning in told.account["warnings"])
    screen.obs["perturbation"] = screen.obs["perturbation"].astype(str).replace("rubbish", "Staurosporine")
    assert harmonized_from(screen, perturbation_type="drug").account["perturbations"]["no_gene"] == {}
