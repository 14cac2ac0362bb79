"""Where a run computes: the key `device`, which several configs have."""

from __future__ import annotations

from typing import Literal

Device = Literal["auto", "cpu", "cuda"]
DEVICE = (
    "Where the run computes. auto: on the GPUs of this machine, where it has none on its CPU. cuda: on GPUs "
    "alone. cpu: on the CPU, whatever else there is."
)
