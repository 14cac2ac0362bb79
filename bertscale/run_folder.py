"""THE contract of a run folder and of a job folder: what lies where, and how the lines in it are read.

    RUN/                           a pretraining
        config.yaml                the resolved config
        metrics.jsonl              a JSON line for each log point
        tensorboard/               the same figures
        checkpoints/step-0000100/  whole when it has this name; its table is bertscale.json
        logs/                      events.jsonl and the attempts of a run that was started by hand
        result.json                written last
        .lock                      held while the run trains
        job/                       its job folder, where it was submitted

    JOB/                           RUN/job, or OUTPUT.job beside the output of another stage
        job.json  config.yaml  script.sh  environment.json  code/
        events.jsonl               what happened, a JSON line each
        cancelled  done.json       marks; done-3.json is that of task 3 of an array
        logs/                      slurm-17.out and the attempts

    attempt-002-17/                in logs/: one start of all ranks, here by job 17
        rank-0003.log              stdout and stderr of a rank (rank-3.log where no Slurm is)
        rank-0003.json             how a rank of a Slurm step ended
        heartbeat  failed  srun.log  check/

    newest_step(Path("runs/base"))
    read_metrics(Path("runs/base"))[-1]["train/loss"]

Only the standard library: a batch host may have nothing else.
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
TENSORBOARD = "tensorboard"
CHECKPOINTS = "checkpoints"
TABLE = "bertscale.json"  # of a checkpoint, written last
LOGS = "logs"
EVENTS = "events.jsonl"
LOCK = ".lock"

JOB = "job"  # of a run folder
JOB_SPEC = "job.json"
SCRIPT = "script.sh"
ENVIRONMENT = "environment.json"
CODE = "code"
CANCELLED = "cancelled"

ATTEMPT_VARIABLE = "BERTSCALE_ATTEMPT"  # tells a rank the folder of its attempt
HEARTBEAT = "heartbeat"
FAILED = "failed"  # a rank has failed: what srun sends the others now is no friendly request
SRUN_LOG = "srun.log"
SLURM_DIGITS = 4  # of a rank's number, under Slurm


def job_folder(stage: str, target: str | Path) -> Path:
    """Where the job of `stage` that makes `target` is kept: inside a run folder, beside any other output."""
    inside, beside = job_folders(Path(target).absolute())
    return inside if stage == "pretrain" else beside


def job_folders(target: Path) -> list[Path]:
    """Where the job that makes `target` may be, whatever its stage."""
    return [target / JOB, target.with_name(f"{target.name}.job")]


def is_job_folder(path: Path) -> bool:
    """Whether `path` has the name of a job folder and what was submitted."""
    named_so = path.name == JOB or path.suffix == ".job"
    return named_so and ((path / JOB_SPEC).is_file() or (path / SCRIPT).is_file())


def target_of(job: Path) -> Path:
    """What a job folder's job makes: RUN/job makes RUN, OUTPUT.job makes OUTPUT."""
    return job.parent if job.name == JOB else job.with_suffix("")


def done_marks(array: int) -> list[str]:
    """Files that a finished job has in its folder: one, or one for each of the `array` tasks."""
    return [f"done-{index}.json" for index in range(array)] or ["done.json"]


def found_marks(job: Path) -> list[Path]:
    """The marks of `done_marks` that a job folder has, of whatever job of it."""
    return list(job.glob("done*.json"))


def batch_log_name(number: str) -> str:
    """Of a batch log in logs/; `number` is a job's, a pattern of sbatch (`%j`) or a glob."""
    return f"slurm-{number}.out"


def attempt_name(number: int, job: str = "") -> str:
    """`attempt-002-17`: the second start of all ranks, by job 17."""
    return f"attempt-{number:03d}" + (f"-{job}" if job else "")


def attempt_number(name: object) -> int:
    """`attempt-002-17`, a path to it, `2` -> 2; 0 of what has no number."""
    found = re.search(r"attempt-([0-9]+)", str(name)) or re.search(r"([0-9]+)", str(name))
    return int(found.group(1)) if found else 0


def attempt_job(name: str) -> str:
    """`attempt-002-17` -> `17`; empty for an attempt without Slurm."""
    return name.partition("-")[2].partition("-")[2]


def attempts_in(logs: Path, task: str = "") -> list[Path]:
    """The folders of attempts in `logs`, of one task of an array where it is given; in no order."""
    return list(logs.glob(f"attempt-[0-9]*_{task}" if task else "attempt-[0-9]*"))


def rank_log(attempt: Path, rank: int, digits: int = 1) -> Path:
    """The file that takes a rank's stderr."""
    return attempt / f"rank-{rank:0{digits}d}.log"


