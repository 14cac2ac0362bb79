"""Ranks, their process groups, and which parameters tensor parallel shards.

Tensor-parallel ranks see identical batches and hold shares of each layer (Shoeybi et al., 2019);
data-parallel ranks see disjoint batches. Ranks are numbered tensor-parallel first: rank =
data_rank * tensor + tensor_rank, so that the ranks that share a layer are on one node.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from bertscale.config import UserError
from bertscale.model.layers import Layers, derive_seed

# The dimension of a parameter that is sharded; what is not named here is whole on every rank.
TENSOR_PARALLEL_DIMENSIONS = (
    (r"word_embeddings\.weight$", 0),
    (r"attention\.query_key_value\.(weight|bias)$", 0),
    (r"attention\.dense\.weight$", 1),
    (r"feed_forward\.intermediate\.(weight|bias)$", 0),
    (r"feed_forward\.dense\.weight$", 1),
    (r"predictions\.decoder\.(weight|bias)$", 0),
)


def tensor_parallel_dimension(name: str) -> int | None:
    """The dimension of the parameter `name` that tensor parallel shards; None: it is whole on each rank."""
    return next((dim for pattern, dim in TENSOR_PARALLEL_DIMENSIONS if re.search(pattern, name)), None)


def take_share(full: Tensor, name: str, degree: int, rank: int) -> Tensor:
    """The share of the whole parameter `full` that tensor rank `rank` of `degree` holds."""
    dim = tensor_parallel_dimension(name)
    return full if dim is None or degree == 1 else full.chunk(degree, dim)[rank]


@dataclass(frozen=True)
class Ranks:
    """The rank of this process and its groups; `world` = `tensor` x `data`."""

    rank: int
    world: int
    tensor: int  # ranks that share a layer
    device: torch.device
    data_group: Any = None  # the process group of the ranks that hold the same share of each layer
    tensor_group: Any = None  # of the ranks that share each layer

    @property
    def data(self) -> int:
        """Ranks that see disjoint samples."""
        return self.world // self.tensor

    @property
    def tensor_rank(self) -> int:
        return self.rank % self.tensor

    @property
    def data_rank(self) -> int:
        return self.rank // self.tensor

    def layers(self, sequence: bool = False) -> Layers:
        """The layers to build the model of; `sequence`: tokens between layers are sharded as well."""
        if self.tensor == 1:
            return Layers()
        from bertscale.model.tensor_parallel import SequenceParallelLayers, TensorParallelLayers

        kind = SequenceParallelLayers if sequence else TensorParallelLayers
        return kind(self.tensor, self.tensor_rank, self.device)

    def sum(self, *values: float) -> list[float]:
        """Sums numbers of the host over all ranks, in float64; on gloo, so that no rank waits for its GPU."""
        total = torch.tensor(values, dtype=torch.float64)
        if self.world > 1:
            dist.all_reduce(total)
        return [float(value) for value in total]

    def sum_over_data(self, *values: float) -> list[float]:
        """Sums numbers of the host over the data ranks. Tensor-parallel peers, which see the same samples,
        count as one, with their mean."""
        return [total / self.tensor for total in self.sum(*values)]

    def broadcast(self, value: Any) -> Any:
        """Returns rank 0's `value` on every rank."""
        box = [value]
        if self.world > 1:
            dist.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Returns every rank's `value`, in the order of ranks, on every rank."""
        values = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        """Waits until all ranks are here."""
        self.sum(0.0)

    def say(self, line: str) -> None:
        """Prints once, from the first rank."""
        if self.rank == 0:
            print(line, flush=True)


def start_ranks(tensor: int, device: torch.device, timeout: timedelta = timedelta(minutes=30)) -> Ranks:
    """Joins the process group of RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT and makes the subgroups.

    Raises UserError when `tensor` does not divide the number of ranks.
    """
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if world % tensor:
        raise UserError(f"parallel.tensor={tensor} does not divide the number of ranks, {world}")
    if not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(device)
        # Both backends: numbers of the host go over gloo, so that no rank waits for its GPU to send them.
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, rank=rank, world_size=world, timeout=timeout)
    if tensor == 1:
        # Local: else every rank would have to take part in making the group of each other one.
        alone = dist.new_group([rank], use_local_synchronization=True)
        return Ranks(rank, world, tensor, device, dist.group.WORLD, alone)
    from bertscale.model.tensor_parallel import make_groups

    return Ranks(rank, world, tensor, device, *make_groups(tensor))


def leave_subgroups(ranks: Ranks) -> None:
    """Leaves the groups of tensor parallel, so that `start_ranks` may be called with another `tensor`."""
    if ranks.tensor > 1:
        from bertscale.model.tensor_parallel import leave_groups

        leave_groups()


def stop_ranks() -> None:
    """Leaves the groups that `start_ranks` made."""
    if dist.is_initialized():
        dist.destroy_process_group()


class ModelParallelUnit:
    """The ranks that share layers, as DeepSpeed asks for them of an `mpu` (model parallel unit)."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks

    def get_model_parallel_group(self) -> Any:
        return self.ranks.tensor_group

    def get_model_parallel_rank(self) -> int:
        return self.ranks.tensor_rank

    def get_model_parallel_world_size(self) -> int:
        return self.ranks.tensor

    get_tensor_model_parallel_group = get_model_parallel_group
    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size

    def get_data_parallel_group(self) -> Any:
        return self.ranks.data_group

    def get_data_parallel_rank(self) -> int:
        return self.ranks.data_rank

    def get_data_parallel_world_size(self) -> int:
        return self.ranks.data


def seed_dropout(layers: Layers, seed: int, step: int, micro_step: int, ranks: Ranks) -> None:
    """Seeds dropout by (seed, step, micro-batch, data rank), so that a resumed run draws the same."""
    shared = derive_seed("dropout", seed, step, micro_step, ranks.data_rank)
    layers.seed(shared, derive_seed("sharded dropout", shared, ranks.tensor_rank))
