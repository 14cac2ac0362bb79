"""Writes a checkpoint as the ranks of a run would, at any topology: in one process, without ranks.

    bertscale convert runs/a runs/b --as checkpoint --tensor-parallel 2 --data-parallel 4 --zero-stage 3

Where the fragments lie follows DeepSpeed: under ZeRO 1 and 2 the parameters of a group lie end to end and are
cut into equal parts over the data ranks, under ZeRO 3 each parameter is cut itself. One whole tensor is in
memory at a time: each fragment of it is written to its place in its shard.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bertscale.config import ModelConfig, UserError
from bertscale.config.pretrain import check_tensor_degree
from bertscale.convert.model_shape import native_shapes
from bertscale.convert.weights import Weights
from bertscale.model.layers import Layers
from bertscale.model.model import PretrainingModel
from bertscale.optim.groups import parameter_groups
from bertscale.train.checkpoint import file_entry, shard_name, write_table
from bertscale.train.checkpoint_table import FORMAT
from bertscale.train.parallel import take_share, tensor_parallel_dimension

ALIGNMENT = 2  # DeepSpeed pads a flattened group to a multiple of it for each data rank


class Topology(NamedTuple):
    """How many ranks share each layer, how many see disjoint samples, and what the latter shard."""

    tensor: int = 1
    data: int = 1
    zero_stage: int = 0

    def check(self, model: ModelConfig) -> None:
        """Raises UserError where no run of the model has this topology."""
        for key, value, most in (
            ("--tensor-parallel", self.tensor, 2**16),
            ("--data-parallel", self.data, 2**16),
            ("--zero-stage", self.zero_stage, 3),
        ):
            if not (key != "--zero-stage") <= value <= most:
                raise UserError(f"{key} {value}: give a number from {int(key != '--zero-stage')} to {most}")
        shapes = [("model.", model), *([("the generator's ", model.generator)] if model.generator else [])]
        try:
            check_tensor_degree(self.tensor, shapes)
        except ValueError as error:
            raise UserError(f"--tensor-parallel {self.tensor}: {error}") from error


class Place(NamedTuple):
    """A fragment: `length` values from `start` on of the flattened share of a tensor rank."""

    start: int
    length: int


def groups_of(model: ModelConfig, vocab_size: int, optimizer: str) -> list[list[str]]:
    """The parameters in the order of the groups that the optimizer of a run has."""
    with torch.device("meta"):
        skeleton: nn.Module = PretrainingModel(model, vocab_size, Layers())
    names = {id(parameter): name for name, parameter in skeleton.named_parameters()}
    groups = parameter_groups(skeleton, 0.0, matrices=optimizer == "muon")
    return [[names[id(parameter)] for parameter in group["params"]] for group in groups]


def places_of(
    shapes: Mapping[str, torch.Size], groups: Sequence[Sequence[str]], topology: Topology
) -> dict[tuple[int, int], dict[str, Place]]:
    """What each (tensor rank, data rank) writes, by the name of the parameter, so that each value is written
    once."""
    places: dict[tuple[int, int], dict[str, Place]] = {
        (tensor, data): {} for data in range(topology.data) for tensor in range(topology.tensor)
    }
    for group in groups:
        for data, name, place in _fragments(shapes, group, topology):
            for tensor in range(topology.tensor if tensor_parallel_dimension(name) is not None else 1):
                places[tensor, data][name] = place
    return places


def _fragments(
    shapes: Mapping[str, torch.Size], group: Sequence[str], topology: Topology
) -> Iterator[tuple[int, str, Place]]:
    """The fragments of the shares of a group, which are alike on all tensor ranks, with their data ranks."""
    sizes = {
        name: shapes[name].numel() // (1 if tensor_parallel_dimension(name) is None else topology.tensor)
        for name in group
    }
    end = 0  # of the parameters before, in the flattened group
    part = _divided(sum(sizes.values()), ALIGNMENT * topology.data) * ALIGNMENT
    for name, size in sizes.items():
        begin, end = end, end + size
        if topology.zero_stage == 0:
            yield 0, name, Place(0, size)
            continue
        if topology.zero_stage == 3:
            begin, part = 0, _divided(size, topology.data)
        for data in range(topology.data):
            first, last = max(begin, data * part), min(begin + size, (data + 1) * part)
            if first < last:
                yield data, name, Place(first - begin, last - first)


def _divided(number: int, by: int) -> int:
    return -(-number // by)


# ------------------------------------------------------------------------------------------- writing


def write_shards(
    folder: Path,
    weights: Weights,
    states: Mapping[str, Sequence[str]],
    topology: Topology,
    table: dict[str, Any],
) -> Iterator[int]:
    """Writes the shards and the table into `folder`, which has the tokenizer; gives the bytes of each tensor
    that is written.

    `states`: which states of which parameters. `table`: what else the table is to have. Raises OSError.
    """
    shapes = native_shapes(weights.model, weights.vocab_size)
    optimizer = ((table.get("config") or {}).get("optimizer") or {}).get("name", "adamw")
    places = places_of(shapes, groups_of(weights.model, weights.vocab_size, optimizer), topology)
    offsets = {
        ranks: _begin_shard(folder / shard_name(*ranks), inside, states) for ranks, inside in places.items()
    }
    for name in shapes:
        for state in states[name]:
            whole = weights.tensor(name, state)
            for tensor in range(topology.tensor if tensor_parallel_dimension(name) is not None else 1):
                share = take_share(whole, name, topology.tensor, tensor).reshape(-1)
                for data in range(topology.data):
                    if place := places[tensor, data].get(name):
                        values = share[place.start : place.start + place.length]
                        path = folder / shard_name(tensor, data)
                        _write_at(path, offsets[tensor, data][f"{state}:{name}"], values)
            yield whole.nbytes
    files = []
    for (tensor, data), inside in places.items():
        entry = file_entry(
            folder / shard_name(tensor, data), {name: list(place) for name, place in inside.items()}
        )
        files.append({**entry, "tensor_rank": tensor, "data_rank": data})
    parameters = {
        name: {
            "shape": list(shape),
            "tensor_parallel_dimension": tensor_parallel_dimension(name),
            "states": list(states[name]),
        }
        for name, shape in shapes.items()
    }
    write_table(
        folder,
        {"format": FORMAT, **table, "topology": topology._asdict(), "parameters": parameters, "files": files},
    )


def _begin_shard(
    path: Path, places: Mapping[str, Place], states: Mapping[str, Sequence[str]]
) -> dict[str, int]:
    """Writes the header of a shard, and makes the file as long as it will be; returns where its tensors
    begin, in bytes. Tensors and header are ordered as those that safetensors writes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    lengths = {f"{state}:{name}": place.length for name, place in places.items() for state in states[name]}
    end = 0
    for key, length in sorted(lengths.items()):
        begin, end = end, end + 4 * length
        header[key] = {"dtype": "F32", "shape": [length], "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    return {key: 8 + len(text) + header[key]["data_offsets"][0] for key in lengths}


def _write_at(path: Path, offset: int, values: Tensor) -> None:
    with open(path, "r+b", buffering=0) as file:
        file.seek(offset)
        file.write(values.contiguous().numpy().data)
