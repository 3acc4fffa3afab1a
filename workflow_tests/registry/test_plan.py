"""The plan: read without data or heavy packages, complete after a run, and stale exactly where something changed."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path

import h5py
import pytest
from conftest import (
    CLOSED_FORMS,
    REPOSITORY,
    Outcome,
    closed_forms_config,
    copy_repository,
    merged,
    run_snakemake,
    write_screen,
)

from perturbflow.io.files import read_json
from perturbflow.provenance.code_version import entry_point
from perturbflow.registry.families import REFERENCES

RULE_FILES = sorted((REPOSITORY / "rules").glob("*.smk"))
HEAVY = ("torch", "scanpy", "anndata", "pytorch_lightning", "h5py", "sklearn")

# --- before anything was run ----------------------------------------------------------------------------------------

BLOCKER = f"""
import sys


class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {HEAVY!r}:
            raise ImportError(f"{{name}} is blocked by the test")


sys.meta_path.insert(0, Blocker())
"""


@pytest.fixture(scope="module")
def light(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return environment variables under which no Python process can import the heavy packages."""
    folder = tmp_path_factory.mktemp("light")
    (folder / "sitecustomize.py").write_text(BLOCKER)
    return {"PYTHONPATH": str(folder)}


def plan_in(folder: Path, environment: dict[str, str], config: dict | None = None, *arguments: str) -> Outcome:
    """Return a dry run of a configuration."""
    outcome = run_snakemake(
        folder, "--dry-run", *arguments, config=config, environment=environment, python=sys.executable
    )
    assert outcome.returncode == 0, outcome.text
    return outcome


def test_the_blocked_environment_blocks(light: dict[str, str]) -> None:
    for name in HEAVY:
        done = subprocess.run(
            [sys.executable, "-c", f"import {name}"],
            env={**os.environ, **light},
            capture_output=True,
            text=True,
            check=False,
        )
        assert "is blocked by the test" in done.stderr, name


def test_the_default_plan_needs_neither_data_nor_heavy_packages(light: dict[str, str], tmp_path: Path) -> None:
    assert plan_in(tmp_path, light).jobs == {
        "download": 1, "harmonize": 1, "quality": 1, "split": 1, "pair": 1, "embeddings": 1, "audit": 1,
        "train_closed_form": 10, "train_diffusion": 1, "train_jepa": 1, "train_counterfactual": 1,
        "predict": 13, "evaluate": 13, "warranty": 3, "gene_vectors": 1, "counterfactual": 1, "draw": 1,
        "answer_page": 1, "benchmark": 1, "report": 1, "all": 1,
    }  # fmt: skip
    assert not (tmp_path / "results").exists()


@pytest.mark.slow
def test_all_screens_on_all_splits_and_all_models_are_planned(light: dict[str, str], tmp_path: Path) -> None:
    config = merged({})
    few = {"select": {"models": ["transfer", "set_gp", "cpa", "scppdm"], "counterfactuals": []}}
    for name in ("datasets", "splits"):
        few["select"][name] = list(config[name])
    outcome = plan_in(tmp_path, light, few)
    # 26 screens and 3 unions divide in 89 ways. Five references and two models serve all of them, transfer the 40 that
    # hold out contexts, and a model that cannot predict unseen genes 60.
    assert outcome.jobs == {
        "download": 26, "harmonize": 26, "unite": 3, "quality": 29, "split": 89, "pair": 89, "embeddings": 89,
        "audit": 89, "train_closed_form": 574, "train_diffusion": 89, "train_external": 60, "predict": 723,
        "evaluate": 723, "warranty": 89, "benchmark": 1, "report": 1, "all": 1,
    }  # fmt: skip
    assert re.search(r"this plan takes about [\d,]+ GB of disk \([\d,]+ GB are free here\), [\d.]+ GB", outcome.text)


def test_priors_are_retrieved_once_for_all_splits(light: dict[str, str], tmp_path: Path) -> None:
    config = {
        "select": {"splits": ["unseen_perturbation", "unseen_context"]},
        "embeddings": {"sources": ["coexpression", "go", "ppi"]},
    }
    jobs = plan_in(tmp_path, light, config, "pairs").jobs
    assert jobs == {
        "download": 3,
        "harmonize": 1,
        "prior": 2,
        "split": 2,
        "pair": 2,
        "embeddings": 2,
        "audit": 2,
        "pairs": 1,
    }


