"""Whatever holds weights as native tensors by name: all that convert reads, and task models.

weights = open_any(Path("runs/sst2"))
weights.tensor("encoder.pooler.weight")
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from bertscale.config import ModelConfig
from bertscale.convert.hf_folder import tokenizer_of
from bertscale.convert.native_files import NativeFiles
from bertscale.convert.sources import open_source_weights
from bertscale.convert.task_models import MODEL, is_task_model, open_task_model
from bertscale.run_folder import CHECKPOINTS, TABLE
from bertscale.tokenizer import load_tokenizer
from bertscale.train.checkpoint import Checkpoint, open_checkpoint
from bertscale.train.checkpoint_table import STATES


class Tensors(Protocol):
    """Gives native tensors by their names."""

    folder: Path
    model: ModelConfig
    vocab_size: int

    @property
    def names(self) -> list[str]: ...

    def tensor(self, name: str) -> Tensor: ...  # whole, float32, CPU


@dataclass(frozen=True)
class Source:
    """What is at a path: native parameters, and maybe further states of each."""

    weights: Tensors
    checkpoint: Checkpoint | None = None

    def states(self, name: str) -> tuple[str, ...]:
        """What is kept of a parameter: `weight`, and of a checkpoint with moments these."""
        return self._with_states.states(name) if self._with_states else STATES[:1]

    def tensor(self, name: str, state: str = "weight") -> Tensor:
        """A whole tensor, float32. Raises UserError where it is missing or damaged."""
        if state == "weight":
            return self.weights.tensor(name)
        assert self._with_states is not None
        return self._with_states.tensor(name, state)

    @property
    def _with_states(self) -> Checkpoint | NativeFiles | None:
        return self.weights if isinstance(self.weights, NativeFiles) else self.checkpoint

    def settings(self) -> dict[str, Any]:
        """Settings by section: the model's and, of a checkpoint, those of its run."""
        table = self.checkpoint.table if self.checkpoint else {}
        run = table.get("config")
        settings = dict(run) if isinstance(run, dict) else {}
        if table.get("data_digest"):
            settings["data_digest"] = table["data_digest"]
        # Of a generator the parameters tell more: a discriminator alone does not know its size.
        settings["model"] = self.weights.model.model_dump(mode="json", exclude={"generator_size"})
        settings["vocab_size"] = self.weights.vocab_size
        tokenizer = getattr(self.weights, "tokenizer", None) or tokenizer_of(self.weights.folder)
        settings["tokenizer"] = load_tokenizer(tokenizer).sha256
        return settings


class _Named:
    """A checkpoint, of any kind of training, with its parameters as `names`."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.folder, self.model = checkpoint.folder, checkpoint.model
        self.vocab_size, self.tensor = checkpoint.vocab_size, checkpoint.tensor
        self.names: list[str] = list(checkpoint.parameters)


def open_any(path: Path) -> Source:
    """Opens a checkpoint, the newest of a run, a model of transformers, a task model, or a fine-tuning.

    Raises UserError where `path` is none of them, is damaged, or is a network that no preset equals.
    """
    if (path / CHECKPOINTS).is_dir() or (path / TABLE).is_file():
        checkpoint = open_checkpoint(path)
        return Source(_Named(checkpoint), checkpoint)
    for folder in (path, path / MODEL):
        if is_task_model(folder):
            return Source(open_task_model(folder))
    return Source(open_source_weights(path))
