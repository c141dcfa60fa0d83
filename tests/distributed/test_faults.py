"""What goes wrong in a run of several ranks, and how the run ends or goes on."""

from __future__ import annotations

import ctypes
import json
import logging
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mamba_pretrain import build, checkpoint, train
from mamba_pretrain.cli import main
from mamba_pretrain.config import ConfigError
from mamba_pretrain.distributed.engine import MODEL
from mamba_pretrain.distributed.env import EXIT_HUNG, EXIT_PREEMPTED
from mamba_pretrain.distributed.ranks import PeerError
from mamba_pretrain.distributed.watch import launchers
from mamba_pretrain.metrics import Sinks
from tests.helpers.engines import CURVE, ENGINES, alone, relative
from tests.helpers.engines import train as train_curve
from tests.helpers.marks import slow_but
from tests.helpers.processes import exit_codes, in_processes, on_ranks
from tests.helpers.runs import OPTIONS, losses, records, small_config

FSDP = ["train.engine=fsdp", "train.steps=8", "checkpoint.every_steps=4"]


def words(dataset: Path, run_dir: Path, *overrides: str) -> list[str]:
    return ["train", *OPTIONS, *CURVE, *FSDP, f"data.path={dataset}", f"run_dir={run_dir}", *overrides]


def at_step(step: int, action: Callable[[], Any]) -> None:
    """Has this process do something at the end of a step."""
    original = train.steps

    def steps(run: Any) -> Any:
        for done in original(run):
            if run.state.step == step:
                action()
            yield done

    train.steps = steps


def rank() -> int:
    return int(os.environ["RANK"])


@pytest.mark.parametrize(
    ("name", "number"),
    slow_but(
        [("fsdp-2", signal.SIGTERM)],
        [("fsdp-2", signal.SIGTERM), ("fsdp-2", signal.SIGINT), ("fsdp-2", signal.SIGUSR1), ("zero-3", signal.SIGTERM)],
    ),
)
def test_a_signal_to_any_one_rank_stops_all_after_the_same_saved_step(
    name: str, number: signal.Signals, dataset: Path, tmp_path: Path
) -> None:
    def work() -> int:
        torch.set_num_threads(1)
        if rank() == 1:
            at_step(3, lambda: os.kill(os.getpid(), number))
        return main(words(dataset, tmp_path, *ENGINES[name][1], "train.steps=8"))

    assert exit_codes(2, work) == [EXIT_PREEMPTED, EXIT_PREEMPTED]
    saved = checkpoint.checkpoints(tmp_path / "checkpoints")
    assert [path.name for path in saved] == ["step_00000003"]
    outcome = json.loads((tmp_path / "outcome.json").read_text())
    assert (outcome["outcome"], outcome["step"], outcome["why"]) == ("preempted", 3, f"{number.name} on rank 1")
    assert in_processes(2, main, words(dataset, tmp_path, *ENGINES[name][1], "train.steps=8", "--resume=auto")) == [
        0,
        0,
    ]
    expected = alone(dataset, tmp_path / "alone", "train.steps=8").losses
    assert [losses(tmp_path)[step] for step in range(1, 9)] == pytest.approx(expected, rel=1e-5)
    assert json.loads((tmp_path / "outcome.json").read_text())["outcome"] == "finished"


def test_signals_while_the_ranks_take_their_leave_do_not_change_how_the_run_ends(dataset: Path, tmp_path: Path) -> None:
    """Rank 0's sinks take a second to close, and the others wait for it."""

    def again() -> None:
        while not (tmp_path / "outcome.json").exists():
            time.sleep(0.01)
        while True:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.02)

    def work() -> int:
        torch.set_num_threads(1)
        close = Sinks.close

        def slowly(sinks: Sinks) -> None:
            time.sleep(1)
            close(sinks)

        if rank() == 0:
            setattr(Sinks, "close", slowly)  # noqa: B010 - mypy refuses to assign a method
        at_step(3, lambda: os.kill(os.getpid(), signal.SIGTERM))
        threading.Thread(target=again, daemon=True).start()
        return main(words(dataset, tmp_path, *ENGINES["fsdp-2"][1], "train.steps=8"))

    assert exit_codes(2, work) == [EXIT_PREEMPTED, EXIT_PREEMPTED]
    assert json.loads((tmp_path / "outcome.json").read_text())["outcome"] == "preempted"


