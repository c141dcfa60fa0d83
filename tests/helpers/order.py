"""The order of windows one sample at a time, in plain integers: what the package's arrays are held against."""

from __future__ import annotations

from mamba_pretrain.data.order import ROUNDS, keys

_MASK = (1 << 64) - 1


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
