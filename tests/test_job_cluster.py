"""Batch scripts on a real Slurm: rendered ones with a stub supervisor, those of slurm/ with a stub python."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from virtual import Cluster

from bertscale.config import ClusterConfig, load_config
from bertscale.run_folder import job_folder
from launcher.job import JobSpec, render

pytestmark = pytest.mark.slurm

ROOT = Path(__file__).parents[1]
AWKWARD = """it's a "run" of $HOME, `date` 100% #1"""

# The supervisor, without what it supervises; and a rank that says where it is.
WATCH = "import subprocess, sys; sys.exit(subprocess.call(sys.argv[sys.argv.index('--') + 1 :]))\n"
RANK = """\
import os, sys
names = ["PROCID", "STEP_NUM_TASKS", "LOCALID", "STEP_NUM_NODES", "ARRAY_TASK_ID"]
words = [os.environ.get(name, "-") for name in [*map("SLURM_{}".format, names), "CUDA_VISIBLE_DEVICES"]]
print(*words, sys.argv[-1])
"""


def write_job(folder: Path, name: str, **facts: object) -> JobSpec:
    """A job folder that is ready for sbatch, on the virtual cluster, with stubs for code."""
    site = load_config(ClusterConfig, ROOT / "configs/cluster/virtual.yaml", [])
    job = job_folder("pretrain", folder / name)
    code = job / "code" / "launcher"
    code.mkdir(parents=True)
    (code / "__init__.py").touch()  # or another `launcher` on PYTHONPATH comes first
    (code / "watch.py").write_text(WATCH)
    (code / "rank.py").write_text(RANK)
    (job / "logs").mkdir()
    spec = JobSpec(
        stage="pretrain",
        name=name,
        folder=str(job),
        target=str(folder / name),
        logs=f"{job}/logs",
        command=("-m", "bertscale", "pretrain", f"{job}/config.yaml"),
        python="python3",
        batch_python="python3",
        version="0.1.0",
        partition=site.partition,
        tasks_per_node=site.tasks_per_node,
        cpus_per_task=site.cpus_per_task,
        environment=site.environment,
        signal_seconds=site.signal_seconds,
    )
    spec = dataclasses.replace(spec, **facts)  # type: ignore[arg-type]
    (job / "script.sh").write_text(render(spec))
    return spec


def run_job(cluster: Cluster, spec: JobSpec) -> tuple[dict[str, str], str]:
    """Submits the script as a person would, and waits: Slurm's facts and the whole log, its lines sorted."""
    job = cluster.run("sbatch", "--parsable", f"{spec.folder}/script.sh", cwd=Path("/")).stdout.strip()
    cluster.wait(job, "COMPLETED")
    lines = [line for log in Path(spec.logs).iterdir() for line in log.read_text().splitlines() if line]
    return cluster.job(job), "\n".join(sorted(lines))


def test_a_script_submitted_by_hand_from_another_folder(cluster: Cluster) -> None:
    spec = write_job(cluster.shared, "plain", nodes=3, spares=1)
    facts, log = run_job(cluster, spec)
    assert facts["NumNodes"] == "4"
    assert facts["Requeue"] == "1"
    assert log.splitlines() == [f"{n} 6 {n % 2} 3 - - {spec.folder}/config.yaml" for n in range(6)]


def test_a_path_with_blanks_and_quotes_reaches_slurm_and_the_ranks(cluster: Cluster) -> None:
    spec = write_job(cluster.shared, AWKWARD)
    job = cluster.run("sbatch", "--parsable", f"{spec.folder}/script.sh").stdout.strip()
    cluster.wait(job, "COMPLETED")
    shown = cluster.run("scontrol", "show", "job", job).stdout
    assert f"JobName={AWKWARD}\n" in shown
    assert f"Comment=bertscale {spec.folder} \n" in shown
    assert f"{spec.folder}/config.yaml" in (Path(spec.logs) / f"slurm-{job}.out").read_text()


