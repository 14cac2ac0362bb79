"""What changes in the course of a run: the learning rate and the size of a batch.

A budget may be given in steps, tokens or hours. The learning rate takes a place in it, in the budget's own
unit, so that one function serves all three. Tokens are turned into samples by the mean length of a sample,
a fact of the data alone: which samples a step takes, and when the run ends, depend on its number only.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import NamedTuple

from bertscale.config import OptimizerConfig, PretrainConfig

FOREVER = 2**62  # steps


def learning_rate(begin: float, end: float, total: float, config: OptimizerConfig) -> float:
    """Learning rate of the step that takes the budget from `begin` to `end` of `total`, in one unit.

    In steps, step k of n is (k, k + 1, n). Up in a line over `warmup_fraction`, then by `schedule`:

    | schedule | share of the highest at a share t of the way down                              |
    | -------- | -------------------------------------------------------------------------------- |
    | linear   | 1 - t (Devlin et al., 2019)                                                    |
    | cosine   | (1 + cos(pi t)) / 2 (Loshchilov and Hutter, 2017, without restarts)            |
    | wsd      | 1 - sqrt(t), and 1 before the last `decay_fraction` (Hägele et al., 2024)      |

    scaled so as to end at `final_fraction` rather than at zero. Past `total` the rate stays where it ended.
    """
    warmup = round(total * config.warmup_fraction)
    if warmup and end <= warmup:
        return config.learning_rate * end / warmup
    top: float = warmup
    if config.schedule == "wsd":
        top = max(warmup, total - round(total * config.decay_fraction))
    t = min(max(begin - top, 0) / max(1, total - top), 1.0)
    if config.schedule == "linear":
        share = 1 - t
    elif config.schedule == "cosine":
        share = (1 + math.cos(math.pi * t)) / 2
    else:
        share = 1 - math.sqrt(t)
    return config.learning_rate * (config.final_fraction + (1 - config.final_fraction) * share)


class BatchStage(NamedTuple):
    """From `first_step` on, when `first_sample` samples and `first_token` tokens are done, steps have `size`
    samples, of `sample_tokens` tokens in the mean."""

    first_step: int
    first_sample: int
    size: int
    first_token: float
    sample_tokens: float


def batch_stages(
    warmup: Sequence[tuple[float, int]], global_batch: int, lengths: Sequence[tuple[int, float]]
) -> list[BatchStage]:
    """The stages of `train.batch_warmup` and, at the end, that of `global_batch`.

    `lengths` are first steps, from 0 up, and the mean tokens of a sample from there on; a stage in which
    that changes becomes two. A stage of the warm-up ends with the first step that has brought the run to its
    number of tokens, which may be less than one step away from the stage's begin: each has one step at least.
    """
    stages = []
    step, sample, token = 0, 0, 0.0
    for until, size in [*warmup, (None, global_batch)]:
        enough = count = 0
        while count == 0 or count < enough:
            mean = next(mean for first, mean in reversed(lengths) if first <= step)
            change = next((first for first, _ in lengths if first > step), None)
            stages.append(BatchStage(step, sample, size, token, mean))
            enough = FOREVER if until is None else max(1, math.ceil((until - token) / (size * mean)))
            count = min(enough, FOREVER if change is None else change - step)
            step, sample, token = step + count, sample + count * size, token + count * size * mean
    return stages


def batch_of(step: int, stages: Sequence[BatchStage]) -> tuple[int, int]:
    """First sample and number of samples of `step`."""
    stage = _stage_of(step, stages)
    return stage.first_sample + (step - stage.first_step) * stage.size, stage.size


def tokens_until(step: int, stages: Sequence[BatchStage]) -> float:
    """Tokens of the steps before `step`, by the mean of their samples."""
    stage = _stage_of(step, stages)
    return stage.first_token + (step - stage.first_step) * stage.size * stage.sample_tokens


def steps_until(tokens: float, stages: Sequence[BatchStage]) -> int:
    """Steps, at least one, until `tokens` tokens are reached."""
    stage = next((s for s in reversed(stages) if s.first_token < tokens), stages[0])
    left = (tokens - stage.first_token) / (stage.size * stage.sample_tokens)
    return max(1, stage.first_step + math.ceil(left))


def _stage_of(step: int, stages: Sequence[BatchStage]) -> BatchStage:
    return next(stage for stage in reversed(stages) if stage.first_step <= step)


class Course:
    """The course of a run: the batch and the learning rate of each step, and when it ends.

    A budget in hours follows the clock of the first rank (Izsak et al., 2021, "How to train BERT with an
    academic budget"): the same run made twice takes other rates at other steps, so that its results are not
    repeated bit for bit. Time before the loop (loading, compiling) does not count, nor do steps that a crash
    undid; held-out losses and checkpoints do, but the last ones come on top. `steps` is then None.
    `lengths` as `batch_stages` takes them.
    """

    def __init__(self, config: PretrainConfig, lengths: Sequence[tuple[int, float]]) -> None:
        train, self.optimizer = config.train, config.optimizer
        self.stages = batch_stages(train.batch_warmup, train.global_batch, lengths)
        self.seconds = None if train.hours is None else train.hours * 3600
        self.steps = train.steps
        self.text = f"{train.steps} steps"
        self.schedule_steps = train.schedule_steps or train.steps
        if train.tokens is not None:
            self.steps = steps_until(train.tokens, self.stages)
            mean = tokens_until(self.steps, self.stages) / self.batch(self.steps)[0]
            self.text = f"{self.steps} steps ({train.tokens:.4g} tokens, {mean:.1f} a sample)"
        if train.hours is not None:
            self.text = f"{train.hours:g} hours"

    def batch(self, step: int) -> tuple[int, int]:
        """First sample and number of samples of `step`, which is also the samples of all steps before it."""
        return batch_of(step, self.stages)

    def learning_rate(self, step: int, elapsed: float) -> float:
        """Of `step`, which begins when `elapsed` seconds of training are over."""
        if self.seconds is not None:
            return learning_rate(elapsed, elapsed, self.seconds, self.optimizer)
        if self.schedule_steps is not None:
            return learning_rate(step, step + 1, self.schedule_steps, self.optimizer)
        assert self.steps is not None
        begin, end, total = (tokens_until(k, self.stages) for k in (step, step + 1, self.steps))
        return learning_rate(begin, end, total, self.optimizer)

    def over(self, step: int, elapsed: float) -> bool:
        """Whether the budget is spent after `step` steps and `elapsed` seconds."""
        return elapsed >= self.seconds if self.seconds is not None else step >= (self.steps or 0)


class Clock:
    """Seconds of training, those of earlier attempts (`before`) included."""

    def __init__(self, before: float) -> None:
        self.began = time.monotonic() - before
        self.step_began = self.step_seconds = 0.0

    def elapsed(self) -> float:
        return time.monotonic() - self.began

    def step(self) -> tuple[float, float]:
        """Begins a step; when that is, and when it is likely to be over."""
        self.step_began = self.elapsed()
        return self.step_began, self.step_began + self.step_seconds

    def stepped(self) -> None:
        """Ends the step; what follows (a held-out loss, a checkpoint) is no part of it."""
        self.step_seconds = self.elapsed() - self.step_began
