"""Operations that need other code on other devices: attention over packed samples, cross-entropy.

Dimensions: T tokens, S samples, L tokens of one sample, A heads, D head size, P predicted positions,
V vocabulary, B samples x heads, N blocks of a sample (`_attend_blocks`), K tiles of a position's logits
(`running_sums`). Run: neighbouring samples of equal length. Window: of local attention, `half_window` tokens
to each side.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate, groupby
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

if torch.cuda.is_available():  # it loads torch's compiler, for which nothing on a CPU needs to wait
    from torch.nn.attention.varlen import varlen_attn

ROTATED = 256  # tokens whose queries and keys are rotated at a time: they stay in the second-level cache
ROWS = 16  # positions whose logits are in float32 at a time: 16 x 30,522 x 4 bytes stay in a core's cache
GPU_ROWS = 1024  # the same on a GPU, to bound the memory
PADDED = 4  # times the tokens, at most, that padded samples may take on a GPU
NEAR = 16  # tokens: on a CPU, samples whose lengths round up to the same multiple of it are padded to it ...
SHORT = 64  # ... up to this length, where a call costs more than the products in it
TILE = 128  # logits of a position that are summed together before one of them is drawn


class Group(NamedTuple):
    """Neighbouring short samples of near lengths, which a CPU pads to one length, or a run of longer ones."""

    tokens: int
    samples: int
    length: int  # L that they are padded to, or have
    cells: Tensor | None  # int64 [tokens] where each token stands among the S L cells; None: no padding
    filled: Tensor | None  # bool [S, L] which cells are no padding


@dataclass(frozen=True)
class Packing:
    """Where the samples of a packed micro-batch lie; made once for each forward pass."""

    lengths: tuple[int, ...]  # L of each
    runs: tuple[tuple[int, int], ...]  # (samples, L) of each
    starts: Tensor  # int32 [S + 1] or more, cumulative lengths; behind them empty samples
    longest: int  # L of the longest, up to a power of two: few values, which may be compiled in
    causal: bool = False  # a token attends to itself and to those before it alone

    @classmethod
    def of(
        cls,
        lengths: Sequence[int],
        device: torch.device,
        *,
        few_shapes: bool = False,
        causal: bool = False,
    ) -> Packing:
        """Describes samples of these lengths [S] for attention, causal or not, on `device`.

        `few_shapes`: empty samples are added until their number is a power of two, since CUDA graphs are
        recorded for each shape.
        """
        runs = tuple((len(list(group)), length) for length, group in groupby(lengths))
        ends = list(accumulate(lengths))
        if few_shapes:
            ends += ends[-1:] * ((1 << (len(lengths) - 1).bit_length()) - len(lengths))
        starts = torch.tensor([0, *ends], dtype=torch.int32)
        if device.type == "cuda":  # an unpinned copy would wait for the device
            starts = starts.pin_memory().to(device, non_blocking=True)
        return cls(tuple(lengths), runs, starts, 1 << (max(lengths) - 1).bit_length(), causal)

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """The samples as a CPU takes them together where nothing is drawn."""
        return tuple(
            _group(list(lengths))
            for _, lengths in groupby(self.lengths, lambda n: -(-n // NEAR) * NEAR if n <= SHORT else n)
        )

    @property
    def samples(self) -> int:
        """S, without empty ones."""
        return sum(samples for samples, _ in self.runs)


def _group(lengths: list[int]) -> Group:
    longest = max(lengths)
    if min(lengths) == longest:
        return Group(sum(lengths), len(lengths), longest, None, None)
    filled = np.arange(longest) < np.array(lengths)[:, None]  # [S, L]
    cells = torch.from_numpy(np.flatnonzero(filled))
    return Group(sum(lengths), len(lengths), longest, cells, torch.from_numpy(filled))


Rotation = tuple[Tensor, Tensor]  # cosines and sines, float32 [T, D / 2]


@lru_cache(maxsize=8)
def _rotation_table(longest: int, size: int, theta: float, device: torch.device) -> Rotation:
    """Cosines and sines, float32 [longest, size / 2]."""
    with torch.inference_mode(False), torch.no_grad():
        frequencies = 1.0 / theta ** (torch.arange(0, size, 2, dtype=torch.float32) / size)
        angles = torch.arange(longest, dtype=torch.float32)[:, None] * frequencies
        return angles.cos().to(device), angles.sin().to(device)


def rotation(positions: Tensor, longest: int, size: int, theta: float) -> Rotation:
    """Rotary angles (Su et al., 2021) for heads of `size` features at `positions` [T], each < `longest`."""
    cosines, sines = _rotation_table(longest, size, theta, positions.device)
    return cosines[positions], sines[positions]


def rotate(query_key_value: Tensor, rotary: Rotation) -> Tensor:
    """Rotates queries and keys of [T, A, 3, D]: feature d of the first half with d of the second."""
    rotated: Tensor = _Rotate.apply(query_key_value, *rotary)  # type: ignore[no-untyped-call]
    return rotated


class _Rotate(torch.autograd.Function):
    """A rotation, whose gradient is the inverse rotation: no query or key is kept for it."""

    @staticmethod
    def forward(ctx: Any, query_key_value: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        ctx.save_for_backward(cosines, sines)
        return _rotated(query_key_value, cosines, sines)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cosines, sines = ctx.saved_tensors
        return _rotated(grad, cosines, -sines), None, None


def _rotated(query_key_value: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Queries and keys of [T, A, 3, D] rotated in float32; values (index 2 of the 3) are copied."""
    if torch.compiler.is_compiling():  # one kernel, without a loop over a number of tokens that changes
        cosine, sine = cosines[:, None, None], sines[:, None, None]  # [T, 1, 1, D / 2]
        first, second = query_key_value[:, :, :2].float().chunk(2, dim=-1)  # 2 x [T, A, 2, D / 2]
        rotated = torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1)
        return torch.cat([rotated.to(query_key_value.dtype), query_key_value[:, :, 2:]], dim=2)
    output = torch.empty_like(query_key_value)
    tokens = len(query_key_value)
    size = tokens if query_key_value.is_cuda else ROTATED
    for start in range(0, tokens, size):
        part = slice(start, start + size)
        cosine, sine = cosines[part, None, None], sines[part, None, None]  # [.., 1, 1, D / 2]
        first, second = query_key_value[part, :, :2].float().chunk(2, dim=-1)  # 2 x [.., A, 2, D / 2]
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
    """Attention of each sample to itself alone: [T, A, 3, D] -> [T, A, D].

    With `half_window` a token attends to so many tokens on each side of it; where the packing is causal, to
    none behind it. Which kernel:

    | device, number format           | dropout | attention                                               |
    | ------------------------------- | ------- | ------------------------------------------------------- |
    | CUDA, half precision            | none    | torch's variable-length kernel                          |
    | CUDA, lengths not too different | any     | dense, over samples that are padded for it alone        |
    | CUDA, else                      | any     | dense, one call for each run                            |
    | CPU                             | none    | two products for each group; only the window's blocks   |
    | CPU                             | some    | the same for each run: draws depend on the shape        |
    """
    causal = packing.causal
    if uses_varlen(query_key_value, dropout):
        query, key, value = query_key_value.unbind(dim=2)
        starts, longest = packing.starts, packing.longest
        side = -1 if half_window is None else half_window  # -1: as many as there are
        window = (side, 0 if causal else side)
        attended = varlen_attn(query, key, value, starts, starts, longest, longest, window_size=window)
        return attended if isinstance(attended, Tensor) else attended[0]
    if query_key_value.is_cuda and packing.samples * packing.longest <= PADDED * len(query_key_value):
        return _attend_padded(query_key_value, packing, dropout, half_window)
    if not query_key_value.is_cuda and dropout == 0 and (half_window is None or half_window >= SHORT):
        groups = torch.split(query_key_value, [group.tokens for group in packing.groups])
        outputs = [
            _attend_run_cpu(part, group.samples, 0.0, half_window, causal)
            if group.cells is None
            else _attend_group(part, group, causal)
            for part, group in zip(groups, packing.groups, strict=True)
        ]
        return torch.cat(outputs) if len(outputs) > 1 else outputs[0]
    # split, not slices: its backward is one concatenation instead of a zero-filled tensor for each run.
    runs = torch.split(query_key_value, [samples * length for samples, length in packing.runs])
    attend_run = _attend_run_cuda if query_key_value.is_cuda else _attend_run_cpu
    outputs = [
        attend_run(run, samples, dropout, half_window, causal)
        for run, (samples, _) in zip(runs, packing.runs, strict=True)
    ]
    return torch.cat(outputs) if len(outputs) > 1 else outputs[0]


