"""Lines out of plain and compressed files; a file that ends early never passes for a whole one."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Final

EXTRA: Final = "pip install 'mamba-pretrain[data]'"


class CorpusError(ValueError):
    """The input is not a corpus this program can read."""


def lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(number from 1, line with its line feed) of a plain or compressed file."""
    number = 0
    try:
        with _open(path) as stream:
            for number, line in enumerate(stream, start=1):
                yield number, line
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise CorpusError(f"{path} is damaged after line {number} ({error}); get the file again") from error


def _open(path: Path) -> io.BufferedIOBase | IO[bytes]:
    if path.suffix in (".gz", ".zst") and not path.stat().st_size:  # even the compressed nothing has some bytes
        raise EOFError("it is empty")
    if path.suffix == ".gz":
        return gzip.open(path)
    if path.suffix == ".zst":
        return io.BufferedReader(_ZstdStream(path))
    return path.open("rb")


class _ZstdStream(io.RawIOBase):
    """Decompressed bytes of one or more zstd frames. zstandard's own stream ends a truncated file without a word."""

    def __init__(self, path: Path) -> None:
        self._zstd = optional("zstandard", path)
        self._file = path.open("rb")
        self._frame = self._zstd.ZstdDecompressor().decompressobj()
        self._ready, self._rest, self._inside = memoryview(b""), b"", False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            block = self._rest or self._file.read(1 << 16)
            if not block and self._inside:
                raise EOFError("the last zstd frame is incomplete")
            if not block:
                return 0
            try:
                self._ready = memoryview(self._frame.decompress(block))
            except self._zstd.ZstdError as error:
                raise EOFError(str(error)) from error
            self._rest, self._inside = self._frame.unused_data, not self._frame.eof
            if self._frame.eof:
                self._frame = self._zstd.ZstdDecompressor().decompressobj()
        n = min(len(buffer), len(self._ready))
        buffer[:n], self._ready = self._ready[:n], self._ready[n:]
        return n

    def close(self) -> None:
        self._file.close()
        super().close()


def optional(module: str, path: Path) -> Any:
    try:
        return __import__(module, fromlist=["_"])
    except ImportError as error:
        raise CorpusError(f"{path}: reading it takes the package {module.split('.')[0]}: {EXTRA}") from error
