"""Batches as a pure function of (data, seed, step), for the loop that trains and the held-out loss.

    sizes = {"global_batch": 256, "micro_batch": 32, "rank": 0, "world": 1}
    loader = Loader(dataset, tokenizer, config.samples, seed=0, **sizes)
    for step, micro_batches in loader.iterate(start_step=0, stop_step=1000): ...

Global step k holds the samples k * global_batch .. (k + 1) * global_batch - 1 of the plan, whatever the
number of ranks: to resume is to begin at another step. Batches are made ahead by one background thread.

S: samples, T: tokens, P: masked positions.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bertscale.config import SamplesConfig
from bertscale.masking import Ints, mask_rules, mask_tokens
from bertscale.samples import PairPlan, Pairs, check_batch
from bertscale.shards import Dataset
from bertscale.tokenizer import Tokenizer

AHEAD = 4  # steps made ahead


@dataclass(frozen=True)
class MicroBatch:
    """S samples `[CLS] A [SEP] B [SEP]` laid end to end, without padding."""

    tokens: Tensor  # int64 [T], masked input
    token_types: Tensor  # int64 [T], 0 for [CLS] A [SEP], 1 for B [SEP]
    positions: Tensor  # int64 [T], 0, 1, ... within each sample
    lengths: tuple[int, ...]  # S sample lengths in tokens, on the host
    target_positions: Tensor  # int64 [P], ascending, into tokens; P may be 0
    targets: Tensor  # int64 [P], the original ids there
    next_sentence_label: Tensor  # int64 [S], 0 = B continues A, 1 = B is random

    def to(self, device: torch.device | str) -> MicroBatch:
        """On `device`; from pinned memory the copy runs beside the computation."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> MicroBatch:
        """In page-locked memory; needs CUDA."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, change: Callable[[Tensor], Tensor]) -> MicroBatch:
        return MicroBatch(
            tokens=change(self.tokens),
            token_types=change(self.token_types),
            positions=change(self.positions),
            lengths=self.lengths,
            target_positions=change(self.target_positions),
            targets=change(self.targets),
            next_sentence_label=change(self.next_sentence_label),
        )


class Loader:
    """This data-parallel rank's share of every global step; `rank` and `world` count those ranks only.

    `data_wait` is the time in seconds that callers of `iterate` have waited for a batch.
    Raises UserError where the batch does not divide (`check_batch`) or the data makes no pairs.
    """

    def __init__(
        self,
        dataset: Dataset,
        tokenizer: Tokenizer,
        samples: SamplesConfig,
        *,
        global_batch: int,
        micro_batch: int,
        seed: int,
        rank: int,
        world: int,
    ) -> None:
        check_batch(global_batch, micro_batch, world)
        self.global_batch, self.micro_batch, self.seed = global_batch, micro_batch, seed
        self.share = global_batch // world  # samples
        self.offset = rank * self.share
        self.cls_id, self.sep_id = tokenizer.cls_id, tokenizer.sep_id
        self.plan = PairPlan(dataset, samples.max_length, seed)
        self.rules = mask_rules(
            vocab_size=tokenizer.vocab_size,
            mask_id=tokenizer.mask_id,
            special_ids=tokenizer.special_ids,
            mask_rate=samples.mask_rate,
            mask_token_rate=samples.mask_token_rate,
            random_token_rate=samples.random_token_rate,
        )
        self.shard_tokens = [shard.tokens for shard in dataset.shards]
        sizes = [len(tokens) for tokens in self.shard_tokens]
        self.shard_start = np.cumsum([0, *sizes[:-1]])  # number of each shard's first token
        self.data_wait = 0.0

    def step(self, k: int) -> list[MicroBatch]:
        """This rank's micro-batches of global step `k`, shorter samples first."""
        begin = k * self.global_batch + self.offset
        samples = np.arange(begin, begin + self.share)
        pairs = self.plan.pairs(samples)
        # Equal lengths sit together, which lets attention take them as one batch.
        order = np.argsort(pairs.a_length + pairs.b_length, kind="stable")
        samples, pairs = samples[order], Pairs(*(values[order] for values in pairs))
        lengths = pairs.a_length + pairs.b_length + 3
        ends = np.cumsum(lengths)
        starts = ends - lengths
        tokens = self._read(pairs, starts, ends)
        masked, places, targets = mask_tokens(tokens, lengths, samples, self.rules, self.seed)
        types = np.repeat(
            np.tile(np.array([0, 1]), self.share),
            np.stack([pairs.a_length + 2, pairs.b_length + 1], axis=1).ravel(),
        )
        positions = np.arange(len(tokens)) - np.repeat(starts, lengths)

        batches = []
        for row in range(0, self.share, self.micro_batch):
            rows = slice(row, row + self.micro_batch)
            start, end = int(starts[row]), int(ends[rows][-1])
            chosen = slice(*np.searchsorted(places, [start, end]))
            batches.append(
                MicroBatch(
                    tokens=torch.from_numpy(masked[start:end]),
                    token_types=torch.from_numpy(types[start:end]),
                    positions=torch.from_numpy(positions[start:end]),
                    lengths=tuple(lengths[rows].tolist()),
                    target_positions=torch.from_numpy(places[chosen] - start),
                    targets=torch.from_numpy(targets[chosen]),
                    next_sentence_label=torch.from_numpy(pairs.next_sentence_label[rows]),
                )
            )
        return batches

    def _read(self, pairs: Pairs, starts: Ints, ends: Ints) -> Ints:
        """The unmasked tokens of the samples, end to end [T]."""
        tokens = np.empty(int(ends[-1]), np.int64)
        tokens[starts] = self.cls_id
        tokens[starts + pairs.a_length + 1] = self.sep_id
        tokens[ends - 1] = self.sep_id
        source = np.concatenate([pairs.a_start, pairs.b_start])
        length = np.concatenate([pairs.a_length, pairs.b_length])
        target = np.concatenate([starts + 1, starts + pairs.a_length + 2])
        shard = np.searchsorted(self.shard_start, source, side="right") - 1
        source -= self.shard_start[shard]
        for s, at, to, size in zip(
            shard.tolist(), source.tolist(), target.tolist(), length.tolist(), strict=True
        ):
            tokens[to : to + size] = self.shard_tokens[s][at : at + size]
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
                for k in range(start_step, stop_step):
                    batches = self.step(k)
                    if device is not None:
                        batches = [batch.pin_memory() for batch in batches]
                    if stop.is_set():
                        return
                    ready.put((k, batches))
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
