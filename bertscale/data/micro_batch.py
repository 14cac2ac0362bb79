"""A micro-batch: the input of one forward pass of one rank, made by the loader and read by the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class MicroBatch(NamedTuple):
    """S samples in Q sequences `[CLS] A [SEP]` or `[CLS] A [SEP] B [SEP]`, laid end to end without padding.

    T tokens, P predicted positions. A tuple, so that DeepSpeed's hooks find the tensors in it.
    """

    tokens: Tensor  # int64 [T], the input: masked, unless it is causal
    token_types: Tensor  # int64 [T], 0 for [CLS] A [SEP], 1 for B [SEP]
    positions: Tensor  # int64 [T], 0, 1, ... within each sequence
    lengths: tuple[int, ...]  # Q sequence lengths in tokens, on the host; nothing attends beyond its own
    target_positions: Tensor  # int64 [P], ascending, into tokens; P may be 0
    targets: Tensor  # int64 [P], the ids that are predicted there; -1 where nothing is
    num_targets: int  # of the P; those behind them only fill up: position 0, id -1
    # int64 [S]: 0: B continues A, 1: B is random, or swapped with A; None without pairs
    next_sentence_label: Tensor | None = None
    uniforms: Tensor | None = None  # float64 [P], random in (0, 1), by which a generator draws ids
    causal: bool = False  # a token attends to itself and to those before it alone, and predicts the next

    def to(self, device: torch.device | str) -> MicroBatch:
        """The micro-batch on `device`; from pinned memory the copy runs beside the computation."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> MicroBatch:
        """The micro-batch in page-locked memory; needs CUDA."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, change: Callable[[Tensor], Tensor]) -> MicroBatch:
        values = (change(value) if isinstance(value, Tensor) else value for value in self)
        return MicroBatch._make(values)