@pytest.mark.slow
def test_a_sweep_is_a_job_of_its_target(light: dict[str, str], tmp_path: Path) -> None:
    write_screen(tmp_path)
    config = closed_forms_config(sweep={"model": "scppdm", "over": {"width": [16, 32]}})
    outcome = plan_in(tmp_path, light, config, "swept")
    assert outcome.jobs == {"harmonize": 1, "split": 1, "pair": 1, "embeddings": 1, "audit": 1, "sweep": 1, "swept": 1}
    assert re.search(r"rule sweep:(.|\n)*?model=scppdm\n.*runtime=1440", outcome.text)
    without = run_snakemake(
        tmp_path, "--dry-run", "swept", config=closed_forms_config(), environment=light, python=sys.executable
    )
    assert "the configuration has no block sweep" in without.text


def test_jobs_multiply_with_splits_seeds_models_and_queries(light: dict[str, str], tmp_path: Path) -> None:
    write_screen(tmp_path)
    config = closed_forms_config(
        models={"stiff": {"family": "linear", "params": {"ridge": 9.0}}},
        counterfactuals={
            "why": {"dataset": "mine", "split": "unseen_combination", "model": "stiff", "perturbations": ["TF1+TF8"]}
        },
    )
    config["select"] |= {
        "splits": ["unseen_combination", "unseen_perturbation"],
        "models": ["additive", "stiff"],
        "seeds": [0, 3],
        "counterfactuals": ["why"],
    }
    assert plan_in(tmp_path, light, config).jobs == {
        "harmonize": 1, "quality": 1, "split": 2, "pair": 2, "embeddings": 2, "audit": 2, "train_closed_form": 28,
        "predict": 28, "evaluate": 28, "gene_vectors": 1,
        "warranty": 2, "counterfactual": 2, "answer_page": 2, "draw": 2, "benchmark": 1, "report": 1, "all": 1,
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "last", "absent"),
    [
        ("data", {"harmonize": 1, "quality": 1}, "split"),
        ("pairs", {"pair": 1, "audit": 1}, "train_closed_form"),
        ("trained", {"train_closed_form": len(CLOSED_FORMS)}, "predict"),
        ("evaluated", {"evaluate": len(CLOSED_FORMS)}, "benchmark"),
        ("report", {"report": 1, "benchmark": 1}, "all"),
    ],
)
def test_targets_stop_where_they_say(
    target: str, last: dict, absent: str, light: dict[str, str], tmp_path: Path
) -> None:
    write_screen(tmp_path)
    jobs = plan_in(tmp_path, light, closed_forms_config(), target).jobs
    assert last.items() <= jobs.items()
    assert absent not in jobs


def test_a_split_that_cannot_be_is_left_out_with_one_line(light: dict[str, str], tmp_path: Path) -> None:
    write_screen(tmp_path)
    config = closed_forms_config()
    config["datasets"]["mine"]["combinations"] = False
    config["select"]["splits"] = ["unseen_perturbation", "unseen_combination"]
    outcome = plan_in(tmp_path, light, config)
    assert outcome.jobs["evaluate"] == len(CLOSED_FORMS)
    assert outcome.text.count("mine × unseen_combination is left out") == 1


@pytest.mark.slow
def test_folds_are_planned_as_splits_of_their_own(light: dict[str, str], tmp_path: Path) -> None:
    write_screen(tmp_path)
    config = closed_forms_config(splits={"genes": {"kind": "unseen_perturbation", "folds": 3}})
    config["select"] |= {"splits": ["genes"], "models": ["additive"]}
    outcome = plan_in(tmp_path, light, config)
    assert {
        "split": 3,
        "pair": 3,
        "audit": 3,
        "train_closed_form": 18,
        "evaluate": 18,
        "benchmark": 1,
    }.items() <= outcome.jobs.items()
    assert plan_in(tmp_path, light, config, "results/mine/genes_fold_2/split.json").jobs["split"] == 1


def test_files_that_only_the_configuration_names_are_inputs_of_the_plan(light: dict[str, str], tmp_path: Path) -> None:
    write_screen(tmp_path)
    for name in ("mine.json", "vectors.parquet", "encoder.npz"):
        (tmp_path / name).write_text("")
    config = closed_forms_config(
        splits={"frozen": {"kind": "file", "path": "mine.json"}},
        embeddings={"sources": ["coexpression", {"file": "vectors.parquet"}]},
        models={"scppdm": {"params": {"latent": {"file": "encoder.npz"}}}},
    )
    config["select"] |= {"splits": ["frozen"], "models": ["scppdm"]}
    outcome = plan_in(tmp_path, light, config, "trained")
    for rule, file in {
        "harmonize": "screen.h5ad",
        "split": "mine.json",
        "embeddings": "vectors.parquet",
        "train_diffusion": "encoder.npz",
    }.items():
        inputs = re.search(rf"rule {rule}:\n    input: (.*)", outcome.text)[1]
        assert file in inputs.split(", "), rule


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"select": {"models": ["aditive"]}}, "mine.yaml: model 'aditive' is selected (select.models)"),
        ({"genes": {"n_hvgs": 3}}, "mine.yaml: genes: unknown key 'n_hvgs'. Did you mean 'n_hvg'?"),
    ],
)
def test_a_mistake_in_the_configuration_is_one_message(config: dict, message: str, tmp_path: Path) -> None:
    outcome = run_snakemake(tmp_path, "--dry-run", config=config)
    assert outcome.returncode != 0
    assert outcome.text.count(message) == 1
    assert "Traceback" not in outcome.text
    assert not outcome.jobs


