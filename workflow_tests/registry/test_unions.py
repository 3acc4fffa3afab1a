"""Unions: completed from the blocks of their members; mistakes are told before a job, and they get stale."""

from copy import deepcopy
from pathlib import Path

import pandas as pd
import pytest
import yaml
from conftest import BATCHES, OFF, make_screen, merged, run_snakemake

from perturbflow.errors import InputError
from perturbflow.registry.plan import Plan
from perturbflow.registry.shipped import shipped_files


def mine(folder: Path) -> dict:
    """Return a configuration with two members and their union."""
    datasets = {}
    for lane in BATCHES:
        (folder / f"{lane}.h5ad").touch()
        datasets[lane] = {
            "source": {"path": str(folder / f"{lane}.h5ad")},
            "perturbation": {"column": "perturbation", "control": ["control"]},
            "perturbation_type": "CRISPRi",
            "combinations": True,
            "qc": dict(OFF),
        }
    datasets["both"] = {"union": [*BATCHES]}
    return {"select": {"datasets": ["both"], "splits": ["unseen_perturbation"], "models": ["additive"]},
            "genes": {"n_hvg": 40}, "datasets": datasets}  # fmt: skip


def planned(config: dict, folder: Path) -> Plan:
    """Return the plan of a configuration that lies in mine.yaml."""
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump(config))
    return Plan(merged(config), [*shipped_files(), path])


def test_a_union_has_what_its_members_have(tmp_path: Path) -> None:
    config = mine(tmp_path)
    config["datasets"]["b2"]["covariates"] = {"cell_type": {"value": "RPE1"}}
    plan = planned(config, tmp_path)
    block = plan.config["datasets"]["both"]
    assert block["organism"] == "human"
    assert block["perturbation_type"] == "CRISPRi"
    assert block["combinations"]
    assert set(block["covariates"]) == {"dataset", "batch", "cell_type"}
    assert plan.union("both") == {
        "members": ["b1", "b2"], "genes": "shared", "perturbation_types": ["CRISPRi"], "organism": "human",
    }  # fmt: skip
    assert plan.members("both") == ["b1", "b2"]
    assert plan.members("b1") == ["b1"]
    assert {"resources/b1", "results/b1"} <= set(plan.folders())
    assert "both" in plan.unions
    assert "both" not in plan.screens


def test_what_is_known_of_no_member_is_known_of_no_union(tmp_path: Path) -> None:
    config = mine(tmp_path)
    for lane in BATCHES:
        del config["datasets"][lane]["combinations"]
    block = planned(config, tmp_path).config["datasets"]["both"]
    assert "combinations" not in block
    assert "cell_type" not in block["covariates"]
    config["datasets"]["b1"]["combinations"] = config["datasets"]["b2"]["combinations"] = False
    assert planned(config, tmp_path).config["datasets"]["both"]["combinations"] is False


