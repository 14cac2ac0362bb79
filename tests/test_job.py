"""Batch scripts: compared with whole golden files, and read as bash and sbatch read them.

After a change that is meant, REWRITE_GOLDEN=1 python -m pytest tests/test_job.py writes the golden files:
look at them with `git diff tests/golden`.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bertscale.config import (
    ClusterConfig,
    FinetuneConfig,
    PipelineConfig,
    PrepConfig,
    PretrainConfig,
    describe_fields,
    load_config,
)
from bertscale.run_folder import job_folder
from launcher.job import STAGES, JobSpec, render, step_lines

ROOT = Path(__file__).parents[1]
SHELL_FILES = ("tests/golden/*.sbatch", "slurm/*.sbatch", "slurm/cluster/*.sh", "slurm/cluster/vc", ".ci/run")


def step_command(spec: JobSpec) -> list[str]:
    """The words of the srun command."""
    return [word for line in step_lines(spec) for word in line]


def new_spec(cluster: str, stage: str, target: str, words: list[str], **facts: Any) -> JobSpec:
    """A job on one of the shipped clusters, filled in as `bertscale submit` does."""
    site = load_config(ClusterConfig, ROOT / "configs" / "cluster" / f"{cluster}.yaml", [])
    shared = {field.name for field in dataclasses.fields(JobSpec)} & set(ClusterConfig.model_fields)
    folder, name = str(job_folder(stage, target)), Path(target).name
    values: dict[str, Any] = {
        **{name: getattr(site, name) for name in shared},
        "stage": stage,
        "name": f"{stage}-{name}",
        "folder": folder,
        "target": target,
        "logs": f"{site.log_root}/{name}" if site.log_root else f"{folder}/logs",
        "command": ("-m", "bertscale", stage, *words),
        "python": site.python,
        "batch_python": site.batch_python or site.python,
        "version": "0.1.0, commit 1a2b3c4",
        "tasks_per_node": site.gpus_per_node or site.tasks_per_node,
        **facts,
    }
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    return JobSpec(**values)


def golden_specs() -> dict[str, JobSpec]:
    gpu, spot, cpu, data = "/lustre/runs/base", "/shared/runs/law base", "/home/runs/small", "/home/runs/data"
    prep = {"array": 8, "tasks_per_node": 1, "cpus_per_task": 64, "start_seconds": 0.0}
    glue = ["runs/base", "data/glue", "device=cuda", "--output", "runs/base-glue", "--tasks", "mnli", "cola"]
    one = {"array": 7, "tasks_per_node": 1, "gpus_per_node": 1, "start_seconds": 0.0}
    return {
        "glue-array": new_spec("gpu", "glue", f"{gpu}-glue", [*glue, "--task-count", "7"], **one),
        "gpu": new_spec("gpu", "pretrain", gpu, [f"{gpu}/job/config.yaml"], nodes=16),
        "spot": new_spec("spot", "pretrain", spot, [f"{spot}/job/config.yaml"], nodes=4, spares=1),
        "cpu": new_spec("cpu", "pretrain", cpu, [f"{cpu}/job/config.yaml"], nodes=2, time="1-0"),
        "prep-array": new_spec("cpu", "prep", data, [f"{data}.job/config.yaml", "--task-count", "8"], **prep),
    }


@pytest.mark.parametrize("name", golden_specs())
def test_the_script_is_the_golden_one(name: str) -> None:
    path = ROOT / "tests" / "golden" / f"{name}.sbatch"
    text = render(golden_specs()[name])
    if os.environ.get("REWRITE_GOLDEN"):
        path.write_text(text)
    assert text == path.read_text()


def shellcheck(*paths: Path) -> None:
    program = Path(sys.executable).with_name("shellcheck")
    if not program.exists():
        pytest.skip('there is no shellcheck: pip install -e ".[dev]"')
    result = subprocess.run([program, *paths], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def test_shellcheck_has_nothing_to_say() -> None:
    shellcheck(*(path for pattern in SHELL_FILES for path in ROOT.glob(pattern)))


@pytest.mark.parametrize("spec", golden_specs().values(), ids=golden_specs())
def test_a_spec_survives_json(spec: JobSpec) -> None:
    assert JobSpec.from_json(spec.to_json()) == spec
    words = {"A": 'é "\n'}
    full = dataclasses.replace(spec, previous=("/a/job",), following=("/b.job", "/c/job"), environment=words)
    assert JobSpec.from_json(full.to_json()) == full


def test_a_job_lies_in_the_run_or_beside_the_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folders = [job_folder(stage, "runs/a") for stage in STAGES]
    assert folders == [tmp_path / "runs" / name for name in ("a.job", "a/job", "a.job", "a.job", "a.job")]


def test_a_job_is_read_where_nothing_is_installed() -> None:
    # -S: without site-packages, as on a batch host.
    command = [sys.executable, "-S", "-c", "import launcher.job"]
    subprocess.run(command, cwd=ROOT, check=True)


# ------------------------------------------------------------------------- what bash makes of a script


# No backslash: in a path of sbatch --output it switches %j off.
AWKWARD = """it's a "run" of $HOME, `date` 100% #1"""

