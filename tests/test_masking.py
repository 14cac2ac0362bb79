"""Philox against published vectors; the statistics and the purity of the masks."""

from __future__ import annotations

from math import sqrt

import numpy as np
import pytest

from bertscale.masking import Draw, MaskRules, draw_below, mask_rules, mask_tokens, philox4x32

VOCABULARY = 1000
SPECIAL = (0, 1, 2, 3, 4)
MASK = 4
SIGMAS = 5.0  # one correct build in 1.7 million would fail a bound; the seeds are fixed all the same


def rules_of(mask_rate: float = 0.15, mask: float = 0.8, random: float = 0.1) -> MaskRules:
    return mask_rules(
        vocab_size=VOCABULARY,
        mask_id=MASK,
        special_ids=SPECIAL,
        mask_rate=mask_rate,
        mask_token_rate=mask,
        random_token_rate=random,
    )


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


def test_special_tokens_are_never_chosen_nor_drawn() -> None:
    tokens, lengths = corpus(2000)
    rules = rules_of(mask_rate=0.9, mask=0.0, random=1.0)
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


def test_masks_do_not_depend_on_the_neighbours_in_the_batch() -> None:
    tokens, lengths = corpus(40)
    samples = np.arange(100, 140)
    together, places, _ = mask_tokens(tokens, lengths, samples, rules_of(), seed=0)
    ends = np.cumsum(lengths)
    for row in reversed(range(40)):
        part = slice(ends[row] - lengths[row], ends[row])
        alone, alone_places, _ = mask_tokens(
            tokens[part], lengths[row : row + 1], samples[row : row + 1], rules_of(), seed=0
        )
        np.testing.assert_array_equal(alone, together[part])
        inside = (places >= part.start) & (places < part.stop)
        np.testing.assert_array_equal(alone_places + part.start, places[inside])


def test_nothing_to_choose() -> None:
    tokens = np.array([2, 3, 3])
    masked, places, targets = mask_tokens(tokens, np.array([3]), np.array([0]), rules_of(0.99), seed=0)
    assert masked.tolist() == [2, 3, 3]
    assert len(places) == len(targets) == 0