# --- the rules ------------------------------------------------------------------------------------------------------


def test_values_on_the_command_line_are_what_the_schema_says(light: dict[str, str], tmp_path: Path) -> None:
    """Snakemake hands over whatever is nested in --config as texts."""
    given = ["select={seeds: [0, 1, 2], models: [no_change, jepa]}", "qc={min_counts: 5, max_pct_mt: null}",
             "models={jepa: {params: {n_steps: 7, learning_rate: 1e-4, self_supervised: false}}}"]  # fmt: skip
    write_screen(tmp_path)
    outcome = run_snakemake(tmp_path, "--dry-run", "--config", *given, config=closed_forms_config(), environment=light)
    assert outcome.jobs["train_jepa"] == 3, outcome.text
    assert outcome.jobs["train_closed_form"] == 3 * len(REFERENCES)


def test_a_mistake_on_the_command_line_is_told_to_be_there(light: dict[str, str], tmp_path: Path) -> None:
    given = ["select={seeds: [0, x]}", "qc={min_counts: many}", "device=cpuu"]
    text = run_snakemake(
        tmp_path, "--dry-run", "--config", *given, config=closed_forms_config(), environment=light
    ).text
    for part in (
        "device: 'cpuu' is not possible",
        "qc.min_counts: 'many' must be",
        "select.seeds.1: 'x' must be a whole number",
    ):
        assert f"--config: {part}" in text
    text = run_snakemake(
        tmp_path,
        "--dry-run",
        "--config",
        "select={models: [nochange]}",
        config=closed_forms_config(),
        environment=light,
    ).text
    assert "--config: model 'nochange' is selected" in text
    wrong = closed_forms_config(device="cpuu")
    assert (
        "mine.yaml: device: 'cpuu'"
        in run_snakemake(tmp_path, "--dry-run", "--config", "qc={min_counts: 5}", config=wrong, environment=light).text
    )


def test_lint_finds_nothing(tmp_path: Path) -> None:
    outcome = run_snakemake(tmp_path, "--lint")
    assert outcome.returncode == 0, outcome.text
    assert "in a good condition" in outcome.text


def test_every_rule_is_listed_with_a_sentence_of_its_own(tmp_path: Path) -> None:
    outcome = run_snakemake(tmp_path, "--list-rules")
    listed = dict(re.findall(r"^(\w+) \((.+\.)\)$", outcome.stdout, flags=re.MULTILINE))
    assert set(listed) == {name for name, _ in rules()}
    assert len(set(listed.values())) == len(listed), "two rules share a docstring"


def test_the_rulegraph_follows_the_data(tmp_path: Path) -> None:
    graph = run_snakemake(tmp_path, "--rulegraph", config={"select": {"counterfactuals": []}}).stdout
    names = dict(re.findall(r'(\d+)\[label = "(\w+)"', graph))
    edges = {(names[a], names[b]) for a, b in re.findall(r"(\d+) -> (\d+)", graph)}
    order = [
        "download",
        "harmonize",
        "quality",
        "split",
        "pair",
        "embeddings",
        "audit",
        "train",
        "predict",
        "evaluate",
        "warranty",
        "benchmark",
        "report",
        "all",
    ]
    place = {name: order.index(name.split("_")[0]) for name in names.values()}
    assert {
        ("download", "harmonize"),
        ("harmonize", "split"),
        ("harmonize", "quality"),
        ("quality", "benchmark"),
        ("pair", "embeddings"),
        ("audit", "train_diffusion"),
        ("report", "all"),
    } <= edges
    assert all(place[a] < place[b] for a, b in edges)


def rules() -> Iterator[tuple[str, str]]:
    """Yield the name and text of every rule."""
    for path in [REPOSITORY / "Snakefile", *RULE_FILES]:
        text = path.read_text()
        starts = [*re.finditer(r"^(?:rule|use rule \w+ as) (\w+)", text, flags=re.MULTILINE)]
        ends = [start.start() for start in starts[1:]] + [len(text)]
        for start, end in zip(starts, ends, strict=False):  # common.smk has no rule
            yield start.group(1), text[start.start() : end]


