"""The contract of a run folder: which checkpoint is the newest, and what is read of damaged lines."""

from __future__ import annotations

import ast
import json
import multiprocessing
import re
from pathlib import Path

import pytest

from bertscale.run_folder import (
    Events,
    append_line,
    checkpoint_folder,
    checkpoint_step,
    checkpoints,
    newest_step,
    read_events,
    read_lines,
    read_metrics,
)
from bertscale.train.checkpoint import prune
from bertscale.train.metrics import MetricsWriter
from launcher.runs import find, look

ROOT = Path(__file__).parents[1]
STEPS = range(9_999_990, 10_000_011)  # as text, those of eight digits come before those of seven


def commit(run: Path, step: int) -> Path:
    folder = checkpoint_folder(run, step)
    folder.mkdir(parents=True)
    (folder / "bertscale.json").write_text('{"format": 0}')
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A long run, and beside its checkpoints what people and crashes leave there."""
    for step in STEPS:
        commit(tmp_path, step)
    folder = tmp_path / "checkpoints"
    for name in ("step-best", "step-0000004-best", "step-", "step-٣", "step--5", "Step-99999999"):
        (folder / name).mkdir()
        (folder / name / "bertscale.json").write_text("{}")
    (folder / "step-20000000").symlink_to(folder / "step-9999990")
    (folder / "step-20000001").mkdir()  # never committed
    (folder / ".step-20000002.partial").mkdir()
    (folder / "step-20000003").write_text("a file")
    return tmp_path


def test_checkpoints_are_ordered_by_number(run: Path) -> None:
    assert [checkpoint_step(folder) for folder in checkpoints(run)] == list(STEPS)
    assert newest_step(run) == 10_000_010
    assert newest_step(run / "no run") == newest_step(None) == 0


def test_pruning_keeps_the_newest_and_all_that_is_foreign(run: Path) -> None:
    before = {path.name for path in (run / "checkpoints").iterdir()}
    prune(run, 3)
    kept = [checkpoint_folder(run, step).name for step in (10_000_008, 10_000_009, 10_000_010)]
    assert [folder.name for folder in checkpoints(run)] == kept
    gone = before - {path.name for path in (run / "checkpoints").iterdir()}
    assert gone == {checkpoint_folder(run, step).name for step in STEPS[:-3]}
    prune(run, 30)
    assert [folder.name for folder in checkpoints(run)] == kept


def test_pruning_keeps_multiples_for_good(run: Path) -> None:
    prune(
        run, 3, every=8
    )  # 9,999,992 is one, and so are 10,000,000 and 10,000,008, which is a newest one too
    steps = [9_999_992, 10_000_000, 10_000_008, 10_000_009, 10_000_010]
    assert [checkpoint_step(folder) for folder in checkpoints(run)] == steps
    commit(run, 10_000_012)
    prune(run, 1, every=8)
    assert [checkpoint_step(folder) for folder in checkpoints(run)] == [*steps[:3], 10_000_012]


def test_a_resume_takes_the_newest(run: Path) -> None:
    from bertscale.config import UserError
    from bertscale.train.checkpoint import open_checkpoint

    with pytest.raises(UserError, match="step-10000010 has checkpoint format 0"):
        open_checkpoint(run)


def test_resume_passes_from_the_newest_to_the_one_before(run: Path) -> None:
    from bertscale.config import UserError
    from bertscale.train.resume import newest_sound

    said: list[str] = []

    class OneRank:
        rank, world = 0, 1
        say = staticmethod(said.append)

        @staticmethod
        def broadcast(value: object) -> object:
            return value

        @staticmethod
        def gather(value: object) -> list[object]:
            return [value]

    with pytest.raises(UserError, match="every checkpoint"):
        newest_sound(run, OneRank())  # type: ignore[arg-type]
    assert [line.split()[0].rpartition("/")[2] for line in said] == [
        checkpoint_folder(run, step).name for step in reversed(STEPS)
    ]


def test_status_shows_the_newest(run: Path) -> None:
    facts = look(find(str(run)))
    assert facts.checkpoint_step == 10_000_010
    assert facts.checkpoint == checkpoint_folder(run, 10_000_010)


# ------------------------------------------------------------------------------------------- the lines

GARBAGE = b'{"step": 5, "train/lo\n\x00\xff\n[1]\n"text"\n7\n{"step": "five"}\n' + b"[" * 100_000 + b"\n"


def test_damaged_lines_cost_only_themselves(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + GARBAGE + '{"step": 6, "note": "a\u2028b\x85c"}\n{"step": 7'.encode())
    assert [entry["step"] for entry in read_metrics(tmp_path)] == [1, 6]
    assert read_metrics(tmp_path)[1]["note"] == "a\u2028b\x85c"
    assert read_metrics(tmp_path / "no run") == []
    MetricsWriter(tmp_path, 6).close()
    assert [json.loads(line)["step"] for line in path.read_text().split("\n")[:-1]] == [1, 6]


def test_the_last_bytes_begin_with_a_whole_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(f'{{"step": {step}}}\n' for step in range(10, 100)))
    line = len('{"step": 10}\n')
    assert [entry["step"] for entry in read_metrics(tmp_path, 3 * line + 1)] == [97, 98, 99]
    assert len(read_metrics(tmp_path, 10**9)) == 90


def test_an_event_after_a_line_that_was_cut_short_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_bytes(b'{"time": 1.0, "event": "queued"}\n{"time": 2.0, "eve')
    events = Events(path, job="17")
    events.write("started", nodes=["a"])
    events.write("failed", reason="a\u2028b \udcff")
    assert [event["event"] for event in read_events(path)] == ["queued", "started", "failed"]
    assert read_events(path)[1]["job"] == "17"
    assert read_events(path)[2]["reason"] == "a\u2028b ?"


def test_lines_without_an_event_or_a_time_are_no_events(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_bytes(
        GARBAGE + b'{"event": "done"}\n{"time": true, "event": "a"}\n{"time": 1, "event": "done"}'
    )
    assert read_events(path) == [{"time": 1, "event": "done"}]


def _append_many(path: Path, name: str) -> None:
    for number in range(200):
        append_line(path, {"name": name, "number": number, "text": "x" * 300})


def test_two_processes_append_at_the_same_time(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_append_many, args=(tmp_path / "lines", name)) for name in "ab"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert len(read_lines(tmp_path / "lines")) == 400


# ------------------------------------------------------------------------------------------- the names

PRODUCT = [path for room in ("bertscale", "data_prep", "launcher") for path in (ROOT / room).rglob("*.py")]
FILE_NAMES = re.compile(
    r"config\.yaml|result\.json|metrics\.jsonl|events\.jsonl|bertscale\.json|job\.json|script\.sh"
    r"|environment\.json|srun\.log|\.lock|\.?heartbeat|tensorboard|checkpoints|BERTSCALE_ATTEMPT"
    r"|(step|attempt|rank|done|slurm)-"
)


@pytest.mark.parametrize("path", PRODUCT, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_names_are_spelled_in_one_file(path: Path) -> None:
    """No other file has a string, alone or in a path, that is one of the names; sentences may."""
    if path.name == "run_folder.py":
        return
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " not in node.value:
            found = [part for part in node.value.split("/") if FILE_NAMES.fullmatch(part)]
            assert not found, f"line {node.lineno}: {node.value}"
