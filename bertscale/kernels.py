"""Operations that want other code on other devices: attention over packed samples, cross-entropy.

Dimensions: T tokens, S samples, L tokens of one sample, A heads, D head size, P positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

ROWS = 16  # of logits at a time in float32: 16 x 30,522 x 4 bytes stay in a core's cache


@dataclass(frozen=True)
class Packing:
    """Where the samples of a packed micro-batch lie; made once for each forward pass."""

    runs: tuple[tuple[int, int], ...]  # neighbours of equal length: (samples, L)
    starts: Tensor  # int32 [S + 1], cumulative lengths
    longest: int

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device) -> Packing:
        runs = tuple((len(list(group)), length) for length, group in groupby(lengths))
        starts = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
        if device.type == "cuda":  # an unpinned copy would wait for the device
            starts = starts.pin_memory().to(device, non_blocking=True)
        return cls(runs, starts, max(lengths))


def attend(query_key_value: Tensor, packing: Packing, dropout: float) -> Tensor:
    """Each sample attends to itself alone: [T, A, 3, D] -> [T, A, D].

    On CUDA, in half precision without dropout, it is torch's variable-length kernel; elsewhere dense
    attention, one batch for each run of samples of equal length.
    """
    if query_key_value.is_cuda and dropout == 0 and query_key_value.dtype != torch.float32:
        from torch.nn.attention.varlen import varlen_attn

        query, key, value = query_key_value.unbind(dim=2)
        longest = packing.longest
        attended = varlen_attn(query, key, value, packing.starts, packing.starts, longest, longest)
        return attended if isinstance(attended, Tensor) else attended[0]
    # split, not slices: its backward is one concatenation instead of a zero-filled tensor for each run.
    pieces = torch.split(query_key_value, [samples * length for samples, length in packing.runs])
    attend_run = _attend_run_cuda if query_key_value.is_cuda else _attend_run_cpu
    outputs = [
        attend_run(piece, samples, dropout) for piece, (samples, _) in zip(pieces, packing.runs, strict=True)
    ]
    return torch.cat(outputs) if len(outputs) > 1 else outputs[0]


def _attend_run_cuda(query_key_value: Tensor, samples: int, dropout: float) -> Tensor:
    """[S L, A, 3, D] -> [S L, A, D] by torch's fused attention."""
    tokens, heads, _, size = query_key_value.shape
    grid = query_key_value.view(samples, tokens // samples, heads, 3, size)
    query, key, value = grid.permute(3, 0, 2, 1, 4)  # 3 x [S, A, L, D]
    attended = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout)
    return attended.transpose(1, 2).reshape(tokens, heads, size)  # [S, A, L, D] -> [S L, A, D]


def _attend_run_cpu(query_key_value: Tensor, samples: int, dropout: float) -> Tensor:
    """[S L, A, 3, D] -> [S L, A, D] by two batched products.

    In bfloat16, forward and backward, 2 to 4 times as fast as torch's fused attention for CPUs at
    128 tokens and 1.2 to 1.6 times at 512 and 1,024 (benchmarks/train_step.py, docs/log.md).
    """
    tokens, heads, _, size = query_key_value.shape
    length = tokens // samples
    grid = query_key_value.view(samples, length, heads, 3, size)
    batches = grid.permute(3, 0, 2, 1, 4).reshape(3, samples * heads, length, size)  # [3, S A, L, D]
    query, key, value = batches.unbind(0)
    scores = torch.baddbmm(query.new_empty(()), query, key.transpose(1, 2), beta=0, alpha=size**-0.5)
    shares = torch.softmax(scores, dim=-1)
    if dropout:
        shares = F.dropout(shares, dropout)
    attended = torch.bmm(shares, value).view(samples, heads, length, size)
    return attended.transpose(1, 2).reshape(tokens, heads, size)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Loss of each position, float32 [P], from logits [P, V] and ids [P]; overwrites the logits on a CPU."""
    if logits.is_cuda:
        return F.cross_entropy(logits.float(), targets, reduction="none")
    losses: Tensor = _CrossEntropyByRows.apply(logits, targets)  # type: ignore[no-untyped-call]
    return losses


class _CrossEntropyByRows(torch.autograd.Function):
    """softmax - one-hot is written over the logits, a few rows at a time, while they are in the cache."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        losses = torch.empty(len(logits), dtype=torch.float32)
        for start in range(0, len(logits), ROWS):
            rows = slice(start, start + ROWS)
            logs = torch.log_softmax(logits[rows], dim=-1, dtype=torch.float32)
            losses[rows] = -logs.gather(1, targets[rows, None])[:, 0]
            logs.exp_().scatter_add_(1, targets[rows, None], torch.full((len(logs), 1), -1.0))
            logits[rows] = logs
        ctx.save_for_backward(logits)
        return losses

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad[:, None].to(gradient.dtype), None
