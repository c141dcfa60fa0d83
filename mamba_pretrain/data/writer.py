"""Writing shards: one split at a time into files, and all files at once into a dataset directory."""

from __future__ import annotations

import array
import contextlib
import errno
import hashlib
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Final

import numpy as np
from numpy.typing import NDArray

from mamba_pretrain.data.shards import BLOCK_BYTES, DTYPES, HEADER, MAGIC, VERSION, FileInfo, ShardError

DISK_FULL: Final = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


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


@contextlib.contextmanager
def atomic_directory(output: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A scratch directory that becomes `output`, complete and synced to disk, if the block ends well.

    Otherwise nothing is left, and an `output` that was there before is untouched. A killed process leaves its scratch
    directory, `OUTPUT.tmp-HOST-PID`; the next one with the same output on the same host removes it. Raises ShardError
    where `output` exists and `overwrite` is false, and where the disk is full.
    """
    output = Path(os.path.abspath(output))
    _sweep(output)
    if output.exists() and not overwrite:
        raise ShardError(f"{output} exists; choose another output, or pass --overwrite to replace it")
    if output.exists() and not output.is_dir():
        raise ShardError(f"{output} is a file; the output is a directory")
    scratch, old = _sibling(output, "tmp"), _sibling(output, "old")
    scratch.mkdir(parents=True)
    try:
        yield scratch
        for path in (*sorted(scratch.iterdir()), scratch):
            _sync(path)
        if output.exists():
            output.rename(old)
        scratch.rename(output)
        _sync(output.parent)
        if old.exists():
            shutil.rmtree(old)
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        written = sum(file.stat().st_size for file in scratch.iterdir())
        free = shutil.disk_usage(output.parent).free
        raise ShardError(
            f"the disk is full ({error.strerror}): {output} needs more than the {written / 1e6:,.1f} MB written so "
            f"far, and {free / 1e6:,.1f} MB are free on its file system (a quota or ulimit -f may allow less). The "
            "partial output was removed. Free space, or choose an output elsewhere"
        ) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _sibling(output: Path, role: str) -> Path:
    # The host is in the name because a process id says nothing about the other nodes that share the file system.
    return output.with_name(f"{output.name}.{role}-{socket.gethostname()}-{os.getpid()}")


def _sweep(output: Path) -> None:
    """Undoes what processes of this host that are dead by now left beside `output`."""
    for role in ("old", "tmp"):
        stem = f"{output.name}.{role}-{socket.gethostname()}-"
        for path in output.parent.glob("*") if output.parent.is_dir() else ():
            pid = path.name.removeprefix(stem)
            if not path.name.startswith(stem) or not pid.isdecimal() or (_alive(int(pid)) and int(pid) != os.getpid()):
                continue
            if role == "old" and not output.exists():  # killed between the two renames: the old dataset is the dataset
                path.rename(output)
            else:
                shutil.rmtree(path)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
