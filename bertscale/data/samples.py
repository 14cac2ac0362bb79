"""Which tokens make which sample: the samplers of every kind, pure functions of (data, seed, sample).

| kind     | a sample                                                                  | label          |
| -------- | ------------------------------------------------------------------------- | -------------- |
| nsp      | [CLS] A [SEP] B [SEP]: B follows A, or is of another document of the window | 1 = another   |
| sop      | [CLS] A [SEP] B [SEP]: segments side by side, in order or swapped         | 1 = swapped    |
| document | [CLS] A [SEP]: consecutive sentences of one document                      | none           |
| packed   | [CLS] A [SEP] [CLS] B [SEP] ...: max_length tokens of several documents   | none           |

nsp follows the data creation published with BERT (Devlin et al. 2019), sop that of ALBERT (Lan et al.
2020); samples with even numbers keep their segments, those with odd numbers do not, so an even number
of neighbours is exactly half and half. Nothing is stored, no state is carried from sample to sample.

    sampler = Sampler(open_dataset("runs/data", "train"), "nsp", max_length=128, window_blocks=64, seed=0)
    segments = sampler.segments(np.arange(256), np.arange(256))

S: samples, N: segments, D: documents. Tokens are numbered through all shards of the split. Segment: A or B,
or a document's part in a packed sample. Block, chunk, bin and budget are those of `chunks`.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from bertscale.config import PAIRS, PretrainConfig, UserError
from bertscale.data.chunks import FORMS, Blocks, BlockSamples, read_ahead
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
    sample: Ints  # [N] whose it is, 0 .. S - 1, ascending
    label: Ints | None  # [S] see the module; None where the kind has none


class Sampler:
    """The samples of one corpus at one length; `num_samples` of them make an epoch.

    Documents of fewer than `min_tokens` tokens are left out. `phase` tells apart the samplers of a run that
    trains on several lengths, one after another. Raises UserError where the data makes no sample. Holds the
    index and the cut samples of two windows.
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
        min_tokens: int = 1,
    ) -> None:
        self.dataset, self.kind, self.max_length, self.seed = dataset, kind, max_length, seed
        self.form, self.min_tokens = FORMS[kind], min_tokens
        self.index = index or load_index(dataset, self.form, max_length, peers, min_tokens)
        self.num_documents = int(self.index.documents.sum(dtype=np.int64))
        # Documents that make no sample; with nsp they are still the B of other samples.
        self.left_out = int(self.index.one_token.sum(dtype=np.int64)) if kind in PAIRS else 0
        self._check()
        # B of another document comes from the same window, so that reads stay there: two blocks at least, if
        # there are two, for a block may hold a single document.
        window_blocks = max(window_blocks, 2) if kind == "nsp" else window_blocks
        self.order = Order(self.index.samples.astype(np.int64), window_blocks, seed, phase)
        self.num_samples = self.order.num_samples
        self.blocks = Blocks(*(column.astype(np.int64) for column in self.index[:3]))
        # Two: the samples of a step may come from the end of one window and the begin of the next.
        self._window = lru_cache(maxsize=2)(self._cut_window)
        self._latest = (-1, -1)  # epoch and window, the last ones that samples were asked of

    def _check(self) -> None:
        where = f"the {self.dataset.split} split of {self.dataset.folder}"
        needed = 2 if self.kind == "nsp" else 1
        if self.num_documents < needed:
            what, remedy = "with text", _REMEDIES[self.dataset.split]
            if self.min_tokens > 1:
                what = f"of samples.min_document_tokens={self.min_tokens} tokens or more"
                remedy = f"lower samples.min_document_tokens, or {remedy}"
            raise UserError(
                f"{where} holds {self.num_documents} document(s) {what}; samples.kind={self.kind} needs "
                f"at least {('one', 'two')[needed - 1]}: {remedy}"
            )
        if not self.index.samples.any():
            raise UserError(f"the {self.num_documents:,} documents of {where} have one token each: no pairs")

    def segments(self, numbers: Ints, samples: Ints) -> Segments:
        """The samples `numbers` [S] of this sampler, which count on through the epochs, as segments [N].

        Draws and labels depend on `samples` [S], their numbers in the run. Reads the sentences, not the
        tokens, of the windows that the samples lie in, and has the next window read ahead.
        """
        parts, owners = [], []
        for part in self.order.find(numbers):
            window = self._window(tuple(part.blocks.tolist()))
            if self._latest < (part.epoch, part.window):
                self._latest = (part.epoch, part.window)
                if self.order.num_windows > 1:
                    read_ahead(self.dataset, self.blocks, self.order.blocks(part.epoch, part.window + 1))
            segments = self._segments(window, part.indices, samples[part.asked])
            parts.append(segments)
            owners.append(part.asked[segments.sample])  # 0 .. S - 1, no longer counted in the window alone
        label = samples & 1 if self.kind in PAIRS else None  # [S]
        if len(parts) == 1:
            return parts[0]._replace(label=label)
        owner = np.concatenate(owners)  # [N], by window
        order = np.argsort(owner, kind="stable")  # stable: A stays before B
        start, length, kind = (np.concatenate(column)[order] for column in list(zip(*parts, strict=True))[:3])
        return Segments(start, length, kind, owner[order], label)

    def _cut_window(self, blocks: tuple[int, ...]) -> BlockSamples:
        chosen = np.array(blocks, np.int64)
        return BlockSamples(self.dataset, self.blocks, chosen, self.form, self.max_length, self.min_tokens)

    def _segments(self, window: BlockSamples, index: Ints, samples: Ints) -> Segments:
        """The samples `index` [S] of a window."""
        if self.kind == "packed":
            return _packed(window, index)
        if self.kind == "document":
            first, end = window.chunk_first[index], window.chunk_end[index]  # [S] in sentences
            start, stop = window.sentence_start[first], window.sentence_start[end]  # [S] in tokens
            sample = np.arange(len(index))
            return Segments(window.locate(start), stop - start, np.zeros_like(sample), sample, None)
        return _pairs(window, index, samples, self.seed, other_documents=self.kind == "nsp")


