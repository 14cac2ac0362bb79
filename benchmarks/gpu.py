"""Training steps on one GPU, compiled, bfloat16: tokens/s, MFU, memory, against transformers; top kernels.

    python benchmarks/gpu.py --json FILE                # under ten minutes on an H200
    python benchmarks/gpu.py --packed                   # every sample of full length
    python benchmarks/gpu.py --graphs                   # with CUDA graphs
    python benchmarks/gpu.py --cpu                      # tiny sizes on the CPU, to see that it runs

Random ids, made on the spot: BERT with sentence pairs whose lengths are spread evenly between a quarter of
the longest and all of it, `modern` with packed samples. Ours is what `bertscale pretrain` runs on one GPU:
DeepSpeed ZeRO-1 with float32 master weights, each layer compiled, no padding. transformers' class (its own
scaled-dot-product attention) runs in a plain loop in bfloat16 on the same batches, padded, with fused AdamW:
as it is, and compiled whole. Needs torch, deepspeed, megatron-core and what they need; without transformers
its columns are left out. The sides run one after another, so that each one's memory is its own. The
compiled peer is compiled as long as the time lasts (--minutes), the first cases first.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch._dynamo

from bertscale.bench.timed_steps import (
    PARTS,
    PUBLISHED_VOCAB,
    RandomBatches,
    Step,
    Stopwatch,
    forget_peak,
    machine,
    our_step,
    padded,
    peak_memory,
    profiled,
    row_lengths,
    top_operators,
    transformers_step,
)
from bertscale.config import ModelConfig, PretrainConfig, UserError
from bertscale.train.device import choose_precision, data_sheet_peak, measured_peak, synchronize
from bertscale.train.engine import pretraining_engine
from bertscale.train.metrics import Rate
from bertscale.train.parallel import Ranks, start_ranks

BASE: dict[str, Any] = {"num_hidden_layers": 12, "hidden_size": 768, "num_attention_heads": 12}
LARGE: dict[str, Any] = {
    **{"num_hidden_layers": 24, "hidden_size": 1024, "num_attention_heads": 16},
    "intermediate_size": 4096,
}
MODERN = {"preset": "modern", "max_position_embeddings": 1024}
MODERN_BASE = {**BASE, **MODERN, "num_hidden_layers": 22, "intermediate_size": 1152}
MODERN_LARGE = {**LARGE, **MODERN, "num_hidden_layers": 28, "intermediate_size": 2624}
# name, sizes, kind and length of samples, samples of a step, goal for the share of the data sheet's peak
CASES: list[tuple[str, dict[str, Any], str, int, int, float | None]] = [
    ("BERT-large 128", LARGE, "nsp", 128, 512, 0.55),
    ("BERT-large 512", LARGE, "nsp", 512, 128, 0.55),
    ("BERT-base 128", BASE, "nsp", 128, 1024, None),
    ("BERT-base 512", BASE, "nsp", 512, 256, None),
    ("modern-base 1024", MODERN_BASE, "packed", 1024, 64, None),
    ("modern-large 1024", MODERN_LARGE, "packed", 1024, 32, None),
]
TINY: dict[str, Any] = {
    **{"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64},
}
SMOKE: list[tuple[str, dict[str, Any], str, int, int, float | None]] = [
    ("tiny BERT 128", TINY, "nsp", 128, 4, None),
    ("tiny modern 128", {**TINY, "preset": "modern", "max_position_embeddings": 128}, "packed", 128, 2, None),
]
WARMUP = 5  # steps; all compiling happens in them
SHOWN = 10  # kernels


@dataclass(frozen=True)
class Figures:
    """Of one side of one case."""

    tokens: float  # real tokens/s
    flops: float  # model FLOP/s
    memory: int  # bytes
    parts: dict[str, float]  # seconds of each part of a step
    warmup: float  # seconds
    kernels: list[tuple[str, float]]  # (name, seconds in one step)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="File for the results.")
    parser.add_argument("--minutes", type=float, default=8.0, help="Nothing is begun after (%(default)s).")
    parser.add_argument("--rounds", type=int, default=5, help="Measured rounds (%(default)s).")
    parser.add_argument("--steps", type=int, default=5, help="Steps of a round (%(default)s).")
    parser.add_argument("--packed", action="store_true", help="Every sample is of full length.")
    parser.add_argument("--graphs", action="store_true", help="Ours replays its layers as CUDA graphs.")
    parser.add_argument(
        "--dropout", type=float, default=0.0, help="Of hidden states, all models (%(default)s)."
    )
    parser.add_argument(
        "--only", metavar="WORDS", default="", help="Only cases whose names hold these words."
    )
    parser.add_argument("--cpu", action="store_true", help="Tiny sizes on the CPU, to see that it runs.")
    options = parser.parse_args()
    began = time.perf_counter()
    if not options.cpu and not torch.cuda.is_available():
        print("there is no GPU here; --cpu runs tiny sizes on the CPU", file=sys.stderr)
        return 2
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    device = torch.device("cpu") if options.cpu else torch.device("cuda", 0)
    ranks = start_ranks(1, device)
    dtype, _ = choose_precision("auto" if options.cpu else "bfloat16", device)
    peak = measured_peak(device, dtype)
    sheet = data_sheet_peak(device, dtype)
    facts = {**machine(device, peak), "precision": f"{dtype}".removeprefix("torch.")}
    facts |= {"data_sheet_peak_gflops": sheet and round(sheet / 1e9), "cuda": torch.version.cuda}
    print(f"{facts['device']}, torch {facts['torch']}, CUDA {facts['cuda']}, {facts['precision']}")
    known = f"{sheet / 1e12:,.0f}" if sheet else "not known here"
    print(f"matrix products run at {peak / 1e12:,.1f} TFLOP/s here; the data sheet's peak: {known}")
    print(
        f"{'':<20}{'side':<24}{'tokens/s':>12}{'TFLOP/s':>10}{'of sheet':>10}{'of here':>9}{'memory':>11}"
        f"{'ratio':>8}{'warm-up':>9}"
    )
    cases = SMOKE if options.cpu else CASES
    chosen = [case for case in cases if options.only in case[0]]
    sides = ["ours", "transformers"] + ([] if options.cpu else ["transformers, compiled"])
    rows: list[dict[str, Any]] = []
    ours: dict[str, Figures] = {}
    left_out: list[str] = []
    for side, case in [(side, case) for side in sides for case in chosen]:
        name, goal = case[0], case[-1]
        if time.perf_counter() - began > 60 * options.minutes:
            left_out.append(f"{name}: {side} is left out, {options.minutes:g} minutes are over")
            continue
        try:
            measured = measure(configure(case, options), ranks, dtype, side, options)
        except Exception as error:  # the other rows are still worth the machine's time
            if not isinstance(error, UserError | torch.cuda.OutOfMemoryError):
                traceback.print_exc()
            left_out.append(f"{name}: {side} is left out: {(str(error) or repr(error)).splitlines()[0]}")
            continue
        finally:
            tidy(device)
        if side == "ours":
            ours[name] = measured
        ratio = ours[name].tokens / measured.tokens if side != "ours" and name in ours else None
        show(name, side, measured, sheet, peak, ratio)
        rows += results_of(name, side, measured, ours.get(name), sheet, peak, goal)
        write(options.json, facts, left_out, rows)  # a run that is cut short has written what it knows
    write(options.json, facts, left_out, rows)
    for line in left_out:
        print(line)
    for name, figures in ours.items():
        show_kernels(name, figures)
    print(f"{(time.perf_counter() - began) / 60:.1f} minutes", flush=True)
    return int(len(ours) < len(chosen))


def write(path: Path | None, facts: dict[str, Any], left_out: list[str], rows: list[dict[str, Any]]) -> None:
    if path:
        content = {"machine": facts, "left_out": left_out, "results": rows}
        path.write_text(json.dumps(content, indent=1) + "\n")


def configure(
    case: tuple[str, dict[str, Any], str, int, int, float | None], options: argparse.Namespace
) -> PretrainConfig:
    _, sizes, kind, length, batch, _ = case
    if options.packed:  # a packed sample has no pair
        kind = "packed"
    train: dict[str, Any] = {"steps": 1000, "global_batch": batch, "micro_batch": batch}
    if options.graphs:
        train["compile"] = "graphs"
    model = {
        "max_position_embeddings": 512,
        "hidden_dropout_prob": options.dropout,
        "attention_probs_dropout_prob": 0.0,
        "sentence_head": kind == "nsp",
        **sizes,
    }
    return PretrainConfig.model_validate(
        {
            "run": "unused",
            "data": "unused",
            "model": ModelConfig.model_validate(model).model_dump(),
            "samples": {"kind": kind, "max_length": length, "mask_rate": 0.3 if "preset" in sizes else 0.15},
            "train": train,
        }
    )


def measure(
    config: PretrainConfig, ranks: Ranks, dtype: torch.dtype, side: str, options: argparse.Namespace
) -> Figures:
    """Builds one side, warms it up until everything is compiled, and measures it.

    Raises UserError where transformers is missing.
    """
    device, vocab_size = ranks.device, PUBLISHED_VOCAB[config.model.preset]
    watch = Stopwatch(device)
    batches = RandomBatches(config, vocab_size, ranks).steps
    inputs: Sequence[Sequence[Any]] = batches
    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    step: Step
    if side == "ours":
        engine = pretraining_engine(config, vocab_size, ranks, dtype)
        engine.start(config.train.seed)
        assert options.cpu or config.compiles(device.type)
        step = our_step(engine, watch)
    else:
        compiled = side.endswith("compiled")
        step = transformers_step(config, vocab_size, device, dtype, watch, compiled=compiled)
        inputs = [[padded(batch, row_lengths(batch, config)) for batch in made] for made in batches]
    forget_peak(device)  # that of making the weights
    began = time.perf_counter()
    for number in range(WARMUP):
        step(inputs[number % len(inputs)])
    synchronize(device)
    warmup = time.perf_counter() - began

    rate = Rate(config.model, vocab_size, peak=1.0)
    rounds, parts = [], dict.fromkeys(PARTS, 0.0)
    for number in range(options.rounds):
        numbers = [(number * options.steps + k) % len(inputs) for k in range(options.steps)]
        synchronize(device)
        rate.restart()
        watch.restart()
        for k in numbers:
            loss = step(inputs[k])
            for batch in batches[k]:
                rate.add(batch.lengths, batch.num_targets)
        for part, seconds in watch.seconds().items():  # waits for the device
            parts[part] += seconds / options.steps / options.rounds
        rounds.append(rate.close(ranks))
        assert torch.isfinite(loss), f"{side}: the loss is {loss}"
    memory = peak_memory(device) - before
    kernels = top_operators(profiled(lambda: step(inputs[0]), device), device) if side == "ours" else []
    return Figures(
        tokens=statistics.median(figures["speed/tokens_per_second"] for figures in rounds),
        flops=statistics.median(figures["speed/mfu"] for figures in rounds),
        memory=memory,
        parts=parts,
        warmup=warmup,
        kernels=kernels,
    )


def tidy(device: torch.device) -> None:
    """Gives back what a side held: the next one's memory is its own."""
    torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


