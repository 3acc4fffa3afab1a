"""The configuration: a good one is completed, a bad one is explained in the user's words, with file, key, value and fix."""

import copy
import re
from dataclasses import replace
from pathlib import Path
from urllib.parse import quote

import pytest
import yaml
from conftest import REPOSITORY, merged
from hypothesis import given
from hypothesis import strategies as st

from perturbflow.errors import InputError
from perturbflow.registry.config import complete
from perturbflow.registry.families import FAMILIES, REFERENCES
from perturbflow.registry.plan import Plan
from perturbflow.registry.shipped import shipped_files
from perturbflow.registry.sources import SAFE_NAME, file_name, scperturb_files

CONFIG = REPOSITORY / "config"
CLOSED = ["no_change", "additive", "linear"]

URL = {"url": ["https://example.org/a.h5ad"]}
SUM = "0" * 64
NORMAN = "NormanWeissman2019_filtered"


def mine(tmp_path: Path) -> dict:
    """Return a good configuration of a user, with a screen of theirs."""
    screen = tmp_path / "screen.h5ad"
    screen.write_bytes(b"content")
    return {
        "select": {
            "datasets": ["my_screen"],
            "splits": ["unseen_combination"],
            "models": list(CLOSED),
            "seeds": [0, 1],
        },
        "datasets": {
            "my_screen": {
                "source": {"path": str(screen)},
                "perturbation": {"column": "guide", "control": ["NT"]},
                "combinations": True,
            }
        },
        "splits": {"frozen": {"kind": "file", "path": str(tmp_path / "roles.json")}},
    }


def planned(config: dict, tmp_path: Path) -> Plan:
    """Return the plan of the user's configuration, which lies in mine.yaml."""
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(config))
    return Plan(merged(config), [*shipped_files(), path])


def block(source: dict) -> dict:
    """Return the smallest block with a source."""
    return {"source": source, "perturbation": {"column": "a", "control": ["b"]}}


def unpublished(url: str, **source: str) -> dict:
    """Return the smallest block with a URL whose checksum nobody publishes."""
    return {**block({"url": [url], **source}), "checksum": "unpublished"}


def set_at(config: dict, dotted: str, value: object) -> None:
    """Set a value deep in a configuration."""
    *parents, last = dotted.split(".")
    for key in parents:
        config = config.setdefault(key, {})
    config[last] = value


# --- good -----------------------------------------------------------------------------------------------------------


def test_the_default_configuration_is_complete_and_passes() -> None:
    config = complete(merged({}), [])
    assert config["select"]["datasets"] == ["renge2023"]
    assert config["models"]["linear"]["params"] == {"n_components": 10, "ridge": 0.1}
    assert config["datasets"]["renge2023"]["perturbation"]["separator"] == "+"


def test_a_good_configuration_gets_defaults(tmp_path: Path) -> None:
    plan = planned(mine(tmp_path), tmp_path)
    block = plan.config["datasets"]["my_screen"]
    assert block["organism"] == "human"
    assert block["perturbation_type"] == "unknown"
    assert block["subset"] == {}
    assert block["covariates"] == {}
    assert block["perturbation"] == {"column": "guide", "control": ["NT"], "separator": "+", "drop": ["nan", "*", ""]}
    assert plan.config["splits"]["unseen_combination"]["seed"] == 0
    assert plan.config["embeddings"] == {"sources": ["coexpression"]}


def test_the_plan_is_the_product_of_the_selection(tmp_path: Path) -> None:
    runs = planned(mine(tmp_path), tmp_path).runs
    assert set(map(tuple, runs[["dataset", "split", "model", "seed"]].to_numpy())) == {
        ("my_screen", "unseen_combination", model, seed) for model in {*CLOSED, *REFERENCES} for seed in (0, 1)
    }
    assert set(runs["family"]) == {*CLOSED, *REFERENCES}


def test_floors_and_ceilings_run_whether_listed_or_not(tmp_path: Path) -> None:
    config = mine(tmp_path)
    runs = {}
    for listed in (["linear"], ["linear", "perturbed_mean"], ["linear", *REFERENCES]):
        config["select"]["models"] = listed
        runs[len(listed)] = set(map(tuple, planned(config, tmp_path).runs.to_numpy()))
    assert runs[1] == runs[2] == runs[6]
    config["models"] = {"my_floor": {"family": "no_change"}}
    config["select"]["models"] = ["linear", "my_floor"]
    families = planned(config, tmp_path).families
    assert "no_change" not in families, "a listed model of the family is the floor"
    assert families["my_floor"] == "no_change"


def test_floors_and_ceilings_need_no_block_and_their_names_are_taken(tmp_path: Path) -> None:
    config = mine(tmp_path)
    config["models"] = {"linear": {"family": "linear"}}
    config["select"] |= {"splits": ["genes"], "models": ["linear"]}
    config["splits"] = {"genes": {"kind": "unseen_perturbation", "test_fraction": 0.25}}
    assert set(Plan(config).runs["model"]) == {"linear", *REFERENCES}
    config["models"]["perfect_mean"] = {"family": "linear"}
    with pytest.raises(
        InputError, match=r"models.perfect_mean: floors and ceilings always run.*family linear another name"
    ):
        Plan(config)


def test_the_configuration_that_is_handed_over_is_left_as_it_is(tmp_path: Path) -> None:
    config = merged(mine(tmp_path))
    before = copy.deepcopy(config)
    complete(config)
    assert config == before


def test_two_models_may_share_a_family(tmp_path: Path) -> None:
    config = mine(tmp_path)
    config["models"] = {"stiff": {"family": "linear", "params": {"ridge": 5.0}}}
    config["select"]["models"] = ["linear", "stiff"]
    plan = planned(config, tmp_path)
    assert plan.config["models"]["stiff"]["params"] == {"n_components": 10, "ridge": 5.0}
    assert plan.config["models"]["linear"]["params"]["ridge"] == 0.1
    assert {"linear", "stiff"} <= set(plan.models_of_rule("train_closed_form"))


