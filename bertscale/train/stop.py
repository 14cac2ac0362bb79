"""How a run is stopped, and kept from being made twice at the same time."""

from __future__ import annotations

import fcntl
import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import IO

from bertscale.config import UserError
from bertscale.run_folder import LOCK
from bertscale.train.parallel import Ranks


class StopSignal:
    """Set by SIGTERM, SIGINT or SIGUSR1; the ranks agree on it at the next step."""

    def __init__(self) -> None:
        self.asked = False
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._ask)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True


@contextmanager
def only_one(run: Path, ranks: Ranks) -> Iterator[None]:
    """Makes the run folder and keeps a second job from training in it at the same time.

    A Slurm job takes over the lock of an earlier attempt of its own that still holds it on a node that was
    lost: that one can make no step, since a step needs all ranks. Raises UserError where another job trains.
    """
    run.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        if ranks.rank == 0:
            path, job = run / LOCK, os.environ.get("SLURM_JOB_ID", "")
            file = stack.enter_context(path.open("a+"))
            if not _lock(file):
                file.seek(0)
                if not job or file.read() != job or ranks.world == 1:
                    raise UserError(f"another job is training in {run}; stop it or choose another run folder")
                path.unlink()
                file = stack.enter_context(path.open("a+"))
                _lock(file)
            file.truncate(0)
            file.write(job)
            file.flush()
        yield


def _lock(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
