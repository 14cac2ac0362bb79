"""Reads questions about a context: SQuAD v1.1 and v2.0 json (DRCD has the same form), or rows of a table.

    examples, broken = read_questions("train-v2.0.json", data)

Every answer is looked up in its context. One that stands there with other white space, in another Unicode
form, or a few characters away, gets the place where it is; a question whose answer is nowhere is broken.

Rajpurkar et al., "SQuAD", 2016, https://arxiv.org/abs/1606.05250, and "Know What You Don't Know", 2018,
https://arxiv.org/abs/1806.03822
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bertscale.config import UserError
from bertscale.config.examples import ExamplesConfig
from bertscale.examples.rows import BadRowError, BrokenRow, Row, column, read_rows
from bertscale.tasks.task import QuestionExample
from bertscale.tokenizer.base import normalize, normalize_with_offsets
from data_prep.readers.compressed import DAMAGE
from data_prep.readers.encodings import open_text, other_encoding

NEAR = 32  # characters between where an answer is said to begin and where it does

_find_articles = re.compile(r'"data"\s*:\s*\[')
_skip = re.compile(r"[\s,]*")
_decoder = json.JSONDecoder()


@dataclass(frozen=True)
class AskedQuestion:
    """A question as its file has it; nothing is checked but the types."""

    place: str
    row: dict[str, Any]
    identity: str
    question: str
    context: str
    answers: list[tuple[str, int]] | None  # None: not given


def read_questions(
    path: str | Path, data: ExamplesConfig, say: Callable[[str], None] = print
) -> tuple[list[QuestionExample], list[dict[str, Any]]]:
    """Returns the questions of a file, and those that are left out: {"place", "reason", "row"} of each.

    `say` is given a line for each thing that was mended. Raises UserError for a file that is cut off
    (unless `data.salvage`), that is no table and not of SQuAD's form, or that lacks a column.
    """
    examples: list[QuestionExample] = []
    broken: list[dict[str, Any]] = []
    mended = 0
    for asked in asked_questions(path, data, say):
        if isinstance(asked, BrokenRow):
            broken.append(asked.as_json())
            continue
        try:
            examples.append(question_example(asked))
        except BadRowError as error:
            broken.append(error.as_broken().as_json())
            continue
        mended += list(examples[-1].answers) != (asked.answers or [])
    if mended:
        say(
            f"{path}: {mended:,} question{'s' if mended > 1 else ''} had an answer that stands elsewhere in "
            "the context, or with other white space there; it was found"
        )
    return examples, broken


def question_example(asked: AskedQuestion, answered: bool = True) -> QuestionExample:
    """Makes the example of a question, without `answered` one whose answers are not known.

    Raises BadRowError for a question or context that is blank, or an answer that is nowhere.
    """
    row = Row(asked.place, asked.row)
    given = asked.answers if answered else None
    try:
        answers = tuple(_find(asked, text, start) for text, start in given or ())
    except _UnusableError as error:
        raise BadRowError(row, str(error)) from error
    for name in ("question", "context"):
        if not getattr(asked, name).strip():
            raise BadRowError(row, f"the {name} is blank")
    return QuestionExample(
        place=asked.place,
        row=asked.row,
        identity=asked.identity,
        question=asked.question,
        context=asked.context,
        answers=answers,
        known=given is not None,
    )


def asked_questions(
    path: str | Path, data: ExamplesConfig, say: Callable[[str], None] = print, *, answered: bool = True
) -> Iterator[AskedQuestion | BrokenRow]:
    """Yields the questions of a file as they stand there, without `answered` as if they had no answers.

    Raises UserError, as `read_questions` does.
    """
    name = str(path)
    articles = _articles(name, data, say)
    if articles is None:
        yield from _from_table(name, data, answered)
        return
    for number, article in enumerate(articles):
        title = article.get("title", number + 1) if isinstance(article, dict) else number + 1
        try:
            paragraphs = [(part["context"], part["qas"]) for part in article["paragraphs"]]
        except (KeyError, TypeError) as error:
            raise UserError(
                f"{name}, article {title!r}: not of SQuAD's form, {_reason(error)}; each article has "
                "`paragraphs`, and each of them `context` and `qas`"
            ) from error
        for place, (context, questions) in enumerate(paragraphs, start=1):
            for values in questions:
                where = f"{name}, article {title!r}, paragraph {place}"
                yield _from_article(where, title, context, values, answered)


def _from_table(name: str, data: ExamplesConfig, answered: bool) -> Iterator[AskedQuestion | BrokenRow]:
    wanted = [("data.question", data.question), ("data.context", data.context)]
    missing: BadRowError | None = None
    any_sound = False
    for row in read_rows(name, data, wanted):
        if isinstance(row, BrokenRow):
            yield row
            continue
        try:
            question, context = (column(row, of, key) for key, of in wanted)
        except BadRowError as error:
            missing = missing or error
            yield error.as_broken()
            continue
        any_sound = True
        try:
            answers = column(row, data.answers, "data.answers") if answered else None
        except BadRowError:
            answers = None  # it is only to be answered
        yield _asked(row.place, row.values, row.values.get("id") or row.place, question, context, answers)
    if missing is not None and not any_sound:
        raise missing


class _UnusableError(Exception):
    """The reason why a question is left out."""


def _reason(error: Exception) -> str:
    return f"it lacks {error}" if isinstance(error, KeyError) else "a part of it is no object"


# ----------------------------------------------------------------------------------- one question


def _from_article(
    paragraph: str, title: Any, context: Any, values: Any, answered: bool
) -> AskedQuestion | BrokenRow:
    if not isinstance(values, dict) or "id" not in values or "question" not in values:
        return BrokenRow(paragraph, "a question without `id` or `question`", {})
    place = f"{paragraph}, question {values['id']}"
    row = {"title": title, "id": values["id"], "question": values["question"]}
    given = [] if values.get("is_impossible") is True else values.get("answers")
    return _asked(place, row, values["id"], values["question"], context, given if answered else None)


def _asked(
    place: str, row: dict[str, Any], identity: Any, question: Any, context: Any, given: Any
) -> AskedQuestion | BrokenRow:
    if not isinstance(question, str) or not isinstance(context, str):
        return BrokenRow(place, "the question or the context is no text", row)
    try:
        answers = _answers(given)
    except (KeyError, TypeError, ValueError):
        form = '{"text": [...], "answer_start": [...]} or [{"text": ..., "answer_start": ...}, ...]'
        return BrokenRow(place, f"the answers are not of the form {form}", row)
    return AskedQuestion(place, row, str(identity), question, context, answers)


def _answers(given: Any) -> list[tuple[str, int]] | None:
    """The answers in any of the forms in use: Hugging Face's two lists, SQuAD's list, or their JSON."""
    if given is None or given == "":
        return None
    if isinstance(given, str):
        given = json.loads(given)
    if isinstance(given, dict):
        pairs = list(zip(given["text"], given["answer_start"], strict=True))
    else:
        pairs = [(answer["text"], answer["answer_start"]) for answer in given]
    if not all(isinstance(text, str) for text, _ in pairs):
        raise TypeError
    return [(text, int(start)) for text, start in pairs]


def _find(asked: AskedQuestion, text: str, start: int) -> tuple[str, int]:
    """The answer as the context writes it, and where. Raises _UnusableError if it is not there."""
    context = asked.context
    if not text.strip():
        raise _UnusableError("an answer is blank")
    if start >= 0 and context.startswith(text, start):
        return text, start
    found = _search(context, text)
    if len(found) > 1:
        found = [(begin, end) for begin, end in found if abs(begin - start) <= NEAR]
        if len(found) != 1:
            reason = f"the answer {_short(text)} is not at character {start:,}, but at several others"
            raise _UnusableError(f"{reason}; give the one that is meant")
    if not found:
        there = context[max(start, 0) :][: len(text)]
        same = next((i for i, (a, b) in enumerate(zip(text, there, strict=False)) if a != b), len(there))
        raise _UnusableError(
            f"the answer does not stand in the context: it has {_short(text[same:])} where, from character "
            f"{max(start, 0) + same:,}, the context has {_short(there[same:])}"
        )
    begin, end = found[0]
    return context[begin:end], begin


def _search(context: str, text: str) -> list[tuple[int, int]]:
    """Where `text` stands in another Unicode form, or with more, less, or other white space."""
    line, places = normalize_with_offsets(context, "NFKC")
    wanted = normalize(text, "NFKC")
    if found := _occurrences(line, places, wanted):
        return found
    places = [span for character, span in zip(line, places, strict=True) if character != " "]
    found = _occurrences(line.replace(" ", ""), places, wanted.replace(" ", ""))
    return [(begin, end) for begin, end in found if _edge(context, begin) and _edge(context, end)]


def _occurrences(line: str, places: list[tuple[int, int]], wanted: str) -> list[tuple[int, int]]:
    hits = [match.start() for match in re.finditer(re.escape(wanted), line)] if wanted else []
    return [(places[i][0], places[i + len(wanted) - 1][1]) for i in hits]


def _edge(text: str, place: int) -> bool:
    """Whether no word goes on at this place."""
    return not (text[place - 1 : place].isalnum() and text[place : place + 1].isalnum())


def _short(text: str, longest: int = 40) -> str:
    return repr(text if len(text) <= longest else text[:longest] + "...")


# -------------------------------------------------------------------------------------- whole file


def _articles(name: str, data: ExamplesConfig, say: Callable[[str], None]) -> list[Any] | None:
    """The articles of a file of SQuAD's form; None where the file is a table."""
    if data.format not in ("auto", "json", "squad") or (
        data.format == "auto" and not re.search(r"\.json(\.\w+)?$", name.lower())
    ):
        return None
    text = _whole_text(name, data.encoding)
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        begin = _find_articles.search(text)
        if begin is None and data.format != "squad":
            return None  # lines, or a list of rows: `read_rows` tells what is wrong with it
        return _salvaged(name, text, begin.end() if begin else len(text), error, data, say)
    articles = values.get("data") if isinstance(values, dict) else None
    if data.format == "squad":
        if not isinstance(articles, list):
            raise UserError(f'{name} is not of SQuAD\'s form, {{"data": [articles]}}')
        return articles
    # Hugging Face writes rows as {"data": [rows]} too.
    is_squad = isinstance(articles, list) and any(
        "paragraphs" in one for one in articles if isinstance(one, dict)
    )
    return articles if is_squad else None


