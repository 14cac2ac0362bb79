"""What a fine-tuning starts from: an encoder, with or without the head of another task model."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from bertscale.config import FinetuneConfig, ModelConfig, UserError
from bertscale.convert.encoders import EncoderWeights, open_encoder
from bertscale.convert.task_models import MODEL, TaskWeights, is_task_model, open_task_model
from bertscale.model.heads import HeadConfig, head_initial_value
from bertscale.model.model import initial_value
from bertscale.tasks.task import Task
from bertscale.tokenizer import Tokenizer

BELOW = ("encoder.embeddings.", "encoder.layers.", "encoder.LayerNorm.")  # all of the encoder but its pooler


class RunStart(Protocol):
    """What of a run decides its first weights."""

    @property
    def seed(self) -> int: ...
    @property
    def start(self) -> str: ...


@dataclass(frozen=True)
class Source:
    """The weights to start from, whose labels are `labels` where they have a head."""

    encoder: EncoderWeights
    task_model: TaskWeights | None = None

    @property
    def folder(self) -> Path:
        return self.encoder.folder

    @property
    def model(self) -> ModelConfig:
        return self.encoder.model

    @property
    def vocab_size(self) -> int:
        return self.encoder.vocab_size

    def sizes(self, config: FinetuneConfig) -> ModelConfig:
        """The shape of the encoder, with the dropout of fine-tuning."""
        dropout = {
            "hidden_dropout_prob": config.model.hidden_dropout_prob,
            "attention_probs_dropout_prob": config.model.attention_probs_dropout_prob,
        }
        return self.model.model_copy(update=dropout)

    def head(self, config: FinetuneConfig, task: Task[Any]) -> HeadConfig:
        """The head of the task on this encoder."""
        of_source = self.task_model.head.pooling if self.task_model else None
        pooling = config.model.pooling or of_source or "cls"
        dropout = config.model.classifier_dropout
        if dropout is None:
            dropout = config.model.hidden_dropout_prob
        return HeadConfig(task.kind, task.outputs, pooling, dropout)

    def keeps_head(self, task: Task[Any]) -> bool:
        """Whether the head of the task model fits this task: the same kind and the same labels."""
        before = self.task_model
        return before is not None and before.head.kind == task.kind and before.labels == task.labels

    def first_values(self, task: Task[Any], run: RunStart) -> Callable[[str, list[int]], Tensor]:
        """The first value of each parameter, by (name, shape), for a run.

        From the source where it has the parameter and the run is `pretrained`; else random, an encoder's by
        its own recipe, a head's by that of transformers.
        """
        keeps, head_is, known = self.keeps_head(task), self.task_model, set(self.encoder.names)

        def first_value(name: str, shape: list[int]) -> Tensor:
            of_head = name.startswith("head.")
            if run.start == "pretrained":
                if of_head and keeps and head_is is not None:
                    return _checked(head_is.tensor(name), name, shape, self.folder)
                if name in known:
                    return _checked(self.encoder.tensor(name), name, shape, self.folder)
            if of_head or name.startswith("encoder.pooler."):
                return head_initial_value(name, shape, self.model, run.seed)
            return initial_value(name, shape, self.model, self.vocab_size, run.seed)

        return first_value


def _checked(value: Tensor, name: str, shape: list[int], folder: Path) -> Tensor:
    if list(value.shape) != shape:
        raise UserError(
            f"{name} of {folder} has the shape {list(value.shape)}, its config asks for {shape}; "
            "convert it again"
        )
    return value


def open_source(config: FinetuneConfig) -> Source:
    """Opens what a config starts from. Raises UserError where it is missing, damaged or of another kind."""
    path = Path(config.source)
    if config.init is None:
        return Source(open_encoder(path))
    folder = path if is_task_model(path) else path / MODEL
    if not is_task_model(folder):
        raise UserError(
            f"init={config.init} is no task model: neither it nor {path / MODEL} is one that `bertscale "
            "finetune` or transformers has saved; an encoder without a task is given by encoder="
        )
    return Source(open_encoder(folder), open_task_model(folder))


def check_tokenizer(vocab_size: int, tokenizer: Tokenizer) -> None:
    """Refuses the tokenizer of another encoder than the one beside it, with `vocab_size` pieces."""
    if tokenizer.vocab_size != vocab_size:
        raise UserError(
            f"the tokenizer {tokenizer.path} has {tokenizer.vocab_size:,} pieces, the encoder beside it "
            f"{vocab_size:,}; put the tokenizer of this encoder there"
        )


def scale_of(config: FinetuneConfig, sizes: ModelConfig) -> Callable[[str], float]:
    """The factor of the learning rate of each parameter, by its name; 0: it is not trained.

    1 for the encoder's last norm, `layer_decay` for the highest layer, its square for the next, and so on
    down to the embeddings (Clark et al., 2020, section 3.1 and appendix B); `head_learning_rate` for the
    head, to which the pooler belongs.
    """
    optimizer, frozen, layers = config.optimizer, config.model.freeze_layers, sizes.num_hidden_layers
    of_head = (optimizer.head_learning_rate or optimizer.learning_rate) / optimizer.learning_rate
    lowest = layers + 1 if frozen == "all" else frozen  # the number of layers that stay; of all the norm too

    def scale(name: str) -> float:
        if not name.startswith(BELOW):
            return of_head
        if found := re.match(r"encoder\.layers\.(\d+)\.", name):
            number = int(found.group(1))
        else:
            number = layers if name.startswith("encoder.LayerNorm.") else -1
        if lowest and number < lowest:
            return 0.0
        return optimizer.layer_decay ** (layers - number)

    return scale
