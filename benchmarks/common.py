"""What every benchmark does alike: take turns, summarise, hold against goals, tell.

Alternatives run A B A B ..., so that a machine that slows down slows all of them. A ratio is the median of the rounds'
own ratios, for the same reason. A goal that has no figure, because a peer failed or a value is not finite, is missed.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import machine, versions
from mamba_pretrain.ops import dispatch
from mamba_pretrain.ops.call import KernelError
from mamba_pretrain.ops.dispatch import CHOICES

AT_MOST, AT_LEAST = "at most", "at least"


@dataclass(frozen=True)
class Task:
    """One alternative. `prepare` is not timed; what it returns is handed to `run`.

    A `run` that returns a number has measured its own seconds (another process did the work).
    """

    run: Callable[[Any], float | None]
    prepare: Callable[[], Any] = lambda: None


Seconds = dict[str, list[float]]  # by alternative, one number a round


def take_turns(tasks: Mapping[str, Task], rounds: int, warmup: int = 1) -> Seconds:
    """Runs all tasks once in each round, in their order. The first `warmup` rounds are not kept."""
    seconds: Seconds = {name: [] for name in tasks}
    for count in range(warmup + rounds):
        for name, task in tasks.items():
            prepared = task.prepare()
            began = time.perf_counter()
            own = task.run(prepared)
            elapsed = time.perf_counter() - began if own is None else own
            del prepared
            if count >= warmup:
                seconds[name].append(elapsed)
    return seconds


@dataclass(frozen=True)
class Figure:
    """A measured number: the median of `samples` values between `low` and `high`."""

    value: float
    unit: str
    low: float
    high: float
    samples: int

    @classmethod
    def of(cls, values: Sequence[float], unit: str) -> Figure:
        """NaN for no values: a goal on it is missed."""
        if not values:
            return cls(math.nan, unit, math.nan, math.nan, 0)
        return cls(statistics.median(values), unit, min(values), max(values), len(values))

    def __str__(self) -> str:
        if not math.isfinite(self.value):
            return "no figure"
        spread = f" ({_short(self.low)} to {_short(self.high)})" if self.samples > 1 else ""
        return f"{_short(self.value)} {self.unit}{spread}".strip()


def ratio(above: Sequence[float], below: Sequence[float]) -> Figure:
    """The median of the ratios in each round that has both."""
    return Figure.of([a / b for a, b in zip(above, below, strict=False)], "x")


def rates(count: int, seconds: Sequence[float]) -> Figure:
    return Figure.of([count / s for s in seconds], "/s")


def _short(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


@dataclass(frozen=True)
class Goal:
    name: str  # the figure it is about
    value: float | None
    limit: float
    direction: str  # AT_MOST or AT_LEAST

    @property
    def holds(self) -> bool:
        if self.value is None or not math.isfinite(self.value):
            return False
        return self.value <= self.limit if self.direction == AT_MOST else self.value >= self.limit

    def __str__(self) -> str:
        value = "no figure" if self.value is None or not math.isfinite(self.value) else _short(self.value)
        return f"{self.name} is {value}, to be {self.direction} {_short(self.limit)}"


@dataclass
class Report:
    """The figures of one benchmark by name, what the table shows of them, and the goals."""

    benchmark: str
    options: dict[str, Any]
    figures: dict[str, Figure] = field(default_factory=dict)
    goals: list[Goal] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)
    columns: list[str] = field(default_factory=list)

    def add(self, name: str, figure: Figure) -> Figure:
        assert name not in self.figures, f"two figures named {name}"
        self.figures[name] = figure
        return figure

    def goal(self, name: str, direction: str, limit: float) -> None:
        """Asks of the figure `name` that it be at most or at least `limit`; a figure that is not there misses it."""
        figure = self.figures.get(name)
        self.goals.append(Goal(name, None if figure is None else figure.value, limit, direction))

    def row(self, *cells: object) -> None:
        self.rows.append([str(cell) for cell in cells])

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def as_json(self) -> dict[str, Any]:
        """Strict JSON: what is not finite is null."""
        return {
            "benchmark": self.benchmark,
            "options": self.options,
            "figures": {name: _finite(asdict(figure)) for name, figure in self.figures.items()},
            "goals": [_finite(asdict(goal)) | {"holds": goal.holds} for goal in self.goals],
            "kernels": sorted(KERNELS),
            "notes": self.notes,
            "machine": machine(),
            "versions": versions(),
            "commit": commit(),
        }

    def as_markdown(self) -> str:
        lines = [f"## {self.benchmark}", "", _line(self.columns), _line("---" for _ in self.columns)]
        lines += [_line(row) for row in self.rows]
        if self.goals:
            lines += ["", "Goals:", ""]
            lines += [f"- {'holds' if goal.holds else 'MISSED'}: {goal}" for goal in self.goals]
        if remarks := [*self.notes, *sorted(KERNELS), _told(machine(), versions(), commit())]:
            lines += ["", *(f"- {text}" for text in remarks)]
        return "\n".join(lines)


def _line(cells: Any) -> str:
    return "| " + " | ".join(cells) + " |"


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


def _told(machine: dict[str, Any], versions: dict[str, str], commit: str) -> str:
    packages = ", ".join(f"{name} {version}" for name, version in versions.items())
    return (
        f"{machine['cpu']}, {machine['threads']} threads of {machine['cores']} cores, load {machine['load_1min']}; "
        f"{packages}; commit {commit}"
    )


def commit() -> str:
    """The checkout's commit, with a + where tracked files differ from it."""
    root = Path(__file__).parent

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


