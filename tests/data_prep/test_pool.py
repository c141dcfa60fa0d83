"""Workers die one at a time, by name, and never outlive their parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import deque
from pathlib import Path

import pytest

from data_prep import pool
from tests.helpers import workers

ROOT = Path(__file__).parents[2]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_worker_that_dies_fails_its_task_alone_and_is_replaced() -> None:
    reports: list[tuple[str, str]] = []
    tasks = deque(["die", "a", "raise", "b", "exit", "c"])
    results = dict(pool.run(tasks, 2, workers.setup, (), lambda *report: reports.append(report)))
    assert {task: results[task] for task in "abc"} == {"a": "A", "b": "B", "c": "C"}
    assert results["die"].reason == "the worker process was ended by SIGKILL (out of memory?)"
    assert results["exit"].reason == "the worker process ended with exit code 3"
    assert "unexpected error" in results["raise"].reason and "unforeseen" in results["raise"].reason
    assert sorted(reports) == sorted((task, f"began {task}") for task in ("die", "a", "raise", "b", "exit", "c"))


def test_workers_that_never_start_are_an_error() -> None:
    with pytest.raises(pool.WorkerError, match="3 workers did not start; the last ended with exit code 1"):
        list(pool.run(deque(["a"]), 1, workers.setup_that_fails, (), lambda *_: None))


def test_closing_ends_workers_at_once(tmp_path: Path) -> None:
    running = pool.run(deque(["a", "sleep", "sleep"]), 2, workers.setup, (tmp_path,), lambda *_: None)
    assert next(running) == ("a", "A")
    began = time.monotonic()
    running.close()
    assert time.monotonic() - began < 5
    pids = [int(path.name) for path in tmp_path.iterdir()]
    assert pids and not any(map(alive, pids))


def test_workers_end_when_their_parent_is_killed(tmp_path: Path) -> None:
    code = (
        "import sys; from collections import deque; from pathlib import Path; from data_prep import pool;"
        "from tests.helpers import workers;"
        "list(pool.run(deque(['sleep'] * 2), 2, workers.setup, (Path(sys.argv[1]),), lambda *_: None))"
    )
    parent = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT)
    deadline = time.monotonic() + 60
    while len(list(tmp_path.iterdir())) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    pids = [int(path.name) for path in tmp_path.iterdir()]
    assert len(pids) == 2
    time.sleep(0.2)  # into their tasks
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    deadline = time.monotonic() + 20
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(map(alive, pids))
