"""Reads examples whose words have tags: CoNLL columns, rows with lists of tokens and tags, texts with spans.

    examples, broken = read_token_examples("eng.train", data)

CoNLL columns: a token a line, columns between tabs or spaces, an empty line behind each sentence. The token
is in the first column and its tag in the last one, unless `data.tokens` and `data.tags` have numbers.
Comments of CoNLL-U (`# ...`) and its lines for several words (1-2) are passed over. `-DOCSTART-` lines, or
`# newdoc`, begin a document: its number is the column "document", for `data.group`.

Of a sentence with a broken line nothing is used: the others have lost their place.
"""

from __future__ import annotations

import re
from codecs import BOM_UTF8
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bertscale.config import UserError
from bertscale.config.examples import Column, ExamplesConfig
from bertscale.examples.rows import (
    EXCERPT,
    BadRowError,
    BrokenRow,
    Row,
    not_text,
    read_content,
)
from bertscale.examples.token_rows import example_of_tokens, read_token_rows
from bertscale.tasks.tags import OUTSIDE, is_tag
from bertscale.tasks.task import TokenExample
from bertscale.tasks.words import are_characters

DOCUMENT = "document"  # the column of a CoNLL file that has the number of a sentence's document
_TABLES = (".jsonl", ".ndjson", ".json", ".parquet", ".csv")
_several_words = re.compile(r"\d+[-.]\d+")  # of CoNLL-U: the numbers of words that are written as one


@dataclass
class _Sentence:
    """Lines of a CoNLL file between two empty ones."""

    place: str
    document: int
    tokens: list[str] = field(default_factory=list)
    tags: list[str] = field(default_factory=list)
    broken: BrokenRow | None = None


def read_token_examples(
    path: str, data: ExamplesConfig, *, tagged: bool = True
) -> tuple[list[TokenExample], list[dict[str, Any]]]:
    """Reads one file: its examples, and its broken rows as lines of quarantine.jsonl.

    Without `tagged` no tags are looked for, as for texts of which they are to be predicted; then a column of
    texts does as well as one of tokens. Raises UserError for a file that cannot be read at all.
    """
    if is_conll(path, data):
        found = read_conll(path, data, tagged)
        examples = [one for one in found if isinstance(one, TokenExample)]
        broken = [one for one in found if isinstance(one, BrokenRow)]
    else:
        examples, broken = read_token_rows(path, data, tagged)
    examples, strange = _without_strange_tags(examples)
    return examples, [row.as_json() for row in (*broken, *strange)]


def is_conll(path: str, data: ExamplesConfig) -> bool:
    """Whether a file has CoNLL columns: data.format, or any ending that is not one of rows with lists."""
    if data.format != "auto":
        return data.format == "conll"
    if data.spans is not None:
        return False
    return not any(ending in _TABLES for ending in Path(path.lower()).suffixes[-2:])


# ----------------------------------------------------------------------------------------------- conll


def read_conll(path: str, data: ExamplesConfig, tagged: bool) -> list[TokenExample | BrokenRow]:
    """Returns the sentences of a file of CoNLL columns, in order, with those of broken lines among them."""
    sentences = list(_sentences(path, data, tagged))
    whole = [sentence for sentence in sentences if not sentence.broken]
    spaces = not are_characters([sentence.tokens for sentence in whole])
    documents = any(sentence.document for sentence in whole)
    examples: list[TokenExample | BrokenRow] = []
    for sentence in sentences:
        if sentence.broken:
            examples.append(sentence.broken)
            continue
        values: dict[str, Any] = {"tokens": sentence.tokens}
        if sentence.tags:
            values["tags"] = sentence.tags
        if documents:
            values[DOCUMENT] = str(sentence.document)
        try:
            row = Row(sentence.place, values)
            examples.append(example_of_tokens(row, sentence.tokens, sentence.tags or None, spaces))
        except BadRowError as error:
            examples.append(error.as_broken())
    return examples


