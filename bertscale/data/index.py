"""The block index of a data set: blocks of whole documents and the number of samples in each.

A block holds about 2**19 tokens, 1 MiB: one read of a disk. The samples of a form (see `chunks`) and length
are counted once, by all ranks together, and kept beside the shards in DATA/.index (in memory alone where that
cannot be written), so that a run starts and resumes at once and holds 24 bytes for 2**19 tokens.

    index = load_index(dataset, "pairs", max_length=128)

B: blocks.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import xxhash

from bertscale.config import UserError
from bertscale.data.chunks import Blocks, BlockSamples, Form
from bertscale.data.masking import Ints
from bertscale.data.shards import Dataset
from bertscale.files import write_bytes
from bertscale.progress import Progress

BLOCK_TOKENS = 2**19
FOLDER = ".index"
FORMAT = b"bertscale blocks 1\n"
BLOCKS_AT_ONCE = 8  # counted together: enough to forget numpy's cost of a call, few enough for the memory
SHOWS_PROGRESS = 256  # blocks of a rank from which on counting shows its progress


class Peers(Protocol):
    """What the ranks of a job need to count together; `parallel.Ranks` has it."""

    @property
    def rank(self) -> int: ...
    @property
    def world(self) -> int: ...
    def broadcast(self, value: Any) -> Any: ...
    def gather(self, value: Any) -> list[Any]: ...


class BlockIndex(NamedTuple):
    """Blocks in the order of the data set, int32 [B] each; the first three columns are those of `Blocks`."""

    shard: npt.NDArray[np.int32]
    row: npt.NDArray[np.int32]  # first row of the shard
    rows: npt.NDArray[np.int32]
    samples: npt.NDArray[np.int32]
    documents: npt.NDArray[np.int32]  # with text, long enough
    one_token: npt.NDArray[np.int32]  # documents of one token, which cannot be two segments


def load_index(
    dataset: Dataset, form: Form, max_length: int, peers: Peers | None = None, min_tokens: int = 1
) -> BlockIndex:
    """Reads the index of a form and length, or counts it where there is none of these very shards.

    Of documents of at least `min_tokens` tokens; blocks that have none are left out.

    `peers`: the ranks of a job, all of which must call; each counts every `world`-th block. Raises UserError,
    on all ranks, for a damaged shard.
    """
    digest = dataset.manifest_digest
    longer = f"-from-{min_tokens}" if min_tokens > 1 else ""
    name = f"{dataset.split}-{form}-{max_length}{longer}-{BLOCK_TOKENS}-{digest}"
    path = dataset.folder / FOLDER / name
    rank, world = (peers.rank, peers.world) if peers else (0, 1)
    # The first rank decides for all: on a slow shared file system some might see the file, and others count.
    stored = _read(path, dataset) if rank == 0 else None
    stored = peers.broadcast(stored) if peers else stored
    if stored is not None:
        return stored
    blocks = cut_blocks(dataset)
    mine: npt.NDArray[np.int64] | UserError
    try:
        every = np.arange(rank, len(blocks.shard), world)
        mine = _count(dataset, blocks, form, max_length, every, rank, min_tokens)
    except UserError as error:  # told to all ranks, which would wait for this one
        mine = error
    by_rank = peers.gather(mine) if peers else [mine]
    for result in by_rank:
        if isinstance(result, UserError):
            raise result
    counts = np.empty((3, len(blocks.shard)), np.int64)  # [3, B]
    for peer, result in enumerate(by_rank):
        counts[:, peer::world] = result
    has_documents = counts[1] > 0  # [B]
    index = BlockIndex(*(column[has_documents].astype(np.int32) for column in (*blocks, *counts)))
    if rank == 0:
        with contextlib.suppress(OSError):  # a folder that is read-only, or full: counted again next time
            path.parent.mkdir(exist_ok=True)
            content = np.stack(index).tobytes()
            write_bytes(path, FORMAT + xxhash.xxh3_128_digest(content) + content)
    return index


def cut_blocks(dataset: Dataset) -> Blocks:
    """Cuts each shard, between documents, into blocks of about BLOCK_TOKENS tokens, at least one each.

    A document that is longer than a block makes one alone, so a shard may have fewer blocks than planned.
    """
    shards, firsts, sizes = [], [], []
    for number, shard in enumerate(dataset.shards):
        tokens = len(shard.tokens)
        offsets = shard.token_offsets
        count = max(1, round(tokens / BLOCK_TOKENS))
        edges = np.searchsorted(offsets[:-1], np.arange(count) * tokens // count)  # [count] first rows
        edges[0] = 0  # rows without text at the shard's begin belong to its first block
        edges = np.append(np.unique(edges), len(offsets) - 1)  # [blocks + 1]
        full = np.flatnonzero(np.diff(offsets[edges]) > 0)
        shards.append(np.full(len(full), number))
        firsts.append(edges[full])
        sizes.append(np.diff(edges)[full])
    none = np.zeros(0, np.int64)
    return Blocks(*(np.concatenate([none, *parts]).astype(np.int64) for parts in (shards, firsts, sizes)))


def _count(
    dataset: Dataset, blocks: Blocks, form: Form, max_length: int, mine: Ints, rank: int, min_tokens: int = 1
) -> npt.NDArray[np.int64]:
    """Samples, documents and documents of one token in the blocks `mine`, [3, len(mine)]."""
    parts = [np.zeros((3, 0), np.int64)]
    hidden = rank > 0 or len(mine) < SHOWS_PROGRESS
    with Progress(f"counting samples in {dataset.folder}", len(mine), "blocks", hidden=hidden) as progress:
        for begin in range(0, len(mine), BLOCKS_AT_ONCE):
            few = mine[begin : begin + BLOCKS_AT_ONCE]
            cut = BlockSamples(dataset, blocks, few, form, max_length, min_tokens)
            parts.append(np.stack([cut.samples_per_block, cut.documents_per_block, cut.one_token_documents]))
            progress.advance(len(few))
    return np.concatenate(parts, axis=1)


def _read(path: Path, dataset: Dataset) -> BlockIndex | None:
    """The stored index; None where there is none, or one that is damaged."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    head, digest, body = content[: len(FORMAT)], content[len(FORMAT) :][:16], content[len(FORMAT) + 16 :]
    if head != FORMAT or digest != xxhash.xxh3_128_digest(body) or len(body) % 24:
        return None
    index = BlockIndex(*np.frombuffer(body, np.int32).reshape(6, -1))  # [6, B]
    return index if index.shard.max(initial=-1) < len(dataset.shards) else None
