"""A thread beside the training: ends a run that hangs, with everyone's stacks, and one whose launcher is gone."""

from __future__ import annotations

import faulthandler
import multiprocessing
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

DEEPSPEED_LAUNCH = "deepspeed.launcher.launch"
LAUNCHERS = {"torchrun", "torch.distributed.run", "torch.distributed.launch", "launch.torchrun", DEEPSPEED_LAUNCH}
INTERVAL_S = 0.5
GRACE_S = 4  # for the other ranks to dump theirs, before they lose contact with this one
SLOWLY = 8  # times hang_minutes: reading and writing checkpoints may take long


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
        self._last, self._allowed_s = time.monotonic(), self.hang_s
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
        if self._thread.is_alive():
            self._thread.join()
        faulthandler.cancel_dump_traceback_later()

    def beat(self, patience: float = 1) -> None:
        """Says that the run goes on, and that the next beat will come within `patience` times hang_minutes."""
        self._last, self._allowed_s = time.monotonic(), patience * self.hang_s
        if self.hang_s and self.ranks.world > 1:
            faulthandler.dump_traceback_later((patience + 0.5) * self.hang_s + 10, exit=True)

    def _run(self) -> None:
        while not self._ended.wait(INTERVAL_S):
            if self.hang_s and time.monotonic() - self._last > self._allowed_s:
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
            f"{who} has not got on for {self._allowed_s:g} s, so the run ends. The stacks of its threads, also in "
            f"{path} (the rank to look at is the one that does not wait for the others):",
            file=sys.stderr,
            flush=True,
        )
        faulthandler.dump_traceback()
        time.sleep(GRACE_S)
        for child in multiprocessing.active_children():  # which may hang themselves, and would hold ports and pipes
            child.kill()
        os._exit(EXIT_HUNG)


def launchers(parent: int) -> list[tuple[int, int]]:
    """Processes with their parents; another parent means that the launcher is gone.

    This process, and the launch.py between it and the deepspeed CLI. None where neither torchrun nor that CLI started
    it: a run that somebody put into the background must outlive their shell.
    """
    program = _program(parent)
    if program not in LAUNCHERS:
        return []
    found = [(os.getpid(), parent)]
    if program == DEEPSPEED_LAUNCH and (grandparent := parent_of(parent)) is not None:
        found.append((parent, grandparent))
    return found


def parent_of(pid: int) -> int | None:
    try:
        # The name in parentheses may hold anything; what follows it does not.
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, ValueError, IndexError):
        return None


def _program(pid: int) -> str:
    """The module or script that a process runs: NAME of `python -m NAME`, `python .../NAME`, `.../NAME`."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    except OSError:
        return ""
    while len(words) > 1 and (words[0].startswith("-") or Path(words[0]).name.startswith("python")):
        if words.pop(0) == "-m":
            return words[0]
    return Path(words[0]).name
