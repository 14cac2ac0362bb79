"""Clipping by the norm of the whole gradient, and skipping a step whose gradient is not finite.

All of it stays on the device: the host, which runs ahead of it, never waits to see a norm.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from bertscale.train.parallel import Ranks, tensor_parallel_dimension


@torch.no_grad()
def whole_norm(fragments: Iterable[tuple[str, Tensor]], ranks: Ranks, *, sharded: bool) -> Tensor:
    """Norm of the whole gradient, float32, 0-dim, from this rank's fragments of it: (parameter, gradient).

    Squares of shares add up over the tensor ranks; what each of them holds whole counts on the first, but
    must be finite on each: else the norm is infinite. `sharded`: data ranks hold different fragments.
    """
    parts = dict(fragments)
    norms = torch._foreach_norm(list(parts.values()), 2, torch.float32) if parts else ()
    counted = [
        norm
        for name, norm in zip(parts, norms, strict=True)
        if ranks.tensor_rank == 0 or tensor_parallel_dimension(name) is not None
    ]
    nothing = torch.zeros((), device=ranks.device)
    # [2]: the sum that is the norm's, and that of everything, which tells whether all is finite.
    squares = torch.stack([torch.stack([nothing, *of]).square().sum() for of in (counted, norms)])
    if sharded and ranks.data > 1:
        dist.all_reduce(squares, group=ranks.data_group)
    if ranks.tensor > 1:
        dist.all_reduce(squares, group=ranks.tensor_group)
    return torch.where(squares[1].isfinite(), squares[0].sqrt(), torch.inf)


def set_clipping(optimizer: torch.optim.Optimizer, norm: Tensor, largest: float) -> Tensor:
    """Makes the next step divide gradients so that their norm is at most `largest`, or change nothing where
    the norm is not finite (Pascanu et al., 2013).

    Uses two attributes that torch has for mixed precision: a fused optimizer, or a `WholeOptimizer`, divides
    gradients by `grad_scale`, and where `found_inf` is 1 it changes nothing. Returns 1 if the step will be
    applied and 0 if not, float32, 0-dim.
    """
    applied = norm.isfinite().float()
    # 1e-6 as in torch's clip_grad_norm_, so that both give the same numbers.
    optimizer.grad_scale = ((norm + 1e-6) / largest).clamp(min=1.0)  # type: ignore[attr-defined]
    optimizer.found_inf = 1 - applied  # type: ignore[attr-defined]
    return applied
