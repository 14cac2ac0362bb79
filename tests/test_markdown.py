"""Markdown's marks: what each pair of them encloses, and work that grows with the text alone."""

from __future__ import annotations

import random
import re
import sys
from collections.abc import Callable
from functools import partial
from types import FrameType
from typing import Any

import pytest

from data_prep.readers import markdown
from data_prep.readers.markdown import MarkdownText, without_marks

# The rules as regular expressions that look for the second mark of each pair anew.
RULES: list[tuple[re.Pattern[str], str, int]] = [
    (re.compile(r"(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)", re.DOTALL), r"\2", 1),
    (re.compile(r"!\[[^\]]*\](?:\([^()]*(?:\([^()]*\)[^()]*)*\)|\[[^\]]*\])"), "", 1),
    (markdown._link, r"\1", 1),
    (re.compile(r"\[\^[^\]\s]+\]"), "", 1),
    (re.compile(r"(\*{1,3})(?=[^\s*])(.+?)(?<=[^\s*])\1", re.DOTALL), r"\2", 2),
    (re.compile(r"(?<!\w)(_{1,3})(?=[^\s_])(.+?)(?<=[^\s_])\1(?!\w)", re.DOTALL), r"\2", 2),
    (re.compile(r"~~(?=\S)(.+?)(?<=\S)~~", re.DOTALL), r"\1", 1),
]
HEADING = re.compile(r" {0,3}#{1,6}(?:[ \t]+(.*?))?(?:[ \t]+#+)?[ \t]*$")


def by_rules(text: str) -> str:
    for rule, kept, times in RULES:
        for _ in range(times):
            text = rule.sub(kept, text)
    return text


def test_marks_are_those_that_the_rules_say() -> None:
    draw = random.Random(7)
    characters = [*"**__~~``!()  ab.é中\n\t", "***", "___", "![", "[^x", "]", "](", "~~"]
    for _ in range(4000):
        text = "".join(draw.choices(characters, k=draw.randrange(1, 28)))
        assert without_marks(text) == by_rules(text), text


def test_headings_lose_their_marks() -> None:
    draw = random.Random(8)
    for _ in range(2000):
        line = "#" * draw.randrange(1, 8) + "".join(draw.choices("## \t ab", k=draw.randrange(8)))
        heading = HEADING.match(line)
        if heading:
            expected = without_marks(heading[1] or "").strip()
            assert MarkdownText().feed(line, last=True) == (f"{expected}\n\n" if expected else ""), line


# What is not closed, or closed late, or in another way than it was opened.
HOSTILE = [
    "*Term\n", "_term\n", "***a ", "**a *b ", "a* b*", "**a* ", "__a_ ", " ~~a", "a~~ ", "![a", "![a]", "[^a",
    "`a ``b ", "[a](b", "<a@b", "**a** ", "[", "<!--a", "<!--a-->", "[a]: ", "# a ", "#  ", "| ", "> ",
    "- - ",
]  # fmt: skip


def lines_run(work: Callable[[], Any]) -> int:
    """The lines of the module that run, each call of it included."""
    count = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal count
        if frame.f_code.co_filename != markdown.__file__:
            return None
        count += 1
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)
    return count


@pytest.mark.parametrize("piece", HOSTILE)
def test_work_doubles_with_the_text(piece: str) -> None:
    once, twice = (lines_run(partial(MarkdownText().feed, piece * n, last=True)) for n in (300, 600))
    assert twice < 2.2 * once


def test_hostile_documents_end_soon() -> None:
    """Of 2^16 characters: what is quadratic takes half a minute for many of them."""
    for piece in HOSTILE:
        MarkdownText().feed(piece * (2**16 // len(piece)) + "x\n", last=True)
    assert without_marks("*a" + " x" * 2**17 + "*") == "a" + " x" * 2**17
