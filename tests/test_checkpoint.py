from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import resource
import signal
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mamba_pretrain import checkpoint
from mamba_pretrain.checkpoint import CheckpointError
from mamba_pretrain.config import Config, ModelConfig, TrainConfig
from mamba_pretrain.files import sha256_of

CONFIG = Config(model=ModelConfig(d_model=16, n_layer=1, vocab_size=16), train=TrainConfig(steps=1))


def save(directory: Path, step: int, elements: int = 100, overwrite: bool = False) -> Path:
    """A small checkpoint with every kind of file a real one has."""

    def write_files(target: Path) -> None:
        save_file({"weight": torch.full((elements,), float(step))}, target / checkpoint.MODEL)
        save_file({"exp_avg.weight": torch.zeros(elements)}, target / "optimizer.safetensors")
        (target / checkpoint.STATE).write_text(json.dumps({"step": step}))

    target = checkpoint.step_directory(directory, step)
    checkpoint.write(target, CONFIG, {"kind": "checkpoint", "step": step}, write_files, overwrite=overwrite)
    return target


def kill_at(event: int, function: object, *arguments: object) -> None:
    """Runs `function` and kills the process at its n-th change of the file system."""
    seen = [0]

    def hook(name: str, details: tuple[object, ...]) -> None:
        writes = name == "open" and any(flag in str(details[1]) for flag in "wax")
        if writes or name in ("os.rename", "os.mkdir", "os.remove", "os.rmdir"):
            seen[0] += 1
            if seen[0] == event:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    function(*arguments)  # type: ignore[operator]


def run_and_kill(event: int, function: object, *arguments: object) -> bool:
    """Whether the process was killed: False once it has fewer events."""
    process = multiprocessing.get_context("fork").Process(target=kill_at, args=(event, function, *arguments))
    process.start()
    process.join(60)
    assert process.exitcode in (0, -signal.SIGKILL), process.exitcode
    return process.exitcode != 0


def save_and_rotate(directory: Path, step: int) -> None:
    save(directory, step)
    checkpoint.rotate(directory, keep_last=2, keep_every_steps=0)


def test_a_kill_between_any_two_files_leaves_the_earlier_checkpoints_and_nothing_half_written(tmp_path: Path) -> None:
    kills = 0
    for event in range(1, 100):
        directory = tmp_path / str(event)
        for step in (1, 2):
            save(directory, step)
        killed = run_and_kill(event, save_and_rotate, directory, 3)
        names = [p.name for p in checkpoint.checkpoints(directory)]
        assert names[-1] in ("step_00000002", "step_00000003")
        assert names[-2:][0] in ("step_00000001", "step_00000002")
        for name in names:
            assert checkpoint.verify(directory / name)["step"] == int(name[-8:])
        kills += killed
        if not killed:
            assert names == ["step_00000002", "step_00000003"]
            break
        checkpoint.clean(directory)  # what the resumed run does
        save_and_rotate(directory, 4)
        assert [p.name for p in checkpoint.checkpoints(directory)][-1] == "step_00000004"
        assert all(p in checkpoint.checkpoints(directory) for p in directory.iterdir())
    assert kills >= 8, "a save has at least a directory, five files and a rename"


