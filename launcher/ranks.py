"""The ranks of a run: found in the environment (torchrun, srun) or started on this machine.

`bertscale pretrain CONFIG` calls `spawn`; no command of its own.

Exit codes of `spawn`, and of `bertscale pretrain`:
  0     done
  2     a mistake of the person, shown as one line
  75    stopped by a signal and saved (EX_TEMPFAIL): the same command goes on
  130   stopped by a signal before there was anything to save, or killed by a second Ctrl-C
  else  the exit code of the rank that failed first, or 128 + the signal that killed it
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from bertscale.config import UserError

STOPPED_AND_SAVED = 75  # EX_TEMPFAIL of sysexits.h: try again
STOPPED_UNSAVED = 130  # 128 + SIGINT, as a shell says it
GRACE_SECONDS = 5.0  # between SIGTERM and SIGKILL, for the ranks that outlive a failed one
POLL_SECONDS = 0.02
LOG_LINES = 15  # of a rank that died without a word

REPORT_CHARACTERS = 12_000  # of a traceback's end; fits into a pipe, 64 KiB, whatever the language

# Set by `spawn` for its ranks: the process to die with, and the pipe that takes an uncaught exception.
# A pipe, since the exception may be that the disk is full.
PARENT = "BERTSCALE_PARENT"
REPORT = "BERTSCALE_REPORT"


@dataclass(frozen=True)
class Rank:
    """This process's place among `world_size` processes; `local_rank` counts within its machine."""

    rank: int
    world_size: int
    local_rank: int


# -------------------------------------------------------------------------------------- environment


