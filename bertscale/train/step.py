"""One training step, for `bertscale pretrain`, `bertscale bench` and the benchmarks alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from bertscale.data.micro_batch import MicroBatch
from bertscale.model.model import LossSums
from bertscale.train.engine import Engine
from bertscale.train.objectives import Counts, training_loss
from bertscale.train.parallel import seed_dropout


def train_step(
    engine: Engine,
    micro_batches: Sequence[MicroBatch],
    counts: Counts,
    *,
    step: int,
    learning_rate: float,
    ended: Callable[[str], None] = lambda part: None,
) -> LossSums:
    """Trains a global step: forward and backward passes of this rank's micro-batches, update of the weights.

    `counts` are those of the whole global batch; `step`, its number, seeds dropout. `ended` is called with
    "forward", "backward" or "optimizer" when that part of a micro-batch has ended. Returns this rank's sums
    over all micro-batches, without a graph. The host does not wait for the device, except where DeepSpeed
    clips (`Zero.clips`).
    """
    config, ranks = engine.config, engine.ranks
    totals = torch.zeros(len(LossSums._fields), device=ranks.device)
    for number, batch in enumerate(micro_batches):
        seed_dropout(engine.model.parallel, config.train.seed, step, number, ranks)
        sums = engine(batch.to(ranks.device))
        loss = training_loss(config.objectives, sums, counts)
        ended("forward")
        # DeepSpeed takes the mean over the data ranks, and `counts` are those of all: so times their number.
        engine.backward(loss * ranks.data, last=number == len(micro_batches) - 1)
        ended("backward")
        engine.step(learning_rate)
        ended("optimizer")
        totals += torch.stack(sums).detach()
    return LossSums(*totals)
