"""What the files of a run tell: its job folder, attempts, step, losses and checkpoints; no Slurm needed.

place = find("runs/base")    # or an output folder, a job folder
facts = look(place)
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from bertscale.errors import UserError
from bertscale.run_folder import (
    CANCELLED,
    CHECKPOINTS,
    CONFIG,
    EVENTS,
    HEARTBEAT,
    JOB,
    JOB_SPEC,
    LOCK,
    LOGS,
    METRICS,
    RESULT,
    TABLE,
    checkpoint_step,
    checkpoints,
    done_marks,
    is_job_folder,
    is_number,
    job_folders,
    read_events,
    read_metrics,
    target_of,
)
from launcher.history import Attempt, attempt_folders, changed, read_attempts, slurm_ids
from launcher.job import TRAINING, JobSpec

TAIL_BYTES = 2**18  # of metrics.jsonl: some hundred lines, however long the run
STEADY_SECONDS = 60.0  # a rate over less than this is a guess


def shown(path: str | Path) -> str:
    """A path as a person would type it here."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


@dataclass(frozen=True)
class Place:
    """Where a run is kept: what it makes, and its job folder if it was submitted."""

    run: Path
    job: Path | None

    @property
    def events(self) -> Path:
        return self.job / EVENTS if self.job else self.run / LOGS / EVENTS

    @property
    def shown(self) -> str:
        """The run as a person would type it here."""
        return shown(self.run)


@dataclass
class Facts:
    """All that the files of one run tell; times in seconds since 1970."""

    stage: str
    name: str
    jobs: list[str]  # Slurm ids that it has had, oldest first
    tasks: int  # of an array, 0: no array
    tasks_done: int
    done: bool
    cancelled: bool
    attempts: list[Attempt]
    events: list[dict[str, Any]]
    logs: Path
    step: int | None = None
    steps: int | None = None
    loss: float | None = None
    tokens_per_second: float | None = None
    checkpoint: Path | None = None
    checkpoint_step: int | None = None
    checkpoint_time: float | None = None
    expected_end: float | None = None
    process: int | None = None  # that trains in it on this machine
    following: list[str] = field(default_factory=list)  # job folders of the pipeline after it


# ----------------------------------------------------------------------------------------- finding


def find(name: str) -> Place:
    """The run that a run folder, an output folder or a job folder belongs to. Raises UserError."""
    path = Path(name).absolute()
    for job in (path, *job_folders(path)):
        if is_job_folder(job):
            return place_of(job)
    if (path / METRICS).is_file() or (path / CHECKPOINTS).is_dir() or attempt_folders(path / LOGS):
        return Place(path, None)  # a training has begun in it
    if path.is_dir():
        raise UserError(f"{name} {_other_folder(path)}")
    known = ", ".join(place.shown for place in known_places()[:8])
    raise UserError(
        f"there is no run, output folder or job {name}"
        + (f"; below runs/ are {known}" if known else "; `bertscale status` lists those that it finds")
    )


def _other_folder(path: Path) -> str:
    """What a folder is in which nothing runs, and the command for it."""
    name = shlex.quote(shown(path))
    if (path / "manifest.json").is_file():
        return f"is a data set of `bertscale prep`, which has ended: bertscale inspect {name} shows it"
    if (path / ".prep").is_dir():
        return (
            "is a data set that `bertscale prep` has not finished: the command that began it goes on with it"
        )
    if (path / TABLE).is_file():
        run = path.parent.parent if path.parent.name == CHECKPOINTS else None
        return "is a checkpoint" + (f" of the run {shown(run)}: bertscale status {shown(run)}" if run else "")
    if (path / "glue.json").is_file():
        return f"is a table of `bertscale glue`, which has ended: {name}/glue.md shows it"
    if (path / RESULT).is_file():
        return f"is a task model of `bertscale finetune`, which has ended; its figures: {name}/{RESULT}"
    if (path / "config.json").is_file():
        return "is a model, in which nothing runs: `bertscale convert` and `bertscale finetune` take models"
    return "is no run: no job was submitted for it and it has no logs and no checkpoints"


def place_of(job: Path) -> Place:
    """The run of a job folder."""
    return Place(target_of(job), job)


def known_places() -> list[Place]:
    """The jobs and runs in and one folder below `runs` of the current directory, by name."""
    runs, places = Path("runs").absolute(), []
    for folder in sorted(path for depth in ("*", "*/*") for path in runs.glob(depth) if path.is_dir()):
        if folder.name == JOB:
            continue  # found with its run
        if is_job_folder(folder):
            places.append(place_of(folder))
        elif is_job_folder(folder / JOB):
            places.append(place_of(folder / JOB))
        elif (folder / METRICS).is_file() or (folder / CHECKPOINTS).is_dir():
            places.append(Place(folder, None))
    return places


