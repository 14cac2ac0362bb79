"""One training step, for pretraining, fine-tuning, `bertscale bench` and the benchmarks alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bertscale.config import PretrainConfig
from bertscale.data.micro_batch import MicroBatch
from bertscale.model.model import LossSums
from bertscale.train.engine import Engine
from bertscale.train.objectives import Counts, training_loss
from bertscale.train.parallel import seed_dropout


def global_step(
    engine: Engine[Any],
    micro_batches: Sequence[Any],
    loss_of: Callable[[Any, Any], tuple[Tensor, Tensor]],
    *,
    seed: int,
    step: int,
    learning_rate: float,
    ended: Callable[[str], None] = lambda part: None,
) -> Tensor:
    """Trains a global step: forward and backward passes of this rank's micro-batches, update of the weights.

    `loss_of(outputs, batch)` returns a micro-batch's part of the loss, and sums to be reported, float32 [K].
    `seed` and `step`, its number, seed dropout. `ended` is called with "forward", "backward" or "optimizer"
    when that part of a micro-batch has ended. Returns the sums over all micro-batches, [K], without a graph.
    The host does not wait for the device, except where DeepSpeed clips (`Zero.clips`).
    """
    ranks = engine.ranks
    totals: Tensor | None = None
    for number, batch in enumerate(micro_batches):
        seed_dropout(engine.model.parallel, seed, step, number, ranks)
        batch = batch.to(ranks.device)
        loss, sums = loss_of(engine(batch), batch)
        ended("forward")
        # DeepSpeed takes the mean over the data ranks, and the loss is divided by counts of all: so times
        # their number.
        engine.backward(loss * ranks.data, last=number == len(micro_batches) - 1)
        ended("backward")
        engine.step(learning_rate)
        ended("optimizer")
        totals = sums.detach() if totals is None else totals + sums.detach()
    assert totals is not None
    return totals


def train_step(
    engine: Engine[PretrainConfig],
    micro_batches: Sequence[MicroBatch],
    counts: Counts,
    *,
    step: int,
    learning_rate: float,
    ended: Callable[[str], None] = lambda part: None,
) -> LossSums:
    """Trains a global step of a pretraining; `counts` are those of the whole global batch, the rest is as of
    `global_step`. Returns this rank's sums over all micro-batches."""
    config = engine.config

    def loss_of(sums: LossSums, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        return training_loss(config.objectives, sums, counts), torch.stack(sums)

    seed = config.train.seed
    totals = global_step(
        engine, micro_batches, loss_of, seed=seed, step=step, learning_rate=learning_rate, ended=ended
    )
    return LossSums(*totals)
