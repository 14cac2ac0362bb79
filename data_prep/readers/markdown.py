"""Markdown -> its text: paragraphs with a blank line between them, without marks.

MarkdownText().feed("# Title\\n\\nSome *text* with a [link](https://example.org).\\n", last=True)
# "Title\\n\\nSome text with a link.\\n\\n"

Front matter, code blocks between fences, comments, images, tables, link definitions and HTML tags are left
out. A heading and each item of a list is a paragraph. Indented text stays: in books it is verse, not code.
Syntax: CommonMark, https://spec.commonmark.org
"""

from __future__ import annotations

import html
import re

LONGEST_PARAGRAPH = 2**18  # characters; marks are not matched beyond
LONGEST_FRONT_MATTER = 200  # lines

_fence = re.compile(r" {0,3}(`{3,}(?=[^`]*$)|~{3,})")
_heading = re.compile(r" {0,3}#{1,6}(?=[ \t]|$)")
_underline = re.compile(r" {0,3}(=+|-{2,})[ \t]*$")
_break = re.compile(r" {0,3}([-*_])(?:[ \t]*\1){2,}[ \t]*$")
_quote = re.compile(r"(?: {0,3}>[ \t]?)+")
_bullet = re.compile(r"\s*[-*+][ \t]+(?:\[[ xX]\][ \t]+)?")
_number = re.compile(r"\s*(\d{1,9})[.)][ \t]+")
_definition = re.compile(r" {0,3}\[(?!\^)[^\]]+\]:\s*\S+(\s+[\"'(].*)?\s*$")
_footnote = re.compile(r" {0,3}\[\^[^\]]+\]:[ \t]*")
_table = re.compile(r"\s*\|.*\|\s*$")

_escape = re.compile(r"\\([!-/:-@\[-`{-~])")
# Marks that nothing closes are read once: of what a rule cannot match, all is kept that another start could
# not match either. Pairs of marks are matched by functions, since a regular expression would look for the
# second one of each anew: time that grows with the square of a paragraph.
_ticks = re.compile("`+")
_image = re.compile(r"!\[[^\]]*+(\](?:\([^()]*(?:\([^()]*\)[^()]*)*\)|\[[^\]]*\]))?")
_link = re.compile(r"(?<!!)\[((?:[^\[\]]|\[[^\[\]]*\])*)\](?:\([^()]*(?:\([^()]*\)[^()]*)*\)|\[[^\]]*\])")
_footnote_mark = re.compile(r"\[\^[^\]\s]++(\])?")
_address = re.compile(r"<((?:https?://|mailto:)[^\s<>]+|[^\s<>@]+@[^\s<>@]+)>")
_tag = re.compile(r"</?[A-Za-z][^<>]*>")
_stars = re.compile(r"\*+")
_underscores = re.compile("_+")
_strike = re.compile(r"~~(?=\S)(.+?)(?<=\S)~~", re.DOTALL)
_PRIVATE = 0xE000  # escaped characters wait in the private use area while marks are removed
_back = {_PRIVATE + code: chr(code) for code in range(0x21, 0x7F)}