def test_an_array_writes_one_log_for_each_task(cluster: Cluster) -> None:
    spec = write_job(cluster.shared, "array", array=3, tasks_per_node=1, sbatch=("--exclusive",))
    job = cluster.run("sbatch", "--parsable", f"{spec.folder}/script.sh").stdout.strip()
    for task in range(3):
        cluster.wait(f"{job}_{task}", "COMPLETED")
        text = (Path(spec.logs) / f"slurm-{job}_{task}.out").read_text()
        assert text.strip() == f"0 1 0 1 {task} - {spec.folder}/config.yaml"


def test_every_rank_sees_the_gpus_of_its_node(cluster: Cluster) -> None:
    spec = write_job(cluster.shared, "gpu", nodes=2, gpus_per_node=2)
    _, log = run_job(cluster, spec)
    assert log.splitlines() == [f"{n} 4 {n % 2} 2 - 0,1 {spec.folder}/config.yaml" for n in range(4)]


# -------------------------------------------------------------------------------- the scripts of slurm/

# In place of .venv/bin/python: a rank of `python -m bertscale STAGE WORDS` that saves when it is told to.
STUB = """\
#!/bin/bash
echo "$SLURM_PROCID of $SLURM_STEP_NUM_TASKS, start ${SLURM_RESTART_COUNT-0}: $*"
trap 'exit 75' USR1 TERM
[ "$4" != wait ] || [ "${SLURM_RESTART_COUNT-0}" != 0 ] || while :; do sleep 0.1; done
"""
SMALL = ("--partition=main", "--cpus-per-task=1", "--mem=0", "--gpus-per-node=1", "--time=10")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder to submit from, with a stub as its python."""
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    python = tmp_path / ".venv" / "bin" / "python"
    python.write_text(STUB)
    python.chmod(0o755)
    return tmp_path


def submit(cluster: Cluster, checkout: Path, stage: str, *words: str, **options: str) -> tuple[str, Path]:
    """(job id, its log) of a script of slurm/."""
    given = [f"--{name.replace('_', '-')}={value}".removesuffix("=") for name, value in options.items()]
    script = ROOT / "slurm" / f"{stage}.sbatch"
    job = cluster.run("sbatch", "--parsable", *SMALL, *given, script, *words, cwd=checkout).stdout.strip()
    return job, checkout / f"slurm-{stage}-{job}.out"


@pytest.mark.parametrize("stage", ["prep", "convert"])
def test_a_plain_script_runs_its_stage(cluster: Cluster, checkout: Path, stage: str) -> None:
    job, log = submit(cluster, checkout, stage, "words", "a b")
    cluster.wait(job, "COMPLETED")
    assert log.read_text().strip() == f"0 of 1, start 0: -m bertscale {stage} words a b"
    assert cluster.job(job)["Requeue"] == "1"


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
@pytest.mark.parametrize("how", ["time limit", "pre-emption", "cancel"])
def test_a_plain_training_saves_and_requeues_itself(
    cluster: Cluster, checkout: Path, how: str, stage: str
) -> None:
    size = {"nodes": "4", "ntasks_per_node": "2"}
    job, log = submit(cluster, checkout, stage, "wait", partition="spot", **size)
    cluster.wait(job, "RUNNING")
    while not log.exists() or log.read_text().count("start 0") < 8:
        cluster.wait(job, "RUNNING")
    if how == "time limit":
        cluster.run("scancel", "--signal=USR1", job)  # what Slurm sends then, to the steps alone
    elif how == "pre-emption":
        submit(cluster, checkout, stage, "", partition="high", nodes="4", exclusive="")
    else:
        cluster.run("scancel", job)
        cluster.wait(job, "CANCELLED")
        return
    cluster.wait(job, "PENDING")
    cluster.wait(job, "COMPLETED")
    assert cluster.job(job)["Restarts"] == "1"
    assert log.read_text().count("start 1") == 8
