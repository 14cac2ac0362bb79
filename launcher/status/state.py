"""What a run does at present, and the command to try next: by Slurm if it answers, else by the run's files.

state = judge(place, facts, queue, silence, now)
"""

from __future__ import annotations

import contextlib
import shlex
from dataclasses import dataclass

from bertscale.errors import UserError
from bertscale.progress import show_duration
from bertscale.run_folder import METRICS, RESULT
from launcher import history, queue_jobs
from launcher.queue_jobs import QueueJob, show_time
from launcher.runs import Facts, Place, spec_of
from launcher.status import control

FRESH_SECONDS = 120.0  # a run whose figures changed within this is still at work
LAST_WRITES_SECONDS = 5.0  # what is written this long after an attempt's end is not of another one


Ended = dict[str, QueueJob] | str  # jobs that are not in the queue by number, or why Slurm does not answer


@dataclass(frozen=True)
class State:
    """What a run does at present: a word to sort and colour by, a sentence, and who said so."""

    word: str  # waiting, running, ending, done, cancelled, gave up, failed, stopped, lost, not queued
    sentence: str
    source: str
    job: QueueJob | None = None
    next: str | None = None  # the command to try


def ended_jobs(found: list[tuple[Place, Facts]], queue: list[QueueJob], silence: str | None) -> Ended:
    """What sacct or scontrol says of the runs that are neither in the queue nor done, by their newest jobs;
    or why they do not answer. Each is asked once for all runs."""
    numbers = [
        facts.jobs[-1]
        for place, facts in found
        if place.job is not None
        and facts.jobs
        and not facts.done
        and not queue_jobs.jobs_of(place.job, facts.jobs, queue)
    ]
    try:
        return queue_jobs.other_jobs(list(dict.fromkeys(numbers)), controller=silence is None)
    except UserError as error:
        return str(error)


def judge(
    place: Place,
    facts: Facts,
    queue: list[QueueJob],
    silence: str | None,
    now: float,
    ended_ones: Ended | None = None,
) -> State:
    """What the run does: by the queue, else sacct or scontrol, else its own files.

    `ended_ones` are `ended_jobs` of several runs; else Slurm is asked about this one.
    """
    if place.job is None:
        return judge_local(place, facts, now)
    run = shlex.quote(place.shown)
    logs, resume = f"bertscale logs {run}", f"bertscale resume {run}"
    jobs = queue_jobs.jobs_of(place.job, facts.jobs, queue)
    if not jobs and facts.done:
        following = f"bertscale convert {run} OUTPUT" if facts.stage == "pretrain" else None
        return State("done", "done", "its own files", next=following)
    ended: QueueJob | None = None
    if not jobs and facts.jobs:
        if ended_ones is None:
            ended_ones = ended_jobs([(place, facts)], queue, silence)
        if isinstance(ended_ones, str):
            silence = silence or ended_ones
        else:
            ended = ended_ones.get(facts.jobs[-1])
        jobs = [ended] if ended and ended.active else []
    if jobs and (host := _lost_host(place, jobs[0])):
        sentence = f"job {jobs[0].id} runs on without its first node, {host}, and so without its supervisor"
        return State("lost", sentence, jobs[0].source, jobs[0], f"scontrol requeue {jobs[0].id}")
    if jobs:
        return judge_queued(run, facts, jobs, now)
    last = next((event for event in reversed(facts.events) if event["event"] in MILESTONES), None)
    if last and last["event"] == "gave_up":
        return State("gave up", history.tell(last), "its own events", next=logs)
    if facts.cancelled or (last and last["event"] == "cancelled"):
        return State("cancelled", "cancelled", "its own events", next=resume)
    if ended:
        if ended.state == "CANCELLED":  # by scancel, of the person or an admin
            return State("cancelled", queue_jobs.in_words(ended, now), ended.source, next=resume)
        return State("failed", queue_jobs.in_words(ended, now), ended.source, next=logs)
    if last is None:
        return State("not queued", "it was never queued", "its own events", next=resume)
    when = show_time(last["time"], now)
    if silence is None:  # Slurm answers, and knows nothing of it
        sentence = f"job {facts.jobs[-1]} is gone; its last report, {when}: {history.tell(last)}"
        return State("lost", sentence, "its own events", next=logs)
    word = "waiting" if last["event"] in ("queued", "requeued") else "running"
    return State(word, f"by its last report, {when}: {history.tell(last)}", "its own events")


MILESTONES = (
    "queued",
    "started",
    "relaunched",
    "requeued",
    "resumed",
    "failed",
    "hang",
    "gave_up",
    "cancelled",
)


def _lost_host(place: Place, job: QueueJob) -> str:
    spec = spec_of(place)
    with contextlib.suppress(UserError):
        return queue_jobs.lost_host(job) if spec is not None and spec.spares else ""
    return ""


def judge_queued(run: str, facts: Facts, jobs: list[QueueJob], now: float) -> State:
    """A run with jobs in the queue."""
    first = jobs[0]
    sentence = queue_jobs.in_words(first, now)
    if facts.tasks:
        at_work = sum(not job.waits for job in jobs)
        sentence = f"{facts.tasks_done} of {facts.tasks} tasks are done, {at_work} run; {sentence}"
    if first.waits:
        remedy = queue_jobs.why(first)[1]
        advice = {
            "shorter": f"bertscale cancel {run}, then submit it again with a shorter --time",
            "fewer": f"bertscale cancel {run}, then submit it again with fewer --nodes",
            "cancel": f"bertscale cancel {run}",
        }
        return State("waiting", sentence, first.source, first, advice.get(remedy or "", remedy))
    if facts.cancelled:
        sentence = f"cancelled; {sentence} until all is saved"
        return State("ending", sentence, first.source, first, f"bertscale cancel {run} --now")
    word = "ending" if first.state == "COMPLETING" else "running"
    return State(word, sentence, first.source, first, f"bertscale logs {run} -f")


def judge_local(place: Place, facts: Facts, now: float) -> State:
    """A run that was started by hand: only files tell of it."""
    run, source = shlex.quote(place.shown), "its own files"
    if facts.done:
        if facts.stage == "finetune":
            return State("done", f"done: the figures are in {run}/{RESULT}", source)
        sentence = f"done: all {facts.steps:,} steps"
        return State("done", sentence, source, next=f"bertscale convert {run} OUTPUT")
    if facts.process:
        sentence = f"it trains on this machine, in process {facts.process}"
        return State("running", sentence, source, next=f"bertscale logs {run} -f")
    attempt = facts.attempts[-1] if facts.attempts else None
    written = [place.run / METRICS, *(attempt.folder.iterdir() if attempt and attempt.folder else ())]
    newest = max(map(history.changed, written))
    ended = attempt.ended if attempt else None  # by the process that had started the ranks
    if now - newest < FRESH_SECONDS and (ended is None or newest > ended + LAST_WRITES_SECONDS):
        sentence = f"its figures changed {show_duration(now - newest)} ago: it may train on another machine"
        return State("running", sentence, source, next=f"bertscale logs {run} -f")
    last = f"; its last attempt: {attempt.outcome}" if attempt and attempt.outcome else ""
    sentence = f"it does not run{last}"
    return State("stopped", sentence, source, next=control.local_command(place))
