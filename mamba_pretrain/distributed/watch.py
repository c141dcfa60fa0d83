"""A thread beside the training: ends a run that hangs, with everyone's stacks, and one whose launcher is gone."""

from __future__ import annotations

import faulthandler
import os
import socket
import sys
import threading
import time
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType

from mamba_pretrain.distributed.env import EXIT_HUNG, Preemption
from mamba_pretrain.distributed.ranks import Ranks

LAUNCHERS = ("torchrun", "torch.distributed", "deepspeed", "launch.torchrun")
DEEPSPEED_LAUNCH = "deepspeed.launcher.launch"
INTERVAL_S = 0.5


class Watch(AbstractContextManager["Watch"]):
    """For ranks of several; alone, nothing is watched.

    When one rank hangs, all others wait for it in some exchange: every rank finds after `hang_minutes` without a beat
    that nothing goes on, writes the stacks of all its threads to standard error and to RUN_DIR/stacks/rank_N.txt, and
    ends with EXIT_HUNG. Should Python itself be stuck, faulthandler's own thread does the same somewhat later.

    The deepspeed CLI dies of a signal and leaves its launch.py and the ranks behind, training on; a torchrun that is
    killed leaves the ranks. A rank that sees its launcher gone asks for a stop, which saves.
    """

    def __init__(self, ranks: Ranks, hang_minutes: float, run_dir: Path, preemption: Preemption) -> None:
        self.ranks, self.hang_s, self.run_dir, self.preemption = ranks, 60 * hang_minutes, run_dir, preemption
        self._last = time.monotonic()
        self._ended = threading.Event()
        self._launchers = launchers(os.getppid()) if ranks.world > 1 else []
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def __enter__(self) -> Watch:
        if self.ranks.world > 1:
            self.beat()
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        faulthandler.cancel_dump_traceback_later()

    def beat(self) -> None:
        """Says that the run goes on."""
        self._last = time.monotonic()
        if self.hang_s and self.ranks.world > 1:
            faulthandler.dump_traceback_later(1.5 * self.hang_s + 10, exit=True)

    def _run(self) -> None:
        while not self._ended.wait(INTERVAL_S):
            if self.hang_s and time.monotonic() - self._last > self.hang_s:
                self._end_hung()
            if self._launchers and any(parent_of(pid) != parent for pid, parent in self._launchers):
                self.preemption.request("the launcher is gone")
                self._launchers = []

    def _end_hung(self) -> None:
        who = f"rank {self.ranks.rank} of {self.ranks.world} (process {os.getpid()} on {socket.gethostname()})"
        path = self.run_dir / "stacks" / f"rank_{self.ranks.rank}.txt"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("w") as file:
                file.write(f"{who}\n")
                file.flush()
                faulthandler.dump_traceback(file)
        except OSError as error:
            path = Path(f"nowhere ({error})")
        print(
            f"{who} has not got on for {self.hang_s:g} s, so the run ends. The stacks of its threads, also in {path} "
            "(the rank to look at is the one that does not wait for the others):",
            file=sys.stderr,
            flush=True,
        )
        faulthandler.dump_traceback()
        os._exit(EXIT_HUNG)


def launchers(parent: int) -> list[tuple[int, int]]:
    """Processes with their parents; another parent means that the launcher is gone.

    This process, and the launch.py between it and the deepspeed CLI. None where neither torchrun nor that CLI started
    it: a run that somebody put into the background must outlive their shell.
    """
    command = _command(parent)
    if not any(name in command for name in LAUNCHERS):
        return []
    found = [(os.getpid(), parent)]
    if DEEPSPEED_LAUNCH in command and (grandparent := parent_of(parent)) is not None:
        found.append((parent, grandparent))
    return found


def parent_of(pid: int) -> int | None:
    try:
        # The name in parentheses may hold anything; what follows it does not.
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, ValueError, IndexError):
        return None


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except OSError:
        return ""
