"""Philox against published vectors; the statistics and the purity of the masks of tokens, words and spans."""

from __future__ import annotations

import hashlib
from math import sqrt
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bertscale.data.masking import Draw, MaskRules, draw_below, mask_rules, mask_tokens, philox4x32

VOCABULARY = 1000
SPECIAL = (0, 1, 2, 3, 4)
MASK = 4
SIGMAS = 5.0  # one correct build in 1.7 million would fail a bound; the seeds are fixed all the same


UNITS = ("token", "word", "span")
STARTS = np.arange(VOCABULARY) % 3 > 0  # a third of the pieces continue a word
STARTS[list(SPECIAL)] = True


def rules_of(mask_rate: float = 0.15, mask: float = 0.8, random: float = 0.1, **options: Any) -> MaskRules:
    return mask_rules(
        vocab_size=VOCABULARY,
        mask_id=MASK,
        special_ids=SPECIAL,
        mask_rate=mask_rate,
        mask_token_rate=mask,
        random_token_rate=random,
        **({"starts_word": STARTS} | options),
    )


def words_by_hand(tokens: list[int], starts: np.ndarray = STARTS) -> list[list[int]]:
    """The places of each word, and of each special token, of one sample."""
    words: list[list[int]] = []
    for place, token in enumerate(tokens):
        alone = token in SPECIAL
        if place == 0 or alone or starts[token] or tokens[place - 1] in SPECIAL:
            words.append([])
        words[-1].append(place)
    return words


def spans_by_hand(tokens: list[int], sample: int, rules: MaskRules, seed: int) -> list[int]:
    """The places that spans choose in one sample, one span after the other, from the same numbers."""
    words = words_by_hand(tokens, rules.starts_word)
    ordinary = [tokens[word[0]] not in SPECIAL for word in words]
    low, high = sample & 0xFFFFFFFF, sample >> 32
    turns = philox4x32(np.arange(len(words)), low, high, Draw.CHOOSE, seed).ravel()
    extents = philox4x32(np.arange(len(words)), low, high, Draw.EXTENT, seed)[:, 0]
    chance = int(philox4x32(0, low, high, Draw.ROUND, seed)[0, 0])
    left = rules.chosen_below * sum(len(word) for word, it in zip(words, ordinary, strict=True) if it)
    chosen: dict[int, bool] = {}  # word: whether it is predicted
    for begin in sorted(range(len(words)), key=lambda n: (turns[n], n)):
        end = begin + sum(int(extents[begin]) < bound for bound in rules.longer_below)
        for n in range(begin, min(end, len(words))):
            if not ordinary[n] or left <= 0:
                break
            if n not in chosen:
                chosen[n] = chance * len(words[n]) < left
                left -= len(words[n]) << 32
    return sorted(place for n, it in chosen.items() if it for place in words[n])


def runs_of(places: np.ndarray, row: np.ndarray) -> np.ndarray:
    """Which of `places` begins a run of neighbouring ones in one sample."""
    return np.concatenate([[True], (np.diff(places) > 1) | (np.diff(row[places]) > 0)])


def corpus(samples: int, longest: int = 128) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    lengths = rng.integers(5, longest + 1, samples)
    return rng.integers(0, VOCABULARY, lengths.sum()), lengths


def close(count: int, trials: int, share: float) -> bool:
    return abs(count - trials * share) <= SIGMAS * sqrt(trials * share * (1 - share))


# Known-answer vectors of Random123 (kat_vectors, philox4x32 10).
@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_gives_the_published_words(
    counter: tuple[int, int, int, int], key: tuple[int, int], words: str
) -> None:
    result = philox4x32(*counter, key[0] | key[1] << 32)
    assert [f"{word:08x}" for word in result[0]] == words.split()


def test_philox_of_many_counters_is_philox_of_each() -> None:
    counters = np.arange(20_000)  # more than two slabs
    many = philox4x32(counters, 7, counters % 11, Draw.PAIR, seed=3)
    for n in (0, 1, 8191, 8192, 16_383, 16_384, 19_999):
        np.testing.assert_array_equal(many[n : n + 1], philox4x32(n, 7, n % 11, Draw.PAIR, seed=3))


