"""Rows of labelled files: csv, tsv, jsonl, json and parquet, plain or compressed (.gz, .bz2, .xz, .zst).

    for row in read_rows("train.tsv", data):
        text = column(row, data.text, "data.text")

A row that cannot be read comes as a BrokenRow; what makes a whole file unreadable raises UserError.

csv and tsv have a header if a column that is asked for has a name, and none if all have numbers; then the
columns are called "0", "1" and so on. Every row must have as many columns as the first line: a row with more
or fewer is broken, since nobody knows which of its columns is the text. With quoting a text may hold line
ends; without it (tsv) a quotation mark is a character like any other.
"""

from __future__ import annotations

import csv
import json
import re
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from bertscale.config import UserError
from bertscale.config.examples import Column, ExamplesConfig
from data_prep.readers.compressed import DAMAGE, compression_of
from data_prep.readers.encodings import open_text, other_encoding
from data_prep.readers.tables import open_parquet

Format = Literal["csv", "tsv", "jsonl", "json", "parquet", "conll", "squad"]
Wanted = Sequence[tuple[str, Column]]  # the keys of the config that name columns, and these
ENDINGS: dict[str, Format] = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".txt": "tsv",
    ".tab": "tsv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".conll": "conll",
    ".bio": "conll",
    ".bmes": "conll",
}
EXCERPT = 200  # characters of a row that cannot be read
_lone_surrogate = re.compile("[\ud800-\udfff]")
LONGEST_CELL = 2**20  # characters: how far the end of a quoted one is looked for


@dataclass(frozen=True)
class Row:
    """One row: its columns by name, or by "0", "1", ... in a table without header."""

    place: str  # "FILE, line 12"
    values: dict[str, Any]
    table: bool = False  # whether its columns have numbers


@dataclass(frozen=True)
class BrokenRow:
    """A row that cannot be used: where it is, why not, and how it begins."""

    place: str
    reason: str
    row: Any
    lacks_column: bool = False

    def as_json(self) -> dict[str, Any]:
        """Returns the line of quarantine.jsonl."""
        return {"place": self.place, "reason": self.reason, "row": self.row}


class BadRowError(UserError):
    """Says why one row cannot be used; it is left out unless too many are."""

    def __init__(self, row: Row, reason: str, *, lacks_column: bool = False) -> None:
        super().__init__(f"{row.place}: {reason}")
        self.row = row
        self.reason = reason
        self.lacks_column = lacks_column  # one that is asked for: if all rows do, the wrong one is asked for

    def as_broken(self) -> BrokenRow:
        """Returns the row with its reason."""
        return BrokenRow(self.row.place, self.reason, self.row.values, self.lacks_column)


def column(row: Row, name: Column, key: str) -> Any:
    """Returns the value of a column; `key` of the config has its name or, in a table, its number.

    Raises BadRowError, a UserError, that names the nearest column of the row and the key to set.
    """
    if isinstance(name, int) and row.table:
        if 0 <= name < len(row.values):
            return next(islice(row.values.values(), name, None))
    elif str(name) in row.values:
        return row.values[str(name)]
    raise BadRowError(row, _no_column(name, list(row.values), key), lacks_column=True)


def read_rows(
    path: str | Path, data: ExamplesConfig, wanted: Wanted | None = None
) -> Iterator[Row | BrokenRow]:
    """Yields the rows of one file, in order.

    `wanted` are the columns that the rows must have, by default those of texts and labels. Raises UserError
    for a file that is missing or damaged, an unknown format, or a table without these columns.
    """
    path = str(path)
    form = format_of(path, data)
    wanted = wanted_columns(data) if wanted is None else wanted
    with _readable(path):
        if form in ("csv", "tsv"):
            yield from _read_table(path, data, form, wanted)
        elif form == "jsonl":
            yield from _read_jsonl(path, data)
        elif form == "json":
            yield from _read_json(path, data)
        elif form == "parquet":
            yield from _read_parquet(path, wanted)
        else:
            raise UserError(
                f"{path}: data.format={form} has no columns; give csv, tsv, jsonl, json or parquet"
            )


def wanted_columns(data: ExamplesConfig, label: bool = True) -> list[tuple[str, Column]]:
    """Returns the columns of the texts, options and, if asked for, labels with the keys that name them."""
    wanted: list[tuple[str, Column]] = [("data.text", data.text)]
    if data.text_pair is not None:
        wanted.append(("data.text_pair", data.text_pair))
    options = data.options if isinstance(data.options, list) else [data.options]
    wanted += [("data.options", option) for option in options if option is not None]
    if label:
        labels = data.label if isinstance(data.label, list) else [data.label]
        wanted += [("data.label", one) for one in labels]
    return wanted


def format_of(path: str | Path, data: ExamplesConfig) -> Format:
    """Returns the format of a file: data.format, or by the ending of its name, and for .json by content.

    Raises UserError if the ending tells nothing, or the file cannot be read.
    """
    if data.format != "auto":
        return data.format
    path = str(path)
    ending = ending_of(path)
    if ending in ENDINGS:
        return ENDINGS[ending]
    if ending == ".json":
        with _readable(path):
            return _kind_of_json(path, data.encoding)
    raise UserError(
        f"{path}: the ending {ending or '(there is none)'} does not tell the format; set data.format to csv, "
        "tsv, jsonl, json, parquet, conll or squad"
    )