WORKING = [(name, text) for name, text in rules() if "localrule: True" not in text and not text.startswith("use rule")]


@pytest.mark.parametrize(("name", "text"), WORKING, ids=[name for name, _ in WORKING])
def test_a_rule_is_complete(name: str, text: str) -> None:
    assert re.match(r'rule \w+:\n    """[A-Z].*\.$|rule \w+:\n    """[A-Z].*\."""', text), "a docstring first"
    for keyword in ("output", "log", "benchmark", "conda", "threads", "resources", "params", "script"):
        assert re.search(rf"^    {keyword}:", text, flags=re.MULTILINE), f"{name} has no {keyword}"
    assert f'        made_of=made_of("{name}"),\n' in text, "without it the record beside its results would be empty"
    assert f'        again=again("{name}"),\n    output:' in text, "without it a stale result would pass"
    assert not re.search(r"^    (run|message|shell):", text, flags=re.MULTILINE)
    assert text.count("\n") < 60, "a rule fits on one screen"


@pytest.mark.parametrize(("name", "text"), WORKING, ids=[name for name, _ in WORKING])
def test_names_of_rule_script_log_and_benchmark_agree(name: str, text: str) -> None:
    step = name if (REPOSITORY / "scripts" / f"{name}.py").is_file() else name.split("_")[0]
    assert f'"../scripts/{step}.py"' in text
    assert (REPOSITORY / "scripts" / f"{step}.py").is_file()
    assert re.search(rf'"logs/{step}[/.]', text)
    assert re.search(rf'"benchmarks/{step}[/.]', text)
    assert f'        code_version=code("{entry_point(step)}"' in text
    assert (", family)" in text) == (step in ("train", "sweep", "predict", "warranty", "counterfactual", "design"))
    environment = re.search(r'"\.\./(envs/\w+\.yaml)"', text)
    assert environment, name
    assert (REPOSITORY / environment.group(1)).is_file()


def test_every_reported_output_has_a_caption_a_category_and_labels() -> None:
    captions = REPOSITORY / "rules" / "captions"
    used = {"workflow"}  # the first page, named in the Snakefile
    for name, text in rules():
        flags = re.findall(r"=report\($(.*?)^        \),$", text, flags=re.MULTILINE | re.DOTALL)
        assert len(flags) == len(re.findall(r"\breport\(", text)), name
        shown = re.findall(r'shown_table\("(\w+)"\)', text)  # tables of all scores, flagged in one place
        for flag in flags:
            path, caption = (
                re.search(r'"(.*?)"', flag)[1],
                re.search(r'^ +caption="captions/(\w+)\.rst",$', flag, flags=re.MULTILINE),
            )
            assert caption, f"{name}: {path} has no caption"
            assert re.search(r'^ +category="[\w-]+",$', flag, flags=re.MULTILINE), f"{name}: {path} has no category"
            assert re.search(r"^ +labels=\{.*\"file\": ", flag, flags=re.MULTILINE | re.DOTALL), (
                f"{name}: {path} has no labels"
            )
            shown.append(caption[1])
        for caption in shown:
            assert "``snakemake --cores 1 --force {{ snakemake.output." in (captions / f"{caption}.rst").read_text(), (
                f"{caption}.rst says not how the result is made again"
            )
        used.update(shown)
    assert {path.stem for path in captions.iterdir()} == used


def test_no_input_is_ancient() -> None:
    """Snakemake does not run a job again whose ancient input is made again: a stale result would stay."""
    assert not [name for name, text in rules() if "ancient(" in text]


def test_nothing_is_looked_up_by_search() -> None:
    """Snakemake's lookup() walks through the whole configuration for every job: half of the time of a large dry run."""
    assert not [name for name, text in rules() if "lookup(" in text]


# --- after a run ----------------------------------------------------------------------------------------------------

MODELS = ["additive", "linear"]
RUNS = [*MODELS, *REFERENCES]  # floors and ceilings run with every selection
OF_RUNS = {"train_closed_form": len(RUNS), "predict": len(RUNS), "evaluate": len(RUNS)}
AFTER_TRAINING = {"benchmark": 1, "report": 1, "all": 1}


