from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mamba_pretrain.config import Config, LogConfig, ModelConfig, TrainConfig
from mamba_pretrain.metrics import Console, Jsonl, Sinks, mfu, peak_memory_gib

RECORD = {"kind": "train", "step": 3, "loss": 2.5, "lr": 1e-3, "grad_norm": 0.5, "tokens_per_s": 1234.5, "mfu": None}
EVAL = {"kind": "eval", "step": 3, "loss": 2.0, "perplexity": 7.389}


def make_config(*sinks: str) -> Config:
    model = ModelConfig(d_model=16, n_layer=1, vocab_size=16)
    return Config(model=model, train=TrainConfig(steps=10), log=LogConfig(sinks=list(sinks)))


@pytest.mark.slow
def test_every_sink_gets_every_record_and_wandb_works_offline(tmp_path: Path) -> None:
    sinks = Sinks(make_config("jsonl", "tensorboard", "wandb"), tmp_path, first_step=0)
    sinks.write(RECORD)
    sinks.write(EVAL)
    sinks.close()
    assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [RECORD, EVAL]
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(3, 2.5)]
    assert events.Scalars("eval/perplexity")[0].value == pytest.approx(7.389)
    assert "train/mfu" not in events.Tags()["scalars"], "an unknown figure is not drawn as a number"
    identity = (tmp_path / "wandb_id").read_text()
    assert list(tmp_path.glob(f"wandb/offline-run-*-{identity}/*.wandb"))


def test_a_resumed_run_keeps_the_points_up_to_its_checkpoint_and_replaces_those_after(tmp_path: Path) -> None:
    config = make_config("tensorboard")
    for first, loss in ((0, 1.0), (2, 9.0)):
        sinks = Sinks(config, tmp_path, first_step=first)
        for step in range(first + 1, 5):
            sinks.write(RECORD | {"step": step, "loss": loss})
        sinks.close()
    scalars = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("train/loss")
    assert [(e.step, e.value) for e in scalars] == [(1, 1.0), (2, 1.0), (3, 9.0), (4, 9.0)]


def test_what_is_not_a_number_is_null_in_jsonl(tmp_path: Path) -> None:
    sink = Jsonl(tmp_path / "metrics.jsonl")
    sink.write(RECORD | {"loss": float("nan"), "grad_norm": float("inf")})
    sink.close()
    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=pytest.fail)
    assert line["loss"] is None and line["grad_norm"] is None


def test_a_line_torn_by_a_kill_does_not_spoil_the_next_one(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "train", "st')
    sink = Jsonl(path)
    sink.write(RECORD)
    sink.close()
    assert json.loads(path.read_text().splitlines()[-1]) == RECORD


def test_the_console_writes_plain_lines_where_there_is_no_terminal() -> None:
    stream = io.StringIO()
    console = Console(make_config(), first_step=0, stream=stream)
    console.write(RECORD)
    console.write(EVAL)
    console.close()
    first, second = stream.getvalue().splitlines()
    assert first.startswith("step 3/10  loss 2.5000  lr 1.00e-03  norm 0.50  1,234 tokens/s  0:00:0")
    assert second == "step 3: validation loss 2.0000, perplexity 7.39"


def test_the_console_draws_a_bar_on_a_terminal() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    console = Console(make_config(), first_step=0, stream=stream)
    console.write(RECORD)
    console.close()
    assert "3/10" in stream.getvalue() and "1,234 tokens/s" in stream.getvalue()


def test_an_unknown_device_has_no_mfu_and_memory_is_that_of_the_process() -> None:
    assert mfu(1e9, 1e3, torch.device("cpu")) is None
    before = peak_memory_gib(torch.device("cpu"))
    held = torch.ones(64 * 2**20)
    assert peak_memory_gib(torch.device("cpu")) >= max(before, 0.25)
    assert held.sum() > 0


def test_mfu_is_of_the_named_devices_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    assert mfu(1e9, 156e3, torch.device("cuda")) == pytest.approx(0.5)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA GeForce")
    assert mfu(1e9, 156e3, torch.device("cuda")) is None
