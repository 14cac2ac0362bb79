"""Whole native weights for pretraining, from a checkpoint or a Hugging Face folder, and the model of them.

weights = open_weights(Path("runs/quickstart/pretrain"))    # its newest checkpoint
weights.tensor("encoder.pooler.weight")                     # one tensor is read at a time
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from bertscale.config import ModelConfig, UserError
from bertscale.config.table import damaged
from bertscale.convert.hf_folder import HuggingFaceFolder
from bertscale.convert.hf_names import SENTENCE_HEAD, hugging_face_names, model_of
from bertscale.model.layers import Layers
from bertscale.model.model import PretrainingModel, initial_value
from bertscale.run_folder import TABLE
from bertscale.train.checkpoint import open_checkpoint


class Weights(Protocol):
    """Gives whole native tensors, from a checkpoint or a Hugging Face folder."""

    folder: Path
    model: ModelConfig
    vocab_size: int

    @property
    def parameters(self) -> Any: ...  # an iterable of native names

    def tensor(self, name: str) -> Tensor: ...  # float32, CPU

    def digest(self) -> str: ...  # of all that it is read from; raises UserError where that is damaged


def open_weights(path: Path) -> Weights:
    """Opens a checkpoint, the newest checkpoint of a run, or a Hugging Face folder.

    Raises UserError where `path` is none of them or is damaged.
    """
    if not path.exists():
        raise UserError(
            f"there is no folder {path}: give a run, a checkpoint, or a model's folder; nothing is "
            "downloaded, so save a published model and its tokenizer first, by save_pretrained(FOLDER)"
        )
    if (path / "config.json").is_file():
        return HuggingFaceWeights(path)
    checkpoint = open_checkpoint(path)
    found = {name: torch.Size(entry["shape"]) for name, entry in checkpoint.parameters.items()}
    if found != native_shapes(checkpoint.model, checkpoint.vocab_size):
        reason = "its parameters are not those of its model"
        raise damaged(checkpoint.folder / TABLE, reason, "use another checkpoint")
    return checkpoint


def native_shapes(model: ModelConfig, vocab_size: int) -> dict[str, torch.Size]:
    """Returns every native parameter with its whole shape."""
    with torch.device("meta"):
        skeleton = PretrainingModel(model, vocab_size, Layers())
    return {name: parameter.shape for name, parameter in skeleton.named_parameters()}


class HuggingFaceWeights(HuggingFaceFolder):
    """Reads native tensors from a Hugging Face model for pretraining or masked language modelling.

    A bert or megatron-bert without pooler and next-sentence head gets initial values for them; `missing`
    names them.
    """

    wanted = "model for pretraining or masked language modelling"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.model: ModelConfig = model_of(self.config, str(self.origin))
        self.open_file()
        self.parameters = native_shapes(self.model, self.vocab_size)
        self.missing = [
            name
            for name in self.parameters
            if name.startswith(SENTENCE_HEAD)
            # A part of the head that is there in part is no head of another kind, but a damaged file.
            and not any(self._has(f"{name.rpartition('.')[0]}.{kind}") for kind in ("weight", "bias"))
        ]

    def tensor(self, name: str) -> Tensor:
        """Returns the native parameter `name`, float32; raises UserError where it is missing or misshapen."""
        if name in self.missing:
            return initial_value(name, self.parameters[name], self.model, self.vocab_size, seed=0)
        theirs = hugging_face_names(name, self.form)
        return self.read(name, theirs, self.model, self.parameters[name])

    def unused(self) -> list[str]:
        """Lists the tensors of the file that no parameter is read from, but for copies of tied ones."""
        return self.unread(
            theirs for name in self.parameters for theirs in hugging_face_names(name, self.form)
        )

    def _has(self, name: str) -> bool:
        return all(self.find(theirs) for theirs in hugging_face_names(name, self.form) or [""])


def load_model(path: str | Path) -> PretrainingModel:
    """Loads a model for pretraining, float32 on the CPU, in evaluation mode.

    `path` is a run folder, whose newest checkpoint is taken, a checkpoint of any topology, or a Hugging Face
    folder that `bertscale convert` reads; pooler and next-sentence head that such a folder lacks have first
    values. `model(batch)` takes a micro-batch of `iterate_batches` and returns `LossSums`: scalars, summed
    over its predictions. `model.encoder(tokens, token_types, positions, lengths)` takes int64 [T] and returns
    float32 hidden states [T, H] and, with a sentence head, what it pools of each sample [S, H].

    Raises UserError where `path` is none of the three or is damaged.

        model = load_model("runs/quickstart/pretrain")
    """
    return native_model(open_weights(Path(path)))


def native_model(weights: Weights) -> PretrainingModel:
    """Makes the dense native model with these weights, float32 on the CPU, in evaluation mode."""
    model = PretrainingModel(weights.model, weights.vocab_size)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights.tensor(name))
    return model.eval()