def from_environment() -> Rank | None:
    """This process as a rank of `spawn`, torchrun or srun; None when nothing has started ranks yet.

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
        env.setdefault("MASTER_PORT", str(_slurm_port(env)))
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


def _slurm_port(env: os._Environ[str]) -> int:
    """The same port on every node, another one for every job, step and restart, below the ephemeral ones.

    A restart takes another port since the one before may still be in TIME_WAIT, or held by a rank
    that has not died yet.
    """
    job, step = int(env.get("SLURM_JOB_ID", "0")), int(env["SLURM_STEP_ID"])
    restart = int(env.get("SLURM_RESTART_COUNT", "0"))
    return 12_000 + (job * 17 + step * 5 + restart) % 20_000


def first_host(nodelist: str) -> str:
    """First host of a Slurm node list: `gpu[003-010,12],cpu1` -> `gpu003`."""
    first = re.match(r"(?:\[[^\]]*\]|[^,\[])+", nodelist)
    if first is None:
        raise UserError(f"the Slurm node list {nodelist!r} names no host")
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first.group())


# ------------------------------------------------------------------------------------ inside a rank


def run_as_rank(main: Callable[[], int]) -> int:
    """Runs `main` as one rank and returns its exit code.

    A rank of `spawn` dies with its parent, and leaves an uncaught exception and its time where the
    parent looks for it. Under torchrun or srun the exception goes on to the caller.
    """
    if PARENT not in os.environ:
        return main()
    die_with_parent(int(os.environ[PARENT]))
    faulthandler.enable()  # a crash in native code writes its Python stack to the rank's log
    try:
        return main()
    except Exception as error:
        report_failure(error, int(os.environ[REPORT]))
        # Not sys.exit: threads that wait for the other ranks could hold the interpreter's exit back.
        os._exit(2 if isinstance(error, UserError) else 1)


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


# -------------------------------------------------------------------------------- the parent of ranks


@dataclass(frozen=True)
class Child:
    """A rank on this machine; `report` is the reading end of its pipe."""

    rank: int
    process: subprocess.Popen[bytes]
    report: int
    log: Path


@dataclass(frozen=True)
class Failure:
    """How a rank ended: `time` in seconds since 1970, `reason` in words, `text` a traceback or log lines."""

    rank: int
    code: int
    time: float
    reason: str
    text: str
    mistake: str | None


class StopRequests:
    """Counts SIGINT and SIGTERM sent to this process while the block runs."""

    def __init__(self) -> None:
        self.count = 0
        self.kill = False

    def __enter__(self) -> StopRequests:
        self.previous = {s: signal.signal(s, self._note) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        # Slurm sends SIGTERM more than once; only a person who insists means "at once".
        self.kill = self.kill or (self.count > 0 and number == signal.SIGINT)
        self.count += 1


def count_gpus() -> int:
    """CUDA devices that torch will see, found without the seconds that importing torch takes."""
    torch = importlib.util.find_spec("torch")
    if torch is None or torch.origin is None:
        return 0
    build = (Path(torch.origin).parent / "version.py").read_text(encoding="utf-8")
    if re.search(r"^cuda\b[^=]*= *['\"]", build, re.MULTILINE) is None:
        return 0  # a torch that was built for CPUs
    try:
        listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return 0
    found = sum(line.startswith("GPU ") for line in listing.splitlines())
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return found
    chosen = [name.strip() for name in visible.split(",") if name.strip()]
    # CUDA stops reading at the first device that does not exist, by habit written as -1.
    return min(found, chosen.index("-1") if "-1" in chosen else len(chosen))


def spawn(command: list[str], ranks: int, log_folder: Path) -> int:
    """Runs `command` as `ranks` processes on this machine and returns the exit code (see the top).

    Rank 0 writes to this process's stdout; all other output goes to a new folder
    `log_folder/attempt-NNN`. When a rank fails, the others are ended and what happened first is
    printed last. Raises UserError when a rank ended with one, or when the logs cannot be written.
    """
    attempt = _new_attempt(log_folder)
    print(f"{ranks} rank{'s' if ranks > 1 else ''} on this machine, logs in {attempt}", flush=True)
    with StopRequests() as stop:
        children = _start(command, ranks, attempt)
        died = _wait(children, stop)
    if sys.stdout.isatty():
        print("\x1b[?25h", end="", flush=True)  # a rank killed under its progress bar left the cursor hidden
    failures = [_explain(children[rank], when) for rank, when in died.items()]
    for child in children:
        os.close(child.report)
    if not failures:
        return max(child.process.returncode for child in children)
    first = min(failures, key=lambda failure: failure.time)
    if first.mistake is not None:
        raise UserError(first.mistake)
    if stop.count and (stop.kill or first.code == -signal.SIGTERM):
        print("killed" if stop.kill else "stopped before there was anything to save", file=sys.stderr)
        return STOPPED_UNSAVED
    print(f"\nrank {first.rank} of {ranks} failed first: {first.reason}", file=sys.stderr)
    print(first.text.strip("\n"), file=sys.stderr)
    print(f"logs of all ranks: {attempt}", file=sys.stderr, flush=True)
    return first.code if first.code > 0 else 128 - first.code


def _new_attempt(log_folder: Path) -> Path:
    try:
        log_folder.mkdir(parents=True, exist_ok=True)
        number = 1 + max((int(path.name[8:]) for path in log_folder.glob("attempt-[0-9]*")), default=0)
        attempt = log_folder / f"attempt-{number:03d}"
        attempt.mkdir()
    except OSError as error:
        raise UserError(f"cannot make a folder for logs in {log_folder}: {error.strerror}") from error
    return attempt


def _start(command: list[str], ranks: int, attempt: Path) -> list[Child]:
    shared = {
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        PARENT: str(os.getpid()),
        "PYTHONUNBUFFERED": "1",  # a rank that is killed has still written its log
    }
    defaults = {"OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // ranks))}
    if sys.platform == "linux":
        defaults["GLOO_SOCKET_IFNAME"] = "lo"  # gloo else looks up the host name, which may lead nowhere
    children = []
    for rank in range(ranks):
        reading, writing = os.pipe()
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), REPORT: str(writing)}
        path = attempt / f"rank-{rank}.log"
        with open(path, "ab") as log:
            process = subprocess.Popen(
                command,
                env=defaults | dict(os.environ) | shared | own,
                stdin=subprocess.DEVNULL,
                stdout=None if rank == 0 else log,
                stderr=log,
                pass_fds=[writing],
                start_new_session=True,  # Ctrl-C of the terminal is for this process alone
            )
        os.close(writing)
        children.append(Child(rank, process, reading, path))
    return children


def _wait(children: list[Child], stop: StopRequests) -> dict[int, float]:
    """Waits for all ranks; returns when each failed one died, in seconds since 1970, not later than it did.

    A failed rank is the end of the others: SIGTERM, and SIGKILL after GRACE_SECONDS.
    """
    died: dict[int, float] = {}
    running = list(children)
    forwarded, deadline = False, float("inf")
    last_look = time.time()
    while running:
        look = time.time()
        for child in list(running):
            code = child.process.poll()
            if code is not None:
                running.remove(child)
                if code not in (0, STOPPED_AND_SAVED):
                    died[child.rank] = last_look
        last_look = look
        if stop.count and not forwarded:
            forwarded = True
            print("\nstopping after this step and saving (Ctrl-C again to kill)", file=sys.stderr, flush=True)
            _send(running, signal.SIGTERM)
        if died and deadline == float("inf"):
            deadline = time.monotonic() + GRACE_SECONDS
            _send(running, signal.SIGTERM)
        if stop.kill or time.monotonic() > deadline:
            _send(running, signal.SIGKILL)
        time.sleep(POLL_SECONDS)
    return died


def _send(running: list[Child], number: signal.Signals) -> None:
    for child in running:
        child.process.send_signal(number)


def _explain(child: Child, died: float) -> Failure:
    """What is known of a failed rank: its own report, or its exit code and the end of its log."""
    code = child.process.returncode
    os.set_blocking(child.report, False)  # a process that the rank left behind may hold the pipe open
    try:
        report = os.read(child.report, 2**16)
    except BlockingIOError:
        report = b""
    if report:
        return Failure(child.rank, code, reason=f"exit code {code}", **json.loads(report))
    reason = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    if code == -signal.SIGKILL:
        reason += " (by a person, or by the kernel when memory ran out: `dmesg` tells)"
    lines = child.log.read_text(encoding="utf-8", errors="replace").splitlines()
    return Failure(child.rank, code, died, reason, "\n".join(lines[-LOG_LINES:]), None)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
    return port
