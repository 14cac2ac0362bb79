"""The records of .txt, .md, WikiExtractor, .jsonl, .csv and .tsv files, in bounded memory.

Each reader takes an open stream, which stands at the start of a document, and the byte of the (decompressed)
content where its part ends, between documents. `next_*` finds such a place.
"""

from __future__ import annotations

import codecs
import csv
import html
import io
import json
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from difflib import get_close_matches
from io import BufferedReader
from itertools import islice
from typing import Any

from bertscale.config import CsvConfig, UserError
from data_prep.readers.markdown import MarkdownText
from data_prep.readers.records import (
    BLANK,
    LONGEST,
    Bad,
    Cut,
    Dropped,
    Record,
    bad,
    cut_at,
    judged,
    printable,
)

# A .jsonl, .csv or .tsv record is read as a whole. Python needs up to eight times as much memory for it.
RECORD_BYTES = 16 * 2**20
OBJECTS_LOOKED_AT, FIELDS_SHOWN = 1000, 20  # of a .jsonl or .json, for the field of the text
CHUNK = 2**20  # bytes of a longer document that are read at a time
_BOM = codecs.BOM_UTF8
_title = re.compile(rb'title="(.*)"\s*>')
# Elements of HTML and of wikitext, which WikiExtractor escapes as it does "vector<int>", which is text.
_ELEMENTS = (
    "a abbr b bdi bdo big blockquote br caption ce center chem cite code dd del dfn div dl dt em font "
    "gallery h1 h2 h3 h4 h5 h6 hiero hr i imagemap img includeonly indicator inputbox ins kbd li "
    "mapframe maplink mark math nobr noinclude nowiki ol onlyinclude p poem pre q rb ref references rp "
    "rt ruby s samp score section small source span strike strong sub sup syntaxhighlight table tbody "
    "td templatestyles tfoot th thead timeline tr tt u ul var wbr"
)
_tag = re.compile(rf"</?(?:{'|'.join(_ELEMENTS.split())})(?:\s[^<>]*)?/?>", re.IGNORECASE)
# What is left of a template in brackets; behind `main`, or before what follows a call, they are code.
_emptied = re.compile(r"(?<!\bmain) \(\)(?!\s*(?:[{=]|;\s*$))", re.MULTILINE)

Chunk = tuple[int, bytes, bool]  # where the document starts, some bytes of it, whether they are its last
Strip = Callable[[str, bool], str]  # (some text of a document, whether it is the last) -> what is kept of it


def skip_bom(stream: BufferedReader) -> None:
    if stream.peek(len(_BOM)).startswith(_BOM):
        stream.read(len(_BOM))


# -------------------------------------------------------------------------------------- lines of records


def bounded_lines(stream: BufferedReader, end: int | None) -> Iterator[tuple[int, bytes, int]]:
    """Yields (start, line, its size); of a line above RECORD_BYTES only the beginning."""
    position = stream.tell()
    while (end is None or position < end) and (line := stream.readline(RECORD_BYTES)):
        start, position = position, position + len(line)
        whole = len(line) < RECORD_BYTES or line.endswith(b"\n")
        if not whole:
            position += _skip_line(stream)
        yield start, line, position - start


def _skip_line(stream: BufferedReader) -> int:
    """Reads to the end of the line; returns how many bytes that were."""
    count = 0
    while line := stream.readline(CHUNK):
        count += len(line)
        if line.endswith(b"\n"):
            break
    return count


def next_line(stream: BufferedReader, position: int) -> int:
    """Where the first line after `position` starts."""
    stream.seek(position)
    return position + _skip_line(stream)


TOO_LONG = f"a record of more than {RECORD_BYTES // 2**20} MiB"


def read_jsonl(stream: BufferedReader, name: str, end: int | None, field: str) -> Iterator[Record]:
    """A JSON object a line, the text in one of its fields."""
    return _texts_of_objects(_objects_of_lines(stream, name, end), name, field)


