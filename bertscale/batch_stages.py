"""How many samples each step has: `train.batch_warmup`, then `train.global_batch`.

Tokens are turned into samples by the mean length of a sample, a fact of the data alone: which samples a step
takes, and when a run ends, depend on the step's number only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

FOREVER = 2**62  # steps


class BatchStage(NamedTuple):
    """Consecutive steps of one batch size."""

    first_step: int
    first_sample: int  # samples of all steps before it
    size: int  # samples of a step
    first_token: float  # tokens of all steps before it
    sample_tokens: float  # of a sample, in the mean


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