def read_spec(job: Path) -> JobSpec:
    """J/job.json, also of an older or newer version. Raises UserError when it is missing or damaged."""
    known = {entry.name for entry in dataclasses.fields(JobSpec)}
    try:
        values = json.loads((job / JOB_SPEC).read_text(encoding="utf-8"))
        return JobSpec.from_json(json.dumps({key: values[key] for key in values if key in known}))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{job / JOB_SPEC} cannot be read ({error}); submit the run again") from error


def spec_of(place: Place) -> JobSpec | None:
    """The job's spec; None for a local run and where job.json is missing or damaged."""
    if place.job is not None:
        with contextlib.suppress(UserError):
            return read_spec(place.job)
    return None


def log_folder(place: Place, spec: JobSpec | None) -> Path:
    """Where the batch logs and the attempts lie; beside the job when that folder was moved."""
    if spec and Path(spec.logs).is_dir():
        return Path(spec.logs)
    return (place.job or place.run) / LOGS


# ----------------------------------------------------------------------------------------- looking


def look(place: Place) -> Facts:
    """Reads what the files of `place` tell; damaged or missing ones are passed over."""
    spec = spec_of(place)
    events = read_events(place.events)
    logs = log_folder(place, spec)
    stage = spec.stage if spec else _stage(place)
    tasks = spec.array if spec else 0
    tasks_done = sum(1 for mark in done_marks(tasks) if tasks and place.job and (place.job / mark).is_file())
    facts = Facts(
        stage=stage,
        name=spec.name if spec else place.run.name,
        jobs=slurm_ids(events),
        tasks=tasks,
        tasks_done=tasks_done,
        done=place.job is not None and is_done(place.job, tasks),
        cancelled=bool(place.job and (place.job / CANCELLED).exists()),
        attempts=read_attempts(events, attempt_folders(logs)),
        events=events,
        logs=logs,
        following=list(spec.following) if spec else [],
    )
    if stage in TRAINING:
        _look_at_training(place, facts)
    return facts


def _stage(place: Place) -> str:
    """The stage of a run without job.json, by its config."""
    if place.job is not None and place.job.suffix == ".job":
        return "job"
    return "finetune" if "task" in read_config(place.run) else "pretrain"


def is_done(job: Path, tasks: int) -> bool:
    """Whether the marker of a finished job is there, or those of all `tasks` of an array."""
    return all((job / mark).is_file() for mark in done_marks(tasks))


def _look_at_training(place: Place, facts: Facts) -> None:
    entries: list[dict[str, Any]] = []
    with contextlib.suppress(OSError):
        entries = read_metrics(place.run, TAIL_BYTES)
    trained = [entry for entry in entries if is_number(entry.get("train/loss"))]
    if trained:
        facts.loss = trained[-1]["train/loss"]
        facts.tokens_per_second = trained[-1].get("speed/tokens_per_second")
    tunes = facts.stage == "finetune"
    if tunes:  # its metrics tell the steps of all its runs, some of which may have ended early
        told = [entry["steps"] for entry in entries[-1:] if is_number(entry.get("steps"))]
        facts.steps = int(told[0]) if told else None
    else:
        facts.steps = planned_steps(place)
    folders = checkpoints(place.run)
    saved = [(checkpoint_step(folder) or 0, changed(folder / TABLE)) for folder in folders]
    if saved:
        (facts.checkpoint_step, facts.checkpoint_time), facts.checkpoint = saved[-1], folders[-1]
    attempt = facts.attempts[-1] if facts.attempts else None
    # Not that of the last line, which may be of a task of an earlier checkpoint.
    steps = [entry["step"] for entry in entries]
    reached = [(max(steps), changed(place.run / METRICS))] if steps else []
    reached += saved[-1:]
    if attempt and attempt.folder:
        reached += heartbeat(attempt.folder)
    if attempt and attempt.started:  # what an attempt before it reached past its checkpoint is done again
        reached = [point for point in reached if point[1] >= (attempt.started or 0.0)] or reached
    if reached:
        facts.step = max(reached)[0]
    if place.job is None:
        facts.process = training_process(place.run)
        ended = facts.steps is not None and (facts.checkpoint_step or 0) >= facts.steps
        facts.done = facts.done or ((place.run / RESULT).is_file() if tunes else ended)
    if facts.done and tunes:
        facts.steps = facts.step
    if attempt and attempt.started and not facts.done and (hours := planned_hours(place)):
        facts.expected_end = end_of_hours(hours, attempt.started, facts.checkpoint)
    elif attempt and attempt.started and facts.steps and reached and not facts.done:
        resumed = [
            (event["step"], event["time"])
            for event in facts.events
            if event["event"] == "resumed"
            and event["time"] >= attempt.started
            and is_number(event.get("step"))
        ]
        before = [step for step, when in saved if when <= attempt.started]
        start = resumed[-1] if resumed else (before[-1] if before else 0, attempt.started)
        inside = [(step, when) for step, when in saved if when > attempt.started]
        facts.expected_end = expected_end(start, inside, max(reached), facts.steps)


