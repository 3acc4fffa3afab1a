"""The block `sweep`: values in the types of the params, splits that its model serves, and one message per mistake."""

import re
from pathlib import Path

import pytest
import yaml
from conftest import merged

from perturbflow.errors import InputError
from perturbflow.registry.plan import Plan
from perturbflow.registry.shipped import shipped_files

GOOD = {"model": "scppdm", "over": {"width": [64, 256]}}


def planned(tmp_path: Path, **sweep: object) -> Plan:
    """Return the plan of a user's configuration with a sweep, which lies in mine.yaml."""
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({"sweep": {**GOOD, **sweep}}))
    return Plan(merged(yaml.safe_load(path.read_text())), [*shipped_files(), path])


def test_the_issue_s_block_is_planned_with_values_in_their_types(tmp_path):
    over = {"width": [64, 256], "learning_rate": ["3e-4", 0.003], "dropout": {"low": 0, "high": "0.5"}}
    plan = planned(tmp_path, over=over, by="inner_folds", trials=30)
    assert plan.config["sweep"]["over"] == {
        "width": [64, 256],
        "learning_rate": [0.0003, 0.003],
        "dropout": {"low": 0.0, "high": 0.5, "log": False},
    }
    assert isinstance(plan.config["sweep"]["over"]["dropout"]["low"], float)
    assert list(plan.sweeps["model"].unique()) == ["scppdm"]
    assert len(plan.sweeps) == len(plan.divisions)


def test_without_the_block_nothing_is_swept():
    plan = Plan(merged({}), shipped_files())
    assert plan.sweeps.empty
    assert plan.swept_models == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"over": {"witdh": [64]}}, "sweep.over: scppdm has no param 'witdh'. Did you mean 'width'?"),
        ({"over": {"width": [64, 4]}}, "sweep.over.width: 4 is less than the minimum of 8."),
        ({"over": {"width": ["wide"]}}, "sweep.over.width: 'wide' must be a whole number."),
        ({"over": {"width": 64}}, "sweep.over.width: 64 must be a list of choices"),
        ({"over": {"width": []}}, "sweep.over.width: [] must be a list of choices"),
        ({"over": {"width": {"low": 64}}}, "sweep.over.width: a range has low and high"),
        ({"over": {"width": {"low": 64, "high": 32}}}, "sweep.over.width: the range 64 to 32 needs a low below high."),
        ({"over": {"dropout": {"low": 0, "high": 0.5, "log": True}}}, "needs a low above 0, as log is true"),
        ({"over": {"dropout": {"low": 0, "high": 1}}}, "sweep.over.dropout.high: 1 is greater than or equal to"),
        ({"over": {"objective": {"low": 0, "high": 1}}}, "sweep.over.objective: this param is no number"),
        ({"over": {}}, "sweep.over names no param; name at least one of mean, n_latent"),
        ({"model": "ridge"}, "sweep.model: 'ridge' (family ridge) has no params that a sweep can search"),
        ({"model": "gears"}, "sweep.model: 'gears' (family external) has no params that a sweep can search"),
        ({"model": "scpdm"}, "model 'scpdm' is selected (sweep.model)"),
        ({"trials": 0}, "sweep.trials: 0 is less than the minimum of 1."),
        ({"by": "test"}, "sweep.by: 'test' is not possible."),
        ({"metric": "mse"}, "sweep.metric: 'mse' is not possible."),
    ],
)
def test_mistakes_are_told_with_file_value_and_fix(changes, message, tmp_path):
    with pytest.raises(InputError, match=rf"mine\.yaml: .*{re.escape(message)}"):
        planned(tmp_path, **changes)
