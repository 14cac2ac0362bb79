"""The training loop as a person runs it: killed, stopped, resumed, finished, refused."""

from __future__ import annotations

import fcntl
import json
import os
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from damage import change_manifest
from dist import _command, run_command, run_ranks
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import pretrain_config

from bertscale.run_folder import checkpoints, read_events, read_metrics
from bertscale.train.checkpoint import open_checkpoint

pytestmark = pytest.mark.slow

TRAIN = {"steps": 12, "save_every": 4, "eval_every": 6, "keep_checkpoints": 2}
Start = Callable[..., "subprocess.Popen[str]"]
Train = Callable[..., tuple[int, str]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """`start(data, run, ...)` begins `bertscale pretrain` on two ranks, TP 2 x ZeRO-3, as a process."""
    begun: list[subprocess.Popen[str]] = []

    def begin(data: Path, run: Path, *overrides: str, **changes: dict[str, Any]) -> subprocess.Popen[str]:
        config = write_config(tmp_path, data, run, **changes)
        command = [sys.executable, "-m", "bertscale", "pretrain", str(config), *overrides]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        begun.append(process)
        return process

    yield begin
    for process in begun:
        process.kill()
        process.wait()


@pytest.fixture
def train(tmp_path: Path) -> Train:
    """`train(data, run, ...)` does the same without a supervisor, in processes that need not start anew; its
    exit code and what it says. Where nothing happens from outside the supervisor has no part in the run."""

    def through(data: Path, run: Path, *overrides: str, **changes: dict[str, Any]) -> tuple[int, str]:
        return run_command("pretrain", str(write_config(tmp_path, data, run, **changes)), *overrides, world=2)

    return through


def write_config(folder: Path, data: Path, run: Path, **changes: dict[str, Any]) -> Path:
    changes = {"parallel": {"tensor": 2, "zero_stage": 3}, "train": TRAIN, **changes}
    config = folder / f"{run.name}.yaml"
    config.write_text(json.dumps(pretrain_config(data, run, **changes).model_dump()))
    return config


def losses(run: Path) -> dict[int, tuple[float, float]]:
    entries = [e for e in read_metrics(run) if "train/loss" in e]
    return {e["step"]: (e["train/loss"], e["train/gradient_norm"]) for e in entries}


def wait_for_step(run: Path, step: int, process: subprocess.Popen[str]) -> None:
    while max(losses(run), default=0) < step:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)


