"""Bytes and lines out of files, local or at an fsspec URL (s3://, gs://, https://, ...), plain or compressed.

A file that ends early never passes for a whole one. Credentials and end points of a URL are set as its fsspec package
reads them, from the environment or fsspec's own configuration (for S3 AWS_ENDPOINT_URL, AWS_PROFILE, ...).
"""

from __future__ import annotations

import codecs
import gzip
import io
import os
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Final

import fsspec

from mamba_pretrain.data.shards import ShardError
from mamba_pretrain.data.tokenizer import TokenizerError

CURE: Final = "pip install 'mamba-pretrain[{}]'"
COMPRESSED: Final = (".gz", ".zst")
HTTP: Final = ("http://", "https://")
HUB: Final = "hf://"  # a dataset by name, unless fsspec means its files by it:
HUB_FILES: Final = tuple(HUB + kind for kind in ("datasets/", "spaces/", "buckets/"))
EXTRAS: Final = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "http": "http", "https": "http"}
BLOCK_BYTES: Final = 8 << 20  # of a remote file at a time
PATIENCE_S: Final = 300  # for the next bytes of an answer over http
BUFFER_BYTES: Final = 1 << 17  # long lines are read five times as fast as with Python's 8 KiB
PREFIX: Final = 40  # bytes that are kept of a line that is too long
SKIP: Final = 1 << 20  # bytes at a time of what is read and not kept
# A zstd block of 4 bytes may hold 128 KiB: what goes into the decompressor at a time bounds what comes out to 32 MiB.
ZSTD_PIECE: Final = 1 << 10
ZSTD_WINDOW: Final = 1 << 31  # as `zstd --long=31` needs; the library refuses such files by default


class CorpusError(ValueError):
    """The input is not a corpus this program can read."""


class UnreadableError(CorpusError):
    """One input is damaged or cannot be read; others may be well."""


class TooLong(bytes):
    """Some bytes of a line, or of a file, that has more than the limit: of a line the first."""


def is_url(source: str) -> bool:
    return "://" in source


def is_named_dataset(source: str) -> bool:
    return source.startswith(HUB) and not source.startswith(HUB_FILES)


def extension(source: str) -> str:
    """The last part of the name, with what is before a .gz or .zst: `.jsonl.gz`."""
    name = source.partition("?")[0].partition("#")[0] if source.startswith(HTTP) else source
    plain, suffix = os.path.splitext(name.rstrip("/"))
    return os.path.splitext(plain)[1] + suffix if suffix in (".gz", ".zst") else suffix


def filesystem(url: str) -> tuple[Any, str]:
    """(fsspec's file system, its path) of a URL."""
    protocol = url.partition("://")[0]
    options = {}
    if url.startswith(HTTP):
        timeout = optional("aiohttp", url, "http").ClientTimeout
        # aiohttp gives a whole answer 5 minutes, and we read it no faster than it is tokenized.
        options["client_kwargs"] = {"timeout": timeout(total=None, sock_connect=60, sock_read=PATIENCE_S)}
    try:
        fs, path = fsspec.core.url_to_fs(url, **options)
    except ImportError as error:
        cure = CURE.format(EXTRAS[protocol]) if protocol in EXTRAS else str(error)
        raise CorpusError(f"{url}: reading it takes another package: {cure}") from error
    except ValueError as error:
        raise CorpusError(f"{url}: {error}") from error
    return fs, path


def size_of(source: str) -> int | None:
    """Bytes of a file or of all files of a directory; None where it is not known. Raises OSError."""
    if is_named_dataset(source):
        return None
    if is_url(source):
        fs, path = filesystem(source)
        fs.invalidate_cache(path)
        with as_os_errors():
            size = fs.info(path)["size"]
            return None if size is None else int(size)
    if os.path.isdir(source):
        return sum(file.stat().st_size for file in Path(source).rglob("*") if file.is_file())
    return os.stat(source).st_size