def check_batches(config: PretrainConfig, world: int) -> int:
    """Checks the batch and each one of the warm-up before it; returns `check_batch` of the batch."""
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

    Raises UserError, with sizes that fit, where the global batch (samples) does not divide, or is odd
    although half of its `pairs` are to be random or swapped.
    """
    multiple = world * (micro_batch or 1)  # samples of all ranks' micro-batches
    if pairs and global_batch % 2:
        raise UserError(f"{key}={global_batch} is odd, but exactly half of its pairs are random or swapped")
    if global_batch % multiple == 0:
        return global_batch // multiple
    even = multiple * (1 + multiple % 2) if pairs else multiple
    sizes = [str(size) for size in (global_batch // even * even, -(-global_batch // even) * even) if size]
    factor = f" x train.micro_batch={micro_batch}" if micro_batch else ""
    message = (
        f"{key}={global_batch} is not a multiple of {multiple} ({world} data-parallel rank(s){factor}); "
        f"{key}={' or '.join(sizes)} would do"
    )
    if micro_batch and global_batch % world == 0:
        per_rank = global_batch // world
        fit = max(size for size in range(1, min(per_rank, micro_batch) + 1) if per_rank % size == 0)
        message += f", or train.micro_batch={fit}"
    raise UserError(message)


def _pairs(window: BlockSamples, index: Ints, samples: Ints, seed: int, *, other_documents: bool) -> Segments:
    """Segments A and B of the chunks `index` [S], cut to the budget as published; arrays are [S] or [odd].

    A chunk is divided between two of its sentences, A before and B behind. With an odd number the two change
    places (sop), or B comes from another document and begins with any of its sentences (nsp).
    """
    low, high = words_of(samples)
    words = philox4x32(0, low, high, Draw.PAIR, seed)  # [S, 4]
    start, budget = window.sentence_start, window.budget  # [U + 1]
    first, last = window.chunk_first[index], window.chunk_end[index]  # in sentences
    a_start, end = start[first], start[last]  # in tokens
    # A sentence that is alone in its chunk is divided between two of its tokens.
    by_sentence = start[first + 1 + draw_below(np.maximum(last - first - 1, 1), words[:, 0])]
    by_token = a_start + 1 + draw_below(end - a_start - 1, words[:, 0])
    b_start = np.where(last - first > 1, by_sentence, by_token)
    a_length, b_length = b_start - a_start, end - b_start

    odd = np.flatnonzero(samples & 1)  # [odd] random or swapped pairs
    if other_documents:
        # No part of the chunk's only sentence is needed for B: A is all of it.
        alone = odd[(last - first == 1)[odd]]
        a_length[alone] = end[alone] - a_start[alone]
        own = np.searchsorted(window.document_sentence, first[odd], side="right") - 1
        other = draw_below(window.num_documents - 1, words[odd, 1], finer=words[odd, 3])
        other += other >= own  # any document but its own, each as likely
        begin, stop = window.document_sentence[other], window.document_sentence[other + 1]
        begin += draw_below(stop - begin, words[odd, 2])
        # Whole sentences until the room that A leaves is filled, one at least.
        room = np.maximum(budget - a_length[odd], 1)
        filled = np.searchsorted(start, start[begin] + room)
        b_start[odd] = start[begin]
        b_length[odd] = start[np.minimum(filled, stop)] - start[begin]
    else:
        a_start[odd], b_start[odd] = b_start[odd], a_start[odd]
        a_length[odd], b_length[odd] = b_length[odd], a_length[odd]

    # Both ends of a segment lose tokens: what is cut from the front moves its start.
    cut_a, cut_b = _cuts(a_length, b_length, budget)
    a_start += _heads(cut_a, 0, low, high, seed)
    b_start += _heads(cut_b, 1, low, high, seed)
    number = np.arange(2 * len(index))  # [N] A and B of one sample, then of the next
    return Segments(
        start=window.locate(np.stack([a_start, b_start], axis=1).ravel()),  # 2 x [S] -> [N]
        length=np.stack([a_length - cut_a, b_length - cut_b], axis=1).ravel(),
        kind=number & 1,
        sample=number >> 1,
        label=None,
    )


def _packed(window: BlockSamples, index: Ints) -> Segments:
    """The bins `index` [S]: each is `budget` positions of the stream between a [CLS] and a [SEP].

    The stream is all documents end to end with two positions between them, for the [SEP] and the [CLS] there.
    Documents of 3 and 4 tokens and bins of 6 positions:

        stream position       0 1 2 3 4 5 | 6 7 8 ...
        token                 a b c - - d | e f g         -> [CLS] a b c [SEP] [CLS] d [SEP], [CLS] e f g ...

    Where a bin begins or ends inside the two positions, the sequence without a token is left out.
    """
    bin_begin = index * window.budget  # [S] in the stream
    bin_end = bin_begin + window.budget  # [S]
    length = np.diff(window.document_start)  # [D]
    # The documents that have a token in each bin: those that end behind its begin and begin before its end.
    first = np.searchsorted(window.stream_start + length, bin_begin, side="right")  # [S]
    last = np.searchsorted(window.stream_start, bin_end)  # [S]
    sample = np.repeat(np.arange(len(index)), last - first)  # [N] the bin of each segment
    document = spread(first, last - first)  # [N]
    # What of the document lies inside of the bin.
    document_begin = window.stream_start[document]  # [N]
    begin = np.maximum(document_begin, bin_begin[sample])  # [N]
    end = np.minimum(document_begin + length[document], bin_end[sample])  # [N]
    start = window.document_start[document] + begin - document_begin  # [N] in the window's tokens
    return Segments(window.locate(start), end - begin, np.zeros_like(sample), sample, None)


def spread(first: Ints, count: Ints) -> Ints:
    """Runs of consecutive numbers: first[0], first[0] + 1, ... (count[0] of them), first[1], ...

    One arange for all runs [sum of count], in place of a Python loop over them.
    """
    ends = np.cumsum(count)
    numbers = np.repeat(first - (ends - count), count)
    numbers += np.arange(len(numbers))
    return numbers


def _cuts(a: Ints, b: Ints, budget: int) -> tuple[Ints, Ints]:
    """Tokens to cut from A and from B [S] each, until both fit the budget: one after another from the longer
    one, B at a tie. The published loop in closed form: the longer one down to the other, then half each."""
    excess = np.maximum(a + b - budget, 0)
    level_a = np.minimum(excess, np.maximum(a - b, 0))
    level_b = np.minimum(excess, np.maximum(b - a, 0))
    rest = excess - level_a - level_b
    return level_a + rest // 2, level_b + (rest + 1) // 2


def _heads(flips: Ints, segment: int, low: Ints, high: Ints, seed: int) -> Ints:
    """How many of `flips` [S] fair coins of each sample fall heads: tokens cut from the front, the
    others from the back. Counts the ones among that many random bits, so the law is exact.

    C: Philox counters of all samples, 128 bits each.
    """
    counters = (flips + 127) // 128  # [S]
    sample = np.repeat(np.arange(len(flips)), counters)  # [C]
    number = np.arange(len(sample)) - (np.cumsum(counters) - counters)[sample]  # [C] in its sample
    words = philox4x32(2 * number + segment, low[sample], high[sample], Draw.CUT, seed)  # [C, 4]
    # Bits that count of each word: 32, fewer in the last one that is needed, none behind it.
    needed = np.clip((flips[sample] - 128 * number)[:, None] - 32 * np.arange(4), 0, 32).astype(np.uint64)
    bits = words.astype(np.uint64) & ((np.uint64(1) << needed) - np.uint64(1))  # [C, 4]
    return np.bincount(sample, np.bitwise_count(bits).sum(axis=1), minlength=len(flips)).astype(np.int64)