def expected_end(
    start: tuple[int, float], saved: list[tuple[int, float]], newest: tuple[int, float], steps: int
) -> float | None:
    """When step `steps` will be reached at the present rate; points are (step, seconds since 1970).

    The rate is counted from the attempt's first checkpoint, since its start-up makes no steps; from
    `start` when less than a minute has passed since that one.
    """
    for step, when in [*saved[:1], start]:
        if newest[1] - when >= STEADY_SECONDS and newest[0] > step:
            return newest[1] + (steps - newest[0]) * (newest[1] - when) / (newest[0] - step)
    if newest[0] > start[0] and newest[1] > start[1]:
        return newest[1] + (steps - newest[0]) * (newest[1] - start[1]) / (newest[0] - start[0])
    return None


# ------------------------------------------------------------------------------------- small pieces


def planned_steps(place: Place) -> int | None:
    """train.steps of the job's config, or of the run's; of another budget, the steps of a finished run."""
    for train in _training(place):
        if is_number(train.get("steps")):
            return int(train["steps"])
    with contextlib.suppress(OSError, KeyError, TypeError, ValueError, OverflowError):
        return int(json.loads((place.run / RESULT).read_text(encoding="utf-8"))["steps"])
    return None


def planned_hours(place: Place) -> float | None:
    """train.hours of the job's config, or of the run's; None for a run of another budget, and for a
    fine-tuning of several runs, each of which has so many."""
    for train in _training(place):
        if len(train.get("seeds") or [0]) > 1 or train.get("compare_random"):
            return None
        if "hours" in train:
            return float(train["hours"]) if is_number(train["hours"]) else None
    return None


def _training(place: Place) -> Iterator[dict[str, Any]]:
    """The section `train` of the job's config, then of the run's, of those that can be read."""
    for folder in (place.job, place.run):
        train = read_config(folder).get("train") if folder is not None else None
        if isinstance(train, dict):
            yield train


def read_config(folder: Path) -> dict[str, Any]:
    """The config of a run or job folder; empty where it cannot be read."""
    with contextlib.suppress(OSError, yaml.YAMLError, ValueError):
        config = yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8"))
        if isinstance(config, dict):
            return config
    return {}


def end_of_hours(hours: float, started: float, checkpoint: Path | None) -> float:
    """When a budget of hours will be spent: by the newest checkpoint, which keeps what was spent, or by the
    attempt's start, to which its loading comes."""
    spent = 0.0
    if checkpoint is not None:
        with contextlib.suppress(OSError, KeyError, TypeError, ValueError):
            said = json.loads((checkpoint / TABLE).read_text(encoding="utf-8"))["elapsed_seconds"]
            spent = float(said) if is_number(said) else 0.0
        started = max(started, changed(checkpoint / TABLE))
    return started + hours * 3600 - spent


def heartbeat(attempt: Path) -> list[tuple[int, float]]:
    """Step of an attempt's last heartbeat and its time; nothing before the first."""
    path = attempt / HEARTBEAT
    try:
        step = json.loads(path.read_text(encoding="utf-8"))["step"]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return [(int(step), changed(path))] if is_number(step) else []


def training_process(run: Path) -> int | None:
    """The process of this machine that holds RUN/.lock; taking the lock to look would disturb a start."""
    try:
        inode = (run / LOCK).stat().st_ino
        locks = Path("/proc/locks").read_text(encoding="utf-8")
        said = (run / LOCK).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    lock = re.search(rf"FLOCK\s+ADVISORY\s+WRITE\s+(\d+)\s+\S+:{inode}\s", locks)
    if lock is None:  # on a file system without locks (bertscale.files.alone) the file names the process
        lock = re.match(rf".*\n{re.escape(os.uname().nodename)} (\d+) ", said)
    return int(lock.group(1)) if lock and Path("/proc", lock.group(1)).exists() else None
