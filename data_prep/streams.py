"""Bytes and lines out of plain and compressed files; a file that ends early never passes for a whole one."""

from __future__ import annotations

import gzip
import io
import os
import zlib
from collections.abc import Iterator
from typing import IO, Any, Final

EXTRA: Final = "pip install 'mamba-pretrain[{}]'"
COMPRESSED: Final = (".gz", ".zst")
PREFIX: Final = 40  # bytes that are kept of a line that is too long
SKIP: Final = 1 << 20  # bytes at a time of what is read and not kept
# A zstd block of 4 bytes may hold 128 KiB: what goes into the decompressor at a time bounds what comes out to 128 MiB.
ZSTD_PIECE: Final = 1 << 12
ZSTD_WINDOW: Final = 1 << 31  # as `zstd --long=31` needs; the default of the library refuses such files


class CorpusError(ValueError):
    """The input is not a corpus this program can read."""


class TooLong(bytes):
    """The first bytes of a line that has more than the limit."""


def size_of(source: str) -> int:
    return os.stat(source).st_size


def lines(source: str, limit: int, start: int = 0) -> Iterator[tuple[int, int, bytes]]:
    """(number, first byte, line with its line feed) of a file, by the bytes of its decompressed content.

    From byte `start` on: number 0 is then the rest, from byte `start` - 1 on, of the line that began before, and 1 the
    first that begins at `start` or after it. Memory is bounded by twice `limit`: a longer line is a TooLong.
    """
    number, begin = (0, start - 1) if start else (1, 0)
    try:
        with open_bytes(source, begin) as stream:
            while line := stream.readline(limit + 1):
                n_bytes = len(line)
                if n_bytes > limit:
                    n_bytes += 0 if line.endswith(b"\n") else _skip_line(stream)
                    line = TooLong(line[:PREFIX])
                yield number, begin, line
                number, begin = number + 1, begin + n_bytes
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise CorpusError(f"{source} is damaged after line {number - 1} ({error}); get the file again") from error


def _skip_line(stream: IO[bytes] | io.BufferedIOBase) -> int:
    skipped = 0
    while piece := stream.readline(SKIP):
        skipped += len(piece)
        if piece.endswith(b"\n"):
            break
    return skipped


def content(source: str, limit: int) -> bytes:
    """All of a file, or a TooLong."""
    begin = 0
    try:
        with open_bytes(source) as stream:
            whole = stream.read(limit + 1)
            begin = len(whole)
            if begin <= limit:
                return whole
            whole = TooLong(whole[:PREFIX])
            while piece := stream.read(SKIP):  # it may be damaged further on
                begin += len(piece)
            return whole
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise CorpusError(f"{source} is damaged after {begin:,} bytes ({error}); get the file again") from error


def line_feeds(source: str, stop: int) -> int:
    """How many there are in the first `stop` bytes."""
    count, left = 0, stop
    with open_bytes(source) as stream:
        while left and (piece := stream.read(min(left, SKIP))):
            count += piece.count(b"\n")
            left -= len(piece)
    return count


def blank_before(source: str, stop: int) -> bool:
    """Whether there is nothing but whitespace between byte `stop` and the line feed, or the beginning, before it."""
    with open_bytes(source) as stream:
        while stop:
            begin = max(stop - SKIP, 0)
            stream.seek(begin)
            _, feed, line = stream.read(stop - begin).rpartition(b"\n")
            if line.strip() or feed:
                return not line.strip()
            stop = begin
    return True


def open_bytes(source: str, start: int = 0) -> io.BufferedIOBase | IO[bytes]:
    """The decompressed content, from byte `start` on if it is not compressed."""
    suffix = os.path.splitext(source)[1]
    if suffix in COMPRESSED and not size_of(source):  # even the compressed nothing has some bytes
        raise EOFError("it is empty")
    if suffix == ".gz":
        return gzip.open(source)
    if suffix == ".zst":
        return io.BufferedReader(_ZstdStream(source))
    stream = open(source, "rb")  # noqa: SIM115
    stream.seek(start)
    return stream


class _ZstdStream(io.RawIOBase):
    """Decompressed bytes of one or more zstd frames. zstandard's own stream ends a truncated file without a word."""

    def __init__(self, source: str) -> None:
        self._zstd = optional("zstandard", source)
        self._file = open(source, "rb")  # noqa: SIM115
        self._frame = self._new_frame()
        self._ready, self._rest, self._inside = memoryview(b""), b"", False

    def _new_frame(self) -> Any:
        return self._zstd.ZstdDecompressor(max_window_size=ZSTD_WINDOW).decompressobj()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            piece = self._rest or self._file.read(ZSTD_PIECE)
            if not piece and self._inside:
                raise EOFError("the last zstd frame is incomplete")
            if not piece:
                return 0
            try:
                self._ready = memoryview(self._frame.decompress(piece))
            except self._zstd.ZstdError as error:
                raise EOFError(str(error)) from error
            self._rest, self._inside = self._frame.unused_data, not self._frame.eof
            if self._frame.eof:
                self._frame = self._new_frame()
        n = min(len(buffer), len(self._ready))
        buffer[:n], self._ready = self._ready[:n], self._ready[n:]
        return n

    def close(self) -> None:
        self._file.close()
        super().close()


def optional(module: str, source: str, extra: str = "data") -> Any:
    """An optional package, or an error that says how to get it."""
    try:
        return __import__(module, fromlist=["_"])
    except ImportError as error:
        package, cure = module.split(".")[0], EXTRA.format(extra)
        raise CorpusError(f"{source}: reading it takes the package {package}: {cure}") from error
