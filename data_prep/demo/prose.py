"""One docstring -> its prose: whole paragraphs of sentences, without code, tables and markup.

prose("Sort the items.\\n\\n>>> sort([2, 1])\\n[1, 2]\\n\\nThe sort is stable.")
# "Sort the items.\\nThe sort is stable."

Understands the three common styles (numpydoc, Google, Sphinx fields) in reStructuredText or Markdown. Of a
list of parameters the descriptions that are sentences stay; names, types and the rest go.
"""

from __future__ import annotations

import inspect
import re

from bertscale.tokenizer import normalize

# Sections that list names with descriptions, and sections that hold no sentences. All others are text.
_DESCRIBED = (
    "parameters|other parameters|keyword parameters|params|args|arguments|keyword args|keyword arguments|"
    "kwargs|returns?|yields?|receives|raises|warns|attributes|fields|properties|inputs?|outputs?"
)
_DROPPED = (
    "methods|see also|references?|shape|literature|bibliography|authors?|input shape|output shape|"
    "copyright|licen[cs]e"
)
_described_title = re.compile(rf"\s*(?:{_DESCRIBED})\s*:?\s*", re.IGNORECASE)
_dropped_title = re.compile(rf"\s*(?:{_DROPPED})\s*:?\s*", re.IGNORECASE)
_google_item = re.compile(r"\s*\*{0,2}[\w`., */\[\]|]{1,60}?(?:\([^:]{0,200}\)`?)?\s*:\s+")
_underline = re.compile(r"\s*([-=~^*#\"'+_.:])\1{2,}\s*")
_fence = re.compile(r"\s*(```|~~~)")
_doctest = re.compile(r"\s*(>>>|\.\.\. |In \[\d+\]|\$ |%\w|@\w+\s*\(?|import \w|from [\w.]+ import )")
_directive = re.compile(r"\s*\.\. *([\w:-]+?)::\s*(.*)")
_kept_directive = re.compile("note|warning|tip|important|attention|caution|seealso|hint|admonition")
_comment = re.compile(r"\s*\.\.(?:\s|$)")  # also footnotes, targets and citations
_field = re.compile(r"\s*(?::[\w ,*.`-]+:|@(?:param|type|return|rtype|raises?)\b[^:]*:)(?:\s+|$)")
_table = re.compile(r"\s*(?:\||\+[-=+]+\+|[-=]{2,}(?:\s+[-=]{2,})+\s*$|#{1,6} |<!--|!\[)")
_bullet = re.compile(r"\s*(?:[-*+•]|\(?(?:\d{1,2}|[a-z])[.)])\s+")

# (a character that the pattern needs, the pattern, what stays); most paragraphs have few of them.
_INLINE = [
    (":", re.compile(r":[\w:+-]+:`~[\w.]*?(\w+)`"), r"\1"),  # :role:`~package.name`
    (":", re.compile(r":[\w:+-]+:`([^`<>]*?)\s*(?:<[^`]*>)?`"), r"\1"),  # :role:`text <target>`
    ("`", re.compile(r"``([^`]*)``"), r"\1"),
    ("`", re.compile(r"`([^`<]+?)\s*<[^`>]*>`_{0,2}"), r"\1"),  # `text <address>`_
    ("[", re.compile(r"!?\[([^\]\[]*)\]\((?:[^()]|\([^()]*\))*\)"), r"\1"),  # [text](address)
    ("[", re.compile(r"\[`~?([^`\]]*)`\]"), r"\1"),
    ("`", re.compile(r"`~?([^`]*)`_{0,2}"), r"\1"),
    ("[", re.compile(r"\s*\[[\w#*]+\]_+"), ""),  # [1]_
    ("*", re.compile(r"(?<![\w*])\*\*([^*\n]+)\*\*"), r"\1"),
    ("*", re.compile(r"(?<![\w*])\*([^*\s][^*\n]*?)\*(?![\w*])"), r"\1"),
    ("<", re.compile(r"</?[A-Za-z][^<>]*>"), ""),
    ("/", re.compile(r"\s*<?\(?(?:https?|ftp)://[^\s>]+>?"), ""),
]
_function_words = re.compile(
    r"\b(?:the|an?|of|is|are|to|in|and|for|with|this|that|by|be|if|it|or|as|on|from|when|not|which)\b",
    re.IGNORECASE,
)
_word = re.compile(r"[A-Za-z][a-z]+(?:['’-][a-z]+)*\b")
_sentence_end = re.compile(r"[.!?][\"')\]]*\Z")