def test_a_directory_without_manifest_is_no_checkpoint(tmp_path: Path) -> None:
    save(tmp_path, 1)
    broken = save(tmp_path, 2)
    (broken / checkpoint.MANIFEST).unlink()
    assert [p.name for p in checkpoint.checkpoints(tmp_path)] == ["step_00000001"]
    with pytest.raises(CheckpointError, match=r"no manifest.json: .*complete ones beside it: step_00000001"):
        checkpoint.load_model(broken)
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        checkpoint.verify(tmp_path / "step_00000009")


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda p: (p / checkpoint.MODEL).unlink(), "model.safetensors is missing"),
        (lambda p: os.truncate(p / checkpoint.MODEL, 100), "model.safetensors has 100 bytes, the manifest says"),
        (lambda p: flip(p / checkpoint.MODEL), "model.safetensors has sha256"),
        (lambda p: flip(p / checkpoint.CONFIG), "config.yaml has sha256"),
        (lambda p: (p / checkpoint.MANIFEST).write_text("{"), "is not a manifest"),
        (lambda p: (p / checkpoint.MANIFEST).write_text('{"format": "x", "version": 1, "files": {}}'), "of format 'x'"),
    ],
)
def test_damage_is_named(tmp_path: Path, damage: object, expected: str) -> None:
    target = save(tmp_path, 1)
    damage(target)  # type: ignore[operator]
    with pytest.raises(CheckpointError, match=expected):
        checkpoint.load_model(target)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_a_full_disk_is_named_and_leaves_the_earlier_checkpoint(tmp_path: Path) -> None:
    save(tmp_path, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(CheckpointError, match=r"step_00000002 was not written, the disk is full"):
            save(tmp_path, 2, elements=100_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000001"]
    checkpoint.verify(tmp_path / "step_00000001")


def test_a_file_that_another_rank_wrote_and_is_not_here_gets_no_manifest(tmp_path: Path) -> None:
    """A network file system may show rank 0 an older state of the directory."""
    written = {"model-00001-of-00002.safetensors": {"bytes": 5, "sha256": "0" * 64}}
    for content, found in ((None, "no"), (b"123", "3")):
        if content is not None:
            (tmp_path / "model-00001-of-00002.safetensors").write_bytes(content)
        with pytest.raises(CheckpointError, match=f"has {found} bytes as rank 0 sees it, 5 were written"):
            checkpoint._complete(tmp_path, Config(), {}, written)
        assert not (tmp_path / checkpoint.MANIFEST).exists()


def test_an_existing_checkpoint_is_replaced_only_when_asked(tmp_path: Path) -> None:
    save(tmp_path, 1)
    with pytest.raises(CheckpointError, match="exists"):
        save(tmp_path, 1)
    save(tmp_path, 1, elements=7, overwrite=True)
    assert checkpoint.load_model(tmp_path / "step_00000001")[1]["weight"].numel() == 7


def test_rotation_keeps_the_last_and_every_nth(tmp_path: Path) -> None:
    for step in range(1, 8):
        save(tmp_path, step)
    checkpoint.rotate(tmp_path, keep_last=2, keep_every_steps=3)
    assert [int(p.name[-8:]) for p in checkpoint.checkpoints(tmp_path)] == [3, 6, 7]


def test_reading_never_unpickles(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "exploded"),)

    target = save(tmp_path, 1)
    (target / checkpoint.MODEL).write_bytes(pickle.dumps({"weight": Bomb()}))
    manifest = json.loads((target / checkpoint.MANIFEST).read_text())
    path = target / checkpoint.MODEL
    manifest["files"][checkpoint.MODEL] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
    (target / checkpoint.MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="is not a safetensors file"):
        checkpoint.load_model(target)
    assert not (tmp_path / "exploded").exists()


def test_every_file_is_on_disk_before_the_manifest_vouches_for_it_and_the_manifest_before_the_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    real_fsync, real_rename, real_write = os.fsync, Path.rename, Path.write_text

    def fsync(descriptor: int) -> None:
        events.append(f"sync {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name}")
        real_fsync(descriptor)

    def rename(path: Path, target: Path) -> Path:
        events.append(f"rename {Path(target).name}")
        return real_rename(path, target)

    def write_text(path: Path, text: str) -> int:
        events.append(f"write {path.name}")
        return real_write(path, text)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "rename", rename)
    monkeypatch.setattr(Path, "write_text", write_text)
    save(tmp_path, 1)
    manifest, renamed = events.index("write manifest.json"), events.index("rename step_00000001")
    for name in ("model.safetensors", "optimizer.safetensors", "state.json", "config.yaml"):
        assert events.index(f"sync {name}") < manifest, events
    assert manifest < events.index("sync manifest.json") < renamed < events.index(f"sync {tmp_path.name}")


def test_checkpoints_of_the_first_version_are_read(tmp_path: Path) -> None:
    path = save(tmp_path, 1) or tmp_path / "step_00000001"
    manifest = json.loads((path / checkpoint.MANIFEST).read_text())
    (path / checkpoint.MANIFEST).write_text(json.dumps(manifest | {"version": 1}))
    assert checkpoint.load_model(path)[2]["version"] == 1
    (path / checkpoint.MANIFEST).write_text(json.dumps(manifest | {"version": 3}))
    with pytest.raises(CheckpointError, match="version 3"):
        checkpoint.read_manifest(path)