def _attend_padded(query_key_value: Tensor, packing: Packing, dropout: float, half: int | None) -> Tensor:
    """One call of torch's fused attention, each sample padded to L: [T, A, 3, D] -> [T, A, D]."""
    tokens, heads, _, size = query_key_value.shape
    starts, length = packing.starts[: packing.samples + 1].long(), packing.longest  # [S + 1]
    lengths = starts.diff()  # [S]
    # Where each token goes is computed on the device: the host would have to send it.
    token = torch.arange(tokens, device=starts.device)
    sample = torch.searchsorted(starts, token, right=True) - 1  # [T]
    cell = sample * length + token - starts[sample]  # [T], of the S L cells
    grid = query_key_value.new_zeros(len(lengths) * length, heads, 3, size)
    grid = grid.index_copy(0, cell, query_key_value).view(-1, length, heads, 3, size)  # [S, L, A, 3, D]
    query, key, value = grid.permute(3, 0, 2, 1, 4)  # 3 x [S, A, L, D]
    mask = torch.arange(length, device=starts.device) < lengths[:, None]  # [S, L]
    mask = mask[:, None, None].expand(-1, 1, length, -1)  # [S, 1, L, L]
    if half is not None or packing.causal:
        mask = mask & (_band(length, half, packing.causal, query) == 0)
        # A query of padding may be left without any key, where softmax is NaN: it attends to itself.
        mask = mask | torch.eye(length, dtype=torch.bool, device=starts.device)
    attended = F.scaled_dot_product_attention(query, key, value, mask, dropout_p=dropout)
    return attended.transpose(1, 2).reshape(-1, heads, size).index_select(0, cell)  # [S L, A, D] -> [T, A, D]


