"""Writing shards, one split at a time."""

from __future__ import annotations

import contextlib
import hashlib
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Final

import numpy as np
from fsspec.spec import AbstractBufferedFile
from numpy.typing import NDArray

from mamba_pretrain.data.manifest import FileInfo
from mamba_pretrain.data.shards import BLOCK_BYTES, DTYPES, HEADER, MAGIC, VERSION, ShardError

MAX_TOKENS: Final = (1 << 31) - 1  # of a document: the index counts them in 32 bits


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """uint16 while every id fits, else int32, which is the widest the format has. Raises ShardError beyond that.

    Megatron's own tool changes at 65,500 instead of 65,536; the dtype stands in the header, so both read both.
    """
    if vocab_size > 1 << 31:
        raise ShardError(f"a vocabulary of {vocab_size:,} ids: token ids of a shard have at most 31 bits (int32)")
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<i4")


class ShardWriter:
    """Writes PREFIX.bin as documents come and PREFIX.idx on leaving. Memory does not grow: lengths wait in a file.

    with ShardWriter(directory / "train", vocab_size=257) as writer:
        writer.append(tokens)
    writer.files  # sizes and hashes, for the manifest

    `create` opens a new file of a name for writing; by default, in the prefix's directory. Leaving through an exception
    writes no .idx, so what remains cannot be mistaken for a shard.
    """

    def __init__(self, prefix: Path, *, vocab_size: int, create: Callable[[str], BinaryIO] | None = None) -> None:
        self.vocab_size = vocab_size
        self.dtype = token_dtype(vocab_size)
        self.n_documents = self.n_tokens = 0
        self.files: dict[str, FileInfo] = {}
        self._name = prefix.name
        self._create = create or (lambda name: prefix.with_name(name).open("xb", buffering=1 << 20))
        # Without a name, so that nothing stays of it however this ends. Lengths of a remote shard wait on this machine.
        place = prefix.parent if create is None else None
        self._lengths: BinaryIO = tempfile.TemporaryFile(dir=place)  # noqa: SIM115 - __exit__ closes it
        self._bin = _HashedFile(f"{self._name}.bin", self._create)

    def append(self, tokens: NDArray[np.integer[Any]]) -> None:
        """Adds one document, (n,) token ids of any integer dtype. Raises ShardError for an empty or impossible one."""
        document = f"document {self.n_documents} of {self._name}"
        if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
            raise ShardError(f"{document} is {tokens.ndim}-dimensional {tokens.dtype}, expected a list of integers")
        if not 0 < tokens.size <= MAX_TOKENS:
            raise ShardError(f"{document} has {tokens.size:,} tokens; the format holds 1 to {MAX_TOKENS:,} in one")
        for extreme in (int(tokens.min()), int(tokens.max())):
            if not 0 <= extreme < self.vocab_size:
                raise ShardError(f"{document} has token id {extreme}, the vocabulary has {self.vocab_size:,}")
        self.extend(np.array([tokens.size], "<i4"), [tokens.astype(self.dtype).tobytes()])

    def extend(self, lengths: NDArray[np.int32], blocks: Iterable[bytes]) -> None:
        """Adds documents whose tokens, one after the other and of this writer's dtype, were checked before."""
        for block in blocks:
            self._bin.write(block)
        self._lengths.write(lengths.astype("<i4").tobytes())
        self.n_documents += lengths.size
        self.n_tokens += int(lengths.sum(dtype=np.int64))
        assert self._bin.bytes == self.n_tokens * self.dtype.itemsize, "the blocks are not what the lengths say"

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: BaseException | TracebackType | None) -> None:
        with self._lengths:
            if kind is not None:
                self._bin.abandon()
                return
            with _abandoned_on_errors(self._bin):
                self._bin.close()
            idx = _HashedFile(f"{self._name}.idx", self._create)
            with _abandoned_on_errors(idx):
                self._write_index(idx)
                idx.close()
        self.files = {file.name: file.info for file in (self._bin, idx)}

    def _write_index(self, idx: _HashedFile) -> None:
        code = next(code for code, dtype in DTYPES.items() if np.dtype(dtype) == self.dtype)
        idx.write(HEADER.pack(MAGIC, VERSION, code, self.n_documents, self.n_documents + 1))
        rows, offset = BLOCK_BYTES // 8, 0
        self._lengths.seek(0)
        while block := self._lengths.read(4 * rows):
            idx.write(block)
        self._lengths.seek(0)
        while block := self._lengths.read(4 * rows):
            ends = offset + np.cumsum(np.frombuffer(block, "<i4"), dtype=np.int64) * self.dtype.itemsize
            idx.write(np.concatenate(([offset], ends[:-1])).astype("<i8").tobytes())
            offset = int(ends[-1])
        for begin in range(0, self.n_documents + 1, rows):
            idx.write(np.arange(begin, min(begin + rows, self.n_documents + 1), dtype="<i8").tobytes())


@contextlib.contextmanager
def _abandoned_on_errors(file: _HashedFile) -> Iterator[None]:
    try:
        yield
    except BaseException:
        file.abandon()
        raise


class _HashedFile:
    """A file that knows its sha256 when it is closed, without being read again."""

    def __init__(self, name: str, create: Callable[[str], BinaryIO]) -> None:
        self.name, self.bytes = name, 0
        self._stream = create(name)
        self._digest = hashlib.sha256()

    def write(self, data: bytes) -> None:
        self._stream.write(data)
        self._digest.update(data)
        self.bytes += len(data)

    def close(self) -> None:
        self._stream.close()
        self.info = FileInfo(self.bytes, self._digest.hexdigest())

    def abandon(self) -> None:
        # The flush that failed fails again; the exception on its way out is the one to see.
        with contextlib.suppress(OSError):
            if not isinstance(self._stream, AbstractBufferedFile):
                self._stream.close()
                return
            try:
                self._stream.discard()
            finally:
                self._stream.closed = True  # else its collection closes it: a traceback (s3fs), or half an object
