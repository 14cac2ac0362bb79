"""Prep shared among tasks gives the plain command's bytes, whatever their number and whoever is killed."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from bertscale import cli
from bertscale.config import PrepConfig, UserError, check_config
from bertscale.data.shards import open_dataset
from data_prep.build import prep, prep_finish, prep_share, prep_tokenizer
from data_prep.plan import Plan

TEXT = "the a red blue old new house tree river runs sings over under with and some many green stone"
WORDS = TEXT.split()


def write_documents(path: Path, count: int) -> None:
    generator = random.Random(path.name)
    with open(path, "w", encoding="utf-8") as file:
        for _ in range(count):
            words = generator.choices(WORDS, k=generator.randint(8, 60))
            file.write(json.dumps({"text": " ".join(words).capitalize() + "."}) + "\n")


def config_for(folder: Path, output: str, **changes: Any) -> PrepConfig:
    values = {
        "input": [str(folder / "input")],
        "output": str(folder / output),
        "train_tokenizer": {"vocab_size": 320, "sample_documents": 100},
        "split_bytes": 8_000,
        "shard_bytes": 20_000,
        "validation_fraction": 0.1,
        "workers": 1,
    }
    return check_config(PrepConfig, values | changes, "test")


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an input of eight work units or so, prepared into `whole` by the plain command."""
    folder = tmp_path_factory.mktemp("array")
    (folder / "input").mkdir()
    write_documents(folder / "input" / "a.jsonl", 200)
    write_documents(folder / "input" / "b.jsonl", 100)
    prep(config_for(folder, "whole"))
    return folder


