"""The order of samples: keyed permutations of blocks, and of the samples inside a window of blocks.

An epoch is a permutation of the blocks, cut into windows; inside a window the samples are permuted. Both
are functions of (seed, phase, epoch, window), so that the n-th sample of a corpus of any size is found at
once and reads stay inside a few blocks at a time.

    order = Order(samples_per_block, window_blocks=64, seed=0)
    for part in order.find(np.arange(256)): ...   # the blocks of a window, indices of samples in it

Window here always means the shuffle window (`samples.window_blocks`), never that of local attention.

B: blocks, W: windows, N: samples.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from math import isqrt
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from bertscale.data.masking import Draw, Ints, philox4x32

Keys = npt.NDArray[np.uint64]

_ROUNDS = 8  # of the Feistel network; two at a time, one for each half


class WindowSamples(NamedTuple):
    """The samples, among those asked for, that lie in one window of one epoch: n of them."""

    epoch: int
    window: int
    blocks: Ints  # the window's blocks, ascending
    asked: Ints  # [n] which of the samples asked for
    indices: Ints  # [n] their numbers among the samples of the blocks, counted block by block


class Order:
    """The order of one corpus at one phase; `num_samples` make an epoch.

    Windows have `window_blocks` blocks; what is left over joins the last one. Holds 8 bytes a block for
    each of two epochs.
    """

    def __init__(self, samples_per_block: Ints, window_blocks: int, seed: int, phase: int = 0) -> None:
        self.samples_per_block, self.window_blocks = samples_per_block, window_blocks
        self.seed, self.phase = seed, phase
        self.num_samples = int(samples_per_block.sum(dtype=np.int64))
        self.num_windows = max(1, len(samples_per_block) // window_blocks)
        self._epoch = lru_cache(maxsize=2)(self._make_epoch)  # two: batches are made across an epoch's end

    def find(self, numbers: Ints) -> Iterator[WindowSamples]:
        """Finds the samples of these numbers [N], window by window; 0, 1, ... count on through the epochs."""
        epochs, in_epoch = np.divmod(numbers, self.num_samples)  # [N] each
        for epoch in np.unique(epochs).tolist():
            _, starts = self._epoch(epoch)  # [W + 1]
            here = np.flatnonzero(epochs == epoch)
            windows = np.searchsorted(starts, in_epoch[here], side="right") - 1
            for window in np.unique(windows).tolist():
                asked = here[windows == window]
                size = int(starts[window + 1] - starts[window])
                keys = round_keys(self.seed, self.phase, epoch, window)
                index = permute(in_epoch[asked] - starts[window], size, keys)
                yield WindowSamples(epoch, window, self.blocks(epoch, window), asked, index)

    def blocks(self, epoch: int, window: int) -> Ints:
        """The blocks of a window, ascending; the window after an epoch's last is the next one's first."""
        if window == self.num_windows:
            epoch, window = epoch + 1, 0
        blocks, _ = self._epoch(epoch)
        last = window + 1 == self.num_windows
        return np.sort(  # the samples are permuted anyhow, and a disk reads forward
            blocks[window * self.window_blocks : None if last else (window + 1) * self.window_blocks]
        )

    def _make_epoch(self, epoch: int) -> tuple[Ints, Ints]:
        """The blocks in the epoch's order [B] and the first sample of each window [W + 1]."""
        size = len(self.samples_per_block)
        blocks = permute(np.arange(size), size, round_keys(self.seed, self.phase, epoch))
        ends = np.cumsum(self.samples_per_block[blocks], dtype=np.int64)  # [B]
        inner = ends[np.arange(1, self.num_windows) * self.window_blocks - 1]  # [W - 1]
        return blocks, np.concatenate([np.zeros(1, np.int64), inner, ends[-1:]])


def permute(indices: Ints, size: int, keys: Keys) -> Ints:
    """Where `indices` [N], each in 0 .. size - 1, go in the permutation of 0 .. size - 1 that `keys` makes.

    A Feistel network on a grid of a x b >= size cells with modular addition, walked on where it leaves
    the range (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002): the image of any index is
    computed alone, so a permutation of any size starts at once, takes no memory, and is the same on every
    machine.
    """
    a = isqrt(size - 1) + 1  # the square root, rounded up
    b = -(-size // a)
    images = indices.astype(np.uint64)
    # Cycle walking: the network permutes all a x b cells, so an image outside the range is put in again until
    # it falls inside, and no two ever meet. Fewer than a cells lie outside: seldom more than two passes.
    outside = np.arange(len(images))
    while len(outside):
        right, left = np.divmod(images[outside], np.uint64(a))
        for number in range(0, _ROUNDS, 2):
            left = (left + _mix(right + keys[number]) % np.uint64(a)) % np.uint64(a)
            right = (right + _mix(left + keys[number + 1]) % np.uint64(b)) % np.uint64(b)
        images[outside] = left + np.uint64(a) * right
        outside = outside[images[outside] >= size]
    return images.astype(np.int64)


@lru_cache(maxsize=64)
def round_keys(seed: int, phase: int, epoch: int, window: int = -1) -> Keys:
    """The keys of `permute` for the samples of a window, or (-1) for the blocks of an epoch."""
    use = Draw.ORDER | phase << 8 | epoch >> 32 << 20  # the other draws leave these bits at 0
    words = philox4x32(np.arange(_ROUNDS), epoch & 0xFFFFFFFF, window + 1, use, seed).astype(np.uint64)
    return words[:, 0] << np.uint64(32) | words[:, 1]


def _mix(x: Keys) -> Keys:
    """The finaliser of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
