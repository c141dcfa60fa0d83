"""Writing shards, one split at a time."""

from __future__ import annotations

import array
import contextlib
import hashlib
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from mamba_pretrain.data.manifest import FileInfo
from mamba_pretrain.data.shards import BLOCK_BYTES, DTYPES, HEADER, MAGIC, VERSION, ShardError


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """uint16 while every id fits, else int32.

    Megatron's own tool changes at 65,500 instead of 65,536; the dtype stands in the header, so both read both.
    """
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<i4")


class ShardWriter:
    """Writes PREFIX.bin as documents come and PREFIX.idx on leaving; holds 4 bytes a document.

    with ShardWriter(directory / "train", vocab_size=257) as writer:
        writer.append(tokens)
    writer.files  # sizes and hashes, for the manifest

    Leaving through an exception writes no .idx, so what remains cannot be mistaken for a shard.
    """

    def __init__(self, prefix: Path, *, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.dtype = token_dtype(vocab_size)
        self.n_tokens = 0
        self.files: dict[str, FileInfo] = {}
        self._idx_path = prefix.with_name(prefix.name + ".idx")
        self._lengths = array.array("i")
        self._bin = _HashedFile(prefix.with_name(prefix.name + ".bin"))

    @property
    def n_documents(self) -> int:
        return len(self._lengths)

    def append(self, tokens: NDArray[np.integer[Any]]) -> None:
        """Adds one document, (n,) token ids of any integer dtype. Raises ShardError for an empty or impossible one."""
        document = f"document {self.n_documents} of {self._bin.path.stem}"
        if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
            raise ShardError(f"{document} is {tokens.ndim}-dimensional {tokens.dtype}, expected a list of integers")
        if not 0 < tokens.size < 1 << 31:
            raise ShardError(
                f"{document} has {tokens.size:,} tokens; the format holds 1 to 2,147,483,647 in a document"
            )
        for extreme in (int(tokens.min()), int(tokens.max())):
            if not 0 <= extreme < self.vocab_size:
                raise ShardError(f"{document} has token id {extreme}, the vocabulary has {self.vocab_size:,}")
        self._bin.write(tokens.astype(self.dtype).tobytes())
        self._lengths.append(tokens.size)
        self.n_tokens += tokens.size

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: BaseException | TracebackType | None) -> None:
        if kind is not None:
            self._bin.abandon()
            return
        self._bin.close()
        lengths = np.frombuffer(self._lengths, np.int32) if self._lengths else np.zeros(0, np.int32)
        code = next(code for code, dtype in DTYPES.items() if np.dtype(dtype) == self.dtype)
        idx = _HashedFile(self._idx_path)
        idx.write(HEADER.pack(MAGIC, VERSION, code, lengths.size, lengths.size + 1))
        rows, offset = BLOCK_BYTES // 8, 0
        for begin in range(0, lengths.size, rows):
            idx.write(lengths[begin : begin + rows].astype("<i4").tobytes())
        for begin in range(0, lengths.size, rows):
            ends = offset + np.cumsum(lengths[begin : begin + rows], dtype=np.int64) * self.dtype.itemsize
            idx.write(np.concatenate(([offset], ends[:-1])).astype("<i8").tobytes())
            offset = int(ends[-1])
        for begin in range(0, lengths.size + 1, rows):
            idx.write(np.arange(begin, min(begin + rows, lengths.size + 1), dtype="<i8").tobytes())
        idx.close()
        self.files = {file.path.name: file.info for file in (self._bin, idx)}


class _HashedFile:
    """A file that knows its sha256 when it is closed, without being read again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stream: BinaryIO = path.open("xb", buffering=1 << 20)
        self._digest = hashlib.sha256()

    def write(self, data: bytes) -> None:
        self._stream.write(data)
        self._digest.update(data)

    def close(self) -> None:
        size = self._stream.tell()
        self._stream.close()
        self.info = FileInfo(size, self._digest.hexdigest())

    def abandon(self) -> None:
        # The flush that failed fails again; the exception on its way out is the one to see.
        with contextlib.suppress(OSError):
            self._stream.close()
