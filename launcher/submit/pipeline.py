"""Stages -> the jobs that do them: configs read and resolved, sites read, one JobSpec for each job.

    jobs, mistakes = stage_jobs([PipelineStage(pretrain="configs/pretrain/base.yaml", nodes=4)], "site.yaml")

Nothing is asked of Slurm and nothing is written.
"""

from __future__ import annotations

import dataclasses
import glob
import os
import re
import shlex
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bertscale.config import (
    ClusterConfig,
    Corpus,
    ExamplesConfig,
    FinetuneConfig,
    GlueConfig,
    InitConfig,
    LaunchConfig,
    PipelineStage,
    PrepConfig,
    PretrainConfig,
    UserError,
    load_config,
    load_phases,
    load_tasks,
)
from bertscale.config.glue import shares, words_of
from bertscale.config.glue_tasks import find_tasks
from bertscale.run_folder import CONFIG, JOB_SPEC, LOGS, RESULT, TASKS, existing_marks, job_folder
from launcher.job import TRAINING, JobSpec
from launcher.queue_jobs import from_record
from launcher.runs import is_done, read_spec, shown
from launcher.submit.freeze import config_text, version

Config = PrepConfig | PretrainConfig | FinetuneConfig | GlueConfig

SECTIONS: dict[str, type[Config]] = {
    "prep": PrepConfig,
    "pretrain": PretrainConfig,
    "finetune": FinetuneConfig,
}
PATHS = {  # keys of a config that name files or folders
    "prep": ("input", "output", "tokenizer"),
    "pretrain": ("run", "data", "heldout", "init"),
    "finetune": ("encoder", "init", "data", "output"),
    "glue": ("model", "folder", "output"),
}
# What a finished stage has written last.
RESULTS = {
    "prep": "manifest.json",
    "pretrain": RESULT,
    "convert": "",
    "finetune": RESULT,
    "glue": "glue.json",
    TASKS: "",
}
# What a job takes from the cluster file as it is.
OF_SITE = (
    *("partition", "account", "qos", "constraint", "memory_per_node", "environment", "signal_seconds"),
    *("node_check", "check_seconds", "min_free_memory_gb", "min_free_disk_gb", "min_bandwidth_mb"),
    "bad_node_hours",
)
LISTS_OF_SITE = ("sbatch", "srun", "setup", "container")


@dataclass(frozen=True)
class StageJob:
    """One job that is about to be queued; convert has no config, its source is `source`."""

    spec: JobSpec
    cluster: ClusterConfig
    config: Config | None
    source: str | None = None
    tasks: dict[str, FinetuneConfig] = field(default_factory=dict)  # beside a pretraining, by name


def stage_jobs(
    stages: Sequence[PipelineStage], cluster: str, pipeline: str | None = None
) -> tuple[list[StageJob], list[str]]:
    """The jobs of `stages` in their order, and the mistakes in the config files of those that have none.

    `pipeline` is its name, if they are a pipeline, `cluster` the cluster file of stages that name none.
    """
    jobs: list[StageJob] = []
    mistakes: dict[str, None] = {}  # each once: stages may share a file
    for stage in [part for whole in stages for part in _parts(whole)]:
        site = config = None
        try:
            site = load_config(ClusterConfig, stage.cluster or cluster, [])
        except UserError as error:
            mistakes |= dict.fromkeys(str(error).splitlines())
        try:
            config = None if stage.convert else _load(stage)
        except UserError as error:
            mistakes |= dict.fromkeys(str(error).splitlines())
        if site is not None and (config is not None or stage.convert):
            try:
                jobs += _jobs_of(stage, site, config, pipeline)
            except UserError as error:
                mistakes |= dict.fromkeys(str(error).splitlines())
    # At the end, so that no stage waits for them.
    return [*jobs, *(_tasks_job(job) for job in jobs if job.tasks)], list(mistakes)


def _parts(stage: PipelineStage) -> list[PipelineStage]:
    """A stage for each phase of a pretraining; else the stage alone, wrong configs included."""
    if stage.pretrain is None:
        return [stage]
    try:
        names = list(load_phases(stage.pretrain, stage.set))
    except UserError:  # which is told when the stage is made
        return [stage]
    return [
        stage.model_copy(update={"set": [*stage.set, f"phase={name}"]}) if name else stage for name in names
    ]


