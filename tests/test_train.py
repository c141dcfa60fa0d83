from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models

from mamba_pretrain import checkpoint, train
from mamba_pretrain.build import build
from mamba_pretrain.checkpoint import CheckpointError
from mamba_pretrain.config import ConfigError
from mamba_pretrain.data.shards import ShardError
from mamba_pretrain.distributed.engine import OPTIMIZER
from mamba_pretrain.distributed.env import EXIT_PREEMPTED
from mamba_pretrain.export.convert import export_checkpoint
from mamba_pretrain.train import NonFiniteError, Saver, only_run_in, run, steps
from tests.helpers.corpora import make_dataset
from tests.helpers.runs import finish, records, small_config, start


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data") / "dataset", n_documents=80)


@pytest.fixture(scope="module")
def finished(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run, for others to be compared with."""
    directory = tmp_path_factory.mktemp("runs") / "finished"
    assert run(small_config(dataset, directory)) == 0
    return directory


def losses(directory: Path) -> dict[int, float]:
    return {step: record["loss"] for step, record in records(directory).items()}


def assert_same_run(found: Path, expected: Path, step: int = 12) -> None:
    """Bit-equal losses, weights and optimizer state."""
    assert losses(found) == losses(expected)
    for name in (checkpoint.MODEL, OPTIMIZER):
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


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_saves_and_leaves_with_its_own_exit_code(
    dataset: Path, finished: Path, tmp_path: Path, number: signal.Signals
) -> None:
    directory = tmp_path / "run"
    slow = "import time\nfrom mamba_pretrain.distributed.single import SingleEngine as E\nold = E.step\n"
    slow += "def step(self, lr):\n    time.sleep(0.2)\n    return old(self, lr)\nE.step = step"
    words = ("checkpoint.every_steps=0", "data.workers=1")
    process = start(dataset, directory, *words, prelude=slow)
    deadline = time.monotonic() + 60
    while not (directory / "metrics.jsonl").exists() or not records(directory):
        assert time.monotonic() < deadline and process.poll() is None, process.communicate()
        time.sleep(0.05)
    os.kill(process.pid, number)
    code, errors = finish(process)
    assert code == EXIT_PREEMPTED, errors
    assert number.name in errors
    saved = checkpoint.checkpoints(directory / "checkpoints")
    assert len(saved) == 1 and 0 < checkpoint.verify(saved[0])["step"] < 12
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


def test_a_used_run_directory_is_refused_unless_asked_to_resume(dataset: Path, finished: Path) -> None:
    with pytest.raises(ConfigError, match="--resume auto"):
        run(small_config(dataset, finished))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("model.d_state=8", "model.d_state was 4, is 8"),
        ("train.seed=1", "seed was 0, is 1"),
        ("data.seq_len=64", "seq_len was 32, is 64"),
        ("data.reset_documents=false", "reset_documents was True, is False"),
    ],
)
def test_resuming_with_another_model_or_data_is_refused(dataset: Path, finished: Path, change: str, named: str) -> None:
    with pytest.raises(CheckpointError, match=named):
        build(small_config(dataset, finished, "checkpoint.resume=auto", change))


def test_resuming_on_other_data_is_refused(finished: Path, tmp_path: Path) -> None:
    other = make_dataset(tmp_path / "other", n_documents=50, seed=3)
    with pytest.raises(CheckpointError, match="data was '"):
        build(small_config(other, finished, "checkpoint.resume=auto"))


def test_a_changed_learning_rate_is_allowed_and_said(
    dataset: Path, finished: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("WARNING", logger="mamba_pretrain"):
        resumed = build(small_config(dataset, finished, "checkpoint.resume=auto", "optim.lr=5e-4"))
    assert resumed.state.step == 12
    assert "resuming with another optim.lr: was 0.001, is 0.0005" in caplog.text


def test_damaged_and_missing_shards_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "dataset")
    with pytest.raises(ShardError):
        run(small_config(tmp_path / "absent", tmp_path / "run"))
    with (dataset / "train.bin").open("r+b") as file:
        file.seek(11)
        file.write(b"\x01")
    with pytest.raises(ShardError, match="is damaged"):
        run(small_config(dataset, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_dataset_of_another_tokenizer_or_a_larger_vocabulary_is_refused(dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has 257 tokens, model.vocab_size is 100: set model.vocab_size=257"):
        build(small_config(dataset, tmp_path / "run", "model.vocab_size=100"))
    other = tmp_path / "other.json"
    tokenizer = Tokenizer(models.WordLevel({"<|endoftext|>": 0, "a": 1}, unk_token="a"))
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(other))
    with pytest.raises(ShardError, match="was made with another tokenizer"):
        build(small_config(dataset, tmp_path / "run", f"data.tokenizer={other}"))


def test_a_run_directory_serves_one_process_at_a_time(dataset: Path, tmp_path: Path) -> None:
    with only_run_in(tmp_path / "run"), pytest.raises(ConfigError, match="another process trains in"):
        run(small_config(dataset, tmp_path / "run"))


def test_training_goes_on_from_an_exported_model_by_one_key(dataset: Path, finished: Path, tmp_path: Path) -> None:
    source = finished / "checkpoints/step_00000012"
    weights = load_file(source / checkpoint.MODEL)
    for form in ("hf", "mamba_ssm"):
        export_checkpoint(source, tmp_path / form, to=form)
        shape = ("model.d_model=null", "model.n_layer=null", "model.d_state=16", f"train.init_from={tmp_path / form}")
        started = build(small_config(dataset, tmp_path / f"from_{form}", *shape))
        assert started.config.model == dataclasses.replace(small_config(dataset, tmp_path).model, vocab_size=257)
        assert all(torch.equal(v, weights[k]) for k, v in started.engine.full_state_dict().items())
        first = next(iter(steps(started)))
        assert first.loss < losses(finished)[1] - 0.02
    clash = small_config(dataset, tmp_path / "clash", "model.d_state=8", f"train.init_from={tmp_path / 'hf'}")
    with pytest.raises(ConfigError, match="model.d_state is 8, the weights to start from have 4"):
        build(clash)


def test_init_from_resumes_from_its_own_checkpoints(dataset: Path, finished: Path, tmp_path: Path) -> None:
    start_from = f"train.init_from={finished / 'checkpoints/step_00000012'}"
    shape = ("model.d_model=null", "model.n_layer=null", "model.d_state=16")
    run(small_config(dataset, tmp_path / "run", start_from, *shape, "train.steps=4"))
    resumed = build(small_config(dataset, tmp_path / "run", start_from, *shape, "checkpoint.resume=auto"))
    assert resumed.state.step == 4
