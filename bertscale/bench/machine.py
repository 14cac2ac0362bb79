"""Names this machine's processor; apart from `device`, since the workers of a prep must not load torch."""

from __future__ import annotations

import platform
from pathlib import Path


def processor() -> str:
    """Returns the processor's name as the kernel has it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()
