"""The samples of a few blocks of documents: where chunks of sentences, or packed bins, begin and end.

Nothing here is random. Kinds with a `form` of their own: `pairs` (samples.kind nsp and sop) are runs of
sentences that reach the budget or end with their document, `document` are runs that stay within it,
`packed` are bins of exactly max_length tokens cut from documents laid end to end.

    table = Table(dataset, index, blocks=np.arange(64), form="pairs", max_length=128)
    first, last = table.unit_start[table.chunk_first], table.unit_start[table.chunk_last]

Tokens are numbered through the table's blocks, from 0; `locate` gives their numbers in the data set.
A unit is a sentence; one longer than a sample holds is cut into several, as even as can be.
U: units, D: documents with text, B: blocks, n: samples.
"""

from __future__ import annotations

import ctypes
import mmap
from typing import Literal, NamedTuple

import numpy as np

from bertscale.config import UserError
from bertscale.data.masking import Ints
from bertscale.data.shards import Dataset, Shard

Form = Literal["pairs", "document", "packed"]
FORMS: dict[str, Form] = {"nsp": "pairs", "sop": "pairs", "document": "document", "packed": "packed"}
_libc = ctypes.CDLL(None)  # for madvise, which numpy's views of pyarrow's maps have no method for
SPECIALS = {"pairs": 3, "document": 2, "packed": 2}  # [CLS] and [SEP]s of a sample, at least


class Blocks(NamedTuple):
    """Runs of whole documents of about equal size, [B] each."""

    shard: Ints
    row: Ints  # first row of the shard
    rows: Ints


