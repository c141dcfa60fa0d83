"""Directories that are either complete or absent: checkpoints of a run, and exported or imported models.

    runs/x/checkpoints/step_00000100/
        model.safetensors       parameters by name, fp32            (written by the engine)
        optimizer.safetensors   Adam's moments by parameter name    (written by the engine)
        state.json              TrainState: integers                tokenizer.model or tokenizer.json, when there is one
        config.yaml             the resolved configuration
        manifest.json           format, version, what the run was, size and sha256 of every other file; written last

A directory is written under a temporary name, every file is fsynced, the manifest comes last, and a rename makes it
visible. A kill at any moment leaves the earlier directories as they were. Reading verifies every hash, and nothing is
ever unpickled.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mamba_pretrain import __version__
from mamba_pretrain import config as config_module
from mamba_pretrain.config import Config
from mamba_pretrain.distributed.engine import MODEL as MODEL
from mamba_pretrain.files import atomic_directory, sha256_of, sync

FORMAT, VERSION = "mamba_pretrain.checkpoint", 1
MANIFEST, STATE, CONFIG = "manifest.json", "state.json", "config.yaml"
_STEP = re.compile(r"step_(\d{8})")


class CheckpointError(ValueError):
    """A checkpoint is missing, incomplete, damaged or of another run; the message says which and what to do."""


def write(
    target: Path,
    config: Config,
    facts: dict[str, Any],
    write_files: Callable[[Path], None],
    *,
    overwrite: bool = False,
) -> None:
    """Makes a complete checkpoint of what `write_files` puts into a directory, plus configuration and manifest.

    `facts` goes into the manifest as it is: step, data fingerprint and the like.
    """
    with atomic_directory(target, error=CheckpointError, overwrite=overwrite) as directory:
        write_files(directory)
        config_module.save(config, directory / CONFIG)
        files = {p.name: {"bytes": p.stat().st_size, "sha256": sha256_of(p)} for p in sorted(directory.iterdir())}
        for name in files:
            sync(directory / name)  # before the manifest that vouches for them
        manifest = {"format": FORMAT, "version": VERSION, "made_by": f"mamba_pretrain {__version__}", **facts}
        (directory / MANIFEST).write_text(json.dumps({**manifest, "files": files}, indent=1) + "\n")


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of a complete checkpoint, its files not yet verified."""
    path = directory / MANIFEST
    if not directory.is_dir():
        raise CheckpointError(f"no such checkpoint: {directory}")
    if not path.is_file():
        raise CheckpointError(
            f"{directory} has no {MANIFEST}: it is not a complete checkpoint. Use an earlier one"
            f"{_complete_siblings(directory)}."
        )
    try:
        manifest = json.loads(path.read_text())
        found = (manifest["format"], manifest["version"])
        manifest["files"].items()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is not a manifest ({error!r}){_complete_siblings(directory)}") from error
    if found != (FORMAT, VERSION):
        raise CheckpointError(f"{path} is of format {found[0]!r} version {found[1]}: expected {FORMAT!r} {VERSION}")
    return dict(manifest)


def verify(directory: Path) -> dict[str, Any]:
    """Checks every file against the manifest, which is returned. Raises CheckpointError naming all that differ."""
    manifest = read_manifest(directory)
    problems = []
    for name, due in manifest["files"].items():
        path = directory / name
        if not path.is_file():
            problems.append(f"{name} is missing")
        elif path.stat().st_size != due["bytes"]:
            problems.append(f"{name} has {path.stat().st_size} bytes, the manifest says {due['bytes']}")
        elif (found := sha256_of(path)) != due["sha256"]:
            problems.append(f"{name} has sha256 {found[:12]}..., the manifest says {due['sha256'][:12]}...")
    if problems:
        raise CheckpointError(f"{directory} is damaged: {'; '.join(problems)}{_complete_siblings(directory)}")
    return manifest


def load_model(directory: Path) -> tuple[Config, dict[str, Tensor], dict[str, Any]]:
    """Configuration, parameters by name (fp32, CPU) and manifest of a verified checkpoint or model directory."""
    manifest = verify(directory)
    try:
        weights = load_file(directory / MODEL)
    except SafetensorError as error:
        raise CheckpointError(f"{directory / MODEL} is not a safetensors file: {error}") from error
    return config_module.load([directory / CONFIG]), weights, manifest


def checkpoints(directory: Path) -> list[Path]:
    """Complete checkpoints (those with a manifest) in `directory`, oldest first."""
    found = directory.iterdir() if directory.is_dir() else ()
    return sorted(p for p in found if _STEP.fullmatch(p.name) and (p / MANIFEST).is_file())


def step_directory(directory: Path, step: int) -> Path:
    return directory / f"step_{step:08d}"


def rotate(directory: Path, *, keep_last: int, keep_every_steps: int) -> list[Path]:
    """Deletes all but the newest `keep_last` checkpoints and those at multiples of `keep_every_steps` (0: none).

    Each is renamed first, so that a kill leaves no half-deleted directory under a checkpoint's name.
    """
    doomed = [
        path
        for path in checkpoints(directory)[:-keep_last]
        if not (keep_every_steps and int(path.name.removeprefix("step_")) % keep_every_steps == 0)
    ]
    for path in doomed:
        shutil.rmtree(path.rename(path.with_name(f"{path.name}.deleting")))
    return doomed


def clean(directory: Path) -> None:
    """Removes what killed processes left half-written or half-deleted. Only for the process that alone writes here."""
    for leftover in (*directory.glob("step_*.deleting"), *directory.glob("step_*.tmp-*")):
        shutil.rmtree(leftover)


def _complete_siblings(directory: Path) -> str:
    others = [p.name for p in checkpoints(directory.parent) if p != directory]
    return f" (complete ones beside it: {', '.join(others)})" if others else " (there is no complete one beside it)"
