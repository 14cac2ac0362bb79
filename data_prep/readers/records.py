"""What a reader yields, and the cutting of documents that are too long to be one.

A record is

    str      the text of a document
    Cut      a str, too: it continues the record before it, whose document was longer than LONGEST
    Dropped  a document that is left out for what it is, such as an article without a text
    Bad      what cannot be read: why, where, and how it begins
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

LONGEST = 2**20  # characters of a record's text
EXCERPT = 200  # characters
INVALID_UTF8 = "invalid UTF-8"  # the reason of a Bad

_blank_line = re.compile(r"\n\s*\n")
_sentence_end = re.compile(r"[.!?…][\"'”’»)\]]*\s|[。！？][”’」』）]*")
_lone_surrogate = re.compile("[\ud800-\udfff]")


class Cut(str):
    """The continuation of a document that was longer than LONGEST."""

    __slots__ = ()


@dataclass(frozen=True)
class Dropped:
    """A document that is left out for what it is."""

    reason: str


@dataclass(frozen=True)
class Bad:
    """A record that cannot be read.

    reason: one of few, to count by. place: the file and the byte (of its text, if it is compressed), line or
    row. excerpt: the first 200 characters. lost: about how many bytes of the file went with it.
    """

    reason: str
    place: str
    excerpt: str = ""
    lost: int = field(default=0, compare=False)

    def line(self) -> bytes:
        """What the quarantine file holds of it."""
        content = {"place": self.place, "reason": self.reason, "excerpt": self.excerpt}
        return json.dumps(content, ensure_ascii=False).encode() + b"\n"


Record = str | Dropped | Bad


class DamagedFileError(Exception):
    """A file of which the last `share` cannot be read; its cause says why."""

    def __init__(self, share: float) -> None:
        super().__init__(share)
        self.share = share


BLANK = Dropped("blank")  # an empty line, row or file


def bad(reason: str, name: str, where: str, content: bytes | str = "", lost: int | None = None) -> Bad:
    """A Bad whose place and excerpt can be printed whatever the file's name and `content` hold.

    `lost`: bytes, where `content` is not all of it.
    """
    if lost is None:
        lost = len(content) if isinstance(content, bytes) else len(content.encode("utf-8", "replace"))
    if isinstance(content, bytes):
        content = content[: 4 * EXCERPT].decode("utf-8", "replace")
    excerpt = content[:EXCERPT].encode("utf-8", "replace").decode()
    return Bad(reason, f"{printable(name)}, {where}", excerpt, lost)


def printable(name: str) -> str:
    """A file's name without the lone surrogates that stand for bytes that are no UTF-8."""
    return os.fsencode(name).decode("utf-8", "replace")


def judged(content: bytes | str, name: str, where: str) -> Iterator[Record]:
    """The records of one whole text: itself, its parts if it is too long, or why it is bad."""
    text = content
    if isinstance(text, bytes):
        try:
            text = text.decode("utf-8")
        except UnicodeDecodeError:
            yield bad(INVALID_UTF8, name, where, content)
            return
    if not text or text.isspace():
        yield BLANK
    elif not text.isascii() and _lone_surrogate.search(text):
        yield bad("lone surrogate", name, where, text)
    elif len(text) <= LONGEST:
        yield text
    else:
        yield from cut(text)


def cut(text: str) -> Iterator[str]:
    """`text`, cut where it must be; every part but the first is a Cut."""
    start, kind = 0, str
    while len(text) - start > LONGEST:
        end = cut_at(text, start)
        yield kind(text[start:end])
        start, kind = end, Cut
    yield kind(text[start:])


def cut_at(text: str, start: int) -> int:
    """Where to cut what follows `start`, in the second half of LONGEST characters.

    The last blank line; if there is none the last end of a sentence, white space, or the very end.
    """
    middle, end = start + LONGEST // 2, start + LONGEST
    for pattern in (_blank_line, _sentence_end):
        for size in (LONGEST // 128, LONGEST // 2):  # most often it is near
            last = 0
            for match in pattern.finditer(text, end - size, end):
                last = match.end()
            if last:
                return last
    space = max(text.rfind(" ", middle, end), text.rfind("\n", middle, end))
    return space + 1 if space >= 0 else end
