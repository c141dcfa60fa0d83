"""Documents whose text is exactly that of an earlier one, found in memory that does not grow with the corpus.

Hashes are spread over buckets on disk by their value, so that equal ones meet in one bucket, and each bucket is sorted
by itself.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

BUCKET_BYTES: Final = 1 << 24  # sorting takes a few times as much
MAX_BUCKETS: Final = 512  # open files; 350 million documents fill these, with more they grow
ENTRY: Final = np.dtype([("hash", "<u8", (2,)), ("place", "<i8")])


def find_duplicates(hashes: Iterable[NDArray[np.uint64]], n_documents: int, scratch: Path) -> tuple[int, Path]:
    """How many documents repeat one before them, and a file of a byte for each document: 1 if it does, else 0.

    `hashes`: (n, 2) at a time, in the corpus's order. `scratch`: a directory that the caller removes.
    """
    n_buckets = min(MAX_BUCKETS, max(1, -(-n_documents * ENTRY.itemsize // BUCKET_BYTES)))
    paths = [scratch / f"bucket{i:03d}" for i in range(n_buckets)]
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(path.open("wb")) for path in paths]
        place = 0
        for block in hashes:
            entries = np.empty(len(block), ENTRY)
            entries["hash"], entries["place"] = block, np.arange(place, place + len(block))
            place += len(block)
            bucket = (block[:, 0] % n_buckets).astype(np.int64)
            entries = entries[np.argsort(bucket, kind="stable")]
            ends = np.cumsum(np.bincount(bucket, minlength=n_buckets))
            for file, begin, end in zip(files, [0, *ends[:-1]], ends, strict=True):
                file.write(entries[begin:end].tobytes())
    result, count = scratch / "duplicates", 0
    with result.open("wb") as stream:
        stream.truncate(n_documents)
    for path in paths:
        places = _repeats(np.fromfile(path, ENTRY))
        path.unlink()
        count += places.size
        if places.size:
            flags = np.memmap(result, np.uint8, mode="r+")  # anew for each: its pages count as memory while it is open
            flags[places] = 1
            flags.flush()
            del flags
    return count, result


def _repeats(entries: NDArray[np.void]) -> NDArray[np.int64]:
    """Places of all but the first entry of each hash. Entries come by place, and lexsort keeps that among equals."""
    high, low = entries["hash"][:, 0], entries["hash"][:, 1]
    order = np.lexsort((low, high))
    high, low = high[order], low[order]
    again = np.flatnonzero((high[1:] == high[:-1]) & (low[1:] == low[:-1])) + 1
    places: NDArray[np.int64] = entries["place"][order][again]
    return places
