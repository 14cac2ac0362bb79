"""Token shards -> checkpoints: the training loop, one process of it for each rank.

bertscale pretrain configs/pretrain/quickstart.yaml            # starts the ranks of this machine
torchrun --nproc-per-node 2 -m bertscale pretrain CONFIG.yaml  # or is one rank of torchrun, srun, ...
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import yaml

from bertscale.config import PretrainConfig, with_model_of
from bertscale.data.batch_phases import FOREVER
from bertscale.data.batches import make_loader
from bertscale.data.loader import Loader
from bertscale.data.micro_batch import MicroBatch
from bertscale.data.mixture import data_digest
from bertscale.data.shards import Dataset, open_dataset
from bertscale.errors import STOPPED_AND_SAVED
from bertscale.files import write_bytes, write_json
from bertscale.pretrain.banner import banner, epochs
from bertscale.pretrain.fills import Sentence, encode_sentences, fill, show_fills
from bertscale.pretrain.heldout import evaluate, heldout_loaders, in_words, unmasked_samples
from bertscale.pretrain.init import Start, check_source, open_source, resumed, start_from
from bertscale.pretrain.tasks import Begin, Tasks, check_encoder
from bertscale.progress import Progress, TimeBudget, fold
from bertscale.run_folder import CONFIG, FILLS, RESULT, check_run_folder, checkpoint_folder
from bertscale.tokenizer import Tokenizer, load_tokenizer
from bertscale.train.checkpoint import prune, save_checkpoint
from bertscale.train.device import choose_precision, device_line, local_device, peak_flops
from bertscale.train.engine import Engine, pretraining_engine
from bertscale.train.heartbeat import beat
from bertscale.train.metrics import LossAccumulator, MetricsWriter, Rate, brief, result
from bertscale.train.objectives import Counts, mean_losses
from bertscale.train.parallel import Ranks, start_ranks, stop_ranks
from bertscale.train.resume import changed_settings, check_same_run, newest_sound, remove_leftovers
from bertscale.train.schedule import Clock, TrainingSchedule
from bertscale.train.step import train_step
from bertscale.train.stop import UNEVALUATED, CutShortError, StopSignal, only_one, skipped


def pretrain(config: PretrainConfig, begin: Begin | None = None, *, leave: bool = False) -> int:
    """Runs this rank of the job to its end; returns 0, or STOPPED_AND_SAVED when a signal stopped it.

    `begin` starts a command beside this process: without it there are no tasks; `leave`: the last of them are
    not awaited. Raises UserError for what the user can correct: data, config and checkpoint that do not fit
    together, a full disk.
    """
    check_run_folder(Path(config.run))
    stop = StopSignal()
    device = local_device(config.device)
    ranks = start_ranks(config.parallel.tensor, device)
    ranks.say(device_line(device, config.device, ranks.world))
    try:
        with only_one(Path(config.run), ranks):
            return train(config, ranks, stop, begin, leave=leave)
    finally:
        stop_ranks()


def train(
    config: PretrainConfig,
    ranks: Ranks,
    stop: StopSignal,
    begin: Begin | None = None,
    *,
    leave: bool = False,
) -> int:
    """The training loop of one rank, from the newest sound checkpoint to the end of the budget.

    Returns 0 there, or 75 when a signal stopped it after a checkpoint. Raises UserError as `pretrain`.
    """
    # What is trained: the network, data, schedule; where it starts.
    run, first = Path(config.run), ranks.rank == 0
    if first:
        remove_leftovers(run, [FILLS])
    checkpoint = newest_sound(run, ranks)
    source = open_source(config.init, run, ranks) if config.init and checkpoint is None else None
    if before := checkpoint or (source and source.weights):
        config = with_model_of(config, before.model) if config.init else config
    data = [open_dataset(corpus.path, "train") for corpus in config.corpora]
    if source is not None:
        check_source(config, source)
    check_encoder(config)
    tokenizer = load_tokenizer(data[0].tokenizer_path)
    loader = make_loader(config, tokenizer, "train", data, ranks)
    heldout = heldout_loaders(config, tokenizer, data, ranks)
    unmasked = unmasked_samples(config, tokenizer, data, heldout, ranks)
    sentences = encode_sentences(config, tokenizer)
    schedule = TrainingSchedule(config, loader.mixture.batches)
    dtype, reason = choose_precision(config.train.precision, ranks.device)
    precision = f"{dtype}".removeprefix("torch.")

    if checkpoint is not None:
        check_same_run(checkpoint, config, data, schedule)
        over = schedule.over(checkpoint.step, checkpoint.elapsed_seconds)
        unfinished = UNEVALUATED in checkpoint.table and not (run / RESULT).is_file()
        if over and not ranks.broadcast(unfinished):
            ranks.say(f"already pretrained: {checkpoint.folder} is the end of {schedule.text}")
            tasks = Tasks(config, ranks, begin, leave=leave)
            tasks.add(checkpoint.step, last=True)
            return 0 if tasks.finish(stop) else STOPPED_AND_SAVED
    start = saved = sound = done = checkpoint.step if checkpoint else 0
    engine = pretraining_engine(config, tokenizer.vocab_size, ranks, dtype)
    origin = Start()
    if checkpoint is not None:
        engine.resume(checkpoint)
        origin = resumed(checkpoint)
    elif source is not None:
        origin = start_from(engine, source, tokenizer)
    else:
        engine.start(config.train.seed)

    # What is reported of it.
    peak = ranks.sum(peak_flops(ranks.device, dtype))[0]
    rate = Rate(config.model, tokenizer.vocab_size, peak, causal=config.objectives.clm > 0)
    losses = LossAccumulator(ranks.device, checkpoint.skipped_steps if checkpoint else 0)
    clock = Clock(checkpoint.elapsed_seconds if checkpoint else 0.0)
    writer = MetricsWriter(run, start) if first else None
    if writer:
        writer.introduce(config)
        settings = yaml.safe_dump(config.model_dump(), sort_keys=False)
        write_bytes(run / CONFIG, settings.encode())
        (run / RESULT).unlink(missing_ok=True)  # of a shorter budget
    for line in banner(config, data, loader, ranks, precision, reason, peak, start, schedule):
        ranks.say(fold(line))
    for line in changed_settings(checkpoint, config) if checkpoint else ():
        ranks.say(fold(line))
    for line in origin.lines:
        ranks.say(fold(line))
    tasks = Tasks(config, ranks, begin, writer, leave=leave)
    last = False  # whether this step is the last of the budget; all ranks must find the same
    cut = False  # whether a signal has cut an evaluation short, likewise
    see = partial(look, engine, heldout, unmasked, stop, sentences, tokenizer, writer)
    finish = partial(write_result, engine, rate, precision, peak)
    if checkpoint is not None and UNEVALUATED in checkpoint.table:
        try:
            ranks.say(see(start))
        except CutShortError:
            return STOPPED_AND_SAVED
        if over:
            finish()
            tasks.add(start, last=True)
            whole = tasks.finish(stop)
            if writer:
                writer.close()
            return 0 if whole else STOPPED_AND_SAVED

    hours = TimeBudget(schedule.seconds, clock.elapsed()) if schedule.seconds else None
    with Progress(
        "pretrain", schedule.steps, "steps", start=start, budget=hours, hidden=not first
    ) as progress:
        for step, micro_batches in loader.iterate(start, schedule.steps or FOREVER):
            # All that ranks must agree on, in one collective; the run's clock is the mean of their clocks.
            predicted, tokens, stopping, asked, *times = ranks.sum_over_data(
                sum(batch.num_targets for batch in micro_batches),
                sum(len(batch.tokens) for batch in micro_batches),
                float(stop.asked),
                float(progress.wants_facts()),
                *clock.step(),
            )
            if stopping:
                break
            now, after = (total / ranks.data for total in times)
            last = schedule.over(step + 1, after)
            learning_rate = schedule.learning_rate(step, now)
            counts = Counts(predicted, schedule.batch(step)[1], tokens)

            sums = train_step(engine, micro_batches, counts, step=step, learning_rate=learning_rate)
            losses.add(sums, counts, engine.step_applied)
            for batch in micro_batches:
                rate.add(batch.lengths, batch.num_targets)
            clock.stepped()
            done = step + 1
            beat(done)
            tasks.look(progress.say)

            facts: dict[str, str] = {}
            if done % config.train.log_every == 0 or done == start + 1 or last:
                totals, seen = losses.close()  # waits for the device
                if losses.newly_skipped:
                    progress.say(skipped(losses, done, saved, sound))
                figures = rate.close(ranks, warming_up=done == start + 1)
                if any(seen):
                    figures |= mean_losses("train", config, totals, seen, ranks)
                    figures |= {"train/learning_rate": learning_rate, "train/skipped_steps": losses.skipped}
                    if not losses.in_a_row:
                        figures["train/gradient_norm"] = engine.gradient_norm()
                    figures["speed/data_wait_seconds"] = loader.data_wait
                    figures |= epochs(config, loader, done)
                    facts = brief(figures)
                    if writer:
                        writer.write(done, figures)
            elif asked:  # it is time: for the screen alone, since what is kept is a function of steps
                totals, seen = losses.so_far()
                if any(seen):
                    facts = brief(mean_losses("train", config, totals, seen, ranks) | rate.so_far(ranks))
            progress.advance(1, **facts)
            if done % config.train.eval_every == 0 or last:
                try:
                    progress.say(see(done))
                except CutShortError:
                    cut = True
                    break
                rate.restart()
            if last:  # before the checkpoint that makes the run a finished one
                finish()
            if done % config.train.save_every == 0 or last:
                # A budget in hours is spent when its last step is likely to pass it.
                spent = (schedule.seconds or 0.0) if last else 0.0
                save(engine, done, data, schedule, max(clock.elapsed(), spent), losses, origin, tasks)
                saved = done
                tasks.add(done, last, progress.say)
                sound = sound if losses.in_a_row else saved  # the newest one not saved among skipped steps
                rate.restart()
            if last:
                break

    if cut or not last:  # a signal came
        tasks.ask_to_stop()
        if saved < done:
            elapsed = max(clock.elapsed(), (schedule.seconds or 0.0) if last else 0.0)
            save(engine, done, data, schedule, elapsed, losses, origin, tasks, cut)
        tasks.end()
        if first:  # in its log: on the screen the process that has started the ranks says how to go on
            print(f"stopped after step {done} of {schedule.text}", file=sys.stderr, flush=True)
        return STOPPED_AND_SAVED
    whole = tasks.finish(stop)
    if first and not losses.in_a_row:  # those that were only there to be read
        prune(run, config.train.keep_checkpoints, config.train.keep_every, tasks.read)
    if writer:
        writer.close()
    return 0 if whole else STOPPED_AND_SAVED


# ---------------------------------------------------------------------------------------- its parts


def look(
    engine: Engine[PretrainConfig],
    heldout: dict[str, Loader],
    unmasked: dict[str, MicroBatch],
    stop: StopSignal,
    sentences: list[Sentence],
    tokenizer: Tokenizer,
    writer: MetricsWriter | None,
    step: int,
) -> str:
    """Evaluates the weights after `step`; the line with the figures. Raises CutShortError after a signal."""
    figures = evaluate(engine, heldout, unmasked, engine.config.train.eval_samples, step, stop)
    if writer:
        writer.write(step, figures)
    if sentences:
        fills = fill(engine, sentences, tokenizer)
        if writer:
            show_fills(writer, Path(engine.config.run), step, sentences, fills)
    return f"step {step}: {in_words(figures)}"


def write_result(engine: Engine[PretrainConfig], rate: Rate, precision: str, peak: float) -> None:
    """Writes what the run comes to, by the first rank."""
    if engine.ranks.rank == 0:
        run = Path(engine.config.run)
        size = {"parameters": engine.num_parameters(), "precision": precision}
        write_json(run / RESULT, {**result(run), **rate.overall(), **size, "peak_flops": peak})


def save(
    engine: Engine[PretrainConfig],
    step: int,
    data: list[Dataset],
    schedule: TrainingSchedule,
    elapsed: float,
    losses: LossAccumulator,
    origin: Start,
    tasks: Tasks,
    cut: bool = False,
) -> None:
    """Saves a checkpoint of `step`, reached after `elapsed` seconds, and deletes the oldest ones.

    While steps are skipped in a row none is deleted: the ones before may be the last from which a run learns.
    Raises UserError, on all ranks, where it cannot be written.
    """
    config = engine.config
    losses.read()
    run = Path(config.run)
    facts = {
        "step": step,
        "samples_consumed": schedule.batch(step)[0],
        "skipped_steps": losses.skipped,
        "elapsed_seconds": elapsed,
        "causal": config.objectives.clm > 0,
        "tokenizer_sha256": data[0].manifest["tokenizer_sha256"],
        "data_digest": data_digest(data, config.corpora),
        **({UNEVALUATED: True} if cut else {}),
    }
    beat(step)
    save_checkpoint(
        checkpoint_folder(run, step),
        engine.fragments_to_save(),
        {**facts, **origin.facts, **engine.table()},
        data[0].tokenizer_path,
        engine.ranks,
    )
    beat(step)
    if engine.ranks.rank == 0 and not losses.in_a_row:
        prune(run, config.train.keep_checkpoints, config.train.keep_every, tasks.read)
