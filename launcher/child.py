"""A command of its own inside another one: `bertscale glue` runs each `bertscale finetune` so.

    code = run_child(["finetune", "runs/base-glue/cola.yaml"])
    process = start_child(["finetune", "sst2.yaml"], Path("sst2.log"), threads=1)    # beside this process

The child is in a session of its own, and gets every signal from this process alone, once: Ctrl-C, the end of
a job, pre-emption. It dies with this process.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import FrameType

from bertscale.errors import INTERRUPTED, STOPPED_AND_SAVED
from bertscale.run_folder import ATTEMPT_VARIABLE
from launcher.ranks import COPIED, PARENT, REPORT, die_with_parent

# What makes a process a rank: the child starts ranks of its own.
OF_RANKS = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    *(ATTEMPT_VARIABLE, PARENT, REPORT, COPIED),
)
PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
NICENESS = 10  # of a child beside: about a tenth of a core that both want


def run_child(words: list[str]) -> int:
    """Runs `bertscale WORDS`, which writes to this process's screen; returns its exit code.

    After a signal to this process that is STOPPED_AND_SAVED or INTERRUPTED, whatever the child returned.
    """
    me, stopped = os.getpid(), False
    process: subprocess.Popen[bytes] | None = None

    def pass_on(number: int, _: FrameType | None) -> None:
        nonlocal stopped
        stopped = True
        if process is not None:
            process.send_signal(number)

    taken = [number for number in PASSED_ON if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, pass_on) for number in taken}
    try:
        process = subprocess.Popen(
            [sys.executable, "-m", "bertscale", *words],
            env={name: value for name, value in os.environ.items() if name not in OF_RANKS},
            start_new_session=True,
            preexec_fn=lambda: die_with_parent(me),
        )
        if stopped:  # before the child was there
            process.terminate()
        code = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if stopped:
        return STOPPED_AND_SAVED if code == STOPPED_AND_SAVED else INTERRUPTED
    return code if code >= 0 else 128 - code


def start_child(words: list[str], log: Path, threads: int) -> subprocess.Popen[bytes]:
    """Starts `bertscale WORDS` beside this process, with less right to the cores, and `threads` of them; it
    writes to `log`. A task of a Slurm step may do so too: the child is no task of it."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in OF_RANKS and not name.startswith("SLURM_")
    }
    with open(log, "ab") as file:
        # Without preexec_fn, which may wait for ever for a lock that another thread holds at the fork.
        return subprocess.Popen(
            [sys.executable, "-c", f"from {__name__} import give_way; give_way()", str(os.getpid()), *words],
            env={**kept, "OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )


def give_way() -> None:
    """Becomes `bertscale WORDS`, of the command line PARENT WORDS, as `start_child` says: of low priority,
    the first to be killed where memory runs out, dead when its parent is."""
    parent, *words = sys.argv[1:]
    os.nice(NICENESS)
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
    die_with_parent(int(parent))
    os.execv(sys.executable, [sys.executable, "-m", "bertscale", *words])
