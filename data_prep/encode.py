"""First pass: one work unit of the input -> its spills, its bad records and its done record.

    encode_unit(plan.units[0], Path("runs/data/tokenizer.model"))

Memory holds a spill, whatever the size of the unit. A process does the whole of a unit; or, where there are
fewer units than processes, it reads, cleans and writes, and gives the batches between to others:

    encode_unit(plan.units[0], Path("runs/data/tokenizer.model"), partial(map_in_order, pool, 8))
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from bertscale.config import PrepConfig
from bertscale.data.shards import Ids, token_dtype
from bertscale.files import whole_file, write_json
from bertscale.tokenizer import Tokenizer, load_tokenizer
from data_prep.clean import clean_records, count_letters
from data_prep.filters.near import bands_of, row_type, signature
from data_prep.filters.tally import Tally, source_of
from data_prep.plan import Unit
from data_prep.readers.records import Bad, Cut, Record
from data_prep.segment import splitter, with_spaces
from data_prep.shuffle import ROW, Digest, Rows, Spill, SpillBuilder
from data_prep.words import join_words, spill_dtype, word_starts

SPLITS = ("train", "validation")
BATCH_CHARACTERS = 2**18  # of text encoded in one call
LETTERS_OF = (1000, 8)  # documents of a unit whose letters are counted: the first, then every eighth
PLACES_SHOWN = 3  # of each kind of bad record


@dataclass(frozen=True)
class Batch:
    """Documents that are encoded in one call: number, cleaned text, and whether it is for validation."""

    numbers: list[int]
    texts: list[str]
    held_out: list[bool]


@dataclass(frozen=True)
class Encoded:
    """The documents of a batch as a SpillBuilder takes them; a row may have no token."""

    rows: Rows
    held_out: npt.NDArray[np.bool_]
    sentence_lengths: npt.NDArray[np.uint32]
    tokens: Ids
    signatures: npt.NDArray[Any] | None  # a row for each document, where near-duplicates are looked for


# Like `map`: the results of a function of each batch, in the order of the batches.
MapBatches = Callable[[Callable[[Batch], Encoded], Iterable[Batch]], Iterable[Encoded]]


def encode_unit(unit: Unit, tokenizer_path: Path, map_batches: MapBatches = map) -> None:
    """Writes the spills of one work unit and its bad records, then its done record."""
    try:
        tokenizer = load_once(tokenizer_path, unit.plan)
    finally:
        unit.check_plan()  # the better reason where the tokenizer is gone
    tally = {name: Counter[str]() for name in ("counters", "bad", "dropped", "letters", "changes")}
    by_source, places = Tally(unit.config.seed, unit.number), dict[str, list[str]]()
    writer = _Writer(unit, tokenizer)
    with whole_file(unit.bad_records) as quarantine, _signatures(unit) as signatures:
        batches = _batches(unit, tally, by_source, places, quarantine)
        for encoded in map_batches(partial(encode_batch, unit.config, unit.plan, tokenizer_path), batches):
            writer.add(encoded)
            if signatures and encoded.signatures is not None:
                signatures.write(encoded.signatures[encoded.rows["tokens"] > 0].view(np.uint8).data)
        quarantine_bytes = quarantine.tell()
        signature_bytes = signatures.tell() if signatures else 0
    writer.finish()
    tally["dropped"].update(writer.dropped)
    unit.check_input()
    unit.check_plan()
    done = {
        "plan": unit.plan,
        "tokenizer_sha256": tokenizer.sha256,
        "spills": [asdict(spill) for spill in writer.spills],
        "quarantine_bytes": quarantine_bytes,
        "signature_bytes": signature_bytes,
        **tally,
        "tally": by_source.content(),
        "places": places,
    }
    write_json(unit.record, done)


@contextmanager
def _signatures(unit: Unit) -> Iterator[BinaryIO | None]:
    """The file for the signatures of the unit's documents, where they are asked for."""
    if unit.config.near_duplicates is None:
        yield None
        return
    with whole_file(unit.signatures) as file:
        yield file


@lru_cache(maxsize=1)
def load_once(path: Path, plan: str) -> Tokenizer:
    """The tokenizer, loaded once by a process; `plan` because another one has another tokenizer."""
    return load_tokenizer(path)


def _batches(
    unit: Unit,
    tally: dict[str, Counter[str]],
    by_source: Tally,
    places: dict[str, list[str]],
    quarantine: BinaryIO,
) -> Iterator[Batch]:
    """Yields the documents that are kept; counts them all, and writes bad records to `quarantine`."""
    batch, characters = Batch([], [], []), 0
    records = enumerate(_records(unit, tally["changes"]))
    for number, (source, (record, text, reason, held_out, joined)) in records:
        tally["counters"]["records"] += 1
        if isinstance(record, Bad):
            by_source.bad(source, record.reason)
            tally["bad"][record.reason] += 1
            if tally["bad"][record.reason] <= PLACES_SHOWN:
                places.setdefault(record.reason, []).append(record.place)
            if record.lost:
                tally["counters"]["lost_bytes"] += record.lost
            quarantine.write(record.line())
            continue
        tally["counters"]["cut"] += isinstance(record, Cut)
        if reason:
            tally["dropped"][reason] += 1
            by_source.drop(source, number, reason, record if isinstance(record, str) else "")
            continue
        by_source.keep(source, number, text)
        if joined:
            tally["counters"].update(joined_lines=joined, joined_documents=1)
        if number < LETTERS_OF[0] or number % LETTERS_OF[1] == 0:
            tally["letters"].update(count_letters(text))
        batch.numbers.append(unit.number << 32 | number)
        batch.texts.append(text)
        batch.held_out.append(held_out)
        characters += len(text)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = Batch([], [], []), 0
    if batch.numbers:
        yield batch