def _attend_run_cuda(
    query_key_value: Tensor, samples: int, dropout: float, half: int | None, causal: bool
) -> Tensor:
    """Torch's fused attention for a run: [S L, A, 3, D] -> [S L, A, D]."""
    tokens, heads, _, size = query_key_value.shape
    grid = query_key_value.view(samples, tokens // samples, heads, 3, size)  # [S, L, A, 3, D]
    query, key, value = grid.permute(3, 0, 2, 1, 4)  # 3 x [S, A, L, D]
    mask = None if half is None else _band(tokens // samples, half, causal, query)
    attended = F.scaled_dot_product_attention(
        query, key, value, mask, dropout_p=dropout, is_causal=causal and mask is None
    )
    return attended.transpose(1, 2).reshape(tokens, heads, size)  # [S, A, L, D] -> [S L, A, D]


def _attend_run_cpu(
    query_key_value: Tensor, samples: int, dropout: float, half: int | None, causal: bool
) -> Tensor:
    """Attention for a run by two batched products: [S L, A, 3, D] -> [S L, A, D].

    In bfloat16, forward and backward, 2 to 4 times as fast as torch's fused attention for CPUs at
    128 tokens and 1.2 to 1.6 times at 512 and 1,024 (benchmarks/train_step.py, docs/log.md). A window of
    64 tokens to each side in blocks, beside a band in the dense products: 0.9 times as fast at 256 tokens,
    1.4 at 320, 2.1 at 512, 4.2 at 1,024.
    """
    tokens, heads, _, size = query_key_value.shape
    length = tokens // samples
    grid = query_key_value.view(samples, length, heads, 3, size)  # [S, L, A, 3, D]
    batches = grid.permute(3, 0, 2, 1, 4).reshape(3, samples * heads, length, size)  # [3, S A, L, D]
    query, key, value = batches.unbind(0)  # 3 x [B, L, D]
    if half is not None and length > 4 * half:  # from there on the blocks are faster, see above
        attended = _attend_blocks(query, key, value, dropout, half, causal)
    else:
        banded = causal or (half is not None and length > half + 1)
        band = _band(length, half, causal, query) if banded else query.new_empty(())
        # The scale and the band are added in the product itself: no pass over [B, L, L] of their own.
        scores = torch.baddbmm(band, query, key.transpose(1, 2), beta=int(banded), alpha=size**-0.5)
        weights = torch.softmax(scores, dim=-1)  # [B, L, L]
        if dropout:
            weights = F.dropout(weights, dropout)
        attended = torch.bmm(weights, value)  # [B, L, D]
    attended = attended.view(samples, heads, length, size)
    return attended.transpose(1, 2).reshape(tokens, heads, size)  # [S, A, L, D] -> [S L, A, D]


def _attend_group(query_key_value: Tensor, group: Group, causal: bool) -> Tensor:
    """Attention of short samples by two batched products, padded to one length: [T, A, 3, D] -> [T, A, D].

    A call takes some 0.4 ms forward and backward, whatever is in it: 32 sentences of 3 to 50 tokens are 4
    groups but 18 runs (benchmarks/finetune.py, docs/log.md).
    """
    _, heads, _, size = query_key_value.shape
    samples, length, cells, filled = group.samples, group.length, group.cells, group.filled
    assert cells is not None
    assert filled is not None
    grid = query_key_value.new_zeros(samples * length, heads, 3, size).index_copy(0, cells, query_key_value)
    grid = grid.view(samples, length, heads, 3, size)
    query, key, value = grid.permute(3, 0, 2, 1, 4).reshape(3, samples * heads, length, size).unbind(0)
    if causal:  # no token attends to the padding, which stands behind all of them
        mask = _band(length, None, causal, query)  # [L, L]
    else:
        mask = query.new_zeros(samples, length).masked_fill_(~filled, -torch.inf)  # of keys
        mask = mask[:, None, None].expand(-1, heads, -1, -1).reshape(-1, 1, length)  # [B, 1, L]
    scores = torch.baddbmm(mask, query, key.transpose(1, 2), alpha=size**-0.5)
    attended = torch.bmm(torch.softmax(scores, dim=-1), value)  # [B, L, D]
    attended = attended.view(samples, heads, length, size).transpose(1, 2).reshape(-1, heads * size)
    return F.embedding(cells, attended).view(-1, heads, size)  # [S L, A D] -> [T, A, D]


def _band(length: int, half: int | None, causal: bool, like: Tensor) -> Tensor:
    """The mask of a window, of causal attention, or of both, [L, L]: 0 where a query attends, else -inf."""
    position = torch.arange(length, device=like.device)
    outside = _outside(position - position[:, None], half, causal)  # [L, L]
    return like.new_zeros(length, length).masked_fill_(outside, -torch.inf)


def _outside(ahead: Tensor, half: int | None, causal: bool) -> Tensor:
    """Whether a key so many tokens `ahead` of its query is one that the query does not attend to."""
    if half is None:
        assert causal
        return ahead > 0
    return (ahead < -half) | (ahead > (0 if causal else half))


def _attend_blocks(
    query: Tensor, key: Tensor, value: Tensor, dropout: float, half: int, causal: bool
) -> Tensor:
    """Attention by blocks of `half` queries and the keys of three blocks: 3 x [B, L, D] -> [B, L, D].

    A window reaches no further than the next block on each side, so scores are [B N, half, 3 half] instead of
    [B, L, L]; where it is causal, [B N, half, 2 half].
    """
    batch, length, size = query.shape
    width = (2 if causal else 3) * half
    blocks = -(-length // half)
    missing = blocks * half - length  # tokens that the last block lacks

    def cut(tensor: Tensor) -> Tensor:  # [B, L, D] -> [B, N, half, D]
        return F.pad(tensor, (0, 0, 0, missing)).reshape(batch, blocks, half, size)

    def neighbours(tensor: Tensor) -> Tensor:  # [B, N, half, D] -> [B N, width, D]
        around = F.pad(tensor, (0, 0, 0, 0, 1, 1))  # [B, N + 2, half, D], a block of zeros at both ends
        behind = [] if causal else [around[:, 2:]]
        return torch.cat([around[:, :-2], tensor, *behind], dim=2).view(-1, width, size)

    near_key, near_value = neighbours(cut(key)), neighbours(cut(value))
    position = torch.arange(width, device=query.device)
    ahead = position - half - position[:half, None]  # [half, width] from the query to the key
    band = query.new_zeros(half, width).masked_fill_(_outside(ahead, half, causal), -torch.inf)
    scores = torch.baddbmm(
        band, cut(query).reshape(-1, half, size), near_key.transpose(1, 2), alpha=size**-0.5
    )
    # What lies outside of the sample gets no weight. Outside of autograd: softmax's backward pass gives no
    # gradient where the weight is 0, so a mask in the graph would only be one more pass over the scores.
    grid = scores.detach().view(batch, blocks, half, width)  # [B, N, half, width]
    grid[:, 0, :, :half] = -torch.inf
    grid[:, -1, :, 2 * half - missing :] = -torch.inf
    if missing and not causal:
        grid[:, -2, :, 3 * half - missing :] = -torch.inf
    weights = torch.softmax(scores, dim=-1)  # [B N, half, width]
    if dropout:
        weights = F.dropout(weights, dropout)
    attended = torch.bmm(weights, near_value).view(batch, blocks * half, size)  # [B, N half, D]
    return attended[:, :length]


def running_sums(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The highest of each position's logits [P, V], float32 [P], and exp(logit - highest) summed up to the
    end of each tile, float64 [P, K].

    Tiles: a sum is vectorised, a running sum is not, and small summands late in the vocabulary are not lost.
    """
    positions, width = logits.shape
    size = math.gcd(width, TILE)  # tiles of equal size, so that a view makes them
    highest = logits.new_empty(positions, dtype=torch.float32)
    sums = logits.new_empty(positions, width // size, dtype=torch.float64)
    number = GPU_ROWS if logits.is_cuda else ROWS
    for start in range(0, positions, number):
        rows = slice(start, start + number)
        part = logits[rows].float()
        highest[rows] = part.amax(dim=-1)
        parts = (part - highest[rows, None]).exp_()
        sums[rows] = parts.view(len(parts), -1, size).sum(dim=-1)  # [.., V] -> [.., K, size] -> [.., K]
    return highest, sums.cumsum(dim=-1)


def first_above(logits: Tensor, highest: Tensor, sums: Tensor, thresholds: Tensor) -> Tensor:
    """The first id of each position where the running sum of exp(logit - highest) is above its threshold.

    `highest` and `sums` are those of `running_sums`, thresholds [P] float64 from 0 to a position's whole sum.
    An id whose logit adds nothing is never the one. Returns int64 [P]. Finds the tile, then the id in it: the
    running sum over all of V is never made.
    """
    positions, tiles = sums.shape
    size = logits.shape[1] // tiles
    nothing = torch.zeros_like(thresholds)
    thresholds = torch.minimum(thresholds, sums[:, -1].nextafter(nothing))  # past rounding, below the end
    tile = torch.searchsorted(sums, thresholds[:, None], right=True)  # [P, 1]
    before = torch.where(tile > 0, sums.gather(1, (tile - 1).clamp(min=0)), 0.0)[:, 0]  # [P]
    inside = logits.view(positions, tiles, size).gather(1, tile[:, :, None].expand(-1, 1, size))[:, 0]
    running = (inside.float() - highest[:, None]).exp_().double().cumsum(dim=-1)  # [P, size]
    left = torch.minimum(thresholds - before, running[:, -1].nextafter(nothing))
    return (tile * size + torch.searchsorted(running, left[:, None], right=True))[:, 0]


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Losses of ids [P], float32 [P], from logits [P, V], which become their gradient, softmax - one-hot.

    Some positions at a time: on a CPU while they are in the cache, and nowhere are all of them in float32.
    """
    losses = logits.new_empty(len(logits), dtype=torch.float32)
    number = GPU_ROWS if logits.is_cuda else ROWS
    for start in range(0, len(logits), number):
        rows = slice(start, start + number)
        logs = torch.log_softmax(logits[rows], dim=-1, dtype=torch.float32)
        losses[rows] = -logs.gather(1, targets[rows, None])[:, 0]
        # exp of the log-probabilities is softmax, and - 1 at the target the gradient, in the same memory.
        logs.exp_().scatter_add_(1, targets[rows, None], logs.new_full((len(logs), 1), -1.0))
        logits[rows] = logs
    return losses