@dataclass
class Finished:
    """A folder where everything was run, and the copy of the repository that ran it."""

    folder: Path
    repository: Path
    config: dict
    python: str

    @property
    def screen(self) -> Path:
        """The user's file."""
        return self.folder / "screen.h5ad"

    def run(self, *arguments: str, config: dict | None = None) -> Outcome:
        """Run everything."""
        return run_snakemake(
            self.folder, *arguments, config=config or self.config, repository=self.repository, python=self.python
        )

    def planned(self, config: dict | None = None) -> dict[str, int]:
        """Return what would be run now."""
        outcome = self.run("--dry-run", config=config)
        assert outcome.returncode == 0, outcome.text
        assert outcome.jobs or "Nothing to be done" in outcome.text
        return outcome.jobs

    def planned_with(self, name: str, before: str, after: str) -> dict[str, int]:
        """Return what would be run after an edit of a file of the repository, and undo the edit."""
        path = self.repository / name
        text = path.read_text()
        assert before in text
        path.write_text(text.replace(before, after, 1))
        try:
            return self.planned()
        finally:
            path.write_text(text)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, python: str) -> Finished:
    """Return a finished run of two closed forms."""
    folder = tmp_path_factory.mktemp("finished")
    config = closed_forms_config()
    config["select"]["models"] = MODELS
    write_screen(folder)
    here = Finished(folder, copy_repository(folder / "repository"), config, python)
    outcome = here.run()
    assert outcome.returncode == 0, outcome.text
    return here


def test_a_run_tells_its_plan_first_and_its_verdict_last(finished: Finished) -> None:
    again = finished.run("--forcerun", "report")
    assert again.returncode == 0, again.text
    assert f"The plan: 1 dataset, 1 split, {len(RUNS)} models (0 learned), 1 seed: {len(RUNS)} runs." in again.text
    (summary,) = read_json(finished.folder / "results/report.json")["summaries"]
    end = again.text[again.text.index("mine × unseen_combination: ") :]
    assert summary["sentence"] in end
    assert f"The report: {finished.folder / 'results/report.html'}" in end
    assert "The report:" not in finished.run().text, "nothing was made"


@pytest.mark.slow
def test_a_run_leaves_what_the_path_grammar_says(finished: Finished) -> None:
    results = finished.folder / "results"
    split = results / "mine" / "unseen_combination"
    expected = [
        *[
            results / f"{name}.tsv"
            for name in ("benchmark", "calibration", "comparisons", "strata", "verdicts", "contexts")
        ],
        *[results / f"report.{suffix}" for suffix in ("html", "json")],
        results / "mine" / "harmonized.h5ad",
        *[results / "mine" / name for name in ("harmonization.json", "quality.tsv", "quality.json", "quality.html")],
    ]
    expected += [split / name for name in ("split.json", "pairs.h5ad", "embeddings.parquet", "audit.json")]
    expected += [
        split / model / "seed_0" / name
        for model in RUNS
        for name in ("model.npz", "run.json", "predictions.h5ad", "metrics.tsv")
    ]
    made = [path for path in results.rglob("*") if path.is_file()]
    assert sorted(path for path in made if path.parent.name != ".made") == sorted(expected)
    records = [path.parent / ".made" / f"{path.name}.json" for path in expected]
    assert sorted(path for path in made if path.parent.name == ".made") == sorted(records)
    for step in ("harmonize/mine", "pair/mine.unseen_combination", "train/mine.unseen_combination.linear.seed_0"):
        assert (finished.folder / "logs" / f"{step}.log").read_text()
        assert (finished.folder / "benchmarks" / f"{step}.tsv").read_text()


def test_a_second_run_plans_nothing(finished: Finished) -> None:
    assert finished.planned() == {}


def requested(finished: Finished, rule: str, *arguments: str) -> tuple[int, int]:
    """Return MB of memory and minutes that the first job of a rule would ask for, if it had to run."""
    outcome = finished.run("--dry-run", "--forcerun", rule, *arguments)
    resources = re.search(rf"rule {rule}:\n(?: +.*\n)*? +resources: (.*)", outcome.text)[1]
    return tuple(int(re.search(rf"{name}=(\d+)", resources)[1]) for name in ("mem_mb", "runtime"))


@pytest.mark.parametrize(
    ("rule", "least"),
    [("train_closed_form", (1500, 20)), ("predict", (1500, 30)), ("evaluate", (1500, 10))],
)
def test_memory_and_time_are_those_of_the_rule_and_double_with_every_attempt(
    rule: str, least: tuple[int, int], finished: Finished
) -> None:
    memory, minutes = requested(finished, rule)
    assert least[0] <= memory < least[0] + 200  # of a screen of a few MB
    assert minutes == least[1]
    again = requested(finished, rule, "--attempt", "3")
    assert again[0] == pytest.approx(4 * memory, abs=4)
    assert again[1] == 4 * minutes