def ending_of(path: str) -> str:
    """Returns the ending of a file's name, in small letters, without that of its compression."""
    return Path(path.lower().removesuffix(compression_of(path))).suffix


def _no_column(name: Column, names: list[str], key: str) -> str:
    near = [] if isinstance(name, int) else get_close_matches(name, names, 1, 0.5)
    hint = f"; did you mean {key}={near[0]!r}?" if near else f"; set {key} to one of them"
    number = f" number {name}, counted from 0" if isinstance(name, int) else f" {name!r}"
    return f"there is no column{number}, but {', '.join(map(repr, names)) or 'none at all'}{hint}"


@contextmanager
def _readable(path: str) -> Iterator[None]:
    """Raises UserError for what the system, or a damaged compressed file, does not let us read."""
    try:
        open(path, "rb").close()
        yield
    except UserError:
        raise
    except DAMAGE as error:
        reason = (
            error.strerror
            if isinstance(error, OSError) and error.strerror
            else f"the file is damaged ({error})"
        )
        raise UserError(f"cannot read {path}: {reason}") from error


def read_content(path: str | Path, encoding: str = "utf-8") -> bytes:
    """Returns a whole file, decompressed, in UTF-8. Raises UserError if it cannot be read."""
    with _readable(str(path)), open_text(str(path), encoding) as stream:
        return stream.read()


# ------------------------------------------------------------------------------------------------ lines


def read_lines(path: str, encoding: str) -> Iterator[tuple[int, str | bytes]]:
    """Yields the number of each line, from 1, and its text without the line end.

    A line that is no text in this encoding comes as bytes. A byte order mark at the begin is left out.
    """
    with open_text(path, encoding) as stream:
        for number, line in enumerate(stream, 1):
            line = line.removesuffix(b"\n").removesuffix(b"\r")
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError:
                yield number, line


def not_text(path: str, number: int, line: bytes, encoding: str) -> BrokenRow:
    """Makes the broken row of a line with bytes that are not of this encoding."""
    hint = (other_encoding(path, encoding) or "").replace("give encoding=", "set data.encoding=")
    reason = f"bytes that are not {encoding}{f'; {hint}' if hint else ''}"
    return BrokenRow(
        f"{path}, line {number}", reason, line[: 4 * EXCERPT].decode("utf-8", "replace")[:EXCERPT]
    )


# ----------------------------------------------------------------------------------------- csv and tsv


def _read_table(path: str, data: ExamplesConfig, form: str, wanted: Wanted) -> Iterator[Row | BrokenRow]:
    quoting = (form == "csv" and data.columns is None) if data.quoting is None else data.quoting
    separator = data.separator or ("," if form == "csv" else "\t")
    if quoting and data.columns is not None:
        raise UserError(f"data.columns={data.columns} is for files without quoting: set data.quoting=false")
    if quoting and len(separator) != 1:
        raise UserError(f"data.separator={separator!r} must be one character where data.quoting is true")
    lines = read_lines(path, data.encoding)
    rows = _quoted_rows(path, lines, separator) if quoting else _plain_rows(lines, separator, data.columns)
    header = data.header
    if header == "auto":
        header = any(isinstance(name, str) for _, name in wanted)
    names: list[str] = []
    for number, cells in rows:
        place = f"{path}, line {number}"
        if isinstance(cells, bytes):
            cells = not_text(path, number, cells, data.encoding)
        if isinstance(cells, BrokenRow):
            if header and not names:
                raise UserError(f"{place}, which should name the columns: {cells.reason}")
            yield cells
        elif not names:
            names = cells if header else [str(i) for i in range(len(cells))]
            _check_header(place, names, wanted, bool(header))
            if not header:
                yield Row(place, dict(zip(names, cells, strict=True)), True)
        elif len(cells) != len(names):
            reason = f"{len(cells)} columns where the first line has {len(names)}"
            yield BrokenRow(place, reason, separator.join(cells)[:EXCERPT])
        else:
            yield Row(place, dict(zip(names, cells, strict=True)), True)


def _check_header(place: str, names: list[str], wanted: Wanted, header: bool) -> None:
    """Raises UserError if a column is missing, or is there twice."""
    for key, name in wanted:
        there = 0 <= name < len(names) if isinstance(name, int) else name in names
        if not there:
            none = f" (if the file has no header, give {key} a number)" if isinstance(name, str) else ""
            raise UserError(f"{place}: {_no_column(name, names, key)}{none}")
        if isinstance(name, str) and not header:
            raise UserError(f"{key}={name!r}: without a header columns have numbers; set {key} to one")
        if isinstance(name, str) and names.count(name) > 1:
            raise UserError(f"{place}: {names.count(name)} columns are named {name!r}; set {key} to a number")
    repeated = [name for i, name in enumerate(names) if name in names[:i]]
    if repeated:  # the values of a row are by name
        names[:] = [f"{name} ({i})" if name in names[:i] else name for i, name in enumerate(names)]


