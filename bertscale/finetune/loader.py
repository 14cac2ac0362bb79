"""The micro-batches of a fine-tuning: which samples each step has, and on which rank.

    loader = TaskLoader(samples, kind, global_batch=32, micro_tokens=16384, seed=0)
    loader.step(7)    # a pure function of (samples, seed, step)

N samples; U units, what a batch counts and what stays together: the samples of an example of multiple choice,
else a single sample; K steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bertscale.config import TaskKind, UserError
from bertscale.data.loader import balance
from bertscale.data.samples import spread
from bertscale.model.heads import OF_TOKENS, TaskBatch, loss_count
from bertscale.tasks.task import Floats, Samples, Task

Ints = npt.NDArray[np.int64]


class Part(NamedTuple):
    """A micro-batch and where it comes from."""

    batch: TaskBatch
    divisor: float  # what the sum of its losses is divided by, together with the others of the step
    samples: Ints  # [S] their numbers, in the order of the batch


class TaskLoader:
    """The micro-batches of rank `rank` of the `world` data-parallel ones.

    Each epoch has all units in an order of its own, that `seed` and the epoch decide; its last step may be
    smaller. `repeats` [E], of each example: how often an epoch has it; the fraction of a number is the share
    of such examples that an epoch has once more, each time others. A micro-batch holds at most `micro_tokens`
    tokens.
    """

    def __init__(
        self,
        samples: Samples,
        kind: TaskKind,
        *,
        global_batch: int,
        micro_tokens: int,
        seed: int,
        repeats: npt.NDArray[np.float64] | None = None,
        class_weights: Tensor | None = None,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.samples, self.kind, self.seed = samples, kind, seed
        self.global_batch, self.micro_tokens = global_batch, micro_tokens
        self.class_weights, self.rank, self.world = class_weights, rank, world
        self.unit_start = unit_starts(samples, kind)  # [U + 1]
        self.sizes = np.diff(samples.starts[self.unit_start])  # [U] tokens
        if self.sizes.max() > micro_tokens:
            raise UserError(
                f"train.micro_tokens={micro_tokens} is less than the {self.sizes.max():,} tokens of one "
                "example with all its options; give more"
            )
        shares = np.ones(self.units) if repeats is None else repeats[samples.example[self.unit_start[:-1]]]
        self.whole, rest = np.divmod(shares, 1.0)
        # Units whose number of repeats has the same fraction, and how many of them an epoch has once more.
        alike = [(share, np.flatnonzero(rest == share)) for share in np.unique(rest)]
        self.partly = [(units, round(share * len(units))) for share, units in alike]
        self.epoch_units: int = int(self.whole.sum()) + sum(more for _, more in self.partly)
        if not self.epoch_units:
            raise UserError("the weights of data.train leave no example in an epoch; give a larger weight")
        self.epoch_steps: int = -(-self.epoch_units // global_batch)
        self._order: tuple[int, Ints] = (-1, np.empty(0, np.int64))

    @property
    def units(self) -> int:
        return len(self.unit_start) - 1

    def step(self, k: int) -> list[Part]:
        """This rank's micro-batches of step `k`; all ranks have the same number of them."""
        epoch, place = divmod(k, self.epoch_steps)
        if self._order[0] != epoch:
            self._order = epoch, self._order_of(epoch)
        begin = place * self.global_batch
        return self._divide(self._order[1][begin : begin + self.global_batch])

    def epoch(self, k: int) -> float:
        """Epochs that `k` steps are."""
        whole, place = divmod(k, self.epoch_steps)
        return whole + min(1.0, place * self.global_batch / self.epoch_units)

    def all(self) -> list[Part]:
        """This rank's micro-batches of all samples, once, by length, for predictions."""
        return self._divide(np.arange(self.units))

    def _order_of(self, epoch: int) -> Ints:
        draw = np.random.default_rng([self.seed, epoch])
        more = [draw.choice(units, count, replace=False) for units, count in self.partly]
        units = np.concatenate([np.repeat(np.arange(self.units), self.whole.astype(np.int64)), *more])
        return draw.permutation(units)

    def _divide(self, units: Ints) -> list[Part]:
        """Divides units among the ranks, and those of this rank among its micro-batches."""
        number = balance(self.sizes[units], self.micro_tokens, self.world)  # of the micro-batch, on all ranks
        mine = [units[number == m] for m in range(self.rank, number.max() + 1, self.world)]
        # balance makes a multiple of `world`, of which the last may be empty.
        rounds = number.max() // self.world + 1
        return [self._part(of) for of in mine] + [self._part(units[:0])] * (rounds - len(mine))

    def _part(self, units: Ints) -> Part:
        if not len(units):  # ranks take their steps together: one without samples repeats one, for nothing
            part = self._part(np.array([int(self.sizes.argmin())]))
            return Part(part.batch._replace(weight=0.0), 0.0, part.samples[:0])
        # Equal lengths are neighbours, so that attention takes them as one batch.
        units = units[np.argsort(self.sizes[units], kind="stable")]
        counts = self.unit_start[units + 1] - self.unit_start[units]
        rows = spread(self.unit_start[units], counts)  # numbers of the samples
        groups = tuple(counts.tolist()) if self.kind == "multiple_choice" else None
        batch = lay_out(self.samples, self.kind, rows, groups)
        count = 0.0
        if batch.targets is not None:
            count = loss_count(self.kind, batch.targets, self.class_weights)
        return Part(batch, count, rows)


