"""Time and memory of `bertscale convert` on large checkpoints, against `cp` of the same bytes.

    python benchmarks/convert.py                     # 29 M parameters, a minute at most
    python benchmarks/convert.py --config configs/pretrain/megatron-bert-1.3b.yaml --folder /scratch --json
    FILE

A checkpoint of random weights is written as ranks at (2, 2, 3) would (2 tensor-parallel x 2 data-parallel,
ZeRO 3), without moments; then it is converted by the command, in a process of its own: to a Hugging Face
folder, and to a checkpoint at (1, 4, 2). `cp` copies its files and flushes them, as a conversion does, before
and after each of the two. A conversion reads the source for its digest, reads it and writes, and reads both
to compare them; what it has written of a checkpoint once more, for its digest. Memory is the process's
highest: `RssAnon` of /proc/PID/status, looked at every 20 ms, is what is not backed by files; `VmHWM` has the
pages of mapped files in it too, which can be dropped.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bertscale.bench.machine import processor
from bertscale.config import ModelConfig, PretrainConfig, load_config
from bertscale.convert.model_shape import native_shapes
from bertscale.export.checkpoint import kept_states
from bertscale.export.topology import Topology, write_shards
from bertscale.files import sync
from bertscale.tokenizer import load_tokenizer

PIECES = 30_522  # of the vocabulary
GOAL = 1 / 3  # of the speed of cp
MEMORY = 6 * 2**30
CASES: dict[str, list[str]] = {
    "to Hugging Face": ["--as", "pretraining", "--no-show"],
    "to (1, 4, 2)": [
        *("--as", "checkpoint", "--no-show"),
        *("--tensor-parallel", "1", "--data-parallel", "4", "--zero-stage", "2"),
    ],
}


class RandomWeights:
    """Native weights of a model, drawn when they are asked for."""

    def __init__(self, model: ModelConfig, tokenizer: Path) -> None:
        self.folder, self.model, self.tokenizer = tokenizer.parent, model, tokenizer
        self.vocab_size = load_tokenizer(tokenizer).vocab_size
        self.parameters: Mapping[str, torch.Size] = native_shapes(model, self.vocab_size)

    def states(self, name: str) -> tuple[str, ...]:
        """The weight alone."""
        return ("weight",)

    def tensor(self, name: str, state: str = "weight") -> Tensor:
        """Small random values; 1 for the weights of norms."""
        if "LayerNorm.weight" in name:
            return torch.ones(self.parameters[name])
        value = torch.empty(self.parameters[name]).uniform_(-0.03, 0.03)
        if name.endswith(("word_embeddings.weight", "decoder.bias")):
            value[self.vocab_size :] = 0
        return value

    def digest(self) -> str:
        """They are no files."""
        return ""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", type=Path, default=Path("configs/pretrain/bert-small.yaml"))
    parser.add_argument("--folder", type=Path, help="Where to write; three times the weights are needed.")
    parser.add_argument("--json", type=Path, help="File for the results.")
    options = parser.parse_args()
    model = load_config(PretrainConfig, options.config, []).model
    machine = {"processor": processor(), "torch": torch.__version__, "load": round(os.getloadavg()[0], 1)}
    print(f"{machine['processor']}, torch {machine['torch']}, load {machine['load']}")
    results = []
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        source = Path(scratch) / "source"
        weights = RandomWeights(model, made_up_tokenizer(Path(scratch)))
        count = sum(shape.numel() for shape in weights.parameters.values())
        write_source(source, weights)
        size = sum(file.stat().st_size for file in source.iterdir())
        print(f"{options.config.stem}: {count / 1e6:,.0f} M parameters, {size / 1e9:.2f} GB at (2, 2, 3)")
        print(f"{'':<18}{'convert':>10}{'cp':>10}{'times cp':>10}{'RssAnon':>10}{'VmHWM':>10}")
        for name, words in CASES.items():
            copies = [copy(source, Path(scratch) / "copy")]
            seconds, anonymous, highest = convert(source, Path(scratch) / "out", words)
            copies.append(copy(source, Path(scratch) / "copy"))
            peer = sum(copies) / 2
            print(
                f"{name:<18}{seconds:>8.1f} s{peer:>8.1f} s{seconds / peer:>10.1f}"
                f"{anonymous / 2**30:>7.2f} GB{highest / 2**30:>7.2f} GB",
                flush=True,
            )
            case = f"{options.config.stem} {name}"
            speeds = {"ours": size / seconds, "peer": size / peer, "unit": "bytes/s", "goal": GOAL}
            results.append({"case": case, **speeds, "ratio": peer / seconds})
            memory = {"ours": anonymous, "peer": MEMORY, "unit": "bytes of memory", "goal": 1.0}
            results.append({"case": f"{case}, memory", **memory, "ratio": MEMORY / anonymous})
    if options.json:
        options.json.write_text(json.dumps({"machine": machine, "results": results}, indent=1))
    return 0


def made_up_tokenizer(folder: Path) -> Path:
    """A WordPiece vocabulary as large as that of BERT."""
    pieces = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *(f"word{number}" for number in range(PIECES - 5)),
    ]
    (folder / "vocab.txt").write_text("\n".join(pieces) + "\n", encoding="utf-8")
    return folder / "vocab.txt"


def write_source(folder: Path, weights: RandomWeights) -> None:
    """The checkpoint that is converted."""
    folder.mkdir()
    tokenizer = load_tokenizer(weights.tokenizer)
    tokenizer.save(folder)
    table: dict[str, Any] = {
        "has_moments": False,
        "model": weights.model.model_dump(),
        "vocab_size": weights.vocab_size,
        "step": 0,
        "samples_consumed": 0,
        "tokenizer_sha256": tokenizer.sha256,
        "data_digest": None,
        "config": None,
    }
    states, _ = kept_states(weights)
    for _ in write_shards(folder, weights, states, Topology(2, 2, 3), table):
        pass


def copy(source: Path, target: Path) -> float:
    """Seconds of a copy that is on the disk."""
    begin = time.perf_counter()
    subprocess.run(["cp", "-r", source, target], check=True)
    for file in target.iterdir():
        sync(file)
    seconds = time.perf_counter() - begin
    shutil.rmtree(target)
    return seconds


def convert(source: Path, output: Path, words: list[str]) -> tuple[float, int, int]:
    """Seconds of a conversion in a process of its own, and its highest memory in bytes: RssAnon and VmHWM."""
    command = [sys.executable, "-m", "bertscale", "convert", str(source), str(output), *words]
    begin, highest = time.perf_counter(), {"RssAnon": 0, "VmHWM": 0}
    process = subprocess.Popen(command)
    while process.poll() is None:
        status = Path(f"/proc/{process.pid}/status").read_text()
        for name in highest:
            if found := re.search(rf"{name}:\s+(\d+) kB", status):
                highest[name] = max(highest[name], 1024 * int(found.group(1)))
        time.sleep(0.02)
    seconds = time.perf_counter() - begin
    if process.returncode:
        raise SystemExit(process.returncode)
    shutil.rmtree(output)
    return seconds, highest["RssAnon"], highest["VmHWM"]


if __name__ == "__main__":
    sys.exit(main())
