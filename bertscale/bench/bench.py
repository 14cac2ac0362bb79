"""Measures a training config on this machine: real tokens/s, MFU, the time of a step's parts, memory.

bertscale bench configs/pretrain/bert-base.yaml --random
bertscale bench configs/pretrain/quickstart.yaml parallel.tensor=1 --against transformers

The steps are those of `bertscale pretrain`, on the same ranks; nothing is written but the --json file.
docs/speed.md explains the table.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bertscale.bench.timed_steps import (
    PARTS,
    PUBLISHED_VOCAB,
    RandomBatches,
    Step,
    Stopwatch,
    communication,
    forget_peak,
    machine,
    our_step,
    padded,
    peak_memory,
    profiled,
    row_lengths,
    transformers_step,
)
from bertscale.config import PretrainConfig, UserError
from bertscale.data.batches import make_loader
from bertscale.data.micro_batch import MicroBatch
from bertscale.data.shards import open_dataset
from bertscale.progress import Progress, show_count
from bertscale.tokenizer import load_tokenizer
from bertscale.train.device import (
    choose_precision,
    data_sheet_peak,
    describe,
    device_line,
    local_device,
    measured_peak,
    synchronize,
)
from bertscale.train.engine import pretraining_engine
from bertscale.train.metrics import Rate
from bertscale.train.parallel import Ranks, start_ranks, stop_ranks

Batches = Iterator[tuple[int, list[MicroBatch]]]


@dataclass(frozen=True)
class Options:
    """Says how long is measured, on what, against which peer, and where the results go."""

    steps: int = 5  # of a round
    rounds: int = 5  # measured, after one of warm-up
    random: bool = False  # ids instead of the config's data
    against: str | None = None  # "transformers"
    json: Path | None = None


@dataclass
class Side:
    """Holds the figures of ours or of the peer, one for each round."""

    tokens: list[float] = field(default_factory=list)  # real tokens/s of all ranks
    flops: list[float] = field(default_factory=list)  # model FLOP/s of all ranks
    parts: list[dict[str, float]] = field(default_factory=list)  # seconds of each part of a step, this rank's
    memory: int | None = None  # bytes at most, of one rank


class Meter(NamedTuple):
    """Holds what counts tokens and seconds in a round, on which ranks, and what shows the progress."""

    rate: Rate
    watch: Stopwatch
    ranks: Ranks
    progress: Progress


def bench(config: PretrainConfig, options: Options) -> int:
    """Measures as one rank, and prints the figures on the first; returns 0.

    Raises UserError for what the user can mend.
    """
    device = local_device(config.device)
    ranks = start_ranks(config.parallel.tensor, device)
    ranks.say(device_line(device, config.device, ranks.world))
    try:
        _bench(without_warmup(config), options, ranks)
    finally:
        stop_ranks()
    return 0


def without_warmup(config: PretrainConfig) -> PretrainConfig:
    """Returns the config of the run's long last phase: samples of full length, full batches."""
    samples = config.samples.model_copy(update={"warmup": []})
    train = config.train.model_copy(update={"batch_warmup": []})
    return config.model_copy(update={"samples": samples, "train": train})


def _bench(config: PretrainConfig, options: Options, ranks: Ranks) -> None:
    device, first = ranks.device, ranks.rank == 0
    dtype, reason = choose_precision(config.train.precision, device)
    ranks.barrier()  # all ranks measure at the same time
    peak = ranks.sum(measured_peak(device, dtype))[0]
    sheet = data_sheet_peak(device, dtype)
    sheet = sheet and sheet * ranks.world
    total = options.steps * (options.rounds + 1) + 1
    with ExitStack() as stack:
        batches: Any
        if options.random:
            vocab_size = PUBLISHED_VOCAB[config.model.preset]
            batches = RandomBatches(config, vocab_size, ranks).iterate(0, total)
        else:
            data = [open_dataset(corpus.path, "train") for corpus in config.corpora]
            tokenizer = load_tokenizer(data[0].tokenizer_path)
            vocab_size = tokenizer.vocab_size
            batches = make_loader(config, tokenizer, "train", data, ranks).iterate(0, total)
        stack.enter_context(closing(batches))  # ends the loader's thread

        engine = pretraining_engine(config, vocab_size, ranks, dtype)
        engine.start(config.train.seed)
        if first:
            _introduce(config, options, ranks, vocab_size, f"{dtype}".removeprefix("torch."), reason)
        # With a peak of 1 its MFU is FLOP/s.
        rate = Rate(config.model, vocab_size, peak=1.0, causal=config.objectives.clm > 0)
        watch = Stopwatch(device)
        steps = (options.rounds + 1) * options.steps * (2 if options.against else 1)
        progress = stack.enter_context(Progress("bench", steps, "steps", hidden=not first))
        meter = Meter(rate, watch, ranks, progress)
        ours, theirs = Side(), Side()
        step, their_step = our_step(engine, watch), None

        forget_peak(device)
        done = _our_round(Side(), step, batches, options.steps, meter)  # warm-up
        ours.memory = int(max(ranks.gather(peak_memory(device))))
        if options.against:
            before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
            their_step = transformers_step(config, vocab_size, device, dtype, watch)
            forget_peak(device)
            _their_round(Side(), their_step, done, config, meter)
            theirs.memory = peak_memory(device) - before if device.type == "cuda" else None
        for _ in range(options.rounds):
            done = _our_round(ours, step, batches, options.steps, meter)
            if their_step:
                _their_round(theirs, their_step, done, config, meter)
        collectives = _communication(step, batches, watch, ranks)

    results = summarize(ours, theirs if options.against else None, peak, sheet, collectives)
    if first:
        print("\n".join(table(results, options.against, ranks)), flush=True)
    if first and options.json:
        facts = {
            **machine(device, peak),
            "ranks": ranks.world,
            "tensor_parallel": ranks.tensor,
            "zero_stage": config.parallel.zero_stage,
            "precision": f"{dtype}".removeprefix("torch."),
            "vocabulary": vocab_size,
            "data_sheet_peak_gflops": sheet and round(sheet / 1e9),
        }
        content = {"machine": facts, "config": config.model_dump(mode="json"), "results": results}
        write_results(options.json, content)


