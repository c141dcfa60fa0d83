"""Documents whose text is exactly that of an earlier one, found in memory that does not grow with the corpus.

Hashes are spread over buckets on disk by their value, so that equal ones meet in one bucket. Each bucket is sorted by
itself, a block at a time beside one of each hash before it: copies of one text, which all lie in one bucket, take no
memory. The places of repeats are spread in turn, by which stretch of the result they are in.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

BLOCK_BYTES: Final = 1 << 24  # of a bucket or of the result at a time; sorting takes a few times as much
MAX_BUCKETS: Final = 512  # open files; 350 million different documents fill these, with more they grow
ENTRY: Final = np.dtype([("hash", "<u8", (2,)), ("place", "<i8")])
PLACE: Final = np.dtype("<i8")


def find_duplicates(hashes: Iterable[NDArray[np.uint64]], n_documents: int, scratch: Path) -> tuple[int, Path]:
    """How many documents repeat one before them, and a file of a byte for each document: 1 if it does, else 0.

    `hashes`: (n, 2) at a time, in the corpus's order. `scratch`: a directory that the caller removes.
    """
    n_buckets = _buckets(n_documents * ENTRY.itemsize)
    buckets = _spread(_entries(hashes), lambda entries: entries["hash"][:, 0] % n_buckets, n_buckets, scratch / "hash")
    stretch = -(-n_documents // _buckets(n_documents)) or 1
    n_stretches = -(-n_documents // stretch)
    repeats = (places for bucket in buckets for places in _repeats(bucket))
    stretches = _spread(repeats, lambda places: places // stretch, n_stretches, scratch / "place")
    result, count = scratch / "duplicates", 0
    with result.open("wb") as stream:
        for begin, path in zip(range(0, n_documents, stretch), stretches, strict=True):
            flags = np.zeros(min(stretch, n_documents - begin), np.uint8)
            for places in _blocks(path, PLACE):
                flags[places - begin] = 1
            count += int(flags.sum(dtype=np.int64))
            stream.write(flags.tobytes())
    return count, result


def _buckets(n_bytes: int) -> int:
    return min(MAX_BUCKETS, max(1, -(-n_bytes // BLOCK_BYTES)))


def _entries(hashes: Iterable[NDArray[np.uint64]]) -> Iterator[NDArray[np.void]]:
    place = 0
    for block in hashes:
        entries = np.empty(len(block), ENTRY)
        entries["hash"], entries["place"] = block, np.arange(place, place + len(block))
        place += len(block)
        yield entries


def _spread(
    blocks: Iterable[NDArray[Any]], bucket_of: Callable[[NDArray[Any]], NDArray[Any]], n_buckets: int, name: Path
) -> list[Path]:
    """A file for each bucket, with what belongs there in the order in which it came."""
    paths = [name.with_name(f"{name.name}{i:03d}") for i in range(n_buckets)]
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(path.open("wb")) for path in paths]
        for block in blocks:
            bucket = bucket_of(block).astype(np.int64)
            block = block[np.argsort(bucket, kind="stable")]
            ends = np.cumsum(np.bincount(bucket, minlength=n_buckets))
            for file, begin, end in zip(files, [0, *ends[:-1]], ends, strict=True):
                file.write(block[begin:end].tobytes())
    return paths


def _blocks(path: Path, dtype: np.dtype[Any]) -> Iterator[NDArray[Any]]:
    """What `path` holds, which is removed then."""
    with path.open("rb") as stream:
        while (block := np.fromfile(stream, dtype, BLOCK_BYTES // dtype.itemsize)).size:
            yield block
    path.unlink()


def _repeats(bucket: Path) -> Iterator[NDArray[np.int64]]:
    """Places of all but the first entry of each hash. Entries come by place, and lexsort keeps that among equals."""
    known = np.empty(0, ENTRY)  # the first of each hash
    for block in _blocks(bucket, ENTRY):
        entries = np.concatenate((known, block)) if known.size else block
        high, low = entries["hash"].T.copy()
        order = np.lexsort((low, high))
        high, low = high[order], low[order]
        again = np.zeros(entries.size, np.bool_)
        again[1:] = (high[1:] == high[:-1]) & (low[1:] == low[:-1])
        known = entries[order[~again]]
        yield entries["place"][order[again]]