def prose(docstring: str) -> str:
    """The paragraphs of prose in `docstring`, one a line; "" if there are none."""
    paragraphs = [_plain(paragraph) for paragraph in _paragraphs(inspect.cleandoc(docstring).split("\n"))]
    return "\n".join(paragraph for paragraph in paragraphs if _is_prose(paragraph))


def _paragraphs(lines: list[str]) -> list[str]:
    """The text blocks of a docstring that are not code, tables, names or types."""
    blocks: list[str] = []
    block: list[str] = []
    number = 0
    section = ""  # of numpydoc: "dropped", "described" or "" for one of text
    google_end, google_indent = 0, 0  # lines before google_end are items, at this indent

    def flush() -> None:
        if block:
            blocks.append("\n".join(block))
            block.clear()

    while number < len(lines):
        line = lines[number]
        following = lines[number + 1] if number + 1 < len(lines) else ""
        if not line.strip():
            flush()
            number += 1
        elif _underline.fullmatch(following) and not _underline.fullmatch(line) and len(line) < 80:
            flush()
            section = "described" if _described_title.fullmatch(line) else ""
            section = "dropped" if _dropped_title.fullmatch(line) else section
            number += 2
        elif fence := _fence.match(line):
            flush()
            number = _skip_fenced(lines, number, fence[1])
        elif (
            section == "dropped"
            or (section == "described" and not line.startswith(" "))  # `name : type`
            or _underline.fullmatch(line)
            or _table.match(line)
        ):
            flush()
            number += 1
        elif line.rstrip().endswith(":") and _described_title.fullmatch(line):
            flush()
            google_end = _skip_deeper(lines, number)
            number += 1
            google_indent = _indent(lines[number]) if number < google_end else 0
        elif (after := _skip_other(lines, number)) is not None:
            flush()
            number = after
        else:
            start = _field.match(line) or _bullet.match(line)
            if number < google_end and _indent(line) == google_indent and ":" in line:
                start = _google_item.match(line) or start
            if start:
                flush()
                line = line[start.end() :]
            block.append(line.strip())
            number += 1
            if line.rstrip().endswith("::"):
                flush()
                number = _skip_deeper(lines, number - 1)
    flush()
    return blocks


def _skip_fenced(lines: list[str], number: int, mark: str) -> int:
    """The line after the fenced code that begins at line `number`."""
    number += 1
    while number < len(lines) and not lines[number].lstrip().startswith(mark):
        number += 1
    return number + 1


def _skip_other(lines: list[str], number: int) -> int | None:
    """The line to read next if no text stands at line `number`; None if it is text.

    No text are Google's sections without sentences, doctests, comments and directives; a `_kept_directive`
    gives way, in `lines`, to the text after it.
    """
    line = lines[number]
    if line.rstrip().endswith(":") and _dropped_title.fullmatch(line):
        return _skip_deeper(lines, number)
    if _doctest.match(line):
        while number < len(lines) and lines[number].strip():
            number += 1
        return number
    directive = _directive.match(line) if line.lstrip().startswith("..") else None
    if directive and _kept_directive.fullmatch(directive[1].lower()):
        lines[number] = directive[2]
        return number if directive[2] else number + 1
    return _skip_deeper(lines, number) if directive or _comment.match(line) else None


def _skip_deeper(lines: list[str], number: int) -> int:
    """The first line after `number` that is neither blank nor indented deeper than line `number`."""
    indent = _indent(lines[number])
    number += 1
    while number < len(lines) and (not lines[number].strip() or _indent(lines[number]) > indent):
        number += 1
    return number


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def _plain(paragraph: str) -> str:
    """The paragraph on one line, without inline markup."""
    if "\\" in paragraph:
        paragraph = re.sub(r":math:`[^`]*\\[^`]*`|\$[^$\n]*\\[^$\n]*\$", "…", paragraph)
    for mark, pattern, replacement in _INLINE:
        if mark in paragraph:
            paragraph = pattern.sub(replacement, paragraph)
    return normalize(re.sub(r"\s*::?\s*\Z", ".", paragraph.replace("\\ ", "").replace("\\", "")))


def _is_prose(paragraph: str) -> bool:
    """Whether a paragraph reads as sentences: mostly plain words, small words among them, an end mark."""
    words = _word.findall(paragraph)
    if len(words) < 4 or not _sentence_end.search(paragraph):
        return False
    letters = sum(map(len, words)) + paragraph.count(" ")
    return letters >= 0.75 * len(paragraph) and len(_function_words.findall(paragraph)) >= 0.1 * len(words)