def write_results(path: Path, content: dict[str, Any]) -> None:
    """Writes the --json file; raises UserError where it cannot be written."""
    try:
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write --json {path}: {error.strerror}") from error


# ------------------------------------------------------------------------------------------------- rounds


def _our_round(side: Side, step: Step, batches: Batches, steps: int, meter: Meter) -> list[list[MicroBatch]]:
    """Measures `steps` steps; returns their micro-batches."""
    work = ((micro_batches, micro_batches) for _, micro_batches in islice(batches, steps))
    return _round(side, step, work, meter)


def _their_round(
    side: Side, step: Step, done: list[list[MicroBatch]], config: PretrainConfig, meter: Meter
) -> None:
    """Measures the peer on the micro-batches of our round; they are padded before the clock starts."""
    inputs = [[padded(batch, row_lengths(batch, config)) for batch in batches] for batches in done]
    _round(side, step, zip(inputs, done, strict=True), meter)


def _round(
    side: Side, step: Step, work: Iterable[tuple[Sequence[Any], list[MicroBatch]]], meter: Meter
) -> list[list[MicroBatch]]:
    """Adds the figures of a round to `side`; `work` gives what each step gets and the micro-batches in it."""
    rate, watch, ranks = meter.rate, meter.watch, meter.ranks
    done: list[list[MicroBatch]] = []
    synchronize(ranks.device)
    ranks.barrier()
    rate.restart()
    watch.restart()
    for inputs, micro_batches in work:
        watch.mark("data wait")
        loss = step(inputs)
        for batch in micro_batches:
            rate.add(batch.lengths, batch.num_targets)
        done.append(micro_batches)
        meter.progress.advance(1)
    seconds = watch.seconds()  # waits for the device
    figures = rate.close(ranks)
    if not math.isfinite(loss):
        raise UserError(
            f"the loss is {float(loss)}; take train.precision=float32 or a smaller model.initializer_range"
        )
    side.tokens.append(figures["speed/tokens_per_second"])
    side.flops.append(figures["speed/mfu"])
    side.parts.append({part: value / len(done) for part, value in seconds.items()})
    return done


def _communication(step: Step, batches: Batches, watch: Stopwatch, ranks: Ranks) -> float | None:
    """Returns the profiler's seconds of one step's collectives on the first rank; None if it saw none."""
    _, micro_batches = next(batches)
    if ranks.world == 1:
        return 0.0
    watch.restart()
    if ranks.rank:
        step(micro_batches)
        return None
    return communication(profiled(lambda: step(micro_batches), ranks.device)) or None


# ------------------------------------------------------------------------------------------------ results


def summarize(
    ours: Side, theirs: Side | None, peak: float, sheet: float | None, collectives: float | None
) -> list[dict[str, Any]]:
    """Returns the rows of the results: medians of the rounds, in `spread` the lowest and highest. `ratio` is
    ours over the peer, larger is better. Peaks are those of all ranks together."""
    rows = [_row("real tokens", "tokens/s", ours.tokens, theirs.tokens if theirs else None)]
    for name, limit in (("measured peak", peak), ("data sheet's peak", sheet)):
        if limit:
            row = _row(name, "FLOP/s", ours.flops, None)
            row |= {"peer": limit, "ratio": row["ours"] / limit}
            if theirs:
                row["transformers_of_peak"] = statistics.median(theirs.flops) / limit
            rows.append(row)
    whole = [sum(parts.values()) for parts in ours.parts]
    rows.append(_row("step", "s", whole, [sum(parts.values()) for parts in theirs.parts] if theirs else None))
    for part in PARTS:
        of_theirs = [parts[part] for parts in theirs.parts] if theirs and part != "data wait" else None
        rows.append(_row(part, "s", [parts[part] for parts in ours.parts], of_theirs))
    rows.append(_row("communication", "s", None if collectives is None else [collectives], None))
    of_theirs = [float(theirs.memory)] if theirs and theirs.memory else None
    rows.append(_row("peak memory", "bytes", [float(ours.memory or 0)], of_theirs))
    return rows