@pytest.mark.parametrize(("rule", "roles"), [("train_closed_form", ["train", "validation"]), ("evaluate", ["test"])])
def test_memory_grows_with_the_perturbations(rule: str, roles: list[str], finished: Finished) -> None:
    split = finished.folder / "results/mine/unseen_combination/split.json"
    before, text = requested(finished, rule)[0], split.read_text()
    content = json.loads(text)
    for role in roles:
        content["perturbations"][role] += [f"MADE{i}" for i in range(5000)]
    try:
        split.write_text(json.dumps(content))
        assert requested(finished, rule)[0] > before + 1000
    finally:
        split.write_text(text)


def test_memory_grows_with_the_input(finished: Finished) -> None:
    assert 1000 < requested(finished, "benchmark")[0] < 1500  # twenty times tables of less than 25 MB


@pytest.mark.slow
def test_jobs_of_a_closed_form_are_submitted_together_and_no_others(light: dict[str, str], tmp_path: Path) -> None:
    write_screen(tmp_path)
    config = closed_forms_config()
    config["select"]["models"] = ["additive", "linear", "scppdm"]
    text = plan_in(tmp_path, light, config, "evaluated").text
    groups = re.findall(r"Group job (\w+) .*\n((?:\n| +.*\n)*)", text)
    together = [(group, sorted(re.findall(r"^ +rule (\w+):", jobs, flags=re.MULTILINE))) for group, jobs in groups]
    assert together == [("closed_form", ["evaluate", "predict", "train_closed_form"])] * len(RUNS)


def test_the_summary_names_what_made_every_result(finished: Finished) -> None:
    lines = [line.split("\t") for line in finished.run("--summary").stdout.splitlines() if "\t" in line]
    table = [dict(zip(lines[0], line, strict=True)) for line in lines[1:]]
    made = {row["output_file"]: row for row in table}
    assert {"results/benchmark.tsv", "results/report.html", "results/mine/unseen_combination/pairs.h5ad"} <= set(made)
    assert {(row["status"], row["plan"]) for row in table} == {("ok", "no update")}
    assert made["results/mine/unseen_combination/pairs.h5ad"]["rule"] == "pair"


def test_the_graph_of_jobs_names_their_wildcards(finished: Finished) -> None:
    graph = finished.run("--dag").stdout
    assert len(re.findall(r"\blabel = ", graph)) == 6 + 3 * len(RUNS) + len(AFTER_TRAINING)
    assert "train_closed_form" in graph
    assert "model: linear" in graph


def test_touched_files_plan_nothing(finished: Finished) -> None:
    touched = [
        path
        for folder in (finished.repository, finished.folder / "results")
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    ]
    assert len(touched) > 50
    now = max(path.stat().st_mtime for path in touched) + 100
    for i, path in enumerate([finished.screen, *reversed(touched)]):  # inputs end up newer than outputs
        os.utime(path, (now + i, now + i))
    assert finished.planned() == {}


def test_params_of_one_model_plan_that_model(finished: Finished) -> None:
    jobs = finished.planned({**finished.config, "models": {"linear": {"params": {"ridge": 0.7}}}})
    assert jobs == {"train_closed_form": 1, "predict": 1, "evaluate": 1, **AFTER_TRAINING}


def test_another_model_plans_its_own_jobs(finished: Finished) -> None:
    select = {**finished.config["select"], "models": [*MODELS, "matching_mean"]}
    jobs = finished.planned({**finished.config, "select": select})
    assert jobs == {"train_closed_form": 1, "predict": 1, "evaluate": 1, **AFTER_TRAINING}


def test_the_least_difference_plans_verdicts_alone(finished: Finished) -> None:
    assert finished.planned({**finished.config, "verdicts": {"least_difference": 0.1}}) == AFTER_TRAINING


def test_a_floor_that_is_listed_runs_no_second_time(finished: Finished) -> None:
    select = {**finished.config["select"], "models": [*MODELS, "perturbed_mean"]}
    assert finished.planned({**finished.config, "select": select}).keys() <= AFTER_TRAINING.keys()


