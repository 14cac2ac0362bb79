"""Writes weights as transformers does: one safetensors file, or several of a size with an index of them.

One tensor is in memory at a time.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from bertscale.config import UserError
from bertscale.convert.tensor_files import INDEX, WEIGHTS
from bertscale.export.options import Precision
from bertscale.files import write_json
from bertscale.progress import Progress
from bertscale.train.checkpoint import stream_tensors
from bertscale.train.device import one_thread

DTYPES: dict[Precision, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
MANY = 0.01  # share of a tensor's values that become 0, from which on it is named
NAMED = 5  # tensors in a message


class Rounding:
    """Turns float32 values into those of a data type, and keeps what cannot be said in it."""

    def __init__(self, precision: Precision, *, clamp: bool) -> None:
        self.precision, self.dtype, self.clamp = precision, DTYPES[precision], clamp
        self.overflows: dict[str, int] = {}  # by tensor, values beyond the range
        self.zeros: dict[str, int] = {}  # by tensor, values that became 0, where they are many

    def __call__(self, value: Tensor) -> Tensor:
        """The values as they are stored; those beyond the range are clamped, whether asked for or not."""
        return value if self.dtype == torch.float32 else self._rounded(value)[0]

    def counted(self, name: str, value: Tensor) -> Tensor:
        """As a call; what is lost is counted."""
        if self.dtype == torch.float32:
            return value
        rounded, beyond = self._rounded(value)
        if over := int(beyond.sum()):
            self.overflows[name] = over
        gone = int(((rounded == 0) & (value != 0)).sum())
        if gone > MANY * value.numel():
            self.zeros[name] = gone
        return rounded

    def _rounded(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """The values as they are stored, and which of them were beyond the range."""
        rounded, largest = value.to(self.dtype), torch.finfo(self.dtype).max
        beyond = value.isfinite() & rounded.isinf()
        return torch.where(beyond, value.sign().to(self.dtype) * largest, rounded), beyond

    def check(self) -> list[str]:
        """Says what was lost. Raises UserError where values were beyond the range and no one allowed it."""
        said = []
        if self.overflows:
            what = f"{sum(self.overflows.values()):,} values are beyond its range: {_named(self.overflows)}"
            if not self.clamp:
                raise UserError(
                    f"--dtype {self.precision}: {what}; take bfloat16, or --clamp to write the largest "
                    "number in their place"
                )
            said.append(f"clamped   {self.precision}: {what}")
        if self.zeros:
            total = sum(self.zeros.values())
            said.append(
                f"lost      {self.precision}: {total:,} values are too small for it and became 0: "
                f"{_named(self.zeros)}"
            )
        return said


def _named(counts: dict[str, int]) -> str:
    first = ", ".join(f"{count:,} of {name}" for name, count in list(counts.items())[:NAMED])
    return first + (f" and of {len(counts) - NAMED:,} more tensors" if len(counts) > NAMED else "")


def run_through(what: str, count: int, tensors: Iterable[object]) -> None:
    """Takes `tensors`, which are `count`, one after the other, on one thread, and shows how far it is."""
    with one_thread(), Progress(what, count, "tensors") as progress:
        for _ in tensors:
            progress.advance(1)


def write_tensors(
    folder: Path,
    shapes: dict[str, torch.Size],
    tensors: Iterable[tuple[str, Tensor]],
    rounding: Rounding,
    shard_size: int,
) -> dict[str, str]:
    """Writes `tensors`, float32 and in the order of `shapes`, rounded; returns the digests of the files of
    weights by their names. Raises OSError."""
    shards = divide(shapes, rounding.dtype.itemsize, shard_size)
    rest = ((name, rounding.counted(name, value)) for name, value in tensors)
    where: dict[str, str] = {}
    digests: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = WEIGHTS
        if len(shards) > 1:
            file = WEIGHTS.replace(".", f"-{number:05d}-of-{len(shards):05d}.", 1)
        named = {name: shapes[name] for name in names}
        digests[file] = stream_tensors(folder / file, named, islice(rest, len(names)), rounding.dtype)
        where |= dict.fromkeys(names, file)
    if len(shards) > 1:
        values = sum(shape.numel() for shape in shapes.values())
        metadata = {"total_parameters": values, "total_size": values * rounding.dtype.itemsize}
        write_json(folder / (WEIGHTS + INDEX), {"metadata": metadata, "weight_map": where})
    return digests


def divide(shapes: dict[str, torch.Size], itemsize: int, shard_size: int) -> list[list[str]]:
    """The names of each file's tensors, in order: as many as fit, one at least."""
    shards: list[list[str]] = [[]]
    left = shard_size
    for name, shape in shapes.items():
        size = shape.numel() * itemsize
        if size > left and shards[-1]:
            shards.append([])
            left = shard_size
        shards[-1].append(name)
        left -= size
    return shards
