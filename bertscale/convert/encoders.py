"""What a new task model begins with: the encoder of any checkpoint or Hugging Face folder, head or none.

weights = open_encoder(Path("runs/quickstart/pretrain"))
weights.names                                    # encoder.embeddings.word_embeddings.weight, ...
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from bertscale.config import ModelConfig
from bertscale.convert.hf_folder import CONFIG_FILE, HuggingFaceFolder
from bertscale.convert.hf_names import hugging_face_names
from bertscale.convert.task_names import encoder_model_of
from bertscale.convert.weights import Weights, open_weights
from bertscale.model.heads import head_family
from bertscale.model.layers import Layers
from bertscale.model.model import Encoder

# A task's head of ModernBert begins with that of the masked tokens: in transformers both have one name.
SHARED_HEAD = {
    "head.dense.weight": "predictions.dense.weight",
    "head.LayerNorm.weight": "predictions.LayerNorm.weight",
}


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
    """Opens a checkpoint, the newest checkpoint of a run, or a Hugging Face folder of any class of a preset,
    plain ones and task models included. Raises UserError where `path` is none of them or is damaged."""
    if (path / CONFIG_FILE).is_file():
        return _OfFolder(path)
    return _OfCheckpoint(open_weights(path))


class _OfCheckpoint:
    """The encoder of a model for pretraining."""

    def __init__(self, weights: Weights) -> None:
        self.weights = weights
        self.folder, self.model, self.vocab_size = weights.folder, weights.model, weights.vocab_size
        parameters = list(weights.parameters)
        self.names: list[str] = [name for name in parameters if name.startswith("encoder.")]
        if self.model.preset == "modern" and self.model.generator_size is None:
            self.names += [name for name, theirs in SHARED_HEAD.items() if theirs in parameters]

    def tensor(self, name: str) -> Tensor:
        """Returns a parameter of `names`."""
        return self.weights.tensor(SHARED_HEAD.get(name, name))

    def digest(self) -> str:
        """The digest of the checkpoint."""
        return self.weights.digest()


class _OfFolder(HuggingFaceFolder):
    """The encoder in a Hugging Face folder, whatever head it has."""

    wanted = "encoder"
    plain = True

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.model: ModelConfig = encoder_model_of(self.config, self.origin)
        self.open_file()
        pools = head_family(self.model) in ("bert", "megatron-bert")
        with torch.device("meta"):
            encoder = Encoder(self.model, self.vocab_size, Layers(), pools)
        self.shapes = {f"encoder.{name}": each.shape for name, each in encoder.named_parameters()}
        width = self.model.hidden_size
        if self.model.preset == "modern":
            self.shapes |= zip(SHARED_HEAD, (torch.Size([width, width]), torch.Size([width])), strict=True)
        # Either may be missing as a whole; a part of it alone means a damaged file.
        for module in ("encoder.pooler.", "head."):
            parts = [name for name in self.shapes if name.startswith(module)]
            if not any(self.find(theirs) for name in parts for theirs in self._theirs(name)):
                for name in parts:
                    del self.shapes[name]

    @property
    def names(self) -> list[str]:
        """Lists the native parameters."""
        return list(self.shapes)

    def tensor(self, name: str) -> Tensor:
        """Returns a parameter of `names`; raises UserError where it is missing or misshapen."""
        return self.read(name, self._theirs(name), self.model, self.shapes[name])

    def _theirs(self, name: str) -> list[str]:
        return hugging_face_names(SHARED_HEAD.get(name, name), self.form)
