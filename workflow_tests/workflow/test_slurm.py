"""The workflow on a real SLURM: three virtual nodes, two GPUs that are none, and all that goes wrong on clusters."""

import json
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
import slurm
import yaml
from conftest import REPOSITORY, run_snakemake
from slurm_runs import FATES, LEARNED, N_CLOSED, PROFILE, TARGET, Failures, Interruption, fail, interrupt

CLOSED_FORM = (
    "closed_form_evaluate_predict_train_closed_form"  # the group and its rules, as the plugin names such a job
)
GUIDE = REPOSITORY / "docs" / "how-to" / "cluster.md"


@pytest.fixture(scope="module")
def cluster() -> Iterator[slurm.Cluster]:
    """Start a cluster for the tests of this file; they skip where that cannot be."""
    if reason := slurm.obstacle():
        pytest.skip(reason)
    pytest.importorskip("snakemake_executor_plugin_slurm")
    with tempfile.TemporaryDirectory() as folder, slurm.running(Path(folder) / "slurm") as cluster:
        yield cluster


# --- the profile ----------------------------------------------------------------------------------------------------


def test_every_setting_of_the_profile_has_its_reason() -> None:
    lines = (PROFILE / "profile.yaml").read_text().splitlines()
    settings = [i for i, line in enumerate(lines) if re.match(r"[a-z-]+:", line)]
    assert len(settings) == len(yaml.safe_load("\n".join(lines))) > 5
    assert all(lines[i - 1].startswith("# ") for i in settings)


def test_every_rule_that_can_use_a_gpu_has_one_in_the_profile() -> None:
    text = (REPOSITORY / "rules" / "train.smk").read_text()
    (first,) = (body.split(":")[0] for body in text.split("\nrule ")[1:] if "gpu=gpu" in body)
    rules = {first, *re.findall(rf"^use rule {first} as (\w+)", text, flags=re.MULTILINE)}
    rules |= {body.split()[2] for body in text.split("\nuse rule ")[1:] if "gpu=gpu" in body}
    resources = yaml.safe_load((PROFILE / "profile.yaml").read_text())["set-resources"]
    assert resources == {rule: {"slurm_partition": "gpu", "gpu": 1} for rule in rules}


def test_the_profile_can_be_planned_without_a_cluster(tmp_path: Path) -> None:
    pytest.importorskip("snakemake_executor_plugin_slurm")
    outcome = run_snakemake(tmp_path, "--dry-run", "--workflow-profile", str(PROFILE))
    assert outcome.returncode == 0, outcome.text
    assert outcome.jobs["train_jepa"]
    training = outcome.text.split("rule train_jepa:")[1].split("\n\n")[0]
    assert "slurm_partition=gpu" in training
    assert "gpu=1" in training


# --- interrupted, and again -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def interruption(cluster: slurm.Cluster, tmp_path_factory: pytest.TempPathFactory) -> Interruption:
    """Return the two runs, made once."""
    return interrupt(tmp_path_factory.mktemp("interrupted"), cluster)


@pytest.mark.slow
def test_ctrl_c_cancels_every_job(interruption: Interruption) -> None:
    assert interruption.interrupted.returncode == 1
    assert "Terminating processes on user request" in interruption.interrupted.text
    assert [job.state for job in interruption.jobs if job.rule == "train_diffusion"] == ["CANCELLED", "COMPLETED"]


@pytest.mark.slow
def test_the_next_run_does_what_is_left_and_no_more(interruption: Interruption) -> None:
    resumed = interruption.resumed
    assert resumed.returncode == 0, resumed.text
    assert resumed.jobs == {"train_diffusion": 1, "predict": 1, "evaluate": 1, "evaluated": 1}
    assert len(interruption.jobs) <= 10 + N_CLOSED
    (cancelled,) = (job for job in interruption.jobs if job.state != "COMPLETED")
    assert cancelled.rule == "train_diffusion"


@pytest.mark.slow
def test_the_training_goes_on_where_it_was_cancelled(interruption: Interruption) -> None:
    log = (interruption.folder / "logs/train/mine.unseen_combination.scppdm.seed_0.log").read_text()
    assert "resuming from" in log
    run = json.loads((interruption.folder / LEARNED / "run.json").read_text())
    assert [row["step"] for row in run["history"]] == [100, 200, 300, 400, 500, 600]
    assert len(pd.read_csv(interruption.folder / LEARNED / "metrics.tsv", sep="\t")) > 20


@pytest.mark.slow
def test_jobs_are_spread_over_the_nodes_and_trainings_of_networks_get_the_gpus(interruption: Interruption) -> None:
    training = [job for job in interruption.jobs if job.rule == "train_diffusion"]
    others = [job for job in interruption.jobs if job.rule != "train_diffusion"]
    assert {(job.partition, job.node, job.gpus) for job in training} == {("gpu", slurm.GPU_NODE, 1)}
    assert {job.node for job in others} == set(slurm.CPU_NODES)
    assert {(job.partition, job.gpus) for job in others} == {("cpu", 0)}