def _load(stage: PipelineStage) -> Config:
    """The config of a stage, its paths made absolute from where the person stands."""
    config: Config
    if stage.glue is not None:
        config = stage.glue.model_copy(
            update={"output": stage.glue.target, "set": [*stage.glue.set, *stage.set]}
        )
    else:
        config = load_config(SECTIONS[stage.stage], getattr(stage, stage.stage), stage.set)
    return config.model_copy(update={key: _absolute(getattr(config, key)) for key in PATHS[stage.stage]})


def _absolute(value: Any) -> Any:
    """A path, a corpus, several of them or some by name, labelled examples or None, with absolute paths."""
    if isinstance(value, list):
        return [_absolute(entry) for entry in value]
    if isinstance(value, dict):
        return {key: _absolute(entry) for key, entry in value.items()}
    if isinstance(value, Corpus):
        return value.model_copy(update={"path": os.path.abspath(value.path)})
    if isinstance(value, InitConfig):
        return value.model_copy(update={"source": os.path.abspath(value.source)})
    if isinstance(value, ExamplesConfig):
        files = [
            file.model_copy(update={"path": os.path.abspath(file.path)}) for file in value.training_files
        ]
        held = {
            name: path and os.path.abspath(path)
            for name in ("dev", "test")
            for path in [getattr(value, name)]
        }
        return value.model_copy(update={"train": files, **held})
    return value and os.path.abspath(value)


def _jobs_of(
    stage: PipelineStage, site: ClusterConfig, config: Config | None, pipeline: str | None
) -> list[StageJob]:
    """One job, or the three of a prep that is shared by an array: tokenizer, shards, manifest; or of glue."""
    config = _on_site(config, site)
    if isinstance(config, GlueConfig):
        return _glue_jobs(stage, site, config, pipeline)
    if isinstance(config, PretrainConfig):
        target = config.run
    elif config is not None:
        target = config.output
    else:
        assert stage.convert is not None
        target = os.path.abspath(stage.convert[1])
    replace = ("--replace",) if stage.replace else ()
    if not stage.array:
        tasks = isinstance(config, PretrainConfig) and config.train.tasks
        leave = ("--leave-tasks",) if tasks else ()
        return [_job(stage, site, config, target, pipeline, options=(*replace, *leave))]
    count = ("--task-count", str(stage.array))
    return [
        _job(stage, site, config, target, pipeline, "tokenizer", ("--tokenizer-only", *replace)),
        _job(stage, site, config, target, pipeline, "", count, array=stage.array),
        _job(stage, site, config, target, pipeline, "finish", ("--finish", *count)),
    ]


def _glue_jobs(
    stage: PipelineStage, site: ClusterConfig, config: GlueConfig, pipeline: str | None
) -> list[StageJob]:
    """The task that others start from, an array of the others, the table. Raises UserError without tasks."""
    found = find_tasks(Path(config.folder), config.tasks)
    # By name: a task that comes into the folder later does not move the numbers of the others.
    config = config.model_copy(update={"tasks": [task.name for task in found.tasks]})
    first, rest = shares(config, found)
    target, count = config.target, ("--task-count", str(len(rest)))
    jobs = [_job(stage, site, config, target, pipeline, "", count, array=len(rest))]
    if first:
        jobs.insert(0, _job(stage, site, config, target, pipeline, "first", ("--intermediate-only",)))
    table = _job(stage, site, config, target, pipeline, "finish", ("--finish",))
    # It fails where a task has failed, and would do so again.
    once = dataclasses.replace(table.spec, restarts=0, gpus_per_node=0)
    return [*jobs, dataclasses.replace(table, spec=once)]


def _on_site(config: Config | None, site: ClusterConfig) -> Config | None:
    """The config with the device that the site has, if it names none; raises UserError for another one.

    So a job fails at once where a node does not show the GPUs that it was given.
    """
    if config is None or isinstance(config, PrepConfig):
        return config
    device, other = ("cuda", "without") if site.gpus_per_node else ("cpu", "with")
    if isinstance(config, GlueConfig):
        settings = [setting for setting in config.set if setting.startswith("device=")]
        given = settings[-1].removeprefix("device=") if settings else "auto"
    else:
        given = config.device
    if given not in ("auto", device):
        raise UserError(
            f"device={given}, and the cluster file has gpus_per_node={site.gpus_per_node}: set "
            f"device=auto, or take the cluster file of a partition {other} GPUs"
        )
    if isinstance(config, GlueConfig):
        return config.model_copy(update={"set": [*config.set, f"device={device}"]})
    return config.model_copy(update={"device": device})


