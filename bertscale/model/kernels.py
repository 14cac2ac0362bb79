"""Operations that want other code on other devices: attention over packed samples, cross-entropy.

Dimensions: T tokens, S samples, L tokens of one sample, A heads, D head size, P positions, V vocabulary,
B samples x heads, N blocks of a sample or of a position's logits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, groupby
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

if torch.cuda.is_available():  # it loads torch's compiler, for which nothing on a CPU needs to wait
    from torch.nn.attention.varlen import varlen_attn

TURNED = 256  # tokens whose queries and keys are turned at a time: they stay in the second-level cache
ROWS = 16  # of logits at a time in float32: 16 x 30,522 x 4 bytes stay in a core's cache
GPU_ROWS = 1024  # likewise on a GPU, to bound the memory
PADDED = 4  # cells a token at most, for attention over padded samples on a GPU
BLOCK = 128  # logits of a position that are summed together before one of them is drawn


@dataclass(frozen=True)
class Packing:
    """Where the samples of a packed micro-batch lie; made once for each forward pass."""

    runs: tuple[tuple[int, int], ...]  # neighbours of equal length: (samples, L)
    starts: Tensor  # int32 [S + 1] or more, cumulative lengths; behind them empty samples
    longest: int  # L of the longest, up to a power of two: few values, which may be compiled in

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device, *, few_shapes: bool = False) -> Packing:
        """`few_shapes`: empty samples make their number a power of two."""
        runs = tuple((len(list(group)), length) for length, group in groupby(lengths))
        ends = list(accumulate(lengths))
        if few_shapes:
            ends += ends[-1:] * ((1 << (len(lengths) - 1).bit_length()) - len(lengths))
        starts = torch.tensor([0, *ends], dtype=torch.int32)
        if device.type == "cuda":  # an unpinned copy would wait for the device
            starts = starts.pin_memory().to(device, non_blocking=True)
        return cls(runs, starts, 1 << (max(lengths) - 1).bit_length())

    @property
    def samples(self) -> int:
        """S, without empty ones."""
        return sum(samples for samples, _ in self.runs)


Rotation = tuple[Tensor, Tensor]  # cosines and sines, float32 [T, D / 2]


@lru_cache(maxsize=8)
def _rotation_table(longest: int, size: int, theta: float, device: torch.device) -> Rotation:
    """Cosines and sines, float32 [longest, size / 2]."""
    with torch.inference_mode(False), torch.no_grad():
        frequencies = 1.0 / theta ** (torch.arange(0, size, 2, dtype=torch.float32) / size)
        angles = torch.arange(longest, dtype=torch.float32)[:, None] * frequencies
        return angles.cos().to(device), angles.sin().to(device)


def rotation(positions: Tensor, longest: int, size: int, theta: float) -> Rotation:
    """How rotary positions (Su et al., 2021) turn heads of `size` features at `positions` [T] < `longest`."""
    cosines, sines = _rotation_table(longest, size, theta, positions.device)
    return cosines[positions], sines[positions]


def rotate(query_key_value: Tensor, rotary: Rotation) -> Tensor:
    """[T, A, 3, D] with queries and keys turned: feature d of the first half with d of the second."""
    turned: Tensor = _Rotate.apply(query_key_value, *rotary)  # type: ignore[no-untyped-call]
    return turned


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query_key_value: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        ctx.save_for_backward(cosines, sines)
        return _turn(query_key_value, cosines, sines)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cosines, sines = ctx.saved_tensors
        return _turn(grad, cosines, -sines), None, None


def _turn(query_key_value: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    if torch.compiler.is_compiling():  # one kernel, without a loop over a number of tokens that changes
        cosine, sine = cosines[:, None, None], sines[:, None, None]  # [T, 1, 1, D / 2]
        first, second = query_key_value[:, :, :2].float().chunk(2, dim=-1)
        turned = torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1)
        return torch.cat([turned.to(query_key_value.dtype), query_key_value[:, :, 2:]], dim=2)
    output = torch.empty_like(query_key_value)
    tokens = len(query_key_value)
    rows = tokens if query_key_value.is_cuda else TURNED
    for start in range(0, tokens, rows):
        part = slice(start, start + rows)
        cosine, sine = cosines[part, None, None], sines[part, None, None]  # [.., 1, 1, D / 2]
        first, second = query_key_value[part, :, :2].float().chunk(2, dim=-1)
        new_first, new_second = output[part, :, :2].chunk(2, dim=-1)
        new_first.copy_(first * cosine - second * sine)
        new_second.copy_(second * cosine + first * sine)
        output[part, :, 2] = query_key_value[part, :, 2]
    return output


def uses_varlen(query_key_value: Tensor, dropout: float) -> bool:
    """Whether attention is torch's variable-length kernel: on CUDA, in half precision, without dropout."""
    return query_key_value.is_cuda and dropout == 0 and query_key_value.dtype != torch.float32


