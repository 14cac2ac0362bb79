"""A sign of life: the first rank tells the supervisor (launcher.watch) that the run moves.

beat(step)    # after every step, at every held-out batch, before and after a checkpoint
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from pathlib import Path

SECONDS = 1.0  # between two writes, however short a step is

_last = -SECONDS  # when the file was written, by time.monotonic()


def beat(step: int) -> None:
    """Rewrites the file `heartbeat` of this attempt; does nothing on other ranks and without a supervisor."""
    global _last
    attempt = os.environ.get("BERTSCALE_ATTEMPT")
    now = time.monotonic()
    if attempt is None or now - _last < SECONDS or os.environ.get("RANK", "0") != "0":
        return
    _last = now
    partial = Path(attempt, ".heartbeat")
    with contextlib.suppress(OSError):  # a full disk ends a run at its next checkpoint, not here
        partial.write_text(json.dumps({"step": step, "time": time.time()}), encoding="utf-8")
        partial.replace(Path(attempt, "heartbeat"))
