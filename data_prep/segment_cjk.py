"""Sentences of Chinese and Japanese: where one may end, by punctuation and what is open around it.

split("他说：“你好。我走了。”然后他走了。真的！")
# ["他说：“你好。我走了。”", "然后他走了。", "真的！"]

A sentence ends after 。！？ and the closing marks that follow; not after ； and ：, which the Chinese
standard (GB/T 15834) counts among the marks inside a sentence; and after an ellipsis only where no text
follows at once: every second one of the others is a pause. Nothing ends inside a title (《》), brackets,
or a quotation after which the sentence continues.
"""

from __future__ import annotations

import re

from data_prep.segment_latin import ENGLISH, ends

_candidate = re.compile(r"([。｡．！？…!?.]+)([”’」』）】》〉〗］｝｣)\]]*)")
_open = re.compile(r"[“‘「『（【《〈〖［｢(]")
_mark = re.compile(r"[“‘「『（【《〈〖［｢(”’」』）】》〉〗］｣)]")
_CLOSING = dict(zip('“‘「『（【《〈〖［｢("', '”’」』）】》〉〗］｣)"', strict=True))
_QUOTES = frozenset('“‘「『｢"')
_ENDS = "。｡．！？…!?.”’」』）】》〉〗］｝｣)]"
_LONGEST = 1000  # characters; a quotation that is not closed within them does not count as open
_STATEMENT = 12  # characters; a shorter quotation in the middle of a sentence is a name or a word

_INSIDE = frozenset("，、；：,;:。．！？…!?）)」』”’》〉】")  # after a stop: the sentence continues
# After a closing mark as well: particles, and words that make the quotation a part of the sentence.
_GOES_ON = _INSIDE | frozenset("的是为為和與与及等之とのはがをにもでやっへなだ")
# A clause with one of these after a quotation says who spoke.
_speech = re.compile(r"[^，。：；！？,:!?“「]{0,8}?[说說道问問答喊叫嚷笑想言話語尋]")


def split(line: str) -> list[str]:
    """The sentences of `line`, which holds no newline; no character but spaces is lost."""
    sentences = []
    start = position = 0
    counted = straight = 0  # straight quotes up to `counted`
    while match := _candidate.search(line, position):
        position = match.end()
        if _is_stop(line, start, match):
            if _open.search(line, max(start, match.start() - _LONGEST), match.start()):
                end, skip = _in_quotes(line, start, match)
                position = max(position, skip)
            else:
                end = line[position : position + 1] not in _INSIDE
            if end:
                straight += line.count('"', counted, position)
                counted = position
                if straight % 2 and line.startswith('"', position):
                    position += 1
                sentences.append(line[start:position].strip(" "))
                start = position
    if rest := line[start:].strip(" "):
        sentences.append(rest)
    return [sentence for sentence in sentences if sentence]


def _is_stop(line: str, start: int, match: re.Match[str]) -> bool:
    """Whether the marks of `match` can end a sentence at all, quotations aside."""
    mark = match[1][-1]
    after = line[match.end() : match.end() + 2]
    if mark in "。｡！？":
        return True
    if mark == "…" or match[1].endswith(".."):
        return after[:1] in ("", " ") or match[1][0] in "。！？" or (match[2] != "" and after[:1] != "")
    before = line[match.start() - 1 : match.start()]
    if mark == "．":
        return not before.isdigit() and not after[:1].isdigit()
    if before > "\u2e80":  # a Latin mark after Chinese text
        return not after[:1].isascii() or after[:1] in ("", " ")
    if not after.startswith(" ") or after[1:].islower():
        return False  # 3.5, example.org, Yahoo!奇摩
    return match[1] != "." or ends(line, start, match.start(), match.end(), ENGLISH)


def _in_quotes(line: str, start: int, match: re.Match[str]) -> tuple[bool, int]:
    """Returns (whether the sentence from `start` ends with `match`, where to look on).

    Something was opened in the sentence.
    """
    stop = match.start()
    opened: list[int] = []
    for mark in _mark.finditer(line, max(start, stop - _LONGEST), stop):
        if opened and _CLOSING[line[opened[-1]]] == mark[0]:
            opened.pop()
        elif mark[0] in _CLOSING:
            opened.append(mark.start())
    closers = match[2]
    for closer in closers:
        first = opened.pop() if opened and _CLOSING[line[opened[-1]]] == closer else -1
    while opened:  # still open after the closing marks
        close = line.find(_CLOSING[line[opened[0]]], match.end(), opened[0] + _LONGEST)
        if close >= 0:
            last = len(line[match.end() : close].rstrip(_ENDS)) + match.end()  # the stop before `close`
            if line[opened[0]] not in _QUOTES:
                return False, last
            finished = line[close - 1] in "。！？…" and line[close + 1 : close + 2] in ("", " ")
            return finished, match.end() if finished else last
        opened.pop(0)
    after = line[match.end() : match.end() + 1]
    if not closers:
        return after not in _INSIDE, match.end()
    if after in ("", " "):
        return True, match.end()
    if after in _GOES_ON:
        return False, match.end()
    if first < 0:
        return True, match.end()
    return _ends_after_quote(line, start, first, match), match.end()


def _ends_after_quote(line: str, start: int, first: int, match: re.Match[str]) -> bool:
    """Whether the sentence ends after the marks that close what opened at `first`; text follows at once."""
    opening = line[first]
    if first == start:
        return opening in "（(" or (opening in _QUOTES and not _speech.match(line, match.end()))
    if opening not in _QUOTES:
        return False
    return line[first - 1] in "：:" or (match[1][0] == "。" and match.start() - first > _STATEMENT)
