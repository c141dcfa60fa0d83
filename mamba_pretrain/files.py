"""Directories on disk that are either complete or absent, and what files weigh: their hashes."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

BLOCK_BYTES: Final = 1 << 24  # read at a time
OURS: Final = frozenset(("manifest.json", "config.json"))
DISK_FULL: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def atomic_directory(output: Path, *, error: type[ValueError], overwrite: bool = False) -> Iterator[Path]:
    """A scratch directory that becomes `output`, complete and synced to disk, if the block ends well.

    Otherwise nothing is left, and an `output` that was there before is untouched; only an earlier output, never another
    directory, is replaced. A killed process leaves its scratch
    directory, `OUTPUT.tmp-HOST-PID`; the next one with the same output on the same host removes it. Raises `error`
    where `output` exists and `overwrite` is false, and for whatever the system refuses, a full disk above all.
    """
    output = Path(os.path.abspath(output))
    require_replaceable(output, error=error, overwrite=overwrite)
    scratch, old = _sibling(output, "tmp"), _sibling(output, "old")
    try:
        scratch.mkdir(parents=True)
        yield scratch
        for path in (*sorted(scratch.iterdir()), scratch):
            sync(path)
        if output.exists() and not overwrite:
            raise error(f"{output} exists by now: another process has made it; choose another output")
        if output.exists():
            output.rename(old)
        scratch.rename(output)
        sync(output.parent)
        if old.exists():
            shutil.rmtree(old)
    except Exception as cause:
        number = _errno(cause)
        if not number and not isinstance(cause, OSError):
            raise
        written = sum(file.stat().st_size for file in scratch.iterdir()) if scratch.exists() else 0
        free = shutil.disk_usage(next(parent for parent in output.parents if parent.exists())).free
        message = f"{output} was not written, and what was there before is untouched: {cause}"
        if number in DISK_FULL:
            reason = getattr(cause, "strerror", None) or os.strerror(number)
            message = (
                f"{output} was not written, the disk is full: {reason}. It had grown to "
                f"{written / 1e6:,.1f} MB, which are removed again; what was there before is untouched. "
                f"{free / 1e6:,.1f} MB are free on its file system (a quota or ulimit -f may allow less): make room, "
                "or choose an output elsewhere"
            )
        raise error(message) from cause
    finally:
        if old.exists() and not output.exists():
            old.rename(output)
        shutil.rmtree(scratch, ignore_errors=True)


def require_replaceable(output: Path, *, error: type[ValueError], overwrite: bool) -> None:
    """Raises `error` where `atomic_directory` would: for those who work long before they come to it."""
    output = Path(os.path.abspath(output))
    _sweep(output)
    if output.exists() and not overwrite:
        raise error(f"{output} exists; choose another output, or pass --overwrite to replace it")
    if output.exists():
        _check_replaceable(output, error)


def _check_replaceable(output: Path, error: type[ValueError]) -> None:
    """What we make is flat, and says what it is in one of two files. Anything else, a corpus say, is never deleted."""
    if not output.is_dir():
        raise error(f"{output} is a file; the output is a directory")
    if Path.cwd().is_relative_to(output):
        raise error(f"{output} holds the working directory: choose another output")
    held = [path.name for path in output.iterdir()]
    if any((output / name).is_dir() for name in held) or (held and not OURS.intersection(held)):
        raise error(f"{output} holds {', '.join(sorted(held)[:5])}: it is not an earlier output, and is not replaced")


def sha256_of(path: Path, progress: Callable[[int], object] = lambda _: None) -> str:
    """The file's sha256; `progress` is told the bytes of each block read."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as stream:
        while block := stream.read(BLOCK_BYTES):
            # The system fetches the next block while this one is hashed.
            os.posix_fadvise(stream.fileno(), stream.tell(), BLOCK_BYTES, os.POSIX_FADV_WILLNEED)
            digest.update(block)
            progress(len(block))
    return digest.hexdigest()


@contextlib.contextmanager
def naming(path: Path) -> Iterator[Path]:
    """Adds the path to errors of the system that do not say where: those of writing to an open file."""
    try:
        yield path
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def sync(path: Path) -> None:
    """Waits until the file or directory is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def draft_of(output: Path) -> Iterator[Path]:
    """A path for a file that becomes `output` once it is complete and on disk, if the block ends well.

    A killed process leaves `OUTPUT.tmp-HOST-PID`; the next one with the same output on the same host removes it. A
    full disk's OSError names the output: a write's own names no file.
    """
    for path in _left(output, "tmp"):
        path.unlink(missing_ok=True)  # another process may sweep at the same time
    draft = _sibling(output, "tmp")
    try:
        yield draft
        sync(draft)
        draft.rename(output)
        sync(output.parent)
    except OSError as error:
        if error.filename is None and error.errno is not None:
            raise OSError(error.errno, os.strerror(error.errno), str(output)) from error
        raise
    finally:
        draft.unlink(missing_ok=True)


def _errno(error: Exception) -> int:
    """The system's error number; libraries written in Rust (safetensors) only put it into their message. 0: none."""
    if isinstance(error, OSError):
        return error.errno or 0
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else 0


def _sibling(output: Path, role: str) -> Path:
    # The host is in the name because a process id says nothing about the other nodes that share the file system.
    return output.with_name(f"{output.name}.{role}-{socket.gethostname()}-{os.getpid()}")


def _sweep(output: Path) -> None:
    """Undoes what processes of this host that are dead by now left beside `output`."""
    for role in ("old", "tmp"):
        for path in _left(output, role):
            if role == "old" and not output.exists():  # killed between the two renames: the old one is the output
                path.rename(output)
            else:
                shutil.rmtree(path)


def _left(output: Path, role: str) -> Iterator[Path]:
    """Siblings of `output` whose processes are gone, or this one."""
    stem = f"{output.name}.{role}-{socket.gethostname()}-"
    for path in list(output.parent.glob("*")) if output.parent.is_dir() else ():
        pid = path.name.removeprefix(stem)
        if path.name.startswith(stem) and pid.isdecimal() and (not _alive(int(pid)) or int(pid) == os.getpid()):
            yield path


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