def test_a_datasets_own_qc_overrides_the_global_one(tmp_path: Path) -> None:
    config = mine(tmp_path)
    config["qc"] = {"min_genes": 7}
    config["datasets"]["my_screen"]["qc"] = {"min_counts": 11, "max_pct_mt": None}
    plan = planned(config, tmp_path)
    assert plan.qc("my_screen") == {
        "min_counts": 11, "min_genes": 7, "max_pct_mt": None, "min_cells_per_gene": 10, "min_cells_per_perturbation": 30,
        "min_efficacy": None, "min_cell_efficacy": None,
    }  # fmt: skip
    assert plan.qc("renge2023")["min_counts"] == 50


def test_blocks_that_are_not_selected_may_name_files_that_are_not_there(tmp_path: Path) -> None:
    config = mine(tmp_path)
    config["datasets"]["elsewhere"] = {
        "source": {"path": "/no/such/file.h5ad"}, "perturbation": {"column": "guide", "control": ["NT"]},
    }  # fmt: skip
    config["splits"]["later"] = {"kind": "file", "path": "/no/such/split.json"}
    plan = planned(config, tmp_path)
    assert set(plan.runs["dataset"]) == {"my_screen"}


def test_every_family_of_the_schema_is_implemented_somewhere_and_no_other() -> None:
    schema = yaml.safe_load((CONFIG / "schemas" / "models.schema.yaml").read_text())
    assert set(schema["additionalProperties"]["properties"]["family"]["enum"]) == set(FAMILIES) == set(schema["$defs"])


# --- effort ---------------------------------------------------------------------------------------------------------


def test_an_effort_decides_what_the_configuration_leaves_open(tmp_path: Path) -> None:
    config = mine(tmp_path)
    del config["select"]["seeds"]
    config["select"]["models"] = ["additive", "jepa", "own"]
    config["models"] = {"own": {"family": "diffusion", "params": {"n_steps": 77}}}
    for effort, seeds, steps in (("quick", 1, 1200), ("standard", 3, 1200), ("thorough", 5, 3600)):
        plan = planned({**config, "effort": effort}, tmp_path)
        params = plan.config["models"]["jepa"]["params"]
        assert sorted(plan.runs["seed"].unique()) == list(range(seeds))
        assert (params["n_steps"], params["n_steps_decoder"]) == (steps, steps / 1200 * 1000)
        assert plan.config["models"]["own"]["params"]["n_steps"] == 77
        assert plan.config["models"]["own"]["params"]["n_sampling_steps"] == 15
        assert ("For claims, set effort: standard" in plan.effort) == (effort == "quick")
    config["select"] |= {"models": ["additive"], "seeds": [7]}
    plan = planned({**config, "effort": "thorough"}, tmp_path)
    assert set(plan.runs["seed"]) == {7}
    assert planned(config, tmp_path).effort == "", "no network is trained"


def test_null_is_one_split_a_held_out_context_where_one_is_named(tmp_path: Path) -> None:
    config = mine(tmp_path)
    config["select"]["splits"] = None
    assert set(planned(config, tmp_path).divisions["split"]) == {"unseen_perturbation"}
    config["select"]["datasets"] = ["renge2023"]
    assert set(planned(config, tmp_path).divisions["split"]) == {"unseen_context"}


def test_null_asks_the_questions_whose_dataset_split_and_model_are_selected(tmp_path: Path) -> None:
    config = mine(tmp_path)
    asked = {"dataset": "my_screen", "split": "unseen_combination", "perturbations": ["A"]}
    config["counterfactuals"] = {
        "here": {**asked, "model": "ridge"},
        "elsewhere": {**asked, "model": "random_forest"},
    }
    config["select"] |= {"models": ["additive", "ridge"], "counterfactuals": None}
    assert set(planned(config, tmp_path).queries["query"]) == {"here"}
    config["select"]["counterfactuals"] = []
    assert planned(config, tmp_path).queries.empty


# --- sources --------------------------------------------------------------------------------------------------------


def test_scperturb_stands_for_urls_bytes_and_md5(tmp_path: Path) -> None:
    config = mine(tmp_path)
    for name, source in (("short", NORMAN), ("long", f"{NORMAN}.h5ad")):
        config["datasets"][name] = block({"scperturb": source})
    plan = planned(config, tmp_path)
    assert plan.files("short") == plan.files("long") == {
        "file": {
            "name": "NormanWeissman2019_filtered.h5ad",
            "url": [
                "https://zenodo.org/api/records/13350497/files/NormanWeissman2019_filtered.h5ad/content",
                "https://zenodo.org/records/13350497/files/NormanWeissman2019_filtered.h5ad?download=1",
            ],
            "bytes": 698680199,
            "md5": "c870e6967d91c017d9da827bab183cd6",
        }
    }  # fmt: skip
    assert plan.config["datasets"]["short"]["bytes"] == 698680199


def test_a_block_may_repeat_what_scperturb_says_and_add_to_it(tmp_path: Path) -> None:
    config = mine(tmp_path)
    declared = {"bytes": 698680199, "md5": "c870e6967d91c017d9da827bab183cd6", "sha256": SUM}
    config["datasets"]["norman"] = {**block({"scperturb": NORMAN}), **declared}
    file = planned(config, tmp_path).files("norman")["file"]
    assert {key: file[key] for key in declared} == declared


def test_the_table_of_scperturb_is_the_records() -> None:
    files = scperturb_files()
    assert len(files) == 54
    assert files["bytes"].sum() == 43_042_767_207
    assert files["md5"].str.fullmatch("[0-9a-f]{32}").all()
    assert files.index.is_unique
    assert all(SAFE_NAME.fullmatch(name) for name in files.index)


def test_files_of_a_source_have_roles_and_names(tmp_path: Path) -> None:
    config = mine(tmp_path)
    matrix = {"url": ["https://a.org/x/GSE1_matrix.mtx.gz", "https://b.org/7"], "bytes": 3, "md5": SUM[:32]}
    genes = {"url": ["https://a.org/datafile/8"], "name": "genes.tsv", "checksum": "unpublished"}
    config["datasets"]["triplet"] = block({"files": {"matrix": matrix, "genes": genes}})
    assert planned(config, tmp_path).files("triplet") == {
        "matrix": {"name": "GSE1_matrix.mtx.gz", **matrix},
        "genes": genes,
    }


