"""What happened to the records of a work unit: counts by source and reason, and a few examples of each.

    tally = Tally(seed=0, unit=3)
    tally.drop("wiki", 7, "shorter than min_characters", "Hi.")
    combined([record["tally"] for record in records], ["wiki", "books"])

An example is one of the documents with the lowest draws, which depend on the seed and the document's number
alone: the same ones for any number of workers.
"""

from __future__ import annotations

import fnmatch
import os
from bisect import insort
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import xxhash

from data_prep.filters.near import splitmix64

EXAMPLES = 3  # of each reason, and of what is kept
EXCERPT = 400  # characters
KEPT = "kept"
DRAWS = 4096  # made at once
_KINDS = ("bad", "dropped")


@lru_cache(maxsize=1024)
def source_of(name: str, inputs: tuple[str, ...]) -> str:
    """The entry of `inputs` that the file `name` was found by."""
    path = os.path.normpath(name)
    for entry in inputs:
        pattern = os.path.normpath(entry)
        if path == pattern or path.startswith(pattern + os.sep) or fnmatch.fnmatchcase(path, pattern):
            return entry
    inside = (entry for entry in inputs if fnmatch.fnmatchcase(path, os.path.normpath(entry) + "/*"))
    return next(inside, inputs[0])


class Tally:
    """Counts the records of a work unit, source after source."""

    def __init__(self, seed: int, unit: int) -> None:
        self.sources: dict[str, dict[str, Any]] = {}
        self.examples: dict[str, list[tuple[int, int, str]]] = {}  # draw, document, excerpt; lowest first
        self._seed = xxhash.xxh3_64_intdigest(f"examples {seed}".encode())
        self._unit, self._block, self._draws = unit, -1, list[int]()

    def bad(self, source: str, reason: str) -> None:
        """Counts a record that cannot be read."""
        self._of(source)["bad"][reason] += 1

    def drop(self, source: str, number: int, reason: str, text: str) -> None:
        """Counts a document that is dropped, the record `number` of the unit; it may have no text."""
        self._of(source)["dropped"][reason] += 1
        if text:
            self._offer(number, reason, text)

    def keep(self, source: str, number: int, text: str) -> None:
        """Counts a document that is kept."""
        self._of(source)
        self._offer(number, KEPT, text)

    def _of(self, source: str) -> dict[str, Any]:
        if source not in self.sources:
            self.sources[source] = _nothing()
        counts = self.sources[source]
        counts["records"] += 1
        return counts

    def content(self) -> dict[str, Any]:
        """For a done record."""
        return {"sources": self.sources, "examples": self.examples}

    def _offer(self, number: int, reason: str, text: str) -> None:
        block, place = divmod(number, DRAWS)
        if block != self._block:
            self._block = block
            first = (self._unit << 32) + block * DRAWS
            numbers = np.arange(first, first + DRAWS, dtype=np.uint64)
            self._draws = splitmix64(numbers + np.uint64(self._seed)).tolist()
        draw, few = self._draws[place], self.examples.setdefault(reason, [])
        if len(few) < EXAMPLES or draw < few[-1][0]:
            insort(few, (draw, self._unit << 32 | number, text[:EXCERPT]))
            del few[EXAMPLES:]


def _nothing() -> dict[str, Any]:
    return {"records": 0, **{kind: Counter[str]() for kind in _KINDS}}


def combined(contents: Iterable[dict[str, Any]], inputs: Sequence[str]) -> dict[str, Any]:
    """The tallies of all work units as one: sources in the order of the `inputs`, excerpts by reason."""
    sources = {source: _nothing() for source in inputs}
    examples: dict[str, list[tuple[int, int, str]]] = {}
    for content in contents:
        for source, counts in content["sources"].items():
            total = sources.setdefault(source, _nothing())
            total["records"] += counts["records"]
            for kind in _KINDS:
                total[kind].update(counts[kind])
        for reason, few in content["examples"].items():
            examples.setdefault(reason, []).extend(map(tuple, few))
    for counts in sources.values():
        for kind in _KINDS:
            counts[kind] = dict(sorted(counts[kind].items()))
    lowest = {reason: sorted(few)[:EXAMPLES] for reason, few in sorted(examples.items())}
    return {"sources": sources, "examples": {r: [text for *_, text in few] for r, few in lowest.items()}}
