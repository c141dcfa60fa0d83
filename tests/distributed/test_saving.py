"""Checkpoints that several ranks write: whole or absent, whatever happens; and written while training goes on."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mamba_pretrain import checkpoint, saver, train
from mamba_pretrain.build import build
from mamba_pretrain.checkpoint import CheckpointError
from mamba_pretrain.config import Config
from mamba_pretrain.distributed.engine import MODEL, OPTIMIZER
from mamba_pretrain.distributed.ranks import PeerError, Ranks
from tests.helpers.engines import CURVE
from tests.helpers.marks import slow_but
from tests.helpers.processes import exit_codes, in_processes, on_ranks
from tests.helpers.runs import losses, small_config

FSDP = ["train.engine=fsdp", "train.steps=6", "checkpoint.every_steps=3"]


def configured(dataset: Path, run_dir: Path, *overrides: str) -> Config:
    return small_config(dataset, run_dir, *CURVE, *FSDP, *overrides)


def quiet_run(config: Config) -> int:
    torch.set_num_threads(1)
    return train.run(config)


def found(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def die(rank: int) -> None:
    if int(os.environ["RANK"]) == rank:
        os.kill(os.getpid(), signal.SIGKILL)


def die_within_a_file(rank: int) -> None:
    original = checkpoint.write_pieces

    def write(path: Path, pieces: Any) -> dict[str, Any]:
        facts = original(path, pieces)
        if "step_00000006" in str(path) and OPTIMIZER in path.name:
            os.truncate(path, facts["bytes"] // 2)
            die(rank)
        return facts

    checkpoint.write_pieces = write


def die_before_the_manifest(rank: int) -> None:
    original = checkpoint._complete

    def complete(directory: Path, *rest: Any) -> None:
        if "step_00000006" in str(directory):
            die(rank)
        original(directory, *rest)

    checkpoint._complete = complete


def die_before_the_rename(rank: int) -> None:
    original = checkpoint._complete

    def complete(directory: Path, *rest: Any) -> None:
        original(directory, *rest)
        if "step_00000006" in str(directory):
            die(rank)

    checkpoint._complete = complete


@pytest.mark.parametrize("asynchronous", slow_but(["true"], ["true", "false"]))
@pytest.mark.parametrize(
    ("rank", "sabotage"),
    slow_but(
        [(1, die_within_a_file)],
        [(1, die_within_a_file), (0, die_within_a_file), (0, die_before_the_manifest), (0, die_before_the_rename)],
    ),
)
def test_a_kill_within_a_save_leaves_the_checkpoint_before_it_and_the_run_goes_on_from_there(
    rank: int, sabotage: Callable[[int], None], asynchronous: str, dataset: Path, tmp_path: Path
) -> None:
    config = configured(dataset, tmp_path, f"checkpoint.asynchronous={asynchronous}")

    def doomed() -> int:
        sabotage(rank)
        return quiet_run(config)

    codes = exit_codes(2, doomed)
    assert codes[rank] == -signal.SIGKILL
    assert codes[1 - rank] == 1, "the other rank finds out, and fails"
    assert [p.name for p in checkpoint.checkpoints(tmp_path / "checkpoints")] == ["step_00000003"]
    checkpoint.verify(tmp_path / "checkpoints/step_00000003")
    config.checkpoint.resume = "auto"
    assert in_processes(2, quiet_run, config) == [0, 0]
    assert found(tmp_path) == ["step_00000003", "step_00000006"]
    checkpoint.verify(tmp_path / "checkpoints/step_00000006")


def test_a_rank_that_cannot_write_ends_all_with_its_reason_and_nothing_is_left(dataset: Path, tmp_path: Path) -> None:
    def work(ranks: Ranks) -> tuple[str, str]:
        run = build(configured(dataset, tmp_path), ranks)
        original = checkpoint.write_pieces

        def write(path: Path, pieces: Any) -> dict[str, Any]:
            if ranks.rank == 1:
                raise OSError(28, "No space left on device", str(path))
            return original(path, pieces)

        checkpoint.write_pieces = write
        with pytest.raises((CheckpointError, PeerError)) as caught:
            saver.Saver(run).save()
        return type(caught.value).__name__, str(caught.value)

    told = on_ranks(2, work)
    assert told[0][0] == "CheckpointError"
    assert told[1][0] == "PeerError"
    assert all("rank 1" in text and "No space left on device" in text and "MB are free" in text for _, text in told)
    assert found(tmp_path) == []


def test_ranks_that_do_not_share_the_run_directory_are_told(dataset: Path, tmp_path: Path) -> None:
    def work(ranks: Ranks) -> str:
        run = build(configured(dataset, tmp_path), ranks)
        if ranks.rank == 1:
            Path.is_dir = lambda self: "tmp-" not in self.name  # type: ignore[method-assign, assignment]
        with pytest.raises((CheckpointError, PeerError)) as caught:
            saver.Saver(run).save()
        return str(caught.value)

    assert all("run_dir must lie on a file system that all ranks share" in text for text in on_ranks(2, work))


def slow_writer(gate: threading.Event) -> None:
    """Files are written only after the gate opens: the tensors must have been copied by then."""
    original = checkpoint.write_pieces

    def write(path: Path, pieces: Any) -> dict[str, Any]:
        if "step_00000003" in str(path):
            assert gate.wait(60)
        return original(path, pieces)

    checkpoint.write_pieces = write


@pytest.mark.parametrize(
    "options", slow_but([["train.engine=fsdp"]], [["train.engine=fsdp"], ["train.engine=zero", "zero.stage=3"]])
)
def test_an_asynchronous_save_holds_its_step_though_training_went_on(
    options: list[str], dataset: Path, tmp_path: Path
) -> None:
    def work(directory: Path, asynchronous: bool) -> list[int]:
        torch.set_num_threads(1)
        gate, taken = threading.Event(), []
        config = configured(dataset, directory, *options, f"checkpoint.asynchronous={asynchronous}")
        if asynchronous:
            slow_writer(gate)
        original = train.steps

        def counted(run: Any) -> Any:
            for step in original(run):
                pending = (directory / "checkpoints/step_00000003/manifest.json").exists()
                taken.append(run.state.step) if run.state.step > 3 and not pending else None
                if run.state.step == 5:
                    gate.set()
                    time.sleep(0.3)
                yield step

        train.steps = counted
        assert train.run(config) == 0
        return taken

    in_processes(2, work, tmp_path / "blocking", False)
    while_writing = in_processes(2, work, tmp_path / "background", True)
    assert all({4, 5} <= set(taken) for taken in while_writing), "steps are taken before the checkpoint is there"
    assert losses(tmp_path / "background") == losses(tmp_path / "blocking")
    for step in (3, 6):
        paths = [tmp_path / kind / f"checkpoints/step_{step:08d}" for kind in ("blocking", "background")]
        for part in (MODEL, OPTIMIZER):
            expected, mine = (checkpoint.open_part(path, checkpoint.verify(path), part) for path in paths)
            assert all(torch.equal(mine.tensor(name), expected.tensor(name)) for name in expected.shapes)


def test_an_asynchronous_save_that_fails_stamps_no_manifest_and_ends_the_run(dataset: Path, tmp_path: Path) -> None:
    def work() -> str:
        torch.set_num_threads(1)

        def write(path: Path, pieces: Any) -> dict[str, Any]:
            raise OSError(5, "Input/output error", str(path))

        checkpoint.write_pieces = write
        with pytest.raises((CheckpointError, PeerError)) as caught:
            train.run(configured(dataset, tmp_path, "checkpoint.asynchronous=true"))
        return str(caught.value)

    assert all("Input/output error" in text for text in in_processes(2, work))
    assert found(tmp_path) == []


@pytest.mark.slow
def test_a_manifest_that_lists_too_little_is_one_message_on_every_rank(dataset: Path, tmp_path: Path) -> None:
    assert in_processes(2, quiet_run, configured(dataset, tmp_path, "train.steps=3")) == [0, 0]
    path = tmp_path / "checkpoints/step_00000003/manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["files"]["optimizer-00001-of-00002.safetensors"]
    path.write_text(json.dumps(manifest))

    def work() -> str:
        with pytest.raises((CheckpointError, PeerError)) as caught:
            train.run(configured(dataset, tmp_path, "checkpoint.resume=auto"))
        return str(caught.value)

    assert all("that is not one of each of its parts" in text for text in in_processes(2, work))


@pytest.mark.slow
def test_a_step_directory_without_manifest_is_set_aside(dataset: Path, tmp_path: Path) -> None:
    assert in_processes(2, quiet_run, configured(dataset, tmp_path)) == [0, 0]
    (tmp_path / "checkpoints/step_00000006/manifest.json").unlink()
    assert in_processes(2, quiet_run, configured(dataset, tmp_path, "checkpoint.resume=auto")) == [0, 0]
    assert found(tmp_path) == ["step_00000003", "step_00000006", "step_00000006.incomplete-1"]
