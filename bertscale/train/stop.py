"""How a run ends early: by a signal, by steps that learn nothing, by a second job in its folder."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType

from bertscale.config import UserError
from bertscale.files import HeldError, alone
from bertscale.run_folder import LOCK
from bertscale.train.metrics import LossAccumulator
from bertscale.train.parallel import Ranks

UNEVALUATED = "unevaluated"  # in a checkpoint's table: a signal has cut short the evaluation after its step
MOST_SKIPPED = 10  # steps in a row: with so many gradients that are not finite the run ends


class StopSignal:
    """Set by SIGTERM, SIGINT or SIGUSR1; the ranks agree on it at the next step."""

    def __init__(self) -> None:
        self.asked = False
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._ask)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True


class CutShortError(Exception):
    """A signal came during an evaluation, which is to be made again when the run is resumed."""


def heed(stop: StopSignal | None, ranks: Ranks) -> None:
    """Raises CutShortError on all ranks where one of them was told to stop. All ranks must call."""
    if stop is not None and ranks.sum(float(stop.asked))[0]:
        raise CutShortError


@contextmanager
def only_one(run: Path, ranks: Ranks) -> Iterator[None]:
    """Makes the run folder and keeps a second job from training in it at the same time.

    A Slurm job takes over the lock of an earlier attempt of its own that still holds it on a node that was
    lost: that one can make no step, since a step needs all ranks. Raises UserError where another job trains.
    """
    run.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        if ranks.rank == 0:
            job = os.environ.get("SLURM_JOB_ID", "")
            ours = lambda holder: bool(job) and holder == job and ranks.world > 1  # noqa: E731
            try:
                stack.enter_context(alone(run / LOCK, job, ours))
            except HeldError as error:
                message = f"another job is training in {run}; stop it or choose another run folder"
                raise UserError(message) from error
        yield


def skipped(losses: LossAccumulator, done: int, saved: int, sound: int) -> str:
    """The line to print at step `done` about the steps that were skipped since the last log point.

    `saved` and `sound` are the steps of the newest checkpoint, and of the newest before this row of skipped
    steps. Raises UserError where they have been `MOST_SKIPPED` in a row, or all that the run has had.
    """
    if losses.in_a_row >= min(MOST_SKIPPED, done):
        remedy = (
            f"resume from the checkpoint of step {sound}" if sound else "nothing is saved before: start again"
        )
        if saved > sound:  # a resume takes the newest
            remedy = f"delete the checkpoints after that of step {sound}, then {remedy}"
        times = f", {losses.in_a_row} times in a row" if losses.in_a_row > 1 else ""
        raise UserError(
            f"step {done}: the gradient was not finite{times}; {remedy} with a lower optimizer.learning_rate"
        )
    steps = "a step" if losses.newly_skipped == 1 else f"{losses.newly_skipped:,} steps"
    return f"step {done}: skipped {steps} whose gradient was not finite ({losses.skipped:,} in all)"
