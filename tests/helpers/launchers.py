"""Launchers as processes, with all that they start: torchrun gives its ranks sessions of their own."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType

from tests.helpers.runs import OPTIONS, ROOT

BIN = Path(sys.executable).parent
# DeepSpeed takes seconds to look for accelerators, and to load a compiler that is not used.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "TORCHDYNAMO_DISABLE": "1", "TQDM_DISABLE": "1"}
LAUNCHED_BY = ("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "MASTER_", "TORCHELASTIC", "SLURM_")


def train_words(dataset: Path, run_dir: Path, *overrides: str) -> list[str]:
    return [*OPTIONS, f"data.path={dataset}", f"run_dir={run_dir}", *overrides]


class Launched(AbstractContextManager["Launched"]):
    """A command and its descendants, told by a variable in their environment; what is left at the end is killed."""

    def __init__(self, words: Sequence[object], log: Path, environ: Mapping[str, str] | None = None) -> None:
        self.log, self.mark = log, uuid.uuid4().hex
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(LAUNCHED_BY)}
        with log.open("w") as file:
            self.process = subprocess.Popen(
                [str(word) for word in words],
                cwd=ROOT,
                env={**inherited, **ENVIRONMENT, **(environ or {}), "TEST_MARK": self.mark},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
            )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while left := self._environments():  # what is killed may have started something meanwhile
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)
        self.process.wait()

    @property
    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def wait(self, timeout_s: float = 120) -> int:
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self.process.args} still runs after {timeout_s} s\n{self.said[-3000:]}") from None

    def until(self, reached: Callable[[], bool], timeout_s: float = 120) -> None:
        deadline = time.monotonic() + timeout_s
        while not reached():
            assert self.process.poll() is None, f"ended with {self.process.returncode}\n{self.said[-3000:]}"
            assert time.monotonic() < deadline, self.said[-3000:]
            time.sleep(0.1)

    def ranks(self) -> dict[int, int]:
        """Process numbers by rank."""
        return {
            int(environ["RANK"]): pid
            for pid, environ in self._environments().items()
            if "RANK" in environ and b"launch" in Path(f"/proc/{pid}/cmdline").read_bytes()
        }

    def _environments(self) -> dict[int, dict[str, str]]:
        found = {}
        for path in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):  # it has ended meanwhile
                environ = dict(
                    entry.split("=", 1) for entry in path.read_text(errors="replace").split("\0") if "=" in entry
                )
                if environ.get("TEST_MARK") == self.mark:
                    found[int(path.parent.name)] = environ
        return found
