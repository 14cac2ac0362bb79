"""Counter-based random numbers and the masks of masked-language modelling, in numpy alone.

Every random choice about the data is a pure function of (seed, sample, place), drawn with Philox: no
state moves along, so a run that stops, resumes, or changes its number of ranks repeats the same
choices. A sample's number counts on through the epochs (`epoch = sample // chunks`), so a chunk that
comes back in another epoch gets other masks.

    rules = mask_rules(vocab_size=8192, mask_id=4, special_ids=range(5), mask_rate=0.15,
                       mask_token_rate=0.8, random_token_rate=0.1)
    masked, positions, targets = mask_tokens(tokens, lengths, samples, rules, seed=0)

T: tokens, S: samples, P: masked positions, N: counters.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint32]

_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)
# Multipliers and key increments of Philox4x32: Salmon et al., "Parallel random numbers: as easy as
# 1, 2, 3", SC'11, table 2 and section 3.3 (golden ratio and sqrt(3) - 1 as binary fractions).
_MULTIPLY = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_SLAB = 8192  # counters at once: the eight working arrays stay in the second-level cache


class Draw(IntEnum):
    """What a random number is for: the last counter word, so that no two uses share numbers."""

    CHOOSE = 0
    REPLACE = 1
    PAIR = 2
    CUT = 3
    ORDER = 4


def philox4x32(c0: Any, c1: Any, c2: Any, c3: Any, seed: int) -> Words:
    """Philox4x32 with ten rounds: four random words for each counter (Salmon et al., SC'11).

    `c0` to `c3` are the counter's words, each an integer or an array [N] of values below 2**32;
    `seed` is the 64-bit key, low word first. Returns uint32 [N, 4].
    """
    counters = np.broadcast_arrays(*(np.atleast_1d(np.asarray(c)) for c in (c0, c1, c2, c3)))
    number = counters[0].shape[0]
    result = np.empty((number, 4), np.uint32)
    for start in range(0, number, _SLAB):
        slab = slice(start, start + _SLAB)
        x0, x1, x2, x3 = (c[slab].astype(np.uint64) for c in counters)
        y0, y2 = np.empty_like(x0), np.empty_like(x0)
        key = [seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF]
        for _ in range(10):
            np.multiply(x0, _MULTIPLY[0], out=y0)
            np.multiply(x2, _MULTIPLY[1], out=y2)
            # x0, x1, x2, x3 = high(y2) ^ x1 ^ key0, low(y2), high(y0) ^ x3 ^ key1, low(y0)
            np.right_shift(y2, _HALF, out=x0)
            x0 ^= x1
            x0 ^= np.uint64(key[0])
            np.right_shift(y0, _HALF, out=x2)
            x2 ^= x3
            x2 ^= np.uint64(key[1])
            np.bitwise_and(y2, _LOW, out=x1)
            np.bitwise_and(y0, _LOW, out=x3)
            key = [(k + w) & 0xFFFFFFFF for k, w in zip(key, _WEYL, strict=True)]
        for word, x in enumerate((x0, x1, x2, x3)):
            result[slab, word] = x
    return result


def words_of(number: Ints) -> tuple[Ints, Ints]:
    """The low and the high 32 bits of each non-negative `number`, as counter words."""
    return number & 0xFFFFFFFF, number >> 32


def draw_below(limit: Any, words: Words, finer: Words | None = None) -> Ints:
    """Integers in 0 .. limit - 1 (limit below 2**31), from 32 random bits each, or 64 with `finer`.

    Multiply and shift without rejection: the chance of a value is off by a share of at most
    limit / 2**32 (8e-6 at a vocabulary of 32,768), or limit / 2**64 with `finer`.
    """
    limits = np.asarray(limit).astype(np.uint64)
    product = words.astype(np.uint64) * limits
    if finer is not None:
        product += finer.astype(np.uint64) * limits >> _HALF
    return (product >> _HALF).astype(np.int64)


@dataclass(frozen=True)
class MaskRules:
    """Who may be masked and how often. A word w drawn for a token says all: w < `mask_below`: it
    becomes [MASK]; else w < `random_below`: a random piece; else w < `chosen_below`: it stays but is
    predicted; else it is left alone."""

    special: npt.NDArray[np.bool_]  # [vocabulary]: never chosen, never drawn as a replacement
    ordinary: Ints  # the other ids
    mask_id: int
    mask_below: int
    random_below: int
    chosen_below: int


def mask_rules(
    *,
    vocab_size: int,
    mask_id: int,
    special_ids: Iterable[int],
    mask_rate: float,
    mask_token_rate: float,
    random_token_rate: float,
) -> MaskRules:
    """The rules of BERT (Devlin et al. 2019, section 3.1) at these rates, exact to 2**-32."""
    special = np.zeros(vocab_size, np.bool_)
    special[list(special_ids)] = True
    return MaskRules(
        special=special,
        ordinary=np.flatnonzero(~special),
        mask_id=mask_id,
        mask_below=round(2**32 * mask_rate * mask_token_rate),
        random_below=round(2**32 * mask_rate * (mask_token_rate + random_token_rate)),
        chosen_below=round(2**32 * mask_rate),
    )


def mask_tokens(
    tokens: Ints, lengths: Ints, samples: Ints, rules: MaskRules, seed: int
) -> tuple[Ints, Ints, Ints]:
    """Chooses positions to predict and hides most of them.

    `tokens` [T] are samples laid end to end, of `lengths` [S] and numbers `samples` [S]. Each token
    that is not special is chosen independently; the choice depends on (seed, sample, position in the
    sample) and on nothing else in the batch. Returns the masked tokens [T], the chosen places in
    them, ascending [P], and the original ids there [P]. P may be 0.
    """
    # One Philox counter serves four neighbouring positions; the last one of a sample may be part idle.
    blocks = (lengths + 3) // 4
    block_start = np.cumsum(blocks) - blocks
    token_start = np.cumsum(lengths) - lengths
    sample_of_block = np.repeat(np.arange(len(lengths)), blocks)  # [N]
    block = np.arange(len(sample_of_block)) - block_start[sample_of_block]
    low, high = words_of(samples)
    words = philox4x32(block, low[sample_of_block], high[sample_of_block], Draw.CHOOSE, seed).ravel()

    drawn = np.flatnonzero(words < rules.chosen_below)
    row = sample_of_block[drawn >> 2]
    position = drawn - 4 * block_start[row]
    place = token_start[row] + position
    inside = position < lengths[row]
    inside[inside] = ~rules.special[tokens[place[inside]]]
    drawn, row, position, place = drawn[inside], row[inside], position[inside], place[inside]

    word = words[drawn]
    masked = tokens.copy()
    masked[place[word < rules.mask_below]] = rules.mask_id
    random = (word >= rules.mask_below) & (word < rules.random_below)
    fresh = philox4x32(position[random], low[row[random]], high[row[random]], Draw.REPLACE, seed)
    masked[place[random]] = rules.ordinary[draw_below(len(rules.ordinary), fresh[:, 0])]
    return masked, place, tokens[place]
