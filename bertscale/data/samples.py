"""Which tokens make which sample: the samplers of every kind, pure functions of (data, seed, sample).

| kind     | a sample                                                                  | label          |
| -------- | ------------------------------------------------------------------------- | -------------- |
| nsp      | [CLS] A [SEP] B [SEP]: B follows A, or is of another document of the window | 1 = another   |
| sop      | [CLS] A [SEP] B [SEP]: segments side by side, in order or swapped         | 1 = swapped    |
| document | [CLS] A [SEP]: consecutive sentences of one document                      | none           |
| packed   | [CLS] A [SEP] [CLS] B [SEP] ...: max_length tokens of several documents   | none           |

nsp follows the data creation published with BERT (Devlin et al. 2019), sop that of ALBERT (Lan et al.
2020); samples with even numbers keep their segments, those with odd numbers do not, so an even number
of neighbours is exactly half and half. Nothing is stored, nothing moves along.

    sampler = Sampler(open_dataset("runs/data", "train"), "nsp", max_length=128, window_blocks=64, seed=0)
    segments = sampler.segments(np.arange(256), np.arange(256))

S: samples, N: segments, D: documents. Tokens are numbered through all shards of the split.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from bertscale.config import PAIRS, PretrainConfig, UserError
from bertscale.data.chunks import FORMS, Blocks, Table, read_ahead
from bertscale.data.index import BlockIndex, Peers, load_index
from bertscale.data.masking import Draw, Ints, draw_below, philox4x32, words_of
from bertscale.data.order import Order
from bertscale.data.shards import Dataset

_REMEDIES = {
    "train": "separate the documents of the input, or add some",
    "validation": "raise validation_fraction of `bertscale prep`, or add documents",
}


class Segments(NamedTuple):
    """S samples as ranges of tokens, sample after sample; each segment is followed by [SEP]."""

    start: Ints  # [N] number of the first token
    length: Ints  # [N] tokens, at least one
    kind: Ints  # [N] 0: [CLS] stands before it and a sequence begins; 1: it is a second segment
    row: Ints  # [N] its sample, 0 .. S - 1, ascending
    label: Ints | None  # [S] see the module; None where the kind has none


class Sampler:
    """The samples of one corpus at one length; `num_samples` of them make an epoch.

    `phase` tells apart the samplers of a run that trains on several lengths, one after another. Raises
    UserError where the data makes no sample. Holds the index and the tables of two windows.
    """

    def __init__(
        self,
        dataset: Dataset,
        kind: str,
        max_length: int,
        window_blocks: int,
        seed: int,
        phase: int = 0,
        peers: Peers | None = None,
        index: BlockIndex | None = None,
    ) -> None:
        self.dataset, self.kind, self.max_length, self.seed = dataset, kind, max_length, seed
        self.form = FORMS[kind]
        self.index = index or load_index(dataset, self.form, max_length, peers)
        self.num_documents = int(self.index.documents.sum(dtype=np.int64))
        # Documents that make no sample of their own; with nsp they still are other samples' B.
        self.left_out = int(self.index.one_token.sum(dtype=np.int64)) if kind in PAIRS else 0
        self._check()
        # Another document is sought in the window, so a window has two blocks at least, if there are two.
        window_blocks = max(window_blocks, 2) if kind == "nsp" else window_blocks
        self.order = Order(self.index.samples.astype(np.int64), window_blocks, seed, phase)
        self.num_samples = self.order.num_samples
        self.blocks = Blocks(*(column.astype(np.int64) for column in self.index[:3]))
        self._table = lru_cache(maxsize=2)(self._make_table)
        self._reading = (-1, -1)  # the last window that came

    def _check(self) -> None:
        where = f"the {self.dataset.split} split of {self.dataset.folder}"
        needed = 2 if self.kind == "nsp" else 1
        if self.num_documents < needed:
            raise UserError(
                f"{where} holds {self.num_documents} document(s) with text; samples.kind={self.kind} needs "
                f"at least {('one', 'two')[needed - 1]}: {_REMEDIES[self.dataset.split]}"
            )
        if not self.index.samples.any():
            raise UserError(f"the {self.num_documents:,} documents of {where} have one token each: no pairs")

    def segments(self, numbers: Ints, samples: Ints) -> Segments:
        """The samples `numbers` [S] of this sampler, which count on through the epochs. Draws and labels
        go by `samples` [S], their numbers in the run."""
        parts, rows = [], []
        for stretch in self.order.find(numbers):
            table = self._table(tuple(stretch.blocks.tolist()))
            if self._reading < (stretch.epoch, stretch.window):
                self._reading = (stretch.epoch, stretch.window)
                if self.order.num_windows > 1:
                    read_ahead(
                        self.dataset, self.blocks, self.order.blocks(stretch.epoch, stretch.window + 1)
                    )
            part = self._segments(table, stretch.places, samples[stretch.rows])
            parts.append(part)
            rows.append(stretch.rows[part.row])
        label = samples & 1 if self.kind in PAIRS else None
        if len(parts) == 1:
            return parts[0]._replace(label=label)
        row = np.concatenate(rows)
        order = np.argsort(row, kind="stable")
        start, length, kind = (np.concatenate(column)[order] for column in list(zip(*parts, strict=True))[:3])
        return Segments(start, length, kind, row[order], label)

    def _make_table(self, blocks: tuple[int, ...]) -> Table:
        return Table(self.dataset, self.blocks, np.array(blocks, np.int64), self.form, self.max_length)

    def _segments(self, table: Table, places: Ints, samples: Ints) -> Segments:
        if self.kind == "packed":
            return _packed(table, places)
        if self.kind == "document":
            first, last = table.chunk_first[places], table.chunk_last[places]
            start, end = table.unit_start[first], table.unit_start[last]
            rows = np.arange(len(places))
            return Segments(table.locate(start), end - start, np.zeros_like(rows), rows, None)
        return _pairs(table, places, samples, self.seed, other_documents=self.kind == "nsp")


def check_batches(config: PretrainConfig, world: int) -> int:
    """`check_batch` of the batch and of each one of the warm-up before it; what it says of the batch."""
    train, pairs = config.train, config.samples.has_pairs
    for _, samples in train.batch_warmup:
        check_batch(samples, train.micro_samples, world, pairs, "a batch of train.batch_warmup")
    return check_batch(train.global_batch, train.micro_samples, world, pairs)


def check_batch(
    global_batch: int,
    micro_batch: int | None,
    world: int,
    pairs: bool = True,
    key: str = "train.global_batch",
) -> int:
    """Micro-batches of one rank in one step, for `world` data-parallel ranks; without `micro_batch`,
    which a budget of tokens replaces, samples of one rank.

    Raises UserError, with sizes that would do, where the global batch (samples) does not divide, or is
    odd though half of it are to be other `pairs`.
    """
    unit = world * (micro_batch or 1)
    if pairs and global_batch % 2:
        raise UserError(f"{key}={global_batch} is odd: exactly half of it are other pairs")
    if global_batch % unit == 0:
        return global_batch // unit
    even = unit * (1 + unit % 2) if pairs else unit
    sizes = [str(size) for size in (global_batch // even * even, -(-global_batch // even) * even) if size]
    each = f" x train.micro_batch={micro_batch}" if micro_batch else ""
    message = (
        f"{key}={global_batch} is not a multiple of {unit} ({world} data-parallel rank(s){each}); "
        f"{key}={' or '.join(sizes)} would do"
    )
    if micro_batch and global_batch % world == 0:
        share = global_batch // world
        fit = max(size for size in range(1, min(share, micro_batch) + 1) if share % size == 0)
        message += f", or train.micro_batch={fit}"
    raise UserError(message)


def _pairs(table: Table, places: Ints, samples: Ints, seed: int, *, other_documents: bool) -> Segments:
    """Segments A and B of each sample, cut to the budget as published."""
    low, high = words_of(samples)
    words = philox4x32(0, low, high, Draw.PAIR, seed)  # [S, 4]
    start, budget = table.unit_start, table.budget
    first, last = table.chunk_first[places], table.chunk_last[places]
    a_start, end = start[first], start[last]
    # A unit that is alone is split between two of its tokens.
    by_unit = start[first + 1 + draw_below(np.maximum(last - first - 1, 1), words[:, 0])]
    by_token = a_start + 1 + draw_below(end - a_start - 1, words[:, 0])
    b_start = np.where(last - first > 1, by_unit, by_token)
    a_length, b_length = b_start - a_start, end - b_start

    odd = np.flatnonzero(samples & 1)
    if other_documents:
        alone = odd[(last - first == 1)[odd]]
        a_length[alone] = end[alone] - a_start[alone]
        own = np.searchsorted(table.document_unit, first[odd], side="right") - 1
        other = draw_below(table.num_documents - 1, words[odd, 1], finer=words[odd, 3])
        other += other >= own
        begin, stop = table.document_unit[other], table.document_unit[other + 1]
        begin += draw_below(stop - begin, words[odd, 2])
        # Whole units until the room that A leaves is filled, one at least.
        room = np.maximum(budget - a_length[odd], 1)
        filled = np.searchsorted(start, start[begin] + room)
        b_start[odd] = start[begin]
        b_length[odd] = start[np.minimum(filled, stop)] - start[begin]
    else:
        a_start[odd], b_start[odd] = b_start[odd], a_start[odd]
        a_length[odd], b_length[odd] = b_length[odd], a_length[odd]

    cut_a, cut_b = _cuts(a_length, b_length, budget)
    a_start += _heads(cut_a, 0, low, high, seed)
    b_start += _heads(cut_b, 1, low, high, seed)
    rows = np.arange(2 * len(places))
    return Segments(
        start=table.locate(np.stack([a_start, b_start], axis=1).ravel()),
        length=np.stack([a_length - cut_a, b_length - cut_b], axis=1).ravel(),
        kind=rows & 1,
        row=rows >> 1,
        label=None,
    )


def _packed(table: Table, places: Ints) -> Segments:
    """The bins `places` [S]: each is `budget` places of the stream between a [CLS] and a [SEP].

    The stream is all documents end to end with two places between them, for the [SEP] and the [CLS] there.
    Documents of 3 and 4 tokens and bins of 6 places:

        place in the stream   0 1 2 3 4 5 | 6 7 8 ...
        token                 a b c - - d | e f g         -> [CLS] a b c [SEP] [CLS] d [SEP], [CLS] e f g ...

    Where a bin begins or ends inside the two places, the sequence without a token is left out.
    """
    bin_begin = places * table.budget  # [S] in the stream
    bin_end = bin_begin + table.budget  # [S]
    length = np.diff(table.document_start)  # [D]
    # The documents that have a token in each bin: those that end behind its begin and begin before its end.
    first = np.searchsorted(table.stream_start + length, bin_begin, side="right")  # [S]
    last = np.searchsorted(table.stream_start, bin_end)  # [S]
    row = np.repeat(np.arange(len(places)), last - first)  # [N] the bin of each segment
    document = spread(first, last - first)  # [N]
    # What of the document lies inside of the bin.
    document_begin = table.stream_start[document]  # [N]
    begin = np.maximum(document_begin, bin_begin[row])  # [N]
    end = np.minimum(document_begin + length[document], bin_end[row])  # [N]
    start = table.document_start[document] + begin - document_begin  # [N] in the table's tokens
    return Segments(table.locate(start), end - begin, np.zeros_like(row), row, None)


def spread(first: Ints, count: Ints) -> Ints:
    """first[0], first[0] + 1, ... (count[0] of them), first[1], ..."""
    ends = np.cumsum(count)
    numbers = np.repeat(first - (ends - count), count)
    numbers += np.arange(len(numbers))
    return numbers


def _cuts(a: Ints, b: Ints, budget: int) -> tuple[Ints, Ints]:
    """Tokens to take from A and from B until both fit the budget, each from the longer, B at a tie."""
    excess = np.maximum(a + b - budget, 0)
    level_a = np.minimum(excess, np.maximum(a - b, 0))
    level_b = np.minimum(excess, np.maximum(b - a, 0))
    rest = excess - level_a - level_b
    return level_a + rest // 2, level_b + (rest + 1) // 2


def _heads(flips: Ints, segment: int, low: Ints, high: Ints, seed: int) -> Ints:
    """How many of `flips` [S] fair coins of each sample fall heads: tokens cut from the front, the
    others from the back. Counts the ones among that many random bits, so the law is exact."""
    blocks = (flips + 127) // 128  # a Philox counter gives 128 bits
    row = np.repeat(np.arange(len(flips)), blocks)
    block = np.arange(len(row)) - (np.cumsum(blocks) - blocks)[row]
    words = philox4x32(2 * block + segment, low[row], high[row], Draw.CUT, seed)  # [N, 4]
    wanted = np.clip((flips[row] - 128 * block)[:, None] - 32 * np.arange(4), 0, 32).astype(np.uint64)
    bits = words.astype(np.uint64) & ((np.uint64(1) << wanted) - np.uint64(1))
    return np.bincount(row, np.bitwise_count(bits).sum(axis=1), minlength=len(flips)).astype(np.int64)
