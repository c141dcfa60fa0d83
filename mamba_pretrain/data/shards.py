"""Token shards on disk: Megatron's indexed dataset, read in O(1) memory. A pair of files:

    PREFIX.bin      raw tokens, one document after the other
    PREFIX.idx      little-endian, in this order:
        9 bytes   magic "MMIDIDX\\0\\0"
        u64       version, 1
        u8        dtype code of the tokens (DTYPES)
        u64       number of sequences n
        u64       length of the document index d
        i32[n]    tokens in each sequence
        i64[n]    byte offset of each sequence in the .bin
        i64[d]    document j is sequences index[j] to index[j + 1]

The layout is that of Megatron-LM's `megatron/core/datasets/indexed_dataset.py`, so Megatron-LM, GPT-NeoX and datatrove
read these files and theirs are read here. `writer.py` writes one sequence a document; the reader takes any number.
"""

from __future__ import annotations

import contextlib
import mmap
import struct
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

MAGIC: Final = b"MMIDIDX\x00\x00"
VERSION: Final = 1
HEADER: Final = struct.Struct("<9sQBQQ")
DTYPES: Final = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<f8", 7: "<f4", 8: "<u2"}
BLOCK_BYTES: Final = 1 << 24  # what problems() holds in memory at a time
RESIDENT: Final = 1 << 20  # up to so many documents, where they begin is held in memory (8 MiB)


class ShardError(ValueError):
    """A dataset on disk is missing, damaged, foreign, or not the one that was asked for."""