def test_draws_stay_below_their_limit_and_are_even() -> None:
    words = philox4x32(np.arange(50_000), 0, 0, 0, seed=1)
    for finer in (None, words[:, 1]):
        drawn = draw_below(7, words[:, 0], finer)
        counts = np.bincount(drawn, minlength=7)
        assert len(counts) == 7
        assert all(close(count, 50_000, 1 / 7) for count in counts)
    top = np.array([0xFFFFFFFF, 0], np.uint32)
    for limit in (1, 2, 1000, 2**31 - 1):
        assert draw_below(limit, top).tolist() == [limit - 1, 0]
        assert draw_below(limit, top, finer=top).tolist() == [limit - 1, 0]


def test_shares_of_masking_lie_within_five_sigmas() -> None:
    tokens, lengths = corpus(8000)
    masked, places, targets = mask_tokens(tokens, lengths, np.arange(8000), rules_of(), seed=0)
    ordinary = ~np.isin(tokens, SPECIAL)
    assert close(len(places), int(ordinary.sum()), 0.15)
    np.testing.assert_array_equal(targets, tokens[places])

    hidden = int((masked[places] == MASK).sum())
    stayed = int((masked[places] == targets).sum())
    replaced = len(places) - hidden - stayed
    same_by_chance = 1 / (VOCABULARY - len(SPECIAL))  # a random piece may be the piece itself
    assert close(hidden, len(places), 0.8)
    assert close(replaced, len(places), 0.1 * (1 - same_by_chance))
    assert close(stayed, len(places), 0.1 * (1 + same_by_chance))

    untouched = np.ones(len(tokens), np.bool_)
    untouched[places] = False
    np.testing.assert_array_equal(masked[untouched], tokens[untouched])


def test_neighbours_are_chosen_independently() -> None:
    length, samples = 64, 6000
    tokens, lengths = np.full(length * samples, 9), np.full(samples, length)
    _, places, _ = mask_tokens(tokens, lengths, np.arange(samples), rules_of(), seed=0)
    chosen = np.zeros((samples, length), np.bool_)
    chosen.ravel()[places] = True
    for lag in (1, 2, 3, 4, 5):
        both = chosen[:, lag:] & chosen[:, :-lag]
        # Overlapping pairs are slightly correlated: 1.3 covers that of the pair counts.
        spread = sqrt(both.size * 0.15**2 * (1 - 0.15**2)) * 1.3
        assert abs(int(both.sum()) - both.size * 0.15**2) <= SIGMAS * spread
    assert all(close(count, samples, 0.15) for count in chosen.sum(axis=0))  # at every position
    following = chosen[1:] & chosen[:-1]  # the same place of the next sample
    assert close(int(following.sum()), following.size, 0.15**2)


@pytest.mark.parametrize("unit", UNITS)
def test_special_tokens_are_never_chosen_nor_drawn(unit: str) -> None:
    tokens, lengths = corpus(2000)
    rules = rules_of(mask_rate=0.9, mask=0.0, random=1.0, unit=unit)
    masked, places, targets = mask_tokens(tokens, lengths, np.arange(2000), rules, seed=0)
    assert not np.isin(targets, SPECIAL).any()
    assert not np.isin(masked[places], SPECIAL).any()
    special = np.isin(tokens, SPECIAL)
    np.testing.assert_array_equal(masked[special], tokens[special])
    drawn = np.bincount(masked[places], minlength=VOCABULARY)[len(SPECIAL) :]
    expected = len(places) / len(drawn)
    freedom = len(drawn) - 1
    assert abs(((drawn - expected) ** 2).sum() / expected - freedom) <= SIGMAS * sqrt(2 * freedom)


