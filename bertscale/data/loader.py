"""Batches as a pure function of (data, seed, step), for the loop that trains and the held-out loss.

    mixture = Mixture([dataset], [1.0], config.samples, global_batch=256, seed=0)
    loader = Loader(mixture, tokenizer, micro_batch=32, rank=0, world=1)
    for step, micro_batches in loader.iterate(start_step=0, stop_step=1000): ...

Global step k holds the samples k * global_batch .. (k + 1) * global_batch - 1 of the mixture (others where
batches grow, see `batch_phases`), whatever the number of ranks: to resume is to begin at another step.
Batches are made ahead by one background thread, many samples at a time, whatever the size of a step.

K: steps, S: samples of all of them, Q: sequences ([CLS] ... [SEP]; a packed sample has several), T: tokens,
P: predicted positions, N: segments, M: micro-batches. Index: in the tokens of a step or micro-batch;
position: in a sequence, as the model counts it.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Generator
from itertools import islice, pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from bertscale.data.masking import Bools, Ints, draw_uniforms, mask_rules, mask_tokens, target_capacity
from bertscale.data.micro_batch import MicroBatch
from bertscale.data.mixture import LengthPhase, Mixture
from bertscale.data.samples import Segments, check_batch, spread
from bertscale.tokenizer import Tokenizer

AHEAD = 4  # steps made ahead
TOKENS_AT_ONCE = 2**17  # made together: enough to forget numpy's cost of a call, few enough for the caches


class Loader:
    """This data-parallel rank's part of every global step; `rank` and `world` count those ranks only.

    A micro-batch has `micro_batch` samples, or with `micro_tokens` as many as stay within so many tokens:
    then the samples of a step go to as few micro-batches as can hold them, the same number of them on each
    rank (`balance`). `masks`: whether tokens are masked at all; `causal`: instead each token of a sequence
    predicts the next one; `draws`: whether a generator draws ids.
    `static_targets`: P is the same for all micro-batches of a phase (`target_capacity`), or, for rare
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
        causal: bool = False,
        draws: bool = False,
        static_targets: bool = False,
    ) -> None:
        samples = mixture.samples
        self.masks, self.causal, self.draws = masks, causal, draws
        self.static_targets = (masks or causal) and static_targets
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
        # The bits of words, where the shards have them and whole words are masked.
        self.shard_words = [shard.word_bits for dataset in mixture.datasets for shard in dataset.shards]
        self.reads_words = samples.mask_unit != "token" and any(w is not None for w in self.shard_words)
        sizes = [len(tokens) for tokens in self.shard_tokens]
        self.shard_start = np.cumsum([0, *sizes[:-1]])  # number of each shard's first token
        self.data_wait = 0.0

    def step(self, k: int) -> list[MicroBatch]:
        """This rank's micro-batches of global step `k`, shorter samples first."""
        return self.steps(self.mixture.phase_of(k), k, k + 1)[0]

    def steps(self, phase: LengthPhase, first: int, last: int) -> list[list[MicroBatch]]:
        """`step(k)` for k = first .. last - 1, all of one phase and one size.

        All of these steps are made together, as few long arrays. A packed step of two samples of 8 tokens in
        one micro-batch, with segments of 6, 2 and 2 tokens, the second sample holding two of them:

            tokens            C a b c d e f S   C g h S C i j S      C: [CLS], S: [SEP]
            segments.sample   0                 1       1            the sample of each segment
            extents           8                 4       4            tokens of each with [CLS] and [SEP]
            ends              8                 12      16
            sizes             8                 8                    tokens of each sample
            sequence_start    0                 8       12
            positions         0 1 2 3 4 5 6 7   0 1 2 3 0 1 2 3
        """
        # Which samples, and in which order.
        samples, segments = self._samples_of(phase, first, last)  # [K, S / K], [N]
        extents = segments.length + 1 + (segments.kind == 0)  # [N]: [SEP], and [CLS] if a sequence begins
        sizes = np.bincount(segments.sample, extents, samples.size).astype(np.int64)  # [S]
        orders, counts = zip(*map(self._assign, sizes.reshape(samples.shape)), strict=True)  # of each step
        order = np.concatenate([of_step + samples.shape[1] * k for k, of_step in enumerate(orders)])  # [S]
        samples, sizes, segments = samples.ravel()[order], sizes[order], _reorder(segments, order)

        # Their tokens, end to end.
        begins = segments.kind == 0  # [N] whether a sequence begins
        extents = segments.length + 1 + begins  # [N]
        ends = np.cumsum(extents)  # [N] one behind its [SEP]
        tokens, word_starts = self._read(segments, ends - 1 - segments.length, int(ends[-1]))  # [T] each
        tokens[ends - 1] = self.sep_id
        sequence_start = (ends - extents)[begins]  # [Q]
        tokens[sequence_start] = self.cls_id
        sequence_length = np.diff(sequence_start, append=len(tokens))  # [Q]
        positions = spread(np.zeros_like(sequence_start), sequence_length)  # [T]
        types = np.zeros(len(tokens), np.int64)  # [T]
        if segments.label is not None:
            types = np.repeat(segments.kind, extents)

        # What is predicted of them.
        indices, targets = np.zeros(0, np.int64), np.zeros(0, np.int64)  # [P] into tokens
        if self.masks:
            tokens, indices, targets = mask_tokens(tokens, sizes, samples, self.rules, self.seed, word_starts)
        elif self.causal:  # all but the last of each sequence
            indices = np.delete(np.arange(len(tokens)), sequence_start + sequence_length - 1)
            targets = tokens[indices + 1]
        uniforms = draw_uniforms(indices, sizes, samples, self.seed) if self.draws else None  # [P]

        # Where micro-batches begin: M of them in all steps, and M + 1 edges of each kind.
        sample_edges = np.cumsum([0, *(count for step in counts for count in step)])  # [M + 1] in samples
        token_edges = np.concatenate([[0], np.cumsum(sizes)])[sample_edges]  # [M + 1] in tokens
        sequence_edges = np.searchsorted(sequence_start, token_edges)  # [M + 1] in sequences
        target_edges = np.searchsorted(indices, token_edges)  # [M + 1] in predicted positions
        num_targets = np.diff(target_edges)  # [M]
        indices -= np.repeat(token_edges[:-1], num_targets)  # now they count from their micro-batch's begin
        if self.static_targets:
            most = self.micro_tokens or self.micro_batch * phase.max_length
            capacity = target_capacity(most, None if self.causal else self.rules)
            room = capacity * np.maximum(1, -(-num_targets // capacity))  # [M]
            target_edges = np.cumsum([0, *room])
            filled = spread(target_edges[:-1], num_targets)  # [P] where the real ones stand
            indices, targets = _fill_up(indices, filled, room, 0), _fill_up(targets, filled, room, -1)
            uniforms = None if uniforms is None else _fill_up(uniforms, filled, room, 0.5)

        # Views of the arrays, as tensors, for each micro-batch.
        lengths, label = sequence_length.tolist(), segments.label
        flat = [torch.from_numpy(values) for values in (tokens, types, positions, indices, targets)]
        labels = None if label is None else torch.from_numpy(label)
        drawn = None if uniforms is None else torch.from_numpy(uniforms)
        edges = (sample_edges, token_edges, sequence_edges, target_edges)
        slices = zip(*([slice(*pair) for pair in pairwise(kind.tolist())] for kind in edges), strict=True)
        batches = [
            MicroBatch(
                tokens=flat[0][token],
                token_types=flat[1][token],
                positions=flat[2][token],
                lengths=tuple(lengths[sequence]),
                target_positions=flat[3][target],
                targets=flat[4][target],
                num_targets=real,
                next_sentence_label=None if labels is None else labels[sample],
                uniforms=None if drawn is None else drawn[target],
                causal=self.causal,
            )
            for (sample, token, sequence, target), real in zip(slices, num_targets.tolist(), strict=True)
        ]
        remaining = iter(batches)
        return [list(islice(remaining, len(step))) for step in counts]

    def _samples_of(self, phase: LengthPhase, first: int, last: int) -> tuple[Ints, Segments]:
        """This rank's samples of the steps `first` .. `last` - 1, [K, S / K], and their segments [N].

        With a budget of tokens each rank looks at the lengths of the whole batch: which sample goes to which
        rank depends on all of them.
        """
        begin, size = self.mixture.batch(first)
        per_rank, rank = (size, 0) if self.micro_tokens else (size // self.world, self.rank)
        steps = np.arange(last - first)[:, None]  # [K, 1]
        samples = begin + steps * size + rank * per_rank + np.arange(per_rank)  # [K, S / K]
        return samples, self.mixture.segments(phase, samples.ravel())

    def _assign(self, sizes: Ints) -> tuple[Ints, list[int]]:
        """Which samples of a step, of these sizes in tokens [S / K], are this rank's, micro-batch by
        micro-batch, and how many each of those has. Equal lengths stand side by side: attention computes
        them as one batch."""
        if not self.micro_tokens:
            return np.argsort(sizes, kind="stable"), [self.micro_batch] * (len(sizes) // self.micro_batch)
        micro_batch = balance(sizes, self.micro_tokens, self.world)  # [S / K], of all ranks
        mine = np.flatnonzero(micro_batch % self.world == self.rank)
        number = micro_batch[mine] // self.world  # counted on this rank
        return mine[np.lexsort((sizes[mine], number))], np.bincount(number).tolist()

    def _read(self, segments: Segments, begins: Ints, size: int) -> tuple[Ints, Bools | None]:
        """The tokens of the segments [N], each from its index of `begins` [N] on, in an array of `size`, and
        in another whether they begin words, where the loader `reads_words`.

        What no segment fills ([CLS], [SEP]) is undefined. Reads each shard in one call: the numpy view of a
        shard is on a memory map, and a call costs more than the tokens of a segment.
        """
        tokens = np.empty(size, np.int64)
        word_starts = np.empty(size, np.bool_) if self.reads_words else None
        shard = np.searchsorted(self.shard_start, segments.start, side="right") - 1  # [N]
        order = np.argsort(shard, kind="stable")
        shard, length = shard[order], segments.length[order]  # [N] by shard
        source = spread(segments.start[order] - self.shard_start[shard], length)  # [sum of length] in a shard
        target = spread(begins[order], length)  # [sum of length] in `tokens`
        edges = np.flatnonzero(np.diff(shard, prepend=-1))  # [shards here] the first segment of each
        token_edges = np.append((np.cumsum(length) - length)[edges], len(source)).tolist()
        for number, begin, end in zip(shard[edges].tolist(), token_edges, token_edges[1:], strict=False):
            # clip: a damaged shard must not end the process; its digest tells.
            there = source[begin:end]
            read = self.shard_tokens[number].take(there, mode="clip")
            tokens[target[begin:end]] = read
            if word_starts is not None:
                bits = self.shard_words[number]
                word_starts[target[begin:end]] = (
                    self.rules.starts_word[read]
                    if bits is None
                    else bits.take(there >> 3, mode="clip") >> (there & 7).astype(np.uint8) & 1
                )
        return tokens, word_starts

    def iterate(self, start_step: int, stop_step: int) -> Generator[tuple[int, list[MicroBatch]], None, None]:
        """Yields (k, step(k)) for k = start_step .. stop_step - 1, made ahead in a background thread, in
        pinned memory where there is CUDA. An error of the thread is raised here; leaving the loop,
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
                    phase = self.mixture.phase_of(step)
                    per_rank = self.mixture.batch(step)[1] // self.world  # samples
                    end = step + max(1, TOKENS_AT_ONCE // (per_rank * phase.max_length))
                    for batches in self.steps(phase, step, min(end, self.mixture.end_of(step), stop_step)):
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


def balance(sizes: Ints, budget: int, world: int) -> Ints:
    """The micro-batch [S] of samples of these sizes [S] in tokens: none above `budget`, a multiple of `world`
    in all, as few as can be.

    From the longest to the shortest sample, one to each micro-batch, and back in reverse: 4 of them get
    0 1 2 3, 3 2 1 0, 0 1 2 3, ..., so that their sums differ by a few tokens.
    """
    order = np.argsort(-sizes, kind="stable")
    number = world * -(-int(sizes.sum()) // (budget * world))
    while True:
        round_, column = np.divmod(np.arange(len(sizes)), number)
        micro_batch = np.empty(len(sizes), np.int64)
        micro_batch[order] = np.where(round_ & 1, number - 1 - column, column)
        if np.bincount(micro_batch, sizes).max() <= budget:
            return micro_batch
        number += world


def _fill_up(values: npt.NDArray[Any], indices: Ints, room: Ints, fill: float) -> npt.NDArray[Any]:
    """Puts `values` [P] at `indices` [P] of an array as long as all the `room` [M], and `fill` elsewhere."""
    filled = np.full(int(room.sum()), fill, values.dtype)
    filled[indices] = values
    return filled


def _reorder(segments: Segments, order: Ints) -> Segments:
    """The segments of the samples `order` [S], in that order."""
    count = np.bincount(segments.sample)  # [S]
    if (count == count[0]).all():  # the same number of segments in each sample
        index = (order[:, None] * count[0] + np.arange(count[0])).ravel()  # [N]
    else:
        first = np.cumsum(count) - count
        index = spread(first[order], count[order])  # [N]
    sample = np.repeat(np.arange(len(order)), count[order])  # [N]
    label = None if segments.label is None else segments.label[order]
    return Segments(segments.start[index], segments.length[index], segments.kind[index], sample, label)
