"""The workflow as a module of another one.

It is planned and run from another folder, behind a prefix, with a screen that a rule of the host makes.
"""

from pathlib import Path

import pytest
import yaml
from conftest import Outcome, closed_forms_config, copy_repository, run_snakemake, write_screen

from perturbflow.registry.families import REFERENCES

pytestmark = pytest.mark.slow

HOST = """
configfile: "host.yaml"


module perturbflow:
    snakefile:
        "{snakefile}"
    config:
        config["perturbflow"]
    prefix:
        "benchmark"


use rule * from perturbflow as perturbflow_*


rule best:
    default_target: True
    input:
        "benchmark/results/verdicts.tsv",
    output:
        "best.txt",
    shell:
        "head -1 {{input}} > {{output}}"


rule screen:
    input:
        "counts.h5ad",
    output:
        "made/screen.h5ad",
    shell:
        "cp {{input}} {{output}}"
"""


class Host:
    """A workflow of somebody else in a folder of its own."""

    def __init__(self, folder: Path, python: str) -> None:
        self.folder, self.python = folder, python
        folder.mkdir()
        self.repository = copy_repository(folder / "clone")
        (folder / "Snakefile").write_text(HOST.format(snakefile=self.repository / "Snakefile"))
        write_screen(folder).rename(folder / "counts.h5ad")
        self.config = closed_forms_config()
        self.config["select"]["models"] = ["additive"]
        self.config["datasets"]["mine"]["source"]["path"] = "made/screen.h5ad"

    def run(self, *arguments: str) -> Outcome:
        """Run the host's Snakefile."""
        (self.folder / "host.yaml").write_text(yaml.safe_dump({"perturbflow": self.config}))
        return run_snakemake(self.folder, *arguments, repository=self.folder, python=self.python)


PLANNED = {
    "screen": 1, "best": 1,
    **{f"perturbflow_{step}": 1 for step in ("harmonize", "quality", "split", "pair", "embeddings", "audit",
                                             "benchmark")},
    **{f"perturbflow_{step}": 1 + len(REFERENCES) for step in ("train_closed_form", "predict", "evaluate")},
}  # fmt: skip


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory, python: str) -> Host:
    """Return a host that was planned, and then run."""
    host = Host(tmp_path_factory.mktemp("module") / "host", python)
    planned = host.run("--dry-run")
    assert planned.jobs == PLANNED, planned.text
    done = host.run()
    assert done.returncode == 0, done.text
    return host


def test_everything_lies_behind_the_prefix(host: Host) -> None:
    made = {path.relative_to(host.folder).parts[0] for path in host.folder.rglob("*.tsv")}
    assert made == {"benchmark", "clone"}
    assert (host.folder / "best.txt").read_text().startswith("dataset\t")
    assert (host.folder / "benchmark/logs/pair/mine.unseen_combination.log").read_text()
    assert not (host.folder / "results").exists()


def test_a_second_run_plans_nothing_and_other_content_of_a_result_is_noticed(host: Host) -> None:
    assert host.run("--dry-run").jobs == {}
    table = host.folder / "benchmark/results/mine/unseen_combination/additive/seed_0/metrics.tsv"
    content = table.read_text()
    table.write_text(content.replace("mae", "eam"))
    try:
        assert host.run("--dry-run").jobs == {"perturbflow_evaluate": 1, "perturbflow_benchmark": 1, "best": 1}
    finally:
        table.write_text(content)
    assert host.run("--dry-run").jobs == {}


def test_the_configuration_of_the_module_counts(host: Host) -> None:
    host.config["genes"]["n_hvg"] = 30
    try:
        assert set(host.run("--dry-run").jobs) == set(PLANNED) - {
            "screen",
            "perturbflow_harmonize",
            "perturbflow_quality",
            "perturbflow_split",
        }
    finally:
        host.config["genes"]["n_hvg"] = 40


def test_a_mistake_in_the_modules_configuration_is_one_message(host: Host) -> None:
    host.config["genes"]["n_hgv"] = 30
    try:
        outcome = host.run("--dry-run")
    finally:
        del host.config["genes"]["n_hgv"]
    assert outcome.returncode != 0
    assert outcome.text.count("genes: unknown key 'n_hgv'. Did you mean 'n_hvg'?") == 1
    assert "Traceback" not in outcome.text
