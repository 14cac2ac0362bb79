"""What a run says of its processor: the number format, and a peak that it may pass."""

from __future__ import annotations

import pytest
import torch

from bertscale.train import device
from bertscale.train.metrics import show_mfu

CPU = torch.device("cpu")


def test_bfloat16_on_a_cpu_without_it_is_said_to_be_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "_cpu_flags", lambda: {"avx2"})
    dtype, reason = device.choose_precision("bfloat16", CPU)
    assert dtype == torch.bfloat16
    assert reason == "as configured, but this CPU computes it slowly: train.precision=auto takes float32 here"
    monkeypatch.setattr(device, "_cpu_flags", lambda: {"avx2", "avx512_bf16"})
    assert device.choose_precision("bfloat16", CPU) == (torch.bfloat16, "as configured")


def test_a_slow_peak_takes_no_large_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of 2,048 would take seconds, or minutes, where a small one reaches less than 17 GFLOP/s."""
    for rate, sizes in ((1e9, [256]), (1e12, [256, 2048])):
        taken: list[int] = []

        def product(
            _: torch.device,
            dtype: torch.dtype,
            size: int,
            rate: float = rate,
            *,
            seconds: float = 1.0,
            taken: list[int] = taken,
        ) -> float:
            taken.append(size)
            return rate

        monkeypatch.setattr(device, "_best_product", product)
        assert device.measured_peak(CPU, torch.bfloat16) == rate
        assert taken == sizes


def test_an_mfu_above_the_peak_is_not_shown_without_a_word() -> None:
    assert show_mfu(0.42) == "42%"
    assert show_mfu(1.24) == "124% of the peak measured at the start"
