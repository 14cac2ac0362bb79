"""The seeded order of documents, across all shards, in bounded memory, and exact duplicates on the way.

A document's key is a digest of its text, keyed by the seed. The first pass sorts what it reads into spills of
bounded size; in the second one, shard number b of B takes from every spill the range of keys that is its own,
[b / B, (b + 1) / B), and brings it into order:

    builder = SpillBuilder(np.uint16, deduplicate=True)
    builder.add(rows_of(...), sentence_lengths, tokens)
    builder.write(path)
    merge(paths, number=b, count=B, deduplicate=True) -> columns of the shard

So a document's place depends on its text and the seed alone, two documents with the same text always meet in
the same shard, and each shard is made apart from the others, by any process. The digest has 128 bits: its
first half is the place, both together are what makes two texts the same.

A spill is a file of three arrays, one after the other, that only this module reads:

    rows              ROW [rows], sorted by key, check and document
    sentence_lengths  uint32 [sentences]
    tokens            uint16 or uint32 [tokens]
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import xxhash

from bertscale.config import UserError
from bertscale.data.shards import LARGEST_SHARD, Ids
from bertscale.files import whole_file

SPILL_BYTES = 64 * 2**20  # of memory, as `weight` counts it, before a spill is written
CHUNK = 2**18  # tokens moved at once: their positions stay in the cache

ROW = np.dtype(
    [
        ("key", np.uint64),
        ("check", np.uint64),
        ("document", np.uint64),
        ("token_start", np.uint64),  # in the spill's tokens
        ("sentence_start", np.uint64),
        ("tokens", np.uint32),
        ("sentences", np.uint32),
        ("text_bytes", np.uint32),
    ],
    align=True,
)
Rows = npt.NDArray[Any]  # of ROW
Indices = npt.NDArray[np.int64]


def weight(rows: int, sentences: int, tokens: int, itemsize: int) -> int:
    """Bytes of memory that documents take in either pass: what short ones need is in their rows."""
    return 96 * rows + 4 * sentences + itemsize * tokens


class Digest:
    """The two halves of a text's digest; made for a seed."""

    def __init__(self, seed: int, deduplicate: bool) -> None:
        self.seed = xxhash.xxh3_64_intdigest(f"order {seed}".encode())
        self.deduplicate = deduplicate

    def __call__(self, text: bytes, document: int) -> tuple[int, int]:
        """Returns (key, check); without deduplication the document counts too, lest one text fill a shard."""
        seed = self.seed if self.deduplicate else (self.seed + document) % 2**64
        return divmod(xxhash.xxh3_128_intdigest(text, seed), 2**64)


# ------------------------------------------------------------------------------------------ first pass


@dataclass(frozen=True)
class Spill:
    """What a done record says of a spill; `bytes` are the file's."""

    name: str
    split: str
    rows: int
    sentences: int
    tokens: int
    bytes: int


