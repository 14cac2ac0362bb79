"""The weights that a run starts from, in another shape: by positions, tiling and vocabulary."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from bertscale.config import ModelConfig
from bertscale.convert.sources import InitSource


class Reshaped:
    """A source with other tensors, made by a function of the source and the name; it is a source again."""

    def __init__(
        self,
        source: InitSource,
        tensor: Callable[[str], Tensor],
        *,
        names: list[str] | None = None,
        vocab_size: int | None = None,
        tokenizer: Path | None = None,
        **sizes: Any,
    ) -> None:
        """Whatever is not given is as in `source`; `sizes` are keys of its `ModelConfig` that differ."""
        self.folder, self.digest = source.folder, source.digest
        self.missing, self.left_out = source.missing, source.left_out
        self.tensor = tensor
        self.names = source.names if names is None else names
        self.vocab_size = vocab_size or source.vocab_size
        self.tokenizer = tokenizer or source.tokenizer
        self.missing, self.left_out = source.missing, source.left_out
        self.model: ModelConfig = source.model.model_copy(update=sizes)
