"""One run of a fine-tuning: the training loop, from a start or a checkpoint to the end of the budget."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import count as count_up
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bertscale.config import FinetuneConfig, UserError
from bertscale.data.batch_phases import FOREVER
from bertscale.errors import STOPPED_AND_SAVED
from bertscale.finetune.evaluate import HeldOut, evaluate
from bertscale.finetune.loader import Part, TaskLoader
from bertscale.finetune.start import Source, scale_of
from bertscale.model.heads import TaskBatch, TaskModel, task_loss
from bertscale.model.layers import Layers
from bertscale.progress import Progress, TimeBudget
from bertscale.run_folder import BEST, checkpoint_folder, checkpoints
from bertscale.tasks.task import Samples, Task
from bertscale.tokenizer import Tokenizer
from bertscale.train.checkpoint import Checkpoint, StateFragment, open_checkpoint, prune, save_checkpoint
from bertscale.train.device import peak_flops
from bertscale.train.engine import Engine
from bertscale.train.heartbeat import beat
from bertscale.train.metrics import LossAccumulator, MetricsWriter, Rate
from bertscale.train.parallel import Ranks
from bertscale.train.resume import open_sound
from bertscale.train.schedule import Clock, learning_rate
from bertscale.train.step import global_step
from bertscale.train.stop import UNEVALUATED, CutShortError, StopSignal, skipped

SAVE_SECONDS = 60.0  # between two checkpoints that nobody has asked for


class Stopped(Exception):  # noqa: N818  (no error: a person or Slurm has asked for it)
    """A signal has stopped the run, and what it has done is saved."""

    code = STOPPED_AND_SAVED


@dataclass(frozen=True)
class Run:
    """A run: its seed, whether it starts from the pretrained encoder or from random weights, its number."""

    seed: int
    start: str  # pretrained or random
    number: int
    begin: int  # steps of the runs before it; those of checkpoints and metrics are counted from there

    @property
    def name(self) -> str:
        return f"seed-{self.seed}" + ("-random" if self.start == "random" else "")


@dataclass
class Course:
    """What a run has found out so far, kept in its checkpoints."""

    best: float | None = None  # figure of dev
    best_step: int = 0  # of this run
    since_best: int = 0  # evaluations
    evaluations: list[dict[str, float]] = field(default_factory=list)  # step and figures of dev

    def out_of_patience(self, config: FinetuneConfig) -> bool:
        """Whether dev has not become better for as long as the run is to wait."""
        return self.since_best >= (config.train.patience or FOREVER)


@dataclass(frozen=True)
class Job:
    """Holds what all runs of a fine-tuning share."""

    config: FinetuneConfig
    source: Source
    tokenizer: Tokenizer
    task: Task[Any]
    train: Samples
    repeats: npt.NDArray[np.float64] | None
    dev: HeldOut | None
    test: HeldOut | None
    ranks: Ranks
    dtype: torch.dtype
    made_of: dict[str, str]
    class_weights: Tensor | None  # [C], on the CPU

    @property
    def output(self) -> Path:
        return Path(self.config.output)

    @property
    def metric(self) -> str:
        """Names the figure of dev that chooses the weights."""
        return self.config.train.metric or self.task.metric

    @cached_property
    def engine(self) -> Engine[FinetuneConfig]:
        """The engine, which all runs use one after another."""
        config, source = self.config, self.source
        head = source.head(config, self.task)
        sizes = source.sizes(config)

        def make_model(layers: Layers) -> TaskModel:
            return TaskModel(sizes, source.vocab_size, head, layers, config.train.activation_checkpointing)

        return Engine(
            config, sizes, source.vocab_size, self.ranks, self.dtype, make_model, scale_of(config, sizes)
        )

    def loader(self, seed: int) -> TaskLoader:
        """The loader of the training samples for a run."""
        train, ranks = self.config.train, self.ranks
        return TaskLoader(
            self.train,
            self.config.task,
            global_batch=train.global_batch,
            micro_tokens=train.micro_tokens,
            seed=seed,
            repeats=self.repeats,
            class_weights=self.class_weights,
            rank=ranks.data_rank,
            world=ranks.data,
        )


class Budget:
    """When a run ends, and the learning rate of each of its steps until then."""

    def __init__(self, config: FinetuneConfig, start: str, loader: TaskLoader) -> None:
        train, optimizer = config.train, config.optimizer
        highest = optimizer.learning_rate
        if start == "random" and optimizer.random_learning_rate is not None:
            highest = optimizer.random_learning_rate
        self.optimizer = optimizer.model_copy(update={"learning_rate": highest})
        self.seconds = None if train.hours is None else train.hours * 3600
        self.steps = train.steps
        if train.epochs is not None:
            self.steps = max(1, round(train.epochs * loader.epoch_steps))

    @property
    def text(self) -> str:
        return f"{self.steps} steps" if self.steps else f"{(self.seconds or 0) / 3600:g} hours"

    def learning_rate(self, step: int, elapsed: float) -> float:
        """The learning rate of `step`, which begins after `elapsed` seconds of training."""
        if self.steps is None:
            return learning_rate(elapsed, elapsed, self.seconds or 0.0, self.optimizer)
        return learning_rate(step, step + 1, self.steps, self.optimizer)

    def over(self, step: int, elapsed: float) -> bool:
        """Whether the budget is spent after `step` steps and `elapsed` seconds."""
        return elapsed >= (self.seconds or 0) if self.steps is None else step >= self.steps


def train_run(job: Job, run: Run, runs: int, stop: StopSignal) -> dict[str, Any]:
    """Trains one of `runs` runs to its end and evaluates the weights that dev has chosen, or the last ones.

    Those are then in the engine, and in the folder `best` of the output. Returns what is known of the run:
    steps, the best of them, seconds, figures of dev and test. Raises Stopped after a signal, UserError for
    what a user can correct.
    """
    config, ranks, engine, loader = job.config, job.ranks, job.engine, job.loader(run.seed)
    first, budget = ranks.rank == 0, Budget(config, run.start, loader)
    every = config.train.eval_every or loader.epoch_steps
    checkpoint = _resumable(job, run)
    course = Course()
    engine.start_from(job.source.first_values(job.task, run))
    if checkpoint is not None:
        engine.resume(checkpoint, run.begin)
        course = Course(**checkpoint.table["finetune"]["course"])
    start = done = saved = checkpoint.step - run.begin if checkpoint else 0
    stopped = False  # by a signal; all ranks must find the same
    cut = checkpoint is not None and bool(checkpoint.table["finetune"].get(UNEVALUATED))  # likewise
    _train_mode(engine)

    weights = None if job.class_weights is None else job.class_weights.to(ranks.device)
    peak = ranks.sum(peak_flops(ranks.device, job.dtype))[0]
    rate = Rate(engine.sizes.model_copy(update={"generator_size": None}), job.source.vocab_size, peak)
    losses = LossAccumulator(ranks.device, checkpoint.skipped_steps if checkpoint else 0, fields=1)
    spent = checkpoint.elapsed_seconds if checkpoint else 0.0
    clock = Clock(spent)
    saved_at = clock.elapsed()
    planned = run.begin + (runs - run.number) * budget.steps if budget.steps else None
    writer = MetricsWriter(job.output, run.begin + start, run.name, run.begin, planned) if first else None
    if writer:
        writer.introduce(config)
    last = False
    label = f"run {run.number + 1} of {runs}" if runs > 1 else "fine-tune"
    hours = TimeBudget(budget.seconds, clock.elapsed()) if budget.seconds else None
    with Progress(label, budget.steps, "steps", start=start, budget=hours, hidden=not first) as progress:
        if cut:
            try:
                progress.say(_look(job, run, course, start, stop, writer))
            except CutShortError:
                raise Stopped from None
            last, cut = course.out_of_patience(config), False
        for step in count_up(start) if not (last or budget.over(start, spent)) else ():
            parts = loader.step(step)
            # All that ranks must agree on, in one collective; the run's clock is the mean of their clocks.
            count, samples, tokens, stopping, asked, *times = ranks.sum_over_data(
                sum(part.divisor for part in parts),
                sum(len(part.samples) for part in parts),
                sum(len(part.batch.tokens) for part in parts),
                float(stop.asked),
                float(progress.wants_facts()),
                *clock.step(),
            )
            if stopping:
                stopped = True
                break
            now, after = (total / ranks.data for total in times)
            last = budget.over(step + 1, after)
            current_rate = budget.learning_rate(step, now)

            sums = global_step(
                engine,
                [part.batch for part in parts],
                _loss_of(config, weights, count),
                seed=run.seed,
                step=step,
                learning_rate=current_rate,
            )
            losses.add([*sums], (count, samples, tokens), engine.step_applied)
            _count(rate, parts)
            clock.stepped()
            done = step + 1
            beat(run.begin + done)

            facts: dict[str, str] = {}
            if done % config.train.log_every == 0 or done == start + 1 or last:
                totals, seen = losses.close()  # waits for the device
                if losses.newly_skipped:
                    progress.say(skipped(losses, done, saved, saved))
                figures = rate.close(ranks, warming_up=done == start + 1)
                if any(seen):
                    figures |= _figures(totals, seen, ranks, figures)
                    figures |= {"train/learning_rate": current_rate, "train/skipped_steps": losses.skipped}
                    if not losses.in_a_row:
                        figures["train/gradient_norm"] = engine.gradient_norm()
                    figures["data/epochs"] = loader.epoch(done)
                    facts = _brief(figures)
                    if writer:
                        writer.write(run.begin + done, figures)
            elif asked:  # it is time: for the screen alone, since what is kept is a function of steps
                totals, seen = losses.so_far()
                if any(seen):
                    speeds = rate.so_far(ranks)
                    facts = _brief(speeds | _figures(totals, seen, ranks, speeds))
            progress.advance(1, **facts)
            looked = done % every == 0 or last
            if looked and job.dev is not None:
                try:
                    progress.say(_look(job, run, course, done, stop, writer))
                except CutShortError:
                    stopped = cut = True
                    break
                last = last or course.out_of_patience(config)
                rate.restart()
            asked_to_save = config.train.save_every and done % config.train.save_every == 0
            due = ranks.broadcast(clock.elapsed() - saved_at >= SAVE_SECONDS) if looked else False
            if not last and (asked_to_save or (due and not config.train.save_every)):
                _save(job, run, done, course, clock.elapsed(), losses)
                saved, saved_at = done, clock.elapsed()
                rate.restart()
            if last:
                break

    if stopped:
        if saved < done:
            spent = (budget.seconds or 0.0) if last else 0.0
            _save(job, run, done, course, max(clock.elapsed(), spent), losses, cut=cut)
        if first:
            print(f"stopped after step {done} of {budget.text}", file=sys.stderr, flush=True)
        raise Stopped
    if job.dev is None:
        course.best_step = done
        _save_best(job, run, done)
    elif course.best_step != done:
        engine.load_weights(open_checkpoint(best_folder(job, run, course.best_step)))
    record = {
        "seed": run.seed,
        "start": run.start,
        "steps": done,
        "best_step": course.best_step,
        "seconds": round(clock.elapsed(), 1),
        **rate.overall(),
        "evaluations": course.evaluations,
    }
    if writer:
        writer.close()
    return record


# ------------------------------------------------------------------------------------------- its parts


def _loss_of(
    config: FinetuneConfig, weights: Tensor | None, count: float
) -> Callable[[Tensor, TaskBatch], tuple[Tensor, Tensor]]:
    def loss_of(logits: Tensor, batch: TaskBatch) -> tuple[Tensor, Tensor]:
        total = batch.weight * task_loss(
            config.task,
            logits,
            batch,
            class_weights=weights,
            label_smoothing=config.model.label_smoothing,
        )
        return total / (count or 1.0), total[None]

    return loss_of


def _train_mode(engine: Engine[FinetuneConfig]) -> None:
    """Switches dropout on, but not in layers that are not trained."""
    engine.model.train()
    for module in engine.model.modules():
        own = list(module.parameters())
        if own and not any(parameter.requires_grad for parameter in own):
            module.eval()


def _count(rate: Rate, parts: Sequence[Part]) -> None:
    for part in parts:
        if len(part.samples):
            rate.add(part.batch.lengths, 0)


def _figures(
    totals: Tensor, seen: Sequence[float], ranks: Ranks, speeds: dict[str, float]
) -> dict[str, float]:
    """The mean loss and the samples per second of the steps since the last log point."""
    (loss,) = ranks.sum_over_data(*totals.tolist())
    count, samples, tokens = seen
    per_second = speeds["speed/tokens_per_second"] * samples / (tokens or 1.0)
    return {"train/loss": loss / (count or 1.0), "speed/samples_per_second": per_second}


def _brief(figures: dict[str, float]) -> dict[str, str]:
    return {
        "loss": f"{figures['train/loss']:.3f}",
        "samples/s": f"{figures['speed/samples_per_second']:,.0f}",
    }


def _look(
    job: Job, run: Run, course: Course, done: int, stop: StopSignal, writer: MetricsWriter | None
) -> str:
    """Evaluates dev after step `done`, and keeps the weights if they are the best; the line that tells it.

    Raises CutShortError after a signal, before anything is noted.
    """
    assert job.dev is not None
    try:
        found = evaluate(job.engine, job.dev, run.begin + done, stop)
    finally:
        _train_mode(job.engine)
    _note(course, found.figures, done, job)
    if course.best_step == done:
        _save_best(job, run, done)
    if writer:
        writer.write(run.begin + done, {f"dev/{key}": v for key, v in found.figures.items()})
    return _dev_line(course, found.figures, done, job)


def _note(course: Course, figures: dict[str, float], done: int, job: Job) -> None:
    """Notes an evaluation: whether it is the best so far."""
    better_if_higher = [name for name in figures if name != "loss" and not name.endswith("threshold")]
    if job.metric not in better_if_higher:
        raise UserError(
            f"train.metric={job.metric} is no figure that is better if it is higher; there are "
            + ", ".join(better_if_higher)
        )
    figure = figures[job.metric]
    course.evaluations.append({"step": done, **figures})
    if course.best is None or figure > course.best:
        course.best, course.best_step, course.since_best = figure, done, 0
    else:
        course.since_best += 1


def _dev_line(course: Course, figures: dict[str, float], done: int, job: Job) -> str:
    metric = job.metric
    best = (
        "the best so far" if course.best_step == done else f"best {course.best:.4f}, step {course.best_step}"
    )
    return f"step {done}: dev {metric} {figures[metric]:.4f} ({best}), loss {figures['loss']:.4f}"


# ----------------------------------------------------------------------------------------- checkpoints


def best_folder(job: Job, run: Run, step: int) -> Path:
    """Where the weights of a run's best step are."""
    return job.output / BEST / f"{run.name}-step-{step:07d}"


