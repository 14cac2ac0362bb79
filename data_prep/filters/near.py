"""Near-duplicates by MinHash: signatures of documents, and those that are too similar to an earlier one.

    signature(text, spaced=True, hashes=bands_of(0.8).hashes)        # in the first pass, uint32 [hashes]
    near_duplicates([unit.signatures for unit in plan.units], 0.8)   # between the passes: document numbers

A document is the set of its shingles, five words in a row (or five characters, in a language without spaces).
Of two sets, the share of equal hashes in their signatures is an estimate of their Jaccard similarity (Broder
1997). Documents with the same hashes in one band are compared, each with the first of them; what is similar,
also by way of others, is a group, of which the document with the lowest number stays. All of it is a function
of texts and numbers alone. Memory: 40 bytes for each document, whatever its length.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash

MOST_HASHES = 128
SHINGLE = 5  # words or characters
RECALL = 0.95  # of the pairs that are just as similar as asked, so many share a band
SHINGLES_AT_ONCE = 2048  # times the hashes, 4 bytes each: 1 MB
PAIRS_AT_ONCE = 2**15
_BASE = np.uint64(0x9E3779B97F4A7C15)

Hashes = npt.NDArray[np.uint32]
Indices = npt.NDArray[np.int64]


class Bands(NamedTuple):
    """How a signature is cut: `number` bands of `rows` hashes."""

    number: int
    rows: int

    @property
    def hashes(self) -> int:
        return self.number * self.rows


def bands_of(similarity: float) -> Bands:
    """The longest bands by which documents of this similarity still meet; longer ones meet few others."""
    fitting = [
        Bands(MOST_HASHES // rows, rows)
        for rows in range(1, 33)
        if 1 - (1 - similarity**rows) ** (MOST_HASHES // rows) >= RECALL
    ]
    return fitting[-1] if fitting else Bands(MOST_HASHES, 1)


def row_type(hashes: int) -> np.dtype[Any]:
    """A row of a file of signatures."""
    return np.dtype([("document", np.uint64), ("hashes", np.uint32, (hashes,))])


def signature(text: str, spaced: bool, hashes: int) -> Hashes:
    """The smallest value of each hash function over the shingles of the text, uint32 [hashes]."""
    units = hashes_of(text.lower().split() if spaced else "".join(text.lower().split()))
    shingles = shingles_of(units, max(1, min(SHINGLE, len(units))))
    factors, terms = _functions(hashes)
    smallest = np.full(hashes, 2**32 - 1, np.uint32)
    for begin in range(0, len(shingles), SHINGLES_AT_ONCE):
        some = (splitmix64(shingles[begin : begin + SHINGLES_AT_ONCE]) >> np.uint64(32)).astype(np.uint32)
        values = some[:, None] * factors  # [shingles, hashes], modulo 2^32
        values += terms
        np.minimum(smallest, values.min(axis=0), out=smallest)
    return smallest


def hashes_of(units: list[str] | str) -> npt.NDArray[np.uint64]:
    """A hash of each word, or of each character of a string."""
    if isinstance(units, str):
        return splitmix64(np.frombuffer(units.encode("utf-32-le"), np.uint32).astype(np.uint64) + _BASE)
    return np.array([xxhash.xxh3_64_intdigest(word.encode()) for word in units], np.uint64)


def shingles_of(units: npt.NDArray[np.uint64], size: int) -> npt.NDArray[np.uint64]:
    """A hash of each `size` of them in a row."""
    shingles = np.zeros(max(len(units) - size + 1, 0), np.uint64)
    for place in range(size):
        shingles = shingles * _BASE + units[place : place + len(shingles)]
    return shingles


@lru_cache
def _functions(hashes: int) -> tuple[Hashes, Hashes]:
    """Odd factors and terms of the hash functions, the same ones always."""
    draws = (splitmix64(np.arange(1, 2 * MOST_HASHES + 1, dtype=np.uint64) * _BASE) >> np.uint64(32)).astype(
        np.uint32
    )
    return (draws[:MOST_HASHES] | np.uint32(1))[:hashes], draws[MOST_HASHES:][:hashes]


def splitmix64(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Mixes the bits of each number: the output function of SplitMix64 (Steele, Lea and Flood 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def near_duplicates(paths: Sequence[Path], similarity: float) -> npt.NDArray[np.uint64]:
    """The numbers of documents that are similar to one with a lower number, sorted.

    `paths`: files of rows of signatures; the documents' numbers rise from file to file.
    """
    bands = bands_of(similarity)
    rows = row_type(bands.hashes)
    files = [np.memmap(path, rows, "r") for path in paths if path.stat().st_size]
    if not files:
        return np.zeros(0, np.uint64)
    documents = np.concatenate([file["document"] for file in files])
    starts = np.cumsum([0, *map(len, files)])
    first_of = np.arange(len(documents))  # the first document of the group of each
    for band in range(bands.number):
        columns = slice(band * bands.rows, (band + 1) * bands.rows)
        left, right = _meeting([file["hashes"][:, columns] for file in files])
        apart = first_of[left] != first_of[right]
        left, right = left[apart], right[apart]
        for begin in range(0, len(left), PAIRS_AT_ONCE):
            some, others = left[begin : begin + PAIRS_AT_ONCE], right[begin : begin + PAIRS_AT_ONCE]
            equal = _hashes_of(files, starts, some) == _hashes_of(files, starts, others)
            similar = equal.mean(axis=1) >= similarity
            _join(first_of, some[similar].tolist(), others[similar].tolist())
        first_of = _flat(first_of)
    later: npt.NDArray[np.uint64] = documents[first_of != np.arange(len(documents))]
    return later


def _meeting(parts: list[Hashes]) -> tuple[Indices, Indices]:
    """Of each document that has the hashes of a band in common with others before it: their first, it."""
    keys = []
    for part in parts:
        key = np.zeros(len(part), np.uint64)
        for column in part.T:
            key = splitmix64(key + column)
        keys.append(key)
    key = np.concatenate(keys)
    order = np.argsort(key, kind="stable")
    new = np.ones(len(order), np.bool_)
    new[1:] = key[order][1:] != key[order][:-1]
    leader = order[np.flatnonzero(new)][np.cumsum(new) - 1]
    return leader[~new], order[~new]


def _hashes_of(files: list[Any], starts: Indices, indices: Indices) -> Hashes:
    """The signatures of these documents, by their places in all files."""
    found = np.empty((len(indices), files[0]["hashes"].shape[1]), np.uint32)
    owner = np.searchsorted(starts, indices, side="right") - 1
    for number in np.unique(owner).tolist():
        here = owner == number
        found[here] = files[number]["hashes"][indices[here] - starts[number]]
    return found


def _join(first_of: Indices, left: list[int], right: list[int]) -> None:
    """Makes one group of the groups of each pair."""

    def first(index: int) -> int:
        while (before := int(first_of[index])) != index:
            index = before
        return index

    for one, other in zip(left, right, strict=True):
        low, high = sorted((first(one), first(other)))
        first_of[high] = first_of[one] = first_of[other] = low


def _flat(first_of: Indices) -> Indices:
    while not np.array_equal(further := first_of[first_of], first_of):
        first_of = further
    return first_of
