"""Worker processes that may die: whose task it was is known, another takes the place, and the rest goes on.

The standard pools do not offer this: a worker that the system kills breaks concurrent.futures' pool for all, and
multiprocessing.Pool waits for its result forever.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import traceback
from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass
from multiprocessing import connection, get_context, parent_process
from multiprocessing.context import SpawnProcess
from typing import Any, Final

SPAWN: Final = get_context("spawn")  # a fork would share the tokenizer libraries' threads and locks
END_S: Final = 5.0  # what a worker gets to end before it is killed
STARTS: Final = 3  # failed ones in a row, after which it is no accident

Work = Callable[[Any, Callable[[Any], None]], Any]  # (task, report) -> result; report(value) tells how far it is


@dataclass(frozen=True)
class Failure:
    """A task whose worker died, or raised what it should have caught."""

    reason: str
    died: bool = True


@dataclass
class _Worker:
    process: SpawnProcess
    pipe: connection.Connection
    task: Any = None
    ready: bool = False


class WorkerError(RuntimeError):
    """Workers do not come up at all."""


def run(
    tasks: deque[Any],
    processes: int,
    setup: Callable[..., Work],
    arguments: tuple[Any, ...],
    report: Callable[[Any, Any], None],
) -> Generator[tuple[Any, Any]]:
    """(task, result or Failure) as they end, of tasks done by `setup(*arguments)` in each of `processes` workers.

    The caller may append to `tasks` while it iterates. `report(task, value)` is called for what a worker reports. Ends
    the workers when it is closed; they end by themselves when this process is gone.
    """
    workers = [_start(setup, arguments) for _ in range(processes)]
    failed_starts = 0
    try:
        while tasks or any(worker.task is not None for worker in workers):
            for worker in workers:
                if tasks and worker.ready and worker.task is None:
                    with contextlib.suppress(BrokenPipeError):  # it died idle: another one gets the task
                        worker.pipe.send(tasks[0])
                        worker.task = tasks.popleft()
            waiting = connection.wait([item for w in workers for item in (w.pipe, w.process.sentinel)], timeout=1.0)
            for i, worker in enumerate(workers):
                if worker.pipe not in waiting and worker.process.sentinel not in waiting:
                    continue
                try:
                    while worker.pipe.poll():
                        kind, value = worker.pipe.recv()
                        if kind == "report":
                            report(worker.task, value)
                            continue
                        task, worker.task, worker.ready, failed_starts = worker.task, None, True, 0
                        if kind == "done":
                            yield task, value
                except (EOFError, OSError):
                    worker.process.join()
                    failed_starts += not worker.ready
                    if failed_starts == STARTS:
                        message = f"{STARTS} workers did not start; the last {_end_of(worker.process)}"
                        raise WorkerError(message) from None
                    workers[i] = _start(setup, arguments)
                    worker.pipe.close()
                    if worker.task is not None:
                        yield worker.task, Failure(f"the worker process {_end_of(worker.process)}")
    finally:
        for worker in workers:
            worker.process.terminate()
        for worker in workers:
            worker.process.join(END_S)
            worker.process.kill()


def _start(setup: Callable[..., Work], arguments: tuple[Any, ...]) -> _Worker:
    ours, theirs = SPAWN.Pipe()
    process = SPAWN.Process(target=_serve, args=(theirs, setup, arguments), daemon=True)
    # Ctrl-C goes to every process of the terminal. The parent alone answers it: a worker inherits the blocked signal.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    theirs.close()  # so that the worker's death closes the pipe
    return _Worker(process, ours)


def _end_of(process: SpawnProcess) -> str:
    code = process.exitcode or 0
    if code >= 0:
        return f"ended with exit code {code}"
    name = signal.Signals(-code).name
    return f"was ended by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")


def _serve(pipe: connection.Connection, setup: Callable[..., Work], arguments: tuple[Any, ...]) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    work = setup(*arguments)
    with contextlib.suppress(EOFError, ConnectionError):  # the parent is gone
        pipe.send(("ready", None))
        while True:
            task = pipe.recv()
            try:
                result = work(task, lambda value: pipe.send(("report", value)))
            except Exception:
                result = Failure(f"unexpected error:\n{traceback.format_exc()}", died=False)
            pipe.send(("done", result))


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)
