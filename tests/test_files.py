"""Files and folders are whole or as they were: under kill -9, on a full disk, beside other writers."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest

from bertscale import files
from bertscale.files import (
    file_digest,
    fresh_folder,
    put_in_place,
    whole_file,
    whole_folder,
    write_bytes,
    write_json,
)
from bertscale.run_folder import append_line, read_metrics
from bertscale.train.metrics import MetricsWriter

ROOT = Path(__file__).parents[1]

KILLS = """
import itertools, json, os, random, signal, sys, time
from pathlib import Path
import torch.utils.tensorboard
from bertscale.files import write_bytes
from bertscale.train.metrics import MetricsWriter

class NoEvents:
    def __init__(self, *_, **__): pass
    def close(self): pass

torch.utils.tensorboard.SummaryWriter = NoEvents
folder, name = Path(sys.argv[1]), sys.argv[2]
path = folder / name

def rewrite(number):
    if name == "metrics.jsonl":
        MetricsWriter(folder, 10**9).close()
    else:
        write_bytes(path, contents[number % 2])

if name == "metrics.jsonl":
    lines = [json.dumps({"step": step, "text": "x" * 10**6}) + "\\n" for step in range(5)]
    contents = ["".join(lines).encode()]
else:
    contents = [letter * 3_000_000 for letter in (b"a", b"b")]
path.write_bytes(contents[0])
choose = random.Random(0)
for kill in range(40):
    child = os.fork()
    if child == 0:
        for number in itertools.count():
            rewrite(number)
    time.sleep(choose.uniform(0.01, 0.1))
    os.kill(child, signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert path.read_bytes() in contents, kill
"""


@pytest.mark.parametrize("name", ["metrics.jsonl", "config.yaml"])
def test_a_killed_rewrite_leaves_a_whole_file(tmp_path: Path, name: str) -> None:
    """Forty times a process that does nothing but rewrite is killed, at another moment each time."""
    subprocess.run([sys.executable, "-c", KILLS, str(tmp_path), name], check=True)


def test_a_full_disk_leaves_the_metrics_of_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in range(1, 9):
        append_line(tmp_path / "metrics.jsonl", {"step": step})

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            MetricsWriter(tmp_path, 4)
    assert [entry["step"] for entry in read_metrics(tmp_path)] == list(range(1, 9))
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


FULL = """
import os, resource, signal, sys
from pathlib import Path
from bertscale.files import write_bytes
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))  # a write past it fails, as on a full disk
try:
    write_bytes(Path(sys.argv[1]), b"new" * 1000)
except OSError as error:
    print(error.errno)
"""


def test_a_write_that_fails_in_the_middle_leaves_the_file_of_before(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(b"old")
    done = subprocess.run([sys.executable, "-c", FULL, str(path)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(errno.EFBIG)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["config.yaml"]


def test_a_file_is_replaced_and_flushed_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    def noting(name: str) -> Callable[..., None]:
        real = getattr(os, name)

        def work(*arguments: object) -> None:
            done.append(name)
            real(*arguments)

        return work

    for name in ("fsync", "replace"):
        monkeypatch.setattr(os, name, noting(name))
    write_json(tmp_path / "a.json", {"a": "é"})
    assert done == ["fsync", "replace"]
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"a": "é"}
    write_bytes(tmp_path / "a.json", b"b", flush=False)
    assert done[2:] == ["replace"]
    assert (tmp_path / "a.json").read_bytes() == b"b"


def test_a_folder_takes_the_place_of_an_older_one(tmp_path: Path) -> None:
    final = tmp_path / "made"
    for content in ("one", "two"):
        partial = fresh_folder(final)
        (partial / "inner").mkdir()
        (partial / "inner/file").write_text(content)
        put_in_place(partial, final)
        assert (final / "inner/file").read_text() == content
        assert os.listdir(tmp_path) == ["made"]
    (fresh_folder(final) / "leftover").touch()
    assert os.listdir(fresh_folder(final)) == []


def test_a_kill_while_the_older_folder_goes_leaves_no_half_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The older one is renamed before it is removed: its name never stands for a part of its files."""
    final = tmp_path / "made"
    final.mkdir()
    for name in "abcd":
        (final / name).touch()
    (fresh_folder(final) / "new").touch()
    seen = []
    unlink = os.unlink

    def look(*arguments: object, **options: object) -> None:
        seen.append(sorted(os.listdir(final)) if final.exists() else None)
        unlink(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "unlink", look)
    put_in_place(tmp_path / ".made.partial", final)
    assert len(seen) == 4
    assert all(files == ["new"] for files in seen)


