"""Which tokens make which sample: the plan of next-sentence pairs, a pure function of (data, seed, sample).

Documents are cut into chunks of consecutive sentences that fill one sample, once, at open. An epoch is
a keyed permutation of the chunks. Sample p (0, 1, 2, ... through all epochs) takes the first sentences
of its chunk as segment A; segment B is the rest of the chunk (p even) or a run of sentences of another
document (p odd), so every even number of neighbouring samples is exactly half random. The draws follow
the data creation published with BERT (Devlin et al. 2019); nothing is stored, nothing moves along.

    plan = PairPlan(open_dataset("runs/data", "train"), max_length=128, seed=0)
    pairs = plan.pairs(np.arange(256))

S: samples, n: chunks, D: documents. Sentences and tokens are numbered through all shards of the split.
"""

from __future__ import annotations

from functools import lru_cache
from math import isqrt
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from bertscale.config import UserError
from bertscale.masking import Draw, Ints, draw_below, philox4x32, words_of
from bertscale.shards import Dataset

_ORDER_ROUNDS = 8
_REMEDIES = {
    "train": "separate the documents of the input, or add some",
    "validation": "raise validation_fraction of `bertscale prep`, or add documents",
}


class Pairs(NamedTuple):
    """S samples as token ranges: segment A and segment B, each at least one token long."""

    a_start: Ints  # [S] number of the first token
    a_length: Ints  # [S] tokens
    b_start: Ints
    b_length: Ints
    next_sentence_label: Ints  # [S] as in Hugging Face: 0 = B continues A, 1 = B is random


class PairPlan:
    """Next-sentence pairs of at most `max_length` tokens, [CLS] and two [SEP] included.

    Raises UserError where the data cannot make a pair. Holds 8 bytes for each sentence, 8 for each
    document and 12 for each chunk.
    """

    def __init__(self, dataset: Dataset, max_length: int, seed: int) -> None:
        self.budget = max_length - 3  # tokens of A and B together
        self.seed = seed
        self.sentence_start, self.document_start = _sentences(dataset)
        self.num_documents = len(self.document_start) - 1
        sentences = np.diff(self.document_start)
        self.single_sentence_documents = int((sentences == 1).sum())  # partners only, never a chunk
        if self.num_documents < 2:
            raise UserError(
                f"the {dataset.split} split of {dataset.folder} holds {self.num_documents} document(s) with "
                "text; next-sentence pairs need at least two: " + _REMEDIES[dataset.split]
            )
        first, last = _chunks(self.sentence_start, self.document_start, self.budget)
        pair = last - first >= 2
        self.single_sentence_chunks = int((~pair).sum())  # left out: there is nothing to split
        self.chunk_first = first[pair]  # [n] number of the first sentence
        self.chunk_sentences = (last - first)[pair].astype(np.int32)
        self.num_chunks = len(self.chunk_first)  # samples in an epoch
        if not self.num_chunks:
            raise UserError(
                f"none of the {self.num_documents:,} documents of the {dataset.split} split of "
                f"{dataset.folder} has two sentences side by side that fit into "
                f"samples.max_length={max_length}; next-sentence pairs need such documents"
            )

    def pairs(self, samples: Ints) -> Pairs:
        """The pairs of the samples of these numbers [S]; a batch may reach over epochs."""
        epoch, place = np.divmod(samples, self.num_chunks)
        chunk = np.empty_like(place)
        for one in np.unique(epoch):
            rows = epoch == one
            chunk[rows] = permute(place[rows], self.num_chunks, self.seed, int(one))
        low, high = words_of(samples)
        words = philox4x32(0, low, high, Draw.PAIR, self.seed)  # [S, 4]

        start = self.sentence_start
        first = self.chunk_first[chunk]
        count = self.chunk_sentences[chunk]
        split = first + 1 + draw_below(count - 1, words[:, 0])  # first sentence of a real B
        a_start, b_start = start[first], start[split]
        a_length, b_length = b_start - a_start, start[first + count] - b_start

        label = samples & 1
        rows = np.flatnonzero(label)
        own = np.searchsorted(self.document_start, first[rows], side="right") - 1
        other = draw_below(self.num_documents - 1, words[rows, 1], finer=words[rows, 3])
        other += other >= own
        begin, end = self.document_start[other], self.document_start[other + 1]
        begin += draw_below(end - begin, words[rows, 2])
        # Whole sentences until the room that A leaves is filled. A chunk stops with the sentence that
        # fills the budget and A lacks that one, so there is room for a token at least.
        filled = np.searchsorted(start, start[begin] + self.budget - a_length[rows])
        b_start[rows] = start[begin]
        b_length[rows] = start[np.minimum(filled, end)] - start[begin]

        cut_a, cut_b = _cuts(a_length, b_length, self.budget)
        a_start += _heads(cut_a, 0, low, high, self.seed)
        b_start += _heads(cut_b, 1, low, high, self.seed)
        return Pairs(a_start, a_length - cut_a, b_start, b_length - cut_b, label)


