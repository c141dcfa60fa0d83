"""Runs over packed documents: what they count, and to what they hold the packs that they read."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from data_prep import pack_shards
from mamba_pretrain.build import build
from mamba_pretrain.checkpoint import CheckpointError
from mamba_pretrain.config import load
from mamba_pretrain.data.dataset import verify
from mamba_pretrain.data.manifest import Manifest
from mamba_pretrain.data.packs import Pieces, pack_path, write_pack
from mamba_pretrain.data.shards import ShardError
from mamba_pretrain.reading import open_reading
from mamba_pretrain.saver import Saver
from tests.helpers.corpora import make_dataset
from tests.helpers.mixtures import STEPS, advance, assert_adds_up, make_sources, mixed_config
from tests.helpers.runs import OPTIONS, small_config


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """With packs for every stage of `mixed_config`."""
    found = make_sources(tmp_path_factory.mktemp("sources"))
    for path in found.values():
        for length in ("32", "64"):
            for how in ("best_fit", "documents"):
                assert pack_shards.main([str(path), "--seq-len", length, "--how", how]) == 0
    return found


@pytest.fixture
def own(paths: dict[str, Path], tmp_path: Path) -> dict[str, Path]:
    """A copy of `paths` for a test that changes packs."""
    return {name: shutil.copytree(path, tmp_path / name) for name, path in paths.items()}


def damage(pack: Path) -> None:
    good = pack.read_bytes()
    pack.write_bytes(good[:-40] + bytes(8) + good[-32:])


def replace_pack(path: Path, seq_len: int) -> None:
    """By another one, of a single row, that is whole."""
    pieces = Pieces(np.array([1]), np.array([0]), np.array([seq_len], np.int32))
    sha256 = Manifest.read(path).splits["train"].files["train.idx"].sha256
    write_pack(pack_path(path, "train", "best_fit", seq_len), "best_fit", seq_len, sha256, 1, 0, [pieces])


def test_padding_of_packed_documents_is_counted(paths: dict[str, Path], tmp_path: Path) -> None:
    """With rows of several lengths, each length with packs of its own."""
    for how in ("best_fit", "documents"):
        this = build(mixed_config(paths, tmp_path / how, f"data.packing={how}"))
        advance(this, STEPS)
        assert_adds_up(this)
        assert this.state.padding_tokens > 0
        assert this.identity["packing"] == how


def test_a_pack_that_changed_is_refused_and_named(tmp_path: Path) -> None:
    """Damaged: by its own hash, at start-up and by verify. Whole, but another: by a resume."""
    path = make_dataset(tmp_path / "web", n_documents=70)
    assert pack_shards.main([str(path), "--seq-len", "32"]) == 0
    words = ["data.packing=best_fit", "train.batch_tokens=256"]
    this = build(small_config(path, tmp_path / "run", *words))
    advance(this, 2)
    Saver(this).save()
    pack = pack_path(path, "train", "best_fit", 32)
    damage(pack)
    for problem in verify(path):
        assert "train.best_fit-32.pack is not what was written" in problem
    assert verify(path)
    with pytest.raises(ShardError, match="is not what was written, it has another sha256: run python -m data_prep"):
        build(small_config(path, tmp_path / "run", *words, "checkpoint.resume=auto"))
    replace_pack(path, 32)
    with pytest.raises(CheckpointError, match=r"packs.web in rows of 32 was '[0-9a-f]{64}', is '[0-9a-f]{64}'"):
        build(small_config(path, tmp_path / "run", *words, "checkpoint.resume=auto"))


@pytest.mark.parametrize("seq_len", [32, 64])
def test_a_damaged_pack_is_refused_though_its_split_is_too_large_to_be_hashed(
    own: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture, seq_len: int
) -> None:
    """At start-up, of later stages, too; data.verify_gib bounds what is hashed of packs as it does of splits."""
    pack = pack_path(own["web"], "train", "best_fit", seq_len)
    damage(pack)
    size = pack.stat().st_size
    words = ("data.packing=best_fit", f"data.verify_gib={size / 2**30!r}")
    message = f"{pack} is not what was written, it has another sha256: run python -m data_prep.pack_shards {own['web']}"
    with pytest.raises(ShardError, match=f"^{message} --seq-len {seq_len} --how best_fit --split train$"):
        open_reading(mixed_config(own, tmp_path / "run", *words))
    assert "train: 0.0 GiB, more than" in caplog.text
    open_reading(mixed_config(own, tmp_path / "run", *words[:1], f"data.verify_gib={(size - 1) / 2**30!r}"))


def test_the_packs_of_a_stage_may_change_until_its_first_step(own: dict[str, Path], tmp_path: Path) -> None:
    between, within = tmp_path / "between", tmp_path / "within"
    words = ("data.packing=best_fit",)
    this = build(mixed_config(own, within, *words))
    advance(this, 4)
    assert this.state.samples == this.reading.mixture.stages[1].first
    Saver(this).save()
    shutil.copytree(within, between)
    advance(this, 1)
    Saver(this).save()
    replace_pack(own["code"], 64)
    assert build(mixed_config(own, between, *words, "checkpoint.resume=auto")).state.step == 4
    with pytest.raises(CheckpointError, match=r"packs.code in rows of 64 was '[0-9a-f]{64}', is '[0-9a-f]{64}'\. "):
        build(mixed_config(own, within, *words, "checkpoint.resume=auto"))
    replace_pack(own["code"], 32)
    with pytest.raises(CheckpointError, match=r"packs.code in rows of 32 was '[0-9a-f]{64}', is '[0-9a-f]{64}'\. "):
        build(mixed_config(own, between, *words, "checkpoint.resume=auto"))


def test_rows_of_packs_need_not_divide_each_other(paths: dict[str, Path], tmp_path: Path) -> None:
    assert pack_shards.main([str(paths["web"]), "--seq-len", "24"]) == 0
    words = ["data.packing=best_fit", "train.batch_tokens=768", "train.micro_batch_size=3", "train.steps=3"]
    stages = "data.stages=[{}, {from_tokens: 768, seq_len: 24}]"
    run = build(load([], [*OPTIONS, *words, stages, f"data.path={paths['web']}", f"run_dir={tmp_path / 'run'}"]))
    advance(run, 3)
    assert run.state.tokens == 3 * 768
