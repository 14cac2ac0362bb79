"""What `bertscale convert` may be told; the command line reads this file, so it imports no torch."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from bertscale.errors import UserError

Precision = Literal["float32", "bfloat16", "float16"]
Pooling = Literal["mean", "first"]

# What can be written, by the value of --as, for its help text. `convert.FORMS` says how each is made.
FORMS = {
    "pretraining": "a Hugging Face folder of the class with all heads of the pretraining",
    "masked-lm": "one of the class that fills masks",
    "encoder": "one of the class without heads, which servers of vectors know",
    "sentence-transformers": "an encoder that gives a vector for each text",
    "onnx": "a graph of ONNX: of the encoder, or of a task model with its head",
    "onnx-masked-lm": "a graph of ONNX that fills masks",
    "checkpoint": "a checkpoint of bertscale, for the topology that is given below",
    "universal": "a universal checkpoint of DeepSpeed",
}
HUGGING_FACE = ("pretraining", "masked-lm", "encoder", "sentence-transformers")
# Options that not every form knows, and the forms that do.
ONLY = {
    "dtype": HUGGING_FACE,
    "clamp": HUGGING_FACE,
    "shard_size": HUGGING_FACE,
    "pooler": ("encoder", "sentence-transformers"),
    "pooling": ("sentence-transformers", "onnx"),
    "normalize": ("sentence-transformers", "onnx"),
    "tensor_parallel": ("checkpoint",),
    "data_parallel": ("checkpoint",),
    "zero_stage": ("checkpoint",),
}
OF_OUTPUT = tuple(ONLY)  # what the files that are written depend on
SHARD_SIZE = 50 * 10**9  # of transformers 5


@dataclass(frozen=True)
class ConvertOptions:
    """How a conversion is made.

    `as_` is a key of `FORMS`; by default a run or a checkpoint becomes a folder for pretraining, and all else
    a checkpoint. `dtype` is of the weights; with `clamp` those beyond its range become its largest number,
    without it they are an error. `shard_size`: bytes of a file, unless one tensor has more. `pooler`: whether
    an encoder keeps the layer over its first token (None: where it was trained). `pooling` and `normalize`:
    how the vector of a text is made. `verify`: the output is loaded and compared. `show`: an exported model
    fills masks (`masks.show_masks`). `replace` allows to delete what no conversion has written. `average`:
    the moving average of a run's weights is converted.

    `tensor_parallel`, `data_parallel` and `zero_stage`: the topology of a checkpoint that is written. `model`
    and `tokenizer` are for a source that does not tell its own: `model.KEY=VALUE`, and a file or its folder.
    """

    as_: str | None = None
    show: bool = True
    replace: bool = False
    average: bool = False
    tensor_parallel: int | None = None
    data_parallel: int | None = None
    zero_stage: int | None = None
    model: tuple[str, ...] = ()
    tokenizer: Path | None = None
    dtype: Precision = "float32"
    clamp: bool = False
    shard_size: int = SHARD_SIZE
    pooler: bool | None = None
    pooling: Pooling | None = None
    normalize: bool = False
    verify: bool = True

    @property
    def topology(self) -> tuple[int | None, int | None, int | None]:
        """What is asked for: tensor-parallel ranks, data-parallel ranks, ZeRO stage."""
        return self.tensor_parallel, self.data_parallel, self.zero_stage

    def check(self, form: str) -> None:
        """Raises UserError where an option is given that the form does not know, or one is missing."""
        for name in self._given():
            if form not in ONLY.get(name, (form,)):
                raise UserError(
                    f"--{name.replace('_', '-')} goes with --as {' or '.join(ONLY[name])}, not with {form}"
                )
        if form == "sentence-transformers" and self.pooling is None:
            raise UserError(
                "--as sentence-transformers needs --pooling mean or --pooling first: what becomes the vector "
                "of a text, the mean of its tokens' states or the state of its first token"
            )

        if form == "onnx" and self.normalize and self.pooling is None:
            raise UserError("--normalize needs --pooling mean or --pooling first: which vector is meant")

    def key(self, form: str, default: str) -> str:
        """What tells the output from that of `default` without options; empty where nothing does."""
        given = [f"{name}={getattr(self, name)}" for name in self._given() if name in OF_OUTPUT]
        return " ".join(([f"as={form}"] if form != default else []) + given)

    def _given(self) -> list[str]:
        """The options that are not what they are by default."""
        return [each.name for each in fields(self) if getattr(self, each.name) != each.default]


def parse_size(text: str) -> int:
    """Reads a number of bytes, such as 2GB or 500MB. Raises ValueError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", text.strip(), re.IGNORECASE)
    if match is None:
        raise ValueError(f"{text!r} is no size such as 2GB or 500MB")
    size = int(float(match[1]) * 1000 ** " KMGT".index(match[2].upper() or " "))
    if size < 1:
        raise ValueError(f"{text!r} is no size: it must be one byte or more")
    return size
