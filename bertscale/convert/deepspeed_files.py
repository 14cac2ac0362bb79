"""Whole tensors of a checkpoint that DeepSpeed has written, read without DeepSpeed; no code in a pickle runs.

    files = open_deepspeed(Path("runs/theirs/global_step600"))
    files.tensor("encoder.pooler.weight", "exp_avg")     # as it is stored, memory-mapped until it is whole

| folder                | its files                                                                       |
| --------------------- | ------------------------------------------------------------------------------- |
| ZeRO 1 and 2          | mp_rank_TT_model_states.pt, zero_pp_rank_D_mp_rank_TT_optim_states.pt           |
| ZeRO 3                | zero_pp_rank_D_mp_rank_TT_model_states.pt, zero_pp_rank_D_mp_rank_TT_optim_...  |
| universal             | zero/PARAMETER/fp32.pt, exp_avg.pt, exp_avg_sq.pt, step.pt; *_model_states.pt   |

TT is the tensor rank, D the data rank. Under ZeRO 1 and 2 a group's parameters lie end to end, cut into equal
parts over the data ranks, and each file says where in its part a fragment lies; under ZeRO 3 each parameter
is cut into equal parts itself, the last one padded.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from bertscale.config import UserError
from bertscale.config.table import damaged
from bertscale.convert.tensor_files import load_pickle
from bertscale.train.checkpoint_table import STATES
from bertscale.train.parallel import tensor_parallel_dimension

REMEDY = "use another checkpoint, or DeepSpeed's own zero_to_fp32.py and give the file that it writes"
OPTIMIZER_FILE = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
ZERO = "zero"  # the folder of the parameters in a universal checkpoint
WEIGHT = "fp32"  # what DeepSpeed calls our state `weight`
LATEST = ("latest", "latest_universal")  # files with the name of the newest checkpoint


class _Inert:
    """Stands for a class of DeepSpeed that its pickles name: it keeps what they say of it, and does
    nothing."""


# What DeepSpeed's files name beside tensors and containers, and what is made instead.
CLASSES: list[Any] = [
    (_Inert, "deepspeed.utils.tensor_fragment.fragment_address"),
    (_Inert, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (_Inert, "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"),
    (int, "deepspeed.runtime.zero.config.ZeroStageEnum"),
]


class DeepSpeedFiles(Protocol):
    """Gives whole tensors by the names of their parameters.

    `updates` is the number of steps that the moments have seen, `paths` are all files that are read.
    """

    paths: list[Path]
    shapes: dict[str, torch.Size]
    updates: int

    def states(self, name: str) -> tuple[str, ...]: ...  # weight, and the moments that are there

    def tensor(self, name: str, state: str = "weight") -> Tensor: ...


def find_deepspeed(path: Path) -> Path | None:
    """Returns the folder of a checkpoint of DeepSpeed: `path`, or the newest one in it; None where `path` is
    no such thing."""
    if is_deepspeed(path):
        return path
    for name in LATEST:
        if (path / name).is_file():
            tag = (path / name).read_text(encoding="utf-8", errors="replace").strip()
            if re.fullmatch(r"\w[\w.-]*", tag) and is_deepspeed(path / tag):
                return path / tag
            raise UserError(
                f"{path / name} names {tag[:60]!r}, which is no folder with optimizer states of ZeRO or a "
                "universal checkpoint; give such a folder, or of a run without ZeRO a file of its weights "
                "alone"
            )
    return None


def is_deepspeed(folder: Path) -> bool:
    """Tells whether the folder itself holds a checkpoint of DeepSpeed, sharded or universal."""
    if not folder.is_dir():
        return False
    return any((folder / ZERO).glob(f"*/{WEIGHT}.pt")) or any(
        OPTIMIZER_FILE.fullmatch(file.name) for file in folder.iterdir()
    )


def open_deepspeed(folder: Path) -> DeepSpeedFiles:
    """Opens what `find_deepspeed` has found. Raises UserError where a file is missing or damaged."""
    universal = (folder / ZERO).is_dir()
    return _Universal(folder) if universal else _Sharded(folder)


def _load(path: Path) -> Any:
    if not path.is_file():
        raise UserError(f"{path.parent} lacks {path.name}; {REMEDY}")
    return load_pickle(path, REMEDY, CLASSES)


@contextmanager
def _understanding(path: Path) -> Iterator[None]:
    """Turns errors of the content of `path`, which is not as DeepSpeed writes it, into a UserError."""
    try:
        yield
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        reason = f"its content is not what DeepSpeed 0.19 writes ({type(error).__name__}: {error})"
        raise damaged(path, reason, REMEDY) from error


# ------------------------------------------------------------------------------------------ ZeRO 1 to 3


class _Fragment(NamedTuple):
    """`length` values from `offset` on of a flat tensor of the file of a data rank."""

    data_rank: int
    group: int  # the number of the flat tensor
    offset: int
    length: int


class _Sharded:
    """The files that the ranks of a run have written, one of optimizer states each."""

    def __init__(self, folder: Path) -> None:
        found = [OPTIMIZER_FILE.fullmatch(file.name) for file in sorted(folder.iterdir())]
        grid = {(int(each.group(2)), int(each.group(1))): folder / each.string for each in found if each}
        self.tensor_ranks, self.data_ranks = (1 + max(key[axis] for key in grid) for axis in (0, 1))
        for tensor_rank in range(self.tensor_ranks):
            for data_rank in range(self.data_ranks):
                if (tensor_rank, data_rank) not in grid:
                    raise UserError(
                        f"{folder} lacks the file zero_pp_rank_{data_rank}_mp_rank_{tensor_rank:02d}_optim_"
                        f"states.pt, and has those of {self.tensor_ranks} x {self.data_ranks} ranks; {REMEDY}"
                    )
        self._grid = grid
        self._files = {key: _load(path) for key, path in sorted(grid.items())}
        self._fragments: dict[tuple[str, int], list[_Fragment]] = defaultdict(list)
        self._shares: dict[str, torch.Size] = {}
        with _understanding(grid[0, 0]):
            self.stage = int(self._optimizer(0, 0)["zero_stage"])
        start = "mp_rank" if self.stage < 3 else "zero_pp_rank_0_mp_rank"
        models = [folder / f"{start}_{rank:02d}_model_states.pt" for rank in range(self.tensor_ranks)]
        for tensor_rank, path in enumerate(models):
            opened = _load(path)
            with _understanding(path):
                shapes = [dict(group) for group in opened["param_shapes"]]
            for data_rank in range(self.data_ranks):
                with _understanding(grid[tensor_rank, data_rank]):
                    self._note(tensor_rank, data_rank, shapes)
        self.paths = sorted([*grid.values(), *models])
        updates = {}
        for key, path in grid.items():
            with _understanding(path):
                updates[path] = int(self._states(*key)[0].get("step", 0))
        self.updates = updates[grid[0, 0]]
        for path, steps in updates.items():
            if steps != self.updates:
                reason = f"it is of step {steps}, and {grid[0, 0].name} of step {self.updates}"
                raise damaged(path, reason, REMEDY)
        self.shapes = {name: self._whole(name, share) for name, share in self._shares.items()}
        for name, share in self._shares.items():
            for tensor_rank in range(self._degree(name)):
                length = sum(each.length for each in self._fragments[name, tensor_rank])
                if length != share.numel():
                    reason = f"its files hold {length:,} of {share.numel():,} values of {name}"
                    raise damaged(grid[tensor_rank, 0], reason, REMEDY)

    def states(self, name: str) -> tuple[str, ...]:
        """The states that are there of a parameter."""
        (first, *_) = self._fragments[name, 0]
        kept = self._states(0, first.data_rank)[first.group]
        return tuple(state for state in STATES if state == "weight" or state in kept)

    def tensor(self, name: str, state: str = "weight") -> Tensor:
        """Puts the tensor together: the fragments of the data ranks, then the shares of the tensor ranks."""
        shares = []
        for tensor_rank in range(self._degree(name)):
            parts = []
            for fragment in self._fragments[name, tensor_rank]:
                with _understanding(self._grid[tensor_rank, fragment.data_rank]):
                    flat = self._flat(tensor_rank, fragment, state).detach().view(-1)
                    parts.append(flat.narrow(0, fragment.offset, fragment.length))
            shares.append(torch.cat(parts).view(self._shares[name]))
        return shares[0] if len(shares) == 1 else torch.cat(shares, tensor_parallel_dimension(name) or 0)

    def _note(self, tensor_rank: int, data_rank: int, shapes: list[dict[str, torch.Size]]) -> None:
        """Keeps where the fragments of a file lie; `shapes` are those of the shares, by group."""
        optimizer = self._optimizer(tensor_rank, data_rank)
        counts = optimizer["partition_count"]
        if {*(counts if isinstance(counts, list) else [counts])} != {self.data_ranks}:
            raise ValueError(
                f"partition_count is {counts}, and files of {self.data_ranks} data ranks are there"
            )
        for group, names in enumerate(shapes):
            self._shares.update({name: torch.Size(shape) for name, shape in names.items()})
            offset = 0
            if self.stage < 3:
                places = [
                    (name, address.start, address.numel)
                    for name, address in optimizer["param_slice_mappings"][group].items()
                ]
            else:
                places = []
                for name, shape in names.items():
                    whole = torch.Size(shape).numel()
                    part = -(-whole // self.data_ranks)
                    places.append((name, offset, max(0, min(part, whole - part * data_rank))))
                    offset += part
            end = max((start + length for _, start, length in places), default=0)
            there = self._flat(tensor_rank, _Fragment(data_rank, group, 0, 0), "weight").numel()
            if end > there or (self.stage == 3 and offset != there):
                raise ValueError(f"group {group} has {there:,} values instead of {max(end, offset):,}")
            for name, start, length in places:
                if length:
                    fragment = _Fragment(data_rank, group, int(start), int(length))
                    self._fragments[name, tensor_rank].append(fragment)

    def _optimizer(self, tensor_rank: int, data_rank: int) -> Any:
        return self._files[tensor_rank, data_rank]["optimizer_state_dict"]

    def _states(self, tensor_rank: int, data_rank: int) -> Any:
        """The moments, by the number of the flat tensor."""
        key = "base_optimizer_state" if self.stage < 3 else "optimizer_state_dict"
        return self._optimizer(tensor_rank, data_rank)[key]["state"]

    def _flat(self, tensor_rank: int, fragment: _Fragment, state: str) -> Tensor:
        if state == "weight":
            key = "single_partition_of_fp32_groups" if self.stage < 3 else "fp32_flat_groups"
            values: Tensor = self._optimizer(tensor_rank, fragment.data_rank)[key][fragment.group]
        else:
            values = self._states(tensor_rank, fragment.data_rank)[fragment.group][state]
        return values

    def _degree(self, name: str) -> int:
        return 1 if tensor_parallel_dimension(name) is None else self.tensor_ranks

    def _whole(self, name: str, share: torch.Size) -> torch.Size:
        shape, dim = list(share), tensor_parallel_dimension(name)
        if dim is not None:
            shape[dim] *= self.tensor_ranks
        return torch.Size(shape)


# --------------------------------------------------------------------------------------------- universal


class _Universal:
    """A folder for each parameter, a file for each of its states."""

    def __init__(self, folder: Path) -> None:
        self._folders = {
            file.parent.name: file.parent for file in sorted((folder / ZERO).glob(f"*/{WEIGHT}.pt"))
        }
        self.paths = [file for each in self._folders.values() for file in sorted(each.glob("*.pt"))]
        shapes = self._saved_shapes(folder)
        self.shapes = {}
        for name, place in self._folders.items():
            path = place / f"{WEIGHT}.pt"
            with _understanding(path):
                stored = self._stored(path)
                # ZeRO 3 without tensor ranks gives flat tensors.
                flat = stored.dim() == 1 and name in shapes and shapes[name].numel() == stored.numel()
                self.shapes[name] = shapes[name] if flat else stored.shape
        self.updates = self._updates(folder)

    def states(self, name: str) -> tuple[str, ...]:
        """The states that are there of a parameter."""
        return tuple(state for state in STATES if self._path(name, state).is_file())

    def tensor(self, name: str, state: str = "weight") -> Tensor:
        """Reads a tensor."""
        path = self._path(name, state)
        with _understanding(path):
            return self._stored(path).view(self.shapes[name])

    def _path(self, name: str, state: str) -> Path:
        return self._folders[name] / f"{WEIGHT if state == 'weight' else state}.pt"

    def _stored(self, path: Path) -> Tensor:
        values = _load(path)
        tensor: Tensor = values["param"] if isinstance(values, dict) else values
        return tensor.detach()

    def _saved_shapes(self, folder: Path) -> dict[str, torch.Size]:
        """The shapes that a rank's model states tell, the whole ones where there is one tensor rank."""
        path = next(iter(sorted(folder.glob("*mp_rank_00_model_states.pt"))), None)
        if path is None or any(folder.glob("*mp_rank_01_model_states.pt")):
            return {}
        opened = _load(path)
        with _understanding(path):
            groups = opened["param_shapes"] or []
            return {name: torch.Size(shape) for group in groups for name, shape in group.items()}

    def _updates(self, folder: Path) -> int:
        path = next(iter(self._folders.values())) / "step.pt"
        if path.is_file():
            with _understanding(path):
                return int(_load(path))
        path = folder / ZERO / "optimizer_state.pt"
        if not path.is_file():
            return 0
        opened = _load(path)
        self.paths.append(path)
        with _understanding(path):
            return int(opened["optimizer_state_dict"]["state"][0]["step"])
