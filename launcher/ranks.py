"""Inside a rank: its place among the others, found in the environment, and the account of how it ended.

`bertscale pretrain CONFIG` starts ranks by launcher.supervise; no command of its own.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import faulthandler
import json
import os
import random
import re
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO, cast

from bertscale.errors import FAULT, MISTAKE, STOPPED_AND_SAVED, UserError
from bertscale.progress import CopiedStream
from launcher.terminal import outlive_terminal

LATE_SECONDS = 0.5  # those that lose a killed rank may say so before its parent hears of its death
LOG_LINES = 15  # of a rank that died without a report
REPORT_CHARACTERS = 12_000  # of a traceback's end; fits into a pipe, 64 KiB, whatever the language

# Set for a rank by the process that started it: that process, to die with it, and the pipe that takes an
# uncaught exception. A pipe, since the exception may be that the disk is full.
PARENT = "BERTSCALE_PARENT"
REPORT = "BERTSCALE_REPORT"
# Set for the first rank of this machine: its stdout leads to the screen, and a copy belongs into its log.
COPIED = "BERTSCALE_COPIED"


@dataclass(frozen=True)
class Rank:
    """This process's place among `world_size` processes; `local_rank` counts within its machine."""

    rank: int
    world_size: int
    local_rank: int


# -------------------------------------------------------------------------------------- environment


def from_environment() -> Rank | None:
    """This process as a rank of this package, torchrun or srun; None when nothing has started ranks yet.

    Under srun the variables that torch.distributed reads are derived and put into os.environ.
    Raises UserError when RANK and WORLD_SIZE come without the address of rank 0.
    """
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:
        for name in ("MASTER_ADDR", "MASTER_PORT"):
            if name not in env:
                raise UserError(
                    f"RANK={env['RANK']} and WORLD_SIZE={env['WORLD_SIZE']} are set, but not {name}: "
                    "set it to the address of rank 0, or unset RANK to start ranks on this machine"
                )
        env.setdefault("LOCAL_RANK", "0")
    elif _in_slurm_step(env):
        hosts = env.get("SLURM_STEP_NODELIST") or env["SLURM_JOB_NODELIST"]
        env["RANK"] = env["SLURM_PROCID"]
        env["WORLD_SIZE"] = _slurm_tasks(env)
        env["LOCAL_RANK"] = env["SLURM_LOCALID"]
        env.setdefault("MASTER_ADDR", first_host(hosts))
        number = int(env["SLURM_STEP_ID"]) + int(env.get("SLURM_RESTART_COUNT", "0"))
        env.setdefault("MASTER_PORT", str(job_port(env.get("SLURM_JOB_ID", "0"), number)))
    else:
        return None
    return Rank(int(env["RANK"]), int(env["WORLD_SIZE"]), int(env["LOCAL_RANK"]))


def _slurm_tasks(env: os._Environ[str]) -> str:
    # SLURM_NTASKS may be the job's; a step can have fewer.
    return env.get("SLURM_STEP_NUM_TASKS") or env.get("SLURM_NTASKS") or "1"


def _in_slurm_step(env: os._Environ[str]) -> bool:
    """True inside a task of an srun of several; the batch script and an salloc shell are no such task."""
    if "SLURM_PROCID" not in env or "SLURM_STEP_ID" not in env:
        return False
    # Slurm numbers the batch script, the interactive shell and its like from 0xfffffff0 up.
    return int(env["SLURM_STEP_ID"]) < 0xFFFFFFF0 and int(_slurm_tasks(env)) > 1


def job_port(job: str, number: int) -> int:
    """The same port on every node, below the ephemeral ones, another one for each job and `number`.

    A later start takes another port since the one before may still be in TIME_WAIT, or held by a
    rank that has not died yet.
    """
    return 12_000 + (int(job) * 17 + number * 5) % 20_000


def free_port() -> int:
    """A port that nobody listens at, for ranks of this machine.

    It is below those that the kernel gives to outgoing connections: one of these may be taken again in the
    seconds before the first rank listens.
    """
    draw = random.SystemRandom()
    while True:
        port = draw.randrange(12_000, 32_000)
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError as error:
                if error.errno == errno.EADDRINUSE:
                    continue
                raise
        return port


