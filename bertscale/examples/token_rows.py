"""Rows of lists of tokens and tags, and of texts with character spans, as examples whose words have tags.

    {"tokens": ["EU", "rejects"], "tags": ["B-ORG", "O"]}
    {"text": "EU rejects", "spans": [{"start": 0, "end": 2, "label": "ORG"}]}

Lists may also be written as text: as JSON, as Python writes them, or with spaces between their parts. Tags
that are numbers are those of `data.labels`. A span may be a list as well, `[0, 2, "ORG"]`; white space at its
ends is left out. Spans do not overlap, since a word has one tag.
"""

from __future__ import annotations

import ast
import json
import re
import unicodedata
from itertools import pairwise
from typing import Any

from bertscale.config import UserError
from bertscale.config.examples import Column, ExamplesConfig
from bertscale.examples.rows import BadRowError, BrokenRow, Row, column, read_rows
from bertscale.tasks.tags import tags_of
from bertscale.tasks.task import TokenExample
from bertscale.tasks.words import are_characters, join_tokens, split_words


def read_token_rows(
    path: str, data: ExamplesConfig, tagged: bool
) -> tuple[list[TokenExample], list[BrokenRow]]:
    """Reads the examples of a file and its broken rows; `tagged` as in `conll.read_token_examples`."""
    as_text = are_texts(path, data, tagged)
    broken: list[BrokenRow] = []
    lists: list[tuple[Row, list[str], list[str] | None]] = []
    examples: list[TokenExample] = []
    for row in read_rows(path, data, columns_of_tokens(data, tagged, as_text)):
        try:
            if isinstance(row, BrokenRow):
                broken.append(row)
            elif as_text:
                examples.append(example_of_spans(row, data, tagged))
            else:
                lists.append((row, *token_lists(row, data, tagged)))
        except BadRowError as error:
            broken.append(error.as_broken())
    spaces = not are_characters([tokens for _, tokens, _ in lists])
    for row, tokens, tags in lists:
        try:
            examples.append(example_of_tokens(row, tokens, tags, spaces))
        except BadRowError as error:
            broken.append(error.as_broken())
    return examples, broken


def are_texts(path: str, data: ExamplesConfig, tagged: bool) -> bool:
    """Whether the rows of a file have texts, and not lists of tokens."""
    return data.spans is not None or (not tagged and not _has_tokens(path, data))


def columns_of_tokens(data: ExamplesConfig, tagged: bool, as_text: bool) -> list[tuple[str, Column]]:
    """Returns the columns that rows must have, with the keys that name them."""
    wanted: list[tuple[str, Column]] = [("data.text", data.text) if as_text else ("data.tokens", data.tokens)]
    if tagged:
        wanted.append(("data.tags", data.tags) if data.spans is None else ("data.spans", data.spans))
    return wanted


def _has_tokens(path: str, data: ExamplesConfig) -> bool:
    """Whether the first row has the column of tokens."""
    try:
        first = next(iter(read_rows(path, data, [("data.tokens", data.tokens)])), None)
        if isinstance(first, Row):
            column(first, data.tokens, "data.tokens")
    except UserError:
        return False
    return True


def token_lists(row: Row, data: ExamplesConfig, tagged: bool) -> tuple[list[str], list[str] | None]:
    """Returns the tokens and, if `tagged`, the tags of a row. Tags that are numbers are those of data.labels,
    as data sets have. Raises BadRowError for what are no lists."""
    tokens = [str(token) for token in _list(row, column(row, data.tokens, "data.tokens"), "tokens")]
    if data.strip_tokens:
        tokens = [re.sub(data.strip_tokens, "", token) for token in tokens]
    if not tagged:
        return tokens, None
    tags = []
    for tag in _list(row, column(row, data.tags, "data.tags"), "tags"):
        if isinstance(tag, int) and data.labels is not None:
            if not 0 <= tag < len(data.labels):
                raise BadRowError(row, f"tag {tag}, but data.labels has {len(data.labels)}")
            tag = data.labels[tag]
        tags.append(str(tag))
    return tokens, tags