def test_a_package_is_named_as_its_source_distribution() -> None:
    plan = Plan(merged({}))
    assert plan.files("renge2023")["file"]["name"] == "renge-0.0.5.tar.gz"


def test_the_users_own_file_is_not_retrieved(tmp_path: Path) -> None:
    assert planned(mine(tmp_path), tmp_path).files("my_screen") == {}


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("https://zenodo.org/api/records/1/files/a%20b.h5ad/content", "a b.h5ad"),
        ("https://zenodo.org/records/1/files/a.h5ad?download=1", "a.h5ad"),
        ("https://example.org/content", "content"),
        ("https://example.org/a/", ""),
    ],
)
def test_a_url_names_its_file(url: str, name: str) -> None:
    assert file_name(url) == name


@given(st.text(), st.sampled_from(["", "/content", "?download=1", "%2F..", "/..", "%00"]))
def test_a_name_that_is_taken_stays_in_its_folder(text: str, end: str) -> None:
    for name in (
        text,
        file_name(f"https://example.org/a/{text}{end}"),
        file_name(f"https://example.org/a/{quote(text, safe='')}{end}"),
    ):
        if SAFE_NAME.fullmatch(name):
            assert Path(f"/folder/{name}").resolve().parent == Path("/folder")
            assert not name.startswith(".")


def test_the_same_bytes_are_the_same_whatever_the_way(tmp_path: Path) -> None:
    config = mine(tmp_path)
    pinned = {**block({"url": ["https://a.org/x.h5ad"]}), "bytes": 3, "md5": SUM[:32]}
    config["datasets"]["screen"] = pinned

    def read() -> tuple[dict, dict]:
        plan = planned(config, tmp_path)
        return plan.content("screen"), plan.dataset("screen")

    content, dataset = read()
    pinned["source"] = {"url": ["https://b.org/x.h5ad", "https://a.org/x.h5ad"]}
    config["mirror"] = str(tmp_path)
    assert read() == (content, dataset)
    pinned["md5"] = "1" + SUM[:31]
    assert read()[0] != content


def test_where_nothing_is_published_the_url_is_all_there_is(tmp_path: Path) -> None:
    config = mine(tmp_path)
    config["datasets"]["screen"] = unpublished("https://a.org/x.h5ad")
    before = planned(config, tmp_path).content("screen")
    config["datasets"]["screen"] = unpublished("https://b.org/x.h5ad")
    assert planned(config, tmp_path).content("screen") != before


# --- priors ---------------------------------------------------------------------------------------------------------


def with_own_prior(tmp_path: Path, **changes: object) -> dict:
    """Return a configuration that takes GO from files of the user's own."""
    for name in ("goa.gaf", "go.obo"):
        (tmp_path / name).write_text(name)
    paths = {"annotations": str(tmp_path / "goa.gaf"), "ontology": str(tmp_path / "go.obo")}
    prior = {"kind": "go", "source": {"path": paths}, **changes}
    return {**mine(tmp_path), "priors": {"my_go": prior}, "embeddings": {"sources": ["coexpression", "my_go"]}}


def test_the_shipped_priors_are_pinned_or_say_that_they_cannot_be() -> None:
    plan = Plan(merged({"embeddings": {"sources": ["coexpression", "go", "ppi", "string_full"]}}))
    assert plan.priors == ["go", "ppi", "string_full"]
    assert {"bytes", "md5", "sha256"} <= set(plan.files("go")["file"])
    assert len(plan.files("go")["file"]["url"]) == 3
    for name in ("ppi", "string_full"):
        assert {role: file["checksum"] for role, file in plan.files(name).items()} == {
            "links": "unpublished",
            "info": "unpublished",
        }


def test_a_prior_counts_where_it_is_selected(tmp_path: Path) -> None:
    config = with_own_prior(tmp_path)
    plan = planned(config, tmp_path)
    assert plan.priors == ["my_go"]
    assert plan.files("my_go") == {}
    config["embeddings"] = {"sources": ["coexpression"]}
    (tmp_path / "go.obo").unlink()  # nobody asks for it
    assert planned(config, tmp_path).priors == []


def test_a_priors_own_file_has_to_be_there(tmp_path: Path) -> None:
    config = with_own_prior(tmp_path)
    (tmp_path / "go.obo").unlink()
    with pytest.raises(InputError, match=r"mine\.yaml: priors\.my_go\.source\.path: there is no file '.*go\.obo'"):
        planned(config, tmp_path)


def test_a_prior_is_of_the_screens_organism(tmp_path: Path) -> None:
    config = with_own_prior(tmp_path)
    config["datasets"]["my_screen"]["organism"] = "mouse"
    with pytest.raises(InputError, match="'my_go' knows human genes, and my_screen is of another organism"):
        planned(config, tmp_path)
    config["priors"]["my_go"]["organism"] = "mouse"
    assert planned(config, tmp_path).priors == ["my_go"]


# --- selections that cannot be --------------------------------------------------------------------------------------


def test_a_split_that_a_screen_cannot_serve_is_left_out_with_one_sentence(tmp_path: Path) -> None:
    config = mine(tmp_path)
    config["datasets"]["my_screen"]["combinations"] = False
    config["select"]["splits"] = ["unseen_perturbation", "unseen_combination"]
    plan = planned(config, tmp_path)
    assert set(plan.runs["split"]) == {"unseen_perturbation"}
    assert len(plan.left_out) == 1
    assert "my_screen × unseen_combination is left out" in plan.left_out[0]
    assert "combinations: false" in plan.left_out[0]


def test_nothing_left_to_run_is_an_error(tmp_path: Path) -> None:
    config = mine(tmp_path)
    config["datasets"]["my_screen"]["combinations"] = False
    with pytest.raises(InputError, match=r"Nothing is left to run.*my_screen × unseen_combination"):
        planned(config, tmp_path)


