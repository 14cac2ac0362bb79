"""The samples of a few blocks of documents: where chunks of sentences, or packed bins, begin and end.

Nothing here is random. A form is a way to cut documents into samples: `pairs` (samples.kind nsp and sop) are
chunks of sentences that reach the budget or end with their document, `document` are chunks that stay within
it, `packed` are bins of exactly max_length tokens, cut from documents laid end to end.

    cut = BlockSamples(dataset, index, blocks=np.arange(64), form="pairs", max_length=128)
    first, end = cut.sentence_start[cut.chunk_first], cut.sentence_start[cut.chunk_end]

Tokens are numbered through the given blocks, from 0; `locate` gives their numbers in the data set. A sentence
that is longer than a sample holds is divided as evenly as can be, and each part counts as a sentence.

    block     a run of whole documents of one shard, about 2**19 tokens: what is read from the disk at once
    chunk     consecutive sentences of one document that make one sample
    bin       `budget` positions of the packed stream that make one sample
    budget    tokens of a sample without its [CLS] and [SEP]

U: sentences, D: documents with text, long enough, B: blocks, R: runs of tokens that lie together,
n: samples.
"""

from __future__ import annotations

import ctypes
import mmap
from typing import Literal, NamedTuple

import numpy as np

from bertscale.config import UserError
from bertscale.data.masking import Bools, Ints
from bertscale.data.shards import Dataset, Shard

Form = Literal["pairs", "document", "packed"]
FORMS: dict[str, Form] = {"nsp": "pairs", "sop": "pairs", "document": "document", "packed": "packed"}
_libc = ctypes.CDLL(None)  # for madvise, which numpy's views of pyarrow's maps have no method for
SPECIALS = {"pairs": 3, "document": 2, "packed": 2}  # [CLS] and [SEP]s of a sample, at least


class Blocks(NamedTuple):
    """Blocks of about equal size, [B] each: rows `row` .. `row` + `rows` - 1 of a shard, a document each."""

    shard: Ints
    row: Ints  # first row of the shard
    rows: Ints


class BlockSamples:
    """The samples that some blocks of `dataset` make; `num_samples` of them, block after block.

    For pairs and documents: `sentence_start` [U + 1] (first token), `document_sentence` [D + 1] (first
    sentence), `chunk_first` and `chunk_end` [n] (first sentence, and one behind the last). For packed
    samples: `document_start` [D + 1] (first token) and `stream_start` [D], where the document begins in the
    stream that is cut into bins. Documents of fewer than `min_tokens` tokens are as if they were not there.
    Raises UserError for a shard whose columns contradict each other.
    """

    def __init__(
        self,
        dataset: Dataset,
        index: Blocks,
        blocks: Ints,
        form: Form,
        max_length: int,
        min_tokens: int = 1,
    ) -> None:
        self.budget = max_length - SPECIALS[form]
        shard_start = np.cumsum([0, *(shard.entry.tokens for shard in dataset.shards)])  # [shards + 1]
        where = [(index.shard[b], index.row[b], index.row[b] + index.rows[b]) for b in blocks.tolist()]
        offsets = [_offsets(dataset.shards[shard], row, stop) for shard, row, stop in where]
        # A row without text is no document here, nor is one that is too short.
        kept = [np.diff(edges) >= max(1, min_tokens) for edges in offsets]  # [rows] of each block
        lengths = [np.diff(edges)[keep] for edges, keep in zip(offsets, kept, strict=True)]
        sizes = np.array([tokens.sum() for tokens in lengths], np.int64)  # [B] tokens
        self.block_start = np.cumsum(sizes) - sizes  # [B] first token of each block
        # Runs: whole blocks, or documents where others between them are left out.
        first = [edges[:1] for edges in offsets]
        if min_tokens > 1:
            first = [edges[:-1][keep] for edges, keep in zip(offsets, kept, strict=True)]
            sizes = np.concatenate(lengths)
        begins = [shard_start[shard] + part for (shard, _, _), part in zip(where, first, strict=True)]
        self.run_start = np.cumsum(sizes) - sizes  # [R] first token of each run
        self.shift = np.concatenate(begins).astype(np.int64) - self.run_start  # [R] to the data set's number
        self.num_documents = sum(map(len, lengths))
        self.documents_per_block = np.array([len(tokens) for tokens in lengths])  # [B]
        self.one_token_documents = np.array([int((tokens == 1).sum()) for tokens in lengths])  # [B]
        if form == "packed":
            self._pack(lengths)
        else:
            self._read_sentences(dataset, where, offsets, kept)
            self._cut(form)

    def locate(self, token: Ints) -> Ints:
        """Numbers in the data set of tokens [N], which are given by their numbers in these blocks."""
        return token + self.shift[np.searchsorted(self.run_start, token, side="right") - 1]

    @property
    def num_samples(self) -> int:
        return int(self.samples_per_block.sum())

    def _pack(self, lengths: list[Ints]) -> None:
        """Lays documents end to end, with two positions for [SEP] [CLS] after each but a block's last.

        The stream of a block begins at the edge of a bin, so that its samples depend on no other block: a
        block costs at most one bin that is not full.
        """
        bins, starts, counts = 0, [], []
        for tokens in lengths:  # [D of the block]
            within_block = np.cumsum(tokens) - tokens + 2 * np.arange(len(tokens))
            starts.append(bins * self.budget + within_block)
            counts.append(-(-int(within_block[-1] + tokens[-1]) // self.budget) if len(tokens) else 0)
            bins += counts[-1]
        self.samples_per_block = np.array(counts, np.int64)  # [B]
        self.stream_start = np.concatenate(starts)
        self.document_start = np.concatenate([np.zeros(1, np.int64), np.cumsum(np.concatenate(lengths))])

    def _read_sentences(
        self, data: Dataset, where: list[tuple[int, int, int]], offsets: list[Ints], kept: list[Bools]
    ) -> None:
        """Sets `sentence_start` and `document_sentence`; divides sentences that are too long for a sample."""
        sentences, documents, number = [], [], 0
        for (shard, row, stop), edges, keep in zip(where, offsets, kept, strict=True):
            bounds = data.shards[shard].sentence_offsets[row : stop + 1].astype(np.int64)  # [rows + 1]
            lengths = data.shards[shard].sentence_lengths[bounds[0] : bounds[-1]].astype(np.int64)
            bounds -= bounds[0]
            ends = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
            # Sizes are checked at open, digests only on request: what contradicts itself is found here.
            document_ends = ends.take(bounds, mode="clip")  # a damaged offset may point anywhere
            agree = np.array_equal(document_ends, edges - edges[0]) and (np.diff(bounds) >= 0).all()
            if not lengths.all() or not agree:
                raise _damaged(data.shards[shard])
            if not keep.all():
                counts = np.diff(bounds)  # [rows]
                lengths = lengths[np.repeat(keep, counts)]
                bounds = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts[keep])])
            if lengths.max(initial=0) > self.budget:
                lengths, first = _even_parts(lengths, self.budget)
                bounds = first[bounds]
            sentences.append(lengths.astype(np.int32))  # half the memory while the blocks are collected
            documents.append(bounds[:-1] + number)
            number += len(lengths)
        self.document_sentence = np.concatenate([*documents, np.array([number])])
        self.sentence_start = np.zeros(number + 1, np.int64)
        np.cumsum(np.concatenate(sentences), out=self.sentence_start[1:])

    def _cut(self, form: Form) -> None:
        """Cuts each document into chunks from its start.

        Where a chunk ends depends on where it began, so a document is cut one chunk after another; but each
        pass cuts one chunk of every unfinished document at once, so that numpy is called as often as the
        longest document has chunks.
        """
        start, firsts, ends = self.sentence_start, [], []
        here, stop = self.document_sentence[:-1], self.document_sentence[1:]  # [unfinished documents]
        while len(here):
            if form == "pairs":  # the sentence that fills the budget belongs to the chunk
                end = np.searchsorted(start, start[here] + self.budget)
            else:
                end = np.searchsorted(start, start[here] + self.budget, side="right") - 1
            end = np.minimum(end, stop)
            firsts.append(here)
            ends.append(end)
            unfinished = end < stop
            here, stop = end[unfinished], stop[unfinished]
        first = np.concatenate([np.zeros(0, np.int64), *firsts])  # [n], by pass
        end = np.concatenate([np.zeros(0, np.int64), *ends])
        by_place = np.argsort(first)
        first, end = first[by_place], end[by_place]  # [n], by document
        if form == "pairs":  # a single token cannot be two segments
            enough = start[end] - start[first] >= 2
            first, end = first[enough], end[enough]
        self.chunk_first, self.chunk_end = first, end
        block_end = np.append(self.block_start[1:], start[-1])  # [B]
        self.samples_per_block = np.diff(np.searchsorted(start[first], block_end), prepend=0)  # [B]


