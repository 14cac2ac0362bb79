"""Ready batches, ours against transformers' DataCollatorForLanguageModeling in a torch DataLoader.

    python benchmarks/loader.py                     # on the quickstart's data, made if it is not there
    python benchmarks/loader.py --data FOLDER --json FILE

Same shards, same samples, same masking rates, in turns, on one core to which this process is bound: our
background thread as `bertscale pretrain` runs it, their collator in the process of the loop (a worker
would be a second core). Their samples are handed over as lists of ids with their special-token masks (and
offsets for whole words), as a tokenized data set gives them. Rates count real tokens.

Start and resume: an index of 10^9 samples, the blocks of the data over and over, is read, and the batch
of a step is made, from nothing; seconds, and the largest memory that Python and numpy held.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import tracemalloc
import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset
from transformers import AutoTokenizer, DataCollatorForLanguageModeling

from bertscale.bench.machine import processor
from bertscale.config import SamplesConfig
from bertscale.data.index import BlockIndex, load_index
from bertscale.data.loader import Loader
from bertscale.data.mixture import Mixture
from bertscale.data.samples import Sampler
from bertscale.data.shards import Dataset, open_dataset
from bertscale.tokenizer import Tokenizer, load_tokenizer

BATCH = 256  # samples of a global step and of their batches
CASES: list[tuple[str, dict[str, Any], float]] = [
    ("packed MLM 128", {"kind": "packed", "max_length": 128}, 20e6),
    ("packed MLM 512", {"kind": "packed", "max_length": 512}, 20e6),
    ("whole words 128", {"kind": "packed", "max_length": 128, "mask_unit": "word"}, 10e6),
    ("NSP pairs 128", {"kind": "nsp", "max_length": 128}, 5e6),
]
SIMULATED = 10**9  # samples


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, help="Output folder of `bertscale prep`.")
    parser.add_argument("--json", type=Path, help="File for the results.")
    parser.add_argument("--rounds", type=int, default=5, help="Turns of each side, after one of warm-up.")
    parser.add_argument("--steps", type=int, default=200, help="Our steps of a turn; theirs are a tenth.")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", message="Random token replacement is not supported")
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    dataset = open_dataset(options.data or quickstart_data())
    tokenizer = load_tokenizer(dataset.tokenizer_path)
    load = os.getloadavg()[0]
    machine = {"processor": processor(), "torch": torch.__version__, "load": round(load, 1)}
    print(f"{machine['processor']}, one core, torch {machine['torch']}, {dataset.folder}, load {load:.1f}")
    print(f"{'':<20}{'ours':>18}{'transformers':>18}{'ratio':>8}{'goal':>18}")
    results = []
    for name, settings, goal in CASES:
        ours, theirs, ratio = compare(dataset, tokenizer, settings, options.steps, options.rounds)
        print(
            f"{name:<20}{ours:>12,.0f} tok/s{theirs:>12,.0f} tok/s{ratio:>8.1f}{goal:>12,.0f} tok/s",
            flush=True,
        )
        results.append(
            {
                "case": name,
                "ours": round(ours),
                "peer": round(theirs),
                "unit": "tokens/s",
                "ratio": round(ratio, 1),
                "goal": goal,
            }
        )
    for kind in ("packed", "nsp"):
        for name, step in (("start", 0), ("resume", SIMULATED // BATCH * 7 // 10)):
            seconds, megabytes = start(dataset, kind, step)
            case = f"{name} of 10^9, {kind}"
            print(f"{case:<20}{seconds:>16.3f} s{megabytes:>15.1f} MB{'':>8}{'1 s, 100 MB':>18}", flush=True)
            results += [
                {
                    "case": case,
                    "ours": round(value, 3),
                    "peer": limit,
                    "unit": unit,
                    "ratio": round(limit / value, 1),
                    "goal": 1.0,
                }
                for value, limit, unit in ((seconds, 1.0, "s"), (megabytes, 100.0, "MB"))
            ]
    if options.json:
        options.json.write_text(json.dumps({"machine": machine, "results": results}, indent=1) + "\n")
    return 0


def compare(
    dataset: Dataset, tokenizer: Tokenizer, settings: dict[str, Any], steps: int, rounds: int
) -> tuple[float, float, float]:
    """Tokens a second of ours and theirs, and the ratio; medians over the rounds."""
    mixture = Mixture([dataset], [1.0], SamplesConfig(**settings), global_batch=BATCH, seed=0)
    loader = Loader(mixture, tokenizer, micro_batch=32, rank=0, world=1)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.export_hugging_face(folder, settings["max_length"])
        fast = AutoTokenizer.from_pretrained(folder)
    words = settings.get("mask_unit") == "word"
    collator = DataCollatorForLanguageModeling(fast, mlm_probability=0.15, whole_word_mask=words)
    samples = Samples(loader, tokenizer, offsets=words)
    rates: list[list[float]] = [[], []]
    for turn in range(rounds + 1):
        first = turn * steps
        began = time.perf_counter()
        tokens = sum(len(b.tokens) for _, batches in loader.iterate(first, first + steps) for b in batches)
        ours = tokens / (time.perf_counter() - began)
        their_steps = range(first, first + max(1, steps // 10))
        numbers = [i for k in their_steps for i in range(k * BATCH, (k + 1) * BATCH)]
        began = time.perf_counter()
        tokens = 0
        for batch in DataLoader(samples, BATCH, sampler=numbers, collate_fn=collator):
            tokens += int(batch["attention_mask"].sum())
        if turn:
            rates[0].append(ours)
            rates[1].append(tokens / (time.perf_counter() - began))
    ratio = statistics.median(a / b for a, b in zip(*rates, strict=True))
    return statistics.median(rates[0]), statistics.median(rates[1]), ratio


class Samples(TorchDataset[dict[str, Any]]):
    """The loader's own samples before masking, one at a time; what they are made of is known beforehand,
    a thousand at a time, which costs next to nothing here."""

    def __init__(self, loader: Loader, tokenizer: Tokenizer, *, offsets: bool) -> None:
        self.loader, self.tokenizer, self.offsets = loader, tokenizer, offsets
        self.first = 0
        self.rows: list[list[tuple[int, int, int, int]]] = []  # (shard, begin, end, kind) of the pieces
        self.special = np.zeros(tokenizer.vocab_size, np.int64)
        self.special[list(tokenizer.special_ids)] = 1

    def __getitem__(self, number: int) -> dict[str, Any]:
        if not 0 <= number - self.first < len(self.rows):
            self._plan(number)
        ids: list[int] = []
        types: list[int] = []
        loader = self.loader
        for shard, begin, end, kind in self.rows[number - self.first]:
            if kind == 0:
                ids.append(loader.cls_id)
            ids += loader.shard_tokens[shard][begin:end].tolist()
            ids.append(loader.sep_id)
            types += [kind] * (len(ids) - len(types))
        sample = {
            "input_ids": ids,
            "token_type_ids": types,
            "attention_mask": [1] * len(ids),
            "special_tokens_mask": self.special[ids].tolist(),
        }
        if self.loader.mixture.samples.has_pairs:
            sample["next_sentence_label"] = number & 1
        if self.offsets:  # a gap before each word
            ends = np.arange(1, len(ids) + 1) + np.cumsum(self.tokenizer.starts_word[ids])
            spans = np.stack([ends - 1, ends], axis=1).tolist()
            longest = self.loader.mixture.samples.max_length
            sample["offset_mapping"] = spans + [[0, 0]] * (longest - len(ids))  # which they do not pad
        return sample

    def _plan(self, number: int) -> None:
        numbers = np.arange(number, number + 1024)
        segments = self.loader.mixture.segments(self.loader.mixture.phases[0], numbers)
        shard = np.searchsorted(self.loader.shard_start, segments.start, side="right") - 1
        begin = segments.start - self.loader.shard_start[shard]
        columns = (shard, begin, begin + segments.length, segments.kind)
        segment_rows = list(zip(*(column.tolist() for column in columns), strict=True))
        edges = np.searchsorted(segments.sample, np.arange(len(numbers) + 1)).tolist()
        self.rows = [segment_rows[a:b] for a, b in pairwise(edges)]
        self.first = number


def start(dataset: Dataset, kind: str, step: int) -> tuple[float, float]:
    """Seconds and megabytes from a kept index of 10^9 samples to the segments of global step `step`."""
    real = load_index(dataset, "packed" if kind == "packed" else "pairs", 128)
    times = -(-SIMULATED // int(real.samples.sum(dtype=np.int64)))
    samples = np.arange(step * BATCH, (step + 1) * BATCH)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "index.npy"
        np.save(path, np.tile(np.stack(real), times))

        def begin() -> float:
            began = time.perf_counter()
            index = BlockIndex(*np.load(path))
            sampler = Sampler(dataset, kind, 128, window_blocks=64, seed=0, index=index)
            assert sampler.num_samples >= SIMULATED
            assert len(sampler.segments(samples, samples).start) >= BATCH
            return time.perf_counter() - began

        seconds = statistics.median(begin() for _ in range(3))
        tracemalloc.start()
        begin()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return seconds, peak / 1e6


def quickstart_data() -> Path:
    """Returns the quickstart's data; without it, the same data made in runs/benchmark."""
    existing = Path("runs/quickstart/data")
    if (existing / "manifest.json").is_file():
        return existing
    folder = Path("runs/benchmark")
    for command in (
        ["data_prep.docstrings", str(folder)],
        [
            "bertscale",
            "prep",
            "configs/prep/quickstart.yaml",
            f"input=[{folder}/corpus]",
            f"output={folder}/data",
        ],
    ):
        subprocess.run([sys.executable, "-m", *command], check=True)
    return folder / "data"


if __name__ == "__main__":
    sys.exit(main())