class MarkdownText:
    """Takes a document in parts; keeps what it needs of a paragraph that continues."""

    def __init__(self) -> None:
        self._partial = ""  # of the last line
        self._paragraph: list[str] = []
        self._size = 0  # characters of it
        self._fence = ""  # that is open
        self._comment = False
        self._in_list = False
        self._line_number = 0
        self._front: list[str] | None = None  # lines of what may be front matter

    def feed(self, text: str, last: bool) -> str:
        """The text of what is complete by now; at the `last` part, of all that is left."""
        lines = (self._partial + text).split("\n")
        self._partial = "" if last else lines.pop()
        if len(self._partial) > LONGEST_PARAGRAPH:
            lines.append(self._partial)
            self._partial = ""
        out: list[str] = []
        for line in lines:
            self._take(line.rstrip("\r"), out)
        if last:
            if self._front is not None:
                self._give_back_front(out)
            self._end_paragraph(out)
        return "".join(out)

    def _take(self, line: str, out: list[str]) -> None:
        self._line_number += 1
        if self._front is not None:
            if line.rstrip() in ("---", "...", "+++"):
                self._front = None
            else:
                self._front.append(line)
                if len(self._front) > LONGEST_FRONT_MATTER or not line.strip():
                    self._give_back_front(out)
        elif self._line_number == 1 and line.rstrip() in ("---", "+++"):
            self._front = []
        else:
            self._block(line, out)

    def _give_back_front(self, out: list[str]) -> None:
        """It was a line across the page and then text."""
        lines, self._front = self._front or [], None
        for line in lines:
            self._block(line, out)

    def _block(self, line: str, out: list[str]) -> None:
        if self._fence:
            closing = _fence.match(line)
            if closing and closing[1].startswith(self._fence) and not line.strip().strip(self._fence[0]):
                self._fence = ""
            return
        if self._comment or "<!--" in line:
            line = self._without_comments(line)
        if line.startswith((" ", ">", "\t")):
            quoted = _quote.match(line)
            line = line[quoted.end() :] if quoted else line
        start = line.lstrip()[:1]
        if not start:
            self._end_paragraph(out)
        elif start.isalpha():  # most lines
            self._add(line)
        elif start in "`~" and (opening := _fence.match(line)):
            self._end_paragraph(out)
            self._fence = opening[1]
        elif start == "#" and (heading := _heading.match(line)):
            self._end_paragraph(out)
            self._add(_title(line[heading.end() :].strip(" \t")))
            self._end_paragraph(out)
        elif start in "=-*_" and (_break.match(line) or (self._paragraph and _underline.match(line))):
            self._end_paragraph(out)
        elif start in "-*+" and (bullet := _bullet.match(line)):
            self._item(line[bullet.end() :], out)
        elif start.isdigit() and (number := _number.match(line)) and self._may_begin(number[1]):
            self._item(line[number.end() :], out)
        elif start == "|" and _table.match(line):
            self._end_paragraph(out)
        elif start == "[" and _definition.match(line) and not self._paragraph:
            return
        elif start == "[" and (footnote := _footnote.match(line)):
            self._end_paragraph(out)
            self._add(line[footnote.end() :])
        else:
            self._add(line)
        if self._size > LONGEST_PARAGRAPH:
            self._end_paragraph(out, "\n")

    def _without_comments(self, line: str) -> str:
        visible, begin = list[str](), 0
        while begin < len(line):
            mark = "-->" if self._comment else "<!--"
            end = line.find(mark, begin)
            if not self._comment:
                visible.append(line[begin : end if end >= 0 else len(line)])
            if end < 0:
                break
            self._comment = not self._comment
            begin = end + len(mark)
        return "".join(visible)

    def _may_begin(self, number: str) -> bool:
        """Whether a line may be the item `number` of a list: "1984." at a line's start is a year."""
        return not self._paragraph or self._in_list or number == "1"

    def _item(self, text: str, out: list[str]) -> None:
        self._end_paragraph(out)
        self._add(text)
        self._in_list = True

    def _add(self, line: str) -> None:
        self._paragraph.append(line)
        self._size += len(line)

    def _end_paragraph(self, out: list[str], end: str = "\n\n") -> None:
        if self._paragraph:
            text = without_marks("\n".join(self._paragraph)).strip()
            if text:
                out.append(text + end)
            self._paragraph.clear()
        self._size, self._in_list = 0, False


def without_marks(text: str) -> str:
    """A paragraph without emphasis, links and tags."""
    escaped = "\\" in text
    if escaped:
        text = _escape.sub(lambda match: chr(_PRIVATE + ord(match[1])), text).replace("\\\n", "\n")
    if "`" in text:
        text = _without_ticks(text)
    if "[" in text:
        text = _image.sub(_unless_whole, text)
        text = _footnote_mark.sub(_unless_whole, _link.sub(r"\1", text))
    if "<" in text:
        text = _tag.sub("", _address.sub(r"\1", text))
    if "*" in text:
        text = _without_stars(_without_stars(text))
    if "_" in text:
        text = _without_underscores(_without_underscores(text))
    if "~~" in text:
        text = _without_strikes(text)
    if "&" in text:
        text = html.unescape(text)
    return text.translate(_back) if escaped else text