def read_ahead(dataset: Dataset, index: Blocks, blocks: Ints) -> None:
    """Asks the system to read the blocks' pages in the background; where it cannot, nothing is lost."""
    for b in blocks.tolist():
        shard = dataset.shards[index.shard[b]]
        rows = slice(index.row[b], index.row[b] + index.rows[b] + 1)
        for values, offsets in (
            (shard.tokens, shard.token_offsets[rows]),
            (shard.sentence_lengths, shard.sentence_offsets[rows]),
        ):
            first = values.ctypes.data + int(offsets[0]) * values.itemsize
            page = first // mmap.PAGESIZE * mmap.PAGESIZE  # madvise refuses an address inside a page
            size = first + int(offsets[-1] - offsets[0]) * values.itemsize - page
            _libc.madvise(ctypes.c_void_p(page), ctypes.c_size_t(size), mmap.MADV_WILLNEED)


def _even_parts(lengths: Ints, budget: int) -> tuple[Ints, Ints]:
    """Divides sentences of `lengths` [n] into parts of at most `budget` tokens, as even as can be.

    Returns the lengths of the parts, and [n + 1] the first part of each sentence, with their number behind:
    (7, 3) at a budget of 4 gives (4, 3, 3) and (0, 2, 3).
    """
    parts = -(-lengths // budget)  # [n]
    first = np.concatenate([np.zeros(1, np.int64), np.cumsum(parts)])  # [n + 1]
    size, longer = np.divmod(lengths, parts)  # [n] the first `longer` parts have one token more
    number = np.arange(first[-1]) - np.repeat(first[:-1], parts)  # of the part in its sentence
    return np.repeat(size, parts) + (number < np.repeat(longer, parts)), first


def _offsets(shard: Shard, row: int, stop: int) -> Ints:
    """First token of each document of a block, in the shard, and the one behind its last."""
    offsets = shard.token_offsets[row : stop + 1].astype(np.int64)  # [rows + 1]
    if offsets[0] < 0 or offsets[-1] > len(shard.tokens) or (np.diff(offsets) < 0).any():
        raise _damaged(shard)
    return offsets


def _damaged(shard: Shard) -> UserError:
    return UserError(
        f"the shard {shard.path} is damaged: its sentences do not add up to its documents; "
        "delete it and run `bertscale prep` again"
    )
