"""Prep that is killed, stopped, or robbed of its input or its disk loses nothing and says what to do."""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bertscale import files
from bertscale.config import PrepConfig, UserError, check_config
from bertscale.data.shards import open_dataset
from data_prep.build import prep, prep_share, prep_tokenizer
from data_prep.workers import worker_pool

TEXT = "the a red blue old new house tree river runs sings over under with and some many green stone"
WORDS = TEXT.split()
REAL = os.environ.get("BERTSCALE_DATA", "")  # the fixture of all tests takes such variables away


def write_documents(path: Path, count: int) -> None:
    """All of them different."""
    draw = random.Random(path.name)
    with open(path, "w", encoding="utf-8") as file:
        for number in range(count):
            words = " ".join(draw.choices(WORDS, k=draw.randint(8, 60))).capitalize()
            file.write(json.dumps({"text": f"{words}. This is {path.stem} {number}."}) + "\n")


def config_for(folder: Path, output: str, **changes: Any) -> PrepConfig:
    values = {
        "input": [str(folder / "input")],
        "output": str(folder / output),
        "train_tokenizer": {"vocab_size": 320, "sample_documents": 100},
        "split_bytes": 25_000,
        "shard_bytes": 25_000,
        "validation_fraction": 0.1,
        "workers": 2,
    }
    return check_config(PrepConfig, values | changes, "test")


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def start(config: PrepConfig, *options: str, **environment: str) -> subprocess.Popen[str]:
    """`bertscale prep` as a process of its own, in a group of its own."""
    path = Path(config.output).with_suffix(".yaml")
    path.write_text(json.dumps(config.model_dump()))
    return subprocess.Popen(
        [sys.executable, "-m", "bertscale", "prep", str(path), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **environment},
        start_new_session=True,
    )


def wait_for(folder: Path, pattern: str, process: subprocess.Popen[str], count: int = 1) -> None:
    """Until `count` files match."""
    while len(list(folder.glob(pattern))) < count:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.001)