def _plain_rows(
    lines: Iterator[tuple[int, str | bytes]], separator: str, columns: int | None
) -> Iterator[tuple[int, list[str] | bytes]]:
    """Yields the cells of each line that is not empty; of `columns` cells the last one has the rest."""
    for number, line in lines:
        if isinstance(line, bytes):
            yield number, line
        elif line:
            yield number, line.split(separator, -1 if columns is None else columns - 1)


def _quoted_rows(
    path: str, lines: Iterator[tuple[int, str | bytes]], separator: str
) -> Iterator[tuple[int, list[str] | bytes | BrokenRow]]:
    """Yields the cells of each row, which may take several lines.

    Where the quotation marks do not pair, the row is its first line alone, and the next line begins another:
    one stray mark does not swallow the rows behind it.
    """
    waiting: deque[tuple[int, str | bytes]] = deque()
    taken: list[tuple[int, str | bytes]] = []

    def text_of_row() -> Iterator[str]:
        while (line := waiting.popleft() if waiting else next(lines, None)) is not None:
            taken.append(line)
            if isinstance(line[1], bytes):
                raise UnicodeError("the row goes on with bytes that are no text")
            yield line[1] + "\n"

    csv.field_size_limit(LONGEST_CELL)  # of this process
    while True:
        taken.clear()
        try:
            cells = next(csv.reader(text_of_row(), delimiter=separator, strict=True), None)
        except (csv.Error, UnicodeError) as error:
            waiting.extendleft(reversed(taken[1:]))
            number, line = taken[0]
            if isinstance(line, bytes):
                yield number, line
            else:
                reason = (
                    f"the quotation marks do not pair ({error}); if texts have such, set data.quoting=false"
                )
                yield number, BrokenRow(f"{path}, line {number}", reason, line[:EXCERPT])
            continue
        if cells is None:
            return
        if cells:
            yield taken[0][0], cells


# --------------------------------------------------------------------------------------- json, parquet


def _kind_of_json(path: str, encoding: str) -> Format:
    """Tells json lines from one JSON value, and SQuAD's articles from other data, by the first line."""
    for _, line in read_lines(path, encoding):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError:
            value = None  # a value of several lines
        return "jsonl" if isinstance(value, dict) and not isinstance(value.get("data"), list) else "json"
    return "jsonl"


def _read_jsonl(path: str, data: ExamplesConfig) -> Iterator[Row | BrokenRow]:
    for number, line in read_lines(path, data.encoding):
        if isinstance(line, bytes):
            yield not_text(path, number, line, data.encoding)
        elif line.strip("\ufeff \t\r"):
            # Of files that were put together each may begin with a byte order mark.
            yield _row_of_json(f"{path}, line {number}", line.removeprefix("\ufeff"))


def _row_of_json(place: str, line: str) -> Row | BrokenRow:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        return BrokenRow(place, f"broken JSON ({error})", line[:EXCERPT])
    if not isinstance(values, dict):
        return BrokenRow(place, "not a JSON object", line[:EXCERPT])
    if "\\u" in line and _lone_surrogate.search(json.dumps(values, ensure_ascii=False)):
        return BrokenRow(place, "half of a surrogate pair, which is no character", line[:EXCERPT])
    return Row(place, values)


def _read_json(path: str, data: ExamplesConfig) -> Iterator[Row | BrokenRow]:
    content = read_content(path, data.encoding)
    try:
        value = json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        number = content[: error.start].count(b"\n") + 1
        broken = not_text(path, number, content[error.start :], data.encoding)
        raise UserError(f"{broken.place}: {broken.reason}") from error
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}, line {error.lineno}, column {error.colno}: broken JSON ({error.msg})"
        ) from error
    items = value.get("data") if isinstance(value, dict) else value
    if not isinstance(items, list):
        raise UserError(
            f'{path} is neither a list of objects nor {{"data": [...]}}; for JSON lines set data.format=jsonl'
        )
    for number, item in enumerate(items, 1):
        place = f"{path}, item {number}"
        if isinstance(item, dict):
            yield Row(place, item)
        else:
            yield BrokenRow(place, "not a JSON object", str(item)[:EXCERPT])


def _read_parquet(path: str, wanted: Wanted) -> Iterator[Row | BrokenRow]:
    with open_parquet(path) as parquet:
        names = list(parquet.schema_arrow.names)
        _check_header(path, names, wanted, True)
        number = 0
        for batch in parquet.iter_batches(1024, use_threads=False):
            for i in range(len(batch)):
                number += 1
                place = f"{path}, row {number}"
                try:
                    values = batch.slice(i, 1).to_pylist()[0]
                except UnicodeDecodeError:  # Arrow does not look whether texts are UTF-8
                    yield BrokenRow(place, "bytes that are not utf-8", None)
                else:
                    yield Row(place, values, True)
