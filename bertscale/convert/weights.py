"""Whole native weights for pretraining, from whatever holds weights, and the model of them.

weights = open_weights(Path("runs/quickstart/pretrain"))    # its newest checkpoint
weights.tensor("encoder.pooler.weight")                     # one tensor is read at a time
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from bertscale.config import ModelConfig, UserError, check_config
from bertscale.convert.folders import FolderSource, PairSource
from bertscale.convert.model_shape import PARTS, native_shapes
from bertscale.convert.native_files import Given, NativeFiles
from bertscale.convert.sources import CheckpointSource, open_source_weights
from bertscale.model.model import PretrainingModel, initial_value
from bertscale.train.checkpoint import Checkpoint

# Of an ELECTRA without generator the first that its shape allows.
GENERATOR_SIZES = (1 / 4, 1 / 3, 1 / 2, 1.0)


class Weights(Protocol):
    """Gives whole native tensors of a model for pretraining."""

    folder: Path
    model: ModelConfig
    vocab_size: int

    @property
    def parameters(self) -> Mapping[str, Any]: ...  # by native names

    @property
    def tokenizer(self) -> Path: ...  # of the tokenizer's file; raises UserError where there is none

    def states(self, name: str) -> tuple[str, ...]: ...  # `weight`, and what else is there of the parameter

    def tensor(self, name: str, state: str = "weight") -> Tensor: ...  # float32, CPU

    def digest(self) -> str: ...  # of all that it is read from; raises UserError where that is damaged


def open_weights(path: Path, given: Given | None = None) -> Checkpoint | SourceWeights:
    """Opens any source that `open_source_weights` reads; what it lacks of the heads gets first values.

    Raises UserError where `path` is none of them, is damaged, or lacks more than heads.
    """
    source = open_source_weights(path, given)
    return source.weights if isinstance(source, CheckpointSource) else SourceWeights(source)


class SourceWeights:
    """What is no checkpoint of ours as a whole model for pretraining.

    `missing` names the parameters of heads that have first values, `left_out` what the source has beside.
    """

    def __init__(self, source: FolderSource | PairSource | NativeFiles) -> None:
        self.source, self.folder, self.vocab_size = source, source.folder, source.vocab_size
        self.model: ModelConfig = source.whole
        if self.model.generator_size is not None and not any(
            name.startswith("generator.") for name in source.names
        ):
            self.model = _with_small_generator(self.model, str(source.folder))
        self.parameters = native_shapes(self.model, self.vocab_size)
        self.missing = [name for name in self.parameters if name not in source.names]
        if beyond := [name for name in self.missing if not name.startswith(PARTS)]:
            raise UserError(
                f"{source.folder} lacks {beyond[0]}: it is a generator without its discriminator; give the "
                "folder of that with this one inside as `generator`, or start a pretraining from this by "
                "init.from"
            )
        unused = [name for name in source.names if name not in self.parameters]
        self.left_out = [*source.left_out, *unused]

    @property
    def tokenizer(self) -> Path:
        """The path of the source's tokenizer."""
        return self.source.tokenizer

    @property
    def updates(self) -> int:
        """Counts the steps that the moments have seen."""
        return self.source.updates if isinstance(self.source, NativeFiles) else 0

    def states(self, name: str) -> tuple[str, ...]:
        """The states of a parameter: those of the source, where it has moments of all parameters."""
        if isinstance(self.source, NativeFiles) and not self.missing:
            return self.source.states(name)
        return ("weight",)

    def tensor(self, name: str, state: str = "weight") -> Tensor:
        """Returns a native parameter, float32; raises UserError where it is misshapen."""
        if name in self.missing:
            return initial_value(name, self.parameters[name], self.model, self.vocab_size, seed=0)
        if isinstance(self.source, NativeFiles):
            return self.source.tensor(name, state)
        return self.source.tensor(name)

    def digest(self) -> str:
        """The digest of the source."""
        return self.source.digest()


def _with_small_generator(model: ModelConfig, origin: str) -> ModelConfig:
    """The shape of a discriminator with the smallest usual generator that goes with it."""
    for share in GENERATOR_SIZES:
        try:
            return check_config(ModelConfig, {**model.model_dump(), "generator_size": share}, origin)
        except UserError:
            continue
    return model


def load_model(path: str | Path) -> PretrainingModel:
    """Loads a model for pretraining, float32 on the CPU, in evaluation mode.

    `path` is a run folder, whose newest checkpoint is taken, a checkpoint of any topology, or another source
    that `bertscale convert` reads; heads for pretraining that it lacks have first values. `model(batch)`
    takes a micro-batch of `iterate_batches` and returns `LossSums`: scalars, summed over its predictions.
    `model.encoder(tokens, token_types, positions, lengths)` takes int64 [T] and returns float32 hidden states
    [T, H] and, with a sentence head, what it pools of each sample [S, H].

    Raises UserError where `path` is none of these or is damaged.

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