def start(config: PrepConfig, *options: str) -> subprocess.Popen[str]:
    """`bertscale prep` as a process of its own."""
    path = Path(config.output).with_suffix(".yaml")
    path.write_text(json.dumps(config.model_dump()))
    return subprocess.Popen(
        [sys.executable, "-m", "bertscale", "prep", str(path), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.parametrize("count", [1, 3, 50])
def test_any_number_of_tasks_gives_the_bytes_of_the_plain_command(corpus: Path, count: int) -> None:
    config = config_for(corpus, f"of-{count}")
    prep_tokenizer(config)
    for index in reversed(range(min(count, 12))):
        prep_share(config, index, count)
        assert not (corpus / f"of-{count}" / "manifest.json").exists()
    summary = prep_finish(config)
    assert bytes_of(corpus / f"of-{count}") == bytes_of(corpus / "whole")
    assert (summary["documents"], summary["reused"]) == (300, False)
    assert prep_finish(config)["reused"]
    assert prep(config)["reused"]
    prep_tokenizer(config)
    assert bytes_of(corpus / f"of-{count}") == bytes_of(corpus / "whole")


def test_tasks_at_the_same_time_one_of_them_killed(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "input").mkdir()
    write_documents(tmp_path / "input" / "a.jsonl", 6_000)
    prep(config_for(tmp_path, "whole", workers=2))
    config, output = config_for(tmp_path, "array"), tmp_path / "array"
    prep_tokenizer(config)

    tasks = [start(config, "--task-index", str(i), "--task-count", "2") for i in range(2)]
    for task, number in zip(tasks, (0, 5), strict=True):  # both have begun
        while not (output / ".prep" / f"unit-{number:05d}.json").exists():
            assert task.poll() is None, task.communicate()[0]
            time.sleep(0.001)
    tasks[1].send_signal(signal.SIGKILL)
    tasks[1].communicate()  # returns when its workers, who hold the pipe too, are gone
    # What a kill in the midst of a write leaves, of this task and, still being written, of the other one.
    own, other = (output / ".prep" / f"unit-0000{number}-train-000.spill.tmp-1" for number in (7, 8))
    (output / ".prep" / "unit-00007.json").unlink(missing_ok=True)
    for leftover in (own, other):
        leftover.write_bytes(b"half")

    with pytest.raises(UserError, match=r"of \d+ work units of .* are not built: .*task 1: 7"):
        prep_finish(config, 2)
    again = start(config, "--task-index", "1", "--task-count", "2")
    text, _ = again.communicate()
    assert again.returncode == 0, text
    assert "work units are finished and kept" in text
    assert (own.exists(), other.exists()) == (False, True)
    text, _ = tasks[0].communicate()
    assert tasks[0].returncode == 0, text
    prep_finish(config, 2)
    assert bytes_of(output) == bytes_of(tmp_path / "whole")


def test_the_order_of_the_parts_is_checked(corpus: Path) -> None:
    config = config_for(corpus, "order")
    for part in (lambda: prep_share(config, 0, 2), lambda: prep_finish(config)):
        with pytest.raises(UserError, match=r"has no finished tokenizer.*--tokenizer-only"):
            part()
    assert not (corpus / "order").exists()
    prep_tokenizer(config)
    units = len(Plan(config).units)
    prep_share(config, 1, 3)
    left = [number for number in range(units) if number % 3 != 1]
    words = (
        f"{len(left)} of {units} work units of {corpus / 'order'} are not built: "
        f"task 0: {', '.join(str(n) for n in left if n % 3 == 0)}; "
        f"task 2: {', '.join(str(n) for n in left if n % 3 == 2)}. "
    )
    with pytest.raises(UserError) as error:
        prep_finish(config, 3)
    assert str(error.value).startswith(words)
    with pytest.raises(UserError, match=r"not built: 0, 2, 3, 5, .*unit number % task count"):
        prep_finish(config)
    (corpus / "order" / "tokenizer.model").write_bytes(b"cut")
    with pytest.raises(UserError, match="has no finished tokenizer"):
        prep_share(config, 0, 3)


def test_a_task_of_another_plan_refuses_and_deletes_nothing(corpus: Path) -> None:
    config = config_for(corpus, "other")
    prep_tokenizer(config)
    prep_share(config, 0, 2)
    before = bytes_of(corpus / "other"), bytes_of(corpus / "other" / ".prep")
    other = config_for(corpus, "other", split_bytes=9_000)
    for part in (lambda: prep_share(other, 1, 2), lambda: prep_finish(other, 2)):
        with pytest.raises(UserError, match=r"another plan, and here split_bytes: 8000 -> 9000\."):
            part()
    assert (bytes_of(corpus / "other"), bytes_of(corpus / "other" / ".prep")) == before


def test_starting_over_under_a_task_that_still_runs(tmp_path: Path) -> None:
    """The task refuses at its next work unit, and what it has written is no part of the new output."""
    (tmp_path / "input").mkdir()
    write_documents(tmp_path / "input" / "a.jsonl", 3_000)
    new = config_for(tmp_path, "output", min_characters=60)
    whole = config_for(tmp_path, "whole", min_characters=60, workers=2)
    prep(whole)
    old, output = config_for(tmp_path, "output"), tmp_path / "output"
    prep_tokenizer(old)
    task = start(old, "--task-index", "0", "--task-count", "1")
    while not (output / ".prep" / "unit-00002.json").exists():
        assert task.poll() is None, task.communicate()[0]
        time.sleep(0.001)
    names = [f"unit-00001{end}" for end in (".json", ".bad.jsonl", "-train-000.spill")]
    stray = {name: (output / ".prep" / name).read_bytes() for name in names}
    prep_tokenizer(new, replace=True)
    text, _ = task.communicate()
    assert task.returncode == 2, text
    assert "was started again with other settings or input while this ran" in text
    assert "Traceback" not in text
    for name, content in stray.items():
        (output / ".prep" / name).write_bytes(content)
    (output / ".prep" / "unit-00001-train-001.spill").write_bytes(stray[names[2]])
    (output / "train-00999.arrow").write_bytes(b"of an earlier plan")
    prep_share(new, 0, 1)
    prep_finish(new)
    assert bytes_of(output) == bytes_of(tmp_path / "whole")


def test_bad_input_is_judged_at_the_end(tmp_path: Path) -> None:
    (tmp_path / "input").mkdir()
    write_documents(tmp_path / "input" / "a.jsonl", 100)
    (tmp_path / "input" / "b.jsonl").write_text("{broken\n" * 5)
    config = config_for(tmp_path, "output")
    prep_tokenizer(config)
    prep_share(config, 0, 1)
    with pytest.raises(UserError, match="5 of 105 records cannot be read"):
        prep_finish(config)
    assert prep_finish(config_for(tmp_path, "output", max_bad_fraction=0.1))["bad"] == {"broken JSON": 5}
    with open(tmp_path / "input" / "a.jsonl", "a") as file:
        file.write("\n")
    with pytest.raises(UserError, match="another plan, and here input: 1 file changed"):
        prep_finish(config)


# ------------------------------------------------------------------------------------- the command line


def run(config: PrepConfig, *options: str) -> int:
    path = Path(config.output).with_suffix(".yaml")
    path.write_text(json.dumps(config.model_dump()))
    return cli.main(["prep", str(path), *options])


def test_in_a_slurm_array(
    corpus: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config, output = config_for(corpus, "slurm"), corpus / "slurm"
    monkeypatch.setenv("SLURM_ARRAY_TASK_MIN", "5")
    monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", "2")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "5")
    assert run(config) == 2
    assert "--tokenizer-only" in capsys.readouterr().err
    assert run(config, "--tokenizer-only") == 0
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "6")
    assert run(config) == 0
    assert "task 1 of 2 builds" in capsys.readouterr().out
    assert run(config, "--task-index", "0") == 0
    assert run(config, "--finish") == 0
    assert bytes_of(output) == bytes_of(corpus / "whole")
    assert open_dataset(output, "train", verify=True).num_documents > 200
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "7")
    assert run(config) == 2
    assert "is 2 of 2 tasks: they are numbered from 0 to 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--task-index", "0"], "--task-count is missing"),
        (["--task-count", "4"], "--task-index is missing"),
        (["--task-index", "4", "--task-count", "4"], "--task-index is 4 of 4 tasks"),
        (["--task-index", "-1", "--task-count", "4"], "--task-index is -1 of 4 tasks"),
    ],
)
def test_mistaken_options(
    corpus: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert run(config_for(corpus, "mistaken"), *options) == 2
    assert message in capsys.readouterr().err
    assert not (corpus / "mistaken").exists()


def test_options_that_exclude_each_other(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for options in (["--finish", "--tokenizer-only"], ["--finish", "--task-count", "0"]):
        with pytest.raises(SystemExit):
            run(config_for(corpus, "mistaken"), *options)
    assert "--task-count must be 1 or more" in capsys.readouterr().err
