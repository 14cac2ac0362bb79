"""The records of Parquet and Arrow files: one column, a few rows at a time.

Parquet is read by row group, a page at a time; of an Arrow file the pages that were read are given back.
"""

from __future__ import annotations

import mmap
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from io import BufferedReader
from itertools import pairwise
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_prep.readers.compressed import (
    DAMAGE,
    compression_of,
    open_file,
    open_stream,
    temporary_folder_named,
)
from data_prep.readers.formats import RECORD_BYTES, TOO_LONG, column_index, no_text
from data_prep.readers.records import BLANK, EXCERPT, DamagedFileError, Record, bad, judged, printable

BATCH_BYTES = 2**21  # of text in Python's memory at a time, about
_ARROW_FILE = b"ARROW1\0\0"  # then what a stream has, then a footer


def text_column(schema: Any, column: str, name: str) -> int:
    """The index of `column`; raises UserError if there is none, or if it holds no text."""
    index = column_index(schema.names, column, name)
    kind = schema.field(index).type
    if not _is_text(kind) and kind != pa.null():
        texts = [field.name for field in schema if _is_text(field.type)]
        raise no_text(texts, f"the column {column!r} of {printable(name)} holds {kind}", "columns")
    return index


def _is_text(kind: Any) -> bool:
    values = kind.value_type if pa.types.is_dictionary(kind) else kind
    return values in (pa.string(), pa.large_string(), pa.string_view())


# --------------------------------------------------------------------------------------------- parquet


@contextmanager
def open_parquet(name: str) -> Iterator[Any]:
    """A compressed one is unpacked into a temporary file first: Parquet is read from its end."""
    opened: AbstractContextManager[Any] = _unpacked(name) if compression_of(name) else open_file(name)
    with opened as file:
        yield pq.ParquetFile(pa.PythonFile(file, "r"), buffer_size=2**20, page_checksum_verification=True)


@contextmanager
def _unpacked(name: str) -> Iterator[Any]:
    with ExitStack() as stack:
        with temporary_folder_named(f"the content of {printable(name)}"):
            copy = stack.enter_context(tempfile.TemporaryFile())
            with open_stream(name) as stream:
                shutil.copyfileobj(stream, copy, 2**20)
        yield copy


def group_starts(parquet: Any) -> list[int]:
    """The byte of the file where each row group begins; rising, or else empty."""
    columns = [parquet.metadata.row_group(group).column(0) for group in range(parquet.num_row_groups)]
    starts = [column.dictionary_page_offset or column.data_page_offset for column in columns]
    return starts if all(a < b for a, b in pairwise(starts)) else []


def read_parquet(name: str, start: int, end: int, column: str) -> Iterator[Record]:
    """The rows of the row groups that begin in [start, end) of the file.

    Raises DamagedFileError after what can be read.
    """
    with open_parquet(name) as parquet:
        text_column(parquet.schema_arrow, column, name)
        starts = group_starts(parquet) if not compression_of(name) else []
        # Sizes are those of leaves: nested columns before this one have several.
        leaves = [parquet.schema.column(i).path for i in range(len(parquet.schema.names))]
        about_groups = [parquet.metadata.row_group(group) for group in range(parquet.num_row_groups)]
        chosen = [
            (start <= starts[group] < end) if starts else start == 0 for group in range(len(about_groups))
        ]
        rows_in_all = sum(
            about.num_rows for about, is_chosen in zip(about_groups, chosen, strict=True) if is_chosen
        )
        row = done = 0
        for group, about in enumerate(about_groups):
            if chosen[group]:
                size = about.column(leaves.index(column)).total_uncompressed_size
                rows = max(1, min(1024, BATCH_BYTES * about.num_rows // max(size, 1)))
                at = row
                try:
                    for batch in parquet.iter_batches(rows, [group], [column], use_threads=False):
                        yield from _texts(batch.column(0), name, at)
                        at, done = at + batch.num_rows, done + batch.num_rows
                except DAMAGE as error:
                    raise DamagedFileError(1 - done / rows_in_all) from error
            row += about.num_rows


# ----------------------------------------------------------------------------------------------- arrow


def open_arrow(stream: BufferedReader) -> Any:
    """The batches of an Arrow IPC file or stream, with their `schema`."""
    if stream.peek(len(_ARROW_FILE)).startswith(_ARROW_FILE):
        stream.read(len(_ARROW_FILE))
    return pa.ipc.open_stream(stream)


def read_arrow(name: str, column: str) -> Iterator[Record]:
    """The rows of an Arrow IPC file or stream, in order. Raises DamagedFileError after what can be read."""
    with open_stream(name) as stream:
        if compression_of(name):
            yield from _rows(open_arrow(stream), name, column, None)
            return
        # Closed when the last of the arrays that look into it is gone.
        memory = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        start = len(_ARROW_FILE) if memory[: len(_ARROW_FILE)] == _ARROW_FILE else 0
        yield from _rows(pa.ipc.open_stream(pa.py_buffer(memory).slice(start)), name, column, memory)


def _rows(batches: Any, name: str, column: str, memory: mmap.mmap | None) -> Iterator[Record]:
    index = text_column(batches.schema, column, name)
    row = unreleased = read = 0
    while True:
        try:
            batch = next(batches, None)
        except DAMAGE as error:
            raise DamagedFileError(max(0.0, 1 - read / len(memory)) if memory else 1.0) from error
        if batch is None:
            return
        read += batch.nbytes
        array = batch.column(index)
        rows = max(1, min(1024, BATCH_BYTES * len(array) // max(array.nbytes, 1)))
        for start in range(0, len(array), rows):
            chunk = array.slice(start, rows)
            yield from _texts(chunk, name, row + start)
            unreleased += chunk.nbytes
            if memory is not None and unreleased > 8 * BATCH_BYTES:
                memory.madvise(mmap.MADV_DONTNEED)  # they are read again from the file where they are needed
                unreleased = 0
        row += len(array)


def _texts(array: Any, name: str, row: int) -> Iterator[Record]:
    """The texts of an array whose first row is number `row` of the file."""
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    # As bytes, because Arrow does not look whether they are UTF-8 when it reads them.
    array = array.cast(pa.large_binary())
    array.validate(full=True)  # offsets of a damaged file point anywhere
    lengths = pc.binary_length(array)
    whole = (pc.sum(lengths).as_py() or 0) <= 4 * BATCH_BYTES
    values = array.to_pylist() if whole else None
    for at in range(len(array)):
        where = f"row {row + at}"
        if values is None and (lengths[at].as_py() or 0) > RECORD_BYTES:
            yield bad(TOO_LONG, name, where, array[at].as_buffer()[: 4 * EXCERPT].to_pybytes())
            continue
        value = array[at].as_py() if values is None else values[at]
        if value is None:
            yield BLANK
        else:
            yield from judged(value, name, where)
