"""Times training steps: random batches, our step and transformers' on the same samples, a step's parts.

For `bertscale bench` and benchmarks/; the training loop itself is in `pretrain`.

Dimensions: T tokens of a micro-batch, R rows of a padded one, L tokens of its longest row.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Generator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bertscale.bench.machine import processor
from bertscale.config import ModelConfig, PretrainConfig, UserError
from bertscale.convert.hf_names import hugging_face_config, to_hugging_face
from bertscale.convert.model_shape import native_shapes
from bertscale.data.loader import balance
from bertscale.data.micro_batch import MicroBatch
from bertscale.model.model import initial_value
from bertscale.optim.groups import adamw
from bertscale.train.device import describe, synchronize
from bertscale.train.engine import Engine
from bertscale.train.objectives import Counts, training_loss
from bertscale.train.parallel import Ranks
from bertscale.train.step import train_step

PARTS = ("data wait", "forward", "backward", "optimizer")
LEARNING_RATE = 1e-5  # low enough for any config's weights to stay finite without a warm-up
# Number of pieces of the published vocabularies, for random ids where there is no tokenizer.
PUBLISHED_VOCAB = {"bert": 30_522, "megatron-bert": 30_522, "modern": 50_368}
MASK_ID, FIRST_ID = 4, 5  # of random ids
RANDOM_STEPS = 8  # steps of random batches, which repeat

Step = Callable[[Sequence[Any]], Tensor]  # micro-batches of one global step -> its mean loss, on the device


class Stopwatch:
    """Measures the seconds of each part of the steps between `restart` and `seconds`.

    On a CPU it reads the clock. On a GPU it records events in the stream, so that the host runs ahead as it
    does in training: a wait for data counts only while the device is idle.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.marks: list[tuple[str, Any]] = []

    def restart(self) -> None:
        self.marks = [("", self._now())]

    def mark(self, part: str) -> None:
        """Says that what happened since the last mark belongs to `part`."""
        self.marks.append((part, self._now()))

    def seconds(self) -> dict[str, float]:
        """Returns the seconds of each part, in all steps together. Waits for the device."""
        synchronize(self.device)
        totals = dict.fromkeys(PARTS, 0.0)
        for (_, before), (part, after) in zip(self.marks, self.marks[1:], strict=False):
            totals[part] += before.elapsed_time(after) / 1e3 if self.device.type == "cuda" else after - before
        return totals

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event


# ------------------------------------------------------------------------------------------------ batches


