"""Sentences by the library sentencex, in bounded time, and what it does not know of Korean and Hebrew.

    split("그는 “좋다.” 라고 말했다. 그리고 갔다.", "ko")  # ["그는 “좋다.” 라고 말했다.", "그리고 갔다."]

The library's time grows with the square of the sentences in a line, where no space stands between them:
400,000 characters of Chinese would take a minute. So a long line is read through a window that moves on.
"""

from __future__ import annotations

import re

WINDOW = 2**14  # characters that the library sees at once
MARGIN = 1000  # characters at the end of a window in which no sentence ends: what follows decides, too

_HEBREW = ("he", "yi")
# In Hebrew an abbreviation has a quotation mark before its last letter: ד"ר, צה"ל. To the library it opens a
# quotation, in which no sentence ends; the mark that Unicode has for it, which people seldom type, does not.
_gershayim = re.compile(r'(?<=[\u05d0-\u05ea])"(?=[\u05d0-\u05ea])')
_GERSHAYIM = "\u05f4"

_closed = re.compile(r"[.!?…][”’\"'」』》〉)]+\Z")  # the end of a quotation that is a sentence
_hangul = re.compile("[가-힣]")
# Words after a quotation that make it a part of the sentence: 라고 ("that"), 하고, 라는, ...
_quoted = re.compile(
    r"(?:이?라(?:고|며|면서|는|던|니)(?:는|도|만|까지|요)?|하(?:고|며|면서|는|던|자)|고|며|면서|는|이?란)(?![가-힣])"
)
_number = re.compile(r"(?:\A|[^\w.])\d{1,4}\. ?\Z")  # 2020. 3. 15., and of an item: no sentence ends so


def split(line: str, code: str) -> list[str]:
    """The sentences of `line`, which holds no newline, by the rules of the language `code`; no character but
    spaces is lost."""
    given = _gershayim.sub(_GERSHAYIM, line) if code in _HEBREW and '"' in line else line
    parts = _parts(given, code)
    if "".join(parts) != given:
        parts = [line]
    elif given is not line:
        parts = _as_in(line, parts)
    if code == "ko":
        parts = _korean(parts)
    return [stripped for part in parts if (stripped := part.strip(" "))]


def _parts(line: str, code: str) -> list[str]:
    """What the library makes of `line`, window by window."""
    from sentencex import segment  # a compiled library that most runs do without

    begin, size, parts = 0, WINDOW, list[str]()
    while len(line) - begin > size:
        window = line[begin : begin + size]
        certain, end = [], 0
        for part in segment(code, window):
            if end + len(part) > size - MARGIN:
                break
            certain.append(part)
            end += len(part)
        if not certain:
            size += WINDOW  # a longer sentence
            continue
        parts += certain
        begin, size = begin + end, WINDOW
    return parts + list(segment(code, line[begin:]))


def _as_in(line: str, parts: list[str]) -> list[str]:
    """Parts of the same lengths, of `line`."""
    begin, own = 0, []
    for part in parts:
        own.append(line[begin : begin + len(part)])
        begin += len(part)
    return own


def _korean(parts: list[str]) -> list[str]:
    """Joins what the library cuts behind a quotation that the sentence quotes, and behind a number."""
    joined: list[list[str]] = []
    before = ""
    for part in parts:
        if before and _goes_on(before, part):
            joined[-1].append(part)
        else:
            joined.append([part])
        before = part
    return ["".join(of_one) for of_one in joined]


def _goes_on(before: str, part: str) -> bool:
    end = before[-8:]
    if _number.search(end):
        return True
    if not _closed.search(end.rstrip(" ")):
        return False
    # What stands right behind the mark is a particle, whatever it is.
    return bool(_quoted.match(part) or (not end.endswith(" ") and _hangul.match(part)))
