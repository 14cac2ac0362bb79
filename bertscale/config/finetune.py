"""Sections of a fine-tuning config."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, field_validator

from bertscale.config.device import DEVICE, Device
from bertscale.config.section import Section
from bertscale.errors import UserError


class ExamplesConfig(Section):
    """Where the labelled text is."""

    train: str = Field(description="Training examples: jsonl with a text field and a label field.")
    test: str = Field(description="Held-out examples, in the same form.")
    text_field: str = Field("text", description="Name of the text field.")
    label_field: str = Field("label", description="Name of the label field.")


class EncodingConfig(Section):
    """How samples are made of examples."""

    max_length: int = Field(128, ge=8, description="Longest example in tokens; longer ones are cut.")


class ClassifierConfig(Section):
    """Which weights are trained, and which vector of a sample the classifier reads."""

    pooling: Literal["first", "mean"] = Field(
        "first", description="Vector of a sample: the pooled first token, as BERT, or the mean of all."
    )
    freeze_encoder: bool = Field(
        False, description="Train only the classifier, on the features of the unchanged encoder."
    )
    hidden_dropout_prob: float = Field(
        0.1, ge=0, lt=1, description="Dropout of hidden states during fine-tuning; attention has none."
    )


class FinetuneOptimizer(Section):
    """Settings of AdamW, whose learning rate rises linearly and then falls linearly."""

    learning_rate: float = Field(1e-4, gt=0, description="Highest learning rate, reached after warm-up.")
    random_learning_rate: float | None = Field(
        None, gt=0, description="Highest learning rate from random weights; by default learning_rate."
    )
    warmup_fraction: float = Field(0.1, ge=0, le=1, description="Share of the steps spent on warm-up.")
    weight_decay: float = Field(0.01, ge=0, description="Weight decay, decoupled; not on biases and norms.")


class FinetuneTraining(Section):
    """Length and number of the runs."""

    epochs: int = Field(10, ge=1, description="Number of passes over the training examples.")
    global_batch: int = Field(32, ge=1, description="Number of examples in one training step.")
    seeds: list[int] = Field(
        [0], min_length=1, description="Seeds, one run for each; mean and spread are reported."
    )
    compare_random: bool = Field(
        False, description="Also train the same encoder from random weights, for comparison."
    )

    @field_validator("seeds")
    @classmethod
    def _check_seeds(cls, seeds: list[int]) -> list[int]:
        if len(set(seeds)) < len(seeds):
            raise ValueError(f"{seeds} names a seed twice; give each seed once, for an honest spread")
        return seeds


class FinetuneConfig(Section):
    """Settings of a fine-tuning: an encoder and labelled text -> a classifier."""

    former_keys: ClassVar[dict[str, str]] = {
        "train": "data.train",
        "test": "data.test",
        "text_field": "data.text_field",
        "label_field": "data.label_field",
        "max_length": "samples.max_length",
        "pooling": "model.pooling",
        "freeze_encoder": "model.freeze_encoder",
        "dropout": "model.hidden_dropout_prob",
        "learning_rate": "optimizer.learning_rate",
        "random_learning_rate": "optimizer.random_learning_rate",
        "warmup_fraction": "optimizer.warmup_fraction",
        "weight_decay": "optimizer.weight_decay",
        "epochs": "train.epochs",
        "batch": "train.global_batch",
        "seeds": "train.seeds",
        "compare_random": "train.compare_random",
    }

    encoder: str = Field(description="Checkpoint folder, run folder or Hugging Face folder.")
    output: str = Field(description="Folder for the classifier, its metrics and predictions.")
    data: ExamplesConfig = Field(description="The labelled text.")
    device: Device = Field("auto", description=DEVICE)
    samples: EncodingConfig = Field(EncodingConfig(), description="The samples.")
    model: ClassifierConfig = Field(ClassifierConfig(), description="The classifier.")
    optimizer: FinetuneOptimizer = Field(
        FinetuneOptimizer(), description="The optimizer and its learning rate."
    )
    train: FinetuneTraining = Field(FinetuneTraining(), description="The runs.")

    def check_length(self, longest: int) -> None:
        """Raises UserError where examples are longer than the `longest` tokens that the encoder takes."""
        if self.samples.max_length > longest:
            raise UserError(
                f"samples.max_length={self.samples.max_length} is longer than the encoder {self.encoder} "
                f"takes: {longest} tokens (its max_position_embeddings)"
            )