MISTAKES = {
    "unknown member": ({"union": ["b1", "b3"]}, {}, [r"datasets\.both\.union: there is no dataset 'b3'", "b2"]),
    "itself": ({"union": ["b1", "both"]}, {}, ["'both' is a union itself"]),
    "one member": ({"union": ["b1"]}, {}, [r"datasets\.both\.union"]),
    "twice": ({"union": ["b1", "b1"]}, {}, [r"datasets\.both\.union"]),
    "a source beside it": ({"union": [*BATCHES], "source": {"path": "x"}}, {}, [r"both\.source: the members"]),
    "own limits": ({"union": [*BATCHES], "qc": {"min_genes": 3}}, {}, [r"both\.qc: the members of a union have this"]),
    "genes without union": (None, {"genes": "shared"}, [r"datasets\.b2\.genes: it belongs to a dataset that unites"]),
    "organisms": (None, {"organism": "mouse"}, [r"several organisms.*b1 \(human\), b2 \(mouse\)"]),
    "types": (None, {"perturbation_type": "CRISPRa"}, [r"b1 \(CRISPRi\), b2 \(CRISPRa\)", r"\[CRISPRi, CRISPRa\]"]),
    "a type that is not listed": (
        {"union": [*BATCHES], "perturbation_types": ["CRISPRi"]}, {"perturbation_type": "CRISPRa"},
        [r"both\.perturbation_types: CRISPRa of the members is not listed"],
    ),
    "the same file": (None, {"source": {"path": "b1"}}, ["b1 and b2 are the same cells twice"]),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_message_with_the_file(mistake: str, tmp_path: Path) -> None:
    union, member, said = MISTAKES[mistake]
    config = mine(tmp_path)
    if union is not None:
        config["datasets"]["both"] = union
    if "source" in member:
        member = {"source": config["datasets"]["b1"]["source"]}
    config["datasets"]["b2"] |= member
    for part in said:
        with pytest.raises(InputError, match=rf"(?s)mine\.yaml: .*{part}"):
            planned(config, tmp_path)


def lines(folder: Path, **block: object) -> dict:
    """Return the configuration with a split that leaves every context out in turn."""
    config = mine(folder)
    config["splits"] = {"line": {"kind": "unseen_context", "covariate": "dataset", "folds": "each", **block}}
    config["select"]["splits"] = ["line"]
    return config


def test_each_context_that_is_known_is_left_out_in_turn(tmp_path: Path) -> None:
    config = lines(tmp_path)
    plan = planned(config, tmp_path)
    assert set(plan.divisions["split"]) == {"line_b1", "line_b2"}
    assert plan.context_folds == {"line_b1": "line", "line_b2": "line"}
    assert plan.split("line_b2", "both")["held_out"] == ["b2"]
    config["splits"]["line"]["covariate"] = "batch"
    assert set(planned(config, tmp_path).divisions["split"]) == {"line_b1", "line_b2"}, (
        "members without batches are one"
    )
    config["datasets"]["b1"]["covariates"] = config["datasets"]["b2"]["covariates"] = {"batch": "lane"}
    with pytest.raises(InputError, match=r"splits\.line: folds: each .* contexts: \{batch: \[\.\.\.\]\}"):
        planned(config, tmp_path)
    config["datasets"]["b1"]["contexts"] = config["datasets"]["b2"]["contexts"] = {"batch": ["L1", "L2"]}
    assert set(planned(config, tmp_path).divisions["split"]) == {f"line_b{i}_l{k}" for i in (1, 2) for k in (1, 2)}


def test_a_screen_of_one_context_is_left_out_of_splits_that_hold_one_out(tmp_path: Path) -> None:
    config = lines(tmp_path, covariate="cell_type")
    config["datasets"]["b1"]["covariates"] = {"cell_type": {"value": "K562"}}
    config["datasets"]["b2"]["covariates"] = {"cell_type": {"value": "RPE1"}}
    config["select"]["datasets"] = ["both", "b1"]
    plan = planned(config, tmp_path)
    assert [*plan.divisions.itertuples(index=False, name=None)] == [("both", "line_k562"), ("both", "line_rpe1")]
    assert plan.left_out[0] == "b1 × line is left out: all cells of b1 are of one cell_type, K562."


def test_what_another_dataset_holds_out_makes_no_fold_stale(tmp_path: Path) -> None:
    config = lines(tmp_path)
    before = planned(config, tmp_path).split("line_b1", "both")
    config["datasets"]["more"] = {"union": ["b1", "renge2023"], "perturbation_types": ["CRISPRi", "CRISPRko"]}
    config["select"]["datasets"] = ["both", "more"]
    plan = planned(config, tmp_path)
    assert plan.split("line_b1", "both") == before
    assert set(plan.divisions.loc[plan.divisions["dataset"] == "more", "split"]) == {"line_b1", "line_renge2023"}
    assert plan.left_out == []


def test_a_screen_of_controls_alone_serves_in_a_union(tmp_path: Path) -> None:
    config = mine(tmp_path)
    config["datasets"]["b2"]["controls_only"] = True
    assert planned(config, tmp_path).datasets == ["both"]
    config["select"]["datasets"] = ["b2", "both"]
    said = "b2 × unseen_perturbation is left out: b2 holds controls alone"
    assert planned(config, tmp_path).left_out[0].startswith(said)
    config["datasets"]["both"] = {"union": ["b1", "b2", "renge2023"], "perturbation_types": ["CRISPRi", "CRISPRko"]}
    config["select"] = {**config["select"], "datasets": ["both"], "splits": ["leave_one_line_out"]}
    lines = set(planned(config, tmp_path).divisions["split"])
    assert lines == {"leave_one_line_out_b1", "leave_one_line_out_renge2023"}, "of b2 nothing can be scored"


def test_parts_of_one_file_are_no_copies(tmp_path: Path) -> None:
    config = mine(tmp_path)
    config["datasets"]["b2"]["source"] = config["datasets"]["b1"]["source"]
    for lane in BATCHES:
        config["datasets"][lane]["subset"] = {"lane": [lane]}
    assert planned(config, tmp_path).members("both") == ["b1", "b2"]


def test_a_file_of_a_member_has_to_be_there(tmp_path: Path) -> None:
    config = mine(tmp_path)
    (tmp_path / "b2.h5ad").unlink()
    with pytest.raises(InputError, match=r"datasets\.b2\.source\.path: there is no file"):
        planned(config, tmp_path)


def test_types_that_differ_are_taken_where_the_union_says_so(tmp_path: Path) -> None:
    config = mine(tmp_path)
    config["datasets"]["b2"]["perturbation_type"] = "CRISPRa"
    config["datasets"]["both"]["perturbation_types"] = ["CRISPRa", "CRISPRi"]
    assert planned(config, tmp_path).union("both")["perturbation_types"] == ["CRISPRa", "CRISPRi"]


@pytest.mark.slow
def test_what_changes_a_member_makes_the_union_stale(tmp_path: Path) -> None:
    config = mine(tmp_path)
    screen = make_screen()
    del screen.uns["effects"]
    for lane in BATCHES:
        screen[screen.obs["lane"] == lane].write_h5ad(tmp_path / f"{lane}.h5ad")
    target = "results/both/harmonized.h5ad"

    def run(config: dict, *arguments: str) -> dict[str, int]:
        outcome = run_snakemake(tmp_path, target, *arguments, config=config)
        assert outcome.returncode == 0, outcome.text
        return outcome.jobs

    assert run(config) == {"harmonize": 2, "unite": 1}
    assert run(config, "--dry-run") == {}
    changed = deepcopy(config)
    changed["datasets"]["b2"]["qc"]["min_genes"] = 5
    assert run(changed, "--dry-run") == {"harmonize": 1, "unite": 1}
    changed = deepcopy(config)
    changed["datasets"]["both"]["genes"] = "any"
    assert run(changed, "--dry-run") == {"unite": 1}
    changed["datasets"]["both"] = {"union": ["b2", "b1"]}
    assert run(changed, "--dry-run") == {"unite": 1}
    make_screen(seed=1)[screen.obs["lane"] == "b1"].copy().write_h5ad(tmp_path / "b1.h5ad")
    assert run(config, "--dry-run") == {"harmonize": 1, "unite": 1}


@pytest.mark.parametrize(
    ("union", "n_lines"), [("essential_lines", 4), ("replogle2022_essential", 2), ("norman_adamson_replogle_k562", 3)]
)
def test_every_split_of_a_registered_union_is_planned(union: str, n_lines: int) -> None:
    splits = [
        "leave_one_line_out",
        "few_shot_line",
        "unseen_context",
        "unseen_perturbation",
        "perturbation_in_one_line",
    ]
    select = {"datasets": [union], "splits": splits, "models": ["no_change"], "counterfactuals": []}
    plan = Plan(merged({"select": select}), shipped_files())
    folds = pd.Series(plan.context_folds).value_counts().to_dict()
    assert folds == {"leave_one_line_out": n_lines, "few_shot_line": n_lines}
    assert len(plan.divisions) == 2 * n_lines + 3
