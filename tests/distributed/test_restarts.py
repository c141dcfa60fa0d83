"""Ranks that are killed, and launchers that are: with the real launchers."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mamba_pretrain.checkpoint import checkpoints, verify
from tests.helpers.launchers import BIN, Launched, train_words
from tests.helpers.processes import free_port
from tests.helpers.runs import ROOT, losses

pytestmark = pytest.mark.slow  # 10 to 30 s each: every process loads torch and trains


def at_least(run_dir: Path, step: int) -> Callable[[], bool]:
    return lambda: (run_dir / "metrics.jsonl").exists() and max(losses(run_dir), default=0) >= step


@pytest.mark.parametrize("engine", [["train.engine=fsdp"], ["train.engine=zero", "zero.stage=3"]], ids=["fsdp", "zero"])
def test_a_killed_rank_is_started_again_and_the_curve_is_that_of_an_undisturbed_run(
    engine: list[str], dataset: Path, finished: Path, tmp_path: Path
) -> None:
    run_dir, script = tmp_path / "run", tmp_path / "dies_once.py"
    script.write_text(
        "import os, runpy, signal\n"
        "from mamba_pretrain import train\n"
        "steps = train.steps\n"
        "def doomed(run):\n"
        "    for step in steps(run):\n"
        "        first = os.environ['TORCHELASTIC_RESTART_COUNT'] == '0'\n"
        "        if os.environ['RANK'] == '1' and first and run.state.step == 6:\n"
        "            os.kill(os.getpid(), signal.SIGKILL)\n"
        "        yield step\n"
        "train.steps = doomed\n"
        "runpy.run_module('launch.train', run_name='__main__')\n"
    )
    torchrun = [BIN / "torchrun", "--standalone", "--nproc-per-node=2", "--max-restarts=2", "--monitor-interval=0.1"]
    words = train_words(dataset, run_dir, *engine, "checkpoint.resume=auto")
    with Launched([*torchrun, script, *words], tmp_path / "log", {"PYTHONPATH": str(ROOT)}) as launched:
        assert launched.wait() == 0, launched.said
        assert "resumed from" in launched.said
        assert "step_00000004" in launched.said
    assert losses(run_dir) == pytest.approx(losses(finished), rel=1e-6)
    assert json.loads((run_dir / "outcome.json").read_text())["outcome"] == "finished"


@pytest.mark.parametrize(
    ("start", "engine", "number"),
    [
        # The CLI dies of the signal; its launch.py and the ranks would train on for ever.
        ([BIN / "deepspeed", "--num_gpus", "2", "--master_port"], ["train.engine=zero"], signal.SIGTERM),
        ([BIN / "torchrun", "--nproc-per-node=2", "--master-port"], ["train.engine=fsdp"], signal.SIGKILL),
    ],
    ids=["deepspeed-SIGTERM", "torchrun-SIGKILL"],
)
def test_ranks_whose_launcher_is_gone_save_themselves_and_end(
    start: list[object], engine: list[str], number: signal.Signals, dataset: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    words = train_words(dataset, run_dir, *engine, "train.steps=100000", "checkpoint.every_steps=0")
    with Launched([*start, free_port(), "launch/train.py", *words], tmp_path / "log") as launched:
        launched.until(at_least(run_dir, 3))
        os.kill(launched.process.pid, number)
        launched.process.wait(30)
        deadline = time.monotonic() + 60
        while launched.ranks():
            assert time.monotonic() < deadline, launched.said[-3000:]
            time.sleep(0.1)
    outcome = json.loads((run_dir / "outcome.json").read_text())
    assert outcome["outcome"] == "preempted"
    assert "the launcher is gone on rank" in outcome["why"]
    (saved,) = checkpoints(run_dir / "checkpoints")
    assert verify(saved)["step"] == outcome["step"]


def test_no_process_is_left_when_torchrun_is_stopped(dataset: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    words = train_words(dataset, run_dir, "train.engine=fsdp", "train.steps=100000", "data.workers=1")
    torchrun = [sys.executable, "-m", "launch.torchrun", "--standalone", "--nproc-per-node=2"]
    with Launched([*torchrun, "-m", "launch.train", *words], tmp_path / "log") as launched:
        launched.until(at_least(run_dir, 3))
        os.kill(launched.process.pid, signal.SIGTERM)
        launched.wait()
        time.sleep(0.5)
        assert launched._environments() == {}, "ranks and their loader processes"