def rank_logs(attempt: Path) -> dict[int, Path]:
    """The logs of an attempt by rank; rank-3.log and rank-0003.log are both rank 3's."""
    named = ((re.fullmatch(r"rank-([0-9]+)\.log", path.name), path) for path in attempt.iterdir())
    return {int(match.group(1)): path for match, path in named if match}


def rank_report(attempt: Path, rank: int) -> Path:
    """The file that tells how a rank of a Slurm step ended."""
    return attempt / f"rank-{rank:0{SLURM_DIGITS}d}.json"


def rank_reports(attempt: Path) -> list[Path]:
    """All files of `rank_report` that are there."""
    return list(attempt.glob("rank-*.json"))


# ------------------------------------------------------------------------------------- the checkpoints


def checkpoint_folder(run: Path, step: int) -> Path:
    """Where the checkpoint of `step` lies."""
    return run / CHECKPOINTS / f"step-{step:07d}"


def checkpoint_step(folder: Path) -> int | None:
    """The step that a checkpoint folder's name tells; None of another name, such as `step-best`."""
    digits = re.fullmatch(r"step-([0-9]+)", folder.name)
    return int(digits.group(1)) if digits else None


def checkpoints(run: Path) -> list[Path]:
    """The committed checkpoints of a run, oldest first; what a person has put beside them does not count."""
    found = []
    for folder in (run / CHECKPOINTS).glob("step-*"):
        step = checkpoint_step(folder)
        if step is not None and not folder.is_symlink() and (folder / TABLE).is_file():
            found.append((step, folder))
    # By number: as text, step-10000000 would come before step-9999999.
    return [folder for _, folder in sorted(found)]


def check_run_folder(run: Path) -> None:
    """Raises UserError where `run` is a checkpoint or a model: a run in it would not train those weights."""
    if (run / TABLE).is_file() or (run / "config.json").is_file():
        raise UserError(
            f"run={run} is a checkpoint or a model, and no run starts from one in this version: it would "
            f"begin with random weights; choose another run folder, or fine-tune it with encoder={run}"
        )


def newest_step(run: Path | None) -> int:
    """Step of the newest committed checkpoint, 0 without any."""
    return max((checkpoint_step(folder) or 0 for folder in checkpoints(run)), default=0) if run else 0


# ----------------------------------------------------------------------------------- the lines of JSON


def read_lines(path: Path, last_bytes: int | None = None) -> list[dict[str, Any]]:
    """The JSON objects of a file, one a line, oldest first, of its last bytes where only those are wanted.

    A line that a crash has cut short, or that is something else, is passed over; those after it are not.
    Empty where there is no such file.
    """
    try:
        with open(path, "rb") as file:
            if last_bytes is not None:
                file.seek(max(0, file.seek(0, os.SEEK_END) - last_bytes))
            lines = file.read().split(b"\n")  # not splitlines: a text may hold other ends of a line
    except FileNotFoundError:
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
    """Appends a line of JSON; any number of processes may at the same time. Raises OSError."""
    line = json.dumps(entry, ensure_ascii=False) + "\n"
    with open(path, "a+b", buffering=0) as file:
        # After a line that was cut short a new one begins, so that it takes no other with it.
        cut = file.seek(0, os.SEEK_END) > 0 and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n"
        file.write(b"\n" * cut + line.encode(errors="replace"))  # one write: lines of two never mix


def read_metrics(run: Path, last_bytes: int | None = None) -> list[dict[str, Any]]:
    """The entries of RUN/metrics.jsonl, each with its "step"."""
    return [entry for entry in read_lines(run / METRICS, last_bytes) if is_number(entry.get("step"))]


def read_events(path: Path) -> list[dict[str, Any]]:
    """The events in `path`, each with its "event" and its "time" in seconds since 1970."""
    return [
        entry
        for entry in read_lines(path)
        if isinstance(entry.get("event"), str) and is_number(entry.get("time"))
    ]


class Events:
    """Writes to one events.jsonl; `facts` belong to every line, such as the job's id.

    queued, started, checkpoint, signal, failed, hang, relaunched, requeued, resumed, node_left_out, done,
    gave_up, cancelled
    """

    def __init__(self, path: Path, **facts: Any) -> None:
        self.path, self.facts = path, facts

    def write(self, event: str, **facts: Any) -> None:
        """Appends {"time": seconds since 1970, "event": ..., facts}."""
        append_line(self.path, {"time": time.time(), "event": event, **self.facts, **facts})


def is_number(value: object) -> bool:
    """Whether a value of JSON is a number."""
    return isinstance(value, int | float) and not isinstance(value, bool)
