from __future__ import annotations

import json
import math
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mamba_pretrain import checkpoint, train
from mamba_pretrain.build import build
from mamba_pretrain.config import ConfigError
from mamba_pretrain.data.packing import n_windows
from mamba_pretrain.distributed.engine import StepResult
from mamba_pretrain.distributed.env import EXIT_PREEMPTED, Preemption
from mamba_pretrain.saver import Saver
from mamba_pretrain.train import NonFiniteError, Recent, Step, only_run_in, run, steps
from tests.helpers.runs import finish, losses, records, small_config, start


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def assert_same_run(found: Path, expected: Path, step: int = 12) -> None:
    """Bit-equal losses, weights and optimizer state."""
    assert losses(found) == losses(expected)
    for name in (checkpoint.MODEL, "optimizer.safetensors"):
        mine, theirs = (load_file(d / "checkpoints" / f"step_{step:08d}" / name) for d in (found, expected))
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[k], theirs[k]) for k in mine), name


def test_the_loss_falls(finished: Path) -> None:
    by_step = losses(finished)
    assert sorted(by_step) == list(range(1, 13))
    assert by_step[12] < by_step[1] - 0.02


@pytest.mark.parametrize("stop", [1, 5, 8])
def test_stopping_and_resuming_is_bit_equal_to_going_on(
    dataset: Path, finished: Path, tmp_path: Path, stop: int
) -> None:
    config = small_config(dataset, tmp_path / "run", "checkpoint.every_steps=1")
    partial = build(config)
    for _, _ in zip(range(stop), steps(partial), strict=False):
        pass
    # A checkpoint at `stop`, as the trainer would have left it.
    Saver(partial).save()
    assert run(small_config(dataset, tmp_path / "run", "checkpoint.resume=auto")) == 0
    mine = losses(tmp_path / "run")
    assert mine == {step: loss for step, loss in losses(finished).items() if step > stop}
    last = [load_file(d / "checkpoints/step_00000012" / checkpoint.MODEL) for d in (tmp_path / "run", finished)]
    assert all(torch.equal(last[0][k], last[1][k]) for k in last[0])


