"""Writes files and folders that appear complete or not at all, and computes their digests.

    write_json(path, {"steps": 100})     # `path` is the old file or the new one, whatever happens meanwhile
    with whole_folder(final) as partial: # likewise
        write_json(partial / "facts.json", {})

Standard library only, except for the digest: a batch host may have nothing else.
"""

from __future__ import annotations

import errno
import fcntl
import glob
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

# ---------------------------------------------------------------------------------------------- files


@contextmanager
def whole_file(path: Path, *, flush: bool = True) -> Iterator[BinaryIO]:
    """Opens a file under a temporary name; at the end it is flushed to the disk and renamed to `path`.

    After an exception `path` is what it was, and no other file is left. Without `flush` this holds when the
    process is killed, but not when the machine loses power. Raises OSError.
    """
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        with _full_disk_named(path, temporary):
            with open(temporary, "wb") as file:
                yield file
                file.flush()
                if flush:
                    os.fsync(file.fileno())
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def _full_disk_named(path: Path, temporary: Path) -> Iterator[None]:
    """Puts `path` into an OSError of a full disk that names nothing, as those of `write`, or `temporary`."""
    try:
        yield
    except OSError as error:
        unnamed = error.filename is None or str(error.filename).startswith(str(temporary))
        if error.errno in (errno.ENOSPC, errno.EDQUOT) and unnamed:
            error.filename = str(path)
        raise


def write_bytes(path: Path, content: bytes, *, flush: bool = True) -> None:
    """Writes `content` so that `path` is either the old file or the whole new one. Raises OSError."""
    with whole_file(path, flush=flush) as file:
        file.write(content)


def write_json(path: Path, value: Any, *, flush: bool = True) -> None:
    """Writes `value` so that `path` is either the old file or the whole new one. Raises OSError."""
    write_bytes(path, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode(), flush=flush)


# -------------------------------------------------------------------------------------------- folders


def partial_folder(final: Path) -> Path:
    """Returns the temporary name of a folder that will be `final`."""
    return final.with_name(f".{final.name}.partial")


def fresh_folder(final: Path) -> Path:
    """Makes an empty folder beside `final` under its temporary name. Raises OSError."""
    partial = partial_folder(final)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    return partial


def put_in_place(partial: Path, final: Path) -> None:
    """Flushes the files of `partial` and renames it, in place of an older `final`. Raises OSError.

    Of several processes that do so at the same time, the last one's folder stays, whole.
    """
    for path in partial.rglob("*"):
        sync(path)
    sync(partial)
    with _locked(final.parent):
        old = final.with_name(f".{final.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        if final.exists():
            os.rename(final, old)  # not removed in place: a kill would leave half of it under the final name
        os.rename(partial, final)
        sync(final.parent)
        shutil.rmtree(old, ignore_errors=True)


@contextmanager
def whole_folder(final: Path) -> Iterator[Path]:
    """An empty folder to fill under a temporary name; at the end it is flushed and renamed to `final`.

    After an exception, `final` is what it was, and nothing else is left. What a killed process left of such a
    folder is removed; that of a live one, which holds a lock on it, is not. Raises OSError.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    partial = final.with_name(f".{final.name}.{os.uname().nodename}-{os.getpid()}.partial")
    with ExitStack() as stack:
        with _locked(final.parent):
            for folder in final.parent.glob(f".{glob.escape(final.name)}.*.partial"):
                with _locked(folder, wait=False) as locked:
                    if locked:
                        shutil.rmtree(folder, ignore_errors=True)
            partial.mkdir()
            stack.enter_context(_locked(partial))
        try:
            with _full_disk_named(final, partial):
                yield partial
                put_in_place(partial, final)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def _locked(folder: Path, *, wait: bool = True) -> Iterator[bool]:
    """Holds a lock on a folder, which goes with the process; gives False where another one holds it, or the
    file system has no locks. Raises OSError where there is no such folder."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError:
            yield False
        else:
            yield True
    finally:
        os.close(handle)


def sync(path: Path) -> None:
    """Flushes a file or folder to the disk. Raises OSError."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# -------------------------------------------------------------------------------------------- digests


def file_digest(path: str | Path) -> str:
    """Returns the xxh3-128 digest (hex) of a file's bytes."""
    import xxhash  # here, so that hosts with only the standard library can import this file

    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while block := file.read(4 * 2**20):
            digest.update(block)
    return digest.hexdigest()


def json_digest(value: Any) -> str:
    """xxh3-128 (hex) of a value of JSON, whatever the spacing and the order of the keys it is written in."""
    import xxhash

    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return xxhash.xxh3_128_hexdigest(text.encode(errors="surrogatepass"))
