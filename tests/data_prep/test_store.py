"""A store's locks hold for the directory that is there."""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path

import pytest

from data_prep.store import store_at
from mamba_pretrain.data.shards import ShardError

LOCK = "run.lock"


@pytest.mark.parametrize("then", ["nothing", "made again", "made again and locked"])
def test_a_lock_whose_directory_went_while_a_process_waited_for_it_is_taken_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, then: str
) -> None:
    """As where the run that had it ended well, and perhaps another one began."""
    place = tmp_path / "data.work"
    waiting, other = store_at(place), store_at(place)
    flock, waits = fcntl.flock, [0]
    with contextlib.ExitStack() as others:

        def wait(descriptor: int, kind: int) -> None:
            waits[0] += 1
            if waits[0] == 1:
                other.remove_all(first=LOCK)
                if then != "nothing":
                    others.enter_context(other.lock(LOCK))
                if then == "made again":
                    others.close()
            flock(descriptor, kind)

        monkeypatch.setattr(fcntl, "flock", wait)
        if then == "made again and locked":
            with pytest.raises(ShardError, match=rf"in use by another run \(process {os.getpid()} on .* run.lock"):
                others.enter_context(waiting.lock(LOCK))
            return
        with waiting.lock(LOCK):
            assert waits[0] >= 2
            with pytest.raises(ShardError, match="in use by another run"), other.lock(LOCK):
                pass
        with other.lock(LOCK):
            pass
