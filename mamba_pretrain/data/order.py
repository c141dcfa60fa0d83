"""The order of training windows: a keyed permutation for each epoch, computed and never stored.

Position p of epoch e is window permute(p, n, keys(seed, e)), so a run resumes anywhere, on any number of ranks, from
one counter. Unbalanced Feistel network over the smallest power of two that holds n (Black and Rogaway, "Ciphers with
arbitrary finite domains", 2002: cycle walking), with the splitmix64 finaliser (Steele, Lea and Flood, 2014) as the
round function. About 6 us a sample in plain Python.
"""

from __future__ import annotations

import hashlib
import struct
from functools import lru_cache
from typing import Final

ORDER_VERSION: Final = 1  # part of every checkpoint: raise it with any change that alters the order
ROUNDS: Final = 8
_MASK: Final = (1 << 64) - 1


@lru_cache(maxsize=8)
def keys(seed: int, epoch: int) -> tuple[int, ...]:
    """ROUNDS 64-bit round keys. Hashed together, so that neighbouring seeds and epochs have unrelated orders."""
    digest = hashlib.blake2b(
        f"order {ORDER_VERSION} seed {seed} epoch {epoch}".encode(), digest_size=8 * ROUNDS
    ).digest()
    return struct.unpack(f"<{ROUNDS}Q", digest)


def permute(position: int, n: int, round_keys: tuple[int, ...]) -> int:
    """The image of `position` under a permutation of range(n); n up to 2**62."""
    assert 0 <= position < n <= 1 << 62
    bits = (n - 1).bit_length()
    low_bits = bits // 2
    low_mask, high_mask = (1 << low_bits) - 1, (1 << (bits - low_bits)) - 1
    while True:
        low, high = position & low_mask, position >> low_bits
        for i in range(0, ROUNDS, 2):
            high ^= _mix(low ^ round_keys[i]) & high_mask
            low ^= _mix(high ^ round_keys[i + 1]) & low_mask
        position = high << low_bits | low
        if position < n:  # n is over half of the power of two, so this takes under two rounds on average
            return position


def _mix(x: int) -> int:
    x = ((x ^ x >> 30) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ x >> 27) * 0x94D049BB133111EB) & _MASK
    return x ^ x >> 31


def window_at(sample: int, n_windows: int, seed: int) -> tuple[int, int]:
    """(epoch, window) of the run's sample number `sample`, counted from 0 over all ranks and epochs."""
    epoch, position = divmod(sample, n_windows)
    return epoch, permute(position, n_windows, keys(seed, epoch))
