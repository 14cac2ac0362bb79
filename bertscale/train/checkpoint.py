"""Checkpoints: written whole or not at all, read as full tensors whatever the topology that wrote them.

A checkpoint is a folder `step-0000100` with
    bertscale.json                 facts, the parameter table, and per file its fragments, size and digest
    shard-t00-d00.safetensors      what tensor rank 0, data rank 0 held: float32 weights and Adam moments
    tokenizer.model                or tokenizer.json
Each shard holds flat fragments named `state:parameter`; the table says where in the tensor rank's flattened
share of the parameter a fragment starts. Parameters that are whole on every tensor rank are written by
tensor rank 0 alone. The folder is written under a temporary name and renamed: one with the final name
is whole. DeepSpeed's own files are not used: they are pickles, its reader runs what is in them, and
they fit one topology only.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import struct
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from bertscale.config import ModelConfig, UserError, check_config
from bertscale.files import (
    file_digest,
    fresh_folder,
    json_digest,
    partial_folder,
    put_in_place,
    sync,
    write_json,
)
from bertscale.run_folder import CHECKPOINTS, TABLE, checkpoint_step, checkpoints
from bertscale.tokenizer import find_tokenizer, load_tokenizer
from bertscale.train.checkpoint_table import AVERAGE, DIGEST, FORMAT, STATES, check_files, read_table
from bertscale.train.parallel import Ranks


@dataclass(frozen=True)
class StateFragment:
    """This rank's part of one parameter: views of the float32 tensors that the optimizer updates.

    `start` is an index in the tensor rank's flattened share; `states` has 1-D views of equal length, by the
    names of `STATES`.
    """

    name: str
    start: int
    states: dict[str, Tensor]


# ------------------------------------------------------------------------------------------- writing


def shard_name(tensor_rank: int, data_rank: int) -> str:
    """The name of the file that a rank writes."""
    return f"shard-t{tensor_rank:02d}-d{data_rank:02d}.safetensors"


def write_shard(folder: Path, name: str, fragments: Iterable[StateFragment]) -> dict[str, Any]:
    """Writes one rank's fragments and returns the file's entry in the table. Raises OSError."""
    full = [fragment for fragment in fragments if fragment.states["weight"].numel()]
    tensors = {
        f"{state}:{fragment.name}": value.detach().cpu().contiguous()
        for fragment in full
        for state, value in fragment.states.items()
    }
    path = folder / name
    save_tensors(path, tensors)
    sync(path)
    pieces = {fragment.name: [fragment.start, fragment.states["weight"].numel()] for fragment in full}
    return file_entry(path, pieces)


def file_entry(path: Path, pieces: dict[str, list[int]]) -> dict[str, Any]:
    """A file's entry in the table; `pieces` is the format's word for fragments: name -> [start, length]."""
    return {
        "name": path.name,
        "bytes": path.stat().st_size,
        "digest": file_digest(path),
        "pieces": pieces,
    }


def save_checkpoint(
    final: Path, fragments: Iterable[StateFragment], table: dict[str, Any], tokenizer: Path, ranks: Ranks
) -> None:
    """Writes the checkpoint `final`, all ranks together, each its `fragments`; `table` is the first rank's.

    If the disk fails one rank, all of them learn of it before the folder gets its name: then it is removed,
    and each of them raises UserError. No rank leaves early: the others would hang in the next collective.
    """
    partial = partial_folder(final)
    failure: str | None = None
    entry: dict[str, Any] = {}
    if ranks.rank == 0:
        failure = _attempt(lambda: shutil.copyfile(tokenizer, fresh_folder(final) / tokenizer.name))
    ranks.barrier()  # the folder is there
    if failure is None:

        def write() -> None:
            name = shard_name(ranks.tensor_rank, ranks.data_rank)
            entry.update(write_shard(partial, name, fragments))
            entry.update(tensor_rank=ranks.tensor_rank, data_rank=ranks.data_rank)

        failure = _attempt(write)
    reports: list[Any] = ranks.gather((failure, entry))  # of every rank, on every rank
    failure = next((text for text, _ in reports if text), None)
    if failure is None and ranks.rank == 0:
        whole = {"format": FORMAT, "has_moments": True, **table, "files": [file for _, file in reports]}
        failure = _attempt(lambda: commit(partial, final, whole))
    failure = ranks.broadcast(failure)
    if failure:
        if ranks.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise UserError(f"cannot write the checkpoint {final}: {failure}; earlier checkpoints are intact")


def _attempt(work: Callable[[], object]) -> str | None:
    """Does the work; returns an operating system's error in words, so that all ranks can agree on it."""
    try:
        work()
    except OSError as error:
        return os.strerror(error.errno) if error.errno else str(error)
    return None