def read_json(stream: BufferedReader, name: str, field: str) -> Iterator[Record]:
    """An array of objects, one object, or, as in a .jsonl, an object a line."""
    return _texts_of_objects(_objects_of_file(stream, name), name, field)


Object = tuple[str, bytes | str, Any]  # where it stands, how it is written, the value, or why it is none


def _texts_of_objects(objects: Iterator[Object], name: str, field: str) -> Iterator[Record]:
    for where, written, record in objects:
        if isinstance(record, Bad | Dropped):
            yield record
        elif not isinstance(record, dict):
            yield bad("not a JSON object", name, where, written)
        elif (text := record.get(field)) is None:
            yield BLANK if field in record else Dropped(f"no field {field!r}")
        elif not isinstance(text, str):
            yield bad(f"field {field!r} is not a string", name, where, written)
        elif isinstance(written, str) and _NO_UTF8(text):
            yield bad("invalid UTF-8", name, where, written)
        else:
            yield from judged(text, name, where)


def _objects_of_lines(stream: BufferedReader, name: str, end: int | None) -> Iterator[Object]:
    for start, line, size in bounded_lines(stream, end):
        where = f"byte {start}"
        if size > len(line):
            yield where, line, bad(TOO_LONG, name, where, line, size)
        elif not line.strip():
            yield where, line, BLANK
        else:
            try:
                # Of files put together each may begin with a mark.
                yield where, line, json.loads(line.decode("utf-8-sig"))
            except UnicodeDecodeError:
                yield where, line, bad("invalid UTF-8", name, where, line)
            except (ValueError, RecursionError):
                yield where, line, bad("broken JSON", name, where, line)


def _objects_of_file(stream: BufferedReader, name: str) -> Iterator[Object]:
    line = stream.readline(RECORD_BYTES)
    if line.lstrip()[:1] == b"{" and not _is_broken(line):
        yield from _objects_of_lines(io.BufferedReader(_Again(line, stream)), name, None)
        return
    decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
    text = decoder.decode(line).lstrip().removeprefix("[")
    at, number, over = 0, 0, not line
    while True:
        at = _BETWEEN(text, at).end()  # type: ignore[union-attr]
        if text[at : at + 1] == "]" or (over and at == len(text)):
            return
        where = f"object {number}"
        try:
            record, end = json.JSONDecoder().raw_decode(text, at)
        except (ValueError, RecursionError):
            if over or len(text) - at > RECORD_BYTES:
                # Where an object is broken, nobody knows where the next one begins.
                rest = text[at:]
                lost = len(rest.encode("utf-8", "surrogateescape"))
                while data := stream.read(CHUNK):
                    lost += len(data)
                yield where, rest, bad("broken JSON, the rest of the file lost", name, where, rest, lost)
                return
            data = stream.read(max(CHUNK, len(text) - at))  # twice as much each time
            over = not data
            text, at = text[at:] + decoder.decode(data, over), 0
            continue
        yield where, text[at:end], record
        at, number = end, number + 1


def _is_broken(line: bytes) -> bool:
    """Whether the first line of a .json file is no JSON by itself; invalid UTF-8 costs the line alone."""
    try:
        json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        return False
    except (ValueError, RecursionError):
        return True
    return False


_BETWEEN = re.compile(r"[\s,]*").match
_NO_UTF8 = re.compile("[\udc80-\udcff]").search  # a byte that was none


class _Again(io.RawIOBase):
    """A stream of which the first line was read, from its begin."""

    def __init__(self, line: bytes, stream: BufferedReader) -> None:
        self._line, self._stream = line, stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._line[: len(buffer)] or self._stream.read1(len(buffer))
        self._line = self._line[len(data) :]
        buffer[: len(data)] = data
        return len(data)

    def tell(self) -> int:
        return 0


def first_has_field(stream: BufferedReader, name: str, field: str) -> bool:
    """Whether the first object of a .json file has this field, as far as that can be known."""
    _, _, first = next(_objects_of_file(stream, name), ("", "", None))
    return field in first if isinstance(first, dict) else first is None or isinstance(first, Bad)


