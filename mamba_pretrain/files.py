"""Directories on disk that are either complete or absent."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Final

DISK_FULL: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def atomic_directory(output: Path, *, error: type[ValueError], overwrite: bool = False) -> Iterator[Path]:
    """A scratch directory that becomes `output`, complete and synced to disk, if the block ends well.

    Otherwise nothing is left, and an `output` that was there before is untouched. A killed process leaves its scratch
    directory, `OUTPUT.tmp-HOST-PID`; the next one with the same output on the same host removes it. Raises `error`
    where `output` exists and `overwrite` is false, and for whatever the system refuses, a full disk above all.
    """
    output = Path(os.path.abspath(output))
    _sweep(output)
    if output.exists() and not overwrite:
        raise error(f"{output} exists; choose another output, or pass --overwrite to replace it")
    if output.exists() and not output.is_dir():
        raise error(f"{output} is a file; the output is a directory")
    scratch, old = _sibling(output, "tmp"), _sibling(output, "old")
    try:
        scratch.mkdir(parents=True)
        yield scratch
        for path in (*sorted(scratch.iterdir()), scratch):
            sync(path)
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
        full = f"the disk is full: {os.strerror(number)}" if number in DISK_FULL else str(cause)
        raise error(
            f"{output} was not written, {full}. It had grown to {written / 1e6:,.1f} MB, which are removed again; what "
            f"was there before is untouched. {free / 1e6:,.1f} MB are free on its file system (a quota or ulimit -f "
            "may allow less): make room, or choose an output elsewhere"
        ) from cause
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def sync(path: Path) -> None:
    """Waits until the file or directory is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
        stem = f"{output.name}.{role}-{socket.gethostname()}-"
        for path in output.parent.glob("*") if output.parent.is_dir() else ():
            pid = path.name.removeprefix(stem)
            if not path.name.startswith(stem) or not pid.isdecimal() or (_alive(int(pid)) and int(pid) != os.getpid()):
                continue
            if role == "old" and not output.exists():  # killed between the two renames: the old one is the output
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
