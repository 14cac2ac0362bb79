"""A file, plain or compressed, as a buffered stream of its bytes.

with open_stream("wiki_00.bz2") as stream:
    line = stream.readline(2**20)

Members that follow one another in a .gz, .bz2 or .xz file and frames of a .zst file are read as one. A file
that has such a name and is plain text, or a plain table, is read as it is. What is damaged or ends too early
raises one of DAMAGE, after what was before it; or it ends the stream, and `damage_of` tells of it.
"""

from __future__ import annotations

import bz2
import errno
import gzip
import io
import lzma
import os
import subprocess
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from bertscale.config import UserError
from data_prep.readers.records import printable

COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
# An OSError that has an errno is the system's (a disk that fails); one without is about the content.
DAMAGE = (EOFError, OSError, zlib.error, lzma.LZMAError, pa.ArrowException)
_MAGIC = {  # what such a file begins with
    ".gz": (b"\x1f\x8b",),
    ".bz2": (b"BZh",),
    ".xz": (b"\xfd7zXZ\0",),
    ".zst": (b"\x28\xb5\x2f\xfd", *(bytes([0x50 + kind, 0x2A, 0x4D, 0x18]) for kind in range(16))),
}
_ZSTD_FRAME = _MAGIC[".zst"][0]
_PLAIN = (b"\xff\xfe", b"\xfe\xff", b"\0\0\xfe\xff", b"PAR1", b"ARROW1")  # UTF-16, UTF-32, tables
_NO_TEXT = bytes(set(range(32)) - set(b"\t\n\v\f\r\x1a\x1b"))  # bytes
_WINDOW = 2**27  # bytes: what the library takes for a frame of a .zst
_BUFFER = 2**18  # bytes
_BUFFER_OF_DECOMPRESSED = 2**16  # bytes; about as many are lost before a damaged place of a .zst


@dataclass(frozen=True)
class Damage:
    """Why a stream ended before its end, and about where in the file as it lies on the disk (byte)."""

    error: BaseException
    position: int


def damage_of(stream: io.BufferedReader) -> Damage | None:
    """The damage that ended a stream, if one did."""
    return stream.raw.damage if isinstance(stream.raw, Decompressed) else None


class Decompressed(io.RawIOBase):
    """What `file` gives, a little at a time, so that nothing before a damaged place is lost.

    With `under`, the file as it lies on the disk, damage ends the stream; without, it raises one of DAMAGE.
    """

    def __init__(self, file: Any, under: io.BufferedReader | None = None) -> None:
        self._file, self._under = file, under
        self._given = 0  # bytes
        self._damage: Damage | None = None

    @property
    def damage(self) -> Damage | None:
        return self._damage or getattr(self._file, "damage", None)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if self._damage:
            return 0
        try:
            data = self._file.read1(min(len(buffer), _BUFFER_OF_DECOMPRESSED))
        except DAMAGE as error:
            if self._under is None or (isinstance(error, OSError) and error.errno):
                raise
            self._damage = Damage(error, self._under.tell())
            return 0
        buffer[: len(data)] = data
        self._given += len(data)
        return len(data)

    def tell(self) -> int:
        return self._given

    def close(self) -> None:
        self._file.close()
        super().close()


@contextmanager
def temporary_folder_named(what: str) -> Iterator[None]:
    """Makes a UserError of a full, or unusable, folder of temporary files, in which `what` is written."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT) and "temporary directory" not in str(error):
            raise
        folder = tempfile.tempdir or os.environ.get("TMPDIR", "/tmp")
        raise UserError(
            f"there is no room for {what} in the folder of temporary files, {folder} ({error.strerror}): "
            "free some space there, or set TMPDIR to a folder that has room"
        ) from error


def compression_of(name: str) -> str:
    """The suffix of a compressed file, or ""."""
    return next((suffix for suffix in COMPRESSIONS if name.lower().endswith(suffix)), "")


class _ZstdProgram:
    """What the program `zstd` unpacks, for frames that look further back than the library does."""

    def __init__(self, name: str) -> None:
        command = ["zstd", "-dcq", "--long=31", "--", name]
        try:
            self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        except FileNotFoundError as error:
            raise UserError(
                f"input: {printable(name)} was packed by zstd --long: install the program zstd, which reads "
                "it, or pack it again without"
            ) from error

    def read1(self, size: int) -> bytes:
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        data: bytes = self._process.stdout.read1(size)  # type: ignore[attr-defined]
        if not data and self._process.wait():
            raise EOFError(self._process.stderr.read().decode("utf-8", "replace"))
        return data

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


def _is_plain(head: bytes) -> bool:
    """Whether a file that begins like this is not compressed, though its name says so."""
    if head.startswith(tuple(magic for of_kind in _MAGIC.values() for magic in of_kind)):
        return False
    return head.startswith(_PLAIN) or head.translate(None, _NO_TEXT) == head


def _zstd_window(head: bytes) -> int:
    """How many bytes the first frame looks back: https://datatracker.ietf.org/doc/html/rfc8878#section-3.1.1"""
    if not head.startswith(_ZSTD_FRAME) or len(head) < 18:
        return 0
    descriptor = head[4]
    if not descriptor & 0x20:
        exponent, mantissa = head[5] >> 3, head[5] & 7
        return (1 << 10 + exponent) * (8 + mantissa) // 8
    start, size = 5 + (0, 1, 2, 4)[descriptor & 3], (1, 2, 4, 8)[descriptor >> 6]
    return int.from_bytes(head[start : start + size], "little")  # of a frame in one piece, its content


@contextmanager
def open_stream(name: str, until_damage: bool = False) -> Iterator[io.BufferedReader]:
    """Raises UserError if the file cannot be opened. With `until_damage`, damage only ends the stream."""
    with open_file(name) as file:
        compression = compression_of(name)
        head = file.peek(_BUFFER) if compression else b""
        match "" if _is_plain(head) else compression:
            case ".gz":
                opened: Any = gzip.GzipFile(fileobj=file)
            case ".bz2":
                opened = bz2.BZ2File(file)
            case ".xz":
                opened = lzma.LZMAFile(file)  # noqa: SIM115
            case ".zst" if _zstd_window(head) > _WINDOW:
                opened = _ZstdProgram(name)
            case ".zst":
                opened = pa.CompressedInputStream(file, "zstd")
            case _:
                yield file
                return
        raw: Any = Decompressed(opened, file if until_damage else None)
        with io.BufferedReader(raw, _BUFFER_OF_DECOMPRESSED) as stream:
            yield stream


def open_file(name: str) -> io.BufferedReader:
    """The bytes of the file as they are. Raises UserError if it cannot be opened."""
    try:
        return io.BufferedReader(io.FileIO(name), _BUFFER)
    except OSError as error:
        raise UserError(f"input: cannot read {printable(name)}: {error.strerror or error}") from error
