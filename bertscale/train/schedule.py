"""The learning rate of each step, and when a run ends.

A budget is given in steps, tokens or hours. The learning rate follows the fraction of it that is spent, in
whichever of the three, so that one function serves all.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

from bertscale.config import OptimizerConfig, PretrainConfig
from bertscale.data.batch_phases import BatchPhase, batch_of, steps_until, tokens_until


def learning_rate(begin: float, end: float, total: float, config: OptimizerConfig) -> float:
    """Learning rate of the step that spends the budget from `begin` to `end` of `total`, all in steps, all
    in tokens or all in seconds.

    In steps, step k of n is (k, k + 1, n). It rises linearly over `warmup_fraction`, then follows `schedule`:

    | schedule | fraction of the highest rate at a fraction t of the way down                   |
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
        fraction = 1 - t
    elif config.schedule == "cosine":
        fraction = (1 + math.cos(math.pi * t)) / 2
    else:
        fraction = 1 - math.sqrt(t)
    return config.learning_rate * (config.final_fraction + (1 - config.final_fraction) * fraction)


class TrainingSchedule:
    """The batch and the learning rate of each step of a run, and when it ends.

    A budget in hours follows the clock of the ranks (Izsak et al., 2021, "How to train BERT with an
    academic budget"): the same run made twice has other rates at some steps, so that its results are not
    repeated bit for bit. Time before the loop (loading, compiling) does not count, nor do steps that a crash
    undid; held-out losses and checkpoints do, except the last ones. `steps` is then None.
    `phases` are the mixture's batch phases.
    """

    def __init__(self, config: PretrainConfig, phases: Sequence[BatchPhase]) -> None:
        train, self.optimizer, self.phases = config.train, config.optimizer, phases
        self.seconds = None if train.hours is None else train.hours * 3600
        self.steps = train.steps
        self.text = f"{train.steps} steps"
        self.schedule_steps = train.schedule_steps or train.steps
        if train.tokens is not None:
            self.steps = steps_until(train.tokens, self.phases)
            mean = tokens_until(self.steps, self.phases) / self.batch(self.steps)[0]
            self.text = f"{self.steps} steps ({train.tokens:.4g} tokens, {mean:.1f} a sample)"
        if train.hours is not None:
            self.text = f"{train.hours:g} hours"

    def batch(self, step: int) -> tuple[int, int]:
        """First sample and number of samples of `step`, which is also the samples of all steps before it."""
        return batch_of(step, self.phases)

    def learning_rate(self, step: int, elapsed: float) -> float:
        """The learning rate of `step`, which begins after `elapsed` seconds of training."""
        if self.seconds is not None:
            return learning_rate(elapsed, elapsed, self.seconds, self.optimizer)
        if self.schedule_steps is not None:
            return learning_rate(step, step + 1, self.schedule_steps, self.optimizer)
        assert self.steps is not None
        begin, end, total = (tokens_until(k, self.phases) for k in (step, step + 1, self.steps))
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
        """Seconds of training until now."""
        return time.monotonic() - self.began

    def step(self) -> tuple[float, float]:
        """Begins a step; returns the seconds when it begins and when it is likely to end."""
        self.step_began = self.elapsed()
        return self.step_began, self.step_began + self.step_seconds

    def stepped(self) -> None:
        """Ends the step; what follows (a held-out loss, a checkpoint) does not belong to it."""
        self.step_seconds = self.elapsed() - self.step_began
