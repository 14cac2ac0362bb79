"""The device of a rank: which one and why, its number format, its peak."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from itertools import pairwise

import torch

from bertscale import gpus
from bertscale.config import UserError

PEAK_SECONDS = 0.33  # that `measured_peak` takes
# Part of a device's name -> FLOP/s; the first that fits counts. See `data_sheet_peak`.
DATA_SHEET_PEAKS = {
    "A100": 312e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H200 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "GB200": 2500e12,
    "B200": 2250e12,
    "L40S": 362e12,
}


def local_device(wanted: str = "auto") -> torch.device:
    """The device of this local rank for `device: wanted` (auto, cpu or cuda): its GPU, or the CPU.

    Raises UserError where a GPU is wanted, or is there all the same, and cannot be used.
    """
    if wanted == "cpu":
        return torch.device("cpu")
    obstacle = _find_obstacle()
    if obstacle is not None:
        gpus.refuse(obstacle, wanted)
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


def device_line(device: torch.device, wanted: str, ranks: int = 1) -> str:
    """The first line of a run of so many ranks: which device it takes, and why."""
    if device.type == "cuda":
        return f"device    {ranks} x {describe(device)} (CUDA {torch.version.cuda})"
    cores = len(os.sched_getaffinity(0))
    obstacle = None if wanted == "cpu" else _find_obstacle()
    reason = obstacle.reason if obstacle else "as configured"
    return f"device    CPU, {cores} core{'s' if cores > 1 else ''} ({reason})"


def _find_obstacle() -> gpus.Obstacle | None:
    """Tells why torch has no CUDA device; None where it has one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what it says of a driver comes again as an exception
        if torch.cuda.is_available():
            return None
        if (known := gpus.find_obstacle()) is not None:
            return known
        try:
            torch.cuda.init()  # type: ignore[no-untyped-call]
            said = "torch sees none of this machine's GPUs"
        except (RuntimeError, AssertionError) as error:
            said = f"torch cannot use this machine's GPUs ({str(error).strip().split('. ')[0].rstrip('.')})"
    build = f"install a driver for the CUDA of this torch, {torch.version.cuda}, or a torch for the driver's"
    return gpus.Obstacle(said, build, meant=True)


def choose_precision(wanted: str, device: torch.device) -> tuple[torch.dtype, str]:
    """Returns (dtype, reason in words) for `auto`, `bfloat16` or `float32`; raises UserError for others."""
    if (
        wanted == "bfloat16"
        and device.type == "cpu"
        and choose_precision("auto", device)[0] != torch.bfloat16
    ):
        slow = "as configured, but this CPU computes it slowly: train.precision=auto takes float32 here"
        return torch.bfloat16, slow
    if wanted in ("float32", "bfloat16"):
        return getattr(torch, wanted), "as configured"
    if wanted != "auto":
        raise UserError(f"precision={wanted!r} is none of auto, bfloat16, float32")
    if device.type == "cuda":
        native = torch.cuda.get_device_capability(device)[0] >= 8
        return (torch.bfloat16, "the GPU has it") if native else (torch.float32, "the GPU lacks bfloat16")
    for flag, name in (("amx_bf16", "AMX"), ("avx512_bf16", "AVX512-BF16")):
        if flag in _cpu_flags():
            return torch.bfloat16, f"the CPU has {name}"
    return torch.float32, "the CPU has neither AMX nor AVX512-BF16"


def describe(device: torch.device) -> str:
    """The device in words, such as `NVIDIA H200` or `CPU, 2 threads`."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} thread{'s' if torch.get_num_threads() > 1 else ''}"


@contextmanager
def one_thread() -> Iterator[None]:
    """Inside, torch works in one thread.

    Copies gain nothing from more, and on a busy machine threads wait for each other: a conversion took seven
    times as long.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def synchronize(device: torch.device) -> None:
    """Waits until the device has finished all kernels that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@cache
def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s that MFU is relative to: the data sheet's on a known GPU, else `measured_peak`, once."""
    return data_sheet_peak(device, dtype) or measured_peak(device, dtype)


def data_sheet_peak(device: torch.device, dtype: torch.dtype) -> float | None:
    """Dense bfloat16 FLOP/s that NVIDIA's data sheet gives the device; None where none is known here.

    Sources: the A100 data sheet of 2021 (312 TFLOPS, SXM and PCIe); the H100 data sheet (989 SXM, 756 PCIe,
    835 NVL) and the H200 one (989 SXM, 835 NVL), which print twice that, with sparsity; the Blackwell
    architecture brief of 2024 (2,250 B200, 2,500 GB200); the L40S data sheet (362).
    """
    if device.type != "cuda" or dtype != torch.bfloat16:
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for known, peak in DATA_SHEET_PEAKS.items() if known in name), None)


def measured_peak(device: torch.device, dtype: torch.dtype) -> float:
    """The best FLOP/s of square matrix products in a third of a second, two at least: 2,048 wide with this
    process's threads, or 8,192 on a GPU, which needs some of them to reach its clock rate; 256 wide on a CPU
    that would take seconds for one of 2,048, as some do in bfloat16."""
    if device.type == "cuda":
        return _best_product(device, dtype, 8192)
    small = _best_product(device, dtype, 256, seconds=0.0)
    return _best_product(device, dtype, 2048) if 2 * 2048**3 / small < 1.0 else small


def _best_product(
    device: torch.device, dtype: torch.dtype, size: int, seconds: float = PEAK_SECONDS
) -> float:
    """The best FLOP/s of products `size` wide in `seconds`, two of them at least."""
    left = torch.randn(size, size, device=device, dtype=dtype)
    right = torch.randn(size, size, device=device, dtype=dtype)
    synchronize(device)
    clock = [time.perf_counter()]
    while len(clock) < 3 or clock[-1] - clock[0] < seconds:
        left.matmul(right)
        synchronize(device)
        clock.append(time.perf_counter())
    return 2 * size**3 / min(after - before for before, after in pairwise(clock))


def _cpu_flags() -> set[str]:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next((set(line.split()) for line in lines if line.startswith("flags")), set())
    except OSError:
        return set()
