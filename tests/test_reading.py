"""Runs over several sources and stages: what they read, what they count, what may change when they go on."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from mamba_pretrain import train
from mamba_pretrain.build import TrainState, build
from mamba_pretrain.checkpoint import CheckpointError
from mamba_pretrain.config import ConfigError, load
from mamba_pretrain.data.dataset import open_split
from mamba_pretrain.data.mixture import RESOLUTION
from mamba_pretrain.data.shards import ShardError
from mamba_pretrain.reading import open_reading
from mamba_pretrain.saver import Saver
from mamba_pretrain.train import run, steps
from tests.helpers.corpora import make_dataset
from tests.helpers.mixtures import STAGES, STEPS, advance, assert_adds_up, make_sources, mixed_config
from tests.helpers.runs import OPTIONS, records, small_config


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_sources(tmp_path_factory.mktemp("sources"))


def test_what_is_read_adds_up_over_stages_sources_and_a_resume(paths: dict[str, Path], tmp_path: Path) -> None:
    whole = build(mixed_config(paths, tmp_path / "whole"))
    states = {}
    for _ in steps(whole):
        assert_adds_up(whole)
        states[whole.state.step] = TrainState(**vars(whole.state) | {"source_tokens": {**whole.state.source_tokens}})
    assert whole.state.samples == 4 * 8 + 7 * 4
    assert whole.state.masked_tokens > 0
    halved = build(mixed_config(paths, tmp_path / "halved"))
    advance(halved, 6)
    Saver(halved).save()
    resumed = build(mixed_config(paths, tmp_path / "halved", "checkpoint.resume=auto"))
    assert resumed.state == states[6]
    advance(resumed, 2)
    assert resumed.state == states[8]


def test_records_hold_the_counts_and_every_sources_loss(paths: dict[str, Path], tmp_path: Path) -> None:
    assert run(mixed_config(paths, tmp_path / "run", "eval.every_steps=5")) == 0
    last = records(tmp_path / "run")[STEPS]
    assert last["tokens"] == last["trained_tokens"] + last["masked_tokens"] + last["padding_tokens"]
    assert last["tokens"] == last["tokens/web"] + last["tokens/code"]
    assert "source_tokens" not in last
    scored = records(tmp_path / "run", "eval")[STEPS]
    low, high = sorted([scored["loss/web"], scored["loss/code"]])
    assert low < scored["loss"] < high
    assert scored["perplexity"] == pytest.approx(math.exp(scored["loss"]))


def test_targets_of_skipped_steps_are_counted_apart(
    paths: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clean = train._loss_sum
    this = build(mixed_config(paths, tmp_path / "run"))
    monkeypatch.setattr(
        train, "_loss_sum", lambda run, batch: clean(run, batch) * (math.inf if run.state.step == 1 else 1)
    )
    advance(this, 3)
    assert_adds_up(this)
    assert 0 < this.state.skipped_tokens < this.state.trained_tokens


def test_a_state_from_before_tokens_were_counted_goes_on_counting(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text(json.dumps({"step": 3, "samples": 24, "tokens": 768, "epoch": 0}))
    state = TrainState.read(tmp_path)
    state.count(256, 200, 0, skipped=False)
    assert (state.uncounted_tokens, state.trained_tokens, state.masked_tokens, state.tokens) == (768, 200, 56, 1024)
    (tmp_path / "state.json").write_text("{")
    with pytest.raises(CheckpointError, match="state.json cannot be read"):
        TrainState.read(tmp_path)


def test_one_dataset_is_identified_as_before_there_were_mixtures(dataset: Path, tmp_path: Path) -> None:
    config = small_config(dataset, tmp_path)
    assert open_reading(config).identity(config, 100) == {
        "data": open_split(dataset, "train")[1].fingerprint("train"),
        "seq_len": 32,
        "reset_documents": True,
        "seed": 0,
        "order_version": 1,
    }


@pytest.fixture(scope="module")
def stopped(paths: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was saved within its second stage, of the longest rows."""
    directory = tmp_path_factory.mktemp("stopped") / "run"
    this = build(mixed_config(paths, directory))
    advance(this, 6)
    Saver(this).save()
    return directory


@pytest.mark.parametrize(
    ("stages", "named"),
    [
        ("{}, {from_tokens: 1000, weights: {code: 4}, seq_len: 64}", "stages.1.shares.code was '3/5', is '2/3'"),
        ("{}, {from_tokens: 700, weights: {code: 3}, seq_len: 64}", "stages.0.end_sample was 32, is 24"),
        ("{}, {from_tokens: 1000, weights: {code: 3}}", "seq_len was 64, is 32"),
        ("{}", "stages.1.first_sample was 32, is None"),
    ],
)
def test_stages_that_have_begun_may_not_change(stages: str, named: str, paths: dict[str, Path], stopped: Path) -> None:
    with pytest.raises(CheckpointError, match=named):
        build(mixed_config(paths, stopped, "checkpoint.resume=auto", stages=f"data.stages=[{stages}]"))


