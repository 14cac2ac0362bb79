"""Encoder and task head, their losses, and the first values of a head: transformers' own, for every preset.

| kind                                    | transformers class        | its head on the encoder             |
| --------------------------------------- | ------------------------- | ----------------------------------- |
| classification, multi_label, regression | ForSequenceClassification | on one vector of each sample        |
| multiple_choice                         | ForMultipleChoice         | the same, one output                |
| tokens                                  | ForTokenClassification    | on every token                      |
| question_answering                      | ForQuestionAnswering      | on every token, two: begin, end     |

The prefix of the class is Bert, MegatronBert or ModernBert by preset, and Electra for a `bert` with a
generator. Dimensions: T tokens, S samples, E examples of multiple choice, H hidden size, C outputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bertscale.config import ModelConfig
from bertscale.config.examples import TaskKind
from bertscale.model.kernels import Packing
from bertscale.model.layers import Layers, Linear, derive_seed
from bertscale.model.model import Encoder

INITIALIZER_RANGE = 0.02  # of transformers, whatever the encoder was pretrained with
NO_TARGET = -100  # of a token that has no label
OF_TOKENS = ("tokens", "question_answering")  # kinds with logits of every token
SUMMARY_DROPOUT = 0.1  # of Electra's multiple choice, its `summary_last_dropout`


@dataclass(frozen=True)
class HeadConfig:
    """What is on the encoder: the kind of task and the number of outputs."""

    kind: TaskKind
    outputs: int  # C; 1 for regression and multiple_choice, 2 for question_answering
    pooling: Literal["cls", "mean"] = "cls"  # vector of a sample; mean for preset modern alone
    dropout: float | None = None  # by default that of transformers' class, see `head_dropout`


class TaskBatch(NamedTuple):
    """S samples laid end to end without padding, with their targets where these are known.

    `targets` are those of `bertscale.tasks.task.Samples`, as tensors of this micro-batch.
    """

    tokens: Tensor  # int64 [T]
    token_types: Tensor  # int64 [T]
    positions: Tensor  # int64 [T], 0, 1, ... within each sample
    lengths: tuple[int, ...]  # S lengths in tokens, on the host
    targets: Tensor | None = None  # int64 or float32
    groups: tuple[int, ...] | None = None  # multiple_choice: samples of each of the E examples, on the host

    def to(self, device: torch.device | str) -> TaskBatch:
        """The micro-batch on `device`; from pinned memory the copy runs beside the computation."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> TaskBatch:
        """The micro-batch in page-locked memory; needs CUDA."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, change: Callable[[Tensor], Tensor]) -> TaskBatch:
        values = (change(value) if isinstance(value, Tensor) else value for value in self)
        return TaskBatch._make(values)


class TaskModel(nn.Module):
    """Encoder with the head of a task: a micro-batch -> logits, float32 [S, C] or, of tokens, [T, C]."""

    def __init__(
        self,
        config: ModelConfig,
        vocab_size: int,
        head: HeadConfig,
        layers: Layers | None = None,
        recompute: str = "none",
    ) -> None:
        super().__init__()
        self.config, self.vocab_size, self.head_config = config, vocab_size, head
        self.encoder = Encoder(config, vocab_size, layers or Layers(), has_pooler(config, head), recompute)
        self.head = TaskHead(config, head)

    def forward(self, batch: TaskBatch) -> Tensor:
        hidden, pooled = self.encoder(batch.tokens, batch.token_types, batch.positions, batch.lengths)
        if self.head_config.kind not in OF_TOKENS:
            hidden = pooled if pooled is not None else self.vectors(hidden, batch.lengths)
        logits: Tensor = self.head(hidden)
        return logits.float()

    def vectors(self, hidden: Tensor, lengths: Sequence[int]) -> Tensor:
        """One vector of each sample, without a pooler: [T, H] -> [S, H]."""
        starts = Packing.of(lengths, hidden.device).starts
        if self.head_config.pooling == "cls":
            return hidden.index_select(0, starts[:-1])
        counts = starts.diff()
        return (_reduce(hidden.float(), "sum", counts) / counts[:, None]).to(hidden.dtype)


class TaskHead(nn.Module):
    """Vectors [N, H] -> logits [N, C]: one dense layer, or two with GELU and perhaps a norm between them."""

    def __init__(self, config: ModelConfig, head: HeadConfig) -> None:
        super().__init__()
        family, width = head_family(config), config.hidden_size
        of_samples = head.kind not in OF_TOKENS
        modern, electra = family == "modern", family == "electra" and of_samples
        self.dense = Linear(width, width, config.biases) if modern or electra else None
        self.LayerNorm: nn.Module | None = None
        if modern:
            self.LayerNorm = nn.LayerNorm(width, config.layer_norm_eps, bias=config.biases)
        self.dropout = nn.Dropout(head_dropout(config, head))
        self.drops_twice = electra and head.kind != "multiple_choice"
        self.output = Linear(width, head.outputs)

    def forward(self, vectors: Tensor) -> Tensor:
        if self.drops_twice:
            vectors = self.dropout(vectors)
        if self.dense is not None:
            vectors = F.gelu(self.dense(vectors))
        if self.LayerNorm is not None:
            vectors = self.LayerNorm(vectors)
        logits: Tensor = self.output(self.dropout(vectors))
        return logits


def head_family(config: ModelConfig) -> str:
    """Names the classes of transformers whose heads an encoder has: its preset, or `electra`."""
    return "electra" if config.preset == "bert" and config.generator_size is not None else config.preset


def has_pooler(config: ModelConfig, head: HeadConfig) -> bool:
    """Tells whether the head reads a dense layer and tanh on the first token, as Bert's for samples do."""
    return head_family(config) in ("bert", "megatron-bert") and head.kind not in OF_TOKENS