class Table:
    """What is in some blocks of `dataset`; `num_samples` of them, block after block.

    For pairs and documents: `unit_start` [U + 1] (first token), `document_unit` [D + 1] (first unit),
    `chunk_first` and `chunk_last` [n] (first unit, and the one behind the last). For packed samples:
    `document_start` [D + 1] and `stream_start` [D], the document's place in the stream that is cut.
    """

    def __init__(self, dataset: Dataset, index: Blocks, blocks: Ints, form: Form, max_length: int) -> None:
        self.budget = max_length - SPECIALS[form]
        starts = np.cumsum([0, *(shard.entry.tokens for shard in dataset.shards)])
        where = [(index.shard[b], index.row[b], index.row[b] + index.rows[b]) for b in blocks.tolist()]
        texts = [_offsets(dataset.shards[shard], row, stop) for shard, row, stop in where]
        sizes = np.array([offsets[-1] - offsets[0] for offsets in texts], np.int64)
        self.block_start = np.cumsum(sizes) - sizes  # [B] first token of each block
        first = [starts[shard] + offsets[0] for (shard, _, _), offsets in zip(where, texts, strict=True)]
        self.shift = np.array(first, np.int64) - self.block_start  # to the number in the data set
        lengths = [np.diff(offsets) for offsets in texts]
        lengths = [found[found > 0] for found in lengths]
        self.num_documents = sum(map(len, lengths))
        self.documents_per_block = np.array([len(found) for found in lengths])
        self.one_token_documents = np.array([int((found == 1).sum()) for found in lengths])
        if form == "packed":
            self._pack(lengths)
        else:
            self._read_units(dataset, where, texts)
            self._cut(form)

    def locate(self, token: Ints) -> Ints:
        """Numbers of tokens in the data set."""
        return token + self.shift[np.searchsorted(self.block_start, token, side="right") - 1]

    @property
    def num_samples(self) -> int:
        return int(self.samples_per_block.sum())

    def _pack(self, lengths: list[Ints]) -> None:
        """Each document but a block's last is followed by the two places of [SEP] [CLS]; a block's stream
        begins at a bin's edge."""
        bins, parts = 0, []
        counts = []
        for found in lengths:
            inner = np.cumsum(found) - found + 2 * np.arange(len(found))
            parts.append(bins * self.budget + inner)
            counts.append(-(-int(inner[-1] + found[-1]) // self.budget) if len(found) else 0)
            bins += counts[-1]
        self.samples_per_block = np.array(counts, np.int64)
        self.stream_start = np.concatenate(parts)
        self.document_start = np.concatenate([np.zeros(1, np.int64), np.cumsum(np.concatenate(lengths))])

    def _read_units(self, dataset: Dataset, where: list[tuple[int, int, int]], texts: list[Ints]) -> None:
        units, documents, number = [], [], 0
        for (shard, row, stop), offsets in zip(where, texts, strict=True):
            bounds = dataset.shards[shard].sentence_offsets[row : stop + 1].astype(np.int64)
            lengths = dataset.shards[shard].sentence_lengths[bounds[0] : bounds[-1]].astype(np.int64)
            bounds -= bounds[0]
            ends = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
            found = ends.take(bounds, mode="clip")  # a damaged offset may point anywhere
            if not lengths.all() or not np.array_equal(found, offsets - offsets[0]):
                raise _damaged(dataset.shards[shard])
            if lengths.max() > self.budget:
                lengths, first = _even_parts(lengths, self.budget)
                bounds = first[bounds]
            units.append(lengths.astype(np.int32))
            documents.append(bounds[:-1][np.diff(bounds) > 0] + number)
            number += len(lengths)
        self.document_unit = np.concatenate([*documents, np.array([number])])
        self.unit_start = np.zeros(number + 1, np.int64)
        np.cumsum(np.concatenate(units), out=self.unit_start[1:])

    def _cut(self, form: Form) -> None:
        """Cuts each document from its start, one chunk of every unfinished document in a turn."""
        start, firsts, lasts = self.unit_start, [], []
        here, stop = self.document_unit[:-1], self.document_unit[1:]
        while len(here):
            if form == "pairs":  # the unit that fills the budget belongs to it
                last = np.searchsorted(start, start[here] + self.budget)
            else:
                last = np.searchsorted(start, start[here] + self.budget, side="right") - 1
            last = np.minimum(last, stop)
            firsts.append(here)
            lasts.append(last)
            more = last < stop
            here, stop = last[more], stop[more]
        first = np.concatenate([np.zeros(0, np.int64), *firsts])
        last = np.concatenate([np.zeros(0, np.int64), *lasts])
        order = np.argsort(first)
        first, last = first[order], last[order]
        if form == "pairs":  # a single token cannot be two segments
            enough = start[last] - start[first] >= 2
            first, last = first[enough], last[enough]
        self.chunk_first, self.chunk_last = first, last
        ends = np.searchsorted(start[first], np.append(self.block_start[1:], start[-1]))
        self.samples_per_block = np.diff(ends, prepend=0)


def read_ahead(dataset: Dataset, index: Blocks, blocks: Ints) -> None:
    """Asks the system to read the blocks' pages meanwhile; where it cannot, nothing is lost."""
    for b in blocks.tolist():
        shard = dataset.shards[index.shard[b]]
        rows = slice(index.row[b], index.row[b] + index.rows[b] + 1)
        for values, offsets in (
            (shard.tokens, shard.token_offsets[rows]),
            (shard.sentence_lengths, shard.sentence_offsets[rows]),
        ):
            first = values.ctypes.data + int(offsets[0]) * values.itemsize
            page = first // mmap.PAGESIZE * mmap.PAGESIZE
            size = first + int(offsets[-1] - offsets[0]) * values.itemsize - page
            _libc.madvise(ctypes.c_void_p(page), ctypes.c_size_t(size), mmap.MADV_WILLNEED)


def _even_parts(lengths: Ints, budget: int) -> tuple[Ints, Ints]:
    """Lengths of the parts of at most `budget`, and the first part of each, with their number behind."""
    parts = -(-lengths // budget)
    first = np.concatenate([np.zeros(1, np.int64), np.cumsum(parts)])
    size, rest = np.divmod(lengths, parts)
    place = np.arange(first[-1]) - np.repeat(first[:-1], parts)
    return np.repeat(size, parts) + (place < np.repeat(rest, parts)), first


def _offsets(shard: Shard, row: int, stop: int) -> Ints:
    """First token of each document of a block, in the shard, and the one behind its last."""
    offsets = shard.token_offsets[row : stop + 1].astype(np.int64)
    if offsets[0] < 0 or offsets[-1] > len(shard.tokens) or (np.diff(offsets) < 0).any():
        raise _damaged(shard)
    return offsets


def _damaged(shard: Shard) -> UserError:
    return UserError(
        f"the shard {shard.path} is damaged: its sentences do not add up to its documents; "
        "delete it and run `bertscale prep` again"
    )