def _job(
    stage: PipelineStage,
    site: ClusterConfig,
    config: Config | None,
    target: str,
    pipeline: str | None,
    part: str = "",
    options: tuple[str, ...] = (),
    array: int = 0,
) -> StageJob:
    kind = stage.stage
    folder = job_folder(kind, f"{target}.{part}" if part else target)
    phase = next((word.removeprefix("phase=") for word in stage.set if word.startswith("phase=")), "")
    words = [pipeline or kind, kind if pipeline else Path(target).name, part or (phase if pipeline else "")]
    name = re.sub(r"[^\w.-]", "-", "-".join(filter(None, words)))
    source = os.path.abspath(stage.convert[0]) if stage.convert else None
    if source is not None:
        average = ("--average",) if stage.average else ()
        said: tuple[str, ...] = ("convert", source, target, "--no-show", *average)
    elif isinstance(config, GlueConfig):
        said = ("glue", *words_of(config), *options)
    else:
        said = (kind, f"{folder}/{CONFIG}", *options)
    python = _program(site.python) or sys.executable
    tasks_per_node, cpus_per_task, gpus_per_node = _share_of_node(stage, site)
    of_site: dict[str, Any] = {key: getattr(site, key) for key in OF_SITE}
    of_site |= {key: tuple(getattr(site, key)) for key in LISTS_OF_SITE}
    trains = isinstance(config, PretrainConfig | FinetuneConfig)
    launch = config.launch if isinstance(config, PretrainConfig | FinetuneConfig) else LaunchConfig()
    spec = JobSpec(
        stage=kind,
        name=name,
        folder=str(folder),
        target=target,
        logs=str(Path(site.log_root).absolute() / name if site.log_root else folder / LOGS),
        command=("-m", "bertscale", *said),
        python=python,
        batch_python=_program(site.batch_python) or python,
        version=version(),
        nodes=stage.nodes,
        spares=stage.spares,
        tasks_per_node=tasks_per_node,
        cpus_per_task=cpus_per_task,
        gpus_per_node=gpus_per_node,
        time=stage.time or site.time,
        array=array,
        **of_site,
        start_seconds=launch.start_seconds if trains else 0.0,
        hang_seconds=launch.hang_seconds,
        restarts=launch.restarts,
        restarts_without_progress=launch.restarts_in_a_row(slurm=True),
        bad_nodes=os.path.abspath(site.bad_nodes) if site.bad_nodes else None,
    )
    tasks = {}
    if isinstance(config, PretrainConfig) and config.train.tasks:
        tasks = {
            name: task.model_copy(update={"data": _absolute(task.data)})
            for name, task in load_tasks(config).items()
        }
        config = _with_tasks_in(folder, config, tasks)
    return StageJob(spec, site, config, source, tasks)


def _tasks_job(job: StageJob) -> StageJob:
    """The job for the figures of tasks that the job of a pretraining has left: one process on one node."""
    assert isinstance(job.config, PretrainConfig)
    spec, site, target = job.spec, job.cluster, f"{job.spec.target}/{TASKS}"
    folder, name = job_folder(TASKS, target), f"{spec.name}-{TASKS}"
    config = _with_tasks_in(folder, job.config, job.tasks)
    ranks = 1 if site.gpus_per_node else site.tasks_per_node
    spec = dataclasses.replace(
        spec,
        stage=TASKS,
        name=name,
        folder=str(folder),
        target=target,
        logs=str(Path(site.log_root).absolute() / name if site.log_root else folder / LOGS),
        command=("-m", "bertscale", "pretrain", f"{folder}/{CONFIG}", "--tasks-only"),
        nodes=1,
        spares=0,
        tasks_per_node=1,
        cpus_per_task=ranks * site.cpus_per_task,
        gpus_per_node=min(1, site.gpus_per_node),
        start_seconds=0.0,
    )
    return StageJob(spec, site, config, tasks=job.tasks)


