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
_heading = re.compile(r" {0,3}#{1,6}(?:[ \t]+(.*?))?(?:[ \t]+#+)?[ \t]*$")
_underline = re.compile(r" {0,3}(=+|-{2,})[ \t]*$")
_break = re.compile(r" {0,3}([-*_])(?:[ \t]*\1){2,}[ \t]*$")
_quote = re.compile(r"(?: {0,3}>[ \t]?)+")
_bullet = re.compile(r"\s*[-*+][ \t]+(?:\[[ xX]\][ \t]+)?")
_number = re.compile(r"\s*(\d{1,9})[.)][ \t]+")
_definition = re.compile(r" {0,3}\[(?!\^)[^\]]+\]:\s*\S+(\s+[\"'(].*)?\s*$")
_footnote = re.compile(r" {0,3}\[\^[^\]]+\]:[ \t]*")
_table = re.compile(r"\s*\|.*\|\s*$")

_escape = re.compile(r"\\([!-/:-@\[-`{-~])")
_code = re.compile(r"(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)", re.DOTALL)
_image = re.compile(r"!\[[^\]]*\](?:\([^()]*(?:\([^()]*\)[^()]*)*\)|\[[^\]]*\])")
_link = re.compile(r"(?<!!)\[((?:[^\[\]]|\[[^\[\]]*\])*)\](?:\([^()]*(?:\([^()]*\)[^()]*)*\)|\[[^\]]*\])")
_footnote_mark = re.compile(r"\[\^[^\]\s]+\]")
_address = re.compile(r"<((?:https?://|mailto:)[^\s<>]+|[^\s<>@]+@[^\s<>@]+)>")
_tag = re.compile(r"</?[A-Za-z][^<>]*>")
_stars = re.compile(r"(\*{1,3})(?=[^\s*])(.+?)(?<=[^\s*])\1", re.DOTALL)
_underscores = re.compile(r"(?<!\w)(_{1,3})(?=[^\s_])(.+?)(?<=[^\s_])\1(?!\w)", re.DOTALL)
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
            self._add(heading[1] or "")
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
        visible = ""
        while line:
            if self._comment:
                _, mark, line = line.partition("-->")
                self._comment = not mark
            else:
                before, mark, line = line.partition("<!--")
                visible += before
                self._comment = bool(mark)
        return visible

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
        text = _code.sub(r"\2", text)
    if "[" in text:
        text = _image.sub("", text)
        text = _footnote_mark.sub("", _link.sub(r"\1", text))
    if "<" in text:
        text = _tag.sub("", _address.sub(r"\1", text))
    if "*" in text:
        text = _stars.sub(r"\2", _stars.sub(r"\2", text))
    if "_" in text:
        text = _underscores.sub(r"\2", _underscores.sub(r"\2", text))
    if "~~" in text:
        text = _strike.sub(r"\1", text)
    if "&" in text:
        text = html.unescape(text)
    return text.translate(_back) if escaped else text