def test_words_about_a_dataset_plan_nothing(finished: Finished) -> None:
    block = {**finished.config["datasets"]["mine"], "reference": "doi:10.1/x", "licence": "MIT", "combinations": True}
    assert finished.planned({**finished.config, "datasets": {"mine": block}}) == {}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "before", "after", "expected"),
    [
        ("pairs.py", "logger = ", "# a remark\nlogger = ", {}),
        ("evaluation/inputs.py", "N_COMPONENTS = 50", "N_COMPONENTS = 9", {"evaluate": len(RUNS), **AFTER_TRAINING}),
        ("pairs.py", "CONTROLS_PER_CELL = 8", "CONTROLS_PER_CELL = 3",
         {"pair": 1, "embeddings": 1, "audit": 1, **OF_RUNS, **AFTER_TRAINING}),
        ("models/closed_form/baselines.py", "1e-10 * s[0]", "1e-9 * s[0]",
         {"train_closed_form": 1, "predict": 1, "evaluate": 1, **AFTER_TRAINING}),
        ("models/closed_form/ceilings.py", '== "a"', '== "b"',
         {"train_closed_form": 3, "predict": 3, "evaluate": 3, **AFTER_TRAINING}),
        ("models/closed_form/regressions.py", "NEIGHBOURS = (1,", "NEIGHBOURS = (2,", {}),
        ("io/files.py", "is not valid JSON", "cannot be read as JSON", {}),
        ("pairs.py", "logger.info(", "logger.debug(", {}),
        ("models/closed_form/baselines.py", "class Additive(", "class Another:\n    level = 3\n\n\nclass Additive(",
         {}),
        ("cli.py", 'datefmt="%H:%M:%S"', 'datefmt="%H:%M"', {}),
        ("models/closed_form/baselines.py", "The bilinear closed form of", "The closed form of",
         {"report": 1, "all": 1}),
    ],
    ids=["a comment", "metrics", "pairing", "a baseline", "ceilings", "another family", "a message", "a log line",
         "a new baseline", "plumbing",
         "words that the report shows"],
)  # fmt: skip
def test_an_edit_of_the_package_plans_what_depends_on_it(
    name: str, before: str, after: str, expected: dict, finished: Finished
) -> None:
    assert finished.planned_with(f"scripts/perturbflow/{name}", before, after) == expected


def test_words_of_the_report_page_plan_nothing(finished: Finished) -> None:
    assert finished.planned_with("rules/captions/verdicts.rst", "One line", "A line") == {}
    assert finished.planned_with("rules/report.smk", 'category="Benchmark"', 'category="Scores"') == {}
    assert finished.planned_with("rules/common.smk", 'category="Benchmark"', 'category="Scores"') == {}


def test_another_content_of_the_screen_plans_everything(finished: Finished) -> None:
    content = finished.screen.read_bytes()
    write_screen(finished.folder, seed=1)
    try:
        jobs = finished.planned()
    finally:
        finished.screen.write_bytes(content)
    assert jobs == {
        "harmonize": 1, "quality": 1, "split": 1, "pair": 1, "embeddings": 1, "audit": 1,
        **OF_RUNS, **AFTER_TRAINING,
    }  # fmt: skip
    assert finished.planned() == {}


MADE_OF_LINEAR = {"predict": 1, "evaluate": 1, **AFTER_TRAINING}
LINEAR = "results/mine/unseen_combination/linear/seed_0"


@pytest.fixture
def copied(finished: Finished, tmp_path: Path) -> Callable[..., Finished]:
    """Return a function that copies the finished folder, with or without what Snakemake knows and time stamps."""

    def copy(snakemake: bool = True, stamps: bool = True) -> Finished:
        here = replace(finished, folder=tmp_path / "copy", config=deepcopy(finished.config))
        ignored = shutil.ignore_patterns("repository", ".cache", *([] if snakemake else [".snakemake"]))
        shutil.copytree(
            finished.folder, here.folder, ignore=ignored, copy_function=shutil.copy2 if stamps else shutil.copyfile
        )
        return here

    return copy


@pytest.mark.parametrize("name", ["model.npz", "run.json", "predictions.h5ad", "metrics.tsv"])
def test_a_deleted_result_is_made_again(name: str, copied: Callable[..., Finished]) -> None:
    here = copied()
    (here.folder / LINEAR / name).unlink()
    expected = {
        "model.npz": {"train_closed_form": 1, **MADE_OF_LINEAR},
        "run.json": {"train_closed_form": 1, **MADE_OF_LINEAR},
        "predictions.h5ad": MADE_OF_LINEAR,
        "metrics.tsv": {"evaluate": 1, **AFTER_TRAINING},
    }
    assert here.planned() == expected[name]


def test_a_deleted_result_that_no_job_asks_for_is_made_again(copied: Callable[..., Finished]) -> None:
    here = copied()
    page = next(here.folder.glob("results/*/quality.html"))
    page.unlink()
    assert here.planned()["quality"] == 1
    assert not page.exists()


@pytest.mark.slow
def test_what_lies_behind_a_file_that_was_made_alone_follows_where_its_bytes_differ(
    copied: Callable[..., Finished],
) -> None:
    here = copied()
    assert here.run("--force", f"{LINEAR}/model.npz").returncode == 0
    assert here.planned() == {"report": 1, "all": 1}, "the same model; run.json says how long it took this time"
    other = {**here.config, "models": {"linear": {"params": {"ridge": 0.7}}}}
    assert here.run(f"{LINEAR}/model.npz", config=other).returncode == 0
    assert here.planned(other) == MADE_OF_LINEAR