# Which kernels ran, and why not faster ones: as the ops say it once for each decision, here and in workers.
KERNELS: set[str] = set()


class _Listen(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        if re.match(r"\w+ on \w+: ", line := record.getMessage()):
            KERNELS.add(line)


def listen() -> None:
    """From now on KERNELS holds what the ops say about their backends."""
    logger = logging.getLogger("mamba_pretrain")
    if not any(isinstance(handler, _Listen) for handler in logger.handlers):
        logger.addHandler(_Listen())
        logger.setLevel(logging.INFO)


def arguments(name: str, doc: str, *, rounds: int) -> argparse.ArgumentParser:
    """The options of every benchmark; `doc` is the script's docstring."""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}", description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write figures, goals, machine, versions and commit")
    parser.add_argument("--check", action="store_true", help="exit 1 and name the goals that were missed")
    parser.add_argument(
        "--rounds", type=int, default=rounds, help="how often the alternatives take turns (%(default)s)"
    )
    parser.add_argument(
        "--kernels", choices=CHOICES, default=dispatch.selected(), help="backend of our ops (%(default)s)"
    )
    parser.add_argument("--threads", type=int, default=None, help="of torch, on both sides (default: torch's own)")
    return parser


def begin(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> tuple[argparse.Namespace, Report]:
    """Parses, selects kernels and threads, and begins a report that is named after the script."""
    options = parser.parse_args(argv)
    if options.rounds < 1:
        parser.error(f"--rounds is {options.rounds}: it must be 1 or more")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    options.threads = torch.get_num_threads()
    try:
        dispatch.select(options.kernels)
    except KernelError as error:
        parser.error(str(error))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)  # now, and not after the work is done
    listen()
    KERNELS.clear()
    given = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
    return options, Report(parser.prog.rpartition(".")[2], given)


def finish(report: Report, options: argparse.Namespace) -> int:
    """Prints the table, writes the JSON; the exit code: 1 if --check was given and a goal is missed."""
    print(report.as_markdown(), flush=True)
    if options.json:
        options.json.write_text(json.dumps(report.as_json(), indent=2, allow_nan=False) + "\n")
    missed = [goal for goal in report.goals if not goal.holds]
    if options.check:
        for goal in missed:
            print(f"{report.benchmark}: missed: {goal}", file=sys.stderr)
    return 1 if options.check and missed else 0