# Stands for the supervisor: prints what it was given, and where.
STUB = """\
import json, os, signal, sys
print(json.dumps({
    "arguments": sys.argv[1:],
    "folder": os.getcwd(),
    "ignores_usr1": signal.getsignal(signal.SIGUSR1) == signal.SIG_IGN,
    "environment": [os.environ[name] for name in ("PYTHONPATH", "WORD", "SET_UP")],
}))
"""


@pytest.fixture
def awkward(tmp_path: Path) -> JobSpec:
    """A job with every kind of character in its paths, options and values, and a stub as its supervisor."""
    folder = tmp_path / AWKWARD / "job"
    (folder / "code" / "launcher").mkdir(parents=True)
    (folder / "code" / "launcher" / "watch.py").write_text(STUB)
    return new_spec(
        "cpu",
        "pretrain",
        str(folder.parent),
        [f"{folder}/config.yaml", ""],
        name=AWKWARD,
        setup=("export SET_UP=$((1 + 1))",),
        environment={"WORD": AWKWARD + "\\"},
        srun=("--container-image=/images/a b.sqsh",),
        sbatch=("--exclusive", "--mail-user=a@b.c"),
        container=("env", "A B=c"),
        batch_python=sys.executable,
    )


@pytest.fixture
def script(awkward: JobSpec, tmp_path: Path) -> Path:
    path = tmp_path / "script.sh"
    path.write_text(render(awkward))
    return path


