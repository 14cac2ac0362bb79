"""How much memory a rank of a pretraining takes, estimated before anything is queued.

    estimate = estimate_memory(config, vocab_size=32_768, ranks=32, gpu=True)
    print(estimate)    # 9.1 GB (weights 0.25, gradients 0.22, optimizer 0.11, activations 6.02, base 2.50)

With N parameters on a rank (those that tensor parallelism shards divided by its degree t), D data-parallel
ranks, w bytes for a number (2 in bfloat16, 4 in float32), bytes are, after Rajbhandari et al. (2020):

    ZeRO stage       0            1            2            3
    weights          w N          w N          w N          w N / D + the two largest modules, gathered
    gradients        w N          w N          w N / D      w N / D
    optimizer        12 N         16 N / D     16 N / D     16 N / D

16: a float32 copy of the weights, two moments, and the float32 gradient of a step. Stage 0 in float32 needs
no copy: 8 N. StableAdamW takes 4 N more while it updates.

Activations of T tokens (micro_tokens, or micro_batch x max_length), H wide, I inside the feed-forward part,
in L layers (Korthikanti et al. 2022, without attention scores, which are never stored whole), V rows of
vocabulary and P predicted positions, T x samples.mask_rate or with objectives.clm all, but never more than
4,096 at a time (1,024 on a CPU):

    w / 2 x T x L x (10 H + (8 H + 4 I) / t)  +  V / t x (P (2 w + 4) + H (w + 4))  +  3 w T H

8 I instead of 4 I where the feed-forward part is gated; with train.activation_checkpointing=full, L layers
count for one of them and their inputs, w T L H. A generator adds its own layers and 6 w T H for the second
pass through the embeddings and the detector; objectives.clm adds 5 w T H in the head.

To this comes what a process takes before it holds a weight: 2.5 GB on a GPU (CUDA's context, NCCL,
DeepSpeed's buckets), 0.7 GB on a CPU. Samples shorter than max_length take less: nothing is padded.
"""

from __future__ import annotations

from dataclasses import dataclass

from bertscale.config import GPU_POSITIONS, POSITIONS, ModelConfig, PretrainConfig, padded_vocab_size

GPU_BASE, CPU_BASE = 2.5e9, 0.7e9  # bytes of a process without a model
CHECKPOINT_BYTES = 12  # of a parameter in a checkpoint: weight and two moments in float32


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank, by what they are for."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    base: float

    @property
    def total(self) -> float:
        return float(sum(vars(self).values()))

    def __str__(self) -> str:
        parts = ", ".join(f"{part} {size / 1e9:.2f}" for part, size in vars(self).items())
        return f"{gb(self.total)} ({parts})"


def gb(size: float) -> str:
    """Bytes as `12.3 GB`; a GB is 1e9 bytes."""
    return f"{size / 1e9:,.1f} GB"


def count_parameters(model: ModelConfig, vocab_size: int) -> tuple[int, int]:
    """Returns (parameters that every tensor-parallel rank holds, those that are sharded), in one process."""
    hidden, small = model.hidden_size, model.generator
    rows, biases = padded_vocab_size(vocab_size), int(model.biases)
    everywhere, sharded = _count_layers(model)
    sharded += rows * (hidden + 1)  # word embedding, which is the decoder's too, and the decoder's bias
    if not model.rotary:
        everywhere += (model.max_position_embeddings + model.type_vocab_size) * hidden
    if model.embedding_norm:
        everywhere += (1 + biases) * hidden  # LayerNorm of the embeddings
    guesser = (small or model).hidden_size
    everywhere += (guesser + 1 + 2 * biases) * hidden  # the head's dense layer and LayerNorm
    if model.sentence_head:
        everywhere += (hidden + 1) * hidden + 2 * (hidden + 1)  # pooler and the head of pairs
    if small is not None:
        of_generator, sharded_of_generator = _count_layers(small)
        everywhere += of_generator + (hidden + biases) * hidden + hidden + 1  # the detector
        everywhere += (hidden + 1) * guesser if guesser != hidden else 0  # projection of the embeddings
        sharded += sharded_of_generator
    return everywhere, sharded