def commit(partial: Path, final: Path, table: dict[str, Any]) -> None:
    """Writes the table into `partial` and gives the folder its final name. Raises OSError.

    The ranks have flushed their own files: thousands of them, again and one by one, would hold up all.
    """
    write_table(partial, table)
    put_in_place(partial, final, flushed={file["name"] for file in table["files"]})


def write_table(folder: Path, table: dict[str, Any]) -> None:
    """Writes the table, with a digest of itself. Raises OSError."""
    write_json(folder / TABLE, {**table, DIGEST: json_digest(table)}, flush=False)


# ------------------------------------------------------------------------------------------- reading


class Checkpoint:
    """A checkpoint as one dictionary of full float32 tensors, assembled when asked for.

    Files are memory-mapped: asking for one tensor reads that tensor alone.
    """

    def __init__(self, folder: Path, table: dict[str, Any]) -> None:
        self.folder = folder
        self.table = table
        self.model: ModelConfig = check_config(ModelConfig, table["model"], str(folder / TABLE))
        self.vocab_size: int = table["vocab_size"]
        self.step: int = table["step"]
        self.samples_consumed: int = table["samples_consumed"]
        self.skipped_steps: int = table.get("skipped_steps", 0)  # of the steps, those that changed nothing
        self.elapsed_seconds: float = table.get("elapsed_seconds", 0.0)  # of training
        self.updates_before: int = table.get("updates_before", 0)  # by the runs that it took the moments from
        self.causal: bool = table.get("causal", False)  # trained to predict next tokens (objectives.clm)
        self.lineage: list[dict[str, Any]] = table.get(
            "lineage", []
        )  # what its run started from, oldest first
        self.parameters: dict[str, dict[str, Any]] = table["parameters"]
        self._open: dict[str, Any] = {}
        # (parameter, tensor rank) -> (start, length, file) of its fragments, by their starts.
        self._fragments: dict[tuple[str, int], list[tuple[int, int, str]]] = defaultdict(list)
        for file in table["files"]:
            for name, (start, length) in file["pieces"].items():
                self._fragments[name, file["tensor_rank"]].append((start, length, file["name"]))
        for fragments in self._fragments.values():
            fragments.sort()

    @property
    def updates(self) -> int:
        """Counts the updates that the moments have seen: skipped steps did not change them."""
        return self.updates_before + self.step - self.skipped_steps

    @property
    def has_moments(self) -> bool:
        """Whether the optimizer's moments are here (not in a checkpoint from Hugging Face)."""
        return bool(self.table["has_moments"])

    @property
    def has_average(self) -> bool:
        """Whether a moving average of the weights is here (train.average)."""
        return all(AVERAGE in entry.get("states", STATES) for entry in self.parameters.values())

    @property
    def tokenizer(self) -> Path:
        """The path of its tokenizer."""
        return find_tokenizer(self.folder)

    def states(self, name: str) -> tuple[str, ...]:
        """What is here of a parameter: weight, moments, average."""
        return tuple(self.parameters[name].get("states", STATES if self.has_moments else STATES[:1]))

    def tensor(self, name: str, state: str = "weight") -> Tensor:
        """Assembles a whole tensor, float32, on the CPU: `state` is weight, exp_avg, exp_avg_sq or average.

        Raises KeyError for an unknown parameter or a state that its optimizer does not keep, UserError for a
        damaged file.
        """
        entry = self.parameters[name]
        if state not in entry.get("states", STATES):
            raise KeyError(f"{state} of {name}")
        shape, dim = entry["shape"], entry["tensor_parallel_dimension"]
        degree = self.degree(name)
        if degree == 1:
            return self.part(name, state, 0, 0, torch.Size(shape).numel()).view(shape)
        whole = torch.empty(shape)
        for rank, share in enumerate(whole.chunk(degree, dim)):
            share.copy_(self.part(name, state, rank, 0, share.numel()).view(share.shape))
        return whole

    def degree(self, name: str) -> int:
        """Counts the shares in which a parameter is kept, one of each tensor rank."""
        sharded = self.parameters[name]["tensor_parallel_dimension"] is not None
        return int(self.table["topology"]["tensor"]) if sharded else 1

    def part(self, name: str, state: str, tensor_rank: int, start: int, length: int) -> Tensor:
        """Reads `length` values from `start` on of a tensor rank's flattened share, float32, on the CPU.

        Only files that hold some of these values are opened. Raises UserError for a damaged one.
        """
        values, end = torch.empty(length), start + length
        fragments = self._fragments[name, tensor_rank]
        first = max(0, bisect_right(fragments, start, key=itemgetter(0)) - 1)
        for begin, size, file in fragments[first : bisect_left(fragments, end, key=itemgetter(0))]:
            low, high = max(start, begin), min(end, begin + size)
            if low < high:
                piece = self._piece(file, f"{state}:{name}", size)
                values[low - start : high - start] = piece[low - begin : high - begin]
        return values

    def digest(self) -> str:
        """Digest of the table, after all files were compared with it; raises UserError that names a damaged
        one."""
        self.verify()
        tokenizer = find_tokenizer(self.folder)
        if hashlib.sha256(tokenizer.read_bytes()).hexdigest() != self.table["tokenizer_sha256"]:
            raise UserError(
                f"{tokenizer} is not the tokenizer that the checkpoint was trained with (its SHA-256 differs "
                f"from {TABLE}'s); put that file back or use another checkpoint"
            )
        return file_digest(self.folder / TABLE)

    def verify(self, part: int = 0, parts: int = 1) -> None:
        """Compares digests with the table, of the files `part`, `part` + `parts`, ...; raises UserError that
        names the damaged file."""
        for file in self.table["files"][part::parts]:
            if file_digest(self.folder / file["name"]) != file["digest"]:
                raise UserError(
                    f"the checkpoint file {self.folder / file['name']} is damaged: its digest differs from "
                    f"{TABLE}'s; use another checkpoint"
                )

    def _piece(self, file: str, name: str, length: int) -> Tensor:
        path = self.folder / file
        try:
            if file not in self._open:
                self._open[file] = safe_open(path, framework="pt")
            values: Tensor = self._open[file].get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"the checkpoint file {path} is damaged: {error}; use another checkpoint"
            ) from error
        if values.shape != (length,):
            raise UserError(
                f"the checkpoint file {path} is damaged: {name} has the shape {list(values.shape)}"
            )
        return values