def attend(
    query_key_value: Tensor, packing: Packing, dropout: float, half_window: int | None = None
) -> Tensor:
    """Each sample attends to itself alone: [T, A, 3, D] -> [T, A, D].

    With `half_window` a token attends to so many tokens on each side of it. On CUDA, in half precision
    without dropout, it is torch's variable-length kernel, and with dropout, which that one lacks, dense
    attention over samples that are padded for it alone. Elsewhere it is dense attention in one batch for
    each run of samples of equal length, and on a CPU only the blocks that the window touches.
    """
    if uses_varlen(query_key_value, dropout):
        query, key, value = query_key_value.unbind(dim=2)
        starts, longest = packing.starts, packing.longest
        window = (-1, -1) if half_window is None else (half_window, half_window)
        attended = varlen_attn(query, key, value, starts, starts, longest, longest, window_size=window)
        return attended if isinstance(attended, Tensor) else attended[0]
    if query_key_value.is_cuda and packing.samples * packing.longest <= PADDED * len(query_key_value):
        return _attend_padded(query_key_value, packing, dropout, half_window)
    # split, not slices: its backward is one concatenation instead of a zero-filled tensor for each run.
    pieces = torch.split(query_key_value, [samples * length for samples, length in packing.runs])
    attend_run = _attend_run_cuda if query_key_value.is_cuda else _attend_run_cpu
    outputs = [
        attend_run(piece, samples, dropout, half_window)
        for piece, (samples, _) in zip(pieces, packing.runs, strict=True)
    ]
    return torch.cat(outputs) if len(outputs) > 1 else outputs[0]


def _attend_padded(query_key_value: Tensor, packing: Packing, dropout: float, half: int | None) -> Tensor:
    """[T, A, 3, D] -> [T, A, D] by one call of torch's fused attention, each sample in a row of its own."""
    tokens, heads, _, size = query_key_value.shape
    starts, length = packing.starts[: packing.samples + 1].long(), packing.longest
    lengths = starts.diff()  # [S]
    place = torch.arange(tokens, device=starts.device)
    row = torch.searchsorted(starts, place, right=True) - 1
    cell = row * length + place - starts[row]  # [T], of the S x L cells
    grid = query_key_value.new_zeros(len(lengths) * length, heads, 3, size)
    grid = grid.index_copy(0, cell, query_key_value).view(-1, length, heads, 3, size)
    query, key, value = grid.permute(3, 0, 2, 1, 4)  # 3 x [S, A, L, D]
    mask = torch.arange(length, device=starts.device) < lengths[:, None]  # [S, L]
    mask = mask[:, None, None].expand(-1, 1, length, -1)
    if half is not None:
        mask = mask & (_band(length, half, query) == 0)
        # A row of padding may be left without any key: it looks at itself.
        mask = mask | torch.eye(length, dtype=torch.bool, device=starts.device)
    attended = F.scaled_dot_product_attention(query, key, value, mask, dropout_p=dropout)
    return attended.transpose(1, 2).reshape(-1, heads, size).index_select(0, cell)