def test_masks_are_a_function_of_seed_and_sample() -> None:
    tokens, lengths = corpus(50)
    samples = np.arange(50)
    first = mask_tokens(tokens, lengths, samples, rules_of(), seed=0)
    again = mask_tokens(tokens, lengths, samples, rules_of(), seed=0)
    for one, other in zip(first, again, strict=True):
        np.testing.assert_array_equal(one, other)
    # Another seed, its high word too; other sample numbers, as in another epoch, beyond 2**32 too.
    variants = [(samples, 1), (samples, 1 << 32), (samples + 50, 0), (samples + (1 << 32), 0)]
    for numbers, seed in variants:
        places = mask_tokens(tokens, lengths, numbers, rules_of(), seed=seed)[1]
        common = len(np.intersect1d(places, first[1]))
        assert close(common, len(first[1]), 0.15)  # no more than chance


@pytest.mark.parametrize("unit", UNITS)
def test_masks_do_not_depend_on_the_neighbours_in_the_batch(unit: str) -> None:
    tokens, lengths = corpus(40)
    samples = np.arange(100, 140)
    together, places, _ = mask_tokens(tokens, lengths, samples, rules_of(unit=unit), seed=0)
    ends = np.cumsum(lengths)
    for row in reversed(range(40)):
        part = slice(ends[row] - lengths[row], ends[row])
        alone, alone_places, _ = mask_tokens(
            tokens[part], lengths[row : row + 1], samples[row : row + 1], rules_of(unit=unit), seed=0
        )
        np.testing.assert_array_equal(alone, together[part])
        inside = (places >= part.start) & (places < part.stop)
        np.testing.assert_array_equal(alone_places + part.start, places[inside])


@pytest.mark.parametrize("unit", UNITS)
def test_nothing_to_choose(unit: str) -> None:
    rules = rules_of(0.99, unit=unit)
    for tokens, lengths in (([2, 3, 3], [3]), ([2, 3, 3], [0, 1, 0, 2, 0]), ([], [0]), ([], [0, 0])):
        numbers = np.arange(len(lengths))
        given = np.array(tokens, np.int64)
        masked, places, targets = mask_tokens(given, np.array(lengths), numbers, rules, seed=0)
        assert masked.tolist() == tokens
        assert len(places) == len(targets) == 0
        assert places.dtype == targets.dtype == masked.dtype == np.int64


@pytest.mark.parametrize(
    ("unit", "expected"),
    [
        ("token", "358e7b2ed63ae5bb3ac63409d091f966929dd83a3a20db0628a9f5146c5f5146"),
        ("word", "25a052150c427cb948d3f9bfef9d2204c5a4c92aba0dea6daeaf7e2ec0dbd5a9"),
        ("span", "3330c3b8a7cf72d9a7469ddc503fdf7051610cb8ccc875701f8bfce98f2c13e7"),
    ],
)
def test_masks_stay_what_they_were(unit: str, expected: str) -> None:
    """A change of these digests means that no run resumes into the masks it began with: say so in the
    change log."""
    lengths = np.arange(300) * 7919 % 129
    tokens = np.arange(lengths.sum()) * 2654435761 % VOCABULARY
    digest = hashlib.sha256()
    for seed, rate in ((0, 0.15), (2**40 + 7, 0.5)):
        rules = rules_of(rate, unit=unit)
        for values in mask_tokens(tokens, lengths, np.arange(300) * 2**25, rules, seed):
            digest.update(values.astype("<i8").tobytes())
    assert digest.hexdigest() == expected


def test_words_and_spans_need_to_know_what_begins_a_word() -> None:
    with pytest.raises(ValueError, match="unit='word' needs starts_word"):
        rules_of(unit="word", starts_word=None)
    with pytest.raises(ValueError, match="shape"):
        rules_of(unit="span", starts_word=STARTS[:-1])