def check_batch(global_batch: int, micro_batch: int, world: int) -> int:
    """Micro-batches of one rank in one step, for `world` data-parallel ranks.

    Raises UserError, with sizes that would do, where the global batch (samples) does not divide.
    """
    unit = world * micro_batch
    if global_batch % 2:
        raise UserError(f"train.global_batch={global_batch} is odd: exactly half of it are random pairs")
    if global_batch % unit == 0:
        return global_batch // unit
    even = unit * (1 + unit % 2)
    sizes = [str(size) for size in (global_batch // even * even, -(-global_batch // even) * even) if size]
    message = (
        f"train.global_batch={global_batch} is not a multiple of {unit} ({world} data-parallel rank(s) x "
        f"train.micro_batch={micro_batch}); train.global_batch={' or '.join(sizes)} would do"
    )
    if global_batch % world == 0:
        share = global_batch // world
        fit = max(size for size in range(1, min(share, micro_batch) + 1) if share % size == 0)
        message += f", or train.micro_batch={fit}"
    raise UserError(message)


def permute(place: Ints, size: int, seed: int, epoch: int) -> Ints:
    """Where `place` (each in 0 .. size - 1) goes in the epoch's permutation of 0 .. size - 1.

    A Feistel network on a grid of a x b >= size cells with modular addition, walked on where it leaves
    the range (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002): any place is computed
    alone, so an epoch of any size starts at once, takes no memory, and is the same on every machine.
    """
    a = isqrt(size - 1) + 1  # the square root, rounded up
    b = -(-size // a)
    keys = _round_keys(seed, epoch)
    here = place.astype(np.uint64)
    astray = np.arange(len(here))
    while len(astray):  # a x b - size < a cells lie outside: seldom more than two turns
        right, left = np.divmod(here[astray], np.uint64(a))
        for turn in range(0, _ORDER_ROUNDS, 2):
            left = (left + _mix(right + keys[turn]) % np.uint64(a)) % np.uint64(a)
            right = (right + _mix(left + keys[turn + 1]) % np.uint64(b)) % np.uint64(b)
        here[astray] = left + np.uint64(a) * right
        astray = astray[here[astray] >= size]
    return here.astype(np.int64)


@lru_cache(maxsize=16)
def _round_keys(seed: int, epoch: int) -> npt.NDArray[np.uint64]:
    low, high = epoch & 0xFFFFFFFF, epoch >> 32
    words = philox4x32(np.arange(_ORDER_ROUNDS), low, high, Draw.ORDER, seed).astype(np.uint64)
    return words[:, 0] << np.uint64(32) | words[:, 1]


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finaliser of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _sentences(dataset: Dataset) -> tuple[Ints, Ints]:
    """First token of each sentence [sentences + 1] and first sentence of each document [D + 1],
    with the total behind each; documents without a sentence are left out."""
    sentence_parts: list[Ints] = []
    document_parts: list[Ints] = []
    tokens = sentences = 0
    for shard in dataset.shards:
        lengths, offsets = shard.sentence_lengths, shard.sentence_offsets.astype(np.int64)
        ends = np.cumsum(lengths, dtype=np.int64)
        bounds = np.concatenate([np.zeros(1, np.int64), ends])
        found = bounds.take(offsets, mode="clip")  # a damaged offset may point anywhere
        if (lengths == 0).any() or not np.array_equal(found, shard.token_offsets):
            raise UserError(
                f"the shard {shard.path} is damaged: its sentences do not add up to its documents; "
                "delete it and run `bertscale prep` again"
            )
        sentence_parts.append(bounds[:-1] + tokens)
        document_parts.append(offsets[:-1][np.diff(offsets) > 0] + sentences)
        tokens += int(bounds[-1])
        sentences += len(lengths)
    return (
        np.concatenate([*sentence_parts, np.array([tokens])]),
        np.concatenate([*document_parts, np.array([sentences])]),
    )


def _chunks(sentence_start: Ints, document_start: Ints, budget: int) -> tuple[Ints, Ints]:
    """Cuts each document from its start into runs of sentences that reach the budget, or end with the
    document. Returns the first sentence of each chunk and the one behind its last, in text order."""
    firsts: list[Ints] = []
    lasts: list[Ints] = []
    here, stop = document_start[:-1], document_start[1:]
    while len(here):  # one turn cuts the next chunk of every document that is not finished
        last = np.minimum(np.searchsorted(sentence_start, sentence_start[here] + budget), stop)
        firsts.append(here)
        lasts.append(last)
        more = last < stop
        here, stop = last[more], stop[more]
    first, last = np.concatenate(firsts), np.concatenate(lasts)
    order = np.argsort(first)
    return first[order], last[order]


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
