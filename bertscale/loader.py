"""Batches as a pure function of (data, seed, step), for the loop that trains and the held-out loss.

    mixture = Mixture([dataset], [1.0], config.samples, global_batch=256, seed=0)
    loader = Loader(mixture, tokenizer, micro_batch=32, rank=0, world=1)
    for step, micro_batches in loader.iterate(start_step=0, stop_step=1000): ...

Global step k holds the samples k * global_batch .. (k + 1) * global_batch - 1 of the mixture (others where
batches grow, see `schedule.batch_of`), whatever the number of ranks: to resume is to begin at another step.
Batches are made ahead by one background thread, many samples at a time, whatever the size of a step.

S: samples, Q: sequences ([CLS] ... [SEP]; a packed sample has several), T: tokens, P: masked positions,
N: pieces.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Generator
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from bertscale.masking import Ints, draw_uniforms, mask_rules, mask_tokens, target_capacity
from bertscale.micro_batch import MicroBatch
from bertscale.mixture import Mixture, Stage
from bertscale.samples import Pieces, check_batch, spread
from bertscale.tokenizer import Tokenizer

AHEAD = 4  # steps made ahead
SLAB = 2**17  # tokens made together: enough to forget numpy's cost of a call, few enough for the caches


class Loader:
    """This data-parallel rank's share of every global step; `rank` and `world` count those ranks only.

    A micro-batch has `micro_batch` samples, or with `micro_tokens` as many as stay within so many tokens:
    then the samples of a step are dealt out to as few micro-batches as will do, the same number of them on
    each rank. `masks`: whether tokens are masked at all; `draws`: whether a generator draws ids for them.
    `static_targets`: P is the same for all micro-batches of a stage (`target_capacity`), or, for rare
    chance, twice that.
    `data_wait` is the time in seconds that callers of `iterate` have waited for a batch.
    Raises UserError where the batch does not divide (`check_batch`).
    """

    def __init__(
        self,
        mixture: Mixture,
        tokenizer: Tokenizer,
        *,
        micro_batch: int,
        rank: int,
        world: int,
        micro_tokens: int | None = None,
        masks: bool = True,
        draws: bool = False,
        static_targets: bool = False,
    ) -> None:
        samples = mixture.samples
        self.masks, self.draws, self.static_targets = masks, draws, masks and static_targets
        check_batch(mixture.global_batch, None if micro_tokens else micro_batch, world, samples.has_pairs)
        self.mixture, self.micro_batch, self.micro_tokens = mixture, micro_batch, micro_tokens
        self.global_batch, self.seed = mixture.global_batch, mixture.seed
        self.rank, self.world = rank, world
        self.cls_id, self.sep_id = tokenizer.cls_id, tokenizer.sep_id
        self.rules = mask_rules(
            vocab_size=tokenizer.vocab_size,
            mask_id=tokenizer.mask_id,
            special_ids=tokenizer.special_ids,
            mask_rate=samples.mask_rate,
            mask_token_rate=samples.mask_token_rate,
            random_token_rate=samples.random_token_rate,
            unit=samples.mask_unit,
            starts_word=None if samples.mask_unit == "token" else tokenizer.starts_word,
            span_p=samples.span_p,
            span_max=samples.span_max,
        )
        self.shard_tokens = [shard.tokens for dataset in mixture.datasets for shard in dataset.shards]
        sizes = [len(tokens) for tokens in self.shard_tokens]
        self.shard_start = np.cumsum([0, *sizes[:-1]])  # number of each shard's first token
        self.data_wait = 0.0

    def step(self, k: int) -> list[MicroBatch]:
        """This rank's micro-batches of global step `k`, shorter samples first."""
        return self.steps(self.mixture.stage_of(k), k, k + 1)[0]

    def steps(self, stage: Stage, first: int, last: int) -> list[list[MicroBatch]]:
        """`step(k)` for k = first .. last - 1, all of one stage and one size."""
        begin, size = self.mixture.batch(first)
        # With a budget each rank looks at the whole batch, to know how all of it is dealt out.
        share, rank = (size, 0) if self.micro_tokens else (size // self.world, self.rank)
        samples = begin + np.arange(last - first)[:, None] * size + rank * share + np.arange(share)
        pieces = self.mixture.pieces(stage, samples.ravel())
        extents = pieces.length + 1 + (pieces.kind == 0)  # [SEP], and [CLS] if it begins a sequence
        sizes = np.bincount(pieces.row, extents, samples.size).astype(np.int64).reshape(samples.shape)
        orders, counts = zip(*map(self._deal, sizes), strict=True)  # in each step
        order = np.concatenate([own + share * step for step, own in enumerate(orders)])
        samples, sizes, pieces = samples.ravel()[order], sizes.ravel()[order], _reorder(pieces, order)

        begins = pieces.kind == 0
        extents = pieces.length + 1 + begins
        ends = np.cumsum(extents)
        tokens = self._read(pieces, ends - 1 - pieces.length, int(ends[-1]))
        tokens[ends - 1] = self.sep_id
        first_piece = np.flatnonzero(begins)
        sequence_start = (ends - extents)[first_piece]
        tokens[sequence_start] = self.cls_id
        sequence_length = np.diff(sequence_start, append=len(tokens))
        masked, places, targets = tokens, np.zeros(0, np.int64), np.zeros(0, np.int64)
        if self.masks:
            masked, places, targets = mask_tokens(tokens, sizes, samples, self.rules, self.seed)
        uniforms = None
        if self.draws:
            uniforms = draw_uniforms(places, sizes, samples, self.seed)
        types = np.zeros(len(tokens), np.int64)
        if pieces.label is not None:
            types = np.repeat(pieces.kind, extents)
        positions = spread(np.zeros_like(sequence_start), sequence_length)

        edges = np.cumsum([0, *(count for step in counts for count in step)])  # of micro-batches, in samples
        token_edges = np.concatenate([[0], np.cumsum(sizes)])[edges]
        target_edges = np.searchsorted(places, token_edges)
        num_targets = np.diff(target_edges)
        places -= np.repeat(token_edges[:-1], num_targets)
        if self.static_targets:
            most = self.micro_tokens or self.micro_batch * stage.max_length
            capacity = target_capacity(most, self.rules)
            room = capacity * np.maximum(1, -(-num_targets // capacity))
            target_edges = np.cumsum([0, *room])
            filled = spread(target_edges[:-1], num_targets)
            places, targets = _fill_up(places, filled, room, 0), _fill_up(targets, filled, room, -1)
            uniforms = None if uniforms is None else _fill_up(uniforms, filled, room, 0.5)
        sequence_edges = np.searchsorted(sequence_start, token_edges)
        lengths = sequence_length.tolist()
        flat = [torch.from_numpy(values) for values in (masked, types, positions, places, targets)]
        labels = None if pieces.label is None else torch.from_numpy(pieces.label)
        random = None if uniforms is None else torch.from_numpy(uniforms)
        batches = []
        cuts = zip(*(e.tolist() for e in (edges, token_edges, target_edges, sequence_edges)), strict=True)
        row, token, target, sequence = next(cuts)
        for (row_end, token_end, target_end, sequence_end), real in zip(
            cuts, num_targets.tolist(), strict=True
        ):
            batches.append(
                MicroBatch(
                    tokens=flat[0][token:token_end],
                    token_types=flat[1][token:token_end],
                    positions=flat[2][token:token_end],
                    lengths=tuple(lengths[sequence:sequence_end]),
                    target_positions=flat[3][target:target_end],
                    targets=flat[4][target:target_end],
                    num_targets=real,
                    next_sentence_label=None if labels is None else labels[row:row_end],
                    uniforms=None if random is None else random[target:target_end],
                )
            )
            row, token, target, sequence = row_end, token_end, target_end, sequence_end
        left = iter(batches)
        return [list(islice(left, len(step))) for step in counts]

    def _deal(self, sizes: Ints) -> tuple[Ints, list[int]]:
        """Which samples of a step, of these sizes in tokens, are this rank's, micro-batch by micro-batch,
        and how many each of those has. Equal lengths sit together: attention takes them as one batch."""
        if not self.micro_tokens:
            return np.argsort(sizes, kind="stable"), [self.micro_batch] * (len(sizes) // self.micro_batch)
        bins = deal(sizes, self.micro_tokens, self.world)
        own = np.flatnonzero(bins % self.world == self.rank)
        turn = bins[own] // self.world
        return own[np.lexsort((sizes[own], turn))], np.bincount(turn).tolist()

    def _read(self, pieces: Pieces, places: Ints, size: int) -> Ints:
        """The tokens of the pieces, each from its place on, in an array of `size`; the rest is undefined."""
        tokens = np.empty(size, np.int64)
        shard = np.searchsorted(self.shard_start, pieces.start, side="right") - 1
        order = np.argsort(shard, kind="stable")
        shard, length = shard[order], pieces.length[order]
        source = spread(pieces.start[order] - self.shard_start[shard], length)
        target = spread(places[order], length)
        edges = np.flatnonzero(np.diff(shard, prepend=-1))  # first piece of each shard
        token_edges = np.append((np.cumsum(length) - length)[edges], len(source)).tolist()
        for number, begin, end in zip(shard[edges].tolist(), token_edges, token_edges[1:], strict=False):
            tokens[target[begin:end]] = self.shard_tokens[number].take(source[begin:end], mode="clip")
        return tokens

    def iterate(self, start_step: int, stop_step: int) -> Generator[tuple[int, list[MicroBatch]], None, None]:
        """(k, step(k)) for k = start_step .. stop_step - 1, made ahead in a background thread, in
        pinned memory where CUDA is there. An error of the thread is raised here; leaving the loop,
        by `break` or by an exception, ends the thread."""
        ready: queue.Queue[tuple[int, list[MicroBatch]] | BaseException] = queue.Queue(AHEAD)
        stop = threading.Event()
        # A new thread would lock its pages in a context on device 0, whichever device the rank has.
        device = torch.cuda.current_device() if torch.cuda.is_available() else None

        def make_ahead() -> None:
            try:
                if device is not None:
                    torch.cuda.set_device(device)
                step = start_step
                while step < stop_step:
                    stage = self.mixture.stage_of(step)
                    share = self.mixture.batch(step)[1] // self.world
                    end = step + max(1, SLAB // (share * stage.max_length))
                    for batches in self.steps(stage, step, min(end, self.mixture.end_of(step), stop_step)):
                        if device is not None:
                            batches = [batch.pin_memory() for batch in batches]
                        if stop.is_set():
                            return
                        ready.put((step, batches))
                        step += 1
            except BaseException as error:
                ready.put(error)

        thread = threading.Thread(target=make_ahead, name="loader", daemon=True)
        thread.start()
        try:
            for _ in range(start_step, stop_step):
                began = time.perf_counter()
                item = ready.get()
                self.data_wait += time.perf_counter() - began
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            stop.set()
            while not ready.empty():  # room for the one batch that the thread may be handing over
                ready.get()
            thread.join()


def deal(sizes: Ints, budget: int, world: int) -> Ints:
    """The micro-batch of each sample, none above `budget` tokens, a multiple of `world` in all.

    Samples are dealt out from the longest to the shortest, to and fro, so that the sums are about even.
    """
    order = np.argsort(-sizes, kind="stable")
    turn = np.arange(len(sizes))
    number = world * -(-int(sizes.sum()) // (budget * world))
    while True:
        hand, place = np.divmod(turn, number)
        bins = np.empty(len(sizes), np.int64)
        bins[order] = np.where(hand & 1, number - 1 - place, place)
        if np.bincount(bins, sizes).max() <= budget:
            return bins
        number += world


def _fill_up(values: npt.NDArray[Any], places: Ints, room: Ints, fill: float) -> npt.NDArray[Any]:
    """`values` [P] at `places` [P] of an array as long as all the `room`, and `fill` elsewhere."""
    filled = np.full(int(room.sum()), fill, values.dtype)
    filled[places] = values
    return filled


def _reorder(pieces: Pieces, order: Ints) -> Pieces:
    """The pieces of the samples `order`, in that order."""
    count = np.bincount(pieces.row)
    if (count == count[0]).all():  # the same number of pieces in each sample
        each = int(count[0])
        index = (order[:, None] * each + np.arange(each)).ravel()
    else:
        first = np.cumsum(count) - count
        index = spread(first[order], count[order])
    row = np.repeat(np.arange(len(order)), count[order])
    label = None if pieces.label is None else pieces.label[order]
    return Pieces(pieces.start[index], pieces.length[index], pieces.kind[index], row, label)
