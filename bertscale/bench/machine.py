"""What benchmarks say of the machine; apart from `device`, since workers of a prep are not to load torch."""

from __future__ import annotations

import platform
from pathlib import Path


def processor() -> str:
    """The processor's name as the kernel has it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()
