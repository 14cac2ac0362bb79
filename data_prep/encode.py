"""First pass: one work unit of the input -> its spills, its bad records and its done record.

    encode_unit(plan.units[0], Path("runs/data/tokenizer.model"))

A process runs it for one unit at a time; memory holds a spill, whatever the size of the unit.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict
from itertools import chain
from pathlib import Path

import numpy as np
import numpy.typing as npt

from bertscale.data.shards import Ids, token_dtype
from bertscale.files import whole_file, write_json
from bertscale.tokenizer import Tokenizer, load_tokenizer
from data_prep.clean import clean_records, count_letters
from data_prep.plan import Unit
from data_prep.readers.records import Bad, Cut
from data_prep.segment import splitter
from data_prep.shuffle import ROW, Digest, Rows, Spill, SpillBuilder
from data_prep.words import join_words, spill_dtype, word_starts

SPLITS = ("train", "validation")
BATCH_CHARACTERS = 2**18  # of text encoded in one call
LETTERS_OF = (1000, 8)  # documents of a unit whose letters are counted: the first, then every eighth
PLACES_SHOWN = 3  # of each kind of bad record


def encode_unit(unit: Unit, tokenizer_path: Path) -> None:
    """Writes the spills of one work unit and its bad records, then its done record."""
    try:
        tokenizer = load_tokenizer(tokenizer_path)
    finally:
        unit.check_plan()  # the better reason where the tokenizer is gone
    counters, bad, dropped, letters = Counter[str](), Counter[str](), Counter[str](), Counter[str]()
    places: dict[str, list[str]] = {}
    writer = _Writer(unit, tokenizer)
    with whole_file(unit.bad_records) as quarantine:
        for number, (record, text, reason, held_out) in enumerate(clean_records(unit)):
            counters["records"] += 1
            if isinstance(record, Bad):
                bad[record.reason] += 1
                if bad[record.reason] <= PLACES_SHOWN:
                    places.setdefault(record.reason, []).append(record.place)
                line = {"place": record.place, "reason": record.reason, "excerpt": record.excerpt}
                quarantine.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
                continue
            counters["cut"] += isinstance(record, Cut)
            if reason:
                dropped[reason] += 1
            else:
                if number < LETTERS_OF[0] or number % LETTERS_OF[1] == 0:
                    letters.update(count_letters(text))
                writer.add(unit.number << 32 | number, text, held_out)
        quarantine_bytes = quarantine.tell()
    writer.finish()
    dropped.update(writer.dropped)
    unit.check_input()
    unit.check_plan()
    done = {
        "plan": unit.plan,
        "tokenizer_sha256": tokenizer.sha256,
        "spills": [asdict(spill) for spill in writer.spills],
        "quarantine_bytes": quarantine_bytes,
        "counters": counters,
        "bad": bad,
        "dropped": dropped,
        "letters": letters,
        "places": places,
    }
    write_json(unit.record, done)


class _Writer:
    """Documents -> sentences -> tokens -> the spills of each split."""

    def __init__(self, unit: Unit, tokenizer: Tokenizer) -> None:
        self.unit, self.tokenizer = unit, tokenizer
        config = unit.config
        self.split = splitter(config.language)
        self.digest = Digest(config.seed, config.deduplicate)
        self.dtype = spill_dtype(token_dtype(tokenizer.vocab_size), config.words)
        self.builders = {split: SpillBuilder(self.dtype, config.deduplicate) for split in SPLITS}
        self.spills: list[Spill] = []
        self.dropped = Counter[str]()
        self._empty()

    def _empty(self) -> None:
        self.characters = 0
        self.sentences: list[str] = []  # of all documents
        self.documents: list[tuple[int, int, int, int, int]] = []  # number, key, check, bytes, sentences
        self.validation: list[bool] = []

    def add(self, number: int, text: str, held: bool) -> None:
        sentences = self.split(text)
        content = text.encode()
        self.documents.append((number, *self.digest(content, number), len(content), len(sentences)))
        self.validation.append(held)
        self.sentences += sentences
        self.characters += len(text)
        if self.characters >= BATCH_CHARACTERS:
            self._flush()

    def _flush(self) -> None:
        encoded = self.tokenizer.encode(self.sentences)
        lengths = np.fromiter(map(len, encoded), np.uint32, len(encoded))
        tokens = np.fromiter(chain.from_iterable(encoded), self.dtype, int(lengths.sum(dtype=np.int64)))
        if self.unit.config.words:
            tokens = join_words(tokens, word_starts(self.tokenizer, self.sentences, encoded))
        columns = np.array(self.documents, np.uint64)
        validation = np.array(self.validation)
        self._empty()
        del encoded

        rows = np.zeros(len(columns), ROW)
        rows["document"], rows["key"], rows["check"], rows["text_bytes"] = columns.T[:4]
        owner = np.repeat(np.arange(len(rows)), columns[:, 4].astype(np.int64))
        rows["tokens"] = np.bincount(owner, weights=lengths, minlength=len(rows))
        owner, lengths = owner[lengths > 0], lengths[lengths > 0]
        rows["sentences"] = np.bincount(owner, minlength=len(rows))
        if nothing := int((rows["tokens"] == 0).sum()):
            self.dropped["no token is left of it"] += nothing
        for split, held in zip(SPLITS, (False, True), strict=True):
            chosen = (validation == held) & (rows["tokens"] > 0)
            if chosen.all():
                self._add(split, rows, lengths, tokens)
            elif chosen.any():
                of_chosen = np.repeat(chosen, rows["tokens"])
                self._add(split, rows[chosen], lengths[chosen[owner]], tokens[of_chosen])

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
        if self.documents:
            self._flush()
        for split, builder in self.builders.items():
            if builder.rows:
                self._write(split)
            if builder.duplicates:
                self.dropped["duplicate"] += builder.duplicates