def kill(process: subprocess.Popen[str], everybody: bool) -> None:
    """kill -9, of the process alone or of its workers too."""
    (os.killpg if everybody else os.kill)(process.pid, signal.SIGKILL)
    process.communicate()  # returns only when the workers, who hold the pipe too, are gone


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An input of 60 work units or so, prepared into `whole` without a stop."""
    folder = tmp_path_factory.mktemp("stops")
    (folder / "input").mkdir()
    for name in "abc":
        write_documents(folder / "input" / f"{name}.jsonl", 2_500)
    prep(config_for(folder, "whole"))
    return folder


# ---------------------------------------------------------------------------------------------- killed

MOMENTS = [  # so many files are there, and so many milliseconds later at most
    (".prep/plan.json", 1, 20),
    (".prep/*.spill", 3, 5),
    (".prep/unit-*[0-9].json", 20, 5),
    ("*.arrow*", 1, 2),
    (".prep/shard-*.json", 4, 2),
]


@pytest.mark.parametrize("everybody", [False, True])
def test_killed_in_both_passes(corpus: Path, everybody: bool) -> None:
    config, output = config_for(corpus, f"killed-{everybody}"), corpus / f"killed-{everybody}"
    draw = random.Random(everybody)
    for pattern, count, later in MOMENTS:
        process = start(config)
        wait_for(output, pattern, process, count)
        time.sleep(draw.random() * later / 1000)
        kill(process, everybody)
        assert not (output / "manifest.json").exists()
        with pytest.raises(UserError, match="prep did not finish here"):
            open_dataset(output)
    kept = {path: path.stat().st_mtime_ns for path in (output / ".prep").glob("[us]*-*.json")}
    kinds = {path.name.split("-")[0] for path in kept}
    assert kinds == {"unit", "shard"}
    process = start(config)
    text, _ = process.communicate()
    assert process.returncode == 0, text
    assert "work units are finished and kept" in text
    assert "shards are finished and kept" in text
    assert all(path.stat().st_mtime_ns == when for path, when in kept.items())
    assert bytes_of(output) == bytes_of(corpus / "whole")


@pytest.mark.skipif(not REAL, reason="BERTSCALE_DATA is not set")
def test_killed_twenty_times_on_real_text(tmp_path: Path) -> None:
    def config(output: str) -> PrepConfig:
        values = {
            "input": [f"{REAL}/corpora/wiki_en"],
            "train_tokenizer": {"vocab_size": 8_192, "sample_documents": 2_000},
            "split_bytes": 500_000,
            "shard_bytes": 500_000,
        }
        return config_for(tmp_path, output, **values)

    began = time.monotonic()
    process = start(config("whole"))
    text, _ = process.communicate()
    assert process.returncode == 0, text
    undisturbed, whole = time.monotonic() - began, bytes_of(tmp_path / "whole")
    draw, killed, finished = random.Random(), 0, 0
    while killed < 20 or not finished:
        process = start(config("killed"))
        # Long enough to come to something, short enough to die several times before the end.
        delay = draw.uniform(0.1, 0.5) * undisturbed
        try:
            text, _ = process.communicate(timeout=delay if killed < 20 else None)
        except subprocess.TimeoutExpired:
            kill(process, everybody=draw.random() < 0.5)
            killed += 1
            continue
        assert process.returncode == 0, text
        assert bytes_of(tmp_path / "killed") == whole
        finished += 1
        shutil.rmtree(tmp_path / "killed")


def test_a_dead_worker_ends_the_run(corpus: Path) -> None:
    config, output = config_for(corpus, "worker"), corpus / "worker"
    for pattern in (".prep/unit-*[0-9].json", ".prep/shard-*.json"):
        process = start(config)
        wait_for(output, pattern, process)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        workers = [pid for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        os.kill(int(workers[0]), signal.SIGKILL)
        text, _ = process.communicate()
        assert process.returncode == 2, text
        assert "a prep worker was killed, most likely because memory ran out" in text
        assert "finished work is kept" in text
        assert "Traceback" not in text
    prep(config)
    assert bytes_of(output) == bytes_of(corpus / "whole")


def test_ctrl_c(corpus: Path) -> None:
    config, output = config_for(corpus, "interrupted"), corpus / "interrupted"
    for pattern in (".prep/unit-*[0-9].json", ".prep/shard-*.json"):
        process = start(config)
        wait_for(output, pattern, process)
        process.send_signal(signal.SIGINT)
        text, _ = process.communicate()
        assert process.returncode == 130, text
        assert "the same command continues, finished work is kept" in text
        assert "Traceback" not in text
    prep(config)
    assert bytes_of(output) == bytes_of(corpus / "whole")


# ------------------------------------------------------------------------------------- two at one time


def test_a_second_prep_of_the_same_folder_is_refused(corpus: Path) -> None:
    config, output = config_for(corpus, "two"), corpus / "two"
    process = start(config)
    wait_for(output, ".prep/plan.json", process)
    refused = rf"another bertscale prep \(process {process.pid} on .*\) is at work in {output}; wait until"
    for other in (config, config_for(corpus, "two", split_bytes=30_000)):
        for part in (prep, prep_tokenizer):
            with pytest.raises(UserError, match=refused):
                part(other)
    text, _ = process.communicate()
    assert process.returncode == 0, text
    assert bytes_of(output) == bytes_of(corpus / "whole")
    assert prep(config)["reused"]


def test_the_finish_of_an_array_excludes_others_but_shares_do_not(corpus: Path) -> None:
    config, output = config_for(corpus, "parts"), corpus / "parts"
    prep_tokenizer(config)
    shares = [start(config, "--task-index", str(i), "--task-count", "2") for i in range(2)]
    for share in shares:
        text, _ = share.communicate()
        assert share.returncode == 0, text
    finish = start(config, "--finish")
    wait_for(output, ".prep/shard-*.json", finish)
    finish.send_signal(signal.SIGSTOP)  # it has not ended when the other one comes
    again = start(config, "--finish")
    text, _ = again.communicate()
    finish.send_signal(signal.SIGCONT)
    assert again.returncode == 2, text
    assert f"another bertscale prep (process {finish.pid} on" in text
    text, _ = finish.communicate()
    assert finish.returncode == 0, text
    assert bytes_of(output) == bytes_of(corpus / "whole")


def test_a_file_system_without_locks(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: Any) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    monkeypatch.setattr(files, "BEAT_SECONDS", 0.1)
    prep(config_for(corpus, "unlocked"))
    assert bytes_of(corpus / "unlocked") == bytes_of(corpus / "whole")


def test_workers_that_an_error_ends_leave_nothing_behind() -> None:
    threads, began = set(threading.enumerate()), time.monotonic()

    def one_fails_while_another_works() -> None:
        with worker_pool(2) as pool:
            pool.submit(time.sleep, 60)
            pool.submit(int, "words").result()

    with pytest.raises(ValueError, match="invalid literal"):
        one_fails_while_another_works()
    assert time.monotonic() - began < 30
    assert set(threading.enumerate()) == threads  # what is left would race with the interpreter's end
    assert not multiprocessing.active_children()


# ------------------------------------------------------------------------------------ no input, no disk


def copy_of(corpus: Path, folder: Path) -> None:
    shutil.copytree(corpus / "input", folder / "input")


@pytest.mark.parametrize("split_bytes", [25_000, 10**9])
def test_input_that_vanishes(corpus: Path, tmp_path: Path, split_bytes: int) -> None:
    copy_of(corpus, tmp_path)
    config = config_for(tmp_path, "output", split_bytes=split_bytes, workers=1)
    last, away = tmp_path / "input" / "c.jsonl", tmp_path / "c.jsonl"
    process = start(config)
    wait_for(tmp_path / "output", "tokenizer.model", process)
    last.rename(away)
    text, _ = process.communicate()
    assert process.returncode == 2, text
    assert str(last) in text
    assert "No such file or directory" in text
    assert "Traceback" not in text
    away.rename(last)  # as old as it was
    prep(config)
    prep(config_for(tmp_path, "whole", split_bytes=split_bytes))
    assert bytes_of(tmp_path / "output") == bytes_of(tmp_path / "whole")


@pytest.mark.parametrize(
    "change",
    [
        lambda path: path.write_text(path.read_text() + "more\n"),
        lambda path: path.write_bytes(path.read_bytes().replace(b" the ", b" THE ")),
    ],
)
def test_input_that_changes(corpus: Path, tmp_path: Path, change: Callable[[Path], Any]) -> None:
    copy_of(corpus, tmp_path)
    config = config_for(tmp_path, "output", workers=1, max_bad_fraction=0.5)
    process = start(config)
    wait_for(tmp_path / "output", ".prep/unit-*[0-9].json", process)
    change(tmp_path / "input" / "c.jsonl")
    text, _ = process.communicate()
    assert process.returncode == 2, text
    changed = f"{tmp_path / 'input' / 'c.jsonl'} changed while it was read"
    assert f"{changed}; run the same command again with --replace" in text
    assert "Traceback" not in text
    process = start(config)
    text, _ = process.communicate()
    assert process.returncode == 2, text
    assert "holds the unfinished work of a prep of other settings or input (input: 1 file changed" in text
    process = start(config, "--replace")
    text, _ = process.communicate()
    assert process.returncode == 0, text
    prep(config_for(tmp_path, "whole", max_bad_fraction=0.5))
    assert bytes_of(tmp_path / "output") == bytes_of(tmp_path / "whole")


# Imported by every Python process that starts with its folder on PYTHONPATH, the workers too.
FULL_DISK = """
import errno, os
fsync = os.fsync

