"""What pool workers do in tests: functions that a spawned process can import."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def setup(started: Path | None = None) -> Callable[[Any, Callable[[Any], None]], Any]:
    if started is not None:
        (started / str(os.getpid())).touch()
    return work


def setup_that_fails() -> Callable[[Any, Callable[[Any], None]], Any]:
    raise MemoryError("no room")


def work(task: str, report: Callable[[Any], None]) -> str:
    report(f"began {task}")
    if task == "raise":
        raise KeyError("unforeseen")
    if task == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if task == "exit":
        os._exit(3)
    if task == "sleep":
        time.sleep(60)
    return task.upper()