@pytest.mark.slow
def test_jobs_ask_for_what_their_rules_say(interruption: Interruption) -> None:
    (harmonize,) = (job for job in interruption.jobs if job.rule == "harmonize")
    assert (harmonize.cpus, harmonize.memory_mb, harmonize.time_limit) == (4, 4000, "04:00:00")
    for job in interruption.jobs:
        if job.rule == CLOSED_FORM:  # by the size of their input, a few MB
            assert 1500 <= job.memory_mb < 1600


@pytest.mark.slow
def test_the_steps_of_a_closed_form_are_one_job(interruption: Interruption) -> None:
    names = [job.rule for job in interruption.jobs]
    assert names.count(CLOSED_FORM) == N_CLOSED
    assert names.count("predict") == names.count("evaluate") == 1
    assert len([*interruption.folder.rglob("metrics.tsv")]) == 1 + N_CLOSED


@pytest.mark.slow
def test_nothing_is_left_to_be_done_whatever_the_users_own_profile_says(
    interruption: Interruption, tmp_path: Path
) -> None:
    """Many have `rerun-triggers: mtime` in their own profile; with it, a changed parameter would go unnoticed."""
    (tmp_path / "config.yaml").write_text("rerun-triggers: mtime")
    (tmp_path / "fewer_genes.yaml").write_text("genes: {n_hvg: 30}")
    profiles = (
        "--dry-run",
        "--profile",
        str(tmp_path),
        "--workflow-profile",
        str(PROFILE),
        "--configfile",
        "mine.yaml",
    )
    as_it_is = run_snakemake(interruption.folder, *profiles, "--", TARGET)
    assert "Nothing to be done" in as_it_is.text
    changed = run_snakemake(interruption.folder, *profiles, str(tmp_path / "fewer_genes.yaml"), "--", TARGET)
    assert {"pair": 1, "train_diffusion": 1}.items() <= changed.jobs.items(), changed.text


# --- failing --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def failures(cluster: slurm.Cluster, tmp_path_factory: pytest.TempPathFactory) -> Failures:
    """Return the run in which four screens fail in four ways, made once."""
    return fail(tmp_path_factory.mktemp("failing"), cluster)


def slurm_log(job: slurm.Job) -> str:
    """Return what the plugin keeps of a failed job."""
    (path,) = job.folder.glob(f".snakemake/slurm_logs/**/{job.id}.log")
    return path.read_text()


@pytest.mark.slow
def test_a_job_killed_for_memory_is_run_again_with_more(failures: Failures) -> None:
    killed, *again = failures.of("starved")
    assert killed.state in ("FAILED", "OUT_OF_MEMORY")
    assert "exceeded memory limit" in slurm_log(killed)
    assert again[-1].state == "COMPLETED"
    assert [job.memory_mb for job in (killed, *again)] == [300, 600, 1200][: 1 + len(again)]


@pytest.mark.slow
def test_a_job_that_hangs_ends_with_its_run_time_and_is_run_again(failures: Failures) -> None:
    hung, again = failures.of("hung")
    assert (hung.state, again.state) == ("TIMEOUT", "COMPLETED")
    assert "DUE TO TIME LIMIT" in slurm_log(hung)


@pytest.mark.slow
def test_a_job_on_a_lost_node_is_run_again_on_another(failures: Failures) -> None:
    lost, again = failures.of("lost")
    assert (lost.state, again.state) == ("NODE_FAIL", "COMPLETED")
    assert lost.node != again.node
    assert again.memory_mb == 2 * lost.memory_mb


@pytest.mark.slow
def test_a_partition_that_is_not_there_fails_at_once_and_alone(failures: Failures) -> None:
    assert failures.outcome.returncode == 1
    assert failures.of("misplaced") == []
    assert {path.parent.name for path in failures.folder.rglob("harmonized.h5ad")} == {*FATES} - {"misplaced"}
    assert len(failures.jobs) <= 12


@pytest.mark.slow
def test_jobs_run_on_the_account_of_the_profile(failures: Failures) -> None:
    assert {job.account for job in failures.jobs} == {"mylab"}


@pytest.mark.slow
def test_messages_are_those_of_the_guide(failures: Failures, interruption: Interruption) -> None:
    shown = failures.outcome.text + interruption.interrupted.text
    shown += "".join(slurm_log(job) for job in failures.jobs if job.state not in ("COMPLETED", "NODE_FAIL"))
    table = GUIDE.read_text().split("<!-- messages -->")[1].split("<!-- messages: end -->")[0]
    messages = re.findall(r"^\| `([^`]+)`", table, flags=re.MULTILINE)
    assert len(messages) > 4
    for message in messages:
        pattern = ".*?".join(map(re.escape, message.split("…")))
        assert re.search(pattern, shown), f"docs/how-to/cluster.md quotes a message that nobody sees: {message}"


@pytest.mark.slow
def test_no_process_of_a_job_is_left(failures: Failures, interruption: Interruption, cluster: slurm.Cluster) -> None:
    assert cluster.queue() == []
    assert not [process for node in slurm.NODES for process in cluster.processes(f"SLURMD_NODENAME={node}")]
