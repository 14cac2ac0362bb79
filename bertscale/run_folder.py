"""Defines run folders and job folders: where each file lies, and how its lines are read.

    RUN/                           a pretraining
        config.yaml                the resolved config
        metrics.jsonl              a JSON line for each log point
        fills.jsonl                a JSON line for each evaluation, with train.fills
        tasks/step-0000100/NAME/   the fine-tuning of that checkpoint for a task, with train.tasks
        tensorboard/               the same figures
        checkpoints/step-0000100/  complete when it has this name; its table is bertscale.json
        logs/                      events.jsonl and the attempts of a run that was started by hand
        result.json                written last
        .lock                      held while the run trains
        job/                       its job folder, if it was submitted

    OUTPUT/                        a fine-tuning: the same, and what bertscale/finetune/output.py says

    JOB/                           RUN/job, or OUTPUT.job beside the output of another stage
        job.json  config.yaml  script.sh  environment.json  code/
        events.jsonl               what happened, a JSON line each
        cancelled  done.json       marks; done-3.json is that of task 3 of an array
        logs/                      slurm-17.out and the attempts

    attempt-002-17/                in logs/: one start of all ranks, here by job 17
        rank-0003.log              stdout and stderr of a rank (rank-3.log where no Slurm is)
        rank-0003.json             how a rank under srun ended
        heartbeat  failed  srun.log  check/

    newest_step(Path("runs/base"))
    read_metrics(Path("runs/base"))[-1]["train/loss"]

Standard library only: a batch host may have nothing else.
"""

from __future__ import annotations

import json
import os
import re
import time
from pathlib import Path
from typing import Any

from bertscale.errors import UserError

# ------------------------------------------------------------------------------------------- the names

CONFIG = "config.yaml"
RESULT = "result.json"
METRICS = "metrics.jsonl"
FILLS = "fills.jsonl"
TASKS = "tasks"
TENSORBOARD = "tensorboard"
CHECKPOINTS = "checkpoints"
BEST = "best"  # of a fine-tuning: the weights that dev chose, of each of its runs
TABLE = "bertscale.json"  # of a checkpoint, written last
LOGS = "logs"
EVENTS = "events.jsonl"
LOCK = ".lock"

PREP_WORK = ".prep"  # in the output of a prep: what one that is stopped resumes from

JOB = "job"  # of a run folder
JOB_SPEC = "job.json"
SCRIPT = "script.sh"
ENVIRONMENT = "environment.json"
CODE = "code"
CANCELLED = "cancelled"

LARGEST = 2**53  # number in a line of JSON; not NaN, not infinite

ATTEMPT_VARIABLE = "BERTSCALE_ATTEMPT"  # tells a rank the folder of its attempt
HEARTBEAT = "heartbeat"
FAILED = "failed"  # a rank has failed: a signal that srun now sends to the others is no request to save
SRUN_LOG = "srun.log"
GUARD_LOG = "guard.log"  # in logs/: of the process that misses the supervisor
SLURM_DIGITS = 4  # of a rank's number, under Slurm


def job_folder(stage: str, target: str | Path) -> Path:
    """Returns the folder for the job of `stage` that makes `target`: in a run folder, beside other output."""
    inside, beside = job_folders(Path(target).absolute())
    return inside if stage == "pretrain" else beside


def job_folders(target: Path) -> list[Path]:
    """Lists the folders that the job of any stage that makes `target` may have."""
    return [target / JOB, target.with_name(f"{target.name}.job")]


def is_job_folder(path: Path) -> bool:
    """Tells whether `path` has the name of a job folder, and in it what was submitted."""
    has_name = path.name == JOB or path.suffix == ".job"
    return has_name and ((path / JOB_SPEC).is_file() or (path / SCRIPT).is_file())


def target_of(job: Path) -> Path:
    """Returns what the job of a job folder makes: RUN/job makes RUN, OUTPUT.job makes OUTPUT."""
    return job.parent if job.name == JOB else job.with_suffix("")


def done_marks(array: int) -> list[str]:
    """Names the files that mark a job as finished: one, or one for each of the `array` tasks."""
    return [f"done-{index}.json" for index in range(array)] or ["done.json"]


def existing_marks(job: Path) -> list[Path]:
    """Lists the marks of `done_marks` that a job folder has, of any job that used it."""
    return list(job.glob("done*.json"))


def batch_log_name(number: str) -> str:
    """Names a batch log in logs/; `number` is a job id, a pattern of sbatch (`%j`) or a glob."""
    return f"slurm-{number}.out"


def attempt_name(number: int, job: str = "") -> str:
    """Names an attempt: `attempt-002-17` is the second start of all ranks, by job 17."""
    return f"attempt-{number:03d}" + (f"-{job}" if job else "")


def attempt_number(name: object) -> int:
    """Reads the number: `attempt-002-17`, a path to it, `2` -> 2; 0 where there is none."""
    digits = re.search(r"attempt-([0-9]+)", str(name)) or re.search(r"([0-9]+)", str(name))
    return int(digits.group(1)) if digits else 0


def attempt_job(name: str) -> str:
    """Reads the job id: `attempt-002-17` -> `17`; empty for an attempt without Slurm."""
    return name.partition("-")[2].partition("-")[2]


def attempts_in(logs: Path, task: str = "") -> list[Path]:
    """Lists the folders of attempts in `logs`, or those of one task of an array; in no order."""
    return list(logs.glob(f"attempt-[0-9]*_{task}" if task else "attempt-[0-9]*"))


def rank_log(attempt: Path, rank: int, digits: int = 1) -> Path:
    """Returns the file for a rank's output."""
    return attempt / f"rank-{rank:0{digits}d}.log"