class RandomBatches:
    """Makes micro-batches of random ids, in place of the loader where there is no data.

    Samples of kind `packed` are one sequence of samples.max_length tokens each. Lengths of other kinds are
    spread evenly between a quarter of that and all of it, and one sample of each step has all of it. A few
    steps are made at the start and repeated, in pinned memory if there is CUDA.
    """

    def __init__(self, config: PretrainConfig, vocab_size: int, ranks: Ranks) -> None:
        self.config, self.vocab_size, self.ranks = config, vocab_size, ranks
        self.steps = [self._step(number) for number in range(RANDOM_STEPS)]

    def iterate(self, start: int, stop: int) -> Generator[tuple[int, list[MicroBatch]], None, None]:
        """Yields (k, micro-batches of step k) for k = start .. stop - 1, as the loader does."""
        for step in range(start, stop):
            yield step, self.steps[step % RANDOM_STEPS]

    def _step(self, number: int) -> list[MicroBatch]:
        train, samples, ranks = self.config.train, self.config.samples, self.ranks
        shared = np.random.default_rng([train.seed, number])
        longest = samples.max_length
        shortest = longest if samples.kind == "packed" else max(8, longest // 4)
        sizes = shared.integers(shortest, longest + 1, train.global_batch)
        sizes[0] = longest
        if train.micro_tokens:
            bins = balance(sizes, train.micro_tokens, ranks.data)
            parts = [sizes[bins == number] for number in range(ranks.data_rank, bins.max() + 1, ranks.data)]
        else:
            of_this_rank = np.sort(sizes.reshape(ranks.data, -1)[ranks.data_rank])
            parts = list(of_this_rank.reshape(-1, train.micro_batch))
        # The same draws on tensor-parallel peers.
        draw = np.random.default_rng([train.seed, number, ranks.data_rank])
        batches = [self._batch(draw, np.sort(part)) for part in parts]
        return [batch.pin_memory() for batch in batches] if torch.cuda.is_available() else batches

    def _batch(self, draw: np.random.Generator, lengths: Any) -> MicroBatch:
        total = int(lengths.sum())
        starts = np.repeat(np.cumsum(lengths) - lengths, lengths)
        positions = np.arange(total) - starts
        pairs = self.config.samples.has_pairs
        types = (positions >= np.repeat(lengths // 2, lengths)) if pairs else np.zeros(total)
        tokens = draw.integers(FIRST_ID, self.vocab_size, total)
        causal = self.config.objectives.clm > 0
        if causal:
            places = np.delete(np.arange(total), np.cumsum(lengths) - 1)
            targets = tokens[places + 1]
        else:
            places = np.flatnonzero(draw.random(total) < self.config.samples.mask_rate)
            places = places if len(places) else np.array([total // 2])
            targets = tokens[places]
            tokens[places] = MASK_ID
        flat = [torch.from_numpy(ids.astype(np.int64)) for ids in (tokens, types, positions, places, targets)]
        return MicroBatch(
            tokens=flat[0],
            token_types=flat[1],
            positions=flat[2],
            lengths=tuple(lengths.tolist()),
            target_positions=flat[3],
            targets=flat[4],
            num_targets=len(places),
            next_sentence_label=torch.arange(len(lengths)) & 1 if pairs else None,
            uniforms=torch.from_numpy(draw.random(len(places))) if self.config.model.generator else None,
            causal=causal,
        )


def row_lengths(batch: MicroBatch, config: PretrainConfig) -> Sequence[int]:
    """Returns the lengths of the rows that a collator would make of the batch: those of its samples.

    The sequences of packed samples fill rows of samples.max_length tokens, one after another.
    """
    if config.samples.kind != "packed":
        return batch.lengths
    rows: list[int] = []
    for length in batch.lengths:
        if rows and rows[-1] + length <= config.samples.max_length:
            rows[-1] += length
        else:
            rows.append(length)
    return rows


def padded(batch: MicroBatch, rows: Sequence[int]) -> dict[str, Tensor]:
    """Pads the batch as a collator does for transformers' classes: [R, L] each, labels -100 where nothing is
    predicted; `next_sentence_label` [R] where there are pairs."""
    labels = torch.full_like(batch.tokens, -100)
    real = slice(batch.num_targets)
    labels[batch.target_positions[real]] = batch.targets[real]

    def pad(flat: Tensor, fill: int) -> Tensor:  # [T] -> [R, L]
        sequences = list(torch.split(flat, list(rows)))
        return nn.utils.rnn.pad_sequence(sequences, batch_first=True, padding_value=fill)

    values = {
        "input_ids": pad(batch.tokens, 0),
        "token_type_ids": pad(batch.token_types, 0),
        "attention_mask": pad(torch.ones_like(batch.tokens), 0),
        "labels": pad(labels, -100),
    }
    if batch.next_sentence_label is not None:
        values["next_sentence_label"] = batch.next_sentence_label
    if torch.cuda.is_available():
        values = {name: value.pin_memory() for name, value in values.items()}
    return values


# -------------------------------------------------------------------------------------------------- steps


def our_step(engine: Engine[PretrainConfig], watch: Stopwatch) -> Step:
    """Returns a step as `bertscale pretrain` makes it, on micro-batches of this rank."""

    def step(micro_batches: Sequence[MicroBatch]) -> Tensor:
        masked, tokens = engine.ranks.sum_over_data(
            sum(batch.num_targets for batch in micro_batches),
            sum(len(batch.tokens) for batch in micro_batches),
        )
        counts = Counts(masked, engine.config.train.global_batch, tokens)
        rate = LEARNING_RATE
        sums = train_step(engine, micro_batches, counts, step=0, learning_rate=rate, ended=watch.mark)
        return training_loss(engine.config.objectives, sums, counts)

    return step


def transformers_model(config: PretrainConfig, vocab_size: int, device: torch.device) -> nn.Module:
    """Makes transformers' model of the preset with our initial weights, float32 on the device.

    Without pairs it is the class without a head for them, which would need their labels. Raises UserError
    where the package is missing.
    """
    try:
        import transformers
    except ImportError as error:
        raise UserError("transformers is not installed: pip install transformers") from error

    model = config.model
    if not config.samples.has_pairs:
        model = model.model_copy(update={"sentence_head": False})
    values = hugging_face_config(model, vocab_size, pad_token_id=0)
    sizes = transformers.AutoConfig.for_model(**values)
    with device:  # where its own initial values take no time
        theirs: nn.Module = getattr(transformers, values["architectures"][0])(sizes)
    parameters = dict(theirs.named_parameters())
    with torch.no_grad():
        for name, value in first_weights(model, vocab_size, config.train.seed).items():
            for their_name, part in to_hugging_face(name, value, model, vocab_size).items():
                parameters[their_name].copy_(part)
    return theirs


def first_weights(model: ModelConfig, vocab_size: int, seed: int) -> dict[str, Tensor]:
    """Returns the weights that `Engine.start` trains from: name -> whole float32 tensor on the CPU."""
    shapes = native_shapes(model, vocab_size).items()
    return {name: initial_value(name, shape, model, vocab_size, seed) for name, shape in shapes}


def plain_step(
    model: nn.Module,
    loss_of: Callable[[dict[str, Tensor]], Tensor],
    config: PretrainConfig,
    device: torch.device,
    watch: Stopwatch,
) -> Step:
    """Returns a step of a plain loop for a peer, on padded batches: fused AdamW, clipping as in ours.

    The weights and the optimizer's moments have the precision of the model, as usual in such loops.
    """
    settings = config.optimizer
    optimizer = adamw(model, settings.model_copy(update={"learning_rate": LEARNING_RATE}))
    model.train()

    def step(micro_batches: Sequence[dict[str, Tensor]]) -> Tensor:
        total = torch.zeros((), device=device)
        for batch in micro_batches:
            inputs = {name: value.to(device, non_blocking=True) for name, value in batch.items()}
            loss = loss_of(inputs) / len(micro_batches)
            watch.mark("forward")
            loss.backward()  # type: ignore[no-untyped-call]
            watch.mark("backward")
            total += loss.detach()
        nn.utils.clip_grad_norm_(model.parameters(), settings.gradient_clipping)
        optimizer.step()
        optimizer.zero_grad()
        watch.mark("optimizer")
        return total

    return step


def transformers_step(
    config: PretrainConfig,
    vocab_size: int,
    device: torch.device,
    dtype: torch.dtype,
    watch: Stopwatch,
    *,
    compiled: bool = False,
) -> Step:
    """Returns a step of transformers' class in a plain loop, on what `padded` makes, perhaps compiled."""
    model = transformers_model(config, vocab_size, device).to(dtype)
    call = torch.compile(model) if compiled else model
    token_types = not config.model.rotary  # the class of a rotary preset takes none

    def loss_of(batch: dict[str, Tensor]) -> Tensor:
        batch = {name: value for name, value in batch.items() if token_types or name != "token_type_ids"}
        loss: Tensor = call(**batch).loss
        return loss

    return plain_step(model, loss_of, config, device, watch)


# ------------------------------------------------------------------------------------- memory and machine


def peak_memory(device: torch.device) -> int:
    """Returns bytes: the most that torch had allocated on the GPU since `forget_peak`, or the largest
    resident set of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts KiB


def forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def machine(device: torch.device, peak: float) -> dict[str, Any]:
    """Describes this machine for the results; `peak` is its measured FLOP/s."""
    return {
        "processor": processor(),
        "device": describe(device),
        "torch": torch.__version__,
        "measured_peak_gflops": round(peak / 1e9),
    }


# ------------------------------------------------------------------------------------------------ profile


def profiled(run: Callable[[], object], device: torch.device) -> Any:
    """Returns torch's profiler after one `run`, which ends when the device has finished."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        run()
        synchronize(device)
    return profiler


def top_operators(profiler: Any, device: torch.device) -> list[tuple[str, float]]:
    """Lists (name, seconds without what it calls), the longest first: kernels on a GPU, else operators."""
    if device.type == "cuda":
        kernels = [row for row in profiler.key_averages() if row.device_type.name == "CUDA"]
        rows = [(str(row.key), row.self_device_time_total / 1e6) for row in kernels]
    else:
        rows = [(str(row.key), row.self_cpu_time_total / 1e6) for row in profiler.key_averages()]
    return sorted(rows, key=lambda row: -row[1])


def communication(profiler: Any) -> float:
    """Returns the seconds of this rank's collectives, with the wait for other ranks: NCCL's kernels on the
    device, gloo's operations from the call to their end."""
    seconds = 0.0
    for event in profiler.events():
        of_nccl = event.device_type.name == "CUDA" and event.name.startswith("ncclDev")
        if of_nccl or event.name.startswith("gloo:"):
            seconds += event.time_range.elapsed_us() / 1e6
    return seconds
