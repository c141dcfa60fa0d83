"""Exact duplicates: every one but the first, in bounded memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from data_prep import duplicates


@pytest.mark.parametrize("bucket_bytes", [1 << 24, 500])
@pytest.mark.parametrize("n", [0, 1, 1000])
def test_all_but_the_first_in_order_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bucket_bytes: int, n: int
) -> None:
    monkeypatch.setattr(duplicates, "BUCKET_BYTES", bucket_bytes)
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