def check_field(stream: BufferedReader, name: str, kind: str, field: str) -> None:
    """Raises UserError, with the fields there are, if of the first objects of a .jsonl or .json none has
    `field`, or none of them holds text in it."""
    fields, texts, other = dict[str, None](), dict[str, None](), ""
    objects = _objects_of_lines(stream, name, None) if kind == ".jsonl" else _objects_of_file(stream, name)
    for _, _, record in islice(objects, OBJECTS_LOOKED_AT):
        if not isinstance(record, dict):
            continue
        value = record.get(field)
        if isinstance(value, str) or (value is None and field in record):
            return
        fields |= dict.fromkeys(record)
        texts |= dict.fromkeys(key for key, of_key in record.items() if isinstance(of_key, str))
        other = other or (_KINDS_OF_JSON[type(value)] if field in record else "")
    if other:
        raise no_text(list(texts), f"the field {field!r} of {printable(name)} holds {other}", "fields")
    if fields:
        raise no_field(list(fields), field, name)


_KINDS_OF_JSON = {int: "numbers", float: "numbers", bool: "true or false", list: "lists", dict: "objects"}


def no_text(names: list[str], what: str, kind: str) -> UserError:
    """The error of a field or column that is there and holds no text: `names` are those that do."""
    those = ", ".join(map(repr, names[:FIELDS_SHOWN]))
    there_are = f"its {kind} of text are {those}" if names else f"it has no {kind} of text"
    return UserError(f"text_field: {what}, not text; {there_are}")


def no_field(fields: list[str], field: str, name: str) -> UserError:
    near = get_close_matches(field, fields, 1, 0.5)
    guess = f"; did you mean {near[0]!r}?" if near else ""
    return UserError(
        f"text_field: {printable(name)} has no field {field!r}{guess}; "
        f"its fields are {', '.join(map(repr, fields[:FIELDS_SHOWN]))}"
    )


def column_index(names: list[str], column: str, name: str) -> int:
    """Raises UserError, with the columns there are, if `column` is not among `names`."""
    if column in names:
        return names.index(column)
    near = get_close_matches(column, names, 1, 0.5)
    raise UserError(
        f"text_field: {printable(name)} has no column {column!r}"
        f"{f'; did you mean {near[0]!r}?' if near else ''}; its columns are {', '.join(map(repr, names))}"
    )


def tsv_column(stream: BufferedReader, name: str, column: str) -> tuple[int, int]:
    """(the index of `column`, how many columns there are), from the first line."""
    header = stream.readline(CHUNK).decode("utf-8", "replace").rstrip("\r\n").removeprefix("\ufeff")
    names = header.split("\t")
    return column_index(names, column, name), len(names)


def read_tsv(
    stream: BufferedReader, name: str, end: int | None, columns: tuple[int, int]
) -> Iterator[Record]:
    """A record a line, columns between tabs. A quotation mark is a character like any other.

    `columns`: the index of the text's, and their number, which each row must have.
    """
    index, count = columns
    for start, line, size in bounded_lines(stream, end):
        where, cells = f"byte {start}", line.rstrip(b"\r\n").split(b"\t")
        if size > len(line):
            yield bad(TOO_LONG, name, where, line, size)
        elif len(cells) != count:
            yield bad(_misfit(len(cells), count), name, where, line) if line.strip() else BLANK
        else:
            yield from judged(cells[index], name, where)


def _misfit(cells: int, columns: int) -> str:
    return "a row with too few columns" if cells < columns else "a row with too many columns"


# ------------------------------------------------------------------------------------------------- csv

NOT_CLOSED = "broken CSV: a quotation mark that is not closed"
_NO_ESCAPE = "broken CSV: text behind a closing quotation mark"  # or one that csv.escape would have escaped
_LINES_TRIED = 1000  # behind a quotation mark that nothing closes


