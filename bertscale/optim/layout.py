"""Fragments of parameters: what lies where in the tensors of a sharded optimizer, and how to make them whole.

DeepSpeed hands an optimizer flat tensors in which fragments of many parameters lie end to end (ZeRO 1 to 3),
or whole tensors (stage 0); each tensor-parallel rank holds a share of each parameter besides. A `Layout` says
what lies where in one tensor; an `Exchange` brings the fragments of each matrix to one rank and back.

Two data ranks (ZeRO) of one tensor rank, with parameters a of 6 values and b of 4, 5 values on each rank:

    rank 0   a a a a a   Fragment(parameter=0, start=0, offset=0, length=5)
    rank 1   a b b b b   Fragment(0, 5, 0, 1), Fragment(1, 0, 1, 4)

Share: what the data ranks of one tensor-parallel rank hold together of a parameter. Fragment: what one rank
holds of a share. Offset: an index in a tensor; start: an index in a flattened share.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class Fragment(NamedTuple):
    """`length` values of a parameter's flattened share, from `start` on, at `offset` of a tensor."""

    parameter: int  # its number in `Layout.parameters`
    start: int
    offset: int
    length: int


@dataclass(frozen=True)
class Parameter:
    """Name and shape of a whole parameter. `share` is the shape of one tensor-parallel rank's share."""

    name: str
    share: tuple[int, ...]
    dim: int | None  # the dimension that tensor parallel shards; None: it is whole on each rank
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
    """What lies in one tensor that the optimizer updates, on each rank of the group that holds parts of it.

    `parameters` are the same on all of those ranks, so that they make the same collectives; ranks that hold
    nothing of a parameter have no fragment of it. Ranks are numbered within `group`. Where no matrices
    travel, the fragments of other ranks may be left empty.
    """

    parameters: tuple[Parameter, ...]
    fragments: tuple[tuple[Fragment, ...], ...]  # by rank
    tensor_ranks: tuple[int, ...]  # by rank: which share of a parameter its fragments are of
    rank: int  # this one
    group: Any  # a process group; None: all ranks

    @property
    def mine(self) -> tuple[Fragment, ...]:
        return self.fragments[self.rank]

    def counts(self, fragment: Fragment, rank: int) -> bool:
        """Whether this is the copy of the fragment that counts in sums: a parameter that is whole on each
        tensor rank counts on the first one."""
        return self.tensor_ranks[rank] == 0 or self.parameters[fragment.parameter].dim is not None

    def views(self, values: Tensor) -> list[Tensor]:
        """This rank's fragments of `values`, a tensor of this layout, as flat views."""
        flat = values.view(-1)
        return [flat.narrow(0, fragment.offset, fragment.length) for fragment in self.mine]


class Exchange:
    """Brings the fragments of each parameter of a layout to one rank, its owner, and the changed ones back.

    The owner is one of the ranks that hold most of the parameter, the one with the least work so far, so that
    each matrix is worked on once and those that lie whole on a rank stay there. The lists below are by rank.
    """

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        owners = self._owners()
        ranks = range(len(layout.fragments))

        def between(holder: int, owner: int, *, copies: bool) -> list[Fragment]:
            return [
                fragment
                for fragment in layout.fragments[holder]
                if owners[fragment.parameter] == owner and (copies or layout.counts(fragment, holder))
            ]

        me = layout.rank
        # To the owners goes one copy of each value; back from them comes one for every rank that holds it.
        self.sent = [between(me, owner, copies=False) for owner in ranks]
        self.received = [between(holder, me, copies=False) for holder in ranks]
        self.sent_back = [between(holder, me, copies=True) for holder in ranks]
        self.received_back = [between(me, owner, copies=True) for owner in ranks]
        self.owned = sorted({fragment.parameter for part in self.received for fragment in part})

    def _owners(self) -> list[int]:
        """The owner of each parameter, the same on all ranks without a word between them."""
        layout = self.layout
        held = [[0] * len(layout.fragments) for _ in layout.parameters]
        for rank, fragments in enumerate(layout.fragments):
            for fragment in fragments:
                if layout.counts(fragment, rank):
                    held[fragment.parameter][rank] += fragment.length
        load = [0] * len(layout.fragments)
        owners = []
        for parameter, amounts in zip(layout.parameters, held, strict=True):
            # What the owner holds already need not travel; among equals the work is spread.
            fit = [rank for rank, amount in enumerate(amounts) if amount == max(amounts)]
            owner = min(fit, key=lambda rank: load[rank])
            owners.append(owner)
            load[owner] += parameter.numel * min(parameter.share)  # FLOPs of Newton-Schulz, up to a factor
        return owners

    def change_whole(self, flat: Tensor, change: Callable[[str, Tensor], Tensor]) -> None:
        """Replaces each parameter in `flat`, a tensor of this layout, by `change(name, whole parameter)`,
        which keeps the shape. Two collectives (all-to-all), which all ranks of the group must reach."""
        layout = self.layout
        shares = {  # of the owned parameters: [shares, values of a share]
            index: flat.new_empty(p.shares, torch.Size(p.share).numel())
            for index in self.owned
            for p in [layout.parameters[index]]
        }
        sent = [[flat[s.offset : s.offset + s.length] for s in part] for part in self.sent]
        for holder, fragment, values in self._send(flat, sent, self.received):
            self._view(shares, fragment, holder).copy_(values)
        for number, parts in shares.items():
            parameter = layout.parameters[number]
            dim = parameter.dim or 0
            # Tensor-parallel shares side by side; one that is whole on each rank is there once.
            whole = torch.cat([part.view(parameter.share) for part in parts], dim)
            changed = change(parameter.name, whole).chunk(parameter.shares, dim)
            for part, values in zip(parts, changed, strict=True):
                part.view(parameter.share).copy_(values)
        back = [
            [self._view(shares, fragment, holder) for fragment in part]
            for holder, part in enumerate(self.sent_back)
        ]
        for _, fragment, values in self._send(flat, back, self.received_back):
            flat[fragment.offset : fragment.offset + fragment.length] = values

    def _view(self, shares: dict[int, Tensor], fragment: Fragment, holder: int) -> Tensor:
        """The view of a fragment of rank `holder` in the shares of the whole parameter."""
        sharded = self.layout.parameters[fragment.parameter].dim is not None
        share = shares[fragment.parameter][self.layout.tensor_ranks[holder] if sharded else 0]
        return share[fragment.start : fragment.start + fragment.length]

    def _send(
        self, like: Tensor, parts: list[list[Tensor]], expected: list[list[Fragment]]
    ) -> list[tuple[int, Fragment, Tensor]]:
        """Sends `parts`, by rank, and receives the fragments `expected`, by rank.

        Returns what arrived: the rank, the fragment, its values. One collective for all fragments.
        """
        arrived = [values for part in parts for values in part]
        if len(parts) > 1:
            lengths = [fragment.length for part in expected for fragment in part]
            received = like.new_empty(sum(lengths))
            dist.all_to_all_single(
                received,
                torch.cat(arrived) if arrived else like.new_empty(0),
                [sum(fragment.length for fragment in part) for part in expected],
                [sum(len(values) for values in part) for part in parts],
                group=self.layout.group,
            )
            arrived = list(torch.split(received, lengths))
        origins = [(rank, fragment) for rank, part in enumerate(expected) for fragment in part]
        return [(rank, fragment, values) for (rank, fragment), values in zip(origins, arrived, strict=True)]