@pytest.mark.slow
def test_a_killed_run_resumes_bit_equal(dataset: Path, finished: Path, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    # The seventh step kills the process without a warning: three steps after the last checkpoint.
    prelude = (
        "import os, signal\nfrom mamba_pretrain.distributed.single import SingleEngine as E\nold, n = E.step, [0]\n"
        "def step(self, lr):\n    n[0] += 1\n    if n[0] == 7: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return old(self, lr)\nE.step = step"
    )
    code, _ = finish(start(dataset, directory, prelude=prelude))
    assert code == -signal.SIGKILL
    assert [p.name for p in checkpoint.checkpoints(directory / "checkpoints")] == ["step_00000004"]
    code, errors = finish(start(dataset, directory, "--resume", "auto"))
    assert code == 0, errors
    assert "resumed from" in errors
    assert_same_run(directory, finished)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_saves_and_leaves_with_its_own_exit_code(
    dataset: Path, finished: Path, tmp_path: Path, number: signal.Signals
) -> None:
    directory = tmp_path / "run"
    # Within the third step, from the process itself: however slow the machine is, it is the third.
    prelude = (
        "import os\nfrom mamba_pretrain.distributed.single import SingleEngine as E\nold, n = E.step, [0]\n"
        f"def step(self, lr):\n    n[0] += 1\n    if n[0] == 3: os.kill(os.getpid(), {int(number)})\n"
        "    return old(self, lr)\nE.step = step"
    )
    words = ("checkpoint.every_steps=0", "data.workers=1")
    code, errors = finish(start(dataset, directory, *words, prelude=prelude))
    assert code == EXIT_PREEMPTED, errors
    assert number.name in errors
    assert sorted(losses(directory)) == [1, 2, 3]
    (saved,) = checkpoint.checkpoints(directory / "checkpoints")
    assert checkpoint.verify(saved)["step"] == 3
    code, errors = finish(start(dataset, directory, "--resume", "auto", *words))
    assert code == 0, errors
    assert_same_run(directory, finished)


def test_loader_workers_do_not_change_the_run(dataset: Path, finished: Path, tmp_path: Path) -> None:
    assert run(small_config(dataset, tmp_path / "run", "data.workers=2")) == 0
    assert_same_run(tmp_path / "run", finished)


def test_accumulation_gives_the_same_curve(dataset: Path, finished: Path, tmp_path: Path) -> None:
    assert run(small_config(dataset, tmp_path / "run", "train.micro_batch_size=2")) == 0
    assert losses(tmp_path / "run") == pytest.approx(losses(finished), rel=1e-5)


def test_activation_checkpointing_is_bit_equal(dataset: Path, finished: Path, tmp_path: Path) -> None:
    assert run(small_config(dataset, tmp_path / "run", "train.activation_checkpointing=true")) == 0
    assert losses(tmp_path / "run") == losses(finished)


def test_bf16_stays_close_to_fp32(dataset: Path, finished: Path, tmp_path: Path) -> None:
    assert run(small_config(dataset, tmp_path / "run", "train.precision=bf16")) == 0
    mine, reference = losses(tmp_path / "run"), losses(finished)
    assert mine != reference
    assert mine == pytest.approx(reference, rel=2e-3)


def test_checkpoints_are_written_by_step_and_by_time_and_rotated(dataset: Path, tmp_path: Path) -> None:
    options = ("checkpoint.every_steps=2", "checkpoint.keep_last=2", "checkpoint.keep_every_steps=4")
    run(small_config(dataset, tmp_path / "steps", *options))
    names = [p.name for p in checkpoint.checkpoints(tmp_path / "steps/checkpoints")]
    assert names == [f"step_{s:08d}" for s in (4, 8, 10, 12)]
    run(small_config(dataset, tmp_path / "time", "checkpoint.every_steps=0", "checkpoint.every_minutes=1e-9"))
    assert len(checkpoint.checkpoints(tmp_path / "time/checkpoints")) == 9  # of twelve: keep_last is 9


def test_evaluation_runs_every_n_steps_and_at_the_end(dataset: Path, tmp_path: Path) -> None:
    run(small_config(dataset, tmp_path / "run", "eval.every_steps=5"))
    evals = records(tmp_path / "run", "eval")
    assert sorted(evals) == [5, 10, 12]
    for record in evals.values():
        assert record["perplexity"] == pytest.approx(math.exp(record["loss"]))


def poison(monkeypatch: pytest.MonkeyPatch, bad: range) -> None:
    """Makes the loss of the batches in `bad` (counted from 0) infinite."""
    clean, count = train._loss_sum, iter(range(10**6))

    def loss_sum(run: object, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        loss = clean(run, batch)  # type: ignore[arg-type]
        return loss * math.inf if next(count) // 2 in bad else loss  # two micro-batches a step

    monkeypatch.setattr(train, "_loss_sum", loss_sum)


def test_a_nonfinite_step_is_skipped_and_written_down(
    dataset: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, range(3, 5))
    assert run(small_config(dataset, tmp_path / "run")) == 0
    ledger = [json.loads(line) for line in (tmp_path / "run/nonfinite.jsonl").read_text().splitlines()]
    assert [(entry["step"], entry["samples"]) for entry in ledger] == [
        (4, list(range(24, 32))),
        (5, list(range(32, 40))),
    ]
    by_step = records(tmp_path / "run")
    assert by_step[4]["skipped_steps"] == 1 and by_step[4]["loss"] is None
    assert [by_step[s]["loss"] for s in (1, 2, 3)] == [losses(finished)[s] for s in (1, 2, 3)]
    assert math.isfinite(by_step[12]["loss"])
    weights = load_file(tmp_path / "run/checkpoints/step_00000012" / checkpoint.MODEL)
    assert all(torch.isfinite(w).all() for w in weights.values())


def test_too_many_nonfinite_steps_in_a_row_end_the_run(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, range(5, 99))
    with pytest.raises(NonFiniteError, match=r"3 steps in a row .* the last is step 8"):
        run(small_config(dataset, tmp_path / "run", "train.max_nonfinite=3"))
    assert [p.name for p in checkpoint.checkpoints(tmp_path / "run/checkpoints")] == ["step_00000004"]


def test_a_run_directory_serves_one_process_at_a_time(dataset: Path, tmp_path: Path) -> None:
    with only_run_in(tmp_path / "run"):
        with pytest.raises(ConfigError, match="another process trains in"):
            run(small_config(dataset, tmp_path / "run"))
        assert (tmp_path / "run").is_dir(), "the refused one leaves the other's directory alone"


def test_records_are_the_same_across_a_kill_however_they_fall_with_checkpoints(dataset: Path, tmp_path: Path) -> None:
    options = ("log.every_steps=5", "train.steps=12")
    run(small_config(dataset, tmp_path / "whole", *options))
    partial = build(small_config(dataset, tmp_path / "resumed", *options))
    for _, _ in zip(range(4), steps(partial), strict=False):
        pass
    Saver(partial).save()
    run(small_config(dataset, tmp_path / "resumed", *options, "checkpoint.resume=auto"))
    whole, resumed = records(tmp_path / "whole"), records(tmp_path / "resumed")
    assert sorted(whole) == [4, 5, 8, 10, 12], "every fifth step, and before every checkpoint"
    for step in (5, 8, 10, 12):
        for figure in ("loss", "averaged_steps", "skipped_steps", "tokens", "lr", "grad_norm"):
            assert resumed[step][figure] == whole[step][figure]
    assert sum(record["averaged_steps"] for record in whole.values()) == 12


def test_a_record_is_the_mean_of_its_good_steps(dataset: Path, tmp_path: Path) -> None:
    this = build(small_config(dataset, tmp_path))
    recent = Recent()
    for loss, skipped, seconds in ((2.0, False, 1.0), (math.nan, True, 2.0), (4.0, False, 1.0)):
        recent.add(Step(loss, 0.1, StepResult(1.5, skipped, 1.0), range(7, 8), [loss], seconds, 0.5))
    record = recent.record(this)
    assert (record["loss"], record["averaged_steps"], record["skipped_steps"]) == (3.0, 2, 1)
    assert record["tokens_per_s"] == pytest.approx(3 * 256 / 4.0)
    assert (record["time/step_s"], record["time/data_loading_s"]) == pytest.approx((4 / 3, 0.5))


def test_the_state_counts_samples_tokens_and_epochs(dataset: Path, tmp_path: Path) -> None:
    this = build(small_config(dataset, tmp_path, "train.steps=40"))
    windows = n_windows(this.reading.sources[0].train, 32)
    for count, step in enumerate(steps(this), start=1):
        assert step.samples == range(8 * (count - 1), 8 * count)
        state = this.state
        assert (state.step, state.samples, state.tokens) == (count, 8 * count, 256 * count)
        assert state.epoch == 8 * count // windows
        assert state.tokens == state.trained_tokens + state.masked_tokens
    assert this.state.epoch >= 1


def test_good_steps_between_skipped_ones_start_the_count_anew(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, range(1, 12, 2))
    assert run(small_config(dataset, tmp_path / "run", "train.max_nonfinite=2")) == 0
    assert len((tmp_path / "run/nonfinite.jsonl").read_text().splitlines()) == 6


def test_checkpoints_by_time_are_spaced_by_that_time(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    saver = Saver(build(small_config(dataset, tmp_path, "checkpoint.every_steps=0", "checkpoint.every_minutes=10")))
    due = []
    for minute in range(1, 26):
        now[0] = 60.0 * minute
        if saver.due_by_time():
            due.append(minute)
            saver.run.state.step += 1
            saver.save()
    assert due == [11, 22]


def test_a_signal_between_two_looks_at_it_is_not_lost(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Late(Preemption):
        """Gets its signal right after the trainer has looked for the first time."""

        looks = 0

        @property
        def reason(self) -> str | None:  # type: ignore[override]
            self.looks += 1
            return "SIGTERM" if self.looks > 1 else None

        @reason.setter
        def reason(self, value: str | None) -> None:
            pass

    monkeypatch.setattr(train, "Preemption", Late)
    assert run(small_config(dataset, tmp_path / "run", "checkpoint.every_steps=0")) == EXIT_PREEMPTED
    assert [p.name for p in checkpoint.checkpoints(tmp_path / "run/checkpoints")] == ["step_00000002"]
