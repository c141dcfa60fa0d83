"""Which row of which source every sample of a run is: a pure function of its number, with nothing stored on the way.

A run is cut into stages, within which the sources' shares are fixed fractions with the common denominator P. One
period of P samples is scheduled once, the next ones are like it. Item j of a source with share w may come from sample
floor(j / w) on and is due before sample ceil((j + 1) / w); whichever of those that may come is due first comes next.
Such a schedule always exists (Baruah, Cohen, Plaxton and Varvel, "Proportionate progress", 1996; Tijdeman's chairman
assignment, 1980), and it keeps every source within one sample of its share in every prefix of a stage.

A source's rows are taken in the order of `order`, epoch after epoch, across all stages. Where the length of rows
changes, that order is one of the longest, the coarse rows: a stage of shorter ones takes as many coarse rows as it
needs, cuts them, and takes the pieces in an order of their own. Thus nothing comes twice before all of it came once.
"""

from __future__ import annotations

import hashlib
import heapq
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mamba_pretrain.data.order import windows_at

RESOLUTION: Final = 1 << 16  # shares by size are whole multiples of 1 / RESOLUTION

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Stage:
    first: int  # sample
    seq_len: int
    grid: int  # length of the coarse rows, a multiple of seq_len; stages with the same grid share their epochs
    shares: tuple[Fraction, ...]  # of each source; their sum is 1


class Places(NamedTuple):
    """Where samples (n,) are."""

    stages: Ints
    sources: Ints
    epochs: Ints
    rows: Ints  # among those of the stage's seq_len


