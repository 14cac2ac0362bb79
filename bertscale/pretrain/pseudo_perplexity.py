"""Pseudo-perplexity of held-out samples: each token masked alone (Salazar et al., 2020, arXiv:1910.14659).

    heldout/NAME/pseudo_perplexity = exp(-1/N sum of log p(token | all other tokens of its sequence))

over the N tokens of the first `train.pseudo_perplexity` samples of a set; special tokens are neither masked
nor counted. A sequence of n tokens is copied n times, with one mask in each copy: n passes of n tokens.

C: copies, as many as masks; T: tokens of a micro-batch. Places count in the tokens of all samples.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch

from bertscale.config import PretrainConfig
from bertscale.data.masking import Ints, MaskRules
from bertscale.data.micro_batch import MicroBatch
from bertscale.data.samples import spread
from bertscale.train.engine import Engine
from bertscale.train.heartbeat import beat
from bertscale.train.stop import StopSignal, heed


class Copies(NamedTuple):
    """Sequences to be copied, one for each mask."""

    place: Ints  # [C] of the token that is masked
    start: Ints  # [C] place of the first token of its sequence
    length: Ints  # [C] tokens of the sequence


def copies_of(samples: MicroBatch, rules: MaskRules) -> Copies:
    """A copy for each token of the unmasked `samples` that is not a special one."""
    lengths = np.array(samples.lengths)
    start = np.repeat(np.cumsum(lengths) - lengths, lengths)  # [all tokens]
    place = np.flatnonzero(~rules.special[samples.tokens.numpy()])  # [C]
    return Copies(place, start[place], np.repeat(lengths, lengths)[place])


def batch_of(samples: MicroBatch, copies: Copies, rules: MaskRules) -> MicroBatch:
    """The copies as a micro-batch, each with its mask."""
    source = torch.from_numpy(spread(copies.start, copies.length))  # [T] places
    begin = np.cumsum(copies.length) - copies.length  # [C] of each copy in the micro-batch
    masks = torch.from_numpy(begin + copies.place - copies.start)  # [C]
    tokens = samples.tokens[source]
    targets = tokens[masks]
    tokens[masks] = rules.mask_id
    return MicroBatch(
        tokens=tokens,
        token_types=samples.token_types[source],
        positions=samples.positions[source],
        lengths=tuple(copies.length.tolist()),
        target_positions=masks,
        targets=targets,
        num_targets=len(masks),
        uniforms=torch.full((len(masks),), 0.5, dtype=torch.float64),  # what a generator draws does not count
    )


def parts(copies: Copies, budget: int) -> list[slice]:
    """The copies in parts of at most `budget` tokens each, or of one copy."""
    ends = np.cumsum(copies.length)
    found, begin = [], 0
    while begin < len(ends):
        done = ends[begin - 1] if begin else 0
        end = max(begin + 1, int(np.searchsorted(ends, done + budget, side="right")))
        found.append(slice(begin, end))
        begin = end
    return found


def _of_rank(
    samples: MicroBatch, copies: Copies, rules: MaskRules, budget: int, rank: int, world: int
) -> Iterator[MicroBatch]:
    """This data rank's micro-batches: as many on each rank, since ZeRO-3 gathers weights in each pass; what
    fills up predicts nothing."""
    everything = parts(copies, budget)
    for number in range(rank, -(-len(everything) // world) * world, world):
        chosen = everything[min(number, len(everything) - 1)]
        batch = batch_of(samples, Copies(*(column[chosen] for column in copies)), rules)
        if number >= len(everything):
            batch = batch._replace(targets=torch.full_like(batch.targets, -1))
        yield batch


def mean_loss_alone(
    engine: Engine[PretrainConfig],
    samples: MicroBatch,
    rules: MaskRules,
    done: int,
    stop: StopSignal | None = None,
) -> float:
    """The mean loss of the tokens of the unmasked `samples`, the same on all ranks, each masked alone.

    In evaluation mode, without gradients. All ranks must call; all get the same. Raises CutShortError, on all
    ranks, after a signal.
    """
    ranks, train = engine.ranks, engine.config.train
    budget = train.micro_tokens or train.micro_batch * engine.config.samples.max_length
    copies = copies_of(samples, rules)
    total = torch.zeros((), dtype=torch.float64, device=ranks.device)
    for batch in _of_rank(samples, copies, rules, budget, ranks.data_rank, ranks.data):
        heed(stop, ranks)
        total += engine(batch.to(ranks.device)).mlm
        beat(done)
    (loss,) = ranks.sum_over_data(float(total))
    return loss / max(1, len(copies.place))
