"""Watches and steers what `bertscale submit` has queued: status, logs, cancel, resume.

bertscale status [RUN ...] [--json]
bertscale logs RUN [-f] [--rank N] [--attempt N] [-n LINES]
bertscale cancel RUN [--now]
bertscale resume RUN [--only]

RUN is a run folder, an output folder, a job folder or a Slurm job id. `status` asks squeue, else sacct,
else scontrol, else the run's own events, so it answers without Slurm too.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

from bertscale.errors import UserError
from launcher import queue_jobs, runs, slurm
from launcher.queue_jobs import QueueJob
from launcher.runs import Place
from launcher.status import control, logs, show, state

RUN_HELP = "A run folder, an output folder, a job folder or a Slurm job id."


def main(command: str, arguments: list[str]) -> int:
    """Runs one of the four commands and returns its exit code. Raises UserError."""
    options = _parser(command).parse_args(arguments)
    if command == "status":
        return status(options.runs, as_json=options.json)
    place = locate(options.run)
    if command == "logs":
        return logs.logs(place, task_of(options.run), options)
    if command == "cancel":
        return control.cancel(place, now=options.now)
    return control.resume(place, only=options.only)


# ----------------------------------------------------------------------------------------- status


def status(names: Sequence[str], *, as_json: bool) -> int:
    """Prints one line for each run that is found, or all about those that are named."""
    now = time.time()
    queue, silence = listen()
    places = [locate(name, queue) for name in names] or every_place(queue)
    found = [(place, runs.look(place)) for place in places]
    ended = state.ended_jobs(found, queue, silence)
    reports = [
        (place, facts, state.judge(place, facts, queue, silence, now, ended)) for place, facts in found
    ]
    if as_json:
        print(json.dumps([show.as_values(*report) for report in reports], indent=2))
    elif names:
        print("\n\n".join("\n".join(show.describe(*report, silence, now)) for report in reports))
    elif reports:
        reports.sort(key=lambda report: (report[2].job is None, report[2].word == "waiting"))
        show.show_table([show.row(*report, now) for report in reports])
        if silence:
            print(f"\nthe table is from the files of the runs: {silence}")
    else:
        why = f" ({silence})" if silence else ""
        print(f"no jobs in the queue{why}, and no runs below {Path('runs').absolute()}")
    return 0


def listen() -> tuple[list[QueueJob], str | None]:
    """This person's jobs in the queue, and why Slurm does not answer if so."""
    try:
        return queue_jobs.own_jobs(), None
    except UserError as error:
        return [], str(error)


def locate(name: str, queue: list[QueueJob] | None = None) -> Place:
    """The run that a path or a Slurm job id names. Raises UserError."""
    number = name.partition("_")[0]
    if not number.isdigit() or Path(name).exists():
        return runs.find(name)
    for job in listen()[0] if queue is None else queue:
        if job.number == number and job.folder:
            return runs.place_of(job.folder)
    for place in runs.known_places():
        if number in runs.look(place).jobs:
            return place
    record = slurm.show_job(number)
    if record is None:
        raise UserError(f"Slurm knows of no job {number}, and no run below runs/ had it")
    folder = queue_jobs.from_record(record).folder
    if folder is None:
        raise UserError(f"job {number} was not submitted by bertscale")
    return runs.place_of(folder)


def task_of(name: str) -> str | None:
    """Returns `17_2` where one task of an array is named, else None."""
    return name if name.replace("_", "", 1).isdigit() and "_" in name and not Path(name).exists() else None


def every_place(queue: list[QueueJob]) -> list[Place]:
    """The runs of the queue, then those below runs/, each once."""
    places = [runs.place_of(job.folder) for job in queue if job.folder] + runs.known_places()
    return list({place.run.resolve(): place for place in places}.values())


DESCRIPTIONS = {
    "status": "Shows what each run does: queue state and why it waits, attempts, step, loss, speed, last "
    "checkpoint, expected end. Without RUN, one line for each job of yours and each run below runs/.",
    "logs": "Shows the newest log: of the rank that failed first if the newest attempt failed, else of the "
    "batch script, which holds the first rank's output too.",
    "cancel": "Ends a job, and the jobs of a pipeline that follow it. A training that runs saves first; "
    "`bertscale resume` resumes it.",
    "resume": "Queues a job again that was cancelled or gave up, with the code and config that it was "
    "submitted with, and the jobs of a pipeline after it. It resumes from its last checkpoint.",
}


def _parser(command: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"bertscale {command}", description=DESCRIPTIONS[command], allow_abbrev=False
    )
    add = parser.add_argument
    if command == "status":
        add("runs", metavar="RUN", nargs="*", help=RUN_HELP)
        add("--json", action="store_true", help="Print a JSON list, times in seconds since 1970.")
        return parser
    also = " 17_2 is one task of an array." if command == "logs" else ""
    add("run", metavar="RUN", help=RUN_HELP + also)
    if command == "logs":
        text = "Continue with what is written, also by later attempts."
        add("-f", "--follow", action="store_true", help=text)
        add("--rank", type=int, metavar="N", help="The log of this rank.")
        add("--attempt", type=int, metavar="N", help="Of this attempt instead of the newest.")
        text = "So many of its last lines (%(default)s)."
        add("-n", "--lines", type=int, default=50, metavar="LINES", help=text)
    elif command == "cancel":
        text = "End it at once; what came after the last checkpoint is lost."
        add("--now", action="store_true", help=text)
    else:
        add("--only", action="store_true", help="Leave the jobs after it alone.")
    return parser
