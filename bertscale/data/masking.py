"""Counter-based random numbers and the masks of masked-language modelling, in numpy alone.

Every random choice about the data is a pure function of (seed, sample, position), drawn with Philox: no
state is carried along, so a run that stops, resumes, or changes its number of ranks repeats the same
choices. A sample's number counts on through the epochs, so a text that comes again in another epoch gets
other masks.

    rules = mask_rules(vocab_size=8192, mask_id=4, special_ids=range(5), mask_rate=0.15,
                       mask_token_rate=0.8, random_token_rate=0.1,
                       unit="word", starts_word=tokenizer.starts_word)
    masked, positions, targets = mask_tokens(tokens, lengths, samples, rules, seed=0)

What is chosen as a whole (`unit`) is a token, a word, or a span of words. The expected fraction of predicted
tokens is `mask_rate` with each of them, in every sample, however short.

- token: BERT (Devlin et al. 2019, section 3.1). Each token alone, by chance.
- word: BERT's whole-word masking (its repository, release of 2019-05-31; Cui et al. 2019 for Chinese).
  Each word alone, by chance; then every token of it becomes [MASK], a random piece, or stays, by its own
  chance, as in the code of that release. That code masks shuffled words up to a rounded count instead.
  `Tokenizer.starts_word` says what a word is, each Chinese character one, or the shards do, where a segmenter
  found the words (`words` of prep).
- span: SpanBERT (Joshi et al. 2020, section 3.1). Spans of whole words from random words on, their
  lengths geometric, cut off at the longest and scaled to 1, until `mask_rate` is reached; a run of chosen
  words becomes [MASK], random pieces, or stays, together. As in its code, spans that overlap or touch
  make one run. Unlike it: a span may begin inside one drawn before; any word is as likely as another to
  begin one, however many pieces it has; the rate is not rounded up, and the last span ends with a whole
  word, left out by chance, so that the expected rate is exact; no span passes a special token.

T: tokens, S: samples, W: words, P: masked positions, N: counters, 4N: random numbers, four to a counter.
Position: in the sample; index: in the arrays of all samples laid end to end. Word: of text, but the `uint32`
words of Philox's counters and results are 32 bits each.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
Words = npt.NDArray[np.uint32]

_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)
# Multipliers and key increments of Philox4x32: Salmon et al., "Parallel random numbers: as easy as
# 1, 2, 3", SC'11, table 2 and section 3.3 (golden ratio and sqrt(3) - 1 as binary fractions).
_MULTIPLY = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_AT_ONCE = 8192  # counters: the eight working arrays stay in the second-level cache


class Draw(IntEnum):
    """What a random number is for: the last counter word, so that no two uses share numbers."""

    CHOOSE = 0
    REPLACE = 1
    PAIR = 2
    CUT = 3
    ORDER = 4
    EXTENT = 5
    ROUND = 6
    SAMPLE = 7


def philox4x32(c0: Any, c1: Any, c2: Any, c3: Any, seed: int) -> Words:
    """Philox4x32 with ten rounds: four random words for each counter (Salmon et al., SC'11).

    `c0` to `c3` are the counter's words, each an integer or an array [N] of values below 2**32;
    `seed` is the 64-bit key, low word first. Returns uint32 [N, 4].
    """
    counters = np.broadcast_arrays(*(np.atleast_1d(np.asarray(c)) for c in (c0, c1, c2, c3)))
    number = counters[0].shape[0]
    result = np.empty((number, 4), np.uint32)
    for start in range(0, number, _AT_ONCE):
        part = slice(start, start + _AT_ONCE)
        x0, x1, x2, x3 = (c[part].astype(np.uint64) for c in counters)  # 32 bits each, with room for products
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
            result[part, word] = x
    return result


def words_of(number: Ints) -> tuple[Ints, Ints]:
    """The low and the high 32 bits of each non-negative `number`, as counter words."""
    return number & 0xFFFFFFFF, number >> 32


def draw_below(limit: Any, words: Words, finer: Words | None = None) -> Ints:
    """Integers in 0 .. limit - 1 (limit below 2**31), from 32 random bits each, or 64 with `finer`.

    Multiply and shift without rejection (Lemire, 2019): the relative error of a value's probability is at
    most limit / 2**32 (8e-6 at a vocabulary of 32,768), or limit / 2**64 with `finer`.
    """
    limits = np.asarray(limit).astype(np.uint64)
    product = words.astype(np.uint64) * limits
    if finer is not None:
        product += finer.astype(np.uint64) * limits >> _HALF
    return (product >> _HALF).astype(np.int64)


@dataclass(frozen=True)
class MaskRules:
    """Which tokens may be masked and how often, as bounds of 32-bit random numbers; see `mask_rules`.

    With tokens, the number n that chooses a token decides all: n < `mask_below`: it becomes [MASK]; else n <
    `random_below`: a random piece; else n < `chosen_below`: it stays but is predicted; else nothing happens
    to it. With words and spans one number is compared with `chosen_below`, another with the two others.
    """

    special: Bools  # [vocabulary]: never chosen, never drawn as a replacement, never inside a word
    ordinary: Ints  # the other ids
    mask_id: int
    mask_below: int
    random_below: int
    chosen_below: int
    unit: Literal["token", "word", "span"]
    starts_word: Bools  # [vocabulary]; empty with tokens
    longer_below: tuple[int, ...]  # a span is longer than d words if its number is below the d-th


def mask_rules(
    *,
    vocab_size: int,
    mask_id: int,
    special_ids: Iterable[int],
    mask_rate: float,
    mask_token_rate: float,
    random_token_rate: float,
    unit: Literal["token", "word", "span"] = "token",
    starts_word: Bools | None = None,
    span_p: float = 0.2,
    span_max: int = 10,
) -> MaskRules:
    """The rules at these rates (fractions of tokens, and of the chosen ones), exact to 2**-32.

    `starts_word` [vocabulary], which words and spans need: whether a piece begins a word. `span_p` and
    `span_max` (words): the probability of n words is in proportion to (1 - span_p)**(n - 1), n = 1 ..
    span_max; the defaults are SpanBERT's and give 3.8 words in the mean. Raises ValueError without a fitting
    `starts_word`.
    """
    special = np.zeros(vocab_size, np.bool_)
    special[list(special_ids)] = True
    if starts_word is None:
        if unit != "token":
            raise ValueError(f"unit={unit!r} needs starts_word")
        starts_word = np.zeros(0, np.bool_)
    elif starts_word.shape != (vocab_size,):
        raise ValueError(f"starts_word has shape {starts_word.shape}, not ({vocab_size},)")
    decided = 2**32 * mask_rate if unit == "token" else 2**32
    probabilities = (1 - span_p) ** np.arange(span_max)  # of 1, 2, ... words, up to a factor
    # [span_max + 1]: of more than 0, 1, 2, ... words; the last is 0.
    longer = np.append(np.cumsum(probabilities[::-1])[::-1] / probabilities.sum(), 0.0)
    return MaskRules(
        special=special,
        ordinary=np.flatnonzero(~special),
        mask_id=mask_id,
        mask_below=round(decided * mask_token_rate),
        random_below=round(decided * (mask_token_rate + random_token_rate)),
        chosen_below=round(2**32 * mask_rate),
        unit=unit,
        starts_word=starts_word,
        longer_below=tuple(round(2**32 * probability) for probability in longer.tolist()),
    )


def mask_tokens(
    tokens: Ints,
    lengths: Ints,
    samples: Ints,
    rules: MaskRules,
    seed: int,
    word_starts: Bools | None = None,
) -> tuple[Ints, Ints, Ints]:
    """Chooses positions to predict and hides most of them.

    `tokens` [T] are samples laid end to end, of `lengths` [S] and numbers `samples` [S]; `word_starts` [T]
    tells which of them begin a word, where that is not a matter of the pieces alone. What is chosen
    depends on (seed, sample, its tokens) and on nothing else in the batch; special tokens are never
    chosen and end a word or span. Returns the masked tokens [T], the indices of the chosen ones, ascending
    [P], and the original ids there [P]. P may be 0.
    """
    token_start = np.cumsum(lengths) - lengths  # [S]
    low, high = words_of(samples)
    # Of each chosen token [P]: its sample, position and index, and `fate`, the number that decides whether it
    # becomes [MASK], a random piece, or stays.
    if rules.unit == "token":
        sample, position, fate = _draw_rate(lengths, low, high, rules, seed)
        index = token_start[sample] + position
        # Special tokens are drawn like others and then left out: so no draw depends on what the tokens are.
        inside = ~rules.special[tokens[index]]
        sample, position, index, fate = sample[inside], position[inside], index[inside], fate[inside]
    else:
        starts = rules.starts_word[tokens] if word_starts is None else word_starts
        words = _find_words(tokens, token_start, rules, starts)
        if rules.unit == "word":
            sample, number, _ = _draw_rate(words.count, low, high, rules, seed)
            number += words.first[sample]
            inside = ~words.special[number]
            sample, number = sample[inside], number[inside]  # [chosen words]
        else:
            sample, number = _draw_spans(words, low, high, rules, seed)
        size = words.size[number]  # [chosen words] -> [P]: each word becomes its tokens
        index = np.repeat(words.begin[number] - (np.cumsum(size) - size), size)
        index += np.arange(len(index))
        sample = np.repeat(sample, size)
        position = decider = index - token_start[sample]
        if rules.unit == "span":  # the first token of a run of chosen ones decides for all of it
            leads = np.ones(len(index), np.bool_)
            leads[1:] = (np.diff(index) > 1) | (np.diff(sample) > 0)
            decider = position[np.flatnonzero(leads)[np.cumsum(leads) - 1]]
        fate = philox4x32(decider, low[sample], high[sample], Draw.REPLACE, seed)[:, 1]

    masked = tokens.copy()
    masked[index[fate < rules.mask_below]] = rules.mask_id
    random = (fate >= rules.mask_below) & (fate < rules.random_below)
    # By the first word of the same counters, of which `fate` may be the second.
    fresh = philox4x32(position[random], low[sample[random]], high[sample[random]], Draw.REPLACE, seed)
    masked[index[random]] = rules.ordinary[draw_below(len(rules.ordinary), fresh[:, 0])]
    return masked, index, tokens[index]


def draw_uniforms(indices: Ints, lengths: Ints, samples: Ints, seed: int) -> npt.NDArray[np.float64]:
    """Draws a number in (0, 1) for each of the `indices` [P], by which a generator draws an id.

    `indices` count in samples laid end to end, of `lengths` [S] and numbers `samples` [S]; a number depends
    on (seed, sample, position) alone. Returns [P].
    """
    ends = np.cumsum(lengths)  # [S]
    sample = np.searchsorted(ends, indices, side="right")  # [P]
    low, high = words_of(samples[sample])
    words = philox4x32(indices - (ends - lengths)[sample], low, high, Draw.SAMPLE, seed)[:, 0]
    return (words.astype(np.float64) + 0.5) / 2.0**32  # + 0.5: never 0, never 1


def target_capacity(tokens: int, rules: MaskRules | None) -> int:
    """Positions that, but for rare chance, hold all that are chosen of `tokens` tokens; a multiple of 64.

    Without `rules` all may be chosen.

    The mean of their number and six standard deviations. With words, whose tokens are chosen together, the
    variance is that of single tokens times the mean square of a word's tokens over their mean: 4 is more
    than prose has. Spans keep to the rate, and have less.
    """
    if rules is None:
        return 64 * math.ceil(tokens / 64)
    rate = rules.chosen_below / 2**32
    factor = 1 if rules.unit == "token" else 4  # of the variance
    number: float = tokens * rate + 6 * (tokens * rate * (1 - rate) * factor) ** 0.5
    return 64 * max(1, math.ceil(min(number, tokens) / 64))


@dataclass(frozen=True)
class _Words:
    """The words of a batch. A special token is a word, and so are the pieces between a sample's start,
    or a special token, and the first piece that begins a word."""

    begin: Ints  # [W] index of the first token
    size: Ints  # [W] tokens
    special: Bools  # [W]
    first: Ints  # [S] number of the sample's first word
    count: Ints  # [S] words


def _find_words(tokens: Ints, token_start: Ints, rules: MaskRules, starts: Bools) -> _Words:
    """The words of `tokens` [T], which begin with `starts` [T]; each sample begins at `token_start` [S]."""
    special = rules.special[tokens]  # [T]
    begins = starts | special  # [T]
    begins[1:] |= special[:-1]
    begins[token_start[token_start < len(tokens)]] = True  # an empty sample has no first token
    begin = np.flatnonzero(begins)  # [W]
    first = np.searchsorted(begin, token_start)  # [S]
    return _Words(
        begin=begin,
        size=np.diff(begin, append=len(tokens)),
        special=special[begin],
        first=first,
        count=np.diff(first, append=len(begin)),
    )


def _draw(counts: Ints, low: Ints, high: Ints, seed: int) -> tuple[Words, Ints, Ints]:
    """Draws `counts` [S] random numbers for the samples, four with each Philox counter.

    Returns them [4N], the sample of each counter [N], and the first counter of each sample [S]. A sample
    begins a counter of its own, so that its draws do not depend on its neighbours; its last numbers may be
    surplus.
    """
    counters = (counts + 3) // 4  # [S]
    first_counter = np.cumsum(counters) - counters  # [S]
    sample = np.repeat(np.arange(len(counts)), counters)  # [N]
    counter = np.arange(len(sample)) - first_counter[sample]  # [N] in its sample
    numbers = philox4x32(counter, low[sample], high[sample], Draw.CHOOSE, seed).ravel()  # [N, 4] -> [4N]
    return numbers, sample, first_counter


def _draw_rate(counts: Ints, low: Ints, high: Ints, rules: MaskRules, seed: int) -> tuple[Ints, Ints, Words]:
    """Draws each of `counts` [S] tokens or words of the samples with the probability `mask_rate`.

    Returns of those drawn, in order, the sample, the number in it, and the random number that drew them.
    """
    random, sample_of_counter, first_counter = _draw(counts, low, high, seed)
    drawn = np.flatnonzero(random < rules.chosen_below)
    sample = sample_of_counter[drawn >> 2]
    number = drawn - 4 * first_counter[sample]
    inside = number < counts[sample]  # else it is surplus
    return sample[inside], number[inside], random[drawn[inside]]


def _draw_spans(words: _Words, low: Ints, high: Ints, rules: MaskRules, seed: int) -> tuple[Ints, Ints]:
    """The words in spans: the sample and the number of each, in order.

    Every ordinary word begins one span, of a drawn extent, and has a random priority; spans are chosen from
    the lowest priority on until `mask_rate` is reached. So the priority of a word is the lowest one of the
    spans that reach it: no loop over spans, and any rate is reached. Priorities 0 .. 9 and extents in words:

        word                      the  old  cat  sat  on  it
        own priority               7    2    5    9    4   8
        extent of its span         1    3    1    2    2   1
        lowest that reaches it     7    2    2    2    4   4    -> half of the words: old, cat, sat
    """
    samples, number = len(words.count), len(words.begin)
    sample = np.repeat(np.arange(samples), words.count)  # [W] the sample of each word
    drawn, _, first_counter = _draw(words.count, low, high, seed)
    own = drawn[np.arange(number) + np.repeat(4 * first_counter - words.first, words.count)]  # [W]
    size = np.where(words.special, 0, words.size)  # [W] tokens that may be masked
    total = np.bincount(sample, size, samples).astype(np.int64)  # [S]
    span_end = _span_ends(words)  # [W]

    # High priorities do not matter, so only those below a limit are worked out. The limit is an estimate, for
    # speed; where it falls short of the rate, all of the sample is done. The outcome is always the same.
    limit = _priority_limits(words.count, rules)  # [S]
    while True:
        begin = np.flatnonzero((own < limit[sample]) & ~words.special)  # [spans] their first words
        at = sample[begin]  # [spans]
        extent = philox4x32(begin - words.first[at], low[at], high[at], Draw.EXTENT, seed)[:, 0]
        priority = _lowest_priorities(own, begin, extent, span_end[begin] - begin, rules)  # [W]
        word = np.flatnonzero((priority < limit[sample]) & ~words.special)  # [candidates]
        reached = np.bincount(sample[word], size[word], samples).astype(np.int64)  # [S] tokens
        lacking = (reached << 32 < rules.chosen_below * total) & (limit < 1 << 32)  # [S]
        if not lacking.any():
            break
        limit[lacking] = 1 << 32

    # By sample, priority, and index: a radix sort, which numpy has for two bytes.
    low_half, high_half = priority.astype(np.uint16), (priority >> 16).astype(np.uint16)  # [W]
    for key in (low_half, high_half, sample.astype(np.min_scalar_type(samples))):
        word = word[np.argsort(key[word], kind="stable")]
    at, size = sample[word], size[word]  # [candidates]
    before = np.cumsum(size) - size  # [candidates] tokens of those before it
    before -= (np.cumsum(reached) - reached)[at]  # ... in its own sample
    # What is left of the rate, in tokens * 2**32. The word that would pass it is chosen with a probability
    # that makes the mean exact; for those after it nothing is left.
    left = rules.chosen_below * total[at] - (before << 32)  # [candidates]
    chance = philox4x32(0, low, high, Draw.ROUND, seed)[:, 0].astype(np.int64)  # [S]
    chosen = np.zeros(number, np.bool_)  # [W]
    chosen[word[chance[at] * size < left]] = True
    return sample[chosen], np.flatnonzero(chosen)


def _span_ends(words: _Words) -> Ints:
    """One behind the last word that a span may reach from each word [W]: it ends with the sample, or before a
    special token, at the latest."""
    stops = words.special.copy()  # [W]
    stops[words.first[words.count > 0]] = True
    stop = np.flatnonzero(stops)  # [stops] special tokens and first words
    next_stop = np.append(stop, len(words.begin))[1:]
    return np.repeat(next_stop, next_stop - stop)  # [stops] -> [W], for word 0 begins a sample


def _lowest_priorities(own: Words, begin: Ints, extent: Words, room: Ints, rules: MaskRules) -> Words:
    """The lowest priority of the spans that reach each word [W], the highest number there is where none does.

    Spans begin at the words `begin`, with the priority there of `own` [W], and have `room` words at most;
    `extent` are the random numbers that their lengths are drawn by.
    """
    priority = np.full(len(own), 0xFFFFFFFF, np.uint32)  # [W]
    span_priority = own[begin]  # [spans]
    priority[begin] = span_priority
    # As many passes as the longest span has words: over the second word of all spans that have one at once,
    # then over the third.
    for further in range(1, len(rules.longer_below) - 1):
        reaching = np.flatnonzero((extent < rules.longer_below[further]) & (room > further))
        if not len(reaching):
            break
        begin, span_priority = begin[reaching], span_priority[reaching]
        extent, room = extent[reaching], room[reaching]
        priority[begin + further] = np.minimum(priority[begin + further], span_priority)
    return priority


def _priority_limits(count: Ints, rules: MaskRules) -> Ints:
    """A priority of 0 .. 2**32 for each sample of `count` [S] words, so high that the spans below it reach
    the mask rate but for rare chance: their mean number, five standard deviations and a few."""
    rate = min(rules.chosen_below, 2**32 - 1) / 2**32
    # Spans at random leave a word out with the probability exp(-spans * mean length / words): solved for the
    # spans that leave out 1 - rate.
    spans = -math.log1p(-rate) / (sum(rules.longer_below) / 2**32) * count  # [S]
    fraction = (spans + 5 * np.sqrt(spans) + 8) / np.maximum(count, 1)  # of the words, a span each
    limits: Ints = (2.0**32 * np.minimum(fraction, 1)).astype(np.int64)
    return limits
