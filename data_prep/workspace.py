"""The directory `OUTPUT.part`, in which work that may be interrupted keeps what it has until OUTPUT appears, whole."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from mamba_pretrain.files import sync

LOCK: Final = "lock"


@contextlib.contextmanager
def workspace(output: Path, error: type[ValueError]) -> Iterator[Path]:
    """`OUTPUT.part`, held by this process alone; what is in it stays if the block fails, and goes if it ends well.

    Raises `error` where another process on this or, if the file system locks files across hosts, any host holds it, and
    where `output` exists.
    """
    part = _part_of(output)
    if part.exists() and any(part.iterdir()) and not (part / LOCK).exists():
        raise error(f"{part}, where work on {output} would be kept, holds something else: move it away")
    part.mkdir(parents=True, exist_ok=True)
    with (part / LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as cause:
            raise error(
                f"another process is making {output} and holds {part}: wait for it, or choose another output"
            ) from cause
        try:
            if output.exists():
                raise error(f"{output} exists: choose another output, or remove it first")
            yield part
            shutil.rmtree(part)
        finally:
            if part.exists() and os.listdir(part) == [LOCK]:  # nothing to go on with
                shutil.rmtree(part)


def _part_of(output: Path) -> Path:
    return output.with_name(output.name + ".part")


def sweep(output: Path) -> None:
    """Removes `OUTPUT.part` beside an output that is complete: a process was killed after it had revealed that.

    Where it is in use, another process removes it, or it is not ours to remove, it stays: the output is none the worse.
    """
    part = _part_of(output)
    with contextlib.suppress(OSError), (part / LOCK).open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(part)


def reveal(result: Path, output: Path) -> None:
    """Renames the finished directory `result` to `output`, once it is on disk."""
    for path in (*(path for path in sorted(result.rglob("*")) if not path.is_symlink()), result):
        sync(path)
    result.rename(output)
    sync(output.parent)