@pytest.mark.parametrize("keeps_time", [False, True])
def test_a_damaged_result_is_made_again_and_what_lies_behind_it(
    keeps_time: bool, copied: Callable[..., Finished]
) -> None:
    here = copied()
    pairs = here.folder / "results/mine/unseen_combination/pairs.h5ad"
    stamp = pairs.stat()
    with h5py.File(pairs, "r+") as file:
        file["X/data"][...] = 2 * file["X/data"][...]
    if keeps_time:
        os.utime(pairs, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    outcome = here.run("--dry-run")
    assert outcome.jobs == {
        "pair": 1, "embeddings": 1, "audit": 1, **OF_RUNS, **AFTER_TRAINING,
    }  # fmt: skip
    assert outcome.text.count("Made again: ") == 1
    assert "pairs.h5ad: it was changed after its job wrote it." in outcome.text


def test_a_damaged_table_that_nothing_reads_is_made_again(copied: Callable[..., Finished]) -> None:
    here = copied()
    table = here.folder / "results/comparisons.tsv"
    table.write_text(table.read_text() + "\n")
    assert here.planned() == AFTER_TRAINING


@pytest.mark.slow
@pytest.mark.parametrize("stamps", [True, False])
@pytest.mark.parametrize("snakemake", [True, False])
def test_a_copied_folder_is_current_and_is_not_believed_where_something_changed(
    snakemake: bool, stamps: bool, copied: Callable[..., Finished]
) -> None:
    here = copied(snakemake, stamps)
    assert here.planned() == {}
    here.config["datasets"]["mine"]["qc"]["min_counts"] = 100
    everything = {
        "harmonize": 1, "quality": 1, "split": 1, "pair": 1, "embeddings": 1, "audit": 1,
        **OF_RUNS, **AFTER_TRAINING,
    }  # fmt: skip
    assert here.planned() == everything
    here.config["datasets"]["mine"]["qc"]["min_counts"] = None
    write_screen(here.folder, seed=1)
    assert here.planned() == everything


def test_a_selection_counts_in_a_copied_folder(copied: Callable[..., Finished]) -> None:
    here = copied(snakemake=False)
    here.config["select"]["models"] = ["linear"]
    assert here.planned() == AFTER_TRAINING


def test_a_users_own_triggers_are_obeyed(copied: Callable[..., Finished]) -> None:
    here = copied()
    for script in here.repository.glob("scripts/*.py"):
        os.utime(script, (0, 0))  # older than a result that a plan outdated
    now = max(path.stat().st_mtime for path in here.folder.rglob("*")) + 5
    os.utime(here.repository / "scripts/evaluate.py", (now, now))
    assert here.planned() == {}
    outcome = here.run("--dry-run", "--rerun-triggers", "code")
    assert outcome.jobs == {"evaluate": len(RUNS), **AFTER_TRAINING}, outcome.text


def test_nothing_of_snakemakes_own_is_replaced() -> None:
    for path in [REPOSITORY / "Snakefile", *RULE_FILES]:
        imported = re.findall(r"^(?:from|import) (snakemake[\w.]*)", path.read_text(), flags=re.MULTILINE)
        assert set(imported) <= {"snakemake.exceptions", "snakemake.iocontainers", "snakemake.utils"}, path.name


def test_a_broken_screen_ends_in_one_message(tmp_path: Path) -> None:
    (tmp_path / "screen.h5ad").write_text("no screen")
    outcome = run_snakemake(tmp_path, "data", config=closed_forms_config())
    message = "screen.h5ad is not an h5ad file"
    assert outcome.returncode != 0
    assert outcome.text.count(message) == 1
    assert "Traceback" not in outcome.text
    log = (tmp_path / "logs" / "harmonize" / "mine.log").read_text()
    assert message in log
    assert "Traceback" not in log
    assert not list((tmp_path / "results").rglob("*.*"))


def test_a_mistake_in_the_code_leaves_its_traceback_in_the_log(finished: Finished, tmp_path: Path) -> None:
    """What is not the user's to mend must be found by whoever can."""
    repository = copy_repository(tmp_path / "repository")
    module = repository / "scripts" / "perturbflow" / "screens/harmonize.py"
    module.write_text(module.read_text().replace("    source, files = _opened(raw, dataset)\n", "    1 / 0\n", 1))
    (tmp_path / "screen.h5ad").write_bytes(finished.screen.read_bytes())
    outcome = run_snakemake(tmp_path, "data", config=closed_forms_config(), repository=repository)
    assert outcome.returncode != 0
    log = (tmp_path / "logs" / "harmonize" / "mine.log").read_text()
    assert "ZeroDivisionError" in log
    assert "harmonize failed" in log