def test_the_supervisor_gets_every_word_as_it_was(awkward: JobSpec, script: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"  # holds a checkout with other code
    (elsewhere / "launcher").mkdir(parents=True)
    (elsewhere / "launcher" / "watch.py").write_text("raise SystemExit('taken from the working directory')")
    environment = os.environ | {"PYTHONPATH": str(elsewhere)}
    result = subprocess.run(
        ["bash", str(script)], cwd=elsewhere, env=environment, capture_output=True, text=True
    )
    assert result.stderr == ""
    assert json.loads(result.stdout) == {
        "arguments": [awkward.folder, "--", *step_command(awkward)],
        "folder": awkward.folder,
        "ignores_usr1": True,
        "environment": [f"{awkward.folder}/code:{elsewhere}", AWKWARD + "\\", "2"],
    }
    python = awkward.python
    assert step_command(awkward)[-12:] == [
        *("--container-image=/images/a b.sqsh", "env", "A B=c", python, "-m", "launcher.rank"),
        *(python, "-m", "bertscale", "pretrain", f"{awkward.folder}/config.yaml", ""),
    ]


def test_an_awkward_script_is_clean_too(script: Path) -> None:
    shellcheck(script)


def test_a_missing_folder_ends_the_script_at_once(awkward: JobSpec, script: Path) -> None:
    shutil.rmtree(awkward.folder)
    result = subprocess.run(["bash", str(script)], capture_output=True, text=True)
    assert result.returncode == 1
    assert "No such file or directory" in result.stderr


# ------------------------------------------------------------------------------------------- its options


def options(spec: JobSpec) -> list[str]:
    """The options of all #SBATCH lines; within double quotes sbatch reads what bash reads."""
    script = render(spec).splitlines()
    lines = [line.removeprefix("#SBATCH ") for line in script if line.startswith("#SBATCH ")]
    printed = subprocess.run(
        ["bash", "-c", f"printf '%s\\0' {' '.join(lines)}"], capture_output=True, text=True, check=True
    )
    words = printed.stdout.removesuffix("\0").split("\0")
    assert len(words) == len(lines)
    return words


def test_spares_are_of_the_job_and_not_of_a_step() -> None:
    spec = golden_specs()["spot"]
    assert {"--nodes=5", "--no-kill"} <= set(options(spec))
    assert "--nodes=4" in step_command(spec)
    assert "--ntasks=16" in step_command(spec)
    # With it --kill-on-bad-exit and --wait would be without effect.
    assert not any(word.startswith("--no-kill") for word in step_command(spec))
    assert "--no-kill" not in options(dataclasses.replace(spec, spares=0))


def test_what_srun_does_not_inherit_is_said_again() -> None:
    spec = golden_specs()["gpu"]
    said = {"--cpus-per-task=12", "--gpus-per-node=8", "--ntasks-per-node=8"}
    assert said <= set(options(spec))
    assert said <= set(step_command(spec))


def test_an_array_writes_a_log_for_each_task() -> None:
    spec = golden_specs()["prep-array"]
    logs = "--output=/home/runs/data.job/logs"
    assert {"--array=0-7", "--nodes=1", f"{logs}/slurm-%A_%a.out"} <= set(options(spec))
    one = options(dataclasses.replace(spec, array=0))
    assert f"{logs}/slurm-%j.out" in one
    assert not any(option.startswith("--array") for option in one)


def test_a_percent_sign_in_a_path_is_no_pattern(awkward: JobSpec) -> None:
    (output,) = (option for option in options(awkward) if option.startswith("--output="))
    assert output == f"--output={awkward.logs.replace('%', '%%')}/slurm-%j.out"
    assert f"--job-name={AWKWARD}" in options(awkward)


def test_options_of_the_site_come_last() -> None:
    spec = dataclasses.replace(golden_specs()["gpu"], sbatch=("--time=5",), srun=("--wait=9",))
    assert options(spec)[-1] == "--time=5"
    assert step_command(spec).index("--wait=9") > step_command(spec).index("--wait=60")


def test_options_with_blanks_and_numbers_in_the_environment() -> None:
    comment = '--comment={"project": 12, "cost": "a b"}'
    site = ClusterConfig.model_validate(
        {"sbatch": [comment], "environment": {"NCCL_IB_TIMEOUT": 22, "A": 0.5}}
    )
    assert site.environment == {"NCCL_IB_TIMEOUT": "22", "A": "0.5"}
    assert options(dataclasses.replace(golden_specs()["gpu"], sbatch=tuple(site.sbatch)))[-1] == comment
    for wrong in ("--comment a", "comment=a", "--comment=a\n#SBATCH --time=1"):
        with pytest.raises(ValueError, match="is not an option of the form --name=value"):
            ClusterConfig.model_validate({"sbatch": [wrong]})
    with pytest.raises(ValueError, match="A is written as yes, no, true or false: put the value in quotes"):
        ClusterConfig.model_validate({"environment": {"A": True}})


# --------------------------------------------------------------------------------------- shipped configs


def test_the_page_has_every_key_of_a_cluster_file() -> None:
    page = (ROOT / "docs" / "slurm.md").read_text()
    for key, text in describe_fields(ClusterConfig):
        assert f"| `{key}` | {text.rpartition(' (')[0]} |\n" in page


def test_sbatch_reads_every_option_of_the_plain_scripts() -> None:
    """It stops looking for them at the first command."""
    for path in (ROOT / "slurm").glob("*.sbatch"):
        lines = [line for line in path.read_text().splitlines() if line]
        head = next(number for number, line in enumerate(lines) if not line.startswith("#"))
        assert not [line for line in lines[head:] if line.startswith("#SBATCH")], path


@pytest.mark.parametrize("path", sorted((ROOT / "configs/pipeline").iterdir()), ids=lambda path: path.name)
def test_a_shipped_pipeline_names_files_that_are_there(path: Path) -> None:
    pipeline = load_config(PipelineConfig, path, [])
    for stage in pipeline.stages:
        assert (ROOT / (stage.cluster or pipeline.cluster)).is_file()
        config = stage.prep or stage.pretrain or stage.finetune
        assert config is None or (ROOT / config).is_file()


def test_the_quickstart_s_pipeline_hands_on_what_it_makes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each stage reads what an earlier one writes, and its overrides fit its config."""
    monkeypatch.chdir(ROOT)
    pipeline = load_config(PipelineConfig, "configs/pipeline/quickstart.yaml", [])
    prep, pretrain, convert, finetune = pipeline.stages
    data = load_config(PrepConfig, str(prep.prep), prep.set)
    run = load_config(PretrainConfig, str(pretrain.pretrain), pretrain.set)
    task = load_config(FinetuneConfig, str(finetune.finetune), finetune.set)
    assert run.data == data.output
    assert convert.convert == [run.run, task.encoder]
    cluster = load_config(ClusterConfig, pipeline.cluster, [])
    ranks = pretrain.nodes * (pretrain.ranks_per_node or cluster.tasks_per_node)
    data_parallel = ranks // run.parallel.tensor
    assert run.train.global_batch % (run.train.micro_batch * data_parallel) == 0