def _with_tasks_in(folder: Path, config: PretrainConfig, tasks: Iterable[str]) -> PretrainConfig:
    """The config that reads its tasks from the job folder, where they are frozen."""
    files = [f"{folder}/{TASKS}/{name}.yaml" for name in tasks]
    return config.model_copy(update={"train": config.train.model_copy(update={"tasks": files})})


def _share_of_node(stage: PipelineStage, site: ClusterConfig) -> tuple[int, int, int]:
    """Ranks, cores of each and GPUs on a node: for training all of it or what it asks for, one task for the
    other stages, with a GPU for glue. Raises UserError where a node has fewer ranks."""
    key = "gpus_per_node" if site.gpus_per_node else "tasks_per_node"
    ranks = getattr(site, key)
    if stage.stage in TRAINING:
        wanted = stage.ranks_per_node or ranks
        if wanted > ranks:
            raise UserError(f"ranks_per_node={wanted}, and the cluster file has {key}={ranks}: ask for less")
        return wanted, site.cpus_per_task, wanted if site.gpus_per_node else 0
    if stage.glue and site.gpus_per_node:
        return 1, site.cpus_per_task, 1
    return 1, ranks * site.cpus_per_task, 0


def _program(name: str | None) -> str | None:
    """A path is made absolute; a bare name is found on the node's PATH."""
    return os.path.abspath(name) if name and os.sep in name else name


def _finished(job: StageJob) -> bool:
    """Whether the very same job was done before, of the same input, and what it made is still there."""
    spec, folder = job.spec, Path(job.spec.folder)
    if not is_done(folder, spec.array) or not (Path(spec.target) / RESULTS[spec.stage]).exists():
        return False
    try:
        if job.config is None:
            same = read_spec(folder).command == spec.command
        else:
            same = (folder / CONFIG).read_text(encoding="utf-8") == config_text(job.config)
        done = min(marker.stat().st_mtime for marker in existing_marks(folder))
        return same and all(_changed(name) <= done for name in _inputs(job))
    except (OSError, UserError):
        return False


def _inputs(job: StageJob) -> list[str]:
    config = job.config
    if isinstance(config, PrepConfig):
        return [*config.input, *([config.tokenizer] if config.tokenizer else [])]
    if isinstance(config, PretrainConfig):
        folders = [*(corpus.path for corpus in config.corpora), *config.heldout.values()]
        return [*folders, *([config.init.source] if config.init else [])]
    if isinstance(config, FinetuneConfig):
        data = config.data
        held_out = [path for path in (data.dev, data.test) if path is not None]
        return [config.source, *(file.path for file in data.training_files), *held_out]
    if isinstance(config, GlueConfig):
        return [config.model, config.folder]
    assert job.source is not None
    return [job.source]


def matches(name: str) -> list[Path]:
    """The file or folder `name`, else what it matches as a glob."""
    return [Path(name)] if os.path.exists(name) else sorted(map(Path, glob.glob(name, recursive=True)))


def _changed(name: str) -> float:
    """When the newest file of a file, folder or glob was written, in seconds since 1970; hidden ones, such
    as a run leaves beside its data, do not count."""
    files = [
        file
        for path in matches(name)
        for file in (path.rglob("*") if path.is_dir() else [path])
        if not any(part.startswith(".") for part in file.relative_to(path).parts)
    ]
    return max((file.stat().st_mtime for file in files if file.is_file()), default=0.0)


def unfinished(jobs: list[StageJob]) -> list[StageJob]:
    """The jobs from the first one that is not done; of those before it a line each is printed."""
    while jobs:
        target = jobs[0].spec.target
        same = [job for job in jobs if job.spec.target == target]  # the three of an array stand together
        if not all(map(_finished, same)):
            break
        print(f"{same[0].spec.stage} of {shown(target)} is finished: bertscale status {quoted(target)}")
        jobs = jobs[len(same) :]
    return jobs


def folder_of(record: dict[str, str]) -> Path | None:
    """The job folder of a job by Slurm's record of it; None where bertscale did not submit it."""
    folder = from_record(record).folder
    return folder if folder and (folder / JOB_SPEC).is_file() else None


def quoted(path: str) -> str:
    """Like `shown`, for a shell."""
    return shlex.quote(shown(path))