# ------------------------------------------------------------------------------------------------ results


def results_of(
    name: str,
    side: str,
    measured: Figures,
    ours: Figures | None,
    sheet: float | None,
    peak: float,
    goal: float | None,
) -> list[dict[str, Any]]:
    """Rows for the JSON: of ours the shares of the peaks, of a peer the ratio of tokens/s."""
    facts = {
        "peak_memory_bytes": measured.memory,
        "seconds_of_parts": measured.parts,
        "warmup_seconds": measured.warmup,
    }
    if side == "ours":
        limits = {"the data sheet's peak": sheet, "the measured peak": peak}
        return [
            {
                "case": f"{name}, of {limit}",
                "ours": measured.flops,
                "peer": value,
                "unit": "FLOP/s",
                "ratio": round(measured.flops / value, 4),
                "goal": goal if value == sheet else None,
                "tokens_per_second": measured.tokens,
                **facts,
                "kernels": measured.kernels[:SHOWN],
            }
            for limit, value in limits.items()
            if value
        ]
    return [
        {
            "case": f"{name}, against {side}",
            "ours": ours.tokens if ours else None,
            "peer": measured.tokens,
            "unit": "tokens/s",
            "ratio": round(ours.tokens / measured.tokens, 3) if ours else None,
            "goal": None,
            "peer_flops": measured.flops,
            **facts,
        }
    ]


