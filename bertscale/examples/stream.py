"""Examples that are to be predicted, one for each row of a file, in the order of the file.

    for given in read_inputs("classification", "reviews.jsonl", data):
        ...                        # an example, or the BrokenRow of a row that none can be made of

Rows of tables (csv, tsv, jsonl, parquet) come as a stream, of which only the first ones are held together;
CoNLL columns, and the one value of a json file, are read whole.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from itertools import chain, islice
from typing import TypeVar

from bertscale.config import UserError
from bertscale.config.examples import ExamplesConfig, TaskKind
from bertscale.examples.conll import is_conll, read_conll
from bertscale.examples.rows import BadRowError, BrokenRow, Row, read_rows, wanted_columns
from bertscale.examples.squad import AskedQuestion, asked_questions, question_example
from bertscale.examples.text_rows import check_columns, skipped_label, text_example
from bertscale.examples.token_rows import (
    are_texts,
    columns_of_tokens,
    example_of_spans,
    example_of_tokens,
    token_lists,
)
from bertscale.tasks.task import ChoiceExample, Example, QuestionExample, TextExample, TokenExample
from bertscale.tasks.words import are_characters

FIRST = 4096  # rows by which a file is judged: whether it has the columns, and has tokens that are characters

Made = TypeVar("Made", bound=Example)
Note = Callable[[str], None]


def read_inputs(
    kind: TaskKind, path: str, data: ExamplesConfig, *, labelled: bool = False, say: Note = print
) -> Iterator[Example | BrokenRow]:
    """Yields an example for each row. With `labelled` it has its target, but for rows that have none that
    can be used; `say` is given a line for each thing that was mended.

    Raises UserError for a file that cannot be read, or whose first rows all lack a column that is needed.
    """
    lacking: list[str] = []
    rows = _inputs(kind, path, data, labelled, lacking.append, say)
    first = list(islice(rows, FIRST))
    if lacking and not any(_is_whole(given, labelled) for given in first):
        raise UserError(lacking[0])
    yield from first
    yield from rows


def _inputs(
    kind: TaskKind, path: str, data: ExamplesConfig, labelled: bool, lack: Note, say: Note
) -> Iterator[Example | BrokenRow]:
    if kind == "question_answering":
        yield from _questions(path, data, labelled, lack, say)
    elif kind != "tokens":
        check_columns(kind, data)
        rows = read_rows(path, data, wanted_columns(data, labelled))
        yield from _each(rows, partial(_of_text, kind=kind, data=data), labelled, lack)
    elif is_conll(path, data):
        yield from read_conll(path, data, labelled)
    else:
        yield from _token_rows(path, data, labelled, lack)


def _of_text(row: Row, labelled: bool, kind: TaskKind, data: ExamplesConfig) -> TextExample | ChoiceExample:
    skipped = labelled and data.skip_labels and skipped_label(row, data) is not None
    return text_example(row, kind, data, labelled and not skipped)


def _token_rows(
    path: str, data: ExamplesConfig, labelled: bool, lack: Note
) -> Iterator[TokenExample | BrokenRow]:
    as_text = are_texts(path, data, labelled)
    rows = read_rows(path, data, columns_of_tokens(data, labelled, as_text))
    if as_text:
        yield from _each(rows, lambda row, tagged: example_of_spans(row, data, tagged), labelled, lack)
        return
    first = list(islice(rows, FIRST))
    spaces = not are_characters(list(_token_lists(first, data)))

    def make(row: Row, tagged: bool) -> TokenExample:
        return example_of_tokens(row, *token_lists(row, data, tagged), spaces)

    yield from _each(chain(first, rows), make, labelled, lack)


def _token_lists(rows: Iterable[Row | BrokenRow], data: ExamplesConfig) -> Iterator[list[str]]:
    for row in rows:
        if isinstance(row, Row):
            with contextlib.suppress(BadRowError):
                yield token_lists(row, data, False)[0]


def _questions(
    path: str, data: ExamplesConfig, labelled: bool, lack: Note, say: Note
) -> Iterator[QuestionExample | BrokenRow]:
    for asked in asked_questions(path, data, say, answered=labelled):
        given = asked if isinstance(asked, BrokenRow) else _question(asked, labelled)
        if isinstance(given, BrokenRow) and given.lacks_column:
            lack(f"{given.place}: {given.reason}")
        yield given


def _question(asked: AskedQuestion, labelled: bool) -> QuestionExample | BrokenRow:
    """The example of a question; if its answers are not to be found in the context, without any."""
    if labelled:
        with contextlib.suppress(BadRowError):
            return question_example(asked)
    try:
        return question_example(asked, answered=False)
    except BadRowError as error:
        return error.as_broken()


def _each(
    rows: Iterable[Row | BrokenRow], make: Callable[[Row, bool], Made], labelled: bool, lack: Note
) -> Iterator[Made | BrokenRow]:
    """Makes an example of each row; with a target if `labelled`, and else, or if it has none, without."""
    for row in rows:
        given: Made | BrokenRow = row if isinstance(row, BrokenRow) else _made(row, make, labelled, lack)
        if labelled and isinstance(row, Row) and isinstance(given, BrokenRow):
            given = _made(row, make, False, lack)
        yield given


def _made(row: Row, make: Callable[[Row, bool], Made], labelled: bool, lack: Note) -> Made | BrokenRow:
    try:
        return make(row, labelled)
    except BadRowError as error:
        if error.lacks_column:
            lack(str(error))
        return error.as_broken()


def _is_whole(given: Example | BrokenRow, labelled: bool) -> bool:
    return isinstance(given, Example) and (has_target(given) or not labelled)


def has_target(example: Example) -> bool:
    """Whether it is known what is right."""
    match example:
        case TextExample(target=target) | ChoiceExample(target=target):
            return target is not None
        case TokenExample(tags=tags):
            return tags is not None
        case QuestionExample(known=known):
            return known
    raise TypeError(f"{type(example).__name__} is no example of a task")


def without_target(example: Example) -> Example:
    """Returns the example of which nothing is known to be right."""
    match example:
        case TextExample() | ChoiceExample():
            return replace(example, target=None)
        case TokenExample():
            return replace(example, tags=None)
        case QuestionExample():
            return replace(example, answers=(), known=False)
    raise TypeError(f"{type(example).__name__} is no example of a task")


def for_score(example: Example) -> Example:
    """Returns the example with what `Task.score` looks at: without its row and its long texts."""
    match example:
        case TextExample():
            return replace(example, row={}, texts=())
        case ChoiceExample():
            return replace(example, row={}, text="", options=())
        case TokenExample():
            return replace(example, row={}, text="")
        case QuestionExample():
            return replace(example, row={}, context="")
    raise TypeError(f"{type(example).__name__} is no example of a task")
