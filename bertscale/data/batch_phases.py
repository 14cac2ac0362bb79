"""How many samples each step has: `train.batch_warmup`, then `train.global_batch`.

Numbers of tokens become numbers of samples by the mean length of a sample, a fact of the data alone: which
samples a step consumes, and when a run ends, depend on the step's number only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

FOREVER = 2**62  # steps


class BatchPhase(NamedTuple):
    """Consecutive steps of one batch size."""

    first_step: int
    first_sample: int  # samples of all steps before it
    size: int  # samples of a step
    first_token: float  # tokens of all steps before it
    sample_tokens: float  # of a sample, in the mean


def batch_phases(
    warmup: Sequence[tuple[float, int]], global_batch: int, lengths: Sequence[tuple[int, float]]
) -> list[BatchPhase]:
    """The phases of `train.batch_warmup` and, at the end, that of `global_batch`.

    `warmup` holds pairs (tokens until which, samples of a step); `lengths` pairs (first step, from 0 up; mean
    tokens of a sample from there on). A batch size during which the mean changes becomes two phases. A phase
    of the warm-up ends with the first step that brings the run to its number of tokens, which may be less
    than one step away from the phase's begin: each has one step at least.
    """
    phases = []
    step, sample, token = 0, 0, 0.0
    for until, size in [*warmup, (None, global_batch)]:
        enough = count = 0
        while count == 0 or count < enough:
            mean = next(mean for first, mean in reversed(lengths) if first <= step)
            change = next((first for first, _ in lengths if first > step), None)
            phases.append(BatchPhase(step, sample, size, token, mean))
            enough = FOREVER if until is None else max(1, math.ceil((until - token) / (size * mean)))
            count = min(enough, FOREVER if change is None else change - step)
            step, sample, token = step + count, sample + count * size, token + count * size * mean
    return phases


def batch_of(step: int, phases: Sequence[BatchPhase]) -> tuple[int, int]:
    """First sample and number of samples of `step`."""
    phase = _phase_of(step, phases)
    return phase.first_sample + (step - phase.first_step) * phase.size, phase.size


def tokens_until(step: int, phases: Sequence[BatchPhase]) -> float:
    """Tokens of the steps before `step`, by the mean of their samples."""
    phase = _phase_of(step, phases)
    return phase.first_token + (step - phase.first_step) * phase.size * phase.sample_tokens


def steps_until(tokens: float, phases: Sequence[BatchPhase]) -> int:
    """Steps, at least one, until `tokens` tokens are reached."""
    phase = next((phase for phase in reversed(phases) if phase.first_token < tokens), phases[0])
    left = (tokens - phase.first_token) / (phase.size * phase.sample_tokens)
    return max(1, phase.first_step + math.ceil(left))


def _phase_of(step: int, phases: Sequence[BatchPhase]) -> BatchPhase:
    return next(phase for phase in reversed(phases) if phase.first_step <= step)