class AveragedCheckpoint(Checkpoint):
    """A checkpoint whose weights are the moving average that its run has kept of them."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        """Raises UserError where there is no average."""
        if not checkpoint.has_average:
            raise UserError(
                f"{checkpoint.folder} holds no average of the weights; a run with train.average keeps one"
            )
        super().__init__(checkpoint.folder, checkpoint.table)

    def states(self, name: str) -> tuple[str, ...]:
        """The weight alone: the moments are those of another one."""
        return STATES[:1]

    def part(self, name: str, state: str, tensor_rank: int, start: int, length: int) -> Tensor:
        """As that of a checkpoint, but `weight` is the average."""
        return super().part(name, AVERAGE if state == "weight" else state, tensor_rank, start, length)

    def digest(self) -> str:
        """As that of a checkpoint, and another one than its."""
        return f"{super().digest()}-{AVERAGE}"


def prune(run: Path, keep: int, every: int | None = None, read: Collection[int] = ()) -> None:
    """Removes all but the newest `keep` checkpoints of a run, those of steps that are multiples of `every`,
    and those of the steps `read`, which a process reads. Raises OSError."""
    for folder in checkpoints(run)[:-keep]:
        step = checkpoint_step(folder) or 0
        if step in read or (every and step % every == 0):
            continue
        (folder / TABLE).unlink()  # first: without it a half removed folder is no checkpoint
        shutil.rmtree(folder)


def open_checkpoint(folder: Path, part: int = 0, parts: int = 1) -> Checkpoint:
    """Opens a checkpoint folder, or the newest checkpoint of a run folder.

    Looks for the files `part`, `part` + `parts`, ... of the table: where several ranks open it, each looks
    for its own, since thousands that look for thousands of files hold up a file system. Raises UserError
    where there is none, it was never committed, or a file is missing or truncated.
    """
    if not folder.is_dir():
        raise UserError(f"there is no checkpoint {folder}: no such folder")
    if (folder / CHECKPOINTS).is_dir():
        finished = checkpoints(folder)
        if not finished:
            raise UserError(f"the run {folder} has no finished checkpoint yet")
        return open_checkpoint(finished[-1], part, parts)
    table = read_table(folder)
    check_files(folder, table, part, parts)
    return Checkpoint(folder, table)


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Writes a safetensors file with the permissions that the umask gives. Raises OSError."""
    try:
        save_file(tensors, path, {"format": "pt", **(metadata or {})})
    except SafetensorError as error:  # it wraps the operating system's errors
        match = re.search(r"os error (\d+)", str(error))
        number = int(match.group(1)) if match else errno.EIO
        raise OSError(number, os.strerror(number) if match else str(error), str(path)) from error
    umask = os.umask(0)
    os.umask(umask)
    path.chmod(0o666 & ~umask)  # safetensors lets the owner alone read it


NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}  # in a safetensors header


def stream_tensors(
    path: Path,
    shapes: dict[str, torch.Size],
    tensors: Iterable[tuple[str, Tensor]],
    dtype: torch.dtype = torch.float32,
) -> str:
    """Writes a safetensors file of tensors of `dtype`, of which only one is in memory at a time; returns the
    digest of its bytes.

    `tensors` come in the order of `shapes` and have these. Raises OSError.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0  # of the tensors before, in bytes
    for name, shape in shapes.items():
        start, end = end, end + dtype.itemsize * shape.numel()
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors are aligned
    head = struct.pack("<Q", len(text)) + text
    digest = xxhash.xxh3_128(head)
    with open(path, "wb") as file:
        file.write(head)
        for expected, (name, value) in zip(shapes.items(), tensors, strict=True):
            assert expected == (name, value.shape)
            assert value.dtype == dtype
            content = value.contiguous().flatten().view(torch.uint8).numpy().data
            digest.update(content)
            file.write(content)
    return digest.hexdigest()


def write_whole(
    folder: Path,
    table: dict[str, Any],
    tensors: Iterable[tuple[str, Tensor]],
    tokenizer: Path,
    shapes: dict[str, torch.Size] | None = None,
) -> None:
    """Writes whole weights (no moments) as the checkpoint of one rank into `folder`, the table last.

    With `shapes`, those of the tensors in their order, only one tensor is in memory at a time. Raises
    OSError.
    """
    folder.mkdir(parents=True, exist_ok=True)
    load_tokenizer(tokenizer).save(folder)
    if shapes is None:
        held = dict(tensors)
        shapes, tensors = {name: value.shape for name, value in held.items()}, held.items()
    path = folder / shard_name(0, 0)
    lengths = {name: shape.numel() for name, shape in shapes.items()}
    stream_tensors(
        path,
        {f"weight:{name}": torch.Size([length]) for name, length in lengths.items()},
        ((f"weight:{name}", value.float().flatten()) for name, value in tensors),
    )
    sync(path)
    entry = file_entry(path, {name: [0, length] for name, length in lengths.items()})
    parameters = {n: {"shape": list(shape), "tensor_parallel_dimension": None} for n, shape in shapes.items()}
    write_table(
        folder,
        {
            "format": FORMAT,
            "has_moments": False,
            "step": 0,
            "samples_consumed": 0,
            "topology": {"tensor": 1, "data": 1, "zero_stage": 0},
            **table,
            "parameters": parameters,
            "files": [{**entry, "tensor_rank": 0, "data_rank": 0}],
        },
    )