@pytest.mark.parametrize(
    ("selected", "said", "divisions"),
    [
        ({"splits": [], "models": []}, "select.splits is empty.*my_screen will be harmonized", []),
        ({"splits": []}, "select.splits is empty.*my_screen will be harmonized", []),
        (
            {"seeds": []},
            "select.seeds is empty.*my_screen will be harmonized, split and paired",
            [("my_screen", "unseen_combination")],
        ),
        (
            {"models": []},
            "select.models is empty.*my_screen will be harmonized, split and paired",
            [("my_screen", "unseen_combination")],
        ),
    ],
)
def test_a_screen_is_made_ready_where_nothing_is_to_be_trained(
    selected: dict, said: str, divisions: list, tmp_path: Path
) -> None:
    config = mine(tmp_path)
    config["select"] |= selected
    plan = planned(config, tmp_path)
    assert plan.runs.empty
    assert plan.datasets == ["my_screen"]
    assert list(plan.divisions.itertuples(index=False, name=None)) == divisions
    assert re.search(said, plan.left_out[-1])
    assert plan.folders() == ["resources/my_screen", "results/my_screen"]


def test_a_number_is_a_text_where_a_text_is_meant(tmp_path: Path) -> None:
    config = mine(tmp_path)
    config["datasets"]["my_screen"]["perturbation"] |= {"control": [6, 7.5], "drop": [-1], "rename": {12: "KLF1"}}
    config["datasets"]["my_screen"]["covariates"] = {"batch": [1, "lane"], "cell_type": {"value": 562}}
    block = planned(config, tmp_path).config["datasets"]["my_screen"]
    assert block["perturbation"]["control"] == ["6", "7.5"]
    assert block["perturbation"]["drop"] == ["-1"]
    assert block["perturbation"]["rename"] == {"12": "KLF1"}
    assert block["covariates"] == {"batch": ["1", "lane"], "cell_type": {"value": "562"}}


@pytest.mark.parametrize("held_out", [["KLF1", "SPI1"], {"my_screen": ["KLF1", "SPI1"]}])
@pytest.mark.parametrize("kind", ["unseen_perturbation", "unseen_combination", "unseen_context"])
def test_what_is_named_in_full_needs_no_fraction(kind: str, held_out: list | dict, tmp_path: Path) -> None:
    config = mine(tmp_path)
    config["datasets"]["my_screen"]["covariates"] = {"batch": "lane"}
    config["splits"]["named"] = {"kind": kind, "held_out": held_out}
    config["select"]["splits"] = ["named"]
    plan = planned(config, tmp_path)
    assert plan.split("named", "my_screen")["held_out"] == ["KLF1", "SPI1"]
    assert bool(plan.naming("named", "my_screen")) == (kind != "unseen_context")


def test_a_screen_without_names_and_without_a_fraction_is_left_out(tmp_path: Path) -> None:
    config = mine(tmp_path)
    config["splits"]["named"] = {"kind": "unseen_perturbation", "held_out": {"renge2023": ["SOX2"]}}
    config["select"]["splits"] = ["named", "unseen_combination"]
    assert planned(config, tmp_path).left_out == [
        "my_screen × named is left out: held_out names nothing of my_screen, and there is no test_fraction."
    ]


def test_only_what_reads_labels_is_part_of_a_split_that_names_some(tmp_path: Path) -> None:
    config = mine(tmp_path)
    (tmp_path / "roles.json").write_text("{}")
    config["select"]["splits"] = ["frozen", "unseen_combination"]
    before = planned(config, tmp_path)
    assert before.naming("unseen_combination", "my_screen") == {}
    declared = config["datasets"]["my_screen"]["perturbation"]
    declared["drop"] = ["nothing"]
    assert planned(config, tmp_path).naming("frozen", "my_screen") == before.naming("frozen", "my_screen")
    declared["separator"] = "|"
    assert planned(config, tmp_path).naming("frozen", "my_screen") != before.naming("frozen", "my_screen")


def test_combinations_that_are_not_declared_do_not_keep_a_split_out(tmp_path: Path) -> None:
    config = mine(tmp_path)
    del config["datasets"]["my_screen"]["combinations"]
    plan = planned(config, tmp_path)
    assert set(plan.runs["split"]) == {"unseen_combination"}
    assert plan.left_out == []


def test_a_family_that_serves_some_kinds_of_split_is_left_out_of_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(
        FAMILIES, "linear", replace(FAMILIES["linear"], split_kinds=("unseen_perturbation", "unseen_context"))
    )
    config = query(mine(tmp_path), model="linear")
    config["select"]["splits"] = ["unseen_perturbation", "unseen_combination"]
    plan = planned(config, tmp_path)
    assert set(plan.runs.loc[plan.runs["model"] == "linear", "split"]) == {"unseen_perturbation"}
    assert set(plan.runs.loc[plan.runs["model"] == "additive", "split"]) == {
        "unseen_perturbation",
        "unseen_combination",
    }
    why = "is left out: family linear serves unseen_perturbation, unseen_context only."
    assert plan.left_out == [f"linear × unseen_combination {why}", f"counterfactual why {why}"]
    assert plan.queries.empty


def test_a_screen_without_the_covariate_has_no_contexts_to_hold_out(tmp_path: Path) -> None:
    config = mine(tmp_path)
    config["select"]["splits"] = ["unseen_combination", "unseen_context"]
    plan = planned(config, tmp_path)
    assert plan.left_out == [
        "my_screen × unseen_context is left out: my_screen declares no covariates.batch, so all its cells are of one context."
    ]
    for covariates in ({"batch": "lane"}, {"dataset": "study"}):
        config["datasets"]["my_screen"]["covariates"] = covariates
        plan = planned(config, tmp_path)
        assert set(plan.runs["split"]) == {"unseen_combination", "unseen_context"}
        assert plan.left_out == []


def test_a_screens_division_reads_its_own_held_out_contexts(tmp_path: Path) -> None:
    config = mine(tmp_path)
    config["datasets"]["my_screen"]["covariates"] = {"batch": "lane"}
    config["select"]["splits"] = ["unseen_context"]
    plan = planned(config, tmp_path)
    assert plan.split("unseen_context", "renge2023")["held_out"] == ["day_5"]
    assert "held_out" not in plan.split("unseen_context", "my_screen")
    assert "covariate" not in plan.split("unseen_combination", "my_screen"), (
        "keys that a kind has no use for are not filled in"
    )
    before = plan.split("unseen_context", "my_screen")
    set_at(config, "splits.unseen_context.held_out", {"renge2023": ["day_2"]})
    assert planned(config, tmp_path).split("unseen_context", "my_screen") == before
    set_at(config, "splits.unseen_context.held_out", {"my_screen": ["lane 2"]})
    assert planned(config, tmp_path).split("unseen_context", "my_screen") != before


