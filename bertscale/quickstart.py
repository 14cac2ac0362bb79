"""Runs the whole system once, small: the commands that a user types, on text that every machine has.

bertscale quickstart [--run runs/quickstart]

Each stage is a process of its own, which finds out which of its output is already complete: a second run, or
one after a failure, continues from there.
"""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

from bertscale.config import UserError
from bertscale.errors import INTERRUPTED
from bertscale.files import write_json
from bertscale.progress import show_count, show_duration
from bertscale.run_folder import CONFIG, RESULT

DEFAULT_RUN = Path("runs/quickstart")
PRETRAINING = Path("configs/pretrain/quickstart.yaml")
FOLDERS = ("corpus", "data", "pretrain", "hugging-face", "finetune")  # in the folder of the run
TITLES = {
    "collect": "collect the documentation on this machine",
    "prep": "text -> tokenizer and token shards",
    "pretrain": "token shards -> BERT",
    "convert": "checkpoint -> Hugging Face folder",
    "finetune": "BERT -> classifier, against the same encoder from random weights",
}


def quickstart(run: Path, gpus: int) -> int:
    """Runs every stage into `run` and writes `run/summary.json`; returns the first exit code other than 0.

    `gpus` is the number of CUDA devices of this machine.
    """
    if not PRETRAINING.exists():
        raise UserError(f"there is no {PRETRAINING} here; run this in the folder that holds configs/")
    began = time.monotonic()
    all_stages = stages(run, gpus)
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


def stages(run: Path, gpus: int) -> list[tuple[str, str, list[str]]]:
    """Lists (name, title, command) of each stage; paths are overridden where `run` is not the configs'."""
    prep, pretrain, finetune = ([] for _ in range(3))
    if run != DEFAULT_RUN:
        prep = [f"input=[{run}/corpus]", f"output={run}/data"]
        pretrain = [f"run={run}/pretrain", f"data={run}/data"]
        finetune = [
            f"encoder={run}/pretrain",
            f"data.train={run}/task/train.jsonl",
            f"data.test={run}/task/test.jsonl",
            f"output={run}/finetune",
        ]
    commands = {
        "collect": ["python", "-m", "data_prep.docstrings", str(run)],
        "prep": ["bertscale", "prep", "configs/prep/quickstart.yaml", *prep],
        "pretrain": ["bertscale", "pretrain", str(PRETRAINING), *pretrain, *_devices(gpus)],
        "convert": ["bertscale", "convert", f"{run}/pretrain", f"{run}/hugging-face"],
        "finetune": ["bertscale", "finetune", "configs/finetune/quickstart.yaml", *finetune],
    }
    return [(name, TITLES[name], command) for name, command in commands.items()]


def _devices(gpus: int) -> list[str]:
    """Fits the config, which is for two ranks: one GPU takes tensor parallel 1, more than two stay unused."""
    if gpus == 1:
        return ["parallel.tensor=1"]
    return ["parallel.ranks=2"] if gpus > 2 else []


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
        "finetune": _read(run / f"finetune/{RESULT}"),
        "seconds": seconds,
        "paths": {folder.replace("-", "_"): f"{run}/{folder}" for folder in FOLDERS},
    }


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _show(summary: dict[str, Any]) -> str:
    """Formats the summary as aligned lines, then what to do next."""
    corpus, data, paths = summary["corpus"], summary["data"], summary["paths"]
    pretrain, finetune = summary["pretrain"], summary["finetune"]
    ours, random = finetune["pretrained"], finetune["random"]
    seconds = ", ".join(f"{name} {show_duration(value)}" for name, value in summary["seconds"].items())
    rows = {
        "corpus": f"{corpus['text_bytes'] / 1e6:.1f} MB of text, {corpus['documents']:,} documents "
        f"from {corpus['packages']} packages",
        "shards": f"{show_count(data['tokens'])} tokens, {data['sentences']:,} sentences, "
        f"{data['shards']} files",
        "model": f"{show_count(pretrain['parameters'])} parameters, {pretrain['precision']}",
        "loss": f"{pretrain['first_loss']:.3f} at first, {pretrain['last_loss']:.3f} at the end "
        f"({pretrain['steps']:,} steps); held-out MLM {pretrain['heldout_mlm_loss']:.3f}",
        "speed": f"{show_count(pretrain['tokens_per_second'])} tokens/s, MFU {100 * pretrain['mfu']:.1f} %"
        + (" of the peak measured at the start" if pretrain["mfu"] > 1 else ""),
        "accuracy": f"{ours['accuracy']:.3f} pretrained, {random['accuracy']:.3f} from random weights",
        "macro-F1": f"{ours['macro_f1']:.3f} pretrained, {random['macro_f1']:.3f} from random weights "
        f"(means of {len(ours['per_seed'])} seeds)",
        "time": seconds,
        "all of it": str(Path(paths["data"]).parent / "summary.json"),
    }
    lines = ["", "=== summary", *(f"{name:<10} {text}" for name, text in rows.items()), ""]
    lines += [
        "the curves:      .venv/bin/tensorboard --logdir " + paths["pretrain"],
        "what to try next: train longer, from where this run stopped:",
        f"  .venv/bin/bertscale pretrain {paths['pretrain']}/{CONFIG} train.steps={2 * pretrain['steps']}",
    ]
    return "\n".join(lines)
