"""Sections of a fine-tuning config."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from bertscale.config.device import DEVICE, Device
from bertscale.config.examples import EncodingConfig, ExamplesConfig, TaskKind
from bertscale.config.model import ModelConfig
from bertscale.config.pretrain import (
    LaunchConfig,
    OptimizerConfig,
    ParallelConfig,
    PretrainConfig,
    check_tensor_degree,
    compile_obstacle,
    is_compiled,
)
from bertscale.config.section import Section, check_config, read_values
from bertscale.errors import UserError


class HeadConfig(Section):
    """The head, dropout, and which weights are trained."""

    pooling: Literal["cls", "mean"] | None = Field(
        None,
        description="Vector of a sample: its first token, or the mean of all (only for modern); by default "
        "the encoder's own, else cls.",
    )
    freeze_layers: int | Literal["all"] = Field(
        0,
        description="Number of lowest layers whose weights, and the embeddings', stay; all: the head alone "
        "is trained.",
    )
    hidden_dropout_prob: float = Field(0.1, ge=0, lt=1, description="Dropout of hidden states.")
    attention_probs_dropout_prob: float = Field(
        0.0, ge=0, lt=1, description="Dropout of attention, which makes it slower."
    )
    classifier_dropout: float | None = Field(
        None, ge=0, lt=1, description="Dropout before the head's last layer; by default hidden_dropout_prob."
    )
    class_weights: Literal["balanced"] | dict[str, float] | None = Field(
        None,
        description="Weight of each label in the loss, by default 1; balanced: larger for rarer labels.",
    )
    label_smoothing: float = Field(
        0.0, ge=0, lt=1, description="Share of the target that is spread over all labels."
    )


class FinetuneOptimizer(OptimizerConfig):
    """The optimizer and its learning-rate schedule, and what differs between parts of the model."""

    learning_rate: float = Field(5e-5, gt=0, description="Highest learning rate, reached after warm-up.")
    beta2: float = Field(0.999, ge=0, lt=1, description="Decay of the second moment.")
    head_learning_rate: float | None = Field(
        None, gt=0, description="Highest learning rate of the head; by default learning_rate."
    )
    random_learning_rate: float | None = Field(
        None, gt=0, description="Highest learning rate from random weights; by default learning_rate."
    )
    layer_decay: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Factor between the learning rates of a layer and of the next lower one; below 1, lower "
        "layers change less.",
    )


class FinetuneTraining(Section):
    """Length, batches and number of the runs. The budget is exactly one of `epochs`, `steps` and `hours`."""

    epochs: float | None = Field(None, gt=0, description="Budget in passes over the training examples.")
    steps: int | None = Field(None, ge=1, description="Budget in training steps.")
    hours: float | None = Field(
        None, gt=0, description="Budget of each run in hours; such a run is not repeatable bit for bit."
    )
    global_batch: int = Field(32, ge=1, description="Number of examples in one training step.")
    micro_tokens: int = Field(
        16384,
        ge=8,
        description="Most tokens in one forward pass of one rank; a step has as many as it needs.",
    )
    seeds: list[int] = Field(
        [0], min_length=1, description="Seeds, one run for each; mean and spread are reported."
    )
    compare_random: bool = Field(
        False, description="Also train the same encoder from random weights, for comparison."
    )
    metric: str | None = Field(
        None,
        description="Figure of dev that chooses the checkpoint, higher is better; by default the task's.",
    )
    eval_every: int | None = Field(
        None, ge=1, description="Steps between two evaluations on dev (and at the end); by default an epoch."
    )
    patience: int | None = Field(
        None, ge=1, description="Evaluations in a row without a better figure after which a run ends."
    )
    precision: Literal["auto", "bfloat16", "float32"] = Field(
        "auto", description="Precision; auto: bfloat16 where the device has it natively, else float32."
    )
    activation_checkpointing: Literal["none", "selective", "full"] = Field(
        "none",
        description="Recompute activations in the backward pass, to save memory: of attention (selective) or "
        "of whole layers (full).",
    )
    compile: Literal["auto", True, False] = Field(
        "auto",
        description="Compile each layer with torch.compile; auto: on GPUs, if no other setting prevents it.",
    )
    log_every: int = Field(10, ge=1, description="Steps between two log points.")
    save_every: int | None = Field(
        None,
        ge=1,
        description="Steps between checkpoints to resume from; by default at evaluations, a minute apart.",
    )
    keep_checkpoints: int = Field(1, ge=1, description="Number of newest checkpoints that are kept.")

    @property
    def micro_samples(self) -> None:
        """Is None: a micro-batch is limited by its tokens."""
        return None

    @field_validator("seeds")
    @classmethod
    def _check_seeds(cls, seeds: list[int]) -> list[int]:
        if len(set(seeds)) < len(seeds):
            raise ValueError(f"{seeds} names a seed twice; give each seed once, for an honest spread")
        if min(seeds) < 0:
            raise ValueError(f"{seeds}: a seed is 0 or more")
        return seeds

    @model_validator(mode="before")
    @classmethod
    def _default_budget(cls, values: Any) -> Any:
        if isinstance(values, dict) and all(values.get(key) is None for key in ("epochs", "steps", "hours")):
            return {**values, "epochs": 3.0}
        return values

    @model_validator(mode="after")
    def _check(self) -> FinetuneTraining:
        given = [f"{key}={value}" for key in ("epochs", "steps", "hours") if (value := getattr(self, key))]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)}: give one of epochs, steps and hours")
        return self


class FinetuneConfig(Section):
    """Settings of a fine-tuning: an encoder and labelled examples -> a task model."""

    former_keys: ClassVar[dict[str, str]] = {
        "train": "data.train",
        "test": "data.test",
        "text_field": "data.text",
        "label_field": "data.label",
        "max_length": "samples.max_length",
        "pooling": "model.pooling",
        "freeze_encoder": "model.freeze_layers",
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

    task: TaskKind = Field(
        "classification",
        description="Kind of task: classification of a text or a pair, multi_label, regression, tokens (NER, "
        "POS), question_answering or multiple_choice.",
    )
    encoder: str | None = Field(
        None, description="Checkpoint folder, run folder or Hugging Face folder to start from."
    )
    init: str | None = Field(
        None,
        description="In place of encoder, a task model to start from: the output of another fine-tuning, or "
        "its folder `model`; its head is kept where the labels are the same.",
    )
    output: str = Field(description="Folder for the task model, its metrics and predictions.")
    data: ExamplesConfig = Field(description="The labelled examples.")
    device: Device = Field("auto", description=DEVICE)
    samples: EncodingConfig = Field(EncodingConfig(), description="The samples.")
    model: HeadConfig = Field(HeadConfig(), description="The head and dropout.")
    optimizer: FinetuneOptimizer = Field(
        FinetuneOptimizer(), description="The optimizer and its learning rate."
    )
    train: FinetuneTraining = Field(FinetuneTraining(), description="The runs.")
    parallel: ParallelConfig = Field(ParallelConfig(zero_stage=0), description="The ranks.")
    launch: LaunchConfig = Field(LaunchConfig(), description="Restarts of failed ranks.")

    @property
    def source(self) -> str:
        """Names the folder to start from, `encoder` or `init`."""
        return self.encoder or self.init or ""

    @property
    def compile_obstacle(self) -> str | None:
        """Names the setting that keeps layers from being compiled, and the reason; None if they can be."""
        return compile_obstacle(self.train.activation_checkpointing, self.parallel)

    def compiles(self, device: str) -> bool:
        """Tells whether layers are compiled on a `cuda` or `cpu` device; `auto`: on a GPU, if they can be."""
        return is_compiled(self.train.compile, self.compile_obstacle, device)

    def check_encoder(self, model: ModelConfig) -> None:
        """Raises UserError where the settings do not fit an encoder of this shape."""
        if self.samples.max_length > model.max_position_embeddings:
            raise UserError(
                f"samples.max_length={self.samples.max_length} is longer than the encoder {self.source} "
                f"takes: {model.max_position_embeddings} tokens (its max_position_embeddings)"
            )
        if self.model.pooling == "mean" and model.preset != "modern":
            raise UserError(
                f"model.pooling=mean is for preset modern; the encoder {self.source} is {model.preset}, "
                "whose class in transformers reads the first token: take cls"
            )
        frozen = self.model.freeze_layers
        if frozen != "all" and not 0 <= frozen <= model.num_hidden_layers:
            raise UserError(
                f"model.freeze_layers={frozen}, and the encoder {self.source} has "
                f"{model.num_hidden_layers} layers; take at most these, or all"
            )
        try:
            check_tensor_degree(self.parallel.tensor, [("the encoder's ", model)])
        except ValueError as error:
            raise UserError(str(error)) from error

    @field_validator("parallel", mode="before")
    @classmethod
    def _stage(cls, values: Any) -> Any:
        # What a task model needs fits a GPU: without ZeRO nothing waits for anything.
        return {"zero_stage": 0, **values} if isinstance(values, dict) else values

    @model_validator(mode="after")
    def _check(self) -> FinetuneConfig:
        if (self.encoder is None) == (self.init is None):
            both = "and not both" if self.encoder else "give one of them"
            raise ValueError(f"a run starts from encoder or from init, {both}")
        if self.train.compile is True and self.compile_obstacle:
            raise ValueError(
                f"train.compile=true does not go with {self.compile_obstacle}; take auto or false"
            )
        if self.train.micro_tokens < self.samples.max_length:
            raise ValueError(
                f"train.micro_tokens={self.train.micro_tokens} is less than one sample of "
                f"samples.max_length={self.samples.max_length}"
            )
        if self.model.freeze_layers != 0 and self.parallel.zero_stage == 3:
            raise ValueError(
                f"model.freeze_layers={self.model.freeze_layers} does not go with parallel.zero_stage=3, "
                "which shards all weights as it trains them; take a stage of 0 to 2"
            )
        chooses = self.data.dev is not None or self.data.dev_share > 0
        for key in ("patience", "metric"):
            if getattr(self.train, key) is not None and not chooses:
                raise ValueError(
                    f"train.{key}={getattr(self.train, key)} looks at dev examples; give data.dev or "
                    "data.dev_share"
                )
        return self


def load_tasks(config: PretrainConfig) -> dict[str, FinetuneConfig]:
    """The tasks of a pretraining (train.tasks), by name, checked; `encoder` and `output` are put in later.

    Raises UserError with the mistakes of all.
    """
    tasks, mistakes = {}, []
    for file in config.train.tasks:
        try:
            values, origin = read_values(file)
            values |= {"encoder": config.run, "output": config.run}
            task = tasks[Path(file).stem] = check_config(FinetuneConfig, values, origin)
            if task.data.dev is None and not task.data.dev_share:
                raise UserError(f"{origin}: there is no dev to follow; give data.dev or data.dev_share")
        except UserError as error:
            mistakes += [f"train.tasks: {line}" for line in str(error).splitlines()]
    if mistakes:
        raise UserError("\n".join(mistakes))
    return tasks