class _CsvLines:
    """The lines of a .csv for csv.reader, which reads as many as a record has; they can be read again."""

    def __init__(self, stream: BufferedReader) -> None:
        self._stream, self._again = stream, deque[bytes]()
        self.number = 0  # lines read
        self.begin()

    def begin(self) -> None:
        """A new record begins."""
        self.record: list[bytes] = []
        self.size = 0  # bytes of them, and of what was skipped

    def __iter__(self) -> _CsvLines:
        return self

    def __next__(self) -> str:
        line = self._again.popleft() if self._again else self._stream.readline(RECORD_BYTES)
        if not line:
            raise StopIteration
        self.record.append(line)
        self.size += len(line)
        self.number += line.endswith(b"\n")
        if self.size >= RECORD_BYTES:
            raise OverflowError
        return _text_of(line)

    def go_back(self) -> None:
        """All lines of the record but the first are to be read again."""
        again = self.record[1:]
        self._again.extendleft(reversed(again))
        self.size = len(self.record[0])
        self.number -= sum(line.endswith(b"\n") for line in again)

    def skip(self, dialect: CsvConfig) -> None:
        """To the end of the record: the end of a line where the quotation marks are closed."""
        line, opened = self.record[-1], sum(_quotes(line, dialect) for line in self.record) % 2
        while (opened or not line.endswith(b"\n")) and (line := self._stream.readline(CHUNK)):
            opened ^= _quotes(line, dialect) % 2
            self.size += len(line)
            self.number += line.endswith(b"\n")


def _quotes(line: bytes, dialect: CsvConfig) -> int:
    """How many quotation marks open or close something."""
    if not dialect.quote:
        return 0
    quote = dialect.quote.encode()
    if not dialect.escape:
        return line.count(quote)
    escape = dialect.escape.encode()
    return line.replace(escape * 2, b"").replace(escape + quote, b"").count(quote)


def _text_of(line: bytes) -> str:
    return line.decode("utf-8", "surrogateescape")


def _csv_reader(lines: Iterable[str], dialect: CsvConfig) -> Iterator[list[str]]:
    csv.field_size_limit(RECORD_BYTES)  # of this process
    return csv.reader(
        lines,
        delimiter=dialect.delimiter,
        quotechar=dialect.quote,
        escapechar=dialect.escape,
        quoting=csv.QUOTE_MINIMAL if dialect.quote else csv.QUOTE_NONE,
        strict=True,
    )


def csv_column(stream: BufferedReader, name: str, column: str, dialect: CsvConfig) -> tuple[int, int]:
    """(the index of `column`, how many columns there are), from the first record."""
    return _csv_header(_csv_reader(_CsvLines(stream), dialect), name, column)


def _csv_header(reader: Iterator[list[str]], name: str, column: str) -> tuple[int, int]:
    try:
        header = next(reader, [])
    except (csv.Error, OverflowError):
        header = []
    return column_index([_shown(cell) for cell in header], column, name), len(header)


def _shown(cell: str) -> str:
    return cell.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def read_csv(stream: BufferedReader, name: str, column: str, dialect: CsvConfig) -> Iterator[Record]:
    """RFC 4180, https://www.rfc-editor.org/rfc/rfc4180: text in quotation marks may hold commas and lines.

    What is not so is Bad: text behind a closing quotation mark, and a row with more or fewer cells than the
    header. Where a quotation mark is not closed, its row alone is lost if the lines behind it are rows.
    """
    lines = _CsvLines(stream)
    reader = _csv_reader(lines, dialect)
    index, columns = _csv_header(reader, name, column)
    while True:
        lines.begin()
        where = f"line {lines.number + 1}"
        try:
            cells = next(reader)
        except StopIteration:
            return
        except (csv.Error, OverflowError) as error:
            reason = _csv_fault(error, lines, columns, dialect)
            yield bad(reason, name, where, lines.record[0], lines.size)
            continue
        if not cells:
            yield BLANK
        elif len(cells) != columns:
            reason = _misfit(len(cells), columns)
            reason = NOT_CLOSED if _went_back(lines, columns, dialect) else reason
            yield bad(reason, name, where, lines.record[0], lines.size)
        else:
            try:
                cells[index].encode()
            except UnicodeEncodeError:
                yield bad("invalid UTF-8", name, where, lines.record[0], lines.size)
            else:
                yield from judged(cells[index], name, where)


