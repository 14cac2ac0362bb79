"""Small fine-tunings of a run's checkpoints, beside the training: what is the encoder worth by now?

    train: {tasks: [configs/finetune/sst2.yaml], tasks_every: 5000}

Each is a `bertscale finetune` of low priority on the machine of the first rank, one at a time. Its figure of
dev becomes tasks/NAME/FIGURE at the checkpoint's step. One that fails costs its own figure alone.

RUN/tasks/step-0005000/sst2/       the output of the fine-tuning, without its model
RUN/tasks/step-0005000/sst2.log    what it has said
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from bertscale.config import PretrainConfig, UserError, load_tasks
from bertscale.config.table import read_object
from bertscale.errors import INTERRUPTED, STOPPED_AND_SAVED
from bertscale.progress import Progress
from bertscale.run_folder import (
    RESULT,
    TABLE,
    TASKS,
    TENSORBOARD,
    checkpoint_folder,
    checkpoint_step,
    checkpoints,
    newest_step,
    read_metrics,
)
from bertscale.train.checkpoint import open_checkpoint
from bertscale.train.heartbeat import beat
from bertscale.train.metrics import MetricsWriter
from bertscale.train.parallel import Ranks
from bertscale.train.stop import StopSignal, only_one

LOOK_SECONDS = 0.2  # between two looks at the last ones, when the training is over
STOP_SECONDS = 15.0  # for a fine-tuning to save and end
LOG_BYTES = 4096  # of a log's end, in which the reason of a failure is looked for
# What a fine-tuning leaves that nobody needs, and that would fill the disk: figures and predictions stay.
LARGE = ("model", TENSORBOARD)
# It has the machine's time that is left over: a step may take long, which is no reason to end it.
SETTINGS = (
    "train.compare_random=false",
    "parallel={ranks: 1}",
    "launch={start_seconds: 1.0e+5, hang_seconds: 1.0e+5, restarts: 0}",
)

Begin = Callable[[list[str], Path, int], "subprocess.Popen[bytes]"]  # launcher.child.start_child
Say = Callable[[str], None]


class Tuning(NamedTuple):
    """The fine-tuning of the checkpoint of `step` for the task `name`."""

    step: int
    name: str


class Tasks:
    """The fine-tunings of a run: those that wait, and the one that runs; on the first rank alone.

    Those of checkpoints that are there and have no figures wait from the start. `writer` takes the figures;
    without it one is made, where the training is over. `alone`: no training runs beside them. `leave`: the
    last ones are not awaited, as another start makes them.
    """

    def __init__(
        self,
        config: PretrainConfig,
        ranks: Ranks,
        begin: Begin | None,
        writer: MetricsWriter | None = None,
        *,
        alone: bool = False,
        leave: bool = False,
    ) -> None:
        self.alone, self.leave = alone, leave
        self.run, self.ranks, self.writer, self.begin = Path(config.run), ranks, writer, begin
        self.every = config.train.tasks_every or config.train.save_every
        self.configs = load_tasks(config) if begin and ranks.rank == 0 else {}
        self.files = {Path(file).stem: file for file in config.train.tasks}
        self.on_gpu = ranks.device.type == "cuda"
        self.waiting: list[Tuning] = []
        self.running: Tuning | None = None
        self.process: subprocess.Popen[bytes] | None = None
        self.known = _known(self.run) if self.configs else set()
        for folder in checkpoints(self.run) if self.configs else ():
            self.add(checkpoint_step(folder) or 0)

    @property
    def read(self) -> set[int]:
        """The steps whose checkpoint is read."""
        return {self.running.step} if self.running else set()

    def add(self, step: int, last: bool = False, say: Say = print) -> None:
        """Queues the tasks of a checkpoint that have no figures yet, if it is the turn of its step, or if it
        is the last one of the run."""
        wanted = [Tuning(step, name) for name in self.configs] if last or step % self.every == 0 else []
        new = [each for each in wanted if each not in self.known and each not in self.waiting]
        if new and self.running:
            others = f"; {len(self.waiting)} more wait" if self.waiting else ""
            say(f"step {step}: the task {self.running.name} of step {self.running.step} is at work{others}")
        self.waiting += new

    def look(self, say: Say) -> None:
        """Takes what the running one has found, if it has ended, and begins the next."""
        if self.process is not None and (code := self.process.poll()) is not None:
            assert self.running is not None
            self._take(self.running, code, say)
            self.running = self.process = None
        while self.process is None and self.waiting:
            tuning = self.waiting.pop(0)
            if (checkpoint_folder(self.run, tuning.step) / TABLE).is_file():
                self._begin(tuning, say)
            else:
                say(
                    f"step {tuning.step}: no figure of the task {tuning.name}: the checkpoint was deleted "
                    "before its turn; raise train.tasks_every or train.keep_checkpoints"
                )

    def finish(self, stop: StopSignal) -> bool:
        """Awaits the last ones, with all ranks: Slurm ends those that outlive another one. False: a signal
        came first."""
        if not self.files:
            return True
        if self.leave:
            self.ask_to_stop()
            self.end()
            return True
        step = newest_step(self.run)
        total = left = len(self.waiting) + bool(self.running)
        with Progress("tasks", total, "fine-tunings", hidden=not total) as progress:
            while True:
                self.look(progress.say)
                now = len(self.waiting) + bool(self.running)
                progress.advance(left - now, **({"at": _title(self.running)} if self.running else {}))
                left = now
                remaining, stopping = self.ranks.sum(float(left), float(stop.asked))
                if stopping or not remaining:
                    break
                beat(step)
                time.sleep(LOOK_SECONDS)
        if stopping:
            self.ask_to_stop()
            self.end()
        return not stopping

    def ask_to_stop(self) -> None:
        """Asks the running one to save and end; it goes on at the next start."""
        if self.process is not None:
            self.process.send_signal(signal.SIGTERM)

    def end(self) -> None:
        """Waits for the one that was asked to stop, and kills it where that takes long."""
        if self.process is None:
            return
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(STOP_SECONDS)
        self.process.kill()
        self.process.wait()

    # --------------------------------------------------------------------------------------- its parts

    def _output(self, tuning: Tuning) -> Path:
        return self.run / TASKS / checkpoint_folder(self.run, tuning.step).name / tuning.name

    def _begin(self, tuning: Tuning, say: Say) -> None:
        assert self.begin is not None
        output, file = self._output(tuning), self.files[tuning.name]
        encoder = checkpoint_folder(self.run, tuning.step)
        # The GPUs are full of the training.
        device = ["device=cpu"] if self.on_gpu and self.configs[tuning.name].device == "auto" else []
        cores = len(os.sched_getaffinity(0))
        threads = cores if self.alone else max(1, cores // 2) if self.on_gpu else 1
        # JSON is YAML that nobody misreads.
        places = [f"encoder={json.dumps(str(encoder))}", f"output={json.dumps(str(output))}"]
        try:
            output.parent.mkdir(parents=True, exist_ok=True)
            self.process = self.begin(
                ["finetune", file, *places, *SETTINGS, *device],
                output.with_name(f"{output.name}.log"),
                threads,
            )
            self.running = tuning
        except OSError as error:
            say(f"step {tuning.step}: the task {tuning.name} cannot be started: {error.strerror or error}")

    def _take(self, tuning: Tuning, code: int, say: Say) -> None:
        """Takes the figure of one that has ended with `code`."""
        output = self._output(tuning)
        log = output.with_name(f"{output.name}.log")
        if code in (STOPPED_AND_SAVED, INTERRUPTED):
            say(f"step {tuning.step}: the task {tuning.name} was stopped; it goes on at the next start")
            return
        if code:
            say(f"step {tuning.step}: the task {tuning.name} failed: {_last_line(log, code)} ({log})")
            return
        try:
            result = read_object(output / RESULT, "")
            metric = result["metric"]
            value = float(result["pretrained"]["dev"][metric]["mean"])
        except (OSError, UserError, KeyError, TypeError, ValueError) as error:
            say(f"step {tuning.step}: the task {tuning.name} has left no figure: {error} ({log})")
            return
        if self.writer is None:
            self.writer = MetricsWriter(self.run, newest_step(self.run))
        self.writer.write(tuning.step, {f"{TASKS}/{tuning.name}/{metric}": value})
        self.known.add(tuning)
        say(f"step {tuning.step}: task {tuning.name}: dev {metric} {value:.4f}")
        for name in LARGE:
            shutil.rmtree(output / name, ignore_errors=True)


def only_tasks(config: PretrainConfig, begin: Begin) -> int:
    """Makes the figures that the checkpoints of a run lack, without training; returns 0, or STOPPED_AND_SAVED
    after a signal. Raises UserError where the run has no checkpoint, or is at work."""
    stop, ranks = StopSignal(), Ranks(0, 1, 1, torch.device("cpu"))
    newest = open_checkpoint(Path(config.run))
    config = config.model_copy(update={"model": newest.model})
    check_encoder(config)
    with only_one(Path(config.run), ranks):
        tasks = Tasks(config, ranks, begin, alone=True)
        tasks.add(newest.step, last=True)
        return 0 if tasks.finish(stop) else STOPPED_AND_SAVED


def check_encoder(config: PretrainConfig) -> None:
    """Raises UserError where a task does not fit the encoder, such as texts that are too long for it."""
    for task in load_tasks(config).values():
        try:
            task.check_encoder(config.model)
        except UserError as error:
            raise UserError(f"train.tasks: {error}") from error


def _known(run: Path) -> set[Tuning]:
    """Those whose figure is in the run's metrics."""
    return {
        Tuning(int(entry["step"]), key.split("/")[1])
        for entry in read_metrics(run)
        for key in entry
        if key.startswith(f"{TASKS}/")
    }


def _title(tuning: Tuning) -> str:
    return f"{tuning.name} of step {tuning.step}"


def _last_line(log: Path, code: int) -> str:
    """The last line that a fine-tuning has written, which tells its mistake or fault; else its exit code."""
    with contextlib.suppress(OSError), open(log, "rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - LOG_BYTES))
        lines = [line.strip() for line in file.read().decode(errors="replace").splitlines()]
        if said := [line for line in lines if line and not line.startswith("logs of all ranks")]:
            return said[-1].removeprefix("bertscale finetune: error: ")
    return f"exit code {code}"
