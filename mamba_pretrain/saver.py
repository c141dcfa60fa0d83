"""When a run saves itself, and what goes into a checkpoint; the writing is `checkpoint.Save`'s."""

from __future__ import annotations

import json
import logging
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mamba_pretrain import checkpoint
from mamba_pretrain.build import Run
from mamba_pretrain.pieces import Piece

log = logging.getLogger("mamba_pretrain")


class Saver:
    """One checkpoint at a time: written at once, or (checkpoint.asynchronous) from a snapshot while training goes on.

    All ranks call `save` and `commit` together; `due` and `waiting` are this rank's own.
    """

    def __init__(self, run: Run) -> None:
        self.run, self.directory, self.saved_at = run, run.directory / "checkpoints", time.monotonic()
        self._pending: tuple[checkpoint.Save, dict[str, Any], str] | None = None
        self._began = self._stalled = 0.0  # when the pending save began, and for how long it has kept training waiting
        self._buffers: dict[tuple[str, int], Tensor] = {}
        with run.ranks.together():
            for path in checkpoint.clean(self.directory) if run.ranks.first else ():
                log.warning("%s has no manifest, so it is no checkpoint; it was in the way and is set aside", path)

    def due_by_step(self) -> bool:
        every, step = self.run.config.checkpoint.every_steps, self.run.state.step
        return bool(every and step % every == 0)

    def due_by_time(self) -> bool:
        """By this rank's clock: rank 0's counts."""
        minutes = self.run.config.checkpoint.every_minutes
        return bool(minutes and time.monotonic() - self.saved_at > 60 * minutes)

    @property
    def written(self) -> bool:
        """Whether a save in the background is under way that has done all it can on this rank."""
        return self._pending is not None and self._pending[0].written

    def save(self) -> None:
        """Saves the run as it is now; one that is still being written is waited for first."""
        self.commit()
        began, run = time.monotonic(), self.run
        facts = {
            "kind": "checkpoint",
            "step": run.state.step,
            "identity": run.identity,
            "engine": run.config.train.engine,
            "ranks": run.ranks.world,
            "tokenizer": asdict(run.reading.manifest.tokenizer),
            "adds_bos": run.reading.manifest.adds_bos,
            "kernels": run.kernels,
            "config_digest": run.config.digest(),
        }
        state, background = run.engine.state(), run.config.checkpoint.asynchronous
        if background:
            state = {part: [self._snapshot(piece) for piece in pieces] for part, pieces in state.items()}
        target = checkpoint.step_directory(self.directory, run.state.step)
        pending = checkpoint.Save(target, run.ranks, state, background=background)
        self._pending = (pending, facts, json.dumps(asdict(run.state), indent=1) + "\n")
        self.saved_at = time.monotonic()
        self._began, self._stalled = began, self.saved_at - began
        if not background:
            self.commit()

    def commit(self) -> None:
        """Waits for the save that is under way, if any, and makes it a checkpoint."""
        if self._pending is None:
            return
        pending, facts, state = self._pending
        self._pending = None

        def write_files(directory: Path) -> None:
            self.run.reading.tokenizer.save(directory)
            (directory / checkpoint.STATE).write_text(state)

        waited = time.monotonic()
        pending.commit(self.run.config, facts, write_files)
        now = time.monotonic()
        stall, total = self._stalled + now - waited, now - self._began
        log.info("%s: training waited %.2f s, on disk after %.2f s", pending.target.name, stall, total)
        options = self.run.config.checkpoint
        with self.run.ranks.together():
            if self.run.ranks.first:
                checkpoint.rotate(
                    self.directory, keep_last=options.keep_last, keep_every_steps=options.keep_every_steps
                )

    def close(self) -> None:
        """Gives up a save that nobody committed: the run is ending with an error."""
        if self._pending is not None:
            self._pending[0].abandon()

    def _snapshot(self, piece: Piece) -> Piece:
        """A copy in CPU memory of what this rank writes of the piece; the memory is kept for the next save."""
        piece = piece.share()
        key = (piece.name, piece.start)
        if key not in self._buffers:
            pinned = piece.data.device.type == "cuda"
            self._buffers[key] = torch.empty(piece.data.shape, dtype=piece.data.dtype, pin_memory=pinned)
        self._buffers[key].copy_(piece.data)
        return replace(piece, data=self._buffers[key])
