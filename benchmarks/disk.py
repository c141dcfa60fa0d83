"""dd on the disk that checkpoints are written to: the measure of what that disk gives."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

BLOCK = 1 << 24


def make_source(path: Path, size: int) -> None:
    """A file of `size` bytes that do not compress, left in the system's cache: reading it is not what is timed."""
    block = os.urandom(min(BLOCK, size))
    with path.open("wb") as file:
        for at in range(0, size, len(block)):
            file.write(block[: size - at])
        file.flush()
        os.fsync(file.fileno())


def write(source: Path, target: Path) -> float:
    """Seconds of dd, until the bytes are on disk."""
    target.unlink(missing_ok=True)
    return _dd(f"if={source}", f"of={target}", "conv=fsync")


def read(source: Path) -> float:
    return _dd(f"if={source}", "of=/dev/null")


def evict(*paths: Path) -> bool:
    """Takes files (or what directories hold) out of the system's cache; whether the system can be asked to.

    Pages that a process has mapped stay.
    """
    if not hasattr(os, "posix_fadvise"):
        return False
    for path in (file for given in paths for file in (given.iterdir() if given.is_dir() else [given])):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)  # a page that is not on disk yet stays, too
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
    return True


def _dd(*words: str) -> float:
    began = time.perf_counter()
    subprocess.run(["dd", "bs=16M", *words], check=True, capture_output=True)
    return time.perf_counter() - began
