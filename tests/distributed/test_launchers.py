"""torchrun, the deepspeed CLI and srun's environment start the same training; how their ends are told apart."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import time
from pathlib import Path

import pytest

from mamba_pretrain.checkpoint import checkpoints
from mamba_pretrain.distributed.env import EXIT_PREEMPTED
from tests.helpers.launchers import BIN, Launched, train_words
from tests.helpers.processes import free_port
from tests.helpers.runs import ROOT, losses

pytestmark = pytest.mark.slow  # 10 to 30 s each: every process loads torch and trains

TORCHRUN = [sys.executable, "-m", "launch.torchrun", "--standalone", "--nproc-per-node=2", "--monitor-interval=0.1"]


def same_losses(run_dir: Path, finished: Path) -> None:
    assert losses(run_dir) == pytest.approx(losses(finished), rel=1e-6)
    assert len(checkpoints(run_dir / "checkpoints")) == 3


def srun_environment(rank: int, world: int, port: int) -> dict[str, str]:
    """What srun sets for one of `world` tasks on one host."""
    return {
        "SLURM_JOB_ID": "77",
        "SLURM_STEP_ID": "0",
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank),
        "SLURM_NTASKS": str(world),
        "SLURM_STEP_NUM_TASKS": str(world),
        "SLURM_NODEID": "0",
        "SLURM_STEP_TASKS_PER_NODE": str(world),
        "SLURM_STEP_NODELIST": "localhost",
        "MASTER_PORT": str(port),
    }


def srun(stack: contextlib.ExitStack, words: list[str], directory: Path, port: int) -> list[Launched]:
    """Two tasks, as srun would start them."""
    command = [sys.executable, "launch/train.py", *words]
    return [
        stack.enter_context(Launched(command, directory / f"log{rank}", srun_environment(rank, 2, port)))
        for rank in range(2)
    ]


def test_torchruns_own_command(dataset: Path, finished: Path, tmp_path: Path) -> None:
    """Ours, launch.torchrun, is what the tests of signals and restarts start."""
    words = train_words(dataset, tmp_path / "run", "train.engine=fsdp", "data.workers=1")
    start = [BIN / "torchrun", "--standalone", "--nproc-per-node=2"]
    with Launched([*start, "launch/train.py", *words], tmp_path / "log") as launched:
        assert launched.wait() == 0, launched.said
    same_losses(tmp_path / "run", finished)


def test_the_deepspeed_cli(dataset: Path, finished: Path, tmp_path: Path) -> None:
    words = train_words(dataset, tmp_path / "run", "train.engine=zero", "zero.stage=2")
    cli = [BIN / "deepspeed", "--num_gpus", "2", "--master_port", free_port()]
    with Launched([*cli, "launch/train.py", *words], tmp_path / "log") as launched:
        assert launched.wait() == 0, launched.said
    same_losses(tmp_path / "run", finished)
    assert json.loads((tmp_path / "run/outcome.json").read_text())["outcome"] == "finished"


def test_the_environment_of_srun(dataset: Path, finished: Path, tmp_path: Path) -> None:
    """With DeepSpeed, which asks for variables that srun does not set."""
    words = train_words(dataset, tmp_path / "run", "train.engine=zero", "zero.stage=1")
    with contextlib.ExitStack() as stack:
        tasks = srun(stack, words, tmp_path, free_port())
        assert [task.wait() for task in tasks] == [0, 0], tasks[0].said
    same_losses(tmp_path / "run", finished)


def test_a_taken_port_ends_every_rank_with_a_message(dataset: Path, tmp_path: Path) -> None:
    words = train_words(dataset, tmp_path / "run", "train.engine=fsdp")
    with contextlib.ExitStack() as stack:
        port = stack.enter_context(socket.create_server(("127.0.0.1", 0))).getsockname()[1]
        tasks = srun(stack, words, tmp_path, port)
        assert [task.wait() for task in tasks] == [2, 2]
        assert all("another process listens there, perhaps an earlier run" in task.said for task in tasks)
        start = [sys.executable, "-m", "launch.torchrun", "--nproc-per-node=1", f"--master-port={port}"]
        launched = stack.enter_context(Launched([*start, "-m", "launch.train", *words], tmp_path / "log"))
        assert launched.wait() == 2 and "the hosts cannot meet" in launched.said


@pytest.mark.parametrize("who", ["launcher, SIGTERM", "rank 1, SIGUSR1", "deepspeed's rank 1, SIGUSR1"])
def test_a_preemption_is_saved_and_told_by_the_exit_code(dataset: Path, tmp_path: Path, who: str) -> None:
    run_dir = tmp_path / "run"
    words = train_words(dataset, run_dir, "train.engine=fsdp", "train.steps=100000", "checkpoint.every_steps=0")
    start: list[object] = [*TORCHRUN, "--max-restarts=3", "-m", "launch.train"]
    if who.startswith("deepspeed"):
        start = [BIN / "deepspeed", "--num_gpus", "2", "--master_port", free_port(), "launch/train.py"]
    with Launched([*start, *words], tmp_path / "log") as launched:
        launched.until(lambda: (run_dir / "metrics.jsonl").exists() and len(losses(run_dir)) > 2)
        target, _, name = who.partition(", ")
        ranks = launched.ranks()
        os.kill(launched.process.pid if target == "launcher" else ranks[1], signal.Signals[name])
        if target == "launcher":  # once more, for good measure, as schedulers and people do
            time.sleep(0.2)
            os.kill(launched.process.pid, signal.Signals[name])
        assert launched.wait() == EXIT_PREEMPTED, launched.said
        assert not launched.ranks()  # --max-restarts has not started others
    outcome = json.loads((run_dir / "outcome.json").read_text())
    assert outcome["outcome"] == "preempted"
    assert f"{name} on rank 1" in outcome["why"]
    (saved,) = checkpoints(run_dir / "checkpoints")
    assert int(saved.name.removeprefix("step_")) == outcome["step"] == max(losses(run_dir))


def test_a_signal_before_the_first_step_is_a_preemption_too(dataset: Path, tmp_path: Path) -> None:
    words = train_words(dataset, tmp_path / "run", "train.engine=fsdp")
    with Launched([*TORCHRUN, "-m", "launch.train", *words], tmp_path / "log") as launched:
        launched.until(lambda: len(launched.ranks()) == 2)
        launched.process.terminate()
        assert launched.wait() == EXIT_PREEMPTED, launched.said


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_while_the_launcher_loads_is_a_preemption_too(
    number: signal.Signals, dataset: Path, tmp_path: Path
) -> None:
    """Once or twice, as a second Ctrl-C."""
    words = train_words(dataset, tmp_path / "run", "train.engine=fsdp")
    with Launched([*TORCHRUN, "-m", "launch.train", *words], tmp_path / "log") as launched:
        caught = Path(f"/proc/{launched.process.pid}/status")

        def handled() -> bool:
            mask = next(line for line in caught.read_text().splitlines() if line.startswith("SigCgt"))
            return bool(int(mask.split()[1], 16) >> (signal.SIGUSR1 - 1) & 1)

        launched.until(handled)
        assert not launched.ranks()
        for _ in range(2):
            launched.process.send_signal(number)
        assert launched.wait() == EXIT_PREEMPTED, launched.said


@pytest.mark.parametrize("restarts", [0, 1])
def test_a_failed_rank(dataset: Path, finished: Path, tmp_path: Path, restarts: int) -> None:
    """Is told by the exit code, with its traceback; or all begin again at the last checkpoint."""
    script = tmp_path / "fails_once.py"
    script.write_text(
        "import os, runpy\n"
        "from mamba_pretrain.saver import Saver\n"
        "if os.environ['RANK'] == '1' and os.environ['TORCHELASTIC_RESTART_COUNT'] == '0':\n"
        "    due = Saver.due_by_step\n"
        "    Saver.due_by_step = lambda self: due(self) if self.run.state.step < 6 else 1 / 0\n"
        f"runpy.run_path({str(ROOT / 'launch/train.py')!r}, run_name='__main__')\n"
    )
    words = train_words(dataset, tmp_path / "run", "train.engine=fsdp", "checkpoint.resume=auto")
    with Launched([*TORCHRUN, f"--max-restarts={restarts}", script, *words], tmp_path / "log") as launched:
        code, said = launched.wait(), launched.said
    if restarts:
        assert code == 0, said
        same_losses(tmp_path / "run", finished)
    else:
        assert code == 1
        assert "ZeroDivisionError" in said.split("Root Cause")[1], said
        assert not (tmp_path / "run/outcome.json").exists()