def _row(case: str, unit: str, ours: list[float] | None, theirs: list[float] | None) -> dict[str, Any]:
    mine = statistics.median(ours) if ours else None
    peer = statistics.median(theirs) if theirs else None
    ratio = None
    if ours and theirs:  # a ratio for each round, since the speed of a machine drifts
        pairs = zip(ours, theirs, strict=True)
        ratio = statistics.median((a / b if unit == "tokens/s" else b / a) for a, b in pairs if a and b)
    spread = [min(ours), max(ours)] if ours else None
    figures = {"case": case, "ours": mine, "peer": peer, "unit": unit, "ratio": ratio}
    return {**figures, "goal": None, "spread": spread}


def _introduce(
    config: PretrainConfig, options: Options, ranks: Ranks, vocab_size: int, precision: str, reason: str
) -> None:
    sizes, train = config.model, config.train
    source = "random ids" if options.random else ", ".join(corpus.path for corpus in config.corpora)
    cut = f"at most {train.micro_tokens} tokens" if train.micro_tokens else f"{train.micro_batch} samples"
    print(
        f"model   {sizes.preset}, {sizes.num_hidden_layers} layers of {sizes.hidden_size}, "
        f"{vocab_size:,} pieces; {precision} ({reason})\n"
        f"data    {source}; {config.samples.kind} samples of {config.samples.max_length} tokens at most\n"
        f"ranks   {ranks.world}: tensor parallel {ranks.tensor} x data parallel {ranks.data}, "
        f"ZeRO-{config.parallel.zero_stage}, on {describe(ranks.device)} each\n"
        f"steps   of {train.global_batch} samples, micro-batches of {cut}; {options.rounds} rounds of "
        f"{options.steps} after one of warm-up\n",
        flush=True,
    )


def _show_flops(value: float) -> str:
    """Formats FLOP/s: `3.1e12` -> "3.10 T"."""
    return f"{value / 1e12:,.2f} T" if value >= 1e12 else f"{value / 1e9:,.1f} G"


def _show_seconds(value: float) -> str:
    return f"{value * 1e3:,.1f} ms"


def table(results: Sequence[dict[str, Any]], against: str | None, ranks: Ranks) -> list[str]:
    """Formats the results as aligned lines."""
    by_case = {row["case"]: row for row in results}
    lines = [f"{'':<28}{'median':>12}{'lowest':>12}{'highest':>12}"]
    if against:
        lines[0] += f"{against:>15}{'ratio':>8}"

    def add(name: str, row: dict[str, Any], shown: Any, note: str = "") -> None:
        values = [row["ours"], *(row["spread"] or [None, None])] if row["ours"] is not None else [None] * 3
        text = f"{name:<28}" + "".join(f"{'-' if value is None else shown(value):>12}" for value in values)
        if against:
            peer = row["peer"] if row["unit"] != "FLOP/s" else None
            ratio = f"{row['ratio']:.2f}" if peer is not None and row["ratio"] else ""
            text += f"{'' if peer is None else shown(peer):>15}{ratio:>8}"
        lines.append((text + note).rstrip())

    add("real tokens/s", by_case["real tokens"], show_count)
    add("model FLOP/s", by_case["measured peak"], _show_flops)
    for name in ("measured peak", "data sheet's peak"):
        if name not in by_case:
            lines.append(f"{'MFU of the ' + name:<28}{'-':>12}  none is known for this device")
            continue
        row = by_case[name]
        limit = row["peer"]
        shares = [row["ours"] / limit, *(value / limit for value in row["spread"])]
        text = f"{'MFU of the ' + name:<28}" + "".join(f"{share:>12.1%}" for share in shares)
        if against:
            text += f"{row['transformers_of_peak']:>15.1%}{'':>8}"
        lines.append(f"{text}  of {_show_flops(limit)}FLOP/s")
    step = by_case["step"]
    add("time of a step", step, _show_seconds)
    for part in PARTS:
        share = by_case[part]["ours"] / step["ours"]
        name = "optimizer and clipping" if part == "optimizer" else part
        add(f"  {name}", by_case[part], _show_seconds, f"  {share:.0%}")
    row = by_case["communication"]
    if ranks.world == 1:
        lines.append(f"{'  communication':<28}{'-':>12}  there is one rank")
    elif row["ours"] is None:
        lines.append(f"{'  communication':<28}{'-':>12}  not known: the profiler saw no collective")
    else:
        share = row["ours"] / step["ours"]
        lines.append(
            f"{'  of it, communication':<28}{_show_seconds(row['ours']):>12}  {share:.0%}, waiting for other "
            "ranks included; of one step under the profiler"
        )
    kind = "allocated on the GPU" if ranks.device.type == "cuda" else "resident"
    add(f"peak memory, {kind}"[:28], by_case["peak memory"], lambda value: f"{value / 2**30:.2f} GiB")
    return lines
