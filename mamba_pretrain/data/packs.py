"""A pack: which pieces of which documents lie in which row. Made by data_prep.pack_shards, memory-mapped here.

SPLIT.HOW-LENGTH.pack lies beside the shard it belongs to; little-endian, in this order:

    8 bytes   magic "MAMBPACK"
    u32       version, 2
    u32       1 best_fit, 2 documents
    i64       tokens in a row, L
    i64       number of pieces p
    i64       number of rows r
    i64       tokens of the split that are in no row
    32 bytes  sha256 of the .idx that was packed
    32 bytes  sha256 of the four numbers, and of the three sha256 of what follows
    i64[p]    first token of each piece, in the split
    i32[p]    tokens in each piece; negative where its document goes on after it
    i64[r+1]  row j is pieces rows[j] to rows[j + 1]

A document longer than L is cut into pieces of L tokens and a rest. The label of a piece's last token is the token after
it where the document goes on, so that every token but a document's first is a target once, wherever it was cut. So
a piece of one token, which ends its document, would be read for nothing: it is in no row.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from mamba_pretrain.data.shards import BLOCK_BYTES, ShardError
from mamba_pretrain.files import draft_of

MAGIC: Final = b"MAMBPACK"
VERSION: Final = 2  # 1 had no numbers in the sha256
HOW: Final = {"best_fit": 1, "documents": 2}
HEADER: Final = struct.Struct("<8sIIqqqq32s32s")


def pack_path(directory: Path, split: str, how: str, seq_len: int) -> Path:
    return directory / f"{split}.{how}-{seq_len}.pack"


def packs_beside(directory: Path, split: str, idx_sha256: str) -> Iterator[Pack]:
    """All packs of a split. Raises ShardError as Pack does."""
    for path in sorted(directory.glob(f"{split}.*-*.pack")):
        how, _, length = path.name.removeprefix(f"{split}.").removesuffix(".pack").rpartition("-")
        if how in HOW and length.isdecimal():
            yield Pack(directory, split, how, int(length), idx_sha256)


def command(directory: Path, split: str, how: str, seq_len: int) -> str:
    """What to run for a pack."""
    return f"python -m data_prep.pack_shards {directory} --seq-len {seq_len} --how {how} --split {split}"


@dataclass(frozen=True)
class Pieces:
    """Some rows: `counts` (rows,) pieces each; `starts` and `lengths` (pieces,) as in the file."""

    counts: NDArray[np.int64]
    starts: NDArray[np.int64]
    lengths: NDArray[np.int32]


class Pack:
    """A pack on disk. Opening reads the header; pickles as its path.

    Raises ShardError where there is none, or one of another index (`idx_sha256`, hex), or a damaged one.
    """

    def __init__(self, directory: Path, split: str, how: str, seq_len: int, idx_sha256: str) -> None:
        self.directory, self.split, self.how, self.seq_len, self.idx_sha256 = directory, split, how, seq_len, idx_sha256
        self.path = pack_path(directory, split, how, seq_len)
        again = f"run {command(directory, split, how, seq_len)}"
        if not self.path.is_file():
            raise ShardError(f"{self.path} does not exist: rows by {how} are laid out once, {again}")
        with self.path.open("rb") as stream:
            header = stream.read(HEADER.size)
        if header[: len(MAGIC)] != MAGIC:
            raise ShardError(f"{self.path} starts with {header[:8]!r}, not {MAGIC!r}: it is not a pack; {again}")
        if len(header) < HEADER.size:
            raise ShardError(f"{self.path} has {len(header)} bytes, less than its header: truncated; {again}")
        _, version, code, length, self.n_pieces, self.n_rows, self.unread_tokens, packed, self._sha256 = HEADER.unpack(
            header
        )
        if version != VERSION:
            raise ShardError(f"{self.path} has version {version}; this reader knows version {VERSION} only: {again}")
        if (code, length) != (HOW[how], seq_len):
            raise ShardError(f"{self.path} is by method {code} for rows of {length:,}: it was renamed; {again}")
        if packed.hex() != idx_sha256:
            raise ShardError(
                f"{self.path} belongs to an index with sha256 {packed.hex()[:12]}, {split}.idx has {idx_sha256[:12]}: "
                f"the dataset was made again since; {again}"
            )
        if min(self.n_pieces, self.n_rows, self.unread_tokens) < 0:
            raise ShardError(f"{self.path} has a negative number in its header: it is damaged; {again}")
        found, expected = self.path.stat().st_size, HEADER.size + 12 * self.n_pieces + 8 * (self.n_rows + 1)
        self.n_bytes = found
        if found != expected:
            raise ShardError(f"{self.path} has {found:,} bytes, its header promises {expected:,}: truncated; {again}")

    @property
    def sha256(self) -> str:
        """Of the contents, as the header says; `problems` holds them against it."""
        digest: bytes = self._sha256
        return digest.hex()

    def __reduce__(self) -> tuple[type[Pack], tuple[Path, str, str, int, str]]:
        return Pack, (self.directory, self.split, self.how, self.seq_len, self.idx_sha256)

    def _map(self, dtype: str, offset: int, count: int) -> NDArray[Any]:
        if count == 0:
            return np.zeros(0, dtype)
        return np.asarray(np.memmap(self.path, dtype, mode="r", offset=offset, shape=(count,)))

    @cached_property
    def starts(self) -> NDArray[np.int64]:
        return self._map("<i8", HEADER.size, self.n_pieces)

    @cached_property
    def lengths(self) -> NDArray[np.int32]:
        return self._map("<i4", HEADER.size + 8 * self.n_pieces, self.n_pieces)

    @cached_property
    def rows(self) -> NDArray[np.int64]:
        return self._map("<i8", HEADER.size + 12 * self.n_pieces, self.n_rows + 1)

    @cached_property
    def layout(self) -> tuple[int, int, int, int, int]:
        """For csrc/rows.cpp: addresses of starts, lengths and rows, numbers of pieces and rows."""
        addresses = (part.ctypes.data for part in (self.starts, self.lengths, self.rows))
        return *addresses, self.n_pieces, self.n_rows

    def pieces(self, row: int) -> list[tuple[int, int]]:
        """(first token, signed length) of each piece of a row."""
        first, stop = self.rows[row : row + 2].tolist()
        if not 0 <= first <= stop <= self.n_pieces:
            raise ShardError(
                f"{self.path}: row {row:,} is pieces {first:,} to {stop:,} of {self.n_pieces:,}: it is damaged; make "
                "it again by data_prep.pack_shards"
            )
        return list(zip(self.starts[first:stop].tolist(), self.lengths[first:stop].tolist(), strict=True))

    def problems(self) -> Iterator[str]:
        """Whether the contents have the hash in the header. Reads everything, in bounded memory."""
        digests = [hashlib.sha256() for _ in range(3)]
        sections: tuple[NDArray[Any], ...] = self.starts, self.lengths, self.rows
        for digest, values in zip(digests, sections, strict=True):
            for first in range(0, len(values), BLOCK_BYTES // 8):
                digest.update(values[first : first + BLOCK_BYTES // 8].tobytes())
        if _combined(digests, self.seq_len, self.n_pieces, self.n_rows, self.unread_tokens) != self._sha256:
            again = command(self.directory, self.split, self.how, self.seq_len)
            yield f"{self.path} is not what was written, it has another sha256: run {again}"


def write_pack(
    path: Path, how: str, seq_len: int, idx_sha256: str, n_pieces: int, unread_tokens: int, blocks: Iterable[Pieces]
) -> int:
    """Writes a pack of exactly `n_pieces`, a block of rows at a time, and returns its number of rows.

    A pack that was there before is replaced once the new one is whole and on disk.
    """
    offsets = HEADER.size, HEADER.size + 8 * n_pieces, HEADER.size + 12 * n_pieces
    digests = [hashlib.sha256() for _ in offsets]
    with draft_of(path) as draft:
        draft.touch()
        with ExitStack() as stack:
            streams = [stack.enter_context(draft.open("rb+")) for _ in offsets]
            for stream, offset in zip(streams, offsets, strict=True):
                stream.seek(offset)

            def put(*sections: NDArray[Any]) -> None:
                for stream, digest, values in zip(streams, digests, sections, strict=True):
                    digest.update(values.tobytes())
                    stream.write(values.tobytes())

            nothing = np.zeros(0, np.int64)
            put(nothing, nothing, np.zeros(1, "<i8"))
            n_rows = written = 0
            for block in blocks:
                ends = written + np.cumsum(block.counts, dtype="<i8")
                put(block.starts.astype("<i8"), block.lengths.astype("<i4"), ends)
                n_rows, written = n_rows + len(ends), written + len(block.starts)
            assert written == n_pieces, f"{written} pieces, {n_pieces} announced"
            streams[0].seek(0)
            numbers = seq_len, n_pieces, n_rows, unread_tokens
            sha256 = _combined(digests, *numbers)
            streams[0].write(HEADER.pack(MAGIC, VERSION, HOW[how], *numbers, bytes.fromhex(idx_sha256), sha256))
    return n_rows


def _combined(digests: Iterable[hashlib._Hash], *numbers: int) -> bytes:
    return hashlib.sha256(struct.pack("<4q", *numbers) + b"".join(digest.digest() for digest in digests)).digest()