def head_dropout(config: ModelConfig, head: HeadConfig) -> float:
    """Returns the probability of dropout in the head: the one given, or that of transformers' class.

    Bert, MegatronBert and Electra take that of hidden states, except for none in question answering and
    0.1 in Electra's multiple choice; ModernBert has none.
    """
    if head.dropout is not None:
        return head.dropout
    family = head_family(config)
    if family == "modern" or head.kind == "question_answering":
        return 0.0
    if family == "electra" and head.kind == "multiple_choice":
        return SUMMARY_DROPOUT
    return config.hidden_dropout_prob


def head_initial_value(name: str, shape: Sequence[int], config: ModelConfig, seed: int) -> Tensor:
    """The first value (float32, on the CPU) of a parameter of a new head, or of a pooler that is missing.

    | parameter       | bert, megatron-bert, electra | modern, cut at initializer_cutoff_factor deviations   |
    | --------------- | ---------------------------- | ----------------------------------------------------- |
    | biases          | 0                            | 0                                                     |
    | LayerNorm       |                              | 1                                                     |
    | head.dense      | normal(0, 0.02)              | normal(0, 0.02 / sqrt(2 num_hidden_layers))           |
    | head.output     | normal(0, 0.02)              | normal(0, 1 / sqrt(hidden_size))                      |
    | encoder.pooler  | normal(0, 0.02)              |                                                       |

    As transformers draws them, with its own range in place of what the encoder began with. It depends on
    name, shape, config and seed alone, so that every topology starts from the same weights.
    """
    if name.endswith("bias"):
        return torch.zeros(*shape)
    if "LayerNorm" in name:
        return torch.ones(*shape)
    generator = torch.Generator().manual_seed(derive_seed(seed, name))
    value = torch.empty(*shape)
    if config.preset != "modern":
        return value.normal_(0.0, INITIALIZER_RANGE, generator=generator)
    deviation = INITIALIZER_RANGE / math.sqrt(2 * config.num_hidden_layers)
    if name.startswith("head.output."):
        deviation = config.hidden_size**-0.5
    limit = config.initializer_cutoff_factor * deviation
    return nn.init.trunc_normal_(value, 0.0, deviation, -limit, limit, generator=generator)


# ------------------------------------------------------------------------------------------------ losses


def task_loss(
    kind: TaskKind,
    logits: Tensor,
    batch: TaskBatch,
    *,
    class_weights: Tensor | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """The sum of the losses of a micro-batch, float32; divided by `loss_count` of a whole global batch it is
    the mean of transformers' class.

    `class_weights` [C]: of classification, multi_label and tokens, how much each label counts. Smoothing
    gives this share of the probability to all labels alike, of an answer to all tokens of its sample, of
    multiple choice to all options; regression has none.
    """
    targets = batch.targets
    assert targets is not None
    if kind in ("classification", "tokens"):
        return F.cross_entropy(
            logits,
            targets,
            class_weights,
            ignore_index=NO_TARGET,
            reduction="sum",
            label_smoothing=label_smoothing,
        )
    if kind == "multi_label":
        smooth = targets * (1 - label_smoothing) + label_smoothing / 2
        return F.binary_cross_entropy_with_logits(logits, smooth, class_weights, reduction="sum")
    if kind == "regression":
        return F.mse_loss(logits[:, 0], targets, reduction="sum")
    if kind == "multiple_choice":
        assert batch.groups is not None
        return _choice_loss(logits, targets[:, None], batch.groups, label_smoothing)
    return _choice_loss(logits, targets, batch.lengths, label_smoothing) / 2


def loss_count(kind: TaskKind, targets: Tensor, class_weights: Tensor | None = None) -> float:
    """What sums of losses with these targets are divided by; both are on the host.

    Samples (examples of multiple choice), tokens that have a label, or for multi_label each label of each
    sample; with class weights the sum of the weights of these labels.
    """
    if kind == "multi_label":
        of_sample = targets.shape[1] if class_weights is None else float(class_weights.sum())
        return len(targets) * of_sample
    if kind == "tokens":
        targets = targets[targets != NO_TARGET]
    if class_weights is None or kind not in ("classification", "tokens"):
        return float(len(targets))
    return float(class_weights[targets].sum())


def _choice_loss(logits: Tensor, targets: Tensor, lengths: Sequence[int], smoothing: float) -> Tensor:
    """Sum of the cross-entropies of one choice in each segment, by each column of logits [N, C].

    `lengths` [S] are those of the segments, together N; targets [S, C] count from the segment's begin. Sums
    over segments are in a fixed order on every device, so that a resumed run repeats them exactly.
    """
    starts = Packing.of(lengths, logits.device).starts
    counts, begins = starts.diff(), starts[:-1].long()
    highest = _reduce(logits.detach(), "max", counts)  # [S, C]
    each = torch.repeat_interleave(counts, output_size=len(logits))  # [N], number of the segment
    total = highest + _reduce((logits - highest[each]).exp(), "sum", counts).log()
    chosen = logits.gather(0, begins[:, None] + targets)
    if smoothing:
        mean = _reduce(logits, "sum", counts) / counts[:, None]
        chosen = (1 - smoothing) * chosen + smoothing * mean
    return (total - chosen).sum()


def _reduce(values: Tensor, how: str, counts: Tensor) -> Tensor:
    """Reduces each segment of `counts` [S] rows to one: [N, C] -> [S, C]."""
    # Unsafe: it does not wait for the device to check the counts.
    return torch.segment_reduce(values, how, lengths=counts.long(), axis=0, unsafe=True)