@pytest.mark.parametrize("name", slow_but(["fsdp-2"], ["fsdp-2", "hsdp-2x2", "zero-1", "zero-2", "zero-3"]))
def test_a_loss_that_is_not_finite_on_one_rank_skips_the_same_step_on_all(
    name: str, dataset: Path, tmp_path: Path
) -> None:
    world, options = ENGINES[name]
    options = [*options, "train.steps=6"]

    def poisoned(culprit: int) -> Callable[[], None]:
        calls = [0]
        original = train._loss_sum

        def loss_sum(run: Any, batch: Any) -> torch.Tensor:
            calls[0] += 1
            loss = original(run, batch)
            accumulation = run.config.accumulation(run.ranks.world)
            return loss * math.nan if run.ranks.rank == culprit and calls[0] == 2 * accumulation + 1 else loss

        return lambda: setattr(train, "_loss_sum", loss_sum)

    def work(ranks: Any) -> Any:
        poisoned(world - 1)()
        return train_curve(ranks, dataset, tmp_path / "ranks", *options)

    curves = on_ranks(world, work)
    before = train._loss_sum
    poisoned(0)()
    try:
        expected = alone(dataset, tmp_path / "alone", "train.steps=6")
    finally:
        train._loss_sum = before
    assert expected.skipped == [3]
    for curve in curves:
        assert curve.skipped == [3]
        assert [loss for step, loss in enumerate(curve.losses, 1) if step != 3] == pytest.approx(
            [loss for step, loss in enumerate(expected.losses, 1) if step != 3], rel=1e-5
        )
        assert all(relative(curve.weights[key], whole) < 1e-5 for key, whole in expected.weights.items())


@pytest.mark.slow
def test_the_ledger_names_the_rank_whose_loss_was_not_finite(dataset: Path, tmp_path: Path) -> None:
    def work() -> int:
        original = train._loss_sum
        if rank() == 1:
            train._loss_sum = lambda run, batch: original(run, batch) * (math.nan if run.state.step == 4 else 1)
        return main(words(dataset, tmp_path))

    assert in_processes(2, work) == [0, 0]
    (entry,) = map(json.loads, (tmp_path / "nonfinite.jsonl").read_text().splitlines())
    assert entry["step"] == 5
    assert entry["samples"] == list(range(64, 80))
    assert math.isfinite(float(entry["loss_by_rank"][0]))
    assert entry["loss_by_rank"][1] == "nan"
    assert records(tmp_path)[5]["skipped_steps"] == 1


def hang_asleep() -> None:
    time.sleep(120)


def hang_with_python_locked() -> None:
    ctypes.PyDLL(None).sleep(120)  # a call that does not give up the interpreter's lock


