"""What a new task model begins with: the encoder of any checkpoint or Hugging Face folder, head or none.

weights = open_encoder(Path("runs/quickstart/pretrain"))
weights.names                                    # encoder.embeddings.word_embeddings.weight, ...
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from torch import Tensor

from bertscale.config import ModelConfig
from bertscale.convert.folders import SHARED, FolderSource
from bertscale.convert.hf_folder import CONFIG_FILE
from bertscale.convert.sources import InitSource, open_source_weights

# A task's head of ModernBert begins with that of the masked tokens: in transformers both have one name.
SHARED_HEAD = dict(zip(("head.dense.weight", "head.LayerNorm.weight"), SHARED, strict=True))


class EncoderWeights(Protocol):
    """Gives native tensors by their names in `TaskModel`."""

    folder: Path
    model: ModelConfig
    vocab_size: int

    @property
    def names(self) -> list[str]: ...  # all of the encoder; its pooler, and head.dense of modern, where known

    def tensor(self, name: str) -> Tensor: ...  # float32, CPU

    def digest(self) -> str: ...  # of all that it is read from; raises UserError where that is damaged


def open_encoder(path: Path) -> EncoderWeights:
    """Opens the encoder of any source that `open_source_weights` reads, plain ones and task models included.

    Raises UserError where `path` is none of them or is damaged.
    """
    folder = (path / CONFIG_FILE).is_file()
    return _Encoder(FolderSource(path, alone=True) if folder else open_source_weights(path))


class _Encoder:
    """The encoder of a source, and what a task's head of `modern` begins with."""

    def __init__(self, source: InitSource) -> None:
        self.source, self.folder, self.model = source, source.folder, source.model
        self.vocab_size = source.vocab_size
        self.names: list[str] = [name for name in source.names if name.startswith("encoder.")]
        if self.model.preset == "modern" and self.model.generator_size is None:
            self.names += [name for name, theirs in SHARED_HEAD.items() if theirs in source.names]

    def tensor(self, name: str) -> Tensor:
        """Returns a parameter of `names`; raises UserError where it is misshapen."""
        return self.source.tensor(SHARED_HEAD.get(name, name))

    def digest(self) -> str:
        """The digest of the source."""
        return self.source.digest()
