"""CONTRIBUTING.md by its own examples: a closed form, a metric and a kind of split are added to a copy and used."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import REPOSITORY, Prepared, closed_forms_config, copy_repository

# A block stands below a sentence that ends with its place: "at the end of `FILE`:" or "In `FILE`:".
BLOCK = re.compile(r"\b(?:at the end of|[Ii]n) `([\w./]+)`:\n\n```(\w+)\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)
CONTRIBUTING = (REPOSITORY / "CONTRIBUTING.md").read_text()
SECTIONS = {"A kind of split": 7, "A metric": 1, "A baseline": 3}

# A plan in the copy, then all steps of one run. Arguments: the configuration, and the folder of a prepared screen.
RUN = """
import json, sys
from pathlib import Path

from perturbflow import embeddings, pairs, predict, train
from perturbflow.audit import audit
from perturbflow.evaluation import evaluate
from perturbflow.listing import listed
from perturbflow.registry.plan import Plan
from perturbflow.registry.shipped import above_shipped
from perturbflow.splits import split

plan = Plan(above_shipped(json.loads(sys.argv[1])), files_are_there=False)
screen = Path(sys.argv[2])
harmonized, harmonization = screen / "harmonized.h5ad", screen / "harmonization.json"
files = {name: Path(name) for name in
         ("split.json", "pairs.h5ad", "embeddings.parquet", "audit.json", "model.npz", "run.json", "predictions.h5ad",
          "metrics.tsv")}
roles, cells, vectors, audited, model, run, predicted, scores = files.values()
split.split(harmonized, harmonization, roles, "partner", plan.config["splits"]["partner"])
pairs.pair(harmonized, roles, cells, 40)
embeddings.embeddings(cells, vectors, ["coexpression"])
audit.audit(harmonized, roles, cells, vectors, audited)
family = plan.family("median_effect").implementation
train.train(cells, vectors, audited, model, run, family, {}, 0)
predict.predict(cells, model, predicted, family, {}, 0, 100)
names = {"dataset": "mine", "split": "partner", "model": "median_effect", "seed": "0", "code_version": "x"}
evaluate(predicted, cells, roles, scores, names)
print(json.dumps({"runs": plan.runs.astype(str).to_dict("list"), "left_out": plan.left_out,
                  "metrics": [row["name"] for row in listed(["metrics"])["metrics"]]}))
"""


def blocks(title: str) -> list[tuple[str, str, str]]:
    """Return file, language and text of every block of a section."""
    found = re.search(rf"^### {title}\n(.*?)(?=^##)", CONTRIBUTING, flags=re.MULTILINE | re.DOTALL)
    assert found, f"CONTRIBUTING.md has no section '{title}'"
    return BLOCK.findall(found[1])


def changed(text: str, language: str, block: str) -> str:
    """Return a file's text with a block: a diff where its old lines stand, anything else at the end."""
    if language != "diff":
        return f"{text.rstrip()}\n\n\n{block}"
    lines = block.splitlines(keepends=True)
    old, new = ("".join(line[1:] for line in lines if line[0] != sign) for sign in "+-")
    assert text.count(old) == 1, f"these lines are not there, or more than once:\n{old}"
    return text.replace(old, new)


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of the repository with all examples, and with the schema that follows from its families."""
    folder = copy_repository(tmp_path_factory.mktemp("contributing") / "repository")
    for title in SECTIONS:
        for name, language, block in blocks(title):
            (folder / name).write_text(changed((folder / name).read_text(), language, block))
    for part in ("workflow", "support"):
        shutil.copytree(REPOSITORY / "workflow_tests" / part, folder / "workflow_tests" / part)
    code = "import test_docs; test_docs.MODELS_SCHEMA.write_text(test_docs.models_schema())"
    run(folder, folder / "workflow_tests" / "workflow", "-c", code)
    return folder


def run(copy: Path, folder: Path, *arguments: object) -> str:
    """Run Python with the package of the copy, and return its output."""
    variables = {**os.environ, "PYTHONPATH": str(copy / "scripts")}
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("title", SECTIONS)
def test_a_section_shows_a_complete_example(title: str) -> None:
    assert len(blocks(title)) == SECTIONS[title]


@pytest.mark.slow
def test_a_changed_repository_plans_trains_and_scores(
    copy: Path, prepared: dict[str, Prepared], tmp_path: Path
) -> None:
    config = closed_forms_config(
        select={"datasets": ["mine"], "splits": ["partner"], "models": ["median_effect"], "seeds": [0]},
        splits={"partner": {"kind": "unseen_partner", "test_fraction": 0.3, "validation_fraction": 0.15}},
    )
    told = json.loads(run(copy, tmp_path, "-c", RUN, json.dumps(config), prepared["unseen_combination"].folder))
    assert told["left_out"] == []
    assert set(told["runs"]["split"]) == {"partner"}
    assert "median_effect" in told["runs"]["model"]
    assert "median_error" in told["metrics"]
    assert json.loads((tmp_path / "audit.json").read_text())["checks"]["held_out_partners_are_unseen"] == "passed"

    table = pd.read_csv(tmp_path / "metrics.tsv", sep="\t")
    errors = table[table["metric"] == "median_error"]
    held_out = json.loads((tmp_path / "split.json").read_text())["perturbations"]["test"]
    assert sorted(errors["perturbation"]) == held_out
    assert all("+" in label for label in held_out)
    assert np.isfinite(errors["value"]).all()


def test_a_screen_without_combinations_is_left_out_of_the_new_split(copy: Path, tmp_path: Path) -> None:
    config = closed_forms_config(
        select={
            "datasets": ["mine"],
            "splits": ["partner", "unseen_perturbation"],
            "models": ["median_effect"],
            "seeds": [0],
        },
        splits={"partner": {"kind": "unseen_partner", "test_fraction": 0.3}},
    )
    config["datasets"]["mine"]["combinations"] = False
    code = (
        "import json, sys; from perturbflow.registry.plan import Plan; "
        "from perturbflow.registry.shipped import above_shipped; "
        "print(Plan(above_shipped(json.loads(sys.argv[1])), files_are_there=False).left_out)"
    )
    assert "mine × partner is left out: mine holds no combinations" in run(
        copy, tmp_path, "-c", code, json.dumps(config)
    )
