"""A shard on an object store is whole, or not there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from fsspec.spec import AbstractBufferedFile

from mamba_pretrain.data.writer import ShardWriter


class Failing(AbstractBufferedFile):  # type: ignore[misc]
    """An object that cannot be completed."""

    def __init__(self) -> None:
        self.closed = self.discarded = False

    def write(self, data: bytes) -> int:
        return len(data)

    def close(self) -> None:
        raise OSError(5, "the line is down")

    def discard(self) -> None:
        self.discarded = True


def test_an_upload_that_cannot_be_completed_is_given_up(tmp_path: Path) -> None:
    stream = Failing()
    with pytest.raises(OSError, match="the line is down"):  # noqa: SIM117 - what is tested is leaving the second
        with ShardWriter(tmp_path / "train", vocab_size=9, create=lambda _: stream) as writer:
            writer.append(np.array([1, 2]))
    assert stream.discarded and stream.closed