def _csv_fault(error: Exception, lines: _CsvLines, columns: int, dialect: CsvConfig) -> str:
    """Why the record that was read is none; `lines` then stand where the next one is to be looked for."""
    if _went_back(lines, columns, dialect):
        return NOT_CLOSED
    if isinstance(error, OverflowError):
        lines.skip(dialect)
        return TOO_LONG
    if "unexpected end" in str(error):
        return NOT_CLOSED
    return _NO_ESCAPE if "expected after" in str(error) else f"broken CSV: {error}"


def _went_back(lines: _CsvLines, columns: int, dialect: CsvConfig) -> bool:
    """Has the lines behind the record's first one read again if most are rows by themselves, and so no part
    of a text in quotation marks; returns whether they are."""
    tried, rows = lines.record[1 : 1 + _LINES_TRIED], 0
    for line in tried:
        try:
            rows += len(next(_csv_reader([_text_of(line)], dialect), [])) == columns
        except csv.Error:
            continue
    if rows <= len(tried) / 2:
        return False
    lines.go_back()
    return True


# ---------------------------------------------------------------------------------------- running text


def read_paragraphs(stream: BufferedReader, name: str, end: int | None) -> Iterator[Record]:
    """A .txt file whose documents end at blank lines."""
    return _documents(_between_blank_lines(stream, end), name)


def read_whole(stream: BufferedReader, name: str) -> Iterator[Record]:
    """A .txt file that is one document."""
    return _documents(_all_of(stream), name)


def read_markdown(stream: BufferedReader, name: str) -> Iterator[Record]:
    """A Markdown file, one document, without its marks."""
    return _documents(_all_of(stream), name, MarkdownText().feed, "Markdown without a text")


def read_wiki(stream: BufferedReader, name: str, end: int | None) -> Iterator[Record]:
    """WikiExtractor's <doc id= url= title=> blocks, each a document without its title; a line a paragraph.

    https://github.com/attardi/wikiextractor
    """
    article = _Article()
    return _documents(_doc_blocks(stream, end, article), name, article.text, "an article with a title only")


def _all_of(stream: BufferedReader) -> Iterator[Chunk]:
    data, start = stream.read(CHUNK), 0
    while data:
        following = stream.read(CHUNK)
        yield start, data, not following
        data = following


def _between_blank_lines(stream: BufferedReader, end: int | None) -> Iterator[Chunk]:
    lines = list[bytes]()
    position = start = stream.tell()
    size, begun, line_start = 0, False, True
    while (end is None or position < end) and (line := stream.readline(CHUNK)):
        if line_start and line.isspace():
            if begun:
                yield start, b"".join(lines), True
                lines.clear()
                size, begun = 0, False
        else:
            if not begun:
                start, begun = position, True
            if size >= CHUNK:
                yield start, b"".join(lines), False
                lines.clear()
                size = 0
            lines.append(line)
            size += len(line)
        position += len(line)
        line_start = line.endswith(b"\n")
    if begun:
        yield start, b"".join(lines), True


def next_paragraph(stream: BufferedReader, position: int) -> int:
    """Where the first document after `position` starts, after a blank line; the end if none does."""
    position = next_line(stream, position)  # the rest of a line that may have begun before `position`
    after_blank, line_start = False, True
    while line := stream.readline(CHUNK):
        blank = line_start and line.isspace()
        if after_blank and line_start and not blank:
            return position
        after_blank = blank
        position += len(line)
        line_start = line.endswith(b"\n")
    return position