def _title(heading: str) -> str:
    """A heading without the marks that may close it: "Title ##"."""
    title = heading.rstrip("#")
    return title.rstrip(" \t") if title != heading and title.endswith((" ", "\t")) else heading


def _unless_whole(match: re.Match[str]) -> str:
    """Nothing instead of a whole image or footnote mark; what has only the begin of one stays."""
    return "" if match[1] else match[0]


def _without_ticks(text: str) -> str:
    """Code in backticks: a run of them, and the next one of the same length."""
    runs = [match.span() for match in _ticks.finditer(text)]
    closing, nearest = [-1] * len(runs), dict[int, int]()
    for number in reversed(range(len(runs))):
        length = runs[number][1] - runs[number][0]
        closing[number] = nearest.get(length, -1)
        nearest[length] = number
    pairs, number = [], 0
    while number < len(runs):
        if (close := closing[number]) >= 0:
            pairs += [runs[number], runs[close]]
        number = max(number, close) + 1
    return _cut_out(text, pairs)


def _without_stars(text: str) -> str:
    """Emphasis by one to three stars: the last ones of a run that text follows, and the first ones of a run
    behind text. What stands between is looked at when this is done again."""
    runs = [match.span() for match in _stars.finditer(text)]
    closing: list[list[int]] = []  # the next run that can close so many, of each run
    nearest = [-1] * 4
    for number in reversed(range(len(runs))):
        closing.append(nearest.copy())
        begin, end = runs[number]
        if begin > 0 and not text[begin - 1].isspace():
            nearest[1 : end - begin + 1] = [number] * min(3, end - begin)
    closing.reverse()
    marks, number, used = [], 0, 0  # used: stars of the run that closed others
    while number < len(runs):
        begin, end = runs[number]
        close = -1
        if end < len(text) and not text[end].isspace():
            for count in range(min(3, end - begin - used), 0, -1):
                if (close := closing[number][count]) >= 0:
                    first = runs[close][0]
                    marks += [(end - count, end), (first, first + count)]
                    break
        number, used = (close, count) if close >= 0 else (number + 1, 0)
    return _cut_out(text, marks)


def _without_underscores(text: str) -> str:
    """Emphasis by one to three underscores: a run before which no word stands, and the next one of the same
    length that no word follows."""
    runs = [match.span() for match in _underscores.finditer(text)]
    closing, nearest = [-1] * len(runs), dict[int, int]()
    for number in reversed(range(len(runs))):
        begin, end = runs[number]
        closing[number] = nearest.get(end - begin, -1)
        if begin > 0 and not text[begin - 1].isspace() and not _is_word(text[end : end + 1]):
            nearest[end - begin] = number
    marks, number = [], 0
    while number < len(runs):
        begin, end = runs[number]
        close = -1
        opens = end < len(text) and not text[end].isspace() and not (begin and _is_word(text[begin - 1]))
        if opens and end - begin <= 3 and (close := closing[number]) >= 0:
            marks += [runs[number], runs[close]]
        number = max(number, close) + 1
    return _cut_out(text, marks)


def _without_strikes(text: str) -> str:
    """What is struck through loses its marks; behind the last that can close, none is looked for."""
    last = text.rfind("~~")
    while last > 0 and text[last - 1].isspace():
        last = text.rfind("~~", 0, last + 1)
    return _strike.sub(r"\1", text[: last + 2]) + text[last + 2 :] if last > 0 else text


def _is_word(character: str) -> bool:
    return character.isalnum() or character == "_"


def _cut_out(text: str, spans: list[tuple[int, int]]) -> str:
    """The text without these parts of it, which come one after another."""
    kept, at = [], 0
    for begin, end in spans:
        kept.append(text[at:begin])
        at = end
    return "".join(kept) + text[at:]