def _resumable(job: Job, run: Run) -> Checkpoint | None:
    """The newest checkpoint of this run that is sound, as are its best weights; None: the run begins.

    Names each damaged one, and removes all that are newer than the one it returns: they would be taken for
    the newest again.
    """
    ranks, damaged, found = job.ranks, False, None
    folders = [Path(folder) for folder in ranks.broadcast([str(each) for each in checkpoints(job.output)])]
    while folders and found is None:
        failure = open_sound(folders[-1], ranks)
        if isinstance(failure, Checkpoint):
            table = failure.table["finetune"]
            if table["run"] != run.name:
                break
            found, best = failure, table["course"]["best_step"]
            if best:
                failure = open_sound(best_folder(job, run, best), ranks)
        if isinstance(failure, str):
            ranks.say(f"{failure} (trying the one before it)")
            damaged, found = True, None
            folders.pop()
    if found is None and damaged:
        ranks.say(f"no checkpoint of {run.name} is whole: it begins again")
    if ranks.rank == 0:
        for folder in checkpoints(job.output)[len(folders) if found else 0 :]:
            shutil.rmtree(folder)
    return found


def _table(job: Job, run: Run, done: int, elapsed: float, losses: LossAccumulator | None) -> dict[str, Any]:
    return {
        "step": run.begin + done,
        "samples_consumed": done * job.config.train.global_batch,
        "skipped_steps": losses.skipped if losses else 0,
        "elapsed_seconds": elapsed,
        "tokenizer_sha256": job.tokenizer.sha256,
        "data_digest": None,
        **job.engine.table(),
    }


