"""Runs the whole system once, small: the commands that a user types, on text that every machine has.

bertscale quickstart [--run runs/quickstart]

Each stage is a process of its own, which finds out which of its output is already complete: a second run, or
one after a failure, continues from there.
"""

from __future__ import annotations

import json
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from types import FrameType
from typing import Any

from bertscale.config import UserError
from bertscale.errors import INTERRUPTED
from bertscale.files import write_json
from bertscale.progress import show_count, show_duration
from bertscale.run_folder import RESULT, read_metrics

DEFAULT_RUN = Path("runs/quickstart")
PRETRAINING = Path("configs/pretrain/quickstart.yaml")
MINUTES = 2.0  # of pretraining: train.hours of that config
PARALLEL_SECONDS = 6  # of pretraining on two ranks after it
FOLDERS = ("corpus", "data", "pretrain", "hugging-face", "finetune")  # in the folder of the run
TITLES = {
    "collect": "collect the documentation on this machine",
    "prep": "text -> tokenizer and token shards",
    "pretrain": "token shards -> encoder",
    "parallel": "the same run goes on for some steps on two ranks: tensor parallel 2 x ZeRO-3",
    "convert": "checkpoint -> Hugging Face folder",
    "finetune": "encoder -> classifier, against the same encoder from random weights",
}
WIDTH, HEIGHT = 60, 8  # of the picture, in characters


def quickstart(run: Path, gpus: int, minutes: float = MINUTES) -> int:
    """Runs every stage into `run` and writes `run/summary.json`; returns the first exit code other than 0.

    `gpus` is the number of CUDA devices of this machine; `minutes` those of pretraining, a budget of time, so
    that a slow machine learns less and does not take longer.
    """
    if not PRETRAINING.exists():
        raise UserError(f"there is no {PRETRAINING} here; run this in the folder that holds configs/")
    began = time.monotonic()
    all_stages = stages(run, gpus, minutes)
    seconds: dict[str, float] = {}
    for number, (name, title, command) in enumerate(all_stages, 1):
        print(f"\n=== {number} of {len(all_stages)}: {title}\n$ {shlex.join(command)}", flush=True)
        stage_began = time.monotonic()
        code = _run(command)
        seconds[name] = round(time.monotonic() - stage_began, 1)
        if code:
            print(
                f"\nstage {number} of {len(all_stages)} ({name}) ended with exit code {code}; what is "
                "finished is kept, and the same command continues from there",
                file=sys.stderr,
            )
            return code
        print(f"--- {name} took {show_duration(seconds[name])}", flush=True)
    seconds["all"] = round(time.monotonic() - began, 1)
    summary = _summarize(run, seconds)
    write_json(run / "summary.json", summary)
    print(_show(summary))
    return 0


def stages(run: Path, gpus: int, minutes: float = MINUTES) -> list[tuple[str, str, list[str]]]:
    """Lists (name, title, command) of each stage; paths are overridden where `run` is not the configs'.

    One GPU has no room for the two ranks of `parallel`, which is left out there.
    """
    prep, finetune = [], []
    if run != DEFAULT_RUN:
        prep = [f"input=[{run}/corpus]", f"output={run}/data"]
        finetune = [
            f"encoder={run}/pretrain",
            f"data.train={run}/task/train.jsonl",
            f"data.test={run}/task/test.jsonl",
            f"output={run}/finetune",
        ]
    budget = [] if minutes == MINUTES else [f"train.hours={minutes / 60:.6f}"]
    ranks = ["parallel.ranks=1"] if gpus > 1 else []
    longer = [f"train.hours={(minutes * 60 + PARALLEL_SECONDS) / 3600:.6f}"]
    two_ranks = ["parallel.ranks=2", "parallel.tensor=2", "parallel.zero_stage=3"]
    pretrain = _pretrain(run)
    commands = {
        "collect": ["python", "-m", "data_prep.docstrings", str(run)],
        # The corpus is collected anew when packages have changed.
        "prep": ["bertscale", "prep", "configs/prep/quickstart.yaml", *prep, "--replace"],
        "pretrain": [*pretrain, *budget, *ranks],
        "parallel": [*pretrain, *longer, *two_ranks],
        "convert": ["bertscale", "convert", f"{run}/pretrain", f"{run}/hugging-face"],
        "finetune": ["bertscale", "finetune", "configs/finetune/quickstart.yaml", *finetune],
    }
    if gpus == 1:
        del commands["parallel"]
    return [(name, TITLES[name], command) for name, command in commands.items()]


def _pretrain(run: Path) -> list[str]:
    """The command that pretrains in `run`, or continues there."""
    paths = [] if run == DEFAULT_RUN else [f"run={run}/pretrain", f"data={run}/data"]
    return ["bertscale", "pretrain", str(PRETRAINING), *paths]


