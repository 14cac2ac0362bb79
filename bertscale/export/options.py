"""What `bertscale convert` may be told; the command line reads this file, so it imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

# What can be written, by the value of --as, for its help text. `convert.FORMS` says how each is made.
FORMS = {
    "pretraining": "a Hugging Face folder of the class for pretraining",
    "checkpoint": "a checkpoint",
}


@dataclass(frozen=True)
class ConvertOptions:
    """How a conversion is made.

    `as_` is a key of `FORMS`; by default a Hugging Face folder becomes a checkpoint, and all else a folder
    for pretraining. `show`: an exported model fills masks (`masks.show_masks`). `replace` allows to delete
    what no conversion has written. `average`: the moving average of a run's weights is converted.
    """

    as_: str | None = None
    show: bool = True
    replace: bool = False
    average: bool = False
