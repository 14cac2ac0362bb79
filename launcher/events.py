"""The history of a job: one JSON line for each thing that happened, appended and never rewritten.

queued, started, checkpoint, signal, failed, hang, relaunched, requeued, resumed, node_left_out, done,
gave_up, cancelled
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any


class Events:
    """Writes to one events.jsonl; several processes may, since each line is one write in append mode.

    `facts` belong to every line, such as the job's id.
    """

    def __init__(self, path: Path, **facts: Any) -> None:
        self.path, self.facts = path, facts

    def write(self, event: str, **facts: Any) -> None:
        """Appends {"time": seconds since 1970, "event": ..., facts}."""
        entry = {"time": time.time(), "event": event, **self.facts, **facts}
        line = json.dumps(entry, ensure_ascii=False) + "\n"
        file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(file, line.encode())
        finally:
            os.close(file)


def read_events(path: Path) -> list[dict[str, Any]]:
    """All whole lines of `path`, oldest first; a line that a crash cut short is passed over."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return []
    events = []
    for line in lines:
        try:
            events.append(json.loads(line))
        except ValueError:
            continue
    return events
