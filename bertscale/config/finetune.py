"""Fine-tuning."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from bertscale.config.section import Section


class FinetuneConfig(Section):
    """An encoder and labelled text -> a classifier."""

    encoder: str = Field(description="Checkpoint folder, run folder or Hugging Face folder.")
    train: str = Field(description="Training examples, jsonl with a text and a label field.")
    test: str = Field(description="Held-out examples, same form.")
    output: str = Field(description="Folder for the classifier, its metrics and predictions.")
    text_field: str = Field("text", description="Name of the text field.")
    label_field: str = Field("label", description="Name of the label field.")
    max_length: int = Field(128, ge=8, description="Longest example in tokens; longer ones are cut.")
    epochs: int = Field(10, ge=1, description="Passes over the training examples.")
    batch: int = Field(32, ge=1, description="Examples in one step.")
    learning_rate: float = Field(1e-4, gt=0, description="Highest learning rate.")
    warmup_fraction: float = Field(0.1, ge=0, le=1, description="Share of the steps spent on warm-up.")
    weight_decay: float = Field(0.01, ge=0, description="Decoupled; not on biases and LayerNorms.")
    pooling: Literal["first", "mean"] = Field(
        "first", description="A sample's vector: the pooled first token, as BERT, or the mean of all tokens."
    )
    freeze_encoder: bool = Field(
        False, description="Trains the classifier alone, on the encoder's features as they are."
    )
    dropout: float = Field(0.1, ge=0, lt=1, description="Dropout of hidden states while fine-tuning.")
    seeds: list[int] = Field([0], min_length=1, description="One run for each; mean and spread are reported.")
    compare_random: bool = Field(
        False, description="Also trains the same encoder from random weights, side by side."
    )
    random_learning_rate: float | None = Field(
        None, gt=0, description="Highest learning rate from random weights; without it the same."
    )

    @field_validator("seeds")
    @classmethod
    def _check_seeds(cls, seeds: list[int]) -> list[int]:
        if len(set(seeds)) < len(seeds):
            raise ValueError(f"{seeds} names a seed twice, which would feign a small spread")
        return seeds
