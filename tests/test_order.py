"""The order of samples: permutations, windows, epochs."""

from __future__ import annotations

from math import sqrt

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bertscale.data.order import Order, WindowSamples, permute, round_keys

ORDERS = st.tuples(
    st.lists(st.integers(0, 30), min_size=1, max_size=40).filter(any),  # samples of each block
    st.integers(1, 12),  # blocks of a window
    st.integers(0, 2**64 - 1),  # seed
    st.integers(0, 5),  # phase
)


def keys(seed: int = 0, epoch: int = 0) -> np.ndarray:
    return round_keys(seed, 0, epoch)


def locations(order: Order, parts: list[WindowSamples], size: int) -> np.ndarray:
    """(epoch, window, block, sample in it) of each of `size` samples."""
    found = np.full((size, 4), -1)
    for part in parts:
        ends = np.cumsum(order.samples_per_block[part.blocks])
        block = np.searchsorted(ends, part.indices, side="right")
        inside = part.indices - (ends - order.samples_per_block[part.blocks])[block]
        assert (found[part.asked] == -1).all()
        found[part.asked, 0] = part.epoch
        found[part.asked, 1] = part.window
        found[part.asked, 2] = part.blocks[block]
        found[part.asked, 3] = inside
    assert (found >= 0).all()
    return found


@given(st.integers(1, 3000), st.integers(0, 2**64 - 1), st.integers(0, 2**40))
def test_a_permutation_is_a_bijection(size: int, seed: int, epoch: int) -> None:
    places = np.arange(size)
    moved = permute(places, size, keys(seed, epoch))
    np.testing.assert_array_equal(np.sort(moved), places)
    some = np.array([size - 1, 0, size // 2])  # each place is computed alone
    np.testing.assert_array_equal(permute(some, size, keys(seed, epoch)), moved[some])


@pytest.mark.parametrize("size", [65_537, 10**6])
def test_a_large_permutation_is_a_bijection(size: int) -> None:
    seen = np.zeros(size, np.bool_)
    seen[permute(np.arange(size), size, keys())] = True
    assert seen.all()


def test_a_permutation_of_any_size_starts_at_once() -> None:
    size = 10**15
    moved = permute(np.arange(1000), size, keys())
    assert len(set(moved.tolist())) == 1000
    assert moved.min() >= 0
    assert moved.max() < size
    assert abs(moved.mean() / size - 0.5) < 5 / sqrt(12 * 1000)  # five sigmas


def test_every_place_of_a_permutation_is_even() -> None:
    epochs, size = 3000, 5
    counts = np.zeros((size, size))
    for epoch in range(epochs):
        counts[np.arange(size), permute(np.arange(size), size, keys(0, epoch))] += 1
    assert abs(counts - epochs / size).max() <= 5 * sqrt(epochs * 0.2 * 0.8)  # five sigmas


def test_no_two_uses_share_their_keys() -> None:
    uses = [(0, 0, 0, -1), (0, 0, 0, 0), (0, 0, 1, -1), (0, 1, 0, -1), (1, 0, 0, -1), (0, 0, 2**32, -1)]
    found = {round_keys(*use).tobytes() for use in uses}
    assert len(found) == len(uses)


@settings(deadline=None)
@given(ORDERS)
def test_an_epoch_takes_every_sample_once_window_by_window(
    setting: tuple[list[int], int, int, int],
) -> None:
    blocks, window_blocks, seed, phase = setting
    order = Order(np.array(blocks), window_blocks, seed, phase)
    n = order.num_samples
    assert n == sum(blocks)
    found = locations(order, list(order.find(np.arange(3 * n))), 3 * n)
    every = sorted((block, place) for block, size in enumerate(blocks) for place in range(size))
    for epoch in range(3):
        mine = found[epoch * n : (epoch + 1) * n]
        assert (mine[:, 0] == epoch).all()
        assert sorted(map(tuple, mine[:, 2:].tolist())) == every
        assert (np.diff(mine[:, 1]) >= 0).all()  # no window is come back to
        windows = [order.blocks(epoch, window) for window in range(order.num_windows)]
        assert sorted(np.concatenate(windows).tolist()) == list(range(len(blocks)))
        sizes = [len(window) for window in windows]
        assert sizes[:-1] == [window_blocks] * (len(sizes) - 1)
        assert len(sizes) == 1 or window_blocks <= sizes[-1] < 2 * window_blocks  # the remainder joined
        for window, own in enumerate(windows):
            assert np.isin(mine[mine[:, 1] == window, 2], own).all()
            assert (np.diff(own) > 0).all()


@settings(deadline=None)
@given(ORDERS, st.lists(st.integers(0, 2**40), min_size=1, max_size=20))
def test_a_sample_is_found_by_its_number_alone(
    setting: tuple[list[int], int, int, int], numbers: list[int]
) -> None:
    order = Order(np.array(setting[0]), *setting[1:])
    together = locations(order, list(order.find(np.array(numbers))), len(numbers))
    for row, number in enumerate(numbers):
        alone = locations(order, list(order.find(np.array([number]))), 1)
        np.testing.assert_array_equal(alone[0], together[row])


def test_epochs_seeds_and_stages_have_orders_of_their_own() -> None:
    blocks = np.full(300, 10)
    orders = []
    for seed, phase, epoch in ((0, 0, 0), (0, 0, 1), (1, 0, 0), (0, 1, 0)):
        order = Order(blocks, 16, seed, phase)
        numbers = epoch * order.num_samples + np.arange(order.num_samples)
        found = locations(order, list(order.find(numbers)), len(numbers))
        orders.append(found[:, 2] * 10 + found[:, 3])
    for one in range(4):
        for other in range(one):
            assert (orders[one] == orders[other]).sum() < 12  # one by chance, in the mean
    assert (np.diff(orders[0]) == 1).sum() < 12 + 3000 / 160 * 5


def test_the_window_behind_the_last_is_the_first_of_the_next_epoch() -> None:
    order = Order(np.full(20, 5), 4, seed=0)
    assert order.num_windows == 5
    np.testing.assert_array_equal(order.blocks(3, 5), order.blocks(4, 0))