def _list(row: Row, value: Any, name: str) -> list[Any]:
    """A list of a cell: a list, one that is written as JSON or as Python writes it, or between spaces."""
    if isinstance(value, str):
        parsed: Any = None
        for parse in (json.loads, ast.literal_eval) if value.startswith("[") else ():
            try:
                parsed = parse(value)
                break
            except (ValueError, SyntaxError, RecursionError, MemoryError):
                continue
        value = parsed if isinstance(parsed, list) else value.split()
    if not isinstance(value, list) or any(isinstance(one, dict | list) or one is None for one in value):
        raise BadRowError(row, f"the {name} are {str(value)[:40]!r}, which is no list of texts")
    return value


def example_of_tokens(row: Row, tokens: list[str], tags: list[str] | None, spaces: bool) -> TokenExample:
    """Makes an example of tokens; `spaces` as in `join_tokens`. Raises BadRowError for what is none."""
    if tags is not None and len(tags) != len(tokens):
        raise BadRowError(row, f"{len(tokens)} tokens, but {len(tags)} tags")
    blank = next((i for i, token in enumerate(tokens) if not token.strip()), None)
    if blank is not None:
        raise BadRowError(row, f"token {blank + 1} of {len(tokens)} is blank")
    text, words = join_tokens(tokens, spaces)
    _check_text(row, text)
    return TokenExample(
        place=row.place, row=row.values, text=text, words=words, tags=None if tags is None else tuple(tags)
    )


def _check_text(row: Row, text: Any) -> None:
    """Raises BadRowError for what has no character that a tokenizer could read."""
    if not isinstance(text, str) or all(unicodedata.category(character)[0] in "CZ" for character in text):
        raise BadRowError(row, "no text")


def example_of_spans(row: Row, data: ExamplesConfig, tagged: bool) -> TokenExample:
    """Makes an example of a text with character spans: no word goes across the edge of one. Raises
    BadRowError for what is none."""
    text = column(row, data.text, "data.text")
    _check_text(row, text)
    spans: list[tuple[int, int, str]] = []
    if tagged and data.spans is not None:
        spans = _spans(row, text, column(row, data.spans, "data.spans"))
    words = split_words(text, [edge for start, end, _ in spans for edge in (start, end)])
    first = {start: i for i, (start, _) in enumerate(words)}
    last = {end: i for i, (_, end) in enumerate(words)}
    entities = [(first[start], last[end] + 1, label) for start, end, label in spans]
    tags = tuple(tags_of(entities, len(words), "bio")) if tagged else None
    return TokenExample(place=row.place, row=row.values, text=text, words=words, tags=tags)


def _spans(row: Row, text: str, value: Any) -> list[tuple[int, int, str]]:
    """The spans of a row in order, without white space at their ends; the same span twice is one."""
    if isinstance(value, str):
        try:
            value = json.loads(value or "[]")
        except ValueError as error:
            raise BadRowError(row, f"the spans are no JSON ({error})") from error
    if not isinstance(value or [], list):
        raise BadRowError(row, "the spans are no list")
    spans = sorted({_span(row, text, span) for span in value or []})
    for (_, end, _), (start, *_) in pairwise(spans):
        if start < end:
            raise BadRowError(row, f"two spans overlap at character {start}; a word has one tag")
    return spans


def _span(row: Row, text: str, span: Any) -> tuple[int, int, str]:
    parts = [span.get(key) for key in ("start", "end", "label")] if isinstance(span, dict) else span
    match parts:
        case [int(start), int(end), str(label)] if label:
            pass
        case _:
            raise BadRowError(row, f"the span {str(span)[:60]} has no start, end and label")
    if not 0 <= start < end <= len(text):
        raise BadRowError(row, f"the span {start} to {end} is outside of the text, of {len(text)} characters")
    marked = text[start:end]
    if not marked.strip():
        raise BadRowError(row, f"the span {start} to {end} is white space")
    start += len(marked) - len(marked.lstrip())
    end = start + len(marked.strip())
    return start, end, label
