"""One rank of a Slurm step: gives it its place, keeps its log, and writes down how it ended.

srun ... python -m launcher.rank COMMAND ...    # started by launcher.watch

In the attempt's folder (BERTSCALE_ATTEMPT) it writes rank-NNNN.log, the rank's stdout and stderr, and
at the end rank-NNNN.json, the `Exit` of launcher.ranks; srun alone tells no more than the exit code of
whichever rank it heard of last. Only the standard library, and no polling: many of them start at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import IO

from bertscale.errors import MISTAKE, STOPPED_AND_SAVED
from bertscale.files import write_json
from bertscale.run_folder import ATTEMPT_VARIABLE, FAILED, SLURM_DIGITS, rank_log, rank_report
from launcher.ranks import PARENT, REPORT, Exit, describe_exit, die_with_parent

# srun answers a failed rank with SIGTERM for all, and after KillWait, often 30 s, with SIGKILL.
GRACE_SECONDS = 3


def main(command: list[str]) -> int:
    """Runs `command` as the rank that srun's variables name; returns its exit code, 128 + N for signal N."""
    if ATTEMPT_VARIABLE not in os.environ:
        print("launcher.rank is started by launcher.watch: run `sbatch` on the job's script", file=sys.stderr)
        return MISTAKE
    rank = int(os.environ["SLURM_PROCID"])
    attempt = Path(os.environ[ATTEMPT_VARIABLE])
    log = rank_log(attempt, rank, SLURM_DIGITS)
    with open(log, "ab", buffering=0) as file:
        ended = _run(rank, attempt, command, log, file)
    if ended.code not in (0, STOPPED_AND_SAVED):
        (attempt / FAILED).touch()
    write_json(rank_report(attempt, rank), dataclasses.asdict(ended), flush=False)
    return ended.code if ended.code >= 0 else 128 - ended.code


def _run(rank: int, attempt: Path, command: list[str], log: Path, file: IO[bytes]) -> Exit:
    child: subprocess.Popen[bytes] | None = None
    early: list[int] = []  # signals that came before the rank was there
    ending = 0.0  # when srun asked for the end

    def forward(number: int, _: FrameType | None) -> None:
        nonlocal ending
        if child is None:
            early.append(number)
            return
        child.send_signal(number)
        if number == signal.SIGTERM:
            ending = ending or time.monotonic()
        signal.alarm(1)

    def look(number: int, _: FrameType | None) -> None:
        os.fsync(file.fileno())  # the stacks that were asked for, which a shared disk else shows much later
        if ending:
            late = time.monotonic() - ending > GRACE_SECONDS
            if late and child is not None and (attempt / FAILED).exists():
                child.kill()
            signal.alarm(1)

    signal.signal(signal.SIGALRM, look)
    for name in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT):
        signal.signal(name, forward)
    reading, writing = os.pipe()
    me = os.getpid()
    child = subprocess.Popen(
        command,
        env=_environment(rank) | {PARENT: str(me), REPORT: str(writing)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE if rank == 0 else file,
        stderr=file,
        pass_fds=[writing],
        preexec_fn=lambda: die_with_parent(me),
    )
    os.close(writing)
    for number in early:
        forward(number, None)
    copier = threading.Thread(target=_copy, args=(child.stdout, file), daemon=True)
    copier.start()
    code = child.wait()
    died = time.time()
    signal.alarm(0)
    copier.join(timeout=1)  # a process that the rank left behind may hold the pipe open
    node = os.environ.get("SLURMD_NODENAME") or os.uname().nodename
    ended = describe_exit(rank, node, code, died, reading, log)
    return dataclasses.replace(ended, asked=bool(ending) and code < 0)


def _environment(rank: int) -> dict[str, str]:
    place = {
        "RANK": str(rank),
        "WORLD_SIZE": os.environ.get("SLURM_STEP_NUM_TASKS") or os.environ["SLURM_NTASKS"],
        "LOCAL_RANK": os.environ["SLURM_LOCALID"],
        "PYTHONUNBUFFERED": "1",  # a rank that is killed has still written its log
    }
    cores = os.environ.get("SLURM_CPUS_PER_TASK", "1")
    return {"OMP_NUM_THREADS": cores} | dict(os.environ) | place


def _copy(source: IO[bytes] | None, file: IO[bytes]) -> None:
    """The first rank's stdout goes to its log, and by srun's to the job's."""
    while source is not None and (chunk := os.read(source.fileno(), 2**16)):
        file.write(chunk)
        with contextlib.suppress(OSError):  # srun may be gone
            os.write(1, chunk)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