class SpillBuilder:
    """Collects documents as long as it `has_room`; `write` sorts them.

    `duplicates` counts what was left out as the same text as an earlier document of the spill.
    """

    def __init__(self, dtype: npt.DTypeLike, deduplicate: bool) -> None:
        self.deduplicate, self.duplicates = deduplicate, 0
        # Memory that nothing was written to yet is not taken from the machine.
        self.tokens: Ids = np.empty(SPILL_BYTES // np.dtype(dtype).itemsize, dtype)
        self._empty()

    def _empty(self) -> None:
        self.rows: list[Rows] = []
        self.sentence_lengths: list[npt.NDArray[np.uint32]] = []
        self.weight = self.used = self.sentences = 0

    def has_room(self, rows: Rows, sentence_lengths: npt.NDArray[np.uint32], tokens: Ids) -> bool:
        more = weight(len(rows), len(sentence_lengths), len(tokens), tokens.itemsize)
        return self.weight + more <= SPILL_BYTES

    def add(self, rows: Rows, sentence_lengths: npt.NDArray[np.uint32], tokens: Ids) -> None:
        """Adds documents, the numbers of which rise; this sets `token_start` and `sentence_start`."""
        end = self.used + len(tokens)
        if end > len(self.tokens):
            larger = np.empty(end, self.tokens.dtype)
            larger[: self.used] = self.tokens[: self.used]
            self.tokens = larger
        self.tokens[self.used : end] = tokens
        rows["token_start"] = self.used + starts(rows["tokens"])
        rows["sentence_start"] = self.sentences + starts(rows["sentences"])
        self.rows.append(rows)
        self.sentence_lengths.append(sentence_lengths)
        self.used = end
        self.sentences += len(sentence_lengths)
        self.weight += weight(len(rows), len(sentence_lengths), len(tokens), tokens.itemsize)

    def write(self, path: Path, split: str) -> Spill:
        """Writes the spill, whole or not at all, and is empty again."""
        rows, lengths = np.concatenate(self.rows), np.concatenate(self.sentence_lengths)
        order = np.lexsort((rows["check"], rows["key"]))  # stable: documents stay in order
        if self.deduplicate:
            order = order[_first_of_each(rows, order)]
        self.duplicates += len(rows) - len(order)
        rows = rows[order]
        columns = (("sentence", lengths), ("token", self.tokens[: self.used]))
        begins = {kind: rows[f"{kind}_start"].astype(np.int64) for kind, _ in columns}
        for kind, _ in columns:
            rows[f"{kind}_start"] = starts(rows[f"{kind}s"])
        with whole_file(path) as file:
            file.write(rows.view(np.uint8).data)
            for kind, source in columns:
                sizes = rows[f"{kind}s"]
                for chunk in _chunks(sizes):
                    values = source[_positions(begins[kind][chunk], sizes[chunk])]
                    file.write(values.view(np.uint8).data)
            size = file.tell()
        self._empty()
        sentences, tokens = (int(rows[kind].sum(dtype=np.int64)) for kind in ("sentences", "tokens"))
        return Spill(path.name, split, len(rows), sentences, tokens, bytes=size)


# ----------------------------------------------------------------------------------------- second pass


@dataclass(frozen=True)
class Merged:
    """The columns of a shard, by the names that `write_columns` has for them, and what was counted."""

    columns: dict[str, Any]
    documents: int
    text_bytes: int
    duplicates: int
    near_duplicates: int


def number_of_shards(spills: Sequence[Spill], itemsize: int, shard_bytes: int) -> int:
    """How many shards the documents of `spills` fill."""
    rows, sentences = sum(spill.rows for spill in spills), sum(spill.sentences for spill in spills)
    tokens = sum(spill.tokens for spill in spills)
    # Half of what a shard can hold at all: the ranges of keys are of the same length, not of the same size.
    size = weight(rows, sentences, tokens, itemsize)
    return max(-(-size // shard_bytes), -(-tokens // (LARGEST_SHARD // 2)))


def merge(
    folder: Path,
    spills: Sequence[Spill],
    dtype: npt.DTypeLike,
    number: int,
    count: int,
    deduplicate: bool,
    near: npt.NDArray[np.uint64] | None = None,
) -> Merged:
    """Shard `number` of `count`: its documents from all `spills`, sorted by key; reads nothing else.

    Of documents with the same digest the one with the lowest number stays, unless it is one of `near`, the
    sorted numbers of near-duplicates. Memory: the shard, and 100 bytes
    or so for each document.
    """
    low, high = number * 2**64 // count, (number + 1) * 2**64 // count
    ranges = [_rows_between(folder / spill.name, spill, low, high) for spill in spills]
    ends = np.cumsum([len(rows) for rows in ranges])
    rows = np.concatenate([np.empty(0, ROW), *ranges])
    del ranges
    order = np.lexsort((rows["document"], rows["check"], rows["key"]))
    if deduplicate:
        order = order[_first_of_each(rows, order)]
    duplicates = len(rows) - len(order)
    if near is not None:
        order = order[~np.isin(rows["document"][order], near)]
    tokens, token_places, token_offsets = _layout(rows["tokens"], order, np.dtype(dtype))
    lengths, sentence_places, sentence_offsets = _layout(rows["sentences"], order, np.dtype(np.uint32))
    begin = 0
    for spill, end in zip(spills, ends.tolist(), strict=True):
        of_spill = rows[begin:end]
        if len(of_spill):
            with open(folder / spill.name, "rb") as file:
                at = spill.rows * ROW.itemsize
                _scatter(file, at, of_spill, "sentence", lengths, sentence_places[begin:end])
                at += 4 * spill.sentences
                _scatter(file, at, of_spill, "token", tokens, token_places[begin:end])
        begin = end
    return Merged(
        columns={
            "documents": rows["document"][order],
            "tokens": tokens,
            "token_offsets": token_offsets,
            "sentence_lengths": lengths,
            "sentence_offsets": sentence_offsets,
        },
        documents=len(order),
        text_bytes=int(rows["text_bytes"][order].sum(dtype=np.int64)),
        duplicates=duplicates,
        near_duplicates=len(rows) - duplicates - len(order),
    )


def _rows_between(path: Path, spill: Spill, low: int, high: int) -> Rows:
    """The rows of the spill whose key is at least `low` and less than `high`."""
    every = np.memmap(path, ROW, "r", shape=(spill.rows,))
    first, last = (bisect_left(every, bound, key=lambda row: int(row["key"])) for bound in (low, high))
    return np.fromfile(path, ROW, last - first, offset=first * ROW.itemsize)


def _layout(
    sizes: npt.NDArray[np.uint32], order: Indices, dtype: np.dtype[Any]
) -> tuple[Any, Indices, npt.NDArray[np.int32]]:
    """An array for the values of the rows in `order`, where each row's begin (-1: nowhere), and offsets."""
    offsets = np.zeros(len(order) + 1, np.int64)
    np.cumsum(sizes[order], out=offsets[1:])
    if offsets[-1] > LARGEST_SHARD:
        raise UserError(
            f"a shard would hold {offsets[-1]:,} tokens, more than {LARGEST_SHARD:,}: lower shard_bytes"
        )
    places = np.full(len(sizes), -1, np.int64)
    places[order] = offsets[:-1]
    return np.empty(offsets[-1], dtype), places, offsets.astype(np.int32)


def _scatter(file: BinaryIO, at: int, rows: Rows, kind: str, target: Any, places: Indices) -> None:
    """Reads the values of `rows`, which are neighbours in a spill, and puts each row's at its place.

    `at` is the byte where the spill's values of this kind begin.
    """
    begin, sizes = rows[f"{kind}_start"].astype(np.int64), rows[f"{kind}s"]
    for chunk in _chunks(sizes):
        file.seek(at + int(begin[chunk][0]) * target.itemsize)
        values = np.fromfile(file, target.dtype, int(sizes[chunk].sum(dtype=np.int64)))
        place, size = places[chunk], sizes[chunk]
        stays = place >= 0  # others are duplicates of a document before them
        if not stays.all():
            values = values[_positions((begin[chunk] - begin[chunk][0])[stays], size[stays])]
            place, size = place[stays], size[stays]
        target[_positions(place, size)] = values


# --------------------------------------------------------------------------------------------- arrays


def starts(sizes: npt.NDArray[Any]) -> Indices:
    """Where each of consecutive stretches begins: [3, 2, 4] -> [0, 3, 5]."""
    begin: Indices = np.cumsum(sizes, dtype=np.int64) - sizes
    return begin


def _first_of_each(rows: Rows, order: Indices) -> npt.NDArray[np.bool_]:
    """Which of the sorted rows has another digest than the one before it."""
    first = np.ones(len(order), np.bool_)
    key, check = rows["key"][order], rows["check"][order]
    first[1:] = (key[1:] != key[:-1]) | (check[1:] != check[:-1])
    return first


def _positions(begin: Indices, sizes: npt.NDArray[Any]) -> Indices:
    """The positions of all values of stretches: ([7, 2], [2, 3]) -> [7, 8, 2, 3, 4]."""
    positions = np.repeat(begin - starts(sizes), sizes)
    positions += np.arange(len(positions))
    return positions


def _chunks(sizes: npt.NDArray[Any]) -> Iterator[slice]:
    """Slices of rows that hold about CHUNK values each, and at least one row."""
    ends = np.cumsum(sizes, dtype=np.int64)
    first = 0
    while first < len(ends):
        before = ends[first - 1] if first else 0
        last = max(int(np.searchsorted(ends, before + CHUNK, "right")), first + 1)
        yield slice(first, last)
        first = last
