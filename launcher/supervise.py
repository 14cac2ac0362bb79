"""The supervisor of a run: starts all ranks, watches them, says what went wrong, and starts them again.

code = run_here(command, 4, Path("runs/base/logs"))    # ranks of this machine; in a Slurm job: launcher.watch

Exit codes, in both cases: bertscale.errors, or of the rank that failed first, 128 + N for signal N.
Only the standard library: a batch host may have nothing else.
"""

from __future__ import annotations

import contextlib
import json
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from bertscale.errors import CRASH_LOOP, HUNG, INTERRUPTED, MISTAKE, STOPPED_AND_SAVED, UserError
from bertscale.run_folder import (
    EVENTS,
    HEARTBEAT,
    Events,
    attempt_name,
    attempt_number,
    attempts_in,
    newest_step,
)
from launcher.rank_groups import LocalRanks, RankGroup
from launcher.ranks import Exit
from launcher.terminal import outlive_terminal

LOOK_SECONDS = 1.0  # between two looks at the heartbeat and the checkpoints
TURN_SECONDS = 5.0  # that a turn of the loop counts at most
STACK_SECONDS = 10.0  # at most, for ranks that hang to write their stacks
STACK = b"most recent call first"  # what faulthandler puts above each of them


@dataclass(frozen=True)
class Limits:
    """When ranks count as hung (0: never), and how often they are started again."""

    start_seconds: float = 0.0  # without a first step
    hang_seconds: float = 0.0  # without another one
    restarts: int = 0  # of one job
    restarts_without_progress: int = 0  # of these, in a row without a new checkpoint
    save_seconds: float = float("inf")  # for the ranks to save and end, once they are asked to


