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
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any, BinaryIO

BEAT_SECONDS = 5.0  # between two signs of life of who holds a lock where the file system has none
BEATS_AWAITED = 5  # of a process that may be dead

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


def put_in_place(partial: Path, final: Path, flushed: Collection[str] = ()) -> None:
    """Flushes the files of `partial` and renames it, in place of an older `final`. Raises OSError.

    Files named in `flushed` are on the disk already: whoever wrote them has flushed them. Of several
    processes that do so at the same time, the last one's folder stays, whole.
    """
    for path in partial.rglob("*"):
        if path.name not in flushed:
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


# ---------------------------------------------------------------------------------- one process at a time


class HeldError(Exception):
    """Another process holds the lock; its text is what that one wrote there of itself."""


@contextmanager
def alone(path: Path, holder: str, ours: Callable[[str], bool] = lambda holder: False) -> Iterator[None]:
    """Holds the lock file `path`, which says `holder`, while the block runs. Raises HeldError, OSError.

    The lock is the kernel's: it goes with the process, however that ends. Where the file system has none, the
    process writes into the file every BEAT_SECONDS, and whoever comes waits that long for a few beats. A lock
    of which `ours` says yes, by its holder, is taken over: that process can do no more harm.
    """
    with ExitStack() as stack:
        file = stack.enter_context(open(path, "a+", encoding="utf-8"))
        locked = _lock(file)
        if locked is False:
            file.seek(0)
            if not ours(other := file.read().strip()):
                raise HeldError(other)
            path.unlink()
            file = stack.enter_context(open(path, "a+", encoding="utf-8"))
            locked = _lock(file)
        if locked is None:
            stack.enter_context(_beating(path, holder, ours))
        else:
            file.truncate(0)
            file.write(holder)
            file.flush()
        yield


def _lock(file: IO[str]) -> bool | None:
    """Whether the kernel gives the lock; None where the file system has no locks (Lustre, NFS, FUSE)."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


@contextmanager
def _beating(path: Path, holder: str, ours: Callable[[str], bool]) -> Iterator[None]:
    """The lock where there is none: the file holds the holder, the process, and the number of its beats."""
    found, end = path.read_text(encoding="utf-8"), time.monotonic() + BEATS_AWAITED * BEAT_SECONDS
    other = found.partition("\n")[0].strip()
    while found and not ours(other) and time.monotonic() < end:
        time.sleep(BEAT_SECONDS / 2)
        if path.read_text(encoding="utf-8") != found:
            raise HeldError(other)
    me = f"{holder.strip()}\n{os.uname().nodename} {os.getpid()} {time.time()} "
    stop = threading.Event()

    def mine() -> bool:
        with suppress(OSError):  # which says nothing about the lock
            return path.read_text(encoding="utf-8").startswith(me)
        return True

    def beat() -> None:
        beats = 1
        while not stop.wait(BEAT_SECONDS) and mine():  # else it was taken over
            # Over the old one, of the same length: an empty file would look like a lock that is free.
            with suppress(OSError), open(path, "r+", encoding="utf-8") as file:
                file.write(f"{me}{beats:09d}")
            beats += 1

    path.write_text(f"{me}{0:09d}", encoding="utf-8")
    time.sleep(BEAT_SECONDS / 2)  # of two that come at the same moment the later one stays
    if not mine():
        raise HeldError(path.read_text(encoding="utf-8").partition("\n")[0])
    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        with suppress(OSError):
            if mine():
                path.write_text("")


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
