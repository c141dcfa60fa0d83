"""What a run checks and restores before its first step."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models

from mamba_pretrain import checkpoint
from mamba_pretrain.build import build
from mamba_pretrain.checkpoint import CheckpointError
from mamba_pretrain.config import ConfigError
from mamba_pretrain.data.dataset import open_split
from mamba_pretrain.data.shards import ShardError
from mamba_pretrain.export.convert import export_checkpoint
from mamba_pretrain.ops import dispatch
from mamba_pretrain.train import run, steps
from tests.helpers.corpora import make_dataset
from tests.helpers.runs import losses, small_config


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


def test_other_kernels_are_said_whoever_chose_them(
    dataset: Path, finished: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    noted = json.loads((finished / "checkpoints/step_00000012/manifest.json").read_text())["kernels"]
    chosen = noted["selective_scan"]
    other = "reference" if chosen != "reference" else "native"
    with caplog.at_level("WARNING", logger="mamba_pretrain"):
        build(small_config(dataset, finished, "checkpoint.resume=auto"))
        assert "other kernels" not in caplog.text
        monkeypatch.setenv("MAMBA_PRETRAIN_KERNELS", other)
        build(small_config(dataset, finished, "checkpoint.resume=auto"))
    assert f"selective_scan was on {chosen}, is on {other}" in caplog.text
    monkeypatch.delenv("MAMBA_PRETRAIN_KERNELS")
    dispatch.select("auto")


def test_another_runs_checkpoint_is_not_gone_on_from_beside_ones_own(
    dataset: Path, finished: Path, tmp_path: Path
) -> None:
    """Its steps would be rotated away as the oldest, and end at one that is there."""
    assert run(small_config(dataset, tmp_path / "run")) == 0
    other = finished / "checkpoints/step_00000012"
    with pytest.raises(CheckpointError, match=r"holds checkpoints up to step_00000012, and .* is none of them"):
        build(small_config(dataset, tmp_path / "run", f"checkpoint.resume={other}"))


def test_options_of_another_engine_are_said(dataset: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    build(small_config(dataset, tmp_path / "run", "zero.offload_optimizer=true"))
    assert "options of zero are set, which train.engine=single does not read" in caplog.text
    assert "options of fsdp" not in caplog.text


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


def save_tokenizer(path: Path) -> Path:
    tokenizer = Tokenizer(models.WordLevel({"<|endoftext|>": 0, "a": 1}, unk_token="a"))
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(path))
    return path


def test_a_dataset_of_another_tokenizer_or_a_larger_vocabulary_is_refused(dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has 257 tokens, model.vocab_size is 100: set model.vocab_size=257"):
        build(small_config(dataset, tmp_path / "run", "model.vocab_size=100"))
    other = save_tokenizer(tmp_path / "other.json")
    with pytest.raises(ShardError, match="was made with another tokenizer"):
        build(small_config(dataset, tmp_path / "run", f"data.tokenizer={other}"))


@pytest.mark.parametrize("given", ["data.path={0}", "data.sources=[{{path: {0}}}]"])
def test_weights_of_another_tokenizer_are_refused_until_it_is_said_to_mean_the_same(
    finished: Path, tmp_path: Path, given: str
) -> None:
    data = make_dataset(tmp_path / "data", tokenizer=save_tokenizer(tmp_path / "other.json"))
    export_checkpoint(finished / "checkpoints/step_00000012", tmp_path / "model", to="mamba_ssm")
    words = [f"train.init_from={tmp_path / 'model'}", "data.path=null", given.format(data)]
    said = rf"/model/tokenizer.bytes \(.* is not the tokenizer that made {data} .* say so with data.tokenizer={data}$"
    with pytest.raises(ConfigError, match=said):
        build(small_config(data, tmp_path / "run", *words))
    build(small_config(data, tmp_path / "run", *words, f"data.tokenizer={data}"))


def test_training_goes_on_from_an_exported_model_by_one_key(dataset: Path, finished: Path, tmp_path: Path) -> None:
    source = finished / "checkpoints/step_00000012"
    weights = load_file(source / checkpoint.MODEL)
    for form in ("hf", "mamba_ssm"):
        export_checkpoint(source, tmp_path / form, to=form)
        shape = ("model.d_model=null", "model.n_layer=null", "model.d_state=16", f"train.init_from={tmp_path / form}")
        started = build(small_config(dataset, tmp_path / f"from_{form}", *shape))
        assert started.config.model == dataclasses.replace(small_config(dataset, tmp_path).model, vocab_size=257)
        assert all(torch.equal(v, weights[k]) for k, v in started.engine.full_parameters())
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


def test_going_on_from_an_older_checkpoint_never_overwrites_newer_ones(
    dataset: Path, finished: Path, tmp_path: Path
) -> None:
    older = finished / "checkpoints/step_00000004"
    with pytest.raises(CheckpointError, match="also holds step_00000008, step_00000012, which going on"):
        build(small_config(dataset, finished, f"checkpoint.resume={older}"))
    assert run(small_config(dataset, tmp_path / "elsewhere", f"checkpoint.resume={older}")) == 0
    assert losses(tmp_path / "elsewhere") == {step: loss for step, loss in losses(finished).items() if step > 4}


def test_a_finished_run_says_that_nothing_is_left(
    dataset: Path, finished: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("WARNING", logger="mamba_pretrain"):
        assert run(small_config(dataset, finished, "checkpoint.resume=auto", "train.steps=6")) == 0
    assert "is at step 12 of 6: the run is longer than asked for" in caplog.text


def test_a_split_shorter_than_a_window_is_refused_before_anything_is_written(dataset: Path, tmp_path: Path) -> None:
    tokens = {split: open_split(dataset, split)[0].n_tokens for split in ("train", "validation")}
    assert tokens["train"] > tokens["validation"]
    for split, cure in (("train", "shorter data.seq_len"), ("validation", "data.validation_split=null")):
        length = tokens[split]
        options = (f"data.seq_len={length}", f"train.batch_tokens={length}", "train.micro_batch_size=1")
        with pytest.raises(ConfigError, match=rf"{split} has {length:,} tokens, fewer than one window .*{cure}"):
            run(small_config(dataset, tmp_path / "run", *options))
    assert not (tmp_path / "run").exists()


def test_a_run_without_validation_split_trains(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "dataset", fractions=(1.0, 0.0, 0.0))
    options = ("data.validation_split=null", "train.steps=2", "eval.every_steps=1")
    assert run(small_config(dataset, tmp_path / "run", *options)) == 0