class StopRequests:
    """Counts the signals to stop sent to this process while the block runs: SIGINT, SIGTERM, SIGUSR1, and
    SIGHUP of a terminal that closes, unless it is ignored (nohup)."""

    def __init__(self) -> None:
        self.count = 0
        self.kill = False
        self.name = ""  # of the first

    def __enter__(self) -> StopRequests:
        numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            numbers.append(signal.SIGHUP)
        self.previous = {number: signal.signal(number, self._note) for number in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        # Slurm sends SIGTERM more than once; only a person who insists means "at once".
        self.kill = self.kill or (self.count > 0 and number == signal.SIGINT)
        self.count += 1
        self.name = self.name or signal.Signals(number).name


@dataclass(frozen=True)
class Hang:
    """No sign of life for `seconds` after `step` (None: since the start); `silent` ranks wrote no stacks."""

    step: int | None
    seconds: float
    silent: Sequence[int]


# ------------------------------------------------------------------------------------- on this machine


def run_here(
    command: list[str],
    ranks: int,
    log_folder: Path,
    limits: Limits = Limits(),
    run: Path | None = None,
    again: str = "",
) -> int:
    """Runs `command` as `ranks` processes on this machine and returns the exit code (see the top).

    Rank 0 writes to this process's stdout; all other output goes to a new folder `log_folder/attempt-NNN` for
    each start, the history to `log_folder/events.jsonl`. `run` is the run folder whose checkpoints are
    progress, `again` the command with which a person goes on. Raises UserError when a rank ended with one, or
    when the logs cannot be written.
    """
    events = Events(log_folder / EVENTS)

    def start() -> LocalRanks:
        attempt = new_attempt(log_folder)
        events.write("started", attempt=attempt.name)
        print(f"{ranks} rank{'s' if ranks > 1 else ''} on this machine, logs in {attempt}", flush=True)
        return LocalRanks(command, ranks, attempt)

    outlive_terminal()
    with StopRequests() as stop:
        try:
            code = supervise(start, limits, events, run, stop)
        except UserError as error:
            with contextlib.suppress(OSError):  # the logs cannot be written
                events.write("gave_up", reason=str(error).partition("\n")[0])
            raise
    if code == 0:
        events.write("done")
    elif code in (STOPPED_AND_SAVED, INTERRUPTED):
        saved = newest_step(run)
        events.write("stopped", name="Ctrl-C, twice" if stop.kill else stop.name, checkpoint=saved or None)
        print(farewell("killed" if stop.kill else "stopped", saved, again), file=sys.stderr, flush=True)
    return code


def farewell(what: str, saved: int, again: str) -> str:
    """The last line of a run that a person has ended: what of it is kept, and how to go on."""
    if not again:
        return what
    if saved:
        return f"{what}; everything until step {saved:,} is saved; to resume: {again}"
    return f"{what} before anything was saved; to start again: {again}"


def new_attempt(log_folder: Path, job: str = "", task: str = "") -> Path:
    """Makes the folder of the next attempt, which `job` makes; each task of an array counts its own."""
    try:
        log_folder.mkdir(parents=True, exist_ok=True)
        numbers = [attempt_number(path.name) for path in attempts_in(log_folder, task)]
        attempt = log_folder / attempt_name(1 + max(numbers, default=0), job)
        attempt.mkdir()
    except OSError as error:
        raise UserError(f"cannot make a folder for logs in {log_folder}: {error.strerror}") from error
    return attempt


# ------------------------------------------------------------------------------------------- the loop


def supervise(
    start: Callable[[], RankGroup], limits: Limits, events: Events, run: Path | None, stop: StopRequests
) -> int:
    """Has `start` start all ranks, again after a failure, within the limits; returns the exit code."""
    restarts = stalled = 0
    reached = newest_step(run)
    while True:
        if stop.count:
            return INTERRUPTED
        group = start()
        hang = watch(group, limits, events, run, stop, reached)
        exits = group.exits()
        if sys.stdout.isatty():  # a rank killed under its progress bar has left the cursor hidden
            print("\x1b[?25h", end="", flush=True)
        if hang is None and not exits:
            return 0
        first = min(exits, key=lambda ended: ended.order, default=None)
        if hang is None and first is not None:
            if first.code == STOPPED_AND_SAVED:
                return STOPPED_AND_SAVED
            if first.mistake is not None:
                raise UserError(first.mistake)
            if stop.count and (stop.kill or first.code in (-signal.SIGTERM, -signal.SIGUSR1)):
                return INTERRUPTED
        code = _explain(group, hang, first, events)
        if stop.count or code == MISTAKE:
            return code

        group.kill()  # what a rank has left behind on its node
        before, reached = reached, newest_step(run)
        stalled = 0 if reached > before else stalled + 1
        if stalled > limits.restarts_without_progress or restarts >= limits.restarts:
            return _give_up(code, hang, stalled, restarts, reached, limits)
        restarts += 1
        where = f"the checkpoint of step {reached}" if reached else "the beginning"
        print(f"\nall ranks are started again from {where}", file=sys.stderr, flush=True)
        events.write("relaunched", restart=restarts, checkpoint=reached)


def watch(
    group: RankGroup, limits: Limits, events: Events, run: Path | None, stop: StopRequests, reached: int
) -> Hang | None:
    """Returns when all ranks have ended; a Hang when they hung and had to be killed.

    `reached`: step of the newest checkpoint before they were started.
    """
    last_beat, next_look, last_turn = "", 0.0, time.monotonic()
    quiet = saving = 0.0  # seconds since the last sign of life, and since the ranks were asked to save
    asked = False
    while group.running():
        now = time.monotonic()
        # While a job is suspended nothing runs, this loop neither: that time counts for nothing.
        turn, last_turn = min(now - last_turn, TURN_SECONDS), now
        quiet, saving = quiet + turn, saving + turn
        if stop.count and not asked:
            asked, saving = True, 0.0
            again = " (Ctrl-C again to kill)" if stop.name == "SIGINT" else ""
            what = "stopping after this step and saving" if _read_beat(group) else "stopping"
            print(f"\n{what}{again}", file=sys.stderr, flush=True)
            events.write("signal", name=stop.name)
            group.ask_to_save()
        if asked and saving > limits.save_seconds:
            print(f"not all have saved within {limits.save_seconds:.0f} s; they are killed", file=sys.stderr)
            group.kill()
        if stop.kill:
            group.kill()
        if now >= next_look:
            next_look = now + LOOK_SECONDS
            beat = _read_beat(group)
            if beat != last_beat:
                last_beat, quiet = beat, 0.0
            newest = newest_step(run)
            if newest > reached:
                reached = newest
                events.write("checkpoint", step=newest)
            patience = limits.hang_seconds if last_beat else limits.start_seconds
            if patience and quiet > patience:
                return _end_hang(group, last_beat, quiet)
        time.sleep(group.poll_seconds)
    newest = newest_step(run)
    if newest > reached:
        events.write("checkpoint", step=newest)
    return None


def _read_beat(group: RankGroup) -> str:
    with contextlib.suppress(OSError):  # before the first step there is none
        return (group.attempt / HEARTBEAT).read_text(encoding="utf-8")
    return ""


def _end_hang(group: RankGroup, beat: str, seconds: float) -> Hang:
    """Has all ranks write their stacks, notes which did not, and kills them."""
    logs = [group.log(rank) for rank in range(group.ranks)]
    sizes = list(map(_size, logs))
    group.ask_for_stacks()
    silent = list(range(group.ranks))
    deadline = time.monotonic() + STACK_SECONDS
    while silent and time.monotonic() < deadline and group.running():
        time.sleep(0.5)
        silent = [rank for rank in silent if not _has_stack(logs[rank], sizes[rank])]
    group.silent = silent
    group.kill()
    step = None
    with contextlib.suppress(ValueError, KeyError, TypeError):
        step = int(json.loads(beat)["step"])
    return Hang(step, seconds, silent)


def _size(log: Path) -> int:
    with contextlib.suppress(OSError):
        return log.stat().st_size
    return 0


def _has_stack(log: Path, offset: int) -> bool:
    with contextlib.suppress(OSError), open(log, "rb") as file:
        file.seek(offset)
        return STACK in file.read(2**20)
    return False


# ------------------------------------------------------------------------------------------- in words


def _explain(group: RankGroup, hang: Hang | None, first: Exit | None, events: Events) -> int:
    """Prints what happened first, notes it, and returns the exit code that says so."""
    lines = [""]
    if hang is not None:
        since = f"after step {hang.step}" if hang.step is not None else "before the first step"
        lines.append(f"all ranks hung for {hang.seconds:.0f} s {since} and were killed")
        lines += [
            f"rank {rank}{_on(group.node(rank))} gave no answer: it was stopped, or its node is dead"
            for rank in hang.silent[:10]
        ]
        if len(hang.silent) > 10:
            lines.append(f"nor did {len(hang.silent) - 10} others")
        lines.append("where each of the others stood is at the end of its log")
        events.write("hang", step=hang.step, seconds=round(hang.seconds, 1), silent=list(hang.silent))
        code = HUNG
    else:
        assert first is not None
        who = f"rank {first.rank} of {group.ranks}{_on(first.node)} failed first"
        lines.append(f"{who if first.rank >= 0 else 'no rank has left a report'}: {first.reason}")
        lines.append(first.text.strip("\n"))
        events.write("failed", rank=first.rank, node=first.node, code=first.code, reason=first.reason)
        code = first.code if first.code > 0 else 128 - first.code
    lines.append(f"logs of all ranks: {group.attempt}")
    print("\n".join(lines), file=sys.stderr, flush=True)
    return code


def _give_up(code: int, hang: Hang | None, stalled: int, restarts: int, reached: int, limits: Limits) -> int:
    """Says why there is no further start, if there has been one, and returns the exit code."""
    if restarts == 0:
        return code
    if stalled <= limits.restarts_without_progress:
        print(f"gave up after {restarts} restarts, as many as launch.restarts allows", file=sys.stderr)
        return code
    standing = f"no checkpoint after that of step {reached}" if reached else "no checkpoint"
    starts = "one start" if stalled == 1 else f"{stalled} starts in a row"
    print(f"gave up: {standing} in {starts}", file=sys.stderr, flush=True)
    return code if hang is not None or stalled == 1 else CRASH_LOOP


def _on(node: str) -> str:
    return f" on {node}" if node else ""