def test_later_stages_may_change_and_that_is_said(
    paths: dict[str, Path], stopped: Path, caplog: pytest.LogCaptureFixture
) -> None:
    later = STAGES.replace("2048, weights: {web: 0}", "2560, weights: {code: 0}")
    with caplog.at_level("WARNING", logger="mamba_pretrain"):
        resumed = build(mixed_config(paths, stopped, "checkpoint.resume=auto", stages=later))
    assert "resuming with another data.stages: was" in caplog.text
    assert [stage.first for stage in resumed.reading.mixture.stages] == [0, 32, 56]


@pytest.fixture(scope="module")
def stopped_between(paths: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was saved when its first stage had ended, before the first step of its second."""
    directory = tmp_path_factory.mktemp("stopped") / "run"
    this = build(mixed_config(paths, directory))
    advance(this, 4)
    assert this.state.samples == this.reading.mixture.stages[1].first
    Saver(this).save()
    return directory


def test_a_stage_may_change_until_its_first_step(
    paths: dict[str, Path], stopped: Path, stopped_between: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = STAGES.replace("{code: 3}", "{code: 4}")
    with caplog.at_level("WARNING", logger="mamba_pretrain"):
        resumed = build(mixed_config(paths, stopped_between, "checkpoint.resume=auto", stages=other))
    assert "resuming with another data.stages: was" in caplog.text
    advance(resumed, 1)
    assert resumed.state.samples == 32 + 4
    with pytest.raises(CheckpointError, match="stages.1.shares.code was '3/5', is '2/3'"):
        build(mixed_config(paths, stopped, "checkpoint.resume=auto", stages=other))


def test_a_stage_that_has_ended_may_not_change(paths: dict[str, Path], stopped_between: Path) -> None:
    other = STAGES.replace("[{}", "[{weights: {code: 2}}")
    with pytest.raises(CheckpointError, match="stages.0.shares.code was '1/3', is '1/2'"):
        build(mixed_config(paths, stopped_between, "checkpoint.resume=auto", stages=other))


def test_changed_data_of_any_source_is_refused(paths: dict[str, Path], stopped: Path, tmp_path: Path) -> None:
    other = make_dataset(tmp_path / "code", n_documents=41, seed=8)
    with pytest.raises(CheckpointError, match="data.code was '"):
        build(mixed_config({"web": paths["web"], "code": other}, stopped, "checkpoint.resume=auto"))


def test_a_batch_of_another_size_is_refused_where_stages_would_not_meet_steps(
    paths: dict[str, Path], stopped: Path
) -> None:
    words = ("checkpoint.resume=auto", "train.batch_tokens=512")
    with pytest.raises(ConfigError, match="keep the run's train.batch_tokens"):
        build(mixed_config(paths, stopped, *words, stages=STAGES.replace("1000", "1024")))


def test_a_run_of_one_dataset_may_go_on_with_more(paths: dict[str, Path], tmp_path: Path) -> None:
    alone = build(small_config(paths["web"], tmp_path / "run", "train.steps=8"))
    advance(alone, 3)
    Saver(alone).save()
    stages = "data.stages=[{}, {from_tokens: 1024, weights: {code: 1}}]"
    resumed = build(
        mixed_config(paths, tmp_path / "run", "checkpoint.resume=auto", "train.steps=8", stages=stages, code="0")
    )
    assert (resumed.state.samples, resumed.state.source_tokens) == (24, {"code": 0, "web": 768})
    advance(resumed, 5)
    assert_adds_up(resumed)
    assert resumed.state.source_tokens["code"] > 0


def test_tokens_by_source_add_up_after_a_source_was_renamed(paths: dict[str, Path], tmp_path: Path) -> None:
    stages = "data.stages=[{weights: {code: 0}}, {from_tokens: 1024, weights: {code: 1}}]"
    before = build(mixed_config(paths, tmp_path / "run", stages=stages))
    advance(before, 2)
    assert before.state.source_tokens == {"code": 0, "web": 512}
    Saver(before).save()
    sources = f"data.sources=[{{path: {paths['web']}, weight: 2}}, {{path: {paths['code']}, name: github, weight: 1}}]"
    words = (sources, "checkpoint.resume=auto")
    resumed = build(mixed_config(paths, tmp_path / "run", *words, stages=stages.replace("code", "github")))
    assert resumed.state.source_tokens == {"github": 0, "web": 512}
    advance(resumed, STEPS - 2)
    assert_adds_up(resumed)


def test_the_order_of_sources_in_a_file_has_no_meaning(paths: dict[str, Path], tmp_path: Path) -> None:
    one, other = (open_reading(mixed_config(chosen, tmp_path)) for chosen in (paths, dict(reversed([*paths.items()]))))
    for rows in zip(one.mixture.locate(np.arange(60)), other.mixture.locate(np.arange(60)), strict=True):
        assert rows[0].tolist() == rows[1].tolist()


@pytest.mark.parametrize(("max_epochs", "refused"), [(1.999, True), (2, False)])
def test_a_source_read_more_often_than_allowed_is_refused_with_numbers(
    tmp_path: Path, max_epochs: float, refused: bool
) -> None:
    """Four steps of eight rows, of a dataset that has sixteen."""
    path = make_dataset(tmp_path / "code", documents=["a" * (16 * 32 - 1)], fractions=(1.0, 0.0, 0.0))
    sources = f"data.sources=[{{path: {path}, max_epochs: {max_epochs}}}]"
    words = ["data.validation_split=null", f"run_dir={tmp_path / 'run'}", "train.steps=4"]
    config = load([], [*OPTIONS, sources, *words])
    if not refused:
        assert open_reading(config).check(config, 0, 0) == 4 * 8
        return
    with pytest.raises(ConfigError, match=r"reads 2\.000 epochs of code in 4 steps, its max_epochs is 1\.999"):
        run(config)
    assert not (tmp_path / "run").exists()


def test_a_source_of_another_tokenizer_is_refused(paths: dict[str, Path], tmp_path: Path) -> None:
    words = Tokenizer(models.WordLevel({"<|endoftext|>": 0, "the": 1, "river": 2}, unk_token="river"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.add_special_tokens(["<|endoftext|>"])
    words.save(str(tmp_path / "words.json"))
    other = make_dataset(tmp_path / "code", tokenizer=tmp_path / "words.json")
    with pytest.raises(ConfigError, match=r"web was made with another tokenizer .* build all sources with the same"):
        open_reading(mixed_config({"web": paths["web"], "code": other}, tmp_path))


def test_every_missing_dataset_is_named(paths: dict[str, Path], tmp_path: Path) -> None:
    missing = {name: tmp_path / name for name in ("web", "code")}
    with pytest.raises(ShardError) as caught:
        open_reading(mixed_config(missing, tmp_path / "run"))
    assert all(f"no dataset in {path}" in str(caught.value) for path in missing.values())


def test_one_dataset_under_two_names_is_refused(paths: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(paths["web"], tmp_path / "code")
    config = mixed_config({"web": paths["web"], "code": tmp_path / "code"}, tmp_path / "run")
    with pytest.raises(ConfigError, match="code and web are the same data.*: name it once"):
        open_reading(config)


def test_a_stage_after_the_runs_end_is_said(
    paths: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = mixed_config(paths, tmp_path / "run", "train.steps=8")
    open_reading(config).check(config, 0, 0)
    assert "data.stages[2] begins at sample 48, the run ends before it, at 48" in caplog.text
    assert "data.stages[1]" not in caplog.text


def test_without_weights_sources_are_read_by_their_size(paths: dict[str, Path], tmp_path: Path) -> None:
    reading = open_reading(mixed_config(paths, tmp_path, stages="data.stages=[]", web="null", code="null"))
    sizes = [source.train.n_tokens for source in reading.sources]
    for share, size in zip(reading.mixture.stages[0].shares, sizes, strict=True):
        assert float(share) == pytest.approx(size / sum(sizes), abs=1 / RESOLUTION)


def test_a_source_without_validation_is_said_and_left_out(
    paths: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bare = make_dataset(tmp_path / "code", fractions=(1.0, 0.0, 0.0), seed=4)
    with caplog.at_level("WARNING", logger="mamba_pretrain"):
        reading = open_reading(mixed_config({"web": paths["web"], "code": bare}, tmp_path))
    assert [source.validation is None for source in reading.sources] == [True, False]
    assert "code: no window of 64 in a split 'validation': it is not validated on" in caplog.text
    with pytest.raises(ConfigError, match="no source has a window of 64 tokens in its split 'validation'"):
        other = make_dataset(tmp_path / "web", fractions=(1.0, 0.0, 0.0), seed=5)
        both = f"data.sources=[{{path: {other}}}, {{path: {bare}}}]"
        open_reading(mixed_config(paths, tmp_path, both, stages="data.stages=[{}, {from_tokens: 300, seq_len: 64}]"))