def full(descriptor):
    name = os.readlink(f"/proc/self/fd/{descriptor}")
    if os.environ["FULL_AT"] in name:
        raise OSError(errno.ENOSPC, "No space left on device")
    fsync(descriptor)

os.fsync = full
"""


@pytest.mark.parametrize("name", ["unit-00007", "train-00003.arrow", "shard-train-00003", "manifest"])
def test_a_full_disk(corpus: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "sitecustomize.py").write_text(FULL_DISK)
    config, output = config_for(corpus, f"full-{name}"), corpus / f"full-{name}"
    process = start(config, PYTHONPATH=str(tmp_path), FULL_AT=name)
    text, _ = process.communicate()
    assert process.returncode == 2, text
    assert f"the disk is full at {output} (No space left on device): free some space" in text
    assert "finished work is kept" in text
    assert "Traceback" not in text
    assert not [path for path in output.rglob("*.tmp-*") if name in path.name]
    prep(config)
    assert bytes_of(output) == bytes_of(corpus / "whole")


def test_free_space_is_looked_at_first(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prep_tokenizer(config_for(corpus, "space"))
    prep_share(config_for(corpus, "space"), 0, 1)
    free = shutil.disk_usage(corpus)._replace(free=1_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    with pytest.raises(
        UserError, match=r"no-space has 0\.0 GB free, and the sorted spill files and the shards of"
    ):
        prep(config_for(corpus, "no-space"))
    with pytest.raises(UserError, match=r"space has 0\.0 GB free, and the shards of this input take about"):
        prep(config_for(corpus, "space"))