class Shard:
    """One split, memory-mapped. Opening reads the header and four numbers, whatever the size of the data.

    Pickles as its path, so that loader workers map the file themselves. Raises ShardError for anything but an intact
    pair of integer-token files whose sizes agree.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.path = Path(prefix)
        self._bin, self._idx = (self.path.with_name(self.path.name + suffix) for suffix in (".bin", ".idx"))
        for file in (self._bin, self._idx):
            if not file.is_file():
                raise ShardError(f"{file} does not exist; a shard is a pair of files, {self.path}.bin and .idx")
        idx_bytes = self._idx.stat().st_size
        with self._idx.open("rb") as stream:
            header = stream.read(HEADER.size)
        if header[: len(MAGIC)] != MAGIC:
            raise ShardError(f"{self._idx} starts with {header[:9]!r}, not {MAGIC!r}: it is not a Megatron index")
        if len(header) < HEADER.size:
            raise ShardError(f"{self._idx} has {idx_bytes} bytes, less than its {HEADER.size}-byte header: truncated")
        _, version, code, self.n_sequences, index_length = HEADER.unpack(header)
        if version != VERSION:
            raise ShardError(f"{self._idx} has version {version}; this reader knows version {VERSION} only")
        dtype = np.dtype(DTYPES[code]) if code in DTYPES else None
        if dtype is None or dtype.kind == "f":
            raise ShardError(
                f"{self._idx} has dtype code {code} ({dtype or 'unknown'}): not the integers token ids are"
            )
        self.dtype: np.dtype[Any] = dtype
        expected = HEADER.size + 12 * self.n_sequences + 8 * index_length
        if idx_bytes != expected or index_length < 1:
            raise ShardError(
                f"{self._idx} has {idx_bytes:,} bytes, its header promises {expected:,} ({self.n_sequences:,} "
                f"sequences, {index_length:,} document index entries): truncated, or of an unknown layout"
            )
        self.n_documents = index_length - 1
        bin_bytes = self._bin.stat().st_size
        promised = int(self._pointers[-1]) + int(self._lengths[-1]) * self.dtype.itemsize if self.n_sequences else 0
        if bin_bytes != promised:
            raise ShardError(
                f"{self._bin} has {bin_bytes:,} bytes, {self._idx.name} promises {promised:,}: truncated, or the two "
                "files are of different datasets"
            )
        ends = int(self._document_index[0]), int(self._document_index[-1])
        if ends != (0, self.n_sequences):
            raise ShardError(f"{self._idx}: the document index runs over {ends}, expected (0, {self.n_sequences})")
        self.n_tokens = bin_bytes // self.dtype.itemsize

    def __reduce__(self) -> tuple[type[Shard], tuple[Path]]:
        return Shard, (self.path,)

    def _map(self, file: Path, dtype: str | np.dtype[Any], offset: int, count: int) -> NDArray[Any]:
        if count == 0:  # mmap refuses an empty range
            return np.zeros(0, dtype)
        with file.open("rb") as stream:
            mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        if file == self._idx and hasattr(mmap, "MADV_NOHUGEPAGE"):
            # Else a touch may map 2 MiB around it, all of which counts as this process's memory: a look into the index
            # of a trillion tokens came to 150 MB. A kernel without huge pages refuses the word.
            with contextlib.suppress(OSError):
                mapped.madvise(mmap.MADV_NOHUGEPAGE)
        # Not np.memmap: its own __getitem__ costs 1 us more for each number read.
        return np.frombuffer(mapped, dtype, count, offset)

    @cached_property
    def stored(self) -> NDArray[Any]:
        """All tokens as they lie in the file, (n_tokens,) of `dtype`: mapped, read-only, read where they are sliced."""
        return self._map(self._bin, self.dtype, 0, self.n_tokens)

    @cached_property
    def stored_address(self) -> int:
        return self.stored.ctypes.data

    @cached_property
    def _lengths(self) -> NDArray[np.int32]:
        return self._map(self._idx, "<i4", HEADER.size, self.n_sequences)

    @cached_property
    def _pointers(self) -> NDArray[np.int64]:
        return self._map(self._idx, "<i8", HEADER.size + 4 * self.n_sequences, self.n_sequences)

    @cached_property
    def _document_index(self) -> NDArray[np.int64]:
        return self._map(self._idx, "<i8", HEADER.size + 12 * self.n_sequences, self.n_documents + 1)

    def tokens(self, start: int, stop: int) -> NDArray[np.int64]:
        """Tokens [start, stop) of the split as a fresh (stop - start,) int64 array."""
        if not 0 <= start <= stop <= self.n_tokens:
            raise IndexError(f"tokens [{start}, {stop}) of {self.path}, which has {self.n_tokens}")
        return self.stored[start:stop].astype(np.int64)

    def _document_start(self, document: int) -> int:
        sequence = self._document_index[document]
        if 0 <= sequence < self.n_sequences:
            return int(self._pointers[sequence]) // self.dtype.itemsize
        return self.n_tokens if sequence == self.n_sequences else -1  # -1: damaged

    def document_bounds(self, document: int) -> tuple[int, int]:
        """First token of document j, and one past its last. Raises ShardError where the index cannot be right."""
        if not 0 <= document < self.n_documents:
            raise IndexError(f"document {document} of {self.path}, which has {self.n_documents}")
        start, stop = self._document_start(document), self._document_start(document + 1)
        if not 0 <= start <= stop <= self.n_tokens:
            raise ShardError(
                f"{self._idx}: document {document} runs from token {start:,} to {stop:,} of {self.n_tokens:,}: the "
                "index is damaged, see python -m data_prep.verify_shards"
            )
        return start, stop

    def document_at(self, position: int) -> int:
        """The document that holds token `position`, in O(log documents)."""
        if not 0 <= position < self.n_tokens:
            raise IndexError(f"token {position} of {self.path}, which has {self.n_tokens}")
        return bisect_right(range(self.n_documents), position, key=self._document_start) - 1

    def document_starts(self, start: int, stop: int) -> NDArray[np.int64]:
        """Positions in [start, stop) at which a document begins, ascending, each once.

        Raises ShardError where they cannot be right.
        """
        assert 0 <= start <= stop <= self.n_tokens
        if (starts := self.resident_starts) is not None:
            first, last = starts.searchsorted((start, stop)).tolist()
            return starts[first:last]
        found = self._search(start, stop)
        if any(later <= sooner for sooner, later in pairwise([start - 1, *found, stop])):
            raise self._disorder(start, stop)
        return np.array(found, np.int64)

    @cached_property
    def resident_starts(self) -> NDArray[np.int64] | None:
        """Where documents begin, ascending, each once; None if those are too many to hold in memory."""
        if self.n_documents > RESIDENT:
            return None
        edges = self.document_edges(0, self.n_documents)
        return edges[:-1][edges[1:] > edges[:-1]]  # foreign documents may be empty

    @cached_property
    def starts_address(self) -> int:
        assert self.resident_starts is not None
        return self.resident_starts.ctypes.data

    def _search(self, start: int, stop: int) -> list[int]:
        """document_starts by bisection in the file."""
        pointers, index, size = self._pointers, self._document_index, self.dtype.itemsize
        first = bisect_left(pointers, start * size)
        last = bisect_left(pointers, stop * size, first)  # the sequences that begin in [start, stop) are [first, last)
        document = bisect_left(index, first, 0, self.n_documents)
        sequences = index[document : bisect_left(index, last, document, self.n_documents)]
        if ((sequences < first) | (sequences >= last)).any():
            raise self._disorder(start, stop)
        return list(dict.fromkeys((pointers[sequences] // size).tolist()))  # foreign documents may be empty

    def _disorder(self, start: int, stop: int) -> ShardError:
        return ShardError(
            f"{self._idx}: documents that begin in tokens [{start:,}, {stop:,}) are not one after the other: the "
            "index is damaged, see python -m data_prep.verify_shards"
        )

    @property
    def index_addresses(self) -> tuple[int, int, int, int]:
        """Where the sequences' byte offsets and the document index are in memory, the numbers of both."""
        return self._pointers.ctypes.data, self._document_index.ctypes.data, self.n_sequences, self.n_documents

    def document_edges(self, first: int, stop: int) -> NDArray[np.int64]:
        """Where documents [first, stop) begin, and where the last of them ends: (stop - first + 1,) token positions.

        Raises ShardError where they cannot be right.
        """
        if not 0 <= first <= stop <= self.n_documents:
            raise IndexError(f"documents [{first}, {stop}) of {self.path}, which has {self.n_documents}")
        sequences = self._document_index[first : stop + 1]
        inside = sequences < self.n_sequences
        edges = np.full(len(sequences), self.n_tokens)
        known = bool((sequences >= 0).all() and (sequences <= self.n_sequences).all())
        if known:
            edges[inside] = self._pointers[sequences[inside]] // self.dtype.itemsize
        if not known or (np.diff(edges) < 0).any() or edges[0] < 0 or edges[-1] > self.n_tokens:
            raise ShardError(
                f"{self._idx}: documents {first:,} to {stop:,} are not one after the other in the {self.n_tokens:,} "
                "tokens: the index is damaged, see python -m data_prep.verify_shards"
            )
        return edges

    def problems(self) -> Iterator[str]:
        """Everything wrong with the index, in bounded memory; `scan.py` reads the tokens, too."""
        rows, end = BLOCK_BYTES // 8, 0
        for begin in range(0, self.n_sequences, rows):
            lengths = self._lengths[begin : begin + rows].astype(np.int64)
            pointers = self._pointers[begin : begin + rows]
            ends = pointers + lengths * self.dtype.itemsize
            expected = np.concatenate(([end], ends[:-1]))
            wrong = np.flatnonzero((pointers != expected) | (lengths < 0))
            if wrong.size:
                i = int(wrong[0])
                yield (
                    f"{self._idx}: {wrong.size:,} sequences do not follow the one before, the first is sequence "
                    f"{begin + i:,} (offset {pointers[i]}, expected {expected[i]}; length {lengths[i]})"
                )
            end = int(ends[-1])
        for begin in range(0, self.n_documents, rows):
            steps = np.diff(self._document_index[begin : begin + rows + 1])
            if (steps < 0).any():
                document = begin + int(np.argmax(steps < 0))
                yield f"{self._idx}: the document index runs backwards after document {document:,}"
