"""Text in other encodings than UTF-8: read as UTF-8, and recognised where nobody said which one it is.

    with open_text("zola.txt.gz", "latin-1") as stream:    # the bytes of its text in UTF-8
        line = stream.readline()

A file that begins with the mark of UTF-16 or UTF-32 is read as such, whatever encoding is named. A byte that
is no part of a character comes as INVALID, which is not UTF-8 either: the reader of the file
finds it in the record in which it stands.
"""

from __future__ import annotations

import codecs
import io
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from bertscale.config import UserError, is_utf8
from data_prep.readers.compressed import DAMAGE, Damage, Decompressed, damage_of, open_stream
from data_prep.readers.records import printable

INVALID = b"\xff"
LOOKED_AT = 2**18  # bytes of a file by which its encoding is recognised
_MARKS_OF = {  # UTF-32 first: in little-endian it begins as UTF-16 does
    "utf-32": (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE),
    "utf-16": (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE),
}
# The state of these goes on from line to line; of all others a "\n" byte is a newline wherever it stands.
STATEFUL = ("utf-7", "hz", "iso2022")


def _invalid(error: UnicodeError) -> tuple[str | bytes, int]:
    """Puts INVALID in the place of what cannot be decoded, or, as a lone surrogate, encoded."""
    assert isinstance(error, UnicodeDecodeError | UnicodeEncodeError)
    count = error.end - error.start
    mark = INVALID if isinstance(error, UnicodeEncodeError) else "\udcff"
    return mark * count, error.end


codecs.register_error("bertscale-invalid", _invalid)


def can_be_cut(encoding: str) -> bool:
    """Whether a file may be read from any line on: each line by itself is text, and ends where its bytes say.

    In GB18030, Big5 or Shift-JIS the second byte of a character may be that of an ASCII letter, but none is
    below 0x30, so that "\\n" is one. UTF-16 and its like, and encodings with a state, are read as a whole.
    """
    name = codecs.lookup(encoding).name
    return "\n<doc ".encode(name) == b"\n<doc " and not name.startswith(STATEFUL)


def marked_encoding(stream: io.BufferedReader) -> str | None:
    """UTF-16 or UTF-32, if the stream begins with the mark of one."""
    head = stream.peek(4)[:4]
    return next((encoding for encoding, marks in _MARKS_OF.items() if head.startswith(marks)), None)


class _AsUtf8:
    """The next `size` bytes of `stream` (None: all) as UTF-8; `read1` gives some of them."""

    def __init__(self, stream: io.BufferedReader, encoding: str, size: int | None) -> None:
        self._stream, self._left = stream, size
        self._decoder = codecs.getincrementaldecoder(encoding)("bertscale-invalid")
        self._ready, self._over = b"", False

    def read1(self, size: int) -> bytes:
        while not self._ready and not self._over:
            data = self._stream.read1(size if self._left is None else min(size, self._left))
            if self._left is not None:
                self._left -= len(data)
            self._over = not data
            # The decoder keeps the beginning of a character until the rest of it comes.
            self._ready = self._decoder.decode(data, self._over).encode("utf-8", "bertscale-invalid")
        given, self._ready = self._ready[:size], self._ready[size:]
        return given

    @property
    def damage(self) -> Damage | None:
        return damage_of(self._stream)

    def close(self) -> None:
        pass  # the stream is another's


@contextmanager
def open_text(
    name: str, encoding: str, start: int = 0, end: int | None = None, until_damage: bool = False
) -> Iterator[io.BufferedReader]:
    """The bytes [start, end) of a file (decompressed) as UTF-8. Raises UserError if it cannot be opened.

    Of UTF-8 itself the stream stands at `start` and goes on behind `end`: its readers know where to stop.
    `until_damage` as in `open_stream`.
    """
    with open_stream(name, until_damage) as stream:
        if start:
            stream.seek(start)
        else:
            encoding = marked_encoding(stream) or encoding
        if is_utf8(encoding):
            yield stream
            return
        content: Any = Decompressed(_AsUtf8(stream, encoding, None if end is None else end - start))
        with io.BufferedReader(content, LOOKED_AT) as text:
            yield text


# -------------------------------------------------------------------------------- which one it may be


@cache
def _common_han(encoding: str, first: int, last: int) -> frozenset[str]:
    """The frequent characters of GB2312 and Big5, which have them first: those with these lead bytes."""
    pairs = (bytes((lead, trail)) for lead in range(first, last + 1) for trail in range(0x40, 0xFF))
    return frozenset(text for pair in pairs if len(text := pair.decode(encoding, "ignore")) == 1)


def _matches(pattern: str) -> Callable[[str], int]:
    """Counts the characters of a text that stand in matches of `pattern`."""
    compiled = re.compile(pattern)
    return lambda text: sum(map(len, compiled.findall(text)))


def _is_han_of(encoding: str, first: int, last: int) -> Callable[[str], int]:
    return lambda text: sum(character in _common_han(encoding, first, last) for character in text)


# The letters of more than two thirds of Russian text, beside another one: not the single accents of French.
_FREQUENT = "(?<=[а-яё])[оеаинтсрвл]|[оеаинтсрвл](?=[а-яё])"
_MARKS = "‘’“”–—…«»€£§°·¿¡ªº\xa0"
# An encoding, how many characters of a text are what its languages are made of, and the least share of these
# among those that are not ASCII. Each decodes the bytes of others too: the most particular ones come first.
_SIGNS: tuple[tuple[str, Callable[[str], int], float], ...] = (
    ("cp949", _matches("[가-힣]+"), 0.9),
    ("euc_jp", _matches("[ぁ-ん]+"), 0.2),
    ("shift_jis", _matches("[ぁ-ん]+"), 0.2),
    ("gb18030", _is_han_of("gb2312", 0xB0, 0xD7), 0.6),
    ("big5", _is_han_of("big5", 0xA4, 0xC6), 0.6),
    ("cp1251", _matches(_FREQUENT), 0.5),
    ("koi8-r", _matches(_FREQUENT), 0.5),
    ("iso8859-5", _matches(_FREQUENT), 0.5),
    ("cp1252", _matches(f"[{_MARKS}]|(?<![À-ÿ])[À-ÖØ-öø-ÿŒœŠšŽžŸ]{{1,2}}(?![À-ÿ])"), 0.9),
    ("gb18030", _matches("[\u4e00-\u9fff]+"), 0.8),
)


def recognise(data: bytes) -> str | None:
    """The encoding of which `data`, the beginning of a text, is very likely; None: UTF-8, or nobody knows."""
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    if _decoded(data, "utf-8") is not None:
        return None
    for encoding, count, least in _SIGNS:
        text = _decoded(data, encoding)
        if text is None:
            continue
        others = sum(not character.isascii() for character in text)
        if others and count(text) >= least * others:
            return encoding
    return None


def _decoded(data: bytes, encoding: str) -> str | None:
    try:
        return codecs.getincrementaldecoder(encoding)().decode(data)  # the last character may be cut
    except UnicodeDecodeError:
        return None


def other_encoding(name: str, encoding: str) -> str | None:
    """What to do about a file that is very likely text in another encoding than this; None: nobody knows."""
    try:
        with open_stream(name) as stream:
            data = stream.read(LOOKED_AT)
    except (*DAMAGE, UserError):
        return None
    found = recognise(data)
    if found is None and not is_utf8(encoding) and _decoded(data, "utf-8") is not None:
        found = "utf-8"
    if found is None or codecs.lookup(found) == codecs.lookup(encoding):
        return None
    return f"{printable(name)} decodes as {found}: give encoding={found}"
