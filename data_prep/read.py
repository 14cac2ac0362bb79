"""Input files -> records, each a text or the reason why it cannot be read.

    files = find_files(["corpus", "more/*.jsonl"])
    for part in cut_into_splits(files, split_bytes=512 * 2**20)[0]:
        for record in read_records(part, text_field="text"): ...

Formats: .jsonl, one JSON object a line, the text in one of its fields; .txt, a blank line between documents.
"""

from __future__ import annotations

import glob
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from bertscale.config import UserError

SUFFIXES = (".jsonl", ".txt")
_BOM = b"\xef\xbb\xbf"
_lone_surrogate = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class InputFile:
    name: str
    size: int  # bytes
    mtime_ns: int


@dataclass(frozen=True)
class Part:
    """A byte range of a file that starts and ends between documents."""

    name: str
    start: int
    end: int


@dataclass(frozen=True)
class Bad:
    """A record that cannot be read."""

    reason: str
    place: str


def find_files(inputs: list[str]) -> list[InputFile]:
    """The files that `inputs` name (files, folders searched through, globs), each once, in a fixed order.

    Raises UserError for one that names nothing, and for a file of another kind.
    """
    found: dict[str, None] = {}
    for name in inputs:
        path = Path(name)
        if path.is_dir():
            names = [str(file) for file in sorted(path.rglob("*")) if _is_input(file.relative_to(path))]
            if not names:
                raise UserError(f"input: the folder {name} has no {' or '.join(SUFFIXES)} files")
        else:
            names = [name] if path.exists() else sorted(glob.glob(name, recursive=True))
            if not names:
                raise UserError(f"input: there is no file, folder or match for {name}")
            for other in names:
                if not other.endswith(SUFFIXES):
                    raise UserError(f"input: {other} is neither {' nor '.join(SUFFIXES)}")
        found.update(dict.fromkeys(names))
    files = []
    for name in found:
        status = Path(name).stat()
        files.append(InputFile(name, status.st_size, status.st_mtime_ns))
    if not sum(file.size for file in files):
        raise UserError(f"input: {', '.join(inputs)}: every file is empty")
    return files


def _is_input(path: Path) -> bool:
    """Whether a file found in a folder counts: hidden ones, among them prep's own, do not."""
    return path.suffix in SUFFIXES and not any(part.startswith(".") for part in path.parts)


def cut_into_splits(files: list[InputFile], split_bytes: int) -> list[list[Part]]:
    """Cuts the input, in order and between documents, about every `split_bytes` bytes."""
    splits: list[list[Part]] = [[]]
    room = split_bytes
    for input_file in files:
        start = 0
        with _open(input_file.name) as file:
            while start < input_file.size:
                if room <= 0:
                    splits.append([])
                    room = split_bytes
                end = input_file.size
                if start + room < end:
                    end = min(_next_document(file, start + room), input_file.size)
                splits[-1].append(Part(input_file.name, start, end))
                room -= end - start
                start = end
    return splits


def read_records(part: Part, text_field: str) -> Iterator[str | Bad]:
    """The records of `part` in order; memory holds one record."""
    with _open(part.name) as file:
        file.seek(part.start)
        if part.start == 0 and file.read(len(_BOM)) != _BOM:
            file.seek(0)
        records = _lines(file, part.end) if part.name.endswith(".jsonl") else _paragraphs(file, part.end)
        for start, content in records:
            text, reason = "", ""
            try:
                text = content.decode("utf-8")
            except UnicodeDecodeError:
                reason = "invalid UTF-8"
            if not reason and part.name.endswith(".jsonl"):
                text, reason = _text_of_json(text, text_field)
            if not reason and not text.strip():
                reason = "blank"
            if not reason and not text.isascii() and _lone_surrogate.search(text):
                reason = "lone surrogate"
            yield Bad(reason, f"{part.name}, byte {start}") if reason else text


def _text_of_json(line: str, field: str) -> tuple[str, str]:
    """(text, "") or ("", reason)."""
    if not line.strip():
        return "", "blank"
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return "", "broken JSON"
    if not isinstance(record, dict):
        return "", "not a JSON object"
    if field not in record:
        return "", f"no field {field!r}"
    text = record[field]
    if not isinstance(text, str):
        return "", f"field {field!r} is null" if text is None else f"field {field!r} is not a string"
    return text, ""


def _lines(file: BinaryIO, end: int) -> Iterator[tuple[int, bytes]]:
    position = file.tell()
    while position < end and (line := file.readline()):
        yield position, line
        position += len(line)


def _paragraphs(file: BinaryIO, end: int) -> Iterator[tuple[int, bytes]]:
    start, lines = file.tell(), list[bytes]()
    for position, line in _lines(file, end):
        if line.strip():
            if not lines:
                start = position
            lines.append(line)
        elif lines:
            yield start, b"".join(lines)
            lines.clear()
    if lines:
        yield start, b"".join(lines)


def _next_document(file: BinaryIO, position: int) -> int:
    """Where the first document after `position` starts; the file's size if none does."""
    file.seek(position)
    file.readline()  # the rest of a line that may have begun before `position`
    if file.name.endswith(".txt"):
        while (line := file.readline()) and line.strip():
            pass
        while line and not line.strip():
            start = file.tell()
            line = file.readline()
            if line.strip():
                return start
    return file.tell()


def _open(name: str) -> BinaryIO:
    try:
        return open(name, "rb", buffering=2**20)
    except OSError as error:
        raise UserError(f"input: cannot read {name}: {error.strerror or error}") from error
