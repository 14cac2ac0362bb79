"""A sign of life: the first rank tells the supervisor (launcher.watch) that the run does not hang.

beat(step)    # after every step, at every held-out batch, before and after a checkpoint
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

from bertscale.files import write_json
from bertscale.run_folder import ATTEMPT_VARIABLE, HEARTBEAT

SECONDS = 1.0  # between two writes, however short a step is

_last = -SECONDS  # when the file was written, by time.monotonic()


def beat(step: int) -> None:
    """Rewrites the file `heartbeat` of this attempt; does nothing on other ranks and without a supervisor."""
    global _last
    attempt = os.environ.get(ATTEMPT_VARIABLE)
    now = time.monotonic()
    if attempt is None or now - _last < SECONDS or os.environ.get("RANK", "0") != "0":
        return
    _last = now
    with contextlib.suppress(OSError):  # a full disk ends a run at its next checkpoint, not here
        write_json(Path(attempt, HEARTBEAT), {"step": step, "time": time.time()}, flush=False)
