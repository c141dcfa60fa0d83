"""Directories that are either complete or absent: checkpoints of a run, and exported or imported models.

    runs/x/checkpoints/step_00000100/
        model.safetensors       parameters by name, fp32       } of several ranks: model-00000-of-00004.safetensors
        optimizer.safetensors   Adam's moments and scalars     } and so on, each with the pieces its rank holds
        state.json              TrainState: integers                tokenizer.model or tokenizer.json, when there is one
        config.yaml             the resolved configuration
        manifest.json           format, version, what the run was, size and sha256 of every other file; written last

The layout is the same for every engine, and no reader needs to know which one wrote it: tensors by name, in flat pieces
(`mamba_pretrain.pieces`). A directory is written under a temporary name, every file is fsynced, the manifest comes
last, and a rename makes it visible. A kill of any rank at any moment leaves the earlier directories as they were.
Reading verifies every hash, and nothing is ever unpickled.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from mamba_pretrain import __version__
from mamba_pretrain import config as config_module
from mamba_pretrain.config import Config
from mamba_pretrain.distributed import engine
from mamba_pretrain.distributed.ranks import ALONE, Ranks
from mamba_pretrain.files import atomic_directory, sha256_of, sync
from mamba_pretrain.pieces import Piece, Pieces, PiecesError, write_pieces

FORMAT, VERSION = "mamba_pretrain.checkpoint", 2
READABLE = (1, 2)  # version 1 has all tensors whole, in one file each, which version 2 may have too
MODEL = f"{engine.MODEL}.safetensors"
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
        _complete(directory, config, facts, {})


def _complete(directory: Path, config: Config, facts: dict[str, Any], known: dict[str, Any]) -> None:
    """Adds the configuration and the manifest, for which files are hashed unless `known` has their facts."""
    config_module.save(config, directory / CONFIG)
    files: dict[str, Any] = {}
    for name, facts_of in known.items():
        found = (directory / name).stat().st_size if (directory / name).is_file() else None
        if found != facts_of["bytes"]:
            raise CheckpointError(
                f"{directory / name} has {found or 'no'} bytes as rank 0 sees it, {facts_of['bytes']:,} were written: "
                "run_dir must lie on a file system that all ranks share"
            )
    for path in sorted(directory.iterdir()):
        files[path.name] = known.get(path.name) or {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        sync(path)  # before the manifest that vouches for it
    manifest = {"format": FORMAT, "version": VERSION, "made_by": f"mamba_pretrain {__version__}", **facts}
    (directory / MANIFEST).write_text(json.dumps({**manifest, "files": files}, indent=1) + "\n")


class Save:
    """A checkpoint on its way to disk: every rank writes its pieces, at once or in a thread, then all `commit`.

    There is no talk among ranks but in the constructor and in `commit`, which all of them enter together: what a
    thread does never interleaves with the training's own communication.
    """

    def __init__(self, target: Path, ranks: Ranks, state: dict[str, list[Piece]], *, background: bool) -> None:
        """Raises CheckpointError on every rank where one cannot begin. With `background`, `state` must be a copy."""
        self.target, self.ranks = target, ranks
        self._opened = contextlib.ExitStack()  # rank 0 holds the directory open until the end
        self._files: dict[str, Any] = {}
        self._error: Exception | None = None
        with ranks.together():
            scratch = None
            if ranks.first:
                scratch = self._opened.enter_context(atomic_directory(target, error=CheckpointError))
        self.directory = Path(ranks.broadcast(str(scratch)))
        self._thread = threading.Thread(target=self._write, args=(state,), name="checkpoint", daemon=True)
        if background:
            self._thread.start()
        else:
            self._write(state)

    def _write(self, state: dict[str, list[Piece]]) -> None:
        rank, world = self.ranks.rank, self.ranks.world
        try:
            if not self.directory.is_dir():
                raise CheckpointError(
                    f"{self.directory}, made by rank 0, is not there for rank {rank}: run_dir must lie on a file "
                    "system that all ranks share"
                )
            for part, pieces in state.items():
                name = f"{part}.safetensors" if world == 1 else f"{part}-{rank:05}-of-{world:05}.safetensors"
                self._files[name] = write_pieces(self.directory / name, [piece.share() for piece in pieces])
        except Exception as error:
            self._error = error

    @property
    def written(self) -> bool:
        """Whether this rank's files are on disk, or failed to get there."""
        return not self._thread.is_alive()

    def commit(self, config: Config, facts: dict[str, Any], write_files: Callable[[Path], None]) -> None:
        """Waits for all ranks' files and makes the checkpoint visible; or raises on every rank, and nothing is left."""
        if self._thread.ident is not None:
            self._thread.join()
        told = self.ranks.gather((self._files, self._error and (f"{self._error}", getattr(self._error, "errno", None))))
        failed = [(f"rank {rank}: {error[0]}", error[1]) for rank, (_, error) in enumerate(told) if error]
        with self.ranks.together(), self._opened:
            if failed and self.ranks.first:
                # Through the open directory's hands, which name a full disk and take the half-written away.
                text, number = failed[0]
                other = OSError(number, text) if number else CheckpointError(f"{self.target} was not written: {text}")
                raise self._error or other
            if self.ranks.first:
                write_files(self.directory)
                _complete(self.directory, config, facts, {k: v for files, _ in told for k, v in files.items()})

    def abandon(self) -> None:
        """Takes what is written away, without the other ranks."""
        if self._thread.ident is not None:
            self._thread.join()
        with contextlib.suppress(_AbandonedError), self._opened:
            raise _AbandonedError


