"""The history of a run in words: its events, its attempts, and how each attempt ended.

for attempt in read_attempts(read_events(events_path), attempt_folders(logs)): ...
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bertscale.errors import STOPPED_AND_SAVED
from bertscale.run_folder import attempt_job, attempt_number, attempts_in, is_number, rank_reports
from launcher.ranks import Exit
from launcher.records import from_json


@dataclass
class Attempt:
    """One start of all ranks; times in seconds since 1970, `outcome` in words, empty while unknown."""

    number: int
    job: str = ""
    nodes: str = ""
    started: float | None = None
    ended: float | None = None
    outcome: str = ""
    folder: Path | None = None


def slurm_ids(events: Iterable[dict[str, Any]]) -> list[str]:
    """The Slurm jobs that a run has had, oldest first; the tasks of an array share theirs."""
    return list(dict.fromkeys(str(event["job"]).partition("_")[0] for event in events if event.get("job")))


def attempt_folders(logs: Path) -> list[Path]:
    """Lists `attempt-NNN` and `attempt-NNN-JOBID` folders, oldest first."""
    return sorted(
        (path for path in attempts_in(logs) if path.is_dir()),
        key=lambda path: (attempt_number(path.name), changed(path)),
    )


def read_attempts(events: Iterable[dict[str, Any]], folders: list[Path]) -> list[Attempt]:
    """All attempts, from the events and the folders together, each with how it ended.

    Where no event says `started` the folders tell when that was, but not how the attempt ended.
    """
    events = list(events)
    guessed = not any(event["event"] == "started" for event in events)  # of a version that wrote none
    if guessed:
        for path in folders:
            events.append({"time": _first_change(path), "event": "started", "attempt": path.name})
        events.sort(key=lambda event: float(event["time"]))
    attempts: list[Attempt] = []
    current: dict[str, Attempt] = {}  # of each task of an array; "" of a job that is none
    for event in events:
        kind, when, job = event["event"], float(event["time"]), str(event.get("job") or "")
        task = job if "_" in job else ""
        attempt = current.get(task)
        if kind in ("started", "relaunched") and attempt and attempt.ended is None:
            attempt.ended = when
            attempt.outcome = attempt.outcome or ("" if guessed else died_in_silence(attempt))
        if kind == "started":
            number = attempt_number(event.get("attempt", attempt.number + 1 if attempt else 1))
            current[task] = Attempt(number, job, _words(event.get("nodes")), when)
            attempts.append(current[task])
        elif attempt and kind in ENDS and attempt.ended is None:
            # The first cause is the one to show: others follow from it.
            last_word = kind in ("done", "stopped") or not attempt.outcome
            attempt.outcome = tell(event) if last_word else attempt.outcome
            if kind == "requeued" and attempt.outcome != tell(event):
                attempt.outcome += f", {tell(event)}"
            if kind not in ("signal", "cancelled"):  # these only tell it to end
                attempt.ended = when
    for folder in folders:
        number, job = attempt_number(folder.name), attempt_job(folder.name)
        for attempt in attempts:
            if attempt.number == number and (not attempt.job or attempt.job == job) and not attempt.folder:
                attempt.folder = folder
                break
        else:
            attempts.append(Attempt(number, job, started=_first_change(folder), folder=folder))
    for attempt in attempts:
        failed = first_failed(attempt.folder) if attempt.folder and not attempt.outcome else None
        if failed:
            attempt.outcome, attempt.ended = tell({"event": "failed", **failed}), failed.get("time")
    return sorted(attempts, key=lambda attempt: (attempt.started or 0.0, attempt.number))


ENDS = ("failed", "hang", "signal", "requeued", "done", "stopped", "gave_up", "cancelled")


def died_in_silence(attempt: Attempt) -> str:
    """How an attempt ended that has left no word."""
    cause = "its node or its batch script died" if attempt.job else "it was killed, or its machine went down"
    return f"ended without a report: {cause}"


def first_failed(attempt: Path) -> dict[str, Any] | None:
    """The exit report of the rank that failed first, of those in the attempt's folder."""
    reports = []
    for path in rank_reports(attempt):
        with contextlib.suppress(OSError, ValueError):
            report = from_json(Exit, path.read_text(encoding="utf-8"))
            if is_number(report.time) and report.code not in (0, STOPPED_AND_SAVED):
                reports.append(report)
    first = min(reports, key=lambda report: report.order, default=None)
    return dataclasses.asdict(first) if first else None


def tell(event: dict[str, Any]) -> str:
    """One event in words."""
    kind = event["event"]

    def given(key: str, before: str = "", after: str = "") -> str:
        text = _words(event.get(key))
        return f"{before}{text}{after}" if text else ""

    sentences = {
        "queued": f"queued{given('job', ' as job ')}{given('after', ' after job ')}"
        f"{given('succeeds', ' in place of job ')}",
        "started": f"attempt {attempt_number(event.get('attempt'))} started"
        f"{given('nodes', ' on ')}{given('job', ' (job ', ')')}",
        "checkpoint": f"checkpoint of step {given('step')}",
        "signal": f"told to save and stop{given('name', ' by ')}",
        "failed": f"rank {given('rank')}{given('node', ' on ')} failed"
        f"{given('reason', ': ') or given('code', ': exit code ')}",
        "hang": f"no step{given('seconds', ' for ', ' s')}{given('step', ' after step ')}"
        f"{given('silent', '; silent: ranks ')}",
        "relaunched": f"all ranks are started again{given('checkpoint', ' from step ')}",
        "requeued": f"{'saved and ' if event.get('saved') is True else ''}requeued{given('reason', ': ')}",
        "resumed": f"resumed from step {given('step')}",
        "node_left_out": f"{given('node')} left out{given('reason', ': ')}",
        "done": "done",
        "stopped": f"stopped{given('name', ' by ')}{given('checkpoint', '; newest checkpoint: step ')}",
        "gave_up": f"gave up{given('reason', ': ')}{given('checkpoint', '; last checkpoint: ')}",
        "cancelled": f"cancelled{given('by', ' by ')}{given('reason', ': ')}",
    }
    facts = [f"{key} {_words(value)}" for key, value in event.items() if key not in ("event", "time")]
    return sentences.get(kind, f"{kind.replace('_', ' ')}{': ' if facts else ''}{', '.join(facts)}")


def changed(path: Path) -> float:
    """When `path` was last written, in seconds since 1970; 0 where there is no such file."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _first_change(folder: Path) -> float:
    """When the oldest file of a folder was last written, about when the folder was made."""
    with contextlib.suppress(OSError):
        return min((changed(path) for path in folder.iterdir()), default=changed(folder))
    return changed(folder)


def _words(value: object) -> str:
    if isinstance(value, list | tuple):
        shown = [str(entry) for entry in value[:8]] + [f"{len(value) - 8} more"] * (len(value) > 8)
        return ", ".join(shown)
    return "" if value is None else str(value)