def processes_of(run: Path) -> list[int]:
    """Ids of the living processes whose command line names the run's config."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            text = (entry / "cmdline").read_text()
            state = (entry / "stat").read_text().rsplit(")", 1)[1].split()[0]
        except (OSError, IndexError):
            continue
        if f"{run.name}.yaml" in text and state != "Z":
            found.append(int(entry.name))
    return found


@pytest.fixture(scope="module")
def whole(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """An uninterrupted run of 12 steps and what it printed."""
    folder = tmp_path_factory.mktemp("whole")
    config = folder / "whole.yaml"
    values = pretrain_config(tiny_data, folder / "run", parallel={"tensor": 2, "zero_stage": 3}, train=TRAIN)
    config.write_text(json.dumps(values.model_dump()))
    command = [sys.executable, "-m", "bertscale", "pretrain", str(config)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return folder / "run", result.stdout


def test_a_finished_run_leaves_figures_events_checkpoints_and_its_config(whole: tuple[Path, str]) -> None:
    run, printed = whole
    result = json.loads((run / "result.json").read_text())
    figures = losses(run)
    assert sorted(figures) == list(range(1, 13))
    assert result["first_loss"] == figures[1][0]
    assert result["last_loss"] == figures[12][0] < result["first_loss"]
    assert result["tokens_per_second"] > 0
    assert 0 < result["mfu"] < 1
    assert [f.name for f in checkpoints(run)] == ["step-0000008", "step-0000012"]  # two are kept
    assert open_checkpoint(run).step == 12
    assert (run / "config.yaml").is_file()

    events = EventAccumulator(str(run / "tensorboard" / run.name))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert tags >= {
        *(f"train/{key}" for key in ("loss", "mlm_loss", "nsp_loss", "mlm_accuracy", "nsp_accuracy")),
        "train/learning_rate",
        "train/gradient_norm",
        "speed/tokens_per_second",
        "speed/mfu",
        "heldout/mlm_loss",
    }
    scalars = events.Scalars("train/loss")
    assert [s.step for s in scalars] == list(range(1, 13))
    assert "tensor parallel 2 x data parallel 1, ZeRO-3" in printed
    assert "float32 (as configured)" in printed
    assert "pretrain: 12/12 steps" in printed


def test_killed_and_resumed_is_uninterrupted_bit_for_bit(
    tiny_data: Path, tmp_path: Path, start: Start, whole: tuple[Path, str]
) -> None:
    run = tmp_path / "killed"
    process = start(tiny_data, run)
    wait_for_step(run, 6, process)
    for each in processes_of(run):
        os.kill(each, signal.SIGKILL)
    process.wait()
    assert open_checkpoint(run).step in (4, 8)
    again = start(tiny_data, run)
    printed = again.communicate()[0]
    assert again.returncode == 0, printed
    assert "resumed   from step" in printed
    assert losses(run) == losses(whole[0])
    one, other = open_checkpoint(run), open_checkpoint(whole[0])
    for name in one.parameters:
        for state in ("weight", "exp_avg", "exp_avg_sq"):
            assert one.tensor(name, state).equal(other.tensor(name, state)), (name, state)


def test_ctrl_c_saves_and_says_how_to_go_on(
    tiny_data: Path, tmp_path: Path, start: Start, whole: tuple[Path, str]
) -> None:
    run = tmp_path / "stopped"
    process = start(tiny_data, run)
    wait_for_step(run, 2, process)
    process.send_signal(signal.SIGINT)
    printed = process.communicate()[0]
    assert process.returncode == 75, printed
    step = open_checkpoint(run).step
    assert step == max(losses(run))
    config = tmp_path / f"{run.name}.yaml"
    *_, notice, last = [line for line in printed.splitlines() if "stop" in line]
    assert notice == "stopping after this step and saving (Ctrl-C again to kill)"
    assert last == f"stopped; everything until step {step} is saved; to resume: bertscale pretrain {config}"
    assert f"stopped after step {step} of 12 steps" in (run / "logs/attempt-001/rank-0.log").read_text()
    again = start(tiny_data, run)
    assert again.wait() == 0
    assert losses(run) == losses(whole[0])


def stopped_while_it_looks(words: list[str], step: int) -> tuple[int, str]:
    """`bertscale WORDS` as a rank, of which the second is told to stop in the evaluation after `step`."""

    def beat(done: int) -> None:
        if done == step and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)

    with mock.patch("bertscale.pretrain.heldout.beat", beat):
        return _command(words)


@pytest.mark.parametrize("step", [6, 12])
def test_a_stop_during_an_evaluation_saves_at_once_and_looks_again_later(
    step: int, tiny_data: Path, tmp_path: Path, train: Train, whole: tuple[Path, str]
) -> None:
    run = tmp_path / "stopped"
    words = ["pretrain", str(write_config(tmp_path, tiny_data, run))]
    found = run_ranks(__file__, "stopped_while_it_looks", world=2, words=words, step=step)
    assert [code for code, _ in found] == [75, 75], found
    assert open_checkpoint(run).step == step
    assert not (run / "result.json").exists()
    code, printed = train(tiny_data, run)
    assert code == 0, printed
    figures = [
        {
            entry["step"]: entry["heldout/mlm_loss"]
            for entry in read_metrics(folder)
            if "heldout/mlm_loss" in entry
        }
        for folder in (run, whole[0])
    ]
    assert figures[0] == figures[1]
    assert losses(run) == losses(whole[0])
    assert json.loads((run / "result.json").read_text())["last_loss"] == losses(run)[12][0]
    one, other = open_checkpoint(run), open_checkpoint(whole[0])
    assert all(one.tensor(name).equal(other.tensor(name)) for name in one.parameters)
    code, printed = train(tiny_data, run)
    assert "already pretrained" in printed


def test_the_first_half_of_a_schedule_is_the_first_half_of_the_whole_run(
    tiny_data: Path, tmp_path: Path, train: Train, whole: tuple[Path, str]
) -> None:
    run = tmp_path / "half"
    code, printed = train(tiny_data, run, "train.steps=6", "train.schedule_steps=12")
    assert code == 0, printed
    assert losses(run) == {step: figures for step, figures in losses(whole[0]).items() if step <= 6}
    assert train(tiny_data, run)[0] == 0  # to the end of the schedule
    assert losses(run) == losses(whole[0])


def test_a_finished_run_is_not_run_again(tiny_data: Path, train: Train, whole: tuple[Path, str]) -> None:
    before = (whole[0] / "metrics.jsonl").read_bytes()
    code, printed = train(tiny_data, whole[0])
    assert code == 0
    assert "already pretrained" in printed
    assert (whole[0] / "metrics.jsonl").read_bytes() == before


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_is_used(
    tiny_data: Path, tmp_path: Path, train: Train, whole: tuple[Path, str]
) -> None:
    import shutil

    run = Path(shutil.copytree(whole[0], tmp_path / "damaged"))
    shard = checkpoints(run)[-1] / "shard-t01-d00.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    code, printed = train(tiny_data, run)
    assert code == 0, printed
    assert "shard-t01-d00.safetensors is damaged: its digest differs" in printed
    assert "resumed   from step 8 of 12" in printed
    assert losses(run) == losses(whole[0])


def test_a_run_does_not_go_on_with_other_settings_or_data(
    tiny_data: Path, start: Start, whole: tuple[Path, str]
) -> None:
    process = start(tiny_data, whole[0], "train.steps=14", "train.seed=5")
    printed = process.communicate()[0]
    assert process.returncode == 2
    assert "train.seed=5, but" in printed
    assert "Traceback" not in printed


def test_packed_samples_train_without_pairs(tiny_data: Path, tmp_path: Path, train: Train) -> None:
    run = tmp_path / "packed"
    code, printed = train(tiny_data, run, "samples.kind=packed", "train.steps=6", "train.eval_every=6")
    assert code == 0, printed
    figures = losses(run)
    assert sorted(figures) == list(range(1, 7))
    assert figures[6][0] < figures[1][0]
    assert "held-out MLM loss" in printed
    assert "packed samples of at most 48 tokens" in printed
    written = (run / "metrics.jsonl").read_text() + (run / "result.json").read_text() + printed
    assert "nsp" not in written.lower()
    entry = read_metrics(run)[-1]
    assert entry["heldout/loss"] == entry["heldout/mlm_loss"]
    model = open_checkpoint(run)
    assert not model.tensor("seq_relationship.weight", "exp_avg").any()


def test_a_mixture_that_grows_longer_goes_on_as_if_never_stopped(
    tiny_data: Path, tmp_path: Path, train: Train
) -> None:
    import shutil

    other = Path(shutil.copytree(tiny_data, tmp_path / "other"))
    change_manifest(other, lambda manifest: manifest["settings"].update(note="as if of other text"))
    changes: dict[str, Any] = {
        "parallel": {"tensor": 1, "ranks": 2},
        "samples": {"max_length": 48, "kind": "sop", "warmup": [[5, 16]]},
        "train": {**TRAIN, "steps": 10, "schedule_steps": 10, "batch_warmup": [[100, 4]]},
    }
    mixed = f"data=[{{path: {tiny_data}, weight: 3}}, {other}]"
    whole, stopped = tmp_path / "unstopped", tmp_path / "stopped"
    code, printed = train(tiny_data, whole, mixed, **changes)
    assert code == 0, printed
    assert "before that, 5 steps of at most 16 tokens" in printed
    assert "4 samples a step until 100 tokens are done" in printed
    # Samples of 5 to 16 tokens, so two to five steps of 4 make 100, and the rest has 8.
    assert open_checkpoint(whole).samples_consumed in range(10 * 8 - 5 * 4, 10 * 8 - 2 * 4 + 1)
    assert f"{other}, 25.0% of the samples" in printed
    assert "SOP accuracy" in printed
    entries = [entry for entry in read_metrics(whole) if "train/loss" in entry]
    assert all("train/sop_accuracy" in entry and "train/nsp_loss" not in entry for entry in entries)
    assert entries[-1][f"data/epochs/{tiny_data}"] > entries[-1][f"data/epochs/{other}"] > 0

    for overrides in (["train.steps=4"], []):
        code, printed = train(tiny_data, stopped, mixed, *overrides, **changes)
        assert code == 0, printed
    assert losses(stopped) == losses(whole)
    code, printed = train(tiny_data, stopped, mixed.replace("weight: 3", "weight: 2"), **changes)
    assert code == 2
    assert "is not the data that" in printed


@pytest.mark.parametrize("parallel", [{"tensor": 2, "zero_stage": 3}, {"tensor": 1, "ranks": 2}])
def test_a_budget_of_tokens_gives_the_losses_of_equal_batches(
    tiny_data: Path, tmp_path: Path, train: Train, whole: tuple[Path, str], parallel: dict[str, Any]
) -> None:
    run = tmp_path / "budget"
    code, printed = train(tiny_data, run, "train.micro_tokens=90", parallel=parallel)
    assert code == 0, printed
    found, expected = losses(run), losses(whole[0])
    assert sorted(found) == sorted(expected)
    for step in found:
        assert found[step] == pytest.approx(expected[step], rel=1e-3), step


# ----------------------------------------------------------------------------- a terminal that closes


def on_terminal(data: Path, run: Path, steps: int, ignores: bool) -> subprocess.Popen[bytes]:
    """Starts a run on a terminal and closes that when a few steps are done; `ignores`: as under nohup."""
    config = run.with_suffix(".yaml")
    train = {**TRAIN, "steps": steps, "save_every": 10_000, "eval_every": 10_000}
    values = pretrain_config(data, run, parallel={"tensor": 1, "ranks": 2}, train=train)
    config.write_text(json.dumps(values.model_dump()))
    screen, terminal = os.openpty()

    def take_terminal() -> None:
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        # Set in both cases: these tests may themselves run under nohup.
        signal.signal(signal.SIGHUP, signal.SIG_IGN if ignores else signal.SIG_DFL)

    process = subprocess.Popen(
        [sys.executable, "-m", "bertscale", "pretrain", str(config)],
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        start_new_session=True,
        preexec_fn=take_terminal,
    )
    os.close(terminal)
    seen = b""
    while max(losses(run), default=0) < 5:
        assert process.poll() is None, seen.decode()
        if select.select([screen], [], [], 0.02)[0]:
            seen += os.read(screen, 2**16)
    os.close(screen)
    return process


def test_a_closed_terminal_stops_a_run_like_ctrl_c(tiny_data: Path, tmp_path: Path) -> None:
    run = tmp_path / "hangup"
    assert on_terminal(tiny_data, run, steps=10_000, ignores=False).wait(timeout=120) == 75
    (saved,) = checkpoints(run)
    assert 5 <= open_checkpoint(saved).step < 10_000
    events = read_events(run / "logs/events.jsonl")
    assert [event["name"] for event in events if event["event"] == "signal"] == ["SIGHUP"]
    assert not processes_of(run)


def test_under_nohup_a_run_trains_on(tiny_data: Path, tmp_path: Path) -> None:
    run = tmp_path / "nohup"
    assert on_terminal(tiny_data, run, steps=300, ignores=True).wait(timeout=120) == 0
    assert open_checkpoint(run).step == 300