def rank_logs(attempt: Path) -> dict[int, Path]:
    """Lists the logs of an attempt by rank; rank-3.log and rank-0003.log are both rank 3's."""
    matches = ((re.fullmatch(r"rank-([0-9]+)\.log", path.name), path) for path in attempt.iterdir())
    return {int(match.group(1)): path for match, path in matches if match}


def rank_report(attempt: Path, rank: int) -> Path:
    """Returns the file that tells how a rank under srun ended."""
    return attempt / f"rank-{rank:0{SLURM_DIGITS}d}.json"


def rank_reports(attempt: Path) -> list[Path]:
    """Lists the files of `rank_report` that exist."""
    return list(attempt.glob("rank-*.json"))


# ------------------------------------------------------------------------------------- the checkpoints


def checkpoint_folder(run: Path, step: int) -> Path:
    """Returns the folder of the checkpoint of `step`."""
    return run / CHECKPOINTS / f"step-{step:07d}"


def checkpoint_step(folder: Path) -> int | None:
    """Reads the step from a checkpoint folder's name; None for another name, such as `step-best`."""
    digits = re.fullmatch(r"step-([0-9]+)", folder.name)
    return int(digits.group(1)) if digits else None


def checkpoints(run: Path) -> list[Path]:
    """Lists the committed checkpoints of a run, oldest first; leaves out what a user has put beside them."""
    by_step = []
    for folder in (run / CHECKPOINTS).glob("step-*"):
        step = checkpoint_step(folder)
        if step is not None and not folder.is_symlink() and (folder / TABLE).is_file():
            by_step.append((step, folder))
    # By number: as text, step-10000000 would come before step-9999999.
    return [folder for _, folder in sorted(by_step)]


def check_run_folder(run: Path) -> None:
    """Raises UserError where `run` is a checkpoint or a model: a run in it would not train those weights."""
    if (run / TABLE).is_file() or (run / "config.json").is_file():
        raise UserError(
            f"run={run} is a checkpoint or a model: to start from its weights, give init.from={run} and "
            f"another run folder; to fine-tune it, encoder={run}"
        )


def newest_step(run: Path | None) -> int:
    """Returns the step of the newest committed checkpoint, 0 without any."""
    return max((checkpoint_step(folder) or 0 for folder in checkpoints(run)), default=0) if run else 0


# ----------------------------------------------------------------------------------- the lines of JSON


def read_lines(path: Path, last_bytes: int | None = None) -> list[dict[str, Any]]:
    """Reads the JSON objects of a file, one a line, oldest first; only from its `last_bytes` if given.

    A line that a crash has cut short, or that is something else, is skipped; those after it are not.
    Empty where there is no such file, or a folder in its place.
    """
    try:
        with open(path, "rb") as file:
            if last_bytes is not None:
                file.seek(max(0, file.seek(0, os.SEEK_END) - last_bytes))
            lines = file.read().split(b"\n")  # not splitlines: a text may hold other line separators
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        return []
    entries = []
    for line in lines:
        try:
            entry = json.loads(line.decode(errors="replace"))
        except (ValueError, RecursionError):
            continue
        if isinstance(entry, dict):
            entries.append(entry)
    return entries


def append_line(path: Path, entry: dict[str, Any]) -> None:
    """Appends a line of JSON; any number of processes may do so at the same time. Raises OSError."""
    line = json.dumps(entry, ensure_ascii=False) + "\n"
    with open(path, "a+b", buffering=0) as file:
        # A line that was cut short gets its line break first, so that it damages no other.
        cut = file.seek(0, os.SEEK_END) > 0 and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n"
        file.write(b"\n" * cut + line.encode(errors="replace"))  # one write: lines of two never mix


def read_metrics(run: Path, last_bytes: int | None = None) -> list[dict[str, Any]]:
    """Reads the entries of RUN/metrics.jsonl, each with its "step"."""
    return read_steps(run / METRICS, last_bytes)


def metrics_until(checkpoint: Path, step: int) -> list[dict[str, Any]]:
    """Reads the entries until `step` of the run that the folder of a checkpoint lies in; none where it lies
    elsewhere."""
    if checkpoint.parent.name != CHECKPOINTS:
        return []
    return [entry for entry in read_metrics(checkpoint.parent.parent) if entry["step"] <= step]


def read_steps(path: Path, last_bytes: int | None = None) -> list[dict[str, Any]]:
    """Reads the entries of a file that have a "step"."""
    return [entry for entry in read_lines(path, last_bytes) if is_number(entry.get("step"))]


def read_events(path: Path) -> list[dict[str, Any]]:
    """Reads the events in `path`, each with its "event" and its "time" in seconds since 1970."""
    return [
        entry
        for entry in read_lines(path)
        if isinstance(entry.get("event"), str) and is_number(entry.get("time"))
    ]


class Events:
    """Writes to one events.jsonl; `facts`, such as the job's id, are in every line.

    The events: queued, started, checkpoint, signal, failed, hang, relaunched, requeued, resumed,
    node_left_out, done, stopped, gave_up, cancelled.
    """

    def __init__(self, path: Path, **facts: Any) -> None:
        self.path, self.facts = path, facts

    def write(self, event: str, **facts: Any) -> None:
        """Appends {"time": seconds since 1970, "event": ..., facts}."""
        append_line(self.path, {"time": time.time(), "event": event, **self.facts, **facts})


def is_number(value: object) -> bool:
    """Tells whether a value of JSON is a number, not too large to count or to be a time."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < LARGEST
