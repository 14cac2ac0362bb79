"""What a checkpoint of 64, 512 and 8,000 ranks asks of a file system, without GPUs or processes.

python benchmarks/scale.py

Files have no content: counted and timed is what one rank does beside reading and writing its own values. Each
row is a ZeRO-3 run; its growth is read down a column.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from bertscale.config import ModelConfig
from bertscale.files import fresh_folder, put_in_place
from bertscale.run_folder import TABLE
from bertscale.train.checkpoint import Checkpoint, shard_name
from bertscale.train.checkpoint_table import check_files

RANKS = (64, 512, 8000)
PARAMETERS = 200  # of a network of twelve layers
VALUES = 4  # of a parameter on a rank


def table_of(ranks: int) -> dict[str, Any]:
    """The table of a checkpoint that so many data-parallel ranks have written."""
    names = [f"parameter{number}" for number in range(PARAMETERS)]
    files = [
        {
            "name": shard_name(0, rank),
            "bytes": 0,
            "digest": "0" * 32,
            "tensor_rank": 0,
            "data_rank": rank,
            "pieces": {name: [rank * VALUES, VALUES] for name in names},
        }
        for rank in range(ranks)
    ]
    entry = {"shape": [ranks * VALUES], "tensor_parallel_dimension": None}
    return {
        "model": ModelConfig().model_dump(),
        "vocab_size": 1,
        "step": 1,
        "samples_consumed": 1,
        "topology": {"tensor": 1, "data": ranks, "zero_stage": 3},
        "parameters": dict.fromkeys(names, entry),
        "files": files,
    }


def measure(ranks: int, parent: Path) -> list[str]:
    """One row: counts, and seconds of one rank."""
    table, final = table_of(ranks), parent / f"ranks-{ranks}"
    partial = fresh_folder(final)
    names = {file["name"] for file in table["files"]}
    for name in names:
        (partial / name).touch()
    (partial / TABLE).write_text(json.dumps(table))
    megabytes = (partial / TABLE).stat().st_size / 1e6
    with mock.patch.object(os, "fsync", wraps=os.fsync) as fsync:
        begin = time.perf_counter()
        put_in_place(partial, final, flushed=names)
        commit_seconds = time.perf_counter() - begin
    with mock.patch.object(Path, "stat", autospec=True, side_effect=Path.stat) as stat:
        begin = time.perf_counter()
        check_files(final, table, 0, ranks)
        look_seconds = time.perf_counter() - begin
    opened: set[str] = set()

    def piece(self: Checkpoint, file: str, name: str, length: int) -> Tensor:
        opened.add(file)
        return torch.zeros(length)

    with mock.patch.object(Checkpoint, "_piece", piece):
        begin = time.perf_counter()
        checkpoint = Checkpoint(final, table)
        for name in table["parameters"]:
            for state in ("weight", "exp_avg", "exp_avg_sq"):
                checkpoint.part(name, state, 0, ranks // 2 * VALUES, VALUES)
        read_seconds = time.perf_counter() - begin
    counts = [ranks, len(names), fsync.call_count, stat.call_count, len(opened)]
    seconds = [commit_seconds, look_seconds, read_seconds]
    return [f"{count:,}" for count in counts] + [f"{megabytes:.1f}"] + [f"{value:.3f}" for value in seconds]


def main() -> None:
    """Prints the table."""
    heads: tuple[str, ...] = (
        "ranks",
        "files",
        "flushes of rank 0",
        "looks of a rank",
        "files opened",
        "table MB",
    )
    heads += ("commit s", "look s", "index and read s")
    print("| " + " | ".join(heads) + " |\n|" + " ---: |" * len(heads))
    with tempfile.TemporaryDirectory() as folder:
        for ranks in RANKS:
            print("| " + " | ".join(measure(ranks, Path(folder))) + " |", flush=True)


if __name__ == "__main__":
    main()