def _save(
    job: Job,
    run: Run,
    done: int,
    course: Course,
    elapsed: float,
    losses: LossAccumulator,
    cut: bool = False,
) -> None:
    """Saves a checkpoint to resume from; then deletes older ones, and weights that are no longer the best."""
    losses.read()
    engine = job.engine
    table = _table(job, run, done, elapsed, losses)
    table["finetune"] = {"run": run.name, "made_of": job.made_of, "course": asdict(course)}
    if cut:
        table["finetune"][UNEVALUATED] = True
    beat(run.begin + done)
    folder = checkpoint_folder(job.output, run.begin + done)
    save_checkpoint(folder, engine.fragments_to_save(), table, job.tokenizer.path, job.ranks)
    beat(run.begin + done)
    if job.ranks.rank == 0:
        if not losses.in_a_row:
            prune(job.output, job.config.train.keep_checkpoints)
        kept = {course.best_step}
        for older in checkpoints(job.output):
            with suppress(UserError, KeyError):  # it is damaged
                kept.add(open_checkpoint(older).table["finetune"]["course"]["best_step"])
        forget_worse(job, run, kept)


def _save_best(job: Job, run: Run, done: int) -> None:
    """Saves the weights alone, as a checkpoint without moments."""
    weights = [
        StateFragment(fragment.name, fragment.start, {"weight": fragment.states["weight"]})
        for fragment in job.engine.fragments_to_save()
    ]
    table = {**_table(job, run, done, 0.0, None), "has_moments": False}
    save_checkpoint(best_folder(job, run, done), weights, table, job.tokenizer.path, job.ranks)


def forget_worse(job: Job, run: Run, best_steps: Collection[int]) -> None:
    """Deletes the weights of the run that are not those of `best_steps`, the best of its checkpoints."""
    keep = [best_folder(job, run, step) for step in best_steps]
    for folder in (job.output / BEST).glob(f"{run.name}-step-*"):
        if folder not in keep:
            shutil.rmtree(folder, ignore_errors=True)