def modified_ns(source: str) -> int:
    """When a file, or the newest of a directory's, was last written; 0 where that is not known, as of a URL."""
    if is_url(source):
        return 0
    files = [*Path(source).rglob("*")] if os.path.isdir(source) else [Path(source)]
    try:
        return max((file.stat().st_mtime_ns for file in files), default=0)
    except OSError:
        return 0


def open_raw(source: str, *, seekable: bool = True, span: int | None = None) -> io.BufferedIOBase | IO[bytes]:
    """The bytes of a file as they are stored. `seekable`: not only from the first to the last; `span`: bytes that will
    be read, about, if not all of them."""
    if not is_url(source):
        return open(source, "rb", buffering=BUFFER_BYTES)
    fs, path = filesystem(source)
    with as_os_errors():
        # Some web servers give files from the beginning only, and all are faster so.
        # A block is fetched beyond what is asked for: no more than the span needs.
        block = 0 if source.startswith(HTTP) and not seekable else min(BLOCK_BYTES, span or BLOCK_BYTES)
        return io.BufferedReader(_Remote(fs.open(path, "rb", block_size=block)), BUFFER_BYTES)


def has_ranges(source: str) -> bool:
    """Whether a file can be read from the middle; some web servers do not offer that."""
    if not source.startswith(HTTP):
        return True
    fs, path = filesystem(source)
    with as_os_errors(), fs.open(path, "rb", block_size=1, cache_type="none") as stream:
        try:
            stream.seek(1)
            stream.read(1)
        except ValueError:
            return False
    return True


@contextmanager
def as_os_errors() -> Iterator[None]:
    """Each file system has errors of its own: all become OSError."""
    try:
        yield
    except (OSError, CorpusError, ShardError, TokenizerError):
        raise
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {error}") from error


