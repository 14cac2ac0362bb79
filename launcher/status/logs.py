"""Shows what a run has written: the batch log, one rank's log, or that of the rank that failed first.

bertscale logs RUN [-f] [--rank N] [--attempt N] [-n LINES]
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bertscale.errors import UserError
from bertscale.run_folder import attempt_job, attempt_number, batch_log_name, rank_logs, read_events
from launcher import history, queue_jobs, runs
from launcher.history import first_failed
from launcher.runs import Place

POLL_SECONDS = 0.2  # between two looks into the log
LOOK_SECONDS = 1.0  # between two looks for another log, or the end
ASK_SECONDS = 30.0  # of silence before the queue is asked whether the job still lives
BLOCK_BYTES = 2**16
LOCAL_ENDS = ("done", "stopped", "gave_up")  # of a run that was started by hand
TURNS = ("queued", "started", "relaunched", "gave_up")  # the events after which earlier failures are past


@dataclass(frozen=True)
class Log:
    """The file to show, and what a person should know of it."""

    path: Path
    title: str
    failed: bool = False  # of the rank that failed first


@dataclass
class Reader:
    """What has been read of one file, and the line that is not whole yet."""

    path: Path
    offset: int
    rest: str = ""

    def read(self) -> list[str]:
        """The lines that were finished since the last call; what has no newline yet stays in `rest`."""
        with self.path.open("rb") as file:
            if file.seek(0, os.SEEK_END) < self.offset:
                self.offset = 0  # it was begun again
            file.seek(self.offset)
            data = file.read()
        whole = data.rfind(b"\n") + 1
        last_state = data[whole:].rstrip(b"\r").rfind(b"\r") + 1  # of a bar that redraws itself
        self.offset += whole + last_state
        self.rest = clean(data[whole + last_state :].decode(errors="replace"))
        return [clean(line) for line in data[:whole].decode(errors="replace").split("\n")[:-1]]


def logs(place: Place, task: str | None, options: argparse.Namespace) -> int:
    """Prints the chosen log, with `options.follow` until the job has ended; returns 0. Raises UserError."""
    if options.lines < 0:
        raise UserError(f"--lines {options.lines} is less than 0")
    try:
        if options.follow:
            follow(place, task, options)
            return 0
        log = choose(place, task, options.rank, options.attempt)
        if log is None:
            run = place.shown
            raise UserError(f"{run} has written no log yet: `bertscale status {run}` tells why")
        note(log.title)
        show(Reader(log.path, tail(log.path, options.lines)), last=True)
    except KeyboardInterrupt:
        print(flush=True)
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def follow(place: Place, task: str | None, options: argparse.Namespace) -> None:
    """Prints what is written, by one attempt after another, until the job has ended."""
    readers: dict[Path, Reader] = {}
    log: Log | None = None
    waited = False
    last_look = last_news = last_asked = float("-inf")
    while True:
        now, over = time.monotonic(), None
        if now - last_look > LOOK_SECONDS:
            last_look = now
            over = ended(place)  # before the log is read: what was written until then is still shown
            chosen = choose(place, task, options.rank, options.attempt, patient=True)
            if log and (chosen is None or chosen.path != log.path):
                show(readers[log.path], last=True)
            if chosen is None and not waited:
                waited = True
                note(f"{place.shown} has written nothing yet: waiting for it (Ctrl-C ends this)")
            if chosen and (log is None or chosen.path != log.path):
                note(chosen.title)
            log = chosen
            if log and log.path not in readers:
                # One that begins while one watches is shown from its first line.
                begins = (waited or readers) and not log.failed
                readers[log.path] = Reader(log.path, 0 if begins else tail(log.path, options.lines))
        if log and show(readers[log.path]):
            last_news = now
        first = last_asked == float("-inf")
        if not over and (first or now - max(last_asked, last_news) > ASK_SECONDS):
            last_asked = now
            over = gone(place)
        if over:
            if log:
                show(readers[log.path], last=True)
            note(over)
            return
        time.sleep(POLL_SECONDS)


def ended(place: Place) -> str | None:
    """A sentence when the run's own files say that it is over."""
    if place.job is None:
        last = (read_events(place.events) or [{"event": ""}])[-1]
        return f"{place.shown}: {history.tell(last)}" if last["event"] in LOCAL_ENDS else None
    tasks = spec.array if (spec := runs.spec_of(place)) else 0
    if runs.is_done(place.job, tasks):
        return f"{place.shown} is done"
    turns = [event for event in read_events(place.events) if event["event"] in TURNS]
    if turns and turns[-1]["event"] == "gave_up" and not tasks:
        return f"{place.shown}: {history.tell(turns[-1])}"
    return None


def gone(place: Place) -> str | None:
    """A sentence when Slurm answers, and the job is neither queued nor running."""
    if place.job is None:
        return None
    ids = history.slurm_ids(read_events(place.events))
    try:
        if queue_jobs.jobs_of(place.job, ids, queue_jobs.own_jobs()):
            return None
        job = queue_jobs.other_job(ids[-1]) if ids else None  # it may be somebody else's
    except UserError:
        return None
    if job and job.active:
        return None
    return f"{place.shown} is not in the queue any more: `bertscale status {place.shown}` tells how it ended"