@st.composite
def batches(draw: st.DrawFn) -> tuple[list[list[int]], list[int], MaskRules, int]:
    """Samples, their numbers, rules, a seed: pieces 0 .. 4 are special, of 5 .. 15 some begin a word."""
    ordinary = draw(st.lists(st.booleans(), min_size=11, max_size=11))
    mask = draw(st.floats(0, 1))
    rules = mask_rules(
        vocab_size=16,
        mask_id=MASK,
        special_ids=SPECIAL,
        mask_rate=draw(st.floats(0.001, 0.999)),
        mask_token_rate=mask,
        random_token_rate=draw(st.floats(0, 1)) * (1 - mask),
        unit=draw(st.sampled_from(UNITS)),
        starts_word=np.array([True] * 5 + ordinary),
        span_p=draw(st.floats(0.01, 1)),
        span_max=draw(st.integers(1, 12)),
    )
    piece = st.one_of(st.integers(5, 15), st.integers(0, 15))
    samples = draw(st.lists(st.lists(piece, max_size=40), min_size=1, max_size=6))
    size = len(samples)
    numbers = draw(st.lists(st.integers(0, 2**62), min_size=size, max_size=size, unique=True))
    return samples, numbers, rules, draw(st.integers(0, 2**64 - 1))


def mask_batch(
    samples: list[list[int]], numbers: list[int], rules: MaskRules, seed: int
) -> tuple[list[list[int]], list[list[int]]]:
    """The masked tokens and the chosen positions of each sample."""
    lengths = np.array([len(sample) for sample in samples])
    tokens = np.array([token for sample in samples for token in sample], np.int64)
    before = tokens.copy()
    masked, places, targets = mask_tokens(tokens, lengths, np.array(numbers), rules, seed)
    np.testing.assert_array_equal(tokens, before)
    np.testing.assert_array_equal(targets, tokens[places])
    assert (np.diff(places) > 0).all()
    starts = np.cumsum(lengths) - lengths
    return (
        [masked[s : s + n].tolist() for s, n in zip(starts, lengths, strict=True)],
        [
            (places[(places >= s) & (places < s + n)] - s).tolist()
            for s, n in zip(starts, lengths, strict=True)
        ],
    )


@settings(max_examples=200, deadline=None)
@given(batches())
def test_any_batch_keeps_the_rules(batch: tuple[list[list[int]], list[int], MaskRules, int]) -> None:
    samples, numbers, rules, seed = batch
    masked, chosen = mask_batch(samples, numbers, rules, seed)
    # Backwards and alone, the samples get the same masks.
    backwards = mask_batch(samples[::-1], numbers[::-1], rules, seed)
    assert (masked, chosen) == (backwards[0][::-1], backwards[1][::-1])
    for tokens, number, hidden, places in zip(samples, numbers, masked, chosen, strict=True):
        assert mask_batch([tokens], [number], rules, seed) == ([hidden], [places])
        assert not any(tokens[place] in SPECIAL for place in places)
        for place, (old, new) in enumerate(zip(tokens, hidden, strict=True)):
            assert old == new or place in places
            assert new in (old, MASK) or new not in SPECIAL
        words = words_by_hand(tokens, rules.starts_word)
        ordinary = [word for word in words if tokens[word[0]] not in SPECIAL]
        if rules.unit != "token":
            assert all(len(set(word) & set(places)) in (0, len(word)) for word in ordinary)
        if rules.unit == "span":
            assert places == spans_by_hand(tokens, number, rules, seed)
            share = rules.chosen_below / 2**32 * sum(map(len, ordinary))
            assert abs(len(places) - share) < max(map(len, ordinary), default=1)


@pytest.mark.parametrize("rate", [0.02, 0.15, 0.6])
@pytest.mark.parametrize("special", [0.0, 0.02, 0.5])  # at one half the estimate of early turns falls short
def test_spans_are_those_taken_one_by_one(rate: float, special: float) -> None:
    rng = np.random.default_rng(1)
    lengths = rng.integers(200, 600, 12)
    tokens = rng.integers(5, VOCABULARY, lengths.sum())
    tokens[rng.random(len(tokens)) < special] = 3
    numbers = np.arange(12) + (5 << 32)
    rules = rules_of(rate, unit="span")
    _, places, _ = mask_tokens(tokens, lengths, numbers, rules, seed=9)
    expected = []
    for start, length, number in zip(np.cumsum(lengths) - lengths, lengths, numbers, strict=True):
        sample = tokens[start : start + length].tolist()
        expected += [start + place for place in spans_by_hand(sample, int(number), rules, seed=9)]
    assert places.tolist() == expected


