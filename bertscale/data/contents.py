"""Looks once at what shards hold before it is trained on: rows that fit together, ids of the vocabulary.

    check_contents(datasets, tokenizer.vocab_size, ranks)

A digest tells whether a byte has changed, but comparing it costs every start a pass over all data. This pass
is made once for each shard, by all ranks together, and what it has found is kept beside the shards in
DATA/.index, with the size and the time of the file (in memory alone where that cannot be written).
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bertscale.config import UserError
from bertscale.data.index import FOLDER, Peers
from bertscale.data.shards import Dataset, Shard
from bertscale.files import write_json
from bertscale.progress import Progress

VERSION = 1
ROWS_AT_ONCE = 2**18
TOKENS_AT_ONCE = 2**22
SHOWS_PROGRESS = 2**28  # bytes of a rank from which on the pass shows its progress


def check_contents(datasets: Sequence[Dataset], vocab_size: int, peers: Peers | None = None) -> None:
    """Raises UserError for a shard whose rows do not fit together, or with an id outside of the vocabulary.

    `peers`: the ranks of a job, all of which must call and raise the same; each reads every `world`-th shard.
    """
    for dataset in datasets:
        for shard, largest in zip(dataset.shards, _largest_ids(dataset, peers), strict=True):
            if largest >= vocab_size:
                raise _outside(shard, largest, vocab_size)


def check_shard(shard: Shard, vocab_size: int) -> None:
    """The same of one shard, of which nothing is kept."""
    if (largest := largest_id(shard)) >= vocab_size:
        raise _outside(shard, largest, vocab_size)


def largest_id(shard: Shard) -> int:
    """The largest id in a shard, or -1; raises UserError where its rows do not fit together."""
    rows = len(shard.documents)
    for offsets, values in (
        (shard.token_offsets, shard.tokens),
        (shard.sentence_offsets, shard.sentence_lengths),
    ):
        if len(offsets) != rows + 1 or offsets[0] != 0 or offsets[-1] != len(values):
            raise _unfitting(shard)
    for begin in range(0, rows, ROWS_AT_ONCE):
        tokens = shard.token_offsets[begin : begin + ROWS_AT_ONCE + 1].astype(np.int64)
        edges = shard.sentence_offsets[begin : begin + ROWS_AT_ONCE + 1].astype(np.int64)
        first, last = int(edges[0]), int(edges[-1])
        if (np.diff(tokens) < 0).any() or (np.diff(edges) < 0).any():
            raise _unfitting(shard)
        sums = np.zeros(last - first + 1, np.int64)  # tokens in all sentences before each
        np.cumsum(shard.sentence_lengths[first:last], out=sums[1:])
        if (np.diff(sums[edges - first]) != np.diff(tokens)).any():
            raise _unfitting(shard)
    parts = range(0, len(shard.tokens), TOKENS_AT_ONCE)
    return max((int(shard.tokens[begin : begin + TOKENS_AT_ONCE].max()) for begin in parts), default=-1)


def _largest_ids(dataset: Dataset, peers: Peers | None) -> list[int]:
    """The largest id in each shard, of the pass that was made before or of one that is made now."""
    rank, world = (peers.rank, peers.world) if peers else (0, 1)
    # The first rank decides for all: on a slow shared file system some might see the file, and others read.
    path = dataset.folder / FOLDER / f"ids-{dataset.split}-{dataset.manifest_digest}.json"
    known = _read(path, dataset) if rank == 0 else {}
    known = peers.broadcast(known) if peers else known
    missing = [shard for shard in dataset.shards if shard.entry.name not in known]
    if not missing:
        return [known[shard.entry.name] for shard in dataset.shards]
    to_read = missing[rank::world]
    largest = dict[str, int]()
    size = sum(shard.entry.bytes for shard in to_read)
    hidden = rank > 0 or size < SHOWS_PROGRESS
    try:
        with Progress(f"checking ids in {dataset.folder}", size, "bytes", hidden=hidden) as progress:
            for shard in to_read:
                largest[shard.entry.name] = largest_id(shard)
                progress.advance(shard.entry.bytes)
        mine: dict[str, int] | UserError = largest
    except UserError as error:  # told to all ranks, which would wait for this one
        mine = error
    for result in peers.gather(mine) if peers else [mine]:
        if isinstance(result, UserError):
            raise result
        known |= result
    if rank == 0:
        with contextlib.suppress(OSError):  # a folder that is read-only, or full: read again next time
            path.parent.mkdir(exist_ok=True)
            write_json(path, {"version": VERSION, "files": _files(dataset), "largest": known})
    return [known[shard.entry.name] for shard in dataset.shards]


def _read(path: Path, dataset: Dataset) -> dict[str, int]:
    """The largest ids that were found before in the shards whose files have not changed since."""
    try:
        stored = json.loads(path.read_bytes())
        if stored["version"] != VERSION:
            return {}
        same = {name for name, facts in _files(dataset).items() if stored["files"].get(name) == facts}
        return {name: int(largest) for name, largest in stored["largest"].items() if name in same}
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError):
        return {}  # there is none, or one that is damaged


def _files(dataset: Dataset) -> dict[str, list[str | int]]:
    """What tells the file of each shard from a changed one: digest in the manifest, bytes, time of change."""
    return {
        shard.entry.name: [shard.entry.digest, shard.entry.bytes, shard.path.stat().st_mtime_ns]
        for shard in dataset.shards
    }


_REMEDY = "delete it and run `bertscale prep` again"


def _outside(shard: Shard, largest: int, vocab_size: int) -> UserError:
    return UserError(
        f"the shard {shard.path} is damaged: it has the id {largest:,}, and its tokenizer {vocab_size:,} "
        f"pieces; {_REMEDY}"
    )


def _unfitting(shard: Shard) -> UserError:
    return UserError(f"the shard {shard.path} is damaged: its rows do not fit together; {_REMEDY}")