def unit_starts(samples: Samples, kind: TaskKind) -> Ints:
    """The first sample of each unit, and the number of samples, [U + 1]."""
    if kind != "multiple_choice":
        return np.arange(len(samples) + 1)
    return np.append(np.flatnonzero(np.diff(samples.example, prepend=-1)), len(samples))


def lay_out(samples: Samples, kind: TaskKind, rows: Ints, groups: tuple[int, ...] | None = None) -> TaskBatch:
    """Lays the samples `rows` end to end, as tensors."""
    lengths = samples.lengths[rows]
    places = spread(samples.starts[rows], lengths)  # [T]
    positions = spread(np.zeros_like(lengths), lengths)
    types = positions >= np.repeat(samples.second[rows], lengths)
    targets = None
    if samples.targets is not None:
        of_what = places if kind == "tokens" else rows
        if groups is not None:
            of_what = samples.example[rows[np.cumsum(groups) - 1]]
        targets = torch.from_numpy(samples.targets[of_what])
    return TaskBatch(
        tokens=torch.from_numpy(samples.tokens[places].astype(np.int64)),
        token_types=torch.from_numpy(types.astype(np.int64)),
        positions=torch.from_numpy(positions),
        lengths=tuple(lengths.tolist()),
        targets=targets,
        groups=groups,
    )


def by_length(samples: Samples, kind: TaskKind, micro_tokens: int) -> Iterator[tuple[Ints, TaskBatch]]:
    """Yields all samples once, without targets, the longest first: their numbers, and the micro-batch.

    Samples of one length are neighbours, which attention takes as one batch. A micro-batch holds at most
    `micro_tokens` tokens, or one sample.
    """
    samples = replace(samples, targets=None)
    order = np.argsort(-samples.lengths, kind="stable")
    ends = np.cumsum(samples.lengths[order])
    begin = done = 0
    while begin < len(order):
        end = max(begin + 1, int(np.searchsorted(ends, done + micro_tokens, "right")))
        yield order[begin:end], lay_out(samples, kind, order[begin:end])
        begin, done = end, int(ends[end - 1])


def join(pieces: Sequence[tuple[npt.NDArray[np.int64], Floats]], samples: Samples, task: Task[Any]) -> Floats:
    """Puts the outputs of micro-batches in the order of the samples: [N, C], or [T, C] of tokens."""
    of_tokens = task.kind in OF_TOKENS
    whole = np.zeros((len(samples.tokens) if of_tokens else len(samples), task.outputs), np.float32)
    for rows, values in pieces:
        places = spread(samples.starts[rows], samples.lengths[rows]) if of_tokens else rows
        whole[places] = values
    return whole