# ---------------------------------------------------------------------------------------- choosing


def choose(
    place: Place, task: str | None, rank: int | None, attempt: int | None, *, patient: bool = False
) -> Log | None:
    """The log that is asked for, or the one that tells most; None when nothing is written yet.

    Raises UserError for an attempt or rank that does not exist; a `patient` one waits for it instead.
    """
    root = runs.log_folder(place, runs.spec_of(place))
    folders = history.attempt_folders(root)
    if task is not None:
        folders = [path for path in folders if path.name.endswith(f"-{task}")]
    if attempt is not None:
        numbers = sorted({attempt_number(path.name) for path in folders})
        folders = [path for path in folders if attempt_number(path.name) == attempt]
        if not folders and not patient:
            raise UserError(f"{place.shown} has no attempt {attempt}; it has {_list(numbers)}")
    newest = folders[-1] if folders else None
    # The newest log of a batch script, which the first rank writes to as well.
    batch = max(root.glob(batch_log_name(task or "*")), key=history.changed, default=None)
    if rank is None and newest:
        # While one follows, reading the reports of a thousand ranks every second would be too much.
        failed = failed_event(place, newest) or (None if patient and place.job else first_failed(newest))
        path = rank_logs(newest).get(int(failed["rank"])) if failed else None
        if failed and path:
            return Log(path, f"{history.tell({**failed, 'event': 'failed'})}; {path}", failed=True)
    if rank is None and attempt is None and batch:
        return Log(batch, str(batch))
    if newest is None:
        if rank is not None and not patient:
            raise UserError(f"{place.shown} has no attempt yet, so rank {rank} has no log")
        return None
    path = rank_logs(newest).get(rank or 0)
    if path is None and rank is not None and not patient:
        raise UserError(f"{newest} has no log of rank {rank}; it has {_list(sorted(rank_logs(newest)))}")
    return Log(path, f"attempt {attempt_number(newest.name)}; {path}") if path else None


def failed_event(place: Place, attempt: Path) -> dict[str, Any] | None:
    """The event of the rank that failed first in `attempt`, the newest one of its job."""
    job = attempt_job(attempt.name)
    found_first = None
    for event in read_events(place.events):
        if event["event"] in TURNS and str(event.get("job", job)) == job:
            found_first = None
        elif event["event"] == "failed" and isinstance(event.get("rank"), int):
            found_first = found_first or event
    return found_first


def _list(numbers: list[int]) -> str:
    if len(numbers) > 2 and numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"{numbers[0]} to {numbers[-1]}"
    return ", ".join(map(str, numbers)) or "none"


# --------------------------------------------------------------------------------------- showing


def tail(path: Path, lines: int) -> int:
    """Where the last `lines` lines of a file begin, in bytes; reads no more of it than it must."""
    with path.open("rb") as file:
        position = end = file.seek(0, os.SEEK_END)
        count = 0
        while position > 0:
            size = min(BLOCK_BYTES, position)
            position -= size
            file.seek(position)
            block = file.read(size)
            # A newline at the end of the file ends the last line, and begins none.
            newline = size - (position + size == end and block.endswith(b"\n"))
            while (newline := block.rfind(b"\n", 0, newline)) >= 0:
                count += 1
                if count == lines:
                    return position + newline + 1
    return 0 if lines else end


CONTROL = re.compile(r"\x1b\[[0-9;?]*[@-~]|\x1b[^\[]|[\x00-\x08\x0b-\x1f\x7f\x80-\x9f]")
COLOUR = re.compile(r"\x1b\[[0-9;]*m")


def clean(line: str) -> str:
    """What a terminal would show of a line: a bar that redraws itself after `\\r` leaves its last state.

    Nothing that moves the cursor or does worse to a terminal comes through; colours do, on a terminal.
    """
    shown = line.rstrip("\r").rpartition("\r")[2]
    if sys.stdout.isatty() and COLOUR.search(shown):
        pieces = re.split(f"({COLOUR.pattern})", shown)
        return "".join(piece if COLOUR.fullmatch(piece) else CONTROL.sub("", piece) for piece in pieces)
    return CONTROL.sub("", shown)


def show(reader: Reader, *, last: bool = False) -> bool:
    """Prints what is new, `last`: also a line without an end; whether there was anything.

    On a terminal a line that is not whole yet is shown as far as it has come.
    """
    before = reader.rest
    lines = reader.read()
    if last and reader.rest:
        lines.append(reader.rest)
    live = sys.stdout.isatty()
    if lines:
        print(("\r\x1b[K" if live and before else "") + "\n".join(lines), flush=True)
    if live and reader.rest and not last and (lines or reader.rest != before):
        width = os.get_terminal_size(sys.stdout.fileno()).columns
        print("\r\x1b[K" + reader.rest[: max(1, width - 1)], end="", flush=True)
    return bool(lines) or reader.rest != before


def note(text: str) -> None:
    """A line about the log, not of it: on stderr, so that the log alone can be piped on."""
    print(f"==> {text}", file=sys.stderr, flush=True)
