"""What a person sees of long work, on terminals of any width and in a log."""

from __future__ import annotations

import io
import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Any, cast

import pytest
from dist import run_ranks
from tiny import pretrain_config

from bertscale import progress
from bertscale.progress import CopiedStream, Progress, TimeBudget, fitting, fold

STAMP = r"\d\d [A-Z][a-z]{2} \d\d:\d\d:\d\d"
FIGURES = {"loss": "7.310", "tokens/s": "123,456", "MLM": "6.617", "NSP accuracy": "51%", "MFU": "45%"}


class Hands:
    """A clock that a test sets."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


def lines_of(file: io.StringIO) -> list[str]:
    """The lines without their time of day, which each of them must have."""
    lines = file.getvalue().splitlines()
    assert all(re.match(STAMP, line) for line in lines), lines
    return [re.sub(f"^{STAMP}  ", "", line) for line in lines]


# -------------------------------------------------------------------------------------------- in a log


def test_a_log_has_the_time_of_day_and_its_last_line_once() -> None:
    file, clock = io.StringIO(), Hands()
    with Progress("encode", 30, "bytes", file=file, clock=clock) as shown:
        for _ in range(3):
            clock.now += 11
            shown.advance(10)
        shown.say("a word")
    assert lines_of(file) == [
        "encode: 10/30 bytes, 0.91/s, 0:22 left",
        "encode: 20/30 bytes, 0.91/s, 0:11 left",
        "a word",
        "encode: 30/30 bytes, 0.91/s, in 0:33",
    ]


def test_a_line_comes_with_new_figures_and_none_comes_twice() -> None:
    file, clock = io.StringIO(), Hands()
    with Progress("pretrain", None, "steps", file=file, clock=clock) as shown:
        assert not shown.wants_facts()
        clock.now += 11
        assert shown.wants_facts()
        shown.advance(1, loss="7.1")
        assert not shown.wants_facts()
        clock.now += 11
        shown.advance(1)  # the loss is that of the step before
        assert shown.wants_facts()
        shown.advance(1, loss="6.9")
    assert lines_of(file) == [
        "pretrain: 1 steps, 0.09/s, 0:11 so far, loss 7.1",
        "pretrain: 3 steps, 0.14/s, 0:22 so far, loss 6.9",
    ]


def test_a_budget_of_time_shows_what_is_left_and_the_steps_to_expect() -> None:
    file, clock = io.StringIO(), Hands()
    hours = TimeBudget(7200.0, spent=3600.0)
    with Progress("pretrain", None, "steps", start=500, budget=hours, file=file, clock=clock) as shown:
        clock.now += 600
        shown.advance(100, loss="7.1")
        clock.now += 3000
        shown.advance(500, loss="6.9")
    assert lines_of(file) == [
        "pretrain: 600/~1,100 steps, 0.17/s, 50:00 left, loss 7.1",
        "pretrain: 1,100 steps, 0.17/s, in 1:00:00, loss 6.9",
    ]


def test_hidden_progress_says_nothing() -> None:
    file, clock = io.StringIO(), Hands()
    with Progress("pretrain", 2, "steps", hidden=True, file=file, clock=clock) as shown:
        clock.now += 60
        assert not shown.wants_facts()
        shown.advance(1)
        shown.say("a word")
    assert file.getvalue() == ""


# ------------------------------------------------------------------------------------------ on a terminal


class Terminal:
    """A terminal of `columns`; `states` are what its lowest line has shown, one after another."""

    def __init__(self, columns: int) -> None:
        self.columns = columns
        self.reading, writing = os.openpty()
        self.file = os.fdopen(writing, "w", encoding="utf-8")

    def states(self) -> list[str]:
        self.file.flush()
        os.set_blocking(self.reading, False)
        seen = b""
        while True:
            try:
                seen += os.read(self.reading, 2**16)
            except BlockingIOError:
                break
        text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", seen.decode())
        return [state for state in re.split(r"[\r\n]+", text) if state.strip()]


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Terminal:
    columns = getattr(request, "param", 80)
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "xterm-256color")
    return Terminal(columns)


def test_something_moves_between_two_steps(terminal: Terminal) -> None:
    with Progress("pretrain", 10, "steps", file=terminal.file) as shown:
        shown.advance(1, loss="7.1")
        states: set[str] = set()
        while len(states) < 4:  # the states of the bar while nothing advances
            time.sleep(0.05)
            states |= set(terminal.states())


@pytest.mark.parametrize("terminal", [40, 60, 80, 200], indirect=True)
def test_no_width_cuts_a_figure(terminal: Terminal) -> None:
    clock = Hands()
    with Progress("pretrain", 1_000_000, "steps", file=terminal.file, clock=clock) as shown:
        clock.now += 40_000
        shown.advance(123_456, **FIGURES)
    last = terminal.states()[-1].rstrip()
    assert len(last) <= terminal.columns
    assert "…" not in last
    whole = ["123,456/1,000,000 steps", "78:53:22 left"]
    if terminal.columns >= 80:
        whole += ["loss 7.310", "tokens/s 123,456"]
    if terminal.columns >= 200:
        whole += [f"{name} {figure}" for name, figure in FIGURES.items()] + ["pretrain", "━", "3.09/s"]
    assert all(part in last for part in whole), last


def test_what_matters_least_goes_first() -> None:
    parts = ["1/2 steps", "3.0/s", "0:10 left", "loss 7.31", "tokens/s 99", "MLM 6.6", "MFU 4%"]
    for width in range(len("1/2 steps"), 80):
        kept = fitting(parts, width)
        assert len(kept) <= width
        assert set(kept.split(", ")) <= set(parts)
        # A part is there only with all that matter more than it.
        order = ["1/2 steps", "0:10 left", "loss 7.31", "tokens/s 99", "3.0/s", "MLM 6.6", "MFU 4%"]
        there = [part in kept.split(", ") for part in order]
        assert there == sorted(there, reverse=True)
    assert kept == ", ".join(parts)


def test_the_log_of_a_terminal_has_lines_and_no_bar(terminal: Terminal) -> None:
    log, clock = io.StringIO(), Hands()
    stream = cast(Any, CopiedStream(terminal.file, log))
    print("the model", file=stream)
    with Progress("pretrain", 2, "steps", file=stream, clock=clock) as shown:
        clock.now += 11
        shown.advance(1, loss="7.1")
        shown.say("step 1: held-out")
        clock.now += 1
        shown.advance(1, loss="6.9")
    states = terminal.states()
    assert states[0] == "the model"
    assert "step 1: held-out" in states
    first, *lines = log.getvalue().splitlines()
    assert first == "the model"
    assert [re.sub(f"^{STAMP}  ", "", line) for line in lines] == [
        "pretrain: 1/2 steps, 0.09/s, 0:11 left, loss 7.1",
        "step 1: held-out",
        "pretrain: 2/2 steps, 0.17/s, in 0:12, loss 6.9",
    ]
    assert all(re.match(STAMP, line) for line in lines)


# ---------------------------------------------------------------------------------------- in a real run


def train_twice(data: str, folder: str) -> list[list[Any]]:
    """Trains with figures at every step by the clock, and without; what was kept, and the lines."""
    import contextlib

    from bertscale.pretrain import pretrain
    from bertscale.run_folder import read_metrics
    from bertscale.train.device import local_device
    from bertscale.train.parallel import start_ranks

    class Never:
        asked = False

    kept = []
    for name, seconds in (("often", 0.0), ("seldom", 1e9)):
        progress.LINE_SECONDS = seconds
        run = Path(folder) / name
        run.mkdir(exist_ok=True)
        train = {"steps": 6, "log_every": 4}
        config = pretrain_config(data, run, train=train, parallel={"zero_stage": 1})
        ranks, printed = start_ranks(1, local_device()), io.StringIO()
        with contextlib.redirect_stdout(printed):
            assert pretrain.train(config, ranks, Never()) == 0  # type: ignore[arg-type]
        rows = [{k: v for k, v in row.items() if k[:6] != "speed/"} for row in read_metrics(run)]
        kept.append([rows, printed.getvalue().splitlines()])
    return kept


@pytest.mark.slow
def test_figures_by_the_clock_change_nothing_that_is_kept(tiny_data: Path, tmp_path: Path) -> None:
    """Two ranks agree on them by the clock of the first one."""
    first, second = run_ranks(__file__, "train_twice", world=2, data=str(tiny_data), folder=str(tmp_path))
    (often, lines), (seldom, few) = first
    assert often == seldom
    assert [row["step"] for row in seldom] == [1, 4, 6, 6]
    steps = [re.search(r"pretrain: (\d)/6 steps.*loss \d.*tokens/s", line) for line in lines]
    assert [int(found.group(1)) for found in steps if found] == [1, 2, 3, 4, 5, 6]
    assert sum("pretrain:" in line for line in few) == 1
    assert json.dumps(second[0][1]) == "[]"  # the other rank prints nothing


def test_first_lines_are_folded_at_words_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    line = "data      2.40 M tokens, 19,512 documents, 18,300 packed samples of at most 128 tokens; 2 h to go"
    assert fold(line) == line  # in a log
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    for columns in (60, 80):
        monkeypatch.setenv("COLUMNS", str(columns))
        lines = fold(line).split("\n")
        assert max(map(len, lines)) <= columns
        assert all(part.startswith(" " * 10) and part[10] != " " for part in lines[1:])
        assert " ".join(part.strip() for part in lines).split() == line.split()
    monkeypatch.setenv("COLUMNS", "200")
    assert fold(line) == line