def show(
    name: str, side: str, result: Figures, sheet: float | None, peak: float, ratio: float | None
) -> None:
    of_sheet = f"{result.flops / sheet:.1%}" if sheet else "-"
    print(
        f"{name:<20}{side:<24}{result.tokens:>12,.0f}{result.flops / 1e12:>10,.2f}{of_sheet:>10}"
        f"{result.flops / peak:>9.1%}{result.memory / 2**30:>7,.1f} GiB{f'{ratio:.2f}' if ratio else '':>8}"
        f"{result.warmup:>7,.0f} s",
        flush=True,
    )


def show_kernels(name: str, measured: Figures) -> None:
    whole = sum(seconds for _, seconds in measured.kernels)
    step = sum(measured.parts.values())
    times = ", ".join(f"{part} {seconds / step:.0%}" for part, seconds in measured.parts.items() if seconds)
    print(
        f"\n{name}: a step takes {step * 1e3:,.1f} ms ({times}); "
        f"our kernels of one step, {whole * 1e3:,.1f} ms:"
    )
    for kernel, seconds in measured.kernels[:SHOWN]:
        print(f"  {seconds / whole:>6.1%} {seconds * 1e3:>9.2f} ms  {kernel[:110]}")


if __name__ == "__main__":
    sys.exit(main())
