"""Ends a submitted run, or queues it again.

bertscale cancel RUN [--now]
bertscale resume RUN [--only]
"""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from bertscale.errors import UserError
from bertscale.run_folder import CANCELLED, CONFIG, EVENTS, Events, read_events
from launcher import history, queue_jobs, runs, slurm
from launcher.enqueue import queue
from launcher.job import TRAINING
from launcher.queue_jobs import QueueJob
from launcher.runs import Place, place_of, read_spec
from launcher.submit.command import left_out, making


def cancel(place: Place, *, now: bool) -> int:
    """Ends the run's job and the jobs after it, each after it has saved unless `now`; returns 0.

    Raises UserError for a local run and when Slurm does not answer.
    """
    if place.job is None:
        raise UserError(how_to_stop(place))
    jobs = queue_jobs.own_jobs()
    # The last job first: none of them may begin because the one before it has ended.
    following = [Path(folder) for folder in runs.look(place).following]
    others = [folder for folder in reversed(following) if _cancel_one(folder, jobs, now, because=place.shown)]
    stopped = _cancel_one(place.job, jobs, now)
    if stopped or others:
        print(f"to resume later: bertscale resume {shlex.quote(place.shown)}")
    else:
        print(f"{place.shown} is not queued or running: nothing to cancel")
    return 0


def _cancel_one(job: Path, jobs: list[QueueJob], now: bool, because: str = "") -> bool:
    """Ends what is queued or running of one job folder; whether there was anything."""
    active = _active(job, jobs)
    if not active:
        return False
    marker = job / CANCELLED
    asked_before = marker.exists()
    # Before Slurm ends anything: a supervisor that sees the marker does not requeue its job.
    marker.touch()
    reason = {"reason": f"it follows {because}"} if because else {}
    Events(job / EVENTS).write("cancelled", job=active[0].number, **reason)
    running = [entry for entry in active if not entry.waits]
    saves = _stage(job) in TRAINING and not now
    for number in dict.fromkeys(entry.number for entry in active):
        of_job = [entry for entry in running if entry.number == number]
        if of_job and saves and not queue_jobs.lost_host(of_job[0]):  # with that node its supervisor is gone
            # Not a plain scancel: it kills the ranks 30 s after SIGTERM, and a large save takes longer.
            done = slurm.ask("scancel", "--batch", "--signal=USR1", number, check=False)
            before = "again " if asked_before else ""
            nodes = queue_jobs.show_nodes(of_job[0])
            said = f"on {nodes} was {before}told to save and end; --now ends it at once"
        else:
            done = slurm.ask("scancel", number, check=False)
            said = "was ended" if of_job else "was taken out of the queue"
        if done.stderr.strip():  # such as: it has just ended
            said += f" ({slurm.complaint(done)})"
        print(f"job {number}, {_stage(job)} of {_shown(job)}, {said}")
    return True


def resume(place: Place, *, only: bool) -> int:
    """Queues the run's script again, and unless `only` the jobs after it; returns 0.

    Raises UserError while it is queued or running, when a job before it is not done, when Slurm
    refuses, and for a local run, with the command that resumes it.
    """
    if place.job is None:
        print(f"{place.shown} was started by hand; to resume: {local_command(place)}")
        return 0
    with making(place.job):
        return _resume(place, place.job, only)


def _resume(place: Place, job: Path, only: bool) -> int:
    jobs = queue_jobs.own_jobs()
    if active := _active(job, jobs):
        ending = (job / CANCELLED).exists() and not active[0].waits
        advice = "it was cancelled and is about to end: wait for it" if ending else "it needs no resume"
        state = "waits in the queue" if active[0].waits else "is running"
        raise UserError(f"job {active[0].id} of {place.shown} {state}: {advice}")
    folders = [job, *([] if only else map(Path, read_spec(job).following))]
    numbers: dict[Path, str] = {}
    for folder in folders:
        if _is_done(folder):
            print(f"{_shown(folder)} is done already")
        elif folder == job or not _active(folder, jobs):
            numbers[folder] = _queue_again(folder, jobs, numbers)
    return 0


def _queue_again(job: Path, jobs: list[QueueJob], queued: dict[Path, str]) -> str:
    """Submits J/script.sh once more, behind those of `previous` that are still to end; its job id."""
    spec = read_spec(job)
    after = []
    for previous in map(Path, spec.previous):
        active = _active(previous, jobs)
        if previous in queued or active:
            after.append(queued.get(previous) or active[0].number)
        elif not _is_done(previous):
            raise UserError(
                f"{_shown(previous)}, which {_shown(job)} builds on, is not done: "
                f"bertscale resume {shlex.quote(_shown(previous))}"
            )
    marker = job / CANCELLED
    was_cancelled = marker.exists()
    marker.unlink(missing_ok=True)  # before the job can begin and see it
    try:
        number = queue(spec, after, left_out(spec))  # finished tasks of an array end as soon as they begin
    except UserError:
        if was_cancelled:
            marker.touch()
        raise
    behind = f" after job {', '.join(after)}" if after else ""
    print(f"{spec.stage} of {_shown(job)} is queued as job {number}{behind}")
    return number


def _active(job: Path, jobs: list[QueueJob]) -> list[QueueJob]:
    return queue_jobs.jobs_of(job, history.slurm_ids(read_events(job / EVENTS)), jobs)


def _is_done(job: Path) -> bool:
    return runs.is_done(job, read_spec(job).array)


def _shown(job: Path) -> str:
    return place_of(job).shown


def _stage(job: Path) -> str:
    try:
        return read_spec(job).stage
    except UserError:
        return "pretrain"  # the careful way to end it


# -------------------------------------------------------------------------------------- local runs


def how_to_stop(place: Place) -> str:
    """How to end a run that no Slurm knows of."""
    process = runs.training_process(place.run)
    if process is None:
        return f"{place.shown} was started by hand and does not train on this machine: nothing to cancel"
    parent = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1]
    return (
        f"{place.shown} was started by hand: press Ctrl-C where it runs, or `kill -INT {parent}`; it saves "
        "and ends"
    )


def local_command(place: Place) -> str:
    """The command that resumes a training that was started by hand."""
    config = runs.read_config(place.run)
    stage, key = ("finetune", "output") if "task" in config else ("pretrain", "run")
    if not isinstance(config.get(key), str):
        return f"bertscale {stage} CONFIG, as it was started"
    shown = shlex.quote(os.path.join(place.shown, CONFIG))
    here = Path(config[key]).absolute() == place.run
    elsewhere = "" if here else f" {key}={shlex.quote(place.shown)}"
    return f"bertscale {stage} {shown}{elsewhere}"