class Schedule:
    """One period of the sources' order: shares with the common denominator P as (P,) arrays."""

    def __init__(self, shares: Sequence[Fraction]) -> None:
        assert sum(shares) == 1 and min(shares) >= 0
        self.period = math.lcm(*(share.denominator for share in shares))
        self.counts = np.array([int(share * self.period) for share in shares], np.int64)
        sources = np.repeat(np.arange(len(shares)), self.counts)
        ranks = np.concatenate([np.arange(count) for count in self.counts.tolist()])
        times = self.counts[sources]
        released = ranks * self.period // times
        due = -(-(ranks + 1) * self.period // times)
        by_release = np.argsort(released, kind="stable")
        order = (due * len(shares) + sources)[by_release].tolist()  # one integer for both: the heap compares faster
        ends = np.searchsorted(released[by_release], np.arange(self.period), "right").tolist()
        waiting: list[int] = []
        slots = []
        begin = 0
        for end in ends:
            for item in order[begin:end]:
                heapq.heappush(waiting, item)
            begin = end
            slots.append(heapq.heappop(waiting))
        slot_sources = np.array(slots, np.int64) % len(shares)
        slot_ranks = np.empty(self.period, np.int64)
        slot_ranks[np.argsort(slot_sources, kind="stable")] = ranks
        self.sources, self.ranks = slot_sources.astype(np.int16), slot_ranks.astype(np.int32)

    def at(self, samples: Ints) -> tuple[Ints, Ints]:
        """Of each sample, counted from the stage's first: its source, and how many of that source came before it."""
        periods, slots = np.divmod(samples, self.period)
        sources = self.sources[slots].astype(np.int64)
        return sources, periods * self.counts[sources] + self.ranks[slots]

    def taken(self, samples: int) -> list[int]:
        """How many of the first `samples` are of each source."""
        periods, rest = divmod(samples, self.period)
        partial = np.bincount(self.sources[:rest], minlength=len(self.counts))
        return [periods * int(count) + int(more) for count, more in zip(self.counts, partial, strict=True)]


@dataclass(frozen=True)
class _Share:
    """A source in a stage: from where to where in its coarse rows."""

    begin: int  # coarse rows of this grid that earlier stages took
    n_rows: int | None  # of the stage's own length; None: the last stage has no end
    per_epoch: int  # coarse rows


class Mixture:
    """Samples 0, 1, ... of a run, over all ranks, stages and epochs, without end. O(P) memory, O(1) time a sample."""

    def __init__(
        self, names: Sequence[str], stages: Sequence[Stage], epoch_rows: Sequence[dict[int, int]], seed: int
    ) -> None:
        """`epoch_rows`: of each source, the coarse rows in one epoch by grid."""
        assert stages[0].first == 0 and all(stage.grid % stage.seq_len == 0 for stage in stages)
        self.names, self.stages = list(names), list(stages)
        self.schedules = [Schedule(stage.shares) for stage in stages]
        self._firsts = np.array([stage.first for stage in stages], np.int64)
        # A run of one dataset keeps the order it has by itself when later stages bring others in.
        alone = stages[0].shares.index(1) if 1 in stages[0].shares else None
        self.seeds = [seed if k == alone else _seed(f"source {name} seed {seed}") for k, name in enumerate(names)]
        self._shares: list[list[_Share]] = []
        cursors: list[dict[int, int]] = [defaultdict(int) for _ in names]
        for s, stage in enumerate(stages):
            end = stages[s + 1].first if s + 1 < len(stages) else None
            taken = [None] * len(names) if end is None else self.schedules[s].taken(end - stage.first)
            grid = stage.grid
            of_stage = []
            for cursor, n_rows, rows in zip(cursors, taken, epoch_rows, strict=True):
                of_stage.append(_Share(cursor[grid], n_rows, rows[grid]))
                cursor[grid] += -(-(n_rows or 0) * stage.seq_len // grid)
            self._shares.append(of_stage)

    def locate(self, samples: Ints) -> Places:
        stages = np.searchsorted(self._firsts, samples, "right") - 1
        sources, epochs, rows = (np.empty(samples.shape, np.int64) for _ in range(3))
        for s in np.unique(stages).tolist():
            here = np.flatnonzero(stages == s)
            of, ranks = self.schedules[s].at(samples[here] - self.stages[s].first)
            sources[here] = of
            for k in np.unique(of).tolist():
                mine = of == k
                epochs[here[mine]], rows[here[mine]] = self._rows(s, k, ranks[mine])
        return Places(stages, sources, epochs, rows)

    def _rows(self, s: int, k: int, ranks: Ints) -> tuple[Ints, Ints]:
        share, pieces, seed = self._shares[s][k], self.stages[s].grid // self.stages[s].seq_len, self.seeds[k]
        if pieces == 1:
            return windows_at(share.begin + ranks, share.per_epoch, seed)
        numbers = share.begin * pieces + ranks
        # Within an epoch, the stage's rows are permuted among themselves. Where an epoch has none of them before or
        # after the stage, that is all of it.
        epochs = numbers // (share.per_epoch * pieces)
        for epoch in np.unique(epochs).tolist():
            chosen = epochs == epoch
            first = max(share.begin, epoch * share.per_epoch) * pieces
            last = (epoch + 1) * share.per_epoch * pieces
            if share.n_rows is not None:
                last = min(last, share.begin * pieces + share.n_rows)
            own = _seed(f"within stage {s} epoch {epoch} seed {seed}")
            numbers[chosen] = first + windows_at(numbers[chosen] - first, last - first, own)[1]
        coarse, piece = np.divmod(numbers, pieces)
        epochs, rows = windows_at(coarse, share.per_epoch, seed)
        return epochs, rows * pieces + piece

    def taken(self, samples: int) -> list[list[int]]:
        """Of each stage and source: how many of the run's first `samples` are of it."""
        found = []
        for s, stage in enumerate(self.stages):
            end = self.stages[s + 1].first if s + 1 < len(self.stages) else samples
            found.append(self.schedules[s].taken(max(0, min(end, samples) - stage.first)))
        return found

    def epochs(self, samples: int) -> list[Fraction]:
        """How often the run's first `samples` read each source, on average over its tokens."""
        return [sum(of.values(), Fraction(0)) for of in self._epochs_by_grid(samples)]

    def grids(self, samples: int) -> list[set[int]]:
        """Those in which the run's first `samples` read each source."""
        return [set(of) for of in self._epochs_by_grid(samples)]

    def distinct(self, samples: int) -> list[Fraction]:
        """Which share of each source the run's first `samples` read at least once.

        Exact where it is read in one grid and nothing is left over. Packs of different lengths have orders of their
        own, so for several it is what independent draws are expected to meet.
        """
        found = []
        for epochs in self._epochs_by_grid(samples):
            unread = (max(Fraction(0), 1 - n) for n in epochs.values())
            found.append(1 - math.prod(unread, start=Fraction(1)))
        return found

    def _epochs_by_grid(self, samples: int) -> list[dict[int, Fraction]]:
        found: list[dict[int, Fraction]] = [defaultdict(Fraction) for _ in self.names]
        for s, (stage, taken) in enumerate(zip(self.stages, self.taken(samples), strict=True)):
            for k, n in enumerate(taken):
                if n:
                    found[k][stage.grid] += Fraction(n * stage.seq_len, stage.grid * self._shares[s][k].per_epoch)
        return found

    def left_over(self, samples: int) -> list[int]:
        """Tokens of each source that a stage of shorter rows leaves of its last coarse row when it ends."""
        found = [0] * len(self.names)
        for s, stage in enumerate(self.stages[:-1]):
            if samples >= self.stages[s + 1].first:
                for k, share in enumerate(self._shares[s]):
                    found[k] += -(share.n_rows or 0) * stage.seq_len % stage.grid
        return found


def shares_by_size(sizes: Sequence[int]) -> list[Fraction]:
    """Each size's part of their sum, rounded to RESOLUTION parts by largest remainder; at least one part each."""
    total = sum(sizes)
    parts = [size * RESOLUTION // total for size in sizes]
    remainders = sorted(range(len(sizes)), key=lambda k: (-(sizes[k] * RESOLUTION % total), k))
    for k in remainders[: RESOLUTION - sum(parts)]:
        parts[k] += 1
    for k, part in enumerate(parts):
        if part == 0 and sizes[k]:
            parts[parts.index(max(parts))] -= 1
            parts[k] = 1
    return [Fraction(part, RESOLUTION) for part in parts]


def _seed(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
