"""Fine-tunings that are disturbed: stopped, killed, without room on the disk, with damaged checkpoints.

Each says in one line what happened and goes on by the same command to the weights of one that nothing
disturbed, bit for bit.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from dist import _command, run_command, run_ranks
from safetensors.torch import load_file
from test_finetune import configure, rows, world, write_rows  # noqa: F401  (a fixture)

from bertscale.run_folder import TABLE, checkpoints, newest_step, read_events, read_metrics
from launcher import runs
from launcher.status import control, state

CHANGES = ["train.epochs=9", "train.eval_every=5", "train.save_every=4", "train.log_every=1"]
STEPS = 54


class Desk:
    """Starts fine-tunings of one setting in outputs of one folder."""

    def __init__(self, folder: Path, world: Path) -> None:  # noqa: F811
        self.folder, self.world = folder, world

    def command(self, output: Path, *changes: str) -> list[str]:
        settings = [*CHANGES, f"data.dev={self.world}/test.jsonl", *changes]
        values = configure(self.world, output, *settings).model_dump(mode="json")
        config = self.folder / f"{output.name}.yaml"
        config.write_text(json.dumps(values))
        return [sys.executable, "-m", "bertscale", "finetune", str(config)]

    def start(self, output: Path, *changes: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.command(output, *changes),
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, output: Path, *changes: str) -> subprocess.CompletedProcess[str]:
        process = self.start(output, *changes)
        said = process.communicate()
        return subprocess.CompletedProcess(process.args, process.returncode, *said)

    def through(self, output: Path, *changes: str, ranks: int = 1) -> tuple[int, str]:
        """The same without a supervisor, which has no part in what happens inside a rank: its exit code and
        what it says. Its processes need not start anew."""
        return run_command(*self.command(output, *changes)[3:], world=ranks)


@pytest.fixture
def desk(tmp_path: Path, world: Path) -> Desk:  # noqa: F811
    return Desk(tmp_path, world)


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory, world: Path) -> Path:  # noqa: F811
    """The output of the fine-tuning that nothing disturbs."""
    folder = tmp_path_factory.mktemp("calm")
    code, said = Desk(folder, world).through(folder / "calm")
    assert code == 0, said
    return folder / "calm"


def resize(disk: Path, size: int | str) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", str(disk)], check=True)


def used(folder: Path) -> int:
    return sum(-(-path.stat().st_size // 4096) * 4096 for path in folder.rglob("*") if path.is_file())


def until(process: subprocess.Popen[str], condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)


def rank_process(output: Path, rank: int) -> int:
    """The process of one rank of a fine-tuning."""
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
            variables = (entry / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if f"{output}.yaml".encode() in words and f"RANK={rank}".encode() in variables:
            return int(entry.name)
    raise AssertionError(f"no process of rank {rank}")


def one_line(stderr: str) -> str:
    """The line of the mistake; there is no traceback and no second one."""
    assert "Traceback" not in stderr, stderr
    (line,) = [text for text in stderr.splitlines() if "error:" in text]
    return line


def same(output: Path, other: Path) -> None:
    one, two = (load_file(folder / "model" / "model.safetensors") for folder in (output, other))
    assert all(torch.equal(one[name], two[name]) for name in two)
    for name in ("predictions-dev.jsonl", "predictions-test.jsonl"):
        assert (output / name).read_bytes() == (other / name).read_bytes()


def nothing_half_written(output: Path) -> None:
    assert not [path for path in output.rglob("*") if "partial" in path.name or ".tmp-" in path.name]


# ---------------------------------------------------------------------------------- stopped and killed


def test_ctrl_c_saves_and_says_how_to_go_on(desk: Desk, calm: Path, tmp_path: Path) -> None:
    output = tmp_path / "output"
    process = desk.start(output)
    until(process, lambda: checkpoints(output))
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate()
    assert process.returncode == 75, stderr
    (newest,) = checkpoints(output)
    step = int(newest.name.removeprefix("step-"))
    assert 4 <= step < STEPS
    assert f"stopped; everything until step {step} is saved; to resume: bertscale finetune" in stderr
    nothing_half_written(output)

    place = runs.find(str(output))
    facts = runs.look(place)
    assert (facts.stage, facts.step, facts.steps, facts.done) == ("finetune", step, STEPS, False)
    judged = state.judge(place, facts, [], None, time.time() + 1000)
    assert judged.word == "stopped"
    assert judged.next == control.local_command(place) == f"bertscale finetune {output}/config.yaml"

    again = subprocess.run(
        [sys.executable, "-m", "bertscale", "finetune", str(output / "config.yaml")],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert again.returncode == 0, again.stderr
    same(output, calm)
    facts = runs.look(runs.find(str(output)))
    assert (facts.step, facts.steps, facts.done) == (STEPS, STEPS, True)
    assert state.judge(place, facts, [], None, time.time()).word == "done"


def stopped_while_it_looks(words: list[str], step: int) -> tuple[int, str]:
    """`bertscale WORDS`, told to stop in the evaluation after `step`."""
    from bertscale.finetune import evaluate

    real = evaluate.evaluate

    def stopped(*arguments: Any) -> Any:
        if arguments[2] == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*arguments)

    with mock.patch("bertscale.finetune.loop.evaluate", stopped):
        return _command(words)


@pytest.mark.parametrize("step", [10, STEPS])
def test_a_stop_during_an_evaluation(step: int, desk: Desk, calm: Path, tmp_path: Path) -> None:
    output = tmp_path / "output"
    words = desk.command(output)[3:]
    [(code, said)] = run_ranks(__file__, "stopped_while_it_looks", world=1, words=words, step=step)
    assert code == 75, said
    assert newest_step(output) == step
    code, said = desk.through(output)
    assert code == 0, said
    same(output, calm)
    one, other = (
        [(entry["step"], entry["dev/loss"]) for entry in read_metrics(folder) if "dev/loss" in entry]
        for folder in (output, calm)
    )
    assert one == other


def test_a_second_ctrl_c_kills_it(desk: Desk, calm: Path, tmp_path: Path) -> None:
    output = tmp_path / "output"
    process = desk.start(output)
    until(process, lambda: checkpoints(output))
    os.kill(rank_process(output, 0), signal.SIGSTOP)  # it will not save
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate()
    assert process.returncode == 130, stderr
    assert "killed; everything until step " in stderr
    assert "to resume: bertscale finetune" in stderr
    assert desk.through(output)[0] == 0
    same(output, calm)


def test_one_of_two_ranks_is_killed(desk: Desk, tmp_path: Path) -> None:
    """The supervisor starts both again, from the newest checkpoint; two ranks, tensor-parallel."""
    topology = ["parallel.ranks=2", "parallel.tensor=2"]
    output, whole = tmp_path / "output", tmp_path / "whole"
    assert desk.through(whole, *topology, ranks=2)[0] == 0
    process = desk.start(output, *topology)
    until(process, lambda: len(checkpoints(output)) == 1)
    os.kill(rank_process(output, 1), signal.SIGKILL)
    _, stderr = process.communicate()
    assert process.returncode == 0, stderr
    kinds = [event["event"] for event in read_events(output / "logs/events.jsonl")]
    assert "relaunched" in kinds
    assert kinds[-1] == "done"
    same(output, whole)


def test_what_a_killed_run_has_left_is_removed(desk: Desk, calm: Path, tmp_path: Path) -> None:
    output = tmp_path / "output"
    for name in ("checkpoints/.step-0000099.partial", "best/.seed-0-step-0000005.partial"):
        (output / name).mkdir(parents=True)
    code = "import sys, os, signal; from pathlib import Path; from bertscale.files import whole_folder\n"
    code += "with whole_folder(Path(sys.argv[1])): os.kill(os.getpid(), signal.SIGKILL)"
    subprocess.run([sys.executable, "-c", code, str(output / "model")], check=False)
    for name in ("config.yaml", "result.json", "predictions-dev.jsonl", "runs/seed-0.json"):
        (output / name).parent.mkdir(exist_ok=True)
        (output / f"{name}.tmp-17").write_text("half")
    assert desk.through(output)[0] == 0
    nothing_half_written(output)
    same(output, calm)


# -------------------------------------------------------------------------------- damaged checkpoints


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory, world: Path) -> Path:  # noqa: F811
    """An output with the checkpoints of steps 8 and 12, or later ones, and the best weights of both."""
    folder = tmp_path_factory.mktemp("killed")
    desk, output = Desk(folder, world), folder / "output"
    process = desk.start(output, "train.keep_checkpoints=2")
    until(process, lambda: len(checkpoints(output)) == 2 and checkpoints(output)[0].name >= "step-0000008")
    process.kill()
    process.wait()
    while runs.training_process(output):  # the ranks die with it
        time.sleep(0.01)
    return output


@pytest.fixture
def stopped(killed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(killed, tmp_path / "output"))


def damage(folder: Path) -> None:
    path = next(folder.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")


def test_a_damaged_checkpoint_is_passed_over(desk: Desk, calm: Path, stopped: Path) -> None:
    newest = checkpoints(stopped)[-1]
    damage(newest)
    code, said = desk.through(stopped, "train.keep_checkpoints=2")
    assert code == 0, said
    assert f"{newest.name}/" in said
    assert "is damaged: its digest differs from" in said
    assert "(trying the one before it)" in said
    assert "begins again" not in said
    same(stopped, calm)


@pytest.mark.parametrize("what", ["checkpoints", "tables", "best weights"])
def test_where_all_are_damaged_the_run_begins_again(desk: Desk, calm: Path, stopped: Path, what: str) -> None:
    """No dead end: of a fine-tuning one checkpoint is kept, which may be the damaged one."""
    for folder in (stopped / "best").iterdir() if what == "best weights" else checkpoints(stopped):
        if what == "tables":
            (folder / TABLE).write_text("{")
        else:
            damage(folder)
    code, said = desk.through(stopped)
    assert code == 0, said
    assert "no checkpoint of seed-0 is whole: it begins again" in said
    same(stopped, calm)
    assert [entry["step"] for entry in read_metrics(stopped) if "train/loss" in entry] == [*range(1, 55)]


# ------------------------------------------------------------------------------------------- the disk


def test_a_full_disk(desk: Desk, calm: Path, disk: Path) -> None:
    """While a checkpoint, the best weights, the model or the predictions are written: one line each."""
    output = disk / "output"
    process = desk.start(output)
    until(process, lambda: checkpoints(output))
    process.send_signal(signal.SIGINT)
    assert process.wait() == 75
    (saved,) = checkpoints(output)
    sizes = (used(output) + 8192, used(output) + used(saved) // 2)
    for size in sizes:
        resize(disk, size)
        refused = desk.run(output)
        assert refused.returncode == 2, refused.stderr
        assert "No space left on device" in one_line(refused.stderr)
        nothing_half_written(output)
        (kept,) = checkpoints(output)
        assert kept == saved
    resize(disk, "100M")
    assert desk.through(output)[0] == 0
    same(output, calm)


def test_a_disk_that_is_full_at_the_end(desk: Desk, disk: Path) -> None:
    """While the best weights, the predictions or the model are written: the line names the file, nothing half
    written is left, and the same command makes it all where there is room."""
    test = write_rows(desk.folder / "many.jsonl", rows(600, seed=2))
    changes = ["train.epochs=2", "train.eval_every=12", "train.save_every=null", f"data.test={test}"]
    output = disk / "output"
    assert desk.through(output, *changes)[0] == 0
    whole = {path.name: path.read_bytes() for path in files_of(output)}
    model, predictions = used(output / "model"), len(whole["predictions-test.jsonl"])
    best = len(whole["model.safetensors"]) + len(whole["tokenizer.model"])
    rest = used(output) - model - predictions  # settings, curves, logs
    sizes = {
        "best/seed-0-step-0000012": rest + best // 2,
        "predictions-test.jsonl": rest + best + predictions // 2,
        "model": rest + best + predictions + model // 2,
    }
    for name, size in sizes.items():
        shutil.rmtree(output)
        resize(disk, size)
        refused = desk.run(output, *changes)
        assert refused.returncode == 2, (name, refused.stderr)
        line = one_line(refused.stderr)
        assert "No space left on device" in line
        assert f"{output}/{name}" in line
        assert not (output / "result.json").exists()
        nothing_half_written(output)
    resize(disk, "100M")
    assert desk.through(output, *changes)[0] == 0
    assert {path.name: path.read_bytes() for path in files_of(output)} == whole


def files_of(output: Path) -> list[Path]:
    """The model's and the predictions, which are the same whenever they are made."""
    return [*(output / "model").iterdir(), *output.glob("predictions-*.jsonl")]


def test_an_output_that_cannot_be_written(desk: Desk, disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    refused = desk.run(disk / "output")
    assert refused.returncode == 2
    assert "Read-only file system" in one_line(refused.stderr)


def test_two_in_one_output(desk: Desk, calm: Path, tmp_path: Path) -> None:
    output = tmp_path / "output"
    process = desk.start(output)
    until(process, lambda: checkpoints(output))
    rank = rank_process(output, 0)
    os.kill(rank, signal.SIGSTOP)  # or it could have ended when the second one begins
    second = desk.run(output)
    os.kill(rank, signal.SIGCONT)
    assert second.returncode == 2
    assert f"another job is training in {output}" in one_line(second.stderr)
    assert process.wait() == 0
    same(output, calm)