class _Remote(io.RawIOBase):
    """A file of fsspec as the raw stream that io.BufferedReader takes: its own lines are read in Python."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self._ended = False  # aiohttp warns, with a traceback, where one reads on at the end, as decompressors do

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return bool(self._file.seekable())

    def seek(self, offset: int, whence: int = 0) -> int:
        self._ended = False
        return int(self._file.seek(offset, whence))

    def tell(self) -> int:
        return int(self._file.tell())

    def readinto(self, buffer: Any) -> int:
        if self._ended:
            return 0
        with as_os_errors():
            found = self._file.read(len(buffer))
        self._ended = not found and len(buffer) > 0
        buffer[: len(found)] = found
        return len(found)

    def close(self) -> None:
        self._file.close()
        super().close()


def lines(source: str, limit: int, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, int, bytes]]:
    """(number, first byte, line with its line feed) of a file, by the bytes of its decompressed content.

    From byte `start` on: number 0 is then the rest, from byte `start` - 1 on, of the line that began before, and 1 the
    first that begins at `start` or after it. Lines that begin at `stop` follow too, unless number 0 gets as far: it is
    not read any further. A byte order mark is no part of the first line. Memory is bounded by twice `limit`: a longer
    line is a TooLong.
    """
    number, begin = (0, start - 1) if start else (1, 0)
    try:
        with open_bytes(source, begin if start else None, stop) as stream:
            if start:
                line, n_bytes = _read_line(stream, limit, sys.maxsize if stop is None else stop - begin)
                yield number, begin, line
                number, begin = 1, begin + n_bytes
                if stop is not None and begin >= stop:
                    return
            line, n_bytes = _read_line(stream, limit)
            if not start and not isinstance(line, TooLong):
                line = line.removeprefix(codecs.BOM_UTF8)
            while n_bytes:
                yield number, begin, line
                number, begin = number + 1, begin + n_bytes
                line, n_bytes = _read_line(stream, limit)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UnreadableError(f"{source} is damaged after line {number - 1} ({error}); get the file again") from error


def _read_line(stream: IO[bytes] | io.BufferedIOBase, limit: int, at_most: int = sys.maxsize) -> tuple[bytes, int]:
    """(line or TooLong, its bytes), or so much of it as `at_most` allows."""
    line = stream.readline(min(limit + 1, at_most))
    n_bytes = len(line)
    if n_bytes <= limit:
        return line, n_bytes
    first = TooLong(line[:PREFIX])
    while not line.endswith(b"\n") and n_bytes < at_most and (line := stream.readline(min(SKIP, at_most - n_bytes))):
        n_bytes += len(line)
    return first, n_bytes


def content(source: str, limit: int) -> bytes:
    """All of a file, or a TooLong."""
    pieces: list[bytes] = []
    size = 0
    try:
        with open_bytes(source) as stream:
            while piece := stream.read(SKIP):  # to the end in any case: it may be damaged further on
                size += len(piece)
                if size > limit:
                    pieces = [TooLong(piece[:PREFIX])]
                else:
                    pieces.append(piece)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UnreadableError(f"{source} is damaged after {size:,} bytes ({error}); get the file again") from error
    return pieces[0] if size > limit else b"".join(pieces).removeprefix(codecs.BOM_UTF8)


def line_feeds(source: str, stop: int) -> int:
    """How many there are in the first `stop` bytes."""
    count, left = 0, stop
    with open_bytes(source) as stream:
        while left and (piece := stream.read(min(left, SKIP))):
            count += piece.count(b"\n")
            left -= len(piece)
    return count


def blanks_before(source: str, stop: int) -> int | None:
    """Bytes between byte `stop` and the line feed, or the beginning, before it; None if they are not all whitespace."""
    blanks = 0
    with open_bytes(source) as stream:
        while stop:
            begin = max(stop - SKIP, 0)
            stream.seek(begin)
            _, feed, line = stream.read(stop - begin).rpartition(b"\n")
            if not begin and not feed:
                line = line.removeprefix(codecs.BOM_UTF8)
            if line.strip():
                return None
            blanks += len(line)
            if feed:
                break
            stop = begin
    return blanks


def open_bytes(source: str, start: int | None = None, stop: int | None = None) -> io.BufferedIOBase | IO[bytes]:
    """The decompressed content. `start`: a place in a plain file to begin at, and a sign that others may follow.
    `stop`: about where reading will end.
    """
    suffix = os.path.splitext(extension(source))[1] or extension(source)
    if suffix in COMPRESSED and size_of(source) == 0:  # even the compressed nothing has some bytes
        raise EOFError("it is empty")
    span = None if stop is None else stop - (start or 0)
    stream = open_raw(source, seekable=start is not None, span=span)
    if suffix == ".gz":
        return _GzipStream(fileobj=stream)
    if suffix == ".zst":
        return io.BufferedReader(_ZstdStream(stream, source))
    if start:
        stream.seek(start)
    return stream


class _GzipStream(gzip.GzipFile):
    """As gzip's own, which leaves a file open that it is given."""

    def __init__(self, fileobj: Any) -> None:
        super().__init__(fileobj=fileobj)
        self._given = fileobj

    def close(self) -> None:
        super().close()
        self._given.close()


class _ZstdStream(io.RawIOBase):
    """Decompressed bytes of one or more zstd frames. zstandard's own stream ends a truncated file without a word."""

    def __init__(self, file: IO[bytes] | io.BufferedIOBase, source: str) -> None:
        self._zstd, self._file = optional("zstandard", source), file
        self._frame = self._new_frame()
        self._ready, self._rest, self._inside, self._given = memoryview(b""), b"", False, 0

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
        self._given += n
        return n

    def tell(self) -> int:
        return self._given

    def close(self) -> None:
        self._file.close()
        super().close()


def optional(module: str, source: str, extra: str = "data") -> Any:
    """An optional package, or an error that says how to get it."""
    try:
        return __import__(module, fromlist=["_"])
    except ImportError as error:
        cure = CURE.format(extra)
        raise CorpusError(f"{source}: reading it takes the package {module.split('.')[0]}: {cure}") from error