def _whole_text(name: str, encoding: str) -> str:
    """The text of a file, as far as it can be read: also one whose compressed form is cut off."""
    blocks: list[bytes] = []
    try:
        open(name, "rb").close()
        with open_text(name, encoding) as stream:
            while block := stream.read1(2**20):
                blocks.append(block)
    except EOFError:
        pass  # the JSON ends too early as well, which is told with its place
    except DAMAGE as error:
        told = isinstance(error, OSError) and error.strerror
        reason = told or f"the file is damaged ({error}); get a whole copy"
        raise UserError(f"cannot read {name}: {reason}") from error
    content = b"".join(blocks)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if error.reason == "unexpected end of data":  # the file is cut off inside a character
            return content[: error.start].decode("utf-8-sig")
        line = content[: error.start].count(b"\n") + 1
        hint = other_encoding(name, encoding) or "give the file's own"
        raise UserError(
            f"{name}, line {line:,}, byte {error.start:,}: bytes that are not {encoding}; "
            + hint.replace("give encoding=", "set data.encoding=")
        ) from error


def _salvaged(
    name: str,
    text: str,
    position: int,
    error: json.JSONDecodeError,
    data: ExamplesConfig,
    say: Callable[[str], None],
) -> list[Any]:
    """The whole articles before the place where the file breaks. Raises UserError unless `data.salvage`."""
    articles: list[Any] = []
    while True:
        try:
            article, position = _decoder.raw_decode(text, _end(_skip, text, position))
        except json.JSONDecodeError:
            break
        articles.append(article)
    cut = "is cut off" if error.pos >= len(text.rstrip()) or "Unterminated" in error.msg else "breaks"
    byte = len(text[: error.pos].encode())
    where = f"{cut} at line {error.lineno:,}, character {error.colno:,} (byte {byte:,})"
    last = articles[-1].get("title") if articles and isinstance(articles[-1], dict) else None
    count = f"{len(articles):,} whole article{'' if len(articles) == 1 else 's'}"
    before = count + (f", the last one {last!r}" if last else "")
    if not data.salvage or not articles:
        remedy = "get a whole copy of the file" + (
            ", or take the whole articles with data.salvage=true (`bertscale score`: --salvage)"
            if articles
            else ""
        )
        raise UserError(f"{name} {where}, after {before}; {remedy}")
    say(f"{name} {where}; data.salvage takes the {before}")
    return articles


def _end(pattern: re.Pattern[str], text: str, position: int) -> int:
    match = pattern.match(text, position)
    return match.end() if match else position