def _records(unit: Unit, changes: Counter[str]) -> Iterator[tuple[str, tuple[Record, str, str, bool, int]]]:
    """The cleaned records of the unit, each with its source."""
    for part in unit.parts:
        source = source_of(part.name, tuple(unit.config.input))
        for record in clean_records(replace(unit, parts=[part]), changes):
            yield source, record


def encode_batch(config: PrepConfig, plan: str, tokenizer_path: Path, batch: Batch) -> Encoded:
    """Documents -> sentences -> tokens."""
    tokenizer = load_once(tokenizer_path, plan)
    split, digest = splitter(config.language), Digest(config.seed, config.deduplicate)
    of_documents = list(map(split, batch.texts))
    if tokenizer.keeps_spaces:
        of_documents = list(map(with_spaces, batch.texts, of_documents))
    sentences = list(chain.from_iterable(of_documents))
    encoded = tokenizer.encode(sentences)
    lengths = np.fromiter(map(len, encoded), np.uint32, len(encoded))
    size = int(lengths.sum(dtype=np.int64))
    dtype = spill_dtype(token_dtype(tokenizer.vocab_size), config.words)
    tokens = np.fromiter(chain.from_iterable(encoded), dtype, size)
    if config.words:
        tokens = join_words(tokens, word_starts(tokenizer, sentences, encoded))

    rows = np.zeros(len(batch.numbers), ROW)
    contents = [text.encode() for text in batch.texts]
    digests = map(digest, contents, batch.numbers)
    rows["document"] = batch.numbers
    rows["key"], rows["check"] = np.array(list(digests), np.uint64).T
    rows["text_bytes"] = list(map(len, contents))
    owner = np.repeat(np.arange(len(rows)), list(map(len, of_documents)))
    rows["tokens"] = np.bincount(owner, weights=lengths, minlength=len(rows))
    owner, lengths = owner[lengths > 0], lengths[lengths > 0]
    rows["sentences"] = np.bincount(owner, minlength=len(rows))
    signatures = None
    if config.near_duplicates is not None:
        hashes = bands_of(config.near_duplicates).hashes
        signatures = np.zeros(len(rows), row_type(hashes))
        signatures["document"] = batch.numbers
        for number, text in enumerate(batch.texts):
            signatures["hashes"][number] = signature(text, config.is_spaced, hashes)
    return Encoded(rows, np.array(batch.held_out), lengths, tokens, signatures)


class _Writer:
    """Encoded documents -> the spills of each split."""

    def __init__(self, unit: Unit, tokenizer: Tokenizer) -> None:
        self.unit = unit
        dtype = spill_dtype(token_dtype(tokenizer.vocab_size), unit.config.words)
        self.builders = {split: SpillBuilder(dtype, unit.config.deduplicate) for split in SPLITS}
        self.spills: list[Spill] = []
        self.dropped = Counter[str]()

    def add(self, encoded: Encoded) -> None:
        rows, lengths, tokens = encoded.rows, encoded.sentence_lengths, encoded.tokens
        if nothing := int((rows["tokens"] == 0).sum()):
            self.dropped["no token is left of it"] += nothing
        for split, held_out in zip(SPLITS, (False, True), strict=True):
            chosen = (encoded.held_out == held_out) & (rows["tokens"] > 0)
            if chosen.all():
                self._add(split, rows, lengths, tokens)
            elif chosen.any():
                of_lengths, of_tokens = (np.repeat(chosen, rows[kind]) for kind in ("sentences", "tokens"))
                self._add(split, rows[chosen], lengths[of_lengths], tokens[of_tokens])

    def _add(self, split: str, rows: Rows, lengths: npt.NDArray[np.uint32], tokens: Ids) -> None:
        builder = self.builders[split]
        if builder.rows and not builder.has_room(rows, lengths, tokens):
            self._write(split)
        builder.add(rows, lengths, tokens)

    def _write(self, split: str) -> None:
        number = sum(spill.split == split for spill in self.spills)
        self.spills.append(self.builders[split].write(self.unit.spill(split, number), split))

    def finish(self) -> None:
        """Writes what is left."""
        for split, builder in self.builders.items():
            if builder.rows:
                self._write(split)
            if builder.duplicates:
                self.dropped["duplicate"] += builder.duplicates