def _attend_run_cuda(query_key_value: Tensor, samples: int, dropout: float, half: int | None) -> Tensor:
    """[S L, A, 3, D] -> [S L, A, D] by torch's fused attention."""
    tokens, heads, _, size = query_key_value.shape
    grid = query_key_value.view(samples, tokens // samples, heads, 3, size)
    query, key, value = grid.permute(3, 0, 2, 1, 4)  # 3 x [S, A, L, D]
    mask = None if half is None else _band(tokens // samples, half, query)
    attended = F.scaled_dot_product_attention(query, key, value, mask, dropout_p=dropout)
    return attended.transpose(1, 2).reshape(tokens, heads, size)  # [S, A, L, D] -> [S L, A, D]


def _attend_run_cpu(query_key_value: Tensor, samples: int, dropout: float, half: int | None) -> Tensor:
    """[S L, A, 3, D] -> [S L, A, D] by two batched products.

    In bfloat16, forward and backward, 2 to 4 times as fast as torch's fused attention for CPUs at
    128 tokens and 1.2 to 1.6 times at 512 and 1,024 (benchmarks/train_step.py, docs/log.md). A window of
    64 tokens to each side in blocks, beside a band in the dense products: 0.9 times as fast at 256 tokens,
    1.4 at 320, 2.1 at 512, 4.2 at 1,024.
    """
    tokens, heads, _, size = query_key_value.shape
    length = tokens // samples
    grid = query_key_value.view(samples, length, heads, 3, size)
    batches = grid.permute(3, 0, 2, 1, 4).reshape(3, samples * heads, length, size)  # [3, S A, L, D]
    query, key, value = batches.unbind(0)
    if half is not None and length > 4 * half:
        attended = _attend_blocks(query, key, value, dropout, half)
    else:
        banded = half is not None and length > half + 1
        band = _band(length, half, query) if half is not None and banded else query.new_empty(())
        scores = torch.baddbmm(band, query, key.transpose(1, 2), beta=int(banded), alpha=size**-0.5)
        shares = torch.softmax(scores, dim=-1)
        if dropout:
            shares = F.dropout(shares, dropout)
        attended = torch.bmm(shares, value)
    attended = attended.view(samples, heads, length, size)
    return attended.transpose(1, 2).reshape(tokens, heads, size)


def _band(length: int, half: int, like: Tensor) -> Tensor:
    """[L, L]: 0 within `half` of the diagonal, -inf outside."""
    place = torch.arange(length, device=like.device)
    outside = (place[:, None] - place).abs() > half
    return like.new_zeros(length, length).masked_fill_(outside, -torch.inf)


def _attend_blocks(query: Tensor, key: Tensor, value: Tensor, dropout: float, half: int) -> Tensor:
    """3 x [B, L, D] -> [B, L, D]: blocks of `half` queries, with keys of their own and both next blocks."""
    batch, length, size = query.shape
    blocks = -(-length // half)
    missing = blocks * half - length

    def cut(tensor: Tensor) -> Tensor:  # [B, L, D] -> [B, N, half, D]
        return F.pad(tensor, (0, 0, 0, missing)).reshape(batch, blocks, half, size)

    def neighbours(tensor: Tensor) -> Tensor:  # [B, N, half, D] -> [B N, 3 half, D]
        around = F.pad(tensor, (0, 0, 0, 0, 1, 1))
        return torch.cat([around[:, :-2], tensor, around[:, 2:]], dim=2).view(-1, 3 * half, size)

    near_key, near_value = neighbours(cut(key)), neighbours(cut(value))
    place = torch.arange(3 * half, device=query.device)
    ahead = place - half - place[:half, None]
    band = query.new_zeros(half, 3 * half).masked_fill_(ahead.abs() > half, -torch.inf)
    scores = torch.baddbmm(
        band, cut(query).reshape(-1, half, size), near_key.transpose(1, 2), alpha=size**-0.5
    )
    # What lies outside the sample gets no share. Past autograd: no share, no gradient.
    grid = scores.detach().view(batch, blocks, half, 3 * half)
    grid[:, 0, :, :half] = -torch.inf
    grid[:, -1, :, 2 * half - missing :] = -torch.inf
    if missing:
        grid[:, -2, :, 3 * half - missing :] = -torch.inf
    shares = torch.softmax(scores, dim=-1)
    if dropout:
        shares = F.dropout(shares, dropout)
    attended = torch.bmm(shares, near_value).view(batch, blocks * half, size)
    return attended[:, :length]


def running_sums(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Of logits [P, V] the highest of each position, float32 [P], and exp(logit - highest) summed up to the
    end of each block, float64 [P, N].

    Blocks: a sum is vectorised, a running sum is not, and small summands late in the vocabulary are not lost.
    """
    positions, width = logits.shape
    size = math.gcd(width, BLOCK)
    highest = logits.new_empty(positions, dtype=torch.float32)
    sums = logits.new_empty(positions, width // size, dtype=torch.float64)
    step = GPU_ROWS if logits.is_cuda else ROWS
    for start in range(0, positions, step):
        rows = slice(start, start + step)
        part = logits[rows].float()
        highest[rows] = part.amax(dim=-1)
        parts = (part - highest[rows, None]).exp_()
        sums[rows] = parts.view(len(parts), -1, size).sum(dim=-1)
    return highest, sums.cumsum(dim=-1)


def place_of(logits: Tensor, highest: Tensor, sums: Tensor, thresholds: Tensor) -> Tensor:
    """The first place of each position where the running sum of exp(logit - highest) is above its threshold.

    `highest` and `sums` are those of `running_sums`, thresholds [P] float64 from 0 to a position's whole sum.
    A place whose logit adds nothing is never the one. Returns int64 [P].
    """
    positions, blocks = sums.shape
    size = logits.shape[1] // blocks
    nothing = torch.zeros_like(thresholds)
    thresholds = torch.minimum(thresholds, sums[:, -1].nextafter(nothing))  # past rounding, below the end
    block = torch.searchsorted(sums, thresholds[:, None], right=True)  # [P, 1]
    before = torch.where(block > 0, sums.gather(1, (block - 1).clamp(min=0)), 0.0)[:, 0]
    inside = logits.view(positions, blocks, size).gather(1, block[:, :, None].expand(-1, 1, size))[:, 0]
    running = (inside.float() - highest[:, None]).exp_().double().cumsum(dim=-1)  # [P, size]
    left = torch.minimum(thresholds - before, running[:, -1].nextafter(nothing))
    return (block * size + torch.searchsorted(running, left[:, None], right=True))[:, 0]


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Losses of ids [P], float32 [P], from logits [P, V], which become their gradient, softmax - one-hot.

    Some rows at a time: on a CPU while they are in the cache, and nowhere are all of them held in float32.
    """
    losses = logits.new_empty(len(logits), dtype=torch.float32)
    step = GPU_ROWS if logits.is_cuda else ROWS
    for start in range(0, len(logits), step):
        rows = slice(start, start + step)
        logs = torch.log_softmax(logits[rows], dim=-1, dtype=torch.float32)
        losses[rows] = -logs.gather(1, targets[rows, None])[:, 0]
        logs.exp_().scatter_add_(1, targets[rows, None], logs.new_full((len(logs), 1), -1.0))
        logits[rows] = logs
    return losses
