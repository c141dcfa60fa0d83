"""Exact duplicates: every one but the first, in bounded memory."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from data_prep import duplicates


@pytest.mark.parametrize("block_bytes", [1 << 24, 500])
@pytest.mark.parametrize("n", [0, 1, 1000])
def test_all_but_the_first_in_order_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block_bytes: int, n: int
) -> None:
    monkeypatch.setattr(duplicates, "BLOCK_BYTES", block_bytes)
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 1 << 64, (300, 2), np.uint64)[rng.integers(0, 300, n)]
    hashes[: n // 10, 0] = 5  # half of a hash in common is not a duplicate
    seen: set[tuple[int, int]] = set()
    expected = []
    for high, low in hashes.tolist():
        expected.append((high, low) in seen)
        seen.add((high, low))
    count, flags = duplicates.find_duplicates(np.array_split(hashes, 7), n, tmp_path)
    assert np.fromfile(flags, np.uint8).tolist() == [int(flag) for flag in expected]
    assert count == sum(expected)
    assert list(tmp_path.iterdir()) == [flags]


def test_copies_of_one_text_take_no_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duplicates, "BLOCK_BYTES", 1 << 16)
    monkeypatch.setattr(duplicates, "MAX_BUCKETS", 4)  # each has a buffer of its own

    def peak(n: int) -> int:
        blocks = (np.full((1000, 2), 7, np.uint64) for _ in range(n // 1000))
        tracemalloc.start()
        count, _ = duplicates.find_duplicates(blocks, n, tmp_path)
        assert count == n - 1
        highest = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return highest

    assert peak(400_000) < 1.2 * peak(40_000)
