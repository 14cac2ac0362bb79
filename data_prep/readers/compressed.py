"""A file, plain or compressed, as a buffered stream of its bytes.

with open_stream("wiki_00.bz2") as stream:
    line = stream.readline(2**20)

Members that follow one another in a .gz, .bz2 or .xz file and frames of a .zst file are read as one. What is
damaged or ends too early raises one of DAMAGE, after what was before it.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow as pa

from bertscale.config import UserError
from data_prep.readers.records import printable

COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
# An OSError that has an errno is the system's (a disk that fails); one without is about the content.
DAMAGE = (EOFError, OSError, zlib.error, lzma.LZMAError, pa.ArrowException)
_BUFFER = 2**18  # bytes
_BUFFER_OF_DECOMPRESSED = 2**16  # bytes; about as many are lost before a damaged place of a .zst


class Decompressed(io.RawIOBase):
    """What `file` gives, a little at a time, so that nothing before a damaged place is lost."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self._given = 0  # bytes

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._file.read1(len(buffer))
        buffer[: len(data)] = data
        self._given += len(data)
        return len(data)

    def tell(self) -> int:
        return self._given

    def close(self) -> None:
        self._file.close()
        super().close()


def compression_of(name: str) -> str:
    """The suffix of a compressed file, or ""."""
    return next((suffix for suffix in COMPRESSIONS if name.lower().endswith(suffix)), "")


@contextmanager
def open_stream(name: str) -> Iterator[io.BufferedReader]:
    """Raises UserError if the file cannot be opened."""
    with open_file(name) as file:
        match compression_of(name):
            case ".gz":
                opened: Any = gzip.GzipFile(fileobj=file)
            case ".bz2":
                opened = bz2.BZ2File(file)
            case ".xz":
                opened = lzma.LZMAFile(file)  # noqa: SIM115
            case ".zst":
                opened = pa.CompressedInputStream(file, "zstd")
            case _:
                yield file
                return
        stream: Any = io.BufferedReader(Decompressed(opened), _BUFFER_OF_DECOMPRESSED)
        with stream:
            yield stream


def open_file(name: str) -> io.BufferedReader:
    """The bytes of the file as they are. Raises UserError if it cannot be opened."""
    try:
        return io.BufferedReader(io.FileIO(name), _BUFFER)
    except OSError as error:
        raise UserError(f"input: cannot read {printable(name)}: {error.strerror or error}") from error
