"""What a split holds, in numbers: how long its documents are and which tokens are frequent. Memory is bounded."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from mamba_pretrain.data.shards import Shard, ShardError

DOCUMENTS: Final = 1 << 20  # of which the index is read at a time
TOKENS: Final = 1 << 16  # read at a time: a sample is made of such blocks
BAR: Final = 50
# Lengths are counted exactly below 512, and above in 256 bins for each power of two, which are 0.4% wide.
FINE: Final = 8
BINS: Final = (64 - FINE) << FINE


@dataclass(frozen=True)
class Lengths:
    """The lengths of a split's documents, in tokens."""

    documents: int
    tokens: int
    shortest: int
    longest: int
    counts: NDArray[np.int64]  # (BINS,)

    def quantile(self, share: float) -> int:
        """The length that `share` of the documents do not exceed; up to 0.4% too small from 512 on."""
        rank = max(math.ceil(share * self.documents), 1)
        edge = int(lower_edges()[np.searchsorted(np.cumsum(self.counts), rank)])
        return min(max(edge, self.shortest), self.longest)

    def octaves(self) -> list[tuple[int, int, int]]:
        """(shortest, longest, documents) for each power of two from the shortest to the longest document."""
        octave = _bit_lengths(lower_edges())
        found = np.bincount(octave, weights=self.counts).astype(np.int64)
        used = range(self.shortest.bit_length(), self.longest.bit_length() + 1) if self.documents else range(0)
        return [(1 << i >> 1, (1 << i) - 1, int(found[i])) for i in used]


def measure_lengths(shard: Shard, progress: Callable[[int], object] = lambda _: None) -> Lengths:
    """Reads the index, not the tokens, block by block; `progress` is told the documents of each."""
    counts, shortest, longest = np.zeros(BINS, np.int64), np.iinfo(np.int64).max, 0
    for first in range(0, shard.n_documents, DOCUMENTS):
        last = min(first + DOCUMENTS, shard.n_documents)
        lengths = np.diff(shard.document_edges(first, last))
        counts += np.bincount(_bins(lengths), minlength=BINS)
        shortest, longest = min(shortest, int(lengths.min())), max(longest, int(lengths.max()))
        progress(last - first)
    return Lengths(shard.n_documents, shard.n_tokens, min(shortest, longest), longest, counts)


def _bit_lengths(numbers: NDArray[np.int64]) -> NDArray[np.int32]:
    _, exponents = np.frexp(numbers.astype(np.float64))
    return exponents


def _bins(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    shift = np.maximum(_bit_lengths(lengths) - FINE - 1, 0).astype(np.int64)
    bins: NDArray[np.int64] = (shift << FINE) + (lengths >> shift)
    return bins


def lower_edges() -> NDArray[np.int64]:
    """The shortest length in each bin."""
    bins = np.arange(BINS, dtype=np.int64)
    shift = np.maximum((bins >> FINE) - 1, 0)
    edges: NDArray[np.int64] = (bins - (shift << FINE)) << shift
    return edges


def histogram(lengths: Lengths) -> str:
    """A table of lengths in powers of two, with bars."""
    octaves = lengths.octaves()
    if not octaves:
        return "no documents"
    most = max(count for *_, count in octaves)
    rows = [f"{'tokens':>25}{'documents':>14}"]
    rows += [f"{a:>11,} - {b:>11,}{count:>14,} {'#' * -(-count * BAR // most)}" for a, b, count in octaves]
    return "\n".join(rows)


@dataclass(frozen=True)
class TokenCounts:
    counts: NDArray[np.int64]  # (vocabulary,)
    blocks: int  # 0: every token was counted

    @property
    def tokens(self) -> int:
        return int(self.counts.sum())

    @property
    def sample(self) -> str:
        what = f"all {self.tokens:,} tokens"
        return f"{self.tokens:,} tokens, {self.blocks:,} blocks spread evenly over the split" if self.blocks else what


def count_tokens(
    shard: Shard, vocab_size: int, at_most: int, progress: Callable[[int], object] = lambda _: None
) -> TokenCounts:
    """How often each id occurs in blocks spread evenly over the split, of `at_most` tokens together, or in all."""
    everything = shard.n_tokens <= at_most
    if everything:
        starts: Sequence[int] = range(0, shard.n_tokens, TOKENS)
    else:
        blocks = max(at_most // TOKENS, 1)
        starts = [i * (shard.n_tokens - TOKENS) // max(blocks - 1, 1) for i in range(blocks)]
    counts = np.zeros(vocab_size, np.int64)
    for start in starts:
        tokens = shard.tokens(start, min(start + TOKENS, shard.n_tokens))
        if tokens.min() < 0 or tokens.max() >= vocab_size:
            raise ShardError(
                f"{shard.path}.bin has ids outside the vocabulary of {vocab_size:,} near token {start:,}: it is "
                "damaged, see python -m data_prep.verify_shards"
            )
        counts += np.bincount(tokens, minlength=vocab_size)
        progress(tokens.size)
    return TokenCounts(counts, 0 if everything else len(starts))