# ------------------------------------------------------------------------------- one process at a time


@pytest.fixture(params=[None, 38, 95, 37], ids=["locks", "ENOSYS", "EOPNOTSUPP", "ENOLCK"])
def locks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int | None:
    """A file system with the kernel's locks, or one that answers flock with this error, and a quick pulse."""
    monkeypatch.setattr(files, "BEAT_SECONDS", 0.1)
    monkeypatch.setattr(files, "BEATS_AWAITED", 15)
    if request.param is not None:

        def flock(*_: Any) -> None:
            raise OSError(request.param, os.strerror(request.param))

        monkeypatch.setattr(fcntl, "flock", flock)
    return cast("int | None", request.param)


def test_a_second_process_is_noticed_with_and_without_locks(tmp_path: Path, locks: int | None) -> None:
    lock = tmp_path / "lock"
    with (
        files.alone(lock, "job 7"),
        pytest.raises(files.HeldError, match=r"^job 7$"),
        files.alone(lock, "job 8"),
    ):
        pass
    with files.alone(lock, "job 8"):  # free again
        assert lock.read_text().startswith("job 8")


def test_a_lock_is_taken_from_the_dead_and_from_our_own(tmp_path: Path, locks: int | None) -> None:
    lock = tmp_path / "lock"
    lock.write_text("job 7" if locks is None else "job 7\nnode1 4711 17.0 3")
    with files.alone(lock, "job 8"), files.alone(lock, "job 8", "job 8".__eq__):
        time.sleep(0.2)  # the earlier one notices it, and writes no more
        with pytest.raises(files.HeldError), files.alone(lock, "job 9"):
            pass


def test_of_two_that_come_at_the_same_moment_one_stays(tmp_path: Path, locks: int | None) -> None:
    gate, done, won = threading.Barrier(2), threading.Event(), list[int]()

    def come(number: int) -> None:
        gate.wait()
        try:
            with files.alone(tmp_path / "lock", str(number)):
                won.append(number)
                done.wait()
        except files.HeldError:
            done.set()

    threads = [threading.Thread(target=come, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1


def test_digest(tmp_path: Path) -> None:
    import xxhash

    content = hashlib.sha256(b"seed").digest() * 200_000  # more than a block
    (tmp_path / "file").write_bytes(content)
    assert file_digest(tmp_path / "file") == xxhash.xxh3_128_hexdigest(content)


@pytest.mark.parametrize(
    "module", ["bertscale.files", "bertscale.train.heartbeat", "launcher.watch", "launcher.rank"]
)
def test_a_batch_host_needs_the_standard_library_alone(module: str) -> None:
    code = f"import {module}, sys; print(*sys.modules)"
    command = [sys.executable, "-S", "-c", code]
    loaded = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    names = {name.split(".")[0] for name in loaded.stdout.split()} - {"bertscale", "launcher", "__main__"}
    assert names <= sys.stdlib_module_names


@pytest.mark.parametrize("whole", [whole_file, whole_folder])
def test_the_error_of_a_full_disk_names_what_was_written(tmp_path: Path, whole: Callable[..., Any]) -> None:
    with pytest.raises(OSError, match="full") as error, whole(tmp_path / "a"):
        raise OSError(errno.ENOSPC, "full")  # as that of write(), which knows no name
    assert error.value.filename == str(tmp_path / "a")
    with pytest.raises(OSError, match="full") as error, whole(tmp_path / "a"):
        raise OSError(errno.ENOSPC, "full", "another")
    assert error.value.filename == "another"
    assert list(tmp_path.iterdir()) == []