@pytest.mark.parametrize(
    ("hang", "code"),
    [
        pytest.param(hang_asleep, EXIT_HUNG, marks=pytest.mark.slow),
        pytest.param(hang_with_python_locked, 1, marks=pytest.mark.slow),
    ],
)
def test_a_rank_that_hangs_ends_the_run_with_the_stacks_of_all(
    hang: Callable[[], None], code: int, dataset: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def work() -> int:
        torch.set_num_threads(1)
        if rank() == 1:
            at_step(3, hang)
        return main(words(dataset, tmp_path, "train.hang_minutes=0.05"))

    began = time.monotonic()
    codes = exit_codes(2, work)
    assert codes == [EXIT_HUNG, code]
    assert time.monotonic() - began < 25
    errors = capfd.readouterr().err
    assert "rank 0 of 2" in errors
    assert "has not got on for 3 s" in errors
    assert hang.__name__ in errors, "the culprit's stack"
    waiting = (tmp_path / "stacks/rank_0.txt").read_text()
    assert "rank 0 of 2" in waiting
    assert "distributed_c10d.py" in waiting
    if code == EXIT_HUNG:
        assert hang.__name__ in (tmp_path / "stacks/rank_1.txt").read_text()


@pytest.mark.slow
def test_a_long_evaluation_is_no_hang(dataset: Path, tmp_path: Path) -> None:
    def work() -> int:
        from mamba_pretrain.evaluate import perplexity

        class SlowWindows(perplexity.Windows):
            def read(self, rows: Any) -> Any:
                time.sleep(0.4 * len(rows))
                return super().read(rows)

        perplexity.Windows = SlowWindows  # type: ignore[misc]
        options = (
            "data.validation_split=validation",
            "eval.max_windows=32",
            "train.steps=1",
            "train.hang_minutes=0.08",
        )
        return main(words(dataset, tmp_path, *options))

    assert exit_codes(2, work) == [0, 0]
    assert list(records(tmp_path, "eval")) == [1]


def test_what_a_rank_raises_is_the_only_traceback_that_is_seen(
    dataset: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def explode() -> None:
        raise ZeroDivisionError("the seventh loss is odd")

    def work() -> int:
        torch.set_num_threads(1)
        if rank() == 1:
            at_step(3, explode)
        try:
            return main(words(dataset, tmp_path))
        finally:
            (tmp_path / f"ended-{rank()}").write_text(str(int(time.time())))

    assert exit_codes(2, work) == [1, 1]
    # torchrun takes the earliest of these for the root cause, and the first rank of two that are the same.
    ended = [int((tmp_path / f"ended-{r}").read_text()) for r in range(2)]
    assert ended[1] < ended[0]
    errors = capfd.readouterr().err
    assert errors.count("Traceback (most recent call last)") == 1
    assert "ZeroDivisionError: the seventh loss is odd" in errors
    assert "rank 0 ends, because another rank has" in errors


LR_DIFFERS = "the ranks disagree about optim.lr: 0.001 on rank 0 ({host}); 0.002 on rank 1 ({host})"


def disagree_on_lr(dataset: Path) -> str:
    return "optim.lr=2e-3" if rank() == 1 else "optim.lr=1e-3"


def disagree_on_data(dataset: Path) -> str:
    return f"data.path={dataset}-other" if rank() == 1 else f"data.path={dataset}"


def disagree_on_code(dataset: Path) -> str:
    build.code_digest = lambda: f"digest {rank()}"
    return "optim.lr=1e-3"


def disagree_on_start(dataset: Path) -> str:
    original = checkpoint.checkpoints
    checkpoint.checkpoints = lambda directory: original(directory)[: 2 - rank()]
    return "checkpoint.resume=auto"


@pytest.mark.parametrize(
    ("disagree", "expected"),
    slow_but(
        [(disagree_on_lr, LR_DIFFERS)],
        [
            (disagree_on_lr, LR_DIFFERS),
            (disagree_on_data, "the ranks disagree about the data (train): "),
            (disagree_on_code, "code of mamba_pretrain: 'digest 0' on rank 0 ({host}); 'digest 1' on rank 1 ({host})"),
            (disagree_on_start, "the ranks disagree about the checkpoint to start from: 'step_00000008 (manifest "),
        ],
    ),
)
def test_ranks_that_were_started_differently_are_told_apart_before_a_step(
    disagree: Callable[[Path], str], expected: str, dataset: Path, tmp_path: Path
) -> None:
    if disagree is disagree_on_start:
        assert in_processes(2, main, words(dataset, tmp_path)) == [0, 0]
    if disagree is disagree_on_data:
        from tests.helpers.corpora import make_dataset

        make_dataset(Path(f"{dataset}-other"), seed=1)

    def work() -> str:
        config = small_config(dataset, tmp_path, *CURVE, *FSDP, disagree(dataset))
        with pytest.raises((ConfigError, PeerError)) as caught:
            train.run(config)
        return str(caught.value)

    steps_before = len(losses(tmp_path)) if (tmp_path / "metrics.jsonl").exists() else 0
    told = in_processes(2, work)
    assert all(expected.format(host=os.uname().nodename) in text for text in told), told[0]
    steps_after = len(losses(tmp_path)) if (tmp_path / "metrics.jsonl").exists() else 0
    assert steps_after == steps_before


def test_what_one_rank_cannot_find_ends_all_with_one_message_and_exit_code(
    dataset: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def work() -> int:
        logging.getLogger("mamba_pretrain").handlers.clear()
        where = [f"data.path={tmp_path / 'nowhere'}"] if rank() == 1 else []
        return main(words(dataset, tmp_path / "run", *where))

    assert in_processes(2, work) == [2, 2]
    errors = capfd.readouterr().err
    assert "rank 1 of 2 failed" in errors
    assert errors.count("nowhere") >= 2, "rank 1 says it, and rank 0, whose output is what many look at"
    assert "Traceback" not in errors


@pytest.mark.parametrize(
    ("name", "watched"), [("torchrun", True), ("start_torchrun_like.py", False), ("deepspeed_notes.py", False)]
)
def test_only_launchers_are_watched_by_their_ranks(name: str, watched: bool, tmp_path: Path) -> None:
    (tmp_path / name).write_text("print('here', flush=True)\ninput()\n")
    words = [sys.executable, str(tmp_path / name), "torchrun", "deepspeed"]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        parent.stdout.readline()
        assert bool(launchers(parent.pid)) == watched
        parent.communicate("\n")


@pytest.mark.slow
def test_a_killed_rank_takes_nothing_of_the_last_checkpoint_with_it(dataset: Path, tmp_path: Path) -> None:
    def work() -> int:
        if rank() == 0:
            at_step(6, lambda: os.kill(os.getpid(), signal.SIGKILL))
        return main(words(dataset, tmp_path))

    codes = exit_codes(2, work)
    assert codes == [-signal.SIGKILL, 1]
    (path,) = checkpoint.checkpoints(tmp_path / "checkpoints")
    assert checkpoint.open_part(path, checkpoint.verify(path), MODEL).shapes