def test_a_batch_may_hold_more_samples_than_two_bytes_count() -> None:
    tokens = np.arange(5, 145_005) % 900 + 5
    lengths, numbers = np.full(72_500, 2), np.arange(72_500)
    rules = rules_of(0.4, unit="span")
    masked, places, _ = mask_tokens(tokens, lengths, numbers, rules, seed=0)
    part = slice(70_000, 70_100)
    alone, at, _ = mask_tokens(tokens[140_000:140_200], lengths[part], numbers[part], rules, seed=0)
    np.testing.assert_array_equal(alone, masked[140_000:140_200])
    np.testing.assert_array_equal(at + 140_000, places[(places >= 140_000) & (places < 140_200)])


@pytest.mark.parametrize("unit", ["word", "span"])
@pytest.mark.parametrize("rate", [0.15, 0.4])
@pytest.mark.parametrize("longest", [4, 60])
def test_the_share_of_tokens_in_words_and_spans(unit: str, rate: float, longest: int) -> None:
    lengths = np.random.default_rng(2).integers(1, longest + 1, 6000)
    tokens = np.random.default_rng(3).integers(0, VOCABULARY, lengths.sum())
    places = mask_tokens(tokens, lengths, np.arange(6000), rules_of(rate, unit=unit), seed=4)[1]
    variance = expected = 0.0
    for start, length in zip(np.cumsum(lengths) - lengths, lengths, strict=True):
        sample = tokens[start : start + length].tolist()
        sizes = [len(word) for word in words_by_hand(sample) if sample[word[0]] not in SPECIAL]
        expected += rate * sum(sizes)
        if unit == "word":  # each word by itself: a scaled binomial law
            variance += rate * (1 - rate) * sum(size**2 for size in sizes)
        else:  # one word, at most, is in or out by chance
            variance += max(sizes, default=0) ** 2 / 4
    assert abs(len(places) - expected) <= SIGMAS * sqrt(variance)


@pytest.mark.parametrize("unit", ["word", "span"])
def test_a_sample_of_one_word_is_chosen_at_the_rate(unit: str) -> None:
    # It begins in the middle of a word: 6 and 9 continue one. Half of the samples have [CLS] and [SEP].
    samples = [[6, 9, 9], [2, 6, 9, 9, 3]] * 5000
    _, chosen = mask_batch(samples, list(range(10_000)), rules_of(unit=unit), seed=0)
    assert {tuple(places) for places in chosen} == {(), (0, 1, 2), (1, 2, 3)}
    for begin in (0, 1):
        assert close(sum(bool(places) for places in chosen[begin::2]), 5000, 0.15)