# --- folds ----------------------------------------------------------------------------------------------------------


def with_folds(tmp_path: Path, *selected: str) -> dict:
    """Return a configuration with three folds of genes."""
    config = mine(tmp_path)
    config["splits"]["genes"] = {"kind": "unseen_perturbation", "folds": 3}
    config["select"]["splits"] = list(selected)
    return config


@pytest.mark.parametrize(
    "selected", [("genes",), ("genes", "genes_fold_1"), ("genes_fold_0", "genes_fold_1", "genes_fold_2")]
)
def test_folds_stand_for_splits_of_their_own(selected: tuple[str, ...], tmp_path: Path) -> None:
    plan = planned(with_folds(tmp_path, *selected), tmp_path)
    assert list(dict.fromkeys(plan.runs["split"])) == ["genes_fold_0", "genes_fold_1", "genes_fold_2"]
    assert plan.split("genes_fold_1", "my_screen") == {
        "kind": "unseen_perturbation", "folds": 3, "fold": 1, "name": "genes", "validation_fraction": 0.1, "seed": 0,
    }  # fmt: skip
    assert "genes" not in plan.config["splits"]
    assert [plan.split(f"genes_fold_{i}", "my_screen")["fold"] for i in range(3)] == [0, 1, 2]


def test_one_fold_can_be_selected_and_asked(tmp_path: Path) -> None:
    plan = planned(query(with_folds(tmp_path, "genes_fold_2"), split="genes_fold_1"), tmp_path)
    assert set(plan.runs["split"]) == {"genes_fold_2"}
    assert set(plan.queries["split"]) == {"genes_fold_1"}


def test_a_query_names_one_fold(tmp_path: Path) -> None:
    with pytest.raises(
        InputError,
        match=r"mine.yaml: counterfactuals.why.split: 'genes' has folds.*genes_fold_0, genes_fold_1, genes_fold_2",
    ):
        planned(query(with_folds(tmp_path, "genes"), split="genes"), tmp_path)


def test_folds_that_cannot_be_are_left_out_with_one_sentence(tmp_path: Path) -> None:
    config = with_folds(tmp_path, "unseen_perturbation", "doubles")
    config["datasets"]["my_screen"]["combinations"] = False
    config["splits"]["doubles"] = {"kind": "unseen_combination", "folds": 5}
    assert planned(config, tmp_path).left_out == [
        "my_screen × doubles is left out: my_screen holds no combinations (combinations: false)."
    ]


# --- bad ------------------------------------------------------------------------------------------------------------

