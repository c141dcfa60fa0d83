"""One pass over a split: its hashes and everything that may be wrong with it, each file read once."""

from __future__ import annotations

import codecs
import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from mamba_pretrain.data.manifest import FileInfo, TokenizerInfo
from mamba_pretrain.data.shards import Shard
from mamba_pretrain.data.tokenizer import Tokenizer, TokenizerError

BLOCK_BYTES: Final = 1 << 21  # two of them stay in a core's cache while they are checked and hashed; a multiple of 8
SAMPLE: Final = 64  # documents of a split that are decoded
SAMPLE_TOKENS: Final = 1 << 16  # of each, at most

Progress = Callable[[int], object]  # told the bytes of each block read


@dataclass(frozen=True)
class Marks:
    """How many documents have a mark at one end, of those that can tell: all of two tokens or more."""

    documents: int = 0
    with_bos: int = 0
    with_eod: int = 0
    first_without_bos: int | None = None  # the number of a document
    first_without_eod: int | None = None


@dataclass(frozen=True)
class Scan:
    files: dict[str, FileInfo]
    problems: list[str]
    marks: Marks


def read_once(path: Path, progress: Progress, check: Callable[[memoryview], object] = lambda _: None) -> FileInfo:
    """The file's size and sha256. `check` is handed each block while the one before is hashed, in another thread."""
    digest, size, turn = hashlib.sha256(), 0, 0
    buffers = memoryview(bytearray(BLOCK_BYTES)), memoryview(bytearray(BLOCK_BYTES))
    hashing: Future[None] | None = None
    with path.open("rb", buffering=0) as stream, ThreadPoolExecutor(1) as hasher:
        while read := _fill(stream, buffers[turn]):
            block = buffers[turn][:read]
            check(block)
            if hashing is not None:
                hashing.result()
            hashing = hasher.submit(digest.update, block)
            progress(read)
            size, turn = size + read, 1 - turn
    return FileInfo(size, digest.hexdigest())


def scan(shard: Shard, tokenizer: TokenizerInfo, progress: Progress = lambda _: None) -> Scan:
    """Reads the index and the tokens: every document's place, every id's range, what documents begin and end with."""
    bin_file, idx_file = (shard.path.with_name(shard.path.name + suffix) for suffix in (".bin", ".idx"))
    idx = read_once(idx_file, progress)
    problems = list(shard.problems())
    tokens = _Tokens(shard, tokenizer, index_is_sound=not problems)
    found = read_once(bin_file, progress, tokens.check)
    return Scan({bin_file.name: found, idx_file.name: idx}, [*problems, *tokens.problems(bin_file)], tokens.marks())


def undecodable(shard: Shard, tokenizer: Tokenizer) -> Iterator[str]:
    """The documents that are no UTF-8 text, of SAMPLE spread evenly over the split, each with the reason."""
    sample = np.linspace(0, shard.n_documents - 1, min(SAMPLE, shard.n_documents)).astype(np.int64)
    for document in np.unique(sample).tolist():
        start, stop = shard.document_bounds(document)
        last = min(stop, start + SAMPLE_TOKENS)
        try:
            text = tokenizer.decode_bytes(shard.tokens(start, last).tolist())
            codecs.getincrementaldecoder("utf-8")().decode(text, final=last == stop)
        except UnicodeDecodeError as error:
            yield f"{shard.path}: document {document:,} does not decode to UTF-8 ({error.reason} at byte {error.start})"
        except TokenizerError as error:
            yield f"{shard.path}: document {document:,} does not decode: {error}"


class _Mark:
    """How many documents have one id at one end, and where the first begins that has not."""

    def __init__(self) -> None:
        self.documents = 0
        self.first_without: int | None = None

    def count(self, has: NDArray[np.bool_], tells: NDArray[np.bool_], starts: NDArray[np.int64]) -> None:
        self.documents += int((has & tells).sum())
        if self.first_without is None and (lacks := np.flatnonzero(~has & tells)).size:
            self.first_without = int(starts[lacks[0]])


class _Tokens:
    """What is seen of a .bin's tokens, block by block."""

    def __init__(self, shard: Shard, tokenizer: TokenizerInfo, *, index_is_sound: bool) -> None:
        self._shard, self._tokenizer, self._index_is_sound = shard, tokenizer, index_is_sound
        self._position = self._outside = self._documents = 0
        self._first_outside: tuple[int, int] | None = None  # id and position
        self._bos, self._eod = _Mark(), _Mark()
        self._start, self._has_bos = 0, False  # of the document that is not over yet
        self._last = -1  # the token before the block

    def check(self, block: memoryview) -> None:
        size = self._shard.dtype.itemsize
        tokens = np.frombuffer(block[: len(block) - len(block) % size], self._shard.dtype)
        if not tokens.size:
            return
        if int(tokens.max()) >= self._tokenizer.vocab_size or (tokens.dtype.kind == "i" and int(tokens.min()) < 0):
            wrong = np.flatnonzero((tokens < 0) | (tokens >= self._tokenizer.vocab_size))
            self._outside += wrong.size
            if self._first_outside is None:
                self._first_outside = int(tokens[wrong[0]]), self._position + int(wrong[0])
        if self._index_is_sound:
            self._count(tokens)
        self._position += tokens.size

    def _count(self, tokens: NDArray[Any]) -> None:
        begin, stop = self._position, self._position + tokens.size
        here = np.unique(self._shard.document_starts(begin, stop))  # an empty document begins where the next one does
        starts, has_bos = here, tokens[here - begin] == self._tokenizer.bos_id
        if begin:
            starts, has_bos = np.append(self._start, here), np.append(self._has_bos, has_bos)
        ends = np.append(starts[1:], stop) if stop == self._shard.n_tokens else starts[1:]
        has_eod = tokens[np.maximum(ends - 1 - begin, 0)] == self._tokenizer.eod_id
        if ends.size and ends[0] == begin:
            has_eod[0] = self._last == self._tokenizer.eod_id
        starts_of_ended, has_bos_of_ended = starts[: ends.size], has_bos[: ends.size]
        tells = ends - starts_of_ended >= 2  # a single eod, where it is the bos too, may be either
        self._documents += int(tells.sum())
        self._bos.count(has_bos_of_ended, tells, starts_of_ended)
        self._eod.count(has_eod, tells, starts_of_ended)
        self._start, self._has_bos, self._last = int(starts[-1]), bool(has_bos[-1]), int(tokens[-1])

    def problems(self, file: Path) -> Iterator[str]:
        if self._first_outside is not None:
            wrong, position = self._first_outside
            yield (
                f"{file}: {self._outside:,} tokens outside the vocabulary of {self._tokenizer.vocab_size:,}, the first "
                f"is id {wrong} at position {position:,}"
            )

    def marks(self) -> Marks:
        def document(position: int | None) -> int | None:
            return None if position is None else self._shard.document_at(position)

        without = document(self._bos.first_without), document(self._eod.first_without)
        return Marks(self._documents, self._bos.documents, self._eod.documents, *without)


def _fill(stream: FileIO, buffer: memoryview) -> int:
    """Reads until the buffer is full or the file ends: a block may not end inside a token."""
    filled = 0
    try:
        while filled < len(buffer) and (read := stream.readinto(buffer[filled:])):
            filled += read
    except OSError as error:  # a bad disk, say; reading does not tell which file it was
        raise OSError(error.errno, error.strerror, stream.name) from error
    return filled