def test_words_are_chosen_one_by_one_and_their_tokens_hidden_one_by_one() -> None:
    length, samples = 64, 6000
    tokens = np.tile(np.array([10, 9]), length * samples // 2)  # words of two pieces
    masked, places, _ = mask_tokens(
        tokens, np.full(samples, length), np.arange(samples), rules_of(unit="word"), seed=0
    )
    chosen = np.zeros((samples, length // 2, 2), np.bool_)
    chosen.ravel()[places] = True
    np.testing.assert_array_equal(chosen[:, :, 0], chosen[:, :, 1])
    word = chosen[:, :, 0]
    assert all(close(count, samples, 0.15) for count in word.sum(axis=0))
    for lag in (1, 2, 4):
        both = word[:, lag:] & word[:, :-lag]
        spread = sqrt(both.size * 0.15**2 * (1 - 0.15**2)) * 1.3  # as for tokens, above
        assert abs(int(both.sum()) - both.size * 0.15**2) <= SIGMAS * spread
    hidden = masked.reshape(-1, 2)[word.ravel()] == MASK
    for share in hidden.mean(axis=0):
        assert close(round(share * len(hidden)), len(hidden), 0.8)
    assert close(int(hidden.all(axis=1).sum()), len(hidden), 0.8**2)


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize(("mask", "random"), [(0.8, 0.1), (0.5, 0.3), (0.0, 1.0), (1.0, 0.0), (0.0, 0.0)])
def test_any_mix_of_mask_random_and_unchanged(unit: str, mask: float, random: float) -> None:
    samples, length = 1500, 128
    rng = np.random.default_rng(5)
    tokens = rng.integers(5, VOCABULARY, samples * length)
    row = np.repeat(np.arange(samples), length)
    rules = rules_of(0.15, mask, random, unit=unit)
    masked, places, targets = mask_tokens(tokens, np.full(samples, length), np.arange(samples), rules, 6)
    hidden, same = masked[places] == MASK, masked[places] == targets
    drawn = masked[places][~hidden & ~same]  # even over the pieces, whatever number decided the fate
    fifths = np.bincount((drawn - 5) // ((VOCABULARY - 5) // 5), minlength=5)
    assert all(close(count, len(drawn), 1 / 5) for count in fifths)
    if unit == "span":  # a run of chosen words has one fate
        run = np.cumsum(runs_of(places, row)) - 1
        size = np.bincount(run)
        hidden_run, same_run = np.bincount(run, hidden), np.bincount(run, same)
        assert set(np.unique(hidden_run / size)) <= {0.0, 1.0}
        # A random piece may be the piece itself, so of a random run of two or more not all are the same.
        long = size > 1
        assert long.sum() > 3000
        hidden, same = (hidden_run == size)[long], (same_run == size)[long]
        same_by_chance = 0.0
    else:
        same_by_chance = 1 / (VOCABULARY - len(SPECIAL))
    stays = 1 - mask - random + random * same_by_chance
    assert close(int(hidden.sum()), len(hidden), mask)
    assert close(int(same.sum()), len(same), stays)


def test_span_lengths_are_the_truncated_geometric_ones() -> None:
    """The bounds that `spans_by_hand`, equal to the spans above, takes the lengths from."""
    numbers = philox4x32(np.arange(50_000), 0, 0, Draw.EXTENT, seed=8)[:, 0]
    for p, longest in ((0.2, 10), (0.5, 4), (0.05, 30)):
        chances = p * (1 - p) ** np.arange(longest)
        chances /= chances.sum()
        bounds = rules_of(unit="span", span_p=p, span_max=longest).longer_below
        lengths = sum((numbers < bound).astype(np.int64) for bound in bounds)
        counts, expected = np.bincount(lengths, minlength=longest + 1)[1:], 50_000 * chances
        assert counts.sum() == 50_000
        freedom = longest - 1
        excess = ((counts - expected) ** 2 / expected).sum() - freedom
        assert abs(excess) <= SIGMAS * sqrt(2 * freedom)
    mean = sum(rules_of(unit="span").longer_below) / 2**32
    assert round(mean, 1) == 3.8  # as the paper says
    assert rules_of(unit="span", span_p=1.0).longer_below[1:] == (0,) * 10
    even = rules_of(unit="span", span_p=1e-20, span_max=4).longer_below
    assert even == (2**32, 3 * 2**30, 2**31, 2**30, 0)


def test_spans_seen_from_outside() -> None:
    # Two words of 200, of one piece each, in spans of one or two words.
    samples, length = 10_000, 200
    rules = rules_of(2 / length, unit="span", span_p=0.25, span_max=2)
    lengths = np.full(samples, length)
    places = mask_tokens(np.full(samples * length, 10), lengths, np.arange(samples), rules, seed=1)[1]
    first, second = places.reshape(samples, 2).T
    two = 0.75 / 1.75 * (1 - 1 / length)  # a span that begins with the last word has no second one
    beside = two + (1 - two) * 2 / length  # or the next span begins beside the first by chance
    assert close(int((second - first == 1).sum()), samples, beside)
    # One word: any of the sample's with the same chance.
    samples, length = 40_000, 20
    rules = rules_of(1 / length, unit="span")
    lengths = np.full(samples, length)
    places = mask_tokens(np.full(samples * length, 10), lengths, np.arange(samples), rules, seed=2)[1]
    np.testing.assert_array_equal(places // length, np.arange(samples))
    assert all(close(count, samples, 1 / length) for count in np.bincount(places % length))
