"""Best-fit decreasing: documents into rows, the longest first, each where it leaves the least room.

Ding et al., "Fewer Truncations Improve Language Modeling", 2024. All documents of one length are placed at once: the
row with the least room that holds one takes as many as fit, then the next. So the work is in proportion to the number
of different lengths and not of documents, after one sort.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def best_fit(lengths: NDArray[np.int64], capacity: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Which of `lengths` (n,), each 1 to capacity, lie in which row: (order (n,), counts (rows,)).

    Row 0 holds the first counts[0] of `lengths[order]`, row 1 the next counts[1], and so on; in a row the longest is
    first, of equal ones the one that came first. The result depends on the arguments alone.
    """
    by_length = np.argsort(-lengths, kind="stable")
    values, sizes = np.unique(lengths, return_counts=True)
    row_of = np.empty(len(lengths), np.int64)  # of lengths[by_length]
    rooms = _Rooms()
    n_rows = placed = 0
    for length, size in zip(values[::-1].tolist(), sizes[::-1].tolist(), strict=True):
        end = placed + size
        while placed < end:
            room = rooms.least(length) or capacity
            each = room // length
            wanted = -(-(end - placed) // each)
            if room in rooms.rows:
                rows = rooms.take(room, wanted)
            else:
                rows = np.arange(n_rows, n_rows + wanted)
                n_rows += wanted
            count = min(end - placed, len(rows) * each)
            row_of[placed : placed + count] = rows.repeat(each)[:count]
            placed += count
            full, rest = divmod(count, each)
            rooms.put(room - each * length, rows[:full])
            rooms.put(room - rest * length, rows[full:])
    by_row = np.argsort(row_of, kind="stable")
    return by_length[by_row], np.bincount(row_of, minlength=n_rows)


class _Rooms:
    """Rows by the room that is left in them."""

    def __init__(self) -> None:
        self.rows: dict[int, list[NDArray[np.int64]]] = {}
        self._present = 0  # bit r: there are rows with room r

    def least(self, length: int) -> int:
        """The least room of at least `length` that a row has; 0: none."""
        fitting = self._present >> length
        return length + (fitting & -fitting).bit_length() - 1 if fitting else 0

    def put(self, room: int, rows: NDArray[np.int64]) -> None:
        if room and len(rows):
            self.rows.setdefault(room, []).append(rows)
            self._present |= 1 << room

    def take(self, room: int, wanted: int) -> NDArray[np.int64]:
        """At most `wanted` rows with that room, the last that were put there."""
        held, taken = self.rows[room], []
        while held and wanted:
            rows = held.pop()
            if len(rows) > wanted:
                held.append(rows[:-wanted])
                rows = rows[-wanted:]
            taken.append(rows)
            wanted -= len(rows)
        if not held:
            del self.rows[room]
            self._present ^= 1 << room
        return np.concatenate(taken)