def _run(command: list[str]) -> int:
    """Runs a stage with this interpreter. Ctrl-C is left to the stage: it may have to save first."""
    program = {"python": [], "bertscale": ["-m", "bertscale"]}[command[0]]
    interrupted = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal interrupted
        interrupted = True

    # Handlers, not SIG_IGN, which the stage would inherit.
    before = signal.signal(signal.SIGINT, note)
    process = subprocess.Popen([sys.executable, *program, *command[1:]])
    previous = signal.signal(signal.SIGTERM, lambda number, frame: process.terminate())
    try:
        code = process.wait()
    finally:
        signal.signal(signal.SIGINT, before)
        signal.signal(signal.SIGTERM, previous)
    if code < 0:
        return 128 - code
    return INTERRUPTED if interrupted and code == 0 else code


def _summarize(run: Path, seconds: dict[str, float]) -> dict[str, Any]:
    """Collects what the stages wrote about themselves; `seconds` are those of this run."""
    shards = _read(run / "data/manifest.json")["shards"]
    data = {key: sum(shard[key] for shard in shards) for key in ("tokens", "sentences", "bytes")}
    return {
        "corpus": _read(run / "collected.json"),
        "data": {**data, "documents": sum(shard["rows"] for shard in shards), "shards": len(shards)},
        "pretrain": _read(run / f"pretrain/{RESULT}"),
        "curve": [
            {
                "step": row["step"],
                "loss": row["train/mlm_loss"],
                "tokens_per_second": row["speed/tokens_per_second"],
            }
            for row in read_metrics(run / "pretrain")
            if "train/mlm_loss" in row
        ],
        "finetune": _read(run / f"finetune/{RESULT}"),
        "seconds": seconds,
        "paths": {folder.replace("-", "_"): f"{run}/{folder}" for folder in FOLDERS},
    }


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _show(summary: dict[str, Any]) -> str:
    """Formats the summary as aligned lines, a picture of what was learnt, and what to do next."""
    corpus, data, paths = summary["corpus"], summary["data"], summary["paths"]
    pretrain, curve = summary["pretrain"], summary["curve"]
    seconds = ", ".join(f"{name} {show_duration(value)}" for name, value in summary["seconds"].items())
    rows = {
        "corpus": f"{corpus['text_bytes'] / 1e6:.1f} MB of text, {corpus['documents']:,} documents "
        f"from {corpus['packages']} packages",
        "shards": f"{show_count(data['tokens'])} tokens, {data['sentences']:,} sentences, "
        f"{data['shards']} files",
        "encoder": f"{show_count(pretrain['parameters'])} parameters, {pretrain['precision']}",
        "training": f"{pretrain['steps']:,} steps, "
        f"{show_count(statistics.median(point['tokens_per_second'] for point in curve))} tokens/s; "
        f"held-out loss {pretrain['heldout_mlm_loss']:.3f}",
        "time": seconds,
        "all of it": str(Path(paths["data"]).parent / "summary.json"),
    }
    lines = ["", "=== summary", *(f"{name:<10} {text}" for name, text in rows.items()), ""]
    lines += draw_curve([(point["step"], point["loss"]) for point in curve])
    lines += ["", *_bars(summary["finetune"]), ""]
    lines += [
        "the curves:      .venv/bin/tensorboard --logdir " + paths["pretrain"],
        "what to try next: train longer, from where this run stopped (here for half an hour in all):",
        f"  .venv/bin/{shlex.join(_pretrain(Path(paths['data']).parent))} train.hours=0.5",
    ]
    return "\n".join(lines)


def draw_curve(points: list[tuple[int, float]]) -> list[str]:
    """Draws losses by step as HEIGHT lines of text between the highest and the lowest, and an axis."""
    last, losses = points[-1][0], [loss for _, loss in points]
    top, bottom = max(losses), min(losses)
    columns: dict[int, list[float]] = defaultdict(list)
    for step, loss in points:
        columns[step * (WIDTH - 1) // last].append(loss)
    rows = [[" "] * WIDTH for _ in range(HEIGHT)]
    for column, values in columns.items():
        share = (top - statistics.mean(values)) / (top - bottom or 1)
        rows[round(share * (HEIGHT - 1))][column] = "•"
    labels = {0: f"{top:.2f}", HEIGHT - 1: f"{bottom:.2f}"}
    drawn = [f"{labels.get(number, ''):>6} │{''.join(row).rstrip()}" for number, row in enumerate(rows)]
    end = f"step {last:,}"
    return ["loss of masked tokens", *drawn, " " * 7 + "└" + "─" * WIDTH, f"{end:>{8 + WIDTH}}"]


def _bars(finetune: dict[str, Any]) -> list[str]:
    """Draws the accuracies of the classifiers as bars, beside that of always naming the same class."""
    shares = {
        "pretrained": finetune["pretrained"]["test"]["accuracy"]["mean"],
        "random weights": finetune["random"]["test"]["accuracy"]["mean"],
        "one class": finetune["majority"]["test"]["accuracy"],
    }
    seeds, labels = len(finetune["pretrained"]["runs"]), finetune["labels"]
    lines = [
        f"right answers, which of {len(labels)}: {' or '.join(labels)} "
        f"({finetune['examples']['test']:,} held-out texts, mean of {seeds} seeds)"
    ]
    return lines + [f"{name:<15}{'█' * round(share * WIDTH)} {share:.3f}" for name, share in shares.items()]