class _AbandonedError(Exception):
    pass


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
    if found[0] != FORMAT or found[1] not in READABLE:
        raise CheckpointError(f"{path} is of format {found[0]!r} version {found[1]}: expected {FORMAT!r} {VERSION}")
    return dict(manifest)


def verify(directory: Path, ranks: Ranks = ALONE) -> dict[str, Any]:
    """Checks every file against the manifest, which is returned. Raises CheckpointError naming all that differ.

    Ranks share the work; all of them raise.
    """
    manifest = read_manifest(directory)
    problems = []
    for name, due in list(manifest["files"].items())[ranks.rank :: ranks.world]:
        path = directory / name
        if not path.is_file():
            problems.append(f"{name} is missing")
        elif path.stat().st_size != due["bytes"]:
            problems.append(f"{name} has {path.stat().st_size} bytes, the manifest says {due['bytes']}")
        elif (found := sha256_of(path)) != due["sha256"]:
            problems.append(f"{name} has sha256 {found[:12]}..., the manifest says {due['sha256'][:12]}...")
    problems = [problem for part in ranks.gather(problems) for problem in part]
    with ranks.together():  # in which what all find is said once
        if problems:
            raise CheckpointError(f"{directory} is damaged: {'; '.join(problems)}{_complete_siblings(directory)}")
    return manifest


def open_part(directory: Path, manifest: dict[str, Any], part: str) -> Pieces:
    """The tensors of "model" or "optimizer", whichever ranks wrote them."""
    one_of_many = re.compile(rf"{part}(-\d+-of-\d+)?\.safetensors")
    names = sorted(name for name in manifest["files"] if one_of_many.fullmatch(name))
    if not names:
        raise CheckpointError(f"{directory} has no {part}.safetensors")
    of = {name.rpartition("-of-")[2] for name in names if "-of-" in name}
    if len(of) > 1 or any(int(count.partition(".")[0]) != len(names) for count in of):
        raise CheckpointError(f"{directory / MANIFEST} lists {', '.join(names)}: that is not one of each of its parts")
    try:
        return Pieces([directory / name for name in names])
    except PiecesError as error:
        raise CheckpointError(str(error)) from error


def load_model(directory: Path) -> tuple[Config, dict[str, Tensor], dict[str, Any]]:
    """Configuration, parameters by name (fp32, CPU) and manifest of a verified checkpoint or model directory."""
    manifest = verify(directory)
    pieces = open_part(directory, manifest, engine.MODEL)
    try:
        weights = {name: pieces.tensor(name) for name in pieces.shapes}
    except PiecesError as error:
        raise CheckpointError(f"{directory}: {error}") from error
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


def clean(directory: Path) -> list[Path]:
    """Removes what killed processes left half-written or half-deleted. Only for the process that alone writes here.

    What has a checkpoint's name and no manifest is not ours to delete, but in the way of a save: it is renamed to
    step_XXXXXXXX.incomplete-N, and returned.
    """
    for leftover in (*directory.glob("step_*.deleting"), *directory.glob("step_*.tmp-*")):
        shutil.rmtree(leftover)
    broken = [p for p in directory.glob("step_*") if _STEP.fullmatch(p.name) and not (p / MANIFEST).is_file()]
    aside = []
    for path in broken:
        free = (path.with_name(f"{path.name}.incomplete-{n}") for n in range(1, 10**6))
        aside.append(path.rename(next(p for p in free if not p.exists())))
    return aside


def _complete_siblings(directory: Path) -> str:
    others = [p.name for p in checkpoints(directory.parent) if p != directory]
    return f" (complete ones beside it: {', '.join(others)})" if others else " (there is no complete one beside it)"
