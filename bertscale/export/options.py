"""What `bertscale convert` may be told; the command line reads this file, so it imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

# What can be written, by the value of --as, for its help text. `convert.FORMS` says how each is made.
FORMS = {
    "pretraining": "a Hugging Face folder of the class for pretraining",
    "checkpoint": "a checkpoint",
    "universal": "a universal checkpoint of DeepSpeed",
}


@dataclass(frozen=True)
class ConvertOptions:
    """How a conversion is made.

    `as_` is a key of `FORMS`; by default a Hugging Face folder becomes a checkpoint, and all else a folder
    for pretraining. `show`: an exported model fills masks (`masks.show_masks`). `replace` allows to delete
    what no conversion has written. `average`: the moving average of a run's weights is converted.

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

    @property
    def topology(self) -> tuple[int | None, int | None, int | None]:
        """What is asked for: tensor-parallel ranks, data-parallel ranks, ZeRO stage."""
        return self.tensor_parallel, self.data_parallel, self.zero_stage