def first_host(nodelist: str) -> str:
    """First host of a Slurm node list: `gpu[003-010,12],cpu1` -> `gpu003`."""
    first = re.match(r"(?:\[[^\]]*\]|[^,\[])+", nodelist)
    if first is None:
        raise UserError(f"the Slurm node list {nodelist!r} names no host")
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first.group())


# ------------------------------------------------------------------------------------ inside a rank


def run_as_rank(main: Callable[[], int]) -> int:
    """Runs `main` as one rank and returns its exit code.

    A rank that this package started dies with its parent, leaves an uncaught exception and its time
    where the parent looks for it, and on SIGUSR2 writes the stacks of its threads to its log. Under
    torchrun or a plain srun the exception is passed on to the caller.
    """
    if PARENT not in os.environ:
        return main()
    die_with_parent(int(os.environ[PARENT]))
    outlive_terminal()
    if COPIED in os.environ:
        sys.stdout = cast(TextIO, CopiedStream(sys.stdout, sys.stderr))
    faulthandler.enable()  # a crash in native code writes its Python stack to the rank's log
    faulthandler.register(signal.SIGUSR2, all_threads=True)  # the supervisor's question when nothing moves
    try:
        return main()
    except Exception as error:
        report_failure(error, int(os.environ[REPORT]))
        # Not sys.exit: threads that wait for the other ranks could hold the interpreter's exit back.
        os._exit(MISTAKE if isinstance(error, UserError) else FAULT)


def report_failure(error: Exception, pipe: int) -> None:
    """Writes `error` with the wall-clock time to the file descriptor `pipe`, then to this rank's log."""
    now = time.time()
    text = "".join(traceback.format_exception(error))
    mistake = str(error)[:REPORT_CHARACTERS] if isinstance(error, UserError) else None
    shown = "" if mistake else text[-REPORT_CHARACTERS:]
    report = json.dumps({"time": now, "text": shown, "mistake": mistake}, ensure_ascii=False)
    os.write(pipe, report.encode(errors="replace"))
    with contextlib.suppress(OSError):  # the disk of the log may be full
        print(text, file=sys.stderr)
        sys.stdout.flush()


def die_with_parent(parent: int) -> None:
    """Has the kernel kill this process when process `parent` dies, also by kill -9 (Linux)."""
    if sys.platform != "linux":
        return
    set_parent_death_signal = 1  # PR_SET_PDEATHSIG of prctl(2)
    ctypes.CDLL(None, use_errno=True).prctl(set_parent_death_signal, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != parent:  # it died before the call
        os.kill(os.getpid(), signal.SIGKILL)


# -------------------------------------------------------------------------------- beside a rank


@dataclass(frozen=True)
class Exit:
    """How a rank ended: `time` in seconds since 1970, `reason` in words, `text` a traceback or log lines."""

    rank: int  # -1: all of them
    node: str
    code: int  # -N: signal N
    time: float
    reason: str
    text: str = ""
    mistake: str | None = None
    raised: bool = False  # it has left a report: an exception ended it
    asked: bool = False  # it was told to end, since another one had failed

    @property
    def order(self) -> tuple[int, float]:
        """Sorts the deaths of a start, the cause first. The clocks of nodes differ, so time alone does not
        tell: an exception may be about a rank that died without a word, and hardly the other way round."""
        if not self.raised and self.code not in (0, STOPPED_AND_SAVED):
            return (3 if self.asked else 0), self.time
        return (2 if self.mistake is None else 1), self.time


def describe_exit(rank: int, node: str, code: int, died: float, pipe: int, log: Path) -> Exit:
    """What is known of a rank that has ended: its own report from `pipe`, or the code and its log's end."""
    reason = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    os.set_blocking(pipe, False)  # a process that the rank left behind may hold the pipe open
    try:
        report: dict[str, Any] = json.loads(os.read(pipe, 2**16) or b"{}")
    except BlockingIOError:
        report = {}
    if report:
        return Exit(rank, node, code, reason=f"exit code {code}", raised=True, **report)
    if code in (0, STOPPED_AND_SAVED):
        return Exit(rank, node, code, died, reason)
    if code == -signal.SIGKILL:
        died -= LATE_SECONDS
        reason += " (by a person, or by the kernel when memory ran out: `dmesg` tells)"
    with open(log, "rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 2**16))
        lines = file.read().decode(errors="replace").splitlines()
    return Exit(rank, node, code, died, reason, "\n".join(lines[-LOG_LINES:]))