def _sentences(path: str, data: ExamplesConfig, tagged: bool) -> Iterator[_Sentence]:
    lines = _lines(path, data.encoding)
    split, width = _columns(lines, data.separator)
    token_column = _number(data.tokens, "tokens", 0, width, path)
    tag_column = _number(data.tags, "tags", width - 1, width, path) if tagged else None
    if tag_column == token_column:
        tag_column = None
    strip = re.compile(data.strip_tokens) if data.strip_tokens else None
    document = 0
    sentence: _Sentence | None = None
    for number, line in lines:
        place = f"{path}, line {number}"
        if isinstance(line, str) and not line.strip(" \t\r\ufeff"):
            if sentence:
                yield sentence
            sentence = None
            continue
        cells = split(line) if isinstance(line, str) else []
        if isinstance(line, str) and (line.startswith("# ") or line == "#") and len(cells) != width:
            document += line.startswith("# newdoc")
            continue
        if cells and cells[0] == "-DOCSTART-":
            document += 1
            continue
        if width >= 10 and cells and _several_words.fullmatch(cells[0]):
            continue
        sentence = sentence or _Sentence(place, document)
        if isinstance(line, bytes):
            sentence.broken = sentence.broken or not_text(path, number, line, data.encoding)
            continue
        reason = ""
        if len(cells) != width:
            reason = f"{len(cells)} columns where other lines have {width}"
        else:
            token = cells[token_column]
            token = strip.sub("", token) if strip else token
            sentence.tokens.append(token)
            if not token.strip():
                reason = "no token in its column"
            if tag_column is not None:
                sentence.tags.append(cells[tag_column])
        if reason:
            sentence.broken = sentence.broken or BrokenRow(place, reason, line[:EXCERPT])
    if sentence:
        yield sentence


def _lines(path: str, encoding: str) -> list[tuple[int, str | bytes]]:
    """The numbered lines of a file; one that is no text in this encoding comes as bytes."""
    lines: list[tuple[int, str | bytes]] = []
    for number, line in enumerate(read_content(path, encoding).removeprefix(BOM_UTF8).split(b"\n"), 1):
        line = line.removesuffix(b"\r")
        try:
            lines.append((number, line.decode()))
        except UnicodeDecodeError:
            lines.append((number, line))
    return lines


def _columns(
    lines: Sequence[tuple[int, str | bytes]], separator: str | None
) -> tuple[Callable[[str], list[str]], int]:
    """Returns what splits a line into its columns, and how many most lines have.

    Where no separator is given it is a tab if most lines have one: then a column may hold spaces.
    """
    texts = [line for _, line in lines if isinstance(line, str) and line.strip() and line[0] != "#"]
    texts = texts or [line for _, line in lines if isinstance(line, str) and line.strip()]
    tabs = sum("\t" in line for line in texts)
    if separator is None and 2 * tabs > len(texts):
        separator = "\t"

    def split(line: str) -> list[str]:
        if separator is None:
            return re.split("[ \t]+", line.strip(" \t"))
        return [cell.strip(" ") or cell for cell in line.split(separator)]

    counts = Counter(len(split(line)) for line in texts)
    return split, counts.most_common(1)[0][0] if counts else 1


def _number(given: Column, default_name: str, default: int, width: int, path: str) -> int:
    """The number of a column of a CoNLL file, from 0; below 0 they are counted from the last one."""
    if given == default_name:
        return default
    try:
        number = int(given)
    except ValueError:
        number = width
    if not -width <= number < width:
        raise UserError(
            f"{path}: data.{default_name}={given!r} is no column of it; there are {width}, numbered from 0"
        )
    return number % width


# ------------------------------------------------------------------------------------------------ tags


def _without_strange_tags(examples: list[TokenExample]) -> tuple[list[TokenExample], list[BrokenRow]]:
    """Takes out examples with a tag of no scheme, where nearly all tags of the file are of one."""
    counts = Counter(tag for example in examples for tag in example.tags or () if tag != OUTSIDE)
    strange = {tag for tag in counts if not is_tag(tag)}
    if not strange or sum(counts[tag] for tag in strange) > 0.1 * counts.total():
        return examples, []  # none, or the tags are no scheme's but classes
    good: list[TokenExample] = []
    broken: list[BrokenRow] = []
    usual = next(tag for tag, _ in counts.most_common() if tag not in strange)
    for example in examples:
        tag = next((tag for tag in example.tags or () if tag in strange), None)
        if tag is None:
            good.append(example)
        else:
            reason = f"the tag {tag!r} is in no scheme; others are like {usual!r}"
            broken.append(BrokenRow(example.place, reason, example.row))
    return good, broken
