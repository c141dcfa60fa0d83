"""The order of training windows: a keyed permutation for each epoch, computed and never stored.

Position p of epoch e is window permute(p, n, keys(seed, e)), so a run resumes anywhere, on any number of ranks, from
one counter. Unbalanced Feistel network over the smallest power of two that holds n (Black and Rogaway, "Ciphers with
arbitrary finite domains", 2002: cycle walking), with the splitmix64 finaliser (Steele, Lea and Flood, 2014) as the
round function. A few tenths of a microsecond a sample, where a thousand are asked for together.
"""

from __future__ import annotations

import hashlib
import struct
from functools import lru_cache
from typing import Final

import numpy as np
from numpy.typing import NDArray

ORDER_VERSION: Final = 1  # part of every checkpoint: raise it with any change that alters the order
ROUNDS: Final = 8


@lru_cache(maxsize=8)
def keys(seed: int, epoch: int) -> tuple[int, ...]:
    """ROUNDS 64-bit round keys. Hashed together, so that neighbouring seeds and epochs have unrelated orders."""
    digest = hashlib.blake2b(
        f"order {ORDER_VERSION} seed {seed} epoch {epoch}".encode(), digest_size=8 * ROUNDS
    ).digest()
    return struct.unpack(f"<{ROUNDS}Q", digest)


def windows_at(samples: NDArray[np.int64], n_windows: int, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(epochs, windows) of a run's samples (n,), counted from 0 over all ranks and epochs."""
    epochs, positions = np.divmod(samples.astype(np.int64, copy=False), n_windows)
    windows = np.empty_like(positions)
    for epoch in np.unique(epochs).tolist():
        chosen = epochs == epoch
        windows[chosen] = permute(positions[chosen], n_windows, keys(seed, epoch))
    return epochs, windows


def permute(positions: NDArray[np.int64], n: int, round_keys: tuple[int, ...]) -> NDArray[np.int64]:
    """The images of `positions` (m,) under a permutation of range(n); n up to 2**62."""
    assert 0 < n <= 1 << 62
    bits = (n - 1).bit_length()
    low_bits = np.uint64(bits // 2)
    low_mask, high_mask = np.uint64((1 << bits // 2) - 1), np.uint64((1 << bits - bits // 2) - 1)
    images = np.empty(positions.shape, np.int64)
    walking = np.arange(positions.size)  # those whose image is still outside range(n)
    x = positions.astype(np.uint64)
    while walking.size:
        low, high = x & low_mask, x >> low_bits
        for i in range(0, ROUNDS, 2):
            high ^= _mix(low ^ np.uint64(round_keys[i])) & high_mask
            low ^= _mix(high ^ np.uint64(round_keys[i + 1])) & low_mask
        x = high << low_bits | low
        inside = x < np.uint64(n)
        images[walking[inside]] = x[inside]
        walking, x = walking[~inside], x[~inside]
    return images


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    x ^= x >> np.uint64(30)
    x *= np.uint64(0xBF58476D1CE4E5B9)  # modulo 2**64, as arrays of uint64 multiply
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x
