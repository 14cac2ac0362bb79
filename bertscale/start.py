"""What a command settles before its stage begins: its share of the work, digests, a full disk.

Used by `bertscale.cli` alone.
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

from bertscale.console import disk_full
from bertscale.errors import UserError

if TYPE_CHECKING:
    from bertscale.config import PretrainConfig


def prep_share(index: int | None, count: int | None) -> tuple[int, int] | None:
    """(task index, number of tasks) of the options or else of the Slurm array that this runs in, if any."""
    env = os.environ
    where = "--task-index"
    if index is None and "SLURM_ARRAY_TASK_ID" in env and "SLURM_ARRAY_TASK_MIN" in env:
        index, where = int(env["SLURM_ARRAY_TASK_ID"]), "SLURM_ARRAY_TASK_ID"
        if count is None:  # with a count, a part of the array may have been queued again
            index, where = index - int(env["SLURM_ARRAY_TASK_MIN"]), f"{where} - SLURM_ARRAY_TASK_MIN"
    if count is None and "SLURM_ARRAY_TASK_COUNT" in env:
        count = int(env["SLURM_ARRAY_TASK_COUNT"])
    if index is None and count is None:
        return None
    if index is None or count is None:
        missing = "--task-index" if index is None else "--task-count"
        raise UserError(f"a share of the splits needs --task-index and --task-count: {missing} is missing")
    if not 0 <= index < count:
        raise UserError(
            f"{where} is {index} of {count} tasks: they are counted from 0 to {count - 1}, without gaps"
        )
    return index, count


def verify(folder: str) -> None:
    """Compares all files of a prepared folder with the sizes and digests of its manifest."""
    from bertscale.data.shards import Split, open_dataset

    splits: tuple[Split, ...] = ("train", "validation")
    for split in splits:
        data = open_dataset(folder, split, verify=True)
        size = sum(shard.entry.bytes for shard in data.shards)
        print(
            f"{folder}: {split}: {len(data.shards)} shards, {size:,} bytes, "
            f"{data.num_documents:,} documents, {data.num_tokens:,} tokens: sizes and digests match"
        )


def train(config: PretrainConfig) -> int:
    """Trains as one rank; a full disk is a mistake that the person can mend, in one line."""
    from bertscale.train.pretrain import pretrain

    try:
        return pretrain(config)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(disk_full(error)) from error


def check_comparison(config: PretrainConfig, count: int) -> None:
    """Refuses what transformers' class, on one rank, cannot be compared with."""
    if count > 1:
        raise UserError(
            f"--against transformers compares on one rank, and this config starts {count}; add "
            "parallel.tensor=1 parallel.ranks=1"
        )
    if config.model.generator or not config.objectives.mlm:
        raise UserError(
            "--against transformers knows masked tokens and sentence pairs, not a generator; add "
            "model.generator_size=null objectives.mlm=1"
        )
