"""The harness: alternatives take turns, goals decide the exit code, the JSON holds what is promised."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from benchmarks import common
from benchmarks.common import AT_LEAST, AT_MOST, Figure, Goal, Report, Task, arguments, begin, finish, ratio, take_turns
from benchmarks.worker import Worker, WorkerError


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ops' log is left as it is for the tests after these."""
    monkeypatch.setattr(common, "listen", lambda: None)


def report_with(argv: list[str], value: float, limit: float = 2.0) -> int:
    options, report = begin(arguments("example", "An example.", rounds=3), argv)
    report.columns = ["what", "how long"]
    report.row("ours", report.add("ours / peer", Figure.of([value], "x")))
    report.goal("ours / peer", AT_MOST, limit)
    return finish(report, options)


def test_alternatives_take_turns_and_warm_up_is_not_kept() -> None:
    order: list[str] = []
    tasks = {name: Task(lambda _, n=name: order.append(n)) for name in "AB"}
    seconds = take_turns(tasks, rounds=3, warmup=2)
    assert order == list("AB" * 5)
    assert {name: len(values) for name, values in seconds.items()} == {"A": 3, "B": 3}


def test_preparation_is_not_timed_and_is_handed_to_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(common.time, "perf_counter", lambda: clock[0])

    def spend(seconds: float) -> float:
        clock[0] += seconds
        return seconds

    def run(prepared: float) -> None:
        assert prepared == 100
        spend(1)

    assert take_turns({"A": Task(run, lambda: spend(100))}, rounds=2) == {"A": [1.0, 1.0]}


def test_a_run_that_timed_itself_is_believed() -> None:
    assert take_turns({"A": Task(lambda _: 42.0)}, rounds=1) == {"A": [42.0]}


def test_a_ratio_compares_within_rounds() -> None:
    """A machine that slows down tenfold between rounds does not change it."""
    assert ratio([1.0, 10.0, 100.0], [2.0, 20.0, 200.0]) == Figure(0.5, "x", 0.5, 0.5, 3)


@pytest.mark.parametrize(
    ("value", "direction", "holds"),
    [
        (2.0, AT_MOST, True),
        (2.1, AT_MOST, False),
        (2.0, AT_LEAST, True),
        (1.9, AT_LEAST, False),
        (None, AT_MOST, False),
        (None, AT_LEAST, False),
        (math.nan, AT_MOST, False),
        (math.nan, AT_LEAST, False),
        (math.inf, AT_LEAST, False),
        (-math.inf, AT_MOST, False),
    ],
)
def test_a_goal_holds_only_for_a_finite_value_on_the_right_side(value: Any, direction: str, holds: bool) -> None:
    assert Goal("figure", value, 2.0, direction).holds is holds


@pytest.mark.parametrize("values", [[], [math.nan]])
def test_a_figure_that_was_not_measured_misses_its_goal(values: list[float]) -> None:
    report = Report("example", {})
    report.add("measured", Figure.of(values, "x"))
    report.goal("measured", AT_MOST, 1.0)
    report.goal("never added", AT_LEAST, 1.0)
    assert [goal.holds for goal in report.goals] == [False, False]
    assert "no figure" in report.as_markdown()


def test_check_turns_a_missed_goal_into_exit_code_1_and_names_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert report_with(["--check"], value=3.0) == 1
    captured = capsys.readouterr()
    assert "example: missed: ours / peer is 3, to be at most 2" in captured.err
    assert "| ours | 3 x |" in captured.out
    assert report_with(["--check"], value=math.nan) == 1


def test_the_exit_code_is_0_when_all_goals_hold_or_nobody_asked() -> None:
    assert report_with(["--check"], value=1.0) == 0
    assert report_with([], value=3.0) == 0


def test_json_holds_figures_goals_machine_versions_and_commit(tmp_path: Path) -> None:
    target = tmp_path / "new" / "example.json"
    report_with(["--json", str(target), "--rounds", "5"], value=math.nan)
    told = json.loads(target.read_text())
    assert told["benchmark"] == "example"
    assert told["options"]["rounds"] == 5
    assert told["figures"]["ours / peer"] == {"value": None, "unit": "x", "low": None, "high": None, "samples": 1}
    assert told["goals"] == [
        {"name": "ours / peer", "value": None, "limit": 2.0, "direction": "at most", "holds": False}
    ]
    assert told["machine"]["threads"] >= 1 and told["machine"]["cpu"]
    assert told["versions"]["torch"] and told["versions"]["transformers"]
    assert told["commit"]


class Subject:
    """What a worker is asked to do in the tests below."""

    def __init__(self, mib: int) -> None:
        self.mib = mib

    def hold(self) -> int:
        return len(bytearray(self.mib * 2**20))

    def fail(self) -> None:
        raise ValueError("this is why")

    def leave(self) -> None:
        raise SystemExit(3)

    def sleep(self) -> None:
        common.time.sleep(60)

    def chat(self) -> str:
        print("{}")
        return "said"


SUBJECT = "tests.benchmarks.test_common:Subject"


@pytest.mark.slow
def test_a_worker_reports_the_memory_of_each_call_alone() -> None:
    with Worker(SUBJECT, {"mib": 64}) as worker:
        answer = worker.call("hold")
        assert answer.result == 64 * 2**20
        assert 60 < answer.above_mib < 80
        assert worker.call("chat").result == "said"  # and what is printed there does not stand between the answers
        assert worker.call("chat").above_mib < 20  # the peak of the earlier call is forgotten


@pytest.mark.slow
def test_a_worker_that_fails_says_why() -> None:
    with Worker(SUBJECT, {"mib": 1}) as worker:
        with pytest.raises(WorkerError, match="this is why"):
            worker.call("fail")
        assert worker.call("chat").result == "said"
        with pytest.raises(WorkerError, match="died with 3"):
            worker.call("leave")


@pytest.mark.slow
def test_a_worker_that_takes_too_long_is_ended() -> None:
    with Worker(SUBJECT, {"mib": 1}) as worker, pytest.raises(WorkerError, match="more than 1 s"):
        worker.limit_s = 1
        worker.call("sleep")


@pytest.mark.slow
def test_a_worker_over_its_memory_fails_alone() -> None:
    with Worker(SUBJECT, {"mib": 4096}, memory_gib=2) as worker, pytest.raises(WorkerError, match="MemoryError"):
        worker.call("hold")
