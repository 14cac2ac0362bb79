"""Pieces of parameters: what lies where in the tensors of a sharded optimizer, and how to make them whole.

DeepSpeed hands an optimizer flat tensors in which pieces of many parameters lie end to end (ZeRO 1 to 3), or
whole tensors (stage 0); tensor-parallel ranks hold shares besides. A `Layout` says what lies where in one
tensor; a `Trade` brings the pieces of each matrix to one rank and takes them back.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class Segment(NamedTuple):
    """`length` values of a parameter's flattened share, from `start` on, that lie at `offset` of a tensor."""

    parameter: int  # its number in `Layout.parameters`
    start: int
    offset: int
    length: int


@dataclass(frozen=True)
class Parameter:
    """What is to be known of a whole parameter. `share` is the shape of one tensor rank's share."""

    name: str
    share: tuple[int, ...]
    dim: int | None  # the dimension that tensor ranks share out; None: it is whole on each
    degree: int  # tensor-parallel ranks

    @property
    def shares(self) -> int:
        return 1 if self.dim is None else self.degree

    @property
    def numel(self) -> int:
        """Values of the whole parameter."""
        return torch.Size(self.share).numel() * self.shares


@dataclass(frozen=True)
class Layout:
    """What lies in one tensor that the optimizer updates, on each rank of the group that shares it out.

    `parameters` are the same on all of those ranks, so that they make the same collectives; ranks that hold
    nothing of a parameter have no segment of it. Ranks are numbered within `group`. Where no matrices
    travel, the segments of other ranks may be left empty.
    """

    parameters: tuple[Parameter, ...]
    segments: tuple[tuple[Segment, ...], ...]  # by rank
    tensor_ranks: tuple[int, ...]  # by rank: which share of a parameter its segments are of
    rank: int  # this one
    group: Any  # a process group; None: all ranks

    @property
    def mine(self) -> tuple[Segment, ...]:
        return self.segments[self.rank]

    def counts(self, segment: Segment, rank: int) -> bool:
        """Whether the segment is the one copy that counts: parameters may be whole on each tensor rank."""
        return self.tensor_ranks[rank] == 0 or self.parameters[segment.parameter].dim is not None

    def views(self, values: Tensor) -> list[Tensor]:
        """This rank's segments of `values`, a tensor laid out so, flat."""
        flat = values.view(-1)
        return [flat.narrow(0, segment.offset, segment.length) for segment in self.mine]


class Trade:
    """Brings the pieces of each parameter of a layout to one rank, and what became of them back.

    The rank is one of those that hold most of the parameter, the one with the least work so far, so that
    each matrix is worked on once and those that lie whole on a rank stay there.
    """

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        owners = self._owners()
        ranks = range(len(layout.segments))

        def between(holder: int, owner: int, *, copies: bool) -> list[Segment]:
            return [
                segment
                for segment in layout.segments[holder]
                if owners[segment.parameter] == owner and (copies or layout.counts(segment, holder))
            ]

        me = layout.rank
        self.sends = [between(me, owner, copies=False) for owner in ranks]
        self.takes = [between(holder, me, copies=False) for holder in ranks]
        self.returns = [between(holder, me, copies=True) for holder in ranks]
        self.gets = [between(me, owner, copies=True) for owner in ranks]
        self.owned = sorted({segment.parameter for part in self.takes for segment in part})

    def _owners(self) -> list[int]:
        layout = self.layout
        held = [[0] * len(layout.segments) for _ in layout.parameters]
        for rank, segments in enumerate(layout.segments):
            for segment in segments:
                if layout.counts(segment, rank):
                    held[segment.parameter][rank] += segment.length
        load = [0] * len(layout.segments)
        owners = []
        for parameter, amounts in zip(layout.parameters, held, strict=True):
            fit = [rank for rank, amount in enumerate(amounts) if amount == max(amounts)]
            owner = min(fit, key=lambda rank: load[rank])
            owners.append(owner)
            load[owner] += parameter.numel * min(parameter.share)
        return owners

    def change_whole(self, flat: Tensor, change: Callable[[str, Tensor], Tensor]) -> None:
        """Replaces each parameter in `flat` by `change(name, whole parameter)`, which keeps the shape."""
        layout = self.layout
        shares = {
            index: flat.new_empty(p.shares, torch.Size(p.share).numel())
            for index in self.owned
            for p in [layout.parameters[index]]
        }
        sent = [[flat[s.offset : s.offset + s.length] for s in part] for part in self.sends]
        for holder, segment, values in self._send(flat, sent, self.takes):
            self._of(shares, segment, holder).copy_(values)
        for number, parts in shares.items():
            parameter = layout.parameters[number]
            dim = parameter.dim or 0
            whole = torch.cat([part.view(parameter.share) for part in parts], dim)
            changed = change(parameter.name, whole).chunk(parameter.shares, dim)
            for part, values in zip(parts, changed, strict=True):
                part.view(parameter.share).copy_(values)
        back = [
            [self._of(shares, segment, holder) for segment in part]
            for holder, part in enumerate(self.returns)
        ]
        for _, segment, values in self._send(flat, back, self.gets):
            flat[segment.offset : segment.offset + segment.length] = values

    def _of(self, shares: dict[int, Tensor], segment: Segment, holder: int) -> Tensor:
        """Where a segment of rank `holder` lies in the whole parameter."""
        split = self.layout.parameters[segment.parameter].dim is not None
        share = shares[segment.parameter][self.layout.tensor_ranks[holder] if split else 0]
        return share[segment.start : segment.start + segment.length]

    def _send(
        self, like: Tensor, parts: list[list[Tensor]], expected: list[list[Segment]]
    ) -> list[tuple[int, Segment, Tensor]]:
        """Sends `parts`, by rank; what came: the rank, the segment, its values."""
        arrived = [values for part in parts for values in part]
        if len(parts) > 1:
            lengths = [segment.length for part in expected for segment in part]
            received = like.new_empty(sum(lengths))
            dist.all_to_all_single(
                received,
                torch.cat(arrived) if arrived else like.new_empty(0),
                [sum(segment.length for segment in part) for part in expected],
                [sum(len(values) for values in part) for part in parts],
                group=self.layout.group,
            )
            arrived = list(torch.split(received, lengths))
        places = [(rank, segment) for rank, part in enumerate(expected) for segment in part]
        return [(rank, segment, values) for (rank, segment), values in zip(places, arrived, strict=True)]