def _count_layers(model: ModelConfig) -> tuple[int, int]:
    """Likewise, of the layers and the LayerNorm at their end."""
    hidden, inside, layers = model.hidden_size, model.intermediate_size, model.num_hidden_layers
    # query, key, value; attention's output; the feed-forward matrices, three where it is gated
    sharded = layers * (4 * hidden * hidden + (3 if model.gated else 2) * hidden * inside)
    norms = 2 * layers
    if model.pre_norm:  # one at the end; with a norm of the embeddings the first layer has one less
        norms += 1 - int(model.embedding_norm)
    everywhere = norms * (1 + int(model.biases)) * hidden
    if model.biases:
        sharded += layers * (3 * hidden + (2 if model.gated else 1) * inside)  # of column-parallel matrices
        everywhere += layers * 2 * hidden  # of row-parallel ones
    return everywhere, sharded


def checkpoint_bytes(model: ModelConfig, vocab_size: int, average: bool = False) -> int:
    """Size of one checkpoint; `average`: with a moving average of the weights."""
    return (CHECKPOINT_BYTES + 4 * average) * sum(count_parameters(model, vocab_size))


def estimate_memory(config: PretrainConfig, vocab_size: int, ranks: int, gpu: bool) -> Memory:
    """Memory of each of `ranks` ranks; precision `auto` counts as float32 on a CPU, which is the more."""
    model, stage, degree = config.model, config.parallel.zero_stage, config.parallel.tensor
    data = max(1, ranks // degree)
    precision = config.train.precision
    wide = precision == "float32" or (precision == "auto" and not gpu)
    width = 4 if wide else 2
    everywhere, sharded = count_parameters(model, vocab_size)
    parameters = everywhere + sharded / degree

    hidden, inside = model.hidden_size, model.intermediate_size
    rows = padded_vocab_size(vocab_size)
    weights = width * parameters
    if stage == 3:
        feed_forward = (3 if model.gated else 2) * hidden * inside
        matrices = [rows * hidden, *[4 * hidden * hidden, feed_forward] * model.num_hidden_layers]
        weights = weights / data + width * sum(sorted(matrices)[-2:]) / degree
    gradients = width * parameters / (data if stage >= 2 else 1)
    updated = parameters / (data if stage else 1)  # what this rank updates
    optimizer = (16 if stage else 8 if wide else 12) * updated
    if config.optimizer.name == "stable-adamw":
        optimizer += 4 * updated
    if config.train.average:
        optimizer += 4 * updated

    tokens = config.train.micro_tokens or config.train.micro_batch * config.samples.max_length
    causal = config.objectives.clm > 0
    predicted = tokens if causal else tokens * config.samples.mask_rate
    positions = min(predicted, GPU_POSITIONS if gpu else POSITIONS)
    head = rows / degree * (positions * (2 * width + 4) + hidden * (width + 4))
    recomputed = config.train.activation_checkpointing == "full"
    a_token = _kept(model, width, degree, recomputed) + (8 if causal else 3) * width * hidden
    if model.generator is not None:
        a_token += _kept(model.generator, width, degree, recomputed) + 6 * width * hidden
    activations = tokens * a_token + head
    return Memory(weights, gradients, optimizer, activations, GPU_BASE if gpu else CPU_BASE)


def _kept(model: ModelConfig, width: int, degree: int, recomputed: bool) -> float:
    """Bytes of activations that the layers keep of one token, in numbers of `width` bytes."""
    hidden, inside = model.hidden_size, model.intermediate_size
    widths = 8 if model.gated else 4  # gated, both halves and their product are kept
    layer = width / 2 * (10 * hidden + (8 * hidden + widths * inside) / degree)
    if recomputed:  # a layer's input is kept; one layer is recomputed
        return model.num_hidden_layers * width * hidden + layer
    return model.num_hidden_layers * layer


def what_would_fit(
    config: PretrainConfig, vocab_size: int, ranks: int, gpu: bool, limit: float
) -> str | None:
    """The least change of micro-batch or ZeRO stage that brings the estimate within `limit` bytes."""
    train, stage = config.train, config.parallel.zero_stage
    if train.micro_tokens is None:
        key, size = "micro_batch", train.micro_batch
        sizes = [smaller for smaller in range(size, 0, -1) if size % smaller == 0]
    else:
        key, size, least = "micro_tokens", train.micro_tokens, config.samples.max_length
        sizes = [size >> halved for halved in range(size.bit_length()) if size >> halved > least] + [least]
    for smaller in sizes:
        for higher in range(stage, 4):
            changed = config.model_copy(
                update={
                    "train": train.model_copy(update={key: smaller}),
                    "parallel": config.parallel.model_copy(update={"zero_stage": higher}),
                }
            )
            if estimate_memory(changed, vocab_size, ranks, gpu).total <= limit:
                words = [f"parallel.zero_stage={higher}"] if higher != stage else []
                return " ".join(words + ([f"train.{key}={smaller}"] if smaller != size else []))
    return None