# what is set where, and what the message must hold
BAD = {
    # typos, in every kind of key
    "top level": ("sellect", {}, ["mine.yaml: the top level: unknown key 'sellect'", "Did you mean 'select'?"]),
    "select": ("select.modles", ["linear"], ["mine.yaml: select: unknown key 'modles'", "Did you mean 'models'?"]),
    "qc": ("qc.min_count", 5, ["mine.yaml: qc: unknown key 'min_count'", "Did you mean 'min_counts'?"]),
    "genes": ("genes.n_hvgs", 5, ["mine.yaml: genes: unknown key 'n_hvgs'", "Did you mean 'n_hvg'?"]),
    "embeddings": ("embeddings.source", ["coexpression"], ["mine.yaml: embeddings: unknown key 'source'", "'sources'"]),
    "predict": ("predict.max_cell", 5, ["mine.yaml: predict: unknown key 'max_cell'", "Did you mean 'max_cells'?"]),
    "dataset": ("datasets.my_screen.organsim", "human", ["mine.yaml: datasets.my_screen: unknown key 'organsim'", "'organism'"]),
    "dataset qc": ("datasets.my_screen.qc", {"max_mt": 5}, ["mine.yaml: datasets.my_screen.qc: unknown key 'max_mt'", "max_pct_mt"]),
    "source": ("datasets.my_screen.source.pth", "x", ["mine.yaml: datasets.my_screen.source: unknown key 'pth'", "'path'"]),
    "perturbation": (
        "datasets.my_screen.perturbation.colum", "x",
        ["mine.yaml: datasets.my_screen.perturbation: unknown key 'colum'", "Did you mean 'column'?"],
    ),
    "covariates": (
        "datasets.my_screen.covariates", {"celltype": "x"},
        ["mine.yaml: datasets.my_screen.covariates: unknown key 'celltype'", "Did you mean 'cell_type'?"],
    ),
    "split": ("splits.frozen.test_frction", 0.5, ["mine.yaml: splits.frozen: unknown key 'test_frction'", "'test_fraction'"]),
    "model": ("models.mine", {"family": "linear", "parms": {}}, ["mine.yaml: models.mine: unknown key 'parms'", "'params'"]),
    "params": (
        "models.mine", {"family": "linear", "params": {"rigde": 1}},
        ["mine.yaml: models.mine.params: unknown key 'rigde'", "Did you mean 'ridge'?"],
    ),
    "counterfactual": (
        "counterfactuals.mine", {"dataset": "a", "split": "b", "model": "c", "perturbations": ["A"], "sample_per_cell": 3},
        ["mine.yaml: counterfactuals.mine: unknown key 'sample_per_cell'", "Did you mean 'samples_per_cell'?"],
    ),
    # names that are not there
    "no such model": ("select.models", ["jepa2"], ["mine.yaml: ", "model 'jepa2' is selected", "models.yaml", "Did you mean 'jepa'?", "jepa_off"]),
    "a split for no such dataset": (
        "splits.mine", {"kind": "file", "path": "x.json", "datasets": ["my_scren"]},
        ["mine.yaml: splits.mine.datasets: there is no dataset 'my_scren'", "Did you mean 'my_screen'?"],
    ),
    "no such split of folds": (
        "select.splits", ["leave_one_line_ou"], ["split 'leave_one_line_ou'", "Did you mean 'leave_one_line_out'?"],
    ),
    "no such split": ("select.splits", ["unseen_perturbations"], ["split 'unseen_perturbations'", "Did you mean 'unseen_perturbation'?"]),
    "no such dataset": ("select.datasets", ["my_scren"], ["dataset 'my_scren'", "datasets.yaml", "Did you mean 'my_screen'?"]),
    "no such query": ("select.counterfactuals", ["what"], ["counterfactual 'what'", "counterfactuals.yaml", "Known: "]),
    "unknown family": (
        "models.mine", {"family": "jeppa"}, ["mine.yaml: models.mine.family: 'jeppa' is not possible.", "Did you mean 'jepa'?"],
    ),
    "unknown kind": (
        "splits.frozen.kind", "unseen_perturbtion", ["splits.frozen.kind: 'unseen_perturbtion' is not possible.", "'unseen_perturbation'?"],
    ),
    "unknown technology": (
        "datasets.my_screen.perturbation_type", "CRISPR", ["datasets.my_screen.perturbation_type: 'CRISPR' is not possible", "CRISPRi"],
    ),
    "unknown device": ("device", "gpu", ["mine.yaml: device: 'gpu' is not possible.", "cuda"]),
    "upper-case name": (
        "datasets.My-Screen", {"source": URL, "perturbation": {"column": "a", "control": ["b"]}}, ["'My-Screen' cannot be a name", "lower-case"],
    ),
    # sources
    "missing file": (
        "datasets.my_screen.source", {"path": "not_here.h5ad"},
        ["mine.yaml: datasets.my_screen.source.path: there is no file 'not_here.h5ad'", "working directory"],
    ),
    "two sources": (
        "datasets.my_screen.source", {"path": "a.h5ad", **URL},
        ["mine.yaml: datasets.my_screen.source: give exactly one of path, url, pypi, scperturb, files (found: path, url)"],
    ),
    "no source": ("datasets.my_screen.source", {"member": "x"}, ["give exactly one of path, url, pypi, scperturb, files (found: none)"]),
    "url without checksum": (
        "datasets.my_screen.source", URL, ["mine.yaml: datasets.my_screen: a source by url needs bytes and one of md5, sha256"],
    ),
    "url without size": (
        "datasets.my_screen",
        {"source": URL, "sha256": SUM, "perturbation": {"column": "a", "control": ["b"]}},
        ["datasets.my_screen: a source by url needs bytes"],
    ),
    "pypi without checksum": (
        "datasets.my_screen", {"source": {"pypi": "a==1"}, "md5": "0" * 32, "perturbation": {"column": "a", "control": ["b"]}},
        ["datasets.my_screen: a source by pypi needs sha256"],
    ),
    "pypi without version": ("datasets.my_screen.source", {"pypi": "renge"}, ["datasets.my_screen.source.pypi", "'renge'"]),
    "url is no list": ("datasets.my_screen.source", {"url": "https://a"}, ["datasets.my_screen.source.url: 'https://a' must be a list"]),
    "unpublished, and published": (
        "datasets.my_screen", {**block(URL), "bytes": 1, "md5": SUM[:32], "checksum": "unpublished"},
        ["mine.yaml: datasets.my_screen: its size and checksum are given. Leave checksum: unpublished out."],
    ),
    "package without checksum, declared so": (
        "datasets.my_screen", {**block({"pypi": "a==1"}), "checksum": "unpublished"}, ["datasets.my_screen: a source by pypi needs sha256"],
    ),
    "no such file of scPerturb": (
        "datasets.my_screen", block({"scperturb": "NormanWeissman2019"}),
        ["mine.yaml: datasets.my_screen.source.scperturb: record 13350497 holds no 'NormanWeissman2019.h5ad'", "NormanWeissman2019_filtered"],
    ),
    "other bytes than scPerturb's": (
        "datasets.my_screen", {**block({"scperturb": NORMAN}), "bytes": 7},
        ["mine.yaml: datasets.my_screen.bytes: 7 is declared, but NormanWeissman2019_filtered.h5ad", "698680199", "Leave bytes out"],
    ),
    "other md5 than scPerturb's": ("datasets.my_screen", {**block({"scperturb": NORMAN}), "md5": SUM[:32]}, ["datasets.my_screen.md5: 000"]),
    "scPerturb unpublished": (
        "datasets.my_screen", {**block({"scperturb": NORMAN}), "checksum": "unpublished"}, ["datasets.my_screen.checksum: size and md5"],
    ),
    "size beside several files": (
        "datasets.my_screen", {**block({"files": {"matrix": {**URL, "checksum": "unpublished"}}}), "bytes": 7},
        ["mine.yaml: datasets.my_screen.bytes: in a source of several files", "source.files"],
    ),
    "one of several files without checksum": (
        "datasets.my_screen", block({"files": {"matrix": {**URL, "bytes": 3}}}),
        ["mine.yaml: datasets.my_screen.source.files.matrix: a source by url needs bytes and one of md5, sha256", "checksum: unpublished"],
    ),
    "two files of one name": (
        "datasets.my_screen",
        block({"files": {"a": {**URL, "checksum": "unpublished"}, "b": {"url": ["https://b.org/A.h5ad"], "checksum": "unpublished"}}}),
        ["mine.yaml: datasets.my_screen.source.files: a and b would have the same name", "with the key name"],
    ),
    "a key that no file has": (
        "datasets.my_screen", block({"files": {"a": {**URL, "size": 3}}}), ["mine.yaml: datasets.my_screen.source.files.a: unknown key 'size'"],
    ),
    "url without a file": ("datasets.my_screen", unpublished("https://a.org/get/?acc=1"), ["the name of the file would be ''", "key name"]),
    "url that leads out": ("datasets.my_screen", unpublished("https://a.org/..%2F..%2Fx"), ["the name of the file would be '../../x'"]),
    "name that leads out": ("datasets.my_screen", unpublished("https://a.org/x", name="/etc/x"), ["would be '/etc/x'"]),
    "name of ours": ("datasets.my_screen", unpublished("https://a.org/manifest.json"), ["would be 'manifest.json'"]),
    "hidden name": ("datasets.my_screen", unpublished("https://a.org/.part"), ["would be '.part'"]),
    "name without use": (
        "datasets.my_screen", block({"scperturb": NORMAN, "name": "a.h5ad"}),
        ["mine.yaml: datasets.my_screen.source.name: a source by scperturb has no use for it"],
    ),
    "member that leads out": (
        "datasets.my_screen", unpublished("https://a.org/x.zip", member="a/../../b"),
        ["mine.yaml: datasets.my_screen.source.member: 'a/../../b' leads out of the archive"],
    ),
    "member from the root": ("datasets.my_screen", unpublished("https://a.org/x.zip", member="/etc/b"), ["'/etc/b' leads out of the archive"]),
    "checksum of another kind": ("datasets.my_screen.sha256", "abc", ["mine.yaml: datasets.my_screen.sha256: 'abc'"]),
    "missing split file": ("select.splits", ["frozen"], ["mine.yaml: splits.frozen.path: there is no file", "roles.json"]),
    "missing table": ("embeddings.sources", [{"file": "go.tsv"}], ["mine.yaml: embeddings.sources: there is no file 'go.tsv'"]),
    # types and values
    "seeds are words": ("select.seeds", ["a"], ["mine.yaml: select.seeds.0: 'a' must be a whole number"]),
    "seeds are truths": ("select.seeds", [True], ["select.seeds.0: True must be a whole number"]),
    "seeds with a point": ("select.seeds", [1.0], ["mine.yaml: select.seeds.0: 1.0 must be a whole number"]),
    "one seed": ("select.seeds", 3, ["select.seeds: 3 must be a list"]),
    "negative seed": ("select.seeds", [-1], ["select.seeds.0: -1"]),
    "nothing selected": ("select.datasets", [], ["select.datasets: []"]),
    "a truth for a text": ("datasets.my_screen.perturbation.control", [False], ["control.0: False is no text; write it in quotes"]),
    "selected twice": ("select.models", ["linear", "linear"], ["select.models", "non-unique"]),
    "models as a word": ("select.models", "linear", ["select.models: 'linear' must be a list"]),
    "n_hvg is a word": ("genes.n_hvg", "many", ["mine.yaml: genes.n_hvg: 'many' must be a whole number"]),
    "percent over 100": ("qc.max_pct_mt", 120, ["mine.yaml: qc.max_pct_mt: 120"]),
    "control is a word": (
        "datasets.my_screen.perturbation.control", "NT", ["datasets.my_screen.perturbation.control: 'NT' must be a list: write [NT]."],
    ),
    "control is a number": ("datasets.my_screen.perturbation.control", 6, ["control: 6 must be a list: write [6]."]),
    "control is a phrase": ("datasets.my_screen.perturbation.control", "a: b", ["must be a list: write ['a: b']."]),
    "control is missing": ("datasets.my_screen.perturbation", {"column": "a"}, ["datasets.my_screen.perturbation: 'control' or 'control_pattern' is missing"]),
    "fraction over 1": ("splits.unseen_combination.test_fraction", 1.5, ["mine.yaml: splits.unseen_combination.test_fraction: 1.5"]),
    "file split without file": ("splits.mine", {"kind": "file"}, ["splits.mine: 'path' is missing"]),
    "split without fraction": ("splits.mine", {"kind": "unseen_combination"}, ["splits.mine: 'test_fraction' or 'folds' or 'held_out' is missing"]),
    "folds and a fraction": (
        "splits.mine", {"kind": "unseen_combination", "folds": 3, "test_fraction": 0.2},
        ["mine.yaml: splits.mine: folds decide which names are held out", "remove one of them"],
    ),
    "folds and names": (
        "splits.mine", {"kind": "unseen_combination", "folds": 3, "held_out": ["A+B"]}, ["held_out has no meaning; remove one of them"],
    ),
    "names of cells": (
        "splits.mine", {"kind": "random_cells", "test_fraction": 0.2, "held_out": ["A"]}, ["splits.mine.held_out: kind random_cells has no use"],
    ),
    "a pattern of controls that cannot be read": (
        "datasets.my_screen.perturbation.control_pattern", "NT[", ["perturbation.control_pattern: 'NT[' cannot serve as a regular expression"],
    ),
    "folds of contexts": (
        "splits.mine", {"kind": "random_cells", "folds": 3},
        ["mine.yaml: splits.mine.folds: kind random_cells has no use for it", "unseen_perturbation and unseen_combination"],
    ),
    "folds of all contexts of genes": (
        "splits.mine", {"kind": "unseen_perturbation", "folds": "each"}, ["mine.yaml: splits.mine.folds: 'each' is of contexts"],
    ),
    "a share and names that train": (
        "splits.mine", {"kind": "unseen_context", "test_fraction": 0.2, "support_fraction": 0.2, "support": {"a": ["TF1"]}},
        ["mine.yaml: splits.mine.support: support names what trains"],
    ),
    "a support of genes": (
        "splits.mine", {"kind": "unseen_perturbation", "test_fraction": 0.2, "support_fraction": 0.2},
        ["mine.yaml: splits.mine.support_fraction: kind unseen_perturbation has no use for it"],
    ),
    "a support of all": (
        "splits.mine", {"kind": "unseen_context", "test_fraction": 0.2, "support_fraction": 1}, ["splits.mine.support_fraction: 1"],
    ),
    "perturbations in contexts without a share": (
        "splits.mine", {"kind": "unseen_perturbation_in_context", "held_out": ["a"]}, ["splits.mine: 'test_fraction' is missing"],
    ),
    "one fold": ("splits.mine", {"kind": "unseen_combination", "folds": 1}, ["mine.yaml: splits.mine.folds: 1"]),
    "a name that is a fold's": (
        "splits", {"a": {"kind": "unseen_combination", "folds": 2}, "a_fold_1": {"kind": "unseen_combination", "test_fraction": 0.2}},
        ["mine.yaml: splits.a_fold_1: this is a fold of splits.a"],
    ),
    "no such fold": ("select.splits", ["unseen_combination_fold_9"], ["split 'unseen_combination_fold_9'", "Known: "]),
    "context of another kind": (
        "splits.mine", {"kind": "random_cells", "test_fraction": 0.2, "covariate": "batch"},
        ["mine.yaml: splits.mine.covariate: kind random_cells has no use for it; it belongs to unseen_context"],
    ),
    "unknown covariate": (
        "splits.mine", {"kind": "unseen_context", "test_fraction": 0.2, "covariate": "lane"},
        ["mine.yaml: splits.mine.covariate: 'lane' is not possible", "cell_type"],
    ),
    "held out of no dataset": (
        "splits.mine", {"kind": "unseen_context", "test_fraction": 0.2, "held_out": {"my_scren": ["a"]}},
        ["mine.yaml: splits.mine.held_out: there is no dataset 'my_scren'", "Did you mean 'my_screen'?"],
    ),
    "held out as a word": (
        "splits.mine", {"kind": "unseen_context", "test_fraction": 0.2, "held_out": {"my_screen": "a"}},
        ["mine.yaml: splits.mine.held_out.my_screen: 'a' must be a list"],
    ),
    "contexts without fraction": ("splits.mine", {"kind": "unseen_context"}, ["splits.mine: 'test_fraction' or 'folds' or 'held_out' is missing"]),
    "ridge is zero": ("models.linear.params", {"ridge": 0}, ["mine.yaml: models.linear.params.ridge: 0"]),
    "dataset is a word": ("datasets.my_screen", "screen.h5ad", ["datasets.my_screen: 'screen.h5ad' must be a block of keys and values"]),
    "unknown source of embeddings": (
        "embeddings.sources", ["coexpresion"], ["mine.yaml: embeddings.sources: 'coexpresion' is not possible. Did you mean 'coexpression'? Known:"],
    ),
    "one source of embeddings twice": ("embeddings.sources", ["go", "coexpression", "go"], ["mine.yaml: embeddings.sources: 'go' is there twice"]),
    "a dataset by the name of a prior": ("datasets.go", block({"path": "x"}), ["mine.yaml: datasets.go: there is a prior of this name"]),
    "a prior by the name of co-expression": (
        "priors.coexpression", {"kind": "go", "source": {"path": "x"}}, ["mine.yaml: priors.coexpression: embeddings.sources has this name for vectors of training cells"],
    ),
    "a prior's own file beside the default": ("priors.go", {"source": {"path": "x"}}, ["priors.go.source: give exactly one of", "found: path, url"]),
    "a prior of no kind": ("priors.mine", {"kind": "kegg", "source": {"path": "x"}}, ["priors.mine.kind: 'kegg' is not possible", "go, ppi"]),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_mistake_is_explained(case: str, tmp_path: Path) -> None:
    key, value, expected = BAD[case]
    config = mine(tmp_path)
    set_at(config, key, value)
    with pytest.raises(InputError) as raised:
        planned(config, tmp_path)
    message = str(raised.value).replace(f"{tmp_path}/", "")  # where the tests run must not decide on the length
    missing = [part for part in expected if part not in message]
    assert not missing, f"not in the message: {missing}\n{message}"
    assert "Traceback" not in message
    assert len(message) < 600, f"a message, not a dump:\n{message}"


def test_several_mistakes_are_told_at_once(tmp_path: Path) -> None:
    config = mine(tmp_path)
    set_at(config, "genes.n_hvg", "many")
    set_at(config, "device", "gpu")
    with pytest.raises(InputError) as raised:
        planned(config, tmp_path)
    assert "genes.n_hvg" in str(raised.value)
    assert "device" in str(raised.value)


def test_a_mistake_in_the_repositorys_files_names_that_file(tmp_path: Path) -> None:
    broken = tmp_path / "models.yaml"
    broken.write_text("models: {additive: {family: additiv}}\n")
    config = merged({"models": {"additive": {"family": "additiv"}}})
    with pytest.raises(InputError, match=r"models\.yaml: models\.additive\.family: 'additiv' is not possible"):
        complete(config, [CONFIG / "config.yaml", broken])


# --- what-if queries ------------------------------------------------------------------------------------------------


def query(config: dict, **changes: object) -> dict:
    """Add a what-if query to a configuration and select it."""
    config["counterfactuals"] = {
        "why": {
            "dataset": "my_screen",
            "split": "unseen_combination",
            "model": "additive",
            "perturbations": ["TF1"],
            **changes,
        }
    }
    config["select"]["counterfactuals"] = ["why"]
    return config


def test_a_query_is_planned_for_every_seed(tmp_path: Path) -> None:
    plan = planned(query(mine(tmp_path)), tmp_path)
    assert list(map(tuple, plan.queries.to_numpy())) == [
        ("my_screen", "unseen_combination", "additive", seed, "why") for seed in (0, 1)
    ]
    assert plan.config["counterfactuals"]["why"]["samples_per_cell"] == 50
    assert plan.config["counterfactuals"]["why"]["cells"] == "control"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"model": "additiv"}, ["model 'additiv'", "Did you mean 'additive'?"]),
        ({"dataset": "norman"}, ["dataset 'norman'", "Known: "]),
        ({"split": "unseen"}, ["split 'unseen'", "Known: "]),
        (
            {"model": "technical_duplicate"},
            ["counterfactuals.why.model", "technical_duplicate", "answers no what-if questions"],
        ),
        ({"split": "frozen"}, ["splits.frozen.path: there is no file", "roles.json"]),
        ({"perturbations": []}, ["counterfactuals.why.perturbations: []"]),
    ],
)
def test_a_query_that_cannot_be_answered_is_explained(changes: dict, expected: list[str], tmp_path: Path) -> None:
    with pytest.raises(InputError) as raised:
        planned(query(mine(tmp_path), **changes), tmp_path)
    assert [part for part in expected if part not in str(raised.value)] == []


def test_a_query_on_a_split_that_the_screen_cannot_serve_is_left_out(tmp_path: Path) -> None:
    config = query(mine(tmp_path))
    config["datasets"]["my_screen"]["combinations"] = False
    config["select"]["splits"] = ["unseen_perturbation"]
    plan = planned(config, tmp_path)
    assert plan.queries.empty
    assert len(plan.left_out) == 1
    assert "why" in plan.left_out[0]
