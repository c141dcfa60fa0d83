"""The order is a permutation of every epoch, and a different one for every seed and epoch."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from mamba_pretrain.data.order import keys, permute, windows_at
from tests.helpers.order import window_at

GOLDEN = [(0, 4), (0, 3), (0, 5), (0, 7), (0, 2), (0, 6), (0, 0), (0, 9), (0, 1), (0, 8), (1, 7), (1, 5)]


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 7, 8, 9, 100, 255, 256, 257, 1000, 4097])
def test_every_window_comes_once_an_epoch(n: int) -> None:
    for seed in (0, 1, -7, 2**70):
        epochs, windows = windows_at(np.arange(3 * n), n, seed)
        assert epochs.tolist() == [0] * n + [1] * n + [2] * n
        assert np.sort(windows.reshape(3, n)).tolist() == [list(range(n))] * 3


def test_seeds_and_epochs_have_different_orders() -> None:
    n = 50
    orders = {tuple(permute(np.arange(n), n, keys(seed, epoch)).tolist()) for seed in range(20) for epoch in range(20)}
    assert len(orders) == 400


def test_largest_sizes_stay_in_range_and_do_not_collide() -> None:
    for n in (2**62, 2**62 - 1, 2**61 + 1, 10**12):
        images = permute(np.array([*range(100), *range(n - 100, n)]), n, keys(0, 0)).tolist()
        assert len(set(images)) == 200
        assert all(0 <= image < n for image in images)


def test_order_is_fixed_for_ever() -> None:
    """A change here breaks the resumption of every run: raise ORDER_VERSION with it."""
    epochs, windows = windows_at(np.arange(12), 10, 0)
    assert list(zip(epochs.tolist(), windows.tolist(), strict=True)) == GOLDEN


def test_neighbours_are_spread_evenly() -> None:
    """Distance between successive windows: its mean is n / 3 for a uniform permutation (deviation 0.24 n / sqrt(n))."""
    n = 10_007
    order = permute(np.arange(n), n, keys(3, 5)).tolist()
    distance = sum(abs(a - b) for a, b in pairwise(order)) / (n - 1)
    assert abs(distance / n - 1 / 3) < 5 * 0.24 / n**0.5
    counts = [0] * 100  # the first tenth of the epoch comes from everywhere: chi-square, 99 degrees, 6 sigma
    for window in order[: n // 10]:
        counts[window * 100 // n] += 1
    expected = (n // 10) / 100
    assert sum((c - expected) ** 2 / expected for c in counts) < 99 + 6 * 198**0.5


@pytest.mark.parametrize("n", [2, 3, 5])
def test_small_sizes_reach_every_order(n: int) -> None:
    first = windows_at(n * np.arange(600), n, 0)[1].tolist()
    assert min(first.count(window) for window in range(n)) > 600 / n * 0.7


@pytest.mark.parametrize("n", [1, 2, 3, 10, 255, 256, 257, 10_007, 10**12, 2**61 + 1, 2**62 - 1, 2**62])
def test_many_at_once_are_what_each_is_alone(n: int) -> None:
    for seed in (0, 3, -7, 2**70):
        later = [3 * n, 3 * n + 1, 3 * n + 2] if n < 2**60 else []  # counters are 64-bit
        samples = np.array([0, 1, 2, 5, 39, n // 3, n // 3 + 1, n - n // 2, n - 1, *later])
        epochs, windows = windows_at(samples, n, seed)
        assert (epochs.dtype, windows.dtype) == (np.int64, np.int64)
        due = [window_at(sample, n, seed) for sample in samples.tolist()]
        assert list(zip(epochs.tolist(), windows.tolist(), strict=True)) == due


def test_none_at_once() -> None:
    epochs, windows = windows_at(np.zeros(0, np.int64), 10, 0)
    assert len(epochs) == len(windows) == 0