def _doc_blocks(stream: BufferedReader, end: int | None, article: _Article) -> Iterator[Chunk]:
    """What stands between <doc ...> and </doc>; tells `article` the tag.

    Searches blocks of bytes, because articles are often short and lines cost the most.
    """
    base, buffer = stream.tell() - 1, b"\n"  # every tag follows a newline
    start, inside, data = base, False, buffer
    while data:
        room = CHUNK if end is None else min(CHUNK, end - base - len(buffer))
        data = stream.read(room)
        buffer, at = buffer + data, 0  # buffer[at] comes before what is to be looked at
        while True:
            if not inside:
                tag = buffer.find(b"\n<doc ", at)
                text = buffer.find(b"\n", tag + 1) if tag >= 0 else -1
                if text < 0:
                    cut_off = tag >= 0 and len(buffer) - tag < CHUNK
                    at = tag if cut_off else max(at, len(buffer) - len(b"\n<doc"))
                    break
                start, inside, at = base + tag + 1, True, text
                article.begin(buffer[tag + 1 : text])
            close = buffer.find(b"\n</doc>", at)
            following = buffer.find(b"\n<doc ", at, len(buffer) if close < 0 else close)
            stop = close if following < 0 else following
            if stop >= 0:
                yield start, buffer[at + 1 : stop + 1], True
                inside, at = False, stop + (following < 0)
            elif not data:
                yield start, buffer[at + 1 :], True
                return
            else:
                keep = len(buffer) - len(b"\n</doc>") - 1  # a tag may have begun
                if keep - at > CHUNK:
                    yield start, buffer[at + 1 : keep + 1], False
                    at = keep
                break
        buffer, base = buffer[at:], base + at


def next_article(stream: BufferedReader, position: int) -> int:
    """Where the first <doc ...> after `position` starts; the end if none does."""
    position, line_start = next_line(stream, position), True
    while (line := stream.readline(CHUNK)) and not (line_start and line.startswith(b"<doc ")):
        position += len(line)
        line_start = line.endswith(b"\n")
    return position


class _Article:
    """The text of a <doc> block: no title, tags or emptied brackets, a blank line after each line."""

    def begin(self, tag: bytes) -> None:
        title = _title.search(tag)
        self._title: str | None = title[1].decode("utf-8", "replace") if title else ""

    def text(self, text: str, last: bool) -> str:
        if "&" in text or "<" in text:
            text = _tag.sub(" ", html.unescape(text))
        if self._title is not None:
            title = html.unescape(self._title).strip()
            if text.startswith(title):
                first_line = text.find("\n", len(title)) % (len(text) + 1)
                if not text[len(title) : first_line].strip():
                    text = text[first_line:]
            self._title = None
        return _emptied.sub("", text).replace("（）", "").replace("\n", "\n\n")


def _documents(
    chunks: Iterator[Chunk], name: str, strip: Strip | None = None, empty: str = ""
) -> Iterator[Record]:
    """Texts of the documents that `chunks` make; a long one is given while it is read, cut.

    A document of which `strip` leaves nothing is Dropped as `empty`.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    nothing = Dropped(empty)
    rest, kind, given, wrong, head, size = "", str, False, False, b"", 0
    for start, data, last in chunks:
        head, size = head or data, size + len(data)
        if not wrong:
            try:
                # The decoder keeps the beginning of a character that continues in the next chunk.
                text = data.decode() if last and head is data else decoder.decode(data, last)
            except UnicodeDecodeError:
                decoder.reset()
                wrong = True
            else:
                rest += strip(text, last) if strip else text
                while len(rest) > LONGEST:
                    end = cut_at(rest, 0)
                    if not (beginning := rest[:end]).isspace():
                        yield kind(beginning)
                        kind, given = Cut, True
                    rest = rest[end:]
        if last:
            if wrong:
                yield bad("invalid UTF-8", name, f"byte {start}", head, size)
            if not wrong and rest and not rest.isspace():
                yield kind(rest)
            elif not wrong and not given:
                yield nothing if strip else BLANK
            rest, kind, given, wrong, head, size = "", str, False, False, b"", 0
